"""Where the weights are while a pass runs: on the device, or streamed to it layer by layer."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from qlkernels.scorer.decoder import Decoder

_ALIGNMENT = 256  # bytes, of every weight in a layer's buffer


class ResidentWeights:
    """All weights on the device of the pass."""

    def __init__(self, layers: list[dict[str, torch.Tensor]], ends: dict[str, torch.Tensor]):
        """``ends`` has ``embedding [V, H]``, ``norm [H]`` and ``head [V, H]``."""
        self._layers, self._ends = layers, ends
        self.device, self.dtype = ends["norm"].device, ends["norm"].dtype

    def end(self, name: str) -> torch.Tensor:
        return self._ends[name]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self._ends["embedding"])

    def layers(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from self._layers


class LayerLayout:
    """How the weights of one layer lie in a flat buffer of bytes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self.dtype = dtype
        self.bytes = 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            self.places[name] = (self.bytes, size, shape)
            self.bytes += -(-size // _ALIGNMENT) * _ALIGNMENT

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights in ``flat`` (uint8, at least ``bytes`` long) by name."""
        return {
            name: flat[start : start + size].view(self.dtype).view(shape)
            for name, (start, size, shape) in self.places.items()
        }


class StreamedWeights:
    """Layers elsewhere, two device buffers: one computes while the next layer arrives in the other.

    On a GPU layers lie in page-locked host memory and arrive by a copy stream. On the CPU ``fill``
    writes a layer into its buffer on a thread of its own, from memory or from disk.
    """

    def __init__(
        self,
        layouts: list[LayerLayout],
        ends: dict[str, torch.Tensor],
        device: torch.device,
        fill: Callable[[int, dict[str, torch.Tensor]], None],
        host: list[torch.Tensor] | None,
    ):
        """
        Args:
            layouts: of every layer.
            ends: ``embedding``, ``norm`` and ``head``, on the host.
            device: where the pass computes.
            fill: writes the weights of a layer into views on the CPU.
            host: on a GPU the flat page-locked buffers; None on the CPU.
        """
        self._layouts, self._ends, self.device = layouts, ends, device
        self.dtype = layouts[0].dtype
        self._fill, self._host = fill, host
        size = max(layout.bytes for layout in layouts)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]

    @property
    def slot_bytes(self) -> int:
        return 2 * self._slots[0].numel()

    def end(self, name: str) -> torch.Tensor:
        return self._ends[name].to(self.device, non_blocking=True)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows are picked on the host: the table never comes to the device."""
        return F.embedding(ids.cpu(), self._ends["embedding"]).to(self.device)

    def layers(self) -> Iterator[dict[str, torch.Tensor]]:
        """Weights of one layer after the other. They hold until the next one is asked for."""
        yield from self._copied_layers() if self.device.type == "cuda" else self._filled_layers()

    def _filled_layers(self) -> Iterator[dict[str, torch.Tensor]]:
        def load(i: int) -> dict[str, torch.Tensor]:
            views = self._layouts[i].views(self._slots[i % 2])
            self._fill(i, views)
            return views

        with ThreadPoolExecutor(max_workers=1) as worker:
            coming = worker.submit(load, 0)
            for i in range(len(self._layouts)):
                views = coming.result()
                if i + 1 < len(self._layouts):
                    coming = worker.submit(load, i + 1)
                yield views

    def _copied_layers(self) -> Iterator[dict[str, torch.Tensor]]:
        compute = torch.cuda.current_stream(self.device)
        copy = torch.cuda.Stream(self.device)
        arrived = [torch.cuda.Event() for _ in range(2)]
        copy.wait_stream(compute)  # of an earlier pass

        def start(i: int) -> None:
            with torch.cuda.stream(copy):
                size = self._layouts[i].bytes
                self._slots[i % 2][:size].copy_(self._host[i], non_blocking=True)
                arrived[i % 2].record(copy)

        try:
            for i in range(min(2, len(self._layouts))):
                start(i)
            for i, layout in enumerate(self._layouts):
                compute.wait_event(arrived[i % 2])
                yield layout.views(self._slots[i % 2])
                if i + 2 < len(self._layouts):
                    copy.wait_stream(compute)  # layer i is done with this buffer
                    start(i + 2)
        finally:
            compute.wait_stream(copy)


class _LockedPages(mmap.mmap):
    """Anonymous memory that the GPU may copy from while it computes; unlocked when freed."""

    address = 0

    def lock(self, address: int) -> None:
        status = int(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
        if status != 0:
            raise RuntimeError(
                f"Scorer: the host cannot lock {len(self) / 1e9:.1f} GB of memory (CUDA error "
                f"{status}); raise `ulimit -l` or free memory"
            )
        self.address = address

    def __del__(self) -> None:
        if self.address:
            with contextlib.suppress(Exception):  # CUDA may be gone when the interpreter ends
                torch.cuda.cudart().cudaHostUnregister(self.address)


def host_buffer(size: int, device: torch.device) -> torch.Tensor:
    """``size`` bytes of host memory, page-locked where ``device`` is a GPU.

    ``pin_memory`` would round every buffer up to a power of two: 98 GB for 48 layers of 1.25 GB.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8)
    pages = _LockedPages(-1, max(1, size))
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer pages to lock
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the pages alive
    pages.lock(flat.data_ptr())
    return flat[:size]


def layouts_of(decoder: Decoder, dtype: torch.dtype) -> list[LayerLayout]:
    return [LayerLayout(decoder.layer_shapes(i), dtype) for i in range(decoder.layers)]
