"""
How long the networks of published pipelines take at their real sizes. Time needs no weights: they are random here.

    python -m experiments.bench published       PixArt-Sigma and SDXL at 1024 px, captions whole; in bfloat16 on a GPU
"""
import gc
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.plan import peak_rate, sgemm_rate

# what the config.json of each published network says; what is left out is diffusers' default
PIXART_SIGMA = dict(sample_size=128, num_layers=28, num_attention_heads=16, attention_head_dim=72, patch_size=2,
                    in_channels=4, out_channels=8, cross_attention_dim=1152, caption_channels=4096,
                    use_additional_conditions=False)
SDXL = dict(sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816)
NETWORKS = {"PixArt-Sigma": ("PixArtTransformer2DModel", PIXART_SIGMA), "SDXL": ("UNet2DConditionModel", SDXL)}


def forward_arguments(name, about, batch, device, dtype):
    """Of that network: latents z (B, 4, h, w), a time (B,), a caption (B, L, E), and of SDXL pooled text and sizes."""
    z = torch.randn(batch, 4, about["sample_size"], about["sample_size"], device=device, dtype=dtype)
    t = torch.full((batch,), 500, device=device)
    if name == "SDXL":
        text = torch.randn(batch, 77, about["cross_attention_dim"], device=device, dtype=dtype)
        added = {"text_embeds": torch.zeros(batch, 1280, device=device, dtype=dtype),
                 "time_ids": torch.full((batch, 6), 1024.0, device=device, dtype=dtype)}
        return (z, t, text), {"added_cond_kwargs": added}
    text = torch.randn(batch, 300, about["caption_channels"], device=device, dtype=dtype)
    return (z, text, t, {"resolution": None, "aspect_ratio": None}), {}


def measure_published(deadline, quick):
    """Yields a row for a forward of each network; with `quick`, of one with latents of 16 x 16 and fewer blocks."""
    try:
        import diffusers
    except ImportError:
        print("published networks are not measured without diffusers: pip install diffusers", flush=True)
        return
    smaller = {"PixArt-Sigma": {"num_layers": 2}, "SDXL": {"block_out_channels": (32, 64, 128),
               "attention_head_dim": (1, 2, 4), "transformer_layers_per_block": 1}}
    for name, (kind, about) in NETWORKS.items():
        if time.time() > deadline:
            raise TimeoutError("no time left")
        about = about | (smaller[name] | {"sample_size": 16} if quick else {})
        yield measure_forward(name, getattr(diffusers, kind), about, batch=1 if quick else 8)


@torch.inference_mode()
def measure_forward(name, kind, about, batch):
    """The row of one network: parameters, TFLOP, seconds, peak memory, share of the device's rate."""
    device, dtype, gib = "cpu", torch.float32, None
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
        gc.collect()                                           # what the network before may still hold
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    peak = peak_rate(torch.cuda.get_device_name(), dtype, True) if device == "cuda" else sgemm_rate()
    with torch.device(device):
        network = kind(**about).to(dtype)
    words, options = forward_arguments(name, about, batch, device, dtype)

    def seconds_of_forward():
        begin = time.perf_counter()
        float(network(*words, **options).sample.sum())         # waits for the device
        return time.perf_counter() - begin
    seconds_of_forward()                                       # the first one chooses kernels
    with FlopCounterMode(display=False) as counter:
        seconds_of_forward()
    seconds, tera = statistics.median(seconds_of_forward() for _ in range(3)), counter.get_total_flops() / 1e12
    if device == "cuda":
        gib = torch.cuda.max_memory_allocated() / 2 ** 30
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{name:14} {millions:8.1f}M  {batch} x forward  {tera:9.3g} TFLOP  {seconds:9.4f} s", flush=True)
    return dict(published=name, batch=batch, millions=millions, side=about["sample_size"], tflop=tera,
                seconds=seconds, gib=gib, share_of_peak=peak and tera * 1e12 / seconds / peak)
