"""Triton kernels of the policy loss.

Work is cut into tiles of BLOCK rows that never cross a sequence. Sequence i owns the tiles from
cu[i] // BLOCK + i up to cu[i + 1] // BLOCK + i + 1, some of them empty, so that a program knows its
sequence after one look at cu_seqlens and no count ever goes to the host. The rows past the last
sequence belong to a sequence B in which nothing counts.

    [_log_ratio_kernel]  tiles      sums of l - l_old, only for a sequence-level ratio
    _loss_kernel         tiles      g = dL/dl of every row, and a column of statistics a tile
    _sequence_kernel     sequences  tile columns -> sequence columns, in tile order
    _finish_kernel       one        sequence columns -> loss, metrics, 1 / denominator
    _grad_kernel         tiles      dlogprobs = upstream / denominator * a_i * (g + c_i), dentropy

A rule's weight is w_t = a_i / denominator, so that g is stored before either is known.
"""

from __future__ import annotations

import torch

from qlkernels._triton import tl, triton

# Statistics of a tile: sums in rows 0 to 10, then the least and the largest ratio.
RESPONSE = tl.constexpr(0)
KEPT = tl.constexpr(1)
LOSS = tl.constexpr(2)
RATIO_GRADIENT = tl.constexpr(3)  # sum of w dL/d(log s): reaches every row of the sequence
LIVE = tl.constexpr(4)
CLIP_LOW = tl.constexpr(5)
CLIP_HIGH = tl.constexpr(6)
CLIP_CAP = tl.constexpr(7)
KL = tl.constexpr(8)
ENTROPY = tl.constexpr(9)
RATIO = tl.constexpr(10)
RATIO_MIN = tl.constexpr(11)
RATIO_MAX = tl.constexpr(12)
TILE_ROWS = 13
# Statistics of a sequence: as above up to RATIO, then one value a sequence, then the extremes.
SEQUENCE_ENTROPY = tl.constexpr(11)
HAS_RESPONSE = tl.constexpr(12)
HAS_COUNTED = tl.constexpr(13)
SEQUENCE_RATIO_MIN = tl.constexpr(14)
SEQUENCE_RATIO_MAX = tl.constexpr(15)
SEQUENCE_ROWS = 16

LIMIT = tl.constexpr(20.0)  # nats: LOG_RATIO_LIMIT of the reference


@triton.jit
def _locate(tile, cu_ptr, T, B, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """Sequence of a tile, its first row, and the end of that sequence."""
    found = 0
    for first in range(0, B + 1, SEARCH):
        j = first + tl.arange(0, SEARCH)
        cu = tl.load(cu_ptr + j, mask=j <= B, other=0).to(tl.int64)
        found += tl.sum(((cu // BLOCK + j <= tile) & (j <= B)).to(tl.int32), 0)
    i = found - 1
    begin = tl.load(cu_ptr + i).to(tl.int64)
    end = tl.load(cu_ptr + i + 1, mask=i < B, other=0).to(tl.int64)
    end = tl.where(i < B, end, T)
    return i, begin + (tile - begin // BLOCK - i) * BLOCK, end


@triton.jit
def _first_tile(i, cu_ptr, BLOCK: tl.constexpr):
    return tl.load(cu_ptr + i).to(tl.int64) // BLOCK + i


@triton.jit
def _row_sum(x_ptr, first, last, CHUNK: tl.constexpr):
    """Sum of x[first:last], in a fixed order."""
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(first, last, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        total += tl.load(x_ptr + offs, mask=offs < last, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["T", "B", "n_tiles"])
def _log_ratio_kernel(
    logprobs_ptr, old_ptr, response_ptr, cu_ptr, sums_ptr, T, B, n_tiles,
    BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """sums[0] = tokens, sums[1] = sum of l - l_old, of each tile."""
    tile = tl.program_id(0).to(tl.int64)
    i, start, end = _locate(tile, cu_ptr, T, B, BLOCK, SEARCH)
    offs_t = start + tl.arange(0, BLOCK)
    mask_t = (offs_t < end) & (i < B)
    mask_t = mask_t & (tl.load(response_ptr + offs_t, mask=mask_t, other=0) != 0)
    logprobs = tl.load(logprobs_ptr + offs_t, mask=mask_t, other=0.0)
    old = tl.load(old_ptr + offs_t, mask=mask_t, other=0.0)
    tl.store(sums_ptr + tile, tl.sum(mask_t.to(tl.int32), 0).to(tl.float32))
    tl.store(sums_ptr + n_tiles + tile, tl.sum(logprobs - old, 0))


@triton.jit(
    do_not_specialize=[
        "T", "B", "n_tiles", "low", "high", "ratio_cap", "dual_clip", "kl_coef", "entropy_coef",
    ]
)  # fmt: skip
def _loss_kernel(
    logprobs_ptr, old_ptr, advantages_ptr, response_ptr, keep_ptr, ref_ptr, rollout_ptr,
    entropy_ptr, weights_ptr, cu_ptr, log_ratio_ptr, g_ptr, stats_ptr,
    T, B, n_tiles, low, high, ratio_cap, dual_clip, kl_coef, entropy_coef,
    IS_CISPO: tl.constexpr, IS_SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr,
    KEPT_ONLY: tl.constexpr, KL_ORDER: tl.constexpr, KL_IMPORTANCE: tl.constexpr,
    BLOCK: tl.constexpr, SEARCH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile: per-token loss, derivative and statistics. A None pointer is an absent input."""
    tile = tl.program_id(0).to(tl.int64)
    i, start, end = _locate(tile, cu_ptr, T, B, BLOCK, SEARCH)
    offs_t = start + tl.arange(0, BLOCK)
    inside_t = offs_t < end
    mask_t = inside_t & (i < B)
    # every other input is read through the mask: what it hides may be NaN
    mask_t = mask_t & (tl.load(response_ptr + offs_t, mask=mask_t, other=0) != 0)
    logprobs = tl.load(logprobs_ptr + offs_t, mask=mask_t, other=0.0)
    if PER_TOKEN:
        A = tl.load(advantages_ptr + offs_t, mask=mask_t, other=0.0)
    else:
        A = tl.load(advantages_ptr + i, mask=i < B, other=0.0)
        A = tl.where(mask_t, A, 0.0)
    kept_t = mask_t
    if keep_ptr is not None:
        kept_t = mask_t & (tl.load(keep_ptr + offs_t, mask=mask_t, other=0) != 0)

    low = tl.cast(low, tl.float32)
    high = tl.cast(high, tl.float32)
    ratio_cap = tl.cast(ratio_cap, tl.float32)
    dual_clip = tl.cast(dual_clip, tl.float32)
    kl_coef = tl.cast(kl_coef, tl.float32)
    entropy_coef = tl.cast(entropy_coef, tl.float32)

    log_ratio = tl.zeros([BLOCK], tl.float32)
    if old_ptr is not None:
        if IS_SEQUENCE:
            first = _first_tile(tl.minimum(i, B - 1), cu_ptr, BLOCK)
            last = _first_tile(tl.minimum(i, B - 1) + 1, cu_ptr, BLOCK)
            n = _row_sum(log_ratio_ptr, first, last, CHUNK)
            log_ratio += _row_sum(log_ratio_ptr + n_tiles, first, last, CHUNK) / tl.maximum(n, 1.0)
        else:
            log_ratio = logprobs - tl.load(old_ptr + offs_t, mask=mask_t, other=0.0)
    follows = tl.abs(log_ratio) <= LIMIT
    ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -LIMIT), LIMIT))

    clip_low = ratio < low
    clip_high = ratio > high
    clip_cap = ratio < 0.0  # never: CISPO has no cap
    if IS_CISPO:
        weighted = tl.minimum(tl.maximum(ratio, low), high) * A
        pg = -weighted * logprobs
        dpg = -weighted
    else:
        capped = tl.minimum(ratio, ratio_cap)
        clipped = tl.minimum(tl.maximum(ratio, low), high)
        r = tl.where(A > 0, tl.minimum(capped, clipped), tl.maximum(capped, clipped))
        r = tl.where(A < 0, tl.minimum(r, dual_clip), r)
        pg = -A * r
        # r is the ratio itself or a bound: equality says which, and a bound has no gradient
        dpg = tl.where((r == ratio) & follows, -A * ratio, 0.0)
        clip_low = clip_low & (A < 0)
        clip_high = clip_high & (A > 0)
        clip_cap = mask_t & (A != 0) & (r != ratio) & ~clip_low & ~clip_high
    if rollout_ptr is not None:
        rollout = tl.load(rollout_ptr + offs_t, mask=mask_t, other=0.0)
        pg = pg * rollout
        dpg = dpg * rollout
    loss = tl.where(kept_t, pg, 0.0)
    dratio = tl.where(kept_t, dpg, 0.0)  # derivative through the ratio (CISPO: through l)
    g = tl.zeros([BLOCK], tl.float32)  # derivative of a row with respect to its own l alone

    kl = tl.zeros([BLOCK], tl.float32)
    if ref_ptr is not None:
        d = tl.load(ref_ptr + offs_t, mask=mask_t, other=0.0) - logprobs
        if KL_ORDER == 1:
            kl = -d
            dkl = tl.where(mask_t, 1.0, 0.0)
        elif KL_ORDER == 2:
            kl = 0.5 * d * d
            dkl = -d
        else:
            moves = tl.abs(d) <= LIMIT
            d = tl.minimum(tl.maximum(d, -LIMIT), LIMIT)
            # e^d - 1 - d cancels near 0: a series to d^7 there, whose error is below 1e-7 of the
            # sum
            series = 1.0 + d / 5.0 * (1.0 + d / 6.0 * (1.0 + d / 7.0))
            series = 1.0 + d / 3.0 * (1.0 + d / 4.0 * series)
            kl = tl.where(tl.abs(d) < 0.25, 0.5 * d * d * series, tl.exp(d) - 1.0 - d)
            dkl = tl.where(moves, -(kl + d), 0.0)
        if KL_IMPORTANCE:
            kl = ratio * kl
            dkl = ratio * dkl
            dratio += tl.where(mask_t & follows, kl_coef * kl, 0.0)
        loss += kl_coef * kl
        g = kl_coef * dkl
    entropy = tl.zeros([BLOCK], tl.float32)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + offs_t, mask=mask_t, other=0.0)
        loss -= entropy_coef * entropy

    counted_t = kept_t if KEPT_ONLY else mask_t
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + offs_t, mask=counted_t, other=0.0)
        loss = loss * weight
        dratio = dratio * weight
        g = g * weight
        counted_t = counted_t & (weight != 0)
    loss = tl.where(counted_t, loss, 0.0)
    dratio = tl.where(counted_t, dratio, 0.0)
    g = tl.where(counted_t, g, 0.0)
    if not IS_SEQUENCE:
        g = g + dratio
    tl.store(g_ptr + offs_t, g, mask=inside_t)

    live = (g != 0) | (tl.where(counted_t, entropy_coef, 0.0) != 0)
    column = stats_ptr + tile
    tl.store(column, tl.sum(mask_t.to(tl.int32), 0).to(tl.float32))
    tl.store(column + KEPT * n_tiles, tl.sum(kept_t.to(tl.int32), 0).to(tl.float32))
    tl.store(column + LOSS * n_tiles, tl.sum(loss, 0))
    tl.store(column + RATIO_GRADIENT * n_tiles, tl.sum(dratio, 0))
    tl.store(column + LIVE * n_tiles, tl.sum(live.to(tl.int32), 0).to(tl.float32))
    n_low = tl.sum((clip_low & mask_t).to(tl.int32), 0)
    n_high = tl.sum((clip_high & mask_t).to(tl.int32), 0)
    tl.store(column + CLIP_LOW * n_tiles, n_low.to(tl.float32))
    tl.store(column + CLIP_HIGH * n_tiles, n_high.to(tl.float32))
    tl.store(column + CLIP_CAP * n_tiles, tl.sum(clip_cap.to(tl.int32), 0).to(tl.float32))
    tl.store(column + KL * n_tiles, tl.sum(tl.where(mask_t, kl, 0.0), 0))
    tl.store(column + ENTROPY * n_tiles, tl.sum(entropy, 0))
    tl.store(column + RATIO * n_tiles, tl.sum(tl.where(mask_t, ratio, 0.0), 0))
    tl.store(column + RATIO_MIN * n_tiles, tl.min(tl.where(mask_t, ratio, float("inf")), 0))
    tl.store(column + RATIO_MAX * n_tiles, tl.max(tl.where(mask_t, ratio, -float("inf")), 0))


@triton.jit
def _pick(column, rows, row: tl.constexpr):
    return tl.sum(tl.where(rows == row, column, 0.0), 0)


@triton.jit(do_not_specialize=["B", "n_tiles"])
def _sequence_kernel(
    stats_ptr, cu_ptr, sequence_ptr, coef_ptr, B, n_tiles,
    SEQUENCE_MEAN: tl.constexpr, IS_SEQUENCE: tl.constexpr, KEPT_ONLY: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One sequence: sums its tiles; coef[0] = a_i, coef[1] = c_i."""
    i = tl.program_id(0).to(tl.int64)
    first = _first_tile(i, cu_ptr, BLOCK)
    last = _first_tile(i + 1, cu_ptr, BLOCK)
    rows = tl.arange(0, 16)
    sums = tl.zeros([16, CHUNK], tl.float32)
    least = tl.full([CHUNK], float("inf"), tl.float32)
    largest = tl.full([CHUNK], -float("inf"), tl.float32)
    for start in range(first, last, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        cells = stats_ptr + rows[:, None] * n_tiles + offs[None, :]
        sums += tl.load(cells, mask=(rows[:, None] <= RATIO) & (offs[None, :] < last), other=0.0)
        low = tl.load(stats_ptr + RATIO_MIN * n_tiles + offs, mask=offs < last, other=float("inf"))
        high = tl.load(
            stats_ptr + RATIO_MAX * n_tiles + offs, mask=offs < last, other=-float("inf")
        )
        least = tl.minimum(least, low)
        largest = tl.maximum(largest, high)
    column = tl.sum(sums, 1)  # [16]
    n = _pick(column, rows, RESPONSE)
    n_counted = _pick(column, rows, KEPT) if KEPT_ONLY else n
    a = 1.0
    if SEQUENCE_MEAN:
        a = tl.where(n_counted > 0, 1.0 / tl.maximum(n_counted, 1.0), 0.0)
    c = 0.0
    live = _pick(column, rows, LIVE)
    if IS_SEQUENCE:
        c = _pick(column, rows, RATIO_GRADIENT) / tl.maximum(n, 1.0)
        live = tl.where(c != 0, n, live)
    tl.store(coef_ptr + i, a)
    tl.store(coef_ptr + B + i, c)
    mean_entropy = _pick(column, rows, ENTROPY) / tl.maximum(n, 1.0)
    column = tl.where(rows == LOSS, column * a, column)
    column = tl.where(rows == LIVE, live, column)
    column = tl.where(rows == SEQUENCE_ENTROPY, mean_entropy, column)
    column = tl.where(rows == HAS_RESPONSE, tl.where(n > 0, 1.0, 0.0), column)
    column = tl.where(rows == HAS_COUNTED, tl.where(n_counted > 0, 1.0, 0.0), column)
    column = tl.where(rows == SEQUENCE_RATIO_MIN, tl.min(least, 0), column)
    column = tl.where(rows == SEQUENCE_RATIO_MAX, tl.max(largest, 0), column)
    tl.store(sequence_ptr + rows * B + i, column)


@triton.jit(do_not_specialize=["B", "scale"])
def _finish_kernel(
    sequence_ptr, count_ptr, loss_ptr, metrics_ptr, factor_ptr, B, scale,
    OVER_TOKENS: tl.constexpr, OVER_SEQUENCES: tl.constexpr, KEPT_ONLY: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_ENTROPY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: totals over sequences. factor = scale / denominator; metrics [12] in order."""
    rows = tl.arange(0, 16)
    sums = tl.zeros([16, CHUNK], tl.float32)
    least = tl.full([CHUNK], float("inf"), tl.float32)
    largest = tl.full([CHUNK], -float("inf"), tl.float32)
    for start in range(0, B, CHUNK):
        offs = (start + tl.arange(0, CHUNK)).to(tl.int64)
        mask = offs < B
        cells = sequence_ptr + rows[:, None] * B + offs[None, :]
        sums += tl.load(cells, mask=(rows[:, None] < SEQUENCE_RATIO_MIN) & mask[None, :], other=0.0)
        row = sequence_ptr + SEQUENCE_RATIO_MIN * B + offs
        least = tl.minimum(least, tl.load(row, mask=mask, other=float("inf")))
        row = sequence_ptr + SEQUENCE_RATIO_MAX * B + offs
        largest = tl.maximum(largest, tl.load(row, mask=mask, other=-float("inf")))
    column = tl.sum(sums, 1)
    n = _pick(column, rows, RESPONSE)
    kept = _pick(column, rows, KEPT)

    factor = tl.cast(scale, tl.float32)
    if OVER_TOKENS or OVER_SEQUENCES:
        if count_ptr is not None:
            count = tl.load(count_ptr)
        elif OVER_TOKENS:
            count = kept if KEPT_ONLY else n
        else:
            count = _pick(column, rows, HAS_COUNTED)
        factor = tl.where(count > 0, factor / tl.where(count > 0, count, 1.0), 0.0)
    tl.store(factor_ptr, factor)
    tl.store(loss_ptr, _pick(column, rows, LOSS) * factor)

    nan = float("nan")
    per_token = tl.where(n > 0, 1.0 / tl.maximum(n, 1.0), nan)
    tl.store(metrics_ptr, n)
    tl.store(metrics_ptr + 1, _pick(column, rows, CLIP_LOW) * per_token)
    tl.store(metrics_ptr + 2, _pick(column, rows, CLIP_HIGH) * per_token)
    tl.store(metrics_ptr + 3, _pick(column, rows, CLIP_CAP) * per_token)
    tl.store(metrics_ptr + 4, _pick(column, rows, KL) * per_token if HAS_REF else nan)
    per_sequence = 1.0 / tl.maximum(_pick(column, rows, HAS_RESPONSE), 1.0)
    entropy = tl.where(n > 0, _pick(column, rows, SEQUENCE_ENTROPY) * per_sequence, nan)
    tl.store(metrics_ptr + 5, entropy if HAS_ENTROPY else nan)
    tl.store(metrics_ptr + 6, _pick(column, rows, ENTROPY) * per_token if HAS_ENTROPY else nan)
    tl.store(metrics_ptr + 7, _pick(column, rows, RATIO) * per_token)
    tl.store(metrics_ptr + 8, tl.where(n > 0, tl.min(least, 0), nan))
    tl.store(metrics_ptr + 9, tl.where(n > 0, tl.max(largest, 0), nan))
    tl.store(metrics_ptr + 10, (n - kept) * per_token)
    tl.store(metrics_ptr + 11, _pick(column, rows, LIVE) * per_token)


@triton.jit(do_not_specialize=["T", "B", "entropy_coef"])
def _grad_kernel(
    dloss_ptr, factor_ptr, coef_ptr, g_ptr, response_ptr, keep_ptr, weights_ptr, cu_ptr,
    dlogprobs_ptr, dentropy_ptr, T, B, entropy_coef,
    IS_SEQUENCE: tl.constexpr, KEPT_ONLY: tl.constexpr,
    BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One tile. Rows whose derivative is exactly 0 stay 0, whatever the upstream scalar is."""
    tile = tl.program_id(0).to(tl.int64)
    i, start, end = _locate(tile, cu_ptr, T, B, BLOCK, SEARCH)
    offs_t = start + tl.arange(0, BLOCK)
    inside_t = offs_t < end
    upstream = tl.load(dloss_ptr) * tl.load(factor_ptr)
    upstream *= tl.load(coef_ptr + i, mask=i < B, other=0.0)
    g = tl.load(g_ptr + offs_t, mask=inside_t, other=0.0)
    if IS_SEQUENCE or dentropy_ptr is not None:
        mask_t = inside_t & (i < B)
        mask_t = mask_t & (tl.load(response_ptr + offs_t, mask=mask_t, other=0) != 0)
    if IS_SEQUENCE:
        c = tl.load(coef_ptr + B + i, mask=i < B, other=0.0)
        g += tl.where(mask_t, c, 0.0)
    tl.store(dlogprobs_ptr + offs_t, tl.where(g != 0, g * upstream, 0.0), mask=inside_t)
    if dentropy_ptr is not None:
        dentropy = tl.where(mask_t, -tl.cast(entropy_coef, tl.float32), 0.0)
        if KEPT_ONLY and keep_ptr is not None:
            kept_t = tl.load(keep_ptr + offs_t, mask=mask_t, other=0) != 0
            dentropy = tl.where(kept_t, dentropy, 0.0)
        if weights_ptr is not None:
            dentropy *= tl.load(weights_ptr + offs_t, mask=dentropy != 0, other=0.0)
        dentropy = tl.where(dentropy != 0, dentropy * upstream, 0.0)
        tl.store(dentropy_ptr + offs_t, dentropy, mask=inside_t)


# --- launches ----------------------------------------------------------------

BLOCK = 1024  # rows of a tile: 8 a lane
SEARCH = 512  # entries of cu_seqlens read at a time
CHUNK = 128  # tile or sequence columns read at a time
OPTIONS = dict(num_warps=4)


def _tiles(T: int, B: int) -> int:
    return triton.cdiv(T, BLOCK) + B + 1


def forward(rows, cu_seqlens, count, options) -> tuple[torch.Tensor, ...]:
    """``rows``: the ``[T]`` inputs by name, or None. Returns loss, metrics, g, coef, factor."""
    logprobs, old = rows["logprobs"], rows["old_logprobs"]
    T, B = logprobs.shape[0], cu_seqlens.shape[0] - 1
    n_tiles = _tiles(T, B)
    new = dict(dtype=torch.float32, device=logprobs.device)
    stats = torch.empty(TILE_ROWS, n_tiles, **new)
    sequences = torch.empty(SEQUENCE_ROWS, B, **new)
    coef = torch.empty(2, B, **new)
    g = torch.empty(T, **new)
    loss, factor, metrics = torch.empty((), **new), torch.empty((), **new), torch.empty(12, **new)
    is_sequence = options.loss_type == "gspo"
    log_ratio = None
    if is_sequence and old is not None:
        log_ratio = torch.empty(2, n_tiles, **new)
        _log_ratio_kernel[(n_tiles,)](
            logprobs, old, rows["response_mask"], cu_seqlens, log_ratio, T, B, n_tiles,
            BLOCK=BLOCK, SEARCH=SEARCH, **OPTIONS,
        )  # fmt: skip
    infinity = float("inf")
    _loss_kernel[(n_tiles,)](
        logprobs, old, rows["advantages"], rows["response_mask"], rows["keep_mask"],
        rows["ref_logprobs"], rows["rollout_is_weights"], rows["entropy"], rows["weights"],
        cu_seqlens, log_ratio, g, stats, T, B, n_tiles,
        1.0 - options.eps_low, 1.0 + options.eps_high,
        infinity if options.ratio_cap is None else options.ratio_cap,
        infinity if options.dual_clip is None else options.dual_clip,
        options.kl_coef, options.entropy_coef,
        IS_CISPO=options.loss_type == "cispo", IS_SEQUENCE=is_sequence,
        PER_TOKEN=options.advantages_per_token, KEPT_ONLY=options.kept_only,
        KL_ORDER=int(options.kl_estimator[1]), KL_IMPORTANCE=options.kl_importance,
        BLOCK=BLOCK, SEARCH=SEARCH, CHUNK=CHUNK, **OPTIONS,
    )  # fmt: skip
    _sequence_kernel[(B,)](
        stats, cu_seqlens, sequences, coef, B, n_tiles,
        SEQUENCE_MEAN=options.rule == "seq-mean-token-mean", IS_SEQUENCE=is_sequence,
        KEPT_ONLY=options.kept_only, BLOCK=BLOCK, CHUNK=CHUNK, **OPTIONS,
    )  # fmt: skip
    _finish_kernel[(1,)](
        sequences, count, loss, metrics, factor, B, options.scale,
        OVER_TOKENS=options.rule == "token-mean",
        OVER_SEQUENCES=options.rule in ("seq-mean-token-mean", "constant"),
        KEPT_ONLY=options.kept_only, HAS_REF=rows["ref_logprobs"] is not None,
        HAS_ENTROPY=rows["entropy"] is not None, CHUNK=CHUNK, **OPTIONS,
    )  # fmt: skip
    return loss, metrics, g, coef, factor


def backward(
    dloss, factor, coef, g, masks, cu_seqlens, entropy_coef, is_sequence, kept_only, dentropy
) -> torch.Tensor:
    """dlogprobs; ``masks`` are response, keep, weights. Fills ``dentropy`` unless it is None."""
    T, B = g.shape[0], cu_seqlens.shape[0] - 1
    dlogprobs = torch.empty_like(g)
    _grad_kernel[(_tiles(T, B),)](
        dloss, factor, coef, g, *masks, cu_seqlens, dlogprobs, dentropy, T, B, entropy_coef,
        IS_SEQUENCE=is_sequence, KEPT_ONLY=kept_only, BLOCK=BLOCK, SEARCH=SEARCH, **OPTIONS,
    )  # fmt: skip
    return dlogprobs


def aot_variants():
    """Every kernel as it is launched: (name, kernel, signature, constexprs, aligned, options)."""
    sizes = dict(T="i32", B="i32", n_tiles="i32")
    tiles = dict(BLOCK=BLOCK, SEARCH=SEARCH)
    masks = dict(response_ptr="*i1", keep_ptr="*i1", weights_ptr="*fp32", cu_ptr="*i32")
    floats = ("low", "high", "ratio_cap", "dual_clip", "kl_coef", "entropy_coef")
    loss = dict.fromkeys(
        (
            "logprobs_ptr", "old_ptr", "advantages_ptr", "ref_ptr", "rollout_ptr", "entropy_ptr",
            "log_ratio_ptr", "g_ptr", "stats_ptr",
        ),
        "*fp32",
    ) | masks | sizes | dict.fromkeys(floats, "fp32")  # fmt: skip
    found = []

    def add(name, kernel, signature, constexprs):
        aligned = tuple(k for k, v in signature.items() if v[0] == "*" and k not in constexprs)
        found.append((f"policy_loss-{name}", kernel, signature, constexprs, aligned, OPTIONS))

    add(
        "log_ratio", _log_ratio_kernel,
        dict(logprobs_ptr="*fp32", old_ptr="*fp32", response_ptr="*i1", cu_ptr="*i32",
             sums_ptr="*fp32") | sizes,
        tiles,
    )  # fmt: skip
    choices = dict(
        IS_CISPO=False, IS_SEQUENCE=False, PER_TOKEN=False, KEPT_ONLY=False, KL_ORDER=3,
        KL_IMPORTANCE=False, CHUNK=CHUNK,
    ) | tiles  # fmt: skip
    absent = dict.fromkeys(("old_ptr", "ref_ptr", "rollout_ptr", "weights_ptr", "log_ratio_ptr"))
    add("on_policy", _loss_kernel, loss, absent | choices)
    add("grpo", _loss_kernel, loss, dict(weights_ptr=None, log_ratio_ptr=None) | choices)
    everything = choices | dict(PER_TOKEN=True, KEPT_ONLY=True, KL_IMPORTANCE=True)
    add("gspo", _loss_kernel, loss, everything | dict(IS_SEQUENCE=True))
    add("cispo", _loss_kernel, loss, everything | dict(IS_CISPO=True, log_ratio_ptr=None))
    columns = dict(stats_ptr="*fp32", sequence_ptr="*fp32", coef_ptr="*fp32", cu_ptr="*i32")
    flags = dict(SEQUENCE_MEAN=True, IS_SEQUENCE=True, KEPT_ONLY=True, BLOCK=BLOCK, CHUNK=CHUNK)
    add("sequence", _sequence_kernel, columns | dict(B="i32", n_tiles="i32"), flags)
    totals = dict.fromkeys(
        ("sequence_ptr", "count_ptr", "loss_ptr", "metrics_ptr", "factor_ptr"), "*fp32"
    )
    flags = dict(
        count_ptr=None, OVER_TOKENS=False, OVER_SEQUENCES=True, KEPT_ONLY=True, HAS_REF=True,
        HAS_ENTROPY=True, CHUNK=CHUNK,
    )  # fmt: skip
    add("finish", _finish_kernel, totals | dict(B="i32", scale="fp32"), flags)
    gradient = dict.fromkeys(
        ("dloss_ptr", "factor_ptr", "coef_ptr", "g_ptr", "dlogprobs_ptr", "dentropy_ptr"), "*fp32"
    ) | masks | dict(T="i32", B="i32", entropy_coef="fp32")  # fmt: skip
    token = dict(IS_SEQUENCE=False, KEPT_ONLY=False, dentropy_ptr=None) | tiles
    add("grad", _grad_kernel, gradient, token)
    add("grad_full", _grad_kernel, gradient, dict(IS_SEQUENCE=True, KEPT_ONLY=True) | tiles)
    return found
