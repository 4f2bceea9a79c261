"""
Which run may start from which: what a training asks before its first step.

A run is a folder OUT/NAME/STAGE; its state, a dict, has "name", "stage", "step", "config", "parents" (what it started
from, oldest first, as "PATH (STAGE, step N)"), and "teacher" where it learns from another one (checkpoint.py).

    latest_source       which run a stage starts from, unless another is named
    finish_first        a run that another one starts from is trained to its end first
    check_finished      has a run taken all its steps, or was a snapshot of it named?
    check_fits          are those settings the same on which weights depend?
    check_settings      a run goes on: is that its own state, and are these its own settings?
    check_origins       a run goes on: did it start from what is named now?
    check_unchanged     is a file that a run refers to still the same?
"""
import os
import signal
import subprocess
import sys

from lib.files import file_hash
from lib.processes import get_world_size, print0
from lib.runs import is_finished, newest_about
from lib.settings import UserError

RUN_FIRST = "RUN_FIRST"                                        # set in the environment of a run that another one starts


# ---- a new run, from another one -------------------------------------------------------------------------------------

def latest_source(out, name, sources, starts):
    """
    The run from which a stage of config `name` starts: of its `sources`, stages of the same config, the first that is
    finished, else the last, which is usual. "" of a stage that starts from nothing. Weak to strong: a config with
    `starts`, a CONFIG/STAGE, never grows, so what starts from grow alone (defrost, hold) starts there, and for later
    stages defrost is usual.
    """
    if not sources:
        return ""
    if starts and sources == ("grow",):
        return os.path.join(out, starts)
    made = [stage for stage in sources if is_finished(os.path.join(out, name, stage))]
    usual = "defrost" if starts and len(sources) > 1 else sources[-1]
    return os.path.join(out, name, (made or [usual])[0])


def finish_first(run, flags, besides=()):
    """
    Train the run OUT/NAME/STAGE, from which another one starts, to its end, unless it is finished: by this script with
    these flags, [(key, text)], but for the keys `besides`. It is a process of its own: it saves, resumes and stops like
    any run, and leaves its memory behind.
    """
    if is_finished(run):
        return
    (folder, stage), state = os.path.split(run), newest_about(run)
    out, name = os.path.split(folder)
    words = ["--config", name, "--stage", stage, f"--out={out}",
             *(f"--{key}={text}" for key, text in flags if key not in besides)]
    if get_world_size() > 1:
        raise UserError(f"{run} is not there or not finished: run it first, by torchrun with {' '.join(words)}")
    stopped = f"{run} stopped at step {state['step']}: going on with it first" if state else ""
    print0(stopped or f"no {stage} run in {run} yet: running it first")
    child = subprocess.Popen([sys.executable, os.path.abspath(sys.argv[0]), *words], env=os.environ | {RUN_FIRST: "1"})
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    signal.signal(signal.SIGINT, signal.SIG_IGN)               # Ctrl-C reaches the child by itself
    if child.wait():
        sys.exit(child.returncode if child.returncode > 0 else 128 - child.returncode)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def check_finished(path, state, otherwise, snapshot=False):
    """UserError unless a run has taken all its steps, or this is a `snapshot` that was asked for, which is said."""
    if state["step"] >= state["config"]["steps"]:
        return
    step = f"step {state['step']} of {state['config']['steps']}"
    if not snapshot:
        raise UserError(f"{path} stopped at {step}: finish it with --stage {state['stage']}, or {otherwise}")
    print0(f"{path} is a snapshot, of {step}")


def differences(there, here, keys):
    """What differs between two configs, as in ["width 128 there, 64 here"]."""
    return [f"{key} {there.get(key)} there, {here[key]} here" for key in keys if there.get(key) != here[key]]


def check_fits(path, there, here, keys):
    """UserError where the config of a run that another one needs has other values for these keys."""
    if differ := differences(there, here, keys):
        raise UserError(f"{path} does not fit ({', '.join(differ[:3])}): use its settings, or train another")


# ---- a run that goes on ----------------------------------------------------------------------------------------------

def check_settings(run, saved, about, free_keys):
    """
    Refuse to go on with the state `saved` of another run, or with other settings than its own, but for `free_keys`: a
    run that mixes settings is no run to learn from. `about`: "name", "stage", "config" now. -> text of what changed.
    """
    if (saved["name"], saved["stage"]) != (about["name"], about["stage"]):
        raise UserError(f"{run} holds a {saved['stage']} run of {saved['name']}, expected {about['stage']} of "
                        f"{about['name']}: move it to its own place, or give --fresh")
    before, now = saved["config"], about["config"]
    differ = [key for key in now if before.get(key) != now[key]]
    if locked := [key for key in differ if key not in free_keys]:
        data = f", or let these data stand in with --data_id {before.get('data_id')}" * ("data_id" in locked)
        raise UserError(f"{run} holds a run of other settings ({', '.join(differences(before, now, locked))}): repeat "
                        f"them{data}, give this run another --out, or start anew with --fresh")
    return "".join(f", {key} {before.get(key)} -> {now[key]}" for key in differ)


def check_origins(run, saved, core, teacher):
    """UserError where a run is told to go on from another --core or --teacher than it started from; None is any."""
    path, anew = saved.get("teacher", [None])[0], "out, or start anew with --fresh"
    if path and teacher not in (None, path, os.path.dirname(path)):
        raise UserError(f"{run} learns from {path}, not from {teacher}: leave --teacher {anew}")
    if core and not saved["parents"][-1].startswith(f"{core} ("):
        raise UserError(f"{run} was grown from {saved['parents'][-1]}, not from {core}: leave --core {anew}")


def check_unchanged(path, digest, what, otherwise):
    """UserError where a file that is named and not copied, `what` it is, has no more the sha256 that it had."""
    there = os.path.exists(path)
    if not there or file_hash(path) != digest:
        raise UserError(f"{what}, {path}, is {'no more what it was in training' if there else 'not there'}: bring it "
                        f"back, or {otherwise}")
