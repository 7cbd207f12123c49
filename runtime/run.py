"""A training run: everything around the mathematics of a step.

    run = Run('base', net, dataset, logdir, total_steps)
    for step in run:                                # the steps that are not done yet
        for part in run.parts():                    # x_0, y, rows of this process
            with run.training(part):
                prediction = run.net(part.x_0)
            run.backward(loss=(1., loss))           # name=(weight, value), ...
        run.update(lr)
The script owns the loop and the losses. The run owns the weights, their average, the optimisers,
checkpoint, log and signals. What it does after a step stands in `_end_step`.
"""

import contextlib
import copy

import torch
from absl import flags
from torch import nn

from runtime import checkpoint, data, distributed, seeding
from runtime.cli import UserError
from runtime.flags import announce, resolved
from runtime.guard import Folder, leave_after, stop
from runtime.log import Log, Meter
from runtime.optim import (adam, clip_gradient, ema_update, frozen, nan_gradient_if_not_finite,
                           step_optimizer)
from runtime.precision import autocast, choose, compile_networks, prepare

FLAGS = flags.FLAGS


def training_data():
    """The training images of --dataset, checked against the batch size."""
    distributed.check_batch(FLAGS.batch_size, FLAGS.grad_accum)
    dataset = data.make_dataset(FLAGS.dataset, FLAGS.data_root, FLAGS.img_size, train=True,
                                num_workers=FLAGS.num_workers,
                                skip_bad_images=FLAGS.skip_bad_images)
    if len(dataset) < FLAGS.batch_size:
        raise UserError(f'--batch_size {FLAGS.batch_size} is more than the {len(dataset)} training '
                        f'images of --dataset {dataset.name}; lower it')
    return dataset


def due(step, every, last=None):
    """Whether something done every `every` steps (0: never) is due, or `step` is the `last`."""
    return step == last or (every > 0 and step % every == 0)


class Trainable:
    """A network or head in training, called through DDP, and its optimiser.

    Attributes:
        average_gradients: whether the next backward averages gradients over the processes.
    """

    def __init__(self, module, optimizer):
        self.module, self.ddp = module, distributed.wrap_ddp(module)
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.optim = optimizer(self.params, FLAGS.lr, FLAGS.wd)
        self.average_gradients = True

    def __call__(self, *inputs):
        with distributed.no_sync(self.ddp, not self.average_gradients):
            return self.ddp(*inputs)


class Part:
    """The images a process works on at a time: all of its share, or one of --grad_accum parts.

    Attributes:
        x_0: (B, 3, H, W) in [-1, 1].
        y: (B,) labels.
        rows: slice of the total batch.
        number: 0 .. grad_accum - 1; gradients are averaged over the processes after the last.
    Scripts may attach what they compute.
    """

    def __init__(self, x_0, y, rows, number):
        self.x_0, self.y, self.rows, self.number = x_0, y, rows, number


class Run:
    """One folder, and one network that is trained until `total_steps`.

    Args:
        method: name of the training, such as 'pd'; a checkpoint of another one is refused.
        net: the network to train, on its device.
        dataset: its `Images`.
        logdir: the folder.
        total_steps: number of optimiser steps.
        title: words for the progress bar.
        key: key of the weights in the checkpoint.
        optimizer: function (parameters, lr, wd) -> optimiser of the network.
        ema_decay: decay of the averaged weights; 0: none.
        use: weights that users take, 'net_model' or 'ema_model'.
        head: a second module to train, by Adam, at a constant rate and without clipping.
        also_saved: {key: module or optimiser} to save and restore besides.
        fixed: {key: plain value} of the checkpoint that must be the same on resuming, as T.
        entries: further entries of the checkpoint, of plain types; may change during the run.
        inputs: {name: digest} of what the run builds on, such as its teacher; on resuming, another
            one is refused.
        augment: see `data.batches`.
        amp: precision, if not that of --amp.
        facts: {name: number} to print when the run starts.
    Raises:
        UserError: the folder holds another run.
    """

    def __init__(self, method, net, dataset, logdir, total_steps, *, title='', key='net_model',
                 optimizer=adam, ema_decay=0., use='net_model', head=None, also_saved=None,
                 fixed=None, entries=None, inputs=None, augment=None, amp=None, facts=None):
        self.method, self.dataset, self.logdir = method, dataset, str(logdir)
        self.total_steps, self.title, self.key, self.augment = total_steps, title, key, augment
        self.device = next(net.parameters()).device
        self.amp = amp or choose(FLAGS.amp, self.device)
        self.ema_decay, self.use = ema_decay, use
        averaged = ema_decay or use == 'ema_model'
        self.ema = frozen(copy.deepcopy(net)) if averaged else None
        self.net = Trainable(net, optimizer)
        self.head = Trainable(head, adam) if head else None
        self.also_saved, self.fixed, self.entries = also_saved or {}, fixed or {}, entries or {}
        self.inputs = dict(inputs or {}, data=dataset.fingerprint)
        self.facts = dict(images=len(dataset), **(facts or {}))
        networks = [self.net.ddp] + ([self.ema] if use == 'ema_model' else [])
        compile_networks(FLAGS.compile, self.device, *networks)
        self.dropout = any(isinstance(m, nn.Dropout) and m.p for m in net.modules())
        self.meter, self.lr, self.reported = Meter(), 0., {}
        self.start = self.step = self._resume()
        self._parts_done, self._open = None, None

    @property
    def sampled(self):
        """The network that users will take: the average, or the one in training."""
        return self.ema if self.use == 'ema_model' else self.net.module

    # Checkpoint

    def saved(self):
        """{key of the checkpoint: object with a state dict}, for saving and for resuming."""
        found = {self.key: self.net.module, 'optim': self.net.optim, **self.also_saved}
        if self.ema:
            found['ema_model'] = self.ema
        if self.head:
            found['optim_head'] = self.head.optim
        return found

    def _refuse_if_another_run_has_saved(self):
        """Compare with what `_resume` has read, now that the folder is locked."""
        changed = checkpoint.stamp(self.logdir) != self.resumed_from
        if distributed.broadcast_object(changed):
            raise UserError(f'another process has saved in {self.logdir} while this one started; '
                            f'run the same command again', code=1)

    def _resume(self):
        """Load what an earlier start left in the folder; returns the step to go on from."""
        self.resumed_from = checkpoint.stamp(self.logdir)
        fixed = dict(self.fixed, method=self.method)
        state = checkpoint.read_run(self.logdir, self.key, fixed, self.inputs)
        if state is None:
            return 0
        checkpoint.restore(state, self.saved(), self.logdir)
        return state['step']

    def _save(self):
        states = {key: value.state_dict() for key, value in self.saved().items()}
        checkpoint.check_finite(states, self.step, self.logdir)
        checkpoint.save_run(
            self.logdir, FLAGS.keep, **states, **self.fixed, **self.entries, method=self.method,
            step=self.step, inputs=self.inputs, dataset=FLAGS.dataset, img_size=FLAGS.img_size,
            batch_size=FLAGS.batch_size, seed=FLAGS.seed, flags=resolved())

    # The loop

    def __iter__(self):
        """Yield the steps that are not done; after each, do what is due.

        Log and folder are closed however the loop ends, also by an exception or a `break`.
        """
        if self.start >= self.total_steps:
            return distributed.print0(f'{self.logdir} is finished: step {self.start}.')
        folder, stopped = Folder(self.logdir, resolved()), 0
        with contextlib.closing(folder), stop:
            self._refuse_if_another_run_has_saved()
            distributed.print0(self.dataset.summary)
            announce(self.device, self.start, **self.facts)
            self.log = Log(self.logdir, self.title or self.method, self.start, self.total_steps,
                           FLAGS.batch_size, resolved())
            with contextlib.closing(self.log):
                self.net.module.train()
                self.batches = data.batches(
                    self.dataset, FLAGS.batch_size, FLAGS.seed, self.device, self.start,
                    FLAGS.grad_accum, num_workers=FLAGS.num_workers, augment=self.augment)
                for self.step in range(self.start + 1, self.total_steps + 1):
                    self._parts_done, self._open = 0, None
                    yield self.step
                    stopped = self._end_step()
                    if stopped:
                        break
            if stopped:
                leave_after(stopped, self.logdir, self.step)
        distributed.print0(self.log.summary(self.step, self.logdir))

    def parts(self):
        """Yield the `Part`s of this step for this process.

        A row of the total batch is a function of (seed, step, row) alone.
        """
        for number in range(FLAGS.grad_accum):
            x_0, y = next(self.batches)
            rows = distributed.rows(FLAGS.batch_size, number, FLAGS.grad_accum)
            yield Part(x_0, y, rows, number)

    @contextlib.contextmanager
    def training(self, part):
        """Where the network in training is called on `part`: dropout's random numbers, autocast.

        Gradients are averaged over the processes in the backward of the last part only.
        """
        if self._open is not None:
            raise RuntimeError('run.training() was called twice in a row; call run.backward() '
                               'after each part')
        self._open = part
        for trainable in filter(None, (self.net, self.head)):
            trainable.average_gradients = part.number + 1 == FLAGS.grad_accum
        if self.dropout:
            torch.manual_seed(seeding.mix(FLAGS.seed, seeding.DROPOUT, self.step,
                                          distributed.rank(), part.number))
        with self.autocast():
            yield

    def backward(self, **terms):
        """Add the gradient of sum(weight * value) of a part; terms: name=(weight, value)."""
        if self._open is None:
            raise RuntimeError('run.backward() was called without run.training(); call the network '
                               'inside "with run.training(part):" first')
        loss = sum(weight * value for weight, value in terms.values())
        (nan_gradient_if_not_finite(loss) / FLAGS.grad_accum).backward()
        self.meter.add(**{name: value for name, (_, value) in terms.items()})
        self.meter.add(loss=loss)
        self._open, self._parts_done = None, self._parts_done + 1

    def update(self, lr):
        """Clip, step, average. If any gradient is not finite, no optimiser moves."""
        if self._parts_done != FLAGS.grad_accum:
            raise RuntimeError(f'run.update() was called after {self._parts_done or 0} of '
                               f'{FLAGS.grad_accum} parts; call run.training() and run.backward() '
                               f'for every part of run.parts() first, and run.update() once')
        norm = clip_gradient(self.net.params, FLAGS.grad_clip)
        finite = norm.isfinite()        # stays on the device: the host does not wait
        if self.head:
            finite &= clip_gradient(self.head.params, 0).isfinite()
            step_optimizer(self.head.optim, finite)
        step_optimizer(self.net.optim, finite, lr)
        if self.ema:
            ema_update(self.ema, self.net.module, self.ema_decay)
        self.meter.add(grad_norm=norm)
        self.meter.end_step(finite)
        self.lr, self._parts_done = lr, None

    def _end_step(self):
        """What is due after a step, in order; returns the signal that ends the run, or 0."""
        if self._parts_done is not None:
            raise RuntimeError(f'step {self.step} ended without run.update()')
        step, last = self.step, self.total_steps
        if due(step, FLAGS.log_step, last):
            means = self.meter.means(step, self.start, last)
            self.log.write(step, lr=self.lr, **means, **self.reported)
            self.reported = {}
        self.log.bar.update()
        stopping = stop.asked(step, step == last)
        if due(step, FLAGS.save_step, last) or stopping:
            self._save()
        return stopping

    # For the script

    def autocast(self):
        """The precision of --amp, for networks that are not trained."""
        return autocast(self.amp, self.device)

    def prepare(self, teacher, *others):
        """Make networks that are not trained fast: weights as --amp has them, and --compile.

        On a GPU, --compile makes one CUDA graph of the teacher, which is called without gradients.
        """
        prepare(self.amp, FLAGS.compile, self.device, teacher, graphs=True)
        prepare(self.amp, FLAGS.compile, self.device, *others)

    def report(self, **scalars):
        """Numbers for the next line of the log, as they are; alike on all processes."""
        self.reported.update(scalars)

    def generator(self, *key):
        """Random numbers as a function of (seed, *key)."""
        return seeding.generator(self.device, FLAGS.seed, *key)
