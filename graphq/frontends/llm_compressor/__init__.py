"""llm-compressor's recipes, and the ``quantization_config`` of a compressed-tensors checkpoint.

https://github.com/vllm-project/llm-compressor 0.14 and https://github.com/vllm-project/compressed-tensors 0.19;
docs/llm-compressor.md has the rules. Where code and documentation disagree, the documentation holds, as a note says.
"""

from graphq.frontends.llm_compressor.read import SIGN, parse, recognises
from graphq.frontends.llm_compressor.write import write

__all__ = ["SIGN", "parse", "recognises", "write"]
