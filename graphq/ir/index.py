"""What analyses of a whole graph look up again and again, found once, in time linear in the graph."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import cast, final

from torch import fx

from graphq.capture.source import SHARED, source_of
from graphq.ir.vectors import place
from graphq.ir.views import Cast, Op, Param, view
from graphq.state import ties


@final
class GraphIndex:
    """Who reads each parameter, which parameters are tied, and the caches, as they were when the index was made.

    It stays true when parameters change (``edit.set_param``), and when nodes are added that read new ones.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.tied: Mapping[str, tuple[str, ...]] = ties(gm)
        self._reads: dict[str, list[fx.Node]] = {}
        for node in gm.graph.find_nodes(op="get_attr"):
            self._reads.setdefault(str(node.target), []).append(node)
        self._elsewhere: Collection[str] = gm.meta.get(SHARED, ())

    def reads(self, fqn: str) -> list[fx.Node]:
        """The nodes that are the parameter of this name."""
        return self._reads.get(fqn, [])

    def is_own(self, param: Param) -> bool:
        """Whether one node alone reads the parameter, under this name or another."""
        users = sum(len(node.users) for node in self.reads(param.fqn))
        return users == 1 and param.fqn not in self._elsewhere and param.fqn not in self.tied

    def why_shared(self, fqn: str, users: Collection[fx.Node]) -> str | None:
        """Why the parameter may not change for the sake of these users alone; None if it may."""
        for node in self.reads(fqn):
            for user, _ in reads_of(view(node)):
                if user.node not in users:
                    return f"{fqn}: {place(user)} reads it, too"
        others = self.tied.get(fqn)
        return f"{fqn}: it is tied to {others[0]}" if others else None

    @cached_property
    def input_names(self) -> Mapping[fx.Node, str]:
        """The declared name of each input."""
        names = (declared.name for declared in source_of(self.gm).inputs)
        return dict(zip(self.gm.graph.find_nodes(op="placeholder"), names, strict=True))

    @cached_property
    def output_names(self) -> Mapping[fx.Node, Sequence[str]]:
        """The names under which each output is given."""
        found: dict[fx.Node, list[str]] = {}
        results = cast(Sequence[fx.Node], self.gm.graph.output_node().args[0])
        for node, name in zip(results, source_of(self.gm).outputs, strict=True):
            found.setdefault(node, []).append(name)
        return found

    @cached_property
    def caches(self) -> Mapping[fx.Node, fx.Node]:
        """For each node that the graph gives back as a cache, and as nothing else, the input that it replaces."""
        inputs = {name: node for node, name in self.input_names.items()}
        outputs = {names[0]: node for node, names in self.output_names.items() if len(names) == 1}
        pairs = source_of(self.gm).caches
        return {outputs[p.present]: inputs[p.past] for p in pairs if p.present in outputs and p.past in inputs}

    @cached_property
    def pasts(self) -> frozenset[fx.Node]:
        """The inputs that are caches."""
        return frozenset(self.caches.values())


def reads_of(param: Op) -> list[tuple[Op, Op]]:
    """The ops that read a parameter, casts seen through, each with what it reads."""
    found: list[tuple[Op, Op]] = []
    for user in param.users:
        found += reads_of(user) if isinstance(user, Cast) else [(user, param)]
    return found
