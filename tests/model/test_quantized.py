"""Checkpoints with quantised weights: their floats, their codes, and the refusals of what is not read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized_checkpoints import (
    AWQ_CONFIG,
    SIZES,
    Integers,
    Pack,
    Pair,
    awq,
    compressed,
    compressed_config,
    gptq,
    gptq_config,
    write_pair,
)

from kvexport.errors import CheckpointError
from kvexport.model import reference
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import parameters_of
from kvexport.model.loader import load_decoder
from kvexport.model.quantized.formats import stored_format
from kvexport.model.quantized.stored_format import column_groups
from kvexport.plan.sizes import trained_sizes
from kvexport.quantize.grid import dequantize
from kvexport.quantize.inputs import all_linears

Make = Callable[..., Path]
AUTOROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}


@pytest.fixture
def pair(tiny_checkpoint: Make, tmp_path: Path) -> Callable[..., Pair]:
    """`pair(pack, config, family="llama", **settings) -> Pair`."""

    def make(
        pack: Pack, config: dict[str, Any], family: str = "llama", *, head: bool = False, **settings: Any
    ) -> Pair:
        source = tiny_checkpoint(family, **{**(SIZES if family != "gpt2" else {}), **settings})
        return write_pair(source, tmp_path, pack, config, head=head)

    return make


def require_same(pair: Pair, reason: str | None) -> None:
    """Floats equal those of the float checkpoint bit for bit; codes stand for them, or a reason is given."""
    decoder, expected = load_decoder(pair.quantized, codes=True), load_decoder(pair.floats)
    for layer, wanted in zip(decoder.layers, expected.layers, strict=True):
        for name, each in all_linears(layer).items():
            assert torch.equal(each.weight, all_linears(wanted)[name].weight), name
            if reason is None:
                assert each.inexact is None and each.codes is not None
                assert torch.equal(dequantize(each.codes), each.weight)
                assert bool((each.codes.scales > 0).all())
            else:
                assert each.codes is None and reason in (each.inexact or "")
        assert parameters_of(layer) == parameters_of(wanted)
    assert all(
        each.codes is None
        for layer in load_decoder(pair.quantized).layers
        for each in all_linears(layer).values()
    )


@pytest.mark.parametrize("group", [32, 64, 128])
def test_symmetric_gptq_is_exact(group: int, pair: Callable[..., Pair]) -> None:
    found = pair(gptq(4, group), gptq_config(4, group))
    require_same(found, None)
    codes = load_decoder(found.quantized, codes=True).layers[0].mlp.up.codes
    assert codes is not None and codes.bits == 4 and codes.scales.shape == (256, 128 // group)
    assert int(codes.codes.min()) == -8


def test_the_second_format_stores_zero_points_as_they_are(pair: Callable[..., Pair]) -> None:
    require_same(pair(gptq(less_one=False), gptq_config(checkpoint_format="gptq_v2")), None)


@pytest.mark.parametrize(("less_one", "declared", "got"), [(True, "gptq_v2", 7), (False, "gptq", 9)])
def test_a_wrong_offset_of_zero_points_is_found(
    less_one: bool, declared: str, got: int, pair: Callable[..., Pair]
) -> None:
    path = pair(gptq(less_one=less_one), gptq_config(checkpoint_format=declared)).quantized
    with pytest.raises(CheckpointError, match=r"zero points of model\.layers\.0.* must be 8") as caught:
        load_decoder(path).layers[0]
    assert caught.value.got == str(got) and "checkpoint_format" in (caught.value.fix or "")


def test_asymmetric_gptq_has_no_codes(pair: Callable[..., Pair]) -> None:
    require_same(pair(gptq(symmetric=False), gptq_config(sym=False)), "asymmetric")


def test_one_zero_point_makes_a_weight_asymmetric(pair: Callable[..., Pair]) -> None:
    def change(integers: Integers) -> Integers:
        zeros = integers.zeros.clone()
        zeros[3, 0] = 9
        return replace(integers, zeros=zeros)

    require_same(pair(gptq(change=change), gptq_config(sym=False)), "asymmetric")


def test_a_zero_point_of_zero_does_not_change_its_neighbours(pair: Callable[..., Pair]) -> None:
    """Stored less 1 it is -1, whose sign reaches into the numbers after it in the word."""

    def change(integers: Integers) -> Integers:
        zeros = integers.zeros.clone()
        zeros[::3] = 0
        return replace(integers, zeros=zeros)

    require_same(pair(gptq(symmetric=False, change=change), gptq_config(sym=False)), "asymmetric")


def test_act_order_has_no_codes(pair: Callable[..., Pair]) -> None:
    require_same(pair(gptq(act_order=True), gptq_config(desc_act=True)), "act-order")


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (8, 128), (8, -1)])
def test_other_bits(bits: int, group: int, pair: Callable[..., Pair]) -> None:
    found = pair(gptq(bits, group), gptq_config(bits, group))
    require_same(found, None)
    codes = load_decoder(found.quantized, codes=True).layers[0].mlp.down.codes
    assert codes is not None and codes.bits == max(bits, 4)


def test_positive_codes_of_negative_scales_change_sign(pair: Callable[..., Pair]) -> None:
    def change(integers: Integers) -> Integers:
        scales = integers.scales.clone()
        scales[::2] *= -1
        return replace(integers, scales=scales, q=integers.q.clamp_min(1))

    require_same(pair(gptq(change=change), gptq_config()), None)


def test_the_lowest_code_of_a_negative_scale_becomes_the_highest(pair: Callable[..., Pair]) -> None:
    """AutoRound's full range: the number of largest magnitude gets the code -8, whatever its sign."""

    def change(integers: Integers) -> Integers:
        return replace(integers, scales=-integers.scales, q=integers.q.index_fill(1, torch.tensor([0]), 0))

    found = pair(gptq(change=change), AUTOROUND | {"packing_format": "auto_round:auto_gptq"})
    up = load_decoder(found.quantized, codes=True).layers[0].mlp.up
    assert up.codes is not None and up.codes.saturated and bool((up.codes.scales > 0).all())
    lost = up.weight - dequantize(up.codes)  # weights are exact, codes are not
    at_most = torch.where(up.weight == 8 * up.codes.scales.repeat_interleave(32, 1), 1.0, 0.0)
    assert torch.equal(lost, at_most * up.codes.scales.repeat_interleave(32, 1)) and bool(lost.any())
    assert torch.equal(up.weight, load_decoder(found.floats).layers[0].mlp.up.weight)


def test_a_block_of_zeros_gets_a_positive_scale(pair: Callable[..., Pair]) -> None:
    def change(integers: Integers) -> Integers:
        scales = integers.scales.clone()
        scales[0, 0] = 0
        return replace(integers, scales=scales)

    require_same(pair(gptq(change=change), gptq_config()), None)


@pytest.mark.parametrize(
    ("settings", "less_one"),
    [
        ({"packing_format": "auto_round:auto_gptq"}, True),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"}, True),
        ({"packing_format": "auto_round:exllamav2"}, False),
        ({}, True),
    ],
)
def test_autoround_packs_as_gptq(settings: dict[str, str], less_one: bool, pair: Callable[..., Pair]) -> None:
    require_same(pair(gptq(less_one=less_one), {**AUTOROUND, **settings}), None)


def test_awq_is_dequantised(pair: Callable[..., Pair]) -> None:
    require_same(pair(awq(), AWQ_CONFIG), "asymmetric")


def test_symmetric_awq_is_exact(pair: Callable[..., Pair]) -> None:
    config = {**AUTOROUND, "packing_format": "auto_round:auto_awq"}
    require_same(pair(awq(symmetric=True), config), None)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "name"),
    [
        (4, 32, "pack-quantized"),
        (4, 128, "pack-quantized"),
        (8, -1, "pack-quantized"),
        (8, -1, "int-quantized"),
        (8, 32, "int-quantized"),
    ],
)
def test_compressed_tensors_equals_the_library(
    bits: int, group: int, name: str, symmetric: bool, pair: Callable[..., Pair]
) -> None:
    pytest.importorskip("compressed_tensors")
    options: dict[str, Any] = {"symmetric": symmetric, "name": name}
    found = pair(compressed(bits, group, **options), compressed_config(bits, group, **options))
    require_same(found, None if symmetric else "asymmetric")


def test_logits_equal_those_of_transformers_with_the_library(pair: Callable[..., Pair]) -> None:
    """transformers decompresses the checkpoint itself."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    found = pair(compressed(), compressed_config())
    ids = torch.arange(3, 19)[None]
    model = AutoModelForCausalLM.from_pretrained(found.quantized, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids).logits
    logits = reference.forward(load_decoder(found.quantized), ids)
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize(("pack", "config"), [(gptq(), gptq_config()), (awq(), AWQ_CONFIG)])
def test_logits_equal_those_of_the_floats_in_transformers(
    pack: Pack, config: dict[str, Any], pair: Callable[..., Pair]
) -> None:
    from transformers import AutoModelForCausalLM

    found = pair(pack, config)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(found.floats)(ids).logits
    logits = reference.forward(load_decoder(found.quantized), ids)
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"n_embd": 64, "n_head": 2}),  # [in, out] in floats, [out, in] in integers
        ("gpt_neox", {}),  # q, k and v fused
        ("phi3", {"pad_token_id": 0}),  # gate and up fused
        ("gptj", {"n_embd": 128, "n_head": 4, "n_inner": 256, "rotary_dim": 16}),  # pairs are interleaved
    ],
)
def test_codes_follow_the_rows_of_every_layout(
    family: str, settings: dict[str, Any], pair: Callable[..., Pair]
) -> None:
    require_same(pair(gptq(), gptq_config(), family, **settings), None)


def test_a_quantised_head(pair: Callable[..., Pair]) -> None:
    found = pair(gptq(), gptq_config(lm_head=True), head=True, vocab_size=72)
    head = load_decoder(found.quantized, codes=True).head
    assert head is not None and head.codes is not None
    wanted = load_decoder(found.floats).head
    assert wanted is not None and torch.equal(head.weight, wanted.weight)


def test_modules_that_are_not_converted_are_read_as_floats(pair: Callable[..., Pair]) -> None:
    inside = gptq()

    def pack(module: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return ({f"{module}.weight": weight}, weight) if "down" in module else inside(module, weight)

    found = pair(pack, gptq_config(modules_to_not_convert=["down_proj"]))
    layer = load_decoder(found.quantized, codes=True).layers[1]
    assert layer.mlp.down.codes is None and layer.mlp.down.inexact is None
    assert layer.mlp.up.codes is not None
    assert torch.equal(layer.mlp.down.weight, load_decoder(found.floats).layers[1].mlp.down.weight)


def test_biases_of_zeros_that_old_programs_store_are_ignored(
    pair: Callable[..., Pair], edit_checkpoint: Make
) -> None:
    found = pair(gptq(), gptq_config())
    name = "model.layers.0.mlp.up_proj.bias"
    zeros = edit_checkpoint(found.quantized, tensors=lambda held: held.update({name: torch.zeros(256)}))
    assert load_decoder(zeros).layers[0].mlp.up.bias is None
    ones = edit_checkpoint(found.quantized, tensors=lambda held: held.update({name: torch.ones(256)}))
    with pytest.raises(CheckpointError, match="1 unknown"):
        load_decoder(ones)


def test_parts_in_several_shards(pair: Callable[..., Pair], tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    found = pair(gptq(), gptq_config())
    path = found.quantized / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    shards = {f"{index}.safetensors": sorted(tensors)[index::3] for index in range(3)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, found.quantized / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (found.quantized / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    require_same(found, None)


# What is refused


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("bitsandbytes", "places in a table"),
        ("fp8", "floats of 8 bits"),
        ("fbgemm_fp8", "floats of 8 bits"),
        ("nvfp4", "floats of 4 bits"),
        ("mxfp4", "floats of 4 bits"),
        ("modelopt", "ModelOpt"),
        ("eetq", "EETQ"),
        ("hqq", "HQQ"),
        ("aqlm", "codebook"),
        ("made-up", "'made-up'"),
        (None, "None"),
        (7, "7"),
    ],
)
def test_other_formats_are_refused_with_the_reason_and_the_way(
    method: object, reason: str, tiny_checkpoint: Make, edit_checkpoint: Make
) -> None:
    config = {"quantization_config": {"quant_method": method}}
    path = edit_checkpoint(tiny_checkpoint("llama"), config=config)
    for read in (load_decoder, trained_sizes):
        with pytest.raises(CheckpointError, match="must be in a format that can be read") as caught:
            read(path)
        assert reason in str(caught.value.got) and "GPTQ" in str(caught.value.expected)
        assert "base_model" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gptq_config(bits=3), "bits in quantization_config"),
        (gptq_config(bits=True), "bits in quantization_config"),
        (gptq_config(group=0), "group_size"),
        (gptq_config(checkpoint_format="marlin"), "checkpoint_format"),
        (gptq_config(is_marlin_format=True), "format in"),
        (gptq_config(sym="yes"), "sym"),
        ({**AWQ_CONFIG, "version": "gemv"}, "version"),
        ({**AWQ_CONFIG, "bits": 8}, "bits"),
        ({**AUTOROUND, "data_type": "mx_fp"}, "data_type"),
        ({**AUTOROUND, "packing_format": "auto_round:llm_compressor"}, "packing_format"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "format that can be read"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format that can be read"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": []}, "config_groups"),
        ({**compressed_config(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**compressed_config(), "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ],
)
def test_settings_that_are_not_supported(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_format({"quantization_config": config})


def test_floats_in_one_group_of_compressed_tensors_are_refused() -> None:
    config = compressed_config()
    config["config_groups"]["group_1"] = {"weights": {"num_bits": 8, "type": "float"}}
    with pytest.raises(CheckpointError, match="format that can be read") as caught:
        stored_format({"quantization_config": config})
    assert "FP8" in str(caught.value.got)


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("qzeros", None, "must contain the tensor .*qzeros"),
        ("qweight", lambda x: x.float(), "data type of its format"),
        ("qweight", lambda x: x[:-1], "2, 4, 8 bits"),
        ("qweight", lambda x: x[:, :-1], "shape"),
        ("scales", lambda x: x[:, :-1], "scales for each"),
        ("scales", lambda x: x * float("nan"), "finite"),
        ("scales", lambda x: x.repeat(3, 1)[:11], "qzeros must have the shape"),
        ("g_idx", lambda x: x + 1, "groups that have scales"),
        ("g_idx", lambda x: x[1:], "shape"),
    ],
)
def test_damaged_parts(
    part: str, damage: Any, message: str, pair: Callable[..., Pair], edit_checkpoint: Make
) -> None:
    name = f"model.layers.1.mlp.up_proj.{part}"

    def change(held: dict[str, Any]) -> None:
        tensor = held.pop(name)
        if damage is not None:
            held[name] = damage(tensor).contiguous()

    path = edit_checkpoint(pair(gptq(), gptq_config()).quantized, tensors=change)
    with pytest.raises(CheckpointError, match=message):
        list(load_decoder(path).layers)


def test_groups_must_fit_the_columns() -> None:
    assert column_groups(None, "map.scales", 128, 4, 32) is None
    assert torch.equal(column_groups(None, "map.scales", 80, 3, 32), torch.arange(80) // 32)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="groups of map must fit its 128 columns"):
        column_groups(None, "map.scales", 128, 11, 32)


def test_tensors_of_another_format_than_config_json_describes(
    pair: Callable[..., Pair], edit_checkpoint: Make
) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    path = edit_checkpoint(
        pair(gptq(), gptq_config()).quantized, tensors=lambda held: held.update({name: torch.ones(1)})
    )
    with pytest.raises(CheckpointError, match="only tensors of its format"):
        load_decoder(path)


def test_quantised_tensors_without_a_config_say_what_to_add(
    pair: Callable[..., Pair], edit_checkpoint: Make
) -> None:
    path = edit_checkpoint(pair(gptq(), gptq_config()).quantized, without=("quantization_config",))
    with pytest.raises(CheckpointError, match="must describe the quantised weights") as caught:
        load_decoder(path)
    assert "quantize_config.json" in (caught.value.fix or "")


def test_the_format_is_named(pair: Callable[..., Pair]) -> None:
    form = stored_format(Checkpoint(pair(gptq(), gptq_config()).quantized).config)
    assert form is not None and form.name == "GPTQ, 4 bits, groups of 32" and form.block == 32
