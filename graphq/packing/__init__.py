"""Codes and scales as artifacts store them, in bytes and words, and back: graphq's own rows, other formats' layouts."""

from graphq.packing.rows import pack, packed_size, unpack
from graphq.packing.scales import (
    pack_hif4_scales,
    pair_scales,
    scale_to_word,
    unpack_hif4_scales,
    unpair_scales,
    word_to_scale,
)
from graphq.packing.words import AWQ_ORDER, pack_flat, pack_words, unpack_flat, unpack_words

__all__ = [
    "AWQ_ORDER",
    "pack",
    "pack_flat",
    "pack_hif4_scales",
    "pack_words",
    "packed_size",
    "pair_scales",
    "scale_to_word",
    "unpack",
    "unpack_flat",
    "unpack_hif4_scales",
    "unpack_words",
    "unpair_scales",
    "word_to_scale",
]
