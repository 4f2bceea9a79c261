"""Random numbers are functions of their key, uniform or normal, and of different keys independent."""
import numpy as np
import pytest
import torch

from lib.draws import generator, hash_key, normals, uniforms


def test_draws_depend_on_their_key_alone():
    first = uniforms(9, "data", "grow", 0, 3, 5)
    uniforms(100, "data", "grow", 0, 3, 6)                     # what is drawn in between changes nothing
    assert (uniforms(4, "data", "grow", 0, 3, 5) == first[:4]).all()
    assert (uniforms(9, "data", "grow", np.int64(0), np.int32(3), 5) == first).all()
    batch = normals([("noise", 0, i) for i in range(4)], (3, 8, 8))
    assert torch.equal(normals([("noise", 0, 2)], (3, 8, 8))[0], batch[2])
    assert (generator("order", 1).permutation(50) == generator("order", 1).permutation(50)).all()


def test_purpose_stage_and_all_64_bits_of_a_seed_count():
    keys = [("data", "grow", 0, 1), ("data", "defrost", 0, 1), ("times", "grow", 0, 1), ("data", "grow", 2**32, 1),
            ("data", "grow", 0, 2**40 + 1), ("data", "grow", 0), ("data", "grow", 0, 1, 0), ("data", "grow", 1, 0)]
    assert len({uniforms(1, *key)[0] for key in keys}) == len(keys)
    assert len({float(normals([key], (1,))) for key in keys}) == len(keys)
    with pytest.raises(TypeError):
        hash_key("data", 0.5)                                 # which an int() would cut to 0
    assert max(hash_key("data", i).bit_length() for i in range(50)) > 120


def test_draws_are_uniform_and_normal_and_neighbours_independent():
    u = np.stack([uniforms(8, "data", 0, i) for i in range(8000)])  # (8000, 8): standard error of a mean 0.003
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean(0) - 0.5).max() < 0.015 and abs(u.var(0) - 1 / 12).max() < 0.004
    assert abs(np.corrcoef(u[:-1].T, u[1:].T) - np.eye(16)).max() < 0.05
    z = normals([("noise", 0, i) for i in range(8000)], (8,))
    assert z.dtype == torch.float32 and abs(z.mean(0)).max() < 0.05 and (z.var(0) - 1).abs().max() < 0.08
