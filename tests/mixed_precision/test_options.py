"""What may be given as an option, and what may not."""

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.mixed_precision.options import read_option, read_options
from graphq.spec.plan import KeepFloat


@pytest.mark.parametrize(
    ("given", "plan"),
    [
        ("w4a16", "weight int4/g128"),
        ("fp8-dynamic", "weight float8_e4m3fn/channel, input float8_e4m3fn/token/dynamic"),
        ("int3/asym/g64", "weight int3/asym/g64"),
        ("mxfp4", "weight mxfp4, input mxfp4/dynamic"),  # the preset of this name
        ("nvfp4 x nvfp4", "weight nvfp4, input nvfp4"),
        ("int4/g128 x int8/token/dynamic", "weight int4/g128, input int8/token/dynamic"),
    ],
)
def test_names_and_formats(given, plan):
    option = read_option(given)
    assert option.name == given
    assert str(option.spec.rules[0].decision) == plan


def test_a_spec_a_mapping_and_a_file(tmp_path):
    document = {"graphq": 1, "weight": "int5/g32"}
    file = tmp_path / "five.yaml"
    file.write_text("graphq: 1\nweight: int5/g32\n")
    made = [read_option(load_spec(document)), read_option(document), read_option(str(file))]
    assert [str(one.spec.rules[0].decision) for one in made] == ["weight int5/g32"] * 3
    assert [one.name for one in made] == ["weight int5/g32", "weight int5/g32", str(file)]


def test_float_keeps_layers():
    assert isinstance(read_option("float").spec.rules[0].decision, KeepFloat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["w4a16"], "options: 1 given; a search chooses among two or more"),
        ("w4a16, w8a16,w4a16", "options: w4a16 is given twice"),
        (["w4a16", "int40/g128"], "options: int40/g128: "),
        (["w4a16", "int4/g128 x int3"], "options: int4/g128 x int3: "),
        (["w4a16", "w4a16x"], "w4a16x: "),
        (["w4a16+gptq", "w8a16"], "options: w4a16+gptq and w8a16 have other algorithms"),
        (["w4a16", {"graphq": 1, "weight": "int8/channel", "profile": "ort-cpu"}], "options: weight int8/channel: an"),
    ],
)
def test_refused(options, message):
    with pytest.raises(SpecError) as caught:
        read_options(options)
    assert str(caught.value).startswith(message)


def test_float_takes_part_in_any_algorithms():
    assert [option.name for option in read_options("w4a16+gptq,float")] == ["w4a16+gptq", "float"]
