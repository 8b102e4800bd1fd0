"""The profiles that there are: what each consumer of QDQ models runs in integers, one table a file."""

from collections.abc import Mapping
from dataclasses import replace
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
from graphq.spec.formats import Int
from graphq.spec.match import Kind, LayerKind
from graphq.spec.plan import Plan
from graphq.spec.profile import Profile
from graphq.spec.quant import Quant
from graphq.spec.rules import Rule, Spec

PROFILES: Final[Mapping[str, Profile]] = {
    p.name: p for p in (ORT_CPU, OPENVINO, TENSORRT, QNN_HTP, VITIS_AI, RKNN, GENERIC_INT8, TORCH_CPU)
}


REDUCE_RANGE: Final = "reduce_range"  # the option of profiles whose consumer saturates somewhere: weights of 7 bits


def profile_named(name: str) -> Profile:
    """The profile of that name, as an option behind a plus changes it: ``ort-cpu+reduce_range``. Raises ``SpecError``
    where there is none, or has no such option.
    """
    base, plus, option = name.partition("+")
    profile = PROFILES.get(base)
    if profile is None:
        raise SpecError(f"profile: {name}: no such profile; there are {', '.join(PROFILES)}")
    if not plus:
        return profile
    options = [REDUCE_RANGE] if profile.saturates else []
    if option not in options:
        raise SpecError(f"profile: {name}: options of {base}: {', '.join(options) or 'none'}")
    assert isinstance(profile.weight.format, Int), "as the tests of tables say"
    return replace(profile, name=name, weight=replace(profile.weight, format=replace(profile.weight.format, bits=7)))


_KINDS: Final = tuple(kind for kind in get_args(LayerKind) if kind not in ("embedding", "expert", "recurrent"))


def for_its_profile(spec: Spec) -> Spec:
    """The spec with scales that are powers of two where its profile wants these, and a note of what became of what.

    Raises ``SpecError``, with the place, for a method that fits scales which may be any number.
    """
    profile = PROFILES.get(spec.profile.partition("+")[0])  # what there is not is refused later
    if profile is None or not profile.power_of_two:
        return spec
    problems: list[str] = []
    made: dict[str, str] = {}

    def own(quant: Quant | None, source: str) -> Quant | None:
        try:
            changed = None if quant is None else profile.own(quant)
        except SpecError as error:
            problems.append((f"{source}: " if source else "") + f"{profile.name} wants powers of two: {error}")
            return quant
        if changed != quant:
            made[str(quant)] = str(changed)
        return changed

    def own_plan(rule: Rule) -> Rule:
        plan = rule.decision
        if not isinstance(plan, Plan):
            return rule
        weight, given, output = (own(quant, rule.source) for quant in (plan.weight, plan.input, plan.output))
        return replace(rule, decision=replace(plan, weight=weight, input=given, output=output))

    rules = tuple(map(own_plan, spec.rules))
    activations = tuple(replace(rule, quant=own(rule.quant, rule.source)) for rule in spec.activations)
    if problems:
        raise SpecError(problems)
    notes = [f"{profile.name}: scales are powers of two: {before} is {after}" for before, after in made.items()]
    return replace(spec, rules=rules, activations=activations, notes=(*spec.notes, *notes))


def default_spec(profile: Profile) -> Spec:
    """Every linear and convolution in the profile's types, wherever it stands; recurrent layers where it has steps."""
    kinds = (*_KINDS, "recurrent") if profile.steps else _KINDS
    rule = Rule(Kind("|".join(kinds)), Plan(profile.weight, profile.activation()), source=f"profile {profile.name}")
    return Spec((rule,), profile=profile.name)
