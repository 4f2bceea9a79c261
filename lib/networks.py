"""
Networks that others trained, as measures: images (n, H, W, 3) uint8 -> features (n, D), and a question -> an answer.

    features, about = open_network("dino", "weights/dinov2-large", "cuda")         # or random, inception, logits, clip
    x = features(images)                                                           # (n, 1024), on that device
    ask, about = open_vqa("weights/blip-vqa", "cuda")
    ask(image, "Is there a fox?")                                                  # "yes"

Only local files are read. One that is absent, of another network, or lacks a single weight is refused: a network never
gets random weights under a real name. Each network gets its images as the code of its paper prepared them, since
figures depend on that as much as on the weights; `about` says how, with the hash of the weights. Sources are named at
each network.

B or n images, H W height and width in pixels, D features. With `random` nothing needs to be installed.
"""
import hashlib
import os

import torch
import torch.nn.functional as F

from lib.files import file_hash, import_extra
from lib.pictures import to_tensor
from lib.settings import UserError, parse_words

# NVIDIA's TorchScript copy of FID's network (TensorFlow, 2015-12-05): it resizes to 299 itself, as TensorFlow 1 did
INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SOURCES = {"inception": "NVIDIA's inception-2015-12-05.pt there, and give --weights FILE",
           "dinov2": "config.json and model.safetensors of facebook/dinov2-large there, and give --weights FOLDER",
           "clip": "all files of openai/clip-vit-large-patch14-336 there (224 px: -patch14), and give --weights FOLDER",
           "blip": "all files of Salesforce/blip-vqa-capfilt-large there, and give --vqa FOLDER"}
SOURCE_OF = {"inception": "inception", "logits": "inception", "dino": "dinov2", "clip": "clip"}      # by name
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)        # mean and std of pixels, as each network was trained
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# ---------------------------------------------------------------------------------------------------------------
# Images as networks want them


def resize(images, size):
    """
    (B, 3, H, W) in [0, 255], or floats in [0, 1], -> (B, 3, size, size) or (B, 3, *size) float. Bicubic with a = -0.5
    and antialias, as pillow's BICUBIC on floats: without antialias torch takes a = -0.75, another picture even when
    enlarging. The overshoot is clamped to the range; nothing is rounded (pillow on uint8 rounds after each axis).
    ValueError for others.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)                  # height, width
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel() or min(size) < 1:
        raise ValueError(f"expected images (B, 3, H, W) and a size of at least 1, not {tuple(images.shape)} and {size}")
    x = images if images.is_floating_point() else images.float()                   # uint8 has no interpolation
    if not (x.min() >= 0 and x.max() <= 255):                  # a NaN fails both
        raise ValueError("values must lie in [0, 1] or [0, 255]; an x in [-1, 1] needs (x + 1) / 2 first")
    top = 1 if images.is_floating_point() and x.max() <= 1 else 255
    return F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, top)


def to_square(images, side, crop):
    """
    (n, H, W, 3) uint8 -> (n, 3, side, side) in whole levels, as pillow makes them: the centre square if `crop`, else
    squashed.
    """
    _, h, w, _ = images.shape
    s = min(h, w)                                              # side of the centre square
    if crop:
        images = images[:, (h - s) // 2:(h - s) // 2 + s, (w - s) // 2:(w - s) // 2 + s]
    return resize(torch.tensor(images).permute(0, 3, 1, 2), side).round()          # (n, 3, side, side)


def normalised(images, side, statistics, crop=False):
    """to_square, with the mean and std that a network was trained with: (n, 3, side, side)."""
    mean, std = (torch.tensor(s)[:, None, None] for s in statistics)               # (3, 1, 1) each
    return (to_square(images, side, crop) / 255 - mean) / std


# ---------------------------------------------------------------------------------------------------------------
# Networks that turn images into features


def random_layers(seed=0):
    """
    Three 3x3 convolutions, weights normal(0, 2 / fan_in): the draws of torch's own generator, on which all figures
    rest.
    """
    generator = torch.Generator().manual_seed(seed)            # the same on every machine
    sizes = (3, 16), (16, 32), (32, 32)                        # channels in, channels out
    return [torch.randn(o, i, 3, 3, generator=generator) * (2 / (9 * i)) ** 0.5 for i, o in sizes]


def random_features(images, seed=0):
    """
    (n, H, W, 3) uint8 -> (n, 64) float64 from a fixed random network: three convolutions of stride 2 with ReLU, then
    mean and spread of 32 channels over space. Sees colour, edges, layout statistics; its numbers depend on the size of
    the images.
    """
    layers, rows = random_layers(seed), []
    for chunk in to_tensor(images).split(256):                 # (B, 3, H, W) in [-1, 1]
        for layer in layers:
            chunk = F.relu(F.conv2d(chunk, layer, stride=2, padding=1))            # (B, c, H/2, W/2)
        rows.append(torch.cat([chunk.mean((2, 3)), chunk.std((2, 3))], 1))         # (B, 64)
    return torch.cat(rows).double()


def open_network(name, weights, device):
    """
    (features, about): a function from (n, H, W, 3) uint8 to (n, D), and what a result must say about it. `name` is
    random, inception, logits (those of inception), dino or clip; `weights` a local file or folder. UserError where it
    is absent, of another network, or lacks a tensor.
    """
    if name == "random":
        weights = b"".join(w.numpy().tobytes() for w in random_layers())
        about = {"network": "random: three convolutions, seed 0", "sha256": hashlib.sha256(weights).hexdigest(),
                 "resize": "none", "range": "[-1, 1]"}         # the hash tells a new torch that draws other numbers
        return random_features, about
    digest = require_weights(f"--features {name}", weights, SOURCE_OF[name])
    if SOURCE_OF[name] == "inception" and digest != INCEPTION:     # torchvision's, for one, gives others
        raise UserError(f"{weights!r} is not the network of FID, sha256 {INCEPTION}: put {SOURCES['inception']}")
    features, about = OPEN[name](weights, device)
    return features, about | {"sha256": digest}


def open_networks(names, weights, logits, device):
    """
    {name: open_network} of --features and --weights, comma-separated in the same order; `random` has none. With
    "logits" where the Inception score asks for them.
    """
    names = parse_words(names, ["random", "inception", "dino", "clip"], "--features")        # in the order given
    files = iter([w for w in weights.split(",") if w])
    file_of = {name: None if name == "random" else next(files, None) for name in names}
    if logits:
        if "inception" not in file_of:
            raise UserError("--metrics is: the Inception score needs --features inception --weights FILE")
        file_of["logits"] = file_of["inception"]               # one file, two outputs
    return {name: open_network(name, file, device) for name, file in file_of.items()}


def open_inception(weights, device):
    """The 2048 pooled features of FID."""
    net = torch.jit.load(weights, map_location=device).eval()

    def features(images):
        pixels = torch.tensor(images).permute(0, 3, 1, 2).to(device)               # (n, 3, H, W) uint8
        return net(pixels, return_features=True)                                   # (n, 2048)
    return features, {"network": "inception-2015-12-05", "range": "[0, 255], inside (x - 128) / 128",
                      "resize": "inside, to 299: bilinear of TensorFlow 1, no half-pixel centres, no antialias"}


def open_logits(weights, device):
    """
    The 1008 logits of the Inception score, without bias as the first code had them. The file's own output is softmax,
    whose logarithm differs from the logits by a constant per row, which the score does not see.
    """
    net, about = torch.jit.load(weights, map_location=device).eval(), open_inception(weights, device)[1]

    def logits(images):
        pixels = torch.tensor(images).permute(0, 3, 1, 2).to(device)               # (n, 3, H, W) uint8
        least = torch.finfo(torch.float32).tiny                  # p may underflow to 0
        return net(pixels, no_output_bias=True).clamp(min=least).log()             # (n, 1008)
    return logits, about


def open_dino(weights, device, side=224):
    """
    DINOv2's class token after the last norm, not normalised: the features of FD-DINO (Stein et al. 2023, dgm-eval).
    """
    net = open_pretrained("Dinov2Model", "dinov2", weights, device)
    table, patch = net.embeddings.position_embeddings, net.config.patch_size       # (1, 1 + 37^2, D)
    # a table that already fits is left alone by transformers, so its own interpolation never runs
    net.embeddings.position_embeddings = torch.nn.Parameter(hub_positions(table.data, side // patch))

    def features(images):
        return net(normalised(images, side, IMAGENET).to(device)).last_hidden_state[:, 0]  # (n, D)
    return features, {"network": describe(net.config, "dinov2", published="1024, 24, 14"),
                      "resize": f"to {side} squashed, bicubic antialiased, rounded",
                      "range": "[0, 1], ImageNet mean and std"}


def hub_positions(table, new):
    """
    DINOv2's positions (1, 1 + old^2, D) for new x new tokens as torch.hub makes them, by a scale of (new + 0.1) / old.
    transformers asks for the size instead, which moves the sampling points by up to 0.22 cells.
    """
    old = round((table.shape[1] - 1) ** 0.5)                   # 37 in the published network, for 518 px
    if old == new:
        return table
    square = table[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)             # (1, D, old, old)
    square = F.interpolate(square, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic")  # (1, D, new, new)
    return torch.cat([table[:, :1], square.flatten(2).transpose(1, 2)], 1)         # (1, 1 + new^2, D)


def open_clip(weights, device):
    """
    CLIP's projected image embeddings of length one: CMMD takes 336 px (224 in Greedy Growing, Sec. 4.1). A list of
    captions gives theirs, cut at 77 tokens, with no words put before them.
    """
    net = open_pretrained("CLIPModel", "clip", weights, device)
    side, length = net.config.vision_config.image_size, net.config.text_config.max_position_embeddings

    def of_captions(captions):                                 # longer ones would raise if they were not cut
        cut = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        words = open_tokenizer(weights, "clip")(captions, **cut).to(device)
        return net.text_projection(net.text_model(**words).pooler_output)          # (n, D)

    def of_images(images):
        pixels = normalised(images, side, CLIP, crop=True).to(device)              # (n, 3, side, side)
        return net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)  # (n, D)

    def features(items):
        return F.normalize(of_captions(items) if isinstance(items, list) else of_images(items), dim=1)
    return features, {"network": describe(net.config.vision_config, "clip", published="1024, 24, 14"),
                      "resize": f"centre square to {side}, bicubic antialiased, rounded",
                      "range": "[0, 1], CLIP mean and std", "clip_score": "100 x mean cosine, not clamped, no prefix"}


OPEN = {"inception": open_inception, "logits": open_logits, "dino": open_dino, "clip": open_clip}


# ---------------------------------------------------------------------------------------------------------------
# A network that answers questions


def open_vqa(weights, device):
    """
    (ask, about): ask(image (H, W, 3) uint8, question) -> an answer in words, from BLIP (Li et al. 2022), greedily. One
    question at a time: transformers lets BLIP's decoder see padding, so a batch of questions of several lengths would
    change the answers.
    """
    digest = require_weights("--vqa", weights, "blip")
    net = open_pretrained("BlipForQuestionAnswering", "blip", weights, device)
    tokenizer, vision = open_tokenizer(weights, "blip"), net.config.vision_config
    side, length = vision.image_size, net.config.text_config.max_position_embeddings       # published: 384 px

    def ask(image, question):
        pixels = normalised(image[None], side, CLIP).to(device)                    # (1, 3, side, side), squashed
        tokens = tokenizer(question, truncation=True, max_length=length, return_tensors="pt").to(device)
        answer = net.generate(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels,
                              do_sample=False, num_beams=1, max_new_tokens=10)
        return tokenizer.decode(answer[0], skip_special_tokens=True).strip()
    return ask, {"network": describe(vision, "blip"), "sha256": digest, "answers": "greedy; only 'yes' is right",
                 "resize": f"to {side} squashed, bicubic antialiased, rounded"}


# ---------------------------------------------------------------------------------------------------------------
# Weights: local, whole, and of the network that was named


def require_weights(flag, weights, kind):
    """The hash of weights that exist; else a UserError that says what to put where."""
    if digest := weights and file_hash(weights):
        return digest
    place = f" at {weights!r}" if weights else ""
    raise UserError(f"{flag}: no weights{place}, and nothing is downloaded: put {SOURCES[kind]}")


def open_pretrained(cls, kind, weights, device):
    """
    A transformers network from a local folder. Refuses one of another type, and one whose file lacks a single weight.
    """
    transformers = import_extra("transformers", f"a network of type {kind}")
    transformers.logging.set_verbosity_error()                 # what matters is checked below
    transformers.logging.disable_progress_bar()
    try:
        actual = transformers.AutoConfig.from_pretrained(weights, local_files_only=True).model_type
        if actual != kind:
            raise UserError(f"{weights!r} holds a network of type {actual}, not {kind}: put {SOURCES[kind]}")
        load = getattr(transformers, cls).from_pretrained
        net, report = load(weights, local_files_only=True, output_loading_info=True)
    except Exception as e:                                     # of many kinds, from transformers and from safetensors
        raise UserError(f"{weights!r} cannot be loaded ({str(e).splitlines()[0]}): put {SOURCES[kind]}")
    if missing := sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]})):
        raise UserError(f"{weights!r} lacks {len(missing)} weights such as {missing[0]}, which would be random: "
                        "take the whole file")
    return net.float().eval().to(device)


def open_tokenizer(weights, kind):
    """The tokenizer that lies in the same folder as a network's weights."""
    if not os.path.exists(os.path.join(weights, "tokenizer_config.json")):
        raise UserError(f"{weights!r} lacks the tokenizer, which reading text needs: put {SOURCES[kind]}")
    return import_extra("transformers", "reading text").AutoTokenizer.from_pretrained(weights, local_files_only=True)


def describe(config, kind, published=""):
    """A network in words: width, layers and patch, beside those of the published one."""
    words = f"{kind}, width {config.hidden_size}, {config.num_hidden_layers} layers, patch {config.patch_size}"
    return words + f" (published: {published})" * bool(published)
