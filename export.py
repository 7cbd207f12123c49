"""Export a trained model to diffusers, ONNX or safetensors, with a model card.

  pip install -r requirements-export.txt
  python export.py --logdir ./logs/8to4/rdd --format diffusers --output ./export/diffusers

diffusers: a UNet2DModel and a DDIMScheduler, which load without this repository. onnx: one graph
from noise (and labels) to images, with all steps inside. safetensors: the weights and a
config.json. See docs/export.md.
"""

import json
from pathlib import Path

from absl import flags

from formats import card, diffusers_write, onnx_graph
from formats.diffusers_read import check_packages
from runtime import cli
from runtime.cli import UserError, first_line
from runtime.files import replacing_folder
from runtime.flags import MEAN_TYPES, require
from runtime.pictures import check_place
from score.sampling import define_model_flags, given_model

FLAGS = flags.FLAGS
PACKAGES = dict(diffusers=['diffusers', 'safetensors'], onnx=['onnx', 'onnxruntime'],
                safetensors=['safetensors'])


def define_flags():
    define_model_flags()
    flags.DEFINE_enum('format', 'diffusers', ['diffusers', 'onnx', 'safetensors'], 'what to write')
    flags.DEFINE_string('output', None, 'new folder for the result')
    flags.DEFINE_string('license', None, 'licence named on the model card; none: that of the '
                        'teacher, unknown if a teacher of others names none, else mit')
    flags.DEFINE_integer('img_size', 32, 'height and width of the images, if the checkpoint does '
                         'not record them', lower_bound=1)
    flags.DEFINE_enum('mean_type', 'xstart', MEAN_TYPES, 'what the network predicts, if the '
                      'checkpoint does not record it')


def main():
    require(output='the new folder for the result, such as ./export/rdd',
            logdir='the folder of a trained model, such as ./logs/8to4/rdd')
    output = Path(FLAGS.output)
    check_place(output, '--output', ())
    model = given_model()
    check_packages(PACKAGES[FLAGS.format])
    try:
        with replacing_folder(output) as folder:
            write(model, folder)
    except Exception as error:
        if not isinstance(error, OSError) and 'os error' not in str(error):
            raise       # safetensors has an exception of its own for a full disk
        raise UserError(f'--output {output} cannot be written ({first_line(error)}); make room, or '
                        f'choose another', code=1)
    print(f'{output}: {", ".join(sorted(path.name for path in output.iterdir()))}')


def write(model, folder):
    """The files of --format in a folder, and README.md."""
    measured = ''
    if FLAGS.format == 'diffusers':
        diffusers_write.write(model, FLAGS.stride, folder)
    elif FLAGS.format == 'onnx':
        measured = onnx_graph.write(model, FLAGS.stride, folder)
    else:
        write_safetensors(model, folder)
    foreign = 'origin' in model.entries
    licence = FLAGS.license or model.entries.get('license', 'unknown' if foreign else 'mit')
    card.write(folder, model, FLAGS.stride, FLAGS.format, licence, measured)


def write_safetensors(model, folder):
    """model.safetensors and a config.json with the arguments of the network and `Diffusion`."""
    from safetensors.torch import save_file
    state_dict = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    save_file(state_dict, folder / 'model.safetensors', dict(format='pt'))
    entries = model.network.entries
    network = {key: entries[key] for key in ('edm', 'unet_config') if key in entries}
    network = network or dict(unet=model.arch)
    config = dict(network, diffusion=model.diffusion.arguments(), stride=FLAGS.stride,
                  img_size=model.img_size,
                  training=dict(model.provenance(), weights=model.weights_name))
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')


if __name__ == '__main__':
    define_flags()
    cli.run(main)
