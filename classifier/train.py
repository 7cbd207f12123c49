"""Train a classifier for small images.

Inside classifier/ or from the repository root, on a GPU or the CPU, in one process or several:
  python train.py --model densenet201
  python classifier/train.py --model densenet_small --dataset digits --epoch 30
  torchrun --nproc_per_node=4 classifier/train.py --model densenet201 --dataset imagenet64
--recipe released: AutoAugment, cutout and a rate divided by 10 twice, the default for cifar10 and
imagenet64. --recipe plain: crop, mirroring, Nesterov's momentum and a cosine, for other images.
The same command run again resumes. Result: <result_path>/<dataset>/<model>/ckpt.pt of the last
epoch; the test accuracy is reported but never used to choose one. The last line of the output says
how many steps were done, in what time, and where.
"""

import contextlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import torch    # noqa: E402
import torch.nn.functional as F     # noqa: E402
from absl import flags      # noqa: E402

from classifier.augment import Augment      # noqa: E402
from classifier.networks import NETWORKS, build_classifier      # noqa: E402
from runtime import checkpoint, cli, data, distributed, seeding     # noqa: E402
from runtime.cli import UserError       # noqa: E402
from runtime.flags import announce, define_device_flags, resolved       # noqa: E402
from runtime.guard import Folder, leave_after, stop     # noqa: E402
from runtime.log import Meter, progress, summary    # noqa: E402
from runtime.optim import learning_rate     # noqa: E402
from runtime.precision import autocast      # noqa: E402

FLAGS = flags.FLAGS
SAME = ('dataset', 'epoch', 'batchsize', 'init_lr', 'wd', 'normalize05', 'img_size', 'amp',
        'recipe')       # what must not change when a run is resumed
# of the released code; this std is the mean of the standard deviations of single images
CIFAR10 = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]


def define_flags():
    define_device_flags()
    flags.DEFINE_enum('model', 'resnet18', list(NETWORKS), 'network to train')
    flags.DEFINE_enum('dataset', 'cifar10', data.DATASETS, 'images to learn')
    flags.DEFINE_string('data_root', './data', 'folder of the data set')
    flags.DEFINE_integer('img_size', None, 'height and width of the images; none: 8 for digits, '
                         '28 for fashion_mnist, 64 for imagenet64, 32 for others',
                         lower_bound=8, upper_bound=4096)
    flags.DEFINE_integer('num_workers', 4, 'processes that decode image files, or augment',
                         lower_bound=0)
    flags.DEFINE_bool('skip_bad_images', False, 'read every image file once at the start, name '
                      'those that cannot be read and leave them out')
    flags.DEFINE_integer('epoch', 300, 'passes over the training images', lower_bound=1)
    flags.DEFINE_enum('recipe', None, ['released', 'plain'], 'how to augment and to lower the '
                      'rate, see above; none: released for cifar10 and imagenet64, else plain')
    flags.DEFINE_integer('batchsize', 128, 'images per step, over all processes', lower_bound=2)
    flags.DEFINE_float('init_lr', 0.1, 'learning rate of the first step', lower_bound=0.)
    flags.DEFINE_float('wd', 5e-4, 'weight decay', lower_bound=0.)
    flags.DEFINE_bool('normalize05', False, 'feed images in [-1, 1] as they are, rather than with '
                      'the mean and std of the data set, into <model>_normalize05; either way the '
                      'checkpoint says so')
    flags.DEFINE_integer('seed', -1, 'seed of everything random; -1: pick one and say which',
                         lower_bound=-1)
    flags.DEFINE_string('result_path', './classifier/result', 'folder under which '
                        '<dataset>/<model>/ckpt.pt is written; relative to the repository root')
    flags.DEFINE_integer('max_steps', 0, 'stop after this many steps, to be continued; 0: when all '
                         'epochs are done', lower_bound=0)
    flags.DEFINE_integer('log_step', 20, 'steps between updates of the progress bar', lower_bound=1)


def main():
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    distributed.check_batch(FLAGS.batchsize, flag='--batchsize')
    FLAGS.img_size = FLAGS.img_size or data.IMG_SIZE.get(FLAGS.dataset, 32)
    FLAGS.recipe = FLAGS.recipe or (
        'released' if FLAGS.dataset in ('cifar10', 'imagenet64') else 'plain')
    folder = cli.anchored(FLAGS.result_path) / FLAGS.dataset / (
        FLAGS.model + ('_normalize05' if FLAGS.normalize05 else ''))
    state = resume(folder / 'ckpt.pt')
    if state and state['step'] >= last_step(state['total_steps']):
        distributed.print0(f'{folder} is finished: step {state["step"]} of '
                           f'{state["total_steps"]}, {percent(state["accuracy"])}.')
    else:
        train(device, folder, state)
    distributed.cleanup()


def train(device, folder, state):
    # Data
    train_set = data.make_dataset(FLAGS.dataset, cli.find(FLAGS.data_root), FLAGS.img_size,
                                  train=True, num_workers=FLAGS.num_workers,
                                  skip_bad_images=FLAGS.skip_bad_images)
    if len(train_set) < FLAGS.batchsize:
        raise UserError(f'--batchsize {FLAGS.batchsize} is more than the {len(train_set)} training '
                        f'images of --dataset {FLAGS.dataset}; lower it')
    test_set = make_test_set()
    steps_per_epoch = max(1, round(len(train_set) / FLAGS.batchsize))
    total_steps = FLAGS.epoch * steps_per_epoch

    # Network: the random stream of its weights is its own
    FLAGS.seed = state['seed'] if state else picked_seed()      # so that flagfile.txt has it
    mean, std = (state['mean'], state['std']) if state else normalisation(train_set)
    torch.manual_seed(seeding.mix(FLAGS.seed, seeding.WEIGHTS))
    model = build_classifier(FLAGS.model, train_set.num_classes, mean, std)
    model = model.to(device, memory_format=torch.channels_last)
    model = distributed.sync_batch_norm(model)
    model_ddp = distributed.wrap_ddp(model)
    optim = torch.optim.SGD(model.parameters(), lr=FLAGS.init_lr, momentum=0.9,
                            weight_decay=FLAGS.wd, nesterov=FLAGS.recipe == 'plain')

    # Resume
    start = 0
    if state:
        start = state['step']
        model.load_state_dict(state['model'])
        optim.load_state_dict(state['optim'])

    def save(step, accuracy):
        state = dict(
            model=model.state_dict(), optim=optim.state_dict(), step=step, name=FLAGS.model,
            total_steps=total_steps, num_classes=train_set.num_classes, mean=mean, std=std,
            accuracy=accuracy, seed=FLAGS.seed, config={name: FLAGS[name].value for name in SAME},
            dataset=FLAGS.dataset, img_size=FLAGS.img_size, epoch=step // steps_per_epoch)
        checkpoint.check_finite(state, step, folder / 'ckpt.pt', f'lower --init_lr (it is '
                                f'{FLAGS.init_lr}), and choose another --result_path')
        if distributed.is_main():
            checkpoint.save(folder / 'ckpt.pt', state)

    # Loop
    released = FLAGS.recipe == 'released'
    augment = Augment(FLAGS.img_size, FLAGS.seed, train_set.flip) if released else None
    batches = data.batches(train_set, FLAGS.batchsize, FLAGS.seed, device, start,
                           num_workers=FLAGS.num_workers, augment=augment)
    last, meter, began = last_step(total_steps), Meter(), time.perf_counter()
    accuracy, stopped, since = state['accuracy'] if state else None, 0, (began, start)
    with contextlib.closing(Folder(folder, resolved(), '--result_path folder')), stop, \
            progress(last, FLAGS.model, start) as bar:
        announce(device, start, images=len(train_set), classes=train_set.num_classes,
                 parameters=sum(p.numel() for p in model.parameters()), steps=total_steps)
        distributed.print0(f'seed {FLAGS.seed}; input mean {mean}, std {std}')
        for step in range(start + 1, last + 1):
            model.train()
            x_0, y = next(batches)
            if not released:
                rng = seeding.generator('cpu', FLAGS.seed, seeding.CROP, step)
                x_0 = random_crop(x_0, FLAGS.img_size // 8, FLAGS.batchsize, rng)
            with autocast(FLAGS.amp, device):
                logits, _, _ = model_ddp(x_0)
            loss = F.cross_entropy(logits.float(), y)
            loss.backward()
            for group in optim.param_groups:
                group['lr'] = rate_of(step, steps_per_epoch, total_steps)
            optim.step()
            optim.zero_grad(set_to_none=True)
            meter.add(loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
            # whether it is finite on all processes, which then decide alike
            finite = distributed.all_reduce_sum((~loss.detach().isfinite()).float()) == 0
            meter.end_step(finite)
            bar.update()

            ends = step % steps_per_epoch == 0 or step == last
            stopped = stop.asked(step, step == last)
            if step % FLAGS.log_step == 0 or ends or stopped:
                now = time.perf_counter()
                rate, since = (step - since[1]) * FLAGS.batchsize / (now - since[0]), (now, step)
                words = describe(meter.mean(), rate, step)
                bar.set_postfix_str(words, refresh=False)
            if ends:
                accuracy = evaluate(model, test_set, device)
                save(step, accuracy)
                report(bar, f'epoch {step / steps_per_epoch:.4g}/{FLAGS.epoch}: {words}, '
                            f'{percent(accuracy)}')
                since = (time.perf_counter(), step)
            elif stopped:
                save(step, accuracy)
            if stopped:
                break
        if stopped:
            leave_after(stopped, folder, step)
    steps, seconds = last - start, time.perf_counter() - began
    distributed.print0(summary(steps, seconds, steps * FLAGS.batchsize, folder))


def rate_of(step, steps_per_epoch, total_steps):
    """Learning rate of step 1, 2, ..

    Released: divided by 10 after half and after three quarters of the epochs. Plain: a cosine to 0.
    """
    if FLAGS.recipe == 'plain':
        return learning_rate(step, FLAGS.init_lr, 0, total_steps, decay=True)
    epoch, rate = (step - 1) // steps_per_epoch, FLAGS.init_lr
    for first in (FLAGS.epoch // 2, FLAGS.epoch * 3 // 4):
        rate /= 10 if epoch >= first else 1
    return rate


def resume(path):
    """The state of an interrupted run, or None; refuses to continue a run of other flags."""
    if not path.exists():
        return None
    state = checkpoint.read(path)
    if 'optim' not in state or 'config' not in state:
        raise UserError(f'{path} has no optimiser, so it cannot be continued and would be '
                        f'overwritten; choose another --result_path')
    before = dict(dict(recipe='plain'), **state['config'])      # older files do not say it
    now = {name: FLAGS[name].value for name in SAME}
    if FLAGS.seed >= 0:
        now['seed'] = FLAGS.seed
    for name, value in now.items():
        old = state['seed'] if name == 'seed' else before.get(name, value)
        if old != value:
            raise UserError(f'{path} was trained with --{name} {old}, now it is {value}; give the '
                            f'same flags to resume or another --result_path')
    return state


def last_step(total_steps):
    return min(total_steps, FLAGS.max_steps or total_steps)


def make_test_set():
    """The test split, or None with the reason printed."""
    try:
        return data.make_dataset(FLAGS.dataset, cli.find(FLAGS.data_root), FLAGS.img_size,
                                 train=False, num_workers=FLAGS.num_workers,
                                 skip_bad_images=FLAGS.skip_bad_images)
    except UserError as error:
        distributed.print0(f'note: there will be no test accuracy: {error}.')


def picked_seed():
    """--seed, or a random one, the same for all processes."""
    return FLAGS.seed if FLAGS.seed >= 0 else distributed.broadcast_object(torch.seed() % 2 ** 31)


def normalisation(dataset):
    """(mean, std) of the input, three numbers each: 0.5, as released, or measured."""
    if FLAGS.normalize05:
        return [0.5] * 3, [0.5] * 3
    if FLAGS.recipe == 'released' and FLAGS.dataset == 'cifar10':
        return CIFAR10
    found = measured(dataset, FLAGS.num_workers) if distributed.is_main() else None
    return distributed.broadcast_object(found)


def measured(dataset, num_workers=0, most=50000):
    """Mean and std per channel of (at most `most`, evenly spaced) images in [0, 1]."""
    chosen = torch.linspace(0, len(dataset) - 1, min(len(dataset), most)).round().long()
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for images, _, _ in data.in_order(dataset, 512, 'cpu', chosen, num_workers):
        pixels = images.double() / 255
        sums += torch.stack([pixels.mean((2, 3)).sum(0), pixels.square().mean((2, 3)).sum(0)])
    mean, square = sums / len(chosen)
    std = (square - mean.square()).clamp(min=1e-4).sqrt()
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in std.tolist()]


def random_crop(x_0, pad, total, generator):
    """Shift every image of x_0 (B, 3, H, W) in [-1, 1] by up to `pad` pixels each way.

    x_0 is this process's share of a batch of `total`. What comes in from outside is black (-1).
    """
    B, _, H, W = x_0.shape
    padded = F.pad(x_0, (pad,) * 4, value=-1.).permute(0, 2, 3, 1)      # (B, H + 2p, W + 2p, 3)
    corner = torch.randint(0, 2 * pad + 1, (2, total, 1), generator=generator)
    corner = corner[:, distributed.rows(total)]
    rows = seeding.sent(corner[0] + torch.arange(H), x_0.device)       # (B, H)
    columns = seeding.sent(corner[1] + torch.arange(W), x_0.device)    # (B, W)
    image = torch.arange(B, device=x_0.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def evaluate(model, dataset, device):
    """Share of test images that are classified correctly, 0..1; None without a test split."""
    if dataset is None:
        return None
    model.eval()
    right = torch.zeros((), dtype=torch.float64, device=device)
    mine = torch.arange(len(dataset)).tensor_split(distributed.world_size())[distributed.rank()]
    for images, y, _ in data.in_order(dataset, 256, device, mine, FLAGS.num_workers):
        right += (model(images.float() / 127.5 - 1)[0].argmax(1) == y).sum()
    return distributed.all_reduce_sum(right).item() / len(dataset)


def describe(means, rate, step):
    """Words for the progress bar; stops a run that has diverged."""
    if means['bad_steps']:
        raise UserError(f'the loss is not finite at step {step} or shortly before; lower --init_lr '
                        f'(it is {FLAGS.init_lr})', code=1)
    return f'loss {means["loss"]:.4g}, train {100 * means["accuracy"]:.1f} %, {rate:.0f} img/s'


def report(bar, line):
    """A line that stays: above the progress bar on a terminal, else plain on standard output."""
    if not distributed.is_main():
        return
    if sys.stderr.isatty():
        bar.write(line)
    else:
        print(line, flush=True)


def percent(accuracy):
    return 'no test split' if accuracy is None else f'test {100 * accuracy:.2f} %'


if __name__ == '__main__':
    define_flags()
    cli.run(main)
