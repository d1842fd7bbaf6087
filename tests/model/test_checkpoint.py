"""Loading of checkpoints, and the error for each kind of damaged one."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny_bundles import byte_level_tokenizer

from kvexport.errors import CheckpointError, UsageError
from kvexport.model import reference
from kvexport.model.checkpoint import Checkpoint, sha256_of
from kvexport.model.decoder import Decoder
from kvexport.model.families import families
from kvexport.model.loader import load_decoder

Make = Callable[..., Path]
Q = "model.layers.1.self_attn.q_proj.weight"
SHARD = "30KB"


@pytest.fixture
def llama(tiny_checkpoint: Make) -> Path:
    return tiny_checkpoint("llama")


def refused(path: Path | str, *said: str) -> CheckpointError:
    """Loading the whole checkpoint raises a CheckpointError whose message contains all of `said`."""
    with pytest.raises(CheckpointError) as caught:
        list(load_decoder(path).layers)
    for part in said:
        assert part in str(caught.value)
    assert isinstance(caught.value, UsageError) and caught.value.exit_code == 2
    return caught.value


def logits(path: Path | Decoder) -> torch.Tensor:
    decoder = path if isinstance(path, Decoder) else load_decoder(path)
    return reference.forward(decoder, torch.arange(3, 19)[None])


def sharded_copy(tiny_checkpoint: Make, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_checkpoint("llama", max_shard_size=SHARD), folder)
    return folder, json.loads((folder / "model.safetensors.index.json").read_text())


# What is read


def test_sharded_checkpoint_equals_a_single_file(tiny_checkpoint: Make, llama: Path) -> None:
    sharded = tiny_checkpoint("llama", max_shard_size=SHARD)
    assert len(set(Checkpoint(sharded).files.values())) > 2
    assert torch.equal(logits(sharded), logits(llama))


def test_single_file_takes_precedence_over_an_index(edit_checkpoint: Make, llama: Path) -> None:
    """As in transformers; the index here is wrong."""
    path = edit_checkpoint(llama)
    (path / "model.safetensors.index.json").write_text("{}")
    assert torch.equal(logits(path), logits(llama))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_on_disk_are_read_as_float32_exactly(tiny_checkpoint: Make, dtype: str) -> None:
    path = tiny_checkpoint("llama", dtype=dtype)
    stored = load_file(path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    read = load_decoder(path).layers[1].attention.q.weight
    assert read.dtype == torch.float32
    assert torch.equal(read, stored[Q].float())


def test_leaves_have_the_requested_dtype(llama: Path) -> None:
    decoder = load_decoder(llama, torch.float64)
    layer = decoder.layers[0]
    leaves = (
        decoder.embedding.weight,
        decoder.output.weight,
        layer.attention.v.weight,
        layer.mlp_norm.weight,
    )
    assert all(leaf.dtype == torch.float64 for leaf in leaves)


def test_tensors_are_copies_not_file_mappings(edit_checkpoint: Make, llama: Path) -> None:
    path = edit_checkpoint(llama)
    decoder = load_decoder(path)
    before = decoder.embedding.weight.clone()
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-20_000, 2)
        file.write(b"\xff" * 20_000)
    assert torch.equal(decoder.embedding.weight, before)


def test_config_without_kv_heads_is_multi_head(tiny_checkpoint: Make, edit_checkpoint: Make) -> None:
    mha = tiny_checkpoint("llama", num_key_value_heads=4)
    path = edit_checkpoint(mha, without=("num_key_value_heads",))
    assert load_decoder(path).layers[0].attention.num_kv_heads == 4
    assert torch.equal(logits(path), logits(mha))


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ({"rope_type": "default", "rope_theta": 5000.0}, {"rope_theta": 5000.0}),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
            {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        ({"rope_type": "default", "rope_theta": 10000.0}, {"rope_scaling": None}),
    ],
)
def test_old_rotary_settings_equal_new(
    llama: Path, edit_checkpoint: Make, new: dict[str, Any], old: dict[str, Any]
) -> None:
    old_path = edit_checkpoint(llama, config=old, without=("rope_parameters",))
    assert torch.equal(logits(old_path), logits(edit_checkpoint(llama, config={"rope_parameters": new})))


def test_ignores_stored_rotary_frequencies(llama: Path, edit_checkpoint: Make) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = edit_checkpoint(llama, tensors=lambda held: held.update({name: torch.zeros(4)}))
    assert torch.equal(logits(path), logits(llama))


def test_token_ids(llama: Path, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(llama, config={"eos_token_id": 5, "bos_token_id": None})
    (path / "generation_config.json").unlink()
    decoder = load_decoder(path)
    assert (decoder.bos_token_id, decoder.eos_token_ids) == (None, (5,))
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_decoder(path).eos_token_ids == (7, 9)
    (path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    refused(path, "eos_token_id", "'</s>'")


def test_digest_and_tokenizer(llama: Path, edit_checkpoint: Make, tmp_path: Path) -> None:
    same, other = edit_checkpoint(llama), edit_checkpoint(llama, tensors=lambda held: held[Q].add_(1))
    assert (
        Checkpoint(same).digest() == Checkpoint(edit_checkpoint(llama)).digest() != Checkpoint(other).digest()
    )
    (same / "tokenizer.json").write_text("{}")
    into = tmp_path / "into"
    into.mkdir()
    assert Checkpoint(same).copy_tokenizer(into) == ["tokenizer.json", "generation_config.json"]
    assert (
        sha256_of(into / "tokenizer.json")
        == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    )


def test_copies_every_tokenizer_template_and_generation_file(
    llama: Path, edit_checkpoint: Make, tmp_path: Path
) -> None:
    path, into = edit_checkpoint(llama), tmp_path / "into"
    names = [
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
        "generation_config.json",
    ]
    (path / "additional_chat_templates").mkdir()
    for name in [*names, "preprocessor_config.json", "README.md", "code.py"]:
        (path / name).write_text(name)
    into.mkdir()
    assert sorted(Checkpoint(path).copy_tokenizer(into)) == sorted(names)
    assert {name: (into / name).read_text() for name in names} == {name: name for name in names}
    assert sum(each.is_file() for each in into.rglob("*")) == len(names)


# Prefixes


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("model.", ["model.embed_tokens.weight"]),
        ("", ["embed_tokens.weight", "layers.0.q.weight"]),
        ("language_model.model.", ["language_model.model.embed_tokens.weight", "vision.patch.weight"]),
        ("model.language_model.", ["model.language_model.embed_tokens.weight", "lm_head.weight"]),
        ("base_model.model.model.", ["base_model.model.model.embed_tokens.weight"]),
        ("_orig_mod.model.", ["_orig_mod.model.embed_tokens.weight"]),
        ("model.", ["model.embed_tokens.weight", "audio.embed_tokens.weight", "embed_tokens.weight"]),
    ],
)
def test_finds_the_prefix_of_the_tensors(tmp_path: Path, prefix: str, names: list[str]) -> None:
    assert with_tensors(tmp_path, names).find_prefix("embed_tokens.weight", ["model.", ""]) == prefix


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"language_model.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace("model.", "model.language_model.", 1),
        lambda name: name.removeprefix("model."),
    ],
)
def test_reads_tensors_under_other_prefixes(
    tiny_checkpoint: Make, edit_checkpoint: Make, rename: Callable[[str], str], tied: bool
) -> None:
    source = tiny_checkpoint("llama", tie_word_embeddings=tied)

    def renamed(held: dict[str, torch.Tensor]) -> None:
        tensors = {rename(name): tensor for name, tensor in held.items()}
        held.clear()
        held.update(tensors)

    assert torch.equal(logits(edit_checkpoint(source, tensors=renamed)), logits(source))


@pytest.mark.parametrize(
    ("prefix", "head", "expected"),
    [
        ("model.", "lm_head.weight", ""),
        ("", "lm_head.weight", ""),
        ("language_model.model.", "language_model.lm_head.weight", "language_model."),
        ("model.language_model.", "lm_head.weight", ""),
        ("base_model.model.model.", "base_model.model.lm_head.weight", "base_model.model."),
        ("_orig_mod.", "_orig_mod.lm_head.weight", "_orig_mod."),
        ("language_model.model.", "talker.lm_head.weight", ""),
    ],
)
def test_finds_the_prefix_of_the_head(tmp_path: Path, prefix: str, head: str, expected: str) -> None:
    assert with_tensors(tmp_path, [head]).head_prefix("lm_head.weight", prefix) == expected


def test_a_name_that_only_ends_alike_has_no_prefix(tmp_path: Path) -> None:
    checkpoint = with_tensors(tmp_path, ["model.re_embed_tokens.weight"])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.find_prefix("embed_tokens.weight", ["model.", ""])
    for part in ("the embedding model.embed_tokens.weight", "model.re_embed_tokens.weight", "'llama'"):
        assert part in str(caught.value)


def test_two_embeddings_are_named(tmp_path: Path) -> None:
    checkpoint = with_tensors(tmp_path, ["audio.embed_tokens.weight", "text.embed_tokens.weight"])
    with pytest.raises(CheckpointError, match=r"audio\.embed_tokens\.weight, text\.embed_tokens\.weight"):
        checkpoint.find_prefix("embed_tokens.weight", ["model.", ""])


def test_tensors_of_an_adapter_must_be_merged(tmp_path: Path) -> None:
    base = "base_model.model.model."
    names = [base + "embed_tokens.weight", base + "layers.0.self_attn.q_proj.lora_A.default.weight"]
    with pytest.raises(CheckpointError, match="whole model, not a LoRA adapter"):
        with_tensors(tmp_path, names).find_prefix("embed_tokens.weight", ["model.", ""])


def with_tensors(folder: Path, names: list[str]) -> Checkpoint:
    save_file({name: torch.zeros(1) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Checkpoint(folder)


@pytest.mark.parametrize("suffix", ["qweight", "weight_scale_inv", "weight.absmax", "weight_packed"])
def test_tensors_of_quantised_weights_are_named(llama: Path, edit_checkpoint: Make, suffix: str) -> None:
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    path = edit_checkpoint(llama, tensors=lambda held: held.update({name: torch.zeros(1)}))
    refused(
        path, "must describe the quantised weights", name, "take the checkpoint that it was quantised from"
    )


# Tied heads


def test_tied_checkpoint_may_store_its_head(tiny_checkpoint: Make, edit_checkpoint: Make) -> None:
    tied = tiny_checkpoint("llama", tie_word_embeddings=True)
    path = edit_checkpoint(
        tied, tensors=lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()})
    )
    assert load_decoder(path).head is None
    assert torch.equal(logits(path), logits(tied))


def test_rejects_a_tied_checkpoint_with_another_head(llama: Path, edit_checkpoint: Make) -> None:
    """transformers 4 drops the stored head, transformers 5 unties it; neither is a safe default."""
    refused(
        edit_checkpoint(llama, config={"tie_word_embeddings": True}), "lm_head.weight", "tie_word_embeddings"
    )


def test_rejects_an_untied_checkpoint_without_a_head(tiny_checkpoint: Make, edit_checkpoint: Make) -> None:
    tied = tiny_checkpoint("llama", tie_word_embeddings=True)
    refused(edit_checkpoint(tied, config={"tie_word_embeddings": False}), "1 missing", "lm_head.weight")


# No checkpoint


def test_rejects_a_path_that_is_not_a_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "must be a folder", "nowhere", "config.json")
    (tmp_path / "file").write_text("")
    refused(str(tmp_path / "file"), "must be a folder")


def test_rejects_a_directory_without_config(tmp_path: Path) -> None:
    refused(tmp_path, "must be a checkpoint", "config.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "must be JSON"), ("[]", "must be a JSON object"), ("\xff", "must be JSON"), ("", "must be JSON")],
)
def test_rejects_a_config_that_is_not_a_json_object(
    llama: Path, edit_checkpoint: Make, text: str, said: str
) -> None:
    path = edit_checkpoint(llama)
    (path / "config.json").write_bytes(text.encode("latin-1"))
    refused(path, said, "config.json")


def test_rejects_a_config_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    refused(tmp_path, "config.json must be readable")


def test_rejects_a_directory_without_weights(llama: Path, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(llama)
    (path / "model.safetensors").unlink()
    refused(path, "must contain weights", "model.safetensors")


class _Trap:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def run_fix(error: CheckpointError) -> None:
    """Run the command of an error's fix."""
    assert error.fix is not None
    command = shlex.split(error.fix[error.fix.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_rejects_pickles_without_opening_them(
    llama: Path, edit_checkpoint: Make, tmp_path: Path, name: str
) -> None:
    path = edit_checkpoint(llama)
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    refused(path, "pickle", name, "safetensors", "save_pretrained")
    assert not (tmp_path / "sprung").exists()


def test_reports_an_unknown_family_before_pickles(llama: Path, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(llama, config={"model_type": "t5"})
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "pickle" not in str(refused(path, "'t5'"))


@pytest.mark.slow
def test_suggested_command_converts_a_pickle(llama: Path, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(llama, config={"vocab_size": 67})
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    (path / "tokenizer.json").write_text(byte_level_tokenizer())
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    run_fix(refused(path, "pickle"))
    assert torch.equal(logits(Path(f"{path}-safetensors")), logits(llama))
    assert (Path(f"{path}-safetensors") / "tokenizer.json").exists()


# Broken files


def test_rejects_truncated_file(llama: Path, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(llama)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(path, "model.safetensors", "must be a safetensors file", f"{len(whole) // 2} bytes", "truncated")


def test_rejects_empty_file(llama: Path, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(llama)
    (path / "model.safetensors").write_bytes(b"")
    refused(path, "must be a safetensors file", "0 bytes")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_header_raises_checkpoint_error(
    llama: Path, edit_checkpoint: Make, data: st.DataObject
) -> None:
    """For any bytes in the header: the checkpoint loads unchanged, or a CheckpointError is raised."""
    path = edit_checkpoint(llama)
    whole = bytearray((path / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.integers(0, header - 1))
    put = data.draw(st.binary(min_size=1, max_size=8))
    whole[at : at + len(put)] = put
    (path / "model.safetensors").write_bytes(bytes(whole))
    try:
        list(load_decoder(path).layers)
    except CheckpointError:
        pass
    finally:
        shutil.rmtree(path)


def test_rejects_missing_shard(tiny_checkpoint: Make, tmp_path: Path) -> None:
    path, index = sharded_copy(tiny_checkpoint, tmp_path)
    (path / index["weight_map"][Q]).unlink()
    refused(path, index["weight_map"][Q], "model.safetensors.index.json", "download")


def test_rejects_truncated_shard(tiny_checkpoint: Make, tmp_path: Path) -> None:
    path, index = sharded_copy(tiny_checkpoint, tmp_path)
    shard = path / index["weight_map"][Q]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(path, shard.name, "must be a safetensors file")


def test_rejects_an_index_with_a_tensor_that_its_shard_lacks(tiny_checkpoint: Make, tmp_path: Path) -> None:
    path, index = sharded_copy(tiny_checkpoint, tmp_path)
    shard = path / index["weight_map"][Q]
    save_file(
        {name: tensor for name, tensor in load_file(shard).items() if name != Q} or {"x": torch.zeros(1)},
        shard,
    )
    refused(path, shard.name, Q, "lists")


def test_rejects_an_index_with_a_tensor_of_another_shard(tiny_checkpoint: Make, tmp_path: Path) -> None:
    path, index = sharded_copy(tiny_checkpoint, tmp_path)
    index["weight_map"][Q] = next(
        shard for shard in index["weight_map"].values() if shard != index["weight_map"][Q]
    )
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, index["weight_map"][Q], Q)


def test_index_selects_among_copies_of_a_tensor(tiny_checkpoint: Make, tmp_path: Path, llama: Path) -> None:
    """The index decides which of two copies is used, for any order of the files."""
    for copied_into in (0, -1):
        path, index = sharded_copy(tiny_checkpoint, tmp_path / str(copied_into))
        shard = path / sorted(set(index["weight_map"].values()) - {index["weight_map"][Q]})[copied_into]
        save_file({**load_file(shard), Q: torch.zeros(32, 32)}, shard)
        assert torch.equal(logits(path), logits(llama))


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 3, None, ["a"]]
)
def test_rejects_an_index_with_paths(tiny_checkpoint: Make, tmp_path: Path, shard: object) -> None:
    path, index = sharded_copy(tiny_checkpoint, tmp_path)
    shutil.copyfile(path / index["weight_map"][Q], tmp_path / "model.safetensors")
    index["weight_map"][Q] = shard
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, "model.safetensors.index.json", repr(shard))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_rejects_an_index_without_a_map(tiny_checkpoint: Make, tmp_path: Path, text: str) -> None:
    path, _ = sharded_copy(tiny_checkpoint, tmp_path)
    (path / "model.safetensors.index.json").write_text(text)
    refused(path, "must have a weight_map")


# Tensors that are not what the config says


def test_unknown_family(llama: Path, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(llama, config={"model_type": "other", "architectures": ["OtherForCausalLM"]})
    error = refused(path, "must be of a supported family", "'other'", "graphs/families")
    assert error.expected == ", ".join(sorted(families()))
    path = edit_checkpoint(llama, without=("model_type",))
    assert 'set model_type to "llama"' in str(refused(path, "model_type = None").fix)


def test_rejects_unexpected_tensors(llama: Path, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(
        llama, tensors=lambda held: held.update({"model.layers.0.self_attn.sinks": torch.zeros(4)})
    )
    refused(path, "only tensors of family 'llama': 1 unknown", "model.layers.0.self_attn.sinks")


def test_fewer_layers_in_the_config_than_stored(llama: Path, edit_checkpoint: Make) -> None:
    refused(
        edit_checkpoint(llama, config={"num_hidden_layers": 1}), "9 unknown", "model.layers.1.", "config.json"
    )


def test_more_layers_in_the_config_than_stored(llama: Path, edit_checkpoint: Make) -> None:
    refused(edit_checkpoint(llama, config={"num_hidden_layers": 3}), "9 missing", "model.layers.2.")


def test_rejects_missing_tensor(llama: Path, edit_checkpoint: Make) -> None:
    refused(edit_checkpoint(llama, tensors=lambda held: held.pop(Q)), "1 missing", Q)


def test_rejects_missing_embedding(llama: Path, edit_checkpoint: Make) -> None:
    name = "model.embed_tokens.weight"
    refused(
        edit_checkpoint(llama, tensors=lambda held: held.pop(name)),
        "must contain the embedding",
        name,
        "llama",
    )


def test_rejects_missing_bias(tiny_checkpoint: Make, edit_checkpoint: Make, llama: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.bias"
    path = edit_checkpoint(tiny_checkpoint("qwen2"), tensors=lambda held: held.pop(name))
    refused(path, "1 missing", name)
    refused(edit_checkpoint(llama, config={"attention_bias": True}), "8 missing", "q_proj.bias")


def test_rejects_bias_that_the_config_excludes(tiny_checkpoint: Make, edit_checkpoint: Make) -> None:
    biased = tiny_checkpoint("llama", attention_bias=True)
    refused(edit_checkpoint(biased, config={"attention_bias": False}), "8 unknown", "k_proj.bias")


def test_rejects_unknown_tensor_name(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    with checkpoint.reading(), pytest.raises(CheckpointError, match="must contain the tensor nothing"):
        checkpoint.tensor("nothing", (1,), torch.float32)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_rejects_wrong_dtype(llama: Path, edit_checkpoint: Make, dtype: torch.dtype, name: str) -> None:
    path = edit_checkpoint(llama, tensors=lambda held: held.update({Q: held[Q].to(dtype)}))
    refused(path, Q, name, "F32", "unquantised")


def test_rejects_wrong_number_of_kv_heads(llama: Path, edit_checkpoint: Make) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    refused(
        edit_checkpoint(llama, config={"num_key_value_heads": 1}),
        name,
        "(16, 32)",
        "(8, 32)",
        "num_key_value_heads",
    )
    refused(
        edit_checkpoint(llama, without=("num_key_value_heads",)),
        name,
        "(16, 32)",
        "(32, 32)",
        "num_key_value_heads",
    )
    refused(
        edit_checkpoint(llama, config={"num_key_value_heads": 3}), "must divide num_attention_heads", "3 of 4"
    )


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "head_dim"])
def test_rejects_wrong_shape(llama: Path, edit_checkpoint: Make, key: str) -> None:
    stored = Checkpoint(llama).config[key]
    refused(
        edit_checkpoint(llama, config={key: stored + 2}), "must have the shape that config.json gives", key
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rejects_numbers_that_are_not_finite(llama: Path, edit_checkpoint: Make, bad: float) -> None:
    path = edit_checkpoint(llama, tensors=lambda held: held[Q][3, 4:6].fill_(bad))
    refused(path, Q, "must be finite", f"2 of {32 * 32}")


# Settings that are not supported


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "ntk", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": ["yarn"], "factor": 4.0, "rope_theta": 1e4}},
        {"rope_parameters": None, "rope_scaling": {"type": "mrope", "factor": 4.0}},
    ],
)
def test_rejects_unknown_rotary_scaling(llama: Path, edit_checkpoint: Make, rope: dict[str, Any]) -> None:
    kind = next(said for said in rope.values() if said)
    refused(
        edit_checkpoint(llama, config=rope),
        repr(kind.get("rope_type", kind.get("type"))),
        "default, linear, dynamic, yarn, longrope, llama3",
    )


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "linear"}, "must have factor with rope_type 'linear'"),
        ({"rope_type": "llama3", "factor": 8.0}, "must have low_freq_factor with rope_type 'llama3'"),
        ({"rope_type": "linear", "factor": 0}, "factor in config.json must be a positive number"),
        ({"rope_type": "linear", "factor": "2"}, "factor in config.json must be a positive number"),
        ({"rope_theta": "10000"}, "rope_theta in config.json must be a positive number"),
        ({"global_attention": {"rope_type": "default"}}, "must be one table"),
        ([1], "must be one table"),
    ],
)
def test_rejects_invalid_rotary_settings(llama: Path, edit_checkpoint: Make, rope: object, said: str) -> None:
    refused(edit_checkpoint(llama, config={"rope_parameters": rope}), said)


@pytest.mark.parametrize("inside", [True, False])
def test_rejects_a_rotated_part_that_has_no_pairs(llama: Path, edit_checkpoint: Make, inside: bool) -> None:
    part = {"partial_rotary_factor": 0.4}  # 3 of 8
    config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **part}} if inside else part
    refused(edit_checkpoint(llama, config=config), "must rotate an even number", "3 of head_dim 8", "0.4")


@pytest.mark.parametrize("act", ["quick_gelu", None, ["silu"], 1])
def test_rejects_unknown_activation(llama: Path, edit_checkpoint: Make, act: object) -> None:
    path = edit_checkpoint(llama, config={"hidden_act": act})
    if act is None:  # the family's default
        assert load_decoder(path).layers[0].mlp.activation == "silu"
    else:
        refused(path, "activation", repr(act), "silu")


def test_rejects_bloom_with_its_residual_after_the_norm(tiny_checkpoint: Make, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(
        tiny_checkpoint("bloom"), config={"apply_residual_connection_post_layernorm": True}
    )
    refused(path, "family 'bloom'", "apply_residual_connection_post_layernorm = True")


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8"])
def test_rejects_quantised_checkpoint(llama: Path, edit_checkpoint: Make, method: str) -> None:
    """Detected before any tensor is read."""
    path = edit_checkpoint(
        llama,
        config={"quantization_config": {"quant_method": method}},
        tensors=lambda held: held.update({Q: torch.zeros(1)}),
    )
    refused(path, "quantised", repr(method), "take the checkpoint that it was quantised from")


@pytest.mark.parametrize("missing", ["sliding_window", "max_window_layers"])
def test_rejects_a_config_without_the_window_size(
    tiny_checkpoint: Make, edit_checkpoint: Make, missing: str
) -> None:
    path = tiny_checkpoint("qwen2", use_sliding_window=True, sliding_window=4)
    refused(edit_checkpoint(path, without=(missing, "layer_types")), f"config.json must have {missing}")


def test_windows_equal_those_of_transformers(
    tiny_checkpoint: Make, edit_checkpoint: Make, llama: Path
) -> None:
    def windows(path: Path, **config: Any) -> list[int | None]:
        return [layer.attention.window for layer in load_decoder(edit_checkpoint(path, config=config)).layers]

    mistral, qwen2 = tiny_checkpoint("mistral"), tiny_checkpoint("qwen2")
    assert windows(mistral) == [None, None]
    assert windows(mistral, sliding_window=9) == [9, 9]
    assert windows(llama, sliding_window=9) == [None, None]  # Llama has none, whatever its config says
    assert windows(qwen2, sliding_window=9) == [None, None]  # not switched on
    switched = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}
    assert windows(qwen2, **switched, layer_types=None) == [None, 9]
    assert windows(qwen2, **switched, layer_types=["sliding_attention", "full_attention"]) == [9, None]
    for kinds in (["sliding_attention"], ["sliding_attention", "global_attention"], "sliding_attention"):
        refused(
            edit_checkpoint(qwen2, config={**switched, "layer_types": kinds}), "layer_types", "full_attention"
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 2.0),
        ("num_attention_heads", -4),
        ("num_attention_heads", "4"),
        ("hidden_size", True),
        ("intermediate_size", "48"),
        ("head_dim", 7),
        ("head_dim", 0),
        ("max_position_embeddings", 1.5),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", 10**400),
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**400),
        ("max_position_embeddings", 10**400),
    ],
)
def test_rejects_sizes_out_of_range(llama: Path, edit_checkpoint: Make, key: str, value: object) -> None:
    refused(edit_checkpoint(llama, config={key: value}), "in config.json must be")


def test_rejects_a_config_without_a_size(llama: Path, edit_checkpoint: Make) -> None:
    refused(edit_checkpoint(llama, without=("hidden_size",)), "config.json must have hidden_size")


# Memory

_READ_ALL = """
import contextlib, sys
import psutil
import torch, safetensors.torch
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.loader import load_decoder

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def mapped():
    return psutil.Process().memory_info().shared

if sys.argv[2] == "kept":
    Checkpoint.reading = contextlib.contextmanager(lambda self: iter([None]))
load_decoder(sys.argv[1]).layers[0]
first, files = peak(), mapped()
for layer in load_decoder(sys.argv[1]).layers:
    del layer
    most = mapped()
print(peak() - first, most - files)
"""


@pytest.mark.slow
def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Layers after the first of 18 (300 MB) add a few MB at most, and no page of the file stays mapped."""
    hidden, inner, layers = 512, 2048, 18
    config = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    shapes = {
        "self_attn.{}_proj": ("qkvo", (hidden, hidden)),
        "mlp.{}_proj": (("gate", "up"), (inner, hidden)),
    }
    tensors = {"model.embed_tokens.weight": torch.randn(100, hidden), "model.norm.weight": torch.ones(hidden)}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        for template, (names, shape) in shapes.items():
            tensors.update({f"{prefix}{template.format(name)}.weight": torch.randn(shape) for name in names})
        tensors[f"{prefix}mlp.down_proj.weight"] = torch.randn(hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(hidden)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = (tmp_path / "model.safetensors").stat().st_size
    layer = size // layers

    def growth(how: str) -> tuple[int, int]:
        """Bytes that the peak and the mapped pages grow by, once one layer has been read."""
        command = [sys.executable, "-c", _READ_ALL, str(tmp_path), how]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, mapped = map(int, ran.stdout.split())
        return peak, mapped

    peak, mapped = growth("released")
    assert size > 290e6 and peak < 5 * layer and mapped < layer / 4
    peak, mapped = growth("kept")  # the control: files that stay mapped would show
    assert peak > 10 * layer and mapped > 10 * layer
