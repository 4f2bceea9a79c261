"""
What a training takes, before anything is rented: parameters, memory, FLOPs and time, from tensors of shapes alone.

    plan = plan_training(make_model, loss, steps=1000, batch=2048, micro=16, devices=64, kind="h100")
    print_plan(plan)
    count_flops(make_model, loss)                              # of one image, in no time

make_model() gives the model, frozen parameters without requires_grad; loss(model, images) a number.
"""
import json
import resource
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lib.settings import UserError

# dense FLOP/s of half precision, of TF32 and of float32, and GiB of memory, by NVIDIA's data sheets
KINDS = {"v100": (125e12, 15.7e12, 15.7e12, 32), "a100-80g": (312e12, 156e12, 19.5e12, 80),
         "h100": (989e12, 495e12, 67e12, 80), "h200": (989e12, 495e12, 67e12, 140)}


def peak_rate(kind, dtype, tf32):
    """FLOP/s of a device on paper, None if it is unknown: a key of KINDS, or the name that CUDA gives it."""
    known = [rates for name, rates in KINDS.items() if name.split("-")[0] in kind.lower()]
    column = 0 if dtype != torch.float32 else 1 if tf32 else 2
    return known[0][column] if known else None


def sgemm_rate():
    """FLOP/s of a 1024 x 1024 x 1024 float32 product here and now: a CPU's yardstick for the efficiency of a step."""
    a, seconds = torch.randn(1024, 1024), []
    for _ in range(10):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * 1024 ** 3 / sorted(seconds)[5]


def peak_memory(device):
    """Bytes: the most that this process has held at a time, of a GPU's memory or of the machine's."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def split_batch(batch, micro, devices):
    """(images per device and step, images per device at once); a `micro` of 0 is all at once. UserError if uneven."""
    unit = (micro or 1) * devices                              # a batch that followed the devices would change the run
    if batch % unit:
        raise UserError(f"batch = {batch} is not divisible by {micro or 1} (micro) x {devices} (devices): take a "
                        f"multiple of {unit}")
    return batch // devices, micro or batch // devices


def state_bytes(model, moments):
    """{part: bytes} of float32 state; moments(name, p): how many tensors the optimizer keeps of a trained parameter."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total, trainable = (4 * sum(p.numel() for p in group) for group in (model.parameters(), trained.values()))
    kept = 4 * sum(p.numel() * moments(name, p) for name, p in trained.items())
    return {"weights": total, "gradients": trainable, "optimizer": kept, "ema": trainable}


def measure_step(make_model, loss, images=1, dtype=torch.float32, blocks=None):
    """
    (model, FLOPs, bytes of activations) of a forward and backward over so many images; `blocks` are the modules under
    activation checkpointing. All of it on fake tensors, which have shapes and no data: seconds at any size.

    Autograd keeps tensors for the backward: K bytes, where views of one storage count once and weights not at all. A
    block under checkpointing keeps its input alone: I bytes for all blocks. It lets go of the S_b bytes that its inside
    had kept, and the backward brings them back by computing it again, one block at a time. So the most at a time is

        K - sum_b S_b + I + max_b S_b

    but while the forward goes on nothing is computed again, and autocast holds a rounded copy of each trained weight:
    C bytes. Hence max(C, max_b S_b) in the last place.
    """
    def add(tensor, storages):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage

    def size(storages):
        return sum(storage.nbytes() for storage in storages.values())

    def keep(tensor):                                          # autograd calls it with each tensor that it keeps
        add(tensor, kept)
        return tensor

    def before(block, args):
        add(args[0], inputs)
        inside[block] = -size(kept)

    def after(block, args, output):
        inside[block] += size(kept)

    with FakeTensorMode():
        model = make_model()
        weights, kept, inputs, inside = {p.untyped_storage()._cdata for p in model.parameters()}, {}, {}, {}
        for block in blocks(model) if blocks else ():
            block.register_forward_pre_hook(before)
            block.register_forward_hook(after)
        with FlopCounterMode(display=False) as counter:
            rounded = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            with rounded, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                total = loss(model, images)
            total.backward()
    activations = size(kept)                                   # K
    if inside:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        copies = dtype.itemsize * trained if dtype != torch.float32 else 0
        activations += size(inputs) - sum(inside.values()) + max(copies, *inside.values())
    return model, counter.get_total_flops(), activations


def count_flops(make_model, loss):
    """
    FLOPs of a forward and backward over one image, on the meta device, at once; a step takes `batch` times as many.
    PyTorch's counter knows the products of its own operators; others register a formula (register_flop_formula).
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        loss(make_model(), 1).backward()
    return counter.get_total_flops()


def plan_training(make_model, loss, steps, batch, micro, devices=1, kind="h100", mfu=0.4, dtype=torch.bfloat16,
                  tf32=True, moments=lambda name, p: 2, blocks=None, units=lambda model: [model]):
    """
    A dict of parameters, memory per device by part, FLOPs and time. `batch` images a step in all, `micro` at once on a
    device, 0 for its whole share; `mfu` is the share of the peak rate that one hopes for; FSDP gathers one of `units`
    at a time. Raises UserError for an unknown kind of device.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}: take one of {', '.join(KINDS)}")
    if devices < 1 or not 0 < mfu <= 1:
        raise UserError(f"{devices} devices at {mfu:g} of the peak rate: give at least 1, and a share above 0 and "
                        "up to 1")
    per_device, micro = split_batch(batch, micro, devices)
    model, flops, activations = measure_step(make_model, loss, micro, dtype, blocks)
    state = state_bytes(model, moments)
    gathered = 4 * max(sum(p.numel() for p in unit.parameters()) for unit in units(model))
    # FSDP cuts the state into shards; activations belong to the images of a device and stay
    shards = {part: size / devices for part, size in state.items()}
    memory = {"ddp": state | {"activations": activations},
              "fsdp": shards | {"gathered": gathered, "activations": activations}}
    memory = {way: parts | {"total": sum(parts.values())} for way, parts in memory.items()}
    speed = devices * peak_rate(kind, dtype, tf32) * mfu * micro / flops           # images per second
    return {"parameters": {"total": state["weights"] // 4, "trainable": state["ema"] // 4},
            "memory": {way: {part: size / 2 ** 30 for part, size in parts.items()} for way, parts in memory.items()},
            "memory_unit": "GiB per device", "devices": devices, "kind": kind, "device_gib": KINDS[kind][3],
            "dtype": str(dtype).split(".")[1], "batch": batch, "micro": micro, "accumulation": per_device // micro,
            "flops_per_image": flops / micro, "mfu": mfu, "images_per_second": speed,
            "steps": steps, "days": steps * batch / speed / 86400}


def print_plan(p, json_file=None):
    """The plan as a table for people, and where a file is named as JSON for programs."""
    if json_file:
        with open(json_file, "w") as f:
            json.dump(p, f, indent=1)
    counts, plural = p["parameters"], "s" * (p["devices"] > 1)
    print(f"{counts['total']:,} parameters, {counts['trainable']:,} trained; {p['steps']} steps of {p['batch']} images")
    print(f"{p['devices']} x {p['kind']} ({p['device_gib']} GiB), {p['dtype']}: "
          f"batch {p['batch']} = {p['micro']} micro x {p['accumulation']} accumulated x {p['devices']} device{plural}")
    columns = list(p["memory"]["fsdp"])
    print("GiB per device " + "".join(f"{part:>13}" for part in columns))
    for way, parts in p["memory"].items():
        fits = parts["total"] < 0.95 * p["device_gib"]
        verdict = "fits" if fits else "too much: lower --micro, or switch on --checkpointing"
        print(f"{way:>14} " + "".join(f"{parts.get(part, 0):13.2f}" for part in columns) + f"   {verdict}")
    print(f"{p['flops_per_image'] / 1e9:,.1f} GFLOP per image; {p['images_per_second']:,.0f} images/s and "
          + (f"{p['days']:.3g} days" if p["days"] >= 1 else f"{24 * p['days']:.3g} hours")
          + f" at {p['mfu']:.0%} of the peak rate, which is assumed (--mfu)")
