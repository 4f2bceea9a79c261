"""
Data sets by name, and what people ask of one: `python data.py check|index|stats|vocabulary PATH`. These four know
nothing of batches; each takes (args, config), the flags of data.py and a config's dict. Nothing here imports torch
before it is used: it takes longer than a folder of a thousand images.
"""
import json
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

from lib.files import atomic_write
from lib.images import index_folder, write_index
from lib.nouns import noun_table, words
from lib.scan import MUTE, open_images, require, scan
from lib.scenes import Scenes
from lib.settings import load_config

LOOK = ("incomplete", "uncaptioned")                           # what show and stats do not refuse: they are for looking


def open_data(config, allow=()):
    """The data set that `data` names: scenes, or images by their index, or scanned now where they have none."""
    return Scenes(config) if config["data"] == "scenes" else open_images(config["data"], allow)


def open_style(config):
    """The style set that `style` names, the style token before each caption."""
    styled = Scenes(config, "style") if config["style"] == "scenes" else open_images(config["style"])
    styled.prefix = f"{config['style_token']} "
    return styled


def check(args, config):
    """What was found, how many images each resolution would keep, and what training would refuse. Writes nothing."""
    data, bad = (open_data(config), []) if args.path == "scenes" else scan(args.path, config["workers"])
    print("\n".join(data.table()))
    if args.path == "scenes":
        print(f"pictures of one caption lie {data.left_open():.3f} of [0, 1] (rms) round their mean; near 0 a "
              "regression would do")
    mute = [f"no caption: {name}" for name, reason in bad if reason in MUTE]
    print("\n".join(mute[:20] + [f"no caption: {len(mute) - 20} more"] * (len(mute) > 20) + [""]), end="")
    if len(data):
        lengths = np.array([len(words(data.caption(i))) for i in range(min(len(data), 10000))])    # enough for a share
        cut = np.mean(lengths > config["text_length"])         # their last words are never read
        print(f"captions of {lengths.mean():.1f} words; {cut:.1%} are cut at text_length = {config['text_length']}")
        short = data.all_sizes().min(1)                        # (n,), the short sides
        for resolution in 16, 32, 64, 128, 256, 512, 1024:
            print(f"{resolution:5d} px keeps {np.mean(short >= resolution):7.1%}")
    if bad:
        require(data, bad)


def index(args, config):
    """Scan, print what was found, and write the index beside the data or to --to."""
    begin, folder = time.perf_counter(), args.to or index_folder(args.path)        # seconds
    data, bad = scan(args.path, config["workers"])
    print("\n".join(data.table()))
    if args.json:
        report = data.head["report"]
        captions = {k: report["captions"][k] for k in ("missing", "empty", "truncated")}           # what is promised
        atomic_write(args.json, lambda file: file.write(json.dumps(report | {"captions": captions}).encode()))
    require(data, bad, args.allow.split(","))                  # after the table, which tells more than the refusal
    write_index(folder, data, bad)                             # as a whole: readers see the old or the new
    print(f"{folder}: {len(data)} images indexed in {time.perf_counter() - begin:.1f} s; bad.tsv there names what was "
          f"not. Train on it: python train.py --data {args.to or args.path}")


def stats(args, config):
    """The columns of PixArt-Sigma's Table 1, for plain and for long captions."""
    data, captions = open_data(config, LOOK), {"plain": [], "long": []}            # one of each for an image
    for i in tqdm(range(len(data)), "stats", disable=None):
        plain, long = data.choose(i), data.choose(i, long=True)
        captions["plain"] += [data.text(plain)] * (plain >= 0)
        captions["long"] += [data.text(long)] * (long != plain)                    # or: it stands in for a missing one
    print("\n".join(noun_table({kind: [words(text) for text in texts] for kind, texts in captions.items()})))


def vocabulary(args, config):
    """Train a SentencePiece model on all captions (unigram, --size pieces at most; PixelGen-V2: 32,000)."""
    data, to = open_data(config), args.to or "captions.model"
    texts = (data.text(n) for n in tqdm(range(data.captions_count), "captions", disable=None))
    from lib.encoders import train_pieces
    pieces = train_pieces(texts, args.size, to)
    print(f"{to}: {pieces} pieces of {data.captions_count} captions. "
          f"Train with --encoder sentencepiece:{to} --text_vocab {pieces + 1}")


def run_command(parser, commands):
    """
    Run the command that the command line names, if it is one of {name: function of (args, config)}, and end there with
    status 0; 130 where it was interrupted, 4 where nothing can be written.
    """
    args, flags = parser.parse_keys()
    if args.command not in commands:
        return
    config = load_config(args.config, "grow", [("data", args.path), *flags])       # the stage whose images are largest
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # an exception, so that workers end and files are closed
    try:
        commands[args.command](args, config)
    except KeyboardInterrupt:
        print("\nstopped: the same command starts again, embeddings where they were", file=sys.stderr)
        sys.exit(130)
    except OSError as e:                                       # reading is guarded: this is a full or read-only disk
        print(f"error: {e}: make room or choose a place that can be written with --to", file=sys.stderr)
        sys.exit(4)
    sys.exit(0)
