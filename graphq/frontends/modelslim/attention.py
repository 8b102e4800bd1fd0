"""msModelSlim's ``fa3_quant``: queries, keys and values of attention in 8 bits.

Source: msModelSlim 26.1, processor/quant/fa3: ``qconfig`` for all three, by default int8 per head, or ``details`` of
each.
"""

from typing import Final

from graphq.frontends.document import Section, show
from graphq.spec.attention import AttentionOperands
from graphq.spec.formats import Float, Int
from graphq.spec.quant import PerHead, PerToken, Quant

_FORMATS: Final = {"int8": Int(8), "fp8_e4m3": Float("float8_e4m3fn")}
_SCOPES: Final = {"per_head": (PerHead(), False), "per_token": (PerToken(), True)}
_DETAILS: Final = {"fa_q": "q", "fa_k": "k", "fa_v": "v"}


def read_attention(section: Section) -> AttentionOperands | None:
    """The operands that the processor quantizes; None where it is wrong, which is reported."""
    section.only(("type", "qconfig", "details", "include", "exclude"))
    if section.values.get("include") not in (None, ["*"]) or section.values.get("exclude") not in (None, []):
        section.report("graphq has one format for every attention; leave out include and exclude", "include")
    before = len(section.document.problems)
    details = section.section("details")
    if details is None:
        quant = _read(section.section("qconfig"))
        found = dict.fromkeys(_DETAILS.values(), quant)
    else:
        if section.values.get("qconfig") is not None:
            section.unused("qconfig", "details say it of each operand")
        details.only(tuple(_DETAILS))
        found = {name: _read(details.section(key)) for key, name in _DETAILS.items() if key in details.values}
    if len(section.document.problems) > before:
        return None
    return section.made(lambda: AttentionOperands(**found), "type")


def _read(qconfig: Section | None) -> Quant | None:
    if qconfig is None:
        return Quant(Int(8), PerHead())
    qconfig.only(("dtype", "scope", "symmetric", "method", "ext"))
    dtype, scope = qconfig.text("dtype") or "int8", qconfig.text("scope") or "per_head"
    for key, word, known in (("dtype", dtype, _FORMATS), ("scope", scope, _SCOPES)):
        if word not in known:
            qconfig.report(f"{show(word)} is not {' or '.join(known)}", key)
    if qconfig.boolean("symmetric") is False:
        qconfig.report("attention's operands are symmetric; write true", "symmetric")
    if qconfig.text("method") not in (None, "minmax") or qconfig.values.get("ext") not in (None, {}):
        qconfig.report("attention's operands have minmax, without options", "method")
    if dtype not in _FORMATS or scope not in _SCOPES:
        return None
    granularity, dynamic = _SCOPES[scope]
    return Quant(_FORMATS[dtype], granularity, dynamic)
