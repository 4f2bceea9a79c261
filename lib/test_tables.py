"""pytest lib/test_tables.py: arrays written batch by batch to an Arrow file, and read by number."""
import functools
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from lib import processes
from lib.settings import UserError
from lib.tables import DTYPES, Table, print_room, write_shared, write_table
from lib.test_processes import run_two

COUNT, BATCH = 23, 5


def array(i):
    """Of 0 to 4 rows, 6 wide; of the numbers 10 to 14, which make up a batch, without any."""
    n = 0 if 10 <= i < 15 else i % 5
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(i))


def write(path, calls=None, about=None, batch=BATCH, make=array):
    def make_all(numbers):
        if calls is not None:
            calls.append(list(numbers))
        return [make(i) for i in numbers]
    write_table(str(path), {"dtype": "fp32", "id": "a"} | (about or {}), 2, COUNT, make_all, batch, "arrays")
    return path


@pytest.fixture
def table(tmp_path):
    pytest.importorskip("pyarrow")
    return write(tmp_path / "a.arrow")


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_come_back_by_number(tmp_path, dtype):
    pytest.importorskip("pyarrow")
    read = Table(str(write(tmp_path / "a.arrow", about={"dtype": dtype})))
    assert len(read) == COUNT and read.about == {"dtype": dtype, "id": "a"}
    for i in np.random.default_rng(0).permutation(COUNT).tolist() * 2:
        assert read[i].dtype == torch.float32 and torch.equal(read[i], array(i).to(DTYPES[dtype]).float())
    assert torch.equal(pickle.loads(pickle.dumps(read))[4], read[4])               # as a spawned worker gets it
    assert not os.path.exists(tmp_path / "a.arrow.part")


@pytest.mark.parametrize("share, batches", ((0.0, 0), (0.001, 0), (0.2, 0), (0.5, 2), (0.73, 4), (0.999, 5), (1.0, 5)))
def test_a_table_goes_on_where_it_was_killed(table, share, batches):
    whole, calls = table.read_bytes(), []
    (table.parent / "a.arrow.part").write_bytes(whole[:int(share * len(whole))])   # so far it had come
    table.unlink()
    assert write(table, calls).read_bytes() == whole
    assert [i for numbers in calls for i in numbers] == list(range(COUNT))[batches * BATCH:]


def test_a_kill_in_the_middle_of_a_batch_loses_that_batch_alone(tmp_path):
    pytest.importorskip("pyarrow")

    def stops(i):
        if i == 17:
            raise KeyboardInterrupt
        return array(i)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a.arrow", make=stops)
    with pytest.raises(UserError):
        Table(str(tmp_path / "a.arrow"))                       # not complete
    calls = []
    write(tmp_path / "a.arrow", calls, batch=2)                # memory was too small: record batches stay as they were
    assert calls == [[15, 16], [17, 18], [19], [20, 21], [22]]
    assert all(torch.equal(Table(str(tmp_path / "a.arrow"))[i], array(i)) for i in range(COUNT))


def test_what_was_begun_otherwise_is_made_anew_and_what_is_finished_refused(table, capsys):
    shutil.copy(table, f"{table}.part")
    table.rename(table.with_suffix(".away"))
    calls = []
    write(table, calls, about={"id": "b"})                     # another encoder's start is thrown away, a result never
    assert calls[0] == list(range(BATCH)) and Table(str(table)).about["id"] == "b"
    write(table, about={"id": "b"})
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(UserError):
        write(table, about={"id": "a"})
    assert "was made otherwise" in capsys.readouterr().err


def share(path, kill=None):
    """What each of two processes does: its share of a table in pieces. Prints which arrays it made."""
    processes.join(60)

    def make(numbers):
        print("made", *numbers, flush=True)
        if kill in numbers:
            os._exit(9)
        return [array(i) for i in numbers]
    write_shared(path, {"dtype": "fp32", "id": "a"}, 2, COUNT, make, BATCH, "arrays")
    processes.exit_with(0)


def made(output):
    return [int(n) for line in output.splitlines() if line.startswith("made") for n in line.split()[1:]]


def test_two_processes_share_a_table_and_go_on_after_a_kill(table, tmp_path):
    whole, path = Table(str(table)), str(tmp_path / "b.arrow")
    (_, _), (status, killed) = run_two(functools.partial(share, path, kill=17))
    assert status == 9 and made(killed) == [*range(5, 10), *range(15, 20)] and not os.path.exists(path)
    (status, first), (_, second) = run_two(functools.partial(share, path))
    again = made(first) + made(second)
    assert status == 0 and set(range(15, 20)) <= set(again) and not set(range(10)) & set(again)    # those were whole
    read = Table(path)
    assert len(read) == COUNT and read.about == whole.about
    assert all(torch.equal(read[i], whole[i]) for i in range(COUNT))
    assert [name for name in os.listdir(tmp_path) if name.startswith("b.")] == ["b.arrow"]


@pytest.mark.parametrize("spoil", (lambda b: b[:-30], lambda b: b[:100], lambda b: b"", lambda b: b"\0" * len(b)))
def test_broken_tables_are_refused(table, spoil, capsys):
    table.write_bytes(spoil(table.read_bytes()))
    with pytest.raises(UserError):
        Table(str(table))
    assert "is broken" in capsys.readouterr().err


def test_room_is_told_and_refused(tmp_path, capsys):
    print_room(str(tmp_path), 2 ** 20, "captions")
    assert "captions: about 0.00 GiB to write" in capsys.readouterr().out
    with pytest.raises(UserError):
        print_room(str(tmp_path), 2 ** 60, "captions")
    assert "too little room" in capsys.readouterr().err


def with_pandas(path, tmp_path):
    table = pytest.importorskip("pandas").read_feather(path)
    return list(zip(table["shape"], table["values"]))


def with_duckdb(path, tmp_path):
    arrays = pytest.importorskip("pyarrow").ipc.open_file(path).read_all()
    return pytest.importorskip("duckdb").sql('select "shape", "values" from arrays').fetchall()


def with_datasets(path, tmp_path):
    library = pytest.importorskip("datasets")
    table = library.load_dataset("arrow", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    return [(row["shape"], row["values"]) for row in table]


@pytest.mark.parametrize("reader", (with_pandas, with_duckdb, with_datasets))
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_programs_read_a_table(tmp_path, reader, dtype):
    pytest.importorskip("pyarrow")
    if reader is with_duckdb and dtype == "fp16":
        pytest.skip("DuckDB has no half floats")
    path = write(tmp_path / "a.arrow", about={"dtype": dtype})
    rows = reader(str(path), tmp_path)
    assert len(rows) == COUNT
    for i, (shape, values) in enumerate(rows):
        numbers = torch.tensor([float(v) for v in values])
        if dtype == "bf16":                                    # kept as uint16: the upper half of a float32
            numbers = (numbers.int() << 16).view(torch.float32)
        assert torch.equal(numbers.view(*shape), array(i).to(DTYPES[dtype]).float())


__all__ = [name for name in globals() if name.startswith("test_")] + ["table"]
