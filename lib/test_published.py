"""pytest lib/test_published.py: pipelines as diffusers saves them, and runs as they are exported."""
import copy
import json
import math
import os
import re
import shutil

import pytest
import torch

import eval as evaluation
import sample as sampling
from lib.checkpoint import FORMAT
from lib.devices import in_dtype
from lib.encoders import EmbeddingCache, embed_captions, embed_now, open_encoders
from lib.pictures import write_png
from lib.files import file_hash, weights_hash
from lib.pipeline_encoder import PipelineEncoder
from lib.published import moved
from lib.settings import load_config
from lib.timesteps import timestep_of
from lib.test_encoders import Trap, captions, refused  # noqa: captions is a fixture
from model import alpha_sigma, build, diffusion_loss, init_from, load, read_checkpoint
from sample import describe_run

VOCABULARY = "a big small red blue circle square on the left right of white".split()
CAPTIONS = ["a big red circle on the left", "a small Blue square"]
BETAS = {"linear": dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
         "scaled": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)}


def tiny_tokenizer(library, limit):
    """Words as tokens, 0 is padding, 1 the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["<pad>", "</s>", "<unk>"] + VOCABULARY)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return library.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>",
                                           unk_token="<unk>", model_max_length=limit)


def tiny_text_encoder(library, kind, width):
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
        cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=32, use_additional_conditions=False,
        interpolation_scale=0.125)                             # of 4 tokens a side 32 units, as in PixArt-Sigma
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
        vae, tiny_text_encoder(library, "CLIPTextModel", 24),
        tiny_text_encoder(library, "CLIPTextModelWithProjection", 32),
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
        assert abs(timestep_of(logsnr[None], net.logsnrs) - t) < 2e-3
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
    nearest = timestep_of(own, net.logsnrs).round().long()
    theirs, noise, times = picture_of_pipeline(pipeline, "DPMSolverMultistepScheduler", timesteps=nearest.tolist())
    assert torch.equal(times, nearest)
    ours = picture_of_ours(folder, noise, "dpm", lambda net, config: net.logsnrs[nearest].float())
    assert deviation(ours, theirs) < 1e-3
    ours = picture_of_ours(folder, noise, "dpm", lambda net, config: own)          # off by half a timestep at most
    assert deviation(ours, theirs) < 1e-2


@pytest.mark.parametrize("kind", ["pixart", "sdxl"])
def test_the_training_loss_is_that_of_diffusers_own_network(pipelines, kind):
    """The squared error of the noise in what its scheduler adds, with its gradients."""
    (pipeline, folder), diffusers = pipelines[kind], pytest.importorskip("diffusers")
    net, config = load(folder)
    times, size = torch.tensor([20, 900]), torch.tensor([[16.0, 24, 0, 0, 16, 24]] * 2)
    x, eps = torch.randn(2, 2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    (positive, _), own = embeddings_of(pipeline, CAPTIONS), getattr(pipeline, "transformer", None) or pipeline.unet
    theirs = (noise_of(pipeline, scheduler.add_noise(x, eps, times), times, positive, size) - eps).square()
    theirs = theirs.mean((1, 2, 3))                            # (2,)
    ends = [math.atan(math.exp(-config[key] / 2)) for key in ("logsnr_max", "logsnr_min")]
    t = (torch.atan(torch.exp(-net.logsnrs[times] / 2)) - ends[0]) / (ends[1] - ends[0])     # where ours is at `times`
    ours = diffusion_loss(net, x, sampling.encode_captions(CAPTIONS, config), t.float(), eps, config, size)
    assert torch.allclose(ours, theirs, rtol=1e-4)
    # as one vector: the gradient of a key's bias is zero, and its rounding is no measure
    a, b = (torch.cat([slope.flatten() for slope in torch.autograd.grad(loss.sum(), list(of.parameters()))])
            for loss, of in ((ours, net.core), (theirs, own)))
    assert (a - b).norm() < 1e-3 * b.norm()


def test_a_pipeline_is_hashed_part_by_part_and_each_once(pipelines, monkeypatch):
    folder = pipelines["sdxl"][1]
    parts = [os.path.join(folder, part) for part in ("text_encoder", "text_encoder_2", "unet", "vae")]
    known = dict(zip(parts, map(weights_hash, parts)))
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    one = file_hash(folder)
    assert len(one) == 64 and PipelineEncoder(78, folder, "fp32").id.endswith(known[parts[1]])
    monkeypatch.setattr("lib.files.weights_hash", lambda part: known[part].replace("0", "1") if "vae" in part
                        else known[part])
    assert (file_hash(folder) != one) == ("0" in known[parts[3]])


def copied(folder, tmp_path, name="copy"):
    """A folder that a test may spoil."""
    return shutil.copytree(folder, tmp_path / name)


def edit_json(path, **changes):
    about = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in about.items() if value != "absent"}))


def everything(folder):
    """What a folder's network, encoders and autoencoder give, and its null caption."""
    net, config = load(str(folder))
    text = sampling.encode_captions(CAPTIONS, config)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = [net(z, torch.tensor([0.5, -2.0]), tokens) for tokens in (text, torch.zeros_like(text))]
    return [text, *v, sampling.open_autoencoder(config).decode(z)]


@pytest.mark.parametrize("kind", ["pixart", "sdxl"])
def test_folders_are_read_as_they_are_published(pipelines, kind, tmp_path):
    """In several shards; as fp16 variants, alone or beside the plain weights; under the older name of the network."""
    pipeline, folder = pipelines[kind]
    plain = everything(folder)
    pipeline.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    part = "unet" if kind == "sdxl" else "transformer"
    assert len(list((tmp_path / "shards" / part).glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "shards" / "text_encoder").glob("*.safetensors"))) > 1
    if kind == "pixart":
        edit_json(tmp_path / "shards/model_index.json", transformer=["diffusers", "Transformer2DModel"])
        edit_json(tmp_path / "shards/transformer/config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    assert all(map(torch.equal, everything(tmp_path / "shards"), plain))
    half = copy.deepcopy(pipeline).to(torch.float16)
    half.save_pretrained(tmp_path / "fp16", variant="fp16")
    half.save_pretrained(tmp_path / "both", variant="fp16", max_shard_size="40KB")
    alone = [f.name for f in (tmp_path / "fp16").rglob("*.safetensors")]
    assert alone and all(".fp16." in name for name in alone)
    sharded = everything(tmp_path / "both")
    for a, b, c in zip(everything(tmp_path / "fp16"), plain, sharded):
        assert not torch.equal(a, b) and torch.equal(a, c) and (a - b).abs().max() < 0.02 * b.std()
    beside = copied(tmp_path / "both", tmp_path, "beside")     # a new name: what was opened is kept by name
    pipeline.save_pretrained(beside)
    assert all(map(torch.equal, everything(beside), plain))


def test_the_null_caption_is_the_published_one(pipelines, tmp_path):
    for kind, changes, zero in (("pixart", {}, False), ("sdxl", {}, True),
                                ("sdxl", {"force_zeros_for_empty_prompt": False}, False)):
        pipeline, folder = pipelines[kind]
        folder = copied(folder, tmp_path, kind + str(zero))
        edit_json(folder / "model_index.json", **changes)
        net, config = load(str(folder))
        with torch.autocast("cpu", torch.bfloat16):            # as in a training pass, which it does not depend on
            null = net.with_null(torch.zeros(1, config["text_length"], config["encoder_width"][0]))[0]
        pipeline.register_to_config(**changes)
        rows, other = embeddings_of(pipeline, CAPTIONS)[1]
        pipeline.register_to_config(**{key: True for key in changes})
        assert bool(null.any()) != zero
        if kind == "pixart":
            assert null.any(-1).sum() == other[0].sum() == 1 and torch.allclose(null[0], rows[0, 0], atol=1e-5)
        else:
            assert torch.allclose(null[:77], rows[0], atol=1e-5) and torch.allclose(null[77, :20], other[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["pixart", "sdxl"])
def test_embeddings_of_a_pipeline_are_kept_as_those_of_any_encoder(pipelines, kind, captions, capsys):  # noqa
    config = read_checkpoint(pipelines[kind][1])["config"]
    (encoder,) = open_encoders(config["encoder"], config["encoder_weights"], "fp32")
    embed_captions(captions, encoder, "fp32", 3)
    assert f"7 captions of {78.0 if kind == 'sdxl' else 6.9} tokens" in capsys.readouterr().out
    cache = EmbeddingCache(captions, config)
    now = embed_now([captions.text(n) for n in (2, 3, 1)], config | {"encoder_id": cache.id})
    assert torch.allclose(cache([2, 3, 1]), now, atol=1e-5) and now[:2].any(-1).any(-1).all() and not now[2].any()
    assert not cache([-1]).any()                               # the null caption, which the network replaces
    refused(capsys, lambda: open_encoders("pipeline:77", pipelines[kind][1], "fp32"),
            f"take pipeline:{config['text_length']}")          # not after hours


def test_half_precision_where_it_is_asked_for(pipelines):
    for kind in ("pixart", "sdxl"):
        folder = pipelines[kind][1]
        z, level = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, -2.0])
        (net, config), (half, lower) = load(folder), load(folder)
        in_dtype(half, lower, "bf16")
        text, fewer_bits = sampling.encode_captions(CAPTIONS, config), sampling.encode_captions(CAPTIONS, lower)
        assert torch.equal(fewer_bits, fewer_bits.bfloat16().float()) and not torch.equal(text, text.bfloat16().float())
        with torch.no_grad():
            assert 0 < deviation(half(z, level, fewer_bits), net(z, level, text)) < 0.1
        vae = sampling.open_autoencoder(lower).vae
        assert next(vae.parameters()).dtype == torch.float32 and next(half.core.parameters()).dtype == torch.bfloat16


def test_v_prediction_is_taken_as_it_is(pipelines, tmp_path):
    folder = copied(pipelines["sdxl"][1], tmp_path)
    edit_json(folder / SCHEDULER, prediction_type="v_prediction")
    (net, config), (other, _) = load(str(folder)), load(pipelines["sdxl"][1])
    z, level, text = torch.randn(1, 4, 8, 8), torch.tensor([1.0]), sampling.encode_captions(CAPTIONS[:1], config)
    alpha, sigma = alpha_sigma(level)
    with torch.no_grad():
        assert torch.allclose((net(z, level, text) - sigma * z) / alpha, other(z, level, text), atol=1e-5)


def pickle_weights(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    file.unlink()
    torch.save(Trap(), folder / part / "pytorch_model.bin")
    torch.save(Trap(), folder / part / "diffusion_pytorch_model.bin")


def spoil_weights(folder, part, change):
    from safetensors.torch import load_file, save_file
    (file,) = (folder / part).glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


SCHEDULER = "scheduler/scheduler_config.json"
BAD_FOLDERS = [
    ("pixart", lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline: take"),
    ("pixart", lambda f: (f / "model_index.json").write_text("{"), "cannot be read (JSONDecodeError): bring the whole"),
    ("pixart", lambda f: shutil.rmtree(f / "scheduler"), "config.json' cannot be read (FileNotFoundError): bring"),
    ("pixart", lambda f: shutil.rmtree(f / "transformer"), "transformer/config.json' cannot be read"),
    ("sdxl", lambda f: shutil.rmtree(f / "vae"), "vae/config.json' cannot be read"),
    ("sdxl", lambda f: shutil.rmtree(f / "text_encoder_2"), "text_encoder_2/config.json' cannot be read"),
    ("sdxl", lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer' does not open as a tokenizer ("),
    ("sdxl", lambda f: pickle_weights(f, "unet"), "could run code"),
    ("pixart", lambda f: pickle_weights(f, "text_encoder"), "does not open as text_encoder"),
    ("pixart", lambda f: pickle_weights(f, "vae"), "does not open as autoencoder"),
    ("pixart", lambda f: spoil_weights(f, "transformer", lambda w: w.pop("proj_out.bias")), "proj_out.bias is missing"),
    ("sdxl", lambda f: spoil_weights(f, "unet", lambda w: w.update({"conv_in.bias": torch.zeros(3)})),
     "core.conv_in.bias is (3,), not (16,)"),
    ("sdxl", lambda f: spoil_weights(f, "unet", lambda w: w.update(other=torch.zeros(3))),
     "core.other is none of its weights"),
    ("sdxl", lambda f: os.truncate(next((f / "unet").glob("*.safetensors")), 1000), "bring it whole; a few lines"),
    ("sdxl", lambda f: spoil_weights(f, "text_encoder", lambda w: w.pop(sorted(w)[0])), "is missing"),
    ("sdxl", lambda f: spoil_weights(f, "vae", lambda w: w.pop("decoder.conv_in.bias")),
     "conv_in.bias is missing): bring the whole pipeline"),
    ("sdxl", lambda f: edit_json(f / "vae/config.json", latents_mean=[0.0] * 4), "take a pipeline whose autoencoder"),
    ("sdxl", lambda f: edit_json(f / SCHEDULER, prediction_type="sample"), "predicts sample: take"),
    ("sdxl", lambda f: edit_json(f / SCHEDULER, beta_schedule="absent"), "beta_schedule None"),
    ("sdxl", lambda f: edit_json(f / SCHEDULER, rescale_betas_zero_snr=True), "not rescaled"),
    ("sdxl", lambda f: edit_json(f / "model_index.json", text_encoder=["x", "Other"]), "is a Other: take a pipeline")]


@pytest.mark.parametrize("number", range(len(BAD_FOLDERS)))
def test_bad_folders_are_refused_and_nothing_in_them_is_executed(pipelines, number, tmp_path, capsys, monkeypatch):
    kind, spoil, words = BAD_FOLDERS[number]
    folder = copied(pipelines[kind][1], tmp_path)
    spoil(folder)
    monkeypatch.chdir(tmp_path)
    refused(capsys, lambda: everything(folder), "error: ", words)
    assert not os.path.exists("executed")


def test_a_training_refuses_broken_folders_as_plainly(pipelines, tmp_path, capsys):
    """Before its weights or encoders would be used."""
    folder = copied(pipelines["pixart"][1], tmp_path)
    spoil_weights(folder, "transformer", lambda w: w.pop("proj_out.bias"))
    state = read_checkpoint(str(folder))
    refused(capsys, lambda: init_from(state, state["config"], ""), "core.proj_out.bias is only here", "bring them")
    pickle_weights(folder, "text_encoder")
    refused(capsys, lambda: PipelineEncoder(300, str(folder), "fp32").id, "no .safetensors in", "could run code")


def draws(monkeypatch, *words):
    """python sample.py, with these words behind it."""
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, words)])
    sampling.main()


def test_pipelines_are_sampled_and_described_from_the_command_line(pipelines, tmp_path, capsys, monkeypatch):
    for kind, network in (("pixart", "PixArtTransformer2DModel"), ("sdxl", "UNet2DConditionModel")):
        folder, to = pipelines[kind][1], tmp_path / f"{kind}.png"
        draws(monkeypatch, folder, "a red circle", "--n", 2, "--steps", 3, "--sampler", "dpm", "--guidance", 4.5,
              "--size", "16x20", "--to", to)
        assert f"{to}: 2 images of 16x20 px" in capsys.readouterr().out and to.exists()
        draws(monkeypatch, folder, "--describe")
        said = capsys.readouterr().out
        assert network in said and "16 px" in said and "predicts eps" in said and "--sampler dpm" in said
        refused(capsys, lambda: draws(monkeypatch, folder, "a", "--size", "16x17"), "--size 16x17", "multiples of 4")
    refused(capsys, lambda: draws(monkeypatch, folder, "a", "--guidance=-1"), "guidance = -1.0: take at least 0")
    opened, really = [], PipelineEncoder.open                  # also for the null caption
    monkeypatch.setattr(PipelineEncoder, "open", lambda self, part: opened.append(self.dtype) or really(self, part))
    for kind in pipelines:
        draws(monkeypatch, pipelines[kind][1], "a", "--n", 1, "--steps", 2, "--dtype", "bf16", "--to", to)
    assert "sdxl_2.png: 1 images" in capsys.readouterr().out and "fp32" not in opened


def test_pipelines_are_scored_on_captions_from_a_file(pipelines, tmp_path, capsys, monkeypatch):
    (tmp_path / "captions.txt").write_text("a red circle\n\na blue square\n")
    folder, kept = pipelines["pixart"][1], tmp_path / "kept"
    for k in range(3):
        write_png(str(tmp_path / f"{k}.png"), torch.randint(0, 255, (16, 16, 3), dtype=torch.uint8).numpy())
    words = [folder, "--prompts", tmp_path / "captions.txt", "--n", 3, "--steps", 2, "--keep", kept, "--dtype", "bf16"]
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, [*words, "--reference", tmp_path])])
    evaluation.main()
    said = capsys.readouterr().out
    assert "fd_random" in said and "dpm, 2 steps" in said and len(list(kept.glob("*.png"))) == 3
    assert re.search("dtype +bf16", said)


def test_only_what_lies_in_a_pipeline_moves_with_it():
    for path, there in (("a", "b/c"), ("a/vae", "b/c/vae"), ("a/", "b/c/"), ("aa/vae", "aa/vae"), ("x/a", "x/a")):
        assert moved(path, "a", "b/c") == there


def test_an_exported_run_is_the_run_to_the_bit_where_the_run_is_not(tmp_path, capsys, monkeypatch):
    pytest.importorskip("safetensors")
    small = [("width", "32"), ("depth", "2"), ("resolution", "16"), ("grid", "8"), ("scene_native", "16")]
    config = load_config("toy", "pretrain", small)
    torch.manual_seed(0)
    net = build(config)
    weights = net.state_dict()
    trained = {name: torch.randn_like(value) for name, value in list(weights.items())[::2]}        # the rest was frozen
    state = {"format": FORMAT, "name": "toy", "stage": "pretrain", "step": 7, "config": config, "parents": ["x (y)"],
             "model": weights, "ema": trained, "moments": {}}
    os.mkdir(tmp_path / "run")
    torch.save(state, tmp_path / "run/last.pt")
    there, before = load(str(tmp_path / "run"))
    picture = sampling.sample(there, before, ["a red circle"], steps=2)
    said = describe_run(str(tmp_path / "run"))
    draws(monkeypatch, tmp_path / "run", "--export", tmp_path / "out", "--describe")
    assert (shown := capsys.readouterr().out).startswith(said) and "out: " in shown
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert len({os.stat(tmp_path / "out" / name).st_mode for name in os.listdir(tmp_path / "out")}) == 1
    refused(capsys, lambda: draws(monkeypatch, tmp_path / "run", "--export", tmp_path / "out"), "name a new folder")
    shutil.rmtree(tmp_path / "run")
    here, after = load(str(tmp_path / "out"))
    assert after == before and all(torch.equal(v, here.state_dict()[k]) for k, v in there.state_dict().items())
    assert torch.equal(sampling.sample(here, after, ["a red circle"], steps=2), picture)
    assert describe_run(str(tmp_path / "out")) == said and "toy" in said and "step 7" in said
    about = json.loads((tmp_path / "out/config.json").read_text())
    assert about["step"] == 7 and about["config"]["width"] == 32 and "EMA" in about["what"]
    spoil_weights(tmp_path, "out", lambda w: w.pop(sorted(w)[0]))
    refused(capsys, lambda: load(str(tmp_path / "out")), "is missing", "bring them whole")
    edit_json(tmp_path / "out/config.json", format=0)
    refused(capsys, lambda: load(str(tmp_path / "out")), "no export of format", "that with model_index.json")


__all__ = [name for name in globals() if name.startswith("test_")] + ["pipelines"]
