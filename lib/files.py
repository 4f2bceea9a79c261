"""
Files written whole or not at all, their hashes and free names; packages that only some need; and local folders with
the networks of others, from which nothing is downloaded and nothing unpickled.
"""
import contextlib
import functools
import glob
import hashlib
import importlib
import json
import os
import re

from tqdm import tqdm

from lib.settings import UserError


def part_name(path):
    """Where a file is written before it takes its name: another place in each process, so that two may write one."""
    return f"{path}.{os.uname().nodename}-{os.getpid()}.part"  # process numbers are those of a machine


def clear_parts(path):
    """Remove what writers of a file left behind that were killed; those of other machines may still be at work."""
    start = f"{path}.{os.uname().nodename}-"
    for part in glob.glob(glob.escape(start) + "*.part"):
        number = part.removeprefix(start).removesuffix(".part")
        if number.isdigit() and not is_alive(int(number)):
            with contextlib.suppress(FileNotFoundError):       # another writer clears as well
                os.remove(part)


def is_alive(process):
    """Is there a process of this number on this machine?"""
    try:
        os.kill(process, 0)                                    # signal 0 is never sent
    except ProcessLookupError:
        return False
    except PermissionError:                                    # it is somebody else's
        pass
    return True


def atomic_write(path, write):
    """
    Write a file as a whole, write(file) its bytes: a kill at any moment leaves the old file or the new one, and what
    was half written goes with the next write. Of several processes that write at once the last one's file stays.
    """
    clear_parts(path)
    part = part_name(path)
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())                            # else the name could reach the disk before the contents
        os.replace(part, path)
    except BaseException:                                      # Ctrl-C too
        if os.path.exists(part):
            os.remove(part)
        raise


def file_hash(path):
    """
    sha256 of a file, or of the weights in a folder, one after the other; None where there are none. Of a folder that
    has them in its subfolders it is made of the hashes of these, each of which is read once in a process.
    """
    folder = glob.escape(path)
    files = [path] if os.path.isfile(path) else []
    if os.path.isdir(path):                                    # weights alone: notes beside them may change
        files = next(filter(None, (sorted(glob.glob(f"{folder}/{kind}")) for kind in ("*.safetensors", "*.bin"))), [])
    digest = hashlib.sha256()
    if parts := not files and sorted({os.path.dirname(name) for name in glob.glob(f"{folder}/*/*.safetensors")}):
        digest.update(" ".join(map(weights_hash, parts)).encode())
    for name in files:
        with open(name, "rb") as file:
            while block := file.read(2 ** 20):                 # weights may be larger than memory
                digest.update(block)
    return digest.hexdigest() if files or parts else None


def free_name(path):
    """`path`, or path_1, path_2 ...: the first that does not exist, so that nothing is overwritten."""
    (stem, ending), name, k = os.path.splitext(path), path, 0
    while os.path.exists(name):
        k += 1
        name = f"{stem}_{k}{ending}"
    return name


def import_extra(module, purpose, package=None):
    """A module of a package that only some need, imported where it is used. UserError says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose} needs {package or module}: pip install {package or module}")


# ---- local folders ---------------------------------------------------------------------------------------------------

def read_json(*path):
    """The dict in a JSON file of a local folder. UserError where it is missing or broken."""
    path = os.path.join(*path)
    try:
        with open(path, encoding="utf-8") as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{path!r} cannot be read ({type(e).__name__}): bring the whole folder, as it was published")


def weight_files(folder):
    """
    (variant, paths): the safetensors of a folder, whole or in shards, as diffusers and transformers name them. Variants
    such as fp16 (model.fp16.safetensors) count only where there are no plain weights, whose variant is None.
    """
    pattern, found = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?(\.(\w+))?(-\d+-of-\d+)?\.safetensors", {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        if match := re.fullmatch(pattern, name):
            found.setdefault(match[4], []).append(os.path.join(folder, name))
    variant = min(found, key=lambda name: name or "", default=None)
    return variant, found.get(variant, [])


def read_weights(path, purpose):
    """{name: tensor} of a .safetensors, mapped into memory. UserError where it is cut short, or something else."""
    load_file = import_extra("safetensors.torch", purpose, "safetensors").load_file
    try:
        return load_file(path)
    except Exception as e:                                     # its own kinds, and those of the system
        raise UserError(f"{path!r} cannot be read ({str(e)[:200]}): bring it whole; a few lines of text in its place "
                        "are a pointer, for which `git lfs pull` fetches the file")


def local_weights(folder):
    """Options of from_pretrained that keep it to this folder and to safetensors, and let it tell what is missing."""
    return {"local_files_only": True, "use_safetensors": True, "output_loading_info": True,
            "variant": weight_files(folder)[0]}


def complete(net, info):
    """The network, unless weights are missing: these libraries would draw them at random."""
    if info["missing_keys"]:
        raise ValueError(f"{sorted(info['missing_keys'])[0]} is missing")
    return net


@functools.lru_cache(8)                                        # reading 20 GB takes a while
def weights_hash(folder):
    """
    sha256 of all weights and vocabularies in a folder, 16 digits: the identity of a network. UserError where it holds
    no .safetensors.
    """
    digest, kinds = hashlib.sha256(), (".safetensors", ".json", ".model", ".txt")
    files = sorted(f for f in os.listdir(folder) if f.endswith(kinds))
    if not any(f.endswith(".safetensors") for f in files):
        raise UserError(f"no .safetensors in {folder!r}: bring them, since pickled weights (.bin) could run code")
    for name in tqdm(files, f"sha256 of {folder}", leave=False, disable=None):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def from_folder(what, folder, hint, load):
    """load(), which opens a frozen network from a local folder; UserError where that fails."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError(f"no {what} in {folder!r}: {hint}")
    try:
        return load()
    except Exception as e:                    # transformers and diffusers raise many kinds; a UserError is no Exception
        raise UserError(f"{folder!r} does not open as {what} ({type(e).__name__}: {str(e)[:200]}): {hint}")
