"""Measure the statistics of a data set, with which samples are compared.

Inside score/ or from the repository root:
  python get_npz.py --dataset cifar10
  torchrun --nproc_per_node=4 score/get_npz.py --dataset imagenet64 --data_root DIR
Result: stats/<dataset>.<split>.npz in the repository root. The distance between the two halves of a
data set is the lowest that a model can be expected to reach:
  python get_npz.py --dataset cifar10 --half 1
  python get_npz.py --dataset cifar10 --half 2 --compare_with stats/cifar10.train.half1.npz
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import torch
from absl import flags

from runtime import cli, data, distributed, image_files, pictures
from runtime.cli import UserError
from runtime.flags import (IGNORED, define_data_flags, define_device_flags, define_image_size,
                           without_effect)
from runtime.log import progress
from runtime.published_sets import find_batches
from score.metrics import ActivationStats, frechet_distance
from score.networks import define_feature_flags, load_feature_network
from score.reference import Statistics, check_reference, load_statistics, save_statistics

FLAGS = flags.FLAGS


def define_flags():
    define_device_flags()
    define_data_flags()
    define_image_size(least=1)
    flags.DEFINE_enum('split', 'train', ['train', 'test'], 'images to measure')
    flags.DEFINE_integer('half', 0, '1 or 2: only every second image, from the first or from the '
                         'second on; 0: all', lower_bound=0, upper_bound=2)
    flags.DEFINE_integer('max_images', 0, 'at most this many, evenly spaced; 0: all', lower_bound=0)
    flags.DEFINE_alias('batchsize', 'batch_size')       # its name in the released code
    define_feature_flags()
    flags.DEFINE_string('output', None, 'npz to write, relative to the repository root; none: '
                        'stats/<dataset>.<split>.npz, with .half1 or .half2 before .npz')
    flags.DEFINE_string('compare_with', None, 'npz of other statistics; prints their Frechet '
                        'distance from what is measured')
    flags.DEFINE_bool('overwrite', False, 'measure again even if the file is there')
    flags.DEFINE_bool('check', False, 'measure nothing: read every file of the data set once and '
                      'name those that cannot be used')


def main():
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    reason = 'features are always computed in float32, and not compiled'
    without_effect(**IGNORED, amp=reason, tf32=reason, compile=reason)
    img_size = FLAGS.img_size or data.IMG_SIZE.get(FLAGS.dataset, 32)
    where = FLAGS.dataset, cli.find(FLAGS.data_root), img_size
    if FLAGS.check:
        return check(*where)
    network = load_feature_network(FLAGS.feature_network, device, FLAGS.inception_weights)
    if FLAGS.compare_with:
        other = load_statistics(FLAGS.compare_with)
        check_reference(other, network, img_size)
    half = f'.half{FLAGS.half}' if FLAGS.half else ''
    path = cli.anchored(FLAGS.output or f'stats/{FLAGS.dataset}.{FLAGS.split}{half}.npz')
    if path.is_dir():
        raise UserError(f'--output {path} is a folder, expected the name of an npz; add one')
    if FLAGS.overwrite or not path.exists():
        pictures.check_folder(path.parent)      # before images are decoded and measured
    dataset = data.make_dataset(*where, train=FLAGS.split == 'train', num_workers=FLAGS.num_workers,
                                skip_bad_images=FLAGS.skip_bad_images)
    distributed.print0(dataset.summary)
    indices = chosen_images(len(dataset))
    origin = dict(dataset=dataset.name, split=dataset.split, half=FLAGS.half,
                  num_images=len(indices), img_size=dataset.img_size, network=network.name,
                  fingerprint=dataset.fingerprint)
    if not distributed.broadcast_object(up_to_date(path, origin)):
        stats = measure(dataset, indices, network, device)
        if distributed.is_main():
            counts = dataset.labels[indices].bincount(minlength=dataset.num_classes).numpy()
            save(path, stats, origin, counts)
    if FLAGS.compare_with and distributed.is_main():
        found = load_statistics(path)
        distance = frechet_distance(found.mu, found.sigma, other.mu, other.sigma)
        print(f'Frechet distance {distance:.4f} from {other.path}')
    distributed.cleanup()


def check(name, root, img_size):
    """Read every image file of the split; name those that cannot be used, the exit code is then 1.

    A data set without image files is read as in training.
    """
    if name == 'folder' or name == 'imagenet64' and not find_batches(root, FLAGS.split):
        found = image_files.find_images(root, FLAGS.split)
        problems = list(image_files.decode_all(found[0], img_size, FLAGS.num_workers))
        summary = image_files.summary(root, FLAGS.split, *found)
        if problems:
            print(summary, *(f'{path} {reason}' for path, reason in problems), sep='\n')
            raise UserError(f'{len(problems)} of {len(found[0])} files cannot be used, see above; '
                            f'replace them, or give --skip_bad_images', code=1)
    else:
        summary = data.make_dataset(name, root, img_size, train=FLAGS.split == 'train').summary
    print(f'{summary}; every file can be used')


def chosen_images(length):
    """Indices of the images to measure, in order: --half, then --max_images."""
    indices = torch.arange(length)
    if FLAGS.half:
        indices = indices[FLAGS.half - 1::2]
    if 0 < FLAGS.max_images < len(indices):
        indices = indices[torch.arange(FLAGS.max_images) * len(indices) // FLAGS.max_images]
    least = max(2, distributed.world_size())
    if len(indices) < least:
        raise UserError(f'--dataset {FLAGS.dataset} leaves {len(indices)} images to measure, '
                        f'expected at least {least}; raise --max_images or use fewer processes')
    return indices


def up_to_date(path, origin):
    """Whether `path` holds these statistics already; refuses to overwrite anything else."""
    if FLAGS.overwrite or not path.exists():
        return False
    try:
        found = load_statistics(path)
    except UserError as error:
        raise UserError(f'--output {path} exists and holds no statistics ({error}); choose another '
                        f'file, or add --overwrite')
    before = {key: getattr(found, key) for key in origin}
    if before == origin and found.features is not None:
        distributed.print0(f'{path} already holds {words(origin)}; --overwrite measures again.')
        return True
    how = f'was made otherwise: {words(before)}'
    if before == origin:
        how = 'holds no features for precision and recall'
    elif words(before) == words(origin):
        how = 'was made of other images, of files that have changed, or by an earlier version'
    distributed.print0(f'note: overwriting {path}, which {how}.')
    return False


def words(origin):
    return ', '.join(f'{key} {value}' for key, value in origin.items()
                     if value is not None and key != 'fingerprint')


def measure(dataset, indices, network, device):
    """`ActivationStats` of the images `indices` (n,); each process takes a contiguous share."""
    rank, processes, total = distributed.rank(), distributed.world_size(), len(indices)
    share = range(rank * total // processes, (rank + 1) * total // processes)
    # Folders are sorted by class: the splits of the Inception score must not be. The order is
    # fixed, so that neither batches nor processes change the result.
    positions = torch.randperm(total, generator=torch.Generator().manual_seed(0))[list(share)]
    stats, batches = ActivationStats(total), positions.split(FLAGS.batch_size)
    images = data.in_order(dataset, FLAGS.batch_size, device, indices[list(share)])
    with progress(len(share), f'{FLAGS.dataset} {FLAGS.split}', unit='img') as bar:
        for places, (batch, _) in zip(batches, images):
            stats.update(*network(batch), places)
            bar.update(len(batch))
    return stats.reduce()


def save(path, stats, origin, class_counts):
    mu, sigma = stats.mean_cov()
    mean, std = stats.inception_score()
    save_statistics(path, Statistics(
        mu, sigma, class_counts=class_counts, features=stats.features.numpy(), inception_mean=mean,
        inception_std=std, **origin))
    print(f'{path}: {words(origin)}, Inception score {mean:.4g} +- {std:.2g}.')
    if origin['num_images'] <= len(mu):
        print(f'note: the covariance is singular, it needs more than {len(mu)} images.')


if __name__ == '__main__':
    define_flags()
    cli.run(main)
