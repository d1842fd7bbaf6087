"""Family descriptions: the shipped ones are valid, and errors for invalid ones name file and key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvexport.errors import CheckpointError, UsageError
from kvexport.files.resources import resource
from kvexport.model import families as module
from kvexport.model.families import description_of, families
from kvexport.model.family import Family
from kvexport.model.family_file import Description

SHIPPED = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted(resource("graphs", "families").glob("*.toml"))
}
PLAIN = """
[models]
llama = "Llama 1 to 3"
mistral = "Mistral 7B"

[config]
vocab_size = "vocab_size"
hidden_size = "hidden_size"
num_layers = "num_hidden_layers"
num_heads = "num_attention_heads"
num_kv_heads = "num_key_value_heads"
head_dim = "head_dim"

[defaults]
norm_eps = 1e-6
activation = "silu"
tied = false

[norm]
kind = "rms"

[attention]
position = "rope"

[bias]
qkv = "attention_bias"
o = "attention_bias"
mlp = "mlp_bias"

[tensors]
prefixes = [""]
embedding = "model.embed_tokens"
final_norm = "model.norm"
head = "lm_head"
ignored = []

[tensors.layer]
attention_norm = "model.layers.{i}.input_layernorm"
mlp_norm = "model.layers.{i}.post_attention_layernorm"
q = "model.layers.{i}.q_proj"
k = "model.layers.{i}.k_proj"
v = "model.layers.{i}.v_proj"
o = "model.layers.{i}.o_proj"
gate = "model.layers.{i}.gate_proj"
up = "model.layers.{i}.up_proj"
down = "model.layers.{i}.down_proj"
"""
Q = 'q = "model.layers.{i}.q_proj"'


def parse(text: str, where: str = "some/where.toml", config: Mapping[str, Any] | None = None) -> Family:
    return Description(text, where).resolve(config or {})


def changed(old: str, new: str, text: str = PLAIN) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def assert_rejected(text: str, *words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    for part in ("some/where.toml", *words):
        assert part in str(caught.value)


def nested(conditions: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Configs that meet the conditions of an overlay, one for each value of a list."""
    lists = {key: value for key, value in conditions.items() if isinstance(value, list)}
    for values in [{key: each} for key, listed in lists.items() for each in listed] or [{}]:
        config: dict[str, Any] = {}
        for key, value in {**{key: each[0] for key, each in lists.items()}, **conditions, **values}.items():
            *tables, last = key.split(".")
            table = config
            for name in tables:
                table = table.setdefault(name, {})
            table[last] = value
        yield config


OVERLAYS = [
    pytest.param(name, config, id=f"{name}-{number}")
    for name, text in SHIPPED.items()
    for number, conditions in enumerate(Description(text, name).overlay_configs())
    for config in nested(conditions)
]


def test_each_model_type_finds_its_own_file() -> None:
    by_file = {name: Description(text, name).models for name, text in SHIPPED.items()}
    assert {"bloom", "llama", "mistral", "qwen2", "qwen3", "gpt2", "falcon"} <= families().keys()
    assert sorted(families()) == sorted(each for types in by_file.values() for each in types)
    for name, models in by_file.items():
        for model_type in models:
            family = description_of({"model_type": model_type}).resolve({"model_type": model_type})
            assert f"{family.name}.toml" == name


def assert_consistent(family: Family) -> None:
    names = [*family.names.layer.values(), family.names.embedding, family.names.head]
    assert len(set(names)) == len(names)
    assert (family.position == "learned") == (family.names.positions is not None)
    assert (family.qk_norm is not None) == ("q_norm" in family.names.layer)
    assert family.parallel or {"mlp_norm", "mlp_output_norm", "mlp_residual_norm"} & family.names.layer.keys()
    assert family.norm_weight or not family.norm_bias
    assert family.names.final_norm is None or family.names.final_norm not in names


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_description_is_consistent(name: str) -> None:
    assert_consistent(parse(SHIPPED[name], name))


@pytest.mark.parametrize(("name", "config"), OVERLAYS)
def test_shipped_overlay_resolves_and_changes_the_family(name: str, config: dict[str, Any]) -> None:
    description = Description(SHIPPED[name], name)
    family = description.resolve(config)
    assert_consistent(family)
    assert family != parse(SHIPPED[name].split("[[when]]")[0], name)


def test_settings_take_the_first_expression_with_a_value_then_the_default() -> None:
    bloom = parse(SHIPPED["bloom.toml"])
    settings = bloom.settings(
        {"vocab_size": 9, "n_embed": 8, "n_layer": 3, "num_hidden_layers": 4, "num_attention_heads": 2}
    )
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_layers": 3, "num_heads": 2}
    assert settings == {**sizes, "norm_eps": 1e-5, "tied": True, "activation": "gelu_tanh"}
    with pytest.raises(CheckpointError, match="must have hidden_size or n_embed"):
        bloom.settings({"vocab_size": 9, "n_layer": 3, "n_head": 2})


def test_null_in_the_config_counts_as_absent() -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = parse(PLAIN).settings({**sizes, "num_key_value_heads": None, "head_dim": None})
    assert "num_kv_heads" not in settings and "head_dim" not in settings


def test_assumed_values_give_way_to_those_of_the_config() -> None:
    description = Description(SHIPPED["stablelm.toml"], "stablelm.toml")
    assert description.complete({"vocab_size": 9}) == {"partial_rotary_factor": 0.25, "vocab_size": 9}
    assert description.complete({"partial_rotary_factor": 1})["partial_rotary_factor"] == 1


def test_required_values() -> None:
    bloom = parse(SHIPPED["bloom.toml"])
    sizes = {"vocab_size": 9, "hidden_size": 8, "n_layer": 1, "n_head": 2}
    key = "apply_residual_connection_post_layernorm"
    for supported in ({}, {key: None}, {key: False}):
        assert bloom.settings({**sizes, **supported})["vocab_size"] == 9
    for other in (True, 0, "false"):
        with pytest.raises(CheckpointError, match=rf"{key}(.|\n)*{key} = {other!r}(.|\n)*{key} = False"):
            bloom.settings({**sizes, key: other})


def test_bias_is_fixed_or_named_by_the_config() -> None:
    llama, qwen2 = parse(PLAIN), parse(SHIPPED["qwen2.toml"])

    def biases(family: Family, config: dict[str, Any]) -> list[bool]:
        return [family.has_bias(which, config) for which in ("qkv", "o", "mlp", "head")]

    assert biases(llama, {"attention_bias": True}) == [True, True, False, False]
    assert biases(llama, {"mlp_bias": True}) == [False, False, True, False]
    assert biases(qwen2, {"attention_bias": False}) == [True, False, False, False]


OVERLAID = changed(
    "[tensors.layer]",
    """[[when]]
config = { kind = ["a", "b"], "deep.flag" = true, count = 1 }
parallel = true
settings = { norm_eps = "other_eps" }
tensors = { final_norm = "", embedding = "wte" }

[tensors.layer]""",
)


def test_an_overlay_is_merged_in_where_all_conditions_hold() -> None:
    plain = parse(OVERLAID)
    assert not plain.parallel and plain.names.final_norm == "model.norm"
    for kind in ("a", "b"):
        family = parse(OVERLAID, config={"kind": kind, "deep": {"flag": True}, "count": 1})
        assert family.parallel and family.config["norm_eps"] == ("other_eps",)
        assert family.names.final_norm is None and family.names.embedding == "wte"
        assert family.names.head == "lm_head" and family.config["vocab_size"] == ("vocab_size",)


@pytest.mark.parametrize(
    "config",
    [
        {"kind": "c", "deep": {"flag": True}, "count": 1},
        {"kind": "a", "deep": {"flag": False}, "count": 1},
        {"kind": "a", "deep": {"flag": True}, "count": 1.0},
        {"kind": "a", "deep": True, "count": 1},
        {"kind": "a", "count": 1},
        {"kind": ["a"], "deep": {"flag": True}, "count": 1},
    ],
)
def test_an_overlay_is_left_out_where_a_condition_does_not_hold(config: dict[str, Any]) -> None:
    assert not parse(OVERLAID, config=config).parallel


def test_a_condition_that_is_true_or_false_accepts_nothing_else() -> None:
    with pytest.raises(CheckpointError, match=r"deep\.flag in config\.json must be true or false"):
        parse(OVERLAID, config={"kind": "a", "deep": {"flag": 1}, "count": 1})


def test_overlays_are_merged_in_their_order() -> None:
    text = PLAIN + '\n[[when]]\nconfig = { a = 1 }\nnorm = { kind = "layer" }\n'
    text += '\n[[when]]\nconfig = { b = 1 }\nnorm = { kind = "rms", weight = false }\n'
    family = parse(text, config={"a": 1, "b": 1})
    assert family.norm_kind == "rms" and not family.norm_weight and not family.norm_bias
    assert parse(text, config={"a": 1}).norm_bias


@pytest.mark.parametrize(
    "config", [{}, {"model_type": None}, {"model_type": ["llama"]}, {"model_type": "Llama"}]
)
def test_rejects_unknown_family(config: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="must be of a supported family") as caught:
        description_of(config)
    assert repr(config.get("model_type")) in str(caught.value)
    assert "llama" in str(caught.value) and "graphs/families/" in str(caught.value)


def test_rejects_two_descriptions_of_one_model_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.toml").write_text(PLAIN)
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
        ('kind = "rms"', 'kind = "rms"\noffset = "1"', ("norm.offset",)),
        ('position = "rope"', 'position = "none"', ("attention.position", "none", "rope, alibi, learned")),
        ('position = "rope"', 'position = "rope"\nfused = "rows"', ("attention.fused", "rows", "stacked")),
        ('position = "rope"', 'position = "rope"\npairs = "odd"', ("attention.pairs", "half, interleaved")),
        ('position = "rope"', 'position = "rope"\nqk_norm = { over = "all" }', ("qk_norm.over", "heads")),
        ('position = "rope"', 'position = "rope"\nqk_norm = { ovr = "head" }', ("qk_norm", "ovr")),
        ('position = "rope"', 'position = "rope"\nqk_norm = { over = "head" }', ("qk_norm", "q_norm")),
        ("[models]", "[modules]", ("models",)),
        ('llama = "Llama 1 to 3"', "llama = 1", ("models.llama", "1")),
        ("[models]", "parallel = 1\n[models]", ("parallel", "1")),
        ('prefixes = [""]', "", ("tensors.prefixes",)),
        ('embedding = "model.embed_tokens"', "embedding = 3", ("tensors.embedding", "printable text")),
        ('vocab_size = "vocab_size"', "vocab_size = 5", ("config.vocab_size", "printable strings")),
        ('vocab_size = "vocab_size"', "", ("vocab_size", "[config]", "[defaults]")),
        ('vocab_size = "vocab_size"', 'vocabsize = "vocab_size"', ("vocabsize", "config has an unknown key")),
        ('vocab_size = "vocab_size"', 'vocab_size = "vocab size"', ("config.vocab_size", "an expression")),
        ('vocab_size = "vocab_size"', 'vocab_size = ["a", "b//c"]', ("config.vocab_size", "an expression")),
        ("tied = false", "tide = false", ("tide", "defaults has an unknown key")),
        ('mlp = "mlp_bias"', "", ("bias.mlp is missing",)),
        ('mlp = "mlp_bias"', "mlp = 1", ("bias.mlp", "1")),
        ('mlp = "mlp_bias"', 'mlp = "a b"', ("bias.mlp", "an expression")),
        ('mlp = "mlp_bias"', 'mlp = false\n\n[require]\n"a(b)" = 1', ("require.a(b)", "an expression")),
        ('mlp = "mlp_bias"', 'mlp = false\n\n[layers]\nwindow = "a b"', ("layers.window", "an expression")),
        ('mlp = "mlp_bias"', 'mlp = false\n\n[layers]\nrotated = "some"', ("layers.rotated", "sliding")),
        ('mlp = "mlp_bias"', 'mlp = false\n\n[layers]\nsise = "a"', ("layers", "sise")),
        (Q, "", ("tensors.layer", "q, k, v or qkv", "down")),
        (Q, 'q = "model.self_attn.q_proj"', ("tensors.layer.q", "{i}")),
        (Q, 'q = "model.{i}.{j}.q_proj"', ("tensors.layer.q", "{i}")),
        (Q, 'q = "model.{i}.{h}.q_proj"', ("tensors.layer.q", "{i}")),
        (Q, 'q = "model.layers.{i}.q"\nqkv = "model.{i}.qkv"', ("tensors.layer", "qkv")),
        (Q, 'q = "model.layers.{i}.q"\nq_norm = "model.{i}.n"', ("q_norm and k_norm together",)),
        (Q, 'q = "model.layers.{i}.q"\nq_nrom = "model.{i}.n"', ("layer has an unknown key", "q_nrom")),
        ("[bias]", "[bais]\nx = 1\n\n[bias]", ("unknown key", "bais")),
        ("[norm]", "[norm", ("must be TOML",)),
    ],
)  # fmt: skip
def test_rejects_invalid_description(old: str, new: str, words: tuple[str, ...]) -> None:
    assert_rejected(changed(old, new), *words)


@pytest.mark.parametrize(
    ("overlay", "words"),
    [
        ("parallel = true", ("when", "config")),
        ("config = { a = 1 }\nparalel = true", ("unknown key", "paralel")),
        ("config = { a = 1 }\nnorm = { knd = 'rms' }", ("norm has an unknown key", "knd")),
        ("config = { a = 1 }\nsettings = { vocab = 'vocab_size' }", ("config has an unknown key", "vocab")),
        ("config = { a = 1 }\nsettings = { vocab_size = '' }", ("[config] or [defaults]", "vocab_size")),
        ("config = { a = 1 }\ntensors = { layer = { q = '' } }", ("tensors.layer", "q, k, v or qkv")),
    ],
)
def test_rejects_invalid_overlay(overlay: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(f"{PLAIN}\n[[when]]\n{overlay}\n", config={"a": 1})
    assert all(word in str(caught.value) for word in ("some/where.toml", *words))


def keys(file: str) -> list[int]:
    """Lines with a key that the schema names, above the overlays; [models], [assume], [require] take any."""
    free, found = False, []
    for number, line in enumerate(SHIPPED[file].split("[[when]]")[0].splitlines()):
        if line.startswith("["):
            free = line in ("[models]", "[assume]", "[require]")
        elif re.match(r"\w+ = .*[^\[]$", line) and not free:
            found.append(number)
    return found


KEYS = [(name, number) for name in SHIPPED for number in keys(name)]
SHORT = {"q", "k", "v", "o"}  # one may be misspelt as another


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
    assume(misspelt and misspelt not in {name, *(SHORT if len(name) <= 2 else ())})
    lines[number] = f"{misspelt} = {rest}"
    with pytest.raises(UsageError) as caught:
        parse("\n".join(lines), file)
    assert file in str(caught.value)
    assert name in str(caught.value) or misspelt in str(caught.value)


@pytest.mark.parametrize("file", SHIPPED)
def test_a_removed_line_is_named_or_optional(file: str) -> None:
    for number in keys(file):
        lines = SHIPPED[file].splitlines()
        name = lines.pop(number).split(" = ")[0]
        try:
            assert isinstance(parse("\n".join(lines), file), Family)
        except UsageError as error:
            assert file in str(error) and name in str(error)


@pytest.mark.slow
@given(st.text(max_size=80))
def test_rejects_any_other_text_with_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"any\.toml"):
        parse(text, "any.toml")


PLAIN_VALUES = st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    PLAIN_VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(KEYS), VALUES)
def test_any_value_is_read_or_rejected_with_a_usage_error(key: tuple[str, int], value: Any) -> None:
    file, number = key
    lines = SHIPPED[file].splitlines()
    name = lines[number].split(" = ", 1)[0]
    lines[number] = f"{name} = {toml(value)}"
    try:
        family = parse("\n".join(lines), file)
    except UsageError as error:
        assert file in str(error)
    else:
        assert isinstance(family, Family)


def toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(key)} = {toml(each)}' for key, each in value.items())}}}"
    escaped = (
        char if 32 <= ord(char) < 127 and char not in '"\\' else f"\\U{ord(char):08x}" for char in value
    )
    return f'"{"".join(escaped)}"'
