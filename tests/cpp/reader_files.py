"""Valid and damaged files for tests of the C++ parsers, with the result of Python's parsers.

`write` creates in a directory:
 - `tiny`, `evicting` and `windowed`, whose layers have a sliding window: bundles;
 - `manifests/NAME/manifest.json` with `message.txt`: "accepted", or Python's error message;
 - `harmful/NAME.json`: consistent manifests with sizes that overflow;
 - `engines.json`: the record of an engine whose plan is "abc";
 - `sound.safetensors`: written by the safetensors library, one tensor for each dtype.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.decoders import make_decoder
from support.tiny_bundles import byte_level_tokenizer, write_bundle

from kvexport.bundle.engine_record import BuildRecord, PlanFile, Profile
from kvexport.bundle.graph_io import cache_specs, contract, ring_of
from kvexport.bundle.manifest import read_manifest
from kvexport.errors import BundleError
from kvexport.eviction.config import Eviction

Raw = dict[str, Any]
Change = Callable[[Raw], object]
_BUDGET = Eviction("l2-norm", 24, protect_first=2, protect_recent=5, skip_layers=(1,))
_NAMES = [
    "../secret",
    "/etc/passwd",
    "sub/file",
    "..",
    ".",
    "",
    "a\\b",
    "a\nb",
    "manifest.json",
    "a\0b",
    "right",
    "a b",
    "é",
    "\u202e",
]


def write(folder: Path) -> None:
    """Write the files into `folder`, which is made if it does not exist."""
    folder.mkdir(exist_ok=True)
    decoder = make_decoder("gqa", dtype=torch.float32)
    tiny = write_bundle(folder / "tiny", decoder, tokenizer=byte_level_tokenizer())
    evicting = write_bundle(folder / "evicting", decoder, eviction=_BUDGET)
    windowed = write_bundle(folder / "windowed", make_decoder("window", dtype=torch.float32))
    for bundle in (tiny, evicting, windowed):
        raw = json.loads((bundle / "manifest.json").read_text())
        for name, content in _windows(raw) if bundle == windowed else _manifests(raw):
            case = folder / "manifests" / f"{bundle.name} {name}".replace(": ", " ")
            case.mkdir(parents=True)
            (case / "manifest.json").write_bytes(content)
            (case / "message.txt").write_text(_message(case))
    (folder / "harmful").mkdir()
    for name, change in _HARMFUL.items():
        raw = json.loads((tiny / "manifest.json").read_text())
        change(raw)
        (folder / "harmful" / f"{name}.json").write_bytes(sealed(_with_its_contract(raw)))
    (folder / "engines.json").write_text(json.dumps(_RECORD.to_json()))
    save_file(tensors(), folder / "sound.safetensors", metadata={"kvexport": "test", "text": 'quoted "é" \n'})


def tensors() -> dict[str, torch.Tensor]:
    """The tensors of `sound.safetensors`."""
    return {
        "f32": torch.arange(6, dtype=torch.float32).reshape(1, 2, 3),
        "f16": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "bf16": torch.tensor([[1.5], [-8.0]], dtype=torch.bfloat16),
        "i64": torch.tensor(-7, dtype=torch.int64),
        "none": torch.zeros(0, 4),
    }


def _message(case: Path) -> str:
    try:
        read_manifest(case)
    except BundleError as error:
        return error.what.replace(str(case), "BUNDLE")
    return "accepted"


def sealed(raw: Raw) -> bytes:
    """A manifest with a correct digest, whatever its content."""
    raw = {key: value for key, value in raw.items() if key != "manifest_sha256"}
    text = json.dumps({**raw, "manifest_sha256": "0" * 64})
    before, after = text.rsplit("0" * 64, 1)
    return (before + hashlib.sha256(text.encode()).hexdigest() + after).encode()


def _manifests(raw: Raw) -> Iterator[tuple[str, bytes]]:
    whole = sealed(raw)
    yield "as it is", whole
    yield "digest in capitals", whole[:-70] + whole[-70:].upper()
    yield "another digest", whole[:-5] + b'0"}'
    yield "one space more", whole.replace(b": ", b":  ", 1)
    yield (
        "without digest",
        json.dumps({key: value for key, value in raw.items() if key != "manifest_sha256"}).encode(),
    )
    yield from _INVALID.items()
    for at, (name, change) in enumerate(_changes(raw)):
        changed = copy.deepcopy(raw)
        change(changed)
        yield f"{at} {name}", sealed(changed)


def _windows(raw: Raw) -> Iterator[tuple[str, bytes]]:
    """Manifests whose windows agree with the shapes of the caches, or do not."""
    yield "as it is", sealed(raw)
    for window in (None, 1, 4, 6, 63, 64, 2**53):
        changed = copy.deepcopy(raw)
        changed["layers"][1]["window"] = window
        yield f"window {window}", sealed(changed)
        yield f"window {window} in the graph", sealed(_with_its_contract(changed))
    for axis in ("capacity", "window_4", "window_05", "window_", "budget", 5):
        changed = copy.deepcopy(raw)
        for tensors in (changed["graph"]["inputs"], changed["graph"]["outputs"]):
            for tensor in tensors:
                tensor["shape"] = [axis if size == "window_5" else size for size in tensor["shape"]]
        yield f"axis {axis}", sealed(changed)
    yield "window of the capacity", sealed({**raw, "capacity": 5})
    yield "a window less", sealed(_with_its_contract({**raw, "capacity": 5}))


_RECORD = BuildRecord(
    kvexport="0.1.0",
    manifest_sha256="0" * 64,
    target="desk",
    engine="tensorrt",
    version="10.16.1.11",
    lowering="std24",
    compute_capability=("8.7", "8.9"),
    dtype="float16",
    batch=1,
    capacity=60,
    chunk=16,
    profiles=(Profile("decode", (1, 1, 1)), Profile("prefill", (1, 16, 16))),
    decomposed=(),
    options={"workspace": None, "refit": True, "version_compatible": False, "hardware_compatible": True},
    plan=PlanFile(hashlib.sha256(b"abc").hexdigest(), 3),
    layers={"Attention": 2},
    weights_bytes=1000,
    activation_bytes=None,
    timing_cache_bytes=0,
    peak_host_bytes=1 << 20,
    seconds=1.5,
)
_HARMFUL: dict[str, Change] = {
    "heads": lambda raw: raw["layers"][0].update(num_key_value_heads=2**53),
    "width": lambda raw: raw["layers"][1].update(key_head_dim=2**53),
    "capacity": lambda raw: raw.update(capacity=2**60),
    "layers": lambda raw: [layer.update(value_head_dim=2**47) for layer in raw["layers"]],
    "vocabulary": lambda raw: raw["model"].update(vocab_size=2**62),
}


def _with_its_contract(raw: Raw) -> Raw:
    """Make the manifest's graph consistent with its other keys."""
    caches = [
        cache_specs(
            index,
            kv_heads=layer["num_key_value_heads"],
            key_dim=layer["key_head_dim"],
            value_dim=layer["value_head_dim"],
            dtype=raw["dtype"],
            evicts=False,
            ring=ring_of(layer["window"], raw["capacity"], False),
        )
        for index, layer in enumerate(raw["layers"])
    ]
    model = raw["model"]
    graph = contract(
        dtype=raw["dtype"],
        capacity=raw["capacity"],
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        caches=caches,
    )
    return {**raw, "graph": graph.to_json()}


_INTEGERS = [{"format": "int4", "block": 64, "parameters": 8}, {"format": "int8", "parameters": 8}]
_WEIGHTS: dict[str, Change] = {
    "int4": lambda raw: raw.update(head={"format": "int4", "block": 32}),
    "int4 whole": lambda raw: raw.update(head={"format": "int4", "block": None}),
    "int8": lambda raw: raw.update(embedding={"format": "int8"}),
    "int8 in blocks": lambda raw: raw.update(embedding={"format": "int8", "block": 128}),
    "float in blocks": lambda raw: raw["head"].update(block=32),
    "of another dtype": lambda raw: raw["head"].update(format="float16"),
    "mixed": lambda raw: raw["layers"][0].update(maps=_INTEGERS),
    "of a layer fewer": lambda raw: raw["layers"].pop(),
}
_INVALID = {
    "empty": b"",
    "cut off": b"{",
    "list": b"[]",
    "number": b"7",
    "not UTF-8": b"\xff\xfe",
    "no format": b'{"files": {}}',
    "deep": b"[" * 100_000,
    "long number": b'{"format": 3' + b"0" * 5000 + b"}",
    "newer": b'{"format": 9, "all": "else"}',
    "older": b'{"format": 1}',
    "text format": b'{"format": "3", "kvexport": "7.1.0"}',
    "real format": b'{"format": 3.0}',
    "true format": b'{"format": true}',
    "null format": b'{"format": null}',
    "more behind": b'{"format": 3} {}',
}


def _changes(raw: Raw) -> Iterator[tuple[str, Change]]:
    """Changes: each key removed, of another type, out of range; and contradictions between keys."""
    for path in _paths(raw):
        name = ".".join(map(str, path))
        yield f"{name} gone", lambda raw, path=path: _at(raw, path[:-1]).pop(path[-1])
        for value in (None, True, "x", -1, 0, 2**62, 1e308, 0.5, {"nested": []}, []):
            yield (
                f"{name} {json.dumps(value).strip('{}')}",
                lambda raw, path=path, value=value: _at(raw, path[:-1]).update(
                    {path[-1]: copy.deepcopy(value)}
                ),
            )
    for name in _NAMES:
        entry = {"sha256": "0" * 64, "bytes": 1}
        yield "file", lambda raw, name=name, entry=entry: raw["files"].update({name: entry})
    yield "escape", lambda raw: raw["source"].update(name="\x1b[31mred")
    yield "more keys", lambda raw: raw.update(more={"a": [1]})
    yield "more of the graph", lambda raw: raw["graph"].update(more=1)
    yield "an input more", lambda raw: raw["graph"]["inputs"].append(raw["graph"]["inputs"][0])
    yield "an input renamed", lambda raw: raw["graph"]["inputs"][4].update(name="tokens")
    yield "a wider output", lambda raw: raw["graph"]["outputs"][2]["shape"].__setitem__(3, 9)
    yield "a layer fewer", lambda raw: raw["layers"].pop()
    yield "other heads", lambda raw: raw["layers"][1].update(num_key_value_heads=3)
    for name, change in _WEIGHTS.items():
        yield f"weights {name}", lambda raw, change=change: change(raw["weights"])
    yield "another dtype", lambda raw: raw.update(dtype="float16")
    yield "eos of text", lambda raw: raw["model"].update(eos_token_ids=[2, "x"])
    yield "eos of halves", lambda raw: raw["model"].update(eos_token_ids=[2.5])
    for budget in (
        {"budget": 64},
        {"budget": 65},
        {"budget": 7},
        {"budget": 8},
        {"protect_first": 2**61},
        {"protect_recent": 2**61},
        {"skip_layers": [0, 1]},
        {"skip_layers": [2]},
        {"skip_layers": [-1]},
        {"policy": "oldest"},
        {"more": 1},
    ):
        sound = {
            "policy": "window",
            "budget": 24,
            "protect_first": 2,
            "protect_recent": 5,
            "skip_layers": [1],
        }
        yield (
            f"eviction {next(iter(budget))}",
            lambda raw, budget=budget, sound=sound: raw.update(eviction={**sound, **budget}),
        )


def _paths(raw: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all keys; of lists only those of the first item."""
    if isinstance(raw, dict):
        named = [
            (*path, key)
            for key in raw
            if key != "manifest_sha256" and not (path == ("files",) and key != "decoder.onnx")
        ]
        return [each for one in named for each in (one, *_paths(_at(raw, one[-1:]), one))]
    if isinstance(raw, list) and raw and isinstance(raw[0], dict):
        return _paths(raw[0], (*path, 0))
    return []


def _at(raw: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        raw = raw[key]
    return raw
