"""`kvexport.devices.targets`: shipped targets are complete, and errors in a target file name the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvexport.devices.targets import known_targets, load_target, lowering_for, tensorrt_version
from kvexport.errors import UsageError

NAMES = {
    "orin-nano-4gb",
    "orin-nano-4gb-super",
    "orin-nano-8gb",
    "orin-nano-8gb-super",
    "orin-nx-8gb",
    "orin-nx-16gb",
    "agx-orin-32gb",
    "agx-orin-64gb",
    "thor-t4000",
    "thor-t5000",
    "rtx-4090",
    "h200",
    "cpu",
}

GOOD = """
title = "My board"
engine = "tensorrt"
sm = "8.7"
memory_gib = 8
usable = 0.5
bandwidth_gb_s = 68
fp16_tflops = 10.5
unified = true
tensorrt = "10.3.0"

[jetpacks]
"6.2" = "10.3.0.30"

[sources]
sm = "a page"
memory_gib = "a page"
usable = "a page"
bandwidth_gb_s = "a page"
fp16_tflops = "a page"
tensorrt = "a page"
jetpacks = "a page"
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(text: str, name: str = "my-board.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_lists_every_shipped_target_in_order() -> None:
    names = [target.name for target in known_targets()]
    assert set(names) == NAMES
    assert names == sorted(names)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_shipped_target_has_plausible_values_and_sources(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.title
    assert 2**31 < target.memory < 2**38
    assert 0.4 < target.usable <= 0.9
    assert target.usable_bytes == int(target.memory * target.usable)
    assert 30e9 < target.bandwidth < 10e12
    assert (
        (target.engine == "onnxruntime")
        == (target.sm is None)
        == (target.tensorrt is None)
        == (target.fp16 is None)
    )
    if target.fp16 is not None and target.int8 is not None:
        assert target.int8 >= 1.9 * target.fp16
    assert {"memory_gib", "usable", "bandwidth_gb_s"} <= target.sources.keys()
    if "jetson" in target.title.lower():
        assert target.jetpacks
        assert target.unified
    for jetpack in target.jetpacks:
        assert tensorrt_version(target, jetpack=jetpack) >= (10, 3)


def test_super_mode_has_more_bandwidth_and_equal_memory() -> None:
    plain, fast = load_target("orin-nano-8gb"), load_target("orin-nano-8gb-super")
    assert fast.bandwidth == pytest.approx(1.5 * plain.bandwidth)
    assert fast.memory == plain.memory == 8 * 2**30


def test_loads_a_users_file(write: Callable[..., str]) -> None:
    target = load_target(write(GOOD))
    assert (target.name, target.title, target.sm) == ("my-board", "My board", "8.7")
    assert (target.memory, target.usable_bytes) == (8 * 2**30, 4 * 2**30)
    assert (target.bandwidth, target.fp16, target.int8) == (68e9, 10.5e12, None)
    assert lowering_for(target) == "decomposed17"


def test_loads_an_edited_copy_of_a_shipped_file(write: Callable[..., str]) -> None:
    shipped = Path(__file__).resolve().parent.parent.parent / "graphs" / "targets" / "cpu.toml"
    mine = load_target(
        write(shipped.read_text(encoding="utf-8").replace("memory_gib = 16", "memory_gib = 32"), "mine.toml")
    )
    assert mine.memory == 2 * load_target("cpu").memory


@pytest.mark.parametrize("name", ["orin", "", "/nowhere/at/all.toml", "cpu.toml", "../cpu"])
def test_the_error_for_an_unknown_target_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_target(name)
    assert "orin-nano-8gb" in str(caught.value)
    assert "TOML" in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('title = "My board"', "", "title"),
        ('title = "My board"', 'title = " "', "title"),
        ('title = "My board"', "title = 3", "title"),
        ('engine = "tensorrt"', 'engine = "openvino"', "engine"),
        (
            'engine = "tensorrt"',
            'engine = "onnxruntime"',
            "tensorrt",
        ),  # ONNX Runtime has no TensorRT version
        ('tensorrt = "10.3.0"', "", "sources"),  # a source without its value
        ('tensorrt = "10.3.0"', 'tensorrt = "ten"', "tensorrt"),
        ('tensorrt = "10.3.0"', 'tensorrt = "8.6.2"', "too old"),
        ('tensorrt = "10.3.0"', "tensorrt = 10.3", "tensorrt"),
        ('sm = "8.7"', 'sm = "87"', "sm"),
        ('sm = "8.7"', "sm = 8.7", "sm"),
        ("memory_gib = 8", "", "memory_gib"),
        ("memory_gib = 8", "memory_gib = 0", "memory_gib"),
        ("memory_gib = 8", "memory_gib = -8", "memory_gib"),
        ("memory_gib = 8", 'memory_gib = "8"', "memory_gib"),
        ("memory_gib = 8", "memory_gib = true", "memory_gib"),
        ("memory_gib = 8", "memory_gib = inf", "memory_gib"),
        ("memory_gib = 8", "memory_gib = nan", "memory_gib"),
        ("memory_gib = 8", "memory_gib = 1e300", "memory_gib"),  # exceeds a float64 once multiplied to bytes
        ("memory_gib = 8", "memory_gib = 1e-300", "memory_gib"),
        ("memory_gib = 8", f"memory_gib = {10**400}", "memory_gib"),
        ("memory_gib = 8", f"memory_gib = {'1' * 5000}", "must be TOML"),
        ("memory_gib = 8", f"memory_gib = {'[' * 50_000}", "must be TOML"),
        ("usable = 0.5", "usable = 0", "usable"),
        ("usable = 0.5", "usable = 1.01", "usable"),
        ("usable = 0.5", "usable = 50", "usable"),
        ("bandwidth_gb_s = 68", "", "bandwidth_gb_s"),
        ("bandwidth_gb_s = 68", "bandwidth_gb_s = 0", "bandwidth_gb_s"),
        ("bandwidth_gb_s = 68", "bandwidth = 68", "bandwidth"),
        ("bandwidth_gb_s = 68", "bandwidth_gb_s = 1e308", "bandwidth_gb_s"),
        ("fp16_tflops = 10.5", "fp16_tflops = 5e-324", "fp16_tflops"),
        ('tensorrt = "10.3.0"', f'tensorrt = "{"1" * 5000}.1"', "tensorrt"),
        ('tensorrt = "10.3.0"', 'tensorrt = "١٠.٣"', "tensorrt"),
        ("fp16_tflops = 10.5", "fp16_tflops = -1", "fp16_tflops"),
        ("unified = true", "unified = 1", "unified"),
        ('"6.2" = "10.3.0.30"', '"6.2" = "newest"', "jetpacks"),
        ('"6.2" = "10.3.0.30"', '"six" = "10.3.0.30"', "jetpacks"),
        ('"6.2" = "10.3.0.30"', '"6.2" = 10.3', "jetpacks"),
        ('"6.2" = "10.3.0.30"', '"6.0" = "8.6.2"', "jetpacks.6.0"),
        ('usable = "a page"', "", "sources"),
        ('usable = "a page"', 'usable = ""', "sources"),
        ('usable = "a page"', 'usable = "a page"\nint8_tops = "a page"', "sources"),
        ('title = "My board"', 'title = "My board', "must be TOML"),
        ('title = "My board"', 'title = "My board"\nwatts = 15', "watts"),
    ],
)
def test_the_error_for_an_invalid_file_names_the_key(
    write: Callable[..., str], old: str, new: str, named: str
) -> None:
    assert GOOD.count(old) == 1 or old.startswith(("tensorrt", "usable", "sm"))
    with pytest.raises(UsageError) as caught:
        load_target(write(GOOD.replace(old, new, 1)))
    assert "my-board.toml" in str(caught.value)
    assert named in str(caught.value)


def test_requires_a_compute_capability_for_a_gpu(write: Callable[..., str]) -> None:
    text = GOOD.replace('sm = "8.7"\n', "").replace('sm = "a page"\n', "")
    with pytest.raises(UsageError, match="sm is missing"):
        load_target(write(text))


def test_rejects_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"bad\.toml must be readable"):
        load_target(str(tmp_path / "bad.toml"))


def test_finds_the_tensorrt_version_of_a_target() -> None:
    nano, thor = load_target("orin-nano-8gb"), load_target("thor-t5000")
    assert tensorrt_version(nano) == (10, 3, 0, 30)
    assert tensorrt_version(nano, jetpack="7.2") == (10, 16, 2, 10)
    assert tensorrt_version(nano, tensorrt="11.4.1") == (11, 4, 1)
    assert tensorrt_version(thor)[:2] == (10, 13)
    assert tensorrt_version(thor, jetpack="7.2.2")[:2] == (11, 4)
    assert tensorrt_version(load_target("rtx-4090"), tensorrt="1.2.0") == (1, 2, 0)


def test_rejects_a_version_that_a_target_cannot_have() -> None:
    nano = load_target("orin-nano-8gb")
    for arguments in (
        {"jetpack": "7.0"},
        {"jetpack": "5.1"},
        {"jetpack": "6.2", "tensorrt": "10.3"},
        {"tensorrt": "8.6"},
    ):
        with pytest.raises(UsageError):
            tensorrt_version(nano, **arguments)
    with pytest.raises(UsageError, match="not a Jetson"):
        tensorrt_version(load_target("h200"), jetpack="6.2")
    with pytest.raises(UsageError, match="must have TensorRT"):
        tensorrt_version(load_target("cpu"))


def test_finds_the_lowering_of_a_target() -> None:
    nano = load_target("orin-nano-8gb")
    assert lowering_for(nano) == "decomposed17"
    assert lowering_for(nano, (10, 13, 3, 9)) == lowering_for(nano, (10, 14)) == "decomposed17"
    assert (
        lowering_for(nano, (10, 15))
        == lowering_for(nano, (10, 16, 2, 10))
        == lowering_for(nano, (11, 0))
        == "std24"
    )
    assert (
        lowering_for(load_target("rtx-4090"), (1, 7))
        == lowering_for(load_target("rtx-4090"), None)
        == "std24"
    )
    assert lowering_for(load_target("cpu"), None) == "ort"
