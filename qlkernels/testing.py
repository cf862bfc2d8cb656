"""The tolerance rule, seeded inputs and awkward shapes. Tests and benchmarks share them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

# (T, V): nothing, one, primes, one either side of a tile, a real tile boundary
AWKWARD_TV = [(0, 37), (1, 1), (1, 2), (3, 37), (5, 127), (5, 128), (5, 129), (4, 5003), (17, 1031)]


def assert_as_accurate(name, actual, truth, baseline, *, slack=2.0, floor=1e-5):
    """Fail where ``actual`` errs more than ``slack`` times as much as ``baseline`` does.

    ``truth`` is the reference in fp64, ``baseline`` the reference in the input's own dtype (for
    GEMM ops: the same inputs with fp32 accumulation). ``floor`` is relative to the largest true
    value.
    """
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape} != {truth.shape}"
    actual, truth, baseline = (x.detach().double().cpu() for x in (actual, truth, baseline))
    assert torch.equal(actual.isnan(), truth.isnan()), f"{name}: NaN in other places"
    assert torch.equal(actual.isinf(), truth.isinf()), f"{name}: inf in other places"
    if truth.numel() == 0:
        return
    finite = truth.isfinite()
    error = torch.where(finite, actual - truth, 0.0).abs()
    slip = torch.where(finite, baseline - truth, 0.0).abs()
    allowed = slack * slip.max() + floor * torch.where(finite, truth, 0.0).abs().max()
    worst = error.argmax()
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.2e} > {allowed:.2e} at flat index {worst.item()}: "
        f"got {actual.flatten()[worst]:.6g}, want {truth.flatten()[worst]:.6g}"
    )


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute error over the largest true value; NaN where the NaNs differ."""
    if truth.numel() == 0:
        return 0.0
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    if not torch.equal(actual.isfinite(), truth.isfinite()):
        return math.nan
    scale = truth.abs().max().clamp_min(1e-30)
    return float((actual - truth).abs().max() / scale)


def outputs_and_grads(
    function: Callable[..., torch.Tensor | tuple],
    inputs: dict[str, torch.Tensor],
    upstream: list[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Run ``function(**inputs)``, backpropagate ``upstream`` and return outputs and ``d<input>`` by
    name.

    Outputs are numbered ``out0``, ``out1``, ... Only floating-point inputs that require a gradient
    get one.
    """
    leaves = {
        k: x.detach().clone().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for k, x in inputs.items()
    }
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((o * g.to(o.dtype)).sum() for o, g in zip(outputs, upstream, strict=True))
    if total.requires_grad:
        total.backward()
    found = {f"out{i}": o for i, o in enumerate(outputs)}
    for name, leaf in leaves.items():
        if leaf.is_floating_point() and leaf.requires_grad:
            found[f"d{name}"] = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
    return found


def peaked_logits(
    T: int, V: int, dtype=torch.float32, device="cpu", *, seed=0, mean_entropy: float = 0.2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``[T, V]`` shaped like a trained policy's, and sampled targets ``[T]`` int64.

    A few candidates per row stand out by a margin that varies from row to row, so that most rows
    are nearly certain and some are not. The margin is shifted by bisection until the mean entropy
    is ``mean_entropy`` nats (within 2 %, measured on at most 256 rows).
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    logits = torch.empty(T, V, dtype=dtype, device=device)
    n_candidates = min(8, V)
    columns = torch.randint(V, (T, n_candidates), generator=generator)
    # [T, C]: exponential gaps between the candidates, wide on most rows and narrow on some
    gaps = torch.empty(T, n_candidates).exponential_(1.0, generator=generator).cumsum(1)
    width = torch.empty(T, 1).exponential_(0.25, generator=generator)
    scores = -gaps * width
    probe = min(T, 256)

    def mean_entropy_at(margin: float) -> float:
        u = torch.cat([scores[:probe] + margin, torch.full((probe, 1), math.log(max(V - 8, 1)))], 1)
        logp = u.double().log_softmax(1)
        # the tail is V - 8 columns that share its mass
        tail = logp[:, -1].exp() * math.log(max(V - 8, 1))
        return float((-(logp.exp() * logp).sum(1) + tail).mean()) if probe else 0.0

    low, high = 0.0, 60.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy_at(middle) > mean_entropy else (low, middle)
    for start in range(0, T, 1024):
        stop = min(T, start + 1024)
        block = 0.1 * torch.randn(stop - start, V, generator=generator)
        block.scatter_(1, columns[start:stop], scores[start:stop] + high)
        logits[start:stop] = block.to(device=device, dtype=dtype)
    pick = torch.multinomial(scores.softmax(1), 1, generator=generator) if T else columns[:, :1]
    return logits, columns.gather(1, pick).squeeze(1).to(device)


@contextlib.contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Uninitialised memory is NaN (the largest value for integers) inside the block, as it may be
    in real life.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill
