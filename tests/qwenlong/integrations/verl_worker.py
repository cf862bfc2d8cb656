"""Run in verl's environment: trains with verl on the CPU and writes what each run saw.

verl_worker.py FOLDER
"""

import json
import socket
import sys
import uuid
from pathlib import Path

import ray
import torch
import transfer_queue as tq
import verl_runs
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils as tu

from qwenlong.integrations import verl_kernels

OFF = ["++trainer.v1.qwenlong.aepo_low=null", "++trainer.v1.qwenlong.aepo_high=null"]
# A random model has 4.27 nats: above these, so that one decision drops in every later batch.
ALWAYS = ["++trainer.v1.qwenlong.aepo_low=0.5", "++trainer.v1.qwenlong.aepo_high=1"]
LAGGED = [*ALWAYS, "++trainer.v1.qwenlong.aepo_entropy_source=previous_step"]


def train(folder: Path, steps: int, *changes: str) -> dict:
    settings = verl_runs.config(folder, f"trainer.total_training_steps={steps}", *changes)
    trainer = verl_runs.trainer(settings)
    calls, op = [], verl_kernels.linear_logprob
    verl_kernels.linear_logprob = lambda *a, **k: calls.append(1) or op(*a, **k)
    trainer.fit(verl_runs.Answers())
    verl_kernels.linear_logprob = op
    return {"seen": trainer.seen, "logged": trainer.logged, "calls_of_our_op": len(calls)}


def decisions(folder: Path, series: list[float], mode: str, *changes: str) -> dict:
    """AEPO's decisions where the entropies of the batches are given, and advantages with them."""
    settings = verl_runs.config(folder, *changes, "algorithm.adv_estimator=grpo")
    trainer = get_trainer_cls(mode)(settings)
    dropping, advantages = [], []
    for entropy in series:
        batch, metrics = put_batch(entropy), {}
        trainer._compute_advantage(batch, metrics)
        assert metrics["aepo/entropy"] == entropy
        dropping.append(bool(metrics["aepo/dropping"]))
        found = tq.kv_batch_get(batch.keys, "train", ["advantages"])["advantages"]
        advantages.append([row[0].item() for row in found])
        tq.kv_clear(keys=batch.keys, partition_id="train")
    return {"dropping": dropping, "advantages": advantages}


def put_batch(entropy: float, is_trained_on: bool = True) -> KVBatchMeta:
    """One prompt with rewards 1, 0, 1, 0 and answers of 1 to 4 tokens, all of this entropy."""
    uid = uuid.uuid4().hex
    keys, fields = [], []
    for i in range(4):
        ones = torch.ones(i + 1)
        keys.append(f"{uid}_{i}_0")
        fields.append(
            {
                "uid": uid, "data_source": "needle", "response_mask": ones.long() * is_trained_on,
                "rm_scores": torch.cat([torch.zeros(i), torch.tensor([1.0 - i % 2])]),
                "entropy": ones.double() * entropy, "old_log_probs": -ones,
            }
        )  # fmt: skip
    tags = [{"status": "success"}] * 4
    tq.kv_batch_put(
        keys=keys, partition_id="train", fields=tu.list_of_dict_to_tensordict(fields), tags=tags
    )
    return KVBatchMeta(partition_id="train", keys=keys, tags=tags)


def nothing_to_train_on(folder: Path) -> dict:
    """Metrics of a batch whose tokens are all masked, after one of high entropy; the last state."""
    settings = verl_runs.config(folder, "algorithm.adv_estimator=grpo")
    trainer, metrics = get_trainer_cls("qwenlong_sync")(settings), {}
    trainer._compute_advantage(put_batch(0.3), {})
    trainer._compute_advantage(put_batch(float("nan"), is_trained_on=False), metrics)
    return {"metrics": metrics, "state": trainer._controller.state_dict()}


@ray.remote(num_cpus=0)  # the TransferQueue has them all
def bases_in_ray() -> list[str]:
    """What the name stands for in a process of Ray, where nothing of ours was imported."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    return [cls.__name__ for cls in get_trainer_cls("qwenlong_sync").__mro__[:3]]


def several_advantages(folder: Path) -> str:
    """What AEPO says to an estimator that gives a sequence several advantages."""
    settings = verl_runs.config(
        folder, "algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0.5"
    )
    try:
        get_trainer_cls("qwenlong_sync")(settings)._compute_advantage(put_batch(0.2), {})
    except ValueError as error:
        return str(error)
    return ""


def missing_task(folder: Path) -> str:
    settings = verl_runs.config(folder, "++trainer.v1.qwenlong.task_field=kind")
    try:
        get_trainer_cls("qwenlong_sync")(settings)._compute_advantage(put_batch(0.2), {})
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    verl_runs.start(port)
    tq.init(verl_runs.config(folder).transfer_queue)
    found = {}

    found["lagged"] = train(folder, 4, *LAGGED)
    halves = [*LAGGED, f"trainer.default_local_dir={folder / 'halves'}", "trainer.save_freq=2"]
    found["first_half"] = train(folder, 2, *halves)
    found["second_half"] = train(folder, 4, *halves)
    again = f"trainer.resume_from_path={folder / 'halves' / 'global_step_2'}"
    resumed = verl_runs.trainer(
        verl_runs.config(folder, *halves, "trainer.resume_mode=resume_path", again)
    )
    found["by_path"] = [resumed.global_steps, resumed._controller.state_dict()]

    found["same_step"] = train(folder, 1, *ALWAYS)
    plain = ["algorithm.adv_estimator=grpo", *OFF]
    backend = "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch"
    found["ours"] = train(folder, 3, *plain)
    found["verl"] = train(folder, 3, *plain, backend, "trainer.v1.trainer_mode=sync")

    series = json.loads((folder / "series.json").read_text())
    found["decisions"] = [
        decisions(
            folder,
            series,
            "qwenlong_colocate_async" if mode == "band" else "qwenlong_sync",
            f"++trainer.v1.qwenlong.aepo_mode={mode}",
            f"++trainer.v1.qwenlong.aepo_entropy_source={source}",
        )
        | {"mode": mode, "source": source}
        for mode in ("latch", "above-high", "band")
        for source in ("scoring_pass", "previous_step")
    ]
    found["nothing_to_train_on"] = nothing_to_train_on(folder)
    found["bases_in_ray"] = ray.get(bases_in_ray.remote(), timeout=120)
    found["several_advantages"] = several_advantages(folder)
    found["missing_task"] = missing_task(folder)
    (folder / "found.json").write_text(json.dumps(found))
    verl_runs.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
