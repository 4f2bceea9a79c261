"""The second judge, on real renderings in place of a model's pictures."""
import numpy as np
import pytest

from experiments import second_judge
from lib.scenes import Scenes
from lib.settings import load_config


def real_pictures():
    """The standard world, of four shapes and textures, and 40 of its pictures."""
    pytest.importorskip("scipy")
    world = Scenes(load_config("speedrun", "grow", [])).held_out()
    return world, [world.image(i, 64) for i in range(40)]


def test_both_judges_find_all_that_is_in_real_pictures():
    world, pictures = real_pictures()
    found = second_judge.figures(pictures, world)
    assert found.pop("noise") == 0 and set(found.values()) == {1}


def test_the_second_judge_sees_what_is_wrong():
    world, pictures = real_pictures()
    chance = second_judge.figures(pictures[1:] + pictures[:1], world)              # each for another's caption
    assert chance["dsg, second"] < 0.3 and chance["answers alike"] > 0.98
    speckle = np.random.default_rng(0).normal(0, 4, (64, 64, 3))                   # of 255
    speckled = [np.uint8(16 + 0.87 * image + speckle + 0.5) for image in pictures] # off the ends, where it would be cut
    found = second_judge.figures(speckled, world)
    assert found["noise"] == pytest.approx(4 / 255, rel=0.1) and found["dsg, second"] > 0.95


def test_a_shape_that_is_none_is_a_blob():
    pytest.importorskip("scipy")
    bar = np.zeros((64, 64, 3), np.uint8)
    bar[30:34, 10:50] = 217, 38, 38                            # 4 x 40 px, red
    (thing,) = second_judge.look_again(bar, 32)[0].objects
    assert thing["shape"] == "blob" and thing["colour"] == "red" and thing["centre"] == pytest.approx((30 / 64, 0.5))


def test_an_empty_picture_has_no_objects():
    pytest.importorskip("scipy")
    for value, ground in ((20, "black"), (140, "gray"), (255, "white")):
        seen, noise = second_judge.look_again(np.full((64, 64, 3), value, np.uint8), 32)
        assert (seen.ground, seen.objects, len(noise)) == (ground, [], 1) and not noise[0].any()


def test_its_table_has_a_column_for_each_figure():
    columns = second_judge.COLUMNS
    lines = second_judge.table({"drawn": [dict.fromkeys(columns, 0.5)] * 2}).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and lines[-1].count("0.500 ± 0.000") == len(columns)
