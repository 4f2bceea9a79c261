"""
Checkpoints: all that a training needs to go on, in a file, or in a folder of shards, one from each process.

    last.pt         the newest; replaced as a whole, so a kill at any moment leaves the old one or the new one
    step_N.pt       what last.pt was before (of shards, a kill between two renames leaves no last.pt, only these)

A state holds "format", "step", "config" and the caller's other plain values, and tensors by name: "model", "ema" (of
what is trained) and "moments" (of the optimizers); those of a second network are NAME_model and so on. Nothing in a
file is executed, and no tensor that is read here may hold a NaN or an infinity.

torch.distributed.checkpoint.state_dict is not used: it knows no EMA, so a loop as in `restore` is needed all the same,
and the parameter groups that it adds do not go into safetensors.
"""
import glob
import os
import shutil
from contextlib import contextmanager

import torch

from lib.files import file_hash
from lib.processes import all_gather, get_rank, get_world_size, print0
from lib.settings import UserError

FORMAT = 5                                                     # of what `save` writes


# ---- the state of a training -----------------------------------------------------------------------------------------

def training_state(model, ema_params, optimizers):
    """{part: {name: tensor}} of all that training changes: the very tensors, by the names of the model's parameters."""
    name_of = {p: name for name, p in model.named_parameters()}
    # the only scalar among the moments is the count of updates, which the caller keeps
    moments = {f"{name_of[p]}/{key}": v for o in optimizers for p in o.state for key, v in o.state[p].items() if v.ndim}
    return {"model": model.state_dict(), "ema": ema_params, "moments": moments}


def make_moments(model, optimizers, step):
    """Let optimizers make the tensors that they keep, by a step of size zero, and let them count from `step`."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        for group, lr in zip(optimizer.param_groups, rates):
            group["lr"] = lr
        for moments in optimizer.state.values():
            moments.get("step", torch.zeros(())).fill_(step)
    model.zero_grad()


def local(tensor):
    """A tensor, or of a DTensor (FSDP's) this process's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """A tensor, or all of a DTensor: every process takes part in gathering it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def ema_weights_in_place(model, trained, ema_params):
    """Inside, the model has its averaged weights, and its own again after it."""
    own = [p.detach().clone() for p in trained.values()]       # a second model would need its own shards under FSDP
    with torch.no_grad():
        for p, mean in zip(trained.values(), ema_params.values()):
            p.copy_(mean)
        try:
            yield model.eval()
        finally:
            for p, value in zip(trained.values(), own):
                p.copy_(value)
            model.train()


def flatten(parts):
    """{part: {name: tensor}} -> {"part/name": tensor}, as shards hold them."""
    return {f"{part}/{name}": v for part, tensors in parts.items() for name, v in tensors.items()}


def restore(state, file, parts):
    """Copy the state read from `file` into the tensors of `parts`; under FSDP each process takes its part of them."""
    if "model" not in state:                                   # of shards each process reads what it needs
        from torch.distributed.checkpoint import HuggingFaceStorageReader, load
        return load(flatten(parts), storage_reader=HuggingFaceStorageReader(file), no_dist=get_world_size() == 1)
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            value = state[part][name].to(tensor.device)        # whole, by name: whatever number of processes wrote it
            if hasattr(tensor, "device_mesh"):                 # a DTensor
                from torch.distributed.tensor import distribute_tensor
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.detach().copy_(value)


# ---- reading ---------------------------------------------------------------------------------------------------------

def open_checkpoint(file, defaults=None, shards=True):
    """
    (state, None), or (None, why not). `defaults` are for keys of the config that are younger than the checkpoint. Of a
    folder the tensors are left out where `shards` is False: training reads them straight into its own.
    """
    try:
        state = read_about(file)
        if state["format"] != FORMAT:
            remedy = "train it again" if state["format"] < FORMAT else "update the code"
            return None, f"{file!r} is of format {state['format']} and this code reads format {FORMAT}: {remedy}"
        state["config"] = {**(defaults or {}), **state["config"]}
        if os.path.isdir(file) and shards:
            for key, value in read_shards(file).items():
                part, name = key.split("/", 1)
                state.setdefault(part, {})[name] = value
        parts = () if os.path.isdir(file) and not shards else ("model", "ema", "moments")
        others = [part for part in state if part.endswith(("_model", "_ema", "_moments"))]     # of a second network
        tensors = flatten({part: state[part] for part in (*parts, *others)})
    except Exception as e:                                     # of many kinds: cut off, no checkpoint, not allowed
        return None, f"{file!r} is no complete checkpoint ({type(e).__name__}): take another, or train it again"
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            return None, f"{file!r} has values that are not finite in {name}: take an earlier checkpoint"
    return state, None


def read_about(file):
    """What a checkpoint says of itself; of a file with its tensors too, mapped into memory and read where used."""
    about = os.path.join(file, "about.pt") if os.path.isdir(file) else file
    return torch.load(about, map_location="cpu", weights_only=True, mmap=True)


def read_shards(folder):
    """{"part/name": tensor}, whole, of a folder that torch's distributed checkpoint wrote as safetensors."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    reader = HuggingFaceStorageReader(folder)
    about = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in about.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def is_run(path):
    """Is it a checkpoint, a run folder, or a published one? A sharded checkpoint is a folder with about.pt."""
    names = "last.pt", "about.pt", "model_index.json", "model.safetensors"
    return os.path.isfile(path) or any(os.path.exists(os.path.join(path, name)) for name in names)


def newest_file(path):
    """The last checkpoint in a run folder; of all others, a checkpoint or a published folder, the path itself."""
    last = os.path.join(path, "last.pt")
    return last if os.path.exists(last) else path


def find_checkpoint(path):
    """The checkpoint that a path is, or the newest one of a run folder. UserError where there is none."""
    is_run = os.path.isdir(path) and not os.path.exists(os.path.join(path, "about.pt"))    # a sharded one has it
    files = [os.path.join(path, "last.pt"), *older_checkpoints(path)] if is_run else [path]
    if path.endswith(".safetensors"):
        raise UserError(f"{path!r} is weights alone: name the folder that it lies in, of a pipeline the whole one, "
                        "that with model_index.json")
    if not (file := next(filter(os.path.exists, files), None)):
        raise UserError(f"no checkpoint {files[0]!r}: `python train.py --stage grow` makes out/toy/pretrain/last.pt "
                        "and out/toy/grow/last.pt; or name a pipeline's whole folder, that with model_index.json: "
                        "nothing is downloaded")
    return file


def checkpoint_hash(path):
    """sha256 of a run's last checkpoint, of a checkpoint, or of the weights in a folder; None where there is none."""
    return file_hash(newest_file(path))


def older_checkpoints(run):
    """The checkpoints step_N.pt of a run folder, newest first."""
    files = glob.glob(os.path.join(glob.escape(run), "step_*.pt"))
    return sorted(files, key=lambda file: -int(os.path.basename(file)[5:-3]))


def newest_checkpoint(run, defaults=None):
    """
    (state, file) of the newest checkpoint in a run folder that can be read, its shards left out; (None, None) where
    there is none, or only that of step 0, which loses nothing. Raises UserError where none can be read.
    """
    # a kill may come between the two renames of `rotate`, when there is no last.pt; and a disk may fail
    files = [file for file in (os.path.join(run, "last.pt"), *older_checkpoints(run)) if os.path.exists(file)]
    for file in files:
        state, broken = open_checkpoint(file, defaults, shards=False)
        if state:
            return (state, file) if state["step"] else (None, None)
        print0(f"warning: {broken}: falling back to the checkpoint before it")
    if files:
        raise UserError(f"no checkpoint in {run} can be read: start anew with --fresh")
    return None, None


# ---- writing ---------------------------------------------------------------------------------------------------------

def save(file, about, parts, sharded=False, num_checkpoints=1, snapshots=()):
    """
    Replace the checkpoint `file` by a new one; the last `num_checkpoints` stay, with this one, and those of the steps
    `snapshots`. All processes call it and get the same error: FloatingPointError, the name of a tensor that is not
    finite; OSError, where it fails.
    """
    bad = [key for key, v in flatten(parts).items() if not torch.isfinite(local(v)).all()]
    if bad := sum(all_gather(bad), []):                        # no run could recover from them
        raise FloatingPointError(bad[0])
    first, part = get_rank() == 0, file + ".part"
    together(first, remove, part)                              # left by a kill
    try:
        together(True, write, part, {"format": FORMAT, **about}, parts, sharded)
    except OSError:
        together(first, remove, part)                          # the room that it takes
        raise
    together(first, rotate, file, about["step"], num_checkpoints, snapshots)


def together(mine, work, *args):
    """work(*args) in the processes where `mine` is true; an OSError in all where it failed in one."""
    reason = None
    try:
        if mine:
            work(*args)
    except (OSError, RuntimeError) as e:                       # torch reports a full disk as a RuntimeError
        reason = str(e).split("\n")[0]
    if reasons := [r for r in all_gather(reason) if r]:
        raise OSError(reasons[0])


def write(path, about, parts, sharded):
    """A file by rank 0, or a folder by all; read back before it counts: each value compared, or each shard opened."""
    if sharded:
        from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, save as save_shards
        from torch.distributed.checkpoint.api import CheckpointException
        writer = HuggingFaceStorageWriter(path, save_distributed=True)
        try:
            save_shards(flatten(parts), storage_writer=writer, no_dist=get_world_size() == 1)
        except CheckpointException as e:                       # a BaseException
            raise OSError(next(iter(e.failures.values()))[0])
        if get_rank() == 0:
            torch.save(about, os.path.join(path, "about.pt"))
            HuggingFaceStorageReader(path).read_metadata()
        return
    parts = {part: {name: whole(v) for name, v in tensors.items()} for part, tensors in parts.items()}
    if get_rank() == 0:
        with open(path, "wb") as f:
            torch.save(about | parts, f)
            f.flush()
            os.fsync(f.fileno())                               # on the disk before the name changes
        again = read_about(path)
        again = flatten({part: again[part] for part in parts})
        if not all(torch.equal(again[key], v.cpu()) for key, v in flatten(parts).items()):
            raise OSError("what was read back differs from what was written")


def rotate(file, step, num_checkpoints, snapshots=()):
    """The new checkpoint takes the name `file`, the one before it becomes step_N.pt, and the oldest go, no snapshot."""
    run = os.path.dirname(file)
    try:
        before = os.path.join(run, f"step_{read_about(file)['step']}.pt")
    except Exception:                                          # there is none, or it is broken
        remove(file)
    else:
        remove(before)
        try:
            os.link(file, before)                              # so that last.pt is there at any moment
        except OSError:                                        # a folder, or a disk without links
            os.rename(file, before)
    os.replace(file + ".part", file)
    kept = {f"step_{step}.pt" for step in snapshots if step}   # for good
    older = [old for old in older_checkpoints(run) if os.path.basename(old) not in kept]
    # that of step 0, which was written to see whether one can write here; and the same step saved twice
    useless = [old for old in older if os.path.basename(old) in ("step_0.pt", f"step_{step}.pt")]
    for old in useless + [old for old in older if old not in useless][num_checkpoints - 1:]:
        remove(old)


def remove(path):
    """Remove a checkpoint, file or folder, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)
