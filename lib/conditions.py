"""
Conditions: numbers of a picture by name, told to a model beside the caption; and of a cascade the small picture.

    conditions = "objects,size"                    a key of the config: whose numbers a model knows
    condition_ranges = "objects 1..2, size 0.29..0.43"         another, filled in: the least and the largest seen

Any number that a data set has of its pictures can be a condition; a number that a picture lacks is NaN. size_and_crop
is one of six numbers, which every picture has: original height and width, top and left of the crop in the resized
image, target height and width, in pixels (SDXL, Sec. 2.2).
"""
import math
import re
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lib.draws import normals
from lib.settings import UserError, closest

SIZES = "size_and_crop"


class Condition(NamedTuple):
    """What a model has to know of a condition in order to embed it."""
    name: str
    columns: int                                               # how many numbers it is
    low: float                                                 # the least and the largest number that were seen
    high: float
    octaves: int                                               # the fastest sinusoid is so many above the slowest

    @property
    def key(self):
        """Its part of the names of weights, in which no rule on names finds a norm or an embedding."""
        return self.name.upper()


def condition_names(config):
    """The names in config["conditions"]. UserError where one cannot name a part of a model, or stands there twice."""
    names = [name.strip() for name in config["conditions"].split(",") if name.strip()]
    keys = [name.upper() for name in names]
    if wrong := [name for name in names if not re.fullmatch(r"[\w-]+", name) or keys.count(name.upper()) > 1]:
        raise UserError(f"conditions = {config['conditions']!r}: {wrong[0]!r} stands there twice or cannot be a name: "
                        "take letters, digits, _ and -, and commas between names")
    return names


def read_conditions(config):
    """[Condition] of a config, in the order of its columns. Ranges that are not known yet are those of 0 and 1."""
    ranges = parse_ranges(config["condition_ranges"])
    return [Condition(name, 6, 0.0, 2.0 ** 14, 14) if name == SIZES else           # SDXL: 1 to 2^14 radians
            Condition(name, 1, *ranges.get(name, (0.0, 1.0)), 6) for name in condition_names(config)]


def embedded_conditions(config):
    """
    [Condition] that a model embeds. A cascade is told one more, last and always: how much noise lies on the small
    picture beside z, from 0 to 1. Its name cannot be one of a picture's numbers.
    """
    level = Condition("augmentation level", 1, 0.0, 1.0, 6)
    return read_conditions(config) + [level] * (config["low_resolution"] > 0)


def count_columns(config):
    """K, how many numbers tell all conditions of a picture."""
    return sum(c.columns for c in read_conditions(config))


def parse_ranges(text):
    """"objects 1..2, size 0.29..0.43" -> {"objects": (1.0, 2.0), "size": (0.29, 0.43)}."""
    words = (part.split() for part in text.split(",") if part)
    return {name: tuple(map(float, numbers.split(".."))) for name, numbers in words}


def write_ranges(ranges):
    return ", ".join(f"{name} {low:.6g}..{high:.6g}" for name, (low, high) in ranges.items())


def ranges_seen(config, data):
    """The condition_ranges of a data set. UserError for a condition that no picture has, or all have alike."""
    ranges = {}
    for name in condition_names(config):
        if name == SIZES:
            continue
        if name not in data.numbers:
            remedy = closest(name, sorted(data.numbers)) if data.numbers else "put it into NAME.json beside the images"
            raise UserError(f"conditions: no picture of {data.name} has a number {name!r} beside it: {remedy}")
        ranges[name] = low, high = data.numbers[name]
        if not float(f"{low:.6g}") < float(f"{high:.6g}"):
            raise UserError(f"conditions: {name} is {low:.6g} in every picture of {data.name}: leave it out")
    return write_ranges(ranges)


def ranges_known(config, parent):
    """
    condition_ranges of a config, those that the config `parent` of an older run knows being the older run's: its
    weights count in them. UserError where a condition of its is left out.
    """
    there, here = condition_names(parent), condition_names(config)
    if missing := [name for name in there if name not in here]:
        both = ",".join(there + [name for name in here if name not in there])
        raise UserError(f"conditions = {config['conditions']!r}, and the older run knows {', '.join(missing)}: "
                        f"give --conditions {both}")
    known = parse_ranges(parent["condition_ranges"])
    return write_ranges(parse_ranges(config["condition_ranges"]) | known)


def condition_row(config, sizes, value):
    """The numbers of a picture, a list: `sizes` are those of size_and_crop, value(name) is any other."""
    rows = [sizes if name == SIZES else [value(name)] for name in condition_names(config)]
    return [float(number) for row in rows for number in row]


def untold(config, conditions):
    """(B, K) -> (B, K): NaN, but for size_and_crop, which models are always told."""
    kept = [c.name == SIZES for c in read_conditions(config) for _ in range(c.columns)]
    return conditions.where(torch.tensor(kept, dtype=torch.bool, device=conditions.device), math.nan)


def parse_set(text, config):
    """"size=0.4,objects=2" -> {"size": 0.4, "objects": 2.0}. A number outside of what was seen is told in a line."""
    known, values = [c for c in read_conditions(config) if c.name != SIZES], {}
    for part in filter(None, (text or "").split(",")):
        name, _, number = (word.strip() for word in part.partition("="))
        c = next((c for c in known if c.name == name), None)
        if c is None:
            ours = f"{', '.join(c.name for c in known)}: set one of these, or" if known else "no condition:"
            raise UserError(f"--set {part}: this model knows {ours} teach it: train.py --stage condition --conditions "
                            f"{name}")
        try:
            values[name] = float(number)
        except ValueError:
            values[name] = math.nan
        if not math.isfinite(values[name]):
            raise UserError(f"--set {part}: give a number, such as {name}={(c.low + c.high) / 2:g}")
        if not c.low <= values[name] <= c.high:
            print(f"{part}: only {c.low:g} to {c.high:g} was seen in training, so do not rely on it", file=sys.stderr)
    return values


# ---- cascades (Ho et al. 2022): a small picture lies beside the noisy one --------------------------------------------

def check_levels(config):
    """UserError where sampling asks for more noise on the small picture than training tells of."""
    if config["augmentation_sample"] > config["augmentation"]:
        raise UserError(f"augmentation_sample = {config['augmentation_sample']:g} is above augmentation = "
                        f"{config['augmentation']:g}, the most that training tells of: give at most that")


def check_cascade_keys(config, keys):
    """UserError for keys of a cascade that are given to another run."""
    if not config["low_resolution"] and (given := {"base", "augmentation_sample"} & set(keys)):
        raise UserError(f"--{min(given)}: this run is no cascade: leave it out")


def augmented(low, eps, level, size):
    """
    What lies beside z, (B, C, H, W): small pictures low (B, C, h, w), mixed with noise eps by a level (B,) from 0 to 1,
    which is noise alone, and enlarged to size (H, W). The noise covers that the base's pictures are no real ones
    (conditioning augmentation, Ho et al. 2022, Sec. 3.3); a level is a time of the cosine schedule, as in Imagen.
    """
    angle = (math.pi / 2 * level).view(-1, 1, 1, 1)            # radians
    return F.interpolate(angle.cos() * low + angle.sin() * eps, size, mode="bilinear")


def beside(model, low, level):
    """The model as one of z (B, C, H, W) alone: low (B, C, H, W) lies beside that, and its level (B,) is told."""
    def call(z, logsnr, text, conditions):
        copies = len(z) // len(low)                            # 2 under guidance, which leaves no picture out
        told = torch.cat([conditions, level.repeat(copies)[:, None]], 1)           # (B or 2 B, K + 1)
        return model(torch.cat([z, low.repeat(copies, 1, 1, 1)], 1), logsnr, text, told)
    return call


def seeing(model, config, low, seed, first, shape):
    """
    A cascade as a model of z alone, of this shape (C, H, W), at sampling: small pictures low (b, C, h, w), which are
    number `first` and following, are noised to `augmentation_sample`, each by a noise of its own.
    """
    low = low.to(next(model.parameters()).device)
    keys = [(f"augmentation above {config['low_resolution']}", seed, first + i) for i in range(len(low))]
    level = torch.full((len(low),), config["augmentation_sample"], device=low.device)
    return beside(model, augmented(low, normals(keys, low.shape[1:], low.device), level, shape[1:]), level)
