"""The tile map and the products over rows sorted by expert, in the interpreter."""

import itertools

import pytest
import torch

from qlkernels.grouped_gemm import RoutedRows, aot_variants, configs, launch
from qlkernels.moe_routing import build_expert_index


def routed(T, E, top_k, *, seed=0, only=None, outside=False):
    """Random distinct experts; ``only`` sends every token to the first ``only`` experts, and
    ``outside`` marks some slots as another rank's.
    """
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(only or E, generator=g)[:top_k] for _ in range(T)]).int()
    if outside:
        ids[torch.rand(T, top_k, generator=g) < 0.3] = E
    return ids, RoutedRows(ids, *build_expert_index(ids, E))


def expected_tiles(ids, rows, chunk, block_m):
    """The map by a loop: (expert, first sorted row, rows, first workspace row) of every tile."""
    first, last = (t * rows.top_k for t in chunk)
    order, tiles, local = rows.sort_order.tolist(), [], 0
    for e, (begin, end) in enumerate(itertools.pairwise(rows.expert_offsets.tolist())):
        mine = [r for r in range(begin, end) if first <= order[r] < last]
        assert mine == list(range(mine[0], mine[-1] + 1)) if mine else True
        for at in range(0, len(mine), block_m):
            tiles.append((e, mine[at], min(block_m, len(mine) - at), local + at))
        local += len(mine)
    return tiles


@pytest.mark.parametrize("chunk", [(0, 23), (0, 7), (7, 19), (22, 23)])
@pytest.mark.parametrize("E, top_k, only", [(5, 2, None), (5, 2, 2), (1, 1, None), (67, 3, None)])
def test_tile_map(E, top_k, only, chunk):
    ids, rows = routed(23, E, top_k, only=only, outside=E == 5)
    found = rows.tile_map(chunk, 4)
    n = int(found.n_tiles)
    want = expected_tiles(ids, rows, chunk, 4)
    assert n == len(want) <= found.tiles.shape[1]
    assert [tuple(column) for column in found.tiles[:, :n].T.tolist()] == want
    for e, row, _, local in want:
        assert int(found.shift[e]) == local - row


def test_a_map_is_made_once_for_a_chunk_and_a_tile_size():
    _, rows = routed(9, 3, 2)
    first = rows.tile_map((0, 9), 4)
    assert rows.tile_map((0, 9), 4) is first and rows.tile_map((0, 9), 8) is not first
    assert rows.shift((0, 9)) is first.shift
    rows.tile_map((0, 5), 4)
    assert rows.tile_map((0, 9), 4) is not first


def test_products_by_hand():
    """Two experts that multiply by 2 and by -3; token 1 goes to both."""
    ids = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    rows = RoutedRows(ids, *build_expert_index(ids, 2))
    assert rows.sort_order.tolist() == [1, 0, 2]
    eye = torch.eye(4)
    w = torch.stack([2 * eye, -3 * eye])
    x = torch.arange(12.0).view(3, 4)
    out = torch.empty(3, 4)
    launch.product(x, w, rows, (0, 3), out, is_transposed=True)
    scale = torch.tensor([[2.0], [-3.0], [-3.0]])
    assert torch.equal(out, scale * x)
    combined = torch.empty(3, 4)
    weights = torch.tensor([[0.5], [10.0], [1.0]])
    launch.combine(out, rows, (0, 3), combined, weights=weights, residual=x)
    back = out[rows.inverse_order.long()]
    assert torch.equal(combined, weights * back + x)
    dw = torch.empty(2, 4, 4)
    launch.weight_gradient(out, x, rows, dw, gather_left=False, accumulate=False)
    torch.testing.assert_close(dw[0], torch.outer(out[0], x[1]))
    torch.testing.assert_close(dw[1], out[1:].T @ x[[0, 2]])


def test_another_experts_nan_stays_there():
    """Row blocks of K run into the next expert's rows, which may hold anything."""
    ids, rows = routed(6, 3, 1, seed=1)
    left, right = torch.randn(6, 8), torch.randn(6, 8)
    begin = int(rows.expert_offsets[1])
    assert 0 < begin < 6
    left[begin] = torch.nan
    dw = torch.empty(3, 8, 8)
    launch.weight_gradient(left, right, rows, dw, gather_left=False, accumulate=False)
    hit = [e for e in range(3) if dw[e].isnan().any()]
    assert hit == [int(ids[int(rows.sort_order[begin]), 0])]


def test_configurations_of_a_path_add_in_one_order():
    tables = (
        configs.GATE_UP_CONFIG, configs.DOWN_CONFIG, configs.DX_CONFIG,
        configs.SWIGLU_BACKWARD_CONFIG, configs.DW_DOWN_CONFIG, configs.DW_GATE_UP_CONFIG,
    )  # fmt: skip
    for table in tables:
        for path, size, _ in table:
            many, few = table[path, size, "many"], table[path, size, "few"]
            assert many.block_k == few.block_k
            for tiles in (many, few):
                registers = 65536 // (32 * tiles.num_warps * tiles.per_sm)
                assert registers >= 64


def test_variant_names_are_distinct():
    names = [name for name, *_ in aot_variants()]
    assert len(names) == len(set(names))
