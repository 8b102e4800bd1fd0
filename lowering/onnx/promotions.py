"""Casts of mixed dtypes, which torch's exporter writes into a graph, found without running the graph again.

The exporter interprets the whole graph with fake tensors to know what each node's operands are, which takes two thirds
of ``torch.onnx.export`` where a graph is not decomposed (torch 2.13). Export has left all of that in ``val``.
"""

import contextlib
from collections.abc import Generator
from typing import Any, cast

from torch import fx


@contextlib.contextmanager
def lean_promotions() -> Generator[None]:
    """Inside, exports run those nodes alone whose operands they cast; every other one is what its ``val`` says."""
    from torch.onnx._internal.fx.passes import type_promotion

    torch_pass = cast(Any, type_promotion)
    interpreter = torch_pass._TypePromotionInterpreter
    run_node = interpreter.run_node

    def promote(self: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return run_node(self, node)
        if (rule := torch_pass.get_type_promotion_rule(node, self.type_promotion_table)) is not None:
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    interpreter.run_node = promote
    try:
        yield
    finally:
        interpreter.run_node = run_node
