"""Tiles of the grouped products by path, element size and rows per expert, and launch options.

Every configuration of a path shares BLOCK_K, hence the order of the additions over K: the choice
between few and many rows changes no bit of a result.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from qlkernels._target import compute_capability, is_interpreting, multiprocessor_count


class Tiles(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    per_sm: int = 1  # programs that share a multiprocessor: one computes while another one stores


FEW_ROWS = 160  # up to this many rows per expert on average, tiles of 64 rows waste less
SHARE = 16  # columns of I whose part of the gradient of a routing weight is summed in one go

_POINTER = {
    ("pointer", 2): Tiles(128, 64, 32, 8, 8, 3),
    ("pointer", 4): Tiles(64, 32, 32, 8, 4, 2),
    ("interpreter", 2): Tiles(16, 32, 16, 2, 1, 1),
    ("interpreter", 4): Tiles(16, 32, 16, 2, 1, 1),
}


def _table(many_90: Tiles, few_90: Tiles, many_100: Tiles, few_100: Tiles, pointer: dict) -> dict:
    """(path, bytes of an element, "many" | "few") -> Tiles."""
    found = {(*key, size): tiles for key, tiles in pointer.items() for size in ("many", "few")}
    found["tma-sm90", 2, "many"], found["tma-sm90", 2, "few"] = many_90, few_90
    found["tma-sm100", 2, "many"], found["tma-sm100", 2, "few"] = many_100, few_100
    # two sizes, so that tests compare them
    for bytes_ in (2, 4):
        present = found["interpreter", bytes_, "many"]
        found["interpreter", bytes_, "many"] = present._replace(block_m=2 * present.block_m)
    return found


GATE_UP_CONFIG = _table(  # block_n columns of gate and as many of up
    Tiles(128, 128, 64, 8, 8, 4), Tiles(64, 128, 64, 8, 4, 4),
    Tiles(128, 64, 64, 8, 8, 4), Tiles(64, 64, 64, 8, 8, 4), _POINTER,
)  # fmt: skip
DOWN_CONFIG = _table(
    Tiles(128, 256, 64, 8, 8, 4), Tiles(64, 256, 64, 8, 4, 4),
    Tiles(128, 128, 64, 8, 8, 4), Tiles(64, 128, 64, 8, 4, 4), _POINTER,
)  # fmt: skip
DX_CONFIG = dict(DOWN_CONFIG)
SWIGLU_BACKWARD_CONFIG = _table(
    Tiles(128, 256, 64, 8, 8, 3), Tiles(64, 128, 64, 8, 4, 4),
    Tiles(128, 128, 64, 8, 8, 3), Tiles(64, 128, 64, 8, 4, 4), _POINTER,
)  # fmt: skip
# Products over the rows, left^T right. The gathered operand (left for w_down, right for w_gate_up)
# is two loads deep, row numbers and then rows, so 7 stages are 4 buffers; and it costs a thread the
# most instructions, so its side of the tile is the short one.
_DW_POINTER = _POINTER | {("pointer", 2): Tiles(128, 64, 32, 8, 8, 5)}
_DW_100 = Tiles(128, 128, 64, 8, 8, 7)
DW_DOWN_CONFIG = _table(
    Tiles(128, 256, 64, 8, 8, 7), Tiles(128, 256, 64, 8, 8, 7), _DW_100, _DW_100, _DW_POINTER,
)  # fmt: skip
DW_GATE_UP_CONFIG = _table(
    Tiles(256, 128, 64, 8, 8, 7), Tiles(256, 128, 64, 8, 8, 7), _DW_100, _DW_100, _DW_POINTER,
)  # fmt: skip
# whether the rows of gate-up are copied into the order of the experts and then come by the copy
# engine, or are gathered in the kernel
GATHER_BY_COPY = {"tma-sm90": False, "tma-sm100": False, "pointer": False, "interpreter": False}


def path_of(*operands: torch.Tensor) -> str:
    """How operands are loaded that are not gathered: the copy engine wants 16-bit elements and rows
    that start on 16 bytes.
    """
    if is_interpreting():
        return "interpreter"
    capability = compute_capability(operands[0].device.index or 0)
    if not 90 <= capability < 120:
        return "pointer"
    for x in operands:
        if x.element_size() != 2 or x.data_ptr() % 16:
            return "pointer"
        for stride in x.stride()[:-1]:
            if stride % 8:
                return "pointer"
    return "tma-sm90" if capability < 100 else "tma-sm100"


def pick(table: dict, path: str, element_size: int, rows: int, experts: int) -> Tiles:
    size = "few" if rows <= FEW_ROWS * experts else "many"
    return table[path, element_size, size]


def for_rows_anywhere(tiles: Tiles, path: str) -> Tiles:
    """Of a product over the rows whose gathered rows Triton does not know to be 16 elements apart:
    with as many stages it keeps one buffer more, which does not fit.
    """
    return tiles._replace(num_stages=tiles.num_stages - 1) if uses_tma(path) else tiles


def uses_tma(path: str) -> bool:
    return path.startswith("tma")


@functools.cache
def launch_options(tiles: Tiles, path: str, dtype: torch.dtype, device: torch.device) -> dict:
    """Tile sizes and compiler options, without what is particular to a kernel. Made once, so not to
    be changed.
    """
    options = dict(
        USE_TMA=uses_tma(path),
        UPCAST=is_interpreting(),
        PRECISION="ieee" if dtype == torch.float32 else "tf32",  # ignored for 16-bit operands
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        GROUP_M=tiles.group_m,
        NUM_PROGRAMS=multiprocessor_count(device.index or 0) * tiles.per_sm,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return options | register_limit(tiles)


def register_limit(tiles: Tiles) -> dict[str, int]:
    """``maxnreg`` where ``per_sm`` programs would not fit the register file without it."""
    registers = 65536 // (32 * tiles.num_warps * tiles.per_sm)
    return dict(maxnreg=registers // 8 * 8) if registers < 255 else {}
