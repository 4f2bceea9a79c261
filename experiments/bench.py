"""
Kernels and models, beside every alternative: all that a GPU at hand is for.

    python -m experiments.bench kernels                     errors against float64; with a GPU also times
    python -m experiments.bench models [CONFIG/STAGE ...]   TFLOP, seconds and memory of a forward and a training step
    python -m experiments.bench sm90                        compiles for an H100, on any machine: registers, spills
    python -m experiments.bench plan|numbers|processes|small          whole runs: experiments/bench_runs.py
    python -m experiments.bench published                   PixArt-Sigma's and SDXL's own networks at their real sizes
    python -m experiments.bench loaders                     batches of images from files: experiments/bench_loaders.py
    python -m experiments.bench all [--minutes 25]          one after the other, whatever fails, and a report

Without a GPU the kernels run in Triton's interpreter: right, but slow. Where no model is named, it measures
PixArt-Sigma from 1K to 4K, base and huge on a GPU, and toy on a CPU. --minutes: start nothing new after them. --quick:
a little of each, which is what `all` does without a GPU. --json FILE: the figures; `all` writes FILE.md beside it.
"""
import contextlib
import functools
import gc
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import torch

if __name__ == "__main__":                 # read when Triton is imported, which parts of torch do: settle it now
    os.environ.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available() and "kernels" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"

import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels
from experiments.bench_loaders import compare_loaders
from experiments.bench_published import measure_published
from experiments.bench_report import write_report
from experiments.bench_runs import check_plan, compare_numbers, train_small, try_processes
from kernels import MERGE_EPS, example_call, kv_merge_reference, kv_merge_triton
from lib.conditions import count_columns
from lib.devices import enable_activation_checkpointing
from lib.files import atomic_write
from lib.plan import peak_rate, sgemm_rate
from lib.settings import Parser, UserError, load_config
from lib.triton_tools import INTERPRETED, NO_TRITON, relative_errors, run_with_gradients, tolerance, triton, worst
from model import build, checkpointed_modules, diffusion_loss, example, freeze_core

# in the order in which a GPU at hand is wanted, and how the time is shared out: by minutes on a GPU, and by the seconds
# that --quick takes on one core of a CPU. Who ends early leaves more to the rest
PARTS = {"kernels": (5, 6), "models": (5, 10), "processes": (1, 5), "plan": (3, 14), "numbers": (3, 17),
         "published": (1, 9), "loaders": (1, 8), "sm90": (1, 8), "small": (7, 23)}
GRACE = 60                                                          # seconds: a part that takes longer is ended


# ----------------------------------------------------------------------------------------------------------------------
# kernels: errors of outputs and gradients, each ||x - exact|| / ||exact||, against float64.

ERROR_CASES = [("attention", D, dict(Nq=100, Nk=77, H=3, kv_len=None)) for D in (8, 64, 72, 96, 128)] + [
    ("attention", 72, dict(Nq=64, Nk=128, kv_len=None)), ("attention", 72, dict(kv_len=(0, 50))),
    ("attention", 72, dict(mask=True)), ("attention", 20, dict(Nq=600, Nk=5, kv_len=None)),
    ("kv_merge", 1152, dict(ratio=2)), ("kv_merge", 768, dict(ratio=4)), ("kv_merge", 20, dict(ratio=3))]
QUICK_ERROR_CASES = [("attention", 20, dict(kv_len=(0, 50))), ("kv_merge", 20, dict(ratio=3))]


def check_errors(deadline, cases=ERROR_CASES):
    """Yields a row for each case and dtype: the largest relative error of a kernel, and of PyTorch on the same."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("the largest relative error of outputs and gradients, against float64" + ", interpreted" * INTERPRETED)
    for name, width, options in cases:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            if time.time() > deadline:
                raise TimeoutError("no time left for the other cases")
            kernel, twin, *call = example_call(name, width, dtype, device, **options)
            ours, theirs = relative_errors(kernel, twin, *call), relative_errors(twin, twin, *call)
            good = worst(ours) < tolerance(dtype)                   # False of NaN
            print(f"{name:9} {width:5} {str(dtype)[6:]:8}  ours {worst(ours):.1e}  torch {worst(theirs):.1e}  "
                  f"{'ok ' if good else 'BAD'} {options}", flush=True)
            yield dict(kernel=name, width=width, dtype=str(dtype)[6:], ours=worst(ours), torch=worst(theirs), good=good,
                       **options)


# ----------------------------------------------------------------------------------------------------------------------
# kernels: what each is for, in time. All times are of CUDA graphs, so they hold no Python and no launches; "bwd" is a
# forward and backward less a forward. The floor is the slower of two things that this GPU was just seen to do: its
# fastest matrix product at the operator's FLOPs, and its fastest copy at the operator's bytes.

ATTENTION_TIMES = (                        # B, H, Nq, Nk, D; the share of the keys that are real, if some are padding
    ("UViT 16 x 16, self", 64, 12, 256, 256, 64, None), ("UViT 32 x 32, self", 64, 12, 1024, 1024, 64, None),
    ("UViT 32 x 32, half-length text", 64, 12, 1024, 205, 64, 0.5),
    ("PixArt 1K, self", 4, 16, 4096, 4096, 72, None), ("PixArt 1K, self, merged by 2", 4, 16, 4096, 1024, 72, None),
    ("PixArt 1K, half-length text", 4, 16, 4096, 300, 72, 0.5), ("PixArt 2K, text", 1, 16, 16384, 300, 72, None),
    ("head dim 96", 4, 16, 4096, 4096, 96, None), ("head dim 128", 4, 16, 4096, 4096, 128, None))
MERGE_TIMES = (("PixArt 1K", 4, 64, 1152, 2), ("PixArt 2K", 1, 128, 1152, 4), ("UViT 32 x 32", 64, 32, 768, 2))


def compare_times(deadline):
    """Yields a row for each case and way to compute it: microseconds of a forward and a backward, or the problem."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192 ** 3 / time_call(lambda: a @ b)                # FLOP per second that this GPU can do
    big, copy = (torch.empty(2 ** 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    bandwidth = 2 * 2 ** 30 / time_call(lambda: copy.copy_(big))    # bytes per second, read or written
    print(f"matrix product {flops / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s")
    yield dict(matmul_tflops=flops / 1e12, copy_tb=bandwidth / 1e12)
    print(f"{'bfloat16, times in us':60} {'fwd':>9} {'/floor':>6} {'bwd':>11} {'/floor':>6}")
    for label, B, h, C, r in MERGE_TIMES:
        x = torch.randn(B, h * h, 3, C, device="cuda", dtype=torch.bfloat16)        # q, k and v of one projection
        params = [torch.full((C, 1, r, r), r ** -2.0), torch.zeros(C), torch.ones(C), torch.zeros(C)]
        inputs = [y.to(x).requires_grad_() for y in (x[:, :, 1], x[:, :, 2], *params)]
        moved = 2 * B * h * h * C * 2                               # bytes of k and v
        floors = moved * (1 + r ** -2) / bandwidth, moved * (2 + r ** -2) / bandwidth
        yield from race(f"merge {label}, r = {r}", merge_methods((h, h), r), inputs, floors, deadline)
    for label, B, H, Nq, Nk, D, share in ATTENTION_TIMES:
        x, y = (torch.randn(B, N, 3, H, D, device="cuda", dtype=torch.bfloat16) for N in (Nq, Nk))
        inputs = [z.requires_grad_() for z in (x[:, :, 0], y[:, :, 1], y[:, :, 2])]
        kv_len = None if share is None else torch.linspace(1, 2 * share * Nk - 1, B, device="cuda").round().int()
        keys = Nk * B if share is None else int(kv_len.sum())       # of all images
        work, moved = 4 * H * Nq * keys * D, 4 * H * D * (B * Nq + keys)            # FLOP; bytes of q, k, v and o
        # a backward has five products where a forward has two, and reads and writes everything twice
        floors = max(work / flops, moved / bandwidth), max(2.5 * work / flops, 2 * moved / bandwidth)
        yield from race(label, attention_methods(B, Nq, Nk, kv_len), inputs, floors, deadline)


def race(label, methods, inputs, floors, deadline):
    """Times every method on the same inputs, forward and backward. Yields a row for each, or the problem."""
    for name, function in methods.items():
        row = dict(case=label, method=name, floor_fwd_us=floors[0] * 1e6, floor_bwd_us=floors[1] * 1e6)
        try:
            if time.time() > deadline:
                raise TimeoutError("no time left")
            torch._dynamo.reset()                                   # or many shapes run into its recompile limit
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            upstream = [torch.randn_like(x) for x in outputs]       # gradients of the outputs
            fwd = time_call(lambda: function(*inputs))
            bwd = time_call(lambda: torch.autograd.grad(function(*inputs), inputs, upstream)) - fwd
            row |= dict(fwd_us=fwd * 1e6, bwd_us=bwd * 1e6)
            print(f"{label:32} {name:27} {fwd * 1e6:9.1f} {fwd / floors[0]:6.2f} {bwd * 1e6:11.1f} "
                  f"{bwd / floors[1]:6.2f}", flush=True)
        except Exception as problem:                                # a backend that refuses this case
            row["problem"] = describe(problem)
            print(f"{label:32} {name:27} {row['problem'][:60]}", flush=True)
        yield row


def time_call(function, replays=30):
    """Median time of a call in seconds, from a CUDA graph of several."""
    stream, start, end = torch.cuda.Stream(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):                                          # compiles, and lets cuDNN make its plans
            start.record()
            function()
            end.record()
    torch.cuda.synchronize()
    calls = max(1, min(20, int(2 / start.elapsed_time(end))))       # about 2 ms of work
    graph = torch.cuda.CUDAGraph()                                  # a recording that the GPU replays on its own
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    times = []
    for _ in range(replays):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / calls)        # milliseconds of several calls -> seconds of one
    return statistics.median(times)


def attention_methods(B, Nq, Nk, kv_len):
    """{name: function of q, k, v (B, N, H, D)}: our kernel, every backend of PyTorch's own attention, FlexAttention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    # what the others need to be told which keys are padding: a mask (B, 1, 1, Nk); blocks that may be skipped
    keep = None if kv_len is None else (torch.arange(Nk, device="cuda") < kv_len[:, None])[:, None, None, :]
    blocks = None if kv_len is None else create_block_mask(lambda b, h, q, k: k < kv_len[b], B, None, Nq, Nk)
    compiled = torch.compile(flex_attention, dynamic=False)

    def ours(q, k, v):
        return kernels.attention_triton(q, k, v, kv_len)

    def sdpa(q, k, v, backend):
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=keep)
        return o.transpose(1, 2)

    def flex(q, k, v):
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=blocks).transpose(1, 2)
    backends = {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    forced = {f"SDPA {name}": functools.partial(sdpa, backend=backend) for name, backend in backends.items()}
    return {"ours": ours, **forced, "FlexAttention compiled": flex}


def merge_methods(grid, r):
    """{name: function of k, v, weight, bias, gamma, beta}: our kernel, and what a user of PyTorch would write."""
    def ours(*inputs):
        return kv_merge_triton(*inputs, grid, r)

    def plain(*inputs):
        return kv_merge_reference(*inputs, grid, r)

    def channels_last(k, v, weight, *rest):
        weight = weight.contiguous(memory_format=torch.channels_last)
        return kv_merge_reference(k.contiguous(), v.contiguous(), weight, *rest, grid, r)

    def views(k, v, weight, bias, gamma, beta):                     # what a careful user would compile
        def merge(x):
            taps = weight.permute(1, 2, 3, 0).reshape(1, 1, r, 1, r, -1)           # (1, 1, r, 1, r, C)
            x = (x.unflatten(1, (grid[0] // r, r, grid[1] // r, r)) * taps).sum((2, 4)).flatten(1, 2) + bias
            return F.layer_norm(x, x.shape[-1:], gamma, beta, MERGE_EPS)
        return merge(k), merge(v)
    return {"ours": ours, "PixArt's operators": plain, "channels_last convolution": channels_last,
            "PixArt's, compiled": torch.compile(plain, dynamic=False),
            "multiply and sum, compiled": torch.compile(views, dynamic=False)}


# ----------------------------------------------------------------------------------------------------------------------
# models: size and speed of presets. As many images as fit; forward, backward, AdamW, with train.py's activation
# checkpointing. What a frozen core saves is grow over defrost.

GPU_MODELS = ["base/pretrain", "base/grow", "base/defrost", "huge/grow", "huge/defrost"]
GPU_MODELS += [f"pixart-sigma-{size}{kv}/defrost" for size in ("1k", "2k", "4k") for kv in ("", "-kv")]
CPU_MODELS = ["toy/pretrain", "toy/grow", "toy/defrost"]


def measure_models(deadline, names):
    """Yields a row for a forward and a row for a training step of each CONFIG/STAGE, or one with the problem."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in names or (GPU_MODELS if device == "cuda" else CPU_MODELS):
        try:
            yield from measure_largest(name, device, deadline)
        except Exception as problem:                                # too little memory, for instance: the next may fit
            print(f"{name:28} {describe(problem)[:90]}", flush=True)
            yield dict(model=name, problem=describe(problem))
        gc.collect()                                                # a model refers to itself
        torch.cuda.empty_cache()                                    # does nothing without a GPU


def measure_largest(name, device, deadline):
    """The rows of measure_model with 16 images at a time, or 4, or 1: the first number for which the GPU has memory."""
    for batch in (16, 4, 1) if device == "cuda" or name in CPU_MODELS else (1,):
        if time.time() > deadline:
            raise TimeoutError("no time left")
        try:
            return list(measure_model(name, device, batch))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        gc.collect()                                                # what the failed step still holds
        torch.cuda.empty_cache()


def measure_model(name, device, batch):
    """
    Yields a row for a forward and one for a training step, in bf16 on a GPU: parameters, TFLOP, seconds, peak memory,
    and the share of the device's rate, on a GPU by its data sheet, on a CPU by a 1024 x 1024 product.
    """
    config_name, _, stage = name.partition("/")
    config = load_config(config_name, stage or "pretrain")
    peak = peak_rate(torch.cuda.get_device_name(), torch.bfloat16, True) if device == "cuda" else sgemm_rate()
    with torch.device(device):
        model, (x, t, text) = build(config), example(config, batch)
        conditions = torch.zeros(batch, count_columns(config))
        t, text = t + 0.5, text + 1                                 # a caption of zeros has no tokens
    if stage == "grow":
        freeze_core(model)
    if config["checkpointing"]:
        enable_activation_checkpointing(checkpointed_modules(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    millions = sum(p.numel() for p in model.parameters()) / 1e6

    def step(training):
        """Seconds of a forward, or of a whole training step."""
        begin = time.perf_counter()
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = diffusion_loss(model, x, text, t, x, config, conditions).mean()
        if training:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()                                                 # waits for the device
        return time.perf_counter() - begin
    for training in (False, True):
        step(training)                                              # tries the kernels, makes the optimizer's state
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        # a frozen weight has no gradient to compute, and a checkpointed block runs twice: both show in the count
        with FlopCounterMode(display=False) as counter:
            step(training)
        seconds, tera = statistics.median(step(training) for _ in range(3)), counter.get_total_flops() / 1e12
        gib = torch.cuda.max_memory_allocated() / 2 ** 30 if device == "cuda" else None
        print(f"{name:28} {millions:8.1f}M  {'training step' if training else 'forward':13}  {tera:9.3g} TFLOP  "
              f"{seconds:9.4f} s  {tera / seconds:7.3g} TFLOP/s" + (f"  {gib:6.1f} GiB" if gib else ""), flush=True)
        yield dict(model=name, batch=batch, millions=millions, training=training, tflop=tera, seconds=seconds, gib=gib,
                   share_of_peak=peak and tera * 1e12 / seconds / peak)


# ----------------------------------------------------------------------------------------------------------------------
# sm90: what an H100 or H200 would run, compiled on any machine. Speed is lost without a word when registers spill to
# memory, when the matrix units (HGMMA) go unused, or when 16-bit elements are loaded one by one (LDG.U16). Kernels for
# float32 may spill 16 bytes: one of them, dK and dV at head dim 72, cannot be compiled with fewer.

SM90_CASES = [("attention", D, dtype, options) for D in (16, 64, 72, 96, 128) for dtype, options in (
    ("bfloat16", dict(Nq=256, Nk=256, kv_len=None)), ("bfloat16", dict(Nq=200, Nk=300)), ("bfloat16", dict(mask=True)),
    ("float16", dict(Nq=256, Nk=205, kv_len=None)), ("float32", dict(Nq=256, Nk=256, kv_len=None)),
    ("float32", dict()))]
SM90_CASES += [("kv_merge", 1152, dtype, dict(ratio=r)) for r in (2, 4) for dtype in ("bfloat16", "float32")]


def compile_for_sm90(deadline, cases=SM90_CASES):
    """Yields a row for each kernel that a forward and backward of each case would launch. Nothing runs."""
    from triton.backends.compiler import GPUTarget
    target = GPUTarget("cuda", 90, 32)                              # 90 is Hopper; 32 threads to a warp
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0))
    print("kernel, dtype, width, block, warps, stages, registers, spilled bytes, shared bytes, HGMMA, LDG.U16, LDGSTS, "
          "good")
    try:
        for name, width, dtype, options in cases:
            if time.time() > deadline:
                raise TimeoutError("no time left for the other cases")
            kernel, _, inputs, arguments = example_call(name, width, getattr(torch, dtype), "cpu", **options)
            rows = []                                               # operators run; what they launch is only compiled
            with mock.patch.object(kernels, "launch", functools.partial(compile_launch, rows)):
                run_with_gradients(kernel, inputs, arguments)
            yield from rows
    finally:
        triton.runtime.driver.set_active(None)                      # back to whatever there is


def compile_launch(rows, kernel, grid, *args, **options):
    """Stands for kernels.launch: compiles the kernel for these very arguments, and appends what came out to `rows`."""
    code = read_machine_code(kernel.warmup(*args, grid=grid, **options))
    half = args[0].dtype != torch.float32                           # 16 bits: what training runs in
    good = code["spill"] <= (0 if half else 16) and code["smem"] <= 227 * 1024 and not (half and code["ldg16"])
    good &= code["hgmma"] > 0 or "attention" not in kernel.__name__ or not half
    sizes = "x".join(str(options[key]) for key in ("BM", "BN", "BC", "R") if key in options)
    rows.append(dict(kernel=kernel.__name__, dtype=str(args[0].dtype)[6:],
                     width=options["D" if "D" in options else "C"], block=sizes,
                     warps=options["num_warps"], stages=options.get("num_stages"), **code, good=good))
    widths = 24, 9, 5, 8, 2, 4, 4, 5, 7, 4, 4, 4, 5
    print(" ".join(f"{value!s:>{width}}" for value, width in zip(rows[-1].values(), widths)), flush=True)


def read_machine_code(compiled):
    """What the compiler made of a kernel: resources, and counts of the instructions that decide its speed."""
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([f"{tools}/cuobjdump", "--dump-resource-usage", file.name], text=True)
        sass = subprocess.check_output([f"{tools}/nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    alone = len(re.findall(r"LDG[.\w]*\.U16", sass))
    counts = dict(hgmma=sass.count("HGMMA"), ldg16=alone, ldgsts=sass.count("LDGSTS"))
    return dict(regs=int(used["REG"]), spill=int(used["STACK"]), smem=compiled.metadata.shared, **counts)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

def describe(problem):
    """One line that says what was raised."""
    return f"{type(problem).__name__}: {str(problem).strip()[:200]}".splitlines()[0]


def about():
    """What a reader of the figures needs to get them again."""
    gpu = torch.cuda.is_available()
    return dict(command=" ".join(["python -m experiments.bench", *sys.argv[1:]]), date=time.strftime("%Y-%m-%d"),
                python=platform.python_version(), torch=torch.__version__, triton=getattr(triton, "__version__", None),
                cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version() if gpu else None,
                device=torch.cuda.get_device_name() if gpu else "cpu", threads=torch.get_num_threads())


def run_part(part, args, deadline):
    """Yields the rows of one part in this process."""
    runs = {"plan": check_plan, "numbers": compare_numbers, "processes": try_processes, "loaders": compare_loaders,
            "published": measure_published}
    if part in runs:
        yield from runs[part](deadline, args.quick)
    elif part == "small":
        yield from train_small(deadline, args.quick, args.out)
    elif part == "models":
        yield from measure_models(deadline, args.names)
    elif NO_TRITON:
        raise UserError(f"no Triton ({NO_TRITON}): pip install triton (Linux)")
    elif part == "sm90":
        yield from compile_for_sm90(deadline, SM90_CASES[7:8] if args.quick else SM90_CASES)
    else:
        yield from check_errors(deadline, QUICK_ERROR_CASES if args.quick else ERROR_CASES)
        if torch.cuda.is_available():
            yield from compare_times(deadline)


def run_all(args, deadline):
    """Yields the rows of all parts. Each is a process of its own, which may fail or hang, with a share of the time."""
    for i, part in enumerate(PARTS):
        left, shares = deadline - time.time(), [share[args.quick] for share in PARTS.values()][i:]
        if left < 1:
            yield dict(part=part, problem="no time left", good=False)
            continue
        seconds = left * shares[0] / sum(shares)
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "rows.json")
            print(f"\n{part}, for {seconds / 60:.1f} minutes", flush=True)
            # it stops by itself when its time is up, unless it hangs
            grace = GRACE / 4 if args.quick else GRACE
            problem = run_bounded(part_command(part, args, seconds, file), seconds + grace)
            try:
                rows = json.load(open(file))["rows"]
            except (OSError, ValueError, KeyError) as error:        # it gave none
                rows, problem = [], problem or describe(error)
        yield from (dict(part=part, **row) for row in rows)
        if problem:
            print(f"{part}: {problem}", flush=True)
            yield dict(part=part, problem=problem, good=False)


def part_command(part, args, seconds, file):
    """The words that run one part by itself; it leaves its rows in `file`."""
    names = args.names if part == "models" else ()
    return [sys.executable, "-m", "experiments.bench", part, *names, "--minutes", f"{seconds / 60:.2f}", "--json", file,
            "--out", args.out, f"--quick={args.quick}"]


def run_bounded(command, seconds):
    """What went wrong, or "": its exit status, or that it took longer. Whatever it has started ends with it."""
    process = subprocess.Popen(command, start_new_session=True)     # a group of its own: workers of workers too
    try:
        status = process.wait(seconds)
        return f"exit status {status}" * (status != 0)
    except subprocess.TimeoutExpired:
        return "it did not end in time"
    finally:                                                        # also where this process is interrupted
        with contextlib.suppress(ProcessLookupError):               # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main():
    parser = Parser(__doc__, keys=())
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("names", nargs="*", metavar="CONFIG/STAGE", help="models to measure")
    parser.add_argument("--minutes", type=float, default=25, help="start nothing new after them")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="a little of each")
    parser.add_argument("--out", default="out/bench", help="folder for the runs of small")
    args, _ = parser.parse_keys()
    if args.names and args.part not in ("models", "all"):
        raise UserError(f"{args.part} takes no {args.names[0]!r}: python -m experiments.bench models {args.names[0]}")
    if args.part == "all" and not torch.cuda.is_available():
        args.quick, args.minutes = True, min(args.minutes, 2.5)
    print(", ".join(f"{key} {value}" for key, value in about().items() if value), flush=True)
    deadline, rows, problem = time.time() + 60 * args.minutes, [], None
    try:
        for row in (run_all if args.part == "all" else functools.partial(run_part, args.part))(args, deadline):
            rows.append(row)
            if args.json:                                           # at once: what was measured outlives what fails
                text = json.dumps(dict(about(), rows=rows), indent=1, default=str)
                atomic_write(args.json, lambda file: file.write(text.encode()))
    except Exception as error:                                      # a sick GPU, say: what came before it counts
        problem = describe(error)
        print(problem)
    finally:
        if args.part == "all":
            write_report(dict(about(), rows=rows), args.json)
    bad = sum(not row.get("good", True) for row in rows)
    print(f"{len(rows)} cases, {bad} bad")
    sys.exit(1 if bad or problem else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # an exception: parts end, and the report comes
    main()
