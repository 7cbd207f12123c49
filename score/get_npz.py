"""Measure the statistics of a data set, with which samples are compared.

Inside score/ or from the repository root:
  python get_npz.py --dataset cifar10
  torchrun --nproc_per_node=4 score/get_npz.py --dataset imagenet64 --data_root DIR
Result: stats/<dataset>.<split>.npz in the repository root.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # works from any folder

import torch    # noqa: E402
from absl import flags      # noqa: E402

from runtime import cli, data, distributed, pictures      # noqa: E402
from runtime.cli import UserError       # noqa: E402
from runtime.flags import define_device_flags, without_effect       # noqa: E402
from runtime.log import progress    # noqa: E402
from score.metrics import ActivationStats       # noqa: E402
from score.networks import load_feature_network     # noqa: E402
from score.reference import (Statistics, check_writable, load_statistics,       # noqa: E402
                             save_statistics)

FLAGS = flags.FLAGS


def define_flags():
    define_device_flags()
    flags.DEFINE_enum('dataset', 'cifar10', data.DATASETS, 'images to measure')
    flags.DEFINE_string('data_root', './data', 'folder of the data set')
    flags.DEFINE_integer('img_size', None, 'height and width of the images; none: 8 for digits, '
                         '28 for fashion_mnist, 64 for imagenet64, 32 for others',
                         lower_bound=1, upper_bound=4096)
    flags.DEFINE_enum('split', 'train', ['train', 'test'], 'images to measure')
    flags.DEFINE_integer('half', 0, '1 or 2: only every second image, from the first or from the '
                         'second on; the distance between the two halves is the floor that no '
                         'model gets below. 0: all', lower_bound=0, upper_bound=2)
    flags.DEFINE_integer('max_images', 0, 'at most this many, evenly spaced; 0: all', lower_bound=0)
    flags.DEFINE_integer('batchsize', 128, 'images per process and step', lower_bound=1)
    flags.DEFINE_integer('num_workers', 4, 'processes that decode image files', lower_bound=0)
    flags.DEFINE_bool('skip_bad_images', False, 'name image files that cannot be read and leave '
                      'them out')
    flags.DEFINE_string('feature_network', 'inception', 'inception, or the folder of a classifier '
                        'of classifier/train.py')
    flags.DEFINE_string('inception_weights', None, 'file of Inception\'s weights; none: fetched '
                        'once and kept in torch\'s cache')
    flags.DEFINE_string('output', None, 'file to write, relative to the repository root; none: '
                        'stats/<dataset>.<split>.npz, with .half1 or .half2 before .npz')
    flags.DEFINE_bool('overwrite', False, 'measure again even if the file is there')


def main():
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    for line in without_effect(amp='features are computed in float32'):
        distributed.print0(line)
    network = load_feature_network(FLAGS.feature_network, device, FLAGS.inception_weights)
    path = output_path()
    if distributed.is_main():
        check_writable(path)
    distributed.barrier()       # no process starts if the file cannot be written
    dataset = data.make_dataset(FLAGS.dataset, cli.find(FLAGS.data_root),
                                FLAGS.img_size or data.IMG_SIZE.get(FLAGS.dataset, 32),
                                train=FLAGS.split == 'train', num_workers=FLAGS.num_workers,
                                skip_bad_images=FLAGS.skip_bad_images)
    indices = chosen_images(len(dataset))
    origin = dict(dataset=dataset.name, split=dataset.split, half=FLAGS.half,
                  num_images=len(indices), img_size=dataset.img_size, network=network.name)
    if not distributed.broadcast_object(up_to_date(path, origin)):
        stats = measure(dataset, indices, network, device)
        if distributed.is_main():
            save(path, stats, origin)
    distributed.cleanup()


def output_path():
    name = f'{FLAGS.dataset}.{FLAGS.split}' + (f'.half{FLAGS.half}' if FLAGS.half else '')
    path = cli.anchored(FLAGS.output or f'stats/{name}.npz')
    return path if path.suffix == '.npz' else path.with_name(path.name + '.npz')


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
    """Whether `path` already holds these statistics; if it is to be overwritten, says so."""
    if not path.exists():
        return False
    if pictures.holds_samples(path) and not FLAGS.overwrite:
        raise UserError(f'--output {path} exists and holds samples, not statistics; choose another '
                        f'file, or add --overwrite')
    try:
        before = load_statistics(path).origin()
    except UserError as error:
        distributed.print0(f'note: overwriting a file: {error}.')
        return False
    if before == origin and not FLAGS.overwrite:
        distributed.print0(f'{path} already holds {words(origin)}; --overwrite measures again.')
        return True
    distributed.print0(f'note: overwriting {path}, which holds {words(before)}.')
    return False


def words(origin):
    return ', '.join(f'{key} {value}' for key, value in origin.items() if value is not None)


def measure(dataset, indices, network, device):
    """`ActivationStats` of the images `indices` (n,); each process takes a contiguous share."""
    rank, processes, total = distributed.rank(), distributed.world_size(), len(indices)
    share = range(rank * total // processes, (rank + 1) * total // processes)
    # Folders are sorted by class: the splits of the Inception score must not be. The order is
    # fixed, so that neither batches nor processes change the result.
    positions = torch.randperm(total, generator=torch.Generator().manual_seed(0))[list(share)]
    stats, done = ActivationStats(total), 0
    with progress(len(share), f'{FLAGS.dataset} {FLAGS.split}', unit='img') as bar:
        for images, _, _ in data.in_order(dataset, FLAGS.batchsize, device, indices[list(share)],
                                          FLAGS.num_workers):
            features, probs = network(images)
            stats.update(features, probs, positions[done:done + len(images)])
            done += len(images)
            bar.update(len(images))
    return stats.reduce()


def save(path, stats, origin):
    mu, sigma = stats.mean_cov()
    mean, std = stats.inception_score()
    save_statistics(path, Statistics(mu, sigma, inception_mean=mean, inception_std=std, **origin))
    note = ''
    if origin['num_images'] <= len(mu):
        note = f'; note: the covariance is singular, it needs more than {len(mu)} images'
    print(f'{path}: {words(origin)}, Inception score {mean:.4g} +- {std:.2g}{note}.')


if __name__ == '__main__':
    define_flags()
    cli.run(main)
