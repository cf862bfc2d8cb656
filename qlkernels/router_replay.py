"""Records which experts a transformers model chose in one pass, and makes another pass use them.

Rollout engine and trainer, or two passes of one trainer, compute router logits that differ in the
last bits and then choose other experts: on Qwen3-30B-A3B about one decision in ten (arXiv
2510.11370). Replayed, only the choice is taken over; the weights come from the live softmax over
all experts, so that routers keep their gradient.

    with record_routing(model) as recorder:
        old_logprobs = score(model, batch)
    with replay_routing(model, recorder.record()):
        loss(model, batch, old_logprobs).backward()

A record takes one byte a (token, layer, slot) for up to 255 experts, two for up to 32767: 384 bytes
a token of a model with 48 layers and top_k 8.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import weakref
from collections.abc import Iterator, Sequence

import torch

from qlkernels.moe_routing import moe_route

# Routers of transformers that choose the top_k of a softmax, and whether they normalise the
# weights; None: as their norm_topk_prob says.
NORMALISES: dict[str, bool | None] = {
    "FlexOlmoTopKRouter": None,
    "GraniteMoeHybridTopKRouter": True,
    "GraniteMoeSharedTopKRouter": True,
    "GraniteMoeTopKRouter": True,
    "JambaTopKRouter": False,
    "MiniMaxTopKRouter": True,
    "MixtralTopKRouter": True,
    "OlmoeTopKRouter": None,
    "Qwen2MoeTopKRouter": None,
    "Qwen3MoeTopKRouter": None,
    "Qwen3NextTopKRouter": None,
    "Qwen3OmniMoeTalkerTextTopKRouter": None,
    "Qwen3OmniMoeThinkerTextTopKRouter": None,
    "Qwen3VLMoeTextTopKRouter": True,
    "Qwen3_5MoeTopKRouter": True,
}


def _storage(num_experts: int) -> torch.dtype:
    """The smallest dtype in which -1 does not collide with an expert (in uint8 it is 255)."""
    if num_experts <= 255:
        return torch.uint8
    return torch.int16 if num_experts <= 32767 else torch.int32


@dataclasses.dataclass(frozen=True)
class RoutingRecord:
    """The experts of every token in every MoE layer of one pass.

    Rows are tokens in the order in which the routers saw them: batch-major for a padded batch, call
    after call where a pass takes several. A row may have no route, and then routes live.
    """

    ids: (
        torch.Tensor
    )  # [layers, T, top_k] uint8, int16 or int32, as num_experts needs; -1 cast: none
    layers: tuple[int, ...]  # decoder layer of each, as in the model's `layers.N`
    num_experts: int

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def top_k(self) -> int:
        return self.ids.shape[2]

    def layer_ids(self, layer: int) -> torch.Tensor:
        """``[T, top_k]`` int32 of a decoder layer, rows of -1 where there is no route: what
        ``moe_route`` takes as ``replay_ids``.
        """
        if layer not in self.layers:
            raise ValueError(
                f"RoutingRecord: layer {layer} is not recorded; recorded are {list(self.layers)}"
            )
        ids = self.ids[self.layers.index(layer)].int()
        return torch.where(ids == 255, -1, ids) if self.ids.dtype == torch.uint8 else ids

    def rows(self, index: slice | torch.Tensor) -> RoutingRecord:
        """The record of some of the tokens, such as those of one micro-batch."""
        return dataclasses.replace(self, ids=self.ids[:, index])

    def to(self, device: torch.device | str) -> RoutingRecord:
        return dataclasses.replace(self, ids=self.ids.to(device))

    @classmethod
    def from_engine(
        cls,
        routes: torch.Tensor,
        num_experts: int,
        *,
        num_tokens: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> RoutingRecord:
        """From what a rollout engine returns with a sequence (``routed_experts`` of vLLM, SGLang).

        Args:
            routes: ``[T', layers, top_k]`` integers. A row that is negative or repeats an expert
                holds no route: engines mark with it what they did not compute.
            num_experts: of a layer.
            num_tokens: tokens of the pass, ``T' <= num_tokens``; the tokens after those of the
                engine have no route (the last token of a sequence never has one). Default ``T'``.
            layers: decoder layers of the second dim; default 0, 1, 2, ...

        Raises:
            ValueError: a shape or an id that does not fit.
        """
        if routes.dim() != 3:
            raise ValueError(
                "RoutingRecord.from_engine: routes must be [T, layers, top_k], got shape "
                f"{tuple(routes.shape)}"
            )
        T, n_layers, top_k = routes.shape
        num_tokens = T if num_tokens is None else num_tokens
        layers = tuple(range(n_layers) if layers is None else layers)
        if len(layers) != n_layers or num_tokens < T:
            raise ValueError(
                f"RoutingRecord.from_engine: routes has {T} tokens and {n_layers} layers, but "
                f"num_tokens = {num_tokens} and {len(layers)} layers are named"
            )
        ids = routes.long().transpose(0, 1)  # [layers, T, top_k]
        if ids.numel() and int(ids.max()) >= num_experts:
            raise ValueError(
                f"RoutingRecord.from_engine: routes holds expert {int(ids.max())}, but the model "
                f"has {num_experts} experts a layer"
            )
        in_order = ids.sort(dim=2).values
        repeats = (in_order[..., 1:] == in_order[..., :-1]).any(dim=2, keepdim=True)
        unknown = (ids < 0).any(dim=2, keepdim=True) | repeats
        whole = ids.new_full((n_layers, num_tokens, top_k), -1)
        whole[:, :T] = torch.where(unknown, -1, ids)
        return cls(whole.to(_storage(num_experts)), layers, num_experts)


class RoutingRecorder:
    """Filled by the passes inside ``record_routing``."""

    def __init__(self, num_experts: int, layers: Sequence[int]):
        self._num_experts = num_experts
        self._ids: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def add(self, layer: int, topk_ids: torch.Tensor) -> None:
        self._ids[layer].append(topk_ids.detach().to(_storage(self._num_experts)))

    def record(self) -> RoutingRecord:
        """What was recorded so far, on the model's device; calls follow each other as tokens.

        Raises:
            RuntimeError: no pass ran, or one ended before its last layer.
        """
        counts = {layer: sum(x.shape[0] for x in ids) for layer, ids in self._ids.items()}
        if len(set(counts.values())) != 1 or not all(self._ids.values()):
            raise RuntimeError(
                f"record_routing: tokens recorded by layer are {counts}; run a whole pass of the "
                "model inside the context"
            )
        device = next(iter(self._ids.values()))[0].device
        ids = torch.stack([torch.cat(x).to(device) for x in self._ids.values()])
        return RoutingRecord(ids, tuple(self._ids), self._num_experts)


def _routers(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The routers of ``model`` by decoder layer, all of one size."""
    found: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not kind.endswith("Router"):
            continue
        if kind not in NORMALISES:
            raise ValueError(
                f"router_replay: {name} is a {kind}, which does not choose the top_k of a softmax "
                f"as {', '.join(NORMALISES)} do"
            )
        position = re.search(r"\blayers\.(\d+)\.", name)
        if position is None:
            raise ValueError(f"router_replay: {name} does not say which layer it belongs to")
        layer = int(position.group(1))
        if layer in found:
            raise ValueError(
                f"router_replay: layer {layer} has two routers; pass one decoder of the model"
            )
        found[layer] = module
    if not found:
        raise ValueError(f"router_replay: {type(model).__name__} has no router")
    sizes = {(m.num_experts, m.top_k) for m in found.values()}
    if len(sizes) != 1:
        raise ValueError(f"router_replay: layers differ in (experts, top_k): {sorted(sizes)}")
    return dict(sorted(found.items()))


def _is_in_backward() -> bool:
    """Whether autograd runs this call, as it does where a checkpointed layer is computed again."""
    return torch._C._current_graph_task_id() != -1


def _function_context(direction: str) -> torch.autograd.function.BackwardCFunction | None:
    """The context of the ``autograd.Function`` inside whose ``direction`` (``"forward"`` or
    ``"backward"``) this call runs, as a layer does under reentrant checkpointing.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == direction and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch.autograd.function.BackwardCFunction):
                return first
        frame = frame.f_back
    return None


class _Recomputation:
    """Passes of a replay that a backward will compute again, and has not.

    A layer that runs inside the forward of an ``autograd.Function`` leaves no graph of its own: the
    backward of that function has to run it once more. Nothing compares the two runs.
    """

    def __init__(self) -> None:
        self._pending: weakref.WeakSet = weakref.WeakSet()  # a dropped graph is not computed again

    def note(self) -> None:
        """A replayed router ran."""
        if torch.compiler.is_compiling():
            return
        is_again = _is_in_backward()
        if torch.is_grad_enabled() and not is_again:
            return  # it has a graph of its own
        context = _function_context("backward" if is_again else "forward")
        if context is not None:
            (self._pending.discard if is_again else self._pending.add)(context)

    def check(self) -> None:
        if self._pending:
            raise RuntimeError(
                "replay_routing: the block ends before the backward that computes the layers of "
                f"{len(self._pending)} checkpoints again, which would then choose experts of their "
                "own; call backward() inside the block"
            )


@contextlib.contextmanager
def record_routing(model: torch.nn.Module) -> Iterator[RoutingRecorder]:
    """Record the experts that ``model`` chooses inside the block; nothing synchronises.

    Prefill and decode steps may follow each other. What gradient checkpointing computes again is
    not recorded twice. A model under ``torch.compile`` must be compiled inside the block.

    Args:
        model: of transformers, with softmax routers (``NORMALISES`` names them).

    Yields:
        ``RoutingRecorder``; its ``record()`` is a ``RoutingRecord``.

    Raises:
        ValueError: ``model`` has no router, or one of another kind.
    """
    routers = _routers(model)
    some = next(iter(routers.values()))
    recorder = RoutingRecorder(some.num_experts, tuple(routers))

    def hook(layer, _module, _args, output):
        if not _is_in_backward():
            recorder.add(layer, output[2])

    with _hooks(routers, hook):
        yield recorder


@contextlib.contextmanager
def replay_routing(model: torch.nn.Module, record: RoutingRecord) -> Iterator[None]:
    """Inside the block ``model`` uses the experts of ``record``, with weights of its own.

    Every pass inside the block routes the tokens of ``record``, all of them and in its order; for a
    micro-batch use ``record.rows(...)`` and a block of its own. Under gradient checkpointing the
    backward must run inside the block too, once. Else, with ``use_reentrant=True``, the end of the
    block raises; with ``use_reentrant=False`` the backward does, torch's ``CheckpointError``: it
    counts the tensors that a layer saves, and replaying saves more of them. That count is torch's
    only check, so it misses a layer whose router logits require no gradient.

    Args:
        model: of transformers, with softmax routers (``NORMALISES`` names them).
        record: of the same layers, experts and top_k; tokens without a route are routed live.

    Raises:
        ValueError: model and record do not fit; in a pass, another number of tokens.
        RuntimeError: at the end of the block, a reentrant checkpoint inside it waits for its
            backward.
    """
    routers = _routers(model)
    some = next(iter(routers.values()))
    wanted = (tuple(routers), some.num_experts, some.top_k)
    found = (record.layers, record.num_experts, record.top_k)
    if wanted != found:
        raise ValueError(
            f"replay_routing: the model has (layers, experts, top_k) = {wanted}, the record {found}"
        )

    recomputation = _Recomputation()

    def hook(layer, module, _args, output):
        recomputation.note()
        logits, weights, ids = output
        if logits.shape[0] != record.num_tokens:
            raise ValueError(
                f"replay_routing: the pass has {logits.shape[0]} tokens, the record "
                f"{record.num_tokens}; use record.rows(...) for a part of them"
            )
        norm_topk_prob = NORMALISES[type(module).__name__]
        routing = moe_route(
            logits,
            module.top_k,
            norm_topk_prob=module.norm_topk_prob if norm_topk_prob is None else norm_topk_prob,
            replay_ids=record.layer_ids(layer).to(logits.device),
        )
        return logits, routing.topk_weights.to(weights.dtype), routing.topk_ids.to(ids.dtype)

    with _hooks(routers, hook):
        yield
    recomputation.check()


@contextlib.contextmanager
def _hooks(routers: dict[int, torch.nn.Module], hook) -> Iterator[None]:
    """``hook(layer, module, args, output)`` after each router, until the block ends."""
    handles = []
    try:
        for layer, module in routers.items():
            handles.append(
                module.register_forward_hook(
                    lambda *arguments, layer=layer: hook(layer, *arguments)
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
