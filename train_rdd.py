"""Relational diffusion distillation: halve the steps with relations between feature pixels.

One process, on a GPU or the CPU:
  python train_rdd.py --flagfile ./config/CIFAR10_RDD.txt --base_ckpt ./logs/CIFAR10/8 \\
      --logdir ./logs/8to4/rdd
Four GPUs: the same after `torchrun --nproc_per_node=4`.
The same command run again resumes. Results in --logdir: ckpt.pt, sample/, metrics.jsonl.

Loss: feature_weight * KL of features (CFD) + intra_weight * IS_P2P + memory_weight * M_P2P.
  --loss_type none: the CFD baseline; with --alpha and --beta: RCFD.
"""

import copy

import torch
from absl import flags

from classifier import IMAGENET_PREFIX, load_classifier, load_imagenet
from diffusion import Diffusion, distillation_loss
from losses import MemoryP2P, diversity, entropy, feature_kl, intra_sample_p2p
from runtime import checkpoint, data, distributed, options, seeding
from runtime.options import UserError
from runtime.training import (Log, Meter, Stop, adam, autocast, clip_gradient, compile_networks,
                              draw, due, ema_update, fixed_labels, fixed_noise, frozen,
                              learning_rate, make_logdir, save_samples, seed_dropout,
                              step_optimizer, strict)

FLAGS = flags.FLAGS
options.define_data_flags()
options.define_network_flags()
options.define_training_flags(lr=5e-5)
options.define_device_flags()
flags.DEFINE_string('base_ckpt', None, 'folder (or file) of the teacher')
flags.DEFINE_string('classifier', 'densenet201', 'network whose features are compared; '
                    'imagenet_resnet50 and the like: of torchvision, images resized to 224 px')
flags.DEFINE_string('classifier_path', None, 'its folder or file; none: what classifier/train.py '
                    'wrote for --dataset and --classifier')
flags.DEFINE_bool('feature', True, 'the feature loss (CFD)')
flags.DEFINE_float('temperature', 1., 'temperature of the teacher in the feature loss')
flags.DEFINE_enum('loss_type', 'mp2p', ['mp2p', 'is_p2p', 'm_p2p', 'none'], 'relational terms: '
                  'both, within the batch, to the memory queue, or none')
flags.DEFINE_bool('logits', False, 'add the loss of progressive distillation')
flags.DEFINE_bool('gt', False, 'add the base loss of x_pred against x_0')
flags.DEFINE_float('feature_weight', 1., 'weight of the feature loss')
flags.DEFINE_float('intra_weight', 1., 'weight of IS_P2P')
flags.DEFINE_float('intra_temperature', 1., 'temperature of IS_P2P')
flags.DEFINE_integer('relation_group', 0, 'images whose pixels are compared by IS_P2P; 0: a '
                     'quarter of the batch, as on the four GPUs of the paper', lower_bound=0)
flags.DEFINE_float('memory_weight', 0.1, 'weight of M_P2P')
flags.DEFINE_float('contrast_temperature', 0.1, 'temperature of M_P2P')
flags.DEFINE_integer('queue_size', 20000, 'pixels in the memory queue', lower_bound=1)
flags.DEFINE_integer('queue_update', 128, 'pixels of the batch that enter per step', lower_bound=1)
flags.DEFINE_integer('contrast_size', 4096, 'queue rows a step compares with', lower_bound=1)
flags.DEFINE_enum('queue_layout', 'pixels', ['pixels', 'released'], 'true pixels and fresh rows, '
                  'or the scrambled queue and fixed rows of the published code')
flags.DEFINE_float('alpha', 0., 'weight of the entropy and diversity terms of RCFD')
flags.DEFINE_float('beta', 0.5, 'share of entropy in them: alpha * (beta * H + (1 - beta) * D)')
flags.DEFINE_float('logits_weight', 1., 'weight of --logits')
flags.DEFINE_float('gt_weight', 1., 'weight of --gt')
for name in ('temperature', 'intra_temperature', 'contrast_temperature'):
    flags.register_validator(name, lambda value: value > 0, 'expected a number above 0')


# mean and std of images in [0, 1]; none: as stored with the classifier
NORMALISATION = {
    'stored': (None, None),
    '05': ((0.5,) * 3, (0.5,) * 3),
    'cifar10': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
flags.DEFINE_enum('classifier_normalisation', 'stored', list(NORMALISATION), 'what images are '
                  'normalised with before the classifier, for published ones that do not say; '
                  'stored: as its checkpoint says, else 05')


def main():
    if not (FLAGS.feature or FLAGS.loss_type != 'none' or FLAGS.alpha or FLAGS.logits or FLAGS.gt):
        raise UserError('--nofeature --loss_type none leaves no loss to train with; add --feature, '
                        '--logits, --gt or --alpha')
    if FLAGS.loss_type in ('mp2p', 'm_p2p') and max(
            FLAGS.contrast_size, FLAGS.queue_update) > FLAGS.queue_size:
        raise UserError(f'--queue_size {FLAGS.queue_size} is smaller than --contrast_size '
                        f'{FLAGS.contrast_size} or --queue_update {FLAGS.queue_update}; raise it')
    options.require(logdir='the folder this run writes to, such as ./logs/8to4/rdd',
                    base_ckpt='the folder of the teacher, such as ./logs/CIFAR10/8')
    device = distributed.init(FLAGS.gpu_id)
    train(device)
    distributed.cleanup()


def frozen_classifier(num_classes):
    """The network whose features are compared, in eval mode; one of ImageNet needs no labels."""
    if FLAGS.classifier.startswith(IMAGENET_PREFIX):
        for line in options.without_effect(
                classifier_normalisation='these weights expect that of ImageNet'):
            distributed.print0(line)
        return load_imagenet(FLAGS.classifier, FLAGS.classifier_path)
    path = FLAGS.classifier_path or f'classifier/result/{FLAGS.dataset}/{FLAGS.classifier}'
    return load_classifier(path, FLAGS.classifier, num_classes,
                           *NORMALISATION[FLAGS.classifier_normalisation])


def relation_group():
    """Images per group of IS_P2P: independent of the number of processes where that is possible."""
    share = FLAGS.batch_size // (distributed.world_size() * FLAGS.grad_accum)
    if FLAGS.relation_group and share % FLAGS.relation_group:
        raise UserError(f'--relation_group {FLAGS.relation_group} does not divide the {share} '
                        f'images that a process works on at a time; choose a divisor')
    quarter = FLAGS.batch_size // 4
    return FLAGS.relation_group or (quarter if quarter and share % quarter == 0 else share)


def enqueue_pixels(memory, maps_T, step, device):
    """Random pixels of the whole batch enter the queue; only these travel between processes."""
    rng = seeding.generator(device, FLAGS.seed, seeding.PIXELS, step)
    hw, vectors = maps_T[0].shape[2] * maps_T[0].shape[3], 0
    numbers = memory.choose_pixels(FLAGS.batch_size * hw, rng)
    for micro, map_T in enumerate(maps_T):
        first = distributed.rows(FLAGS.batch_size, micro, FLAGS.grad_accum).start
        vectors = vectors + memory.pixels_at(map_T, numbers, first, FLAGS.batch_size)
    memory.enqueue(distributed.all_reduce_sum(vectors))
    memory.choose_contrast(seeding.generator(device, FLAGS.seed, seeding.CONTRAST, step))


def train(device):
    # Data
    distributed.check_batch(FLAGS.batch_size, FLAGS.grad_accum)
    group = relation_group()
    given = checkpoint.load_teacher(FLAGS.base_ckpt, FLAGS)
    dataset = data.make_dataset(FLAGS.dataset, FLAGS.data_root, FLAGS.img_size, train=True,
                                num_workers=FLAGS.num_workers,
                                skip_bad_images=FLAGS.skip_bad_images)
    options.check_size(dataset)
    options.check_labels(dataset, given.conditional, given.class_num)

    # Teacher and classifier (frozen), student, memory queue with its projection head
    T, time_scale = given.T // 2, given.time_scale * 2
    teacher = frozen(given.network.to(device, memory_format=torch.channels_last))
    classifier = frozen_classifier(dataset.num_classes).to(
        device, memory_format=torch.channels_last)
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.time_embedding.timembedding[0].requires_grad_(False)    # a table, not a parameter
    teacher_diffusion = Diffusion(given.T, given.time_scale, FLAGS.mean_type, device)
    diffusion = Diffusion(T, time_scale, FLAGS.mean_type, device)
    ema = frozen(copy.deepcopy(student)) if FLAGS.ema_decay else None
    torch.manual_seed(seeding.mix(FLAGS.seed, seeding.WEIGHTS))
    memory = distributed.sync_batch_norm(MemoryP2P(
        classifier.num_features, FLAGS.queue_size, FLAGS.contrast_size, FLAGS.queue_update,
        FLAGS.contrast_temperature, layout=FLAGS.queue_layout)).to(device)
    student_ddp, memory_ddp = distributed.wrap_ddp(student), distributed.wrap_ddp(memory)
    params = [p for p in student.parameters() if p.requires_grad]
    compile_networks(FLAGS.compile, device, teacher, classifier, student_ddp)
    use_intra = FLAGS.loss_type in ('mp2p', 'is_p2p')
    use_memory = FLAGS.loss_type in ('mp2p', 'm_p2p')

    # Optimisers; the head has its own, with a constant rate and no clipping, as released
    optim = adam(params, FLAGS.lr, FLAGS.wd)
    optim_head = adam(list(memory.parameters()), FLAGS.lr, FLAGS.wd)

    # Resume
    x_T = fixed_noise(FLAGS.seed, FLAGS.sample_size, FLAGS.img_size, device)
    y_T = fixed_labels(FLAGS.sample_size, given.class_num, given.conditional, device)
    start, state = 0, checkpoint.resume(
        FLAGS.logdir, student, 'rdd', T, time_scale, FLAGS.base_ckpt)
    if state:
        start = state['step']
        checkpoint.restore(state, net_model=student, ema_model=ema, optim=optim, memory=memory,
                           optim_head=optim_head)
    if start >= FLAGS.total_steps:
        return distributed.print0(f'{FLAGS.logdir} is finished: step {start}.')
    make_logdir(FLAGS.logdir)
    options.announce(device, FLAGS.logdir, start, images=len(dataset), teacher_steps=given.T,
                     student_steps=T, relation_group=group)

    def save(step):
        averaged = dict(ema_model=ema.state_dict()) if ema else {}
        checkpoint.save_run(
            FLAGS.logdir, FLAGS.keep, net_model=student.state_dict(), x_T=x_T.cpu(), T=T,
            time_scale=time_scale, method='rdd', step=step, optim=optim.state_dict(),
            memory=memory.state_dict(), optim_head=optim_head.state_dict(),
            meter=meter.state_dict(), **averaged, **options.facts())

    def loss_terms(z_t, t, y, x_0, eps, x_target, out_T):
        """{name: (weight, loss)} of one part of the batch."""
        (_, feature_T, map_T), terms = out_T, {}
        with autocast(FLAGS.amp, device):
            x_pred, eps_pred = diffusion.predict(student_ddp, z_t, t, y)
            logits_S, feature_S, map_S = classifier(x_pred)
        if FLAGS.feature:
            terms['loss_feature'] = (FLAGS.feature_weight,
                                     feature_kl(feature_S, feature_T, FLAGS.temperature))
        if use_intra:
            terms['loss_intra'] = (FLAGS.intra_weight, intra_sample_p2p(
                map_S, map_T, FLAGS.intra_temperature, group))
        if use_memory:
            terms['loss_memory'] = (FLAGS.memory_weight, memory_ddp(map_S, map_T))
        if FLAGS.alpha:
            mean_probs = distributed.mean_with_grad(logits_S.float().softmax(1).mean(0))
            terms['entropy'] = (FLAGS.alpha * FLAGS.beta, entropy(logits_S))
            terms['diversity'] = (FLAGS.alpha * (1 - FLAGS.beta), diversity(mean_probs))
        if FLAGS.logits:
            eps_target = diffusion.eps_of(z_t, x_target, t)
            terms['loss_pd'] = (FLAGS.logits_weight, distillation_loss(
                x_pred, eps_pred, x_target, eps_target).mean())
        if FLAGS.gt:
            terms['loss_gt'] = (FLAGS.gt_weight, distillation_loss(
                x_pred, eps_pred, x_0, eps).mean())
        return terms

    # Loop
    batches = data.batches(dataset, FLAGS.batch_size, FLAGS.seed, device, start, FLAGS.grad_accum,
                           num_workers=FLAGS.num_workers)
    meter, stop = Meter(state and state.get('meter')), Stop()
    log = Log(FLAGS.logdir, f'RDD {given.T}->{T}', start, FLAGS.total_steps, FLAGS.batch_size)
    student.train()
    memory.train()
    for step in range(start + 1, FLAGS.total_steps + 1):
        rng = seeding.generator(device, FLAGS.seed, seeding.NOISE, T, step)
        t_all, eps_all = draw(FLAGS.batch_size, x_T.shape[1:], 1, T, rng)

        # Teacher: two DDIM steps, then what the classifier sees in the target
        parts = []
        for micro in range(FLAGS.grad_accum):
            rows = distributed.rows(FLAGS.batch_size, micro, FLAGS.grad_accum)
            x_0, y = next(batches)
            t, eps = t_all[rows] * time_scale, eps_all[rows]
            z_t = diffusion.add_noise(x_0, eps, t)
            with torch.no_grad(), autocast(FLAGS.amp, device):
                x_target = teacher_diffusion.two_step_target(teacher, z_t, t, y)
                out_T = classifier(x_target)
            parts.append((z_t, t, y, x_0, eps, x_target, out_T))
        if use_memory:
            enqueue_pixels(memory, [part[-1][2] for part in parts], step, device)

        # Student: one DDIM step to the same place, compared through the classifier
        for micro, part in enumerate(parts):
            last = micro + 1 == FLAGS.grad_accum
            rows = distributed.rows(FLAGS.batch_size, micro, FLAGS.grad_accum)
            seed_dropout(student, rows, FLAGS.batch_size, FLAGS.seed, T, step)
            with distributed.no_sync(student_ddp, not last), \
                    distributed.no_sync(memory_ddp, not last):
                terms = loss_terms(*part)
                loss = sum(weight * term for weight, term in terms.values())
                (strict(loss) / FLAGS.grad_accum).backward()
            meter.add(loss=loss, **{name: term for name, (_, term) in terms.items()})

        lr = learning_rate(step, FLAGS.lr, FLAGS.warmup, FLAGS.total_steps, decay=True)
        norm = clip_gradient(params, FLAGS.grad_clip)
        finite = norm.isfinite()        # on the device: nothing waits for it
        if use_memory:
            finite &= clip_gradient(list(memory.parameters()), 0).isfinite()
            step_optimizer(optim_head, finite)      # both step, or none
        step_optimizer(optim, finite, lr)
        if ema:
            ema_update(ema, student, FLAGS.ema_decay)
        meter.add(grad_norm=norm)
        meter.end_step(finite)

        if due(step, FLAGS.log_step, FLAGS.total_steps):
            meter.check(step, FLAGS.max_bad_steps)
            log.write(step, lr=lr, **meter.mean())
        log.bar.update()
        stopping = stop.asked()
        if due(step, FLAGS.sample_step) and not stopping:
            save_samples(log, step, FLAGS.logdir, diffusion, student, x_T, y_T, FLAGS.amp)
        if due(step, FLAGS.save_step, FLAGS.total_steps) or stopping:
            save(step)
        if stopping:
            break
    log.close()
    stop.leave_if_asked(FLAGS.logdir, step)


if __name__ == '__main__':
    options.run(main)
