"""What a user can get wrong, through the public functions, each with its exact message."""

import copy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import graphq
from graphq import GraphError, SpecError, TargetError
from graphq.cli import app
from graphq.spec.algorithms import NEAREST
from tests.models import MLP, Blocks

X = torch.linspace(-2, 3, 5 * 8).reshape(5, 8)
INT8: dict[str, Any] = {"graphq": 1, "weight": "int8/channel"}
STATIC = INT8 | {"input": "int8/tensor"}
QUANT: dict[str, Any] = {"method": "RTN", "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"}}
FORMAT_HINT = (
    "is not a format; write <format>[/<granularity>][/dynamic or /<method>], such as int4/asym/g128,"
    " int8/token/dynamic, float8_e4m3fn/channel or mxfp4"
)


def native(**rule: Any) -> dict[str, Any]:
    return {"graphq": 1, "rules": [rule]}


def llmc(weight: dict[str, Any] | None = None, **quant: Any) -> dict[str, Any]:
    return {"quant": copy.deepcopy(QUANT) | {"weight": QUANT["weight"] | (weight or {})} | quant}


def settings(*names: Any) -> dict[str, Any]:
    return llmc(mix_bits={f"setting_{i}": {"layer_name": n, "do_quant": False} for i, n in enumerate(names)})


BITS = "is not supported; weight takes 2, 3, 4, 5, 6, 7 or 8"
GROUP = {"granularity": "per_group"}
SPECS: dict[str, tuple[Any, str]] = {
    "unknown key": (INT8 | {"wieght": 1}, "wieght: unknown key; did you mean weight?"),
    "misspelt layer": (native(match="donw", weight="int8/channel"), "rules[0]: donw matches no layer; did you mean down?"),
    "other case": (native(match="Down", weight="int8/channel"), "rules[0]: Down matches no layer; did you mean down?"),
    "no such layer": (native(match="nosuch", weight="int8/channel"), "rules[0]: nosuch matches no layer"),
    "no such pattern": (native(match="*.mlp.*", weight="int8/channel"), "rules[0]: *.mlp.* matches no layer"),
    "no such path": (native(match="=blocks.0.donw", float=True), "rules[0]: =blocks.0.donw matches no layer; did you mean blocks.0.down?"),
    "block out of range": (
        native(match="down#0..3", weight="int8/channel"),
        "rules[0]: down#0..3: block 2, 3 does not exist: this model has blocks 0 to 1; #a-b is a list, write #a..b for a range",
    ),
    "bare layer_name": (settings("down"), "quant.mix_bits.setting_0.layer_name: 'down' is not a list of names; write [down]"),
    "claimed twice": (settings(["down"], ["down#1"]), "mix_bits.setting_1: down#1 and mix_bits.setting_0: down both claim blocks.1.down"),
    "bits 1": (llmc({"bit": 1}), f"quant.weight.bit: 1 {BITS}"),
    "bits 9": (llmc({"bit": 9}), f"quant.weight.bit: 9 {BITS}"),
    "native bits 1": (INT8 | {"weight": "int1/channel"}, "weight: bits: 1 is not one of 2 to 8 or 16"),
    "native bits 16": (INT8 | {"weight": "int16/channel"}, "weight: int16/channel has 16 bits; weights hold 2 to 8"),
    "group size text": (llmc(GROUP | {"group_size": "x"}), "quant.weight.group_size: 'x' is not an integer"),
    "group size 2.5": (llmc(GROUP | {"group_size": 2.5}), "quant.weight.group_size: 2.5 is not an integer"),
    "group size 0": (llmc(GROUP | {"group_size": 0}), "quant.weight.group_size: 0 is not a positive integer"),
    "group size -4": (llmc(GROUP | {"group_size": -4}), "quant.weight.group_size: -4 is not a positive integer"),
    "native group size": (INT8 | {"weight": "int8/g0"}, "weight: group_size: 0 is not a positive integer"),
    "native group": (INT8 | {"weight": "int8/g-4"}, f"weight: 'int8/g-4' {FORMAT_HINT}"),
    "symmetric text": (llmc({"symmetric": "yes"}), "quant.weight.symmetric: 'yes' is not true or false"),
    "algorithm": (llmc(method="OmniQuant"), f"quant.method: graphq has no algorithm omniquant; {NEAREST['omniquant']}"),
    "calibration": (llmc(method="Awq"), "calibration: none given, but the spec asks for awq"),
    "cache": (
        INT8 | {"cache": "int8/token/dynamic"},
        "cache: int8/token/dynamic: this model has no key/value cache; leave it out of the spec",
    ),
    "no dialect": (
        {"bits": 4},
        (
            "no dialect is recognised; looked for native: a top-level key graphq; llmc: a top-level quant with method or "
            "weight, or quant or sparse beside base and model; llm-compressor: a key that ends in _stage, _modifiers or "
            "Modifier, or a quantization_config with quant_method compressed-tensors; amct: a top-level quant_cfg; "
            "modelslim: a top-level apiversion, model_quant_type, or <layer>.weight with a type such as W8A8"
        ),
    ),
    "number": (4, "a spec is a path, a preset's name, a mapping or a Spec, not 4"),
    "none": (None, "spec: none given; give one, or a profile, such as ort-cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECS)
def test_specs(case):
    spec, problem = SPECS[case]
    with pytest.raises(SpecError) as caught:
        graphq.compile(Blocks(), spec, inputs=X)
    assert caught.value.problems == (problem,)


def test_all_problems_at_once():
    rules = [{"match": "donw", "float": True}, {"match": "up#5", "weight": "int8/channel"}]
    with pytest.raises(SpecError) as caught:
        graphq.compile(Blocks(), {"graphq": 1, "rules": rules}, inputs=X)
    assert [p.partition(":")[0] for p in caught.value.problems] == ["rules[0]", "rules[1]"]


def test_options():
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"dialect": "llcm"},
            "'llcm' is not a dialect; did you mean llmc? (known: native, llmc, llm-compressor, amct, modelslim)",
        ),
        ({"algorithm": "gptq"}, "algorithm: 'gptq' is not rtn; other algorithms stand in the spec"),
    ]
    for options, problem in cases:
        with pytest.raises(SpecError) as caught:
            graphq.compile(Blocks(), INT8, inputs=X, **options)
        assert caught.value.problems == (problem,)


def test_an_algorithm_that_graphq_lacks_can_be_explained_and_rounded():
    spec = llmc(method="OmniQuant")
    assert "quant.method: algorithm omniquant" in graphq.explain(Blocks(), spec, inputs=X).notes
    rounded = graphq.compile(Blocks(), spec, inputs=X, algorithm="rtn")
    assert [bool(layer.weight) for layer in rounded.report.layers] == [True] * 4 + [False]
    explained = graphq.explain(Blocks(), INT8 | {"cache": "int8/token/dynamic"}, inputs=X)
    assert (
        "compile refuses: cache: int8/token/dynamic: this model has no key/value cache; leave it out of the spec"
        in explained.notes
    )


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "{}: the file is empty"),
        ("graphq: 1\nweight: !!python/object/apply:os.system [ls]\n", "{}:2: tags are not read: 'tag:yaml.org,2002:python/object/apply:os.system'\n"),
        ("a: &a [x, x]\n" + "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdef", "bcdefg", strict=True)), "{}:5:e: more than 10,000 values, aliases expanded\n"),
        ("quant: {method: SpQR, weight: {bit: 8, symmetric: true, granularity: per_channel}}\n", "quant.method (line 1): graphq has no algorithm spqr; near is gptq"),
        ("graphq: 1\nweight: int8/channel\nbits: 4\n", "{}:3:bits: unknown key"),
    ],
)  # fmt: skip
def test_files_through_the_command_line(tmp_path, text, problem):
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    result = run("compile", tmp_path / "no-model", "--spec", file, "--target", "torch", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(problem.format(file))
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_missing_file_through_the_command_line(tmp_path):
    result = run("explain", tmp_path, "--spec", tmp_path / "spec.yaml")
    assert (result.exit_code, result.stderr) == (1, f"{tmp_path}/spec.yaml: no such file\n")


BATCH = "calibration: batch"
BATCHES: dict[str, tuple[Any, str]] = {
    "none": (
        None,
        "calibration: none given, but blocks.0.up, blocks.0.down, blocks.1.up and 1 more ask for static activation scales",
    ),
    "empty": ([], "calibration: no batches; static scales need at least one"),
    "a used-up generator": ((x for x in ()), "calibration: no batches; static scales need at least one"),
    "width": ([X, X[:, :5]], f"{BATCH} 1: x has shape (5, 5), expected (batch = 5, 8)"),
    "rank": ([X[0]], f"{BATCH} 0: x has shape (8,), expected (batch, 8)"),
    "dtype": ([X.long()], f"{BATCH} 0: x is torch.int64, the model takes torch.float32"),
    "not a tensor": ([X.tolist()], f"{BATCH} 0: 5 tensors, the model takes 1: x"),
    "name": ([{"y": X}], f"{BATCH} 0: the model has no input y; it takes x"),
    "a text": (["text"], f"{BATCH} 0: a str is not a batch; give a tensor, a tuple or a dict of tensors"),
    "a tensor for a list": (X, "calibration: a Tensor; give a list of tensors, tuples or dicts"),
    "a dict for a list": ({"x": X}, "calibration: a dict; give a list of tensors, tuples or dicts"),
    "a path": ("data.txt", "calibration: a str; give a list of tensors, tuples or dicts"),
    "a number": (3, "calibration: a int; give a list of tensors, tuples or dicts"),
    "NaN": ([X, X / 0 * 0], f"{BATCH} 1: the input of blocks.0.up holds NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", BATCHES)
def test_calibration(case):
    batches, problem = BATCHES[case]
    with pytest.raises(SpecError) as caught:
        graphq.compile(Blocks(), STATIC, inputs=X, calibration=batches)
    assert caught.value.problems == (problem,)


def test_calibration_without_rows():
    with pytest.raises(SpecError) as caught:
        graphq.compile(Blocks(), STATIC, inputs=X, calibration=[X, X[:0]])
    assert caught.value.problems == ("calibration: batch 1: x has shape (0, 8): batch is 0",)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_numbers(value):
    model = Blocks()
    with torch.no_grad():
        model.blocks[1].down.weight[3, 4] = value  # type: ignore[union-attr]
    with pytest.raises(GraphError, match=r"^blocks\.1\.down: the weight holds NaN or Inf$"):
        graphq.compile(model, INT8, inputs=X)


@pytest.mark.parametrize(
    ("name", "where"),
    [("blocks.0.up.bias", "a quantized layer's bias"), ("head.weight", "a float layer"), ("gain", "")],
)
@pytest.mark.parametrize("consume", [False, True])
def test_other_tensors_that_are_not_numbers(name: str, where: str, consume: bool):
    class WithGain(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))
            self.register_buffer("mask", torch.tensor([0, -torch.inf, 0, 0]))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain + self.get_buffer("mask")

    model = WithGain()
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            model.get_parameter(name).flatten()[1] = value
        with pytest.raises(GraphError, match=f"^{name.replace('.', '[.]')}: the tensor holds NaN or Inf$"):
            graphq.compile(model, INT8, inputs=X, consume=consume)
    with torch.no_grad():
        model.get_parameter(name).nan_to_num_(0, 0)
    assert graphq.compile(model, INT8, inputs=X).report.layers  # the mask may hold -inf


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_weights_of_dtypes_that_cannot_be_quantized(dtype: torch.dtype):
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8).to(dtype), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            if dtype.is_complex:
                return nn.functional.linear(x.to(dtype), self.weight).real
            return nn.functional.linear(x, self.weight.float())

    message = f"^0: the weight is {dtype}; graphq quantizes float64, float32, bfloat16, float16$"
    with pytest.raises(GraphError, match=message):
        graphq.compile(nn.Sequential(Stored()), INT8, inputs=X)
    kept = native(match="*", float=True)
    assert graphq.compile(nn.Sequential(Stored()), kept, inputs=X).report.layers[0].weight is None


@pytest.mark.parametrize("seed", [1 << 64, -(1 << 63) - 1, 10**30, 1.5])
def test_seeds(seed: Any):
    with pytest.raises(
        SpecError, match=f"^seed: {seed} is not an integer from -2\\^63 to 2\\^64 - 1$".replace("+", "[+]")
    ):
        graphq.compile(Blocks(), INT8, inputs=X, seed=seed)
    for good in ((1 << 64) - 1, -(1 << 63)):
        assert graphq.compile(MLP(), INT8, inputs=X, seed=good).seed == good


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_dtypes(dtype: Any):
    message = f"^dtype: {dtype!r} is not a floating-point dtype of torch, such as torch.bfloat16$"
    with pytest.raises(SpecError, match=message):
        graphq.compile(Blocks(), INT8, inputs=X, dtype=dtype)


def test_calibration_with_unknown_tokens(capsys: pytest.CaptureFixture[str]):
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 4))
    good, bad = torch.full((3, 4), 15), torch.full((3, 4), 16)
    with pytest.raises(SpecError, match=r"^calibration: batch 1: the model fails on it: index out of range in self$"):
        graphq.compile(model, STATIC, inputs=good, calibration=[good, bad])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("case", ["unknown layer", "no calibration", "NaN"])
def test_a_model_that_is_not_compiled_is_not_consumed(case: str):
    model = Blocks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if case == "NaN":
        model.head.bias.data[0] = before["head.bias"][0] = torch.nan
    spec = {"unknown layer": native(match="nope", weight="int8/channel"), "no calibration": STATIC}.get(case, INT8)
    with pytest.raises((SpecError, GraphError)):
        graphq.compile(model, spec, inputs=X, consume=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
    model.head.bias.data[0] = 0
    graphq.compile(model, INT8, inputs=X, consume=True)
    assert model.head.weight.shape == (0,)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.gate = MLP(), Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.mlp(x))


class Slicing(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"x": [x, slice(2)]}


LINE = Branch.forward.__code__.co_firstlineno + 1
MODELS: dict[str, tuple[Any, Any, str]] = {
    "a number": (3, None, "model: a int is neither a module nor the path of a model directory"),
    "none": (None, X, "model: a NoneType is neither a module nor the path of a model directory"),
    "a class": (Blocks, X, "model: a type is neither a module nor the path of a model directory"),
    "no inputs": (Blocks(), None, "inputs: Blocks is not a transformers model; pass example inputs of its forward"),
    "empty inputs": (Blocks(), (), "inputs: none given; pass example inputs of Blocks.forward as a tuple or dict"),
    "too many inputs": (Blocks(), (X, X), "inputs: 2 given, Blocks.forward takes 1: x"),
    "unknown input": (Blocks(), {"z": X}, "inputs: Blocks.forward has no argument z; it takes x"),
    "no tensor": (Blocks(), (3,), "inputs: x is a int; graphs take tensors"),
    "branch": (
        Branching(),
        X,
        (
            f"gate ({__file__}:{LINE}: if x.sum() > 0:): the path taken depends on the values of a tensor, "
            "which a graph cannot hold"
        ),
    ),
    "outputs": (
        Slicing(),
        X,
        "Slicing: output x.1 is a slice; outputs must be tensors, or tuples, lists, dicts and dataclasses of them",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case, capfd):
    model, inputs, problem = MODELS[case]
    with pytest.raises(GraphError) as caught:
        graphq.compile(model, INT8, inputs=inputs)
    assert str(caught.value) == problem
    assert capfd.readouterr() == ("", "")  # torch's own words are held back


def test_calling_a_compiled_model():
    made = graphq.compile(Blocks(), INT8, inputs=X)
    wrong: list[tuple[type[Exception], tuple[Any, ...], dict[str, Any], str]] = [
        (TypeError, (X,), {"z": X}, "forward() was captured without the argument z; it takes x"),
        (TypeError, (), {"y": X}, "forward() was captured without the argument y; it takes x"),
        (TypeError, (X, X), {}, "forward() takes 1 inputs, 2 were given: x"),
        (TypeError, (X,), {"x": X}, "forward() got x twice, by position and by name"),
        (SpecError, (), {}, "inputs: none given; the model takes x"),
        (SpecError, (X[:, :3],), {}, "inputs: x has shape (5, 3), expected (batch = 5, 8)"),
        (SpecError, (X.long(),), {}, "inputs: x is torch.int64, the model takes torch.float32"),
        (SpecError, ("text",), {}, "inputs: x is a str, not a tensor"),
    ]
    for kind, args, kwargs, problem in wrong:
        with pytest.raises(kind) as caught:
            made(*args, **kwargs)
        assert str(caught.value) == problem
    with pytest.raises(
        TargetError, match=r"^tflite: no such target; there are torch, onnx, compressed-tensors, ascend$"
    ):
        made.emit("tflite", "nowhere")
    with pytest.raises(graphq.GraphqError, match=r"^generate: this model is not a causal language model captured with"):
        made.generate(X)


WRITES = """
import os, random, signal, sys, time
import torch
import graphq
from tests.models import Blocks

torch.set_num_threads(1)
target, out = sys.argv[1:]
x = torch.ones(2, 8)
made = [graphq.compile(Blocks(), {"graphq": 1, "weight": w}, inputs=x) for w in ("int4/channel", "int8/channel")]
made[0].emit(target, out)
start = time.monotonic()
made[1].emit(target, out, overwrite=True)
took = time.monotonic() - start
draw = random.Random(0)
for trial in range(20):
    writer = os.fork()
    if not writer:
        for _ in range(1000):
            for one in made:
                one.emit(target, out, overwrite=True)
        os._exit(0)
    time.sleep(draw.uniform(0, 3 * took))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    print(graphq.verify(out).ok, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_whenever_a_writer_is_killed_the_old_artifact_stands_or_the_new(tmp_path, target):
    command = [sys.executable, "-c", WRITES, target, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"] * 20, done.stderr


KILLED = """
import sys, time
import torch
import graphq
from graphq.artifacts import manifest
from tests.models import Blocks

def stop(*_):
    print("writing", flush=True)
    time.sleep(60)

manifest.write = stop  # the last file of an artifact
x = torch.ones(2, 8)
made = graphq.compile(Blocks(), {"graphq": 1, "weight": "int4/channel"}, inputs=x)
made.emit(sys.argv[1], sys.argv[2], overwrite=True)
"""


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_a_killed_compiler_leaves_the_artifact_that_stood_there(tmp_path, target):
    out = tmp_path / "out"
    graphq.compile(Blocks(), INT8, inputs=X).emit(target, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    command = [sys.executable, "-c", KILLED, target, str(out)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        (unfinished,) = tmp_path.glob(".out.*.partial")
        assert any(unfinished.iterdir())
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert graphq.verify(out).ok
    made = graphq.compile(Blocks(), INT8, inputs=X)
    with pytest.raises(TargetError, match=r"out: exists; choose another place, or overwrite it \(--overwrite\)$"):
        made.emit(target, out)
    made.emit(target, out, overwrite=True)
    assert graphq.verify(out).ok
