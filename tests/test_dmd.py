"""train_dmd.py as users start it: two steps by formulas, resuming, parts, processes, mistakes."""

import pytest
import torch

from diffusion import Diffusion
from formats.load import load_model
from helpers import DATA, assert_ran, assert_refused, assert_same, command, fork_all, log_of
from runtime import checkpoint, seeding
from wiring import random_unet, save_model

DMD = ['train_dmd.py', *DATA, '--save_step=2', '--sample_step=0', '--lr=1e-3', '--warmup=0']
OF_32 = '--base_ckpt=32 --teacher_ckpt=32 --student_steps=1'
# (words of the error, flags of the command that ends with it)
REFUSED = dict(
    steps=('--base_ckpt .* has 8 steps, expected a student of 1, 2 or 4', '--base_ckpt=8'),
    few=('--teacher_ckpt .* has 8 steps, expected the teacher before', '--teacher_ckpt=8'),
    labels=('conditional is False in --base_ckpt and True in', '--teacher_ckpt=labels'),
    eps=('predicts eps, from which one step makes no image',
         '--base_ckpt=eps --teacher_ckpt=eps --student_steps=1'),
    times=('--t_min 0.5 is not below --t_max 0.5', '--t_min=.5 --t_max=.5'),
    same=('--logdir .* is the folder of the start', '--logdir=1'),
    own=('--logdir .* is the folder of the teacher', '--logdir=16'),
    # the fake network diverges, though the loss and the gradient of G stay finite
    overflow=('not finite', '--teacher_ckpt=huge --total_steps=2'),
    none=('--teacher_ckpt is missing', '--teacher_ckpt='),
    grid=('a run with another teacher_steps than', f'{OF_32} --total_steps=2',
          f'{OF_32} --total_steps=2 --teacher_steps=16'))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Folder of a teacher with 16 steps, of students with other weights, and of the runs below."""
    folder = tmp_path_factory.mktemp('dmd')
    for seed, name in enumerate(['16', '1', '2', '8', 'labels', 'eps', 'huge', '32']):
        T = int(name) if name.isdigit() else 16
        net = random_unet(seed, max(T, 16), conditional=name == 'labels')
        if name == 'huge':
            net.tail[2].weight.data *= 1e17
        save_model(folder / name, net, T=T, time_scale=max(1, 16 // T),
                   mean_type='epsilon' if name == 'eps' else 'xstart')

    def dmd(name, *more, **how):
        return command([*DMD, '--teacher_ckpt=16', '--base_ckpt=1', f'--logdir={name}',
                        '--total_steps=4'], *more, cwd=str(folder), **how)

    jobs = dict(
        defaults=[dmd('defaults', '--base_ckpt=16', '--student_steps=1', '--total_steps=2',
                      '--grad_clip=0')],
        other=[dmd('other', '--base_ckpt=2', '--total_steps=2', '--grad_clip=0',
                   '--fake_updates=3', '--fake_lr=2e-4', '--adam_beta1=.5', '--adam_beta2=.9',
                   '--t_min=.3', '--t_max=.6', '--noweighting', '--regression_weight=.5')],
        whole=[dmd('whole')], dropped=[dmd('dropped', '--dropout=.2')],
        killed=[dmd('killed', '--dropout=.2', kill_after_save=True),
                dmd('killed', '--dropout=.2', '--teacher_ckpt=16/ckpt.pt')],
        parts=[dmd('parts', '--grad_accum=2')], two=[dmd('two', ranks=2)])
    for name, (_, *commands) in REFUSED.items():
        jobs[name] = [dmd(f'bad/{name}', *words.split()) for words in commands]
    return folder, fork_all(jobs)


@pytest.mark.parametrize('name, T, low, high, updates, fake_lr, betas, weighting, regression', [
    ('defaults', 1, 1, 16, 2, 5e-4, (0., .99), True, 0.),
    ('other', 2, 5, 10, 3, 2e-4, (.5, .9), False, .5)])
def test_two_steps(runs, name, T, low, high, updates, fake_lr, betas, weighting, regression):
    """Losses and weights of both networks by the equations of the paper, with torch's Adam."""
    folder, results = runs
    assert_ran(results[name])
    start = '2' if T == 2 else '16'
    student, teacher = load_model(folder / start), load_model(folder / '16')
    G, mu_fake = student.trainable(), teacher.trainable()
    alpha, sigma = Diffusion(16).at(torch.arange(17), torch.float32)
    optim_G, optim_fake = (
        torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr, betas)
        for network, lr in ((G, 1e-3), (mu_fake, fake_lr)))
    lines = log_of(folder / name)
    for step, rate, line in zip((1, 2), (1e-3, .5e-3), lines):      # a cosine to 0
        def draw(number):
            rng = seeding.generator('cpu', 0, seeding.NOISE, 16, step, number)
            t = torch.randint(low, high + 1, (8,), generator=rng)
            x_T, eps = torch.randn((2, 8, 3, 8, 8), generator=rng)
            return t, x_T, lambda x: alpha[t] * x + sigma[t] * eps

        losses_fake = []
        for k in range(updates):
            t, x_T, noisy = draw(k + 1)
            x = evaluation(G, T, x_T, (step + k) % T).detach().clamp(-1, 1)
            losses_fake.append((mu_fake(noisy(x), t) - x).square().mean())
            update(optim_fake, losses_fake[-1])
        t, x_T, noisy = draw(updates + 1)
        x = evaluation(G, T, x_T, step % T)
        with torch.no_grad():
            x_real, x_fake = teacher.network(noisy(x), t), mu_fake(noisy(x), t)
            g = x_fake - x_real
            if weighting:
                g = g / (x - x_real).abs().mean((1, 2, 3), keepdim=True)
        distance = (x - evaluation(student.network, T, x_T, step % T)).square().mean()
        optim_G.param_groups[0]['lr'] = rate
        update(optim_G, (x * g).mean() + regression * distance)
        norm = torch.stack([p.grad.norm() for p in G.parameters() if p.grad is not None]).norm()
        assert line['loss_fake'] == pytest.approx(sum(losses_fake).item() / updates, rel=1e-4)
        assert line['loss_dmd'] == pytest.approx(g.square().mean().item() / 2, rel=1e-3)
        assert line['grad_norm'] == pytest.approx(norm.item(), rel=1e-3)
        if regression:      # 0 in the first step: G is at its start
            assert line['loss_regression'] == pytest.approx(distance.item(), rel=1e-2)
    assert len(lines) == 2
    state = checkpoint.read(folder / name)
    assert (state['T'], state['time_scale'], state['method']) == (T, 16 // T, 'dmd')
    for key, network in dict(net_model=G, fake_model=mu_fake).items():
        for parameter, p in network.named_parameters():
            far = (state[key][parameter] - p.detach()).abs() > 2e-5
            # a gradient that is 0 up to rounding lets Adam step at random
            if p.grad is None or p.grad.abs().max() > 1e-8:
                assert far.float().mean() < .05, (key, parameter)


def evaluation(network, T, z, number):
    """Image of evaluation `number` of T, at time 16 or 8; it alone has a gradient."""
    sampler, times = Diffusion(T, 16 // T), [torch.full((len(z),), t) for t in (16, 8)]
    if number:
        with torch.no_grad():
            z = sampler.ddim_step(network, z, *times)
    return network(z, times[number])


def update(optim, loss):
    optim.zero_grad()
    loss.backward()
    optim.step()


def test_resuming_is_exact(runs):
    """Also the dropout of both networks."""
    folder, results = runs
    assert_ran(results['dropped'])
    assert [result[0] for result in results['killed']] == [137, 0]
    assert 'other flags' not in results['killed'][1][1]     # another name of the same teacher
    states = [checkpoint.read(folder / name) for name in ('dropped', 'killed')]
    assert_same(*states, skip=('flags',))


@pytest.mark.parametrize('name', ['parts', 'two'])
def test_parts_and_processes_change_only_rounding(runs, name):
    folder, results = runs
    assert_ran(results['whole'] + results[name])
    for line, expected in zip(log_of(folder / name), log_of(folder / 'whole')):
        for key in ('loss_fake', 'loss_dmd', 'grad_norm'):
            assert line[key] == pytest.approx(expected[key], rel=.02), (line['step'], key)


@pytest.mark.parametrize('name', list(REFUSED))
def test_refused(runs, name):
    assert_refused(runs[1][name][-1], REFUSED[name][0], code=1 if name == 'overflow' else 2)
