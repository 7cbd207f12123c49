"""Train a classifier for small images.

Inside classifier/ or from the repository root, on a GPU or the CPU, in one process or several:
  python train.py --model densenet201
  python classifier/train.py --model densenet_small --dataset digits --epoch 30
  torchrun --nproc_per_node=4 classifier/train.py --model densenet201 --dataset imagenet64
--recipe released: AutoAugment, cutout and a rate divided by 10 twice, the default for cifar10 and
imagenet64. --recipe plain: crop, mirroring, Nesterov's momentum and a cosine, for other images.
The same command run again resumes. Result: <result_path>/<dataset>/<model>/ckpt.pt of the last
epoch, with metrics.jsonl beside it; the test accuracy is reported and never used to choose one.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import torch
import torch.nn.functional as F
from absl import flags

from classifier.augment import Augment, measured_normalisation, random_crop
from classifier.frozen import NORMALISATIONS
from classifier.networks import NETWORKS, build_classifier
from runtime import checkpoint, cli, data, distributed, seeding
from runtime.cli import UserError
from runtime.flags import (FIXED, define_data_flags, define_device_flags, define_image_size,
                           define_run_flags)
from runtime.optim import learning_rate, sgd
from runtime.run import Run, due, training_data

FLAGS = flags.FLAGS


def define_flags():
    define_device_flags()
    define_data_flags()
    define_run_flags(lr=0.1, wd=5e-4, grad_clip=0., save_step=0, keep=0, log_step=20, seed=-1)
    flags.DEFINE_alias('batchsize', 'batch_size')       # the names of the released code
    flags.DEFINE_alias('init_lr', 'lr')
    flags.DEFINE_enum('model', 'resnet18', list(NETWORKS), 'network to train')
    define_image_size(least=8)
    flags.DEFINE_integer('epoch', 300, 'passes over the training images; a checkpoint after each, '
                         'unless --save_step is given', lower_bound=1)
    flags.DEFINE_enum('recipe', None, ['released', 'plain'], 'how to augment and to lower the '
                      'rate, see above; none: released for cifar10 and imagenet64, else plain')
    flags.DEFINE_bool('normalize05', False, 'feed images in [-1, 1] as they are, rather than with '
                      'the mean and std of the data set; into <model>_normalize05')
    flags.DEFINE_string('result_path', './classifier/result', 'folder under which '
                        '<dataset>/<model>/ckpt.pt is written; relative to the repository root')
    flags.DEFINE_integer('max_steps', 0, 'stop after this many steps, to be continued; 0: when all '
                         'epochs are done', lower_bound=0)


def main():
    FIXED.update(('lr', 'wd', 'amp'))
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    FLAGS.data_root = str(cli.find(FLAGS.data_root))
    FLAGS.img_size = FLAGS.img_size or data.IMG_SIZE.get(FLAGS.dataset, 32)
    FLAGS.recipe = FLAGS.recipe or (
        'released' if FLAGS.dataset in ('cifar10', 'imagenet64') else 'plain')
    folder = cli.anchored(FLAGS.result_path) / FLAGS.dataset / (
        FLAGS.model + ('_normalize05' if FLAGS.normalize05 else ''))
    before = checkpoint.read_newest(folder) or {}
    if FLAGS.seed < 0:      # a resumed run keeps its own; so that flagfile.txt has it
        FLAGS.seed = distributed.broadcast_object(before.get('seed', torch.seed() % 2 ** 31))
    train(device, folder, before.get('accuracy'))
    distributed.cleanup()


def train(device, folder, accuracy):
    train_set, test_set = training_data(), make_test_set()
    if train_set.num_classes < 2:
        raise UserError(f'--dataset {FLAGS.dataset} has one class, and a classifier learns nothing '
                        f'from it; make class folders, or distil with imagenet_resnet50')
    if FLAGS.batch_size // FLAGS.grad_accum < 2:
        raise UserError(f'--batch_size {FLAGS.batch_size} in {FLAGS.grad_accum} parts leaves one '
                        f'image at a time, and batch norm needs two; raise it, or lower '
                        f'--grad_accum')
    steps_per_epoch = max(1, round(len(train_set) / FLAGS.batch_size))
    FLAGS.save_step = FLAGS.save_step or steps_per_epoch
    total_steps = FLAGS.epoch * steps_per_epoch
    last, released = min(total_steps, FLAGS.max_steps or total_steps), FLAGS.recipe == 'released'
    mean, std = normalisation(train_set)
    torch.manual_seed(seeding.mix(FLAGS.seed, seeding.WEIGHTS))
    model = build_classifier(FLAGS.model, train_set.num_classes, mean, std)
    model = model.to(device, memory_format=torch.channels_last)
    model = distributed.sync_batch_norm(model)
    optimizer = functools.partial(sgd, nesterov=not released)
    run = Run('classifier', model, train_set, folder, last, title=FLAGS.model, key='model',
              optimizer=optimizer, fixed=dict(name=FLAGS.model, num_classes=train_set.num_classes),
              entries=dict(total_steps=total_steps, mean=mean, std=std, accuracy=accuracy),
              augment=Augment(FLAGS.img_size, FLAGS.seed, train_set.flip) if released else None)
    run.entries['epoch'] = run.start // steps_per_epoch
    for step in run:
        for part in run.parts():
            x_0 = part.x_0
            if not released:
                rng = seeding.generator('cpu', FLAGS.seed, seeding.CROP, step)
                x_0 = random_crop(x_0, FLAGS.img_size // 8, FLAGS.batch_size, part.rows, rng)
            with run.training(part):
                logits, _, _ = run.net(x_0)
            run.backward(loss=(1., F.cross_entropy(logits.float(), part.y)))
            run.meter.add(accuracy=(logits.argmax(1) == part.y).float().mean())
        run.update(rate_of(step, steps_per_epoch, total_steps))
        if due(step, steps_per_epoch, last):
            accuracy = evaluate(model, test_set, device) if test_set else None
            run.entries.update(accuracy=accuracy, epoch=step // steps_per_epoch)
            if test_set:
                run.reported.update(test_accuracy=accuracy)
            words = f'test {100 * accuracy:.2f} %' if test_set else 'no test split'
            distributed.print0(f'epoch {step / steps_per_epoch:.4g}/{FLAGS.epoch}: {words}')


def rate_of(step, steps_per_epoch, total_steps):
    """Learning rate of step 1, 2, ..

    Released: divided by 10 after half and after three quarters of the epochs, not in the first one.
    Plain: a cosine to 0.
    """
    if FLAGS.recipe == 'plain':
        return learning_rate(step, FLAGS.lr, 0, total_steps, decay=True)
    epoch, rate = (step - 1) // steps_per_epoch, FLAGS.lr
    for first in (FLAGS.epoch // 2, FLAGS.epoch * 3 // 4):
        rate /= 10 if epoch >= max(1, first) else 1
    return rate


def make_test_set():
    """The test split, or None with the reason printed."""
    try:
        return data.make_dataset(FLAGS.dataset, FLAGS.data_root, FLAGS.img_size, train=False,
                                 num_workers=FLAGS.num_workers,
                                 skip_bad_images=FLAGS.skip_bad_images)
    except UserError as error:
        distributed.print0(f'note: there will be no test accuracy: {error}.')


def normalisation(dataset):
    """(mean, std) of the input, three numbers each."""
    if FLAGS.normalize05:
        return NORMALISATIONS['05']
    if FLAGS.recipe == 'released' and FLAGS.dataset == 'cifar10':
        return NORMALISATIONS['cifar10']
    return measured_normalisation(dataset)


@torch.no_grad()
def evaluate(model, dataset, device):
    """Share of test images that are classified correctly, 0..1."""
    model.eval()
    right = torch.zeros((), dtype=torch.float64, device=device)
    mine = torch.arange(len(dataset)).tensor_split(distributed.world_size())[distributed.rank()]
    for images, y in data.in_order(dataset, 256, device, mine):
        right += (model(images.float() / 127.5 - 1)[0].argmax(1) == y).sum()
    model.train()
    return distributed.all_reduce_sum(right).item() / len(dataset)


if __name__ == '__main__':
    define_flags()
    cli.run(main)
