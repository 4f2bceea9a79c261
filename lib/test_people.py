"""The page on which people compare, in a browser and on paper; how far they agree, against published figures."""
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request

import numpy as np
import pytest

from lib.people import QUESTIONS, krippendorff, ratings_score, read_ratings, write_page
from lib.settings import UserError


def tiny_page(folder, n=3, side=32):
    """A page of n pairs of plain pictures: A is darker than B. Returns its key."""
    levels = np.arange(2 * n, dtype=np.uint8).reshape(2, n, 1, 1, 1) + 100
    images = np.broadcast_to(levels, (2, n, side, side, 3))
    captions = ['a "red" </script><b>circle</b> & \u2028 PAIRS', *(f"caption {i}" for i in range(1, n))]
    write_page(str(folder), ["out/a", "out/b"], captions, images)
    return json.loads((folder / "key.json").read_text())


# ---- the page -----------------------------------------------------------------------------------------------

def test_a_page_holds_all_pictures_and_no_name(tmp_path):
    key = tiny_page(tmp_path, 40)
    page = (tmp_path / "index.html").read_text()
    pairs = json.loads(re.search(r"pairs = (.*), questions =", page)[1])
    assert len({p[side] for p in pairs for side in ("left", "right")}) == 80
    assert "out/a" not in page and "http" not in page
    order = [int(p["id"]) for p in pairs]
    assert sorted(order) == list(range(40)) != order and 8 < sum(key["swapped"].values()) < 32
    tiny_page(tmp_path / "again", 40)
    assert (tmp_path / "again/index.html").read_text() == page                     # the same page from the same seed


@pytest.fixture
def browser(tmp_path):
    """ask(method, path, **body) of a headless Chromium, in the WebDriver protocol (W3C), which is plain HTTP."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(method, path, **body):
        content = json.dumps(body).encode() if method == "POST" else None
        call = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, method=method)
        return json.load(urllib.request.urlopen(call, timeout=60))["value"]

    def ready():
        try:
            return ask("GET", "/status")
        except OSError:
            return None
    wait_for(ready)
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=500,900",
             "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", f"--user-data-dir={tmp_path / 'browser'}"]
    options = {"binary": chromium, "args": words, "prefs": {"download.default_directory": str(tmp_path)}}
    capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
    session = "/session/" + ask("POST", "/session", capabilities=capabilities)["sessionId"]
    yield lambda method, path, **body: ask(method, session + path, **body)
    ask("DELETE", session)
    process.terminate()
    process.wait()


def wait_for(call, seconds=30):
    """What call() returns as soon as it is true; a browser keeps its own time."""
    end = time.monotonic() + seconds
    while not (value := call()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


def whole_json(folder, names):
    """
    The content of the one file of these names: a browser makes an empty file first, and moves the whole one over it.
    """
    try:
        (file,) = folder.glob(names)
        return file, json.loads(file.read_text())
    except ValueError:                                         # no file yet, or no JSON
        return None


def test_people_compare_two_runs_in_a_browser(browser, tmp_path):
    key = tiny_page(tmp_path / "sheet")
    left, down, right, back = "\ue012", "\ue015", "\ue014", "\ue003"

    def script(text):
        return browser("POST", "/execute/sync", script=text, args=[])

    def press(*keys):
        actions = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        browser("POST", "/actions", actions=[{"type": "key", "id": "k", "actions": actions}])

    def wait(what):
        wait_for(lambda: script(f"return {what}"))
    browser("POST", "/url", url=(tmp_path / "sheet/index.html").as_uri())
    assert not script("return document.fonts.size")            # nothing is fetched from elsewhere
    wait("$('left').naturalWidth === 32 && $('right').naturalWidth === 32")
    assert script("return document.documentElement.scrollWidth <= innerWidth")     # fits a phone
    ids = script("return pairs.map(p => p.id)")
    script(f"go({ids.index('0')})")                            # no caption is taken for a part of the page
    assert script("return $('caption').textContent") == '\u201ca "red" </script><b>circle</b> & \u2028 PAIRS\u201d'
    script("go(-9)")
    press(left, down)                                          # both questions; then the next pair comes by itself
    wait("at === 1 && $('place').textContent === 'Pair 2 of 3, 1 answered'")
    browser("POST", "/refresh")                                # a page that is loaded again comes back where it was
    wait("at === 1 && $('bar').value === 1")
    press(back)
    wait("at === 0 && document.querySelector('#aesthetics-1').className === 'on'")
    script("$('next').click(); $('aesthetics1').click(); $('consistency1').click()")
    wait("at === 2 && $('done').hidden")
    press(right, left)
    wait("!$('done').hidden")
    script("$('save').click()")
    file, content = wait_for(lambda: whole_json(tmp_path, "answers-*.json"))
    answers = {ids[0]: (-1, 0), ids[1]: (1, 1), ids[2]: (1, -1)}
    assert content["sheet"] == key["sheet"] and set(content) == {"sheet", "rater", "answers"}
    assert content["answers"] == {pair: dict(zip(QUESTIONS, both)) for pair, both in answers.items()}
    _, votes = read_ratings(str(tmp_path / "sheet"), [str(file)])
    for pair, both in answers.items():
        for q, answer in enumerate(both):                      # column 0 is for A, 2 for B
            column = 1 + (-answer if key["swapped"][pair] else answer)
            assert votes[q, list(key["swapped"]).index(pair)].argmax() == column


# ---- ratings ------------------------------------------------------------------------------------------------

def write_answers(folder, key, rater, aesthetics, consistency, changes={}):
    """A rater's file, in which two functions choose for pair i A (-1), neither (0) or B (1)."""
    def side(pair, of_b):
        return of_b(int(pair)) * (-1 if key["swapped"][pair] else 1)               # the page counts -1 left, 1 right
    of_b = {"aesthetics": aesthetics, "consistency": consistency}
    answers = {pair: {q: side(pair, of_b[q]) for q in QUESTIONS} for pair in key["swapped"]}
    file = folder / f"{rater}.json"
    file.write_text(json.dumps(dict(sheet=key["sheet"], rater=rater, answers=answers) | changes))
    return str(file)


def prefers_a(i):
    return (-1, -1, -1, 0)[i % 4]                              # of 20 pairs 15 for A, 5 neither


def test_ratings_give_win_rates_and_agreement(tmp_path):
    key = tiny_page(tmp_path / "sheet", 20)
    ann = write_answers(tmp_path, key, "ann", prefers_a, lambda i: 1)
    bob = write_answers(tmp_path, key, "bob", prefers_a, lambda i: -1)
    _, votes = read_ratings(str(tmp_path / "sheet"), [ann, bob])
    aesthetics, consistency, together = (ratings_score(v) for v in (votes[:1], votes[1:], votes))
    value = {name: figure["value"] for name, figure in aesthetics.items()}
    assert value == {"wins_a": 0.75, "neutral": 0.25, "wins_b": 0, "alpha": 1}
    value = {name: figure["value"] for name, figure in consistency.items()}        # always apart
    assert value == {"wins_a": 0.5, "neutral": 0, "wins_b": 0.5, "alpha": pytest.approx(1 - 39 / 20)}
    assert together["wins_a"]["value"] == 0.625 and together["neutral"]["value"] == 0.125
    low, high = aesthetics["wins_a"]["interval"]               # binomial: 0.75 +- 1.96 sqrt(0.75 x 0.25 / 20)
    assert 0.5 < low < 0.65 and 0.85 < high < 1


@pytest.mark.parametrize("changes, words", [
    ({"sheet": "x"}, "another sheet"), ({"rater": "ann"}, "of one rater"),
    ({"answers": {"0": {"aesthetics": 7}}}, "KeyError: 7"), ({"answers": {"99": {"aesthetics": 1}}}, "cannot be read"),
    ({"answers": [1]}, "cannot be read")])
def test_bad_ratings_are_refused(changes, words, tmp_path, capsys):
    key = tiny_page(tmp_path / "sheet", 2)
    files = [write_answers(tmp_path, key, "ann", prefers_a, prefers_a)]
    files += [write_answers(tmp_path, key, "bob", prefers_a, prefers_a, changes)]
    with pytest.raises(UserError):
        read_ratings(str(tmp_path / "sheet"), files)
    assert words in capsys.readouterr().err
    with pytest.raises(UserError):
        read_ratings(str(tmp_path), files)                     # no key.json there


def test_agreement_is_that_of_the_published_example():
    """Krippendorff 2011, example C: four observers, twelve units; ordinal alpha 0.815."""
    rows = ["123321412   ", "1233224125 3", " 3332342251 ", "12332441251 "]
    units = [[sum(r[u] == str(level) for r in rows) for level in range(1, 6)] for u in range(12)]
    assert krippendorff(units) == pytest.approx(0.815, abs=5e-4)
    assert np.isnan(krippendorff([[2, 0, 0], [3, 0, 0]]))      # all alike: there is no chance to agree by


def test_agreement_is_that_of_the_package():
    package = pytest.importorskip("krippendorff")
    units = np.random.default_rng(0).multinomial(5, [0.5, 0.2, 0.3], 40)
    alpha = package.alpha(value_counts=units, value_domain=[0, 1, 2], level_of_measurement="ordinal")
    assert krippendorff(units) == pytest.approx(alpha, rel=1e-12)
