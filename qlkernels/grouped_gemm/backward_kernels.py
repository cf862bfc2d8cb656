"""Triton kernels of the backward pass over rows sorted by expert.

    g = dout W_down                     # of the routed rows, never stored
    dweight = sum_i g_i a_i,  a = silu(gate) up
    da = weight g;  dgate = da up silu'(gate);  dup = da silu(gate)
    dW_down = dout^T (weight a),  dW_gate_up = dh^T x

h is rounded to the inputs' dtype when it is saved; a is formed again from it in fp32.
"""

from __future__ import annotations

from qlkernels._online import swizzled_tile
from qlkernels._triton import tl, triton
from qlkernels.grouped_gemm.kernels import load_rows, load_tile, two_halves


@triton.jit
def swiglu_backward_columns(
    g, h_ptr, dh_ptr, a_ptr, partial_ptr, offs_row, mask_m, weight, column, stride_hm, stride_am,
    total, I, STORE_DH: tl.constexpr, STORE_A: tl.constexpr,  # noqa: E741
    PART: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The rule above for ``BLOCK_N`` columns from ``column`` on, ``PART`` at a time: more of them
    would not fit the registers beside the accumulator.
    """
    if BLOCK_N > PART:
        half: tl.constexpr = BLOCK_N // 2
        left, right = two_halves(g, BLOCK_M, half)
        swiglu_backward_columns(
            left, h_ptr, dh_ptr, a_ptr, partial_ptr, offs_row, mask_m, weight, column,
            stride_hm, stride_am, total, I, STORE_DH, STORE_A, PART, BLOCK_M, half,
        )  # fmt: skip
        swiglu_backward_columns(
            right, h_ptr, dh_ptr, a_ptr, partial_ptr, offs_row, mask_m, weight, column + half,
            stride_hm, stride_am, total, I, STORE_DH, STORE_A, PART, BLOCK_M, half,
        )  # fmt: skip
    else:
        offs_n = column + tl.arange(0, PART)
        mask = mask_m[:, None] & (offs_n < I)[None, :]
        at = offs_row[:, None] * stride_hm + offs_n[None, :]
        gate = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + at + I, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        a = silu * up
        # selected, not multiplied: columns past I hold another expert's product
        share = tl.sum(tl.where(mask, g * a, 0.0), 1)
        part = (column // PART).to(tl.int64) * total
        tl.store(partial_ptr + part + offs_row, share, mask=mask_m & (column < I))
        if STORE_A:
            at_a = a_ptr + offs_row[:, None] * stride_am + offs_n[None, :]
            tl.store(at_a, (weight[:, None] * a).to(a_ptr.dtype.element_ty), mask=mask)
        if STORE_DH:
            da = weight[:, None] * g
            dgate = da * up * (sigmoid + silu * (1.0 - sigmoid))
            dup = da * silu
            tl.store(dh_ptr + at, dgate.to(dh_ptr.dtype.element_ty), mask=mask)
            tl.store(dh_ptr + at + I, dup.to(dh_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["max_tiles", "total", "weights_ptr"])
def swiglu_backward_kernel(
    x, w, h_ptr, dh_ptr, a_ptr, partial_ptr, weights_ptr, order_ptr, tiles_ptr, n_tiles_ptr,
    stride_xt, stride_hm, stride_am, max_tiles, total, H, I,  # noqa: E741
    TOP_K: tl.constexpr, STORE_DH: tl.constexpr, STORE_A: tl.constexpr, PART: tl.constexpr,
    EVEN_K: tl.constexpr, USE_TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """dh, weight * a, and the shares of dweight of every ``PART`` columns.

    x is dout ``[T, H]``, gathered; ``partial_ptr`` is ``[cdiv(I, PART), total]``.
    """
    n_m = tl.load(n_tiles_ptr)
    n_n = tl.cdiv(I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), n_m * n_n, NUM_PROGRAMS, flatten=USE_TMA):
        m, n = swizzled_tile(tile, n_m, n_n, GROUP_M)
        expert, row, rows, local = load_tile(tiles_ptr, max_tiles, m)
        column = n * BLOCK_N
        offs_m = tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        slot = tl.load(order_ptr + row + offs_m, mask=mask_m, other=0)
        token = (slot // TOP_K).to(tl.int64)
        offs_n = column + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, H, BLOCK_K):
            a = load_rows(x, token, stride_xt, k, H, EVEN_K, BLOCK_K)
            if USE_TMA:
                b = w.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)
            else:
                offs_k = k + tl.arange(0, BLOCK_K)
                at = w + expert.to(tl.int64) * H * I + offs_k[:, None] * I + offs_n[None, :]
                mask = (offs_k < H)[:, None] & (offs_n < I)[None, :]
                b = tl.load(at, mask=mask, other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

        weight = tl.load(weights_ptr + slot, mask=mask_m, other=0.0)
        offs_row = (row + offs_m).to(tl.int64)
        swiglu_backward_columns(
            acc, h_ptr, dh_ptr, a_ptr, partial_ptr, offs_row, mask_m, weight, column,
            stride_hm, stride_am, total, I, STORE_DH, STORE_A, PART, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def load_routed(
    x, order_ptr, begin, end, k, stride, column, N, IS_GATHERED: tl.constexpr,
    USE_TMA: tl.constexpr, TOP_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_K, BLOCK_N]`` of the rows from begin + k on, in the order of the sort or, gathered,
    of the tokens behind it; zero from row ``end`` on.

    ``USE_TMA`` (not gathered): a descriptor by ``launch.bounded_descriptor``.
    """
    if USE_TMA and not IS_GATHERED:
        at = [1 << 30, end, (1 << 30) - (end - begin) + k, column]
        return x.load(at).reshape(BLOCK_K, BLOCK_N)
    else:
        offs_n = column + tl.arange(0, BLOCK_N)
        rows = begin + k + tl.arange(0, BLOCK_K)
        in_rows = rows < end
        if IS_GATHERED:
            rows = tl.load(order_ptr + rows, mask=in_rows, other=0) // TOP_K
        at = x + rows.to(tl.int64)[:, None] * stride + offs_n[None, :]
        if EVEN_N:
            mask = in_rows[:, None]
        else:
            mask = in_rows[:, None] & (offs_n < N)[None, :]
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def add_columns(
    value, out_ptr, offs_row, mask_m, column, N, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Write or add a tile to the columns from ``column`` on; added ``PART`` columns at a time: more
    would not fit the registers beside the accumulator.
    """
    if ACCUMULATE and BLOCK_N > PART:
        half: tl.constexpr = BLOCK_N // 2
        left, right = two_halves(value, BLOCK_M, half)
        add_columns(
            left, out_ptr, offs_row, mask_m, column, N, ACCUMULATE, BLOCK_M, half, PART
        )  # fmt: skip
        add_columns(
            right, out_ptr, offs_row, mask_m, column + half, N, ACCUMULATE, BLOCK_M, half, PART
        )  # fmt: skip
    else:
        offs_n = column + tl.arange(0, BLOCK_N)
        at = out_ptr + offs_row[:, None] * N + offs_n[None, :]
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        if ACCUMULATE:
            value += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient_kernel(
    left, right, out_ptr, order_ptr, offsets_ptr, stride_lm, stride_rm, M, N, E,
    GATHER_LEFT: tl.constexpr, TOP_K: tl.constexpr, ACCUMULATE: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    USE_TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """out[e] ``[M, N]`` = left_e^T right_e over the rows of expert e; 0 where it has none.

    One of the operands is in the order of the sort, the other one in that of the tokens. Rows past
    the expert's end are 0 in both, not multiplied by 0: they are another expert's, and may hold
    NaN.
    """
    n_m, n_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), E * n_m * n_n, NUM_PROGRAMS):
        expert = tile // (n_m * n_n)
        m, n = swizzled_tile(tile % (n_m * n_n), n_m, n_n, GROUP_M)
        begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        row, column = m * BLOCK_M, n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, end - begin, BLOCK_K):
            a = load_routed(
                left, order_ptr, begin, end, k, stride_lm, row, M, GATHER_LEFT, USE_TMA, TOP_K,
                EVEN_M, BLOCK_K, BLOCK_M,
            )  # fmt: skip
            b = load_routed(
                right, order_ptr, begin, end, k, stride_rm, column, N, not GATHER_LEFT, USE_TMA,
                TOP_K, EVEN_N, BLOCK_K, BLOCK_N,
            )  # fmt: skip
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        offs_row = tl.cast(expert, tl.int64) * M + row + tl.arange(0, BLOCK_M)
        mask_m = row + tl.arange(0, BLOCK_M) < M
        add_columns(acc, out_ptr, offs_row, mask_m, column, N, ACCUMULATE, BLOCK_M, BLOCK_N, 32)


@triton.jit(do_not_specialize=["total", "ids_ptr"])
def sum_shares_kernel(
    partial_ptr, inverse_ptr, ids_ptr, out_ptr, total, n_parts, E, BLOCK: tl.constexpr
):  # fmt: skip
    """dweight of every slot: its shares in ascending order of columns; 0 where it has no row."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < total
    expert = tl.load(ids_ptr + slot, mask=mask, other=-1)
    live = (expert >= 0) & (expert < E)
    row = tl.load(inverse_ptr + slot, mask=live, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    at = partial_ptr + row
    for _ in range(n_parts):
        acc += tl.load(at, mask=live, other=0.0)
        at += total
    tl.store(out_ptr + slot, acc, mask=mask)
