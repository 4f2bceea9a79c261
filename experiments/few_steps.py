"""
Few steps: students of `toy` beside their teacher, as PixArt-Sigma's Table 4 and Vermeer's 16 steps (Greedy Growing,
Sec. 6).

    python -m experiments.few_steps                    three seeds: trains what is missing, scores it, prints the table
    python -m experiments.few_steps --seeds 0 --n 40   a look at one

OUT/SEED/toy/grow is a teacher, OUT/SEED/STUDENT/toy/distill a student of it, OUT/SEED/METHOD.json a score. What is
there is not made again, so the same command goes on after a stop, and commands for other seeds may run beside it.
OUT/pictures.png has a caption a row and some of the methods as columns; OUT/table.md is the table. Every method draws
the same captions from the same noise. The first row is the teacher as it draws by itself; in the others it is guided
down to the clean image, as the students learned it.
"""
import os
import statistics
import time
from collections import namedtuple

import torch

from eval import evaluate, held_out_task
from experiments.trainings import mean_and_spread, once, train
from lib.files import atomic_write, file_hash
from lib.pictures import contact_sheet, to_uint8, write_png
from lib.processes import join
from lib.settings import Parser, UserError, parse_numbers
from model import load
from sample import check_student, count_evaluations, sample

FASTER = dict(lr=0.001, muon_lr=0.006)                         # for students that are further from their teacher
STUDENTS = {                   # name -> the student that it starts as, "" is the teacher; keys beside [toy.distill]
    "consistency-16": ("", dict(objective="consistency", sample_steps=16)),
    "consistency-4": ("", dict(objective="consistency", sample_steps=4, teacher_steps=32, addim=0.0, steps=1000,
                               **FASTER)),
    "lcm": ("", dict(objective="lcm", sample_steps=4, teacher_steps=8, **FASTER)),
    "dmd": ("lcm", dict(objective="dmd", sample_steps=1, fake_updates=2, steps=400, guidance=1.5, lr=0.0006,
                        muon_lr=0.0036))}                      # gently, and less guided: it keeps variety
# a row of the table: whose pictures (a student's, or "" for the teacher's), by which sampler, in how many steps
Method = namedtuple("Method", "student sampler steps")
METHODS = [Method(*row) for row in (                           # the teacher in 16 and 4 steps: what distilling adds
    ("", "churn", 32), ("", "ddpm", 256), ("", "ddim", 50), ("", "dpm", 20), ("", "ddim", 16), ("", "lcm", 16),
    ("", "ddim", 4), ("", "lcm", 4), ("consistency-16", "ddim", 16), ("consistency-16", "ddpm", 16),
    ("consistency-16", "lcm", 16), ("consistency-4", "ddim", 4), ("consistency-4", "lcm", 4), ("lcm", "lcm", 4),
    ("lcm", "lcm", 2), ("lcm", "lcm", 1), ("dmd", "lcm", 1))]
DRAWN = [METHODS[k] for k in (1, 4, 6, 10, 12, 13, 15, 16)]     # columns of pictures.png
METRICS = ("questions", "fidelity", "diversity")


def run_of(method, folder):
    """The run folder that a method samples from."""
    return os.path.join(folder, method.student, "toy", "distill" if method.student else "grow")


def train_all(folder, seed, keys):
    """The teacher and its students; `keys` are for all."""
    train(folder, "grow", seed, keys)
    teacher = os.path.join(folder, "toy", "grow")
    for name, (core, own) in STUDENTS.items():
        core = os.path.join(folder, core, "toy", "distill") if core else teacher
        train(os.path.join(folder, name), "distill", seed, keys, teacher=teacher, core=core, **own)


def open_method(method, folder):
    """(model, config) that samples as the method does; it needs no guidance of its own as a student."""
    model, config = load(run_of(method, folder), "cuda" if torch.cuda.is_available() else "cpu")
    check_student(config, method.steps, sampler=method.sampler)
    return model, sampling_as(method, config)


def sampling_as(method, config):
    """The config that samples as the method does: a teacher by its own sampler as it is, else guided throughout."""
    end = config["guidance_end"] if method.sampler == config["sampler"] else 0.0   # as students learned it
    return config | {"sampler": method.sampler, "sample_steps": method.steps, "guidance_end": end}


def title(method):
    """As in `consistency by ddim, 4 steps`."""
    who = method.student.partition("-")[0] or "teacher"
    return f"{who} by {method.sampler}, {method.steps} step{'s' * (method.steps > 1)}"


def evaluations(method, config):
    """Of the network for a picture; guidance is inside a student."""
    guidance = 1 if method.student else config["guidance"]
    return count_evaluations(sampling_as(method, config), method.sampler, method.steps, guidance)


def score(method, folder, n):
    """Metrics of n held-out captions, from METHOD.json if that was made of these very weights at this n."""
    file = os.path.join(folder, f"{title(method)}.json")
    about = {"weights": file_hash(os.path.join(run_of(method, folder), "last.pt")), "n": n}

    def work():
        print(f"{folder}: {title(method)}")
        return evaluate(*open_method(method, folder), n, metrics=METRICS)
    return once(file, about, work)


def seconds_per_picture(methods, folder, n=8, rounds=3):
    """[seconds] for one of n pictures made together: median of rounds, in each of which all methods take their turn."""
    # in turn, so that a machine that is busy for a while slows all methods; the median leaves that round out
    spent = [[] for _ in methods]
    opened = [open_method(method, folder) for method in methods]
    for _ in range(rounds):
        for (model, config), times in zip(opened, spent):
            start = time.perf_counter()
            sample(model, config, held_out_task(config, n).captions)               # ends on the CPU
            times.append((time.perf_counter() - start) / n)
    return [statistics.median(times) for times in spent]


def table(scores, seconds, config):
    """Markdown, a row for each method; scores: {method: [metrics of each seed]}."""
    lines = ["| method | evaluations | s / picture | dsg | fidelity, dB | diversity of places |", "|---|" + 5 * "---|"]
    for (method, results), spent in zip(scores.items(), seconds):
        figures = [mean_and_spread([r["questions"]["dsg"] for r in results], 3),
                   mean_and_spread([r["fidelity"]["psnr"] for r in results], 1),
                   mean_and_spread([r["diversity"]["places"] for r in results], 2)]
        lines.append(f"| {title(method)} | {evaluations(method, config)} | {spent:.3f} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def draw(methods, folder, file, captions=6):
    """A caption a row, a method a column, from the same noise."""
    columns = []                                               # (captions, H, W, 3) each
    for method in methods:
        model, config = open_method(method, folder)
        columns.append(to_uint8(sample(model, config, held_out_task(config, captions).captions)))
    images = [column[row] for row in range(captions) for column in columns]
    write_png(file, contact_sheet(images, [title(method) for method in methods] * captions, len(methods), most=128))
    print(file, *held_out_task(config, captions).captions, sep="\n  ")


def main():
    parser = Parser(__doc__)                                   # takes any key of configs.txt too, for all trainings
    parser.add_argument("--seeds", default="0,1,2", help="of the trainings")
    parser.add_argument("--n", type=int, default=200, help="pictures for a score, and nearly as many for diversity")
    parser.add_argument("--out", default="out/few", help="folder")
    args, keys = parser.parse_keys()
    if args.n < 2:
        raise UserError(f"--n {args.n}: a spread needs at least 2")
    join(600)
    scores = {method: [] for method in METHODS}
    seeds = [int(seed) for seed in parse_numbers(args.seeds, "--seeds")]
    folders = [os.path.join(args.out, str(seed)) for seed in seeds]
    for seed, folder in zip(seeds, folders):
        train_all(folder, seed, dict(keys))
        for method in METHODS:
            scores[method].append(score(method, folder, args.n))
    draw(DRAWN, folders[0], os.path.join(args.out, "pictures.png"))
    text = table(scores, seconds_per_picture(METHODS, folders[0]), open_method(METHODS[0], folders[0])[1])
    atomic_write(os.path.join(args.out, "table.md"), lambda f: f.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()
