"""Sample with DDIM from a checkpoint and score the images.

  python ddim_eval.py --flagfile ./config/CIFAR10_EVAL.txt --logdir ./logs/CIFAR10/1024 --stride 128
  python ddim_eval.py --flagfile ./config/CIFAR10_EVAL.txt --logdir ./logs/8to4/rdd
Several GPUs: the same after `torchrun --nproc_per_node=4`. The network is rebuilt from the
checkpoint. Prints Frechet distance, Inception score and the protocol, appends them as a JSON line
to <logdir>/results.jsonl and saves a grid of the first images to <logdir>/sample/.
"""

import math

import torch
from absl import flags

from runtime import cli, distributed, pictures
from runtime.flags import require
from runtime.pictures import to_uint8
from runtime.precision import choose
from score import results
from score.metrics import ActivationStats, frechet_distance, precision_recall
from score.networks import define_feature_flags, load_feature_network
from score.reference import check_reference, load_statistics
from score.sampling import (define_sampling_flags, draw_labels, model_of_flags, nfe, sampled,
                            save_picture)

FLAGS = flags.FLAGS
define_sampling_flags(num_images=50000, least=2)
flags.DEFINE_integer('num_workers', 4, 'ignored: no image files are read')
flags.DEFINE_integer('sample_size', 64, 'images in the grid', 1, 4096)
flags.DEFINE_string('fid_cache', './stats/cifar10.train.npz', 'statistics of the reference images, '
                    'made by score/get_npz.py')
flags.DEFINE_bool('fid_use_torch', False, 'compute the Frechet distance on the GPU rather than the '
                  'CPU; in float64 either way')
flags.DEFINE_bool('fid_float', False, 'score float samples instead of 8-bit images')
define_feature_flags()
flags.DEFINE_string('save_images', None, 'where all images go: one file that ends in .npz (arr_0: '
                    'uint8 (N, H, W, 3); arr_1: labels, if any), or a new folder of PNGs')


@torch.no_grad()
def main():
    require(logdir='the folder of a trained model, such as ./logs/8to4/rdd')
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    model = model_of_flags(device)
    if distributed.is_main():       # before hours are spent on sampling
        pictures.check_folder(model.file.parent)
        if FLAGS.save_images:
            pictures.check_place(FLAGS.save_images, '--save_images')
    reference = load_statistics(FLAGS.fid_cache)
    feature_network = load_feature_network(FLAGS.feature_network, device, FLAGS.inception_weights)
    check_reference(reference, feature_network, model.img_size)
    y, how = draw_labels(model, reference.class_counts)
    stats, images, rate = sample_and_score(model, y, feature_network)
    if distributed.is_main():
        setting = protocol(model, reference, feature_network, how)
        score, deviation = stats.inception_score()      # refuses what is not finite
        distance = frechet_distance(*stats.mean_cov(), reference.mu, reference.sigma,
                                    device if FLAGS.fid_use_torch else 'cpu')
        result = dict(setting, fid=round(distance, 4), inception_score=round(score, 4),
                      inception_std=round(deviation, 4), images_per_s=round(rate, 1))
        if reference.features is not None:
            both = precision_recall(reference.features, stats.features, device=device)
            result.update((name, None if share is None else round(share, 4))
                          for name, share in zip(('precision', 'recall'), both))
        try:
            write(model, result, images, y)     # before the output, whose reader may have gone
        finally:        # so that a full disk loses no score
            print(', '.join(f'{key} {value}' for key, value in setting.items()
                            if value is not None))
            report(result, reference)
    distributed.cleanup()


def sample_and_score(model, y, feature_network):
    """(statistics of all processes, uint8 images to keep, images/s of the sampler).

    The first process alone gets images: all for --save_images, else those of the grid.
    """
    wanted = FLAGS.num_images if FLAGS.save_images else FLAGS.sample_size
    stats, kept, count, seconds = ActivationStats(FLAGS.num_images), [], 0, 0.
    for indices, x_0, time in sampled(model, y):
        images = to_uint8(x_0)
        stats.update(*feature_network(x_0 if FLAGS.fid_float else images),
                     torch.arange(indices.start, indices.stop))
        images = images[:max(0, wanted - indices.start)].clone()    # no view of the batch
        kept.append(images.cpu() if FLAGS.save_images else images)
        count += len(indices)
        seconds += time
    images = distributed.gather_main(torch.cat(kept).cpu())
    return stats.reduce(), images, count / seconds * distributed.world_size()


def protocol(model, reference, feature_network, labels):
    """All that two scores must agree in to be compared: a line of results, without the scores."""
    d = model.diffusion
    return dict(
        ckpt=str(model.file), method=model.entries.get('method'), step=model.entries.get('step'),
        weights=model.weights_name, T=d.T, stride=FLAGS.stride, nfe=nfe(model),
        seed=FLAGS.seed, num_images=FLAGS.num_images, img_size=model.img_size,
        clipped='in every step', reference=FLAGS.fid_cache,
        reference_images=reference.num_images, labels=labels,
        feature_network=feature_network.name, pixels='float' if FLAGS.fid_float else '8-bit',
        amp=choose(FLAGS.amp, d.alpha.device))


def report(result, reference):
    """Print the scores, and what to bear in mind."""
    features, least = len(reference.mu), min(result['num_images'], reference.num_images or math.inf)
    if least < features:
        print(f'note: {least} images are fewer than the {features} features; compare such a '
              f'distance only with others of the same numbers of images.')
    if reference.features is None:
        print(f'note: {reference.path} holds no features, so precision and recall are left out; '
              f'make it again by score/get_npz.py')
    both = [f'{name} {result[name]:.3f}   ' for name in ('precision', 'recall')
            if result.get(name) is not None]
    print(f'Frechet distance {result["fid"]:.3f}   Inception score {result["inception_score"]:.3f} '
          f'+- {result["inception_std"]:.3f}   {"".join(both)}'
          f'{result["images_per_s"]:.0f} images/s', flush=True)


def write(model, result, images, y):
    """All images with --save_images, the picture, and last the line of results.jsonl."""
    y = None if y is None else y[:len(images)].cpu()
    if FLAGS.save_images:
        pictures.save_images(FLAGS.save_images, images, y)
    folder, shown = model.file.parent, slice(FLAGS.sample_size)
    save_picture(folder / f'sample/eval_nfe{result["nfe"]}_seed{result["seed"]}.png', model,
                 images[shown], None if y is None else y[shown])
    results.append(folder / 'results.jsonl', result)


if __name__ == '__main__':
    cli.run(main)
