"""
Scanning: a folder or tar shards -> one table of images and captions, and a list of all that cannot serve.

    data, bad = scan("photos")                     every file is looked at; bad names what cannot serve, and why
    write_index(index_folder("photos"), data, bad)
    data = open_images("photos")                   by its index, or scanned into memory where it has none

The way of an image: list_names and pair find its file -> scan_files or scan_shard looks at its bytes (Row) -> merge
lays all rows into columns (Indexed).

    a folder    cat.jpg with cat.txt (a caption) or cat.json beside it, or captions.jsonl / captions.csv, each row of
                which names its image
    tar shards  as img2dataset writes them: 0001.jpg, 0001.txt, 0001.json, in any order

In .json and .jsonl, "caption" (or "captions", "text") is one caption or a list of them, and "long_caption" (or
"long_captions") likewise. Below, texts is such a pair of lists, (plain, long). The numbers of a .json, such as
{"aesthetic": 5.5}, are kept by their names.
"""
import collections
import concurrent.futures
import csv
import json
import multiprocessing
import os
import re
import signal
import stat
import tarfile
import zlib

import numpy as np
from tqdm import tqdm

from lib.images import (IMAGES, INDEX, MOST_BYTES, NUMBER, NUMBERS, UNSUPPORTED, WRONG_FORMAT, Indexed, Unfit,
                        arrays_of, digest, header, index_folder, pack, pillow, read_index, read_part)
from lib.settings import UserError

CAPTION_KEYS, LONG_KEYS = ("caption", "captions", "text"), ("long_caption", "long_captions")
FILE_KEYS = ("file", "file_name", "filename", "image", "path", "key")  # any of them names the image of a row
LISTS = ("captions.jsonl", "captions.csv")
MOST_CHARACTERS = 8000                                         # of a caption; the rest is cut
MOST_CAPTIONS = 1000                                           # of an image, of each kind
MOST_NUMBERS = 64                                              # of an image; of a data set, the most frequent ones
LARGEST = 1e30                                                 # number that is kept
CHUNK = 256                                                    # files of a folder that a worker takes at a time

# numbers: {name: number}; odd: see clean
Row = collections.namedtuple("Row", ["name", "file", *NUMBERS, "numbers", "captions", "long_captions", "odd"])


def scan(path, workers=None):
    """
    (Indexed, bad) of all images under `path`, in memory; bad is every (name, reason), also of captions that are odd.
    The same files give the same table, whatever the number of workers. head["report"] is {"found", "used", "skipped":
    {reason: count}, "captions": {...}}, with found = used + skipped.
    """
    root, names, bad = list_names(path)
    shards, images, unpaired = pair(root, names)
    pillow()                                                   # its absence is reported once, not by each worker
    jobs = [(scan_shard, root, s) for s in shards]
    jobs += [(scan_files, root, images[k:k + CHUNK]) for k in range(0, len(images), CHUNK)]
    parts = in_parallel(jobs, workers)
    parts = list(tqdm(parts, "index", len(jobs), unit="shard" if shards else "chunk", disable=None))
    return merge(root, parts, bad + unpaired)


def list_names(path):
    """(root, names, bad): all files under a folder, in the order of their names; or one tar file."""
    if os.path.isfile(path) and path.lower().endswith(".tar"):
        return os.path.dirname(path) or ".", [os.path.basename(path)], []
    if not os.path.isdir(path):
        raise UserError(f"no folder {path!r}: give one with images ({' '.join(IMAGES)}) or .tar shards, or one .tar")
    names, bad = [], []

    def unreadable(error):
        bad.append((os.path.relpath(error.filename, path), "unreadable"))
    for folder, folders, files in os.walk(path, onerror=unreadable):
        here = "" if folder == path else os.path.relpath(folder, path) + os.sep
        bad += [(here + f, "hidden") for f in folders + files if f.startswith(".")]  # thumbnails, notes of the system
        folders[:] = [f for f in folders if not f.startswith(".") and not f.endswith(INDEX)]  # os.walk goes into these
        linked = [f for f in folders if os.path.islink(os.path.join(folder, f))]   # not followed: it may be a loop
        bad += [(here + f, "linked folder") for f in linked]
        names += [here + f for f in files if not f.startswith(".")]
    names.sort(key=os.fsencode)                                # the same on every machine
    bad += [(n, "name is not UTF-8") for n in names if not is_utf8(n)]  # a column of strings could not hold it
    return path, [n for n in names if is_utf8(n)], bad


def is_utf8(name):
    return name.encode("utf-8", "replace") == os.fsencode(name)  # replace: a byte that is none becomes "?"


def pair(root, names):
    """(shards, images, bad) of these names; images as in scan_files."""
    def ends(kinds):
        return [n for n in names if n.lower().endswith(kinds)]

    def stem(name):
        return os.path.splitext(name)[0]
    shards, files, bad, listed = ends(".tar"), ends(IMAGES), [], {}
    if not shards and not files:
        raise UserError(f"nothing to use under {root!r}: looked for images ({' '.join(IMAGES)}) and .tar shards")
    owners = {stem(f): f for f in reversed(files)}             # the first image of a name owns its .txt
    for name in names:
        if os.path.basename(name) in LISTS:
            try:
                bad += read_list(root, name, owners, listed)
            except OSError:
                bad.append((name, "unreadable"))
    twice = {f for f in files if f not in listed and owners[stem(f)] != f}
    bad += [(n, "unsupported format") for n in ends(UNSUPPORTED)] + [(n, "same key") for n in twice]
    bad += [(n, "caption without image") for n in ends(".txt") if stem(n) not in owners]
    bad += [(n, "caption without image") for n in set(listed).difference(files)]
    sidecars = {stem(n) + n[len(stem(n)):].lower(): n for n in ends((".txt", ".json"))}        # a.txt wins over a.TXT
    return shards, [(f, sidecars.get(stem(f) + ".txt"), sidecars.get(stem(f) + ".json"), listed.get(f))
                    for f in files if f not in twice], bad


def read_list(root, file, owners, listed):
    """
    Add the rows of captions.jsonl or captions.csv to listed, {name: texts}. Names are relative to the list and may lack
    their ending (owners: {name without ending: image}); several rows of one image add up. Returns (file, reason) of
    rows that cannot be read.
    """
    broken = []
    with open(os.path.join(root, file), encoding="utf-8", errors="replace", newline="") as f:
        csv.field_size_limit(MOST_BYTES)                       # else it refuses captions of 128 kB, which we cut
        lines = csv.DictReader(f) if file.endswith(".csv") else (read_json(line) or {} for line in f if line.strip())
        for fields in lines:
            name = next((fields[k] for k in FILE_KEYS if isinstance(fields.get(k), str)), None)
            if name is None:
                broken.append((file, "row without a file, not skipped"))
                continue
            name = os.path.normpath(os.path.join(os.path.dirname(file), name))     # only compared with names that exist
            for texts, more in zip(listed.setdefault(owners.get(name, name), ([], [])), texts_of(fields)):
                texts += more
    return broken


def scan_files(root, images):
    """Files of a folder, each (name, .txt or None, .json or None, its texts in a list or None) -> (rows, bad, {})."""
    rows, bad = [], []

    def read(name):
        try:
            return read_whole(os.path.join(root, name)) if name else None
        except (OSError, Unfit):                               # as if it were not there: the caption counts as missing
            return None
    for name, text, fields, texts in images:
        try:
            blob = read_whole(os.path.join(root, name))
            beside, numbers = read_beside(read(text), read(fields), name, bad)
            rows.append(make_row(name, name, 0, blob, texts or beside, numbers))
        except OSError:  # no permission, a loop of links, gone since it was listed
            bad.append((name, "unreadable"))
        except Unfit as e:
            bad.append((name, str(e)))
    return rows, bad, {}


def scan_shard(root, name):
    """A tar -> (rows, bad, {name: bytes}). Members of one key (the name up to its last dot) belong together."""
    rows, bad, path = [], [], os.path.join(root, name)
    try:
        members, size, cut = tar_members(path)
    except OSError:
        return [], [(name, "unreadable")], {}
    if cut is not None:  # what it still holds is not taken: half a shard would go unnoticed
        return [], [(name, f"incomplete at byte {cut}")], {}
    for key, parts in members.items():
        if os.path.basename(key).startswith("."):              # such as ._0001.jpg, which macOS puts beside 0001.jpg
            bad += [(f"{name}/{member}", "hidden") for _, member, _, _ in parts]
            continue
        texts = {kind: read_part(path, offset, min(length, MOST_BYTES)) for kind, _, offset, length in parts
                 if kind in (".txt", ".json")}
        pictures = [p for p in parts if p[0] in IMAGES + UNSUPPORTED]
        if not pictures and ".txt" in texts:  # a .json alone is no loss: img2dataset writes one for failures too
            bad.append((f"{name}/{key}.txt", "caption without image"))
        for k, (kind, member, offset, length) in enumerate(pictures):
            member = f"{name}/{member}"
            try:
                if k or kind in UNSUPPORTED or length > MOST_BYTES:
                    raise Unfit("same key" if k else "unsupported format" if kind in UNSUPPORTED else "too large")
                both, numbers = read_beside(texts.get(".txt"), texts.get(".json"), member, bad)
                rows.append(make_row(member, name, offset, read_part(path, offset, length), both, numbers))
            except Unfit as e:
                bad.append((member, str(e)))
    return rows, bad, {name: size}


def tar_members(path):
    """
    ({key: [(ending, name, offset, length)]}, size, cut) of a tar: its regular files by key, its bytes, and None where
    it is whole. A whole tar ends in zero blocks; one that was cut, or whose writer died, stops at byte `cut`, between
    two members or within one. tarfile lists the members; their bytes are read by offset, since it can neither seek to
    one unlisted nor tell that it was cut.
    """
    members, end, size = {}, 0, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:                  # uncompressed; reads headers and skips contents
            for member in tar:
                key, kind = os.path.splitext(member.name)      # a name is only compared, never written to
                if member.isreg():
                    members.setdefault(key, []).append((kind.lower(), member.name, member.offset_data, member.size))
                tar.members = []                               # else it keeps them all
            end = tar.offset  # where the zero blocks, two of 512 bytes or more, should begin
        whole = end + 512 <= size and not read_part(path, end, 1024).strip(b"\0")
        return members, size, None if whole else end
    except OSError:
        raise
    except Exception as e:                                     # tarfile raises many kinds on bytes that are no tar
        return {}, size, size if "unexpected end" in str(e) else end


def make_row(name, file, offset, blob, texts, numbers):
    """The Row of an image. Raises Unfit where training could not use it."""
    (width, height), odd = header(blob), []
    plain, long = (dict.fromkeys(clean(text, odd) for text in part[:MOST_CAPTIONS]) for part in texts)  # each once
    plain, long = ([caption for caption in part if caption] for part in (plain, long))
    if not plain and not long:
        odd.append("empty" if any(texts) else "missing")
    return Row(name, file, offset, len(blob), width, height, zlib.crc32(blob), numbers, plain, long, odd)


def clean(caption, odd):
    """A caption, str or bytes -> one line of UTF-8 bytes. What is no text becomes U+FFFD; a long one is cut."""
    # JSON may hold half of a surrogate pair, which has no UTF-8: encoded and decoded it becomes a question mark
    blob = caption if isinstance(caption, bytes) else str(caption).encode("utf-8", "replace")
    text = blob.decode("utf-8", "replace")
    if "\ufffd" in text or "\0" in text:
        odd.append("replaced")
    text = " ".join(text.replace("\0", " ").split())
    if len(text) > MOST_CHARACTERS:
        odd.append("truncated")
        text = text[:MOST_CHARACTERS].rpartition(" ")[0] or text[:MOST_CHARACTERS]  # or: one word, longer than that
    return text.encode()


def texts_of(fields):
    """(plain, long) captions of a .json or a row of .jsonl or .csv, each one string or a list of them."""
    def pick(keys):
        values = [fields[k] if isinstance(fields.get(k), list) else [fields.get(k)] for k in keys]
        return [c for value in values for c in value if c is not None]
    return pick(CAPTION_KEYS), pick(LONG_KEYS)


def numbers_of(fields):
    """{name: number} of a .json: the first ones that are finite. True and False are no numbers."""
    numbers = [(k, float(v)) for k, v in fields.items()
               if type(v) in (int, float) and abs(v) < LARGEST and k.isprintable()]
    return dict(numbers[:MOST_NUMBERS])


def read_beside(text, fields, name, bad):
    """
    (plain, long) captions and {name: number} from the bytes of a .txt and a .json, either of them None where there is
    no such file.
    """
    row = read_json(fields) if fields is not None else {}
    if row is None:
        bad.append((name, "unreadable .json, not skipped"))
    plain, long = texts_of(row or {})
    plain = [text] if text is not None else plain              # img2dataset writes the caption to both: take it once
    return (plain, long), numbers_of(row or {})


def read_json(text):
    """The dict that a JSON text (str or bytes) holds, or None."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):                       # no JSON, or built to exhaust the stack
        return None
    return fields if isinstance(fields, dict) else None


def read_whole(path):
    """Bytes of a regular file. OSError for others, such as a pipe, which would wait for ever; Unfit if too large."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(file)  # of what was opened: the name may mean another file by now
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        if status.st_size > MOST_BYTES:
            raise Unfit("too large")
        return os.read(file, status.st_size)
    finally:
        os.close(file)


def in_parallel(jobs, workers):
    """Results of jobs (function, *arguments) in their order, from so many processes; few jobs take none."""
    workers = min(len(jobs), workers or (os.cpu_count() if len(jobs) > 8 else 1))
    if workers < 2:
        yield from map(run_job, jobs)
        return
    # fork: workers start at once, with all that is imported here; Ctrl-C reaches them through this process alone
    context, start = multiprocessing.get_context("fork"), (signal.signal, (signal.SIGINT, signal.SIG_IGN))
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, *start)
    try:
        yield from pool.map(run_job, jobs)
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError("a worker of the index was killed, by lack of memory most likely: fewer --workers")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_job(job):
    """A function of its own, because processes are told by name what to run."""
    return job[0](*job[1:])


def merge(root, parts, bad):
    """(Indexed, bad) of all parts, less images whose bytes and captions both came before."""
    rows = [row for part in parts for row in part[0]]
    again = duplicates(root, rows)
    bad = bad + [b for part in parts for b in part[1]] + [(rows[i].name, "duplicate") for i in again]
    rows = [row for i, row in enumerate(rows) if i not in again]
    bad = sorted(bad + [(row.name, f"caption {why}, not skipped") for row in rows for why in row.odd])

    columns = {"file": pack([row.file.encode() for row in rows])}
    for name, dtype in NUMBERS.items():
        columns[name] = np.array([getattr(row, name) for row in rows], dtype)
    for name in ("captions", "long_captions"):
        lists = [getattr(row, name) for row in rows]
        firsts = np.cumsum([0] + [len(texts) for texts in lists], dtype=np.int64)
        columns[name] = firsts, pack([text for texts in lists for text in texts])
    counts = collections.Counter(sorted(name for row in rows for name in row.numbers))
    for name, _ in counts.most_common(MOST_NUMBERS):           # of equals the first by name
        columns[NUMBER + name] = np.array([row.numbers.get(name, np.nan) for row in rows])

    skipped = collections.Counter(reason_of(why) for _, why in bad if not why.endswith("not skipped"))
    odd = collections.Counter(why for row in rows for why in row.odd)
    report = {"found": len(rows) + skipped.total(), "used": len(rows), "skipped": dict(sorted(skipped.items())),
              "captions": {k: odd[k] for k in ("missing", "empty", "truncated", "replaced")}}
    examples = {reason_of(why): ascii(name) for name, why in reversed(bad)}        # the first file of each reason
    shards = {name: size for part in parts for name, size in part[2].items()}
    head = {"fingerprint": digest(arrays_of(columns)), "report": report, "examples": examples, "shards": shards}
    return Indexed(columns, head, root), bad


def reason_of(why):
    """What tables count, less what differs from file to file: "incomplete at byte 512" -> "incomplete shard"."""
    return re.sub(r" at byte \d+", " shard", why).removesuffix(", not skipped")


def duplicates(root, rows):
    """Numbers of the rows whose bytes and captions both are those of an earlier row."""
    earliest, again = {}, set()
    for i, row in enumerate(rows):
        first = rows[earliest.setdefault((row.crc, row.length), i)]
        if first is not row and first[-3:-1] == row[-3:-1]:    # the same captions
            try:
                one, other = (read_part(os.path.join(root, r.file), r.offset, r.length) for r in (first, row))
            except OSError:                                    # gone since it was looked at
                continue
            if one == other and zlib.crc32(one) == row.crc:
                again.add(i)
    return again


# ---- opening: by the index or by a scan, and what is refused ---------------------------------------------------------

MUTE = ("caption missing, not skipped", "caption empty, not skipped")              # why an image has no caption


def open_images(path, allow=()):
    """
    Indexed, from an index, or from a folder or .tar: by the index beside it or, where it has none, scanned into memory
    now. Raises UserError as require does, and for an index that is broken or out of date.
    """
    if not path:
        raise UserError("a published pipeline brings no images: give --prompts FILE, and --reference FOLDER or, for "
                        "the CLIP score alone, --metrics questions --features clip --weights W")
    for folder in (path, index_folder(path)):
        if os.path.exists(os.path.join(folder, "index.arrow")):
            return read_index(folder)
        if os.path.exists(os.path.join(folder, "index.json")):
            raise UserError(WRONG_FORMAT.format(folder, 1))
    data, bad = scan(path)
    require(data, bad, allow)
    return data


def require(data, bad, allow=()):
    """Raise UserError where training would not be what was meant: a shard cut short, no captions, no image."""
    path, report = data.root, data.head["report"]
    mute = [name for name, reason in bad if reason in MUTE]
    for name, reason in bad:
        if reason.startswith("incomplete") and "incomplete" not in allow:
            raise UserError(f"shard {name} is {reason}: fetch it again, or go on without it: "
                            f"python data.py index {path} --allow incomplete")
    if not report["used"]:
        raise UserError(f"none of {report['found']} files under {path!r} can serve: see python data.py check {path}")
    if len(mute) > report["used"] / 20 and "uncaptioned" not in allow:  # one in twenty may; more is a mistake in names
        raise UserError(f"{len(mute)} of {report['used']} images under {path!r} have no caption, such as {mute[0]!r}: "
                        "put NAME.txt beside NAME.jpg, or take them with the null caption: "
                        f"python data.py index {path} --allow uncaptioned")
