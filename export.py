"""Export a trained model to diffusers, ONNX or safetensors, with a model card.

  pip install -r requirements-export.txt
  python export.py --logdir ./logs/8to4/rdd --format diffusers --output ./export/diffusers
  python export.py --logdir ./logs/8to4/rdd --format onnx --output ./export/onnx --precision int8
  python export.py --from_diffusers FOLDER --output ./logs/imported

diffusers: a UNet2DModel and a DDIMScheduler, which load without this repository. onnx: one graph
from noise (and labels) to images, with all steps inside. safetensors: the weights and a
config.json. --from_diffusers writes <output>/ckpt.pt from a UNet2DModel. See docs/export.md.
"""

from pathlib import Path

from absl import flags

from formats import card, diffusers_folder, onnx_graph, safetensors_file
from formats.load import load_model, save_as_run
from formats.packages import check_packages
from formats.publish import publish
from runtime import cli
from runtime.cli import UserError
from runtime.flags import MEAN_TYPES, define_teacher_steps, require

FLAGS = flags.FLAGS
flags.DEFINE_string('logdir', None, 'folder (or file) of the checkpoint')
flags.DEFINE_enum('format', 'diffusers', ['diffusers', 'onnx', 'safetensors'], 'what to write')
flags.DEFINE_string('output', None, 'new folder for the result')
flags.DEFINE_enum('weights', 'auto', ['auto', 'net', 'ema'], 'weights to export; auto: the average '
                  'for a base model, the raw ones for a distilled student')
flags.DEFINE_integer('stride', 1, 'steps of the model per DDIM step: NFE = T / stride',
                     lower_bound=1)
flags.DEFINE_enum('precision', 'float32', ['float32', 'float16', 'int8'], 'of the weights in an '
                  'ONNX graph; int8 quantises the products as well, dynamically')
define_teacher_steps()
flags.DEFINE_string('license', 'mit', 'licence named on the model card')
flags.DEFINE_string('from_diffusers', None, 'folder of a diffusers pipeline or UNet2DModel to '
                    'convert to <output>/ckpt.pt, instead of exporting')
flags.DEFINE_integer('img_size', 32, 'height and width of the images, if the checkpoint does not '
                     'record them', lower_bound=1)
flags.DEFINE_enum('mean_type', 'xstart', MEAN_TYPES, 'what the network predicts, if the '
                  'checkpoint does not record it')

PACKAGES = dict(diffusers=['diffusers', 'safetensors'], onnx=['onnx', 'onnxruntime'],
                safetensors=['safetensors'])


def main():
    require(output='the new folder for the result, such as ./export/rdd')
    output = Path(FLAGS.output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f'--output {output} exists and is not an empty folder; choose another')
    if FLAGS.from_diffusers:
        import_model(output)
    else:
        export_model(output)
    print(f'{output}: {", ".join(sorted(path.name for path in output.iterdir()))}')


def export_model(output):
    """The checkpoint in --logdir -> a folder in the format --format, with a model card."""
    require(logdir='the folder of a trained model, such as ./logs/8to4/rdd')
    if FLAGS.precision != 'float32' and FLAGS.format != 'onnx':
        raise UserError(f'--precision {FLAGS.precision} is for --format onnx, found --format '
                        f'{FLAGS.format}; leave --precision out')
    model = load_model(FLAGS.logdir, FLAGS.weights, mean_type=FLAGS.mean_type,
                       img_size=FLAGS.img_size, steps=FLAGS.teacher_steps)
    if model.diffusion.T % FLAGS.stride:
        raise UserError(f'--stride {FLAGS.stride} does not divide the {model.diffusion.T} steps of '
                        f'the model in {model.file}; choose a divisor')
    check_packages(PACKAGES[FLAGS.format])
    with publish(output) as folder:
        measured = ''
        if FLAGS.format == 'diffusers':
            diffusers_folder.write(model, FLAGS.stride, folder)
        elif FLAGS.format == 'onnx':
            measured = onnx_graph.write(model, FLAGS.stride, folder, FLAGS.precision)
        else:
            safetensors_file.write(model, FLAGS.stride, folder)
        card.write(folder, model, FLAGS.stride, FLAGS.format, FLAGS.license, measured)


def import_model(output):
    """The folder --from_diffusers -> a folder with ckpt.pt."""
    if not diffusers_folder.is_folder(FLAGS.from_diffusers):
        raise UserError(f'--from_diffusers {FLAGS.from_diffusers} has neither model_index.json nor '
                        f'config.json; give the folder of a pipeline or UNet2DModel')
    model = load_model(FLAGS.from_diffusers, img_size=FLAGS.img_size)
    with publish(output) as folder:
        save_as_run(model, folder)


if __name__ == '__main__':
    cli.run(main)
