"""Files written whole or not at all, their hashes and free names; and packages that only some need."""
import glob
import hashlib
import importlib
import os

from lib.settings import UserError


def atomic_write(path, write):
    """Write a file as a whole, write(file) its bytes: a kill at any moment leaves the old file or the new one."""
    with open(path + ".part", "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())                                # else the name could reach the disk before the contents
    os.replace(path + ".part", path)


def file_hash(path):
    """sha256 of a file, or of the weights in a folder, one after the other; None where there are none."""
    folder = glob.escape(path)
    files = [path] if os.path.isfile(path) else []
    if os.path.isdir(path):                                    # weights alone: notes beside them may change
        files = sorted(glob.glob(f"{folder}/*.safetensors")) or sorted(glob.glob(f"{folder}/*.bin"))
    digest = hashlib.sha256()
    for name in files:
        with open(name, "rb") as file:
            while block := file.read(2 ** 20):                 # weights may be larger than memory
                digest.update(block)
    return digest.hexdigest() if files else None


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
