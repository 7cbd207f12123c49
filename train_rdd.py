"""Relational diffusion distillation: halve the steps with relations between feature pixels.

From 8 to 4 steps; and all halvings down to 1, one folder per stage (.../rdd/4, 2 and 1):
  python train_rdd.py --flagfile ./config/CIFAR10_RDD.txt
  python train_rdd.py --flagfile ./config/CIFAR10_RDD.txt --logdir ./logs/CIFAR10/rdd --until 1
Four GPUs: the same after `torchrun --nproc_per_node=4`. The same command run again resumes.
Loss: feature_weight * KL of features (CFD) + intra_weight * IS_P2P + memory_weight * M_P2P.
  --loss_type none: the CFD baseline; with --alpha and --beta: RCFD.
"""

import torch
from absl import flags

from classifier.frozen import NORMALISATIONS, load_frozen
from diffusion import distillation_loss
from formats.load import load_teacher
from losses import MemoryP2P, diversity, entropy, feature_kl, intra_sample_p2p
from runtime import cli, distributed, seeding
from runtime.flags import require, without_switch
from runtime.optim import learning_rate
from training import (define_distillation_flags, new_student, noisy_parts, sample_grid, stages,
                      start_run, teacher_and_images)

FLAGS = flags.FLAGS
define_distillation_flags()
flags.DEFINE_string('classifier', 'densenet201', 'network whose features are compared; '
                    'imagenet_resnet50 and others are those of torchvision, at 224 px')
flags.DEFINE_string('classifier_path', None, 'folder or file; none: that of classifier/train.py')
flags.DEFINE_enum('classifier_normalisation', 'stored', list(NORMALISATIONS), 'input normalisation '
                  'of a published classifier; stored: that of its checkpoint, else 05')
flags.DEFINE_bool('feature', True, 'the feature loss (CFD)')
flags.DEFINE_float('feature_weight', 1., 'weight of the feature loss')
flags.DEFINE_float('temperature', 1., 'temperature of the teacher in the feature loss', 1e-6)
flags.DEFINE_alias('temp', 'temperature')       # its name in RCFD
flags.DEFINE_enum('loss_type', 'mp2p', ['mp2p', 'is_p2p', 'm_p2p', 'none'], 'relational terms: '
                  'both, within the batch, to the memory queue, or none')
flags.DEFINE_float('intra_weight', 1., 'weight of IS_P2P')
flags.DEFINE_float('intra_temperature', 1., 'temperature of IS_P2P', 1e-6)
flags.DEFINE_integer('relation_group', 0, 'images per IS_P2P group; 0: batch_size/4 if it fits', 0)
flags.DEFINE_float('memory_weight', 0.1, 'weight of M_P2P')
flags.DEFINE_float('contrast_temperature', 0.1, 'temperature of M_P2P', 1e-6)
flags.DEFINE_integer('queue_size', 20000, 'pixels in the memory queue', 1, 10**6)
flags.DEFINE_integer('queue_update', 128, 'pixels of the batch that enter per step', 1, 10**6)
flags.DEFINE_integer('contrast_size', 4096, 'queue rows a step compares with', 1, 10**6)
flags.DEFINE_enum('queue_layout', 'pixels', ['pixels', 'released'], 'true pixels and fresh rows, '
                  'or the scrambled queue and fixed rows of the published code')
flags.DEFINE_float('alpha', 0., 'weight of the entropy and diversity terms of RCFD')
flags.DEFINE_float('beta', 0., 'share of entropy: alpha * (beta * H + (1 - beta) * D)', 0., 1.)
flags.DEFINE_bool('logits', False, 'add the loss of progressive distillation in x and eps')
flags.DEFINE_float('logits_weight', 1., 'weight of --logits')
flags.DEFINE_bool('gt', False, 'add the base loss of x_pred against x_0')
flags.DEFINE_float('gt_weight', 1., 'weight of --gt')


def main():
    if not (FLAGS.feature or FLAGS.loss_type != 'none' or FLAGS.alpha or FLAGS.logits or FLAGS.gt):
        raise cli.UserError('--nofeature --loss_type none leaves no loss; add --logits or --gt')
    without_switch(logits_weight='logits', gt_weight='gt', beta='alpha')
    largest = max(FLAGS.contrast_size, FLAGS.queue_update)
    if FLAGS.loss_type in ('mp2p', 'm_p2p') and largest > FLAGS.queue_size:
        raise cli.UserError(f'--queue_size {FLAGS.queue_size} is smaller than --contrast_size or '
                            f'--queue_update ({largest}); raise it')
    require(logdir='where results go, such as ./logs/8to4/rdd', base_ckpt='folder of the teacher')
    device = distributed.init(FLAGS.gpu_id, FLAGS.tf32)
    teacher, dataset = teacher_and_images()
    for stage in stages(teacher.diffusion.T):
        train(device, dataset, *stage)
    distributed.cleanup()


def train(device, dataset, base_ckpt, logdir, total_steps):
    teacher, group = load_teacher(base_ckpt, device), relation_group()
    student, diffusion = new_student(teacher)       # a copy, with every second time
    classifier = load_frozen(FLAGS.classifier, FLAGS.classifier_path, dataset,
                             FLAGS.classifier_normalisation, device)
    use_intra, memory = FLAGS.loss_type in ('mp2p', 'is_p2p'), None
    if FLAGS.loss_type in ('mp2p', 'm_p2p'):
        torch.manual_seed(seeding.mix(FLAGS.seed, seeding.WEIGHTS))
        memory = MemoryP2P(classifier.num_features, FLAGS.queue_size, FLAGS.contrast_size,
                           FLAGS.queue_update, FLAGS.contrast_temperature,
                           layout=FLAGS.queue_layout, norm=distributed.GlobalBatchNorm2d).to(device)
    run = start_run('rdd', student, diffusion, dataset, logdir, total_steps, teacher=teacher,
                    classifier=classifier, memory=memory)
    run.prepare(teacher.network, classifier)
    distributed.print0(f'relation_group: IS_P2P compares groups of {group} images.')
    for step in run:
        # Teacher: two DDIM steps from z_t give x_target; the classifier maps it to features
        parts = list(noisy_parts(run, diffusion))
        for part in parts:
            part.z_t = diffusion.add_noise(part.x_0, part.eps, part.t)
            with torch.no_grad(), run.autocast():
                part.x_target = teacher.diffusion.two_step_target(
                    teacher.network, part.z_t, part.t, part.y)
                _, part.feature_T, part.map_T = classifier(part.x_target)
        if memory:
            enqueue(memory, parts, run)

        # Student: one DDIM step to the same place, compared through the classifier
        for part in parts:
            t, z_t, x_target = part.t, part.z_t, part.x_target
            with run.training(part):
                x_pred, eps_pred = diffusion.predict(run.net, z_t, t, part.y)
                logits_S, feature_S, map_S = classifier(x_pred)
            losses = {}         # name: (weight, loss)
            if FLAGS.feature:
                loss = feature_kl(feature_S, part.feature_T, FLAGS.temperature)
                losses['loss_feature'] = FLAGS.feature_weight, loss
            if use_intra:
                loss = intra_sample_p2p(map_S, part.map_T, FLAGS.intra_temperature, group)
                losses['loss_intra'] = FLAGS.intra_weight, loss
            if memory:
                loss = memory(run.head(map_S.float()), part.map_T)
                losses['loss_memory'] = FLAGS.memory_weight, loss
            if FLAGS.alpha:
                mean_probs = distributed.mean_with_grad(logits_S.float().softmax(1).mean(0))
                losses['entropy'] = FLAGS.alpha * FLAGS.beta, entropy(logits_S)
                losses['diversity'] = FLAGS.alpha * (1 - FLAGS.beta), diversity(mean_probs)
            if FLAGS.logits:
                loss = distillation_loss(x_pred, eps_pred, x_target,
                                         diffusion.eps_of(z_t, x_target, t)).mean()
                losses['loss_pd'] = FLAGS.logits_weight, loss
            if FLAGS.gt:
                loss = distillation_loss(x_pred, eps_pred, part.x_0, part.eps).mean()
                losses['loss_gt'] = FLAGS.gt_weight, loss
            run.backward(**losses)
        run.update(learning_rate(step, FLAGS.lr, FLAGS.warmup, total_steps, decay=True))
        sample_grid(run, diffusion)


def relation_group():
    """Images per IS_P2P group: batch_size / 4, or the micro-batch if groups do not fit into it."""
    part, quarter = distributed.share(FLAGS.batch_size, FLAGS.grad_accum), FLAGS.batch_size // 4
    if FLAGS.relation_group and part % FLAGS.relation_group:
        raise cli.UserError(f'--relation_group {FLAGS.relation_group} does not divide the {part} '
                            f'images that a process works on at a time; choose a divisor')
    return FLAGS.relation_group or (quarter if quarter > 1 and part % quarter == 0 else part)


def enqueue(memory, parts, run):
    """Random teacher pixels of the total batch enter the queue; only they are sent around."""
    chosen = memory.choose_pixels(FLAGS.batch_size * parts[0].map_T[0, 0].numel(),
                                  run.generator(seeding.PIXELS, run.step))
    vectors = sum(memory.pixels_at(part.map_T, chosen, part.rows.start, FLAGS.batch_size)
                  for part in parts)
    memory.enqueue(distributed.all_reduce_sum(vectors))
    memory.choose_contrast(run.generator(seeding.CONTRAST, run.step))


if __name__ == '__main__':
    cli.run(main)
