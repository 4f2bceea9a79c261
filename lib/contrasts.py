"""
Contrasts between the arms of an experiment that is repeated over seeds, and what may be said of them.

    table = {"new": [.81, .79, .84, .80], "old": [.76, .77, .79, .74], ...}        # arm -> a value of each seed
    estimate = contrast(table, {"new": 1, "old": -1})          # paired by seed, error pooled over all arms
    estimate.interval(0.95), estimate.p                        # Student's t
    holm([a.p, b.p])                                           # adjusted for several looks
    verdict(estimate, estimate.p, margin=0.02)                 # confirmed, refuted, not at this size, undecided, void
    bootstrap_interval(lambda rows: d[rows].mean(), len(d))    # of captions, for d (n,) of a caption each

The unit is a seed: whatever is measured within one counts once. A arms, K seeds. An experiment that may be looked at
twice, again with more seeds if undecided, spends half of the level on each look. Student's distribution is its finite
series, exact for whole degrees of freedom, so that scipy is not required.
"""
import functools
import math
from typing import NamedTuple

import numpy as np

ALPHA = 0.05                                                   # of all primary contrasts together


# ---- Student's t -----------------------------------------------------------------------------------------------------

def student_cdf(t, df):
    """P(T <= t) for a whole df >= 1 (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    cos2, odd = math.cos(angle) ** 2, df % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, df, 2):                            # 1, 3 ...; of odd df 2, 4 ...
        total, term = total + term, term * cos2 * k / (k + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total   # P(|T| <= |t|)
    return 0.5 + inside / 2


@functools.lru_cache(1024)
def student_quantile(p, df):
    """The t below which a share p in (0, 1) lies, by bisection."""
    low, high = -1e6, 1e6                                      # enough for df = 1 and p = 1e-6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


# ---- estimates -------------------------------------------------------------------------------------------------------

class Estimate(NamedTuple):
    """A mean over seeds, its standard error and the degrees of freedom of that error; `seeds` are how many."""
    mean: float
    error: float
    df: int
    seeds: int

    def interval(self, level=0.95):
        """(low, high): holds the truth in so large a share of experiments."""
        half = student_quantile(0.5 + level / 2, self.df) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self):
        """Two-sided probability of so large a mean where the truth is 0. Without any spread: 0, or 1 of a mean of 0."""
        if self.error == 0:
            return float(self.mean == 0)
        return 2 * (1 - student_cdf(abs(self.t), self.df))

    @property
    def t(self):
        """The mean in standard errors."""
        return self.mean / self.error if self.error else math.copysign(math.inf, self.mean)

    def minus(self, value):
        """The same, as a distance from `value`."""
        return self._replace(mean=self.mean - value)

    def over(self, value):
        """The same in units of `value`, above 0."""
        return self._replace(mean=self.mean / value, error=self.error / value)


def residual_spread(table):
    """
    (s, df) of {arm: (K,)}: the root mean square of what is left without the means of arms and seeds, df = (A - 1)
    (K - 1): spread of a single value, after pairing. ValueError for fewer than two arms or seeds.
    """
    x = np.array(list(table.values()), float)                  # (A, K)
    if x.ndim != 2 or min(x.shape) < 2:
        raise ValueError(f"{len(table)} arms of {[len(v) for v in table.values()]} seeds: take at least 2 of each, "
                         "as many of all arms")
    rest = x - x.mean(0) - x.mean(1, keepdims=True) + x.mean() # (A, K)
    df = (x.shape[0] - 1) * (x.shape[1] - 1)
    return math.sqrt((rest ** 2).sum() / df), df


def contrast(table, weights):
    """
    Estimate of sum_a weights[a] * arm a, whose weights add up to 0, so that what seeds share drops out; error from the
    residuals of all arms of the table: of two arms s sqrt(2 / K).
    """
    if abs(sum(weights.values())) > 1e-9:
        raise ValueError(f"weights {weights} add up to {sum(weights.values())}: a contrast wants 0")
    s, df = residual_spread(table)
    seeds = len(next(iter(table.values())))
    mean = sum(w * np.mean(table[arm]) for arm, w in weights.items())
    return Estimate(float(mean), s * math.sqrt(sum(w * w for w in weights.values()) / seeds), df, seeds)


def one_sample(values):
    """Estimate of the mean of a value of each seed, (K,), by their own spread, df = K - 1."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} seeds: a spread needs at least 2")
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1,
                    len(values))


def spread_interval(values, level=0.95, draws=20000):
    """
    (s, low, high): standard deviation of (K,) normal values with its interval by chi-square, whose quantiles are those
    of `draws` sums of squares from a fixed generator.
    """
    df, s = len(values) - 1, float(np.std(values, ddof=1))
    squares = (np.random.default_rng(0).standard_normal((draws, df)) ** 2).sum(1)
    low, high = np.quantile(squares, [0.5 - level / 2, 0.5 + level / 2])
    return s, s * math.sqrt(df / high), s * math.sqrt(df / low)


@functools.lru_cache(4)
def resamples(n, draws):
    """(draws, n): numbers of n things drawn from n with replacement, always the same ones."""
    return np.random.default_rng(0).integers(0, n, (draws, n))


def bootstrap_interval(statistic, n, level=0.95, draws=1000):
    """
    (low, high): percentiles of statistic(rows), a number, over `draws` resamples of n things, rows (n,) their numbers
    (Efron and Tibshirani 1993, ch. 13). What has one number is drawn together: a caption's pictures by all arms and
    seeds. It tells what another exam would change, not what other trainings would.
    """
    values = [statistic(rows) for rows in resamples(n, draws)]
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


# ---- what may be said ------------------------------------------------------------------------------------------------

def holm(ps):
    """Probabilities adjusted for being the smallest, second smallest ... of several (Holm 1979), in the given order."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, k in enumerate(sorted(range(len(ps)), key=lambda k: ps[k])):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[k]))                 # never below the one before it
        adjusted[k] = highest
    return adjusted


def level_of(looks):
    """Of intervals and tests of an experiment that may be looked at so often: both looks together err at ALPHA."""
    return 1 - ALPHA / looks


def seeds_needed(estimate, margin, most=1000, looks=1):
    """The least number of seeds above today's at which a truth of 0 would lie within +- margin, by the spread seen."""
    each = estimate.error * math.sqrt(estimate.seeds)          # what a seed adds to the error
    for seeds in range(estimate.seeds + 1, most):
        df = estimate.df * (seeds - 1) // (estimate.seeds - 1)
        if student_quantile(level_of(looks), df) * each / math.sqrt(seeds) <= margin:
            return seeds
    return most


def verdict(estimate, p, margin, same=False, sensitive=True, looks=1):
    """
    (word, why) of an estimate whose claimed side is above 0; p is its own, adjusted for other claims and for `looks`.
    With `same` the claim is that there is no difference: within +- margin. `sensitive`: these very runs showed a
    difference that is known to be there; without that, none that is missing counts as absent.
    """
    level = 1 - 2 * ALPHA / looks                              # two one-sided tests, at 5 % where there is one look
    (low, high), interval = estimate.interval(level), f"the {100 * level:g} % interval"
    within, outside = -margin <= low and high <= margin, low > margin or high < -margin
    if same:
        if within and sensitive:
            return "confirmed", f"{interval} lies within the margin"
        if outside:
            return "refuted", f"{interval} lies outside the margin"
    elif p < ALPHA:
        return ("confirmed", "above 0") if estimate.mean > 0 else ("refuted", "below 0")
    if not sensitive:
        return "void", "the same runs do not show a difference that is known to be there"
    if within:
        return "not at this size", f"absent: {interval} lies within the margin"
    return "undecided", f"needs {seeds_needed(estimate, margin, looks=looks)} seeds"
