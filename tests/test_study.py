"""study.py: a tiny study, what its commands are, intervals and differences by hand, mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from PIL import Image

import demo
import study
from formats.load import load_model
from helpers import (RESULT, ROOT, assert_ran, assert_same, command, environment, fork_all,
                     make_scorer, parsing, start)
from runtime.cli import UserError
from score import results
from wiring import random_unet, save_model


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A teacher, flagfiles, a scoring network without training, and statistics."""
    folder = tmp_path_factory.mktemp('study')
    save_model(folder, random_unet())
    save_model(folder / 'four', random_unet(), T=4, time_scale=2)
    train = ('--ch=32\n--dataset=digits\n--img_size=8\n--batch_size=8\n--total_steps=1\n'
             '--sample_step=0\n')
    score = '\n'.join(['--img_size=8', '--num_images=20', *make_scorer(folder)])
    (folder / 'config').mkdir()
    for stage, text in dict(PD=train, RDD=train, DMD=train, EVAL=score).items():
        (folder / f'config/TINY_{stage}.txt').write_text(text)
    return folder


MISTAKES = {
    'there is no checkpoint none': '--base_ckpt=none',
    '--methods PD,TAT: choose of DDIM, PD, CFD': '--methods=PD,TAT',
    '--methods PD,PD: choose of .* each once': '--methods=PD,PD',
    '--method "../x=PD.py" has a name that no folder can': '--method=../x=PD.py',
    '--baseline PD is not among --methods RDD': '--methods=RDD',
    '--baseline PD/3: no student has 3 steps; choose of 4, 2, 1': '--baseline=PD/3',
    'PD.DMD starts from the last student of PD; list': '--methods=PD+DMD,PD',
    '"x=PD then PD.py" is not understood; .* "NAME=OTHER then train_d': 'x=PD then PD.py',
    '"x=PD.py--lr 1" is not understood; expected "NAME=SCRIPT FLAGS"': 'x=PD.py--lr 1',
    '"DDIM=foo.py" is not understood; expected "NAME': '--method=DDIM=foo.py',
    'x starts from the last student of DDIM; list': 'x=DDIM then train_dmd.py',
    'train_dmd.py needs a teacher of 16 steps or more, found 8; give': '--methods=PD,PD+DMD',
    '""x" is not understood .*; mind the quotes': '--eval_flags="x',
    '"--lr 1 --seed=3" sets --seed, which the study': '--train_flags=--lr 1 --seed=3',
    '"PD.py -seed 3" sets --seed, which the study': '--method=a=PD.py -seed 3',
    'NONE_PD.txt .--config. is missing; write it, or choose another': '--config=NONE',
    '--until 3 is not reached by halving the 8 steps of .*; choose': '--until=3',
    '--ddim_ckpt .*/four has 4 steps, expected a multiple of the 8': '--ddim_ckpt=TINY/four',
    '--logdir is missing': '--logdir='}


@pytest.mark.parametrize('sentence', list(MISTAKES))
def test_mistakes(tiny, sentence):
    words = [MISTAKES[sentence].replace('TINY', str(tiny))]
    if words[0].startswith('x='):       # a method of one's own
        words = [f'--method={words[0]}', '--methods=DDIM,PD,x']
    with parsing(study.define_flags) as parse, pytest.raises(UserError, match=sentence):
        parse(f'--base_ckpt={tiny}', '--config=DIGITS', f'--logdir={tiny}/new', '--report', *words)
        study.main()
    assert not (tiny / 'new').exists()


@pytest.mark.parametrize('methods, baseline, values, rows', [
    # three seeds: +1, +1, +4 above the baseline; two missing scores, without a seed in common
    (['PD', 'RDD'], 'PD', [[[1, 2, 3], [5, 5, np.nan]], [[2, 3, 7], [np.nan, np.nan, 9]]],
     ['| PD | 2.000 +- 2.484 | 5.000 +- 0.000 |',
      '| RDD | 4.000 +- 6.572 (+2.000 +- 4.303) | 9.000 |']),
    # one seed: all is compared with DDIM at 4 steps, the other column of its own row as well
    (['DDIM', 'DMD'], 'DDIM/4', [[[1.], [9.]], [[np.nan], [.5]]],
     ['| DDIM | 1.000 | 9.000 (+8.000) |', '| DMD | - | 0.500 (-0.500) |'])])
def test_table_by_hand(monkeypatch, methods, baseline, values, rows):
    monkeypatch.setattr(study, 'FLAGS', SimpleNamespace(methods=methods, baseline=baseline))
    assert study.table(np.array(values), [4, 1], 'fid').splitlines()[4:] == rows


def test_the_demo_writes_into_one_folder():
    paths = re.findall(r'\./[a-z]+', str(demo.STAGES))
    assert set(paths) == {'./config', './demo'} and demo.DEMO.name == 'demo'


# The students of one method and seed

@pytest.fixture
def chain(tiny, tmp_path, monkeypatch):
    """chain(seed, method, first, ..): a `Chain`, with these flags of the study."""
    monkeypatch.chdir(tiny)

    def chain(seed=0, method='PD', first=None, **changes):
        monkeypatch.setattr(study, 'FLAGS', SimpleNamespace(**dict(dict(
            logdir=str(tmp_path), config='TINY', methods=['DDIM', 'PD'], baseline='PD', seeds=2,
            jobs=2, until=1, report=False, train_flags='--lr=1', eval_flags='--num_images=4',
            read_flags_from_files=flags.FLAGS.read_flags_from_files), **changes)))
        counts = dict(DDIM=[8, 4, 2, 1], PD=[4, 2, 1]).get(method, [1])
        _, script, extra = study.parsed(study.METHODS[method])
        return study.Chain(method, script, extra, seed, counts, load_model('ckpt.pt'), first)
    return chain


def made(chain, fails=''):
    """Make a chain; what its commands would have written is written in their place.

    Returns the scripts that were run. fails: the one that ends with code 2, and its folder.
    """
    ran = []

    def run(words, stdout, **_):
        ran.append(words[0])
        values = dict(word.split('=', 1) for word in words[1:])
        folder = Path(values['--logdir'])
        if f'{words[0]} {folder.name}' == fails:
            stdout.write('a line\nthe reason\n')
            return 2
        for name in {'PD.py': ['4', '2', '1'], 'train_dmd.py': ['.']}.get(words[0], []):
            (folder / name).mkdir(parents=True, exist_ok=True)
            if not (folder / name / 'ckpt.pt').exists():
                (folder / name / 'ckpt.pt').touch()
        if words[0] == 'ddim_eval.py':
            assert (folder / 'ckpt.pt').exists()
            results.append(folder / 'results.jsonl', dict(
                RESULT, seed=int(values['--seed']), nfe=int(folder.name)))
            np.savez(values['--save_images'], np.zeros((4, 8, 8, 3), np.uint8))
        return 0

    chain.record_plan()
    chain.make(SimpleNamespace(run=run), {})
    return ran


def test_a_chain_for_every_seed_and_method(chain):
    """Its steps, teacher, and the student of the same seed that it starts from."""
    few, many = (SimpleNamespace(diffusion=SimpleNamespace(T=T)) for T in (8, 64))
    chain(baseline='DDIM/64')       # sets the flags
    methods = {name: study.parsed(study.METHODS[name]) for name in ('DDIM', 'RDD', 'RDD+DMD')}
    found = study.all_chains(methods, [4, 2, 1], few, many)
    expected = [('DDIM', [64, 8, 4, 2, 1], many, ''), ('RDD', [4, 2, 1], few, ''),
                ('RDD+DMD', [1], many, 'RDD')]
    assert [(it.seed, it.method, it.step_counts, it.teacher) for it in found] == [
        (seed, *of_method[:3]) for seed in (0, 1) for of_method in expected]
    assert [it.first for it in found] == [None, None, found[1], None, None, found[4]]


def test_a_teacher_of_any_source_becomes_a_run(chain):
    chain()     # sets the flags
    model = load_model('ckpt.pt', steps=4)
    study.save_as_run(model)
    again = load_model(model.file)
    assert again.diffusion.arguments() == model.diffusion.arguments()
    assert_same(again.network.state_dict(), model.network.state_dict())


def test_commands(chain, tmp_path):
    """A seed for the training and its scores; one command halves down to --until."""
    train, *scores = chain(2).commands().values()
    assert train[0] == 'PD.py' and {
        '--seed=2', f'--logdir={tmp_path}/PD/seed2', '--base_ckpt=ckpt.pt',
        '--flagfile=config/TINY_PD.txt', '--until=1', '--lr=1'} <= set(train)
    for T, words in zip((4, 2, 1), scores):
        assert words[0] == 'ddim_eval.py' and {
            '--seed=2', f'--logdir={tmp_path}/PD/seed2/{T}', '--stride=1',
            '--flagfile=config/TINY_EVAL.txt', '--num_images=4'} <= set(words)
    ddim = chain(1, 'DDIM')
    ddim.step_counts = [4, 2, 1]     # its model may have more steps than the teacher: --ddim_ckpt
    assert list(ddim.commands()) == [4, 2, 1]
    for T, words in ddim.commands().items():
        assert {f'--stride={8 // T}', '--seed=1'} <= set(words)


@pytest.mark.parametrize('method, start, seconds', [
    ('PD+DMD', ['--base_ckpt={}/PD/seed1/1', '--student_steps=0'], 13.5),
    ('DMD', ['--base_ckpt=ckpt.pt', '--student_steps=1'], 3.5)])
def test_commands_of_dmd(chain, tmp_path, method, start, seconds):
    """One student, from that of the chain before or from the teacher; the cost counts both."""
    first = chain(1)
    it = chain(1, method, first if method == 'PD+DMD' else None)
    _, _, it.extra = study.parsed('PD then train_dmd.py --fake_updates 5')
    train, score = it.commands().values()
    assert train[0] == 'train_dmd.py' and not any('until' in word for word in train) and {
        '--flagfile=config/TINY_DMD.txt', '--teacher_ckpt=ckpt.pt', '--seed=1', '--lr=1',
        f'--logdir={tmp_path}/{method}/seed1/1', '--fake_updates', '5',
        *(word.format(tmp_path) for word in start)} <= set(train)
    assert score[0] == 'ddim_eval.py' and f'--logdir={tmp_path}/{method}/seed1/1' in score
    for chain, text in ((first, '10\n'), (it, '2.5\n1\n')):
        chain.folder.mkdir(parents=True)
        (chain.folder / 'seconds.txt').write_text(text)
    assert it.seconds() == seconds


def test_no_student_starts_from_one_that_is_not_finished(chain):
    """It is made when the first one has its score; not from a checkpoint that is half trained."""
    first = chain(1)
    it = chain(1, 'PD+DMD', first)
    made(first, fails='ddim_eval.py 1')
    assert made(it) == [] and 'no student of PD to start from' in it.problem
    made(first)
    assert made(it) == ['train_dmd.py', 'ddim_eval.py']


def test_a_chain_waits_for_the_one_it_starts_from(chain, monkeypatch):
    """With two jobs at once, also if it was listed before other methods, or the first one fails."""
    ended = []

    def make(self, commands, env):
        if self.method == 'PD':
            time.sleep(.2)
        ended.append(self.method)
        if self.method == 'PD':
            raise OSError('no space left')

    first = chain()
    monkeypatch.setattr(study.Chain, 'make', make)
    with pytest.raises(OSError):
        study.run_all([first, chain(0, 'PD+DMD', first), chain(0, 'DDIM')])
    assert ended == ['DDIM', 'PD', 'PD+DMD']


@pytest.mark.parametrize('method, first, again', [
    ('PD', ['PD.py'] + ['ddim_eval.py'] * 3, ['PD.py', 'ddim_eval.py']),
    ('DDIM', ['ddim_eval.py'] * 4, ['ddim_eval.py'])])
def test_finished_students_are_skipped(chain, method, first, again):
    it = chain(method=method)
    assert made(it) == first and made(it) == []
    (it.folder / '1/results.jsonl').write_text('{"cut')
    assert made(it) == again
    times = it.folder / 'seconds.txt'       # a start that trains nothing does not count
    assert not times.exists() if method == 'DDIM' else times.read_text().count('\n') == 1


def test_failed_students_are_named(chain, tmp_path):
    """In the table, with the last line of the command; what was made counts."""
    chains = [chain(0), chain(1), chain(0, 'DDIM')]
    for it, fails in zip(chains, ('ddim_eval.py 2', 'PD.py seed1', '')):
        made(it, fails)
    with pytest.raises(UserError, match='5 students are missing, see .*table.md') as caught:
        study.report(chains)
    assert caught.value.code == 1
    text = (tmp_path / 'table.md').read_text()
    assert '- PD, seed 0, 2 steps: ddim_eval.py ended with code 2: the reason\n' in text
    assert '- PD, seed 1, 4 steps: PD.py ended with code 2: the reason\n' in text
    assert '| PD | - | 1.000 | - | - |' in text
    assert 'mean over the seeds: no student is finished.\n' in text
    assert Image.open(tmp_path / 'samples_4.png').size[1] > 2 * 64      # two rows
    assert (tmp_path / 'study.png').exists() or 'matplotlib' not in sys.modules


def test_the_report_keeps_seeds_apart(chain, tmp_path):
    chains = [chain(0), chain(1)]
    for it, fid, seconds in zip(chains, (1., 3.), (10, 30)):
        made(it)
        for seed, nfe, ckpt in ((it.seed, 1, 'ckpt'), (7, 1, 'ckpt'), (it.seed, 2, 'ckpt'),
                                (it.seed, 1, 'ckpt_2')):       # the last three by hand
            results.append(it.folder / '1/results.jsonl', dict(
                RESULT, seed=seed, nfe=nfe, fid=fid, ckpt=f'PD/1/{ckpt}.pt'))
            fid = 99.
        (it.folder / 'seconds.txt').write_text(f'{seconds}\n')
    (chains[0].folder / '1/samples.npz').unlink()       # costs its picture alone
    study.report([*chains])
    text = (tmp_path / 'table.md').read_text()
    assert '| 2.000 +- 12.706 |' in text and 'mean over the seeds: PD 20.' in text


@pytest.mark.parametrize('key, value', [('num_images', 4), ('reference_images', 30),
                                        ('reference', 'other'), ('pixels', 'float')])
def test_scores_of_two_protocols_are_refused(chain, tmp_path, key, value):
    chains = [chain(0), chain(1)]
    for it in chains:
        made(it)
    file, result = chains[1].folder / '2/results.jsonl', dict(RESULT, seed=1, nfe=2)
    results.append(file, dict(result, reference=str(ROOT / RESULT['reference'])))
    study.comparable_results(chains)        # another path of one reference
    results.append(file, dict(result, **{key: value}))
    with pytest.raises(UserError, match=f'seed1/2/results.jsonl has a score with {key} .*{value}'):
        study.report(chains)
    assert not (tmp_path / 'table.md').exists()


def test_report_before_anything_is_scored(chain, tmp_path):
    with pytest.raises(UserError, match='3 students are missing.*run the command without --report'):
        study.report([chain(report=True)])
    assert '- PD, seed 0, 1 steps: not made yet' in (tmp_path / 'table.md').read_text()
    assert not (tmp_path / 'study.png').exists()


@pytest.mark.parametrize('change', ['flags', 'TINY_DMD.txt', 'TINY_EVAL.txt', 'teacher', 'start'])
def test_students_made_otherwise_are_refused(chain, tiny, tmp_path, monkeypatch, change):
    """Other flags, another text of a flagfile, other weights, another start; not fewer steps."""
    it = chain(1, 'PD+DMD', chain())
    it.record_plan()
    (it.folder / '1').mkdir()
    (it.folder / '1/ckpt.pt').touch()
    fewer = chain(1, 'PD+DMD', chain(), until=2)
    fewer.step_counts = [2]
    fewer.record_plan()
    other = chain(1, 'PD+DMD', chain(), train_flags=f'--lr={2 if change == "flags" else 1}')
    if change.endswith('.txt'):
        shutil.copytree(str(tiny / 'config'), str(tmp_path / 'config'))
        (tmp_path / 'config' / change).write_text('--wd=1\n')
        monkeypatch.chdir(tmp_path)
    if change == 'teacher':
        other.teacher.network.head.bias.data += 1
    if change == 'start':
        other.first.extra = ['--wd=1']
    with pytest.raises(UserError, match='seed1 was made by other commands, from other flagf'):
        other.record_plan()


def test_a_study(tiny, tmp_path):
    """As a user starts it, and once more from another folder, where nothing is left to do."""
    words = ['study.py', '--config=TINY', '--seeds=1', '--until=4', '--methods=PD']
    (tmp_path / 'config').symlink_to(tiny / 'config')
    assert_ran(fork_all(dict(it=[
        command(words, '--base_ckpt=.', '--logdir=done', '--train_flags=--data_root=./config',
                cwd=str(tiny)),
        command(words, f'--base_ckpt={tiny}', f'--logdir={tiny}/done',
                f'--train_flags=--data_root={tiny}/config', cwd=str(tmp_path))]))['it'])
    line, = (tiny / 'done/PD/seed0/4/results.jsonl').read_text().splitlines()
    table = (tiny / 'done/table.md').read_text()
    assert f'| PD | {json.loads(line)["fid"]:.3f} |' in table and 'Missing' not in table


STARTER = '''
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)        # and one under nohup this
from concurrent.futures import ThreadPoolExecutor
from runtime import cli
from runtime.commands import Commands

def main(words):
    with ThreadPoolExecutor(1) as pool, Commands() as commands:
        for future in [pool.submit(commands.run, words) for _ in range(2)]:
            future.result()

cli.run(main, words=True)
'''


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130),
                                          (signal.SIGHUP, 129)])
def test_commands_end_with_the_script_that_started_them(tmp_path, number, code):
    """While the first one runs and a second one waits for its turn."""
    child = tmp_path / 'child.py'
    child.write_text('import os, time; print(os.getpid()); time.sleep(60)')
    process = subprocess.Popen(
        [sys.executable, '-c', STARTER, str(child)], cwd=str(ROOT), env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    pid = process.stdout.readline().strip()
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == code and 'Traceback' not in error, error
    assert pid and not out and not os.path.exists(f'/proc/{pid}')


def test_under_nohup_a_hangup_ends_nothing():
    done = start(['-c', 'import os, signal; from runtime.commands import Commands\n'
                  'signal.signal(signal.SIGHUP, signal.SIG_IGN)\n'
                  'with Commands(): os.kill(os.getpid(), signal.SIGHUP)'])
    assert done.returncode == 0, done.stderr
