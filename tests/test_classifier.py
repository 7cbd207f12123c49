"""Classifiers: outputs, checkpoints, augmentation, and training as a user runs it."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch

from classifier import train
from classifier.frozen import load_classifier, load_frozen
from classifier.networks import build_classifier
from classifier.augment import Augment, measured_normalisation
from helpers import (ROOT, assert_ran, assert_refused, assert_same, command, fork_all, parsing,
                     picture)
from runtime import checkpoint, data
from runtime.cli import UserError

NETWORK = build_classifier('convnet_small', 10)
WEIGHTS = NETWORK.state_dict()
NAMED = dict(model=WEIGHTS, name='convnet_small')
NAN = torch.full((10,), torch.nan)


@pytest.mark.parametrize('name, size, features, key', [
    ('densenet_small', 8, 144, 'block1.denselayer1.norm1.weight'),
    ('convnet_small', 16, 64, 'stage4.norm.bias')])
def test_outputs(name, size, features, key):
    x, mean, std = torch.rand(2, 3, size, size) * 2 - 1, [.2, .3, .4], [.1, .3, .5]
    other = build_classifier(name, 7, mean, std).normalise(x)
    for i in range(3):
        assert torch.allclose(other[:, i], ((x[:, i] + 1) / 2 - mean[i]) / std[i], atol=1e-5)
    model = build_classifier(name, 7).eval()
    logits, feature, feature_map = model(x)
    assert model.num_features == features and model.num_classes == 7 and model.name == name
    assert logits.shape == (2, 7) and feature_map.shape == (2, features, 4, 4)
    assert feature_map.min() == 0       # after the final ReLU
    assert torch.equal(feature, feature_map.mean((2, 3))) and key in model.state_dict()
    assert torch.equal(model.normalise(x / 3), x / 3)     # mean and std of 0.5 change no bit


def test_loads_frozen(tmp_path):
    """Weights in half precision, with the prefix of several processes; random numbers stay."""
    model = build_classifier('convnet_small', 10).half()
    weights = {f'module.{key}': value for key, value in model.state_dict().items()}
    checkpoint.save(tmp_path / 'c.pt', dict(NAMED, model=weights, mean=[.1] * 3, std=[.2] * 3))
    before = torch.get_rng_state()
    loaded = load_classifier(tmp_path / 'c.pt')
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.name == 'convnet_small' and (loaded.mean == .1).all() and (loaded.std == .2).all()
    loaded = load_classifier(tmp_path / 'c.pt', mean=(.5,) * 3, std=(.5,) * 3)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(x)[0], model.float().eval()(x)[0])


def test_notes_on_the_size_of_images(tmp_path, capsys):
    """IS_P2P compares pixels of a map: with one pixel it is 0; another size than in training."""
    checkpoint.save(tmp_path / 'ckpt.pt', dict(NAMED, img_size=8))
    for size, said in ((4, True), (8, False)):
        images = SimpleNamespace(name='digits', num_classes=10, img_size=size)
        load_frozen('convnet_small', tmp_path, images, 'imagenet', torch.device('cpu'))
        out = capsys.readouterr().out
        assert ('has one pixel for images of 4 pixels' in out) == said
        assert ('was trained on images of 8 pixels, these have 4;' in out) == said


@pytest.mark.parametrize('words, expected, state', [
    ('10 classes, expected 100', ('convnet_small', 100), NAMED),
    ('does not name its network', (), dict(model=WEIGHTS)),
    ('holds the classifier convnet_small, expected resnet18', ('resnet18',), NAMED),
    ('holds the classifier 3, expected one of', (), dict(NAMED, name=3)),
    ('resnet18: conv1.weight is absent, expected .64, 3, 3', ('resnet18',), dict(model=WEIGHTS)),
    ('fc.bias is str, expected .10,', (), dict(NAMED, model={**WEIGHTS, 'fc.bias': 'b'})),
    ('fc.bias of .* holds NaN', (), dict(NAMED, model={**WEIGHTS, 'fc.bias': NAN})),
    ('mean in .* is .0.5., expected three numbers from 0 to 1', (), dict(NAMED, mean=[.5])),
    ('std in .*, expected three numbers from 1e-06 to 1', (), dict(NAMED, std=[0., .5, .5])),
    ('refused', ('convnet_small',), NETWORK),       # a pickle of more than weights
    ('a diffusion checkpoint', ('convnet_small',), dict(net_model={}, T=8)),
    ('is no classifier .it holds weights', ('convnet_small',), dict(weights=torch.zeros(2))),
    ('is no classifier .it holds model', ('convnet_small',), dict(model=[1])),
    ('holds w., expected .* fc.weight', ('convnet_small',), dict(model=dict(w=torch.zeros(2)))),
    ('train.py --model resnet18', ('resnet18',), None)])
def test_refusals(tmp_path, words, expected, state):
    if state:
        torch.save(state, str(tmp_path / 'c.pt'))
    with pytest.raises(UserError, match=words) as caught:
        load_classifier(tmp_path / 'c.pt', *expected)
    assert 'c.pt' in str(caught.value) and '\n' not in str(caught.value)


def test_unknown_network():
    with pytest.raises(UserError, match='no classifier "densenet999"; .* densenet201'):
        build_classifier('densenet999', 10)


def test_mean_and_std_of_some_images():
    """They are spread over the set."""
    pixels = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    mean, std = measured_normalisation(data.Images('x', 'train', 4, [0] * 6, 1, pixels), most=3)
    chosen = pixels[[0, 2, 5]].double() / 255
    assert mean == [round(v, 4) for v in chosen.mean((0, 2, 3)).tolist()]
    assert std == [round(v, 4) for v in chosen.std((0, 2, 3), unbiased=False).tolist()]


def test_augment_crops_with_grey_mirrors_and_cuts_out():
    """Without AutoAugment: shifts by a pixel, and black squares of 4 px around any pixel."""
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8).repeat(3, 1, 1)
    augment, seen, corners = Augment(8, 0), set(), (set(), set())
    random_state = torch.get_rng_state()
    assert not torch.equal(augment(image, 0), Augment(8, 1)(image, 0))      # another seed
    assert torch.equal(torch.get_rng_state(), random_state)
    augment.transform.transforms = augment.transform.transforms[:2]
    padded = torch.nn.functional.pad(image, (1,) * 4, value=128)
    shifts = {(i, j, m): padded[:, i:i + 8, j:j + 8].flip(2) if m else padded[:, i:i + 8, j:j + 8]
              for i in range(3) for j in range(3) for m in (False, True)}
    for position in range(80):
        found = augment(image, position)
        rows, columns = (found[0] == 0).any(1), (found[0] == 0).any(0)
        fits = [key for key, value in shifts.items()
                if torch.equal(value * ~(rows[:, None] & columns), found)]
        assert fits
        seen.update(fits if len(fits) == 1 else [])
        for found, side in zip(corners, (rows, columns)):
            found.add(tuple(side.nonzero().flatten().tolist()))
    assert len(seen) == len(shifts)
    assert corners[0] == corners[1] == {
        tuple(range(max(0, c - 2), min(8, c + 2))) for c in range(8)}


WORDS = ('classifier/train.py --dataset=digits --model=convnet_small --seed=5 --batchsize=32 '
         '--epoch=1 --num_workers=0').split()
# the error, and flags of a command that goes on after a step
REFUSED = {
    '--lr is .*choose another --result_path': '--init_lr=0.5',
    '--wd is .*choose another --result_path': '--wd=0',
    '--amp is .*choose another --result_path': '--amp=bf16',
    '--epoch is .*choose another --result_path': '--epoch=2',
    '--batch_size 1 in 1 parts leaves one image at a time': '--batchsize=1',
    '--dataset folder has one class': '--dataset=folder --data_root=one --batchsize=1'}


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """({name: results}, folder) of all trainings; each has a folder NAME/digits/MODEL."""
    folder = tmp_path_factory.mktemp('classifier')

    def train(name, *words, **how):
        return command(WORDS, f'--result_path={folder / name}', *words, **how)

    log = folder / 'stopped/digits/convnet_small/metrics.jsonl'
    released = '--recipe=released', '--num_workers=2', '--log_step=1', '--max_steps=12'
    picture(folder / 'one/dog/0.png')
    jobs = dict(
        stopped=[train('stopped', *released, signal=[signal.SIGTERM, str(log), 3]),
                 train('stopped', *released, cwd=str(ROOT / 'classifier'))],
        whole=[train('whole', *released)],
        refused=[train('refused', '--max_steps=1'),
                 *(train('refused', '--max_steps=2', *words.split(), cwd=str(folder))
                   for words in REFUSED.values())])
    return fork_all(jobs), folder


def test_stopped_with_its_workers_and_resumed_exactly(ran):
    """The signal goes to its workers as well; it goes on from another working directory."""
    results, folder = ran
    assert_ran(results['stopped'], [143, 0])
    assert_ran(results['whole'])
    assert 'SIGTERM: stopped after step ' in results['stopped'][0][1]
    stopped, whole = (folder / name / 'digits/convnet_small' for name in ('stopped', 'whole'))
    state = checkpoint.read(whole)
    assert_same(checkpoint.read(stopped), state, skip=['flags'])
    assert state['step'] == 12 and state['total_steps'] == 47 and state['seed'] == 5
    log = [json.loads(line) for line in (stopped / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in log] == list(range(1, 13))
    assert log[-1]['test_accuracy'] == pytest.approx(state['accuracy'])
    assert load_classifier(whole).name == 'convnet_small'


def test_the_first_epoch_keeps_the_rate():
    """Half and three quarters of one epoch are rounded to 0."""
    with parsing(train.define_flags) as parse:
        parse('--recipe=released', '--epoch=1')
        assert train.rate_of(10, 10, 10) == train.FLAGS.lr


@pytest.mark.parametrize('sentence', REFUSED)
def test_refused(ran, sentence):
    first, *others = ran[0]['refused']
    assert_ran([first])
    assert_refused(others[list(REFUSED).index(sentence)], sentence)
    assert not (ran[1] / 'refused/folder').exists()
