"""Graphs as JSON: what is written is read back, and nothing that a file says runs code."""

import copy
import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphq
from graphq.errors import TargetError
from graphq.lowering.torch.pack import pack
from graphq.runtime import ops
from graphq.runtime.graph_json import allowed, graph_from_json, graph_to_json
from tests.models import MLP, MoE

aten = torch.ops.aten
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def packed(model: nn.Module, spec: dict[str, Any], x: Tensor = X) -> fx.GraphModule:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    return pack(graphq.compile(model.eval(), {"graphq": 1, **spec}, inputs=x, calibration=[x]).graph)


@pytest.fixture(scope="module")
def mlp() -> fx.GraphModule:
    return packed(MLP(), {"rules": [{"match": "up", "weight": "int4/asym/g4"}]})


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (MLP, {"weight": "int4/asym/g4"}),
        (MLP, {"weight": "int8/channel", "input": "int8/asym/tensor"}),
        (MLP, {"weight": "int3/tensor", "input": "int6/asym/token/dynamic"}),
        (MoE, {"weight": "int5/asym/g4", "input": "int8/token/dynamic"}),
        (
            MoE,
            {"rules": [{"match": "experts", "weight": "int4/g4"}, {"match": "experts.1", "weight": "int8/channel"}]},
        ),
    ],
)
def test_a_graph_is_read_back(model: Callable[[], nn.Module], spec: dict[str, Any]) -> None:
    gm = packed(model(), spec)
    text = json.dumps(graph_to_json(gm), allow_nan=False)
    read = graph_from_json(json.loads(text), gm.state_dict())
    assert graph_to_json(read) == json.loads(text)
    assert [n.format_node() for n in read.graph.nodes] != []
    for x in (X, X[:1], torch.cat([X, X])):
        assert torch.equal(read(x)[0], gm(x)[0])
    assert {k: v.dtype for k, v in read.state_dict().items()} == {k: v.dtype for k, v in gm.state_dict().items()}


def test_every_kind_of_argument_is_read_back() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.clamp.default, (x, -math.inf), {"max": math.inf})
    y = graph.call_function(aten._to_copy.default, (y,), {"dtype": torch.float64, "device": torch.device("cpu")})
    y = graph.call_function(aten.clone.default, (y,), {"memory_format": torch.contiguous_format})
    y = graph.call_function(aten.div.Tensor_mode, (y, 2), {"rounding_mode": "floor"})
    size = graph.call_function(aten.sym_size.int, (x, 0))
    size = graph.call_function(operator.mul, (size, 4))
    y = graph.call_function(aten.view.default, (y, [size, -1]))
    y = graph.call_function(aten.sum.dim_IntList, (y, [1], True), {"dtype": None})
    y = graph.call_function(aten.nan_to_num.default, (y, math.nan))
    graph.output((y,))
    gm = fx.GraphModule(nn.Module(), graph)
    text = json.dumps(graph_to_json(gm), allow_nan=False)
    read = graph_from_json(json.loads(text), {})
    assert torch.equal(read(X)[0], gm(X)[0])
    assert read(X)[0].dtype == torch.float64
    assert json.dumps(graph_to_json(read), allow_nan=False) == text


def test_arguments_that_json_cannot_hold_are_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.add.Tensor, (x, 1j)),))
    with pytest.raises(TargetError, match="cannot hold an argument of type complex"):
        graph_to_json(fx.GraphModule(nn.Module(), graph))


# -- which ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [aten.linear.default, aten.div.Tensor_mode, aten.gelu.default, operator.getitem, torch.sym_max, ops.quantize],
)
def test_ops_that_artifacts_hold(target: Any) -> None:
    assert allowed(target)


@pytest.mark.parametrize(
    "target",
    [
        aten.add_.Tensor,  # in place
        aten.copy_.default,
        aten.from_file.default,  # reads a file
        aten.as_strided.default,
        aten._sparse_csr_tensor_unsafe.default,  # reads beyond its tensors
        aten._embedding_bag.default,
        aten.embedding_bag.default,
        aten._weight_int4pack_mm_for_cpu.default,
        aten.quantize_per_tensor.default,
        aten.mkldnn_convolution.default,
        aten._nested_tensor_from_mask.default,
        aten.rand.default,
        aten._print.default,
        aten._assert_async.msg,
        torch.ops.prim.device.default,
        torch.ops.profiler._record_function_exit._RecordFunction,
        torch.load,
        eval,
        print,
        getattr,
        operator.attrgetter,
        operator.methodcaller,
    ],
)
def test_ops_that_artifacts_do_not_hold(target: Any) -> None:
    assert not allowed(target)


# -- tampering ---------------------------------------------------------------------------------------------------------


def node(data: dict[str, Any], op: str) -> dict[str, Any]:
    """The first node of this kind."""
    return next(n for n in data["nodes"] if n["op"] == op)


@pytest.mark.parametrize(
    "target",
    [
        "aten.from_file.default",
        "aten.add_.Tensor",
        "os.system",
        "builtins.eval",
        "eval",
        "torch.load",
        "aten.__class__.default",
        "aten.linear.__class__",
        "aten.linear",
        "aten.linear.default.__call__",
        "graphq.nothing.default",
        "prim.device.default",
        "operator.attrgetter",
        "",
    ],
)
def test_other_ops_are_refused(mlp: fx.GraphModule, target: str) -> None:
    data = graph_to_json(mlp)
    node(data, "call_function")["target"] = target
    with pytest.raises(TargetError) as caught:
        graph_from_json(data, mlp.state_dict())
    assert str(caught.value) == f"graph.json: relu: {target} is not an op that artifacts may hold"


EVIL = 'up"),open("{}","w"),("'


def _placeholder(data: dict[str, Any], tensors: dict[str, Tensor], mark: Path) -> None:
    node(data, "placeholder")["target"] = f"x=open({str(mark)!r}, 'w')"


def _keyword(data: dict[str, Any], tensors: dict[str, Tensor], mark: Path) -> None:
    node(data, "call_function")["kwargs"] = {f"z=open({str(mark)!r}, 'w'), y": 1}


def _tensor(data: dict[str, Any], tensors: dict[str, Tensor], mark: Path) -> None:
    found, name = node(data, "get_attr"), EVIL.format(mark)
    tensors[name] = tensors[found["target"]]
    found["target"] = name


def _module(data: dict[str, Any], tensors: dict[str, Tensor], mark: Path) -> None:
    found, name = node(data, "call_module"), EVIL.format(mark)
    data["modules"][name] = data["modules"].pop(found["target"])
    for key in [key for key in tensors if key.startswith(f"{found['target']}.")]:
        tensors[name + key.removeprefix(found["target"])] = tensors[key]
    found["target"] = name


def _node_name(data: dict[str, Any], tensors: dict[str, Tensor], mark: Path) -> None:
    found = node(data, "call_function")
    old, new = found["name"], f"x\nopen({str(mark)!r}, 'w')\ny"
    data |= json.loads(json.dumps(data).replace(json.dumps(old), json.dumps(new)))


def _text(data: dict[str, Any], tensors: dict[str, Tensor], mark: Path) -> None:
    found = node(data, "call_function")
    found["target"], found["args"] = "aten.gelu.default", found["args"][:1]
    found["kwargs"] = {"approximate": f"none'), open({str(mark)!r}, 'w'), ('"}


@pytest.mark.parametrize("attack", [_placeholder, _keyword, _tensor, _module, _node_name, _text])
def test_what_a_file_says_is_never_code(mlp: fx.GraphModule, tmp_path: Path, attack: Callable[..., None]) -> None:
    """``torch.fx`` makes Python code of a graph, in which names and paths stand as they are."""
    data, tensors, mark = graph_to_json(mlp), dict(mlp.state_dict()), tmp_path / "written"
    attack(data, tensors, mark)
    try:
        graph_from_json(data, tensors)(X)
    except (TargetError, RuntimeError):
        refused = True
    else:
        refused = attack is _node_name  # names of nodes are made into harmless ones
    assert refused
    assert not mark.exists()


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one entry of the JSON."""

    def change(data: dict[str, Any]) -> None:
        *keys, last, value = path
        found: Any = data
        for key in keys:
            found = node(data, key) if key in ("call_module", "call_function", "get_attr", "output") else found[key]
        found[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("modules", "up", "class", "Module"), "Module is not a class of modules that artifacts may hold"),
        (_set("modules", "up", "class", "os.system"), "os.system is not a class of modules that artifacts may hold"),
        (_set("modules", "up", "settings", {}), "damaged: TypeError: PackedLinear.__init__() missing 5 required"),
        (_set("modules", "up", "settings", "format", "int99"), "damaged: SpecError: bits: 99"),
        (_set("modules", "up", "settings", "dtype", {"dtype": "load"}), "load is not a dtype that artifacts may hold"),
        (
            _set("modules", "up", "settings", "dtype", {"dtype": "contiguous_format"}),
            "contiguous_format is not a dtype that",
        ),
        (
            _set("modules", "up", "settings", "dtype", {"dtype": "int8"}),
            "dtype: torch.int8 is not one that graphs compute in",
        ),
        (
            _set("modules", "up", "settings", "dtype", {"dtype": "float8_e4m3fn"}),
            "up: dtype: torch.float8_e4m3fn is not one that graphs compute in",
        ),
        (_set("modules", "up", "settings", "dtype", 3), "up: dtype: 3 is not one that graphs compute in"),
        (_set("modules", "up", "settings", "shape", [10**9, 10**9]), "up.weight is uint8[1000000000, "),
        (_set("modules", "up", "settings", "shape", [-1, 8]), "graph.json: "),
        (_set("modules", "up", "settings", "row_axes", [7]), "damaged: IndexError"),
        (_set("modules", "up", "settings", "row_axes", [0, 0]), "up: row_axes: [0, 0] are not axes of [12, 8]"),
        (_set("modules", "up", "settings", "block", [1, 0]), "graph.json: "),
        (_set("modules", "up", "settings", "block", [1, -3]), "graph.json: "),
        (_set("call_module", "args", [1]), "its arguments are not those of up"),
        (_set("call_module", "args", [None]), "its arguments are not those of up"),
        (_set("call_module", "args", []), "its arguments are not those of up"),
        (_set("call_function", "args", []), "its arguments are not those of aten.relu.default"),
        (_set("call_function", "kwargs", {"speed": 2}), "its arguments are not those of aten.relu.default"),
        (_set("output", "args", [[3]]), "the output is not a list of nodes"),
        (_set("output", "args", [{"node": "relu"}]), "the output is not a list of nodes"),
        (_set("call_module", "target", "graph"), "graph is not one of its modules"),
        (_set("get_attr", "target", "forward"), "the weights lack forward"),
        (_set("call_function", "op", "call_method"), "no node can be a call_method"),
        (_set("call_function", "op", "exec"), "no node can be a exec"),
        (_set("call_function", "args", [{"node": "nothing"}]), "damaged: KeyError: 'nothing'"),
        (_set("call_function", "args", [{"code": "1"}]), "{'code': '1'} is not an argument"),
        (_set("call_function", "args", [{"device": "cuda"}]), "{'device': 'cuda'} is not an argument"),
        (_set("call_function", "args", [{"torch": "load"}]), "load is not a memory_format that"),
        (_set("call_function", "args", [{"float": "1e3"}]), "{'float': '1e3'} is not an argument"),
        (_set("call_function", "args", 3), "damaged: TypeError"),
        (_set("output", "args", []), "damaged: IndexError"),
        (_set("nodes", 3), "damaged: TypeError"),
        (_set("modules", []), "damaged: "),
    ],
)
def test_damaged_files(mlp: fx.GraphModule, change: Callable[[dict[str, Any]], None], message: str) -> None:
    data = copy.deepcopy(graph_to_json(mlp))
    change(data)
    with pytest.raises(TargetError) as caught:
        graph_from_json(data, mlp.state_dict())
    assert message in str(caught.value)
    assert str(caught.value).startswith("graph.json: ")


@pytest.mark.parametrize(
    ("target", "args", "named"),
    [
        ("aten.relu.default", ["x"], "self: 'x' is not a Tensor"),
        ("aten.relu.default", [3], "self: 3 is not a Tensor"),
        ("aten.relu.default", [None], "self: None is not a Tensor"),
        ("aten.relu.default", [[{"node": "x"}]], "self: [x] is not a Tensor"),
        ("aten.add.Tensor", [{"node": "x"}, "y"], "other: 'y' is not a Tensor"),
        ("aten.linear.default", [{"node": "x"}, {"node": "x"}, 1.5], "bias: 1.5 is not a Optional[Tensor]"),
        ("aten.cat.default", [[{"node": "x"}, 2]], "tensors: [x, 2] is not a List[Tensor]"),
        ("aten.cat.default", ["x"], "tensors: 'x' is not a List[Tensor]"),
        ("aten.index.Tensor", [{"node": "x"}, [None, 1]], "indices: [None, 1] is not a List[Optional[Tensor]]"),
    ],
)
def test_what_is_no_tensor(mlp: fx.GraphModule, target: str, args: list[Any], named: str) -> None:
    data = graph_to_json(mlp)
    found = node(data, "call_function")
    found |= {"target": target, "args": args}
    with pytest.raises(TargetError) as caught:
        graph_from_json(data, mlp.state_dict())
    assert str(caught.value) == f"graph.json: relu: {target}: {named}"


def test_numbers_and_nothing_in_place_of_tensors() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.add.Tensor, (x, 1)), 0.5))
    picked = graph.call_function(aten.index.Tensor, (y, [None, graph.call_function(aten.arange.default, (2,))]))
    parts = graph.call_function(aten.unbind.int, (picked,))
    graph.output((graph.call_function(aten.cat.default, (parts,)),))
    gm = fx.GraphModule(nn.Module(), graph)
    assert torch.equal(graph_from_json(graph_to_json(gm), {})(X)[0], gm(X)[0])


def test_weights_that_are_missing() -> None:
    gm = packed(MLP(), {"weight": "int8/channel"})
    tensors = {name: tensor for name, tensor in gm.state_dict().items() if name != "up.bias"}
    with pytest.raises(TargetError) as caught:
        graph_from_json(graph_to_json(gm), tensors)
    assert str(caught.value) == "graph.json: the weights lack up.bias"
    tensors = {name: tensor for name, tensor in gm.state_dict().items() if name != "up.weight"}
    with pytest.raises(TargetError) as caught:  # else the codes would be whatever was in memory
        graph_from_json(graph_to_json(gm), tensors)
    assert "up.weight" in str(caught.value)
