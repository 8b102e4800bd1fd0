"""The profiles that there are: what each consumer of QDQ models runs in integers, one table a file."""

from collections.abc import Mapping
from typing import Final, get_args

from graphq.errors import SpecError
from graphq.lowering.profiles.generic_int8 import GENERIC_INT8
from graphq.lowering.profiles.openvino import OPENVINO
from graphq.lowering.profiles.ort_cpu import ORT_CPU
from graphq.lowering.profiles.qnn_htp import QNN_HTP
from graphq.lowering.profiles.rknn import RKNN
from graphq.lowering.profiles.tensorrt import TENSORRT
from graphq.lowering.profiles.torch_cpu import TORCH_CPU
from graphq.lowering.profiles.vitis_ai import VITIS_AI
from graphq.spec.match import Kind, LayerKind
from graphq.spec.plan import Plan
from graphq.spec.profile import Profile
from graphq.spec.rules import Rule, Spec

PROFILES: Final[Mapping[str, Profile]] = {
    p.name: p for p in (ORT_CPU, OPENVINO, TENSORRT, QNN_HTP, VITIS_AI, RKNN, GENERIC_INT8, TORCH_CPU)
}


def profile_named(name: str) -> Profile:
    """The profile of that name. Raises ``SpecError`` where there is none."""
    if name not in PROFILES:
        raise SpecError(f"profile: {name}: no such profile; there are {', '.join(PROFILES)}")
    return PROFILES[name]


_KINDS: Final = tuple(kind for kind in get_args(LayerKind) if kind not in ("embedding", "expert", "recurrent"))


def default_spec(profile: Profile) -> Spec:
    """Every linear and convolution in the profile's types, wherever it stands; recurrent layers where it has a row."""
    recurrent = ("recurrent",) if "LSTM" in profile.ops else ()  # OpenVINO takes no codes as weights of an LSTM
    rule = Rule(
        Kind("|".join(_KINDS + recurrent)), Plan(profile.weight, profile.activation()), source=f"profile {profile.name}"
    )
    return Spec((rule,), profile=profile.name)
