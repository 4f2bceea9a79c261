"""A kill leaves the old file or the new one; nothing is written over; what is not installed is named."""
import hashlib

import pytest

from lib.files import atomic_write, file_hash, free_name, import_extra
from lib.settings import UserError


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = str(tmp_path / "a.txt")
    atomic_write(file, lambda f: f.write(b"old"))

    def fail(f):
        f.write(b"half")
        raise OSError("full")
    with pytest.raises(OSError):
        atomic_write(file, fail)
    assert open(file).read() == "old"
    atomic_write(file, lambda f: f.write(b"new"))
    assert open(file).read() == "new"


def test_a_hash_is_of_a_file_or_of_the_weights_in_a_folder(tmp_path):
    assert file_hash(str(tmp_path)) is None and file_hash(str(tmp_path / "none")) is None
    for name, content in (("b.safetensors", b"two"), ("a.safetensors", b"one"), ("notes.txt", b"x"), ("c.bin", b"y")):
        (tmp_path / name).write_bytes(content)
    assert file_hash(str(tmp_path)) == hashlib.sha256(b"onetwo").hexdigest()
    assert file_hash(str(tmp_path / "c.bin")) == hashlib.sha256(b"y").hexdigest()


def test_a_free_name_is_one_that_does_not_exist(tmp_path):
    file = tmp_path / "grid.png"
    for name in ("grid.png", "grid_1.png", "grid_2.png"):
        assert free_name(str(file)) == str(tmp_path / name)
        (tmp_path / name).touch()


def test_what_is_not_installed_is_named(capsys):
    assert import_extra("json", "reading").loads("1") == 1
    with pytest.raises(UserError):
        import_extra("no_such.module", "reading images", "no-such")
    assert "reading images needs no-such: pip install no-such" in capsys.readouterr().err
