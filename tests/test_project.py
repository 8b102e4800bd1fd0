"""The project's own rules: who imports whom, what an import may load, what a file may hold, what a wheel contains."""

import ast
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAVY = ("compressed_tensors", "networkx", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino", "transformers")

# Each may import the ones above it, and none beside it; a name stands for its submodules too, but for graphq, which is
# the public API.
LAYERS = (
    ("graphq.errors",),
    ("graphq.deferred",),
    ("graphq.files", "graphq.memory", "graphq.phases", "graphq.state"),
    ("graphq.progress",),
    ("graphq.spec",),
    ("graphq.frontends", "graphq.numerics", "graphq.packing", "graphq.capture"),
    ("graphq.data",),
    ("graphq.runtime",),
    ("graphq.ir",),
    ("graphq.heat_map",),
    ("graphq.figures",),
    ("graphq.observers", "graphq.artifacts", "graphq.report"),
    ("graphq.passes",),
    ("graphq.algorithms", "graphq.lowering"),
    ("graphq.checks",),
    ("graphq.compiled",),
    ("graphq.compiler", "graphq.in_place"),
    (
        *("graphq.conversion", "graphq.explanation", "graphq.verifier", "graphq.linter"),
        *("graphq.mixed_precision", "graphq.comparison"),
    ),
    ("graphq.pages",),
    ("graphq",),
    ("graphq.cli",),
)
# These import nothing else of graphq.
LEAVES = {
    "graphq.frontends": {"graphq.errors", "graphq.spec"},
    "graphq.numerics": {"graphq.errors", "graphq.spec"},
    "graphq.packing": {"graphq.errors", "graphq.spec"},
    "graphq.deferred": {"graphq.errors"},
    "graphq.state": {"graphq.errors", "graphq.deferred"},
    "graphq.files": {"graphq.errors"},
}
TORCH_ALONE = {"graphq.numerics": {"jaxtyping", "torch"}, "graphq.packing": {"jaxtyping", "torch"}}  # and below them


def source_files() -> Iterator[Path]:
    """The Python files that are installed; ``graphq/passes`` and ``graphq/lowering`` are symlinks, read once."""
    for folder in ("graphq", "passes", "lowering"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.relative_to(ROOT).parts[:2] not in (("graphq", "passes"), ("graphq", "lowering")):
                yield path


def module_name(path: Path) -> str:
    """The name ``path`` is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "graphq" else ("graphq", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, str]:
    """Module name -> source text."""
    return {module_name(path): path.read_text(encoding="utf-8") for path in source_files()}


def imports(text: str, known: Iterable[str]) -> set[str]:
    """Every module that ``text`` imports anywhere, in functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names):
                found.update(alias.name for alias in names)
            case ast.ImportFrom(module, names, 0):
                assert module is not None
                members = {f"{module}.{alias.name}" for alias in names}
                found.update(members & set(known) or {module})
            case ast.ImportFrom():
                raise AssertionError(f"line {node.lineno}: a relative import; write graphq.")
            case _:
                pass
    return found


def is_within(module: str, package: str) -> bool:
    return module == package or (package != "graphq" and module.startswith(f"{package}."))


def reached(module: str, edges: Mapping[str, set[str]]) -> dict[str, str]:
    """Every module that ``module`` imports, itself or through others -> the one it is imported by."""
    by: dict[str, str] = {}
    queue = [module]
    for importer in queue:
        for imported in sorted(edges.get(importer, ())):
            if imported not in by:
                by[imported] = importer
                queue.append(imported)
    return by


def layer_of(module: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) for name in layer if is_within(module, name)), None)


def wrong_imports(texts: Mapping[str, str]) -> list[str]:
    """A line for each import against the direction, or beyond what a leaf may import."""
    edges = {module: imports(text, texts) for module, text in texts.items()}
    problems: list[str] = []
    for module, direct in edges.items():
        by = reached(module, edges)
        if module in by:
            problems.append(f"{module} imports itself through {by[module]}")
        if (own := layer_of(module)) is not None:
            home = next(name for name in LAYERS[own] if is_within(module, name))
            for other, importer in by.items():
                rank = layer_of(other)
                if rank is not None and rank >= own and not is_within(other, home):
                    problems.append(
                        f"{module} imports {other}" + (f" through {importer}" if importer != module else "")
                    )
        for leaf, allowed in LEAVES.items():
            if is_within(module, leaf):
                ours = {other for other in by if other.partition(".")[0] == "graphq" and not is_within(other, leaf)}
                problems += [
                    f"{module} imports {other}"
                    for other in sorted(ours)
                    if not any(is_within(other, package) for package in allowed)
                ]
        for package, allowed in TORCH_ALONE.items():
            if is_within(module, package):
                outside = {other.partition(".")[0] for other in direct} - {"graphq"} - sys.stdlib_module_names
                problems += [f"{module} imports {other}" for other in sorted(outside - allowed)]
    return list(dict.fromkeys(problems))


def test_imports_go_one_way() -> None:
    assert wrong_imports(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "problems"),
    [
        ("graphq.passes.fold", "from graphq.lowering.onnx_qdq import emit", ["{} imports graphq.lowering.onnx_qdq"]),
        ("graphq.passes.fold", "from graphq import lowering", ["{} imports graphq.lowering"]),
        ("graphq.passes.fold", "import graphq", ["{} imports graphq"]),
        ("graphq.passes.fold", "def run():\n    import graphq.compiler", ["{} imports graphq.compiler"]),
        ("graphq.passes.fold", "from graphq.cut import cut", ["{} imports graphq.lowering through graphq.cut"]),
        ("graphq.passes.fold", "from graphq.passes.other import Other", []),
        ("graphq.passes.fold", "from graphq.ir import edit, views", []),
        ("graphq.lowering.torch.module", "from graphq.passes import fold", []),
        ("graphq.ir.text", "from graphq.observers.observer import Observer", ["{} imports graphq.observers.observer"]),
        ("graphq.errors", "from graphq.spec import Spec", ["{} imports graphq.spec"]),
        ("graphq.compiler", "import graphq.lowering.torch_module", []),
        ("graphq.frontends.llmc", "from graphq.spec import Spec\nfrom graphq.frontends import native", []),
        ("graphq.frontends.llmc", "from graphq.ir.views import Linear", ["{} imports graphq.ir.views"]),
        ("graphq.numerics", "import torch, math\nfrom graphq.spec.formats import Int", []),
        ("graphq.numerics", "import numpy as np", ["{} imports numpy"]),
        ("graphq.numerics.mx", "import numpy as np", ["{} imports numpy"]),
        ("graphq.packing", "from graphq.numerics import pack", ["{} imports graphq.numerics"]),
        ("graphq.fresh", "import graphq.other", ["{} imports itself through graphq.other", "graphq.other imports itself through {}"]),
    ],
)  # fmt: skip
def test_the_check_sees_a_wrong_import(module: str, line: str, problems: list[str]) -> None:
    texts = dict.fromkeys(
        ("graphq", "graphq.ir.edit", "graphq.ir.views", "graphq.lowering", "graphq.frontends.native"), ""
    )
    texts |= {"graphq.cut": "from graphq import lowering", "graphq.other": "import graphq.fresh"}
    assert sorted(wrong_imports(texts | {module: line})) == [problem.format(module) for problem in problems]


@pytest.mark.parametrize("name", [name for layer in LAYERS for name in layer] + list(LEAVES))
def test_the_layers_name_modules_that_exist(name: str) -> None:
    assert name in {known for module in sources() for known in (module, module.rpartition(".")[0])}


def test_the_contributors_are_told_the_order() -> None:
    floors = [[name.removeprefix("graphq.") for name in layer] for layer in LAYERS]
    drawn = " <- ".join(names[0] if len(names) == 1 else f"{{{', '.join(names)}}}" for names in floors)
    assert drawn in " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())


def test_importing_graphq_loads_no_heavy_library() -> None:
    code = f"import sys, graphq; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PATHS = re.compile(
    r"(?<![\w/.-])(?:\.\./)*((?:graphq|passes|lowering|tests|examples|benchmarks|docs|judges)/[\w./-]*\w)"
)
DOTTED = re.compile(r"(?<![\w./])graphq(?:\.[a-z_]\w*)+")
OTHER_NAMES = {  # files, and keys of node.meta
    *("graphq.json", "graphq.choices", "graphq.by", "graphq.layer", "graphq.plan", "graphq.source"),
}


def absent(text: str) -> list[str]:
    """The files and folders of the project, and the names of graphq, that ``text`` mentions and that there are not."""
    found = [path for path in PATHS.findall(text) if not (ROOT / path).exists()]
    for name in sorted(set(DOTTED.findall(text)) - OTHER_NAMES):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            found.append(name)
    return found


def documentation() -> Iterator[tuple[str, str]]:
    """Every Markdown file, and the docstrings of every Python file but tests; with its path."""
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "judges").glob("*.md")]
    for path in sorted(documents):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    scripts = [path for folder in ("examples", "benchmarks", "judges") for path in (ROOT / folder).rglob("*.py")]
    for path in [*source_files(), *scripts]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
        yield str(path.relative_to(ROOT)), "\n".join(texts)


def test_documents_name_what_there_is() -> None:
    assert {path: absent(text) for path, text in documentation() if absent(text)} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`passes/rotate.py`, [it](../graphq/ir/views.py), ``graphq.ir.views``, `graphq.compile`, graphq.json.", []),
        ("`passes/range_observers.py` and graphq/edit.py", ["passes/range_observers.py", "graphq/edit.py"]),
        ("``graphq.lowering.onnx_opset``", ["graphq.lowering.onnx_opset"]),
        ("``graphq.ir.views.Lineal``", []),  # a class is spelled by its own file
        ("``graphq.numerics.rescale``", ["graphq.numerics.rescale"]),
        ("../shared/graphq/absent.py, my-graphq/absent.py", []),
    ],
)
def test_the_check_sees_what_there_is_not(text: str, found: list[str]) -> None:
    assert absent(text) == found


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_every_imported_library_is_declared() -> None:
    extras: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
    requirements = [
        *PROJECT["project"]["dependencies"],
        *(one for name in extras if name != "test" for one in extras[name]),
    ]
    declared = {normal(requirement.partition(">")[0].partition("=")[0]) for requirement in requirements}
    distributions = packages_distributions()
    for module, text in sources().items():
        libraries = (
            {imported.partition(".")[0] for imported in imports(text, ())} - {"graphq"} - sys.stdlib_module_names
        )
        for name in sorted(libraries):
            owners = {normal(owner) for owner in distributions.get(name, [name])}
            assert owners & declared, f"{module} imports {name}, which pyproject.toml does not declare"


def unsafe(text: str) -> list[str]:
    """What ``text`` holds that runs, or loads, code from outside; or a path out of the project."""
    problems = ["../shared"] if "../shared" in text else []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(ast.Name("eval" | "exec" | "__import__" as name)):
                problems.append(f"{name}(")
            case ast.Attribute(ast.Name("torch"), "load"):
                problems.append("torch.load")
            case ast.ImportFrom("torch", names) if any(alias.name == "load" for alias in names):
                problems.append("torch.load")
            case ast.keyword("allow_pickle"):
                problems.append("allow_pickle")
            case _:
                pass
    unsafe_modules = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    return problems + sorted({name.partition(".")[0] for name in imports(text, ())} & unsafe_modules)


def test_nothing_runs_code_that_a_file_brings() -> None:
    # A program is code that graphq writes, as torch.fx writes a graph's: a file's words stand in it as quoted text.
    own = {"graphq.runtime.program": ["exec("]}
    assert {module: unsafe(text) for module, text in sources().items() if unsafe(text)} == own


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("eval('1')", ["eval("]),
        ("def f(x):\n    exec(x)", ["exec("]),
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("torch.load(path, weights_only=True)", ["torch.load"]),
        ("from torch import load", ["torch.load"]),
        ("np.load(path, allow_pickle=True)", ["allow_pickle"]),
        ("path = '../shared/models'", ["../shared"]),
        ("model.eval(); safetensors.torch.load(data)", []),
        ("'''No pickle, no eval().'''", []),
    ],
)
def test_the_check_sees_unsafe_code(text: str, problems: list[str]) -> None:
    assert unsafe(text) == problems


def named_passes(text: str) -> list[tuple[str, str]]:
    """The passes that a file defines: the class, and the name that its body gives it."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.ClassDef(name, [ast.Name("Pass")], body=body):
                names = [
                    one.value.value
                    for one in body
                    if isinstance(one, ast.AnnAssign | ast.Assign)
                    and ast.unparse(one).startswith("name")
                    and isinstance(one.value, ast.Constant)
                ]
                found.append((name, *map(str, names)))  # type: ignore[arg-type]
            case _:
                pass
    return found


ACRONYMS = ("AWQ", "GPTQ")


def test_a_file_of_passes_holds_one_pass_spelled_alike() -> None:
    for path in sorted((ROOT / "passes").glob("*.py")):
        words = path.stem.split("_")
        cls = "".join(word.upper() if word.upper() in ACRONYMS else word.title() for word in words)
        expected = [] if path.stem == "__init__" else [(cls, "-".join(words))]
        assert named_passes(path.read_text(encoding="utf-8")) == expected, path.name


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('class Cut(Pass):\n    x: int = 3\n    name: ClassVar[str] = "cut"', [("Cut", "cut")]),
        ('class Cut(Pass):\n    name = "cut-it"', [("Cut", "cut-it")]),
        ("class Cut(Pass):\n    x = 1", [("Cut",)]),
        ('class _Named:\n    name = "cut"\ndef cut(gm): ...', []),
    ],
)
def test_the_check_sees_passes(text: str, found: list[Any]) -> None:
    assert named_passes(text) == found


def test_every_pass_has_its_test_file() -> None:
    passes = {path.stem for path in (ROOT / "passes").glob("*.py")} - {"__init__"}
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "passes").glob("test_*.py")}
    assert sorted(passes - tested) == []


def test_files_are_short() -> None:
    scripts = (path for folder in ("examples", "benchmarks", "judges") for path in (ROOT / folder).rglob("*.py"))
    limits = dict.fromkeys((*source_files(), *scripts), 400) | dict.fromkeys((ROOT / "tests").rglob("*.py"), 600)
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in limits}
    assert {str(path.relative_to(ROOT)): lengths[path] for path in limits if lengths[path] >= limits[path]} == {}


def test_every_package_is_installed() -> None:
    folders = {module_name(path.with_name("__init__.py")) for path in source_files()}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def wheel_of(folder: Path, **environment: str) -> list[str]:
    """The names in the wheel that is built of a copy of the sources in ``folder``."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("graphq", "passes", "lowering"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=folder, check=True, env=os.environ | environment)
    (wheel,) = (folder / "dist").iterdir()
    return zipfile.ZipFile(wheel).namelist()


def test_a_wheel_holds_every_module_once_where_there_is_no_compiler(tmp_path: Path) -> None:
    names = wheel_of(tmp_path, CC="false", CXX="false")
    assert "graphq/runtime/allowed_ops.txt" in names
    assert "graphq/runtime/kernels/native/engine.h" in names
    assert not [name for name in names if name.endswith(".so")]
    held = [name for name in names if name.endswith(".py")]
    assert sorted(held) == sorted(
        f"graphq/{path.relative_to(ROOT)}".replace("graphq/graphq", "graphq") for path in source_files()
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
def test_a_wheel_holds_the_kernels_where_there_is_one(tmp_path: Path) -> None:
    assert [name for name in wheel_of(tmp_path) if name.startswith("graphq/runtime/kernels/_native.")]
