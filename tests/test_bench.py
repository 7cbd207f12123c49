"""tools/bench.py as a user starts it, at a small size: what it measures, not how fast."""

import re
from types import SimpleNamespace

import pytest
from absl.flags import FLAGS

from helpers import ROOT, command, fork_all
from runtime.cli import UserError
from tools import bench

# images of the recipe of the digits, and forward passes of the U-Net per image
RECIPE = dict(base=(1200 * 64, 3), pd=(3 * 150 * 64, 5), rdd=(5 * 150 * 64, 5), dmd=(200 * 64, 9),
              eval=(749, 8))
FORWARD = .0160     # GFLOP of the network of the digits with 32 channels in place of 64


@pytest.mark.parametrize('rows', [
    ['pd'], pytest.param(['base', 'rdd', 'dmd', 'eval'], marks=pytest.mark.slow)])
def test_table(rows, tmp_path):
    """Started in another folder, with a flag for the scripts; base, if any, comes first."""
    (code, out, err), = fork_all(dict(table=[command(
        ['tools/bench.py', '--config=DIGITS', f'--rows={",".join(rows[::-1])}', '--steps=5',
         '--batch_size=4', '--tflops=50', '--', '--ch=32'], cwd=str(tmp_path))]))['table']
    assert code == 0, err
    lines = [line.strip('| ').split(' | ') for line in out.splitlines() if '|' in line]
    assert [row for row, *_ in lines[2:]] == rows
    for row, batch, rate, memory, work, _, hours in lines[2:]:
        median, smallest, largest = map(float, re.findall(r'[\d.]*\d', rate))
        assert 0 < smallest <= median <= largest and batch == '4'
        assert (smallest < largest and float(memory) > 50) == (row != 'eval')
        images, forwards = RECIPE[row]
        expected = forwards * FORWARD + (.041 if row == 'rdd' else 0)       # its classifier
        assert float(work) == pytest.approx(expected, rel=.03)
        assert float(hours) == pytest.approx(images * float(work) * 1e9 / 50e12 / 3600, rel=.02)


def test_unknown_row(monkeypatch):
    monkeypatch.setattr(bench, 'FLAGS', SimpleNamespace(rows=['bass']))
    with pytest.raises(UserError, match='--rows bass: choose of base, pd, rdd, dmd, eval'):
        bench.main([])


def test_a_flagfile_on_top_of_another(monkeypatch):
    monkeypatch.setattr(bench, 'FLAGS', SimpleNamespace(
        config='DIGITS', read_flags_from_files=FLAGS.read_flags_from_files))
    monkeypatch.chdir(ROOT)
    assert bench.recipe('best')['classifier'] == 'densenet_small'
    assert bench.recipe('best')['loss_type'] == 'none'      # the later one counts
