"""Weights of a model folder, tensor by tensor from its safetensors shards to where they belong."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """The tensors of a folder by name. Shards are memory-mapped, never read as a whole."""

    def __init__(self, folder: str | Path):
        """
        Raises:
            FileNotFoundError: no safetensors file, or a shard that the index names is missing.
        """
        from safetensors import safe_open

        self.folder = Path(folder)
        index = self.folder / _INDEX
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (self.folder / _SINGLE).is_file():
            shards = [_SINGLE]
        else:
            raise FileNotFoundError(
                f"Scorer: {self.folder} holds neither {_SINGLE} nor {_INDEX}; save the model with "
                "save_pretrained (safe_serialization)"
            )
        missing = [name for name in shards if not (self.folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"Scorer: {len(missing)} of {len(shards)} shards are missing in {self.folder}, "
                f"{missing[0]} among them; download the model again"
            )
        self._files, self._of = {}, {}
        for name in shards:
            try:
                file = safe_open(self.folder / name, framework="pt", device="cpu")
            except Exception as error:  # safetensors raises its own type for a torn file
                raise ValueError(
                    f"Scorer: {self.folder / name} is damaged ({error}); download it again"
                ) from error
            self._files[name] = file
            self._of.update(dict.fromkeys(file.keys(), name))

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Copy tensor ``name`` into ``out``, converted to its dtype.

        Raises:
            ValueError: no such tensor, or another shape.
        """
        if name not in self._of:
            raise ValueError(
                f"Scorer: {self.folder} has no tensor {name!r}; download the model again"
            )
        tensor = self._files[self._of[name]].get_tensor(name)
        if tensor.shape != out.shape:
            raise ValueError(
                f"Scorer: {name} in {self.folder} is {tuple(tensor.shape)}, its config says "
                f"{tuple(out.shape)}"
            )
        out.copy_(tensor)

    def read_layer_into(self, layer: int, out: dict[str, torch.Tensor]) -> None:
        """Fill the weights of a layer; experts may be stored one by one or all in one tensor."""
        prefix = f"model.layers.{layer}."
        for name, tensor in out.items():
            if "mlp.experts." in name and prefix + name not in self:
                self._read_experts_into(f"{prefix}mlp.experts", name, tensor)
            else:
                self.read_into(prefix + name, tensor)

    def _read_experts_into(self, prefix: str, name: str, out: torch.Tensor) -> None:
        for e, expert in enumerate(out):
            if name.endswith("gate_up_proj"):
                gate, up = expert.chunk(2)  # rows of [2 I, H]
                self.read_into(f"{prefix}.{e}.gate_proj.weight", gate)
                self.read_into(f"{prefix}.{e}.up_proj.weight", up)
            else:
                self.read_into(f"{prefix}.{e}.down_proj.weight", expert)
