"""
A network on its devices: in which precision it computes, and how several devices share it.
"""
import functools

import torch
from torch.utils.checkpoint import checkpoint

from lib.processes import fail, get_world_size, print0
from lib.settings import UserError
from lib.tables import DTYPES


def choose_dtype(name, device):
    """Of products: "fp32", "bf16", "fp16"; or "auto": bf16 on a GPU, fp16 on one that has no bf16, fp32 on a CPU."""
    cuda = device != "cpu"
    dtype = DTYPES.get(name, torch.bfloat16 if cuda else torch.float32)
    if dtype == torch.bfloat16 and cuda and torch.cuda.get_device_capability() < (8, 0):
        if name == "bf16":
            fail(f"{torch.cuda.get_device_name()} has no bfloat16: take --dtype fp16", 2)
        return torch.float16
    if dtype == torch.float16 and not cuda:
        print0("fp16 on a CPU is slow: for tests only")
    return dtype


def set_precision(config, device):
    """
    The dtype of products by the keys `dtype`, `tf32` and `fsdp` of a config; from here on a run repeats itself on a GPU
    too.
    """
    dtype = choose_dtype(config["dtype"], device)
    if dtype == torch.float16 and config["fsdp"]:
        raise UserError("dtype = fp16 with fsdp is not supported, for its scale would differ between devices: take "
                        "bf16")
    if dtype == torch.float32 and device != "cpu":
        torch.set_float32_matmul_precision("high" if config["tf32"] else "highest")
        print0("float32 products " + ("rounded to TF32 (10 bits): --tf32 False for all 23" if config["tf32"] else
                                      "exact"))
    torch.backends.cudnn.deterministic = True
    return dtype


def loss_scaler(dtype, device):
    """Scales losses, for fp16's range; of other dtypes it leaves all as it is."""
    return torch.amp.GradScaler(device.split(":")[0], enabled=dtype == torch.float16)


def in_half(net, dtype):
    """The network with its products in dtype. Autocast ends with each call, as does its cache of rounded weights."""
    def call(z, *args):
        with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32):
            return net(z, *args)
    return call


def in_dtype(model, config, dtype):
    """
    Sample in "bf16" or "fp16", or in float32, None: a published model and its encoders as a whole, of ours products;
    weights, norms and sums stay float32. An autoencoder stays in float32: SDXL's overflows.
    """
    config["dtype"] = dtype or "fp32"
    if config["pipeline"]:
        model.config["dtype"] = config["dtype"]                # two dicts, once flags have changed one
        model.to(DTYPES[config["dtype"]])
    elif dtype:
        model.forward = in_half(model.forward, DTYPES[dtype])


def enable_activation_checkpointing(modules):
    """These modules keep their inputs alone (Chen et al. 2016): less memory, a third more time."""
    for module in modules:                                     # replaced, not wrapped: parameters keep their names
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def spread(model, device, compiled=False, units=(), entries=(), reshard=False):
    """
    Put a model on the device. -> the network that training calls, with the same weights, compiled if that is asked for;
    its backward exchanges gradients with other processes. With `units`, modules of it from the inside out, it is cut
    into shards of these (FSDP); `entries`, [(module, name of a method)], are called from outside of a module's forward,
    and `reshard` lets go of the outermost unit's weights too after each pass, also after one without gradient.
    """
    if units:                                                  # shards of weights, gradients and moments
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        mesh = torch.distributed.init_device_mesh(device.split(":")[0], (get_world_size(),))
        for unit in units:                                     # whose weights are gathered where it is used
            fully_shard(unit, mesh=mesh, **{"reshard_after_forward": True} if reshard else {})
        for module, method in entries:
            register_fsdp_forward_method(module, method)
    model.to(device)                                           # under FSDP each process's shards
    net = torch.compile(model) if compiled else model          # names are those of `model`
    if get_world_size() > 1 and not units:
        net = torch.nn.parallel.DistributedDataParallel(net)   # frozen weights take no part in the exchange
    return net
