"""The frozen classifier that a distillation compares features with, chosen by the flags."""

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from classifier.checkpoint import load_classifier
from classifier.imagenet import MEAN, PREFIX, STD, load_imagenet
from runtime import distributed, flags

# mean and std of images in [0, 1] for a classifier that does not say; None: as stored
NORMALISATIONS = {
    'stored': (None, None),
    '05': ((0.5,) * 3, (0.5,) * 3),
    'cifar10': ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),       # as released
    'imagenet': (MEAN, STD)}


def load_frozen(name, path, dataset, normalisation, device):
    """The network whose features are compared, in eval mode on `device`.

    Args:
        name: of the classifier; imagenet_<model>: torchvision's, which needs no labels.
        path: its folder or file; None: where classifier/train.py writes it.
        dataset: whose classes it must know. normalisation: key of `NORMALISATIONS`.
    Raises:
        UserError: no such classifier, or one with other classes.
    """
    if name.startswith(PREFIX):
        for line in flags.without_effect(
                classifier_normalisation='these weights expect that of ImageNet'):
            distributed.print0(line)
        network = load_imagenet(name, path)
    else:
        path = path or f'classifier/result/{dataset.name}/{name}'
        network = load_classifier(path, name, dataset.num_classes, *NORMALISATIONS[normalisation])
    network = fold_batch_norms(network)
    with torch.no_grad():
        _, _, feature_map = network(torch.zeros(1, 3, dataset.img_size, dataset.img_size))
    if feature_map.shape[2:].numel() == 1:
        distributed.print0(f'note: the feature map of {name} has one pixel for images of '
                           f'{dataset.img_size} pixels, so that IS_P2P is 0; take a network with '
                           f'fewer halvings.')
    return network.to(device, memory_format=torch.channels_last)


def fold_batch_norms(network):
    """Multiply batch norms of a frozen network into the convolutions right before them, in place.

    The results are the same up to rounding, with less to compute on a CPU and an operation less per
    layer to start on a GPU. The layers of our networks are registered in the order of computation.
    Another network that shares these layers is broken by it.
    """
    for module in network.modules():
        children = list(module.named_children())
        for (_, conv), (name, norm) in zip(children, children[1:]):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                    norm.weight, norm.bias)
                setattr(module, name, nn.Identity())
    return network
