"""Healing reduces the KL to the original by attention weights alone, and never increases it."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from support.decoders import STYLES, make_decoder, random_windows, with_attention
from support.healing import Job, mapped, mean_kl

from kvexport.errors import UsageError
from kvexport.heal import HealOptions, heal
from kvexport.heal.loss import kl_gradient, kl_sum
from kvexport.heal.student import in_dtype
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, LazyLayers, Linear, tensors_of
from kvexport.progress import Progress

FROZEN = ("attention_norm", "mlp_norm", "mlp")


def equal_tensors(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def shapes(decoder: Decoder) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for layer in decoder.layers for tensor in tensors_of(layer)]


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_trains_attention_alone_and_reduces_the_kl(style: str) -> None:
    job = Job(style)
    fresh = random_windows(job.original, 8, 12, seed=21)
    given = [tensor.clone() for layer in job.converted.layers for tensor in tensors_of(layer)]
    healed = job.heal()
    assert mean_kl(job.original, healed.decoder, fresh) < 0.7 * mean_kl(job.original, job.converted, fresh)
    assert shapes(healed.decoder) == shapes(job.converted)
    for before, after in zip(job.converted.layers, healed.decoder.layers, strict=True):
        assert all(equal_tensors(getattr(before, part), getattr(after, part)) for part in FROZEN)
        norms = (after.attention.q_norm, after.attention.k_norm, after.attention.alibi_slopes)
        assert equal_tensors(
            norms, (before.attention.q_norm, before.attention.k_norm, before.attention.alibi_slopes)
        )
        assert not any(
            equal_tensors(getattr(before.attention, name), getattr(after.attention, name)) for name in "qkvo"
        )
    for part in ("embedding", "final_norm", "head"):
        assert getattr(healed.decoder, part) is getattr(job.converted, part)
    kept = [tensor for layer in job.converted.layers for tensor in tensors_of(layer)]
    # the caller's tensors are unchanged
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("style", ["llama", "qwen3", "bias"])
def test_trains_maps_too(style: str) -> None:
    job = Job(style)
    job.converted = with_attention(job.original, mapped)
    healed = job.heal(60)
    assert healed.report.kl_after < 0.7 * healed.report.kl_before
    for before, after in zip(job.converted.layers, healed.decoder.layers, strict=True):
        assert after.attention.kv_width == before.attention.kv_width
        for name in ("key_map", "query_map", "value_map"):
            old, new = getattr(before.attention, name), getattr(after.attention, name)
            assert old.shape == new.shape and not torch.equal(old, new)
    assert shapes(healed.decoder) == shapes(job.converted)


@pytest.mark.slow
def test_trains_encoders_of_clipped_values() -> None:
    job = Job()
    job.original = with_attention(job.original, lambda attention: replace(attention, clip=1.5))
    job.converted = with_attention(job.original, mapped)
    healed = job.heal(60)
    assert healed.report.kl_after < 0.7 * healed.report.kl_before
    for before, after in zip(job.converted.layers, healed.decoder.layers, strict=True):
        for name in ("key_map", "query_map", "value_encoder", "value_map"):
            old, new = getattr(before.attention, name), getattr(after.attention, name)
            assert old.shape == new.shape and not torch.equal(old, new)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_keeps_the_dtype_and_measures_after_rounding(dtype: torch.dtype) -> None:
    job = Job(dtype=dtype)
    healed = job.heal()
    assert shapes(healed.decoder) == shapes(job.converted)
    wide = [as_double(each) for each in (job.original, healed.decoder)]
    assert healed.report.kl_after == pytest.approx(mean_kl(wide[0], wide[1], job.held_out), rel=1e-4)
    assert healed.report.kl_after < healed.report.kl_before


def as_double(decoder: Decoder) -> Decoder:
    layers = [in_dtype(layer, torch.float64) for layer in decoder.layers]
    return replace(in_dtype(replace(decoder, layers=[]), torch.float64), layers=layers)


@pytest.mark.parametrize("learning_rate", [30.0, 1e30])
def test_returns_the_given_decoder_if_nothing_is_better(learning_rate: float) -> None:
    job = Job()
    healed = job.heal(learning_rate=learning_rate)
    assert healed.decoder is job.converted
    report = healed.report
    assert (report.best_step, report.kl_after) == (0, report.kl_before)
    assert report.steps < 40  # it stopped early
    json.loads(json.dumps(report.to_json(), allow_nan=False))


def test_returns_the_original_unchanged() -> None:
    job = Job()
    job.converted = job.original
    healed = job.heal(12)
    assert healed.decoder is job.original and healed.report.kl_before == pytest.approx(0, abs=1e-7)


def test_returns_the_given_decoder_if_rounding_undoes_the_gain() -> None:
    """Steps that gain in float32 and are too small to change any weight in float16.

    All weights are at least 1/8, where float16 has steps of 2^-13: 20 steps of 1e-5 relative to an RMS below
    1 never reach half of that, so the result does not depend on how a processor rounds.
    """
    job = Job(dtype=torch.float16)

    def enlarged(linear: Linear) -> Linear:
        weight = linear.weight
        return replace(
            linear, weight=torch.where(weight < 0, -1, 1).to(weight) * weight.abs().clamp_min(0.125)
        )

    def change(attention: Attention) -> Attention:
        return replace(attention, **{name: enlarged(getattr(attention, name)) for name in "qkvo"})

    job.converted = with_attention(job.converted, change)
    healed = job.heal(20, learning_rate=1e-5)
    assert min(kl for _, kl in healed.report.curve) < healed.report.kl_before
    assert healed.decoder is job.converted and healed.report.best_step == 0


def test_report_describes_the_run() -> None:
    job = Job()
    healed = job.heal(40)
    report, attention = healed.report, job.original.layers[0].attention
    each = sum(
        tensor.numel()
        for linear in (attention.q, attention.k, attention.v, attention.o)
        for tensor in tensors_of(linear)
    )
    assert report.trained_numbers == len(job.original.layers) * each
    assert report.steps == 40 and report.seconds > 0
    steps = [step for step, _ in report.curve]
    assert steps[:2] == [0, 32] and steps[-1] == 40 and steps == sorted(set(steps))
    assert (
        report.curve[0][1]
        == report.kl_before
        == pytest.approx(mean_kl(job.original, job.converted, job.held_out), rel=1e-4)
    )
    assert dict(report.curve)[report.best_step] == report.kl_after == min(kl for _, kl in report.curve)
    assert report.kl_after == pytest.approx(mean_kl(job.original, healed.decoder, job.held_out), rel=1e-4)
    raw = json.loads(json.dumps(report.to_json()))
    assert set(raw) == {field.name for field in fields(report)} and raw["curve"][0] == [0, report.kl_before]


def test_the_first_phase_alone_reduces_the_kl() -> None:
    curve = dict(Job().heal(40).report.curve)
    assert curve[32] < 0.8 * curve[0]


def test_the_second_phase_alone_reduces_the_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvexport.heal.distil.LAYERWISE_SHARE", 0.0)
    monkeypatch.setattr("kvexport.heal.distil.END_TO_END_RATE", 1.0)
    report = Job().heal(40).report
    assert report.kl_after < 0.7 * report.kl_before and report.steps == 40


@pytest.mark.parametrize("logits_at_once", [1 << 23, 40 * 5])
def test_gradient_equals_that_of_the_textbook_kl(
    monkeypatch: pytest.MonkeyPatch, logits_at_once: int
) -> None:
    monkeypatch.setattr("kvexport.heal.loss.LOGITS", logits_at_once)
    decoder = make_decoder("bloom")
    teacher, student = torch.randn(
        2, 3, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    leaf = student.clone().requires_grad_()
    p, q = (reference.logits(decoder, x).softmax(-1) for x in (teacher, leaf))
    expected = (p * (p / q).log()).sum()
    expected.backward()
    torch.testing.assert_close(kl_gradient(decoder, teacher, student), leaf.grad)
    assert kl_sum(decoder, teacher, student) == pytest.approx(expected.item())


def test_heals_lazily_loaded_layers() -> None:
    job = Job()
    expected = job.heal(12)
    for name in ("original", "converted"):
        decoder = getattr(job, name)
        setattr(job, name, replace(decoder, layers=LazyLayers(2, decoder.layers.__getitem__)))
    lazy = job.heal(12)
    assert all(equal_tensors(a, b) for a, b in zip(lazy.decoder.layers, expected.decoder.layers, strict=True))


def test_memory_bounds_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(dtype=torch.float64)
    whole = job.heal(4).decoder
    monkeypatch.setattr("kvexport.heal.loss.TOKENS", 12)  # one window at a time
    monkeypatch.setattr("kvexport.heal.loss.LOGITS", 40 * 5)  # five positions at a time
    pieces = job.heal(4).decoder
    for a, b in zip(whole.layers, pieces.layers, strict=True):
        for x, y in zip(tensors_of(a.attention), tensors_of(b.attention), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_healing_does_not_depend_on_the_scale_of_keys_and_queries() -> None:
    """Keys divided and queries multiplied by 128 are the same model."""
    job = Job()
    expected = job.heal(20).report.curve

    def scaled_parameters(attention):  # type: ignore[no-untyped-def]
        q, k = attention.q, attention.k
        return replace(attention, q=replace(q, weight=q.weight * 128), k=replace(k, weight=k.weight / 128))

    job.converted = with_attention(job.converted, scaled_parameters)
    curve = job.heal(20).report.curve
    assert [kl for _, kl in curve] == pytest.approx([kl for _, kl in expected], rel=0.02)


def test_progress_advances_at_every_step() -> None:
    class Counted(Progress):
        def __init__(self) -> None:
            self.promised, self.done, self.notes = 0, 0, []

        def stage(self, name: str, steps: int):  # type: ignore[no-untyped-def]
            self.promised += steps
            return super().stage(name, steps)

        def advance(self) -> None:
            self.done += 1

        def note(self, text: str) -> None:
            self.notes.append(text)

    progress = Counted()
    Job().heal(20, progress=progress)
    assert progress.promised == progress.done == 2 * 16 + 4
    assert len(progress.notes) == 1 and "held-out KL" in progress.notes[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 5, "lora_rank": 0},
        {"steps": 5, "batch": 0},
        {"steps": 5, "learning_rate": 0.0},
        {"steps": 5, "learning_rate": math.nan},
    ],
)
def test_rejects_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="of healing must be"):
        HealOptions(**wrong)  # type: ignore[arg-type]


def test_rejects_missing_windows() -> None:
    decoder = make_decoder()
    some, none = random_windows(decoder, 2, 8), torch.zeros(0, 8, dtype=torch.int64)
    for windows, held_out in ((none, some), (some, none)):
        with pytest.raises(UsageError, match=r"healing needs (training|held-out) windows"):
            heal(decoder, decoder, windows, held_out, HealOptions(1), Progress())


def test_runs_with_one_step_and_one_window() -> None:
    job = Job()
    job.windows = job.windows[:1]
    assert job.heal(1).report.steps == 1
