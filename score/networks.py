"""Networks that turn images into features and class probabilities.

Data sets and samples are treated alike: images come as uint8 or float, and `images_01` alone brings
them into one range. Computation is in float32 whatever the surrounding precision.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from classifier import load_classifier
from runtime import checkpoint, cli, distributed
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision

# The weights of pytorch-fid: TensorFlow's Inception of 2015-12-05. The file name ends in the
# first digits of its SHA-256.
INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'
INCEPTION_HASH = '6726825d'


def images_01(images):
    """Images (B, 3, H, W), uint8 in 0..255 or float in [-1, 1], as float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return (images.float() + 1) / 2


class FeatureNetwork:
    """A frozen network for scoring, with a name by which statistics remember it.

    Attributes:
        forward: float32 images (B, 3, H, W) in [0, 1] -> features (B, D), logits (B, K).
        name: of the architecture and the weights. dim: width D of the features.
        spec: the value of --feature_network.
    """

    def __init__(self, forward, name, dim, spec):
        self.forward, self.name, self.dim, self.spec = forward, name, dim, spec

    @torch.no_grad()
    def __call__(self, images):
        """Images (B, 3, H, W), uint8 or float in [-1, 1] -> features (B, D), probabilities (B, K).

        Both are float32.
        """
        # TF32 would make the scores depend on the generation of the GPU.
        with torch.autocast(images.device.type, enabled=False), \
                torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features, logits = self.forward(images_01(images))
        return features, logits.softmax(1)


def load_feature_network(spec, device, weights=None):
    """The feature network `spec` on `device`.

    Args:
        spec: 'inception' for pytorch-fid's Inception (D = 2048, K = 1008), or the folder or file
            of a classifier that classifier/train.py wrote.
        weights: file with Inception's weights; None: downloaded once, into torch's cache.

    Returns:
        `FeatureNetwork`.

    Raises:
        UserError: no such file, or not the weights expected; the weights could not be downloaded
            (code 1).
    """
    if spec == 'inception':
        return load_inception(device, weights)
    classifier = load_classifier(spec).to(device)

    def forward(images):
        logits, feature, _ = classifier(images * 2 - 1)
        return feature, logits

    name = f'{classifier.name}-{digest_of(classifier)}'
    return FeatureNetwork(forward, name, classifier.num_features, spec)


def digest_of(classifier):
    """First 12 hex digits of the SHA-256 of weights and input normalisation."""
    digest = hashlib.sha256()
    tensors = dict(classifier.state_dict(), mean=classifier.mean, std=classifier.std)
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def load_inception(device, weights=None):
    """pytorch-fid's Inception as a `FeatureNetwork`; arguments as in `load_feature_network`."""
    path = cli.find(weights) if weights else downloaded_inception()
    if not path.is_file():
        raise UserError(f'--inception_weights {path} does not exist; give the file '
                        f'{INCEPTION_FILE} of pytorch-fid')
    inception = build_inception(checkpoint.read(path), path).to(device)
    head, inception.fc = inception.fc, nn.Identity()

    def forward(images):
        # As pytorch-fid does: resized to 299 px without antialiasing, then from [0, 1] to [-1, 1].
        images = nn.functional.interpolate(images, (299, 299), mode='bilinear', align_corners=False)
        features = inception(2 * images - 1)
        return features, head(features)

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    released = digest.startswith(INCEPTION_HASH)
    name = 'inception-2015-12-05' if released else f'inception-{digest[:12]}'
    return FeatureNetwork(forward, name, head.in_features, 'inception')


def build_inception(state_dict, path):
    """pytorch-fid's Inception with the weights `state_dict`, frozen, in eval mode, on the CPU.

    It is torchvision's Inception v3 with nine blocks replaced, as `fid_inception_v3` of pytorch-fid
    does it; that function downloads the weights, and so cannot be used with a file.

    Raises:
        UserError: not the weights of this network; `path` names their file.
    """
    models = torchvision().models       # repaired before pytorch_fid imports it
    from pytorch_fid.inception import (FIDInceptionA, FIDInceptionC, FIDInceptionE_1,
                                       FIDInceptionE_2)
    network = models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                  init_weights=False)
    for name, block in dict(
            Mixed_5b=FIDInceptionA(192, pool_features=32),
            Mixed_5c=FIDInceptionA(256, pool_features=64),
            Mixed_5d=FIDInceptionA(288, pool_features=64),
            Mixed_6b=FIDInceptionC(768, channels_7x7=128),
            Mixed_6c=FIDInceptionC(768, channels_7x7=160),
            Mixed_6d=FIDInceptionC(768, channels_7x7=160),
            Mixed_6e=FIDInceptionC(768, channels_7x7=192),
            Mixed_7b=FIDInceptionE_1(1280),
            Mixed_7c=FIDInceptionE_2(2048)).items():
        setattr(network, name, block)
    try:
        network.load_state_dict(state_dict)
    except (RuntimeError, AttributeError):      # AttributeError: keys that are not words
        raise UserError(f'{path} does not hold the weights of pytorch-fid\'s Inception; expected '
                        f'the file {INCEPTION_FILE}')
    return network.eval().requires_grad_(False)


def downloaded_inception():
    """Path of Inception's weights in torch's cache; the first process fetches them if needed."""
    torchvision()       # repaired before pytorch_fid imports it
    from pytorch_fid.inception import FID_WEIGHTS_URL
    path = Path(torch.hub.get_dir()) / 'checkpoints' / INCEPTION_FILE
    with distributed.main_first():
        if not path.is_file():
            download(FID_WEIGHTS_URL, path)
    return path


def download(url, path):
    """Fetch Inception's weights and check their hash.

    Raises:
        UserError: no network, no room, or a damaged download (code 1).
    """
    distributed.print0(f'Fetching {url}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), INCEPTION_HASH, distributed.is_main())
    except (OSError, RuntimeError) as error:        # RuntimeError: the hash is another
        reason = str(error).split('\n')[0]
        raise UserError(f'the weights of Inception could not be fetched ({reason}); get {url} on '
                        f'another machine and give the file as --inception_weights, or score with '
                        f'a classifier: --feature_network PATH', code=1)
