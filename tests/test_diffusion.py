"""Diffusion: the step of the student, a perfect network, strides, and the loss."""

import pytest
import torch

import oracle
from diffusion import Diffusion, alpha_bar_table, clean_linear, distillation_loss

gen = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=gen, dtype=torch.float64)


def smooth(z_t, t, y=None):
    """Stands for a network: any smooth function of (z_t, t)."""
    return torch.tanh(z_t.roll(1, 3) + 0.1 * t[:, None, None, None])


def test_table_is_the_formula():
    table, (alpha, sigma) = alpha_bar_table(6), oracle.schedule(6)
    assert table.shape == (7,) and table.dtype == torch.float64
    torch.testing.assert_close(table, alpha.flatten() ** 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(Diffusion(3, 2).sigma, sigma.flatten(), rtol=1e-12, atol=0)
    assert (1 - alpha_bar_table(1024)[0]).sqrt().item() == pytest.approx(0.0063, abs=5e-5)


@pytest.mark.parametrize('mean_type', ['xstart', 'epsilon'])
def test_student_step_lands_where_two_teacher_steps_do(mean_type):
    teacher, student = Diffusion(8, 4, mean_type), Diffusion(4, 8, mean_type)
    z_t, t = randn(4, 3, 4, 4), torch.tensor([8, 16, 24, 32])
    x_target = teacher.two_step_target(smooth, z_t, t)
    clip = mean_type == 'epsilon'       # x of an eps teacher is divided by a tiny alpha_t
    z_mid = teacher.ddim_step(smooth, z_t, t, t - 4, clip=clip)
    z_s = teacher.ddim_step(smooth, z_mid, t - 4, t - 8, clip=clip)
    landed = student.add_noise(x_target, student.eps_of(z_t, x_target, t), t - 8)
    assert x_target.abs().max() < 2 or not clip
    assert ((landed - z_s).abs().amax((1, 2, 3)) / z_s.abs().amax((1, 2, 3))).max() < 1e-10
    if mean_type == 'xstart':       # the same through a student that predicts x_target
        z = Diffusion(4, 8, 'xstart').ddim_step(lambda z, t, y: x_target, z_t, t, t - 8, False)
        assert (z - z_s).abs().max() < 1e-10
        assert (x_target - smooth(z_t, t)).abs().max() > 0.1    # not simply one step


@pytest.mark.parametrize('mean_type', ['xstart', 'epsilon'])
@pytest.mark.parametrize('stride', [1, 2, 8])
def test_a_perfect_network_is_sampled_exactly(mean_type, stride):
    """z at index 0 is alpha_0 x_0 + sigma_0 eps: off x_0 by at most sigma_0 (|x_0| + |eps|)."""
    diffusion, x_0, eps = Diffusion(8, 128, mean_type), randn(2, 3, 4, 4).clamp(-.9, .9), \
        randn(2, 3, 4, 4)
    x_T = diffusion.add_noise(x_0, eps, torch.tensor([1024, 1024]))
    calls = []

    def perfect(z_t, t, y=None):
        calls.append(t[0].item())
        return x_0 if mean_type == 'xstart' else diffusion.eps_of(z_t, x_0, t)

    sample = diffusion.sample(perfect, x_T, stride)
    sigma_0 = diffusion.sigma[0].item()
    assert 0 < (sample - x_0).abs().max() <= sigma_0 * (0.9 + eps.abs().max().item())
    expected = diffusion.alpha[0] * x_0 + sigma_0 * eps
    assert (sample - expected.clamp(-1, 1)).abs().max() < 1e-6
    assert calls == list(range(1024, 0, -128 * stride))     # T / stride evaluations


def test_strides():
    diffusion = Diffusion(8, 2)
    assert diffusion.times() == [16, 14, 12, 10, 8, 6, 4, 2, 0]
    assert diffusion.times(4) == [16, 8, 0] and diffusion.times(8) == [16, 0]
    for stride in (3, 5, 16, 0, -1):
        with pytest.raises(ValueError, match='does not divide the 8 steps'):
            diffusion.times(stride)
    x_T = randn(2, 3, 4, 4)
    assert torch.equal(diffusion.sample(smooth, x_T, stride=4), Diffusion(2, 8).sample(smooth, x_T))


@pytest.mark.parametrize('N, T', [(1000, 128), (1000, 1), (1024, 8), (999, 128), (7, 5)])
def test_times_are_rounded_and_nested(N, T):
    diffusion, times = Diffusion(T, N=N), [round(k * N / T) for k in range(T + 1)]
    assert diffusion.visited.tolist() == times == diffusion.times()[::-1]
    assert times[0] == 0 and times[-1] == N and len(set(times)) == T + 1
    assert diffusion.before(torch.tensor(times)).tolist() == [0] + times[:-1]
    if T % 2 == 0:
        student = diffusion.with_steps(T // 2)
        assert student.visited.tolist() == times[::2]
        assert student.N == N and torch.equal(student.alpha, diffusion.alpha)
    again = Diffusion(**diffusion.arguments())
    assert again.times() == diffusion.times() and torch.equal(again.sigma, diffusion.sigma)
    assert ('N' in diffusion.arguments()) == (N % T > 0)


def test_a_clean_end():
    """Index 0 is the image itself; index k is the k-th beta."""
    diffusion = Diffusion(4, N=1000, schedule=clean_linear())
    assert diffusion.clean_end and not Diffusion(4).clean_end
    assert diffusion.alpha[0] == 1 and diffusion.sigma[0] == 0 and len(diffusion.alpha) == 1001
    assert diffusion.alpha[1].item() ** 2 == pytest.approx(1 - 1e-4, rel=1e-6)
    assert diffusion.alpha[2].item() ** 2 == pytest.approx(
        (1 - 1e-4) * (1 - 1e-4 - 0.0199 / 999), rel=1e-6)
    x_0 = randn(2, 3, 4, 4).clamp(-.9, .9)
    assert torch.equal(diffusion.sample(lambda *a: x_0, randn(2, 3, 4, 4)), x_0)


@pytest.mark.parametrize('to', ['xstart', 'v'])
def test_a_student_of_another_output_lands_there_too(to):
    """With a clean end, from the noisiest step to the last; x of the eps teacher is clipped."""
    teacher = Diffusion(8, N=1000, mean_type='epsilon', schedule=clean_linear())
    student, t = teacher.with_steps(4, to), torch.tensor([250, 500, 750, 1000])
    z_t = randn(4, 3, 4, 4)
    x_target = teacher.two_step_target(smooth, z_t, t)
    z_mid = teacher.ddim_step(smooth, z_t, t, t - 125)
    z_s = teacher.ddim_step(smooth, z_mid, t - 125, t - 250)
    assert x_target.abs().max() < 1.1 and teacher.predict(smooth, z_t, t)[0].abs().max() > 100
    alpha_t, sigma_t = student.at(t)
    v = alpha_t * student.eps_of(z_t, x_target, t) - sigma_t * x_target
    landed = student.ddim_step(lambda *a: v if to == 'v' else x_target, z_t, t, student.before(t),
                               clip=False)
    assert ((landed - z_s).abs().amax((1, 2, 3)) / z_s.abs().amax((1, 2, 3))).max() < 1e-9


def test_clipping():
    diffusion, x_T = Diffusion(4, 4), 3 * randn(2, 3, 4, 4)

    def large(z_t, t, y=None):
        return 2 * z_t

    free, clipped = (diffusion.sample(large, x_T, clip=clip) for clip in (False, True))
    assert free.abs().max() <= 1 and not torch.equal(free, clipped)
    t, s = torch.tensor([12, 12]), torch.tensor([8, 8])
    x, alpha, sigma = (2 * x_T).clamp(-1, 1), diffusion.alpha, diffusion.sigma
    expected = alpha[8] * x + sigma[8] * (x_T - alpha[12] * x) / sigma[12]
    assert (diffusion.ddim_step(large, x_T, t, s) - expected).abs().max() < 1e-12


@pytest.mark.parametrize('mean_type', ['xstart', 'epsilon', 'v'])
def test_outputs_of_networks(mean_type):
    """z = alpha x + sigma eps; v = alpha eps - sigma x is the same, rotated by a right angle."""
    diffusion, t = Diffusion(8, 1, mean_type), torch.tensor([0, 4, 8])
    x, eps, (alpha_t, sigma_t) = randn(3, 3, 4, 4), randn(3, 3, 4, 4), diffusion.at(t)
    output = dict(xstart=x, epsilon=eps, v=alpha_t * eps - sigma_t * x)[mean_type]
    found = diffusion.predict(lambda *a: output, diffusion.add_noise(x, eps, t), t)
    assert max((found[0] - x).abs().max(), (found[1] - eps).abs().max()) < 1e-10


def test_predict_leaves_autocast_precision():
    z_t, t = torch.randn(1, 3, 4, 4, generator=gen), torch.tensor([4])
    x, eps = Diffusion(8).predict(lambda z, t, y: z.bfloat16(), z_t, t)
    assert x.dtype == eps.dtype == torch.float32


def test_loss_is_the_larger_error_of_each_sample():
    x_pred, x_target, eps_pred, eps_target = (torch.zeros(2, 1, 1, 2) for _ in range(4))
    x_pred[0], eps_pred[0], eps_pred[1], x_pred[1] = 2, 1, 3, 1
    args = x_pred, eps_pred, x_target, eps_target
    assert distillation_loss(*args, 'x').tolist() == [4, 1]
    assert distillation_loss(*args, 'eps').tolist() == [1, 9]
    assert distillation_loss(*args).tolist() == distillation_loss(*args, 'both').tolist() == [4, 9]


def test_loss_is_truncated_snr():
    """With both eps from the same z_t: max(|dx|^2, |deps|^2) = max(1, alpha^2 / sigma^2) |dx|^2."""
    diffusion, t = Diffusion(64), torch.tensor([1, 20, 40, 64])
    z_t, x_target, x_pred = (randn(4, 3, 4, 4) for _ in range(3))
    loss = distillation_loss(x_pred, diffusion.eps_of(z_t, x_pred, t), x_target,
                             diffusion.eps_of(z_t, x_target, t))
    snr = (diffusion.alpha[t] / diffusion.sigma[t]) ** 2
    assert snr[0] > 1 > snr[3]
    expected = snr.clamp(min=1) * (x_target - x_pred).square().mean((1, 2, 3))
    assert (loss / expected - 1).abs().max() < 1e-10
