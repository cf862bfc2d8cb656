"""Peers as providers: those that can run here do, the others are listed with the reason.

A loader imports its peer when it is asked for and returns a function with the signature of the op's
peers:

    logprob_entropy   (logits [T, V], target_ids [T], padded [T + 1, V])  -> outputs
    linear_logprob    (hidden [T, H], weight [V, H], target_ids [T], row_mask [T] or None) ->
    outputs
    linear_cross_entropy  (hidden [T, H], weight [V, H], target_ids [T])  -> the mean over T

Masked rows are handled as the peer's users handle them: an ignored label, a gather of the rows, or
a full pass.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bench.machine import package_version
from bench.registry import Outputs, Unavailable
from bench.truth import token_scores

Provider = Callable[..., Outputs]
IGNORE = -100


@dataclass(frozen=True)
class Peer:
    """``distribution`` names the package whose version is part of the name; empty for what torch
    itself brings.
    """

    op: str
    label: str
    scope: str  # "same", or "less" where it computes less than we do
    load: Callable[[], Provider]
    distribution: str = ""
    needs_cuda: bool = False
    has_backward: bool = True

    @property
    def name(self) -> str:
        version = package_version(self.distribution) if self.distribution else ""
        return f"{self.label}-{version}" if version else self.label

    def why_absent(self, device: str, backward: bool) -> str | None:
        if backward and not self.has_backward:
            return "it has no backward"
        if self.distribution and not package_version(self.distribution):
            return f"not installed (pip install {self.distribution})"
        if self.needs_cuda and device != "cuda":
            return "it needs a CUDA device"
        return None


PEERS: list[Peer] = []


def _peer(op: str, label: str, scope: str, **options) -> Callable:
    def wrap(load: Callable[[], Provider]) -> Callable[[], Provider]:
        PEERS.append(Peer(op, label, scope, load, **options))
        return load

    return wrap


def find(
    op: str, device: str, *, backward: bool
) -> tuple[dict[str, Provider], dict[str, str], dict[str, str]]:
    """Peers of ``op``: providers, their scopes, and the reasons of the absent, all by name."""
    providers, scopes, absent = {}, {}, {}
    for peer in PEERS:
        if peer.op != op:
            continue
        reason = peer.why_absent(device, backward)
        if reason is None:
            try:
                providers[peer.name] = peer.load()
                scopes[peer.name] = peer.scope
                continue
            except Exception as error:  # a peer that does not import must not stop the run
                reason = (
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
        absent[peer.name] = reason
    return providers, scopes, absent


# --- loading parts of a package without importing all of it --------------------


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"the package {name} is not importable")
    return Path(next(iter(spec.submodule_search_locations)))


def _load_file(module_name: str, path: Path) -> types.ModuleType:
    if module_name in sys.modules:
        return sys.modules[module_name]
    if not path.exists():
        raise Unavailable(f"this version has no {path.name}")
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _empty_package(name: str, **attributes) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(attributes)
    return module


def _trl_kernel(stem: str) -> types.ModuleType:
    """One file of ``trl/kernels``. TRL as a whole needs datasets and accelerate; its kernels need
    neither.
    """
    root = "bench_peer_trl"
    for name in (root, f"{root}.kernels", f"{root}.trainer"):
        sys.modules.setdefault(name, _empty_package(name))
    # The backward asks TRL's trainer whether the head is sharded by ZeRO-3; here it never is
    utils = _empty_package(
        f"{root}.trainer.utils", maybe_gather_lm_head_ctx=lambda *_: contextlib.nullcontext()
    )
    sys.modules.setdefault(utils.__name__, utils)
    return _load_file(f"{root}.kernels.{stem}", _package_folder("trl") / "kernels" / f"{stem}.py")


@contextlib.contextmanager
def _stand_in(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _verl_linear_cross_entropy() -> Callable:
    """verl's Triton kernel from its two files. verl as a whole needs ray and tensordict; the kernel
    asks it only which device this is.
    """
    folder = _package_folder("verl") / "utils" / "kernel"
    root = "bench_peer_verl"
    sys.modules.setdefault(root, _empty_package(root))
    device = _empty_package(
        "verl.utils.device",
        is_cuda_available=torch.cuda.is_available(),
        get_device_capability=torch.cuda.get_device_capability,
        get_device_name=lambda: "cuda",
        get_torch_device=lambda: torch.cuda,
    )
    parents = {name: _empty_package(name) for name in ("verl", "verl.utils")}
    with _stand_in(parents | {device.__name__: device}):
        sys.modules[root].kernels = _load_file(f"{root}.kernels", folder / "kernels.py")
    module = _load_file(f"{root}.linear_cross_entropy", folder / "linear_cross_entropy.py")
    return module.linear_cross_entropy


# --- from logits -----------------------------------------------------------------

EAGER_ROWS = 1024  # rows of fp32 logits that the eager peers hold at a time


def _eager_scores(logits: torch.Tensor, target_ids: torch.Tensor, _padded=None) -> Outputs:
    """fp32 blocks of rows, recomputed in the backward, as a careful user writes it."""

    def block(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = token_scores(x.float(), y)
        return scores["logprobs"], scores["entropy"]

    parts = []
    for x, y in zip(logits.split(EAGER_ROWS), target_ids.split(EAGER_ROWS), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(block, x, y, use_reentrant=False))
        else:
            parts.append(block(x, y))
    logprobs, entropy = (torch.cat(field) for field in zip(*parts, strict=True))
    return {"logprobs": logprobs, "entropy": entropy}


@_peer("logprob_entropy", "eager", "same")
def _eager_logits() -> Provider:
    return _eager_scores


@_peer("logprob_entropy", "torch.compile", "same")
def _compiled_logits() -> Provider:
    def scores(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = token_scores(x.float(), y)
        return found["logprobs"], found["entropy"]

    compiled = torch.compile(scores, dynamic=False)
    return lambda logits, ids, _padded: dict(
        zip(("logprobs", "entropy"), compiled(logits, ids), strict=True)
    )


@_peer("logprob_entropy", "trl", "same", distribution="trl", needs_cuda=True)
def _trl_logits() -> Provider:
    function = _trl_kernel("logprob_entropy").selective_log_softmax_and_entropy
    return lambda logits, ids, _padded: dict(
        zip(("logprobs", "entropy"), function(logits, ids), strict=True)
    )


@_peer(
    "logprob_entropy", "liger", "less", distribution="liger-kernel", needs_cuda=True,
    has_backward=False,
)  # fmt: skip
def _liger_logits() -> Provider:
    """No entropy. Its layout is ``[B, L + 1, V]`` with the last row unread."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return lambda _logits, ids, padded: {
        "logprobs": fused_selective_log_softmax(padded[None], ids[None], temperature=1.0)[0]
    }


@_peer("logprob_entropy", "quack", "less", distribution="quack-kernels", needs_cuda=True)
def _quack_logits() -> Provider:
    """No entropy."""
    from quack.cross_entropy import cross_entropy

    return lambda logits, ids, _padded: {
        "logprobs": -cross_entropy(logits, ids, reduction="none"),
    }


def _entropy_alone(logits: torch.Tensor) -> torch.Tensor:
    logp = logits.float().log_softmax(dim=1)
    return -(logp.exp() * logp).sum(dim=1)


@_peer("token_entropy", "eager", "same")
def _eager_entropy() -> Provider:
    def blocks(logits: torch.Tensor) -> Outputs:
        parts = [
            checkpoint(_entropy_alone, x, use_reentrant=False)
            if torch.is_grad_enabled()
            else _entropy_alone(x)
            for x in logits.split(EAGER_ROWS)
        ]
        return {"entropy": torch.cat(parts)}

    return blocks


@_peer("token_entropy", "torch.compile", "same")
def _compiled_entropy() -> Provider:
    compiled = torch.compile(_entropy_alone, dynamic=False)
    return lambda logits: {"entropy": compiled(logits)}


# --- from hidden states --------------------------------------------------------


def _ignored(target_ids: torch.Tensor, row_mask: torch.Tensor | None) -> torch.Tensor:
    return target_ids if row_mask is None else torch.where(row_mask, target_ids, IGNORE)


def _masked(outputs: Outputs, row_mask: torch.Tensor | None) -> Outputs:
    if row_mask is None:
        return outputs
    return {name: torch.where(row_mask, x, 0.0) for name, x in outputs.items()}


def _on_live_rows(function: Provider) -> Provider:
    """Gather the live rows, score, scatter: what trainers do with a response mask."""

    def call(hidden, weight, target_ids, row_mask):
        if row_mask is None:
            return function(hidden, weight, target_ids)
        index = row_mask.nonzero().squeeze(1)
        scores = function(hidden[index], weight, target_ids[index])
        zeros = torch.zeros(len(target_ids), device=hidden.device)
        return {name: zeros.index_copy(0, index, x.float()) for name, x in scores.items()}

    return call


@_peer("linear_logprob", "eager", "same")
def _eager_linear() -> Provider:
    def block(hidden, weight, target_ids):
        scores = token_scores((hidden @ weight.T).float(), target_ids)
        return scores["logprobs"], scores["entropy"]

    def call(hidden, weight, target_ids):
        parts = []
        for x, y in zip(hidden.split(EAGER_ROWS), target_ids.split(EAGER_ROWS), strict=True):
            if torch.is_grad_enabled():
                parts.append(checkpoint(block, x, weight, y, use_reentrant=False))
            else:
                parts.append(block(x, weight, y))
        logprobs, entropy = (torch.cat(field) for field in zip(*parts, strict=True))
        return {"logprobs": logprobs, "entropy": entropy}

    return _on_live_rows(call)


GEMM_ROWS = 4096


def _gemm_and_fold(fold: Callable[[torch.Tensor, torch.Tensor], tuple]) -> Provider:
    """GEMM of 4096 rows into one buffer of logits in the input's dtype, folded at once; forward
    only.
    """

    def call(hidden, weight, target_ids):
        T = hidden.shape[0]
        logits = hidden.new_empty(min(T, GEMM_ROWS), weight.shape[0])
        logprobs, entropy = (torch.empty(T, device=hidden.device) for _ in range(2))
        for start in range(0, T, GEMM_ROWS):
            rows = slice(start, min(T, start + GEMM_ROWS))
            part = logits[: rows.stop - start]
            torch.mm(hidden[rows], weight.T, out=part)
            logprobs[rows], entropy[rows] = fold(part, target_ids[rows])[:2]
        return {"logprobs": logprobs, "entropy": entropy}

    return _on_live_rows(call)


@_peer("linear_logprob", "gemm-4096+qlkernels-fold", "same", has_backward=False)
def _gemm_and_ours() -> Provider:
    from qlkernels.logprob_entropy import logprob_entropy

    return _gemm_and_fold(logprob_entropy)


@_peer(
    "linear_logprob", "gemm-4096+trl", "same", distribution="trl", needs_cuda=True,
    has_backward=False,
)  # fmt: skip
def _gemm_and_trl() -> Provider:
    return _gemm_and_fold(_trl_kernel("logprob_entropy").selective_log_softmax_and_entropy)


@_peer("linear_logprob", "trl", "same", distribution="trl")
def _trl_linear() -> Provider:
    function = _trl_kernel("chunked_logprob").ChunkedLogProbFunction
    columns = 32_768  # the vocabulary width of a tile in TRL's GRPO trainer

    def call(hidden, weight, target_ids):
        found = function.apply(
            hidden, weight, None, target_ids, 1.0, columns, None, 1.0, ("entropy",)
        )
        return {"logprobs": found[0], "entropy": found[1]}

    return _on_live_rows(call)


@_peer("linear_logprob", "liger", "same", distribution="liger-kernel")
def _liger_linear() -> Provider:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def call(hidden, weight, target_ids, row_mask):
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden, weight, _ignored(target_ids, row_mask), 1.0, IGNORE, 1, True
        )
        return {"logprobs": -nll, "entropy": entropy}

    return call


@_peer("linear_logprob", "liger-fallback", "same", distribution="liger-kernel", needs_cuda=True)
def _liger_fallback() -> Provider:
    """What ``liger`` computes on every GPU but Hopper: 512 rows of logits at a time, in torch. No
    setting of 0.8.5 chooses it on Hopper, where ``liger`` needs nvidia-cutlass-dsl.
    """
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    if torch.cuda.get_device_capability() != (9, 0):
        raise Unavailable("the peer liger is the same function on this GPU")
    function = module._FusedLinearPPOFallbackFunction

    def call(hidden, weight, target_ids, row_mask):
        labels = _ignored(target_ids, row_mask)
        nll, entropy = function.apply(hidden, weight, labels, 1.0, IGNORE, True)
        return {"logprobs": -nll, "entropy": entropy}

    return call


@_peer("linear_logprob", "liger-flce-none", "less", distribution="liger-kernel", needs_cuda=True)
def _liger_flce_none() -> Provider:
    """Liger's Triton cross entropy with ``reduction="none"``, on any GPU; no entropy."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(hidden, weight, target_ids, row_mask):
        found = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, _ignored(target_ids, row_mask), None, None, IGNORE, 0.0, 0.0, "none"
        )
        return {"logprobs": -(found[0] if isinstance(found, tuple) else found)}

    return call


@_peer("linear_logprob", "verl", "same", distribution="verl", needs_cuda=True)
def _verl_linear() -> Provider:
    function = _verl_linear_cross_entropy()

    def call(hidden, weight, target_ids, row_mask):
        logprobs, entropy = function(hidden, weight, target_ids, 1.0, "none")
        return _masked({"logprobs": logprobs, "entropy": entropy}, row_mask)

    return call


@_peer("linear_logprob", "cce", "less", distribution="cut-cross-entropy", needs_cuda=True)
def _cce_linear() -> Provider:
    """No entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, ids, row_mask: {
        "logprobs": -linear_cross_entropy(hidden, weight, _ignored(ids, row_mask), reduction="none")
    }


@_peer("linear_logprob", "torch.linear_cross_entropy", "less")
def _torch_linear() -> Provider:
    """No entropy."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("torch.nn.functional.linear_cross_entropy needs torch >= 2.13")
    # its default chunk is a handful of rows where V / H is large, several times slower
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=GEMM_ROWS, chunking_method=None)

    return lambda hidden, weight, ids, row_mask: {
        "logprobs": -F.linear_cross_entropy(
            hidden, weight, _ignored(ids, row_mask), reduction="none", options=options
        )
    }


# --- mean cross entropy: no scores of a token, no weights, no entropy ----------


@_peer("linear_cross_entropy", "liger-flce", "less", distribution="liger-kernel")
def _liger_cross_entropy() -> Provider:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def call(hidden, weight, target_ids):
        found = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target_ids)
        return {"cross_entropy": found[0] if isinstance(found, tuple) else found}

    return call


@_peer("linear_cross_entropy", "quack", "less", distribution="quack-kernels", needs_cuda=True)
def _quack_cross_entropy() -> Provider:
    """Tunes itself for minutes in its first call."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def call(hidden, weight, target_ids):
        return {"cross_entropy": chunked_linear_cross_entropy(hidden, weight, target_ids)}

    return call


# --- from log-probabilities ----------------------------------------------------


def clipped_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    eps_low: float,
    eps_high: float,
) -> torch.Tensor:
    """Token-mean clipped loss of packed rows ``[T]``; without old log-probs the ratio is 1."""
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    terms = -torch.minimum(ratio * advantages, clipped * advantages) * response_mask
    return terms.sum() / response_mask.sum()


def eager_policy_loss(inputs: dict[str, torch.Tensor], options: dict) -> Outputs:
    """Token-mean clipped loss with a k3 penalty, and its statistics, as trainers write them with
    masks.

    arXiv 2503.14476, eq. 8; the denominator counts every response token, kept or not.
    """
    mask = inputs["response_mask"]
    cu_seqlens = inputs["cu_seqlens"]
    lengths = cu_seqlens.diff()
    logprobs, entropy = inputs["logprobs"], inputs["entropy"]
    A = inputs["advantages"].repeat_interleave(lengths, output_size=len(mask))
    n = mask.sum()

    def mean(x: torch.Tensor) -> torch.Tensor:
        return (x * mask).sum() / n

    ratio = torch.exp(logprobs - inputs["old_logprobs"])
    clipped = ratio.clamp(1 - options["eps_low"], 1 + options["eps_high"])
    pg = -torch.minimum(ratio * A, clipped * A) * inputs["keep_mask"]
    gap = inputs["ref_logprobs"] - logprobs
    kl = gap.exp() - gap - 1
    with torch.no_grad():
        rows = torch.arange(len(lengths), device=mask.device)
        sequence = rows.repeat_interleave(lengths, output_size=len(mask))
        zeros = torch.zeros(len(lengths), dtype=entropy.dtype, device=mask.device)
        totals = zeros.index_add(0, sequence, entropy * mask)
        counts = zeros.index_add(0, sequence, mask.to(entropy.dtype))
        metrics = {
            "clip_low": mean((A < 0) & (ratio < 1 - options["eps_low"])),
            "clip_high": mean((A > 0) & (ratio > 1 + options["eps_high"])),
            "kl": mean(kl),
            "entropy_token_mean": mean(entropy),
            "entropy_sequence_mean": (totals / counts).mean(),
            "ratio_mean": mean(ratio),
            "ratio_min": ratio.masked_fill(~mask, torch.inf).min(),
            "ratio_max": ratio.masked_fill(~mask, -torch.inf).max(),
            "masked_fraction": mean(~inputs["keep_mask"]),
        }
    return {"loss": mean(pg + options["kl_coef"] * kl), **metrics}


@_peer("policy_loss", "eager", "same")
def _eager_policy() -> Provider:
    return eager_policy_loss


@_peer("policy_loss", "torch.compile", "same")
def _compiled_policy() -> Provider:
    return torch.compile(eager_policy_loss, dynamic=False)


@_peer("policy_loss", "copy-of-inputs", "less", has_backward=False)
def _copied_inputs() -> Provider:
    """Not a loss: what moving the inputs once costs with a launch per tensor."""

    def call(inputs: dict[str, torch.Tensor], _options: dict) -> Outputs:
        copies = {name: x.clone() for name, x in inputs.items()}
        return {"copy": copies["logprobs"]}

    return call
