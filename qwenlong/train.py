"""Training: ``train_step`` is one step of the recipe, from the prompts to the new weights.

    sampler -> rollouts -> rewards -> advantages -> AEPO -> loss on packed groups -> optimizer

Everything random follows from the recipe's seed and the number of the step, so that a run which was
killed and resumed gives the bits of one that was not. What is reported of a step is in
``qwenlong.metrics``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from qlkernels.prefix_group import pack_groups
from qwenlong.advantage_rules import ADVANTAGES
from qwenlong.aepo import EntropyController, EntropyMeter
from qwenlong.checkpoint import (
    DiskPolicy,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from qwenlong.config import Recipe
from qwenlong.engines import Engine
from qwenlong.episodes import EPISODES, Environment, seed_of, with_rewards
from qwenlong.errors import InputError
from qwenlong.policy import (
    LossInputs,
    MicroBatch,
    loss_totals,
    pack_trajectories,
    token_weights,
)
from qwenlong.sampler import TaskBalancedSampler
from qwenlong.stage_data import ROLLOUTS_FOLDER, digest_of
from qwenlong.storage import write_jsonl
from qwenlong.train_report import Clock, Metrics, aepo_metrics, describe, trajectory_rows
from qwenlong.types import Sample, Trajectory

T = TypeVar("T")


class Stopped(RuntimeError):
    """The run was asked to stop; all completed steps are saved."""


@dataclass
class Run:
    """A training run between two steps, and what a step needs."""

    recipe: Recipe
    out: Path
    engine: Engine
    environment: Environment
    samples: list[Sample]
    sampler: TaskBalancedSampler
    controller: EntropyController | None
    step: int = 0  # completed ones
    report: Callable[[str], None] = print
    stop_requested: bool = False
    weights_are_whole: bool = True  # False from a step's first update to its last
    _started: dict[str, Any] = field(default_factory=dict)  # states at the start of the step

    def __post_init__(self) -> None:
        self._data = digest_of(self.samples)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside weights, optimizer and random states; JSON types."""
        return {
            "step": self.step,
            "data": self._data,
            "sampler": {**self.sampler.state_dict(), "batches": self.step},
            "aepo": self.controller.state_dict() if self.controller else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        if state["data"] != self._data:
            raise InputError(
                f"{self.out} was trained on other samples than its recipe gives; go on with the "
                "data it was started with, or choose another --out."
            )
        self.step = state["step"]
        self.sampler.load_state_dict(state["sampler"])
        if self.controller is not None:
            self.controller.load_state_dict(state["aepo"])

    def begin_step(self) -> None:
        self._started = {"state": self.state(), "random": random_states()}
        self.weights_are_whole = True

    def undo_step(self) -> None:
        """Back to the start of the step, before any weight was changed."""
        self.load_state(self._started["state"])
        restore_random_states(self._started["random"])

    def agreed(self, work: Callable[[], T]) -> T:
        """``work()`` on every rank; where one fails, or is asked to stop, all of them raise."""
        result, error = None, None
        try:
            result = work()
        except Exception as problem:  # re-raised below, on every rank
            error = problem
        if self.engine.largest(int(self.stop_requested)) and error is None:
            error = Stopped(f"stopped in step {self.step + 1}")
        failed = [
            text for text in self.engine.gather(error and (str(error) or repr(error))) if text
        ]
        if failed and self.engine.world_size > 1:  # one kind of error, so that all ranks save
            raise Stopped(failed[0]) from error
        if error is not None:
            raise error
        return result


def train_step(run: Run) -> Metrics:
    """One step of the recipe. Weights change in ``_update`` alone, at the end."""
    recipe, engine, environment = run.recipe, run.engine, run.environment
    clock = Clock()

    # 1. Samples, equal in tasks; G trajectories each from the current weights; their rewards.
    samples = [run.samples[i] for i in next(iter(run.sampler))]
    seed = seed_of("rollout", recipe.seed, run.step, engine.rank)
    episodes = EPISODES[recipe.rollout.episodes]
    model = engine.rollout_model()
    run.agreed(lambda: environment.rollouts.sync_weights(model, run.step))
    rolled = run.agreed(lambda: episodes(environment, samples, seed, run.step))
    clock.lap("rollout")
    rolled = run.agreed(lambda: with_rewards(environment, samples, rolled))
    clock.lap("reward")

    # 2. Advantages, over all ranks. A reward that a failed judge left open counts nowhere.
    trained = [t for t in rolled if not getattr(t.reward, "skipped", False)]
    if not engine.sum(torch.tensor(len(trained))):
        raise Stopped("no reward of this step is known: the judge failed on all of them")
    task_of = {sample.id: sample.task for sample in samples}
    advantages = ADVANTAGES[recipe.loss.advantage](
        torch.tensor([t.reward.value for t in trained], dtype=torch.float64),
        [t.group_id for t in trained],
        [task_of[t.sample_id] for t in trained],
        engine.process_group,
    )
    rows = trajectory_rows(environment, samples, rolled, trained, advantages)
    rows = [row for part in engine.gather(rows) for row in part]
    file = run.out / ROLLOUTS_FOLDER / f"step-{run.step + 1:08d}.jsonl"
    run.agreed(lambda: write_jsonl(file, rows) if engine.rank == 0 else 0)

    # 3. AEPO: whether negative advantages are trained on. Costs a pass only if the recipe says so.
    keep = torch.ones(len(trained), dtype=torch.bool)
    is_scored = run.controller is not None and run.controller.entropy_source == "scoring_pass"
    entropy = _score(run, trained) if is_scored else None
    if run.controller is not None:
        run.controller.begin_step(entropy)
        # On the engine's device, because NCCL sums no CPU tensors.
        keep = run.controller.keep_sequences(
            advantages.to(engine.device), process_group=engine.process_group
        ).cpu()
    live = keep & (advantages != 0)
    clock.lap("score")

    # 4. The loss, on groups that share their prompt, and the update.
    counted = keep if recipe.loss.denominator == "kept" else torch.ones_like(keep)
    totals = engine.sum(loss_totals(trained, counted))
    weights = token_weights(trained, counted, recipe.loss.aggregation, totals)
    learns = bool(engine.sum(live.sum()))
    # A trajectory without gradient is read for its entropy alone, and not where that is known.
    is_read = live if is_scored else torch.ones_like(live)
    read = [t for t, is_in in zip(trained, is_read.tolist(), strict=True) if is_in]
    found = _update(run, read, *(v[is_read] for v in (advantages, keep, weights)), learns=learns)
    clock.lap("update")
    if entropy is None and found["entropy"] == found["entropy"]:  # not NaN: there were tokens
        entropy = found["entropy"]
        if run.controller is not None:
            run.controller.end_step(entropy)

    known = {} if entropy is None else {"entropy": float(entropy)}
    kept = engine.sum(torch.tensor([keep.sum(), len(keep)]))
    return describe(rows) | found | known | aepo_metrics(run.controller, kept) | clock.metrics(rows)


# --- the passes --------------------------------------------------------------


def _batches(run: Run, trajectories: Sequence[Trajectory], live: Sequence[bool]):
    """Micro-batches of this rank; ``None`` for a pass that only keeps step with other ranks."""
    packed = pack_trajectories(trajectories, live, run.recipe.batch.micro_batch_tokens)
    count = run.engine.largest(len(packed)) if run.engine.lockstep else len(packed)
    return packed + [None] * (count - len(packed))


def _score(run: Run, trajectories: Sequence[Trajectory]) -> float:
    """Entropy of the batch under the current policy: a forward pass without gradient."""
    meter = _meter(run)
    with torch.no_grad():
        for batch in _batches(run, trajectories, [True] * len(trajectories)):
            layout = (batch or _idle()).layout.to(run.engine.device)
            scores = run.engine.forward(layout)
            if batch is not None:
                _measure(meter, scores.entropy, batch, layout)
    return float(meter.value(run.engine.process_group))


def _update(
    run: Run,
    trajectories: Sequence[Trajectory],
    advantages: torch.Tensor,
    keep: torch.Tensor,
    weights: torch.Tensor,
    *,
    learns: bool,
) -> Metrics:
    """Forward, backward and optimizer step(s). Without anything to learn, a forward pass."""
    recipe, engine = run.recipe, run.engine
    live = (keep & (advantages != 0)).tolist()
    batches = _batches(run, trajectories, live)
    old: list[torch.Tensor | None] = [None] * len(batches)  # the first update is on-policy
    meter, sums, norms = _meter(run), torch.zeros(3, dtype=torch.float64), [0.0]
    for update in range(recipe.loss.updates_per_batch if learns else 1):
        for k, batch in enumerate(batches):
            inputs = _loss_inputs(run, batch or _idle(), advantages, keep, weights, old[k])
            layout = (batch or _idle()).layout.to(engine.device)
            has_gradient = learns and (engine.lockstep or batch.is_live)
            with torch.set_grad_enabled(has_gradient):
                result = engine.forward(layout, inputs)
            if has_gradient:
                engine.backward(result.loss, is_last=k == len(batches) - 1)
            if batch is not None and update == 0:
                _measure(meter, result.scores.entropy, batch, layout)
                old[k] = result.scores.logprobs if recipe.loss.updates_per_batch > 1 else None
                sums[0] += float(result.loss.detach())
                sums[1:] += _rollout_gap(trajectories, batch, layout, result.scores.logprobs)
        if learns:
            was_whole, run.weights_are_whole = run.weights_are_whole, False
            try:
                norms.append(engine.step(_learning_rate(recipe, run.step)))
            except FloatingPointError:  # found before any weight was changed
                run.weights_are_whole = was_whole
                raise
    loss, gap, n_scored = engine.sum(sums).tolist()
    return {
        "loss": loss,
        "entropy": float(meter.value(engine.process_group)),
        "grad_norm": norms[-1],
        "learning_rate": _learning_rate(recipe, run.step),
        # how far trainer and sampler are apart: mean |difference| of log-probs, nats
        **({"rollout_gap": gap / n_scored} if n_scored else {}),
    }


def _loss_inputs(run: Run, batch: MicroBatch, advantages, keep, weights, old) -> LossInputs:
    device, index = run.engine.device, batch.trajectory_of
    if not len(advantages):  # this rank has nothing: an idle pass of weight 0
        advantages, keep, weights = torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.zeros(1)
    is_idle = not batch.turns
    picked = weights[index] * (0.0 if is_idle else 1.0)
    return LossInputs(
        advantages[index].to(device),
        keep[index].to(device),
        picked.float().to(device),
        old,
        run.recipe.loss.eps_low,
        run.recipe.loss.eps_high,
    )


def _idle() -> MicroBatch:
    """One row that weighs nothing, for ranks that have fewer micro-batches than others."""
    return MicroBatch(pack_groups([[0]], [[[0]]]), torch.zeros(1, dtype=torch.int64), [], False)


def _meter(run: Run) -> EntropyMeter:
    meter = EntropyMeter(run.recipe.loss.entropy)
    nothing = torch.zeros(1, device=run.engine.device)
    meter.add(nothing, nothing.bool(), torch.tensor([0, 1], device=run.engine.device))
    return meter


def _measure(meter: EntropyMeter, entropy, batch: MicroBatch, layout) -> None:
    """Take in a micro-batch, whose answers are turns: those of a trajectory are one sequence."""
    answer = batch.layout.answer_of.clamp_min(0)  # a prefix has no answer, and no row that counts
    sequence_of = batch.trajectory_of[answer.long()]
    meter.add(entropy, layout.is_answer, layout.cu_seqlens, sequence_of=sequence_of)


def _rollout_gap(trajectories, batch: MicroBatch, layout, logprobs) -> torch.Tensor:
    """``[2]``: sum of |trainer - sampler| over tokens with a known log-prob, and their count."""
    known = [trajectories[i].turns[j].logprobs for i, j in batch.turns]
    if any(values is None for values in known):
        return torch.zeros(2, dtype=torch.float64)
    sampled = torch.tensor([v for values in known for v in values], dtype=torch.float64)
    scored = logprobs.detach()[layout.answer_rows].double().cpu()
    return torch.tensor([float((scored - sampled).abs().sum()), len(sampled)], dtype=torch.float64)


def _learning_rate(recipe: Recipe, step: int) -> float:
    options = recipe.optimizer
    return options.learning_rate * min(1.0, (step + 1) / max(1, options.warmup_steps))


# --- the loop ----------------------------------------------------------------


def train(run: Run, log: Callable[[int, Metrics], None]) -> None:
    """Steps until the recipe's last one; checkpoints on the way and at the end.

    Args:
        log: takes the number of each completed step and its metrics (rank 0), before its
            checkpoint: after a resume a step may be logged again.

    Raises:
        Stopped, and whatever a step raises: all completed steps are in a checkpoint then, except
            where a step failed in the middle of its update.
    """
    while run.step < run.recipe.steps:
        run.begin_step()
        try:
            metrics = train_step(run)
        except BaseException as error:
            # With one process; the other ranks agree on what `agreed` raised, and on nothing else.
            if run.weights_are_whole and (run.engine.world_size == 1 or isinstance(error, Stopped)):
                run.undo_step()
                if run.step:
                    _save(run)
            raise
        run.step += 1
        try:
            if run.engine.rank == 0:
                log(run.step, metrics)
        except BaseException:
            if run.engine.world_size == 1:
                _save(run)
            raise
        is_due = run.step % run.recipe.checkpoint.every_steps == 0
        if is_due or run.step == run.recipe.steps:
            _save(run)


def _save(run: Run) -> None:
    settings = run.recipe.checkpoint
    tokenizer, disk = run.environment.tokenizer, DiskPolicy(settings.disk_wait_s, run.report)
    save_checkpoint(run.out, run.engine, tokenizer, run.state(), keep=settings.keep, disk=disk)
