"""
The model that grows:  v = shell.decode(core(shell.encode(z)))          (Greedy Growing, arXiv 2405.16759, Sec. 3)

    core     what growing keeps: text encoding, time embedding, transformer blocks on a grid of tokens
    shell    what growing replaces: it carries pixels, or latents, to the core's grid and back
             shallow   one convolution, one residual block, [core], one residual block, subpixel head   (Sec. 3.2)
             unet      several resolutions of residual blocks, with skips, above the same grid          (Sec. 3.3)
             nested    the old shallow shell, inside one for images a few times as large                (ours)
             patch     each patch is a token: with it the core is a DiT, as in PixArt-Sigma

    from model import load
    model, config = load("out/toy/grow")                       # EMA weights; model(z, logsnr, text) -> v

Read in this order: noise and loss; the core; the shells that carry an image to it and back; the whole model and its
first weights; growing; sizes and the settings that they allow; checkpoints.

Notable features:
- adaLN-single (PixArt-alpha, Sec. 2.3): one linear layer makes the shifts, scales and gates of all blocks from time
  and caption;
- the branches of the core's blocks and the last layer start at exactly zero, set by one function that runs last;
- no dropout, no buffers: positions on the grid are a formula, so a model takes any, and a larger one interpolates.

Letters: B images, C channels (3, or the latents'), H W pixels or latents, h w the core's grid of tokens, N = h*w of
them, L caption tokens, E width of their embeddings, D width of the core, r ratio of the KV merge, K numbers that
condition a picture; c channels of features and h' w' their size inside a shell. temb (B, D) embeds time, conditions and
pooled caption.
"""
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import MERGE_EPS, attention, kv_merge
from lib.checkpoint import find_checkpoint, open_checkpoint
from lib.conditions import embedded_conditions, read_conditions
from lib.encoders import encoder_parts, has_pretrained_encoder
from lib.published import Published, fill, read_published
from lib.settings import UserError, default_config
from lib.timesteps import ddpm_timestep

# ----------------------------------------------------------------------------------------------------------------------
# Noise and loss. z = alpha x + sigma eps,  v = alpha eps - sigma x,  logsnr = log(alpha^2 / sigma^2).


def get_logsnr(t, config):
    """
    Cosine schedule, logsnr(t) = -2 log tan(pi t / 2), truncated at both ends, then shifted by 2 log(base / d) for d
    x d images: large images need more noise to hide as much (Hoogeboom et al. 2023, Sec. 2; Greedy Growing, Sec.
    3.3). t (B,) in [0, 1], 0 is clean. -> (B,)
    """
    # the angle pi t / 2 runs between those at which the ends are reached: tan(angle) = exp(-logsnr / 2)
    first, last = (math.atan(math.exp(-0.5 * config[key])) for key in ("logsnr_max", "logsnr_min"))   # radians
    logsnr_shift = 2 * math.log(config["noise_base_resolution"] / config["resolution"])
    return -2 * torch.log(torch.tan(first + t * (last - first))) + logsnr_shift


def alpha_sigma(logsnr):
    """(B,) or a scalar -> two (B or 1, 1, 1, 1): alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr)."""
    logsnr = logsnr.view(-1, 1, 1, 1)
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


# Since eps = sigma z + alpha v and x = alpha z - sigma v, an error e_v of v is one of alpha e_v in eps and of
# -sigma e_v in x (Salimans and Ho 2022, Sec. 4). Weights of the squared error of v, named after what they make of it:
WEIGHTINGS = {                                                 # a new one: in [ranges] of configs.txt too
    "v": torch.ones_like,                                      # e_v^2
    "eps": torch.sigmoid,                                      # e_eps^2 = alpha^2 e_v^2
    "x": lambda logsnr: torch.sigmoid(-logsnr),                # e_x^2 = sigma^2 e_v^2
    # SNR^(1/3) e_x^2, between x and eps: x spends itself on levels at which nobody could tell what is in the picture
    "x-eps": lambda logsnr: torch.sigmoid(-logsnr) * torch.exp(logsnr / 3),
}


def diffusion_loss(model, x, text, t, eps, config, conditions=None):
    """Weighted squared error per image, (B,). x, eps (B, C, H, W), text (B, L[, E]), t (B,), conditions (B, K)."""
    logsnr = get_logsnr(t, config)                                                 # (B,)
    alpha, sigma = alpha_sigma(logsnr)                                             # (B, 1, 1, 1)
    v = model(alpha * x + sigma * eps, logsnr, text, conditions)                   # (B, C, H, W)
    error = (v.float() - (alpha * eps - sigma * x)).square().mean((1, 2, 3))       # (B,)
    return WEIGHTINGS[config["weighting"]](logsnr) * error


# ----------------------------------------------------------------------------------------------------------------------
# Core: text and time go in at the side, tokens of the picture from below.


class WordEncoding(nn.Module):
    """
    Caption tokens, embedded and learned along with the core, and one vector of them all: an MLP with the mean over
    words between its two layers (Sec. 3.1 has the MLP after the pooling). A convolution over three words lets an
    adjective meet its noun, which attention from scratch learns late. Token 0 is padding.
    """

    def __init__(self, vocab, length, width):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.empty(length, width))
        self.token_conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm_in = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.norm_out = nn.LayerNorm(width)
        self.pool_in = nn.Linear(width, width)
        self.pool_out = nn.Linear(width, width)

    def forward(self, tokens):
        mask = tokens > 0                                                          # (B, L), True where a token is real
        real = mask[..., None].float()                                             # (B, L, 1)
        text = (self.embed(tokens) + self.position) * real                         # (B, L, D)
        text = text + F.silu(self.token_conv(text.transpose(1, 2)).transpose(1, 2)) * real
        text = text + self.mlp(self.norm_in(text))
        text = self.norm_out(text)                                                 # (B, L, D)
        pooled = (F.silu(self.pool_in(text)) * real).sum(1) / real.sum(1).clamp(min=1)
        return text, mask.sum(1), self.pool_out(pooled)                            # (B, L, D), (B,), (B, D)


class PretrainedEncoding(nn.Module):
    """
    Embeddings of pretrained encoders, side by side along L, each projected from its own width into the core's (Sec. 4;
    PixArt-alpha), and their mean as one vector, or 0. Rows of zeros are padding; the null caption has a learned one.
    """

    def __init__(self, spans, width, pooled):
        super().__init__()
        self.spans = spans                                     # [(tokens, width of the embeddings)] of each encoder
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(e, width), nn.GELU("tanh"), nn.Linear(width, width)) for _, e in spans)
        self.null = nn.Parameter(torch.empty(width))
        self.pool_out = nn.Linear(width, width) if pooled else None

    def forward(self, embeddings):
        mask = embeddings.any(-1)                                                  # (B, L), True where a token is real
        spans = embeddings.split([tokens for tokens, _ in self.spans], 1)
        parts = [project(span[..., :e]) for project, span, (_, e) in zip(self.projections, spans, self.spans)]
        text = torch.cat(parts, 1)                                                 # (B, L, D)
        pooled = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)        # (B, D)
        # pack: the real tokens of all encoders come first, so that attention skips all padding instead of masking it
        order = (~mask).int().argsort(dim=1, stable=True)                          # (B, L)
        text = text.gather(1, order[..., None].expand_as(text))                    # (B, L, D)
        text = torch.where(mask.any(1)[:, None, None], text, self.null)
        pooled = self.pool_out(pooled) if self.pool_out else 0 * pooled
        return text, mask.sum(1).clamp(min=1), pooled                              # (B, L, D), (B,), (B, D)


def sinusoidal_embedding(x, frequencies):
    """(B,) -> (B, 2 * len(frequencies)); frequencies in radians per unit of x."""
    angle = x[:, None] * frequencies                                               # radians
    return torch.cat([angle.sin(), angle.cos()], 1)


class TimeEmbedding(nn.Module):
    """
    logsnr -> embedding: sinusoids, then a shallow MLP (Sec. 3.1). Growing goes on tuning it, because larger images
    shift the noise schedule (Sec. 3.3). Conditions, the numbers of lib/conditions.py, are added in the same way (SDXL,
    Sec. 2.2), each from zero: a finished core takes up a new one as it takes up new noise levels.
    """

    def __init__(self, width, conditions, pixart):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256 if pixart else 128, width), nn.SiLU(), nn.Linear(width, width))
        self.conditions, self.pixart = conditions, pixart
        self.condition_in = nn.ModuleDict({c.key: nn.Linear(128 * c.columns, width) for c in conditions})
        self.condition_out = nn.ModuleDict({c.key: nn.Linear(width, width) for c in conditions})

    def forward(self, logsnr, conditions=None):
        if self.pixart:                                        # which counts time in DDPM's thousand steps
            x, per_x = ddpm_timestep(logsnr), 10000.0 ** (-torch.arange(128, device=logsnr.device) / 128)
        else:
            x, per_x = logsnr, torch.logspace(-4, 2, 64, base=2.0, device=logsnr.device)     # radians per unit of x
        temb = self.mlp(sinusoidal_embedding(x, per_x))                            # (B, D)
        numbers = () if conditions is None else conditions.split([c.columns for c in self.conditions], 1)
        for c, x in zip(self.conditions, numbers):                                 # (B, columns)
            there = ~x.isnan().any(1, keepdim=True)                                # (B, 1): else it adds nothing
            per_range = torch.logspace(0, c.octaves, 64, base=2.0, device=x.device)      # radians from low to high
            x = ((x - c.low) / (c.high - c.low)).nan_to_num().flatten()            # (B * columns,)
            x = sinusoidal_embedding(x, per_range).unflatten(0, (-1, c.columns)).flatten(1)        # (B, columns * 128)
            temb = temb + there * self.condition_out[c.key](F.silu(self.condition_in[c.key](x)))
        return temb


def modulate(x, shift, scale):
    """Shift and scale of adaptive norms (DiT)."""
    return torch.addcmul(shift, x, 1 + scale)                  # in one pass: (1 + scale) x + shift


class SelfAttention(nn.Module):
    """
    With r > 1, keys and values of r x r neighbours are merged into one, by a depthwise convolution and a LayerNorm
    that they share (PixArt-Sigma; kernels.kv_merge): attention costs r^2 times less, and queries stay as many.
    """

    def __init__(self, width, heads, r=1, merge_norm=True):
        super().__init__()
        self.heads, self.r = heads, r
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        if r > 1:                                              # never called: kv_merge takes their parameters
            self.merge = nn.Conv2d(width, width, r, stride=r, groups=width)
            self.merge_norm = nn.LayerNorm(width, eps=MERGE_EPS) if merge_norm else None

    def forward(self, x, hw):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)          # each (B, N, heads, D/heads)
        if self.r > 1:
            norm = (self.merge_norm.weight, self.merge_norm.bias) if self.merge_norm else (None, None)
            k, v = kv_merge(k.flatten(2), v.flatten(2), self.merge.weight, self.merge.bias, *norm, hw, self.r)
            k = k.unflatten(2, (self.heads, -1))                                   # (B, N/r^2, heads, D/heads)
            v = v.unflatten(2, (self.heads, -1))                                   # (B, N/r^2, heads, D/heads)
        return self.out(attention(q, k, v).flatten(2))                             # (B, N, D)


class CrossAttention(nn.Module):
    """From tokens x to the caption: here text enters the picture. Of image b the first text_len[b] tokens are real."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, text, text_len):
        q = self.query(x).unflatten(2, (self.heads, -1))                           # (B, N, heads, D/heads)
        k, v = self.key_value(text).unflatten(2, (2, self.heads, -1)).unbind(2)    # (B, L, heads, D/heads)
        return self.out(attention(q, k, v, kv_len=text_len).flatten(2))            # (B, N, D)


class Block(nn.Module):
    """
    Self-attention, cross-attention to the caption, MLP. Time and caption shift, scale and gate the first and the
    last (adaLN-single, PixArt-alpha, Sec. 2.3); cross-attention needs none, but the norm, which PixArt leaves out.
    """

    def __init__(self, width, heads, mlp_ratio, r=1, merge_norm=True, pixart=False):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))               # this block's own offset
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6 if pixart else 1e-5)
        self.self_attention = SelfAttention(width, heads, r, merge_norm)
        self.cross_norm, self.cross_attention = not pixart, CrossAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU("tanh" if pixart else "none"),
                                 nn.Linear(mlp_ratio * width, width))

    def forward(self, x, modulation, text, text_len, hw):
        modulation = (modulation + self.scale_shift_table).unsqueeze(2)            # (B, 6, 1, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)        # (B, 1, D) each
        x = torch.addcmul(x, gate1, self.self_attention(modulate(self.norm(x), shift1, scale1), hw))   # (B, N, D)
        x = x + self.cross_attention(self.norm(x) if self.cross_norm else x, text, text_len)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm(x), shift2, scale2)))


def positions_2d(h, w, width, pixart=False, device=None):
    """
    2-D sine-cosine positions, (h*w, D). Any grid covers the same square of 16 x 16 units, so those of a finer grid lie
    between those of a coarser one. Wavelengths go from 2 pi to 100 * 2 pi units: 10000, usual for text, would leave
    most of them constant over the square. PixArt-Sigma: 10000, 32 x 32 units, corners of cells for middles, x first.
    """
    units, middle, longest = (32, 0.0, 10000.0) if pixart else (16, 0.5, 100.0)
    frequency = longest ** (-torch.arange(width // 4, device=device) / (width // 4))         # (D/4,)
    y = units * (torch.arange(h, device=device) + middle)[:, None] / h * frequency # (h, D/4)
    x = units * (torch.arange(w, device=device) + middle)[:, None] / w * frequency # (w, D/4)
    y = torch.cat([y.sin(), y.cos()], 1)[:, None].expand(h, w, -1)                 # (h, w, D/2)
    x = torch.cat([x.sin(), x.cos()], 1)[None].expand(h, w, -1)                    # (h, w, D/2)
    return torch.cat([x, y] if pixart else [y, x], 2).flatten(0, 1)


class Core(nn.Module):
    """Text-to-image core: embeds caption and time, works on a grid of tokens (Sec. 3.1). `grow` trains `time` alone."""

    def __init__(self, text, time, width, blocks, pixart):
        super().__init__()
        self.text = text                                       # WordEncoding or PretrainedEncoding
        self.time, self.pixart = time, pixart
        self.modulation = nn.Linear(width, 6 * width)          # shifts, scales and gates of all blocks (adaLN-single)
        self.blocks = nn.ModuleList(blocks)

    def embed(self, logsnr, text, conditions=None):
        """temb for shell and blocks, the caption's tokens, and how many of them are real."""
        text, text_len, pooled = self.text(text)                                   # (B, L, D), (B,), (B, D)
        return self.time(logsnr, conditions) + pooled, text, text_len

    def forward(self, features, temb, text, text_len):
        h, w = features.shape[2:]
        x = features.flatten(2).transpose(1, 2)                                    # (B, D, h, w) -> (B, N, D)
        x = x + positions_2d(h, w, x.shape[2], self.pixart, x.device)
        modulation = self.modulation(F.silu(temb)).unflatten(1, (6, -1))           # (B, 6, D)
        for block in self.blocks:
            x = block(x, modulation, text, text_len, (h, w))
        return x.transpose(1, 2).unflatten(2, (h, w))                              # (B, D, h, w)


# ----------------------------------------------------------------------------------------------------------------------
# Shells: encode carries an image to the core's grid, decode carries it back.


def group_norm(channels):
    """At most 32 groups, of 4 channels or more where the channels divide."""
    groups = next(g for g in range(max(1, min(32, channels // 4)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class Conv2d(nn.Conv2d):
    """Its weight is a matrix, (c_out, c_in * kernel^2): Muon takes it like any other."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.weight = nn.Parameter(self.weight.detach().flatten(1))

    def forward(self, x):
        weight = self.weight.unflatten(1, (-1, *self.kernel_size))                 # (c_out, c_in, kernel, kernel)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with swish (Sec. 3.2), shifted and scaled by temb between them."""

    def __init__(self, c_in, c_out, width):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), Conv2d(c_out, c_out, 3, padding=1)
        self.temb_proj = nn.Linear(width, 2 * c_out)
        self.skip = Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, temb):
        shift, scale = self.temb_proj(F.silu(temb))[..., None, None].chunk(2, 1)           # (B, c_out, 1, 1)
        y = self.conv1(F.silu(self.norm1(x)))                                      # (B, c_out, h', w')
        y = torch.addcmul(shift, self.norm2(y), 1 + scale)                         # modulate, in one pass
        return self.skip(x) + self.conv2(F.silu(y))


def strided_conv(c_in, c_out, stride):
    """Image -> features at 1/stride of its size. A kernel of 2 stride - 1, at least 3, overlaps the next."""
    kernel = max(3, 2 * stride - 1)
    return Conv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2)


class SubpixelHead(nn.Module):
    """
    Features back to an image in steps of two: one subpixel step by 4 was found to be worse (Sec. 3.2). With c_skip
    channels of them, features of the noisy image itself join at full size: edges need not pass through the core's grid.
    """

    def __init__(self, c_in, c_z, c_out, stride, c_skip, width):
        super().__init__()
        widths = [c_in] + [max(16, c_in // 2 ** i) for i in range(1, int(math.log2(stride)) + 1)]
        doublings = [nn.Sequential(Conv2d(a, 4 * b, 1), nn.PixelShuffle(2)) for a, b in zip(widths, widths[1:])]
        self.up = nn.Sequential(*doublings)
        self.conv_skip = strided_conv(c_z, c_skip, 1) if c_skip else None
        self.block = ResidualBlock(widths[-1] + c_skip, widths[-1], width) if c_skip else None
        self.norm, self.conv_out = group_norm(widths[-1]), Conv2d(widths[-1], c_out, 3, padding=1)

    def enlarge(self, x, z, temb):
        x = self.up(x)                                                             # (B, c, h', w') -> (B, c', H, W)
        if self.conv_skip is not None:
            x = self.block(torch.cat([x, self.conv_skip(z)], 1), temb)             # (B, c', H, W)
        return x

    def to_image(self, x):
        return self.conv_out(F.silu(self.norm(x)))                                 # (B, C, H, W)

    def forward(self, x, z, temb):
        return self.to_image(self.enlarge(x, z, temb))                             # (B, C, H, W)


class Shallow(nn.Module):
    """
    Shallow-UViT (Sec. 3.2): one residual block on each side, on the core's own grid, so nearly all is core. c_skip
    channels of the noisy image (ours) bring one more block, at full size.
    """

    def __init__(self, c_z, c_image, width, channels, stride, c_skip):
        super().__init__()
        self.conv_in = strided_conv(c_z, channels, stride)
        self.encoder = ResidualBlock(channels, width, width)
        self.decoder = ResidualBlock(width, channels, width)
        self.head = SubpixelHead(channels, c_z, c_image, stride, c_skip, width)

    def encode(self, z, temb, logsnr):
        return self.encoder(self.conv_in(z), temb), [z]                            # (B, D, h, w)

    def decode(self, features, skips, temb):
        return self.head(self.decoder(features, temb), *skips, temb)               # (B, C, H, W)


class UNet(nn.Module):
    """
    The grown UViT (Sec. 3.3): `channels`, finest level first, halve the size until the core's grid is reached. Each
    level has residual blocks going down and as many going up, joined by a skip.
    """

    def __init__(self, c_z, c_image, width, channels, residual_blocks, stride, c_skip):
        super().__init__()
        pairs = list(zip(channels, [*channels[1:], width]))                        # (this level, the next coarser one)

        def stack(c_in, c):
            sizes = [c_in] + [c] * residual_blocks
            return nn.ModuleList(ResidualBlock(a, b, width) for a, b in zip(sizes, sizes[1:]))
        self.conv_in = strided_conv(c_z, channels[0], stride)
        self.encoders = nn.ModuleList(stack(c, c) for c in channels)
        self.downs = nn.ModuleList(Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.into_core = stack(width, width)
        self.from_core = stack(width, width)
        self.ups = nn.ModuleList(Conv2d(b, a, 1) for a, b in reversed(pairs))
        self.decoders = nn.ModuleList(stack(2 * c, c) for c in reversed(channels))
        self.head = SubpixelHead(channels[0], c_z, c_image, stride, c_skip, width)

    def encode(self, z, temb, logsnr):
        x, skips = self.conv_in(z), [z]                                            # (B, c0, H/stride, W/stride)
        for blocks, down in zip(self.encoders, self.downs):
            for block in blocks:
                x = block(x, temb)                                                 # (B, c, h', w')
            skips.append(x)
            x = down(x)                                                            # half the size
        for block in self.into_core:
            x = block(x, temb)
        return x, skips                                                            # (B, D, h, w)

    def decode(self, features, skips, temb):
        x, (z, *skips) = features, skips                                           # (B, D, h, w), (B, C, H, W)
        for block in self.from_core:
            x = block(x, temb)
        for blocks, up, skip in zip(self.decoders, self.ups, reversed(skips)):
            x = F.interpolate(up(x), scale_factor=2.0, mode="nearest")             # twice the size
            x = torch.cat([x, skip], 1)                                            # (B, 2 c, h', w')
            for block in blocks:
                x = block(x, temb)
        return self.head(x, z, temb)                                               # (B, C, H, W)


class Nested(nn.Module):
    """
    The old shallow shell, kept and trained on, inside one for images `factor` times as large. The image, pooled, goes
    through the old one; what that makes of it meets the image itself, folded to the same size and then at full size.
    The last layer starts at zero and adds to the enlarged old image: a grown model begins as the old one.
    """

    def __init__(self, inner, c_image, factor, c_skip, width):
        super().__init__()
        c_inner = inner.head.conv_out.in_channels
        c = 2 * c_inner
        self.inner, self.factor = inner, factor
        self.conv_down = strided_conv(c_image, c, factor)
        self.block = ResidualBlock(c_inner + c_image + c, c, width)
        self.head = SubpixelHead(c, c_image, c_image, factor, c_skip, width)

    def encode(self, z, temb, logsnr):
        alpha, sigma = alpha_sigma(logsnr)                                         # (B, 1, 1, 1)
        pooled = F.avg_pool2d(z, self.factor)                  # (B, C, H/f, W/f): the noise is `factor` times weaker
        pooled = pooled / (alpha ** 2 + (sigma / self.factor) ** 2).sqrt()         # alpha^2 + sigma^2 = 1 again
        features, skips = self.inner.encode(pooled, temb, logsnr)                  # (B, D, h, w)
        return features, [z, *skips]

    def decode(self, features, skips, temb):
        z, pooled = skips                                                          # (B, C, H, W), (B, C, H/f, W/f)
        x = self.inner.head.enlarge(self.inner.decoder(features, temb), pooled, temb)        # (B, c_inner, H/f, W/f)
        image = self.inner.head.to_image(x)                                        # (B, C, H/f, W/f): the old model's
        y = self.block(torch.cat([x, image, self.conv_down(z)], 1), temb)          # (B, c, H/f, W/f)
        enlarged = F.interpolate(image, scale_factor=float(self.factor), mode="nearest")     # (B, C, H, W)
        return enlarged + self.head(y, z, temb)                                    # (B, C, H, W)


class Patch(nn.Module):
    """
    DiT (Peebles and Xie 2023): patches of patch x patch become tokens by one linear map, and a second one makes
    them patches again. The grid follows the image. The last norm is shifted and scaled by temb and a table of its own
    (adaLN-single, PixArt-alpha).
    """

    def __init__(self, c_z, c_image, width, patch):
        super().__init__()
        self.patch = patch
        self.conv_in = Conv2d(c_z, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = nn.Linear(width, c_image * patch ** 2)

    def encode(self, z, temb, logsnr):
        return self.conv_in(z), []                                                 # (B, D, h, w), no skips

    def decode(self, features, skips, temb):
        shift, scale = (temb[:, None] + self.scale_shift_table)[:, :, None, None].unbind(1)        # (B, 1, 1, D)
        x = modulate(self.norm(features.permute(0, 2, 3, 1)), shift, scale)        # (B, h, w, D)
        return F.pixel_shuffle(self.proj_out(x).permute(0, 3, 1, 2), self.patch)   # (B, C p^2, h, w) -> (B, C, H, W)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class Denoiser(nn.Module):
    """
    z (B, C, H, W), in a cascade (B, 2 C, H, W), logsnr (B,), text (B, L) tokens or (B, L, E) embeddings, conditions
    (B, K), NaN where a number is absent, or None -> v (B, C, H, W). What the shell makes is v, or with `prediction` "x"
    the clean image, from which v follows (JiT, arXiv 2511.13720), since a narrow shell cannot carry noise; or the noise
    "eps", as in PixArt.
    """

    def __init__(self, core, shell, prediction="v", pool=1):
        super().__init__()
        self.core, self.shell, self.prediction = core, shell, prediction
        self.pool_shift = 2 * math.log(pool)                   # the core sees images pooled by so much: less noise

    def forward(self, z, logsnr, text, conditions=None):
        z = z if z.is_cuda else z.contiguous(memory_format=torch.channels_last)    # convolutions on a CPU gain a sixth
        temb, text, text_len = self.core.embed(logsnr + self.pool_shift, text, conditions)     # (B, D), (B, L, D), (B,)
        features, skips = self.shell.encode(z, temb, logsnr)                       # (B, D, h, w)
        features = self.core(features, temb, text, text_len)                       # (B, D, h, w)
        y = self.shell.decode(features, skips, temb)                               # (B, C, H, W)
        if self.prediction == "v":
            return y
        (alpha, sigma), z, y = alpha_sigma(logsnr), z[:, :y.shape[1]], y.float()   # z alone, not what lies beside
        return (y - sigma * z) / alpha if self.prediction == "eps" else (alpha * z - y) / sigma


def build(config):
    """A freshly initialised model for this config."""
    c = config
    check_sizes(c)
    if c["pipeline"]:
        return Published(c)
    width, spans, merged = c["width"], encoder_spans(c), merged_layers(c)
    text = PretrainedEncoding(spans, width, not c["pixart_core"]) if spans else \
        WordEncoding(c["text_vocab"], c["text_length"], width)
    ratios = [c["kv_merge"] if i in merged else 1 for i in range(c["depth"])]
    time = TimeEmbedding(width, embedded_conditions(c), c["pixart_core"])
    blocks = [Block(width, c["heads"], c["mlp_ratio"], r, c["kv_merge_norm"], c["pixart_core"]) for r in ratios]
    core = Core(text, time, width, blocks, c["pixart_core"])
    pool = c["resolution"] // c["inner_resolution"] if c["shell"] == "nested" else 1
    return init_weights(Denoiser(core, build_shell(c), c["prediction"], pool))


def build_shell(config):
    """The shell that the config names, for images of its resolution."""
    c, width, (c_image, side, _) = config, config["width"], image_shape(config)
    c_z = c_image * (2 if c["low_resolution"] else 1)          # in a cascade a small picture lies beside z
    if c["shell"] == "shallow":
        return Shallow(c_z, c_image, width, c["entry_channels"], side // c["grid"], c["image_skip"])
    if c["shell"] == "nested":
        factor = c["resolution"] // c["inner_resolution"]
        return Nested(build_shell(inner_config(c)), c_image, factor, c["image_skip"], width)
    if c["shell"] == "unet":
        stride = side // (c["grid"] * 2 ** len(c["channels"]))
        return UNet(c_z, c_image, width, c["channels"], c["residual_blocks"], stride, c["image_skip"])
    return Patch(c_z, c_image, width, c["patch"])


def inner_config(config):
    """The config of the shell inside a nested one."""
    return config | {"shell": "shallow", "resolution": config["inner_resolution"]}


def init_weights(model):
    """
    The one place where parameters get their first values; runs last, so nothing can overwrite it.

        weights of linear layers and convolutions      Xavier uniform over (out, everything else)
        biases                                         0
        text.embed                                     normal, std 1;  text.position: normal, std 0.5
        norms with parameters                          weight 1, bias 0
        core.modulation, scale_shift_table             0: the gates of self-attention and MLP are shut
        cross_attention.out                            0: with the gates, a block is the identity
        residual block: temb_proj                      0: no shift, no scale
        conv_out, proj_out                             0: the model predicts 0, of v, x or eps
        time.condition_out                             0: conditions change nothing
        self_attention.merge                           1 / r^2: the mean of the merged tokens (PixArt-Sigma)
    """
    zero = ("core.modulation.weight", "scale_shift_table", "cross_attention.out.weight", "temb_proj.weight",
            "conv_out.weight", "proj_out.weight")
    for name, p in model.named_parameters():
        if "norm" in name:
            nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
        elif p.ndim < 2 or name.endswith(zero) or ".condition_out." in name:
            nn.init.zeros_(p)
        elif name.endswith("merge.weight"):
            nn.init.constant_(p, 1 / p[0].numel())
        elif name.endswith(("text.embed.weight", "text.position")):
            nn.init.normal_(p, std=1.0 if name.endswith("weight") else 0.5)
        else:
            nn.init.xavier_uniform_(p.flatten(1))
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Growing: a new shell round the old core


def freeze_core(model):
    """Growing trains the shell, and the time embedding because larger images shift the noise schedule (Sec. 3.3)."""
    for name, p in model.named_parameters():
        p.requires_grad = not name.startswith("core.") or name.startswith("core.time.")


def init_from(parent, config, prefix):
    """
    ({name: tensor}, report): the weights of the checkpoint `parent` that a new model of `config` starts from, those
    whose names begin with `prefix` (a nested shell keeps the old shell's too), and a line about them. For growing, for
    a larger size, for switching the KV merge on. Raises UserError where names or shapes do not fit.
    """
    with torch.device("meta"):                                                     # shapes alone, no memory
        new = build(config).state_dict()
    old = ema_weights(parent)
    if prefix == "core." and config["shell"] == "nested":      # the old shell comes along, into the new one
        prefix = "core.", "shell.inner."                       # of either
        old = {k.replace("shell.", "shell.inner.", 1): v for k, v in old.items()}
    inherited = {k: v for k, v in old.items() if k.startswith(prefix) and k in new}
    added = [k for k in new if k.startswith(prefix) and k not in old]
    misfits = [f"{k} is {tuple(v.shape)} there, {tuple(new[k].shape)} here"
               for k, v in inherited.items() if v.shape != new[k].shape]
    # a merge starts as the mean, a condition as no change; nothing else may be missing
    misfits += [f"{k} is only here" for k in added if ".merge" not in k and ".condition_" not in k]
    if misfits:
        advice = "use the settings of their run, or train another"
        if config["pipeline"] and parent["stage"] == "published":
            advice = "bring them whole, as they were published"
        raise UserError(f"this model cannot take over the weights ({', '.join(misfits[:3])}): {advice}")
    report = f"{len(inherited)} tensors inherited, {len(new) - len(inherited)} new, {len(old) - len(inherited)} unused"
    before, after = token_grid(parent["config"]), token_grid(config)
    if before != after:
        report += f"; positions interpolated by their formula from {before} x {before} to {after} x {after} tokens"
    if added:
        report += f"; {len(added)} of the new ones inside what is inherited"
    if any(".merge" in k for k in added):
        report += f" (KV merge by {config['kv_merge']}, blocks {config['kv_merge_layers']}, as the mean)"
    if fresh := [c.name for c in read_conditions(config) if f"core.time.condition_out.{c.key}.weight" in added]:
        report += f" (conditions {', '.join(fresh)}, as no change)"
    return inherited, report


def checkpointed_modules(model):
    """The modules whose inside is computed again in the backward under activation checkpointing (lib/devices.py)."""
    names = "Block", "ResidualBlock", "BasicTransformerBlock", "ResnetBlock2D"     # the last two are diffusers'
    return [module for module in model.modules() if type(module).__name__ in names]


# ----------------------------------------------------------------------------------------------------------------------
# Sizes, and the settings that they allow


def pixels_per_latent(config):
    """1 for a model of pixels."""
    return config["latent_stride"] if config["autoencoder"] else 1


def image_shape(config):
    """(C, H, W) of what the denoiser works on: pixels or latents. The config's resolution counts pixels either way."""
    side = config["resolution"] // pixels_per_latent(config)
    return config["latent_channels"] if config["autoencoder"] else 3, side, side


def token_size(config):
    """Pixels per token and side. A model takes images whose sides are multiples of it, times the KV merge's ratio."""
    if config["shell"] == "patch":
        return config["patch"] * pixels_per_latent(config)
    return config["resolution"] // config["grid"]


def token_grid(config):
    """Tokens along one side of a square image of the config's resolution."""
    return config["resolution"] // token_size(config)


def encoder_spans(config):
    """[(tokens, width), ...] of the pretrained encoders in "t5-xxl:128,clip-h:77"; none where the core embeds words
    by itself."""
    if not has_pretrained_encoder(config["encoder"]):
        return []
    lengths, widths = [tokens for _, tokens in encoder_parts(config["encoder"])], config["encoder_width"]
    if len(lengths) != len(widths) or sum(lengths) != config["text_length"]:
        raise UserError(f"encoder = {config['encoder']}: set encoder_width to a width for each, "
                        f"and text_length = {sum(lengths)}")
    return list(zip(lengths, widths))


def merged_layers(config):
    """Numbers of the blocks that merge keys and values: range(14, 28) for "14-27"."""
    if config["kv_merge"] < 2:
        return range(0)
    first, _, last = config["kv_merge_layers"].partition("-")
    last = last or first
    if not first.isdigit() or not last.isdigit() or not int(first) <= int(last) < config["depth"]:
        raise UserError(f"kv_merge_layers = {config['kv_merge_layers']!r}: blocks are numbered from 0, "
                        f"so take something up to 0-{config['depth'] - 1}")
    return range(int(first), int(last) + 1)


def check_sizes(config):
    """Raise UserError, naming the nearest good sizes, before any file is opened."""
    c, merge = config, config["kv_merge"] if merged_layers(config) else 1
    if c["shell"] == "patch":                                  # whole tokens, and whole merged ones
        unit = token_size(c) * merge                           # px
        sizes, tokens = range(unit, 2 * max(unit, c["resolution"]) + 1, unit), f"tokens of {unit} px"
    else:                                                      # the grid, doubled by each level, then by conv_in
        levels = len(c["channels"]) if c["shell"] == "unet" else 0
        unit = pixels_per_latent(c) * c["grid"] * 2 ** levels  # px
        sizes = [unit * 2 ** k for k in range(20)]
        tokens = f"grid {c['grid']} under a {c['shell']} shell of {levels} levels"
    if c["resolution"] not in sizes:
        below = max((size for size in sizes if size < c["resolution"]), default=unit)
        above = min(size for size in sizes if size > below)
        raise UserError(f"resolution = {c['resolution']} does not fit {tokens}: take {below} or {above}")
    if c["shell"] == "nested":
        check_sizes(inner_config(c))
        if c["resolution"] % c["inner_resolution"] or c["prediction"] != "x" or not c["image_skip"]:
            raise UserError(f"shell = nested round images of {c['inner_resolution']} px (inner_resolution): take a "
                            "multiple of that as resolution, prediction = x and image_skip = 16")
    if token_grid(c) % merge:
        raise UserError(f"kv_merge = {merge} does not divide a grid of {token_grid(c)} x {token_grid(c)} tokens: "
                        "take another, or another grid")
    unit = math.lcm(c["heads"], 4)                             # 4: sine and cosine of two coordinates
    if c["width"] % unit:
        nearest = max(1, round(c["width"] / unit)) * unit
        raise UserError(f"width = {c['width']} is no multiple of heads = {c['heads']} and of 4: take width = {nearest}")


def example(config, batch=1, device=None):
    """(z, logsnr, text) of the shapes that a model of this config takes: to count with, as on the meta device."""
    spans, length = encoder_spans(config), config["text_length"]
    text = torch.zeros(batch, length, *([max(width for _, width in spans)] if spans else []), device=device)
    z, logsnr = torch.zeros(batch, *image_shape(config), device=device), torch.zeros(batch, device=device)
    return z, logsnr, text if spans else text.long()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a file describes itself


def read_checkpoint(path):
    """The state in a run's last.pt, in a file, or in a folder that was published. UserError if it cannot be read."""
    if state := read_published(path):
        return state
    state, problem = open_checkpoint(find_checkpoint(path), default_config())
    if problem:
        raise UserError(problem)
    return state


def ema_weights(state):
    """Weights by name: the EMA where there is one, the plain weight where a tensor was frozen."""
    return {**state["model"], **state["ema"]}


def load(path, device="cpu"):
    """(model, config) of a run, checkpoint file or published folder, with its EMA weights, in eval mode."""
    state = read_checkpoint(path)
    model = build(state["config"])
    fill(model, ema_weights(state), path)
    return model.eval().to(device), state["config"]
