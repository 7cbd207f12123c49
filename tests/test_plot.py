"""tools/plot.py: which lines become which curve, rows of samples, and the pictures."""

import json
import re
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from helpers import RESULT
from runtime import pictures
from runtime.cli import UserError
from tools import plot


@pytest.fixture(autouse=True)
def values(monkeypatch, tmp_path):
    """The flags, and the folder of the tests as working directory."""
    found = SimpleNamespace(output='new/plot.png', value='fid', samples=False, columns=16)
    monkeypatch.setattr(plot, 'FLAGS', found)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def logs(tmp_path):
    def write(folder, *changes):
        (tmp_path / folder).mkdir(parents=True)
        lines = [json.dumps({**RESULT, 'fid': 3., 'method': 'pd', **change}) for change in changes]
        (tmp_path / folder / 'results.jsonl').write_text('\n'.join(lines) + '\n')

    write('64', *[dict(nfe=n, fid=64. / n, method='base', ckpt='b') for n in (64, 8, 4)])
    write('4', {}, dict(seed=1, fid=4.5), dict(step=12, fid=2.5))
    write('8to4/rdd', dict(method='rdd', fid=1.))
    write('8to4/none', dict(method='rdd', fid=2., num_images=20))
    return tmp_path


def test_names_of_curves_and_a_table(logs, capsys):
    def read(*named):
        return plot.with_table(plot.read(named, 'results.jsonl', plot.results.read))

    found = read(('', logs))
    assert {(r['curve'], r['fid']) for r in found} == {
        ('DDIM', 1.), ('DDIM', 8.), ('DDIM', 16.), ('PD', 4.5), ('PD', 2.5), ('8to4/rdd', 1.),
        ('8to4/none', 2.)}           # 3 was measured again after more steps
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(found) and len({line.count('|') for line in lines}) == 1
    assert '| PD | 4 | 4.5 | 2.0 | 0.1 | - | - | 1 | r | n | 9 | 9 | 8-bit | none |' in lines
    named, = read(('our own', logs / '8to4/rdd/results.jsonl'))
    assert named['curve'] == 'our own'
    data_set = logs / 'CIFAR10'         # above its folder, the method is a part of the name
    for name in ('64', '4'):
        shutil.copytree(str(logs / name), str(data_set / name))
    assert {r['curve'] for r in read(('', logs)) if r['curve'].startswith('CIFAR10')} == {
        'CIFAR10 DDIM', 'CIFAR10 PD'}
    line, *_ = plot.results.read(logs / '64/results.jsonl')
    plot.results.append(data_set / '64/results.jsonl', dict(line, ckpt='64/ckpt_2.pt'))
    with pytest.raises(UserError, match='ckpt_2.pt. are different models in one curve'):
        read(('', data_set))
    shutil.rmtree(str(data_set))
    (logs / '8').mkdir()
    shutil.copy(str(logs / '4/results.jsonl'), str(logs / '8'))      # of another run
    with pytest.raises(UserError, match='4/results.* and .*8/results.* different models in one'):
        read(('', logs))
    (logs / '4/results.jsonl').write_text('{"nfe": 4')
    with pytest.raises(UserError, match=f'{logs}/4 has no results.jsonl with fid'):
        read(('', logs), ('', logs / '4'))


def test_pictures(logs, values, monkeypatch):
    """A panel per protocol, a line through the means of the seeds; a line per training."""
    figure = pytest.importorskip('matplotlib.figure', reason='see requirements-export.txt').Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(figure, 'savefig', lambda self, *how, **more: (
        drawn.append(self), save(self, *how, **more)))
    plot.main([str(logs)])
    assert (logs / values.output).stat().st_size > 5000
    (logs / '64/metrics.jsonl').write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": null}\n'
                                           '{"step": 3, "loss": 2}\n{"step": 4, "lo')
    values.value = 'loss'
    (logs / 'a=b').symlink_to('64')
    plot.main(['mine=64/metrics.jsonl', './a=b'])
    with pytest.raises(UserError, match='typo has no metrics.jsonl with loss'):
        plot.main(['typo'])
    lines = [{line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}
             for picture in drawn for axis in picture.axes]
    assert lines == [{'8to4/none': [[4, 2]]},
                     {'DDIM': [[4, 16], [8, 8], [64, 1]], 'PD': [[4, 3.5]], '8to4/rdd': [[4, 1]]},
                     {'64': [[1, 3], [3, 2]], 'mine': [[1, 3], [3, 2]]}]


@pytest.fixture
def files(tmp_path, values):
    """40 images of 8 px whose grey is 10 + 5 times their index, of classes 0, 0, .., 1, 1, .."""
    values.samples = True
    grey = 10 + 5 * np.arange(40, dtype=np.uint8)
    images, labels = np.zeros((40, 8, 8, 3), np.uint8) + grey[:, None, None, None], [0, 1]
    np.savez(tmp_path / 'one.npz', images, np.repeat(labels, 20))
    np.savez(tmp_path / 'seed1.npz', images[:30], np.repeat(labels[::-1], 15))
    np.savez(tmp_path / 'other.npz', 255 - images)
    np.savez(tmp_path / 'few.npz', images[:3])
    np.savez(tmp_path / 'float.npz', images / 255)
    np.savez(tmp_path / 'large.npz', images.repeat(2, 1).repeat(2, 2))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    pictures.save_images('folder', pixels)
    pictures.save_images('labelled', 255 - pixels, torch.arange(2).repeat_interleave(20))


@pytest.mark.parametrize('first, second, columns', [
    ('one.npz', 'other.npz', [10, 110, 15, 115]),       # images 0, 20, 1, 21: the classes in turn
    ('one.npz', 'labelled', [10, 110, 15, 115]),
    ('other.npz', 'folder', [245, 240, 235, 230])])     # no labels: the first images
def test_samples(files, values, monkeypatch, first, second, columns):
    values.columns = 4
    save = Mock()
    monkeypatch.setattr(pictures, 'save_labelled', save)
    plot.main([f'A={first}', f'B, 1 step={second}'])
    (output, _, rows, names), _ = save.call_args
    assert output == values.output and names == ['A', 'B, 1 step']
    assert [row.shape for row in rows] == [(4, 3, 8, 8)] * 2
    assert [row[:, 0, 0, 0].tolist() for row in rows] == [columns, [255 - c for c in columns]]


@pytest.mark.parametrize('words, sentence', [
    ([], 'found no file or folder'),
    (['missing.npz'], 'missing.npz is no npz or folder of 1 or more samples'),
    (['float.npz'], 'float.npz is no npz or folder'),
    (['one.npz', 'large.npz'], 'large.npz has another size of images or other labels than the'),
    (['one.npz', 'few.npz'], 'few.npz is no npz or folder of 28 or more samples'),
    (['labelled', 'seed1.npz'], 'seed1.npz has another size of images or other labels than the'),
    (['one.npz', 'seed1.npz'], 'seed1.npz has another size of images or other labels than the')])
def test_mistakes(files, words, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        plot.main(words)


def test_samples_are_no_pdf(files, values):
    values.output, values.samples = 'x.pdf', True
    with pytest.raises(UserError, match='--output is x.pdf'):
        plot.main(['one.npz'])
