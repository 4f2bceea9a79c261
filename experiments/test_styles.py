"""The command of experiments.styles: its tables from made-up scores, and all of it with little to train."""
import os
import subprocess
import sys

import pytest

from experiments import styles
from lib.settings import load_config
from model import build

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 pytest test_all.py")


def styled_scores(rate, dsg):
    kinds = dict.fromkeys(styles.KINDS, 0.5)
    return {"questions": {"dsg": dsg, **kinds}, "fidelity": {"psnr": 25.04}, "style": {"rate": rate}, "loss": 0.03,
            "fd_random": 0.1, "mmd_random": 0.2}


def test_both_tables_have_a_row_for_each_variant_with_mean_and_spread():
    seeds = [styled_scores(0.8, 0.8), styled_scores(1.0, 0.9), styled_scores(0.9, 0.85)]
    scores = {variant: seeds for variant in styles.FORGETTING}
    rows = styles.table(styles.FIRST, scores).splitlines()
    assert len(rows) == 2 + len(styles.FORGETTING) and len({row.count("|") for row in rows}) == 1
    assert rows[2] == "| before | 0.900 ± 0.100 | 0.850 ± 0.050 | 25.0 ± 0.0 | 0.03000 ± 0.00000 |"
    # a student has no held-out loss, and the second table, of Vermeer's variants, asks for none
    student = {key: value for key, value in styled_scores(1.0, 0.9).items() if key != "loss"}
    rows = styles.table(styles.SECOND, {variant: [student] for variant in styles.ABLATION}).splitlines()
    assert len(rows) == 2 + 4 and rows[-1].startswith("| + distilled, 16 steps | 0.10 | 0.200 | 1.000 | 25.0 | 0.900 |")


def test_held_out_loss_is_that_of_training_and_the_same_twice():
    config = load_config("toy", "grow", [("width", "32"), ("depth", "1"), ("seed", "3"), ("style", "scenes")])
    net = build(config)                                        # it predicts zero: gray pictures
    loss = styles.held_out_loss(net, config, 20)
    assert loss == styles.held_out_loss(net, config | {"seed": 4}, 20) > 0.01      # the exam is one for all runs


@slow
def test_styles_are_trained_scored_and_drawn_and_made_once(tmp_path):
    small = "--width 32 --depth 1 --entry_channels 16 --steps 2 --batch 4 --sample_every 0 --n 8 --seeds 0".split()
    command = [sys.executable, "-m", "experiments.styles", *small, "--out", tmp_path]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures.png").exists() and "| + distilled, 16 steps |" in (tmp_path / "tables.md").read_text()
    again = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert again.returncode == 0 and "before" not in again.stdout.partition("pictures.png")[0]
