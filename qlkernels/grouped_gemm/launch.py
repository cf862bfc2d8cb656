"""Allocate nothing but tile maps, choose tiles, launch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qlkernels._target import is_interpreting
from qlkernels._triton import TensorDescriptor, cdiv, next_power_of_2
from qlkernels.grouped_gemm import configs
from qlkernels.grouped_gemm.backward_kernels import (
    sum_shares_kernel,
    swiglu_backward_kernel,
    weight_gradient_kernel,
)
from qlkernels.grouped_gemm.kernels import (
    combine_kernel,
    gate_up_kernel,
    gather_kernel,
    product_kernel,
    tile_map_kernel,
)

_MAP_TILES = 64  # tiles of a map that one program writes
_SLOTS = 256  # slots of a program that sums shares


class TileMap(NamedTuple):
    """Row tiles of a chunk of tokens; ``tiles`` is ``[4, n]`` int32, n an upper bound known to the
    host.
    """

    tiles: torch.Tensor
    n_tiles: torch.Tensor  # [1] int32
    shift: torch.Tensor  # [E] int32: workspace row = sorted row + shift
    block_m: int
    max_tiles: int  # n


class RoutedRows:
    """The rows of one layer's tokens, sorted by expert; slots whose expert is outside [0, E) come
    last and are never touched.
    """

    def __init__(
        self,
        topk_ids: torch.Tensor,  # [T, top_k] int32, contiguous
        sort_order: torch.Tensor,  # [T * top_k] int32
        inverse_order: torch.Tensor,  # [T * top_k] int32
        expert_offsets: torch.Tensor,  # [E + 1] int32
    ):
        self.topk_ids = topk_ids
        self.sort_order = sort_order
        self.inverse_order = inverse_order
        self.expert_offsets = expert_offsets
        self.top_k = topk_ids.shape[1]
        self.experts = expert_offsets.shape[0] - 1
        self.total = sort_order.shape[0]
        self._maps: dict[tuple, TileMap] = {}

    def tile_map(self, chunk: tuple[int, int], block_m: int) -> TileMap:
        """Tiles of at most ``block_m`` rows of the tokens ``[chunk[0], chunk[1])``; kept for the
        next product over them.
        """
        found = self._maps.get((chunk, block_m))
        if found is None:
            self._maps = {key: value for key, value in self._maps.items() if key[0] == chunk}
            found = self._maps[chunk, block_m] = self._make_map(chunk, block_m)
        return found

    def shift(self, chunk: tuple[int, int]) -> torch.Tensor:
        """``[E]``: sorted row + this = row of the chunk's workspace, from any map of the chunk."""
        for (known, _), found in self._maps.items():
            if known == chunk:
                return found.shift
        return self.tile_map(chunk, 64).shift

    def _make_map(self, chunk: tuple[int, int], block_m: int) -> TileMap:
        first, last = chunk[0] * self.top_k, chunk[1] * self.top_k
        rows, E = last - first, self.experts
        max_tiles = rows // block_m + min(rows, E)
        new = self.sort_order.new_empty
        found = TileMap(new(4, max_tiles), new(1), new(E), block_m, max_tiles)
        tile_map_kernel[(cdiv(max_tiles, _MAP_TILES),)](
            self.expert_offsets, self.sort_order, found.tiles, found.n_tiles, found.shift,
            first, last, self.total.bit_length(), max_tiles, E,
            WHOLE=rows == self.total, BLOCK_M=block_m, BLOCK_E=next_power_of_2(E),
            BLOCK_TILES=_MAP_TILES,
        )  # fmt: skip
        return found


def _descriptor(x: torch.Tensor, block: list[int]):
    return TensorDescriptor(x, x.shape, x.stride(), block)


def bounded_descriptor(x: torch.Tensor, block: list[int]):
    """Descriptor by which the copy engine reads rows [begin, end) of ``x [rows, N]``, and zeros
    from ``end`` on.

    It has a row dimension of 2**30 rows that is read at 2**30 - (end - begin) + k, so the segment
    ends where the dimension does; two more dimensions move the address back to row begin + k,
    through 2**64: at 2**30 of the first one it is 2**30 rows back, at ``end`` of the second one
    ``end`` rows forth.
    """
    stride, most = x.stride(0), 0x7FFF0000
    strides = [2**34 - stride, stride, stride, 1]
    return TensorDescriptor(x, [most, most, 2**30, x.shape[1]], strides, [1, 1, *block])


def _grid(options: dict, tiles: int) -> tuple[int]:
    return (max(1, min(options["NUM_PROGRAMS"], tiles)),)


def _plan(table: dict, rows: RoutedRows, chunk: tuple[int, int], *operands: torch.Tensor):
    """Path, tiles, tile map and options of a product over a chunk's rows; ``operands`` are those
    that are not gathered.
    """
    path, x = configs.path_of(*operands), operands[0]
    count = (chunk[1] - chunk[0]) * rows.top_k
    tiles = configs.pick(table, path, x.element_size(), count, rows.experts)
    options = configs.launch_options(tiles, path, x.dtype, x.device)
    return path, tiles, rows.tile_map(chunk, tiles.block_m), options


def gate_up(
    x: torch.Tensor,
    w: torch.Tensor,
    rows: RoutedRows,
    chunk: tuple[int, int],
    a: torch.Tensor | None,
    h: torch.Tensor | None,
    buffer: torch.Tensor | None = None,
) -> None:
    """Write ``a [workspace rows, I]`` and ``h [sorted rows, 2 I]``, each where it is given.

    x is ``[T, H]``, w ``[E, 2 I, H]``. ``buffer [workspace rows, H]`` may be used to gather into.
    """
    E, two_i, H = w.shape
    path, tiles, tile_map, options = _plan(configs.GATE_UP_CONFIG, rows, chunk, w)
    max_tiles, n_n = tile_map.max_tiles, cdiv(two_i // 2, tiles.block_n)
    is_gathered = configs.GATHER_BY_COPY[path] and buffer is not None
    operand = x
    if is_gathered:
        _gather(x, rows, tile_map, buffer)
        operand = _descriptor(buffer, [tiles.block_m, tiles.block_k])
    w_operand = w
    if options["USE_TMA"]:
        halves = w.view(2 * E, two_i // 2, H)
        w_operand = _descriptor(halves, [2, tiles.block_n, tiles.block_k])
    gate_up_kernel[_grid(options, max_tiles * n_n)](
        operand, w_operand, x if a is None else a, x if h is None else h,
        rows.sort_order, tile_map.tiles, tile_map.n_tiles,
        x.stride(0), 0 if a is None else a.stride(0), 0 if h is None else h.stride(0),
        max_tiles, H, two_i // 2,
        TOP_K=rows.top_k, IS_GATHERED=is_gathered, STORE_A=a is not None, STORE_H=h is not None,
        EVEN_K=H % tiles.block_k == 0, **options,
    )  # fmt: skip


def _gather(x: torch.Tensor, rows: RoutedRows, tile_map: TileMap, out: torch.Tensor) -> None:
    at_once = min(8, tile_map.block_m)
    max_tiles, H = tile_map.max_tiles, x.shape[1]
    gather_kernel[(max_tiles * (tile_map.block_m // at_once),)](
        x, out, rows.sort_order, tile_map.tiles, tile_map.n_tiles, x.stride(0), out.stride(0),
        max_tiles, H, TOP_K=rows.top_k, BLOCK_M=tile_map.block_m, ROWS=at_once,
        BLOCK_H=min(512, next_power_of_2(H)), num_warps=4,
    )  # fmt: skip


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    rows: RoutedRows,
    chunk: tuple[int, int],
    out: torch.Tensor,
    *,
    is_transposed: bool,
) -> None:
    """Write ``out [workspace rows, N]`` = x w_e^T with w ``[E, N, K]`` and x in the order of the
    workspace, or, ``is_transposed``, x w_e with w ``[E, K, N]`` and x in the order of the sort.
    """
    K, N = w.shape[1:] if is_transposed else w.shape[:0:-1]
    table = configs.DX_CONFIG if is_transposed else configs.DOWN_CONFIG
    _, tiles, tile_map, options = _plan(table, rows, chunk, x, w)
    max_tiles, n_n = tile_map.max_tiles, cdiv(N, tiles.block_n)
    operands = x, w
    if options["USE_TMA"]:
        block = [tiles.block_k, tiles.block_n] if is_transposed else [tiles.block_n, tiles.block_k]
        operands = (
            _descriptor(x, [tiles.block_m, tiles.block_k]),
            _descriptor(w, [1, *block]),
        )
    product_kernel[_grid(options, max_tiles * n_n)](
        *operands, out, tile_map.tiles, tile_map.n_tiles, x.stride(0), out.stride(0), max_tiles,
        N, K, FROM_WORKSPACE=not is_transposed, IS_TRANSPOSED=is_transposed,
        EVEN_K=K % tiles.block_k == 0, **options,
    )  # fmt: skip


def combine(
    values: torch.Tensor,
    rows: RoutedRows,
    chunk: tuple[int, int],
    out: torch.Tensor,
    *,
    weights: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """Write ``out[chunk]`` = sum over its slots of (weight *) the workspace row (+ residual)."""
    H, tokens = out.shape[1], chunk[1] - chunk[0]
    block = min(4096, next_power_of_2(H))
    combine_kernel[(tokens * cdiv(H, block),)](
        values, rows.inverse_order, rows.topk_ids, values if weights is None else weights,
        rows.shift(chunk), out if residual is None else residual, out,
        values.stride(0), 0 if residual is None else residual.stride(0), out.stride(0), chunk[0],
        H, rows.experts, TOP_K=rows.top_k, HAS_WEIGHTS=weights is not None,
        HAS_RESIDUAL=residual is not None, BLOCK_H=block,
        num_warps=1 if is_interpreting() else max(1, min(8, block // 256)),
    )  # fmt: skip


def swiglu_backward(
    dout: torch.Tensor,
    w_down: torch.Tensor,
    h: torch.Tensor,
    weights: torch.Tensor,
    rows: RoutedRows,
    dh: torch.Tensor | None,
    a: torch.Tensor | None,
) -> torch.Tensor:
    """Write ``dh [sorted rows, 2 I]`` and ``a [sorted rows, I]`` times its weight, where given;
    return the gradient of the weights ``[T, top_k]`` fp32.
    """
    E, H, I = w_down.shape  # noqa: E741
    T = rows.topk_ids.shape[0]
    shares = torch.empty(cdiv(I, configs.SHARE), rows.total, device=dout.device)
    table = configs.SWIGLU_BACKWARD_CONFIG
    _, tiles, tile_map, options = _plan(table, rows, (0, T), w_down)
    max_tiles, n_n = tile_map.max_tiles, cdiv(I, tiles.block_n)
    w_operand = w_down
    if options["USE_TMA"]:
        w_operand = _descriptor(w_down, [1, tiles.block_k, tiles.block_n])
    swiglu_backward_kernel[_grid(options, max_tiles * n_n)](
        dout, w_operand, h, h if dh is None else dh, h if a is None else a, shares, weights,
        rows.sort_order, tile_map.tiles, tile_map.n_tiles,
        dout.stride(0), h.stride(0), 0 if a is None else a.stride(0), max_tiles, rows.total, H, I,
        TOP_K=rows.top_k, STORE_DH=dh is not None, STORE_A=a is not None, PART=configs.SHARE,
        EVEN_K=H % tiles.block_k == 0, **options,
    )  # fmt: skip
    dweights = torch.empty(T, rows.top_k, device=dout.device)
    sum_shares_kernel[(cdiv(rows.total, _SLOTS),)](
        shares, rows.inverse_order, rows.topk_ids, dweights, rows.total, shares.shape[0], E,
        BLOCK=_SLOTS,
    )  # fmt: skip
    return dweights


def weight_gradient(
    left: torch.Tensor,
    right: torch.Tensor,
    rows: RoutedRows,
    out: torch.Tensor,
    *,
    gather_left: bool,
    accumulate: bool,
) -> None:
    """Write or add to ``out [E, M, N]`` left_e^T right_e over the rows of every expert.

    One operand is ``[T, .]``, gathered, the other one ``[sorted rows, .]``.
    """
    E, M, N = out.shape
    gathered, sorted_rows = (left, right) if gather_left else (right, left)
    path = configs.path_of(sorted_rows)
    if rows.total > 2**30:  # more than the bounded descriptor can address
        path = "pointer"
    table = configs.DW_DOWN_CONFIG if gather_left else configs.DW_GATE_UP_CONFIG
    tiles = configs.pick(table, path, left.element_size(), rows.total, E)
    if gathered.stride(0) % 16 or gathered.shape[1] % 16 or gathered.data_ptr() % 16:
        tiles = configs.for_rows_anywhere(tiles, path)
    options = configs.launch_options(tiles, path, left.dtype, left.device)
    n_tiles = E * cdiv(M, tiles.block_m) * cdiv(N, tiles.block_n)
    operands = [left, right]
    if options["USE_TMA"]:
        if gather_left:
            operands[1] = bounded_descriptor(right, [tiles.block_k, tiles.block_n])
        else:
            operands[0] = bounded_descriptor(left, [tiles.block_k, tiles.block_m])
    weight_gradient_kernel[_grid(options, n_tiles)](
        *operands, out, rows.sort_order, rows.expert_offsets, left.stride(0), right.stride(0),
        M, N, E, GATHER_LEFT=gather_left, TOP_K=rows.top_k, ACCUMULATE=accumulate,
        EVEN_M=M % tiles.block_m == 0, EVEN_N=N % tiles.block_n == 0, **options,
    )  # fmt: skip
