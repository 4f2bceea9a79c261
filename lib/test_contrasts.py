"""Statistics of contrasts, on made-up experiments whose truth is known."""
import math

import numpy as np
import pytest

from lib.contrasts import (Estimate, bootstrap_interval, contrast, holm, level_of, one_sample, residual_spread,
                           seeds_needed, spread_interval, student_cdf, student_quantile, verdict)


def made_up(draw, truths, seeds=4, between=0.05, within=0.012):
    """{arm: (seeds,)}: what a seed shares is far larger than what pairing leaves, as in trainings of one core."""
    shared = draw.normal(0, between, seeds)
    return {f"arm {k}": truth + shared + draw.normal(0, within, seeds) for k, truth in enumerate(truths)}


def test_students_distribution_agrees_with_tables():
    table = {(0.975, 1): 12.7062, (0.975, 2): 4.3027, (0.975, 3): 3.1824, (0.975, 9): 2.2622, (0.95, 4): 2.1318,
             (0.995, 30): 2.7500, (0.025, 7): -2.3646}         # Abramowitz and Stegun, table 26.10
    for (p, df), t in table.items():
        assert student_quantile(p, df) == pytest.approx(t, abs=2e-4)
        assert student_cdf(t, df) == pytest.approx(p, abs=2e-5)
    assert student_cdf(0, 5) == 0.5 and student_cdf(3, 4) == pytest.approx(1 - student_cdf(-3, 4))
    assert student_quantile(0.975, 10000) == pytest.approx(1.96, abs=1e-3)         # normal in the limit


def test_a_contrast_is_paired_and_pooled():
    table = {"a": [1.0, 2.0, 3.0], "b": [0.5, 1.5, 2.5], "c": [0.0, 1.2, 1.8]}
    same = contrast({name: table[name] for name in "ab"}, {"a": 1, "b": -1})
    assert same == Estimate(0.5, 0.0, 2, 3) and same.p == 0    # what seeds share drops out
    s, df = residual_spread(table)
    pooled = contrast(table, {"a": 1, "b": -1})
    assert df == 4 and pooled.error == pytest.approx(s * math.sqrt(2 / 3)) and pooled.mean == pytest.approx(0.5)
    double = contrast(table, {"a": 1, "b": -2, "c": 1})
    assert double.error == pytest.approx(s * math.sqrt(6 / 3))
    differences = np.subtract(table["a"], table["c"])          # of two arms: the paired t-test
    assert contrast({k: table[k] for k in "ac"}, {"a": 1, "c": -1}).error == pytest.approx(
        one_sample(differences).error)
    for wrong in (lambda: contrast(table, {"a": 1}), lambda: residual_spread({"a": [1, 2]}), lambda: one_sample([1])):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("arms, seeds", [(2, 4), (5, 4), (4, 3)])
def test_intervals_cover_the_truth_and_no_difference_is_rarely_called_one(arms, seeds):
    draw, truths = np.random.default_rng(arms), np.linspace(0, 0.1, arms)
    covered, called = [], []
    for _ in range(2000):
        estimate = contrast(made_up(draw, truths, seeds), {"arm 1": 1, "arm 0": -1})
        low, high = estimate.interval()
        covered.append(low <= truths[1] - truths[0] <= high)
        null = contrast(made_up(draw, [0] * arms, seeds), {"arm 1": 1, "arm 0": -1})
        called.append(verdict(null, null.p, 0.02)[0] == "confirmed")
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(called) <= 0.05


def test_the_mean_of_a_value_a_seed_is_covered_too():
    draw = np.random.default_rng(5)
    intervals = [one_sample(draw.normal(0.3, 0.1, 4)).interval() for _ in range(2000)]
    assert 0.93 <= np.mean([low <= 0.3 <= high for low, high in intervals]) <= 0.97


def test_holm_keeps_the_share_of_experiments_with_any_false_claim_at_5_percent():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])           # Holm's own kind of example
    assert holm([0.5]) == [0.5] and holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    draw, wrong, naive = np.random.default_rng(6), [], []
    for _ in range(2000):
        ps = [contrast(made_up(draw, [0, 0, 0]), {"arm 1": 1, "arm 0": -1}).p for _ in range(5)]
        wrong.append(min(holm(ps)) < 0.05)
        naive.append(min(ps) < 0.05)
    assert np.mean(wrong) <= 0.06 and np.mean(naive) > 0.15    # 5 % with the error of 2,000 draws; unadjusted 23 %


def test_verdicts_follow_the_rule():
    def said(mean, error=0.004, **how):
        estimate = Estimate(mean, error, 12, 4)
        return verdict(estimate, estimate.p, 0.02, **how)[0]
    assert said(0.05) == "confirmed" and said(-0.05) == "refuted" and said(-0.05, sensitive=False) == "refuted"
    assert said(0.001) == "not at this size" and said(0.001, sensitive=False) == "void"
    assert said(0.01, 0.02) == "undecided" and said(0.01, 0.02, sensitive=False) == "void"
    assert said(0.001, same=True) == "confirmed" and said(0.05, same=True) == "refuted"
    assert said(0.02, same=True) == "undecided" and said(0.001, same=True, sensitive=False) == "void"
    wide = Estimate(0.0, 0.02, 3, 4)
    assert 10 < seeds_needed(wide, 0.02) < 40                  # (1.7 * 0.04 / 0.02)^2 = 12 and a few
    assert verdict(wide, wide.p, 0.02)[1] == f"needs {seeds_needed(wide, 0.02)} seeds"


def test_equivalence_is_rarely_confirmed_at_the_margin():
    draw = np.random.default_rng(7)
    at_margin = [contrast(made_up(draw, [0, 0.02, 0]), {"arm 1": 1, "arm 0": -1}) for _ in range(2000)]
    assert np.mean([verdict(e, e.p, 0.02, same=True)[0] == "confirmed" for e in at_margin]) <= 0.06


def test_the_interval_of_a_spread_covers_it():
    draw = np.random.default_rng(8)
    intervals = [spread_interval(draw.normal(0, 0.03, 4))[1:] for _ in range(500)]
    assert 0.92 <= np.mean([low <= 0.03 <= high for low, high in intervals]) <= 0.98


def test_an_interval_over_captions_covers_what_another_exam_would_tell():
    """Two arms answer the same captions, some of which are hard for both: paired, these drop out."""
    draw, n, covered, paired, apart = np.random.default_rng(9), 200, [], [], []

    def interval(x):
        return bootstrap_interval(lambda rows: x[rows].mean(), n, draws=500)
    for k in range(400):
        hard = draw.normal(0.5, 0.3, n)                        # of each caption
        arms = [hard + better + draw.normal(0, 0.1, n) for better in (0.03, 0.0)]
        low, high = interval(arms[0] - arms[1])
        covered.append(low <= 0.03 <= high)
        if k < 20:
            paired.append(high - low)
            apart.append(math.hypot(*(high - low for low, high in map(interval, arms))))
    assert 0.93 <= np.mean(covered) <= 0.97
    assert 2.7 < np.mean(apart) / np.mean(paired) < 3.7        # sqrt(0.3^2 + 0.1^2) / 0.1 = 3.2
    assert interval(arms[0]) == interval(arms[0])              # the same every time



def test_two_looks_err_no_more_often_than_one():
    """Four seeds, and if these leave it undecided four more: without an adjustment the second look adds its errors."""
    draw, share = np.random.default_rng(10), {1: [], 2: []}
    for _ in range(2000):
        table = made_up(draw, [0, 0, 0], seeds=8, within=0.03)
        for looks in share:                                    # what is spent: the level of each look
            for seeds in (4, 8):
                estimate = contrast({arm: x[:seeds] for arm, x in table.items()}, {"arm 1": 1, "arm 0": -1})
                word, _ = verdict(estimate, min(1, looks * estimate.p), 0.02, looks=looks)
                if word != "undecided":
                    break
            share[looks].append(word in ("confirmed", "refuted"))
    assert np.mean(share[2]) <= 0.05 < 0.06 < np.mean(share[1])
    assert level_of(1) == 0.95 and level_of(2) == 0.975
    estimate = Estimate(0.01, 0.005, 12, 4)                    # 90 %: up to 0.0189; 95 %: up to 0.0209
    words = [verdict(estimate, 1.0, 0.02, looks=looks) for looks in (1, 2)]
    assert [word for word, _ in words] == ["not at this size", "undecided"] and "90 % interval" in words[0][1]
    assert seeds_needed(Estimate(0, 0.02, 3, 4), 0.02, looks=2) > seeds_needed(Estimate(0, 0.02, 3, 4), 0.02)
