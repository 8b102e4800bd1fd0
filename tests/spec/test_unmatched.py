"""Which layer's name is most like one that no layer has; what rules say of it is in ``test_rules``."""

import pytest

from graphq.spec.unmatched import nearest_layer


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("down_porj", "down_proj"),
        ("mlp.donw_proj", "mlp.down_proj"),
        ("zzz", None),
        ("", None),
        # What is left without what stands in front, which a model has whose language half alone is captured.
        ("language_model.head", "head"),
        ("some.language_model.layers.1.mlp.down_proj", "layers.1.mlp.down_proj"),
        ("the_whole_language_model.mlp.down_proj", "mlp.down_proj"),
        ("some_language_model.zzz", None),
    ],
)
def test_nearest_layer(name, near):
    assert nearest_layer(name, ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "head"]) == near
