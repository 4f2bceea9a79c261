"""The command of experiments.conditions: its table from made-up scores, what it asks for, and all of it, tiny."""
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments import conditions
from lib.scenes import Scenes
from lib.settings import load_config

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 pytest test_all.py")


def results_of(rank, dsg):
    exam = {"questions": {"dsg": dsg}, "fidelity": {"psnr": 25.04}}
    return {"size, no caption": {"rank": rank, "error": 0.01, "seen": 1.0}, "exam": exam}


def test_the_table_sets_told_beside_not_told_and_dsg_before_beside_after():
    before, after = [results_of(0.1, 0.80), results_of(-0.1, 0.82)], [results_of(0.9, 0.81), results_of(0.8, 0.82)]
    text = conditions.table(before, after, [("size", "no caption")])
    assert "| size | no caption | 0.85 ± 0.07 | 0.00 ± 0.14 | 0.010 ± 0.000 |" in text
    assert "| before | 0.810 ± 0.014 | 25.0 ± 0.0 |" in text and "dsg changes by 0.005 ± 0.007." in text


def test_what_is_asked_is_possible_and_judged_as_it_is():
    config = load_config("toy", "grow")
    world = Scenes(config, "exam", 0)
    images = np.stack([world.image(i, 64) for i in range(20)])
    for name in ("size", "objects", "x"):
        asked, truth = conditions.asked_numbers(world, name, 20), [world.number(i, name) for i in range(20)]
        low, high = world.numbers[name]
        assert all(low <= number <= high for number in asked)
        assert (asked == truth) == (name == "objects")         # another picture of the same caption
        assert np.allclose(conditions.judged_numbers(images, world, name), truth, atol=0.01)
    assert np.isnan(conditions.judged_numbers(np.full((1, 64, 64, 3), 255, np.uint8), world, "size")).all()
    caption = "two small red circles above a large blue square on a white background"
    said = [say(caption) for say in conditions.CAPTIONS.values()]
    assert said == ["", "two red circles above a blue square on a white background", caption]


@slow
def test_conditions_are_taken_up_measured_and_drawn_once(tmp_path):
    small = "--width 32 --depth 1 --entry_channels 16 --steps 2 --batch 4 --n 4 --seeds 0 --conditions size".split()
    command = [sys.executable, "-m", "experiments.conditions", *small, "--out", tmp_path]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures.png").exists() and "| size | no caption |" in (tmp_path / "table.md").read_text()
    (tmp_path / "0/after-size-no-caption.json").unlink()       # one score is missing: it alone is made again
    again = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count(": size, no caption") == 1
