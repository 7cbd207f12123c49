"""Diffusion: the step of the student, a perfect network, strides, schedules."""

import pytest
import torch

from diffusion import Diffusion, clean_linear

gen = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=gen, dtype=torch.float64)


def smooth(z_t, t, y=None):
    """Stands for a network: any smooth function of (z_t, t)."""
    return torch.tanh(z_t.roll(1, 3) + t[:, None, None, None] / 1000)


@pytest.mark.parametrize('end', ['cosine', 'clean'])
@pytest.mark.parametrize('of, to', [
    ('xstart', 'xstart'), ('epsilon', 'xstart'), ('epsilon', 'v'), ('v', 'epsilon')])
def test_student_step_lands_where_two_teacher_steps_do(of, to, end):
    """From the first to the last step; x of an eps teacher, divided by a tiny alpha, is clipped."""
    teacher = Diffusion(8, mean_type=of, N=1000,
                        schedule=clean_linear() if end == 'clean' else end)
    student, z_t = teacher.with_steps(4, to), randn(4, 3, 4, 4)
    t, mid, s = (torch.tensor([250, 500, 750, 1000]) - ago for ago in (0, 125, 250))
    x_target = teacher.two_step_target(smooth, z_t, t)
    z_mid = teacher.ddim_step(smooth, z_t, t, mid, clip=of == 'epsilon')
    z_s = teacher.ddim_step(smooth, z_mid, mid, s, clip=of == 'epsilon')
    if of == 'epsilon':
        assert x_target.abs().max() < 1.2 and teacher.predict(smooth, z_t, t)[0].abs().max() > 20
    alpha_t, sigma_t = student.at(t)
    eps = student.eps_of(z_t, x_target, t)
    output = dict(xstart=x_target, epsilon=eps, v=alpha_t * eps - sigma_t * x_target)[to]
    landed = student.ddim_step(lambda *a: output, z_t, t, student.before(t), clip=False)
    assert ((landed - z_s).abs().amax((1, 2, 3)) / z_s.abs().amax((1, 2, 3))).max() < 1e-9
    one_step = teacher.ddim_step(smooth, z_t, t, s, clip=of == 'epsilon')
    assert (one_step - z_s).abs().max() > 0.01


@pytest.mark.parametrize('mean_type', ['xstart', 'epsilon'])
@pytest.mark.parametrize('stride', [1, 2, 8])
def test_a_perfect_network_is_sampled_exactly(mean_type, stride):
    """At index 0 of the cosine schedule, z is alpha_0 x_0 + sigma_0 eps; x_0 at a clean end."""
    x_0, eps, calls = randn(2, 3, 4, 4).clamp(-.9, .9), randn(2, 3, 4, 4), []
    for schedule in ('cosine', clean_linear(1024)):
        diffusion = Diffusion(8, 128, mean_type, schedule=schedule)

        def perfect(z_t, t, y=None):
            calls.append(t[0].item())
            return x_0 if mean_type == 'xstart' else diffusion.eps_of(z_t, x_0, t)

        x_T = diffusion.add_noise(x_0, eps, torch.tensor([1024, 1024]))
        sample = diffusion.sample(perfect, x_T, stride)
        expected = (diffusion.alpha[0] * x_0 + diffusion.sigma[0] * eps).clamp(-1, 1)
        assert (sample - expected).abs().max() < 1e-6
        assert diffusion.clean_end == ((expected - x_0).abs().max() < 1e-6)
    assert calls == 2 * list(range(1024, 0, -128 * stride))     # T / stride evaluations


@pytest.mark.parametrize('N, T', [(1000, 128), (1000, 1), (1024, 8), (999, 128), (7, 5)])
def test_times_are_rounded_and_nested(N, T):
    diffusion, times = Diffusion(T, N=N), [round(k * N / T) for k in range(T + 1)]
    assert diffusion.visited.tolist() == times == diffusion.times()[::-1]
    assert times[0] == 0 and times[-1] == N and len(set(times)) == T + 1
    assert diffusion.before(torch.tensor(times)).tolist() == [0] + times[:-1]
    if T % 2 == 0:
        student = diffusion.with_steps(T // 2)
        assert student.visited.tolist() == times[::2] == diffusion.times(2)[::-1]
        assert student.N == N and torch.equal(student.alpha, diffusion.alpha)
    again = Diffusion(**diffusion.arguments())
    assert again.times() == diffusion.times() and torch.equal(again.sigma, diffusion.sigma)
    assert ('N' in diffusion.arguments()) == (N % T > 0)


def test_schedule_of_ddpm():
    """beta from 1e-4 to 0.02, after the clean image."""
    clean = Diffusion(8, N=1000, schedule=clean_linear())
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(clean.alpha[1:] ** 2, (1 - beta).cumprod(0), rtol=1e-4, atol=0)
    assert clean.alpha[0] == 1 and clean.sigma[0] == 0 and len(clean.alpha) == 1001


def test_predict_leaves_autocast_precision():
    z_t, t = torch.randn(1, 3, 4, 4, generator=gen), torch.tensor([4])
    x, eps = Diffusion(8).predict(lambda z, t, y: z.bfloat16(), z_t, t)
    assert x.dtype == eps.dtype == torch.float32
