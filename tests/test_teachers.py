"""Teachers of diffusers: the same images, students, layouts that people have, odd folders."""

import copy
import json
import re
import shutil

import pytest
import torch
from absl import flags

import training
from formats import diffusers_read, diffusers_write
from formats.load import load_model
from runtime.cli import UserError
from helpers import (DATA, ROOT, SMALL, STEPS, Call, assert_ran, command, diffusers, fork_all,
                     make_scorer, noise, our_images, parsing, their_images)

FLAGS = flags.FLAGS
# the structure of google/ddpm-cifar10-32, in widths and a size that a test can afford
GOOGLE = dict(sample_size=16, layers_per_block=2, block_out_channels=(32, 64, 64, 64),
              norm_eps=1e-6, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
              attention_head_dim=None,
              down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'),
              up_block_types=('UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'))
TRAINING = [*DATA, *STEPS, '--total_steps=1', '--batch_size=4', '--img_size=8']
SECTION = (ROOT / 'README.md').read_text().split('## Distil a teacher you already have\n')[1]


def pipeline(folder, schedule=None, **config):
    """A folder as diffusers saves a pipeline, with random weights; returns network, scheduler."""
    lib = diffusers()
    torch.manual_seed(2)
    unet = lib.UNet2DModel(**dict(SMALL, **config)).eval()
    scheduler = lib.DDPMScheduler(**(schedule or {}))
    lib.DDPMPipeline(unet, scheduler).save_pretrained(str(folder))
    return unet, scheduler


# Networks and students

def test_a_schedule_of_its_own_comes_before_that_of_a_neighbour(tmp_path):
    """A flat folder inside that of a pipeline."""
    diffusers()
    for place, count in (('mine', 10), ('scheduler', 20)):
        (tmp_path / place).mkdir()
        (tmp_path / place / 'scheduler_config.json').write_text(json.dumps(dict(
            _class_name='DDIMScheduler', num_train_timesteps=count)))
    assert diffusers_read.read_schedule(tmp_path / 'mine')['T'] == 10
    assert diffusers_read.read_schedule(tmp_path / 'unet')['T'] == 20


LABELS = dict(num_class_embeds=10)
# their filters are not among the weights
FILTERS = dict(down_block_types=['KDownBlock2D'] * 2, up_block_types=['KUpBlock2D'] * 2)


@pytest.mark.parametrize('config, beta_schedule, prediction, steps', [
    (GOOGLE, 'linear', 'epsilon', 4), (LABELS, 'linear', 'epsilon', 8),
    ({}, 'linear', 'sample', 50), ({}, 'linear', 'v_prediction', 8),
    ({}, 'scaled_linear', 'epsilon', 8), (FILTERS, 'linear', 'sample', 2),
    (LABELS, 'squaredcos_cap_v2', 'v_prediction', 50)])
def test_a_network_makes_its_images(tmp_path, config, beta_schedule, prediction, steps):
    unet, scheduler = pipeline(
        tmp_path, dict(beta_schedule=beta_schedule, prediction_type=prediction), **config)
    model = load_model(tmp_path, steps=steps)
    theirs = diffusers().DDIMScheduler.from_config(
        scheduler.config, timestep_spacing='trailing', set_alpha_to_one=True, steps_offset=0,
        clip_sample=True, prediction_type=prediction)
    theirs.set_timesteps(steps)
    x_T = noise(2, model.img_size).double()
    y = torch.tensor([3, 9]) if config == LABELS else None
    unet.double(), model.network.double()   # random weights enlarge the rounding of float32
    found, wanted = our_images(model, x_T, y), their_images(unet, theirs, x_T, y)
    assert found.std() > .1 and (found - wanted).abs().max() < 1e-5
    assert model.img_size == unet.config.sample_size and not model.network.training
    assert model.diffusion.times()[:-1] == (theirs.timesteps + 1).tolist()
    with torch.no_grad():
        t = torch.tensor([0, 999])
        assert (unet(x_T, t, y).sample - model.network(x_T, t + 1, y)).abs().max() < 1e-9


def test_precision_and_dropout(tmp_path):
    """Group norms in float32 under bfloat16 autocast, in copies too; --dropout in training only."""
    pipeline(tmp_path, dropout=.5)
    model, seen = load_model(tmp_path, steps=4, dropout=.25), {}
    network = copy.deepcopy(model.network)
    for module in network.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.Conv2d)):
            module.register_forward_hook(
                lambda module, _, out: seen.setdefault(type(module), set()).add(out.dtype))
    x, t = noise(2), torch.tensor([1, 1000])
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        network(x, t)
    assert seen == {torch.nn.GroupNorm: {torch.float32}, torch.nn.Conv2d: {torch.bfloat16}}
    assert {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)} == {.25, 0.}
    student = model.trainable()
    assert torch.equal(network(x, t), network(x, t)) and not network.training
    assert not torch.equal(student(x, t), student(x, t))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in model.network.parameters())     # it is a copy


ZERO_SNR = dict(prediction_type='v_prediction', rescale_betas_zero_snr=True)


@pytest.mark.parametrize('schedule, words, expected', [
    ({}, [], 'v'), ({}, ['--mean_type=epsilon'], 'epsilon'), ({}, ['--mean_type=xstart'], 'xstart'),
    (dict(prediction_type='sample'), [], 'xstart'), (ZERO_SNR, [], 'v'),
    (ZERO_SNR, ['--mean_type=xstart'], 'xstart'), (ZERO_SNR, ['--mean_type=epsilon'], None)])
def test_students_of_every_output(tmp_path, capsys, schedule, words, expected):
    """The default of an eps teacher is v, of others their own output."""
    pipeline(tmp_path, schedule)
    teacher = load_model(tmp_path, steps=8)
    assert (teacher.diffusion.alpha[-1] == 0) == (schedule == ZERO_SNR)
    with parsing(training.define_distillation_flags) as parse:
        parse(*words)
        if expected is None:
            with pytest.raises(UserError, match='ends with alpha 0.*--mean_type=v'):
                training.new_student(teacher)
            return
        network, diffusion = training.new_student(teacher)
        assert (diffusion.T, diffusion.mean_type, FLAGS.mean_type) == (4, expected, expected)
    note = teacher.diffusion.mean_type != expected
    assert ('note: the student predicts' in capsys.readouterr().out) == note
    assert diffusion.predict(network, noise(), torch.tensor([250, 500, 1000]))[0].isfinite().all()


def test_exports_of_zero_snr_work_with_other_schedulers(tmp_path):
    pipeline(tmp_path / 'zero', ZERO_SNR)
    diffusers_write.write(load_model(tmp_path / 'zero', steps=4), 1, tmp_path)
    for name in ('DDIMScheduler', 'DPMSolverMultistepScheduler'):
        scheduler = getattr(diffusers(), name).from_pretrained(str(tmp_path / 'scheduler'))
        scheduler.set_timesteps(4)
        z = noise()
        for t in scheduler.timesteps:
            z = scheduler.step(z, t, z).prev_sample
        assert z.isfinite().all(), name


# README's section and RDD

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Where the scripts run: with teachers, a classifier and the flagfiles."""
    folder = tmp_path_factory.mktemp('teacher')
    (folder / 'config').symlink_to(ROOT / 'config')
    pipeline(folder / 'ddpm-cifar10-32', attention_head_dim=None)
    pipeline(folder / 'labels', **LABELS)
    make_scorer(folder, 'densenet_small')
    return folder


def run_in(folder, *commands):
    """What commands print, one after the other."""
    results = fork_all(dict(run=[command(words, cwd=str(folder)) for words in commands]))['run']
    assert_ran(results)
    return [output for _, output, _ in results]


def test_the_section_runs_as_written(folder):
    lines = SECTION.split('```')[1].strip().splitlines()
    distil, measure, evaluate, dmd = (
        line.split()[1:] for line in lines if line.startswith('python'))
    assert measure[0] == 'score/get_npz.py'     # it would download CIFAR-10
    output, *_ = run_in(folder, [*distil, *TRAINING], [*dmd, *TRAINING], [
        *evaluate, '--fid_cache=stats.npz', f'--feature_network={folder}/classifier.pt',
        '--num_images=4', '--batch_size=4', '--sample_size=2', '--img_size=8'])
    assert output.count('note: the student predicts v') == 1    # in the first stage
    for T in (64, 32, 16, 8, 4, 2, 1):
        student = load_model(folder / f'logs/mine/{T}')
        assert student.diffusion.times()[::-1] == [round(k * 1000 / T) for k in range(T + 1)]
        assert student.diffusion.mean_type == 'v' and student.entries['origin'] == 'ddpm-cifar10-32'
    assert student.entries['step'] == 2     # twice as long, as for the last two halvings
    result = json.loads((folder / 'logs/mine/1/results.jsonl').read_text())
    assert (result['nfe'], result['T'], result['method']) == (1, 1, 'pd')
    assert load_model(folder / 'logs/mine/dmd').diffusion.times() == [1000, 0]


def test_rdd_of_a_teacher_with_labels(folder):
    """Its run goes on from its own flagfile."""
    rdd = ['train_rdd.py', '--flagfile=config/TEACHER_RDD.txt', *TRAINING, '--queue_size=64',
           '--contrast_size=16', '--queue_update=8', '--teacher_steps=8',
           '--classifier=densenet_small', '--classifier_path=classifier.pt', '--base_ckpt=labels',
           '--logdir=rdd']
    again = ['train_rdd.py', '--flagfile=rdd/flagfile.txt', '--total_steps=2']
    _, output = run_in(folder, rdd, again)
    assert 'resuming at step 1' in output
    model = load_model(folder / 'rdd')
    assert (model.diffusion.times(), model.diffusion.mean_type) == ([1000, 750, 500, 250, 0], 'v')
    assert (model.entries['origin'], model.entries['step']) == ('labels', 2)
    assert model.network.conditional


# Folders that people have

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('odd') / 'good'
    pipeline(folder)
    return folder


def edited(file, **changes):
    """Other settings in a JSON file."""
    file.write_text(json.dumps(dict(json.loads(file.read_text()), **changes)))


def unet(**changes):
    return lambda folder: edited(folder / 'unet/config.json', **changes)


def scheduler(**changes):
    return lambda folder: edited(folder / 'scheduler/scheduler_config.json', **changes)


def weights(folder):
    return folder / 'unet/diffusion_pytorch_model.safetensors'


def resaved(**how):
    def resave(folder):
        unet = diffusers().UNet2DModel.from_pretrained(str(folder / 'unet'))
        weights(folder).unlink()
        unet.save_pretrained(str(folder / 'unet'), **how)
    return resave


def beside_shards(folder):
    """As diffusers leaves a file behind that was saved before."""
    resaved(max_shard_size='1MB')(folder)
    from safetensors.torch import save_file
    save_file(dict(old=torch.zeros(1)), str(weights(folder)))


def changed(change):
    """Other weights: change(state dict) -> state dict."""
    def save(folder):
        from safetensors.torch import load_file, save_file
        save_file(change(load_file(str(weights(folder)))), str(weights(folder)))
    return save


def old_name(key):
    old = dict(to_q='query', to_k='key', to_v='value', to_out='proj_attn')
    return re.sub(r'\.(to_[qkv]|to_out)(\.0)?\.', lambda found: f'.{old[found.group(1)]}.', key)


TAKEN = dict(
    plain=unet(),
    average=unet(use_ema_warmup=True, decay=.999, optimization_step=5, inv_gamma=1., power=.75),
    beside=lambda folder: shutil.move(str(folder / 'unet'), str(folder / 'checkpoint-5/unet_ema')),
    old_scheduler=scheduler(tensor_format='pt', timestep_values=None, skip_prk_steps=True),
    old_attention=changed(lambda w: {old_name(key): value for key, value in w.items()}),
    wrapped=changed(lambda w: {f'_orig_mod.module.{key}': value for key, value in w.items()}),
    size_pair=unet(sample_size=[8, 8]), size_null=unet(sample_size=None),
    variant=resaved(variant='fp16'), shards=resaved(max_shard_size='1MB'),
    beside_shards=beside_shards, pickled=resaved(safe_serialization=False))


@pytest.mark.parametrize('layout', list(TAKEN))
def test_layouts_that_people_have(good, tmp_path, layout):
    place = tmp_path / 'given'
    shutil.copytree(str(good), str(place))
    (place / 'checkpoint-5').mkdir()
    TAKEN[layout](place)
    place = place / 'checkpoint-5/unet_ema' if layout == 'beside' else place
    model, plain = load_model(place, img_size=8), load_model(good)
    assert model.img_size == 8 and model.diffusion.T == 1000
    t = torch.tensor([1, 500, 1000])
    assert torch.equal(model.network(noise(), t), plain.network(noise(), t))


def test_settings_that_a_configuration_leaves_out():
    with torch.device('meta'):
        found = diffusers_read.arguments(diffusers().UNet2DModel())
    network = diffusers_read.build(dict(unet_config=found, schedule='cosine'))
    assert network.entries['unet_config'] == found
    assert found['block_out_channels'] == [224, 448, 672, 896]


def test_a_folder_has_no_average(good):
    with pytest.raises(UserError, match='good has no ema_model, only net_model; leave out --w'):
        load_model(good, weights='ema')


def test_settings_that_change_a_teacher(good, tmp_path, capsys):
    shutil.copytree(str(good), str(tmp_path / 'given'))
    scheduler(predict_epsilon=False, clip_sample=False)(tmp_path / 'given')
    assert load_model(tmp_path / 'given').diffusion.mean_type == 'xstart'
    assert 'note: clip_sample False in' in capsys.readouterr().out
    scheduler(clip_sample=True, clip_sample_range=2., thresholding=True)(tmp_path / 'given')
    load_model(tmp_path / 'given')
    assert 'clip_sample_range 2.0, thresholding True in' in capsys.readouterr().out
    load_model(good)
    assert 'note' not in capsys.readouterr().out


def hostile(name):
    """Pickled weights that make a file."""
    def save(folder):
        weights(folder).unlink()
        torch.save(dict(a=Call(open, str(folder / 'ran'), 'w')), str(folder / 'unet' / name))
    return save


def of_class(name, **settings):
    """A scheduler of a class, with settings that others lack."""
    text = json.dumps(dict(_class_name=name, **settings))
    return lambda folder: (folder / 'scheduler/scheduler_config.json').write_text(text)


ODD = {
    'no scheduler_config.json': lambda f: shutil.rmtree(str(f / 'scheduler')),
    'is UNet2DConditionModel, expected': unet(_class_name='UNet2DConditionModel'),
    'has use_novelty, which UNet2DModel': unet(use_novelty=True),
    'quantization_config': unet(quantization_config=dict(quant_method='bitsandbytes')),
    'no network that diffusers can load': unet(down_block_types=['DownBlock2D', 'NoBlock2D']),
    'class_embed_type in .* is .timestep., expected null': unet(class_embed_type='timestep'),
    'is missing or no dictionary': lambda f: (f / 'unet/config.json').write_text('{"act_fn": '),
    'those of its config.json': unet(block_out_channels=[32, 32]),
    'in_channels in .* is 1, expected 3': unet(in_channels=1),
    'time_embedding_type in .* is .fourier., expected': unet(time_embedding_type='fourier'),
    r'sample_size in .* is \[8, 16\], expected': unet(sample_size=[8, 16]),
    'layers_per_block in .* is 10000000, expected': unet(layers_per_block=10 ** 7),
    'larger than its weights': unet(layers_per_block=64, block_out_channels=[16384] * 2),
    'block_out_channels in .* is .*None.*, expected': unet(block_out_channels=[32, None]),
    'has vqvae in addition': lambda f: edited(f / 'model_index.json', vqvae=['a', 'VQModel']),
    'is EDMEulerScheduler, expected DDPMScheduler': scheduler(_class_name='EDMEulerScheduler'),
    'ends with alpha 0': scheduler(rescale_betas_zero_snr=True),
    'prediction_type in .* is .flow., expected': scheduler(prediction_type='flow'),
    'no schedule that diffusers can compute .*mine': scheduler(beta_schedule='mine'),
    'timestep_type in .* is .continuous., expected': of_class(
        'EulerDiscreteScheduler', timestep_type='continuous'),
    'use_flow_sigmas in .* is True, expected': of_class(
        'DPMSolverMultistepScheduler', use_flow_sigmas=True),
    'num_train_timesteps in .* is .many., expected': scheduler(num_train_timesteps='many'),
    'num_train_timesteps in .* is 1000000000': scheduler(num_train_timesteps=10 ** 9),
    'trained_betas in .* is .*1.5': scheduler(trained_betas=[.1, 1.5, .1]),
    'no schedule .*num_train_timesteps betas': scheduler(trained_betas=[.001] * 999),
    'no schedule .*betas in': scheduler(beta_start=0.),
    'no network that diffusers can load .*': lambda f: weights(f).write_bytes(
        weights(f).read_bytes()[:5000]),
    'the weights of its U-Net': lambda f: weights(f).unlink(),
    'conv_out.bias of the net_model in .*/given is .* finite': changed(
        lambda w: dict(w, **{'conv_out.bias': torch.tensor([0., float('nan'), 0.])})),
    'could run code': hostile('diffusion_pytorch_model.bin'),
    'that diffusers can load': hostile('diffusion_pytorch_model.safetensors')}


@pytest.mark.parametrize('sentence', list(ODD))
def test_an_odd_folder_is_refused(good, tmp_path, sentence):
    shutil.copytree(str(good), str(tmp_path / 'given'))
    ODD[sentence](tmp_path / 'given')
    with pytest.raises(UserError, match=sentence) as caught:
        load_model(tmp_path / 'given', steps=8)
    assert '\n' not in str(caught.value) and not (tmp_path / 'given/ran').exists()
