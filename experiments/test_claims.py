"""The claims: what their code makes of made-up measures, that registered texts hold, and all of it with tiny runs."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from experiments import claim_measures, claims
from lib.settings import load_config
from model import build

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXTS = os.path.join(HERE, "experiments", "claims.txt")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 pytest test_all.py")
SEEDS = [1, 2, 3, 4]


class MadeUp:
    """Measures of a world in which the truth is known: {arm: dsg}, {arm: damage}; optima of guidance at 1 and 2.5."""

    def __init__(self, dsg, damage=0.3):
        self.dsg, self.lost, self.draw = dsg, damage, np.random.default_rng(0)

    def arm(self, file):
        return os.path.normpath(file).split(os.sep)[-4 if file.endswith(".pt") else -3].split("-s")

    def pictures(self, file, n, guidance, noise=0, first=0):
        arm, seed = self.arm(file)
        mean = self.dsg[arm] + 0.02 * int(seed) + self.draw.normal(0, 0.004)
        real = np.random.default_rng(1).normal(0, 1, (n, 6))
        off = {"judge": np.log(guidance / 2.5), "random": np.log(guidance)}
        return {"dsg": list(mean + self.draw.normal(0, 0.1, n).round(2) * 0), "chance": 0.2,
                **{k: (real + 1 + v ** 2 + 0.5 * (arm == "Q")).tolist() for k, v in off.items()}}

    def loss(self, file, n, first=0):
        arm, _ = self.arm(file)
        return 0.1 * (2 - self.dsg[arm]) * (1 + self.draw.normal(0, 0.002))

    def damage(self, file, parent, n, seed, refit=0):
        if file is None:
            return 0.3 + self.draw.normal(0, 0.001)
        return 0.1 + (self.arm(file)[0] != "P") * 0.2 * self.lost + self.draw.normal(0, 0.001)


def lab_of(folder, **truth):
    return claims.Lab(str(folder), "claims", {}, MadeUp(**truth))


def text_of(name):
    return claims.read_claims(TEXTS)[name]


def test_a_claim_that_is_true_is_confirmed_and_one_that_is_false_refuted(tmp_path):
    true = {"G": 0.8, "F": 0.7, "F+": 0.65, "S": 0.6, "D": 0.75, "Q": 0.5}
    false = true | {"F+": 0.9}              # the better of two finetuned ones counts
    for truth, word in ((true, "confirmed"), (false, "refuted"), (true | dict(F=0.8), "undecided not at this size")):
        lab, text = lab_of(tmp_path, dsg=truth), text_of("frozen")
        found = claims.frozen(lab, text, SEEDS)
        estimate = found["primary"]
        best = max(truth["F"], truth["F+"])
        assert estimate.mean == pytest.approx(truth["G"] - best, abs=0.01) and found["sensitive"]
        assert claims.verdict(estimate, estimate.p, float(text["margin"]))[0] in word
        assert estimate.df == 12                               # five arms, four seeds
    assert claims.frozen(lab_of(tmp_path, dsg=true | dict(Q=0.8)), text, SEEDS)["sensitive"] is False


def test_damage_is_scaled_between_the_core_and_first_weights(tmp_path):
    for lost in (0.0, 0.3, 1.0):
        lab = lab_of(tmp_path, dsg={"F": 0.5, "F+": 0.4}, damage=lost)
        found = claims.forgetting(lab, text_of("forgetting"), SEEDS)
        assert found["primary"].mean + 0.05 == pytest.approx(lost, abs=0.02) and found["sensitive"]
    steps, values = found["panels"][0]["lines"]["F, new shell"]
    assert steps == [10, 200] and np.shape(values) == (4, 2)
    assert set(claims.snapshot_steps(lab_of(tmp_path, dsg={}), "D")) == {2, 5, 10, 20, 50, 100}


def test_the_optimum_of_guidance_is_found_where_it_is(tmp_path, monkeypatch):
    rows = np.random.default_rng(1).normal(0, 1, (200, 6))     # the made-up pictures, moved off these
    monkeypatch.setattr(claims, "reference_features", lambda config: {"judge": rows + 1, "random": rows + 1})
    found = claims.guidance(lab_of(tmp_path, dsg=dict(G=0.5, P=0.5, Q=0.5)), text_of("guidance"), SEEDS)
    assert found["primary"].mean > 0.4 and found["sensitive"]  # log 2.5 by the made-up curves, on a coarse grid
    x = np.log([0.5, 1, 1.5, 2, 3, 4])
    place, inside = claim_measures.vertex(x, (x - np.log(1.7)) ** 2)
    assert inside and np.exp(place) == pytest.approx(1.7)
    assert claim_measures.vertex(x, -x) == (pytest.approx(np.log(4)), False)       # an optimum at an end is none


def test_verdicts_are_adjusted_for_each_other_and_told_in_a_table(tmp_path):
    lab, texts = lab_of(tmp_path, dsg={}), claims.read_claims(TEXTS)
    for name, mean in (("frozen", 0.05), ("forgetting", 0.03), ("spread", 0.001)):
        os.makedirs(tmp_path / name)
        result = {"primary": [mean, 0.016, 12, 4], "here": "words", "figures": {"more": "of it"}}
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
    with pytest.raises(SystemExit):
        claims.register(lab, "frozen", text | {"n": "400"})
    assert "frozen" in capsys.readouterr().err


def test_every_claim_is_registered_with_what_decides_it(tmp_path):
    texts = claims.read_claims(TEXTS)
    assert list(texts) == list(claims.CLAIMS)
    for text in texts.values():
        assert {"title", "paper", "source", "arms", "primary", "refuted", "seeds", "exam"} <= text.keys()
        assert set(text["arms"].split()) <= set(claims.ARMS)
    lab = lab_of(tmp_path, dsg={})
    steps = {arm: claims.flags_of(lab, arm, 1)["steps"] for arm in claims.ARMS}
    assert steps["Q"] + steps["D"] == steps["G"] == steps["F"] == steps["S"]       # equal steps at large size
    assert claims.with_parents(["D", "G"]) == ["P", "Q", "D", "G"]


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
