"""
Images and their captions as one table: a row -> pixels, and the table on disk.

    data = read_index("photos/nanovermeer.index")
    image, top, left = data.view(7, 64, 64)        (64, 64, 3) uint8, read from the file where it lies
    caption = data.text(data.choose(7))

lib/scan.py makes the table of a folder or of tar shards. Images are read in place: nothing is copied, unpacked or
encoded anew. The index is an Arrow table, which pandas, DuckDB and datasets open too; the same columns in memory need
no pyarrow.

Images are (height, width, 3) arrays, as numpy has it, but a size that stands alone is (width, height), as image
libraries have it.
"""
import functools
import hashlib
import io
import json
import os
import tarfile
import warnings
import zlib

import numpy as np

from lib.files import atomic_write, import_extra
from lib.settings import UserError

# ---- bytes of a file -> pixels; nothing that a header claims is trusted ----------------------------------------------

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
UNSUPPORTED = (".gif", ".svg", ".heic", ".heif", ".avif", ".tif", ".tiff", ".mp4", ".mov", ".webm", ".mkv", ".avi",
               ".tar.gz", ".tgz", ".zip")
UNSUPPORTED_STARTS = (b"GIF8", b"<svg", b"<?xml", b"II*\0", b"MM\0*", b"\x1aE\xdf\xa3")   # by their first bytes
STARTS = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WEBP"}             # first bytes of images that are ours
MOST_BYTES = 2 ** 28                                           # of an image file; what is larger is not read
LEAST_SIDE, MOST_ASPECT = 8, 8                                 # below and beyond, no crop shows what a caption says
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
           7: "TRANSVERSE", 8: "ROTATE_90"}                    # by the EXIF tag "Orientation"; 1 is upright
SIDEWAYS = ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")  # those of them that swap width and height


class Unfit(Exception):
    """An image or caption that cannot serve; its text is the reason that tables count."""


@functools.lru_cache(1)
def pillow():
    """The module PIL.Image, which decodes images. Large headers are ours to refuse, so it need not warn."""
    image = import_extra("PIL.Image", "reading image files", "pillow")
    warnings.simplefilter("ignore", image.DecompressionBombWarning)
    return image


def decode(blob, least=None):
    """
    Pillow's image, upright, RGB, transparency over white, 16 bits scaled to 8. JPEGs are decoded at a fraction of their
    size, but at least `least` (width, height) as shown. Raises Unfit where the bytes cannot be decoded, which only
    decoding tells.
    """
    image, turn = open_image(blob)
    try:
        if least:  # a JPEG at 1/2, 1/4, 1/8: fewer DCT coefficients, much faster
            image.draft("RGB", least[::-1] if turn in SIDEWAYS else least)
        if image.mode.startswith("I"):                         # 16-bit grey: convert() would clip it; 65535 = 257 * 255
            image = pillow().fromarray(np.round(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:  # info: a palette, or one clear colour
            image = image.convert("RGBA")
            image = pillow().alpha_composite(pillow().new("RGBA", image.size, "white"), image)
        image.load()
        image = image.convert("RGB") if image.mode != "RGB" else image             # it would copy one that is RGB
    except Exception as e:                                     # many kinds, such as struct.error and SyntaxError
        raise Unfit(f"cannot be decoded: {e}")
    return image.transpose(pillow().Transpose[turn]) if turn else image


def open_image(blob):
    """(pillow's image, its pixels not decoded yet; the turn in UPRIGHT that sets it upright, or None). Raises Unfit."""
    try:
        image = pillow().open(io.BytesIO(blob), formats=("JPEG", "PNG", "WEBP", "BMP"))    # no other decoder
    except pillow().DecompressionBombError:
        raise Unfit("too large")
    except Exception:                                          # pillow raises many kinds on bytes that are no image
        foreign = blob.startswith(UNSUPPORTED_STARTS) or blob[4:8] == b"ftyp"      # HEIC, AVIF, MP4
        kind = next((k for start, k in STARTS.items() if blob.startswith(start)), None)
        cut = kind and not is_whole(blob, kind)
        raise Unfit("unsupported format" if foreign else "truncated" if cut else "not an image")
    if image.width * image.height > pillow().MAX_IMAGE_PIXELS: # 89 million: before memory is taken
        raise Unfit("too large")
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise Unfit("unsupported format")
    exif = pillow().Exif()
    try:  # not image.getexif(): for a PNG it would decode all pixels
        exif.load(image.info.get("exif", b""))
    except Exception:                                          # broken notes about a whole image
        pass
    return image, UPRIGHT.get(exif.get(0x0112))


def is_whole(blob, kind):
    """Does the file end as its format ends? To decode all files would cost 100 times more."""
    if kind in ("JPEG", "MPO"):  # an end marker after the last scan; what follows may be anything
        return blob.endswith(b"\xff\xd9") or blob.rfind(b"\xff\xd9") > blob.rfind(b"\xff\xda")
    if kind == "PNG":                                          # its last chunk and that chunk's checksum
        return b"IEND" in blob[-12:] or b"IEND\xaeB`\x82" in blob
    size = int.from_bytes(blob[4:8], "little") + 8 if kind == "WEBP" else int.from_bytes(blob[2:6], "little")  # or BMP
    return len(blob) >= size


def header(blob):
    """(width, height) of an image as shown, from its header alone; raises Unfit where training could not use it."""
    image, turn = open_image(blob)
    width, height = image.size[::-1] if turn in SIDEWAYS else image.size
    if max(width, height) > MOST_ASPECT * min(width, height) > 0:
        raise Unfit("aspect")
    if min(width, height) < LEAST_SIDE:
        raise Unfit("too small")
    if not is_whole(blob, image.format):
        raise Unfit("truncated")
    return width, height


def covering(size, height, width, rule):
    """
    (w, h) that an image of `size` (width, height) is resized to, so that height x width can be cut out of it. Rule
    "crop": the smallest that covers it, its shape kept (Greedy Growing, Sec. 4); rule "stretch": just that, each side
    scaled by itself (PixelGen-V2).
    """
    if rule == "stretch":
        return width, height
    scale = max(width / size[0], height / size[1])
    return max(width, round(size[0] * scale)), max(height, round(size[1] * scale))


def resized(image, w, h, part):
    """
    The part (left, top, right, bottom) of pillow's image resized to (w, h), (bottom - top, right - left, 3) uint8. What
    lies outside of the part costs nothing.
    """
    left, top, right, bottom = part
    box = tuple(min(edge * side / new, side) for edge, side, new in zip(part, 2 * image.size, (w, h, w, h)))
    return np.asarray(image.resize((right - left, bottom - top), pillow().Resampling.BICUBIC, box))


def jittered(image, uniforms, strength):
    """Brightness, contrast and saturation, each times 1 +- strength. (H, W, 3) uint8, three numbers in [0, 1)."""
    brightness, contrast, saturation = 1 + strength * (2 * np.array(uniforms) - 1)
    x = image * brightness                                                         # (H, W, 3)
    x = x.mean() + contrast * (x - x.mean())                                       # away from, or towards, one grey
    grey = x @ np.array([[0.299], [0.587], [0.114]])                               # (H, W, 1), luma of ITU-R BT.601
    return (grey + saturation * (x - grey)).clip(0, 255).round().astype(np.uint8)  # ..., or each pixel's own


# ---- the table: one row per image, by columns ------------------------------------------------------------------------

NUMBER = "number "                                             # what the columns begin with that a .json names
NUMBERS = {"offset": np.int64, "length": np.int64,  # where its bytes lie in its file: 0 where it is the whole file
           "width": np.int32, "height": np.int32,              # pixels, as shown
           "crc": np.uint32}                                   # crc32 of its bytes


class Strings:
    """Strings as Arrow lays them out: all UTF-8 bytes one after the other, and where each begins and the last ends."""

    def __init__(self, starts, blob):
        self.starts, self.blob = starts, blob                  # int64 (n + 1,), uint8

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        return self.blob[self.starts[i]:self.starts[i + 1]].tobytes().decode("utf-8", "replace")


def pack(texts):
    """A list of bytes -> Strings."""
    return Strings(np.cumsum([0] + [len(t) for t in texts], dtype=np.int64), np.frombuffer(b"".join(texts), np.uint8))


class Indexed:
    """
    Real images and their captions, by number, straight from the files where they lie. A caption has a number of its
    own, since an image may have several: first come all plain ones, image by image, then all long ones. columns holds

        file                        Strings, relative to root: the image itself, or the tar that holds it
        offset ... crc              arrays, see NUMBERS
        captions, long_captions     (the number of each image's first one, int64 (n + 1,); Strings)
        number NAME, ...            float64 arrays of the numbers in the .json beside images, NaN where there is none

    Of an index on disk all of these are views of its memory map: workers share it, and no memory grows with the number
    of images. folder is where that index lies, or None; head is a dict of format, root, fingerprint, report, examples
    and shards {name: bytes}. Every caption comes with `prefix` before it.
    """
    prefix = ""                                                # words and a space

    def __init__(self, columns, head, root, folder=None):
        self.columns, self.head, self.folder = columns, head, folder
        self.root, self.name = os.path.normpath(root), os.path.abspath(root)
        self.file, self.offset, self.length, self.width, self.height, self.crc, plain, long, *_ = columns.values()
        (self.first, self.captions), (self.first_long, self.long_captions) = plain, long
        self.fingerprint, self.captions_count = head["fingerprint"], len(self.captions) + len(self.long_captions)
        self.unreadable, self.resized = set(), {}              # images that failed; {(i, height, width, rule): array}
        self.number_columns = {key.removeprefix(NUMBER): c for key, c in columns.items() if key.startswith(NUMBER)}

    def __len__(self):
        return len(self.file)

    def size(self, i):
        """(width, height) in pixels, as shown."""
        return int(self.width[i]), int(self.height[i])

    def all_sizes(self):
        """int32 (n, 2): width, height."""
        return np.stack([self.width, self.height], 1)

    def view(self, i, height, width, uniforms=(0.5, 0.5), rule="crop"):
        """
        (H, W, 3) uint8, and top and left of the crop in the resized image, which two numbers in [0, 1) place: 0.5 is
        the middle. Raises Unfit, OSError. Callers must not write into it: small data sets keep resized images for the
        next epoch.
        """
        w, h = covering(self.size(i), height, width, rule)
        left, top = int(uniforms[0] * (w - width + 1)), int(uniforms[1] * (h - height + 1))  # each place equally likely
        key, right, bottom = (i, height, width, rule), left + width, top + height
        if key in self.resized:
            return self.resized[key][top:bottom, left:right], top, left
        # decoded at twice the size at least: the coarse scaling of a JPEG decoder would show below that
        image = decode(self.read(i), (2 * w, 2 * h))
        if len(self) * height * width < 2 ** 25:  # 100 MB if all are cut to the square, more where shapes differ
            image = self.resized[key] = resized(image, w, h, (0, 0, w, h))         # (h, w, 3)
            return image[top:bottom, left:right], top, left
        return resized(image, w, h, (left, top, right, bottom)), top, left

    def read(self, i):
        """Bytes of image i. Raises Unfit if they are not those that were indexed, OSError if they cannot be read."""
        blob = read_part(os.path.join(self.root, self.file[i]), int(self.offset[i]), int(self.length[i]))
        if zlib.crc32(blob) != self.crc[i]:
            raise Unfit("crc error: its bytes have changed since it was indexed")
        return blob

    def is_unchanged(self, i):
        """Can image i be read, with the bytes that were indexed?"""
        try:
            return bool(self.read(i))
        except (OSError, Unfit):
            return False

    def choose(self, i, which=0.0, long=False):
        """
        Id of a caption of image i, -1 where it has none: a long one if `long`, or if it has no other; of several
        the one at `which` in [0, 1).
        """
        plain, more = (range(first[i], first[i + 1]) for first in (self.first, self.first_long))
        if more and (long or not plain):
            return len(self.captions) + more[int(which * len(more))]
        return plain[int(which * len(plain))] if plain else -1

    def text(self, caption_id):
        """The caption of that id; -1 is the null caption."""
        plain = len(self.captions)                             # long ones are counted on from there
        if caption_id < 0:
            return ""
        text = self.captions[caption_id] if caption_id < plain else self.long_captions[caption_id - plain]
        return self.prefix + text

    def caption(self, i):
        """The first caption of image i."""
        return self.text(self.choose(i))

    def captions_digest(self):
        """sha256 of all captions in their order, 16 digits: what is kept by a caption's number is theirs alone."""
        texts = [self.captions.starts, self.captions.blob, self.long_captions.starts, self.long_captions.blob]
        return digest(texts + [np.frombuffer(self.prefix.encode(), np.uint8)] * bool(self.prefix))

    def where(self, i):
        """Name of image i: its file; of one in a shard also the member's, which stands in the 512 bytes before it."""
        name, offset = self.file[i], int(self.offset[i])
        if not offset:
            return name
        try:  # read again, so that the index need not hold millions of names
            block = read_part(os.path.join(self.root, name), offset - 512, 512)
            return f"{name}/{tarfile.TarInfo.frombuf(block, 'utf-8', 'replace').name}"
        except (tarfile.TarError, OSError):
            return f"{name}/byte {offset}"

    @functools.cached_property
    def numbers(self):
        """{name: (least, largest)} of the numbers beside the images."""
        there = {name: c for name, c in self.number_columns.items() if not np.isnan(c).all()}
        return {name: (float(np.nanmin(c)), float(np.nanmax(c))) for name, c in there.items()}

    def number(self, i, name):
        """That of image i, NaN where it has none."""
        return float(self.number_columns[name][i]) if name in self.number_columns else np.nan

    def held_out(self):
        """The data that a run is scored on: a folder holds nothing back, so these are the images of training."""
        return self

    def table(self):
        """Found, used, skipped by reason, captions that are odd: lines of text."""
        report, examples = self.head["report"], self.head["examples"]
        rows = [("found", report["found"], ""), ("used", report["used"], "")]
        rows += [("skipped", count, f"{reason}, such as {examples[reason]}")
                 for reason, count in report["skipped"].items()]
        rows += [("captions", count, f"{reason}, such as {examples['caption ' + reason]}")
                 for reason, count in report["captions"].items() if count]
        rows += [("number", np.isfinite(self.number_columns[name]).sum(), f"{name}, {low:.6g} to {high:.6g}")
                 for name, (low, high) in self.numbers.items()]
        return [f"  {what:8s} {count:9d}  {why}".rstrip() for what, count, why in rows]


def read_part(path, offset, length):
    """Bytes of a file, read in place. Fewer than `length` where the file ends."""
    return os.pread(shared_file(path).fileno(), length, offset)  # no position to move: forked workers may share it


@functools.lru_cache(32)  # opening costs more than reading; what falls out is closed
def shared_file(path):
    return open(path, "rb", buffering=0)


def digest(arrays):
    """sha256 of arrays, 16 digits."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.int64(array.nbytes))                   # so that nothing can move from one array to the next
        total.update(np.ascontiguousarray(array).view(np.uint8))
    return total.hexdigest()[:16]


def arrays_of(columns):
    """The arrays that make up the columns, in a fixed order."""
    for column in columns.values():
        if isinstance(column, tuple):
            yield column[0]
            column = column[1]
        yield from [column.starts, column.blob] if isinstance(column, Strings) else [column]


# ---- the index: the table as an Arrow file beside the data, read through a memory map --------------------------------
#
#     index.arrow   one row per image: file, NUMBERS, captions, long_captions, and what numbers the .json files beside
#                   images have; its head is JSON in its metadata
#     bad.tsv       every file that is not used, every caption that is odd, and why

INDEX, FORMAT = "nanovermeer.index", 2
AGAIN = "make it again: python data.py index"
WRONG_FORMAT = f"index {{!r}} is of format version {{}}, this code reads {FORMAT}: {AGAIN}"


def index_folder(path):
    """Where the index of `path` lies by default: in the folder, or beside the .tar."""
    return os.path.join(path, INDEX) if os.path.isdir(path) else os.path.splitext(path)[0] + "." + INDEX


def index_schema(arrow, names, metadata=None):
    """The columns, with offsets of 64 bits: all captions may have more than 2 GB. names: all of them."""
    text = arrow.large_string()
    fields = [("file", text)] + [(name, arrow.from_numpy_dtype(dtype)) for name, dtype in NUMBERS.items()]
    fields += [(name, arrow.large_list(text)) for name in ("captions", "long_captions")]
    return arrow.schema(fields + [(name, arrow.float64()) for name in names if name.startswith(NUMBER)], metadata)


def write_index(folder, data, bad):
    """An Indexed -> the index in `folder`. bad: every (name, reason). A kill leaves the old index or the new one."""
    arrow = import_extra("pyarrow", "an index")
    os.makedirs(folder, exist_ok=True)
    inside = os.path.realpath(folder).startswith(os.path.realpath(data.root) + os.sep)  # both may be moved together
    root = os.path.relpath(data.root, folder) if inside else os.path.abspath(data.root)
    head = {"nanovermeer": json.dumps({"format": FORMAT, "root": root} | data.head)}
    schema = index_schema(arrow, data.columns, head)
    batch = arrow.record_batch([to_arrow(arrow, c) for c in data.columns.values()], schema=schema)

    def table(file):
        with arrow.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch)
    lines = [f"{json.dumps(name)[1:-1]}\t{reason}\n" for name, reason in bad]      # a name may hold a newline
    atomic_write(os.path.join(folder, "bad.tsv"), lambda file: file.write("".join(["name\treason\n", *lines]).encode()))
    atomic_write(os.path.join(folder, "index.arrow"), table)


def to_arrow(arrow, column):
    """A column -> an Arrow array that shares its memory."""
    if isinstance(column, tuple):
        return arrow.LargeListArray.from_arrays(column[0], to_arrow(arrow, column[1]))
    if isinstance(column, Strings):
        return arrow.LargeStringArray.from_buffers(len(column), *map(arrow.py_buffer, (column.starts, column.blob)))
    return arrow.array(column)


def read_index(folder):
    """Indexed. Refuses, before an image is read, another format, a broken table, and files that have changed since."""
    arrow = import_extra("pyarrow", f"the index {folder!r}")
    try:
        with arrow.memory_map(os.path.join(folder, "index.arrow")) as file:
            # one thread: pyarrow's own would not survive the fork of a worker
            reader = arrow.ipc.open_file(file, options=arrow.ipc.IpcReadOptions(use_threads=False))
            head = json.loads(reader.schema.metadata[b"nanovermeer"])
            if head["format"] != FORMAT:
                raise UserError(WRONG_FORMAT.format(folder, head["format"]))
            if not reader.schema.equals(index_schema(arrow, reader.schema.names)) or reader.num_record_batches != 1:
                raise ValueError(f"it holds {reader.num_record_batches} batches of {reader.schema.names}")
            batch = reader.get_batch(0)
        data = Indexed(from_arrow(batch), head, os.path.join(folder, head["root"]), folder)
        data.table(), data.fingerprint + ""                    # nothing of the head is missing or of another type
        if wrong := misfit(data, batch):
            raise ValueError(wrong)
    except Exception as e:  # whatever hostile bytes make pyarrow, json and numpy raise
        raise UserError(f"index {folder!r} is broken ({str(e)[:200]}): {AGAIN}")
    probe(data)
    return data


def from_arrow(batch):
    """The columns of Indexed as views of the batch's memory. ValueError where a buffer is shorter than it should be."""
    def view(buffer, dtype, count):
        return np.frombuffer(buffer, dtype, count) if count else np.zeros(0, dtype)  # there may be no buffer then

    def strings(array):
        _, starts, blob = array.buffers()[-3:]
        return Strings(view(starts, np.int64, len(array) + 1), view(blob, np.uint8, blob.size if blob else 0))
    columns = {"file": strings(batch["file"])}
    columns |= {name: view(batch[name].buffers()[1], dtype, len(batch)) for name, dtype in NUMBERS.items()}
    for name in ("captions", "long_captions"):
        columns[name] = view(batch[name].buffers()[1], np.int64, len(batch) + 1), strings(batch[name].values)
    numbers = [name for name in batch.schema.names if name.startswith(NUMBER)]
    return columns | {name: view(batch[name].buffers()[1], np.float64, len(batch)) for name in numbers}


def misfit(data, batch):
    """What is impossible in a table, or "". Looks at a million rows at a time, so that memory stays bounded."""
    texts = data.file, data.captions, data.long_captions
    parts = [(data.first, len(data.captions)), (data.first_long, len(data.long_captions))]
    for starts, end in parts + [(text.starts, len(text.blob)) for text in texts]:
        falls = (np.diff(starts[k:k + 2 ** 20 + 1]).min(initial=0) < 0 for k in range(0, len(starts), 2 ** 20))
        if starts[0] != 0 or starts[-1] != end or any(falls):  # a text of negative length, or from outside
            return "its texts lie outside of their bytes"
    shards = data.head["shards"]
    for k in range(0, len(data), 2 ** 20):
        rows = slice(k, k + 2 ** 20)
        offset, length = data.offset[rows], data.length[rows]
        width, height = data.width[rows].astype(np.int64), data.height[rows].astype(np.int64)
        file = batch["file"][rows].dictionary_encode()         # each name once; of whole images it is not asked
        sizes = np.array([shards.get(name, 0) for name in file.dictionary.to_pylist()], np.int64)
        good = (offset >= 0) & (length > 0) & (length <= MOST_BYTES) & (width > 0) & (height > 0)
        good &= np.maximum(width, height) <= MOST_ASPECT * np.minimum(width, height)  # else a crop takes all memory
        good &= (offset == 0) | (offset <= sizes[file.indices.to_numpy()] - length)            # a sum could overflow
        if not good.all():
            return f"row {k + int(np.argmin(good))} lies outside of its file"
        if any(np.isinf(column[rows]).any() for column in data.number_columns.values()):
            return "a number of its images is infinite"
    return ""


def probe(data):
    """Refuse an index whose files are gone or changed, by the sizes of up to 4096 and the checksums of 64 images."""
    again = f"put it back, or index again: python data.py index {data.root}"
    shards = list(data.head["shards"].items())
    sizes = [shards[k] for k in spaced(len(shards), 4096)]
    sizes += [(data.file[i], int(data.length[i])) for i in spaced(len(data), 4096) if not data.offset[i]]
    for name, expected in sizes:
        path = os.path.join(data.root, name)
        size = os.path.getsize(path) if os.path.exists(path) else None
        if size != expected:
            what = "is gone" if size is None else f"has {size} bytes instead of {expected}"
            raise UserError(f"{path} {what} since it was indexed: {again}")
    some = spaced(len(data), 64)
    changed = [i for i in some if not data.is_unchanged(i)]
    if len(changed) * 4 > len(some):  # one bad byte is passed over in training; this is another data set
        raise UserError(f"{len(changed)} of {len(some)} images under {data.root} have changed since they were indexed, "
                        f"such as {data.where(changed[0])}: {again}")


def spaced(n, most):
    """At most so many numbers of range(n), spread evenly over it: int (k,)."""
    return np.unique(np.linspace(0, n - 1, most).astype(int)) if n else np.zeros(0, int)
