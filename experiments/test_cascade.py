"""The command of experiments.cascade: its tables from made-up scores, what it enlarges, and all of it, tiny."""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from experiments import cascade
from lib.settings import UserError, load_config

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 pytest test_all.py")


def test_the_tables_set_true_beside_drawn_small_pictures_with_mean_and_spread():
    seeds = [{"dsg": 0.8, "psnr": 25.0, "other": 0.9}, {"dsg": 0.9, "psnr": 26.0, "other": 0.7}]
    better = [{"dsg": figures["dsg"] + 0.05, "psnr": figures["psnr"] + 1} for figures in seeds]
    scores = {row: better if row.low == "true" else seeds for row in
              [*cascade.ALONE, *(row for pair in cascade.GAPS for row in pair), *cascade.SWAPPED]}
    rows = cascade.gap_table(scores).splitlines()
    assert len(rows) == 2 + 2 + 5 and len({row.count("|") for row in rows}) == 1
    assert rows[2] == "| base, at 32 px | |  | 0.850 ± 0.071 |  |  | 25.5 ± 0.7 |  |"
    assert rows[5] == ("| cascade, augmented | 0.14 | 0.900 ± 0.071 | 0.850 ± 0.071 | 0.050 ± 0.000 | 26.5 ± 0.7 | "
                       "25.5 ± 0.7 | 1.0 ± 0.0 |")
    rows = cascade.use_table(scores).splitlines()
    assert rows[-1] == "| cascade, plain | 0 | 0.850 ± 0.071 | 0.800 ± 0.141 |" and len(rows) == 2 + 5


def test_a_cascade_takes_the_flops_of_growing():
    keys = {"width": "32", "depth": "1"}
    steps, grown = cascade.equal_steps(keys), load_config("toy", "grow")["steps"]
    cost = cascade.training_flops("cascade", keys)
    assert abs(steps * cost - grown * cascade.training_flops("grow", keys)) < cost
    assert cascade.training_flops("grow", keys) < cascade.training_flops("finetune", keys)   # a frozen core is cheaper
    assert cascade.equal_steps({"steps": "7"}) == 7
    assert "| cascade | 7 |" in cascade.cost_table({"steps": "7", **keys})


def test_what_is_enlarged_is_the_worlds_picture_made_small_or_that_of_the_next_caption():
    config = load_config("toy", "cascade")
    pictures = cascade.Pictures("", "", 3)
    true, another = (pictures.small(config, low) for low in ("true", "another"))
    assert true.shape == (3, 3, 32, 32) and torch.equal(another, torch.stack([true[1], true[2], true[0]]))
    world = cascade.open_data(config).held_out()
    whole = torch.from_numpy(world.image(1, 64) / 127.5 - 1).permute(2, 0, 1).float()
    assert torch.allclose(true[1], F.avg_pool2d(whole, 2), atol=1e-5)


def test_a_cascade_above_another_base_is_refused(monkeypatch, capsys):
    config = load_config("toy", "cascade") | {"base_id": "of another"}
    monkeypatch.setattr(cascade, "load", lambda path, device: (None, config))
    with pytest.raises(UserError):
        cascade.Pictures("out", "none", 2).of(cascade.Row("plain", "drawn"))
    assert "out/plain/toy/cascade was not trained above none/toy/pretrain" in capsys.readouterr().err


@slow
def test_cascades_are_trained_scored_and_drawn_and_made_once(tmp_path):
    small = "--width 32 --depth 1 --entry_channels 16 --steps 2 --batch 4 --sample_every 0 --n 2 --seeds 0".split()
    command = [sys.executable, "-m", "experiments.cascade", *small, "--out", tmp_path]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures.png").exists() and "| cascade, plain | 0 |" in (tmp_path / "tables.md").read_text()
    again = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert again.returncode == 0 and ": augmented true" not in again.stdout
