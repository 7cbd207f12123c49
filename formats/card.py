"""The model card, README.md of an export; its texts are in card.txt and loading.txt."""

import json
from pathlib import Path

METHODS = dict(base='trained as a diffusion model (`train_base.py`)',
               pd='trained by progressive distillation (`PD.py`)',
               rdd='trained by relational diffusion distillation (`train_rdd.py`)')
PREDICTIONS = dict(xstart='the clean image', epsilon='the noise',
                   v='v, alpha times the noise minus sigma times the clean image')
LIBRARIES = dict(diffusers='diffusers', onnx='onnx', safetensors='pytorch')
ORIGIN = ('It descends from the diffusion model `{}`, which others may have trained: see there for '
          'its data and licence.')
FLAGS = '\n<details><summary>All flags</summary>\n\n```\n{}\n```\n</details>\n'
SCORE = ('| {nfe} | {fid:.3f} | {inception_score:.3f} +- {inception_std:.3f} | {num_images} | '
         '{reference} ({reference_images}) | {feature_network} | {pixels} | {seed} |')


def write(folder, model, stride, form, license, measured=''):
    """README.md in `folder`.

    Args:
        model: a `formats.load.Model`. stride: its steps per DDIM step.
        form: format of the export. license: for the front matter. measured: a line to add.
    """
    d, arch, nfe = model.diffusion, model.arch, model.diffusion.T // stride
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    classes = arch['class_num'] if arch['conditional'] else 0
    text = (Path(__file__).parent / 'card.txt').read_text()
    (folder / 'README.md').write_text(text.format(
        license=license, library=LIBRARIES[form], nfe=nfe, size=model.img_size, T=d.T, N=d.N,
        stride=f'; one DDIM step spans {stride} of them' if stride > 1 else '',
        millions=parameters / 1e6, weights=model.weights_name,
        kind=f'class-conditional, {classes} classes' if classes else 'unconditional',
        schedule=d.schedule['name'] if d.clean_end else d.schedule,
        prediction=PREDICTIONS[d.mean_type], loading=loading(model, nfe, form, classes),
        measured=measured, training=training(model.entries), scores=scores(model)))


def loading(model, nfe, form, classes):
    """Python code that loads an export in the format `form` and samples from it, and notes."""
    text = (Path(__file__).parent / 'loading.txt').read_text()
    sections = dict(section.split('\n', 1) for section in text.split('\n# ')[1:])
    title = form + (' with labels' if classes and form != 'safetensors' else '')
    if form == 'safetensors' and 'unet_config' in model.network.entries:
        title = 'safetensors of diffusers'
    found = sections[title]
    if form == 'diffusers':
        found += sections['trailing' if model.diffusion.clean_end else 'leading']
    return found.strip().format(
        nfe=nfe, size=model.img_size, T=model.diffusion.T, N=model.diffusion.N, classes=classes,
        labels=f'torch.arange(8) % {classes}' if classes else 'None')


def training(entries):
    """How the model was trained, in sentences, and its flags, from the entries of a checkpoint."""
    how = METHODS.get(entries.get('method'), 'trained by a method that its checkpoint lacks')
    lines = [f'The model was {how}.']
    for key, words in (('step', 'Steps: {}.'), ('batch_size', 'Images per step: {}.'),
                       ('dataset', 'Data set: {}.'), ('flags', FLAGS), ('origin', ORIGIN)):
        if key in entries:
            lines.append(words.format(str(entries[key]).strip()))
    return '\n'.join(lines)


def scores(model):
    """Rows of a table: the lines of results.jsonl that score these weights at this step."""
    path, rows = model.file.parent / 'results.jsonl', []
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            result = json.loads(line)
            row, step = SCORE.format(**result), result['step']
        except (ValueError, KeyError, TypeError):
            print(f'note: line {number} of {path} is left out: it is no score in JSON.')
            continue
        if (step, result.get('weights')) == (model.entries.get('step'), model.weights_name):
            rows.append(row)
    return '\n'.join(rows) or 'Not measured yet (`ddim_eval.py` writes scores beside a checkpoint).'
