"""
Style tuning of `toy`: a mixture with the data beside the style set alone, and Vermeer's four variants (Greedy Growing,
Sec. 6 and Tables 7 and 8).

    python -m experiments.styles                       trains what is missing, scores it, prints both tables: the first
                                                       of three seeds, the second of one (--ablation 0,1,2: of more)
    python -m experiments.styles --seeds 0 --n 40      a look at one
    python -m experiments.styles --models out/few      of models that are there: SEED/toy/grow in that folder

OUT/SEED/RUN/toy/style is a tuned model, OUT/SEED/mixture/toy/distill a student of one, OUT/SEED/*.json a score. What is
there is not made again, so the same command goes on after a stop, and commands for other seeds may run beside it.
OUT/pictures.png has a caption a row and the variants as columns, OUT/tables.md both tables. Every variant draws the
same captions from the same noise, by 20 steps of dpm, a student by its own 16. The style is a frame, of which neither
captions nor questions tell, so it can be asked for by the token alone.
"""
import os
from collections import namedtuple

import numpy as np
import torch

from data import Batches, open_data
from eval import evaluate, held_out_task
from experiments.trainings import mean_and_spread, once, train
from lib.draws import normals
from lib.encoders import open_autoencoder
from lib.files import atomic_write, file_hash
from lib.pictures import contact_sheet, to_uint8, write_png
from lib.processes import join
from lib.runs import is_finished
from lib.settings import Parser, UserError, parse_numbers
from lib.tasks import in_style
from model import diffusion_loss, load
from sample import is_student, sample

RUNS = {                                                       # (folder, stage) -> keys of its training
    ("mixture", "style"): {},                                  # the share of configs.txt
    ("alone", "style"): dict(style_share=1.0),
    ("mixture", "distill"): dict(style="scenes", objective="consistency", steps=300)}
WORDS = "with a frame"                                         # of prompt engineering: what is wanted, said in words
# whose pictures (a key of RUNS, or None for the model before), whether the token stands in the captions, words after
Variant = namedtuple("Variant", "title run token suffix")
FORGETTING = [Variant(*row) for row in (
    ("before", None, False, ""),
    ("mixture", ("mixture", "style"), False, ""), ("mixture, token", ("mixture", "style"), True, ""),
    ("alone", ("alone", "style"), False, ""), ("alone, token", ("alone", "style"), True, ""))]
# each row has all that those above it have
ABLATION = [FORGETTING[0]._replace(title="raw")] + [Variant(*row) for row in (
    ("+ prompt engineering", None, False, WORDS), ("+ style tuning", ("mixture", "style"), True, WORDS),
    ("+ distilled, 16 steps", ("mixture", "distill"), True, WORDS))]
METRICS = ("questions", "fidelity", "style", "fd", "mmd")


def train_all(folder, model, seed, keys, runs):
    """Those runs of one seed, and their model where there is none; `keys` are for all."""
    grown = os.path.join(model, "toy", "grow")
    if not is_finished(grown):
        train(model, "grow", seed, keys)
    for name, stage in runs:                                   # a student's teacher is the style run beside it
        core = {"core": grown} if stage == "style" else {}
        train(os.path.join(folder, name), stage, seed, keys, **core, **RUNS[name, stage])


def run_of(variant, folder, model):
    """The run folder that a variant samples from."""
    return os.path.join(folder, variant.run[0], "toy", variant.run[1]) if variant.run else \
        os.path.join(model, "toy", "grow")


def open_variant(variant, folder, model):
    """(model, config) that samples as the variant does; the style is looked for also where none was learned."""
    net, config = load(run_of(variant, folder, model), "cuda" if torch.cuda.is_available() else "cpu")
    config = in_style(config) if variant.token else config | {"style": "scenes"}
    own = {} if is_student(config) else {"sampler": "dpm", "sample_steps": 20}
    return net, config | own | {"suffix": variant.suffix}


@torch.no_grad()
def held_out_loss(model, config, n):
    """The loss of training on n held-out scenes, with their plain captions, each at a time and noise of its own."""
    exam = {"caption_dropout": 0.0, "condition_dropout": 0.0, "seed": 0, "batch": n, "scene_count": n}
    batches = Batches(open_data(config | exam).held_out(), config | exam, False)
    device = next(model.parameters()).device
    x, text, conditions = (part.to(device) for part in batches[0])
    x, times = open_autoencoder(config, device).encode(x), ((torch.arange(n) + 0.5) / n).to(device)
    eps = normals([("held-out loss", i) for i in range(n)], x.shape[1:], device)   # (n, C, H, W)
    parts = zip(*(part.split(50) for part in (x, text, times, eps, conditions)))
    return float(torch.cat([diffusion_loss(model, *part[:4], config, part[4]) for part in parts]).mean())


def score(variant, folder, model, n):
    """Metrics of n held-out captions, from a file of folder if that was made of these very weights at this n."""
    about = {"weights": file_hash(os.path.join(run_of(variant, folder, model), "last.pt")), "n": n,
             "token": variant.token, "suffix": variant.suffix}
    name = "-".join(variant.run or ("before",)) + "-token" * variant.token + "-words" * bool(variant.suffix)
    file = os.path.join(folder, f"{name}.json")

    def work():
        print(f"{folder}: {variant.title}", flush=True)
        net, config = open_variant(variant, folder, model)
        metrics = evaluate(net, config, n, metrics=METRICS)
        # the loss shows what dsg is too coarse for: neither sampler nor judge stands between; a student is no denoiser
        return metrics if is_student(config) else metrics | {"loss": held_out_loss(net, config, 5 * n)}
    return once(file, about, work)


def table(columns, scores):
    """Markdown of columns {title: (function of metrics, digits)} and rows {variant: [metrics of each seed]}."""
    lines = [f"| | {' | '.join(columns)} |", "|---|" + len(columns) * "---|"]
    for variant, results in scores.items():
        figures = [mean_and_spread([get(r) for r in results], digits) for get, digits in columns.values()]
        lines.append(f"| {variant.title} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


KINDS = ("entities", "attributes", "relations", "counts", "global")
FIRST = {"in the style": (lambda r: r["style"]["rate"], 3), "dsg": (lambda r: r["questions"]["dsg"], 3),
         "fidelity, dB": (lambda r: r["fidelity"]["psnr"], 1), "held-out loss": (lambda r: r["loss"], 5)}
SECOND = {"fd": (lambda r: r["fd_random"], 2), "mmd": (lambda r: r["mmd_random"], 3),
          **{name: FIRST[name] for name in ("in the style", "fidelity, dB", "dsg")},
          **{kind: (lambda r, kind=kind: r["questions"][kind], 3) for kind in KINDS}}


def draw(variants, folder, model, file, captions=5):
    """A caption a row, a variant a column, from the same noise."""
    columns = []                                               # (captions, H, W, 3) each
    for variant in variants:
        net, config = open_variant(variant, folder, model)
        columns.append(to_uint8(sample(net, config, held_out_task(config, captions).captions)))
    images = [column[row] for row in range(captions) for column in columns]
    titles = [variant.title for variant in variants] * captions
    write_png(file, contact_sheet(np.stack(images), titles, len(variants), most=128))
    print(file, *held_out_task(config, captions).captions, sep="\n  ")


def main():
    parser = Parser(__doc__)                                   # takes any key of configs.txt too, for all trainings
    parser.add_argument("--seeds", default="0,1,2", help="of the trainings")
    parser.add_argument("--ablation", default="0", help="those of them for the second table")
    parser.add_argument("--n", type=int, default=200, help="pictures for a score")
    parser.add_argument("--out", default="out/styles", help="folder")
    parser.add_argument("--models", help="folder with the models to tune, SEED/toy/grow; default --out")
    args, keys = parser.parse_keys()
    if args.n < 2:
        raise UserError(f"--n {args.n}: a Frechet distance needs at least 2")
    join(600)
    seeds, ablation = parse_numbers(args.seeds, "--seeds"), parse_numbers(args.ablation, "--ablation")
    places = [[os.path.join(out, str(int(seed))) for out in (args.out, args.models or args.out)] for seed in seeds]
    scores = {variant: [] for variant in FORGETTING + ABLATION}
    for seed, place in zip(seeds, places):
        variants = FORGETTING + ABLATION * (seed in ablation)
        runs = [run for run in RUNS if any(run == variant.run for variant in variants)]
        train_all(*place, int(seed), dict(keys), runs)
        for variant in variants:
            scores[variant].append(score(variant, *place, args.n))
    shown = [(FIRST, FORGETTING), (SECOND, ABLATION)][:1 + bool(scores[ABLATION[0]])]
    text = "\n".join(table(columns, {variant: scores[variant] for variant in variants}) for columns, variants in shown)
    atomic_write(os.path.join(args.out, "tables.md"), lambda f: f.write(text.encode()))
    print(text)
    at = next((place for seed, place in zip(seeds, places) if seed in ablation), places[0])    # has all that is drawn
    draw([*FORGETTING, *ABLATION[-1:] * (len(shown) > 1)], *at, os.path.join(args.out, "pictures.png"))


if __name__ == "__main__":
    main()
