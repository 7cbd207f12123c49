"""Odd files and resumed runs: one sentence, nothing lost. See tests/mistakes.py for flags."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from helpers import BASE, EVAL, NETWORK, PD, RDD, command, fork_all
from runtime import checkpoint
from tools import plot

LOST = 'holds values that are not finite'


@pytest.fixture(scope='module')
def said(tmp_path_factory):
    """({case: (exit code, standard output, standard error)}, folder of all runs)"""
    folder = tmp_path_factory.mktemp('odd')
    classifier = ['classifier/train.py', '--model=densenet_small', '--dataset=digits', '--seed=0',
                  '--img_size=8', '--epoch=1', '--max_steps=2', '--batchsize=32',
                  '--num_workers=0', f'--result_path={folder}/classifier']
    scorer = f'--feature_network={folder}/classifier/digits/densenet_small'
    rdd = [*RDD, f'--base_ckpt={folder}/base',
           f'--classifier_path={folder}/classifier/digits/densenet_small']
    measure = ['score/get_npz.py', '--dataset=digits', '--img_size=8', '--max_images=50',
               '--num_workers=0', scorer]
    made = fork_all(dict(
        base=[command(BASE, f'--logdir={folder}/base'), command(rdd, f'--logdir={folder}/rdd')],
        other=[command(classifier), command(measure, f'--output={folder}/stats.npz')]))
    for results in (made['other'], made['base'][:1]):
        assert all(code == 0 for code, *_ in results), results
    code, *_ = fork_all(dict(it=[command(rdd, f'--logdir={folder}/rdd')]))['it'][0]
    assert code == 0
    jobs = cases(folder, rdd, measure, [*EVAL, f'--logdir={folder}/base', scorer,
                                        f'--fid_cache={folder}/stats.npz'])
    return {name: result for name, (result,) in fork_all(jobs).items()}, folder


def altered(folder, name, source='base', **changes):
    """A copy of a run whose checkpoints have other entries; its folder."""
    shutil.copytree(str(folder / source), str(folder / name))
    for file in (folder / name).glob('*.pt'):
        checkpoint.save(file, dict(checkpoint.read(file), **changes))
    return folder / name


def cases(folder, rdd, measure, score):
    """{name: [command]}; makes what they need."""
    state = checkpoint.read(folder / 'base')
    nan = {key: value * float('nan') for key, value in state['net_model'].items()}
    whole = {key: value.long() for key, value in state['net_model'].items()}
    binary = altered(folder, 'binary')
    (binary / 'metrics.jsonl').write_bytes(b'\xff\xfe\n' + (binary / 'metrics.jsonl').read_bytes())
    (altered(folder, 'place') / 'metrics.jsonl').unlink()
    (folder / 'place/metrics.jsonl').mkdir()
    shutil.copy(str(folder / 'stats.npz'), str(folder / 'copy.npz'))
    np.savez(str(folder / 'samples.npz'), arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    (folder / 'noise.txt').write_bytes(b'\xff\xfe\x00')
    (folder / 'mark.txt').write_text('\ufeff--T=16\n--warmup=2\n')
    (folder / 'prose.txt').write_text('--T=8\nhello world\n')
    (folder / 'base/results.jsonl').write_text('{"half')
    teacher = {name: f'--base_ckpt={altered(folder, name, **changes)}' for name, changes in dict(
        nan=dict(net_model=nan, ema_model=nan), whole=dict(net_model=whole, ema_model=whole),
        minus=dict(T=-8), words=dict(T='eight'), zero=dict(time_scale=0)).items()}
    more = ['--total_steps=6', '--log_step=1']
    found = {f'teacher_{name}': [*PD, flag, f'--logdir={folder}/new_{name}']
             for name, flag in teacher.items()}
    steps = dict(text=dict(step='x'), minus=dict(step=-7), optim=dict(optim={}))
    for name, changes in steps.items():
        found[f'step_{name}'] = [*BASE, *more, f'--logdir={altered(folder, "r" + name, **changes)}']
    found.update(
        lost=[*BASE, *more, f'--logdir={altered(folder, "lost", net_model=nan)}'],
        binary=[*BASE, *more, f'--logdir={binary}'],
        place=[*BASE, *more, f'--logdir={folder}/place'],
        no_memory=[*rdd, *more, '--loss_type=none', f'--logdir={altered(folder, "m", "rdd")}'],
        no_average=[*BASE, *more, '--ema_decay=0', f'--logdir={altered(folder, "a")}'],
        other_loss=[*BASE, *more, '--loss_type=x', f'--logdir={altered(folder, "o")}'],
        other_seed=[*BASE, *more, '--seed=9', f'--logdir={altered(folder, "s")}'],
        overwrite=[*score, f'--save_images={folder}/copy.npz'],
        again=[*score, f'--save_images={folder}/samples.npz'],
        statistics=[*measure, f'--output={folder}/samples.npz'],
        noise=[*BASE, f'--flagfile={folder}/noise.txt', f'--logdir={folder}/n'],
        mark=['train_base.py', *NETWORK, f'--flagfile={folder}/mark.txt', '--total_steps=1',
              f'--logdir={folder}/mark'],
        prose=[*BASE, f'--flagfile={folder}/prose.txt', f'--logdir={folder}/p'])
    return {name: [command(argv)] for name, argv in found.items()}


@pytest.mark.parametrize('name, code, words', [
    ('teacher_nan', 2, LOST), ('teacher_whole', 2, LOST), ('teacher_minus', 2, 'T in the check'),
    ('teacher_words', 2, 'T in the checkpoint is eight'), ('teacher_zero', 2, 'time_scale in the'),
    ('step_text', 2, 'whose step is x'), ('step_minus', 2, 'whose step is -7'),
    ('step_optim', 2, 'optim in the checkpoint of the run is incomplete'),
    ('lost', 2, 'weights are not finite; replace its ckpt.pt by an earlier ckpt_STEP.pt'),
    ('place', 2, 'has a folder metrics.jsonl, where a run writes a file'),
    ('no_memory', 2, '--loss_type is none and the run .* with mp2p, whose state would be lost'),
    ('no_average', 2, '--ema_decay is 0.0 and the run .* with 0.5, whose state would be lost'),
    ('other_seed', 2, '--seed is 9 and the run .* was started with 0, which cannot change'),
    ('overwrite', 2, '--save_images .*copy.npz exists and does not hold samples'),
    ('statistics', 2, '--output .*samples.npz exists and holds samples, not statistics'),
    ('noise', 2, 'a flagfile is not UTF-8 text'),
    ('prose', 2, 'a flagfile has the line "hello world", expected --name=value')])
def test_refused(said, name, code, words):
    found, _, error = said[0][name]
    assert found == code and 'Traceback' not in error, error
    line, = [line for line in error.splitlines() if ': error: ' in line]
    assert re.search(words, line), line


@pytest.mark.parametrize('name', ['binary', 'other_loss', 'again', 'mark'])
def test_accepted(said, name):
    code, _, error = said[0][name]
    assert code == 0, error


def test_refused_runs_keep_what_they_had(said):
    _, folder = said
    assert checkpoint.read(folder / 'rdd')['memory'] and 'memory' in checkpoint.read(folder / 'm')
    average, before = (checkpoint.read(folder / name)['ema_model'] for name in ('a', 'base'))
    assert all(torch.equal(value, average[key]) for key, value in before.items())
    with np.load(str(folder / 'copy.npz')) as file:
        assert 'mu' in file.files


def test_other_flags_are_told(said):
    results, folder = said
    assert '--loss_type=x (was both)' in results['other_loss'][1]
    steps = [json.loads(line)['step'] for line in
             (folder / 'binary/metrics.jsonl').read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_cut_line_of_results_costs_no_other(said):
    _, folder = said
    first, *lines = (folder / 'base/results.jsonl').read_text().splitlines()
    assert first == '{"half' and lines and all('fid' in json.loads(line) for line in lines)


@pytest.mark.parametrize('text', [b'', b'{"a": 1}\n', b'[1, 2]\n', b'\xff\xfe\n'])
def test_plot_of_odd_results(tmp_path, text):
    (tmp_path / 'results.jsonl').write_bytes(text)
    with pytest.raises(plot.UserError, match='results.jsonl'):
        list(plot.read_word(str(tmp_path)))
