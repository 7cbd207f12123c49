"""Random numbers as pure functions of (seed, purpose, step): nothing to save, exact to resume."""

import numpy as np
import torch

# One stream per purpose, so that adding a draw to one never shifts another.
(WEIGHTS, ORDER, FLIP, NOISE, DROPOUT, _, CONTRAST, PIXELS, SAMPLES, LABELS, CROP,
 AUGMENT) = range(12)


def mix(*key):
    """A 63-bit seed from a tuple of non-negative integers, well mixed by numpy's SeedSequence.

    Zeros at the end do not count: the keys of one purpose must have one length.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(device, *key):
    """A fresh generator on `device` whose numbers depend on `key` alone."""
    return torch.Generator(device=device).manual_seed(mix(*key))


def to_device(tensor, device):
    """`tensor` on `device`; from pinned memory, so that the host does not wait for a GPU."""
    if torch.device(device).type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def noise_of_images(seed, indices, shape, device):
    """x_T (B, *shape) whose image i depends on (seed, indices[i]) only, on any machine."""
    rows = [torch.randn(shape, generator=generator('cpu', seed, SAMPLES, int(i))) for i in indices]
    return to_device(torch.stack(rows), device)
