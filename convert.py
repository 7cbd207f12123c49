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

from absl import flags

from diffusion import alpha_bar_table
from formats import edm, edm_pickle, guided_diffusion
from formats.load import NOT_BUILT, build
from runtime import checkpoint, cli
from runtime.cli import UserError
from runtime.files import replacing_folder
from runtime.flags import given, require
from runtime.pictures import check_place

FLAGS = flags.FLAGS
UNSEEN = ('img_size', 'num_heads', 'num_head_channels', 'new_attention_order', 'beta_schedule',
          'steps', 'rescale_timesteps', 'predict_xstart')       # what weights do not show
LICENCES = {r'(edm|baseline)-(cifar10|ffhq|afhqv2|imagenet)-(32x32|64x64)-(un)?cond-(vp|ve|adm)':
            'cc-by-nc-sa-4.0',
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
    check_place(output, '--output', ())
    if not file.is_file():
        raise UserError(f'--teacher {file} is no file; give the weights of a teacher')
    name = FLAGS.preset or file.stem
    kind = FLAGS.kind or kind_of(file, name)
    settings = settings_of(kind, file, name)
    try:
        if kind == 'edm':
            state, weights = edm_pickle.teacher(file, FLAGS.steps)
        else:
            state, weights = guided_diffusion.teacher(file, kind, **settings)
    except NOT_BUILT:
        raise UserError(f'{file} has no U-Net of EDM or guided-diffusion: tensors or arguments are '
                        f'missing, or have other names; give another file')
    state.update(T=len(state['schedule']['betas']), time_scale=1, origin=file.stem, use='net_model')
    if licence_of(file.stem):
        state['license'] = licence_of(file.stem)
    alpha_bar = alpha_bar_table(state['T'], state['schedule'])
    if alpha_bar[-1] < 0 or not (alpha_bar.diff() < 0).all():
        raise UserError(f'--steps is {FLAGS.steps}, which the schedule of {file} cannot have in '
                        f'float32; give the number it was trained with, or 1024 for EDM')
    network, arch = build(state, weights, 0., f'the network in {file}')
    with replacing_folder(output) as folder:
        checkpoint.save(folder / 'ckpt.pt', dict(state, net_model=weights))
    report(state, network, arch)
    if kind != 'edm':
        assumed = ' '.join(f'--{name}={value}' for name, value in settings.items())
        print(f'assumed   {assumed}; the weights do not show these: check them')
    print(f'{FLAGS.output}/ckpt.pt is written. Go on with (--dataset folder --data_root IMAGES for '
          f'images of your own)\n  python PD.py --flagfile ./config/TEACHER_PD.txt --base_ckpt '
          f'{FLAGS.output} --logdir ./logs/{output.name}')


def kind_of(file, name):
    """The --kind of a file, from its first bytes and the name of its public original."""
    with open(file, 'rb') as opened:
        start = opened.read(4)
    if start[:2] != b'PK' and start != b'\x80\x02\x8a\x0a':       # neither form of torch.save
        return 'edm'
    return 'consistency_models' if name.startswith('edm_') else 'guided_diffusion'


def licence_of(name):
    """The licence of the public file of this name; None if there is none."""
    found = [licence for pattern, licence in LICENCES.items() if re.fullmatch(pattern, name)]
    return found[0] if found else None


def settings_of(kind, file, name):
    """{name: value} of the flags `UNSEEN`; if not given, those of a public file of this name."""
    for flag in filter(given, ('preset', *UNSEEN)):
        if kind == 'edm' and flag != 'steps':
            raise UserError(f'--{flag} is given and {file} is a snapshot of EDM, which states its '
                            f'settings; leave it out')
    preset = {} if kind == 'edm' else guided_diffusion.PRESETS.get(name, {})
    for flag, value in preset.items():
        if not given(flag):
            FLAGS[flag].value = value
    if not FLAGS.num_head_channels:
        FLAGS.num_heads = FLAGS.num_heads or 4
    FLAGS.steps = FLAGS.steps or (1000 if kind == 'guided_diffusion' else 1024)
    return {flag: FLAGS[flag].value for flag in UNSEEN}


def report(state, network, arch):
    """Print what was found."""
    name, schedule = 'UNet2DModel', state['schedule']['name']
    if 'edm' in state:
        _, low, high = edm.PRECONDITIONING[network.kind]
        name = f'{"SongUNet" if network.song else name} in {network.kind}'
        schedule = f'noise levels from {low:g} to {high:g}'
    parameters = sum(value.numel() for value in network.parameters())
    print(f'network   {name}, {parameters:,} parameters, predicts {state["mean_type"]}\n'
          f'images    {state["img_size"]} x {state["img_size"]}, RGB\n'
          f'labels    {arch["class_num"] if arch["conditional"] else "no"} classes\n'
          f'schedule  {schedule}, {state["T"]} times\n'
          f'licence   {state.get("license", "not known; see where the file comes from")}')


if __name__ == '__main__':
    define_flags()
    cli.run(main)
