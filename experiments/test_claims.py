"""The claims: what their code makes of made-up measures, that registered texts hold, and all of it with tiny runs."""
import functools
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from experiments import claim_contrasts, claim_measures, claim_runs, claims
from lib.contrasts import Estimate, verdict
from lib.settings import UserError, load_config
from model import build

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXTS = os.path.join(HERE, "experiments", "claims.txt")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 pytest test_all.py")
SEEDS = [1, 2, 3, 4]
TEXT_HASHES = {"spread": "d322d8c7577d7cd1", "costs": "6d2e5dc5c4fddfca", "frozen": "8cd037f3abe2a1a7",
               "forgetting": "419e00f177f61707", "guidance": "6d4e0c7d604d46e9"}


class MadeUp:
    """
    Measures of a world in which the truth is known: {arm: dsg}, where a snapshot has its share of the last dsg that it
    has of log steps; {arm: share of frames}; {arm: damage}; optima of guidance at 1 and 2.5.
    """
    draws = 100

    def __init__(self, dsg, damage=0.3, framed={}):
        self.dsg, self.lost, self.framed, self.draw = dsg, damage, framed, np.random.default_rng(0)
        self.pictures = functools.cache(self.pictures)         # measured once
        self.rows = np.random.default_rng(1).normal(0, 1, (200, 6))

    def arm(self, file):
        return os.path.normpath(file).split(os.sep)[-4 if file.endswith(".pt") else -3].split("-s")

    def pictures(self, file, n, guidance, noise=0, first=0, token=False):
        arm, seed = self.arm(file)
        step = int(os.path.basename(file)[5:-3]) if "step_" in file else 200       # of 200
        mean = self.dsg[arm] * (1 + np.log2(step / 200) / 10) + 0.02 * int(seed) + self.draw.normal(0, 0.004)
        off = {"judge": np.log(guidance / 2.5), "random": np.log(guidance)}
        worse = 1 - self.dsg[arm]                              # lies further from the real ones
        return {"dsg": list(np.full(n, mean)), "chance": 0.2, "framed": [self.framed.get(arm, 0) if token else 0] * n,
                **{k: (self.rows[:n] + 1 + v ** 2 + worse).tolist() for k, v in off.items()}}

    def loss(self, file, n, first=0):
        arm, _ = self.arm(file)
        return 0.1 * (2 - self.dsg[arm]) * (1 + self.draw.normal(0, 0.002))

    def damage(self, file, parent, n, seed, refit=0):
        if file is None:
            return 0.3 + self.draw.normal(0, 0.001)
        return 0.1 + (self.arm(file)[0] != "P") * 0.2 * self.lost + self.draw.normal(0, 0.001)

    def reference(self, config):
        return {"judge": self.rows + 1, "random": self.rows + 1}

    def ceiling(self, config, n):
        return 0.99


def lab_of(folder, **truth):
    return claim_runs.Lab(str(folder), "claims", {}, MadeUp(**truth))


def text_of(name):
    return claims.read_claims(TEXTS)[name]


def test_a_claim_that_is_true_is_confirmed_and_one_that_is_false_refuted(tmp_path):
    true = {"G": 0.8, "F": 0.7, "F+": 0.65, "S": 0.6, "D": 0.75, "Q": 0.5}
    false = true | {"F+": 0.9}              # the better of two finetuned ones counts
    for truth, word in ((true, "confirmed"), (false, "refuted"), (true | dict(F=0.8), "undecided not at this size")):
        lab, text = lab_of(tmp_path, dsg=truth), text_of("frozen")
        found = claim_contrasts.frozen(lab, text, SEEDS)
        estimate = found["primary"]
        best = max(truth["F"], truth["F+"])
        assert estimate.mean == pytest.approx(truth["G"] - best, abs=0.01) and found["sensitive"]
        assert verdict(estimate, estimate.p, float(text["margin"]))[0] in word
        assert estimate.df == 12                               # five arms, four seeds
        low, high = found["captions"]
        assert low - 1e-9 <= estimate.mean <= high + 1e-9      # one number a picture: no spread
    assert claim_contrasts.frozen(lab_of(tmp_path, dsg=true | dict(Q=0.8)), text, SEEDS)["sensitive"] is False


def test_damage_is_scaled_between_the_core_and_first_weights(tmp_path):
    for lost in (0.0, 0.3, 1.0):
        lab = lab_of(tmp_path, dsg={"F": 0.5, "F+": 0.4}, damage=lost)
        found = claim_contrasts.forgetting(lab, text_of("forgetting"), SEEDS)
        assert found["primary"].mean + 0.05 == pytest.approx(lost, abs=0.02) and found["sensitive"]
    steps, values = found["panels"][0]["lines"]["F, new shell"]
    assert steps == [10, 200] and np.shape(values) == (4, 2)
    assert set(claim_runs.snapshot_steps(lab_of(tmp_path, dsg={}), "D")) == {2, 5, 10, 20, 50, 100}


def test_the_optimum_of_guidance_is_found_where_it_is(tmp_path):
    lab = lab_of(tmp_path, dsg=dict(G=0.9, P=0.9, Q=0.5))
    found = claim_contrasts.guidance(lab, text_of("guidance"), SEEDS)
    assert found["primary"].mean > 0.4 and found["sensitive"]  # log 2.5 by the made-up curves, on a coarse grid
    assert found["captions"][0] > 0.4
    x = np.log([0.5, 1, 1.5, 2, 3, 4])
    place, inside = claim_measures.vertex(x, (x - np.log(1.7)) ** 2)
    assert inside and np.exp(place) == pytest.approx(1.7)
    assert claim_measures.vertex(x, -x) == (pytest.approx(np.log(4)), False)       # an optimum at an end is none


def test_verdicts_are_adjusted_for_each_other_and_told_in_a_table(tmp_path):
    lab, texts = lab_of(tmp_path, dsg={}), claims.read_claims(TEXTS)
    for name, mean in (("frozen", 0.05), ("forgetting", 0.03), ("spread", 0.001)):
        os.makedirs(tmp_path / name)
        result = {"primary": [mean, 0.016, 12, 4], "here": "words", "figures": {"more": "of it"}, "seeds": SEEDS}
        (tmp_path / name / f"{name}.json").write_text(json.dumps(result))
    results = claims.judged(lab, texts)
    assert results["frozen"]["holm_p"] == pytest.approx(2 * results["frozen"]["p"])          # of two, the smaller
    assert results["frozen"]["verdict"][0] == "confirmed" and results["forgetting"]["verdict"][0] == "undecided"
    text = claims.table(lab, texts)
    assert text.count("\n| ") == 3 and "**confirmed**" in text and "- more: of it" in text


def test_a_registered_text_that_changes_is_refused(tmp_path, capsys):
    lab, text = lab_of(tmp_path, dsg={}), text_of("frozen")
    claims.register(lab, "frozen", text)
    claims.register(lab, "frozen", text)                       # the same again is none
    for lab, text in ((lab, text | {"n": "400"}), (lab._replace(config="small"), text)):
        with pytest.raises(UserError):
            claims.register(lab, "frozen", text)
        assert "frozen" in capsys.readouterr().err


def test_seeds_that_are_not_registered_are_not_trained(tmp_path, capsys):
    with pytest.raises(UserError):
        claims.investigate(lab_of(tmp_path, dsg={}), "frozen-long", text_of("frozen-long"), [4, 5])
    assert "frozen-long has [5, 6, 7, 8], not [4]" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_the_texts_that_were_registered_first_are_what_they_were():
    """Whatever is added to the file and to its rules: their runs were made, and their verdicts told, under these."""
    words = {name: "".join(f"{key} = {value}\n" for key, value in text_of(name).items()) for name in list(TEXT_HASHES)}
    assert {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in words.items()} == TEXT_HASHES


def test_every_claim_is_registered_with_what_decides_it(tmp_path):
    texts = claims.read_claims(TEXTS)
    assert set(texts) == set(claims.CLAIMS)
    for text in texts.values():
        assert {"title", "paper", "source", "arms", "primary", "refuted", "seeds", "exam"} <= text.keys()
        assert set(text["arms"].split()) <= set(claim_runs.ARMS)
        assert text.get("round", "1") == "1" or {"margin", "known", "loss_n"} <= text.keys() or "same" in text
    lab = lab_of(tmp_path, dsg={})
    flags = {arm: claim_runs.flags_of(lab, arm, 1) for arm in claim_runs.ARMS}
    steps = {arm: keys["steps"] for arm, keys in flags.items()}
    assert steps["G"] == steps["F"] == steps["S"] == steps["G4"]                   # equal steps at large size
    assert all(steps[q] + steps[rest] == steps["G"] for q, rest in (("Q", "D"), ("Q", "L"), ("Qt", "Dt")))
    assert (flags["F"]["lr"], flags["F"]["muon_lr"]) == (0.001, 0.005)             # as registered
    assert flags["Gt"]["channels"] == (16,) and (flags["G1"]["depth"], flags["G4"]["depth"]) == (1, 4)
    assert flags["Gf"]["scene_native"] == 12 and flags["Gb"]["noise_base_resolution"] == 16
    tuned = [claim_runs.config_of(lab._replace(config="claims-long"), arm) for arm in ("Y", "Ya")]
    assert [c["style_share"] for c in tuned] == [0.5, 1.0]
    assert all((c["scene_styled"], c["steps"], c["lr"], c["muon_lr"]) == (60, 300, 0.0015, 0.0075) for c in tuned)
    assert claim_runs.with_parents(["D", "G"]) == ["P", "Q", "D", "G"]
    assert claim_runs.config_of(lab._replace(config="small"), "F")["lr"] == pytest.approx(0.0005 / 3)


def test_further_claims_are_judged_by_what_is_true(tmp_path):
    true = dict(G=0.8, D=0.75, Gt=0.6, Dt=0.65, L=0.7, Q=0.5, S=0.7, Gf=0.8, Sf=0.5, Y=0.8, Ya=0.6, Gb=0.7, F=0.7,
                G1=0.6, G4=0.9, P=0.8, P1=0.6, P4=0.9) | {"F+": 0.7}
    primary = {"thaw": 0.1, "data": 0.2, "style": 0.2, "shift": 0.1}               # by hand
    for name, value in primary.items():
        lab = lab_of(tmp_path, dsg=true, framed=dict(Y=1, Ya=1))
        found = claims.CLAIMS[name](lab, text_of(name), SEEDS)
        assert found["primary"].mean == pytest.approx(value, abs=0.012) and found["sensitive"], name
        assert found["captions"] == pytest.approx([found["primary"].mean] * 2) # whose captions are all alike
    blind = lab_of(tmp_path, dsg=true)                         # no frame is ever drawn: nothing was learned
    assert not claims.CLAIMS["style"](blind, text_of("style"), SEEDS)["sensitive"]


def test_a_grown_model_is_ahead_by_as_many_doublings_as_its_score_tells(tmp_path):
    lab = lab_of(tmp_path, dsg={"G": 0.8, "F": 0.7, "F+": 0.6, "S": 0.72})
    found = claim_contrasts.converging(lab, text_of("converging"), SEEDS)
    assert found["primary"].mean == pytest.approx(1, abs=0.15) and found["sensitive"]        # a doubling is 0.08 of 0.8
    scale = [-2.0, -1.0, 0.0]
    assert claim_contrasts.ahead(scale, [0.1, 0.3, 0.5], [0.0, 0.1, 0.2]) == pytest.approx(1.5)
    assert claim_contrasts.ahead(scale, [0.0, 0.1, 0.2], [0.1, 0.3, 0.5]) == pytest.approx(-1.5)
    assert claim_contrasts.ahead(scale, [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) == 2     # there before the first snapshot
    assert claim_contrasts.ahead(scale, [0.5, 0.5, 0.5], [0.2, 0.2, 0.2]) == 0     # where nothing is to be learned


def test_of_all_metrics_the_weakest_decides(tmp_path):
    text, rising = text_of("larger"), dict(G1=0.6, G=0.7, G4=0.8, P1=0.6, P=0.7, P4=0.8)
    found = claim_contrasts.larger(lab_of(tmp_path, dsg=rising), text, SEEDS)
    assert found["primary"].mean > 0 and found["primary"].p < 0.05 and found["tests"] == 5 and found["sensitive"]
    found = claim_contrasts.larger(lab_of(tmp_path, dsg=rising | dict(P1=0.8, P4=0.6)), text, SEEDS)
    assert found["primary"].mean < 0 and "weakest of 5 slopes per doubling is that of loss of the core" in found["here"]
    result = {"primary": [-0.1, 0.04, 6, 4], "tests": 5}
    assert claims.own_p(result, text) == pytest.approx(5 * Estimate(*result["primary"]).p)   # any of five may fall
    assert claims.own_p({"primary": [0.1, 0.04, 6, 4], "tests": 5}, text) == pytest.approx(Estimate(0.1, 0.04, 6, 4).p)


def judge_made_up(folder, name, mean, error, seeds):
    os.makedirs(folder / name, exist_ok=True)
    result = {"primary": [mean, error, 12, len(seeds)], "here": "words", "figures": {}, "seeds": seeds,
              "captions": [0.01, 0.03]}
    (folder / name / f"{name}.json").write_text(json.dumps(result))


def test_an_undecided_claim_is_extended_once_at_the_level_of_two_looks(tmp_path, capsys):
    lab, texts = lab_of(tmp_path, dsg={})._replace(config=None), claims.read_claims(TEXTS)

    def refused_with(words, name="frozen-long"):
        with pytest.raises(UserError):
            claims.extend(lab, texts, name)
        assert words in capsys.readouterr().err
    refused_with("no verdict to extend")
    refused_with("registered for one look", "frozen")          # its text says so
    judge_made_up(tmp_path, "frozen-long", 0.08, 0.02, [5, 6, 7, 8])
    refused_with("only what is undecided")
    judge_made_up(tmp_path, "frozen-long", 0.025, 0.011, [5, 6, 7, 8])
    first = claims.judged(lab, texts)["frozen-long"]
    assert first["verdict"][0] == "undecided" and first["p"] < 0.05 < first["holm_p"] == 2 * first["p"]
    assert claims.all_seeds(lab, "frozen-long", texts["frozen-long"]) == [5, 6, 7, 8]
    claims.extend(lab, texts, "frozen-long")
    assert claims.all_seeds(lab, "frozen-long", texts["frozen-long"]) == list(range(5, 13))
    assert {seed for _, seed in claim_runs.missing_runs(lab._replace(config="claims-long"), ["G"], range(5, 13))} == \
        set(range(5, 13))
    claims.extend(lab, texts, "frozen-long")                   # stopped before its runs were there: goes on
    judge_made_up(tmp_path, "frozen-long", 0.025, 0.011, list(range(5, 13)))       # still undecided
    refused_with("has had its one extension")
    kept = json.loads((tmp_path / "frozen-long" / "extended.json").read_text())
    assert kept["seeds"] == [9, 10, 11, 12] and kept["first look"]["verdict"][0] == "undecided"
    row = claims.table(lab, texts)
    assert "seeds 5-12, extended from 5-8, 97.5 % as one of two looks" in row and "captions [+0.010, +0.030]" in row


@pytest.fixture(scope="session")
def small_claims(tmp_path_factory):
    """(lab, text of "spread-long") with the two runs of a seed made."""
    keys = dict(width=16, depth=1, entry_channels=8, channels="8", steps=4, batch=4, sample_steps=2, log_every=0)
    out = str(tmp_path_factory.mktemp("claims"))
    lab = claim_runs.Lab(out, "claims-long", {k: str(v) for k, v in keys.items()},
                         claim_measures.Measures(os.path.join(out, "measures.jsonl")))
    for arm, seed in claim_runs.missing_runs(lab, ["G"], [5]):
        claim_runs.train(lab, arm, seed)
    return lab, text_of("spread-long") | {"n": "4", "loss_n": "4"}


def test_a_finished_run_of_other_settings_is_refused(small_claims, capsys):
    lab, _ = small_claims
    assert claim_runs.missing_runs(lab, ["G"], [5, 6]) == [("P", 6), ("G", 6)]
    assert claim_runs.missing_runs(lab._replace(keys=lab.keys | {"log_every": "7"}), ["G"], [5]) == []    # no matter
    for keys, words in ((dict(lr="0.5"), "lr 0.003 there, 0.5 asked for"), (dict(steps="8"), "steps 4 there, 8 asked"),
                        (dict(ema="0.5"), "ema 0.98 there")):
        with pytest.raises(UserError):
            claim_runs.missing_runs(lab._replace(keys=lab.keys | keys), ["G"], [5])
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and "give the flags with which it was made" in said
    moved = os.path.join(lab.out, "G-s7", "claims-long", "grow")                   # another seed's run in its place
    os.makedirs(os.path.dirname(moved))
    os.symlink(claim_runs.run_of(lab, "G", 5), moved)
    with pytest.raises(UserError):
        claim_runs.is_there(lab, "G", 7)
    assert "seed 5 there, 7 asked for" in (said := capsys.readouterr().err) and "from " in said
    os.remove(moved)


def test_a_plan_tells_what_is_missing_and_what_was_measured_is_not(small_claims, capsys):
    lab, text = small_claims
    runs, measures, (training, measuring) = claims.left(lab, "spread-long", text, [5], counted := set(), None)
    assert runs == 0 and measures == 3 and training == 0 and measuring > 0         # two noises and a loss
    assert claims.left(lab, "spread-long", text, [5], counted, None)[:2] == (0, 0) # told already
    found = claim_contrasts.spread(lab, text, [5, 5])
    assert 0 <= np.mean(lab.measures.pictures(claim_runs.run_of(lab, "G", 5), 4, 2.0)["dsg"]) <= 1
    assert found["primary"].seeds == 2
    lab = lab._replace(measures=claim_measures.Measures(lab.measures.file))        # as another process reads it
    assert claims.left(lab, "spread-long", text, [5], set(), None)[:2] == (0, 0)
    runs, measures, minutes = claims.left(lab, "spread-long", text, [5, 6], set(), "h200")
    assert (runs, measures) == (2, 3) and 0 < sum(minutes) < 1
    capsys.readouterr()
    claims.plan(lab._replace(config=None), claims.read_claims(TEXTS), ["shift", "data"], [6], None)
    said = capsys.readouterr().out
    assert "shift            3 runs" in said and "data             3 runs" in said and "6 runs, " in said


def test_a_measure_is_made_once_and_a_line_cut_off_is_made_again(tmp_path):
    file, made = tmp_path / "measures.jsonl", []
    for _ in range(2):
        assert claim_measures.Measures(file).once({"of": "a"}, lambda: made.append(1) or {"v": 2}) == {"v": 2}
    file.write_text(file.read_text() + '\n[{"of": "b"}, {"v"')
    assert claim_measures.Measures(file).known == {'{"of": "a"}': {"v": 2}} and len(made) == 1


def test_a_transplant_has_the_core_of_one_and_the_shell_of_another():
    flags = [("width", "16"), ("depth", "1"), ("entry_channels", "8"), ("steps", "3"), ("batch", "4")]
    config = load_config("claims", "pretrain", flags)
    torch.manual_seed(5)
    parent = {"config": config, "model": build(config).state_dict(), "ema": {}}
    other = {k: v + 1 for k, v in parent["model"].items()}
    model = claim_measures.transplant(parent, other, 1, keep_shell=True).state_dict()
    taken = {k for k in model if torch.equal(model[k], other[k])}
    assert all((k in taken) == (k.startswith("core.") and not k.startswith("core.time.")) for k in model)
    assert all(torch.equal(model[k], parent["model"][k]) for k in model.keys() - taken)
    new = claim_measures.transplant(parent, None, 1, keep_shell=False)
    before = {k: v.clone() for k, v in new.state_dict().items()}
    claim_measures.fit_shell(new, config, 3, 1)
    moved = {k for k, v in new.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith("core.") and not k.startswith("core.time.") for k in moved)
    assert claim_measures.held_out_loss(new.eval(), config, 4) > 0


@slow
def test_runs_are_made_by_train_measured_judged_and_drawn_and_made_once(tmp_path):
    small = "n = 200", "n = 8"
    text = open(TEXTS).read().replace(*small).replace("loss_n = 128", "loss_n = 8")
    text = text.replace("refit = 80", "refit = 2").replace("share = 0.05", "share = 0.25").replace("1-4", "1-2")
    text = text.replace("5-8", "5-6").replace("shares = 0.05 0.1", "shares = 0.1").replace("n = 100", "n = 8")
    text = text.replace("grid = 16 32 64", "grid = 4").replace("repeats = 5", "repeats = 2")
    (tmp_path / "texts.txt").write_text(text)
    tiny = "--width 16 --depth 1 --entry_channels 8 --channels 8 --steps 8 --batch 4 --sample_steps 2 --log_every 0"
    command = [sys.executable, "-m", "experiments.claims", *claims.CLAIMS, *tiny.split(), "--texts",
               tmp_path / "texts.txt", "--out", tmp_path / "out", "--table"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") == len(claims.CLAIMS)
    for name in claims.CLAIMS:
        assert (tmp_path / "out" / name / f"{name}.png").exists()
    measured = (tmp_path / "out" / "measures.jsonl").read_text()
    again = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert again.returncode == 0 and "is finished" not in again.stdout
    assert (tmp_path / "out" / "measures.jsonl").read_text() == measured
