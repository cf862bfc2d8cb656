"""Triton kernels. A program takes a run of consecutive tokens; what it adds up over them goes to a
row of its own, and a second kernel adds the rows in order: no atomics, the same bits on every run.
"""

from __future__ import annotations

import torch

from qlkernels._triton import cdiv, next_power_of_2, tl, triton

_MOST_PARTS = 1024  # rows of partial sums
_TAKEN = tl.constexpr(-(2**31))  # below the key of every logit
# how weights are rounded
_ROUNDING = {None: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# --- routing -----------------------------------------------------------------


@triton.jit
def _sort_key(x):
    """int32 keys in the order of the logits: -0 equals 0, every NaN is the same and the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, key, 0x7FFFFFFF)


@triton.jit
def _round_weights(w, ROUNDING: tl.constexpr):
    if ROUNDING == 1:
        return w.to(tl.float16).to(tl.float32)
    if ROUNDING == 2:
        # to nearest, ties to even; in integers, because the interpreter's own cast truncates
        bits = w.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(w == w, bits.to(tl.float32, bitcast=True), w)
    return w


@triton.jit(do_not_specialize=["T", "tiles", "replay_ptr"])
def _moe_route_fwd_kernel(
    logits_ptr,
    replay_ptr,
    weights_ptr,
    ids_ptr,
    part_probs_ptr,
    part_counts_ptr,
    stride_t,
    T,
    tiles,
    E,
    top_k,
    NORM: tl.constexpr,
    HAS_REPLAY: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``tiles`` tiles of ``BLOCK_T`` tokens a program; each round of the selection takes the best
    expert left.
    """
    pid = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    mask_e = offs_e < E
    probs = tl.zeros([BLOCK_E], tl.float32)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for tile in range(0, tiles):
        offs_t = (pid * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)  # int64
        mask_t = offs_t < T
        mask = mask_t[:, None] & mask_e[None, :]
        row_ptr = logits_ptr + offs_t[:, None] * stride_t
        x = tl.load(row_ptr + offs_e[None, :], mask=mask, other=0.0).to(tl.float32)
        key = tl.where(mask_e[None, :], _sort_key(x), _TAKEN)
        slots = offs_t[:, None] * top_k + offs_k[None, :]  # [BLOCK_T, BLOCK_K]
        mask_k = mask_t[:, None] & (offs_k < top_k)[None, :]
        known = offs_t < 0
        is_bad = offs_t < 0
        if HAS_REPLAY:
            given = tl.load(replay_ptr + slots, mask=mask_k, other=0)
            outside = tl.sum(((given < 0) | (given >= E)).to(tl.int32), 1)
            known = outside == 0
            is_bad = (outside > 0) & (tl.sum((mask_k & (given != -1)).to(tl.int32), 1) > 0)

        ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
        picks = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        for k in range(0, top_k):
            live = tl.argmax(key, 1, tie_break_left=True)
            key = tl.where(offs_e[None, :] == live[:, None], _TAKEN, key)
            is_k = (offs_k == k)[None, :]
            expert = live
            if HAS_REPLAY:  # read again: kept for the loop, the ids of a tile cost registers
                given_k = tl.load(replay_ptr + offs_t * top_k + k, mask=mask_t, other=0)
                expert = tl.where(known, given_k.to(tl.int32), live)
            hit = offs_e[None, :] == expert[:, None]
            picks += hit.to(tl.int32)
            ids = tl.where(is_k, expert[:, None], ids)

        chosen = tl.load(row_ptr + ids, mask=mask_k, other=-float("inf")).to(tl.float32)
        x = tl.where(mask_e[None, :], x, -float("inf"))
        m = tl.max(x, 1)
        e = tl.exp(x - m[:, None])
        s = tl.sum(e, 1)
        if NORM:
            # relative to the largest chosen: replayed experts may all have p = 0 in fp32
            w = tl.exp(chosen - tl.max(chosen, 1)[:, None])
            w = w / tl.sum(w, 1)[:, None]
        else:
            w = tl.exp(chosen - m[:, None]) / s[:, None]
        w = tl.where(is_bad[:, None], float("nan"), _round_weights(w, ROUNDING))
        tl.store(weights_ptr + slots, w, mask=mask_k)
        tl.store(ids_ptr + slots, ids, mask=mask_k)
        probs += tl.sum(tl.where(mask, e / s[:, None], 0.0), 0)
        counts += tl.sum(tl.where(mask, picks, 0), 0)
    tl.store(part_probs_ptr + pid * E + offs_e, probs, mask=mask_e)
    tl.store(part_counts_ptr + pid * E + offs_e, counts, mask=mask_e)


@triton.jit(do_not_specialize=["parts"])
def _moe_totals_kernel(
    part_probs_ptr,
    part_counts_ptr,
    probs_ptr,
    counts_ptr,
    parts,
    E,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Column sums of the parts ``[parts, E]``, a few columns a program."""
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n = tl.arange(0, BLOCK_N)
    probs = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    counts = tl.zeros([BLOCK_N, BLOCK_E], tl.int32)
    for start in range(0, parts, BLOCK_N):
        mask = ((start + offs_n) < parts)[:, None] & (offs_e < E)[None, :]
        places = (start + offs_n)[:, None] * E + offs_e[None, :]
        probs += tl.load(part_probs_ptr + places, mask=mask, other=0.0)
        counts += tl.load(part_counts_ptr + places, mask=mask, other=0)
    tl.store(probs_ptr + offs_e, tl.sum(probs, 0), mask=offs_e < E)
    tl.store(counts_ptr + offs_e, tl.sum(counts, 0), mask=offs_e < E)


@triton.jit(do_not_specialize=["T", "ids_ptr", "dweights_ptr"])
def _moe_route_bwd_kernel(
    logits_ptr,
    ids_ptr,
    dweights_ptr,
    dprobs_ptr,
    dlogits_ptr,
    stride_t,
    T,
    E,
    top_k,
    NORM: tl.constexpr,
    HAS_DWEIGHTS: tl.constexpr,
    HAS_DPROBS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of tokens a program; a token without upstream gradient is written, not read."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = offs_t < T
    mask_e = offs_e < E
    slots = offs_t[:, None] * top_k + offs_k[None, :]
    mask_k = mask_t[:, None] & (offs_k < top_k)[None, :]
    upstream = tl.zeros([BLOCK_T], tl.int32)  # how many are not 0
    g = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    h = tl.zeros([BLOCK_E], tl.float32)
    if HAS_DWEIGHTS:
        g = tl.load(dweights_ptr + slots, mask=mask_k, other=0.0)
        upstream += tl.sum((g != 0.0).to(tl.int32), 1)
    if HAS_DPROBS:
        h = tl.load(dprobs_ptr + offs_e, mask=mask_e, other=0.0)
        upstream += tl.sum((h != 0.0).to(tl.int32), 0)
    live = mask_t & (upstream > 0)

    row_ptr = logits_ptr + offs_t[:, None] * stride_t
    mask = live[:, None] & mask_e[None, :]
    x = tl.load(row_ptr + offs_e[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask_e[None, :], x, -float("inf"))  # [BLOCK_T, BLOCK_E]
    m = tl.max(x, 1)
    e = tl.exp(x - m[:, None])
    s = tl.sum(e, 1)
    p = e / s[:, None]
    dx = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if HAS_DWEIGHTS:
        ids = tl.load(ids_ptr + slots, mask=mask_k, other=0)
        chosen = tl.load(row_ptr + ids, mask=mask_k & live[:, None], other=0.0).to(tl.float32)
        chosen = tl.where((offs_k < top_k)[None, :], chosen, -float("inf"))
        if NORM:
            w = tl.exp(chosen - tl.max(chosen, 1)[:, None])
            w = w / tl.sum(w, 1)[:, None]
        else:
            w = tl.exp(chosen - m[:, None]) / s[:, None]
        mean = tl.sum(g * w, 1)  # [BLOCK_T]
        share = g
        if NORM:
            share = w * (g - mean[:, None])
        for k in range(0, top_k):
            is_k = (offs_k == k)[None, :]
            expert = tl.sum(tl.where(is_k, ids, 0), 1)
            value = tl.sum(tl.where(is_k, share, 0.0), 1)
            dx += tl.where(offs_e[None, :] == expert[:, None], value[:, None], 0.0)
        if not NORM:
            dx = p * (dx - mean[:, None])
    if HAS_DPROBS:
        dx += p * (h[None, :] - tl.sum(p * h[None, :], 1)[:, None])
    dx = tl.where(live[:, None], dx, 0.0)
    places = offs_t[:, None] * E + offs_e[None, :]
    dx = dx.to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + places, dx, mask=mask_t[:, None] & mask_e[None, :])


# --- index -------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "tiles"])
def _count_experts_kernel(
    ids_ptr,
    counts_ptr,
    T,
    tiles,
    E,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rows of every expert in one chunk of ``tiles`` tiles of rows; rows of no expert are not
    counted.

    A chunk is counted in tiles and the rows in tokens, so that the compiler knows what divides them
    for every T, and loads vectors.
    """
    pid = tl.program_id(0).to(tl.int64)  # the last tile may reach past 2^31
    rows, chunk = T * TOP_K, tiles * BLOCK_R
    offs_e = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, chunk, BLOCK_R):
        offs_r = pid * chunk + start + tl.arange(0, BLOCK_R)
        ids = tl.load(ids_ptr + offs_r, mask=offs_r < rows, other=-1)
        counts += tl.sum((ids[:, None] == offs_e[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + pid * E + offs_e, counts, mask=offs_e < E)


@triton.jit(do_not_specialize=["parts"])
def _scan_counts_kernel(
    counts_ptr, totals_ptr, parts, E, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Counts ``[parts, E]`` become how many rows of the expert came in earlier parts."""
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n = tl.arange(0, BLOCK_N)
    before = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, parts, BLOCK_N):
        mask = ((start + offs_n) < parts)[:, None] & (offs_e < E)[None, :]
        places = (start + offs_n)[:, None] * E + offs_e[None, :]
        counts = tl.load(counts_ptr + places, mask=mask, other=0)
        earlier = before[None, :] + tl.cumsum(counts, 0) - counts
        tl.store(counts_ptr + places, earlier, mask=mask)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + offs_e, before, mask=offs_e < E)


@triton.jit(do_not_specialize=["T", "tiles"])
def _sort_rows_kernel(
    ids_ptr,
    before_ptr,
    totals_ptr,
    sort_order_ptr,
    inverse_order_ptr,
    offsets_ptr,
    T,
    tiles,
    E,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One chunk of rows to their places: behind all smaller experts, the expert's rows of earlier
    chunks, and its earlier rows of this chunk.
    """
    pid = tl.program_id(0).to(tl.int64)  # the last tile may reach past 2^31
    rows, chunk = T * TOP_K, tiles * BLOCK_R
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    totals = tl.load(totals_ptr + offs_e, mask=mask_e, other=0)
    ends = tl.cumsum(totals, 0)
    if pid == 0:
        tl.store(offsets_ptr + 1 + offs_e, ends, mask=mask_e)
        tl.store(offsets_ptr + offs_e, ends - totals, mask=offs_e < 1)
    before = tl.load(before_ptr + pid * E + offs_e, mask=mask_e, other=0)
    first = ends - totals + before  # [BLOCK_E]: the place of the expert's next row
    # rows of no expert come last, in their order
    last = tl.sum(totals, 0) + pid * chunk - tl.sum(before, 0)
    for start in range(0, chunk, BLOCK_R):
        offs_r = pid * chunk + start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < rows
        ids = tl.load(ids_ptr + offs_r, mask=mask_r, other=-1)
        is_mine = (ids[:, None] == offs_e[None, :]) & mask_e[None, :]  # [BLOCK_R, BLOCK_E]
        ones = is_mine.to(tl.int32)
        place = tl.sum(tl.where(is_mine, first[None, :] + tl.cumsum(ones, 0) - 1, 0), 1)
        is_nobodys = (mask_r & ((ids < 0) | (ids >= E))).to(tl.int32)
        place = tl.where(is_nobodys > 0, last + tl.cumsum(is_nobodys, 0) - 1, place)
        tl.store(inverse_order_ptr + offs_r, place, mask=mask_r)
        tl.store(sort_order_ptr + place, offs_r, mask=mask_r)
        first += tl.sum(ones, 0)
        last += tl.sum(is_nobodys, 0)


# --- launches ----------------------------------------------------------------

_WARPS = 4
_COLUMNS = dict(BLOCK_N=128, BLOCK_E=16)  # of the kernels that go down the columns


# Elements of a tile: the routing kernels hold a tile several times over in registers.
_ROUTE_TILE, _INDEX_TILE = 2048, 4096


def _blocks(E: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of a tile; the same for every T, so that a row's bits do not depend on how
    many there are.
    """
    block_e = max(16, next_power_of_2(E))
    return max(1, min(64, elements // block_e)), block_e


def route(
    router_logits: torch.Tensor,
    replay_ids: torch.Tensor | None,
    norm_topk_prob: bool,
    weights_dtype: torch.dtype | None,
    topk_weights: torch.Tensor,
    prob_sums: torch.Tensor,
    topk_ids: torch.Tensor,
    tokens_per_expert: torch.Tensor,
) -> None:
    """Fill the last four."""
    T, E = router_logits.shape
    top_k = topk_ids.shape[1]
    block_t, block_e = _blocks(E, _ROUTE_TILE)
    tiles = max(1, cdiv(T, block_t * _MOST_PARTS))
    parts = cdiv(T, block_t * tiles)
    part_probs = torch.empty(parts, E, dtype=torch.float32, device=router_logits.device)
    part_counts = torch.empty(parts, E, dtype=torch.int32, device=router_logits.device)
    if T > 0:
        _moe_route_fwd_kernel[(parts,)](
            router_logits,
            replay_ids,
            topk_weights,
            topk_ids,
            part_probs,
            part_counts,
            router_logits.stride(0),
            T,
            tiles,
            E,
            top_k,
            NORM=norm_topk_prob,
            HAS_REPLAY=replay_ids is not None,
            ROUNDING=_ROUNDING[weights_dtype],
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_K=next_power_of_2(top_k),
            num_warps=_WARPS,
        )
    _moe_totals_kernel[(cdiv(E, _COLUMNS["BLOCK_E"]),)](
        part_probs, part_counts, prob_sums, tokens_per_expert, parts, E, **_COLUMNS
    )


def route_backward(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor,
    norm_topk_prob: bool,
    dtopk_weights: torch.Tensor | None,
    dprob_sums: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write the gradient with respect to ``router_logits`` into ``out``, which is contiguous."""
    T, E = router_logits.shape
    if T == 0:
        return
    top_k = topk_ids.shape[1]
    block_t, block_e = _blocks(E, _ROUTE_TILE)
    _moe_route_bwd_kernel[(cdiv(T, block_t),)](
        router_logits,
        topk_ids,
        dtopk_weights,
        dprob_sums,
        out,
        router_logits.stride(0),
        T,
        E,
        top_k,
        NORM=norm_topk_prob,
        HAS_DWEIGHTS=dtopk_weights is not None,
        HAS_DPROBS=dprob_sums is not None,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
        BLOCK_K=next_power_of_2(top_k),
        num_warps=_WARPS,
    )


def build_index(
    topk_ids: torch.Tensor,
    num_experts: int,
    sort_order: torch.Tensor,
    inverse_order: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> None:
    """Fill the last three."""
    rows = topk_ids.numel()
    if rows == 0:
        expert_offsets.zero_()
        return
    T, top_k = topk_ids.shape
    block_r, block_e = _blocks(num_experts, _INDEX_TILE)
    tiles = cdiv(max(512, cdiv(rows, _MOST_PARTS)), block_r)
    parts = cdiv(rows, tiles * block_r)
    options = dict(dtype=torch.int32, device=topk_ids.device)
    counts = torch.empty(parts, num_experts, **options)
    totals = torch.empty(num_experts, **options)
    blocks = dict(TOP_K=top_k, BLOCK_R=block_r, BLOCK_E=block_e, num_warps=_WARPS)
    _count_experts_kernel[(parts,)](topk_ids, counts, T, tiles, num_experts, **blocks)
    _scan_counts_kernel[(cdiv(num_experts, _COLUMNS["BLOCK_E"]),)](
        counts, totals, parts, num_experts, **_COLUMNS
    )
    _sort_rows_kernel[(parts,)](
        topk_ids, counts, totals, sort_order, inverse_order, expert_offsets, T, tiles,
        num_experts, **blocks,
    )  # fmt: skip


def aot_variants():
    """Every kernel as it is launched for bf16 logits and 128 experts: (name, kernel, signature,
    constexprs, aligned, options).
    """
    block_t, block_e = _blocks(128, _ROUTE_TILE)
    tile = dict(BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=8)
    sizes = dict(stride_t="i64", T="i32", tiles="i32", E="i32", top_k="i32")
    aligned = ("logits_ptr", "stride_t", "E")
    found = []
    rows = dict(
        logits_ptr="*bf16", replay_ptr="*i32", weights_ptr="*fp32", ids_ptr="*i32",
        part_probs_ptr="*fp32", part_counts_ptr="*i32",
    )  # fmt: skip
    for replay in (False, True):
        flags = dict(NORM=True, HAS_REPLAY=replay, ROUNDING=2)
        name = f"moe_route_fwd-replay{int(replay)}"
        found.append((name, _moe_route_fwd_kernel, rows | sizes, flags | tile, aligned, {}))
    flags = dict(NORM=True, HAS_DWEIGHTS=True, HAS_DPROBS=True)
    grads = dict(
        logits_ptr="*bf16", ids_ptr="*i32", dweights_ptr="*fp32", dprobs_ptr="*fp32",
        dlogits_ptr="*bf16",
    )  # fmt: skip
    for norm in (False, True):
        constexprs = flags | dict(NORM=norm) | tile
        name = f"moe_route_bwd-norm{int(norm)}"
        found.append((name, _moe_route_bwd_kernel, grads | sizes, constexprs, aligned, {}))
    parts = dict(
        part_probs_ptr="*fp32", part_counts_ptr="*i32", probs_ptr="*fp32", counts_ptr="*i32",
        totals_ptr="*i32", parts="i32", E="i32",
    )  # fmt: skip
    found.append(("moe_totals", _moe_totals_kernel, parts, _COLUMNS, ("E",), {}))
    found.append(("scan_counts", _scan_counts_kernel, parts, _COLUMNS, ("E",), {}))
    block_r, block_e = _blocks(128, _INDEX_TILE)
    blocks = dict(TOP_K=8, BLOCK_R=block_r, BLOCK_E=block_e)
    index = dict(
        ids_ptr="*i32", counts_ptr="*i32", before_ptr="*i32", totals_ptr="*i32",
        sort_order_ptr="*i32", inverse_order_ptr="*i32", offsets_ptr="*i32", T="i32",
        tiles="i32", E="i32",
    )  # fmt: skip
    aligned = ("ids_ptr", "counts_ptr", "before_ptr", "E")
    found.append(("count_experts", _count_experts_kernel, index, blocks, aligned, {}))
    found.append(("sort_rows", _sort_rows_kernel, index, blocks, aligned, {}))
    return found
