"""Every number taken from the published code, reproduced: `python tests/test_parity.py` lists them.

Networks are filled with numpy's random numbers by the name of each parameter, so that no weights
need to be stored; see fixtures/README.md.
"""

import functools
import gzip
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))        # for the script mode; conftest.py does it for pytest

from classifier import build_classifier     # noqa: E402
from diffusion import Diffusion, alpha_bar_table, distillation_loss     # noqa: E402
from losses import MemoryP2P, feature_kl, intra_sample_p2p      # noqa: E402
from model import UNet      # noqa: E402
from score import frechet_distance, inception_score     # noqa: E402

with np.load(str(HERE / 'fixtures/reference_numbers.npz')) as file:
    REFERENCE = {key: file[key] for key in file.files}
STATE_DICTS = json.loads(gzip.decompress((HERE / 'fixtures/state_dict_keys.json.gz').read_bytes())
                         .decode())
CASES = {}      # entry -> function that computes it with our modules


def entry(name, *args):
    """Decorator: the function, called with `args`, computes the reference entry `name`."""
    def register(function):
        CASES[name] = functools.partial(function, *args)
        return function
    return register


# Weights and inputs

def fill(network, seed):
    """Numbers by (name of the parameter, seed) into `network`; returns it in eval mode."""
    state = network.state_dict()
    for key, value in state.items():
        if not torch.is_tensor(value) or key in ('time_embedding.timembedding.0.weight', 'queue'):
            continue
        if not value.is_floating_point():
            state[key] = torch.zeros_like(value, device='cpu') if value.is_meta else value
            continue
        rng = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2 ** 32)
        n = rng.standard_normal(tuple(value.shape)).astype(np.float32)
        if key.endswith('running_var'):
            n = 0.5 + abs(n)
        elif value.dim() >= 2:
            n = n / np.sqrt(np.prod(value.shape[1:]))
        else:
            one = key.endswith('weight')        # of a normalisation
            n = one + 0.1 * n
        state[key] = torch.from_numpy(np.asarray(n, dtype=np.float32))
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def arr(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@functools.lru_cache(None)
def unet(seed=1000, conditional=False):
    return fill(UNet(64, 32, [1, 2, 2, 2], [1], 2, conditional=conditional), seed)


@functools.lru_cache(None)
def classifier(name):
    with torch.device('meta'):      # without the initialisation that `fill` would overwrite
        network = build_classifier(name, 10)
    return fill(network, 1000)


# Tables, networks, sampling

@entry('alphas_bar_T1024', 1024)
@entry('alphas_bar_T64', 64)
def table(N):
    return alpha_bar_table(N)


@entry('unet_small/out')
def unet_small():
    return unet()(arr(1001, 2, 3, 32, 32), torch.tensor([1, 64]))


@entry('unet_cond/out')
def unet_cond():
    return unet(conditional=True)(arr(1001, 2, 3, 32, 32), torch.tensor([1, 64]),
                                  torch.tensor([1, 7]))


@entry('unet_full/out')
def unet_full():
    network = fill(UNet(1024, 128, [1, 2, 2, 2], [1], 2), 1000)
    return network(arr(1001, 2, 3, 32, 32), torch.tensor([1, 1024]))


def ddim(mean_type, T, time_scale, stride, clip):
    diffusion = Diffusion(T, time_scale, mean_type)
    return diffusion.sample(unet(), arr(1002, 2, 3, 32, 32), stride, clip)


for mean_type in ('xstart', 'epsilon'):
    for T, time_scale, stride in ((64, 1, 16), (4, 16, 1)):
        for clip in (0, 1):
            entry(f'ddim/{mean_type}/T{T}_ts{time_scale}_stride{stride}_clip{clip}',
                  mean_type, T, time_scale, stride, bool(clip))(ddim)


# Losses of base training and of distillation

def images():
    return arr(1003, 4, 3, 32, 32).clamp(-1, 1), arr(1004, 4, 3, 32, 32)


def base_loss(mean_type, loss_type):
    diffusion, (x_0, eps), t = Diffusion(64, 1, mean_type), images(), torch.tensor([0, 5, 40, 64])
    x_pred, eps_pred = diffusion.predict(unet(), diffusion.add_noise(x_0, eps, t), t)
    # with eps as output, train_base.py takes the plain error in eps, as the published code
    loss_type = loss_type if mean_type == 'xstart' else 'eps'
    return distillation_loss(x_pred, eps_pred, x_0, eps, loss_type).mean()


@functools.lru_cache(None)
def halving(mean_type):
    """x_pred, eps_pred, x_target, eps_target of the 8 -> 4 step student."""
    teacher, student = Diffusion(8, 8, mean_type), Diffusion(4, 16, mean_type)
    (x_0, eps), t = images(), torch.tensor([1, 2, 3, 4]) * 16
    z_t = teacher.add_noise(x_0, eps, t)
    x_target = teacher.two_step_target(unet(), z_t, t)
    return (*student.predict(unet(1050), z_t, t), x_target, student.eps_of(z_t, x_target, t))


def pd_loss(mean_type, loss_type):
    return distillation_loss(*halving(mean_type), loss_type).mean()


@functools.lru_cache(None)
def halving_seen(mean_type):
    """What the classifier makes of x_pred and of x_target: logits, feature, feature_map each."""
    x_pred, _, x_target, _ = halving(mean_type)
    return classifier('densenet121')(x_pred), classifier('densenet121')(x_target)


def rdd_loss(mean_type, intra):
    (_, feature_S, map_S), (_, feature_T, map_T) = halving_seen(mean_type)
    loss = feature_kl(feature_S, feature_T, 0.9)
    return loss + intra_sample_p2p(map_S, map_T, 1.) if intra else loss


for mean_type in ('xstart', 'epsilon'):
    for loss_type in ('x', 'eps', 'both'):
        entry(f'base_loss/{mean_type}/{loss_type}', mean_type, loss_type)(base_loss)
        entry(f'pd_loss/{mean_type}/{loss_type}', mean_type, loss_type)(pd_loss)
    entry(f'rdd/{mean_type}/x_pred', mean_type)(lambda mean_type: halving(mean_type)[0])
    entry(f'rdd/{mean_type}/x_target', mean_type)(lambda mean_type: halving(mean_type)[2])
    entry(f'rdd/{mean_type}/cfd', mean_type, False)(rdd_loss)
    entry(f'rdd/{mean_type}/cfd_plus_is_p2p', mean_type, True)(rdd_loss)


# Relational losses and their gradients

def maps():
    return arr(1005, 3, 64, 4, 4).relu().requires_grad_(), arr(1006, 3, 64, 4, 4).relu()


def value_or_grad(loss, map_S, what):
    if what == 'grad':
        loss.backward()
    return map_S.grad if what == 'grad' else loss


def intra(tau, what):
    map_S, map_T = maps()
    return value_or_grad(intra_sample_p2p(map_S, map_T, tau), map_S, what)


for tau in (1.0, 0.1):
    for what in ('loss', 'grad'):
        entry(f'is_p2p/tau{tau}/{what}', tau, what)(intra)


def make_memory():
    memory = MemoryP2P(64, queue_size=200, contrast_size=50)
    fill(memory, 1000).train().requires_grad_(True)
    memory.queue.copy_(torch.nn.functional.normalize(arr(1007, 200, 64), dim=1))
    return memory


@entry('m_p2p/contrast_rows')
def contrast_rows():
    return make_memory().contrast       # before any draw: the fixed rows of the published code


@entry('m_p2p/loss', 'loss')
@entry('m_p2p/grad', 'grad')
def memory_p2p(what):
    memory, (map_S, map_T) = make_memory(), maps()
    memory.contrast.copy_(torch.from_numpy(REFERENCE['m_p2p/contrast_rows']))
    return value_or_grad(memory(map_S, map_T), map_S, what)


# Classifiers and scores

@functools.lru_cache(None)
def classified(name):
    outputs = classifier(name)(arr(1008, 2, 3, 32, 32))
    return dict(zip(('logits', 'feature', 'feature_map'), outputs))


for name in [name for name in REFERENCE if name.startswith('classifier/')]:
    entry(name, *name.split('/')[1:])(lambda network, part: classified(network)[part])


@entry('fid/value')
def frechet():
    rng_a, rng_b = np.random.RandomState(1009), np.random.RandomState(1010)
    a = rng_a.standard_normal((500, 64)).astype(np.float32) * np.linspace(.1, 2, 64)
    b = (rng_b.standard_normal((700, 64)).astype(np.float32) + 0.1) * np.linspace(.2, 1.8, 64)
    return frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


@entry('is/mean', 0)
@entry('is/std', 1)
def inception(which):
    return inception_score((3 * arr(1011, 1000, 20)).softmax(1).numpy(), splits=10)[which]


# Comparison

NETWORK_OUTPUTS = ('unet', 'ddim', 'classifier')
# x_0 = (z_t - sigma_t eps) / alpha_t with alpha_T = 8e-4: float32 rounding of the network, up to
# 4e-6, grows 1200 times to 5e-3 in x_0 of size 6000. All but a few values end outside [-1, 1],
# where the last clip hides it. The published numbers themselves are 1e-3 from exact ones (float64).
AMPLIFIED = ('ddim/epsilon/T64_ts1_stride16_clip0', 'ddim/epsilon/T4_ts16_stride1_clip0')
# KL of nearly equal distributions over 1024 channels: log-probabilities near -7 are rounded by up
# to 5e-7 each in float32, and the loss is 7e-5. Published values are 2e-4 (relative) from exact.
SMALL_KL = tuple(f'rdd/{mean_type}/{loss}' for mean_type in ('xstart', 'epsilon')
                 for loss in ('cfd', 'cfd_plus_is_p2p'))


@functools.lru_cache(None)
def compare(name):
    """(array of errors, tolerance, its kind) of one entry."""
    found, expected = CASES[name](), REFERENCE[name]
    found = found.detach().numpy() if torch.is_tensor(found) else np.asarray(found)
    assert found.shape == expected.shape
    error = abs(found.astype(np.float64) - expected)
    if name in AMPLIFIED:
        return error, 5e-3, 'absolute'
    if name in SMALL_KL:
        return error, 5e-7, 'absolute'
    if name.startswith(NETWORK_OUTPUTS):
        return error, 1e-4, 'absolute'
    return error / abs(expected).max(), 1e-5, 'relative'


@pytest.fixture(autouse=True, scope='module')
def fast():
    """One thread: two wait for each other on a busy machine. And no slow numbers below 1e-38, which
    attention over images of size 6000 leaves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


def test_every_entry_is_compared():
    assert set(CASES) == set(REFERENCE) and len(REFERENCE) == 53


@pytest.mark.parametrize('name', sorted(REFERENCE))
def test_reference(name):
    error, tolerance, kind = compare(name)
    assert error.max() <= tolerance, f'{name}: {kind} error {error.max():.3g}'


def test_amplified_rounding():
    """The exact result lies about as far from the published number as ours, and only in places."""
    x_T = arr(1002, 2, 3, 32, 32)
    exact_unet = fill(UNet(64, 32, [1, 2, 2, 2], [1], 2), 1000).double()
    diffusion = Diffusion(4, 16, 'epsilon')
    exact = diffusion.sample(exact_unet, x_T.double(), clip=False).numpy()
    for name in AMPLIFIED:
        error, _, _ = compare(name)
        assert (error > 1e-4).sum() <= 4        # of 6144 values
        assert abs(CASES[name]().numpy() - exact).max() < 5e-3
        assert abs(REFERENCE[name] - exact).max() > 5e-4        # so 1e-4 cannot be asked for
    # before the final clip everything agrees to float32, relative to its size
    t, s = (torch.full((2,), time) for time in (64, 48))
    first = diffusion.ddim_step(unet(), x_T, t, s, clip=False)
    exact = diffusion.ddim_step(exact_unet, x_T.double(), t, s, clip=False)
    assert (first - exact).abs().max() / exact.abs().max() < 3e-6


@pytest.mark.parametrize('mean_type', ['xstart', 'epsilon'])
def test_small_kl(mean_type):
    """The published feature loss is itself further than 1e-5 from the value in float64."""
    feature_S, feature_T = (seen[1].double() for seen in halving_seen(mean_type))
    log_p_S, log_p_T = feature_S.log_softmax(1), (feature_T / 0.9).log_softmax(1)
    exact = (log_p_T.exp() * (log_p_T - log_p_S)).sum(1).mean().item()
    published = REFERENCE[f'rdd/{mean_type}/cfd']
    assert 1e-4 < abs(published / exact - 1) < 5e-3
    assert feature_kl(feature_S, feature_T, 0.9).item() == pytest.approx(exact, abs=5e-7)


# Published checkpoints

def networks():
    yield 'unet_cifar10', lambda: UNet(1024, 128, [1, 2, 2, 2], [1], 2)
    yield 'unet_imagenet64', lambda: UNet(1024, 128, [1, 2, 3, 4], [2, 3], 3, conditional=True,
                                          class_num=1000)
    for name in STATE_DICTS:
        if not name.startswith('unet'):
            yield name, functools.partial(build_classifier, name, 10)


def test_every_network_is_compared():
    assert {name for name, _ in networks()} == set(STATE_DICTS) and len(STATE_DICTS) == 14


@pytest.mark.parametrize('name, build', list(networks()), ids=lambda value: str(value)[:20])
def test_state_dict(name, build):
    with torch.device('meta'):
        found = {key: [list(value.shape), str(value.dtype).replace('torch.', '')]
                 for key, value in build().state_dict().items()}
    assert found == STATE_DICTS[name]


MEANING = dict(
    alphas_bar='schedule, alpha_bar at 0..T', unet_small='U-Net of 64 steps, 32 channels',
    unet_full='U-Net of CIFAR-10', unet_cond='U-Net with labels', ddim='images sampled in 4 steps',
    base_loss='loss of the teacher', pd_loss='loss of PD, 8 to 4 steps',
    rdd='RDD, 8 to 4 steps, DenseNet-121', is_p2p='IS_P2P', m_p2p='M_P2P, 200 pixels, 50 compared',
    classifier='classifier on 32 px images', fid='Frechet distance, 64 features',
    **{'is': 'Inception score, 1000 x 20'})


def meaning(name):
    return next(words for start, words in MEANING.items() if name.split('/')[0].startswith(start))


def main():
    print('| entry | what | largest error | allowed |\n| :--- | :--- | ---: | ---: |')
    for name in REFERENCE:
        error, tolerance, kind = compare(name)
        print(f'| `{name}` | {meaning(name)} | {error.max():.1e} | {tolerance:.0e} {kind} |')


if __name__ == '__main__':
    main()
