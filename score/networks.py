"""Networks that turn images into features and class probabilities.

Data sets and samples take the same path: uint8 or float images in, `images_01` decides the range,
once. Computation is in float32 whatever the surrounding precision.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from classifier import load_classifier
from runtime import checkpoint, distributed, options
from runtime.options import UserError

# The weights of pytorch-fid: TensorFlow's Inception of 2015-12-05. The file name ends in the
# first digits of its SHA-256.
INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'
INCEPTION_HASH = '6726825d'


def images_01(images):
    """Images (B, 3, H, W), uint8 in 0..255 or float in [-1, 1], as float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return (images.float() + 1) / 2


def to_uint8(x):
    """Float images in [-1, 1] rounded to the 8 bits of image files; values outside are clamped.

    Raises:
        UserError: values that are not finite, which 8 bits would hide.
    """
    if not torch.isfinite(x).all():
        raise UserError('the images to be rounded to 8 bits hold values that are not finite; the '
                        'network that made them has diverged', code=1)
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


class FeatureNetwork:
    """A frozen network for scoring, with an identity that statistics remember.

    Attributes:
        name: identity of architecture and weights. dim: width D of the features.
        spec: what --feature_network was.
    """

    def __init__(self, forward, name, dim, spec):
        self.forward, self.name, self.dim, self.spec = forward, name, dim, spec

    @torch.no_grad()
    def __call__(self, images):
        """Images (B, 3, H, W), uint8 or float in [-1, 1] -> features (B, D), probs (B, K)."""
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
        UserError: no such file, or not the weights expected; or no file and no network (code 1).
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
    """pytorch-fid's Inception as a `FeatureNetwork`."""
    path = options.find(weights) if weights else downloaded_inception()
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
    """torchvision's Inception3 with pytorch-fid's changes and these weights, frozen."""
    import runtime.torchvision_cpu  # noqa: F401  # before pytorch_fid, which imports torchvision
    from pytorch_fid import inception
    fetch = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *args, **kwargs: state_dict     # it would download
    try:
        network = inception.fid_inception_v3()
    except RuntimeError:
        raise UserError(f'{path} does not hold the weights of pytorch-fid\'s Inception; expected '
                        f'the file {INCEPTION_FILE}')
    finally:
        inception.load_state_dict_from_url = fetch
    return network.eval().requires_grad_(False)


def downloaded_inception():
    """Path of Inception's weights in torch's cache; the first process fetches them if needed."""
    import runtime.torchvision_cpu  # noqa: F401
    from pytorch_fid.inception import FID_WEIGHTS_URL
    path = Path(torch.hub.get_dir()) / 'checkpoints' / INCEPTION_FILE
    with distributed.main_first():
        if not path.is_file():
            download(FID_WEIGHTS_URL, path)
    return path


def download(url, path):
    distributed.print0(f'Fetching {url}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), INCEPTION_HASH, distributed.is_main())
    except (OSError, RuntimeError) as error:        # no network, or a broken download
        raise UserError(f'the weights of Inception could not be fetched ({error}); get {url} on '
                        f'another machine and give the file as --inception_weights, or score with '
                        f'a classifier: --feature_network PATH', code=1)
