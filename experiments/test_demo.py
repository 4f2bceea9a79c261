"""The page to type captions into: what it draws and says without gradio, and all of it in a browser."""
import importlib.util
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from experiments import demo
from lib.checkpoint import FORMAT
from lib.pictures import make_grid, to_uint8
from lib.settings import UserError, load_config
from lib.test_people import browser, wait_for  # noqa: browser is a fixture
from lib.test_published import pipelines  # noqa: a fixture
from model import build, load
from sample import sample

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="session")
def drawer(tmp_path_factory):
    """A run folder with random weights, 16 px."""
    small = [("width", "32"), ("depth", "1"), ("resolution", "16"), ("grid", "8"), ("scene_native", "16")]
    config, folder = load_config("toy", "pretrain", small), tmp_path_factory.mktemp("drawer")
    torch.manual_seed(0)
    state = {"format": FORMAT, "name": "toy", "stage": "pretrain", "step": 7, "config": config, "parents": [],
             "model": {name: p + 0.1 * torch.randn_like(p) for name, p in build(config).state_dict().items()},
             "ema": {}, "moments": {}}                         # last layers start at zero: all pictures would be alike
    torch.save(state, folder / "last.pt")
    return str(folder)


@pytest.fixture(scope="session")
def student_drawer(drawer, tmp_path_factory):
    """The same weights as those of a student of 3 steps."""
    folder, state = tmp_path_factory.mktemp("student"), torch.load(os.path.join(drawer, "last.pt"))
    state["config"] |= dict(objective="consistency", sampler="ddim", sample_steps=3, teacher_steps=3)
    torch.save(state, folder / "last.pt")
    return str(folder)


@pytest.mark.parametrize("sampler", ["ddpm", "exp_heun"])
def test_the_page_draws_what_sample_draws_and_how_it_came_about(drawer, sampler):
    model, config = load(drawer)
    pictures, strip = demo.draw(model, config, " a red circle ", 17, 10, 3.0, sampler, 5, "")
    x = sample(model, config, ["a red circle"] * 17, seed=5, steps=10, guidance=3.0, sampler=sampler)
    assert np.array_equal(pictures, make_grid(to_uint8(x), 4, most=256))
    side = 128 + 2                                             # of a picture in the strip, and a line between two
    assert strip.shape == (2 * side + 2, demo.STRIP * side + 2, 3)
    last = strip[side + 2:-2, -side:-2]                        # below, on the right: the first picture
    assert np.array_equal(last, make_grid(to_uint8(x[:1]), 1, 0, 128))
    first = strip[2:side, 2:side]                              # above, on the left: noise alone
    assert first.std() > 60 and not np.array_equal(first, last)
    few = demo.draw(model, config, "", 1, 2, None, sampler, 5, "")[1]
    assert few.shape[1] == (2 if sampler == "ddpm" else 3) * side + 2              # as many as there are evaluations


@pytest.mark.parametrize("kind", ["pixart", "sdxl"])
def test_the_page_draws_by_a_published_pipeline(pipelines, kind):  # noqa
    """In pixels, of another shape than square; its path is decoded."""
    model, config = load(pipelines[kind][1])
    pictures, strip = demo.draw(model, config, "a red circle", 2, 3, 4.5, "dpm", 5, "16x20")
    x = sample(model, config, ["a red circle"] * 2, seed=5, steps=3, guidance=4.5, sampler="dpm", size=(16, 20))
    assert np.array_equal(pictures, make_grid(to_uint8(x), 2, most=256))
    last = make_grid(to_uint8(x[:1]), 1, most=128)             # with a line round it
    assert np.array_equal(strip[-last.shape[0] + 2:-2, -last.shape[1] + 2:-2], last[2:-2, 2:-2])


def test_the_page_refuses_in_sentences(drawer, capsys):
    model, config = load(drawer)
    student = config | {"objective": "consistency", "sample_steps": 16, "sampler": "ddim"}
    plain = dict(caption="a", n=1, steps=2, guidance=None, sampler="ddim", seed=0, size="")
    for config_, changes, words in [
            (config, dict(size="16x17"), "--size 16x17: this run makes 16x16, or sides that are multiples of 2"),
            (config, dict(steps=None), "steps, seed: give whole numbers"), (config, dict(n=0), "at least 1"),
            (config, dict(guidance=-1.0), "guidance = -1.0: take at least 0"),
            (student, dict(steps=16, guidance=2.0), "is inside this student"),
            (student, dict(steps=3), "3 steps: with sample_steps = 16"),
            (student, dict(steps=16, sampler="dpm"), "a student of consistency takes ddim or ddpm or churn")]:
        with pytest.raises(UserError) as error:
            demo.draw(model, config_, **plain | changes)
        assert words in error.value.message and f"error: {error.value.message}" in capsys.readouterr().err


def start_page(run, folder):
    """(address, process) of a page that draws by this run, when it answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = open(folder / "page.log", "w")
    page = subprocess.Popen([sys.executable, "-m", "experiments.demo", run, f"--port={port}"], cwd=HERE, stdout=log,
                            stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def answers():
        assert page.poll() is None, (folder / "page.log").read_text()
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False
    wait_for(answers, 120)
    return f"http://127.0.0.1:{port}/", page


@pytest.mark.parametrize("run", ["drawer", "student_drawer"])
def test_pictures_are_drawn_in_a_browser(run, browser, tmp_path, request):  # noqa
    """Of a student at the first click, without a word about guidance."""
    if not importlib.util.find_spec("gradio"):
        pytest.skip("needs gradio: pip install gradio")
    address, page = start_page(request.getfixturevalue(run), tmp_path)

    def script(text):
        return browser("POST", "/execute/sync", script=text, args=[])

    def field(where):
        """The path of an element in the WebDriver protocol."""
        wait_for(lambda: script(f"return !!document.querySelector('{where}')"))
        return "/element/" + list(browser("POST", "/element", using="css selector", value=where).values())[0]

    def write(where, text):
        element = field(where)
        script(f"document.querySelector('{where}').select()")
        browser("POST", element + "/value", text=text)

    def drawn(name):
        return script(f"const i = document.querySelector('#{name} img'); return i && i.complete ? i.src : ''")
    try:
        browser("POST", "/url", url=address)
        write("#caption textarea", "a red circle")
        if run == "drawer":
            write("#steps input", "3")
        assert script("return !!document.querySelector('#guidance input')") == (run == "drawer")
        browser("POST", field("#draw") + "/click")
        first = wait_for(lambda: drawn("pictures") and drawn("path") and drawn("pictures"), 60)
        sizes = script("return ['pictures', 'path'].map(n => document.querySelector(`#${n} img`).naturalWidth)")
        assert sizes == [4 * (256 + 2) + 2, 3 * (128 + 2) + 2]
        write("#size textarea", "16x17")
        browser("POST", field("#draw") + "/click")
        said = wait_for(lambda: script("return document.querySelector('.toast-body')?.innerText"))
        assert "this run makes 16x16" in said and "multiples of 2" in said
        write("#size textarea", "\ue003" * 5)                     # backspace
        write("#caption textarea", "a blue square")
        browser("POST", field("#draw") + "/click")
        wait_for(lambda: drawn("pictures") not in ("", first), 60)
        names = script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert len(names) > 5 and all(name.startswith((address, "data:", "blob:")) for name in names), names
    finally:
        page.terminate()
        page.wait()
