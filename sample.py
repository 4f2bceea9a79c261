"""
From noise to image.

    python sample.py out/toy/grow "a large red circle left of a small blue square on a white background" --to grid.png
    python sample.py out/toy/grow "a caption" --guidance 3     stronger; --guidance_end 0: also where it is nearly done
    python sample.py out/toy/style "a caption" --style         in the style it learned; --prefix, --suffix add any words
    python sample.py out/toy/cascade "a caption"               its base draws first; --base RUN where that has moved
    python sample.py out/toy/grow --describe                   what the run is: stage, size, steps, data, parents
    python sample.py FOLDER "a caption" --size 1024x1024       a published pipeline: PixArt-Sigma, SDXL (GUIDE.md)

A run folder is all that is needed: the checkpoint holds its own settings. Image i of seed s starts from the same noise
at any batch size, and is the same up to rounding, on the same kind of device.

    sampler    evaluations per step   error      when to use it     (where guided, each costs twice as much)
    ddpm       1                      1/steps    at many steps: the paper takes 256 (Greedy Growing, Sec. 4)
    churn      1                      1/steps    renews noise CHURN times as fast as ddpm: cleaner, toy's own
    ddim       1                      1/steps    deterministic; 50 steps, a little below ddpm's 256
    dpm        1                      1/steps^2  DPM-Solver++(2M): deterministic, 20 steps (PixArt-Sigma, Table 4)
    exp_heun   2                      1/steps^2  deterministic, needs no memory of the step before; to check the others
    lcm        1                      -          new noise at every level; for students of --stage distill, 1 to 4 steps

Every sampler is a function (denoise, z, logsnrs, noise_sampler) -> x, with denoise(z, logsnr) -> x, the levels
logsnrs (steps,) from noise to image, and noise_sampler(step) -> noise like z. x is the clean image that the network
predicts, z the noisy one.
"""
import functools
import math
import os
import re

from lib.settings import Parser, UserError, check_range, words_of

parser = Parser(__doc__, keys=("guidance_end", "encoder_weights", "prefix", "suffix", "base",
                                "augmentation_sample"))
parser.add_argument("run", help="run folder, such as out/toy/grow")
parser.add_argument("captions", nargs="*", help="one or more captions in quotes; '' is the null caption")
parser.add_argument("--n", type=int, default=4, help="images per caption; default 4")
parser.add_argument("--steps", type=int, help="default 256 of ddpm, as in the paper; else the run's own")
parser.add_argument("--guidance", type=float, help="default: the run's own; 1 is none")
parser.add_argument("--sampler", choices=words_of("sampler"), help="default: the run's own")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--style", action="store_true", help="in the style of a run of --stage style")
parser.add_argument("--batch", type=int, help="images at a time, 16 on a CPU; does not change the images")
parser.add_argument("--size", help="HxW in pixels: another shape of about the area that the run was trained at")
parser.add_argument("--set", help="numbers of conditions that the run knows, such as size=0.4,objects=2")
parser.add_argument("--to", default="grid.png", help="PNG file, default grid.png; numbered where it exists")
parser.add_argument("--dtype", choices=["bf16", "fp16"], help="of products, half as exact and faster; default fp32")
parser.add_argument("--describe", action="store_true", help="print what the run is, and stop")
parser.add_argument("--export", metavar="FOLDER", help="write its EMA weights there as safetensors, and stop")
parser.answer(__name__)                                        # --help need not wait for what is imported next

import torch
from tqdm import tqdm

from data import encode_captions
from lib.checkpoint import newest_file
from lib.conditions import check_cascade_keys, check_levels, condition_row, parse_set, seeing, untold
from lib.devices import in_dtype
from lib.draws import normals
from lib.encoders import open_autoencoder
from lib.files import free_name
from lib.lineage import check_unchanged
from lib.pictures import make_grid, to_uint8, write_png
from lib.processes import prepare_cpu
from lib.published import OURS, describe_published, export, home
from lib.tasks import in_style, worded
from model import alpha_sigma, get_logsnr, image_shape, load, read_checkpoint, token_grid, token_size

# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def stochastic(denoise, z, logsnrs, noise_sampler, churn):
    """
    Over rising levels with fresh noise, which mends what the steps before did wrong; exact for a constant x. A step
    keeps k^churn of the variance of z's noise, k = e^(logsnr - logsnr_next), and draws the rest anew: the SDE of Karras
    et al. 2022, eq. 6, with beta = churn sigma' / sigma (their sigma is our sigma / alpha). 0 keeps all (DDIM, Song et
    al. 2021, eta = 0); 1 samples the posterior q(z_next | z, x) (DDPM, Ho et al. 2020); inf keeps none (consistency
    models, Song et al. 2023).
    """
    for step, (logsnr, logsnr_next) in enumerate(zip(logsnrs[:-1], logsnrs[1:])):
        x = denoise(z, logsnr)                                                     # (B, C, H, W)
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(logsnr), alpha_sigma(logsnr_next)  # (1, 1, 1, 1) each
        eps = (z - alpha * x) / sigma                                              # (B, C, H, W)
        if churn:
            kept = torch.exp(churn * (logsnr - logsnr_next))   # of the variance, k^churn
            eps = kept.sqrt() * eps + (1 - kept).sqrt() * noise_sampler(step + 1)  # number 0 is what z began as
        z = alpha_next * x + sigma_next * eps
    return denoise(z, logsnrs[-1])


def exponential_step(z, x, logsnr, logsnr_next):
    """The ODE of the image over a step, exact for constant x (DPM-Solver++, arXiv 2211.01095; lambda = logsnr / 2)."""
    (_, sigma), (alpha_next, sigma_next) = alpha_sigma(logsnr), alpha_sigma(logsnr_next)
    return sigma_next / sigma * z - alpha_next * torch.expm1(-(logsnr_next - logsnr) / 2) * x


def dpm(denoise, z, logsnrs, noise_sampler):
    """
    DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: x is taken as a line through this prediction and the previous
    one, extrapolated to the middle of the step. There is no line in the first step; and none is used in a final one
    more than twice as wide as that before it (ours are), where extrapolation would overshoot.
    """
    x_prev, h_prev = None, None                                # prediction and width of the previous step
    for step, (logsnr, logsnr_next) in enumerate(zip(logsnrs[:-1], logsnrs[1:])):
        x, h = denoise(z, logsnr), (logsnr_next - logsnr) / 2                      # (B, C, H, W), in lambda
        flat = x_prev is None or step == len(logsnrs) - 2 and h > 2 * h_prev
        x_middle = x if flat else x + h / (2 * h_prev) * (x - x_prev)
        z, x_prev, h_prev = exponential_step(z, x_middle, logsnr, logsnr_next), x, h
    return denoise(z, logsnrs[-1])


def exp_heun(denoise, z, logsnrs, noise_sampler):
    """
    Heun's method as an exponential integrator (ETD2RK, Cox and Matthews 2002): one step with this x, then again
    with a mean of this x and the one predicted at its end. On the plain ODE (Karras et al. 2022) few steps of our
    schedule explode; this bears wide ones.
    """
    for logsnr, logsnr_next in zip(logsnrs[:-1], logsnrs[1:]):
        x, h = denoise(z, logsnr), (logsnr_next - logsnr) / 2                      # (B, C, H, W), in lambda
        x_end = denoise(exponential_step(z, x, logsnr, logsnr_next), logsnr_next)  # (B, C, H, W)
        weight = -1 / torch.expm1(-h) - 1 / h                  # of x_end, were x a line in lambda: 1/2 to 1
        z = exponential_step(z, torch.lerp(x, x_end, weight), logsnr, logsnr_next)
    return denoise(z, logsnrs[-1])


CHURN = 3                                                      # more is softer, and noises make less different pictures
# name -> function, error of which order, evaluations of the network for so many steps; a new one: in [ranges] too
SAMPLERS = {"ddpm": (functools.partial(stochastic, churn=1), 1, lambda steps: steps),
            "ddim": (functools.partial(stochastic, churn=0), 1, lambda steps: steps),
            "dpm": (dpm, 2, lambda steps: steps), "exp_heun": (exp_heun, 2, lambda steps: 2 * steps - 1),
            "churn": (functools.partial(stochastic, churn=CHURN), 1, lambda steps: steps),
            "lcm": (functools.partial(stochastic, churn=math.inf), 1, lambda steps: steps)}


def get_logsnrs(config, steps, sampler, device="cpu"):
    """
    (steps,) levels from noise to image. First-order samplers take even steps in t, as in training. Of 20 such levels
    the last two lie 7 apart in logsnr, which would decide the error of a second-order sampler; levels even in logsnr,
    1.3 apart, are too sparse in the middle, where pictures take shape. Second-order samplers get the mean of both.
    A student knows the noisy ends of its segments alone, so the clean end t = 0 is no level of its own.
    """
    if is_student(config):
        ends = torch.arange(steps, 0, -1, device=device) / steps                   # 1 ... 1 / steps
        return get_logsnr(ends * (config["start_time"] if config["objective"] == "dmd" else 1), config)
    logsnrs = get_logsnr(torch.linspace(1, 0, steps, device=device), config)
    if SAMPLERS[sampler][1] == 2:                              # of second order
        even = logsnrs[0] + (logsnrs[-1] - logsnrs[0]) * torch.linspace(0, 1, steps, device=device)    # in logsnr
        logsnrs = (logsnrs + even) / 2
    return logsnrs


# ----------------------------------------------------------------------------------------------------------------------
# Guidance, and pictures of captions


def guided(model, text, guidance, conditions=None, limit=1.0, null_conditions=None, end=math.inf):
    """
    denoise(z, logsnr) -> x for these captions (B, L) or (B, L, E), with classifier-free guidance (Ho and Salimans
    2021): v = v_null + guidance (v_caption - v_null). 1 means no guidance, 0 no caption. Guidance above 1 is 1 from the
    logsnr `end` on (the lower end of Kynkaanniemi et al. 2024). The null caption is the one of training; with it
    null_conditions (B, K) take the place of conditions (B, K). x is clipped to [-limit, limit]: pixels have a limit,
    latents have none.
    """
    given = text, conditions
    null = torch.zeros_like(text), conditions if null_conditions is None else null_conditions          # padding alone
    both = [None if part is None else torch.cat([part, other]) for part, other in zip(given, null)]    # (2 B, ...)
    inputs = {1: given, 0: null}                               # of guidance 1 and 0; any other takes both in one pass
    end = end if guidance > 1 else math.inf

    def denoise(z, logsnr):                                    # one level for all images, or one for each
        over = end < math.inf and bool((logsnr >= end).all())  # half the cost
        captions, told = inputs.get(1 if over else guidance, both)                 # (B or 2 B, ...)
        copies = len(captions) // len(text)                                        # 1 or 2
        logsnrs = logsnr.expand(len(text)).repeat(copies)                          # (B or 2 B,)
        v = model(z.repeat(copies, 1, 1, 1), logsnrs, captions, told).float()      # (B or 2 B, C, H, W)
        if copies == 2:
            v_caption, v_null = v.chunk(2)                                         # (B, C, H, W)
            weight = torch.where(logsnr < end, guidance, 1).view(-1, 1, 1, 1)      # (1 or B, 1, 1, 1)
            v = v_null + weight * (v_caption - v_null)
        alpha, sigma = alpha_sigma(logsnr)                                         # (1 or B, 1, 1, 1)
        return (alpha * z - sigma * v).clamp(-limit, limit)                        # x from z and v
    return denoise


def end_of_guidance(config, order=1):
    """
    The logsnr from which on samples are not guided, a number. Samplers of second order are guided throughout: they
    count on an x that does not jump.
    """
    t = config["guidance_end"] if order == 1 else 0
    return get_logsnr(torch.tensor(t), config).item() if t else math.inf


def count_evaluations(config, sampler, steps, guidance):
    """Evaluations of the network for a picture: where it is guided there are two at a time."""
    end = end_of_guidance(config, SAMPLERS[sampler][1]) if guidance > 1 else math.inf
    guided_share = (get_logsnrs(config, steps, sampler) < end).float().mean().item()
    return round(SAMPLERS[sampler][2](steps) * (1 + guided_share * (guidance not in (0, 1))))


@torch.no_grad()
def sample(model, config, captions, seed=0, first=0, steps=None, guidance=None, sampler=None, batch=None, bar=False,
           poll=None, size=None, numbers={}, watch=None, low=None):
    """
    One image per caption, x (B, 3, H, W) in [-1, 1] on the CPU; latents are decoded. Image i draws from (seed,
    first + i, step) alone, so it does not depend on `batch`. `steps`, `guidance`, `sampler` and `size` (height,
    width in pixels) default to the config's. `numbers` {name: number, or one for each caption} are told to the model,
    size_and_crop is filled in, all other conditions are absent. `poll`, if given, is called at every evaluation and may
    raise, `watch` after it with z and x (b, C, H, W). A cascade's base draws `low` first, small pictures (B, 3, h, w),
    by its own steps and guidance, unless they are given.
    """
    steps, sampler = steps or config["sample_steps"], sampler or config["sampler"]
    guidance = 1 if is_student(config) else config["guidance"] if guidance is None else guidance
    height, width = size or [config["resolution"]] * 2
    device = next(model.parameters()).device
    batch = batch or (16 if device.type == "cpu" else 64)      # the caches of a CPU hold no more
    autoencoder, (channels, side, _) = open_autoencoder(config, device), image_shape(config)
    shape = channels, height * side // config["resolution"], width * side // config["resolution"]  # of z
    uncropped = height, width, 0, 0, height, width
    numbers = {name: torch.as_tensor(number).expand(len(captions)).tolist() for name, number in numbers.items()}
    conditions = torch.tensor([condition_row(config, uncropped, lambda name: numbers[name][i] if name in numbers else
                                             math.nan) for i in range(len(captions))], device=device)      # (B, K)
    if config["low_resolution"] and low is None:
        low = draw_low(config, device, captions, seed, first, batch=batch, bar=bar, poll=poll, size=(height, width),
                       numbers=numbers)
    limit = math.inf if config["autoencoder"] else 1.0         # of x
    text = encode_captions(worded(captions, config), config).to(device)            # (B, L) or (B, L, E)
    logsnrs = get_logsnrs(config, steps, sampler, device)                          # (steps,)
    run_sampler, order, evaluations = SAMPLERS[sampler]
    purpose = "sampling" if low is None else f"sampling above {config['low_resolution']}"    # not the base's noise
    total = math.ceil(len(captions) / batch) * evaluations(steps)                  # evaluations
    images, progress = [], tqdm(total=total, desc="sampling", leave=False, disable=None if bar else True)
    for start in range(0, len(captions), batch):
        rows = range(start, min(start + batch, len(captions)))                     # b captions
        told = conditions[rows.start:rows.stop]                # (b, K)
        net = model if low is None else seeing(model, config, low[start:rows.stop], seed, first + start, shape)
        denoise = guided(net, text[rows.start:rows.stop], guidance, told, limit, untold(config, told),
                         end_of_guidance(config, order))

        def noise_sampler(step):
            return normals([(purpose, seed, first + i, step) for i in rows], shape, device)        # (b, C, H, W)

        def denoise_and_report(z, logsnr):
            if poll:
                poll()
            progress.update()
            x = denoise(z, logsnr)                                                 # (b, C, H, W)
            if watch:
                watch(z, x)
            return x
        z = run_sampler(denoise_and_report, noise_sampler(0), logsnrs, noise_sampler)
        images.append(autoencoder.decode(z).cpu())             # (b, 3, H, W): lib/encoders.py; pixels as they are
    progress.close()
    return torch.cat(images)


# ----------------------------------------------------------------------------------------------------------------------
# Cascades (--stage cascade): the picture of a smaller model, the base, lies beside z


def draw_low(config, device, captions, *args, size, **options):
    """The base's pictures of the same captions, (n, 3, h, w), for pictures of this size; the rest is as in `sample`."""
    check_levels(config)
    base, its = open_base(config["base"], config["base_id"], device)
    keys = "prefix", "suffix"
    if config["encoder_weights"] and config["encoder"] == its["encoder"]:          # else it has weights of its own
        keys += ("encoder_weights",)
    its = its | {key: config[key] for key in keys}
    height, width = (side * config["low_resolution"] // config["resolution"] for side in size)
    return sample(base, its, captions, *args, size=parse_size(f"{height}x{width}", its), **options)


@functools.lru_cache(2)                                        # pictures come in many calls
def open_base(path, digest, device):
    """(model, config) of a cascade's base. UserError unless it has the weights that it had in training."""
    check_unchanged(newest_file(path), digest, "the base of this cascade", "say where it lies: --base RUN")
    return load(path, device)


# ----------------------------------------------------------------------------------------------------------------------
# Students of few steps (--stage distill; what they learn: objectives.py)


def is_student(config):                                        # a run of --stage distill: guidance is inside it
    return config["objective"] != "diffusion"


STUDENTS = {                                                   # objective -> samplers; can it take n steps? In words
    "consistency": (("ddim", "ddpm", "churn", "lcm"),
                    lambda c, n: n == c["sample_steps"] and c["teacher_steps"] % n == 0,
                    "as many steps as it was trained for, a divisor of teacher_steps"),
    "lcm": (("lcm",), lambda c, n: c["teacher_steps"] % n == 0 and not c["teacher_steps_end"],
            "a divisor of teacher_steps, and wants teacher_steps_end = 0"),
    "dmd": (("lcm",), lambda c, n: n == 1, "1 step alone")}


def check_student(config, steps=None, guidance=None, sampler=None):
    """UserError where a student's keys, or flags that were given, ask for what it is not trained for."""
    if not is_student(config):
        return
    samplers, fits, words = STUDENTS[config["objective"]]
    steps = steps or config["sample_steps"]
    if guidance is not None:
        raise UserError("--guidance is inside this student, which learned from its guided teacher: leave it out, and "
                        "--guidance_end too")
    if sampler not in (None, *samplers):
        raise UserError(f"--sampler {sampler}: a student of {config['objective']} takes {' or '.join(samplers)}")
    if not fits(config, steps):
        raise UserError(f"{steps} steps: with sample_steps = {config['sample_steps']} and teacher_steps = "
                        f"{config['teacher_steps']} a student of {config['objective']} takes {words}")


# ----------------------------------------------------------------------------------------------------------------------
# python sample.py


def parse_size(text, config):
    """
    (height, width) of --size HxW, in pixels. A model makes any shape of about the area that it was trained at: both
    sides hold whole tokens (of the merged grid), and the area is within a factor of 1.5.
    """
    side, unit = config["resolution"], token_size(config) * max(1, config["kv_merge"])
    if text is None:
        return side, side
    match = re.fullmatch(r"(\d+)x(\d+)", text)                 # height first, as everywhere
    height, width = map(int, match.groups()) if match else (0, 0)
    if not match or height % unit or width % unit or not 1 / 1.5 <= height * width / side ** 2 <= 1.5:
        tall = max(1, round(1.5 ** 0.5 * side / unit)) * unit                      # one size that would do
        wide = max(1, round(side * side / tall / unit)) * unit
        raise UserError(f"--size {text}: this run makes {side}x{side}, or sides that are multiples of {unit} with "
                        f"about that area, such as {tall}x{wide}" + (not config["pipeline"]) *
                        "; for another size grow its core into another --out (train.py --help)")
    return height, width


def describe_run(path):
    """What a checkpoint is, as lines of text."""
    state = read_checkpoint(path)
    c, counts = state["config"], {"core": 0, "shell": 0}
    if state["stage"] == c["shell"] == "published":            # a pipeline, untouched
        return describe_published(state)
    for name, value in state["model"].items():
        counts[name.partition(".")[0]] += value.numel()
    blocks = f"{c['depth']} blocks of width {c['width']}" if not c["pipeline"] else f"the network of {c['pipeline']}"
    lines = [f"{state['stage']} of config {state['name']}, {c['resolution']} px, step {state['step']} of {c['steps']}",
             f"core   {counts['core']:>12,} parameters: {blocks}, grid {token_grid(c)} x {token_grid(c)}",
             f"shell  {counts['shell']:>12,} parameters: {c['shell']}"]
    lines += [f"data   {c['data']}, batch {c['batch']}, seed {c['seed']}"] if c["data"] else []
    lines += [f"needs  {home(c)}, for its encoders and its autoencoder"] if home(c) else []
    lines += [f"told   {c['condition_ranges']} (numbers for --set)"] if c["condition_ranges"] else []
    lines += [f"parent {parent}" for parent in state["parents"]]
    lines += [f"base   {c['base']} ({c['low_resolution']} px), sha256 {c['base_id']}"] if c["base_id"] else []
    others = OURS if c["pipeline"] else ()                     # keys that are not of its network
    return "\n".join(lines + ["config " + " ".join(f"{k}={v}" for k, v in c.items() if k not in others)])


def parse():
    """The command line. What cannot be meant is refused here, before anything is opened."""
    args, keys = parser.parse_values()
    if not (args.describe or args.export or args.captions):
        raise UserError('no caption: python sample.py RUN "a large red circle on a white background"')
    if args.n < 1 or any(value is not None and value < 1 for value in (args.steps, args.batch)):
        raise UserError("--n, --steps and --batch count things: give at least 1")
    if args.guidance is not None:
        check_range("guidance", args.guidance)
    if not args.to.lower().endswith(".png"):
        raise UserError(f"--to {args.to}: pictures are written as PNG: give a name that ends in .png")
    if not os.path.isdir(os.path.dirname(args.to) or "."):
        raise UserError(f"no folder for {args.to!r}: make it first")
    return args, keys                                          # keys: encoder_weights, prefix, suffix ...


def open_run(run, keys, args, device):
    """(model, config) of a run, with the keys {key: value} of a command line, and its --style, --dtype and checks."""
    model, config = load(run, device)
    check_cascade_keys(config, keys)
    config |= keys                                             # in place: a published network has this very dict
    in_dtype(model, config, args.dtype)
    guidance = keys.get("guidance_end") if args.guidance is None else args.guidance
    check_student(config, args.steps, guidance, args.sampler)
    return model, in_style(config) if args.style else config


def main():
    args, keys = parse()
    if args.describe:
        print(describe_run(args.run))
    if args.export:
        print(export(read_checkpoint(args.run), args.export))
    if args.describe or args.export:
        return
    prepare_cpu()
    model, config = open_run(args.run, keys, args, "cuda" if torch.cuda.is_available() else "cpu")
    if not is_student(config) and (args.sampler or config["sampler"]) == "ddpm":   # the others have steps of their own
        args.steps = args.steps or 256
    size, numbers = parse_size(args.size, config), parse_set(args.set, config)
    captions = [caption for caption in args.captions for _ in range(args.n)]
    x = sample(model, config, captions, args.seed, steps=args.steps, guidance=args.guidance, sampler=args.sampler,
               batch=args.batch, bar=True, size=size, numbers=numbers)
    to, columns = free_name(args.to), args.n if len(args.captions) > 1 else min(args.n, 8)
    write_png(to, make_grid(to_uint8(x), columns))
    print(f"{to}: {len(x)} images of {size[0]}x{size[1]} px", *args.captions, sep="\n  ")


if __name__ == "__main__":
    main()
