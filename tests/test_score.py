"""Scores against closed forms, statistics files, and get_npz as a user runs it."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from classifier import build_classifier
from diffusion import Diffusion
from model import UNet
from runtime import checkpoint, data, distributed, seeding
from runtime.cli import UserError
from runtime.pictures import to_uint8
from runtime.torchvision_cpu import torchvision
from score import (ActivationStats, check_network, frechet_distance, inception_score,
                   load_feature_network, load_statistics, save_statistics)
from score.metrics import split_sums
from score.networks import build_inception, images_01
from score.reference import Statistics, check_writable, command_for
from helpers import ROOT, run_script

rng = np.random.RandomState(0)


def random_covariance(size, samples=50):
    return np.cov(rng.standard_normal((samples, size)), rowvar=False)


# Frechet distance

def test_equal_covariances():
    mu1, mu2, sigma = rng.standard_normal(8), rng.standard_normal(8), random_covariance(8)
    assert frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(np.sum((mu1 - mu2) ** 2))
    assert frechet_distance(mu1, sigma, mu1, sigma) == pytest.approx(0, abs=1e-10)


def test_diagonal_covariances():
    a, b, mu = rng.uniform(0, 2, 8), rng.uniform(0, 2, 8), np.zeros(8)
    expected = np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(mu, np.diag(a), mu, np.diag(b)) == pytest.approx(expected)


def test_rank_deficient_covariances():
    # u u^T and v v^T: the trace of the root of their product is |u . v|
    u, v, mu = rng.standard_normal(8), rng.standard_normal(8), np.zeros(8)
    expected = u @ u + v @ v - 2 * abs(u @ v)
    found = frechet_distance(mu, np.outer(u, u), mu, np.outer(v, v))
    assert found == pytest.approx(expected, rel=1e-6)


def test_symmetric():
    one, two = (np.zeros(8), random_covariance(8)), (np.ones(8), random_covariance(8))
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one))


def test_same_distance_as_pytorch_fid(monkeypatch):
    """Its own function; scipy 1.18 took away the argument with which it asks for a root."""
    scipy_linalg = pytest.importorskip('scipy.linalg', reason='pytorch-fid needs scipy')
    torchvision()
    from pytorch_fid import fid_score
    monkeypatch.setattr(fid_score, 'linalg', SimpleNamespace(
        sqrtm=lambda matrix, disp: (scipy_linalg.sqrtm(matrix), 0)))
    a, b = (rng.standard_normal((500, 64)) @ rng.standard_normal((64, 64)) + i for i in range(2))
    stats = [m for x in (a, b) for m in (x.mean(0), np.cov(x, rowvar=False))]
    expected = fid_score.calculate_frechet_distance(*stats)
    assert expected > 100 and frechet_distance(*stats) == pytest.approx(expected, rel=1e-9)


def test_arrays_and_tensors_of_any_precision():
    mu, sigma = rng.standard_normal(8), random_covariance(8)
    tensors = [torch.from_numpy(v) for v in (mu, sigma)]
    expected = frechet_distance(mu, sigma, mu + 1, np.eye(8))
    assert frechet_distance(*tensors, mu + 1, np.eye(8, dtype=np.float32)) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_same_distance_on_the_gpu():
    mu, sigma, other = rng.standard_normal(64), random_covariance(64, 500), random_covariance(64)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    found = frechet_distance(mu, sigma, mu + 1, other, device='cuda')
    assert torch.cuda.max_memory_allocated() > before       # it was there
    assert found == pytest.approx(frechet_distance(mu, sigma, mu + 1, other), rel=1e-9)


def test_statistics_that_cannot_be_compared():
    mu, sigma = np.zeros(3), np.eye(3)
    with pytest.raises(UserError, match='different shapes'):
        frechet_distance(mu, sigma, np.zeros(4), np.eye(4))
    with pytest.raises(UserError, match='not finite'):
        frechet_distance(mu, sigma, mu * np.nan, sigma)


# Inception score

def test_inception_score_bounds():
    uniform = np.full((100, 5), 0.2)
    assert inception_score(uniform) == pytest.approx((1, 0))
    one_hot = np.eye(5)[np.arange(100) % 5]
    assert inception_score(one_hot) == pytest.approx((5, 0))
    assert inception_score(one_hot[:1]) == pytest.approx((1, 0))      # fewer images than splits


def test_inception_score_is_the_definition():
    probs = torch.from_numpy(rng.standard_normal((40, 6))).softmax(1).numpy()
    scores = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in np.split(probs, 4)]
    assert inception_score(probs, splits=4) == pytest.approx((np.mean(scores), np.std(scores)))


# Streaming statistics

def streamed(features, probs, cuts, splits=3):
    stats = ActivationStats(len(features), splits)
    order = torch.arange(len(features))
    for part in torch.tensor_split(order, cuts):
        stats.update(features[part], probs[part], part)
    return stats


@pytest.mark.parametrize('cuts', [[], [1], [10, 11, 35]])
def test_stats_match_numpy(cuts):
    features = torch.from_numpy(rng.standard_normal((50, 7)))
    probs = torch.from_numpy(rng.standard_normal((50, 4))).softmax(1)
    stats = streamed(features, probs, cuts).reduce()
    mu, sigma = stats.mean_cov()
    assert np.abs(mu - features.numpy().mean(0)).max() < 1e-10
    assert np.abs(sigma - np.cov(features.numpy(), rowvar=False)).max() < 1e-10
    assert stats.inception_score() == pytest.approx(inception_score(probs.numpy(), 3))


def test_stats_survive_a_large_mean():
    features = (torch.randn(5000, 8, generator=torch.Generator().manual_seed(0)) + 100).float()
    _, sigma = streamed(features, torch.full((5000, 2), .5), [777]).mean_cov()
    assert np.abs(sigma - np.cov(features.double().numpy(), rowvar=False)).max() < 1e-9


def test_stats_of_two_processes(monkeypatch):
    features = torch.from_numpy(rng.standard_normal((20, 3)))
    probs = torch.from_numpy(rng.standard_normal((20, 4))).softmax(1)
    one, two = (ActivationStats(20) for _ in range(2))
    one.update(features[:5], probs[:5], torch.arange(5))
    two.update(features[5:], probs[5:], torch.arange(5, 20))
    others = iter(two.sums)
    monkeypatch.setattr(distributed, 'all_reduce_sum', lambda value: value.add_(next(others)))
    one.reduce()
    one.reduce()        # a second call changes nothing
    assert np.allclose(one.mean_cov()[1], np.cov(features.numpy(), rowvar=False), atol=1e-12)
    assert one.inception_score() == pytest.approx(inception_score(probs.numpy()))


def test_scores_depend_neither_on_batches_nor_on_processes(classifier_folder, monkeypatch):
    """The stream of ddim_eval.py: noise, samples, features, sums; of one process and of three."""
    torch.manual_seed(0)
    unet, diffusion = UNet(8, 32, [1], [0], 1).eval(), Diffusion(2, 4)
    torch.nn.init.xavier_uniform_(unet.tail[2].weight)
    network, total = load_feature_network(str(classifier_folder), 'cpu'), 24

    def stream(indices, batch_size):
        stats = ActivationStats(total)
        for part in indices.split(batch_size):
            with torch.no_grad():
                x_0 = diffusion.sample(unet, seeding.noise_of_images(0, part, (3, 8, 8), 'cpu'))
            stats.update(*network(x_0), part)
        return stats

    def scores(batch_size, processes):
        first, *others = (stream(indices, batch_size)
                          for indices in torch.arange(total).tensor_split(processes))
        values = iter(zip(*(other.sums for other in others)))
        monkeypatch.setattr(distributed, 'all_reduce_sum',
                            lambda value: value.add_(sum(next(values))) if others else value)
        mu, sigma = first.reduce().mean_cov()
        return [frechet_distance(mu, sigma, mu * 0, np.eye(len(mu))), *first.inception_score()]

    expected = scores(total, 1)
    assert expected[0] > 1 and expected[1] > 1
    for batch_size, processes in ((7, 1), (1, 1), (24, 3), (5, 3)):
        assert scores(batch_size, processes) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_memory_does_not_grow_with_the_images():
    sizes = []
    for count in (20, 2000):
        stats = streamed(torch.rand(count, 6), torch.full((count, 3), 1 / 3), [count // 2])
        sizes.append(sum(value.numel() for value in stats.sums))
    assert sizes[0] == sizes[1]


def test_stats_refusals():
    with pytest.raises(UserError, match='no images'):
        ActivationStats(3).reduce()
    stats = streamed(torch.zeros(1, 2), torch.ones(1, 1), [])
    with pytest.raises(UserError, match='two images'):
        stats.mean_cov()
    stats.total = 5
    with pytest.raises(UserError, match='expected 5'):
        stats.reduce()


def test_splits_are_contiguous():
    count, _, _ = split_sums(torch.ones(10, 1).double(), torch.arange(10), 10, 4)
    assert count.tolist() == [3, 2, 3, 2]


# Networks

def test_one_input_range():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    x = images.float() / 127.5 - 1
    assert torch.equal(to_uint8(x), images)
    torch.testing.assert_close(images_01(x), images_01(images))
    assert images_01(images).min() == 0 and images_01(images).max() == 1
    assert to_uint8(torch.tensor([-3., 3.])).tolist() == [0, 255]
    with pytest.raises(UserError, match='not finite'):
        to_uint8(torch.tensor([float('nan')]))


@pytest.fixture(scope='module')
def classifier_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('classifier')
    torch.manual_seed(0)
    model = build_classifier('convnet_small', 10)
    checkpoint.save(folder / 'ckpt.pt', dict(model=model.state_dict(), name='convnet_small'))
    return folder


def test_classifier_as_feature_network(classifier_folder, tmp_path):
    network = load_feature_network(str(classifier_folder), 'cpu')
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    features, probs = network(images)
    assert features.shape == (3, 64) and network.dim == 64
    torch.testing.assert_close(probs.sum(1), torch.ones(3))
    torch.testing.assert_close(network(images.float() / 127.5 - 1)[0], features)
    assert network.name.startswith('convnet_small-') and len(network.name) == 14 + 12
    state = checkpoint.read(classifier_folder)
    state['model']['fc.bias'] += 1
    checkpoint.save(tmp_path / 'ckpt.pt', state)
    assert load_feature_network(str(tmp_path), 'cpu').name != network.name


def test_missing_inception_weights(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='--inception_weights'):
        load_feature_network('inception', 'cpu', str(tmp_path / 'none.pth'))

    def offline(*args, **kwargs):
        raise OSError('no route to host')

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(UserError, match='--inception_weights') as caught:
        load_feature_network('inception', 'cpu')
    assert caught.value.code == 1


@pytest.fixture(scope='module')
def inception_weights():
    """State dict of pytorch-fid's Inception with random weights that keep the signal alive."""
    models = torchvision().models
    from pytorch_fid import inception
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, 'load_state_dict_from_url', lambda *args, **kwargs: None)
        patch.setattr(models.Inception3, 'load_state_dict', lambda self, state: None)
        weights = inception.fid_inception_v3().state_dict()
    rng = torch.Generator().manual_seed(0)
    for key, value in weights.items():      # nothing keeps the value that every new network has
        if value.ndim == 4:
            value.mul_(6 ** 0.5)
        elif value.is_floating_point() and 'bn.' in key:
            value.add_(torch.rand(value.shape, generator=rng) * 0.1)
    return weights


def test_inception_is_that_of_pytorch_fid(tmp_path, monkeypatch, inception_weights):
    weights = inception_weights
    torch.save(weights, str(tmp_path / 'weights.pth'))
    network = load_feature_network('inception', 'cpu', str(tmp_path / 'weights.pth'))
    assert network.dim == 2048 and network.name.startswith('inception-')
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    features, probs = network(images)
    assert probs.shape == (1, 1008) and probs.sum().item() == pytest.approx(1, abs=1e-5)
    from pytorch_fid import inception
    monkeypatch.setattr(inception, 'load_state_dict_from_url', lambda *args, **kwargs: weights)
    with torch.no_grad():
        expected = inception.InceptionV3([3]).eval()(images.float() / 255)[0].flatten(1)
        original = inception.fid_inception_v3().eval()
        big = torch.nn.functional.interpolate(images.float() / 255, (299, 299), mode='bilinear')
        logits = original(2 * big - 1)
    assert features.std() > 0.1 and probs.std() > 1e-5
    assert torch.equal(features, expected)
    assert torch.equal(probs, logits.softmax(1))
    ours = build_inception(weights, 'weights.pth')
    assert str(ours) == str(original) and list(ours.state_dict()) == list(original.state_dict())
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def test_other_inception_weights_refused(tmp_path, inception_weights):
    weights = dict(inception_weights)
    weights['fc.weight'] = weights['fc.weight'][:1000]      # torchvision's own has 1000 classes
    for name, state in (('classes', weights), ('other', dict(net_model={}, T=8)), ('keys', {1: 2})):
        torch.save(state, str(tmp_path / f'{name}.pth'))
        with pytest.raises(UserError, match='not hold the weights of pytorch-fid') as caught:
            load_feature_network('inception', 'cpu', str(tmp_path / f'{name}.pth'))
        assert f'{name}.pth' in str(caught.value) and '\n' not in str(caught.value)


# Statistics files

def statistics(**changes):
    facts = dict(mu=np.zeros(64), sigma=np.eye(64), dataset='digits', split='train', half=0,
                 num_images=9, img_size=16, network='convnet_small-0', inception_mean=2.)
    return Statistics(**dict(facts, **changes))


def test_statistics_round_trip(tmp_path):
    save_statistics(tmp_path / 'a.npz', statistics())
    loaded = load_statistics(tmp_path / 'a.npz')
    assert loaded.origin() == statistics().origin() and loaded.inception_mean == 2.
    assert np.array_equal(loaded.sigma, np.eye(64)) and loaded.inception_std is None
    assert [p.name for p in tmp_path.iterdir()] == ['a.npz']


def test_old_statistics(tmp_path, classifier_folder):
    np.savez(str(tmp_path / 'old.npz'), mu=np.zeros(64), sigma=np.eye(64))
    loaded = load_statistics(tmp_path / 'old.npz')
    assert loaded.network is None
    check_network(loaded, load_feature_network(str(classifier_folder), 'cpu'))


def test_statistics_refusals(tmp_path):
    def npz(name, **arrays):
        np.savez(str(tmp_path / name), **arrays)
    npz('keys.npz', mu=np.zeros(3))
    npz('shape.npz', mu=np.zeros(3), sigma=np.eye(4))
    npz('nan.npz', mu=np.full(3, np.nan), sigma=np.eye(3))
    npz('objects.npz', mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.save(str(tmp_path / 'array.npz.npy'), np.zeros(3))
    (tmp_path / 'text.npz').write_text('not an npz')
    (tmp_path / 'cut.npz').write_bytes((tmp_path / 'shape.npz').read_bytes()[:100])
    for name, words in [('cifar10.train.npz', 'get_npz.py --dataset cifar10'),
                        ('keys.npz', 'expected mu and sigma'), ('shape.npz', r'\(4, 4\)'),
                        ('nan.npz', 'not finite'), ('objects.npz', 'damaged'),
                        ('array.npz.npy', 'damaged'), ('text.npz', 'damaged'),
                        ('cut.npz', 'damaged')]:
        with pytest.raises(UserError, match=words) as caught:
            load_statistics(tmp_path / name)
        assert name in str(caught.value) and '\n' not in str(caught.value)


def test_other_network_refused(classifier_folder):
    network = load_feature_network(str(classifier_folder), 'cpu')
    with pytest.raises(UserError, match='feature network convnet_small-0'):
        check_network(statistics(), network)
    with pytest.raises(UserError, match='width 3'):
        check_network(statistics(network=None, mu=np.zeros(3), sigma=np.eye(3)), network)


def test_writable(tmp_path):
    check_writable(tmp_path / 'new/folder/a.npz')
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='--output'):
        check_writable(tmp_path / 'file/a.npz')


def test_command_for():
    assert command_for('x/cifar10.test.half2.npz').endswith('--dataset cifar10 --split test '
                                                            '--half 2')
    assert command_for('x/mine.npz').endswith('--dataset DATASET')


def test_get_npz(tmp_path, classifier_folder):
    flags = ['--dataset', 'digits', '--half', 1, '--max_images', 100, '--batchsize', 32,
             '--num_workers', 0, '--feature_network', classifier_folder, '--output']
    output = tmp_path / 'stats/digits.train.half1.npz'
    with ThreadPoolExecutor() as pool:      # side by side, to save time
        two = pool.submit(run_script, '-m', 'torch.distributed.run', '--standalone',
                          '--nproc_per_node=2', 'score/get_npz.py', *flags, tmp_path / 'two.npz')
        first = run_script('get_npz.py', *flags, output, cwd=ROOT / 'score')
    again = run_script('score/get_npz.py', *flags, output)
    assert first.returncode == 0, first.stderr
    assert again.returncode == 0 and 'already holds' in again.stdout
    loaded = load_statistics(output)
    network = load_feature_network(str(classifier_folder), 'cpu')
    check_network(loaded, network)
    assert loaded.num_images == 100 and loaded.half == 1 and loaded.inception_mean >= 1
    digits = data.make_dataset('digits', '.', 8, train=True)
    chosen = torch.arange(len(digits))[::2]
    chosen = chosen[torch.arange(100) * len(chosen) // 100]
    features = network(digits.images[chosen])[0].double().numpy()
    assert np.allclose(loaded.mu, features.mean(0), atol=1e-6)
    assert np.allclose(loaded.sigma, np.cov(features, rowvar=False), atol=1e-6)

    assert two.result().returncode == 0, two.result().stderr
    other = load_statistics(tmp_path / 'two.npz')
    assert np.allclose(loaded.sigma, other.sigma, atol=1e-9) and loaded.origin() == other.origin()
    assert loaded.inception_mean == pytest.approx(other.inception_mean)
