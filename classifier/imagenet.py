"""torchvision's ImageNet classifiers, for images of any size and data sets without labels."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from runtime import checkpoint, cli, distributed
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision

PREFIX = 'imagenet_'
SIZE = 224                                      # what these networks were trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# torchvision's files of DenseNets name layers "norm.1", its networks "norm1"
OLD_KEY = re.compile(r'(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)')


class ImageNetClassifier(nn.Module):
    """A torchvision DenseNet or ResNet with the same `forward` as our classifiers.

    Images are resized to 224 px (antialiased) and normalised as the weights expect.

    Args:
        name: of the classifier, as given to `load_imagenet`.
        network: torchvision's `DenseNet` or `ResNet`; shares its weights with this module.
    """

    def __init__(self, name, network):
        super().__init__()
        dense = isinstance(network, torchvision().models.DenseNet)
        from torchvision.models.feature_extraction import create_feature_extractor
        # Nodes of torchvision's graph: the final feature map after its ReLU, and the logits. Their
        # global average, between the two, is the node "flatten" of either family.
        feature_map, logits = ('relu', 'classifier') if dense else ('layer4', 'fc')
        linear = network.get_submodule(logits)
        self.name = name
        self.num_features, self.num_classes = linear.in_features, linear.out_features
        self.network = create_feature_extractor(
            network, {feature_map: 'feature_map', 'flatten': 'feature', logits: 'logits'})
        for key, value in (('mean', MEAN), ('std', STD)):
            self.register_buffer(key, torch.tensor(value)[:, None, None], persistent=False)

    def forward(self, x):
        """Images x (B, 3, H, W) in [-1, 1] -> logits (B, 1000), feature (B, C), feature_map.

        feature_map (B, C, 7, 7) comes after the final ReLU; feature is its mean over 7 x 7.
        """
        x = F.interpolate(x, (SIZE, SIZE), mode='bilinear', antialias=True, align_corners=False)
        found = self.network((x * 0.5 + 0.5 - self.mean) / self.std)
        return found['logits'], found['feature'], found['feature_map']


def load_imagenet(name, path=None):
    """`imagenet_<model>` with torchvision's weights: frozen, in eval mode, on the CPU.

    Args:
        name: such as imagenet_resnet50 or imagenet_densenet201.
        path: file of torchvision's state dict; None: downloaded once, into torch's cache.
    Returns:
        `ImageNetClassifier`: forward(x) -> logits (B, 1000), feature (B, C), feature_map.
    Raises:
        UserError: no such model, not its weights, or they could not be downloaded (code 1).
    """
    model = name[len(PREFIX):]
    build = getattr(torchvision().models, model, None)
    if not model.startswith(('res', 'wide_res', 'densenet')) or not callable(build):
        raise UserError(f'there is no classifier "{name}"; expected imagenet_ and a DenseNet or '
                        f'ResNet of torchvision, as in imagenet_resnet50')
    network = downloaded(build, model) if path is None else from_file(build, model, cli.find(path))
    return ImageNetClassifier(name, network).eval().requires_grad_(False)


def from_file(build, model, file):
    """torchvision's network `model`, made by `build`, with the weights in `file`."""
    state = checkpoint.read(file)
    weights = state['model'] if isinstance(state.get('model'), dict) else state
    network = build(weights=None)
    try:
        network.load_state_dict(current_keys(checkpoint.plain_keys(weights)))
    except (RuntimeError, AttributeError):
        raise UserError(f'{file} holds {checkpoint.some_of(weights)}, which are not the weights of '
                        f'torchvision\'s {model}; give their file, or leave --classifier_path '
                        f'out to have them fetched')
    return network


def current_keys(state_dict):
    """A state dict from torchvision's files with the names that its networks use."""
    return {OLD_KEY.sub(r'\1\2', key): value for key, value in state_dict.items()}


def downloaded(build, model):
    """The network with torchvision's default weights; the first process fetches them."""
    try:
        with distributed.main_first():
            return build(weights='DEFAULT')
    except (OSError, RuntimeError) as error:
        reason = str(error).split('\n')[0]
        raise UserError(f'the weights of torchvision\'s {model} could not be fetched ({reason}); '
                        f'get them on another machine and give the file as --classifier_path',
                        code=1)
