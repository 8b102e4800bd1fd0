"""A part that is made again from what was recorded of it is the part that passes made."""

import copy
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from graphq.errors import PassError, TargetError
from graphq.ir.part_record import PartBefore, rebuild
from graphq.ir.parts import Parts
from graphq.ir.pipeline import Pass, Pipeline, fingerprint
from graphq.ir.text import dump
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.pipelines import canonical_passes
from graphq.state import put_tensor
from tests.graphs import annotated, plan, run
from tests.models import FAMILIES, captured, random_inputs

INNER: tuple[Pass, ...] = (Observe(), Calibrate(), QuantizeWeights(), QuantizeActivations())


def parts_of(family: str) -> Parts:
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    annotated(gm, blocks=plan("int8/channel", None if family == "resnet" else "int8/token/dynamic"))
    return Parts(gm)


def hold(tensors: Mapping[str, Tensor], gm: fx.GraphModule) -> None:
    for name, tensor in tensors.items():
        put_tensor(gm, name, tensor)


def metas(gm: fx.GraphModule) -> list[dict[str, Any]]:
    return [{k: v for k, v in node.meta.items() if k != "val"} for node in gm.graph.nodes]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_part_again(family: str) -> None:
    first, second = parts_of(family), parts_of(family)
    inputs = random_inputs(first.gm)
    for index in range(len(first.stages)):
        part, again = first.extract(index), second.extract(index)
        before = PartBefore(part.gm)
        Pipeline([QuantizeWeights(), QuantizeActivations()]).run(part.gm)
        record = json.loads(json.dumps(before.record(part.gm)))
        rebuild(again.gm, record, partial(hold, part.gm.state_dict(keep_vars=True)))
        assert dump(again.gm) == dump(part.gm)
        assert [node.name for node in again.gm.graph.nodes] == [node.name for node in part.gm.graph.nodes]
        assert metas(again.gm) == metas(part.gm)
        assert first.merge(index, part) == second.merge(index, again)
    assert fingerprint(second.gm) == fingerprint(first.gm)
    assert torch.equal(run(second.gm, *inputs), run(first.gm, *inputs))


def test_records_of_something_else() -> None:
    parts = parts_of("llama")
    part = parts.extract(1)
    before = PartBefore(part.gm)
    QuantizeWeights().run(part.gm)
    record = before.record(part.gm)
    tensors = part.gm.state_dict(keep_vars=True)

    def broken(change: Any) -> str:
        changed = copy.deepcopy(record)
        change(next(entry for entry in changed if entry["op"] == "call_function" and entry["val"]))
        again = parts_of("llama").extract(1)
        with pytest.raises(TargetError) as caught:
            rebuild(again.gm, changed, partial(hold, tensors))
        return str(caught.value)

    assert "of another graph: ValueError: os.system.default is no op" in broken(
        lambda entry: entry.update(target="os.system.default")
    )
    assert ": is float32[64, 64], and was float32[64, 65]" in broken(lambda entry: entry.update(val="float32[64, 65]"))
    assert "of another graph: KeyError" in broken(lambda entry: entry.update(args=[{"node": "nosuch"}]))


def test_what_no_record_holds() -> None:
    part = parts_of("llama").extract(1)
    before = PartBefore(part.gm)
    Observe().run(annotated(part.gm, blocks=plan("int8/channel", "int8/tensor")))
    with pytest.raises(PassError, match="a call_module is left in a finished block"):
        before.record(part.gm)
    part = parts_of("llama").extract(1)
    before = PartBefore(part.gm)
    node = next(n for n in part.gm.graph.nodes if n.op == "call_function")
    node.meta["graphq.plan"] = "another"
    with pytest.raises(PassError, match=r"graphq\.plan: 'another' is of no node that the block had"):
        before.record(part.gm)
