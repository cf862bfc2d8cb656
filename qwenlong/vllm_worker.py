"""What a vLLM server needs to take new weights from a file: imported by its workers, not by us.

Give the server ``--worker-extension-cls qwenlong.vllm_worker.WeightsFromFile`` and
``--weight-transfer-config '{"backend": "qwenlong_file"}'``; the folder that holds ``qwenlong`` must
be on its ``PYTHONPATH``. Checked with vLLM 0.32.
"""

from __future__ import annotations

from dataclasses import dataclass

from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

BACKEND = "qwenlong_file"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    path: str  # a .safetensors file that every worker can read, with the names of transformers


class FileEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads a file layer by layer, as vLLM loads a checkpoint."""

    init_info_cls, update_info_cls = InitInfo, UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            experts = getattr(layer, "w13_weight", None)
            if hasattr(method, "moe_kernel") and experts is not None and experts.is_cpu:
                # vLLM 0.32 on the CPU packs experts only while it makes their kernel, and would
                # read new ones, which are not packed, as if they were, without an error.
                method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        # The base class waits for an accelerator here, which a CPU worker does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with safe_open(update_info.path, framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        head = getattr(self.model, "lm_head", None)
        if head is not None and hasattr(head, "quant_method"):
            # vLLM 0.32 on the CPU keeps a packed copy of a tied head and does not renew it:
            # answers would come from the new body and the old head, without an error.
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        pass


class WeightsFromFile:
    """Worker extension; importing it registers the backend in the worker's process."""


WeightTransferEngineFactory.register_engine(BACKEND, FileEngine)
