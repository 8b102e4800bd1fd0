"""Weights that the files of a model hold as codes: they are read one at a time, as codes or as the numbers that these
stand for.

What a quantized checkpoint means is what its own loaders compute: codes times scales, rounded to the model's dtype.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from graphq import numerics
from graphq.deferred import Deferred, InFile, Joined, Stacked, read_together
from graphq.errors import GraphError, GraphqError
from graphq.numerics import Scales
from graphq.spec.formats import Format, Int, Mx, codes_of, is_asymmetric
from graphq.spec.quant import PerBlock, PerTensor, Quant

COLUMNS: Final = "weight_g_idx"  # the part that says which group each column is in, where groups are not neighbours

Decode = Callable[[Mapping[str, Tensor], Quant], tuple[Tensor, Scales]]


@final
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes. The scales have the codes' rank; ``block`` as in ``graphq.numerics.blocks``."""

    codes: Tensor
    scales: Scales
    block: list[int]


@final
@dataclass(frozen=True, eq=False)
class StoredWeight:
    """The weight ``[N, K]`` of a layer, which files hold as codes.

    layer: its name in the files. format: how they hold it, in their own word. dtype: that which its loaders compute it
        in. parts: its tensors by the ends of their names. decode: codes and scales of these.
    quant, input: how weight and input are quantized; ``decode_input``: what is fixed of the input's scales.
    is_offset: whether the parts, which are read for it, have zero points that ``quant`` does not say.
    in_order: whether its columns were rounded in the order of their activations. group: of layers that it is in, where
        files have names for these.
    nbytes: of the parts in the files.
    """

    layer: str
    format: str
    dtype: torch.dtype
    quant: Quant
    input: Quant | None
    parts: Mapping[str, InFile]
    decode: Decode
    decode_input: Callable[[Mapping[str, Tensor]], Scales | None]
    nbytes: int
    is_offset: Callable[[Mapping[str, InFile]], bool] | None = None
    in_order: bool = False
    group: str = ""

    def read(self) -> QuantizedWeight:
        """Codes and scales. Raises ``GraphError`` naming file and layer for parts that do not fit each other."""
        where = f"{next(iter(self.parts.values())).file}: {self.layer}: {self.format}"
        try:
            codes, scales = self.decode(read_together(self.parts), self.quant)
            block = numerics.weight_block(self.quant.granularity, 2, 0, 1)
            shape = tuple(numerics.scale_shape(codes.shape, block))
        except KeyError as error:
            raise GraphError(f"{where}: has no {error.args[0]}") from error
        except GraphError:  # of a file, which names the tensor
            raise
        except (RuntimeError, IndexError, ValueError, GraphqError) as error:
            raise GraphError(f"{where}: damaged: {error}") from error
        for name, part in (("scales", scales.scale), ("zero points", scales.zero_point)):
            if part is not None and part.shape != shape:
                raise GraphError(
                    f"{where}: {name} {list(part.shape)} of a weight {list(codes.shape)}, not {list(shape)}"
                )
        if not bool(torch.isfinite(scales.scale.float()).all()):
            raise GraphError(f"{where}: a scale is NaN or Inf")
        format = self.quant.format
        if scales.zero_point is not None and self.is_offset is None and not is_asymmetric(format):
            raise GraphError(f"{where}: has zero points, and is symmetric")
        if isinstance(format, Int) and codes.numel():
            lowest, highest = numerics.code_range(format)
            if not lowest <= int(codes.min()) <= int(codes.max()) <= highest:
                raise GraphError(f"{where}: has codes that are not from {lowest} to {highest}")
        return QuantizedWeight(codes, scales, block)

    def numbers(self) -> Tensor:
        """What the codes stand for, as the loaders of the checkpoint compute it, in ``dtype``."""
        made = self.read()
        order = None
        if COLUMNS in self.parts:
            order = torch.argsort(self.parts[COLUMNS].read(), stable=True)
            made = replace(made, codes=made.codes[:, order])
        w = numerics.dequantize(made.codes, made.scales, self.quant.format, made.block).to(self.dtype)
        if order is not None:
            w = w[:, torch.argsort(order)]
        return w

    def grid(self) -> Quant | None:
        """How the weight is quantized, zero points of the parts counted; None where its groups are no neighbours."""
        if COLUMNS in self.parts:
            return None
        format = self.quant.format
        if isinstance(format, Int) and format.symmetric and self.is_offset is not None and self.is_offset(self.parts):
            return replace(self.quant, format=Int(format.bits, False, joint=True))
        return self.quant

    def input_scales(self) -> Scales | None:
        """What is fixed of the input's scales."""
        return self.decode_input(read_together({name: p for name, p in self.parts.items() if name.startswith("input")}))


@final
@dataclass(frozen=True)
class Dequantized(Deferred):
    """A stored weight's numbers in ``dtype``."""

    weight: StoredWeight
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        found = self.weight.numbers()
        if tuple(found.shape) != self.shape:
            raise GraphError(
                f"{self.weight.layer}: the files hold a weight {list(found.shape)}, not {list(self.shape)}"
            )
        return found.to(self.dtype)

    def plain(self) -> Deferred:
        return replace(self, dtype=self.weight.dtype)

    def dtypes(self) -> frozenset[torch.dtype]:
        return frozenset({self.weight.dtype})


def stored_weights(deferred: Deferred | None) -> tuple[StoredWeight | None, ...]:
    """The weight that a matrix is, or the weight of each expert of a stack; None for one that no codes are kept of."""
    match deferred:
        case Dequantized(weight):
            return (weight,)
        case Stacked(parts):
            return tuple(part.weight if isinstance(part, Dequantized) else None for part in parts)
        case _:
            return (None,)


def same_grid(stored: Quant, wanted: Quant) -> bool:
    """Whether codes and scales of a weight that is ``stored`` so are such as ``wanted`` asks for.

    Where scales come from does not matter, but that a format whose scales are powers of two has no others.
    """
    if stored.granularity != wanted.granularity:
        return False
    if isinstance(wanted.format, Int) and wanted.format.power_of_two:
        return stored.format == wanted.format
    return _codes(stored.format) == _codes(wanted.format)


def _codes(format: Format) -> Format:
    return Mx(format.element) if isinstance(format, Mx) else codes_of(format)


def kept_codes(deferred: Deferred, wanted: Quant, block: list[int], scale_dtype: torch.dtype) -> QuantizedWeight | None:
    """The codes that files hold of a weight or of a stack of experts, where they are such as ``wanted`` asks for and
    their scales are numbers of ``scale_dtype``; else None.
    """
    match deferred:
        case Dequantized(weight):
            grid = weight.grid()
            if grid is None or not same_grid(grid, wanted):
                return None
            made = weight.read()
            rounded = numerics.rounded_scales(made.scales, wanted.format, scale_dtype)
            is_stored = rounded is made.scales or torch.equal(rounded.scale, made.scales.scale)
            return replace(made, block=block) if is_stored else None
        case Stacked(parts):
            each = [kept_codes(part, wanted, block[1:], scale_dtype) for part in parts]
            return _joined(each, block, torch.stack)
        case Joined(parts) if not isinstance(wanted.granularity, PerTensor | PerBlock):
            return _joined([kept_codes(part, wanted, block, scale_dtype) for part in parts], block, torch.cat)
        case _:
            return None


def _joined(
    each: list[QuantizedWeight | None], block: list[int], join: Callable[[list[Tensor]], Tensor]
) -> QuantizedWeight | None:
    """Weights one after the other, or stacked; None where one is, or where they have other parts."""
    made = [one for one in each if one is not None]
    if len(made) < len(each) or (join is torch.cat and any(one.scales.global_scale is not None for one in made)):
        return None
    columns = [
        [part for part in parts if part is not None] for parts in zip(*(one.scales for one in made), strict=True)
    ]
    if any(len(column) not in (0, len(made)) for column in columns):
        return None
    scale, zero_point, global_scale = (join(column) if column else None for column in columns)
    assert scale is not None
    return QuantizedWeight(join([one.codes for one in made]), Scales(scale, zero_point, global_scale), block)
