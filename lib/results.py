"""
Results: nested figures {"a": {"b": 1}}, the card that makes them comparable, and the file in which programs read them.
"""
import json
import os
import platform

import numpy as np
import torch

from lib.files import atomic_write, free_name


def flat(result, before=""):
    """{"a": {"b": 1}} -> {"a b": 1}; figures under "questions" keep their plain names."""
    rows = {}
    for key, value in result.items():
        if isinstance(value, dict):
            rows |= flat(value, "" if key == "questions" else f"{before}{key} ")
        else:
            rows[before + key] = value
    return rows


def report(result):
    """A result as a line for people, dsg with its chance level first."""
    questions = result.get("questions", {})
    others = {k: v for k, v in result.items() if k != "questions"}
    chance = f" (chance {questions['chance_dsg']:.3f})" if "chance_dsg" in questions else ""
    parts = [f"dsg {questions['dsg']:.3f}{chance}"] if questions else []
    parts += [f"{k} {v:.3f}" for k, v in questions.items() if "dsg" not in k]
    return "  ".join(parts + [f"{k} {v:.4f}" for k, v in flat(others).items()])


def over_seeds(results, how):
    """Results of several seeds -> one of the same shape, with how(values) in each place."""
    if isinstance(results[0], dict):
        return {k: over_seeds([r[k] for r in results if k in r], how) for k in results[0]}
    return float(how(results))


def make_card(networks, device, **rest):
    """What makes a number comparable: `rest`, the networks {name: (function, about)}, device and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return rest | {"networks": {name: about for name, (_, about) in networks.items()},
                   "images": "rounded and clamped to uint8 before any metric",
                   "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
                   "threads": torch.get_num_threads(), "versions": versions}


def write_result(card, figures, file):
    """Print the card, and write it with the figures to `file`, if any, as JSON; an older file of that name is kept."""
    for key, value in flat(card).items():
        print(f"  {key:26s} {value}")
    if not file:
        return
    if os.path.exists(file):                                   # nothing is overwritten
        os.replace(file, older := free_name(file))
        print(f"the older {file} is now {older}")
    text = json.dumps(figures | {"card": card}, indent=1)      # under this very name programs look for it
    atomic_write(file, lambda f: f.write(text.encode()))
