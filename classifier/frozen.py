"""The frozen classifier that a distillation compares features with, chosen by the flags."""

import torch

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
    return network.to(device, memory_format=torch.channels_last)
