"""A kill leaves the old file or the new one; nothing is written over; what is not installed is named."""
import hashlib
import multiprocessing
import os

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
    assert open(file).read() == "old" and os.listdir(tmp_path) == ["a.txt"]        # and nothing half
    atomic_write(file, lambda f: f.write(b"new"))
    assert open(file).read() == "new"


def write_slowly(file, letter, both_begun):
    def write(f):
        f.write(letter * 1000)
        f.flush()
        both_begun.wait(30)                                    # both files are open, and half of each is written
        f.write(letter * 1000)
    atomic_write(file, write)


def test_two_processes_that_write_a_file_at_once_leave_one_of_theirs_whole(tmp_path):
    file, both_begun = str(tmp_path / "a.txt"), multiprocessing.Barrier(2)
    writers = [multiprocessing.Process(target=write_slowly, args=(file, letter, both_begun)) for letter in (b"x", b"y")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert open(file, "rb").read() in (b"x" * 2000, b"y" * 2000) and os.listdir(tmp_path) == ["a.txt"]


def write_half(file, begun, go_on):
    def write(f):
        f.write(b"half")
        f.flush()
        begun.release()
        go_on.wait(30)
    atomic_write(file, write)


def test_what_a_killed_process_left_half_written_goes_and_that_of_a_living_one_stays(tmp_path):
    file, begun = str(tmp_path / "a[1].txt"), multiprocessing.Semaphore(0)
    events = [multiprocessing.Event() for _ in range(2)]       # one each: who is killed while it waits spoils its own
    writers = [multiprocessing.Process(target=write_half, args=(file, begun, event)) for event in events]
    for writer in writers:
        writer.start()
    assert begun.acquire(timeout=30) and begun.acquire(timeout=30)
    writers[0].kill(), writers[0].join(30)
    elsewhere = f"{file}.elsewhere-{writers[0].pid}.part"      # of another machine, whose processes nobody here knows
    open(elsewhere, "w").close()
    living = f"{file}.{os.uname().nodename}-{writers[1].pid}.part"
    assert len(os.listdir(tmp_path)) == 3
    atomic_write(file, lambda f: f.write(b"new"))
    assert {str(tmp_path / name) for name in os.listdir(tmp_path)} == {file, elsewhere, living}
    events[1].set(), writers[1].join(30)
    assert writers[1].exitcode == 0 and open(file).read() == "half" and not os.path.exists(living)


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
