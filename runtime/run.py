"""A training run: everything around the mathematics of a step.

    run = Run(FLAGS, 'pd', student, diffusion, dataset)
    for step in run:                                # the steps that are not done yet
        for part in run.parts():                    # x_0, y, t, eps of this process
            x_0, y, t, eps = part
            with run.forward(part):
                x_pred, eps_pred = diffusion.predict(run.net, z_t, t, y)
            run.backward(loss=(1., loss))           # name=(weight, value), ...
        run.update(lr)
The script owns the loop and the losses. The run owns the weights, their average, the optimisers,
checkpoint, log, sample grids and signals. What it does after a step stands in `_end_step`.
"""

import contextlib
import copy
from typing import NamedTuple

import torch

from model import draw_dropout_noise
from runtime import checkpoint, data, distributed, flags, seeding
from runtime.guard import Folder, leave_after, stop
from runtime.log import Log, Meter
from runtime.optim import (adam, clip_gradient, ema_update, frozen, nan_gradient_if_not_finite,
                           step_optimizer)
from runtime.precision import autocast, choose, compile_networks, prepare


class Settings(NamedTuple):
    """The flags that change what a run does; `define_training_flags` explains them."""
    batch_size: int
    grad_accum: int
    num_workers: int
    img_size: int
    dropout: float
    lr: float
    wd: float
    grad_clip: float
    ema_decay: float
    total_steps: int
    log_step: int
    sample_step: int
    sample_size: int
    save_step: int
    keep: int
    max_bad_steps: int
    seed: int
    amp: str
    compile: bool


def training_data(FLAGS, network):
    """The training images of --dataset, checked against the batch size and the network."""
    distributed.check_batch(FLAGS.batch_size, FLAGS.grad_accum)
    dataset = data.make_dataset(FLAGS.dataset, FLAGS.data_root, FLAGS.img_size, train=True,
                                num_workers=FLAGS.num_workers,
                                skip_bad_images=FLAGS.skip_bad_images)
    flags.check_size(dataset)
    flags.check_labels(dataset, network.conditional, network.class_num)
    return dataset


def due(step, every, last=None):
    """Whether what is done every `every` steps is due (0: never), or `step` is the `last`."""
    return step == last or (every > 0 and step % every == 0)


def draw(batch_size, shape, low, high, generator):
    """t (B,) uniform in low..high (inclusive) and eps (B, *shape) standard normal.

    Drawn for the total batch, so that a sample's draw does not depend on the number of processes.
    """
    device = generator.device
    t = torch.randint(low, high + 1, (batch_size,), generator=generator, device=device)
    return t, torch.randn((batch_size, *shape), generator=generator, device=device)


class Trained:
    """A module in training: called through DDP, with an Adam of its own.

    Attributes:
        sync: whether the next backward averages the gradients over the processes.
        context: further arguments of every call, by name.
    """

    def __init__(self, module, lr, wd):
        self.module, self.ddp = module, distributed.wrap_ddp(module)
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.optim = adam(self.params, lr, wd)
        self.sync, self.context = True, {}

    def __call__(self, *inputs):
        with distributed.no_sync(self.ddp, not self.sync):
            return self.ddp(*inputs, **self.context)


class Part:
    """The images a process works on at a time; unpacks into x_0, y, t, eps.

    Attributes:
        x_0 (B, 3, H, W) in [-1, 1], y (B,) labels, t (B,) times on the base grid, eps like x_0.
        rows: slice of the total batch. last: whether gradients are averaged after this part.
    Scripts may attach what they compute.
    """

    def __init__(self, x_0, y, t, eps, rows, last):
        self.x_0, self.y, self.t, self.eps, self.rows, self.last = x_0, y, t, eps, rows, last

    def __iter__(self):
        return iter((self.x_0, self.y, self.t, self.eps))


class Run:
    """One folder, and one network that is trained until --total_steps.

    Args:
        FLAGS: parsed flags, of which a run reads those in `Settings`. method: 'base', 'pd', 'rdd'.
        net: the network to train, on its device. diffusion: its schedule. dataset: its images.
        logdir: the folder. base_ckpt: that of the teacher, which must be another one.
        total_steps: if not --total_steps.
        use: weights that sample grids and users take, 'net_model' or 'ema_model'.
        memory: a second module to train, at a constant rate and without clipping (as released).
        facts: what to print when the run starts.
    Raises:
        UserError: the folder holds another run.
    """

    def __init__(self, FLAGS, method, net, diffusion, dataset, logdir, base_ckpt=None,
                 use='net_model', memory=None, total_steps=None, **facts):
        values = {name: getattr(FLAGS, name) for name in Settings._fields}
        values['total_steps'] = total_steps or FLAGS.total_steps
        self.settings = s = Settings(**values)
        self.method, self.diffusion, self.dataset = method, diffusion, dataset
        self.logdir, self.use, self.facts = logdir, use, dict(images=len(dataset), **facts)
        self.name = f'{method} T={diffusion.T}'
        if base_ckpt:
            self.name = f'{method.upper()} {2 * diffusion.T}->{diffusion.T}'
            self.facts.update(teacher_steps=2 * diffusion.T, student_steps=diffusion.T)
        self.device = diffusion.alpha.device
        self.amp = choose(s.amp, self.device, diffusion.T if base_ckpt else 0)
        if self.amp == 'none' and choose(s.amp, self.device) == 'bf16':
            distributed.print0(f'note: --amp auto means float32 here: a student with {diffusion.T} '
                               f'steps needs its precision.')
        averaged = use == 'ema_model' or s.ema_decay
        self.ema = frozen(copy.deepcopy(net)) if averaged else None
        self.net = Trained(net, s.lr, s.wd)
        self.memory = Trained(memory, s.lr, s.wd) if memory else None
        compile_networks(s.compile, self.device, self.net.ddp,
                         *([self.ema] if use == 'ema_model' else []))
        self.x_T = seeding.noise_of_images(s.seed, range(s.sample_size),
                                           (3, s.img_size, s.img_size), self.device)
        labels = torch.arange(s.sample_size, device=self.device) % net.class_num
        self.y_T = labels if net.conditional else None
        self._resume(base_ckpt)
        self.step, self._parts_done, self._open = self.start, None, None

    # Checkpoint

    def saved(self):
        """{key of the checkpoint: object with a state dict}, for saving and for resuming."""
        found = dict(net_model=self.net.module, ema_model=self.ema, optim=self.net.optim)
        if self.memory:
            found.update(memory=self.memory.module, optim_head=self.memory.optim)
        return found

    def _resume(self, base_ckpt):
        s, d = self.settings, self.diffusion
        same = dict(dataset=self.dataset.name, img_size=s.img_size, mean_type=d.mean_type,
                    batch_size=s.batch_size, seed=s.seed)
        state = checkpoint.resume(self.logdir, self.net.module, self.method, d.T, d.time_scale,
                                  base_ckpt, same)
        flags.compare_with(state.get('flags', '') if state else '', self.logdir)
        self.start = state['step'] if state else 0
        if state:
            checkpoint.restore(state, **self.saved())
        self.meter = Meter(state and state.get('meter'))

    def _save(self):
        states = {key: v.state_dict() for key, v in self.saved().items() if v is not None}
        checkpoint.check_finite(states, self.step, f'the checkpoint in {self.logdir}',
                                'lower --lr, and run again to go on from there')
        if self.use != 'net_model':
            states['use'] = self.use
        checkpoint.save_run(
            self.logdir, self.settings.keep, **states, **self.net.module.stored,
            **self.diffusion.arguments(), x_T=self.x_T.cpu(), method=self.method, step=self.step,
            meter=self.meter.state_dict(), **flags.facts())

    # The loop

    def __iter__(self):
        """Yield the steps that are not done; after each, do what is due.

        Log and folder are closed however the loop ends, also by an exception or a `break`.
        """
        s = self.settings
        if self.start >= s.total_steps:
            return distributed.print0(f'{self.logdir} is finished: step {self.start}.')
        folder, stopped = Folder(self.logdir, flags.resolved()), 0
        with contextlib.closing(folder), stop:
            flags.announce(self.device, self.start, **self.facts)
            self.log = Log(self.logdir, self.name, self.start, s.total_steps, s.batch_size,
                           flags.resolved())
            with contextlib.closing(self.log):
                self.net.module.train()
                self.batches = data.batches(self.dataset, s.batch_size, s.seed, self.device,
                                            self.start, s.grad_accum, num_workers=s.num_workers)
                for self.step in range(self.start + 1, s.total_steps + 1):
                    self._parts_done, self._open = 0, None
                    yield self.step
                    stopped = self._end_step()
                    if stopped:
                        break
            if stopped:
                leave_after(stopped, self.logdir, self.step)
        distributed.print0(self.log.summary(self.step, self.logdir))

    def parts(self, t_min=1):
        """Yield the parts of this step for this process, with times t_min..T of the model.

        A row of the total batch is a function of (seed, step, row) alone.
        """
        s, d = self.settings, self.diffusion
        rng = self.generator(seeding.NOISE, d.T, self.step)
        t_all, eps_all = draw(s.batch_size, self.x_T.shape[1:], t_min, d.T, rng)
        for micro in range(s.grad_accum):
            rows = distributed.rows(s.batch_size, micro, s.grad_accum)
            x_0, y = next(self.batches)
            yield Part(x_0, y, d.visited[t_all[rows]], eps_all[rows], rows,
                       micro + 1 == s.grad_accum)

    @contextlib.contextmanager
    def forward(self, part):
        """Where the network in training is called on `part`: dropout noise, autocast.

        Gradients are averaged over the processes in the backward of the last part only.
        """
        if self._open is not None:
            raise RuntimeError('run.forward() was called twice in a row; call run.backward() '
                               'after each part')
        s, net = self.settings, self.net.module
        self._open = part
        for trained in filter(None, (self.net, self.memory)):
            trained.sync = part.last
        if s.dropout:
            rng = self.generator(seeding.DROPOUT, self.diffusion.T, self.step)
            self.net.context = dict(noise=draw_dropout_noise(net, s.img_size, s.batch_size,
                                                             part.rows, rng))
        with self.autocast():
            yield

    def backward(self, **terms):
        """Add the gradient of sum(weight * value) of a part; terms: name=(weight, value)."""
        if self._open is None:
            raise RuntimeError('run.backward() was called without run.forward(); call the network '
                               'inside "with run.forward(part):" first')
        loss = sum(weight * value for weight, value in terms.values())
        (nan_gradient_if_not_finite(loss) / self.settings.grad_accum).backward()
        self.meter.add(**dict({name: value for name, (_, value) in terms.items()}, loss=loss))
        self._open, self._parts_done = None, self._parts_done + 1

    def update(self, lr):
        """Clip, step, average. If any gradient is not finite, no optimiser moves."""
        s = self.settings
        if self._parts_done != s.grad_accum:
            raise RuntimeError(f'run.update() was called after {self._parts_done or 0} of '
                               f'{s.grad_accum} parts; call run.forward() and run.backward() for '
                               f'every part of run.parts() first, and run.update() once')
        norm = clip_gradient(self.net.params, s.grad_clip)
        finite = norm.isfinite()        # stays on the device: the host does not wait
        if self.memory:
            finite &= clip_gradient(self.memory.params, 0).isfinite()
            step_optimizer(self.memory.optim, finite)
        step_optimizer(self.net.optim, finite, lr)
        if self.ema:
            ema_update(self.ema, self.net.module, s.ema_decay)
        self.meter.add(grad_norm=norm)
        self.meter.end_step(finite)
        self.lr, self._parts_done = lr, None

    def _end_step(self):
        """What is due after a step, in order; returns the signal that ends the run, or 0."""
        if self._parts_done is not None:
            raise RuntimeError(f'step {self.step} ended without run.update()')
        s, step, last = self.settings, self.step, self.settings.total_steps
        if due(step, s.log_step, last):
            self.meter.check(step, s.max_bad_steps)
            self.log.write(step, lr=self.lr, **self.meter.mean())
        self.log.bar.update()
        stopping = stop.asked(step, step == last)
        if due(step, s.sample_step) and not stopping:
            self._sample_grid()
        if due(step, s.save_step, last) or stopping:
            self._save()
        return stopping

    @torch.no_grad()
    def _sample_grid(self):
        """Draw a grid from fixed noise and labels on the first process."""
        if not distributed.is_main():
            return
        network = self.ema if self.use == 'ema_model' else self.net.module
        training = network.training
        network.eval()
        with self.autocast():
            images = self.diffusion.sample(network, self.x_T, y=self.y_T)
        network.train(training)
        self.log.grid(self.step, f'{self.logdir}/sample/{self.step}.png', images)

    # For the script

    def autocast(self):
        """The precision of --amp, for networks that are not trained."""
        return autocast(self.amp, self.device)

    def prepare(self, teacher, *others):
        """Make networks that are not trained fast: weights as --amp has them, and --compile.

        On a GPU, --compile makes one CUDA graph of the teacher, which is called without gradients.
        """
        prepare(self.amp, self.settings.compile, self.device, teacher, graphs=True)
        prepare(self.amp, self.settings.compile, self.device, *others)

    def generator(self, *key):
        """Random numbers as a function of (seed, *key)."""
        return seeding.generator(self.device, self.settings.seed, *key)
