"""Clusters that are not here: what a file may say, what is said of its mistakes, the examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edgellm.cli.app import app_of
from edgellm.errors import UsageError
from edgellm.planner.clusterfile import read_cluster

EXAMPLES = sorted((Path(__file__).parents[2] / "docs" / "clusters").glob("*.toml"))
SMALL = """
[model]
layers = 4
width = 64
ff = 128
heads = 4
kv_heads = 2
vocab = 300
"""
DEVICE = '[[device]]\nname = "pi"\nmemory = "1GiB"\n'


def planned(*arguments: str) -> Result:
    return CliRunner().invoke(app_of(), ["plan", *arguments])


def refused(tmp_path: Path, text: str, *arguments: str) -> tuple[int, str]:
    """The exit code and the message for a cluster file of this text."""
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    result = planned("--cluster", str(path), "--json", *arguments)
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == result.exit_code
    return result.exit_code, error["message"]


def test_a_file_in_full() -> None:
    read = read_cluster(
        SMALL
        + """
[link.cable]
round_trip_ms = 1
mbit_per_s = 800
[link.air]
round_trip_ms = 5
mbit_per_s = 80
shared = true
[[device]]
name = "desk"
memory = "2.5 GiB"
kept_apart = "512MiB"
decode_gb_per_s = 40
prefill_gflops = 500
step_overhead_ms = 0.1
link = "cable"
[[device]]
name = "phone"
count = 2
memory = 0
link = "air"
coordinator = true
[[between]]
devices = ["desk", "phone-2"]
round_trip_ms = 2
mbit_per_s = 8
"""
    )
    desk, first, second = read.offers
    assert [one.name for one in read.offers] == ["desk", "phone-1", "phone-2"]
    assert (desk.memory_bytes, desk.usable_bytes) == (5 << 29, 2 << 30)
    assert desk.speed is not None
    assert (desk.speed.decode_bytes_per_s, desk.speed.prefill_flops_per_s) == (40e9, 500e9)
    assert desk.speed.step_overhead_s == pytest.approx(1e-4)
    assert first.speed is None
    assert first.memory_bytes == 0
    assert read.coordinator_id == first.device_id
    between = read.links.between
    assert between(desk.device_id, first.device_id).round_trip_s == pytest.approx(3e-3)
    assert between(desk.device_id, first.device_id).bytes_per_s == 10e6
    assert between(first.device_id, second.device_id).bytes_per_s == 5e6  # twice through the air
    assert between(second.device_id, desk.device_id).bytes_per_s == 1e6
    assert read.model is not None
    assert read.model.n_layers == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[device]\n", "is not valid TOML"),
        (SMALL, "has no [[device]]: there is nothing to plan for"),
        ("[device]\nname = 'a'\n", "write [[device]], with two brackets"),
        ("[[devices]]\nname = 'a'\n", "'devices' is not known; did you mean 'device'?"),
        ("[[device]]\nmemory = '1GiB'\n", "[[device]] number 1: name is missing"),
        ("[[device]]\nname = 'a'\n", "device 'a': memory is missing"),
        (DEVICE + "memry = 3\n", "device 'pi': 'memry' is not known; did you mean 'memory'?"),
        ("[[device]]\nname = 'a'\nmemory = '1 lot'\n", "memory is '1 lot'; a size like"),
        ("[[device]]\nname = 'a'\nmemory = true\n", "memory is true or false; a size like"),
        ("[[device]]\nname = 'a'\nmemory = 7\n", "memory is the number 7; a size like"),
        ("[[device]]\nname = 'a b'\nmemory = 0\n", "a name has no spaces"),
        (DEVICE + DEVICE, "there is a device 'pi' already"),
        (DEVICE + "count = 0\n", "count is 0; 1 to 256 can be"),
        (DEVICE + "decode_gb_per_s = 3\n", "but prefill_gflops is missing"),
        (DEVICE + "decode_gb_per_s = -3\nprefill_gflops = 1\n", "decode_gb_per_s is -3;"),
        (DEVICE + "decode_gb_per_s = nan\nprefill_gflops = 1\n", "decode_gb_per_s is nan;"),
        (DEVICE + "link = 'cabel'\n[link.cable]\nround_trip_ms=1\nmbit_per_s=1\n", "'cable'?"),
        (DEVICE + "[link.cable]\nround_trip_ms=1\n", "[link.cable]: mbit_per_s is missing"),
        (DEVICE + "[link.cable]\nround_trip_ms=1\nmbit_per_s=0\n", "mbit_per_s is 0;"),
        (DEVICE + "[[between]]\ndevices = ['pi', 'desk']\n", "there is no device 'desk'"),
        (DEVICE + "[[between]]\ndevices = ['pi', 'pi']\n", "devices are two names"),
        (DEVICE + "[[between]]\ndevices = [['pi'], 3]\n", "devices are two names"),
        (DEVICE + "[model]\nlayers = 4.5\n", "layers is the number 4.5; an integer"),
        (DEVICE + "[model]\nlayers = 0\n", "layers is 0; 1 to 1024 can be"),
        (DEVICE + SMALL + "experts = 4\n", "0 of 4 experts cannot be in use"),
        ("model = 3\n" + DEVICE, "[model] is the number 3; a table was expected"),
        ("link = 3\n" + DEVICE, "[link] is the number 3; a table was expected"),
        ("device = [3]\n", "[[device]] number 1 is the number 3; a table was expected"),
        (DEVICE + "coordinator = 'yes'\n", "coordinator is the text 'yes'; true or false"),
        ("x = " + "[" * 5000 + "]" * 5000, "cluster.toml"),
    ],
)
def test_a_mistake_is_named_where_it_stands(tmp_path: Path, text: str, says: str) -> None:
    code, message = refused(tmp_path, text)
    assert code == 2
    assert says in message
    with pytest.raises(UsageError):
        read_cluster(text)


def test_no_model_and_no_file(tmp_path: Path) -> None:
    code, message = refused(tmp_path, DEVICE)
    assert (code, message) == (2, "the cluster file describes no [model].")
    result = planned("--cluster", str(tmp_path / "none.toml"), "--json")
    assert result.exit_code == 2
    assert "cannot be read: No such file" in json.loads(result.stdout)["error"]["message"]


def test_a_model_that_cannot_fit_gives_the_numbers(tmp_path: Path) -> None:
    large = SMALL.replace("layers = 4", "layers = 80").replace("width = 64", "width = 8192")
    code, message = refused(tmp_path, large + DEVICE + "count = 2\n")
    assert code == 3
    assert message.startswith("the model does not fit: the model needs ")
    offers = "pi-1 offers 1024.0 MiB, pi-2 offers 1024.0 MiB"
    assert f"{offers}; no split over their 2048.0 MiB fits" in message
    code, message = refused(tmp_path, large + DEVICE)
    needed = re.search(r"needs ([0-9.]+) MiB on one device; pi offers 1024.0 MiB, ", message)
    short = re.search(r", ([0-9.]+) MiB too little", message)
    assert needed is not None
    assert short is not None
    assert float(needed[1]) - float(short[1]) == pytest.approx(1024, abs=0.11)


def test_a_device_without_memory(tmp_path: Path) -> None:
    nothing = DEVICE.replace('"1GiB"', '"0MiB"')
    code, message = refused(tmp_path, SMALL + nothing)
    assert code == 3
    assert "; pi offers no memory; layer 3 with the head alone needs " in message
    path = tmp_path / "cluster.toml"
    path.write_text(SMALL + nothing + DEVICE.replace("pi", "desk"))
    told = json.loads(planned("--cluster", str(path), "--json").stdout)
    assert [stage["device"] for stage in told["plan"]["stages"]] == ["desk"]
    (left,) = told["left_out"]
    assert left["device"] == "pi"
    assert left["reason"].startswith("offers 0.0 MiB, and the smallest stage needs ")


def test_who_is_in_and_who_is_out(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(SMALL + DEVICE + "count = 3\n")
    cluster = ["--cluster", str(path), "--json"]

    def devices(*arguments: str) -> set[str]:
        told = json.loads(planned(*cluster, *arguments).stdout)
        return {stage["device"] for stage in told["plan"]["stages"]}

    assert len(devices()) == 1
    assert devices("--use", "pi-2", "--use", "pi-3") == {"pi-2", "pi-3"}
    assert devices("--without", "pi-1", "--without", "pi-2") == {"pi-3"}
    assert devices("--stages", "pi-3:0-1,pi-1:1-") == {"pi-1", "pi-3"}
    code, message = refused(tmp_path, path.read_text(), "--use", "desk")
    assert (code, message) == (2, "there is no device 'desk'; known devices: pi-1, pi-2, pi-3.")
    code, message = refused(tmp_path, path.read_text(), "--use", "pi-1", "--without", "pi-1")
    assert (code, message) == (2, "device pi-1 cannot be both in and left out.")
    both = ("--use", "pi-1", "--use", "pi-2", "--min-layers", "3")
    code, message = refused(tmp_path, path.read_text(), *both)
    assert code == 3
    assert message.endswith("with a stage on pi-1, pi-2 with 3 layers or more each.")
    code, message = refused(tmp_path, path.read_text(), "--objective", "speed")
    assert (code, message) == (2, "'speed' is no objective.")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_planned_and_explained(path: Path) -> None:
    result = planned("--cluster", str(path), "--explain", "--objective", "tpot")
    assert result.exit_code == 0, result.output
    for title in ("Who gets what, and why:", "What limits it:", "What would help:"):
        assert title in result.stdout
    assert "No plan over these devices is better" in result.stdout


def test_the_explanation_as_data() -> None:
    home = next(path for path in EXAMPLES if path.stem == "home")
    told = json.loads(planned("--cluster", str(home), "--explain", "--json").stdout)
    assert told["objective"] == "latency"
    assert told["least"] <= told["value"] * (1 + 1e-9)
    assert told["prediction"]["tokens_per_s"] > 0
    assert told["prediction"]["throughput_tokens_per_s"] > 0
    assert "Who gets what, and why" in told["explanation"]
    what = {one["what"]: one for one in told["would_help"]}
    assert "one more gigabyte on laptop" in what
    assert all(one["gain"] >= 0.01 for one in what.values())
    assert told["solo"]["device"] == "pi"
    assert told["solo"]["ttft_s"] > told["prediction"]["ttft_s"]


def test_all_three_examples_are_there() -> None:
    assert [path.stem for path in EXAMPLES] == ["four-pis", "home", "office"]
