"""
A world drawn by formula, and the judge that looks at pictures of it.

    world = Scenes(config)                                     # world.image(i, 32), world.caption(i), world.scene(i)
    ground, objects = look(image, world.cycles)                # what a picture shows, without learned weights
    judge_answers(world.scene(i), ground, objects, world.middle)                   # the caption's questions and answers

A scene is a dict: ground, groups (count, size, texture, colour, shape), relation or None, objects (shape, colour,
texture, diameter, centre). A group is what a caption says once, such as "two small red circles". x runs right, y runs
down, and the picture is [0, 1] x [0, 1]; H and W are its sides in pixels. The world can be drawn at any resolution,
costs nothing, and what is true of a picture is known exactly.
"""
import functools
import itertools

import numpy as np

from lib.draws import uniforms
from lib.questions import dsg_corpus
from lib.settings import UserError

SHAPES = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}     # area of one of diameter 1
COLOURS = {"red": (.85, .15, .15), "green": (.15, .65, .20), "blue": (.20, .30, .85), "yellow": (.85, .80, .15),
           "purple": (.60, .20, .70), "orange": (.85, .50, .15)}  # all 0.15 off the ends: room for texture
GROUNDS = {"white": (1., 1., 1.), "black": (0., 0., 0.), "gray": (.5, .5, .5)}
TEXTURES = ("plain", "striped", "dotted")
COUNTS = ("a", "two", "three")
RELATIONS = ("left of", "above")
CONTRAST = 0.15                                                # a texture brightens and darkens its colour by this
GAP = 0.04                                                     # least distance between shapes, and to the border
BLOCK = 4096                                                   # scenes whose native sizes are drawn together

# ----------------------------------------------------------------------------------------------------------------------
# The world


class Scenes:
    """
    Captioned pictures of one to three shapes, each drawn from its key (purpose, seed, i). The config's scene_* keys
    choose the corner of the world. Purpose "exam" and seed 0 give the scenes that no run is trained on: the same for
    all runs.
    """
    name, fingerprint, folder = "scenes", "", None             # no files

    def __init__(self, config, purpose="scenes", seed=None):
        self.config, self.key = config, (purpose, config["seed"] if seed is None else seed)
        self.shapes = list(SHAPES)[:config["scene_shapes"]]
        self.colours = list(COLOURS)[:config["scene_colours"]]
        self.cycles = config["scene_texture"]                  # periods of a texture across the picture
        self.diameters = {"small": config["scene_small"], "large": config["scene_large"]}
        self.middle = sum(self.diameters.values()) / 2         # parts small from large
        self.unreadable = set()

    def __len__(self):
        return self.config["scene_count"]

    def held_out(self):
        """The world's scenes that training never draws."""
        return Scenes(self.config, "exam", 0)

    # ---- a data set: what a real one answers too

    def size(self, i):
        """
        Native (width, height) in pixels: 27.5 % lie under scene_native, as in CC12M under 512 (Greedy Growing, Sec. 4).
        """
        side = int(self.native_sides(i // BLOCK)[i % BLOCK])
        return side, side

    def all_sizes(self):
        """int (n, 2): width, height."""
        blocks = range(-(-len(self) // BLOCK))                 # rounded up
        sides = np.concatenate([self.native_sides(block) for block in blocks])[:len(self)]
        return np.stack([sides, sides], 1)

    @functools.lru_cache(64)
    def native_sides(self, block):
        """The sides of scenes block * BLOCK and so on, int (BLOCK,): drawn together, because a generator costs more."""
        u = uniforms(BLOCK, *self.key, "sizes", block)
        return (self.config["scene_native"] * 2 ** (2 * u - 0.55)).astype(int)

    def view(self, i, height, width, uniforms, rule):
        """(H, W, 3) uint8, and top and left of the crop: a scene is drawn at the size wanted, so nothing is cut."""
        if height != width:
            raise UserError(f"scenes are square, unlike {height}x{width}: add {width}x{width} to aspects, or empty it")
        return self.image(i, height), 0, 0

    def choose(self, i, which=0.0, long=False):
        """Number of a caption of scene i: it has one, the i-th."""
        return i

    @property
    def captions_count(self):
        return len(self)

    def text(self, number):
        """The caption of that number; -1 is the null caption."""
        return self.caption(number) if number >= 0 else ""

    def caption(self, i):
        return describe(self.scene(i))

    def where(self, i):
        return f"scene {i}"

    def table(self):
        """What there is, as lines of text."""
        return [f"  found    {len(self):9d}  scenes of {len(self.shapes)} shapes and {len(self.colours)} colours"]

    # ---- what is in a scene, and where

    @functools.lru_cache(2 ** 16)                              # small worlds are laid out once
    def scene(self, i):
        """The scene of number i, a dict as above. Callers must not change it."""
        draw = iter(uniforms(64, *self.key, i)).__next__       # each call gives the next number
        most = self.config["scene_objects"]

        def pick(options):
            return options[int(draw() * len(options))]
        ground, relation, layout = pick(list(GROUNDS)), pick(RELATIONS), draw()
        three = most > 2 and draw() < 0.5                      # three objects, where the world allows them
        if most == 1 or layout < 0.45:                         # one group: a single shape, or several alike
            counts = [1 if most == 1 or layout < 0.25 else 3 if three else 2]
        else:                                                  # two groups and their relation
            counts = pick([[1, 2], [2, 1]]) if three else [1, 1]
        groups = []
        for count in counts:
            group = dict(count=count, shape=pick(self.shapes), colour=pick(self.colours))
            textured = draw() < self.config["scene_textured"]
            group["texture"] = pick(TEXTURES[1:]) if textured else "plain"
            group["size"] = "small" if count == 3 else pick(["small", "large"])
            groups.append(group)
        if len(groups) == 1:
            relation = None
        elif all(groups[0][k] == groups[1][k] for k in ("shape", "colour")):       # nothing could tell which is which
            groups[1]["shape"] = self.shapes[(self.shapes.index(groups[1]["shape"]) + 1) % len(self.shapes)]
        axis = 0 if relation == "left of" else 1               # along which groups follow each other
        return dict(ground=ground, groups=groups, relation=relation, objects=self.place(groups, axis, draw))

    def place(self, groups, axis, draw):
        """
        The objects of the groups, a list of dicts. Groups follow each other along `axis` (0 is x), the members of a
        group stand side by side across it, and nothing overlaps.
        """
        diameters = [[self.diameters[g["size"]] * (0.95 + 0.1 * draw()) for _ in range(g["count"])] for g in groups]
        middles = self.spread([max(d) for d in diameters], draw)
        objects = []
        for group, middle, sides in zip(groups, middles, diameters):
            for diameter, across in zip(sides, self.spread(sides, draw)):
                looks = {key: group[key] for key in ("shape", "colour", "texture")}
                centre = (middle, across) if axis == 0 else (across, middle)
                objects.append(dict(looks, diameter=diameter, centre=centre))
        return objects

    def spread(self, lengths, draw):
        """
        Centres of intervals of these lengths in [0, 1], in this order, at least GAP apart: with scene_scatter = 0
        evenly, with 1 anywhere in the free room.
        """
        scatter, n = self.config["scene_scatter"], len(lengths)
        room = max(0, 1 - sum(lengths) - GAP * (n + 1))
        before = sorted(draw() for _ in lengths)               # shares of the room before each: these never shrink
        centres, end = [], 0
        for k, (share, length) in enumerate(zip(before, lengths), 1):
            share = scatter * share + (1 - scatter) * k / (n + 1)
            centres.append(room * share + GAP * k + end + length / 2)
            end += length
        return centres

    # ---- pixels

    def image(self, i, resolution):
        """(H, W, 3) uint8, H = W = resolution."""
        return np.round(255 * self.render(self.scene(i), resolution)).astype(np.uint8)

    def render(self, scene, resolution):
        """(H, W, 3) in [0, 1]: a pixel's share of a shape is its distance to the edge, clipped to one pixel."""
        x = (np.arange(resolution) + 0.5)[None] / resolution                       # (1, W)
        y = x.T                                                                    # (H, 1)
        image = np.empty((resolution, resolution, 3))
        image[:] = GROUNDS[scene["ground"]]
        for o in scene["objects"]:
            edge = distance(o["shape"], x - o["centre"][0], y - o["centre"][1], o["diameter"] / 2)
            cover = np.clip(0.5 - resolution * edge, 0, 1)[..., None]              # (H, W, 1)
            wave = texture_wave(o["texture"], resolution, self.cycles)[..., None]  # (H, W, 1)
            image += cover * (COLOURS[o["colour"]] + CONTRAST * wave - image)
        return image


def distance(shape, x, y, r):
    """Signed distance (negative inside, near the edge to first order) to a shape of half-width r round the origin."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - r
    if shape == "triangle":                                    # apex up, base and height 2 r
        return np.maximum(y - r, (2 * abs(x) - (y + r)) / 5 ** 0.5)
    across, along = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    return np.maximum(across - r / 3, along - r)               # cross: two bars, each a third as wide as long


@functools.lru_cache(64)
def texture_wave(texture, resolution, cycles):
    """
    (H, W): a square wave of `cycles` periods averaged over each pixel. Its mean over a period is zero and its phase is
    locked to the grid, so at `cycles` pixels, and at every divisor of it, it vanishes exactly: detail for larger
    pictures.
    """
    if texture == "plain":
        return np.zeros((resolution, resolution))
    ramp = abs(np.linspace(0, cycles, resolution + 1) % 1 - 0.5)                   # an integral of the square wave
    wave = (ramp[:-1] - ramp[1:]) * resolution / cycles
    return np.outer(wave, wave if texture == "dotted" else np.ones(resolution))


def describe(scene):
    """'two small red circles above a large striped blue square on a white background'."""
    phrases = []
    for g in scene["groups"]:
        words = [COUNTS[g["count"] - 1], g["size"], g["texture"], g["colour"], g["shape"]]
        plural = "" if g["count"] == 1 else "es" if g["shape"] == "cross" else "s"
        phrases.append(" ".join(word for word in words if word != "plain") + plural)
    return f" {scene['relation']} ".join(phrases) + f" on a {scene['ground']} background"


# ----------------------------------------------------------------------------------------------------------------------
# The judge: picture -> objects


def look(image, cycles, least_fit=0.75):
    """
    What (H, W, 3) uint8 shows: (ground, objects). An object is a connected region of colours other than the ground's,
    at least 0.5 % of the picture. Its shape is the one whose template of equal area and centre overlaps it best
    (intersection over union of soft cover); under `least_fit` it is a "blob", which answers no question about shapes.
    """
    image, side = image / 255.0, len(image)                    # (H, W, 3) in [0, 1]
    edges = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])       # (2 H + 2 W, 3)
    border = np.median(edges, 0)                               # (3,): the ground, unless shapes touch the border
    ground = min(GROUNDS, key=lambda name: np.square(border - GROUNDS[name]).sum())
    back, palette = np.array(GROUNDS[ground]), np.array(list(COLOURS.values()))    # (3,), (colours, 3)
    to_colour = np.square(image[:, :, None] - palette).sum(-1).min(-1)             # (H, W), to the nearest colour
    label = components(to_colour < np.square(image - back).sum(-1))  # nearer to a colour than to the ground
    objects = [describe_region(image, label == k, back, palette, cycles, least_fit)
               for k, size in zip(*np.unique(label[label > 0], return_counts=True)) if size >= side * side / 200]
    return ground, objects


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
    """One region of `look` -> dict: shape, colour, texture, diameter (share of the side), centre (x, y), fit."""
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
                colour=list(COLOURS)[np.square(palette - mean).sum(1).argmin()], fit=fits[shape],
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


def judge_answers(scene, ground, objects, middle):
    """
    The caption's questions and the judge's answers: a list of (category, parents, 0 or 1), parents being places in the
    list. `ground` and `objects` are from `look`. Each group of the caption is answered by an object of its own, or by
    none.
    """
    groups = scene["groups"]
    chosen = assign(scene, objects, middle)
    questions, entities = [("global", (), ground == scene["ground"])], []
    for group, thing in zip(groups, chosen):
        shape, size, colour, texture = matches(group, thing, middle)
        parents = (len(questions),)  # attributes and counts are those of a shape that is there
        entities += parents
        questions.append(("entities", (), shape))
        questions += [("attributes", parents, size), ("attributes", parents, colour)]
        if group["texture"] != "plain":                        # which a caption does not mention
            questions.append(("attributes", parents, texture))
        if group["count"] > 1:
            questions.append(("counts", parents, count_alike(group, objects) == group["count"]))
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
    return sum(o["shape"] == group["shape"] and o["colour"] == group["colour"] for o in objects)


def questions_score(scenes, looks, middle):
    """
    {"entities", "attributes", "relations", "counts", "global": share of questions right, "dsg": mean over captions of
    each caption's share}, by the rule of dsg_corpus, of what `look` returned for each scene. A kind of question that no
    caption has is nan.
    """
    prompts = []
    for scene, (ground, objects) in zip(scenes, looks):
        questions = list(enumerate(judge_answers(scene, ground, objects, middle), 1))   # from 1: 0 is the root
        prompts.append({"answers": {i: answer for i, (_, _, answer) in questions},
                        "categories": {i: category for i, (category, _, _) in questions},
                        "parents": {i: [p + 1 for p in parents] for i, (_, parents, _) in questions}})
    score = dsg_corpus(prompts)
    order = ("entities", "attributes", "relations", "counts", "global")
    return {c: score.get(c, float("nan")) for c in order} | {"dsg": score["overall"]}


def judge(world, scenes, looks):
    """
    questions_score of what `look` returned for the pictures of these scenes, with chance_dsg: the same pictures, each
    judged by the next one's caption. A model that ignores its caption scores chance_dsg, which lies far above 0.
    """
    score = questions_score(scenes, looks, world.middle)
    return score | {"chance_dsg": questions_score(scenes[1:] + scenes[:1], looks, world.middle)["dsg"]}


def counting(scenes, looks):
    """
    {"1", "2", "3": share of the groups of so many of which the picture holds exactly so many, of their shape and
    colour} (Greedy Growing, appendix on counting, where people count). A number that no caption has is left out.
    """
    right = {}
    for scene, (_, objects) in zip(scenes, looks):
        for group in scene["groups"]:                          # one group, or two of different shape or colour
            right.setdefault(str(group["count"]), []).append(count_alike(group, objects) == group["count"])
    return {count: float(np.mean(right[count])) for count in sorted(right)}
