"""What the compiler does, one pass a file, in the order in which ``graphq.compile`` runs them.

1. ``remove_no_ops``: aliases and other identities are gone.
2. ``raise_linear``: products by stored matrices are linears, however the source writes them.
3. ``raise_grouped_linear``: experts' products of every origin are one op.
4. ``split_gate_up``: experts' fused gate and up projections are two layers.
5. ``annotate``: every layer knows its plan, or why it stays float.
6. ``observe``: activations with static scales pass through observers.
7. ``calibrate``: the observers have seen the calibration data.
8. ``quantize_weights``: weights are codes, read through ``graphq::dequantize``.
9. ``quantize_activations``: activations go through ``graphq::quantize`` and ``graphq::dequantize``; observers are gone.

The algorithms that a spec asks for stand between these, in the order that ``graphq.algorithms`` writes out.
``graphq.observers`` holds what ``observe`` puts in. What comes out is the QDQ form, from which ``graphq.lowering``
makes artifacts.
"""
