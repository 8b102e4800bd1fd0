"""A spec as an AMCT config."""

from graphq.errors import SpecError
from graphq.spec import Spec


def write(spec: Spec) -> str:
    """Raises ``SpecError``."""
    raise SpecError(f"amct: a spec of the dialect {spec.dialect} cannot be written in it")
