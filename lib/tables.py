"""
Float arrays of any shapes in one Arrow file: written batch by batch, read by number through a memory map.

A row holds one array in two columns: `shape`, and `values`, its numbers, the last axis fastest. The metadata hold
`about`, a dict as JSON that tells what made the table; how many arrays it has; and how many a record batch has. pandas
(read_feather), DuckDB, Hugging Face datasets and all else that knows Arrow files read it. bf16, which Arrow lacks, is
kept as uint16 of the same bits. Needs pyarrow.
"""
import json
import mmap
import os
import shutil
import struct

import numpy as np
import torch
from tqdm import tqdm

from lib.files import import_extra
from lib.processes import all_reduce_max, get_rank, get_world_size, on_all_ranks
from lib.settings import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PIECES = 256                                                   # that several processes share
# what holds them in numpy and in Arrow, neither of which has bf16
KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.float16}


def write_table(path, about, axes, count, make, batch, bar):
    """
    Write a table of `count` arrays: make(numbers) gives those of up to `batch` numbers, tensors with so many axes.
    about["dtype"] is a key of DTYPES. Killed at any moment, it goes on at the batch where it was, with the same result.
    Raises UserError where the file holds what was made otherwise.
    """
    if os.path.exists(path):
        if (old := Table(path).about) != about:
            raise UserError(f"{path!r} holds what was made otherwise ({old}, not {about}): delete it first")
        return print(f"{path} is complete")
    arrow, part = import_extra("pyarrow", f"writing {path}"), path + ".part"
    done = whole_batches(part, about)                          # of a run that was killed
    rows = read_head(done[0].schema)[2] if done else batch     # of a record batch: the same throughout a table
    kind = arrow.from_numpy_dtype(KINDS[DTYPES[about["dtype"]]])
    columns = {"shape": arrow.list_(arrow.int32(), axes), "values": arrow.large_list(kind)}
    schema = arrow.schema(columns, head_of(about, count, rows))
    with arrow.OSFile(part + "2", "wb") as file, arrow.ipc.new_file(file, schema) as table:
        for record in done:
            table.write(record)
        os.replace(part + "2", part)                           # the open file keeps its contents under the other's name
        starts = range(rows * len(done), count, rows)
        for start in tqdm(starts, bar, initial=len(done), total=-(-count // rows), disable=None):
            end = min(start + rows, count)
            arrays = [a for k in range(start, end, batch) for a in make(range(k, min(k + batch, end)))]
            table.write(to_record(arrays, about["dtype"], schema, arrow))          # unbuffered: a kill loses one batch
    finish(path)


def write_shared(path, about, axes, count, make, batch, bar):
    """
    write_table by all processes. Each writes every world-th of up to PIECES tables, and the first puts them together: a
    piece that is whole is not made again, and one that was begun goes on, whatever the number of processes is then.
    """
    if get_world_size() == 1 or os.path.exists(path):
        return write_table(path, about, axes, count, make, batch, bar)
    each = batch * max(1, -(-count // (batch * PIECES)))       # rows of a piece, in whole record batches
    starts = range(0, max(count, 1), each)                     # of the pieces, whose names are path.START
    names = [f"{path}.{start}" for start in starts]

    def make_piece(start):
        write_table(f"{path}.{start}", about | {"first": start, "rows": batch}, axes, min(each, count - start),
                    lambda numbers: make([start + n for n in numbers]), batch, "")
    on_all_ranks(make_piece, starts, bar)                      # in turns: all end together
    if get_rank() == 0:
        arrow = import_extra("pyarrow", f"writing {path}")
        schema = Table(names[0]).reader.schema.with_metadata(head_of(about, count, batch))
        with arrow.OSFile(path + ".part", "wb") as file, arrow.ipc.new_file(file, schema) as table:
            for reader in (Table(name).reader for name in names):
                for k in range(reader.num_record_batches):
                    table.write(reader.get_batch(k).replace_schema_metadata(schema.metadata))
        finish(path)
        for name in names:
            os.remove(name)
    all_reduce_max(0)                                          # none reads it before it is there


def head_of(about, count, rows):
    """The metadata of a table."""
    return {"about": json.dumps(about), "count": str(count), "rows": str(rows)}


def finish(path):
    """What was written as path.part becomes path."""
    with open(path + ".part", "rb") as file:
        os.fsync(file)                                         # else the name could reach the disk before the contents
    os.replace(path + ".part", path)


def to_record(arrays, dtype, schema, arrow):
    """A record batch of the rows that hold these tensors."""
    axes = schema.field("shape").type.list_size
    shapes = np.array([a.shape for a in arrays], np.int32)                         # (rows, axes)
    offsets = np.cumsum([0] + [a.numel() for a in arrays])                         # (rows + 1,)
    values = torch.cat([a.flatten() for a in arrays]).to(DTYPES[dtype])            # all rows', one after the other
    values = values.view(torch.uint16) if dtype == "bf16" else values
    columns = [arrow.FixedSizeListArray.from_arrays(shapes.ravel(), axes),
               arrow.LargeListArray.from_arrays(offsets, values.numpy())]
    return arrow.record_batch(columns, schema=schema)


def whole_batches(path, about):
    """
    The record batches of a table that a kill left without its end: a list, [] where it was made otherwise or not begun.
    """
    arrow, batches = import_extra("pyarrow", f"writing {path}"), []
    try:
        with arrow.memory_map(path) as file:
            file.seek(8)                       # an Arrow file is 8 bytes of its own, then an Arrow stream, then its end
            stream = arrow.ipc.open_stream(file)
            while read_head(stream.schema)[0] == about:
                batches.append(stream.read_next_batch())
    except (OSError, ValueError, KeyError, StopIteration):    # no file; a cut one; one of which only the end is missing
        pass
    return batches


def read_head(schema):
    """(about, number of arrays, rows of a record batch) from the metadata of a table."""
    head = schema.metadata
    return json.loads(head[b"about"]), int(head[b"count"]), int(head[b"rows"])


class Table:
    """
    A table that write_table made: table[i] is array i, float. Any row is read without those before it, and processes
    share the pages of the file. Raises UserError where it is not whole.
    """

    def __init__(self, path):
        arrow = import_extra("pyarrow", f"reading {path}")
        if not os.path.exists(path):
            raise UserError(f"{path!r} is not complete: run the same command again, which goes on where it was")
        self.path = path
        try:
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.buffer = arrow.py_buffer(self.map)
            self.reader = arrow.ipc.open_file(self.buffer)
            self.about, self.count, self.rows = read_head(self.reader.schema)
            self.dtype, self.axes = DTYPES[self.about["dtype"]], self.reader.schema.field("shape").type.list_size
            if self.reader.num_record_batches != -(-self.count // self.rows):
                raise ValueError(f"{self.reader.num_record_batches} record batches do not hold {self.count} rows")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:    # ArrowInvalid is a ValueError
            raise UserError(f"{path!r} is broken ({str(e)[:100]}): delete it and make it again")
        # bytes of the file at which shapes, offsets and values of each record batch begin; -1 until it is looked up
        self.places = np.full((self.reader.num_record_batches, 3), -1)

    def __len__(self):
        return self.count

    def __reduce__(self):
        return Table, (self.path,)                             # a worker that is not forked opens the file itself

    def __getitem__(self, i):
        record, row = divmod(i, self.rows)
        if self.places[record, 0] < 0:
            self.places[record] = self.find(record)
        shapes, offsets, values = self.places[record].tolist()
        shape = struct.unpack_from(f"{self.axes}i", self.map, shapes + 4 * self.axes * row)
        first, end = struct.unpack_from("2q", self.map, offsets + 8 * row)
        numbers = np.frombuffer(self.map, KINDS[self.dtype], end - first, values + first * self.dtype.itemsize)
        if self.dtype == torch.bfloat16:                       # the upper half of a float32
            numbers = numbers.astype(np.uint32)
            numbers <<= 16                                     # in place: new memory would take longer than the shift
            numbers = numbers.view(np.float32)
        else:
            numbers = np.array(numbers)                        # a copy, since the map cannot be written to
        return torch.from_numpy(numbers).view(shape).float()

    def find(self, record):
        """
        The row of `places` for a record batch. Without it each array would parse its batch anew, in more time than
        reading.
        """
        shape, values = self.reader.get_batch(record).columns
        buffers = [shape.buffers()[-1], *values.buffers()[1::2]]      # values' own: validity, offsets, validity, values
        return [b.address - self.buffer.address if b else 0 for b in buffers]  # no buffer where all arrays are empty


def is_begun(path):
    """Is there a table at `path`, whole or not?"""
    return bool(path) and (os.path.exists(path) or os.path.exists(path + ".part"))


def print_room(folder, size, what):
    """Print how many bytes will be written, and refuse where the disk cannot hold them."""
    free = shutil.disk_usage(folder).free
    print(f"{what}: about {size / 2 ** 30:.2f} GiB to write, {free / 2 ** 30:.1f} GiB free in {folder}")
    if size > free:
        raise UserError(f"{folder} has too little room: make some, or index to another disk with --to")
