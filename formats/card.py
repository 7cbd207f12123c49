"""README.md of an exported model: how it was trained, what it scores, how to load it."""

import json
from textwrap import dedent

METHODS = dict(base='trained as a diffusion model (`train_base.py`)',
               pd='made by progressive distillation (`PD.py`)',
               rdd='made by relational diffusion distillation (`train_rdd.py`)')

# Run inside the folder; {names} are filled in by `code`
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
    from diffusion import Diffusion     # of the repository, which has to be on the Python path
    from model import UNet
    config = json.load(open('config.json'))
    network = UNet(**config['unet'])
    network.set_details(**config['details'])
    network.load_state_dict(load_file('model.safetensors'))
    with torch.no_grad():
        images = Diffusion(**config['diffusion']).sample(
            network.eval(), torch.randn(8, 3, {size}, {size}), config['stride'], y={labels})
'''
ONNX = '''
    import numpy as np, onnxruntime
    session = onnxruntime.InferenceSession('model.onnx')
    x_T = np.random.default_rng(0).standard_normal((8, 3, {size}, {size}), dtype=np.float32)
    images = session.run(None, dict(x_T=x_T{y}))[0]
'''


def code(form, conditional, nfe, size, class_num):
    """The Python lines that load an export of format `form` and sample from it."""
    text = dict(diffusers=DIFFUSERS_LABELS if conditional else DIFFUSERS, onnx=ONNX,
                safetensors=SAFETENSORS)[form]
    return dedent(text).strip().format(
        nfe=nfe, size=size, class_num=class_num,
        labels=f'torch.arange(8) % {class_num}' if conditional else 'None',
        y=f', y=np.arange(8) % {class_num}' if conditional else '')


NOTES = dict(
    diffusers='''`use_clipped_model_output=True` recomputes eps from the clipped image, which is how
the model was trained and scored; without it the images differ. The scheduler is set for {nfe}
steps: its `steps_offset` is {N} / {nfe}. For n other steps that divide {T}:
`DDIMScheduler.from_config(scheduler.config, steps_offset={N} // n)`.''',
    onnx='''The graph runs all {nfe} steps: from noise `x_T`{labels} to images in [-1, 1], of any
batch size.''',
    safetensors='''`config.json` has the arguments of the network, its schedule and how it was
trained.''')


def results(file, step, weights):
    """Lines of results.jsonl beside a checkpoint that belong to it as it is now."""
    path = file.parent / 'results.jsonl'
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [line for line in map(json.loads, lines) if 'fid' in line]
    return [line for line in found if line.get('step') == step and line.get('weights') == weights]


def scores(lines):
    """Markdown table of scores with the protocol each belongs to."""
    if not lines:
        return 'None has been measured (`ddim_eval.py` writes them beside the checkpoint).'
    rows = ['| NFE | Frechet distance | Inception score | images | reference | features | pixels |'
            ' seed |', '| ---: | ---: | ---: | ---: | :--- | :--- | :--- | ---: |']
    for r in lines:
        rows.append(f'| {r["nfe"]} | {r["fid"]:.3f} | {r["inception_score"]:.3f} +- '
                    f'{r["inception_std"]:.3f} | {r["num_images"]} | {r["reference"]} '
                    f'({r["reference_images"]}) | {r["feature_network"]} | {r["pixels"]} | '
                    f'{r["seed"]} |')
    return '\n'.join(rows + ['', 'Distances compare only if the columns from the fourth on agree.'])


def flag(text, name):
    """Value of a flag in flagfile text, or None."""
    values = [line.split('=', 1)[1] for line in text.splitlines() if line.startswith(f'--{name}=')]
    return values[-1] if values else None


def training(model):
    """How the model came to be, in sentences, and its flags."""
    state, text = model.state, model.state.get('flags', '')
    how = METHODS.get(state.get('method'), 'trained in a way its checkpoint does not say')
    lines = [f'It was {how}' + (f', {state["step"]} steps' if 'step' in state else '')
             + (f' of {state["batch_size"]} images' if 'batch_size' in state else '')
             + (f' of {state["dataset"]}' if 'dataset' in state else '') + '.']
    if flag(text, 'base_ckpt'):
        lines.append(f'Its teacher is `{flag(text, "base_ckpt")}`'
                     + (f', the classifier whose features were compared {flag(text, "classifier")}'
                        if state.get('method') == 'rdd' else '') + '.')
    if text:
        lines.append(f'\n<details><summary>All flags</summary>\n\n```\n{text.strip()}\n```\n'
                     '</details>')
    return '\n'.join(lines)


def write(folder, model, license, form, facts=()):
    """README.md in `folder`.

    Args:
        model: with network, arch, diffusion, img_size, nfe, state, file, weights (see export.py).
        license: for the front matter. form: format of the export. facts: measured lines.
    """
    arch, d = model.arch, model.diffusion
    kind = f'class-conditional, {arch["class_num"]} classes' if arch['conditional'] else \
        'unconditional'
    count = sum(p.numel() for p in model.network.parameters())
    note = NOTES[form].format(nfe=model.nfe, N=d.N, T=d.T,
                              labels=' and labels `y`' if arch['conditional'] else '')
    text = f'''---
license: {license}
library_name: {dict(diffusers='diffusers', onnx='onnx', safetensors='pytorch')[form]}
tags: [diffusion, distillation, unconditional-image-generation]
---
# {model.nfe}-step diffusion model, {model.img_size} x {model.img_size} pixels

A DDPM U-Net ({count / 1e6:.1f} M parameters, {kind}) that makes an image in {model.nfe} network
evaluations (NFE): DDIM with {d.T} steps of {d.time_scale} grid points{
    f", every {d.T // model.nfe} of them" if d.T != model.nfe else ""}. The network predicts {
    "the clean image" if d.mean_type == "xstart" else "the noise"}; the schedule is {
    model.schedule}. These are the weights `{model.weights}` of its checkpoint.

## Loading

```python
{code(form, arch['conditional'], model.nfe, model.img_size, arch['class_num'])}
```

Run inside this folder.
{note}
{"".join(f"{chr(10)}- {fact}" for fact in facts)}
## Training

{training(model)}

## Scores

{scores(results(model.file, model.state.get('step'), model.weights))}

## Licence and limits

Licence: {license}. It covers no rights in the training images. The model makes what it has seen:
expect the biases and gaps of its data. The method is that of *Relational Diffusion Distillation
for Efficient Image Generation* (ACM MM 2024, arXiv 2410.07679); this is an independent
re-implementation.
'''
    (folder / 'README.md').write_text(text)
