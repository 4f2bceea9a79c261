"""
From noise to image.

    python sample.py out/toy/grow "a large red circle left of a small blue square on a white background" --n 8 --to grid.png
    python sample.py out/toy/grow --describe                  what the run is: stage, size, steps, data, parents

A run folder is all that is needed: the checkpoint holds its own settings. Image i of seed s is the same at any batch size.

    sampler   evaluations per step   error     when to use it        (guidance doubles the evaluations)
    ddpm      1                      1/steps   the paper's choice, 256 steps (Greedy Growing, Sec. 4); best at many steps
    ddim      1                      1/steps   deterministic; 50 steps are nearly as good
    dpm       1                      1/steps^2 DPM-Solver++(2M): deterministic, 20 steps (as the teacher in PixArt-Sigma's Table 4)
    heun      2                      1/steps^2 deterministic, needs no memory of the step before; to check the others

Every sampler is a function (denoise, z, logsnrs, draw) -> x, with denoise(z, logsnr) -> x and draw(step) -> noise like z.
"""
import argparse
import math
import os
import re

import torch
from tqdm import tqdm

from data import encode_captions, grid, open_autoencoder, to_uint8, write_png
from lib.draws import normals
from lib.files import free_name
from lib.settings import UserError
from model import alpha_sigma, image_shape, load, logsnr_at, read_checkpoint, token_grid, token_size


def ddpm(denoise, z, logsnrs, draw):
    """
    Ancestral sampling from the posterior q(z_s | z_t, x) (Ho et al. 2020), in logSNR l (Kingma et al. 2021, Appendix A):
    with k = e^(l_t - l_s), mean k (alpha_s / alpha_t) z_t + (1 - k) alpha_s x and variance (1 - k) sigma_s^2.
    """
    for step, (now, then) in enumerate(zip(logsnrs[:-1], logsnrs[1:])):
        x = denoise(z, now)                                                        # (B, C, H, W)
        (alpha, _), (alpha_then, sigma_then) = alpha_sigma(now), alpha_sigma(then)
        kept = torch.exp(now - then)                                               # share of the noisy image that stays
        mean = kept * alpha_then / alpha * z + (1 - kept) * alpha_then * x
        z = mean + sigma_then * (1 - kept).sqrt() * draw(step + 1)
    return denoise(z, logsnrs[-1])


def ddim(denoise, z, logsnrs, draw):
    """Deterministic: keep the noise that the network sees, at the next level (Song et al. 2021, eta = 0)."""
    for now, then in zip(logsnrs[:-1], logsnrs[1:]):
        x = denoise(z, now)                                                        # (B, C, H, W)
        (alpha, sigma), (alpha_then, sigma_then) = alpha_sigma(now), alpha_sigma(then)
        z = alpha_then * x + sigma_then * (z - alpha * x) / sigma
    return denoise(z, logsnrs[-1])


def dpm(denoise, z, logsnrs, draw):
    """
    DPM-Solver++(2M), Lu et al. 2022, Algorithm 2. With l = logsnr / 2 the ODE of the image is solved exactly but for x, which is
    drawn on along a line through this step's and the last one's. The first step and the last know no line: there x stays as it is.
    """
    before = None                                              # the step before: (its x, its width in l)
    for step, (now, then) in enumerate(zip(logsnrs[:-1], logsnrs[1:])):
        x = denoise(z, now)                                                        # (B, C, H, W)
        (_, sigma), (alpha_then, sigma_then) = alpha_sigma(now), alpha_sigma(then)
        h, drawn = (then - now) / 2, x
        if before and step < len(logsnrs) - 2:                 # the last step is wide, and a line would overshoot
            drawn = x + h / (2 * before[1]) * (x - before[0])
        z, before = sigma_then / sigma * z - alpha_then * torch.expm1(-h) * drawn, (x, h)
    return denoise(z, logsnrs[-1])


def heun(denoise, z, logsnrs, draw):
    """
    Heun's method: a step of DDIM, then again along the line from this x to the x there. As in DPM-Solver++ all but x is solved exactly
    (ETD2RK, Cox and Matthews 2002), which bears wide steps; on the plain ODE (Karras et al. 2022) few steps of our schedule explode.
    """
    for now, then in zip(logsnrs[:-1], logsnrs[1:]):
        (_, sigma), (alpha_then, sigma_then) = alpha_sigma(now), alpha_sigma(then)
        h, x = (then - now) / 2, denoise(z, now)                                   # (B, C, H, W)
        to = lambda x: sigma_then / sigma * z - alpha_then * torch.expm1(-h) * x
        z = to(torch.lerp(x, denoise(to(x), then), -1 / torch.expm1(-h) - 1 / h))  # the weight is 1/2 for small steps, 1 for wide ones
    return denoise(z, logsnrs[-1])


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm": dpm, "heun": heun}


def levels(config, steps, sampler, device="cpu"):
    """
    (steps,) logsnrs from noise to image. Even steps in t, as in training, end in one so wide that it decides the error of the second-order
    samplers, and even steps in logsnr are too wide in the middle: these take the mean of both.
    """
    logsnrs = logsnr_at(torch.linspace(1, 0, steps, device=device), config)
    if sampler in ("dpm", "heun"):
        logsnrs = (logsnrs + logsnrs[0] + (logsnrs[-1] - logsnrs[0]) * torch.linspace(0, 1, steps, device=device)) / 2
    return logsnrs


def guided(model, text, guidance, size=None, limit=1.0):
    """
    denoise(z, logsnr) -> x for these captions (B, L) or (B, L, E), with classifier-free guidance on all channels (Ho and Salimans
    2021): v = v_null + guidance (v_caption - v_null). 1 means no guidance, 0 no caption. The null caption is the one of training.
    x is clipped to [-limit, limit]: pixels have one, latents have none.
    """
    batch = len(text)
    both = torch.cat([text, torch.zeros_like(text)]) if guidance not in (0, 1) else text * int(guidance)
    sizes = None if size is None else size.to(text.device).expand(len(both), 6)

    def denoise(z, logsnr):
        copies = len(both) // batch
        v = model(z.repeat(copies, 1, 1, 1), logsnr.expand(copies * batch), both, sizes)           # (B or 2 B, C, H, W)
        if copies == 2:
            v, null = v.chunk(2)
            v = null + guidance * (v - null)
        alpha, sigma = alpha_sigma(logsnr)
        return (alpha * z - sigma * v).clamp(-limit, limit)
    return denoise


@torch.no_grad()
def sample(model, config, captions, seed=0, first=0, steps=None, guidance=None, sampler=None, batch=64, bar=False,
           poll=lambda: None, size=None):
    """
    One image per caption, x (B, 3, H, W) in [-1, 1] on the CPU; latents are decoded. Image i draws from (seed, first + i, step) alone, so
    it does not depend on `batch`. `steps`, `guidance`, `sampler` and `size` (height, width in pixels) default to the config's.
    `poll` is called at every step and may raise.
    """
    sampler = config["sampler"] if sampler is None else sampler
    steps = config["sample_steps"] if steps is None else steps
    guidance = config["guidance"] if guidance is None else guidance
    height, width = size or [config["resolution"]] * 2
    device = next(model.parameters()).device
    autoencoder, (channels, side, _) = open_autoencoder(config, device), image_shape(config)
    shape = channels, height * side // config["resolution"], width * side // config["resolution"]  # of z
    whole = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)                # a picture that was not cropped
    logsnrs = levels(config, steps, sampler, device)
    text = encode_captions(captions, config).to(device)
    passes = math.ceil(len(captions) / batch) * (2 * steps - 1 if sampler == "heun" else steps)
    images, progress = [], tqdm(total=passes, desc="sampling", leave=False, disable=None if bar else True)
    for start in range(0, len(captions), batch):
        rows = range(start, min(start + batch, len(captions)))
        draw = lambda step: normals([("sampling", seed, first + i, step) for i in rows], shape, device)
        denoise = guided(model, text[rows.start:rows.stop], guidance, whole, math.inf if config["autoencoder"] else 1.0)
        counted = lambda z, logsnr: (poll(), denoise(z, logsnr), progress.update())[1]
        images.append(autoencoder.decode(SAMPLERS[sampler](counted, draw(0), logsnrs, draw)).cpu())
    progress.close()
    return torch.cat(images)


def wanted_size(text, config):
    """
    (height, width) of --size HxW, in pixels. A model makes any shape of about the area that it was trained at: both sides hold whole
    tokens (of the merged grid), and the area is within a factor of 1.5.
    """
    side, unit = config["resolution"], token_size(config) * max(1, config["kv_merge"])
    if text is None:
        return side, side
    good = re.fullmatch(r"(\d+)x(\d+)", text)
    height, width = map(int, good.groups()) if good else (0, 0)
    if not good or height % unit or width % unit or not 1 / 1.5 <= height * width / side ** 2 <= 1.5:
        tall = max(1, round(1.5 ** 0.5 * side / unit)) * unit
        raise UserError(f"--size {text}: this run makes {side}x{side}, or sides that are multiples of {unit} with about that area, such as "
                        f"{tall}x{max(1, round(side * side / tall / unit)) * unit}; for another size grow its core into another --out (train.py --help)")
    return height, width


def describe_run(path):
    """What a checkpoint is, as lines of text."""
    state = read_checkpoint(path)
    c = state["config"]
    count = lambda prefix: sum(v.numel() for k, v in state["model"].items() if k.startswith(prefix))
    lines = [f"{state['stage']} of config {state['name']}, {c['resolution']} px, step {state['step']} of {c['steps']}",
             f"core   {count('core.'):>12,} parameters: {c['depth']} blocks of width {c['width']}, grid {token_grid(c)} x {token_grid(c)}",
             f"shell  {count('shell.'):>12,} parameters: {c['shell']}",
             f"data   {c['data']}, batch {c['batch']}, seed {c['seed']}"]
    lines += [f"parent {parent}" for parent in state["parents"]]
    return "\n".join(lines + ["config " + " ".join(f"{k}={v}" for k, v in c.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, such as out/toy/grow")
    parser.add_argument("captions", nargs="*", help="one or more captions in quotes; '' is the null caption")
    parser.add_argument("--n", type=int, default=4, help="images per caption; default 4")
    parser.add_argument("--steps", type=int, default=256, help="of the sampler; default 256")
    parser.add_argument("--guidance", type=float, help="default: the run's own; 1 is none")
    parser.add_argument("--sampler", default="ddpm", choices=list(SAMPLERS), help="default ddpm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64, help="images at a time; does not change the images")
    parser.add_argument("--size", help="HxW in pixels: another shape of about the area that the run was trained at")
    parser.add_argument("--to", default="grid.png", help="PNG file, default grid.png; where it exists, a number is added")
    parser.add_argument("--encoder_weights", help="local folders of the encoders that the run was trained with, comma-separated")
    parser.add_argument("--describe", action="store_true", help="tell what the run is, and stop")
    args = parser.parse_intermixed_args()                         # captions may follow the flags
    if args.describe:
        return print(describe_run(args.run))
    if not args.captions:
        raise UserError('no caption: python sample.py RUN "a large red circle on a white background"')
    if min(args.n, args.steps, args.batch) < 1:
        raise UserError("--n, --steps and --batch count things: give at least 1")
    if not args.to.lower().endswith(".png"):
        raise UserError(f"--to {args.to}: pictures are written as PNG: give a name that ends in .png")
    to = free_name(args.to)
    if not os.path.isdir(os.path.dirname(to) or "."):
        raise UserError(f"no folder for {to!r}: make it first")
    model, config = load(args.run, "cuda" if torch.cuda.is_available() else "cpu")
    config |= {"encoder_weights": args.encoder_weights or config["encoder_weights"]}
    size = wanted_size(args.size, config)
    captions = [c for c in args.captions for _ in range(args.n)]
    x = sample(model, config, captions, args.seed, 0, args.steps, args.guidance, args.sampler, args.batch, bar=True, size=size)
    write_png(to, grid(to_uint8(x), columns=args.n if len(args.captions) > 1 else min(args.n, 8)))
    print(f"{to}: {len(x)} images of {size[0]}x{size[1]} px" + "".join(f"\n  {c}" for c in args.captions))


if __name__ == "__main__":
    main()
