"""A quantized model on one page, and the same as data."""
