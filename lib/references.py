"""
Folders of images as one side of a comparison: their features, computed once and kept beside the folder.

    files, size = list_images("real/")                         # all readable, of one size
    x = image_features(files, features)                        # (n, D); features as open_network gives them
    reference, size, words = open_reference("real/", networks) # {network: (n, D)}, from the file of an earlier call

What a kept file may stand for is checked by hashes: features of another network or of other pixels would give figures
that look alike and mean nothing. `networks` are {name: (features, about)}, `about` being what makes the numbers
comparable.
"""
import glob
import hashlib
import json
import os

import numpy as np
import torch

from lib.files import atomic_write, file_hash
from lib.images import IMAGES, pillow
from lib.processes import chunks, get_rank, on_all_ranks
from lib.settings import UserError


def list_images(path):
    """(files, (width, height)): the images under `path`, at least two of one size, each with a readable header."""
    files = sorted(glob.glob(os.path.join(glob.escape(path), "**"), recursive=True))
    files = [f for f in files if f.lower().endswith(IMAGES)]
    if len(files) < 2:
        raise UserError(f"{len(files)} images under {path!r}: a distance between sets needs at least 2 "
                        f"({' '.join(IMAGES)})")
    example = {}                                               # a file of each size
    for file in files:
        try:
            with pillow().open(file) as image:
                example.setdefault(image.size, file)           # from the header alone
        except Exception:                                      # pillow raises many kinds on bytes that are no image
            raise UserError(f"{file!r} cannot be read as an image: replace or remove it")
    if len(example) > 1:
        (one, a), (other, b), *_ = example.items()
        raise UserError(f"images of {len(example)} sizes under {path!r}, such as {a!r} {one} and {b!r} {other}: "
                        "crop and resize them alike first")
    return files, next(iter(example))


def find_images(folder, names):
    """The file of each name in a folder: NAME.png, or another known ending. UserError where one is missing."""
    files = []
    for name in names:
        candidates = [os.path.join(folder, name + ending) for ending in IMAGES]
        files.append(next(filter(os.path.isfile, candidates), None))
    if missing := [name for name, file in zip(names, files) if not file]:
        raise UserError(f"{folder!r} lacks {len(missing)} of {len(names)} pictures, such as {missing[0]}.png")
    return files


def labelled_images(folder, n):
    """
    ([class], [(file, class)]) of about n images of folder/CLASS/*, as many of each class, the first by name. Raises
    UserError unless there are two classes and each has an image.
    """
    classes = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*"))):
        if os.path.isdir(path):
            files = sorted(glob.glob(os.path.join(glob.escape(path), "*")))
            classes[os.path.basename(path)] = [f for f in files if f.lower().endswith(IMAGES)]
    if len(classes) < 2 or not all(classes.values()):
        raise UserError(f"{folder!r} holds classes {list(classes)}: give FOLDER/CLASS/*.png for two classes or more")
    share = -(-n // len(classes))                              # rounded up
    return list(classes), [(file, name) for name, files in classes.items() for file in files[:share]]


def read_image(file):
    """(H, W, 3) uint8; transparency is dropped, as pytorch-fid does."""
    try:
        with pillow().open(file) as image:
            return np.asarray(image.convert("RGB"))            # grey and palette images too
    except Exception as e:
        raise UserError(f"{file!r} breaks off ({e}): replace or remove it")


@torch.no_grad()
def image_features(files, features, shared=False):
    """(n, D) on the CPU, a chunk of files at a time, so that the images need not fit into memory."""
    def work(rows):
        return features(np.stack([read_image(files[i]) for i in rows])).cpu()      # (B, D)
    parts = on_all_ranks(work, chunks(len(files)), "features", shared)
    return torch.cat(parts or [torch.zeros(0)])                # of a process that only helps: none


def images_hash(files):
    """sha256 over names and contents in order: it changes with any image that is added, renamed or edited."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{os.path.basename(file)} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def open_reference(path, networks, shared=False):
    """
    ({network: (n, D)}, (width, height) or None, words for a card) of a folder, or of the one file that an earlier call
    kept of it. The features of a folder are kept beside it under a name with the hashes of network and images.
    """
    if os.path.isfile(path):
        read = {name: read_features(path, about) for name, (_, about) in networks.items()}
        size = next((tuple(content["size"]) for content in read.values()), None)
        words = f"features kept in {path}, sha256 {file_hash(path)}"
        return {name: content["features"] for name, content in read.items()}, size, words
    files, size = list_images(path)
    images, result = images_hash(files), {}
    for name, (features, about) in networks.items():
        how = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()   # resizing counts too
        file = f"{os.path.normpath(path)}.{name}-{how[:12]}-{images[:12]}.pt"
        if os.path.isfile(file):
            print(f"{name} features of {path} from {file}")
            result[name] = read_features(file, about)["features"]
            continue
        x = image_features(files, features, shared).float()
        if get_rank() == 0 or not shared:                      # the other ranks only help to compute
            result[name] = x
            write_features(file, {"features": x, "network": about, "size": list(size), "images": images})
    return result, size, f"{len(files)} images of {path}, {size} px, sha256 {images}"


def write_features(file, content):
    """Write them beside the folder, as a whole; a folder that cannot be written next to is no reason to stop."""
    try:
        atomic_write(file, lambda f: torch.save(content, f))
    except (OSError, RuntimeError) as e:
        print(f"the features are not kept in {file}: {e}")


def read_features(file, about):
    """What write_features wrote, if it was made by this very network in this very way. Nothing in it is executed."""
    try:
        content = torch.load(file, weights_only=True)          # which runs no code
        x, made, _ = content["features"], content["network"], content["size"]      # a KeyError where one is missing
        if x.ndim != 2 or len(x) < 2 or not x.isfinite().all():
            raise ValueError(f"features {tuple(x.shape)} must be (n, D), at least 2 rows, without NaN or infinity")
    except Exception as e:
        raise UserError(f"{file!r} holds no features that were kept here ({type(e).__name__}: {e}): "
                        "give the folder of images, or another file")
    if made != about:
        other = next(k for k in {**about, **made} if about.get(k) != made.get(k))
        raise UserError(f"{file!r} was made with {other} = {made.get(other)!r}, not {about.get(other)!r}: "
                        "give the folder of images instead")
    return content


def check_same_size(networks, one, other):
    """Random features see pixels as they are, so two sets must have one size; the other networks resize."""
    if "random" in networks and None not in (one, other) and tuple(one) != tuple(other):
        raise UserError(f"images of {one} and {other} px: random features depend on the size; resize one set")
