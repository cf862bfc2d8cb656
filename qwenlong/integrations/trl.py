"""AEPO, task-level advantages and task-balanced batches in TRL's ``GRPOTrainer``.

    from qwenlong.integrations.trl import AEPOGRPOConfig, AEPOGRPOTrainer, patch_trl

Advantages and AEPO's mask are applied where TRL makes advantages; its loss, generation and logging
stay its own. With its defaults the trainer gives the losses of ``GRPOTrainer``, from our scores.
Importing this module needs TRL and changes nothing in it.

    advantages   (r - mean of the group) / (std of the task + eps)           arXiv 2512.12967, eq. 7
    AEPO         entropy of a generation batch above ``aepo_high``: negative advantages become 0,
                 until it is below ``aepo_low``                              sec. 4.4
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qlkernels.hf import attention as hf_attention
from qwenlong.advantages import group_advantages
from qwenlong.aepo import EntropyController, EntropyMeter
from qwenlong.integrations.patches import Patch
from qwenlong.integrations.trl_prefix import shared_prefix_scores
from qwenlong.integrations.trl_scores import patch_trl, require_trl
from qwenlong.sampler import TaskBalancedSampler
from qwenlong.storage import write_json

require_trl()

from accelerate.utils import gather_object  # noqa: E402
from datasets import Dataset, IterableDataset  # noqa: E402
from torch.utils.data import Sampler  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402
from trl.models.utils import disable_gradient_checkpointing  # noqa: E402
from trl.trainer.utils import split_tensor_dict  # noqa: E402

from qwenlong.integrations.trl_one_pass import (  # noqa: E402
    OnePassLoss,
    check_one_pass,
    one_pass_loss,
)

__all__ = [
    "AEPOGRPOConfig",
    "AEPOGRPOTrainer",
    "RepeatedTaskBatches",
    "Patch",
    "patch_trl",
]
SCALES = ("group", "batch", "none", "task")
STATE_FILE = "aepo_state.json"  # in a checkpoint
_IMAGE_INPUTS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
    "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
logger = logging.getLogger(__name__)


@dataclass
class AEPOGRPOConfig(GRPOConfig):
    """``GRPOConfig`` with AEPO, tasks and our scores. All but ``fused_scores`` is off at first."""

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["task_weights"]

    task_column: str = field(
        default="task", metadata={"help": "Column of the dataset with the task of each prompt."}
    )
    task_eps: float = field(
        default=1e-6, metadata={"help": "Added to the standard deviation of scale_rewards='task'."}
    )
    balance_tasks: bool = field(
        default=False,
        metadata={"help": "Give every generation batch the same number of prompts of each task."},
    )
    task_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Share of each task in a batch; equal if None."}
    )
    aepo_low: float | None = field(
        default=None, metadata={"help": "Nats. AEPO is on where both bounds are given."}
    )
    aepo_high: float | None = field(default=None, metadata={"help": "Nats; see aepo_low."})
    aepo_mode: str = field(default="latch", metadata={"help": "latch, above-high or band."})
    aepo_drop: str = field(default="negative", metadata={"help": "negative or nonpositive."})
    aepo_if_empty: str = field(default="skip", metadata={"help": "skip or keep-all."})
    aepo_entropy: str = field(
        default="sequence_mean", metadata={"help": "sequence_mean (eq. 11) or token_mean."}
    )
    aepo_entropy_source: str = field(
        default="previous_step",
        metadata={
            "help": "previous_step: decide on what the last generation batch measured (free); "
            "scoring_pass: on the batch itself, for one more forward pass."
        },
    )
    fused_scores: bool = field(
        default=True, metadata={"help": "Our log-probabilities and entropies in place of TRL's."}
    )
    shared_prefix: bool = field(
        default=False,
        metadata={
            "help": "Forward the prompt of a group once. Repeats its bits with full_determinism."
        },
    )
    one_pass_loss: bool = field(
        default=False,
        metadata={
            "help": "Compute the gradients of the policy loss with its scores, from one pass over "
            "the logits."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_rewards not in SCALES:
            raise ValueError(
                f"AEPOGRPOConfig: scale_rewards must be one of {', '.join(SCALES)}, "
                f"got {self.scale_rewards!r}"
            )
        if self.scale_rewards == "task" and self.multi_objective_aggregation != (
            "sum_then_normalize"
        ):
            raise ValueError(
                "AEPOGRPOConfig: scale_rewards='task' scales the sum of the rewards; set "
                "multi_objective_aggregation='sum_then_normalize'"
            )
        if (self.aepo_low is None) != (self.aepo_high is None):
            raise ValueError("AEPOGRPOConfig: give both aepo_low and aepo_high, or neither")
        if self.task_weights is not None and not self.balance_tasks:
            raise ValueError("AEPOGRPOConfig: task_weights belongs to balance_tasks=True")
        if self.balance_tasks and not self.shuffle_dataset:
            raise ValueError(
                "AEPOGRPOConfig: balance_tasks=True draws prompts at random; leave "
                "shuffle_dataset=True"
            )
        if self.one_pass_loss:
            check_one_pass(self)
        self.controller()  # checks the other choices
        EntropyMeter(self.aepo_entropy)

    def controller(self) -> EntropyController | None:
        """A new controller with these settings; None where AEPO is off."""
        if self.aepo_low is None:
            return None
        return EntropyController(
            low=self.aepo_low,
            high=self.aepo_high,
            mode=self.aepo_mode,
            drop=self.aepo_drop,
            if_empty=self.aepo_if_empty,
            entropy_source=self.aepo_entropy_source,
        )


class AEPOGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` with the options of ``AEPOGRPOConfig``; arguments are those of TRL.

    Logged beside TRL's metrics: ``aepo/entropy`` (nats), ``aepo/dropping`` (0 or 1) and
    ``aepo/dropped_fraction`` of the sequences. A KL term (``beta``) still sees dropped sequences,
    and they count in the denominators of the loss.

    With ``shared_prefix=True`` a generation batch is not shuffled before it is cut into
    micro-batches, so that a group stays together. A router's load-balancing loss then counts a
    prompt once a group.
    """

    def __init__(
        self, model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None, *others,
        **named,
    ):  # fmt: skip
        if args is not None and not isinstance(args, AEPOGRPOConfig):
            raise TypeError(
                f"AEPOGRPOTrainer: args must be an AEPOGRPOConfig, got {type(args).__name__}"
            )
        args = AEPOGRPOConfig("aepo-grpo") if args is None else args
        if args.scale_rewards == "task" or args.balance_tasks:
            _check_tasks(train_dataset, args)
        if args.scale_rewards == "task":  # an evaluation scales its advantages too
            several = isinstance(eval_dataset, dict)
            for dataset in eval_dataset.values() if several else [eval_dataset]:
                _check_column(dataset, args.task_column)
        if args.one_pass_loss and args.n_gpu > 1:
            raise ValueError(
                "AEPOGRPOTrainer: one_pass_loss=True does not work with several GPUs in one "
                "process; launch one process a GPU, with accelerate or torchrun"
            )
        self._controller = args.controller()
        self._meter = EntropyMeter(args.aepo_entropy)
        self._scored: tuple[torch.Tensor, list] | None = None  # rewards of all ranks, their tasks
        self._entropies: torch.Tensor | None = None  # (B, R) of the last micro-batch
        self._one_pass: OnePassLoss | None = None  # while the loss of a micro-batch is computed
        super().__init__(
            model, reward_funcs, args, train_dataset, eval_dataset, *others, **named
        )  # fmt: skip
        if args.shared_prefix:
            hf_attention._supported_model(self.model)  # refuses families it cannot pack
        # TRL knows no such scale; its advantages are replaced
        self.scale_rewards = "group" if args.scale_rewards == "task" else args.scale_rewards

    # --- data ------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.task_column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self.args.task_column]

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        if not self.args.balance_tasks:
            return super()._get_train_sampler(dataset)
        dataset = self.train_dataset if dataset is None else dataset
        return RepeatedTaskBatches(
            TaskBalancedSampler(
                list(dataset[self.args.task_column]),
                self.args.generation_batch_size // self.num_generations,
                seed=self.args.seed,
                weights=self.args.task_weights,
            ),
            copies=self.num_generations,
            repeats=self.num_iterations * self.args.steps_per_generation,
        )

    def _prepare_inputs(self, generation_batch):
        if not self.args.shared_prefix or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        # as TRL does, without the shuffle that would spread a group over micro-batches
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            torch.randperm(len(scored["advantages"]))  # TRL's shuffle draws: completions stay equal
            self._buffered_inputs = split_tensor_dict(scored, steps)
        return self._buffered_inputs[self._step % steps]

    # --- advantages --------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.args.scale_rewards == "task":
            column = self.args.task_column
            if any(column not in example for example in inputs):
                raise ValueError(f"scale_rewards='task': the dataset has no column {column!r}")
            self._scored = found, gather_object([example[column] for example in inputs])
        return found

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        is_training = self.model.training
        if self.args.scale_rewards == "task":
            group_size = self.num_generations if is_training else self.num_generations_eval
            everyone = self._task_advantages(group_size)
            logged = self._logs["advantages"]  # TRL's own are the last ones
            for _ in range(min(len(everyone), len(logged))):
                logged.pop()
            logged.extend(everyone.tolist())
            first = self.accelerator.process_index * len(inputs)
            output["advantages"] = everyone[first : first + len(inputs)]
        if self._controller is not None and is_training:
            output["advantages"] = self._after_aepo(output)
        return output

    def _task_advantages(self, group_size: int) -> torch.Tensor:
        """``[N]`` over all ranks; 0 for what no reward function scored."""
        per_function, tasks = self._scored
        weights = self.reward_weights.to(per_function.device)
        rewards = (per_function * weights).nansum(dim=1)
        known = ~per_function.isnan().all(dim=1)
        rows = known.nonzero().flatten().tolist()
        found = torch.zeros_like(rewards)
        if rows:
            found[known] = group_advantages(
                rewards[known],
                [row // group_size for row in rows],
                task_ids=[tasks[row] for row in rows],
                scale="task",
                eps=self.args.task_eps,
            ).to(found.dtype)
        return found

    def _after_aepo(self, output: dict[str, Any]) -> torch.Tensor:
        """The advantages of this rank's generation batch, 0 where AEPO drops a sequence."""
        self._meter = EntropyMeter(self.args.aepo_entropy)
        scoring = None
        if self._controller.entropy_source == "scoring_pass":
            scoring = self._scoring_pass(output)
        if scoring is None or scoring.isfinite():
            dropping = self._controller.begin_step(scoring)
        else:  # every completion was masked, and nothing is trained on
            dropping = self._controller.dropping
        advantages = output["advantages"]
        keep = self._controller.keep_sequences(advantages, process_group=self._ranks())
        dropped = self.accelerator.gather((~keep).float()).mean().item()
        self._metrics["train"]["aepo/dropping"].append(float(dropping))
        self._metrics["train"]["aepo/dropped_fraction"].append(dropped)
        return torch.where(keep, advantages, 0.0)

    def _scoring_pass(self, output: dict[str, Any]) -> torch.Tensor:
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            _, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model,
                ids,
                mask,
                output["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
                compute_entropy=True,
                **{name: output[name] for name in _IMAGE_INPUTS if name in output},
            )
        meter = EntropyMeter(self.args.aepo_entropy)
        meter.add(entropies, _loss_mask(output))
        return meter.value(self._ranks())

    def _ranks(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.accelerator.num_processes > 1 else None

    # --- scores and loss -----------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None,
        compute_entropy=False, compute_aux_loss=False, **image_inputs,
    ):  # fmt: skip
        one_pass = self._one_pass
        with patch_trl() if self.args.fused_scores else nullcontext():
            if not self.args.shared_prefix:
                with nullcontext() if one_pass is None else one_pass.as_head():
                    found = super()._get_per_token_logps_and_entropies(
                        model, input_ids, attention_mask, logits_to_keep, batch_size,
                        compute_entropy, compute_aux_loss, **image_inputs,
                    )  # fmt: skip
            else:
                if any(value is not None for value in image_inputs.values()):
                    raise ValueError("shared_prefix=True: inputs with images are not supported")
                found = self._shared_prefix_scores(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy,
                    compute_aux_loss,
                )  # fmt: skip
        if one_pass is not None:
            found = *one_pass.constants(*found[:2]), found[2]
        if compute_entropy:
            self._entropies = found[1].detach()
        return found

    def _shared_prefix_scores(
        self, model, input_ids, attention_mask, length, batch_size, compute_entropy, compute_aux
    ):
        parts = [
            shared_prefix_scores(
                model,
                ids,
                mask,
                length,
                autocast=self.accelerator.autocast,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux,
                deterministic=self._is_deterministic(),
                head=None if self._one_pass is None else self._one_pass.as_head,
            )  # fmt: skip
            for ids, mask in zip(
                input_ids.split(batch_size or len(input_ids)),
                attention_mask.split(batch_size or len(input_ids)),
                strict=True,
            )
        ]
        return (
            torch.cat([part.logprobs for part in parts]),
            torch.cat([part.entropy for part in parts]) if compute_entropy else None,
            torch.stack([part.aux_loss for part in parts]).mean() if compute_aux else None,
        )

    def _is_deterministic(self) -> bool:
        """Whether the attention's backward repeats its bits: where the user asked TRL for that."""
        return self.args.full_determinism or torch.are_deterministic_algorithms_enabled()

    def _compute_loss(self, model, inputs):
        if self.args.one_pass_loss and self.model.training:
            loss = self._loss_in_one_pass(model, inputs)
        else:
            loss = super()._compute_loss(model, inputs)
        if self._controller is not None and self.model.training:
            self._meter.add(self._entropies, _loss_mask(inputs))
            steps = self.args.steps_per_generation * self.num_iterations
            if (self._step + 1) % steps == 0:  # the last micro-batch of this generation batch
                entropy = self._meter.value(self._ranks()).item()
                self._metrics["train"]["aepo/entropy"].append(entropy)
                if math.isfinite(entropy):  # NaN where every completion was masked
                    self._controller.end_step(entropy)
        return loss

    def _loss_in_one_pass(self, model, inputs):
        """TRL's value and metrics, of scores whose gradients are computed with them."""
        self._one_pass = one_pass_loss(self, inputs)
        try:
            return self._one_pass.with_gradient(super()._compute_loss(model, inputs))
        finally:
            self._one_pass = None

    # --- checkpoints ---------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self._controller is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial))
            path = folder / f"checkpoint-{self.state.global_step}" / STATE_FILE
            write_json(path, self._controller.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._controller is None or checkpoint is None:
            return
        path = Path(checkpoint) / STATE_FILE
        if path.is_file():
            self._controller.load_state_dict(json.loads(path.read_text()))
        else:
            logger.warning("%s has no %s: AEPO begins anew", checkpoint, STATE_FILE)


class RepeatedTaskBatches(Sampler[int]):
    """Indices as TRL's ``RepeatSampler`` orders them, from task-balanced batches.

    Each prompt ``copies`` times in a row, each batch of prompts ``repeats`` times. An epoch is a
    function of its number and the seed alone; ``set_epoch`` chooses it, and without it each
    iteration that is completed is followed by the next epoch.
    """

    def __init__(self, batches: TaskBalancedSampler, *, copies: int, repeats: int):
        self._batches, self._copies, self._repeats = batches, copies, repeats
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batches) * self._batches.batch_size * self._copies * self._repeats

    def __iter__(self) -> Iterator[int]:
        start = {"batches": self._epoch * len(self._batches)}
        self._batches.load_state_dict(self._batches.state_dict() | start)
        for batch in self._batches:
            for _ in range(self._repeats):
                for index in batch:
                    yield from [index] * self._copies
        self._epoch += 1


def _loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """``(B, R)`` bool: tokens that TRL's loss counts."""
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def _check_tasks(dataset, args: AEPOGRPOConfig) -> None:
    if isinstance(dataset, IterableDataset) and args.balance_tasks:
        raise ValueError(
            "balance_tasks=True needs a dataset with a length and an index; got an IterableDataset"
        )
    _check_column(dataset, args.task_column)


def _check_column(dataset, column: str) -> None:
    names = getattr(dataset, "column_names", None)
    if names is not None and column not in names:
        raise ValueError(
            f"the dataset has no column {column!r}, only {', '.join(names)}; set task_column"
        )
