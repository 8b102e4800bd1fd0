"""AMCT's config dicts (``amct_pytorch.quantize``), with its table of legal combinations; docs/amct.md has the rules.

https://gitcode.com/cann/amct, as of August 2026. Configs that AMCT takes and then ignores in part, or crashes on, mean
here what its documentation says, or are refused by name.
"""

from graphq.frontends.amct.presets import PRESETS, default_config, preset
from graphq.frontends.amct.read import SIGN, parse, recognises
from graphq.frontends.amct.write import write

__all__ = ["PRESETS", "SIGN", "default_config", "parse", "preset", "recognises", "write"]
