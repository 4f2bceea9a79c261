"""
Does growing sharpen? The fidelity of a core's pictures and of the grown model's at one and the same number of pixels.

    python -m experiments.sharpness out/toy/pretrain out/toy/grow              one pair
    python -m experiments.sharpness P0 G0 P1 G1 P2 G2 --n 300                  several trainings: mean and spread

An edge that is off by a quarter of a large pixel is off by half of a small one, so that figures of pictures of two
sizes do not compare: the same edges, drawn with twice as many pixels a side, stand 3 dB lower. Here every run's
pictures, of the same captions, are scored at each size: those of the grown model pooled to the core's, and those of the
core enlarged (bicubic) to the grown model's, which is what somebody without a grown model would do.
"""
import sys

import torch
import torch.nn.functional as F

from data import open_data
from eval import held_out_task
from experiments.trainings import mean_and_spread
from lib.judge import fidelity, judge, look
from lib.pictures import to_uint8
from lib.processes import join
from lib.settings import Parser, UserError
from model import load
from sample import sample


def resized(x, side):
    """Pictures x (B, C, H, H) -> (B, C, side, side): pooled, or enlarged by bicubic interpolation."""
    if side <= x.shape[2]:
        return F.interpolate(x, (side, side), mode="area")
    return F.interpolate(x, (side, side), mode="bicubic").clamp(-1, 1)


def scores(x, world, sides):
    """{side: (dsg, PSNR in dB)} of pictures x (B, 3, H, W) of the world's first captions, at each number of pixels."""
    found = {}
    for side in sides:
        looks = [look(image, world.cycles) for image in to_uint8(resized(x, side))]
        questions = judge(world, [world.scene(i) for i in range(len(looks))], looks)
        found[side] = questions["dsg"], fidelity(looks)["psnr"]
    return found


def open_run(path):
    """(model, config) of a run that was trained on scenes."""
    model, config = load(path, "cuda" if torch.cuda.is_available() else "cpu")
    if config["data"] != "scenes":
        raise UserError(f"{path} was not trained on scenes, whose judge this takes: give a run of toy or speedrun")
    return model, config


def of_run(path, sides, n):
    """The scores of a run's pictures at these sizes, drawn as its own config says."""
    model, config = open_run(path)
    x = sample(model, config, held_out_task(config, n).captions, bar=True)         # (n, 3, H, W)
    return scores(x, open_data(config).held_out(), sides)


def table(pairs):
    """Markdown of [(scores of a core, scores of the grown model)], one for each training."""
    small, large = sorted(pairs[0][0])
    lines = [f"| pictures of | dsg, {small} px | fidelity, {small} px | dsg, {large} px | fidelity, {large} px |",
             "|---|---|---|---|---|"]
    for name, runs in zip(("the core", "the grown model"), zip(*pairs)):
        cells = [mean_and_spread([run[side][k] for run in runs], (3, 1)[k]) for side in (small, large) for k in (0, 1)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    # training by training: how good a core is shows in both, and is not what growing adds
    gains = [mean_and_spread([grown[side][1] - core[side][1] for core, grown in pairs], 1) for side in (small, large)]
    return "\n".join(lines + [f"| growing adds | | {gains[0]} dB | | {gains[1]} dB |"])


def main():
    parser = Parser(__doc__, keys=())
    parser.add_argument("run", nargs="+", help="a core and the model grown from it, as often as there are trainings")
    parser.add_argument("--n", type=int, default=300, help="pictures of each")
    args, _ = parser.parse_keys()
    if len(args.run) % 2 or args.n < 2:
        raise UserError(f"{len(args.run)} runs, --n {args.n}: give a core and a grown model, and n of at least 2")
    join(600)
    pairs = list(zip(args.run[::2], args.run[1::2]))
    sizes = [[load(path)[1]["resolution"] for path in pair] for pair in pairs]
    sides = sizes[0]                                           # px, of the core's pictures and of the grown model's
    if sides[0] >= sides[1] or any(pair != sides for pair in sizes):
        raise UserError(f"pictures of {sizes} px: give a core, then what was grown from it, of the same two sizes each "
                        "time")
    found = []
    for pair in pairs:
        found.append([of_run(path, sides, args.n) for path in pair])
        print(*pair, *found[-1], sep="\n  ", file=sys.stderr)
    print(table(found))


if __name__ == "__main__":
    main()
