"""The deliberate faults of tools/faults.py, continued: data, files, processes, scores."""

from tools.faults_table import file

file(
    'runtime/data.py',
    ('images in [0, 1]', 'div_(127.5).sub_(1)', 'div_(255.)', 'wiring base-plain'),
    ('labels of other images', 'yield images[chosen], labels[chosen]',
     'yield images[chosen], labels[chosen.flip(0)]', 'wiring base-plain'),
    ('digits are mirrored', 'small.expand(-1, 3, -1, -1), flip=False)',
     'small.expand(-1, 3, -1, -1))', 'wiring base-plain + data'),
    ('the order is the same in every pass', 'seeding.ORDER, number)', 'seeding.ORDER)', 'data'),
    ('flips are the same in every step', 'seeding.FLIP, step)', 'seeding.FLIP)', 'data'),
    ('augmentation is ignored', '    if augment:\n', '    if False:\n',
     'wiring_classifier train-released or released_images'),
    ('positions are those of the part', 'first = step * total +', 'first =',
     'wiring_classifier augmentation'),
    ('the test split trains', "'train' if train else 'test')\n    if skip",
     "'train')\n    if skip", 'data + wiring_classifier train-plain'))

file(
    'runtime/idx_files.py',
    ('the test split trains', "'train' if split == 'train' else 't10k'", "'t10k'", 'fashion'),
    ('the header is read as pixels', 'offset=start', 'offset=0, count=len(content) - start',
     'fashion'),
    ('truncated files', ' or len(content) != start + math.prod(shape)', '', 'fashion'),
    ('labels taken for images', 'bytes([0, 0, 8, dimensions])', 'content[:4]', 'fashion'))

file(
    'runtime/image_files.py',
    ('images are squashed', 't.Resize(img_size, antialias=True), t.CenterCrop(img_size)',
     't.Resize((img_size, img_size), antialias=True)', 'wiring base-folder'),
    ('the corner is cropped', 't.CenterCrop(img_size)',
     't.Lambda(lambda i: i.crop((0, 0, img_size, img_size)))', 'wiring base-folder'),
    ('not antialiased', 'antialias=True', 'antialias=False', 'data',
     'Pillow images, which this decodes, are always antialiased'))

file(
    'runtime/seeding.py',
    ('keys are added', 'np.random.SeedSequence(key)', 'np.random.SeedSequence(sum(key))',
     'wiring streams'),
    ('all images from one noise', 'seed, SAMPLES, int(i)', 'seed, SAMPLES',
     'wiring_classifier eval-plain'),
    ('every batch but the first comes twice', 'thread.submit(draw, following)',
     'thread.submit(draw, indices)', 'few_operations'))

file(
    'runtime/checkpoint.py',
    ('the file keeps its rate and decay',
     'part.load_state_dict(_with_groups_of(part, state[name]))',
     'part.load_state_dict(state[name])', 'wiring resumed'),
    ('optimisers start again', 'part.load_state_dict(_with_groups_of(part, state[name]))', 'pass',
     'wiring resumed'),
    ('weights that are not finite are saved', '        if tensors and not '
     'torch.stack', '        if not found and name != "net_model" and tensors and not torch.stack',
     'wiring lost'),
    ('no rename', 'os.replace(temporary, path)', 'shutil.copyfile(temporary, path)', 'checkpoint'),
    ('one earlier file too few', 'files[here + keep + 1:]', 'files[here + keep:]', 'checkpoint'),
    ('a run of other steps goes on', "(state.get('method'), state['T'], state['time_scale']) != "
     '(method, T, time_scale)', "state.get('method') != method", 'checkpoint'))

file(
    'runtime/models.py',
    ('never twice the steps', 'steps <= 2', 'steps < 1', 'wiring test_until'),
    ('every stage starts from the first teacher', '        before = folder', '',
     'wiring test_until'),
    ('the student of a base model starts from its raw weights',
     "'use', 'ema_model' if base else 'net_model')", "'use', 'net_model')", 'wiring pd-plain'),
    ('the grid of the student', 'd.with_steps(d.T // 2, ', 'd.with_steps(d.T, ',
     'wiring pd-plain'),
    ('students predict x_0', 'd.with_steps(d.T // 2, flags.mean_type)',
     "d.with_steps(d.T // 2, 'xstart')", 'wiring pd-mean_type'),
    ('the student shares the weights of the teacher', 'copy.deepcopy(self.network).train()',
     'self.network.train()', 'wiring pd-plain'),
    ('the table of times is trained',
     "network.time_embedding.timembedding[0].requires_grad_(False)",
     "network.time_embedding.timembedding[0].requires_grad_(True)", 'wiring pd-plain'),
    ('the dropout of students is ignored', 'load_model(path, dropout=flags.dropout, ',
     'load_model(path, ', 'wiring pd-dropout'),
    ('`--weights` is ignored', "dict(net='net_model', ema='ema_model').get(wanted) or ", '',
     'wiring_classifier eval-net'))

file(
    'runtime/distributed.py',
    ('freed memory goes back', 'libc.mallopt(M_MMAP_MAX, 0)', 'pass', 'few_operations'),
    ('a sum for a mean', 'return all_reduce(tensor) / world_size()', 'return all_reduce(tensor)',
     'wiring two_processes'),
    ('all processes take the first rows', '(micro * world_size() + rank()) * length',
     '(micro * world_size()) * length', 'wiring two_processes'),
    ('parts one after another per process', '(micro * world_size() + rank()) * length',
     '(micro + rank() * accum) * length', 'data'),
    ('biased running variance', 'var * count / (count - 1)', 'var', 'wiring rdd-plain'),
    ('running mean of the batch alone', 'mean.where(finite, self.running_mean), weight)',
     'mean.where(finite, self.running_mean), 1.)', 'wiring rdd-plain'))

file(
    'runtime/log.py',
    ('sums for means', '{name: s / n if n else math.nan', '{name: s if n else math.nan',
     'wiring base-grad_accum + log'),
    ('the meter is never emptied', 'self.sums, self.before, self.bad = {}, {}, torch.zeros_like('
     'self.bad)', 'self.bad = torch.zeros_like(self.bad)', 'wiring base-plain'),
    ('a step twice in the log', "json.loads(line)['step'] <= step", "True", 'wiring log_lines'),
    ('bad steps are not counted', 'self.bad.to(finite.device) + ~finite', 'self.bad.to('
     'finite.device) + 0 * ~finite', 'log'),
    ('the streak never ends', '(self.streak.to(finite.device) + 1) * ~finite',
     'self.streak.to(finite.device) + ~finite', 'log'))

file(
    'runtime/guard.py',
    ('no lock', 'fcntl.LOCK_EX | fcntl.LOCK_NB', 'fcntl.LOCK_SH | fcntl.LOCK_NB', 'guard'),
    ('handlers stay', 'signal.signal(number, handler)\n\n', 'pass\n\n', 'guard'),
    ('a second signal is ignored', 'elif now - self.since > 2:', 'elif False:', 'guard'),
    ('signals are lost in the last step', 'if not last and step < self.next', 'if step < self.next',
     'guard'),
    ('every process has its own interval', 'distributed.largest(self.received, nanoseconds)',
     'distributed.largest(self.received, nanoseconds)[0], nanoseconds', 'guard'))

file(
    'runtime/precision.py',
    ('bf16 is ignored', "choose(amp, device) == 'bf16'", 'False', 'wiring bf16'),
    ('always bf16', "choose(amp, device) == 'bf16'", 'True', 'wiring base-plain'),
    ('weights are rounded in float32', "if amp == 'bf16':\n        hold", 'if True:\n        hold',
     'few_operations'),
    ('AMX alone counts as fast', " or 'avx512_bf16' in found", '', 'few_operations'),
    ('fine grids in bfloat16', ' and steps <= FINE', '', 'few_operations'))

file(
    'runtime/pictures.py',
    ('floor for round', '(x.float() * 127.5 + 127.5).round()', '(x.float() * 127.5 + 127.5)',
     'wiring_classifier eval-plain'),
    ('channels first in the npz', 'images.permute(0, 2, 3, 1).numpy()\n    path.parent',
     'images.numpy()\n    path.parent', 'wiring_classifier eval-plain'),
    ('labels are left out', '*([] if y is None else [y.cpu().numpy()])', '',
     'wiring_classifier eval-plain'))

file(
    'runtime/flags.py',
    ('default of --wd', "'wd', wd, 'weight", "'wd', 0.1, 'weight", 'wiring defaults'),
    ('default of --grad_clip', "'grad_clip', 1.,", "'grad_clip', 0.,", 'wiring defaults'),
    ('resolved flags are lost', "flag.serialize() for flag in own_flags()",
     "flag.serialize() for flag in own_flags()[:3]", 'wiring resolved'))

file(
    'runtime/cli.py',
    ('nan is accepted', 'not math.isfinite(flag.value)', 'False', 'wiring mistakes'),
    ('words are accepted', 'if rest and not words:', 'if False:', 'wiring mistakes'),
    ('a mistake ends well', 'fail(str(error), error.code)', 'fail(str(error), 0)',
     'wiring mistakes'))

file(
    'ddim_eval.py',
    ('every label is 0', "y = torch.randint(model.arch['class_num'], (",
     "y = 0 * torch.randint(model.arch['class_num'], (", 'wiring_classifier eval-plain'),
    ('labels of the first images', 'y[indices.start:indices.stop]', 'y[:len(indices)]',
     'wiring_classifier eval-plain'),
    ('`--stride` is ignored', 'x_T, FLAGS.stride, y=labels)', 'x_T, y=labels)',
     'wiring_classifier eval-plain'),
    ('`--seed` is ignored', 'noise_ahead(FLAGS.seed, ', 'noise_ahead(0, ',
     'wiring_classifier eval-seed'),
    ('`--weights` is ignored', 'load_model(FLAGS.logdir, FLAGS.weights, ',
     'load_model(FLAGS.logdir, ',
     'wiring_classifier eval-net'),
    ('`--fid_float` is ignored', 'x_0 if FLAGS.fid_float else images', 'images',
     'wiring_classifier eval-fid_float'),
    ('mean and covariance swapped', 'reference.mu, reference.sigma,',
     'reference.mu * 0, reference.sigma,', 'wiring_classifier eval-plain'),
    ('the conditional network gets none', "y = y if model.arch['conditional'] else None",
     "y = y if not model.arch['conditional'] else None", 'wiring_classifier eval-plain'))

file(
    'classifier/train.py',
    ("no Nesterov's momentum", "nesterov=FLAGS.recipe == 'plain'", 'nesterov=False',
     'wiring_classifier train-plain'),
    ('`--wd` is ignored', 'weight_decay=FLAGS.wd', 'weight_decay=5e-4',
     'wiring_classifier train-plain'),
    ('no crop', 'if not released:', 'if False:', 'wiring_classifier train-plain'),
    ('the rate is constant', "group['lr'] = rate_of(", "_ = rate_of(",
     'wiring_classifier train-plain'),
    ('`--normalize05` is ignored', 'if FLAGS.normalize05:\n        return',
     'if False:\n        return',
     'wiring_classifier train-normalize05'),
    ('the released rate falls once', '(FLAGS.epoch // 2, FLAGS.epoch * 3 // 4)',
     '(FLAGS.epoch // 2,)', 'wiring_classifier train-released'),
    ('the rate falls a step late', '(step - 1) // steps_per_epoch, FLAGS',
     'max(0, step - 2) // steps_per_epoch, FLAGS', 'wiring_classifier train-released'),
    ('eval mode after the first epoch', '            model.train()\n', '',
     'wiring_classifier train-plain'),
    ('the crop is the same in every step', 'seeding.CROP, step)', 'seeding.CROP)',
     'wiring_classifier train-plain'),
    ('standard deviation without root', '.clamp(min=1e-4).sqrt()', '.clamp(min=1e-4)',
     'wiring_classifier train-plain'),
    ('accuracy of the training mode', '    model.eval()\n', '    pass\n',
     'wiring_classifier train-plain'))

file(
    'classifier/networks.py',
    ('no ReLU on the map', 'feature_map = F.relu(h)', 'feature_map = h', 'classifier + parity'),
    ('sum for average', 'feature_map.mean((2, 3))', 'feature_map.sum((2, 3))', 'classifier'),
    ('images are not normalised', 'h = self.normalise(x)', 'h = x', 'wiring rdd-plain'))

file(
    'classifier/frozen.py',
    ('batch norms act twice', 'setattr(module, name, nn.Identity())', 'pass', 'few_operations'),
    ('nothing is folded', 'fold_batch_norms(network).to', 'network.to', 'few_operations'))

file(
    'classifier/augment.py',
    ('no cutout', 'return cutout(pixels, *centre, self.img_size // 2)', 'return pixels',
     'wiring_classifier train-released or released_images'),
    ('one change for all positions', 'seeding.AUGMENT, position)', 'seeding.AUGMENT)',
     'wiring_classifier augmentation'),
    ('row and column swapped', 'top, left = max(0, row - length // 2), max(0, column',
     'top, left = max(0, column - length // 2), max(0, row', 'wiring_classifier augmentation'),
    ('digits are mirrored', '.5 if flip else 0.', '.5', 'wiring_classifier augmentation'))

file(
    'classifier/checkpoint.py',
    ('the stored mean is ignored', "mean or state.get('mean', IDENTITY)", 'mean or IDENTITY',
     'wiring rdd-plain'),
    ('the classifier trains on', 'return classifier.eval()', 'return classifier.train()',
     'wiring rdd-plain'))

file(
    'score/metrics.py',
    ('biased covariance', '/ (count - 1)', '/ count', 'score'),
    ('no square of the mean', 'sum_ff - count * torch.outer(mu, mu)', 'sum_ff', 'score'),
    ('sigma2 without its root', '- 2 * eigenvalues.sqrt().sum()', '- 2 * eigenvalues.sum()',
     'score'),
    ('splits of the batch', 'which = indices * splits // total',
     'which = torch.arange(len(probs), device=probs.device) * splits // len(probs)',
     'score + wiring_classifier eval-plain'))

file(
    'score/networks.py',
    ('images in [0, 1] for the classifier', 'classifier(images * 2 - 1)', 'classifier(images)',
     'wiring_classifier eval-plain'),
    ('float images are not moved', 'return (images.float() + 1) / 2', 'return images.float()',
     'wiring_classifier eval-fid_float'))

file(
    'score/get_npz.py',
    ('the second half is the first', 'indices[FLAGS.half - 1::2]', 'indices[::2]',
     'wiring_classifier statistics'),
    ('positions are those of the class order', 'positions[done:done + len(images)]',
     'torch.arange(done, done + len(images))', 'score'))

file(
    'score/reference.py',
    ('another network is accepted', 'statistics.network != network.name:', 'False:', 'score'))
