"""
What goes in: settings, captioned pictures, and captions turned into tokens or embeddings.

    python data.py check PATH                                 what would be used of a folder or of tar shards, what not, and why
    python data.py index PATH                                 write that down beside the data, for millions of images
    python data.py show PATH --resolution 64 --to sheet.png   look at a training batch after all transforms (PATH or scenes)
    python data.py stats PATH                                 nouns and lengths of the captions
    python data.py embed PATH --encoder t5-xxl:128,clip-h:77 --weights FOLDER,FOLDER      embed all captions once
    python data.py embed PATH --vae FOLDER --resolution 512   the same for images: latents of an autoencoder
    python data.py vocabulary PATH --to captions.model        train a SentencePiece model on the captions

Notable features:
- every random choice (scene, crop, flip, colours, caption; order and bucket) is a pure function of (seed, epoch, sample) or of
  (seed, step), so that a run can be resumed anywhere, on any number of devices, without saving the state of any generator;
- `scenes`, a small world drawn by formula at any resolution. Because each picture is known exactly, eval.py can
  tell without learned weights whether a generated image shows what its caption says;
- real images are read where they lie, in files or in the middle of a tar, through one index of seven columns; nothing is repacked,
  nothing unpickled, and whatever cannot serve is counted and named.

The way of an image: walk and scan_* find it (Found) -> merge lays all of them into arrays (Indexed) -> write_index, read_index
-> Batches chooses sample and crop -> Indexed.view reads and decodes it -> x. Scenes come in at Batches: the two data sets, Scenes and
Indexed, serve it through the same methods: size, all_sizes, view, choose, text. A caption has a number of its own, since an image may
have several.

Letters: B images in a batch, b on this device, C = 3 channels, H W height and width in pixels, c h w those of latents, s their stride,
L caption tokens, E their width, n items of a data set. Images are (height, width, 3) arrays, as numpy has it, but a size that stands
alone is (width, height), as image libraries have it.
"""
import argparse
import concurrent.futures
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import stat
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from lib.draws import generator, uniforms
from lib.encoders import (EmbeddingCache, about_latents, embed_captions, embed_now, encoder_identity, has_pretrained_encoder,
                          latents_path, open_autoencoder, open_encoders, to_pieces)
from lib.files import atomic_write, import_extra
from lib.pictures import contact_sheet, to_tensor, write_png
from lib.settings import UserError, load_config
from lib.tables import DTYPES, Table, is_begun, print_room, write_table

# ---------------------------------------------------------------------------------------------------------------
# Scenes: a world in which everything can be checked. x runs right, y runs down, the picture is [0, 1] x [0, 1].

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

    def __init__(self, config, purpose="scenes", seed=None):
        self.key = purpose, config["seed"] if seed is None else seed               # purpose "exam": scenes that training never draws
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
        native = int(self.native * 2 ** (2 * uniforms(1, *self.key, i)[0] - 0.55))
        return native, native

    def all_sizes(self):
        """int (n, 2): width, height."""
        return np.array([self.size(i) for i in range(self.length)])

    def choose(self, i, which=0.0, long=False):
        """Number of a caption of scene i: it has one, the i-th."""
        return i

    def text(self, number):
        """The caption of that number; -1 is the null caption."""
        return self.caption(number) if number >= 0 else ""

    def caption(self, i):
        return describe(self.scene(i))

    @property
    def captions_count(self):
        return self.length

    def view(self, i, height, width, draws, rule):
        """(H, W, 3) uint8, and top and left of the crop: a scene is drawn at the size asked for, so nothing is cut."""
        if height != width:
            raise UserError(f"scenes are square, and aspects asks for {height}x{width}: add {width}x{width}, or leave aspects empty")
        return self.image(i, height), 0, 0

    def image(self, i, resolution):
        """(H, W, 3) uint8, H = W = resolution."""
        return np.round(255 * self.render(self.scene(i), resolution)).astype(np.uint8)

    @functools.lru_cache(2 ** 16)                              # small worlds are laid out once
    def scene(self, i):
        """The scene of number i, a dict as above. Callers must not change it."""
        draws = iter(uniforms(64, *self.key, i)[1:])           # the first one told the native size
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
        if len(groups) == 2 and all(groups[0][k] == groups[1][k] for k in ("shape", "colour")):    # a relation between equals tells nothing
            groups[1]["shape"] = self.shapes[(self.shapes.index(groups[1]["shape"]) + 1) % len(self.shapes)]
        scene = dict(ground=ground, groups=groups, relation=relation if len(groups) == 2 else None)
        axis = RELATIONS.index(relation) if len(groups) == 2 else 1                # several alike stand side by side
        return dict(scene, objects=self.place(groups, axis, draws))

    def place(self, groups, axis, draws):
        """Groups follow each other along `axis` (0 is x), the members of a group along the other one; nothing overlaps."""
        def spread(diameters):                                 # centres of intervals thrown into [0, 1] in this order
            room, centres, end = max(0, 1 - sum(diameters) - GAP * (len(diameters) + 1)), [], 0
            for k, thrown in enumerate(sorted(next(draws) for _ in diameters)):    # sorted: the room before the k-th one never shrinks
                before = self.scatter * thrown + (1 - self.scatter) * (k + 1) / (len(diameters) + 1)   # share of the room
                centres.append(room * before + GAP * (k + 1) + end + diameters[k] / 2)
                end += diameters[k]
            return centres
        for g in groups:
            g["diameters"] = [self.diameters[g["size"]] * (0.95 + 0.1 * next(draws)) for _ in range(g["count"])]   # +- 5 %
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
            cover = np.clip(0.5 - resolution * edge, 0, 1)[..., None]              # (H, W, 1)
            wave = texture_wave(o["texture"], resolution, self.cycles)[..., None]  # (H, W, 1)
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
# Reading images: bytes of a file -> pixels. It does not matter where the bytes lay, and nothing that a header claims is trusted

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
UNSUPPORTED = (".gif", ".svg", ".heic", ".heif", ".avif", ".tif", ".tiff", ".mp4", ".mov", ".webm", ".mkv", ".avi", ".tar.gz", ".tgz", ".zip")
UNSUPPORTED_STARTS = (b"GIF8", b"<svg", b"<?xml", b"II*\0", b"MM\0*", b"\x1aE\xdf\xa3")    # the first bytes of such files, where a name lies
STARTS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP"}              # the first bytes of images that are ours
MOST_BYTES = 2 ** 28                                           # of an image file; what is larger is not read
LEAST_SIDE, MOST_ASPECT = 8, 8                                 # below and beyond, no crop shows what a caption says
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
SIDEWAYS = ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")                  # those of them that swap width and height


class Unfit(Exception):
    """An image or caption that cannot serve; its text is the reason that tables count. Never leaves this file: it is counted or named."""


@functools.lru_cache(1)
def pillow():
    """The module PIL.Image, which decodes images; `scenes` does without. Large headers are ours to refuse, so it need not warn."""
    image = import_extra("PIL.Image", "reading image files", "pillow")
    warnings.simplefilter("ignore", image.DecompressionBombWarning)
    return image


def open_image(blob):
    """(image, turn): pillow's image, its pixels not decoded yet, and what sets it upright (a name in UPRIGHT, or None). Raises Unfit."""
    try:
        image = pillow().open(io.BytesIO(blob), formats=("JPEG", "PNG", "WEBP", "BMP"))    # no other decoder sees unknown bytes
    except pillow().DecompressionBombError:
        raise Unfit("too large")
    except Exception:                                          # pillow raises many kinds on bytes that are no image
        foreign = blob.startswith(UNSUPPORTED_STARTS) or blob[4:8] == b"ftyp"              # HEIC, AVIF, MP4
        kind = next((k for start, k in STARTS.items() if blob.startswith(start)), None)
        raise Unfit("unsupported format" if foreign else "truncated" if kind and not is_whole(blob, kind) else "not an image")
    if image.width * image.height > pillow().MAX_IMAGE_PIXELS: # 89 million: known from the header, before memory is taken
        raise Unfit("too large")
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise Unfit("unsupported format")
    exif = pillow().Exif()
    try:                                                       # not image.getexif(): for a PNG it would decode all pixels
        exif.load(image.info.get("exif", b""))
    except Exception:                                          # broken notes about a whole image
        pass
    return image, UPRIGHT.get(exif.get(0x0112))                # the tag "Orientation": 1 to 8, 1 is upright


def is_whole(blob, kind):
    """Does the file end as its format ends? A cut file still has a good header; decoding it to find out would cost 100 times more."""
    if kind in ("JPEG", "MPO"):                                # an end marker after the last scan; what follows may be anything
        return blob.endswith(b"\xff\xd9") or blob.rfind(b"\xff\xd9") > blob.rfind(b"\xff\xda")
    if kind == "PNG":                                          # its last chunk and that chunk's checksum
        return b"IEND" in blob[-12:] or b"IEND\xaeB`\x82" in blob
    told = int.from_bytes(blob[4:8], "little") + 8 if kind == "WEBP" else int.from_bytes(blob[2:6], "little")   # BMP: both tell their size
    return len(blob) >= told


def header(blob):
    """(width, height) of an image as shown, from its header alone; raises Unfit where training could not use it."""
    image, turn = open_image(blob)
    width, height = image.size[::-1] if turn in SIDEWAYS else image.size
    if max(width, height) > MOST_ASPECT * min(width, height) > 0:
        raise Unfit("aspect")
    if min(width, height) < LEAST_SIDE:
        raise Unfit("too small")
    if not is_whole(blob, image.format):
        raise Unfit("truncated")
    return width, height


def decode(blob, least=None):
    """
    Pillow's image, upright, RGB, transparency over white, 16 bits scaled to 8. JPEGs are decoded at a fraction of their size, but at
    least `least` (width, height) as shown. Raises Unfit where the bytes cannot be decoded, which only decoding tells.
    """
    image, turn = open_image(blob)
    try:
        if least:                                              # a JPEG at 1/2, 1/4, 1/8: fewer DCT coefficients, several times faster
            image.draft("RGB", least[::-1] if turn in SIDEWAYS else least)
        if image.mode.startswith("I"):                         # 16-bit grey: convert() would clip it
            image = pillow().fromarray(np.round(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))    # 65535 = 257 * 255
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:     # info: a palette, or one colour, that is clear
            image = image.convert("RGBA")
            image = pillow().alpha_composite(pillow().new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as e:                                     # many kinds here too, such as struct.error and SyntaxError
        raise Unfit(f"cannot be decoded: {e}")
    return image.transpose(pillow().Transpose[turn]) if turn else image


def covering(size, height, width, rule):
    """
    (w, h) that an image of `size` (width, height) is resized to, so that height x width can be cut out of it. Rule "crop": the smallest
    that covers it, its shape kept (Greedy Growing, Sec. 4); rule "stretch": just that, each side scaled by itself (PixelGen-V2).
    """
    scale = max(width / size[0], height / size[1])
    return (width, height) if rule == "stretch" else (max(width, round(size[0] * scale)), max(height, round(size[1] * scale)))


def jittered(image, draws, strength):
    """Brightness, contrast and saturation, each times a factor drawn from 1 +- strength. (H, W, 3) uint8, three draws in [0, 1)."""
    brightness, contrast, saturation = 1 + strength * (2 * np.array(draws) - 1)
    x = image * brightness                                                         # (H, W, 3)
    x = x.mean() + contrast * (x - x.mean())                                       # away from, or towards, one grey
    grey = x @ np.array([[0.299], [0.587], [0.114]])                               # (H, W, 1), luma of ITU-R BT.601
    return (grey + saturation * (x - grey)).clip(0, 255).round().astype(np.uint8)  # away from, or towards, each pixel's grey


# ---------------------------------------------------------------------------------------------------------------
# Scanning: a folder or tar shards -> arrays. One row per image; nothing is copied or encoded anew.
#
#     a folder    cat.jpg with cat.txt (a caption) or cat.json beside it, or captions.jsonl / captions.csv with a file in each row
#     tar shards  as img2dataset writes them: 0001.jpg, 0001.txt, 0001.json, in any order
#
# In .json and .jsonl, "caption" (or "captions", "text") is one caption or a list of them, and "long_caption" (or "long_captions")
# likewise, told apart in training by the key `long_captions`. Below, texts is such a pair of lists, (raw, long).

SAMPLE = np.dtype([("file", "<i4"),                            # number of the file that holds the image: itself, or a tar
                   ("offset", "<i8"), ("length", "<i8"),       # its bytes in there
                   ("width", "<i4"), ("height", "<i4"),        # pixels, as shown
                   ("crc", "<u4"),                             # crc32 of its bytes
                   ("first", "<i8"), ("raw", "<u2"), ("long", "<u2")])             # its captions: raw ones from number `first`, then long ones
RAW_KEYS, LONG_KEYS = ("caption", "captions", "text"), ("long_caption", "long_captions")
FILE_KEYS = ("file", "file_name", "filename", "image", "path", "key")              # any of them names the image of a row
LISTS = ("captions.jsonl", "captions.csv")
MOST_CHARACTERS = 8000                                         # of a caption; the rest is cut
MOST_CAPTIONS = 1000                                           # of an image, of each kind
CHUNK = 256                                                    # files of a folder that a worker takes at a time


def read_whole(path):
    """Bytes of a regular file. OSError for anything else, such as a pipe, which would wait for ever; Unfit where it is too large."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(file)                                # of what was opened: the name may mean another file by now
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        if status.st_size > MOST_BYTES:
            raise Unfit("too large")
        return os.read(file, status.st_size)
    finally:
        os.close(file)


def read_part(path, offset, length):
    """Bytes of a file, read in place: nothing is unpacked. Fewer than `length` where the file ends."""
    return os.pread(shared_file(path).fileno(), length, offset)                    # no position to move, so forked workers may share the file


@functools.lru_cache(32)                                       # opening costs more than reading; what falls out of the cache is closed
def shared_file(path):
    return open(path, "rb", buffering=0)


def read_json(text):
    """The dict that a JSON text (str or bytes) holds, or None."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):                       # no JSON, or built to exhaust the stack
        return None
    return fields if isinstance(fields, dict) else None


class Found:
    """What one worker found in a shard, or in some files of a folder. `bad` holds (name, reason)."""

    def __init__(self):
        self.files, self.sizes = [], []                        # names and bytes of the files that hold images
        self.rows, self.captions = [], []                      # SAMPLEs with `file` counted from 0 here; captions of all rows, as bytes
        self.bad, self.counts = [], Counter()                  # counts: captions that are missing, empty, truncated, replaced

    def add(self, name, blob, offset, texts):
        """An image of the file begun last, and its captions, str or bytes."""
        try:
            width, height = header(blob)
        except Unfit as e:
            return self.bad.append((name, str(e)))
        raw, long = ([c for c in dict.fromkeys(map(self.clean, part[:MOST_CAPTIONS])) if c] for part in texts)     # each caption once
        if not raw and not long:
            self.counts["empty" if any(texts) else "missing"] += 1
        self.rows.append((len(self.files) - 1, offset, len(blob), width, height, zlib.crc32(blob), 0, len(raw), len(long)))    # 0: see merge
        self.captions += raw + long

    def clean(self, caption):
        """One line of UTF-8 bytes. What cannot be read becomes U+FFFD, what is longer than MOST_CHARACTERS is cut at a word."""
        # JSON may hold half of a surrogate pair, which has no UTF-8: encoded and decoded it becomes a question mark
        text = caption.decode("utf-8", "replace") if isinstance(caption, bytes) else str(caption).encode("utf-8", "replace").decode()
        self.counts["replaced"] += "\ufffd" in text or "\0" in text
        text = " ".join(text.replace("\0", " ").split())
        if len(text) > MOST_CHARACTERS:
            self.counts["truncated"] += 1
            text = text[:MOST_CHARACTERS].rpartition(" ")[0] or text[:MOST_CHARACTERS]     # or: one word, longer than that
        return text.encode()


def texts_of(fields):
    """(raw, long) captions of a .json or a row of .jsonl or .csv, each one string or a list of them."""
    pick = lambda keys: [c for k in keys for c in (fields[k] if isinstance(fields.get(k), list) else [fields.get(k)]) if c is not None]
    return pick(RAW_KEYS), pick(LONG_KEYS)


def texts_beside(found, name, text, fields):
    """(raw, long) captions from the bytes of a .txt and a .json, either of them None where there is no such file."""
    row = read_json(fields) if fields is not None else {}
    if row is None:
        found.bad.append((name, "unreadable .json, not skipped"))
    raw, long = texts_of(row or {})
    return [text] if text is not None else raw, long           # img2dataset writes the caption to both: take it once


def scan_files(root, images):
    """Some files of a folder -> Found. images: (name, its .txt or None, its .json or None, its texts in captions.jsonl or .csv or None)."""
    found = Found()
    for name, *sidecars, texts in images:
        try:
            blob = read_whole(os.path.join(root, name))
        except (OSError, Unfit) as e:                          # no permission, a loop of links, gone since it was listed; or too large
            found.bad.append((name, str(e) if isinstance(e, Unfit) else "unreadable"))
            continue
        parts = []
        for sidecar in sidecars:
            try:
                parts.append(read_whole(os.path.join(root, sidecar)) if sidecar else None)
            except (OSError, Unfit):                           # as if it were not there: the caption counts as missing
                parts.append(None)
        found.files.append(name)
        found.sizes.append(len(blob))
        found.add(name, blob, 0, texts or texts_beside(found, name, *parts))
    return found


def scan_shard(root, name):
    """A tar shard -> Found. Members of one key (the name up to its last dot) belong together, in whatever order they come."""
    found, path = Found(), os.path.join(root, name)
    try:
        members, size, cut = tar_members(path)
    except OSError:
        found.bad.append((name, "unreadable"))
        return found
    if cut is not None:                                        # what it still holds is not taken: half a shard would go unnoticed
        found.bad.append((name, f"incomplete at byte {cut}"))
        return found
    found.files.append(name)
    found.sizes.append(size)
    for key, parts in members.items():
        sides = {kind: read_part(path, offset, min(length, MOST_BYTES)) for kind, _, offset, length in parts if kind in (".txt", ".json")}
        pictures = [p for p in parts if p[0] in IMAGES + UNSUPPORTED]
        if not pictures and ".txt" in sides:                   # a .json alone is no loss: img2dataset writes one for failed downloads too
            found.bad.append((f"{name}/{key}.txt", "caption without image"))
        for k, (kind, member, offset, length) in enumerate(pictures):
            member = f"{name}/{member}"
            reason = "same key" if k else "unsupported format" if kind in UNSUPPORTED else "too large" if length > MOST_BYTES else None
            if reason:
                found.bad.append((member, reason))
            else:
                found.add(member, read_part(path, offset, length), offset, texts_beside(found, member, sides.get(".txt"), sides.get(".json")))
    return found


def tar_members(path):
    """
    ({key: [(ending, name, offset, length)]}, size, cut) of a tar: its regular files by key, its bytes, and None where it is whole. A whole
    tar ends in zero blocks; one that was cut, or whose writer died, stops at byte `cut`, between two members or within one.
    """
    members, end, size = {}, 0, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:                  # uncompressed; reads headers and skips contents
            for member in tar:
                key, kind = os.path.splitext(member.name)      # a name is only compared, never written to
                if member.isreg():
                    members.setdefault(key, []).append((kind.lower(), member.name, member.offset_data, member.size))
                tar.members = []                               # else it keeps them all
            end = tar.offset                                   # where the zero blocks, two of 512 bytes or more, should begin
        whole = end + 512 <= size and not read_part(path, end, 1024).strip(b"\0")
        return members, size, None if whole else end
    except OSError:
        raise
    except Exception as e:                                     # tarfile raises many kinds on bytes that are no tar
        return {}, size, size if "unexpected end" in str(e) else end


def read_list(root, file, owners, listed):
    """
    Add the rows of captions.jsonl or captions.csv to listed, {name: (raw, long)}. Names are relative to the list and may lack their
    ending (owners: {name without ending: image}); several rows of one image add up. Returns the (file, reason) of rows that could not be
    read, for bad.tsv.
    """
    broken = []
    with open(os.path.join(root, file), encoding="utf-8", errors="replace", newline="") as f:
        csv.field_size_limit(MOST_BYTES)                       # else it refuses captions of 128 kB, which we cut
        for fields in csv.DictReader(f) if file.endswith(".csv") else (read_json(line) or {} for line in f if line.strip()):
            name = next((fields[k] for k in FILE_KEYS if isinstance(fields.get(k), str)), None)
            if name is None:
                broken.append((file, "row without a file, not skipped"))
                continue
            name = os.path.normpath(os.path.join(os.path.dirname(file), name))     # only ever compared with the names that walk found
            for old, new in zip(listed.setdefault(owners.get(name, name), ([], [])), texts_of(fields)):
                old += new
    return broken


def walk(path):
    """(root, shards, images, bad): all that lies under a folder, in the order of the names; or one tar file. Images as in scan_files."""
    if os.path.isfile(path) and path.lower().endswith(".tar"):
        return os.path.dirname(path) or ".", [os.path.basename(path)], [], []
    if not os.path.isdir(path):
        raise UserError(f"no folder {path!r}: give a folder with images ({' '.join(IMAGES)}) or .tar shards, or one .tar")
    names, bad, listed = [], [], {}
    unreadable = lambda e: bad.append((os.path.relpath(e.filename, path), "unreadable"))
    for folder, folders, files in os.walk(path, onerror=unreadable):
        here = "" if folder == path else os.path.relpath(folder, path) + os.sep
        bad += [(here + f, "linked folder") for f in folders if os.path.islink(os.path.join(folder, f))]       # not followed: it may be a loop
        folders[:] = [f for f in folders if not f.endswith(INDEX)]                 # os.walk goes into what is left
        names += [here + f for f in files]
    names.sort(key=os.fsencode)                                # the same on every machine, also for names that are no UTF-8
    ends = lambda kinds: [n for n in names if n.lower().endswith(kinds)]
    stem = lambda name: os.path.splitext(name)[0]
    shards, files = ends(".tar"), ends(IMAGES)
    if not shards and not files:
        raise UserError(f"nothing to use under {path!r}: looked for images ({' '.join(IMAGES)}) and .tar shards")
    owners = {stem(f): f for f in reversed(files)}             # the first image of a name owns its .txt
    for name in names:
        if os.path.basename(name) in LISTS:
            try:
                bad += read_list(path, name, owners, listed)
            except OSError:
                bad.append((name, "unreadable"))
    twice = {f for f in files if f not in listed and owners[stem(f)] != f}
    bad += [(n, "unsupported format") for n in ends(UNSUPPORTED)] + [(n, "same key") for n in twice]
    bad += [(n, "caption without image") for n in ends(".txt") if stem(n) not in owners]
    bad += [(n, "caption without image") for n in set(listed).difference(files)]
    sidecars = {stem(n) + n[len(stem(n)):].lower(): n for n in ends((".txt", ".json"))}            # a.txt comes after a.TXT, and wins
    images = [(f, sidecars.get(stem(f) + ".txt"), sidecars.get(stem(f) + ".json"), listed.get(f)) for f in files if f not in twice]
    return path, shards, images, bad


def scan(path, workers=None):
    """
    (Indexed, bad) of all images under `path`, in memory; bad is every (name, reason). The same files give the same arrays, whatever the
    number of workers. head["report"] is {"found", "used", "skipped": {reason: count}, "captions": {...}}, with found = used + skipped.
    """
    root, shards, images, bad = walk(path)
    pillow()                                                   # said once, and not by each worker, if it is not there
    jobs = [(scan_shard, root, s) for s in shards] + [(scan_files, root, images[k:k + CHUNK]) for k in range(0, len(images), CHUNK)]
    parts = list(tqdm(in_parallel(jobs, workers), "index", len(jobs), unit="shard" if shards else "chunk", disable=None))

    arrays, duplicates = merge(root, parts)
    bad = sorted(bad + [b for p in parts for b in p.bad] + duplicates)
    counts = sum((p.counts for p in parts), Counter())
    skipped = Counter(reason_of(why) for _, why in bad if not why.endswith("not skipped"))
    used = len(arrays["samples"])
    report = {"found": used + skipped.total(), "used": used, "skipped": dict(sorted(skipped.items())),
              "captions": {k: counts[k] for k in ("missing", "empty", "truncated", "replaced")}}
    head = {"fingerprint": fingerprint(arrays), "counts": {k: len(a) for k, a in arrays.items()}, "report": report,
            "such": {reason_of(why): ascii(name) for name, why in reversed(bad)}}  # the first file of each reason, as an example
    return Indexed(arrays, head, root), bad


def in_parallel(jobs, workers):
    """Results of jobs (function, *arguments), in their order, from so many processes; few jobs are not worth a process."""
    workers = min(len(jobs), workers or (os.cpu_count() if len(jobs) > 8 else 1))
    if workers < 2:
        yield from map(run_job, jobs)
        return
    # fork: workers start at once, with all that is imported here
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(run_job, jobs)
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError("a worker of the index was killed, by lack of memory most likely: fewer --workers")
    finally:                                                   # also on Ctrl-C, which reaches this process alone: workers ignore it
        pool.shutdown(wait=False, cancel_futures=True)


def run_job(job):
    """A function of its own, because processes are told by name what to run."""
    return job[0](*job[1:])


def reason_of(why):
    """The reason that tables count, less what differs from file to file: "incomplete at byte 512" -> "incomplete shard"."""
    return re.sub(r" at byte \d+", " shard", why)


def merge(root, parts):
    """({name: array} as in ARRAYS, [(name, "duplicate")]): all parts in one, less images whose bytes and captions both came before."""
    names, captions = ([x for p in parts for x in getattr(p, k)] for k in ("files", "captions"))
    rows = np.concatenate([np.zeros(0, SAMPLE)] + [np.array(p.rows, SAMPLE) for p in parts])       # zeros: there may be no parts
    before = np.cumsum([0] + [len(p.files) for p in parts])[:-1]                   # files of the parts before each part
    rows["file"] += np.repeat(before, [len(p.rows) for p in parts]).astype(np.int32)
    count = rows["raw"].astype(np.int64) + rows["long"]        # u2 + u2 would overflow
    rows["first"] = np.cumsum(count) - count                   # captions stand in the order of their images

    # strings of any length: all bytes one after the other, and where each ends; an object array would have to be pickled
    pack = lambda blobs: (np.frombuffer(b"".join(blobs), np.uint8), np.cumsum([0] + [len(b) for b in blobs], dtype=np.int64))
    arrays = {"samples": rows, "sizes": np.array([s for p in parts for s in p.sizes], np.int64)}
    arrays["names"], arrays["name_ends"] = pack([os.fsencode(n) for n in names])
    arrays["captions"], arrays["caption_ends"] = pack(captions)

    again, data = [], Indexed(arrays, {}, root)
    said = lambda i: captions[rows["first"][i]:rows["first"][i] + count[i]]        # the captions of image i
    key = rows["crc"].astype(np.uint64) << np.uint64(32) | rows["length"].astype(np.uint64)
    _, first, group = np.unique(key, return_index=True, return_inverse=True)       # first: the earliest row of each key
    for i, earlier in ((i, first[group[i]]) for i in np.flatnonzero(first[group] != np.arange(len(rows)))):
        if said(i) == said(earlier) and data.same(i, earlier): # checksums alone may agree by chance among millions
            again.append(i)
    arrays["samples"] = np.delete(rows, again)                 # their captions stay in place, and nothing points at them
    return arrays, [(data.where(i), "duplicate") for i in again]


def require(data, bad, allow=()):
    """Raise UserError where training would not be what was meant: a shard cut short, images without captions, no image at all."""
    path, report = data.root, data.head["report"]
    mute = report["captions"]["missing"] + report["captions"]["empty"]
    for name, reason in bad:
        if reason.startswith("incomplete") and "incomplete" not in allow:
            raise UserError(f"shard {name} is {reason}: fetch it again, or go on without it: python data.py index {path} --allow incomplete")
    if not report["used"]:
        raise UserError(f"none of {report['found']} files under {path!r} can serve: python data.py check {path} tells why")
    if mute > report["used"] / 20 and "uncaptioned" not in allow:                  # one in twenty may lack one; more is a mistake in the names
        raise UserError(f"{mute} of {report['used']} images under {path!r} have no caption: put NAME.txt beside NAME.jpg, or take them with "
                        f"the null caption: python data.py index {path} --allow uncaptioned")


# ---------------------------------------------------------------------------------------------------------------
# The index: those arrays as files beside the data, read through memory maps, and the data set that they make
#
#     samples.npy                      one SAMPLE per image
#     sizes.npy                        bytes of each file that holds images, to see later whether it has changed
#     names.npy, name_ends.npy         their names: all bytes one after the other, and where each ends (a 0 first)
#     captions.npy, caption_ends.npy   captions likewise
#     index.json                       format, root, fingerprint, counts, and the table of what was found
#     bad.tsv                          every file that is not used, and why

INDEX, INDEX_FORMAT = "nanovermeer.index", 1
ARRAYS = {"samples": SAMPLE, "sizes": np.dtype("<i8"), "names": np.dtype("u1"), "name_ends": np.dtype("<i8"),
          "captions": np.dtype("u1"), "caption_ends": np.dtype("<i8")}


class Indexed:
    """
    Real images and their captions, by number, straight from the files where they lie. Arrays are memory maps where the index is on
    disk: workers share them, and memory does not grow with the number of samples. folder is where the index lies, or None.
    """

    def __init__(self, arrays, head, root, folder=None):
        self.__dict__.update(arrays)                           # samples, sizes, names, name_ends, captions, caption_ends
        self.head, self.root, self.folder, self.name = head, os.path.normpath(root), folder, os.path.abspath(root)
        self.fingerprint = head.get("fingerprint", "")
        self.unreadable, self.kept = set(), {}                 # images that failed; decoded ones, {(i, height, width, rule): array}

    def __len__(self):
        return len(self.samples)

    def size(self, i):
        """(width, height) in pixels, as shown."""
        return int(self.samples[i]["width"]), int(self.samples[i]["height"])

    def all_sizes(self):
        """int32 (n, 2): width, height."""
        return np.stack([self.samples["width"], self.samples["height"]], 1)

    def choose(self, i, which=0.0, long=False):
        """Number of a caption of image i, -1 where it has none: a long one if `long` and there is one; of several the one at `which` in [0, 1)."""
        s = self.samples[i]
        first, raw, more = int(s["first"]), int(s["raw"]), int(s["long"])
        first, count = (first + raw, more) if more and (long or not raw) else (first, raw)         # long ones stand behind the raw ones
        return first + int(which * count) if count else -1

    def text(self, number):
        """The caption of that number; -1 is the null caption."""
        return bytes(self.captions[self.caption_ends[number]:self.caption_ends[number + 1]]).decode("utf-8", "replace") if number >= 0 else ""

    def caption(self, i):
        """The first caption of image i."""
        return self.text(self.choose(i))

    @property
    def captions_count(self):
        return len(self.caption_ends) - 1

    def captions_digest(self):
        """sha256 of all captions in their order, 16 digits: embeddings are kept by a caption's number."""
        digest = hashlib.sha256(np.ascontiguousarray(self.caption_ends))
        digest.update(np.ascontiguousarray(self.captions))
        return digest.hexdigest()[:16]

    def file(self, k):
        """Name of the k-th file that holds images, relative to the root."""
        return os.fsdecode(bytes(self.names[self.name_ends[k]:self.name_ends[k + 1]]))

    def table(self):
        """Found, used, skipped by reason, captions that are odd: lines of text."""
        report, such = self.head["report"], self.head["such"]
        rows = [("found", report["found"], ""), ("used", report["used"], "")]
        rows += [("skipped", count, f"{reason}, such as {such[reason]}") for reason, count in report["skipped"].items()]
        rows += [("captions", count, reason) for reason, count in report["captions"].items() if count]
        return [f"  {what:8s} {count:9d}  {why}".rstrip() for what, count, why in rows]

    def where(self, i):
        """Name of image i: its file; of one in a shard also the member's, which stands in the 512 bytes before it."""
        s = self.samples[i]
        name = self.file(s["file"])
        if not name.lower().endswith(".tar"):
            return name
        try:                                                   # read again, so that the index need not hold millions of names
            member = tarfile.TarInfo.frombuf(read_part(os.path.join(self.root, name), int(s["offset"]) - 512, 512), "utf-8", "replace").name
        except (tarfile.TarError, OSError):
            member = f"byte {s['offset']}"
        return f"{name}/{member}"

    def read(self, i):
        """Bytes of image i. Raises Unfit if they are not those that were indexed, OSError if they cannot be read."""
        s = self.samples[i]
        blob = read_part(os.path.join(self.root, self.file(s["file"])), int(s["offset"]), int(s["length"]))
        if zlib.crc32(blob) != s["crc"]:
            raise Unfit("crc error: its bytes have changed since it was indexed")
        return blob

    def same(self, i, j):
        """Have images i and j the same bytes, still those that were indexed?"""
        try:
            return self.read(i) == self.read(j)
        except (OSError, Unfit):                               # gone, or written to, since it was looked at
            return False

    def view(self, i, height, width, draws=(0.5, 0.5), rule="crop"):
        """
        (H, W, 3) uint8, and top and left of the crop in the resized image, which two draws in [0, 1) place: 0.5 is the middle. Raises
        Unfit, OSError. Callers must not write into it: small data sets keep resized images for the next epoch.
        """
        key = (i, height, width, rule)
        image = self.kept.get(key)
        if image is None:
            w, h = covering(self.size(i), height, width, rule)
            # decoded at twice the size at least: the coarse scaling of a JPEG decoder would show below that
            image = np.asarray(decode(self.read(i), (2 * w, 2 * h)).resize((w, h), pillow().Resampling.BICUBIC))   # (h, w, 3)
            if len(self) * height * width < 2 ** 25:           # 100 MB if all are cut to the square, more where shapes differ
                self.kept[key] = image
        h, w, _ = image.shape
        left, top = int(draws[0] * (w - width + 1)), int(draws[1] * (h - height + 1))              # each place is as likely as any other
        return image[top:top + height, left:left + width], top, left

    def probe(self):
        """Refuse an index whose files are gone or changed: the sizes of up to 4096 of them, and the checksums of 64 images, tell."""
        again = f"put it back, or index again: python data.py index {self.root}"
        for k in spaced(len(self.sizes), 4096):
            path = os.path.join(self.root, self.file(k))
            size = os.path.getsize(path) if os.path.exists(path) else None
            if size != self.sizes[k]:
                what = "is gone" if size is None else f"has {size} bytes instead of {self.sizes[k]}"
                raise UserError(f"{path} {what} since it was indexed: {again}")
        some = spaced(len(self), 64)
        changed = [i for i in some if not self.same(i, i)]     # read() compares checksums
        if len(changed) * 4 > len(some):                       # one bad byte is passed over in training; this is another data set
            raise UserError(f"{len(changed)} of {len(some)} images looked at under {self.root} have changed since they were indexed, such as "
                            f"{self.where(changed[0])}: {again}")


def spaced(n, most):
    """At most so many numbers of range(n), spread evenly over it: int (k,)."""
    return np.unique(np.linspace(0, n - 1, most).astype(int)) if n else np.zeros(0, int)


def index_folder(path):
    """Where the index of `path` lies unless --to said otherwise: in the folder, or beside the .tar."""
    return os.path.join(path, INDEX) if os.path.isdir(path) else os.path.splitext(path)[0] + "." + INDEX


def fingerprint(arrays):
    """sha256, 16 digits, of names, sizes, places, checksums and captions: other data have another one. Where the data lie does not matter."""
    digest = hashlib.sha256()
    for key in ARRAYS:
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(arrays[key]).view(np.uint8))
    return digest.hexdigest()[:16]


def write_index(folder, data, bad):
    """index.json goes first when an index is made again, and comes last: without it the other files are nothing."""
    os.makedirs(folder, exist_ok=True)
    file = os.path.join(folder, "index.json")
    if os.path.exists(file):
        os.remove(file)
    for key in ARRAYS:
        atomic_write(os.path.join(folder, key + ".npy"), lambda f: np.save(f, getattr(data, key), allow_pickle=False))
    lines = "name\treason\n" + "".join(f"{json.dumps(name)[1:-1]}\t{reason}\n" for name, reason in bad)       # a name may hold a newline
    atomic_write(os.path.join(folder, "bad.tsv"), lambda f: f.write(lines.encode()))
    inside = os.path.realpath(folder).startswith(os.path.realpath(data.root) + os.sep)                        # then both may be moved together
    head = {"format": INDEX_FORMAT, "root": os.path.relpath(data.root, folder) if inside else os.path.abspath(data.root)} | data.head
    atomic_write(file, lambda f: f.write(json.dumps(head, indent=1).encode()))


def read_index(folder):
    """Indexed. Refuses, before an image is read: another format, counts and places that do not fit, files that have changed since."""
    again = "make it again: python data.py index"
    try:
        with open(os.path.join(folder, "index.json"), encoding="utf-8") as f:
            head = json.loads(f.read(2 ** 24))                 # bounded: a header is a few kB
        if head["format"] != INDEX_FORMAT:
            raise UserError(f"index {folder!r} is of format version {head['format']}, this code reads {INDEX_FORMAT}: {again}")
        with np.errstate(over="ignore"):                       # of a header that claims 2^60 rows; the map then fails
            arrays = {k: np.load(os.path.join(folder, k + ".npy"), mmap_mode="r" if head["counts"][k] else None, allow_pickle=False)
                      for k in ARRAYS}                         # an empty file cannot be mapped
        data = Indexed(arrays, head, os.path.join(folder, head["root"]), folder)
        data.table(), head["fingerprint"] + ""                 # nothing of the header is missing or of another type
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError, RecursionError) as e:
        raise UserError(f"index {folder!r} is broken ({str(e)[:200]}): {again}")
    wrong = [f"{k}.npy has {a.dtype} {a.shape}, index.json says {head['counts'][k]}" for k, a in arrays.items()
             if a.dtype != ARRAYS[k] or a.shape != (head["counts"][k],)] or misfits(arrays)
    if wrong:
        raise UserError(f"index {folder!r} is broken ({wrong[0]}): {again}")
    data.probe()
    return data


def misfits(arrays):
    """What is impossible in the arrays of an index, a list of texts. Looks at a million rows at a time, so that memory stays bounded."""
    for key, blob in (("name_ends", "names"), ("caption_ends", "captions")):
        ends = arrays[key]
        falls = (np.diff(ends[k:k + 2 ** 20 + 1]).min(initial=0) < 0 for k in range(0, len(ends), 2 ** 20))    # a text of negative length
        if not len(ends) or ends[0] != 0 or ends[-1] != len(arrays[blob]) or any(falls):
            return [f"{key}.npy does not fit {blob}.npy"]
    files, captions = len(arrays["sizes"]), len(arrays["caption_ends"]) - 1
    if files != len(arrays["name_ends"]) - 1:
        return ["sizes.npy does not fit name_ends.npy"]
    for k in range(0, len(arrays["samples"]), 2 ** 20):
        s = arrays["samples"][k:k + 2 ** 20]
        good = (s["file"] >= 0) & (s["file"] < files) & (s["offset"] >= 0) & (s["length"] > 0) & (s["length"] <= MOST_BYTES) & (s["first"] >= 0)
        good &= (s["width"] > 0) & (s["height"] > 0) & (s["first"] <= captions - s["raw"].astype(np.int64) - s["long"])
        # of the rows that are good so far, since a wild file number cannot be looked up; a difference, since a sum could overflow
        good[good] &= s["offset"][good] <= arrays["sizes"][s["file"][good]] - s["length"][good]
        if not good.all():
            return [f"sample {k + int(np.argmin(good))} of samples.npy lies outside of its file"]
    return []


def open_data(config):
    """The data set that `data` names: 'scenes'; an index; or a folder or .tar, by its index or, where it has none, scanned into memory now."""
    path = config["data"]
    if path == "scenes":
        return Scenes(config)
    for folder in (path, index_folder(path)):
        if os.path.exists(os.path.join(folder, "index.json")):
            return read_index(folder)
    data, bad = scan(path)
    require(data, bad)
    return data


# ---------------------------------------------------------------------------------------------------------------
# Captions -> tokens or embeddings. `encoder` says which:
#     "words"                     hashed words, embedded by the core; needs no file
#     "sentencepiece:FILE"        the tokens of a SentencePiece model, embedded by the core
#     "t5-xxl:128,clip-h:77"      frozen encoders of the transformers library and how many tokens of each, laid one after the other


def words(caption):
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())


def tokenize(captions, length, vocab):
    """
    Words hashed into `vocab` buckets: (B, L) int64, 0 where no word is. Needs no vocabulary file; its embedding is learned
    in the core. Captions longer than `length` words are cut. An empty caption is all zeros: the null caption of guidance.
    """
    # crc32, since Python's own hash of a string differs from process to process; 1 to vocab - 1
    return padded([[1 + zlib.crc32(w.encode()) % (vocab - 1) for w in words(c)[:length]] for c in captions], length)


def padded(rows, length):
    """Lists of tokens -> (B, L) int64, zeros behind; what is longer is cut."""
    tokens = np.zeros((len(rows), length), np.int64)
    for row, found in zip(tokens, rows):                       # row is a view of tokens
        row[:len(found)] = found[:length]
    return torch.from_numpy(tokens)


def encode_captions(captions, config):
    """
    What the model reads: (B, L) int64 tokens, or (B, L, E) float embeddings. A null caption, "", is all zeros. Without encoder_weights
    only captions of the data's own cache have embeddings. Raises UserError for an encoder other than encoder_id, the model's own.
    """
    kind = config["encoder"]
    if kind == "words":
        return tokenize(captions, config["text_length"], config["text_vocab"])
    if kind.startswith("sentencepiece:"):
        return padded(to_pieces(captions, config), config["text_length"])
    if not any(captions):                                      # the null caption takes no weights
        return torch.zeros(len(captions), config["text_length"], max(config["encoder_width"]))
    return embed_now(captions, config) if config["encoder_weights"] else embed_known(captions, config)


@functools.lru_cache(2)
def known_captions(pairs):
    """The EmbeddingCache of a data set, by which previews and scores read captions without an encoder."""
    config = dict(pairs)                                       # pairs: a dict cannot be a key of the cache
    return EmbeddingCache(open_data(config), config)


def embed_known(captions, config):
    """Embeddings (B, L, E) of captions that the data set itself holds."""
    how = f"set encoder_weights to local folders of {config['encoder']}, comma-separated"
    if config["data"] == "scenes" or not os.path.exists(config["data"]):
        raise UserError(f"captions are to be embedded, and {config['data']} holds no cache of {config['encoder']}: {how}")
    cache = known_captions(tuple((k, config[k]) for k in ("data", "encoder", "encoder_width", "encoder_id")))
    if unknown := [c for c in captions if c not in cache.numbers]:
        raise UserError(f"{unknown[0]!r} is not among the embedded captions of {config['data']}: {how}")
    return cache([cache.numbers[c] for c in captions])


# ---------------------------------------------------------------------------------------------------------------
# Pixels and latents: uint8 <-> x in [-1, 1]; the latents that an autoencoder made once


class LatentCache:
    """The latents of one centred view of each image, viewed as images are. UserError where the config has others."""

    def __init__(self, data, config):
        path, want = latents_path(data, config), about_latents(data, config)
        self.data, self.table = data, Table(path)
        about = self.table.about
        differ = [f"{k} {about.get(k)} there, {v} here" for k, v in want.items() if about.get(k) != v]
        if differ:
            raise UserError(f"{path!r} was made otherwise ({', '.join(differ)}): "
                            "delete it and run data.py embed --vae again")
        if config["flip"] or config["jitter"]:
            raise UserError("flip and jitter need pixels, and the cache of latents holds one view of each image: "
                            "switch them off, or delete the cache")

    def view(self, i, height, width, uniforms, rule):
        """(c, H/s, W/s) float, and top and left of the crop that was encoded. Raises Unfit where it could not be."""
        latents = self.table[i]
        if not latents.numel():
            raise Unfit("its latents could not be made")
        w, h = covering(self.data.size(i), height, width, rule)
        return latents, (h - height + 1) // 2, (w - width + 1) // 2       # as data.view rounds them for uniforms of 0.5


# ---------------------------------------------------------------------------------------------------------------
# Batches: which samples make up the batch of a step, in which bucket, and how each is cropped, mirrored, recoloured and captioned


def bucket_sizes(config):
    """
    The (height, width) that images are brought to, each a batch of its own. `aspects` lists them, or gives a rule: "every 64" takes long
    sides in steps of 64 px up to twice the resolution, with the largest short side whose area stays within resolution^2 (of these
    SDXL's table, Appendix I, and PixArt's are made). Raises UserError where a side is no whole number of tokens.
    """
    side, aspects = config["resolution"], config["aspects"]
    if not aspects:
        return [(side, side)]
    pixels = config["latent_stride"] if config["autoencoder"] else 1               # per latent and side
    token = config["patch"] * pixels if config["shell"] == "patch" else side / config["grid"]      # px; other shells grow with the resolution
    sizes = []
    if rule := re.fullmatch(r"every (\d+)", aspects):
        step = max(1, int(rule[1]))
        pairs = [(side * side // long // step * step, long) for long in range(side, 2 * side + 1, step)]   # (short, long), rounded down
        sizes = sorted({p for short, long in pairs if short for p in ((short, long), (long, short))})      # wide and tall
    elif re.fullmatch(r"\d+x\d+(, *\d+x\d+)*", aspects):
        sizes = [tuple(map(int, part.split("x"))) for part in aspects.split(",")]
    if not sizes:                                              # neither, or a step above the resolution
        raise UserError(f"aspects = {aspects!r}: write HxW,HxW,... or every N, such as 1024x1024,768x1376,1376x768 or every 64")
    for h, w in sizes:
        if not h * w or h % token or w % token:
            raise UserError(f"aspects = {aspects!r}: {h}x{w} must be multiples of a token, {token:g} px at resolution {side}")
    return sizes


def nearest_bucket(sizes, images):
    """For each image, (n, 2) of (width, height), the number in `sizes` of the bucket of nearest aspect ratio: int16 (n,)."""
    aspect = np.log(images[:, 0] / images[:, 1])               # in logarithms 2:1 is as far from 1:1 as 1:2 is
    best, where = np.full(len(images), np.inf), np.zeros(len(images), np.int16)
    for k, (h, w) in enumerate(sizes):                         # one at a time: memory does not grow with the number of buckets
        distance = abs(aspect - math.log(w / h))
        closer = distance < best
        best[closer], where[closer] = distance[closer], k
    return where


class Batches(torch.utils.data.Dataset):
    """
    Item `step` is the batch of that step: x (b, 3, H, W), or latents (b, c, h, w) where `latents` is set; text (b, L), or (b, L, E) of
    cached embeddings; and size (b, 6) float: original height and width, top and left of the crop in the resized image, target height
    and width in pixels (SDXL, Sec. 2.2). Of `world` devices, device `rank` gets the rank-th share of its rows. `filtered` leaves out
    images that are smaller than the target. Raises UserError where fewer than a batch are left.

    Every batch is of one bucket, the same on every device. After r rounds through the data a bucket of n images has had
    floor(r n / batch) batches, in an order shuffled anew in each round: what a round leaves over is carried into the next, so nothing
    is dropped, and still which bucket comes at which step is a function of (seed, step) alone.
    """

    def __init__(self, data, config, filtered, stage="pretrain", rank=0, world=1):
        self.data, self.config, self.stage, c = data, config, stage, config
        share = c["batch"] // world                            # b
        self.rows = slice(rank * share, (rank + 1) * share)
        self.sizes, images = bucket_sizes(c), data.all_sizes()                     # [(H, W)], (n, 2)
        self.bucket = nearest_bucket(self.sizes, images)       # (n,)
        target = np.array(self.sizes, np.int32)[self.bucket][:, ::-1]              # (n, 2), width first as in images
        large = (images >= target).all(1)                      # both sides: keep what is at least as large as the target (Sec. 3.3)
        kept = large if filtered and not c["upscale"] else np.ones(len(images), bool)
        self.usable, self.removed = np.flatnonzero(kept), 1 - kept.mean()          # numbers of images; a share
        self.members = [np.flatnonzero(kept & (self.bucket == k)).astype(np.int32) for k in range(len(self.sizes))]
        if not len(self.usable):
            raise UserError(f"none of {len(data)} images is {c['resolution']} px or more on both sides: "
                            "lower --resolution, or --upscale True keeps them")
        if len(self.usable) < c["batch"]:
            raise UserError(f"batch = {c['batch']} and only {len(self.usable)} usable images: lower --batch, or add images")
        self.orders = {}                                       # {(bucket, epoch): its samples in order}
        real = isinstance(data, Indexed)
        self.embeddings = EmbeddingCache(data, c) if real and has_pretrained_encoder(c["encoder"]) else None
        # without a cache train.py encodes each batch anew
        self.latents = LatentCache(data, c) if real and c["autoencoder"] and is_begun(latents_path(data, c)) else None

    def __len__(self):
        return self.config["steps"]

    def __getitem__(self, step):
        rows = [self.sample(epoch, i, self.latents) for epoch, i in self.pairs(step)[self.rows]]   # only this device's are read
        images, captions, sizes, numbers = zip(*rows)
        x = torch.stack(images) if self.latents else to_tensor(np.stack(images))   # (b, C, H, W)
        text = self.embeddings(numbers) if self.embeddings else encode_captions(captions, self.config)
        return x, text, torch.tensor(sizes, dtype=torch.float32)

    def bucket_at(self, step):
        """(bucket, how many batches of it came before) of a step. A round goes through as many images as there are, whatever their buckets."""
        batch, made = self.config["batch"], lambda r: np.array([r * len(m) // batch for m in self.members])        # batches after r rounds
        r = step * batch // len(self.usable)                   # this many rounds have at most `step` batches
        while made(r + 1).sum() <= step:
            r += 1
        before, now = made(r), made(r + 1)
        order = np.repeat(np.arange(len(before)), now - before)                    # this round's batches by bucket, to be shuffled
        order = generator("buckets", self.stage, self.config["seed"], r).permutation(order)
        place = step - before.sum()                            # of the step in its round
        bucket = order[place]
        return bucket, int(before[bucket] + (order[:place] == bucket).sum())

    def order(self, bucket, epoch):
        """The samples of a bucket in this epoch's order. The last two epochs are kept, since a batch may span them."""
        if (bucket, epoch) not in self.orders:
            self.orders = {(b, e): o for (b, e), o in self.orders.items() if b != bucket or abs(e - epoch) < 2}    # 4 bytes an image, each
            self.orders[bucket, epoch] = generator("order", self.stage, self.config["seed"], epoch, bucket).permutation(self.members[bucket])
        return self.orders[bucket, epoch]

    def pairs(self, step):
        """The (epoch, sample) of each row of the step's whole batch: the same on every device, whatever their number."""
        bucket, before = self.bucket_at(step) if len(self.members) > 1 else (0, step)
        batch, n = self.config["batch"], len(self.members[bucket])
        # a bucket's batches are consecutive places of its epochs, one permutation after the other: a batch may span two
        return [(p // n, int(self.order(bucket, p // n)[p % n])) for p in range(before * batch, (before + 1) * batch)]

    def sample(self, epoch, i, source=None):
        """
        (image (H, W, 3) uint8, caption, row of size, number of the caption or -1) of sample i in this epoch: crop, flip, jitter and
        caption are functions of (seed, epoch, i). From LatentCache as source, the image is (c, h, w) float. Raises UserError if no image is left.
        """
        c, source = self.config, source or self.data
        x, y, flip, drop, which, long, *jitter = uniforms(9, "data", self.stage, c["seed"], epoch, i)       # always nine: a key changes none of the others
        height, width = self.sizes[self.bucket[i]]
        i, (image, top, left) = self.readable(source, i, height, width, (x, y))    # i, or what stands in for it
        w, h = self.data.size(i)
        if c["flip"] and flip < 0.5:
            image, left = image[:, ::-1], covering((w, h), height, width, c["resize"])[0] - width - left        # from the other side
        if c["jitter"]:
            image = jittered(image, jitter, c["jitter"])
        # no caption at times: guidance needs the model without one too (Ho and Salimans)
        number = -1 if drop < c["caption_dropout"] else self.data.choose(i, which, long < c["long_captions"])
        return image, self.data.text(number), (h, w, top, left, height, width), number

    def readable(self, source, i, height, width, draws):
        """(i, view). What cannot be decoded is named, and its successor in the same bucket stands in."""
        peers = self.members[self.bucket[i]]
        at = int(np.searchsorted(peers, i))                    # members are in ascending order
        for j in itertools.chain([i], (int(peers[(at + k) % len(peers)]) for k in range(1, len(peers)))):
            try:
                return j, source.view(j, height, width, draws, self.config["resize"])
            except (OSError, Unfit) as e:
                if j not in self.data.unreadable:              # said once by each worker
                    print(f"skipped {self.data.where(j)}: {e}", file=sys.stderr)
                self.data.unreadable.add(j)
        raise UserError(f"no image of {self.data.name} can be decoded: the lines above name them")

    @property
    def identity(self):
        """
        {"data_id", "encoder_id"}: what data and which encoder a model is trained with, for its config and so for its checkpoint. Other
        data under an old run differ in data_id and are refused; who means it gives the old one by hand (--data_id).
        """
        given, here = self.config["data_id"], getattr(self.data, "fingerprint", "")
        if given not in ("", here):
            print(f"data {self.data.name} has the fingerprint {here or 'of no file'}: taken in place of {given}, as data_id says", file=sys.stderr)
        return {"data_id": given or here, "encoder_id": self.embeddings.id if self.embeddings else encoder_identity(self.config)}

    def summary(self):
        """Lines that tell what is used and what is left out."""
        c, n = self.config, len(self.data)
        lost = f"; {self.removed:.1%} are smaller than {c['aspects'] or c['resolution']} px and left out (--upscale True keeps them)"
        lines = [f"data {self.data.name}: {len(self.usable)} of {n} images are used" + lost * bool(self.removed)]
        if len(self.sizes) > 1:
            lines.append("  buckets " + ", ".join(f"{h}x{w}: {len(m)}" for (h, w), m in zip(self.sizes, self.members) if len(m)))
        return "\n".join(lines + (self.data.table() if isinstance(self.data, Indexed) else []))


# ---------------------------------------------------------------------------------------------------------------
# Commands: python data.py index|check|show|stats|vocabulary|embed. Each takes (args, config): the flags of main, and a config's dict


def index(args, config):
    """Scan, tell, and write the index beside the data or to --to."""
    begin, folder = time.perf_counter(), args.to or index_folder(args.path)        # seconds
    data, bad = scan(args.path, config["workers"])
    report = data.head["report"]
    print("\n".join(data.table()))
    if args.json:
        named = report | {"captions": {k: report["captions"][k] for k in ("missing", "empty", "truncated")}}       # what is promised, no more
        atomic_write(args.json, lambda f: f.write(json.dumps(named).encode()))
    require(data, bad, args.allow.split(","))                  # after the table, which tells more than the refusal
    write_index(folder, data, bad)
    print(f"{folder}: {len(data)} images indexed in {time.perf_counter() - begin:.1f} s; bad.tsv there names what was not. "
          f"Train on it: python train.py --data {args.to or args.path}")


def check(args, config):
    """The same table without writing anything, and how many images each resolution would keep."""
    data = Scenes(config) if args.path == "scenes" else scan(args.path, config["workers"])[0]
    print("\n".join(data.table()) if isinstance(data, Indexed) else f"{len(data)} scenes")
    if not len(data):
        return
    lengths = np.array([len(words(data.caption(i))) for i in range(min(len(data), 10000))])        # enough for a share
    print(f"captions of {lengths.mean():.1f} words; {np.mean(lengths > config['text_length']):.1%} are cut at text_length = {config['text_length']}")
    least = data.all_sizes().min(1)                            # (n,), the short sides
    for resolution in 16, 32, 64, 128, 256, 512, 1024:
        print(f"{resolution:5d} px keeps {np.mean(least >= resolution):7.1%}")


def show(args, config):
    """A contact sheet of step 0's batch after all transforms, captions beneath; without pillow they go to the terminal alone."""
    data, config = open_data(config), config | {"encoder": "words", "autoencoder": ""}             # pixels and captions, not what models read
    usable = len(Batches(data, config | {"batch": 1}, filtered=True).usable)
    batches = Batches(data, config | {"batch": min(config["batch"], usable)}, filtered=True)       # a few images are worth a look too
    rows = [(i, *batches.sample(epoch, i)) for epoch, i in batches.pairs(0)]
    for i, image, caption, size, _ in rows:
        print(f"{i:8d}  {size[1]}x{size[0]} px, crop at {size[3]},{size[2]}  {caption or '(null caption)'}")
    images, captions = [np.ascontiguousarray(r[1]) for r in rows], [r[2] for r in rows]
    write_png(args.to or "sheet.png", contact_sheet(images, captions))
    h, w, _ = images[0].shape
    print(f"{args.to or 'sheet.png'}: {len(images)} images of {w}x{h} px, in the order above\n{batches.summary()}")


FUNCTION_WORDS = frozenset("""a about above across after against all along also although am among an and another any are around as at away back be because been
before behind being below beneath beside between beyond both but by can could did do does doing down during each either else every few for from had
has have left right having he her hers him his how i if in inside into is it its itself just let like many may me might more most much must my near neither no
nor not of off on once one only onto or other our out outside over own per s same she should since so some such t than that the their them then there
these they this those three through throughout to together too toward towards two under until up upon very via was we were what when where which
while who whom whose why will with within without would you your four five six seven eight nine ten known seen shown made held set taken sits sit
stands stand lies lie appears appear wears wear holds hold looks look shows show features feature gives give contains contain captures capture""".split())


def nouns(caption):
    """
    The nouns of an English caption, told without a tagger: of each unbroken run of content words the last one, since a noun phrase
    ends in its noun ("a large red circle"). Function words, punctuation and numbers break a run; adverbs and participles, known by
    -ly, -ing and -ed, are passed over. "Painting" and the first half of "stone church" are lost to that, and some verbs are counted.
    """
    found, last = [], None
    for word in words(caption) + ["."]:                        # the stop ends the last run
        if re.fullmatch(r"\w*[aeiouy]\w+(ly|ing|ed)", word):  # with a vowel before the ending: not ring, fly, red
            continue
        if word.isalpha() and word not in FUNCTION_WORDS:
            last = word
        elif last:                                             # a run ends here
            found, last = found + [last], None
    return found


def stats(args, config):
    """The columns of PixArt-Sigma's Table 1: valid distinct nouns (in more than 10 captions' nouns), distinct nouns, all nouns, words per caption."""
    data, kinds = open_data(config), {}
    for i in tqdm(range(len(data)), "stats", disable=None):    # kinds: {"raw": captions, "long": captions}, one of each for an image
        for long in (False, True):
            number = data.choose(i, 0.0, long)
            if number >= 0 and (not long or number != data.choose(i)):             # long ones that stand in for missing raw ones count once
                kinds.setdefault("long" if long else "raw", []).append(data.text(number))
    print("caption   volume        VN        DN   total noun     ACL  average/img     (nouns by rule, without a tagger: see data.nouns)")
    for kind, captions in kinds.items():
        counts = Counter(n for c in captions for n in nouns(c))
        length = sum(len(words(c)) for c in captions) / len(captions)
        valid, total = sum(v > 10 for v in counts.values()), counts.total()        # VN: distinct nouns that are no slips of the pen
        print(f"{kind:7s} {len(captions):8d} {valid:9d} {len(counts):9d} {total:12d} {length:7.1f} {total / len(captions):12.1f}")
    print("VN: nouns that occur more than 10 times; DN: distinct nouns; ACL: average words of a caption; average/img: nouns of a caption")


def vocabulary(args, config):
    """Train a SentencePiece model on all captions (unigram, `--size` pieces at most; PixelGen-V2, Visual Foundation Model: 32,000)."""
    library, data, model = import_extra("sentencepiece", "a vocabulary"), open_data(config), io.BytesIO()
    count = data.captions_count
    library.SentencePieceTrainer.train(sentence_iterator=(data.text(n) for n in tqdm(range(count), "captions", disable=None)), model_writer=model,
                                       vocab_size=args.size, hard_vocab_limit=False, input_sentence_size=10 ** 7, shuffle_input_sentence=True, minloglevel=2)
    to = args.to or "captions.model"
    atomic_write(to, lambda f: f.write(model.getvalue()))
    pieces = library.SentencePieceProcessor(model_file=to).get_piece_size()
    print(f"{to}: {pieces} pieces of {count} captions. Train with --encoder sentencepiece:{to} --text_vocab {pieces + 1}")


def embed(args, config):
    """Embed all captions with each encoder, or all images with an autoencoder, and keep the results beside the index."""
    data = open_data(config)
    if not isinstance(data, Indexed) or not data.folder:
        raise UserError(f"{args.path!r} has no index, beside which embeddings are kept: python data.py index {args.path}")
    if not args.encoder and not args.vae:                      # both in one go are fine
        raise UserError("nothing to embed with: give --encoder t5-xxl:128 --weights FOLDER, or --vae FOLDER")
    if args.vae:
        config, sizes = config | {"autoencoder": args.vae}, bucket_sizes(config)
        embed_images(data, config, np.array(sizes)[nearest_bucket(sizes, data.all_sizes())], args.dtype)
    for encoder in open_encoders(args.encoder, args.weights, args.dtype) if args.encoder else ():
        embed_captions(data, encoder, args.dtype, config["batch"])


def embed_images(data, config, sizes, dtype):
    """Latents of one centred view of each image, cut to its row of `sizes` (n, 2), height first; empty where unfit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder, stride, channels = open_autoencoder(config, device), config["latent_stride"], config["latent_channels"]
    numbers = channels * np.prod(sizes // stride, 1).sum()
    print_room(data.folder, numbers * DTYPES[dtype].itemsize, f"latents of {len(data)} images")

    def latents(i):
        try:
            image, _, _ = data.view(i, *sizes[i].tolist(), (0.5, 0.5), config["resize"])         # (H, W, 3), the middle
        except (OSError, Unfit) as e:
            print(f"skipped {data.where(i)}: {e}", file=sys.stderr)
            return torch.zeros(0, 0, 0)                        # LatentCache.view passes over it
        z = autoencoder.encode(to_tensor(np.stack([image])).to(device))[0].cpu()                        # (c, H/s, W/s)
        if not z.isfinite().all():
            raise UserError(f"the latents of {data.where(i)} are not finite: "
                            "try --dtype fp32, or check the autoencoder")
        return z

    def make(numbers):
        return [latents(i) for i in numbers]
    about = about_latents(data, config) | {"dtype": dtype}
    write_table(latents_path(data, config), about, 3, len(data), make, config["batch"], "latents")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="any key of configs.txt is a flag too, as --resolution 256")
    parser.add_argument("command", choices=["index", "check", "show", "stats", "vocabulary", "embed"])
    parser.add_argument("path", help="a folder of images or of tar shards, or one .tar; but for index and check also an index, or scenes")
    parser.add_argument("--config", default="toy")
    parser.add_argument("--to", help="index: where it goes, default beside the data; show: the picture; vocabulary: the model")
    parser.add_argument("--json", help="index: also write the table there")
    parser.add_argument("--allow", default="", help="index: incomplete (shards, left out), uncaptioned (images, with the null caption)")
    parser.add_argument("--encoder", help="embed: such as t5-xxl:128,clip-h:77")
    parser.add_argument("--weights", default="", help="embed: the encoders' local folders, comma-separated")
    parser.add_argument("--vae", help="embed: local folder of an autoencoder, for latents at --resolution")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="embed: of the encoder and of what is kept")
    parser.add_argument("--size", type=int, default=32000, help="vocabulary: pieces at most")
    args, rest = parser.parse_known_args()                     # rest: keys of configs.txt, which load_config checks
    if len(rest) % 2 or any(not key.startswith("--") for key in rest[::2]):
        raise UserError(f"cannot read {' '.join(rest)!r}: write --KEY VALUE, as in --resolution 64")
    config = load_config(args.config, "grow", [("data", args.path)] + [(key[2:], value) for key, value in zip(rest[::2], rest[1::2])])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # an exception, so that workers are ended and files closed
    try:
        globals()[args.command](args, config)
    except KeyboardInterrupt:
        print("\nstopped: the same command starts again, embeddings where they were", file=sys.stderr)
        sys.exit(130)
    except OSError as e:                                       # what is read is guarded where it is read: this is a full or read-only disk
        print(f"error: {e}: make room or choose a place that can be written with --to", file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    main()
