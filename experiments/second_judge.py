"""
Is the judge lenient? The same pictures, looked at by a second one that tells shapes and textures in another way.

    python -m experiments.second_judge out/toy/grow            beside real pictures; pip install scipy
    python -m experiments.second_judge G0 G1 G2 --n 300        several trainings: mean and spread

lib/judge.py asks which perfect shape overlaps a region best, and weighs edges by how far they are covered. This one
counts whole pixels: a shape is known by how much of its box it fills, by how far its middle lies below that of the box,
and by the spread of its pixels; a texture by how much neighbours differ. Both answer the same questions by the same
rules. What no question asks is told beside them: the noise in what should be of one colour.
"""
import sys

import numpy as np

from data import open_data
from eval import held_out_task
from experiments.sharpness import open_run
from experiments.trainings import mean_and_spread
from lib.judge import Look, judge, judge_answers, look
from lib.pictures import to_uint8
from lib.processes import join
from lib.scenes import COLOURS, CONTRAST, GROUNDS, SHAPES
from lib.settings import Parser, UserError
from sample import sample

# of perfect shapes: share of the box that is filled; middle of mass under that of the box, in heights of it; mean
# squared distance from the middle of mass over the area
SIGNS = {"circle": (np.pi / 4, 0, 1 / (2 * np.pi)), "square": (1, 0, 1 / 6), "triangle": (1 / 2, 1 / 6, 7 / 36),
         "cross": (5 / 9, 0, 29 / 150)}
SCALES = 0.2, 0.1, 0.03                                        # what counts as a difference of 1 in each
FURTHEST = 1.0                                                 # root of their squares' sum from which on it is a blob
COLUMNS = "dsg, judge", "dsg, second", "shapes, second", "relations, second", "answers alike", "noise"


def look_again(image, cycles):
    """
    What (H, W, 3) uint8 shows, a Look whose objects have no measure of fit; and how far pixels of the ground and of
    each object, off its edges, lie from the median there: [(3 pixels,)], the ground first. Frames are not known here.
    """
    from scipy import ndimage
    image, palette = image / 255.0, np.array(list(COLOURS.values()))               # (H, W, 3), (colours, 3)
    to_grounds = np.linalg.norm(image[:, :, None] - np.array(list(GROUNDS.values())), axis=-1)   # (H, W, grounds)
    which = np.bincount(to_grounds.argmin(-1).ravel()).argmax()                    # most pixels are ground
    to_colour = np.linalg.norm(image[:, :, None] - palette, axis=-1).min(-1)       # (H, W)
    label, count = ndimage.label(to_colour < to_grounds[..., which])
    objects, noise = [], [residual(image, ndimage.binary_erosion(label == 0, iterations=3, border_value=1))]
    for region in (label == k for k in range(1, count + 1)):
        inner = ndimage.binary_erosion(region)                 # off the edge, whose pixels mix two colours
        if region.sum() < region.size / 200 or not inner.any():
            continue
        colour = np.linalg.norm(palette - image[inner].mean(0), axis=1).argmin()
        objects.append(describe_pixels(region) | {"colour": list(COLOURS)[colour],
                                                  "texture": texture_of(image.mean(-1), inner, cycles)})
        noise.append(residual(image, ndimage.binary_erosion(inner)))
    return Look(list(GROUNDS)[which], objects, np.nan), noise


def describe_pixels(region):
    """(H, W) bool -> the shape that these pixels make, its diameter and middle of mass as shares of the side."""
    y, x = np.nonzero(region)                                  # (pixels,) each
    height, width = np.ptp(y) + 1, np.ptp(x) + 1
    fill = len(y) / (height * width)
    below = (y.mean() - (y.min() + y.max()) / 2) / height
    spread = (y.var() + x.var() + 1 / 6) / len(y)              # 1 / 6: a pixel's own
    far = {shape: np.linalg.norm((np.array((fill, below, spread)) - signs) / SCALES) for shape, signs in SIGNS.items()}
    shape = min(far, key=far.get)
    return {"shape": shape if far[shape] < FURTHEST else "blob",
            "diameter": (len(y) / SHAPES[shape]) ** 0.5 / len(region),
            "centre": ((x.mean() + 0.5) / len(region), (y.mean() + 0.5) / len(region))}


def texture_of(light, inner, cycles):
    """By how much neighbours in (H, W) differ inside a region: dots change across and down, stripes down alone."""
    least = 2 * CONTRAST * cycles / len(light)                 # half of what a perfect texture's do
    down = abs(np.diff(light, axis=0))[inner[1:] & inner[:-1]]                     # (pairs,)
    across = abs(np.diff(light, axis=1))[inner[:, 1:] & inner[:, :-1]]
    down, across = (len(pairs) and pairs.mean() > least for pairs in (down, across))
    return "plain" if not down else "dotted" if across else "striped"


def residual(image, region):
    """By how much the pixels of a region differ from its median, (3 pixels,)."""
    return (image[region] - np.median(image[region], 0)).ravel() if region.any() else np.empty(0)


def figures(images, world):
    """{column: number} of pictures [(H, W, 3) uint8] of the world's first captions; noise is an rms of [0, 1]."""
    scenes = [world.scene(i) for i in range(len(images))]
    first = [look(image, world.cycles) for image in images]
    second, noise = zip(*(look_again(image, world.cycles) for image in images))
    answers = [[answer for scene, seen in zip(scenes, looks) for *_, answer in judge_answers(scene, seen, world.middle)]
               for looks in (first, second)]
    again, alike = judge(world, scenes, list(second)), np.mean(np.equal(*answers))
    textured = [any(group["texture"] != "plain" for group in scene["groups"]) for scene in scenes]
    flat = np.concatenate([part for parts, some in zip(noise, textured) for part in (parts[:1] if some else parts)])
    values = (judge(world, scenes, first)["dsg"], again["dsg"], again["entities"], again["relations"], alike,
              np.sqrt(np.mean(flat ** 2)))
    return dict(zip(COLUMNS, map(float, values)))


def table(rows):
    """Markdown of {name: [figures of each training]}."""
    lines = [f"| pictures | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, runs in rows.items():
        lines.append(f"| {name} | {' | '.join(mean_and_spread([run[c] for run in runs], 3) for c in COLUMNS)} |")
    return "\n".join(lines)


def main():
    parser = Parser(__doc__, keys=())
    parser.add_argument("run", nargs="+", help="runs of one world and size: one, or several trainings")
    parser.add_argument("--n", type=int, default=300, help="pictures of each")
    args, _ = parser.parse_keys()
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UserError("regions are found by scipy: pip install scipy") from None
    join(600)
    runs = [open_run(path) for path in args.run]
    config = runs[0][1]
    keys = [key for key in config if key == "resolution" or key.startswith("scene_")]                # of the exam
    if args.n < 1 or any(its[key] != config[key] for _, its in runs for key in keys):
        raise UserError(f"{len(runs)} runs, --n {args.n}: give runs of one world and size, and n of at least 1")
    world, captions = open_data(config).held_out(), held_out_task(config, args.n).captions
    rows = {"drawn": [], "real": [figures([world.image(i, config["resolution"]) for i in range(args.n)], world)]}
    for path, (model, its) in zip(args.run, runs):
        images = to_uint8(sample(model, its, captions, bar=True))                  # (n, H, W, 3)
        rows["drawn"].append(figures(list(images), world))
        print(path, rows["drawn"][-1], sep="\n  ", file=sys.stderr)
    print(table(rows))


if __name__ == "__main__":
    main()
