"""Tests of runs.py: `pytest lib/test_runs.py`. What two processes do to one folder is tested with train.py."""
import multiprocessing
import os
import sys

import pytest
import torch

from lib import runs as run_folders


def try_lock(run, answers):
    """In a process of its own: 0 where it gets the lock, 2 where another process has it."""
    sys.stderr = open(os.devnull, "w")
    try:
        lock = run_folders.lock_run(run)
        answers.put(0 if lock else None)
    except SystemExit as e:
        answers.put(e.code)


def lock_elsewhere(run):
    context = multiprocessing.get_context("forkserver")
    answers = context.Queue()
    process = context.Process(target=try_lock, args=(run, answers))
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    return answer


def test_a_folder_belongs_to_one_process_also_after_it_was_moved_aside(tmp_path):
    run = str(tmp_path / "run")
    lock = run_folders.lock_run(run)
    assert lock_elsewhere(run) == 2
    (tmp_path / "run/last.pt").write_text("old")
    new = run_folders.prepare_run(run, lock, True, "toy.grow", {"lr": 0.1, "shell": "unet"})
    assert (tmp_path / "run.1/last.pt").read_text() == "old"
    assert sorted(os.listdir(run)) == ["config.txt", "lock", "samples"]
    assert open(tmp_path / "run/config.txt").read() == "# settings of toy.grow\nlr = 0.1\nshell = 'unet'\n"
    assert lock_elsewhere(run) == lock_elsewhere(run + ".1") == 2
    lock.close(), new.close()
    assert lock_elsewhere(run) == 0


def test_a_new_folder_is_not_moved_aside_and_an_old_score_goes(tmp_path):
    run = str(tmp_path / "run")
    lock = run_folders.lock_run(run)
    (tmp_path / "run/samples").mkdir()
    assert run_folders.prepare_run(run, lock, False, "toy", {}) is lock
    (tmp_path / "run/metrics.json").write_text("{}")
    run_folders.prepare_run(run, lock, False, "toy", {})
    assert os.listdir(tmp_path) == ["run"] and "metrics.json" not in os.listdir(run)


def test_what_cannot_be_written_ends_with_status_4(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    lock = run_folders.lock_run(str(tmp_path / "run"))
    for work, *args in ((run_folders.lock_run, str(tmp_path / "file/run")),
                        (run_folders.check_room, str(tmp_path), 2 ** 70)):
        with pytest.raises(SystemExit) as e:
            work(*args)
        assert e.value.code == 4 and "make room" in capsys.readouterr().err
    run_folders.check_room(str(tmp_path), 2 ** 10)
    lock.close()


def test_a_line_of_a_log_is_printed_and_kept(tmp_path, capsys):
    log, line = run_folders.Log(str(tmp_path)), {"step": 4, "loss": 0.03125, "bins": [0.5, 0.25], "skipped": 0}
    log(line)
    log({"step": 4, "score": {"dsg": 1}}, "dsg 1.000")
    assert capsys.readouterr().out == "step      4  loss 0.03125  bins 0.5 0.25  skipped 0\nstep      4  dsg 1.000\n"
    assert run_folders.read_log(str(tmp_path)) == [line, {"step": 4, "score": {"dsg": 1}}]


def test_the_first_module_that_fails_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert run_folders.first_fault(model, lambda: model(x)) is None
    model[2].weight.data[0, 0] = float("inf")
    assert run_folders.first_fault(model, lambda: model(x)) == "2" and not model[0]._forward_hooks
    assert run_folders.first_fault(model, lambda: model(x * float("nan"))) == "0"
