"""
Processes: one, or those that torchrun started. In a single process nothing of torch.distributed is touched.

    rank, world, device = join(timeout=600)     meet the others
    print0("once, not once for each process")
    if all_reduce_max(stop): ...                all decide alike
    results = all_gather(mine)                  or gather(mine), for rank 0 alone
    exit_with(3)

A process that fails says so and ends at once. The connections to it close, which ends the others: none waits for it.
"""
import contextlib
import ctypes
import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from lib.errors import get_rank, print_error


def get_world_size():
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def prepare_cpu():
    """
    Two settings that a CPU wants, before any thread starts. Numbers under 1e-38 become 0, for it takes many times as
    long for them, and up to 8 % of the gradients in a trained model's attention are such. And memory stays with this
    process: glibc gives large tensors back after each use, and the system fills every page with zeros before the next.
    """
    torch.set_flush_denormal(True)
    libc = ctypes.CDLL(None)
    # M_MMAP_THRESHOLD, bytes: smaller tensors come from the heap. Old ones take 32 MiB at most, other libraries none
    if hasattr(libc, "mallopt") and (libc.mallopt(-3, 2 ** 30) or libc.mallopt(-3, 2 ** 25)):
        libc.mallopt(-1, 2 ** 31 - 1)                          # M_TRIM_THRESHOLD: its end is not given back


def join(timeout):
    """
    (rank, world, device) after meeting the other processes; where they cannot meet, it says so and ends with status 2.
    From here on a process that fails ends at once, and others wait `timeout` seconds for one that does not answer.
    """
    prepare_cpu()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)                          # kernels and NCCL go by the current device
    install_excepthook()                                       # one that ends while they meet is heard of, too
    if get_world_size() > 1:
        # what stands on a CPU travels by gloo: a vote waits for no GPU, and a closed connection is an error at once
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        except (dist.DistNetworkError, dist.DistStoreError) as e:
            hint = "give torchrun --standalone, or another --master-port"
            print_error(f"the processes cannot meet ({str(e).splitlines()[0]}): {hint}", wait=False)
            sys.exit(2)
    install_excepthook()                                       # after torch has put its own in place
    return get_rank(), get_world_size(), device


def sync_gradients(net, last):
    """A context in which gradients travel between processes after the last micro-batch only, and add up before it."""
    if hasattr(net, "set_requires_gradient_sync"):             # FSDP
        net.set_requires_gradient_sync(last)
    # DDP decides in the forward, so that belongs into the context too
    return net.no_sync() if hasattr(net, "no_sync") and not last else contextlib.nullcontext()


def all_reduce_max(value):
    """The largest of all processes' numbers, as a float, so that they decide alike."""
    if get_world_size() == 1:
        return float(value)
    value = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def all_gather(value):
    """[the value of rank 0, that of rank 1, ...], of anything that can be pickled."""
    values = [value] * get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_gather_rows(values):
    """A tensor (b, ...) of each process as one list of rows, in the order of the ranks."""
    return sum(all_gather(values.tolist()), [])


def gather(value):
    """As all_gather at rank 0; the others get an empty list, and no memory goes to it."""
    values = [value] * get_world_size() if get_rank() == 0 else None
    if get_world_size() > 1:
        dist.gather_object(value, values)
    return values or []


def chunks(n, size=64):
    """Ranges that cover 0 to n - 1. They do not depend on the number of processes, so neither does what each makes."""
    return [range(k, min(k + size, n)) for k in range(0, n, size)]


def on_all_ranks(work, jobs, label="", shared=True):
    """
    [work(job) for job in jobs], of which each process does every world-th one: rank 0 gets all results in order, the
    others an empty list. Not `shared`, each does all and gets all. A bar on terminals.
    """
    rank, world, jobs = get_rank() if shared else 0, get_world_size() if shared else 1, list(jobs)
    mine = tqdm(range(rank, len(jobs), world), label, leave=False, disable=True if get_rank() else None)
    results = {k: work(jobs[k]) for k in mine}                 # in turns: all processes end together
    if world > 1:
        results = {k: result for part in gather(results) for k, result in part.items()}
    return [results[k] for k in sorted(results)]


def print0(*parts):
    """Print once, and above a progress bar. A reader that went away (| head) does not end the program."""
    if get_rank() == 0:
        try:
            tqdm.write(" ".join(map(str, parts)))
            sys.stdout.flush()
        except OSError:
            sys.stdout = open(os.devnull, "w")


def fail(message, status):
    """End all processes with an error that all of them know."""
    if get_rank() == 0:
        print_error(message)
    exit_with(status)


def exit_with(status):
    """The end. Each of several processes goes at once: the threads between them may not survive an orderly teardown."""
    sys.stdout.flush()
    sys.stderr.flush()
    if get_world_size() == 1:
        sys.exit(status)
    os._exit(status)


def is_out_of_memory(error):
    """True of what torch raises when a GPU or the machine has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def catch_signals():
    """A list that gets each SIGINT or SIGTERM, to be looked at where stopping is easy. A second Ctrl-C ends at once."""
    caught = []

    def catch(number, _):
        if caught and number == signal.SIGINT:
            os._exit(130)
        caught.append(number)                                  # a second SIGTERM is the first, sent to the whole group
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def install_excepthook(memory="", worker="", workers=()):
    """
    From here on an exception that nobody catches ends this process at once. Out of memory: status 2, with the advice
    `memory`. The death of one of `workers`, processes of a DataLoader: status 3, with the advice `worker`. Else 1.
    """
    def end(kind, error, trace):
        if kind is KeyboardInterrupt:
            os._exit(130)
        text, lost = str(error).split("\n")[0], isinstance(error, dist.DistError) or "gloo" in str(error)
        if workers:
            time.sleep(0.5)                                    # a worker that dies may be heard of before it is dead
        dead = [w.pid for w in workers if not w.is_alive()]
        if is_out_of_memory(error):
            status, message = 2, f"out of memory ({text}): {memory}"
        elif dead:
            status, message = 3, f"DataLoader worker (pid {dead[0]}) is dead ({text}): {worker}"
        elif lost:
            status, message = 1, f"another process has ended or does not answer ({text}): its message says why"
        else:
            status, message = 1, f"{kind.__name__}: {text}"
            sys.__excepthook__(kind, error, trace)
        print_error(message, wait=lost)                        # the one that failed speaks first
        os._exit(status)                                       # at once: the others must not wait for this process
    if workers:                                                # the wait for a batch looks after them every 5 s; torch
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)          # would raise at the signal besides, within `end` too
    sys.excepthook = end
