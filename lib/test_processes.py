"""Tests of processes.py: `pytest lib/test_processes.py`. Two processes meet through gloo, as torchrun starts them."""
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from lib import processes
from lib.test_scripts import ended, fork, fork_ranks


def run_two(work):
    """[(exit status, output)] of two processes that do this work."""
    started = fork_ranks(2, work)
    for process, _ in started:
        process.join(60)
    return [(process.exitcode, said()) for process, said in started]


def exchange():
    rank, world, device = processes.join(60)
    assert (rank, world, device) == (processes.get_rank(), 2, "cpu")
    assert processes.all_reduce_max(rank + 1) == 2
    assert processes.all_gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert processes.all_gather_rows(torch.tensor([[rank], [5]])) == [[0], [5], [1], [5]]
    assert processes.gather([rank]) == ([[0], [1]] if rank == 0 else [])
    processes.print0("once")
    processes.exit_with(7)


def rank_one_raises():
    rank, *_ = processes.join(60)
    if rank == 1:
        raise ValueError("broken")
    processes.all_gather(rank)


def both_raise():
    processes.join(60)
    processes.all_reduce_max(0)                                # both have joined
    processes.print_error("batch = 3: take 4")
    processes.exit_with(2)


def test_two_processes_vote_gather_and_speak_once():
    assert run_two(exchange) == [(7, "once\n"), (7, "")]


def test_a_process_that_raises_says_so_and_leaves_no_other_waiting():
    begin = time.monotonic()
    (status, waiting), (raised, broken) = run_two(rank_one_raises)
    assert raised == status == 1 and time.monotonic() - begin < 30
    assert "Traceback" in broken and "error: rank 1: ValueError: broken\n" in broken
    assert "Traceback" not in waiting and waiting.startswith("error: another process has ended")


def test_an_error_of_all_is_printed_by_the_first_at_once():
    message = "batch = 3: take 4\n"
    assert run_two(both_raise) == [(2, f"error: {message}"), (2, f"error: rank 1: {message}")]


def test_under_torchrun_an_error_is_printed_once_and_ends_the_output(tmp_path):
    """The second process is stopped before it repeats the error, and torchrun's own summary ends with it too."""
    script = tmp_path / "script.py"
    script.write_text("from lib import processes\nprocesses.print_error('batch = 3: take 4')\nprocesses.exit_with(2)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    home = os.path.dirname(os.path.dirname(os.path.abspath(processes.__file__)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": home}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr.count("error: batch = 3: take 4\n") == 2, done.stderr
    assert "rank 1:" not in done.stderr and done.stderr.index("error: batch") < done.stderr.index("Traceback")
    assert done.stderr.rstrip().rstrip("=").endswith("traceback : error: batch = 3: take 4\n")


def test_a_port_in_use_is_said(monkeypatch, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        for key, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(key, value)
        with pytest.raises(SystemExit) as e:
            processes.join(5)
    assert e.value.code == 2 and "cannot meet" in (said := capsys.readouterr().err) and port in said


def test_one_process_touches_nothing_of_distributed(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert processes.join(1)[:2] == (0, 1) and not torch.distributed.is_initialized()
    assert processes.all_reduce_max(3) == 3 and processes.all_gather("a") == processes.gather("a") == ["a"]
    with pytest.raises(SystemExit) as e:
        processes.exit_with(4)
    assert e.value.code == 4


class Dead:
    pid = 17

    def is_alive(self):
        return False


@pytest.mark.parametrize("error, workers, status, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), (), 2, "error: out of memory (CUDA out of"),
    (RuntimeError("[enforce fail] can't allocate memory: you tried 9 bytes"), (), 2, "lower --micro"),
    (RuntimeError("gone"), (Dead(),), 3, "error: DataLoader worker (pid 17) is dead (gone): lower --workers"),
    (KeyError("x"), (), 1, "error: KeyError: 'x'"),
])
def test_what_ends_a_process_has_a_status_and_advice(error, workers, status, words, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "_exit", ended.append)
    processes.install_excepthook(memory="lower --micro", worker="lower --workers", workers=workers)
    sys.excepthook(type(error), error, None)
    assert ended == [status] and words in capsys.readouterr().err


def test_torchrun_gets_the_message_for_its_summary(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    processes.print_error("no room")
    assert json.load(open(tmp_path / "error.json"))["message"]["extraInfo"]["py_callstack"] == "error: no room"


def halve_small_numbers():
    processes.join(60)
    torch.set_num_threads(2)
    print(int((torch.full((1 << 20,), 1e-39) * 0.5).count_nonzero()))


def test_numbers_too_small_to_be_normal_are_zero_in_all_threads():
    """A trained model is a third slower with them, on a CPU."""
    assert ended(*fork(halve_small_numbers)) == "0\n"


def lose_a_worker():
    """A worker that is heard of before it is dead; its signal comes later, and torch's handler of that would raise."""
    def handler(number, frame):
        raise RuntimeError("killed by signal")
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.2,))
    worker.start()
    signal.signal(signal.SIGCHLD, handler)
    processes.install_excepthook(worker="advice", workers=[worker])
    raise ConnectionResetError("Connection reset by peer")


def test_the_death_of_a_worker_is_told_though_its_signal_comes_late():
    said = ended(*fork(lose_a_worker), 3)
    assert "is dead (Connection reset by peer): advice" in said
