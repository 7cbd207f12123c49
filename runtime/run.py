"""A training run: everything around the mathematics of a step. CONTRIBUTING.md shows a loop.

The script owns the loop and the losses. The run owns the weights, their average, the optimisers,
checkpoint, log and signals. What it does after a step stands in `_end_step`.
"""

import contextlib
import copy
import signal
from types import SimpleNamespace

import torch
from absl import flags
from torch import nn

from runtime import checkpoint, data, distributed, seeding
from runtime.cli import UserError, leave
from runtime.flags import announce, resolved
from runtime.guard import Folder, stop
from runtime.log import Log, Meter
from runtime.optim import adam, clip_gradient, ema_update, frozen, step_optimizer
from runtime.precision import autocast, choose, compile_networks, prepare

FLAGS = flags.FLAGS


def training_data():
    """The training images of --dataset, checked against the batch size."""
    parts = distributed.world_size() * FLAGS.grad_accum
    if FLAGS.batch_size % parts:
        raise UserError(f'--batch_size {FLAGS.batch_size} cannot be shared out equally over '
                        f'{distributed.world_size()} processes with --grad_accum '
                        f'{FLAGS.grad_accum}; choose a multiple of {parts}')
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
    """A network in training, its optimiser, and DDP, which averages if `average_gradients`."""

    def __init__(self, module, optimizer, lr=None):
        self.module, self.ddp = module, distributed.wrap_ddp(module)
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.optim = optimizer(self.params, FLAGS.lr if lr is None else lr, FLAGS.wd)
        self.average_gradients = True

    def __call__(self, *inputs):
        local = self.ddp is not self.module and not self.average_gradients
        with self.ddp.no_sync() if local else contextlib.nullcontext():
            return self.ddp(*inputs)


class Run:
    """One folder, and one network that is trained until `total_steps`.

    Args:
        method: name of the training, such as 'pd'; a checkpoint of another one is refused.
        net: the network to train, on its device. dataset: its `Images`.
        title: words for the progress bar and the first lines.
        key: of the weights in the checkpoint.
        optimizer: function (parameters, lr, wd) -> optimiser of the network.
        ema_decay: decay of the averaged weights; 0: none.
        use: weights that users take, 'net_model' or 'ema_model'.
        head: a second module to train, by Adam, at a constant rate and without clipping.
        also_saved: {key: module or optimiser} that is saved and restored as well.
        fixed: {key: plain value} of the checkpoint that must be the same on resuming, as T.
        entries: further entries of the checkpoint, of plain types; may change during the run.
        inputs: {name: digest} of what must be the same on resuming, such as the teacher.
        augment: see `data.batches`. amp: precision, if not that of --amp.
    """

    def __init__(self, method, net, dataset, logdir, total_steps, *, title='', key='net_model',
                 optimizer=adam, ema_decay=0., use='net_model', head=None, also_saved=None,
                 fixed=None, entries=None, inputs=None, augment=None, amp=None):
        self.method, self.dataset, self.logdir = method, dataset, str(logdir)
        self.total_steps, self.title, self.key = total_steps, title or method, key
        self.augment, self.ema_decay, self.use = augment, ema_decay, use
        self.also_saved, self.entries = also_saved or {}, entries or {}
        self.fixed = dict(fixed or {}, method=method)
        self.inputs = dict(inputs or {}, data=dataset.fingerprint)
        self.device = next(net.parameters()).device
        self.amp = amp or choose(FLAGS.amp, self.device)
        averaged = ema_decay or use == 'ema_model'
        self.ema = frozen(copy.deepcopy(net)) if averaged else None
        self.net = Trainable(net, optimizer)
        self.head = Trainable(head, adam) if head else None
        networks = [self.net.ddp] + ([self.ema] if use == 'ema_model' else [])
        compile_networks(FLAGS.compile, self.device, *networks)
        self.dropout = any(isinstance(m, nn.Dropout) and m.p for m in net.modules())
        self.meter, self.lr = Meter(), 0.
        self.reported = {}      # numbers of the script for the next line of the log
        state = checkpoint.read_run(self.logdir, key, self.fixed, self.inputs)
        if state:
            checkpoint.restore(state, self.saved(), self.logdir)
        self.start = self.step = state['step'] if state else 0

    def saved(self):
        """{key of the checkpoint: object with a state dict}, for saving and for resuming."""
        found = {self.key: self.net.module, 'optim': self.net.optim, **self.also_saved,
                 'ema_model': self.ema, 'optim_head': self.head and self.head.optim}
        return {key: value for key, value in found.items() if value is not None}

    def _save(self):
        """Save, and return whether there was anything: a run may not have applied a step yet."""
        if self.meter.streak >= self.step:
            return False
        states = {key: value.state_dict() for key, value in self.saved().items()}
        lost = checkpoint.not_finite(states)
        if lost:
            raise UserError(f'NaN or inf in {", ".join(lost)} at step {self.step}: nothing was '
                            f'saved, an earlier checkpoint in {self.logdir} stays, if there is '
                            f'one; lower the learning rate and run again', code=1)
        checkpoint.save_run(
            self.logdir, FLAGS.keep, **states, **self.fixed, **self.entries, step=self.step,
            inputs=self.inputs, dataset=FLAGS.dataset, img_size=FLAGS.img_size,
            batch_size=FLAGS.batch_size, seed=FLAGS.seed, flags=resolved())
        return True

    def __iter__(self):
        """Yield the steps that are not done; after each, do what is due.

        However the loop ends, also by an exception or a `break`, log and folder are closed.
        """
        if self.start >= self.total_steps:
            return distributed.print0(f'{self.logdir} is finished: step {self.start}.')
        with contextlib.closing(Folder(self.logdir, resolved())), stop:
            distributed.print0(self.dataset.summary)
            announce(self.device, self.start, self.title, len(self.dataset))
            self.log = Log(self.logdir, self.title, self.start, self.total_steps,
                           FLAGS.batch_size, resolved())
            with contextlib.closing(self.log):
                self.net.module.train()
                self.batches = data.batches(
                    self.dataset, FLAGS.batch_size, FLAGS.seed, self.device, self.start,
                    FLAGS.grad_accum, num_workers=FLAGS.num_workers, augment=self.augment)
                for self.step in range(self.start + 1, self.total_steps + 1):
                    self._forwards, self._backwards, self._updated = 0, 0, False
                    self._seed_dropout(FLAGS.grad_accum)    # outside `training`
                    yield self.step
                    self._end_step()
        distributed.print0(self.log.summary(self.step, self.logdir))

    def parts(self):
        """Yield the parts of this process's share of a batch, --grad_accum of them.

        A part has x_0 (B, 3, H, W) in [-1, 1], labels y (B,), rows, the slice of the total batch
        that it is, and number, from 0. Scripts may attach what they compute.
        """
        for number in range(FLAGS.grad_accum):
            x_0, y = next(self.batches)
            rows = distributed.rows(FLAGS.batch_size, number, FLAGS.grad_accum)
            yield SimpleNamespace(x_0=x_0, y=y, rows=rows, number=number)

    @contextlib.contextmanager
    def training(self, part):
        """Where the network in training is called on `part`: dropout's random numbers, autocast."""
        self._forwards += 1
        for trainable in filter(None, (self.net, self.head)):
            trainable.average_gradients = part.number + 1 == FLAGS.grad_accum
        self._seed_dropout(part.number)
        with self.autocast():
            yield

    def _seed_dropout(self, number):
        if self.dropout:
            torch.manual_seed(seeding.mix(FLAGS.seed, seeding.DROPOUT, self.step,
                                          distributed.rank(), number))

    def backward(self, **terms):
        """Add the gradient of sum(weight * value) of a part; terms: name=(weight, value)."""
        self._backwards += 1
        loss = sum(weight * value for weight, value in terms.values())
        # A loss can overflow while its gradient is finite, and only gradients are checked: NaN then
        loss_or_nan = loss * (1 + 0 * loss.detach())
        (loss_or_nan / FLAGS.grad_accum).backward()
        self.meter.add(**{name: value for name, (_, value) in terms.items()})
        self.meter.add(loss=loss)

    def update(self, lr, finite=True):
        """Clip, step, average; only if all gradients are finite, and `finite` (a bool tensor)."""
        if self._updated or not self._forwards == self._backwards == FLAGS.grad_accum:
            raise RuntimeError(f'run.update() was called after {self._forwards} calls of '
                               f'run.training() and {self._backwards} of run.backward(), expected '
                               f'{FLAGS.grad_accum} of each, and run.update() once per step')
        norm = clip_gradient(self.net.params, FLAGS.grad_clip)
        finite = norm.isfinite() & finite       # stays on the device: the host does not wait
        if self.head:
            finite &= clip_gradient(self.head.params, 0).isfinite()
            step_optimizer(self.head.optim, finite)
        step_optimizer(self.net.optim, finite, lr)
        if self.ema:
            ema_update(self.ema, self.net.module, self.ema_decay)
        self.meter.add(grad_norm=norm)
        self.meter.count(finite)
        self.lr, self._updated = lr, True

    def _end_step(self):
        """What is due after a step, in order; after a signal, the end of the script."""
        if not self._updated:
            raise RuntimeError(f'step {self.step} ended without run.update()')
        step, last = self.step, self.total_steps
        if due(step, FLAGS.log_step, last) or self.reported:
            means = self.meter.means(step, last)
            self.log.write(step, lr=self.lr, **means, **self.reported)
            self.reported = {}
        self.log.bar.update()
        stopping = stop.asked(step, step == last)
        saved = (due(step, FLAGS.save_step, last) or stopping) and self._save()
        if stopping:
            self.log.close()
            name = signal.Signals(stopping).name
            what = (f'saved in {self.logdir}; run the same command again to go on' if saved else
                    'nothing saved, as no step was applied; the same command starts from step 1')
            distributed.print0(f'{name}: stopped after step {step}, {what}.')
            distributed.cleanup()
            leave(128 + stopping)

    def autocast(self):
        """The precision of --amp, for networks that are not trained."""
        return autocast(self.amp, self.device)

    def prepare(self, teacher, *others):
        """Make networks that are not trained fast, by --amp and --compile."""
        prepare(self.amp, FLAGS.compile, self.device, teacher, graphs=True)     # has no gradients
        prepare(self.amp, FLAGS.compile, self.device, *others)

    def generator(self, *key):
        """Random numbers as a function of (seed, *key)."""
        return seeding.generator(self.device, FLAGS.seed, *key)
