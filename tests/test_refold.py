"""An artifact that an algorithm made is held to the model it was made from: every change of either is found, by name."""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphq
from graphq.artifacts import manifest
from graphq.artifacts.choices import CHOICES_FILE, read_choices
from graphq.errors import GraphError, TargetError
from graphq.ir.pipeline import Pass
from graphq.lowering.targets import TARGETS
from graphq.pipelines import passes_for
from graphq.refold import repeated, unspelled
from graphq.spec.algorithms import ALGORITHMS
from graphq.verifier import verify
from tests.models import tiny

TOKENS = [torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(3)]
GATE = "model.layers.0.mlp.gate_proj"
NORM = "model.layers.0.input_layernorm.weight"
OPTIONS: dict[str, dict[str, Any]] = {"auto-round": {"steps": 4}, "rotate": {"r3": True, "r4": True}}


@functools.cache
def _made(folder: Path, family: str, dtype: torch.dtype, target: str, spec: str) -> tuple[Path, Path]:
    model = folder / f"{family}-{dtype}"
    if not model.exists():
        tiny(family, **({"num_hidden_layers": 1} if family == "llama" else {})).to(dtype).save_pretrained(model)
    options: dict[str, Any] = {"target": target} if TARGETS[target].reads else {}
    compiled = graphq.compile(model, json.loads(spec), calibration=TOKENS, **options)
    artifact = folder / f"{len(list(folder.iterdir())):03}"
    compiled.emit(target, artifact)
    return model, artifact


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def compiled(
    shared: Path,
    names: list[str],
    target: str = "torch",
    family: str = "llama",
    weight: str = "int4/g32",
    dtype: torch.dtype = torch.float32,
    **keys: Any,
) -> tuple[Path, Path]:
    """A model and its artifact, which a test does not change."""
    algorithms = [{name: OPTIONS.get(name, {})} for name in names]
    spec = {"graphq": 1, "weight": weight, "algorithms": algorithms, **keys}
    return _made(shared, family, dtype, target, json.dumps(spec))


def copied(place: Path, made: tuple[Path, Path]) -> tuple[Path, Path]:
    model, artifact = made
    return Path(shutil.copytree(model, place / "model")), Path(shutil.copytree(artifact, place / "a"))


def seal(artifact: Path) -> None:
    """The manifest says what is there now."""
    data = json.loads((artifact / manifest.NAME).read_text())
    held = TARGETS[data["target"]].tensors(artifact)
    for key in ("tensors", "other_tensors"):
        data[key] = {name: manifest.record(held[name]) for name in data[key]}
    data["files"] = manifest.file_digests(artifact)
    (artifact / manifest.NAME).write_text(json.dumps(data))


def change(file: Path, name: str, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The tensor of a safetensors file is ``f`` of itself."""
    tensors = load_file(file)
    tensors[name] = f(tensors[name]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm(name: str, shared: Path) -> None:
    model, artifact = compiled(shared, [name])
    found = verify(artifact, model)
    assert (found.differences, found.notes) == ((), ())
    described = json.loads((artifact / manifest.NAME).read_text())
    assert described["choices"] == (CHOICES_FILE if name in ("smooth-quant", "awq", "correct-bias") else None)
    assert (CHOICES_FILE in described["files"]) == (described["choices"] is not None)


@pytest.mark.parametrize(
    ("names", "target", "options"),
    [
        (["smooth-quant", "gptq"], "onnx", {}),
        (["awq"], "compressed-tensors", {"dtype": torch.bfloat16}),
        (
            ["smooth-quant"],
            "ascend",
            {"dtype": torch.bfloat16, "weight": "int8/channel", "input": "int8/token/dynamic"},
        ),
        (["smooth-quant", "awq"], "torch", {"pipeline": "independent", "dtype": torch.bfloat16}),
        pytest.param(["awq"], "onnx", {"family": "mixtral"}, marks=pytest.mark.slow),
        pytest.param(["rotate", "gptq"], "torch", {"family": "mixtral"}, marks=pytest.mark.slow),
        pytest.param(["awq", "correct-bias"], "onnx", {"family": "gpt2"}, marks=pytest.mark.slow),
        pytest.param(["equalize", "correct-bias"], "compressed-tensors", {"family": "opt"}, marks=pytest.mark.slow),
    ],
)
def test_targets_and_families(names: list[str], target: str, options: dict[str, Any], shared: Path) -> None:
    model, artifact = compiled(shared, names, target, **options)
    assert verify(artifact, model).differences == ()


def test_weights_whose_ranges_need_data(shared: Path) -> None:
    static: dict[str, Any] = {"weight": "int8/channel/ofmr", "input": "int8/tensor"}
    model, artifact = compiled(shared, [], **static)
    inputs = "4 input scales and zero points, which need calibration data, were compared with the manifest only"
    found = verify(artifact, model)
    assert (found.differences, found.notes) == ((), (inputs,))


def test_a_changed_code(shared: Path, tmp_path: Path) -> None:
    model, artifact = copied(tmp_path, compiled(shared, ["gptq"]))
    change(
        artifact / "model.safetensors",
        f"{GATE}.weight",
        lambda codes: codes ^ (torch.arange(codes.numel()) == 5).view(codes.shape).to(codes.dtype),
    )
    assert verify(artifact, model).differences == (f"{GATE}.weight: differs from its digest in the manifest",)


@pytest.mark.parametrize("names", [["gptq"], ["awq"], ["smooth-quant"], ["rotate"]])
def test_a_scale_that_the_manifest_was_made_to_fit(names: list[str], shared: Path, tmp_path: Path) -> None:
    model, artifact = copied(tmp_path, compiled(shared, names))
    change(artifact / "model.safetensors", f"{GATE}.weight_scale", lambda scale: scale * 1.5)
    seal(artifact)
    assert verify(artifact).ok
    (line,) = verify(artifact, model).differences
    words = r"dB beside the weight folded anew, (\d+\.\d\d) dB when it was compiled"
    found = re.fullmatch(rf"{re.escape(GATE)}: (-?\d+\.\d\d) {words} \({model}\)", line)
    assert found is not None, line
    assert float(found[1]) < 8 < 15 < float(found[2])  # half of the weight is noise


def test_a_changed_factor(shared: Path, tmp_path: Path) -> None:
    model, artifact = copied(tmp_path, compiled(shared, ["smooth-quant"]))
    chosen = read_choices(artifact)
    name = "0 smooth-quant factors model.layers.0.self_attn.q_proj.weight"
    chosen[name][3] *= 4
    save_file(chosen, artifact / CHOICES_FILE)
    assert verify(artifact).differences == (f"{CHOICES_FILE}: differs from its digest in the manifest",)
    seal(artifact)
    assert verify(artifact).ok
    lines = [line.partition(":")[0] for line in verify(artifact, model).differences]
    assert lines == [NORM, *(f"model.layers.0.self_attn.{name}_proj" for name in "kqv")]


def test_a_changed_range(shared: Path, tmp_path: Path) -> None:
    model, artifact = copied(tmp_path, compiled(shared, ["awq"]))
    chosen = read_choices(artifact)
    name = f"0 awq clip {GATE}.weight"
    assert chosen[name].dtype == torch.uint8
    assert chosen[name].float().mean() > 0
    chosen[name] = 10 - chosen[name]
    save_file(chosen, artifact / CHOICES_FILE)
    seal(artifact)
    (line,) = verify(artifact, model).differences
    assert line.startswith(f"{GATE}: ")


@pytest.mark.parametrize("names", [["gptq"], ["smooth-quant"], ["rotate"]])
def test_a_changed_norm(names: list[str], shared: Path, tmp_path: Path) -> None:
    model, artifact = copied(tmp_path, compiled(shared, names))
    change(artifact / "model.safetensors", NORM, lambda gain: torch.where(torch.arange(64) == 7, gain * 1.01, gain))
    assert verify(artifact).differences == (f"{NORM}: differs from its digest in the manifest",)
    seal(artifact)
    assert verify(artifact, model).differences == (f"{NORM}: 1 of 64 elements differ ({model})",)


def test_a_changed_bias(shared: Path, tmp_path: Path) -> None:
    model, artifact = copied(tmp_path, compiled(shared, ["correct-bias"]))
    change(artifact / "model.safetensors", f"{GATE}.bias", lambda bias: bias * 2)
    seal(artifact)
    assert verify(artifact, model).differences == (f"{GATE}.bias: 96 of 96 elements differ ({model})",)


@pytest.mark.parametrize("names", [["gptq"], ["awq"], ["rotate"], ["smooth-quant", "gptq"]])
def test_another_model(names: list[str], shared: Path, tmp_path: Path) -> None:
    model, artifact = copied(tmp_path, compiled(shared, names))
    change(model / "model.safetensors", f"{GATE}.weight", lambda w: torch.cat([w[1:], w[:1]]))
    (line,) = verify(artifact, model).differences
    assert line.startswith(f"{GATE}: -")  # less signal than noise


def test_a_norm_of_another_model(shared: Path, tmp_path: Path) -> None:
    """Of a model whose weights are rounded to nearest, too, which are compared bit for bit."""
    for names in ([], ["gptq"]):
        model, artifact = copied(tmp_path / "-".join(names), compiled(shared, names))
        change(model / "model.safetensors", NORM, lambda gain: torch.where(torch.arange(64) < 2, gain * 1.0001, gain))
        assert verify(artifact, model).differences == (f"{NORM}: 2 of 64 elements differ ({model})",)


def rewrite(artifact: Path, edit: Callable[[Any], object]) -> None:
    data = json.loads((artifact / manifest.NAME).read_text())
    edit(data)
    (artifact / manifest.NAME).write_text(json.dumps(data))


def test_a_manifest_of_before(shared: Path, tmp_path: Path) -> None:
    """Choices were not kept: what needs none is compared all the same, else it is said what cannot be."""
    model, artifact = copied(tmp_path / "gptq", compiled(shared, ["gptq"]))
    rewrite(artifact, lambda data: [data.pop(key) for key in ("choices", "stored")])
    assert verify(artifact, model).ok
    model, artifact = copied(tmp_path / "awq", compiled(shared, ["awq"]))
    rewrite(artifact, lambda data: data.pop("choices"))
    assert verify(artifact).ok
    with pytest.raises(TargetError) as caught:
        verify(artifact, model)
    assert str(caught.value) == (
        f"{artifact}/graphq.json: holds nothing of what awq chose, which later versions of graphq keep: its weights"
        " cannot be compared with a model's"
    )


def test_choices_that_cannot_be_read(shared: Path, tmp_path: Path) -> None:
    model, artifact = copied(tmp_path, compiled(shared, ["awq"]))
    file = artifact / CHOICES_FILE
    name = "0 awq factors model.layers.0.self_attn.q_proj.weight"
    short = {name: torch.ones(3, dtype=torch.float64)}
    for tensors, message in (
        (short, f"factors {name.rsplit(maxsplit=1)[-1]}: [3] are no 64 positive factors"),
        ({name: -torch.ones(64)}, f"factors {name.rsplit(maxsplit=1)[-1]}: [64] are no 64 positive factors"),
        (
            {f"0 awq clip {GATE}.weight": torch.zeros(2, 3)},
            f"clip {GATE}.weight: [2, 3] are no ranges of a weight [96, 64]",
        ),
    ):
        save_file(tensors, file)
        with pytest.raises(GraphError, match=f"^{re.escape(message)}$"):
            verify(artifact, model)
    file.write_bytes(b"\x08")
    with pytest.raises(TargetError, match=f"^{re.escape(str(file))}: damaged or incomplete: "):
        verify(artifact, model)
    file.unlink()
    with pytest.raises(TargetError, match=f"^{re.escape(str(file))}: no such file$"):
        verify(artifact, model)


def test_a_report_that_cannot_be_read(shared: Path, tmp_path: Path) -> None:
    model, artifact = copied(tmp_path, compiled(shared, ["gptq"]))
    for report in (None, [3], [{"layer": GATE}], [{"layer": GATE, "weight": "int4", "sqnr_db": "much"}]):
        rewrite(artifact, lambda data, report=report: data.update(report=report))
        with pytest.raises(TargetError, match=r"/graphq\.json: damaged: report: "):
            verify(artifact, model)


def test_no_pass_without_a_repetition() -> None:
    """Whatever a spec may ask for, no pass is left that needs data."""
    from graphq.algorithms import PassContext
    from graphq.passes.blockwise import Blockwise
    from graphq.spec.match import parse_match
    from graphq.spec.plan import Plan
    from graphq.spec.quant import parse_quant
    from graphq.spec.rules import Algorithm, Rule, Spec

    def flat(passes: list[Pass]) -> list[str]:
        return [n for step in passes for n in (flat([*step.passes]) if isinstance(step, Blockwise) else [step.name])]

    rules = (Rule(parse_match("blocks"), Plan(parse_quant("int8/channel"), parse_quant("int8/tensor"))),)
    spec = Spec(rules, tuple(map(Algorithm, ALGORITHMS)), profile="ort-cpu")
    names = flat(repeated(passes_for(spec, {}, PassContext(chosen={}), blocks=True), {}))
    seen = dict.fromkeys(names[names.index("decompose") + 1 :])
    assert " ".join(seen) == (
        "fold-batch-norm untie fold-norms rotate annotate round-to-stored equalize repeat-factors hold-weights"
        " repeat-biases"
    )


@pytest.mark.parametrize(
    ("scale", "shape", "block", "wanted"),
    [
        ([3.0], (1, 1), (-1, -1), [[3.0]]),
        ([1.0, 2.0], (2, 1), (1, -1), [[1.0], [2.0]]),
        ([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], (2, 2), (2, 4), [[1.0, 2.0], [3.0, 4.0]]),  # a block of rows each
        ([[1.0, 2.0]] * 3, (1, 2), (-1, 4), [[1.0, 2.0]]),
        ([[1.0, 2.0]] * 3, (2, 2), (1, 4), None),
        ([1.0, 2.0, 3.0], (2, 1), (1, -1), None),
    ],
)
def test_scales_as_a_target_spells_them(scale: Any, shape: Any, block: Any, wanted: Any) -> None:
    found = unspelled(torch.tensor(scale), shape, block)
    assert (None if found is None else found.tolist()) == wanted
