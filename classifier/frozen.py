"""Trained classifiers, frozen: those of classifier/train.py, published ones, and torchvision's."""

import re

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from classifier.networks import IMAGENET, NETWORKS, build_classifier, imagenet_classifier
from runtime import checkpoint, cli, distributed, flags
from runtime.cli import UserError, first_line
from runtime.optim import frozen
from runtime.torchvision_cpu import torchvision

PREFIX = 'imagenet_'        # of the names of torchvision's networks
# mean and std of images in [0, 1]; None: those in the checkpoint
NORMALISATIONS = {
    'stored': (None, None),
    '05': ([0.5] * 3, [0.5] * 3),       # leaves images in [-1, 1] as they are
    # as released: this std is the mean of the standard deviations of single images
    'cifar10': ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    'imagenet': IMAGENET}
# torchvision's files of DenseNets name layers "norm.1", its networks "norm1"
OLD_KEY = re.compile(r'(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)')


def load_frozen(name, path, dataset, normalisation, device):
    """The network whose features a distillation compares, in eval mode on `device`.

    Args:
        name: of the classifier; imagenet_<model>: torchvision's, which needs no labels.
        path: its folder or file; None: where classifier/train.py writes it.
        dataset: whose classes it must have.
        normalisation: key of `NORMALISATIONS`.
    """
    if name.startswith(PREFIX):
        flags.without_effect(classifier_normalisation='these weights expect that of ImageNet')
        network = load_imagenet(name, path)
    else:
        path = path or f'classifier/result/{dataset.name}/{name}'
        network = load_classifier(path, name, dataset.num_classes, *NORMALISATIONS[normalisation])
        if network.img_size not in (None, dataset.img_size):
            distributed.print0(f'note: the classifier in {path} was trained on images of '
                               f'{network.img_size} pixels, these have {dataset.img_size}; train '
                               f'one with --img_size {dataset.img_size}.')
    network = fold_batch_norms(network)
    with torch.no_grad():
        _, _, feature_map = network(torch.zeros(1, 3, dataset.img_size, dataset.img_size))
    if feature_map.shape[2:].numel() == 1:
        distributed.print0(f'note: the feature map of {name} has one pixel for images of '
                           f'{dataset.img_size} pixels: IS_P2P is 0; take one that halves less.')
    return network.to(device, memory_format=torch.channels_last)


def load_classifier(path, name=None, num_classes=None, mean=None, std=None):
    """The frozen `Classifier` of a checkpoint, in eval mode, on the CPU; draws no random numbers.

    name and num_classes are those expected, if given; a published file does not name its network.
    mean, std: input normalisation, three numbers each, of images in [0, 1]; None: those in the
        checkpoint, or 0.5 for a published file, which has none.
    """
    file = checkpoint.find(cli.find(path))
    if not file.exists():
        raise UserError(f'there is no classifier {file}; train one with: python '
                        f'classifier/train.py --model {name or "NAME"} --dataset DATASET')
    state = checkpoint.read(file)
    weights = state['model'] if isinstance(state.get('model'), dict) else {}
    weights = checkpoint.plain_keys(weights)
    if getattr(weights.get('fc.weight'), 'ndim', 0) != 2:
        kind = 'is a diffusion checkpoint' if 'net_model' in state else 'is no classifier'
        raise UserError(f'{file} {kind} (it holds {checkpoint.some_of(weights or state)}), '
                        f'expected a 2-D fc.weight in "model"; give what classifier/train.py wrote')
    found, classes = state.get('name', name), len(weights['fc.weight'])
    if found is None:
        raise UserError(f'{file} does not name its network; give what classifier/train.py '
                        f'wrote')
    if 'name' in state and (name not in (None, found) or found not in list(NETWORKS)):
        raise UserError(f'{file} holds the classifier {str(found)[:60]}, expected '
                        f'{name or "one of this project"}; give its own name or another folder')
    if num_classes not in (None, classes):
        raise UserError(f'the classifier {file} has {classes} classes, expected {num_classes}; '
                        f'give one trained on the same data set')
    mean = mean or stored_normalisation(state, 'mean', 0, file)
    std = std or stored_normalisation(state, 'std', 1e-6, file)
    with torch.device('meta'):
        network = build_classifier(found, classes, mean, std)
    network.img_size = state.get('img_size')
    return with_weights(network, weights, found, file, assign=True)


def stored_normalisation(state, key, smallest, file):
    """Mean or std in a checkpoint, three numbers from `smallest` to 1; 0.5 where it has none."""
    found = state.get(key, [0.5] * 3)
    numbers = isinstance(found, (list, tuple)) and len(found) == 3 and all(
        isinstance(v, (int, float)) and smallest <= v <= 1 for v in found)
    if not numbers:
        raise UserError(f'{key} in {file} is {str(found)[:60]}, expected three numbers from '
                        f'{smallest} to 1; restore a copy')
    return found


def with_weights(network, weights, name, file, **how):
    """The network with these weights in float32, frozen, in eval mode; refused unless they fit."""
    differences = checkpoint.differences(weights, network.state_dict())
    try:
        network.load_state_dict(weights, **how)
    except RuntimeError:
        key, found, expected = next(differences, ['a tensor', 'of integers', 'real numbers'])
        raise UserError(f'the weights in {file} do not fit the classifier {name}: {key} is '
                        f'{found}, expected {expected}; name the network they were trained with')
    broken = checkpoint.not_finite(network.state_dict())
    if broken:
        raise UserError(f'{broken[0]} of the classifier in {file} holds NaN or inf; restore a copy')
    return frozen(network.float())


def load_imagenet(name, path=None):
    """`imagenet_<model>` with torchvision's weights: a frozen `Classifier`, on the CPU.

    path: file of a state dict of torchvision; None: downloaded once, into torch's cache.
    """
    model = name[len(PREFIX):]
    build = getattr(torchvision().models, model, None)
    if not model.startswith(('res', 'wide_res', 'densenet')) or not callable(build):
        raise UserError(f'there is no classifier "{name}"; expected imagenet_ and a DenseNet or '
                        f'ResNet of torchvision, as in imagenet_resnet50')
    if path is None:
        try:
            with distributed.main_first():      # the first process fetches them
                network = build(weights='DEFAULT')
        except (OSError, RuntimeError) as error:
            raise UserError(f'the weights of {name} could not be fetched ({first_line(error)}); '
                            f'get them elsewhere, and give the file as --classifier_path', code=1)
    else:
        file = checkpoint.find(cli.find(path))
        state = checkpoint.read(file)
        weights = state['model'] if isinstance(state.get('model'), dict) else state
        weights = {OLD_KEY.sub(r'\1\2', str(key)): value
                   for key, value in checkpoint.plain_keys(weights).items()}
        network = with_weights(build(weights=None), weights, name, file)
    return frozen(imagenet_classifier(name, network))


def fold_batch_norms(network):
    """Multiply batch norms of a frozen network into the convolutions right before them, in place.

    The results are the same up to rounding, with less to compute on a CPU and an operation less per
    layer to start on a GPU. The layers of our networks are registered in the order of computation.
    """
    for module in network.modules():
        children = list(module.named_children())
        for (name, conv), (next_name, norm) in zip(children, children[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, next_name, nn.Identity())
    return network
