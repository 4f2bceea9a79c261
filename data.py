"""
What goes in: settings, captioned pictures, and captions turned into tokens or embeddings.

    python data.py check PATH                                 what would be used of a folder or of tar shards, what not, and why
    python data.py index PATH                                 write that down beside the data, for millions of images
    python data.py show PATH --resolution 64 --to sheet.png   look at a training batch after all transforms (PATH or scenes)
    python data.py stats PATH                                 nouns and lengths of the captions
    python data.py embed PATH --encoder t5-xxl:128,clip-h:77 --weights FOLDER,FOLDER      embed all captions once
    python data.py embed PATH --vae FOLDER --resolution 512   the same for images: latents of an autoencoder
    python data.py vocabulary PATH --to captions.model        train a SentencePiece model on the captions

Notable features:
- every random choice (scene, crop, flip, colours, caption; order and bucket) is a pure function of (seed, epoch, sample) or of
  (seed, step), so that a run can be resumed anywhere, on any number of devices, without saving the state of any generator;
- `scenes`, a small world drawn by formula at any resolution. Because each picture is known exactly, eval.py can
  tell without learned weights whether a generated image shows what its caption says;
- real images are read where they lie, in files or in the middle of a tar, through one index of seven columns; nothing is repacked,
  nothing unpickled, and whatever cannot serve is counted and named.

The way of an image: walk and scan_* find it (Found) -> merge lays all of them into arrays (Indexed) -> write_index, read_index
-> Batches chooses sample and crop -> Indexed.view reads and decodes it -> x. Scenes come in at Batches: the two data sets, Scenes and
Indexed, serve it through the same methods: size, all_sizes, view, choose, text. A caption has a number of its own, since an image may
have several.

Letters: B images in a batch, b on this device, C = 3 channels, H W height and width in pixels, c h w those of latents, s their stride,
L caption tokens, E their width, n items of a data set. Images are (height, width, 3) arrays, as numpy has it, but a size that stands
alone is (width, height), as image libraries have it.
"""
import argparse
import functools
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from lib.draws import generator, uniforms
from lib.encoders import (EmbeddingCache, about_latents, embed_captions, embed_now, encoder_identity, has_pretrained_encoder,
                          latents_path, open_autoencoder, open_encoders, to_pieces)
from lib.files import atomic_write, import_extra
from lib.images import Indexed, Unfit, covering, index_folder, jittered, write_index
from lib.pictures import contact_sheet, to_tensor, write_png
from lib.scan import MUTE, open_images, require, scan
from lib.scenes import Scenes
from lib.settings import UserError, load_config
from lib.tables import DTYPES, Table, is_begun, print_room, write_table


def open_data(config, allow=()):
    """The data set that `data` names: scenes; or real images, by their index or, where they have none, scanned into memory now."""
    return Scenes(config) if config["data"] == "scenes" else open_images(config["data"], allow)


# ---------------------------------------------------------------------------------------------------------------
# Captions -> tokens or embeddings. `encoder` says which:
#     "words"                     hashed words, embedded by the core; needs no file
#     "sentencepiece:FILE"        the tokens of a SentencePiece model, embedded by the core
#     "t5-xxl:128,clip-h:77"      frozen encoders of the transformers library and how many tokens of each, laid one after the other


def words(caption):
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())


def tokenize(captions, length, vocab):
    """
    Words hashed into `vocab` buckets: (B, L) int64, 0 where no word is. Needs no vocabulary file; its embedding is learned
    in the core. Captions longer than `length` words are cut. An empty caption is all zeros: the null caption of guidance.
    """
    # crc32, since Python's own hash of a string differs from process to process; 1 to vocab - 1
    return padded([[1 + zlib.crc32(w.encode()) % (vocab - 1) for w in words(c)[:length]] for c in captions], length)


def padded(rows, length):
    """Lists of tokens -> (B, L) int64, zeros behind; what is longer is cut."""
    tokens = np.zeros((len(rows), length), np.int64)
    for row, found in zip(tokens, rows):                       # row is a view of tokens
        row[:len(found)] = found[:length]
    return torch.from_numpy(tokens)


def encode_captions(captions, config):
    """
    What the model reads: (B, L) int64 tokens, or (B, L, E) float embeddings. A null caption, "", is all zeros. Without encoder_weights
    only captions of the data's own cache have embeddings. Raises UserError for an encoder other than encoder_id, the model's own.
    """
    kind = config["encoder"]
    if kind == "words":
        return tokenize(captions, config["text_length"], config["text_vocab"])
    if kind.startswith("sentencepiece:"):
        return padded(to_pieces(captions, config), config["text_length"])
    if not any(captions):                                      # the null caption takes no weights
        return torch.zeros(len(captions), config["text_length"], max(config["encoder_width"]))
    return embed_now(captions, config) if config["encoder_weights"] else embed_known(captions, config)


@functools.lru_cache(2)
def known_captions(pairs):
    """The EmbeddingCache of a data set, by which previews and scores read captions without an encoder."""
    config = dict(pairs)                                       # pairs: a dict cannot be a key of the cache
    return EmbeddingCache(open_data(config), config)


def embed_known(captions, config):
    """Embeddings (B, L, E) of captions that the data set itself holds."""
    how = f"set encoder_weights to local folders of {config['encoder']}, comma-separated"
    if config["data"] == "scenes" or not os.path.exists(config["data"]):
        raise UserError(f"captions are to be embedded, and {config['data']} holds no cache of {config['encoder']}: {how}")
    cache = known_captions(tuple((k, config[k]) for k in ("data", "encoder", "encoder_width", "encoder_id")))
    if unknown := [c for c in captions if c not in cache.numbers]:
        raise UserError(f"{unknown[0]!r} is not among the embedded captions of {config['data']}: {how}")
    return cache([cache.numbers[c] for c in captions])


# ---------------------------------------------------------------------------------------------------------------
# Pixels and latents: uint8 <-> x in [-1, 1]; the latents that an autoencoder made once


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


# ---------------------------------------------------------------------------------------------------------------
# Batches: which samples make up the batch of a step, in which bucket, and how each is cropped, mirrored, recoloured and captioned


def bucket_sizes(config):
    """
    The (height, width) that images are brought to, each a batch of its own. `aspects` lists them, or gives a rule: "every 64" takes long
    sides in steps of 64 px up to twice the resolution, with the largest short side whose area stays within resolution^2 (of these
    SDXL's table, Appendix I, and PixArt's are made). Raises UserError where a side is no whole number of tokens.
    """
    side, aspects = config["resolution"], config["aspects"]
    if not aspects:
        return [(side, side)]
    pixels = config["latent_stride"] if config["autoencoder"] else 1               # per latent and side
    token = config["patch"] * pixels if config["shell"] == "patch" else side / config["grid"]      # px; other shells grow with the resolution
    sizes = []
    if rule := re.fullmatch(r"every (\d+)", aspects):
        step = max(1, int(rule[1]))
        pairs = [(side * side // long // step * step, long) for long in range(side, 2 * side + 1, step)]   # (short, long), rounded down
        sizes = sorted({p for short, long in pairs if short for p in ((short, long), (long, short))})      # wide and tall
    elif re.fullmatch(r"\d+x\d+(, *\d+x\d+)*", aspects):
        sizes = [tuple(map(int, part.split("x"))) for part in aspects.split(",")]
    if not sizes:                                              # neither, or a step above the resolution
        raise UserError(f"aspects = {aspects!r}: write HxW,HxW,... or every N, such as 1024x1024,768x1376,1376x768 or every 64")
    for h, w in sizes:
        if not h * w or h % token or w % token:
            raise UserError(f"aspects = {aspects!r}: {h}x{w} must be multiples of a token, {token:g} px at resolution {side}")
    return sizes


def nearest_bucket(sizes, images):
    """For each image, (n, 2) of (width, height), the number in `sizes` of the bucket of nearest aspect ratio: int16 (n,)."""
    aspect = np.log(images[:, 0] / images[:, 1])               # in logarithms 2:1 is as far from 1:1 as 1:2 is
    best, where = np.full(len(images), np.inf), np.zeros(len(images), np.int16)
    for k, (h, w) in enumerate(sizes):                         # one at a time: memory does not grow with the number of buckets
        distance = abs(aspect - math.log(w / h))
        closer = distance < best
        best[closer], where[closer] = distance[closer], k
    return where


class Batches(torch.utils.data.Dataset):
    """
    Item `step` is the batch of that step: x (b, 3, H, W), or latents (b, c, h, w) where `latents` is set; text (b, L), or (b, L, E) of
    cached embeddings; and size (b, 6) float: original height and width, top and left of the crop in the resized image, target height
    and width in pixels (SDXL, Sec. 2.2). Of `world` devices, device `rank` gets the rank-th share of its rows. `filtered` leaves out
    images that are smaller than the target. Raises UserError where fewer than a batch are left.

    Every batch is of one bucket, the same on every device. After r rounds through the data a bucket of n images has had
    floor(r n / batch) batches, in an order shuffled anew in each round: what a round leaves over is carried into the next, so nothing
    is dropped, and still which bucket comes at which step is a function of (seed, step) alone.
    """

    def __init__(self, data, config, filtered, stage="pretrain", rank=0, world=1):
        self.data, self.config, self.stage, c = data, config, stage, config
        share = c["batch"] // world                            # b
        self.rows = slice(rank * share, (rank + 1) * share)
        self.sizes, images = bucket_sizes(c), data.all_sizes()                     # [(H, W)], (n, 2)
        self.bucket = nearest_bucket(self.sizes, images)       # (n,)
        target = np.array(self.sizes, np.int32)[self.bucket][:, ::-1]              # (n, 2), width first as in images
        large = (images >= target).all(1)                      # both sides: keep what is at least as large as the target (Sec. 3.3)
        kept = large if filtered and not c["upscale"] else np.ones(len(images), bool)
        self.usable, self.removed = np.flatnonzero(kept), 1 - kept.mean()          # numbers of images; a share
        self.members = [np.flatnonzero(kept & (self.bucket == k)).astype(np.int32) for k in range(len(self.sizes))]
        if not len(self.usable):
            raise UserError(f"none of {len(data)} images is {c['resolution']} px or more on both sides: "
                            "lower --resolution, or --upscale True keeps them")
        if len(self.usable) < c["batch"]:
            raise UserError(f"batch = {c['batch']} and only {len(self.usable)} usable images: lower --batch, or add images")
        self.orders = {}                                       # {(bucket, epoch): its samples in order}
        real = isinstance(data, Indexed)
        self.embeddings = EmbeddingCache(data, c) if real and has_pretrained_encoder(c["encoder"]) else None
        # without a cache train.py encodes each batch anew
        self.latents = LatentCache(data, c) if real and c["autoencoder"] and is_begun(latents_path(data, c)) else None

    def __len__(self):
        return self.config["steps"]

    def __getitem__(self, step):
        rows = [self.sample(epoch, i, self.latents) for epoch, i in self.pairs(step)[self.rows]]   # only this device's are read
        images, captions, sizes, numbers = zip(*rows)
        x = torch.stack(images) if self.latents else to_tensor(np.stack(images))   # (b, C, H, W)
        text = self.embeddings(numbers) if self.embeddings else encode_captions(captions, self.config)
        return x, text, torch.tensor(sizes, dtype=torch.float32)

    def bucket_at(self, step):
        """(bucket, how many batches of it came before) of a step. A round goes through as many images as there are, whatever their buckets."""
        batch, made = self.config["batch"], lambda r: np.array([r * len(m) // batch for m in self.members])        # batches after r rounds
        r = step * batch // len(self.usable)                   # this many rounds have at most `step` batches
        while made(r + 1).sum() <= step:
            r += 1
        before, now = made(r), made(r + 1)
        order = np.repeat(np.arange(len(before)), now - before)                    # this round's batches by bucket, to be shuffled
        order = generator("buckets", self.stage, self.config["seed"], r).permutation(order)
        place = step - before.sum()                            # of the step in its round
        bucket = order[place]
        return bucket, int(before[bucket] + (order[:place] == bucket).sum())

    def order(self, bucket, epoch):
        """The samples of a bucket in this epoch's order. The last two epochs are kept, since a batch may span them."""
        if (bucket, epoch) not in self.orders:
            self.orders = {(b, e): o for (b, e), o in self.orders.items() if b != bucket or abs(e - epoch) < 2}    # 4 bytes an image, each
            self.orders[bucket, epoch] = generator("order", self.stage, self.config["seed"], epoch, bucket).permutation(self.members[bucket])
        return self.orders[bucket, epoch]

    def pairs(self, step):
        """The (epoch, sample) of each row of the step's whole batch: the same on every device, whatever their number."""
        bucket, before = self.bucket_at(step) if len(self.members) > 1 else (0, step)
        batch, n = self.config["batch"], len(self.members[bucket])
        # a bucket's batches are consecutive places of its epochs, one permutation after the other: a batch may span two
        return [(p // n, int(self.order(bucket, p // n)[p % n])) for p in range(before * batch, (before + 1) * batch)]

    def sample(self, epoch, i, source=None):
        """
        (image (H, W, 3) uint8, caption, row of size, number of the caption or -1) of sample i in this epoch: crop, flip, jitter and
        caption are functions of (seed, epoch, i). From LatentCache as source, the image is (c, h, w) float. Raises UserError if no image is left.
        """
        c, source = self.config, source or self.data
        x, y, flip, drop, which, long, *jitter = uniforms(9, "data", self.stage, c["seed"], epoch, i)       # always nine: a key changes none of the others
        height, width = self.sizes[self.bucket[i]]
        i, (image, top, left) = self.readable(source, i, height, width, (x, y))    # i, or what stands in for it
        w, h = self.data.size(i)
        if c["flip"] and flip < 0.5:
            image, left = image[:, ::-1], covering((w, h), height, width, c["resize"])[0] - width - left        # from the other side
        if c["jitter"]:
            image = jittered(image, jitter, c["jitter"])
        # no caption at times: guidance needs the model without one too (Ho and Salimans)
        number = -1 if drop < c["caption_dropout"] else self.data.choose(i, which, long < c["long_captions"])
        return image, self.data.text(number), (h, w, top, left, height, width), number

    def readable(self, source, i, height, width, draws):
        """(i, view). What cannot be decoded is named, and its successor in the same bucket stands in."""
        peers = self.members[self.bucket[i]]
        at = int(np.searchsorted(peers, i))                    # members are in ascending order
        for j in itertools.chain([i], (int(peers[(at + k) % len(peers)]) for k in range(1, len(peers)))):
            try:
                return j, source.view(j, height, width, draws, self.config["resize"])
            except (OSError, Unfit) as e:
                if j not in self.data.unreadable:              # said once by each worker
                    print(f"skipped {self.data.where(j)}: {e}", file=sys.stderr)
                self.data.unreadable.add(j)
        raise UserError(f"no image of {self.data.name} can be decoded: the lines above name them")

    @property
    def identity(self):
        """
        {"data_id", "encoder_id"}: what data and which encoder a model is trained with, for its config and so for its checkpoint. Other
        data under an old run differ in data_id and are refused; who means it gives the old one by hand (--data_id).
        """
        given, here = self.config["data_id"], getattr(self.data, "fingerprint", "")
        if given not in ("", here):
            print(f"data {self.data.name} has the fingerprint {here or 'of no file'}: taken in place of {given}, as data_id says", file=sys.stderr)
        return {"data_id": given or here, "encoder_id": self.embeddings.id if self.embeddings else encoder_identity(self.config)}

    def summary(self):
        """Lines that tell what is used and what is left out."""
        c, n = self.config, len(self.data)
        lost = f"; {self.removed:.1%} are smaller than {c['aspects'] or c['resolution']} px and left out (--upscale True keeps them)"
        lines = [f"data {self.data.name}: {len(self.usable)} of {n} images are used" + lost * bool(self.removed)]
        if len(self.sizes) > 1:
            lines.append("  buckets " + ", ".join(f"{h}x{w}: {len(m)}" for (h, w), m in zip(self.sizes, self.members) if len(m)))
        return "\n".join(lines + (self.data.table() if isinstance(self.data, Indexed) else []))


# ---------------------------------------------------------------------------------------------------------------
# Commands: python data.py index|check|show|stats|vocabulary|embed. Each takes (args, config): the flags of main, and a config's dict


LOOK = ("incomplete", "uncaptioned")                         # what show and stats do not refuse: they are for looking


def index(args, config):
    """Scan, tell, and write the index beside the data or to --to."""
    begin, folder = time.perf_counter(), args.to or index_folder(args.path)        # seconds
    data, bad = scan(args.path, config["workers"])
    report = data.head["report"]
    print("\n".join(data.table()))
    if args.json:
        named = report | {"captions": {k: report["captions"][k] for k in ("missing", "empty", "truncated")}}       # what is promised, no more
        atomic_write(args.json, lambda f: f.write(json.dumps(named).encode()))
    require(data, bad, args.allow.split(","))                  # after the table, which tells more than the refusal
    write_index(folder, data, bad)
    print(f"{folder}: {len(data)} images indexed in {time.perf_counter() - begin:.1f} s; bad.tsv there names what was not. "
          f"Train on it: python train.py --data {args.to or args.path}")


def check(args, config):
    """The same table without writing anything, how many images each resolution would keep, and what training would refuse."""
    data, bad = (Scenes(config), []) if args.path == "scenes" else scan(args.path, config["workers"])
    print("\n".join(data.table()) if isinstance(data, Indexed) else f"{len(data)} scenes")
    mute = [name for name, reason in bad if reason in MUTE]
    print("".join(f"no caption: {name}\n" for name in mute[:20]) + f"... and {len(mute) - 20} more" * (len(mute) > 20), end="")
    if len(data):
        print_shares(data, config)
    if isinstance(data, Indexed):
        require(data, bad)


def print_shares(data, config):
    """How long captions are, and how many images each resolution would keep."""
    lengths = np.array([len(words(data.caption(i))) for i in range(min(len(data), 10000))])        # enough for a share
    print(f"captions of {lengths.mean():.1f} words; {np.mean(lengths > config['text_length']):.1%} are cut at text_length = {config['text_length']}")
    least = data.all_sizes().min(1)                            # (n,), the short sides
    for resolution in 16, 32, 64, 128, 256, 512, 1024:
        print(f"{resolution:5d} px keeps {np.mean(least >= resolution):7.1%}")


def show(args, config):
    """A contact sheet of step 0's batch after all transforms, captions beneath; without pillow they go to the terminal alone."""
    data = open_data(config, LOOK)
    config = config | {"encoder": "words", "autoencoder": ""}                       # pixels and captions, not what models read
    usable = len(Batches(data, config | {"batch": 1}, filtered=True).usable)
    batches = Batches(data, config | {"batch": min(config["batch"], usable)}, filtered=True)       # a few images are worth a look too
    rows = [(i, *batches.sample(epoch, i)) for epoch, i in batches.pairs(0)]
    for i, image, caption, size, _ in rows:
        print(f"{i:8d}  {size[1]}x{size[0]} px, crop at {size[3]},{size[2]}  {caption or '(null caption)'}")
    images, captions = [np.ascontiguousarray(r[1]) for r in rows], [r[2] for r in rows]
    write_png(args.to or "sheet.png", contact_sheet(images, captions))
    h, w, _ = images[0].shape
    print(f"{args.to or 'sheet.png'}: {len(images)} images of {w}x{h} px, in the order above\n{batches.summary()}")


FUNCTION_WORDS = frozenset("""a about above across after against all along also although am among an and another any are around as at away back be because been
before behind being below beneath beside between beyond both but by can could did do does doing down during each either else every few for from had
has have left right having he her hers him his how i if in inside into is it its itself just let like many may me might more most much must my near neither no
nor not of off on once one only onto or other our out outside over own per s same she should since so some such t than that the their them then there
these they this those three through throughout to together too toward towards two under until up upon very via was we were what when where which
while who whom whose why will with within without would you your four five six seven eight nine ten known seen shown made held set taken sits sit
stands stand lies lie appears appear wears wear holds hold looks look shows show features feature gives give contains contain captures capture""".split())


def nouns(caption):
    """
    The nouns of an English caption, told without a tagger: of each unbroken run of content words the last one, since a noun phrase
    ends in its noun ("a large red circle"). Function words, punctuation and numbers break a run; adverbs and participles, known by
    -ly, -ing and -ed, are passed over. "Painting" and the first half of "stone church" are lost to that, and some verbs are counted.
    """
    found, last = [], None
    for word in words(caption) + ["."]:                        # the stop ends the last run
        if re.fullmatch(r"\w*[aeiouy]\w+(ly|ing|ed)", word):  # with a vowel before the ending: not ring, fly, red
            continue
        if word.isalpha() and word not in FUNCTION_WORDS:
            last = word
        elif last:                                             # a run ends here
            found, last = found + [last], None
    return found


def stats(args, config):
    """The columns of PixArt-Sigma's Table 1: valid distinct nouns (in more than 10 captions' nouns), distinct nouns, all nouns, words per caption."""
    data, kinds = open_data(config, LOOK), {}
    for i in tqdm(range(len(data)), "stats", disable=None):    # kinds: {"raw": captions, "long": captions}, one of each for an image
        for long in (False, True):
            number = data.choose(i, 0.0, long)
            if number >= 0 and (not long or number != data.choose(i)):             # long ones that stand in for missing raw ones count once
                kinds.setdefault("long" if long else "raw", []).append(data.text(number))
    print("caption   volume        VN        DN   total noun     ACL  average/img     (nouns by rule, without a tagger: see data.nouns)")
    for kind, captions in kinds.items():
        counts = Counter(n for c in captions for n in nouns(c))
        length = sum(len(words(c)) for c in captions) / len(captions)
        valid, total = sum(v > 10 for v in counts.values()), counts.total()        # VN: distinct nouns that are no slips of the pen
        print(f"{kind:7s} {len(captions):8d} {valid:9d} {len(counts):9d} {total:12d} {length:7.1f} {total / len(captions):12.1f}")
    print("VN: nouns that occur more than 10 times; DN: distinct nouns; ACL: average words of a caption; average/img: nouns of a caption")


def vocabulary(args, config):
    """Train a SentencePiece model on all captions (unigram, `--size` pieces at most; PixelGen-V2, Visual Foundation Model: 32,000)."""
    library, data, model = import_extra("sentencepiece", "a vocabulary"), open_data(config), io.BytesIO()
    count = data.captions_count
    library.SentencePieceTrainer.train(sentence_iterator=(data.text(n) for n in tqdm(range(count), "captions", disable=None)), model_writer=model,
                                       vocab_size=args.size, hard_vocab_limit=False, input_sentence_size=10 ** 7, shuffle_input_sentence=True, minloglevel=2)
    to = args.to or "captions.model"
    atomic_write(to, lambda f: f.write(model.getvalue()))
    pieces = library.SentencePieceProcessor(model_file=to).get_piece_size()
    print(f"{to}: {pieces} pieces of {count} captions. Train with --encoder sentencepiece:{to} --text_vocab {pieces + 1}")


def embed(args, config):
    """Embed all captions with each encoder, or all images with an autoencoder, and keep the results beside the index."""
    data = open_data(config)
    if not isinstance(data, Indexed) or not data.folder:
        raise UserError(f"{args.path!r} has no index, beside which embeddings are kept: python data.py index {args.path}")
    if not args.encoder and not args.vae:                      # both in one go are fine
        raise UserError("nothing to embed with: give --encoder t5-xxl:128 --weights FOLDER, or --vae FOLDER")
    if args.vae:
        config, sizes = config | {"autoencoder": args.vae}, bucket_sizes(config)
        embed_images(data, config, np.array(sizes)[nearest_bucket(sizes, data.all_sizes())], args.dtype)
    for encoder in open_encoders(args.encoder, args.weights, args.dtype) if args.encoder else ():
        embed_captions(data, encoder, args.dtype, config["batch"])


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
    write_table(latents_path(data, config), about, 3, len(data), make, config["batch"], "latents")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="any key of configs.txt is a flag too, as --resolution 256")
    parser.add_argument("command", choices=["index", "check", "show", "stats", "vocabulary", "embed"])
    parser.add_argument("path", help="a folder of images or of tar shards, or one .tar; but for index and check also an index, or scenes")
    parser.add_argument("--config", default="toy")
    parser.add_argument("--to", help="index: where it goes, default beside the data; show: the picture; vocabulary: the model")
    parser.add_argument("--json", help="index: also write the table there")
    parser.add_argument("--allow", default="", help="index: incomplete (shards, left out), uncaptioned (images, with the null caption)")
    parser.add_argument("--encoder", help="embed: such as t5-xxl:128,clip-h:77")
    parser.add_argument("--weights", default="", help="embed: the encoders' local folders, comma-separated")
    parser.add_argument("--vae", help="embed: local folder of an autoencoder, for latents at --resolution")
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="embed: of the encoder and of what is kept")
    parser.add_argument("--size", type=int, default=32000, help="vocabulary: pieces at most")
    args, rest = parser.parse_known_args()                     # rest: keys of configs.txt, which load_config checks
    if len(rest) % 2 or any(not key.startswith("--") for key in rest[::2]):
        raise UserError(f"cannot read {' '.join(rest)!r}: write --KEY VALUE, as in --resolution 64")
    config = load_config(args.config, "grow", [("data", args.path)] + [(key[2:], value) for key, value in zip(rest[::2], rest[1::2])])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # an exception, so that workers are ended and files closed
    try:
        globals()[args.command](args, config)
    except KeyboardInterrupt:
        print("\nstopped: the same command starts again, embeddings where they were", file=sys.stderr)
        sys.exit(130)
    except OSError as e:                                       # what is read is guarded where it is read: this is a full or read-only disk
        print(f"error: {e}: make room or choose a place that can be written with --to", file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    main()
