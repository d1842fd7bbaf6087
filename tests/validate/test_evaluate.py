"""`kvexport.validate.evaluate` against a direct computation, and its errors."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_bundles import byte_level_tokenizer, write_bundle

from kvexport.calibrate.text import tokenize
from kvexport.errors import BundleError, UsageError
from kvexport.model import reference
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Decoder, Layer, Linear
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.validate.evaluate import Evaluation, evaluate, residual_stream, spread

TEXT = "Once upon a time there was a small café where naïve people smiled, and then there was not. " * 6
VOCAB = 300


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=VOCAB, num_key_value_heads=4), folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer(VOCAB), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def _damaged(decoder: Decoder) -> Decoder:
    def weaker(layer: Layer) -> Layer:
        o = Linear(0.7 * layer.attention.o.weight)
        return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, o=o))

    return dataclasses.replace(decoder, layers=[weaker(layer) for layer in decoder.layers])


def _evaluated(
    decoder: Decoder, path: Path, checkpoint: Path, text: Path, dtype: str = "float32", **options: int
) -> Evaluation:
    return evaluate(
        write_bundle(path, decoder, dtype=dtype), checkpoint, text, Progress(), **{"length": 24, **options}
    )


def test_the_default_length_follows_the_capacity(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", load_decoder(Checkpoint(checkpoint)), capacity=40)
    by_default = evaluate(bundle, checkpoint, text, Progress())
    assert by_default == evaluate(bundle, checkpoint, text, Progress(), length=40)
    with pytest.raises(UsageError, match="must not exceed the bundle's capacity"):
        evaluate(bundle, checkpoint, text, Progress(), length=41)


def test_an_identical_model_has_no_divergence(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    found = _evaluated(load_decoder(Checkpoint(checkpoint)), tmp_path / "bundle", checkpoint, text)
    assert found.divergence.mean_kl < 1e-7 and found.divergence.top1_agreement == 1
    assert found.divergence.cross_entropy == pytest.approx(found.divergence.cross_entropy_original, abs=1e-6)
    assert found.kv_bytes_per_token == found.kv_bytes_per_token_original == 2 * 2 * 4 * 8 * 4


def test_the_divergence_equals_a_direct_computation(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    trained = load_decoder(Checkpoint(checkpoint))
    damaged = _damaged(trained)
    found = _evaluated(damaged, tmp_path / "bundle", checkpoint, text).divergence
    ids = tokenize(checkpoint, TEXT)
    windows = torch.tensor(ids[: len(ids) // 24 * 24]).view(-1, 24)
    p, q = (
        reference.forward(model, windows)[:, :-1].double().log_softmax(-1) for model in (trained, damaged)
    )
    targets = windows[:, 1:, None]
    assert found.mean_kl > 1e-3
    assert found.mean_kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.cross_entropy == pytest.approx(-float(q.gather(-1, targets).mean()), rel=1e-5)
    assert found.cross_entropy_original == pytest.approx(-float(p.gather(-1, targets).mean()), rel=1e-5)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.top1_agreement < 1
    assert found.tokens == targets.numel()


def test_kv_bytes_are_in_the_dtype_of_the_bundle(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    found = _evaluated(
        load_decoder(Checkpoint(checkpoint)),
        tmp_path / "bundle",
        checkpoint,
        text,
        dtype="float16",
        samples=2,
    )
    assert found.kv_bytes_per_token == found.kv_bytes_per_token_original == 2 * 2 * 4 * 8 * 2
    assert 0 < found.divergence.mean_kl < 1e-4
    assert found.divergence.tokens == 2 * 23


def test_the_residual_stream_equals_a_whole_forward_pass(checkpoint: Path) -> None:
    decoder = load_decoder(Checkpoint(checkpoint))
    windows = torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))
    taps: list[reference.LayerTaps] = []
    reference.forward(decoder, windows, taps=taps)
    torch.testing.assert_close(residual_stream(decoder, windows, Progress()), taps[-1].residual)


def test_spread_takes_evenly_spaced_windows() -> None:
    windows = torch.arange(10)[:, None].expand(10, 3)
    assert (
        spread(windows, None) is windows and spread(windows, 10) is windows and spread(windows, 99) is windows
    )
    assert spread(windows, 4)[:, 0].tolist() == [0, 3, 6, 9]
    assert spread(windows, 1)[:, 0].tolist() == [0]


def test_rejects_a_checkpoint_of_another_vocabulary(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    decoder = load_decoder(Checkpoint(checkpoint))
    dims = dataclasses.replace(decoder.dims, vocab_size=VOCAB - 1)
    embedding = dataclasses.replace(decoder.embedding, weight=decoder.embedding.weight[:-1])
    assert decoder.head is not None
    other = dataclasses.replace(
        decoder, dims=dims, embedding=embedding, head=Linear(decoder.head.weight[:-1])
    )
    with pytest.raises(UsageError, match="vocabularies differ"):
        _evaluated(other, tmp_path / "bundle", checkpoint, text)


def test_rejects_a_text_shorter_than_a_window(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    decoder = load_decoder(Checkpoint(checkpoint))
    short = tmp_path / "short.txt"
    short.write_text("Once", encoding="utf-8")
    with pytest.raises(UsageError):
        _evaluated(decoder, tmp_path / "bundle", checkpoint, short)


def test_rejects_windows_longer_than_the_capacity(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="capacity"):
        _evaluated(load_decoder(Checkpoint(checkpoint)), tmp_path / "bundle", checkpoint, text, length=65)


def test_rejects_a_damaged_bundle(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", load_decoder(Checkpoint(checkpoint)))
    data = bytearray((bundle / "decoder.onnx.data").read_bytes())
    data[100] ^= 1
    (bundle / "decoder.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match="sha256"):
        evaluate(bundle, checkpoint, text, Progress(), length=24)
