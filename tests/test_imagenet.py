"""torchvision's ImageNet classifiers behind our interface, with random weights: no download."""

import functools

import pytest
import torch

from classifier import load_imagenet
from runtime import checkpoint
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision

models = torchvision().models
NAMES = ['resnet18', 'densenet121']


@functools.lru_cache(None)
def network(name):
    torch.manual_seed(0)
    return getattr(models, name)(weights=None).eval()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """{name: file of its state dict, as torchvision publishes it}"""
    folder = tmp_path_factory.mktemp('imagenet')
    for name in NAMES:
        torch.save(network(name).state_dict(), str(folder / f'{name}.pth'))
    return {name: folder / f'{name}.pth' for name in NAMES}


def images(size):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def prepared(x):
    """Images in [-1, 1] as torchvision's weights expect them."""
    x = torch.nn.functional.interpolate(x, (224, 224), mode='bilinear', antialias=True)
    normalise = torchvision().transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return normalise((x + 1) / 2)


@pytest.mark.parametrize('name, size', [('resnet18', 300), ('densenet121', 32)])
def test_outputs_are_those_of_torchvision(files, name, size):
    expected, seen = network(name), []
    last = expected.fc if name == 'resnet18' else expected.classifier
    hook = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ours = load_imagenet(f'imagenet_{name}', str(files[name]))
    x = images(size).requires_grad_()
    logits, feature, feature_map = ours(x)
    with torch.no_grad():
        torch.testing.assert_close(logits, expected(prepared(x)), rtol=1e-5, atol=1e-5)
    hook.remove()
    torch.testing.assert_close(feature, seen[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feature_map.mean((2, 3)), feature, rtol=1e-5, atol=1e-5)
    assert feature_map.shape == (1, ours.num_features, 7, 7) and feature_map.min() == 0
    assert logits.shape == (1, ours.num_classes) == (1, 1000) and feature.std() > 0
    assert ours.name == f'imagenet_{name}' and not ours.training
    assert list(ours.network.state_dict()) == list(expected.state_dict())
    logits.square().sum().backward()        # through the frozen weights to the images
    assert x.grad.abs().sum() > 0 and not any(p.requires_grad for p in ours.parameters())


def test_files_of_other_kinds(files, tmp_path):
    wrapped = {'module.' + key: value for key, value in network('resnet18').state_dict().items()}
    checkpoint.save(tmp_path / 'ours.pt', dict(model=wrapped))
    ours = load_imagenet('imagenet_resnet18', tmp_path / 'ours.pt')
    assert torch.equal(ours.network.fc.weight, network('resnet18').fc.weight)
    checkpoint.save(tmp_path / 'unet.pt', dict(net_model={}, T=8))
    for name, file, words in [
            ('resnet34', files['resnet18'], 'holds conv1.weight, .* torchvision\'s resnet34'),
            ('resnet18', files['densenet121'], 'holds features.conv0.weight, .* resnet18'),
            ('resnet18', tmp_path / 'unet.pt', 'holds net_model, T, which are not the weights'),
            ('resnet18', tmp_path / 'none.pt', 'there is no checkpoint')]:
        with pytest.raises(UserError, match=words) as caught:
            load_imagenet(f'imagenet_{name}', file)
        assert str(file) in str(caught.value) and '\n' not in str(caught.value)


def test_file_with_the_old_names_of_densenets(tmp_path):
    """The files on torchvision's server have norm.1 where its networks have norm1."""
    weights, old = network('densenet121').state_dict(), {}
    for key, value in weights.items():
        for layer in ('norm1', 'norm2', 'conv1', 'conv2'):
            if 'denselayer' in key:
                key = key.replace(f'.{layer}.', f'.{layer[:-1]}.{layer[-1]}.')
        if not key.endswith('num_batches_tracked'):     # nor did torch have these
            old[key] = value
    assert 'features.denseblock1.denselayer1.norm.1.weight' in old
    torch.save(old, str(tmp_path / 'densenet121.pth'))
    ours = load_imagenet('imagenet_densenet121', tmp_path / 'densenet121.pth')
    found = ours.network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize('name', ['resnet', 'resnet19', 'densenet', 'vgg16', ''])
def test_unknown_names(name):
    with pytest.raises(UserError, match=f'"imagenet_{name}"; expected imagenet_ and a DenseNet or'):
        load_imagenet(f'imagenet_{name}')


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(weights):
        raise OSError('no route to host\nand a second line')

    monkeypatch.setattr(models, 'resnet18', offline)
    with pytest.raises(UserError, match='no route to host.*--classifier_path') as caught:
        load_imagenet('imagenet_resnet18')
    assert caught.value.code == 1 and '\n' not in str(caught.value)
