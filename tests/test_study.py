"""study.py: a tiny study, intervals by hand, a table, and mistakes."""

import json

import numpy as np
import pytest
from PIL import Image

from classifier import build_classifier
from helpers import ROOT, command, fork_all, launch, start
from model import UNet
from runtime import checkpoint
from score.reference import Statistics, save_statistics


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp('study')
    net = UNet(8, 32, [1, 1], [1], 1)
    checkpoint.save(folder / 'ckpt.pt', dict(net_model=net.state_dict(), T=8, time_scale=1))
    return folder


MISTAKES = dict(
    teacher=(['--base_ckpt=none'], 'there is no checkpoint none'),
    method=(['--methods=PD,TAT'], '--methods TAT is unknown; choose of DDIM, PD, CFD'),
    baseline=(['--methods=RDD'], '--baseline PD is not among --methods RDD'),
    own=(['--method=mine=rm x'], '--method "mine=rm x" is not understood'),
    config=(['--config=NONE'], '--config NONE: there is no .*NONE_PD.txt; write it, or choose of '
            'CIFAR10, DIGITS, FASHION, IMAGENET64, TEACHER'),
    until=(['--until=3'], '--until 3 is not reached by halving the steps of .*; it has 8 steps'),
    jobs=(['--jobs=0'], r'--jobs=0: 0 is not an integer in the range \[1, 256\]'),
    logdir=(['--logdir='], '--logdir is missing'))


def test_mistakes(teacher):
    words = ['study.py', f'--base_ckpt={teacher}', '--config=DIGITS', f'--logdir={teacher}/new']
    said = fork_all({name: [command(words, *more)] for name, (more, _) in MISTAKES.items()})
    for name, (_, pattern) in MISTAKES.items():
        code, _, error = said[name][0]
        assert code == 2 and 'Traceback' not in error, error
        with pytest.raises(ValueError, match=pattern):
            raise ValueError(error)
    assert not (teacher / 'new').exists()


def test_interval_by_hand():
    import study
    mean, half = study.interval([1., 2., 3.])
    assert mean == 2 and half == pytest.approx(4.302653 * 1 / 3 ** .5, rel=1e-6)
    assert np.isnan(study.interval([1.])[1])


def test_failed_students_are_named(teacher):
    """The flagfiles are for another network than the teacher's: the table says so, exit code 1."""
    words = ['study.py', f'--base_ckpt={teacher}', '--config=DIGITS', '--seeds=1', '--until=4',
             '--methods=PD', f'--logdir={teacher}/failed', '--train_flags=--total_steps=1']
    (code, _, error), = fork_all(dict(it=[command(words)]))['it']
    assert code == 1 and '1 of 1 students are missing' in error, error
    text = (teacher / 'failed/table.md').read_text()
    assert '- PD, seed 0, 4 steps: ' in text and '| PD | - |' in text
    assert '--ch is 64 and the network in' in text
    assert not (teacher / 'failed/PD/seed0/4/ckpt.pt').exists()


@pytest.fixture(scope='module')
def tiny(teacher):
    """Flagfiles of their own, a scoring network without training, and statistics."""
    network = ('--ch=32\n--ch_mult=1\n--ch_mult=1\n--attn=1\n--num_res_blocks=1\n--dropout=0\n'
               '--img_size=8\n')
    train = network + '--dataset=digits\n--batch_size=8\n--total_steps=1\n--sample_step=0\n'
    net = build_classifier('convnet_small', 10)
    (teacher / 'scorer').mkdir()
    checkpoint.save(teacher / 'scorer/ckpt.pt', dict(
        model=net.state_dict(), name='convnet_small', mean=[.5] * 3, std=[.5] * 3))
    save_statistics(teacher / 'real.npz', Statistics(np.zeros(net.num_features),
                                                     np.eye(net.num_features)))
    score = (f'--num_images=20\n--feature_network={teacher}/scorer\n'
             f'--fid_cache={teacher}/real.npz\n')
    (teacher / 'config').mkdir()
    for stage, text in dict(PD=train, RDD=train, EVAL=network + score).items():
        (teacher / f'config/TINY_{stage}.txt').write_text(text)
    return teacher


def test_a_study_and_once_more(tiny):
    """Two methods; students that are finished are skipped, others made again; --report."""
    words = [ROOT / 'study.py', f'--base_ckpt={tiny}', '--config=TINY', '--seeds=1', '--until=4',
             '--methods=DDIM,PD', f'--logdir={tiny}/done', '--jobs=2']
    launch(words, cwd=tiny)
    ddim, pd = (tiny / 'done' / name / 'results.jsonl' for name in ('DDIM/seed0/8', 'PD/seed0/4'))
    before, scores, picture = ddim.stat().st_mtime_ns, pd.read_text(), tiny / 'done/samples_4.png'
    table = (tiny / 'done/table.md').read_text()
    fid = json.loads(scores)['fid']
    assert f'| PD | - | {fid:.3f} |' in table and 'Missing' not in table
    assert Image.open(str(picture)).size[1] > 16        # two rows of 8 px
    pd.unlink()
    done = start([*words, '--report'], cwd=tiny)
    assert done.returncode == 1 and '1 of 3 students are missing' in done.stderr
    assert '- PD, seed 0, 4 steps: not made yet' in (tiny / 'done/table.md').read_text()
    launch(words, cwd=tiny)
    assert ddim.stat().st_mtime_ns == before and json.loads(pd.read_text())['fid'] == fid
    assert (tiny / 'done/table.md').read_text() == table
    done = start([*words, '--train_flags=--lr=1'], cwd=tiny)
    assert done.returncode == 1
    assert 'was made by other commands; choose another --logdir' in (
        tiny / 'done/table.md').read_text()
