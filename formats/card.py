"""The model card, README.md of an export: how the model was trained, its scores, how to load it."""

import json
from textwrap import dedent

METHODS = dict(base='trained as a diffusion model (`train_base.py`)',
               pd='trained by progressive distillation (`PD.py`)',
               rdd='trained by relational diffusion distillation (`train_rdd.py`)')

# Python code that runs inside the folder; `loading_code` fills in the {names}
DIFFUSERS = '''
    import torch
    from diffusers import DDIMPipeline
    pipe = DDIMPipeline.from_pretrained('.')
    images = pipe(batch_size=8, num_inference_steps={nfe}, use_clipped_model_output=True,
                  generator=torch.Generator().manual_seed(0)).images
    images[0].save('sample.png')
'''
DIFFUSERS_LABELS = '''
    import torch
    from diffusers import DDIMScheduler, UNet2DModel
    unet = UNet2DModel.from_pretrained('unet')
    scheduler = DDIMScheduler.from_pretrained('scheduler')
    scheduler.set_timesteps({nfe})
    y = torch.arange({class_num})
    images = torch.randn(len(y), 3, {size}, {size}, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in scheduler.timesteps:
            images = scheduler.step(unet(images, t, y).sample, t, images,
                                    use_clipped_model_output=True).prev_sample
    images = images.clamp(-1, 1)
'''
SAFETENSORS = '''
    import json, torch
    from safetensors.torch import load_file
    from diffusion import Diffusion     # from the repository, which must be on the Python path
    {network}
    network.load_state_dict(load_file('model.safetensors'))
    with torch.no_grad():
        images = Diffusion(**config['diffusion']).sample(
            network.eval(), torch.randn(8, 3, {size}, {size}), config['stride'], y={labels})
'''
OUR_NETWORK = '''
    from model import UNet
    config = json.load(open('config.json'))
    network = UNet(**config['unet'])
    network.set_details(**config['details'])
'''
THEIR_NETWORK = '''
    from formats.diffusers_network import DiffusersUNet
    config = json.load(open('config.json'))
    network = DiffusersUNet(config['unet_config'])
'''
ONNX = '''
    import numpy as np, onnxruntime
    session = onnxruntime.InferenceSession('model.onnx')
    x_T = np.random.default_rng(0).standard_normal((8, 3, {size}, {size}), dtype=np.float32)
    images = session.run(None, dict(x_T=x_T{y}))[0]
'''

PREDICTIONS = dict(xstart='the clean image', epsilon='the noise',
                   v='v, alpha times the noise minus sigma times the clean image')
TRAILING = '''`use_clipped_model_output=True` recomputes eps from the clipped image, as in
training and scoring; without it the images differ. The scheduler has the spacing "trailing", whose
times are those of the training for {nfe} steps.'''
NOTES = dict(
    diffusers='''`use_clipped_model_output=True` recomputes eps from the clipped image, as in
training and scoring; without it the images differ. The scheduler is set up for {nfe} steps: its
`steps_offset` is {N} / {nfe}. For another number n of steps that divides {T}:
`DDIMScheduler.from_config(scheduler.config, steps_offset={N} // n)`.''',
    onnx='''The graph runs all {nfe} steps, from noise `x_T`{labels} to images in [-1, 1], for any
batch size.''',
    safetensors='''`config.json` has the arguments of the network and of its schedule, and how it
was trained.''')
LIBRARIES = dict(diffusers='diffusers', onnx='onnx', safetensors='pytorch')

CARD = '''---
license: {license}
library_name: {library}
tags: [diffusion, distillation, unconditional-image-generation]
---
# {nfe}-step diffusion model, {size} x {size} pixels

A U-Net ({millions:.1f} M parameters, {kind}) that generates an image with DDIM in {nfe}
network evaluations (NFE). {steps} The network predicts {prediction}; the schedule is {schedule}.
These are the weights `{weights}` of its checkpoint.

## Loading

```python
{code}
```

Run this inside the folder.
{note}
{measured}
## Training

{training}

## Scores

{scores}

## Licence and limits

Licence: {license}. It gives no rights in the training images. Expect the model to repeat the biases
and gaps of its training data. The method is that of *Relational Diffusion Distillation for
Efficient Image Generation* (ACM MM 2024, arXiv 2410.07679); this is an independent
re-implementation.
'''


def write(folder, model, stride, form, license, measured=()):
    """README.md in `folder`.

    Args:
        model: from `runtime.models.load_model`. stride: its steps per DDIM step.
        form: format of the export. license: for the front matter. measured: lines to list.
    """
    arch, d, conditional = model.arch, model.diffusion, model.arch['conditional']
    nfe = d.T // stride
    steps = f'The model has {d.T} steps on a grid of {d.N} points.'
    clean, theirs = isinstance(d.schedule, dict), 'unet_config' in model.facts
    note = TRAILING if clean and form == 'diffusers' else NOTES[form]
    if stride > 1:
        steps += f' One DDIM step spans {stride} of them.'
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    lines = results(model.file, model.facts.get('step'), model.weights)
    (folder / 'README.md').write_text(CARD.format(
        license=license, library=LIBRARIES[form], nfe=nfe, size=model.img_size, steps=steps,
        millions=parameters / 1e6, weights=model.weights,
        schedule=d.schedule['name'] if clean else d.schedule,
        kind=f'class-conditional, {arch["class_num"]} classes' if conditional else 'unconditional',
        prediction=PREDICTIONS[d.mean_type],
        code=loading_code(form, conditional, nfe, model.img_size, arch['class_num'], theirs),
        note=note.format(nfe=nfe, N=d.N, T=d.T,
                                labels=' and labels `y`' if conditional else ''),
        measured=''.join(f'\n- {line}' for line in measured) + '\n' if measured else '',
        training=training(model.facts), scores=scores(lines)))


def loading_code(form, conditional, nfe, size, class_num, theirs=False):
    """Python code that loads an export in the format `form` and samples from it.

    theirs: the network is one of diffusers that is not of the family of ours.
    """
    diffusers = DIFFUSERS_LABELS if conditional else DIFFUSERS
    text = dict(diffusers=diffusers, onnx=ONNX, safetensors=SAFETENSORS)[form]
    return dedent(text).strip().format(
        nfe=nfe, size=size, class_num=class_num,
        network=dedent(THEIR_NETWORK if theirs else OUR_NETWORK).strip(),
        labels=f'torch.arange(8) % {class_num}' if conditional else 'None',
        y=f', y=np.arange(8) % {class_num}' if conditional else '')


def training(facts):
    """How the model was trained, in sentences, and its flags.

    Args:
        facts: of a `runtime.models.Model`.
    """
    method, flagfile, amount = facts.get('method'), facts.get('flags', ''), []
    if 'step' in facts:
        amount.append(f'{facts["step"]} steps')
    if 'batch_size' in facts:
        amount.append(f'of {facts["batch_size"]} images')
    if 'dataset' in facts:
        amount.append(f'of {facts["dataset"]}')
    how = METHODS.get(method, 'trained by a method that its checkpoint does not name')
    lines = [f'The model was {how}: {" ".join(amount)}.' if amount else f'The model was {how}.']
    if flag(flagfile, 'base_ckpt'):
        lines.append(f'Its teacher is `{flag(flagfile, "base_ckpt")}`.')
        if method == 'rdd':
            lines.append(f'The classifier that compares their features is '
                         f'{flag(flagfile, "classifier")}.')
    if 'origin' in facts:
        lines.append(f'It descends from the diffusion model `{facts["origin"]}`, which others may '
                     f'have trained: see there for its data and licence.')
    if flagfile:
        lines.append(f'\n<details><summary>All flags</summary>\n\n```\n{flagfile.strip()}\n```\n'
                     '</details>')
    return '\n'.join(lines)


def flag(flagfile, name):
    """The value of a flag in the text of a flagfile, or None."""
    values = [line.split('=', 1)[1] for line in flagfile.splitlines()
              if line.startswith(f'--{name}=')]
    return values[-1] if values else None


def results(file, step, weights):
    """The lines of results.jsonl beside a checkpoint that score these weights at this step."""
    path = file.parent / 'results.jsonl'
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [line for line in map(json.loads, lines) if 'fid' in line]
    return [line for line in found if line.get('step') == step and line.get('weights') == weights]


def scores(lines):
    """Markdown table of scores, each with the protocol that it was measured by."""
    if not lines:
        return 'Not measured yet (`ddim_eval.py` writes the scores beside the checkpoint).'
    rows = ['| NFE | Frechet distance | Inception score | images | reference | features | pixels |'
            ' seed |', '| ---: | ---: | ---: | ---: | :--- | :--- | :--- | ---: |']
    for r in lines:
        rows.append(f'| {r["nfe"]} | {r["fid"]:.3f} | {r["inception_score"]:.3f} +- '
                    f'{r["inception_std"]:.3f} | {r["num_images"]} | {r["reference"]} '
                    f'({r["reference_images"]}) | {r["feature_network"]} | {r["pixels"]} | '
                    f'{r["seed"]} |')
    return '\n'.join(rows + ['', 'Compare distances only if all columns from "images" on agree.'])
