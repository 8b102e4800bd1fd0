"""What is copied beside an artifact's weights: every file that a loader reads, and no other."""

from pathlib import Path

from graphq.artifacts.companions import COMPANIONS, copy_companions

OTHERS = ("config.json", "model.safetensors", "model.safetensors.index.json", "README.md", "code.py", "graphq.json")


def test_what_loaders_read_is_copied_and_nothing_else(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    names = [name.replace("*", "tool_use") for name in COMPANIONS]
    for name in (*names, *OTHERS, "additional_chat_templates/notes.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "dict.txt").unlink()
    (source / "dict.txt").mkdir()  # a directory of this name is no file
    out.mkdir()
    copy_companions(source, out)
    found = {file.relative_to(out).as_posix(): file.read_text() for file in out.rglob("*") if file.is_file()}
    assert found == {name: name for name in names if name != "dict.txt"}


def test_the_names_that_transformers_has_for_them() -> None:
    """Its constants, and the files of its tokenizers' vocabularies."""
    import transformers
    from transformers import utils

    constants = (
        "GENERATION_CONFIG_NAME",
        "CHAT_TEMPLATE_FILE",
        "LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE",
        "PROCESSOR_NAME",
    )
    constants += ("IMAGE_PROCESSOR_NAME", "VIDEO_PROCESSOR_NAME", "AUDIO_TOKENIZER_NAME", "FEATURE_EXTRACTOR_NAME")
    assert {vars(utils)[name] for name in constants} <= set(COMPANIONS)
    assert f"{vars(utils)['CHAT_TEMPLATE_DIR']}/*.jinja" in COMPANIONS
    for tokenizer in (transformers.T5Tokenizer, transformers.GPT2Tokenizer, transformers.BertTokenizer):
        assert set(tokenizer.vocab_files_names.values()) <= set(COMPANIONS)
