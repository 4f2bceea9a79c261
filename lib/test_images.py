"""Bytes -> pixels, and the index on disk: what is read, what is refused."""
import importlib
import io
import json
import multiprocessing
import os
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest

from lib import images
from lib.images import INDEX, Unfit, arrays_of, decode, header, jittered, read_index, write_index
from lib.scan import open_images, scan
from lib.settings import UserError
from lib.test_encoders import Trap, refused


def picture(width, height, seed=0, kind="JPEG", **options):
    """Bytes of an image file with noise in it."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pytest.importorskip("PIL.Image").fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def shard(path, members, footer=True):
    """A tar of (name, bytes), in the order given; without its footer, as a writer that died leaves it."""
    with tarfile.open(path, "w") as tar:
        for name, blob in members:
            member = tarfile.TarInfo(name)
            member.size = len(blob)
            tar.addfile(member, io.BytesIO(blob))
        end = tar.offset
    if not footer:
        os.truncate(path, end)


def indexed(folder):
    """A folder with an index in it."""
    pytest.importorskip("pyarrow")
    write_index(str(folder / INDEX), *scan(str(folder)))
    return folder


@pytest.mark.parametrize("size", [(512, 384), (300, 500), (257, 256)])
def test_a_part_of_a_resized_image_is_that_part_of_the_whole(size):
    """To rounding: pillow goes over an image twice, in the order that costs less, and rounds in between."""
    image, random = decode(picture(16, 12)).resize(size), np.random.default_rng(0)   # smooth, as photos are
    w, h = images.covering(size, 200, 200, "crop")
    whole = images.resized(image, w, h, (0, 0, w, h)).astype(int)
    assert (whole == np.asarray(image.resize((w, h), images.pillow().Resampling.BICUBIC))).all()
    for left, top in [(0, 0), (w - 200, h - 200), *random.integers(0, [w - 199, h - 199], (8, 2)).tolist()]:
        part = images.resized(image, w, h, (left, top, left + 200, top + 200))
        apart = abs(part - whole[top:top + 200, left:left + 200])
        assert part.shape == (200, 200, 3) and apart.max() <= 2 and (apart > 0).mean() < 0.05, (left, top)


@pytest.fixture
def photos(tmp_path):
    """24 fields of grey, some .png and some .JPG, each with its caption."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(24):
        grey = np.full((40 + i, 64, 3), 10 * i, np.uint8)
        image.fromarray(grey).save(folder / f"a {i}.{'JPG' if i % 2 else 'png'}")
        (folder / f"a {i}.txt").write_text(f"grey level {i}")
    return folder


@pytest.fixture
def shards(tmp_path):
    """Two shards as img2dataset writes them, members shuffled, and dots in the names of the second."""
    folder = tmp_path / "shards"
    folder.mkdir()
    fields = json.dumps({"caption": "raw", "long_caption": "long"}).encode()
    for s in range(2):
        parts = [(f"{'v1.' * s}{s}{k:03d}.{kind}", blob) for k in range(10) for kind, blob in (
            ("jpg", picture(40 + k, 48, 10 * s + k)), ("txt", f"shard {s} image {k}".encode()), ("json", fields))]
        shard(folder / f"0000{s}.tar", [parts[k] for k in np.random.default_rng(s).permutation(len(parts))])
    return folder


# ---- pixels ----------------------------------------------------------------------------------------------------------

def mode_cases():
    """(name, pillow's image, the pixel expected everywhere)."""
    image = pytest.importorskip("PIL.Image")
    palette = image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    return [("rgba.png", image.new("RGBA", (8, 8), (255, 0, 0, 0)), [255, 255, 255]),
            ("half.png", image.new("RGBA", (8, 8), (255, 0, 0, 128)), [255, 127, 127]),
            ("palette.png", palette, [10, 200, 30]), ("clear.png", palette, [255, 255, 255]),
            ("grey.png", image.new("L", (8, 8), 77), [77, 77, 77]),
            ("la.png", image.new("LA", (8, 8), (0, 0)), [255, 255, 255]),
            ("bit.png", image.new("1", (8, 8), 1), [255, 255, 255]),
            ("deep.png", image.fromarray(np.full((8, 8), 128 * 257, np.uint16)), [128, 128, 128]),
            ("cmyk.jpg", image.new("CMYK", (8, 8), (0, 255, 255, 0)), [255, 0, 0]),
            ("rgb.webp", image.new("RGB", (8, 8), (200, 20, 90)), [200, 20, 90]),
            ("bitmap.bmp", image.new("RGB", (8, 8), (1, 2, 3)), [1, 2, 3])]


def test_pixels_are_over_white_and_of_three_channels_in_every_mode(tmp_path):
    options = {"rgb.webp": {"lossless": True}, "clear.png": {"transparency": 1}}
    for file, image, _ in mode_cases():
        image.save(tmp_path / file, **options.get(file, {}))
        (tmp_path / file).with_suffix(".txt").write_text(file)
    world = open_images(str(tmp_path))
    place = {world.where(i): i for i in range(len(world))}
    for file, _, pixel in mode_cases():
        difference = abs(world.view(place[file], 8, 8)[0].astype(int) - pixel).max()
        assert difference <= (1 if file.endswith("jpg") else 0), file


@pytest.mark.parametrize("kind, options", [("png", {}), ("jpeg", {"quality": 95})])
def test_pixels_are_upright(tmp_path, kind, options):
    image = pytest.importorskip("PIL.Image")
    turned = image.new("RGB", (8, 16), "black")
    turned.paste("white", (0, 0, 8, 8))                        # upper half white; orientation 6 turns it to the right
    exif = image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / f"turned.{kind}", exif=exif, **options)
    (tmp_path / "turned.txt").write_text("x")
    world = open_images(str(tmp_path))
    right, left = (world.view(0, 8, 8, (x, 0))[0] for x in (0.99, 0))
    assert world.size(0) == (16, 8) and right[4, 6].min() > 245 and left[4, 1].max() < 10


def test_yellow_ink_over_an_adobe_marker_is_not_inverted():
    image, file = pytest.importorskip("PIL.Image"), io.BytesIO()
    image.new("CMYK", (16, 16), (0, 0, 255, 0)).save(file, "JPEG", quality=95)
    assert abs(np.asarray(decode(file.getvalue()))[8, 8].astype(int) - [255, 255, 0]).max() <= 3


def chunk(kind, body):
    """A part of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width, height):
    """A PNG whose header claims width x height."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def moving(kind):
    """An image of two frames."""
    image, file = pytest.importorskip("PIL.Image"), io.BytesIO()
    image.new("RGB", (32, 32)).save(file, kind, save_all=True, append_images=[image.new("RGB", (32, 32), "red")])
    return file.getvalue()


@pytest.mark.parametrize("blob, reason", [
    (lambda: picture(64, 64)[:-50], "truncated"), (lambda: picture(64, 64, kind="PNG")[:-50], "truncated"),
    (lambda: picture(64, 64, kind="WEBP")[:-50], "truncated"), (lambda: b"", "not an image"),
    (lambda: b"<!DOCTYPE html>", "not an image"), (lambda: picture(1, 4000, kind="PNG"), "aspect"),
    (lambda: picture(1, 1), "too small"), (lambda: bomb(30000, 30000), "too large"),
    (lambda: bomb(0, 0), "not an image"), (lambda: b"GIF89a" + bytes(99), "unsupported format"),
    (lambda: b'<?xml version="1.0"?><svg/>', "unsupported format"),
    (lambda: bytes(4) + b"ftypheic" + bytes(99), "unsupported format"), (lambda: moving("WEBP"), "unsupported format"),
    (lambda: moving("PNG"), "unsupported format")])
def test_what_cannot_serve_is_known_from_the_header(blob, reason):
    pytest.importorskip("PIL.Image")
    with pytest.raises(Unfit, match=reason):
        header(blob())


def test_whatever_decoding_raises_is_a_reason_to_skip():
    blob = picture(16, 16, kind="PNG")
    end = blob.rindex(b"IEND") - 4
    late = blob[:end] + chunk(b"tRNS", b"x") + blob[end:]      # behind the pixels, and too short
    assert header(late) == (16, 16)
    with pytest.raises(Unfit, match="cannot be decoded"):
        decode(late)


def test_jitter_of_brightness_leaves_a_grey_field_grey():
    grey = np.full((4, 4, 3), 100, np.uint8)
    assert (jittered(grey, (0.75, 0, 0), 0.2) == 110).all()    # contrast and saturation do nothing to it


# ---- the index -------------------------------------------------------------------------------------------------------

def test_an_index_holds_the_table_that_a_scan_makes_as_views_of_its_file(shards, tmp_path):
    indexed(shards)
    world, (here, bad) = open_images(str(shards)), scan(str(shards), workers=2)
    zeros = dict(missing=0, empty=0, truncated=0, replaced=0)
    assert here.head["report"] == {"found": 20, "used": 20, "skipped": {}, "captions": zeros} and not bad
    arrays = list(arrays_of(world.columns))
    assert all((a == b).all() and not a.flags.owndata for a, b in zip(arrays, arrays_of(here.columns), strict=True))
    assert world.fingerprint == here.fingerprint and world.captions_digest() == here.captions_digest()
    for i in range(20):
        name = world.where(i)
        s, k = int(name[4]), int(name.rpartition(".")[0][-3:])
        assert world.caption(i) == f"shard {s} image {k}" and world.text(world.choose(i, long=True)) == "long"
        assert world.size(i) == (40 + k, 48) and world.read(i) == picture(40 + k, 48, 10 * s + k)
    shards.rename(tmp_path / "moved")                          # the index travels with its data
    assert len(open_images(str(tmp_path / "moved"))) == 20


def pandas_rows(library, file):
    return library.read_feather(file).to_dict("records")


def duckdb_rows(library, file):
    index = importlib.import_module("pyarrow.feather").read_table(file)  # noqa: F841, duckdb finds it by its name
    found = library.sql("select * from index")
    return [dict(zip(found.columns, row)) for row in found.fetchall()]


def datasets_rows(library, file):
    return library.load_dataset("arrow", data_files=file, split="train", cache_dir=os.path.dirname(file) + "/cache")


@pytest.mark.parametrize("name, rows", [("pandas", pandas_rows), ("duckdb", duckdb_rows), ("datasets", datasets_rows)])
def test_other_libraries_open_the_index(name, rows, shards):
    pytest.importorskip("pyarrow")
    library, world = pytest.importorskip(name), open_images(str(indexed(shards)))
    for i, row in enumerate(rows(library, str(shards / INDEX / "index.arrow"))):
        with open(shards / row["file"], "rb") as file:
            file.seek(row["offset"])
            assert file.read(row["length"]) == world.read(i) and row["crc"] == zlib.crc32(world.read(i))
        assert (row["width"], row["height"]) == world.size(i)
        assert [*row["captions"], *row["long_captions"]] == [world.caption(i), "long"]


def test_an_index_killed_half_way_and_made_again_is_the_same(photos, tmp_path):
    pytest.importorskip("pyarrow")

    def contents(folder):
        return {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir() if p.suffix != ".part"}

    def die(last):
        """Make the index, and die as by kill -9 in the middle of writing the file `last`."""
        def half(path, write, whole=images.atomic_write):
            if path.endswith(last):
                open(path + ".part", "wb").write(b"half")
                os._exit(9)
            whole(path, write)
        images.atomic_write = half
        write_index(str(tmp_path / "two"), *scan(str(photos)))
    write_index(str(tmp_path / "one"), *scan(str(photos)))
    for last, whole in (("index.arrow", []), ("bad.tsv", ["index.arrow"]), ("index.arrow", ["index.arrow"])):
        process = multiprocessing.get_context("fork").Process(target=die, args=(last,))
        process.start()
        process.join()
        assert process.exitcode == 9  # what is there is whole: nothing at first, then the old index
        assert [n for n, blob in contents("two").items() if n != "bad.tsv" and blob == contents("one")[n]] == whole
        write_index(str(tmp_path / "two"), *scan(str(photos)))
        assert contents("one") == contents("two")


def test_data_that_changed_since_they_were_indexed_are_refused(shards, capsys):
    indexed(shards)
    whole = (shards / "00000.tar").read_bytes()
    for blob, words in ((whole + bytes(512), "bytes instead of"), (bytes(len(whole)), "have changed since")):
        (shards / "00000.tar").write_bytes(blob)
        refused(capsys, lambda: open_images(str(shards)), words, "index again")
    (shards / "00000.tar").unlink()
    refused(capsys, lambda: open_images(str(shards)), "00000.tar is gone", "index again")


def rewrite(folder, head=None, schema=None, copies=1, **columns):
    """The index again with other columns, or another head."""
    arrow = pytest.importorskip("pyarrow")
    file = str(folder / "index.arrow")
    with open(file, "rb") as f:
        batch = arrow.ipc.open_file(f).read_all().combine_chunks().to_batches()[0]
    table = {name: columns.get(name, batch[name]) for name in batch.schema.names}
    schema = (schema or batch.schema).with_metadata({"nanovermeer": head} if head else batch.schema.metadata)
    with arrow.ipc.new_file(file, schema) as writer:
        for _ in range(copies):
            writer.write_batch(arrow.record_batch([arrow.array(c, f.type) if isinstance(c, list) else c
                                                   for c, f in zip(table.values(), schema)], schema=schema))


def number(name, row, value):
    """A spoiler that changes one number of a column."""
    def spoil(folder):
        import pyarrow
        with open(folder / "index.arrow", "rb") as f:
            values = pyarrow.ipc.open_file(f).read_all()[name].to_pylist()
        values[row] = value
        rewrite(folder, **{name: values})
    return spoil


def falling(folder):
    """Names of which the sixth ends before it begins."""
    import pyarrow
    starts, blob = np.arange(21), np.zeros(20, np.uint8)
    starts[5] = 9
    rewrite(folder, file=pyarrow.LargeStringArray.from_buffers(20, pyarrow.py_buffer(starts), pyarrow.py_buffer(blob)))


def claim(folder):
    """A header that claims 2^60 rows in place of 20."""
    blob = (folder / "index.arrow").read_bytes()
    (folder / "index.arrow").write_bytes(blob.replace(struct.pack("<q", 20), struct.pack("<q", 2 ** 60)))


def narrow(folder):
    """Offsets of 32 bits."""
    import pyarrow
    with open(folder / "index.arrow", "rb") as f:
        table = pyarrow.ipc.open_file(f).read_all()
    schema = table.schema.set(1, pyarrow.field("offset", pyarrow.int32()))
    rewrite(folder, schema=schema, offset=table["offset"].to_pylist())


@pytest.mark.parametrize("spoil, words", [
    (lambda f: rewrite(f, head='{"format": 3}'), "is of format version 3, this code reads 2"),
    (lambda f: rewrite(f, head='{"format": 2}'), "broken"), (lambda f: rewrite(f, head="[" * 10 ** 5), "broken"),
    (lambda f: rewrite(f, copies=2), "2 batches"), (narrow, "broken"), (claim, "broken"),
    (falling, "texts lie outside"), (number("offset", 3, -5), "row 3"), (number("offset", 3, 2 ** 62), "row 3"),
    (number("length", 4, 2 ** 60), "row 4"), (number("width", 5, 2 ** 30), "row 5"),
    (number("file", 6, "elsewhere"), "row 6"),
    (lambda f: os.truncate(f / "index.arrow", 2000), "broken"),
    (lambda f: (f / "index.arrow").write_bytes(pickle.dumps(Trap())), "broken"),
    (lambda f: (f / "index.arrow").rename(f / "index.json"), "is of format version 1, this code reads 2")])
def test_a_broken_or_malicious_index_is_refused_before_anything_is_read(shards, spoil, words, capsys, tmp_path,
                                                                        monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(open_images(str(indexed(shards)))) == 20
    spoil(shards / INDEX)
    refused(capsys, lambda: open_images(str(shards)), words, "python data.py index")
    assert not os.path.exists("executed")


def test_an_index_needs_pyarrow_and_a_scan_does_not(photos, capsys, monkeypatch):
    indexed(photos)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    refused(capsys, lambda: read_index(str(photos / INDEX)), "pip install pyarrow")
    assert len(scan(str(photos))[0]) == 24
