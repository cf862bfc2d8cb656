"""Device memory of a pass, from sizes alone: what a pass needs is known before it starts.

With T rows, c = min(T, chunk_tokens), n scored rows, b bytes a value, N = heads, M = kv_heads:

    always      T (H + D) b + 26 T                     residual stream, rotation, ids
    attention   T (2 N + 2 M) D b + 4 T N              q, k, v, output; its log-sum-exp
                + T N D b where several sequences or groups are done piece by piece
    mlp         c (H + 2 I) b
    experts     T (2 H + E) b + 16 T k                 input, output, routing
                + max(c k (H + I) b, 384 MB)           routed rows of a chunk; fp32 logits
    head        2 T H b + 28 T + up to 512 MB          normed rows, scores, folded tiles
    peak        weights + always + max(attention, mlp, experts, head)

``weights`` is the model, or with streaming two of its layers and its head. On the CPU the fp32
temporaries of the eager norms, of merging and of the experts, and the fp32 copy of a 16-bit head
are counted as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qlkernels._target import has_triton
from qlkernels.linear_logprob.kernels import FOLD_CONFIG
from qlkernels.scorer.decoder import Decoder
from qlkernels.scorer.elementwise import REFERENCE_ROWS
from qlkernels.scorer.weights import layouts_of

CHUNK_TOKENS = {"cuda": 32_768, "cpu": 1024}  # by default

_GPU_FOLD, _CPU_FOLD = 512 << 20, 64 << 20  # what linear_logprob works in
_COPIED_ROWS = 1 << 16  # scored rows that linear_logprob gathers at a time
_ROUTING = 64 << 20  # fp32 logits that moe_route holds at a time


class NotEnoughMemory(RuntimeError):
    """A pass or a model that does not fit; the message says what would."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device of the pass."""

    tokens: int
    weights: int  # model, or two layers and the ends while they stream
    always: int  # what every part of the pass holds
    parts: dict[str, int]  # beyond that, while the part runs

    @property
    def activations(self) -> int:
        """Beyond the weights, at the peak."""
        return self.always + max(self.parts.values())

    @property
    def total(self) -> int:
        return self.weights + self.activations


def estimate_memory(
    decoder: Decoder,
    tokens: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    chunk_tokens: int | None = None,
    stream_weights: bool = False,
    is_one_sequence: bool = True,
    device_type: str = "cuda",
) -> MemoryEstimate:
    """What a pass over ``tokens`` packed rows needs at its peak.

    Args:
        decoder: ``Decoder.of_config(config)``, or that of a scorer.
        tokens: rows of the pass; of a group P - 1 + sum of R_i.
        dtype: of the weights.
        chunk_tokens: as given to ``Scorer``; its default for the device if None.
        stream_weights: two layers on the device instead of all.
        is_one_sequence: False for several packed sequences and for groups.
        device_type: ``"cuda"`` or ``"cpu"``.

    Returns:
        The estimate. ``linear_logprob`` and the attention backends have workspaces of their own of
        fixed size, the context of CUDA and its libraries comes on top (about 1 GB).
    """
    T, H, D, b = tokens, decoder.H, decoder.head_dim, dtype.itemsize
    c = min(T, chunk_tokens or CHUNK_TOKENS[device_type])
    on_cpu = device_type == "cpu"
    qkv = (decoder.heads + 2 * decoder.kv_heads) * D
    out = decoder.heads * D
    # fp32 copies of a few rows inside the eager norms
    norm = 3 * min(c, REFERENCE_ROWS) * max(H, out) * 4 if on_cpu else 0
    outputs = 1 if is_one_sequence else 3 if on_cpu else 2
    parts = {
        "projections": T * qkv * b + c * H * b + norm,
        "attention": T * (qkv + outputs * out) * b + 4 * T * decoder.heads,
        "head": _head_bytes(decoder, T, b, on_cpu) + norm,
    }
    if len(decoder.moe_layers) < decoder.layers:
        parts["mlp"] = c * H * b + max(norm, 2 * c * decoder.I * b)
    if decoder.moe_layers:
        parts["experts"] = max(_expert_bytes(decoder, T, c, b, on_cpu), T * H * b + norm)
    return MemoryEstimate(
        tokens=T,
        weights=_weight_bytes(decoder, dtype, stream_weights, on_cpu),
        always=T * (H + D) * b + 26 * T,
        parts=parts,
    )


def _head_bytes(decoder: Decoder, T: int, b: int, on_cpu: bool) -> int:
    rows = T * decoder.H * b + min(T, _COPIED_ROWS) * decoder.H * b + 28 * T
    logits = T * decoder.V * 4
    if on_cpu:
        widened = decoder.V * decoder.H * 4 if b < 4 else 0
        return rows + min(2 * _CPU_FOLD, 2 * logits) + widened
    if not has_triton():  # fp32 logits, distances to the maximum, exponentials; which are -inf
        return rows + min(_GPU_FOLD, logits) * 13 // 4
    # three fp32 parts a row and tile of the vocabulary
    tiles = {key: tile for key, tile in FOLD_CONFIG.items() if key[0] != "interpreter"}
    widths = [tile[1] for (_, size), tile in tiles.items() if size == b]
    return rows + min(_GPU_FOLD, 12 * T * -(-decoder.V // min(widths)))


def _expert_bytes(decoder: Decoder, T: int, c: int, b: int, on_cpu: bool) -> int:
    H, E, k, I = decoder.H, decoder.E, decoder.top_k, decoder.expert_I  # noqa: E741
    whole = T * (2 * H + E) * b + 16 * T * k
    routing = min(_ROUTING, 4 * T * E) * 6
    mixing = c * k * (H + I) * b
    if on_cpu:  # gathered rows, pre-activations and fp32 activations too
        mixing = c * k * ((2 * H + 2 * I) * b + (H + 2 * I) * 4)
    return whole + max(routing, mixing)


def _weight_bytes(decoder: Decoder, dtype: torch.dtype, stream_weights: bool, on_cpu: bool) -> int:
    if not stream_weights:
        return decoder.num_weights() * dtype.itemsize
    slots = 2 * max(layout.bytes for layout in layouts_of(decoder, dtype))
    head = decoder.V * decoder.H * dtype.itemsize
    return slots + (head * (1 if decoder.is_tied else 2) if on_cpu else head)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on ``device``; None where the system does not say."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return host_bytes()


def host_bytes() -> int | None:
    """Memory that the host can still give, by Linux's own estimate."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
    except OSError:
        return None
    return int(lines["MemAvailable"].split()[0]) * 1024


def what_would_fit(
    decoder: Decoder,
    tokens: int,
    available: int,
    *,
    dtype: torch.dtype,
    chunk_tokens: int,
    stream_weights: bool,
    is_one_sequence: bool,
    device_type: str,
) -> str:
    """The nearest setting whose pass fits into ``available`` bytes beside today's weights."""
    options = dict(dtype=dtype, device_type=device_type, is_one_sequence=is_one_sequence)

    def fits(T: int, chunk: int, stream: bool) -> bool:
        found = estimate_memory(decoder, T, chunk_tokens=chunk, stream_weights=stream, **options)
        freed = 0
        if stream and not stream_weights and device_type == "cuda":
            freed = _weight_bytes(decoder, dtype, False, False) - found.weights
        return found.activations <= available + freed

    chunk = chunk_tokens
    while chunk > 256:
        chunk //= 2
        if fits(tokens, chunk, stream_weights):
            return f"use chunk_tokens={chunk}"
    if not stream_weights and device_type == "cuda" and fits(tokens, chunk_tokens, True):
        return "use stream_weights=True"
    low, high = 0, tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, 256, stream_weights) else (low, middle)
    return f"at most {low} tokens fit (with chunk_tokens=256)" if low else "not one token fits"


def gigabytes(size: int) -> str:
    """For messages."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
