"""``torch.export`` of a model with flat inputs, as a functional graph with parameters under their own names.

Non-strict; composite ops such as ``aten.linear`` stay whole. Guards are proved from the declared dimensions or refused.
Parameters are ``get_attr`` nodes whose target is the state-dict key; constants get buffers of their own.
"""

import contextlib
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.printers import PythonPrinter

from graphq.capture.changes import fills, refuse_changes
from graphq.capture.export_errors import SpecializedError, explain
from graphq.capture.guards import unproved
from graphq.capture.names import check_names
from graphq.capture.sizes import MAX_SIZE, bounds_of, table_limits, total_limit
from graphq.capture.source import KEY, PAST, SEQUENCE, TOTAL, Source, TensorInput, source_of
from graphq.capture.structure import Structure, flatten, kind_of, leaves
from graphq.errors import GraphError
from graphq.state import put_input, put_tensor, tensor_of

_LOGGERS: Final = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
_ASSERT: Final = torch.ops.aten._assert_scalar.default
_METADATA: Final = torch.ops.aten._assert_tensor_metadata.default
MINIMUM: Final = {"past_sequence": 0}  # of the others: 1


class FlatModel(nn.Module):
    """``model`` with flat tensors in and a flat tuple of tensors out.

    ``call`` maps the model and the inputs by name to the outputs; it is the one place that knows the model's calling
    convention. ``structure`` is what the last call returned.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], call: Callable[[nn.Module, dict[str, Tensor]], Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.call = call
        returned: list[Structure] = []
        # Export restores the attributes, lists included, of the module it traced; a closure it leaves alone.
        self.record = returned.append
        self.structure = lambda: returned[-1]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.call(self.model, dict(zip(self.names, tensors, strict=True)))
        name = type(self.model).__name__
        structure, named = flatten(result, name)
        if not named:
            raise GraphError(f"{name} returns a {type(result).__name__} without a tensor; outputs must be tensors")
        self.record(structure)
        return tuple(named.values())


def export_flat(
    flat: FlatModel,
    inputs: Sequence[TensorInput],
    samples: Sequence[Tensor],
    limits: Mapping[str, int] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> fx.GraphModule:
    """The graph of ``flat`` with ``inputs`` declared; ``samples`` have sizes of at least 2 in dynamic dimensions.

    ``limits`` are the largest sizes of dimensions that are known to be bounded, ``fixed`` the sizes of those that are
    not dynamic. What the model's code asks for beyond that bounds a dimension, with a note, where it can; otherwise it
    is a ``SpecializedError``.
    """
    check_names(flat.model)
    names = sorted({d for i in inputs for d in i.shape if isinstance(d, str) and d != TOTAL})
    ranges = {d: (MINIMUM.get(d, 1), (limits or {}).get(d, MAX_SIZE)) for d in names}
    ranges |= {d: (size, size) for d, size in (fixed or {}).items() if d in ranges}
    notes: list[str] = []
    shapes = [i.shape for i in inputs]
    deferred = False
    while True:
        try:
            gm = _export(flat, inputs, samples, ranges, deferred)
            break
        except SpecializedError as error:
            if error.guard is not None and not deferred and not unproved([error.guard], shapes, ranges):
                deferred = True  # a condition that always holds, of which export makes a constant where it may not ask
                continue
            before = ranges.get(error.dimension or "")
            bounds = error.bounds
            if before is not None and (error.guard or "").endswith(f" != {before[1]}"):
                bounds = (before[0], before[1] - 1)  # the largest size alone, at which a slice is the whole table
            if before is None or bounds is None:
                raise
            after = (max(before[0], bounds[0]), min(before[1], bounds[1]))
            if after == before:
                raise
            ranges[str(error.dimension)] = after
            notes.append(f"{error.dimension} is {after[0]} to {after[1]:,}: {error}")
    for name, limit in table_limits(gm, ranges).items():
        ranges[name] = (ranges[name][0], limit)
        notes.append(f"{name} is {ranges[name][0]} to {limit:,}: {type(flat.model).__name__} has no more positions")
    source = source_of(gm)
    gm.meta[KEY] = replace(
        source,
        ranges=(*((d, low, high) for d, (low, high) in ranges.items()), *source.ranges),
        notes=(*source.notes, *notes, *(f"{d} is {low} to {high:,}" for d, low, high in source.ranges)),
    )
    return gm


def _export(
    flat: FlatModel,
    inputs: Sequence[TensorInput],
    samples: Sequence[Tensor],
    ranges: Mapping[str, tuple[int, int]],
    deferred: bool,
) -> fx.GraphModule:
    """The graph for all sizes in ``ranges``. Raises ``SpecializedError`` if there is none.

    ``deferred``: export asserts conditions on sizes in the graph instead of deciding by them; they are proved here.
    """
    shapes = dynamic_shapes(inputs, ranges)
    with evaluating(flat), torch.no_grad(), _quiet(), lean_export():
        try:
            exported = torch.export.export(
                flat,
                tuple(samples),
                dynamic_shapes=(shapes,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=deferred,
            )
            if any(_changes_in_place(node) for node in exported.graph.nodes):
                exported = exported.run_decompositions({})  # functionalizes; costs as much as tracing did
        except GraphError:
            raise
        except Exception as error:  # export raises many types; each becomes one line that names the user's code
            raise explain(error, flat.model, flat.names) from error
    refuse_changes(exported, flat.model, flat.names)
    found = [*_guards_of(exported), *(_asserted(exported, inputs) if deferred else [])]
    longest, guards = total_limit(unproved(found, [i.shape for i in inputs], ranges))
    if guards:
        message = f"{type(flat.model).__name__} restricts its input sizes: {'; '.join(guards)}"
        dimension = next((d for d in ranges if re.search(rf"\b{d}\b", guards[0])), None)
        raise SpecializedError(message, dimension, bounds_of(guards[0]) if len(guards) == 1 else None)
    gm = _own_graph(exported, inputs, without=(_ASSERT,) if deferred else ())
    _name_tied(gm, flat.model)
    state = {name for name, _ in [*flat.model.named_parameters(), *flat.model.named_buffers()]}
    dtypes = [p.dtype for p in flat.model.parameters() if p.is_floating_point()]
    structure = flat.structure()
    output_kind = kind_of(structure)
    gm.meta[KEY] = Source(
        inputs=tuple(inputs),
        outputs=leaves(structure),
        output_kind=output_kind,
        structure=structure if output_kind == "structured" else None,
        dtype=max(set(dtypes), key=dtypes.count) if dtypes else torch.float32,
        blocks=block_lists(flat.model),
        ranges=() if longest is None else ((TOTAL, 1, longest),),
        notes=tuple(
            f"{name} has no role in the captured computation"
            for name in sorted(state - {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"})
            if name in dict(flat.model.named_parameters(remove_duplicate=False))
        ),
    )
    return gm


def _changes_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable  # pyright: ignore[reportPrivateUsage]


def dynamic_shapes(inputs: Sequence[TensorInput], ranges: Mapping[str, tuple[int, int]]) -> tuple[dict[int, Any], ...]:
    """The dynamic dimensions of each input, as ``torch.export`` takes them; those of one size are not."""
    dims: dict[str, Any] = {
        d: Dim(d, min=low, max=high) for d, (low, high) in ranges.items() if low < high and d != TOTAL
    }
    # A sum of two dimensions cannot be declared; the guard it leaves is checked like every other.
    dims |= {TOTAL: Dim.DYNAMIC} if {PAST, SEQUENCE} & dims.keys() else {}
    return tuple({axis: dims[d] for axis, d in enumerate(i.shape) if isinstance(d, str) and d in dims} for i in inputs)


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
def evaluating(model: nn.Module) -> Generator[None]:
    """Inside, no module of the model trains."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _alike(modules: nn.ModuleList) -> bool:
    """Whether all are of one class, or their classes have a base of their own: hybrids mix two kinds of layers."""
    classes = [type(module) for module in modules]
    shared = set(classes[0].__mro__).intersection(*(cls.__mro__ for cls in classes))
    own = [cls for cls in shared if issubclass(cls, nn.Module) and not cls.__module__.startswith("torch.")]
    return len(set(classes)) == 1 or (bool(own) and all(cls.__name__ != "PreTrainedModel" for cls in own))


def block_lists(model: nn.Module) -> tuple[str, ...]:
    """Paths of the outermost lists of repeated blocks: ``ModuleList``s of like modules that hold modules."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if len(module) and _alike(module) and all(next(child.children(), None) is not None for child in module):
            lists.append(name)
    return tuple(lists)


def _asserted(exported: ExportedProgram, inputs: Sequence[TensorInput]) -> list[str]:
    """What the graph asserts of its inputs' sizes, in terms of the declared dimensions."""
    nodes = {node.name: node for node in exported.graph.nodes}
    names: dict[str, str] = {}
    for name, declared in zip(exported.graph_signature.user_inputs, inputs, strict=True):
        for size, dimension in zip(nodes[str(name)].meta["val"].shape, declared.shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(dimension, str):
                names.setdefault(str(size.node.expr), dimension)
    conditions = [node.args[0].meta["val"] for node in exported.graph.nodes if node.target is _ASSERT]
    texts = [PythonPrinter().doprint(condition.node.expr) for condition in conditions]
    return [re.sub(r"\b[su]\d+\b", lambda found: f"({names.get(found[0], found[0])})", text) for text in texts]


def _own_graph(
    exported: ExportedProgram, inputs: Sequence[TensorInput], without: Collection[OpOverload]
) -> fx.GraphModule:
    """A fresh ``GraphModule`` that shares the exported one's tensors under the source's own names.

    Nodes of the ops ``without``, which give nothing, are left out.
    """
    unlifted = exported.module(check_guards=False)
    graph, state = fx.Graph(), nn.Module()
    new: dict[fx.Node, fx.Node] = {}
    given = [node for node in unlifted.graph.nodes if node.op == "placeholder"]
    for node, declared in zip(given, inputs, strict=True):
        new[node] = put_input(graph, declared.name)
    for node in unlifted.graph.nodes:
        if node.target in without or node.op == "call_module" or node.target is _METADATA:
            continue  # guards, proved above, and restatements of what ``val`` says
        if node.target is torch.ops.aten.copy_.default:
            continue  # into a buffer that the next call fills before it reads it
        if node.target is torch.ops.aten.copy.default and fills(node, cast(fx.Node, node.args[0])):
            new[node] = new[cast(fx.Node, node.args[1])]
            continue
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
            path = f"{list(stack.values())[-1][0]}."
            owners = {n: n.rpartition(".")[0] for n in tied[node.target] if path.startswith(f"{n.rpartition('.')[0]}.")}
            # The innermost of the modules that own it: a parametrization reads what its layer owns.
            own = max(owners, key=lambda n: (len(owners[n]), n == node.target), default=node.target)
            if own == node.target:
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
