"""From the QDQ form to what a runtime loads, a folder for each target; ``targets`` has a row for each.

A target is a function ``emit(gm, path, made_from, *, overwrite, ...)`` behind ``legalize``, which names the layer that
it cannot hold. The parameters behind the star are the target's options.
"""
