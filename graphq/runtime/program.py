"""A graph as one straight Python function: an op costs its own work and one call.

The code that ``torch.fx`` writes for a graph looks up every op, module and tensor by its path, and calls ops by their
schema: 2 to 3 microseconds each, which is most of a small model's step. Here ops are names of the function, in the form
that torch's Python interface calls fastest; formats are parsed, and scales chosen, once (``graphq.runtime.rows``).
Modules and tensors are still found by their names at each call, so that ``to``, ``load_state_dict`` and hooks do what
they do elsewhere.
"""

import keyword
import linecache
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any, Final, Protocol, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import OpOverload

from graphq.capture.source import Source
from graphq.runtime import kernels, ops
from graphq.runtime.region_call import RegionCall
from graphq.runtime.regions import Region, ordered, regions
from graphq.runtime.rows import quantizer

aten: Any = torch.ops.aten
_ALIKE: Final[Mapping[object, Callable[..., Any]]] = {  # the same op by the same arguments, parsed by generated code
    aten.add.Tensor: torch.add,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.clone.default: torch.clone,
    aten.cos.default: torch.cos,
    aten.div.Tensor: torch.div,
    aten.embedding.default: torch.embedding,
    aten.exp.default: torch.exp,
    aten.expand.default: Tensor.expand,
    aten.gelu.default: F.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: F.linear,
    aten.matmul.default: torch.matmul,
    aten.mean.dim: torch.mean,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.roll.default: torch.roll,
    aten.rsqrt.default: torch.rsqrt,
    aten.scaled_dot_product_attention.default: kernels.scaled_dot_product_attention,
    aten.select.int: torch.select,
    aten.sigmoid.default: torch.sigmoid,
    aten.silu.default: cast(Any, torch)._C._nn.silu,
    aten.sin.default: torch.sin,
    aten.sub.Tensor: torch.sub,
    aten.tanh.default: torch.tanh,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: Tensor.view,
}
_NUMBERS: Final = (aten.sym_size.int, aten._local_scalar_dense.default, aten.item.default)
_FILE: Final = "<graphq.program {}>"
_numbers: Final = count()


class Append(Protocol):
    """What a cache with the new keys or values behind those that it held is."""

    def __call__(self, place: int, past: Tensor, new: Tensor, axis: int) -> Tensor:
        """``place``: which of the graph's caches, from 0."""
        ...


def concatenated(place: int, past: Tensor, new: Tensor, axis: int) -> Tensor:
    """Both in a new tensor."""
    return torch.cat([past, new], axis)


@final
class Program:
    """The code of a graph. Calling it takes the graph's inputs and gives its outputs, as calling the graph does.

    ``source``: with it, caches that the graph only appends to go through ``append``. ``is_of`` says whether the graph
    has been changed since.
    """

    def __init__(self, graph: fx.GraphModule, source: Source | None = None) -> None:
        self._code = graph.code
        self._root = graph
        self.appended = {} if source is None else appended(graph, source)
        self.code, constants = _Writer(graph, self.appended).written()
        name = _FILE.format(next(_numbers))
        exec(compile(self.code, name, "exec"), constants)  # noqa: S102 - of names that are its own
        self._run: Callable[..., tuple[Tensor, ...]] = constants["run"]
        linecache.cache[name] = (len(self.code), None, self.code.splitlines(keepends=True), name)
        weakref.finalize(self, linecache.cache.pop, name, None)

    def __call__(self, *inputs: Tensor, append: Append = concatenated) -> tuple[Tensor, ...]:
        return self._run(self._root, append, *inputs)

    def is_of(self, graph: fx.GraphModule) -> bool:
        """Whether it is the code of this graph as it is now."""
        return graph is self._root and graph.code is self._code


def line_of(file: str, line: int) -> str | None:
    """What a line of a program computes, None for a line of other code."""
    return linecache.getline(file, line).partition("# ")[2].strip() if file.startswith(_FILE[:-3]) else None


def appended(graph: fx.GraphModule, source: Source) -> dict[fx.Node, tuple[int, int]]:
    """The nodes that put new keys or values behind a cache, with its place among the source's caches and the axis.

    Nothing else may read the cache but its sizes.
    """
    taken = dict(zip((i.name for i in source.inputs), graph.graph.find_nodes(op="placeholder"), strict=True))
    given = dict(zip(source.outputs, cast(Any, graph.graph.output_node().args[0]), strict=True))
    found: dict[fx.Node, tuple[int, int]] = {}
    for place, pair in enumerate(source.caches):
        past, present = taken[pair.past], cast(fx.Node, given[pair.present])
        others = [user for user in past.users if user != present and user.target != aten.sym_size.int]
        match present.target, present.args:
            case aten.cat.default, ((first, fx.Node()), int() as axis) | ([first, fx.Node()], int() as axis):
                if first == past and not others and present.args[0][1] != past:
                    found[present] = (place, axis)
            case _:
                pass
    return found


@final
class _Writer:
    """Writes the code of a graph, a line for each node, and collects what it calls."""

    def __init__(self, graph: fx.GraphModule, appended: Mapping[fx.Node, tuple[int, int]]) -> None:
        self.graph = graph
        self.appended = appended
        self.names: dict[fx.Node, str] = {}
        self.constants: dict[str, Any] = {}
        self.known: dict[object, str] = {}
        self.modules: dict[str, str] = {"": "root"}
        self.lookups: list[str] = []
        self.lines: list[str] = []
        self.functions: dict[Region, str] = {}
        self.quantized = _quantized(graph)
        self.made: set[fx.Node] = set(graph.graph.find_nodes(op="placeholder"))

    def written(self) -> tuple[str, dict[str, Any]]:
        """The code, which defines ``run``, and its global names."""
        nodes = list(self.graph.graph.nodes)
        for number, node in enumerate(nodes):
            self.names[node] = f"v{number}"
        found = regions(self.graph) if kernels.features() else []
        functions = [self.function(region) for region in found]
        self.body(ordered(self.graph, found))
        inputs = [self.names[n] for n in nodes if n.op == "placeholder"]
        run = [f"def run({', '.join(['root', 'append', *inputs])}):", *self.lookups, *self.lines]
        return "".join("\n    ".join(lines) + "\n" for lines in (*functions, run)), self.constants

    def function(self, region: Region) -> list[str]:
        """The lines of a region op by op, a function of its modules and its inputs."""
        self.functions[region] = f"ops{len(self.functions)}"
        modules, made = self.modules, self.made
        self.modules = {path: f"m{place}" for place, path in enumerate(region.modules)}
        self.made, self.lines = set(region.inputs), []
        self.body(region.nodes, region.outputs)
        arguments = [*self.modules.values(), *(self.names[n] for n in region.inputs)]
        head = f"def {self.functions[region]}({', '.join(arguments)}):"
        lines = [head, *self.lines, f"return {self.tuple(region.outputs)}"]
        self.modules, self.made, self.lines = modules, made, []
        return lines

    def body(self, items: Sequence[fx.Node | Region], kept: Sequence[fx.Node] = ()) -> None:
        """The lines of nodes and regions; what no line reads any more is let go, but for what is ``kept``."""
        last: dict[fx.Node, fx.Node | Region] = {}
        for item in items:
            is_region = isinstance(item, Region)
            last |= dict.fromkeys((*item.outputs, *item.inputs) if is_region else (item, *item.all_input_nodes), item)
        ends: dict[fx.Node | Region, list[fx.Node]] = {}
        for node, end in last.items():
            ends.setdefault(end, []).append(node)
        for item in items:
            if isinstance(item, fx.Node) and item.op == "placeholder":
                continue
            if isinstance(item, Region):
                self.call(item)
            else:
                self.write(item)
            dead = [self.names[n] for n in ends.get(item, ()) if n in self.made and n not in kept]
            if dead and not (isinstance(item, fx.Node) and item.op == "output"):
                self.lines.append(f"del {', '.join(dead)}")

    def call(self, region: Region) -> None:
        """The line of a region."""
        names = ", ".join(self.names[n] for n in region.outputs)
        modules = "".join(f"{self.module(path)}, " for path in region.modules)
        call = (
            f"{self.constant(RegionCall(region))}({self.functions[region]}, ({modules}), {self.tuple(region.inputs)})"
        )
        self.lines.append(f"{names}, = {call}  # {_printable(f'{region.nodes[0].name} to {region.nodes[-1].name}')}")
        self.made.update(region.outputs)

    def tuple(self, nodes: Sequence[fx.Node]) -> str:
        return f"({''.join(f'{self.names[n]}, ' for n in nodes)})"

    def write(self, node: fx.Node) -> None:
        """The line of a node."""
        if node.op == "output":
            self.lines.append(f"return ({''.join(f'{self.value(a)}, ' for a in cast(Any, node.args[0]))})")
            return
        if node in self.made:
            return
        made = self.quantized.get(node, [node])
        self.made.update(made)
        names = ", ".join(self.names[n] for n in made)
        # A file's own words stand in quotes, or in a comment that nothing in them can end.
        self.lines.append(f"{names} = {self.expression(node)}  # {_printable(f'{node.name}: {node.target}')}")

    def expression(self, node: fx.Node) -> str:
        """What a node computes."""
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            is_plain = name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
            return f"{self.module(path)}.{name}" if is_plain else f"getattr({self.module(path)}, {name!r})"
        if node.op == "call_module":
            return f"{self.module(str(node.target))}({self.arguments(node.args, node.kwargs)})"
        assert node.op == "call_function", "captured graphs have no others"
        if node in self.appended:
            place, axis = self.appended[node]
            past, new = cast(Any, node.args[0])
            return f"append({place}, {self.value(past)}, {self.value(new)}, {axis})"
        if node in self.quantized:
            x, format, block = node.args[:3]
            made = quantizer(cast(str, format), cast(Sequence[int], block))
            return f"{self.constant(made)}({self.value(x)})"
        if node.target == operator.getitem and not node.kwargs:
            return f"{self.value(node.args[0])}[{self.value(node.args[1])}]"
        args = node.args
        target: Any = node.target
        if target in ops.REFERENCES:
            target = ops.REFERENCES[target]
        elif isinstance(target, OpOverload):
            alike = _ALIKE.get(target) if _is_tensor(args[0] if args else None) else None
            target = alike or cast(Any, target)._op
        return f"{self.constant(target)}({self.arguments(args, node.kwargs)})"

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        return ", ".join([*map(self.value, args), *(f"{k}={self.value(v)}" for k, v in kwargs.items())])

    def value(self, value: Any) -> str:
        match value:
            case fx.Node():
                return self.names[value]
            case list():
                return f"[{', '.join(map(self.value, cast(list[Any], value)))}]"
            case tuple():
                return f"({''.join(f'{self.value(v)}, ' for v in cast(tuple[Any, ...], value))})"
            case bool() | int() | None:
                return repr(value)
            case _:
                return self.constant(value)

    def constant(self, value: Any) -> str:
        """A global name that ``value`` has."""
        name = self.known.setdefault((type(value), id(value)), f"c{len(self.known)}")
        self.constants[name] = value  # which keeps its id its own
        return name

    def module(self, path: str) -> str:
        """The name of the module at ``path``, which is looked up once a call."""
        if path not in self.modules:
            parent, _, name = path.rpartition(".")
            above = self.module(parent)
            self.modules[path] = f"m{len(self.modules)}"
            self.lookups.append(f"{self.modules[path]} = {above}._modules[{name!r}]")
        return self.modules[path]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _is_tensor(value: object) -> bool:
    """Whether an argument is a tensor, or a list: of a number an op makes one by its schema alone."""
    if isinstance(value, list | tuple):
        return all(map(_is_tensor, cast(Sequence[object], value)))
    if not isinstance(value, fx.Node):
        return False
    return value.op != "call_function" or (isinstance(value.target, OpOverload) and value.target not in _NUMBERS)


def _quantized(graph: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that choose scales which ``quantizer`` gives together with codes: the nodes of both."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.graph.find_nodes(op="call_function", target=ops.choose_scale):
        if node.kwargs or len(node.args) != 3 or quantizer(*node.args[1:]) is None:
            continue
        x, format, block = node.args
        scales = list(node.users)
        if len(scales) != 1 or scales[0].target != operator.getitem or scales[0].args != (node, 0):
            continue
        wanted = (x, scales[0], None, None, format, block)
        codes = [n for n in scales[0].users if n.target == ops.quantize and n.args == wanted and not n.kwargs]
        if codes:
            found[node] = [scales[0], codes[0]]
    return found
