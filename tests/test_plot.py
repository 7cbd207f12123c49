"""tools/plot.py: which results become which curve, and the picture."""

import json

import pytest
from absl import flags

from helpers import ROOT, launch
from runtime.cli import UserError
from tools import plot

RESULT = dict(ckpt='c', step=9, weights='net_model', T=4, stride=1, nfe=4, seed=0, num_images=50,
              fid=3.5, inception_score=2., inception_std=0.1, reference='r.npz',
              reference_images=50, feature_network='n', pixels='8-bit', amp='none', method='pd')


def write(folder, *changes):
    folder.mkdir(parents=True)
    lines = [json.dumps(dict(RESULT, **change)) for change in changes]
    (folder / 'results.jsonl').write_text('\n'.join(lines) + '\n')


@pytest.fixture
def logs(tmp_path):
    write(tmp_path / '64', *[dict(nfe=n, stride=64 // n, fid=64. / n, method='base',
                                  weights='ema_model') for n in (64, 8, 4)])
    write(tmp_path / '4', {}, dict(seed=1, fid=4.5), dict(step=12, fid=2.5))
    write(tmp_path / '8to4/rdd', dict(method='rdd', fid=1.))
    write(tmp_path / '8to4/none', dict(method='rdd', fid=2., num_images=20))
    return tmp_path


def read(*words):
    return plot.newest([result for word in words for result in plot.read_word(str(word))])


def test_names_of_curves(logs):
    assert {(r['curve'], r['fid']) for r in read(logs)} == {
        ('DDIM', 1.), ('DDIM', 8.), ('DDIM', 16.), ('PD', 4.5), ('PD', 2.5), ('RDD', 1.),
        ('none', 2.)}           # 3.5 was measured again after more steps
    assert [r['curve'] for r in read(f'our own={logs}/8to4/rdd/results.jsonl')] == ['our own']


def test_table_has_a_line_per_result(logs):
    lines = plot.table(read(logs / '4')).splitlines()
    assert len(lines) == 4 and len({line.count('|') for line in lines}) == 1
    assert '| PD | 4 | 4.500 | 2.000 +- 0.100 | 50 | 1 | r.npz | n | 8-bit |' in lines


def test_mistakes(logs):
    (logs / 'bad').mkdir()
    (logs / 'bad/results.jsonl').write_text('{"nfe": 4')
    for word, sentence in ((logs / 'bad', 'line 1'), (logs / 'nothing', 'ddim_eval.py')):
        with pytest.raises(UserError, match=sentence):
            list(plot.read_word(str(word)))


def test_command(logs):
    pytest.importorskip('matplotlib', reason='optional, see requirements-export.txt')
    picture = logs / 'new/scores.png'
    out = launch([ROOT / 'tools/plot.py', logs, f'--output={picture}'], cwd=logs)
    assert out.count('\n| ') == 8 and picture.stat().st_size > 5000


def test_panels(logs):
    pytest.importorskip('matplotlib', reason='optional, see requirements-export.txt')
    from matplotlib.figure import Figure
    flags.FLAGS.mark_as_parsed()
    axis = Figure().subplots()
    plot.draw_panel(axis, [r for r in read(logs) if r['num_images'] == 50])
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
             for line in axis.get_lines()}
    assert lines == {'DDIM': ([4, 8, 64], [16., 8., 1.]), 'PD': ([4], [3.5]), 'RDD': ([4], [1.])}
    assert [label.get_text() for label in axis.get_xticklabels()] == ['4', '8', '64']
