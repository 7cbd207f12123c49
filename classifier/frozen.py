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
    return fold_batch_norms(network).to(device, memory_format=torch.channels_last)


# a convolution and the batch norm after it, by their names in DenseNets and ResNets
FOLLOWS = (('conv0', 'norm0'), ('conv1', 'norm2'), ('conv1', 'bn1'), ('conv2', 'bn2'),
           ('conv3', 'bn3'), ('0', '1'))


def fold_batch_norms(network):
    """Multiply the batch norms of a frozen network into the convolutions before them, in place.

    What follows is the same up to rounding, with a tenth less to compute on a CPU and one
    operation less per layer to start on a GPU. Batch norms that come first in their layer stay.
    """
    for module in network.modules():
        for name, norm_name in FOLLOWS:
            conv, norm = getattr(module, name, None), getattr(module, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
                    norm.weight, norm.bias)
                setattr(module, norm_name, nn.Identity())
    return network
