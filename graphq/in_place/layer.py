"""One layer that is quantized where it stands: what it has seen, and the factors that it has from then on.

A layer has three lives. Until it is settled it computes in floats and its inputs are kept, as statistics where the
passes look at the data once and as they are where they look again. Settled, it has its factors as buffers and gives
what its quantized form gives. ``QuantizedLayer`` takes its place at last.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx, nn

from graphq import numerics
from graphq.errors import SpecError
from graphq.in_place.graph import Layer, factors_of, form_of, layer_graph
from graphq.ir.pipeline import Pass, Pipeline
from graphq.numerics import Scales
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import observers
from graphq.runtime.layers import Factors, Form, QuantizedLayer, fake_quantized, flat, unflat
from graphq.spec.formats import is_asymmetric
from graphq.spec.plan import Plan
from graphq.spec.quant import Ofmr
from graphq.state import put_tensor, tensor_of

FACTORS: Final = (
    *("quantized_weight", "scale_w", "offset_w", "global_scale_w", "scale_d", "offset_d", "scale_factor"),
)


@final
class InPlaceLayer:
    """The state of one layer; ``called`` and ``load`` are its hooks.

    ``passes``: those of its plan, in order. ``needs_data``: whether they look at inputs. ``open``: whether a batch is
    on its way; ``batches``: how many have reached the layer.
    """

    def __init__(self, fqn: str, layer: Layer, plan: Plan, passes: Sequence[Pass], needs_data: bool) -> None:
        self.fqn, self.layer, self.plan, self.needs_data = fqn, layer, plan, needs_data
        self.passes = tuple(passes)
        self.cuts = [i for i, step in enumerate(passes) if isinstance(step, Calibrate)]
        self.looks_again = len(self.cuts) > 1 or (plan.input is not None and isinstance(plan.input.method, Ofmr))
        self.open = False
        self.batches = 0
        self.number = 0
        self.pending: list[Tensor] = []
        self.held: list[tuple[Tensor]] = []
        self.gm: fx.GraphModule | None = None
        self.handles: list[Any] = []

    def attach(self) -> None:
        """The layer is watched, and has the names of its factors."""
        for name in FACTORS:
            self.layer.register_buffer(name, None)
        self.handles = [
            # First of all hooks of outputs, so that the user's see what the packed layer will give.
            self.layer.register_forward_hook(self.called, prepend=True, with_kwargs=True),
            self.layer.register_load_state_dict_pre_hook(self.load),
        ]

    def detach(self) -> None:
        """It is not watched any more."""
        for handle in self.handles:
            handle.remove()

    @property
    def form(self) -> Form:
        """The layer's own, as it is now: its dtype may have changed."""
        return form_of(self.layer, self.plan)

    @property
    def is_settled(self) -> bool:
        return isinstance(cast(object, self.layer.scale_w), Tensor)

    @property
    def is_reached(self) -> bool:
        """Whether it has seen what it needs."""
        return bool(self.batches) or not self.needs_data

    # -- hooks

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """A settled layer gives what its quantized form gives. The input of another one, in a batch that is on its way,
        is kept until the batch is through.
        """
        x = args[0] if args else kwargs["input"]
        if not self.is_settled:
            if self.open and self.needs_data and x.numel():
                self._keep(x.detach())
            return None
        form = self.form
        with torch.no_grad():
            y = fake_quantized(form, self.factors(), flat(form, x), self.layer.bias)
            return unflat(form, x, y).to(output.dtype)

    def _keep(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise SpecError(f"calibration: batch {self.number}: the input of {self.fqn} holds NaN or Inf")
        self.pending.append(x.clone())  # whoever reads it next may change it in place

    def load(
        self, module: nn.Module, state: Mapping[str, Any], prefix: str, _m: Any, _s: Any, _k: Any, _u: Any, errors: Any
    ) -> None:
        """Factors that a state dict holds have their places, so that they are loaded like other buffers."""
        given = {name: state[prefix + name] for name in FACTORS if prefix + name in state}
        if not given:
            return
        wanted = self._empty()
        optional = {"scale_factor"}
        if (set(given) ^ set(wanted)) - optional:
            errors.append(
                f"{self.fqn}: factors {', '.join(given)}; its plan ({self.plan}) has"
                f" {', '.join(name for name in wanted if name not in optional)}"
            )
            return
        wrong = [n for n, t in given.items() if (t.shape, t.dtype) != (wanted[n].shape, wanted[n].dtype)]
        for name in wrong:
            was, want = (f"{t.dtype}{list(t.shape)}" for t in (given[name], wanted[name]))
            errors.append(f"{self.fqn}: {name}: {was}, not {want}")
        if not wrong:
            for name in FACTORS:
                setattr(self.layer, name, wanted[name] if name in given else None)
            self._forget()

    # -- calibration

    def begin(self, number: int) -> None:
        """Batch ``number`` is on its way; what an earlier one left behind that failed is gone."""
        self.pending, self.open, self.number = [], True, number

    def take(self) -> None:
        """The batch is through: what it gave this layer counts."""
        self.open = False
        pending, self.pending = self.pending, []
        if not pending:
            return
        form = self.form
        self.batches += 1
        flats = [flat(form, x) for x in pending]
        if self.looks_again:
            self.held += [(x,) for x in flats]
            return
        if self.gm is None:
            self.gm = self._graph()
            Pipeline(self.passes[: self.cuts[0]]).run(self.gm)
            self.gm.to(self.layer.weight.device)
        for _, observer in observers(self.gm):
            for x in flats:
                observer(x)

    def settle(self) -> None:
        """The layer has its factors, from what it has seen."""
        gm, steps = self.gm, self.passes
        if gm is None:
            gm = self._graph()
        else:
            steps = steps[self.cuts[0] + 1 :]
            seen, now = tensor_of(gm, f"{self.fqn}.weight"), self.layer.weight
            if (seen.dtype, seen.device) != (now.dtype, now.device):
                was, now = (f"{w.dtype} on {w.device}" for w in (seen, now))
                raise SpecError(f"calibration: the weight of {self.fqn} was {was} and is {now}; calibrate anew")
            put_tensor(gm, f"{self.fqn}.weight", now)  # of a copied model, the graph's is another one
        Pipeline(steps).run(gm, self.held)
        found = factors_of(gm, self.fqn)
        for name, tensor in self._shown(found).items():
            setattr(self.layer, name, tensor.contiguous())
        self._forget()

    def _graph(self) -> fx.GraphModule:
        return layer_graph(self.fqn, self.layer, self.form)

    def _forget(self) -> None:
        self.gm, self.held, self.pending = None, [], []

    # -- factors

    def factors(self) -> Factors:
        """The layer's factors, from its buffers, in the shapes that they are computed with."""
        form = self.form
        held = cast(Mapping[str, Tensor | None], {name: getattr(self.layer, name) for name in FACTORS})
        codes, scale, zero_point = held["quantized_weight"], held["scale_w"], held["offset_w"]
        assert codes is not None, "settled"
        assert scale is not None, "settled"
        shape = numerics.scale_shape(form.shape, form.block)
        weight = Scales(
            scale.to(numerics.scale_dtype(form.weight.format, form.dtype)).reshape(shape),
            None if zero_point is None else zero_point.to(numerics.code_dtype(form.weight.format)).reshape(shape),
            held["global_scale_w"],
        )
        x, fixed, offset = form.input, held["scale_d"], held["offset_d"]
        if x is None or fixed is None:
            return Factors(codes, weight, None, held["scale_factor"])
        zero = None if offset is None else offset.to(numerics.code_dtype(x.format))
        return Factors(codes, weight, Scales(fixed, zero), held["scale_factor"])

    def _shown(self, found: Factors) -> dict[str, Tensor]:
        """Factors in the shapes and dtypes of buffers."""
        scale, zero_point, upper = found.weight
        fixed, offset, _ = found.input or (None, None, None)
        factor = found.scale_factor
        made = {
            "quantized_weight": found.codes,
            "scale_w": scale.reshape(1) if scale.numel() == 1 else scale,
            "offset_w": None if zero_point is None else _offset(zero_point),
            "global_scale_w": upper,
            "scale_d": None if fixed is None else fixed.reshape(1),
            "offset_d": None if offset is None else _offset(offset),
            "scale_factor": None if factor is None else factor.reshape(_channels(self.form)),
        }
        return {name: tensor for name, tensor in made.items() if tensor is not None}

    def _empty(self) -> dict[str, Tensor]:
        """Buffers for factors of the right shapes and dtypes, whatever they hold; ``scale_factor`` among them."""
        form, x = self.form, self.plan.input
        codes = torch.empty(form.shape, dtype=numerics.code_dtype(form.weight.format))
        fixed = None
        if x is not None and not x.dynamic:
            fixed = Scales(torch.empty(1), torch.empty(1, dtype=torch.int32) if is_asymmetric(x.format) else None)
        factor = torch.empty(_channels(form), dtype=form.dtype)
        weight = numerics.empty_scales(form.shape, form.block, form.weight.format, dtype=form.dtype)
        made = self._shown(Factors(codes, weight, fixed, factor))
        return {name: tensor.to(self.layer.weight.device) for name, tensor in made.items()}

    # -- the end

    def quantized(self) -> QuantizedLayer:
        """What takes the layer's place, in the same mode."""
        form = self.form
        return QuantizedLayer(form, self.factors(), self.layer.bias).train(self.layer.training)


def _offset(zero_point: Tensor) -> Tensor:
    return (zero_point.reshape(1) if zero_point.numel() == 1 else zero_point).to(torch.int32)


def _channels(form: Form) -> list[int]:
    """The shape of what multiplies the channels of a flat input."""
    conv = form.convolution
    return [1, form.shape[1]] if conv is None else [1, form.shape[1] * conv.groups, 1, 1]
