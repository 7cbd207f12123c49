"""torchvision's ImageNet classifiers, for images of any size and data sets without labels."""

import torch
import torch.nn.functional as F
from torch import nn

from runtime import checkpoint, options
from runtime.options import UserError

PREFIX = 'imagenet_'
SIZE = 224                                      # what these networks were trained on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageNetClassifier(nn.Module):
    """A torchvision DenseNet or ResNet behind the same `forward` as our classifiers.

    Images are resized to 224 px (antialiased) and normalised as the weights expect.
    """

    def __init__(self, name, network):
        super().__init__()
        self.name, self.network = name, network
        last = list(network.children())[-1]                 # the linear layer
        self.num_features, self.num_classes = last.in_features, last.out_features
        self.last = [last]                                  # in a list: not registered twice
        for key, value in (('mean', MEAN), ('std', STD)):
            self.register_buffer(key, torch.tensor(value)[:, None, None], persistent=False)

    def forward(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> logits (B, 1000), feature (B, C), feature_map."""
        x = F.interpolate(x, (SIZE, SIZE), mode='bilinear', antialias=True, align_corners=False)
        h = (x * 0.5 + 0.5 - self.mean) / self.std
        for name, part in list(self.network.named_children())[:-1]:
            if name != 'avgpool':
                h = part(h)
        feature_map = F.relu(h)                             # (B, C, 7, 7)
        feature = feature_map.mean((2, 3))
        return self.last[0](feature), feature, feature_map


def load_imagenet(name, path=None):
    """`imagenet_<model>` with torchvision's weights, frozen.

    Args:
        name: such as imagenet_resnet50 or imagenet_densenet201.
        path: file of torchvision's state dict; None: downloaded once, into torch's cache.
    Raises:
        UserError: no such model, not its weights, or no network to fetch them (code 1).
    """
    import runtime.torchvision_cpu  # noqa: F401
    from torchvision import models
    model = name[len(PREFIX):]
    if not model.startswith(('res', 'wide_res', 'densenet')) or not callable(
            getattr(models, model, None)):
        raise UserError(f'there is no classifier "{name}"; expected imagenet_ and a DenseNet or '
                        f'ResNet of torchvision, as in imagenet_resnet50')
    if path is None:
        return ImageNetClassifier(name, downloaded(models, model)).eval().requires_grad_(False)
    file = options.find(path)
    state = checkpoint.read(file)
    network = getattr(models, model)(weights=None)
    weights = state['model'] if isinstance(state.get('model'), dict) else state
    try:
        network.load_state_dict(checkpoint.plain_keys(weights))
    except (RuntimeError, AttributeError):
        raise UserError(f'{file} holds {checkpoint.some_of(weights)}, which are not the weights of '
                        f'torchvision\'s {model}; give their file, or leave --classifier_path '
                        f'out to have them fetched')
    return ImageNetClassifier(name, network).eval().requires_grad_(False)


def downloaded(models, model):
    """The network with torchvision's default weights; the first process fetches them."""
    from runtime import distributed
    try:
        with distributed.main_first():
            return getattr(models, model)(weights='DEFAULT')
    except (OSError, RuntimeError) as error:
        raise UserError(f'the weights of torchvision\'s {model} could not be fetched ({error}); '
                        f'get them on another machine and give the file as --classifier_path',
                        code=1)
