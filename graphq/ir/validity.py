"""Which elements of every value of a graph come of tokens that a batch's mask leaves in: a boolean beside each value.

It starts at the declared mask (``graphq.data.masks``) and goes through the graph as the batch does
(``graphq.ir.validity_rules``). Where valid and invalid elements are mixed, as in a mean over tokens or a convolution,
it ends: from there on all elements count, and the op is remembered, up to a sum, say, with a value that still has
a mask of all tokens.
"""

from typing import Any, cast

import torch
from torch import fx

from graphq.data.masks import ALL, MaskedBatch, Validity
from graphq.errors import GraphqError, PassError
from graphq.ir.validity_rules import Known, Rule, validity_of
from graphq.ir.views import view


class ValidityRun(fx.Interpreter):
    """Runs a graph, and knows the ``validity`` of each value for as long as it is needed. Observers see nothing."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # errors stay as the ops raised them
        self.inputs = gm.graph.find_nodes(op="placeholder")
        self.validity: dict[fx.Node, Known] = {}
        self.result: tuple[Validity, ...] = ()

    def run_batch(self, batch: MaskedBatch) -> MaskedBatch:
        """What the graph gives for a batch, and which of it is valid."""
        given = zip(self.inputs, batch.validity, strict=True)
        self.validity = {node: one for node, one in given if not one.is_trivial}
        return MaskedBatch(self.run(*batch), self.result)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return args[0]

    def compute(self, n: fx.Node) -> Any:
        """What a node gives."""
        return super().run_node(n)

    def run_node(self, n: fx.Node) -> Any:
        made = self.compute(n)
        if n.op == "output":
            self.result = tuple(validity_of(node, self.validity) for node in cast(tuple[Any, ...], n.args[0]))
        elif n.op != "placeholder" and any(node in self.validity for node in n.all_input_nodes):
            try:
                found = Rule(view(n), self.validity, self.env, made).validity()
            except (GraphqError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise PassError(f"validity of {n.name}: {n.target}: {error}") from error
            if found is not ALL:
                self.validity[n] = found
        for read in self.user_to_last_uses.get(n, ()):
            self.validity.pop(read, None)
        return made
