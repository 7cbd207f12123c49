"""Frechet distance, Inception score, precision and recall from features, in float64."""

import torch

from runtime import distributed
from runtime.cli import UserError

KEPT = 10000        # images of which features are kept, for precision and recall
NEIGHBOURS = 3      # k of precision and recall
ROWS = 1000         # images whose distances to all others are in memory at a time


def frechet_distance(mu1, sigma1, mu2, sigma2, device='cpu'):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Heusel et al., 1706.08500, equation 6.

    The trace of the root is taken from symmetric matrices: S1 S2 has the eigenvalues of R S2 R
    with R = S1^(1/2), which are real and not negative. Singular covariances need no special care.

    mu1, mu2: means (D,). sigma1, sigma2: covariances (D, D). Arrays or tensors.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(v, dtype=torch.float64, device=device)
                                for v in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Rounding makes eigenvalues that should be 0 slightly negative.
    eigenvalues = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0)
    trace = sigma1.trace() + sigma2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(0., ((mu1 - mu2).square().sum() + trace).item())


def precision_recall(real, fake, device='cpu'):
    """Improved precision and recall, Kynkaanniemi et al., 1904.06991, equations 1 and 2.

    The manifold of a set of features is the union of balls around its members, each as large as
    the distance to the third nearest other member. Precision is the share of generated images in
    the manifold of the real ones, recall the share of real images in that of the generated ones.

    real, fake: features (N, D) and (M, D), arrays or tensors. (None, None) of 3 images or fewer.
    """
    real, fake = (torch.as_tensor(v, dtype=torch.float64, device=device) for v in (real, fake))
    if min(len(real), len(fake)) <= NEIGHBOURS:
        return None, None

    def share_within(points, members):
        radii = torch.cat([torch.cdist(part, members).kthvalue(NEIGHBOURS + 1).values
                           for part in members.split(ROWS)])        # itself is the nearest
        within = [(torch.cdist(part, members) <= radii).any(1) for part in points.split(ROWS)]
        return torch.cat(within).double().mean().item()

    return share_within(fake, real), share_within(real, fake)


class ActivationStats:
    """Streaming mean, covariance and Inception score of `total` images over all processes.

    It keeps sums in float64 on the device of the features, and the features of at most `KEPT`
    evenly spaced images. The results do not depend on the size of the batches.
    Image i belongs to split i * splits // total of the Inception score: every image counts.
    """

    def __init__(self, total, splits=10):
        self.total, self.splits = total, min(splits, total)
        self.sums = None        # of features, their products, and what the Inception score needs
        self.features = []      # (n, D) of the images that are kept

    def update(self, features, probs, indices):
        """Add a batch: features (B, D), probabilities (B, K), places among all images (B,)."""
        wanted = min(KEPT, self.total)
        kept = torch.nonzero(indices.cpu() * wanted % self.total < wanted)[:, 0]
        self.features.append(features[kept.to(features.device)].float())
        features, probs = features.double(), probs.double()
        which = indices.to(probs.device) * self.splits // self.total
        plogp = torch.xlogy(probs, probs).sum(1, keepdim=True)      # 0 log 0 = 0
        per_image = torch.cat([torch.ones_like(plogp), plogp, probs], 1)
        per_split = per_image.new_zeros(self.splits, per_image.shape[1])
        per_split.index_add_(0, which, per_image)
        parts = features.sum(0), features.T @ features, per_split
        if self.sums is None:
            self.sums = parts
        else:
            for total, part in zip(self.sums, parts):
                total.add_(part)        # in place: the products of Inception's features are 32 MiB

    def reduce(self):
        """Add up the sums of all processes, once; the first gets all features. Returns itself."""
        for value in self.sums:
            distributed.all_reduce_sum(value)
        found = self.sums[2][:, 0].sum().item()
        if found != self.total:
            raise UserError(f'{found:.0f} images were scored, expected {self.total}; the data set '
                            f'changed or was read twice', code=1)
        self.features = distributed.gather_main(torch.cat(self.features).cpu())
        return self

    def mean_cov(self):
        """(mu (D,), sigma (D, D)), numpy float64; the unbiased covariance, as np.cov gives it."""
        sum_f, sum_ff, _ = self.sums
        mu = sum_f / self.total
        sigma = (sum_ff - self.total * torch.outer(mu, mu)) / (self.total - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()

    def inception_score(self):
        """(mean, std) over the splits of exp(mean KL(p(y|x) || p(y))), Salimans et al., 1606.03498.

        1 (no information) <= mean <= K.
        """
        count, sum_plogp, sum_p = self.sums[2].split([1, 1, self.sums[2].shape[1] - 2], 1)
        mean_p = sum_p / count
        scores = (sum_plogp[:, 0] / count[:, 0] - torch.xlogy(mean_p, mean_p).sum(1)).exp()
        if not torch.isfinite(scores).all():
            raise UserError('the class probabilities are not finite; check the images and the '
                            'network that made them', code=1)
        return scores.mean().item(), scores.std(unbiased=False).item()
