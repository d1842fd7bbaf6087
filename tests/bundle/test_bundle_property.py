"""Reading any manifest gives a bundle or a BundleError, and no other exception."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, edit_manifest, write_bundle

from kvexport.bundle import FORMAT, Bundle
from kvexport.errors import BundleError

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2, 10**30, 10**400])
    | st.floats()
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.text(max_size=300) | st.sampled_from(
    ["..", "a/b", "\0", "x" * 5000, "decoder.onnx", "manifest.json", "\ud800"]
)


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    decoder = decoder_with_fewer_heads(tiny_checkpoint("llama", num_key_value_heads=4))
    return write_bundle(
        tmp_path_factory.mktemp("property") / "tiny", decoder, tokenizer=byte_level_tokenizer()
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every value within a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(each for key in keys for each in places(value[key], (*path, key)))]


def opens(bundle: Path, raw: Any) -> Bundle | None:
    """The bundle with another manifest of valid digest; None if it is rejected."""
    copied = bundle / "manifest.json"
    kept = copied.read_text()

    def change(manifest: dict[str, Any]) -> None:
        manifest.clear()
        manifest.update(raw)

    try:
        edit_manifest(bundle, change)
        return Bundle.open(bundle)
    except BundleError:
        return None
    finally:
        copied.write_text(kept)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_manifest_opens_or_is_rejected(bundle: Path, data: st.DataObject) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        *path, key = data.draw(st.sampled_from(places(raw)[1:]))
        parent = raw
        for step in path:
            parent = parent[step]
        kind = data.draw(st.sampled_from(["replace", "delete", "copy", "rename"]))
        if kind == "delete":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[data.draw(NAMES)] = parent.pop(key)
        elif kind == "copy":
            parent[key] = copy.deepcopy(data.draw(st.sampled_from([raw[name] for name in raw])))
        else:
            parent[key] = data.draw(VALUES)
        if len(places(raw)) == 1:
            break
    opened = opens(bundle, raw)
    if opened is not None:
        opened.verify(["decoder.onnx"])
        assert opened.kv_bytes_per_token > 0


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.dictionaries(st.text(max_size=8), VALUES, max_size=5))
def test_rejects_any_object(bundle: Path, raw: dict[str, Any]) -> None:
    assert opens(bundle, {"format": FORMAT, **raw}) is None


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_rejects_any_bytes(bundle: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(bundle, tmp_path / "copied", dirs_exist_ok=True)
    (tmp_path / "copied" / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "copied")


@pytest.mark.parametrize("huge", [10**400, -(10**400), 1e999])
def test_rejects_numbers_out_of_range(bundle: Path, huge: float) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["layers"][0]["predicted_error"] = huge
    assert opens(bundle, raw) is None


@pytest.mark.parametrize("key", ["original_num_key_value_heads", "original_head_dim", "parameters"])
def test_sizes_beyond_any_float_are_refused(bundle: Path, key: str) -> None:
    """`kvexport inspect` divides them."""
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["layers"][0][key] = 10**400
    assert opens(bundle, raw) is None


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "日" * 90])
def test_rejects_impossible_file_names(bundle: Path, name: str) -> None:
    raw = json.loads((bundle / "manifest.json").read_text())
    raw["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    assert opens(bundle, raw) is None


def test_unchanged_manifest_opens(bundle: Path) -> None:
    """Control: the unchanged manifest opens."""
    assert opens(bundle, json.loads((bundle / "manifest.json").read_text())) is not None
