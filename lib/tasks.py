"""
A task: captions that a model is asked to draw, who looks at its pictures, and which figures are made of what was seen.
"""
import os
from typing import Callable, NamedTuple

from lib.pictures import write_png
from lib.processes import get_rank
from lib.questions import dsg_table, read_captions
from lib.settings import UserError


class Task(NamedTuple):
    """Captions, what is found in each picture, and figures made of that. Without functions nobody looks."""
    captions: list                                             # one for each picture
    names: list | None = None                                  # of kept pictures' files; None: 00000, 00001 ...
    look: Callable = lambda image, i: None                     # (H, W, 3) uint8 -> what the i-th picture shows
    metrics: dict = {}                                         # {metric: function of all that `look` returned}


def worded(captions, config):
    """The captions between the words of prompt engineering, `prefix` and `suffix`; the null caption has none."""
    return [caption and " ".join(filter(None, (config["prefix"], caption, config["suffix"]))) for caption in captions]


def in_style(config):
    """The config that puts the style token before all captions; UserError where training knew none."""
    if not config["style"]:
        raise UserError("--style: this run never saw a style token: take one of --stage style, or a student of one")
    return config | {"prefix": f"{config['style_token']} {config['prefix']}".rstrip()}


def prompts_task(file):
    """Captions from a file, one a line; a blank line is the null caption. Nobody judges them."""
    return Task(read_captions(file))


def dsg_task(prompts, ask=None):
    """The captions are the prompts of read_dsg; `ask`, where there is one, answers each question about its picture."""
    captions, names = [p["text"] for p in prompts], [p["item"] for p in prompts]
    if not ask:
        return Task(captions, names)

    def answers(image, i):
        return {q: ask(image, text) for q, text in prompts[i]["questions"].items()}
    return Task(captions, names, answers, {"questions": lambda all_answers: dsg_table(prompts, all_answers)})


def keep_pictures(task, folder):
    """The task, with every picture kept as folder/NAME.png when it is looked at, for other programs."""
    os.makedirs(folder, exist_ok=True)
    if get_rank() == 0:                                        # long before any process has made its first picture
        if os.listdir(folder):
            raise UserError(f"{folder!r} is not empty: give a new folder, for the pictures of one call alone")
        text = "".join(" ".join(caption.split()) + "\n" for caption in task.captions)      # as --prompts reads them
        with open(os.path.join(folder, "captions.txt"), "w", encoding="utf-8") as f:
            f.write(text)

    def write_and_look(image, i):
        name = task.names[i] if task.names else f"{i:05d}"
        write_png(os.path.join(folder, f"{name}.png"), image)
        return task.look(image, i)
    return task._replace(look=write_and_look)
