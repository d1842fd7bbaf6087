"""Valid bundles pass: every family, method and dtype, validated layer by layer and as deployed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.decoders import make_decoder
from support.validated_bundles import export

from kvexport.bundle import Bundle
from kvexport.errors import BundleError, CannotRunHere
from kvexport.progress import Progress
from kvexport.validate import validate_bundle, validate_graph
from kvexport.validate.deployed import run_deployed
from kvexport.validate.layerwise import run_layerwise
from kvexport.validate.reference_run import FILE, STEPS, read_reference

METHODS = {
    "llama": ("online", "fold"),
    "bias": ("online", "fold"),  # qwen2's
    "qwen3": ("online",),
    "bloom": ("online",),
    "window": ("online",),
    "gqa": ("online",),  # to one KV head
}
DTYPES = ("float32", "float16", "bfloat16")
CASES = [
    (style, method, dtype)
    for style, methods in METHODS.items()
    for method in methods
    for dtype in (DTYPES if method != "online" else ("float32",))
]


@pytest.mark.parametrize(("style", "method", "dtype"), CASES)
def test_a_valid_bundle_passes(style: str, method: str, dtype: str, tmp_path: Path) -> None:
    decoder = make_decoder(style, dtype=torch.float32)
    kv_heads = decoder.layers[0].attention.num_kv_heads // 2
    contract = export(tmp_path / "bundle", decoder, dtype=dtype, kv_heads=kv_heads, method=method)
    for report in (
        validate_graph(tmp_path / "bundle", contract, Progress()),
        validate_bundle(tmp_path / "bundle", Progress()),
    ):
        assert report.failures == ()
        assert (report.prefill, report.steps) == (32, STEPS)
        assert (report.dtype, report.computed_in) == (dtype, "float32" if dtype == "bfloat16" else dtype)
        assert len(report.differences) == 2 * 4 + 1
        gate = report.gate
        for difference in report.differences:  # with room to spare
            assert 1 - difference.cosine < (1 - gate.cosine) / 5
            assert abs(difference.norm_ratio - 1) < gate.norm_ratio / 5
            assert difference.max_error < gate.max_error / 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_by_layer_equals_the_whole_graph(dtype: str, tmp_path: Path) -> None:
    contract = export(tmp_path / "bundle", make_decoder("bias", dtype=torch.float32), dtype=dtype, kv_heads=2)
    reference = read_reference(tmp_path / "bundle" / FILE, 2)
    layerwise = run_layerwise(tmp_path / "bundle", contract, reference["input_ids"], 32, Progress())
    deployed = run_deployed(Bundle.open(tmp_path / "bundle"), reference["input_ids"], 32, Progress())
    assert layerwise.keys() == deployed.keys() == reference.keys() - {"input_ids"}
    for name, array in layerwise.items():
        assert array.dtype == deployed[name].dtype == np.float32 and array.shape == reference[name].shape
        np.testing.assert_allclose(deployed[name], array, rtol=0, atol=2e-5 * np.abs(array).max())


def test_a_capacity_below_the_default_length_of_the_reference(tmp_path: Path) -> None:
    contract = export(tmp_path / "bundle", make_decoder("llama", dtype=torch.float32), capacity=20)
    for report in (
        validate_graph(tmp_path / "bundle", contract, Progress()),
        validate_bundle(tmp_path / "bundle", Progress()),
    ):
        assert report.failures == () and (report.prefill, report.steps) == (6, 14)


def test_finds_a_flipped_byte_before_running(tmp_path: Path) -> None:
    export(tmp_path / "bundle", make_decoder("llama", dtype=torch.float32))
    data = bytearray((tmp_path / "bundle" / FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / "bundle" / FILE).write_bytes(data)
    with pytest.raises(BundleError, match=FILE):
        validate_bundle(tmp_path / "bundle", Progress())


def test_rejects_a_reference_of_another_model(tmp_path: Path) -> None:
    contract = export(tmp_path / "bundle", make_decoder("llama", layers=3, dtype=torch.float32))
    export(tmp_path / "other", make_decoder("llama", dtype=torch.float32))
    (tmp_path / "bundle" / FILE).write_bytes((tmp_path / "other" / FILE).read_bytes())
    with pytest.raises(BundleError, match="must have every recorded array"):
        validate_graph(tmp_path / "bundle", contract, Progress())


def test_rejects_a_bundle_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    export(tmp_path / "bundle", make_decoder("llama", dtype=torch.float32))
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(CannotRunHere, match="does not fit in memory") as caught:
        validate_bundle(tmp_path / "bundle", Progress())
    assert "GiB free" in str(caught.value.got) and "GiB or more" in str(caught.value.expected)


def test_names_a_missing_package_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path / "bundle", make_decoder("llama", dtype=torch.float32))
    monkeypatch.setattr(
        "kvexport.validate.deployed.find_spec", lambda name: None if name == "psutil" else name
    )
    with pytest.raises(CannotRunHere, match="pip install 'kvexport") as caught:
        validate_bundle(tmp_path / "bundle", Progress())
    assert caught.value.got == "no psutil"


def test_validating_a_graph_imports_no_torch(tmp_path: Path) -> None:
    export(tmp_path / "bundle", make_decoder("llama", dtype=torch.float32), dtype="bfloat16", kv_heads=2)
    script = (
        "import sys; from pathlib import Path; from kvexport.progress import Progress\n"
        "from kvexport.validate import validate_bundle\n"
        f"assert not validate_bundle(Path({str(tmp_path / 'bundle')!r}), Progress()).failures\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


_PEAK = """
import sys, resource
from pathlib import Path
import onnx_ir, onnxruntime
from kvexport.bundle import Bundle
from kvexport.progress import Progress
from kvexport.validate import validate_graph

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
contract, before = Bundle.open(sys.argv[1]).graph, peak()
assert not validate_graph(Path(sys.argv[1]), contract, Progress()).failures
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 80), ("bfloat16", 100)])
def test_validating_a_graph_takes_the_memory_of_one_layer(dtype: str, allowed: int, tmp_path: Path) -> None:
    """There are ten layers of 16 MB in float32; ONNX Runtime itself takes about 25 MB."""
    decoder = make_decoder("llama", layers=10, heads=8, head_dim=80, hidden=640, dtype=torch.float32)
    export(tmp_path / "bundle", decoder, dtype=dtype)
    found = subprocess.run(
        [sys.executable, "-c", _PEAK, tmp_path / "bundle"], check=True, capture_output=True, text=True
    )
    assert int(found.stdout) < allowed
