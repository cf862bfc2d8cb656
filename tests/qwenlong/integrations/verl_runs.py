"""verl's real trainer on the CPU, in one process: its configuration, data loading, replay buffer,
TransferQueue, FSDP2 engine, losses and checkpoints.

What stands in for the distributed parts: the actor's worker is called in this process and not
through Ray, answers and rewards are drawn from a seed and not from an inference engine, and so
there are no weights to send to one.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace

os.environ.update(
    MASTER_ADDR="localhost", WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
    RAY_DEDUP_LOGS="0", RAY_USAGE_STATS_ENABLED="0", TOKENIZERS_PARALLELISM="false",
)  # fmt: skip

import pandas
import ray
import torch
import torch.distributed as dist
import transfer_queue as tq
from hydra import compose, initialize_config_dir
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import set_platform


class _Device:
    """``torch.cpu`` with the questions that verl asks a GPU."""

    def mem_get_info(self, *_args):
        return 1, 1

    def get_device_name(self, *_args):
        return "CPU"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cpu, name, lambda *_args, **_kwargs: 0)


class _CPU(PlatformCUDA):
    device_name = vendor_name = "cpu"
    device_module = _Device()

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def communication_backend_name(self):
        return "gloo"


set_platform(_CPU())  # before anything of verl asks for one

from verl.trainer.ppo.v1 import get_trainer_cls  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.engine.base import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead  # noqa: E402
from verl.workers.engine_workers import ActorRolloutRefWorker  # noqa: E402

from qwenlong.tiny import tiny_model, tiny_tokenizer  # noqa: E402

EngineRegistry.register("language_model", ["fsdp2"], "cpu")(FSDPEngineWithLMHead)
EXAMPLES = Path(__file__).parents[3] / "examples"
PROMPTS, GROUP = 4, 4  # of a batch
TASKS = ("needle", "sums", "sums", "one")  # of prompt i in the file: TASKS[i % 4]


def start(port: int) -> None:
    """One process group, a Ray of this process and its TransferQueue."""
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("gloo")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)


def stop() -> None:
    tq.close()
    ray.shutdown()
    dist.destroy_process_group()


def config(folder: Path, *overrides: str):
    """The example's configuration, for a model of twenty thousand weights on the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "model", folder / "prompts.parquet"
    if not data.exists():
        tiny_model(model)
        rows = [
            {
                "prompt": [{"role": "user", "content": f"question {i}"}],
                "data_source": TASKS[i % len(TASKS)],
                "reward_model": {"style": "rule", "ground_truth": "1"},
                "extra_info": {"index": i},
            }
            for i in range(5 * PROMPTS)
        ]
        pandas.DataFrame(rows).to_parquet(data)
    changes = [
        "hydra.searchpath=[pkg://verl.trainer.config]",
        f"actor_rollout_ref.model.path={model}",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.actor.use_torch_compile=false",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=false",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision="
        "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=400",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=400",
        "actor_rollout_ref.actor.optim.lr=0.001",
        f"actor_rollout_ref.rollout.n={GROUP}",
        f"data.train_files={data}",
        f"data.val_files={data}",
        f"data.train_batch_size={PROMPTS}",
        "data.max_prompt_length=64",
        "data.filter_overlong_prompts=false",
        "data.shuffle=false",
        "data.dataloader_num_workers=0",
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        "trainer.logger=[]",
        "trainer.val_before_train=false",
        "trainer.save_freq=-1",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        "transfer_queue.enable=true",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    ]
    with initialize_config_dir(str(EXAMPLES), version_base=None):
        return compose("verl_aepo", overrides=[*changes, *overrides])


class Answers:
    """In place of verl's ``AgentLoopManager``: a prompt's answers, a function of its index alone.

    The first answer to a batch's first prompt comes in two outputs, as an agent's turns do: 17
    rows, which verl fills up to 32.
    """

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()

    def generate_sequences(self, batch) -> None:
        for i in range(len(batch)):
            row = {name: batch[name][i] for name in ("uid", "data_source", "raw_prompt", "index")}
            row = {name: getattr(value, "data", value) for name, value in row.items()}
            self._answer(row, two_outputs=i == 0, global_steps=int(batch["global_steps"]))
            tq.kv_put(key=row["uid"], partition_id="train", tag={"status": "finished"})

    def _answer(self, row: dict, *, two_outputs: bool, global_steps: int) -> None:
        draw = random.Random(int(row["index"]))
        prompt = torch.tensor(self.tokenizer.encode(row["raw_prompt"][0]["content"]))
        keys, fields, tags = [], [], []
        for session in range(GROUP):
            reward = draw.random()
            for output in range(1 + (two_outputs and session == 0)):
                answer = torch.tensor([draw.randrange(3, 60) for _ in range(draw.randint(2, 9))])
                mask = torch.ones_like(answer)
                scores = torch.zeros(len(answer))
                scores[-1] = reward
                ids = torch.cat([prompt, answer])
                keys.append(f"{row['uid']}_{session}_{output}")
                fields.append(
                    row
                    | dict(
                        prompts=prompt, responses=answer, input_ids=ids, response_mask=mask,
                        loss_mask=mask, position_ids=torch.arange(len(ids)), rm_scores=scores,
                        rollout_log_probs=torch.full((len(answer),), -4.25), num_turns=2,
                        extra_fields={}, session_id=session, multi_modal_inputs={},
                    )
                )  # fmt: skip
                tags.append(
                    dict(
                        status="success", prompt_len=len(prompt), response_len=len(answer),
                        seq_len=len(ids), global_steps=global_steps,
                        min_global_steps=global_steps, max_global_steps=global_steps,
                    )
                )  # fmt: skip
        tq.kv_batch_put(
            keys=keys, partition_id="train", fields=tu.list_of_dict_to_tensordict(fields), tags=tags
        )


def trainer(settings, mode: str | None = None):
    """The trainer that the configuration (or ``mode``) names, ready for ``fit(Answers())``.

    ``seen`` has a dict for each batch whose advantages were computed, ``logged`` the metrics of
    each step.
    """

    class Local(get_trainer_cls(mode or settings.trainer.v1.trainer_mode)):
        def _setup(self):
            self._init_tokenizer()
            self._init_dataloader()
            self._init_dump_executor()
            worker = ActorRolloutRefWorker(self.config.actor_rollout_ref, role="actor")
            worker.init_model()
            worker._dispatch_info = {"actor": [0]}
            self.actor_rollout_wg = worker
            self.ref_in_actor, self.distillation_config = False, None
            self.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
            self.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: 1)
            nothing = SimpleNamespace(update_weights=lambda *_: None, sleep_replicas=lambda: None)
            self.checkpoint_manager = nothing
            self.seen, self.logged = [], []
            self._load_checkpoint()

        def _compute_advantage(self, batch, metrics):
            batch = super()._compute_advantage(batch, metrics)
            self.seen.append(read(batch))
            return batch

        def step(self, metrics, timing_raw):
            batch = super().step(metrics, timing_raw)
            self.logged.append({k: v for k, v in metrics.items() if isinstance(v, int | float)})
            return batch

    made = Local(settings)
    made.init()
    return made


def read(batch) -> dict:
    """What the TransferQueue holds of a batch after its advantages."""
    names = ["uid", "data_source", "rm_scores", "advantages", "response_mask", "entropy"]
    data = tq.kv_batch_get(batch.keys, batch.partition_id, [*names, "old_log_probs"])
    rows = {name: [x.tolist() for x in data[name]] for name in names[2:]}
    return rows | dict(
        keys=list(batch.keys),
        padding=[bool(tag.get("is_padding", False)) for tag in batch.tags],
        uid=[str(x) for x in data["uid"]],
        task=[str(x) for x in data["data_source"]],
        old_log_probs=[x.tolist() for x in data["old_log_probs"]],
    )
