"""Folders and tar shards -> a table: what serves, what does not, and why."""
import json
import os

import numpy as np
import pytest

from lib.images import Indexed, read_index, write_index
from lib.scan import open_images, scan
from lib.settings import UserError
from lib.test_images import photos, picture, refused, shard, shards  # noqa: F401


def fill(folder):
    """A folder of all that lies about: 71 images that serve, 9 things that do not."""
    (folder / "sub.dir").mkdir(parents=True)
    names = ["plain.jpg", "UPPER.JPG", "a b.c.d.jpeg", "new\nline.png", "ünï\u202e😀.webp", "sub.dir/x.y.jpg"]
    for k, name in enumerate(names):
        kind = {"png": "PNG", "ebp": "WEBP"}.get(name[-3:], "JPEG")
        (folder / name).write_bytes(picture(32, 32, k, kind))
        (folder / name).with_suffix(".TXT" if k == 1 else ".txt").write_text(f"caption {k}")
    for k in range(60):                                        # so that a few without captions are under one in twenty
        (folder / f"n{k}.jpg").write_bytes(picture(32, 32, 100 + k))
        fields = {"caption": f"raw {k}", "long_captions": [f"long {k}", f"longer {k}"]}
        (folder / f"n{k}.json").write_text(json.dumps(fields))
    files = {"cut.jpg": picture(64, 64)[:900], "empty.jpg": b"", "film.mp4": b"x", "alone.txt": b"no image",
             "plain.png": picture(32, 32, 50, "PNG"),                              # the same key as plain.jpg
             "copy.jpg": picture(32, 32, 0), "copy.txt": b"caption 0",  # a duplicate of plain.jpg, also in words
             "other words.jpg": picture(32, 32, 0), "other words.txt": b"the same picture otherwise",
             "mute.jpg": picture(32, 32, 51), "blank.jpg": picture(32, 32, 52), "blank.txt": b" \n\t ",
             "odd.jpg": picture(32, 32, 53), "odd.txt": b"\xff\xfe broken \x00 bytes \xf0\x9f\x98\x80 \xd7\xa9",
             "endless.jpg": picture(32, 32, 54), "endless.txt": b"word " * 10000}
    for name, blob in files.items():
        (folder / name).write_bytes(blob)
    os.symlink("loop.jpg", folder / "loop.jpg")
    os.symlink(folder, folder / "sub.dir" / "up")
    os.mkfifo(folder / "pipe.jpg")
    return names


def test_all_that_was_found_is_counted_and_what_is_not_used_is_named(tmp_path):
    names = fill(tmp_path / "in")
    world, bad = scan(str(tmp_path / "in"), 2)
    assert world.head["report"] == {
        "found": 80, "used": 71, "captions": {"missing": 1, "empty": 1, "truncated": 1, "replaced": 1},
        "skipped": {"truncated": 1, "not an image": 1, "unsupported format": 1, "same key": 1, "duplicate": 1,
                    "caption without image": 1, "linked folder": 1, "unreadable": 2}}
    table = "\n".join(world.table())
    assert "captions         1  replaced, such as 'odd.jpg'" in table and "used            71" in table
    assert {("cut.jpg", "truncated"), ("plain.jpg", "duplicate"),                  # copy.jpg came first
            ("mute.jpg", "caption missing, not skipped"), ("blank.jpg", "caption empty, not skipped")} <= set(bad)
    assert len(bad) == 9 + 4
    captions = {world.where(i): world.caption(i) for i in range(len(world))}
    assert [captions[n] for n in names[1:]] == [f"caption {k}" for k in range(1, 6)]
    assert captions["mute.jpg"] == captions["blank.jpg"] == "" and "broken bytes 😀 ש" in captions["odd.jpg"]
    assert len(captions["endless.jpg"]) == 7999 and captions["other words.jpg"].startswith("the same")
    i = next(i for i in range(len(world)) if world.where(i) == "n7.jpg")
    chosen = [world.text(world.choose(i, which, long)) for which, long in ((0.9, False), (0.1, True), (0.9, True))]
    assert chosen == ["raw 7", "long 7", "longer 7"]

    pytest.importorskip("pyarrow")
    write_index(str(tmp_path / "ix"), world, bad)
    lines = open(tmp_path / "ix" / "bad.tsv").read().splitlines()
    assert len(lines) == 1 + len(bad) and "cut.jpg\ttruncated" in lines
    again = open_images(str(tmp_path / "ix"))
    assert list(again.file) == list(world.file) and again.fingerprint == world.fingerprint


def test_hidden_names_and_names_that_are_no_utf8_are_counted_and_left_out(photos):
    for name in (".thumbnails/a.png", ".a 0.png", "sub/.b.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(picture(32, 32, kind="PNG"))
    (photos / "sub" / os.fsdecode(b"caf\xe9.png")).write_bytes(picture(32, 32, 1, "PNG"))
    shard(photos / "0.tar", [(f"{p}{k}.{kind}", blob) for k in range(3) for p in ("", "._") for kind, blob in (
        ("jpg", picture(32, 32, k)), ("txt", b"x"))])          # macOS puts such members beside the others
    world, bad = scan(str(photos))
    assert len(world) == 27 and world.head["report"]["skipped"] == {"hidden": 3 + 6, "name is not UTF-8": 1}
    assert not any("/." in world.where(i) for i in range(27)) and (".thumbnails", "hidden") in bad


def test_duplicates_are_not_counted_as_images_without_captions(tmp_path, capsys):
    for k in range(26):
        (tmp_path / f"{k}.png").write_bytes(picture(16, 16, k % 25, "PNG"))        # one is there twice
    refused(capsys, lambda: open_images(str(tmp_path)), "25 of 25 images", "have no caption, such as '0.png'")
    assert len(open_images(str(tmp_path), allow=["uncaptioned"])) == 25


def test_lists_of_captions_serve_a_folder(tmp_path):
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(picture(16, 16, k, "PNG"))
    rows = [{"file_name": "0.png", "text": "a"}, {"file": "1", "captions": ["b", "c"], "long_caption": "d"},
            {"file": "0.png", "caption": "e"}, {"file": "gone.png", "caption": "x"},
            {"file": "0", "caption": "f"}]                     # without its ending: the same image
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nno json\n")
    (tmp_path / "captions.csv").write_text('file,caption\n2.png,"with, a comma"\n3.png,"two\nlines"\n')
    (tmp_path / "sub").mkdir()
    os.symlink("captions.csv", tmp_path / "sub" / "captions.csv")                  # a loop: counted, not fatal
    world, bad = scan(str(tmp_path))
    assert list(world.captions) == ["a", "e", "f", "b", "c", "with, a comma", "two lines"]
    assert list(world.long_captions) == ["d"]
    assert world.first.tolist() == [0, 3, 5, 6, 7] and world.first_long.tolist() == [0, 0, 1, 1, 1]
    assert bad == [("captions.jsonl", "row without a file, not skipped"), ("gone.png", "caption without image"),
                   ("sub/captions.csv", "unreadable")]
    assert world.head["report"]["captions"] == dict(missing=0, empty=0, truncated=0, replaced=0)


@pytest.mark.parametrize("size, words", [(25000, "incomplete"), (0, "incomplete at byte 0"), (None, "incomplete at")])
def test_a_shard_cut_short_is_refused_and_left_out_only_on_demand(size, words, shards, capsys):
    if size is None:                                           # cut between two members
        shard(shards / "00001.tar", [("a.jpg", picture(32, 32)), ("a.txt", b"x")], footer=False)
    else:
        os.truncate(shards / "00001.tar", size)
    refused(capsys, lambda: open_images(str(shards)), "shard 00001.tar is", words, "--allow incomplete")
    assert len(open_images(str(shards), allow=["incomplete"])) == 10


@pytest.mark.parametrize("spoil, words", [
    (lambda f: [p.unlink() for p in f.glob("*.txt")], "have no caption"),
    (lambda f: [p.unlink() for p in f.iterdir()], "nothing to use under"),
    (lambda f: [p.write_bytes(b"") for p in f.iterdir()], "none of 24 files")])
def test_folders_that_cannot_serve_say_why(photos, spoil, words, capsys):
    spoil(photos)
    refused(capsys, lambda: open_images(str(photos)), words, str(photos))


def test_numbers_beside_images_are_kept_by_name(tmp_path, capsys):
    pytest.importorskip("PIL.Image")
    for k in range(5):
        (tmp_path / f"{k}.jpg").write_bytes(picture(32, 32, k))
        (tmp_path / f"{k}.txt").write_text(f"picture {k}")
        fields = {"score": k / 2, "bad": "high", "nsfw": True, "height": 10 ** 400 if k else 7, "width": float("nan")}
        (tmp_path / f"{k}.json").write_text(json.dumps(fields if k < 4 else {"score": None}))
    data, _ = scan(str(tmp_path))
    assert data.numbers == {"score": (0.0, 1.5), "height": (7.0, 7.0)}
    assert [data.number(i, "score") for i in range(4)] == [0.0, 0.5, 1.0, 1.5] and np.isnan(data.number(4, "score"))
    assert "  number           4  score, 0 to 1.5" in data.table()
    (tmp_path / "0.json").write_text(json.dumps({"score": 9}))
    again, _ = scan(str(tmp_path))
    assert again.fingerprint != data.fingerprint               # other numbers are other data


def test_an_index_keeps_numbers_and_one_without_them_is_read_as_before(shards, tmp_path):
    pytest.importorskip("pyarrow")
    for numbered in (False, True):
        rows = [] if not numbered else [("number score", np.array([0.5, np.nan] * 10))]
        data, bad = scan(str(shards))
        data = Indexed(data.columns | dict(rows), data.head, data.root)
        write_index(str(tmp_path / "index"), data, bad)
        read = read_index(str(tmp_path / "index"))
        assert read.numbers == ({"score": (0.5, 0.5)} if numbered else {}) and len(read) == 20
        assert read.caption(3) == data.caption(3)
        assert not numbered or [read.number(0, "score"), str(read.number(1, "score"))] == [0.5, "nan"]
    data = Indexed(data.columns | {"number score": np.full(20, np.inf)}, data.head, data.root)
    write_index(str(tmp_path / "broken"), data, bad)
    with pytest.raises(UserError):
        read_index(str(tmp_path / "broken"))
