"""The routes by name, and the model that some of them and some filters ask.

A route is a function ``(documents, *, seed, limit, **options) -> Iterator[Sample]``; one that takes
``client`` gets the recipe's model, or None; one that takes ``max_tokens`` gets the bound that the
recipe sets on that model's replies, unless its options name another; one that takes ``extracted``
gets the triples that the model read out of the documents; one that takes ``dropped`` counts there,
by reason, what came to nothing. Its samples hold evidence documents alone, all of one split.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlong.data.documents import SourceDocument
from qwenlong.data.graph_sources import Triple
from qwenlong.data.loaders import import_function
from qwenlong.data.recipe import ModelConfig, RouteConfig
from qwenlong.errors import InputError
from qwenlong.prompts import Message
from qwenlong.rewards import reward_names
from qwenlong.storage import read_jsonl
from qwenlong.types import Sample

if TYPE_CHECKING:
    from qwenlong.llm import Client

# A route may name an answer type as its reward: the rule that the type stands for.
REWARDS = {"choice": "multiple_choice", "number": "numeric", "text": "cover"}

ROUTES = {
    "multihop": "qwenlong.data.graph:multihop_samples",
    "choice": "qwenlong.data.text_tasks:choice_samples",
    "reading": "qwenlong.data.text_tasks:reading_samples",
    "dialogue": "qwenlong.data.text_tasks:dialogue_samples",
    "tables": "qwenlong.data.table_questions:table_samples",
    "evolve": "qwenlong.data.evolve:evolve_samples",
}


def route_samples(
    route: RouteConfig,
    documents: Sequence[SourceDocument],
    *,
    seed: int,
    limit: int,
    client: Client | None,
    max_tokens: int | None = None,
    extracted: Sequence[Triple] = (),
    dropped: Counter[str] | None = None,
) -> Iterator[Sample]:
    """Run one route. ``route.route`` is a name of ``ROUTES`` or ``module:function``."""
    function, parameters = find_route(route, has_model=client is not None)
    options: dict[str, Any] = dict(route.options)
    if "client" in parameters:
        options["client"] = client
    if "max_tokens" in parameters and max_tokens is not None:
        options.setdefault("max_tokens", max_tokens)
    if "extracted" in parameters:
        options["extracted"] = extracted
    if "dropped" in parameters:
        options["dropped"] = dropped
    return map(_with_reward, function(documents, seed=seed, limit=limit, **options))


def find_route(
    route: RouteConfig, *, has_model: bool
) -> tuple[Callable[..., Iterator[Sample]], Mapping[str, inspect.Parameter]]:
    """The function of a route and its parameters; InputError where the recipe does not fit it."""
    function = import_function(ROUTES.get(route.route, route.route), "route")
    parameters = inspect.signature(function).parameters
    if (
        "client" in parameters
        and not has_model
        and parameters["client"].default is inspect.Parameter.empty
    ):
        raise InputError(f"route {route.route!r} asks a model; give the recipe a 'model'")
    for name in route.options:
        if name not in parameters:
            raise InputError(
                f"route {route.route!r} has no option {name!r}; it has {sorted(parameters)}"
            )
    return function, parameters


def _with_reward(sample: Sample) -> Sample:
    name = REWARDS.get(sample.reward, sample.reward)
    if name not in reward_names():
        raise InputError(f"sample {sample.id!r} has reward {name!r}; known: {reward_names()}")
    return sample.model_copy(update={"reward": name})


def route_code(route: RouteConfig) -> str:
    """A hash of the code of a route, for a stage's key: its module, or our package."""
    function = import_function(ROUTES.get(route.route, route.route), "route")
    path = Path(importlib.import_module(function.__module__).__file__)
    is_ours = path.parent == Path(__file__).parent
    code = hashlib.sha256()
    for file in sorted(path.parent.glob("*.py")) if is_ours else [path]:
        code.update(file.read_bytes())
    return code.hexdigest()[:16]


# --- model -------------------------------------------------------------------


def open_client(config: ModelConfig, cache: Path, *, share: int = 1) -> Client:
    """The client of a recipe's model; its answers are kept in ``cache``.

    Args:
        share: how many processes divide ``config.concurrency`` among them.
    """
    prices = (config.usd_per_million_prompt_tokens, config.usd_per_million_completion_tokens)
    options = {
        "cache": cache,
        "max_concurrency": max(1, config.concurrency // share),
        "prices": prices,
    }
    if config.scripted:
        return import_function(config.scripted, "scripted model")(**options)
    from qwenlong.llm import ChatClient

    api_key = os.environ.get(config.api_key_env)
    return ChatClient(config.base_url, model=config.model, api_key=api_key, **options)


def usage(config: ModelConfig, cache: Path) -> dict[str, Any]:
    """What all answers in ``cache`` cost, over all runs that wrote there."""
    calls = [
        row["value"] for path in sorted(cache.glob("calls-*.jsonl")) for row in read_jsonl(path)
    ]
    prompt = sum(value.get("prompt_tokens", 0) for value in calls)
    completion = sum(value.get("completion_tokens", 0) for value in calls)
    cost = (
        prompt * config.usd_per_million_prompt_tokens
        + completion * config.usd_per_million_completion_tokens
    ) / 1e6
    return {
        "model": config.model or config.scripted,
        "answers": len(calls),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost_usd": round(cost, 6),
    }


class ModelAsker:
    """``k`` answers of a client to one prompt."""

    def __init__(self, client: Client, *, temperature: float, max_tokens: int):
        self.name = client.model
        self._client, self._temperature, self._max_tokens = client, temperature, max_tokens

    def __call__(self, messages: list[Message], k: int) -> list[str]:
        from qwenlong.llm import Request

        request = Request.chat(messages, temperature=self._temperature, max_tokens=self._max_tokens)
        return [completion.text for completion in self._client.sample(request, k)]
