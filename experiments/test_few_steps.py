"""The command of experiments.few_steps: its table from made-up scores, and all of it with little to train."""
import os
import subprocess
import sys

import pytest

from experiments import few_steps
from lib.settings import load_config

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 pytest test_all.py")


def scored(dsg):
    return {"questions": {"dsg": dsg}, "fidelity": {"psnr": 25.04}, "diversity": {"places": 0.8}}


def test_the_table_has_a_row_for_each_method_with_mean_and_spread_over_seeds():
    scores = {method: [scored(0.8), scored(0.9), scored(0.85)] for method in few_steps.METHODS}
    rows = few_steps.table(scores, [0.5] * len(scores), load_config("toy", "grow", [])).splitlines()
    assert len(rows) == 2 + len(few_steps.METHODS) and len({row.count("|") for row in rows}) == 1
    assert rows[2] == "| teacher by churn, 32 steps | 56 | 0.500 | 0.850 ± 0.050 | 25.0 ± 0.0 | 0.80 ± 0.00 |"
    assert rows[3].startswith("| teacher by ddpm, 256 steps | 512 |")              # guided throughout
    assert rows[-1].startswith("| dmd by lcm, 1 step | 1 |")   # no guidance on top: one evaluation
    assert few_steps.mean_and_spread([0.8], 3) == "0.800"      # of one seed no spread is known


@slow
def test_teachers_and_students_are_trained_scored_and_drawn_and_made_once(tmp_path):
    small = "--width 32 --depth 1 --entry_channels 16 --steps 2 --batch 4 --sample_every 0 --n 8 --seeds 0".split()
    command = [sys.executable, "-m", "experiments.few_steps", *small, "--out", tmp_path]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures.png").exists() and "dmd by lcm, 1 step" in (tmp_path / "table.md").read_text()
    again = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert again.returncode == 0 and "teacher by ddpm" not in again.stdout.partition("| method")[0]
