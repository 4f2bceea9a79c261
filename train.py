"""
Train one stage. Each leaves a run folder out/CONFIG/STAGE: last.pt, config.txt, log.jsonl, samples/, metrics.json.

    python train.py --stage grow                       pretrain a core at 32 px, then grow it to 64 px: minutes on a CPU
    python train.py --stage pretrain                   phase 1 alone: a Shallow-UViT at low resolution on all images
    python train.py --stage defrost                    phase 3, optional: go on with every weight in motion
    python train.py --stage style --style my/best      tune it to a set of images of one style, mixed with the data
    python train.py --stage condition --conditions size        a grown model learns to be told numbers (GUIDE.md)
    python train.py --stage distill                    a student of the last model that takes 16 steps, no guidance
    python train.py --stage scratch                    baseline: the grown model from random weights, large images only
    python train.py --stage finetune                   baseline: growing without freezing
    python train.py --stage hold                       baseline: a grown model trained on, its core still frozen
    python train.py --stage cascade                    baseline: a model that enlarges the pictures of pretrain
    python train.py --stage grow --data my/photos      your own images, each with a .txt beside it
    python train.py --stage grow --lr 0.002 --batch 64 any key of configs.txt is a flag
    python train.py --stage grow --resolution 128 --core out/toy/pretrain --out out128  another size from the same core
    python train.py --config small --stage grow --plan --devices 8 --kind h100          what it would take: memory, time
    torchrun --standalone --nproc-per-node 8 train.py --config small --stage pretrain   `batch` stays the global batch

The same command again goes on where it stopped, on any number of devices; --fresh moves the old run aside and starts
anew. Ctrl-C saves first. A stage that needs another one runs it first, with the same flags; distill wants it finished.
"""
import functools
import json
import math
import os
import shlex
import sys
import textwrap
import time
from collections import namedtuple

from lib.settings import Parser, UserError, closest, default_config, load_config

# A stage is a row (Greedy Growing, Sec. 3.3, 4 and 6): the stages that it may start from, of which it takes the first
# that is finished; which weights of that it keeps, by a prefix of their names; whether the core is frozen; whether
# images smaller than the target are left out. A new one: in [stages] of configs.txt too, as hold = defrost, which names
# the stage whose settings it reads before its own.
Stage = namedtuple("Stage", "sources init_prefix freeze large_only")
STAGES = {
    "pretrain":  Stage((),                            None,    False, False),
    "grow":      Stage(("pretrain",),                 "core.", True,  True),
    "defrost":   Stage(("grow",),                     "",      False, True),
    "scratch":   Stage((),                            None,    False, True),       # baseline 1
    "finetune":  Stage(("pretrain",),                 "core.", False, True),       # baseline 2
    "cascade":   Stage((),                            None,    False, True),       # baseline 3, beside its base
    "hold":      Stage(("grow",),                     "",      True,  True),       # baseline 4: on, still frozen
    "style":     Stage(("defrost", "grow"),           "",      False, True),       # some rows of another set
    "condition": Stage(("defrost", "grow"),           "",      True,  True),       # a finished core is told numbers
    "distill":   Stage(("style", "defrost", "grow"),  "",      False, True),
}
parser = Parser(__doc__)                                       # takes any key of configs.txt too
parser.add_argument("--config", default="toy", help="a section of configs.txt")
parser.add_argument("--stage", default="grow", help="one of " + ", ".join(STAGES))
parser.add_argument("--out", default="out", help="folder for the runs")
parser.add_argument("--core", metavar="RUN", help="run or file to start from, in place of the one under --out")
parser.add_argument("--teacher", metavar="RUN", help="distill: the run or file that the student learns from; it starts "
                    "as that, or as another student of it, the --core")
parser.add_argument("--fresh", action="store_true", help="move the old run aside and start anew")
parser.add_argument("--plan", action="store_true", help="print what the stage would take, and train nothing:")
parser.add_argument("--devices", type=int, help="    on so many devices")
parser.add_argument("--kind", help="    of this kind: v100, a100-80g, h100 or h200")
parser.add_argument("--mfu", type=float, help="    at this share of their peak rate")
parser.add_argument("--json", metavar="FILE", help="    and write the numbers to a file")
args, flags = parser.parse_keys()                              # flags: [(key, text)]; --help need not wait for torch
args.core, args.teacher = (path and os.path.normpath(path) for path in (args.core, args.teacher))      # out/x/ is out/x

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from data import Batches, open_data
from eval import evaluate, report
from lib import checkpoint
from lib.conditions import count_columns, ranges_known
from lib.datasets import open_style
from lib.devices import enable_activation_checkpointing, in_half, loss_scaler, set_precision, spread
from lib.draws import normals, uniforms
from lib.encoders import open_autoencoder
from lib.files import file_hash
from lib.lineage import (RUN_FIRST, check_finished, check_fits, check_origins, check_settings, check_unchanged,
                         finish_first, latest_source)
from lib.muon import Muon
from lib.perceptual import open_vgg
from lib.pictures import draw_curves, make_grid, to_uint8, write_png
from lib.plan import (count_flops, peak_memory, peak_rate, plan_training, print_plan, sgemm_rate, split_batch,
                      state_bytes)
from lib.processes import (all_gather, all_gather_rows, all_reduce_max, catch_signals, exit_with, fail,
                           install_excepthook, join, print0, sync_gradients)
from lib.published import check_encoder, check_there, read_start, start_config
from lib.runs import (Log, check_room, first_fault, is_finished, lock_run, loss_figures, newest_about, prepare_run,
                      read_log, save_or_fail)
from lib.tables import DTYPES
from model import (build, check_sizes, checkpointed_modules, diffusion_loss, example, freeze_core, init_from,
                   read_checkpoint)
from objectives import cascade_loss, check_base, check_cascade, check_objective, critic_turns, distill_turns
from sample import is_student, sample

# A turn is one update within a step: of the model, called as net (compiled, under DDP), by its optimizers, at every how
# many steps, on so many noises, by which loss per image, loss(net, step, *batch). Plain training is a list of one;
# distribution matching and a critic add a second one.
Turn = namedtuple("Turn", "name model net trained optimizers ema_params scaler every noises loss")
# settings that weights depend on: of the core, and of the shell
CORE_KEYS = ("pipeline", "width", "depth", "heads", "mlp_ratio", "text_vocab", "encoder_id", "pixart_core")
SHELL_KEYS = ("shell", "channels", "residual_blocks", "entry_channels", "patch", "image_skip",
              "inner_resolution", "prediction", "low_resolution")
# parts of names: of the layers next to the image, of what time and caption add, of offsets
OUTSIDE = ("conv_in", "conv_out", "proj_out", "temb_proj", "table")
# what may change when a run goes on: how it is looked at and spread over devices, the steps and the learning rates
FREE_KEYS = ("steps", "lr", "muon_lr", "lr_end", "micro", "workers", "compile", "checkpointing", "fsdp", "sharded",
             "dist_timeout", "num_checkpoints", "guidance", "guidance_end", "sampler", "sample_steps", "log_every",
             "sample_every", "save_every", "snapshots", "eval_every", "eval_n", "tensorboard", "encoder_weights",
             "prefix", "suffix", "vgg", "discriminator_lr", "base", "augmentation_sample", "scene_exam")


# ---- the step: what is trained, by which optimizers, at which rates, on which noise ----------------------------------


def make_model(config, freeze):
    """The model with first weights; growing trains its shell, and of its core the time embedding alone."""
    model = build(config)                                      # with first weights (model.init_weights)
    if freeze:
        freeze_core(model)                                     # requires_grad is False under core., but for core.time.
    return model


def uses_muon(config, name, p):
    """
    Muon is for matrices inside the network, convolutions too (Jordan et al. 2024), and for those by which the noisy
    image joins later; AdamW has the first and last layer, text, time, modulation, and all vectors.
    """
    inside = name.startswith(("core.blocks.", "shell.")) and not any(part in name for part in OUTSIDE)
    return config["muon_lr"] > 0 and p.ndim == 2 and inside


def decays(name, p):
    """Weight decay belongs on matrices and convolutions, not on biases, norms, embeddings and tables."""
    return p.ndim > 1 and not any(part in name for part in ("embed", "position", "table"))


def make_optimizers(trained, config):
    """The optimizers of what is trained, {name: parameter}; each parameter has one of them."""
    matrices = [p for name, p in trained.items() if uses_muon(config, name, p)]    # of attention, MLP, convolutions
    others = {name: p for name, p in trained.items() if not uses_muon(config, name, p)}
    groups = [{"params": [p for name, p in others.items() if decays(name, p)], "weight_decay": config["weight_decay"]},
              {"params": [p for name, p in others.items() if not decays(name, p)], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=config["lr"], betas=(config["beta1"], config["beta2"]), fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=config["muon_lr"], weight_decay=config["weight_decay"]))
    return optimizers


def lr_factor(step, config):
    """Share of the peak learning rate: linear warm-up, then a cosine down to lr_end."""
    if step < config["warmup"]:
        return (step + 1) / config["warmup"]                   # never 0, so that the first step moves
    # of optimizer steps: a step that fp16 skips does not move it
    progress = (step - config["warmup"]) / max(1, config["steps"] - config["warmup"])
    return config["lr_end"] + (1 - config["lr_end"]) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(step, config):
    """Warmed up to a constant; or with ema_power a power function, whose window grows with the run (EDM2, eq. 127)."""
    if config["ema_power"]:
        return (1 - 1 / (step + 1)) ** (config["ema_power"] + 1)                   # 0 at first: the weights themselves
    return min(config["ema"], (1 + step) / (10 + step))        # 0.1, 0.18, 0.25 ...: first weights fade soon


def draw_noise(rows, shape, key, config, device):
    """
    t (b,) and eps (b, *shape) for these rows of a batch, a range. They depend on the key (stage, seed, data_step) and
    the row alone, so a run is the same on any number of devices, and resuming needs no state of a generator.
    """
    # stratified: one t in each of batch equal parts of [0, 1], with a common offset (VDM, Kingma et al. 2021, App. I.1)
    offset = float(uniforms(1, "times", *key)[0])              # the same on all devices
    t = (torch.arange(rows.start, rows.stop, device=device) + offset) / config["batch"]      # rises: clean to noisy
    return t, normals([("noise", *key, row) for row in rows], shape, device)


def micro_batches(batch, micro):
    """[batches of micro images] of a batch, a tuple of tensors (b, ...): slices of them, not copies."""
    return list(zip(*(part.split(micro) for part in batch)))


def forward_backward(turn, step, batch, micro, world, dtype, config):
    """
    Loss of each image, (b,), and its gradients, over micro-batches: they add up to those of the whole batch. batch is
    x (b, C, H, W), text (b, L) or (b, L, E), t (b,), eps (b, C, H, W), or (b, n, C, H, W) of n noises, two or none, and
    conditions (b, K).
    """
    losses, parts = [], micro_batches(batch, micro)
    for k, part in enumerate(parts):
        with sync_gradients(turn.net, last=k + 1 == len(parts)):                   # between processes, once
            loss = turn.loss(in_half(turn.net, dtype), step, *part)                # (micro,)
            # the exchange takes the mean over processes; fp16 scales small gradients up
            turn.scaler.scale(loss.sum() * world / config["batch"]).backward()
        losses.append(loss.detach())                           # without its graph, which holds all activations
    return torch.cat(losses)                                                                 # (b,)


def clip_gradients(turn, clip):
    """Unscale and clip the gradient, as a whole. -> its norm before that, the same in all processes."""
    for optimizer in turn.optimizers:
        turn.scaler.unscale_(optimizer)                        # so that the norm is that of the gradient itself
    norm = torch.nn.utils.clip_grad_norm_(turn.trained.values(), clip or math.inf) # float32
    return float(checkpoint.whole(norm))                       # under FSDP it lies in parts


def update(turn, step, config):
    """A step of the optimizers, then of the average. A frozen tensor has neither moments nor average."""
    for optimizer in turn.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * lr_factor(step, config)       # one schedule scales all peaks
        turn.scaler.step(optimizer)                            # float32 weights, whatever the products were
    if turn.ema_params:                                        # the fake network needs none
        # swa_utils' AveragedModel would copy frozen weights too, and cannot copy a model under FSDP
        average = get_ema_multi_avg_fn(ema_decay(step // turn.every, config))      # mean <- decay mean + (1 - decay) w
        average(list(turn.ema_params.values()), [p.detach() for p in turn.trained.values()], None)


# ---- settings: [DEFAULT], the config, the stage, then flags; later wins ----------------------------------------------
if args.stage not in STAGES:
    raise UserError(f"unknown stage {args.stage!r}: {closest(args.stage, STAGES)}")
stage = STAGES[args.stage]                                     # its row decides; a few keys go with one stage's name
config = load_config(args.config, args.stage, flags)           # {key: value}, every value checked
whole = stage.init_prefix == "" and not stage.freeze           # a pipeline is kept as a whole, with its own settings
if args.core and not stage.sources:
    raise UserError(f"--core says where to start, and {args.stage} starts from nothing: leave it out")
run = os.path.join(args.out, args.config, args.stage)
latest = latest_source(args.out, args.config, stage.sources, config["starts"])     # what it starts from, unless told
begun = not args.fresh and (newest_about(run) or {}).get("step", 0) > 0            # then it goes on by its own settings
start_path = run if begun and stage.sources else args.teacher or args.core or latest         # else by another run's
for named in filter(None, () if begun else (args.core, args.teacher)):
    check_there(named)                                         # before data are opened
start = read_start(start_path)
config = start_config(config, start_path, start, flags, whole)
if stage.init_prefix and start and not begun and start["stage"] not in stage.sources:
    raise UserError(f"{start_path} is a {start['stage']} run and {args.stage} takes the core of a {stage.sources[0]} "
                    "run: give one of these")
check_sizes(config)                                            # before any file is opened
distills, critics = check_objective(config, args.stage, args.teacher, dict(flags)) # of a student; with critics
wrong_stage = bool(config["style"]) != (args.stage == "style") and not distills
if wrong_stage or (config["style"] == "scenes" and config["data"] != "scenes"):
    raise UserError(f"--stage {args.stage}, data = {config['data']}, style = {config['style']!r}: give --style PATH, "
                    "or with scenes --style scenes, to --stage style and to its students alone")
if args.stage == "condition" and not config["conditions"]:
    raise UserError(f"--stage {args.stage}: of which numbers is the model to be told? --conditions objects,size")
cascades = check_cascade(config, args.stage)
plain_loss, noises = (cascade_loss, 2) if cascades else (diffusion_loss, 1)        # of so many noises
plan_flags = {flag: value for flag in ("devices", "kind", "mfu", "json") if (value := getattr(args, flag)) is not None}
if plan_flags and not args.plan:
    raise UserError(f"--{next(iter(plan_flags))} belongs to --plan: add it, or leave --{next(iter(plan_flags))} out")


def example_loss(model, images):
    """The loss of images that are zeros: to count with."""
    x, t, text = example(config, images)
    eps = x[:, None].expand(-1, noises, -1, -1, -1).squeeze(1) # (b, C, H, W), or (b, n, C, H, W)
    return plain_loss(model, x, text, t, eps, config, torch.zeros(images, count_columns(config))).sum()


def count_moments(name, p):
    """Tensors that its optimizer keeps of a parameter."""
    return 1 if uses_muon(config, name, p) else 2


if args.plan:
    if config["pipeline"]:
        raise UserError("--plan counts the models of this repository: leave --core and --teacher away, or give another "
                        "--out, and name a config of that size")
    json_file = plan_flags.pop("json", None)                   # the others are arguments of plan_training
    auto = torch.float16 if args.kind == "v100" else torch.bfloat16                # a V100 has no bfloat16
    plan = {"config": args.config, "stage": args.stage} | plan_training(
        lambda: make_model(config, stage.freeze), example_loss, config["steps"], config["batch"], config["micro"],
        dtype=DTYPES.get(config["dtype"], auto), tf32=config["tf32"], moments=count_moments,
        blocks=checkpointed_modules if config["checkpointing"] else None,
        units=lambda model: (model.shell, *model.core.blocks), **plan_flags)
    print(f"{args.stage} of config {args.config}" + ", without its teacher and fake network" * distills
          + ", without its critics" * critics + ":")
    print_plan(plan, json_file)
    sys.exit(0)

# ---- processes: one, or those that torchrun started ------------------------------------------------------------------
rank, world, device = join(config["dist_timeout"])             # 0, 1 and cpu or cuda:0 in one process
if config["fsdp"] and world == 1:
    raise UserError("fsdp = True in one process: start several with torchrun --standalone --nproc-per-node N train.py "
                    "..., or leave it out")
per_device_batch, micro = split_batch(config["batch"], config["micro"], world)
rows = range(rank * per_device_batch, (rank + 1) * per_device_batch)               # of the global batch, this process's
advice = {"memory": f"lower --micro (now {micro}), or switch on --checkpointing, --dtype bf16 or, on several devices, "
                    "--fsdp",
          "worker": f"lower --workers (now {config['workers']}) or free some memory; the same command goes on"}
install_excepthook(**advice)                                   # what ends this process is told in one line

# ---- data: looked at before anything is trained ----------------------------------------------------------------------
data = open_data(config)                                       # scenes, an index, a folder or a tar
styled = open_style(config) if config["style"] else None       # a second set, mixed in
batches = Batches(data, config, stage.large_only, args.stage, rank, world, styled)
config |= batches.identity                                     # which data, which encoder: compared when a run goes on
check_encoder(config, start)                                   # of a pipeline
vgg, config["vgg_id"] = open_vgg(config["vgg"], device) if config["perceptual"] else (None, "")
example_caption = next(filter(None, map(data.caption, range(len(data)))), "")

# ---- the run: finished, to go on, or new, from nothing or from another one -------------------------------------------
file = os.path.join(run, "last.pt")                            # the newest checkpoint
sample_command = f"python sample.py {run} {shlex.quote(example_caption)}"
about = {"name": args.config, "stage": args.stage, "config": config, "parents": []}
lock = lock_run(run) if rank == 0 else None                    # before anything in it is looked at or moved
all_reduce_max(0)                                              # a barrier
saved, saved_file = (None, None) if args.fresh else checkpoint.newest_checkpoint(run, default_config())
scored = not config["eval_n"] or os.path.exists(os.path.join(run, "metrics.json"))
done = saved is not None and saved["step"] >= config["steps"] and scored           # it needs no base or teacher now
parent = None                                                  # the run that this one starts from
if cascades:                                                   # the base is named, not copied
    usual = os.path.normpath(os.path.join(args.out, args.config, "pretrain"))
    config["base"] = os.path.normpath(config["base"] or (saved["config"]["base"] if saved else usual))
    if config["base"] == usual and not saved:
        ours = "base", "resolution", "shell", "low_resolution", "augmentation", "augmentation_sample"
        finish_first(usual, flags, ours)
    config["base_id"] = saved["config"]["base_id"] if done else check_base(config)
if saved:
    config |= {"condition_ranges": ranges_known(config, saved["config"])}
    learned = {"guidance", "guidance_end", "sample_steps"}     # what a student has learned with
    free = set(FREE_KEYS) - (learned if distills else set())
    if (saved["config"]["muon_lr"] > 0) != (config["muon_lr"] > 0):                # other moments than are saved
        free -= {"muon_lr"}
    changes = check_settings(run, saved, about, free)          # refuses another run's
    check_origins(run, saved, args.core, args.teacher)
    if distills and not done:
        check_unchanged(*saved["teacher"], "the teacher of this run", "start anew with --fresh")
    about |= {key: saved[key] for key in ("parents", "teacher") if key in saved}   # parents: all runs before this one
    if done:
        print0(f"{run} is finished: {saved['step']} steps. Look at it: {sample_command}")
        exit_with(0)
    print0(f"{run}: going on at step {saved['step']} of {config['steps']}{changes}")
elif stage.sources:                                            # new, from another run
    if distills:                                               # its flags are not its teacher's, so it trains none
        if not (teacher := args.teacher or args.core or is_finished(latest) and latest):
            raise UserError(f"no finished run to learn from: train {latest} first, or give --teacher RUN")
        args.core = args.core or teacher                       # a student starts as its teacher, or as another student
    parent = args.core or latest
    if not args.core:
        # a new shell, or another config, has its own resolution and shell; all other flags are the same for both runs
        weak = latest == os.path.join(args.out, config["starts"])
        ours = ("resolution", "shell") if stage.init_prefix or weak else ()
        ours += ("conditions",) * (args.stage == "condition")  # which are taken up here
        finish_first(parent, flags, (*ours, "style", "style_token", "style_share"))
    origin = read_checkpoint(parent)
    keys = CORE_KEYS if stage.init_prefix else CORE_KEYS + SHELL_KEYS              # which must be the same
    if config["shell"] == "nested":                            # the old shell comes along
        keys += ("prediction",)
    others = {parent: origin}                                  # the runs that this one needs
    if distills:                                               # what is taught must be what is learned
        keys += ("resolution", "noise_base_resolution", "encoder", "data_id", "autoencoder", "style", "style_token",
                 "conditions")
        others[teacher] = origin if teacher == parent else read_checkpoint(teacher)
        if is_student(others[teacher]["config"]):
            raise UserError(f"{teacher} is a student itself: give --teacher the run that it learned from")
    for path, other in others.items():
        if other["stage"] == "published":                      # a pipeline, which learned from no data of ours
            other["config"] |= batches.identity
        snapshot = path == args.core and os.path.basename(path).startswith("step_")
        check_finished(path, other, f"name a snapshot, --core {path}/step_N.pt", snapshot)
        check_fits(path, other["config"], config, keys)
    config |= {"condition_ranges": ranges_known(config, origin["config"])}
    parent_weights, report_of_init = init_from(origin, config, stage.init_prefix)
    about["parents"] = [*origin["parents"], f"{parent} ({origin['stage']}, step {origin['step']})"]
    if distills:                                               # named, not copied
        newest = checkpoint.newest_file(teacher)
        about["teacher"] = [newest, file_hash(newest)]
if rank == 0:
    lock = prepare_run(run, lock, args.fresh, f"{args.config}.{args.stage}", config)
settings = f"{args.stage} of config {args.config}: " + " ".join(f"{key}={value}" for key, value in config.items())
print0(textwrap.fill(settings, 120, subsequent_indent="    "))
print0(f"batch {config['batch']} = {micro} micro x {per_device_batch // micro} accumulated x {world} "
       f"device{'s' * (world > 1)}")
print0(batches.summary())                                      # how many images are used, and why not all

# ---- precision: of products and convolutions; weights, moments, EMA and sums of norms stay float32 -------------------
dtype = set_precision(config, device)
scaler = loss_scaler(dtype, device)

# ---- model: first weights, or a new shell round the old core; freeze; wrap -------------------------------------------
torch.manual_seed(config["seed"])                              # for first weights alone: all else draws from keys
model = make_model(config, stage.freeze)                       # first: wrappers and optimizers look at requires_grad
if parent:
    model.load_state_dict({**model.state_dict(), **parent_weights})                # the rest stays as it was drawn
    print0(f"from {parent}: {report_of_init}")                 # how many tensors were kept, how many are new


def prepare(model):
    """Put a model on the device, in shards under FSDP. -> the network that training calls, with the same weights."""
    if config["checkpointing"]:
        enable_activation_checkpointing(checkpointed_modules(model))               # less memory, a third more time
    cut = config["fsdp"]                                       # before the optimizers, which must see the shards
    units = (*model.core.blocks, model.core, model) if cut else ()
    entries = [(model.core, "embed")] if cut else []           # called from outside the core's forward
    return spread(model, device, config["compile"], units, entries, reshard=distills)


def second_turn(name, model, **keys):
    """The turn of a network beside the model, in every step, with settings of its own; its loss is still to be told."""
    net, trained = prepare(model), dict(model.named_parameters())
    optimizers = make_optimizers(trained, config | keys)
    return Turn(name, model, net, trained, optimizers, {}, loss_scaler(dtype, device), 1, 1, None)


net = prepare(model)
autoencoder = open_autoencoder(config, device)                 # the identity for pixels
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}     # what a step changes
optimizers = make_optimizers(trained, config)                  # AdamW, and Muon
ema_params = {name: p.detach().clone() for name, p in trained.items()}             # their average, in float32
groups = model.core.parameters(), model.shell.parameters(), trained.values()
counts = ["{:,}".format(sum(p.numel() for p in group)) for group in groups]
turns = [Turn("", model, net, trained, optimizers, ema_params, scaler, 1, noises,
              lambda net, step, x, text, t, eps, numbers: plain_loss(net, x, text, t, eps, config, numbers))]
if distills:
    half = functools.partial(in_half, dtype=dtype)
    turns = distill_turns(turns[0], about["teacher"][0], config, device, half, second_turn)
elif critics:
    turns = critic_turns(turns[0], vgg, autoencoder, config, second_turn)
    print0(f"perceptual term: {config['vgg_id'] or 'none'}; adversarial term: {config['adversarial']:g}")
print0(f"model: {counts[0]} parameters in the core, {counts[1]} in the {config['shell']} shell, {counts[2]} trained, "
       f"on {device} in {str(dtype).split('.')[1]}")

# ---- where the run stands --------------------------------------------------------------------------------------------
step, data_step = 0, 0                                         # optimizer steps; batches, those of skipped steps too
counted = {turn.name: 0 for turn in turns}                     # updates of each: not all are due in every step


def training_state():
    """{part: {name: tensor}} of all turns; a second network's parts are named after it, as in fake_model."""
    return {f"{turn.name}_{part}".lstrip("_"): tensors for turn in turns for part, tensors in
            checkpoint.training_state(turn.model, turn.ema_params, turn.optimizers).items()}


if saved:
    step, data_step = saved["step"], saved["data_step"]
    for turn in turns:
        updates, scaler_state = saved["turns"][turn.name]
        checkpoint.make_moments(turn.model, turn.optimizers, updates)              # tensors to copy into
        turn.scaler.load_state_dict(scaler_state)
        counted[turn.name] = updates
    checkpoint.restore(saved, saved_file, training_state())
    saved = None                                               # its memory
if rank == 0:
    sizes = [state_bytes(turn.model, count_moments) for turn in turns]
    checkpoint_size = sum(size[part] for size in sizes for part in ("weights", "optimizer", "ema"))
    check_room(run, (config["num_checkpoints"] + 1 + sum(k > 0 for k in config["snapshots"])) * checkpoint_size)
# on shapes alone: under the counter a real step would take attention apart into products, in other rounding
uncounted = distills or critics or config["pipeline"]
flops = 0 if uncounted else config["batch"] * count_flops(lambda: make_model(config, stage.freeze), example_loss)
peak = peak_rate(torch.cuda.get_device_name(), dtype, config["tf32"]) if device != "cpu" else None         # FLOP/s
first, bad, skipped = step, dict.fromkeys(counted, 0), 0       # bad: updates in a row that were not finite
log = Log(run, config["tensorboard"]) if rank == 0 else None   # log(dict)
signals = catch_signals()                                      # heard after a step, and between the steps of a sampler


def save(step, data_step):
    """All state, replaced as a whole."""
    state = {turn.name: (counted[turn.name], turn.scaler.state_dict()) for turn in turns}
    save_or_fail(file, about | {"step": step, "data_step": data_step, "turns": state}, training_state(),
                 config["sharded"], config["num_checkpoints"], config["snapshots"])


def poll():
    """Between a sampler's steps: a signal that came to any process ends a preview or score at once, in all of them."""
    if all_reduce_max(len(signals)):
        raise InterruptedError


def preview(step):
    """samples/step_N.png: the same captions and noise every time, plain weights above, EMA weights below."""
    held_out = data.held_out()
    captions = [held_out.caption(i % len(held_out)) for i in range(8)]             # a row of the grid
    # half a row, then the same captions in the style: of embedded ones only the data's own are known
    if styled and (config["encoder_weights"] or not batches.embeddings):
        captions[4:] = [styled.prefix + caption for caption in captions[:4]]
    images = [sample(model, config, captions, poll=poll)]      # (8, 3, H, W)
    with checkpoint.ema_weights_in_place(model, trained, ema_params):
        images.append(sample(model, config, captions, poll=poll))
    if rank == 0:
        write_png(os.path.join(run, "samples", f"step_{step}.png"), make_grid(to_uint8(torch.cat(images)), columns=8))


def score(step):
    """Metrics of the EMA weights for the captions of held_out_task: a dict, the same in all processes."""
    # at high resolution it takes longer than many steps of training
    print0(f"scoring {config['eval_n']} images of {config['sample_steps']} steps each"
           + ", and as many for diversity" * (config["data"] == "scenes") + ": --eval_n 0 leaves this out")
    with checkpoint.ema_weights_in_place(model, trained, ema_params):
        result = evaluate(model, config, config["eval_n"], poll=poll)
    if rank == 0:
        log({"step": step, "score": result}, report(result))
    return result


def describe_fault(turn, losses, data_step, batch):
    """What made an update not finite, and where: samples of the batch by number, and the first module."""
    bad_rows = [row for row, loss in enumerate(all_gather_rows(losses)) if not math.isfinite(loss)]
    if dtype == torch.float16 and not bad_rows and turn.scaler.get_scale() > 1:
        return f"gradient overflowed at scale {turn.scaler.get_scale():g}", ""
    samples = [batches.sources(data_step)[row][2] for row in bad_rows]             # numbers of images
    fault = first_fault(turn.model, lambda: [turn.loss(in_half(turn.model, dtype), step, *part)
                                             for part in micro_batches(batch, micro)])
    modules = [name for name in all_gather(fault) if name]     # of each process
    return "gradient is not finite", (f"; loss of samples {samples or 'finite for all'}; "
                                      f"first module {modules[0] if modules else 'none: only the backward overflowed'}")


def describe_step(step, skipped, losses, seconds, waited, norms):
    """A line of the log, {key: number}: losses since the last one, rates, seconds, memory (GiB), time to the end."""
    spent, middle = sum(seconds) / len(seconds), sorted(seconds)[len(seconds) // 2]          # mean, median
    line = {"step": step, **loss_figures(losses), "lr": config["lr"] * lr_factor(step - 1, config),
            **{f"norm_{name}".rstrip("_"): round(norm, 3) for name, norm in norms.items()}, "skipped": skipped,
            "img_s": round(config["batch"] / spent, 1), "data_ms": round(1000 * waited / len(seconds), 1),
            "gib": round(peak_memory(device) / 2 ** 30, 2)}
    if peak and flops:                                         # per step, where they are counted
        line["mfu"] = round(flops / spent / world / peak, 3)   # model FLOPs utilisation
    elif device == "cpu" and flops and step - first <= config["log_every"]:        # once: of what this machine can do
        line["efficiency"] = round(flops / world / middle / sgemm_rate(), 2)
        print0(f"{flops / 1e9:.1f} GFLOP a step in {1000 * middle:.0f} ms: {line['efficiency']} of a 1024 sgemm's rate")
    return line | {"eta_s": round((config["steps"] - step) * spent)}


if step == 0:
    save(0, 0)                                                 # a folder that cannot be written is found out now

# ---- the loop --------------------------------------------------------------------------------------------------------
losses, seconds, waited, norms = {name: [] for name in counted}, [], 0.0, {}     # since the last log line
loader = iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(data_step, sys.maxsize),
                                          num_workers=config["workers"],
                                          multiprocessing_context="fork" if config["workers"] else None))
install_excepthook(**advice, workers=getattr(loader, "_workers", ()))
bar = tqdm(desc=args.stage, initial=step, total=config["steps"], disable=None if rank == 0 else True)
while step < config["steps"]:
    tick = time.perf_counter()
    x, text, conditions = (part.to(device, non_blocking=True) for part in next(loader))
    waited += time.perf_counter() - tick                       # for data; near 0 with enough workers
    x = x if batches.latents else autoencoder.encode(x)        # (b, C, H, W)
    moved = True
    for turn in turns:
        if step % turn.every:                                  # not due
            continue
        shape = (turn.noises,) * (turn.noises != 1) + x.shape[1:]                  # (C, H, W), or (n, C, H, W)
        t, eps = draw_noise(rows, shape, (args.stage, config["seed"], data_step, *turn.name.split()), config, device)
        batch = x, text, t, eps, conditions                    # all of this process's rows
        loss = forward_backward(turn, step, batch, micro, world, dtype, config)    # (b,)
        norm = norms[turn.name] = clip_gradients(turn, config["clip"])             # of the whole gradient

        # an update that is not finite moves nothing of its turn, and the step does not count; 20 in a row end the run
        if math.isfinite(norm):
            update(turn, step, config)
            counted[turn.name], bad[turn.name] = counted[turn.name] + 1, 0
            losses[turn.name].append(loss)
        else:
            moved, bad[turn.name], skipped = False, bad[turn.name] + 1, skipped + 1
            what, where = describe_fault(turn, loss, data_step, batch)
            print0(f"step {step}{turn.name and ' of '}{turn.name}: {what}, skipped ({bad[turn.name]} in a row){where}")
            if bad[turn.name] == 20:
                remedy = "--dtype bf16 or a lower --lr" if dtype == torch.float16 else "a lower --lr"
                fail(f"20 steps in a row were not finite: start anew with {remedy} and --fresh; {file} holds the last "
                     "good state", 3)
        turn.scaler.update()                                   # halves after an overflow, doubles after 2000 good steps
        turn.model.zero_grad()                                 # to None: no memory between steps
    step += moved                                              # the schedule goes by steps whose turns all moved
    bar.update(moved)
    data_step += 1                                             # the next batch, also after a step that moved nothing
    seconds.append(time.perf_counter() - tick)

    # log, look, save, stop
    due = {key for key in config if key.endswith("_every") and moved and config[key] and step % config[key] == 0}
    last = moved and step == config["steps"]                   # of the run
    if "log_every" in due or last:
        line = describe_step(step, skipped, losses, seconds, waited, norms)
        losses, seconds, waited = {name: [] for name in counted}, [], 0.0          # anew for the next line
        if rank == 0:
            log(line)
    try:
        if "sample_every" in due or last and config["sample_every"]:
            preview(step)
        if "eval_every" in due and config["eval_n"] and not last:                  # the last score follows the loop
            score(step)
    except InterruptedError:                                   # a signal: save first
        pass
    stopped = int(all_reduce_max(signals[0] if signals else 0))                    # one signal stops all at this step
    if "save_every" in due or last or stopped or moved and step in config["snapshots"]:
        save(step, data_step)
    if stopped and not last:
        bar.close()
        print0(f"stopped at step {step} and saved {file}: the same command goes on from here")
        exit_with(128 + stopped)
bar.close()

# ---- the score, and what comes next ----------------------------------------------------------------------------------
result = None                                                  # without a score
try:
    if config["eval_n"]:
        result = score(step)
except InterruptedError:                                       # all is saved
    print0(f"stopped before the score of step {step}: the same command comes back to it")
    exit_with(128 + int(all_reduce_max(signals[0] if signals else 0)))
if rank == 0 and result:
    with open(os.path.join(run, "metrics.json"), "w") as f:
        settings = {key: config[key] for key in ("guidance", "guidance_end", "sampler", "sample_steps", "scene_exam")}
        settings |= {"guidance": 1.0, "guidance_end": 0.0} if distills else {}     # the teacher's is inside
        json.dump({"run": run, "step": step, "n": config["eval_n"], **settings, "metrics": result}, f)
if rank == 0:
    draw_curves(read_log(run), os.path.join(run, "curve.png"))                     # of all sessions
print0(f"{run} is finished after {step} steps")
if not os.environ.get(RUN_FIRST):                              # the run that started this one goes on by itself
    follows = next((name for name, row in STAGES.items() if row.sources[-1:] == (args.stage,)), None)
    ours = ("resolution", "shell") if follows and STAGES[follows].init_prefix else ()        # a new shell has its own
    words = {"config": args.config, "out": args.out, **{key: value for key, value in flags if key not in ours}}
    same = "".join(f" --{key} {shlex.quote(value)}" for key, value in words.items() if value != parser.get_default(key))
    grow = f"python train.py --stage {follows}{same}, or " if follows else ""
    print0(f"next: {grow}{sample_command}")
exit_with(0)
