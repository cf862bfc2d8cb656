"""Products of rows with their expert's weights, over rows sorted by expert: no padding of groups,
no atomics, nothing read back by the host.

    h = x W_gate_up^T,  a = silu(gate) * up,  y = a W_down^T,  out[t] = sum_j weight[t, j] y[t, j]

A row of x is gathered while it is loaded, or copied into place first, whichever a card's
configuration says. The kernels know a *tile map*, made on the device, so a call has the same
launches whatever the routing and can be captured in a CUDA graph. FLOPs: 6 T top_k H I forward, the
double backward.

Every element of a product is one chain of additions over K in one order, in every configuration:
its bits do not depend on the tokens beside it. ``qlkernels.moe`` composes the layer.
"""

from qlkernels.grouped_gemm.launch import RoutedRows
from qlkernels.grouped_gemm.variants import aot_variants
