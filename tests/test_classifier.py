"""Classifiers: outputs, input normalisation, checkpoints, and training as a user runs it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from classifier import build_classifier, load_classifier
from classifier.augment import Augment, cutout
from classifier.train import measured, random_crop
from runtime import checkpoint, data
from runtime.cli import UserError
from helpers import ROOT, command, fork_all, run_script


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
    for file, args, words in [
            ('bare.pt', ('convnet_small', 100), '10 classes, expected 100'),
            ('bare.pt', (), 'does not say which network'),
            ('bare.pt', ('resnet18',), 'resnet18: conv1.weight is absent, expected .64, 3, 3'),
            ('pickle.pt', ('convnet_small',), 'refused'),
            ('diffusion.pt', ('convnet_small',), 'diffusion checkpoint'),
            ('other.pt', ('convnet_small',), 'weights'),
            ('headless.pt', ('convnet_small',), '"model" holds w, expected .* fc.weight'),
            ('none', ('resnet18',), 'train.py --model resnet18')]:
        with pytest.raises(UserError, match=words):
            load_classifier(tmp_path / file, *args)


def test_wrong_name_refused(tmp_path):
    model = build_classifier('convnet_small', 10)
    checkpoint.save(tmp_path / 'ckpt.pt', dict(model=model.state_dict(), name='convnet_small'))
    with pytest.raises(UserError, match='holds the classifier convnet_small, expected resnet18'):
        load_classifier(tmp_path, 'resnet18')


def test_random_crop_moves_whole_images():
    x_0 = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
    out = random_crop(x_0, 2, len(x_0), torch.Generator().manual_seed(3))
    corner = torch.randint(0, 5, (2, 2, 1), generator=torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(x_0, (2,) * 4, value=-1.)
    for i in range(2):
        top, left = corner[0, i].item(), corner[1, i].item()
        assert torch.equal(out[i], padded[i, :, top:top + 8, left:left + 8])


def test_measured_mean_and_std():
    digits = data.make_dataset('digits', '.', 16, train=True)
    mean, std = measured(digits)
    pixels = digits.images.double() / 255
    assert mean == [round(v, 4) for v in pixels.mean((0, 2, 3)).tolist()]
    assert std == [round(v, 4) for v in pixels.std((0, 2, 3), unbiased=False).tolist()]


@pytest.fixture(scope='module')
def halves(tmp_path_factory):
    """The same run in one go and in two parts."""
    folder = tmp_path_factory.mktemp('runs')
    flags = ['--dataset', 'digits', '--model', 'convnet_small', '--seed', 5, '--batchsize', 32,
             '--epoch', 1, '--num_workers', 0]
    with ThreadPoolExecutor() as pool:      # side by side, to save time
        whole = pool.submit(run_script, 'classifier/train.py', *flags, '--max_steps', 6,
                            '--result_path', folder / 'whole')
        parts = [run_script('train.py', *flags, '--max_steps', n, '--result_path',
                            folder / 'parts', cwd=ROOT / 'classifier') for n in (2, 6)]
    return folder, flags, whole.result(), parts


def test_training_resumes_exactly(halves):
    folder, _, whole, parts = halves
    assert whole.returncode == 0, whole.stderr
    assert [part.returncode for part in parts] == [0, 0], parts[-1].stderr
    a, b = (checkpoint.read(folder / name / 'digits/convnet_small') for name in ('whole', 'parts'))
    assert a['step'] == b['step'] == 6 and a['accuracy'] == b['accuracy']
    assert all(torch.equal(a['model'][key], b['model'][key]) for key in a['model'])
    assert 'test' in whole.stdout and 'Traceback' not in whole.stderr
    assert load_classifier(folder / 'whole/digits/convnet_small', 'convnet_small', 10)


def test_training_ends_or_refuses(halves):
    folder, flags, _, _ = halves
    again = run_script('classifier/train.py', *flags, '--max_steps', 6,
                       '--result_path', folder / 'whole')
    assert again.returncode == 0 and 'is finished' in again.stdout
    other = run_script('classifier/train.py', *flags, '--init_lr', 0.5,
                       '--result_path', folder / 'whole')
    assert other.returncode == 2 and '--init_lr' in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1


def test_same_result_on_several_processes(tmp_path):
    """Batch norm sees the whole batch: what is left is the order of sums.

    A higher rate would let rounding grow tenfold in every step.
    """
    words = ('classifier/train.py --model=densenet_small --dataset=digits --img_size=8 --seed=3 '
             '--epoch=1 --max_steps=4 --batchsize=24 --num_workers=0 --init_lr=1e-3').split()
    done = fork_all({f'{recipe}{ranks}': [command(
        words, f'--recipe={recipe}', f'--result_path={tmp_path}/{recipe}{ranks}', ranks=ranks)]
        for recipe in ('plain', 'released') for ranks in (1, 2)})
    assert all(code == 0 for (code, *_), in done.values()), done
    for recipe in ('plain', 'released'):
        one, two = (checkpoint.read(tmp_path / f'{recipe}{ranks}/digits/densenet_small')
                    for ranks in (1, 2))
        assert one['accuracy'] == two['accuracy'] and one['step'] == two['step'] == 4
        for key, value in one['model'].items():
            torch.testing.assert_close(two['model'][key], value, rtol=1e-4, atol=1e-4)
    moved = [checkpoint.read(tmp_path / f'{recipe}1/digits/densenet_small')['model']['fc.weight']
             for recipe in ('plain', 'released')]
    assert not torch.allclose(*moved, rtol=1e-4, atol=1e-4)


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
