"""What experiments share: trainings by train.py, scores that are made once, and means with their spread."""
import json
import os
import statistics
import subprocess
import sys

from lib.files import atomic_write
from lib.runs import is_finished
from lib.settings import UserError

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def train(out, stage, seed, keys, **own):
    """
    The run out/toy/STAGE, by train.py, which goes on where it was stopped. `own` are settings of this run; `keys`
    {key: text}, those of the command line, are for all and win. A finished run is left alone; with keys train.py looks
    at it, and refuses it where they are not its own. UserError where a training fails.
    """
    if not keys and is_finished(os.path.join(out, "toy", stage)):
        return
    run_train({**own, **keys, "stage": stage, "out": out, "seed": seed, "eval_n": 0})


def run_train(flags):
    """train.py with these flags, {name: value}. UserError, with the command, where it fails."""
    command = [sys.executable, os.path.join(HERE, "train.py"), *(f"--{key}={flags[key]}" for key in flags)]
    if subprocess.run(command).returncode:
        raise UserError(f"{' '.join(command)} failed: mend what it says, and the same command goes on")


def once(file, about, work):
    """Figures: work(), or what `file` keeps of it if that was made of the same, `about` {name: what}."""
    if os.path.exists(file):
        with open(file) as f:
            result = json.load(f)
        if {key: result.get(key) for key in about} == about:
            return result["metrics"]
    metrics = work()
    atomic_write(file, lambda f: f.write(json.dumps(about | {"metrics": metrics}).encode()))
    return metrics


def mean_and_spread(values, digits):
    """As in 0.861 ± 0.007: the standard deviation of several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
