"""Classifiers: outputs, input normalisation, checkpoints, and training as a user runs it."""

import json
import signal

import pytest
import torch
from PIL import Image

from classifier import build_classifier, load_classifier
from classifier.augment import Augment, cutout, measured_normalisation, random_crop
from helpers import ROOT, assert_ran, assert_same, command, fork_all
from runtime import checkpoint, data
from runtime.cli import UserError


def saved(path, name='convnet_small', num_classes=10, **extra):
    """A classifier file and the network in it."""
    model = build_classifier(name, num_classes)
    checkpoint.save(path, dict(model=model.state_dict(), **extra))
    return model.eval()


@pytest.mark.parametrize('name, size, features', [
    ('densenet_small', 8, 144), ('convnet_small', 16, 64), ('densenet121', 32, 1024),
    ('resnet18', 32, 512)])
def test_outputs(name, size, features):
    model = build_classifier(name, 7).eval()
    logits, feature, feature_map = model(torch.rand(2, 3, size, size) * 2 - 1)
    assert model.num_features == features and model.num_classes == 7 and model.name == name
    assert logits.shape == (2, 7) and feature_map.shape == (2, features, 4, 4)
    assert feature_map.min() == 0       # after the final ReLU
    assert torch.equal(feature, feature_map.mean((2, 3)))


def test_published_names():
    keys = set(build_classifier('densenet_small', 10).state_dict())
    assert {'features.conv0.weight', 'features.norm0.bias', 'block1.denselayer1.norm1.weight',
            'trans1.conv.weight', 'final_norm.running_var', 'fc.weight'} <= keys
    assert not any('mean' == key or 'std' == key for key in keys)
    keys = set(build_classifier('resnet18', 10).state_dict())
    assert {'conv1.weight', 'bn1.weight', 'layer2.0.downsample.0.weight', 'fc.bias'} <= keys


def test_unknown_name():
    with pytest.raises(UserError, match='densenet201'):
        build_classifier('densenet999', 10)


def test_normalisation():
    x = torch.rand(2, 3, 4, 4) * 2 - 1
    assert torch.equal(build_classifier('convnet_small', 10).normalise(x), x)
    model = build_classifier('convnet_small', 10, (0.5, 0.25, 0.1), (0.5, 0.25, 0.2))
    white = model.normalise(torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(white, torch.tensor([1., 3., 4.5]))
    black = model.normalise(-torch.ones(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(black, torch.tensor([-1., -1., -0.5]))


def test_loads_frozen(tmp_path):
    model = saved(tmp_path / 'ckpt.pt', name='convnet_small')       # as published: {model} alone
    state = torch.get_rng_state()
    loaded = load_classifier(tmp_path, 'convnet_small', 10)
    assert torch.equal(state, torch.get_rng_state())        # loading draws nothing
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(x)[0], model(x)[0])


def test_own_checkpoint_says_all(tmp_path):
    saved(tmp_path / 'c.pt')
    state = torch.load(str(tmp_path / 'c.pt'), weights_only=True)
    state['model'] = {'module.' + key: value for key, value in state['model'].items()}
    checkpoint.save(tmp_path / 'c.pt', dict(state, name='convnet_small', mean=[.1] * 3,
                                            std=[.2] * 3))
    loaded = load_classifier(tmp_path / 'c.pt')
    assert loaded.name == 'convnet_small'
    torch.testing.assert_close(loaded.std.flatten(), torch.tensor([.2] * 3))
    assert (load_classifier(tmp_path / 'c.pt', mean=(.5,) * 3, std=(.5,) * 3).mean == .5).all()


def test_refusals(tmp_path):
    saved(tmp_path / 'bare.pt')
    torch.save(build_classifier('convnet_small', 10), str(tmp_path / 'pickle.pt'))
    checkpoint.save(tmp_path / 'diffusion.pt', dict(net_model={}, T=8))
    checkpoint.save(tmp_path / 'other.pt', dict(weights=torch.zeros(2)))
    checkpoint.save(tmp_path / 'headless.pt', dict(model=dict(w=torch.zeros(2))))
    saved(tmp_path / 'named.pt', name='convnet_small')
    checkpoint.save(tmp_path / 'named.pt', dict(checkpoint.read(tmp_path / 'named.pt'),
                                                name='convnet_small'))
    for file, args, words in [
            ('bare.pt', ('convnet_small', 100), '10 classes, expected 100'),
            ('bare.pt', (), 'does not say which network'),
            ('named.pt', ('resnet18',), 'holds the classifier convnet_small, expected resnet18'),
            ('bare.pt', ('resnet18',), 'resnet18: conv1.weight is absent, expected .64, 3, 3'),
            ('pickle.pt', ('convnet_small',), 'refused'),
            ('diffusion.pt', ('convnet_small',), 'diffusion checkpoint'),
            ('other.pt', ('convnet_small',), 'weights'),
            ('headless.pt', ('convnet_small',), '"model" holds w, expected .* fc.weight'),
            ('none', ('resnet18',), 'train.py --model resnet18')]:
        with pytest.raises(UserError, match=words):
            load_classifier(tmp_path / file, *args)


# Images

def test_random_crop_moves_whole_images():
    """By up to two pixels, as drawn for the total batch; black comes in."""
    x_0 = torch.arange(4 * 3 * 8 * 8).float().view(4, 3, 8, 8)
    whole, share = (random_crop(x_0[rows], 2, 4, rows, torch.Generator().manual_seed(3))
                    for rows in (slice(0, 4), slice(2, 4)))
    assert torch.equal(share, whole[2:])
    corner = torch.randint(0, 5, (2, 4), generator=torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(x_0, (2,) * 4, value=-1.)
    for i, (top, left) in enumerate(corner.t().tolist()):
        assert torch.equal(whole[i], padded[i, :, top:top + 8, left:left + 8])


def test_measured_mean_and_std():
    digits = data.make_dataset('digits', '.', 16, train=True)
    mean, std = measured_normalisation(digits)
    pixels = digits.images.double() / 255
    assert mean == [round(v, 4) for v in pixels.mean((0, 2, 3)).tolist()]
    assert std == [round(v, 4) for v in pixels.std((0, 2, 3), unbiased=False).tolist()]


def test_augment_is_a_function_of_seed_and_position():
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    one, again, next_one, other_seed = (
        Augment(32, seed)(image, position)
        for seed, position in ((1, 5), (1, 5), (1, 6), (2, 5)))
    assert one.dtype == torch.uint8 and one.shape == image.shape
    assert torch.equal(one, again) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one, next_one) and not torch.equal(one, other_seed)


def test_cutout_by_hand():
    image = torch.full((3, 8, 8), 9, dtype=torch.uint8)
    cut = cutout(image.clone(), 1, 6, 4)        # rows 0..2, columns 4..7: cut off at the border
    expected = image.clone()
    expected[:, 0:3, 4:8] = 0
    assert torch.equal(cut, expected)


def test_augment_crops_with_grey_and_mirrors():
    """Without AutoAugment and cutout: shifts by up to an eighth, grey 128 from outside."""
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8).repeat(3, 1, 1)
    augment, seen = Augment(8, 0), set()
    augment.transform.transforms = augment.transform.transforms[:2]
    padded = torch.nn.functional.pad(image, (1,) * 4, value=128)
    shifts = {(i, j, m): padded[:, i:i + 8, j:j + 8].flip(2) if m else padded[:, i:i + 8, j:j + 8]
              for i in range(3) for j in range(3) for m in (False, True)}
    for position in range(80):
        found = augment(image, position)
        kept = found != 0       # the square of cutout is 0
        fits = [key for key, value in shifts.items() if torch.equal(value[kept], found[kept])]
        assert fits and 4 <= (~kept[0]).sum() <= 16
        seen.update(fits if len(fits) == 1 else [])
    assert len(seen) == len(shifts)


# Training, as a user runs it

WORDS = ('classifier/train.py --dataset=digits --model=convnet_small --seed=5 --batchsize=32 '
         '--epoch=1 --num_workers=0').split()


@pytest.fixture(scope='module')
def ran(tmp_path_factory):
    """({name: results}, folder) of all trainings; each has a folder NAME/digits/MODEL."""
    folder = tmp_path_factory.mktemp('classifier')

    def train(name, *words, **how):
        return command(WORDS, f'--result_path={folder / name}', *words, **how)

    def same(name, *words, **how):
        """Comparable with more processes: a higher rate lets rounding grow with every step."""
        return train(name, '--model=densenet_small', '--img_size=8', '--batchsize=24',
                     '--max_steps=4', '--init_lr=1e-3', *words, **how)

    log = folder / 'stopped/digits/convnet_small/metrics.jsonl'
    workers = '--recipe=released', '--num_workers=2', '--max_steps=12', '--log_step=1'
    old = folder / 'old/digits/convnet_small/ckpt.pt'
    old.parent.mkdir(parents=True)
    checkpoint.save(old, dict(
        model=build_classifier('convnet_small', 10).state_dict(), step=3, name='convnet_small',
        optim=dict(state={}, param_groups=[]), config=dict(epoch=1), seed=0, accuracy=.5))
    Image.new('RGB', (8, 8)).save(str(picture(folder, 'one', 'dog')))
    six = '--max_steps=6'
    jobs = dict(
        parts=[train('parts', '--max_steps=2'), dict(
            train('parts', six), cwd=str(ROOT / 'classifier')), train('parts', six),
            *(train('parts', '--max_steps=8', word) for word in (
                '--init_lr=0.5', '--wd=0', '--amp=bf16', '--epoch=2', '--seed=6'))],
        whole=[train('whole', six, '--log_step=1')],
        stopped=[train('stopped', *workers, signal=[signal.SIGTERM, str(log), 3], group=True),
                 train('stopped', *workers)],
        unstopped=[train('unstopped', *workers)],
        accum=[train('accum', '--grad_accum=2', '--max_steps=3')],
        saved=[train('saved', '--save_step=2', '--keep=9', '--max_steps=5')],
        bad=[train('bad', '--init_lr=1e30', '--max_steps=5')],
        old=[train('old')],
        one=[train('one', '--dataset=folder', f'--data_root={folder}/one', '--batchsize=1')])
    for recipe in ('plain', 'released'):
        jobs[f'{recipe}1'] = [same(f'{recipe}1', f'--recipe={recipe}')]
        jobs[f'{recipe}2'] = [same(f'{recipe}2', f'--recipe={recipe}', ranks=2)]
    return fork_all(jobs), folder


def picture(folder, *names):
    (folder.joinpath(*names)).mkdir(parents=True)
    return folder.joinpath(*names) / '0.png'


def result(ran, name, model='convnet_small'):
    return checkpoint.read(ran[1] / name / 'digits' / model)


def log_of(ran, name):
    text = (ran[1] / name / 'digits/convnet_small/metrics.jsonl').read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_training_resumes_exactly(ran):
    """In two parts, from another working directory; a finished one is left alone."""
    assert_ran(ran[0]['parts'][:3])
    assert_ran(ran[0]['whole'])
    assert_same(result(ran, 'parts'), result(ran, 'whole'), skip=['flags'])
    assert 'is finished: step 6' in ran[0]['parts'][2][1]
    state = result(ran, 'whole')
    assert state['step'] == 6 and state['total_steps'] == 47 and state['seed'] == 5
    assert log_of(ran, 'whole')[-1]['test_accuracy'] == pytest.approx(state['accuracy'])
    assert load_classifier(ran[1] / 'whole/digits/convnet_small').name == 'convnet_small'


@pytest.mark.parametrize('number, flag', [(3, 'lr'), (4, 'wd'), (5, 'amp'), (6, 'epoch'),
                                          (7, 'seed')])
def test_flags_that_cannot_change(ran, number, flag):
    code, _, err = ran[0]['parts'][number]
    assert code == 2 and f'--{flag} is ' in err and 'choose another --result_path' in err, err
    assert len(err.strip().splitlines()) == 1


def test_stopped_with_its_workers(ran):
    """The signal goes to the processes that load images as well."""
    assert_ran(ran[0]['stopped'], [143, 0])
    assert_ran(ran[0]['unstopped'])
    assert 'SIGTERM: stopped after step ' in ran[0]['stopped'][0][1]
    assert_same(result(ran, 'stopped'), result(ran, 'unstopped'), skip=['flags'])
    assert [line['step'] for line in log_of(ran, 'stopped')] == list(range(1, 13))


@pytest.mark.parametrize('recipe', ['plain', 'released'])
def test_same_result_on_several_processes(ran, recipe):
    """Batch norm sees the whole batch: what is left is the order of sums."""
    one, two = (result(ran, f'{recipe}{ranks}', 'densenet_small') for ranks in (1, 2))
    assert one['accuracy'] == two['accuracy'] and one['step'] == two['step'] == 4
    for key, value in one['model'].items():
        torch.testing.assert_close(two['model'][key], value, rtol=1e-4, atol=1e-4)
    other = result(ran, dict(plain='released1', released='plain1')[recipe], 'densenet_small')
    assert not torch.allclose(one['model']['fc.weight'], other['model']['fc.weight'], rtol=1e-4)


def test_parts_and_checkpoints_between(ran):
    assert_ran(ran[0]['accum'] + ran[0]['saved'])
    assert result(ran, 'accum')['step'] == 3
    files = (ran[1] / 'saved/digits/convnet_small').glob('ckpt*.pt')
    assert sorted(file.name for file in files) == ['ckpt.pt', 'ckpt_2.pt', 'ckpt_4.pt', 'ckpt_5.pt']


@pytest.mark.parametrize('name, code, words', [
    ('bad', 1, 'NaN or inf in model at step 5: nothing was saved'),
    ('old', 2, 'without flags, so it cannot be continued'),
    ('one', 2, '--dataset folder has one class, and a classifier learns nothing from it; make')])
def test_refused(ran, name, code, words):
    (found, _, err), = ran[0][name]
    assert found == code and 'Traceback' not in err and words in err, err
    assert len(list((ran[1] / name).rglob('*.pt'))) == (name == 'old')
