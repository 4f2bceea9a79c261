"""Metrics on cases with known answers, against exact arithmetic, and against the packages that people know."""
import importlib
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import metrics, pairs


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fd(x, y):
    return metrics.frechet_distance(*metrics.feature_stats(x), *metrics.feature_stats(y))


def exact_fd(x, y):
    """From the data, not the covariances: the nuclear norm of A B^T, with A, B the centred data over sqrt(n - 1)."""
    a, b = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (x, y))
    spread = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + spread)


def test_feature_stats_are_those_of_numpy_also_far_from_zero():
    x = normal(5000, 7)
    mu, sigma = metrics.feature_stats(x.float())
    np.testing.assert_allclose(sigma.numpy(), np.cov(x.float().double().numpy().T), rtol=1e-12)
    far = metrics.feature_stats(x + 1e6)[1]
    assert (far - metrics.feature_stats(x)[1]).abs().max() < 1e-9
    assert metrics.feature_stats(x[:, :1])[1].shape == (1, 1) and mu.dtype == torch.float64


def test_frechet_distance_on_cases_with_known_answers():
    x = normal(4000, 8)
    assert fd(x, x) == pytest.approx(0, abs=1e-9) and fd(x, x + 2) == pytest.approx(32)
    assert fd(x, 3 * x) == pytest.approx(float(2 ** 2 * torch.cov(x.T).trace() + (2 * x.mean(0)).square().sum()))
    s1, s2 = torch.tensor([1., 4, 0]), torch.tensor([9., 0, 0])  # diagonal: sum of (sqrt s1 - sqrt s2)^2
    assert metrics.frechet_distance(torch.zeros(3), s1.diag(), torch.ones(3), s2.diag()) == pytest.approx(3 + 4 + 4)


@pytest.mark.parametrize("n, m, width, rank", [
    (300, 200, 40, 40), (12, 200, 40, 40), (12, 9, 40, 40), (300, 200, 40, 5), (2, 3, 64, 64), (30, 30, 1, 1)])
def test_frechet_distance_is_exact_for_few_rows_and_low_rank(n, m, width, rank):
    mix = normal(rank, width, seed=1)
    x, y = normal(n, rank, seed=2) @ mix, 1.5 * normal(m, rank, seed=3) @ mix + 0.3
    scale = x.var(0).sum() + y.var(0).sum()
    assert abs(fd(x, y) - exact_fd(x, y)) < 1e-8 * scale and abs(fd(x, x)) < 1e-8 * scale


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e10, 1e12])  # of the covariance; Cholesky serves up to 1e11
def test_both_factors_of_a_covariance_give_one_distance(condition, monkeypatch):
    mix = torch.linalg.qr(normal(30, 30, seed=1)).Q * torch.logspace(0, -0.5 * math.log10(condition), 30).double()
    x, y = normal(500, 30, seed=2) @ mix.T, 1.5 * normal(400, 30, seed=3) @ mix.T + 0.3
    sigma, quick = metrics.feature_stats(x)[1], fd(x, y)
    factor = pairs.factor(sigma)
    assert (factor.tril(-1) == 0).all() == (condition < 1e11)  # triangular: Cholesky's
    assert torch.allclose(factor.T @ factor, sigma, atol=1e-14, rtol=1e-12)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda sigma, upper: (sigma, 1))
    assert quick == pytest.approx(fd(x, y), rel=1e-9) == pytest.approx(exact_fd(x, y), rel=1e-9)


def test_frechet_distance_agrees_with_sixty_digits():
    mpmath = pytest.importorskip("mpmath")
    x, y = normal(5, 8, seed=4), 2 * normal(6, 8, seed=5)
    with mpmath.workdps(60):
        def stats(f):
            rows = mpmath.matrix(f.tolist())
            mu = [sum(rows[i, j] for i in range(rows.rows)) / rows.rows for j in range(rows.cols)]
            a = mpmath.matrix(rows.rows, rows.cols)
            for i in range(rows.rows):
                for j in range(rows.cols):
                    a[i, j] = (rows[i, j] - mu[j]) / mpmath.sqrt(rows.rows - 1)
            return mu, a
        (m1, a), (m2, b) = stats(x), stats(y)
        cross = sum(mpmath.svd_r(a * b.T, compute_uv=False))
        trace = sum(v ** 2 for v in a) + sum(v ** 2 for v in b)
        exact = sum((p - q) ** 2 for p, q in zip(m1, m2)) + trace - 2 * cross
    assert abs(fd(x, y) - exact) < 1e-8 * trace


def test_kid_is_unbiased_and_averages_to_the_full_estimate():
    x, y = normal(60, 6), normal(50, 6, seed=1) + 0.2
    kernel = lambda a, b: (a @ b.T / 6 + 1) ** 3
    off = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))
    full = float(off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean())
    assert metrics.mmd(x, y) == pytest.approx(full, rel=1e-10) and metrics.mmd(x, x) < 0
    mean, std = metrics.kid(x, y, 2000, 30)
    assert abs(mean - full) < 4 * std / 2000 ** 0.5
    once, again, other = (metrics.kid(x, y, 5, 20, seed=seed) for seed in (3, 3, 4))
    assert once == again != other
    assert metrics.kid(x[:50], y, 1, 50) == (pytest.approx(metrics.mmd(x[:50], y)), 0)


def test_cmmd_is_the_biased_estimate_and_survives_tiny_differences():
    x, y = F.normalize(normal(300, 16), dim=1), F.normalize(normal(200, 16, seed=1) + 0.5, dim=1)
    kernel = lambda a, b: torch.exp(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / 200).mean()
    exact = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert metrics.cmmd(x, y) == pytest.approx(float(exact), rel=1e-9)
    assert metrics.cmmd(x, x) == 0 and metrics.cmmd(x, x + 1e-6) > 0
    a, b = torch.tensor([[1., 0]]), torch.tensor([[0., 1]])                        # one pair at distance sqrt(2)
    assert metrics.cmmd(a, b) == pytest.approx(2000 * (1 - np.exp(-0.01)), rel=1e-12)


def test_precision_and_recall_on_a_line_and_their_order():
    real, fake = torch.tensor([[0.], [1], [2], [10]]), torch.tensor([[3.], [0.5], [30], [31]])
    # k = 1: real balls reach 1, 1, 1, 8: they hold 3 (from 2 and 10) and 0.5;
    # fake balls reach 2.5, 2.5, 1, 1: 1, 2, 0 are held
    assert metrics.precision_recall(real, fake, k=1) == (0.5, 0.75)
    # these balls are open: 3 lies on the surface of the ball round 2, but inside that round 10
    assert metrics.prdc(real, fake, k=1) == {"precision": 0.5, "recall": 0.75, "density": 3 / 4, "coverage": 3 / 4}
    near, wide = 0.1 * normal(50, 3), normal(80, 3)
    precision, recall = metrics.precision_recall(wide, near)
    assert precision == 1 and recall < 0.3                     # real is wide: samples are good but not diverse


def test_prdc_of_equal_sets_and_of_the_published_example():
    x = normal(100, 5)
    assert metrics.prdc(x, x) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    assert pairs.balls(x, x, 5, closed=True)[0].sum() == 600      # closed balls also hold the k-th neighbour
    figures = metrics.prdc(normal(2000, 1000), normal(2000, 1000, seed=1))
    assert 0.5 < figures["precision"] < 0.65                   # 2,000 rows give 0.59, 0.58; 10,000 see below
    assert 0.5 < figures["recall"] < 0.65 and 0.7 < figures["density"] < 1.4 and figures["coverage"] > 0.95


def test_prdc_by_its_definition():
    real, fake, k = normal(40, 3), normal(50, 3, seed=1) + 0.5, 5
    d = torch.cdist(real, fake)
    reach, reach_fake = (torch.cdist(f, f).sort(1).values[:, k] for f in (real, fake))
    in_real = d < reach[:, None]
    assert metrics.prdc(real, fake) == pytest.approx({
        "precision": float(in_real.any(0).double().mean()),
        "recall": float((d < reach_fake).any(1).double().mean()),
        "density": float(in_real.sum(0).double().mean() / k),
        "coverage": float((d.min(1).values < reach).double().mean())})


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 pytest test_all.py")
def test_prdc_gives_the_published_figures():
    """Two sets of 10,000 from N(0, I) in 1000 dimensions, k = 5 (README of prdc)."""
    told = metrics.prdc(normal(10000, 1000), normal(10000, 1000, seed=1))
    assert told == {"precision": pytest.approx(0.477, abs=0.015), "recall": pytest.approx(0.471, abs=0.015),
                    "density": pytest.approx(1.056, abs=0.1), "coverage": pytest.approx(0.974, abs=0.01)}


def test_blocks_do_not_change_a_result(monkeypatch):
    x, y = normal(90, 5), normal(70, 5, seed=1) + 0.1
    every = lambda: (fd(x, y), metrics.mmd(x, y), metrics.cmmd(x, y), *metrics.precision_recall(x, y),
                     *metrics.prdc(x, y).values())
    whole = every()
    for module in (metrics, pairs):
        monkeypatch.setattr(module, "BLOCK", 4)
    assert every() == pytest.approx(whole, rel=1e-9)


def test_rank_correlation_is_that_of_ranks_and_shares_them_among_equals():
    x = np.array([0.1, 5.0, 2.0, 3.0])
    assert metrics.rank_correlation(x, np.exp(x)) == pytest.approx(1)              # any rising function
    assert metrics.rank_correlation(x, -x) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert metrics.rank_correlation([0, 1, 1, 2], [10, 20, 30, 40]) == pytest.approx(0.9 ** 0.5)
    assert np.isnan(metrics.rank_correlation([1, 1, 1], [1, 2, 3])) and np.isnan(metrics.rank_correlation([], []))


def test_clip_score_is_a_hundred_times_the_mean_cosine():
    a, b = torch.tensor([[3., 0], [0, 2]]), torch.tensor([[1., 0], [0, -5]])
    assert metrics.clip_score(a, b) == pytest.approx(0, abs=1e-12)
    assert metrics.clip_score(a, a) == pytest.approx(100)
    assert metrics.clip_score(a[1:], b[1:]) == pytest.approx(-100)              # not clamped


def test_inception_score_from_one_to_the_number_of_classes():
    assert metrics.inception_score(torch.zeros(40, 10)) == (pytest.approx(1), pytest.approx(0))
    sure = 1e4 * torch.eye(10).repeat(4, 1)                    # certain and evenly spread: log(p) would be -inf
    assert metrics.inception_score(sure, splits=4) == (pytest.approx(10), pytest.approx(0, abs=1e-9))
    p = normal(103, 6).softmax(1)
    parts = [p[i * 103 // 10:(i + 1) * 103 // 10] for i in range(10)]              # 103 rows: no row is dropped
    scores = [float((q * (q / q.mean(0)).log()).sum(1).mean().exp()) for q in parts]
    assert metrics.inception_score(p.log()) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))


BAD = {"nan": lambda x: x.index_fill(0, torch.tensor([3]), float("nan")), "inf": lambda x: x / 0,
       "no rows": lambda x: x[:0], "one axis": lambda x: x[0], "three axes": lambda x: x[None],
       "another width": lambda x: x[:, :1], "no tensor": lambda x: x.numpy()}
TWO_SETS = {"mmd": metrics.mmd, "kid": lambda x, y: metrics.kid(x, y, 2, 5), "cmmd": metrics.cmmd,
            "pr": metrics.precision_recall, "prdc": metrics.prdc, "clip": metrics.clip_score, "fd": fd}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("metric", TWO_SETS)
def test_bad_features_are_refused(kind, metric):
    x = normal(12, 6)
    for pair in ((x, BAD[kind](x)), (BAD[kind](x), x)):
        with pytest.raises(ValueError):
            TWO_SETS[metric](*pair)


def test_other_bad_inputs_are_refused():
    x, e = normal(12, 6), metrics
    mu, sigma = e.feature_stats(x)
    spoilt = [(mu, sigma[:5]), (mu[:5], sigma), (mu, -sigma), (mu, sigma + sigma.triu(1)), (mu, float("nan") * sigma)]
    for function, *arguments in [
            (e.feature_stats, x[:1]), (e.mmd, x[:1], x), (e.clip_score, x, x[:1]), (e.clip_score, x, 0 * x),
            (e.kid, x, x), (e.kid, x, x, 2, 1), (e.precision_recall, x[:3], x), (e.prdc, x, x[:5]), (e.prdc, x, x, 0),
            (e.inception_score, x[:9]), (e.inception_score, x, 0),
            *((e.frechet_distance, *pair, mu, sigma) for pair in spoilt)]:
        with pytest.raises(ValueError):
            function(*arguments)


# ---- the same figures as the packages that people know ---------------------------------------------------------------
# Skipped where a package is not installed: the closed forms above stand without them.

def public(name):
    """A package of somebody else, or a skip: an optional package may also be installed but broken."""
    try:
        return importlib.import_module(name)
    except Exception as e:
        pytest.skip(f"{name}: {e}")


def pairs_of_sets():
    """Features far from the origin and of unequal scales, as networks give them."""
    mix = normal(12, 12, seed=9)
    return normal(400, 12) @ mix + 3, 1.2 * normal(300, 12, seed=1) @ mix + 3.4


@pytest.mark.parametrize("module, name", [
    ("pytorch_fid.fid_score", "calculate_frechet_distance"), ("cleanfid.fid", "frechet_distance"),
    ("torch_fidelity.metric_fid", "fid_statistics_to_metric"), ("torchmetrics.image.fid", "_compute_fid")])
@pytest.mark.filterwarnings("ignore")                          # scipy's, about an argument of sqrtm
def test_frechet_distance_is_that_of(module, name):
    other, (x, y) = getattr(public(module), name), pairs_of_sets()
    stats = *metrics.feature_stats(x), *metrics.feature_stats(y)
    if "fidelity" in module:
        of = lambda f: public(module).fid_features_to_statistics(f)
        told = next(iter(other(of(x), of(y), False).values()))
    else:
        told = float(other(*(stats if "torchmetrics" in module else [s.numpy() for s in stats])))
    assert metrics.frechet_distance(*stats) == pytest.approx(told, rel=1e-9)


def test_root_of_the_product_is_that_of_scipy():
    linalg, (x, y) = public("scipy.linalg"), pairs_of_sets()
    (m1, s1), (m2, s2) = metrics.feature_stats(x), metrics.feature_stats(y)
    root = linalg.sqrtm((s1 @ s2).numpy())
    theirs = float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * np.trace(root).real
    assert metrics.frechet_distance(m1, s1, m2, s2) == pytest.approx(theirs, rel=1e-9)


def test_kid_precision_recall_and_inception_score_are_those_of_torch_fidelity():
    (x, y), logits = pairs_of_sets(), 3 * normal(103, 7)
    theirs = public("torch_fidelity.metric_kid").kid_features_to_metric(
        x, y, kid_subsets=7, kid_subset_size=100, rng_seed=5, verbose=False)
    assert metrics.kid(x, y, 7, 100, seed=5) == pytest.approx(tuple(theirs.values()), rel=1e-9)
    theirs = public("torch_fidelity.metric_prc").prc_features_to_metric(y, x, verbose=False)     # generated first
    figures = theirs["precision"], theirs["recall"]            # averages of float32
    assert metrics.precision_recall(x, y) == pytest.approx(figures, rel=1e-6)
    theirs = public("torch_fidelity.metric_isc").isc_features_to_metric(logits, shuffle=False)
    assert metrics.inception_score(logits) == pytest.approx(tuple(theirs.values()), rel=1e-12)


def test_mmd_and_kid_are_those_of_torchmetrics_and_clean_fid():
    x, y = pairs_of_sets()
    x = x[:300]                                                # both take sets of one size
    assert metrics.mmd(x, y) == pytest.approx(float(public("torchmetrics.image.kid").poly_mmd(x, y)), rel=1e-9)
    np.random.seed(0)                                          # all rows in each subset, so the draws do not matter
    told = public("cleanfid.fid").kernel_distance(x.numpy(), y.numpy(), num_subsets=2, max_subset_size=300)
    assert metrics.kid(x, y, 2, 300)[0] == pytest.approx(told, rel=1e-9)


@pytest.mark.parametrize("k", [1, 5])
def test_prdc_is_that_of_the_package(k, capsys):
    x, y = pairs_of_sets()
    assert metrics.prdc(x, y, k) == pytest.approx(public("prdc").compute_prdc(x.numpy(), y.numpy(), k), rel=1e-12)
