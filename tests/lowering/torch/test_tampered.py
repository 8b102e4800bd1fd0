"""Artifacts that somebody changed: digests tell, and without them nothing that a file says reads beyond its tensors."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphq
from graphq.errors import TargetError
from tests.lowering.torch import tampering

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tampering.save(tmp_path_factory.mktemp("artifacts") / "a")


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "a"))


# -- digests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["graph.json", "model.safetensors"])
def test_a_changed_file_is_not_loaded(artifact: Path, file: str) -> None:
    data = (artifact / file).read_bytes()
    (artifact / file).write_bytes(data + b" " if file == "graph.json" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(TargetError) as caught:
        graphq.load(artifact)
    assert str(caught.value) == (
        f"{artifact / file}: differs from its digest in graphq.json: damaged, or changed since"
    )
    graphq.load(artifact, verify=False)


def test_a_manifest_without_digests_is_not_trusted(artifact: Path) -> None:
    described = json.loads((artifact / "graphq.json").read_text())
    kept = {"graph.json": described["files"]["graph.json"]}
    for files, unlisted in (({}, "graph.json"), (kept, "model.safetensors")):
        (artifact / "graphq.json").write_text(json.dumps(described | {"files": files}))
        with pytest.raises(TargetError) as caught:
            graphq.load(artifact)
        assert str(caught.value) == f"{artifact / unlisted}: the manifest has no digest of it"


# -- crafted graphs ----------------------------------------------------------------------------------------------------


def call(name: str, target: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"name": name, "op": "call_function", "target": target, "args": list(args), "kwargs": kwargs}


def with_nodes(artifact: Path, *nodes: dict[str, Any]) -> None:
    """The graph with these nodes before its output, which gives the last of them."""
    data = json.loads((artifact / "graph.json").read_text())
    data["nodes"][-1:] = [*nodes, data["nodes"][-1] | {"args": [[{"node": nodes[-1]["name"]}]]}]
    (artifact / "graph.json").write_text(json.dumps(data))


def N(name: str) -> dict[str, str]:  # noqa: N802
    return {"node": name}


INT64 = {"dtype": "int64"}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [
                call("crow", "aten.arange.default", 2, dtype=INT64),
                call("col", "aten.full.default", [1], 10**6, dtype=INT64),
                call("v", "aten.ones.default", [1]),
                call("s", "aten._sparse_csr_tensor_unsafe.default", N("crow"), N("col"), N("v"), [1, 16]),
            ],
            "s: aten._sparse_csr_tensor_unsafe.default is not an op that artifacts may hold",
        ),
        ([call("s", "aten.as_strided.default", N("x"), [9], [9])], "s: aten.as_strided.default is not an op that"),
        ([call("s", "aten.softmax.int", N("x"), 0, 77)], "s: aten.softmax.int: dtype: 77 is not a dtype"),
        ([call("s", "aten.softmax.int", N("x"), 0, N("x"))], "s: aten.softmax.int: dtype: x is not a dtype"),
        ([call("s", "aten.zeros.default", [2], layout=3)], "s: aten.zeros.default: layout: 3 is not a layout"),
        ([call("s", "aten.zeros.default", [2], layout={"torch": "sparse_coo"})], "sparse_coo is not a memory_format"),
        ([call("s", "aten.zeros.default", [2], dtype={"dtype": "qint8"})], "qint8 is not a dtype that artifacts may"),
        ([call("s", "aten.view.dtype", N("x"), {"dtype": "bool"})], "s: aten.view.dtype: bytes are not read as bools"),
        ([call("s", "aten.full.default", [10**12], 0.0)], "s: aten.full.default: makes a tensor of more than 2^31"),
        ([call("s", "aten.new_empty.default", N("x"), [10**6, 10**6])], "s: aten.new_empty.default: makes a tensor of"),
        ([call("s", "aten.arange.default", 10**12)], "s: aten.arange.default: makes a tensor of more than 2^31"),
        ([call("s", "aten.arange.start_step", 0, 1, 1e-15)], "s: aten.arange.start_step: makes a tensor of more than"),
        ([call("s", "aten.eye.default", 10**6)], "s: aten.eye.default: makes a tensor of more than 2^31"),
        ([call("s", "aten.repeat.default", N("x"), [10**6, 10**6])], "s: aten.repeat.default: makes a tensor of more"),
        (
            [call("s", "aten.pad.default", N("x"), [0, 10**12])],
            "s: aten.pad.default: pad: [0, 1000000000000] is out of",
        ),
        ([call("s", "aten.tensor_split.sections", N("x"), 10**9)], "s: aten.tensor_split.sections: sections: 10000000"),
        ([call("s", "aten.fill.Scalar", N("x"), 10**30)], "an integer of 100 bits is not an argument"),
        (
            [call("s", "aten.max_pool2d.default", N("x"), [2, 2], [10**9, 1])],
            "s: aten.max_pool2d.default: stride: [1000000000, 1] is out of range",
        ),
    ],
)
def test_crafted_graphs_are_not_loaded(artifact: Path, nodes: list[dict[str, Any]], message: str) -> None:
    with_nodes(artifact, *nodes)
    with pytest.raises(TargetError) as caught:
        graphq.load(artifact, verify=False)
    assert str(caught.value).startswith(f"{artifact}/graph.json: {message}")


@pytest.mark.parametrize(
    "node",
    [
        call("s", "aten.index_select.default", N("x"), 0, N("far")),
        call("s", "aten.index.Tensor", N("x"), [N("far")]),
        call("s", "aten.gather.default", N("x"), 0, N("far")),
        call("s", "aten.embedding.default", N("x"), N("far"), -3),
        call("s", "aten.take.default", N("x"), N("far")),
        call("s", "aten.view.default", N("x"), [3, 10**6]),
        call("s", "graphq.select_rows.default", [N("x")], N("far"), [0]),
        call("s", "graphq.select_rows.default", [N("x")], N("near"), [-1]),
        call("s", "graphq.grouped_linear.default", N("x"), N("x"), N("near")),
        call("s", "graphq.dequantize.default", N("near"), N("x"), None, None, "int4", [3]),
        call("s", "graphq.quantize.default", N("x"), N("near"), None, None, "nvfp4", [1, 16]),
        call("s", "graphq.choose_scale.default", N("x"), "int4", [0, 0]),
    ],
    ids=lambda node: f"{node['target']} {node['args'][-1]}",
)
@pytest.mark.parametrize("far", [10**9, -(10**9)])
def test_ops_refuse_what_does_not_fit(artifact: Path, node: dict[str, Any], far: int) -> None:
    given = [
        call("far", "aten.full.default", [1], far, dtype=INT64),
        call("near", "aten.ones.default", [1], dtype=INT64),
    ]
    with_nodes(artifact, *given, node)
    model = graphq.load(artifact, verify=False)
    with pytest.raises(Exception, match=r"\S"):
        model(tampering.X)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (call("s", "aten.cartesian_prod.default", [N("long")] * 3), "needs more memory than there is"),
        (call("s", "aten.diag_embed.default", N("long"), 10**9), "needs more memory than there is"),
        (call("s", "aten.upsample_nearest1d.vec", N("lines"), None, [1e13]), "needs more memory than there is"),
        (call("s", "pow", 10, 10**12), "pow: 10 ** 1000000000000 is out of range"),
        (call("s", "pow", N("rows"), 64), "pow: 2 ** 64 is out of range"),
        (call("s", "mul", N("rows"), 2**62), "mul: an integer that is out of range"),
        (call("s", "mul", [1], 10**13), "mul: not of two numbers"),
    ],
    ids=lambda value: value["target"] if isinstance(value, dict) else "",
)
def test_calls_that_nothing_could_hold_are_errors_of_ours(artifact: Path, node: dict[str, Any], message: str) -> None:
    with_nodes(
        artifact,
        call("long", "aten.ones.default", [10**5]),
        call("lines", "aten.unsqueeze.default", N("x"), 0),
        call("rows", "aten.sym_size.int", N("x"), 0),
        node,
    )
    model = graphq.load(artifact, verify=False)
    with pytest.raises(graphq.GraphqError) as caught:
        model(tampering.X)
    assert message in str(caught.value)
    assert "memory" not in message or str(caught.value).startswith(f"s: {node['target']}: ")


def test_the_least_integer_by_minus_one_does_not_end_the_process(artifact: Path) -> None:
    """Where torch divides toward zero by the processor's own instruction."""
    for dtype, least in (("int64", -(2**63)), ("int32", -(2**31))):
        for divide in (
            call("s", "aten.div.Tensor_mode", N("least"), N("by"), rounding_mode="trunc"),
            call("s", "aten.div.Scalar_mode", N("least"), -1, rounding_mode="trunc"),
        ):
            with_nodes(
                artifact,
                call("least", "aten.full.default", [17], least, dtype={"dtype": dtype}),
                call("by", "aten.full.default", [1], -1, dtype={"dtype": dtype}),
                divide,
            )
            found: Any = graphq.load(artifact, verify=False)(tampering.X)
            assert found.tolist() == [least] * 17


def edited_header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[end:]

    return edit


def of_first(key: str, value: Any) -> Callable[[bytes], bytes]:
    return edited_header(lambda header: next(v for k, v in header.items() if k != "__metadata__").update({key: value}))


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("model.safetensors", of_first("data_offsets", [0, 10**9])),
        ("model.safetensors", of_first("data_offsets", [10**9, 10**9])),
        ("model.safetensors", of_first("data_offsets", [4, 0])),
        ("model.safetensors", of_first("shape", [2**62, 2**62])),
        ("model.safetensors", edited_header(lambda h: h.update(dict.fromkeys(h, next(iter(h.values())))))),  # overlap
        ("model.safetensors", lambda raw: (2**63).to_bytes(8, "little") + raw[8:]),
        ("graph.json", lambda raw: b'{"nodes":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        ("graph.json", lambda raw: raw.replace(b'"args": [[', b'"args": [[' + b"[" * 900 + b"]" * 900 + b",")),
        ("graph.json", lambda raw: raw.replace(b'"args": [[', b'"args": [[' + b"9" * 10**4 + b",")),
        ("graphq.json", lambda raw: b"[" * 10**5 + b"]" * 10**5),
        ("graphq.json", lambda raw: b'{"graphq": ' + b"9" * 10**4 + b"}"),
    ],
)
def test_crafted_files_are_errors_that_name_them(artifact: Path, file: str, edit: Callable[[bytes], bytes]) -> None:
    raw = (artifact / file).read_bytes()
    (artifact / file).write_bytes(edit(raw))
    assert edit(raw) != raw
    with pytest.raises(TargetError) as caught:
        graphq.load(artifact, verify=False)
    assert str(caught.value).startswith(f"{artifact / file}: damaged")


def test_integer_products_take_codes_that_fit(tmp_path: Path) -> None:
    model = graphq.compile(
        torch.nn.Linear(8, 4), {"graphq": 1, "rules": [tampering.STATIC]}, inputs=tampering.X, calibration=[tampering.X]
    )
    model.save(tmp_path / "a")
    data = json.loads((tmp_path / "a" / "graph.json").read_text())
    product = next(n for n in data["nodes"] if n["op"] == "call_module" and len(n.get("args", ())) == 3)
    codes = product["args"][0]
    for wrong in (
        call("wrong", "aten.slice.Tensor", codes, 1, 0, 5),
        call("wrong", "aten._to_copy.default", codes, dtype={"dtype": "int32"}),
    ):
        nodes = list(data["nodes"])
        place = nodes.index(product)
        nodes[place : place + 1] = [wrong, product | {"args": [N("wrong"), *product["args"][1:]]}]
        (tmp_path / "a" / "graph.json").write_text(json.dumps(data | {"nodes": nodes}))
        with pytest.raises(graphq.PassError, match="for a weight int8"):
            graphq.load(tmp_path / "a", verify=False)(tampering.X)


def test_memory_that_nothing_wrote_is_zero(artifact: Path) -> None:
    for made in (
        call("s", "aten.empty.memory_format", [2000], memory_format={"torch": "contiguous_format"}),
        call("s", "aten.empty_like.default", N("x"), memory_format={"torch": "preserve_format"}),
        call("s", "aten.new_empty.default", N("x"), [2000]),
    ):
        with_nodes(artifact, made)
        model: Any = graphq.load(artifact, verify=False)
        torch.full((2000,), 7.0)  # whose memory is free again
        assert not model(tampering.X).any()


def test_bools_of_a_file_are_0_or_1(artifact: Path) -> None:
    tensors = load_file(artifact / "model.safetensors")
    mask = torch.tensor([2, 0, 255, 1], dtype=torch.uint8).view(torch.bool)
    save_file(tensors | {"mask": mask}, artifact / "model.safetensors")
    with_nodes(artifact, {"name": "m", "op": "get_attr", "target": "mask"}, call("s", "aten.clone.default", N("m")))
    found: Any = graphq.load(artifact, verify=False)(tampering.X)
    assert found.view(torch.uint8).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("path", ["up", "down"])  # a product with packed codes, and one of int8 codes
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_a_dtype_that_no_activation_has_are_not_loaded(artifact: Path, path: str, dtype: str) -> None:
    data = json.loads((artifact / "graph.json").read_text())
    data["modules"][path]["settings"] |= {"dtype": {"dtype": dtype}, "bias_dtype": {"dtype": "float32"}}
    (artifact / "graph.json").write_text(json.dumps(data))
    with pytest.raises(TargetError) as caught:
        graphq.load(artifact, verify=False)
    assert str(caught.value) == (
        f"{artifact}/graph.json: {path}: dtype: {dtype}, in which nothing else of the model is"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_the_model_s_own_dtype_are_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also where nothing but packed weights tells it."""
    tokens = torch.tensor([[0, 1]])
    model = torch.nn.Sequential(torch.nn.Embedding(4, 8), torch.nn.Linear(8, 4, bias=False)).to(dtype)
    rules = [{"match": name, "weight": "int4/channel"} for name in ("0", "1")]
    compiled = graphq.compile(model, {"graphq": 1, "rules": rules}, inputs=tokens)
    compiled.save(tmp_path / "a")
    found: Any = graphq.load(tmp_path / "a")(tokens)
    wanted: Any = compiled(tokens)
    assert torch.equal(found, wanted)


# -- at random ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_changes_at_random_are_errors_of_ours(made: Path, tmp_path: Path, cases: int) -> None:
    """Loading a changed artifact raises ``GraphqError`` or gives a model; no change ends the process."""
    command = [sys.executable, "-m", "tests.lowering.torch.tampering", str(made), str(tmp_path / "a"), str(cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, loaded = map(int, done.stdout.split())
    assert refused + loaded == cases
    assert refused > cases // 3
