"""Reading a modelslim_v0 config: the arguments that msModelSlim hands to the Python classes of its first version.

``anti_cfg`` are those of AntiOutlierConfig, ``calib_cfg`` those of QuantConfig, ``calib_params`` and
``calib_save_params`` those of Calibrator. The arithmetic of that version is partly compiled; its W8A8 and W8A16 are
those of the next one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from graphq.frontends.document import Section, nearest, show
from graphq.frontends.modelslim.globs import expand, is_name, read_patterns
from graphq.frontends.modelslim.qconfig import PD_MIX, Rounding, Scalar, Side, plan_of, read_number
from graphq.spec.folds import EVERYWHERE, NORMS, Folds
from graphq.spec.formats import Int
from graphq.spec.match import Exact, Linears, Match
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import PerChannel, PerGroup, Quant
from graphq.spec.rules import Algorithm, Rule, Run, Spec

HEAD: Final = "*lm_head"
_SPARSITY: Final = "sparsity (W8A8S) is not supported"
_SPARSE: Final = ("fraction", "nonuniform", "do_smooth", "use_sigma", "sigma_factor")
_RUNS: Final = ("dev_type", "dev_id")
_CALIB: Final = (
    *("w_bit", "a_bit", "w_sym", "w_method", "act_method", "mm_tensor", "is_dynamic", "is_lowbit", "open_outlier"),
    *("group_size", "percdamp", "pr", "co_sparse", "pdmix", "disable_names", "disable_last_linear"),
    *("use_kvcache_quant", "use_fa_quant", "fa_amp", *_SPARSE, *_RUNS),
)
_METHODS: Final[Mapping[str, tuple[str, tuple[tuple[str, Scalar], ...], Folds]]] = {
    "m1": ("smooth-quant", (("alpha", 0.5),), NORMS),
    "m3": ("awq", (("duo", False), ("clip", False)), EVERYWHERE),
    "m4": ("smooth-quant", (("alpha", 0.9),), EVERYWHERE),
    "m6": ("smooth-quant", (("alpha", "search"),), EVERYWHERE),
}
_AS: Final = {
    "m1": "smooth_quant with alpha 0.5",
    "m3": "awq",
    "m4": "iter_smooth with alpha 0.9",
    "m6": "flex_smooth_quant",
}
_OTHER_METHODS: Final = {
    "m2": "a shift of channels is not supported; write m4",
    "m5": "a shift of channels is not supported; write m4",
}
_W8, _TOKEN8 = Side("int8", "per_channel"), Side("int8", "per_token")


def read_v0(spec: Section) -> Spec | None:
    """The spec that ``spec`` means; None where it is wrong, which is reported."""
    spec.only(
        (
            *("anti_cfg", "anti_params", "calib_cfg", "calib_params", "calib_save_params", "batch_size"),
            *("anti_dataset", "calib_dataset"),
        )
    )
    for key, why in (("anti_dataset", "smoothing sees the data of calibration"), ("batch_size", "a window is a batch")):
        if spec.values.get(key) is not None:
            spec.unused(key, why)
    saved = spec.section("calib_save_params")
    if saved is not None:
        saved.only(("part_file_size",))
        spec.unused("calib_save_params", "the target decides")
    if spec.values.get("anti_params") not in (None, {}):
        spec.report("arguments of AntiOutlier are not supported; leave them out", "anti_params")
    smoothing = _read_smoothing(spec)
    calib = spec.section("calib_cfg", required=True)
    if calib is None:
        return None
    calib.only(_CALIB)
    plans = _Plans(calib)
    base = plans.base()
    rules = list(_read_calibrator(spec, plans))
    if base is not None and not any(rule.match == Linears("*") for rule in rules):
        rules.insert(0, Rule(Linears("*"), base, _origin(calib, "calib_cfg")))
    rules += _read_disabled(calib)
    cache = Quant(Int(8), PerChannel()) if calib.boolean("use_kvcache_quant") else None
    rounding = _read_rounding(calib)
    if base is None:
        return None
    algorithms = (*smoothing, *(() if rounding is None else (Algorithm(*rounding, _origin(calib, "calib_cfg")),)))
    run = Run(target="ascend", calibration=spec.text("calib_dataset") or "")
    return Spec(tuple(rules), algorithms, cache, run=run)


def _origin(section: Section, name: str) -> str:
    return section.document.origin(section.at, name)


def _read_smoothing(spec: Section) -> tuple[Algorithm, ...]:
    anti = spec.section("anti_cfg")
    if anti is None:
        return ()
    anti.only(("anti_method", "w_bit", "a_bit", "w_sym", "flex_config", "disable_anti_names", *_RUNS))
    for key in ("w_bit", "a_bit", "w_sym", *_RUNS):
        if key in anti.values:
            anti.unused(key, "factors are judged by each layer's own plan, where this runs")
    method = anti.text("anti_method") or "m2"
    if method in _OTHER_METHODS:
        anti.report(f"{method}: {_OTHER_METHODS[method]}", "anti_method")
    elif method not in _METHODS:
        anti.report(f"{show(method)} is not one of m1 to m6", "anti_method")
    names = read_patterns(anti, "disable_anti_names")
    flex = anti.section("flex_config")
    if method not in _METHODS:
        return ()
    anti.note(f"read as {_AS[method]} of the v1, for the v0's is compiled", "anti_method")
    name, options, folds = _METHODS[method]
    if flex is not None:
        options = _read_flex(flex, method) or options
    match: tuple[Match, ...] = (Linears("*", names),) if names else ()
    algorithm = anti.made(lambda: Algorithm(name, options, _origin(anti, "anti_cfg"), match, folds))
    return () if algorithm is None else (algorithm,)


def _read_flex(flex: Section, method: str) -> tuple[tuple[str, Scalar], ...] | None:
    flex.only(("alpha", "beta"))
    if method != "m6":
        flex.document.notes.append(f"{flex.document.prefix(flex.at)}ignored: it is for m6")
        return None
    alpha, beta = (None if flex.values.get(key) is None else read_number(flex, key) for key in ("alpha", "beta"))
    if alpha is None and beta is None:
        return None
    if alpha is None or beta is None or abs(alpha + beta - 1) > 1e-9:
        flex.report("beta is 1 - alpha in graphq; write such a pair, or neither to have them searched", "alpha")
        return None
    return (("alpha", alpha),)


class _Plans:
    """What ``calib_cfg`` means for a layer: as it stands, and under each word of ``mix_cfg``."""

    def __init__(self, calib: Section) -> None:
        self.calib = calib
        self.weights, self.inputs = (
            8 if calib.values.get(key) is None else calib.integer(key) for key in ("w_bit", "a_bit")
        )
        self.symmetric = calib.boolean("w_sym") is not False
        self.dynamic = calib.boolean("is_dynamic") or False
        self.low = calib.boolean("is_lowbit") or False
        self.grouped = self.low and calib.boolean("open_outlier") is False
        self.size = 64 if calib.values.get("group_size") is None else calib.integer("group_size")
        self.method = self._read_range()
        self._check()

    def _read_range(self) -> str:
        number = self.calib.integer("act_method")
        if number not in (None, 1, 2):
            message = "3 chooses a range by layers, which is not supported; write 1 (minmax) or 2 (histogram)"
            self.calib.report(message if number == 3 else f"{number} is not 1 (minmax) or 2 (histogram)", "act_method")
        return "histogram" if number == 2 else "minmax"

    def _check(self) -> None:
        calib = self.calib
        sparse = (self.weights, self.inputs) == (4, 8) and self.low and not self.dynamic
        if calib.boolean("co_sparse"):
            calib.report(_SPARSITY, "co_sparse")
        elif sparse:
            calib.report(f"without is_dynamic, low bits are sparse: {_SPARSITY}", "is_lowbit")
        else:
            for key in _SPARSE:
                if key in calib.values:
                    calib.unused(key, "an option of sparsity")
        if calib.boolean("pdmix"):
            calib.note(PD_MIX, "pdmix")
        if calib.boolean("use_fa_quant"):
            calib.report("attention's own inputs are not quantized; leave it out", "use_fa_quant")
        if calib.boolean("mm_tensor") is not False:
            calib.report("a weight has a scale for each channel; write False (left out, it is True)", "mm_tensor")
        if read_number(calib, "pr") not in (None, 1):
            calib.report("codes that are drawn are not supported; write 1.0", "pr")
        for key in ("fa_amp", *_RUNS):
            if key in calib.values:
                calib.unused(key, "it steers msModelSlim's own run")
        if "group_size" in calib.values and not self.grouped:
            calib.unused("group_size", "there are groups with is_lowbit and without open_outlier alone")

    def base(self) -> Plan | None:
        """The plan of every layer that nothing else names."""
        match self.weights, self.inputs:
            case 8, 8:
                return self.of("w8a8_dynamic" if self.dynamic else "w8a8")
            case 8, 16:
                return self.of("w8a16")
            case 4, 16:
                return self.of("w4a16")
            case 4, 8:
                return self._w4a8()
            case 4, 4 if self.dynamic:
                return self.of("w4a4_dynamic")
            case None, _:
                return None
            case _, None:
                return None
            case weights, inputs:
                self.calib.report(f"msModelSlim has no weights of {weights} bits with inputs of {inputs} bits", "w_bit")
                return None

    def _w4a8(self) -> Plan | None:
        if not self.dynamic or not self.grouped:
            if not self.calib.values.get("co_sparse") and not self.low:
                self.calib.report(
                    "W4A8 has is_dynamic: True, is_lowbit: True, open_outlier: False and a group_size", "w_bit"
                )
            return None
        return self.of("w4a8_dynamic")

    def of(self, word: str) -> Plan | None:
        """The plan of a word of ``mix_cfg``."""
        weight = Side("int8", "per_channel", self.symmetric)
        size = self.size if self.grouped else None
        if size is not None and self.calib.made(lambda: PerGroup(size), "group_size") is None:
            return None
        narrow = Side("int4", "per_channel" if size is None else "per_group", self.symmetric, group_size=size)
        made: Mapping[str, Callable[[], Plan]] = {
            "w8a8": lambda: plan_of(Side("int8", "per_tensor", False, self.method), _W8),
            "w8a8_dynamic": lambda: plan_of(_TOKEN8, _W8),
            "w8a16": lambda: plan_of(None, weight),
            "w4a16": lambda: plan_of(None, narrow),
            "w4a8_dynamic": lambda: plan_of(_TOKEN8, narrow),
            "w4a4_dynamic": lambda: plan_of(Side("int4", "per_token"), Side("int4", "per_channel")),
        }
        return self.calib.made(made[word])


def _read_calibrator(spec: Section, plans: _Plans) -> Iterator[Rule]:
    """The rules of ``calib_params.mix_cfg``: full names stand above patterns, of which the first decides."""
    params = spec.section("calib_params")
    if params is None:
        return
    params.only(("disable_level", "mix_cfg"))
    if (level := params.text("disable_level")) not in (None, "L0"):
        params.report(
            f"{show(level)}: layers that are chosen by their data are not supported; name them in disable_names",
            "disable_level",
        )
    mix = params.section("mix_cfg")
    if mix is None:
        return
    words = ["w8a8", "w8a16", "w8a8_dynamic", "float", *["w4a8_dynamic"] * plans.grouped]
    found: list[Rule] = []
    for pattern in mix.values:
        word = mix.text(pattern)
        globs = mix.made(lambda pattern=pattern: expand(pattern), pattern)
        if word is not None and word not in words:
            mix.report(f"{show(word)} is not one of {', '.join(words)}{nearest(word, words)}", pattern)
        if globs is None or word not in words:
            continue
        decision: Decision | None = KeepFloat("mix_cfg: float") if word == "float" else plans.of(word)
        if decision is None:
            continue
        for glob in globs:
            match = Exact(glob) if is_name(glob) else Linears(glob)
            source = mix.document.origin((*mix.at, pattern), "mix_cfg")
            found.append(Rule(match, decision, source, word == "float" and not is_name(glob)))
    yield from reversed([rule for rule in found if not isinstance(rule.match, Exact)])
    yield from [rule for rule in found if isinstance(rule.match, Exact)]


def _read_disabled(calib: Section) -> Iterator[Rule]:
    """What stays float whatever else is said: ``disable_names``, and the last linear where it is not asked for."""
    for index, name in enumerate(calib.items("disable_names", " of names")):
        if not isinstance(name, str):
            calib.report(f"{show(name)} is not a layer's name", "disable_names", index)
        elif (match := calib.made(lambda name=name: Exact(name), "disable_names", index)) is not None:
            source = calib.document.origin((*calib.at, "disable_names", index), "disable_names")
            yield Rule(match, KeepFloat("disable_names"), source)
    if calib.boolean("disable_last_linear") is not False:
        yield Rule(Linears(HEAD), KeepFloat("disable_last_linear"), "calib_cfg", may_match_nothing=True)


def _read_rounding(calib: Section) -> Rounding | None:
    method = calib.text("w_method")
    dampening = read_number(calib, "percdamp")
    if method == "GPTQ":
        options: list[tuple[str, Scalar]] = [("act_order", "none"), ("scales", "plan")]
        return "gptq", (*options, *(() if dampening is None else (("dampening", dampening),)))
    if "percdamp" in calib.values:
        calib.unused("percdamp", "an option of GPTQ")
    if method not in (None, "MinMax"):
        calib.report(f"{show(method)} is not supported; write MinMax or GPTQ", "w_method")
    return None
