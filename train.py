"""
Train one stage. Each leaves a run folder out/CONFIG/STAGE: last.pt, config.txt, log.jsonl, samples/, metrics.json.

    python train.py --stage grow                       pretrain a core at 16 px, then grow it to 32 px: minutes on two CPU cores
    python train.py --stage pretrain                   phase 1 alone: a Shallow-UViT at low resolution on all images
    python train.py --stage defrost                    phase 3, optional: go on with every weight in motion
    python train.py --stage scratch                    baseline: the grown model from random weights, on large images only
    python train.py --stage finetune                   baseline: growing without freezing
    python train.py --stage grow --data my/photos      your own images, each with a .txt beside it
    python train.py --stage grow --lr 0.002 --batch 64 any key of configs.txt is a flag
    python train.py --stage grow --resolution 64 --core out/toy/pretrain --out out64     another size from the same core
    python train.py --config small --stage grow --plan --devices 8 --kind h100           what it would take: memory, time; in seconds
    torchrun --standalone --nproc-per-node 8 train.py --config small --stage pretrain    on eight GPUs; `batch` stays the global batch

The same command again goes on where it stopped, on any number of devices; --fresh moves the old run aside and starts anew. Ctrl-C saves
first. A stage that needs another one runs it first, with the same flags but --resolution and --shell. --config takes a section of
configs.txt, --out a folder for the runs, --core a run or file to start from. --plan takes --devices, --kind, --mfu and --json FILE.
"""
import contextlib
import datetime
import fcntl
import glob
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Batches, open_data
from eval import evaluate, flat, report
from lib.checkpoint import FORMAT, open_checkpoint
from lib.draws import normals, uniforms
from lib.encoders import open_autoencoder
from lib.pictures import draw_curves, make_grid, to_uint8, write_png
from lib.scenes import Scenes
from lib.settings import UserError, closest, default_config, load_config
from model import (build, check_sizes, checkpointed_modules, diffusion_loss, enable_activation_checkpointing, example, freeze_core, init_from,
                   read_checkpoint)
from sample import sample

# A stage is a row: where it starts, what it keeps of that (a prefix of parameter names), whether the core is frozen, and
# whether images smaller than the target are left out (Greedy Growing, Sec. 3.3 and 4).
STAGES = {
    #             starts from  keeps     frozen  only large images
    "pretrain": (None,        None,     False,  False),
    "grow":     ("pretrain",  "core.",  True,   True),
    "defrost":  ("grow",      "",       False,  True),
    "scratch":  (None,        None,     False,  True),
    "finetune": ("pretrain",  "core.",  False,  True),
}
OWN_FLAGS = ("config", "stage", "out", "core", "fresh", "plan")   # those that are no keys of configs.txt
SHELL_KEYS = ("shell", "channels", "residual_blocks", "entry_channels", "patch")
CORE_KEYS = ("width", "depth", "heads", "mlp_ratio", "text_vocab", "encoder_id")
# what may change when a run goes on: how it is looked at and spread over devices, the steps and the learning rate
FREE_KEYS = ("steps", "lr", "lr_end", "micro", "workers", "compile", "checkpointing", "fsdp", "sharded", "dist_timeout", "num_checkpoints", "guidance",
             "sampler", "sample_steps", "log_every", "sample_every", "save_every", "eval_every", "eval_n", "tensorboard", "encoder_weights")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# dense FLOP/s in half precision, TF32 and float32, and GiB of memory, by NVIDIA's data sheets
KINDS = {"v100": (125e12, 15.7e12, 15.7e12, 32), "a100-80g": (312e12, 156e12, 19.5e12, 80), "h100": (989e12, 495e12, 67e12, 80),
         "h200": (989e12, 495e12, 67e12, 140)}

# ---- settings: flags --KEY VALUE, a config, a stage -------------------------------------------------------------------------
words = sys.argv[1:]
if "--help" in words or "-h" in words:
    sys.exit(print(__doc__))
if words and not words[0].startswith("--"):
    raise UserError(f"cannot read {words[0]!r}: write --KEY VALUE, as in --stage grow --lr 0.002")
flags = []                                                     # (key, text); a flag without a value is switched on
for word in words:
    if word.startswith("--"):
        key, equals, value = word[2:].partition("=")           # --lr=0.002 is --lr 0.002
        flags.append((key, value if equals else "True"))
    elif flags[-1][1] == "True":
        flags[-1] = flags[-1][0], word
    else:
        raise UserError(f"cannot read {word!r}: write --KEY VALUE, as in --stage grow --lr 0.002")
given = dict(flags)                                            # what remains of this are keys of configs.txt
if len(given) < len(flags):
    raise UserError(f"a flag is given twice in {' '.join(words)!r}: give each once")
name, stage, out = given.pop("config", "toy"), given.pop("stage", "grow"), given.pop("out", "out")
core_file, fresh, planning = given.pop("core", None), given.pop("fresh", False), given.pop("plan", False)
asked = {key: given.pop(key) for key in ("devices", "kind", "mfu", "json") if planning and key in given}     # known to --plan alone
if wrong := [key for key in given if key in ("devices", "kind", "mfu", "json")]:
    raise UserError(f"--{wrong[0]} belongs to --plan: add it, or leave --{wrong[0]} out")
if wrong := [key for key in given if key not in default_config()]:                 # a flag of this script may be what was meant
    raise UserError(f"unknown key {wrong[0]!r}: {closest(wrong[0], OWN_FLAGS + tuple(sorted(default_config())))}")
if stage not in STAGES:
    raise UserError(f"unknown stage {stage!r}: {closest(stage, STAGES)}")
source, keeps, frozen, only_large = STAGES[stage]              # from here on nothing asks which stage this is
config = load_config(name, stage, list(given.items()))
starts = f"{name}/{source}" if keeps != "" or not config["starts"] else config["starts"]           # weak to strong: from another config's run
check_sizes(config)                                            # before any file is opened
if core_file and not source:
    raise UserError(f"--core says where to start, and {stage} starts from nothing: leave it out")


def shares(devices):
    """(images per step, images at once) of one device: `batch` is always the global batch."""
    # a batch that changed with the number of devices would change the run
    unit = (config["micro"] or 1) * devices
    if config["batch"] % unit:
        raise UserError(f"batch = {config['batch']} is not divisible by {config['micro'] or 1} (micro) x {devices} (devices): "
                        f"take a multiple of {unit}")
    return config["batch"] // devices, config["micro"] or config["batch"] // devices


def decays(key, p):
    """Weight decay belongs on matrices and convolutions, not on biases, norms, embeddings and tables."""
    return p.ndim > 1 and not any(part in key for part in ("embed", "position", "table"))


def for_muon(key, p):
    """Muon is for the matrices of the core's blocks (Jordan et al. 2024); everything else is AdamW's."""
    return config["muon_lr"] > 0 and p.ndim == 2 and key.startswith("core.blocks.") and "table" not in key


def state_bytes(model):
    """Bytes of float32 state by part: weights of all, the rest of what is trained; Muon keeps one moment, AdamW two."""
    every, trained = list(model.parameters()), {k: p for k, p in model.named_parameters() if p.requires_grad}
    moments = sum(p.numel() * (1 if for_muon(k, p) else 2) for k, p in trained.items())
    trainable = sum(p.numel() for p in trained.values())
    return {"weights": 4 * sum(p.numel() for p in every), "gradients": 4 * trainable, "optimizer": 4 * moments, "ema": 4 * trainable}


# ---- --plan: what the stage would take, on N devices of a kind, from tensors that are shapes alone ----------------------------

def measure(model, images, dtype):
    """(FLOPs, bytes kept for the backward) of a training pass over so many images, with checkpointing if it is on. Runs on fake tensors."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}                 # there in any case
    kept, spent, inputs = {}, [], {}                           # storages by address; what each block adds; what enters the blocks
    total = lambda of: sum(storage.nbytes() for storage in of.values())

    def keep(tensor, of=kept):
        if tensor.untyped_storage()._cdata not in own:         # views of one storage count once
            of[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor
    for block in model.modules():
        if block in checkpointed_modules(model):
            block.register_forward_pre_hook(lambda _, args: (keep(args[0], inputs), spent.append(-total(kept)))[:0] or None)
            block.register_forward_hook(lambda *_: spent.append(spent.pop() + total(kept)))
    x, t, text = example(config, images)
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = diffusion_loss(model, x, text, t, x, config, torch.zeros(images, 6)).sum()
        loss.backward()
    if not config["checkpointing"]:
        return counter.get_total_flops(), total(kept)
    casts = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad) * (dtype != torch.float32)   # autocast's, until the forward ends
    return counter.get_total_flops(), total(kept) - sum(spent) + total(inputs) + max(casts, *spent)        # one block at a time is computed again


def plan(devices=1, kind="h100", mfu=0.4):
    """Parameters, memory per device by part, FLOPs and time of this stage, as a dict; nothing of the model is allocated."""
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}: take one of {', '.join(KINDS)}")
    half, tf32, full, gib = KINDS[kind]
    dtype = DTYPES.get(config["dtype"], torch.float16 if kind == "v100" else torch.bfloat16)       # a V100 has no bfloat16
    rate = half if dtype != torch.float32 else tf32 if config["tf32"] else full
    share, micro = shares(devices)
    with FakeTensorMode():
        model = build(config)
        freeze_core(model) if frozen else None
        flops, activations = measure(model, micro, dtype)
        state = state_bytes(model)
        unit = max(sum(p.numel() for p in part.parameters()) for part in (model.shell, *model.core.blocks))  # what FSDP gathers at a time
    # FSDP cuts the state into shards; activations belong to the images of a device and stay
    memory = {"ddp": state | {"activations": activations},
              "fsdp": {k: v / devices for k, v in state.items()} | {"gathered": 4 * unit, "activations": activations}}
    memory = {way: {k: v / 2 ** 30 for k, v in (parts | {"total": sum(parts.values())}).items()} for way, parts in memory.items()}
    speed = devices * rate * mfu * micro / flops               # images per second
    return {"config": name, "stage": stage, "parameters": {"total": state["weights"] // 4, "trainable": state["ema"] // 4},
            "memory": memory, "memory_unit": "GiB per device",
            "devices": devices, "kind": kind, "device_gib": gib, "dtype": str(dtype).split(".")[1], "micro": micro, "batch": config["batch"],
            "accumulation": share // micro, "flops_per_image": flops / micro, "mfu": mfu, "images_per_second": speed,
            "steps": config["steps"], "days": config["steps"] * config["batch"] / speed / 86400}


def tell_plan(p):
    """The plan as a table for people."""
    counts, product = p["parameters"], f"{p['micro']} micro x {p['accumulation']} accumulated x {p['devices']} device{'s' * (p['devices'] > 1)}"
    print(f"{stage} of config {name}: {counts['total']:,} parameters, {counts['trainable']:,} trained; {p['steps']} steps of {p['batch']} images")
    print(f"{p['devices']} x {p['kind']} ({p['device_gib']} GiB), {p['dtype']}: batch {p['batch']} = {product}")
    print("GiB per device " + "".join(f"{part:>13}" for part in p["memory"]["fsdp"]))
    for way, parts in p["memory"].items():
        fits = "fits" if parts["total"] < 0.95 * p["device_gib"] else "too much: lower --micro, or switch on --checkpointing"
        print(f"{way:>14} " + "".join(f"{parts.get(k, 0):13.2f}" for k in p["memory"]["fsdp"]) + f"   {fits}")
    print(f"{p['flops_per_image'] / 1e9:,.1f} GFLOP per image; {p['images_per_second']:,.0f} images/s and {p['days']:.3g} days "
          f"at {p['mfu']:.0%} of the peak rate, which is assumed (--mfu)")


if planning:
    try:
        devices, mfu = int(asked.get("devices", 1)), float(asked.get("mfu", 0.4))
    except ValueError as e:
        raise UserError(f"--plan: {e}: give numbers, such as --devices 64 --mfu 0.4")
    if devices < 1 or not 0 < mfu <= 1:
        raise UserError(f"--plan for {devices} devices at {mfu:g} of the peak rate: give at least 1, and a share above 0 and up to 1")
    p = plan(devices, asked.get("kind", "h100"), mfu)
    tell_plan(p)
    if "json" in asked:
        with open(asked["json"], "w") as f:
            json.dump(p, f, indent=1)
    sys.exit(0)

# ---- processes: one, or those that torchrun started --------------------------------------------------------------------------
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
cuda = torch.cuda.is_available()
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
if cuda:
    torch.cuda.set_device(device)                              # kernels and NCCL go by the current device
if world > 1:                                                  # in a single process nothing of torch.distributed is touched
    import torch.distributed as dist
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=config["dist_timeout"]))
    except (dist.DistNetworkError, dist.DistStoreError) as e:
        raise UserError(f"the processes cannot meet ({str(e).splitlines()[0]}): give torchrun --standalone, or another --master-port")
elif config["fsdp"]:
    raise UserError("fsdp = True in one process: start it with torchrun --standalone --nproc-per-node N train.py ..., or leave it out")
share, micro = shares(world)                                   # images per step of this process, and at once


def say(*parts):
    """Print once, and above the progress bar. A reader that went away (| head) does not end the run."""
    if rank == 0:
        try:
            tqdm.write(" ".join(map(str, parts)))
            sys.stdout.flush()
        except OSError:
            sys.stdout = open(os.devnull, "w")                 # log.jsonl goes on


def agree(value):
    """The largest of all processes' numbers, so that they decide alike."""
    if world == 1:
        return value
    value = torch.tensor(float(value), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def everyone(value):
    """The values of all processes in order of rank, as one list; a tensor gives its rows."""
    value = value.tolist() if torch.is_tensor(value) else [value]
    if world == 1:
        return value
    lists = [None] * world
    dist.all_gather_object(lists, value)
    return sum(lists, [])


def explain(kind, error, trace):
    """What ends the process without being foreseen: says which process, and what to do where that is known."""
    who, text, status = f"rank {rank}: " if world > 1 else "", str(error).split("\n")[0], 1
    workers = getattr(globals().get("loader"), "_workers", [])
    time.sleep(0.5 if workers else 0)                          # a worker that dies may be heard of before it is dead
    if kind in (torch.OutOfMemoryError, MemoryError) or "allocate memory" in text:
        status, advice = 2, f"lower --micro (now {micro}), or switch on --checkpointing, --dtype bf16 or, on several devices, --fsdp"
        print(f"error: {who}out of memory ({text}): {advice}", file=sys.stderr)
    elif dead := [w.pid for w in workers if not w.is_alive()]:
        status, advice = 3, f"lower --workers (now {config['workers']}) or free some memory; the same command goes on"
        print(f"error: {who}DataLoader worker (pid {dead[0]}) is dead ({text}): {advice}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
        print(f"error: {who}{kind.__name__}: {text}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)                                           # at once: the others must not wait for this process


def leave(status):
    """The end. Of several processes each goes at once: the threads that connect them do not always survive an orderly teardown."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status) if world > 1 else sys.exit(status)


sys.excepthook = explain
signal.signal(signal.SIGINT, signal.SIG_DFL)                   # until the loop there is nothing to save

# ---- data: looked at before anything is trained -----------------------------------------------------------------------------
data = open_data(config)                                       # errors in it are found before hours of training
batches = Batches(data, config, only_large, stage, rank, world)
config |= batches.identity                                     # which data and which encoder: compared when a run goes on or grows

# ---- the run that this one starts from, made or finished first where need be ------------------------------------------------
run = os.path.join(out, name, stage)
file = os.path.join(run, "last.pt")
parent = core_file or (source and os.path.join(out, starts))
saved = None


def older_checkpoints():
    """The files step_N.pt of the run, newest first: what last.pt was before."""
    files = glob.glob(os.path.join(glob.escape(run), "step_*.pt"))
    return sorted(files, key=lambda f: -int(os.path.basename(f)[5:-3]))


# a kill may leave last.pt whole but missing, a disk may break it: the newest one that can be read counts
for candidate in [] if fresh else [f for f in (file, *older_checkpoints()) if os.path.exists(f)]:
    saved, broken = open_checkpoint(candidate, default_config(), shards=False)
    if saved:
        break
    say(f"warning: {broken}: falling back to the checkpoint before it")
else:
    if not fresh and os.path.exists(file):
        raise UserError(f"no checkpoint in {run} can be read: start anew with --fresh")
if saved and saved["step"] == 0:                               # the rehearsal of a run that never began: nothing to lose
    saved = None
if parent and not saved:
    start = read_checkpoint(parent) if core_file or os.path.exists(os.path.join(parent, "last.pt")) else None
    if not core_file and (not start or start["step"] < start["config"]["steps"]):
        if world > 1:
            raise UserError(f"{parent} is not there or not finished: run it first, by torchrun with --config {starts.replace('/', ' --stage ')}")
        why = f"{parent} stopped at step {start['step']}: going on with it" if start else f"no {starts.split('/')[1]} run in {parent} yet: running it"
        say(why, "first")
        # a process of its own: it saves, resumes and stops like any run, and leaves its memory behind
        passed = [w for key, value in flags if key not in ("config", "stage", "core", "resolution", "shell") for w in ("--" + key, value)]
        child = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--config", *starts.replace("/", " --stage ").split(), *passed])
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C reaches the child by itself
        if child.wait():
            sys.exit(child.returncode if child.returncode > 0 else 128 - child.returncode)
        signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.SIG_DFL)
        start = read_checkpoint(parent)
    if keeps == "core." and start["stage"] != "pretrain":
        raise UserError(f"{parent} is a {start['stage']} run and growing takes a core: give a pretrain run")
    if start["step"] < start["config"]["steps"]:
        raise UserError(f"{parent} stopped at step {start['step']} of {start['config']['steps']}: finish it with --stage {start['stage']}")
    differ = [k for k in CORE_KEYS + (SHELL_KEYS if keeps == "" else ()) if start["config"][k] != config[k]]
    if differ:
        said = ", ".join(f"{k} {start['config'][k]} there, {config[k]} here" for k in differ[:3])
        raise UserError(f"{parent} does not fit ({said}): use its settings, or train another")
    kept, carried = init_from(start, config, keeps)

# ---- run folder: finished, to be continued, or new --------------------------------------------------------------------------
if saved:
    if (saved["name"], saved["stage"]) != (name, stage):
        raise UserError(f"{run} holds a {saved['stage']} run of {saved['name']}, expected {stage} of {name}: "
                        "move it to its own place, or give --fresh")
    differ = [k for k in config if saved["config"].get(k) != config[k]]            # a run that mixes settings is no run to learn from
    said = ", ".join(f"{k} {saved['config'].get(k)} there, {config[k]} here" for k in differ if k not in FREE_KEYS)
    if said:
        other = f", or take these data in place of the former with --data_id {saved['config'].get('data_id')}" * ("data_id" in differ)
        raise UserError(f"{run} holds a run of other settings ({said}): repeat them{other}, or start anew with --fresh")
    if core_file and not saved["parents"][-1].startswith(f"{core_file} ("):
        raise UserError(f"{run} was grown from {saved['parents'][-1]}, not from {core_file}: leave --core out, or start anew with --fresh")
    if saved["step"] >= config["steps"] and (not config["eval_n"] or os.path.exists(os.path.join(run, "metrics.json"))):
        say(f"{run} is finished: {saved['step']} steps. Look at it: python sample.py {run} {shlex.quote(data.caption(0))}")
        leave(0)
    say(f"{run}: going on at step {saved['step']} of {config['steps']}" + "".join(f", {k} {saved['config'].get(k)} -> {config[k]}" for k in differ))
if rank == 0:                                                  # one process owns the folder
    if fresh and os.path.exists(run):
        aside = next(f"{run}.{k}" for k in range(1, 10 ** 6) if not os.path.exists(f"{run}.{k}"))
        os.rename(run, aside)
        say(f"moved the old run to {aside}")
    try:
        os.makedirs(os.path.join(run, "samples"), exist_ok=True)
        lock = open(os.path.join(run, "lock"), "w")            # the system lets go of it when this process ends, however it ends
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if saved and os.path.exists(os.path.join(run, "metrics.json")):
            os.remove(os.path.join(run, "metrics.json"))       # the score of fewer steps
        with open(os.path.join(run, "config.txt"), "w") as f:
            f.write(f"# resolved settings of {name}.{stage}\n" + "".join(f"{k} = {v!r}\n" for k, v in config.items()))
    except BlockingIOError:
        raise UserError(f"another process is training in {run}: wait for it, or give this one another --out")
    except OSError as e:
        print(f"error: {run} cannot be written ({e}): make room or give another --out", file=sys.stderr)
        leave(4)
say(textwrap.fill(f"{stage} of config {name}: " + " ".join(f"{k}={v}" for k, v in config.items()), 140, subsequent_indent="    "))
say(f"batch {config['batch']} = {micro} micro x {share // micro} accumulated x {world} device{'s' * (world > 1)}")

# ---- precision --------------------------------------------------------------------------------------------------------------
dtype = DTYPES.get(config["dtype"], torch.bfloat16 if cuda else torch.float32)
if dtype == torch.bfloat16 and cuda and torch.cuda.get_device_capability() < (8, 0):
    if config["dtype"] == "bf16":
        raise UserError(f"{torch.cuda.get_device_name()} has no bfloat16: take --dtype fp16")
    dtype = torch.float16
if dtype == torch.float16 and config["fsdp"]:
    raise UserError("dtype = fp16 with fsdp is not supported, its scale would differ between devices: take --dtype bf16")
if dtype == torch.float16 and not cuda:
    say("fp16 on a CPU is slow: for tests only")
if dtype == torch.float32 and cuda:
    torch.set_float32_matmul_precision("high" if config["tf32"] else "highest")
    say("float32 products are rounded to TF32 (10 bits): --tf32 False for all 23" if config["tf32"] else "float32 products are exact: no TF32")
# weights, moments, EMA and the sums of norms stay float32; only products and convolutions are rounded
half_precision = lambda: torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32)
scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == torch.float16)
torch.backends.cudnn.deterministic = True                      # a run repeats itself on a GPU too
torch.manual_seed(config["seed"])                              # first weights only; all else draws from (seed, step, sample)
say(batches.summary())

# ---- model: grow, freeze, wrap ----------------------------------------------------------------------------------------------
model = build(config)
if parent and not saved:                                       # a new shell round the old core
    model.load_state_dict({**model.state_dict(), **kept})
    say(f"from {parent}: {carried}")
origin = f"{parent} ({start['stage']}, step {start['step']})" if parent and not saved else None
parents = saved["parents"] if saved else start["parents"] + [origin] if origin else []
if frozen:
    freeze_core(model)                                         # before wrappers and optimizer, which look at requires_grad
if config["checkpointing"]:
    enable_activation_checkpointing(model)
if config["fsdp"]:                                             # shards of weights, gradients and moments; each block and the core a unit
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = dist.init_device_mesh(device.split(":")[0], (world,))
    for unit in (*model.core.blocks, model.core, model):       # sharded before the optimizer is made, which must see the shards
        fully_shard(unit, mesh=mesh)
    register_fsdp_forward_method(model.core, "embed")      # called from outside the core's forward: gathers its weights too
model.to(device)
autoencoder = open_autoencoder(config, device)                 # the identity for pixels
net = torch.compile(model) if config["compile"] else model     # the same weights; names are those of `model`
if world > 1 and not config["fsdp"]:
    net = torch.nn.parallel.DistributedDataParallel(net)       # frozen weights take no part in the exchange
trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
count = lambda tensors: f"{sum(p.numel() for p in tensors):,}"
say(f"model: {count(model.core.parameters())} parameters in the core, {count(model.shell.parameters())} in the {config['shell']} shell, "
    f"{count(trained.values())} trained, on {device} in {str(dtype).split('.')[1]}")

# ---- optimizers, and EMA of what is trained: a frozen tensor has no moments, no average, no decay ----------------------------
matrices = {k: p for k, p in trained.items() if for_muon(k, p)}
others = {k: p for k, p in trained.items() if k not in matrices}
optimizers = [torch.optim.AdamW(
    [{"params": [p for k, p in others.items() if decays(k, p)], "weight_decay": config["weight_decay"]},
     {"params": [p for k, p in others.items() if not decays(k, p)], "weight_decay": 0.0}],
    lr=config["lr"], betas=(config["beta1"], config["beta2"]), fused=True)]
if matrices:
    optimizers.append(torch.optim.Muon(matrices.values(), lr=config["muon_lr"], weight_decay=config["weight_decay"]))
peaks = [o.defaults["lr"] for o in optimizers]                 # one schedule scales both
averaged = {k: p.detach().clone() for k, p in trained.items()}


def live():
    """{part: {name: tensor}} of all that training changes: the tensors themselves, by the names of the bare model's parameters."""
    # the only scalar among the moments is the count of steps, which `step` tells
    moments = {f"{k}/{what}": v for k, p in trained.items() for o in optimizers for what, v in o.state.get(p, {}).items() if v.ndim}
    return {"model": model.state_dict(), "ema": averaged, "moments": moments}


def restore(saved):
    """Copy a checkpoint into the live tensors; under FSDP each device takes its shard, and of shards it reads its own part alone."""
    for o in optimizers:                                       # a step of size zero makes the moments' tensors
        for group in o.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        o.step()
        for p in o.state:
            o.state[p].get("step", torch.zeros(())).fill_(saved["step"])
    model.zero_grad()
    if "model" not in saved:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load as load_shards
        return load_shards(by_key(live()), storage_reader=HuggingFaceStorageReader(candidate), no_dist=world == 1)
    for part, tensors in live().items():
        for key, tensor in tensors.items():
            value = saved[part][key].to(tensor.device)         # whole, by name: whatever number of devices wrote it
            if config["fsdp"]:
                value = torch.distributed.tensor.distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.detach().copy_(value)


def by_key(parts):
    """{part: {name: tensor}} -> {"part/name": tensor}, as a sharded checkpoint holds them."""
    return {f"{part}/{k}": v for part, tensors in parts.items() for k, v in tensors.items()}


def write(path, about, parts):
    """
    One file by rank 0, or with --sharded a folder to which every process adds its part (torch's distributed checkpoint, as safetensors).
    Both are read back before they count: by comparing every value, or by opening every shard.
    """
    if config["sharded"]:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, save as save_shards
        save_shards(by_key(parts), storage_writer=HuggingFaceStorageWriter(path, save_distributed=True), no_dist=world == 1)
        if rank == 0:
            torch.save(about, os.path.join(path, "about.pt"))
            HuggingFaceStorageReader(path).read_metadata()
        return
    parts = {part: {k: v.full_tensor() if config["fsdp"] else v for k, v in tensors.items()} for part, tensors in parts.items()}
    if rank == 0:
        with open(path, "wb") as f:
            torch.save(about | parts, f)
            f.flush()
            os.fsync(f.fileno())                               # on the disk before the name changes
        again = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(torch.equal(again[part][k], v.cpu()) for part, tensors in parts.items() for k, v in tensors.items()):
            raise OSError("what was read back differs from what was written")


def save(step, drawn):
    """All state, replaced as a whole: a kill at any moment leaves the old file or the new one. The last `keep` checkpoints stay."""
    about = {"format": FORMAT, "stage": stage, "name": name, "config": config, "step": step, "drawn": drawn, "parents": parents,
             "scaler": scaler.state_dict()}
    # weights that are not finite would lock the run into them
    spoilt = next((k for k, v in by_key(live()).items() if not torch.isfinite(v.to_local() if config["fsdp"] else v).all()), None)
    if agree(spoilt is not None):
        say(f"error: {spoilt} is not finite and is not saved: start anew with a lower --lr and --fresh, or go on from {file}")
        leave(3)
    global held                                                # the step of what lies in `file`
    reason = None
    try:
        if rank == 0:
            remove(file + ".part")                             # left by a kill
        agree(0)                                               # nobody writes before that
        write(file + ".part", about, live())
        if rank == 0:
            if os.path.exists(file) and held not in (0, step):
                os.replace(file, os.path.join(run, f"step_{held}.pt"))
            elif os.path.isdir(file):                          # a rehearsal, or the same step again
                remove(file)
            os.replace(file + ".part", file)
            for old in older_checkpoints()[config["num_checkpoints"] - 1:]:
                remove(old)
        held = step
    except (OSError, RuntimeError) as e:                       # torch reports a full disk as a RuntimeError
        reason = f"{file} cannot be written ({e}): make room there; the checkpoint before is whole"
        print(f"error: {reason}", file=sys.stderr)
    if agree(reason is not None):
        leave(4)


def remove(path):
    """Remove a checkpoint, file or folder, if it is there."""
    shutil.rmtree(path) if os.path.isdir(path) else os.path.exists(path) and os.remove(path)


@contextlib.contextmanager
def ema_weights_in_place():
    """Inside, the model has its averaged weights; after it its own again."""
    own = [p.detach().clone() for p in trained.values()]       # a second model would need its own shards under FSDP
    with torch.no_grad():
        for p, mean in zip(trained.values(), averaged.values()):
            p.copy_(mean)
        try:
            yield model.eval()
        finally:
            for p, value in zip(trained.values(), own):
                p.copy_(value)
            model.train()


def poll():
    """Called between a sampler's steps: a signal that came to any process ends a preview or score at once, in all of them."""
    if agree(len(stopping)):
        raise InterruptedError


def preview(step):
    """samples/step_N.png: the same captions and noise every time, plain weights above, EMA weights below."""
    held_out = Scenes(config, "exam", 0) if data.name == "scenes" else data
    captions = [held_out.caption(i % len(held_out)) for i in range(8)]
    rows = [sample(model, config, captions, poll=poll)]
    with ema_weights_in_place():
        rows.append(sample(model, config, captions, poll=poll))
    if rank == 0:
        write_png(os.path.join(run, "samples", f"step_{step}.png"), make_grid(to_uint8(torch.cat(rows)), columns=8))


def score():
    """Metrics of the EMA weights on held-out captions."""
    with ema_weights_in_place():
        return evaluate(model, config, config["eval_n"], poll=poll)


def exchange(last):
    """Gradients travel between processes after the last micro-batch only; before it each process adds up its own."""
    if config["fsdp"]:
        model.set_requires_gradient_sync(last)
    # no_sync must hold round the forward as well, where DDP decides
    return net.no_sync() if world > 1 and not config["fsdp"] and not last else contextlib.nullcontext()


def record(line):
    """One line in log.jsonl, and in TensorBoard where that was asked for."""
    if rank == 0:
        log.write(json.dumps(line) + "\n")
    if board:
        for key, value in flat(line).items():
            board.add_scalar(key, value, line["step"]) if isinstance(value, (int, float)) else None
        board.flush()


def open_board():
    """A writer for TensorBoard, beside log.jsonl."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard")
    return SummaryWriter(run)


def schedule(step):
    """Share of the peak learning rate: linear warm-up, then a cosine down to lr_end."""
    if step < config["warmup"]:
        return (step + 1) / config["warmup"]
    # of optimizer steps: a step that fp16 skips does not move it
    done = (step - config["warmup"]) / max(1, config["steps"] - config["warmup"])
    return config["lr_end"] + (1 - config["lr_end"]) * 0.5 * (1 + math.cos(math.pi * done))


def ema_decay(step):
    """Warmed up to a constant; or with ema_power a power function, (1 - 1 / n)^(power + 1), whose window grows with the run (EDM2, eq. 127)."""
    if config["ema_power"]:
        return (1 - 1 / (step + 1)) ** (config["ema_power"] + 1)
    return min(config["ema"], (1 + step) / (10 + step))


def sgemm_rate():
    """FLOP/s of a 1024 x 1024 x 1024 float32 product here and now: a CPU's yardstick for a step's efficiency."""
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    return 2 * 1024 ** 3 / sorted(times)[5]


def first_fault(x, text, t, eps, size):
    """The first module, in the order of the forward, whose output is not finite, or None; for the log, so it runs only then."""
    found, hooks = [], []
    # leaves alone: a parent is not finite because a leaf was not
    note = lambda key: lambda m, _, y: found.append(key) if torch.is_tensor(y) and not torch.isfinite(y).all() else None
    for key, module in model.named_modules():
        if not list(module.children()):
            hooks.append(module.register_forward_hook(note(key)))
    with torch.no_grad(), half_precision():
        diffusion_loss(model, x, text, t, eps, config, size)
    for hook in hooks:
        hook.remove()
    return found[0] if found else None


def tell_fault(loss, drawn, bad, *inputs):
    """Say which step was skipped and what began it: samples of this batch by number, and the first module."""
    faulty = [i for i, l in enumerate(everyone(loss)) if not math.isfinite(l)]     # rows of the global batch
    if dtype == torch.float16 and not faulty and scaler.get_scale() > 1:
        return say(f"step {step}: gradient overflowed at scale {scaler.get_scale():g}, skipped ({bad} in a row)")
    samples, modules = [batches.pairs(drawn)[i][1] for i in faulty], [key for key in everyone(first_fault(*inputs)) if key]
    say(f"step {step}: gradient is not finite, skipped ({bad} in a row); loss of samples {samples or 'finite for all'}; "
        f"first module {modules[0] if modules else 'none: only the backward overflowed'}")


def tell_step(losses, times, waited, norm):
    """One line that answers everything, and the same in log.jsonl."""
    spent, middle = sum(times) / len(times), sorted(times)[len(times) // 2]        # seconds per step
    each = torch.tensor(everyone(torch.cat(losses).view(-1, share).mean(0)))       # (B,): t rises along the batch, from clean to noisy
    memory = torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20   # GiB
    line = {"step": step, "loss": round(float(each.mean()), 5), "bins": [round(float(b.mean()), 4) for b in each.tensor_split(4) if len(b)],
            "lr": config["lr"] * schedule(step - 1), "norm": round(norm, 3), "img_s": round(config["batch"] / spent, 1),
            "data_ms": round(1000 * waited / len(times), 1), "gib": round(memory, 2), "skipped": skipped}
    if peak:
        line["mfu"] = round(flops / spent / world / peak, 3)
    elif not cuda and step - first <= config["log_every"]:                         # the step's share of what this machine can do, once
        line["efficiency"] = round(flops / world / middle / sgemm_rate(), 2)
        say(f"a step takes {flops / 1e9:.1f} GFLOP in {1000 * middle:.0f} ms: {line['efficiency']} of the rate of a 1024 sgemm here")
    say(f"step {line['step']:6d}  loss {line['loss']:.4f}  clean..noisy {' '.join(f'{b:.3f}' for b in line['bins'])}  "
        f"lr {line['lr']:.1e}  norm {line['norm']:.2f}  {line['img_s']:.0f} img/s  data {line['data_ms']:.1f} ms  {line['gib']:.1f} GiB  "
        + (f"mfu {line['mfu']:.2f}  " if peak else "") + f"eta {(config['steps'] - step) * spent:.0f} s")
    record(line)


# ---- where the run stands ---------------------------------------------------------------------------------------------------
step, drawn, held, stopping = 0, 0, 0, []                      # optimizer steps, batches drawn (skipped ones too), step of the file, signals
if saved:
    step, drawn, held = saved["step"], saved["drawn"], saved["step"]
    restore(saved)                                             # no generator among it: every draw is a function of (seed, drawn, row)
    scaler.load_state_dict(saved["scaler"])
    saved = None                                               # its memory
room = (config["num_checkpoints"] + 1) * sum(state_bytes(model)[part] for part in ("weights", "optimizer", "ema"))
there = sum(os.path.getsize(f) for f in (file, *older_checkpoints()) if os.path.isfile(f))
if agree(rank == 0 and shutil.disk_usage(run).free < room - there):
    say(f"error: {run} needs {room / 2 ** 30:.2f} GiB for checkpoints and its disk has less: make room, or lower --num_checkpoints (now {config['num_checkpoints']})")
    leave(4)
with FakeTensorMode():                                         # on shapes alone: counting round a real step would change how it is carried out
    counted = build(config)
    freeze_core(counted) if frozen else None
    flops = config["batch"] * measure(counted, 1, dtype)[0]    # per step
known = [rates for kind, rates in KINDS.items() if cuda and kind.split("-")[0] in torch.cuda.get_device_name().lower()]
peak = known[0][0 if dtype != torch.float32 else 1 if config["tf32"] else 2] if known else None    # FLOP/s, for the share that is used
if step == 0:
    save(0, 0)                                                 # a rehearsal: a folder that cannot be written is found out now

# ---- the loop ---------------------------------------------------------------------------------------------------------------


def stop(signum, _):
    """Save after this step. A second Ctrl-C quits at once; a second SIGTERM is the same one, sent to the whole group."""
    os._exit(130) if stopping and signum == signal.SIGINT else stopping.append(signum)


for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, stop)                                # heard after a step, and between the steps of a sampler
loader = iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(drawn, sys.maxsize), num_workers=config["workers"],
                                          multiprocessing_context="fork" if config["workers"] else None))
log = open(os.path.join(run, "log.jsonl"), "a", buffering=1) if rank == 0 else None
board = open_board() if config["tensorboard"] and rank == 0 else None
bar = tqdm(desc=stage, initial=step, total=config["steps"], disable=None if rank == 0 else True)
rows = range(rank * share, (rank + 1) * share)                 # of the global batch, this process's
losses, times, waited, first, bad, skipped = [], [], 0.0, step, 0, 0   # times: seconds per step, previews and checkpoints left out
while step < config["steps"]:
    tick = time.perf_counter()
    batch = [part.to(device, non_blocking=True) for part in next(loader)]
    x, text, size = batch                                      # (b, C, H, W), (b, L) or (b, L, E), (b, 6)
    waited += time.perf_counter() - tick
    x = x if batches.latents else autoencoder.encode(x)        # latents that were not made beforehand

    # noise levels spread evenly over [0, 1], one per image, shifted together: less variance than independent draws
    shift = float(uniforms(1, "times", stage, config["seed"], drawn)[0])
    t = (torch.arange(rows.start, rows.stop, device=device) + shift) / config["batch"]       # (b,)
    eps = normals([("noise", stage, config["seed"], drawn, i) for i in rows], x.shape[1:], device)
    drawn += 1
    for o, top in zip(optimizers, peaks):
        for group in o.param_groups:
            group["lr"] = top * schedule(step)

    # forward and backward over micro-batches: gradients add up to those of the whole batch, and are exchanged after the last one
    parts = list(zip(*(part.split(micro) for part in (x, text, t, eps, size))))
    for k, (x_, text_, t_, eps_, size_) in enumerate(parts):
        with exchange(k + 1 == len(parts)):
            with half_precision():
                loss = diffusion_loss(net, x_, text_, t_, eps_, config, size_)     # (micro,)
            scaler.scale(loss.sum() * world / config["batch"]).backward()          # the exchange takes the mean over processes
        losses.append(loss.detach())
    for o in optimizers:
        scaler.unscale_(o)                                     # so that the norm is that of the gradient itself
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), config["clip"] or math.inf)
    norm = float(norm.full_tensor() if config["fsdp"] else norm)                   # of the whole gradient, equal in all processes

    # a step that is not finite moves nothing: neither weights nor step, learning rate, EMA; many in a row end the run
    if moved := math.isfinite(norm):
        for o in optimizers:
            scaler.step(o)
        torch._foreach_lerp_(list(averaged.values()), [p.detach() for p in trained.values()], 1 - ema_decay(step))
        step, bad = step + 1, 0
        bar.update()
    else:
        bad, skipped = bad + 1, skipped + 1
        tell_fault(torch.cat(losses[-len(parts):]), drawn - 1, bad, x, text, t, eps, size)
        del losses[-len(parts):]
        if bad >= 20:
            advice = "--dtype bf16 or a lower --lr" if dtype == torch.float16 else "a lower --lr"
            say(f"error: 20 steps in a row were not finite: start anew with {advice} and --fresh; {file} holds the last good state")
            leave(3)
    scaler.update()                                            # halves the scale after an overflow, doubles it after 2000 good steps
    model.zero_grad()

    # tell, look, keep, leave
    times.append(time.perf_counter() - tick)
    due = lambda key: moved and config[key] and step % config[key] == 0
    last = moved and step == config["steps"]
    if due("log_every") or last:
        tell_step(losses, times, waited, norm)
        losses, times, waited = [], [], 0.0
    try:
        if due("sample_every") or last and config["sample_every"]:
            preview(step)
        if due("eval_every") and not last:                     # the last score follows the loop
            record({"step": step, "score": (result := score())})
            say(f"step {step:6d}  {report(result)}")
    except InterruptedError:
        pass                                                   # a signal: save first
    stopped = agree(stopping[0] if stopping else 0)
    if due("save_every") or last or stopped:
        save(step, drawn)
    if stopped and not last:
        bar.close()
        say(f"stopped at step {step} and saved {file}: the same command goes on from here")
        leave(128 + int(stopped))
bar.close()

# ---- the score --------------------------------------------------------------------------------------------------------------
finish = f"{run} is finished after {config['steps']} steps"
try:
    if config["eval_n"]:
        result = score()
        told = {k: config[k] for k in ("guidance", "sampler", "sample_steps")}
        record({"step": step, "score": result})
        if rank == 0:
            with open(os.path.join(run, "metrics.json"), "w") as f:
                json.dump({"run": run, "step": config["steps"], "n": config["eval_n"], **told, "metrics": result}, f)
        finish += f": {report(result)}"
except InterruptedError:                                       # all is saved; the same command comes back to the score
    leave(128 + int(agree(stopping[0] if stopping else 0)))
if rank == 0:
    with open(os.path.join(run, "log.jsonl")) as f:
        draw_curves([json.loads(line) for line in f], os.path.join(run, "curve.png"))
say(finish)
dropped = ("stage", "core", "fresh") + ("resolution", "shell") * (stage == "pretrain")               # the rest must be said again, or does not fit
same = "".join(f" --{key} {shlex.quote(value)}" for key, value in flags if key not in dropped)
follows = {"pretrain": "grow", "grow": "defrost"}.get(stage)
say("next: " + (f"python train.py --stage {follows}{same}, or " if follows else "") + f"python sample.py {run} {shlex.quote(data.caption(0))}")
leave(0)
