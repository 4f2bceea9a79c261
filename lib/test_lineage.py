"""Tests of lineage.py: `pytest lib/test_lineage.py`."""
import hashlib
import sys

import pytest
import torch

from lib import lineage
from lib.settings import UserError


def leave_run(folder, step):
    folder.mkdir(parents=True)
    torch.save({"step": step, "config": {"steps": 5}}, folder / "last.pt")
    return str(folder)


def test_a_stage_starts_from_the_first_of_its_sources_that_is_finished(tmp_path):
    def source(*sources, starts=""):
        return lineage.latest_source(str(tmp_path), "toy", sources, starts).removeprefix(str(tmp_path) + "/")
    last = "defrost", "grow"                                   # of a student
    assert source() == "" and source("pretrain") == "toy/pretrain" and source(*last) == "toy/grow"
    assert source("grow", starts="weak/pretrain") == "weak/pretrain"
    assert source(*last, starts="weak/pretrain") == "toy/defrost"
    leave_run(tmp_path / "toy/defrost", 3)
    assert source(*last) == "toy/grow"                         # half of one does not count
    leave_run(tmp_path / "toy/grow", 5)
    assert source(*last, starts="weak/pretrain") == "toy/grow"
    torch.save({"step": 5, "config": {"steps": 5}}, tmp_path / "toy/defrost/last.pt")
    assert source(*last) == "toy/defrost"


def test_a_run_that_another_needs_is_finished_by_the_same_script_first(tmp_path, monkeypatch, capsys):
    script, note = tmp_path / "script.py", tmp_path / "note"
    script.write_text("import os, sys\n"
                      "open(sys.argv[-2][7:], 'a').write(os.environ['RUN_FIRST'] + ' '.join(sys.argv[1:-2]) + '\\n')\n"
                      "sys.exit(int(sys.argv[-1][7:]))")
    monkeypatch.setattr(sys, "argv", [str(script)])
    flags, out = [("width", "32"), ("note", str(note)), ("code", "0"), ("shell", "unet")], tmp_path / "out"
    lineage.finish_first(leave_run(out / "toy/done", 5), flags, ("shell",))
    assert not note.exists()                                   # there was nothing to do
    lineage.finish_first(leave_run(out / "toy/half", 3), flags, ("shell",))
    with pytest.raises(SystemExit) as e:                       # stopped: this one stops too
        lineage.finish_first(str(out / "toy/pretrain"), [("note", str(note)), ("code", "143")])
    said = capsys.readouterr().out
    assert e.value.code == 143 and "stopped at step 3: going on with it first" in said
    assert f"no pretrain run in {out}/toy/pretrain yet: running it first" in said
    assert note.read_text() == (f"1--config toy --stage half --out={out} --width=32\n"
                                f"1--config toy --stage pretrain --out={out}\n")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        lineage.finish_first(str(out / "toy/pretrain"), [])
    assert f"run it first, by torchrun with --config toy --stage pretrain --out={out}" in capsys.readouterr().err


def test_a_run_that_stopped_is_refused_and_a_snapshot_that_was_asked_for_is_said(capsys):
    state = {"stage": "grow", "step": 3, "config": {"steps": 5}}
    with pytest.raises(UserError):
        lineage.check_finished("out", state, "name another one")
    assert "out stopped at step 3 of 5: finish it with --stage grow, or name another one" in capsys.readouterr().err
    lineage.check_finished("out/step_3.pt", state, "", snapshot=True)
    assert "out/step_3.pt is a snapshot, of step 3 of 5" in capsys.readouterr().out
    lineage.check_finished("out", state | {"step": 5}, "", snapshot=True)
    assert capsys.readouterr() == ("", "")


def test_settings_on_which_weights_depend_are_the_same_or_are_named(capsys):
    there, here = dict(width=1, depth=2, lr=3), dict(width=1, depth=4, lr=5)
    lineage.check_fits("out", there, here, ("width",))
    with pytest.raises(UserError):
        lineage.check_fits("out", there, here, ("width", "depth"))
    assert "out does not fit (depth 2 there, 4 here): use its settings" in capsys.readouterr().err


def small_state(step=3, **config):
    return {"name": "toy", "stage": "grow", "step": step, "config": {"lr": 1, "seed": 0, "data_id": "a"} | config}


def test_other_settings_are_refused_but_for_those_that_are_free(capsys):
    assert lineage.check_settings("out", small_state(), small_state(lr=2), ("lr",)) == ", lr 1 -> 2"
    for now, words in ((small_state(seed=1), "(seed 0 there, 1 here): repeat them, give this run another --out"),
                       (small_state(data_id="b"), "or let these data stand in with --data_id a, give this run"),
                       (small_state() | {"stage": "defrost"}, "holds a grow run of toy, expected defrost")):
        with pytest.raises(SystemExit):
            lineage.check_settings("out", small_state(), now, ("lr",))
        assert words in capsys.readouterr().err


def test_a_run_goes_on_from_what_it_started_from_alone(capsys):
    grown, student = {"parents": ["a (pretrain, step 6)", "b (grow, step 6)"]}, {"teacher": ["b/last.pt", "0"]}
    for core, teacher in ((None, None), ("b", None), (None, "b"), ("b", "b/last.pt")):
        lineage.check_origins("out", grown | student, core, teacher)
    lineage.check_origins("out", {"parents": []}, None, None)
    for core, teacher, words in (("a", None, "was grown from b (grow, step 6), not from a: leave --core out, or start"),
                                 ("b/last", None, "not from b/last"),
                                 (None, "a", "out learns from b/last.pt, not from a: leave --teacher out, or start")):
        with pytest.raises(UserError):
            lineage.check_origins("out", grown | student, core, teacher)
        assert words in capsys.readouterr().err


def test_a_file_that_is_named_is_still_the_same_or_that_is_said(tmp_path, capsys):
    file, digest = tmp_path / "last.pt", hashlib.sha256(b"weights").hexdigest()
    for content, words in ((None, "is not there: bring it back, or start anew"), (b"others", "is no more what it was")):
        if content:
            file.write_bytes(content)
        with pytest.raises(UserError):
            lineage.check_unchanged(str(file), digest, "the teacher", "start anew")
        assert f"error: the teacher, {file}, {words}" in capsys.readouterr().err
    file.write_bytes(b"weights")
    lineage.check_unchanged(str(file), digest, "the teacher", "start anew")
