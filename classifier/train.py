"""Train a classifier for small images.

Inside classifier/ or from the repository root, in one process, on a GPU or the CPU:
  python train.py --model densenet201
  python classifier/train.py --model densenet_small --dataset digits --epoch 30
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

from classifier.networks import NETWORKS, build_classifier      # noqa: E402
from runtime import checkpoint, cli, data, distributed, seeding     # noqa: E402
from runtime.cli import UserError       # noqa: E402
from runtime.flags import announce, define_device_flags, resolved       # noqa: E402
from runtime.guard import Folder, leave_after, stop     # noqa: E402
from runtime.log import Meter, progress, summary    # noqa: E402
from runtime.optim import learning_rate     # noqa: E402
from runtime.precision import autocast      # noqa: E402

FLAGS = flags.FLAGS
SAME = ('dataset', 'epoch', 'batchsize', 'init_lr', 'wd', 'normalize05', 'img_size', 'amp')


def define_flags():
    define_device_flags()
    flags.DEFINE_enum('model', 'resnet18', list(NETWORKS), 'network to train')
    flags.DEFINE_enum('dataset', 'cifar10', data.DATASETS, 'images to learn')
    flags.DEFINE_string('data_root', './data', 'folder of the data set')
    flags.DEFINE_integer('img_size', None, 'height and width of the images; none: 8 for digits, '
                         '64 for imagenet64, 32 for others', lower_bound=8)
    flags.DEFINE_integer('num_workers', 4, 'processes that decode image files', lower_bound=0)
    flags.DEFINE_bool('skip_bad_images', False, 'read every image file once at the start, name '
                      'those that cannot be read and leave them out')
    flags.DEFINE_integer('epoch', 300, 'passes over the training images', lower_bound=1)
    flags.DEFINE_integer('batchsize', 128, 'images per step', lower_bound=2)
    flags.DEFINE_float('init_lr', 0.1, 'learning rate of the first step; a cosine takes it to 0',
                       lower_bound=0.)
    flags.DEFINE_float('wd', 5e-4, 'weight decay', lower_bound=0.)
    flags.DEFINE_bool('normalize05', False, 'feed images in [-1, 1] as they are, rather than with '
                      'the mean and std of the data set; either way the checkpoint carries it')
    flags.DEFINE_integer('seed', -1, 'seed of everything random; -1: pick one and say which',
                         lower_bound=-1)
    flags.DEFINE_string('result_path', './classifier/result', 'folder under which '
                        '<dataset>/<model>/ckpt.pt is written; relative to the repository root')
    flags.DEFINE_integer('max_steps', 0, 'stop after this many steps, to be continued; 0: when all '
                         'epochs are done', lower_bound=0)
    flags.DEFINE_integer('log_step', 20, 'steps between updates of the progress bar', lower_bound=1)


def main():
    device = distributed.init(FLAGS.gpu_id)
    if distributed.world_size() > 1:
        raise UserError(f'a classifier is trained in one process, found '
                        f'{distributed.world_size()}; start this script with plain python')
    FLAGS.img_size = FLAGS.img_size or data.IMG_SIZE.get(FLAGS.dataset, 32)
    folder = cli.anchored(FLAGS.result_path) / FLAGS.dataset / FLAGS.model
    state = resume(folder / 'ckpt.pt')
    if state and state['step'] >= last_step(state['total_steps']):
        print(f'{folder} is finished: step {state["step"]} of {state["total_steps"]}, '
              f'{percent(state["accuracy"])}.')
    else:
        train(device, folder, state)


def train(device, folder, state):
    # Data
    train_set = data.make_dataset(FLAGS.dataset, cli.find(FLAGS.data_root), FLAGS.img_size,
                                  train=True, num_workers=FLAGS.num_workers,
                                  skip_bad_images=FLAGS.skip_bad_images)
    test_set = make_test_set()
    steps_per_epoch = max(1, round(len(train_set) / FLAGS.batchsize))
    total_steps = FLAGS.epoch * steps_per_epoch

    # Network: the random stream of its weights is its own
    FLAGS.seed = state['seed'] if state else picked_seed()      # so that flagfile.txt has it
    mean, std = (state['mean'], state['std']) if state else normalisation(train_set)
    torch.manual_seed(seeding.mix(FLAGS.seed, seeding.WEIGHTS))
    model = build_classifier(FLAGS.model, train_set.num_classes, mean, std)
    model = model.to(device, memory_format=torch.channels_last)
    optim = torch.optim.SGD(model.parameters(), lr=FLAGS.init_lr, momentum=0.9,
                            weight_decay=FLAGS.wd, nesterov=True)

    # Resume
    start = 0
    if state:
        start = state['step']
        model.load_state_dict(state['model'])
        optim.load_state_dict(state['optim'])
    def save(step, accuracy):
        checkpoint.save(folder / 'ckpt.pt', dict(
            model=model.state_dict(), optim=optim.state_dict(), step=step, name=FLAGS.model,
            total_steps=total_steps, num_classes=train_set.num_classes, mean=mean, std=std,
            accuracy=accuracy, seed=FLAGS.seed, config={name: FLAGS[name].value for name in SAME},
            dataset=FLAGS.dataset, img_size=FLAGS.img_size, epoch=step // steps_per_epoch))

    # Loop
    batches = data.batches(train_set, FLAGS.batchsize, FLAGS.seed, device, start,
                           num_workers=FLAGS.num_workers)
    last, meter, began = last_step(total_steps), Meter(), time.perf_counter()
    accuracy, stopped, since = state['accuracy'] if state else None, 0, (began, start)
    with contextlib.closing(Folder(folder, resolved(), '--result_path folder')), stop, \
            progress(last, FLAGS.model, start) as bar:
        announce(device, start, images=len(train_set), classes=train_set.num_classes,
                 parameters=sum(p.numel() for p in model.parameters()), steps=total_steps)
        print(f'seed {FLAGS.seed}; input mean {mean}, std {std}', flush=True)
        for step in range(start + 1, last + 1):
            model.train()
            x_0, y = next(batches)
            rng = seeding.generator('cpu', FLAGS.seed, seeding.CROP, step)
            x_0 = random_crop(x_0, FLAGS.img_size // 8, rng)
            with autocast(FLAGS.amp, device):
                logits, _, _ = model(x_0)
            loss = F.cross_entropy(logits.float(), y)
            loss.backward()
            for group in optim.param_groups:
                group['lr'] = learning_rate(step, FLAGS.init_lr, 0, total_steps, decay=True)
            optim.step()
            optim.zero_grad(set_to_none=True)
            meter.add(loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
            meter.end_step(loss.detach().isfinite())
            bar.update()

            ends, stopped = step % steps_per_epoch == 0 or step == last, stop.asked()
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
    steps = last - start
    print(summary(steps, time.perf_counter() - began, steps * FLAGS.batchsize, folder), flush=True)


def resume(path):
    """The state of an interrupted run, or None; refuses to continue a run of other flags."""
    if not path.exists():
        return None
    state = checkpoint.read(path)
    if 'optim' not in state or 'config' not in state:
        raise UserError(f'{path} has no optimiser, so it cannot be continued and would be '
                        f'overwritten; choose another --result_path')
    now = {name: FLAGS[name].value for name in SAME}
    if FLAGS.seed >= 0:
        now['seed'] = FLAGS.seed
    for name, value in now.items():
        before = state['seed'] if name == 'seed' else state['config'].get(name, value)
        if before != value:
            raise UserError(f'{path} was trained with --{name} {before}, now it is {value}; give '
                            f'the same flags to resume or another --result_path')
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
        print(f'note: there will be no test accuracy: {error}.')


def picked_seed():
    return FLAGS.seed if FLAGS.seed >= 0 else torch.seed() % 2 ** 31


def normalisation(dataset):
    """(mean, std) of the input, three numbers each: 0.5 or measured, to four digits."""
    return ([0.5] * 3, [0.5] * 3) if FLAGS.normalize05 else measured(
        dataset, FLAGS.num_workers)


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


def random_crop(x_0, pad, generator):
    """Shift every image of x_0 (B, 3, H, W) in [-1, 1] by up to `pad` pixels each way.

    What comes in from outside is black (-1).
    """
    B, _, H, W = x_0.shape
    padded = F.pad(x_0, (pad,) * 4, value=-1.).permute(0, 2, 3, 1)      # (B, H + 2p, W + 2p, 3)
    corner = torch.randint(0, 2 * pad + 1, (2, B, 1), generator=generator)
    rows = data.sent(corner[0] + torch.arange(H), x_0.device)       # (B, H)
    columns = data.sent(corner[1] + torch.arange(W), x_0.device)    # (B, W)
    image = torch.arange(B, device=x_0.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def evaluate(model, dataset, device):
    """Share of test images classified rightly, 0..1; None without a test split."""
    if dataset is None:
        return None
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    for images, y, _ in data.in_order(dataset, 256, device, num_workers=FLAGS.num_workers):
        right += (model(images.float() / 127.5 - 1)[0].argmax(1) == y).sum()
    return right.item() / len(dataset)


def describe(means, rate, step):
    """Words for the progress bar; stops a run that has diverged."""
    if means['bad_steps']:
        raise UserError(f'the loss is not finite at step {step} or shortly before; lower --init_lr '
                        f'(it is {FLAGS.init_lr})', code=1)
    return f'loss {means["loss"]:.4g}, train {100 * means["accuracy"]:.1f} %, {rate:.0f} img/s'


def report(bar, line):
    """A line that stays: above the progress bar on a terminal, else plain on standard output."""
    if sys.stderr.isatty():
        bar.write(line)
    else:
        print(line, flush=True)


def percent(accuracy):
    return 'no test split' if accuracy is None else f'test {100 * accuracy:.2f} %'


if __name__ == '__main__':
    define_flags()
    cli.run(main)
