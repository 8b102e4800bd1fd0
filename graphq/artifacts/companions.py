"""The files beside a model's weights and configuration that its loaders read: tokenizers, processors, chat templates.

Source: transformers 5.23, the constants of ``utils`` and ``vocab_files_names`` of its tokenizers; vLLM 0.32, which
reads Mistral's and tiktoken's, too.
"""

import shutil
from pathlib import Path
from typing import Final

COMPANIONS: Final = (
    # generation
    "generation_config.json",
    # tokenizers: fast ones, their settings
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    # slow ones: byte pairs and words
    *("vocab.json", "merges.txt", "vocab.txt", "bpe.codes", "dict.txt", "normalizer.json", "emoji.json"),
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "byte_maps.json", "entity_vocab.json"),
    *("word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer"),
    # sentencepiece
    *("tokenizer.model", "sentencepiece.bpe.model", "sentencepiece.model", "spiece.model", "spm.model"),
    *("spm_char.model", "source.spm", "target.spm"),
    # tiktoken, and Mistral's
    *("tokenizer.tiktoken", "tiktoken.model", "qwen.tiktoken", "tekken.json"),
    # chat templates
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    # processors of images, video and sound
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    "audio_tokenizer_config.json",
)


def copy_companions(source: Path, directory: Path) -> None:
    """``directory`` has the files of ``COMPANIONS`` that ``source`` has, under the same names."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                place = directory / file.relative_to(source)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)
