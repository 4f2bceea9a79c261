"""
What a whole run costs: parts of experiments.bench that start the scripts as a user would, and read their logs.

    plan         memory that `train.py --plan` foretells, beside the peak of some real steps
    numbers      the same steps in float32, bf16, fp16 and compiled: images per second, memory, loss
    processes    NCCL, or gloo without a GPU, with one process: votes, copies and shards give the same gradient
    small        `small` trained for the time that is left, then scored, with pictures; toy without a GPU

Each gives rows, as all parts do. A command that fails, or takes too long, is a row that tells why.
"""
import copy
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist

from experiments.bench_report import cell
from lib.runs import read_log
from lib.settings import load_config
from model import build, diffusion_loss, example

CAPTIONS = ("a large red circle left of a small blue square on a white background", "two green triangles on a black "
            "background", "a small yellow cross above a large blue circle on a white background")


def python(script, *words, deadline):
    """Run a script of this repository; its last lines where it fails. RuntimeError for that and for the time."""
    command = [sys.executable, script, *map(str, words)]
    print(" ".join(["python", *command[1:]]), flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1, deadline - time.time()))
    except subprocess.TimeoutExpired:
        raise RuntimeError("no time left")
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: " + " ".join((done.stdout + done.stderr).split())[-200:])


def row_of(about, work):
    """about | work(), or the problem, which is a row too."""
    try:
        row = about | work()
    except Exception as problem:
        row = about | dict(problem=f"{type(problem).__name__}: {str(problem)[:300]}", good=False)
    print("  ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
    return row


def real_steps(config, stage, words, deadline, steps=6):
    """
    {img_s, gib, loss} of a training that does nothing else, from its last log line. The first steps, which compile and
    try kernels, are in no line but their own.
    """
    with tempfile.TemporaryDirectory() as out:
        if stage == "grow":                                         # from a core that has seen one step
            python("train.py", "--config", config, "--stage", "pretrain", "--out", out, "--steps", 1, "--eval_n", 0,
                   "--sample_every", 0, deadline=deadline)
        python("train.py", "--config", config, "--stage", stage, "--out", out, "--steps", steps, "--eval_n", 0,
               "--log_every", steps // 2, "--sample_every", 0, *words, deadline=deadline)
        line = read_log(os.path.join(out, config, stage))[-1]
    return {key: line[key] for key in ("img_s", "gib", "loss", "mfu") if key in line}


def check_plan(deadline, quick):
    """Yields a row for each stage: GiB foretold for one device, GiB at the peak, and their ratio."""
    config, cuda = ("toy" if quick else "small"), torch.cuda.is_available()
    for stage in ("pretrain",) if quick else ("pretrain", "grow"):
        words = ("--batch", 32, "--dtype", "bf16" if cuda else "fp32")

        def work():
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                kind = ("--devices", 1, "--kind", "h100", "--json", file.name)
                python("train.py", "--config", config, "--stage", stage, "--plan", *kind, *words, deadline=deadline)
                foretold = json.load(open(file.name))["memory"]["ddp"]["total"]
            measured = real_steps(config, stage, words, deadline)["gib"]
            # without a GPU the peak is of the whole process, with PyTorch itself in it
            return dict(foretold_gib=foretold, gib=measured, ratio=measured / foretold,
                        good=not cuda or abs(measured / foretold - 1) < 0.1)
        yield row_of(dict(config=config, stage=stage), work)


def compare_numbers(deadline, quick):
    """Yields a row for each kind of numbers: images per second, and their ratio to the first, float32."""
    config, cuda = ("toy" if quick else "small"), torch.cuda.is_available()
    kinds = {"fp32": ("--dtype", "fp32"), "bf16": ("--dtype", "bf16"), "fp16": ("--dtype", "fp16"),
             "compiled": ("--dtype", "bf16", "--compile")} if cuda else {"fp32": (), "bf16": ("--dtype", "bf16")}
    first = None
    for name, words in kinds.items():
        row = row_of(dict(config=config, stage="pretrain", numbers=name),
                     lambda: real_steps(config, "pretrain", words, deadline, steps=4 if quick else 60))
        first = first or row.get("img_s")
        yield row | ({"ratio": row["img_s"] / first} if first and "img_s" in row else {})


def try_processes(deadline, quick):
    """Yields a row: with one process, the gradients of copies (DDP) and of shards (FSDP) over that without either."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def work():
        with tempfile.TemporaryDirectory() as folder:
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1,
                                    timeout=datetime.timedelta(seconds=60))
            try:
                votes = torch.ones(3, device=device)
                dist.all_reduce(votes)
                assert votes.sum() == 3
                return compare_gradients(device)
            finally:
                dist.destroy_process_group()
    yield row_of(dict(backend="nccl" if device == "cuda" else "gloo"), work)


def compare_gradients(device):
    """{way: largest difference of a gradient from that without processes, over its largest}"""
    from torch.distributed.fsdp import fully_shard
    config = load_config("toy", "pretrain")
    plain = build(config).to(device)
    x, t, text = example(config, 4, device)
    for p in plain.parameters():                                    # so that no gate is shut
        torch.nn.init.normal_(p, std=0.05)
    copies, shards = copy.deepcopy(plain), copy.deepcopy(plain)
    fully_shard(shards, mesh=dist.init_device_mesh(device, (1,)))

    def gradients(net):
        diffusion_loss(net, x + 0.1, text + 1, t + 0.5, x - 0.1, config).sum().backward()
        return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]
    exact = gradients(plain)
    largest = max(g.abs().max() for g in exact)
    apart = {name: float(max((a - b).abs().max() for a, b in zip(gradients(net), exact)) / largest)
             for name, net in (("ddp", torch.nn.parallel.DistributedDataParallel(copies)), ("fsdp", shards))}
    return apart | dict(good=max(apart.values()) < 1e-5)


def train_small(deadline, quick, out):
    """
    Yields a row for each of the steps that a user takes. Half of the time is for pretraining, four tenths for growing,
    a tenth for a score: each training gets as many steps as fit, by the rate of a trial. `quick` trains for a few.
    """
    config, begin, seconds = ("toy" if quick else "small"), time.time(), deadline - time.time()
    steps, n = (4, 8) if quick else (40, 200)                       # of the trial; images of a score
    for stage, share in (("pretrain", 0.5), ("grow", 0.9)):
        def train(steps):
            """The last line of its log."""
            python("train.py", "--config", config, "--stage", stage, "--out", out, "--eval_n", 0, "--sample_every", 0,
                   "--fresh", "--steps", steps, "--log_every", max(2, steps // 20), deadline=deadline)
            return read_log(os.path.join(out, config, stage))[-1]

        def work():
            line = train(steps)
            if not quick:
                left = begin + share * seconds - time.time()        # a tenth of it starts the process
                line = train(max(steps, int(0.9 * left * line["img_s"] / load_config(config, stage)["batch"])))
            return {key: line[key] for key in ("loss", "img_s", "gib")} | dict(steps=line["step"])
        yield row_of(dict(config=config, stage=stage), work)
    run = f"{out}/{config}/grow"
    few = ("--steps", 8) if quick else ("--steps", 50)

    def score():
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            python("eval.py", run, "--n", n, *few, "--metrics", "questions,fidelity", "--json", file.name,
                   deadline=deadline)
            return dict(n=n, metrics=json.load(open(file.name))["metrics"])

    def draw():
        file = f"{out}/{config}.png"
        python("sample.py", run, *CAPTIONS, *few, "--n", 4, "--to", file, deadline=deadline)
        return dict(pictures=file)
    yield row_of(dict(config=config, score=run), score)
    yield row_of(dict(config=config, sample=run), draw)
