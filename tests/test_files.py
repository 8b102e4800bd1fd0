"""A directory is written whole or not at all, whatever happens meanwhile."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graphq import files
from graphq.errors import TargetError
from graphq.files import MANIFEST, check_place, whole_directory


def tree(folder: Path) -> dict[str, str]:
    """The files below ``folder`` and their texts."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


OLD = json.dumps({"graphq": 1, "target": "torch", "files": {"more": "0" * 64}})


def artifact(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(OLD)
    (folder / "more").write_text("old")
    return folder


def test_a_new_directory(tmp_path):
    place = tmp_path / "a" / "b"
    with whole_directory(place, overwrite=False) as made:
        (made / "x").write_text("1")
        (made / "sub").mkdir()
        (made / "sub" / "y").write_text("2")
        assert made.parent == place.parent
        assert not place.exists()
    assert tree(tmp_path) == {"a/b/x": "1", "a/b/sub/y": "2"}


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "a", overwrite=False) as made:
        (made / "x").write_text("1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_existing_artifact_is_replaced_whole(tmp_path):
    place = artifact(tmp_path / "a")
    with whole_directory(place, overwrite=True) as made:
        (made / MANIFEST).write_text("new")
        assert tree(place) == {MANIFEST: OLD, "more": "old"}
    assert tree(tmp_path) == {f"a/{MANIFEST}": "new"}


def test_an_error_leaves_the_existing_artifact(tmp_path):
    place = artifact(tmp_path / "a")
    with pytest.raises(TargetError, match=r"^no room$"), whole_directory(place, overwrite=True) as made:
        (made / MANIFEST).write_text("new")
        raise TargetError("no room")
    assert tree(tmp_path) == {f"a/{MANIFEST}": OLD, "a/more": "old"}


def test_where_two_directories_cannot_be_exchanged_in_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())  # a libc without renameat2
    test_an_existing_artifact_is_replaced_whole(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_refusals(tmp_path):
    artifact(tmp_path / "artifact")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "artifact")
    advice = "exists; choose another place, or overwrite it (--overwrite)"
    foreign = "exists and is not a graphq artifact (graphq.json is missing); it is not overwritten"
    cases = [
        ("artifact", False, advice),
        ("mine", False, advice),
        ("empty", False, advice),
        ("mine", True, foreign),
        ("file", True, "exists and is not a directory"),
        ("file", False, "exists and is not a directory"),
        ("link", True, f"is a symbolic link to {tmp_path / 'artifact'}; name the directory itself"),
    ]
    before = tree(tmp_path)
    for name, overwrite, problem in cases:
        for act in (lambda p, o: check_place(p, o), lambda p, o: whole_directory(p, o).__enter__()):
            with pytest.raises(TargetError) as caught:
                act(tmp_path / name, overwrite)
            assert str(caught.value) == f"{tmp_path / name}: {problem}"
    assert tree(tmp_path) == before
    for name, overwrite in (("new", False), ("new", True), ("empty", True), ("artifact", True)):
        check_place(tmp_path / name, overwrite)


def test_somebody_else_was_faster(tmp_path):
    late = pytest.raises(TargetError, match="was made by somebody else meanwhile")
    with late, whole_directory(tmp_path / "a", overwrite=False) as made:
        (made / "x").write_text("1")
        artifact(tmp_path / "a")
    assert tree(tmp_path) == {f"a/{MANIFEST}": OLD, "a/more": "old"}


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_directory(tmp_path / "a", overwrite=False) as made:
            (made / "private").touch(0o600)  # as safetensors writes
            (made / "sub").mkdir()
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in [tmp_path / "a", *(tmp_path / "a").iterdir()]}
    assert modes == {"a": 0o750, "private": 0o640, "sub": 0o750}


def test_a_killed_process_leaves_the_existing_artifact(tmp_path):
    place = artifact(tmp_path / "a")
    code = (
        "import sys, time\nfrom graphq.files import whole_directory\n"
        "with whole_directory(sys.argv[1], True) as made:\n"
        "    (made / 'graphq.json').write_text('new'); print('half', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, place], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert tree(place) == {MANIFEST: OLD, "more": "old"}
    with whole_directory(place, overwrite=True) as made:
        (made / MANIFEST).write_text("newer")
    assert tree(place) == {MANIFEST: "newer"}


def test_only_an_artifacts_own_files_are_replaced(tmp_path):
    """Whatever else the directory holds, or whatever its graphq.json says: nothing is touched, and it is named."""
    unlisted = "is not the manifest of a graphq artifact with its files; it is not overwritten"
    whole = json.loads(OLD)

    def put(name, text=""):
        def change(folder):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

        return change

    def manifest(data):
        return put(MANIFEST, json.dumps(data))

    cases = [
        (put("notes.txt"), "holds notes.txt, which graphq did not write; it is not overwritten"),
        (put("src/main.py"), "holds src, which graphq did not write; it is not overwritten"),
        (lambda f: (f / "empty").mkdir(), "holds empty, which graphq did not write; it is not overwritten"),
        (lambda f: (f / "link").symlink_to("more"), "holds link, which graphq did not write; it is not overwritten"),
        (put(MANIFEST, "{}"), f"{MANIFEST} {unlisted}"),
        (put(MANIFEST, "[" * 100_000), f"{MANIFEST} {unlisted}"),
        (put(MANIFEST, "not JSON"), f"{MANIFEST} {unlisted}"),
        (manifest(whole | {"graphq": 2}), f"{MANIFEST} {unlisted}"),
        (manifest({k: v for k, v in whole.items() if k != "files"}), f"{MANIFEST} {unlisted}"),
        (manifest(whole | {"files": []}), f"{MANIFEST} {unlisted}"),
        (manifest(whole | {"files": {"../x": ""}}), f"{MANIFEST} {unlisted}"),
    ]
    for i, (change, problem) in enumerate(cases):
        place = artifact(tmp_path / str(i))
        change(place)
        before = tree(place)
        with pytest.raises(TargetError) as caught, whole_directory(place, overwrite=True):
            raise AssertionError
        assert str(caught.value) == f"{place}: {problem}"
        assert tree(place) == before


def test_listed_files_in_folders_are_an_artifacts_own(tmp_path):
    place = artifact(tmp_path / "a")
    (place / "sub" / "sub").mkdir(parents=True)
    (place / "sub" / "sub" / "x").write_text("")
    (place / MANIFEST).write_text(json.dumps(json.loads(OLD) | {"files": {"more": "", "sub/sub/x": ""}}))
    with whole_directory(place, overwrite=True) as made:
        (made / MANIFEST).write_text("new")
    assert tree(place) == {MANIFEST: "new"}


def test_what_is_put_there_meanwhile_stays(tmp_path):
    place = artifact(tmp_path / "a")
    late = pytest.raises(TargetError, match=r"holds late\.txt, which graphq did not write")
    with late, whole_directory(place, overwrite=True) as made:
        (made / MANIFEST).write_text("new")
        (place / "late.txt").write_text("late")
    assert tree(tmp_path) == {f"a/{MANIFEST}": OLD, "a/late.txt": "late", "a/more": "old"}


def test_what_is_read_from_is_not_replaced(tmp_path, monkeypatch):
    place = artifact(tmp_path / "a")
    (tmp_path / "link").symlink_to(place / "more")
    (tmp_path / "linked").symlink_to(tmp_path)
    for file in (place / "more", place, tmp_path / "link", tmp_path / "linked" / "a" / "model"):
        with pytest.raises(TargetError) as caught:
            check_place(place, True, [tmp_path / "other", file])
        assert str(caught.value) == f"{place}: holds {file}, which is read from; choose another place"
    check_place(place, True, [tmp_path, tmp_path / "a2"])
    (place / "sub").mkdir()
    for folder in (place, place / "sub"):
        monkeypatch.chdir(folder)
        with pytest.raises(TargetError, match="is or holds the working directory; it is not overwritten"):
            check_place(os.path.relpath(place), True)


def test_places_where_nothing_can_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    cases = [
        ("file/a", f"{tmp_path}/file is not a directory"),
        ("file/a/b", f"{tmp_path}/file is not a directory"),
        ("dangling", f"is a symbolic link to {tmp_path}/nothing; name the directory itself"),
        ("dangling/a", f"{tmp_path}/dangling is not a directory"),
    ]
    for name, problem in cases:
        with pytest.raises(TargetError) as caught:
            check_place(tmp_path / name, False)
        assert str(caught.value) == f"{tmp_path / name}: {problem}"
    with pytest.raises(TargetError, match=r"cannot be made: .*: File name too long"):
        whole_directory(tmp_path / ("a" * 250), False).__enter__()
    monkeypatch.setattr(files.os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(TargetError) as caught:
        check_place(tmp_path / "a" / "b", False)
    assert str(caught.value) == f"{tmp_path}/a/b: {tmp_path} cannot be written to"
