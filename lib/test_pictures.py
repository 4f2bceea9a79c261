"""What is drawn_panels: PNG files that others read, tensors that come back, curves of what a log holds."""
import sys

import numpy as np
import pytest
import torch

from lib import pictures
from lib.pictures import contact_sheet, draw_curves, draw_tuning, make_grid, to_tensor, to_uint8, write_png

TUNING = {"guidance": [1, 2, 3], "curves": {"dsg": [.1, .2, .3], "chance_dsg": [.1, .1, .1], "entities": [0, 0, 0],
                                            "fd_random": [3, 1, 2]}, "optimum": {"fd_random": 2}, "range": [2, 3]}


def noise_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_png_is_read_back_by_a_library(tmp_path):
    image, pixels = pytest.importorskip("PIL.Image"), noise_images(5, 7, 3)
    write_png(str(tmp_path / "x.png"), pixels)
    assert (np.asarray(image.open(tmp_path / "x.png")) == pixels).all()


def test_uint8_comes_back_from_a_tensor_and_is_clamped():
    images = noise_images(2, 5, 7, 3)
    x = to_tensor(images)
    assert x.shape == (2, 3, 5, 7) and x.min() >= -1 and x.max() <= 1 and (to_uint8(x) == images).all()
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(1, 3, 1, 1)).tolist() == [[[[0, 255, 128]]]]


def test_grids_and_sheets_hold_every_image(monkeypatch):
    images = noise_images(5, 32, 32, 3)
    grid = make_grid(images, columns=3)
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3) and (grid[2:66:2, 2:66:2] == images[0]).all()
    assert (grid[68:132:2, 68:132:2] == images[4]).all() and (grid[68:, 134:] == 255).all()
    monkeypatch.setitem(sys.modules, "PIL", None)              # as where pillow is not installed
    assert contact_sheet(images, ["a"] * 5).shape == make_grid(images, 4, most=256).shape


def test_captions_are_written_beneath_their_images():
    pytest.importorskip("PIL")
    sheet = contact_sheet(noise_images(6, 32, 32, 3), ["level"] * 6)
    assert sheet.shape == (2 * (256 + 16 + 12), 4 * 264, 3)
    strip = sheet[262:280, :264]
    assert strip.min() < 60 and strip.max() == 255


@pytest.fixture
def drawn_panels(monkeypatch):
    """The panels that would be drawn_panels."""
    panels = []
    monkeypatch.setattr(pictures, "draw_panels", lambda p, *_: panels.extend(p))
    return panels


@pytest.mark.parametrize("score, label, points", [
    ({"questions": {"entities": 0.2, "dsg": 0.5}, "fd_random": 2.0}, "dsg", {9: 0.5}),
    ({"fd_random": 2.0, "mmd_random": 3.0}, "fd_random", {9: 2.0}), (None, "no score yet", {})])
def test_curves_show_a_score_that_the_log_holds(score, label, points, drawn_panels):
    lines = [{"step": step, "loss": loss, "bins": [1, 2, 3, 4]} for step, loss in ((3, 0.5), (6, 0.4), (6, 0.3))]
    draw_curves(lines + ([{"step": 9, "score": score}] if score else []), "curve.png")
    (_, losses, _), (_, scores, _) = drawn_panels
    assert losses["loss"] == {3: 0.5, 6: 0.3} and losses["noisiest quarter"] == {3: 4, 6: 4}
    assert scores == {label: points}


def test_each_metric_has_its_panel_and_a_chance_level(drawn_panels):
    draw_tuning(TUNING, "guidance.png")
    assert drawn_panels == [("dsg", {"dsg": {1: .1, 2: .2, 3: .3}, "chance": {1: .1, 2: .1, 3: .1}}, {}),
                     ("fd_random, lowest at 2", {"fd_random": {1: 3, 2: 1, 3: 2}}, {})]


def test_curves_are_png_files_in_which_one_point_is_seen(tmp_path):
    pytest.importorskip("matplotlib")
    draw_tuning(TUNING, str(tmp_path / "g.png"))
    for name, loss in (("one", 0.5), ("none", float("nan"))):  # two logs of a line each
        draw_curves([{"step": 5, "loss": loss, "bins": [1, 1]}], str(tmp_path / name))
    one, none = (tmp_path / "one").read_bytes(), (tmp_path / "none").read_bytes()
    assert one.startswith(b"\x89PNG") and one != none and (tmp_path / "g.png").stat().st_size > 5000


def test_without_matplotlib_curves_are_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw_curves([{"step": 5, "loss": 0.5, "bins": [1, 1]}], "curve.png")
    assert "pip install matplotlib" in capsys.readouterr().out
