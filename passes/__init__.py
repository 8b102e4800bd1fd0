"""What the compiler does, one pass a file, in the order in which ``graphq.compile`` runs them.

1. ``remove_no_ops``: aliases and other identities are gone.
2. ``raise_recurrent``: an LSTM, GRU or RNN is linears of its inputs and recurrences of its states.
3. ``fold_weights``: what a model computes weights of, from its own tensors alone, is tensors.
4. ``raise_linear``: products by stored matrices are linears, however the source writes them.
5. ``raise_grouped_linear``: experts' products of every origin are one op.
6. ``split_gate_up``: experts' fused gate and up projections are two layers.
7. ``annotate``: every layer knows its plan, or why it stays float.
8. ``observe``: activations with static scales pass through observers.
9. ``calibrate``: the observers have seen the calibration data.
10. ``quantize_weights``: weights are codes, read through ``graphq::dequantize``.
11. ``quantize_activations``: activations go through ``graphq::quantize`` and ``graphq::dequantize``, not observers.

For a profile, ``fold_batch_norm``, ``raise_rms_norm``, ``unroll_recurrent`` and ``decompose`` bring the graph into the
ops that its consumer has, before ``annotate``. The algorithms that a spec asks for stand between these, in the order
that ``graphq.algorithms`` writes out. ``graphq.observers`` holds what ``observe`` puts in. What comes out is the QDQ
form, from which ``graphq.lowering`` makes artifacts.
"""
