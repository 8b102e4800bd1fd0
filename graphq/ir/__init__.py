"""The graph of a model, and what can be known of it."""
