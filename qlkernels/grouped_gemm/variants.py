"""Every kernel as it is launched, for the ahead-of-time tests: bf16 by the copy engine on sm_90 and
sm_100, bf16 through pointers on sm_80, fp32 through pointers.
"""

from __future__ import annotations

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

_PATHS = (("pointer", 2, [80, 90]), ("pointer", 4, [80, 90]), ("tma-sm90", 2, [90]), ("tma-sm100", 2, [100]))  # noqa: E501  # fmt: skip
_ALIGNED = (
    "stride_xt", "stride_xm", "stride_am", "stride_hm", "stride_om", "stride_lm", "stride_rm",
    "stride_rt", "stride_ot", "H", "I", "M", "N", "K", "x", "w", "a_ptr", "h_ptr", "dh_ptr",
    "out_ptr", "left", "right", "order_ptr", "rows_ptr", "residual_ptr", "x_ptr",
)  # fmt: skip


def _signature(dtype: str) -> dict[str, str]:
    integers = [n for n in _ALIGNED if n.startswith("stride") or len(n) == 1 and n.isupper()]
    integers += [
        "max_tiles", "total", "first_slot", "last_slot", "steps", "first_token", "n_parts", "E",
    ]  # fmt: skip
    indices = (
        "order_ptr", "tiles_ptr", "n_tiles_ptr", "inverse_ptr", "ids_ptr", "shift_ptr",
        "offsets_ptr",
    )  # fmt: skip
    values = (
        "x", "w", "a_ptr", "h_ptr", "dh_ptr", "out_ptr", "left", "right", "rows_ptr",
        "residual_ptr", "x_ptr",
    )  # fmt: skip
    return (
        dict.fromkeys(integers, "i32")
        | dict.fromkeys(indices, "*i32")
        | dict.fromkeys(values, f"*{dtype}")
        | dict.fromkeys(("weights_ptr", "partial_ptr"), "*fp32")
    )


def _products(name, kernel, table, choices, descriptors, flags=lambda path: {}):
    """Variants of a product: ``choices`` maps a label to constexprs, ``descriptors`` gives the
    blocks of the operands that come by the copy engine.
    """
    for path, size, capabilities in _PATHS:
        dtype = "bf16" if size == 2 else "fp32"
        seen = set()
        for rows in ("many", "few"):
            tiles = table[path, size, rows]
            if tiles in seen:
                continue
            seen.add(tiles)
            for label, constexprs in choices.items():
                signature = _signature(dtype)
                if configs.uses_tma(path):
                    for operand, block in descriptors(tiles, constexprs).items():
                        signature[operand] = f"tensordesc<{dtype}{block}>"
                elif constexprs.get("IS_GATHERED"):
                    continue
                if constexprs.get("ACCUMULATE"):  # into an fp32 buffer
                    signature["out_ptr"] = "*fp32"
                common = dict(
                    UPCAST=False, PRECISION="tf32" if size == 2 else "ieee",
                    BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
                    GROUP_M=tiles.group_m, NUM_PROGRAMS=132 * tiles.per_sm,
                )  # fmt: skip
                options = dict(
                    num_warps=tiles.num_warps, num_stages=tiles.num_stages,
                    capabilities=capabilities, **configs.register_limit(tiles),
                )  # fmt: skip
                parts = (f"moe_{name}", path, dtype, rows, label)
                full = common | constexprs | flags(path)
                yield "-".join(filter(None, parts)), kernel, signature, full, _ALIGNED, options


def _anywhere(variants, gather_left: bool):
    """The same where the gathered rows start anywhere."""
    unknown = ("stride_lm", "M", "left") if gather_left else ("stride_rm", "N", "right")
    for name, kernel, signature, constexprs, aligned, options in variants:
        yield (
            f"{name}-anywhere", kernel, signature, constexprs | dict(EVEN_M=False, EVEN_N=False),
            tuple(x for x in aligned if x not in unknown),
            options | dict(num_stages=options["num_stages"] - 1),
        )  # fmt: skip


def _even_and_tma(path: str) -> dict[str, bool]:
    return dict(EVEN_K=True, USE_TMA=configs.uses_tma(path))


def aot_variants():
    """(name, kernel, signature, constexprs, aligned, options) of every kernel and configuration."""
    top_k = dict(TOP_K=8)
    found = []
    gate_up = {
        "score": dict(STORE_A=True, STORE_H=False, IS_GATHERED=False),
        "train": dict(STORE_A=True, STORE_H=True, IS_GATHERED=False),
        "copied": dict(STORE_A=True, STORE_H=True, IS_GATHERED=True),
    }

    def gate_up_blocks(t, flags):
        blocks = dict(w=[2, t.block_n, t.block_k])
        return blocks | (dict(x=[t.block_m, t.block_k]) if flags["IS_GATHERED"] else {})

    found += _products(
        "gate_up", gate_up_kernel, configs.GATE_UP_CONFIG,
        {k: v | top_k for k, v in gate_up.items()}, gate_up_blocks, _even_and_tma,
    )  # fmt: skip
    for name, table, is_transposed in (
        ("down", configs.DOWN_CONFIG, False), ("dx", configs.DX_CONFIG, True),
    ):  # fmt: skip
        flags = dict(IS_TRANSPOSED=is_transposed, FROM_WORKSPACE=not is_transposed)

        def blocks(t, flags):
            w = [t.block_n, t.block_k]
            return dict(
                x=[t.block_m, t.block_k], w=[1, *(w[::-1] if flags["IS_TRANSPOSED"] else w)]
            )

        found += _products(name, product_kernel, table, {"": flags}, blocks, _even_and_tma)
    found += _products(
        "swiglu_backward", swiglu_backward_kernel, configs.SWIGLU_BACKWARD_CONFIG,
        {"": top_k | dict(STORE_DH=True, STORE_A=True, PART=configs.SHARE)},
        lambda t, _: dict(w=[1, t.block_k, t.block_n]), _even_and_tma,
    )  # fmt: skip
    even = dict(EVEN_M=True, EVEN_N=True) | top_k

    def dw_blocks(t, flags):
        if flags["GATHER_LEFT"]:
            return dict(right=[1, 1, t.block_k, t.block_n])
        return dict(left=[1, 1, t.block_k, t.block_m])

    for name, table, gather_left in (
        ("dw_down", configs.DW_DOWN_CONFIG, True),
        ("dw_gate_up", configs.DW_GATE_UP_CONFIG, False),
    ):
        flags = even | dict(GATHER_LEFT=gather_left)
        choices = {"": flags | dict(ACCUMULATE=False), "added": flags | dict(ACCUMULATE=True)}
        found += _products(
            name, weight_gradient_kernel, table, choices, dw_blocks,
            lambda path: dict(USE_TMA=configs.uses_tma(path)),
        )  # fmt: skip
        found += _anywhere([v for v in found if v[0].startswith(f"moe_{name}-tma")], gather_left)
    rows = _signature("bf16")
    for whole in (True, False):
        constexprs = dict(WHOLE=whole, BLOCK_M=128, BLOCK_E=128, BLOCK_TILES=64)
        found.append((f"moe_tile_map-whole{int(whole)}", tile_map_kernel, rows, constexprs, (), {}))
    for flag in (True, False):
        constexprs = top_k | dict(HAS_WEIGHTS=flag, HAS_RESIDUAL=flag, BLOCK_H=2048)
        found.append(
            (f"moe_combine-weights{int(flag)}", combine_kernel, rows, constexprs, _ALIGNED,
             dict(num_warps=8))
        )  # fmt: skip
    constexprs = top_k | dict(BLOCK_M=128, ROWS=8, BLOCK_H=512)
    found.append(("moe_gather", gather_kernel, rows, constexprs, _ALIGNED, dict(num_warps=4)))
    shares = rows | dict(out_ptr="*fp32")
    found.append(("moe_sum_shares", sum_shares_kernel, shares, dict(BLOCK=256), (), {}))
    return found
