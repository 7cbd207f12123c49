"""Frechet distance and Inception score from features and class probabilities, in float64."""

import numpy as np
import torch

from runtime import distributed
from runtime.cli import UserError


def frechet_distance(mu1, sigma1, mu2, sigma2, device='cpu'):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al., 1706.08500, equation 6.

    The trace of the root is taken from symmetric matrices: S1 S2 has the eigenvalues of R S2 R
    with R = S1^(1/2), which are real and not negative. Singular covariances need no special care.

    Args:
        mu1, mu2: means (D,). sigma1, sigma2: covariances (D, D). Arrays or tensors.
        device: where this is computed, in float64.

    Returns:
        float, at least 0.

    Raises:
        UserError: shapes that do not fit together; values that are not finite (code 1).
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(v, dtype=torch.float64, device=device)
                                for v in (mu1, sigma1, mu2, sigma2))
    shapes = [tuple(v.shape) for v in (mu1, mu2, sigma1, sigma2)]
    if mu1.ndim != 1 or shapes != [shapes[0]] * 2 + [shapes[0] * 2] * 2:
        raise UserError('the statistics to compare have different shapes: means {} and {}, '
                        'covariances {} and {}; make both with one feature network'.format(*shapes))
    if not all(torch.isfinite(v).all() for v in (mu1, sigma1, mu2, sigma2)):
        raise UserError('the statistics to compare hold values that are not finite; check the '
                        'images and the network that made them', code=1)
    root = symmetric_sqrt(sigma1)
    product = root @ sigma2 @ root
    # Rounding makes eigenvalues that should be 0 slightly negative.
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    trace = sigma1.trace() + sigma2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0., ((mu1 - mu2).square().sum() + trace).item())


def symmetric_sqrt(matrix):
    """R (D, D) with R R = matrix, for a symmetric positive semi-definite one."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def inception_score(probs, splits=10):
    """exp(mean KL(p(y|x) || p(y))) per split, Salimans et al., 1606.03498.

    Args:
        probs: (N, K) class probabilities; rows of a split follow one another.
        splits: parts scored on their own; at most N.

    Returns:
        (mean, std) over the splits, floats; 1 (no information) <= mean <= K.

    Raises:
        UserError: empty input; values that are not finite (code 1).
    """
    probs = torch.as_tensor(np.asarray(probs, dtype=np.float64))
    if probs.ndim != 2 or not len(probs):
        raise UserError(f'the Inception score needs probabilities (N, K), found the shape '
                        f'{tuple(probs.shape)}; score at least one image')
    sums = split_sums(probs, torch.arange(len(probs)), len(probs), splits)
    return score_of_sums(*sums)


def split_sums(probs, indices, total, splits):
    """Sums over the images of each split, from which `score_of_sums` makes the score.

    Args:
        probs: (B, K). indices: (B,) of these images among all, 0..total - 1. Image i belongs to
            split i * S // total, with S = min(splits, total).

    Returns:
        number of images (S,), sum of p (S, K), sum of p log p over images and classes (S,).
    """
    splits = min(splits, total)
    which = indices * splits // total
    count, sum_p, sum_plogp = (probs.new_zeros(splits, *shape)
                               for shape in ((), probs.shape[1:], ()))
    count.index_add_(0, which, torch.ones_like(probs[:, 0]))
    sum_p.index_add_(0, which, probs)
    sum_plogp.index_add_(0, which, torch.xlogy(probs, probs).sum(1))     # 0 log 0 = 0
    return count, sum_p, sum_plogp


def score_of_sums(count, sum_p, sum_plogp):
    """(mean, std) over the splits of exp(mean p log p - p_mean log p_mean), from `split_sums`.

    Raises:
        UserError: values that are not finite, or a split without images (code 1).
    """
    mean_p = sum_p / count[:, None]
    scores = (sum_plogp / count - torch.xlogy(mean_p, mean_p).sum(1)).exp()
    if not torch.isfinite(scores).all():
        raise UserError('the class probabilities are not finite or images of a split are missing; '
                        'check the images and the network that made them', code=1)
    return scores.mean().item(), scores.std(unbiased=False).item()


class ActivationStats:
    """Streaming mean, covariance and Inception score of `total` images over all processes.

    It keeps sums in float64 on the device of the features, never the features. The memory does
    not grow with the number of images, and the results do not depend on the size of the batches.
    """

    def __init__(self, total, splits=10):
        self.total, self.splits = total, splits
        self.sums, self.reduced = None, False

    @torch.no_grad()
    def update(self, features, probs, indices):
        """Add a batch.

        Args:
            features: (B, D). probs: (B, K) class probabilities.
            indices: (B,) of these images among all, 0..total - 1; they decide the splits.
        """
        features, probs = features.double(), probs.double()
        count = features.new_full((), float(len(features)))
        parts = (count, features.sum(0), features.T @ features,
                 *split_sums(probs, indices.to(probs.device), self.total, self.splits))
        if self.sums is None:
            self.sums = parts
        else:
            for total, part in zip(self.sums, parts):
                total.add_(part)

    def reduce(self):
        """Add up the sums of all processes; call it once on every process, after the last batch.

        Raises:
            UserError: this process saw no image; all together did not see `total` (code 1).
        """
        if self.sums is None:
            raise UserError('a process has no images to score; use more images or fewer processes')
        if not self.reduced:
            for value in self.sums:
                distributed.all_reduce_sum(value)
            self.reduced = True
        if self.sums[0].item() != self.total:
            raise UserError(f'{self.sums[0].item():.0f} images were scored, expected {self.total}; '
                            f'the data set changed or was read twice', code=1)
        return self

    def mean_cov(self):
        """(mu (D,), sigma (D, D)), numpy float64; the unbiased covariance, as np.cov gives it.

        Raises:
            UserError: fewer than two images.
        """
        count, sum_f, sum_ff = self.sums[:3]
        if count < 2:
            raise UserError('a covariance needs at least two images; score more')
        mu = sum_f / count
        sigma = (sum_ff - count * torch.outer(mu, mu)) / (count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()

    def inception_score(self):
        """(mean, std) over the splits, floats; see the function `inception_score`."""
        return score_of_sums(*self.sums[3:])
