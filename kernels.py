"""
Attention for diffusion models, and the KV merge that makes it affordable at high resolution, as Triton kernels.

Attention. For every image and head, O = P V with P = softmax(S) and S = scale Q K^T. Written out, the Nq x Nk scores
make four trips through memory (write S, read S, write P, read P): 8 Nq Nk bytes per head in bf16, against
4 (Nq + Nk) D for Q, K, V and O. For 64 x 64 tokens and D = 72 that is 134 MB against 2.4 MB. The fused kernel never
writes S: it walks over blocks of keys and keeps, per query, the maximum so far m, the sum l of exp(S - m), and the
output so far, which shrinks by exp(m_old - m_new) whenever the maximum grows (FlashAttention, Dao et al. 2022). It
leaves L = m + log l, one number per query, from which the backward recomputes P = exp(S - L). With dP = dO V^T and
delta = rowsum(O dO),
    dS = P (dP - delta),    dV = P^T dO,    dQ = scale dS K,    dK = scale dS^T Q.
The code works in base 2, since exp2 is one instruction: its m, l and L are those of S log2 e, SCALE2 is scale log2 e.

KV merge (PixArt-Sigma's KV token compression). Neighbouring tokens of a picture say nearly the same, so K and V are
shrunk by a depthwise r x r convolution of stride r and a LayerNorm, both shared by K and V, while Q keeps every token:
attention costs r^2 times less. As separate operators (copy, convolution, norm, for K and for V) that moves about
7.5 N C elements at r = 2; in one pass 2.5 N C, each byte once.

What one would call instead: F.scaled_dot_product_attention, FlexAttention, F.conv2d and F.layer_norm. The kernels add
head dims that are no power of two without padding to the next one (72 costs 80 columns, not 128), captions of which the
padding is skipped rather than masked, exact zeros where nothing may be attended, gradients that repeat bit for bit.
Numbers differ by rounding only: scores and sums are float32, P and dS are rounded to the inputs' precision before a
matrix product (as FlashAttention does); float32 goes through one TF32 product where PyTorch may use these, else through
three, which restore its precision.
`python -m experiments.bench kernels` measures errors against float64 and, on a GPU, times beside every alternative.

Letters: B images, H heads, Nq queries, Nk keys, D head dim, C channels, N = h w tokens; a block is BM queries, BN keys.
"""
import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from lib.triton_tools import (INTERPRETED, NO_TRITON, agrees, cdiv, launch, power_of_two, ready, seeded_randn, tl,
                              triton, unit_strides)

backend = "auto"                           # "auto": Triton on a GPU where it passes a trial; "triton", "torch": forced
MERGE_EPS = 1e-5                           # of the LayerNorm in the KV merge, here and in model.py
PROGRAMS = 264                             # enough to fill a GPU: two for each multiprocessor of an H100
verdicts = {}                              # (operator, dtype, width, ...) -> may this variant of its kernel be used?

# Block sizes: (BM, BN, warps, pipeline stages) by kernel and bytes per element, for heads of up to 64, 80, 96 and 128
# columns. On an H100 those of 2 bytes spill no register, those of 4 at most 16 bytes (`bench sm90`).
WIDTHS = (64, 80, 96, 128)
BLOCK_SIZES = {
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
# Attention in plain PyTorch: what the kernels must agree with, and the fallback. Nothing is faster on a CPU.

def attention_reference(q, k, v, kv_len=None, mask=None, scale=None):
    """softmax(scale Q K^T) V; `attention`, at the end of this file, explains the arguments and takes it or a kernel."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                   # (B, H, N, D)
    if kv_len is None and mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)     # (B, Nq, H, D)
    if kv_len is not None:
        within = torch.arange(k.shape[2], device=k.device) < kv_len[:, None]            # (B, Nk)
        mask = within if mask is None else within & mask
    none = ~mask.any(1)                                                                 # (B,) images without any key
    mask = (mask | none[:, None])[:, None, None, :]            # (B, 1, 1, Nk): they see all, or softmax would be NaN
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    return o.masked_fill(none[:, None, None, None], 0)                                  # and get 0


# ----------------------------------------------------------------------------------------------------------------------
# Attention, kernels: the pieces that all three share.
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
    end = Nk                                                        # all of them, where kv_len is None
    if kv_len is not None:
        end = tl.minimum(tl.maximum(tl.load(kv_len + b), 0), Nk)
    return end


@triton.jit
def attended(mask, b, Nk, keys, end):
    """Which of these keys count: those before the end that the mask, if there is one, lets through."""
    keep = keys < end                                               # (BN,)
    if mask is not None:
        keep = keep & (tl.load(mask + b * Nk + keys, mask=keep, other=0) != 0)
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
                      BM: tl.constexpr, BN: tl.constexpr, TAIL: tl.constexpr,
                      ACC: tl.constexpr, PRECISION: tl.constexpr):
    start, b, h = locate(Nq, H, BM)
    left = (Nq - start).to(tl.int32)                                # queries from here on; the last block may be ragged
    q += (b * q_stride[0] + start * q_stride[1] + h * q_stride[2]) * UNIT       # this block's first query
    k += (b * k_stride[0] + h * k_stride[2]) * UNIT                 # this head's first key
    v += (b * v_stride[0] + h * v_stride[2]) * UNIT                 # and value
    end = key_count(kv_len, b, Nk)
    full = end // BN * BN if mask is None else 0                    # how far no key needs a mask

    q0, q1 = load(q, q_stride[1] * UNIT, left, BM, D, D0, D1, False)                # (BM, D0), (BM, D1)
    o0, o1 = zeros(BM, D0, D1, ACC)                                                 # (BM, D0), (BM, D1)
    m = tl.full((BM,), -1e30, ACC)                                  # finite: -inf - -inf would be NaN
    l = tl.zeros((BM,), ACC)
    for PART in tl.static_range(0 if mask is None else 1, 1 + TAIL):
        lo = 0 if PART == 0 else full
        hi = full if PART == 0 else end
        for n in range(lo, hi, BN):
            k0, k1 = load(k, k_stride[1] * UNIT, hi - n, BN, D, D0, D1, PART == 0)  # (BN, D0), (BN, D1)
            s = inner(q0, q1, k0, k1, D1, ACC, PRECISION)                           # (BM, BN)
            if PART == 1:
                s = tl.where(attended(mask, b, Nk, n + tl.arange(0, BN), end)[None, :], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * SCALE2)                            # base 2: exp2 is one instruction
            p = tl.exp2(s * SCALE2 - m_new[:, None])                                # (BM, BN)
            shrink = tl.exp2(m - m_new)                                             # (BM,)
            l = l * shrink + tl.sum(p, 1)                                           # (BM,)
            o0 = o0 * shrink[:, None]                                               # (BM, D0)
            if D1 > 0:
                o1 = o1 * shrink[:, None]
            v0, v1 = load(v, v_stride[1] * UNIT, hi - n, BN, D, D0, D1, PART == 0)  # (BN, D0), (BN, D1)
            o0, o1 = add_product(o0, o1, p, v0, v1, D1, ACC, PRECISION)             # + P V
            m = m_new
            k += BN * k_stride[1] * UNIT                                            # on to the next block of keys
            v += BN * v_stride[1] * UNIT

    # A query without keys has l = 0. Its output is 0, and L = +inf makes P = exp2(S - L) = 0 in the backward.
    any_key = l > 0
    l = tl.where(any_key, l, 1)
    r = 1 / l[:, None]
    store(o + ((b * Nq + start) * H + h) * D, o0 * r, o1 * r, H * D, left, BM, D, D0, D1)
    rows = tl.arange(0, BM)                                         # (BM,)
    tl.store(lse + (b * H + h) * Nq + start + rows, tl.where(any_key, m + tl.log2(l), float("inf")), mask=rows < left)


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
    end = key_count(kv_len, b, Nk)
    full = end // BN * BN if mask is None else 0                    # how far no key needs a mask
    row = (b * H + h) * Nq + start                                  # of lse and delta
    rows = tl.arange(0, BM)                                         # (BM,)
    offset = ((b * Nq + start) * H + h) * D                         # of o and dq

    do0, do1 = load(do, do_stride[1] * UNIT, left, BM, D, D0, D1, False)            # (BM, D0), (BM, D1)
    o0, o1 = load(o + offset, H * D, left, BM, D, D0, D1, False)                    # (BM, D0), (BM, D1)
    d = tl.sum(o0.to(ACC) * do0.to(ACC), 1)                                         # delta, (BM,)
    if D1 > 0:
        d += tl.sum(o1.to(ACC) * do1.to(ACC), 1)                                    # (BM,)
    tl.store(delta + row + rows, d, mask=rows < left)
    L = tl.load(lse + row + rows, mask=rows < left, other=float("inf"))             # (BM,)

    q0, q1 = load(q, q_stride[1] * UNIT, left, BM, D, D0, D1, False)                # (BM, D0), (BM, D1)
    dq0, dq1 = zeros(BM, D0, D1, ACC)                                               # (BM, D0), (BM, D1)
    for PART in tl.static_range(0 if mask is None else 1, 1 + TAIL):
        lo = 0 if PART == 0 else full
        hi = full if PART == 0 else end
        for n in range(lo, hi, BN):
            k0, k1 = load(k, k_stride[1] * UNIT, hi - n, BN, D, D0, D1, PART == 0)  # (BN, D0), (BN, D1)
            v0, v1 = load(v, v_stride[1] * UNIT, hi - n, BN, D, D0, D1, PART == 0)  # (BN, D0), (BN, D1)
            s = inner(q0, q1, k0, k1, D1, ACC, PRECISION)                           # (BM, BN)
            if PART == 1:
                s = tl.where(attended(mask, b, Nk, n + tl.arange(0, BN), end)[None, :], s, float("-inf"))
            p = tl.exp2(s * SCALE2 - L[:, None])                                    # (BM, BN), at once normalised
            ds = p * (inner(do0, do1, v0, v1, D1, ACC, PRECISION) - d[:, None])     # dS, (BM, BN)
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
    q += (b * q_stride[0] + lo.to(tl.int64) * q_stride[1] + h * q_stride[2]) * UNIT
    k += (b * k_stride[0] + start * k_stride[1] + h * k_stride[2]) * UNIT
    v += (b * v_stride[0] + start * v_stride[1] + h * v_stride[2]) * UNIT
    do += (b * do_stride[0] + lo.to(tl.int64) * do_stride[1] + h * do_stride[2]) * UNIT
    lse += (b * H + h) * Nq                                         # (B, H, Nq), as delta is
    delta += (b * H + h) * Nq

    k0, k1 = load(k, k_stride[1] * UNIT, left, BN, D, D0, D1, False)                # (BN, D0), (BN, D1)
    v0, v1 = load(v, v_stride[1] * UNIT, left, BN, D, D0, D1, False)                # (BN, D0), (BN, D1)
    dk0, dk1 = zeros(BN, D0, D1, ACC)                                               # (BN, D0), (BN, D1)
    dv0, dv1 = zeros(BN, D0, D1, ACC)                                               # (BN, D0), (BN, D1)
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
            ds = p * (inner(v0, v1, do0, do1, D1, ACC, PRECISION) - d[None, :])     # dS^T, (BN, BM)
            dk0, dk1 = add_product(dk0, dk1, ds, q0, q1, D1, ACC, PRECISION)        # + dS^T Q
            q += BM * q_stride[1] * UNIT                                            # on to the next block of queries
            do += BM * do_stride[1] * UNIT

    # The loop ignored which keys count. One that does not count has spoiled its own row alone, which is cleared here.
    keep = attended(mask, b, Nk, start + tl.arange(0, BN), end)[:, None]            # (BN, 1)
    offset = (((part * B + b) * Nk + start) * H + h) * D            # dk and dv are (chunks, B, Nk, H, D)
    store(dv + offset, tl.where(keep, dv0, 0.0), tl.where(keep, dv1, 0.0), H * D, left, BN, D, D0, D1)
    store(dk + offset, tl.where(keep, dk0 * SCALE, 0.0), tl.where(keep, dk1 * SCALE, 0.0), H * D, left, BN, D, D0, D1)


# ----------------------------------------------------------------------------------------------------------------------
# KV merge, first in plain PyTorch, as PixArt-Sigma has it.

def kv_merge_reference(k, v, weight, bias, norm_weight, norm_bias, grid, ratio):
    """
    A depthwise convolution and a LayerNorm. Its Triton twin follows, kv_merge_forward; `kv_merge`, at the end of this
    file, explains the arguments and takes one of the two.
    """
    def merge(x):
        x = x.transpose(1, 2).unflatten(2, grid)                                        # (B, C, h, w)
        x = F.conv2d(x, weight, bias, stride=ratio, groups=x.shape[1])                  # (B, C, h / ratio, w / ratio)
        x = x.flatten(2).transpose(1, 2)                                                # (B, N / ratio^2, C)
        return x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, MERGE_EPS)
    return merge(k), merge(v)


# Forward. One program: one merged token, all channels, K and V. Every byte of K and V is read once.

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
    if k_sum is not None:                                           # for the backward
        tl.store(k_sum + row * C + c, ks.to(k_sum.dtype.element_ty), mask=keep)
        tl.store(v_sum + row * C + c, vs.to(k_sum.dtype.element_ty), mask=keep)
    if gamma is not None:
        g, b0 = tl.load(gamma + c, mask=keep, other=0.0), tl.load(beta + c, mask=keep, other=0.0)
        ks, vs = layer_norm(ks, g, b0, keep, C, EPS), layer_norm(vs, g, b0, keep, C, EPS)
    tl.store(k_out + row * C + c, ks.to(k_out.dtype.element_ty), mask=keep)
    tl.store(v_out + row * C + c, vs.to(k_out.dtype.element_ty), mask=keep)


# KV merge, backward, in two kernels: through the norm, row by row, then through the convolution, channels in blocks and
# one program per tap, so that whatever r is, a program holds one slice of dW. Sums over rows leave each program as a
# partial sum in float32 and are added by torch: no atomics, the same bits every time.

@triton.jit
def kv_merge_backward_norm(k_sum, v_sum, dk_out, dv_out, gamma, dk_sum, dv_sum, dgamma, dbeta, rows,
                           C: tl.constexpr, BC: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """Program i of n takes the merged tokens i, i + n, i + 2 n, ... of K and of V."""
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
# Operators: the kernels as autograd, torch.compile and the FLOP counter know them.

def tiles(D):
    """Widths of the two tiles that hold D columns; the second is 0 where a single one is as narrow."""
    whole = power_of_two(D)
    first = max(16, whole // 2)                                     # 64 of 72, 64 of 96
    second = power_of_two(D - first) if D > first else 0            # 16, 32
    return (first, second) if first + second < whole else (whole, 0)


def compile_time(name, q, unit, scale, rows, kv_len=None, mask=None):
    """What the compiler knows of a kernel that loops over so many rows. TAIL: does the last block need a mask?"""
    D, size = q.shape[-1], 2 if INTERPRETED else q.element_size()   # the interpreter likes large blocks
    D0, D1 = tiles(D)
    if D > WIDTHS[-1] or (name, size) not in BLOCK_SIZES:
        raise ValueError(f"no kernel for head dim {D} in {q.dtype}: use backend = 'auto' or 'torch'")
    BM, BN, warps, stages = BLOCK_SIZES[name, size][[D0 + D1 <= width for width in WIDTHS].index(True)]
    tail = kv_len is not None or mask is not None or rows % (BM if name == "dkdv" else BN) > 0
    tf32 = size == 2 or torch.backends.cuda.matmul.fp32_precision == "tf32"     # see torch.set_float32_matmul_precision
    return dict(D=D, D0=D0, D1=D1, UNIT=unit, SCALE2=scale * math.log2(math.e), BM=BM, BN=BN, TAIL=int(tail),
                ACC=tl.float64 if q.dtype == torch.float64 else tl.float32, PRECISION="tf32" if tf32 else "tf32x3",
                num_warps=warps, num_stages=stages)


@torch.library.custom_op("nanovermeer::attention", mutates_args=(), schema=
    "(Tensor q, Tensor k, Tensor v, Tensor? kv_len, Tensor? mask, float scale) -> (Tensor, Tensor)")
def attention_op(q, k, v, kv_len, mask, scale):
    dtype = q.dtype
    q, k, v = ready(q, k, v)
    (B, Nq, H, D), Nk = q.shape, k.shape[1]
    o, lse = q.new_empty(B, Nq, H, D), q.new_empty(B, H, Nq, dtype=torch.promote_types(q.dtype, torch.float32))
    unit, steps = unit_strides(q, k, v)                             # (image, token, head) of each
    options = compile_time("forward" if mask is None else "masked", q, unit, scale, Nk, kv_len, mask)
    launch(attention_forward, (cdiv(Nq, options["BM"]) * B * H,), q, k, v, o, lse, kv_len, mask, H, Nq, Nk, *steps,
           **options)
    return o.to(dtype), lse                                         # lse is L in base 2


@torch.library.custom_op("nanovermeer::attention_backward", mutates_args=(), schema=
    "(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor do, Tensor? kv_len, Tensor? mask, float scale)"
    " -> (Tensor, Tensor, Tensor)")
def attention_backward_op(q, k, v, o, lse, do, kv_len, mask, scale):
    dtype = q.dtype
    q, k, v, o, do = ready(q, k, v, o, do)
    (B, Nq, H, D), Nk = q.shape, k.shape[1]
    delta, dq = torch.empty_like(lse), q.new_empty(B, Nq, H, D)     # delta is (B, H, Nq)
    unit, steps = unit_strides(q, k, v, do)
    options = compile_time("dq", q, unit, scale, Nk, kv_len, mask)
    launch(attention_backward_dq, (cdiv(Nq, options["BM"]) * B * H,), q, k, v, o, do, lse, delta, dq, kv_len, mask,
           H, Nq, Nk, *steps, SCALE=scale, **options)

    # The few keys of a caption make few programs: then each takes only a chunk of the queries, and the sums are added.
    options = compile_time("dkdv", q, unit, scale, Nq)
    programs, blocks = cdiv(Nk, options["BN"]) * B * H, cdiv(Nq, options["BM"])         # of keys; of queries
    chunks = max(1, min(cdiv(PROGRAMS, max(1, programs)), blocks // 8))
    dk, dv = (k.new_empty(chunks, B, Nk, H, D, dtype=k.dtype if chunks == 1 else lse.dtype) for _ in range(2))
    launch(attention_backward_dkdv, (programs, chunks), q, k, v, do, lse, delta, dk, dv, kv_len, mask, B, H, Nq, Nk,
           cdiv(blocks, chunks) * options["BM"], *steps, SCALE=scale, **options)
    dk, dv = (x[0] if chunks == 1 else x.sum(0) for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@attention_op.register_fake
def _(q, k, v, kv_len, mask, scale):
    B, Nq, H, D = q.shape
    return q.new_empty(B, Nq, H, D), q.new_empty(B, H, Nq, dtype=torch.promote_types(q.dtype, torch.float32))


@attention_backward_op.register_fake
def _(q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def attention_setup(ctx, inputs, output):
    q, k, v, kv_len, mask, ctx.scale = inputs                       # output is (o, lse)
    ctx.save_for_backward(q, k, v, *output, kv_len, mask)


def attention_autograd(ctx, do, _):
    return *attention_backward_op(*ctx.saved_tensors[:5], do, *ctx.saved_tensors[5:], ctx.scale), None, None, None


attention_op.register_autograd(attention_autograd, setup_context=attention_setup)


def attention_flops(q, keys, products):
    # products of Nq x D by D x Nk: S = Q K^T, O = P V; backward what one kernel would need
    return products * 2 * math.prod(q) * keys


register_flop_formula(torch.ops.nanovermeer.attention)(lambda q, k, *_, **__: attention_flops(q, k[1], 2))
register_flop_formula(torch.ops.nanovermeer.attention_backward)(lambda q, k, *_, **__: attention_flops(q, k[1], 5))
# PyTorch counts its own attention on a GPU but not on a CPU, where it is our fallback. Shapes there are (B, H, N, D).
on_cpu = [getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu" + end) for end in ("", "_backward")]
register_flop_formula(on_cpu[0])(lambda q, k, *_, **__: attention_flops(q, k[2], 2))
register_flop_formula(on_cpu[1])(lambda do, q, k, *_, **__: attention_flops(q, k[2], 5))


def attention_triton(q, k, v, kv_len=None, mask=None, scale=None):
    """Attention by the kernels, without asking whether they work here."""
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):  # an operator of our own is not on autocast's list
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"attention needs a positive scale, not {scale}: put the sign into q")
    kv_len = kv_len if kv_len is None else kv_len.to(torch.int32)
    mask = mask if mask is None else mask.contiguous()
    return torch.ops.nanovermeer.attention(q, k, v, kv_len, mask, scale)[0]


def merge_plan(k, v, weight, ratio):
    """Compile-time arguments, strides, and what every kernel wants to know of the convolution: weight as (r^2, C)."""
    unit, steps = unit_strides(k, v)
    C, wide = k.shape[-1], torch.promote_types(k.dtype, torch.float32)
    constants = dict(C=C, ACC=tl.float64 if wide == torch.float64 else tl.float32)
    row = dict(BC=power_of_two(C), EPS=MERGE_EPS, num_warps=max(1, min(8, power_of_two(C) // 256)))  # a program a row
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
    launch(kv_merge_backward_conv, (cdiv(rows, chunk) * cdiv(C, BC) * ratio ** 2,), k, v, dk_out, dv_out, weight,
           dk, dv, dweight, dbias, rows, chunk, h, w, *steps, BC=BC, BR=16, num_warps=4, **constants, **conv)
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


def kv_merge_triton(k, v, weight, bias, norm_weight, norm_bias, grid, ratio):
    inputs = (k, v, weight, bias, norm_weight, norm_bias)
    save = torch.is_grad_enabled() and norm_weight is not None and any(x.requires_grad for x in inputs)
    return torch.ops.nanovermeer.kv_merge(*inputs, *grid, ratio, save)[:2]


# ----------------------------------------------------------------------------------------------------------------------
# What a model calls. Before a kernel is used, the very variant that is wanted is held against its plain twin, once.

def attention(q, k, v, kv_len=None, mask=None, scale=None):
    """
    softmax(scale Q K^T) V for q (B, Nq, H, D) and k, v (B, Nk, H, D) of any strides; scale is 1 / sqrt(D) if not given.
    kv_len (B,) says how many keys each image has; the others cost nothing. mask (B, Nk) is True where a key counts, in
    any pattern. A query without keys gets exact zeros, forward and backward.
    """
    # The trial's sizes end as the real ones do, at the edge of the same blocks, and begin with blocks that are full.
    Nq, Nk = (128 + next(block for block in (128, 64, 32, 16, 1) if x.shape[1] % block == 0) for x in (q, k))
    lengths = None if kv_len is None else (0, 17, Nk)
    fits = use_kernel("attention", q, H=q.shape[2], Nq=Nq, Nk=Nk, kv_len=lengths, mask=mask is not None)
    return (attention_triton if fits else attention_reference)(q, k, v, kv_len, mask, scale)        # (B, Nq, H, D)


def kv_merge(k, v, weight, bias, norm_weight, norm_bias, grid, ratio):
    """
    Shrinks k and v (B, N, C), tokens of a grid (h, w) row by row, to (B, N / ratio^2, C): a depthwise convolution with
    weight (C, 1, ratio, ratio), bias (C,) and stride ratio, then a LayerNorm unless norm_weight is None. A weight of
    1 / ratio^2 and a bias of 0 take the mean; the norm follows all the same (PixArt-Sigma).
    """
    h, w = grid                                                     # rows, columns
    if ratio == 1:
        return k, v
    if h % ratio or w % ratio or h * w != k.shape[1]:
        good = " x ".join(str(max(1, round(side / ratio)) * ratio) for side in grid)
        raise ValueError(f"{k.shape[1]} tokens as a grid of {h} x {w} cannot be merged {ratio} x {ratio}: "
                         f"both sides must be multiples of {ratio}, such as {good}")
    fits = use_kernel("kv_merge", k, ratio=ratio, norm=norm_weight is not None)
    return (kv_merge_triton if fits else kv_merge_reference)(k, v, weight, bias, norm_weight, norm_bias, grid, ratio)


def use_kernel(name, x, **variant):
    """Whether an operator takes its kernel for inputs like x. `variant` is all else that the kernel is compiled for."""
    if x.is_meta:                                                   # nothing runs: only FLOPs of operators are counted
        return name == "attention"
    if backend == "auto":
        training = torch.is_grad_enabled() and x.requires_grad
        return x.is_cuda and trial(name, x.dtype, x.shape[-1], x.device, training, **variant)
    if backend == "triton" and (NO_TRITON or not (x.is_cuda or INTERPRETED)):
        raise RuntimeError("backend = 'triton' needs Triton and a GPU, or TRITON_INTERPRET=1 at the start: use 'auto'")
    return backend == "triton"


def trial(name, dtype, width, device, training, **variant):
    """Whether a variant of an operator agrees with its plain twin here, forward and, for training, backward."""
    key = name, dtype, width, device, training, *variant.values()
    if key not in verdicts:
        def calls():
            yield example_call(name, width, dtype, device, **variant)
            if name == "attention" and training:                    # many queries are shared out in chunks
                yield example_call(name, width, dtype, device, **variant | dict(Nq=variant["Nq"] + 1024))
        words = [w if v is True else f"{w} {v}" for w, v in variant.items() if v] + ["training"] * training
        label = f"kernels: {name}, {str(dtype)[6:]}, width {width}, {', '.join(words)}, {device}"
        verdicts[key] = agrees(label, calls, dtype, device, training)
    return verdicts[key]


# torch.compile runs it while tracing and keeps its answer: torch.compiler.assume_constant_result, without a slow import
trial._dynamo_marked_constant = True


def example_call(name, width, dtype, device, B=2, H=2, Nq=40, Nk=50, kv_len=(17, 50), mask=False, ratio=2, norm=True):
    """A kernel, its twin, their inputs as a model makes them (slices of one projection) and their options."""
    def randn(*shape, seed):                   # cast before it is sliced: a cast slice would have no gaps
        return seeded_randn(*shape, seed=seed).to(device, dtype)
    if name == "attention":
        B = len(kv_len) if kv_len else B
        x, y = randn(B, Nq, 3, H, width, seed=1), randn(B, Nk, 3, H, width, seed=2)
        functions, inputs = (attention_triton, attention_reference), (x[:, :, 0], y[:, :, 1], y[:, :, 2])
        options = dict(kv_len=torch.tensor(kv_len, device=device) if kv_len else None,
                       mask=(seeded_randn(B, Nk, seed=3) > 0).to(device) if mask else None)
    else:
        x, params = randn(B, 4 * ratio ** 2, 3, width, seed=1), randn(3, width, seed=3)
        functions, weight = (kv_merge_triton, kv_merge_reference), randn(width, 1, ratio, ratio, seed=2)
        inputs = x[:, :, 1], x[:, :, 2], weight, *params[:3 if norm else 1]
        no_norm = {} if norm else dict(norm_weight=None, norm_bias=None)
        options = dict(grid=(2 * ratio, 2 * ratio), ratio=ratio, **no_norm)
    return *functions, list(inputs), options
