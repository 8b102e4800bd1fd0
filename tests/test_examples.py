"""The examples do what they say: each runs in an empty directory, and its output is read."""

import concurrent.futures
import dataclasses
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from graphq.checks import refusals
from graphq.frontends import load_spec, print_spec

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the ``main`` of an example prints in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: Any) -> str:
        runpy.run_path(str(EXAMPLES / name))["main"](*arguments)
        return capsys.readouterr().out

    return run


def run_alone(directory: Path, name: str) -> str:
    """What an example prints in a process of its own, in ``directory``; it fails after five minutes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(EXAMPLES.parent)
    if "PYTEST_XDIST_WORKER" in os.environ:
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=directory,
        env=environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def made(directory: Path) -> list[str]:
    """The directories with files that an example left behind."""
    return sorted({str(file.parent.relative_to(directory)) for file in directory.rglob("*") if file.is_file()})


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("configs/*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_configs(path: Path) -> None:
    spec = load_spec(path)
    assert spec.dialect == path.parent.name
    assert spec.dialect != "native" or spec.notes == ()
    assert any("weight: " in line for line in print_spec(spec).splitlines())


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("configs/*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_configs_say_what_compile_refuses(path: Path) -> None:
    spec = load_spec(path)
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    expected = ["# For `graphq explain`: "] if refusals(spec) else []
    if refusals(dataclasses.replace(spec, algorithms=())):
        expected = ["# For `graphq explain` alone: "]
    assert [line[: line.index(":") + 2] for line in comments if "`graphq explain`" in line] == expected


def check_demo(printed: str) -> dict[str, tuple[float, float]]:
    """Weight bytes (in millions) and perplexity of each row, after all other claims of the output were checked."""
    rows = re.findall(
        r"^(source|torch|onnx), [a-zA-Z0-9 (*)]+? +(\d+\.\d+) +(\d+\.\d+) +\d+\.\d$", printed, re.MULTILINE
    )
    found = {name: (float(megabytes), float(perplexity)) for name, megabytes, perplexity in rows}
    assert list(found) == ["source", "torch", "onnx"]
    assert found["torch"][0] < 0.65 * found["source"][0]
    assert found["onnx"][0] < 0.65 * found["source"][0]
    assert 1.005 < found["torch"][1] / found["source"][1] < 1.03
    assert found["onnx"][1] == pytest.approx(found["torch"][1], rel=1e-4)
    assert "the 36 quantized layers alone: 8.65 in bfloat16, 2.53 now" in printed
    assert "\n... 36 more: graphq explain " in printed  # of 44 layers, 8 are shown; notes are no layers
    plan = printed[printed.index("\nlayer ") :]
    assert re.search(
        r"^model.layers.0.self_attn.q_proj +int4/asym/g128 +float .*quant .*35328 +\d\d\.\d +\w.*$", plan, re.MULTILINE
    )
    assert re.search(r"^model.layers.0.self_attn.o_proj +float +float .*mix_bits.setting_1", plan, re.MULTILINE)
    assert re.search(r"^model.layers.0.mlp.down_proj +int8/asym/g128 +float .*mix_bits.setting_0", plan, re.MULTILINE)
    return found


def test_demo_on_8_windows(run: Callable[..., str], tmp_path: Path) -> None:
    check_demo(run("demo.py", 8))
    assert made(tmp_path) == ["build/demo/onnx", "build/demo/torch"]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    found = check_demo(run_alone(tmp_path, "demo.py"))
    assert found["source"][1] == pytest.approx(13.408, rel=0.01)  # another patch release of Python has another text


def check_deploy_torch(printed: str, directory: Path) -> None:
    files = "config.json, generation_config.json, graph.json, graphq.json, model.safetensors, tokenizer.json, tokenizer_config.json"
    assert f"build/deploy_torch: {files}\n" in printed
    assert "\ndef main(argv=None):\n    parser = argparse.ArgumentParser(" in printed
    assert printed.endswith("the same text from the compiled model: True\n")
    assert made(directory) == ["build/deploy_torch"]


def test_deploy_torch(run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread takes the place of the fresh process, which ``tests/lowering/torch/test_module.py`` has, too."""
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", lambda count, _: ThreadPoolExecutor(count))
    check_deploy_torch(run("deploy_torch.py"), tmp_path)


@pytest.mark.slow
def test_deploy_torch_from_a_fresh_process(tmp_path: Path) -> None:
    check_deploy_torch(run_alone(tmp_path, "deploy_torch.py"), tmp_path)


def test_export_onnx(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("export_onnx.py")
    assert (
        "inputs: input_ids, attention_mask, position_ids, past_key_values.0.key, past_key_values.0.value, ... (15 in all)"
        in printed
    )
    different = re.search(r"^largest difference of a logit: (\d+\.\d+)%", printed, re.MULTILINE)
    equal = re.search(r"^the same next token: (\d+\.\d+)% of 1024$", printed, re.MULTILINE)
    assert different is not None
    assert 0 < float(different[1]) < 10
    assert equal is not None
    assert float(equal[1]) > 95
    perplexity = re.search(
        r"^perplexity on these 4 windows: ([\d.]+), of the QDQ form ([\d.]+)$", printed, re.MULTILINE
    )
    assert perplexity is not None
    assert float(perplexity[1]) == pytest.approx(float(perplexity[2]), rel=0.005)
    assert made(tmp_path) == ["build/export_onnx"]


def test_deploy_ascend(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("deploy_ascend.py")
    for dialect in ("modelslim", "llmc", "native"):
        assert f"build/deploy_ascend/{dialect}: 233 tensors, as compiled: True\n" in printed
    assert "\nthe same tensors from all three: True\n" in printed
    assert "\ntags of weights: {'FLOAT': 24, 'W8A8': 19, 'W8A8_DYNAMIC': 9, 'W4A8_DYNAMIC': 12}\n" in printed
    shapes = {
        "scale_bias": "[256, 16]",
        "weight": "[128, 256]",
        "weight_scale": "[256, 1]",
        "weight_offset": "[256, 1]",
    }
    for part, shape in shapes.items():
        assert re.search(
            rf"^\S+\.experts\.0\.down_proj\.{part} +W4A8_DYNAMIC .*{re.escape(shape)}$", printed, re.MULTILINE
        )
    assert made(tmp_path) == [f"build/deploy_ascend/{name}" for name in ("llmc", "modelslim", "native", "source")]


def test_mixed_bits(run: Callable[..., str], tmp_path: Path) -> None:
    explained, by_plan = run("mixed_bits.py").split("\n\n")
    decided = {line.split()[0]: line.split()[1] for line in explained.splitlines()[1:]}
    assert decided["model.layers.0.mlp.down_proj"] == "int8/asym/g128"
    assert decided["model.layers.1.mlp.down_proj"] == "int4/asym/g128"
    assert decided["model.layers.0.self_attn.o_proj"] == "float"
    assert "model.layers.0.self_attn.o_proj  float           float  mix_bits.setting_1 (line 19) (o_proj)" in explained
    assert re.search(r"^ +34 +2119680 +7864320 +\d\d\.\d dB  int4/asym/g128 x float$", by_plan, re.MULTILINE)
    assert re.search(r"^ +2 +408576 +786432 +4\d\.\d dB  int8/asym/g128 x float$", by_plan, re.MULTILINE)
    assert re.search(r"^ +6 .*float \(mix_bits.setting_1: do_quant False\)$", by_plan, re.MULTILINE)
    assert made(tmp_path) == []


def test_quantize_in_place(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("quantize_in_place.py")
    before, after = (
        float(found)
        for found in re.findall(
            r"^perplexity (?:on 2 windows|with quantized weights): (\d+\.\d+)", printed, re.MULTILINE
        )
    )
    assert 1 < after / before < 1.05
    assert (
        "factors of (256, 768): quantized_weight int8[256, 768], scale_w float32[256, 24], scale_factor bfloat16[1, 768]"
        in printed
    )
    sizes = re.search(r"^the blocks: 9443328 bytes before, (\d+) packed$", printed, re.MULTILINE)
    assert sizes is not None
    assert int(sizes[1]) == pytest.approx(2.97e6, rel=0.01)  # factors of 1 are left out
    assert "the packed model gives the same logits: True\n" in printed
    assert re.search(
        r"^lm_head +float +float +skip_layers\[0\] \(~lm_head\) +1048576 +skip_layers: lm_head$", printed, re.MULTILINE
    )
    assert made(tmp_path) == []


def test_serve_with_vllm(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("serve_with_vllm.py")
    assert "group_0: pack-quantized, 4 bits, 6 targets\ngroup_1: int-quantized, 8 bits, 1 targets\n" in printed
    sizes = re.search(r"^model.safetensors: (\d+) bytes before, (\d+) now$", printed, re.MULTILINE)
    assert sizes is not None
    assert int(sizes[2]) < 0.4 * int(sizes[1])
    assert re.search(r"^'def main\(argv=None\):\\n.{20}", printed, re.MULTILINE)
    assert "vllm serve build/serve_with_vllm --dtype bfloat16\n" in printed
    assert made(tmp_path) == ["build/serve_with_vllm"]


def test_write_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "write_a_pass.py"), run_name="__main__")
    before, changes, after = capsys.readouterr().out.split("\n\n")
    assert "aten.add.Tensor(%2, 1)" in before
    assert changes == "{'remove-round-trips': 1}"
    assert "aten.add.Tensor(%x, 1)" in after
    assert before.count("aten._to_copy") - after.count("aten._to_copy") == 2
    example["test_only_exact_round_trips_go"]()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deploy_ascend.py", "export_onnx.py", "mixed_bits.py", "quantize_in_place.py", "write_a_pass.py"]
)
def test_each_runs_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    assert run_alone(tmp_path, name)
