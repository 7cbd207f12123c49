"""Loads trained classifiers: our files, which describe themselves, and published ones."""

import torch

from classifier.networks import build_classifier
from runtime import checkpoint, cli
from runtime.cli import UserError

IDENTITY = (0.5,) * 3       # mean and std that leave images in [-1, 1] as they are


def load_classifier(path, name=None, num_classes=None, mean=None, std=None):
    """The frozen classifier of a checkpoint, in eval mode, on the CPU.

    Args:
        path: `<result_path>/<dataset>/<model>` or the `ckpt.pt` in it; relative paths are looked
            up in the working directory, then in the repository root.
        name: the network expected; required for a published file, which does not name its own.
        num_classes: the number of classes expected; None: any.
        mean, std: input normalisation, three numbers each, of images in [0, 1]; None: those in
            the checkpoint, or 0.5 for a published file, which has none and so gets images in
            [-1, 1] as they are.

    Returns:
        `Classifier`: forward(x) -> logits (B, K), feature (B, C), feature_map (B, C, H', W').

    Raises:
        UserError: no such file, not a classifier, or another classifier than the one expected.
    """
    file = checkpoint.find(cli.find(path))
    if not file.exists():
        raise UserError(f'there is no classifier {file}; train one with: python '
                        f'classifier/train.py --model {name or "NAME"} --dataset DATASET')
    state = checkpoint.read(file)
    weights = classifier_weights(state, file)
    name = agreed_name(state, name, file)
    check_normalisation(state, file)
    found = weights['fc.weight'].shape[0]
    if num_classes is not None and num_classes != found:
        raise UserError(f'the classifier {file} has {found} classes, expected {num_classes}; '
                        f'give one trained on the same data set')
    return assemble(name, weights, mean or state.get('mean', IDENTITY),
                    std or state.get('std', IDENTITY), file)


def classifier_weights(state, file):
    """The state dict under `model`, without the prefixes of wrapped networks, in float32."""
    if 'net_model' in state:
        raise UserError(f'{file} is a diffusion checkpoint (it has net_model), expected a '
                        f'classifier; give what classifier/train.py wrote')
    if not isinstance(state.get('model'), dict):
        raise UserError(f'{file} is not a classifier: expected the key "model", found '
                        f'{checkpoint.some_of(state)}')
    weights = checkpoint.plain_keys(state['model'])
    if getattr(weights.get('fc.weight'), 'ndim', 0) != 2:
        raise UserError(f'{file} is not a classifier of this project: its "model" holds '
                        f'{checkpoint.some_of(weights)}, expected a matrix fc.weight among them')
    for key, value in weights.items():
        if not torch.is_tensor(value) or checkpoint.not_finite({key: value}):
            raise UserError(f'{key} of the classifier in {file} is not a tensor of finite numbers; '
                            f'train it again, or restore a copy')
    return {key: value.float() if value.is_floating_point() else value
            for key, value in weights.items()}


def check_normalisation(state, file):
    """Refuse a mean or std in a checkpoint that cannot be that of images."""
    for key, smallest in (('mean', 0), ('std', 1e-6)):
        found = state.get(key, IDENTITY)
        numbers = isinstance(found, (list, tuple)) and len(found) == 3 and all(
            isinstance(v, (int, float)) and smallest <= v <= 1 for v in found)
        if not numbers:
            raise UserError(f'{key} in {file} is {str(found)[:60]}, expected three numbers from '
                            f'{smallest} to 1; restore a copy')


def agreed_name(state, name, file):
    """The network's name, from the checkpoint, the caller or both."""
    stored = state.get('name', name)
    if stored is not None and not isinstance(stored, str):
        raise UserError(f'name in {file} is {str(stored)[:60]}, expected that of a network; '
                        f'restore a copy')
    if stored is None:
        raise UserError(f'{file} does not say which network it holds; name it, as in '
                        f'--classifier densenet201')
    if name is not None and name != stored:
        raise UserError(f'{file} holds the classifier {stored}, expected {name}; give its own '
                        f'name or another folder')
    return stored


def assemble(name, weights, mean, std, file):
    """A frozen classifier with these weights, made without drawing random numbers.

    Raises:
        UserError: the weights are those of another network.
    """
    with torch.device('meta'):
        classifier = build_classifier(name, weights['fc.weight'].shape[0], mean, std)
    key, found, expected = next(checkpoint.differences(weights, classifier.state_dict()), [''] * 3)
    try:
        classifier.load_state_dict(weights, assign=True)
    except RuntimeError:
        raise UserError(f'the weights in {file} do not fit the classifier {name}: {key} is '
                        f'{found}, expected {expected}; name the network they were trained with')
    return classifier.eval().requires_grad_(False)
