"""Capture of any module from example inputs, as one functional graph with flat tensors in and out."""

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphq.capture.arguments import caller, named_inputs
from graphq.capture.export import FlatModel, export_flat
from graphq.capture.export_errors import SpecializedError
from graphq.capture.proof import prove, resized
from graphq.capture.sizes import MAX_SIZE, fixed_sizes
from graphq.capture.source import BATCH, KEY, SEQUENCE, Source, TensorInput, source_of
from graphq.capture.token_axes import has_tokens, problem_of, token_axes
from graphq.errors import GraphError, PassError, SpecError

Call = Callable[[nn.Module, dict[str, Tensor]], Any]  # the model, given its inputs by name


def capture_module(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
    check: bool = False,
) -> fx.GraphModule:
    """The graph of any module, from example inputs (a tensor, a tuple, or a dict by argument name).

    ``cache=False``: transformers models, and those in the module, are asked for no cache.

    The first dimension of every input is the dynamic ``batch``; the second dimension of ``[batch, n]`` integer and
    ``[batch, n, features]`` inputs is the dynamic ``sequence`` where the model allows it; a note says where not, and
    where its code bounds a dimension. ``shapes`` fixes dimensions by name, at their sizes in the examples; inputs that
    do not begin with a fixed batch have none.
    ``mask`` names the input ``[batch, tokens]`` that is 1 where a token counts and 0 where it is padding; with it,
    ``sequence`` is the dimension of an input that is as large as the mask (``token_axes``). ``check``: the graph is run
    beside the model, and is refused where it gives something else.
    Raises ``GraphError`` for inputs or outputs that are not tensors, a batch that the model fixes and ``shapes`` does
    not, and untraceable code; ``SpecError`` for other sizes than the examples', and for a mask that is none: one of
    other numbers, or of the tokens of no input.
    """
    model = unwrapped(model)
    named, structures = named_inputs(model, inputs)
    _check_mask(mask, named)
    left_out = cache and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    cache = cache and not left_out  # its cache is an object that no graph gives back
    call = caller(model, structures, {} if cache else _no_cache(model, named))
    with contextlib.nullcontext() if cache else _without_cache(model):
        gm = _capture(model, named, call, mask, {} if shapes is None else shapes)
        proved = _proved(gm, model, named, call) if check else ()
    _check_examples(gm, model, named, caller(model, structures, {}))
    source: Source = gm.meta[KEY]
    undeclared = () if mask else (name for name, x in named.items() if name.endswith("mask") and x.dim() == 2)
    notes = [
        f"{name}: is not declared as the mask of padding: all tokens calibrate (compile takes mask={name!r})"
        for name in undeclared
    ]
    size = {one.name: one.shape for one in source.inputs}[mask][1] if mask else None
    square = [one.name for one in source.inputs if isinstance(size, int) and one.shape[1:] == (size, size)]
    notes += proved
    notes += [f"{type(model).__name__}: its key/value cache is left out"] * left_out
    notes += [
        f"{name}: dimensions 1 and 2 are as large as {mask}: dimension 1 is taken for its tokens" for name in square
    ]
    gm.meta[KEY] = replace(source, mask=mask, notes=(*source.notes, *notes))
    return gm


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Generator[None]:
    """The configurations in the model say that no cache is used."""
    found = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")}
    before = [(config, cast(Any, config).use_cache) for config in found.values()]
    for config, _ in before:
        cast(Any, config).use_cache = False
    try:
        yield
    finally:
        for config, own in before:
            cast(Any, config).use_cache = own


def _no_cache(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """The argument by which the model's caller says so, where it has one."""
    taken = "use_cache" in inspect.signature(model.forward).parameters and "use_cache" not in named
    return {"use_cache": False} if taken else {}


def _check_mask(mask: str | None, named: Mapping[str, Tensor]) -> None:
    if mask is None:
        return
    if mask not in named:
        raise SpecError(f"mask: the model has no input {mask}; it takes {', '.join(named)}")
    given = named[mask]
    if given.dim() != 2:
        raise SpecError(f"mask: {mask} has shape {tuple(given.shape)}; a mask of tokens is (batch, tokens)")
    if not token_axes(_declared(named, {}), mask):
        others = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items() if name != mask)
        raise SpecError(
            f"mask: no input has the {given.shape[1]} tokens of {mask} {tuple(given.shape)}; there"
            f" {f'are {others}' if others else 'is no other'}"
        )
    if not (given.is_meta or isinstance(given, FakeTensor)) and (problem := problem_of(given)):
        raise SpecError(f"mask: {mask} {problem}")


def _declared(
    named: Mapping[str, Tensor], fixed: Mapping[str, int], tokens: Mapping[str, int] | None = None
) -> tuple[TensorInput, ...]:
    """The inputs, with a named batch and a named size of the axes ``tokens``, the others as in the examples.

    The first axis is the batch, unless the batch is ``fixed`` at another size.
    """
    axes = {} if tokens is None else tokens
    return tuple(
        TensorInput(
            name,
            x.dtype,
            tuple(
                BATCH if axis == 0 and size == fixed.get(BATCH, size) else SEQUENCE if axis == axes.get(name) else size
                for axis, size in enumerate(x.shape)
            ),
        )
        for name, x in named.items()
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` or a data-parallel module was given, whose names are the user's."""
    while True:
        inner = dict(model.named_children()).get("_orig_mod")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif type(model).__name__ != "OptimizedModule":
            return model
        if inner is None:
            return model
        model = inner


def _check_examples(
    gm: fx.GraphModule,
    model: nn.Module,
    named: Mapping[str, Tensor],
    call: Call,
) -> None:
    """Raises ``GraphError`` if the model cannot be run on the examples: export looks at few dtypes and no values.

    Raises ``PassError`` if the graph alone cannot.
    """
    if any(isinstance(x, FakeTensor) for x in (*named.values(), *gm.state_dict(keep_vars=True).values())):
        return
    try:
        with torch.no_grad():
            gm.forward(*named.values())
    except Exception as error:  # whatever the ops say
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if _runs(model, named, call):
            raise PassError(f"capture: the graph of {type(model).__name__} fails where it does not: {first}") from error
        raise GraphError(f"inputs: {type(model).__name__} fails on the examples: {first}") from error


def _proved(gm: fx.GraphModule, model: nn.Module, named: Mapping[str, Tensor], call: Call) -> tuple[str, ...]:
    """Notes on what could not be compared of the graph and the model, on the examples and at other sizes."""
    examples = list(named.values())
    other = None if any(x.is_meta for x in examples) else resized(source_of(gm), examples)
    return prove(gm, FlatModel(model, tuple(named), call), [examples, *([] if other is None else [other])])


def _runs(model: nn.Module, named: Mapping[str, Tensor], call: Call) -> bool:
    with contextlib.suppress(Exception), torch.no_grad():  # whatever its code raises
        call(model, dict(named))
        return True
    return False


def _capture(
    model: nn.Module,
    named: dict[str, Tensor],
    call: Call,
    mask: str | None,
    shapes: Mapping[str, int],
) -> fx.GraphModule:
    """The graph, with inputs in the order of ``named``, of what ``call`` makes of them."""
    tokens = {one.name: 1 for one in _declared(named, shapes) if has_tokens(one) and one.shape[0] == BATCH}
    if mask is not None:
        tokens |= {mask: 1} | token_axes(_declared(named, shapes), mask)
    fixed = _fixed(named, tokens, shapes)
    sequence_sizes = {named[name].shape[axis] for name, axis in tokens.items()}
    with_sequence = SEQUENCE in fixed or (len(sequence_sizes) == 1 and sequence_sizes != {1})
    batch_sizes = {x.shape[0] for x in named.values() if x.dim()}
    if len(batch_sizes) > 1 and BATCH not in fixed:
        sizes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        batch = next(x.shape[0] for x in named.values() if x.dim())
        raise GraphError(
            f"inputs: the first dimensions differ ({sizes}); every input starts with the batch, unless it is fixed:"
            f" {_declaration(batch)}"
        )
    # Export would take a batch of 1 for a constant, and one tensor given twice for one.
    copies = 2 if batch_sizes == {1} and BATCH not in fixed else 1
    given = {name: torch.cat([x] * copies) if x.dim() else x.clone() for name, x in named.items()}

    flat = FlatModel(model, tuple(given), call)
    plain = _declared(given, fixed)
    try:
        if with_sequence:
            try:
                return export_flat(flat, _declared(given, fixed, tokens), tuple(given.values()), fixed=fixed)
            except SpecializedError as error:
                gm = export_flat(flat, plain, tuple(given.values()), fixed=fixed)
                source: Source = gm.meta[KEY]
                axes = " and ".join(str(axis) for axis in sorted(set(tokens.values())))
                note = f"dimension {axes} of the inputs is fixed: {error}"
                gm.meta[KEY] = replace(source, notes=(*source.notes, note))
                return gm
        return export_flat(flat, plain, tuple(given.values()), fixed=fixed)
    except SpecializedError as error:
        if not batch_sizes:
            raise
        raise SpecializedError(f"{error}; {_declaration(min(batch_sizes))}") from error
    except GraphError as error:
        if copies == 1 or _runs(model, given, call) or not _runs(model, named, call):
            raise
        raise GraphError(f"{error}; it takes a batch of 1 and none of 2: {_declaration(1)}") from error


def _declaration(batch: int) -> str:
    return f'declare its one size with shapes={{"batch": {batch}}}'


def _fixed(named: Mapping[str, Tensor], tokens: Mapping[str, int], shapes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of the dimensions that the caller fixes. Raises ``SpecError`` for others than those of the examples."""
    names = [BATCH, *([SEQUENCE] if tokens else [])]
    fixed, problems = fixed_sizes(shapes, [(name, 1, MAX_SIZE) for name in names])
    found = {
        BATCH: {x.shape[0] for x in named.values() if x.dim()},
        SEQUENCE: {named[name].shape[axis] for name, axis in tokens.items()},
    }
    sizes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    problems += [
        f"shapes: {name}: {size}: the example inputs are of another size ({sizes})"
        for name, size in fixed.items()
        if size not in found[name] or (name == SEQUENCE and len(found[name]) > 1)
    ]
    if problems:
        raise SpecError(problems)
    return fixed
