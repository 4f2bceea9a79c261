"""
What experiments.claims measures of one set of weights; each measure is made once and kept in measures.jsonl.

    measures = Measures("out/claims/measures.jsonl")
    measures.pictures(file, n, guidance)                       # {"dsg": (n,), "chance", "framed", "judge", "random"}
    measures.loss(file, n)                                     # mean of (n,) held-out losses: no sampler, no judge
    measures.damage(file, parent, n, seed)                     # loss of a core inside its parent's shell
    measures.damage(file, parent, n, seed, refit=80)           # the same inside a new shell, trained for so many steps

Planned in its place tells what would be measured. All runs sit one exam: held-out scenes 0, 1, ... with noise (0,
picture, step). Exam B, by which rates are chosen, is of scenes EXAM_B and on. Letters: n pictures, K seeds, M values on
an axis.
"""
import functools
import json
import math
import os
import time

import numpy as np
import torch

from data import Batches, encode_captions, open_data
from eval import generate
from lib.draws import normals, uniforms
from lib.files import file_hash
from lib.judge import judge, look, picture_scores, seen_features
from lib.networks import random_features
from lib.pictures import to_tensor
from lib.plan import count_flops
from lib.settings import UserError
from lib.tasks import in_style
from model import Block, build, diffusion_loss, ema_weights, example, freeze_core, init_weights, read_checkpoint
from sample import count_evaluations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAM_B = 10000                                                 # its first scene
REFERENCE = range(5000, 6000)                                  # held-out scenes to which pictures are compared
LEVELS = 8                                                     # times at which a held-out picture's loss is taken


class Measures:
    """What was measured, by weights and settings, in a file of a line each: a kill loses the line in the making."""
    draws = 1000                                               # resamples of a bootstrap

    def __init__(self, file):
        self.file, self.known = file, {}
        if os.path.exists(file):
            with open(file) as f:
                for line in f:
                    try:
                        key, value = json.loads(line)
                        self.known[json.dumps(key, sort_keys=True)] = value
                    except ValueError:                         # cut off
                        pass

    def once(self, key, work, file=None):
        """work(), or what it was when this key was measured before; `file` are the weights that it looks at."""
        name = json.dumps(key, sort_keys=True)
        if name not in self.known:
            self.known[name] = work()
            line = "\n" + json.dumps([key, self.known[name]])  # after a line that was cut off a new one begins
            with open(self.file, "ab", 0) as f:                # unbuffered: in one piece, as two processes may write
                f.write(line.encode())
        return self.known[name]

    def pictures(self, file, n, guidance, noise=0, first=0, token=False):
        """Pictures of n held-out captions, by the config's sampler, or with the style token: see picture_figures."""
        key = {"of": "pictures", "weights": self.name(file), "n": n, "guidance": guidance, "noise": noise,
               "first": first} | ({"token": True} if token else {})
        return self.once(key, lambda: picture_figures(*open_weights(file), n, guidance, noise, first, token), file)

    def loss(self, file, n, first=0):
        """Mean held-out loss of the EMA weights over n pictures."""
        key = {"of": "loss", "weights": self.name(file), "n": n, "first": first}
        return self.once(key, lambda: held_out_loss(*open_weights(file), n, first), file)

    def damage(self, file, parent, n, seed, refit=0):
        """
        Held-out loss at the parent's resolution of the core in `file`, text encoding, modulation and blocks, plain
        weights (of the parent itself the average, from which growing starts), in the parent's shell and time encoding;
        or with `refit` in a new shell, trained for so many steps round the still core. Without a file: of a core with
        first weights.
        """
        key = {"of": "damage", "weights": file and self.name(file), "parent": self.name(parent), "n": n, "seed": seed,
               "refit": refit}

        def work():
            state, core = read_checkpoint(parent), file and read_checkpoint(file)
            if core:                                           # growing starts from the parent's average: it is 0
                core = ema_weights(core) if weights_of(file) == weights_of(parent) else core["model"]
            model = transplant(state, core, seed, keep_shell=not refit).to(DEVICE)
            if refit:
                fit_shell(model, state["config"], refit, seed)
            return held_out_loss(model.eval(), state["config"], n)
        return self.once(key, work, parent)

    def name(self, file):
        """What tells these weights from others."""
        return weights_of(file)

    def reference(self, config):
        """Features of the world's own pictures: see reference_features."""
        return reference_features(config)

    def ceiling(self, config, n):
        """See ceiling."""
        return ceiling(config, n)


class Planned(Measures):
    """Measures that makes none: it notes in `wanted`, {key: (key, file)}, what is not known, and makes up values."""
    draws = 2

    def __init__(self, file):
        super().__init__(file)
        self.wanted, self.draw = {}, np.random.default_rng(0)

    def name(self, file):
        there = os.path.exists(os.path.join(file, "last.pt") if os.path.isdir(file) else file)
        return weights_of(file) if there else file

    def once(self, key, work, file=None):
        name = json.dumps(key, sort_keys=True)
        if name not in self.known:
            self.wanted[name] = key, file
            self.known[name] = self.made_up(key)
        return self.known[name]

    def made_up(self, key):
        """A value of the right shape."""
        if key["of"] == "pictures":
            n = key["n"]
            return {"dsg": self.draw.uniform(size=n).tolist(), "chance": 0.2, "framed": [0] * n, **self.features(n)}
        value = 1 + self.draw.uniform()
        return [value, value + 0.1] if key["of"] == "time" else value

    def features(self, n):
        """As features_of."""
        return {"judge": self.draw.normal(size=(n, 18)), "random": self.draw.normal(size=(n, 64))}

    def reference(self, config):
        return self.features(100)

    def ceiling(self, config, n):
        return 1.0


def passes(key, config):
    """(pictures that go forward through the model, pictures that are judged) for a measure."""
    if key["of"] == "pictures":
        evaluations = count_evaluations(config, config["sampler"], config["sample_steps"], key["guidance"])
        return key["n"] * evaluations, key["n"]
    if key["of"] in ("loss", "damage"):
        return LEVELS * key["n"] + 3 * config["batch"] * key.get("refit", 0), 0    # a backward is worth two
    return 0, 0


def weights_of(file):
    """16 digits that name the weights of a run or file."""
    digest = file_hash(os.path.join(file, "last.pt") if os.path.isdir(file) else file)
    if not digest:
        raise UserError(f"{file} is not there, and a measure wants it: move its run away to have it made again")
    return digest[:16]


def open_weights(file):
    """(model, config), EMA weights."""
    state = read_checkpoint(file)
    model = build(state["config"])
    model.load_state_dict(ema_weights(state))
    return model.eval().to(DEVICE), state["config"]


# ---- pictures --------------------------------------------------------------------------------------------------------

def picture_figures(model, config, n, guidance, noise, first, token=False):
    """
    {"dsg": n shares, "chance": dsg by other captions, "framed": is there a frame, the style?, "judge", "random":
    features of each picture} for held-out captions first, first + 1 ... Picture i draws from (noise, i, step).
    """
    world, numbers = open_data(config).held_out(), range(first, first + n)
    settings = (in_style(config) if token else config) | {"guidance": guidance}
    images = generate(model, settings, [world.caption(i) for i in numbers], range(n), noise)
    looks, scenes = [look(image, world.cycles) for image in images], [world.scene(i) for i in numbers]
    return {"dsg": picture_scores(scenes, looks, world.middle), "chance": judge(world, scenes, looks)["chance_dsg"],
            "framed": [int(seen.framed) for seen in looks],
            **{name: np.round(x, 5).tolist() for name, x in features_of(images, looks).items()}}


def features_of(images, looks):
    """{"judge": (n, 18) what is where, "random": (n, 64) texture} of pictures (n, H, W, 3) uint8."""
    return {"judge": seen_features(looks), "random": random_features(images).numpy()}


def reference_features(config):
    """The same of the world's own pictures at the config's resolution."""
    world = open_data(config).held_out()
    images = np.stack([world.image(i, config["resolution"]) for i in REFERENCE])
    return features_of(images, [look(image, world.cycles) for image in images])


def ceiling(config, n):
    """dsg of the world's own pictures for the exam's captions: what the judge lets a perfect model reach."""
    world = open_data(config).held_out()
    looks = [look(world.image(i, config["resolution"]), world.cycles) for i in range(n)]
    return float(np.mean(picture_scores([world.scene(i) for i in range(n)], looks, world.middle)))


def standardised(reference, fake):
    """Both sets as tensors, in units of the reference's spread; features that never vary there are left out."""
    spread = reference.std(0)                                  # else the features of large numbers would decide
    used = spread > 0
    return [torch.from_numpy((x - reference.mean(0))[:, used] / spread[used]) for x in (reference, np.array(fake))]


def vertex(x, y):
    """
    (place of the lowest y, is it inside?): the vertex of the parabola through the lowest of the (M >= 5) points and its
    two neighbours on each side, by least squares, within the range of x; at an end it is none, and that end stands.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    lowest = int(np.argmin(y))                                 # of noisy points: it jumps, which a parabola does not
    start = min(max(lowest - 2, 0), len(x) - 5)
    a, b, _ = np.polyfit(x[start:start + 5], y[start:start + 5], 2)
    place = -b / (2 * a) if a > 0 else x[lowest]
    place = float(np.clip(place, x[0], x[-1]))
    return place, bool(a > 0 and x[0] < place < x[-1])


# ---- loss ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def held_out_loss(model, config, n, first=0, batch=32):
    """Mean loss of held-out pictures first, first + 1 ... at LEVELS times each, from fixed noise."""
    world, total, device = open_data(config).held_out(), 0.0, next(model.parameters()).device
    for start in range(first, first + n, batch):
        numbers = range(start, min(start + batch, first + n))
        x = to_tensor(np.stack([world.image(i, config["resolution"]) for i in numbers])).to(device)
        text = encode_captions([world.caption(i) for i in numbers], config).to(device)       # x (b, 3, H, W), (b, L)
        for k in range(LEVELS):
            eps = normals([("exam", 0, i, k) for i in numbers], x.shape[1:], device)         # (b, 3, H, W)
            t = torch.full((len(x),), (k + 0.5) / LEVELS, device=device)
            total += float(diffusion_loss(model, x, text, t, eps, config).sum())
    return total / (n * LEVELS)


def transplant(parent, weights, seed, keep_shell):
    """
    The parent's model with text encoding and blocks out of `weights` (None: first weights); its time encoding stays,
    and its shell if that is kept: else the shell has first weights too, the same for all cores of a seed.
    """
    torch.manual_seed(seed)
    model, own = build(parent["config"]), ema_weights(parent)
    core = {k: v for k, v in (weights or {}).items() if k.startswith("core.") and not k.startswith("core.time.")}
    kept = {k: v for k, v in own.items() if k.startswith("core.time.") or keep_shell and k.startswith("shell.")}
    model.load_state_dict({**model.state_dict(), **kept, **core})
    return model


def fit_shell(model, config, steps, seed):
    """Train the shell (and time encoding) round a core that stays: AdamW, the config's rate, down to 0 in a line."""
    freeze_core(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["lr"], betas=(config["beta1"], config["beta2"]), weight_decay=0.0)
    batches = Batches(open_data(config), config, False, "refit")
    for step in range(steps):
        x, text = (part.to(trained[0].device) for part in batches[step][:2])       # (b, 3, H, W), (b, L)
        offset = float(uniforms(1, "times", "refit", seed, step)[0])
        t = (torch.arange(len(x)) / len(x) + offset / len(x)).to(x.device)
        eps = normals([("noise", "refit", seed, step, row) for row in range(len(x))], x.shape[1:], x.device)
        warmed = min(1, (step + 1) / max(1, config["warmup"]))
        optimizer.param_groups[0]["lr"] = config["lr"] * warmed * (1 - step / steps)
        diffusion_loss(model, x, text, t, eps, config).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, config["clip"] or math.inf)
        optimizer.step()
        model.zero_grad()


# ---- costs -----------------------------------------------------------------------------------------------------------

def gflop_of_step(config, freeze, images):
    """Of a forward and backward, counted on shapes alone."""
    shape = {key: value for key, value in config.items() if key not in ("seed", "steps", "snapshots", "lr", "muon_lr")}
    return images * gflop_of_image(tuple(sorted(shape.items())), freeze)


@functools.lru_cache(64)                                       # building a model takes a second
def gflop_of_image(items, freeze):
    """The same for one image; `items` are those of the config."""
    config = dict(items)

    def model():
        net = build(config)
        if freeze:
            freeze_core(net)
        return net

    def loss(net, b):
        x, t, text = example(config, b)
        return diffusion_loss(net, x, text, t, x, config).sum()
    return count_flops(model, loss) / 1e9


def timed_saving(side, repeats):
    """[1 - seconds with merged keys / without] of a block of PixArt-Sigma, the two in turn."""
    blocks, spent = [init_weights(Block(1152, 16, 4, r)) for r in (1, 2)], []
    x, text = torch.randn(1, side * side, 1152), torch.randn(1, 300, 1152)
    modulation, real = torch.zeros(1, 6, 1152), torch.tensor([300])
    with torch.no_grad():
        for _ in range(repeats + 1):                           # the first warms up
            for block in blocks:
                start = time.perf_counter()
                block(x, modulation, text, real, (side, side))
                spent.append(time.perf_counter() - start)
    return [1 - merged / plain for plain, merged in zip(spent[2::2], spent[3::2])]
