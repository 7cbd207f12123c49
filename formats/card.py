"""The model card, README.md of an export; its texts are in card.txt and loading.txt."""

from pathlib import Path

from score import results

METHODS = dict(base='trained as a diffusion model (`train_base.py`)',
               pd='trained by progressive distillation (`PD.py`)',
               rdd='trained by relational diffusion distillation (`train_rdd.py`)',
               dmd='trained by distribution matching distillation (`train_dmd.py`)')
PREDICTIONS = dict(xstart='the clean image', epsilon='the noise',
                   v='v, alpha times the noise minus sigma times the clean image')
TRAINING = dict(
    step='Steps: {}.', batch_size='Images per step: {}.', dataset='Data set: {}.',
    flags='\n<details><summary>All flags</summary>\n\n```\n{}\n```\n</details>\n',
    origin='It descends from the diffusion model `{}`, which others may have trained: see there '
           'for its data and licence.')
SCORE = ('| {nfe} | {fid:.3f} | {inception_score:.3f} +- {inception_std:.3f} | {num_images} | '
         '{reference} ({reference_images}) | {feature_network} | {pixels} | {amp} | {seed} |')


def write(folder, model, stride, form, license, measured=''):
    """README.md of an export of a `Model` in the format `form`; `measured` is a line to add."""
    d, arch, nfe = model.diffusion, model.arch, model.diffusion.T // stride
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    classes = arch['class_num'] if arch['conditional'] else 0
    how = METHODS.get(model.entries.get('method'), 'trained by a method that its checkpoint lacks')
    training = [f'The model was {how}.']
    training += [words.format(str(model.entries[key]).strip()) for key, words in TRAINING.items()
                 if key in model.entries]
    lines = results.read(model.file.parent / 'results.jsonl', model.file.name)
    scores = [SCORE.format(**line) for line in lines
              if (line.get('step'), line.get('weights')) == (model.entries.get('step'),
                                                             model.weights_name)]
    text = (Path(__file__).parent / 'card.txt').read_text(encoding='utf-8')
    (folder / 'README.md').write_text(text.format(
        license=license, library='pytorch' if form == 'safetensors' else form, nfe=nfe,
        tag=f'{"class-conditional" if classes else "unconditional"}-image-generation',
        size=model.img_size, T=d.T, N=d.N, millions=parameters / 1e6, weights=model.weights_name,
        stride=f'; one DDIM step spans {stride} of them' if stride > 1 else '',
        kind=f'class-conditional, {classes} classes' if classes else 'unconditional',
        schedule=d.schedule['name'] if d.clean_end else d.schedule,
        prediction=PREDICTIONS[d.mean_type], loading=loading(model, nfe, form, classes),
        measured=measured, training='\n'.join(training), scores='\n'.join(scores) or
        'Not measured yet (`ddim_eval.py` writes scores beside a checkpoint).'), encoding='utf-8')


def loading(model, nfe, form, classes):
    """Python code that loads an export in the format `form` and samples from it, and notes."""
    text = (Path(__file__).parent / 'loading.txt').read_text(encoding='utf-8')
    sections = dict(section.split('\n', 1) for section in text.split('\n# ')[1:])
    title = form + (' with labels' if classes and form != 'safetensors' else '')
    found = sections[title]
    if form == 'diffusers':
        found += sections['trailing' if model.diffusion.clean_end else 'leading']
    return found.strip().format(
        nfe=nfe, size=model.img_size, T=model.diffusion.T, N=model.diffusion.N, classes=classes,
        labels=f'torch.arange(8) % {classes}' if classes else 'None')
