"""Scores against the number of network evaluations: a table on the screen and a picture.

  python tools/plot.py ./logs/CIFAR10/1024 ./logs/CIFAR10/8 ./logs/8to4/rdd
  python tools/plot.py "DDIM=./logs/CIFAR10/1024" ours=./logs/8to4/rdd/results.jsonl
Words are results.jsonl files or folders, which are searched; NAME= before one names its curve.
Every seed is shown. Results of different protocols (reference, features, number of images, pixels)
get a panel each, since they do not compare. The picture needs matplotlib
(pip install -r requirements-export.txt); the table does not.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

from absl import flags      # noqa: E402

from runtime import cli     # noqa: E402
from runtime.cli import UserError       # noqa: E402

FLAGS = flags.FLAGS
flags.DEFINE_string('output', './scores.png', 'the picture: png, pdf or svg')
flags.DEFINE_enum('score', 'fid', ['fid', 'inception_score'], 'what the picture shows')

METHODS = dict(base='DDIM', pd='PD', rdd='RDD')
SCORES = dict(fid='Frechet distance', inception_score='Inception score')
NEEDED = ('fid', 'inception_score', 'inception_std', 'nfe', 'seed', 'weights', 'num_images')
PROTOCOL = ('reference', 'feature_network', 'num_images', 'pixels')


def main(words):
    if not words:
        raise UserError('expected results.jsonl files or folders of evaluated runs, found none; as '
                        'in: tools/plot.py ./logs/CIFAR10/1024 ./logs/8to4/rdd')
    results = [result for word in words for result in read_word(word)]
    results = sorted(newest(results), key=lambda r: (protocol(r), r['curve'], -r['nfe'], r['seed']))
    print(table(results))
    draw(results, Path(FLAGS.output))
    print(f'\n{FLAGS.output} shows them.')


def read_word(word):
    """Results of one word of the command line, each with its `file` and `curve`."""
    name, _, path = word.rpartition('=')
    path = Path(path).expanduser()
    files = sorted(path.rglob('results.jsonl')) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UserError(f'{path} has no results.jsonl; score a run with ddim_eval.py first')
    for file in files:
        lines = file.read_text(errors='replace').splitlines()
        if not lines:
            raise UserError(f'{file} holds no results; score a run with ddim_eval.py first')
        for number, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                if not set(NEEDED) <= set(result):
                    raise ValueError
                yield dict(result, file=str(file), curve=name or curve(result, file))
            except (ValueError, TypeError):
                raise UserError(f'line {number} of {file} is no result of ddim_eval.py; remove it')


def curve(result, file):
    """Name of the curve a result belongs to: of its folder, or its method if that is a number."""
    folder = file.resolve().parent.name
    base = result.get('method') == 'base' or result['weights'] == 'ema_model'
    method = METHODS.get(result.get('method'), 'DDIM' if base else 'PD')
    return method if folder.isdigit() else METHODS.get(folder, folder)


def protocol(result):
    """What has to agree for two scores to compare."""
    return tuple(result.get(key) for key in PROTOCOL)


def newest(results):
    """The last of the results that were made twice, as after more training."""
    keys = ('file', 'curve', 'nfe', 'seed', 'weights', 'amp')
    return list({protocol(r) + tuple(r.get(k) for k in keys): r for r in results}.values())


def table(results):
    """Markdown, one line per result."""
    rows = ['| curve | NFE | Frechet distance | Inception score | images | seed | reference | '
            'features | pixels |',
            '| :--- | ---: | ---: | ---: | ---: | ---: | :--- | :--- | :--- |']
    for r in results:
        rows.append(f'| {r["curve"]} | {r["nfe"]} | {r["fid"]:.3f} | {r["inception_score"]:.3f} +- '
                    f'{r["inception_std"]:.3f} | {r["num_images"]} | {r["seed"]} | '
                    f'{r["reference"]} | {r["feature_network"]} | {r["pixels"]} |')
    return '\n'.join(rows)


def draw(results, path):
    """The picture: a panel per protocol, a curve per name, a point per seed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('the package matplotlib is missing, so there is no picture; run pip '
                        'install -r requirements-export.txt', code=1)
    protocols = sorted({protocol(r) for r in results}, key=str)
    figure = Figure(figsize=(1 + 5 * len(protocols), 4.5), layout='constrained')
    axes = figure.subplots(1, len(protocols), squeeze=False)[0]
    for axis, shown in zip(axes, protocols):
        draw_panel(axis, [r for r in results if protocol(r) == shown])
        axis.set_title('{}\n{}, {} images, {}'.format(*shown), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f'--output {path} cannot be written ({error}); give a png, pdf or svg')


def draw_panel(axis, results):
    """One panel: the line of a curve goes through the means of its seeds."""
    steps = sorted({r['nfe'] for r in results})
    for number, name in enumerate(sorted({r['curve'] for r in results})):
        mine, colour = [r for r in results if r['curve'] == name], f'C{number}'
        at = {nfe: [r[FLAGS.score] for r in mine if r['nfe'] == nfe] for nfe in steps}
        at = {nfe: values for nfe, values in at.items() if values}
        axis.plot(list(at), [sum(v) / len(v) for v in at.values()], color=colour, label=name)
        axis.scatter([r['nfe'] for r in mine], [r[FLAGS.score] for r in mine], s=18, color=colour)
    axis.set_xscale('log', base=2)
    axis.set_xticks(steps, [str(nfe) for nfe in steps])
    axis.minorticks_off()
    axis.set_xlabel('network evaluations per image (NFE)')
    axis.set_ylabel(SCORES[FLAGS.score])
    axis.set_yscale('log' if FLAGS.score == 'fid' else 'linear')
    axis.grid(alpha=0.3)
    axis.legend()


if __name__ == '__main__':
    cli.run(main, words=True)
