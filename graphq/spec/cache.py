"""What a key/value cache can be quantized to."""

from graphq.errors import SpecError
from graphq.spec.formats import Float, Int
from graphq.spec.quant import (
    Entropy,
    Histogram,
    MinMax,
    MovingAverage,
    Mse,
    PerBlock,
    Percentile,
    PerChannel,
    PerGroup,
    PerHead,
    Quant,
)

MAX_CACHE_BITS = 8


def check_cache_quant(quant: Quant) -> None:
    """Raises ``SpecError`` for what no cache can hold: it grows by tokens, whose scales are known when they come."""
    if not isinstance(quant.format, Int | Float) or (
        isinstance(quant.format, Int) and quant.format.bits > MAX_CACHE_BITS
    ):
        raise SpecError(
            f"{quant}: a cache holds integers of up to {MAX_CACHE_BITS} bits, or floats such as float8_e4m3fn"
        )
    if quant.arithmetic != "float32":
        raise SpecError(f"{quant}: {quant.arithmetic} is the arithmetic of weights; leave it out")
    match quant.granularity:
        case PerBlock():
            raise SpecError(f"{quant}: blocks are those of weights; write tensor, head, channel, token or g<size>")
        case PerChannel() if quant.dynamic:
            raise SpecError(f"{quant}: a channel has one scale for all tokens, from calibration; leave out dynamic")
        case PerGroup() if not quant.dynamic:
            raise SpecError(f"{quant}: one scale per group exists only at run time; write {quant}/dynamic")
        case PerHead() | PerChannel() if not isinstance(quant.method, MinMax | MovingAverage):
            raise SpecError(
                f"{quant}: {quant.method} gives one scale per tensor; heads and channels take minmax or ema"
            )
        case _:
            pass
    if not isinstance(quant.method, MinMax | MovingAverage | Percentile | Histogram | Entropy | Mse):
        raise SpecError(f"{quant}: {quant.method} is for layers")
