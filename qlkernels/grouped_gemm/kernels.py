"""Triton kernels over rows sorted by expert: the products of the forward pass, and the combine.

A *tile map* lists the row tiles of one chunk of tokens: expert, first sorted row, rows that count,
first row of the chunk's workspace. It is made on the device, so the host never learns how many rows
an expert got; persistent programs walk it. Every element of a product is one chain of fp32
additions over K, whatever the tile, so its bits do not depend on which other rows are there.

A gathered operand comes through pointers (no copy engine of sm_90 gathers), weights by the copy
engine on sm_90 and later (``USE_TMA``).
"""

from __future__ import annotations

from qlkernels._online import swizzled_tile
from qlkernels._triton import tl, triton


@triton.jit
def lower_bound(order_ptr, first, last, slot, steps):
    """Per lane: the first position of [first, last) whose slot is at least ``slot``."""
    for _ in range(steps):
        active = first < last
        middle = first + (last - first) // 2
        before = active & (tl.load(order_ptr + middle, mask=active, other=0) < slot)
        last = tl.where(active & (before == 0), middle, last)
        first = tl.where(before, middle + 1, first)
    return first


@triton.jit(do_not_specialize=["first_slot", "last_slot", "steps", "max_tiles"])
def tile_map_kernel(
    offsets_ptr, order_ptr, tiles_ptr, n_tiles_ptr, shift_ptr,
    first_slot, last_slot, steps, max_tiles, E,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Tile map of the slots [first_slot, last_slot): ``tiles [4, max_tiles]``, their number, and
    per expert what turns a sorted row into a row of the workspace.

    The sort is stable, so the slots of a chunk are one run of each expert's rows.
    """
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    first = tl.load(offsets_ptr + offs_e, mask=mask_e, other=0)
    last = tl.load(offsets_ptr + offs_e + 1, mask=mask_e, other=0)
    if not WHOLE:
        begin, end = first, last
        first = lower_bound(order_ptr, begin, end, first_slot, steps)
        last = lower_bound(order_ptr, begin, end, last_slot, steps)
    rows = last - first
    local = tl.cumsum(rows, 0) - rows
    n_tiles = tl.cdiv(rows, BLOCK_M)
    tile_end = tl.cumsum(n_tiles, 0)
    tile_begin = tile_end - n_tiles
    if tl.program_id(0) == 0:
        tl.store(n_tiles_ptr, tl.sum(n_tiles, 0))
        tl.store(shift_ptr + offs_e, local - first, mask=mask_e)
    tile = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    mine = (tile[:, None] >= tile_begin[None, :]) & (tile[:, None] < tile_end[None, :])
    expert = tl.sum(tl.where(mine, offs_e[None, :], 0), 1)
    skipped = BLOCK_M * (tile - tl.sum(tl.where(mine, tile_begin[None, :], 0), 1))
    exists = tile < tl.sum(n_tiles, 0)
    out = tiles_ptr + tile
    tl.store(out, expert, mask=exists)
    row = tl.sum(tl.where(mine, first[None, :], 0), 1) + skipped
    tl.store(out + max_tiles, row, mask=exists)
    left = tl.sum(tl.where(mine, rows[None, :], 0), 1) - skipped
    tl.store(out + 2 * max_tiles, tl.minimum(left, BLOCK_M), mask=exists)
    at = tl.sum(tl.where(mine, local[None, :], 0), 1) + skipped
    tl.store(out + 3 * max_tiles, at, mask=exists)


@triton.jit
def load_tile(tiles_ptr, max_tiles, m):
    """Expert, first sorted row, number of rows and first workspace row of row tile ``m``."""
    entry = tiles_ptr + m
    expert, row = tl.load(entry), tl.load(entry + max_tiles)
    return expert, row, tl.load(entry + 2 * max_tiles), tl.load(entry + 3 * max_tiles)


@triton.jit
def load_rows(x, offs_row, stride, k, K, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[rows, BLOCK_K]`` of a row-major matrix, zero beyond K. Every row must exist."""
    offs_k = k + tl.arange(0, BLOCK_K)
    at = x + offs_row[:, None] * stride + offs_k[None, :]
    if EVEN_K:
        return tl.load(at)
    return tl.load(at, mask=(offs_k < K)[None, :], other=0.0)


@triton.jit
def two_halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``[M, 2 N]`` to its left and right ``[M, N]``, in registers."""
    return x.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()


@triton.jit
def store_columns(
    value, out_ptr, offs_row, mask_m, stride, column, N, BLOCK_N: tl.constexpr
):  # fmt: skip
    """``[rows, BLOCK_N]`` to the columns from ``column`` on, in the dtype of ``out_ptr``."""
    offs_n = column + tl.arange(0, BLOCK_N)
    at = out_ptr + offs_row[:, None] * stride + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_gate_up(
    gate, up, a_ptr, h_ptr, sorted_row, local_row, mask_m, stride_am, stride_hm, column, I,  # noqa: E741
    STORE_A: tl.constexpr, STORE_H: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The columns from ``column`` on of h, both halves of it, and of a."""
    if STORE_H:
        at = sorted_row.to(tl.int64)
        store_columns(gate, h_ptr, at, mask_m, stride_hm, column, I, BLOCK_N)
        store_columns(up, h_ptr + I, at, mask_m, stride_hm, column, I, BLOCK_N)
    if STORE_A:
        a = gate * tl.sigmoid(gate) * up
        store_columns(a, a_ptr, local_row.to(tl.int64), mask_m, stride_am, column, I, BLOCK_N)


@triton.jit(do_not_specialize=["max_tiles"])
def gate_up_kernel(
    x, w, a_ptr, h_ptr, order_ptr, tiles_ptr, n_tiles_ptr,
    stride_xt, stride_am, stride_hm, max_tiles, H, I,  # noqa: E741
    TOP_K: tl.constexpr, IS_GATHERED: tl.constexpr, STORE_A: tl.constexpr, STORE_H: tl.constexpr,
    EVEN_K: tl.constexpr, USE_TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """h = x W_gate_up^T of every routed row, and a = silu(gate) * up from the fp32 accumulator.

    A tile is BLOCK_N columns of gate and the same of up, one accumulator: two of them would make
    ptxas serialise every wgmma. ``IS_GATHERED``: x is already in the order of the workspace.
    """
    n_m = tl.load(n_tiles_ptr)
    n_n = tl.cdiv(I, BLOCK_N)
    for tile in tl.range(tl.program_id(0), n_m * n_n, NUM_PROGRAMS, flatten=USE_TMA):
        m, n = swizzled_tile(tile, n_m, n_n, GROUP_M)
        expert, row, rows, local = load_tile(tiles_ptr, max_tiles, m)
        column = n * BLOCK_N
        offs_m = tl.arange(0, BLOCK_M)
        mask_m = offs_m < rows
        if not IS_GATHERED:
            slot = tl.load(order_ptr + row + offs_m, mask=mask_m, other=0)
            token = (slot // TOP_K).to(tl.int64)
        offs_b = tl.arange(0, 2 * BLOCK_N)
        column_b = column + offs_b % BLOCK_N  # [gate | up]
        row_b = (offs_b // BLOCK_N) * I + column_b
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        for k in range(0, H, BLOCK_K):
            if IS_GATHERED:
                a = x.load([local, k])
            else:
                a = load_rows(x, token, stride_xt, k, H, EVEN_K, BLOCK_K)
            if USE_TMA:
                b = w.load([2 * expert, column, k]).reshape(2 * BLOCK_N, BLOCK_K)
            else:
                offs_k = k + tl.arange(0, BLOCK_K)
                at = expert.to(tl.int64) * 2 * I + tl.where(column_b < I, row_b, 0)
                b = tl.load(w + at[:, None] * H + offs_k[None, :], mask=(offs_k < H)[None, :],
                            other=0.0)  # fmt: skip
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

        # in two parts: fewer registers, and half of the shared memory to reorder a part
        half: tl.constexpr = BLOCK_N // 2
        gate, up = two_halves(acc, BLOCK_M, BLOCK_N)
        gate_left, gate_right = two_halves(gate, BLOCK_M, half)
        up_left, up_right = two_halves(up, BLOCK_M, half)
        store_gate_up(
            gate_left, up_left, a_ptr, h_ptr, row + offs_m, local + offs_m, mask_m, stride_am,
            stride_hm, column, I, STORE_A, STORE_H, half,
        )  # fmt: skip
        store_gate_up(
            gate_right, up_right, a_ptr, h_ptr, row + offs_m, local + offs_m, mask_m, stride_am,
            stride_hm, column + half, I, STORE_A, STORE_H, half,
        )  # fmt: skip


@triton.jit(do_not_specialize=["max_tiles"])
def gather_kernel(
    x_ptr, out_ptr, order_ptr, tiles_ptr, n_tiles_ptr, stride_xt, stride_om, max_tiles, H,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Copy the tokens of every routed row into the order of the workspace, ROWS rows a program."""
    m = tl.program_id(0) // (BLOCK_M // ROWS)
    if m < tl.load(n_tiles_ptr):
        _, row, rows, local = load_tile(tiles_ptr, max_tiles, m)
        offs_m = tl.program_id(0) % (BLOCK_M // ROWS) * ROWS + tl.arange(0, ROWS)
        mask_m = offs_m < rows
        slot = tl.load(order_ptr + row + offs_m, mask=mask_m, other=0)
        source = x_ptr + (slot // TOP_K).to(tl.int64)[:, None] * stride_xt
        target = out_ptr + (local + offs_m).to(tl.int64)[:, None] * stride_om
        for start in range(0, H, BLOCK_H):
            offs_h = (start + tl.arange(0, BLOCK_H))[None, :]
            mask = mask_m[:, None] & (offs_h < H)
            tl.store(target + offs_h, tl.load(source + offs_h, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["max_tiles"])
def product_kernel(
    x, w, out_ptr, tiles_ptr, n_tiles_ptr, stride_xm, stride_om, max_tiles, N, K,
    FROM_WORKSPACE: tl.constexpr, IS_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr, USE_TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Workspace rows = x W_e^T with W ``[E, N, K]``, or x W_e with W ``[E, K, N]``
    (``IS_TRANSPOSED``); x has the order of the sort or, ``FROM_WORKSPACE``, of the workspace.
    """
    n_m = tl.load(n_tiles_ptr)
    n_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), n_m * n_n, NUM_PROGRAMS, flatten=USE_TMA):
        m, n = swizzled_tile(tile, n_m, n_n, GROUP_M)
        expert, row, rows, local = load_tile(tiles_ptr, max_tiles, m)
        if FROM_WORKSPACE:
            row = local
        column = n * BLOCK_N
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = column + tl.arange(0, BLOCK_N)
        mask_m = offs_m < rows
        offs_x = (row + tl.where(mask_m, offs_m, 0)).to(tl.int64)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            if USE_TMA:
                a = x.load([row, k])
                if IS_TRANSPOSED:
                    b = w.load([expert, k, column]).reshape(BLOCK_K, BLOCK_N)
                else:
                    b = w.load([expert, column, k]).reshape(BLOCK_N, BLOCK_K).T
            else:
                a = load_rows(x, offs_x, stride_xm, k, K, EVEN_K, BLOCK_K)
                offs_k = k + tl.arange(0, BLOCK_K)
                mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
                w_e = w + expert.to(tl.int64) * N * K
                if IS_TRANSPOSED:
                    at = w_e + offs_k[:, None] * N + offs_n[None, :]
                else:
                    at = w_e + offs_n[None, :] * K + offs_k[:, None]
                b = tl.load(at, mask=mask, other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        # in two parts: half of the shared memory to reorder it
        half: tl.constexpr = BLOCK_N // 2
        left, right = two_halves(acc, BLOCK_M, half)
        offs_row = (local + offs_m).to(tl.int64)
        store_columns(left, out_ptr, offs_row, mask_m, stride_om, column, N, half)
        store_columns(right, out_ptr, offs_row, mask_m, stride_om, column + half, N, half)


@triton.jit(do_not_specialize=["first_token", "ids_ptr", "weights_ptr"])
def combine_kernel(
    rows_ptr, inverse_ptr, ids_ptr, weights_ptr, shift_ptr, residual_ptr, out_ptr,
    stride_rm, stride_rt, stride_ot, first_token, H, E,
    TOP_K: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j weight[t, j] rows[position of (t, j)] (+ residual[t]), j ascending, in fp32.

    A slot whose expert is not in [0, E) has no row: it adds nothing.
    """
    n_h = tl.cdiv(H, BLOCK_H)
    t = (first_token + tl.program_id(0) // n_h).to(tl.int64)
    offs_h = (tl.program_id(0) % n_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < H
    acc = tl.zeros([BLOCK_H], tl.float32)
    for j in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + t * TOP_K + j)
        live = (expert >= 0) & (expert < E)
        shift = tl.load(shift_ptr + expert, mask=live, other=0)
        row = (tl.load(inverse_ptr + t * TOP_K + j) + shift).to(tl.int64)
        value = tl.load(rows_ptr + row * stride_rm + offs_h, mask=live & mask_h, other=0.0)
        value = value.to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights_ptr + t * TOP_K + j, mask=live, other=0.0)
        acc += value
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + t * stride_rt + offs_h, mask=mask_h, other=0.0)
        acc += residual.to(tl.float32)
    tl.store(out_ptr + t * stride_ot + offs_h, acc.to(out_ptr.dtype.element_ty), mask=mask_h)
