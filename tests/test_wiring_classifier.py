"""Training of a classifier and evaluation of a model against the formulas in float64."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

import oracle
from classifier.frozen import load_classifier
from classifier.networks import build_classifier
from classifier.augment import Augment, measured_normalisation
from formats.load import load_model
from helpers import ROOT, assert_ran, environment, fork_all, our_images
from runtime import checkpoint, data, seeding
from score.metrics import ActivationStats, frechet_distance, precision_recall
from wiring import make_inputs, near, started

TRAIN = dict(script='classifier/train.py', model='convnet_small', dataset='folder',
             data_root='photos', img_size=8, num_workers=0, epoch=4, recipe='plain', batchsize=8,
             grad_accum=2, init_lr=0.01, wd=0.02, normalize05=False, seed=3)
TRAINING = dict(
    plain={}, plain_two={}, released=dict(recipe='released'), released_two=dict(recipe='released'),
    other=dict(wd=0., batchsize=6, grad_accum=1, seed=4, normalize05=True))
EVAL = dict(script='ddim_eval.py', logdir='labels', stride=2, num_images=20, batch_size=8,
            sample_size=4, seed=0, weights='auto', fid_cache='stats.npz',
            feature_network='classifier', fid_float=False)
EVALUATION = dict(
    plain={}, student=dict(logdir='coarse'), epsilon=dict(logdir='epsilon', weights='ema'),
    other=dict(logdir='teacher', stride=1, seed=1, weights='net', num_images=30, fid_float=True))
MEASURE = dict(script='score/get_npz.py', dataset='folder', data_root='photos', img_size=8,
               feature_network='classifier', batchsize=4, num_workers=0, half=2, split='test')


def photos(folder, train):
    """Images in [-1, 1] in float64, and their labels."""
    found = data.make_dataset('folder', folder / 'photos', 8, train)
    return found.images.double() / 127.5 - 1, found.labels


def classified(folder, images):
    """Logits, features and maps of images in [-1, 1], by the classifier that scores."""
    return load_classifier(folder / 'classifier').double()(images.double())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The runs of all cases, each in a folder with its name; statistics of a data set."""
    folder = tmp_path_factory.mktemp('wiring_classifier')
    make_inputs(folder)
    features = np.random.default_rng(0).normal(size=(200, 64)) + 1
    _, real, _ = classified(folder, photos(folder, train=False)[0])
    np.savez(str(folder / 'stats.npz'), mu=features.mean(0), sigma=np.cov(features.T),
             features=real.numpy(), class_counts=[22] * 9 + [2])
    jobs = dict(measured_by_two=dict(MEASURE, output=folder / 'measured.npz'))
    for name in TRAINING:
        jobs[name] = dict(TRAIN, **TRAINING[name], result_path=folder / f'train-{name}')
    for name, change in EVALUATION.items():
        flags = dict(EVAL, **change)
        shutil.copytree(str(folder / flags['logdir']), str(folder / f'eval-{name}'))
        jobs[f'eval-{name}'] = dict(flags, logdir=f'eval-{name}', save_images=f'{name}.npz')
    commands = {name: [started(folder, flags, ranks=2 if name.endswith('two') else 1)]
                for name, flags in jobs.items()}
    for result in fork_all(commands).values():
        assert_ran(result)
    return folder


def test_scores_outlive_the_reader_of_the_output(folder):
    shutil.copytree(str(folder / 'labels'), str(folder / 'unread'))
    words = ' '.join(started(folder, dict(EVAL, logdir='unread'))['argv'])
    subprocess.run(f'{sys.executable} {ROOT}/{words} | head -1', shell=True, cwd=str(folder),
                   env=environment())
    assert (folder / 'unread/results.jsonl').exists()


def test_a_score_that_cannot_be_written_is_printed(folder):
    shutil.copytree(str(folder / 'labels'), str(folder / 'full'))
    (folder / 'full/results.jsonl').mkdir()
    code, out, _ = fork_all(dict(it=[started(folder, dict(EVAL, logdir='full'))]))['it'][0]
    assert code == 1 and 'Frechet distance ' in out


def rates(flags, steps):
    """Plain: a cosine. Released: divided by 10 after half and three quarters of the epochs."""
    if flags['recipe'] == 'plain':
        return [oracle.rate(step, flags['init_lr'], 0, steps, True) for step in range(1, steps + 1)]
    return [flags['init_lr'] / by for by in (1, 1, 10, 100) for _ in range(steps // 4)]


def batches(flags, dataset, steps):
    """Yield images and labels of all steps: augmented, or moved by up to a pixel over black."""
    size, seed, plain = flags['batchsize'], flags['seed'], flags['recipe'] == 'plain'
    stream, augment = data.batches(dataset, size, seed, 'cpu'), Augment(8, seed)
    for step in range(1, steps + 1):
        x_0, y = next(stream)
        if plain:
            rng = seeding.generator('cpu', seed, seeding.CROP, step)
            corners = torch.randint(0, 3, (2, size), generator=rng).t().tolist()
            padded = pad(x_0, (1,) * 4, value=-1.)
            x_0 = torch.stack([image[:, top:top + 8, left:left + 8]
                               for image, (top, left) in zip(padded, corners)])
        else:
            first = (step - 1) * size       # place in the stream of all images
            chosen = dataset.images[data.indices_of_step(len(dataset), size, seed, step - 1)]
            changed = [augment(image, place) for place, image in enumerate(chosen, first)]
            x_0 = torch.stack(changed).float() / 127.5 - 1
        yield x_0, y


@pytest.mark.parametrize('case', TRAINING)
def test_training(folder, case):
    flags = dict(TRAIN, **TRAINING[case])
    name = flags['model'] + ('_normalize05' if flags['normalize05'] else '')
    state = checkpoint.read(folder / f'train-{case}/folder/{name}')
    steps = 24 // flags['batchsize'] * flags['epoch']
    assert state['step'] == state['total_steps'] == steps
    dataset = data.make_dataset('folder', folder / 'photos', 8, train=True)
    mean, std = measured_normalisation(dataset)
    if flags['normalize05']:
        mean = std = [.5] * 3
    assert (state['mean'], state['std']) == (mean, std)
    torch.manual_seed(seeding.mix(flags['seed'], seeding.WEIGHTS))
    before = build_classifier(flags['model'], 3).state_dict()
    net = oracle.classifier_trained(
        state, before, batches(flags, dataset, steps), rates(flags, steps), flags['wd'],
        nesterov=flags['recipe'] == 'plain', accum=flags['grad_accum'])
    for key, value in net.state_dict().items():
        if value.is_floating_point():
            found = state['model'][key].double() - before[key]
            # a ReLU at 0 may round either way
            assert near(found, value - before[key], 5e-2, 1e-5), key
    images, labels = photos(folder, train=False)
    right = net.eval()(images)[0].argmax(1) == labels
    assert state['accuracy'] == pytest.approx(right.double().mean().item(), abs=1.01 / 60)


def test_statistics(folder):
    """Of the chosen images, in batches of 4 and 3 on each of two processes."""
    logits, feature, _ = classified(folder, photos(folder, train=False)[0][1::2])
    stats = ActivationStats(30)
    mixed = torch.randperm(30, generator=torch.Generator().manual_seed(0))   # in the score's splits
    stats.update(feature, logits.softmax(1), mixed)
    with np.load(str(folder / 'measured.npz')) as file:
        assert file['num_images'] == 30
        np.testing.assert_allclose(file['mu'], feature.mean(0).numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file['sigma'], np.cov(feature.T.numpy()), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(file['features'], feature.numpy(), rtol=1e-4, atol=1e-5)
        found = file['inception_mean'], file['inception_std']
    assert found == pytest.approx(stats.inception_score(), rel=1e-3)


@pytest.mark.parametrize('case', EVALUATION)
def test_evaluation(folder, case):
    """Images, labels, Frechet distance and Inception score."""
    flags = dict(EVAL, **EVALUATION[case])
    model = load_model(folder / flags['logdir'], flags['weights'])
    result = json.loads((folder / f'eval-{case}/results.jsonl').read_text())
    with np.load(str(folder / f'{case}.npz')) as file:
        saved = {key: torch.from_numpy(file[key]) for key in file.files}
    number, y = flags['num_images'], saved.get('arr_1')
    assert (y is not None) == (flags['logdir'] == 'labels')
    if y is not None:
        assert result['labels'] == 'as in the reference'
    x_T = seeding.noise_of_images(flags['seed'], range(number), (3, 8, 8), 'cpu').double()
    model.network.double()
    x = our_images(model, x_T, y, flags['stride'])
    pixels = saved['arr_0'].permute(0, 3, 1, 2)
    assert pixels.shape == x.shape and pixels.dtype == torch.uint8
    assert (pixels - (x + 1) * 127.5).abs().max() < 0.51
    shown = x if flags['fid_float'] else pixels.double() / 127.5 - 1
    logits, feature, _ = classified(folder, shown)
    stats = ActivationStats(number)
    stats.update(feature, logits.softmax(1), torch.arange(number))
    with np.load(str(folder / flags['fid_cache'])) as reference:
        fid = frechet_distance(*stats.mean_cov(), reference['mu'], reference['sigma'])
        both = precision_recall(reference['features'], feature.numpy())
    mean, std = stats.inception_score()
    assert result['fid'] == pytest.approx(fid, rel=0, abs=2e-4)      # 8 bits change it by more
    assert result['inception_score'] == pytest.approx(mean, rel=1e-4)
    assert result['inception_std'] == pytest.approx(std, rel=1e-2, abs=1e-4)
    assert (result['precision'], result['recall']) == pytest.approx(both, abs=1e-4)
    assert (result['weights'], result['seed']) == (model.weights_name, flags['seed'])
    assert result['nfe'] == model.diffusion.T // flags['stride']
