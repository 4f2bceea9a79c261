"""
Attention for diffusion models, and the KV merge that makes it affordable at high resolution, as Triton kernels.

Attention. For every image and head, O = softmax(scale Q K^T) V. Written out, the Nq x Nk scores make four trips through
memory (write S, read S, write P, read P): 8 Nq Nk bytes per head in bf16, against 4 (Nq + Nk) D for Q, K, V and O. For
64 x 64 tokens and D = 72 that is 134 MB against 2.4 MB. The fused kernel never writes S: it walks over blocks of keys
and keeps, per query, the maximum so far m, the sum l of exp(S - m), and the output so far, which shrinks by
exp(m_old - m_new) whenever the maximum grows (FlashAttention, Dao et al. 2022). It leaves L = m + log l, one number per
query, from which the backward recomputes P = exp(S - L). With dP = dO V^T and delta = rowsum(O dO),
    dS = P (dP - delta),    dV = P^T dO,    dQ = scale dS K,    dK = scale dS^T Q.

KV merge (PixArt-Sigma, Sec. 3.3). Neighbouring tokens of a picture say nearly the same, so K and V are shrunk by a
depthwise r x r convolution of stride r and a LayerNorm, both shared by K and V, while Q keeps every token: attention
costs r^2 times less. As separate operators (copy, convolution, norm, for K and for V) that moves about 7.5 N C elements
at r = 2; in one pass 2.5 N C, each byte once.

What one would call instead: F.scaled_dot_product_attention, FlexAttention, F.conv2d and F.layer_norm. The kernels add
head dims that are no power of two without padding to the next one (72 costs 80 columns, not 128), captions whose padding
is skipped rather than masked, exact zeros where nothing may be attended, and gradients that repeat bit for bit. Numbers
differ by rounding only: scores and sums are float32, P and dS are rounded to the inputs' precision before a matrix
product (as FlashAttention does), and float32 goes through three TF32 products that together restore its precision.

Letters: B images, H heads, Nq queries, Nk keys, D head dim, C channels, N = h w tokens; a block is BM queries, BN keys.

    python kernels.py check [--json FILE]      errors against float64; without a GPU in Triton's interpreter
    python kernels.py check --sm90             compiles for an H100 or H200, on any machine: registers, spills
    python kernels.py bench [--json FILE]      times beside every alternative in PyTorch; needs a GPU and under 8 minutes
"""
import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import torch

if __name__ == "__main__":                 # Triton reads this while it is imported, which parts of torch do: settle it now
    os.environ.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available() and "--sm90" not in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"

import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula
try:
    import triton
    import triton.language as tl
    NO_TRITON = None
except Exception as problem:               # absent or broken: the kernels below stay plain functions that nobody calls
    triton, tl, NO_TRITON = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None), problem

backend = "auto"                           # "auto": Triton on a GPU where it passes a trial; "triton", "torch": forced
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS = 1e-5                                 # of the LayerNorm in the KV merge
PROGRAMS = 264                             # enough to fill a GPU: two for each multiprocessor of an H100

# Block sizes: (BM, BN, warps, pipeline stages) by kernel and bytes per element, for heads of up to 64, 80, 96 and 128
# columns. On an H100 none of them spills a register (`check --sm90`), which is why float32 has small ones.
WIDTHS = (64, 80, 96, 128)
CONFIGS = {
    ("forward", 2): ((128, 64, 4, 3), (128, 64, 4, 2), (128, 128, 8, 2), (128, 64, 8, 3)),
    ("masked", 2):  ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("dq", 2):      ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    ("dkdv", 2):    ((64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2)),
    ("forward", 4): ((64, 32, 4, 2), (64, 16, 4, 2), (64, 16, 4, 2), (16, 16, 4, 1)),
    ("masked", 4):  ((64, 32, 4, 2), (64, 16, 4, 2), (64, 16, 4, 2), (16, 16, 4, 1)),
    ("dq", 4):      ((64, 32, 4, 2), (64, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    ("dkdv", 4):    ((16, 64, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}


# ----------------------------------------------------------------------------------------------------------------------
# Attention: the pieces that the three kernels share.
#
# A head of 72 columns is held as two tiles, x0 of 64 and x1 of 16 (8 of them padding); one of 64 or 128 as a single
# tile, and then D1 = 0 and x1 is a second name for x0 that nobody reads. Names in capitals are known to the compiler.

@triton.jit
def locate(N, H, BLOCK: tl.constexpr):
    """Which block of rows, image and head is this program's? Neighbours share a head, so its K and V stay in cache."""
    blocks = tl.cdiv(N, BLOCK)                                      # of one head
    pid = tl.program_id(0)                                          # a 1-D grid: the other axes end at 65535
    start, head = pid % blocks * BLOCK, pid // blocks
    return start.to(tl.int64), (head // H).to(tl.int64), (head % H).to(tl.int64)    # offsets pass 2^31 in large batches


@triton.jit
def load_tile(x, stride, n, ROWS: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr, D: tl.constexpr,
              FULL: tl.constexpr):
    """Columns FIRST to FIRST + COLS of ROWS rows. Rows from n on and columns from D on read as zero."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = FIRST + tl.arange(0, COLS)[None, :]
    at = x + rows * stride + cols
    if FULL and FIRST + COLS <= D:                                  # no predicates where none are needed
        tile = tl.load(at)
    elif FULL:
        tile = tl.load(at, mask=cols < D, other=0.0)
    else:
        tile = tl.load(at, mask=(rows < n) & (cols < D), other=0.0)
    return tile                                                     # (ROWS, COLS)


@triton.jit
def load(x, stride, n, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FULL: tl.constexpr):
    """ROWS rows of a head, as two tiles."""
    x0 = load_tile(x, stride, n, ROWS, 0, D0, D, FULL)              # (ROWS, D0)
    x1 = x0
    if D1 > 0:
        x1 = load_tile(x, stride, n, ROWS, D0, D1, D, FULL)         # (ROWS, D1)
    return x0, x1


@triton.jit
def store(x, x0, x1, stride, n, ROWS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, D0)[None, :]
    tl.store(x + rows * stride + cols, x0.to(x.dtype.element_ty), mask=(rows < n) & (cols < D))
    if D1 > 0:
        cols = D0 + tl.arange(0, D1)[None, :]
        tl.store(x + rows * stride + cols, x1.to(x.dtype.element_ty), mask=(rows < n) & (cols < D))


@triton.jit
def inner(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """A B^T over the columns of both tiles: a dot product for every pair of rows."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION, out_dtype=ACC)          # over the first tile
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION, out_dtype=ACC)   # and the second
    return s                                                        # (rows of a, rows of b)


@triton.jit
def add_product(x0, x1, p, b0, b1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """X + P B, with P rounded to the precision of B: that is what the matrix units take."""
    p = p.to(b0.dtype)
    x0 = tl.dot(p, b0, x0, input_precision=PRECISION, out_dtype=ACC)
    if D1 > 0:
        x1 = tl.dot(p, b1, x1, input_precision=PRECISION, out_dtype=ACC)
    return x0, x1


@triton.jit
def zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ACC: tl.constexpr):
    x0 = tl.zeros((ROWS, D0), ACC)                                  # (ROWS, D0)
    x1 = x0
    if D1 > 0:
        x1 = tl.zeros((ROWS, D1), ACC)                              # (ROWS, D1)
    return x0, x1


@triton.jit
def key_count(kv_len, b, Nk):
    """How many keys image b has."""
    end = Nk                                                        # all of them, if nothing else is said
    if kv_len is not None:
        end = tl.minimum(tl.maximum(tl.load(kv_len + b), 0), Nk)
    return end


@triton.jit
def attended(mask, keys, end):
    """Which of these keys count: those before the end that the mask, if there is one, lets through."""
    keep = keys < end                                               # (BN,)
    if mask is not None:
        keep = keep & (tl.load(mask + keys, mask=keep, other=0) != 0)
    return keep


# ----------------------------------------------------------------------------------------------------------------------
# Attention, forward. One program: BM queries of one head, all keys in steps of BN.
#
# Every kernel runs its loop in two copies: first over the full blocks, where nothing needs a mask, then over what is
# left. The copy that cannot be reached (TAIL = 0, or a mask that leaves no block unmasked) is never compiled.
# Strides come as (image, token, head) in units of UNIT elements. With UNIT = 8 the compiler knows that rows start on 16
# bytes and loads 8 elements at once; a head of 72 columns, as a plain stride, would be loaded one element at a time.

@triton.jit
def attention_forward(q, k, v, o, lse, kv_len, mask, H, Nq, Nk, q_stride, k_stride, v_stride,
                      D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, SCALE2: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    start, b, h = locate(Nq, H, BM)
    left = (Nq - start).to(tl.int32)                                # queries from here on; the last block may be ragged
    q += (b * q_stride[0] + start * q_stride[1] + h * q_stride[2]) * UNIT       # this block's first query
    k += (b * k_stride[0] + h * k_stride[2]) * UNIT                 # this head's first key
    v += (b * v_stride[0] + h * v_stride[2]) * UNIT                 # and value
    if mask is not None:
        mask += b * Nk
    end = key_count(kv_len, b, Nk)
    full = end // BN * BN if mask is None else 0                    # how far no key needs a mask

    q0, q1 = load(q, q_stride[1] * UNIT, left, BM, D, D0, D1, False)                # (BM, D0), (BM, D1)
    o0, o1 = zeros(BM, D0, D1, ACC)                                                 # the same
    m = tl.full((BM,), -1e30, ACC)                                  # finite: -inf - -inf would be NaN
    l = tl.zeros((BM,), ACC)
    for PART in tl.static_range(0 if mask is None else 1, 1 + TAIL):
        lo = 0 if PART == 0 else full
        hi = full if PART == 0 else end
        for n in range(lo, hi, BN):
            k0, k1 = load(k, k_stride[1] * UNIT, hi - n, BN, D, D0, D1, PART == 0)  # (BN, D0), (BN, D1)
            s = inner(q0, q1, k0, k1, D1, ACC, PRECISION)                           # (BM, BN)
            if PART == 1:
                s = tl.where(attended(mask, n + tl.arange(0, BN), end)[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * SCALE2)                            # base 2: exp2 is one instruction
            p = tl.exp2(s * SCALE2 - m_new[:, None])                                # (BM, BN)
            shrink = tl.exp2(m - m_new)                                             # (BM,)
            l = l * shrink + tl.sum(p, 1)                                           # (BM,)
            o0 = o0 * shrink[:, None]                                               # (BM, D0)
            if D1 > 0:
                o1 = o1 * shrink[:, None]
            v0, v1 = load(v, v_stride[1] * UNIT, hi - n, BN, D, D0, D1, PART == 0)  # the same
            o0, o1 = add_product(o0, o1, p, v0, v1, D1, ACC, PRECISION)             # + P V
            m = m_new
            k += BN * k_stride[1] * UNIT                                            # on to the next block of keys
            v += BN * v_stride[1] * UNIT

    # A query without keys has l = 0. Its output is 0, and L = +inf makes P = exp2(S - L) = 0 in the backward.
    found = l > 0
    l = tl.where(found, l, 1)
    r = 1 / l[:, None]
    store(o + ((b * Nq + start) * H + h) * D, o0 * r, o1 * r, H * D, left, BM, D, D0, D1)
    rows = tl.arange(0, BM)                                         # (BM,)
    tl.store(lse + (b * H + h) * Nq + start + rows, tl.where(found, m + tl.log2(l), float("inf")), mask=rows < left)


# ----------------------------------------------------------------------------------------------------------------------
# Attention, backward: two kernels, each owning the rows that it writes, so that nothing is added up by atomics and two
# runs agree bit for bit. The price is that both recompute P: seven matrix products where one kernel would need five.

@triton.jit
def attention_backward_dq(q, k, v, o, do, lse, delta, dq, kv_len, mask, H, Nq, Nk,
                          q_stride, k_stride, v_stride, do_stride,
                          D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
                          SCALE: tl.constexpr, SCALE2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                          TAIL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """One program: dQ for BM queries of one head, over all keys. Leaves delta behind for the next kernel."""
    start, b, h = locate(Nq, H, BM)
    left = (Nq - start).to(tl.int32)                                # queries from here on
    q += (b * q_stride[0] + start * q_stride[1] + h * q_stride[2]) * UNIT       # this block's first query
    k += (b * k_stride[0] + h * k_stride[2]) * UNIT                 # this head's first key
    v += (b * v_stride[0] + h * v_stride[2]) * UNIT                 # and value
    do += (b * do_stride[0] + start * do_stride[1] + h * do_stride[2]) * UNIT   # dO, in the layout that autograd gives
    if mask is not None:
        mask += b * Nk
    end = key_count(kv_len, b, Nk)
    full = end // BN * BN if mask is None else 0                    # how far no key needs a mask
    row = (b * H + h) * Nq + start                                  # of lse and delta
    rows = tl.arange(0, BM)                                         # (BM,)
    offset = ((b * Nq + start) * H + h) * D                         # of o and dq

    do0, do1 = load(do, do_stride[1] * UNIT, left, BM, D, D0, D1, False)            # (BM, D0), (BM, D1)
    o0, o1 = load(o + offset, H * D, left, BM, D, D0, D1, False)                    # the same
    d = tl.sum(o0.to(ACC) * do0.to(ACC), 1)                                         # (BM,)
    if D1 > 0:
        d += tl.sum(o1.to(ACC) * do1.to(ACC), 1)                                    # delta
    tl.store(delta + row + rows, d, mask=rows < left)
    L = tl.load(lse + row + rows, mask=rows < left, other=float("inf"))             # (BM,)

    q0, q1 = load(q, q_stride[1] * UNIT, left, BM, D, D0, D1, False)                # (BM, D0), (BM, D1)
    dq0, dq1 = zeros(BM, D0, D1, ACC)                                               # the same
    for PART in tl.static_range(0 if mask is None else 1, 1 + TAIL):
        lo = 0 if PART == 0 else full
        hi = full if PART == 0 else end
        for n in range(lo, hi, BN):
            k0, k1 = load(k, k_stride[1] * UNIT, hi - n, BN, D, D0, D1, PART == 0)  # (BN, D0), (BN, D1)
            v0, v1 = load(v, v_stride[1] * UNIT, hi - n, BN, D, D0, D1, PART == 0)  # the same
            s = inner(q0, q1, k0, k1, D1, ACC, PRECISION)                           # (BM, BN)
            if PART == 1:
                s = tl.where(attended(mask, n + tl.arange(0, BN), end)[None, :], s, float("-inf"))
            p = tl.exp2(s * SCALE2 - L[:, None])                                    # (BM, BN), at once normalised
            ds = p * (inner(do0, do1, v0, v1, D1, ACC, PRECISION) - d[:, None])     # dP - delta
            dq0, dq1 = add_product(dq0, dq1, ds, k0, k1, D1, ACC, PRECISION)        # + dS K
            k += BN * k_stride[1] * UNIT                                            # on to the next block of keys
            v += BN * v_stride[1] * UNIT
    store(dq + offset, dq0 * SCALE, dq1 * SCALE, H * D, left, BM, D, D0, D1)


@triton.jit
def attention_backward_dkdv(q, k, v, do, lse, delta, dk, dv, kv_len, mask, B, H, Nq, Nk, chunk,
                            q_stride, k_stride, v_stride, do_stride,
                            D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
                            SCALE: tl.constexpr, SCALE2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                            TAIL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """One program: dK and dV for BN keys of one head, over one chunk of the queries."""
    start, b, h = locate(Nk, H, BN)
    left = (Nk - start).to(tl.int32)                                # keys from here on
    part = tl.program_id(1)                                         # which chunk of queries
    lo = part * chunk                                               # its first query
    hi = tl.minimum(lo + chunk, Nq)                                 # and the end of it
    end = key_count(kv_len, b, Nk)
    if kv_len is not None:
        hi = tl.where(start < end, hi, lo)                          # a block behind the last key has nothing to do
    full = lo + (hi - lo) // BM * BM                                # how far the blocks are whole
    if mask is not None:
        mask += b * Nk
    q += (b * q_stride[0] + lo.to(tl.int64) * q_stride[1] + h * q_stride[2]) * UNIT
    k += (b * k_stride[0] + start * k_stride[1] + h * k_stride[2]) * UNIT
    v += (b * v_stride[0] + start * v_stride[1] + h * v_stride[2]) * UNIT
    do += (b * do_stride[0] + lo.to(tl.int64) * do_stride[1] + h * do_stride[2]) * UNIT
    lse += (b * H + h) * Nq                                         # (B, H, Nq), as delta is
    delta += (b * H + h) * Nq

    k0, k1 = load(k, k_stride[1] * UNIT, left, BN, D, D0, D1, False)                # (BN, D0), (BN, D1)
    v0, v1 = load(v, v_stride[1] * UNIT, left, BN, D, D0, D1, False)                # the same
    dk0, dk1 = zeros(BN, D0, D1, ACC)                                               # the same
    dv0, dv1 = zeros(BN, D0, D1, ACC)                                               # the same
    for PART in tl.static_range(0, 1 + TAIL):
        for m in range(lo if PART == 0 else full, full if PART == 0 else hi, BM):
            q0, q1 = load(q, q_stride[1] * UNIT, hi - m, BM, D, D0, D1, PART == 0)  # (BM, D0), (BM, D1)
            rows = m + tl.arange(0, BM)                                             # (BM,)
            if PART == 0:
                L = tl.load(lse + rows)                                             # (BM,)
                d = tl.load(delta + rows)
            else:
                L = tl.load(lse + rows, mask=rows < hi, other=float("inf"))         # P = 0 where there is no query
                d = tl.load(delta + rows, mask=rows < hi, other=0.0)
            p = tl.exp2(inner(k0, k1, q0, q1, D1, ACC, PRECISION) * SCALE2 - L[None, :])    # (BN, BM): transposed
            do0, do1 = load(do, do_stride[1] * UNIT, hi - m, BM, D, D0, D1, PART == 0)  # (BM, D0), (BM, D1)
            dv0, dv1 = add_product(dv0, dv1, p, do0, do1, D1, ACC, PRECISION)       # + P^T dO
            ds = p * (inner(v0, v1, do0, do1, D1, ACC, PRECISION) - d[None, :])     # dP - delta
            dk0, dk1 = add_product(dk0, dk1, ds, q0, q1, D1, ACC, PRECISION)        # + dS^T Q
            q += BM * q_stride[1] * UNIT                                            # on to the next block of queries
            do += BM * do_stride[1] * UNIT

    # The loop ignored which keys count: a key that does not only spoils its own row, which is cleared here.
    keep = attended(mask, start + tl.arange(0, BN), end)[:, None]                   # (BN, 1)
    offset = (((part * B + b) * Nk + start) * H + h) * D                            # of dk and dv: (chunks, B, Nk, H, D)
    store(dv + offset, tl.where(keep, dv0, 0.0), tl.where(keep, dv1, 0.0), H * D, left, BN, D, D0, D1)
    store(dk + offset, tl.where(keep, dk0 * SCALE, 0.0), tl.where(keep, dk1 * SCALE, 0.0), H * D, left, BN, D, D0, D1)


# ----------------------------------------------------------------------------------------------------------------------
# Attention as an operator that autograd, torch.compile and the FLOP counter know.

def launch(kernel, grid, *args, **options):
    with torch.cuda.device_of(args[0]):                             # Triton launches on the current device
        kernel[grid](*args, **options)


def cdiv(a, b):
    return -(-a // b)


def power_of_two(n):
    return max(16, 1 << (n - 1).bit_length())                       # matrix units take no less than 16


def tiles(D):
    """Widths of the two tiles that hold D columns; the second is 0 where a single one is as narrow."""
    whole = power_of_two(D)
    first = max(16, whole // 2)                                     # 64 of 72, 64 of 96
    second = power_of_two(D - first) if D > first else 0            # 16, 32
    return (first, second) if first + second < whole else (whole, 0)


def ready(*tensors):
    """Kernels want rows without gaps, and Triton's interpreter has no bfloat16 arithmetic: there, float32 stands in."""
    tensors = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return [x.float() if INTERPRETED and x is not None and x.dtype == torch.bfloat16 else x for x in tensors]


def strides(*tensors):
    """UNIT, and each tensor's strides in units. Rows that start on multiples of 8 elements can be read 8 at a time."""
    steps = [x.stride()[:-1] for x in tensors]
    unit = 8 if all(step % 8 == 0 for x in steps for step in x) else 1
    return unit, [tuple(step // unit for step in x) for x in steps]


def compile_time(name, q, unit):
    """The arguments of a kernel that are known to the compiler."""
    D, size = q.shape[-1], 2 if INTERPRETED else q.element_size()   # the interpreter likes large blocks
    D0, D1 = tiles(D)
    if D > WIDTHS[-1] or (name, size) not in CONFIGS:
        raise ValueError(f"no kernel for head dim {D} in {q.dtype}: use backend = 'auto' or 'torch'")
    BM, BN, warps, stages = CONFIGS[name, size][[D0 + D1 <= width for width in WIDTHS].index(True)]
    tf32 = size == 2 or torch.backends.cuda.matmul.fp32_precision == "tf32"     # see torch.set_float32_matmul_precision
    return dict(D=D, D0=D0, D1=D1, UNIT=unit, BM=BM, BN=BN, num_warps=warps, num_stages=stages,
                ACC=tl.float64 if q.dtype == torch.float64 else tl.float32, PRECISION="tf32" if tf32 else "tf32x3")


@torch.library.custom_op("nanovermeer::attention", mutates_args=(), schema=
    "(Tensor q, Tensor k, Tensor v, Tensor? kv_len, Tensor? mask, float scale) -> (Tensor, Tensor)")
def attention_op(q, k, v, kv_len, mask, scale):
    dtype = q.dtype
    q, k, v = ready(q, k, v)
    (B, Nq, H, D), Nk = q.shape, k.shape[1]
    o, lse = q.new_empty(B, Nq, H, D), q.new_empty(B, H, Nq, dtype=torch.promote_types(q.dtype, torch.float32))
    unit, steps = strides(q, k, v)                                  # (image, token, head) of each
    options = compile_time("forward" if mask is None else "masked", q, unit)
    tail = kv_len is not None or mask is not None or Nk % options["BN"] > 0         # is there a block to be masked?
    launch(attention_forward, (cdiv(Nq, options["BM"]) * B * H,), q, k, v, o, lse, kv_len, mask, H, Nq, Nk, *steps,
           SCALE2=scale * math.log2(math.e), TAIL=int(tail), **options)
    return o.to(dtype), lse                                         # lse is L in base 2


@torch.library.custom_op("nanovermeer::attention_backward", mutates_args=(), schema=
    "(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, Tensor? kv_len, Tensor? mask, float scale)"
    " -> (Tensor, Tensor, Tensor)")
def attention_backward_op(q, k, v, o, lse, do, kv_len, mask, scale):
    dtype = q.dtype
    q, k, v, o, do = ready(q, k, v, o, do)
    (B, Nq, H, D), Nk = q.shape, k.shape[1]
    delta, dq = torch.empty_like(lse), q.new_empty(B, Nq, H, D)     # delta is (B, H, Nq)
    scales = dict(SCALE=scale, SCALE2=scale * math.log2(math.e))
    unit, steps = strides(q, k, v, do)
    options = compile_time("dq", q, unit)
    tail = kv_len is not None or mask is not None or Nk % options["BN"] > 0         # is there a block to be masked?
    launch(attention_backward_dq, (cdiv(Nq, options["BM"]) * B * H,), q, k, v, o, do, lse, delta, dq, kv_len, mask,
           H, Nq, Nk, *steps, TAIL=int(tail), **scales, **options)

    # The few keys of a caption make few programs: then each takes only a chunk of the queries, and the sums are added.
    options = compile_time("dkdv", q, unit)
    programs, blocks = cdiv(Nk, options["BN"]) * B * H, cdiv(Nq, options["BM"])         # of keys; of queries
    chunks = max(1, min(cdiv(PROGRAMS, max(1, programs)), blocks // 8))
    dk, dv = (k.new_empty(chunks, B, Nk, H, D, dtype=k.dtype if chunks == 1 else lse.dtype) for _ in range(2))
    launch(attention_backward_dkdv, (programs, chunks), q, k, v, do, lse, delta, dk, dv, kv_len, mask, B, H, Nq, Nk,
           cdiv(blocks, chunks) * options["BM"], *steps, TAIL=int(Nq % options["BM"] > 0), **scales, **options)
    dk, dv = (x[0] if chunks == 1 else x.sum(0) for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@attention_op.register_fake
def _(q, k, v, kv_len, mask, scale):
    B, Nq, H, D = q.shape
    return q.new_empty(B, Nq, H, D), q.new_empty(B, H, Nq, dtype=torch.promote_types(q.dtype, torch.float32))


@attention_backward_op.register_fake
def _(q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def attention_setup(ctx, inputs, output):
    q, k, v, kv_len, mask, ctx.scale = inputs                       # output is (o, lse)
    ctx.save_for_backward(q, k, v, *output, kv_len, mask)


def attention_autograd(ctx, do, _):
    return *attention_backward_op(*ctx.saved_tensors[:5], do, *ctx.saved_tensors[5:], ctx.scale), None, None, None


def attention_flops(q, k, v, *_, products=2, **__):                 # the products that the maths needs: S = Q K^T, O = P V
    return products * 2 * math.prod(q) * k[1]


attention_op.register_autograd(attention_autograd, setup_context=attention_setup)
register_flop_formula(torch.ops.nanovermeer.attention)(attention_flops)
register_flop_formula(torch.ops.nanovermeer.attention_backward)(lambda *shapes, **_: attention_flops(*shapes, products=5))

# PyTorch counts its own attention on a GPU but not on a CPU, where it is our fallback. Shapes here are (B, H, N, D).
on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
register_flop_formula(on_cpu[0])(lambda q, k, *_, **__: 2 * 2 * math.prod(q) * k[2])
register_flop_formula(on_cpu[1])(lambda do, q, k, *_, **__: 5 * 2 * math.prod(q) * k[2])


def attention(q, k, v, kv_len=None, mask=None, scale=None):
    """
    softmax(scale Q K^T) V for q (B, Nq, H, D) and k, v (B, Nk, H, D) of any strides; scale is 1 / sqrt(D) if not given.
    kv_len (B,) says how many keys each image has; the others cost nothing. mask (B, Nk) is True where a key counts, in
    any pattern. A query without keys gets exact zeros, forward and backward.
    """
    path = attention_triton if use_kernel("attention", q, q.shape[-1]) else attention_reference
    return path(q, k, v, kv_len, mask, scale)                       # (B, Nq, H, D)


def attention_triton(q, k, v, kv_len=None, mask=None, scale=None):
    if torch.is_autocast_enabled(q.device.type):                    # an operator of our own is not on autocast's list
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"attention needs a positive scale, not {scale}: put the sign into q")
    kv_len = kv_len if kv_len is None else kv_len.to(torch.int32)
    mask = mask if mask is None else mask.contiguous()
    return torch.ops.nanovermeer.attention(q, k, v, kv_len, mask, scale)[0]


def attention_reference(q, k, v, kv_len=None, mask=None, scale=None):
    """The same in plain PyTorch, whose own fused attention is the fastest thing on a CPU."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                   # (B, H, N, D)
    if kv_len is None and mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)     # (B, Nq, H, D)
    if kv_len is not None:
        within = torch.arange(k.shape[2], device=k.device) < kv_len[:, None]            # (B, Nk)
        mask = within if mask is None else within & mask
    none = ~mask.any(1)                                                                 # (B,) an image without any key
    mask = (mask | none[:, None])[:, None, None, :]                                     # (B, 1, 1, Nk) attends to all,
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    return o.masked_fill(none[:, None, None, None], 0)                                  # which is then thrown away


# ----------------------------------------------------------------------------------------------------------------------
# KV merge, forward. One program: one merged token, all channels, K and V. Every byte of K and V is read once.

@triton.jit
def layer_norm(x, gamma, beta, keep, C, eps):
    mean = tl.sum(x, 0) / C                                         # over the channels; x is 0 beyond C
    centred = tl.where(keep, x - mean, 0.0)
    return centred / tl.sqrt(tl.sum(centred * centred, 0) / C + eps) * gamma + beta


@triton.jit
def kv_merge_forward(k, v, weight, bias, gamma, beta, k_out, v_out, k_sum, v_sum, h, w, k_stride, v_stride,
                     C: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr, EPS: tl.constexpr,
                     ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)                             # merged token y, x of image b
    b, token = row // (h // R * (w // R)), row % (h // R * (w // R))
    y, x = token // (w // R), token % (w // R)                      # its place in the merged grid
    c = tl.arange(0, BC)                                            # (BC,) all channels, BC >= C
    keep = c < C
    ks = tl.load(bias + c, mask=keep, other=0.0)                    # (BC,)
    vs = ks                                                         # both sums start from the bias
    for tap in tl.static_range(R * R):                              # the r x r tokens that become one
        n = (y * R + tap // R) * w + x * R + tap % R
        t = tl.load(weight + tap * C + c, mask=keep, other=0.0)     # weight is (r^2, C)
        ks += t * tl.load(k + (b * k_stride[0] + n * k_stride[1]) * UNIT + c, mask=keep, other=0.0).to(ACC)
        vs += t * tl.load(v + (b * v_stride[0] + n * v_stride[1]) * UNIT + c, mask=keep, other=0.0).to(ACC)
    if k_sum is not None:                                           # kept for the backward
        tl.store(k_sum + row * C + c, ks.to(k_sum.dtype.element_ty), mask=keep)
        tl.store(v_sum + row * C + c, vs.to(k_sum.dtype.element_ty), mask=keep)
    if gamma is not None:
        g, o = tl.load(gamma + c, mask=keep, other=0.0), tl.load(beta + c, mask=keep, other=0.0)
        ks, vs = layer_norm(ks, g, o, keep, C, EPS), layer_norm(vs, g, o, keep, C, EPS)
    tl.store(k_out + row * C + c, ks.to(k_out.dtype.element_ty), mask=keep)
    tl.store(v_out + row * C + c, vs.to(k_out.dtype.element_ty), mask=keep)


# KV merge, backward, in two kernels: through the norm, row by row, then through the convolution, channels in blocks and
# one program per tap, so that whatever r is, a program holds one slice of dW. Sums over rows leave each program as a
# partial sum in float32 and are added by torch: no atomics, the same bits every time.

@triton.jit
def kv_merge_backward_norm(k_sum, v_sum, dk_out, dv_out, gamma, dk_sum, dv_sum, dgamma, dbeta, rows,
                           C: tl.constexpr, BC: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """One program: every so many-th merged token, K and V."""
    pid = tl.program_id(0)
    c = tl.arange(0, BC)                                            # (BC,) all channels, BC >= C
    keep = c < C
    g = tl.load(gamma + c, mask=keep, other=0.0)
    dg, db = tl.zeros((BC,), ACC), tl.zeros((BC,), ACC)             # (BC,)
    for row in range(pid, rows, tl.num_programs(0)):
        for V in tl.static_range(2):
            at = row * C + c
            x = tl.load((v_sum if V else k_sum) + at, mask=keep, other=0.0).to(ACC)         # (BC,)
            dy = tl.load((dv_out if V else dk_out) + at, mask=keep, other=0.0).to(ACC)
            centred = tl.where(keep, x - tl.sum(x, 0) / C, 0.0)
            r = 1 / tl.sqrt(tl.sum(centred * centred, 0) / C + EPS)
            xhat = centred * r                                      # y = xhat gamma + beta
            dxhat = dy * g                                          # (BC,)
            dx = r * (dxhat - tl.sum(dxhat, 0) / C - xhat * tl.sum(dxhat * xhat, 0) / C)
            tl.store((dv_sum if V else dk_sum) + at, dx.to(dk_sum.dtype.element_ty), mask=keep)
            dg += dy * xhat
            db += dy
    tl.store(dgamma + pid * C + c, dg, mask=keep)                   # (programs, C)
    tl.store(dbeta + pid * C + c, db, mask=keep)


@triton.jit
def kv_merge_backward_conv(k, v, dk_sum, dv_sum, weight, dk, dv, dweight, dbias, rows, chunk, h, w, k_stride, v_stride,
                           C: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, R: tl.constexpr, UNIT: tl.constexpr,
                           ACC: tl.constexpr):
    """One program: one tap, BC channels, `chunk` merged tokens in steps of BR."""
    pid = tl.program_id(0)
    tap, pid = pid % (R * R), pid // (R * R)                        # the taps of a chunk run together and share dk_sum
    blocks = tl.cdiv(C, BC)
    c = pid % blocks * BC + tl.arange(0, BC)[None, :]               # (1, BC)
    part = pid // blocks                                            # which chunk of merged tokens
    t = tl.load(weight + tap * C + c, mask=c < C, other=0.0)        # (1, BC)
    dw, db = tl.zeros((BR, BC), ACC), tl.zeros((BR, BC), ACC)       # summed over rows at the very end
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, rows), BR):
        row = (first + tl.arange(0, BR)[:, None]).to(tl.int64)      # (BR, 1)
        keep = (row < rows) & (c < C)                               # (BR, BC)
        b, token = row // (h // R * (w // R)), row % (h // R * (w // R))
        n = (token // (w // R) * R + tap // R) * w + token % (w // R) * R + tap % R
        gk = tl.load(dk_sum + row * C + c, mask=keep, other=0.0).to(ACC)
        gv = tl.load(dv_sum + row * C + c, mask=keep, other=0.0).to(ACC)
        xk = tl.load(k + (b * k_stride[0] + n * k_stride[1]) * UNIT + c, mask=keep, other=0.0).to(ACC)
        xv = tl.load(v + (b * v_stride[0] + n * v_stride[1]) * UNIT + c, mask=keep, other=0.0).to(ACC)
        tl.store(dk + (b * h * w + n) * C + c, (gk * t).to(dk.dtype.element_ty), mask=keep)
        tl.store(dv + (b * h * w + n) * C + c, (gv * t).to(dk.dtype.element_ty), mask=keep)
        dw += gk * xk + gv * xv                                     # K and V share the weight
        db += gk + gv                                               # and the bias
    c = pid % blocks * BC + tl.arange(0, BC)
    tl.store(dweight + (part * R * R + tap) * C + c, tl.sum(dw, 0), mask=c < C)             # (parts, r^2, C)
    tl.store(dbias + part * C + c, tl.sum(db, 0), mask=(c < C) & (tap == 0))                # (parts, C)


# ----------------------------------------------------------------------------------------------------------------------
# KV merge as an operator.

def merge_plan(k, v, weight, ratio):
    """Compile-time arguments, strides, and what every kernel wants to know of the convolution: weight as (r^2, C)."""
    unit, steps = strides(k, v)
    C, wide = k.shape[-1], torch.promote_types(k.dtype, torch.float32)
    constants = dict(C=C, ACC=tl.float64 if wide == torch.float64 else tl.float32)
    row = dict(BC=power_of_two(C), EPS=EPS, num_warps=max(1, min(8, power_of_two(C) // 256)))   # one program per row
    return constants, row, dict(R=ratio, UNIT=unit), steps, wide, weight.to(wide).reshape(C, -1).t().contiguous()


@torch.library.custom_op("nanovermeer::kv_merge", mutates_args=(), schema=
    "(Tensor k, Tensor v, Tensor weight, Tensor bias, Tensor? gamma, Tensor? beta, int h, int w, int ratio, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)")
def kv_merge_op(k, v, weight, bias, gamma, beta, h, w, ratio, save):
    dtype = k.dtype
    k, v = ready(k, v)
    constants, row, conv, steps, wide, weight = merge_plan(k, v, weight, ratio)
    bias, gamma, beta = (x if x is None else x.to(wide) for x in (bias, gamma, beta))
    k_out, v_out = (k.new_empty(len(k), h // ratio * (w // ratio), k.shape[2]) for _ in range(2))
    k_sum, v_sum = (torch.empty_like(k_out) if save else None for _ in range(2))        # before the norm
    launch(kv_merge_forward, (k_out.shape[0] * k_out.shape[1],), k, v, weight, bias, gamma, beta, k_out, v_out,
           k_sum, v_sum, h, w, *steps, **constants, **row, **conv)
    return *(k.new_empty(0, dtype=dtype) if x is None else x.to(dtype) for x in (k_out, v_out, k_sum, v_sum)),


@torch.library.custom_op("nanovermeer::kv_merge_backward", mutates_args=(), schema=
    "(Tensor k, Tensor v, Tensor weight, Tensor? gamma, Tensor k_sum, Tensor v_sum, Tensor dk_out, Tensor dv_out,"
    " int h, int w, int ratio) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def kv_merge_backward_op(k, v, weight, gamma, k_sum, v_sum, dk_out, dv_out, h, w, ratio):
    dtype, shape, param = k.dtype, weight.shape, weight.dtype
    k, v, k_sum, v_sum, dk_out, dv_out = ready(k, v, k_sum, v_sum, dk_out.contiguous(), dv_out.contiguous())
    constants, row, conv, steps, wide, weight = merge_plan(k, v, weight, ratio)
    (B, N, C), rows = k.shape, dk_out.shape[0] * dk_out.shape[1]
    dgamma, dbeta = (weight.new_empty(min(rows, 2 * PROGRAMS), 0 if gamma is None else C) for _ in range(2))
    if gamma is not None:
        dk_sum, dv_sum = torch.empty_like(dk_out), torch.empty_like(dv_out)
        launch(kv_merge_backward_norm, dgamma.shape[:1], k_sum, v_sum, dk_out, dv_out, gamma.to(wide), dk_sum, dv_sum,
               dgamma, dbeta, rows, **constants, **row)
        dk_out, dv_out = dk_sum, dv_sum
    chunk, BC = 256, min(128, row["BC"])                            # merged tokens and channels of one program
    dk, dv = (k.new_empty(B, N, C) for _ in range(2))
    dweight, dbias = weight.new_empty(cdiv(rows, chunk), ratio ** 2, C), weight.new_empty(cdiv(rows, chunk), C)
    launch(kv_merge_backward_conv, (cdiv(rows, chunk) * cdiv(C, BC) * ratio ** 2,), k, v, dk_out, dv_out, weight, dk, dv,
           dweight, dbias, rows, chunk, h, w, *steps, BC=BC, BR=16, num_warps=4, **constants, **conv)
    dweight = dweight.sum(0).t().reshape(shape)                     # (C, 1, r, r)
    return dk.to(dtype), dv.to(dtype), *(x.to(param) for x in (dweight, dbias.sum(0), dgamma.sum(0), dbeta.sum(0)))


@kv_merge_op.register_fake
def _(k, v, weight, bias, gamma, beta, h, w, ratio, save):
    out = len(k), h // ratio * (w // ratio), k.shape[2]
    return *(k.new_empty(shape) for shape in (out, out, out if save else 0, out if save else 0)),


@kv_merge_backward_op.register_fake
def _(k, v, weight, gamma, *_):
    C, norm = k.shape[2], 0 if gamma is None else k.shape[2]
    return k.new_empty(k.shape), v.new_empty(v.shape), *(weight.new_empty(n) for n in (weight.shape, C, norm, norm))


def kv_merge_setup(ctx, inputs, output):
    k, v, weight, bias, gamma, beta, *ctx.grid, save = inputs
    ctx.save_for_backward(k, v, weight, gamma, *output[2:])


def kv_merge_autograd(ctx, dk_out, dv_out, *_):
    grads = kv_merge_backward_op(*ctx.saved_tensors, dk_out, dv_out, *ctx.grid)
    norm = (None, None) if ctx.saved_tensors[3] is None else grads[4:]
    return *grads[:4], *norm, None, None, None, None


kv_merge_op.register_autograd(kv_merge_autograd, setup_context=kv_merge_setup)
register_flop_formula(torch.ops.nanovermeer.kv_merge)(lambda k, *_, **__: 4 * math.prod(k))
register_flop_formula(torch.ops.nanovermeer.kv_merge_backward)(lambda k, *_, **__: 8 * math.prod(k))


def kv_merge(k, v, weight, bias, norm_weight, norm_bias, grid, ratio):
    """
    Shrinks k and v (B, N, C), tokens of a grid (h, w) row by row, to (B, N / ratio^2, C): a depthwise convolution with
    weight (C, 1, ratio, ratio), bias (C,) and stride ratio, then a LayerNorm unless norm_weight is None. A weight filled
    with 1 / ratio^2 and a bias of 0 take the mean; the norm follows all the same (PixArt-Sigma, Sec. 3.3).
    """
    h, w = grid                                                     # rows, columns
    if ratio == 1:
        return k, v
    if h % ratio or w % ratio or h * w != k.shape[1]:
        good = " x ".join(str(max(1, round(side / ratio)) * ratio) for side in grid)
        raise ValueError(f"{k.shape[1]} tokens as a grid of {h} x {w} cannot be merged {ratio} x {ratio}: "
                         f"both sides must be multiples of {ratio}, such as {good}")
    path = kv_merge_triton if use_kernel("kv_merge", k, k.shape[-1]) else kv_merge_reference
    return path(k, v, weight, bias, norm_weight, norm_bias, grid, ratio)                # (B, N / ratio^2, C), twice


def kv_merge_triton(k, v, weight, bias, norm_weight, norm_bias, grid, ratio):
    inputs = (k, v, weight, bias, norm_weight, norm_bias)
    save = torch.is_grad_enabled() and norm_weight is not None and any(x.requires_grad for x in inputs)
    return torch.ops.nanovermeer.kv_merge(*inputs, *grid, ratio, save)[:2]


def kv_merge_reference(k, v, weight, bias, norm_weight, norm_bias, grid, ratio):
    """The same in plain PyTorch, as PixArt-Sigma has it."""
    def merge(x):
        x = x.transpose(1, 2).unflatten(2, grid)                                        # (B, C, h, w)
        x = F.conv2d(x, weight, bias, stride=ratio, groups=x.shape[1])                  # (B, C, h / ratio, w / ratio)
        x = x.flatten(2).transpose(1, 2)                                                # (B, N / ratio^2, C)
        return x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    return merge(k), merge(v)


# ----------------------------------------------------------------------------------------------------------------------
# Which path? A GPU's name says little about what its compiler can do, so a kernel is tried, once.

verdicts = {}                              # (operator, dtype, width, device) -> whether its kernel may be used


def use_kernel(name, x, width):
    if backend == "auto":
        return x.is_cuda and trial(name, x.dtype, width, x.device)
    if backend == "triton" and (NO_TRITON or not (x.is_cuda or INTERPRETED)):
        raise RuntimeError("backend = 'triton' needs Triton and a GPU, or TRITON_INTERPRET=1 set before Python starts: "
                           "use 'auto' or 'torch'")
    return backend == "triton"


@torch.compiler.assume_constant_result     # while tracing, torch.compile runs it and keeps the answer
def trial(name, dtype, width, device):
    """Holds an operator against its plain twin on a tiny input, forward and backward, and prints which it is to be."""
    key = name, dtype, width, device
    if key not in verdicts:
        try:
            if NO_TRITON:
                raise NO_TRITON
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                off = max(errors(*case(name, width, dtype, device)))
            verdicts[key], reason = off < tolerance(dtype), f"differs from float64 by {off:.1e}"
        except Exception as problem:       # a missing compiler, too little shared memory, an unknown GPU: never a crash
            verdicts[key], reason = False, f"{type(problem).__name__}: {str(problem).strip()[:200]}"
        print(f"kernels: {name}, {str(dtype)[6:]}, width {width}: {'Triton' if verdicts[key] else 'PyTorch'} ({reason})")
    return verdicts[key]


# ----------------------------------------------------------------------------------------------------------------------
# python kernels.py check: errors of outputs and gradients, each ||x - exact|| / ||exact||, against float64.

def draw(*shape, seed=0):
    """Normal numbers that any dtype represents exactly, without touching torch's global generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def case(name, width, dtype, device, B=2, Nq=40, Nk=50, H=2, kv_len=(17, 50), mask=False, ratio=2):
    """A kernel, its twin, their inputs as a model makes them (slices of one projection) and their options."""
    if name == "attention":
        x, y = draw(B, Nq, 3, H, width, seed=1), draw(B, Nk, 3, H, width, seed=2)
        inputs = x[:, :, 0], y[:, :, 1], y[:, :, 2]
        options = dict(kv_len=kv_len and torch.tensor(kv_len, device=device),
                       mask=(draw(B, Nk, seed=3) > 0).to(device) if mask else None)
    else:
        x, norm = draw(B, 4 * ratio ** 2, 3, width, seed=1), draw(2, width, seed=3)
        inputs = x[:, :, 1], x[:, :, 2], draw(width, 1, ratio, ratio, seed=2), draw(width, seed=4), norm[0], norm[1]
        options = dict(grid=(ratio * 2, ratio * 2), ratio=ratio)
    inputs = [x.to(device, dtype) for x in inputs]
    return globals()[name + "_triton"], globals()[name + "_reference"], inputs, options


def outcome(function, inputs, options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [draw(*x.shape, seed=9 + i).to(x) for i, x in enumerate(outputs)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, upstream)]


def errors(function, twin, inputs, options):
    """One relative error for each output and each gradient."""
    exact = outcome(twin, [x.double() for x in inputs], options)    # the same rounded numbers, in float64
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-6))
            for a, b in zip(outcome(function, inputs, options), exact)]


def tolerance(dtype):
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {torch.float64: 1e-12, torch.float32: 2e-3 if tf32 else 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


CHECKS = [("attention", D, dict(Nq=100, Nk=77, H=3, kv_len=None)) for D in (8, 64, 72, 96, 128)] + [
    ("attention", 72, dict(Nq=64, Nk=128, kv_len=None)), ("attention", 72, dict(kv_len=(0, 50))),
    ("attention", 72, dict(mask=True)), ("attention", 20, dict(Nq=600, Nk=5, kv_len=None)),
    ("kv_merge", 1152, dict(ratio=2)), ("kv_merge", 768, dict(ratio=4)), ("kv_merge", 20, dict(ratio=3))]


def check():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {torch.cuda.get_device_name() if device == 'cuda' else 'a CPU, interpreted'}, torch {torch.__version__}, "
          f"triton {triton.__version__}; the largest relative error of outputs and gradients, against float64")
    rows = []
    for name, width, options in CHECKS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            kernel, twin, *rest = case(name, width, dtype, device, **options)
            ours, torchs = max(errors(kernel, twin, *rest)), max(errors(twin, twin, *rest))
            rows.append(dict(kernel=name, width=width, dtype=str(dtype)[6:], ours=ours, torch=torchs,
                             good=ours < tolerance(dtype), **options))
            print(f"{name:9} {width:5} {str(dtype)[6:]:8}  ours {ours:.1e}  torch {torchs:.1e}  "
                  f"{'ok ' if rows[-1]['good'] else 'BAD'} {options}", flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# python kernels.py check --sm90: what an H100 or H200 would run, compiled on any machine. Speed is lost without a word
# when registers spill to memory, when the matrix units (HGMMA) go unused, or when 16-bit elements are loaded one by one
# (LDG.U16). Float32 may spill 16 bytes: of its kernels, which are there to check others by, one cannot do with less.

SM90_CASES = [("attention", D, dtype, options) for D in (16, 64, 72, 96, 128) for dtype, options in (
    ("bfloat16", dict(Nq=256, Nk=256, kv_len=None)), ("bfloat16", dict(Nq=200, Nk=300)), ("bfloat16", dict(mask=True)),
    ("float16", dict(Nq=256, Nk=205, kv_len=None)), ("float32", dict(Nq=256, Nk=256, kv_len=None)), ("float32", dict()))]
SM90_CASES += [("kv_merge", 1152, dtype, dict(ratio=r)) for r in (2, 4) for dtype in ("bfloat16", "float32")]


def check_sm90(cases=SM90_CASES):
    global launch
    from triton.backends.compiler import GPUTarget
    target, rows, real = GPUTarget("cuda", 90, 32), [], launch      # 90 is Hopper; 32 threads to a warp
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0))

    def launch(kernel, grid, *args, **options):                     # compiles for the real arguments, runs nothing
        code = machine_code(kernel.warmup(*args, grid=grid, **options))
        half = args[0].dtype != torch.float32
        good = code["spill"] <= (0 if half else 16) and code["smem"] <= 227 * 1024 and not (half and code["ldg16"])
        good &= code["hgmma"] > 0 or "attention" not in kernel.__name__ or not half
        sizes = "x".join(str(options[key]) for key in ("BM", "BN", "BC", "R") if key in options)
        rows.append(dict(kernel=kernel.__name__, dtype=str(args[0].dtype)[6:],
                         width=options["D" if "D" in options else "C"], block=sizes,
                         warps=options["num_warps"], stages=options.get("num_stages"), **code, good=good))
        widths = 24, 9, 5, 8, 2, 4, 4, 5, 7, 4, 4, 4, 5
        print(" ".join(f"{value!s:>{width}}" for value, width in zip(rows[-1].values(), widths)), flush=True)

    print("kernel, dtype, width, block, warps, stages, registers, spilled bytes, shared bytes, HGMMA, LDG.U16, LDGSTS, "
          "good")
    try:
        for name, width, dtype, options in cases:
            kernel, _, inputs, arguments = case(name, width, getattr(torch, dtype), "cpu", **options)
            outcome(kernel, inputs, arguments)
    finally:
        launch = real
        triton.runtime.driver.set_active(None)                      # back to whatever there is
    return rows


def machine_code(compiled):
    """What the compiler made of a kernel: resources, and counts of the instructions that decide its speed."""
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([f"{tools}/cuobjdump", "--dump-resource-usage", file.name], text=True)
        sass = subprocess.check_output([f"{tools}/nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return dict(regs=int(used["REG"]), spill=int(used["STACK"]), smem=compiled.metadata.shared, hgmma=sass.count("HGMMA"),
                ldg16=len(re.findall(r"LDG[.\w]*\.U16", sass)), ldgsts=sass.count("LDGSTS"))


# ----------------------------------------------------------------------------------------------------------------------
# python kernels.py bench: what each kernel is for, in time. All times are of CUDA graphs, so they hold no Python and no
# launches; "bwd" is a forward and backward less a forward. The floor is the slower of two things that this GPU was just
# seen to do: its fastest matrix product at the operator's FLOPs, and its fastest copy at the operator's bytes.

ATTENTION_BENCH = (                        # B, H, Nq, Nk, D; then the share of the keys that are real, if some are padding
    ("UViT 16 x 16, self", 64, 12, 256, 256, 64, None), ("UViT 32 x 32, self", 64, 12, 1024, 1024, 64, None),
    ("UViT 32 x 32, half-length text", 64, 12, 1024, 205, 64, 0.5),
    ("PixArt 1K, self", 4, 16, 4096, 4096, 72, None), ("PixArt 1K, self, merged by 2", 4, 16, 4096, 1024, 72, None),
    ("PixArt 1K, half-length text", 4, 16, 4096, 300, 72, 0.5), ("PixArt 2K, text", 1, 16, 16384, 300, 72, None),
    ("head dim 96", 4, 16, 4096, 4096, 96, None), ("head dim 128", 4, 16, 4096, 4096, 128, None))
MERGE_BENCH = (("PixArt 1K", 4, 64, 1152, 2), ("PixArt 2K", 1, 128, 1152, 4), ("UViT 32 x 32", 64, 32, 768, 2))


def seconds(function, replays=30):
    """Median time of a call, from a CUDA graph of several."""
    stream, start, end = torch.cuda.Stream(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):                                          # compiles, and lets cuDNN make its plans
            start.record(), function(), end.record()
    torch.cuda.synchronize()
    calls = max(1, min(20, int(2 / start.elapsed_time(end))))       # about 2 ms of work
    graph = torch.cuda.CUDAGraph()                                  # a recording that the GPU replays on its own
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    times = []
    for _ in range(replays):
        start.record(), graph.replay(), end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(times)


def attention_methods(B, Nq, Nk, kv_len):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    keep = None if kv_len is None else (torch.arange(Nk, device="cuda") < kv_len[:, None])[:, None, None, :]
    blocks = None if kv_len is None else create_block_mask(lambda b, h, q, k: k < kv_len[b], B, None, Nq, Nk)
    flex = torch.compile(flex_attention, dynamic=False)

    def sdpa(context):
        def run(*qkv):
            with context():
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), attn_mask=keep).transpose(1, 2)
        return run
    methods = {"ours": lambda q, k, v: attention_triton(q, k, v, kv_len), "SDPA default": sdpa(contextlib.nullcontext)}
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        methods["SDPA " + name.split("_")[0].lower()] = sdpa(lambda one=getattr(SDPBackend, name): sdpa_kernel(one))
    methods["FlexAttention compiled"] = lambda *qkv: flex(
        *(x.transpose(1, 2) for x in qkv), block_mask=blocks).transpose(1, 2)
    return methods


def merge_methods(grid, r):
    def views(k, v, weight, bias, gamma, beta):                     # what a careful user would write and compile
        def merge(x):
            x = x.unflatten(1, (grid[0] // r, r, grid[1] // r, r)) * weight.permute(1, 2, 3, 0).reshape(1, 1, r, 1, r, -1)
            return F.layer_norm(x.sum((2, 4)).flatten(1, 2) + bias, x.shape[-1:], gamma, beta, EPS)
        return merge(k), merge(v)

    def channels_last(k, v, weight, *rest):
        return kv_merge_reference(k.contiguous(), v.contiguous(), weight.contiguous(memory_format=torch.channels_last),
                                  *rest, grid, r)
    plain = lambda *inputs: kv_merge_reference(*inputs, grid, r)
    return {"ours": lambda *inputs: kv_merge_triton(*inputs, grid, r), "PixArt's operators": plain,
            "channels_last convolution": channels_last, "PixArt's, compiled": torch.compile(plain, dynamic=False),
            "multiply and sum, compiled": torch.compile(views, dynamic=False)}


def race(label, methods, inputs, floors, rows, budget):
    """Times every method on the same inputs, forward and backward, and prints a line for each."""
    for name, function in methods.items():
        row = dict(case=label, method=name, floor_fwd_us=floors[0] * 1e6, floor_bwd_us=floors[1] * 1e6)
        rows.append(row)
        try:
            if time.time() > budget:
                raise TimeoutError("no time left")
            torch._dynamo.reset()                                   # or many shapes run into its recompile limit
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            upstream = [torch.randn_like(x) for x in outputs]
            fwd = seconds(lambda: function(*inputs))
            bwd = seconds(lambda: torch.autograd.grad(function(*inputs), inputs, upstream)) - fwd
            row.update(fwd_us=fwd * 1e6, bwd_us=bwd * 1e6)
            print(f"{label:32} {name:27} {fwd * 1e6:9.1f} {fwd / floors[0]:6.2f} {bwd * 1e6:11.1f} {bwd / floors[1]:6.2f}",
                  flush=True)
        except Exception as problem:                                # a backend that refuses this case
            row["problem"] = f"{type(problem).__name__}: {str(problem).strip()[:200]}"
            print(f"{label:32} {name:27} {row['problem'].splitlines()[0][:60]}", flush=True)


def bench():
    budget, rows = time.time() + 420, []
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192 ** 3 / seconds(lambda: a @ b)
    big, copy = (torch.empty(2 ** 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    bandwidth = 2 * 2 ** 30 / seconds(lambda: copy.copy_(big))
    print(f"on {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, cuDNN "
          f"{torch.backends.cudnn.version()}: matrix product {flops / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{'bfloat16, times in us':60} {'fwd':>9} {'/floor':>6} {'bwd':>11} {'/floor':>6}")
    for label, B, h, C, r in MERGE_BENCH:
        x = torch.randn(B, h * h, 3, C, device="cuda", dtype=torch.bfloat16)
        params = [torch.full((C, 1, r, r), r ** -2.0), torch.zeros(C), torch.ones(C), torch.zeros(C)]
        inputs = [y.to(x).requires_grad_() for y in (x[:, :, 1], x[:, :, 2], *params)]
        moved = 2 * B * h * h * C * 2                               # bytes of k and v
        floors = moved * (1 + r ** -2) / bandwidth, moved * (2 + r ** -2) / bandwidth
        race(f"merge {label}, r = {r}", merge_methods((h, h), r), inputs, floors, rows, budget)
    for label, B, H, Nq, Nk, D, share in ATTENTION_BENCH:
        x, y = (torch.randn(B, N, 3, H, D, device="cuda", dtype=torch.bfloat16) for N in (Nq, Nk))
        inputs = [z.requires_grad_() for z in (x[:, :, 0], y[:, :, 1], y[:, :, 2])]
        kv_len = None if share is None else torch.linspace(1, 2 * share * Nk - 1, B, device="cuda").round().int()
        keys = Nk * B if share is None else int(kv_len.sum())       # of all images
        work, moved = 4 * H * Nq * keys * D, 4 * H * D * (B * Nq + keys)
        floors = max(work / flops, moved / bandwidth), max(2.5 * work / flops, 2 * moved / bandwidth)
        race(label, attention_methods(B, Nq, Nk, kv_len), inputs, floors, rows, budget)
    return rows


def fail(what, fix):
    print(f"error: {what}: {fix}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(message, "see python kernels.py --help")
    parser.add_argument("command", nargs="?", choices=("check", "bench"), default="check")
    parser.add_argument("--sm90", action="store_true", help="with check: compile for an H100 or H200, run nothing")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if NO_TRITON:
        fail(f"no Triton ({NO_TRITON})", "pip install triton (Linux)")
    if args.command == "bench" and not torch.cuda.is_available():
        fail("bench needs a GPU, and there is none", "run it where there is one, or python kernels.py check here")
    rows = bench() if args.command == "bench" else check_sm90() if args.sm90 else check()
    if args.json:
        gpu = torch.cuda.is_available()
        about = dict(command=" ".join(sys.argv), date=time.strftime("%Y-%m-%d"), torch=torch.__version__,
                     triton=triton.__version__, cudnn=torch.backends.cudnn.version() if gpu else None,
                     device=torch.cuda.get_device_name() if gpu else "cpu")
        with open(args.json, "w") as file:
            json.dump(dict(about, rows=rows), file, indent=1, default=str)
    bad = sum(not row.get("good", True) for row in rows)
    print(f"{len(rows)} cases, {bad} bad")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
