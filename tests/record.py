"""Runs a script and keeps what its steps were given: record.py FILE script.py --flag ..

A new base model starts from weights that are not almost 0. FILE (torch.save) then holds
  initial    {key: state dict} of what is trained, before the first step of this start
  steps      {step: dict(parts, chosen)} of a training: x_0, y, t, eps and rows of each part, and
             the pixels that enter the queue
  x_T        noise that samples start from, one tensor per call
  inputs     [images, labels] of every training step of a classifier
  labels     labels of every evaluation of a U-Net, or None
"""

import os
import runpy
import sys
from copy import deepcopy
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
record = dict(initial=None, steps={}, x_T=[], inputs=[], labels=[])


def disturb(network):
    """A new network predicts almost 0 for any input: random weights let everything matter."""
    generator = torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        if 'timembedding.0' not in name:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)


def watch(owner, name, keep):
    """Every call of the function `owner.name` is followed by keep(its result, *its arguments)."""
    function = getattr(owner, name)

    def watched(*args, **kwargs):
        result = function(*args, **kwargs)
        keep(result, *args, **kwargs)
        return result

    setattr(owner, name, watched)


def watch_training():
    import training
    from losses import MemoryP2P
    noisy_parts = training.noisy_parts

    def watched_parts(run, *args, **kwargs):
        if not record['initial']:
            if run.method == 'base' and not run.start:
                disturb(run.net.module)
                disturb(run.ema)
            record['initial'] = {key: deepcopy(value.state_dict())
                                 for key, value in run.saved().items()}
        parts = record['steps'].setdefault(run.step, dict(parts=[]))['parts']
        for part in noisy_parts(run, *args, **kwargs):
            parts.append(deepcopy(vars(part)))
            yield part

    training.noisy_parts = watched_parts
    watch(MemoryP2P, 'choose_pixels',
          lambda chosen, *_: record['steps'][max(record['steps'])].update(chosen=chosen))


def watch_samples():
    from model import UNet
    from runtime import seeding
    watch(seeding, 'noise_of_images', lambda x_T, *_: record['x_T'].append(x_T))
    watch(UNet, 'forward', lambda _, net, x, t, y=None: record['labels'].append(deepcopy(y)))


def watch_classifier():
    from classifier.networks import Classifier
    from torch.nn import functional
    forward = Classifier.forward

    def watched_forward(self, x):
        if self.training:
            record['initial'] = record['initial'] or deepcopy(dict(self.state_dict()))
            record['inputs'].append([deepcopy(x)])
        return forward(self, x)

    Classifier.forward = watched_forward
    watch(functional, 'cross_entropy',
          lambda _, logits, y: record['inputs'][-1].append(deepcopy(y)))


def main():
    file, script = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    if script.endswith('eval.py'):
        watch_samples()
    elif script.startswith('classifier'):
        watch_classifier()
    else:
        watch_training()
    sys.path[0] = str((ROOT / script).parent)
    try:
        runpy.run_path(str(ROOT / script), run_name='__main__')
    finally:
        torch.save(record, file + os.environ.get('RANK', '').replace('0', ''))


if __name__ == '__main__':
    main()
