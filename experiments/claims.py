"""
What papers on large models claim, tested on small ones: registered before it runs, repeated over seeds, with intervals.

    python -m experiments.claims                       the claims, minutes that are left, verdicts
    python -m experiments.claims frozen guidance       make the missing runs, measure, judge, draw
    python -m experiments.claims frozen --plan         runs, FLOPs and minutes, before anything is made
    python -m experiments.claims frozen --seeds 1-2    these seeds alone, beside another process with the others
    python -m experiments.claims --table               verdicts as Markdown

claims.txt holds the registered texts. OUT/CLAIM/registered.txt keeps each as it was when its first run began, and a
text that differs later is refused. OUT/ARM-sSEED is a run by train.py, shared by all claims; OUT/measures.jsonl what
was measured of it. Whatever is there is not made again, so the same command goes on after a stop. Verdicts follow from
lib/contrasts.py; no run is left out. Any key of configs.txt is a flag, for all runs, as is --config.
"""
import json
import math
import os
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import torch

from experiments.claim_measures import (EXAM_B, Measures, ceiling, gflop_of_step, reference_features, standardised,
                                        timed_saving, vertex)
from lib.contrasts import (ALPHA, Estimate, contrast, holm, one_sample, residual_spread, spread_interval,
                           student_quantile, verdict)
from lib.files import atomic_write
from lib.metrics import fd, mmd
from lib.pictures import draw_seeds
from lib.processes import join
from lib.runs import is_finished
from lib.settings import Parser, UserError, closest, load_config, read_sections

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A run: its stage, the arm whose core (or all) it starts from, its share of the stage's steps, its own keys
Arm = namedtuple("Arm", "stage parent share keys")
SLOW = {"lr": 0.001, "muon_lr": 0.005}                         # a third of the rates at which all else trains
ARMS = {
    "P": Arm("pretrain", None, 1, {}),
    "G": Arm("grow", "P", 1, {}),                              # frozen
    "F": Arm("finetune", "P", 1, SLOW),
    "F+": Arm("finetune", "P", 1, {}),
    "S": Arm("scratch", None, 1, {}),
    "Q": Arm("grow", "P", 1 / 4, {}),
    "D": Arm("defrost", "Q", 3 / 4, SLOW),                     # freeze-unfreeze: as many steps as G with Q's
}
SNAPSHOTS = 0.01, 0.025, 0.05, 0.1, 0.25, 0.5                  # shares of a stage's steps after which weights are kept
DAMAGED = "F", "F+", "D"                                       # arms of which they are
GFLOP_PER_MINUTE = 1500                                        # until runs have told: one thread of a shared CPU
# where all lies; flags for all runs; what was measured
Lab = namedtuple("Lab", "out config keys measures")


# ---- registered texts ------------------------------------------------------------------------------------------------

def read_claims(file):
    """{name: {key: text}} of the registered claims, each with the common rules in it."""
    sections = read_sections(file)
    return {name: sections["rules"] | section for name, section in sections.items() if name != "rules"}


def register(lab, name, text):
    """Keep a claim's text from before its first run on; UserError where it is another one now."""
    file = os.path.join(lab.out, name, "registered.txt")
    words = "".join(f"{key} = {value}\n" for key, value in text.items())
    os.makedirs(os.path.dirname(file), exist_ok=True)
    if not os.path.exists(file):
        atomic_write(file, lambda f: f.write(words.encode()))
    with open(file) as f:
        if f.read() != words:
            raise UserError(f"the text of {name} is not the one registered in {file}: put that back, or give what you "
                            "now want to know a name of its own")


def seeds_of(text):
    """[1, 2, 3, 4] of "1-4"."""
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        raise UserError(f"--seeds {text}: give a seed or a range, such as 1-4")
    return list(range(int(first), int(last or first) + 1))


def weights_in(text):
    """{"G": 1, "F": -1} of "G - F"."""
    first, second = text.split(" - ")
    return {first: 1, second: -1}


# ---- runs ------------------------------------------------------------------------------------------------------------

def run_of(lab, arm, seed):
    """The run folder of an arm."""
    return os.path.join(lab.out, f"{arm}-s{seed}", lab.config, ARMS[arm].stage)


def flags_of(lab, arm, seed):
    """Keys of a run, {key: value}: the arm's, those of the command line, its steps and snapshots."""
    stage, _, share, own = ARMS[arm]
    steps = load_config(lab.config, stage, list(lab.keys.items()))["steps"]
    flags = {**own, **lab.keys, "steps": max(1, round(share * steps)), "seed": seed, "eval_n": 0, "num_checkpoints": 1}
    return flags | ({"snapshots": snapshot_steps(lab, arm)} if arm in DAMAGED else {})


def snapshot_steps(lab, arm):
    """Steps after which an arm's weights are kept; of D from its thaw on."""
    stage, _, share, _ = ARMS[arm]
    steps = load_config(lab.config, stage, list(lab.keys.items()))["steps"]
    return tuple(sorted({step for s in SNAPSHOTS if 0 < (step := round(s * steps)) < round(share * steps)})) or (0,)


def snapshots(lab, arm, seed):
    """{step: file} of the weights that an arm has kept, its last ones too."""
    run, last = run_of(lab, arm, seed), flags_of(lab, arm, seed)["steps"]
    kept = {step: os.path.join(run, f"step_{step}.pt") for step in snapshot_steps(lab, arm) if step}
    return kept | {last: os.path.join(run, "last.pt")}


def with_parents(arms):
    """The arms, each after the one that it starts from."""
    ordered = []
    for arm in arms:
        parent = ARMS[arm].parent
        ordered += with_parents([parent] if parent else []) + [arm]
    return list(dict.fromkeys(ordered))


def train(lab, arm, seed):
    """One run by train.py, unless it is finished; what it took is kept beside it."""
    if is_finished(run_of(lab, arm, seed)):
        return
    words = {**flags_of(lab, arm, seed), "config": lab.config, "stage": ARMS[arm].stage,
             "out": os.path.join(lab.out, f"{arm}-s{seed}")}
    if ARMS[arm].parent:
        words["core"] = run_of(lab, ARMS[arm].parent, seed)
    command = [sys.executable, os.path.join(HERE, "train.py"), *(f"--{key}={value}" for key, value in words.items())]
    start = time.time()
    if subprocess.run(command).returncode:
        raise UserError(f"{' '.join(command)} failed: mend what it says, and the same command goes on")
    minutes = json.dumps({"minutes": (time.time() - start) / 60, "gflop": gflop_of(lab, arm)})
    atomic_write(os.path.join(words["out"], "took.json"), lambda f: f.write(minutes.encode()))


def gflop_of(lab, arm):
    """Of a whole run."""
    words = [(key, str(value)) for key, value in flags_of(lab, arm, 1).items()]
    config = load_config(lab.config, ARMS[arm].stage, words)
    return config["steps"] * gflop_of_step(config, ARMS[arm].stage == "grow", config["batch"])


def missing_runs(lab, text, seeds):
    """[(arm, seed)] that a claim still wants."""
    arms = with_parents(text["arms"].split())
    return [(arm, seed) for seed in seeds for arm in arms if not is_finished(run_of(lab, arm, seed))]


def minutes_of(lab, runs):
    """What these runs would take, at the rate of those that are finished."""
    took = [json.load(open(file)) for arm in ARMS for seed in range(1, 9)
            if os.path.exists(file := os.path.join(lab.out, f"{arm}-s{seed}", "took.json"))]
    rate = sum(t["gflop"] for t in took) / sum(t["minutes"] for t in took) if took else GFLOP_PER_MINUTE
    gflop = {arm: gflop_of(lab, arm) for arm, _ in dict.fromkeys(runs)}
    return sum(gflop[arm] for arm, _ in runs), sum(gflop[arm] for arm, _ in runs) / rate


# ---- the claims: runs -> {"primary": Estimate, "here": words, "figures": {label: words}, "panels"} -------------------

def said(estimate, digits=3):
    """As in +0.031 [+0.010, +0.052]: the mean with its 95 % interval."""
    low, high = estimate.interval()
    return f"{estimate.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def known(estimate):
    """Is a difference that must be there seen?"""
    return estimate.mean > 0 and estimate.p < ALPHA


def pictures(lab, text, arm, seed, guidance=None, noise=0):
    """What the exam's pictures of a run are worth."""
    at = float(text["guidance"]) if guidance is None else guidance
    return lab.measures.pictures(run_of(lab, arm, seed), int(text["n"]), at, noise)


def dsg(lab, text, arm, seeds, noise=0):
    """[mean over pictures] of each seed."""
    return [float(np.mean(pictures(lab, text, arm, seed, noise=noise)["dsg"])) for seed in seeds]


def spread(lab, text, seeds):
    """A/A: how far do trainings of one arm differ, and how far two noises of one training?"""
    table = {f"noise {noise}": dsg(lab, text, "G", seeds, noise) for noise in (0, 1)}
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
    arms, n, best = text["compared"].split(), int(text["loss_n"]), better_finetuned(lab, text, seeds)
    run = {arm: best if arm == "F*" else arm for arm in arms}
    table = {arm: dsg(lab, text, run[arm], seeds) for arm in arms}
    loss = {arm: [-math.log(lab.measures.loss(run_of(lab, run[arm], seed), n)) for seed in seeds] for arm in arms}
    first, second = ([pictures(lab, text, run[arm], seed)["dsg"] for seed in seeds]
                     for arm in weights_in(text["primary"]))                       # (K, n) each
    differences = np.subtract(first, second).mean(0)                               # (n,)
    figures = {f"dsg, {words}": said(contrast(table, weights_in(words))) for words in text["secondary"].split(", ")}
    figures |= {f"-log held-out loss, {words}": said(contrast(loss, weights_in(words)))
                for words in [text["primary"], *text["secondary"].split(", ")]}
    figures["error of the primary by pictures alone"] = f"{differences.std(ddof=1) / math.sqrt(len(differences)):.3f}"
    figures["dsg by arm"] = ", ".join(f"{arm} {np.mean(table[arm]):.3f}" for arm in arms)
    figures["F* is"] = f"{best}; the other one's held-out loss on other scenes is higher"
    top = ceiling(load_config(lab.config, "grow", list(lab.keys.items())), int(text["n"]))
    chance = float(np.mean([pictures(lab, text, run[arm], seed)["chance"] for arm in arms for seed in seeds]))
    by_seed = {f"seed {seed}": (range(len(arms)), [[table[arm][k] for arm in arms]]) for k, seed in enumerate(seeds)}
    return {"primary": contrast(table, weights_in(text["primary"])),
            "sensitive": known(contrast(table, weights_in(text["known"]))),
            "here": f"{text['primary']} {said(contrast(table, weights_in(text['primary'])))} dsg", "figures": figures,
            "panels": [{"title": "score by stage, a line a seed", "x": "", "y": "dsg", "names": arms,
                        "lines": by_seed, "levels": {"chance": chance, "judge on real pictures": top}},
                       {"title": "held-out loss, a line a seed", "x": "", "y": "-log loss", "names": arms,
                        "lines": {f"seed {s}": (range(len(arms)), [[loss[arm][k] for arm in arms]])
                                  for k, s in enumerate(seeds)}}]}


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
    early = round(float(text["share"]) * total)
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
            "here": f"at step {early} of {total} {said(primary)} of the core is lost ({best}, new shell)",
            "figures": figures,
            "panels": [{"title": "damage to the core: 0 is none, 1 first weights", "x": "steps of the stage",
                        "y": "damage", "lines": lines, "levels": {"frozen (G)": 0.0}, "settings": {"xscale": "log"}}]}


def guidance(lab, text, seeds):
    """Where each distance to real pictures is smallest, over guidance."""
    grid = [float(word) for word in text["grid"].split()]
    scale = np.log(grid)
    places, curves, inside = {}, {}, {}                        # by (arm, statistic, features), log guidance each seed
    for arm, stage in (("G", "grow"), ("P", "pretrain")):
        reference = reference_features(load_config(lab.config, stage, list(lab.keys.items())))
        for statistic in (fd, mmd):
            for features in ("judge", "random"):
                key, real = (arm, statistic.__name__, features), reference[features]
                curves[key] = [[statistic(*standardised(real, pictures(lab, text, arm, seed, at)[features]))
                                for at in grid] for seed in seeds]                 # (K, M)
                found = [vertex(scale, curve) for curve in curves[key]]
                places[key], inside[key] = [place for place, _ in found], sum(ok for _, ok in found)
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
    reference = reference_features(load_config(lab.config, "grow", list(lab.keys.items())))["random"]
    apart = [math.log(fd(*standardised(reference, pictures(lab, text, arm, seed)["random"]))) for seed in seeds
             for arm in ("Q", "G")]                            # Q, G, Q, G ...
    lines = {f"{s} on {f}": (grid, [((c - np.min(c)) / np.ptp(c)).tolist() for c in curves["G", s, f]])
             for s in ("fd", "mmd") for f in ("judge", "random")}
    scores = [[float(np.mean(pictures(lab, text, "G", seed, at)["dsg"])) for at in grid] for seed in seeds]
    return {"primary": main, "sensitive": known(one_sample(np.subtract(apart[::2], apart[1::2]))),
            "here": f"log g* of MMD on the judge's features - Frechet on random ones {said(main, 2)}, optima "
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
    config = load_config(lab.config, "grow", list(lab.keys.items()))
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


CLAIMS = {"spread": spread, "costs": costs, "frozen": frozen, "forgetting": forgetting, "guidance": guidance}


# ---- verdicts --------------------------------------------------------------------------------------------------------

def result_file(lab, name):
    """Figures of a claim whose seeds are all measured."""
    return os.path.join(lab.out, name, f"{name}.json")


def investigate(lab, name, text, seeds):
    """Train, measure and, where all registered seeds are there, write the claim's figures and draw them."""
    register(lab, name, text)
    for arm, seed in missing_runs(lab, text, seeds):
        train(lab, arm, seed)
    everything = seeds_of(text["seeds"])
    if missing_runs(lab, text, everything):
        CLAIMS[name](lab, text, 2 * seeds)                     # to measure; twice, since one seed has no spread
        print(f"{name}: seeds {seeds} are done; the verdict waits for all of {text['seeds']}")
        return
    lab = lab._replace(measures=Measures(lab.measures.file))   # with what other processes have measured meanwhile
    found = CLAIMS[name](lab, text, everything)
    panels = found.pop("panels")
    with open(os.path.join(lab.out, name, "registered.txt")) as f:
        about = {"claim": name, "registered": f.read(), "seeds": everything, "date": time.strftime("%Y-%m-%d"),
                 "config": lab.config, "flags": lab.keys, "torch": torch.__version__,
                 "runs": {f"{arm}-s{seed}": flags_of(lab, arm, seed) for seed in everything
                          for arm in with_parents(text["arms"].split())}}
    atomic_write(result_file(lab, name), lambda f: f.write(json.dumps(about | found, indent=1).encode()))
    draw_seeds(panels, os.path.join(lab.out, name, f"{name}.png"))


def judged(lab, claims):
    """{name: result with its verdict} of all claims that have one, adjusted for each other (Holm)."""
    results = {}
    for name in claims:
        if os.path.exists(result_file(lab, name)):
            register(lab, name, claims[name])                  # the margin that decides is the one registered
            with open(result_file(lab, name)) as f:
                results[name] = json.load(f)
    tested = [name for name, result in results.items() if "primary" in result and claims[name].get("same") != "True"]
    adjusted = dict(zip(tested, holm([Estimate(*results[name]["primary"]).p for name in tested])))
    for name, result in results.items():
        if "decided" in result:                                # by an exact count
            result["verdict"] = result["decided"], "counted, not sampled"
            continue
        estimate, text = Estimate(*result["primary"]), claims[name]
        p = adjusted.get(name, estimate.p)
        result["verdict"] = verdict(estimate, p, float(text["margin"]), text.get("same") == "True",
                                    result.get("sensitive", True))
        result["p"], result["holm_p"] = estimate.p, p
    return results


def table(lab, claims):
    """Markdown, a row a claim that has a verdict, then what is secondary."""
    lines = ["| claim | the paper's figure | here, 95 % interval, seeds | verdict | command |", "|---" * 5 + "|"]
    more = []
    for name, result in judged(lab, claims).items():
        text, (word, why) = claims[name], result["verdict"]
        p = f"; p {result['holm_p']:.3f}" if "holm_p" in result and text.get("same") != "True" else ""
        seeds = f"; seeds {text['seeds']}" if text["arms"] else ""
        lines.append(f"| {text['number']}: {text['title']} | {text['paper']} | {result['here']}{seeds} | "
                     f"**{word}** ({why}{p}) | `{name}` |")
        more += ["", f"`{name}`, secondary:", *(f"- {label}: {words}" for label, words in result["figures"].items())]
    return "\n".join(lines + more) + "\n"


def listing(lab, claims):
    """A line a claim: minutes of the runs that are missing, and the verdict."""
    results = judged(lab, claims)
    for name, text in claims.items():
        runs = missing_runs(lab, text, seeds_of(text["seeds"]))
        state = results[name]["verdict"][0] if name in results else "open"
        left = f"{len(runs)} runs, {minutes_of(lab, runs)[1]:.0f} minutes left" if runs else "no run left"
        print(f"{name:12s} {state:16s} {left:28s} {text['title']}")


def plan(lab, claims, names, seeds):
    """Runs, FLOPs and minutes that these claims still want, each counted once."""
    runs = [run for name in names for run in missing_runs(lab, claims[name], seeds or seeds_of(claims[name]["seeds"]))]
    for arm in dict.fromkeys(arm for arm, _ in runs):
        wanted = sorted({seed for a, seed in runs if a == arm})
        print(f"{arm:3s} {ARMS[arm].stage:9s} seeds {wanted}  {flags_of(lab, arm, 1)['steps']} steps  "
              f"{gflop_of(lab, arm):.0f} GFLOP each")
    gflop, minutes = minutes_of(lab, list(dict.fromkeys(runs)))
    print(f"{len(dict.fromkeys(runs))} runs, {gflop / 1000:.1f} TFLOP, about {minutes:.0f} minutes; scores not counted")


def main():
    parser = Parser(__doc__)                                   # takes any key of configs.txt too, for all runs
    parser.add_argument("names", nargs="*", help="claims; none lists them")
    parser.add_argument("--config", default="claims", help="a section of configs.txt")
    parser.add_argument("--seeds", help="of the trainings, as in 1-2; default: those registered")
    parser.add_argument("--texts", default=os.path.join(HERE, "experiments", "claims.txt"), help="registered texts")
    parser.add_argument("--out", default="out/claims", help="folder")
    parser.add_argument("--plan", action="store_true", help="tell what would be made, and make nothing")
    parser.add_argument("--table", action="store_true", help="verdicts as Markdown")
    parser.add_argument("--json", metavar="FILE", help="write all figures and verdicts there")
    args, keys = parser.parse_keys()
    claims = read_claims(args.texts)
    if unknown := [name for name in args.names if name not in claims]:
        raise UserError(f"no claim {unknown[0]!r}: {closest(unknown[0], claims)}")
    os.makedirs(args.out, exist_ok=True)
    lab = Lab(args.out, args.config, dict(keys), Measures(os.path.join(args.out, "measures.jsonl")))
    seeds = seeds_of(args.seeds) if args.seeds else None
    if args.plan:
        plan(lab, claims, args.names or list(claims), seeds)
        return
    join(600)
    for name in args.names:
        investigate(lab, name, claims[name], seeds or seeds_of(claims[name]["seeds"]))
    if args.table:
        print(table(lab, claims))
    else:
        listing(lab, claims)
    if args.json:
        text = json.dumps(judged(lab, claims), indent=1)
        atomic_write(args.json, lambda f: f.write(text.encode()))


if __name__ == "__main__":
    main()
