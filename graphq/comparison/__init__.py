"""Where two forms of a model differ, layer by layer."""
