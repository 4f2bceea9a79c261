"""
How good is a run: does the picture show what the caption says, and do the pictures look like the data?

    python eval.py out/toy/grow --n 500 --guidance 2,3,4      questions, Frechet distance and MMD, for each guidance
    python eval.py out/toy/grow --json scores.json            the same for other programs

On `scenes` a judge without learned weights looks at each generated picture (nearest colour, connected components, best
matching shape) and answers the caption's questions. Beside each score stands its chance level: the same pictures judged
against other captions. The Frechet distance here is taken on the features of a fixed random network. It is named
fd_random, compares only runs of this repository at equal n, and is not FID.
"""
import argparse
import functools
import itertools
import json
import os
import platform

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import COLOURS, CONTRAST, GROUNDS, SHAPES, Scenes, UserError, describe, distance, open_data, texture_wave, to_tensor, to_uint8
from model import load, read_checkpoint
from sample import sample

# ---------------------------------------------------------------------------------------------------------------
# The judge: picture -> objects


def components(mask):
    """(H, W) bool -> (H, W) int: 4-connected pixels share a number, 0 is outside. Each number spreads to its neighbours until none changes."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        p = np.pad(label, 1)
        spread = np.max([p[1:-1, 1:-1], p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]], 0) * mask
        if (spread == label).all():
            return label
        label = spread


def neighbourhood(mask):
    """(5, H, W): the mask and its four shifts. all(0) erodes by a pixel, any(0) dilates."""
    p = np.pad(mask, 1)
    return np.stack([mask, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]])


@functools.lru_cache(20000)
def template(shape, area, x0, y0, side):
    """(side, side) cover of a perfect shape with this area (pixels) and centre of mass (pixels)."""
    diameter = np.sqrt(area / SHAPES[shape])
    x, y = np.meshgrid(np.arange(side) + 0.5 - x0, np.arange(side) + 0.5 - y0)
    lower = diameter / 6 if shape == "triangle" else 0         # its mass lies below the middle of its box
    return np.clip(0.5 - distance(shape, x, y + lower, diameter / 2), 0, 1)


def look(image, cycles, least_fit=0.75):
    """
    What the judge sees in (H, W, 3) uint8: (ground, objects). An object is a connected region of non-ground colours of at
    least 0.5 % of the picture. Its shape is the one whose template of equal area and centre overlaps it best (intersection
    over union of soft cover); under `least_fit` it is a "blob", which answers no question about shapes.
    """
    image, side = image / 255.0, len(image)
    border = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), 0)
    ground = min(GROUNDS, key=lambda g: np.square(border - GROUNDS[g]).sum())
    back, palette = np.array(GROUNDS[ground]), np.array(list(COLOURS.values()))
    to_colour = np.square(image[:, :, None] - palette).sum(-1).min(-1)             # (H, W), to the nearest colour
    label = components(to_colour < np.square(image - back).sum(-1))
    objects = [describe_region(image, label == k, back, palette, cycles, least_fit)
               for k, size in zip(*np.unique(label[label > 0], return_counts=True)) if size >= side * side / 200]
    return ground, objects


def describe_region(image, region, back, palette, cycles, least_fit):
    """One region of `look` -> dict: shape, colour, texture, diameter (share of the side), centre (x, y in [0, 1]), fit."""
    side, around = len(image), neighbourhood(region)
    inner = around.all(0) if around.all(0).any() else region
    mean = image[inner].mean(0)                                                    # (3,)
    toward = (mean - back) / np.square(mean - back).sum()
    cover = np.where(inner, 1, np.clip((image - back) @ toward, 0, 1) * around.any(0))   # (H, W): edge pixels count in part
    area, (y, x) = cover.sum(), np.mgrid[:side, :side] + 0.5
    x0, y0 = (cover * x).sum() / area, (cover * y).sum() / area
    fits = {}
    for shape in SHAPES:
        ideal = template(shape, round(area, 1), round(x0, 1), round(y0, 1), side)
        fits[shape] = np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum()
    shape = max(fits, key=fits.get)
    light = (image - mean).mean(-1) * inner                                        # what the texture adds
    strength = {"plain": CONTRAST / 2}                                             # a texture counts from half its contrast on
    for texture in ("striped", "dotted"):
        wave = texture_wave(texture, side, cycles) * inner
        strength[texture] = (light * wave).sum() / max(np.square(wave).sum(), 1e-9)
    return dict(shape=shape if fits[shape] >= least_fit else "blob", colour=list(COLOURS)[np.square(palette - mean).sum(1).argmin()],
                texture=max(strength, key=strength.get), diameter=np.sqrt(area / SHAPES[shape]) / side,
                centre=(x0 / side, y0 / side), fit=fits[shape])


# ---------------------------------------------------------------------------------------------------------------
# The questions: caption and objects -> answers


def matches(group, thing, middle):
    """Does this object have the group's shape, size, colour, texture? Four booleans. `middle` parts small from large."""
    size = "small" if thing["diameter"] < middle else "large"
    return [thing["shape"] == group["shape"], size == group["size"], thing["colour"] == group["colour"],
            thing["texture"] == group["texture"]]


def answers(scene, ground, objects, middle):
    """
    The caption's questions and the judge's answers: a list of (category, parents, 0 or 1), parents being places in the list.
    Each group of the caption is answered by an object of its own, the assignment that answers most: shape first.
    """
    groups, axis = scene["groups"], 1 if scene["relation"] == "above" else 0
    in_order = lambda one, two: one["centre"][axis] < two["centre"][axis]
    def worth(chosen):
        found = [m for g, o in zip(groups, chosen) if o for m in [matches(g, o, middle)]]
        related = len(chosen) == 2 and all(chosen) and in_order(*chosen)
        return sum(m[0] for m in found), sum(map(sum, found)) + related
    chosen = max(itertools.permutations(objects + [None] * len(groups), len(groups)), key=worth)
    asked, entities = [("global", (), ground == scene["ground"])], []
    for group, thing in zip(groups, chosen):
        shape, size, colour, texture = matches(group, thing, middle) if thing else [False] * 4
        entities.append(len(asked))
        asked.append(("entities", (), shape))
        asked += [("attributes", (entities[-1],), a) for a in [size, colour] + [texture] * (group["texture"] != "plain")]
        if group["count"] > 1:
            same = sum(o["shape"] == group["shape"] and o["colour"] == group["colour"] for o in objects)
            asked.append(("counts", (entities[-1],), same == group["count"]))
    if len(groups) == 2:
        asked.append(("relations", tuple(entities), all(chosen) and in_order(*chosen)))
    return [(category, parents, int(answer)) for category, parents, answer in asked]


def questions_score(scenes, seen, middle):
    """
    {"entities", "attributes", "relations", "counts", "global": share of questions right, "dsg": mean over captions of each
    caption's share}. A question is right only if its parents' own answers are yes too: one level (DSG, Cho et al. 2024).
    """
    by_category, by_caption = {}, []
    for scene, (ground, objects) in zip(scenes, seen):
        asked = answers(scene, ground, objects, middle)
        right = [answer and all(asked[p][2] for p in parents) for _, parents, answer in asked]
        for (category, _, _), r in zip(asked, right):
            by_category.setdefault(category, []).append(r)
        by_caption.append(np.mean(right))
    order = ("entities", "attributes", "relations", "counts", "global")
    return {c: float(np.mean(by_category.get(c, [np.nan]))) for c in order} | {"dsg": float(np.mean(by_caption))}


def judge(world, scenes, images):
    """questions_score of (n, H, W, 3) uint8 images for their scenes, with chance_dsg: the same images, each with another caption."""
    middle = sum(world.diameters.values()) / 2
    seen = [look(image, world.cycles) for image in images]
    score = questions_score(scenes, seen, middle)
    return score | {"chance_dsg": questions_score(scenes[1:] + scenes[:1], seen, middle)["dsg"]}


# ---------------------------------------------------------------------------------------------------------------
# Distribution metrics, in float64


def random_features(images, seed=0):
    """
    (n, H, W, 3) uint8 -> (n, 64) float64 from a fixed random network: three 3x3 convolutions of stride 2 with ReLU, weights
    normal(0, 2 / fan_in) from `seed`, then mean and spread of 32 channels over space. Sees colour, edges, layout statistics.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    layers = [torch.randn(o, i, 3, 3, generator=generator) * (2 / (9 * i)) ** 0.5 for i, o in ((3, 16), (16, 32), (32, 32))]
    for chunk in to_tensor(images).split(256):
        for layer in layers:
            chunk = F.relu(F.conv2d(chunk, layer, stride=2, padding=1))            # (B, c, H/2, W/2)
        rows.append(torch.cat([chunk.mean((2, 3)), chunk.std((2, 3))], 1))
    return torch.cat(rows).double()


def frechet_distance(x, y):
    """
    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^1/2) between Gaussians fitted to features (n, D) (Dowson and Landau 1982). The
    last trace is the sum of singular values of S_x^1/2 S_y^1/2, which needs no root of a matrix that is not symmetric.
    """
    def root(s):
        values, vectors = torch.linalg.eigh(s)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T
    (mx, sx), (my, sy) = ((f.mean(0), torch.cov(f.T)) for f in (x.double(), y.double()))
    cross = torch.linalg.svdvals(root(sx) @ root(sy)).sum()
    return float((mx - my).square().sum() + sx.trace() + sy.trace() - 2 * cross)


def mmd(x, y):
    """Unbiased squared maximum mean discrepancy with the cubic kernel (x.y / D + 1)^3 of KID (Binkowski et al. 2018)."""
    x, y = x.double(), y.double()
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    inner = lambda a: (kernel(a, a).sum() - kernel(a, a).diagonal().sum()) / (len(a) * (len(a) - 1))
    return float(inner(x) + inner(y) - 2 * kernel(x, y).mean())


# ---------------------------------------------------------------------------------------------------------------
# Evaluating a run

HELD_OUT = 2 ** 31                                             # added to the seed: scenes that training never draws


def evaluate(model, config, n, guidance=None, steps=None, sampler=None, seed=0, metrics=("questions", "fd", "mmd"), bar=True):
    """{metric: value} of n images for n held-out captions, against n other real images."""
    if config["data"] != "scenes":
        world, captions = open_data(config), None
        captions = [world.caption(i % len(world)) for i in range(n)]
    else:
        world = Scenes(config, seed=config["seed"] + HELD_OUT)
        scenes = [world.scene(i) for i in range(n)]
        captions = [describe(s) for s in scenes]
    images = to_uint8(sample(model, config, captions, seed, 0, steps, guidance, sampler, bar=bar))
    result = {}
    if "questions" in metrics and config["data"] == "scenes":
        result["questions"] = judge(world, scenes, images)
    if "fd" in metrics or "mmd" in metrics:
        real = np.stack([world.image((n + i) % len(world), config["resolution"]) for i in tqdm(range(n), "real images", leave=False, disable=None)])
        real, fake = random_features(real), random_features(images)
        result |= {"fd_random": frechet_distance(real, fake)} if "fd" in metrics else {}
        result |= {"mmd_random": mmd(real, fake)} if "mmd" in metrics else {}
    return result


def report(result):
    """One metric result as a line for people."""
    q = result.get("questions")
    parts = [f"dsg {q['dsg']:.3f} (chance {q['chance_dsg']:.3f})"] if q else []
    parts += [f"{k} {q[k]:.3f}" for k in ("entities", "attributes", "relations", "counts", "global")] if q else []
    return "  ".join(parts + [f"{k} {result[k]:.4f}" for k in ("fd_random", "mmd_random") if k in result])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, such as out/toy/grow")
    parser.add_argument("--n", type=int, default=1000, help="images")
    parser.add_argument("--metrics", default="questions,fd,mmd")
    parser.add_argument("--guidance", help="one value or several, such as 1,2,4; default: the run's own")
    parser.add_argument("--sampler", help="default: the run's own")
    parser.add_argument("--steps", type=int, help="default: the run's own")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with seeds 0 to k-1 and tell mean and spread")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    if args.n < 2 or args.seeds < 1 or (args.steps or 1) < 1:
        raise UserError(f"--n {args.n} --seeds {args.seeds} --steps {args.steps}: give n of at least 2, seeds and steps of at least 1")
    metrics = args.metrics.split(",")
    if not set(metrics) <= {"questions", "fd", "mmd"}:
        raise UserError(f"--metrics {args.metrics}: take some of questions,fd,mmd")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state, (model, config) = read_checkpoint(args.run), load(args.run, device)
    args.steps, args.sampler = args.steps or config["sample_steps"], args.sampler or config["sampler"]
    try:
        guidances = [float(g) for g in args.guidance.split(",")] if args.guidance else [config["guidance"]]
    except ValueError:
        raise UserError(f"--guidance {args.guidance}: give numbers, such as 1,2,4")
    rows = []
    for guidance in guidances:
        for seed in range(args.seeds):
            result = evaluate(model, config, args.n, guidance, args.steps, args.sampler, seed, metrics)
            rows.append({"guidance": guidance, "seed": seed, "metrics": result})
            print(f"guidance {guidance:g}  seed {seed}  {report(result)}", flush=True)
        if args.seeds > 1 and "questions" in metrics:
            dsg = [r["metrics"]["questions"]["dsg"] for r in rows[-args.seeds:]]
            print(f"guidance {guidance:g}  dsg {np.mean(dsg):.3f} +- {np.std(dsg):.3f} over {args.seeds} seeds")
    best = max(rows, key=lambda r: r["metrics"].get("questions", {"dsg": -r["metrics"].get("fd_random", 0)})["dsg"])
    print(f"{args.n} images, {args.sampler}, {args.steps} steps, EMA weights of step {state['step']}; highest dsg at guidance {best['guidance']:g}")
    if args.json:
        text = json.dumps({"run": args.run, "n": args.n, **best, "all": rows, "sampler": args.sampler, "steps": args.steps, "ema": True,
                           "checkpoint_step": state["step"], "config": config, "device": device, "threads": torch.get_num_threads(),
                           "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}, indent=1)
        with open(args.json + ".part", "w") as f:
            f.write(text)
        os.replace(args.json + ".part", args.json)


if __name__ == "__main__":
    main()
