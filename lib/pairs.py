"""
All pairs of rows of two sets (n, D), a block at a time: sums of a kernel, nearest neighbours, balls. Memory is that of
one block, however many rows there are, and all is computed in float64.

p and q are rows of a block, D the width of a row.
"""
import torch

BLOCK = 2048                                                   # rows at a time: 2048 x 2048 pairs are 34 MB


def check(*sets, least=1):
    """
    ValueError unless each set is (n >= least, D), finite, with one D for all. Unchecked, a NaN compares as False and D
    = 1 broadcasts.
    """
    for x in sets:
        if not torch.is_tensor(x) or x.ndim != 2 or x.is_complex() or not x.shape[1]:
            what = tuple(x.shape) if hasattr(x, "shape") else type(x)
            raise ValueError(f"expected a real tensor (rows, width), not {what}")
        if len(x) < least:
            raise ValueError(f"{len(x)} rows, but this metric needs at least {least}")
        if not all(torch.isfinite(rows).all() for rows in x.split(BLOCK)):
            raise ValueError("the values hold NaN or infinity: look at what produced them")
    if len({x.shape[1] for x in sets}) > 1:                    # as features of two networks have
        raise ValueError(f"widths {[x.shape[1] for x in sets]} differ: all sets must come from one network")


def pair_sum(kernel, x, y):
    """Sum of kernel(a, b) over all pairs of rows of x (n, D), y (m, D); kernel: (p, D), (q, D) -> (p, q)."""
    return sum(kernel(a.double(), b.double()).sum().item() for a in x.split(BLOCK) for b in y.split(BLOCK))


def squared_distances(a, b):
    """(p, D), (q, D) float64 -> (p, q), to 1e-16 of the squared lengths, so >= 0 but for rounding."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2) + a.square().sum(1)[:, None]


def radii(x, k):
    """(n,) squared distance from each row to its k-th nearest other row: the k + 1st, itself being the first."""
    result = []
    for a in x.split(BLOCK):
        nearest = []                                           # of each block of rows the k + 1 nearest
        for b in x.split(BLOCK):
            d = squared_distances(a.double(), b.double())      # (p, q)
            nearest.append(d.topk(min(k + 1, len(b)), largest=False).values)       # (p, k + 1) or fewer
        result.append(torch.cat(nearest, 1).topk(k + 1, largest=False).values[:, k])       # (p,), over all blocks
    return torch.cat(result)


def balls(centres, points, k, closed):
    """
    Around each of `centres` (n, D) a ball reaches to its k-th neighbour. How many balls hold each of `points` (m,), and
    how many points each ball holds (n,). `closed` counts points on the surface.
    """
    check(centres, points)
    if not 1 <= k < len(centres):
        raise ValueError(f"k = {k} neighbours among {len(centres)} rows: take k from 1 to {len(centres) - 1}")
    of_point, of_ball = points.new_zeros(len(points), dtype=torch.long), []
    for a, radius in zip(centres.split(BLOCK), radii(centres, k).split(BLOCK)):
        inside = []                                            # one (p, q) of booleans for each block of points
        for b in points.split(BLOCK):
            d = squared_distances(a.double(), b.double())      # (p, q)
            inside.append(d <= radius[:, None] if closed else d < radius[:, None])
        inside = torch.cat(inside, 1)                          # (p, m)
        of_point += inside.sum(0)                              # balls that hold the point
        of_ball.append(inside.sum(1))                          # points that the ball holds
    return of_point, torch.cat(of_ball)


def factor(sigma):
    """
    (D, D) A with A^T A = a covariance (D, D). ValueError where it cannot be one. Cholesky's is an eighth of the work of
    eigenvectors, which are taken where some feature varies by what others do not tell by rounding errors alone.
    """
    if len(sigma) != sigma.shape[1] or (sigma - sigma.T).abs().max() > 1e-6 * sigma.abs().max():
        raise ValueError(f"a covariance {tuple(sigma.shape)} must be square and symmetric")
    upper, failed = torch.linalg.cholesky_ex(sigma, upper=True)
    if not failed and (upper.diagonal() ** 2 > 1e-8 * sigma.diagonal()).all():
        return upper
    values, vectors = torch.linalg.eigh(sigma)
    if values[0] < -1e-6 * values[-1].abs():                   # rounding gives tiny negative ones, which count as 0
        raise ValueError(f"a covariance has no negative eigenvalue such as {values[0]:.3g}")
    return (vectors * values.clamp(min=0).sqrt()).T            # (D, D)
