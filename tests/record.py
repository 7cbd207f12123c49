"""Runs a script and keeps what its steps were given: record.py FILE script.py --flag ..

A new base model starts from weights that are not almost 0. FILE (torch.save) then holds
  initial    {key: state dict} of what is trained, before the first step of this start
  steps      {step: dict(parts=[dict(x_0, y, t, eps, rows, noise)], chosen, contrast)} of a training
  x_T        noise that samples start from, one tensor per call
  inputs     (images, labels) of every training step of a classifier
  labels     labels of every evaluation of a U-Net, or None
"""

import contextlib
import os
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
record = dict(steps={}, x_T=[], inputs=[], labels=[])
now = {}            # the step that is under way


def clone(value):
    """Tensors copied, through dicts and lists."""
    if torch.is_tensor(value):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return [clone(item) for item in value] if isinstance(value, list) else value


def disturb(*networks):
    """New networks say almost 0 whatever they see: random weights, alike, let everything matter."""
    for network in networks:
        generator = torch.Generator().manual_seed(0)
        for name, p in network.named_parameters():
            if 'timembedding.0' not in name:
                p.data += 0.05 * torch.randn(p.shape, generator=generator)


def watch_run():
    from losses import MemoryP2P
    from runtime.run import Run
    init, parts, forward = Run.__init__, Run.parts, Run.forward
    choose_pixels, choose_contrast = MemoryP2P.choose_pixels, MemoryP2P.choose_contrast

    def watched_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.method == 'base' and not self.start:
            disturb(self.net.module, self.ema)
        record['initial'] = {key: clone(value.state_dict()) for key, value in self.saved().items()
                             if value is not None}

    def watched_parts(self, *args, **kwargs):
        step = record['steps'][self.step] = dict(parts=[])
        now['step'] = step
        for part in parts(self, *args, **kwargs):
            kept = dict(x_0=part.x_0, y=part.y, t=part.t, eps=part.eps)
            step['parts'].append(dict(clone(kept), noise=None,
                                      rows=[part.rows.start, part.rows.stop]))
            part.kept = step['parts'][-1]
            yield part

    @contextlib.contextmanager
    def watched_forward(self, part):
        with forward(self, part):
            noise = self.net.context.get('noise')
            part.kept['noise'] = None if noise is None else [clone(noise.keys),
                                                             clone(noise.positions)]
            yield

    def watched_pixels(self, *args):
        now['step']['chosen'] = choose_pixels(self, *args)
        return now['step']['chosen']

    def watched_contrast(self, *args):
        choose_contrast(self, *args)
        now['step']['contrast'] = clone(self.contrast)

    Run.__init__, Run.parts, Run.forward = watched_init, watched_parts, watched_forward
    MemoryP2P.choose_pixels, MemoryP2P.choose_contrast = watched_pixels, watched_contrast


def watch_samples():
    from model import UNet
    from runtime import seeding
    noise_of_images, forward = seeding.noise_of_images, UNet.forward

    def watched_noise(*args):
        record['x_T'].append(noise_of_images(*args))
        return record['x_T'][-1]

    def watched_forward(self, x, t, y=None, noise=None):
        record['labels'].append(clone(y))
        return forward(self, x, t, y, noise)

    seeding.noise_of_images, UNet.forward = watched_noise, watched_forward


def watch_classifier():
    from classifier.networks import Classifier
    from torch.nn import functional
    forward, cross_entropy = Classifier.forward, functional.cross_entropy

    def watched_forward(self, x):
        if self.training:
            if not record['inputs']:
                record['initial'] = clone(dict(self.state_dict()))
            record['inputs'].append([clone(x)])
        return forward(self, x)

    def watched_loss(logits, y, *args, **kwargs):
        record['inputs'][-1].append(clone(y))
        return cross_entropy(logits, y, *args, **kwargs)

    Classifier.forward, functional.cross_entropy = watched_forward, watched_loss


def main():
    file, script = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    if script.endswith('eval.py'):
        watch_samples()
    elif script.startswith('classifier'):
        watch_classifier()
    else:
        watch_run()
    sys.path[0] = str((ROOT / script).parent)
    try:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    finally:
        torch.save(record, file + os.environ.get('RANK', '').replace('0', ''))


if __name__ == '__main__':
    main()
