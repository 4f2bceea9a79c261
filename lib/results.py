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


def accuracy(guesses, classes):
    """Of [(guess, truth)] -> {class: share of right guesses}, with "mean" over classes and "chance"."""
    right = {c: [guess == truth for guess, truth in guesses if truth == c] for c in classes}       # by the true class
    table = {c: float(np.mean(r)) for c, r in right.items() if r}                  # a class without images is left out
    return table | {"mean": float(np.mean(list(table.values()))) if table else float("nan"), "chance": 1 / len(classes)}


def tuning(points):
    """
    Curves over guidance from [(guidance, metrics)], and the range between the optimum of the first Frechet distance and
    that of the first MMD, where to look for a good value (Greedy Growing, Sec. 5.3, with FD-DINO and CMMD). A lowest
    value at an end of the guidances tried is no optimum: lower ones may lie beyond.
    """
    points = sorted(points, key=lambda point: point[0])
    guidances, results = [g for g, _ in points], [flat(metrics) for _, metrics in points]
    curves = {name: [result[name] for result in results] for name in results[0]}   # by metric, over guidance
    optimum = {}
    for starts in (("fd_dino", "fd_"), ("cmmd", "mmd_")):      # of each family the first that there is
        name = next((c for start in starts for c in curves if c.startswith(start)), None)
        if name is None:
            continue
        k = int(np.argmin(curves[name]))                       # lower is better
        if 0 < k < len(guidances) - 1:
            optimum[name] = guidances[k]
        else:
            print(f"lowest {name} at {guidances[k]:g}, an end of the guidances tried: no optimum, try further ones")
    where = sorted(optimum.values()) if len(optimum) == 2 else None
    if where:
        range_of = f"between {where[0]:g} and {where[1]:g}" if where[0] < where[1] else f"{where[0]:g}"
        print(f"guidance {range_of}: " + ", ".join(f"lowest {name} at {g:g}" for name, g in optimum.items()))
    return {"guidance": guidances, "curves": curves, "optimum": optimum, "range": where}


def best_point(points):
    """((guidance, mean, spread), why): of the highest dsg where there is one, else of the lowest Frechet distance."""
    if "questions" in points[0][1]:
        return max(points, key=lambda point: point[1]["questions"]["dsg"]), "highest dsg"
    name = next((name for name in points[0][1] if name.startswith("fd_")), None)
    return min(points, key=lambda point: point[1].get(name, 0)), f"lowest {name}" if name else "first"
