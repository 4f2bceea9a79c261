"""Aspect-ratio buckets: the sizes that images are brought to, each a batch of its own."""
import math
import re

import numpy as np

from lib.settings import UserError


def bucket_sizes(aspects, side, token):
    """
    [(height, width)] in pixels. `aspects` lists them, or gives a rule: "every 64" takes long sides in steps of 64 px up
    to twice `side`, with the largest short side whose area stays within side^2 (SDXL's table, Appendix I, and PixArt's
    are made of these); "" is side x side alone. Raises UserError where a side is no multiple of `token`.
    """
    if not aspects:
        return [(side, side)]
    sizes = []
    if rule := re.fullmatch(r"every (\d+)", aspects):
        step = max(1, int(rule[1]))
        pairs = [(side * side // long // step * step, long) for long in range(side, 2 * side + 1, step)]
        sizes = sorted({p for short, long in pairs if short for p in ((short, long), (long, short))})      # wide, tall
    elif re.fullmatch(r"\d+x\d+(, *\d+x\d+)*", aspects):
        sizes = [tuple(map(int, part.split("x"))) for part in aspects.split(",")]
    if rule and not sizes:
        raise UserError(f"aspects = {aspects!r}: {step} px is above the side of {side} px: take a smaller step")
    if not sizes:
        raise UserError(f"aspects = {aspects!r}: write HxW,HxW,... or every N, "
                        "such as 1024x1024,768x1376,1376x768 or every 64")
    for h, w in sizes:                                         # whole tokens, or the grid would not fit
        if not h * w or h % token or w % token:
            raise UserError(f"aspects = {aspects!r}: {h}x{w} must be multiples of a token, {token} px at {side} px")
    return sizes


def nearest_bucket(sizes, images):
    """For each image, (n, 2) of (width, height), the number in `sizes` of the nearest aspect ratio: int16 (n,)."""
    aspect = np.log(images[:, 0] / images[:, 1])               # in logarithms 2:1 is as far from 1:1 as 1:2 is
    best, where = np.full(len(images), np.inf), np.zeros(len(images), np.int16)
    for k, (h, w) in enumerate(sizes):                         # one at a time: memory does not grow with their number
        distance = abs(aspect - math.log(w / h))
        closer = distance < best
        best[closer], where[closer] = distance[closer], k
    return where
