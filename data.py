"""
What goes in: settings, captioned pictures, and captions turned into tokens.

    python data.py show scenes --config toy --to sheet.png    look at a training batch after all transforms
    python data.py show PATH --resolution 64                  the same for a folder of your own
    python data.py check PATH                                 what would be used, what skipped, and why

Notable features:
- every random choice (scene, crop, flip, order, dropped caption) is a pure function of (seed, epoch, sample),
  so that a run can be resumed anywhere without saving the state of any generator;
- `scenes`, a small world drawn by formula at any resolution. Because each picture is known exactly, eval.py can
  tell without learned weights whether a generated image shows what its caption says;
- a folder of images, each with a .txt beside it, serves through the same methods as `scenes`.

Letters: B images in a batch, C = 3 channels, H W height and width in pixels, L caption tokens.
"""
import argparse
import ast
import configparser
import difflib
import functools
import os
import re
import struct
import sys
import zlib

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------------------
# Settings: configs.txt -> dict. One parser for files and flags, so that both are checked the same way.

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs.txt")


class UserError(SystemExit):
    """Something the user can mend: says `error: WHAT: HOW TO FIX` on stderr and ends with status 2, without a traceback."""

    def __init__(self, message):
        print(f"error: {message}", file=sys.stderr)
        super().__init__(2)


def nearest(word, known):
    """"did you mean 'x'?", or the known words where none is near. Initials count: learning_rate is near lr."""
    initials = "".join(part[0] for part in word.split("_") if part)
    close = difflib.get_close_matches(word, known, 1, 0.5) or [k for k in known if k == initials]
    return f"did you mean {close[0]!r}?" if close else "the known ones are " + ", ".join(known)


def parse_value(key, text, default):
    """The value of `key` written as `text`, with the type of its default: int, float, bool, tuple or str."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, str):
        return value if isinstance(value, str) else text
    if isinstance(default, tuple):
        value = value if isinstance(value, tuple) else (value,)
        good = all(isinstance(v, type(default[0])) for v in value)
    elif isinstance(default, float):
        value, good = (float(value), True) if type(value) in (int, float) else (value, False)
    else:
        good = type(value) is type(default)
    if not good or value != value:
        raise UserError(f"{key} = {text}: {key} takes a {type(default).__name__} such as {default}")
    return value


def load_config(name="toy", stage="pretrain", flags=(), file=CONFIGS):
    """
    Resolve a section of configs.txt. Later wins: [DEFAULT], the sections that `name` inherits, [name], then the same with the
    stage, [name.stage], then flags (a list of (key, text)). A stage other than pretrain starts from [name.grow]. Returns a dict.
    """
    parser = configparser.ConfigParser(inline_comment_prefixes="#", interpolation=None)
    parser.read(file)
    defaults = {k: ast.literal_eval(v) for k, v in parser.defaults().items()}
    names = [s for s in parser.sections() if "." not in s]
    if name not in names:
        raise UserError(f"no config {name!r} in {os.path.basename(file)}: {nearest(name, names)}")
    chain = [name]                                             # [toy], or [small, toy] where small inherits toy
    while parent := ast.literal_eval(parser[chain[-1]]["inherits"]):
        if parent not in names or parent in chain:
            raise UserError(f"config {chain[-1]!r} inherits {parent!r}: name another one of {', '.join(names)}")
        chain.append(parent)
    stages = ["pretrain"] if stage == "pretrain" else dict.fromkeys(["grow", stage])
    sections = chain[::-1] + [f"{s}.{part}" for part in stages for s in chain[::-1]]
    pairs = [(k, v) for s in sections if s in parser for k, v in parser._sections[s].items()] + list(flags)
    config = dict(defaults)
    for key, text in pairs:
        if key not in defaults:
            raise UserError(f"unknown key {key!r}: {nearest(key, sorted(defaults))}")
        config[key] = parse_value(key, text, defaults[key])
    for key, value in config.items():
        least = {"seed": 0, "workers": 0, "micro": 0, "warmup": 0, "log_every": 0, "sample_every": 0, "text_vocab": 2, "eval_n": 2}.get(key, 1)
        numbers = value if type(value) is tuple else [value] if type(value) is int else [least]
        if not numbers or min(numbers) < least and not (key == "eval_n" and value == 0):
            raise UserError(f"{key} = {value}: {key} must be at least {least}")
        if key in ("base", "scene_small", "scene_large") and value <= 0:
            raise UserError(f"{key} = {value}: {key} must be above 0")
        if key in ("lr", "weight_decay", "clip", "warmup", "guidance") and config[key] < 0:
            raise UserError(f"{key} = {config[key]}: {key} must not be negative")
        if key in ("caption_dropout", "ema", "beta1", "beta2") and not 0 <= config[key] <= 1:
            raise UserError(f"{key} = {config[key]}: {key} must lie in [0, 1]")
    return config


# ---------------------------------------------------------------------------------------------------------------
# Draws that are pure functions of their arguments


def uniforms(seed, sample, count):
    """`count` uniforms in [0, 1) that depend on (seed, sample) alone. float64 (count,). splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):                           # arithmetic is meant to wrap modulo 2^64
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64((sample * 0xD1342543DE82EF95 + seed * 0xDA942042E4DD58B5) % 2**64)
        for multiplier in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
            x = (x ^ (x >> np.uint64(30))) * np.uint64(multiplier)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2**53


def batch_of(usable, seed, step, batch):
    """
    The (epoch, sample) pairs of a step: consecutive places of one permutation per epoch of the `usable` sample
    numbers. Depends on nothing but its arguments, so step 1000 is the same after a resume, and a batch may span epochs.
    """
    places = range(step * batch, (step + 1) * batch)
    orders = {e: np.random.default_rng((seed, e)).permutation(usable)
              for e in {p // len(usable) for p in places}}
    return [(p // len(usable), int(orders[p // len(usable)][p % len(usable)])) for p in places]


# ---------------------------------------------------------------------------------------------------------------
# scenes: a world in which everything can be checked. x runs right, y runs down, the picture is [0, 1] x [0, 1].

SHAPES = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}     # area of a shape of diameter 1
COLOURS = {"red": (.85, .15, .15), "green": (.15, .65, .20), "blue": (.20, .30, .85), "yellow": (.85, .80, .15),
           "purple": (.60, .20, .70), "orange": (.85, .50, .15)}                   # all 0.15 off the ends: room for texture
GROUNDS = {"white": (1., 1., 1.), "black": (0., 0., 0.), "gray": (.5, .5, .5)}
TEXTURES = ("plain", "striped", "dotted")
COUNTS = ("a", "two", "three")
RELATIONS = ("left of", "above")
CONTRAST = 0.15                                                # a texture brightens and darkens its colour by this
GAP = 0.04                                                     # least distance between shapes, and to the border


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
    (H, W): a square wave of `cycles` periods averaged over each pixel. Its mean over a period is zero and its phase is locked to the
    grid, so at `cycles` pixels, and at every divisor of it, it vanishes exactly: detail that only a grown model can show.
    """
    if texture == "plain":
        return np.zeros((resolution, resolution))
    ramp = abs(np.linspace(0, cycles, resolution + 1) % 1 - 0.5)                   # an integral of the square wave
    wave = (ramp[:-1] - ramp[1:]) * resolution / cycles
    return np.outer(wave, wave if texture == "dotted" else np.ones(resolution))


class Scenes:
    """
    Captioned pictures of one to three shapes, drawn from (seed, i). The config's scene_* keys choose the corner of
    the world. A scene is a dict: ground, groups (count, size, texture, colour, shape), relation or None, objects.
    """
    name = "scenes"

    def __init__(self, config, seed=None):
        self.seed = config["seed"] if seed is None else seed
        self.shapes = list(SHAPES)[:config["scene_shapes"]]
        self.colours = list(COLOURS)[:config["scene_colours"]]
        self.most, self.cycles = config["scene_objects"], config["scene_texture"]
        self.diameters = {"small": config["scene_small"], "large": config["scene_large"]}
        self.textured, self.scatter = config["scene_textured"], config["scene_scatter"]
        self.length, self.native = config["scene_count"], config["scene_native"]

    def __len__(self):
        return self.length

    def size(self, i):
        """Native (width, height) in pixels: 27.5 % lie under `scene_native`, as in CC12M under 512 (Greedy Growing, Sec. 4)."""
        native = int(self.native * 2 ** (2 * uniforms(self.seed, i, 1)[0] - 0.55))
        return native, native

    def caption(self, i):
        return describe(self.scene(i))

    def image(self, i, resolution, draws=None):
        """(H, W, 3) uint8."""
        return np.round(255 * self.render(self.scene(i), resolution)).astype(np.uint8)

    @functools.lru_cache(2 ** 16)
    def scene(self, i):
        draws = iter(uniforms(self.seed, i, 64)[1:])           # the first one told the native size
        pick = lambda options: options[int(next(draws) * len(options))]
        ground, relation, layout = pick(list(GROUNDS)), pick(RELATIONS), next(draws)
        more = self.most > 2 and next(draws) < 0.5             # three objects, where the world allows them
        if layout < 0.45:                                      # one group: a single shape, or several alike
            counts = [1 if layout < 0.25 else 3 if more else 2]
        else:                                                  # two groups and their relation
            counts = pick([[1, 2], [2, 1]]) if more else [1, 1]
        groups = [dict(count=n, shape=pick(self.shapes), colour=pick(self.colours),
                       texture=pick(TEXTURES[1:]) if next(draws) < self.textured else "plain",
                       size="small" if n == 3 else pick(["small", "large"])) for n in counts]
        if len(groups) == 2 and all(groups[0][k] == groups[1][k] for k in ("shape", "colour")):
            groups[1]["shape"] = self.shapes[(self.shapes.index(groups[1]["shape"]) + 1) % len(self.shapes)]
        scene = dict(ground=ground, groups=groups, relation=relation if len(groups) == 2 else None)
        axis = RELATIONS.index(relation) if len(groups) == 2 else 1                # several alike stand side by side
        return dict(scene, objects=self.place(groups, axis, draws))

    def place(self, groups, axis, draws):
        """Groups follow each other along `axis` (0 is x), the members of a group along the other one; nothing overlaps."""
        def spread(diameters):                                 # centres of intervals thrown into [0, 1] in this order
            room, centres, end = max(0, 1 - sum(diameters) - GAP * (len(diameters) + 1)), [], 0
            for k, thrown in enumerate(sorted(next(draws) for _ in diameters)):
                before = self.scatter * thrown + (1 - self.scatter) * (k + 1) / (len(diameters) + 1)   # share of the room
                centres.append(room * before + GAP * (k + 1) + end + diameters[k] / 2)
                end += diameters[k]
            return centres
        for g in groups:
            g["diameters"] = [self.diameters[g["size"]] * (0.95 + 0.1 * next(draws)) for _ in range(g["count"])]
        middles = spread([max(g["diameters"]) for g in groups])
        centres = [(m, c) for g, m in zip(groups, middles) for c in spread(g["diameters"])]
        owners = [g for g in groups for _ in range(g["count"])]
        diameters = [d for g in groups for d in g.pop("diameters")]
        return [dict({k: g[k] for k in ("shape", "colour", "texture")}, diameter=d, centre=c if axis == 0 else c[::-1])
                for g, d, c in zip(owners, diameters, centres)]

    def render(self, scene, resolution):
        """(H, W, 3) in [0, 1]: a pixel's share of a shape is its distance to the edge, clipped to one pixel."""
        x = (np.arange(resolution) + 0.5)[None] / resolution                       # (1, W)
        y = x.T                                                                    # (H, 1)
        image = np.empty((resolution, resolution, 3))
        image[:] = GROUNDS[scene["ground"]]
        for o in scene["objects"]:
            edge = distance(o["shape"], x - o["centre"][0], y - o["centre"][1], o["diameter"] / 2)
            cover = np.clip(0.5 - resolution * edge, 0, 1)[..., None]
            wave = texture_wave(o["texture"], resolution, self.cycles)[..., None]
            image += cover * (COLOURS[o["colour"]] + CONTRAST * wave - image)
        return image


def describe(scene):
    """'two small red circles above a large striped blue square on a white background'."""
    def phrase(g):
        words = [COUNTS[g["count"] - 1], g["size"], g["texture"], g["colour"], g["shape"]]
        plural = "" if g["count"] == 1 else "es" if g["shape"] == "cross" else "s"
        return " ".join(w for w in words if w != "plain") + plural
    middle = f" {scene['relation']} " if scene["relation"] else ""
    return middle.join(phrase(g) for g in scene["groups"]) + f" on a {scene['ground']} background"


# ---------------------------------------------------------------------------------------------------------------
# A folder of images, each with a .txt of the same name beside it

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Folder:
    """
    The images under `path` that have a caption and can be opened. `skipped` maps a reason to the files it befell. Small folders are
    kept in memory at the size asked for, so that each image is decoded once.
    """

    def __init__(self, path):
        try:
            import PIL.Image as pillow
        except ImportError:
            raise UserError("reading image files needs pillow: pip install pillow")
        self.pillow, self.name, self.skipped = pillow, os.path.abspath(path), {}
        self.items, self.unreadable, self.kept = [], set(), {} # items: (file, (width, height), caption)
        if not os.path.isdir(path):
            raise UserError(f"no folder {path!r}: --data takes scenes, or a folder of images with a .txt beside each")
        files = sorted(os.path.join(d, f) for d, _, names in os.walk(path) for f in names)
        files = [f for f in files if f.lower().endswith(IMAGES)]
        for file in files:
            caption, size = self.read_caption(file), self.read_size(file)
            reason = "not an image" if not size else "no caption" if caption is None else "empty caption" if not caption else None
            if reason:
                self.skipped.setdefault(reason, []).append(file)
            else:
                self.items.append((file, size, caption))
        if not files:
            raise UserError(f"no images under {path!r}: looked for {' '.join(IMAGES)}")

    def require(self):
        """Raise UserError where training makes no sense: no image, or more than one in twenty without a caption."""
        files = len(self.items) + sum(map(len, self.skipped.values()))
        mute = len(self.skipped.get("no caption", [])) + len(self.skipped.get("empty caption", []))
        if mute > files / 20:
            raise UserError(f"{mute} of {files} images under {self.name!r} have no caption: put NAME.txt beside NAME.jpg")
        if not self.items:
            raise UserError(f"none of {files} files is an image: python data.py check {self.name} lists them")

    def read_size(self, file):
        """(width, height) as shown, from the header alone; None if the file is not an image."""
        try:
            with self.pillow.open(file) as image:
                turned = image.getexif().get(0x0112, 1) >= 5   # EXIF orientations 5 to 8 swap the sides
                return image.size[::-1] if turned else image.size
        except Exception:                                      # pillow raises many kinds on bytes that are no image
            return None

    def read_caption(self, file):
        """One line of text; '' for an empty file; None for no file."""
        try:
            with open(os.path.splitext(file)[0] + ".txt", encoding="utf-8", errors="replace") as f:
                return " ".join(f.read().split())
        except OSError:
            return None

    def __len__(self):
        return len(self.items)

    def size(self, i):
        return self.items[i][1]

    def caption(self, i):
        return self.items[i][2]

    def image(self, i, resolution, draws=(0.5, 0.5)):
        """(H, W, 3) uint8: short side resized to `resolution`, random crop (Greedy Growing, Sec. 4); transparency over white."""
        image = self.kept.get((i, resolution))
        if image is None:
            image = self.resized(i, resolution)
            if len(self.kept) * resolution ** 2 < 2 ** 27:     # about half a gigabyte
                self.kept[i, resolution] = image
        h, w, _ = image.shape
        left, top = int(draws[0] * (w - resolution + 1)), int(draws[1] * (h - resolution + 1))
        return image[top:top + resolution, left:left + resolution]

    def resized(self, i, resolution):
        """(H, W, 3) uint8, upright, the short side `resolution` long."""
        from PIL import ImageOps
        with self.pillow.open(self.items[i][0]) as opened:
            opened.draft("RGB", (2 * resolution, 2 * resolution))                  # JPEG: decode at a fraction, still >= 2x
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = self.pillow.alpha_composite(self.pillow.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        scale = resolution / min(image.size)
        w, h = (max(resolution, round(s * scale)) for s in image.size)
        return np.asarray(image.resize((w, h), self.pillow.Resampling.BICUBIC))


def open_data(config):
    """The data set that `data` names: 'scenes' or a folder."""
    return Scenes(config) if config["data"] == "scenes" else Folder(config["data"])


# ---------------------------------------------------------------------------------------------------------------
# Captions -> tokens, images <-> numbers


def words(caption):
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())


def tokenize(captions, length, vocab):
    """
    Words hashed into `vocab` buckets: (B, L) int64, 0 where no word is. Needs no vocabulary file; its embedding is learned
    in the core. Captions longer than `length` words are cut. An empty caption is all zeros: the null caption of guidance.
    """
    tokens = np.zeros((len(captions), length), np.int64)
    for row, caption in zip(tokens, captions):
        found = words(caption)[:length]
        row[:len(found)] = [1 + zlib.crc32(w.encode()) % (vocab - 1) for w in found]
    return torch.from_numpy(tokens)


def encode_captions(captions, config):
    """What the model reads: (B, L) tokens. A null caption is all zeros."""
    return tokenize(captions, config["text_length"], config["text_vocab"])


def to_tensor(images):
    """(B, H, W, 3) uint8 -> x (B, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """x (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded and clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# Images <-> latents


class Blocks:
    """
    A lossless stand-in for an autoencoder: each block of stride x stride pixels becomes 3 stride^2 channels. It compresses
    nothing, but takes `scenes` through the whole path of latents offline (autoencoder = "blocks"). Of stride 1 it is the identity.
    """

    def __init__(self, stride, scale):
        self.stride, self.scale = stride, scale

    def encode(self, x):
        return torch.nn.functional.pixel_unshuffle(x, self.stride) * self.scale    # (B, 3, H, W) -> (B, 3 s^2, H/s, W/s)

    def decode(self, latents):
        return torch.nn.functional.pixel_shuffle(latents / self.scale, self.stride).clamp(-1, 1)


class Autoencoder:
    """
    A frozen AutoencoderKL of diffusers (Rombach et al. 2022; SDXL's is the usual one), in float32 whatever the model's precision,
    because SDXL's overflows in fp16. Pictures larger than it was trained at go through it in overlapping tiles, so that memory
    stays bounded. Latents are the mean of its posterior, not a draw: its spread is far below the noise of the first step.
    """

    def __init__(self, vae, scale):
        self.vae, self.scale = vae, scale
        vae.enable_tiling()

    @torch.no_grad()
    def encode(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.vae.encode(x.float()).latent_dist.mode() * self.scale      # (B, 3, H, W) -> (B, c, H/s, W/s)

    @torch.no_grad()
    def decode(self, latents):
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.float() / self.scale).sample.clamp(-1, 1)


@functools.lru_cache(2)
def read_autoencoder(folder, device):
    """The AutoencoderKL in a local folder, as diffusers' save_pretrained leaves it. Nothing is downloaded."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError(f"no autoencoder in {folder!r}: put a diffusers AutoencoderKL there (config.json and its weights), or set autoencoder = \"\"")
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise UserError("latents need diffusers: pip install diffusers")
    try:
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)   # else it asks for accelerate
    except Exception as e:                                     # diffusers raises many kinds
        raise UserError(f"{folder!r} does not open as an AutoencoderKL ({type(e).__name__}: {str(e)[:200]}): take another folder")
    return vae.float().eval().requires_grad_(False).to(device)


def open_autoencoder(config, device="cpu"):
    """
    An object with encode: x (B, 3, H, W) in [-1, 1] -> latents (B, latent_channels, H / latent_stride, W / latent_stride),
    scaled by latent_scale to a variance near 1; and with decode, its inverse. For a model of pixels both are the identity.
    """
    c = config
    if not c["autoencoder"]:
        return Blocks(1, 1.0)
    if c["autoencoder"] == "blocks":
        own, opened = {"latent_channels": 3 * c["latent_stride"] ** 2}, Blocks(c["latent_stride"], c["latent_scale"])
    else:
        vae = read_autoencoder(c["autoencoder"], str(device))
        own = {"latent_channels": vae.config.latent_channels, "latent_stride": 2 ** (len(vae.config.block_out_channels) - 1),
               "latent_scale": vae.config.scaling_factor}
        opened = Autoencoder(vae, c["latent_scale"])
    if wrong := [f"{k} = {v}" for k, v in own.items() if c[k] != v]:
        raise UserError(f"the autoencoder {c['autoencoder']!r} has other latents than this config: set {', '.join(wrong)}")
    return opened


# ---------------------------------------------------------------------------------------------------------------
# Steps -> batches


class Batches(torch.utils.data.Dataset):
    """
    Item `step` is the batch of that step: x (b, 3, H, W), text (b, L), and size (b, 6): original height and width, top and left of the
    crop, target height and width in pixels (SDXL, Sec. 2.2). Of `world` devices, device `rank` gets the rank-th share of its rows. Give
    it to a DataLoader with batch_size=None and sampler=range(first, last): workers prepare whole batches, and resuming is a first step.
    """

    def __init__(self, data, config, filtered, rank=0, world=1):
        self.data, self.config = data, config
        share = config["batch"] // world
        self.rows = slice(rank * share, (rank + 1) * share)
        if isinstance(data, Folder):
            data.require()
        least = config["resolution"] if filtered else 1        # keep what is at least as large as the target (Sec. 3.3)
        self.usable = np.array([i for i in range(len(data)) if min(data.size(i)) >= least])
        if not len(self.usable):
            raise UserError(f"none of {len(data)} images is {least} px or more on both sides: lower --resolution")

    def __len__(self):
        return self.config["steps"]

    def __getitem__(self, step):
        c, pairs = self.config, self.pairs(step)[self.rows]
        images, captions = zip(*(self.sample(epoch, i) for epoch, i in pairs))
        x = to_tensor(np.stack(images))                                            # (b, 3, H, W)
        size = torch.tensor([[*self.data.size(i)[::-1], 0, 0, *x.shape[2:]] for _, i in pairs], dtype=torch.float32)
        return x, encode_captions(captions, c), size

    def pairs(self, step):
        """The (epoch, sample) of each row of the step's whole batch: the same on every device, whatever their number."""
        return batch_of(self.usable, self.config["seed"], step, self.config["batch"])

    def sample(self, epoch, i):
        """Image and caption of sample i in this epoch: crop, flip and dropped caption are functions of (seed, epoch, i)."""
        c = self.config
        x, y, flip, drop = uniforms(c["seed"], (epoch + 1 << 40) + i, 4)
        for j in range(i, i + len(self.data)):                 # an image that cannot be decoded: named, its successor is used
            try:
                image = self.data.image(j % len(self.data), c["resolution"], (x, y))
                break
            except (OSError, ValueError, SyntaxError) as e:
                file = self.data.items[j % len(self.data)][0]
                if file not in self.data.unreadable:
                    print(f"skipped {file}: {e}", file=sys.stderr)
                self.data.unreadable.add(file)
        else:
            raise UserError(f"no image of {self.data.name} can be decoded: the lines above name them")
        image = image[:, ::-1] if c["flip"] and flip < 0.5 else image
        return image, "" if drop < c["caption_dropout"] else self.data.caption(j % len(self.data))


# ---------------------------------------------------------------------------------------------------------------
# Pictures to look at


def write_png(path, image):
    """(H, W, 3) uint8 -> PNG (RFC 2083) without any image library, replaced as a whole."""
    h, w, _ = image.shape
    rows = np.concatenate([np.zeros((h, 1), np.uint8), image.reshape(h, w * 3)], 1).tobytes()    # filter type 0 before each row
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)        # 8 bits, RGB
    with open(path + ".part", "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    os.replace(path + ".part", path)


def grid(images, columns, pad=2, least=64):
    """(B, H, W, 3) -> one picture, rows of `columns`, small images enlarged by whole pixels to about `least` px."""
    images = np.asarray(images)
    zoom = max(1, least // images.shape[1])
    images = images.repeat(zoom, 1).repeat(zoom, 2)
    rows = -(-len(images) // columns)
    h, w = images.shape[1] + pad, images.shape[2] + pad
    sheet = np.full((rows * h + pad, columns * w + pad, 3), 255, np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * h + pad, k % columns * w + pad
        sheet[top:top + h - pad, left:left + w - pad] = image
    return sheet


# ---------------------------------------------------------------------------------------------------------------
# python data.py show|check


def show(data, args, config):
    """A contact sheet of step 0's batch after all transforms; captions on the terminal in reading order."""
    x, _, _ = Batches(data, config, filtered=False)[0]
    write_png(args.to, grid(to_uint8(x), columns=8))
    for epoch, i in batch_of(np.arange(len(data)), config["seed"], 0, config["batch"]):
        print(f"{i:8d}  {data.size(i)[0]}x{data.size(i)[1]}  {data.caption(i)}")
    print(f"{args.to}: {len(x)} images of {x.shape[-1]} px, in the order above, 8 to a row")


def check(data, args, config):
    """A table found / used / skipped by reason, and how many images each resolution would keep."""
    skipped = getattr(data, "skipped", {})
    print(f"found    {len(data) + sum(map(len, skipped.values())):8d}\nused     {len(data):8d}")
    for reason, files in sorted(skipped.items()):
        print(f"skipped  {len(files):8d}  {reason}: {', '.join(files[:3])}{' ...' if len(files) > 3 else ''}")
    least = np.array([min(data.size(i)) for i in range(len(data))])
    if not len(data):
        return
    lengths = np.array([len(words(data.caption(i))) for i in range(min(len(data), 10000))])
    print(f"captions of {lengths.mean():.1f} words; {np.mean(lengths > config['text_length']):.1%} are cut at text_length = {config['text_length']}")
    for resolution in 16, 32, 64, 128, 256, 512, 1024:
        print(f"{resolution:5d} px keeps {np.mean(least >= resolution):7.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["show", "check"])
    parser.add_argument("path", help="scenes, or a folder of images")
    parser.add_argument("--config", default="toy")
    parser.add_argument("--resolution", help="default: that of the config's grow stage")
    parser.add_argument("--to", default="sheet.png", help="where `show` writes its picture")
    args = parser.parse_args()
    config = load_config(args.config, "grow", [("data", args.path)] + [("resolution", args.resolution)] * bool(args.resolution))
    {"show": show, "check": check}[args.command](open_data(config), args, config)


if __name__ == "__main__":
    main()
