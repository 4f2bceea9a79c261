"""
What growing avoids: a cascade trains on real pictures made small, and meets the pictures of its base when it draws
(Greedy Growing, Sec. 1 and 2; conditioning augmentation: Ho et al. 2022, Saharia et al. 2022).

    python -m experiments.cascade                      three seeds: trains what is missing, scores it, prints the tables
    python -m experiments.cascade --seeds 0 --n 40     a look at one
    python -m experiments.cascade --models out/few     with cores and grown models that are there: SEED/toy/pretrain ...

OUT/SEED/toy/pretrain is the core that grows to OUT/SEED/toy/grow and the base of both cascades, OUT/SEED/augmented/toy/
cascade and OUT/SEED/plain/toy/cascade, which never saw noise on a small picture. A cascade takes as many steps as cost
the FLOPs of growing, so that both ways from the core to large pictures cost the same. What is there is not made again,
so the same command goes on after a stop. OUT/tables.md has three tables, OUT/pictures.png a caption a row.

1. dsg and fidelity of a cascade's pictures when what it enlarges is true, the world's own picture made small as in
   training, and when the base has drawn it; the difference is the gap. The base has learned what the world draws at
   its own size, which is part of the gap. Beside it the base's own pictures and `grow`.
2. Is the small picture used? A cascade is given a caption and the true small picture of the next one: its pictures are
   judged by the questions of both.
3. What each way costs, in training and for a picture.

All draw the same captions, each by 20 steps of dpm, the base by its own sampler.
"""
import os
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F

from data import open_data
from eval import held_out_task
from experiments.trainings import mean_and_spread, once, train
from lib.checkpoint import checkpoint_hash
from lib.conditions import count_columns
from lib.files import atomic_write
from lib.pictures import contact_sheet, to_tensor, to_uint8, write_png
from lib.plan import count_flops
from lib.processes import join
from lib.runs import is_finished
from lib.settings import Parser, UserError, load_config, parse_numbers
from model import build, diffusion_loss, example, freeze_core, load
from objectives import cascade_loss
from sample import count_evaluations, sample

LEVELS = 0.0, 0.14, 0.28, 0.5                                  # of noise: none, and logsnr 3, 1.5 and 0
CASCADES = {                                                   # name -> (keys of its training, levels at sampling)
    "augmented": ({}, LEVELS),
    # never told of noise, so that there is one level only to draw at
    "plain": ({"augmentation": 0.0, "augmentation_sample": 0.0}, LEVELS[:1])}
SAMPLING = {"sampler": "dpm", "sample_steps": 20}
# whose pictures (a key of CASCADES, "base" or "grow"), whose small pictures it enlarges, with how much noise on them
Row = namedtuple("Row", "model low level", defaults=("", 0.0))
ALONE = [Row("base"), Row("grow")]
GAPS = [(Row(name, "true", level), Row(name, "drawn", level)) for name in CASCADES for level in CASCADES[name][1]]
SWAPPED = [Row(name, "another", level) for name in CASCADES for level in CASCADES[name][1]]


# ----------------------------------------------------------------------------------------------------------------------
# Trainings, at equal FLOPs


def training_flops(stage, keys):
    """FLOPs of a step of this stage of toy, forward and backward of a batch; frozen weights have no gradient."""
    config = load_config("toy", stage, list(keys.items()))

    def make():
        model = build(config)
        if stage == "grow":
            freeze_core(model)
        return model

    def loss(model, images):
        x, t, text = example(config, images)
        told = torch.zeros(images, count_columns(config))
        if config["low_resolution"]:
            return cascade_loss(model, x, text, t, torch.stack([x, x], 1), config, told).sum()
        return diffusion_loss(model, x, text, t, x, config, told).sum()
    return config["batch"] * count_flops(make, loss)


def equal_steps(keys):
    """Steps of the cascade that cost what those of growing do, unless the command line tells how many."""
    if "steps" in keys:
        return int(keys["steps"])
    steps = load_config("toy", "grow", list(keys.items()))["steps"]
    return round(steps * training_flops("grow", keys) / training_flops("cascade", keys))


def train_all(folder, models, seed, keys):
    """The core, the model grown from it and both cascades above it; `keys` are for all."""
    for stage in ("pretrain", "grow"):
        if not is_finished(os.path.join(models, "toy", stage)):
            train(models, stage, seed, keys)
    for name, (own, _) in CASCADES.items():
        base = os.path.join(models, "toy", "pretrain")
        train(os.path.join(folder, name), "cascade", seed, keys, base=base, steps=equal_steps(keys), **own)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and scores


class Pictures:
    """The pictures of all rows, for one seed's trainings: of the first n held-out captions."""

    def __init__(self, folder, models, n):
        self.folder, self.models, self.n, self.base = folder, models, n, None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def run_of(self, row):
        """The run folder whose weights draw a row."""
        if row.model in CASCADES:
            return os.path.join(self.folder, row.model, "toy", "cascade")
        return os.path.join(self.models, "toy", "pretrain" if row.model == "base" else "grow")

    def small(self, config, low):
        """(n, 3, h, w): what is enlarged. `another` is the true one of the next caption, of the last the first's."""
        if low == "drawn":                                    # drawn once, by the base's own sampler
            if self.base is None:
                net, its = load(self.run_of(Row("base")), self.device)
                self.base = sample(net, its, held_out_task(its, self.n).captions, bar=True)
            return self.base
        world = open_data(config).held_out()
        images = [world.image(i % len(world), config["resolution"]) for i in range(self.n)]
        true = F.avg_pool2d(to_tensor(np.stack(images)), config["resolution"] // config["low_resolution"])
        return true.roll(-1, 0) if low == "another" else true

    def of(self, row):
        """(n, H, W, 3) uint8"""
        if row.model == "base":
            return to_uint8(self.small(None, "drawn"))
        net, config = load(self.run_of(row), self.device)
        config |= SAMPLING | {"augmentation_sample": row.level}
        if row.low == "drawn" and config["base_id"] != checkpoint_hash(self.run_of(Row("base"))):
            raise UserError(f"{self.run_of(row)} was not trained above {self.run_of(Row('base'))}: give the --models "
                            "that it was made with, or another --out")
        low = self.small(config, row.low) if row.low else None
        return to_uint8(sample(net, config, held_out_task(config, self.n).captions, bar=True, low=low))

    def score(self, row):
        """{"dsg", "psnr"}, and where the small picture is another's "other": dsg by that one's caption."""
        about = {"weights": checkpoint_hash(self.run_of(row)), "n": self.n, "row": list(row),
                 "base": checkpoint_hash(self.run_of(Row("base"))) if row.low == "drawn" else ""}
        file = os.path.join(self.folder, "-".join(map(str, filter(None, row))) + ".json")

        def work():
            print(f"{self.folder}: {' '.join(map(str, row))}", flush=True)
            task = held_out_task(load(self.run_of(row))[1], self.n)
            looks = [task.look(image, i) for i, image in enumerate(self.of(row))]
            figures = {"dsg": task.metrics["questions"](looks)["dsg"], "psnr": task.metrics["fidelity"](looks)["psnr"]}
            if row.low == "another":                         # of picture i the one of caption i + 1
                figures["other"] = task.metrics["questions"](looks[-1:] + looks[:-1])["dsg"]
            return figures
        return once(file, about, work)


# ----------------------------------------------------------------------------------------------------------------------
# Tables and pictures


def gap_table(scores):
    """Markdown of {row: [figures of each seed]}: on true small pictures, on the base's, and the mean of differences."""
    kinds = ("dsg", 3), ("psnr", 1)
    titles = [f"{name}, {what}" for name in ("dsg", "dB") for what in ("true", "drawn", "gap")]
    lines = [f"| | noise | {' | '.join(titles)} |", "|---|---|" + 6 * "---|"]
    for row in ALONE:
        cells = [cell for kind, digits in kinds
                 for cell in ("", mean_and_spread([r[kind] for r in scores[row]], digits), "")]
        lines.append(f"| {row.model}{', at 32 px' * (row.model == 'base')} | | {' | '.join(cells)} |")
    for true, drawn in GAPS:
        cells = []
        for kind, digits in kinds:
            one, two = ([r[kind] for r in scores[row]] for row in (true, drawn))
            # seed by seed: how good a training is shows in both, so the spread of the gap is without it
            values = one, two, [a - b for a, b in zip(one, two)]
            cells += [mean_and_spread(v, digits) for v in values]
        lines.append(f"| cascade, {true.model} | {true.level:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def use_table(scores):
    """Markdown: of which caption is the picture, if the small picture is another caption's?"""
    lines = ["| given another's small picture | noise | dsg by its caption | dsg by the small picture's |",
             "|---|---|---|---|"]
    for row in SWAPPED:
        cells = [mean_and_spread([r[key] for r in scores[row]], 3) for key in ("dsg", "other")]
        lines.append(f"| cascade, {row.model} | {row.level:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def evaluation_flops(stage, keys):
    """FLOPs of the network for one z, forward alone: a third of a step's where nothing is frozen."""
    config = load_config("toy", stage, list(keys.items()))
    # scratch is the network of grow with nothing frozen: a backward is worth two forwards there
    return training_flops("scratch" if stage == "grow" else stage, keys) / config["batch"] / 3


def cost_table(keys):
    """Markdown: FLOPs of both ways, with guidance; `grow` draws at once, a cascade after its base."""
    config = {stage: load_config("toy", stage, list(keys.items())) for stage in ("pretrain", "grow", "cascade")}
    steps = {stage: c["steps"] for stage, c in config.items()} | {"cascade": equal_steps(keys)}
    training = {stage: steps[stage] * training_flops(stage, keys) for stage in steps}
    calls = {}
    for stage, c in config.items():
        c |= SAMPLING if stage != "pretrain" else {}
        calls[stage] = count_evaluations(c, c["sampler"], c["sample_steps"], c["guidance"])
    drawing = {stage: calls[stage] * evaluation_flops(stage, keys) for stage in steps}
    lines = ["| | steps above the core | training, TFLOP | a picture, GFLOP |", "|---|---|---|---|"]
    for stage in ("grow", "cascade"):
        total = drawing[stage] + drawing["pretrain"] * (stage == "cascade")
        lines.append(f"| {stage} | {steps[stage]} | {(training['pretrain'] + training[stage]) / 1e12:.1f} | "
                     f"{total / 1e9:.1f} |")
    return "\n".join(lines) + "\n"


def draw(pictures, file):
    """A caption a row: small pictures and what becomes of them."""
    config = load(pictures.run_of(Row("augmented")))[1]
    side, sampled, titles, columns = config["resolution"], config["augmentation_sample"], [], []
    for low in ("true", "drawn", "another"):
        small = to_uint8(pictures.small(config, low))
        titles.append(f"small picture: {low}")
        columns.append(small.repeat(side // small.shape[1], 1).repeat(side // small.shape[2], 2))
        for name in CASCADES:
            titles.append(f"{name} cascade")
            columns.append(pictures.of(Row(name, low, sampled * (name == "augmented"))))
    titles.append("grow")
    columns.append(pictures.of(Row("grow")))
    images = [column[row] for row in range(pictures.n) for column in columns]
    write_png(file, contact_sheet(np.stack(images), titles * pictures.n, len(columns), most=128))
    print(file, *held_out_task(config, pictures.n).captions, sep="\n  ")


def main():
    parser = Parser(__doc__)                                   # takes any key of configs.txt too, for all trainings
    parser.add_argument("--seeds", default="0,1,2", help="of the trainings")
    parser.add_argument("--n", type=int, default=200, help="pictures for a score")
    parser.add_argument("--out", default="out/cascade", help="folder")
    parser.add_argument("--models", help="folder with SEED/toy/pretrain and SEED/toy/grow; default --out")
    args, keys = parser.parse_keys()
    keys = dict(keys)
    if args.n < 2:
        raise UserError(f"--n {args.n}: another's picture needs at least 2")
    join(600)
    rows = [*ALONE, *(row for pair in GAPS for row in pair), *SWAPPED]
    scores, places = {row: [] for row in rows}, []
    for seed in map(int, parse_numbers(args.seeds, "--seeds")):
        folder, models = (os.path.join(out, str(seed)) for out in (args.out, args.models or args.out))
        places.append((folder, models))
        train_all(folder, models, seed, keys)
        pictures = Pictures(folder, models, args.n)
        for row in rows:
            scores[row].append(pictures.score(row))
    text = "\n".join((gap_table(scores), use_table(scores), cost_table(keys)))
    atomic_write(os.path.join(args.out, "tables.md"), lambda f: f.write(text.encode()))
    print(text)
    draw(Pictures(*places[0], 5), os.path.join(args.out, "pictures.png"))


if __name__ == "__main__":
    main()
