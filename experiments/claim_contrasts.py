"""
What each claim compares, from measures of its runs: the functions that experiments.claims calls by a claim's name.

    found = CLAIMS["frozen"](lab, text, seeds)                 # text: the registered one, {key: words}

-> {"primary": Estimate whose claimed side is above 0, "captions": its interval over captions, "sensitive": was a known
difference seen?, "here": words, "figures": {label: words}, "panels": for draw_seeds}. In place of the first three
"decided": a verdict by an exact count. The interval over captions tells how much of the error is the exam's: it decides
nothing. Letters: n pictures, K seeds, M values on an axis, A arms.
"""
import math
import os
import re

import numpy as np

from experiments.claim_measures import EXAM_B, gflop_of_step, standardised, timed_saving, vertex
from experiments.claim_runs import config_of, file_of, flags_of, run_of, snapshots
from lib.contrasts import (ALPHA, bootstrap_interval, contrast, level_of, one_sample, residual_spread, spread_interval,
                           student_quantile)
from lib.metrics import fd, mmd
from lib.settings import load_config

DAMAGED = "F", "F+", "D"                                       # arms whose cores were in motion


# ---- what they share -------------------------------------------------------------------------------------------------

def weights_in(text):
    """{"D": 1, "Q": -1, "G": -1, "P": 1} of "D - Q - G + P"."""
    first, *words = re.split(r" ([+-]) ", text)
    return {first: 1} | {arm: 1 if sign == "+" else -1 for sign, arm in zip(words[::2], words[1::2], strict=True)}


def looks_in(text):
    """How often a claim may be looked at: twice where it may be extended."""
    return int(text.get("looks", "1"))


def said(estimate, digits=3, level=0.95):
    """As in +0.031 [+0.010, +0.052]: the mean with its 95 % interval."""
    low, high = estimate.interval(level)
    return f"{estimate.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def said_of(text, estimate, digits=3):
    """The same of a claim's primary contrast, at the level at which it is judged."""
    return said(estimate, digits, level_of(looks_in(text)))


def known(estimate):
    """Is a difference that must be there seen?"""
    return estimate.mean > 0 and estimate.p < ALPHA


def pictures(lab, text, arm, seed, guidance=None, **how):
    """What the exam's pictures of a run, or of "G@0.1", are worth."""
    at = float(text["guidance"]) if guidance is None else guidance
    return lab.measures.pictures(file_of(lab, arm, seed), int(text["n"]), at, **how)


def dsg(lab, text, arm, seeds, **how):
    """[mean over pictures] of each seed."""
    return [float(np.mean(pictures(lab, text, arm, seed, **how)["dsg"])) for seed in seeds]


def minus_log_loss(lab, text, arm, seeds):
    """[-log of the held-out loss] of each seed: more is better, and a difference is a ratio, at any level of loss."""
    return [-math.log(lab.measures.loss(file_of(lab, arm, seed), int(text["loss_n"]))) for seed in seeds]


def dsg_contrast(lab, text, words, seeds):
    """Estimate of such a contrast as "G - Q", error from these arms alone."""
    weights = weights_in(words)
    return contrast({arm: dsg(lab, text, arm, seeds) for arm in weights}, weights)


def over_captions(lab, text, weights, seeds):
    """Interval of a contrast of dsg over captions, each with its pictures by all arms and seeds."""
    each = sum(w * np.mean([pictures(lab, text, arm, seed)["dsg"] for seed in seeds], 0)
               for arm, w in weights.items())                                      # (n,)
    return bootstrap_interval(lambda rows: each[rows].mean(), len(each), draws=lab.measures.draws)


def by_arm(values, label, names, seeds):
    """A panel of {arm: (K,)}, a line a seed."""
    lines = {f"seed {seed}": (range(len(names)), [[values[arm][k] for arm in names]]) for k, seed in enumerate(seeds)}
    return {"title": "a line a seed", "x": "", "y": label, "names": names, "lines": lines}


# ---- the claims on [claims], and again on a longer recipe ------------------------------------------------------------

def spread(lab, text, seeds):
    """A/A: how far do trainings of one arm differ, and how far two noises of one training?"""
    table = {f"noise {noise}": dsg(lab, text, "G", seeds, noise=noise) for noise in (0, 1)}
    both = np.mean(list(table.values()), 0)                                        # (K,)
    s, low, high = spread_interval(both)
    noises, _ = residual_spread(table)
    scores = [pictures(lab, text, "G", seed)["dsg"] for seed in seeds]             # (K, n)
    one = float(np.std(scores, 1, ddof=1).mean())
    losses = [lab.measures.loss(run_of(lab, "G", seed), int(text["loss_n"])) for seed in seeds]
    df = len(seeds) - 1                                        # of a pair of arms; pooled over several it is less
    detectable = (student_quantile(0.975, df) + student_quantile(0.8, df)) * noises * math.sqrt(2 / len(seeds))
    return {"primary": contrast(table, weights_in(text["primary"])),
            "here": f"standard deviation over {len(seeds)} trainings, each the mean of two noises, {s:.3f} "
                    f"[{low:.3f}, {high:.3f}], between two noises of one {noises:.3f}; of a picture {one:.2f}",
            "figures": {"dsg of each training": ", ".join(f"{v:.3f}" for v in both),
                        "held-out loss, spread over its mean": f"{np.std(losses, ddof=1) / np.mean(losses):.3f}",
                        "difference that is seen four times in five, were noise the only error": f"{detectable:.3f}"},
            "panels": [{"title": "one arm, four trainings, two noises", "x": "seed", "y": "dsg",
                        "lines": {name: (seeds, [values]) for name, values in table.items()}}]}


def better_finetuned(lab, text, seeds):
    """F or F+: whichever has the lower held-out loss, over all seeds, on scenes that no score takes."""
    def loss(arm):
        return np.mean([lab.measures.loss(run_of(lab, arm, seed), int(text["loss_n"]), EXAM_B) for seed in seeds])
    return min(("F", "F+"), key=loss)


def frozen(lab, text, seeds):
    """Equal steps at large size: core frozen, finetuned, frozen and then not, or nothing pretrained."""
    arms, best = text["compared"].split(), better_finetuned(lab, text, seeds)
    run = {arm: best if arm == "F*" else arm for arm in arms}
    table = {arm: dsg(lab, text, run[arm], seeds) for arm in arms}
    loss = {arm: minus_log_loss(lab, text, run[arm], seeds) for arm in arms}
    weights, secondary = weights_in(text["primary"]), text["secondary"].split(", ")
    figures = {f"dsg, {words}": said(contrast(table, weights_in(words))) for words in secondary}
    figures |= {f"-log held-out loss, {words}": said(contrast(loss, weights_in(words)))
                for words in [text["primary"], *secondary]}
    figures["dsg by arm"] = ", ".join(f"{arm} {np.mean(table[arm]):.3f}" for arm in arms)
    figures["F* is"] = f"{best}; the other one's held-out loss on other scenes is higher"
    top = lab.measures.ceiling(config_of(lab, "G"), int(text["n"]))
    chance = float(np.mean([pictures(lab, text, run[arm], seed)["chance"] for arm in arms for seed in seeds]))
    levels = {"levels": {"chance": chance, "judge on real pictures": top}}
    primary = contrast(table, weights)
    return {"primary": primary, "sensitive": known(contrast(table, weights_in(text["known"]))),
            "captions": over_captions(lab, text, {run[arm]: w for arm, w in weights.items()}, seeds),
            "here": f"{text['primary']} {said_of(text, primary)} dsg", "figures": figures,
            "panels": [by_arm(table, "dsg", arms, seeds) | levels, by_arm(loss, "-log held-out loss", arms, seeds)]}


def forgetting(lab, text, seeds):
    """How much of the core is lost, in its old shell and in a new one; P's own core is 0, first weights are 1."""
    n, refit = int(text["loss_n"]), int(text["refit"])

    def losses(seed, file, steps):
        return lab.measures.damage(file, run_of(lab, "P", seed), n, seed, steps)

    def damage(seed, file, steps=0):
        own, first = losses(seed, os.path.join(run_of(lab, "P", seed), "last.pt"), steps), losses(seed, None, steps)
        return (losses(seed, file, steps) - own) / (first - own)
    lines, refitted = {}, {}
    for arm in DAMAGED:
        steps = list(snapshots(lab, arm, seeds[0]))
        lines[f"{arm}, old shell"] = steps, [[damage(seed, snapshots(lab, arm, seed)[step]) for step in steps]
                                             for seed in seeds]
    total = flags_of(lab, "F", seeds[0])["steps"]
    early = max(1, round(float(text["share"]) * total))
    best = better_finetuned(lab, text, seeds)
    for step in (early, total):
        refitted[step] = [damage(seed, snapshots(lab, best, seed)[step], refit) for seed in seeds]
    lines[f"{best}, new shell"] = list(refitted), np.transpose(list(refitted.values())).tolist()
    gap = [losses(seed, None, refit) - losses(seed, os.path.join(run_of(lab, "P", seed), "last.pt"), refit)
           for seed in seeds]
    primary, threshold = one_sample(refitted[early]), float(text["threshold"])
    figures = {f"{best} in a new shell, step {total}": said(one_sample(refitted[total]))}
    for label, (steps, values) in lines.items():
        if "old" in label:
            figures |= {f"{label}, step {step}": said(one_sample(np.array(values)[:, steps.index(step)]))
                        for step in (early, steps[-1]) if step in steps}
    return {"primary": primary.minus(threshold), "sensitive": known(one_sample(gap)),
            "here": f"at step {early} of {total} {said_of(text, primary)} of the core is lost ({best}, new shell)",
            "figures": figures,
            "panels": [{"title": "damage to the core: 0 is none, 1 first weights", "x": "steps of the stage",
                        "y": "damage", "lines": lines, "levels": {"frozen (G)": 0.0}, "settings": {"xscale": "log"}}]}


def curves_of(real, fakes, statistic):
    """[[distance to real features, (M,)] of each seed] for fakes [[features (n, D), M of them] of each seed]."""
    return [[statistic(*standardised(real, fake)) for fake in grid] for grid in fakes]


def guidance(lab, text, seeds):
    """Where each distance to real pictures is smallest, over guidance."""
    grid = [float(word) for word in text["grid"].split()]
    scale = np.log(grid)                                       # from 1 to 2 is as far as from 2 to 4
    places, curves, inside = {}, {}, {}                        # by (arm, statistic, features), log guidance each seed
    real = {arm: lab.measures.reference(config_of(lab, arm)) for arm in ("G", "P")}
    fakes = {(arm, features): [[np.array(pictures(lab, text, arm, seed, at)[features]) for at in grid]
                               for seed in seeds] for arm in real for features in ("judge", "random")}
    for arm, features in fakes:
        for statistic in (fd, mmd):
            key = arm, statistic.__name__, features
            curves[key] = curves_of(real[arm][features], fakes[arm, features], statistic)    # (K, M)
            found = [vertex(scale, values) for values in curves[key]]
            places[key], inside[key] = [place for place, _ in found], sum(ok for _, ok in found)

    def ordered(rows):
        """The primary contrast from these pictures alone."""
        means = []
        for statistic, features in ((mmd, "judge"), (fd, "random")):
            some = [[fake[rows] for fake in each] for each in fakes["G", features]]
            found = curves_of(real["G"][features], some, statistic)
            means.append(np.mean([vertex(scale, values)[0] for values in found]))
        return means[0] - means[1]
    main = one_sample(np.subtract(places["G", "mmd", "judge"], places["G", "fd", "random"]))
    optima = {key: math.exp(np.mean(values)) for key, values in places.items()}
    of = {key: np.array(values) for key, values in places.items()}
    effects = {
        "statistic, MMD - Frechet": [of["G", "mmd", f] - of["G", "fd", f] for f in ("judge", "random")],
        "features, judge - random": [of["G", s, "judge"] - of["G", s, "random"] for s in ("fd", "mmd")],
        "model, G - P": [of["G", s, f] - of["P", s, f] for s in ("fd", "mmd") for f in ("judge", "random")]}
    figures = {f"log g*, {label}": said(one_sample(np.mean(parts, 0)), 2) for label, parts in effects.items()}
    figures |= {f"optimum of {s} on {f}, {arm}": f"{optima[arm, s, f]:.2f}, inside the grid in {inside[arm, s, f]} of "
                f"{len(seeds)}" for arm, s, f in optima}
    apart = [math.log(fd(*standardised(real["G"]["random"], pictures(lab, text, arm, seed)["random"])))
             for seed in seeds for arm in ("Q", "G")]          # Q, G, Q, G ...
    lines = {f"{s} on {f}": (grid, [((c - np.min(c)) / np.ptp(c)).tolist() for c in curves["G", s, f]])
             for s in ("fd", "mmd") for f in ("judge", "random")}
    scores = [[float(np.mean(pictures(lab, text, "G", seed, at)["dsg"])) for at in grid] for seed in seeds]
    return {"primary": main, "sensitive": known(one_sample(np.subtract(apart[::2], apart[1::2]))),
            "captions": bootstrap_interval(ordered, int(text["n"]), draws=max(2, lab.measures.draws // 10)),
            "here": f"log g* of MMD on the judge's features - Frechet on random ones {said_of(text, main, 2)}, optima "
                    f"{optima['G', 'mmd', 'judge']:.2f} and {optima['G', 'fd', 'random']:.2f}", "figures": figures,
            "panels": [{"title": "distance to real pictures (G): lowest 0, highest 1", "x": "guidance", "y": "",
                        "lines": lines, "settings": {"xscale": "log"}},
                       {"title": "score, G", "x": "guidance", "y": "dsg", "lines": {"dsg": (grid, scores)},
                        "settings": {"xscale": "log"}}]}


def costs(lab, text, seeds):
    """Saving by merged keys, counted for whole steps and timed for a block; a frozen step over one that is not."""
    sizes = {256: "pixart-sigma", 512: "pixart-sigma-512", 1024: "pixart-sigma-1k", 2048: "pixart-sigma-2k",
             4096: "pixart-sigma-4k"}

    def counted(name):
        plain = load_config(name, "defrost", [])
        merged = plain | {"kv_merge": 2, "kv_merge_layers": "14-27"}
        return 1 - gflop_of_step(merged, False, 1) / gflop_of_step(plain, False, 1)
    saving = {side: lab.measures.once({"of": "saving", "config": name}, lambda: counted(name))
              for side, name in sizes.items()}
    sides = [int(word) for word in text["grid"].split()]
    timed = {side: lab.measures.once({"of": "time", "tokens": side ** 2, "repeats": int(text["repeats"])},
                                     lambda: timed_saving(side, int(text["repeats"]))) for side in sides}
    config = config_of(lab, "G")
    step = gflop_of_step(config, True, 1) / gflop_of_step(config, False, 1)
    low, high = (float(word) for word in text["between"].split())
    top = saving[4096]
    tokens = {side: (side // 16) ** 2 for side in sizes}       # of 2 x 2 latents of 8 x 8 px
    lines = {"counted, a step": (list(tokens.values()), [[saving[side] for side in sizes]]),
             "timed, a block": ([side ** 2 for side in sides], np.transpose([timed[side] for side in sides]).tolist()),
             "the poster's days": ([tokens[1024], tokens[2048], tokens[4096]], [[0.20, 0.30, 0.20]])}
    return {"decided": "confirmed" if low <= top <= high else "refuted",
            "here": f"{100 * top:.1f} % of a step's FLOPs at 4K (exact), {100 * saving[2048]:.1f} % at 2K, "
                    f"{100 * saving[1024]:.1f} % at 1K",
            "figures": {**{f"time of a merged block saved, {side} x {side} tokens": said(one_sample(timed[side]))
                           for side in sides},
                        f"FLOPs of a frozen step over a free one, {lab.config}": f"{step:.3f}"},
            "panels": [{"title": "saved by merging keys 2 x 2 in half of the blocks", "x": "tokens", "y": "share saved",
                        "lines": lines, "levels": {"claimed": 0.34}, "settings": {"xscale": "log"}}]}


# ---- further claims --------------------------------------------------------------------------------------------------

def compared(lab, text, seeds):
    """A contrast of arms in dsg, such as Dt - Gt - D + G."""
    arms, weights = text["compared"].split(), weights_in(text["primary"])
    tables = {"dsg": {arm: dsg(lab, text, arm, seeds) for arm in arms}}
    if text["loss_n"] != "0":                                  # 0: the arms' losses are of other levels of noise
        tables["-log held-out loss"] = {arm: minus_log_loss(lab, text, arm, seeds) for arm in arms}
    contrasts = [text["primary"], *filter(None, text.get("secondary", "").split(", "))]
    figures = {f"{label}, {words}": said(contrast(table, weights_in(words)))
               for label, table in tables.items() for words in contrasts[label == "dsg":]}     # of dsg: the others
    figures["dsg by arm"] = ", ".join(f"{arm} {np.mean(values):.3f}" for arm, values in tables["dsg"].items())
    primary = contrast(tables["dsg"], weights)
    return {"primary": primary, "captions": over_captions(lab, text, weights, seeds),
            "sensitive": known(dsg_contrast(lab, text, text["known"], seeds)),
            "here": f"{text['primary']} {said_of(text, primary)} dsg", "figures": figures,
            "panels": [by_arm(table, label, arms, seeds) for label, table in tables.items()]}


def larger(lab, text, seeds):
    """Slopes per doubling of the core's depth, of every metric; the claim is that all rise, so the weakest decides."""
    cores, grown = text["cores"].split(), text["compared"].split()                 # shallowest first
    margins = dict(zip(("dsg", "fd", "mmd", "loss at large size", "loss of the core"),
                       map(float, text["margins"].split()), strict=True))
    real, n = lab.measures.reference(config_of(lab, grown[0])), int(text["loss_n"])

    def distance(statistic, features, arm, seed):
        return statistic(*standardised(real[features], pictures(lab, text, arm, seed)[features]))
    found = {"dsg": {arm: dsg(lab, text, arm, seeds) for arm in grown},
             "fd": {arm: [-distance(fd, "random", arm, seed) for seed in seeds] for arm in grown},
             "mmd": {arm: [-distance(mmd, "judge", arm, seed) for seed in seeds] for arm in grown},
             "loss at large size": {arm: [-lab.measures.loss(run_of(lab, arm, s), n) for s in seeds] for arm in grown},
             "loss of the core": {arm: [-lab.measures.loss(run_of(lab, arm, s), n) for s in seeds] for arm in cores}}
    slopes = {}
    for name, table in found.items():                          # a distance and a loss: shares of their mean
        scale = 1 if name == "dsg" else abs(np.mean(list(table.values())))
        first, *_, last = table
        doublings = len(table) - 1
        slopes[name] = contrast({arm: np.divide(values, scale) for arm, values in table.items()},
                                {last: 1 / doublings, first: -1 / doublings})
    weakest = min(slopes, key=lambda name: slopes[name].t)     # of the least evidence: slopes have different units
    first, last = grown[0], grown[-1]
    weights = {last: 1 / (len(grown) - 1), first: -1 / (len(grown) - 1)}
    figures = {f"{name}, per doubling": said(slope) for name, slope in slopes.items()}
    figures["dsg by depth"] = ", ".join(f"{arm} {np.mean(found['dsg'][arm]):.3f}" for arm in grown)
    return {"primary": slopes[weakest].over(margins[weakest]), "tests": len(slopes),
            "captions": [x / margins["dsg"] for x in over_captions(lab, text, weights, seeds)]
            if weakest == "dsg" else None,
            "sensitive": known(dsg_contrast(lab, text, text["known"], seeds)),
            "here": f"the weakest of {len(slopes)} slopes per doubling is that of {weakest}: "
                    f"{said_of(text, slopes[weakest])}; of dsg {said_of(text, slopes['dsg'])}", "figures": figures,
            "panels": [by_arm(found[name], name if name == "dsg" else f"- {name}", list(found[name]), seeds)
                       for name in found]}


def passing(scale, scores, level):
    """The place on a rising scale (M,) at which scores (M,) first reach a level, between two of them; None: never."""
    for k, score in enumerate(scores):
        if score >= level:
            if k == 0:
                return scale[0]
            share = (level - scores[k - 1]) / (score - scores[k - 1])
            return scale[k - 1] + share * (scale[k] - scale[k - 1])
    return None


def ahead(scale, first, second):
    """
    By how much `first` is ahead on the scale: from where it has what `second` has at the end to where `second` first
    has that; if it never does, minus the same the other way round. Of two that never rise: 0.
    """
    level = second[-1]
    if passing(scale, first, level) is None:
        return -ahead(scale, second, first)
    return passing(scale, second, level) - passing(scale, first, level)


def rank_correlation(x, y):
    """Spearman's, of (M,) values without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(x)), np.argsort(np.argsort(y)))[0, 1])


def converging(lab, text, seeds):
    """How much sooner G has what S has at the end; and which metrics rank snapshots as dsg does."""
    shares = [float(word) for word in text["shares"].split()]
    scale, real = np.log2(shares), lab.measures.reference(config_of(lab, "G"))["random"]
    best = better_finetuned(lab, text, seeds)
    names = {arm: [f"{arm}@{share:g}" for share in shares] for arm in ("G", best, "S")}
    scores = {arm: np.transpose([dsg(lab, text, name, seeds) for name in names[arm]]) for arm in names}    # (K, M)
    earlier = {arm: one_sample([ahead(scale, a, b) for a, b in zip(scores[arm], scores["S"])]) for arm in ("G", best)}

    def ranks(metric):
        """Correlation with dsg over the last four snapshots, a mean over arms, of each seed."""
        return [np.mean([rank_correlation([metric(name, seed) for name in names[arm][-4:]], scores[arm][k][-4:])
                         for arm in names]) for k, seed in enumerate(seeds)]
    metrics = {"fd on random features": lambda name, seed:
               -fd(*standardised(real, pictures(lab, text, name, seed)["random"])),
               "held-out loss": lambda name, seed: -lab.measures.loss(file_of(lab, name, seed), int(text["loss_n"]))}
    figures = {f"doublings by which {best} is ahead of S": said(earlier[best], 2)}
    figures |= {f"rank correlation of {name} with dsg over four snapshots": said(one_sample(ranks(metric)), 2)
                for name, metric in metrics.items()}
    steps = [share * flags_of(lab, "G", seeds[0])["steps"] for share in shares]

    each = {arm: np.array([[pictures(lab, text, name, seed)["dsg"] for name in names[arm]] for seed in seeds])
            for arm in ("G", "S")}                             # (K, M, n)

    def resampled(rows):
        some = [each[arm][..., rows].mean(-1) for arm in ("G", "S")]               # (K, M)
        return np.mean([ahead(scale, a, b) for a, b in zip(*some)])
    return {"primary": earlier["G"], "sensitive": known(dsg_contrast(lab, text, text["known"], seeds)),
            "captions": bootstrap_interval(resampled, int(text["n"]), draws=lab.measures.draws),
            "here": f"G has what S has at the end {said_of(text, earlier['G'], 2)} doublings of the steps before it",
            "figures": figures,
            "panels": [{"title": "score of snapshots", "x": "steps at large size", "y": "dsg", "settings":
                        {"xscale": "log", "xticks": steps, "xticklabels": steps},
                        "lines": {arm: (steps, scores[arm].tolist()) for arm in names}}]}


def style(lab, text, seeds):
    """What tuning to a style leaves of the rest: scores without the token, and frames with it."""
    found = compared(lab, text, seeds)
    framed = {arm: [float(np.mean(pictures(lab, text, arm, seed, token=arm != "G")["framed"])) for seed in seeds]
              for arm in ("G", "Y", "Ya")}
    found["figures"] |= {f"share with a frame, {arm}": f"{np.mean(values):.3f}" for arm, values in framed.items()}
    found["sensitive"] = known(contrast(framed, weights_in(text["known"])))
    found["panels"].append(by_arm(framed, "share with a frame, token given", list(framed), seeds))
    return found


CLAIMS = {"spread": spread, "costs": costs, "frozen": frozen, "forgetting": forgetting, "guidance": guidance,
          "frozen-long": frozen, "guidance-long": guidance, "spread-long": spread, "style": style, "data": compared,
          "thaw": compared, "converging": converging, "larger": larger, "shift": compared}
