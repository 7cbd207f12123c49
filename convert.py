"""Convert a teacher of others to a folder that all scripts here read, once.

  python convert.py --teacher edm-cifar10-32x32-uncond-vp.pkl --output ./teachers/edm_cifar10
  python convert.py --teacher 64x64_diffusion.pt --output ./teachers/adm
  python convert.py --teacher edm_imagenet64_ema.pt --output ./teachers/edm_imagenet64
  python convert.py --teacher ema_0.9999_100000.pt --output ./teachers/mine --img_size 64 \\
      --num_head_channels 64 --beta_schedule cosine
--teacher is a snapshot of EDM, of which nothing is run, or the weights of guided-diffusion, of
improved-diffusion or of openai/consistency_models. Weights alone do not state everything: flags do,
and --preset sets those of a public file. <output>/ckpt.pt is written whole or not at all. See
docs/teacher.md.
"""

import re
from pathlib import Path

import torch
from absl import flags

from diffusion import alpha_bar_table
from formats import edm, edm_pickle, guided_diffusion
from formats.entries import brief, is_schedule
from formats.load import NOT_BUILT, build, choose_weights, kind_of_file
from runtime import checkpoint, cli
from runtime.cli import UserError
from runtime.files import check_new_folder, replacing_folder
from runtime.flags import given, require

FLAGS = flags.FLAGS
# arguments in a snapshot of EDM that have one value here, and those without a meaning here
FIXED = dict(img_channels=3, decoder_type='standard', sigma_data=.5, beta_d=19.9, beta_min=.1,
             M=1000, epsilon_t=1e-5, C_1=.001, C_2=.008)
UNUSED = ('use_fp16', 'dropout', 'label_dropout', 'sigma_min', 'sigma_max', 'model_type')
UNSEEN = ('img_size', 'num_heads', 'num_head_channels', 'new_attention_order', 'beta_schedule',
          'steps', 'rescale_timesteps', 'predict_xstart')       # what weights do not show
LICENCES = {r'(edm|baseline)-(cifar10|ffhq|afhqv2|imagenet)-': 'cc-by-nc-sa-4.0',
            '|'.join(guided_diffusion.PRESETS): 'mit'}      # by the names of public files


def define_flags():
    flags.DEFINE_string('teacher', None, 'file to convert')
    flags.DEFINE_string('output', None, 'new folder for ckpt.pt')
    flags.DEFINE_enum('kind', None, ['edm', 'guided_diffusion', 'consistency_models'], 'what the '
                      'file is; by default, as its content and name show')
    flags.DEFINE_enum('preset', None, sorted(guided_diffusion.PRESETS), 'public file that sets the '
                      'flags below which are not given; by default, the one named as --teacher')
    flags.DEFINE_integer('img_size', 64, 'height and width of the images', lower_bound=1)
    flags.DEFINE_integer('num_heads', 0, 'heads of all attention layers; 4 if neither this nor '
                         '--num_head_channels is given', lower_bound=0)
    flags.DEFINE_integer('num_head_channels', 0, 'channels of a head', lower_bound=0)
    flags.DEFINE_boolean('new_attention_order', False, 'as in training')
    flags.DEFINE_enum('beta_schedule', 'linear', ['linear', 'cosine'], 'as in training')
    flags.DEFINE_integer('steps', 0, 'times of the schedule; 0: 1000, or 1024 noise levels where '
                         'the preconditioning is that of EDM', lower_bound=0, upper_bound=10 ** 5)
    flags.DEFINE_boolean('rescale_timesteps', False, 'times were scaled to 0..1000, the default '
                         'of improved-diffusion')
    flags.DEFINE_boolean('predict_xstart', False, 'the network predicts x_0 rather than eps')


def main():
    require(teacher='the file to convert',
            output='the new folder for ckpt.pt, such as ./teachers/edm_cifar10')
    file, output = cli.find(FLAGS.teacher), Path(FLAGS.output)
    check_new_folder(output)
    if not file.is_file():
        raise UserError(f'--teacher {file} is no file; give the weights of a teacher')
    kind = FLAGS.kind or kind_of(file)
    state, weights = from_edm(file) if kind == 'edm' else from_weights(file, kind)
    state = dict(state, time_scale=1, origin=file.stem)
    state.update({'license': name for pattern, name in LICENCES.items()
                  if re.match(pattern, file.stem)})
    alpha = is_schedule(state['schedule']) and alpha_bar_table(state['T'], state['schedule'])
    if alpha is False or not (alpha.diff() < 0).all():
        raise UserError(f'--steps is {FLAGS.steps}, which the schedule of {file} cannot have in '
                        f'float32; give the number it was trained with, or 1024 for EDM')
    _, weights = choose_weights(dict(net_model=weights), 'net', file)
    network, arch = build(state, weights, 0., f'the network in {file}')
    with replacing_folder(output) as folder:
        checkpoint.save(folder / 'ckpt.pt', dict(state, net_model=weights, use='net_model'))
    report(kind, state, network, arch)


def kind_of(file):
    """The --kind of a file, from its first bytes and its name."""
    with open(file, 'rb') as opened:
        start = opened.read(4)
    if start[:2] != b'PK' and start != b'\x80\x02\x8a\x0a':       # neither form of torch.save
        return 'edm'
    return 'consistency_models' if file.stem.startswith('edm_') else 'guided_diffusion'


def from_edm(file):
    """(entries of the checkpoint, weights) of a snapshot of EDM."""
    for name in UNSEEN:
        if name != 'steps' and given(name):
            raise UserError(f'--{name} is given and {file} is a snapshot of EDM, which states its '
                            f'settings; leave it out')
    name, arguments, weights = edm_pickle.read(file)
    network = arguments.get('model_type') if isinstance(arguments, dict) else None
    if name == 'Precond':
        raise UserError(f'{file} is a model of EDM2, whose network is not supported; give one of '
                        f'EDM')
    if name not in edm.PRECONDITIONING or network not in ('SongUNet', 'DhariwalUNet'):
        raise UserError(f'{file} is a {name} with a {network}, expected a class of EDM such as '
                        f'EDMPrecond with a SongUNet or DhariwalUNet; give another model')
    for key, value in FIXED.items():
        if arguments.get(key, value) != value:
            raise UserError(f'{key} of {file} is {brief(arguments[key])}, expected {value}; give '
                            f'another model')
    state = dict(edm_entries(name), img_size=arguments.get('img_resolution'))
    if name == 'iDDPMPrecond':
        weights = without_variance(weights)
    if network == 'SongUNet':
        state['edm']['song'] = {key: value for key, value in arguments.items()
                                if key not in (*FIXED, *UNUSED)}
        return state, weights
    inner = {key[len('model.'):]: value for key, value in weights.items() if key != 'u'}
    inner = with_no_label(guided_diffusion.from_edm(inner))
    state['unet_config'], unet = unet_of(inner, state['img_size'], 'edm', 0,
                                         arguments.get('channels_per_head', 64), file)
    unet = {f'model.unet.{key}': value for key, value in unet.items()}
    return state, dict(unet, u=weights['u']) if 'u' in weights else unet


def edm_entries(preconditioning):
    """Entries of the checkpoint of a `formats.edm.EDMNetwork`."""
    N = FLAGS.steps or 1024
    return dict(edm=dict(preconditioning=preconditioning), T=N, mean_type='xstart',
                schedule=edm.schedule(preconditioning, N))


def unet_of(*arguments):
    """`guided_diffusion.convert`, with a sentence if the file holds another network."""
    try:
        return guided_diffusion.convert(*arguments)
    except NOT_BUILT:
        raise UserError(f'{arguments[-1]} has no U-Net of guided-diffusion: tensors are missing, '
                        f'or have other names; give another file')


def from_weights(file, kind):
    """(entries of the checkpoint, weights) of a file of guided-diffusion or consistency_models."""
    if re.match('c[dt]_', file.stem):
        raise UserError(f'{file} has the name of a consistency model, which makes images in one '
                        f'step and is no teacher; give edm_imagenet64_ema.pt or another one')
    state_dict = checkpoint.read(file)
    if 'input_blocks.0.0.weight' not in state_dict:
        raise UserError(f'{file} is {kind_of_file(state_dict)}; give the weights of a U-Net of '
                        f'guided-diffusion, such as ema_0.9999_100000.pt')
    _, weights = choose_weights(dict(net_model=state_dict), 'net', file)
    for name, value in guided_diffusion.PRESETS.get(FLAGS.preset or file.stem, {}).items():
        if not given(name):
            FLAGS[name].value = value
    if not FLAGS.num_head_channels:
        FLAGS.num_heads = FLAGS.num_heads or 4
    size, order = FLAGS.img_size, 'new' if FLAGS.new_attention_order else 'legacy'
    heads = FLAGS.num_heads, FLAGS.num_head_channels, file
    if kind == 'consistency_models':
        config, unet = unet_of(with_no_label(weights), size, order, *heads)
        state = dict(edm_entries(kind), unet_config=config, img_size=size)
        return state, {f'model.unet.{key}': value for key, value in unet.items()}
    FLAGS.steps = FLAGS.steps or 1000
    if FLAGS.rescale_timesteps and FLAGS.steps % 1000:
        raise UserError(f'--steps is {FLAGS.steps} with --rescale_timesteps, expected a multiple '
                        f'of 1000, so that scaled times are whole numbers')
    config, unet = unet_of(without_variance(weights), size, order, *heads)
    schedule = guided_diffusion.schedule(FLAGS.beta_schedule, FLAGS.steps, FLAGS.rescale_timesteps)
    state = dict(unet_config=config, T=len(schedule['betas']), schedule=schedule, img_size=size,
                 mean_type='xstart' if FLAGS.predict_xstart else 'epsilon')
    return state, {f'unet.{key}': value for key, value in unet.items()}


def with_no_label(weights):
    """Weights whose table of labels, if any, ends with zeros, which stand for "no label"."""
    table = weights.get('label_emb.weight')
    if table is None:
        return weights
    return {**weights, 'label_emb.weight': torch.cat([table, table.new_zeros(1, table.shape[1])])}


def without_variance(weights):
    """Weights whose last layer has three outputs, where it had a variance as well."""
    last = re.compile(r'(out\.2|out_conv|dec\.\w+_aux_conv)\.(weight|bias)$')
    return {key: value[:3] if last.search(key) and len(value) == 6 else value
            for key, value in weights.items()}


def report(kind, state, network, arch):
    """Print what was found, and the command to go on with."""
    name, schedule, size = 'UNet2DModel', state['schedule']['name'], state['img_size']
    if 'edm' in state:
        kind_of_edm = state['edm']['preconditioning']
        _, low, high = edm.PRECONDITIONING[kind_of_edm]
        name = f'{"SongUNet" if network.song else name} in {kind_of_edm}'
        schedule = f'noise levels from {low:g} to {high:g}'
    parameters = sum(value.numel() for value in network.parameters())
    print(f'network   {name}, {parameters:,} parameters, predicts {state["mean_type"]}')
    print(f'images    {size} x {size}, RGB')
    print(f'labels    {arch["class_num"] if arch["conditional"] else "no"} classes')
    print(f'schedule  {schedule}, {state["T"]} times')
    print(f'licence   {state.get("license", "not known; see where the file comes from")}')
    if kind != 'edm':
        assumed = ' '.join(f'--{name}={FLAGS[name].value}' for name in UNSEEN)
        print(f'assumed   {assumed}; the weights do not show these: check them')
    print(f'{FLAGS.output}/ckpt.pt is written. Go on with (--dataset folder --data_root IMAGES for '
          f'images of your own)\n  python PD.py --flagfile ./config/TEACHER_PD.txt --base_ckpt '
          f'{FLAGS.output} --logdir ./logs/{Path(FLAGS.output).name}')


if __name__ == '__main__':
    define_flags()
    cli.run(main)
