"""Device descriptions."""

import pytest

from fira.errors import UserError
from fira.planner.device_specs import DEVICES, load

H200 = (DEVICES / "h200.toml").read_text()


def test_shipped_description():
    t4 = load("t4")
    assert t4.memory == 16e9
    assert t4.flops["fp16"] == 0.4 * 65e12
    assert t4.links(2, 1)["p2p"].seconds(12e9) == 1 + 15e-6


@pytest.mark.parametrize(
    ("device", "precision"), [("t4", "fp16"), ("a100", "bf16"), ("h100", "bf16"), ("h200", "bf16")]
)
def test_fastest_precision(device, precision):
    assert load(device).fastest_precision() == precision


def test_fastest_precision_is_one_that_the_description_has(hardware):
    assert hardware.fastest_precision() == "fp32"


def test_links_of_a_group_within_a_node_and_across_nodes(hardware):
    assert hardware.links(2, 1) is hardware.inside
    assert hardware.links(3, 1) is hardware.between
    assert hardware.links(2, 2) is hardware.between
    assert hardware.links(1, 8) is hardware.inside


def test_operation_with_a_table_of_its_own(tmp_path):
    text = (DEVICES / "t4.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text + "\n[between.all_to_all]\nlatency = 1.0\nbandwidth = 2.0\n")
    device = load(str(path))
    assert device.between["all_to_all"].seconds(2) == 2
    assert device.between["p2p"].seconds(2.5e9) == 1 + 50e-6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "mine"\nmemory = 1e9\n', "the file has no value for efficiency; .*h200.toml is a complete example"),
        ("name =", "is not TOML"),
        (H200.replace("efficiency = 0.6", 'efficiency = "half"'), "a value has the wrong type"),
        (H200.replace("memory = 141e9", "memory = nan"), "mine.toml: memory: give a number greater than 0, not nan"),
        (
            H200.replace("bandwidth = 40e9", "bandwidth = 0"),
            "bandwidth: give a number greater than 0, not 0",
        ),
        (H200.replace("bf16 = 989e12", "bf16 = -1"), "mine.toml: bf16 in flops times efficiency: give a number"),
    ],
)
def test_invalid_file_raises(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load(str(path))
