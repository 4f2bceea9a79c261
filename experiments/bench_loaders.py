"""
Batches of images from files: a part of experiments.bench. The same JPEGs in a folder and in tar shards, read by ours,
by bare pillow, by webdataset and by Hugging Face datasets, each brought to cover 256 x 256 and cropped at random.

Ours also checks each file's checksum and makes tokens and sizes; the others give pixels and captions. One epoch of each
in turn, five times, each time anew: nothing is kept from one to the next but the system's cache of files. Beside images
per second stands what an image costs in CPU time of all processes, which a busy machine changes less.
"""
import io
import os
import resource
import statistics
import tarfile
import tempfile
import time

import numpy as np
import torch

from data import Batches
from experiments.bench_report import cell
from lib.images import index_folder, pillow, write_index
from lib.scan import open_images, scan
from lib.settings import load_config

SIDE, BATCH = 256, 16                                               # pixels; images
ROUNDS, SHARDS = 5, 4


def write_photos(folder, n):
    """n JPEGs of 512 x 384, smooth and noisy parts as in photographs (about 70 KB), in a folder and in shards."""
    random = np.random.default_rng(0)
    for name in ("photos", "shards"):
        os.makedirs(os.path.join(folder, name))
    for shard in range(SHARDS):
        with tarfile.open(os.path.join(folder, "shards", f"{shard}.tar"), "w") as tar:
            write_shard(tar, os.path.join(folder, "photos"), range(shard, n, SHARDS), random)


def write_shard(tar, folder, numbers, random):
    """The photos of these numbers, and a caption of each, into a tar and as files into a folder."""
    for i in numbers:
        coarse = pillow().fromarray(random.integers(0, 256, (12, 16, 3), np.uint8)).resize((512, 384))
        pixels = np.asarray(coarse).astype(float) + random.normal(0, 12, (384, 512, 1))
        buffer = io.BytesIO()
        pillow().fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        for name, data in ((f"{i:05}.jpg", buffer.getvalue()), (f"{i:05}.txt", f"photo number {i}".encode())):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def to_square(image):
    """A pillow image -> (3, SIDE, SIDE) float in [-1, 1], cropped at random: what users of the others write."""
    image = image.convert("RGB")
    scale = SIDE / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], pillow().Resampling.BICUBIC)
    left, top = (int(torch.randint(side - SIDE + 1, ())) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))          # (SIDE, SIDE, 3)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


class Photos(torch.utils.data.Dataset):
    """Bare pillow: a path, a picture."""

    def __init__(self, folder):
        self.paths = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".jpg"))

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return to_square(pillow().open(self.paths[i]))


def load(dataset, workers, **options):
    """The batches of one epoch."""
    return torch.utils.data.DataLoader(dataset, num_workers=workers, **options)


def ours(path, n):
    """workers -> batches"""
    config = load_config("toy", "grow", [("data", path), ("resolution", str(SIDE)), ("batch", str(BATCH)),
                                         ("steps", str(n // BATCH))])
    return lambda workers: load(Batches(open_images(path), config, False), workers, batch_size=None)


def of_webdataset(folder):
    """workers -> batches"""
    from webdataset import WebDataset
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".tar")]

    def batches(workers):
        stream = WebDataset(paths, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg", "txt")
        return load(stream.map_tuple(to_square, str).batched(BATCH), workers, batch_size=None)
    return batches


def of_datasets(folder, cache):
    """workers -> batches"""
    from datasets import load_dataset
    table = load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=cache)
    table.set_transform(lambda rows: {"image": [to_square(image) for image in rows["image"]]})
    return lambda workers: load(table, workers, batch_size=BATCH)


def compare_loaders(deadline, quick):
    """Yields a row for each way and number of workers: images per second, median, least and most; ours over it."""
    n = 64 if quick else 1024
    with tempfile.TemporaryDirectory() as folder:
        write_photos(folder, n)
        photos, shards, cache = (os.path.join(folder, name) for name in ("photos", "shards", "cache"))
        for path in (photos, shards):
            write_index(index_folder(path), *scan(path, 0))
        makers = {"ours, folder": lambda: ours(photos, n), "ours, tar": lambda: ours(shards, n),
                  "bare pillow": lambda: lambda workers: load(Photos(photos), workers, batch_size=BATCH),
                  "webdataset, tar": lambda: of_webdataset(shards),
                  "datasets, folder": lambda: of_datasets(photos, cache)}
        ways = {}
        for name, make in makers.items():
            try:
                ways[name] = make()
            except ImportError as problem:                          # an extra of the bench alone
                yield dict(way=name, problem=f"{problem}: pip install webdataset datasets")
        for workers in (0,) if quick else (0, 2):
            yield from race_loaders(ways, workers, n, deadline)


def race_loaders(ways, workers, n, deadline):
    """The rows of one number of workers."""
    rates, costs = ({name: [] for name in ways} for _ in range(2))  # images per second, CPU seconds, of each round
    for _ in range(2 if n < 100 else ROUNDS):
        for name, batches in ways.items():
            if time.time() > deadline:
                raise TimeoutError("no time left")
            begin, spent, seen = time.perf_counter(), cpu_seconds(), 0
            for batch in batches(workers):
                seen += len(batch["image"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list))
                            else batch)
            assert seen == n, f"{name}: {seen} of {n} images"
            rates[name].append(seen / (time.perf_counter() - begin))
            costs[name].append(cpu_seconds() - spent)
    median = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        row = dict(way=name, workers=workers, img_s=median[name], least=min(values), most=max(values),
                   cpu_ms=1000 * statistics.median(costs[name]) / n,
                   ours_over=median["ours, tar" if "tar" in name else "ours, folder"] / median[name])
        print("  ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
        yield row


def cpu_seconds():
    """Of this process and of all its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in used)
