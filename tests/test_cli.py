"""The command line: what is printed where, exit statuses, and that artifacts come out and go in."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphq
from graphq.cli import app
from graphq.cli.printing import print_report
from graphq.errors import GraphError, PassError, SpecError, TargetError
from graphq.spec.algorithms import ALGORITHMS
from tests.checkpoints import save_checkpoint, text

WEIGHTS = "graphq: 1\nweight: int4/asym/g16\n"
STATIC = "graphq: 1\nweight: int8/channel\ninput: int8/asym/tensor\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def artifacts(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    made = graphq.compile(model, {"graphq": 1, "weight": "int4/asym/g16"})
    made.emit("torch", folder / "torch")
    made.emit("onnx", folder / "onnx")
    made.emit("onnx", folder / "onnx-no-cache", cache=False)
    return folder


@pytest.fixture
def spec(tmp_path) -> Path:
    (tmp_path / "spec.yaml").write_text(WEIGHTS)
    return tmp_path / "spec.yaml"


def graphq_(*args: object, status: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == status, (result.stdout, result.stderr, result.exception)
    if status:
        assert "Traceback" not in result.stderr
    return result


def test_help_names_the_commands_and_imports_nothing_heavy():
    code = "import sys, graphq.cli as c\ntry: c.main()\nfinally: print([m for m in ('torch','transformers','onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("compile", "explain", "dump", "eval", "diff", "report", "inspect", "verify", "lint"):
        assert f"\n  {command}  " in done.stdout
        assert "--debug" in graphq_(command, "-h").stdout


def test_the_package_is_the_command():
    def run(*args: str) -> Any:
        return subprocess.run([sys.executable, "-m", "graphq", *args], capture_output=True, text=True, check=False)

    assert run("--version").stdout == graphq_("--version").stdout
    wrong = run("nosuch")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("Usage: python -m graphq ")


def test_version():
    names = ("graphq", "torch", "transformers", "onnxruntime")
    assert graphq_("--version").stdout == "".join(f"{name} {version(name)}\n" for name in names)
    code = "import sys, graphq.cli as c\ntry: c.main()\nfinally: print([m for m in ('torch','transformers','onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "args",
    [
        ["explain", "m"],
        ["explain"],
        ["nosuch"],
        ["compile", "m", "--spec", "w4a16", "--out", "o"],
        ["compile", "m", "--spec", "s", "--out", "o", "--target", "tflite"],
        ["compile", "m", "--spec", "s", "--out", "o", "--target", "torch", "--algorithm", "gptq"],
        ["compile", "m", "--spec", "s", "--out", "o", "--target", "torch", "--samples", "0"],
        ["compile", "m", "--spec", "s", "--out", "o", "--target", "torch", "--sequence-length", "1"],
        ["eval", "m", "--windows", "0"],
        ["verify"],
    ],
)
def test_wrong_usage(args):
    result = graphq_(*args, status=2)
    assert "Usage:" in result.stderr
    assert result.stdout == ""


def test_explain_reads_the_configuration_alone(model, spec, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    result = graphq_("explain", bare, "--spec", spec, "--json")
    found = json.loads(result.stdout)["layers"]
    assert [layer["layer"] for layer in found] == [
        "model.embed_tokens",
        *(f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"),
        *(f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")),
        "lm_head",
    ]
    weight = {"format": "int4", "symmetric": False, "granularity": "group", "group_size": 16, "dynamic": False}
    for layer in found[1:-1]:
        assert layer["weight"] == layer["weight"] | weight | {"divisor": None}
        assert (layer["input"], layer["rule"], layer["source"]) == (None, "blocks", "weight (line 2)")
    for layer in (found[0], found[-1]):
        assert (layer["weight"], layer["input"], layer["rule"]) == (None, None, "")


def test_explain_as_a_table(model, spec):
    lines = graphq_("explain", model, "--spec", spec, "--dialect", "native").stdout.splitlines()
    assert lines[0].split() == ["layer", "weight", "input", "rule", "bytes", "why", "float"]
    assert lines[2].split()[:3] == ["model.layers.0.self_attn.q_proj", "int4/asym/g16", "float"]


def test_explain_says_what_compile_refuses(model, spec):
    spec.write_text("graphq: 1\nweight: int8/channel\ncache: int16/token/dynamic\nalgorithms: [nosuch]\n")
    cannot = "a cache holds integers of up to 8 bits, or floats such as float8_e4m3fn"
    refused = [
        f"note: compile refuses: algorithms[0] (line 4): graphq has no algorithm nosuch; there are {', '.join(ALGORITHMS)}",
        f"note: compile refuses: cache: int16/token/dynamic: {cannot}",
    ]
    assert graphq_("explain", model, "--spec", spec).stdout.splitlines()[-2:] == refused
    shown = graphq_("explain", model, "--spec", spec, "--json")
    assert shown.stderr.splitlines()[-2:] == refused
    assert json.loads(shown.stdout)["activations"] is None
    command = ("compile", model, "--spec", spec, "--target", "torch", "--out", spec.parent / "o")
    stderr = graphq_(*command, status=1).stderr
    assert stderr.splitlines() == [line.removeprefix("note: compile refuses: ") for line in refused]
    with_rtn = graphq_(*command, "--algorithm", "rtn", status=1).stderr
    assert with_rtn == refused[1].removeprefix("note: compile refuses: ") + "\n"


def test_explain_says_what_a_target_cannot_hold(model, spec):
    spec.write_text("graphq: 1\nrules:\n  - {match: down_proj, weight: int4/channel, input: int8/token/dynamic}\n")
    shown = graphq_("explain", model, "--spec", spec, "--target", "ascend").stdout.splitlines()
    assert shown[-1] == (
        "note: compile refuses: ascend: model.layers.0.mlp.down_proj: int4/channel (W4A8_DYNAMIC): vLLM-Ascend loads it in"
        " no linear; write int8/channel with int8/token/dynamic (W8A8_DYNAMIC), or say consumer=any (rules[0] (line 3))"
    )
    command = ("explain", model, "--spec", spec, "--target", "ascend")
    for asked in (("--for", "any"), ("--option", "consumer=any")):
        assert "refuses" not in graphq_(*command, *asked).stdout
    spec.write_text(spec.read_text() + "run: {target: ascend}\n")  # which is taken where none is given
    assert shown[-1] in graphq_("explain", model, "--spec", spec).stdout.splitlines()
    assert "refuses" not in graphq_("explain", model, "--spec", spec, "--for", "any").stdout
    assert "--option" in graphq_("explain", model, "--spec", WEIGHTS, "--option", "tp=2", status=2).stderr
    assert "--for" in graphq_("explain", model, "--spec", WEIGHTS, "--for", "any", status=2).stderr
    assert "--target" in graphq_(*command, "--diff", "w4a16", status=2).stderr
    wrong = graphq_(*command, "--option", "layout=v2", status=1).stderr
    assert wrong == "ascend: layout: 'v2' is not one of v1, v0\n"


def test_explain_says_what_a_server_has_no_kernel_for(model, spec):
    spec.write_text("graphq: 1\nrules:\n  - {match: down_proj, weight: int3/g16}\n")
    explained = ("explain", model, "--spec", spec, "--target", "compressed-tensors")
    assert graphq_(*explained).stdout.splitlines()[-1] == (
        "note: compile refuses: compressed-tensors: model.layers.0.mlp.down_proj: int3/g16: vLLM has kernels for packed"
        " weights of 4 and 8 bits; write int4, or say consumer=any (rules[0] (line 3))"
    )
    assert "refuses" not in graphq_(*explained, "--for", "any").stdout
    assert graphq_("explain", model, "--spec", spec, "--target", "nosuch", status=1).stderr.startswith(
        "nosuch: no such target; there are torch, onnx, compressed-tensors"
    )


def test_an_artifact_is_no_model(artifacts, spec):
    for target in ("torch", "onnx"):
        place = artifacts / target
        message = f"{place}: a graphq artifact, which is quantized already; give the model that it was made of\n"
        assert graphq_("explain", place, "--spec", spec, status=1).stderr == message
        command = ("compile", place, "--spec", spec, "--target", "torch", "--out", spec.parent / "o")
        assert graphq_(*command, status=1).stderr == message


def test_explain_in_a_terminal(model, spec, monkeypatch):
    report = graphq.explain(model, spec)
    monkeypatch.setattr("graphq.cli.printing.sys.stdout", type("Terminal", (), {"isatty": lambda _: True})())
    printed: list[Any] = []
    monkeypatch.setattr("rich.console.Console.print", lambda _, x: printed.append(x))
    print_report(report, as_json=False)
    assert [column.header for column in printed[0].columns] == list(report.table()[0])
    assert printed[0].row_count == len(report.layers)
    assert [str(note) for note in printed[1:]] == [f"note: {note}" for note in report.notes]


def test_compile_writes_an_artifact_and_prints_the_report(model, spec, tmp_path):
    out = tmp_path / "out"
    result = graphq_("compile", model, "--spec", spec, "--target", "torch", "--out", out, "--json")
    given = json.loads(result.stdout)
    report, rows = given["layers"], given["phases"]
    phases = [row["phase"] for row in rows]
    assert [phases[0], *phases[-2:]] == ["capture", "finish", "emit torch"]
    assert "quantize-weights" in phases
    assert all(row["seconds"] >= 0 and row["peak_bytes"] > 1e8 for row in rows)
    assert re.search(r"(?m)^in all +\d+\.\d s  \d+\.\d\d GB at most$", result.stderr)
    assert [bool(layer["weight"]) for layer in report] == [False, *[True] * 7, False]
    assert all(layer["sqnr_db"] > 10 for layer in report if layer["weight"])
    assert result.stderr.splitlines()[-1] == f"{out}: torch artifact, 7 of 9 layers quantized"
    ids = torch.arange(6).reshape(1, 6)
    expected: Any = graphq.compile(model, spec)(input_ids=ids)
    assert torch.equal(graphq.load(out)(input_ids=ids)["logits"], expected["logits"])
    assert (out / "tokenizer.json").is_file()

    before = (out / "graphq.json").stat().st_ino
    again = ("compile", model, "--spec", spec, "--target", "torch", "--out", out)
    advice = "exists; choose another place, or overwrite it (--overwrite)"
    assert graphq_(*again, status=1).stderr == f"{out}: {advice}\n"
    assert (out / "graphq.json").stat().st_ino == before
    assert graphq_(*again, "--overwrite").stdout.splitlines()[0].startswith("layer ")
    assert (out / "graphq.json").stat().st_ino != before


def test_nobody_elses_files_are_overwritten(model, spec, tmp_path):
    """The place is looked at before the model: here is none."""
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "graphq.json").write_text("{}")
    command = ("compile", tmp_path / "no-model", "--spec", spec, "--target", "torch", "--overwrite", "--out")
    problem = "graphq.json is not the manifest of a graphq artifact with its files; it is not overwritten"
    assert graphq_(*command, project, status=1).stderr == f"{project}: {problem}\n"
    assert (project / "src").is_dir()
    assert graphq_(*command, spec / "a", status=1).stderr == f"{spec}/a: {spec} is not a directory\n"


@pytest.mark.parametrize("held", ["model", "spec", "calibration"])
def test_what_is_compiled_is_not_overwritten(model, artifacts, spec, tmp_path, held):
    out = Path(shutil.copytree(artifacts / "torch", tmp_path / "out"))
    (tmp_path / "texts").write_text(text(300))
    given = {"model": Path(shutil.copytree(model, tmp_path / "m")), "spec": spec, "calibration": tmp_path / "texts"}
    given[held] = given[held].rename(out / "mine")
    args = ("--spec", given["spec"], "--target", "torch", "--calibration", given["calibration"])
    result = graphq_("compile", given["model"], *args, "--out", out, "--overwrite", status=1)
    assert result.stderr == f"{out}: holds {out}/mine, which is read from; choose another place\n"
    assert (out / "mine").exists()
    if held == "model":
        listed = json.loads((out / "graphq.json").read_text())
        listed["files"] |= {f"mine/{file.name}": "" for file in (out / "mine").iterdir()}
        (out / "graphq.json").write_text(json.dumps(listed))
        with pytest.raises(TargetError, match="which is read from"):
            graphq.compile(out / "mine", spec).save(out, overwrite=True)


def test_compile_calibrates_on_text(model, spec, tmp_path):
    """A directory's files in their order, hidden ones left out; as many windows as were asked for."""
    spec.write_text(STATIC)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text("w90 " * 40)
    (tmp_path / "texts" / "a.txt").write_text(text(30))
    (tmp_path / "texts" / ".hidden").write_bytes(b"\xff")
    command = ("compile", model, "--spec", spec, "--target", "torch", "--sequence-length", 10, "--samples", 3)
    graphq_(*command, "--calibration", tmp_path / "texts", "--out", tmp_path / "a")
    graphq_(*command, "--calibration", tmp_path / "texts" / "a.txt", "--out", tmp_path / "b")
    windows = [torch.tensor([[0, *ids]]) for ids in ([_id(i) for i in range(9)],)]
    windows += [torch.tensor([[_id(i) for i in range(start, start + 10)]]) for start in (9, 19)]
    graphq.compile(model, spec, calibration=windows).save(tmp_path / "c")
    tensors = [json.loads((tmp_path / n / "graphq.json").read_text())["tensors"] for n in "abc"]
    assert tensors[0] == tensors[1] == tensors[2]
    graphq_(*command, "--calibration", tmp_path / "texts" / "b.txt", "--out", tmp_path / "d")
    assert json.loads((tmp_path / "d" / "graphq.json").read_text())["tensors"] != tensors[0]


def _id(i: int) -> int:
    return 2 + (i * i + 3 * i) % 98


def test_calibration_that_cannot_be_used(model, spec, tmp_path):
    spec.write_text(STATIC)
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "short").write_text("w1 w2")
    (tmp_path / "binary").write_bytes(b"w1 w2 \xff")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    cases = [
        ("empty", "{}: empty"),
        ("short", "{}: 3 tokens do not fill a window of 256"),
        ("binary", "{}: not UTF-8 text: invalid start byte at byte 6"),
        ("folder", "{}: holds no files to calibrate on"),
        ("nothing", "{}: No such file or directory"),
    ]
    command = ("compile", model, "--spec", spec, "--target", "torch", "--out", tmp_path / "o", "--calibration")
    for name, problem in cases:
        assert graphq_(*command, tmp_path / name, status=1).stderr == problem.format(tmp_path / name) + "\n"
        if name != "folder":
            shown = graphq_("eval", model, "--text", tmp_path / name, status=1).stderr
            assert shown == problem.format(tmp_path / name) + "\n"
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    missing = (
        f"{bare}/tokenizer.json: no such file; a tokenizer is a folder with tokenizer.json and tokenizer_config.json"
    )
    result = graphq_("compile", bare, *command[2:], tmp_path / "short", status=1)
    assert result.stderr == f"{missing}\n"
    assert graphq_("eval", bare, status=1).stderr == f"{missing}\n"
    assert not (tmp_path / "o").exists()


def test_onnx_without_a_cache(model, spec, tmp_path):
    import onnx

    out = tmp_path / "out"
    graphq_("compile", model, "--spec", spec, "--target", "onnx", "--out", out, "--no-cache")
    inputs = [i.name for i in onnx.load(out / "model.onnx").graph.input]
    assert inputs == ["input_ids", "attention_mask", "position_ids"]
    sizes = ("--shape", "batch=2", "--shape", "sequence=5")
    options = ("--option", "cache=false", "--option", "opset=21", "--option", "overwrite=true", *sizes)
    graphq_("compile", model, "--spec", spec, "--target", "onnx", "--out", out, *options)
    written = onnx.load(out / "model.onnx")
    assert [i.name for i in written.graph.input] == inputs
    assert [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in written.graph.input] == [[2, 5]] * 3
    assert [(found.domain, found.version) for found in written.opset_import] == [("", 21)]


@pytest.mark.parametrize(
    ("options", "captured"),
    [
        (["--shape", "batch=1", "--shape", "sequence=128"], {"batch": 1}),
        (["--option", "shapes=batch=1"], {"batch": 1}),
        (["--shape", "batch=2"], None),
        (["--shape", "sequence=128"], None),
        ([], None),
    ],
)
def test_a_batch_of_one_is_one_from_the_start(options, captured, model, spec, tmp_path, monkeypatch):
    """Some models take no other, and calibration has no other."""
    found: dict[str, Any] = {}

    def compile_(*given: Any, **named: Any) -> None:
        found.update(named)
        raise SpecError("that is all")

    monkeypatch.setattr("graphq.compiler.compile", compile_)
    graphq_("compile", model, "--spec", spec, "--target", "onnx", "--out", tmp_path / "o", *options, status=1)
    assert found["shapes"] == captured


@pytest.mark.parametrize(
    ("target", "options", "problem"),
    [
        ("onnx", ["--option", "opset=new"], "onnx: opset: 'new' is not a whole number or null"),
        ("onnx", ["--option", "cache=0"], "onnx: cache: '0' is not true or false"),
        (
            "onnx",
            ["--option", "opset"],
            "onnx: opset: write NAME=VALUE; there are overwrite, cache, opset, bfloat16, profile, shapes",
        ),
        ("torch", ["--option", "opset=21"], "torch: no option opset; there are overwrite"),
        ("torch", ["--no-cache"], "torch: no option cache; there are overwrite"),
        ("onnx", ["--no-cache", "--option", "cache=true"], "onnx: cache: is given twice"),
        ("torch", ["--shape", "batch=1"], "torch: no option shapes; there are overwrite"),
        ("onnx", ["--shape", "batch"], "onnx: shapes: 'batch' is not whole numbers by name or null"),
        (
            "onnx",
            ["--shape", "batch=1", "--shape", "batch=2"],
            "onnx: shapes: 'batch=1,batch=2' is not whole numbers by name or null",
        ),
    ],
)
def test_options_that_a_target_does_not_take(target, options, problem, spec, tmp_path):
    result = graphq_(
        "compile", tmp_path / "m", "--spec", spec, "--target", target, "--out", tmp_path / "o", *options, status=1
    )
    assert result.stderr == f"{problem}\n"


def test_eval_gives_one_number_for_every_form_of_a_model(model, artifacts, tmp_path):
    (tmp_path / "a.txt").write_text(text(50))
    (tmp_path / "b.txt").write_text(text(70))
    texts = ("--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt", "--sequence-length", 12)
    found = {p: graphq_("eval", p, *texts).stdout for p in (model, *sorted(artifacts.iterdir()))}
    for line in found.values():
        assert line.endswith(" (10 windows of 12 tokens)\n")  # 51 + 71 tokens
    numbers = [float(line.split()[1]) for line in found.values()]
    assert 90 < numbers[0] < 200  # of 128 words, by random weights
    assert numbers[0] != numbers[1]
    assert numbers[1:] == pytest.approx([numbers[1]] * 3, rel=1e-4)
    assert graphq_("eval", model, *texts, "--windows", 4).stdout.endswith(" (4 windows of 12 tokens)\n")


def test_eval_reads_the_standard_library_if_no_text_is_given(model):
    line = graphq_("eval", model, "--windows", 2, "--sequence-length", 16).stdout
    assert line.endswith(" (2 windows of 16 tokens)\n")


def test_windows_must_fit_the_model(model, spec, tmp_path):
    (tmp_path / "t").write_text(text(200))
    message = f"{model}: a window of 129 tokens is longer than the 128 that it reads\n"
    length = ("--sequence-length", 129)
    assert graphq_("eval", model, "--text", tmp_path / "t", *length, status=1).stderr == message
    command = ("compile", model, "--spec", spec, "--target", "torch", "--out", tmp_path / "o")
    assert graphq_(*command, "--calibration", tmp_path / "t", *length, status=1).stderr == message
    narrow = save_checkpoint(tmp_path / "narrow", vocab_size=50)
    result = graphq_("eval", narrow, "--text", tmp_path / "t", "--sequence-length", 100, status=1)
    assert result.stderr == f"{narrow}: the tokenizer gives token 98, the model knows 50\n"


def test_eval_refuses_what_predicts_no_tokens(tmp_path):
    bert = save_checkpoint(tmp_path / "bert", "bert")
    message = f"{bert}: BertModel is not a causal language model; it has no perplexity\n"
    assert graphq_("eval", bert, status=1).stderr == message
    graphq.compile(torch.nn.Linear(4, 4), {"graphq": 1, "weight": "int8/channel"}, inputs=torch.ones(2, 4)).save(
        tmp_path / "a"
    )
    message = f"{tmp_path / 'a'}: not a causal language model; it has no perplexity\n"
    assert graphq_("eval", tmp_path / "a", status=1).stderr == message


def test_dump_after_a_pass_needs_no_weights(model, spec, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    shown = graphq_("dump", bare, "--spec", spec, "--after", "annotate").stdout
    plan = "# model.layers.0.mlp.up_proj: weight int4/asym/g16"
    (line,) = [line for line in shown.splitlines() if plan in line]
    assert "aten.linear(%" in line
    assert "@model.layers.0.mlp.up_proj.weight" in line
    assert shown.startswith("%input_ids: i64[batch, sequence] = input\n")
    assert plan not in graphq_("dump", bare, "--spec", spec, "--after", "split-gate-up").stdout
    spec.write_text(STATIC)
    assert "@observers.0(" in graphq_("dump", bare, "--spec", spec, "--after", "observe").stdout
    assert (
        "no weights: expected" in graphq_("dump", bare, "--spec", spec, "--after", "quantize-weights", status=1).stderr
    )


def test_dump_after_the_last_pass(model, spec, tmp_path):
    shown = graphq_("dump", model, "--spec", spec).stdout
    assert "graphq.dequantize(@model.layers.0.mlp.up_proj.weight, @model.layers.0.mlp.up_proj.weight_scale, " in shown
    assert shown == graphq.dump(graphq.compile(model, spec).graph)
    spec.write_text(STATIC)
    assert graphq_("dump", model, "--spec", spec, status=1).stderr.startswith("calibration: none given, but model.")
    (tmp_path / "t").write_text(text(20))
    shown = graphq_("dump", model, "--spec", spec, "--calibration", tmp_path / "t", "--sequence-length", 8).stdout
    assert "graphq.quantize(" in shown


def test_dump_names_the_passes(model, spec):
    message = (
        "anotate: no such pass; there are remove-no-ops, fold-pads, raise-recurrent, fold-weights, raise-linear, "
        "raise-grouped-linear, split-gate-up, annotate, round-to-stored, observe, calibrate, quantize-weights, "
        "quantize-activations\n"
    )
    assert graphq_("dump", model, "--spec", spec, "--after", "anotate", status=1).stderr == message


def test_verify(model, artifacts, tmp_path):
    for target in ("torch", "onnx", "onnx-no-cache"):
        result = graphq_("verify", artifacts / target)
        message = f"{artifacts / target}: 21 tensors of codes, scales and zero points are as they were compiled\n"
        assert result.stdout == message
    assert graphq_("verify", artifacts / "torch", "--against", model).stdout.count("\n") == 1
    changed = Path(shutil.copytree(artifacts / "torch", tmp_path / "changed"))
    data = json.loads((changed / "graphq.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight_scale"
    data["tensors"][name]["sha256"] = "0" * 64
    (changed / "graphq.json").write_text(json.dumps(data))
    result = graphq_("verify", changed, status=1)
    assert result.stdout == f"{name}: differs from its digest in the manifest\n"
    assert result.stderr == f"{changed}: 1 differences from what was compiled\n"
    assert graphq_("verify", model, status=1).stderr == f"{model}: not a graphq artifact: graphq.json is missing\n"


def test_every_problem_of_a_spec_has_its_line(model, spec):
    spec.write_text("graphq: 1\nwieght: int4/channel\nrules:\n  - match: up_proj\n    weight: int9/channel\n")
    assert graphq_("explain", model, "--spec", spec, status=1).stderr == (
        f"{spec}:2:wieght: unknown key; did you mean weight?\n"
        f"{spec}:5:rules[0].weight: bits: 9 is not one of 2 to 8 or 16\n"
    )


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (GraphError("one\ntwo"), 1, "one\ntwo\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (TargetError("a\x1b[2J\ud800\tb\nc\r"), 1, "a\\x1b[2J\\ud800\\tb\nc\\r\n"),
        (PassError("x"), 1, "internal error: x; please report it, with the traceback that --debug shows\n"),
        (
            ValueError("a\nb"),
            1,
            "internal error: ValueError: a; please report it, with the traceback that --debug shows\n",
        ),
        (
            AssertionError(),
            1,
            "internal error: AssertionError: ; please report it, with the traceback that --debug shows\n",
        ),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied\n"),
    ],
)
def test_errors_and_exit_statuses(monkeypatch, error, status, message):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("graphq.explanation.explain", fail)
    result = graphq_("explain", "m", "--spec", "w4a16", status=status)
    assert (result.stdout, result.stderr) == ("", message)
    if status == 1:
        shown = CliRunner().invoke(app, ["explain", "m", "--spec", "w4a16", "--debug"])
        assert shown.exception is error  # which Python prints with its traceback


def test_explain_shows_what_another_spec_changes(model, spec, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(WEIGHTS + "rules:\n  - match: down_proj\n    weight: int8/channel\nalgorithms: [gptq]\n")
    assert graphq_("explain", model, "--spec", spec, "--diff", other).stdout.splitlines() == [
        "algorithms: rtn -> gptq",
        "layer                         before                     after                 rule before               rule after",
        (
            "model.layers.0.mlp.down_proj  int4/asym/g16 x float  ->  int8/channel x float  weight (line 2) (blocks)  "
            "rules[0] (line 4) (down_proj)"
        ),
        "1 layers differ, 8 are planned alike",
    ]
    found = json.loads(graphq_("explain", model, "--spec", spec, "--diff", other, "--json").stdout)
    assert [layer["layer"] for layer in found["layers"]] == ["model.layers.0.mlp.down_proj"]


def test_a_spec_that_names_the_run(model, tmp_path):
    """What the command line does not say, the spec's run says."""
    (tmp_path / "text.txt").write_text(text(200))
    spec = tmp_path / "spec.yaml"
    run = f"run:\n  model: {model}\n  target: torch\n  calibration: {tmp_path / 'text.txt'}\n  samples: 2\n"
    spec.write_text(STATIC + run + "  sequence_length: 8\n  seed: 5\n")
    assert graphq_("explain", "--spec", spec).stdout
    graphq_("compile", "--spec", spec, "--out", tmp_path / "a")
    graphq_("compile", "--spec", spec, "--out", tmp_path / "b", "--samples", "1")
    first, second = (graphq.load(tmp_path / name).state_dict() for name in "ab")
    scales = [name for name in first if name.endswith("input_scale")]
    assert scales
    assert any(not torch.equal(first[name], second[name]) for name in scales)
    assert json.loads((tmp_path / "a" / "graphq.json").read_text())["seed"] == 5
    graphq_("compile", model, "--spec", "w8a16", "--out", tmp_path / "c", status=2)
    graphq_("compile", "--spec", "w8a16", "--target", "torch", "--out", tmp_path / "c", status=2)
    spec.write_text(WEIGHTS + f"run:\n  model: {model}\n  target: tflite\n")
    wrong = graphq_("compile", "--spec", spec, "--out", tmp_path / "c", status=1)
    assert wrong.stderr == "tflite: no such target; there are torch, onnx, compressed-tensors, ascend\n"


def test_spec_convert(tmp_path):
    config = Path(__file__).parents[1] / "examples" / "configs" / "llmc" / "w8a8_static.yaml"
    shown = graphq_("spec", "convert", config, "--to", "native")
    assert graphq.load_spec(shown.stdout) == graphq.load_spec(config)
    graphq_("spec", "convert", "w4a16+gptq", "--to", "native", "--out", tmp_path / "made.yaml")
    made = (tmp_path / "made.yaml").read_text()
    assert graphq.load_spec(tmp_path / "made.yaml") == graphq.load_spec("w4a16+gptq")
    refused = graphq_("spec", "convert", "w8a8", "--to", "native", "--out", tmp_path / "made.yaml", status=1)
    assert refused.stderr == f"{tmp_path / 'made.yaml'}: exists; choose another place, or overwrite it (--overwrite)\n"
    assert (tmp_path / "made.yaml").read_text() == made
    graphq_("spec", "convert", "w8a8", "--to", "native", "--out", tmp_path / "made.yaml", "--overwrite")
    assert graphq.load_spec(tmp_path / "made.yaml") == graphq.load_spec("w8a8")
    assert [file.name for file in tmp_path.iterdir()] == ["made.yaml"]
    wrong = graphq_("spec", "convert", "w8a8", "--to", "ollm", status=1)
    assert wrong.stderr.startswith("'ollm' is not a dialect; did you mean llmc? (known: native, llmc")


def test_spec_presets():
    assert "w4a16         int4/g128               float" in graphq_("spec", "presets").stdout.splitlines()


def test_explain_takes_a_spec_for_a_target_that_graphq_lacks(model, tmp_path):
    """Such configs are shipped by LLMC and msModelSlim; only what writes the artifact needs the target."""
    file = tmp_path / "autoawq.yaml"
    weight = "{bit: 4, symmetric: false, granularity: per_group, group_size: 16}"
    file.write_text(f"quant: {{method: RTN, weight: {weight}}}\nsave: {{save_autoawq: true}}\n")
    assert "int4/asym/g16" in graphq_("explain", model, "--spec", file).stdout
    refused = graphq_("compile", model, "--spec", file, "--out", tmp_path / "out", status=1)
    assert "autoawq" in refused.stderr
