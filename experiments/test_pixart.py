"""pytest experiments/test_pixart.py: PixArt-Sigma's weights in our own core, equal to diffusers' own network."""
import os
import re
import shutil

import numpy as np
import pytest
import torch

import sample as sampling
from experiments import pixart
from lib.pictures import write_png
from lib.published import pipeline_config
from lib.settings import load_config
from lib.test_published import (CAPTIONS, deviation, edit_json, embeddings_of, noise_of, picture_of_ours,  # noqa
                                picture_of_pipeline, pipelines, spoil_weights)
from lib.test_scripts import run
from lib.timesteps import logsnr_table
from model import alpha_sigma, load, read_checkpoint

# transformer/config.json of the published model of 1024 px, as far as it decides the network
PUBLISHED = dict(num_attention_heads=16, attention_head_dim=72, num_layers=28, sample_size=128, patch_size=2,
                 caption_channels=4096, interpolation_scale=2, use_additional_conditions=False)


@pytest.fixture(scope="session")
def own(pipelines, tmp_path_factory):  # noqa
    """An export with the weights of a tiny PixArt-Sigma, and what the command printed."""
    to = tmp_path_factory.mktemp("own") / "export"
    said = run(os.path.join("experiments", "pixart.py"), pipelines["pixart"][1], "--to", to)
    return str(to), said


def test_in_our_core_the_velocity_is_that_of_diffusers_own_network(pipelines, own):  # noqa
    """At levels of their own timesteps, with captions and without, of another shape."""
    (pipeline, _), (net, config) = pipelines["pixart"], load(own[0])
    text, table = sampling.encode_captions(CAPTIONS, config), logsnr_table(0.0001, 0.02, 1000)
    positive, negative = embeddings_of(pipeline, CAPTIONS)
    for t in (999, 731, 500, 20, 0):
        z, logsnr = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(t)), table[t].float()
        for tokens, theirs in ((text, positive), (torch.zeros_like(text), negative)):
            with torch.no_grad():
                alpha, sigma = alpha_sigma(logsnr)
                v = (noise_of(pipeline, z, torch.tensor(t), theirs, None) - sigma * z) / alpha
                assert (net(z, logsnr.expand(2), tokens) - v).abs().max() < 1e-5 * v.std(), t


def test_in_our_core_pictures_are_those_of_the_pipeline_and_its_steps_are_the_default(pipelines, own, tmp_path):  # noqa
    (pipeline, _), (folder, said) = pipelines["pixart"], own
    worst = float(said.partition("differs by ")[2].split()[0])
    assert worst < 1e-5
    theirs, noise, timesteps = picture_of_pipeline(pipeline, "DPMSolverMultistepScheduler", num_inference_steps=10)
    table = logsnr_table(0.0001, 0.02, 1000).float()
    ours = picture_of_ours(folder, noise, "dpm", lambda net, config: table[timesteps.long()])
    assert deviation(ours, theirs) < 1e-4
    assert "patch" in run("sample.py", folder, "--describe") and load(folder)[1]["pipeline"] == ""
    for name, words in (("own", []), ("same", ["--sampler", "dpm", "--steps", 20]), ("fewer", ["--steps", 10])):
        run("sample.py", folder, CAPTIONS[0], "--n", 1, "--to", tmp_path / f"{name}.png", *words)
    own_, same, fewer = ((tmp_path / f"{name}.png").read_bytes() for name in ("own", "same", "fewer"))
    assert own_ == same != fewer


def test_an_export_says_what_it_needs_and_finds_it_where_it_was_put(pipelines, own, tmp_path):  # noqa
    """Encoders and autoencoder are the pipeline's; pictures are drawn by its settings, not by 256 steps of ddpm."""
    origin, there = shutil.copytree(pipelines["pixart"][1], tmp_path / "origin"), tmp_path / "there"
    script = os.path.join("experiments", "pixart.py")
    assert f"encoders and autoencoder stay in {origin}:" in run(script, origin, "--to", there)
    said = run("sample.py", there, "--describe")
    assert f"needs  {origin}, for its" in said and f"parent {origin} (published, step 0)" in said
    assert not re.search("^data ", said, re.M)                 # which is not ours
    words = "sample.py", "a red circle", "--n", 1, "--to", tmp_path / "a.png"
    assert "is there and not empty: name a new folder" in run(script, origin, "--to", there, code=2)
    os.rename(origin, there / "pipeline")
    run(*words[:1], there, *words[1:])
    state = read_checkpoint(str(there))
    assert state["config"]["encoder_weights"] == str(there / "pipeline")
    drawn = sampling.sample(*load(own[0]), ["a red circle"], steps=20, sampler="dpm")
    write_png(str(tmp_path / "b.png"), sampling.make_grid(sampling.to_uint8(drawn), 1))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_published_model_fits_the_posters_rows(pipelines, tmp_path):  # noqa
    """Sizes and conventions are those of the presets that go on from it, with the merge and without."""
    folder = str(shutil.copytree(pipelines["pixart"][1], tmp_path / "copy"))
    edit_json(tmp_path / "copy/transformer/config.json", **PUBLISHED)
    edit_json(tmp_path / "copy/vae/config.json", block_out_channels=[128, 256, 512, 512], scaling_factor=0.13025)
    edit_json(tmp_path / "copy/text_encoder/config.json", d_model=4096)
    config = pixart.own_config(pipeline_config(folder))
    for name in ("pixart-sigma-1k", "pixart-sigma-1k-kv"):
        preset = load_config(name, "defrost")
        for key in ("width", "depth", "heads", "mlp_ratio", "shell", "patch", "prediction", "pixart_core",
                    "resolution", "noise_base_resolution", "latent_channels", "latent_stride",
                    "latent_scale", "text_length", "encoder_width", "weighting", "guidance", "sampler"):
            assert config[key] == preset[key], key
        for key in ("logsnr_min", "logsnr_max"):
            assert abs(config[key] - preset[key]) < 0.01


def test_the_posters_rows_go_on_from_it_with_a_merge_of_keys_and_values(pipelines, own, tmp_path):  # noqa
    """
    Trained by train.py with the preset of a kv row, made as small; the merge starts as the mean. Encoders and
    autoencoder are those of its pipeline without a flag, and captions that others embedded are refused.
    """
    pytest.importorskip("pyarrow"), pytest.importorskip("PIL")
    data, origin = tmp_path / "data", pipelines["pixart"][1]
    data.mkdir()
    for k in range(4):
        write_png(str(data / f"{k}.png"), np.full((16, 16, 3), 60 * k, np.uint8))
        (data / f"{k}.txt").write_text(CAPTIONS[k % 2])
    run("data.py", "index", data)
    run("data.py", "embed", data, "--encoder", "pipeline:300", "--weights", origin)
    small = dict(width=32, depth=2, heads=2, encoder_width="(32,)", resolution=16, noise_base_resolution=16, batch=4,
                 latent_stride=2, latent_scale=0.18215, kv_merge_layers=1, steps=2, workers=0, eval_n=0, sample_every=0,
                 checkpointing=False, caption_dropout=0.5)
    words = ("train.py", "--config", "pixart-sigma-1k-kv", "--stage", "defrost", "--core", own[0], "--data", data,
             "--out", tmp_path, *(f"--{key}={value}" for key, value in small.items()))
    said = run(*words)
    assert "4 new" in said and "KV merge by 2, blocks 1, as the mean" in said
    (net, config), (before, _) = load(str(tmp_path / "pixart-sigma-1k-kv/defrost")), load(own[0])
    assert config["encoder_weights"] == origin and config["autoencoder"] == os.path.join(origin, "vae")
    assert config["kv_merge"] == 2 and net.core.blocks[1].self_attention.r == 2
    assert not torch.equal(net.core.text.null, before.core.text.null)              # the null caption is learned too
    run(*words[:4], "hold", "--core", tmp_path / "pixart-sigma-1k-kv/defrost", *words[7:])         # its core frozen
    held = load(str(tmp_path / "pixart-sigma-1k-kv/hold"))[1]
    assert all(held[key] == config[key] for key in ("encoder", "encoder_weights", "autoencoder"))
    other = shutil.copytree(origin, tmp_path / "other")
    spoil_weights(other, "text_encoder", lambda w: w.update({key: value + 1 for key, value in w.items()}))
    assert "the captions were embedded by" in run(*words, "--encoder_weights", other, "--fresh", code=2)
    next(data.rglob("pipeline-300.arrow")).unlink()            # nor do those fit that its own encoders embed
    run("data.py", "embed", data, "--encoder", "pipeline:300", "--weights", other)
    assert f"--weights {origin}" in run(*words, "--encoder_weights", "", "--fresh", code=2)


@pytest.mark.parametrize("change, words", [
    (lambda f: edit_json(f / "transformer/config.json", interpolation_scale=1), "over 4 units a side"),
    (lambda f: edit_json(f / "transformer/config.json", use_additional_conditions=True), "is told sizes"),
    (lambda f: edit_json(f / "transformer/config.json", use_additional_conditions=None, sample_size=128,
                         interpolation_scale=2), "is told sizes"),
    (lambda f: edit_json(f / "transformer/config.json", norm_eps=0.1), "is not quite ours: take a PixArt-Sigma whose"),
    (lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_end=0.012), "is not PixArt-Sigma's: take one of"),
    (lambda f: spoil_weights(f, "transformer", lambda w: w.update(q=w["proj_out.bias"] + 1)), "core.q is none of its"),
    (lambda f: spoil_weights(f, "transformer", lambda w: w.pop("proj_out.bias")), "proj_out.bias is missing")])
def test_what_is_no_pixart_sigma_is_refused(pipelines, change, words, tmp_path):  # noqa
    folder, to = shutil.copytree(pipelines["pixart"][1], tmp_path / "copy"), tmp_path / "own"
    change(folder)
    said = run(os.path.join("experiments", "pixart.py"), folder, "--to", to, code=2)
    assert words in said and not to.exists()


def test_other_folders_are_refused_and_stages_that_cannot_take_it(pipelines, own, tmp_path):  # noqa
    said = run("train.py", "--stage", "grow", "--core", own[0], "--data", tmp_path, "--out", tmp_path, code=2)
    assert "is a published run and grow takes the core of a pretrain run" in said  # before data are looked at
    script = os.path.join("experiments", "pixart.py")
    said = run(script, pipelines["sdxl"][1], "--to", tmp_path / "own", code=2)
    assert "is no PixArt-Sigma: only that has a core of ours" in said
    assert "is no pipeline: name a whole folder" in run(script, tmp_path, "--to", tmp_path / "own", code=2)
