"""The command of experiments.sharpness, on real renderings in place of a model's pictures."""
import torch

from experiments import sharpness
from lib.pictures import to_tensor
from lib.scenes import Scenes
from lib.settings import load_config


def renderings(world, side, n=24):
    return torch.cat([to_tensor(world.image(i, side)[None]) for i in range(n)])    # (n, 3, side, side)


def test_real_pictures_are_sharp_at_their_own_size_and_when_pooled_and_not_when_enlarged():
    world = Scenes(load_config("toy", "grow", []) | {"scene_textured": 0.0}).held_out()
    small, large = (sharpness.scores(renderings(world, side), world, (32, 64)) for side in (32, 64))
    assert min(small[32][1], large[64][1]) > 40 and large[32][1] > 35              # dB
    assert small[64][1] < 35                                                       # what is not there cannot be seen
    assert sharpness.resized(torch.ones(1, 3, 8, 8), 16).shape == (1, 3, 16, 16)
    lines = sharpness.table([(small, large), (small, large)]).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and lines[-1].count("± 0.0 dB") == 2
