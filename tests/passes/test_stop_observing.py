"""The end of observation."""

import torch

from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.calibrate import Calibrate
from graphq.passes.gptq import GPTQ
from graphq.passes.observe import Observe, observers
from graphq.passes.stop_observing import StopObserving
from tests.graphs import annotated, plan
from tests.models import MLP, capture


def test_no_observer_is_left_and_the_graph_is_as_before() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=plan("int8/channel", "int8/tensor"), down="int4/channel")
    before, state = dump(gm), list(gm.state_dict())
    Pipeline([Observe((GPTQ(),)), Calibrate()]).run(gm, [(torch.randn(4, 8),)])
    assert len(observers(gm)) == 3
    assert Pipeline([StopObserving()], strict=True).run(gm) == {"stop-observing": 3}
    assert observers(gm) == []
    assert dump(gm) == before
    assert list(gm.state_dict()) == state
    assert Pipeline([StopObserving()], strict=True).run(gm) == {"stop-observing": 0}
