"""Images of a trained model by DDIM: what ddim_eval.py and sample.py share.

Image i starts from noise that depends on (--seed, i) alone, whatever the model, the batches and the
number of processes, so that models can be compared image by image. Labels depend on --seed alone.
"""

import time

import torch
from absl import flags

from formats.load import check_flags, load_model
from runtime import distributed, pictures, seeding
from runtime.cli import UserError
from runtime.flags import (IGNORED, define_device_flags, define_network_flags,
                           define_teacher_steps, without_effect)
from runtime.log import progress
from runtime.precision import autocast, choose, prepare

FLAGS = flags.FLAGS
UNEQUAL = 2     # labels are uniform if no class has more than this times the images of another


def define_model_flags():
    """Which model, and how many steps it takes."""
    define_teacher_steps()
    flags.DEFINE_string('logdir', None, 'folder (or file) of the checkpoint, or a folder of '
                        'diffusers')
    flags.DEFINE_integer('stride', 1, 'steps of the model per DDIM step: NFE = T / stride', 1)
    flags.DEFINE_enum('weights', 'auto', ['auto', 'net', 'ema'], 'weights to use; auto: the '
                      'average for a base model, the raw ones for a distilled student')


def define_sampling_flags(num_images, least=1):
    define_model_flags()
    define_network_flags()
    define_device_flags()
    flags.DEFINE_integer('num_images', num_images, 'images to sample', least, 10**8)
    flags.DEFINE_integer('batch_size', 128, 'images per process and batch', 1, 10**6)
    flags.DEFINE_integer('seed', 0, 'image i starts from noise that depends on (seed, i)', 0)


def given_model():
    """The model in --logdir, on the CPU; its number of steps is a multiple of --stride."""
    model = load_model(FLAGS.logdir, FLAGS.weights, mean_type=FLAGS.mean_type,
                       img_size=FLAGS.img_size, steps=FLAGS.teacher_steps)
    if model.diffusion.T % FLAGS.stride:
        raise UserError(f'--stride {FLAGS.stride} does not divide the {model.diffusion.T} steps of '
                        f'the model in {FLAGS.logdir}; choose a divisor')
    return model


def model_of_flags(device):
    """`given_model` on `device`, in the precision of --amp, compiled with --compile."""
    model = given_model()
    check_flags(model)
    if FLAGS.num_images < distributed.world_size():
        raise UserError(f'--num_images {FLAGS.num_images} is less than the '
                        f'{distributed.world_size()} processes; raise it')
    reasons = dict(dropout='sampling uses none', num_workers='no image files are read')
    if device.type == 'cpu':
        reasons['fid_use_torch'] = 'there is no GPU'
    without_effect(**IGNORED, **reasons)
    model.to(device)
    prepare(choose(FLAGS.amp, device), FLAGS.compile, device, model.network, graphs=True)
    return model


def draw_labels(model, class_counts=None):
    """Labels (--num_images,) on the device of the model, and how they were drawn; None without.

    Uniform labels, as in published evaluations, unless the images per class in the reference,
    `class_counts` (K,), differ by more than a factor `UNEQUAL`: then by these frequencies. (So
    ImageNet, with 732 to 1300 images per class, stays with uniform labels.)
    """
    if not model.arch['conditional']:
        return None, None
    device, class_num = model.diffusion.alpha.device, model.arch['class_num']
    rng, count = seeding.generator('cpu', FLAGS.seed, seeding.LABELS), FLAGS.num_images
    known = class_counts is not None and len(class_counts) == class_num
    if known and max(class_counts) > UNEQUAL * min(class_counts):
        weights = torch.as_tensor(class_counts, dtype=torch.float64)
        y = torch.multinomial(weights, count, replacement=True, generator=rng)
        return y.to(device), 'as in the reference'
    return torch.randint(class_num, (count,), generator=rng).to(device), 'uniform'


@torch.no_grad()
def sampled(model, y):
    """Sample the images of this process, a contiguous share, with labels y (--num_images,) or None.

    Yields:
        indices: range of a batch among all images.
        x_0: (B, 3, H, W) in [-1, 1] on the device of the model.
        seconds: time of the sampler for this batch.
    """
    device = model.diffusion.alpha.device
    rank, processes = distributed.rank(), distributed.world_size()
    indices = range(FLAGS.num_images * rank // processes,
                    FLAGS.num_images * (rank + 1) // processes)
    batches = [indices[i:i + FLAGS.batch_size] for i in range(0, len(indices), FLAGS.batch_size)]
    shape = (3, model.img_size, model.img_size)
    finite = torch.ones((), dtype=torch.bool, device=device)
    with progress(len(indices), f'sample {nfe(model)} steps', unit='img') as bar:
        for batch in batches:
            x_T = seeding.noise_of_images(FLAGS.seed, batch, shape, device)
            labels = None if y is None else y[batch.start:batch.stop]
            since = synchronised_time(device)
            with autocast(FLAGS.amp, device):
                x_0 = model.diffusion.sample(model.network, x_T, FLAGS.stride, y=labels)
            seconds = synchronised_time(device) - since
            finite &= torch.isfinite(x_0).all()
            yield batch, x_0, seconds
            bar.update(len(batch))
    if not finite:      # looked at last, so that no GPU waits
        raise UserError(f'the images hold values that are not finite; the model in {model.file} '
                        f'has diverged', code=1)


def nfe(model):
    """Network evaluations per image."""
    return model.diffusion.T // FLAGS.stride


def save_picture(path, model, images, y):
    """Images uint8 (N, 3, H, W) as a labelled grid, with a row per class if labels y are given."""
    title = f'{model.file}  NFE {nfe(model)}  seed {FLAGS.seed}  {model.weights_name}'
    rows = pictures.rows_by_class(images, y, model.arch['class_num'])
    pictures.save_labelled(path, title, *rows)


def synchronised_time(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()
