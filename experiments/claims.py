"""
What papers on large models claim, tested on small ones: registered before it runs, repeated over seeds, with intervals.

    python -m experiments.claims                       the claims, minutes that are left, verdicts
    python -m experiments.claims frozen guidance       make the missing runs, measure, judge, draw
    python -m experiments.claims frozen --plan         runs, FLOPs and minutes, before anything is made
    python -m experiments.claims frozen --seeds 1-2    these seeds alone, beside another process with the others
    python -m experiments.claims frozen-long --extend  as many seeds again, once, where it is undecided and may be
    python -m experiments.claims --table               verdicts as Markdown
    python -m experiments.claims --config small        another recipe for all, on a GPU; in out/claims-small
    python -m experiments.claims --config small --plan --kind h200        its minutes on one that is not here

claims.txt holds the registered texts. OUT/CLAIM/registered.txt keeps each as it was when its first run began, and a
text that differs later is refused. OUT/ARM-sSEED is a run by train.py, shared by all claims; OUT/measures.jsonl what
was measured of it. Whatever is there is not made again, so the same command goes on after a stop; a run that is there
but was made with other settings is refused. Verdicts follow from lib/contrasts.py; no run is left out. Any key of
configs.txt is a flag, for all runs.
"""
import json
import os
import time

import torch

from experiments.claim_contrasts import CLAIMS, looks_in
from experiments.claim_measures import Measures, Planned, gflop_of_step, passes
from experiments.claim_runs import (ARMS, START, Lab, config_of, flags_of, gflop_of, missing_runs, rates,
                                    size_of, train, with_parents)
from experiments.trainings import HERE
from lib.contrasts import Estimate, holm, level_of, verdict
from lib.files import atomic_write
from lib.pictures import draw_seeds
from lib.plan import KINDS
from lib.processes import join
from lib.settings import Parser, UserError, closest, read_sections

SECONDS_JUDGED = 0.015                                         # of looking at a picture
MFU = 0.3                                                      # share of its peak that a GPU is thought to reach


# ---- registered texts ------------------------------------------------------------------------------------------------

def read_claims(file):
    """{name: {key: text}} of the registered claims, each with the rules of its round in it, and those common to all."""
    sections = read_sections(file)
    rules = {name: section for name, section in sections.items() if name.startswith("rules")}
    return {name: rules["rules"] | rules.get(f"rules {section.get('round', 1)}", {}) | section
            for name, section in sections.items() if name not in rules}


def register(lab, name, text):
    """Keep a claim's text from before its first run on; UserError where it is another one now."""
    file = os.path.join(lab.out, name, "registered.txt")
    words = "".join(f"{key} = {value}\n" for key, value in text.items())
    if lab.config != text.get("config", "claims"):
        words += f"config on the command line = {lab.config}\n"
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


# ---- a second look ---------------------------------------------------------------------------------------------------

def extension_file(lab, name):
    """Tells of a claim's one extension, with the verdict that it had before."""
    return os.path.join(lab.out, name, "extended.json")


def all_seeds(lab, name, text):
    """Those registered, and those of its extension if it has one."""
    seeds = seeds_of(text["seeds"])
    if os.path.exists(extension_file(lab, name)):
        with open(extension_file(lab, name)) as f:
            seeds = seeds + json.load(f)["seeds"]
    return seeds


def extend(lab, claims, name):
    """
    Allow a claim as many seeds again. Once, and only where it is undecided and its text says `looks = 2`: then each
    look is judged at half of the level, from the first one on, so that both together err no more often than one would.
    UserError otherwise.
    """
    text, seeds, file = claims[name], seeds_of(claims[name]["seeds"]), extension_file(lab, name)
    if looks_in(text) < 2:
        raise UserError(f"{name} was registered for one look, at the whole level: give what you now want to know a "
                        "section of its own, with seeds of its own")
    result = judged(lab, claims).get(name)
    if os.path.exists(file):
        if result and result["seeds"] == all_seeds(lab, name, text):
            raise UserError(f"{name} has had its one extension: its verdict stands, {result['verdict'][0]}")
        return                                                 # stopped on the way: goes on
    if not result:
        raise UserError(f"{name} has no verdict to extend: run it without --extend first")
    if result["verdict"][0] != "undecided":
        raise UserError(f"{name} is {result['verdict'][0]}: only what is undecided is extended; leave --extend out")
    more = list(range(seeds[-1] + 1, seeds[-1] + 1 + len(seeds)))
    about = {"seeds": more, "date": time.strftime("%Y-%m-%d"), "first look": result}
    atomic_write(file, lambda f: f.write(json.dumps(about, indent=1).encode()))


# ---- verdicts --------------------------------------------------------------------------------------------------------

def result_file(lab, name):
    """Figures of a claim whose seeds are all measured."""
    return os.path.join(lab.out, name, f"{name}.json")


def investigate(lab, name, text, seeds):
    """Train, measure and, where all seeds are there, write the claim's figures and draw them."""
    arms, everything = text["arms"].split(), all_seeds(lab, name, text)
    if others := sorted(set(seeds or ()) - set(everything)):
        raise UserError(f"--seeds: {name} has {everything}, not {others}, of which no verdict would know: give some of "
                        "its own, or leave this out")
    register(lab, name, text)
    for arm, seed in missing_runs(lab, arms, seeds or everything):
        train(lab, arm, seed)
    if missing_runs(lab, arms, everything):
        CLAIMS[name](lab, text, 2 * seeds)                     # to measure; twice, since one seed has no spread
        print(f"{name}: seeds {seeds} are done; the verdict waits for all of {everything}")
        return
    lab = lab._replace(measures=Measures(lab.measures.file))   # with what other processes have measured meanwhile
    found = CLAIMS[name](lab, text, everything)
    panels = found.pop("panels")
    with open(os.path.join(lab.out, name, "registered.txt")) as f:
        about = {"claim": name, "registered": f.read(), "seeds": everything, "date": time.strftime("%Y-%m-%d"),
                 "config": lab.config, "flags": lab.keys, "torch": torch.__version__,
                 "runs": {f"{arm}-s{seed}": flags_of(lab, arm, seed) for seed in everything
                          for arm in with_parents(arms)}}
    atomic_write(result_file(lab, name), lambda f: f.write(json.dumps(about | found, indent=1).encode()))
    draw_seeds(panels, os.path.join(lab.out, name, f"{name}.png"))


def is_tested(result, text):
    """Has this claim a part in Holm? Not a count, and not a claim that there is no difference."""
    return "primary" in result and text.get("same") != "True"


def own_p(result, text):
    """Of the primary contrast, for as many looks as its text allows; below 0 for all metrics that might lie there."""
    estimate = Estimate(*result["primary"])
    return min(1.0, estimate.p * looks_in(text) * (result.get("tests", 1) if estimate.mean < 0 else 1))


def judged(lab, claims):
    """{name: result with its verdict} of all claims that have one, adjusted for the others of their round (Holm)."""
    results, adjusted = {}, {}
    for name in claims:
        if os.path.exists(result_file(lab, name)):
            register(lab_for(lab, claims[name]), name, claims[name])               # the margin that decides is that one
            with open(result_file(lab, name)) as f:
                results[name] = json.load(f)
    # by chance alone one of many would be confirmed: the more claims a round has, the more each has to show
    for turn in {claims[name].get("round", "1") for name in results}:
        tested = [name for name, result in results.items() if claims[name].get("round", "1") == turn
                  and is_tested(result, claims[name])]
        adjusted |= zip(tested, holm([own_p(results[name], claims[name]) for name in tested]))
    for name, result in results.items():
        if "decided" in result:                                # by an exact count
            result["verdict"] = result["decided"], "counted, not sampled"
            continue
        estimate, text = Estimate(*result["primary"]), claims[name]
        p = adjusted.get(name, estimate.p)
        result["verdict"] = verdict(estimate, p, float(text["margin"]), text.get("same") == "True",
                                    result.get("sensitive", True), looks_in(text))
        result["p"], result["holm_p"] = estimate.p, p
    return results


# ---- what is told ----------------------------------------------------------------------------------------------------

def told(name, text, result):
    """What was found, its interval over seeds, and beside it that over captions."""
    words = result["here"]
    if result.get("captions"):
        low, high = result["captions"]
        words += f"; primary contrast over captions [{low:+.3f}, {high:+.3f}]"
    if "decided" in result:
        return words
    extended = f", extended from {text['seeds']}" if result["seeds"] != seeds_of(text["seeds"]) else ""
    looks = f", {100 * level_of(looks_in(text)):g} % as one of two looks" if looks_in(text) > 1 else ""
    return f"{words}; seeds {result['seeds'][0]}-{result['seeds'][-1]}{extended}{looks}"


def table(lab, claims):
    """Markdown, a row a claim that has a verdict, then what is secondary."""
    lines = ["| claim | the paper's figure | here, 95 % interval, seeds | verdict | command |", "|---" * 5 + "|"]
    more = []
    for name, result in judged(lab, claims).items():
        text, (word, why) = claims[name], result["verdict"]
        p = f"; p {result['holm_p']:.3f}" if is_tested(result, text) else ""
        lines.append(f"| {text['number']}: {text['title']} | {text['paper']} | {told(name, text, result)} | "
                     f"**{word}** ({why}{p}) | `{name}` |")
        more += ["", f"`{name}`, secondary:", *(f"- {label}: {words}" for label, words in result["figures"].items())]
    return "\n".join(lines + more) + "\n"


def listing(lab, claims):
    """A line a claim: what is missing and how long it would take, and the verdict."""
    results = judged(lab, claims)
    for name, text in claims.items():
        state = results[name]["verdict"][0] if name in results else "open"
        runs, measures, minutes = left(lab_for(lab, text), name, text, None, set(), None)
        words = f"{runs} runs, {measures} measures, {sum(minutes):.0f} min" if runs or measures else "nothing left"
        print(f"{name:14s} {state:16s} {words:32s} {text['title']}")


def left(lab, name, text, seeds, counted, kind):
    """
    (runs, measures, (minutes of runs, of measures)) that a claim still wants, but for those in the set `counted`, to
    which they are added.
    """
    seeds = seeds or all_seeds(lab, name, text)
    speed = {size: MFU * KINDS[kind][0] * 60 / 1e9 for size in ("small", "large")} if kind else rates(lab)
    runs = [run for run in missing_runs(lab, text["arms"].split(), seeds) if (lab.config, *run) not in counted]
    planned = Planned(lab.measures.file)
    CLAIMS[name](lab._replace(measures=planned), text, 2 * seeds if len(seeds) == 1 else seeds)
    wanted = {key: value for key, value in planned.wanted.items() if key not in counted}
    counted |= {(lab.config, *run) for run in runs} | wanted.keys()
    training = sum(START + gflop_of(lab, arm) / speed[size_of(arm)] for arm, _ in runs)
    measuring = sum(minutes_of(lab, key, file, speed) for key, file in wanted.values())
    return len(runs), len(wanted), (training, measuring)


def minutes_of(lab, key, file, speed):
    """Of one measure; those without weights, which are counts, take none worth telling."""
    if not file:
        return 0.0
    arm = os.path.relpath(file, lab.out).split(os.sep)[0].rpartition("-s")[0]
    config = config_of(lab, arm)
    forwards, looked = passes(key, config)
    return forwards * gflop_of_step(config, False, 1) / 3 / speed[size_of(arm)] + looked * SECONDS_JUDGED / 60


def plan(lab, claims, names, seeds, kind):
    """Runs and minutes that each of these claims still wants beside those above it, and the runs themselves."""
    counted, total = set(), [0.0, 0.0]
    for name in names:
        runs, measures, minutes = left(lab_for(lab, claims[name]), name, claims[name], seeds, counted, kind)
        total = [a + b for a, b in zip(total, minutes)]
        print(f"{name:14s} {runs:3d} runs {minutes[0]:6.1f} min, {measures:3d} measures {minutes[1]:6.1f} min")
    runs = [item for item in counted if isinstance(item, tuple)]
    gflop = 0.0                                                # ARMS tells their order
    for config, arm in sorted({(config, arm) for config, arm, _ in runs}, key=lambda run: list(ARMS).index(run[1])):
        wanted, here = sorted(seed for c, a, seed in runs if (c, a) == (config, arm)), lab._replace(config=config)
        gflop += len(wanted) * gflop_of(here, arm)
        print(f"    {config} {arm:3s} {ARMS[arm].stage:9s} seeds {wanted}  {flags_of(here, arm, 1)['steps']} steps  "
              f"{gflop_of(here, arm):.0f} GFLOP each")
    speed = f"at {MFU:.0%} of the peak of {kind}" if kind else "at the rate of the runs that are there"
    print(f"{len(runs)} runs, {gflop / 1000:.1f} TFLOP, {total[0]:.0f} min; measures {total[1]:.0f} min; {speed}")


# ---- the command -----------------------------------------------------------------------------------------------------

def lab_for(lab, text):
    """The lab with the recipe of a claim, unless the command line names one for all."""
    return lab if lab.config else lab._replace(config=text.get("config", "claims"))


def main():
    parser = Parser(__doc__)                                   # takes any key of configs.txt too, for all runs
    parser.add_argument("names", nargs="*", help="claims; none lists them")
    parser.add_argument("--config", help="a section of configs.txt for all runs, in place of that of each claim")
    parser.add_argument("--seeds", help="of the trainings, as in 1-2; default: those registered")
    parser.add_argument("--extend", action="store_true", help="as many seeds again for these, once, where undecided")
    parser.add_argument("--texts", default=os.path.join(HERE, "experiments", "claims.txt"), help="registered texts")
    parser.add_argument("--out", help="folder; default: out/claims, or out/claims-CONFIG with --config")
    parser.add_argument("--plan", action="store_true", help="tell what would be made, and make nothing:")
    parser.add_argument("--kind", help="    on a device of this kind: " + ", ".join(KINDS))
    parser.add_argument("--table", action="store_true", help="verdicts as Markdown")
    parser.add_argument("--json", metavar="FILE", help="write all figures and verdicts there")
    args, keys = parser.parse_keys()
    claims = read_claims(args.texts)
    if unknown := [name for name in args.names if name not in claims]:
        raise UserError(f"no claim {unknown[0]!r}: {closest(unknown[0], claims)}")
    if args.kind and (not args.plan or args.kind not in KINDS):
        raise UserError(f"--kind {args.kind}: it goes with --plan, and is one of {', '.join(KINDS)}")
    if args.extend and (args.plan or not args.names):
        raise UserError("--extend: name the claims whose seeds are to be doubled, and leave --plan out")
    out = args.out or "out/claims" + (f"-{args.config}" if args.config else "")
    os.makedirs(out, exist_ok=True)
    lab = Lab(out, args.config, dict(keys), Measures(os.path.join(out, "measures.jsonl")))
    seeds = seeds_of(args.seeds) if args.seeds else None
    if args.plan:
        plan(lab, claims, args.names or list(claims), seeds, args.kind)
        return
    join(600)
    for name in args.names:
        here = lab_for(lab, claims[name])
        if args.extend:
            extend(lab, claims, name)
        investigate(here, name, claims[name], seeds)
    if args.table:
        print(table(lab, claims))
    else:
        listing(lab, claims)
    if args.json:
        text = json.dumps(judged(lab, claims), indent=1)
        atomic_write(args.json, lambda f: f.write(text.encode()))


if __name__ == "__main__":
    main()
