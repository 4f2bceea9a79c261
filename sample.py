"""
From noise to image.

    python sample.py out/toy/grow "a large red circle left of a small blue square on a white background" --n 8 --to grid.png
    python sample.py out/toy/grow --describe                  what the run is: stage, size, steps, data, parents

A run folder is all that is needed: the checkpoint holds its own settings. Image i of seed s is the same at any batch size.

    sampler   network evaluations per step       when to use it
    ddpm      1 (2 with guidance)                the paper's choice, 256 steps (Greedy Growing, Sec. 4); best at many steps
    ddim      1 (2 with guidance)                deterministic; 50 steps are nearly as good

Every sampler is a function (denoise, z, logsnrs, draw) -> x, with denoise(z, logsnr) -> x and draw(step) -> noise like z.
"""
import argparse
import math
import os

import torch
from tqdm import tqdm

from data import UserError, encode_captions, grid, to_uint8, write_png
from model import alpha_sigma, image_shape, load, logsnr_at, noise, read_checkpoint


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


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}


def guided(model, text, guidance):
    """
    denoise(z, logsnr) -> x for these captions (B, L), with classifier-free guidance on all channels (Ho and Salimans 2021):
    v = v_null + guidance (v_caption - v_null). 1 means no guidance, 0 no caption. The null caption is the one of training.
    """
    batch = len(text)
    both = torch.cat([text, torch.zeros_like(text)]) if guidance not in (0, 1) else text * int(guidance)

    def denoise(z, logsnr):
        copies = len(both) // batch
        v = model(z.repeat(copies, 1, 1, 1), logsnr.expand(copies * batch), both)  # (B or 2 B, C, H, W)
        if copies == 2:
            v, null = v.chunk(2)
            v = null + guidance * (v - null)
        alpha, sigma = alpha_sigma(logsnr)
        return (alpha * z - sigma * v).clamp(-1, 1)
    return denoise


@torch.no_grad()
def sample(model, config, captions, seed=0, first=0, steps=None, guidance=None, sampler=None, batch=64, bar=False,
           poll=lambda: None):
    """
    One image per caption, x (B, C, H, W) in [-1, 1] on the CPU. Image i draws from (seed, first + i, step) alone, so it does
    not depend on `batch`. `steps`, `guidance` and `sampler` default to the config's. `poll` is called at every step and may raise.
    """
    sampler = config["sampler"] if sampler is None else sampler
    steps = config["sample_steps"] if steps is None else steps
    guidance = config["guidance"] if guidance is None else guidance
    device = next(model.parameters()).device
    logsnrs = logsnr_at(torch.linspace(1, 0, steps, device=device), config)       # from noise to image; the last one denoises
    text = encode_captions(captions, config).to(device)
    images, progress = [], tqdm(total=steps * math.ceil(len(captions) / batch), desc="sampling", leave=False, disable=None if bar else True)
    for start in range(0, len(captions), batch):
        rows = range(start, min(start + batch, len(captions)))
        draw = lambda step: noise([(seed, first + i, step) for i in rows], image_shape(config), device)
        denoise = guided(model, text[rows.start:rows.stop], guidance)
        counted = lambda z, logsnr: (poll(), denoise(z, logsnr), progress.update())[1]
        images.append(SAMPLERS[sampler](counted, draw(0), logsnrs, draw).cpu())
    progress.close()
    return torch.cat(images)


def free_name(path):
    """`path`, or path_1, path_2 ...: the first that does not exist, so that no picture is overwritten."""
    stem, end = os.path.splitext(path)
    names = (path if k == 0 else f"{stem}_{k}{end}" for k in range(10 ** 6))
    return next(n for n in names if not os.path.exists(n))


def describe_run(path):
    """What a checkpoint is, as lines of text."""
    state = read_checkpoint(path)
    c = state["config"]
    count = lambda prefix: sum(v.numel() for k, v in state["model"].items() if k.startswith(prefix))
    lines = [f"{state['stage']} of config {state['name']}, {c['resolution']} px, step {state['step']} of {c['steps']}",
             f"core   {count('core.'):>12,} parameters: {c['depth']} blocks of width {c['width']}, grid {c['grid']} x {c['grid']}",
             f"shell  {count('shell.'):>12,} parameters: {c['shell']}",
             f"data   {c['data']}, batch {c['batch']}, seed {c['seed']}"]
    lines += [f"parent {parent}" for parent in state["parents"]]
    return "\n".join(lines + ["config " + " ".join(f"{k}={v}" for k, v in c.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, such as out/toy/grow")
    parser.add_argument("captions", nargs="*", help="one or more captions in quotes; '' is the null caption")
    parser.add_argument("--n", type=int, default=4, help="images per caption")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--guidance", type=float, help="default: the run's own; 1 is none")
    parser.add_argument("--sampler", default="ddpm", choices=list(SAMPLERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64, help="images at a time; does not change the images")
    parser.add_argument("--size", help="HxW; only the size that the run was trained at")
    parser.add_argument("--to", default="grid.png")
    parser.add_argument("--describe", action="store_true", help="tell what the run is, and stop")
    args = parser.parse_args()
    if args.describe:
        return print(describe_run(args.run))
    if not args.captions:
        raise UserError('no caption: python sample.py RUN "a large red circle on a white background"')
    if min(args.n, args.steps, args.batch) < 1:
        raise UserError("--n, --steps and --batch count things: give at least 1")
    to = free_name(args.to)
    if not os.path.isdir(os.path.dirname(to) or "."):
        raise UserError(f"no folder for {to!r}: make it first")
    model, config = load(args.run, "cuda" if torch.cuda.is_available() else "cpu")
    side = config["resolution"]
    if args.size not in (None, f"{side}x{side}"):
        raise UserError(f"--size {args.size}: this run makes {side}x{side}; grow its core to another size into another --out (train.py --help)")
    captions = [c for c in args.captions for _ in range(args.n)]
    x = sample(model, config, captions, args.seed, 0, args.steps, args.guidance, args.sampler, args.batch, bar=True)
    write_png(to, grid(to_uint8(x), columns=args.n if len(args.captions) > 1 else min(args.n, 8)))
    print(f"{to}: {len(x)} images of {side} px" + "".join(f"\n  {c}" for c in args.captions))


if __name__ == "__main__":
    main()
