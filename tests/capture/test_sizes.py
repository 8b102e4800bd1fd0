"""Sizes of dimensions: those that a caller fixes, and the bounds that a model's own code and tables set."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.capture.export import FlatModel, export_flat
from graphq.capture.modules import capture_module
from graphq.capture.sizes import MAX_SIZE, bounds_of, fixed_sizes, position_limit, total_limit
from graphq.capture.source import BATCH, PAST, SEQUENCE, TOTAL, TensorInput, source_of
from graphq.errors import GraphError, SpecError

RANGES = [("batch", 1, MAX_SIZE), ("past_sequence", 0, 30), ("sequence", 2, 20)]


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- what a caller fixes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        ({}, {}),
        ({"batch": 1}, {"batch": 1}),
        ({PAST: 0, SEQUENCE: 20}, {PAST: 0, SEQUENCE: 20}),
        ({TOTAL: 9, PAST: 4}, {PAST: 4, SEQUENCE: 5}),
        ({TOTAL: 9, SEQUENCE: 4}, {PAST: 5, SEQUENCE: 4}),
        ({TOTAL: 9, SEQUENCE: 4, PAST: 5}, {PAST: 5, SEQUENCE: 4}),
    ],
)
def test_sizes(shapes: dict[str, int], sizes: dict[str, int]) -> None:
    assert fixed_sizes(shapes, RANGES) == (sizes, [])


@pytest.mark.parametrize(
    ("shapes", "problems"),
    [
        ([1], ["shapes: [1] is no table of sizes by dimension, such as {'batch': 1}"]),
        ({"b": 1}, ["shapes: no dimension b; there are batch, past_sequence, sequence, past_sequence + sequence"]),
        (
            {"batch": 0, "sequence": 21},
            ["shapes: batch: 0: it is 1 to 1,048,576", "shapes: sequence: 21: it is 2 to 20"],
        ),
        ({"batch": True}, ["shapes: batch: True is not a whole number"]),
        ({"batch": 1.0}, ["shapes: batch: 1.0 is not a whole number"]),
        ({TOTAL: 9}, [f"shapes: {TOTAL}: 9 fixes neither; give past_sequence or sequence, too"]),
        ({TOTAL: 9, PAST: 4, SEQUENCE: 4}, [f"shapes: {TOTAL}: 9 is not 4 + 4"]),
        ({TOTAL: 9, PAST: 10}, ["shapes: sequence: -1: it is 2 to 20"]),
    ],
)
def test_sizes_that_cannot_be(shapes: Any, problems: list[str]) -> None:
    assert fixed_sizes(shapes, RANGES)[1] == problems


def test_a_dimension_of_one_size_keeps_it() -> None:
    assert fixed_sizes({"batch": 3}, [("batch", 3, 3)]) == ({"batch": 3}, [])
    assert fixed_sizes({"batch": 4}, [("batch", 3, 3)])[1] == ["shapes: batch: 4: it is fixed at 3"]
    assert fixed_sizes({"batch": 4}, [])[1] == ["shapes: no dimension batch; all have one size already"]
    alone = [("sequence", 1, 9)]  # without a cache there is no sum
    assert fixed_sizes({TOTAL: 4}, alone)[1] == [f"shapes: no dimension {TOTAL}; there are sequence"]


class Row(nn.Module):
    """A model of one sample: it takes the batch for a row."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.view(1, -1))


class Anchored(nn.Module):
    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.register_buffer("anchors", floats(1, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.up(x), self.anchors], 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, 2, batch_first=True)
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.gru(x, state)
        return self.up(y), state


class Timed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.time = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        waves = step[:, None] * torch.arange(1, 5)
        return self.up(x) + self.time(waves.sin())[:, :, None, None]


ONE = 'declare its one size with shapes={"batch": 1}'
FIXED: list[tuple[type[nn.Module], tuple[Tensor, ...], str]] = [
    (
        Row,
        (floats(1, 8),),
        f"; it takes a batch of 1 and none of 2: {ONE}",
    ),
    (Anchored, (floats(1, 6, 4),), f"; it takes a batch of 1 and none of 2: {ONE}"),
    (
        Recurrent,
        (floats(1, 5, 4), floats(2, 1, 4)),
        f"first dimensions differ (x (1, 5, 4), state (2, 1, 4)); every input starts with the batch, unless it is fixed: {ONE}",
    ),
    (
        Timed,
        (floats(2, 3, 6, 6), floats(1)),
        "unless it is fixed: " + ONE.replace("1", "2"),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(FIXED)))
def test_a_model_of_one_batch_is_captured_once_that_is_declared(case: int) -> None:
    factory, inputs, message = FIXED[case]
    torch.manual_seed(0)
    model = factory().eval()
    with pytest.raises(GraphError) as caught:
        capture_module(model, inputs)
    assert str(caught.value).endswith(message)
    batch = inputs[0].shape[0]
    gm = capture_module(model, inputs, shapes={"batch": batch})
    source = source_of(gm)
    assert source.ranges[0] == ("batch", batch, batch)
    assert source.fixed == {"batch": batch}
    given = [torch.rand_like(x) for x in inputs]
    with torch.no_grad():
        expected = model(*given)
        for ours, theirs in zip(gm(*given), expected if isinstance(expected, tuple) else (expected,), strict=True):
            assert torch.equal(ours, theirs)
    assert all(not isinstance(size, str) for one in source.inputs for size in source.sizes(one.shape[:1]))


def test_a_model_that_takes_no_batch_of_the_examples_is_not_told_to_declare_it() -> None:
    class Depends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match=r"which a graph cannot hold$"):
        capture_module(Depends(), floats(1, 4))


def test_fixed_sizes_are_those_of_the_examples() -> None:
    model = nn.Linear(4, 4)
    wrong = "the example inputs are of another size (input (2, 5, 4))"
    for shapes, problem in (
        ({"batch": 1}, f"shapes: batch: 1: {wrong}"),
        ({"sequence": 6}, f"shapes: sequence: 6: {wrong}"),
        ({"length": 5}, "shapes: no dimension length; there are batch, sequence"),
    ):
        with pytest.raises(SpecError) as caught:
            capture_module(model, floats(2, 5, 4), shapes=shapes)
        assert str(caught.value) == problem
    with pytest.raises(SpecError, match=r"^shapes: no dimension sequence; there are batch$"):
        capture_module(model, floats(2, 4), shapes={"sequence": 4})
    source = source_of(capture_module(model, floats(2, 5, 4), shapes={"sequence": 5}))
    assert source.ranges == (("batch", 1, MAX_SIZE), ("sequence", 5, 5))
    assert source.sizes(source.inputs[0].shape) == ("batch", 5, 4)


def test_compile_and_explain_take_shapes() -> None:
    model, x = Row().eval(), floats(1, 8)
    rules = {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel"}]}
    made: Any = graphq.compile(model, rules, inputs=x, shapes={"batch": 1})
    assert made(x).shape == (1, 4)
    with pytest.raises(SpecError, match=r"^inputs: x has shape \(2, 8\); batch is 1 in this graph$"):
        made(floats(2, 8))
    assert len(graphq.explain(model, rules, inputs=x, shapes={"batch": 1}).layers) == 1


# -- what a model bounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guard", "bounds"),
    [
        ("2 <= L['tensors'][0].size()[1] and L['tensors'][0].size()[1] <= 20", (0, 20)),
        ("sequence <= 20", (0, 20)),
        ("sequence < 20", (0, 19)),
        ("5 <= sequence", (5, MAX_SIZE)),
        ("4 < sequence", (5, MAX_SIZE)),
        ("sequence >= 5", (5, MAX_SIZE)),
        ("sequence > 5", (6, MAX_SIZE)),
        ("sequence != 7", None),
        ("batch <= sequence", None),
        ("2*sequence <= 20", None),
        ("batch <= 3 and sequence <= 20", None),
        ("(4*size) % 12 == 0", None),
    ],
)
def test_bounds(guard: str, bounds: tuple[int, int] | None) -> None:
    assert bounds_of(guard) == bounds


class Positions(nn.Module):
    """Positions from a table of 9 rows, by one of the ways of models."""

    ids: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.up = nn.Linear(4, 4)
        self.table = nn.Embedding(9, 4)
        self.register_buffer("ids", torch.arange(9)[None])

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        match self.way:
            case "buffer":
                return self.up(x) + self.table(self.ids[:, :length])
            case "slice":
                return self.up(x) + self.table.weight[:length]
            case "counted":
                return self.up(x) + self.table(torch.arange(length, device=x.device)[None].expand(x.shape[0], -1))
            case "modulo":  # has a position for every size
                return self.up(x) + self.table(torch.arange(length) % 9)
            case "reversed":
                return self.up(x) + self.table(length - 1 - torch.arange(length))
            case _:
                return self.up(x) if length > 3 else -x


@pytest.mark.parametrize(
    ("way", "bounds"),
    [
        ("buffer", (1, 9)),
        ("slice", (1, 9)),
        ("counted", (1, 9)),
        ("branch", (4, MAX_SIZE)),
        ("modulo", (1, MAX_SIZE)),
        ("reversed", (1, MAX_SIZE)),  # not seen
    ],
)
def test_a_table_of_positions_bounds_the_sequence(way: str, bounds: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = Positions(way).eval()
    gm = capture_module(model, floats(3, 6, 4))
    source = source_of(gm)
    assert source.inputs[0].shape == ("batch", "sequence", 4)
    assert source.ranges == (("batch", 1, MAX_SIZE), ("sequence", *bounds))
    words = {"counted": "Positions has no more positions", "branch": "the model's code restricts dimension sequence"}
    if bounds != (1, MAX_SIZE):
        note = source.notes[-1]
        assert note.startswith(f"sequence is {bounds[0]} to {bounds[1]:,}: ")
        assert words.get(way, "the model's code restricts dimension sequence: ") in note
    with torch.no_grad():
        for length in (max(1, bounds[0]), min(9, bounds[1])):
            x = floats(2, length, 4)
            assert torch.equal(gm(x)[0], model(x))


class Rows(nn.Module):
    """Tokens as rows, and back: export asks whether the rows lie one behind the other, which they always do."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.up(x)
        h = h.reshape(batch * length, 4) if self.rows else h.reshape(batch, -1, 8)
        return h.view(batch, length, 4)


def test_a_condition_that_always_holds_fixes_nothing() -> None:
    torch.manual_seed(0)
    model = Rows(True).eval()
    gm = capture_module(model, floats(2, 3, 4))
    source = source_of(gm)
    assert (source.inputs[0].shape, source.notes) == (("batch", "sequence", 4), ())
    assert not [node for node in gm.graph.nodes if "assert" in str(node.target)]
    with torch.no_grad():
        for shape in ((1, 1, 4), (5, 7, 4)):
            assert torch.equal(gm(floats(*shape))[0], model(floats(*shape)))
    even = source_of(capture_module(Rows(False).eval(), floats(2, 6, 4)))
    assert even.inputs[0].shape == ("batch", 6, 4)  # an odd number of tokens has no such rows
    assert even.notes[0].startswith("dimension 1 of the inputs is fixed: Rows")


def test_artifacts_say_where_a_dimension_ends(tmp_path: Any) -> None:
    rules = {"graphq": 1, "rules": [{"match": "up", "weight": "int8/channel", "input": "int8/tensor"}]}
    made = graphq.compile(Positions("counted").eval(), rules, inputs=floats(3, 6, 4), calibration=[floats(2, 9, 4)])
    assert made.report.notes == ("sequence is 1 to 9: Positions has no more positions",)
    made.save(tmp_path / "torch")
    made.emit("onnx", tmp_path / "onnx")
    from graphq.lowering.targets import target_named

    opened = target_named("onnx").open(tmp_path / "onnx", source_of(made.graph))
    models: Any = (made, graphq.load(tmp_path / "torch"), opened)
    for model in models:
        assert model(floats(1, 9, 4)).shape == (1, 9, 4)
        with pytest.raises(SpecError, match=r"^inputs: x has shape \(1, 10, 4\); sequence is at most 9 in this graph$"):
            model(floats(1, 10, 4))
    with pytest.raises(SpecError, match=r"^calibration: batch 0: x has shape \(1, 12, 4\); sequence is at most 9 in"):
        graphq.compile(Positions("counted").eval(), rules, inputs=floats(3, 6, 4), calibration=[floats(1, 12, 4)])


def test_positions_behind_a_row_of_padding() -> None:
    class Config:
        max_position_embeddings = 20

    class Model(nn.Module):
        config = Config()

        def __init__(self, padding: int | None) -> None:
            super().__init__()
            self.position_embeddings = nn.Embedding(20, 4, padding_idx=padding)
            self.word_embeddings = nn.Embedding(7, 4, padding_idx=0)

    assert position_limit(Model(None)) == 20
    assert position_limit(Model(1)) == 18  # RoBERTa's: 514 rows for 512 tokens
    assert position_limit(nn.Linear(2, 2)) is None


# -- what a model's code sets on past and new tokens together ----------------------------------------------------------


@pytest.mark.parametrize(
    ("guards", "limit", "others"),
    [
        ([], None, []),
        (["sequence + past_sequence <= 2048"], 2048, []),
        (["2 + sequence + past_sequence <= 130", "(past_sequence + sequence) <= 200"], 128, []),
        (["sequence + past_sequence <= 128", "(sequence + past_sequence) != 128"], 127, []),
        (["(sequence + past_sequence) != 128", "sequence + past_sequence <= 128"], 127, []),
        (["sequence + past_sequence <= 128", "total_sequence != 200"], 128, []),
        # One size in the middle is no bound, and neither is one of another sum.
        (["sequence + past_sequence <= 128", "total_sequence != 7"], 128, ["total_sequence != 7"]),
        (["total_sequence != 7"], None, ["total_sequence != 7"]),
        (["sequence + batch <= 128", "sequence <= 4"], None, ["sequence + batch <= 128", "sequence <= 4"]),
    ],
)
def test_bounds_of_a_sum(guards: list[str], limit: int | None, others: list[str]) -> None:
    assert total_limit(guards) == (limit, others)


class PastPositions(nn.Module):
    """A table of 12 positions, of which past and new tokens take the first."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 4))

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        total = past.shape[1] + x.shape[1]
        return torch.cat([past, x], 1) + self.table[:total]


class WholeTable(nn.Module):
    """Looks whether its text is as long as its table, which export asks of the slice's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 1, 12, 12))

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        assert n <= 12
        return self.table[0, 0, :n, :n].contiguous() * ids[:, None, :]


def test_the_largest_size_may_be_left_out() -> None:
    inputs = [TensorInput("ids", torch.float32, (BATCH, SEQUENCE))]
    flat = FlatModel(WholeTable(), ["ids"], lambda module, tensors: module(**tensors))
    gm = export_flat(flat, inputs, (torch.ones(2, 3),), {SEQUENCE: 12})
    assert source_of(gm).bounds[SEQUENCE] == (1, 11)


def test_a_sum_is_bounded_and_not_its_parts() -> None:
    inputs = [
        TensorInput("x", torch.float32, (BATCH, SEQUENCE, 4)),
        TensorInput("past", torch.float32, (BATCH, PAST, 4)),
    ]
    flat = FlatModel(PastPositions(), ["x", "past"], lambda module, tensors: module(**tensors))
    gm = export_flat(flat, inputs, (torch.ones(2, 3, 4), torch.ones(2, 5, 4)))
    source = source_of(gm)
    assert source.bounds[TOTAL] == (1, 12)
    assert source.bounds[PAST][1] >= 10
    assert source.bounds[SEQUENCE][1] >= 10
    assert f"{TOTAL} is 1 to 12" in source.notes
    x, past = torch.ones(1, 1, 4), torch.ones(1, 11, 4)
    assert torch.equal(gm(x, past)[0], PastPositions.forward(flat.model, x, past))  # pyright: ignore[reportArgumentType]
