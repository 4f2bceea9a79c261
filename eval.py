"""
How good is a run: does the picture show what the caption says, and do the pictures look like the data?

    python eval.py out/toy/grow --n 500 --guidance 2,3,4      questions, Frechet distance and MMD; curves in guidance.png
    python eval.py out/toy/grow --metrics counting,zeroshot   counts by number; shape and colour told by the denoiser
    python eval.py real/ fake/ --features dino --weights W    two folders of images, in the features of a known network

On `scenes` a judge without learned weights looks at each generated picture (nearest colour, connected components, best
matching shape) and answers the caption's questions. Beside each score stands its chance level: the same pictures judged
against other captions. Features named `random` come from a fixed random network: they compare only runs of this repository
at equal n, and no number made from them is FID. Every result ends with a card that says how it was made.
"""
import argparse
import functools
import glob
import hashlib
import itertools
import json
import os
import platform

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (Batches, COLOURS, CONTRAST, GROUNDS, IMAGES, SHAPES, Scenes, UserError, describe, distance, open_autoencoder, open_data,
                  texture_wave, to_tensor, to_uint8, tokenize)
from model import diffusion_loss, load, noise, read_checkpoint
from sample import SAMPLERS, free_name, sample

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
    caption's share}, by the rule of dsg_corpus. A kind of question that no caption asks is nan.
    """
    prompts = []
    for scene, (ground, objects) in zip(scenes, seen):
        asked = list(enumerate(answers(scene, ground, objects, middle), 1))        # ids from 1: 0 is the root
        prompts.append({"answers": {i: answer for i, (_, _, answer) in asked}, "categories": {i: c for i, (c, _, _) in asked},
                        "parents": {i: [p + 1 for p in parents] for i, (_, parents, _) in asked}})
    score = dsg_corpus(prompts)
    order = ("entities", "attributes", "relations", "counts", "global")
    return {c: score.get(c, float("nan")) for c in order} | {"dsg": score["overall"]}


def with_chance(world, scenes, seen):
    """questions_score of what `look` saw for these scenes, with chance_dsg: the same pictures, each with another caption."""
    middle = sum(world.diameters.values()) / 2
    score = questions_score(scenes, seen, middle)
    return score | {"chance_dsg": questions_score(scenes[1:] + scenes[:1], seen, middle)["dsg"]}


def judge(world, scenes, images):
    """with_chance of (n, H, W, 3) uint8 images for their scenes."""
    return with_chance(world, scenes, [look(image, world.cycles) for image in images])


def counting(scenes, seen):
    """
    {"1", "2", "3": share of the groups of so many of which the picture holds exactly so many, of their shape and colour}
    (Greedy Growing, appendix on counting, where people count). A number that no caption asks for is left out.
    """
    right = {}
    for scene, (_, objects) in zip(scenes, seen):
        for group in scene["groups"]:
            same = sum(o["shape"] == group["shape"] and o["colour"] == group["colour"] for o in objects)
            right.setdefault(str(group["count"]), []).append(same == group["count"])
    return {count: float(np.mean(right[count])) for count in sorted(right)}


# ---------------------------------------------------------------------------------------------------------------
# Metrics on features (n, D), answers or logits. All compute in float64, check their input first and raise ValueError.

BLOCK = 2048                                                   # rows at a time: 2048 x 2048 pairs are 34 MB, however many rows


def check(*sets, least=1):
    """Each set is (n >= least, D), finite, with one D for all. Unchecked, a NaN compares as False and D = 1 broadcasts."""
    for x in sets:
        if not torch.is_tensor(x) or x.ndim != 2 or x.is_complex() or not x.shape[1]:
            raise ValueError(f"expected a real tensor (rows, width), not {tuple(x.shape) if hasattr(x, 'shape') else type(x)}")
        if len(x) < least:
            raise ValueError(f"{len(x)} rows, but this metric needs at least {least}")
        if not all(torch.isfinite(rows).all() for rows in x.split(BLOCK)):
            raise ValueError("the values hold NaN or infinity: look at what produced them")
    if len({x.shape[1] for x in sets}) > 1:
        raise ValueError(f"widths {[x.shape[1] for x in sets]} differ: all sets must come from one network")


def feature_stats(x):
    """(n >= 2, D) -> mean (D,) and covariance (D, D), divisor n - 1 as np.cov. Centred first, so that a common offset costs no digits."""
    check(x, least=2)
    mu = sum(rows.double().sum(0) for rows in x.split(BLOCK)) / len(x)             # (D,)
    centred = (rows.double() - mu for rows in x.split(BLOCK))
    return mu, sum(c.T @ c for c in centred) / (len(x) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """
    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) between two Gaussians (Dowson and Landau 1982; FID: Heusel et al. 2017). The
    last trace is the sum of singular values of S1^1/2 S2^1/2: other routes take roots of eigenvalues that are rounding noise,
    1e-8 of the trace for each dimension without variance, this one 1e-9 in all. Nothing is added to the diagonals.
    """
    check(mu1[None], sigma1, mu2[None], sigma2)
    for sigma in (sigma1, sigma2):
        if len(sigma) != sigma.shape[1] or (sigma - sigma.T).abs().max() > 1e-6 * sigma.abs().max():
            raise ValueError(f"a covariance {tuple(sigma.shape)} must be square and symmetric")

    def root(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        if values[0] < -1e-6 * values[-1].abs():
            raise ValueError(f"a covariance has no negative eigenvalue such as {values[0]:.3g}")
        return vectors * values.clamp(min=0).sqrt() @ vectors.T                    # (D, D)
    mu1, sigma1, mu2, sigma2 = (s.double() for s in (mu1, sigma1, mu2, sigma2))
    cross = torch.linalg.svdvals(root(sigma1) @ root(sigma2)).sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def pair_sum(kernel, x, y):
    """Sum of kernel(a, b) over all pairs of rows of x (n, D) and y (m, D), in blocks; kernel: (p, D), (q, D) -> (p, q)."""
    return sum(kernel(a.double(), b.double()).sum().item() for a in x.split(BLOCK) for b in y.split(BLOCK))


def mmd(x, y):
    """
    Unbiased squared MMD with the cubic kernel (x.y / D + 1)^3 over all rows at once: what kid's mean estimates (Binkowski et
    al. 2018, eq. 4). x (n, D), y (m, D). It may be negative, and is for equal sets: pairs of a row with itself are left out.
    """
    check(x, y, least=2)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    own = lambda a: sum(((rows.double().square().sum(1) / a.shape[1] + 1) ** 3).sum().item() for rows in a.split(BLOCK))
    within = lambda a: (pair_sum(kernel, a, a) - own(a)) / (len(a) * (len(a) - 1))
    return within(x) + within(y) - 2 * pair_sum(kernel, x, y) / (len(x) * len(y))


def kid(x, y, n_subsets=100, subset_size=1000, seed=0):
    """
    Kernel Inception distance (Binkowski et al. 2018): mean and standard deviation (ddof 0) of mmd over random subsets,
    drawn without replacement from one np.random.RandomState(seed), x before y, as torch-fidelity does. Not times 1000.
    """
    check(x, y, least=2)
    if n_subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(f"{n_subsets} subsets of {subset_size} from {len(x)} and {len(y)} rows: subset_size is 2 to the smaller set")
    draws = np.random.RandomState(seed)
    pick = lambda a: a[torch.from_numpy(draws.choice(len(a), subset_size, replace=False)).to(a.device)]
    values = [mmd(pick(x), pick(y)) for _ in range(n_subsets)]
    return float(np.mean(values)), float(np.std(values))


def cmmd(x, y):
    """
    1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), k = exp(-|a - b|^2 / (2 10^2)) over all pairs, a row with itself
    included: biased, >= 0, and 0 for equal sets (Jayasumana et al. 2024 and its code). Rows are meant to be CLIP image
    embeddings of length one; they are taken as they come. k is near 1, so k - 1 is summed: the three ones cancel.
    """
    check(x, y)
    kernel = lambda a, b: torch.expm1(squared_distances(a, b) / (-2 * 10 ** 2))
    mean = lambda a, b: pair_sum(kernel, a, b) / (len(a) * len(b))
    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def squared_distances(a, b):
    """(p, D), (q, D) float64 -> (p, q), to 1e-16 of the squared lengths, so >= 0 but for rounding."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2) + a.square().sum(1)[:, None]


def radii(x, k):
    """(n,) squared distance from each row to its k-th nearest other row: the k + 1st, itself being the first."""
    found = []
    for a in x.split(BLOCK):
        nearest = [squared_distances(a.double(), b.double()).topk(min(k + 1, len(b)), largest=False).values for b in x.split(BLOCK)]
        found.append(torch.cat(nearest, 1).topk(k + 1, largest=False).values[:, k])
    return torch.cat(found)


def balls(centres, points, k, closed):
    """
    Around each of `centres` (n, D) a ball reaches to its k-th neighbour. How many balls hold each of `points` (m,), and how
    many points each ball holds (n,). `closed` counts points on the surface.
    """
    check(centres, points)
    if not 1 <= k < len(centres):
        raise ValueError(f"k = {k} neighbours among {len(centres)} rows: take k from 1 to {len(centres) - 1}")
    of_point, of_ball = points.new_zeros(len(points), dtype=torch.long), []
    for a, radius in zip(centres.split(BLOCK), radii(centres, k).split(BLOCK)):
        inside = []                                            # one (p, q) of booleans for each block of points
        for b in points.split(BLOCK):
            d = squared_distances(a.double(), b.double())
            inside.append(d <= radius[:, None] if closed else d < radius[:, None])
        inside = torch.cat(inside, 1)                          # (p, m)
        of_point += inside.sum(0)
        of_ball.append(inside.sum(1))
    return of_point, torch.cat(of_ball)


def precision_recall(real, fake, k=3):
    """
    (precision, recall): the share of fake rows in some real row's ball, and of real rows in some fake row's ball; the balls
    are closed and reach to the k-th neighbour (Kynkaanniemi et al. 2019, eq. 1-2). real (n > k, D), fake (m > k, D).
    """
    share = lambda centres, points: (balls(centres, points, k, closed=True)[0] > 0).double().mean().item()
    return share(real, fake), share(fake, real)


def prdc(real, fake, k=5):
    """
    {"precision", "recall", "density", "coverage"} with open balls (Naeem et al. 2020, eq. 1-4, and its code `prdc`). Density:
    real balls around a fake row, over k; coverage: real balls that hold a fake row. real (n > k, D), fake (m > k, D).
    """
    of_fake, of_real_ball = balls(real, fake, k, closed=False)
    of_real, _ = balls(fake, real, k, closed=False)
    share = lambda counts: (counts > 0).double().mean().item()
    return {"precision": share(of_fake), "recall": share(of_real), "density": of_fake.double().mean().item() / k,
            "coverage": share(of_real_ball)}


def clip_score(image_embeddings, text_embeddings):
    """100 x mean cosine of each image (n, D) with its caption (n, D), not clamped. Hessel et al. 2021 clamp and scale by 2.5."""
    check(image_embeddings, text_embeddings)
    if len(image_embeddings) != len(text_embeddings):
        raise ValueError(f"{len(image_embeddings)} images and {len(text_embeddings)} captions: give each image its caption")
    if not all(e.any(1).all() for e in (image_embeddings, text_embeddings)):
        raise ValueError("an embedding is all zeros: it has no direction")
    return 100 * F.cosine_similarity(image_embeddings.double(), text_embeddings.double(), eps=0).mean().item()


def inception_score(logits, splits=10):
    """
    Mean and standard deviation (ddof 0) over splits of exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016). Logits (n, classes)
    without bias, rows in random order; split i is rows i n // splits to (i + 1) n // splits, as in the first code.
    """
    check(logits, least=max(splits, 1))
    if splits < 1:
        raise ValueError(f"splits = {splits}: take at least 1")
    scores = []
    for i in range(splits):
        log_p = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits].double().log_softmax(1)
        marginal = log_p.logsumexp(0) - np.log(len(log_p))                         # (classes,): log of the mean p
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def dsg_right(answers, parents):
    """
    {id: 0 or 1}: a question counts only if it and all its parents are answered 1 (Cho et al. 2024, in the published code).
    One level: a parent's own answer decides, not whether that parent counts. Parents that nobody asked stop nothing.
    """
    if not set(answers.values()) <= {0, 1}:
        raise ValueError(f"answers must be 0 or 1, not {sorted(map(str, set(answers.values()) - {0, 1}))}")
    return {q: int(a and all(answers.get(p, 1) for p in parents.get(q, ()) if p != 0)) for q, a in answers.items()}


def dsg_score(answers, parents):
    """Share in [0, 1] of one prompt's questions that count: answers {id: 0 or 1}, parents {id: [ids]}, 0 the root. No answers: 0."""
    right = dsg_right(answers, parents)
    return sum(right.values()) / max(len(right), 1)


def dsg_corpus(prompts):
    """
    {"overall": mean over prompts of dsg_score, category: mean over all questions of that category} from a list of {"answers",
    "parents", "categories": {id: name}}.
    """
    if not prompts:
        raise ValueError("no prompts: there is nothing to average")
    by_category = {}
    for prompt in prompts:
        for q, right in dsg_right(prompt["answers"], prompt["parents"]).items():
            if q in prompt.get("categories", {}):
                by_category.setdefault(prompt["categories"][q], []).append(right)
    overall = float(np.mean([dsg_score(p["answers"], p["parents"]) for p in prompts]))
    return {"overall": overall} | {c: float(np.mean(r)) for c, r in by_category.items()}


def resize(images, size):
    """
    (B, 3, H, W) in [0, 255], or floats in [0, 1], -> (B, 3, size, size) or (B, 3, *size) float. Bicubic with a = -0.5 and
    antialias, as pillow's BICUBIC on floats: without antialias torch takes a = -0.75, another picture even when enlarging.
    The overshoot is clamped to the range; nothing is rounded (pillow on uint8 rounds after each axis).
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel() or min(size) < 1:
        raise ValueError(f"expected images (B, 3, H, W) and a size of at least 1, not {tuple(images.shape)} and {size}")
    x = images if images.is_floating_point() else images.float()
    if not (x.min() >= 0 and x.max() <= 255):                  # a NaN fails both
        raise ValueError("values must lie in [0, 1] or [0, 255]; an x in [-1, 1] needs (x + 1) / 2 first")
    top = 1 if images.is_floating_point() and x.max() <= 1 else 255
    return F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, top)


# ---------------------------------------------------------------------------------------------------------------
# Features: images (n, H, W, 3) uint8 -> (n, D). Only local files, checked; a network never gets random weights under a real name.


def random_layers(seed=0):
    """Three 3x3 convolutions, weights normal(0, 2 / fan_in)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o, i, 3, 3, generator=generator) * (2 / (9 * i)) ** 0.5 for i, o in ((3, 16), (16, 32), (32, 32))]


def random_features(images, seed=0):
    """
    (n, H, W, 3) uint8 -> (n, 64) float64 from a fixed random network: three convolutions of stride 2 with ReLU, then mean and
    spread of 32 channels over space. Sees colour, edges, layout statistics; its numbers depend on the size of the images.
    """
    layers, rows = random_layers(seed), []
    for chunk in to_tensor(images).split(256):
        for layer in layers:
            chunk = F.relu(F.conv2d(chunk, layer, stride=2, padding=1))            # (B, c, H/2, W/2)
        rows.append(torch.cat([chunk.mean((2, 3)), chunk.std((2, 3))], 1))
    return torch.cat(rows).double()


def file_hash(path):
    """sha256 of a file, or of the weights in a folder, one after the other; None where there are none."""
    inside = lambda ending: sorted(glob.glob(os.path.join(glob.escape(path), ending)))
    files = inside("*.safetensors") or inside("*.bin") if os.path.isdir(path) else glob.glob(glob.escape(path))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(2 ** 20):
                digest.update(block)
    return digest.hexdigest() if files else None


# NVIDIA's TorchScript copy of the network of FID (TensorFlow, 2015-12-05): it resizes to 299 itself, as TensorFlow 1 did
INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SOURCES = {"inception": "NVIDIA's inception-2015-12-05.pt there, and give --weights FILE",
           "dino": "config.json and model.safetensors of facebook/dinov2-large there, and give --weights FOLDER",
           "clip": "all files of openai/clip-vit-large-patch14-336 there (or of -patch14, for 224 px), and give --weights FOLDER"}


def open_network(name, weights, device):
    """(features, card): a function from (n, H, W, 3) uint8 to (n, D), and what must be said about it."""
    if name == "random":
        digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in random_layers())).hexdigest()
        return random_features, {"network": "random: three convolutions, seed 0", "sha256": digest, "resize": "none", "range": "[-1, 1]"}
    if not weights or not file_hash(weights):
        raise UserError(f"--features {name}: no weights at {weights!r}, and nothing is downloaded: put {SOURCES[name]}")
    return {"inception": open_inception, "dino": open_dino, "clip": open_clip}[name](weights, device)


def open_inception(weights, device):
    """The 2048 pooled features of FID."""
    if os.path.isdir(weights) or file_hash(weights) != INCEPTION:
        raise UserError(f"{weights!r} is not the network of FID, sha256 {INCEPTION}: put {SOURCES['inception']}")
    net = torch.jit.load(weights, map_location=device).eval()
    features = lambda images: net(torch.tensor(images).permute(0, 3, 1, 2).to(device), return_features=True)
    return features, {"network": "inception-2015-12-05", "sha256": INCEPTION, "range": "[0, 255], inside (x - 128) / 128",
                      "resize": "inside, to 299: bilinear of TensorFlow 1, no half-pixel centres, no antialias"}


def pretrained(kind, wanted, weights, device):
    """A transformers network from a local folder. Refuses one of another type, and one whose file lacks a single weight."""
    try:
        import transformers
    except ImportError:
        raise UserError("--features dino and clip need transformers: pip install transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        found = transformers.AutoConfig.from_pretrained(weights, local_files_only=True).model_type
        if found != wanted:
            raise UserError(f"{weights!r} holds a network of type {found}, not {wanted}: put {SOURCES[wanted.removesuffix('v2')]}")
        net, told = getattr(transformers, kind).from_pretrained(weights, local_files_only=True, output_loading_info=True)
    except Exception as e:                                     # of many kinds, from transformers and from safetensors
        raise UserError(f"{weights!r} cannot be loaded ({str(e).splitlines()[0]}): put {SOURCES[wanted.removesuffix('v2')]}")
    if lacking := sorted(map(str, {*told["missing_keys"], *told["mismatched_keys"]})):
        raise UserError(f"{weights!r} lacks {len(lacking)} weights such as {lacking[0]}, which would be random: take the whole file")
    return net.float().eval().to(device)


def normalised(images, side, mean, std, crop=False):
    """(n, H, W, 3) uint8 -> (n, 3, side, side): centre square if `crop`, else squashed; whole levels as pillow's, then mean and std."""
    _, h, w, _ = images.shape
    s = min(h, w)
    if crop:
        images = images[:, (h - s) // 2:(h - s) // 2 + s, (w - s) // 2:(w - s) // 2 + s]
    x = resize(torch.tensor(images).permute(0, 3, 1, 2), side).round() / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def hub_positions(table, new):
    """
    DINOv2's positions (1, 1 + old^2, D) for new x new tokens as torch.hub makes them, by a scale of (new + 0.1) / old.
    transformers asks for the size instead, which moves the sampling points by up to 0.22 cells.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    if old == new:
        return table
    square = table[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)             # (1, D, old, old)
    square = F.interpolate(square, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic")
    return torch.cat([table[:, :1], square.flatten(2).transpose(1, 2)], 1)         # (1, 1 + new^2, D)


def open_dino(weights, device, side=224):
    """DINOv2's class token after the last norm, not normalised: the features of FD-DINO (Stein et al. 2023, dgm-eval)."""
    net = pretrained("Dinov2Model", "dinov2", weights, device)
    table, c = net.embeddings.position_embeddings, net.config
    net.embeddings.position_embeddings = torch.nn.Parameter(hub_positions(table.data, side // c.patch_size))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)                       # of ImageNet
    features = lambda images: net(normalised(images, side, mean, std).to(device)).last_hidden_state[:, 0]
    return features, {"network": f"dinov2, width {c.hidden_size}, {c.num_hidden_layers} layers, patch {c.patch_size} (published: 1024, 24, 14)",
                      "sha256": file_hash(weights), "resize": f"to {side} squashed, bicubic antialiased, rounded",
                      "range": "[0, 1], ImageNet mean and std"}


def open_clip(weights, device):
    """
    CLIP's projected image embeddings of length one: CMMD takes 336 px (224 in Greedy Growing, Sec. 4.1). A list of captions
    gives theirs, cut at 77 tokens, with no words put before them.
    """
    net = pretrained("CLIPModel", "clip", weights, device)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    c = net.config.vision_config

    def features(images):
        if isinstance(images, list):
            return embed_captions(net, images, weights, device)
        pixels = normalised(images, c.image_size, mean, std, crop=True).to(device)
        return F.normalize(net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output), dim=1)
    return features, {"network": f"clip, width {c.hidden_size}, {c.num_hidden_layers} layers, patch {c.patch_size} (published: 1024, 24, 14)",
                      "sha256": file_hash(weights), "resize": f"centre square to {c.image_size}, bicubic antialiased, rounded",
                      "range": "[0, 1], CLIP mean and std", "clip_score": "100 x mean cosine, not clamped, no prefix"}


def embed_captions(net, captions, weights, device):
    """Captions -> (n, D) of length one from the text half of CLIP."""
    from transformers import CLIPTokenizer
    if not os.path.exists(os.path.join(weights, "tokenizer_config.json")):
        raise UserError(f"{weights!r} lacks the tokenizer, which the CLIP score needs: put {SOURCES['clip']}")
    words, rows = CLIPTokenizer.from_pretrained(weights, local_files_only=True), []
    for start in range(0, len(captions), 64):
        tokens = words(captions[start:start + 64], padding="max_length", truncation=True, max_length=net.config.text_config.max_position_embeddings,
                       return_tensors="pt").to(device)
        rows.append(F.normalize(net.text_projection(net.text_model(**tokens).pooler_output), dim=1))
    return torch.cat(rows)


def distances(real, fake, name, metrics):
    """{metric_network: value} between two feature sets. fd_inception is FID, fd_dino is FD-DINO; mmd on clip is CMMD."""
    result, n = {}, min(len(real), len(fake))
    if n <= real.shape[1]:                                     # no covariance has full rank then
        print(f"biased: {n} images for {real.shape[1]} features of {name}; compare such numbers at equal n only")
    try:
        if "fd" in metrics:
            result[f"fd_{name}"] = frechet_distance(*feature_stats(real), *feature_stats(fake))
        if "mmd" in metrics:
            result |= {"cmmd": cmmd(real, fake)} if name == "clip" else {f"mmd_{name}": mmd(real, fake)}
        if "kid" in metrics:
            result[f"kid_{name}"] = dict(zip(("mean", "std"), kid(real, fake)))
        if "pr" in metrics:
            result[f"pr_{name}"] = dict(zip(("precision", "recall"), precision_recall(real, fake)))
        if "prdc" in metrics:
            result[f"prdc_{name}"] = prdc(real, fake)
    except ValueError as e:
        raise UserError(f"features {name}, {len(real)} and {len(fake)} images: {e}")
    return result


# ---------------------------------------------------------------------------------------------------------------
# Two folders of images


def list_images(path):
    """The image files under `path`, all readable and of one size (width, height), at least two of them."""
    try:
        import PIL.Image as pillow
    except ImportError:
        raise UserError("reading image files needs pillow: pip install pillow")
    files, sizes = sorted(f for f in glob.glob(os.path.join(glob.escape(path), "**"), recursive=True) if f.lower().endswith(IMAGES)), {}
    if len(files) < 2:
        raise UserError(f"{len(files)} images under {path!r}: a distance between sets needs at least 2 ({' '.join(IMAGES)})")
    for file in files:
        try:
            with pillow.open(file) as image:
                sizes.setdefault(image.size, file)
        except Exception:                                      # pillow raises many kinds on bytes that are no image
            raise UserError(f"{file!r} cannot be read as an image: replace or remove it")
    if len(sizes) > 1:
        (a, b), (one, other) = list(sizes.values())[:2], list(sizes)[:2]
        raise UserError(f"images of {len(sizes)} sizes under {path!r}, such as {a!r} {one} and {b!r} {other}: crop and resize them alike first")
    return files, next(iter(sizes))


def read_image(file):
    """(H, W, 3) uint8; transparency is dropped, as pytorch-fid does."""
    import PIL.Image as pillow
    try:
        with pillow.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as e:
        raise UserError(f"{file!r} breaks off ({e}): replace or remove it")


@torch.no_grad()
def folder_features(files, features, chunk=64):
    """(n, D) on the CPU, read and computed a chunk at a time, so that the images need not fit into memory."""
    starts = tqdm(range(0, len(files), chunk), "features", leave=False, disable=None)
    return torch.cat([features(np.stack([read_image(f) for f in files[s:s + chunk]])).cpu() for s in starts])


def score_folders(real, fake, networks, metrics):
    """({metric: value}, facts for the card) of the images in two folders. `real` is the reference: precision and recall need the order."""
    (real_files, real_size), (fake_files, fake_size) = list_images(real), list_images(fake)
    if "random" in networks and real_size != fake_size:
        raise UserError(f"images of {real_size} and {fake_size}: random features depend on the size; resize one set")
    result = {}
    for name, (features, _) in networks.items():
        x, y = (folder_features(files, features) for files in (real_files, fake_files))
        result |= distances(x, y, name, metrics)
    return result, {"n": len(fake_files), "reference": f"{len(real_files)} images of {real}, {real_size} px; generated: {fake_size} px"}


# ---------------------------------------------------------------------------------------------------------------
# Evaluating a run

HELD_OUT = 2 ** 31                                             # added to the seed: scenes that training never draws
RANDOM = {"random": (random_features, {})}


def held_out(config, n):
    """(data, scenes or None, captions): n captions of scenes that training never draws (a caption may occur in both); or the first n of a folder."""
    if config["data"] != "scenes":
        world = open_data(config)
        return world, None, [world.caption(i % len(world)) for i in range(n)]
    world = Scenes(config, seed=config["seed"] + HELD_OUT)
    scenes = [world.scene(i) for i in range(n)]
    return world, scenes, [describe(s) for s in scenes]


@torch.no_grad()
def evaluate(model, config, n, guidance=None, steps=None, sampler=None, seed=0, metrics=("questions", "fd", "mmd"), bar=True,
             networks=RANDOM, poll=lambda: None):
    """
    {metric: value} of n images for n held-out captions, against n other real images. `mmd_random` is the unbiased estimate of
    the squared MMD with the cubic kernel over all images (see mmd). CLIP among the networks adds the CLIP score.
    """
    world, scenes, captions = held_out(config, n)
    result = {}
    if "zeroshot" in metrics and scenes:
        result["zeroshot"] = zeroshot(model, config, world, n, seed)
    if set(metrics) <= {"zeroshot"}:
        return result
    images = to_uint8(sample(model, config, captions, seed, 0, steps, guidance, sampler, bar=bar, poll=poll))
    if scenes and {"questions", "counting"} & set(metrics):
        seen = [look(image, world.cycles) for image in images]
        result |= {"questions": with_chance(world, scenes, seen)} if "questions" in metrics else {}
        result |= {"counting": counting(scenes, seen)} if "counting" in metrics else {}
    if {"fd", "mmd", "kid", "pr", "prdc"} & set(metrics):
        batches = Batches(world, config | {"aspects": ""}, filtered=False)         # names and passes over what cannot be decoded
        real = np.stack([batches.sample(0, (n + i) % len(world))[0] for i in tqdm(range(n), "real images", leave=False, disable=None)])
        for name, (features, _) in networks.items():
            x, y = (torch.cat([features(part[k:k + 64]).cpu() for k in range(0, n, 64)]) for part in (real, images))
            result |= distances(x, y, name, metrics)
            result |= {"clip_score": clip_score(y, features(captions).cpu())} if name == "clip" else {}
    return result


@torch.no_grad()
def zeroshot(model, config, world, n, seed=0, draws=16):
    """
    Classification with the denoiser (Li et al. 2023; Clark and Jaini 2023): of the captions that differ in one word, shape or
    colour, the one under which the loss is lowest, on n real held-out scenes of a single group. {"shape": {class: accuracy,
    "mean", "chance"}, "colour": ...}. All captions meet the same `draws` noises, at times spread evenly over [0, 1].
    """
    right, device = {"shape": {}, "colour": {}}, next(model.parameters()).device
    times, autoencoder = ((torch.arange(draws) + 0.5) / draws).to(device), open_autoencoder(config, device)
    single = (i for i in itertools.count() if len(world.scene(i)["groups"]) == 1)
    for i in tqdm(itertools.islice(single, n), "zero-shot", total=n, leave=False, disable=None):
        x, scene = autoencoder.encode(to_tensor(world.image(i, config["resolution"])[None]).to(device)), world.scene(i)
        eps = noise([(seed, i, k) for k in range(draws)], x.shape[1:], device)     # (draws, 3, H, W)
        for kind, options in (("shape", world.shapes), ("colour", world.colours)):
            captions = [describe(dict(scene, groups=[dict(scene["groups"][0], **{kind: o})])) for o in options]
            tokens = tokenize(captions, config["text_length"], config["text_vocab"]).to(device).repeat_interleave(draws, 0)
            many = len(options)
            loss = diffusion_loss(model, x.expand(many * draws, -1, -1, -1), tokens, times.repeat(many), eps.repeat(many, 1, 1, 1), config)
            guess, truth = options[loss.view(many, draws).mean(1).argmin()], scene["groups"][0][kind]
            right[kind].setdefault(truth, []).append(guess == truth)
    table = {kind: {k: float(np.mean(v)) for k, v in sorted(classes.items())} for kind, classes in right.items()}
    return {kind: t | {"mean": float(np.mean(list(t.values()))), "chance": 1 / len(getattr(world, kind + "s"))} for kind, t in table.items()}


def flat(result, before=""):
    """{"a": {"b": 1}} -> {"a b": 1}; the questions keep their plain names."""
    rows = {}
    for key, value in result.items():
        name = before + key
        rows |= flat(value, "" if key == "questions" else name + " ") if isinstance(value, dict) else {name: value}
    return rows


def report(result):
    """One metric result as a line for people."""
    q = result.get("questions")
    parts = [f"dsg {q['dsg']:.3f} (chance {q['chance_dsg']:.3f})"] if q else []
    parts += [f"{k} {q[k]:.3f}" for k in ("entities", "attributes", "relations", "counts", "global")] if q else []
    return "  ".join(parts + [f"{k} {v:.4f}" for k, v in flat({k: v for k, v in result.items() if k != "questions"}).items()])


def over_seeds(results, how):
    """Results of several seeds -> one of the same shape, with how(values) in each place."""
    if isinstance(results[0], dict):
        return {k: over_seeds([r[k] for r in results if k in r], how) for k in results[0]}
    return float(how(results))


def tuning(points):
    """
    Curves over guidance from [(guidance, metrics)], and the range between the optimum of the first Frechet distance and that of
    the first MMD, where to look for a good value (Greedy Growing, Sec. 5.3, with FD-DINO and CMMD).
    """
    points = sorted(points, key=lambda p: p[0])
    curves = {k: [flat(m)[k] for _, m in points] for k in flat(points[0][1])}
    guidance = [g for g, _ in points]
    ends = [k for kind in (("fd_",), ("cmmd", "mmd_")) for k in [next((c for c in curves if c.startswith(kind)), None)] if k]
    best = {k: guidance[int(np.argmin(curves[k]))] for k in ends}
    if len(best) == 2:
        where = ", ".join(f"lowest {k} at {g:g}" for k, g in best.items())
        print(f"guidance between {min(best.values()):g} and {max(best.values()):g}: {where}")
    for k in ends:
        if best[k] in (guidance[0], guidance[-1]):
            print(f"  lowest {k} lies at the end of the values tried: try further ones")
    return {"guidance": guidance, "curves": curves, "optimum": best, "range": sorted(best.values()) if len(best) == 2 else None}


def draw_tuning(curves, file):
    """The curves of `tuning` as a picture: dsg with its chance level, then one panel for each distance; the range in grey."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no picture of the guidance curves: pip install matplotlib")
    names = [k for k in curves["curves"] if k in ("dsg", "cmmd", "clip_score") or k.startswith(("fd_", "mmd_"))]
    if not names:
        return
    figure, panels = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3), squeeze=False, layout="constrained")
    for name, panel in zip(names, panels[0]):
        panel.plot(curves["guidance"], curves["curves"][name], "o-", label=name)
        if name == "dsg":
            panel.plot(curves["guidance"], curves["curves"]["chance_dsg"], "k:", label="chance")
        if name in curves["optimum"]:
            panel.axvline(curves["optimum"][name], color="tab:red", lw=1, label="lowest")
        if curves["range"]:
            panel.axvspan(*curves["range"], color="0.9", zorder=0)
        panel.set(title=name, xlabel="guidance")
        panel.legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    print(f"{file}: the grey range lies between the lowest Frechet distance and the lowest MMD")


def make_card(networks, device, **rest):
    """What makes a number comparable. Printed with every result, and kept in the JSON."""
    return rest | {"networks": {name: about for name, (_, about) in networks.items()}, "images": "rounded and clamped to uint8 before any metric",
                   "device": torch.cuda.get_device_name() if device == "cuda" else device, "threads": torch.get_num_threads(),
                   "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def tell(card, figures, file):
    """Print the card; write card and figures to `file`, if any, replaced as a whole."""
    for key, value in flat(card).items():
        print(f"  {key:26s} {value}")
    if file:
        with open(file + ".part", "w") as f:
            json.dump(figures | {"card": card}, f, indent=1)
        os.replace(file + ".part", file)


def score_run(args, networks, metrics, device):
    """All guidances and seeds of one run: mean and spread (standard deviation, ddof 0) over seeds, curves over guidance, card."""
    state, (model, config) = read_checkpoint(args.run[0]), load(args.run[0], device)
    try:
        guidances = [float(g) for g in args.guidance.split(",")] if args.guidance else [config["guidance"]]
        if not np.isfinite(guidances).all():
            raise ValueError
    except ValueError:
        raise UserError(f"--guidance {args.guidance}: give numbers, such as 1,2,4")
    args.steps, args.sampler = args.steps or config["sample_steps"], args.sampler or config["sampler"]
    rows, points = [], []
    for guidance in guidances:
        for seed in range(args.seeds):
            result = evaluate(model, config, args.n, guidance, args.steps, args.sampler, seed, metrics, networks=networks)
            rows.append({"guidance": guidance, "seed": seed, "metrics": result})
            print(f"guidance {guidance:g}  seed {seed}  {report(result)}", flush=True)
        results = [r["metrics"] for r in rows[-args.seeds:]]
        points.append((guidance, over_seeds(results, np.mean), over_seeds(results, np.std) if args.seeds > 1 else None))
        if args.seeds > 1:
            print(f"guidance {guidance:g}  mean    {report(points[-1][1])}\nguidance {guidance:g}  spread  {report(points[-1][2])}")
    asked = "questions" in points[0][1]
    best = max(points, key=lambda p: p[1]["questions"]["dsg"] if asked else -p[1].get("fd_random", 0))
    print(f"{args.n} images, {args.sampler}, {args.steps} steps, EMA weights of step {state['step']}"
          + f"; highest dsg at guidance {best[0]:g}" * asked)
    figures = {"run": args.run[0], "n": args.n, "guidance": best[0], "seeds": args.seeds, "metrics": best[1], "spread": best[2],
               "all": rows, "config": config}
    if len(guidances) > 1:
        figures["tuning"] = tuning([(g, mean) for g, mean, _ in points])
        draw_tuning(figures["tuning"], free_name(os.path.join(args.run[0] if os.path.isdir(args.run[0]) else ".", "guidance.png")))
    file = os.path.join(args.run[0], "last.pt") if os.path.isdir(args.run[0]) else args.run[0]
    unseen = ", which training never draws" if config["data"] == "scenes" else ""
    card = make_card(networks, device, n=args.n, reference=f"images {args.n} to {2 * args.n - 1} of {config['data']}{unseen}",
                     checkpoint=file_hash(file), checkpoint_step=state["step"], ema=True, guidance=guidances, sampler=args.sampler,
                     steps=args.steps, seeds=list(range(args.seeds)))
    tell(card, figures, args.json)


# ---------------------------------------------------------------------------------------------------------------
# python eval.py


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="a run folder such as out/toy/grow; or two folders of images, reference first")
    parser.add_argument("--n", type=int, default=1000, help="images")
    parser.add_argument("--metrics", help="of questions,fd,mmd,kid,pr,prdc,counting,zeroshot; default questions,fd,mmd; for folders fd,mmd,pr,prdc")
    parser.add_argument("--features", default="random", help="of random,inception,dino,clip: one or several")
    parser.add_argument("--weights", default="", help="file or folder with the weights, one for each of --features that is not random")
    parser.add_argument("--guidance", help="one value or several, such as 1,2,4; default: the run's own")
    parser.add_argument("--sampler", choices=list(SAMPLERS), help="default: the run's own")
    parser.add_argument("--steps", type=int, help="default: the run's own")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with seeds 0 to k-1 and tell mean and spread")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    if args.n < 2 or args.seeds < 1 or (args.steps is not None and args.steps < 1):
        raise UserError(f"--n {args.n} --seeds {args.seeds} --steps {args.steps}: give n of at least 2, seeds and steps of at least 1")
    return args


def chosen(text, known, flag):
    """The words of a comma-separated flag, all of them known."""
    words = [w for w in text.split(",") if w]
    if not words or not set(words) <= set(known):
        raise UserError(f"{flag} {text}: take some of {','.join(known)}")
    return words


def main():
    args, device = parse(), "cuda" if torch.cuda.is_available() else "cpu"
    folders = len(args.run) == 2
    if len(args.run) > 2:
        raise UserError("too many folders: give one run, or two folders of images, the reference first")
    known = ["questions", "fd", "mmd", "kid", "pr", "prdc", "counting", "zeroshot"]
    metrics = chosen(args.metrics or ("fd,mmd,pr,prdc" if folders else "questions,fd,mmd"), known[1:-2] if folders else known, "--metrics")
    names = chosen(args.features, ["random", "inception", "dino", "clip"], "--features")
    weights = iter([w for w in args.weights.split(",") if w])
    files = {name: None if name == "random" else next(weights, None) for name in names}
    networks = {name: open_network(name, file, device) for name, file in files.items()}
    if not folders:
        return score_run(args, networks, metrics, device)
    if os.path.isfile(os.path.join(args.run[0], "last.pt")):
        raise UserError(f"{args.run[0]!r} is a run: give one run alone, or two folders of images")
    result, facts = score_folders(*args.run, networks, metrics)
    print(report(result))
    tell(make_card(networks, device, **facts), {"reference": args.run[0], "run": args.run[1], "n": facts["n"], "metrics": result}, args.json)


if __name__ == "__main__":
    main()
