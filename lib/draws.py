"""
Random numbers as pure functions of a key.

    uniforms(9, "data", stage, seed, epoch, i)                     # nine numbers of sample i, whatever was drawn before
    normals([("noise", stage, seed, step, row)], (3, 64, 64))      # the noise of one row of one batch

A key begins with its purpose, so that no two uses of randomness meet, and goes on with all that the numbers may depend
on. Nothing is remembered between two calls: a run that is resumed, or spread over another number of devices of the same
kind, draws the same numbers without any saved state. Names and integers make a key; its hash has 128 bits, of which a
GPU's generator takes 63.
"""
import hashlib
import operator

import numpy as np


def hash_key(*key):
    """A key of names and integers, Python's or numpy's -> an integer below 2^128 (BLAKE2b). TypeError for a float."""
    text = repr(tuple(part if isinstance(part, str) else operator.index(part) for part in key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")


def generator(*key):
    """numpy's Generator for this key, counter-based (Philox, Salmon et al. 2011): permutations, choices and more."""
    return np.random.Generator(np.random.Philox(key=hash_key(*key)))


def uniforms(count, *key):
    """`count` uniform numbers in [0, 1): float64 (count,). The first k are the same whatever the count."""
    return generator(*key).random(count)


def normals(keys, shape, device="cpu"):
    """
    Standard normal numbers, float32 (len(keys), *shape). Row i depends on keys[i] alone, so an image is the same in any
    batch. On a GPU they are drawn there, by its own generator: other numbers than on a CPU, and much faster.
    """
    import torch                                               # data.py check, index and stats go without
    if torch.device(device).type == "cpu":
        return torch.from_numpy(np.stack([generator(*key).standard_normal(shape, np.float32) for key in keys]))
    seeds = [hash_key(*key) % 2**63 for key in keys]           # so that it fits a signed integer too
    rows = [torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device) for seed in seeds]
    return torch.stack(rows)
