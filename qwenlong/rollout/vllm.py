"""Answers from a vLLM server over HTTP, and new weights for it after each step.

Token ids go in, token ids and log-probs come out. Start the server like this; the folder of the
weights must be one that trainer and server both see, ``/dev/shm`` on one machine:

    VLLM_SERVER_DEV_MODE=1 PYTHONPATH=<folder that holds qwenlong> vllm serve MODEL \\
        --served-model-name policy --logprobs-mode processed_logprobs \\
        --worker-extension-cls qwenlong.vllm_worker.WeightsFromFile \\
        --weight-transfer-config '{"backend": "qwenlong_file"}'

Faults: requests that fail are repeated with growing pauses, and a stream that stalls or breaks off
counts as failed; after the last attempt ``ServerUnavailable`` says what happened. A server that was
started again has its first weights: that is noticed by the version it reports, the weights are sent
again, and answers that were written across the change are thrown away and asked for again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from qwenlong.errors import InputError
from qwenlong.llm import (
    ChatClient,
    Completion,
    LLMError,
    Request,
    RequestRefused,
    RetryPolicy,
    ServerUnavailable,
    TransientError,
)
from qwenlong.types import Turn
from qwenlong.weight_stream import SPLIT_EXPERTS, WeightStream, split_experts

HOW_TO_START = "start it as the docstring of qwenlong.rollout.vllm says"
# A server takes these from the model's generation_config where a request does not say them.
UNTRUNCATED = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_AGAIN = "-again"  # ends the version of weights that a restarted server got a second time
_VERSION = re.compile(rf"[0-9a-f]{{8}}-step-\d+({_AGAIN})*")
RESTARTS = 2  # of a server during one call, after which it is given up


class VllmRollouts:
    """Implements ``qwenlong.rollout.Rollouts`` over HTTP.

    Args:
        base_url: of the server, without ``/v1``.
        model: the name it serves the policy under.
        weights_folder: where new weights are written for the server to read; None for a server
            whose weights never change, which ``sync_weights`` then refuses.
        weights_dtype: of that file; None writes the model's own.
        timeout_s: without a byte from the server.
        max_concurrency: answers that are asked for at the same time.
        retry: how failed requests are repeated.
        api_key: default ``OPENAI_API_KEY`` of the environment, or none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        weights_folder: str | Path | None = None,
        weights_dtype: torch.dtype | None = None,
        timeout_s: float = 3600.0,
        max_concurrency: int = 256,
        retry: RetryPolicy | None = None,
        api_key: str | None = None,
    ):
        import httpx  # here, so that embedded rollouts need no such package

        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._folder = Path(weights_folder) if weights_folder is not None else None
        self._dtype = weights_dtype
        self._retry = retry or RetryPolicy()
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._chat = ChatClient(
            f"{self._root}/v1",
            model=model,
            api_key=key,
            timeout=timeout_s,
            stream=True,
            max_concurrency=max_concurrency,
            retry=self._retry,
        )
        self._http = httpx.Client(
            base_url=self._root,
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            headers={"Authorization": f"Bearer {key}"},
        )
        self._errors = httpx.HTTPError
        self._session = uuid.uuid4().hex[:8]  # versions of two trainers must not be alike
        self._version: str | None = None  # of the weights that were sent last
        self._file: Path | None = None
        self._lock: IO[str] | None = None  # held while the files of this session are in use
        self._is_processed: bool | None = None  # whether its log-probs are of the scaled logits

    # --- answers --------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Turn]]:
        """See ``Rollouts.generate``.

        Raises:
            RequestRefused: the server will not answer, for example because a prompt is too long.
            ServerUnavailable: no answer within the retries.
        """
        if group_size < 1 or max_new_tokens < 1 or not 0.0 <= temperature < float("inf"):
            raise InputError(
                f"rollouts: group_size {group_size} and max_new_tokens {max_new_tokens} must be at "
                f"least 1, temperature {temperature} at least 0."
            )
        prompts = [[int(token) for token in prompt] for prompt in prompts]
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"rollouts: prompt {index} has no tokens.")
        if not prompts:
            return []
        for _ in range(RESTARTS + 1):
            self._renew_if_restarted()
            has_logprobs = temperature > 0 and (temperature == 1.0 or self._logprobs_are_scaled())
            answers = self._answers(prompts, group_size, max_new_tokens, temperature, seed)
            if self._version is None or self._server_version() == self._version:
                return [
                    [_turn(prompt, answer, has_logprobs) for answer in group]
                    for prompt, group in zip(prompts, answers, strict=True)
                ]
        raise ServerUnavailable(
            f"{self._root}: the server lost the policy's weights {RESTARTS + 1} times while it "
            "answered; look at its log"
        )

    def _answers(
        self,
        prompts: list[list[int]],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> list[list[Completion]]:
        # Without a temperature all answers of a group are the same one.
        asked = group_size if temperature > 0 else 1
        requests = [
            Request.completion(
                prompt,
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=_seed(seed, index, answer),
                logprobs=True,
                extra_body={**UNTRUNCATED, "return_token_ids": True},
            )
            for index, prompt in enumerate(prompts)
            for answer in range(asked)
        ]
        found = dict(self._chat.iter_many(requests))
        groups = [[found[i * asked + a] for a in range(asked)] for i in range(len(prompts))]
        return [group * (group_size // asked) for group in groups]

    def _logprobs_are_scaled(self) -> bool:
        """Whether log-probs are taken after the temperature (``--logprobs-mode``); asked once.

        If so, a token that is the only one allowed has log-prob 0, whatever the model thinks. Two
        tokens are tried, because the model may be certain of one.
        """
        if self._is_processed is None:
            answers = [
                self._chat.generate(
                    Request.completion(
                        [0],
                        temperature=1.0,
                        max_tokens=1,
                        logprobs=True,
                        extra_body={"allowed_token_ids": [token], "ignore_eos": True},
                    )
                )
                for token in (0, 1)
            ]
            self._is_processed = all(a.logprobs and a.logprobs[0] > -1e-3 for a in answers)
        return self._is_processed

    # --- weights --------------------------------------------------------------

    def sync_weights(self, model: torch.nn.Module | WeightStream, policy_step: int) -> None:
        """Write the weights of ``model`` and have the server load them; collective over ranks.

        Raises:
            InputError: this server takes no weights; the sentence says what to do.
            ServerUnavailable: no answer within the retries, or an update that broke off.
        """
        problem: Exception | None = None
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        if is_main or isinstance(model, WeightStream):  # a stream needs every rank
            try:
                self._sync(model, policy_step, is_main=is_main)
            except Exception as error:
                problem = error
        if dist.is_initialized():
            shared = [(str(problem) or repr(problem) if problem else "", self._version)]
            dist.broadcast_object_list(shared, src=0)
            message, self._version = shared[0]
            if message and problem is None:
                problem = ServerUnavailable(message)
        if problem is not None:
            raise problem

    def _sync(
        self, model: torch.nn.Module | WeightStream, policy_step: int, *, is_main: bool
    ) -> None:
        if self._folder is None:
            raise InputError("rollouts: pass weights_folder, from which the server reads weights.")
        older = self._file
        if is_main and self._lock is None:
            # Where nothing can be written the stream says so, after the part of the other ranks.
            with contextlib.suppress(OSError):
                self._lock = _claim(self._folder, self._session)
        version = f"{self._session}-step-{policy_step}"
        path = (self._folder / f"policy-{version}.safetensors").absolute()
        self._file = None
        if older is not None:  # first, because a folder in memory may not hold two
            older.unlink(missing_ok=True)
        _write_weights(model, path, self._dtype, is_main=is_main)
        if not is_main:
            return
        self._file = path
        self._send(path, version)
        self._version = version

    def _send(self, path: Path, version: str) -> None:
        with self.paused():
            self._post("/init_weight_transfer_engine", {"init_info": {}})
            # From here on a failure leaves a mixture of old and new weights: nothing is repeated.
            try:
                self._start_update()
                self._post("/update_weights", {"update_info": {"path": str(path)}}, once=True)
                self._post("/finish_weight_update", {"weight_version": version}, once=True)
            except LLMError as error:
                raise ServerUnavailable(
                    f"{self._root}: the update to {version} broke off ({error}); start the server "
                    "again, its weights are incomplete"
                ) from error
            # Keys and values of the old weights must not answer for the new ones.
            self._post("/reset_prefix_cache")

    def _start_update(self) -> None:
        try:
            self._post("/start_weight_update", once=True)
        except ServerUnavailable as error:
            if "already active" not in str(error):
                raise
            # A trainer that was killed left an update open. It ends with the weights that it has;
            # all of them come again.
            self._post("/finish_weight_update", {"weight_version": "interrupted"}, once=True)
            self._post("/start_weight_update", once=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The server finishes no token inside the block; requests in flight go on after it."""
        self._post("/pause?mode=keep")
        try:
            yield
        except ServerUnavailable:
            raise  # a server in an unknown state answers nothing more
        except BaseException:
            self._post("/resume")
            raise
        self._post("/resume")

    def _renew_if_restarted(self) -> None:
        if self._version is None or (found := self._server_version()) == self._version:
            return
        if found and found.startswith(f"{self._version}{_AGAIN}"):  # rank 0 has seen to it
            self._version, self._is_processed = found, None
            return
        session = self._version.partition("-")[0]
        if found and _VERSION.fullmatch(found) and not found.startswith(f"{session}-"):
            raise ServerUnavailable(
                f"{self._root}: another trainer has sent its weights ({found}) to this server; "
                "give each trainer its own server and go on from the last checkpoint"
            )
        if self._file is None:
            raise ServerUnavailable(
                f"{self._root}: the server was started again and lost the policy's weights, which "
                "rank 0 alone can send; go on from the last checkpoint"
            )
        # A new name: other ranks must not take answers from before it for the policy's.
        version = f"{self._version}{_AGAIN}"
        self._send(self._file, version)
        self._version, self._is_processed = version, None

    def _server_version(self) -> str | None:
        return self._ask("GET", "/weight_info").get("weight_version")

    def _post(self, path: str, body: dict | None = None, *, once: bool = False) -> dict:
        return self._ask("POST", path, body, once=once)

    def _ask(self, method: str, path: str, body: dict | None = None, *, once: bool = False) -> dict:
        """The JSON reply of an endpoint of the server's own, repeated like any request."""
        attempts = 1 if once else self._retry.max_retries + 1
        for attempt in range(attempts):
            try:
                return self._ask_once(method, path, body)
            except TransientError as error:
                failure = error
            if attempt + 1 < attempts:
                time.sleep(min(self._retry.base * 2**attempt, self._retry.max_delay))
        raise ServerUnavailable(
            f"{self._root}{path}: no answer after {attempts} attempts, the last one failed with "
            f"{failure}"
        ) from failure

    def _ask_once(self, method: str, path: str, body: dict | None) -> dict:
        try:
            reply = self._http.request(method, path, json=body)
        except self._errors as error:
            raise TransientError("connection", str(error) or type(error).__name__) from error
        if reply.status_code == 404:
            raise InputError(
                f"rollouts: the server at {self._root} has no {path.partition('?')[0]}: "
                f"{HOW_TO_START}."
            )
        detail = " ".join(reply.text.split())[:300]
        if reply.status_code >= 500:
            raise TransientError(f"HTTP {reply.status_code}", detail)
        if reply.status_code >= 400:
            raise RequestRefused(f"HTTP {reply.status_code}: {detail}", status=reply.status_code)
        if not detail:  # /reset_prefix_cache answers 200 and nothing
            return {}
        try:
            found = reply.json()
        except ValueError as error:
            raise TransientError("malformed reply", detail) from error
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        """End the connections and delete the weights that were sent; the server goes on."""
        self._chat.close()
        self._http.close()
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def _claim(folder: Path, session: str) -> IO[str]:
    """Delete the weights of trainers that were killed, whose locks are free; take a lock."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("policy-*.lock"):
        try:
            with open(path, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in folder.glob(f"{path.stem}-step-*"):
                    left.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        except OSError:  # in use, gone, or another user's
            continue
    path = folder / f"policy-{session}.lock"
    while True:
        lock = open(path, "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            lock.close()
            path.unlink(missing_ok=True)
            raise
        # Until it is locked, another trainer may take it for a dead one's and delete it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


def _seed(*parts: int) -> int:
    """31 bits that follow from ``parts``; vLLM takes no more on every device."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _turn(prompt: list[int], answer: Completion, has_logprobs: bool) -> Turn:
    if not answer.token_ids:
        raise RequestRefused(
            "the server returns no token ids; use vLLM 0.11 or later, which has return_token_ids"
        )
    if has_logprobs and (answer.logprobs is None or len(answer.logprobs) != len(answer.token_ids)):
        raise RequestRefused(
            f"the server returned {len(answer.logprobs or ())} log-probs for "
            f"{len(answer.token_ids)} tokens"
        )
    return Turn(
        prompt_ids=prompt,
        response_ids=list(answer.token_ids),
        logprobs=list(answer.logprobs) if has_logprobs else None,
        finish_reason=answer.finish_reason,
    )


def _write_weights(
    model: torch.nn.Module | WeightStream,
    path: Path,
    dtype: torch.dtype | None,
    *,
    is_main: bool = True,
) -> None:
    """One safetensors file with the names that a checkpoint has; a tied weight is written once."""
    partial = path.with_suffix(".partial")
    try:
        if isinstance(model, WeightStream):
            model.save(path.parent, dtype or torch.float32, file=partial.name)
        else:
            _write_model(model, partial, dtype)
        if is_main:
            os.replace(partial, path)
    finally:
        if is_main:
            partial.unlink(missing_ok=True)


def _write_model(model: torch.nn.Module, path: Path, dtype: torch.dtype | None) -> None:
    from safetensors.torch import save_file

    are_split = getattr(getattr(model, "config", None), "model_type", None) in SPLIT_EXPERTS
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if "lora_" in name or ".base_layer." in name:
            raise InputError(
                "rollouts: a model with LoRA adapters has no weights that vLLM can load; use the "
                "embedded rollouts, or train all weights."
            )
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        value = tensor.detach().to("cpu", wanted).contiguous()
        split = split_experts(name, tuple(value.shape)) if are_split else None
        if split is None:
            tensors[name] = value
        else:
            parts = value.view(len(split.parts), *split.part_shape())
            tensors.update((part, parts[i].clone()) for i, part in enumerate(split.parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
