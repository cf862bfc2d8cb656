"""A transformers model in this process: for laptops and for small models, no server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenlong.llm.base import Client
from qwenlong.llm.records import Completion, Request, RequestRefused

if TYPE_CHECKING:
    import torch

_GATHER_SECONDS = 0.05  # without a new request before a batch that is not full starts
_STOP_TAIL = 16  # tokens beyond a stop string's own length that are decoded to find it


class EmbeddedClient(Client):
    """Answers with a causal language model of transformers.

    Requests that wait at the same time are generated as one batch, left-padded. A batch that is not
    full starts when no request has come for 50 ms: callers whose answers came together ask again
    one after the other, and the first of them would be a batch of its own. Every request has a
    random generator of its own (its seed plus ``sample_index``; without a seed, one derived from
    its content), so what it draws does not depend on its neighbours, up to the rounding of a padded
    batch. Nor does its fate: the requests of a batch that fails are generated one by one, and only
    those that fail alone raise. ``logprobs`` are of the temperature-scaled, untruncated
    distribution (temperature 1 where it is 0). ``extra_body={"chat_template_kwargs": {...}}``
    reaches the chat template.

    Args:
        model: a ``PreTrainedModel``, or a folder or hub name.
        tokenizer: of the model; default the one beside it.
        batch_size: requests generated together.
        name: goes into cache keys; default the folder or hub name.
        **options: of ``Client``; ``max_concurrency`` defaults to ``2 * batch_size``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        batch_size: int = 8,
        name: str | None = None,
        **options: Any,
    ):
        if isinstance(model, (str, Path)):
            from transformers import AutoModelForCausalLM

            name = name or str(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        name = name or model.config.name_or_path
        if options.get("cache") is not None and not name:
            raise ValueError("EmbeddedClient: a cache needs name=, which tells models apart")
        if tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        options.setdefault("max_concurrency", 2 * batch_size)
        super().__init__(model=name, **options)
        self._network, self._tokenizer = model.eval(), tokenizer
        self._batch_size = batch_size
        eos = model.generation_config.eos_token_id
        self._eos = set(eos) if isinstance(eos, list) else {eos, tokenizer.eos_token_id}
        self._waiting: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def _attempt(self, request: Request, n: int) -> list[Completion]:
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return [await future]

    async def _work(self) -> None:
        while self._waiting:
            known = 0
            while known < len(self._waiting) < self._batch_size:
                known = len(self._waiting)
                await self._time.sleep(_GATHER_SECONDS)
            batch, self._waiting = (
                self._waiting[: self._batch_size],
                self._waiting[self._batch_size :],
            )
            requests, futures, prompts = [], [], []
            for request, future in batch:
                if future.done():  # cancelled while it waited
                    continue
                try:
                    prompts.append(self._prompt_ids(request))
                except Exception as error:  # the caller's to see, and no reason to stop the others
                    future.set_exception(error)
                else:
                    requests.append(request)
                    futures.append(future)
            results = await asyncio.to_thread(self._generate_apart, requests, prompts, futures)
            for future, result in zip(futures, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _generate_apart(
        self, requests: list[Request], prompts: list[list[int]], futures: list[asyncio.Future]
    ) -> list[Completion | Exception]:
        """An answer or an error for each request, its own and not that of its neighbour."""
        try:
            return list(self._generate(requests, prompts, futures))
        except Exception as error:
            if len(requests) == 1:
                return [error]
        one_by_one = zip(requests, prompts, futures, strict=True)
        return [result for r, p, f in one_by_one for result in self._generate_apart([r], [p], [f])]

    def _prompt_ids(self, request: Request) -> list[int]:
        if request.messages is not None:
            kwargs = request.sampling.extra_body.get("chat_template_kwargs", {})
            text = self._tokenizer.apply_chat_template(
                [dict(m) for m in request.messages],
                add_generation_prompt=True,
                tokenize=False,
                **kwargs,
            )
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        elif isinstance(request.prompt, str):
            ids = self._tokenizer(request.prompt)["input_ids"]
        else:
            ids = list(request.prompt)
        if not ids:
            raise RequestRefused(f"{self.model}: the prompt has no tokens")
        if len(ids) >= self._context:
            raise RequestRefused(
                f"{self.model}: the prompt has {len(ids)} tokens, the model's context is "
                f"{self._context}",
                status=400,
            )
        V = self._network.get_input_embeddings().num_embeddings
        if not 0 <= min(ids) <= max(ids) < V:  # on a GPU it would end the process
            raise RequestRefused(
                f"{self.model}: the prompt holds the ids {min(ids)} to {max(ids)}, the model's are "
                f"0 to {V - 1}",
                status=400,
            )
        return ids

    @property
    def _context(self) -> int:
        return self._network.config.get_text_config().max_position_embeddings

    def _seed(self, request: Request) -> int:
        if request.sampling.seed is not None:
            return request.sampling.seed + request.sample_index
        return int(request.key(self.model, self.namespace)[:15], 16)

    def _generate(
        self, requests: list[Request], prompts: list[list[int]], futures: list[asyncio.Future]
    ) -> list[Completion]:
        """The answers; one that was cancelled is not written to its end, and nobody reads it."""
        import torch

        if not requests:
            return []
        device = self._network.device
        width = max(map(len, prompts))
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        rows = [
            _Row(r, self._seed(r), self._context - len(p), self._tokenizer, self._eos)
            for r, p in zip(requests, prompts, strict=True)
        ]
        cache = None
        with torch.inference_mode():
            while True:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                out = self._network(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = out.past_key_values
                logits = out.logits[:, -1].float()  # [batch, V]
                best = logits.argmax(-1)
                best_logprobs = logits.gather(1, best[:, None])[:, 0] - logits.logsumexp(-1)
                found = zip(rows, logits, best.tolist(), best_logprobs.tolist(), strict=True)
                tokens = [row.step(*of_row) for row, *of_row in found]
                if all(r.finish_reason or f.done() for r, f in zip(rows, futures, strict=True)):
                    return [row.completion(len(p)) for row, p in zip(rows, prompts, strict=True)]
                ids = torch.tensor(tokens, device=device).unsqueeze(1)
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)


class _Row:
    """One answer that is being written."""

    def __init__(self, request: Request, seed: int, room: int, tokenizer: Any, eos: set[int]):
        import torch

        self.sampling = request.sampling
        self.generator = torch.Generator().manual_seed(seed % 2**63)
        limit = self.sampling.max_tokens
        self.limit = room if limit is None else min(limit, room)
        self.tokenizer, self.eos = tokenizer, eos
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.text_end: int | None = None  # where a stop string begins
        self.finish_reason = ""

    def step(self, logits: torch.Tensor, best: int, best_logprob: float) -> int:
        """Choose the next token from ``logits [V]``, of which ``best`` is the largest. A finished
        row repeats its last one.
        """
        if self.finish_reason:
            return self.ids[-1]
        token, logprob = best, best_logprob
        if self.sampling.temperature != 0:
            logprobs = (logits.cpu() / self.sampling.temperature).log_softmax(-1)  # [V]
            token = self._sample(logprobs)
            logprob = logprobs[token].item()
        self.ids.append(token)
        self.logprobs.append(logprob)
        if token in self.eos or self._found_stop():
            self.finish_reason = "stop"
        elif len(self.ids) >= self.limit:
            self.finish_reason = "length"
        return token

    def _sample(self, logprobs: torch.Tensor) -> int:
        probs = logprobs.exp()
        if self.sampling.top_p < 1.0:
            ordered, order = probs.sort(descending=True, stable=True)
            # The smallest set that reaches top_p: what stands before a token decides on it.
            outside = ordered.cumsum(0) - ordered >= self.sampling.top_p
            probs = probs.index_fill(0, order[outside], 0.0)
        return int(probs.multinomial(1, generator=self.generator))

    def _found_stop(self) -> bool:
        if not self.sampling.stop:
            return False
        longest = max(len(stop.encode()) for stop in self.sampling.stop)  # a token a byte
        tail = self._decode(self.ids[-(longest + _STOP_TAIL) :])
        if not any(stop in tail for stop in self.sampling.stop):
            return False
        text = self._decode(self.ids)
        self.text_end = min(text.find(stop) for stop in self.sampling.stop if stop in text)
        return True

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def completion(self, prompt_tokens: int) -> Completion:
        return Completion(
            text=self._decode(self.ids)[: self.text_end],
            finish_reason=self.finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(self.ids),
            logprobs=tuple(self.logprobs) if self.sampling.logprobs else None,
            token_ids=tuple(self.ids),
        )
