"""Which kernel computes a linear layer, and the kernels: C++ where it was built, torch everywhere."""

from graphq.runtime.kernels.attention import scaled_dot_product_attention
from graphq.runtime.kernels.choice import KERNELS, Choice, Kernel, Limit, choose, features, integer_kernel, using
from graphq.runtime.kernels.expand import expanded_experts, expanded_linear
from graphq.runtime.kernels.offsets import bounds
from graphq.runtime.kernels.quantize import quantized_rows
from graphq.runtime.kernels.rows import Rows, is_integer, is_supported, part_of, rows_of, stacked_rows
from graphq.runtime.kernels.tiles import Product, group_sums, tile, untile
from graphq.runtime.kernels.watched import is_traced, is_transformed, is_watched

__all__ = [
    "KERNELS",
    "Choice",
    "Kernel",
    "Limit",
    "Product",
    "Rows",
    "bounds",
    "choose",
    "expanded_experts",
    "expanded_linear",
    "features",
    "group_sums",
    "integer_kernel",
    "is_integer",
    "is_supported",
    "is_traced",
    "is_transformed",
    "is_watched",
    "part_of",
    "quantized_rows",
    "rows_of",
    "scaled_dot_product_attention",
    "stacked_rows",
    "tile",
    "untile",
    "using",
]
