"""Training of a classifier and evaluation of a model against the formulas in float64.

As in test_wiring.py: the values of numbers are unlike their defaults in `plain`, and all others in
`other`.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

import oracle
from diffusion import Diffusion
from helpers import assert_ran, command, fork_all
from runtime import data, distributed
from score.metrics import ActivationStats, frechet_distance, precision_recall
from wiring import load, make_inputs, make_photos, near, photos, words

TRAIN = dict(script='classifier/train.py', model='convnet_small', dataset='folder',
             data_root='photos', img_size=8, num_workers=0, epoch=4, recipe='plain', batchsize=8,
             init_lr=0.01, wd=0.02, normalize05=False, seed=3)
TRAINING = dict(
    plain={}, released=dict(recipe='released'),
    other=dict(init_lr=0.02, wd=0., epoch=3, batchsize=6, seed=4, normalize05=True))
EVAL = dict(script='ddim_eval.py', logdir='labels', stride=2, num_images=20, batch_size=8,
            sample_size=4, seed=0, weights='auto', fid_cache='stats.npz',
            feature_network='classifier', fid_float=False)
EVALUATION = dict(
    plain={}, student=dict(logdir='coarse'), epsilon=dict(logdir='epsilon', weights='ema'),
    other=dict(logdir='teacher', stride=1, seed=1, weights='net', num_images=30, fid_float=True,
               fid_cache='other.npz'))
MEASURE = dict(script='score/get_npz.py', dataset='folder', data_root='photos', img_size=8,
               feature_network='classifier', batchsize=5, num_workers=0)
STATISTICS = dict(half=dict(half=2), test=dict(split='test'))
CASES = {f'{script}-{name}': dict(first, **change)
         for script, first, changes in (('train', TRAIN, TRAINING), ('eval', EVAL, EVALUATION))
         for name, change in changes.items()}


def classified(folder, images):
    """Logits, features and maps of images in [-1, 1], by the classifier that scores."""
    stored = load(folder / 'classifier/ckpt.pt')
    return oracle.classifier(stored, stored['mean'], stored['std'])(images.double())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The runs of all cases, each in a folder with its name; statistics of a data set."""
    folder = tmp_path_factory.mktemp('wiring_classifier')
    make_inputs(folder)
    make_photos(folder / 'photos')
    make_photos(folder / 'photos', 'test', 60)
    generator = np.random.default_rng(0)
    _, real, _ = classified(folder, photos(folder / 'photos', 'test')[0])
    for name in ('stats', 'other'):
        features = generator.normal(size=(200, 64)) + 1
        np.savez(str(folder / f'{name}.npz'), mu=features.mean(0), sigma=np.cov(features.T),
                 features=real.numpy(), class_counts=[22] * 9 + [2])
    jobs = {}
    for case, flags in CASES.items():
        more = dict(result_path=case)
        if flags['script'] == 'ddim_eval.py':       # each in a folder of its own
            shutil.copytree(str(folder / flags['logdir']), str(folder / case))
            more = dict(save_images=f'{case}.npz', logdir=case)
        jobs[case] = ['tests/record.py', str(folder / f'{case}.record'), flags['script'],
                      *words(dict(flags, **more), folder)]
    for name, more in STATISTICS.items():
        flags = dict(MEASURE, output=f'{name}.npz', **more)
        jobs[name] = [flags['script'], *words(flags, folder)]
    results = fork_all({name: [command(argv, env=dict(XDG_CACHE_HOME=str(folder)))]
                        for name, argv in jobs.items()})
    for result in results.values():
        assert_ran(result)
    yield folder
    shutil.rmtree(str(folder))


# Training of a classifier

def rates(flags, steps, per_epoch):
    """Plain: half a cosine from the full rate on. Released: divided by 10 after half and after
    three quarters of the epochs."""
    if flags['recipe'] == 'plain':
        return [oracle.rate(step, flags['init_lr'], 0, per_epoch * flags['epoch'], True)
                for step in range(1, steps + 1)]
    epochs = [(step - 1) // per_epoch for step in range(1, steps + 1)]
    return [flags['init_lr'] / (100 if e >= 3 else 10 if e >= 2 else 1) for e in epochs]


@pytest.mark.parametrize('case', TRAINING)
def test_training(folder, case):
    flags, record = CASES[f'train-{case}'], load(folder / f'train-{case}.record')
    name = flags['model'] + ('_normalize05' if flags['normalize05'] else '')
    state = load(folder / f'train-{case}/folder/{name}/ckpt.pt')
    per_epoch = 24 // flags['batchsize']
    steps = per_epoch * flags['epoch']
    assert state['step'] == state['total_steps'] == steps == len(record['inputs'])
    images, labels = photos(folder / 'photos')
    pixels = (images.double() + 1) / 2
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), unbiased=False)
    if flags['normalize05']:
        mean = std = torch.full((3,), 0.5)
    assert state['mean'] == pytest.approx(mean.tolist(), abs=1e-4)
    assert state['std'] == pytest.approx(std.tolist(), abs=1e-4) and state['num_classes'] == 3
    if flags['recipe'] == 'plain':
        check_images(record['inputs'], images, labels)
    else:       # cutout: a part of every image is black, seldom all of it
        black = [(image == -1).all(0).float().mean().item()
                 for x, _ in record['inputs'] for image in x]
        assert min(black) >= 4 / 64 and np.median(black) < 0.4
    state_before = dict(model=record['initial'], name=flags['model'], mean=state['mean'],
                        std=state['std'])
    rate = rates(flags, steps, per_epoch)
    net = oracle.classifier_trained(state_before, record['inputs'], rate, flags['wd'],
                                    flags['recipe'] == 'plain')
    for key, value in net.state_dict().items():
        if value.is_floating_point():
            moved = value - oracle.double(record['initial'][key])
            found = oracle.double(state['model'][key]) - oracle.double(record['initial'][key])
            assert near(found, moved, 5e-2, 1e-5), key      # a ReLU at 0 may round either way
    assert state['optim']['param_groups'][0]['lr'] == pytest.approx(rate[-1])
    images, labels = photos(folder / 'photos', 'test')
    right = net.eval()(images.double())[0].argmax(1) == labels
    assert state['accuracy'] == pytest.approx(right.double().mean().item(), abs=1.01 / 60)


def check_images(inputs, images, labels):
    """Mirrored or not, moved by up to a pixel over black. Every image once in a pass."""
    both = pad(torch.stack([images, images.flip(3)]), (1,) * 4, value=-1.)
    windows = {(m, i, j): both[m, :, :, i:i + 8, j:j + 8] for m in (0, 1) for i in range(3)
               for j in range(3)}
    seen, changes, of_row = [], set(), {}
    for x, y in inputs:
        for row, (image, label) in enumerate(zip(x, y)):
            (key, number), = [(key, n) for key, window in windows.items()
                              for n in (window == image).flatten(1).all(1).nonzero().flatten()]
            assert labels[number] == label
            changes.add(key)
            of_row.setdefault(row, set()).add(key[1:])
            seen.append(number.item())
    assert len(changes) == len(windows)
    assert all(len(moves) > 1 for moves in of_row.values())     # other ones in other steps
    for i in range(0, len(seen), 24):
        assert sorted(seen[i:i + 24]) == list(range(24))


@pytest.mark.parametrize('processes, accum', [(1, 1), (1, 2), (2, 1)])
def test_augmentation_of_the_right_images(monkeypatch, processes, accum):
    """Positions count the images of all steps, wherever a run starts, in parts and processes."""
    images = data.Images('x', 'train', 1, [0] * 9, 1, torch.zeros(9, 3, 1, 1).byte())
    monkeypatch.setattr(distributed, 'world_size', lambda: processes)
    monkeypatch.setattr(distributed, 'rank', lambda: processes - 1)
    batches = data.batches(images, 4, 0, torch.device('cpu'), 2, accum,
                           augment=lambda image, position: image + position)
    found = torch.cat([next(batches)[0] for _ in range(2 * accum)])
    expected = [10, 11, 14, 15] if processes == 2 else list(range(8, 16))       # the second one's
    assert ((found[:, 0, 0, 0] + 1) * 127.5).round().tolist() == expected


# Statistics of a data set

@pytest.mark.parametrize('name', STATISTICS)
def test_statistics(folder, name):
    """Mean and covariance of the features of the chosen images."""
    images = photos(folder / 'photos', 'test')[0] if name == 'test' else (
        photos(folder / 'photos')[0][1::2])
    _, feature, _ = classified(folder, images)
    with np.load(str(folder / f'{name}.npz')) as file:
        assert file['num_images'] == len(images)
        np.testing.assert_allclose(file['mu'], feature.mean(0).numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(file['sigma'], np.cov(feature.T.numpy()), rtol=1e-3, atol=1e-4)


# Evaluation

@pytest.mark.parametrize('case', [f'eval-{case}' for case in EVALUATION])
def test_evaluation(folder, case):
    """Images, labels, Frechet distance and Inception score."""
    flags, record = CASES[case], load(folder / f'{case}.record')
    state = load(folder / case / 'ckpt.pt')
    result = json.loads((folder / case / 'results.jsonl').read_text())
    with np.load(str(folder / f'{case}.npz')) as file:
        saved = {key: torch.from_numpy(file[key]) for key in file.files}
    T, time_scale = state['T'], state['time_scale']
    stride, number = flags['stride'], flags['num_images']
    name = 'net_model' if flags['weights'] == 'net' or 'ema_model' not in state else 'ema_model'
    conditional, y = flags['logdir'] == 'labels', saved.get('arr_1')
    assert (y is not None) == conditional
    if conditional:     # those of the first of the steps of every batch
        assert torch.equal(torch.cat(record['labels'][::T // stride]), y)
        assert len(y) == number and len(set(y.tolist())) > 5
        assert result['labels'] == 'as in the reference'
    grid = Diffusion(T * time_scale, mean_type=state['mean_type'])
    x_T = oracle.double(torch.cat(record['x_T']))
    assert x_T.shape == (number, 3, 8, 8)
    assert len(x_T.flatten(1).unique(dim=0)) == number      # no image twice
    net = oracle.unet(state[name], T * time_scale, conditional).requires_grad_(False)
    x = grid.sample(net, x_T, stride * time_scale, clip=True, y=y)
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
    protocol = dict(weights=name, seed=flags['seed'], num_images=number, stride=stride,
                    nfe=T // stride)
    assert {key: result[key] for key in protocol} == protocol
    if case == 'eval-other':
        others = oracle.double(torch.cat(load(folder / 'eval-plain.record')['x_T']))
        assert not (x_T[:, None] == others).flatten(2).all(2).any()     # no noise in common
