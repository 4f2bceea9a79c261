"""
Run folders: who may write there, and what a training leaves behind.

    config.txt      the settings, KEY = VALUE
    log.jsonl       a line for each dict that was logged
    lock            held by the process that trains there; the system lets go of it however that process ends

Beside them lie checkpoints (checkpoint.py) and whatever the training adds.
"""
import ast
import fcntl
import glob
import json
import os
import shutil

import torch

from lib.checkpoint import older_checkpoints, read_about, save
from lib.pictures import leaves
from lib.processes import all_gather_rows, fail, print0
from lib.settings import UserError

# ---- who may write ---------------------------------------------------------------------------------------------------

def lock_run(run):
    """
    Make a run folder and lock it: the lock holds as long as the returned file is referenced and this process lives.
    Raises UserError where another process holds it; where nothing can be written it says so and ends with status 4.
    """
    try:
        os.makedirs(run, exist_ok=True)
        lock = open(os.path.join(run, "lock"), "a")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {run}: wait for it, or give this one another --out")
    except OSError as e:
        fail(f"{run} cannot be written ({e}): make room or give another --out", 4)
    return lock


def move_aside(run):
    """Move an old run, whose lock this process holds, to the next free of RUN.1, RUN.2 ...; lock a new folder."""
    number = 1
    while os.path.exists(f"{run}.{number}"):
        number += 1
    os.rename(run, f"{run}.{number}")                          # the old lock goes with it
    print0(f"moved the old run to {run}.{number}")
    return lock_run(run)


def prepare_run(run, lock, fresh, title, config):
    """Make room for a new run, if `fresh` by moving the old one aside, and write down its settings. -> the lock."""
    try:
        if fresh and os.listdir(run) != ["lock"]:
            lock = move_aside(run)
        os.makedirs(os.path.join(run, "samples"), exist_ok=True)
        if os.path.exists(os.path.join(run, "metrics.json")):
            os.remove(os.path.join(run, "metrics.json"))       # the score of fewer steps
        with open(os.path.join(run, "config.txt"), "w") as f:
            f.write(f"# settings of {title}\n" + "".join(f"{key} = {value!r}\n" for key, value in config.items()))
    except OSError as e:
        fail(f"{run} cannot be written ({e}): make room or give another --out", 4)
    return lock


def read_settings(run):
    """What prepare_run wrote down, {key: value}. UserError where that is missing or broken."""
    file = os.path.join(run, "config.txt")
    try:
        with open(file) as f:
            lines = [line.partition(" = ") for line in f if line.strip() and not line.startswith("#")]
        return {key: ast.literal_eval(value) for key, _, value in lines}
    except (OSError, ValueError, SyntaxError) as e:
        raise UserError(f"{file} cannot be read ({type(e).__name__}): bring it back, or train this run again with "
                        "--fresh")


def check_room(run, needed):
    """End with status 4 unless the disk has room for so many bytes of checkpoints, those that are there included."""
    there = 0                                                  # bytes of the checkpoints in the folder
    for path in (os.path.join(run, "last.pt"), *older_checkpoints(run)):
        shards = glob.glob(os.path.join(glob.escape(path), "*"))                   # none where it is a file
        there += sum(os.path.getsize(file) for file in shards or [path] if os.path.exists(file))
    if shutil.disk_usage(run).free + there < needed:
        fail(f"{run} needs {needed / 2 ** 30:.2f} GiB for checkpoints and its disk has less: make room, or lower "
             "--num_checkpoints", 4)


def save_or_fail(file, *args):
    """checkpoint.save; where that fails it says why and ends, with status 3 for a value that is not finite, else 4."""
    try:
        save(file, *args)
    except FloatingPointError as e:
        fail(f"{e} is not finite and is not saved: start anew with a lower --lr and --fresh, or go on from {file}", 3)
    except OSError as e:
        fail(f"{file} cannot be written ({e}): make room there; the checkpoint before is whole", 4)


# ---- where a run stands ----------------------------------------------------------------------------------------------

def newest_about(run):
    """
    What the newest checkpoint of a run, or a checkpoint, says of itself, or None: a broken one is for the run itself to
    mend.
    """
    file = run if os.path.isfile(run) else os.path.join(run, "last.pt")
    try:
        return read_about(file) if os.path.exists(file) else None
    except Exception:
        return None


def is_finished(run):
    """Has this run taken all its steps?"""
    state = newest_about(run)
    return state is not None and state["step"] >= state["config"]["steps"]


# ---- what happened ---------------------------------------------------------------------------------------------------

class Log:
    """log({"step": 3, "loss": 0.1, ...}) prints a line and adds it to log.jsonl and, if asked to, to TensorBoard."""

    def __init__(self, run, tensorboard=False):
        self.file, self.board = open(os.path.join(run, "log.jsonl"), "a", buffering=1), None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs a package: pip install tensorboard")
            self.board = SummaryWriter(run)

    def __call__(self, line, text=None):
        text = text or "  ".join(f"{key} {as_text(value)}" for key, value in line.items() if key != "step")
        print0(f"step {line['step']:6d}  {text}")
        self.file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in leaves(line):
                self.board.add_scalar(name, value, line["step"])
            self.board.flush()


def as_text(value):
    """A number of a log line in four digits; of a list, each."""
    return " ".join(map(as_text, value)) if isinstance(value, list) else f"{value:.4g}"


def read_log(run):
    """The lines of a run's log, as dicts."""
    return [json.loads(line) for line in open(os.path.join(run, "log.jsonl"))]


def loss_figures(losses):
    """
    {name: [loss per image, (b,), of each step]} -> {"loss_NAME": mean over steps and processes}; the name "" gives
    "loss", and "bins", which are quarters of the batch, from clean to noisy.
    """
    means = {name: torch.tensor(all_gather_rows(torch.stack(rows).mean(0))) for name, rows in losses.items() if rows}
    figures = {f"loss_{name}".rstrip("_"): round(float(rows.mean()), 5) for name, rows in means.items()}
    quarters = means[""].tensor_split(4) if "" in means else ()                    # else no update of it was due
    return figures | {"bins": [round(float(part.mean()), 4) for part in quarters if len(part)]}


def first_fault(model, forward):
    """Name of the first module, in the order of `forward`, whose output is not finite, or None."""
    found, hooks = [], []

    def watch(name):
        def note(module, _, output):
            if torch.is_tensor(output) and not torch.isfinite(output).all():
                found.append(name)
        return note
    for name, module in model.named_modules():
        if not list(module.children()):                        # leaves: a parent is not finite because a leaf is not
            hooks.append(module.register_forward_hook(watch(name)))
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return found[0] if found else None
