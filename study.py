"""Which loss pays? Distil one teacher by several methods, with several seeds, and compare.

  python study.py --base_ckpt ./logs/digits/8 --config DIGITS --logdir ./logs/study --jobs 2
  python study.py --base_ckpt ./logs/CIFAR10/8 --config CIFAR10 --logdir ./logs/study --seeds 3 \\
      --method "mine=train_rdd.py --logits --logits_weight 3" --methods DDIM,PD,RDD,mine

A method halves the steps of the teacher again and again down to --until, each student from the one
before. Every chain is trained with --seeds seeds, by the scripts and flagfiles that you would call
yourself: config/<config>_PD.txt, _RDD.txt and _EVAL.txt. ddim_eval.py scores every student. Its
noise depends on the seed alone, so that methods are compared in pairs.

Results in --logdir: <method>/seed<S>/<steps>/ with checkpoint and results.jsonl of every student;
table.md (means and 95 % intervals over the seeds; paired differences from --baseline); study.png
(distance and inception score over the number of network evaluations; needs matplotlib) and
samples_<steps>.png (all methods from the same noise). The same command run again resumes: finished
students are skipped. Students that failed are named in the table, and the exit code is then 1.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from absl import flags
from scipy.special import stdtrit

from formats.diffusers_folder import is_folder
from runtime import cli, pictures
from runtime.cli import ROOT, UserError
from runtime.flags import define_teacher_steps, require
from runtime.log import progress
from runtime.models import halvings, load_model, save_as_run

FLAGS = flags.FLAGS
# name: script and what is added to its flagfile; DDIM samples the teacher itself with fewer steps
METHODS = {
    'DDIM': '',
    'PD': 'PD.py',
    'CFD': 'train_rdd.py --loss_type none',
    'RCFD': 'train_rdd.py --loss_type none --alpha 0.003 --beta 0.75',
    'RDD': 'train_rdd.py',
    'RDD-released': 'train_rdd.py --queue_layout released',
    'CFD+PD': 'train_rdd.py --loss_type none --logits',
    'RDD+PD': 'train_rdd.py --logits'}
SCORES = dict(fid='Frechet distance', inception_score='Inception score')


def define_flags():
    flags.DEFINE_string('base_ckpt', None, 'folder (or file) of the teacher, for example the '
                        'student of 8 steps that PD.py made, or a folder of diffusers')
    define_teacher_steps()
    flags.DEFINE_string('ddim_ckpt', None, 'model that the method DDIM samples, for example the '
                        'teacher of 64 steps that train_base.py made; none: --base_ckpt')
    flags.DEFINE_string('config', None, 'flagfiles to use: DIGITS means config/DIGITS_PD.txt, '
                        'config/DIGITS_RDD.txt and config/DIGITS_EVAL.txt')
    flags.DEFINE_string('logdir', None, 'folder for all students and the results')
    flags.DEFINE_list('methods', list(METHODS), 'methods to compare')
    flags.DEFINE_multi_string('method', [], 'a method of your own, "NAME=SCRIPT FLAGS"; repeat it '
                              'for more, and name it in --methods')
    flags.DEFINE_string('baseline', 'PD', 'method that the others are compared with')
    flags.DEFINE_integer('until', 1, 'steps of the last student', lower_bound=1)
    flags.DEFINE_integer('seeds', 5, 'trainings of every method, with seeds 0, 1, ..',
                         lower_bound=1, upper_bound=1000)
    flags.DEFINE_integer('jobs', 1, 'chains that run side by side, each on a GPU of its own or on '
                         'a share of the cores', lower_bound=1, upper_bound=256)
    flags.DEFINE_bool('double', True, 'students of 2 steps and 1 train twice as long, as released')
    flags.DEFINE_bool('report', False, 'train and score nothing: only write the table and the '
                      'pictures of the students that are finished')
    flags.DEFINE_string('train_flags', '', 'more flags for every training, in quotes')
    flags.DEFINE_string('eval_flags', '', 'more flags for every evaluation, in quotes')


def main():
    require(base_ckpt='the folder of the teacher, such as ./logs/digits/8',
            config='the data set whose flagfiles are used, such as DIGITS',
            logdir='the folder of the study, such as ./logs/study')
    methods, teacher = chosen_methods(), load_model(FLAGS.base_ckpt, steps=FLAGS.teacher_steps)
    steps = halvings(teacher.diffusion.T, FLAGS.until, FLAGS.base_ckpt)
    source = f'{Path(FLAGS.base_ckpt).resolve()}, {FLAGS.teacher_steps} steps'
    sampled = load_sampled(steps) if FLAGS.ddim_ckpt else teacher
    chains = []
    for seed in range(FLAGS.seeds):
        for name, command in methods.items():
            model, counts = (teacher, steps) if command else (sampled, [2 * steps[0], *steps])
            given = source if command or sampled is teacher else str(sampled.file)
            chains.append([Student(name, command, seed, T, model, given) for T in counts])
    if not FLAGS.report:
        if FLAGS.teacher_steps or is_folder(FLAGS.base_ckpt):
            name = f'teacher-{zlib.crc32(source.encode()):08x}'     # another one, another folder
            teacher.file = save_as_run(teacher, Path(FLAGS.logdir) / name)
        run_all(chains)
    students = [student for chain in chains for student in chain]
    failed = [student for student in students if student.problem or not student.result()]
    report(students, failed)
    if failed:
        raise UserError(f'{len(failed)} of {len(students)} students are missing, see '
                        f'{FLAGS.logdir}/table.md; run the same command again', code=1)


def chosen_methods():
    """{name: (script or None, its flags)} of --methods, own ones included."""
    known = dict(METHODS)
    for text in [*FLAGS.method, FLAGS.train_flags, FLAGS.eval_flags]:
        try:
            shlex.split(text)
        except ValueError as error:
            raise UserError(f'"{text}" is not understood ({error}); mind the quotes')
    for text in FLAGS.method:
        name, _, command = text.partition('=')
        if not command.startswith(('PD.py', 'train_rdd.py')) or not name.isprintable():
            raise UserError(f'--method "{text}" is not understood; expected "NAME=SCRIPT FLAGS" '
                            f'with PD.py or train_rdd.py as the script')
        known[name] = command
    unknown = [name for name in FLAGS.methods if name not in known]
    if unknown:
        raise UserError(f'--methods {",".join(unknown)} is unknown; choose of {", ".join(known)}')
    if FLAGS.baseline not in FLAGS.methods:
        raise UserError(f'--baseline {FLAGS.baseline} is not among --methods '
                        f'{",".join(FLAGS.methods)}; add it, or choose another baseline')
    for stage in ('PD', 'RDD', 'EVAL'):
        config(stage)
    return {name: known[name] for name in FLAGS.methods}


def config(stage):
    """The flagfile of a stage."""
    file = cli.find(f'config/{FLAGS.config}_{stage}.txt')
    if not file.is_file():
        there = sorted(other.name[:-len('_PD.txt')] for other in (ROOT / 'config').glob('*_PD.txt'))
        raise UserError(f'--config {FLAGS.config}: there is no {file}; write it, or choose of '
                        f'{", ".join(there)}')
    return file


def load_sampled(steps):
    """The model of --ddim_ckpt, which must have steps to leave out."""
    if is_folder(FLAGS.ddim_ckpt):
        raise UserError(f'--ddim_ckpt {FLAGS.ddim_ckpt} is a folder of diffusers; leave the flag '
                        f'out, and give the folder as --base_ckpt with --teacher_steps')
    model = load_model(FLAGS.ddim_ckpt)
    if model.diffusion.T % (2 * steps[0]):
        raise UserError(f'--ddim_ckpt {FLAGS.ddim_ckpt} has {model.diffusion.T} steps, expected a '
                        f'multiple of the {2 * steps[0]} of --base_ckpt; give another model')
    return model


class Student:
    """One method, seed and number of steps: its folder, and the commands that fill it.

    teacher: the `Model` to distil or to sample. source: what the user gave for it.
    """

    def __init__(self, method, command, seed, steps, teacher, source):
        self.method, self.seed, self.steps = method, seed, steps
        self.teacher, self.source, self.problem = teacher, source, ''
        self.script, *self.extra = shlex.split(command) or [None]
        self.folder = Path(FLAGS.logdir) / method / f'seed{seed}' / str(steps)

    def commands(self):
        """[words]: training, unless the teacher itself is sampled, and evaluation."""
        T = self.teacher.diffusion.T
        words = ['ddim_eval.py', f'--flagfile={config("EVAL")}', f'--logdir={self.folder}',
                 f'--seed={self.seed}', f'--save_images={self.folder}/samples.npz',
                 *shlex.split(FLAGS.eval_flags)]
        if self.script is None:
            return [words + [f'--stride={T // self.steps}']]
        first = 2 * self.steps == T
        before = self.teacher.file if first else self.folder.parent / str(2 * self.steps)
        train = [self.script, f'--flagfile={config("PD" if self.script == "PD.py" else "RDD")}',
                 f'--seed={self.seed}', f'--base_ckpt={before}', f'--logdir={self.folder}',
                 '--until=0', *self.extra, *shlex.split(FLAGS.train_flags)]
        if '--teacher_steps' in config('PD').read_text():       # a student has its own
            train.append('--teacher_steps=0')
        if FLAGS.double and self.steps <= 2:
            train.append(f'--total_steps={2 * total_steps(train)}')
        return [train, words]

    def result(self):
        """The line of results.jsonl, or None."""
        file = self.folder / 'results.jsonl'
        lines = file.read_text().splitlines() if file.is_file() else []
        return json.loads(lines[-1]) if lines else None

    def make(self, env):
        """Run what is not finished; remember the problem if a command fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / 'commands.json'
        plan = json.dumps(dict(commands=self.commands(), teacher=self.source))
        if file.is_file() and file.read_text() != plan:
            self.problem = f'{self.folder} was made by other commands; choose another --logdir'
        elif not self.result():
            file.write_text(plan)
            if self.script is None:
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / 'ckpt.pt').unlink()      # a link of an earlier start
                (self.folder / 'ckpt.pt').symlink_to(Path(self.teacher.file).resolve())
            for words in self.commands():
                self.problem = self.problem or self.run(words, env)
        return not self.problem

    def run(self, words, env):
        """'' or the last line that a command left in log.txt before it failed."""
        with open(self.folder / 'log.txt', 'a') as log:
            code = subprocess.call([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=log,
                                   stderr=log, env=env)
        if not code:
            return ''
        said = (self.folder / 'log.txt').read_text().strip().splitlines() or ['nothing']
        return f'{words[0]} ended with code {code}: {said[-1]}'


def total_steps(words):
    """The last --total_steps among flags and in the flagfile among them."""
    lines = Path(words[1].split('=', 1)[1]).read_text().split() + list(words)
    values = [line.split('=', 1)[1] if '=' in line else following
              for line, following in zip(lines, lines[1:] + [''])
              if line.split('=')[0] == '--total_steps']
    if not values:
        raise UserError(f'{words[1]} lacks --total_steps; add it, or give --nodouble')
    return int(values[-1])


def run_all(chains):
    """Make the students of all chains, --jobs chains side by side; a failure ends its chain."""
    gpus = torch.cuda.device_count()
    free = list(range(FLAGS.jobs))
    bar = progress(sum(map(len, chains)), 'students', unit='student')

    def run_chain(chain):
        place = free.pop()
        threads = str(max(1, (os.cpu_count() or 1) // FLAGS.jobs))
        env = dict(dict(OMP_NUM_THREADS=threads), **os.environ)     # unless you set it yourself
        if gpus:
            visible = os.environ.get('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(gpus))))
            env['CUDA_VISIBLE_DEVICES'] = visible.split(',')[place % gpus]
        good = True
        for student in chain:
            if good or student.script is None:
                good = student.make(env)
            else:
                student.problem = 'its teacher is missing'
            bar.set_postfix_str(f'{student.method} seed {student.seed}, {student.steps} steps')
            bar.update()
        free.append(place)

    with bar, ThreadPoolExecutor(FLAGS.jobs) as pool:
        list(pool.map(run_chain, chains))


def report(students, failed):
    folder, steps = Path(FLAGS.logdir), sorted({s.steps for s in students}, reverse=True)
    folder.mkdir(parents=True, exist_ok=True)
    found = {(s.method, s.steps, s.seed): s.result() for s in students if s not in failed}
    text = '\n\n'.join(table(found, steps, score) for score in SCORES)
    if failed:
        text += '\n\nMissing:\n' + ''.join(f'\n- {s.method}, seed {s.seed}, {s.steps} steps: '
                                           f'{s.problem or "not made yet"}' for s in failed)
    (folder / 'table.md').write_text(text + '\n')
    print(text, flush=True)
    if found:
        draw(found, steps, folder / 'study.png')
        for T in steps:
            draw_samples([s for s in students if s.seed == 0 and s.steps == T and s not in failed],
                         folder / f'samples_{T}.png')


def interval(values):
    """Mean of n values and half the width of its 95 % interval, by the t distribution."""
    values = np.asarray(values)
    if len(values) < 2:
        return values.mean(), np.nan
    error = values.std(ddof=1) / len(values) ** .5
    return values.mean(), stdtrit(len(values) - 1, .975) * error


def words(mean, half, sign=''):
    return f'{mean:{sign}.3f}' + ('' if np.isnan(half) else f' +- {half:.3f}')


def table(found, steps, score):
    """Markdown: a row per method; scores and differences from the baseline at every step count."""
    def values(method, T):
        return {seed: r[score] for (m, t, seed), r in found.items() if (m, t) == (method, T)}

    rows = [f'{SCORES[score]}: mean +- half the 95 % interval over the seeds; in brackets the '
            f'difference from {FLAGS.baseline}, paired over seeds', '',
            '| method | ' + ' | '.join(f'{T} step{"s" if T > 1 else ""}' for T in steps) + ' |',
            '| :--- |' + ' ---: |' * len(steps)]
    for method in FLAGS.methods:
        cells = []
        for T in steps:
            mine, base = values(method, T), values(FLAGS.baseline, T)
            cell = words(*interval(list(mine.values()))) if mine else '-'
            common = sorted(set(mine) & set(base))
            if common and method != FLAGS.baseline:
                difference = interval([mine[seed] - base[seed] for seed in common])
                cell += f' ({words(*difference, sign="+")})'
            cells.append(cell)
        rows.append(f'| {method} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)


def draw(found, steps, path):
    """Both scores over NFE with error bars, a colour and marker per method, side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('note: there is no study.png without matplotlib; run pip install -r '
              'requirements-export.txt, and the same command again.', flush=True)
        return
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    for axis, score in zip(figure.subplots(1, 2), SCORES):
        for number, method in enumerate(FLAGS.methods):
            seeds = {T: [r[score] for (m, t, _), r in found.items() if (m, t) == (method, T)]
                     for T in steps}
            points = [(T, *interval(values)) for T, values in seeds.items() if values]
            if points:
                T, mean, half = zip(*points)
                axis.errorbar(np.multiply(T, 1.015 ** (number - len(FLAGS.methods) // 2)), mean,
                              np.nan_to_num(half), marker='os^v'[number // 10 % 4],
                              capsize=2, label=method)
        axis.set_xscale('log', base=2, subs=[])
        axis.set(xlabel='network evaluations per image (NFE)', ylabel=SCORES[score],
                 xticks=steps, xticklabels=steps, yscale='log' if score == 'fid' else 'linear')
        axis.grid(alpha=.3)
    axis.legend()
    figure.savefig(path, dpi=150)


def draw_samples(students, path, columns=16):
    """A row of samples per method, from the same noise and labels."""
    rows = []
    for student in students:
        with np.load(student.folder / 'samples.npz') as file:
            rows.append(torch.from_numpy(file['arr_0'][:columns]).permute(0, 3, 1, 2))
    if rows:
        pictures.save_labelled(path, f'network evaluations: {students[0].steps}; seed 0', rows,
                               [student.method for student in students])


if __name__ == '__main__':
    define_flags()
    cli.run(main)
