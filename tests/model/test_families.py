"""Family descriptions: the shipped ones are valid, and errors for invalid ones name file and key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvexport.errors import CheckpointError, UsageError
from kvexport.files.resources import resource
from kvexport.model import families as module
from kvexport.model.families import Family, families, family_of, parse_family

SHIPPED = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted(resource("graphs", "families").glob("*.toml"))
}
LLAMA = SHIPPED["llama.toml"]


def changed(old: str, new: str, text: str = LLAMA) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def assert_rejected(text: str, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_family(text, "some/where.toml")
    for part in ("some/where.toml", *words):
        assert part in str(caught.value)


def test_shipped_families() -> None:
    assert set(SHIPPED) == {"bloom.toml", "llama.toml", "qwen2.toml", "qwen3.toml"}
    assert set(families()) == {"bloom", "llama", "mistral", "qwen2", "qwen3"}
    assert {family.name + ".toml" for family in families().values()} == set(SHIPPED)
    assert families()["mistral"] is families()["llama"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_description_is_consistent(name: str) -> None:
    family = parse_family(SHIPPED[name], name)
    rotated = family.position == "rope"
    assert rotated == (family.name != "bloom") == (family.norm_kind == "rms")
    assert len(set(family.layer.values())) == len(family.layer)
    assert set(family.defaults) <= set(family.config) | {"activation"}
    assert ("q_norm" in family.layer) == (family.name == "qwen3")


def test_settings_take_the_first_key_then_the_default() -> None:
    bloom = families()["bloom"]
    settings = bloom.settings(
        {"vocab_size": 9, "n_embed": 8, "n_layer": 3, "num_hidden_layers": 4, "num_attention_heads": 2}
    )
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_layers": 3, "num_heads": 2}
    assert settings == {**sizes, "norm_eps": 1e-5, "tied": True, "activation": "gelu_tanh"}
    with pytest.raises(CheckpointError, match="must have hidden_size or n_embed"):
        bloom.settings({"vocab_size": 9, "n_layer": 3, "n_head": 2})


def test_null_in_the_config_counts_as_absent() -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = families()["llama"].settings({**sizes, "num_key_value_heads": None, "head_dim": None})
    assert "num_kv_heads" not in settings and "head_dim" not in settings


def test_bias_is_fixed_or_named_by_the_config() -> None:
    llama, qwen2 = families()["llama"], families()["qwen2"]
    assert [llama.has_bias(which, {"attention_bias": True}) for which in ("qkv", "o", "mlp")] == [
        True,
        True,
        False,
    ]
    assert [llama.has_bias(which, {"mlp_bias": True}) for which in ("qkv", "o", "mlp")] == [
        False,
        False,
        True,
    ]
    assert [qwen2.has_bias(which, {"attention_bias": False}) for which in ("qkv", "o", "mlp")] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "config", [{}, {"model_type": None}, {"model_type": ["llama"]}, {"model_type": "Llama"}]
)
def test_rejects_unknown_family(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="must be of a supported family") as caught:
        family_of(config)
    assert repr(config.get("model_type")) in str(caught.value)
    assert "bloom, llama, mistral, qwen2, qwen3" in str(caught.value)


def test_rejects_two_descriptions_of_one_model_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(LLAMA)
    monkeypatch.setattr(module, "resource", lambda *parts: tmp_path)
    families.cache_clear()
    try:
        with pytest.raises(
            UsageError,
            match=r"model_type llama must be in one family file only\n  got:      a\.toml and b\.toml",
        ):
            families()
    finally:
        families.cache_clear()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('kind = "rms"', 'kind = "group"', ("norm.kind", "group", "rms, layer")),
        ('position = "rope"', 'position = "learned"', ("attention.position", "learned", "rope, alibi")),
        ('layout = "split"', 'layout = "fused"', ("attention.layout", "fused", "split, fused_by_head")),
        ("gated = true", 'gated = "yes"', ("mlp.gated", "true or false", "yes")),
        ('model_types = ["llama", "mistral"]', 'model_types = "llama"', ("model_types", "printable strings")),
        ('model_types = ["llama", "mistral"]', "model_types = [1]", ("model_types", "printable strings")),
        ('model_types = ["llama", "mistral"]', "", ("model_types",)),
        (
            'model_types = ["llama", "mistral"]',
            'model_types = ["llama"]',
            ("attention.window.model_types", "mistral"),
        ),
        ('prefixes = [""]', "", ("tensors.prefixes",)),
        ('embedding = "model.embed_tokens"', "embedding = 3", ("tensors.embedding", "printable text")),
        ('vocab_size = "vocab_size"', "vocab_size = 5", ("config.vocab_size", "printable strings")),
        ('vocab_size = "vocab_size"', "", ("vocab_size", "[config]", "[defaults]")),
        ('vocab_size = "vocab_size"', 'vocabsize = "vocab_size"', ("vocabsize", "config has an unknown key")),
        ("tied = false", "tide = false", ("tide", "defaults has an unknown key")),
        ('size = "sliding_window"', 'sise = "sliding_window"', ("sise", "attention.window")),
        ('size = "sliding_window"', "size = 4", ("attention.window.size", "printable text")),
        ('mlp = "mlp_bias"', "", ("bias.mlp is missing",)),
        ('mlp = "mlp_bias"', "mlp = 1", ("bias.mlp", "1")),
        ('q = "model.layers.{i}.self_attn.q_proj"', "", ("tensors.layer.q is missing",)),
        (
            'q = "model.layers.{i}.self_attn.q_proj"',
            'q = "model.self_attn.q_proj"',
            ("tensors.layer.q", "{i}"),
        ),
        ('q = "model.layers.{i}.self_attn.q_proj"', 'q = "model.{i}.{j}.q_proj"', ("tensors.layer.q", "{i}")),
        (
            'q = "model.layers.{i}.self_attn.q_proj"',
            'q = "model.layers.{i}.q"\nqkv = "model.{i}.qkv"',
            ("qkv", "tensors.layer has an unknown key"),
        ),
        (
            'q = "model.layers.{i}.self_attn.q_proj"',
            'q = "model.layers.{i}.q"\nq_norm = "model.{i}.n"',
            ("tensors.layer.k_norm is missing",),
        ),
        ("gated = true", "gated = false", ("gate", "tensors.layer has an unknown key")),
        ("[mlp]", "[mpl]\nx = 1\n\n[mlp]", ("unknown key", "mpl")),
        ("[mlp]", "[mlp]\nact = 1", ("mlp has an unknown key", "act")),
        ("[mlp]", "[mlp", ("must be TOML",)),
    ],
)
def test_rejects_invalid_description(old: str, new: str, words: tuple[str, ...]) -> None:
    assert_rejected(changed(old, new), *words)


def test_rejects_kv_heads_with_the_fused_layout() -> None:
    text = changed(
        'norm_eps = "layer_norm_epsilon"', 'num_kv_heads = "num_kv"\nnorm_eps = "eps"', SHIPPED["bloom.toml"]
    )
    assert_rejected(text, "config.num_kv_heads", "fused")


KEYS = [
    (name, number)
    for name, text in SHIPPED.items()
    for number, line in enumerate(text.splitlines())
    if re.match(r"\w+ = ", line)
    and not line.startswith("apply_residual")  # [require] takes any key of config.json
]


@given(st.sampled_from(KEYS), st.data())
def test_error_names_a_misspelt_key(key: tuple[str, int], data: st.DataObject) -> None:
    """Drop, double or replace one character of a key: the error names the file and the key, correct or
    misspelt.
    """
    file, number = key
    lines = SHIPPED[file].splitlines()
    name, rest = lines[number].split(" = ", 1)
    at = data.draw(st.integers(0, len(name) - 1))
    middle = data.draw(st.sampled_from(["", name[at] * 2, "x", "_"]))
    misspelt = name[:at] + middle + name[at + 1 :]
    valid = {"q", "k", "v", "o", "x"} if len(name) <= 2 else set()
    assume(misspelt and misspelt not in {name, *valid})
    lines[number] = f"{misspelt} = {rest}"
    with pytest.raises(UsageError) as caught:
        parse_family("\n".join(lines), file)
    assert file in str(caught.value)
    assert name in str(caught.value) or misspelt in str(caught.value)


@given(st.sampled_from(KEYS))
def test_rejects_a_removed_line_unless_optional(key: tuple[str, int]) -> None:
    file, number = key
    lines = SHIPPED[file].splitlines()
    name = lines.pop(number).split(" = ")[0]
    try:
        family = parse_family("\n".join(lines), file)
    except UsageError as error:
        assert file in str(error) and name in str(error)
    else:
        assert isinstance(family, Family)
        optional = {"num_kv_heads", "head_dim", "max_positions", "embedding_norm", "enabled", "first_layer"}
        assert name in optional | set(parse_family(SHIPPED[file], file).defaults) | set(family.defaults)


@pytest.mark.slow
@given(st.text(max_size=80))
def test_rejects_any_other_text_with_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"any\.toml"):
        parse_family(text, "any.toml")
