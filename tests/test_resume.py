"""A compile that was stopped, at whatever moment, is continued by the same one, and gives the same bytes."""

import errno
import gc
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphq
from graphq.artifacts.journal import Journal, changes
from graphq.artifacts.work_folder import discard, how_to_go_on, told_how_to_go_on
from graphq.cli import app
from graphq.errors import TargetError
from graphq.progress import Progress, listening
from tests.checkpoints import save_checkpoint, text
from tests.models import tiny

GPTQ = {"graphq": 1, "weight": "int4/g32", "algorithms": [{"gptq": {}}]}
RTN = {"graphq": 1, "weight": "int4/g32"}
TOKENS = [torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(3)]
SHARD = 20_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama", num_hidden_layers=3).to(torch.bfloat16).save_pretrained(folder)
    return folder


def compiled(
    model: Path,
    folder: Path,
    spec: Any = GPTQ,
    target: str = "compressed-tensors",
    overwrite: bool = False,
    **more: Any,
) -> None:
    """What the command does: ``folder/out`` is the artifact, ``folder/work`` what is kept until then."""
    calibration = {"calibration": TOKENS} if "algorithms" in spec else {}
    consumer = "any"
    options: dict[str, Any] = {"target": target, "target_options": {"consumer": consumer}} | calibration | more
    made = graphq.compile(model, spec, work_dir=folder / "work", **options)
    try:
        made.emit(target, folder / "out", shard_bytes=SHARD, consumer=consumer, overwrite=overwrite)
    finally:
        made.release()


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def stopped_at(kind: str, done: int) -> Callable[[Progress], None]:
    def tell(step: Progress) -> None:
        if (step.kind, step.done) == (kind, done):
            raise KeyboardInterrupt

    return tell


def stop(model: Path, folder: Path, kind: str, done: int, **more: Any) -> None:
    with pytest.raises(KeyboardInterrupt), listening(stopped_at(kind, done)):
        compiled(model, folder, **more)
    gc.collect()


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    compiled(model, folder)
    assert not (folder / "work").exists()
    return files_of(folder / "out")


def test_each_block_is_done_once(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """A journal changes nothing, and what is stopped after each block goes on behind it."""
    done: list[list[int]] = []
    for last in (2, 3, 4):  # the first part has no layer with a plan
        stop(model, tmp_path, "blocks", last)
        done.append(sorted(int(file.stem[2:]) for file in (tmp_path / "work" / "steps").glob("*.json")))
    assert done == [[1], [1, 2], [1, 2, 3]]
    assert len(list((tmp_path / "work" / "values-0").iterdir())) == 0  # of the last block nothing is asked
    steps: list[Progress] = []
    with listening(steps.append):
        compiled(model, tmp_path)
    assert [step.done for step in steps if step.kind == "blocks"] == [4]
    assert files_of(tmp_path / "out") == whole
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("done", [3, pytest.param(9, marks=pytest.mark.slow), 20])
def test_finished_files_of_weights_stay(model: Path, whole: dict[str, bytes], tmp_path: Path, done: int) -> None:
    stop(model, tmp_path, "tensors", done)
    kept = [
        json.loads(file.read_text())["record"]["names"] for file in sorted((tmp_path / "work").glob("shard-*.json"))
    ]
    assert (done > 3) == bool(kept)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work" / "artifact").glob("*.partial")}
    compiled(model, tmp_path)
    assert files_of(tmp_path / "out") == whole
    for number, names in enumerate(kept, 1):
        (file,) = (tmp_path / "out").glob(f"*-{number:05}-of-*")
        assert file.stat().st_mtime_ns == before[f"{number:05}.partial"]
        assert names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mixtral", {"algorithms": [{"awq": {}}]}),
        ("opt", {"algorithms": [{"smooth-quant": {}}, {"gptq": {}}], "pipeline": "independent"}),
        ("llama", {"algorithms": [{"rotate": {}}, {"gptq": {}}], "prefix": "float"}),
        ("llama", {"algorithms": [{"awq": {}}], "cache": "int8/tensor"}),
    ],
)
@pytest.mark.parametrize("target", ["compressed-tensors", "ascend"])
def test_other_models_and_specs(family: str, more: Any, target: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny(family, num_hidden_layers=3).to(torch.bfloat16).save_pretrained(folder)
    size = "int8/channel" if target == "ascend" else "int4/g32"
    more = more | ({"cache": "int8/channel"} if "cache" in more and target == "ascend" else {})
    spec = {"graphq": 1, "weight": size} | more
    compiled(folder, tmp_path / "whole", spec, target)
    stop(folder, tmp_path / "stopped", "blocks", 3, spec=spec, target=target)
    stop(folder, tmp_path / "stopped", "tensors", 12, spec=spec, target=target)
    compiled(folder, tmp_path / "stopped", spec, target)
    assert files_of(tmp_path / "stopped" / "out") == files_of(tmp_path / "whole" / "out")


def test_what_algorithms_chose_for_finished_blocks_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny("llama", num_hidden_layers=2).to(torch.bfloat16).save_pretrained(folder)
    spec = {"graphq": 1, "weight": "int4/g32", "algorithms": ["awq"]}
    compiled(folder, tmp_path / "whole", spec)
    stop(folder, tmp_path / "stopped", "blocks", 2, spec=spec)
    compiled(folder, tmp_path / "stopped", spec)
    found, wanted = (files_of(tmp_path / one / "out") for one in ("stopped", "whole"))
    assert "graphq.choices" in wanted
    assert found == wanted


def test_the_command_says_how_to_go_on(tmp_path: Path) -> None:
    model, out, work = save_checkpoint(tmp_path / "llama"), tmp_path / "out", tmp_path / ".out.work"
    (tmp_path / "text").write_text(text(200))
    (tmp_path / "spec.yaml").write_text(json.dumps(GPTQ))
    command = ["compile", model, "--spec", tmp_path / "spec.yaml", "--target", "compressed-tensors", "--out", out]
    command += ["--for", "any", "--calibration", tmp_path / "text", "--samples", "2", "--sequence-length", "16"]

    def run(*more: str) -> Any:
        return CliRunner().invoke(app, [*map(str, command), *more])

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("graphq.cli.models.shown_progress", lambda _: listening(stopped_at("tensors", 2)))
        stopped = run()
    assert stopped.exit_code == 130
    line = f"{work}: 1 finished blocks are kept; the same command goes on from there, with --restart anew"
    assert stopped.stderr.splitlines() == ["interrupted", line]
    changed = run("--seed", "3")
    assert changed.exit_code == 1
    assert changed.stderr.splitlines() == [
        f"{work}: holds an interrupted compile of something else; start anew with --restart, or remove the folder",
        "seed: was 0, is 3",
        line,
    ]
    finished = run()
    assert finished.exit_code == 0, finished.stderr
    assert "blocks: 2 of 2 were finished by an interrupted compile" in finished.stderr
    assert not work.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphq.cli.models.shown_progress", lambda _: listening(stopped_at("tensors", 2)))
        assert run("--overwrite").exit_code == 130
    assert run("--seed", "3", "--restart", "--overwrite").exit_code == 0
    assert not work.exists()


# -- killed

KILLED = """
import json, os, signal, sys, threading, time
from pathlib import Path
import transformers.models.llama.modeling_llama  # before processes are forked, which are as new ones then
from graphq.progress import listening
from tests.test_resume import compiled

def run(model, folder, at):
    def tell(step):
        if f"{step.kind} {step.done}" == at:
            os.kill(os.getpid(), signal.SIGKILL)
    if isinstance(at, float):
        wait = lambda: (time.sleep(at), os.kill(os.getpid(), signal.SIGKILL))
        threading.Thread(target=wait, daemon=True).start()
    with listening(tell):
        compiled(Path(model), Path(folder))

for folder, *stops in json.loads(sys.argv[2]):
    for at in stops:
        start = time.perf_counter()
        child = os.fork()
        if not child:
            run(sys.argv[1], folder, at)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, time.perf_counter() - start)
"""


def in_processes(model: Path, jobs: list[list[Any]]) -> list[tuple[int, float]]:
    """The exit status and the seconds of compiles, each in a process of its own. A job is a folder and when each of
    the processes that are to fill it is killed: when it tells that, after so many seconds, or never.
    """
    command = [sys.executable, "-c", KILLED, str(model), json.dumps(jobs, default=str)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pairs = [line.split() for line in done.stdout.splitlines()]
    return [(int(status), float(seconds)) for status, seconds in pairs]


def test_killed_processes_are_continued(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    jobs: list[Any] = [[tmp_path / at.replace(" ", ""), at] for at in ("blocks 2", "blocks 4", "tensors 12")]
    assert [status for status, _ in in_processes(model, jobs)] == [-signal.SIGKILL] * 3
    kept = ("1 finished blocks", "3 finished blocks", "3 finished blocks and 1 finished files of weights")
    for (folder, _), finished in zip(jobs, kept, strict=True):
        line = f"{folder}/work: {finished} are kept; the same command goes on from there, with --restart anew"
        assert how_to_go_on(folder / "work") == line
        compiled(model, folder)
        assert files_of(folder / "out") == whole
        assert list(folder.iterdir()) == [folder / "out"]


@pytest.mark.slow
def test_processes_killed_at_random_moments(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    ((status, seconds),) = in_processes(model, [[tmp_path / "whole", ""]])
    assert status == 0
    moments = random.Random(0)
    jobs: list[Any] = [[tmp_path / str(n), moments.uniform(0.2, 1.0) * seconds, ""] for n in range(20)]
    ended = in_processes(model, jobs)
    assert sum(status == -signal.SIGKILL for status, _ in ended) > 10  # others were through before
    for folder, *_ in jobs:
        if (folder / "work").exists():
            compiled(model, folder, overwrite=True)
        assert files_of(folder / "out") == whole
        assert [file.name for file in folder.iterdir()] == ["out"]


# -- what goes wrong


def test_other_inputs_are_refused(model: Path, tmp_path: Path) -> None:
    """What changed is said; what is kept stays as it was."""
    stop(model, tmp_path, "blocks", 3)
    kept = {file.name for file in (tmp_path / "work").rglob("*")}
    first = f"{tmp_path}/work: holds an interrupted compile of something else; start anew with --restart, or remove the folder"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"spec": GPTQ | {"weight": "int8/channel"}}, "spec: was weight: int4/g32, is weight: int8/channel"),
        ({"calibration": TOKENS[:2]}, r"calibration: was 3 batches, .*, is 2 batches, .*"),
        ({"seed": 7}, "seed: was 0, is 7"),
        ({"target": "ascend"}, "target: was compressed-tensors, is ascend"),
    ]
    for changed, line in cases:
        with pytest.raises(graphq.SpecError) as caught:
            compiled(model, tmp_path, **changed)
        assert caught.value.problems[0] == first
        assert len(caught.value.problems) == 2
        assert re.fullmatch(line, caught.value.problems[1]), caught.value.problems[1]
    assert {file.name for file in (tmp_path / "work").rglob("*")} == kept
    (weights,) = model.glob("*.safetensors")
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        with pytest.raises(graphq.SpecError, match=r"model\.safetensors: was [0-9]+ bytes, changed at"):
            compiled(model, tmp_path)
    finally:
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_two_at_once(model: Path, tmp_path: Path) -> None:
    inputs = {"model": "a"}
    first = Journal(tmp_path / "work", inputs, [], {}, {})
    with pytest.raises(TargetError, match=f"^{tmp_path}/work: another compile is at work there$"):
        Journal(tmp_path / "work", inputs, [], {}, {})
    with pytest.raises(TargetError, match="another compile is at work"):
        discard(tmp_path / "work")
    (tmp_path / "work" / "steps" / "0-00001.json").write_text("{}")
    with pytest.raises(TargetError) as caught, told_how_to_go_on(tmp_path / "work"):
        Journal(tmp_path / "work", inputs, [], {}, {})
    assert not hasattr(caught.value, "__notes__")  # nothing was interrupted
    (tmp_path / "work" / "steps" / "0-00001.json").unlink()
    first.close()
    assert not (tmp_path / "work").exists()  # nothing was finished
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine").write_text("")
    with pytest.raises(TargetError, match="exists and is not what an interrupted compile left"):
        Journal(tmp_path / "work", inputs, [], {}, {})
    with pytest.raises(TargetError, match="exists and is not what an interrupted compile left"):
        discard(tmp_path / "work")


def test_what_holds_nothing_finished_is_begun_anew(tmp_path: Path) -> None:
    """A process that was killed before its first block was finished keeps nobody from another compile."""
    first = Journal(tmp_path / "work", {"seed": "0"}, [], {}, {})
    (tmp_path / "work" / "values-0").mkdir()
    first._lock.close()  # pyright: ignore[reportPrivateUsage] as when the process is killed
    second = Journal(tmp_path / "work", {"seed": "1"}, [], {}, {})
    assert json.loads((tmp_path / "work" / "inputs.json").read_text()) == {"seed": "1"}
    assert not (tmp_path / "work" / "values-0").exists()
    second.close()


@pytest.mark.parametrize("removed", range(5))
def test_killed_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int) -> None:
    """At whatever file the removal stops: nothing is kept, and what is left is no obstacle to any compile."""
    work, gone, unlink = tmp_path / "work", 0, os.unlink
    first = Journal(work, {"seed": "0"}, [], {}, {})

    def make(place: Path) -> dict[str, Any]:
        place.mkdir()
        (place / "codes").write_text("1")
        return {}

    first.commit("0-00001", make)
    first.artifact.mkdir()
    first.commit_shard({})
    first.close()
    assert "1 finished blocks and 1 finished files of weights" in how_to_go_on(work)

    def killed(*args: Any, **more: Any) -> None:
        nonlocal gone
        gone += 1
        if gone > removed:
            raise KeyboardInterrupt
        unlink(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "unlink", killed)
        discard(work)
    gc.collect()
    assert (how_to_go_on(work) == "") == (removed > 0)
    assert (work / "lock").exists()
    if removed:
        Journal(work, {"seed": "1"}, [], {}, {}).close()
    else:
        discard(work)
    assert not work.exists()


def test_a_damaged_record(model: Path, tmp_path: Path) -> None:
    stop(model, tmp_path, "blocks", 3)
    file = tmp_path / "work" / "steps" / "0-00001" / "model.safetensors"
    held = bytearray(file.read_bytes())
    held[-1] ^= 1
    file.write_bytes(held)
    with pytest.raises(TargetError, match=rf"^{file}: damaged; start anew with --restart"):
        compiled(model, tmp_path)
    file = tmp_path / "work" / "steps" / "0-00001.json"
    text = file.read_text()
    for damaged in (text[:-9], "{}", '{"record": {}, "sha256": ""}', text.replace('"count": ', '"count": 1', 1)):
        file.write_text(damaged)
        with pytest.raises(TargetError, match=rf"^{file}: damaged; start anew with --restart"):
            compiled(model, tmp_path)


@pytest.mark.parametrize(
    ("spec", "limit", "where"),
    [(GPTQ, 3_000, "work"), (GPTQ, 30_000, "work/steps"), (RTN, 15_000, "work")],  # values, blocks, shards
)
def test_a_full_disk(model: Path, tmp_path: Path, spec: Any, limit: int, where: str) -> None:
    """Files can be no longer than ``limit``: what is written when it is too much is said, and what was there stays."""
    compiled(model, tmp_path, spec)
    old = files_of(tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(TargetError, match=f"^{tmp_path}/{where}: cannot be written to: {os.strerror(errno.EFBIG)}"):
            compiled(model, tmp_path, spec, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files_of(tmp_path / "out") == old
    compiled(model, tmp_path, spec, overwrite=True)
    assert files_of(tmp_path / "out") == old
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_file_of_the_model_that_cannot_be_read(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    (weights,) = model.glob("*.safetensors")
    aside = tmp_path / "aside"

    def tell(step: Progress) -> None:
        if (step.kind, step.done) == ("blocks", 2):
            weights.rename(aside)

    try:
        with pytest.raises(graphq.GraphError, match=rf"{weights}: .* cannot be read any more"), listening(tell):
            compiled(model, tmp_path)
    finally:
        aside.rename(weights)
    gc.collect()
    assert "1 finished blocks" in how_to_go_on(tmp_path / "work")
    compiled(model, tmp_path)
    assert files_of(tmp_path / "out") == whole


def test_a_place_that_cannot_be_written_to(model: Path, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file")
    with pytest.raises(TargetError, match=f"^{tmp_path}/work: cannot be written to: File exists$"):
        compiled(model, tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_changed_is_told_by_the_first_line_that_did() -> None:
    assert changes({"a": "1\n2", "b": "x"}, {"a": "1\n3\n4", "c": "y"}) == ["a: was 2, is 3", "b: is gone", "c: is new"]
    assert changes({"a": "1"}, {"a": "1\n2"}) == ["a: was nothing, is 2"]
    assert changes({"a": "1\n2"}, {"a": "1"}) == ["a: was 2, is nothing"]
