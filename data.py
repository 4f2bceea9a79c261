"""
What goes in: captioned pictures, which of them at which step, and captions turned into tokens or embeddings.

    python data.py check PATH                      what would be used of a folder or of tar shards, what not, and why
    python data.py index PATH                      write that down beside the data, for millions of images
    python data.py show PATH --resolution 64       look at a training batch after all transforms (PATH or scenes)
    python data.py stats PATH                      nouns and lengths of the captions
    python data.py embed PATH --encoder t5-xxl:128,clip-h:77 --weights FOLDER,FOLDER      embed all captions once
    python data.py embed PATH --prefix TOKEN ...                                          a style set's, with its token
    python data.py embed PATH --vae FOLDER --resolution 512                the same for images; by several with torchrun
    python data.py vocabulary PATH --to captions.model             train a SentencePiece model on the captions

Every random choice (bucket, order, style; crop, flip, colours, caption) is a pure function of a key, its purpose first,
such as ("order", stage, seed, epoch, bucket): a run can go on anywhere, on any number of devices, without the state of
any generator.

The way of a batch: Batches[step] -> sources (the style set's rows) -> pairs (which samples) -> bucket_at, order; then
sample (view, crop, flip, colours, caption) -> encode_captions.

A data set is lib/scenes.py's Scenes or lib/images.py's Indexed; open_data in lib/datasets.py opens it. Another one
serves the same methods:
    len(data), name, fingerprint   how many images; what to call it; tells other files from these, "" if there are none
    folder                         where caches lie, or None; with one, captions_digest() tells other captions apart
    size(i), all_sizes()           native (width, height) of image i; int (n, 2) of all
    view(i, height, width, (x, y), rule)       (H, W, 3) uint8, top and left of the crop that x, y in [0, 1) place
    choose(i, which, long)         id of one of its captions, -1 if it has none: an image may have several
    text(caption_id), caption(i)   a caption by its id, "" for -1; the first caption of image i
    prefix                         what both put before every caption: a style token and a space, or ""
    captions_count                 of all images
    where(i), unreadable           a name for messages; the set of those that failed
    numbers                        {name: (least, largest)} of the numbers that its images have (lib/conditions.py)
    number(i, name)                that of image i, NaN where it has none
    held_out()                     the data that a run is scored on
    table()                        lines that tell what was found

Letters: B images in a batch, b on this device, C = 3 channels, H W height and width in pixels, c h w those of latents;
L caption tokens, E their width, K numbers that condition a picture, n items of a data set.
"""
import functools
import itertools
import math
import os
import sys
from collections import namedtuple

from lib.settings import Parser, UserError

parser = Parser(__doc__)
add = parser.add_argument
add("command", choices=["check", "index", "show", "stats", "embed", "vocabulary"])
add("path", help="a folder of images or of tar shards, or one .tar; scenes; but for index and check also an index")
add("--config", default="toy")
add("--to", help="index: where it goes, default beside the data; show: the picture; vocabulary: the model")
add("--json", help="index: also write the table there")
add("--allow", default="", help="index: incomplete (shards, left out), uncaptioned (images, with the null caption)")
add("--encoder", help="embed: such as t5-xxl:128,clip-h:77")
add("--weights", default="", help="embed: the encoders' local folders, comma-separated")
add("--vae", help="embed: local folder of an autoencoder, for latents at --resolution")
add("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="embed: of the encoder and of what is kept")
add("--size", type=int, default=32000, help="vocabulary: pieces at most")
parser.answer(__name__)                                        # --help need not wait for what is imported next

from lib.datasets import LOOK, check, index, open_data, run_command, stats, vocabulary

if __name__ == "__main__":                                     # nor need these: they end here
    run_command(parser, {"check": check, "index": index, "stats": stats, "vocabulary": vocabulary})

import numpy as np
import torch

from lib.buckets import bucket_sizes, nearest_bucket
from lib.conditions import condition_names, condition_row, ranges_seen
from lib.draws import generator, uniforms
from lib.encoders import (EmbeddingCache, LatentCache, embed_captions, embed_images, embed_now, encoder_identity,
                          has_pretrained_encoder, latents_path, open_encoders, padded, to_pieces, tokenize)
from lib.images import Unfit, covering, jittered
from lib.pictures import contact_sheet, to_tensor, write_png
from lib.processes import get_world_size, join
from lib.tables import is_begun
from model import token_size


# ---- batches: which samples make up the batch of a step, and how each is cropped, mirrored, recoloured and captioned -

Sample = namedtuple("Sample", ["image", "caption", "size", "caption_id", "i", "conditions"])     # see Batches.sample


class Batches(torch.utils.data.Dataset):
    """
    Item `step` is the batch of that step: x (b, 3, H, W), or latents (b, c, h, w) where `latents` is set; text (b, L),
    or (b, L, E) of cached embeddings; and conditions (b, K) float, NaN where a number is absent or was dropped. Of
    `world` devices, device `rank` gets the rank-th share of its rows. `filtered` leaves out images that are smaller
    than the target. Raises UserError where fewer than a batch are left. With a style set, `styled`, some rows are of
    that: a mixture (Greedy Growing, Sec. 6).

    Every batch is of one bucket, the same on every device, and each bucket gets its share: after r rounds through the
    data a bucket of n images has had floor(r n / batch) batches. With batches of 4 and buckets of 10 and 5 images these
    are 2 and 1 batches after one round, 5 and 2 after two; so the second round has 3 and 1, and takes up the two images
    and the one that the first left over. Within a round they come in a shuffled order.
    """

    def __init__(self, data, config, filtered, stage="pretrain", rank=0, world=1, styled=None):
        self.data, self.config, self.stage, c = data, config, stage, config
        b = c["batch"] // world                                # rows of one device
        self.rows = slice(rank * b, (rank + 1) * b)            # of the whole batch: this device's
        self.sizes, images = bucket_sizes(c["aspects"], c["resolution"], token_size(c)), data.all_sizes()
        self.bucket = nearest_bucket(self.sizes, images)       # (n,)
        target = np.array(self.sizes, np.int32)[self.bucket][:, ::-1]              # (n, 2), width first as in images
        large = (images >= target).all(1)                      # both sides at least as large as the target (Sec. 3.3)
        used = large if filtered and not c["upscale"] else np.ones(len(images), bool)
        self.usable, self.removed = np.flatnonzero(used), 1 - used.mean()          # numbers of images; a share
        self.members = [np.flatnonzero(used & (self.bucket == k)).astype(np.int32) for k in range(len(self.sizes))]
        if not len(self.usable):
            raise UserError(f"none of {len(data)} images is {c['resolution']} px or more on both sides: "
                            "lower --resolution, or --upscale True keeps them")
        if len(self.usable) < c["batch"]:
            raise UserError(f"batch = {c['batch']} and only {len(self.usable)} usable images: lower --batch")
        self.orders = {}                                       # {(bucket, epoch): its samples in order}
        # data from files read what was embedded once; latents that were not are made by train.py, batch by batch
        cached = data.fingerprint and has_pretrained_encoder(c["encoder"])
        self.embeddings = EmbeddingCache(data, c) if cached else None
        self.latents = LatentCache(data, c) if c["autoencoder"] and is_begun(latents_path(data, c)) else None
        same = {"batch": 1, "encoder_id": self.embeddings.id if self.embeddings else c["encoder_id"]}
        self.styled = Batches(styled, c | same, filtered, f"{stage} style") if styled else None
        if styled and (not self.latents, not self.embeddings) != (not self.styled.latents, not self.styled.embeddings):
            raise UserError(f"{data.name} and its style set: embed captions of both or of none, and images "
                            "too (data.py embed, --vae for images); scenes are never embedded: --data PATH")

    def __len__(self):
        return self.config["steps"]

    def __getitem__(self, step):
        rows = self.sources(step)[self.rows]                   # only this device's images are read
        samples = [own.sample(epoch, i, own.latents) for own, epoch, i in rows]
        images, captions, _, ids, _, conditions = zip(*samples)
        x = torch.stack(images) if self.latents else to_tensor(np.stack(images))   # (b, C, H, W)
        text = (torch.cat([row[0].embeddings([caption_id]) for row, caption_id in zip(rows, ids)]) if self.embeddings
                else encode_captions(captions, self.config))
        return x, text, torch.tensor(conditions, dtype=torch.float32)              # ..., (b, L) or (b, L, E), (b, K)

    def sources(self, step):
        """
        (Batches, epoch, sample) of each row of the step's whole batch. A row is of the style set with a chance of
        style_share, and then any image of the same bucket.
        """
        rows, draw = [(self, *pair) for pair in self.pairs(step)], ("style", self.stage, self.config["seed"], step)
        peers = self.styled.members[self.bucket_at(step)[0]] if self.styled else ()
        for row in range(len(rows) if len(peers) else 0):      # a bucket without images of the style stays as it is
            chance, which = uniforms(2, *draw, row)
            if chance < self.config["style_share"]:            # its crop, flip and caption are drawn for it alone
                rows[row] = self.styled, step * len(rows) + row, int(peers[int(which * len(peers))])
        return rows

    def pairs(self, step):
        """The (epoch, sample) of each row of the step's whole batch: a function of the step, no state."""
        bucket, before = self.bucket_at(step)                  # `before`: batches of it until now
        batch, n = self.config["batch"], len(self.members[bucket])                 # of the whole batch; of the bucket
        # a bucket's batches are consecutive places of its epochs, one permutation after the other: a batch may span two
        places = range(before * batch, (before + 1) * batch)
        return [(place // n, int(self.order(bucket, place // n)[place % n])) for place in places]

    def bucket_at(self, step):
        """(bucket, how many batches of it came before) of a step: see the worked example above."""
        if len(self.members) == 1:                             # one bucket: every batch is its own
            return 0, step
        batch = self.config["batch"]

        def made(r):                                           # batches of each bucket after r rounds
            return np.array([r * len(images) // batch for images in self.members])
        r = step * batch // len(self.usable)                   # this many rounds have at most `step` batches
        while made(r + 1).sum() <= step:
            r += 1                                             # floor() may cost a batch of each bucket
        before, now = made(r), made(r + 1)
        order = np.repeat(np.arange(len(before)), now - before)                    # this round's batches by bucket
        order = generator("buckets", self.stage, self.config["seed"], r).permutation(order)
        place = step - before.sum()                            # of the step in its round
        bucket = order[place]
        return bucket, int(before[bucket] + (order[:place] == bucket).sum())

    def order(self, bucket, epoch):
        """The samples of a bucket in this epoch's order. Two epochs are remembered, since a batch may span them."""
        if (bucket, epoch) not in self.orders:
            self.orders = {(b, e): o for (b, e), o in self.orders.items() if b != bucket or abs(e - epoch) < 2}
            # a generator made anew from this key alone: no state, so any step can be asked for first
            draw = generator("order", self.stage, self.config["seed"], epoch, bucket)
            self.orders[bucket, epoch] = draw.permutation(self.members[bucket])    # 4 bytes an image
        return self.orders[bucket, epoch]

    def sample(self, epoch, i, source=None):
        """
        Sample i in this epoch, or the next one that can be read: image (H, W, 3) uint8, caption, row of size, id of
        the caption or -1, i, and row of conditions. Crop, flip, colours, caption and what is dropped are functions of
        (stage, seed, epoch, i). From a LatentCache as source, the image is (c, h, w) float. Raises UserError if no
        image of the bucket can be read.
        """
        c, source = self.config, source or self.data
        # always nine numbers, so that no key changes what another one draws
        x, y, flip, drop, which, long, *colours = uniforms(9, "data", self.stage, c["seed"], epoch, i)
        height, width = self.sizes[self.bucket[i]]             # of the target, pixels
        i, (image, top, left) = self.first_readable(source, i, height, width, (x, y))
        w, h = self.data.size(i)                               # native
        if c["flip"] and flip < 0.5:
            image = image[:, ::-1]                             # (H, W, 3), left to right
            left = covering((w, h), height, width, c["resize"])[0] - width - left  # counted from the other side
        if c["jitter"]:
            image = jittered(image, colours, c["jitter"])
        caption_id = self.data.choose(i, which, long < c["long_captions"])             # -1 where it has none
        if drop < c["caption_dropout"]:                        # guidance needs the model without a caption too
            caption_id = -1                                    # (Ho and Salimans): "", for the model all zeros
        size = h, w, top, left, height, width                  # what size_and_crop tells (SDXL)
        return Sample(image, self.data.text(caption_id), size, caption_id, i, self.conditions(epoch, i, size))

    def conditions(self, epoch, i, size):
        """The row of conditions of sample i. Each number is dropped by itself: a model can be asked without it."""
        if not (names := condition_names(self.config)):
            return []
        draws = uniforms(len(names), "conditions", self.stage, self.config["seed"], epoch, i)
        kept = {name for name, draw in zip(names, draws) if draw >= self.config["condition_dropout"]}
        return condition_row(self.config, size, lambda name: self.data.number(i, name) if name in kept else math.nan)

    def first_readable(self, source, i, height, width, place):
        """(i, view). What cannot be decoded is named, and its successor in the same bucket stands in."""
        peers = self.members[self.bucket[i]]                   # only these are brought to the same size
        at = int(np.searchsorted(peers, i))                    # members are in ascending order
        successors = (int(peers[(at + k) % len(peers)]) for k in range(1, len(peers)))
        for j in itertools.chain([i], successors):
            try:
                return j, source.view(j, height, width, place, self.config["resize"])
            except (OSError, Unfit) as e:
                if j not in self.data.unreadable:              # each worker names it once
                    print(f"skipped {self.data.where(j)}: {e}", file=sys.stderr)
                self.data.unreadable.add(j)
        raise UserError(f"no image of {self.data.name} can be decoded: the lines above name them")

    @property
    def identity(self):
        """
        {"data_id", "encoder_id", "condition_ranges"}: what data and which encoder a model is trained with, for its
        config and so for its checkpoint. A run refuses to go on with other data, unless it is given the old data_id by
        hand (--data_id).
        """
        old, sets = self.config["data_id"], [self.data, *([self.styled.data] if self.styled else [])]
        here = "+".join(filter(None, (data.fingerprint for data in sets)))
        if old not in ("", here):                              # "" is scenes, or a new run
            print(f"data {self.data.name} has the fingerprint {here or 'of no file'}: "
                  f"taken in place of {old}, as data_id says", file=sys.stderr)
        encoder = self.embeddings.id if self.embeddings else encoder_identity(self.config)
        return {"data_id": old or here, "encoder_id": encoder, "condition_ranges": ranges_seen(self.config, self.data)}

    def summary(self):
        """Lines that tell what is used and what is left out."""
        c, used = self.config, f"{len(self.usable)} of {len(self.data)} images are used"
        small = f"; {self.removed:.1%} are smaller than {c['aspects'] or c['resolution']} px and left out"
        lines = [f"data {self.data.name}: {used}" + f"{small} (--upscale True keeps them)" * bool(self.removed)]
        if len(self.sizes) > 1:
            buckets = [f"{h}x{w}: {len(m)}" for (h, w), m in zip(self.sizes, self.members) if len(m)]
            lines.append("  buckets " + ", ".join(buckets))
        lines += self.data.table()
        if self.styled:
            lines += [f"style set: a row of a batch with a chance of {c['style_share']:g}", self.styled.summary()]
        return "\n".join(lines)


# ---- captions -> tokens or embeddings --------------------------------------------------------------------------------


def encode_captions(captions, config):
    """
    What the model reads: (B, L) int64 tokens, or (B, L, E) float embeddings; the null caption "" is all zeros.
    `encoder` is "words", "sentencepiece:FILE" or frozen encoders such as "t5-xxl:128,clip-h:77". Of those only captions
    of the data's own cache are known without encoder_weights. Raises UserError for an encoder other than encoder_id,
    the model's.

    From here on, as `text`: train.py's loop -> diffusion_loss -> Denoiser -> Core.embed, which brings it to the core's
    width (model.py: PretrainedEncoding, of tokens WordEncoding) -> CrossAttention of every block: its keys and values.
    Before it, of frozen encoders: lib/encoders.py's Encoder, now (embed_now) or beforehand (data.py embed, then
    EmbeddingCache).
    """
    kind = config["encoder"]
    if kind == "words":                                        # learned along with the core
        return tokenize(captions, config["text_length"], config["text_vocab"])
    if kind.startswith("sentencepiece:"):
        return padded(to_pieces(captions, config), config["text_length"])          # (B, L)
    if not any(captions):                                      # the null caption takes no weights
        return torch.zeros(len(captions), config["text_length"], max(config["encoder_width"]))
    return embed_now(captions, config) if config["encoder_weights"] else embed_known(captions, config)


def embed_known(captions, config):
    """Embeddings (B, L, E) of captions that the data set itself holds: previews and scores need no encoder."""
    how = f"set encoder_weights to local folders of {config['encoder']}, comma-separated"
    if not os.path.exists(config["data"]):
        raise UserError(f"captions need embeddings, and {config['data']} holds none of {config['encoder']}: {how}")
    keys = "data", "encoder", "encoder_width", "encoder_id", "encoder_weights"
    cache = open_cache(tuple((k, config[k]) for k in keys))
    unknown = [c for c in captions if c not in cache.numbers]
    if unknown:
        raise UserError(f"{unknown[0]!r} is not among the embedded captions of {config['data']}: {how}")
    return cache([cache.numbers[c] for c in captions])         # (B, L, E)


@functools.lru_cache(2)
def open_cache(pairs):
    """The EmbeddingCache of a data set, by pairs of a config: a dict cannot be a key of lru_cache."""
    return EmbeddingCache(open_data(dict(pairs)), dict(pairs))


# ---- commands (the others: lib/datasets.py): each takes (args, config), flags and a config's dict --------------------


def show(args, config):
    """A contact sheet of step 0's batch after all transforms, captions beneath, and where each image comes from."""
    data = open_data(config, LOOK)
    config = config | {"encoder": "words", "autoencoder": ""}                      # pixels, not what models read
    usable = len(Batches(data, config | {"batch": 1}, filtered=True).usable)       # how many could be shown
    batches = Batches(data, config | {"batch": min(config["batch"], usable)}, filtered=True)       # a few will do
    samples = [batches.sample(epoch, i) for epoch, i in batches.pairs(0)]
    captions = [s.caption or ("(caption dropped)" if data.choose(s.i) >= 0 else "(no caption)") for s in samples]
    print("   image  file                      size       crop at    caption")
    for s, caption in zip(samples, captions):
        h, w, top, left, _, _ = s.size
        print(f"{s.i:8d}  {data.where(s.i):24s}  {f'{w}x{h}':9s}  {f'{left},{top}':9s}  {caption}")
    file, images = args.to or "sheet.png", [np.ascontiguousarray(s.image) for s in samples]
    write_png(file, contact_sheet(images, captions))
    h, w, _ = images[0].shape
    print(f"{file}: {len(images)} images of {w}x{h} px, in the order above\n{batches.summary()}")


def embed(args, config):
    """Embed all captions with each encoder, or all images with an autoencoder, into tables beside the index."""
    if get_world_size() > 1 and join(timeout=7 * 24 * 3600)[0]:                    # seconds: others may take longer
        sys.stdout = open(os.devnull, "w")                     # one voice
    data = open_data(config)
    if not data.folder:
        raise UserError(f"{args.path!r} has no index, beside which they would lie: python data.py index {args.path}")
    if not args.encoder and not args.vae:                      # both in one go are fine
        raise UserError("nothing to embed with: give --encoder t5-xxl:128 --weights FOLDER, or --vae FOLDER")
    if args.encoder and not args.weights:
        raise UserError(f"--encoder {args.encoder}: where are its weights? Add --weights FOLDER")
    data.prefix = config["prefix"] and config["prefix"] + " "  # of a style set: its token
    if args.vae:
        sizes = bucket_sizes(config["aspects"], config["resolution"], token_size(config))
        targets = np.array(sizes)[nearest_bucket(sizes, data.all_sizes())]         # (n, 2), as in Batches
        embed_images(data, config | {"autoencoder": args.vae}, targets, args.dtype)
    for encoder in open_encoders(args.encoder, args.weights, args.dtype) if args.encoder else ():
        embed_captions(data, encoder, args.dtype, config["batch"])


if __name__ == "__main__":
    run_command(parser, {"show": show, "embed": embed})
