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

The same command again goes on where it stopped; --fresh moves the old run aside and starts anew. Ctrl-C saves first. A stage that
needs another one runs it first, with the same flags but --resolution and --shell. --config takes a section of configs.txt, --out a
folder for the runs, --core a run or file to start from.
"""
import copy
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Batches, Scenes, UserError, grid, load_config, loader, nearest, open_data, to_uint8, write_png
from eval import HELD_OUT, evaluate, report
from model import FORMAT, build, check_sizes, diffusion_loss, ema_weights, noise, read_checkpoint
from sample import SAMPLERS, sample

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
SHELL_KEYS = ("shell", "resolution", "channels", "residual_blocks", "entry_channels")
CORE_KEYS = ("width", "depth", "heads", "mlp_ratio", "grid", "text_vocab", "text_length", "encoder", "encoder_id")
FREE_KEYS = ("steps", "workers", "log_every", "sample_every", "save_every", "eval_n", "guidance", "sampler", "sample_steps", "micro", "encoder_weights")

signal.signal(signal.SIGINT, signal.SIG_DFL)                   # until the loop there is nothing to save
DTYPES = {"auto": torch.bfloat16 if torch.cuda.is_available() else torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}

# ---- settings: flags --KEY VALUE, a config, a stage -------------------------------------------------------------------------
words = sys.argv[1:]
if "--help" in words or "-h" in words:
    sys.exit(print(__doc__))
fresh = "--fresh" in words
words = [w for w in words if w != "--fresh"]
if any(not w.startswith("--") for w in words[::2]) or len(words) % 2:
    raise UserError(f"cannot read {' '.join(words)!r}: write --KEY VALUE, as in --stage grow --lr 0.002")
flags = [(key[2:], value) for key, value in zip(words[::2], words[1::2])]
given = dict(flags)
if len(given) < len(flags):
    raise UserError(f"a flag is given twice in {' '.join(words)!r}: give each once")
name, stage, out = given.pop("config", "toy"), given.pop("stage", "grow"), given.pop("out", "out")
core_file = given.pop("core", None)
if stage not in STAGES:
    raise UserError(f"unknown stage {stage!r}: {nearest(stage, STAGES)}")
source, keeps, frozen, only_large = STAGES[stage]
config = load_config(name, stage, list(given.items()))
check_sizes(config)                                            # before any file is opened
for key, known in (("dtype", DTYPES), ("sampler", SAMPLERS)):
    if config[key] not in known:
        raise UserError(f"{key} = {config[key]}: take one of {', '.join(known)}")
if core_file and not source:
    raise UserError(f"--core says where to start, and {stage} starts from nothing: leave it out")
run = os.path.join(out, name, stage)
file = os.path.join(run, "last.pt")

# ---- data: looked at before anything is trained -----------------------------------------------------------------------------
data = open_data(config)
batches = Batches(data, config, filtered=only_large)
config |= batches.identity                                     # which data and which encoder: told apart when a run goes on

# ---- the run that this one starts from, made or finished first where need be ------------------------------------------------
parent = core_file or (source and os.path.join(out, name, source))
resuming = os.path.exists(file) and not fresh
if parent and not resuming:
    start = read_checkpoint(parent) if core_file or os.path.exists(os.path.join(parent, "last.pt")) else None
    if not core_file and (not start or start["step"] < start["config"]["steps"]):
        why = f"{parent} stopped at step {start['step']}: going on with it" if start else f"no {source} run in {parent} yet: running it"
        print(why, "first", flush=True)
        passed = [w for key, value in flags if key not in ("stage", "core", "resolution", "shell") for w in ("--" + key, value)]
        child = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--stage", source, *passed])
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

# ---- run folder: finished, to be continued, or new --------------------------------------------------------------------------
if fresh and os.path.exists(run):
    aside = next(f"{run}.{k}" for k in range(1, 10 ** 6) if not os.path.exists(f"{run}.{k}"))
    os.rename(run, aside)
    print(f"moved the old run to {aside}")
saved = read_checkpoint(file) if resuming else None
if saved:
    differ = [k for k in config if saved["config"].get(k) != config[k] and k not in FREE_KEYS]
    if differ:
        said = ", ".join(f"{k} {saved['config'].get(k)} there, {config[k]} here" for k in differ)
        raise UserError(f"{run} holds a run of other settings ({said}): repeat them, or start anew with --fresh")
    if core_file and not saved["parents"][-1].startswith(f"{core_file} ("):
        raise UserError(f"{run} was grown from {saved['parents'][-1]}, not from {core_file}: leave --core out, or start anew with --fresh")
    if saved["step"] >= config["steps"] and (not config["eval_n"] or os.path.exists(os.path.join(run, "metrics.json"))):
        print(f"{run} is finished: {saved['step']} steps. Look at it: python sample.py {run} {shlex.quote(data.caption(0))}")
        sys.exit(0)
    print(f"{run}: going on at step {saved['step']} of {config['steps']}")
    if os.path.exists(os.path.join(run, "metrics.json")):      # the score of fewer steps
        os.remove(os.path.join(run, "metrics.json"))
os.makedirs(os.path.join(run, "samples"), exist_ok=True)
with open(os.path.join(run, "config.txt"), "w") as f:
    f.write(f"# resolved settings of {name}.{stage}\n" + "".join(f"{k} = {v!r}\n" for k, v in config.items()))
print(f"{stage} of config {name}: " + " ".join(f"{k}={v}" for k, v in config.items()))

# ---- device -----------------------------------------------------------------------------------------------------------------
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = DTYPES[config["dtype"]]
torch.backends.cudnn.deterministic = True                      # a run repeats itself on a GPU too
torch.manual_seed(config["seed"])                              # first weights only; all else draws from (seed, step, sample)
print(batches.summary())

# ---- model: grow, freeze ----------------------------------------------------------------------------------------------------
model = build(config)
if parent and not saved:                                       # a new shell round the old core
    kept = {k: v for k, v in ema_weights(start).items() if k.startswith(keeps)}
    model.load_state_dict({**model.state_dict(), **kept})
    print(f"from {parent}: {len(kept)} tensors kept, {len(model.state_dict()) - len(kept)} new, {len(start['model']) - len(kept)} unused")
for key, p in model.named_parameters():                        # the time encoding goes on learning: the noise schedule moves
    p.requires_grad = not frozen or not key.startswith("core.") or key.startswith("core.time.")
origin = f"{parent} ({start['stage']}, step {start['step']})" if parent and not saved else None
parents = saved["parents"] if saved else start["parents"] + [origin] if origin else []
if saved:
    model.load_state_dict(saved["model"])
model.to(device)
trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
count = lambda tensors: f"{sum(p.numel() for p in tensors):,}"
print(f"model: {count(model.core.parameters())} parameters in the core, {count(model.shell.parameters())} in the {config['shell']} shell, "
      f"{count(trained.values())} trained, on {device} in {str(dtype).split('.')[1]}")

# ---- optimizer, and EMA of what is trained (frozen tensors are shared, not averaged) -----------------------------------------
decays = lambda k, p: p.ndim > 1 and not any(part in k for part in ("embed", "position", "table"))
matrices = {k: p for k, p in trained.items() if config["muon_lr"] and p.ndim == 2 and k.startswith("core.blocks.") and "table" not in k}
others = {k: p for k, p in trained.items() if k not in matrices}
optimizers = [torch.optim.AdamW(
    [{"params": [p for k, p in others.items() if decays(k, p)], "weight_decay": config["weight_decay"]},
     {"params": [p for k, p in others.items() if not decays(k, p)], "weight_decay": 0.0}],
    lr=config["lr"], betas=(config["beta1"], config["beta2"]), fused=True)]
if matrices:
    optimizers.append(torch.optim.Muon(matrices.values(), lr=config["muon_lr"], weight_decay=config["weight_decay"]))
peaks = [o.defaults["lr"] for o in optimizers]
ema = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad}).eval().requires_grad_(False)
averaged = [dict(ema.named_parameters())[k] for k in trained]
first = 0
if saved:
    first = saved["step"]
    for o, state in zip(optimizers, saved["optimizers"]):
        o.load_state_dict(state)
    ema.load_state_dict(ema_weights(saved))


def save(step):
    """All state in one file, replaced as a whole: a kill at any moment leaves the old file or the new one."""
    state = {"format": FORMAT, "stage": stage, "name": name, "config": config, "step": step, "parents": parents,
             "model": model.state_dict(), "ema": dict(zip(trained, (p.detach() for p in averaged))),
             "optimizers": [o.state_dict() for o in optimizers]}
    try:
        with open(file + ".part", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(file + ".part", file)
    except (OSError, RuntimeError) as e:                       # torch reports a full disk as a RuntimeError
        print(f"error: {file} cannot be written ({e}): make room there; the last checkpoint is whole", file=sys.stderr)
        sys.exit(4)


def preview(step):
    """samples/step_N.png: the same captions and noise every time, plain weights above, EMA weights below."""
    held_out = Scenes(config, config["seed"] + HELD_OUT) if data.name == "scenes" else data
    captions = [held_out.caption(i % len(held_out)) for i in range(8)]
    rows = [sample(m, config, captions) for m in (model, ema)]
    write_png(os.path.join(run, "samples", f"step_{step}.png"), grid(to_uint8(torch.cat(rows)), columns=8))


def schedule(step):
    """Share of the peak learning rate: linear warm-up, then a cosine down to lr_end."""
    if step < config["warmup"]:
        return (step + 1) / config["warmup"]
    done = (step - config["warmup"]) / max(1, config["steps"] - config["warmup"])
    return config["lr_end"] + (1 - config["lr_end"]) * 0.5 * (1 + math.cos(math.pi * done))


def step_flops():
    """FLOPs of a training step, counted on one image. Apart from training: the counter changes how operators are carried out."""
    side = config["resolution"]
    x, tokens = torch.zeros(1, 3, side, side, device=device), torch.zeros(1, config["text_length"], dtype=torch.long, device=device)
    t = torch.full((1,), 0.5, device=device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        diffusion_loss(model, x, tokens, t, x, config)         # kernels are tried on the first call, which is not to be counted
        with FlopCounterMode(display=False) as counter:
            diffusion_loss(model, x, tokens, t, x, config).sum().backward()
    model.zero_grad()
    return config["batch"] * counter.get_total_flops()


def sgemm_rate():
    """FLOP/s of a 1024 x 1024 x 1024 float32 product here and now: the yardstick for a step's efficiency."""
    a = torch.randn(1024, 1024, device=device)
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        float((a @ a)[0, 0])                                   # reading a value waits for the device
        times.append(time.perf_counter() - begin)
    return 2 * 1024 ** 3 / sorted(times)[5]


flops = step_flops()

# ---- the loop ---------------------------------------------------------------------------------------------------------------
stopping = []                                                  # signals received


def stop(signum, _):
    """Save after this step. A second Ctrl-C quits at once; a second SIGTERM is the same one, sent to the whole group."""
    os._exit(130) if stopping and signum == signal.SIGINT else stopping.append(signum)


for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, stop)
prepared = loader(batches, first)
log = open(os.path.join(run, "log.jsonl"), "a", buffering=1)
bar = tqdm(range(first, config["steps"]), desc=stage, initial=first, total=config["steps"], disable=None)
micro = config["micro"] or config["batch"]
losses, times, bad_in_a_row, waited = [], [], 0, 0.0            # times: seconds per step, previews and checkpoints left out
for step in bar:
    tick = time.perf_counter()
    x, text, size = (part.to(device) for part in next(prepared)) # (B, C, H, W), (B, L), (B, 6)
    waited += time.perf_counter() - tick

    # noise levels spread evenly over [0, 1], one per image, shifted together: less variance than independent draws
    shift = float(torch.rand((), generator=torch.Generator().manual_seed((config["seed"] * 1000003 + step) % 2 ** 32)))
    t = (torch.arange(config["batch"], device=device) + shift) / config["batch"]   # (B,)
    eps = noise([(config["seed"], step, i) for i in range(len(x))], x.shape[1:], device)
    for o, peak in zip(optimizers, peaks):
        for group in o.param_groups:
            group["lr"] = peak * schedule(step)

    # forward and backward over micro-batches: gradients add up to those of the whole batch
    parts = []
    for x_, text_, t_, eps_, size_ in zip(*(part.split(micro) for part in (x, text, t, eps, size))):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = diffusion_loss(model, x_, text_, t_, eps_, config, size_)       # (b,)
        (loss.sum() / config["batch"]).backward()
        parts.append(loss.detach())
    norm = torch.nn.utils.clip_grad_norm_(trained.values(), config["clip"] or math.inf)

    # a step that is not finite changes nothing; many in a row stop the run
    if not math.isfinite(norm):
        bad_in_a_row += 1
        tqdm.write(f"step {step}: gradient is not finite, skipped ({bad_in_a_row} in a row)")
        if bad_in_a_row >= 20:
            kept = f"; {file} holds the last good state" if os.path.exists(file) else ""
            print(f"error: 20 steps in a row were not finite: start anew with a lower --lr and --fresh{kept}", file=sys.stderr)
            sys.exit(3)
    else:
        bad_in_a_row = 0
        for o in optimizers:
            o.step()
        decay = min(config["ema"], (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged, [p.detach() for p in trained.values()], 1 - decay)
        losses.append(torch.cat(parts))                        # (B,)
    model.zero_grad()

    # one line that answers everything, and the same in log.jsonl
    times.append(time.perf_counter() - tick)
    due = lambda key: config[key] and (step + 1) % config[key] == 0
    if losses and (due("log_every") or step + 1 == config["steps"]):
        spent, middle = sum(times) / len(times), sorted(times)[len(times) // 2]    # seconds per step
        bins = torch.stack(losses).mean(0).tensor_split(4)                         # t rises along the batch: from clean to noisy
        line = {"step": step + 1, "loss": round(float(torch.cat(losses).mean()), 5), "bins": [round(float(b.mean()), 4) for b in bins if len(b)],
                "lr": config["lr"] * schedule(step), "norm": round(float(norm), 3), "img_s": round(config["batch"] / spent, 1),
                "data_ms": round(1000 * waited / len(times), 1),
                "gib": round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if device == "cuda" else None}
        if step + 1 - first <= config["log_every"] and device == "cpu":            # the step's share of what this machine can do, once
            line["efficiency"] = round(flops / middle / sgemm_rate(), 2)
            tqdm.write(f"a step takes {flops / 1e9:.1f} GFLOP in {1000 * middle:.0f} ms: {line['efficiency']} of the rate of a 1024 sgemm here")
        tqdm.write(f"step {line['step']:6d}  loss {line['loss']:.4f}  clean..noisy {' '.join(f'{b:.3f}' for b in line['bins'])}  "
                   f"lr {line['lr']:.1e}  norm {line['norm']:.2f}  {line['img_s']:.0f} img/s  data {line['data_ms']:.1f} ms  "
                   f"eta {(config['steps'] - step - 1) * spent:.0f} s")
        log.write(json.dumps(line) + "\n")
        losses, times, waited = [], [], 0.0
    if due("sample_every") or config["sample_every"] and step + 1 == config["steps"]:
        preview(step + 1)
    if due("save_every") or step + 1 == config["steps"] or stopping:
        save(step + 1)
    if stopping and step + 1 < config["steps"]:
        print(f"\nstopped at step {step + 1} and saved {file}: the same command goes on from here")
        sys.exit(128 + stopping[0])

# ---- the score --------------------------------------------------------------------------------------------------------------
for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, signal.SIG_DFL)                      # all is saved; the same command comes back to the score
finish = f"{run} is finished after {config['steps']} steps"
if config["eval_n"]:
    result = evaluate(ema, config, config["eval_n"])
    told = {k: config[k] for k in ("guidance", "sampler", "sample_steps")}
    with open(os.path.join(run, "metrics.json"), "w") as f:
        json.dump({"run": run, "step": config["steps"], "n": config["eval_n"], **told, "metrics": result}, f)
    finish += f": {report(result)}"
print(finish)
same = "".join(f" --{key} {shlex.quote(value)}" for key, value in flags if key in ("config", "out", "data"))
follows = {"pretrain": "grow", "grow": "defrost"}.get(stage)
print("next: " + (f"python train.py --stage {follows}{same}, or " if follows else "") + f"python sample.py {run} {shlex.quote(data.caption(0))}")
