"""
Metrics on features (n, D), embeddings or logits. All compute in float64, check their input first and raise ValueError.
Features are what a network that was trained for something else makes of an image: pixels compared one by one would not
tell like from unlike.

    metric             the question                                          better  mind
    frechet_distance   have both sets one mean and one covariance?           lower   biased as 1 / n: only at equal n
    mmd, kid           do all products of up to three features agree?        lower   unbiased, so it may be negative
    cmmd               one distribution, through a kernel of width 10?       lower   biased by about 10 / n
    precision_recall   is each fake near a real one; each real near a fake?  higher  order is (real, fake)
    prdc               the same by counts, which an outlier moves less       higher  density may exceed 1
    clip_score         does each image lie where its caption lies?           higher  31, 0.31, 0.78 may be one result
    inception_score    is each image of one class, all together of many?     higher  never looks at real images

DSG, which asks questions about a picture instead, is in questions.py. n and m are rows of a set, D features, p and q
rows of a block.
"""
import numpy as np
import torch
import torch.nn.functional as F

from lib.pairs import BLOCK, balls, check, factor, pair_sum, squared_distances


def feature_stats(x):
    """
    (n >= 2, D) -> mean (D,) and covariance (D, D), divisor n - 1 as np.cov. Centred first, so that a common offset
    costs no digits.
    """
    check(x, least=2)
    mu = sum(rows.double().sum(0) for rows in x.split(BLOCK)) / len(x)             # (D,)
    centred = (rows.double() - mu for rows in x.split(BLOCK))  # (p, D) each
    return mu, sum(c.T @ c for c in centred) / (len(x) - 1)    # (D,), (D, D)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """
    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) between two Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017).

    The last trace equals the sum of the singular values of A1 A2^T, for any A with A^T A = S, and is taken from them.
    Where n < D, most eigenvalues of a covariance are 0. The eigenvalues of S1 S2, of which other codes take roots, then
    carry rounding noise of 1e-16, whose root is 1e-8 of the trace for each such dimension; here the noise of both roots
    is multiplied, 1e-16 again. So nothing need be added to the diagonals.
    """
    check(mu1[None], sigma1, mu2[None], sigma2)                # finite, and of one width
    mu1, sigma1, mu2, sigma2 = (s.double() for s in (mu1, sigma1, mu2, sigma2))
    cross = torch.linalg.svdvals(factor(sigma1) @ factor(sigma2).T).sum()    # tr (S1 S2)^1/2, never below 0
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def cubic(a, b):
    """k(a, b) = (a.b / D + 1)^3, the kernel of KID: (p, D), (q, D) -> (p, q)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def cubic_within(x):
    """Mean of the cubic kernel over all pairs of different rows of x (n, D)."""
    own = sum(((a.double().square().sum(1) / x.shape[1] + 1) ** 3).sum().item() for a in x.split(BLOCK))   # k(a, a)
    return (pair_sum(cubic, x, x) - own) / (len(x) * (len(x) - 1))                 # ordered pairs


def mmd(x, y):
    """
    Unbiased squared MMD, mean k(x, x') + mean k(y, y') - 2 mean k(x, y), with KID's cubic kernel over all rows at once:
    what kid's mean estimates (Binkowski et al. 2018, eq. 4). x (n, D), y (m, D). Pairs of a row with itself are left
    out, so it may be negative, and is for equal sets.
    """
    check(x, y, least=2)
    return cubic_within(x) + cubic_within(y) - 2 * pair_sum(cubic, x, y) / (len(x) * len(y))


def kid(x, y, n_subsets=100, subset_size=1000, seed=0):
    """
    Kernel Inception distance (Binkowski et al. 2018): mean and standard deviation (ddof 0) of mmd over random subsets
    without replacement, x before y, from one np.random.RandomState(seed), as torch-fidelity has it. Not times 1000.
    """
    check(x, y, least=2)
    if n_subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):               # others shrink the subset unasked
        raise ValueError(f"{n_subsets} subsets of {subset_size} from {len(x)} and {len(y)} rows: "
                         "subset_size is 2 to the smaller set")
    random = np.random.RandomState(seed)                       # the old generator: others' figures come from it

    def subset(a):
        return a[torch.from_numpy(random.choice(len(a), subset_size, replace=False)).to(a.device)]
    values = [mmd(subset(x), subset(y)) for _ in range(n_subsets)]
    return float(np.mean(values)), float(np.std(values))


def gaussian_less_1(a, b):
    """k(a, b) - 1 for k = exp(-|a - b|^2 / (2 10^2)): (p, D), (q, D) -> (p, q)."""
    return torch.expm1(squared_distances(a, b) / (-2 * 10 ** 2))                   # keeps what 1 would swallow


def cmmd(x, y):
    """
    1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), k = exp(-|a - b|^2 / (2 10^2)) over all pairs, a row with
    itself included: biased, >= 0, and 0 for equal sets (Jayasumana et al. 2024 and its code). Rows are meant to be CLIP
    image embeddings of length one; they are taken as they come. k is near 1, so k - 1 is summed: the ones cancel.
    """
    check(x, y)

    def mean(a, b):
        return pair_sum(gaussian_less_1, a, b) / (len(a) * len(b))
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))   # as in its code


def share_above_0(counts):
    """Share of points that lie in a ball, or of balls that hold a point."""
    return (counts > 0).double().mean().item()


def precision_recall(real, fake, k=3):
    """
    (precision, recall): the share of fake rows in some real row's ball, and of real rows in some fake row's ball; the
    balls are closed and reach to the k-th neighbour (Kynkaanniemi et al. 2019, eq. 1-2). real (n > k, D), fake
    (m > k, D).
    """
    of_fake, _ = balls(real, fake, k, closed=True)             # (m,) real balls that hold a fake row
    of_real, _ = balls(fake, real, k, closed=True)             # (n,) fake balls that hold a real row
    return share_above_0(of_fake), share_above_0(of_real)


def prdc(real, fake, k=5):
    """
    {"precision", "recall", "density", "coverage"} with open balls (Naeem et al. 2020, eq. 1-4, and its code `prdc`).
    Density: real balls around a fake row, over k; coverage: the share of real balls that hold a fake row. real
    (n > k, D), fake (m > k, D).
    """
    of_fake, of_real_ball = balls(real, fake, k, closed=False)                     # (m,), (n,)
    of_real, _ = balls(fake, real, k, closed=False)            # for recall the fake rows carry the balls
    return {"precision": share_above_0(of_fake), "recall": share_above_0(of_real),
            "density": of_fake.double().mean().item() / k, "coverage": share_above_0(of_real_ball)}


def rank_correlation(x, y):
    """
    Spearman's, of two (n,): the correlation of ranks, where equals have their mean rank. nan where one does not vary,
    as where n is 0.
    """
    ranks = []
    for values in (x, y):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])                  # (n,)
    return float(np.corrcoef(*ranks)[0, 1]) if all(len(set(r)) > 1 for r in ranks) else float("nan")


def clip_score(images, texts):
    """
    100 x mean cosine of each image embedding (n, D) with that of its caption (n, D), not clamped. Hessel et al. 2021
    clamp it at 0 and scale by 2.5.
    """
    check(images, texts)
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} captions: give each image its caption")
    if not all(e.any(1).all() for e in (images, texts)):       # 0 / 0 would be NaN
        raise ValueError("an embedding is all zeros: it has no direction")
    return 100 * F.cosine_similarity(images.double(), texts.double(), eps=0).mean().item()


def inception_score(logits, splits=10):
    """
    Mean and standard deviation (ddof 0) over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016). Logits
    (n, classes) without bias, rows in random order; split i is rows i n // splits to (i + 1) n // splits, as in the
    first code.
    """
    check(logits, least=max(splits, 1))
    if splits < 1:
        raise ValueError(f"splits = {splits}: take at least 1")
    scores = []
    for i in range(splits):
        rows = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits]   # (p, classes)
        log_p = rows.double().log_softmax(1)                   # (p, classes): no log of a p that is 0
        marginal = log_p.logsumexp(0) - np.log(len(log_p))     # (classes,): log of the mean p
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp().item())       # exp of the mean KL
    return float(np.mean(scores)), float(np.std(scores))


# ---- as the table of eval.py takes them ------------------------------------------------------------------------------

def fd(real, fake):
    """Frechet distance of two sets of features (n, D), (m, D): of Inception's FID, of DINOv2's FD-DINO."""
    return frechet_distance(*feature_stats(real), *feature_stats(fake))


def shuffled_inception_score(logits):
    """Of rows in random order, as torch-fidelity has it: splits must not follow the order of files."""
    return inception_score(logits[torch.from_numpy(np.random.RandomState(2020).permutation(len(logits)))])


def named(function, *names):
    """The function, with {name: value} in place of a tuple."""
    return lambda *sets: dict(zip(names, function(*sets)))
