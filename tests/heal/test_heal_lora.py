"""Adapters of low rank: fewer numbers trained, merged into weights of the same shape, and a plain word
without peft.
"""

from __future__ import annotations

import sys

import pytest
import torch
from support.decoders import STYLES, random_windows, with_attention
from support.healing import Job, disturbed, mapped, mean_kl

from kvexport.errors import CannotRunHere
from kvexport.model.decoder import tensors_of

RANK = 2


def test_error_without_peft_names_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    Job().heal(2)  # the whole weights need none
    with pytest.raises(CannotRunHere, match="peft") as refused:
        Job().heal(2, lora_rank=RANK)
    assert "pip install 'kvexport[heal]'" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_adapters_reduce_the_kl(style: str) -> None:
    pytest.importorskip("peft")
    job = Job(style)
    job.converted = disturbed(job.original, rank=RANK)
    fresh = random_windows(job.original, 8, 12, seed=21)
    healed = job.heal(60, lora_rank=2 * RANK)
    assert mean_kl(job.original, healed.decoder, fresh) < 0.8 * mean_kl(job.original, job.converted, fresh)
    assert healed.report.kl_after == pytest.approx(
        mean_kl(job.original, healed.decoder, job.held_out), rel=1e-4
    )


def test_change_of_weights_has_the_rank_of_the_adapters() -> None:
    pytest.importorskip("peft")
    job = Job("bias")
    job.converted = with_attention(job.original, mapped)
    healed = job.heal(20, lora_rank=RANK)
    trained = 0
    for before, after in zip(job.converted.layers, healed.decoder.layers, strict=True):
        assert [t.shape for t in tensors_of(after)] == [t.shape for t in tensors_of(before)]
        for name in "qkvo":
            was, now = getattr(before.attention, name), getattr(after.attention, name)
            change = (now.weight - was.weight).double()
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == RANK
            trained += RANK * sum(was.weight.shape) + (0 if was.bias is None else was.bias.numel())
            if was.bias is not None:
                assert not torch.equal(was.bias, now.bias)
        for name in ("key_map", "query_map", "value_map"):
            was, now = getattr(before.attention, name), getattr(after.attention, name)
            assert not torch.equal(was, now)
            trained += was.numel()
    assert healed.report.trained_numbers == trained


def test_first_step_starts_from_the_given_weights() -> None:
    """B is zero at first, so that untrained adapters change nothing."""
    pytest.importorskip("peft")
    job = Job()
    assert job.heal(2, lora_rank=RANK).report.kl_before == job.heal(2).report.kl_before


def test_returns_the_given_decoder_at_an_absurd_rate() -> None:
    pytest.importorskip("peft")
    job = Job()
    assert job.heal(learning_rate=1e3, lora_rank=RANK).decoder is job.converted


def test_adapters_do_not_use_the_global_generator() -> None:
    pytest.importorskip("peft")
    before = torch.get_rng_state()
    Job().heal(2, lora_rank=RANK)
    assert torch.equal(torch.get_rng_state(), before)
