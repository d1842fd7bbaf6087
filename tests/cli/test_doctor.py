"""`kvexport.doctor` on simulated machines: folders with a system's files and packages, and a list of GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.simulated_gpus import SimulatedGpu, simulate_gpus

from kvexport.devices.gpu import Gpu
from kvexport.devices.targets import load_target
from kvexport.doctor import Diagnosis, examine

EVERYTHING = {
    "numpy": "2.1.0",
    "tokenizers": "0.21.0",
    "torch": "2.8.0+cpu",
    "safetensors": "0.5.0",
    "transformers": "5.0.0",
    "onnx": "1.21.0",
    "onnx_ir": "1.0.1",
    "tensorrt": "10.3.0",
    "tensorrt_rtx": "1.7.1.116",
    "polygraphy": "0.53.6",
}
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", "8.9", 24564 * 2**20, unified=False, driver="580.82")
H200 = Gpu("NVIDIA H200", "9.0", 143771 * 2**20, unified=False, driver="570.1")


class Computer:
    """A folder with a system's files and installed packages, and a list of GPUs."""

    def __init__(self, folder: Path) -> None:
        self.root, self.site = folder / "root", folder / "site-packages"
        for each in (self.root, self.site):
            each.mkdir()
        self.gpus: list[Gpu] = []

    def file(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text, encoding="utf-8")

    def install(self, **packages: str) -> None:
        for name, version in packages.items():
            folder = self.site / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def jetson(self, model: str, release: str) -> None:
        self.file("proc/device-tree/model", model + "\0")
        self.file("etc/nv_tegra_release", release + "\n")

    def examine(self, target: str | None = None) -> Diagnosis:
        found = None if target is None else load_target(target)
        return examine(found, root=self.root, search=[str(self.site)], gpus=self.gpus)


@pytest.fixture
def computer(tmp_path: Path) -> Computer:
    return Computer(tmp_path)


def lacking(found: Diagnosis) -> dict[str, list[str]]:
    return {command.name: list(command.lacks) for command in found.verbs if command.lacks}


def test_an_empty_machine_lacks_every_package(computer: Computer) -> None:
    found = computer.examine()
    assert all(package.version is None and not package.usable for package in found.packages)
    assert (found.machine.jetson, found.machine.l4t, found.machine.memory, found.machine.gpus) == (
        None,
        None,
        None,
        (),
    )
    assert found.providers == ()
    works = {command.name for command in found.verbs if not command.lacks}
    assert works == {"cache", "inspect", "plan", "targets"}
    build = next(command for command in found.verbs if command.name == "build")
    assert build.lacks["torch"] == "pip install 'kvexport[convert]'"
    assert build.lacks["onnxruntime or onnxruntime-gpu"] == "pip install 'kvexport[cpu]'"


def test_examines_every_command(computer: Computer) -> None:
    from kvexport.cli import commands

    assert {command.name for command in computer.examine().verbs} == set(commands.list_commands(None)) - {
        "doctor"
    }  # type: ignore[attr-defined, arg-type]


def test_finds_packages_by_either_spelling(computer: Computer) -> None:
    computer.install(**EVERYTHING)
    found = {package.name: package for package in computer.examine().packages}
    assert found["onnx-ir"].version == "1.0.1"
    assert found["tensorrt-rtx"].version == "1.7.1.116"
    assert found["torch"].usable  # 2.8.0+cpu is later than 2.6
    assert all(package.usable for name, package in found.items() if not name.startswith("onnxruntime"))


def test_finds_tensorrt_under_the_name_of_its_cuda_version(computer: Computer) -> None:
    computer.install(tensorrt_cu13="11.3.0.99")
    assert (
        next(package for package in computer.examine().packages if package.name == "tensorrt").version
        == "11.3.0.99"
    )


@pytest.mark.parametrize(
    ("version", "usable"), [("2.5.9", False), ("2.6.0", True), ("2.10.1", True), ("1.13", False)]
)
def test_a_package_older_than_the_minimum_is_not_usable(
    computer: Computer, version: str, usable: bool
) -> None:
    computer.install(torch=version, safetensors="0.5.0")
    found = computer.examine()
    torch = next(package for package in found.packages if package.name == "torch")
    assert (torch.floor, torch.usable) == ("2.6", usable)
    assert ("compress" in lacking(found)) == (not usable)
    if not usable:
        assert lacking(found)["compress"] == [f"torch 2.6 or later (not {version})"]


def test_an_old_tensorrt_is_not_usable(computer: Computer) -> None:
    computer.install(**{**EVERYTHING, "tensorrt": "8.6.2"})
    computer.jetson("NVIDIA Jetson AGX Orin Developer Kit", "# R36 (release), REVISION: 3.0")
    check = computer.examine("agx-orin-64gb").target
    assert check is not None
    assert not check.builds
    assert not check.runs
    assert list(check.reasons) == ["tensorrt 10.3 or later (not 8.6.2)"]


def test_ignores_damaged_metadata(computer: Computer) -> None:
    computer.install(numpy="2.0")
    for name in ("odd", "onnx", "torch"):
        (computer.site / f"{name}-1.dist-info").mkdir()
    (computer.site / "torch-1.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00 no metadata")
    found = {package.name: package.version for package in computer.examine().packages}
    assert (found["numpy"], found["onnx"], found["torch"]) == ("2.0", None, None)


@pytest.mark.parametrize(
    ("model", "release", "l4t", "jetpack", "sm"),
    [
        (
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
            "# R36 (release), REVISION: 4.3, GCID: 1",
            "36.4.3",
            "6.1 to 6.2.1",
            "8.7",
        ),
        ("NVIDIA Jetson Orin NX", "# R39 (release), REVISION: 2.0", "39.2.0", "7.2", "8.7"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "# R38 (release), REVISION: 2.1", "38.2.1", "7.0", "11.0"),
        ("NVIDIA Jetson AGX Orin", "# R99 (release), REVISION: 9.9", "99.9.9", None, "8.7"),
    ],
)
def test_recognises_a_jetson_by_its_system_files(
    computer: Computer, model: str, release: str, l4t: str, jetpack: str | None, sm: str
) -> None:
    computer.jetson(model, release)
    computer.file("proc/meminfo", "MemTotal:        7802496 kB\nMemFree: 1 kB\n")
    machine = computer.examine().machine
    assert (machine.jetson, machine.l4t, machine.jetpack, machine.memory) == (
        model,
        l4t,
        jetpack,
        7802496 * 1024,
    )
    assert [(gpu.sm, gpu.memory) for gpu in machine.gpus] == [(sm, None)]


def test_another_board_with_a_device_tree_is_not_a_jetson(computer: Computer) -> None:
    computer.file("proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    assert computer.examine().machine.jetson is None
    assert computer.examine().machine.gpus == ()


def test_a_jetson_with_tensorrt_builds_for_itself_and_not_for_another(computer: Computer) -> None:
    computer.install(**EVERYTHING)
    computer.jetson("NVIDIA Jetson Orin NX", "# R36 (release), REVISION: 4.3")
    found = computer.examine("orin-nx-16gb")
    assert found.target is not None
    assert (found.target.builds, found.target.runs, found.target.lowering) == (True, True, "decomposed17")
    assert not found.target.reasons
    other = computer.examine("thor-t5000").target
    assert other is not None
    assert (other.builds, other.runs) == (False, False)
    assert any("compute capability 11.0" in reason and "8.7" in reason for reason in other.reasons)


def test_the_lowering_depends_on_the_installed_tensorrt(computer: Computer) -> None:
    computer.install(**{**EVERYTHING, "tensorrt": "10.16.2.10"})
    computer.jetson("NVIDIA Jetson Orin NX", "# R39 (release), REVISION: 2.0")
    check = computer.examine("orin-nx-16gb").target
    assert check is not None
    assert check.lowering == "std24"


def test_fixes_on_a_jetson_name_its_own_packages(computer: Computer) -> None:
    computer.jetson("NVIDIA Jetson Orin NX", "# R36 (release), REVISION: 4.3")
    fixes = {package.name: package.fix for package in computer.examine().packages}
    assert "apt install" in fixes["tensorrt"]
    assert "Jetson" in fixes["onnxruntime-gpu"]
    assert fixes["polygraphy"] == "pip install 'kvexport[tensorrt]'"


def test_reports_the_gpus_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    simulate_gpus(
        monkeypatch,
        SimulatedGpu(),
        SimulatedGpu("NVIDIA Thor", "11.0", 131072 * 2**20, unified=True),
        driver="580.82",
    )
    first, second = examine(root=tmp_path, search=[]).machine.gpus
    assert (first.name, first.memory, first.sm, first.driver) == (
        "NVIDIA GeForce RTX 4090",
        24564 * 2**20,
        "8.9",
        "580.82",
    )
    assert (second.sm, second.memory) == ("11.0", None)


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGetCount", "cuDeviceGetName"])
def test_a_failing_driver_reports_no_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    simulate_gpus(monkeypatch, SimulatedGpu(), failing=[failing])
    assert examine(root=tmp_path, search=[]).machine.gpus == ()


def test_tensorrt_rtx_builds_without_a_gpu_and_does_not_run(computer: Computer) -> None:
    computer.install(**EVERYTHING)
    check = computer.examine("rtx-4090").target
    assert check is not None
    assert (check.builds, check.runs) == (True, False)
    computer.gpus = [RTX_4090]
    check = computer.examine("rtx-4090").target
    assert check is not None
    assert (check.builds, check.runs, dict(check.reasons)) == (True, True, {})


def test_names_no_package_that_would_not_help(computer: Computer) -> None:
    check = computer.examine("h200").target
    assert check is not None
    assert [reason.partition(" (")[0] for reason in check.reasons] == ["a GPU of compute capability 9.0"]
    computer.gpus = [H200]
    check = computer.examine("h200").target
    assert check is not None and "tensorrt" in check.reasons


def test_tensorrt_is_not_usable_without_a_gpu(computer: Computer) -> None:
    computer.install(**{name: version for name, version in EVERYTHING.items() if name != "tensorrt_rtx"})
    found = computer.examine("h200")
    assert found.target is not None
    assert (found.target.builds, found.target.runs) == (False, False)
    assert lacking(found)["engine"] == ["tensorrt-rtx"]
    assert "run" in lacking(found)
    computer.gpus = [H200]
    found = computer.examine("h200")
    assert found.target is not None
    assert (found.target.builds, found.target.runs) == (True, True)
    assert not {"engine", "run"} & lacking(found).keys()


def test_an_engine_may_run_on_a_machine_that_cannot_build_it(computer: Computer) -> None:
    computer.install(tensorrt="10.16.2")
    computer.gpus = [H200]
    check = computer.examine("h200").target
    assert check is not None
    assert (check.builds, check.runs) == (False, True)
    assert "polygraphy" in check.reasons


def test_the_cpu_target_needs_onnx_runtime_only(computer: Computer) -> None:
    check = computer.examine("cpu").target
    assert check is not None
    assert (check.builds, check.runs) == (False, False)
    computer.install(onnxruntime="1.28.0")
    found = computer.examine("cpu")
    assert found.target is not None
    assert (found.target.builds, found.target.runs, found.target.lowering) == (True, True, "ort")


def test_a_diagnosis_is_json(computer: Computer) -> None:
    computer.install(**EVERYTHING)
    raw = json.loads(json.dumps(computer.examine("rtx-4090").to_json()))
    assert raw["target"]["builds"] is True
    assert next(package for package in raw["packages"] if package["name"] == "torch")["usable"] is True


def test_imports_no_large_package() -> None:
    """Although all of them are installed here; ONNX Runtime alone is imported, for its providers."""
    code = (
        "import sys; from kvexport.doctor import examine; found = examine(); "
        "large = {'torch', 'onnx', 'onnx_ir', 'transformers', 'tensorrt_rtx', 'polygraphy'}; "
        "print(sorted(large & set(sys.modules))); "
        "print(found.providers)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=True
    )
    imported, providers = ran.stdout.splitlines()[-2:]
    assert imported == "[]"
    assert "CPUExecutionProvider" in providers


def test_an_onnx_runtime_that_does_not_load_has_no_providers(computer: Computer, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "onnxruntime.py").write_text(
        "raise OSError('libcudart.so.13: cannot open shared object file')"
    )
    code = "from kvexport.doctor import examine; print(examine().providers)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "broken")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert ran.stdout.strip() == "()"
