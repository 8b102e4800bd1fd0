"""Records as calibration batches: which text is read, in what order, and what is said of a wrong one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graphq.data.evaluate import load_tokenizer
from graphq.data.model_text import calibration_batches
from graphq.data.records import record_files, texts_of
from graphq.errors import SpecError
from tests.checkpoints import WORDS, write_tokenizer

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 100, "max_position_embeddings": 64}))
    return folder


def texts(files: list[Path], field: str | None, model: Path, seed: int | None = None) -> list[str]:
    return [one.text for one in texts_of(files, field, model, seed)]


def lines(file: Path, *records: Any) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_fields(model: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "one", "id": 1}, {"content": "two", "other": "three"})
    assert texts([file], None, model) == ["one", "two"]
    with pytest.raises(SpecError, match=rf"^{file}: line 1: no field other; it has text, id \(--calibration-field\)$"):
        texts([file], "other", model)
    later = texts_of([lines(tmp_path / "b.ndjson", {"x": "w1"}, {"x": 3})], "x", model)
    assert next(later).text == "w1"
    with pytest.raises(SpecError, match=r"b\.ndjson: line 2: x: a int; a text, or a list of messages is wanted"):
        next(later)


def test_an_order_that_a_seed_draws(model: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", *({"text": str(n)} for n in range(50)))
    first, again, other = (texts([file], None, model, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(map(int, first)) == list(range(50))
    assert first != sorted(first, key=int)


def test_conversations(model: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    file = lines(tmp_path / "a.jsonl", {"messages": chat, "text": "not this"})
    place = f"{file}: line 1: messages"
    with pytest.raises(
        SpecError, match=f"^{place}: a conversation, and the tokenizer of {model} has no chat template$"
    ):
        texts([file], None, model)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": CHAT}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert texts([file], None, model) == ["user w1 w2 assistant w3 "]
    assert texts([file], "text", model) == ["not this"]
    wrong = lines(tmp_path / "b.jsonl", {"messages": [{"role": "user"}]})
    with pytest.raises(SpecError, match="a list of messages with role and content is wanted"):
        texts([wrong], None, model)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"text": "w1"}\n\n{"text"\n', r"line 3: not JSON: "),
        ("[1]\n", r"line 1: a list and no object with fields"),
        ("{}\n", r"line 1: no field messages or conversations or text or content; it has none \(--calibration-field\)"),
    ],
)
def test_damaged_lines(model: Path, tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(SpecError, match=f"^{re.escape(str(tmp_path))}/a.jsonl: {line}"):
        texts([tmp_path / "a.jsonl"], None, model)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(SpecError, match="not UTF-8 text"):
        texts([tmp_path / "a.jsonl"], None, model)


def test_text_that_no_tokenizer_takes(model: Path, tmp_path: Path) -> None:
    for record in ({"text": "w1 \ud800"}, {"messages": [{"role": "user", "content": "\ud800"}]}):
        file = lines(tmp_path / "a.jsonl", record)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": CHAT}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        (name,) = record
        with pytest.raises(SpecError, match=rf"^{file}: line 1: {name}: not UTF-8 text: surrogates not allowed$"):
            texts([file], None, model)


def test_json_in_a_file_of_another_name(model: Path, tmp_path: Path) -> None:
    """Records are not read as text, braces and all."""
    file = lines(tmp_path / "a.json", {"text": " ".join(WORDS)})
    with pytest.raises(SpecError, match=rf"^{file}: JSON; records are JSON lines \(\.jsonl, \.ndjson\), text is .txt$"):
        calibration_batches(model, file, 1, 4)
    assert record_files(lines(tmp_path / "A.JSONL", {})) == [tmp_path / "A.JSONL"]


def test_tables_need_their_library(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SpecError, match=r"a\.parquet: is read with pyarrow; pip install pyarrow, or give JSON lines$"):
        texts([tmp_path / "a.parquet"], None, model)


def test_tables(model: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": ["w1", "w2"], "id": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with arrow.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        assert texts([tmp_path / name], None, model) == ["w1", "w2"]
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(SpecError, match=r"c\.parquet: cannot be read: "):
        texts([tmp_path / "c.parquet"], None, model)


def test_files_of_records(tmp_path: Path) -> None:
    place = tmp_path / "data"
    for name in ("b.jsonl", "a.parquet", "cache-1.arrow", ".hidden.jsonl", "dataset_info.json"):
        lines(place / name)
    lines(place / "train" / "data-00000-of-00001.arrow")
    found = [str(file.relative_to(place)) for file in record_files(place)]
    assert found == ["a.parquet", "b.jsonl", "train/data-00000-of-00001.arrow"]
    assert record_files(place / "dataset_info.json") == []


# -- as batches


def test_packed_windows(model: Path, tmp_path: Path) -> None:
    texts = [" ".join(WORDS[2:9]), " ".join(WORDS[9:14]), "w90"]
    file = lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    ids = [one for text in texts for one in load_tokenizer(model).encode(text)]
    found: Any = calibration_batches(model, file, 3, 5)
    assert torch.equal(torch.cat(found), torch.tensor(ids[:15]).view(3, 5))
    assert torch.equal(torch.cat(list(calibration_batches(model, file, 2, 5))), torch.tensor(ids[:10]).view(2, 5))  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(SpecError, match=rf"^{file}: 16 tokens do not fill a window of 40$"):
        calibration_batches(model, file, 3, 40)
    with pytest.raises(SpecError, match="a window of 65 tokens is longer than the 64 that it reads"):
        calibration_batches(model, lines(file, {"text": " ".join(WORDS * 2)}), 1, 65)


def test_padded_windows(model: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "w1 w2"}, {"text": " ".join(WORDS[2:20])}, {"text": "w9"})
    found: Any = calibration_batches(model, file, 2, 6, windows="padded")
    assert [one["input_ids"].tolist() for one in found] == [[[0, 3, 4, 0, 0, 0]], [[0, 2, 3, 4, 5, 6]]]
    assert [one["attention_mask"].tolist() for one in found] == [[[1, 1, 1, 0, 0, 0]], [[1] * 6]]
    with pytest.raises(SpecError, match="hold no tokens to calibrate on"):
        calibration_batches(model, lines(file), 2, 6, windows="padded")


def test_a_chat_template_writes_the_special_tokens_itself(model: Path, tmp_path: Path) -> None:
    """A text of a template starts as the template has it, with one ``<s>`` or none; other texts start with one."""
    import tokenizers

    vocabulary = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    vocabulary.add_special_tokens(["<s>"])
    vocabulary.save(str(model / "tokenizer.json"))
    file = lines(tmp_path / "a.jsonl", {"messages": [{"role": "w1", "content": "w2"}]}, {"text": "w3 w4"})
    for begin, first in (("{{ bos_token }}", [0, 3, 4]), ("", [3, 4])):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": begin + CHAT}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        padded: Any = calibration_batches(model, file, 2, 4, windows="padded")
        found = [one["input_ids"][one["attention_mask"] == 1].tolist() for one in padded]
        assert found == [first, [0, 5, 6]]
        packed: Any = calibration_batches(model, file, 1, len(first) + 3)
        assert packed[0].tolist() == [[*first, 0, 5, 6]]


def test_text_beside_records_is_not_left_out(model: Path, tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", {"text": "w1 w2 w3"})
    (tmp_path / "README.md").write_text("what records are of")
    assert len(calibration_batches(model, tmp_path, 1, 2)) == 1
    (tmp_path / "b.txt").write_text("more text")
    with pytest.raises(SpecError, match=r"holds records \(a\.jsonl\) and text \(b\.txt\); give one of them$"):
        calibration_batches(model, tmp_path, 1, 2)


def test_options_of_records_beside_text(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    for option, more in (("--windows padded", {"windows": "padded"}), ("--shuffle 0", {"shuffle": 0})):
        with pytest.raises(SpecError, match=rf"a\.txt: {option}: is for records \(\.jsonl, .*\), and this is text"):
            calibration_batches(model, tmp_path / "a.txt", 1, 2, **more)  # pyright: ignore[reportArgumentType]
    assert torch.equal(calibration_batches(model, tmp_path / "a.txt", 1, 2)[0], torch.tensor([[0, 3]]))  # pyright: ignore[reportArgumentType]
