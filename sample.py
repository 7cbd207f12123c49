"""Images of a model, without scoring them.

  python sample.py --logdir ./logs/8to4/rdd --output ./samples.png
  python sample.py --logdir ./logs/CIFAR10/1024 --stride 128 --num_images 1000 --output ./samples
--logdir is the folder of a run, a checkpoint (published ones too), or a folder of diffusers.
--output decides what is written: NAME.png a grid with a row per class; NAME.npz all images in one
file, arr_0: uint8 (N, H, W, 3), and arr_1: labels, if any; another name a new folder of PNGs.

With one --seed, image i has the same noise and label for every model, so that models can be
compared image by image. They are the images that ddim_eval.py scores, unless the classes of its
reference are unequal, where it draws labels by their frequencies.
"""

import torch
from absl import flags

from runtime import cli, distributed, pictures
from runtime.flags import require
from score.sampling import (define_sampling_flags, draw_labels, model_of_flags, sampled,
                            save_picture)

FLAGS = flags.FLAGS
define_sampling_flags(num_images=64)
flags.DEFINE_integer('label', None, 'class of all images, counted from 0; none: all classes', 0)
flags.DEFINE_string('output', None, 'what to write: NAME.png, NAME.npz, or a new folder')


def main():
    require(logdir='the folder of a trained model, such as ./logs/8to4/rdd',
            output='where the images go, such as ./samples.png')
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    if distributed.is_main():
        pictures.check_place(FLAGS.output, '--output', ('.png', '.npz'))
    model = model_of_flags(device)
    y, _ = draw_labels(model)
    if FLAGS.label is not None:
        class_num = model.arch['class_num'] if model.arch['conditional'] else 0
        if FLAGS.label >= class_num:
            raise cli.UserError(f'--label is {FLAGS.label} and the model in {FLAGS.logdir} has '
                                f'{class_num} classes, counted from 0; lower it, or leave it out')
        y.fill_(FLAGS.label)
    own = [pictures.to_uint8(x_0).cpu() for _, x_0, _ in sampled(model, y)]
    images = distributed.gather_main(torch.cat(own))
    if distributed.is_main():
        y = None if y is None else y.cpu()
        if FLAGS.output.endswith('.png'):
            classes = None if FLAGS.label is not None else y    # one class alone fills a square
            save_picture(FLAGS.output, model, images, classes)
        else:
            pictures.save_images(FLAGS.output, images, y)
        print(f'{FLAGS.output}: {len(images)} images', flush=True)
    distributed.cleanup()


if __name__ == '__main__':
    cli.run(main)
