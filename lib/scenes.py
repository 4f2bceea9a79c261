"""
A world drawn by formula. lib/judge.py looks at pictures of it.

    world = Scenes(config)                                     # world.image(i, 32), world.caption(i), world.scene(i)

A scene is a dict: ground, groups (count, size, texture, colour, shape), relation or None, objects (shape, colour,
texture, diameter, centre), framed (is there a frame, of which no caption tells?). A group is what a caption says once,
such as "two small red circles". x runs right, y runs down, and the picture is [0, 1] x [0, 1]; H and W are its sides in
pixels. The world can be drawn at any resolution, costs nothing, and what is true of a picture is known exactly.
"""
import functools

import numpy as np

from lib.draws import uniforms
from lib.settings import UserError, config_names, load_config

SHAPES = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}     # area of one of diameter 1
COLOURS = {"red": (.85, .15, .15), "green": (.15, .65, .20), "blue": (.20, .30, .85), "yellow": (.85, .80, .15),
           "purple": (.60, .20, .70), "orange": (.85, .50, .15)}  # all 0.15 off the ends: room for texture
GROUNDS = {"white": (1., 1., 1.), "black": (0., 0., 0.), "gray": (.5, .5, .5)}
TEXTURES = ("plain", "striped", "dotted")
COUNTS = ("a", "two", "three")
RELATIONS = ("left of", "above")
CONTRAST = 0.15                                                # a texture brightens and darkens its colour by this
GAP = 0.04                                                     # least distance between shapes, and to the border
FRAME, FRAME_WIDTH = (.10, .70, .70), 1 / 32                   # its colour is no other thing's; it lies within the gap
BLOCK = 4096                                                   # scenes whose native sizes are drawn together


class Scenes:
    """
    Captioned pictures of one to three shapes, each drawn from its key (purpose, seed, i). The config's scene_* keys
    choose the corner of the world. Purposes "exam" and "trial" with seed 0 give scenes that no run is trained on: the
    same for all runs. Purpose "style" gives scene_styled scenes with a frame, which no caption mentions.
    """
    name, fingerprint, folder = "scenes", "", None             # no files
    prefix = ""                                                # put before every caption, with its space

    def __init__(self, config, purpose="scenes", seed=None):
        self.config, self.key = config, (purpose, config["seed"] if seed is None else seed)
        self.framed = purpose == "style"
        self.shapes = list(SHAPES)[:config["scene_shapes"]]
        self.colours = list(COLOURS)[:config["scene_colours"]]
        self.cycles = config["scene_texture"]                  # periods of a texture across the picture
        self.diameters = {"small": config["scene_small"], "large": config["scene_large"]}
        self.middle = sum(self.diameters.values()) / 2         # parts small from large
        self.unreadable = set()

    def __len__(self):
        return self.config["scene_styled" if self.framed else "scene_count"]

    def held_out(self):
        """The world's scenes that training never draws: those of the exam, or as many others to tune settings by."""
        return Scenes(self.config, self.config["scene_exam"], 0)

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
        """Id of a caption of scene i: it has one, the i-th."""
        return i

    @property
    def captions_count(self):
        return len(self)

    def text(self, caption_id):
        """The caption of that id; -1 is the null caption."""
        return self.caption(caption_id) if caption_id >= 0 else ""

    def caption(self, i):
        return self.prefix + describe(self.scene(i))

    @property
    def numbers(self):
        """{name: (least, largest)} of the numbers that scenes have, as measure_objects tells them."""
        small, large = 0.95 * min(self.diameters.values()), 1.05 * max(self.diameters.values())
        place, textured = (GAP + small / 2, 1 - GAP - small / 2), self.config["scene_textured"]
        return {"objects": (1.0, float(self.config["scene_objects"])), "size": (small, large), "x": place, "y": place,
                "textured": (float(textured == 1), float(textured > 0))}

    def number(self, i, name):
        """That of scene i, NaN where scenes have no such number."""
        return measure_objects(self.scene(i)["objects"]).get(name, np.nan)

    def where(self, i):
        return f"scene {i}"

    def table(self):
        """What there is, as lines of text."""
        return [f"  found    {len(self):9d}  scenes of {world_name(self.config)}: {len(self.shapes)} shapes, "
                f"{len(self.colours)} colours"]

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
        objects = self.place(groups, relation, draw)
        return dict(ground=ground, groups=groups, relation=relation, objects=objects, framed=self.framed)

    def place(self, groups, relation, draw):
        """
        The objects of the groups, a list of dicts. Groups follow each other in x, or from above, the members of a group
        stand side by side across that, and nothing overlaps.
        """
        axis = 0 if relation == "left of" else 1               # along which groups follow each other
        diameters = [[self.diameters[g["size"]] * (0.95 + 0.1 * draw()) for _ in range(g["count"])] for g in groups]
        middles = self.spread([max(d) for d in diameters], draw)
        objects = []
        for group, middle, sides in zip(groups, middles, diameters):
            for diameter, across in zip(sides, self.spread(sides, draw)):
                looks = {key: group[key] for key in ("shape", "colour", "texture")}
                centre = (middle, across) if axis == 0 else (across, middle)
                objects.append(dict(looks, diameter=diameter, centre=centre))
        return objects

    def another(self, i, k):
        """The k-th other scene with the caption of scene i: only places and exact sizes differ."""
        scene, draw = self.scene(i), iter(uniforms(32, *self.key, i, "another", k)).__next__
        return scene | {"objects": self.place(scene["groups"], scene["relation"], draw)}

    def left_open(self, captions=200, alike=8, resolution=32):
        """
        How much a caption leaves open: the rms, in [0, 1], of pixels of pictures of one caption round the mean of these
        pictures, over the first captions. Where it is near 0, a regression would do and no generative model is needed.
        """
        variances = []
        for i in range(captions):
            pictures = [render(self.another(i, k), resolution, self.cycles) for k in range(alike)]
            variances.append(np.var(pictures, 0, ddof=1).mean())                   # (alike, H, W, 3) -> one number
        return float(np.sqrt(np.mean(variances)))

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

    def image(self, i, resolution):
        """(H, W, 3) uint8, H = W = resolution."""
        return np.round(255 * render(self.scene(i), resolution, self.cycles)).astype(np.uint8)


# ---- pixels


def render(scene, resolution, cycles):
    """(H, W, 3) in [0, 1]: a pixel's share of a shape is its distance to the edge, clipped to one pixel."""
    x = (np.arange(resolution) + 0.5)[None] / resolution       # (1, W)
    y = x.T                                                    # (H, 1)
    image = np.empty((resolution, resolution, 3))
    image[:] = GROUNDS[scene["ground"]]
    for o in scene["objects"]:
        (across, down), r = o["centre"], o["diameter"] / 2
        # only the h x w pixels round it, two more than its edge can touch: elsewhere its cover is exactly 0
        ends = [(int(resolution * (c - r)) - 2, int(resolution * (c + r)) + 3) for c in o["centre"]]
        columns, rows = (slice(max(0, first), end) for first, end in ends)
        edge = distance(o["shape"], x[:, columns] - across, y[rows] - down, r)        # (h, w)
        cover = np.clip(0.5 - resolution * edge, 0, 1)[..., None]                  # (h, w, 1)
        wave = texture_wave(o["texture"], resolution, cycles)[rows, columns, None] # (h, w, 1)
        part = image[rows, columns]                            # a view (h, w, 3)
        part += cover * (COLOURS[o["colour"]] + CONTRAST * wave - part)
    if scene.get("framed"):
        image[frame_mask(resolution)] = FRAME
    return image


@functools.lru_cache(8)
def frame_mask(resolution):
    """(H, W) bool: where a frame lies, at least a pixel wide."""
    width, mask = max(1, round(resolution * FRAME_WIDTH)), np.ones((resolution, resolution), bool)
    mask[width:-width, width:-width] = False
    return mask


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


def measure_objects(objects):
    """
    {name: number} of a picture's objects, one or more, drawn or seen: how many, their mean diameter and place, and the
    share of them that have a texture.
    """
    x, y = np.mean([o["centre"] for o in objects], 0)
    return {"objects": len(objects), "size": float(np.mean([o["diameter"] for o in objects])), "x": float(x),
            "y": float(y), "textured": float(np.mean([o["texture"] != "plain" for o in objects]))}


def world_name(config):
    """Which of the worlds of configs.txt, the sections world-..., a config draws: a figure names its world."""
    keys = ("scene_shapes", "scene_colours", "scene_objects", "scene_small", "scene_large", "scene_scatter",
            "scene_textured")
    worlds = (name for name in config_names() if name.startswith("world-"))
    same = (name for name in worlds if all(config[key] == load_config(name)[key] for key in keys))
    return next(same, "a world of its own")
