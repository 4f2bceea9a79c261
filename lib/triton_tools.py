"""
Triton, where there is one: what a kernel needs beside its own maths, and a trial that says whether it is right here.

    from lib.triton_tools import agrees, launch, tl, triton
    agrees("softmax, width 72", calls, torch.bfloat16, x.device, training=True)       prints its answer, and why

Without Triton, functions marked @triton.jit stay plain functions that nobody may call, and NO_TRITON is the reason.
"""
import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
    NO_TRITON = None
except Exception as problem:               # absent or broken
    triton, tl, NO_TRITON = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None), problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"        # Triton reads it when imported: kernels run on a CPU


# ---- launching a kernel ----------------------------------------------------------------------------------------------

def launch(kernel, grid, *args, **options):
    """Run a kernel on the device of its first argument: Triton takes the current one."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n):
    """The next one from n on, and at least 16: tiles are powers of two, and matrix units take no smaller ones."""
    return max(16, 1 << (n - 1).bit_length())


def ready(*tensors):
    """Kernels want rows without gaps, and Triton's interpreter has no bfloat16 arithmetic: there, float32 stands in."""
    tensors = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return [x.float() if INTERPRETED and x is not None and x.dtype == torch.bfloat16 else x for x in tensors]


def unit_strides(*tensors):
    """
    (unit, [all strides but the last of each tensor, in units of `unit` elements]). Where all rows start on multiples of
    8 elements the unit is 8, from which the compiler sees that it may read 8 at once. In a stride of 72 it does not.
    """
    steps = [x.stride()[:-1] for x in tensors]                 # in elements; the last is 1
    unit = 8 if all(step % 8 == 0 for x in steps for step in x) else 1
    return unit, [tuple(step // unit for step in x) for x in steps]


# ---- a trial against the plain twin: a GPU's name says little about what its compiler can do -------------------------

def agrees(label, calls, dtype, device, training):
    """
    Whether each of calls(), tuples (function, twin, inputs, options), is within the tolerance of `dtype`, forward and,
    for training, backward. Prints its answer and the reason after a label. Whatever is raised on the way means no.
    """
    try:
        if NO_TRITON:
            raise NO_TRITON                # the reason then says what is missing
        # whatever the caller has switched on: gradients must exist, and dtypes stay as they are
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            errors = [error for call in calls() for error in relative_errors(*call, training)]
        good = all(error < tolerance(dtype) for error in errors)                        # False where one is NaN
        reason = f"differs from float64 by {worst(errors):.1e}"
    except Exception as problem:           # a missing compiler, too little shared memory, an unknown GPU: never a crash
        good, reason = False, f"{type(problem).__name__}: {str(problem).strip()[:200]}"
    print(f"{label}: {'Triton' if good else 'PyTorch'} ({reason})", flush=True)
    return good


def worst(errors):
    """The largest, or NaN if there is one: max() would miss it."""
    return float(torch.tensor(errors).max())


def relative_errors(function, twin, inputs, options, training=True):
    """||x - exact|| / ||exact|| of each output and each gradient; exact is what the twin makes of them in float64."""
    exact = run_with_gradients(twin, [x.double() for x in inputs], options, training)   # of the same rounded numbers
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-6))
            for a, b in zip(run_with_gradients(function, inputs, options, training), exact)]


def run_with_gradients(function, inputs, options, training=True):
    """[*outputs, *gradients of the inputs] of a function, for some gradients of its outputs; or the outputs alone."""
    with torch.set_grad_enabled(training):
        inputs = [x.detach().requires_grad_(training) for x in inputs]
        outputs = function(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [seeded_randn(*x.shape, seed=9 + i).to(x) for i, x in enumerate(outputs)]        # dL/d(output)
        gradients = torch.autograd.grad(outputs, inputs, upstream) if training else ()
    return [x.detach() for x in (*outputs, *gradients)]


def seeded_randn(*shape, seed=0):
    """Normal numbers that float32, float16 and bfloat16 all hold exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def tolerance(dtype):
    """The largest relative error of a function that is right: a few roundings of the dtype."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" # see torch.set_float32_matmul_precision
    float32 = 2e-3 if tf32 else 1e-5
    return {torch.float64: 1e-12, torch.float32: float32, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
