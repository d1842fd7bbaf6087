"""Healing: nearer to the original's logits by attention weights alone, and never farther than what was given."""

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
from kvexport.model.decoder import Decoder, LazyLayers, tensors_of
from kvexport.progress import Progress

FROZEN = ("attention_norm", "mlp_norm", "mlp")


def same(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors_of(a), tensors_of(b), strict=True))


def shapes(decoder: Decoder) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for layer in decoder.layers for tensor in tensors_of(layer)]


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_attention_alone_is_trained_and_comes_nearer_to_the_original(style: str) -> None:
    job = Job(style)
    fresh = random_windows(job.original, 8, 12, seed=21)
    given = [tensor.clone() for layer in job.converted.layers for tensor in tensors_of(layer)]
    healed = job.heal()
    assert mean_kl(job.original, healed.decoder, fresh) < 0.7 * mean_kl(job.original, job.converted, fresh)
    assert shapes(healed.decoder) == shapes(job.converted)
    for before, after in zip(job.converted.layers, healed.decoder.layers, strict=True):
        assert all(same(getattr(before, part), getattr(after, part)) for part in FROZEN)
        norms = (after.attention.q_norm, after.attention.k_norm, after.attention.alibi_slopes)
        assert same(norms, (before.attention.q_norm, before.attention.k_norm, before.attention.alibi_slopes))
        assert not any(
            same(getattr(before.attention, name), getattr(after.attention, name)) for name in "qkvo"
        )
    for part in ("embedding", "final_norm", "head"):
        assert getattr(healed.decoder, part) is getattr(job.converted, part)
    kept = [tensor for layer in job.converted.layers for tensor in tensors_of(layer)]
    assert all(
        torch.equal(a, b) for a, b in zip(given, kept, strict=True)
    )  # the caller's own are not touched


@pytest.mark.slow
@pytest.mark.parametrize("style", ["llama", "qwen3", "bias"])
def test_maps_are_trained_too(style: str) -> None:
    job = Job(style)
    job.converted = with_attention(job.original, mapped)
    healed = job.heal(60)
    assert healed.report.kl_after < 0.7 * healed.report.kl_before
    for before, after in zip(job.converted.layers, healed.decoder.layers, strict=True):
        assert after.attention.kv_width == before.attention.kv_width
        for name in ("key_map", "query_map", "value_map"):
            was, now = getattr(before.attention, name), getattr(after.attention, name)
            assert was.shape == now.shape and not torch.equal(was, now)
    assert shapes(healed.decoder) == shapes(job.converted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_its_rounding_counted(dtype: torch.dtype) -> None:
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
def test_the_given_decoder_comes_back_if_nothing_is_better(learning_rate: float) -> None:
    job = Job()
    healed = job.heal(learning_rate=learning_rate)
    assert healed.decoder is job.converted
    report = healed.report
    assert (report.best_step, report.kl_after) == (0, report.kl_before)
    assert report.steps < 40  # it stopped early
    json.loads(json.dumps(report.to_json(), allow_nan=False))


def test_what_cannot_be_improved_comes_back() -> None:
    job = Job()
    job.converted = job.original
    healed = job.heal(12)
    assert healed.decoder is job.original and healed.report.kl_before == pytest.approx(0, abs=1e-7)


def test_rounding_that_undoes_the_gain_gives_back_the_given_decoder() -> None:
    """The original itself in float16 but for one weight: steps in float32 are lost when they are rounded."""
    job = Job(dtype=torch.float16)
    healed = job.heal(20, learning_rate=1e-7)
    assert healed.decoder is job.converted and healed.report.best_step == 0


def test_the_report_says_what_was_done() -> None:
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
    said = json.loads(json.dumps(report.to_json()))
    assert set(said) == {field.name for field in fields(report)} and said["curve"][0] == [0, report.kl_before]


def test_layers_alone_already_lower_the_loss() -> None:
    curve = dict(Job().heal(40).report.curve)
    assert curve[32] < 0.8 * curve[0]


def test_logits_alone_lower_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvexport.heal.distil._LAYERWISE", 0.0)
    monkeypatch.setattr("kvexport.heal.distil._END_TO_END", 1.0)
    report = Job().heal(40).report
    assert report.kl_after < 0.7 * report.kl_before and report.steps == 40


@pytest.mark.parametrize("logits_at_once", [1 << 23, 40 * 5])
def test_the_gradient_is_that_of_the_kl_by_the_book(
    monkeypatch: pytest.MonkeyPatch, logits_at_once: int
) -> None:
    monkeypatch.setattr("kvexport.heal.loss._LOGITS", logits_at_once)
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


def test_layers_that_are_read_when_asked_for_heal_as_well() -> None:
    job = Job()
    expected = job.heal(12)
    for name in ("original", "converted"):
        decoder = getattr(job, name)
        setattr(job, name, replace(decoder, layers=LazyLayers(2, decoder.layers.__getitem__)))
    found = job.heal(12)
    assert all(same(a, b) for a, b in zip(found.decoder.layers, expected.decoder.layers, strict=True))


def test_memory_bounds_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(dtype=torch.float64)
    whole = job.heal(4).decoder
    monkeypatch.setattr("kvexport.heal.loss._TOKENS", 12)  # one window at a time
    monkeypatch.setattr("kvexport.heal.loss._LOGITS", 40 * 5)  # five positions at a time
    pieces = job.heal(4).decoder
    for a, b in zip(whole.layers, pieces.layers, strict=True):
        for x, y in zip(tensors_of(a.attention), tensors_of(b.attention), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_a_scaled_gauge_heals_as_well() -> None:
    """Keys made 100 times smaller and queries as much larger are the same model; healing must not notice."""
    job = Job()
    expected = job.heal(20).report.curve

    def scaled(attention):  # type: ignore[no-untyped-def]
        q, k = attention.q, attention.k
        return replace(attention, q=replace(q, weight=q.weight * 128), k=replace(k, weight=k.weight / 128))

    job.converted = with_attention(job.converted, scaled)
    found = job.heal(20).report.curve
    assert [kl for _, kl in found] == pytest.approx([kl for _, kl in expected], rel=0.02)


def test_progress_is_told_of_every_step() -> None:
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
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="of healing cannot be used"):
        HealOptions(**wrong)  # type: ignore[arg-type]


def test_no_windows_are_refused() -> None:
    decoder = make_decoder()
    some, none = random_windows(decoder, 2, 8), torch.zeros(0, 8, dtype=torch.int64)
    for windows, held_out in ((none, some), (some, none)):
        with pytest.raises(UsageError, match="there are no windows"):
            heal(decoder, decoder, windows, held_out, HealOptions(1), Progress())


def test_one_step_of_one_window_is_enough_to_run() -> None:
    job = Job()
    job.windows = job.windows[:1]
    assert job.heal(1).report.steps == 1
