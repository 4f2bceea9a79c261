"""
Networks as measures: tiny ones with random weights, built here, against the plain forward of the library they come
from.
"""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import networks
from lib.files import file_hash
from lib.networks import CLIP, IMAGENET, hub_positions, open_network, open_vqa, random_features, resize
from lib.settings import UserError

SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def tiny_dino(folder):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518,
                                       patch_size=14, initializer_range=0.5)
    net = transformers.Dinov2Model(config).eval()
    net.save_pretrained(folder)
    return net


def tiny_clip(folder):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = dict(SIZES, vocab_size=600, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = dict(SIZES, image_size=28, patch_size=14, projection_dim=12)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    net = transformers.CLIPModel(config).eval()
    net.save_pretrained(folder)
    return net


def tiny_blip(folder):
    """BLIP with random weights and a vocabulary of a few words."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "yes", "no", "is", "there", "a", "fox", "sea", "?"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = dict(SIZES, projection_dim=8, initializer_range=0.5)
    tokens = dict(vocab_size=len(words), bos_token_id=4, eos_token_id=3, sep_token_id=3, pad_token_id=0)
    text = dict(sizes, **tokens, max_position_embeddings=32, encoder_hidden_size=16)
    vision = dict(sizes, image_size=32, patch_size=16)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, initializer_range=0.5)
    net = transformers.BlipForQuestionAnswering(config).eval()
    net.save_pretrained(folder)
    return net


def random_images(n, height, width):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def prepared(levels, statistics):
    """(n, 3, H, W) in [0, 255] -> as a network of these mean and std takes it, written out once more."""
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in statistics)
    return (levels / 255 - mean) / std


@pytest.mark.parametrize("size", [(24, 24), (64, 64), (224, 224), (30, 50)])
def test_resize_is_that_of_pillow(size):
    pillow = pytest.importorskip("PIL.Image")

    def theirs(picture):
        return np.asarray(pillow.fromarray(picture).resize(size[::-1], pillow.Resampling.BICUBIC))
    coarse = 40 + 170 * torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (64, 64), mode="bilinear")
    for c, ours in enumerate(resize(smooth, size)[0]):         # pillow is exact on floats, its uint8 rounds twice
        assert np.abs(ours.numpy() - theirs(smooth[0, c].numpy()).clip(0, 255)).max() < 1e-3
    levels = smooth.round().byte()
    ours = resize(levels, size)[0].permute(1, 2, 0).round().numpy()
    assert np.abs(ours - theirs(levels[0].permute(1, 2, 0).numpy())).max() <= 1
    edge = torch.cat([torch.zeros(1, 3, 8, 4), torch.ones(1, 3, 8, 4)], 3)         # bicubic overshoots a step
    assert resize(edge, 32).max() == 1 and resize(255 * edge, 32).max() == 255


@pytest.mark.parametrize("images, size, words", [
    (torch.rand(1, 3, 8, 8) * 2 - 1, 4, "x \\+ 1"), (torch.rand(1, 3, 8, 8) + 255, 4, "must lie"),
    (torch.full((1, 3, 8, 8), float("nan")), 4, "must lie"), (torch.rand(3, 8, 8), 4, "expected images"),
    (torch.rand(1, 1, 8, 8), 4, "expected images"), (torch.rand(0, 3, 8, 8), 4, "expected"),
    (torch.rand(1, 3, 8, 8), 0, "size")])
def test_images_that_cannot_be_resized_are_refused(images, size, words):
    with pytest.raises(ValueError, match=words):
        resize(images, size)


def test_random_features_are_fixed_and_see_colour():
    images = random_images(3, 16, 16)
    x, (features, about) = random_features(images), open_network("random", None, "cpu")
    assert x.shape == (3, 64) and x.dtype == torch.float64 and torch.equal(features(images[1:]), x[1:])
    assert len(about["sha256"]) == 64 and not torch.allclose(random_features(images[..., ::-1]), x, atol=1e-3)


def test_dino_positions_are_sampled_as_torch_hub_does():
    table = torch.randn(1, 1 + 37 * 37, 2, generator=torch.Generator().manual_seed(0))
    ours = hub_positions(table, 16)
    places = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5        # the hub's scale is 16.1 / 37
    d = (places[:, None] - torch.arange(37)).abs()             # (16, 37)
    outer = -0.75 * (d ** 3 - 5 * d ** 2 + 8 * d - 4)          # the cubic kernel with a = -0.75
    cubic = torch.where(d <= 1, 1.25 * d ** 3 - 2.25 * d ** 2 + 1, torch.where(d < 2, outer, 0))
    exact = torch.einsum("ip,jq,pqc->ijc", cubic, cubic, table[0, 1:].view(37, 37, 2))
    assert ours.shape == (1, 257, 2) and torch.equal(ours[0, 0], table[0, 0])
    assert torch.allclose(ours[0, 1:].view(16, 16, 2)[1:-1, 1:-1], exact[1:-1, 1:-1], atol=1e-4)
    assert torch.equal(hub_positions(table, 37), table)


@torch.no_grad()
def test_dino_features_are_the_class_token_of_the_fixed_network(tmp_path):
    net, images = tiny_dino(tmp_path), random_images(3, 40, 60)
    features, about = open_network("dino", str(tmp_path), "cpu")
    x = prepared(resize(torch.from_numpy(images).permute(0, 3, 1, 2), 224).round(), IMAGENET)  # squashed
    ours, plain = features(images), net(x).last_hidden_state[:, 0]
    token, table = net.embeddings.position_embeddings.split([1, 37 * 37], 1)
    hub = F.interpolate(table.view(1, 37, 37, 16).permute(0, 3, 1, 2), scale_factor=(16.1 / 37,) * 2, mode="bicubic")
    net.embeddings.interpolate_pos_encoding = lambda *_: torch.cat([token, hub.flatten(2).mT], 1)
    assert torch.allclose(ours, net(x).last_hidden_state[:, 0], atol=1e-6)
    assert not torch.allclose(ours, plain, atol=1e-4)
    assert about["sha256"] == file_hash(str(tmp_path / "model.safetensors")) and "published: 1024" in about["network"]


@torch.no_grad()
def test_clip_features_have_length_one_and_the_size_of_the_model(tmp_path):
    net, images = tiny_clip(tmp_path), random_images(2, 28, 36)
    features, about = open_network("clip", str(tmp_path), "cpu")
    square = torch.from_numpy(images[:, :, 4:32]).permute(0, 3, 1, 2)              # already of the model's size
    theirs = net.get_image_features(pixel_values=prepared(square, CLIP))
    theirs = F.normalize(getattr(theirs, "pooler_output", theirs), dim=1)          # transformers 4: a tensor
    assert torch.allclose(features(images), theirs, atol=1e-5) and "to 28," in about["resize"]


def test_captions_meet_their_images_in_clip(tmp_path):
    net = tiny_clip(tmp_path)
    features, _ = open_network("clip", str(tmp_path), "cpu")
    with pytest.raises(UserError):
        features(["a circle"])                                 # no tokenizer in the folder
    letters = [chr(c) for c in range(97, 123)]
    words = {w: i for i, w in enumerate(["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    import transformers
    transformers.CLIPTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with torch.no_grad():
        ours = features(["a circle", "abc " * 200])            # the second is cut
        tokens = [0] + [words[w] for w in ["a</w>", *"circl", "e</w>"]] + [1]
        theirs = F.normalize(net.text_projection(net.text_model(torch.tensor([tokens])).pooler_output), dim=1)
    assert ours.shape == (2, 12) and torch.allclose(ours[0], theirs[0], atol=1e-5)


def refusal(capsys, name, path):
    """What is printed when this network is refused these weights."""
    with pytest.raises(UserError):
        open_network(name, path and str(path), "cpu")
    return capsys.readouterr().err


def test_weights_are_refused_unless_whole_and_known(tmp_path, capsys):
    file = tmp_path / "dino/model.safetensors"
    assert "dino: no weights, and" in refusal(capsys, "dino", None)
    assert "nothing is downloaded" in refusal(capsys, "clip", tmp_path / "none")
    (tmp_path / "inception.pt").write_bytes(b"not the network")
    assert "is not the network of FID" in refusal(capsys, "inception", tmp_path / "inception.pt")
    tiny_dino(tmp_path / "dino")
    assert "of type dinov2" in refusal(capsys, "clip", tmp_path / "dino")
    safetensors = pytest.importorskip("safetensors.torch")
    weights = safetensors.load_file(file)
    del weights["layernorm.weight"]
    safetensors.save_file(weights, file, metadata={"format": "pt"})
    assert "lacks 1 weights" in refusal(capsys, "dino", tmp_path / "dino")
    file.write_bytes(b"cut off")
    assert "cannot be loaded" in refusal(capsys, "dino", tmp_path / "dino")


class Inception(torch.nn.Module):
    """In place of FID's network: features are the mean colour, and the class is that of the brightest channel."""

    def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        colour = x.float().mean((2, 3))
        return colour if return_features else (1e3 * (colour - int(no_output_bias))).softmax(1)


def stand_in_for_inception(folder, monkeypatch):
    """The file of such a network, which passes for the known one."""
    file = str(folder / "inception.pt")
    torch.jit.script(Inception()).save(file)
    monkeypatch.setattr(networks, "INCEPTION", file_hash(file))
    return file


def test_the_inception_file_gets_whole_levels_and_gives_its_features(tmp_path, monkeypatch):
    file, images = stand_in_for_inception(tmp_path, monkeypatch), np.full((2, 8, 8, 3), 200, np.uint8)
    images[..., 1] = 203
    features, about = open_network("inception", file, "cpu")
    assert torch.equal(features(images), torch.tensor([[200., 203, 200]] * 2)) and "TensorFlow 1" in about["resize"]
    logits, _ = open_network("logits", file, "cpu")
    assert (logits(images).argmax(1) == 1).all() and logits(images).isfinite().all()


def test_a_network_answers_questions_about_pictures(tmp_path):
    net, image = tiny_blip(tmp_path / "blip"), random_images(1, 32, 48)[0]
    ask, about = open_vqa(str(tmp_path / "blip"), "cpu")
    x = prepared(resize(torch.from_numpy(image)[None].permute(0, 3, 1, 2), 32).round(), CLIP)
    tokens = torch.tensor([[2, 7, 8, 9, 10, 12, 3]])           # is there a fox ?
    answer = net.generate(input_ids=tokens, attention_mask=torch.ones(1, 7), pixel_values=x, max_new_tokens=10)
    words = (tmp_path / "blip/vocab.txt").read_text().split()
    assert ask(image, "Is there a fox?").split() == [words[t] for t in answer[0] if t not in (0, 2, 3)]
    assert len(about["sha256"]) == 64
