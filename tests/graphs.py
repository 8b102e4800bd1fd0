"""What tests of passes say about graphs: specs in few words, and whether every ``val`` is true."""

from typing import Any

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.passes.annotate import Annotate
from graphq.spec.match import parse_match
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from graphq.state import put_tensor


def plan(weight: str | None = None, input: str | None = None) -> Plan:
    """The plan with these formats."""
    return Plan(parse_quant(weight) if weight else None, parse_quant(input) if input else None)


def spec(**rules: Decision | str) -> Spec:
    """Rules by name (``__`` stands for a dot), in order; a text is the weight's format, or ``float``."""
    made: list[Rule] = []
    for name, decision in rules.items():
        if isinstance(decision, str):
            decision = KeepFloat("asked for") if decision == "float" else plan(decision)
        made.append(Rule(parse_match(name.replace("__", ".")), decision))
    return Spec(tuple(made))


def annotated(gm: fx.GraphModule, **rules: Decision | str) -> fx.GraphModule:
    """``gm`` with the decisions of ``spec(**rules)``."""
    Annotate(spec(**rules)).run(gm)
    return gm


def targets(gm: fx.GraphModule) -> list[str]:
    """The ops that a graph calls, in order."""
    return [str(n.target).removesuffix(".default") for n in gm.graph.nodes if n.op == "call_function"]


def run(gm: fx.GraphModule, *inputs: Tensor) -> Tensor:
    """The first output."""
    gm.recompile()
    with torch.no_grad():
        return gm(*inputs)[0]


def without_data(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` with parameters that hold no numbers, as if captured without weights."""
    for name, tensor in list(gm.state_dict(keep_vars=True).items()):
        put_tensor(gm, name, edit.fake_mode_of(gm).from_tensor(tensor, static_shapes=True))
    return gm


def assert_vals(gm: fx.GraphModule, *inputs: Tensor) -> None:
    """Every node gives what its ``val`` says, when the graph is run on ``inputs``."""
    with torch.no_grad():
        _Checker(gm).run(*inputs)


class _Checker(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.sizes: dict[Any, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "placeholder":
            for size, actual in zip(n.meta["val"].shape, result.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    self.sizes[size.node.expr] = actual
        if n.op != "output":
            self.check(n.name, n.meta["val"], result)
        return result

    def check(self, name: str, val: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            assert isinstance(val, Tensor), name
            assert (val.dtype, [self.size(s) for s in val.shape]) == (result.dtype, list(result.shape)), name
            assert not isinstance(val, torch.nn.Parameter) or isinstance(result, torch.nn.Parameter), name
        elif isinstance(result, tuple | list):
            for part, value in zip(val, result, strict=True):
                self.check(name, part, value)
        else:
            assert self.size(val) == result, name

    def size(self, size: Any) -> int:
        return int(size.node.expr.subs(self.sizes)) if isinstance(size, torch.SymInt) else size
