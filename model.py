"""
The model that grows:  v = shell.decode(core(shell.encode(z)))          (Greedy Growing, arXiv 2405.16759, Sec. 3)

    core     what growing keeps: text encoding, time encoding, transformer blocks on a grid of tokens
    shell    what growing throws away and replaces: it carries pixels, or latents, to the core's grid and back
             shallow   entry convolution, one residual block, [core], one residual block, upsampling head   (Sec. 3.2)
             unet      several resolutions of residual blocks, with skips, above the same grid              (Sec. 3.3)
             patch     each patch is a token: with it the core is a DiT, as in PixArt-Sigma                 (poster)

    from model import load
    model, config = load("out/toy/grow")                     # EMA weights, ready to denoise

    python model.py [CONFIG/STAGE ...]                       size and speed of presets; with none named, of the largest: needs a GPU, 8 minutes

Notable features:
- adaLN-single: one network under core.time makes the shifts, scales and gates of every block, so that "the time encoding
  stays trainable while the core is frozen" (Sec. 3.3) is a single prefix of parameter names;
- the branches of every transformer block and the last convolution start at exactly zero, set by one function that runs last;
- no dropout, no buffers: positions on the grid are a formula of its sides, so a model takes any grid, and a larger one interpolates.

Letters: B images, C channels (3, or the latents'), H W pixels or latents, h w token grid, N = h*w tokens, L caption tokens,
E width of their embeddings, D width of the core, r ratio of the KV merge.
"""
import functools
import gc
import math
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from data import encoder_parts, is_frozen
from kernels import attention, kv_merge
from lib.checkpoint import open_checkpoint
from lib.settings import UserError, default_config, load_config

# ---------------------------------------------------------------------------------------------------------------
# Noise: schedule, draws, loss. z = alpha x + sigma eps, v = alpha eps - sigma x, logsnr = log(alpha^2 / sigma^2).


def logsnr_at(t, config):
    """
    Cosine schedule, logsnr(t) = -2 log tan(pi t / 2) (Nichol and Dhariwal 2021), truncated at both ends, then shifted by
    2 log(base / d) for d x d images (Hoogeboom et al. 2023; Greedy Growing, Sec. 3.3). t in [0, 1], 0 is clean.
    """
    first, last = (math.atan(math.exp(-0.5 * config[k])) for k in ("logsnr_max", "logsnr_min"))
    return -2 * torch.log(torch.tan(first + t * (last - first))) + 2 * math.log(config["noise_base_resolution"] / config["resolution"])


def alpha_sigma(logsnr):
    """(B,) -> two (B, 1, 1, 1): alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr)."""
    logsnr = logsnr.view(-1, 1, 1, 1)
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


# Error in v, times this, is the error in ...     (Salimans and Ho 2022, Sec. 4)
WEIGHTINGS = {"v": lambda logsnr: torch.ones_like(logsnr),     # v itself
              "eps": torch.sigmoid,                            # the noise: e_eps^2 = alpha^2 e_v^2
              "x": lambda logsnr: torch.sigmoid(-logsnr)}      # the image: e_x^2 = sigma^2 e_v^2


def diffusion_loss(model, x, text, t, eps, config, size=None):
    """Weighted squared error per image, (B,). x and eps (B, C, H, W), text (B, L) or (B, L, E), t (B,), size (B, 6) or None."""
    logsnr = logsnr_at(t, config)                                                  # (B,)
    alpha, sigma = alpha_sigma(logsnr)                                             # (B, 1, 1, 1)
    v = model(alpha * x + sigma * eps, logsnr, text, size)                         # (B, C, H, W)
    error = (v.float() - (alpha * eps - sigma * x)).square().mean((1, 2, 3))       # (B,)
    return WEIGHTINGS[config["weighting"]](logsnr) * error


# ---------------------------------------------------------------------------------------------------------------
# Core: text, time, blocks


class TextEncoding(nn.Module):
    """
    Caption tokens into the core's width, and their mean into one vector (Sec. 3.1: "MLP on top of pooling layers"). A
    convolution over three words lets an adjective meet its noun, which attention from scratch learns late.
    """

    def __init__(self, vocab, length, width):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.empty(length, width))
        self.neighbours = nn.Conv1d(width, width, 3, padding=1)
        self.norm_in = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.norm_out = nn.LayerNorm(width)
        self.pool_in = nn.Linear(width, width)
        self.pool_out = nn.Linear(width, width)

    def forward(self, tokens):
        mask = tokens > 0                                                          # (B, L), True where a word is
        real = mask[..., None].float()                                             # (B, L, 1)
        text = (self.embed(tokens) + self.position) * real                         # (B, L, D)
        text = text + F.silu(self.neighbours(text.transpose(1, 2)).transpose(1, 2)) * real
        text = text + self.mlp(self.norm_in(text))
        text = self.norm_out(text)                                                 # (B, L, D)
        pooled = (F.silu(self.pool_in(text)) * real).sum(1) / real.sum(1).clamp(min=1)
        return text, mask.sum(1), self.pool_out(pooled)                            # (B, L, D), (B,), (B, D)


def encoder_spans(config):
    """[(tokens, width), ...] of the frozen encoders in "t5-xxl:128,clip-h:77"; none where the core embeds words by itself."""
    parts = encoder_parts(config["encoder"]) if is_frozen(config["encoder"]) else []
    if parts and (len(parts), sum(tokens for _, tokens in parts)) != (len(config["encoder_width"]), config["text_length"]):
        raise UserError(f"encoder = {config['encoder']}: set encoder_width to a width for each, and text_length = {sum(tokens for _, tokens in parts)}")
    return [(tokens, width) for (_, tokens), width in zip(parts, config["encoder_width"])]


class EmbeddedText(nn.Module):
    """
    Embeddings of pretrained encoders, one after the other along L, each projected from its own width into the core's
    (Sec. 4); and their mean into one vector. A row of zeros is no token: the null caption has none, and is only biases.
    """

    def __init__(self, spans, width):
        super().__init__()
        self.spans = spans
        self.projections = nn.ModuleList(nn.Linear(e, width) for _, e in spans)
        self.norm_out = nn.LayerNorm(width)
        self.pool_out = nn.Linear(width, width)

    def forward(self, embeddings):
        mask = embeddings.any(-1)                                                  # (B, L), True where a token is
        real = mask[..., None].float()                                             # (B, L, 1)
        parts = zip(self.projections, self.spans, embeddings.split([n for n, _ in self.spans], 1))
        text = torch.cat([project(part[..., :e]) for project, (_, e), part in parts], 1)
        text = self.norm_out(text)                                                 # (B, L, D)
        pooled = (text * real).sum(1) / real.sum(1).clamp(min=1)
        first = (~mask).int().argsort(dim=1, stable=True)                             # (B, L) places of the real tokens, then of the others
        text = text.gather(1, first[..., None].expand_as(text))                    # packed: attention skips what comes last
        return text, mask.sum(1), self.pool_out(pooled)                            # (B, L, D), (B,), (B, D)


def sinusoids(x, frequencies):
    """(B,) -> (B, 2 * len(frequencies))."""
    angle = x[:, None] * frequencies                                               # radians
    return torch.cat([angle.sin(), angle.cos()], 1)


class TimeEncoding(nn.Module):
    """
    logsnr -> embedding (sinusoids, then a shallow MLP, Sec. 3.1); and the modulation of all blocks (PixArt, adaLN-single). With
    `sizes`, six numbers of the original size, the crop and the target size are added in the same way (SDXL, Sec. 2.2), from zero.
    It lives here because a core that grows meets new sizes, as it meets new noise levels.
    """

    def __init__(self, width, sizes):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        self.size_in = nn.Linear(6 * 128, width) if sizes else None
        self.size_out = nn.Linear(width, width) if sizes else None

    def forward(self, logsnr, size=None):
        time = sinusoids(logsnr, torch.logspace(-4, 2, 64, base=2.0, device=logsnr.device))        # radians per unit of logsnr
        embedding = self.mlp(time)                                                 # (B, D)
        if self.size_in is not None and size is not None:
            pixels = torch.logspace(-14, 0, 64, base=2.0, device=size.device)      # radians per pixel
            sizes = sinusoids(size.flatten(), pixels).unflatten(0, (-1, 6)).flatten(1)             # (B, 6) -> (B, 6 * 128)
            embedding = embedding + self.size_out(F.silu(self.size_in(sizes)))
        return embedding


class SelfAttention(nn.Module):
    """
    With r > 1, keys and values of r x r neighbours are merged into one, by a depthwise convolution and a LayerNorm that they share
    (PixArt-Sigma; kernels.kv_merge): attention costs r^2 times less, and queries stay as many.
    """

    def __init__(self, width, heads, r=1, merge_norm=True):
        super().__init__()
        self.heads, self.r = heads, r
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        if r > 1:
            self.merge = nn.Conv2d(width, width, r, stride=r, groups=width)        # these two only hold the parameters
            self.merge_norm = nn.LayerNorm(width) if merge_norm else None

    def forward(self, x, grid):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)          # each (B, N, heads, D/heads)
        if self.r > 1:
            norm = (self.merge_norm.weight, self.merge_norm.bias) if self.merge_norm else (None, None)
            k, v = kv_merge(k.flatten(2), v.flatten(2), self.merge.weight, self.merge.bias, *norm, grid, self.r)
            k, v = (part.unflatten(2, (self.heads, -1)) for part in (k, v))        # each (B, N/r^2, heads, D/heads)
        return self.out(attention(q, k, v).flatten(2))                             # (B, N, D)


class CrossAttention(nn.Module):
    """From tokens x to the caption: this is where text enters the picture. Keys under a False mask are not seen."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, text, length):
        q = self.query(x).unflatten(2, (self.heads, -1))                           # (B, N, heads, D/heads)
        k, v = self.key_value(text).unflatten(2, (2, self.heads, -1)).unbind(2)    # (B, L, heads, D/heads)
        return self.out(attention(q, k, v, kv_len=length).flatten(2))                  # (B, N, D)


class Block(nn.Module):
    """
    Self-attention, cross-attention to the caption, MLP. Time shifts, scales and gates the first and the last (adaLN-single,
    PixArt-alpha, Sec. 2.3); cross-attention needs none of it.
    """

    def __init__(self, width, heads, mlp_ratio, r=1, merge_norm=True):
        super().__init__()
        self.table = nn.Parameter(torch.empty(6, width))       # this block's own offset to the shared modulation
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.self_attention = SelfAttention(width, heads, r, merge_norm)
        self.cross_attention = CrossAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))

    def forward(self, x, modulation, text, length, grid):
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table).unsqueeze(2).unbind(1)   # (B, 1, D)
        x = x + gate1 * self.self_attention((1 + scale1) * self.norm(x) + shift1, grid)    # (B, N, D)
        x = x + self.cross_attention(self.norm(x), text, length)
        return x + gate2 * self.mlp((1 + scale2) * self.norm(x) + shift2)


def positions(h, w, width, device=None):
    """2-D sine-cosine positions, (h*w, D), over a square of 16 x 16 units whatever the grid: they interpolate by themselves."""
    frequency = 100.0 ** (-torch.arange(width // 4, device=device) / (width // 4)) # (D/4,)
    y = 16 * (torch.arange(h, device=device) + 0.5)[:, None] / h * frequency       # (h, D/4)
    x = 16 * (torch.arange(w, device=device) + 0.5)[:, None] / w * frequency       # (w, D/4)
    y = torch.cat([y.sin(), y.cos()], 1)[:, None].expand(h, w, -1)                 # (h, w, D/2)
    x = torch.cat([x.sin(), x.cos()], 1)[None].expand(h, w, -1)                    # (h, w, D/2)
    return torch.cat([y, x], 2).flatten(0, 1)


def merged_layers(config):
    """Numbers of the blocks that merge keys and values: range(14, 28) for "14-27"."""
    if config["kv_merge"] < 2:
        return range(0)
    first, _, last = config["kv_merge_layers"].partition("-")
    if not first.isdigit() or not (last or first).isdigit() or not int(first) <= int(last or first) < config["depth"]:
        raise UserError(f"kv_merge_layers = {config['kv_merge_layers']!r}: blocks are numbered from 0, so take something up to 0-{config['depth'] - 1}")
    return range(int(first), int(last or first) + 1)


class Core(nn.Module):
    """Text-to-image core: all that touches the caption, and the time encoding (Sec. 3.1). Grows unchanged."""

    def __init__(self, config):
        super().__init__()
        c, width, spans, layers = config, config["width"], encoder_spans(config), merged_layers(config)
        self.text = EmbeddedText(spans, width) if spans else TextEncoding(c["text_vocab"], c["text_length"], width)
        self.time = TimeEncoding(width, c["size_condition"])
        self.modulation = nn.Linear(width, 6 * width)          # one for all blocks (adaLN-single)
        ratios = [c["kv_merge"] if i in layers else 1 for i in range(c["depth"])]
        self.blocks = nn.ModuleList(Block(width, c["heads"], c["mlp_ratio"], r, c["kv_merge_norm"]) for r in ratios)

    def condition(self, logsnr, text, size=None):
        """One vector of time, size and pooled caption for shell and blocks, the caption's tokens, and their mask."""
        text, length, pooled = self.text(text)                                     # (B, L, D), (B,), (B, D)
        return F.silu(self.time(logsnr, size) + pooled), text, length

    def forward(self, features, condition, text, length):
        h, w = features.shape[2:]
        x = features.flatten(2).transpose(1, 2)                                    # (B, D, h, w) -> (B, N, D)
        x = x + positions(h, w, x.shape[2], x.device)
        modulation = self.modulation(condition).unflatten(1, (6, -1))         # (B, 6, D)
        for block in self.blocks:
            x = block(x, modulation, text, length, (h, w))
        return x.transpose(1, 2).unflatten(2, (h, w))                              # (B, D, h, w)


# ---------------------------------------------------------------------------------------------------------------
# Shells: encode carries an image to the core's grid, decode carries it back


def group_norm(channels):
    """At most 32 groups, of 4 channels or more where the channels divide."""
    groups = next(g for g in range(max(1, min(32, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with swish (Sec. 3.2), scaled and shifted by the condition between them."""

    def __init__(self, c_in, c_out, width):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.condition = nn.Linear(width, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, condition):
        shift, scale = self.condition(condition)[..., None, None].chunk(2, 1)      # (B, c_out, 1, 1)
        y = self.conv1(F.silu(self.norm1(x)))                                      # (B, c_out, H, W)
        y = torch.addcmul(shift, self.norm2(y), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(y))


def entry(c_in, channels, stride):
    """An image to `channels` at 1/stride of the size. A kernel of 2 stride - 1 reaches from one centre to just before the next."""
    size = max(3, 2 * stride - 1)
    return nn.Conv2d(c_in, channels, size, stride=stride, padding=size // 2)


class Head(nn.Module):
    """Back to an image in steps of two: one subpixel step by 4 was found to be worse (Sec. 3.2)."""

    def __init__(self, channels, c_out, stride):
        super().__init__()
        doublings = int(math.log2(stride))
        widths = [max(16, channels // 2 ** i) for i in range(doublings + 1)]
        self.up = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, 4 * b, 1), nn.PixelShuffle(2)) for a, b in zip(widths, widths[1:])))
        self.norm, self.conv = group_norm(widths[-1]), nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x):
        return self.conv(F.silu(self.norm(self.up(x))))                            # (B, c, h, w) -> (B, C, H, W)


class Shallow(nn.Module):
    """Shallow-UViT (Sec. 3.2): one residual block on each side, on the core's own grid, so that nearly all is core."""

    def __init__(self, config):
        super().__init__()
        width, channels = config["width"], config["entry_channels"]
        c_image, side, _ = image_shape(config)
        stride = side // config["grid"]
        self.entry = entry(c_image, channels, stride)
        self.encoder = ResidualBlock(channels, width, width)
        self.decoder = ResidualBlock(width, channels, width)
        self.head = Head(channels, c_image, stride)

    def encode(self, z, condition):
        return self.encoder(self.entry(z), condition), []                          # (B, D, h, w), no skips

    def decode(self, features, skips, condition):
        return self.head(self.decoder(features, condition))                        # (B, C, H, W)


class UNet(nn.Module):
    """
    The grown UViT (Sec. 3.3): `channels`, finest level first, halve the size until the core's grid is reached. Each level
    has residual blocks going down and as many going up, joined by a skip.
    """

    def __init__(self, config):
        super().__init__()
        width, blocks = config["width"], config["residual_blocks"]
        levels = list(config["channels"])
        c_image, side, _ = image_shape(config)
        stride = side // (config["grid"] * 2 ** len(levels))
        pairs = list(zip(levels, levels[1:] + [width]))                            # (this level, the next coarser one)
        stack = lambda first, c: nn.ModuleList([ResidualBlock(first, c, width)] + [ResidualBlock(c, c, width) for _ in range(blocks - 1)])
        self.entry = entry(c_image, levels[0], stride)
        self.encoders = nn.ModuleList(stack(c, c) for c in levels)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.into_core = stack(width, width)
        self.from_core = stack(width, width)
        self.ups = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in reversed(pairs))
        self.decoders = nn.ModuleList(stack(2 * c, c) for c in reversed(levels))
        self.head = Head(levels[0], c_image, stride)

    def encode(self, z, condition):
        x, skips = self.entry(z), []                                               # (B, c0, H/stride, W/stride)
        for blocks, down in zip(self.encoders, self.downs):
            for block in blocks:
                x = block(x, condition)
            skips.append(x)
            x = down(x)                                                            # half the size
        for block in self.into_core:
            x = block(x, condition)
        return x, skips                                                            # (B, D, h, w)

    def decode(self, features, skips, condition):
        x = features                                                               # (B, D, h, w)
        for block in self.from_core:
            x = block(x, condition)
        for blocks, up, skip in zip(self.decoders, self.ups, reversed(skips)):
            x = F.interpolate(up(x), scale_factor=2.0, mode="nearest")             # twice the size
            x = torch.cat([x, skip], 1)
            for block in blocks:
                x = block(x, condition)
        return self.head(x)                                                        # (B, C, H, W)


class Patch(nn.Module):
    """
    DiT (Peebles and Xie 2023): patches of patch x patch become tokens by one linear map, and a second one makes them patches
    again. The grid follows the image. The last norm is shifted and scaled as the blocks are (adaLN-single, PixArt-alpha).
    """

    def __init__(self, config):
        super().__init__()
        width, channels, self.patch = config["width"], image_shape(config)[0], config["patch"]
        self.entry = nn.Conv2d(channels, width, self.patch, stride=self.patch)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.table = nn.Parameter(torch.empty(2, width))
        self.head = nn.Linear(width, channels * self.patch ** 2)

    def encode(self, z, condition):
        return self.entry(z), []                                                   # (B, D, h, w), no skips

    def decode(self, features, skips, condition):
        shift, scale = (condition[:, None] + self.table)[:, :, None, None].unbind(1)               # (B, 1, 1, D)
        x = (1 + scale) * self.norm(features.permute(0, 2, 3, 1)) + shift          # (B, h, w, D)
        return F.pixel_shuffle(self.head(x).permute(0, 3, 1, 2), self.patch)       # (B, C p^2, h, w) -> (B, C, H, W)


SHELLS = {"shallow": Shallow, "unet": UNet, "patch": Patch}

# ---------------------------------------------------------------------------------------------------------------
# The model


class Denoiser(nn.Module):
    """
    v = shell.decode(core(shell.encode(z))). z (B, C, H, W), logsnr (B,), text (B, L) tokens or (B, L, E) embeddings, size (B, 6) in
    pixels (original height, width, crop top, left, target height, width) or None -> v (B, C, H, W).
    """

    def __init__(self, core, shell):
        super().__init__()
        self.core, self.shell = core, shell

    def forward(self, z, logsnr, text, size=None):
        condition, text, length = self.core.condition(logsnr, text, size)          # (B, D), (B, L, D), (B,)
        features, skips = self.shell.encode(z, condition)                          # (B, D, h, w)
        features = self.core(features, condition, text, length)                      # (B, D, h, w)
        return self.shell.decode(features, skips, condition)                       # (B, C, H, W)


def initialise(model):
    """
    The one place where parameters get their first values; runs last, so nothing can overwrite it.

        weights of linear layers and convolutions      Xavier uniform over (out, everything else)
        biases                                         0
        text.embed                                     normal, std 1;  text.position: normal, std 0.5
        norms with parameters                          weight 1, bias 0
        modulation, block.table                        0: the gates of self-attention and MLP are shut
        cross_attention.out                            0: with the gates, a block is the identity
        residual block: condition                      0: no shift, no scale
        head, head.conv                                0: the model says v = 0
        time.size_out                                  0: sizes change nothing
        self_attention.merge                           1 / r^2: the mean of the merged tokens
    """
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
        elif p.ndim < 2 or name.endswith("table") or any(k in name for k in ZERO):
            nn.init.zeros_(p)
        elif "merge.weight" in name:
            nn.init.constant_(p, 1 / p[0].numel())
        elif "text.embed" in name or "text.position" in name:
            nn.init.normal_(p, std=1.0 if "embed" in name else 0.5)
        else:
            nn.init.xavier_uniform_(p.flatten(1))
    return model


ZERO = ("core.modulation.weight", "cross_attention.out.weight", "time.size_out.weight", "condition.weight", "head.conv.weight", "shell.head.weight")


def image_shape(config):
    """(C, H, W) of what the denoiser works on: pixels, or latents of an autoencoder. `resolution` counts pixels either way."""
    side = config["resolution"] // (config["latent_stride"] if config["autoencoder"] else 1)
    return config["latent_channels"] if config["autoencoder"] else 3, side, side


def token_size(config):
    """Pixels per token and side. A model takes every image whose sides are multiples of it, times the KV merge's ratio."""
    latent = config["latent_stride"] if config["autoencoder"] else 1
    return config["patch"] * latent if config["shell"] == "patch" else config["resolution"] // config["grid"]


def token_grid(config):
    """Tokens along one side of a square image of the config's resolution."""
    return config["resolution"] // token_size(config)


def check_sizes(config):
    """Raise UserError, naming the nearest good sizes, before any file is opened."""
    c = config
    if c["shell"] not in SHELLS or c["weighting"] not in WEIGHTINGS:
        raise UserError(f"shell = {c['shell']}, weighting = {c['weighting']}: take one of {', '.join(SHELLS)} and of {', '.join(WEIGHTINGS)}")
    levels, merge = len(c["channels"]) if c["shell"] == "unet" else 0, c["kv_merge"] if merged_layers(c) else 1
    latent, patches = c["latent_stride"] if c["autoencoder"] else 1, c["shell"] == "patch"
    unit = latent * (c["patch"] * merge if patches else c["grid"] * 2 ** levels)   # px
    sizes = range(unit, 2 * max(unit, c["resolution"]) + 1, unit) if patches else [unit * 2 ** k for k in range(20)]
    if c["resolution"] not in sizes:
        below = max((size for size in sizes if size < c["resolution"]), default=unit)
        what = f"tokens of {unit} px" if patches else f"grid {c['grid']} under a {c['shell']} shell of {levels} levels"
        raise UserError(f"resolution = {c['resolution']} does not fit {what}: take {below} or {min(size for size in sizes if size > below)}")
    if token_grid(c) % merge:
        raise UserError(f"kv_merge = {merge} does not divide a grid of {token_grid(c)} x {token_grid(c)} tokens: take another, or another grid")
    if c["width"] % c["heads"] or c["width"] % 4:
        good = [w for w in range(max(c["width"] - 256, 4), c["width"] + 257) if w % c["heads"] == 0 and w % 4 == 0]
        raise UserError(f"width = {c['width']} is no multiple of heads = {c['heads']} and of 4: "
                        f"take width = {min(good, key=lambda w: abs(w - c['width']))}")


def build(config):
    """A freshly initialised model for this config."""
    check_sizes(config)
    return initialise(Denoiser(Core(config), SHELLS[config["shell"]](config)))


def example(config, batch=1, device=None):
    """(z, logsnr, text) of the shapes that a model of this config takes: to count with, on the meta device for instance."""
    widest = [max(e for _, e in spans)] if (spans := encoder_spans(config)) else []
    text = torch.zeros(batch, config["text_length"], *widest, dtype=torch.float if widest else torch.long, device=device)
    return torch.zeros(batch, *image_shape(config), device=device), torch.zeros(batch, device=device), text


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: a file describes itself


def read_checkpoint(path):
    """The state in a run's last.pt, or in a file (see open_checkpoint)."""
    file = os.path.join(path, "last.pt") if os.path.isdir(path) and not os.path.exists(os.path.join(path, "about.pt")) else path
    if not os.path.exists(file):
        raise UserError(f"no checkpoint {file!r}: `python train.py --stage grow` makes out/toy/pretrain/last.pt and out/toy/grow/last.pt")
    state, broken = open_checkpoint(file, default_config())
    if broken:
        raise UserError(broken)
    return state


def ema_weights(state):
    """Weights by name: the EMA where there is one, the plain weight where a tensor was frozen."""
    return {**state["model"], **state["ema"]}


def carry_over(start, config, keeps):
    """
    What a new model of `config` takes from the checkpoint `start` when it grows, goes on at a larger size or switches the KV merge on:
    {name: tensor} of all under the prefix `keeps`, and a line that reports it. Raises UserError unless all of that fits.
    """
    with torch.device("meta"):                                                     # shapes alone, no memory
        new = build(config).state_dict()
    old, grids = ema_weights(start), [token_grid(start["config"]), token_grid(config)]
    kept = {k: v for k, v in old.items() if k.startswith(keeps) and k in new}
    wrong = [f"{k} is {tuple(v.shape)} there, {tuple(new[k].shape)} here" for k, v in kept.items() if v.shape != new[k].shape]
    added = [k for k in new if k.startswith(keeps) and k not in old]
    wrong += [f"{k} is only here" for k in added if ".merge" not in k and ".size_" not in k]
    if wrong:
        raise UserError(f"this model cannot take over the weights ({', '.join(wrong[:3])}): use the settings of their run, or train another")
    said = f"{len(kept)} tensors kept, {len(new) - len(kept)} new, {len(old) - len(kept)} unused"
    said += "; positions interpolated by their formula from {0} x {0} to {1} x {1} tokens".format(*grids) if grids[0] != grids[1] else ""
    merge = f" (KV merge by {config['kv_merge']}, blocks {config['kv_merge_layers']}, as the mean)" if any(".merge" in k for k in added) else ""
    return kept, said + (f"; added within what is kept: {len(added)} tensors{merge}" if added else "")


def load(path, device="cpu"):
    """(model, config) of a run folder or checkpoint file, with its EMA weights, in eval mode."""
    state = read_checkpoint(path)
    model = build(state["config"])
    model.load_state_dict(ema_weights(state))
    return model.eval().to(device), state["config"]


# ---------------------------------------------------------------------------------------------------------------
# How a model is trained: what stays as it is, and what is computed twice

TUNED = ("core.time.",)                                        # trained also while the core is frozen (Greedy Growing, Sec. 3.3)


def freeze_core(model):
    """Growing keeps the core to the bit, but for the time encoding: a new size has a noise schedule of its own (Sec. 3.3)."""
    for name, p in model.named_parameters():
        p.requires_grad = not name.startswith("core.") or name.startswith(TUNED)


def checkpointed_modules(model):
    """The modules whose inside is computed again in the backward under activation checkpointing."""
    return [*model.core.blocks, *(module for module in model.modules() if isinstance(module, ResidualBlock))]


def enable_activation_checkpointing(model):
    """These modules keep their input alone and compute the rest again in the backward: less memory, a third more time."""
    for module in checkpointed_modules(model):                 # forward is replaced, not wrapped: names of parameters stay
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


# ---------------------------------------------------------------------------------------------------------------
# python model.py CONFIG/STAGE ...: how large and how fast

def speed(name, device):
    """Prints parameters, and TFLOP, seconds and peak memory of a forward and of a training step of one image in bf16, recomputation included."""
    gc.collect()                                               # the model before refers to itself
    config = load_config(*name.split("/"))
    with torch.device(device):
        model, (z, logsnr, text) = build(config), example(config)
    if name.endswith("/grow"):
        freeze_core(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    if config["checkpointing"]:
        enable_activation_checkpointing(model)

    def step(train):
        begin = time.perf_counter()
        with torch.set_grad_enabled(train), torch.autocast(device, torch.bfloat16):
            loss = model(z + 1, logsnr, text + 1).float().square().mean()          # a text of zeros would be skipped
        if train:
            loss.backward(), optimizer.step(), optimizer.zero_grad()
        return float(loss.detach()), time.perf_counter() - begin                   # reading a value waits for the device
    for train in (False, True):
        step(train)                                            # tries the kernels, makes the optimizer's state
        torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
        with FlopCounterMode(display=False) as counter:
            step(train)
        seconds, tera = sorted(step(train)[1] for _ in range(3))[1], counter.get_total_flops() / 1e12
        gib = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else math.nan
        print(f"{name:28} {sum(p.numel() for p in model.parameters()) / 1e6:8.1f}M  {'training step' if train else 'forward':13}  {tera:9.3f} TFLOP"
              f"  {seconds:9.4f} s  {tera / seconds:7.1f} TFLOP/s  {gib:6.1f} GiB", flush=True)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    largest = [f"pixart-sigma-{size}{kv}/defrost" for size in ("1k", "2k", "4k") for kv in ("", "-kv")] + ["huge/grow"]
    for name in sys.argv[1:] or largest:
        speed(name, "cuda" if torch.cuda.is_available() else "cpu")
