"""pytest lib/test_encoders.py: frozen text encoders, SentencePiece and autoencoders, and what is kept of them."""
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from lib.encoders import (EmbeddingCache, Encoder, SpaceToDepth, concat_spans, embed_captions, embed_now,
                          encoder_identity, has_pretrained_encoder, open_autoencoder, open_encoders, open_pieces,
                          to_pieces)
from lib.settings import UserError

BOTH = "t5-xxl:6,clip-h:5"
CONFIG = {"encoder": BOTH, "encoder_width": (32, 24), "encoder_id": "", "encoder_weights": "", "text_vocab": 99}
PIXELS = {"encoder": "words", "autoencoder": "", "latent_channels": 4, "latent_stride": 8, "latent_scale": 0.13025}


def refused(capsys, action, *words):
    """The action ends with a UserError that holds these words."""
    with pytest.raises(UserError):
        action()
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


class Trap:
    """An object whose unpickling would leave a file behind."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


class Captions:
    """A data set of captions alone."""
    name, fingerprint, prefix = "words", "0123", ""

    def __init__(self, folder, texts):
        self.folder, self.texts, self.captions_count = str(folder), texts, len(texts)

    def text(self, number):
        return self.texts[number] if number >= 0 else ""

    def captions_digest(self):
        return repr(self.texts)


@pytest.fixture
def captions(tmp_path):
    pytest.importorskip("pyarrow")
    return Captions(tmp_path, ["grey level 7", "", "red a b", "grey " * 30, "level", "c 1 2", "9"])


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Folders with a tiny T5, CLIP and ByT5 of random weights, and their tokenizers."""
    library = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    out, known = tmp_path_factory.mktemp("encoders"), "grey level a b c red 0 1 2 3 4 5 6 7 8 9".split()
    words = Tokenizer(models.WordLevel({w: k for k, w in enumerate(["<pad>", "</s>", "<unk>"] + known)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    words = library.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>",
                                            unk_token="<unk>")

    def t5(vocab, seed):
        torch.manual_seed(seed)
        sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        return library.T5EncoderModel(library.T5Config(vocab_size=vocab, **sizes))
    clip = library.CLIPTextModel(library.CLIPTextConfig(
        vocab_size=32, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    nets = {"t5": (t5(32, 0), words), "other": (t5(32, 1), words), "clip": (clip, words),
            "byt5": (t5(384, 2), library.ByT5Tokenizer())}
    for name, (net, tokenizer) in nets.items():
        net.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    return out


def folders(encoders, *names):
    return ",".join(str(encoders / name) for name in names)


def embed_all(captions, encoders, which=BOTH, names=("t5", "clip"), dtype="fp32", batch=3):
    for encoder in open_encoders(which, folders(encoders, *names), dtype):
        embed_captions(captions, encoder, dtype, batch)


def test_cached_embeddings_are_those_of_the_encoders_with_nothing_in_the_padding(captions, encoders, capsys):
    embed_all(captions, encoders)
    assert "7 captions of 3.1 tokens" in capsys.readouterr().out
    cache, numbers = EmbeddingCache(captions, CONFIG), [3, 0, -1, 1, 2, 0]
    text = cache(numbers)
    assert text.shape == (6, 11, 32) and text.dtype == torch.float32
    weights = folders(encoders, "t5", "clip")
    now = embed_now([captions.text(n) for n in numbers], CONFIG | {"encoder_weights": weights, "encoder_id": cache.id})
    assert torch.allclose(text, now, atol=1e-5)
    tokens = open_encoders(BOTH, weights, "fp32")[0].tokenizer("grey level 7", return_tensors="pt")
    net = pytest.importorskip("transformers").T5EncoderModel.from_pretrained(encoders / "t5").eval()
    assert torch.allclose(text[1, :4], net(**tokens).last_hidden_state[0], atol=1e-5)
    for row, n in zip(text.any(-1), (6, 4, 0, 0, 4, 4)):       # words and </s>
        assert row.tolist() == [True] * n + [False] * (6 - n) + [True] * min(n, 5) + [False] * (5 - min(n, 5))
    assert not text[:, 6:, 24:].any()                          # CLIP is narrower
    assert cache.numbers == {"grey level 7": 0, "": -1, "red a b": 2, "grey " * 30: 3, "level": 4, "c 1 2": 5, "9": 6}


def test_spans_follow_each_other():
    a, b = [torch.ones(2, 3), torch.zeros(0, 3)], [2 * torch.ones(1, 4), 3 * torch.ones(2, 4)]
    text = concat_spans([a, b], [3, 2])
    assert text.shape == (2, 5, 4) and not text[:, :3, 3].any()
    assert text[:, :, 0].tolist() == [[1, 1, 0, 2, 0], [0, 0, 0, 3, 3]]


def test_embeddings_of_another_encoder_are_refused_with_both_names(captions, encoders, capsys):
    refused(capsys, lambda: EmbeddingCache(captions, CONFIG), "no embeddings by t5-xxl:6: python data.py embed words")
    embed_all(captions, encoders)
    name = EmbeddingCache(captions, CONFIG).id
    assert re.fullmatch(r"t5-xxl fp32 \w{16}, clip-h fp32 \w{16}", name)
    assert encoder_identity(CONFIG | {"encoder_weights": folders(encoders, "t5", "clip")}) == name
    stranger = "t5-xxl fp32 0123456789abcdef"
    refused(capsys, lambda: EmbeddingCache(captions, CONFIG | {"encoder_id": stranger}), stranger, name)
    other = CONFIG | {"encoder_id": name, "encoder_weights": folders(encoders, "other", "clip")}
    refused(capsys, lambda: embed_now(["grey"], other), name, "encoder_weights holds t5-xxl fp32")
    refused(capsys, lambda: EmbeddingCache(captions, CONFIG | {"encoder_width": (32, 32)}), "(32, 24) wide")
    refused(capsys, lambda: EmbeddingCache(captions, CONFIG | {"encoder": "t5-xl:128"}), "did you mean 't5-xxl'")
    refused(capsys, lambda: open_encoders("t5-xxl:x", "folder", "fp32"), "say how many tokens")
    refused(capsys, lambda: open_encoders(BOTH, "folder", "fp32"), "2 encoders", "1 folders")
    refused(capsys, lambda: embed_all(captions, encoders, names=("other", "clip")), "made otherwise")
    captions.texts = ["other words"] * 7
    refused(capsys, lambda: EmbeddingCache(captions, CONFIG), "other captions than the index")


def test_half_precision_is_kept_as_it_came(captions, encoders):
    embed_all(captions, encoders, "byt5:12", ["byt5"], "bf16")
    cache = EmbeddingCache(captions, CONFIG | {"encoder": "byt5:12", "encoder_width": (32,)})
    direct = open_encoders("byt5:12", folders(encoders, "byt5"), "bf16")[0](captions.texts[:3])    # as the first batch
    assert cache.id.startswith("byt5 bf16 ")
    assert all(torch.equal(t[:len(d)], d.float()) for t, d in zip(cache(range(3)), direct))


def test_embeddings_that_are_not_finite_are_refused_by_name(captions, encoders, capsys):
    weight = open_encoders("t5-xxl:6", folders(encoders, "t5"), "fp32")[0].net.shared.weight.data
    grey = weight[3].clone()
    weight[3] = float("nan")
    refused(capsys, lambda: embed_all(captions, encoders, "t5-xxl:6", ["t5"]), "not finite for caption 0, 'grey level")
    weight[3] = grey
    config = CONFIG | {"encoder": "t5-xxl:6", "encoder_width": (32,)}
    refused(capsys, lambda: EmbeddingCache(captions, config), "has no embeddings")
    embed_all(captions, encoders, "t5-xxl:6", ["t5"])
    assert EmbeddingCache(captions, config)([0]).isfinite().all()


def test_encoders_come_from_complete_local_folders_without_pickles(encoders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(capsys, lambda: Encoder("t5-xxl", 6, str(tmp_path), "fp32"), "no encoder t5-xxl", "google/t5-v1_1-xxl")
    shutil.copytree(encoders / "t5", tmp_path / "t5")
    torch.save(Trap(), tmp_path / "t5" / "pytorch_model.bin")
    (tmp_path / "t5" / "model.safetensors").unlink()
    refused(capsys, lambda: Encoder("t5-xxl", 6, str(tmp_path / "t5"), "fp32"), "does not open", ".safetensors")
    assert not os.path.exists("executed")


def test_pieces_of_sentencepiece(tmp_path, capsys):
    library = pytest.importorskip("sentencepiece")
    file = tmp_path / "v.model"
    with open(file, "wb") as f:
        texts = iter([f"grey level {k}" for k in range(24)])
        library.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=f, vocab_size=60,
                                           hard_vocab_limit=False, minloglevel=2)
    pieces = library.SentencePieceProcessor(model_file=str(file))
    config = CONFIG | {"encoder": f"sentencepiece:{file}"}
    rows = to_pieces(["grey level 7", ""], config)
    assert pieces.decode([t - 1 for t in rows[0]]) == "grey level 7" and min(rows[0]) > 0 and rows[1] == []
    assert encoder_identity(config) == open_pieces(str(file), 99)[1] and not has_pretrained_encoder(config["encoder"])
    refused(capsys, lambda: to_pieces(["x"], config | {"text_vocab": 9}), f"text_vocab = {pieces.get_piece_size() + 1}")
    other = config | {"encoder_id": "sentencepiece 0000"}
    refused(capsys, lambda: to_pieces(["x"], other), "sentencepiece 0000", encoder_identity(config))
    file.write_bytes(b"not a model")
    open_pieces.cache_clear()
    refused(capsys, lambda: to_pieces(["x"], config), "does not open as a SentencePiece model", "data.py vocabulary")


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL with random weights, made here and saved as diffusers does: the settings that it needs."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
                            sample_size=32, scaling_factor=0.5).save_pretrained(folder)
    return [("autoencoder", str(folder)), ("latent_stride", "2"), ("latent_scale", "0.5")]


def test_latents_of_an_autoencoder_are_its_scaled_mean_and_decode_in_tiles(vae, capsys):
    from diffusers import AutoencoderKL
    config = PIXELS | {"autoencoder": vae[0][1], "latent_stride": 2, "latent_scale": 0.5}
    opened, plain = open_autoencoder(config), AutoencoderKL.from_pretrained(vae[0][1], low_cpu_mem_usage=False).eval()
    x = torch.rand(2, 3, 32, 24) * 2 - 1
    with torch.no_grad():
        mean = plain.encode(x).latent_dist.mean
        assert torch.allclose(opened.encode(x), 0.5 * mean, atol=1e-6)
        assert torch.allclose(opened.decode(0.5 * mean), plain.decode(mean).sample.clamp(-1, 1), atol=1e-6)
        large = torch.randn(1, 4, 40, 48)                      # tiles are 16 latents wide
        assert opened.decode(large).shape == (1, 3, 80, 96)
        whole = plain.decode(large / 0.5).sample.clamp(-1, 1)
        assert not torch.allclose(opened.decode(large), whole, atol=1e-5)
    latents = mean.requires_grad_()                            # `pixels` has gradients, in the latents alone
    opened.pixels(latents).square().sum().backward()
    assert latents.grad.abs().min() > 0 and not any(p.grad is not None for p in opened.vae.parameters())
    assert torch.equal(opened.pixels(latents).clamp(-1, 1), opened.decode(latents))
    refused(capsys, lambda: open_autoencoder(config | {"latent_scale": 0.13025}), "set latent_scale = 0.5")
    refused(capsys, lambda: open_autoencoder(config | {"latent_channels": 8}), "set latent_channels = 4")
    refused(capsys, lambda: open_autoencoder(config | {"autoencoder": "/nowhere"}), "no autoencoder in '/nowhere'")


def test_without_diffusers_latents_say_what_to_install(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(capsys, lambda: open_autoencoder(PIXELS | {"autoencoder": str(tmp_path)}), "pip install diffusers")


def test_space_to_depth_loses_nothing_and_pixels_stay_as_they_are(capsys):
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    config = {"autoencoder": "space_to_depth", "latent_channels": 12, "latent_stride": 2, "latent_scale": 0.7}
    opened, pixels = open_autoencoder(config), open_autoencoder(PIXELS)
    assert isinstance(opened, SpaceToDepth) and opened.encode(x).shape == (2, 12, 8, 12)
    assert torch.allclose(opened.decode(opened.encode(x)), x, atol=1e-6)
    assert torch.equal(pixels.encode(x), x) and torch.equal(pixels.decode(x), x)
    refused(capsys, lambda: open_autoencoder(config | {"latent_channels": 4}), "set latent_channels = 12")


__all__ = [name for name in globals() if name.startswith("test_")] + ["captions", "encoders", "folders", "vae"]
