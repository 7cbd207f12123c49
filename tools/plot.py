"""Scores, curves of training and samples of several models in one picture.

Scores over the number of network evaluations, as a table too, with a panel per protocol:
  python tools/plot.py ./logs/CIFAR10/1024 "RDD=./logs/8to4/rdd/results.jsonl"
A value of metrics.jsonl over the steps of training:
  python tools/plot.py --value loss ./logs/CIFAR10
A row of samples per npz or folder that `ddim_eval.py --save_images` has written:
  python tools/plot.py --samples "teacher=./teacher.npz" "PD, 1 step=./pd_1.npz"
NAME= in front names the curve or row. With samples of one --seed, a column has the same noise.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import numpy as np
import torch
from absl import flags

from runtime import cli, pictures
from score import results

FLAGS = flags.FLAGS
METHODS = dict(base='DDIM', pd='PD', rdd='RDD', dmd='DMD')


def define_flags():
    flags.DEFINE_string('output', './plot.png', 'the picture, a png; of curves also a pdf')
    flags.DEFINE_string('value', 'fid', 'fid, inception_score, precision or recall, or a name in '
                        'metrics.jsonl')
    flags.DEFINE_bool('samples', False, 'draw rows of samples instead of curves')
    flags.DEFINE_integer('columns', 16, 'images per row of --samples', 1, 256)


def main(words):
    if not words:
        raise cli.UserError('found no file or folder; as in: tools/plot.py ./logs/digits')
    named = [('', word) if '=' not in word or Path(word).exists() else word.partition('=')[::2]
             for word in words]
    endings = ('.png',) if FLAGS.samples else ('.png', '.pdf')
    if not FLAGS.output.endswith(endings):
        raise cli.UserError(f'--output is {FLAGS.output}, expected a {" or ".join(endings)}')
    if FLAGS.samples:
        draw_samples(named)
    elif FLAGS.value in (*results.NUMBERS, 'precision', 'recall'):
        draw_curves(with_table(read(named, 'results.jsonl', results.read)), 'nfe')
    else:
        draw_curves(read(named, 'metrics.jsonl', read_metrics), 'step')
    print(f'{FLAGS.output} shows them.')


def read(named, file_name, read_file):
    """Lines of all files `file_name`, as dictionaries with a curve and the title of a panel."""
    found = []
    for name, path in named:
        path, before = Path(path).expanduser(), len(found)
        for file in sorted(path.rglob(file_name)) if path.is_dir() else [path]:
            below = path.is_dir() and file.parent != path
            names = file.parent.relative_to(path).parts if below else (file.resolve().parent.name,)
            if file_name == 'results.jsonl':        # not the numbers of steps and seeds
                names = [name for name in names if not re.fullmatch(r'(seed)?\d+', name)]
            for line in read_file(file):
                if line.get(FLAGS.value) is None:       # no precision, in older results
                    continue
                curve = '/'.join(names) or line.get('method') or file.resolve().parent.name
                title = ', '.join(f'{"amp " * (key == "amp")}{line[key]}'
                                  for key in results.PROTOCOL if key in line)
                curve = name or METHODS.get(curve, curve)
                found.append(dict(line, title=title, curve=curve, file=file.resolve()))
        if len(found) == before:
            raise cli.UserError(f'{path} has no {file_name} with {FLAGS.value}; give a run that is '
                                f'trained, and scored by ddim_eval.py')
    methods = {}        # of a curve: several, where folders of data sets are above those of runs
    for line in found:
        methods.setdefault(line['curve'], set()).add(line.get('method'))
    for line in found:
        if len(methods[line['curve']]) > 1 and not any(name for name, _ in named):
            line['curve'] += f' {METHODS.get(line["method"], line["method"])}'
    return found


def read_metrics(file):
    """Yield step and --value of the lines that have both."""
    for line in file.read_text(errors='replace').splitlines() if file.is_file() else ():
        try:
            entries = json.loads(line)
            yield {key: float(entries[key]) for key in ('step', FLAGS.value)}
        except (ValueError, TypeError, KeyError):
            continue


def with_table(lines):
    """Print and return them, sorted; of results made twice, as after more training, the last."""
    keys = ('title', 'curve', 'nfe', 'seed', 'weights', 'file')
    last = {(*map(line.get, keys), Path(line.get('ckpt', '')).name): line for line in lines}
    points = [key[:4] for key in last]
    twice = sorted((key[:4], f'{key[5]} ({key[4]} {key[6]})') for key in last
                   if points.count(key[:4]) > 1)
    if twice:
        raise cli.UserError(f'{twice[0][1]} and {twice[1][1]} are different models in one curve, '
                            f'at one NFE and seed; give NAME=PATH for each, or remove one')
    found = sorted(last.values(), key=lambda r: (r['title'], r['curve'], -r['nfe'], r['seed']))
    columns = ('curve', 'nfe', 'fid', 'inception_score', 'inception_std', 'precision', 'recall',
               'seed', *results.PROTOCOL)
    print(f'| {" | ".join(columns)} |\n|{" :--- |" * len(columns)}')
    for line in found:
        print(f'| {" | ".join(str(line.get(key, "-")) for key in columns)} |')
    return found


def draw_curves(lines, x):
    """--value over `x`: a panel per protocol, a line through the means of each curve."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise cli.UserError('matplotlib is missing; pip install -r requirements-export.txt', code=1)
    titles = sorted({line['title'] for line in lines})
    figure = Figure(figsize=(1 + 5 * len(titles), 4.5), layout='constrained')
    for axis, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles):
        axis.set(title=title, xlabel=x, ylabel=FLAGS.value)
        for name in sorted({line['curve'] for line in lines if line['title'] == title}):
            points = [(line[x], line[FLAGS.value]) for line in lines
                      if (line['title'], line['curve']) == (title, name)]
            places, values = np.array(points).T
            steps = np.unique(places)
            means = [values[places == step].mean() for step in steps]
            axis.plot(steps, means, label=name.replace('$', r'\$'))        # no formula
            if x == 'nfe':      # a dot for every seed
                axis.scatter(places, values, 18, color=axis.lines[-1].get_color())
                axis.set_xscale('log', base=2)
                axis.set_yscale('log' if FLAGS.value == 'fid' else 'linear')
        axis.legend()
    Path(FLAGS.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FLAGS.output, dpi=150)


def draw_samples(named):
    """A row per file; with labels in the first one, the columns go through the classes in turn."""
    first, labels = pictures.read_samples(named[0][1])
    order = np.arange(len(first)) if labels is None else pictures.classes_in_turn(labels)
    chosen, rows = order[:FLAGS.columns], []
    for _, path in named:
        images, others = pictures.read_samples(path, max(chosen) + 1)
        unequal = labels is not None and others is not None and labels[chosen] != others[chosen]
        if images.shape[1:] != first.shape[1:] or np.any(unequal):
            raise cli.UserError(f'{path} has another size of images or other labels than the first '
                                f'file; give samples of the same --seed')
        rows.append(torch.from_numpy(images[chosen]).permute(0, 3, 1, 2))
    pictures.save_labelled(FLAGS.output, '', rows, [name or path for name, path in named])


if __name__ == '__main__':
    define_flags()
    cli.run(main, words=True)
