"""Which loss helps? Distil one teacher by several methods, with several seeds, and compare.

  python study.py --base_ckpt ./logs/digits/8 --config DIGITS --logdir ./logs/study --jobs 2
  python study.py --base_ckpt ./logs/CIFAR10/8 --config CIFAR10 --logdir ./logs/study --seeds 3 \\
      --method "mine=train_rdd.py --logits --logits_weight 3" --methods DDIM,PD,RDD,mine
  python study.py --base_ckpt ./logs/digits/8 --ddim_ckpt ./logs/digits/64 --config DIGITS \\
      --logdir ./logs/study --methods DDIM,PD,PD+DMD --baseline DDIM/64

A method halves the steps of the teacher down to --until, or trains the last student of another
method further by train_dmd.py. It calls the scripts and flagfiles that you would call yourself:
config/<config>_PD.txt, _RDD.txt, _DMD.txt and _EVAL.txt. All students of a seed are scored
from the same noise. Results in --logdir: <method>/seed<S>/<steps>/, a run for every student;
table.md (means, 95 % intervals over the seeds, paired differences from --baseline, seconds of
training, what failed); study.png (scores over the network evaluations; needs matplotlib);
samples_<steps>.png.
"""

import json
import os
import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from absl import flags
from scipy.special import stdtrit

from formats.load import load_model
from runtime import checkpoint, cli, files, pictures
from runtime.cli import UserError
from runtime.commands import Commands
from runtime.flags import define_teacher_steps, require
from runtime.log import progress
from score import results
from training import LEAST_STEPS, halvings

FLAGS = flags.FLAGS
# name: script and what is added to its flagfile; DDIM samples the teacher itself with fewer steps,
# and "PD then train_dmd.py" starts from the last student of the method PD
METHODS = {
    'DDIM': '',
    'PD': 'PD.py',
    'CFD': 'train_rdd.py --loss_type none',
    'RCFD': 'train_rdd.py --loss_type none --alpha 0.003 --beta 0.75',
    'RDD': 'train_rdd.py',
    'RDD-released': 'train_rdd.py --queue_layout released',
    'CFD+PD': 'train_rdd.py --loss_type none --logits',
    'RDD+PD': 'train_rdd.py --logits',
    'CFD+10PD': 'train_rdd.py --loss_type none --logits --logits_weight 10',
    'DMD': 'train_dmd.py',
    'PD+DMD': 'PD then train_dmd.py',
    'RDD+DMD': 'RDD then train_dmd.py'}
# script: the end of the name of its flagfile
CONFIG_OF = {'PD.py': 'PD', 'train_rdd.py': 'RDD', 'train_dmd.py': 'DMD'}
SCORES = dict(fid='Frechet distance', inception_score='Inception score', precision='Precision',
              recall='Recall')
OWN_FLAGS = {'seed', 'base_ckpt', 'teacher_ckpt', 'logdir', 'until', 'teacher_steps',
             'student_steps', 'save_images', 'stride'}
# flags with the folders of students, or the number of their steps
WHERE = tuple(f'--{name}=' for name in OWN_FLAGS - {'seed', 'teacher_steps'})


def define_flags():
    flags.DEFINE_string('base_ckpt', None, 'folder (or file) of the teacher, for example the '
                        'student of 8 steps that PD.py made, or a folder of diffusers')
    define_teacher_steps()
    flags.DEFINE_string('ddim_ckpt', None, 'model that the method DDIM samples, and the teacher of '
                        'train_dmd.py; none: --base_ckpt')
    flags.DEFINE_string('config', None, 'DIGITS: use config/DIGITS_PD.txt, _RDD.txt, ..')
    flags.DEFINE_string('logdir', None, 'folder for all students and the results')
    flags.DEFINE_list('methods', [name for name in METHODS if 'DMD' not in name], 'what to compare')
    flags.DEFINE_multi_string('method', [], 'a method of your own, "NAME=SCRIPT FLAGS", or '
                              '"NAME=OTHER then train_dmd.py FLAGS" to start from the last '
                              'student of OTHER; repeat it for more, and list it in --methods')
    flags.DEFINE_string('baseline', 'PD', 'method to compare the others with, at the same number '
                        'of steps; DDIM/64: always with DDIM at 64 steps')
    flags.DEFINE_integer('until', 1, 'steps of the last student', 1)
    flags.DEFINE_integer('seeds', 5, 'trainings of every method, with seeds 0, 1, ..', 1, 1000)
    flags.DEFINE_integer('jobs', 1, 'trainings at once, each on its GPU or cores', 1, 256)
    flags.DEFINE_bool('report', False, 'only write table and pictures of what is finished')
    flags.DEFINE_string('train_flags', '', 'more flags for every training, in quotes')
    flags.DEFINE_string('eval_flags', '', 'more flags for every evaluation, in quotes')


def main():
    require(base_ckpt='the folder of the teacher, such as ./logs/digits/8',
            config='the data set whose flagfiles are used, such as DIGITS',
            logdir='the folder of the study, such as ./logs/study')
    methods, teacher = chosen_methods(), load_model(FLAGS.base_ckpt, steps=FLAGS.teacher_steps)
    steps = halvings(teacher.diffusion.T, FLAGS.until, FLAGS.base_ckpt)
    ddim_model = load_model(FLAGS.ddim_ckpt) if FLAGS.ddim_ckpt else teacher
    T = ddim_model.diffusion.T
    if T % (2 * steps[0]):
        raise UserError(f'--ddim_ckpt {FLAGS.ddim_ckpt} has {T} steps, expected a multiple of the '
                        f'{2 * steps[0]} of --base_ckpt; give another model')
    if T < LEAST_STEPS and any(script == 'train_dmd.py' for _, script, _ in methods.values()):
        raise UserError(f'train_dmd.py needs a teacher of {LEAST_STEPS} steps or more, found {T}; '
                        f'give the one before it was distilled as --ddim_ckpt')
    chains = all_chains(methods, steps, teacher, ddim_model)
    if not FLAGS.report:
        for model in (teacher, ddim_model):        # what the commands read is a run's checkpoint
            if model is teacher and FLAGS.teacher_steps or model.file.suffix != '.pt':
                save_as_run(model)
        for chain in chains:
            chain.record_plan()
        comparable_results(chains)      # refuses scores of before that do not compare
        run_all(chains)
    report(chains)


def all_chains(methods, steps, teacher, ddim_model):
    """A `Chain` per seed and method; DDIM samples and train_dmd.py imitates `ddim_model`."""
    baseline, _, count = FLAGS.baseline.partition('/')
    T, ddim_steps = ddim_model.diffusion.T, [2 * steps[0], *steps]
    if baseline == 'DDIM' and count in [str(n) for n in range(1, T + 1) if T % n == 0]:
        ddim_steps = sorted({*ddim_steps, int(count)}, reverse=True)
    chains = []
    for seed in range(FLAGS.seeds):
        made = {}
        for name, (first, script, extra) in methods.items():
            step_counts = {None: ddim_steps, 'train_dmd.py': steps[-1:]}.get(script, steps)
            model = ddim_model if script in (None, 'train_dmd.py') else teacher
            made[name] = Chain(name, script, extra, seed, step_counts, model, made.get(first))
        if count and count not in map(str, made[baseline].step_counts):
            raise UserError(f'--baseline {FLAGS.baseline}: no student has {count} steps; choose of '
                            f'{", ".join(map(str, made[baseline].step_counts))}')
        chains += made.values()
    return chains


def save_as_run(model):
    """Write a model of any source as the checkpoint of a run in --logdir."""
    weights = model.network.state_dict()
    folder = Path(FLAGS.logdir) / f'teacher-{checkpoint.digest(weights)}-{model.diffusion.T}'
    folder.mkdir(parents=True, exist_ok=True)
    model.file = folder / 'ckpt.pt'
    entries = {**model.provenance(), **model.network.entries, **model.diffusion.arguments()}
    checkpoint.save(model.file, dict(entries, net_model=weights, use='net_model',
                                     img_size=model.img_size))


def chosen_methods():
    """{name: (first, script, flags)} of --methods, see `parsed`; own methods included."""
    commands = dict(METHODS)
    for text in FLAGS.method:
        name, _, commands[name] = text.partition('=')
        if '/' in name or not name.strip('.'):
            raise UserError(f'--method "{text}" has a name that no folder can have; choose another')
    for text in [*commands.values(), FLAGS.train_flags, FLAGS.eval_flags]:
        try:
            names = {word.lstrip('-').partition('=')[0] for word in shlex.split(text)}
        except ValueError as error:
            raise UserError(f'"{text}" is not understood ({error}); mind the quotes')
        for name in OWN_FLAGS & names:
            raise UserError(f'"{text}" sets --{name}, which the study chooses; leave it out')
    if not set(FLAGS.methods) <= set(commands) or len(set(FLAGS.methods)) < len(FLAGS.methods):
        raise UserError(f'--methods {",".join(FLAGS.methods)}: choose of {", ".join(commands)}, '
                        f'each once')
    methods = {}
    for name in FLAGS.methods:
        methods[name] = first, script, _ = parsed(commands[name])
        sampled_alone = name == 'DDIM' and script is None
        if not (script in CONFIG_OF or sampled_alone) or first and script != 'train_dmd.py':
            raise UserError(f'--method "{name}={commands[name]}" is not understood; expected '
                            f'"NAME=SCRIPT FLAGS" with {", ".join(CONFIG_OF)} as the script, or '
                            f'"NAME=OTHER then train_dmd.py FLAGS"')
        if first and (first not in methods or first == 'DDIM'):
            raise UserError(f'--methods {",".join(FLAGS.methods)}: {name} starts from the last '
                            f'student of {first}; list a method that makes one, before it')
        if script == 'train_dmd.py' and FLAGS.until > 4:
            raise UserError(f'--until {FLAGS.until} is more than the 4 steps that a student of '
                            f'{name} can have; lower it, or leave that method out')
    if FLAGS.baseline.partition('/')[0] not in methods:
        raise UserError(f'--baseline {FLAGS.baseline} is not among --methods '
                        f'{",".join(FLAGS.methods)}; add it, or choose another baseline')
    scripts = {CONFIG_OF[script] for _, script, _ in methods.values() if script}
    for stage in [*sorted(scripts), 'EVAL']:
        if not config(stage).is_file():
            raise UserError(f'{config(stage)} (--config) is missing; write it, or choose another')
    return methods


def parsed(command):
    """(method whose last student it starts from or '', script or None, flags) of a command."""
    first, _, rest = command.rpartition(' then ')
    script, *extra = shlex.split(rest) or [None]
    return first, script, extra


def config(stage):
    return cli.find(f'config/{FLAGS.config}_{stage}.txt')


class Chain:
    """The students of one method and seed, and the commands that make and score them."""

    def __init__(self, method, script, extra, seed, step_counts, teacher, first=None):
        self.method, self.seed = method, seed
        self.script, self.extra = script, extra     # None: no training; flags after its flagfile
        self.step_counts = step_counts      # of the students, the largest first
        self.teacher = teacher      # the `Model` that is distilled, or sampled by DDIM
        self.first = first          # the chain whose last student this one starts from, or None
        self.finished = threading.Event()
        self.folder = Path(FLAGS.logdir).resolve() / method / f'seed{seed}'
        self.problem = 'not made yet'

    def commands(self):
        """{steps: words of the evaluation}; before them 'train': those of the training, if any."""
        found, seed, last = {}, f'--seed={self.seed}', self.step_counts[-1]
        if self.script == 'train_dmd.py':
            where = [f'--teacher_ckpt={self.teacher.file}', f'--logdir={self.folder}/{last}',
                     f'--student_steps={0 if self.first else last}']
        else:
            where = [f'--logdir={self.folder}', f'--until={FLAGS.until}']
        if self.script:
            start = f'{self.first.folder}/{last}' if self.first else self.teacher.file
            found['train'] = [
                self.script, f'--flagfile={config(CONFIG_OF[self.script])}', *self.extra,
                *shlex.split(FLAGS.train_flags), f'--base_ckpt={start}', '--teacher_steps=0',
                *where, seed]
        for T in self.step_counts:
            stride = 1 if self.script else self.teacher.diffusion.T // T
            found[T] = [
                'ddim_eval.py', f'--flagfile={config("EVAL")}', *shlex.split(FLAGS.eval_flags),
                f'--logdir={self.folder}/{T}', f'--stride={stride}', seed,
                f'--save_images={self.folder}/{T}/samples.npz']
        return found

    def plan(self):
        """What the students are made from.

        Not where they are, since paths may be given from another working directory, and not the
        numbers of steps: --until may be lowered later.
        """
        words = [absolute(word) for command in list(self.commands().values())[:2]
                 for word in FLAGS.read_flags_from_files(command)
                 if not word.startswith(WHERE)]
        digest = checkpoint.digest(self.teacher.network.state_dict())
        return dict(words=words, teacher=digest, first=self.first and self.first.plan())

    def record_plan(self):
        """Write the plan into the folder, whose students must have been made so."""
        plan, file = json.dumps(self.plan()), self.folder / 'commands.json'
        if any(self.folder.glob('*/ckpt.pt')) and file.is_file() and file.read_text() != plan:
            raise UserError(f'{self.folder} was made by other commands, from other flagfiles or '
                            f'another teacher; choose another --logdir')
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as temporary:
            temporary.write_text(plan)

    def result(self, T):
        """The last line of results.jsonl of the student with T steps and this seed, or None."""
        lines = results.read(self.folder / f'{T}/results.jsonl', 'ckpt.pt')     # no ckpt_STEP.pt
        mine = [line for line in lines if (line['seed'], line['nfe']) == (self.seed, T)]
        return mine[-1] if mine else None

    def make(self, commands, env):
        """Run what is not finished, until a command fails; its last line is the problem then."""
        if self.first and not self.first.result(self.step_counts[-1]):
            self.problem = f'there is no student of {self.first.method} to start from'
            return
        missing, log = [T for T in self.step_counts if not self.result(T)], self.folder / 'log.txt'
        for name, words in self.commands().items():
            if name not in missing and not (missing and name == 'train'):
                continue
            if not self.script:
                ckpt = self.folder / f'{name}/ckpt.pt'
                ckpt.parent.mkdir(exist_ok=True)
                ckpt.unlink(missing_ok=True)        # a link of an earlier start
                ckpt.symlink_to(self.teacher.file.resolve())
            since, before = time.time(), self.last_change()
            with open(log, 'a') as file:
                code = commands.run(words, stdout=file, stderr=file, env=env)
            if name == 'train' and (code or self.last_change() != before):
                with open(self.folder / 'seconds.txt', 'a') as file:
                    file.write(f'{time.time() - since:.1f}\n')
            if code:
                last = log.read_text(errors='replace').strip().rpartition('\n')[2]
                self.problem = f'{words[0]} ended with code {code}: {last}'
                break

    def last_change(self):
        """When the checkpoint of the last student was written, or None."""
        file = self.folder / f'{self.step_counts[-1]}/ckpt.pt'
        return file.stat().st_mtime_ns if file.exists() else None

    def seconds(self):
        """Seconds of its training, and of that of the student that it starts from."""
        file = self.folder / 'seconds.txt'
        own = sum(map(float, file.read_text().split())) if file.is_file() else 0.
        return own + (self.first.seconds() if self.first else 0.)


def absolute(word):
    """A word of a command with its path, if it has one, made absolute."""
    name, equals, value = word.rpartition('=')
    return f'{name}{equals}{cli.find(value).resolve()}' if '/' in value else word


def run_all(chains):
    """Make the students of all chains, --jobs chains side by side; those that wait come last."""
    gpus = torch.cuda.device_count()
    visible = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(gpus)))
    threads = str(max(1, (os.cpu_count() or 1) // FLAGS.jobs))
    free = list(range(FLAGS.jobs))

    def run_chain(chain):
        if chain.first:     # which was started before this one
            chain.first.finished.wait()
        place = free.pop()
        env = {'OMP_NUM_THREADS': threads, **os.environ}        # unless you set it yourself
        if gpus:
            env['CUDA_VISIBLE_DEVICES'] = visible.split(',')[place % gpus]
        try:
            chain.make(commands, env)
        finally:
            chain.finished.set()
            free.append(place)
        bar.update()

    with progress(len(chains), 'methods and seeds', unit='chain') as bar, \
            ThreadPoolExecutor(FLAGS.jobs) as pool, Commands() as commands:
        list(pool.map(run_chain, sorted(chains, key=lambda chain: chain.first is not None)))


def comparable_results(chains):
    """{(chain, T): result or None} of all students; UserError if two do not compare."""
    found = {(chain, T): chain.result(T) for chain in chains for T in chain.step_counts}
    first = {}
    for (chain, T), result in found.items():
        if not result:
            continue
        protocol = {key: result[key] for key in results.PROTOCOL}
        protocol['reference'] = str(cli.find(result['reference']).resolve())      # by any path
        protocol[f'weights of {chain.method}'] = result.get('weights')
        for key, value in protocol.items():
            if value != first.setdefault(key, value):
                raise UserError(f'{chain.folder}/{T}/results.jsonl has a score with {key} {value}, '
                                f'others have {first[key]}; remove those files of one kind and run '
                                f'the same command again, to score anew')
    return found


def report(chains):
    """Write the table and the pictures of the students that are finished; name the others."""
    steps = sorted({T for chain in chains for T in chain.step_counts}, reverse=True)
    shape = len(FLAGS.methods), len(steps), FLAGS.seeds
    scores = {score: np.full(shape, np.nan) for score in SCORES}
    folder, missing, rows = Path(FLAGS.logdir), [], {T: {} for T in steps}
    for (chain, T), result in comparable_results(chains).items():
        if not result:
            missing.append(f'- {chain.method}, seed {chain.seed}, {T} steps: {chain.problem}')
            continue
        place = FLAGS.methods.index(chain.method), steps.index(T), chain.seed
        for score, values in scores.items():
            values[place] = result.get(score)       # None, without features in the reference: nan
        file = chain.folder / f'{T}/samples.npz'
        if chain.seed == 0 and file.is_file():
            images, _ = pictures.read_samples(file)
            rows[T][chain.method] = torch.from_numpy(images[:16]).permute(0, 3, 1, 2)
    scores = {score: values for score, values in scores.items()
              if score == 'fid' or not np.isnan(values).all()}
    text = '\n\n'.join(table(values, steps, score) for score, values in scores.items())
    text += '\n\n' + cost(chains)
    if missing:
        text += '\n\nMissing:\n\n' + '\n'.join(missing)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'table.md').write_text(text + '\n', encoding='utf-8')
    cli.print0(text)
    if not np.isnan(scores['fid']).all():
        draw(scores, steps, folder / 'study.png')
    for T in filter(rows.get, steps):
        pictures.save_labelled(folder / f'samples_{T}.png', f'NFE {T}  seed 0',
                               list(rows[T].values()), list(rows[T]))
    if missing:
        again = 'the command without --report' if FLAGS.report else 'the same command again'
        raise UserError(f'{len(missing)} students are missing, see {folder}/table.md; run {again}',
                        code=1)


def interval(values):
    """Mean of n values, nan left out, and half of its 95 % interval by the t distribution."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return values.sum() if len(values) else np.nan, np.nan
    error = np.std(values, ddof=1) / len(values) ** .5
    return np.mean(values), stdtrit(len(values) - 1, .975) * error


def rounded(values, sign=''):
    mean, half = interval(values)
    return f'{mean:{sign}.3f}' + ('' if np.isnan(half) else f' +- {half:.3f}')


def table(values, steps, score):
    """Markdown of values (methods, steps, seeds): a row per method, a column per step count."""
    baseline, _, count = FLAGS.baseline.partition('/')
    reference = values[FLAGS.methods.index(baseline)]       # (steps, seeds)
    if count:
        reference = reference[[steps.index(int(count))]]
    rows = [f'{SCORES[score]}: mean +- half the 95 % interval over the seeds; in brackets the '
            f'difference from {FLAGS.baseline}, paired over seeds', '',
            '| method | ' + ' | '.join(f'{T} step{"s" if T > 1 else ""}' for T in steps) + ' |',
            '| :--- |' + ' ---: |' * len(steps)]
    for method, mine in zip(FLAGS.methods, values):
        differences = mine - reference
        cells = []
        for T, value, difference in zip(steps, mine, differences):
            cell = '-' if np.isnan(value).all() else rounded(value)
            itself = method == baseline and count in ('', str(T))
            if not itself and not np.isnan(difference).all():
                cell += f' ({rounded(difference, "+")})'
            cells.append(cell)
        rows.append(f'| {method} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)


def cost(chains):
    """Seconds of training, up to the last student of each method, mean over those finished."""
    seconds = {name: [] for name in FLAGS.methods}
    for chain in chains:
        if chain.script and chain.result(chain.step_counts[-1]):
            seconds[chain.method].append(chain.seconds())
    means = [f'{name} {np.mean(values):.0f}' for name, values in seconds.items() if values]
    return (f'Seconds of training, from the teacher to the last student, mean over the seeds: '
            f'{", ".join(means) or "no student is finished"}.')


def draw(scores, steps, path):
    """The scores over NFE with error bars, a colour per method."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('note: no study.png without matplotlib (see requirements-export.txt).')
    figure = Figure(figsize=(11, 4.5 * len(scores) / 2), layout='constrained')
    for axis, (score, values) in zip(figure.subplots(len(scores) // 2, 2).flat, scores.items()):
        for method, mine in zip(FLAGS.methods, values):
            mean, half = zip(*map(interval, mine))
            label = method.replace('$', r'\$')      # no formula
            axis.errorbar(steps, mean, half, marker='o', capsize=2, label=label)
        axis.set_xscale('log', base=2, subs=[])
        axis.set(xlabel='network evaluations per image (NFE)', ylabel=SCORES[score],
                 xticks=steps, xticklabels=steps, yscale='log' if score == 'fid' else 'linear')
    axis.legend()
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    define_flags()
    cli.run(main)
