"""msModelSlim's configs (``apiversion: modelslim_v1``) and descriptions of checkpoints; see docs/modelslim.md.

Of the repository Ascend/msmodelslim, as in July 2026. A ``quant_model_description.json`` is a plan, too: that each
layer is quantized as it was in that checkpoint.
"""

from graphq.frontends.modelslim.read import SIGN, parse, recognises
from graphq.frontends.modelslim.write import write

__all__ = ["SIGN", "parse", "recognises", "write"]
