"""Batches of a model's inputs: what the user gives, completed to what the graph takes."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from graphq.capture.sizes import MAX_SIZE
from graphq.capture.source import BATCH, PAST, SEQUENCE, TOTAL, Source, TensorInput
from graphq.data.masks import check_mask
from graphq.errors import GraphqError, SpecError
from graphq.spec.rules import Run

_COUNTED: Final = (BATCH, SEQUENCE)  # of a cache, a first batch has none


def complete(source: Source, batch: object, where: str = "inputs") -> tuple[Tensor, ...]:
    """Every input of the graph, in order, from a tensor (the first input), a tuple, or a dict by name.

    An argument that is a list, tuple or dict of inputs is taken apart. Masks, positions, token types and empty caches
    that were left out are filled in; of a cache of fixed length, the mask hides what is left out. Raises ``SpecError``,
    beginning with ``where``, for unknown and missing inputs, a cache without some of its tensors, wrong types, wrong
    shapes and sizes out of their dimensions' ranges.
    """
    given = _by_name(source, batch, where)
    sizes: dict[str, int] = {}
    alike: dict[object, torch.Size] = {}  # layers' caches are: one look at each is enough
    for wanted in source.inputs:
        value = given.get(wanted.name)
        if value is None:
            continue
        kind = (wanted.shape, wanted.dtype)
        if kind in alike and not value.is_nested and _same(value, wanted.dtype, alike[kind]):
            continue
        given[wanted.name] = _fit(wanted, value, sizes, where)
        alike[kind] = value.shape
        if problem := out_of_range(source, wanted, value.shape):
            raise SpecError(f"{where}: {problem}")
    sizes.setdefault(PAST, source.fixed.get(PAST, 0))
    if SEQUENCE in sizes and TOTAL in sizes and sizes[TOTAL] != sizes[SEQUENCE] + sizes[PAST]:
        raise SpecError(
            f"{where}: {source.mask or 'attention_mask'} covers {sizes[TOTAL]} tokens,"
            f" past_sequence + sequence are {sizes[PAST]} + {sizes[SEQUENCE]}"
        )
    if SEQUENCE in sizes:
        sizes[TOTAL] = sizes[SEQUENCE] + sizes[PAST]
        if sizes[TOTAL] > (longest := source.bounds.get(TOTAL, (0, MAX_SIZE))[1]) < MAX_SIZE:
            raise SpecError(f"{where}: {sizes[TOTAL]} tokens; {TOTAL} is at most {longest} in this graph")
    _check_caches(source, given, sizes, where)
    unwritten = 0 if source.pasts & given.keys() else sizes[PAST]  # of a cache of fixed length, before the first call
    complete: list[Tensor] = []
    first = next(iter(given.values()))
    for wanted in source.inputs:
        value = given.get(wanted.name)
        if value is None:
            value = _default(source, wanted, given, sizes, first.device, where)
            if wanted.name == (source.mask or "attention_mask") and wanted.shape[-1] == TOTAL:
                value[..., :unwritten] = 0
            given[wanted.name] = value
        complete.append(value)
    return tuple(complete)


def _same(x: Tensor, dtype: torch.dtype, shape: torch.Size) -> bool:
    return x.dtype == dtype and x.shape == shape and x.layout == torch.strided


def _by_name(source: Source, batch: object, where: str) -> dict[str, Tensor]:
    names = source.names
    if isinstance(batch, Tensor):
        items: list[tuple[Any, Any]] = [(names[0], batch)]
    elif isinstance(batch, Mapping):
        items = list(cast(Mapping[Any, Any], batch).items())
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        values = cast(Sequence[Any], batch)
        places = arguments(names, values)
        if len(values) > len(places):
            raise SpecError(f"{where}: {len(values)} tensors, the model takes {len(places)}: {', '.join(places)}")
        items = list(zip(places, values, strict=False))
    else:
        raise SpecError(
            f"{where}: a {type(batch).__name__} is not a batch; give a tensor, a tuple or a dict of tensors"
        )
    known = frozenset(names)
    items = [one for name, value in items for one in (_parts(name, value) if name not in known else [(name, value)])]
    if not items:
        raise SpecError(f"{where}: empty; the model takes {', '.join(names)}")
    for name, value in items:
        if name not in known:
            raise SpecError(f"{where}: the model has no input {name}; it takes {', '.join(names)}")
        if not isinstance(value, Tensor):
            raise SpecError(f"{where}: {name} is a {type(value).__name__}, not a tensor")
    return dict(items)


def arguments(names: Sequence[str], values: Sequence[object]) -> list[str]:
    """The names that ``values`` stand for by their positions: of inputs, or of arguments where one of them is a list,
    tuple or dict, which holds several inputs (``features.0`` and ``features.1`` are one argument).
    """
    nested = any(isinstance(value, list | tuple | Mapping) for value in values)
    return list(dict.fromkeys(name.partition(".")[0] for name in names)) if nested else list(names)


def _parts(name: object, value: Any) -> list[tuple[Any, Any]]:
    """The inputs that a list, tuple or dict has, by dotted names."""
    if isinstance(value, Mapping):
        named = cast(Mapping[Any, Any], value).items()
    elif isinstance(value, list | tuple):
        named = enumerate(cast(Sequence[Any], value))
    else:
        return [(name, value)]
    return [one for key, part in named for one in _parts(f"{name}.{key}", part)]


def out_of_range(source: Source, wanted: TensorInput, shape: Sequence[int]) -> str | None:
    """The first size that lies outside of its dimension's range, in words.

    A size of 0 does not where the range begins at 1: many graphs run on an empty batch.
    """
    for name, size in zip(wanted.shape, shape, strict=True):
        low, high = source.bounds.get(str(name), (0, MAX_SIZE))
        if high < MAX_SIZE and low == high != size:
            return f"{wanted.name} has shape {tuple(shape)}; {name} is {low} in this graph"
        if size > high and high < MAX_SIZE:
            return f"{wanted.name} has shape {tuple(shape)}; {name} is at most {high} in this graph"
        if size < low and low > 1:
            return f"{wanted.name} has shape {tuple(shape)}; {name} is at least {low} in this graph"
    return None


def _fit(wanted: TensorInput, value: Tensor, sizes: dict[str, int], where: str) -> Tensor:
    if wanted.dtype.is_floating_point != value.is_floating_point():
        raise SpecError(f"{where}: {wanted.name} is {value.dtype}, the model takes {wanted.dtype}")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise SpecError(f"{where}: {wanted.name} is a tensor of layout {kind}, the model takes dense ones")
    fits = value.dim() == len(wanted.shape) and all(
        size == sizes.setdefault(want, size) if isinstance(want, str) else size == want
        for want, size in zip(wanted.shape, value.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(f"{d} = {sizes[d]}" if isinstance(d, str) and d in sizes else str(d) for d in wanted.shape)
        raise SpecError(f"{where}: {wanted.name} has shape {tuple(value.shape)}, expected ({expected})")
    return value.to(wanted.dtype)


def _check_caches(source: Source, given: Mapping[str, Tensor], sizes: Mapping[str, int], where: str) -> None:
    """Raises ``SpecError`` for a part of the caches, in which zeros would be taken for what tokens left."""
    absent = source.pasts - given.keys()
    missing = [i.name for i in source.inputs if i.name in absent and not (i.is_cache and sizes[PAST] == 0)]
    if missing and source.pasts & given.keys():
        raise SpecError(f"{where}: the cache lacks {', '.join(missing)}; give all of it, or none")


def _default(
    source: Source,
    wanted: TensorInput,
    given: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    device: torch.device,
    where: str,
) -> Tensor:
    def shape() -> list[int]:
        missing = [d for d in wanted.shape if isinstance(d, str) and d not in sizes]
        if missing:
            raise SpecError(f"{where}: {wanted.name} is missing")
        return [sizes[d] if isinstance(d, str) else d for d in wanted.shape]

    mask_name = source.mask or "attention_mask"
    match wanted.name:
        case name if name == mask_name:
            return torch.ones(shape(), dtype=wanted.dtype, device=device)
        case "token_type_ids":
            return torch.zeros(shape(), dtype=wanted.dtype, device=device)
        case "position_ids" if mask_name in given:
            # A padded token has no position of its own; 1 is what transformers' generation gives it.
            mask = given[mask_name]
            return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)[:, -sizes[SEQUENCE] :].to(wanted.dtype)
        case _ if wanted.name in source.pasts:
            return torch.zeros(shape(), dtype=wanted.dtype, device=device)
        case _:
            raise SpecError(
                f"{where}: {wanted.name} is missing; the model takes {', '.join(i.name for i in source.inputs)}"
            )


def first_batches(batches: Iterator[tuple[Tensor, ...]], run: Run) -> Iterator[tuple[Tensor, ...]]:
    """As many batches as the spec asks for. Raises ``SpecError`` at their end where there are fewer."""
    if run.batches is None:
        yield from batches
        return
    taken = 0
    for batch in itertools.islice(batches, run.batches):
        taken += 1
        yield batch
    if taken < run.batches:
        raise SpecError(f"calibration: {taken} batches given; the spec asks for {run.batches}")


def complete_all(source: Source, batches: Iterable[object], where: str = "calibration") -> Iterator[tuple[Tensor, ...]]:
    """``complete`` for each of many batches, which the errors number from 0.

    Raises ``SpecError`` also for batches without rows, tokens or data, and for masks of other numbers than 0 and 1.
    """
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(cast(object, batches), Iterable):
        raise SpecError(f"{where}: a {type(batches).__name__}; give a list of tensors, tuples or dicts")
    for number, batch in enumerate(_read(batches, where)):
        place = f"{where}: batch {number}"
        given = complete(source, batch, place)
        _check_data(source, given, place)
        check_mask(source, given, place)
        yield given


def _check_data(source: Source, batch: tuple[Tensor, ...], where: str) -> None:
    for wanted, value in zip(source.inputs, batch, strict=True):
        if value.is_meta or isinstance(value, FakeTensor):
            raise SpecError(f"{where}: {wanted.name} is on {value.device.type}, it holds no data")
        empty = [want for want, size in zip(wanted.shape, value.shape, strict=True) if want in _COUNTED and not size]
        if empty:
            raise SpecError(f"{where}: {wanted.name} has shape {tuple(value.shape)}: {empty[0]} is 0")


def _read(batches: Iterable[object], where: str) -> Iterator[object]:
    """The batches. An error of the user's own code that gives them is a ``SpecError``."""
    given = iter(batches)
    number = 0
    while True:
        try:
            batch = next(given)
        except StopIteration:
            return
        except GraphqError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise SpecError(f"{where}: batch {number} cannot be read: {type(error).__name__}: {first}") from error
        yield batch
        number += 1


def with_progress(batches: Iterator[tuple[Tensor, ...]], given: Iterable[object]) -> Iterator[tuple[Tensor, ...]]:
    """The same batches, with a bar on the standard error while they are used, if that is a terminal."""
    import sys

    if not sys.stderr.isatty():
        return batches
    from rich.console import Console
    from rich.progress import track

    total = len(cast(Any, given)) if hasattr(given, "__len__") else None
    return iter(track(batches, "calibrating", total=total, console=Console(stderr=True), transient=True))
