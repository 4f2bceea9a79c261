"""The commands of experiments.bench, on a CPU and with little to measure."""
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from experiments.bench import PARTS
from experiments.bench_published import NETWORKS, measure_published
from experiments.bench_report import report_of

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: SLOW=1 pytest test_all.py")


def python(*words):
    """A Python of its own in the repository, without a GPU: Triton settles when it is imported what it runs on."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *map(str, words)], cwd=HERE, env=env, capture_output=True, text=True)


def bench(*words):
    return python("-m", "experiments.bench", *words)


def test_models_are_measured_and_their_figures_tell_where_they_come_from(tmp_path):
    done = bench("models", "toy/grow", "--json", tmp_path / "x.json")
    assert done.returncode == 0 and "toy/grow" in done.stdout and "2 cases, 0 bad" in done.stdout, done.stderr
    figures = json.load(open(tmp_path / "x.json"))
    assert figures["command"].startswith("python -m experiments.bench models toy/grow") and figures["device"] == "cpu"
    assert {"date", "python", "torch", "triton"} <= set(figures)
    forward, step = figures["rows"]
    assert forward["millions"] == step["millions"] > 1 and forward["seconds"] > 0
    # a frozen core: its backward passes gradients on, and computes none of its weights
    assert not forward["training"] and step["training"] and 2 < step["tflop"] / forward["tflop"] < 3


def test_published_networks_have_their_real_sizes_and_their_forwards_are_timed(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):                                 # as their model cards say
        counts = {name: sum(p.numel() for p in getattr(diffusers, kind)(**about).parameters()) / 1e6
                  for name, (kind, about) in NETWORKS.items()}
    assert counts == pytest.approx({"PixArt-Sigma": 610.9, "SDXL": 2567.5}, abs=0.05)
    rows = list(measure_published(time.time() + 60, quick=True))
    assert [row["published"] for row in rows] == list(NETWORKS) and all(row["seconds"] > 0 for row in rows)
    report = report_of({"device": "cpu", "date": "", "torch": "", "triton": "", "threads": 1, "command": "",
                        "rows": [{"part": "published", **row} for row in rows]})
    assert "**published**" in report and "| SDXL | 1 |" in report


def test_kernels_run_in_the_interpreter_and_stop_in_time(tmp_path):
    pytest.importorskip("triton")
    done = bench("kernels", "--minutes", 0.01, "--json", tmp_path / "x.json")
    assert done.returncode == 1 and "interpreted" in done.stdout and "TimeoutError: no time left" in done.stdout
    rows = json.load(open(tmp_path / "x.json"))["rows"]
    assert 0 < len(rows) < 36 and all(row["good"] for row in rows)


@pytest.mark.parametrize("words, error", [
    (["models", "tyo/grow"], "error: no config 'tyo'"), (["kernels", "toy"], "error: kernels takes no 'toy'"),
    (["kernel"], "error: argument part: invalid choice: 'kernel'"),
    (["models", "--minuts", "3"], "did you mean 'minutes'")])
def test_what_bench_does_not_know_is_named(words, error, monkeypatch, capsys):
    from experiments.bench import main
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and error in capsys.readouterr().err


def test_all_outlives_parts_that_crash_hang_and_break_off(tmp_path, monkeypatch, capsys):
    """And prints what the others gave, and leaves no process behind."""
    from experiments import bench
    row = dict(backend="gloo", ddp=1e-7, fsdp=2e-7, good=True)
    write = "json.dump(dict(rows=[row]), open(file, 'w'))"
    codes = {"kernels": "os.abort()", "models": f"{write}; raise RuntimeError", "processes": write, "numbers":
             "child = subprocess.Popen(['sleep', '99']); open(pid, 'w').write(str(child.pid)); time.sleep(99)",
             "loaders": "open(file, 'w').write('{')", "small": write}
    pid = tmp_path / "pid"

    def part_command(part, args, seconds, file):
        names = f"row, file, pid = {row}, {file!r}, {str(pid)!r}"
        return [sys.executable, "-c", f"import json, os, subprocess, time; {names}; {codes[part]}"]
    monkeypatch.setattr(bench, "PARTS", dict.fromkeys(codes, (1, 1)))
    monkeypatch.setattr(bench, "GRACE", 1)
    monkeypatch.setattr(bench, "part_command", part_command)
    monkeypatch.setattr(sys, "argv", ["bench.py", "all", "--minutes", "0.1", "--json", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    report, printed = (tmp_path / "x.md").read_text(), capsys.readouterr().out
    assert stop.value.code == 1 and report in printed and "| gloo | 1e-07 | 2e-07 |" in report
    rows = json.load(open(tmp_path / "x.json"))["rows"]
    assert [(r["part"], "problem" in r) for r in rows] == [
        ("kernels", True), ("models", False), ("models", True), ("processes", False), ("numbers", True),
        ("loaders", True), ("small", False)]
    assert "exit status -6" in report and "did not end in time" in report
    deadline = time.monotonic() + 5
    while os.path.exists(state := f"/proc/{pid.read_text()}/stat") and ") Z" not in open(state).read():
        assert time.monotonic() < deadline, "a child of a part that hung is still there"


@slow
def test_all_goes_on_where_a_part_fails(tmp_path):
    done = bench("all", "nonsense/grow", "--minutes", 0.6, "--json", tmp_path / "x.json", "--out", tmp_path)
    rows = json.load(open(tmp_path / "x.json"))["rows"]
    assert done.returncode == 1 and {row["part"] for row in rows} == set(PARTS)
    assert any("problem" in row for row in rows if row["part"] == "models")
    assert "what failed" in (tmp_path / "x.md").read_text()


@slow
def test_all_measures_something_of_everything_within_three_minutes(tmp_path):
    """Without a GPU, on a machine that has two cores for it: pictures and a score of toy, too."""
    begin = time.monotonic()
    done = bench("all", "--json", tmp_path / "x.json", "--out", tmp_path)
    assert time.monotonic() - begin < 180
    report = (tmp_path / "x.md").read_text()
    assert done.returncode == 0 and (tmp_path / "toy.png").exists() and report in done.stdout, done.stdout[-3000:]
    for part in ("models", "processes", "plan", "numbers", "loaders", "small"):
        assert f"**{part}**" in report
    assert all(words in report for words in ("kernels, errors", "core frozen takes", "Compiled for", "Score of"))
    failed = [line for line in report.partition("**what failed")[2].splitlines() if line.startswith("- ")]
    assert all("pip install" in line for line in failed), failed     # extras of the bench alone


def test_a_report_tells_ratios_and_what_failed():
    timed = [dict(part="kernels", case="1K", method=method, floor_fwd_us=1.0, floor_bwd_us=2.0, fwd_us=2.0 * k,
                  bwd_us=4.0 * k) for k, method in ((1, "ours"), (3, "SDPA flash"))]
    steps = [dict(part="models", model=f"huge/{stage}", batch=batch, millions=9.0, training=True, tflop=1.0,
                  seconds=seconds, gib=None) for stage, batch, seconds in (("grow", 4, 2.0), ("defrost", 1, 1.0))]
    broken = [dict(part="numbers", numbers="fp16", problem="RuntimeError: no time left", good=False)]
    about = dict(device="a GPU", date="today", torch="2", triton=None, threads=1, command="bench all")
    report = report_of(about | dict(rows=timed + steps + broken))
    assert "| 1K | SDPA flash | 6 | 0.167 | 12 | 0.167 | 3 |" in report
    assert "frozen takes 0.50 of a joint one (huge)" in report and "| GiB |" not in report
    assert "- part numbers, numbers fp16, problem RuntimeError: no time left" in report


def test_copies_and_shards_of_one_process_have_its_gradient(tmp_path):
    done = bench("processes", "--json", tmp_path / "x.json")
    [row] = json.load(open(tmp_path / "x.json"))["rows"]
    assert done.returncode == 0 and row["backend"] == "gloo" and row["ddp"] < 1e-5 > row["fsdp"], done.stdout


def compile_for_sm90(cases):
    pytest.importorskip("triton")
    code = ("import math; from experiments import bench; rows = list(bench.compile_for_sm90(math.inf, "
            f"{cases})); assert rows and all(row['good'] for row in rows)")
    done = python("-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compiles_for_an_h100():
    """No spills, matrix units in use, no element loaded alone: for the head dim that is hardest, 72."""
    compile_for_sm90('[("attention", 72, "bfloat16", dict(Nq=200, Nk=300))]')


@slow
def test_every_configuration_compiles_for_an_h100():
    compile_for_sm90("bench.SM90_CASES")
