"""The scripts' own steps on a simulated GPU: no step mixes devices or makes the host wait."""

import numpy as np
import pytest
import torch

from classifier import build_classifier
from helpers import BASE, EVAL, PD, RDD, command, fork_all
from model import UNet
from runtime import checkpoint
from simulated_gpu import GPU, OneDevice

RUNS = dict(
    base=[*BASE, '--dropout=0.1', '--conditional'],
    pd=[*PD, '--grad_accum=2', '--ema_decay=0.9'],
    rdd=[*RDD, '--grad_accum=2', '--alpha=0.1', '--beta=0.5', '--logits', '--gt'],
    evaluation=EVAL)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """{name: (exit code, standard output, standard error)} of the first steps of every script."""
    folder = tmp_path_factory.mktemp('gpu')
    torch.manual_seed(0)
    checkpoint.save(folder / 'teacher.pt', dict(
        net_model=UNet(8, 32, [1, 1], [1], 1).state_dict(), T=8, time_scale=1, img_size=8))
    classifier = build_classifier('densenet_small', 10)
    checkpoint.save(folder / 'classifier.pt', dict(model=classifier.state_dict(),
                                                   name='densenet_small'))
    features = classifier.num_features
    np.savez(str(folder / 'real.npz'), mu=np.zeros(features), sigma=np.eye(features))
    files = [f'--base_ckpt={folder}/teacher.pt', f'--classifier_path={folder}/classifier.pt']
    more = dict(base=[], pd=files[:1], rdd=files, evaluation=[
        f'--fid_cache={folder}/real.npz', f'--feature_network={folder}/classifier.pt'])
    jobs = {}
    for name, words in RUNS.items():
        logdir = f'{folder}/teacher.pt' if name == 'evaluation' else f'{folder}/{name}'
        # grids, checkpoints and log lines read values, and are not due in these steps
        steps = [] if name == 'evaluation' else ['--save_step=0', '--log_step=9', '--total_steps=9']
        argv = ['tests/simulated_gpu.py', *words, *more[name], *steps]
        jobs[name] = [command(argv, f'--logdir={logdir}')]
    return {name: result for name, (result,) in fork_all(jobs).items()}


@pytest.mark.parametrize('name', list(RUNS))
def test_devices_agree_and_the_host_never_waits(results, name):
    code, out, error = results[name]
    assert code == 0 and out.endswith('reached step 3\n'), error


@pytest.mark.parametrize('wrong', [
    lambda x: x + torch.ones(3), lambda x: torch.ones(2, 3) @ x, lambda x: x[torch.tensor([0])],
    lambda x: torch.ones(3)[x.long()], lambda x: x[0].item(), lambda x: x.tolist(),
    lambda x: bool(x[0] > 0), lambda x: x[x > 0], lambda x: x.cpu(),
    lambda x: torch.ones(3).copy_(x),
    lambda x: torch.nn.functional.linear(x, torch.ones(3, 3, requires_grad=True))])
def test_the_simulation_notices(wrong):
    """Another device, and every way to wait for a value."""
    with OneDevice(), pytest.raises((RuntimeError, NotImplementedError)):
        wrong(torch.ones(3, device=GPU))


def test_the_simulation_allows():
    """Copies to the device, single numbers, and gradients."""
    with OneDevice():
        x = torch.ones(3).to(GPU).requires_grad_()
        (2 * x * torch.tensor(3.)).sum().backward()
        assert x.grad.device == GPU
