"""Which loss pays? Distil one teacher by several methods, with several seeds, and compare.

  python study.py --base_ckpt ./logs/digits/8 --config DIGITS --logdir ./logs/study --jobs 2
  python study.py --base_ckpt ./logs/CIFAR10/8 --config CIFAR10 --logdir ./logs/study --seeds 3 \\
      --method "mine=train_rdd.py --logits --logits_weight 3" --methods DDIM,PD,RDD,mine

A method halves the steps of the teacher down to --until, by the scripts and flagfiles that you
would call yourself: config/<config>_PD.txt, _RDD.txt and _EVAL.txt. With one seed, all students are
scored from the same noise. Results in --logdir: <method>/seed<S>/<steps>/, a run for every student;
table.md (means, 95 % intervals over the seeds, paired differences from --baseline, what failed);
study.png (scores over the network evaluations; needs matplotlib); samples_<steps>.png.
"""

import json
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from absl import flags
from scipy.special import stdtrit

from runtime import cli, files, pictures
from runtime.checkpoint import digest
from runtime.cli import UserError
from runtime.commands import Commands
from runtime.flags import define_teacher_steps, require
from runtime.log import progress
from formats.load import load_model, save_as_run
from training import halvings
from score import results

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
OWN_FLAGS = {'seed', 'base_ckpt', 'logdir', 'until', 'teacher_steps', 'save_images', 'stride'}


def define_flags():
    flags.DEFINE_string('base_ckpt', None, 'folder (or file) of the teacher, for example the '
                        'student of 8 steps that PD.py made, or a folder of diffusers')
    define_teacher_steps()
    flags.DEFINE_string('ddim_ckpt', None, 'model that the method DDIM samples; none: --base_ckpt')
    flags.DEFINE_string('config', None, 'DIGITS: use config/DIGITS_PD.txt, _RDD.txt and _EVAL.txt')
    flags.DEFINE_string('logdir', None, 'folder for all students and the results')
    flags.DEFINE_list('methods', list(METHODS), 'methods to compare')
    flags.DEFINE_multi_string('method', [], 'a method of your own, "NAME=SCRIPT FLAGS"; repeat it '
                              'for more, and name it in --methods')
    flags.DEFINE_string('baseline', 'PD', 'method that the others are compared with')
    flags.DEFINE_integer('until', 1, 'steps of the last student', 1)
    flags.DEFINE_integer('seeds', 5, 'trainings of every method, with seeds 0, 1, ..', 1, 1000)
    flags.DEFINE_integer('jobs', 1, 'students made at once, each on its GPU or cores', 1, 256)
    flags.DEFINE_bool('double', True, 'students of 2 steps and 1 train twice as long, as released')
    flags.DEFINE_bool('report', False, 'only write table and pictures of what is finished')
    flags.DEFINE_string('train_flags', '', 'more flags for every training, in quotes')
    flags.DEFINE_string('eval_flags', '', 'more flags for every evaluation, in quotes')


def main():
    require(base_ckpt='the folder of the teacher, such as ./logs/digits/8',
            config='the data set whose flagfiles are used, such as DIGITS',
            logdir='the folder of the study, such as ./logs/study')
    methods, teacher = chosen_methods(), load_model(FLAGS.base_ckpt, steps=FLAGS.teacher_steps)
    steps = halvings(teacher.diffusion.T, FLAGS.until, FLAGS.base_ckpt)
    sampled = load_model(FLAGS.ddim_ckpt) if FLAGS.ddim_ckpt else teacher
    if sampled.diffusion.T % (2 * steps[0]):
        raise UserError(f'--ddim_ckpt {FLAGS.ddim_ckpt} has {sampled.diffusion.T} steps, expected '
                        f'a multiple of the {2 * steps[0]} of --base_ckpt; give another model')
    chains = []
    for seed in range(FLAGS.seeds):
        for name, command in methods.items():
            counts = steps if command else [2 * steps[0], *steps]
            model = teacher if command else sampled
            chains.append([Student(name, command, seed, T, model) for T in counts])
    if not FLAGS.report:
        for model in (teacher, sampled):        # what the commands read is a run's checkpoint
            if model is teacher and FLAGS.teacher_steps or model.file.suffix != '.pt':
                name = f'teacher-{digest(model.network.state_dict())}-{model.diffusion.T}'
                model.file = save_as_run(model, Path(FLAGS.logdir) / name)
        run_all(chains)
    report([student for chain in chains for student in chain])


def chosen_methods():
    """{name: script and its flags} of --methods, own ones included."""
    known = dict(METHODS)
    for text in FLAGS.method:
        name, _, command = text.partition('=')
        if not command.startswith(('PD.py', 'train_rdd.py')):
            raise UserError(f'--method "{text}" is not understood; expected "NAME=SCRIPT FLAGS" '
                            f'with PD.py or train_rdd.py as the script')
        known[name] = command
    for text in [*known.values(), FLAGS.train_flags, FLAGS.eval_flags]:
        try:
            names = [word.lstrip('-').partition('=')[0] for word in shlex.split(text)]
        except ValueError as error:
            raise UserError(f'"{text}" is not understood ({error}); mind the quotes')
        for name in OWN_FLAGS & set(names):
            raise UserError(f'"{text}" sets --{name}, which the study chooses for every student; '
                            f'leave it out')
    for name in FLAGS.methods:
        if name not in known:
            raise UserError(f'--methods {name} is unknown; choose of {", ".join(known)}')
    if FLAGS.baseline not in FLAGS.methods:
        raise UserError(f'--baseline {FLAGS.baseline} is not among --methods '
                        f'{",".join(FLAGS.methods)}; add it, or choose another baseline')
    for stage in ('PD', 'RDD', 'EVAL'):
        if not config(stage).is_file():
            raise UserError(f'--config {FLAGS.config}: there is no {config(stage)}; write it, or '
                            f'choose another')
    return {name: known[name] for name in FLAGS.methods}


def config(stage):
    return cli.find(f'config/{FLAGS.config}_{stage}.txt')


class Student:
    """One method, seed and number of steps: its folder, and the commands that fill it."""

    def __init__(self, method, command, seed, steps, teacher):
        self.method, self.seed, self.steps = method, seed, steps
        self.teacher = teacher      # the `Model` that a chain starts from, or that is sampled
        self.script, *self.extra = shlex.split(command) or [None]       # None: no training
        self.problem = ''           # why the student could not be made
        self.folder = Path(FLAGS.logdir) / method / f'seed{seed}' / str(steps)

    def commands(self):
        """The words of training, unless the teacher itself is sampled, and of evaluation."""
        T, seed = self.teacher.diffusion.T, f'--seed={self.seed}'
        score = ['ddim_eval.py', f'--flagfile={config("EVAL")}', *shlex.split(FLAGS.eval_flags),
                 f'--logdir={self.folder}', seed, f'--save_images={self.folder}/samples.npz']
        if self.script is None:
            return [[*score, f'--stride={T // self.steps}']]
        before, where = self.teacher.file, [f'--logdir={self.folder}', '--until=0']
        if FLAGS.double:        # one command for the chain, which doubles the last two
            where = [f'--logdir={self.folder.parent}', f'--until={FLAGS.until}']
        elif 2 * self.steps < T:
            before = self.folder.parent / str(2 * self.steps)
        train = [self.script, f'--flagfile={config("PD" if self.script == "PD.py" else "RDD")}',
                 *self.extra, *shlex.split(FLAGS.train_flags), f'--base_ckpt={before}',
                 '--teacher_steps=0', *where, seed]
        return [train, score]

    def result(self):
        """The last line of results.jsonl, or None."""
        return (results.read(self.folder / 'results.jsonl') or [None])[-1]

    def plan(self):
        """What the student is made from, as text; --until may be lowered later."""
        found = [FLAGS.read_flags_from_files(words) for words in self.commands()]
        found = [[word for word in words if not word.startswith('--until=')] for words in found]
        return json.dumps(dict(commands=found, teacher=digest(self.teacher.network.state_dict())))

    def make(self, commands, env, done):
        """Run what is not finished, less what `done` holds, the commands that have run already.

        The problem is the last line of a command that fails.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        made_by, log = self.folder / 'commands.json', self.folder / 'log.txt'
        ckpt = self.folder / 'ckpt.pt'
        if ckpt.exists() and made_by.is_file() and made_by.read_text() != self.plan():
            self.problem = (f'{self.folder} was made by other commands, from other flagfiles or '
                            f'another teacher; choose another --logdir')
        elif not self.result():
            with files.replacing(made_by) as temporary:
                temporary.write_text(self.plan())
            if self.script is None:
                if ckpt.is_symlink():
                    ckpt.unlink()       # of an earlier start
                ckpt.symlink_to(self.teacher.file.resolve())
            for words in [words for words in self.commands() if words not in done]:
                done.append(words)
                with open(log, 'a') as file:
                    code = commands.run(words, stdout=file, stderr=file, env=env)
                if code:
                    last = log.read_text(errors='replace').strip().rpartition('\n')[2]
                    self.problem = f'{words[0]} ended with code {code}: {last}'
                    break


def run_all(chains):
    """Make the students of all chains, --jobs chains side by side; a failure ends its chain."""
    gpus = torch.cuda.device_count()
    visible = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(gpus)))
    threads = str(max(1, (os.cpu_count() or 1) // FLAGS.jobs))
    free = list(range(FLAGS.jobs))

    def run_chain(chain):
        place = free.pop()
        env = {'OMP_NUM_THREADS': threads, **os.environ}        # unless you set it yourself
        if gpus:
            env['CUDA_VISIBLE_DEVICES'] = visible.split(',')[place % gpus]
        missing, done = False, []
        for student in chain:
            if missing:
                student.problem = 'an earlier student of its chain is missing'
            else:
                student.make(commands, env, done)
            missing = bool(student.problem)
            bar.update()
        free.append(place)

    with progress(sum(map(len, chains)), 'students', unit='student') as bar, \
            ThreadPoolExecutor(FLAGS.jobs) as pool, Commands() as commands:
        list(pool.map(run_chain, chains))


def report(students):
    """Write the table and the pictures of the students that are finished; name the others."""
    folder, steps = Path(FLAGS.logdir), sorted({s.steps for s in students}, reverse=True)
    folder.mkdir(parents=True, exist_ok=True)
    done = [s for s in students if s.result() and not s.problem]
    failed = [s for s in students if s not in done]
    shape = len(FLAGS.methods), len(steps), FLAGS.seeds
    scores = {score: np.full(shape, np.nan) for score in SCORES}
    for s in done:
        place = FLAGS.methods.index(s.method), steps.index(s.steps), s.seed
        for score, values in scores.items():
            values[place] = s.result()[score]
    text = '\n\n'.join(table(values, steps, score) for score, values in scores.items())
    if failed:
        text += '\n\nMissing:\n' + ''.join(f'\n- {s.method}, seed {s.seed}, {s.steps} steps: '
                                           f'{s.problem or "not made yet"}' for s in failed)
    (folder / 'table.md').write_text(text + '\n')
    print(text, flush=True)
    if done:
        draw(scores, steps, folder / 'study.png')
    for T in steps:
        rows = {}
        for s in done:
            if (s.steps, s.seed) == (T, 0):
                with np.load(str(s.folder / 'samples.npz')) as samples:
                    rows[s.method] = torch.from_numpy(samples['arr_0'][:16]).permute(0, 3, 1, 2)
        if rows:
            pictures.save_labelled(folder / f'samples_{T}.png', f'NFE {T}  seed 0',
                                   list(rows.values()), list(rows))
    if failed:
        raise UserError(f'{len(failed)} of {len(students)} students are missing, see '
                        f'{folder}/table.md; run the same command again', code=1)


def interval(values):
    """Mean of n values, nan left out, and half of its 95 % interval by the t distribution."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return values.sum() if len(values) else np.nan, np.nan
    error = np.std(values, ddof=1) / len(values) ** .5
    return np.mean(values), stdtrit(len(values) - 1, .975) * error


def words(values, sign=''):
    mean, half = interval(values)
    return f'{mean:{sign}.3f}' + ('' if np.isnan(half) else f' +- {half:.3f}')


def table(values, steps, score):
    """Markdown of values (methods, steps, seeds): a row per method, a column per step count."""
    rows = [f'{SCORES[score]}: mean +- half the 95 % interval over the seeds; in brackets the '
            f'difference from {FLAGS.baseline}, paired over seeds', '',
            '| method | ' + ' | '.join(f'{T} step{"s" if T > 1 else ""}' for T in steps) + ' |',
            '| :--- |' + ' ---: |' * len(steps)]
    for method, mine in zip(FLAGS.methods, values):
        differences = mine - values[FLAGS.methods.index(FLAGS.baseline)]
        cells = []
        for value, difference in zip(mine, differences):
            cell = '-' if np.isnan(value).all() else words(value)
            if method != FLAGS.baseline and not np.isnan(difference).all():
                cell += f' ({words(difference, "+")})'
            cells.append(cell)
        rows.append(f'| {method} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)


def draw(scores, steps, path):
    """Both scores over NFE with error bars, a colour per method, side by side."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('note: no study.png without matplotlib (see requirements-export.txt).')
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    for axis, (score, values) in zip(figure.subplots(1, 2), scores.items()):
        for method, mine in zip(FLAGS.methods, values):
            mean, half = zip(*map(interval, mine))
            axis.errorbar(steps, mean, half, marker='o', capsize=2, label=method)
        axis.set_xscale('log', base=2, subs=[])
        axis.set(xlabel='network evaluations per image (NFE)', ylabel=SCORES[score],
                 xticks=steps, xticklabels=steps, yscale='log' if score == 'fid' else 'linear')
    axis.legend()
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    define_flags()
    cli.run(main)
