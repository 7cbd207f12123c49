"""study.py: a tiny study, intervals and differences by hand, and mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import demo
import study
from classifier import build_classifier
from helpers import ROOT, command, environment, fork_all
from model import UNet
from runtime import checkpoint
from score.reference import Statistics, save_statistics


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """A teacher, flagfiles, a scoring network without training, and statistics."""
    folder = tmp_path_factory.mktemp('study')
    net = UNet(8, 32, [1, 1], [1], 1)
    checkpoint.save(folder / 'ckpt.pt', dict(net_model=net.state_dict(), T=8, time_scale=1))
    train = ('--ch=32\n--dataset=digits\n--img_size=8\n--batch_size=8\n--total_steps=1\n'
             '--sample_step=0\n')
    net = build_classifier('convnet_small', 10)
    (folder / 'scorer').mkdir()
    checkpoint.save(folder / 'scorer/ckpt.pt', dict(
        model=net.state_dict(), name='convnet_small', mean=[.5] * 3, std=[.5] * 3))
    save_statistics(folder / 'real.npz', Statistics(np.zeros(net.num_features),
                                                    np.eye(net.num_features)))
    score = (f'--img_size=8\n--num_images=20\n--feature_network={folder}/scorer\n'
             f'--fid_cache={folder}/real.npz\n')
    (folder / 'config').mkdir()
    for stage, text in dict(PD=train, RDD=train, EVAL=score).items():
        (folder / f'config/TINY_{stage}.txt').write_text(text)
    return folder


MISTAKES = {
    'there is no checkpoint none': '--base_ckpt=none',
    '--methods TAT is unknown; choose of DDIM, PD, CFD': '--methods=PD,TAT',
    '--baseline PD is not among --methods RDD': '--methods=RDD',
    '--method "mine=rm x" is not understood': '--method=mine=rm x',
    '""x" is not understood .*; mind the quotes': '--eval_flags="x',
    '"--lr 1 --seed=3" sets --seed, which the study': '--train_flags=--lr 1 --seed=3',
    '"PD.py -seed 3" sets --seed, which the study': '--method=a=PD.py -seed 3',
    '--config NONE: there is no .*NONE_PD.txt; write it, or choose another': '--config=NONE',
    '--until 3 is not reached by halving the steps of .*; it has 8 steps': '--until=3',
    '--logdir is missing': '--logdir='}


def test_mistakes(tiny):
    words = ['study.py', f'--base_ckpt={tiny}', '--config=DIGITS', f'--logdir={tiny}/new']
    said = fork_all({pattern: [command(words, more)] for pattern, more in MISTAKES.items()})
    for pattern, ((code, _, error),) in said.items():
        assert code == 2 and 'Traceback' not in error and re.search(pattern, error), error
    assert not (tiny / 'new').exists()


def test_interval_by_hand():
    mean, half = study.interval(np.array([1., np.nan, 2., 3.]))
    assert mean == 2 and half == pytest.approx(4.302653 * 1 / 3 ** .5, rel=1e-6)
    mean, half = study.interval(np.array([np.nan, 7.]))
    assert mean == 7 and np.isnan(half)


def test_table_by_hand(monkeypatch):
    """Scores of the same seed are compared: +1, +1, +4 above the baseline, less is better."""
    monkeypatch.setattr(study, 'FLAGS', SimpleNamespace(methods=['PD', 'RDD'], baseline='PD'))
    values = np.array([[[1., 2., 3.], [5., 5., np.nan]], [[2., 3., 7.], [np.nan, np.nan, 9.]]])
    rows = study.table(values, [4, 2], 'fid').splitlines()[4:]
    assert rows == ['| PD | 2.000 +- 2.484 | 5.000 +- 0.000 |',
                    '| RDD | 4.000 +- 6.572 (+2.000 +- 4.303) | 9.000 |']


def test_the_demo_writes_into_one_folder():
    lines = [*demo.TEACHER, *demo.FEATURES, *demo.SCORER, *demo.SCORE_TEACHER, *demo.STUDY,
             demo.SAMPLES]
    paths = re.findall(r'\./[a-z]+', ' '.join(lines))
    assert set(paths) == {'./config', './demo'} and demo.DEMO.name == 'demo'


def test_every_training_has_its_own_seed(monkeypatch, tiny):
    monkeypatch.setattr(study, 'config', lambda stage: tiny / f'config/TINY_{stage}.txt')
    monkeypatch.setattr(study, 'FLAGS', SimpleNamespace(
        logdir='x', train_flags='--lr=1', eval_flags='', double=False))
    teacher = SimpleNamespace(diffusion=SimpleNamespace(T=8), file='teacher.pt')
    for seed in (0, 1, 2):
        one, two = (study.Student('PD', 'PD.py', seed, T, teacher) for T in (4, 2))
        for student in (one, two):
            train, score = student.commands()
            for words in (train, score):
                assert f'--seed={seed}' in words and f'--logdir={student.folder}' in words
        assert '--base_ckpt=teacher.pt' in one.commands()[0]
        assert f'--base_ckpt={one.folder}' in two.commands()[0]
        assert '--lr=1' in one.commands()[0] and str(one.folder) == f'x/PD/seed{seed}/4'
    monkeypatch.setattr(study, 'FLAGS', SimpleNamespace(
        logdir='x', train_flags='', eval_flags='', double=True, until=1))
    assert one.commands()[0] == two.commands()[0]       # one command, the last two twice as long
    assert {'--until=1', '--logdir=x/PD/seed2', '--seed=2'} <= set(two.commands()[0])


def study_of(tiny, logdir, *more):
    """Exit code, standard output and error of a study of one seed."""
    words = [f'--base_ckpt={tiny}', '--config=TINY', '--seeds=1', '--until=4', '--methods=DDIM,PD',
             f'--logdir={tiny}/{logdir}', *more]
    (result,), = fork_all(dict(it=[command(['study.py'], *words, cwd=str(tiny))])).values()
    assert 'Traceback' not in result[2], result[2]
    return result


def test_failed_students_are_named(tiny):
    code, _, error = study_of(tiny, 'failed', '--train_flags=--ch=64', '--methods=PD', '--until=2')
    assert code == 1 and '2 of 2 students are missing' in error, error
    text = (tiny / 'failed/table.md').read_text()
    assert re.search('- PD, seed 0, 4 steps: .*--ch is 64 and the network in', text)
    assert '- PD, seed 0, 2 steps: an earlier student of its chain is missing' in text
    assert '| PD | - | - |' in text and not (tiny / 'failed/PD/seed0/4/ckpt.pt').exists()


def test_a_study_and_once_more(tiny):
    """Students that are finished are skipped, others made again; --report makes none."""
    assert study_of(tiny, 'done', '--jobs=2')[0] == 0
    ddim, pd = (tiny / 'done' / name / 'results.jsonl' for name in ('DDIM/seed0/8', 'PD/seed0/4'))
    before, scores, picture = ddim.stat().st_mtime_ns, pd.read_text(), tiny / 'done/samples_4.png'
    table = (tiny / 'done/table.md').read_text()
    fid = json.loads(scores)['fid']
    assert f'| PD | - | {fid:.3f} |' in table and 'Missing' not in table
    assert Image.open(str(picture)).size[1] > 16        # two rows of 8 px
    pd.write_text('{"cut')
    code, _, error = study_of(tiny, 'done', '--report')
    assert code == 1 and '1 of 3 students are missing' in error
    assert '- PD, seed 0, 4 steps: not made yet' in (tiny / 'done/table.md').read_text()
    assert study_of(tiny, 'done')[0] == 0
    assert ddim.stat().st_mtime_ns == before
    assert json.loads(pd.read_text().splitlines()[-1])['fid'] == fid
    assert (tiny / 'done/table.md').read_text() == table


def test_students_of_other_commands_are_refused(tiny):
    """Other flags, another text of the same flagfile, other weights in the same file."""
    assert study_of(tiny, 'same', '--methods=PD')[0] == 0
    flagfile, teacher = tiny / 'config/TINY_PD.txt', checkpoint.read(tiny)
    text, refused = flagfile.read_text(), [study_of(tiny, 'same', '--methods=PD',
                                                    '--train_flags=--lr=1')]
    flagfile.write_text(text + '--lr=1\n')
    refused.append(study_of(tiny, 'same', '--methods=PD'))
    flagfile.write_text(text)
    other = {key: value + 1 for key, value in teacher['net_model'].items()}
    checkpoint.save(tiny / 'ckpt.pt', dict(teacher, net_model=other))
    refused.append(study_of(tiny, 'same', '--methods=PD'))
    checkpoint.save(tiny / 'ckpt.pt', teacher)
    for code, output, _ in refused:
        assert code == 1
        assert 'was made by other commands, from other flagfiles or another teacher' in output
    assert study_of(tiny, 'same', '--methods=PD')[0] == 0


STARTER = '''
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores it
from concurrent.futures import ThreadPoolExecutor
from runtime import cli
from runtime.commands import Commands

def main():
    with ThreadPoolExecutor(1) as pool, Commands() as commands:
        words = ['CHILD', sys.argv[1]]
        print(list(pool.map(commands.run, [words, words])))

cli.run(lambda rest: main(), words=True)
'''
CHILD = '''
import os, sys, time
open(sys.argv[1], 'a').write(f'{os.getpid()}\\n')
time.sleep(60)
'''


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130),
                                          (signal.SIGHUP, 129)])
def test_commands_end_with_the_script_that_started_them(tmp_path, number, code):
    (tmp_path / 'child.py').write_text(CHILD)
    script = STARTER.replace('CHILD', str(tmp_path / 'child.py'))
    process = subprocess.Popen(
        [sys.executable, '-c', script, str(tmp_path / 'pids')], cwd=str(ROOT), env=environment(),
        stderr=subprocess.PIPE, universal_newlines=True)
    while not (tmp_path / 'pids').exists() or not (tmp_path / 'pids').read_text():
        time.sleep(.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == code and 'Traceback' not in error, error
    pid, = (tmp_path / 'pids').read_text().split()      # the second one was never started
    deadline = time.time() + 10
    while os.path.exists(f'/proc/{pid}') and time.time() < deadline:
        time.sleep(.01)
    assert not os.path.exists(f'/proc/{pid}')
