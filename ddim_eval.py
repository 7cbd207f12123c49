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

from diffusion import Diffusion
from runtime import checkpoint, distributed, options, pictures, seeding
from runtime.options import UserError
from runtime.training import autocast, compile_networks, frozen, progress
from score import (ActivationStats, check_network, frechet_distance, load_feature_network,
                   load_statistics, to_uint8)

FLAGS = flags.FLAGS
options.define_network_flags()
options.define_device_flags()
flags.DEFINE_string('logdir', None, 'folder (or file) of the checkpoint; results are written there')
flags.DEFINE_integer('stride', 1, 'steps of the model per DDIM step: NFE = T / stride',
                     lower_bound=1)
flags.DEFINE_integer('num_images', 50000, 'images to sample and score', lower_bound=2)
flags.DEFINE_integer('batch_size', 128, 'images per process and batch', lower_bound=1)
flags.DEFINE_integer('num_workers', 4, 'ignored: no image files are read')
flags.DEFINE_integer('seed', 0, 'image i starts from noise that depends on (seed, i)',
                     lower_bound=0)
flags.DEFINE_integer('sample_size', 64, 'images in the grid', lower_bound=1)
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
    options.require(logdir='the folder of a trained model, such as ./logs/8to4/rdd')
    device = distributed.init(FLAGS.gpu_id)
    evaluate(device)
    distributed.cleanup()


@torch.no_grad()
def evaluate(device):
    """Sample, score, report: the whole protocol from top to bottom."""
    # Reference and feature network first, in case they are missing
    file = checkpoint.find(FLAGS.logdir)
    state = checkpoint.read(file)
    network, weights = checkpoint.build_unet(state, file, weights_of=FLAGS.weights)
    arch = checkpoint.architecture(network.state_dict())
    # published checkpoints do not say their size, but x_T of their grids has it
    img_size = state['x_T'].shape[-1] if 'x_T' in state else FLAGS.img_size
    checkpoint.check_flags(arch, file, FLAGS, options.given)
    checkpoint.check_facts(dict(state, img_size=img_size), file, FLAGS, options.given)
    T, time_scale, schedule, mean_type = checkpoint.grid(state, arch)
    diffusion = Diffusion(T, time_scale, mean_type or FLAGS.mean_type, device, schedule)
    nfe = len(times(diffusion)) - 1
    if FLAGS.num_images < distributed.world_size():
        raise UserError(f'--num_images {FLAGS.num_images} is less than the '
                        f'{distributed.world_size()} processes; raise it')
    if FLAGS.save_images:
        pictures.check_place(FLAGS.save_images)
    reference = load_statistics(FLAGS.fid_cache)
    feature_network = load_feature_network(FLAGS.feature_network, device, FLAGS.inception_weights)
    check_network(reference, feature_network)
    for line in options.without_effect(num_workers='no image files are read',
                                       dropout='sampling uses none'):
        distributed.print0(line)
    if FLAGS.fid_use_torch and device.type == 'cpu':
        distributed.print0('note: --fid_use_torch has no effect: there is no GPU.')

    # Sample and score in one stream
    network = frozen(network.to(device, memory_format=torch.channels_last))
    compile_networks(FLAGS.compile, device, network)
    y_all = torch.randint(arch['class_num'], (FLAGS.num_images,),
                          generator=seeding.generator('cpu', FLAGS.seed, seeding.LABELS)).to(device)
    stats, kept, seconds = ActivationStats(FLAGS.num_images), [], 0.
    mine = torch.arange(FLAGS.num_images).tensor_split(distributed.world_size())[distributed.rank()]
    with progress(len(mine), f'sample {nfe} steps', unit='img') as bar:
        for indices in mine.split(FLAGS.batch_size):
            x_T = seeding.noise_of_images(FLAGS.seed, indices, (3, img_size, img_size), device)
            y = y_all[indices.to(device)] if arch['conditional'] else None
            since = synchronised_time(device)
            with autocast(FLAGS.amp, device):
                x_0 = diffusion.sample(network, x_T, FLAGS.stride, y=y)
            seconds += synchronised_time(device) - since
            images = to_uint8(x_0)
            stats.update(*feature_network(x_0 if FLAGS.fid_float else images), indices)
            if FLAGS.save_images or len(kept) * FLAGS.batch_size < FLAGS.sample_size:
                kept.append(images.cpu())
            bar.update(len(indices))
    stats.reduce()
    kept = distributed.gather_main(torch.cat(kept))

    # Report
    if distributed.is_main():
        inception, inception_std = stats.inception_score()
        fid = frechet_distance(*stats.mean_cov(), reference.mu, reference.sigma,
                               device if FLAGS.fid_use_torch else 'cpu')
        result = dict(
            ckpt=str(file), method=state.get('method'), step=state.get('step'), weights=weights,
            T=T, stride=FLAGS.stride, nfe=nfe, seed=FLAGS.seed, num_images=FLAGS.num_images,
            fid=round(fid, 4), inception_score=round(inception, 4),
            inception_std=round(inception_std, 4),
            images_per_s=round(len(mine) / seconds * distributed.world_size(), 1),
            reference=FLAGS.fid_cache, reference_images=reference.num_images,
            feature_network=feature_network.name, pixels='float' if FLAGS.fid_float else '8-bit',
            amp=FLAGS.amp)
        report(result, reference)
        y = y_all if arch['conditional'] else None
        write(file.parent, result, kept, y, arch['class_num'])
        if FLAGS.trajectory:
            draw_trajectory(file.parent, result, diffusion, network, img_size, y)


def times(diffusion):
    try:
        return diffusion.times(FLAGS.stride)
    except ValueError:
        raise UserError(f'--stride {FLAGS.stride} does not divide the {diffusion.T} steps of the '
                        f'model in {FLAGS.logdir}; choose a divisor')


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


def write(folder, result, images, y, class_num):
    """results.jsonl, the grid and, on request, all images."""
    with open(folder / 'results.jsonl', 'a') as lines:
        lines.write(json.dumps(result) + '\n')
    first = images[:FLAGS.sample_size]
    rows, labels = pictures.rows_by_class(first, None if y is None else y[:len(first)].cpu(),
                                          class_num)
    pictures.save_labelled(folder / f'sample/eval_nfe{result["nfe"]}_seed{result["seed"]}.png',
                           title(result), rows, labels)
    if FLAGS.save_images:
        pictures.save_images(FLAGS.save_images, images, None if y is None else y[:len(images)])


def draw_trajectory(folder, result, diffusion, network, img_size, y):
    """The way of the first 8 images from noise, beside the grid."""
    count, device = min(8, result['num_images']), diffusion.alpha.device
    x_T = seeding.noise_of_images(FLAGS.seed, range(count), (3, img_size, img_size), device)
    with autocast(FLAGS.amp, device):
        steps = pictures.trajectory(diffusion, network, x_T, FLAGS.stride,
                                    None if y is None else y[:count])
    name = f'sample/trajectory_nfe{result["nfe"]}_seed{result["seed"]}.png'
    pictures.save_trajectory(folder / name, title(result), steps)


if __name__ == '__main__':
    options.run(main)
