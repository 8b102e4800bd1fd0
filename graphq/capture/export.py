"""``torch.export`` of a model with flat inputs, as a functional graph with parameters under their own names.

Non-strict; composite ops such as ``aten.linear`` stay whole. Guards are proved from the declared dimensions or refused.
Parameters are ``get_attr`` nodes whose target is the state-dict key; constants get buffers of their own.
"""

import contextlib
import functools
import io
import linecache
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram

from graphq.capture.guards import unproved
from graphq.capture.names import check_names
from graphq.capture.source import KEY, TOTAL, Source, TensorInput
from graphq.errors import GraphError
from graphq.state import put_input, put_tensor, tensor_of

MAX_SIZE: Final = 1 << 20  # the declared upper end of every dynamic dimension
_LOGGERS: Final = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
_OWN_CODE: Final = str(Path(__file__).parents[1])
MINIMUM: Final = {"past_sequence": 0}  # of the others: 1


class FlatModel(nn.Module):
    """``model`` with flat tensors in and a flat tuple of tensors out.

    ``call`` maps the model and the inputs by name to the outputs by name; it is the one place that knows the model's
    calling convention.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], call: Callable[[nn.Module, dict[str, Tensor]], Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.call = call
        structure: list[tuple[Literal["tensor", "tuple", "dict"], tuple[str, ...]]] = []
        # Export restores the attributes, lists included, of the module it traced; a closure it leaves alone.
        self.record = lambda kind, names: structure.append((kind, names))
        self.structure = lambda: structure[-1]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.call(self.model, dict(zip(self.names, tensors, strict=True)))
        if isinstance(result, Tensor):
            self.record("tensor", ("output",))
            return (result,)
        kind: Literal["tuple", "dict"] = "dict"
        if isinstance(result, Mapping):
            named: dict[str, Any] = {}
            for key, value in cast(Mapping[Any, Any], result).items():
                if value is not None and str(key) in named:
                    raise GraphError(f"{type(self.model).__name__}: two outputs are called {key}; rename one")
                if value is not None:
                    named[str(key)] = value
        elif isinstance(result, list | tuple):
            named = {f"output_{i}": v for i, v in enumerate(cast(Sequence[Any], result))}
            kind = "tuple"
        else:
            raise GraphError(f"{type(self.model).__name__} returns {type(result).__name__}; outputs must be tensors")
        for name, value in named.items():
            if not isinstance(value, Tensor):
                is_cache = name == "past_key_values" or type(value).__name__.endswith("Cache")
                hint = "; pass cache=False to leave the cache out" if is_cache else ""
                raise GraphError(
                    f"{type(self.model).__name__}: output {name} is a {type(value).__name__}; outputs must be tensors,"
                    f" or one tuple or dict of tensors{hint}"
                )
        self.record(kind, tuple(named))
        return tuple(named.values())


class SpecializedError(GraphError):
    """A dimension declared dynamic is a constant in the model's code."""


def export_flat(
    flat: FlatModel, inputs: Sequence[TensorInput], samples: Sequence[Tensor], limits: Mapping[str, int] | None = None
) -> fx.GraphModule:
    """The graph of ``flat`` with ``inputs`` declared; ``samples`` have sizes of at least 2 in dynamic dimensions.

    ``limits`` are the largest sizes of dimensions that the model bounds (``MAX_SIZE`` for the others).
    """
    check_names(flat.model)
    names = {d for i in inputs for d in i.shape if isinstance(d, str) and d != TOTAL}
    ranges = {d: (MINIMUM.get(d, 1), (limits or {}).get(d, MAX_SIZE)) for d in sorted(names)}
    shapes = dynamic_shapes(inputs, ranges)
    with _evaluating(flat), torch.no_grad(), _quiet(), lean_export():
        try:
            exported = torch.export.export(flat, tuple(samples), dynamic_shapes=(shapes,), strict=False)
            if any(_changes_in_place(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})  # functionalizes; costs as much as tracing did
        except GraphError:
            raise
        except Exception as error:  # export raises many types; each becomes one line that names the user's code
            raise _explain(error, flat) from error
    _refuse_changes(exported, flat)
    guards = unproved(_guards_of(exported), [i.shape for i in inputs], ranges)
    if guards:
        raise SpecializedError(f"{type(flat.model).__name__} restricts its input sizes: {'; '.join(guards)}")
    gm = _own_graph(exported, inputs)
    _name_tied(gm, flat.model)
    state = {name for name, _ in [*flat.model.named_parameters(), *flat.model.named_buffers()]}
    dtypes = [p.dtype for p in flat.model.parameters() if p.is_floating_point()]
    output_kind, output_names = flat.structure()
    gm.meta[KEY] = Source(
        inputs=tuple(inputs),
        outputs=output_names,
        output_kind=output_kind,
        ranges=tuple((d, low, high) for d, (low, high) in ranges.items()),
        dtype=max(set(dtypes), key=dtypes.count) if dtypes else torch.float32,
        blocks=block_lists(flat.model),
        notes=tuple(
            f"{name} has no role in the captured computation"
            for name in sorted(state - {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"})
            if name in dict(flat.model.named_parameters(remove_duplicate=False))
        ),
    )
    return gm


def _refuse_changes(exported: ExportedProgram, flat: FlatModel) -> None:
    """Raises ``GraphError`` if a call of the model leaves other inputs or other buffers behind."""
    signature = exported.graph_signature
    changed = [name.removeprefix("model.") for name in signature.buffers_to_mutate.values()]
    inputs = list(signature.user_inputs)
    changed += [flat.names[inputs.index(name)] for name in signature.user_inputs_to_mutate.values()]
    if changed:
        names = ", ".join(changed)
        raise GraphError(
            f"{type(flat.model).__name__} changes {names} in place; a graph leaves its inputs and buffers alone"
        )


def _changes_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable  # pyright: ignore[reportPrivateUsage]


def dynamic_shapes(inputs: Sequence[TensorInput], ranges: Mapping[str, tuple[int, int]]) -> tuple[dict[int, Any], ...]:
    """The dynamic dimensions of each input, as ``torch.export`` takes them."""
    dims = {d: Dim(d, min=low, max=high) for d, (low, high) in ranges.items()}
    # A sum of two dimensions cannot be declared; the guard it leaves is checked like every other.
    return tuple(
        {axis: Dim.DYNAMIC if d == TOTAL else dims[d] for axis, d in enumerate(i.shape) if isinstance(d, str)}
        for i in inputs
    )


def _guards_of(exported: ExportedProgram) -> list[str]:
    return list(cast(Any, exported)._guards_code)


@contextlib.contextmanager
def lean_export() -> Generator[None]:
    """Inside, torch's exports leave out two things that take a fifth to a third of their time and change no graph.

    Modes of fake tensors look no result up: with dynamic sizes hits are few, and to check and keep an entry costs as
    much as to compute the result again, however many blocks repeat. The ops of all libraries are listed once, not
    again for each library and each decomposition.
    """
    import torch._dynamo.config
    from torch._export import utils

    exporter = cast(Any, utils)
    list_ops = exporter._materialize_cpp_cia_ops
    exporter._materialize_cpp_cia_ops = functools.cache(list_ops)
    try:
        with cast(Any, torch._dynamo.config).patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        exporter._materialize_cpp_cia_ops = list_ops


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Export's own warnings and logs are held back: what matters in them comes as a ``GraphError``."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        printed = io.StringIO()  # half-made graphs, on both
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def block_lists(model: nn.Module) -> tuple[str, ...]:
    """Paths of the outermost lists of repeated blocks: ``ModuleList``s of one class of modules that hold modules."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            classes = {type(child) for child in module}
            if len(classes) == 1 and all(next(child.children(), None) is not None for child in module):
                lists.append(name)
    return tuple(lists)


def _own_graph(exported: ExportedProgram, inputs: Sequence[TensorInput]) -> fx.GraphModule:
    """A fresh ``GraphModule`` that shares the exported one's tensors under the source's own names."""
    unlifted = exported.module(check_guards=False)
    graph, state = fx.Graph(), nn.Module()
    new: dict[fx.Node, fx.Node] = {}
    given = [node for node in unlifted.graph.nodes if node.op == "placeholder"]
    for node, declared in zip(given, inputs, strict=True):
        new[node] = put_input(graph, declared.name)
    for node in unlifted.graph.nodes:
        if node.op == "call_module" or node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue  # guards, proved above, and restatements of what ``val`` says
        if node.op == "get_attr":
            if not node.users:
                continue
            fqn = str(node.target).removeprefix("model.")
            tensor = tensor_of(unlifted, str(node.target))
            if not str(node.target).startswith("model."):
                fqn = f"constants.{fqn}"
            put_tensor(state, fqn, tensor)
            copied = graph.get_attr(fqn)
        elif node.op == "placeholder":
            copied = new[node]
        elif _is_cast(node):
            x, value = new[cast(fx.Node, node.args[0])], node.meta["val"]
            if value.dtype == x.meta["val"].dtype and value.device == x.meta["val"].device:
                new[node] = x
                continue
            copied = graph.call_function(
                torch.ops.aten._to_copy.default, (x,), {"dtype": value.dtype, "device": value.device}
            )
        else:
            copied = graph.node_copy(node, new.__getitem__)
        copied.meta = {k: v for k, v in node.meta.items() if k in ("val", "nn_module_stack", "stack_trace")}
        if "nn_module_stack" in copied.meta:
            copied.meta["nn_module_stack"] = {
                key: (path.removeprefix("L['self'].").removeprefix("model").removeprefix("."), cls)
                for key, (path, cls) in copied.meta["nn_module_stack"].items()
            }
        new[node] = copied
    gm = fx.GraphModule(state, graph)
    gm.graph.eliminate_dead_code()
    for node in gm.graph.nodes:
        node.meta["val"] = node.meta.get("val", getattr(gm, node.target, None) if node.op == "get_attr" else None)
    gm.recompile()
    return gm


def _is_cast(node: fx.Node) -> bool:
    """Whether a node only changes dtype or device: every spelling of that becomes one, or nothing."""
    name = str(node.target)
    if not name.startswith(("aten.to.", "aten._to_copy.", "aten.type_as.")):
        return False
    return node.kwargs.get("memory_format") in (None, torch.preserve_format)


def _name_tied(gm: fx.GraphModule, model: nn.Module) -> None:
    """Each use of a tied parameter reads it under the name that the using module gives it.

    Export keeps one name for a tensor with several; a layer that is quantized apart needs its own.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    tied = {name: names for names in aliases.values() if len(names) > 1 for name in names}
    for node in list(gm.graph.nodes):
        if node.op != "get_attr" or node.target not in tied:
            continue
        for user in list(node.users):
            stack = user.meta.get("nn_module_stack") or {"": ("", None)}
            own = f"{list(stack.values())[-1][0]}.{node.target.rpartition('.')[2]}"
            if own == node.target or own not in tied[node.target]:
                continue
            if not any(n.op == "get_attr" and n.target == own for n in gm.graph.nodes):
                put_tensor(gm, own, tensor_of(gm, node.target))
                with gm.graph.inserting_before(node):
                    gm.graph.get_attr(own).meta = dict(node.meta)
            named = next(n for n in gm.graph.nodes if n.op == "get_attr" and n.target == own)
            user.replace_input_with(node, named)
        if not node.users:
            gm.graph.erase_node(node)
    gm.recompile()


def _explain(error: Exception, flat: FlatModel) -> GraphError:
    """``error`` in one line, with the layer and the user's own source line where a frame shows them."""
    names = {id(module): name or type(module).__name__ for name, module in flat.model.named_modules()}
    where = f"{type(flat.model).__name__}: "
    for frame, line in traceback.walk_tb(error.__traceback__):  # the innermost frame of a module's own code wins
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if id(owner) in names and not code.co_filename.startswith((torch.__path__[0], _OWN_CODE)):
            source = linecache.getline(code.co_filename, line).strip()
            where = f"{names[id(owner)]} ({code.co_filename}:{line}: {source}): "
    lines = [text.strip() for text in str(error).splitlines() if text.strip()] or [type(error).__name__]
    text = " ".join(lines)
    if found := re.search(r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)", text):
        return SpecializedError(f"{where}the model's code fixes dimension {found[1]} at {found[2]}")
    if found := re.search(
        r"Not all values of (\w+) = .*? satisfy the generated guard (.*?)(?= - |\. The error above|\. ?$|$)", text
    ):
        return SpecializedError(
            f"{where}the model's code restricts dimension {found[1]}: {_plain_sizes(found[2], flat)}"
        )
    if "Constraints violated" in text:
        return SpecializedError(
            f"{where}the model's code restricts a dynamic dimension: {_plain_sizes(lines[1], flat)}"
        )
    if "data-dependent" in lines[0]:
        return GraphError(f"{where}the path taken depends on the values of a tensor, which a graph cannot hold")
    return GraphError(f"{where}cannot be captured: {lines[0]}")


def _plain_sizes(text: str, flat: FlatModel) -> str:
    def size(found: re.Match[str]) -> str:
        return f"size {found[2]} of {flat.names[int(found[1])]}"

    return re.sub(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]", size, text.partition("Suggested fixes")[0].strip())
