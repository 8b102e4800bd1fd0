"""The targets that there are, a row each, and the options that each takes, as its ``emit`` declares them."""

import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Union, cast, final, get_args, get_origin

import torch
from torch import Tensor, fx

from graphq.capture.source import KEY, Source, source_of
from graphq.errors import TargetError
from graphq.lowering.checkpoints.ascend import emit as ascend
from graphq.lowering.checkpoints.ascend.preflight import preflight as ascend_preflight
from graphq.lowering.checkpoints.ascend.read import tensors as ascend_tensors
from graphq.lowering.checkpoints.compressed_tensors.emit import FILES as COMPRESSED_FILES
from graphq.lowering.checkpoints.compressed_tensors.emit import emit as emit_compressed_tensors
from graphq.lowering.checkpoints.compressed_tensors.emit import form as compressed_tensors_form
from graphq.lowering.checkpoints.compressed_tensors.emit import open_checkpoint
from graphq.lowering.checkpoints.compressed_tensors.emit import tensors as compressed_tensors
from graphq.lowering.checkpoints.compressed_tensors.preflight import preflight as compressed_tensors_preflight
from graphq.lowering.onnx.emit import FILES as ONNX_FILES
from graphq.lowering.onnx.emit import emit as emit_onnx
from graphq.lowering.onnx.emit import open_session
from graphq.lowering.onnx.form import onnx_form
from graphq.lowering.onnx.tensors import initializers
from graphq.lowering.torch.module import FILES as TORCH_FILES
from graphq.lowering.torch.module import emit as emit_torch
from graphq.lowering.torch.module import load, stored_tensors
from graphq.spec.rules import Resolved, Spec

_NUMBER: Final = "-?[0-9]{1,18}"


@final
@dataclass(frozen=True)
class Target:
    """What is done for one target.

    emit: writes the QDQ form as an artifact, given the graph, the directory and what the manifest says it was made
        from; gives notes for the report. Its parameters behind these are the target's options, by keyword alone.
    tensors: all tensors of an artifact by name, packed codes unpacked. Raises ``TargetError`` for a damaged one.
    open: what an artifact of this source is called as.
    form: the QDQ form with the codes and scales that the artifact holds, and those names.
    scales: the dtype that scales of a source's weights are stored in, where they are plain numbers.
    preflight: what a spec asks for that an artifact cannot hold, a line each, before weights are read; given the graph,
        the layers' decisions and the spec. Keywords behind these are options of ``emit`` that it depends on.
    reads: whether ``emit`` reads what is deferred itself, one tensor after the other; any other target is given a graph
        that holds all of its tensors.
    files: the files that ``tensors`` and ``open`` read, beside the manifest, of those that there are.
    """

    emit: Callable[..., tuple[str, ...]]
    tensors: Callable[[Path], dict[str, Tensor]]
    open: Callable[[Path, Source], Callable[..., Any]]
    form: Callable[[fx.GraphModule], fx.GraphModule]
    files: tuple[str, ...]
    scales: Callable[[Source], torch.dtype] = lambda source: torch.float32
    preflight: Callable[..., list[str]] = lambda gm, resolved, spec: []
    reads: bool = False


TARGETS: Final[Mapping[str, Target]] = {
    "torch": Target(emit_torch, stored_tensors, lambda path, source: load(path), lambda gm: gm, TORCH_FILES),
    "onnx": Target(emit_onnx, initializers, open_session, onnx_form, ONNX_FILES),
    "compressed-tensors": Target(
        emit_compressed_tensors,
        compressed_tensors,
        open_checkpoint,
        compressed_tensors_form,
        COMPRESSED_FILES,
        lambda source: source.dtype,
        compressed_tensors_preflight,
        reads=True,
    ),
    "ascend": Target(
        ascend.emit,
        ascend_tensors,
        ascend.open_checkpoint,
        ascend.form,
        ascend.FILES,
        lambda source: source.dtype,
        ascend_preflight,
        reads=True,
    ),
}


def target_named(name: str) -> Target:
    """The target of that name. Raises ``TargetError`` where there is none."""
    if name not in TARGETS:
        raise TargetError(f"{name}: no such target; there are {', '.join(TARGETS)}")
    return TARGETS[name]


def options_of(target: str) -> dict[str, Any]:
    """The type of each option by its name. Raises ``TargetError`` for a target that there is not."""
    parameters = inspect.signature(target_named(target).emit).parameters.values()
    return {one.name: one.annotation for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


def prepared(gm: fx.GraphModule, target: str, resolved: Mapping[str, Resolved], spec: Spec, **options: Any) -> None:
    """Scales that are chosen from now on are those that ``target`` stores.

    Raises ``TargetError`` with a line for everything that the spec asks for and the target cannot hold, and for an
    option that neither has.
    """
    if problems := unheld(gm, target, resolved, spec, **options):
        raise TargetError("\n".join(problems))
    gm.meta[KEY] = replace(source_of(gm), scales=target_named(target).scales(source_of(gm)))


def unheld(gm: fx.GraphModule, target: str, resolved: Mapping[str, Resolved], spec: Spec, **options: Any) -> list[str]:
    """A line for everything that the spec asks for and ``target`` cannot hold. Raises ``TargetError`` for an option
    that it has not.
    """
    check_options(target, options)
    preflight = target_named(target).preflight
    known = inspect.signature(preflight).parameters
    problems = preflight(gm, resolved, spec, **{name: one for name, one in options.items() if name in known})
    return [f"{target}: {line}" for line in problems]


def check_options(target: str, options: Mapping[str, object]) -> None:
    """Raises ``TargetError`` for a target or an option that there is not, and for a value of another type."""
    target_named(target)
    for name, value in options.items():
        wanted = _type_of(target, name)
        if not _allows(wanted, value):
            raise TargetError(f"{target}: {name}: {value!r} is not {in_words(wanted)}")


def read_option(target: str, text: str) -> tuple[str, object]:
    """The name and the value of an option written ``name=value``. Raises ``TargetError`` that says what it takes."""
    name, mark, written = text.partition("=")
    if not mark:
        raise TargetError(f"{target}: {text}: write NAME=VALUE; there are {', '.join(options_of(target))}")
    wanted = _type_of(target, name)
    named: dict[str, object] = {"true": True, "false": False, "null": None}
    readings = [named[written]] if written in named else []
    readings += [int(written)] if re.fullmatch(_NUMBER, written) else []
    readings += [dict(pairs)] if (pairs := _pairs(written)) else []
    for value in (*readings, written):
        if _allows(wanted, value):
            return name, value
    raise TargetError(f"{target}: {name}: {written!r} is not {in_words(wanted)}")


def _pairs(text: str) -> list[tuple[str, int]]:
    """The sizes in ``name=size,name=size``; none where it is no such text, or a name is given twice."""
    found = [re.fullmatch(f"([^=]+)=({_NUMBER})", part.strip()) for part in text.split(",")]
    pairs = [(one[1], int(one[2])) for one in found if one]
    return pairs if len(dict(pairs)) == len(found) else []


def read_options(target: str, texts: Iterable[str]) -> dict[str, object]:
    """Options of a target by name, each given once as ``name=value``. Raises ``TargetError``."""
    target_named(target)
    options: dict[str, object] = {}
    for name, value in (read_option(target, text) for text in texts):
        if name in options:
            raise TargetError(f"{target}: {name}: is given twice")
        options[name] = value
    return options


def in_words(wanted: Any) -> str:
    """What an option of this type may be."""
    if get_origin(wanted) in (types.UnionType, Union):
        return " or ".join(in_words(one) for one in get_args(wanted))
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(str, get_args(wanted)))}"
    if get_origin(wanted) is Mapping:
        return "whole numbers by name"
    return {bool: "true or false", int: "a whole number", str: "text", types.NoneType: "null"}[wanted]


def _type_of(target: str, name: str) -> Any:
    known = options_of(target)
    if name not in known:
        raise TargetError(f"{target}: no option {name}; there are {', '.join(known)}")
    return known[name]


def _allows(wanted: Any, value: object) -> bool:
    if get_origin(wanted) in (types.UnionType, Union):
        return any(_allows(one, value) for one in get_args(wanted))
    if get_origin(wanted) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(wanted))
    if get_origin(wanted) is Mapping:
        return isinstance(value, Mapping) and all(
            type(name) is str and type(one) is int for name, one in cast(Mapping[object, object], value).items()
        )
    return type(value) is wanted
