"""
Does a finished model take up new conditions while its core's blocks stay frozen? Numbers that the judge of scenes can
check are asked for and compared with what it sees ("flexible control over synthesis properties without requiring
extensive re-training", as the paper of the visual foundation model has it).

    python -m experiments.conditions                   three seeds: trains what is missing, scores it, prints the table
    python -m experiments.conditions --seeds 0 --n 40  a look at one

BASES/SEED/toy/grow is a finished model, OUT/SEED/toy/condition the same with the conditions; OUT/SEED/before-*.json and
OUT/SEED/after-*.json are what was measured of the two. What is there is not made again, so the same command goes on
after a stop. OUT/table.md is the table; OUT/pictures.png has one check a row, and asks for more from left to right,
from the same noise.

What is asked is possible: the number of another picture that has the same caption. A caption says small or large, and
sizes lie 5 % about two means, so a number that contradicts a caption was never seen; hence the null caption, and
captions that lack these words (which no training has seen either). Beside each correlation stands that of the finished
model, which is told nothing: what the caption alone explains.
"""
import functools
import os
import re

import numpy as np

from data import open_data
from eval import evaluate
from experiments.trainings import mean_and_spread, once, train
from lib.conditions import condition_names, read_conditions
from lib.files import atomic_write, file_hash
from lib.judge import look
from lib.metrics import rank_correlation
from lib.pictures import contact_sheet, to_uint8, write_png
from lib.processes import join
from lib.runs import is_finished
from lib.scenes import measure_objects
from lib.settings import Parser, UserError, parse_numbers
from model import load, read_checkpoint
from sample import sample

CAPTIONS = {"no caption": lambda caption: "",                  # what is said of a scene's caption
            "no words of size": lambda caption: re.sub(" (small|large)", "", caption),
            "whole caption": lambda caption: caption}
CHECKS = [("size", "no caption"), ("size", "no words of size"), ("size", "whole caption"), ("objects", "no caption"),
          ("x", "whole caption"), ("x", "no caption")]         # (condition, what of the caption is said)


def train_both(base, stage, folder, seed, keys):
    """The finished model, if it is missing, and the run that takes up the conditions: by train.py, which goes on."""
    path = os.path.join(base, "toy", stage)
    if not is_finished(path):
        train(base, stage, seed, {key: value for key, value in keys.items() if key != "conditions"}, sample_every=0)
    config = read_checkpoint(path)["config"]
    shape = {key: config[key] for key in ("shell", "resolution", "inner_resolution")}
    train(folder, "condition", seed, keys, core=path, sample_every=0, **shape)


def asked_numbers(world, name, n):
    """(n,): of another picture that has the caption of scene i, the number called `name`."""
    return [float(measure_objects(world.another(i, 0)["objects"])[name]) for i in range(n)]


def judged_numbers(images, world, name):
    """(n,): what the judge sees in (n, H, W, 3) uint8, NaN where it sees no object."""
    seen = [look(image, world.cycles).objects for image in images]
    return [float(measure_objects(objects)[name]) if objects else np.nan for objects in seen]


def correlation(model, config, name, said, n, told):
    """
    {"rank": rank correlation of asked and judged numbers, "error": median distance, "seen": share of pictures in which
    the judge sees an object} over n pictures; without `told` the model is asked for nothing.
    """
    world = open_data(config).held_out()
    asked = asked_numbers(world, name, n)
    captions = [CAPTIONS[said](world.caption(i)) for i in range(n)]
    images = to_uint8(sample(model, config, captions, numbers={name: asked} if told else {}))
    judged = np.array(judged_numbers(images, world, name))
    there = ~np.isnan(judged)
    # of ranks: it asks whether more is drawn where more is asked for, whatever the scale; "error" tells how far off
    return {"rank": rank_correlation(np.array(asked)[there], judged[there]), "seen": float(there.mean()),
            "error": float(np.median(abs(judged - asked)[there]))}


def measure(path, files, checks, n, told, sampling):
    """
    dsg and fidelity of a run that is told nothing, and all correlations, {job: figures}; each from a file, whose name
    begins with `files`, if that was made of these weights.
    """
    about = {"weights": file_hash(os.path.join(path, "last.pt")), "n": n, "told": told, **sampling}
    model, config = load(path)
    config |= sampling
    jobs = {f"{name}, {said}": lambda name=name, said=said: correlation(model, config, name, said, n, told)
            for name, said in checks}
    # told nothing, before and after: what learning the conditions has cost
    jobs["exam"] = lambda: evaluate(model, config, 2 * n, metrics=("questions", "fidelity"))

    def work(job):
        print(f"{path}: {job}", flush=True)
        return jobs[job]()
    return {job: once(f"{files}-{job.replace(', ', '-').replace(' ', '-')}.json", about, functools.partial(work, job))
            for job in jobs}


def table(before, after, checks):
    """Markdown, a row for each check and two for the exam; before and after: [results] of the seeds."""
    lines = ["| condition | said | rank correlation, told | not told | median error |", "|---|---|---|---|---|"]
    for name, said in checks:
        job = f"{name}, {said}"
        rank, alone, error = ([r[job][key] for r in results] for results, key in
                              ((after, "rank"), (before, "rank"), (after, "error")))
        lines.append(f"| {name} | {said} | {mean_and_spread(rank, 2)} | {mean_and_spread(alone, 2)} | "
                     f"{mean_and_spread(error, 3)} |")
    lines += ["", "| no number told | dsg | fidelity, dB |", "|---|---|---|"]
    for who, results in (("before", before), ("after", after)):
        lines.append(f"| {who} | {mean_and_spread([r['exam']['questions']['dsg'] for r in results], 3)} | "
                     f"{mean_and_spread([r['exam']['fidelity']['psnr'] for r in results], 1)} |")
    changes = [b["exam"]["questions"]["dsg"] - a["exam"]["questions"]["dsg"] for a, b in zip(before, after)]
    return "\n".join([*lines, "", f"dsg changes by {mean_and_spread(changes, 3)}."]) + "\n"


def draw(path, checks, file, columns=8, number=0):
    """A check a row: one caption and one noise, and the number from the least to the largest that was seen."""
    model, config = load(path)
    world, images, titles = open_data(config).held_out(), [], []
    ranges = {c.name: (c.low, c.high) for c in read_conditions(config)}
    for name, said in checks:
        asked = np.linspace(*ranges[name], columns).tolist()
        caption = CAPTIONS[said](world.caption(number))
        for value in asked:                                    # one at a time: all start from noise 0
            images += list(to_uint8(sample(model, config, [caption], numbers={name: value})))
        titles += [f"{name}={value:.3g}, {said}" for value in asked]
    write_png(file, contact_sheet(images, titles, columns, most=128))


def main():
    parser = Parser(__doc__)                                   # takes any key of configs.txt too, for the trainings
    parser.add_argument("--seeds", default="0,1,2", help="of the trainings")
    parser.add_argument("--n", type=int, default=100, help="pictures for a correlation; twice as many for dsg")
    parser.add_argument("--out", default="out/conditions", help="folder")
    parser.add_argument("--bases", help="folder with SEED/toy/grow, such as out/few of experiments.few_steps")
    parser.add_argument("--of", default="grow", help="the finished model's stage: grow, or pretrain for the core")
    args, keys = parser.parse_keys()
    keys = {"conditions": "objects,size,x"} | dict(keys)
    names = condition_names(keys)
    checks = [check for check in CHECKS if check[0] in names]
    if args.n < 2 or not checks:
        raise UserError(f"--n {args.n} --conditions {keys['conditions']}: take at least 2, and some of "
                        f"{', '.join(sorted({name for name, _ in CHECKS}))}")
    join(600)
    before, after, seeds = [], [], [int(seed) for seed in parse_numbers(args.seeds, "--seeds")]
    for seed in seeds:
        base, folder = os.path.join(args.bases or args.out, str(seed)), os.path.join(args.out, str(seed))
        train_both(base, args.of, folder, seed, keys)
        runs = os.path.join(base, "toy", args.of), os.path.join(folder, "toy", "condition")
        config = read_checkpoint(runs[1])["config"]            # both draw as the second: it counts for most
        sampling = {key: config[key] for key in ("sampler", "sample_steps", "guidance", "guidance_end")}
        before.append(measure(runs[0], os.path.join(folder, "before"), checks, args.n, False, sampling))
        after.append(measure(runs[1], os.path.join(folder, "after"), checks, args.n, True, sampling))
    draw(os.path.join(args.out, str(seeds[0]), "toy", "condition"), checks, os.path.join(args.out, "pictures.png"))
    text = table(before, after, checks)
    atomic_write(os.path.join(args.out, "table.md"), lambda f: f.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()
