"""Sample with DDIM from a checkpoint and score the images.

  python ddim_eval.py --flagfile ./config/CIFAR10_EVAL.txt --logdir ./logs/CIFAR10/1024 --stride 128
  python ddim_eval.py --flagfile ./config/CIFAR10_EVAL.txt --logdir ./logs/8to4/rdd
Several GPUs: the same after `torchrun --nproc_per_node=4`. The network is rebuilt from the
checkpoint. Prints Frechet distance, Inception score and the protocol, appends them as a JSON line
to <logdir>/results.jsonl and saves a grid of the first images to <logdir>/sample/.
"""

import json
import time

import torch
from absl import flags

from runtime import cli, distributed, pictures, seeding
from runtime.cli import UserError
from runtime.flags import (define_device_flags, define_network_flags, define_teacher_steps, given,
                           require, without_effect)
from runtime.log import progress
from runtime.models import check_facts, check_flags, load_model
from runtime.pictures import to_uint8
from runtime.precision import autocast, choose, prepare
from score import (ActivationStats, check_network, frechet_distance, load_feature_network,
                   load_statistics)

FLAGS = flags.FLAGS
define_network_flags()
define_device_flags()
define_teacher_steps()
flags.DEFINE_string('logdir', None, 'folder (or file) of the checkpoint; results are written there')
flags.DEFINE_integer('stride', 1, 'steps of the model per DDIM step: NFE = T / stride',
                     lower_bound=1)
flags.DEFINE_integer('num_images', 50000, 'images to sample and score', 2, 10**8)
flags.DEFINE_integer('batch_size', 128, 'images per process and batch', 1, 10**6)
flags.DEFINE_integer('num_workers', 4, 'ignored: no image files are read')
flags.DEFINE_integer('seed', 0, 'image i starts from noise that depends on (seed, i)',
                     lower_bound=0)
flags.DEFINE_integer('sample_size', 64, 'images in the grid', 1, 4096)
flags.DEFINE_string('fid_cache', './stats/cifar10.train.npz', 'statistics of the reference images, '
                    'made by score/get_npz.py')
flags.DEFINE_bool('fid_use_torch', False, 'compute the Frechet distance on the GPU rather than the '
                  'CPU; in float64 either way')
flags.DEFINE_bool('fid_float', False, 'score float samples instead of 8-bit images')
flags.DEFINE_string('feature_network', 'inception', 'inception, or the folder of a classifier')
flags.DEFINE_string('inception_weights', None, 'file of Inception\'s weights; none: downloaded')
flags.DEFINE_enum('weights', 'auto', ['auto', 'net', 'ema'], 'weights to score; auto: the average '
                  'for a base model, the raw ones for a distilled student')
flags.DEFINE_string('save_images', None, 'where all images go: one file that ends in .npz (arr_0: '
                    'uint8 (N, H, W, 3); arr_1: labels, if any), or a new folder of PNGs')
flags.DEFINE_bool('trajectory', False, 'draw z_t and x_pred of the first 8 images over the steps')


def main():
    require(logdir='the folder of a trained model, such as ./logs/8to4/rdd')
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    evaluate(device)
    distributed.cleanup()


@torch.no_grad()
def evaluate(device):
    """Load what is compared, sample and score in one stream, report."""
    model = checked_model()
    check_requests(device)
    reference = load_statistics(FLAGS.fid_cache)    # before hours are spent on sampling
    feature_network = load_feature_network(FLAGS.feature_network, device, FLAGS.inception_weights)
    check_network(reference, feature_network)
    model.to(device)
    prepare(choose(FLAGS.amp, device), FLAGS.compile, device, model.network, graphs=True)
    rng = seeding.generator('cpu', FLAGS.seed, seeding.LABELS)
    y = torch.randint(model.arch['class_num'], (FLAGS.num_images,), generator=rng).to(device)
    y = y if model.arch['conditional'] else None
    stats, images, rate = sample_and_score(model, y, feature_network)
    if distributed.is_main():
        scores = {'fid': frechet_distance(*stats.mean_cov(), reference.mu, reference.sigma,
                                          device if FLAGS.fid_use_torch else 'cpu')}
        scores['inception_score'], scores['inception_std'] = stats.inception_score()
        result = protocol(model, reference, feature_network, scores, rate)
        report(result, reference)
        write(model, result, images, y)
        if FLAGS.trajectory:
            draw_trajectory(model, result, y)


def checked_model():
    """The model in --logdir, if neither --stride nor the flags of the network contradict it."""
    model = load_model(FLAGS.logdir, FLAGS.weights, mean_type=FLAGS.mean_type,
                       img_size=FLAGS.img_size, steps=FLAGS.teacher_steps)
    check_flags(model.arch, model.file, FLAGS, given)
    check_facts(dict(model.facts, img_size=model.img_size), model.file, FLAGS, given)
    if model.diffusion.T % FLAGS.stride:
        raise UserError(f'--stride {FLAGS.stride} does not divide the {model.diffusion.T} steps of '
                        f'the model in {FLAGS.logdir}; choose a divisor')
    return model


def check_requests(device):
    """Refuse or comment on flags that cannot act, before anything is computed."""
    if FLAGS.num_images < distributed.world_size():
        raise UserError(f'--num_images {FLAGS.num_images} is less than the '
                        f'{distributed.world_size()} processes; raise it')
    if FLAGS.save_images:
        pictures.check_place(FLAGS.save_images)
    for line in without_effect(num_workers='no image files are read', dropout='sampling uses none'):
        distributed.print0(line)
    if FLAGS.fid_use_torch and device.type == 'cpu':
        distributed.print0('note: --fid_use_torch has no effect: there is no GPU.')


def sample_and_score(model, y, feature_network):
    """(statistics of all processes, uint8 images to keep, images/s of the sampler).

    Image i starts from noise that depends on (--seed, i) alone. The first process alone gets the
    images: all of them for --save_images, else those that the grid shows.
    """
    device, processes = model.diffusion.alpha.device, distributed.world_size()
    stats, kept, seconds = ActivationStats(FLAGS.num_images), [], 0.
    first, last = (FLAGS.num_images * (distributed.rank() + i) // processes for i in (0, 1))
    batches = [range(first, last)[i:i + FLAGS.batch_size]
               for i in range(0, last - first, FLAGS.batch_size)]
    finite = torch.ones((), dtype=torch.bool, device=device)
    wanted = FLAGS.num_images if FLAGS.save_images else FLAGS.sample_size
    nfe, shape = model.diffusion.T // FLAGS.stride, (3, model.img_size, model.img_size)
    with progress(last - first, f'sample {nfe} steps', unit='img') as bar:
        for indices, x_T in seeding.noise_ahead(FLAGS.seed, batches, shape, device):
            labels = None if y is None else y[indices.start:indices.stop]
            since = synchronised_time(device)
            with autocast(FLAGS.amp, device):
                x_0 = model.diffusion.sample(model.network, x_T, FLAGS.stride, y=labels)
            seconds += synchronised_time(device) - since
            finite &= torch.isfinite(x_0).all()
            if device.type == 'cpu':        # a GPU is not kept waiting: see below
                pictures.refuse_unless(finite)
            images = to_uint8(x_0, finite=True)
            stats.update(*feature_network(x_0 if FLAGS.fid_float else images),
                         torch.arange(indices.start, indices.stop, device=device))
            images = images[:max(0, wanted - indices.start)].clone()    # no view of the batch
            kept.append(images.cpu() if FLAGS.save_images else images)
            bar.update(len(indices))
    pictures.refuse_unless(finite)
    kept = torch.cat(kept).cpu()
    if wanted > FLAGS.num_images // processes:      # others have some of them
        kept = distributed.gather_main(kept)
    return stats.reduce(), kept, (last - first) / seconds * processes


def protocol(model, reference, feature_network, scores, rate):
    """The scores with all that another score must agree in to be compared: a line of results."""
    d = model.diffusion
    return dict(
        ckpt=str(model.file), method=model.facts.get('method'), step=model.facts.get('step'),
        weights=model.weights, T=d.T, stride=FLAGS.stride, nfe=d.T // FLAGS.stride,
        seed=FLAGS.seed, num_images=FLAGS.num_images,
        **{name: round(value, 4) for name, value in scores.items()}, images_per_s=round(rate, 1),
        reference=FLAGS.fid_cache, reference_images=reference.num_images,
        feature_network=feature_network.name, pixels='float' if FLAGS.fid_float else '8-bit',
        amp=choose(FLAGS.amp, d.alpha.device))


def synchronised_time(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report(result, reference):
    """The scores with the protocol they belong to."""
    print(f'{result["ckpt"]}: {result["weights"]}, {result["nfe"]} steps (DDIM), '
          f'{result["num_images"]} images, seed {result["seed"]}, {result["pixels"]}, '
          f'features {result["feature_network"]}\n'
          f'reference {result["reference"]}: {reference.dataset or "unknown data set"}, '
          f'{reference.split or "unknown split"}, {reference.num_images or "?"} images')
    if result['num_images'] < len(reference.mu):
        print(f'note: fewer images than the {len(reference.mu)} features; compare such a distance '
              f'only with others of the same number of images.')
    print(f'Frechet distance {result["fid"]:.3f}   Inception score {result["inception_score"]:.3f} '
          f'+- {result["inception_std"]:.3f}   {result["images_per_s"]:.0f} images/s', flush=True)


def title(result):
    return f'{result["ckpt"]}  NFE {result["nfe"]}  seed {result["seed"]}  {result["weights"]}'


def write(model, result, images, y):
    """results.jsonl, the grid and, with --save_images, all images."""
    folder = model.file.parent
    with open(folder / 'results.jsonl', 'a+b') as lines:
        if lines.tell():        # a line that a full disk has cut off is ended first
            lines.seek(-1, 2)
            lines.write(b'' if lines.read(1) == b'\n' else b'\n')
        lines.write(json.dumps(result).encode() + b'\n')
    first = images[:FLAGS.sample_size]
    rows, labels = pictures.rows_by_class(first, None if y is None else y[:len(first)].cpu(),
                                          model.arch['class_num'])
    pictures.save_labelled(folder / f'sample/eval_nfe{result["nfe"]}_seed{result["seed"]}.png',
                           title(result), rows, labels)
    if FLAGS.save_images:
        pictures.save_images(FLAGS.save_images, images, None if y is None else y[:len(images)])


def draw_trajectory(model, result, y):
    """The first 8 images on their way from noise, next to the grid."""
    count, device = min(8, result['num_images']), model.diffusion.alpha.device
    x_T = seeding.noise_of_images(FLAGS.seed, range(count), (3, model.img_size, model.img_size),
                                  device)
    with autocast(FLAGS.amp, device):
        steps = pictures.trajectory(model.diffusion, model.network, x_T, FLAGS.stride,
                                    None if y is None else y[:count])
    name = f'sample/trajectory_nfe{result["nfe"]}_seed{result["seed"]}.png'
    pictures.save_trajectory(model.file.parent / name, title(result), steps)


if __name__ == '__main__':
    cli.run(main)
