"""
The judge of lib/scenes.py's world: what a picture shows, found without learned weights, and figures made of that.

    seen = look(image, world.cycles)                           # a Look: ground, objects, psnr, framed
    judge(world, scenes, looks)                                # the captions' questions and their answers
    fidelity(looks)                                            # how clean the pictures are
    diversity(world, numbers, looks)                           # do noises make different pictures of one caption?

An object is a dict as in a scene, its centre that of mass, with two keys more: `nearest`, the shape that fits it best,
and `fit`, how well. H and W are a picture's sides in pixels.
"""
import functools
import itertools
from collections import namedtuple

import numpy as np

from lib.questions import dsg_corpus, dsg_score
from lib.scenes import COLOURS, CONTRAST, FRAME, GROUNDS, SHAPES, TEXTURES, distance, frame_mask, render, texture_wave

# what `look` sees; powers: at high frequencies, of the picture and of the world's drawing of what was seen in it
Look = namedtuple("Look", "ground objects psnr framed powers", defaults=[False, (np.nan, np.nan)])

# ----------------------------------------------------------------------------------------------------------------------
# The judge: picture -> objects


def look(image, cycles, least_fit=0.75):
    """
    What (H, W, 3) uint8 shows, as a Look. An object is a connected region of colours other than the ground's,
    at least 0.5 % of the picture. Its shape is the one whose template of equal area and centre overlaps it best
    (intersection over union of soft cover); under `least_fit` it is a "blob", which answers no question about shapes.
    A frame is taken off first: all else is judged as if what lies inside went on under it.
    """
    image, side = image / 255.0, len(image)                    # (H, W, 3) in [0, 1]
    if framed := has_frame(image):
        width = int(frame_mask(side)[side // 2].argmin())      # pixels
        image = np.pad(image[width:-width, width:-width], ((width, width), (width, width), (0, 0)), "edge")
    edges = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])       # (2 H + 2 W, 3)
    border = np.median(edges, 0)                               # (3,): the ground, unless shapes touch the border
    ground = min(GROUNDS, key=lambda name: np.square(border - GROUNDS[name]).sum())
    back, palette = np.array(GROUNDS[ground]), np.array(list(COLOURS.values()))    # (3,), (colours, 3)
    to_colour = np.square(image[:, :, None] - palette).sum(-1).min(-1)             # (H, W), to the nearest colour
    label = components(to_colour < np.square(image - back).sum(-1))  # nearer to a colour than to the ground
    objects = [describe_region(image, label == k, back, palette, cycles, least_fit)
               for k, size in zip(*np.unique(label[label > 0], return_counts=True)) if size >= side * side / 200]
    drawn = redraw(ground, objects, side, cycles)
    return Look(ground, objects, psnr(image, drawn), framed, (high_power(image), high_power(drawn)))


def has_frame(image):
    """Is at least nine tenths of the border of (H, W, 3) in [0, 1] nearer to a frame's colour than to any ground's?"""
    colours = np.array([FRAME, *GROUNDS.values()])             # (1 + grounds, 3)
    distances = np.square(image[frame_mask(len(image))][:, None] - colours).sum(-1)           # (pixels, 1 + grounds)
    return bool((distances.argmin(1) == 0).mean() >= 0.9)


def components(mask):
    """
    (H, W) bool -> (H, W) int: 4-connected pixels share a number, 0 is outside. Ours, since scipy is not required. Each
    pixel starts as its own number, takes the largest of its neighbours', and then that of the pixel which this number
    names: the reach doubles each time.
    """
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        reached = neighbourhood(label).max(0) * mask           # the largest of five
        reached = reached.ravel()[reached - 1] * mask          # number k names pixel k - 1; outside, any pixel times 0
        if (reached == label).all():                           # each region now has one number, its largest
            return label
        label = reached


def neighbourhood(x):
    """(H, W) -> (5, H, W): x and its four shifts, zeros beyond the border. all(0) erodes a mask, any(0) dilates it."""
    p = np.pad(x, 1)
    return np.stack([x, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]])


def describe_region(image, region, back, palette, cycles, least_fit):
    """One region of `look` -> an object: diameter and centre as shares of the side, the centre being that of mass."""
    side, around = len(image), neighbourhood(region)
    inner = around.all(0) if around.all(0).any() else region   # without its edge, whose pixels mix two colours
    mean = image[inner].mean(0)                                # (3,)
    toward = (mean - back) / np.square(mean - back).sum()      # projects a pixel: 0 is ground, 1 the shape's colour
    cover = np.where(inner, 1, np.clip((image - back) @ toward, 0, 1) * around.any(0))   # (H, W): edges count in part
    area, (y, x) = cover.sum(), np.mgrid[:side, :side] + 0.5   # pixel centres, (H, W)
    x0, y0 = (cover * x).sum() / area, (cover * y).sum() / area                    # centre of mass, pixels
    fits = {}
    for shape in SHAPES:
        ideal = template(shape, round(area, 1), round(x0, 1), round(y0, 1), side)  # rounded, so that the cache hits
        fits[shape] = np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum()   # intersection over union
    shape = max(fits, key=fits.get)
    light = (image - mean).mean(-1) * inner                    # (H, W), what a texture adds
    strength = {"plain": CONTRAST / 2}                         # a texture counts from half its contrast on
    for texture in TEXTURES[1:]:
        wave = texture_wave(texture, side, cycles) * inner     # (H, W), what it should add
        strength[texture] = (light * wave).sum() / max(np.square(wave).sum(), 1e-9)     # its amplitude
    return dict(shape=shape if fits[shape] >= least_fit else "blob", texture=max(strength, key=strength.get),
                colour=list(COLOURS)[np.square(palette - mean).sum(1).argmin()], fit=fits[shape], nearest=shape,
                diameter=np.sqrt(area / SHAPES[shape]) / side, centre=(x0 / side, y0 / side))


@functools.lru_cache(20000)
def template(shape, area, x0, y0, side):
    """(side, side) cover of a perfect shape with this area (pixels) and centre of mass (pixels)."""
    diameter = np.sqrt(area / SHAPES[shape])                   # pixels
    x, y = np.meshgrid(np.arange(side) + 0.5 - x0, np.arange(side) + 0.5 - y0)  # (side, side), from the centre of mass
    lower = diameter / 6 if shape == "triangle" else 0         # its mass lies below the middle of its box
    return np.clip(0.5 - distance(shape, x, y + lower, diameter / 2), 0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# The questions: caption and objects -> answers


def judge_answers(scene, seen, middle):
    """
    The caption's questions and the judge's answers: a list of (category, parents, 0 or 1), parents being places in the
    list. Each group of the caption is answered by an object of its own, or by none. `middle` parts small from large.
    """
    groups = scene["groups"]
    chosen = assign(scene, seen.objects, middle)
    questions, entities = [("global", (), seen.ground == scene["ground"])], []
    for group, thing in zip(groups, chosen):
        shape, size, colour, texture = matches(group, thing, middle)
        parents = (len(questions),)  # attributes and counts are those of a shape that is there
        entities += parents
        questions.append(("entities", (), shape))
        questions += [("attributes", parents, size), ("attributes", parents, colour)]
        if group["texture"] != "plain":                        # which a caption does not mention
            questions.append(("attributes", parents, texture))
        if group["count"] > 1:
            questions.append(("counts", parents, count_alike(group, seen.objects) == group["count"]))
    if scene["relation"]:                                      # both shapes must be there
        questions.append(("relations", tuple(entities), in_order(scene, chosen)))
    return [(category, parents, int(answer)) for category, parents, answer in questions]


def assign(scene, objects, middle):
    """An object or None for each group of the scene: of all ways the one with most answers right, shapes first."""
    groups = scene["groups"]

    def worth(chosen):
        answers = [matches(group, thing, middle) for group, thing in zip(groups, chosen)]
        return sum(shape for shape, *_ in answers), sum(map(sum, answers)) + in_order(scene, chosen)
    return max(itertools.permutations(objects + [None] * len(groups), len(groups)), key=worth)     # objects are few


def matches(group, thing, middle):
    """Does an object have the group's shape, size, colour, texture? Four booleans. `middle` parts small from large."""
    if thing is None:
        return [False] * 4
    size = "small" if thing["diameter"] < middle else "large"  # sizes lie 5 % about two means
    return [thing["shape"] == group["shape"], size == group["size"], thing["colour"] == group["colour"],
            thing["texture"] == group["texture"]]


def in_order(scene, chosen):
    """Are both groups there, the first left of the second or above it, as the scene has it?"""
    if scene["relation"] is None or None in chosen:
        return False
    axis = 1 if scene["relation"] == "above" else 0
    return chosen[0]["centre"][axis] < chosen[1]["centre"][axis]


def count_alike(group, objects):
    """How many objects have the group's shape and colour, whatever their size."""
    return sum(is_alike(o, group) for o in objects)


def is_alike(o, group):
    """Has an object the group's shape and colour?"""
    return o["shape"] == group["shape"] and o["colour"] == group["colour"]


def dsg_prompts(scenes, looks, middle):
    """A dict of answers, categories and parents for each scene, as dsg_corpus takes them."""
    prompts = []
    for scene, seen in zip(scenes, looks):
        questions = list(enumerate(judge_answers(scene, seen, middle), 1))         # from 1: 0 is the root
        prompts.append({"answers": {i: answer for i, (_, _, answer) in questions},
                        "categories": {i: category for i, (category, _, _) in questions},
                        "parents": {i: [p + 1 for p in parents] for i, (_, parents, _) in questions}})
    return prompts


def picture_scores(scenes, looks, middle):
    """[share of the caption's questions that are right] of each picture, whose mean is dsg."""
    return [dsg_score(prompt["answers"], prompt["parents"]) for prompt in dsg_prompts(scenes, looks, middle)]


def questions_score(scenes, looks, middle):
    """
    {"entities", "attributes", "relations", "counts", "global": share of questions right, "dsg": mean over captions of
    each caption's share}, by the rule of dsg_corpus, of what `look` returned for each scene. A kind of question that no
    caption has is nan.
    """
    score = dsg_corpus(dsg_prompts(scenes, looks, middle))
    order = ("entities", "attributes", "relations", "counts", "global")
    return {c: score.get(c, float("nan")) for c in order} | {"dsg": score["overall"]}


def judge(world, scenes, looks):
    """
    questions_score of what `look` returned for the pictures of these scenes, with chance_dsg: the same pictures, each
    judged by the next one's caption. A model that ignores its caption scores chance_dsg, which lies far above 0.
    """
    score = questions_score(scenes, looks, world.middle)
    return score | {"chance_dsg": questions_score(scenes[1:] + scenes[:1], looks, world.middle)["dsg"]}


def seen_features(looks):
    """
    What the judge sees as numbers, (n, 18): one-hot ground (3); how many objects, blobs, of each shape (4), colour
    (6); the first object's diameter and centre. For distances between two sets of pictures, as by a network's features.
    """
    rows = []
    for seen in looks:
        first = seen.objects[0] if seen.objects else {"diameter": 0.0, "centre": (0.5, 0.5)}
        rows.append([*(seen.ground == name for name in GROUNDS), len(seen.objects),
                     *(sum(o["shape"] == shape for o in seen.objects) for shape in ("blob", *SHAPES)),
                     *(sum(o["colour"] == colour for o in seen.objects) for colour in COLOURS),
                     first["diameter"], *first["centre"]])
    return np.array(rows, float)


def counting(scenes, looks):
    """
    {"1", "2", "3": share of the groups of so many of which the picture holds exactly so many, of their shape and
    colour} (Greedy Growing, appendix on counting, where people count). A number that no caption has is left out.
    """
    right = {}
    for scene, seen in zip(scenes, looks):
        for group in scene["groups"]:                          # one group, or two of different shape or colour
            right.setdefault(str(group["count"]), []).append(count_alike(group, seen.objects) == group["count"])
    return {count: float(np.mean(right[count])) for count in sorted(right)}


# ----------------------------------------------------------------------------------------------------------------------
# How clean a picture is, and how different pictures of one caption are


def fidelity(looks):
    """
    {"psnr": in dB, mean over pictures, "fit": mean over objects, "detail": power at high frequencies over that of the
    world's own drawings}: how far pictures are what the world could have drawn. Speckle, soft edges, wrong shapes and
    stray regions lower the first two; softness lowers detail, speckle raises it. Real renderings reach 50 dB, a fit of
    0.99 and a detail of 1.
    """
    fits = [o["fit"] for seen in looks for o in seen.objects]
    of_pictures, of_drawings = np.sum([seen.powers for seen in looks], 0)
    return {"psnr": float(np.mean([seen.psnr for seen in looks])), "fit": float(np.mean(fits)) if fits else np.nan,
            "detail": float(of_pictures / of_drawings) if of_drawings else np.nan}


def redraw(ground, objects, side, cycles):
    """The world's own drawing of what was seen in a picture, (side, side, 3) in [0, 1]."""
    seen = [o | {"shape": o["nearest"], "centre": middle_of_box(o)} for o in objects]
    return render({"ground": ground, "objects": seen}, side, cycles)


def psnr(image, drawn):
    """
    Peak signal-to-noise ratio, in dB, of a picture (H, W, 3) in [0, 1] against a drawing; 59 is no error but rounding.
    """
    rounding = 1 / 12 / 255 ** 2                               # mean square of what uint8 leaves out
    return float(-10 * np.log10(np.square(image - drawn).mean() + rounding))


def high_power(image):
    """
    Power of a picture (H, W, 3) at more than 1/4 of a cycle per pixel, half of the highest frequency along a side: what
    a blur takes first. The power at all frequencies is the mean square (Parseval).
    """
    power = np.abs(np.fft.fft2(image, axes=(0, 1), norm="forward")) ** 2           # (H, W, 3)
    y, x = np.fft.fftfreq(image.shape[0])[:, None], np.fft.fftfreq(image.shape[1])             # cycles per pixel
    return float(power[np.hypot(y, x) > 0.25].sum() / image.shape[2])


def middle_of_box(o):
    """A scene places a shape by its box, `look` finds its centre of mass: a triangle's lies lower."""
    x, y = o["centre"]
    return (x, y - o["diameter"] / 6) if o["nearest"] == "triangle" else (x, y)


def style(looks):
    """{"rate": share of pictures in the style that no caption asks for: with a frame}."""
    return {"rate": float(np.mean([seen.framed for seen in looks]))}


def diversity(world, numbers, looks, layouts=32):
    """
    Do noises make different pictures of one caption? `looks` holds as many for each of the scenes `numbers`, one scene
    after the other. {"places", "sizes": standard deviation of where a caption's groups stand (of their diameters) over
    noises, as a share of that over the world's own pictures of the caption; "narrow": share of captions under half of
    it in places}. 1 is right, 0 is one picture for each caption. Only pictures that show a group as the caption has it
    count, so ask this of a model that draws.
    """
    each, rest = divmod(len(looks), len(numbers))
    if rest:
        raise ValueError(f"{len(looks)} pictures of {len(numbers)} captions: each needs as many")
    narrow = []
    sums = np.zeros((2, 2))                                    # (model, world) x (place, size)
    for k, i in enumerate(numbers):
        scene = world.scene(i)
        truth = [world.another(i, layout)["objects"] for layout in range(layouts)]
        pictures = [seen.objects for seen in looks[k * each:(k + 1) * each]]
        pairs = [(variances(pictures, group), variances(truth, group)) for group in scene["groups"]]
        pairs = [pair for pair in pairs if pair[0] is not None]                    # groups shown twice or more
        if pairs:
            mine = np.sum(pairs, 0)                            # (model, world) x (place, size)
            sums += mine
            narrow.append(mine[0, 0] < mine[1, 0] / 4)         # of variances: half the deviation
    places, sizes = np.sqrt(sums[0] / sums[1]) if narrow else (np.nan, np.nan)
    return {"places": float(places), "sizes": float(sizes), "narrow": float(np.mean(narrow)) if narrow else np.nan}


def variances(pictures, group):
    """
    (of the place, of the diameter) of a group over pictures, lists of objects: of the mean of its members, and only of
    pictures that show the right number of them. None if fewer than two do.
    """
    shown = [[o for o in objects if is_alike(o, group)] for objects in pictures]
    shown = [alike for alike in shown if len(alike) == group["count"]]
    if len(shown) < 2:
        return None
    places = [np.mean([o["centre"] for o in alike], 0) for alike in shown]         # (pictures, 2)
    sizes = [np.mean([o["diameter"] for o in alike]) for alike in shown]           # (pictures,)
    return np.var(places, 0, ddof=1).sum(), np.var(sizes, ddof=1)
