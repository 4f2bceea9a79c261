"""The world is what it promises, at any resolution."""
import time

import numpy as np
import pytest

from lib.judge import look
from lib.scenes import (COLOURS, CONTRAST, GROUNDS, Scenes, describe, distance, measure_objects, render, texture_wave,
                        world_name)
from lib.settings import UserError, load_config

WHOLE_WORLD = dict(scene_shapes=4, scene_colours=6, scene_objects=3, scene_small=0.24, scene_large=0.40)


def open_world(seed=0, purpose="scenes", **keys):
    keys = dict(scene_texture=16, scene_native=32) | keys
    return Scenes(load_config("toy", "pretrain", [(key, repr(value)) for key, value in keys.items()]), purpose, seed)


def test_textures_vanish_exactly_at_the_core_resolution_and_show_above():
    world = open_world(time.time_ns() % 2 ** 31, scene_textured=1.0)
    for i in range(20):
        scene = world.scene(i)
        plain = dict(scene, objects=[dict(o, texture="plain") for o in scene["objects"]])
        assert np.allclose(render(scene, 16, 16), render(plain, 16, 16), atol=1e-12)
        assert abs(render(scene, 32, 16) - render(plain, 32, 16)).max() > 0.1


def test_a_picture_is_the_same_as_if_each_object_were_drawn_over_all_of_it():
    world = open_world(5, scene_textured=0.5, scene_scatter=1.0, **WHOLE_WORLD)
    for i in range(150):
        for resolution in (8, 16, 33, 64):
            scene, whole = world.scene(i), np.ones((resolution, resolution, 1)) * GROUNDS[world.scene(i)["ground"]]
            x = (np.arange(resolution) + 0.5)[None] / resolution
            for o in scene["objects"]:
                edge = distance(o["shape"], x - o["centre"][0], x.T - o["centre"][1], o["diameter"] / 2)
                cover, wave = np.clip(0.5 - resolution * edge, 0, 1), texture_wave(o["texture"], resolution, 16)
                whole += cover[..., None] * (COLOURS[o["colour"]] + CONTRAST * wave[..., None] - whole)
            assert np.array_equal(render(dict(scene, framed=False), resolution, 16), whole)


@pytest.mark.parametrize("scatter", [0.0, 1.0])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_shapes_keep_apart_and_inside_and_are_as_many_as_the_caption_says(most, scatter):
    world = open_world(1, **WHOLE_WORLD | dict(scene_objects=most, scene_scatter=scatter))
    for i in range(200):
        scene, objects = world.scene(i), world.scene(i)["objects"]
        assert len(objects) == sum(group["count"] for group in scene["groups"]) <= most
        for k, o in enumerate(objects):
            assert all(o["diameter"] / 2 <= c <= 1 - o["diameter"] / 2 for c in o["centre"])
            for p in objects[:k]:
                apart = max(abs(a - b) for a, b in zip(o["centre"], p["centre"]))
                assert apart >= (o["diameter"] + p["diameter"]) / 2


def test_a_world_depends_on_purpose_and_seed_alone():
    world, exam = open_world(3), open_world(3).held_out()
    assert [open_world(3).caption(i) for i in range(50)] == [world.caption(i) for i in range(50)]
    assert [exam.scene(i) for i in range(9)] == [open_world(7).held_out().scene(i) for i in range(9)]
    trial = open_world(3, scene_exam="trial").held_out()       # to tune settings by, and not on the exam
    others = [open_world(4), exam, open_world(0), trial]       # other scenes, of one world
    assert exam.scene(0) != trial.scene(0) == open_world(7, scene_exam="trial").held_out().scene(0)
    assert all([other.scene(i) for i in range(9)] != [world.scene(i) for i in range(9)] for other in others)


def test_native_sizes_remove_as_much_as_in_cc12m():
    world = open_world(scene_count=5000)
    sizes = world.all_sizes()
    assert sizes.shape == (5000, 2) and abs(np.mean(sizes.min(1) < 32) - 0.275) < 0.03
    assert all(world.size(i) == tuple(sizes[i]) for i in (0, 4095, 4096, 4999))


def test_scenes_answer_what_a_data_set_is_asked(capsys):
    world = open_world(scene_count=7)
    assert len(world) == world.captions_count == 7 and world.text(world.choose(3)) == world.caption(3)
    assert world.text(-1) == "" and "7" in world.table()[0] and world.where(2) and world.fingerprint == ""
    image, top, left = world.view(3, 16, 16, (0.5, 0.5), "crop")
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8 and (top, left) == (0, 0)
    with pytest.raises(UserError):
        world.view(3, 16, 24, (0.5, 0.5), "crop")
    assert "scenes are square" in capsys.readouterr().err


def test_other_scenes_of_a_caption_differ_in_places_and_sizes_alone():
    world = open_world(scene_scatter=1.0)
    scene, others = world.scene(5), [world.another(5, k) for k in range(3)]
    assert all(describe(other) == world.caption(5) for other in others) and world.another(5, 0) == others[0]
    assert len({str(s["objects"]) for s in [scene, *others]}) == 4
    # a world of fixed places asks for no generative model; nor does it leave anything open but sizes
    assert open_world(scene_scatter=0.0).left_open(20) < 0.04 < 0.13 < world.left_open(20)


def test_worlds_have_names():
    assert world_name(load_config("toy")) == "world-toy" and world_name(load_config("small")) == "world-standard"
    assert world_name(load_config("toy", flags=[("scene_scatter", "0.5")])) == "a world of its own"


def test_numbers_of_scenes_lie_in_their_ranges_and_the_judge_sees_them():
    world = open_world(3, scene_texture=32, scene_native=64, scene_textured=0.5)
    for i in range(60):
        truth = measure_objects(world.scene(i)["objects"])
        assert truth == {name: world.number(i, name) for name in world.numbers}
        assert all(low <= truth[name] <= high for name, (low, high) in world.numbers.items())
        seen = measure_objects(look(world.image(i, 64), world.cycles).objects)
        assert seen["objects"] == truth["objects"] and seen["textured"] == truth["textured"]
        assert abs(seen["size"] - truth["size"]) < 0.01 and abs(seen["x"] - truth["x"]) < 0.01
    assert open_world(scene_objects=1, scene_textured=0.0).numbers["objects"] == (1.0, 1.0)
