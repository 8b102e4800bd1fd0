"""From the QDQ form to what a runtime loads, one target a file.

A target is a function ``emit(gm, path, **options)`` behind ``legalize``, which names the layer that it cannot hold.
"""
