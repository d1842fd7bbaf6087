"""Conversion of whole decoders: reports, refit, saved moments, degenerate models and memory."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch
from support.conversions import plain
from support.decoders import STYLES, make_decoder, random_windows, with_attention
from torch import Tensor

from kvexport.calibrate import Moments, Statistics, StatisticsSource, StatisticsWriter, recipe_for, windows
from kvexport.convert import (
    ConvertedLayer,
    KVShape,
    LayerPlan,
    convert,
    measure_moments,
    methods_for,
    pipeline,
    unconverted_layers,
)
from kvexport.convert.code_moments import make_code_moments
from kvexport.convert.methods import METHOD_NAMES, METHODS
from kvexport.convert.streams import Streams
from kvexport.errors import KvexportError
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, LazyLayers, Linear, tensors_of


def joined(decoder: Decoder, layers: list[ConvertedLayer]) -> Decoder:
    return dataclasses.replace(decoder, layers=[each.layer for each in layers])


def equal_tensors(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def residual_error(decoder: Decoder, converted: Decoder, tokens: Tensor) -> float:
    """Relative error of the residual stream after the last layer."""
    taps: tuple[list[reference.LayerTaps], list[reference.LayerTaps]] = [], []
    for model, each in zip((decoder, converted), taps, strict=True):
        reference.forward(model, tokens, taps=each)
    target = taps[0][-1].residual
    return float((taps[1][-1].residual - target).norm() / target.norm())


CASES = [
    (style, method)
    for style in STYLES
    for method in METHOD_NAMES
    if (style, method) != ("qwen3", "fold")
]  # fmt: skip


@pytest.mark.parametrize(("style", "method"), CASES)
def test_every_method_converts_every_family_and_reports_its_loss(style: str, method: str) -> None:
    decoder = make_decoder(style, layers=2, sharpness=2.0)
    trained = decoder.layers[0].attention
    tokens, kv_heads = random_windows(decoder, 16, 24), trained.num_kv_heads // 2
    conversion = plain(decoder, tokens, kv_heads, method)
    layers = list(conversion)
    assert [each.index for each in layers] == [0, 1]
    for each in layers:
        report, attention = each.report, each.layer.attention
        assert attention.num_kv_heads == report.num_key_value_heads == kv_heads
        assert report.original_num_key_value_heads == trained.num_kv_heads
        assert report.kv_width == attention.kv_width == trained.kv_width // 2
        assert report.original_kv_width == trained.kv_width
        assert report.method == methods_for(method, trained)[0].name
        assert report.parameters == sum(t.numel() for t in tensors_of(attention))
        assert report.original_parameters == sum(t.numel() for t in tensors_of(trained))
        assert 0 < report.measured_error < 2
        assert 0 < report.predicted_error < 2
    converted = joined(decoder, layers)
    held_out = tokens[14:]
    assert layers[-1].report.residual_error == pytest.approx(
        residual_error(decoder, converted, held_out), rel=1e-9
    )
    divergence = conversion.divergence()
    assert divergence.tokens == held_out[:, 1:].numel()
    original, compressed = (
        reference.forward(model, held_out).log_softmax(-1) for model in (decoder, converted)
    )
    kl = (original.exp() * (original - compressed)).sum(-1)[:, :-1].mean()
    assert divergence.mean_kl == pytest.approx(float(kl), rel=1e-4)
    assert divergence.mean_kl > 0


@pytest.mark.parametrize("style", ["llama", "bloom", "qwen3"])
def test_measured_error_is_that_of_the_attention_alone(style: str) -> None:
    """Recomputed with plain forward passes: trained inputs, held-out windows, before the refit."""
    decoder = make_decoder(style, layers=2)
    tokens = random_windows(decoder, 8, 16)
    for each in plain(decoder, tokens, 2, "svd-a"):  # has no refit
        taps: list[reference.LayerTaps] = []
        reference.forward(decoder, tokens[7:], taps=taps)
        target = taps[each.index].attention
        x = (
            reference.embed(decoder.embedding, tokens[7:])
            if each.index == 0
            else taps[each.index - 1].residual
        )
        output = reference.run_layer(each.layer, x, torch.arange(16)[None]).attention
        error = (output - target).norm() / (target - target.mean((0, 1))).norm()
        assert each.report.measured_error == pytest.approx(float(error), rel=1e-9)


def test_keeping_all_kv_heads_changes_nothing() -> None:
    decoder = make_decoder("gqa", dtype=torch.float32)
    conversion = plain(decoder, random_windows(decoder, 9, 16), 2, "online")
    for each, trained in zip(conversion, decoder.layers, strict=True):
        assert each.layer is trained
        report = each.report
        assert report.method == "none"
        assert (report.predicted_error, report.measured_error, report.residual_error) == (0.0, 0.0, 0.0)
        assert report.kv_width == report.original_kv_width
        assert report.parameters == report.original_parameters
    assert conversion.divergence().mean_kl < 1e-9


def test_unconverted_layers_are_those_of_the_decoder() -> None:
    decoder = make_decoder("gqa")
    layers = list(unconverted_layers(decoder))
    assert all(each.layer is trained for each, trained in zip(layers, decoder.layers, strict=True))
    assert [each.index for each in layers] == [0, 1]
    assert {each.report.method for each in layers} == {"none"}


# Errors of earlier layers, and the refit


def test_refit_of_a_layer_compensates_errors_of_earlier_layers() -> None:
    """After a lossy first layer W_O of the second differs from that of the second converted alone; else it
    does not.
    """
    from test_key_codes import complex_multiples

    lossy = make_decoder("llama", layers=2, sharpness=2.0, hidden=64, heads=8)
    exact_first = dataclasses.replace(lossy.layers[0], attention=complex_multiples(lossy.layers[0].attention))
    lossless = dataclasses.replace(lossy, layers=[exact_first, lossy.layers[1]])
    tokens, fresh = random_windows(lossy, 64, 32), random_windows(lossy, 16, 32, seed=99)
    changes = []
    for decoder in (lossy, lossless):
        layers = list(plain(decoder, tokens, 4, "fold"))
        streams = Streams(decoder, tokens)
        with torch.no_grad():  # the second layer alone: the first is the trained one in both streams
            streams.attend(decoder.layers[0])
            streams.advance_both(decoder.layers[0], decoder.layers[0])
            moments, attention = streams.measure(decoder.layers[1]), decoder.layers[1].attention
            code_moments = make_code_moments(True, moments, attention, 32)
            layer_plan = LayerPlan(methods_for("fold", attention)[0], KVShape(4, 8, 8))
            alone = pipeline.convert_layer(decoder.layers[1], streams, code_moments, layer_plan)[0]
        together = layers[1].layer
        # both take the trained model's moments
        assert torch.equal(together.attention.k.weight, alone.attention.k.weight)
        changes.append(
            float(
                (together.attention.o.weight - alone.attention.o.weight).norm()
                / alone.attention.o.weight.norm()
            )
        )
        if decoder is lossy:
            apart = dataclasses.replace(decoder, layers=[layers[0].layer, alone])
            assert residual_error(decoder, joined(decoder, layers), fresh) < residual_error(
                decoder, apart, fresh
            )
    assert changes[0] > 0.01
    assert changes[1] < 1e-4


def test_refit_reduces_the_residual_error() -> None:
    decoder = make_decoder("llama", layers=2, sharpness=2.0)
    tokens, fresh = random_windows(decoder, 64, 32), random_windows(decoder, 16, 32, seed=99)
    fitted = joined(decoder, list(plain(decoder, tokens, 2, "online")))
    without_refit = dataclasses.replace(METHODS["online"], refit=False)
    unfitted = joined(
        decoder, list(convert(decoder, tokens, [LayerPlan(without_refit, KVShape(2, 8, 8))] * 2))
    )
    assert residual_error(decoder, fitted, fresh) < 0.97 * residual_error(decoder, unfitted, fresh)


# Saved moments, seeds, batches


@pytest.mark.parametrize("style", ["llama", "gqa", "bloom", "qwen3"])
@pytest.mark.parametrize("small", [False, True])
def test_saved_statistics_give_bit_identical_weights(
    style: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:  # blocks of rows and several batches
        monkeypatch.setattr(windows, "SCORES", 400)
        monkeypatch.setattr(windows, "TOKENS", 3 * 24)
    decoder = make_decoder(style, dtype=torch.float32)
    tokens, kv_heads = random_windows(decoder, 9, 24), decoder.layers[0].attention.num_kv_heads // 2
    writer = StatisticsWriter(tmp_path, StatisticsSource("digest", "model", recipe_for("random"), 24))
    writer.save_tokens(tokens)
    for index, moments in enumerate(measure_moments(decoder, tokens)):
        writer.save_moments(index, moments)
        writer.save_sensitivity(index, {"scale": torch.zeros(1)})
    writer.finish()
    saved = Statistics(tmp_path, "digest", decoder)
    direct = list(plain(decoder, tokens, kv_heads, "online"))
    restored = list(plain(decoder, saved.windows, kv_heads, "online", saved.moments))
    for a, b in zip(direct, restored, strict=True):
        assert equal_tensors(a.layer, b.layer)
        assert a.report == b.report


def test_measure_moments_yields_those_of_the_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder("gqa")
    tokens, used = random_windows(decoder, 9, 12), []
    original = Streams.measure
    monkeypatch.setattr(
        Streams,
        "measure",
        lambda self, layer, **options: used.append(original(self, layer, **options)) or used[-1],
    )
    list(plain(decoder, tokens, 1, "online"))
    for moments, expected in zip(measure_moments(decoder, tokens), used, strict=True):
        assert equal_tensors(moments, expected)
        assert int(moments.tokens) == 8 * 12  # the last eighth is held out


def test_conversion_is_deterministic() -> None:
    decoder = make_decoder("llama", dtype=torch.float32)
    tokens = random_windows(decoder, 10, 16)
    first, second = (list(plain(decoder, tokens, 2, "online")) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert equal_tensors(a.layer, b.layer)
        assert a.report == b.report


@pytest.mark.parametrize("style", STYLES)
def test_conversion_does_not_depend_on_batching(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = make_decoder(style)
    tokens, kv_heads = random_windows(decoder, 10, 16), decoder.layers[0].attention.num_kv_heads // 2
    whole = list(plain(decoder, tokens, kv_heads, "online"))
    monkeypatch.setattr(windows, "SCORES", 3 * 4 * 16)
    monkeypatch.setattr(windows, "TOKENS", 3 * 16)
    in_blocks = list(plain(decoder, tokens, kv_heads, "online"))
    for a, b in zip(whole, in_blocks, strict=True):
        assert b.report.residual_error == pytest.approx(a.report.residual_error, rel=1e-6)
        assert b.report.predicted_error == pytest.approx(a.report.predicted_error, rel=1e-9)
        torch.testing.assert_close(
            b.layer.attention.o.weight, a.layer.attention.o.weight, rtol=1e-6, atol=1e-8
        )


# Few tokens, zero weights, and numbers that are not finite


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("method", ["online", "fold", "svd-a"])
@pytest.mark.parametrize(("count", "length"), [(1, 2), (2, 8)])
def test_converts_with_very_few_tokens(style: str, method: str, count: int, length: int) -> None:
    if (style, method) == ("qwen3", "fold"):
        return
    decoder = make_decoder(style, dtype=torch.float32)
    tokens, kv_heads = random_windows(decoder, count, length), decoder.layers[0].attention.num_kv_heads // 2
    conversion = plain(decoder, tokens, kv_heads, method)
    layers = list(conversion)
    for each in layers:
        assert all(bool(t.isfinite().all()) for t in tensors_of(each.layer))
        assert max(float(t.abs().max()) for t in tensors_of(each.layer.attention)) < 1e3
        report = each.report
        assert (
            torch.tensor([report.predicted_error, report.measured_error, report.residual_error])
            .isfinite()
            .all()
        )
    assert torch.tensor(conversion.divergence().mean_kl).isfinite()
    fresh = reference.forward(joined(decoder, layers), random_windows(decoder, 4, 30, seed=5))
    assert bool(fresh.isfinite().all())


@pytest.mark.parametrize("style", ["llama", "bias", "bloom"])
def test_converts_with_one_repeated_token(style: str) -> None:
    """All values are equal, so all covariances are zero."""
    decoder = make_decoder(style, dtype=torch.float32)
    for each in plain(decoder, torch.full((4, 8), 7), 2, "online"):
        assert all(bool(t.isfinite().all()) for t in tensors_of(each.layer))


@pytest.mark.parametrize("part", ["q", "k", "v", "o"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_converts_heads_with_zero_weights(method: str, part: str) -> None:
    """W_Q, W_K, W_V or W_O of the first two of four heads is zero."""
    decoder = make_decoder("llama", dtype=torch.float32)

    def without_part(attention: Attention) -> Attention:
        weight = getattr(attention, part).weight.clone()
        weight[:, :16].zero_() if part == "o" else weight[:16].zero_()
        return dataclasses.replace(attention, **{part: Linear(weight)})

    for each in plain(with_attention(decoder, without_part), random_windows(decoder, 4, 12), 2, method):
        assert all(bool(t.isfinite().all()) for t in tensors_of(each.layer))
        assert each.report.predicted_error < 3


def test_overflow_error_names_the_layer() -> None:
    decoder = make_decoder("llama", layers=3, dtype=torch.float32)
    big = dataclasses.replace(
        decoder.layers[1].attention, v=Linear(decoder.layers[1].attention.v.weight * 1e38)
    )
    layers = [decoder.layers[0], dataclasses.replace(decoder.layers[1], attention=big), decoder.layers[2]]
    broken = dataclasses.replace(decoder, layers=layers)
    tokens = random_windows(decoder, 4, 12)
    conversion = plain(broken, tokens, 2, "online")
    assert next(conversion).index == 0
    with pytest.raises(KvexportError, match=r"calibration moments of layer 1 must be finite"):
        next(conversion)
    with pytest.raises(KvexportError, match="calibration moments of layer 1"):
        list(measure_moments(broken, tokens))


def test_error_for_damaged_moments_names_the_layer() -> None:
    decoder = make_decoder("llama")
    tokens = random_windows(decoder, 4, 12)
    moments = list(measure_moments(decoder, tokens))
    moments[1].key_second[0, 0] = torch.nan
    conversion = plain(decoder, tokens, 2, "online", moments.__getitem__)
    next(conversion)
    with pytest.raises(KvexportError, match="calibration moments of layer 1"):
        next(conversion)


# Memory


def count_live_layers(decoder: Decoder) -> tuple[Decoder, list[int]]:
    """The decoder with lazily loaded layers, and the number of layers alive whenever one is loaded."""
    loaded: list[weakref.ref[Tensor]] = []
    counts: list[int] = []

    def read(index: int) -> Layer:
        gc.collect()
        counts.append(sum(each() is not None for each in loaded))
        layer = decoder.layers[index]
        up = Linear(
            layer.mlp.up.weight.clone()
        )  # a tensor that the converted layer shares with the trained one
        loaded.append(weakref.ref(up.weight))
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, up=up))

    return dataclasses.replace(decoder, layers=LazyLayers(len(decoder.layers), read)), counts


@pytest.mark.slow
@pytest.mark.parametrize("what", ["convert", "keep", "measure", "unconverted"])
def test_one_layer_is_alive_at_a_time(what: str) -> None:
    decoder = make_decoder("llama", layers=4)
    lazy, counts = count_live_layers(decoder)
    tokens = random_windows(decoder, 4, 8)
    if what == "measure":
        items = map(_forget, measure_moments(lazy, tokens))
    elif what == "unconverted":
        items = map(_forget, unconverted_layers(lazy))
    else:
        layer_plan = LayerPlan(
            methods_for("online", decoder.layers[0].attention)[0],
            KVShape(2 if what == "convert" else 4, 8, 8),
        )
        items = map(_forget, convert(lazy, tokens, [layer_plan] * 4))
    assert list(items) == [None] * 4
    assert counts == [0, 0, 0, 0]


def _forget(item: ConvertedLayer | Moments) -> None:
    """Consume without keeping a reference."""


def test_two_streams_and_one_attention_output_are_kept_between_layers() -> None:
    """Three tensors [N, S, hidden]; nothing else of their size or larger."""
    decoder = make_decoder("llama", dtype=torch.float32)
    tokens = random_windows(decoder, 16, 32)
    size = tokens.numel() * decoder.dims.hidden_size

    def large_tensors() -> int:
        gc.collect()
        return sum(type(each) is Tensor and each.numel() >= size for each in gc.get_objects())

    before, conversion = large_tensors(), plain(decoder, tokens, 2, "online")
    next(conversion)
    assert large_tensors() - before == 3


def test_last_eighth_is_held_out_and_a_single_window_serves_both() -> None:
    decoder = make_decoder("llama", layers=1)
    for count, train, held_out in (
        (1, [0], [0]),
        (2, [0], [1]),
        (8, list(range(7)), [7]),
        (17, list(range(15)), [15, 16]),
    ):
        streams = Streams(decoder, random_windows(decoder, count, 4))
        assert list(streams.train) == train
        assert list(streams.held_out) == held_out
        assert int(streams.measure(decoder.layers[0]).tokens) == 4 * len(train)


@torch.no_grad()
def test_the_attention_of_a_refitted_layer_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head outputs of the refit advance the converted stream as the refitted layer itself does."""
    decoder = make_decoder("llama", layers=1)
    tokens, layer, runs = random_windows(decoder, 9, 12), decoder.layers[0], []
    attention = dataclasses.replace(
        layer.attention, v=Linear(0.5 * layer.attention.v.weight), o=layer.attention.o
    )
    converted = dataclasses.replace(layer, attention=attention)
    streams = Streams(decoder, tokens)
    streams.attend(layer)
    refitted = dataclasses.replace(
        converted, attention=dataclasses.replace(attention, o=streams.refit(converted))
    )
    assert not torch.equal(refitted.attention.o.weight, attention.o.weight)
    head_outputs = windows.head_outputs
    monkeypatch.setattr(windows, "head_outputs", lambda *given: runs.append(1) or head_outputs(*given))
    streams.advance_both(layer, refitted)
    assert not runs
    expected = reference.embed(decoder.embedding, tokens)
    windows.advance(refitted, expected)
    found = torch.cat([pair[1] for pair in streams.held_out_pairs(tokens)])
    torch.testing.assert_close(found, expected[-1:], rtol=1e-12, atol=1e-12)
