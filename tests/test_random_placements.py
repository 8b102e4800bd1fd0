"""Random models compiled for each profile: quantizers stand where its table says, and the artifacts are the QDQ form."""

import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx

import graphq
from graphq.compiler import Compiled
from graphq.ir.layers import PLAN
from graphq.ir.op_kinds import activations_of, kind_of
from graphq.ir.units import reading_data
from graphq.ir.views import Dequantize, Op, Param, Quantize, ops_of
from graphq.lowering.profiles import PROFILES, default_spec
from graphq.spec.activations import ActivationRule
from graphq.spec.plan import Plan
from graphq.spec.profile import Profile
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from tests.lifted import copied
from tests.random_graphs import random_model

LAYERS = ("Linear", "Conv", "ConvTranspose")


def with_activations(profile: Profile, quant: str) -> Spec:
    """The profile's own spec, with inputs of layers of another type."""
    (rule,) = default_spec(profile).rules
    assert isinstance(rule.decision, Plan)
    return Spec(
        (Rule(rule.match, Plan(rule.decision.weight, parse_quant(quant)), may_match_nothing=True),),
        activations=(ActivationRule(parse_quant(quant)),),
        profile=profile.name,
    )


def compiled(seed: int, profile: Profile, quant: str = "") -> tuple[Compiled, list[dict[str, Tensor]], Any]:
    """The model of a seed for a profile, the batches that it was calibrated on, and the model."""
    model = random_model(seed).float()
    batches = [
        {n: x.float() if x.is_floating_point() else x for n, x in model.examples(seed + i, 3, 4).items()}
        for i in range(2)
    ]
    spec = with_activations(profile, quant) if quant else None
    made = graphq.compile(model, spec, profile=profile.name, inputs=batches[0], calibration=batches)
    return made, batches, model


def quantizers(x: Op) -> list[Quantize]:
    return [user for user in x.users if isinstance(user, Quantize)]


def misplaced(gm: fx.GraphModule, profile: Profile) -> Iterator[str]:
    """A line for each place where the QDQ form is not as the profile's table says."""
    of_data = reading_data(gm)
    for op in ops_of(gm):
        kind = kind_of(op)
        rule = profile.ops.get(kind)
        if op.node not in of_data:
            continue
        if rule is None or op.node.op != "call_function" or not isinstance(op.val, Tensor):
            continue
        follows = any(kind in chain[1:] for chain in profile.fuses)
        xs = activations_of(op)
        are_codes = [isinstance(x, Dequantize) and isinstance(x.codes, Quantize | Param) for x in xs]
        given = quantizers(op)
        if rule.output == "same" and xs and all(are_codes):
            for x in xs:
                for one in given:
                    if (x.scale, x.zero_point) != (one.scale, one.zero_point):
                        yield f"{op.node.name}: {kind} changes the grid"
        if len({(one.scale, one.zero_point, one.format) for one in given}) < len(given):
            yield f"{op.node.name}: quantized twice alike"
        plan = op.node.meta.get(PLAN)
        is_off = kind in LAYERS and not (
            isinstance(plan, Plan) and plan.weight and not (plan.input and plan.input.dynamic)
        )
        if rule.placed != "always" or is_off or follows:
            continue
        if not all(are_codes):
            yield f"{op.node.name}: {kind} reads {[x.node.name for x, ok in zip(xs, are_codes, strict=True) if not ok]}"
        if rule.output != "optional" and op.val.is_floating_point():
            chained = len(op.users) == 1 and any((kind, kind_of(op.users[0])) == chain[:2] for chain in profile.fuses)
            if not chained and not all(isinstance(user, Quantize) for user in op.users):
                yield f"{op.node.name}: {kind}: {[user.node.name for user in op.users]} read it unquantized"


def without_quantizers(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which activations are not rounded; weights and biases are what they became."""
    made = copied(gm)
    for op in ops_of(made):
        if isinstance(op, Dequantize) and isinstance(op.codes, Quantize):
            op.node.replace_all_uses_with(op.codes.node.all_input_nodes[0])
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def moved_codes(gm: fx.GraphModule, profile: Profile, inputs: tuple[Tensor, ...]) -> Iterator[str]:
    """A line for each op that leaves the grid alone and whose codes are not all codes of what it read."""
    seen: dict[fx.Node, Any] = {}

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    with torch.no_grad():
        Run(gm).run(*inputs)
    for op in ops_of(gm):
        rule = profile.ops.get(kind_of(op))
        if rule is None or rule.output != "same" or op.node.op != "call_function":
            continue
        xs = [x for x in activations_of(op) if isinstance(x, Dequantize) and isinstance(x.codes, Quantize)]
        for one in quantizers(op):
            if xs and kind_of(op) in ("Reshape", "Transpose", "Slice", "MaxPool", "Split", "Expand", "Tile"):
                before = {int(v) for x in xs for v in seen[x.codes.node].flatten()}
                if not {int(v) for v in seen[one.node].flatten()} <= before:
                    yield f"{op.node.name}: codes that it did not read"


def errors(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest root of the mean square of a difference, of what is wanted."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    return max(float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-9)) for a, b in pairs)


def weights_alone(profile: Profile, model: Any, batch: dict[str, Tensor]) -> float:
    """The error of the model with nothing but its weights rounded, as the profile's are."""
    (rule,) = default_spec(profile).rules
    spec = Spec((Rule(rule.match, Plan(profile.weight), may_match_nothing=True),))
    made = graphq.compile(model, spec, inputs=batch).graph
    made.recompile()
    with torch.no_grad():
        return errors(made(*batch.values()), model(**batch).values())


def check(seed: int, folder: Path, onnx: bool) -> list[str]:
    """What is wrong with the model of a seed, compiled for the profile of the seed; a line each."""
    dice = random.Random(f"placement {seed}")
    profile = PROFILES[[*PROFILES][seed % len(PROFILES)]]
    wide = "uint16/tensor" if "uint16" in map(str, profile.activations) and dice.random() < 0.6 else ""
    made, batches, model = compiled(seed, profile, wide)
    gm = made.graph
    gm.recompile()
    inputs = tuple(batches[0].values())
    found = [*misplaced(gm, profile), *moved_codes(gm, profile, inputs)]
    with torch.no_grad():
        wanted = list(gm(*inputs))
        rounded = list(without_quantizers(gm)(*inputs))
        source = [*model(**batches[0]).values()]
    if wide and (error := errors(wanted, rounded)) > 0.01:  # 8 bits say little of deep sums of outliers
        found.append(f"error of activations {error:.3f}")
    if (error := errors(rounded, source)) > 0.2 and error > 2 * (alone := weights_alone(profile, model, batches[0])):
        found.append(f"error of weights and constants {error:.3f}, where that of weights is {alone:.3f}")
    if not all(y.isfinite().all() for y in wanted):
        found.append("an output is not finite")
    made.save(folder / "torch")
    outputs, packed = (cast(dict[str, Tensor], of(**batches[0])) for of in (graphq.load(folder / "torch"), made))
    for (name, y), again, z in zip(outputs.items(), packed.values(), wanted, strict=True):
        if not torch.equal(y, again):
            found.append(f"torch: {name} is another from the disk")
        if (error := errors([y], [z])) > 1e-2:  # a code that flips
            found.append(f"torch: {name} differs by {error:.2e}")
    for y, z in zip(run_onnx(made, folder, batches[0]) if onnx else wanted, wanted, strict=True):
        if (error := errors([y], [z])) > 1e-2:
            found.append(f"onnx: differs by {error:.2e}")
    return [f"python -m tests.test_random_placements {seed}: {profile.name}: {line}" for line in found]


def run_onnx(made: Compiled, folder: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    import onnxruntime as ort

    made.emit("onnx", folder / "onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(folder / "onnx" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def check_all(seeds: Iterable[int], tmp_path: Path, onnx: Callable[[int], bool]) -> None:
    failed: list[str] = []
    for seed in seeds:
        try:
            failed += check(seed, tmp_path / str(seed), onnx(seed))
        except Exception:  # noqa: BLE001 - the seeds after it are tried, too
            failed.append(f"python -m tests.test_random_placements {seed}\n{traceback.format_exc(limit=-4)}")
    assert not failed, "\n\n".join(failed)


def test_quantizers_stand_where_the_profile_says(tmp_path: Path) -> None:
    check_all(range(6), tmp_path, lambda seed: seed == 4)


@pytest.mark.slow
@pytest.mark.parametrize("hundred", range(3))
def test_quantizers_stand_where_the_profile_says_in_hundreds(hundred: int, tmp_path: Path) -> None:
    check_all(range(100 * hundred, 100 * hundred + 100), tmp_path, lambda seed: seed % 5 == 0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(*check(int(sys.argv[1]), Path(folder), True), sep="\n")
