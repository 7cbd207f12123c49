"""torchvision's ImageNet classifiers behind our interface, small and with random weights."""

import re
from unittest.mock import Mock

import pytest
import torch

from classifier.frozen import load_imagenet
from runtime import checkpoint
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision

models = torchvision().models


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks with one layer per block in the place of the published ones."""
    block = models.resnet.BasicBlock
    monkeypatch.setattr(models, 'resnet18', lambda weights: models.ResNet(block, [1] * 4))
    monkeypatch.setattr(models, 'densenet121', lambda weights: models.DenseNet(8, [1] * 4, 8))


def network(name):
    torch.manual_seed(0)
    return getattr(models, name)(weights=None).eval()


@pytest.mark.parametrize('name, size, last', [('resnet18', 300, 'fc'),
                                              ('densenet121', 32, 'classifier')])
def test_outputs_are_those_of_torchvision(tmp_path, name, size, last):
    """The files on torchvision's server have norm.1 where its DenseNets have norm1."""
    expected, seen = network(name), []
    getattr(expected, last).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    weights = {re.sub(r'(denselayer\d\.)(norm|conv)([12])', r'\1\2.\3', key): value
               for key, value in expected.state_dict().items() if 'num_batches' not in key}
    if name == 'densenet121':
        weights = dict(model={f'module.{key}': value for key, value in weights.items()})
    torch.save(weights, str(tmp_path / 'x.pth'))
    ours = load_imagenet(f'imagenet_{name}', str(tmp_path / 'x.pth'))
    x = (torch.rand(1, 3, size, size) * 2 - 1).requires_grad_()
    logits, feature, feature_map = ours(x)
    prepared = torch.nn.functional.interpolate((x + 1) / 2, (224, 224), mode='bilinear',
                                               antialias=True)
    normalise = torchvision().transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(logits, expected(normalise(prepared)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feature, seen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feature_map.mean((2, 3)), feature, rtol=1e-5, atol=1e-5)
    assert feature_map.shape == (1, ours.num_features, 7, 7) and feature_map.min() == 0
    assert ours.num_classes == 1000 and ours.name == f'imagenet_{name}' and not ours.training
    logits.square().sum().backward()        # through the frozen weights to the images
    assert x.grad.abs().sum() > 0 and not any(p.requires_grad for p in ours.parameters())


def test_refusals(tmp_path, monkeypatch):
    weights = network('resnet18').state_dict()
    torch.save(weights, str(tmp_path / 'resnet.pth'))
    checkpoint.save(tmp_path / 'unet.pt', dict(net_model={}, T=8))
    weights['layer1.0.conv1.weight'][0, 0] = float('nan')
    torch.save(weights, str(tmp_path / 'nan.pth'))
    monkeypatch.setattr(models, 'resnet34', Mock(side_effect=OSError('no route to host\nline 2')))
    unknown = 'expected imagenet_ and a DenseNet or'
    for name, file, words in [
            ('densenet121', 'resnet.pth', 'resnet.pth do not fit .*_densenet121: features.conv0.w'),
            ('resnet18', 'unet.pt', 'unet.pt do not fit the classifier imagenet_resnet18: conv1.w'),
            ('resnet18', 'nan.pth', 'layer1.0.conv1.weight of the classifier in .*nan.pth holds N'),
            ('resnet18', 'none.pt', 'there is no checkpoint .*none.pt'),
            ('resnet34', None, 'no route to host.*--classifier_path'),
            *((name, None, unknown) for name in ('resnet', 'resnet19', 'vgg16'))]:
        with pytest.raises(UserError, match=words) as caught:
            load_imagenet(f'imagenet_{name}', file and tmp_path / file)
        assert '\n' not in str(caught.value) and caught.value.code == 1 + (name != 'resnet34')
