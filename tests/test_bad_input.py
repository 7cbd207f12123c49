"""Odd files given to scripts: one sentence, nothing lost. See tests/mistakes.py for flags."""

import json
import re
import shutil

import numpy as np
import pytest

from classifier import build_classifier
from helpers import BASE, EVAL, NETWORK, command, fork_all
from model import UNet
from runtime import checkpoint
from score.reference import Statistics, save_statistics

REFUSED = dict(
    overwrite='--save_images .*copy.npz is neither a new or empty folder',
    statistics='--output .*samples.npz exists and holds no statistics',
    noise='a flagfile is not UTF-8 text',
    prose='a flagfile has the line "hello world", expected --name=value')


@pytest.fixture(scope='module')
def said(tmp_path_factory):
    """({case: (exit code, standard output, standard error)}, folder)"""
    folder = tmp_path_factory.mktemp('odd')
    checkpoint.save(folder / 'ckpt.pt', dict(net_model=UNet(8, 32, [1], [0], 1).state_dict(), T=8,
                                             time_scale=1, img_size=8))
    network = build_classifier('densenet_small', 10)
    checkpoint.save(folder / 'scorer.pt', dict(model=network.state_dict(), name='densenet_small'))
    size = network.num_features
    save_statistics(folder / 'stats.npz', Statistics(np.zeros(size), np.eye(size)))
    shutil.copy(str(folder / 'stats.npz'), str(folder / 'copy.npz'))
    np.savez(str(folder / 'samples.npz'), arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    (folder / 'noise.txt').write_bytes(b'\xff\xfe\x00')
    (folder / 'mark.txt').write_text('\ufeff--T=16\n--warmup=2\n')
    (folder / 'prose.txt').write_text('--T=8\nhello world\n')
    (folder / 'results.jsonl').write_text('{"half')
    scorer = f'--feature_network={folder}/scorer.pt'
    score = [*EVAL, f'--logdir={folder}', scorer, f'--fid_cache={folder}/stats.npz']
    cases = dict(
        overwrite=[*score, f'--save_images={folder}/copy.npz'],
        again=[*score, f'--save_images={folder}/samples.npz'],
        statistics=['score/get_npz.py', '--dataset=digits', scorer,
                    f'--output={folder}/samples.npz'],
        noise=[*BASE, f'--flagfile={folder}/noise.txt', f'--logdir={folder}/n'],
        prose=[*BASE, f'--flagfile={folder}/prose.txt', f'--logdir={folder}/p'],
        mark=['train_base.py', *NETWORK, f'--flagfile={folder}/mark.txt', '--total_steps=1',
              f'--logdir={folder}/mark'])
    results = fork_all({name: [command(words)] for name, words in cases.items()})
    return {name: result for name, (result,) in results.items()}, folder


@pytest.mark.parametrize('name', list(REFUSED))
def test_refused(said, name):
    code, _, error = said[0][name]
    assert code == 2 and 'Traceback' not in error, error
    line, = [line for line in error.splitlines() if ': error: ' in line]
    assert re.search(REFUSED[name], line), line


def test_accepted(said):
    """A byte order mark in a flagfile; samples over samples; a cut line of results stays alone."""
    results, folder = said
    assert results['mark'][0] == 0, results['mark'][2]
    assert results['again'][0] == 0, results['again'][2]
    with np.load(str(folder / 'samples.npz')) as samples, np.load(str(folder / 'copy.npz')) as copy:
        assert len(samples['arr_0']) == 20 and 'mu' in copy.files
    first, last = (folder / 'results.jsonl').read_text().splitlines()
    assert first == '{"half' and 'fid' in json.loads(last)
