"""tools/bench.py as a user starts it, at a small size: what it measures, not how fast."""

import json

import pytest

from helpers import ROOT, start

TINY = ('--device=cpu --ch=32 --ch_mult=1 --attn=0 --num_res_blocks=1 --img_size=8 --batch_size=4 '
        '--repeats=2 --classifier=densenet_small').split()


def bench(*words, cwd=ROOT):
    return start([ROOT / 'tools/bench.py', *words], cwd)


def test_rows_sides_and_parts(tmp_path):
    done = bench(*TINY, '--rows=base,pd,rdd,sample,memory', '--group=4', '--profile',
                 f'--json={tmp_path}/b.json')
    assert done.returncode == 0, done.stderr
    rows = {row['row']: row for row in json.loads((tmp_path / 'b.json').read_text())['rows']}
    assert list(rows) == ['base', 'pd', 'rdd', 'sample 1', 'sample 4', 'sample 8', 'memory']
    trains = dict(base=set(), pd={'teacher'}, rdd={'teacher', 'classifier'})
    for name, more in trains.items():
        for side in rows[name]['sides'].values():
            assert set(side['parts']) == more | {'data wait', 'student', 'losses', 'backward',
                                                 'optimiser'}
            assert len(side['seconds']) == 2 and min(side['seconds']) > 0 < side['peak_mib']
            shares = dict(side['operators'])
            assert len(shares) == 6 and 0 < sum(shares.values()) <= 1
        assert len(rows[name]['convolution_share']) == 2 and rows[name]['convolution_share'][0] > 0
    assert '% of convolutions alone' in done.stdout
    for _, fast, plain, value, gradient in rows['memory']['mib']:
        assert float(fast) >= 0 and float(plain) >= 0
        assert float(value) < 1e-5 and float(gradient) < 1e-5
        assert f'{value} | {gradient} |' in done.stdout


def test_estimate_is_marked_and_follows_the_rate(tmp_path):
    done = bench('--device=cpu', '--rows=estimate', '--tflops=50', f'--json={tmp_path}/b.json')
    assert done.returncode == 0, done.stderr
    assert 'ESTIMATE, not measured' in done.stdout and 'supposed' in done.stdout
    (_, *work), (_, *hours) = json.loads(
        (tmp_path / 'b.json').read_text())['rows'][0]['rows'][:2]
    # 800,000 steps of 256 images, three passes of 2 x 6.1e9 multiply-adds
    assert float(work[0]) == pytest.approx(800000 * 256 * 3 * 2 * 6.1e9 / 1e18, rel=.03)
    for operations, time in zip(work, hours):
        assert float(time) == pytest.approx(float(operations) * 1e18 / 50e12 / 3600, rel=.02)


def test_against_another_checkout(tmp_path):
    """The other folder's own bench_steps.py runs, in turn with ours."""
    other = tmp_path / 'other/tools/bench_steps.py'
    other.parent.mkdir(parents=True)
    other.write_text(
        'import json, sys\n'
        'file = [word[7:] for word in sys.argv if word.startswith("--json=")][0]\n'
        'json.dump(dict(fast=dict(seconds=[123.], parts={}, peak_mib=1.)), open(file, "w"))\n')
    done = bench(*TINY, '--rows=base', f'--against={tmp_path}/other', f'--json={tmp_path}/b.json')
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / 'b.json').read_text())['rows']
    assert row['row'] == 'base' and list(row['sides']) == ['here', 'against']
    assert row['sides']['against']['seconds'] == [123., 123.]
    assert len(row['sides']['here']['seconds']) == 2 and 0 < row['sides']['here']['seconds'][0] < 99
    assert 'images/s here | images/s against | against / here' in done.stdout


@pytest.mark.parametrize('words, sentence', [
    (['--against=nowhere'], '--against nowhere has no tools/bench_steps.py'),
    ([f'--against={ROOT}', '--rows=base,score'], '--rows base,score with --against')])
def test_against_mistakes(words, sentence):
    done = bench(*TINY, *words)
    assert done.returncode == 2 and sentence in done.stderr and 'Traceback' not in done.stderr


def test_unknown_row(tmp_path):
    done = bench('--rows=bass', cwd=tmp_path)       # works from any folder
    assert done.returncode == 2 and '--rows bass is unknown' in done.stderr
    assert 'Traceback' not in done.stderr
