"""pytest lib/test_published.py: pipelines as diffusers saves them, and runs as they are exported."""
import json
import os
import shutil

import pytest
import torch

import sample as sampling
from lib.published import PipelineEncoder
from lib.settings import UserError
from lib.test_encoders import refused
from model import alpha_sigma, load, read_checkpoint

WORDS = "a big small red blue circle square on the left right of white".split()
CAPTIONS = ["a big red circle on the left", "a small Blue square"]
BETAS = {"linear": dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
         "scaled": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)}


def tiny_tokenizer(library, limit):
    """Words as tokens, 0 is padding, 1 the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["<pad>", "</s>", "<unk>"] + WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return library.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>",
                                           unk_token="<unk>", model_max_length=limit)


def tiny_clip(library, kind, width):
    return getattr(library, kind)(library.CLIPTextConfig(
        vocab_size=24, hidden_size=width, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=2, eos_token_id=1, pad_token_id=0, projection_dim=20))


def shaken_weights(net):
    """Random weights also where a new network has zeros or ones, so that every input counts."""
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()


def tiny_pixart(library, diffusers, vae):
    sizes = dict(vocab_size=24, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    t5 = library.T5EncoderModel(library.T5Config(**sizes)).eval()                  # as it is published: no dropout
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=32, use_additional_conditions=False)
    return diffusers.PixArtSigmaPipeline(
        tiny_tokenizer(library, 300), t5, vae, shaken_weights(net),
        diffusers.DPMSolverMultistepScheduler(**BETAS["linear"]))


def tiny_sdxl(library, diffusers, vae):
    net = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=68,
        cross_attention_dim=56, norm_num_groups=8)
    return diffusers.StableDiffusionXLPipeline(
        vae, tiny_clip(library, "CLIPTextModel", 24), tiny_clip(library, "CLIPTextModelWithProjection", 32),
        tiny_tokenizer(library, 77), tiny_tokenizer(library, 77), shaken_weights(net),
        diffusers.DPMSolverMultistepScheduler(**BETAS["scaled"]), add_watermarker=False)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """{kind: (pipeline, its folder)} of tiny ones with random weights, saved as diffusers does."""
    library, diffusers = pytest.importorskip("transformers"), pytest.importorskip("diffusers")
    out = {}
    for kind, make in (("pixart", tiny_pixart), ("sdxl", tiny_sdxl)):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16)
        pipeline, folder = make(library, diffusers, vae), tmp_path_factory.mktemp(kind)
        pipeline.save_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        out[kind] = pipeline, str(folder)
    return out


def picture_of_pipeline(pipeline, scheduler, guidance=4.5, **steps):
    """(their latents of CAPTIONS, the noise that they began as, the timesteps that they took)."""
    diffusers = pytest.importorskip("diffusers")
    options = dict(clip_sample=False, timestep_spacing="leading") if scheduler == "DDIMScheduler" else {}
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **options)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = dict(use_resolution_binning=False, clean_caption=False) if "PixArt" in type(pipeline).__name__ else {}
    latents = pipeline(CAPTIONS, height=16, width=16, latents=noise, guidance_scale=guidance, output_type="latent",
                       **steps, **plain).images
    return latents, noise, pipeline.scheduler.timesteps


@torch.no_grad()
def picture_of_ours(folder, noise, sampler, logsnrs, guidance=4.5):
    net, config = load(folder)
    text = sampling.encode_captions(CAPTIONS, config)
    denoise = sampling.guided(net, text, guidance, limit=float("inf"))
    return sampling.SAMPLERS[sampler][0](denoise, noise, logsnrs(net, config), None)


def deviation(ours, theirs):
    """The largest difference over the standard deviation of the latents."""
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.mark.parametrize("kind", ["pixart", "sdxl"])
def test_the_velocity_is_that_of_diffusers_own_network(pipelines, kind):
    """At ten levels, of which the first five are timesteps of its own, with captions, without, and of another shape."""
    pipeline, folder = pipelines[kind]
    net, config = load(folder)
    text = sampling.encode_captions(CAPTIONS, config)
    times = torch.tensor([999, 731, 500, 20, 0, 900.5, 3.25, 77.7, 412.1, 1.5])
    below = times.floor().long()
    share = (times - below).double()
    logsnrs = torch.lerp(net.logsnrs[below], net.logsnrs[(below + 1).clamp(max=999)], share)
    positive, negative = embeddings_of(pipeline, CAPTIONS)
    size = torch.tensor([[16.0, 24, 0, 0, 16, 24]] * 2)
    for t, logsnr in zip(times, logsnrs.float()):
        z = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(int(t)))
        assert abs(net.timestep(logsnr[None]) - t) < 2e-3
        for tokens, theirs in ((text, positive), (torch.zeros_like(text), negative)):
            with torch.no_grad():
                eps = noise_of(pipeline, z, t, theirs, size)
                alpha, sigma = alpha_sigma(logsnr)
                v = (eps - sigma * z) / alpha
                for given in (size, None):
                    ours = net(z, logsnr.expand(2), tokens, given)
                    assert (ours - v).abs().max() < 1e-5 * v.std(), (t, deviation(ours, v))


def embeddings_of(pipeline, captions):
    """What its own encode_prompt makes of captions, and of the null caption."""
    out = pipeline.encode_prompt(captions, do_classifier_free_guidance=True)
    return (out[:2], out[2:]) if "PixArt" in type(pipeline).__name__ else (out[::2], out[1::2])


def noise_of(pipeline, z, t, embedded, size):
    """The noise that its own network sees in z."""
    if "PixArt" in type(pipeline).__name__:
        rows, mask = embedded
        added = {"resolution": None, "aspect_ratio": None}
        return pipeline.transformer(z, rows, t.expand(2), added, encoder_attention_mask=mask).sample[:, :4]
    rows, pooled = embedded
    return pipeline.unet(z, t, rows, added_cond_kwargs={"text_embeds": pooled, "time_ids": size}).sample


@pytest.mark.parametrize("scheduler, sampler", [("DPMSolverMultistepScheduler", "dpm"), ("DDIMScheduler", "ddim")])
@pytest.mark.parametrize("kind", ["pixart", "sdxl"])
def test_pictures_are_those_of_diffusers_own_pipeline(pipelines, kind, scheduler, sampler):
    pipeline, folder = pipelines[kind]
    for steps in (10, 20):
        theirs, noise, times = picture_of_pipeline(pipeline, scheduler, num_inference_steps=steps)
        ours = picture_of_ours(folder, noise, sampler, lambda net, config: net.logsnrs[times].float())
        assert deviation(ours, theirs) < 1e-4


@pytest.mark.parametrize("kind", ["pixart", "sdxl"])
def test_at_the_timesteps_nearest_to_our_levels_pictures_are_the_same(pipelines, kind):
    pipeline, folder = pipelines[kind]
    net, config = load(folder)
    own = sampling.get_logsnrs(config, 20, "dpm")
    assert torch.allclose(own[[0, -1]], net.logsnrs[[-1, 0]].float(), atol=1e-4)   # from end to end
    nearest = net.timestep(own).round().long()
    theirs, noise, times = picture_of_pipeline(pipeline, "DPMSolverMultistepScheduler", timesteps=nearest.tolist())
    assert torch.equal(times, nearest)
    ours = picture_of_ours(folder, noise, "dpm", lambda net, config: net.logsnrs[nearest].float())
    assert deviation(ours, theirs) < 1e-3
    ours = picture_of_ours(folder, noise, "dpm", lambda net, config: own)          # off by half a timestep at most
    assert deviation(ours, theirs) < 1e-2
