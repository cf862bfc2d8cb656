"""Triton kernels of the policy loss.

Work is cut into tiles of BLOCK rows that never cross a sequence. Sequence i owns the tiles from
cu[i] // BLOCK + i up to cu[i + 1] // BLOCK + i + 1, some of them empty, so that a program knows its
sequence after one look at cu_seqlens and no count ever goes to the host. The rows past the last
sequence belong to a sequence B in which nothing counts.

    [_log_ratio_kernel]  sums of l - l_old, only for a sequence-level ratio
    _loss_kernel         g = dL/dl of every row, and 16 statistics a tile; the program that ends a
                         sequence adds its tiles up, the one that ends the batch adds up sequences
    _grad_kernel         dlogprobs = upstream * factor * a_i * (g + c_i), dentropy

A rule's weight is w_t = a_i * factor, so that g can be stored before either is known. Which program
comes last depends on the run, what it adds up and in which order does not: same input, same bits.
"""

from __future__ import annotations

import torch

from qlkernels._triton import cdiv, tl, triton

# Statistics of a sequence and of the batch: sums, then the ratio's extremes. A tile holds the first
# eight, with two counts in one number (columns 0, 1, 2 and PACK times columns 8, 9, 10).
RESPONSE = tl.constexpr(0)
LIVE = tl.constexpr(1)
CLIP_LOW = tl.constexpr(2)
LOSS = tl.constexpr(3)
RATIO_GRADIENT = tl.constexpr(4)  # sum of w dL/d(log s): reaches every row of the sequence
KL = tl.constexpr(5)
ENTROPY = tl.constexpr(6)
RATIO = tl.constexpr(7)
KEPT = tl.constexpr(8)
CLIP_CAP = tl.constexpr(9)
CLIP_HIGH = tl.constexpr(10)
SEQUENCE_ENTROPY = tl.constexpr(11)
HAS_RESPONSE = tl.constexpr(12)
HAS_COUNTED = tl.constexpr(13)
RATIO_MIN = tl.constexpr(14)  # kept as -min, so that both extremes are maxima
RATIO_MAX = tl.constexpr(15)
COLUMNS = 16
PACK = tl.constexpr(4096.0)  # counts of a tile are at most 1024: exact in fp32

LIMIT = tl.constexpr(20.0)  # nats: LOG_RATIO_LIMIT of the reference


# A kernel is compiled once for every divisibility of the arguments that are specialised. The sizes
# and weights of a call are not, nor are vectors of the caller, which may start anywhere in a batch:
# a tile starts where its sequence does, so its loads are not vectors anyway.
PER_CALL = [
    "T", "B", "n_tiles", "low", "high", "ratio_cap", "dual_clip", "kl_coef", "entropy_coef",
    "scale", "logprobs_ptr", "old_ptr", "advantages_ptr", "response_ptr", "keep_ptr", "ref_ptr",
    "rollout_ptr", "entropy_ptr", "weights_ptr",
]  # fmt: skip


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
def _cut(x):
    """x between -LIMIT and LIMIT; NaN stays NaN, which minimum and maximum would hide."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


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


@triton.jit(do_not_specialize=PER_CALL)
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


@triton.jit
def _join8(x0, x1, x2, x3, x4, x5, x6, x7):
    """Eight ``[BLOCK]`` vectors to ``[BLOCK, 2, 2, 2]``, in this order when flattened."""
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    return tl.join(even, odd)


@triton.jit
def _sum_columns(first_ptr, n, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """Sums of n rows of statistics, in a fixed order, and the maxima of the last two columns."""
    columns = tl.arange(0, 16)
    eighth = columns % 8
    is_lower = columns < 8
    is_packed = eighth < 3
    extremes = RATIO_MIN + tl.arange(0, 2)
    sums = tl.zeros([CHUNK, 16], tl.float32)
    most = tl.full([CHUNK, 2], -float("inf"), tl.float32)
    for start in range(0, n, CHUNK):
        row = (start + tl.arange(0, CHUNK)).to(tl.int64)
        mask = row[:, None] < n
        # other programs wrote these: .cg reads them past this processor's own cache
        if PACKED:
            x = tl.load(
                first_ptr + row[:, None] * 16 + eighth[None, :],
                mask=mask, other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            upper = tl.where(is_packed[None, :], tl.floor(x / PACK), 0.0)
            sums += tl.where(is_lower[None, :], x - upper * PACK, upper)
        else:
            cells = first_ptr + row[:, None] * 16 + columns[None, :]
            mask_sum = mask & (columns[None, :] < RATIO_MIN)
            sums += tl.load(cells, mask=mask_sum, other=0.0, cache_modifier=".cg")
        cells = first_ptr + row[:, None] * 16 + extremes[None, :]
        x = tl.load(cells, mask=mask, other=-float("inf"), cache_modifier=".cg")
        most = tl.maximum(most, x)
    return tl.sum(sums, 0), tl.max(most, 0)


@triton.jit
def _pick(row, columns, column: tl.constexpr):
    return tl.sum(tl.where(columns == column, row, 0.0), 0)


@triton.jit
def _end_sequence(
    stats_ptr, sequence_ptr, coef_ptr, i, first, last, B,
    SEQUENCE_MEAN: tl.constexpr, IS_SEQUENCE: tl.constexpr, KEPT_ONLY: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds up the tiles of sequence i; coef[i] = a_i, coef[B + i] = c_i."""
    row, most = _sum_columns(stats_ptr + first * 16, last - first, True, CHUNK)
    columns = tl.arange(0, 16)
    n = _pick(row, columns, RESPONSE)
    n_counted = _pick(row, columns, KEPT) if KEPT_ONLY else n
    a = n * 0.0 + 1.0
    if SEQUENCE_MEAN:
        a = tl.where(n_counted > 0, 1.0 / tl.maximum(n_counted, 1.0), 0.0)
        row = tl.where(columns == LOSS, row * a, row)
    c = n * 0.0
    if IS_SEQUENCE:
        c = _pick(row, columns, RATIO_GRADIENT) / tl.maximum(n, 1.0)
        live = tl.where(c != 0, n, _pick(row, columns, LIVE))
        row = tl.where(columns == LIVE, live, row)
    tl.store(coef_ptr + i, a)
    tl.store(coef_ptr + B + i, c)
    mean_entropy = _pick(row, columns, ENTROPY) / tl.maximum(n, 1.0)
    row = tl.where(columns == SEQUENCE_ENTROPY, mean_entropy, row)
    row = tl.where(columns == HAS_RESPONSE, tl.where(n > 0, 1.0, 0.0), row)
    row = tl.where(columns == HAS_COUNTED, tl.where(n_counted > 0, 1.0, 0.0), row)
    tl.store(sequence_ptr + i * 16 + columns, row, mask=columns < RATIO_MIN)
    tl.store(sequence_ptr + i * 16 + RATIO_MIN + tl.arange(0, 2), most)


@triton.jit
def _end_batch(
    sequence_ptr, coef_ptr, count_ptr, loss_ptr, metrics_ptr, B, scale,
    OVER_TOKENS: tl.constexpr, OVER_SEQUENCES: tl.constexpr, KEPT_ONLY: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_ENTROPY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds up the sequences; coef[2 B] = factor = scale / denominator; metrics by column."""
    row, most = _sum_columns(sequence_ptr, B, False, CHUNK)
    columns = tl.arange(0, 16)
    n = _pick(row, columns, RESPONSE)
    kept = _pick(row, columns, KEPT)
    factor = n * 0.0 + tl.cast(scale, tl.float32)
    if OVER_TOKENS or OVER_SEQUENCES:
        if count_ptr is not None:
            count = tl.load(count_ptr)
        elif OVER_TOKENS:
            count = kept if KEPT_ONLY else n
        else:
            count = _pick(row, columns, HAS_COUNTED)
        factor = tl.where(count > 0, factor / tl.where(count > 0, count, 1.0), 0.0)
    tl.store(coef_ptr + 2 * B, factor)
    tl.store(loss_ptr, _pick(row, columns, LOSS) * factor)

    row = tl.where(columns == KEPT, n - row, row)
    divisor = n
    if HAS_ENTROPY:
        n_sequences = _pick(row, columns, HAS_RESPONSE)
        divisor = tl.where(columns == SEQUENCE_ENTROPY, n_sequences, n)
    measured = columns >= 0
    if not HAS_REF:
        measured = measured & (columns != KL)
    if not HAS_ENTROPY:
        measured = measured & (columns != ENTROPY) & (columns != SEQUENCE_ENTROPY)
    row = tl.where(measured, row / tl.maximum(divisor, 1.0), float("nan"))
    row = tl.where(n > 0, row, float("nan"))
    row = tl.where(columns == RESPONSE, n, row)
    tl.store(metrics_ptr + columns, row, mask=columns < RATIO_MIN)
    sign = tl.arange(0, 2).to(tl.float32) * 2.0 - 1.0
    most = tl.where(n > 0, sign * most, float("nan"))
    tl.store(metrics_ptr + RATIO_MIN + tl.arange(0, 2), most)


@triton.jit(do_not_specialize=PER_CALL)
def _loss_kernel(
    logprobs_ptr, old_ptr, advantages_ptr, response_ptr, keep_ptr, ref_ptr, rollout_ptr,
    entropy_ptr, weights_ptr, cu_ptr, log_ratio_ptr, count_ptr, g_ptr, stats_ptr, sequence_ptr,
    ended_ptr, coef_ptr, loss_ptr, metrics_ptr,
    T, B, n_tiles, low, high, ratio_cap, dual_clip, kl_coef, entropy_coef, scale,
    IS_CISPO: tl.constexpr, IS_SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr,
    KEPT_ONLY: tl.constexpr, KL_ORDER: tl.constexpr, KL_IMPORTANCE: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr, OVER_TOKENS: tl.constexpr, OVER_SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr, SEARCH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile: per-token loss, derivative and statistics. A None pointer is an absent input.

    ended: finished tiles of each sequence, and finished sequences; 0 at launch.
    """
    tile = tl.program_id(0).to(tl.int64)
    i, start, end = _locate(tile, cu_ptr, T, B, BLOCK, SEARCH)
    first = _first_tile(tl.minimum(i, B - 1), cu_ptr, BLOCK)
    last = _first_tile(tl.minimum(i, B - 1) + 1, cu_ptr, BLOCK)
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

    log_ratio = logprobs - logprobs  # 0, and NaN where the log-prob is: min and max would hide it
    if old_ptr is not None:
        if IS_SEQUENCE:
            n = _row_sum(log_ratio_ptr, first, last, CHUNK)
            mean = _row_sum(log_ratio_ptr + n_tiles, first, last, CHUNK) / tl.maximum(n, 1.0)
            log_ratio = tl.zeros([BLOCK], tl.float32) + mean
        else:
            log_ratio = logprobs - tl.load(old_ptr + offs_t, mask=mask_t, other=0.0)
    follows = ~(tl.abs(log_ratio) > LIMIT)
    ratio = tl.exp(_cut(log_ratio))

    clip_low = ratio < low
    clip_high = ratio > high
    clip_cap = ratio < 0.0  # never: CISPO has no cap
    if IS_CISPO:
        clipped = tl.minimum(tl.maximum(ratio, low), high)
        weighted = tl.where(ratio == ratio, clipped, ratio) * A
        pg = -weighted * logprobs
        dpg = -weighted
    else:
        capped = tl.minimum(ratio, ratio_cap)
        clipped = tl.minimum(tl.maximum(ratio, low), high)
        r = tl.where(A > 0, tl.minimum(capped, clipped), tl.maximum(capped, clipped))
        r = tl.where(A < 0, tl.minimum(r, dual_clip), r)
        r = tl.where(ratio == ratio, r, ratio)
        pg = -A * r
        # r is the ratio itself or a bound: comparing says which, and a bound has no gradient
        stopped = (r < ratio) | (r > ratio)
        dpg = tl.where(follows & ~stopped, -A * ratio, 0.0)
        clip_low = clip_low & (A < 0)
        clip_high = clip_high & (A > 0)
        clip_cap = mask_t & (A != 0) & stopped & ~clip_low & ~clip_high
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
            moves = ~(tl.abs(d) > LIMIT)
            d = _cut(d)
            # e^d - 1 - d cancels near 0: a series to d^7 there, within 2e-8 of the sum
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
    eight = _join8(
        tl.where(mask_t, tl.where(kept_t, 1.0 + PACK, 1.0), 0.0),
        tl.where(live, 1.0, 0.0) + tl.where(clip_cap, PACK, 0.0),
        tl.where(clip_low & mask_t, 1.0, 0.0) + tl.where(clip_high & mask_t, PACK, 0.0),
        loss, dratio, kl, entropy, tl.where(mask_t, ratio, 0.0),
    )  # fmt: skip
    row_ptr = stats_ptr + tile * 16
    tl.store(row_ptr + tl.arange(0, 8), tl.reshape(tl.sum(eight, 0), [8]))
    infinity = float("inf")
    if old_ptr is not None:
        extremes = tl.join(tl.where(mask_t, -ratio, -infinity), tl.where(mask_t, ratio, -infinity))
        tl.store(row_ptr + RATIO_MIN + tl.arange(0, 2), tl.max(extremes, 0))
    else:
        tl.store(row_ptr + RATIO_MIN, -1.0)
        tl.store(row_ptr + RATIO_MAX, 1.0)

    if i < B:
        tl.debug_barrier()  # the whole program's stores come before its count
        if tl.atomic_add(ended_ptr + i, 1, sem="acq_rel") == last - first - 1:
            _end_sequence(
                stats_ptr, sequence_ptr, coef_ptr, i, first, last, B,
                SEQUENCE_MEAN, IS_SEQUENCE, KEPT_ONLY, CHUNK,
            )  # fmt: skip
            tl.debug_barrier()
            if tl.atomic_add(ended_ptr + B, 1, sem="acq_rel") == B - 1:
                _end_batch(
                    sequence_ptr, coef_ptr, count_ptr, loss_ptr, metrics_ptr, B, scale,
                    OVER_TOKENS, OVER_SEQUENCES, KEPT_ONLY,
                    ref_ptr is not None, entropy_ptr is not None, CHUNK,
                )  # fmt: skip


@triton.jit(do_not_specialize=PER_CALL)
def _grad_kernel(
    dloss_ptr, coef_ptr, g_ptr, response_ptr, keep_ptr, weights_ptr, cu_ptr,
    dlogprobs_ptr, dentropy_ptr, T, B, entropy_coef,
    IS_SEQUENCE: tl.constexpr, KEPT_ONLY: tl.constexpr,
    BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One tile. Rows whose derivative is exactly 0 stay 0, whatever the upstream scalar is."""
    tile = tl.program_id(0).to(tl.int64)
    i, start, end = _locate(tile, cu_ptr, T, B, BLOCK, SEARCH)
    offs_t = start + tl.arange(0, BLOCK)
    inside_t = offs_t < end
    upstream = tl.load(dloss_ptr) * tl.load(coef_ptr + 2 * B)
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

# Measured on an H100 at T = 1M against 512 and 2048 rows, 2 to 16 warps: least time, forward and
# backward, with and without a reference policy.
BLOCK = 1024  # rows of a tile
SEARCH = 512  # entries of cu_seqlens read at a time
CHUNK = 64  # tiles or sequences read at a time
OPTIONS = dict(num_warps=8)


def _tiles(T: int, B: int) -> int:
    return cdiv(T, BLOCK) + B + 1


def forward(rows, cu_seqlens, count, options) -> tuple[torch.Tensor, ...]:
    """``rows``: the ``[T]`` inputs by name, or None. Returns loss, metrics, g, coef."""
    logprobs, old = rows["logprobs"], rows["old_logprobs"]
    T, B = logprobs.shape[0], cu_seqlens.shape[0] - 1
    n_tiles = _tiles(T, B)
    new = logprobs.new_empty  # fp32
    scratch = new(n_tiles + B, COLUMNS)
    ended = torch.zeros(B + 1, dtype=torch.int32, device=logprobs.device)
    g, coef, loss, metrics = new(T), new(2 * B + 1), new(()), new(COLUMNS)
    is_sequence = options.loss_type == "gspo"
    log_ratio = None
    if is_sequence and old is not None:
        log_ratio = new(2, n_tiles)
        _log_ratio_kernel[(n_tiles,)](
            logprobs, old, rows["response_mask"], cu_seqlens, log_ratio, T, B, n_tiles,
            BLOCK=BLOCK, SEARCH=SEARCH, **OPTIONS,
        )  # fmt: skip
    _loss_kernel[(n_tiles,)](
        logprobs, old, rows["advantages"], rows["response_mask"], rows["keep_mask"],
        rows["ref_logprobs"], rows["rollout_is_weights"], rows["entropy"], rows["weights"],
        cu_seqlens, log_ratio, count, g, scratch, scratch[n_tiles:], ended, coef, loss, metrics,
        T, B, n_tiles, 1.0 - options.eps_low, 1.0 + options.eps_high, options.ratio_cap,
        options.dual_clip, options.kl_coef, options.entropy_coef, options.scale,
        IS_CISPO=options.loss_type == "cispo", IS_SEQUENCE=is_sequence,
        PER_TOKEN=options.advantages_per_token, KEPT_ONLY=options.kept_only,
        KL_ORDER=int(options.kl_estimator[1]), KL_IMPORTANCE=options.kl_importance,
        SEQUENCE_MEAN=options.rule == "seq-mean-token-mean",
        OVER_TOKENS=options.rule == "token-mean",
        OVER_SEQUENCES=options.rule in ("seq-mean-token-mean", "constant"),
        BLOCK=BLOCK, SEARCH=SEARCH, CHUNK=CHUNK, **OPTIONS,
    )  # fmt: skip
    return loss, metrics, g, coef


def backward(dloss, coef, g, masks, cu_seqlens, options, dentropy) -> torch.Tensor:
    """dlogprobs; ``masks`` are response, keep, weights. Fills ``dentropy`` unless it is None."""
    T, B = g.shape[0], cu_seqlens.shape[0] - 1
    dlogprobs = torch.empty_like(g)
    _grad_kernel[(_tiles(T, B),)](
        dloss, coef, g, *masks, cu_seqlens, dlogprobs, dentropy, T, B, options.entropy_coef,
        IS_SEQUENCE=options.loss_type == "gspo", KEPT_ONLY=options.kept_only,
        BLOCK=BLOCK, SEARCH=SEARCH, **OPTIONS,
    )  # fmt: skip
    return dlogprobs


def aot_variants():
    """Every kernel as it is launched: (name, kernel, signature, constexprs, aligned, options)."""
    sizes = dict(T="i32", B="i32", n_tiles="i32")
    tiles = dict(BLOCK=BLOCK, SEARCH=SEARCH)
    masks = dict(response_ptr="*i1", keep_ptr="*i1", weights_ptr="*fp32", cu_ptr="*i32")
    floats = ("low", "high", "ratio_cap", "dual_clip", "kl_coef", "entropy_coef", "scale")
    loss = dict.fromkeys(
        (
            "logprobs_ptr", "old_ptr", "advantages_ptr", "ref_ptr", "rollout_ptr", "entropy_ptr",
            "log_ratio_ptr", "count_ptr", "g_ptr", "stats_ptr", "sequence_ptr", "coef_ptr",
            "loss_ptr", "metrics_ptr",
        ),
        "*fp32",
    ) | masks | sizes | dict.fromkeys(floats, "fp32") | dict(ended_ptr="*i32")  # fmt: skip
    found = []

    def add(name, kernel, signature, constexprs):
        others = [*constexprs, *PER_CALL]
        aligned = tuple(k for k, v in signature.items() if v[0] == "*" and k not in others)
        found.append((f"policy_loss-{name}", kernel, signature, constexprs, aligned, OPTIONS))

    add(
        "log_ratio", _log_ratio_kernel,
        dict(logprobs_ptr="*fp32", old_ptr="*fp32", response_ptr="*i1", cu_ptr="*i32",
             sums_ptr="*fp32") | sizes,
        tiles,
    )  # fmt: skip
    choices = dict(
        IS_CISPO=False, IS_SEQUENCE=False, PER_TOKEN=False, KEPT_ONLY=False, KL_ORDER=3,
        KL_IMPORTANCE=False, SEQUENCE_MEAN=False, OVER_TOKENS=True, OVER_SEQUENCES=False,
        CHUNK=CHUNK,
    ) | tiles  # fmt: skip
    absent = dict.fromkeys(
        ("old_ptr", "ref_ptr", "rollout_ptr", "weights_ptr", "log_ratio_ptr", "count_ptr")
    )
    add("on_policy", _loss_kernel, loss, absent | choices)
    add("grpo", _loss_kernel, loss, dict(weights_ptr=None, log_ratio_ptr=None) | choices)
    sequences = dict(SEQUENCE_MEAN=True, OVER_TOKENS=False, OVER_SEQUENCES=True)
    everything = choices | sequences | dict(PER_TOKEN=True, KEPT_ONLY=True, KL_IMPORTANCE=True)
    add("gspo", _loss_kernel, loss, everything | dict(IS_SEQUENCE=True))
    add("cispo", _loss_kernel, loss, everything | dict(IS_CISPO=True, log_ratio_ptr=None))
    gradient = dict.fromkeys(
        ("dloss_ptr", "coef_ptr", "g_ptr", "dlogprobs_ptr", "dentropy_ptr"), "*fp32"
    ) | masks | dict(T="i32", B="i32", entropy_coef="fp32")  # fmt: skip
    token = dict(IS_SEQUENCE=False, KEPT_ONLY=False, dentropy_ptr=None) | tiles
    add("grad", _grad_kernel, gradient, token)
    add("grad_full", _grad_kernel, gradient, dict(IS_SEQUENCE=True, KEPT_ONLY=True) | tiles)
    return found
