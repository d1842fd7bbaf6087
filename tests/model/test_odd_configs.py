"""Any config.json, however odd, is read or refused with a sentence: no other exception, no memory first."""

from __future__ import annotations

import json
import math
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from support.family_settings import SIZES
from support.odd_configs import configs, odd_configs

from kvexport.errors import CheckpointError
from kvexport.model.architecture import Architecture, read_architecture
from kvexport.model.loader import load_decoder

LONGEST = 2000  # characters of a message


def read(config: dict[str, Any]) -> Architecture | None:
    """The architecture; None if it is refused."""
    try:
        return read_architecture(config)
    except CheckpointError as error:
        assert 10 < len(str(error)) < LONGEST, str(error)
        return None


def assert_possible(it: Architecture) -> None:
    sizes = (it.vocab_size, it.hidden_size, it.embedding_size, it.num_heads, it.num_kv_heads, it.head_dim)
    assert all(type(size) is int and size > 0 for size in (*sizes, it.intermediate_size, len(it.layers)))
    assert it.num_heads % it.num_kv_heads == 0 and 0 <= it.rotary_dim <= it.head_dim
    assert all(
        math.isfinite(each) and each > 0
        for each in (it.scale, it.norm_eps, it.residual_multiplier, it.logit_multiplier)
    )
    assert it.max_positions is None or it.max_positions > 0
    assert all(kind.window is None or kind.window > 0 for kind in it.layers)
    assert isinstance(it.tied, bool)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(odd_configs())
def test_a_config_is_read_or_refused(config: dict[str, Any]) -> None:
    architecture = read(config)
    if architecture is not None:
        assert_possible(architecture)


@pytest.mark.parametrize("value", ["yes", "true", 1, 0.0, [], {}])
@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "tie_word_embeddings"),
        ("llama", "attention_bias"),
        ("llama", "mlp_bias"),
        ("falcon", "new_decoder_architecture"),
        ("falcon", "alibi"),
        ("gpt_neox", "use_parallel_residual"),
        ("cohere", "use_qk_norm"),
    ],
)
def test_rejects_what_is_not_true_or_false(family: str, key: str, value: object) -> None:
    config = next(each for each in map(json.loads, configs()) if each["model_type"] == family)
    with pytest.raises(CheckpointError, match=f"{key} in config.json must be true or false"):
        read_architecture({**config, key: value})


def test_rejects_a_text_as_switch_of_windows() -> None:
    config = {**SIZES, "model_type": "qwen2", "use_sliding_window": "yes", "sliding_window": 7}
    with pytest.raises(CheckpointError, match="use_sliding_window in config"):
        read_architecture(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 2**20),
        ("num_attention_heads", 64),  # more than the hidden size
        ("head_dim", 2**20),
        ("hidden_size", 2**24),
        ("vocab_size", 2**31),
        ("intermediate_size", 10**12),
    ],
)
def test_rejects_sizes_that_no_model_has(key: str, value: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"{key}|num_key_value_heads"):
            read_architecture({**SIZES, "model_type": "llama", key: value})
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.exhaustive
@settings(max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(odd_configs())
def test_a_config_is_read_or_refused_at_length(config: dict[str, Any]) -> None:
    architecture = read(config)
    if architecture is not None:
        assert_possible(architecture)


# Weights


# Keys of config.json, and factors by which they stay below what is read.
_GROWTH = {
    "vocab_size": 2**17, "intermediate_size": 2**17, "ffn_dim": 2**17, "hidden_size": 2**12, "head_dim": 2**9,
    "num_hidden_layers": 2**8, "n_layer": 2**8, "num_attention_heads": 2**3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "key"),
    [
        *(("gemma2", key) for key in _GROWTH if key not in ("ffn_dim", "n_layer")),
        *(("bloom", key) for key in ("vocab_size", "hidden_size", "n_layer")),
        *(("opt", key) for key in ("vocab_size", "hidden_size", "ffn_dim", "num_hidden_layers")),
    ],
)
def test_a_size_that_contradicts_the_tensors_is_refused_before_it_is_allocated(
    tiny_checkpoint: Callable[..., Path], edit_checkpoint: Callable[..., Path], family: str, key: str
) -> None:
    path = tiny_checkpoint(family)
    config = json.loads((path / "config.json").read_text())
    edited = edit_checkpoint(path, config={key: config[key] * _GROWTH[key]})
    list(load_decoder(path).layers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"shape|missing|must be at least|layer_types"):
        list(load_decoder(edited).layers)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(odd_configs("llama"))
def test_a_checkpoint_with_an_odd_config_is_read_or_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, config: dict[str, Any]
) -> None:
    source = tiny_checkpoint("llama")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "generation_config.json"):
        if not (tmp_path / name).exists():
            (tmp_path / name).symlink_to(source / name)
    try:
        list(load_decoder(tmp_path).layers)
    except CheckpointError as error:
        assert len(str(error)) < LONGEST
