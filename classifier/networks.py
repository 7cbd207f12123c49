"""Classifiers for small images, taken apart from torchvision's ImageNet networks.

The stem is a 3x3 convolution of stride 1 without max-pooling, so that 32 px images end in a 4x4
feature map. The parameter names are those of the published checkpoints.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision

# growth rate, layers per block, channels of the stem
DENSENETS = {
    'densenet121': (32, (6, 12, 24, 16), 64),
    'densenet161': (48, (6, 12, 36, 24), 96),
    'densenet169': (32, (6, 12, 32, 32), 64),
    'densenet201': (32, (6, 12, 48, 32), 64),
    'densenet_small': (12, (6, 8), 24),         # one halving: 8 px digits end in a 4x4 map
}
RESNETS = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d',
           'resnext101_32x8d', 'wide_resnet50_2', 'wide_resnet101_2')
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]       # mean and std of its images in [0, 1]


class Classifier(nn.Module):
    """Parts that run one after another, a ReLU, global average pooling and a linear layer.

    Args:
        parts: ordered dict, attribute name -> module; the last one gives (B, num_features, H', W').
        mean, std: three numbers each, of images in [0, 1]; the input is normalised with them.
    """

    def __init__(self, name, parts, num_features, num_classes, mean, std):
        super().__init__()
        self.name, self.num_features, self.num_classes = name, num_features, num_classes
        self.order = list(parts)
        self.size = None        # height and width that images are resized to; None: they are not
        self.img_size = None    # of the images that it was trained on, if known
        for key, part in parts.items():
            self.add_module(key, part)
        self.fc = nn.Linear(num_features, num_classes)
        nn.init.zeros_(self.fc.bias)
        # not part of the state dict, whose keys stay the published ones
        for key, value in (('mean', mean), ('std', std)):
            value = torch.tensor(value, dtype=torch.float32, device='cpu').view(1, 3, 1, 1)
            self.register_buffer(key, value, persistent=False)

    def normalise(self, x):
        """((x + 1) / 2 - mean) / std, written so that mean = std = 0.5 changes no bit."""
        return x * (0.5 / self.std) + (0.5 - self.mean) / self.std

    def forward(self, x):
        """Images x (B, 3, H, W) in [-1, 1] -> logits (B, K), feature (B, C), feature_map.

        feature_map (B, C, H', W') comes after the final ReLU; feature is its mean over H', W'.
        """
        if self.size:
            x = F.interpolate(x, (self.size, self.size), mode='bilinear', antialias=True)
        h = self.normalise(x)
        for key in self.order:
            h = getattr(self, key)(h)
        feature_map = F.relu(h)
        feature = feature_map.mean((2, 3))
        return self.fc(feature), feature, feature_map


class DenseBlock(nn.ModuleDict):
    """The layers of a dense block: each adds its channels to all that it gets.

    torchvision passes a list of tensors, each of which gets a gradient from every later layer:
    thousands of small additions. Here the channels so far are one tensor.
    """

    def forward(self, x):
        for layer in self.values():
            h = layer.conv1(layer.relu1(layer.norm1(x)))
            x = torch.cat([x, layer.conv2(layer.relu2(layer.norm2(h)))], 1)
        return x


def conv3x3(in_channels, channels, stride=1):
    """A 3x3 convolution without bias, initialised as torchvision does."""
    conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    if not conv.weight.is_meta:     # on the meta device, normal_ loads torch's compiler
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
    return conv


def densenet_parts(name):
    """DenseNet-BC (1608.06993)."""
    growth, layers, stem = DENSENETS[name]
    # The linear layer of the constructor is dropped: one class keeps it small.
    network = torchvision().models.DenseNet(growth, layers, stem, num_classes=1).features
    parts = OrderedDict(features=nn.Sequential(OrderedDict(
        conv0=conv3x3(3, stem), norm0=network.norm0, relu0=network.relu0)))
    for i in range(1, len(layers) + 1):
        parts[f'block{i}'] = DenseBlock(getattr(network, f'denseblock{i}'))
        if i < len(layers):
            parts[f'trans{i}'] = getattr(network, f'transition{i}')
    parts['final_norm'] = network.norm5
    return parts, network.norm5.num_features


def resnet_parts(name):
    """ResNet (1512.03385), ResNeXt (1611.05431) or wide ResNet (1605.07146)."""
    network = getattr(torchvision().models, name)(weights=None, num_classes=1)
    keys = ('bn1', 'relu', 'layer1', 'layer2', 'layer3', 'layer4')
    parts = OrderedDict(conv1=conv3x3(3, 64))
    parts.update((key, getattr(network, key)) for key in keys)
    return parts, network.fc.in_features


def convnet_parts(name):
    """Four plain convolutions: scores digits independently of the DenseNets."""
    channels, strides = (3, 32, 32, 64, 64), (1, 2, 1, 2)
    parts = OrderedDict()
    for i, stride in enumerate(strides):
        parts[f'stage{i + 1}'] = nn.Sequential(OrderedDict(
            conv=conv3x3(channels[i], channels[i + 1], stride),
            norm=nn.BatchNorm2d(channels[i + 1]), relu=nn.ReLU()))
    return parts, channels[-1]


# name -> function that makes (parts, number of features); their layers are registered in the order
# of computation, which frozen.py relies on
NETWORKS = {**dict.fromkeys(DENSENETS, densenet_parts), **dict.fromkeys(RESNETS, resnet_parts),
            'convnet_small': convnet_parts}


def build_classifier(name, num_classes, mean=(0.5,) * 3, std=(0.5,) * 3):
    """A freshly initialised `Classifier` for small images; mean and std 0.5 change no image."""
    if name not in NETWORKS:
        raise UserError(f'there is no classifier "{name}"; choose one of {", ".join(NETWORKS)}')
    parts, num_features = NETWORKS[name](name)
    return Classifier(name, parts, num_features, num_classes, mean, std)


def imagenet_classifier(name, network):
    """A `Classifier` that shares the layers of a DenseNet or ResNet of torchvision.

    Images are resized to 224 px (antialiased) and normalised as its weights expect.
    """
    *layers, (_, head) = network.named_children()
    parts = OrderedDict((key, part) for key, part in layers if key != 'avgpool')
    classifier = Classifier(name, parts, head.in_features, head.out_features, *IMAGENET)
    classifier.fc, classifier.size = head, 224
    return classifier
