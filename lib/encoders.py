"""
Frozen networks that make a model's input, and the tables in which it is kept: text encoders and SentencePiece for
captions, an autoencoder for images. All come from local folders, as safetensors; nothing is downloaded and nothing
unpickled.

`encoder` in configs.txt names what reads a caption:
    "t5-xxl:128,clip-h:77"      frozen encoders of the transformers library, how many tokens of each, span after span
    "pipeline:300"              those of a published pipeline, as that pipeline uses them (lib/pipeline_encoder.py)
    "sentencepiece:FILE"        the tokens of a SentencePiece model, which the model embeds by itself
    "words"                     hashed words, which the model embeds by itself

What they made is kept in tables (lib/tables.py) beside the index of the data: t5-xxl-128.arrow with a row for each
caption, and latents-512.arrow with one for each image. A data set gives size, view and where of an image; text of a
caption, captions_count and captions_digest; fingerprint; and folder, where its index lies.

Letters: b captions, n tokens of one caption, L of all encoders' spans together, E width of an embedding; B images of
height H and width W, c h w channels and sides of their latents, s their stride.
"""
import functools
import hashlib
import io
import itertools
import os
import sys
import zlib

import numpy as np
import torch

from lib.files import atomic_write, complete, from_folder, import_extra, local_weights, weights_hash
from lib.images import Unfit, covering
from lib.nouns import words
from lib.pictures import to_tensor
from lib.pipeline_encoder import encoder_dtype, open_pipeline
from lib.settings import UserError, closest
from lib.tables import DTYPES, Table, print_room, write_shared

ENCODERS = {
    # name         class in transformers  layer, what to put under encoder_weights; -1 is the last layer after its norm
    "t5-xxl":     ("T5EncoderModel",      -1, "google/t5-v1_1-xxl"),
    "byt5":       ("T5EncoderModel",      -1, "google/byt5-xxl"),
    "clip-h":     ("CLIPTextModel",       -1, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "clip-l":     ("CLIPTextModel",       -2, "openai/clip-vit-large-patch14"),    # SDXL takes the last but one
    "openclip-g": ("CLIPTextModel",       -2, "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
    "pipeline":   ("PipelineEncoder",      0, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),       # the whole folder
}


# ---------------------------------------------------------------------------------------------------------------
# Captions -> embeddings


class Encoder:
    """
    A frozen text encoder from a local folder: captions -> a list of (n, E) float tensors, of real tokens only, n <=
    tokens. The null caption "" gives n = 0. `id` names it with its dtype and the sha256 of its weights. Raises
    UserError where the folder does not hold it.
    """

    def __init__(self, name, tokens, folder, dtype):
        library, (kind_name, self.layer, source) = import_extra("transformers", f"encoder {name}"), ENCODERS[name]

        def load():
            tokenizer, kind = library.AutoTokenizer, getattr(library, kind_name)
            return (tokenizer.from_pretrained(folder, local_files_only=True),
                    kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=DTYPES[dtype]))
        hint = f"put {source} there, its weights as .safetensors"
        self.tokenizer, net = from_folder(f"encoder {name}", folder, hint, load)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net = net.eval().requires_grad_(False).to(self.device)
        self.name, self.tokens, self.width = name, tokens, net.config.hidden_size
        self.id = f"{name} {dtype} {weights_hash(folder)}"

    @torch.no_grad()
    def __call__(self, captions):
        nothing = torch.zeros(0, self.width, dtype=self.net.dtype)        # the null caption is no text at all: no token
        texts = [c for c in captions if c]
        if not texts:
            return [nothing for _ in captions]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)        # (b, longest n)
        out = self.net(input_ids=ids, attention_mask=mask, output_hidden_states=self.layer != -1)
        hidden = out.last_hidden_state if self.layer == -1 else out.hidden_states[self.layer]      # (b, longest n, E)
        rows = (h[m].cpu() for h, m in zip(hidden, mask.bool()))                   # (n, E) each, without padding
        return [next(rows) if c else nothing for c in captions]

    def mean_tokens(self, captions):
        """Mean number of tokens that these captions keep."""
        ids = self.tokenizer(captions, truncation=True, max_length=self.tokens).input_ids
        return float(np.mean([len(row) for row in ids]))


def has_pretrained_encoder(encoder):
    """Does `encoder` name frozen networks? Else captions are tokens, which the model embeds by itself."""
    return encoder != "words" and not encoder.startswith("sentencepiece:")


def encoder_parts(encoder):
    """"t5-xxl:128,clip-h:77" -> [("t5-xxl", 128), ("clip-h", 77)]."""
    parts = [part.strip().partition(":")[::2] for part in encoder.split(",")]      # [::2] leaves the colon out
    for name, tokens in parts:
        if name not in ENCODERS:
            raise UserError(f"encoder {name!r} is unknown: {closest(name, ['words', 'sentencepiece', *ENCODERS])}")
        if not tokens.isdigit() or int(tokens) < 1:
            raise UserError(f"encoder = {encoder}: say how many tokens, as in {name}:128")
    return [(name, int(tokens)) for name, tokens in parts]


@functools.lru_cache(1)                           # they are large, and the same ones serve previews, scores and samples
def open_encoders(encoder, weights, dtype):
    """The Encoders of "t5-xxl:128,clip-h:77" from as many folders, comma-separated."""
    parts, folders = encoder_parts(encoder), weights.split(",")
    if len(parts) != len(folders):
        raise UserError(f"{len(parts)} encoders ({encoder}) and {len(folders)} folders of weights ({weights}): "
                        "give each its own, comma-separated")
    return [open_pipeline(tokens, folder, dtype) if name == "pipeline" else Encoder(name, tokens, folder.strip(), dtype)
            for (name, tokens), folder in zip(parts, folders)]


def concat_spans(parts, tokens):
    """
    For each encoder a list of b embeddings (n, E) -> (b, L, E): each in its own span of rows, zeros behind it and to
    the widest E.
    """
    text = torch.zeros(len(parts[0]), sum(tokens), max(rows[0].shape[1] for rows in parts))        # (b, L, E)
    for rows, start in zip(parts, itertools.accumulate(tokens, initial=0)):
        for row, r in zip(text, rows):                         # row (L, E) of all encoders, r (n, its own E)
            row[start:start + len(r), :r.shape[1]] = r
    return text


def embed_now(captions, config):
    """
    (b, L, E) of any captions by the encoders in encoder_weights. UserError unless these are encoder_id, those that the
    model knows.
    """
    known = config["encoder_id"]                               # such as "t5-xxl fp32 0123456789abcdef, ..."
    encoders = open_encoders(config["encoder"], config["encoder_weights"], encoder_dtype(config))
    if known and known != (here := ", ".join(e.id for e in encoders)):
        raise UserError(f"this model reads captions embedded by {known}, and encoder_weights holds {here}: "
                        "give it the weights of the former")
    return concat_spans([e(captions) for e in encoders], [e.tokens for e in encoders])


# ---------------------------------------------------------------------------------------------------------------
# Captions -> tokens: hashed words, or pieces of a trained vocabulary


def tokenize(captions, length, vocab):
    """
    Words hashed into `vocab` buckets: (B, L) int64, 0 where no word is. Needs no vocabulary file; its embedding is
    learned in the core. Captions longer than `length` words are cut.
    """
    # crc32, since Python's own hash of a string differs from process to process; 1 to vocab - 1
    return padded([[1 + zlib.crc32(w.encode()) % (vocab - 1) for w in words(c)[:length]] for c in captions], length)


def padded(rows, length):
    """Lists of tokens -> (B, L) int64, zeros behind; what is longer is cut."""
    tokens = np.zeros((len(rows), length), np.int64)
    for k, row in enumerate(rows):
        tokens[k, :len(row)] = row[:length]
    return torch.from_numpy(tokens)


@functools.lru_cache(2)
def open_pieces(file, vocab):
    """(SentencePiece model, its identity) of `file`, if its pieces fit in text_vocab = `vocab`."""
    library = import_extra("sentencepiece", f"encoder = sentencepiece:{file}")
    try:
        with open(file, "rb") as f:
            proto = f.read()
        pieces = library.SentencePieceProcessor(model_proto=proto)
    except (OSError, RuntimeError) as e:
        raise UserError(f"{file!r} does not open as a SentencePiece model ({str(e)[:100]}): "
                        f"python data.py vocabulary PATH --to {file} makes one")
    if pieces.get_piece_size() >= vocab:                       # one more than its pieces, since 0 is no word
        raise UserError(f"text_vocab = {vocab}: {file!r} has {pieces.get_piece_size()} pieces: "
                        f"set text_vocab = {pieces.get_piece_size() + 1}")
    return pieces, "sentencepiece " + hashlib.sha256(proto).hexdigest()[:16]


def to_pieces(captions, config):
    """
    Lists of tokens from 1 on, one list for each caption. UserError for a SentencePiece model other than encoder_id.
    """
    pieces, here = open_pieces(config["encoder"].partition(":")[2], config["text_vocab"])
    if config["encoder_id"] not in ("", here):
        raise UserError(f"this model reads captions of {config['encoder_id']}, and {config['encoder']} is {here}: "
                        "give it the former file")
    return [[1 + token for token in row] for row in pieces.encode(list(captions))]                 # 0 is no word


def train_pieces(captions, size, file):
    """Train a SentencePiece model on captions (unigram): the number of its pieces, at most `size`."""
    library, model = import_extra("sentencepiece", "a vocabulary"), io.BytesIO()
    options = {"hard_vocab_limit": False, "input_sentence_size": 10 ** 7, "shuffle_input_sentence": True}
    library.SentencePieceTrainer.train(sentence_iterator=captions, model_writer=model, vocab_size=size, minloglevel=2,
                                       **options)
    atomic_write(file, lambda f: f.write(model.getvalue()))
    return library.SentencePieceProcessor(model_file=file).get_piece_size()


def encoder_identity(config):
    """
    What turns captions into the model's input, as a string that tells two encoders apart; "" where that takes no file.
    """
    kind, _, file = config["encoder"].partition(":")
    if kind == "words":
        return ""
    if kind == "sentencepiece":
        return open_pieces(file, config["text_vocab"])[1]
    encoders = open_encoders(config["encoder"], config["encoder_weights"], "fp32")             # as embed_now opens them
    return ", ".join(e.id for e in encoders)


# ---------------------------------------------------------------------------------------------------------------
# Pixels <-> latents


class SpaceToDepth:
    """
    A lossless stand-in for an autoencoder: each square of stride x stride pixels becomes 3 stride^2 channels. It
    compresses nothing, but takes drawn pictures through the whole path of latents offline (autoencoder =
    "space_to_depth"). Of stride 1 it leaves x as it is.
    """

    def __init__(self, stride, scale):
        self.stride, self.scale = stride, scale

    def encode(self, x):
        return torch.nn.functional.pixel_unshuffle(x, self.stride) * self.scale   # (B, 3, H, W) -> (B, 3 s^2, H/s, W/s)

    def pixels(self, latents):
        return torch.nn.functional.pixel_shuffle(latents / self.scale, self.stride)

    def decode(self, latents):
        return self.pixels(latents).clamp(-1, 1)


class Autoencoder:
    """
    A frozen AutoencoderKL of diffusers (Rombach et al. 2022; SDXL's is the usual one), in float32 whatever the model's
    precision, because SDXL's overflows in fp16. Pictures larger than it was trained at go through it in overlapping
    tiles, so that memory stays bounded. Latents are the mean of its posterior, not a draw: its spread is far below the
    noise of the first step.
    """

    def __init__(self, vae, scale):
        self.vae, self.scale = vae, scale
        vae.enable_tiling()

    @torch.no_grad()
    def encode(self, x):
        with torch.autocast(x.device.type, enabled=False):     # float32 also where the training pass is in bf16
            return self.vae.encode(x.float()).latent_dist.mode() * self.scale      # (B, 3, H, W) -> (B, c, H/s, W/s)

    def pixels(self, latents):
        with torch.autocast(latents.device.type, enabled=False):
            return self.vae.decode(latents.float() / self.scale).sample

    @torch.no_grad()
    def decode(self, latents):
        return self.pixels(latents).clamp(-1, 1)


@functools.lru_cache(2)
def read_autoencoder(folder, device, hint):
    """The AutoencoderKL in a local folder, as diffusers' save_pretrained leaves it; where it is none, a hint."""
    def load():
        kind = import_extra("diffusers", "an autoencoder").AutoencoderKL
        options = local_weights(folder) | {"low_cpu_mem_usage": False}             # it needs accelerate
        return complete(*kind.from_pretrained(folder, **options))
    return from_folder("autoencoder", folder, hint, load).float().eval().requires_grad_(False).to(device)


def open_autoencoder(config, device="cpu"):
    """
    An object with encode: x (B, 3, H, W) in [-1, 1] -> latents (B, latent_channels, H / latent_stride, W /
    latent_stride), scaled by latent_scale to a variance near 1; and with decode, its inverse, clamped to [-1, 1], or
    pixels, the same with gradients and without the clamp. For a model of pixels all leave x as it is.
    """
    name, stride, scale = config["autoencoder"], config["latent_stride"], config["latent_scale"]
    if not name:
        return SpaceToDepth(1, 1.0)
    if name == "space_to_depth":
        own, opened = {"latent_channels": 3 * stride ** 2}, SpaceToDepth(stride, scale)
    else:
        hint = "put a diffusers AutoencoderKL there, its weights as .safetensors, or set autoencoder = \"\""
        if config["encoder"].startswith("pipeline:"):          # then its autoencoder is the pipeline's too
            hint = ("bring the whole pipeline, its weights as .safetensors; where it has moved, put it, or a link to "
                    "it, into an export of this run (sample.py --export) as 'pipeline'")
        vae = read_autoencoder(name, str(device), hint)
        own = {"latent_channels": vae.config.latent_channels,
               "latent_stride": 2 ** (len(vae.config.block_out_channels) - 1),     # the last block halves no side
               "latent_scale": vae.config.scaling_factor}
        opened = Autoencoder(vae, scale)
    wrong = [f"{k} = {v}" for k, v in own.items() if config[k] != v]
    if wrong:                                                  # the model was built, or will be, from the config
        raise UserError(f"the autoencoder {name!r} has other latents than this config: set {', '.join(wrong)}")
    return opened


# ---------------------------------------------------------------------------------------------------------------
# What they made, read back by number


class EmbeddingCache:
    """The tables of all encoders of a config, beside an index: numbers of captions -> (b, L, E) float, zeros for -1."""

    def __init__(self, data, config):
        self.data, self.parts, self.tables = data, encoder_parts(config["encoder"]), []
        command = f"python data.py embed {data.name} --encoder {config['encoder']} --weights "
        command += config["encoder_weights"] or "FOLDER,..."
        command += f" --prefix {data.prefix.strip()!r}" * bool(data.prefix)        # as they are read here
        for name, tokens in self.parts:
            path = embeddings_path(data, name, tokens)
            if not os.path.exists(path):
                first = ", after data.py index" if not data.folder else ""
                raise UserError(f"{data.name} has no embeddings by {name}:{tokens}: {command}{first}")
            table = Table(path)
            if table.about["captions"] != data.captions_digest():                  # numbers would mean other captions
                raise UserError(f"{path!r} holds embeddings of other captions than the index: "
                                f"delete it and run {command}")
            self.tables.append(table)
        self.id = ", ".join(t.about["id"] for t in self.tables)
        self.widths = tuple(t.about["width"] for t in self.tables)
        if self.widths != config["encoder_width"]:             # the model's projections have these
            raise UserError(f"encoder_width = {config['encoder_width']}: the embeddings of {config['encoder']} are "
                            f"{self.widths} wide: set encoder_width to that")
        if config["encoder_id"] not in ("", self.id):
            raise UserError(f"the model reads captions embedded by {config['encoder_id']}, and {data.name} holds "
                            f"those of {self.id}: embed its captions with the former, or train another model")

    def __call__(self, numbers):
        parts = [[table[n] if n >= 0 else torch.zeros(0, width) for n in numbers]
                 for table, width in zip(self.tables, self.widths)]
        return concat_spans(parts, [tokens for _, tokens in self.parts])

    @functools.cached_property
    def numbers(self):
        """{caption: its number} of the first 100,000: these need no encoder. The null caption's is -1."""
        return {self.data.text(n): n for n in range(min(100000, self.data.captions_count))} | {"": -1}


class LatentCache:
    """The latents of one centred view of each image, viewed as images are. UserError where the config has others."""

    def __init__(self, data, config):
        path, want = latents_path(data, config), about_latents(data, config)
        self.data, self.table = data, Table(path)
        about = self.table.about
        differ = [f"{k} {about.get(k)} there, {v} here" for k, v in want.items() if about.get(k) != v]
        if differ:
            raise UserError(f"{path!r} was made otherwise ({', '.join(differ)}): "
                            "delete it and run data.py embed --vae again")
        if config["flip"] or config["jitter"]:
            raise UserError("flip and jitter need pixels, and the cache of latents holds one view of each image: "
                            "switch them off, or delete the cache")

    def view(self, i, height, width, uniforms, rule):
        """(c, H/s, W/s) float, and top and left of the crop that was encoded. Raises Unfit where it could not be."""
        latents = self.table[i]
        if not latents.numel():
            raise Unfit("its latents could not be made")
        w, h = covering(self.data.size(i), height, width, rule)
        return latents, (h - height + 1) // 2, (w - width + 1) // 2       # as data.view rounds them for uniforms of 0.5


def embeddings_path(data, name, tokens):
    """Where the embeddings of an encoder lie, beside the index of a data set; "" where it has none."""
    return os.path.join(data.folder, f"{name}-{tokens}.arrow") if data.folder else ""


def latents_path(data, config):
    """Where the latents of a data set lie at this resolution, beside its index; "" where it has none."""
    return os.path.join(data.folder, f"latents-{config['resolution']}.arrow") if data.folder else ""


def about_latents(data, config):
    """What a table of latents must have been made with: other settings, autoencoders and images are refused."""
    name = config["autoencoder"]
    keys = "resolution", "aspects", "resize", "latent_channels", "latent_stride", "latent_scale"
    made_by = weights_hash(name) if os.path.isdir(name) else name
    return {k: config[k] for k in keys} | {"id": made_by, "data": data.fingerprint}


# ---------------------------------------------------------------------------------------------------------------
# Making the tables


def embed_captions(data, encoder, dtype, batch):
    """All captions of a data set by one encoder, real tokens only. UserError names one that is not finite."""
    count, path = data.captions_count, embeddings_path(data, encoder.name, encoder.tokens)
    some = np.unique(np.linspace(0, count - 1, 1000).astype(int)) if count else []
    mean = encoder.mean_tokens([data.text(int(n)) for n in some]) if count else 0.0
    what = f"{count} captions of {mean:.1f} tokens on average, at most {encoder.tokens}, {encoder.width} wide"
    print_room(data.folder, count * mean * encoder.width * DTYPES[dtype].itemsize, f"{encoder.id}: {what}")

    def make(numbers):
        rows = encoder([data.text(n) for n in numbers])
        for n, row in zip(numbers, rows):
            if row.shape[1:] != (encoder.width,) or len(row) > encoder.tokens or not row.isfinite().all():
                raise UserError(f"{encoder.name} gives {tuple(row.shape)}, or values that are not finite for caption "
                                f"{n}, {data.text(n)[:60]!r}: try --dtype fp32, or check its weights")
        return rows
    about = {"id": encoder.id, "captions": data.captions_digest(), "width": encoder.width, "dtype": dtype}
    write_shared(path, about, 2, count, make, batch, encoder.name)


def embed_images(data, config, sizes, dtype):
    """Latents of one centred view of each image, cut to its row of `sizes` (n, 2), height first; empty where unfit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder, stride, channels = open_autoencoder(config, device), config["latent_stride"], config["latent_channels"]
    numbers = channels * np.prod(sizes // stride, 1).sum()
    print_room(data.folder, numbers * DTYPES[dtype].itemsize, f"latents of {len(data)} images")

    def latents(i):
        try:
            image, _, _ = data.view(i, *sizes[i].tolist(), (0.5, 0.5), config["resize"])         # (H, W, 3), the middle
        except (OSError, Unfit) as e:
            print(f"skipped {data.where(i)}: {e}", file=sys.stderr)
            return torch.zeros(0, 0, 0)                        # LatentCache.view passes over it
        z = autoencoder.encode(to_tensor(np.stack([image])).to(device))[0].cpu()                        # (c, H/s, W/s)
        if not z.isfinite().all():
            raise UserError(f"the latents of {data.where(i)} are not finite: "
                            "try --dtype fp32, or check the autoencoder")
        return z

    def make(numbers):
        return [latents(i) for i in numbers]
    about = about_latents(data, config) | {"dtype": dtype}
    write_shared(latents_path(data, config), about, 3, len(data), make, config["batch"], "latents")
