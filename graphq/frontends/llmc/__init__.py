"""LLMC (LightCompress) configs, with ``mix_bits`` and ``ignored_layers`` as documented; docs/llmc.md has the rules.

https://github.com/ModelTC/LightCompress, v1.2.0 to v1.5.0. Where LLMC silently ignores a key or crashes on it, the
documented meaning holds here, or the key is refused by name.
"""

from graphq.frontends.llmc.method import METHODS
from graphq.frontends.llmc.read import SIGN, parse, recognises
from graphq.frontends.llmc.write import write

__all__ = ["METHODS", "SIGN", "parse", "recognises", "write"]
