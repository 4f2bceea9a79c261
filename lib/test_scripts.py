"""
Scripts as a user starts them, for tests. Importing torch takes longer than most of what they do, so one process imports
everything and forks for each of them: a script starts in no time. It computes nothing, so that no thread is lost.

    run("train.py", "--stage", "grow")                 to its end; what it printed
    process, said = start("eval.py", "out")            it goes on beside the test; said() is what it has printed so far
"""
import functools
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import torch

from lib import errors, plan

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
server = multiprocessing.get_context("forkserver")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")    # who asks for a GPU before a fork must not start CUDA
# What scripts import, at once or late; this module and pytest, which each fork looks up; extras, where they are.
server.set_forkserver_preload([
    __name__, "_pytest.config", "eval", "lib.runs", "torch._dynamo", "torch._subclasses.fake_tensor",
    "torch.distributed.fsdp", "matplotlib.pyplot", "diffusers.models.transformers.pixart_transformer_2d",
    "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.t5.modeling_t5", "transformers.models.clip.modeling_clip"])


def forked_process(work, output, environment):
    """What a forked process does: `work` as a script would do it, with both of its streams in the file `output`."""
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update({"OMP_NUM_THREADS": "1"} | environment)
    torch.set_num_threads(1)
    errors.PATIENCE = 0.5                                      # forks start together
    try:
        work()
    except Exception:                                          # as an interpreter of its own would end
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def as_script(script, words, fault):
    """`python SCRIPT WORDS`, after `fault` has spoilt something."""
    sys.argv = [script, *words]
    plan.sgemm_rate = lambda: 1e11                             # to measure it takes a third of such a training
    fault()
    runpy.run_path(os.path.join(HERE, script), run_name="__main__")


def fork(work, **environment):
    """A process that does this, and a function that tells what it has printed."""
    output = tempfile.NamedTemporaryFile()                     # it goes when nobody can ask any more
    process = server.Process(target=forked_process, args=(work, output.name, environment))
    process.start()
    return process, lambda: open(output.name).read()


def start(script, *words, fault=int, **environment):
    """Start a script in a process of its own with one thread; returns that, and a function that tells what it said."""
    return fork(functools.partial(as_script, script, list(map(str, words)), fault), **environment)


def ended(process, said, code=0):
    """What a process has printed when it has ended, with this status."""
    process.join(300)
    status = process.exitcode
    if status is None:                                         # it hangs, and so would the end of all tests
        process.kill(), process.join()
    assert status == code, f"status {status}: " + said()[-5000:]
    return said()


def run(script, *words, code=0, fault=int, **environment):
    """Run a script to its end; returns what it printed, both streams."""
    return ended(*start(script, *words, fault=fault, **environment), code)


def run_beside(*commands):
    """Scripts side by side, each a list of its words, to their end; returns what each printed."""
    started = [start(*words) for words in commands]
    return [ended(*one) for one in started]


def fork_ranks(world, work):
    """This work in so many processes that know each other, as torchrun starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meeting = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    return [fork(work, RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank in range(world)]


def start_ranks(world, *words, fault=int, script="train.py"):
    """A script in so many processes that know each other."""
    return fork_ranks(world, functools.partial(as_script, script, list(map(str, words)), fault))


def run_ranks(world, *words, code=0):
    """train.py in so many processes, to their end; returns what they printed."""
    return "".join([ended(process, said, code) for process, said in start_ranks(world, *words)])


def until(said, words, process):
    """Wait until the script has printed these words."""
    begin = time.monotonic()
    while words not in said():
        assert process.is_alive() and time.monotonic() < begin + 120, said()
        time.sleep(0.01)


SCRIPT = """
import os, signal, sys
print(sys.argv[1:], __name__, os.environ["HOW"], flush=True)
print("words", file=sys.stderr, flush=True)
if sys.argv[1] == "raise":
    raise ValueError("broken")
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit("a message" if sys.argv[1] == "say" else int(sys.argv[1]))
"""


@pytest.mark.parametrize("word, code", [("0", 0), ("3", 3), ("say", 1), ("raise", 1), ("kill", -signal.SIGKILL)])
def test_a_script_that_is_forked_prints_and_ends_as_in_a_process_of_its_own(word, code, tmp_path):
    """But for the lines of a traceback that tell who called the script."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    alone = subprocess.run([sys.executable, script, word, "b"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, env=os.environ | {"HOW": "well"})
    said = run(script, word, "b", code=code, HOW="well")
    frames = r'  File "(?!.*script.py).*\n(    .*\n)*'
    assert alone.returncode == code and re.sub(frames, "", said) == alone.stdout and "__main__ well" in said


def test_a_forked_script_stops_by_a_signal_and_knows_nothing_of_the_one_before(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, time, lib\nassert not hasattr(lib, 'left')\nlib.left = 1\nprint('on')\n"
                      "sys.stdout.flush()\nwhile True: time.sleep(0.01)")
    for number in (signal.SIGTERM, signal.SIGKILL):
        process, said = start(script)
        until(said, "on", process)
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == -number and said() == "on\n"
