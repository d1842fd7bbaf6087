"""Run a converted model and compare it with the trained one, on the same texts and calibration for every
row."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tasks
import torch
from neighbours import Neighbour, attention_macs
from records import code_digest
from torch import Tensor

import kvexport
from kvexport.bundle.layer_report import LayerReport
from kvexport.calibrate import Moments, Recipe, calibration_windows
from kvexport.calibrate.text import all_windows, read_text, tokenize
from kvexport.convert import LayerPlan, convert
from kvexport.model import reference
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.decoder import Attention, Decoder, tensors_of
from kvexport.model.divergence import DivergenceMeter
from kvexport.model.loader import load_decoder
from kvexport.progress import Progress
from kvexport.validate.evaluate import residual_stream, spread

Run = Callable[
    [Tensor], Tensor
]  # token ids [N, S] to the residual stream [N, S, hidden] after the last layer

PASSKEY_LENGTHS, PASSKEY_DEPTHS = (256, 512, 1024, 2048, 4096), (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Made:
    """A model that some method made, and what its cache and its arithmetic come to (MACs: mean over the
    layers)."""

    run: Run
    kv_numbers: int  # per token, all layers
    macs_per_cached_token: float
    macs_per_new_token: float
    parameters: int
    layers: Sequence[LayerReport] = ()
    facts: dict[str, Any] = field(default_factory=dict)  # what else the record keeps, as plain JSON values

    @classmethod
    def of(cls, decoder: Decoder, layers: Sequence[LayerReport] = (), **facts: Any) -> Made:
        attentions: list[Attention] = [layer.attention for layer in decoder.layers]
        macs = [attention_macs(each) for each in attentions]
        parts = (dataclasses.replace(decoder, layers=()), *decoder.layers)
        return cls(
            run=lambda windows: residual_stream(decoder, windows, Progress()),
            kv_numbers=sum(each.kv_width for each in attentions),
            macs_per_cached_token=sum(each.per_cached_token for each in macs) / len(macs),
            macs_per_new_token=sum(each.per_new_token for each in macs) / len(macs),
            parameters=sum(tensor.numel() for part in parts for tensor in tensors_of(part)),
            layers=layers,
            facts=facts,
        )

    @classmethod
    def of_neighbour(cls, made: Neighbour) -> Made:
        return cls(
            run=made.residual_stream,
            kv_numbers=made.kv_numbers_per_token,
            macs_per_cached_token=made.macs_per_cached_token,
            macs_per_new_token=made.macs_per_new_token,
            parameters=made.parameters,
            facts={"rounding": made.rounding},
        )


@dataclass(frozen=True)
class Text:
    """Evaluation windows [N, S] of token ids, and the trained model's last residual stream of them."""

    windows: Tensor
    original: Tensor


class Bench:
    """One checkpoint, loaded as a whole in float32, with what all rows share.

    Attributes:
        recipe: of the calibration windows.
        length: tokens in an evaluation window, and the capacity that codes are made for unless a row says
            otherwise.
    """

    def __init__(
        self,
        checkpoint: Path,
        recipe: Recipe,
        texts: dict[str, Path],
        length: int,
        windows: int,
        piqa: Path | None = None,
        passkey: Path | None = None,
    ) -> None:
        """
        Raises:
            UsageError: the checkpoint, a text or a task cannot be read.
        """
        self.checkpoint, self.recipe, self.length = Checkpoint(checkpoint), recipe, length
        lazy = load_decoder(self.checkpoint)
        self.decoder = dataclasses.replace(lazy, layers=list(lazy.layers))
        self._windows: dict[Recipe, Tensor] = {}
        self.texts: dict[str, Text] = {}
        for name, file in texts.items():
            tokens = spread(
                all_windows(tokenize(checkpoint, read_text(file)), length, f"the text {file}"), windows
            )
            self.texts[name] = Text(tokens, residual_stream(self.decoder, tokens, Progress()))
        self.piqa = None if piqa is None else tasks.read_piqa(piqa)
        self.passkey = None if passkey is None else self._passkey_cells(read_text(passkey))

    def settings(self) -> dict[str, Any]:
        """What identifies the model and the evaluation texts in a record."""
        return {
            "model": {"name": self.checkpoint.path.resolve().name, "sha256": self.checkpoint.digest()},
            "length": self.length,
            "texts": {
                name: {"windows": len(each.windows), "sha256": digest(each.windows)}
                for name, each in self.texts.items()
            },
        }

    @property
    def attention(self) -> Attention:
        """The first layer's."""
        return self.decoder.layers[0].attention

    @property
    def start(self) -> tuple[int, ...]:
        """What stands before every prompt."""
        return () if self.decoder.bos_token_id is None else (self.decoder.bos_token_id,)

    def calibration(self, recipe: Recipe | None = None) -> Tensor:
        """Calibration windows [N, length] of a recipe [the one that all rows share]."""
        recipe = recipe or self.recipe
        if recipe not in self._windows:
            self._windows[recipe] = calibration_windows(self.decoder, self.checkpoint.path, recipe)
        return self._windows[recipe]

    def convert(
        self,
        layer_plans: Sequence[LayerPlan],
        capacity: int | None = None,
        windows: Tensor | None = None,
        moments_of: Callable[[int], Moments] | None = None,
    ) -> tuple[Decoder, list[LayerReport]]:
        """The converted decoder, and the report of each layer."""
        windows = self.calibration() if windows is None else windows
        layers = list(convert(self.decoder, windows, layer_plans, moments_of, capacity or self.length))
        converted = dataclasses.replace(self.decoder, layers=[each.layer for each in layers])
        return converted, [each.report for each in layers]

    @torch.no_grad()
    def divergences(
        self, run: Run, most: int | None = None, decoder: Decoder | None = None
    ) -> dict[str, Any]:
        """By text, how far predictions are from the trained model's, over at most so many windows spread
        evenly; `decoder` has the final norm and the head of the other model [the trained ones]."""
        found = {}
        for name, text in self.texts.items():
            windows, trained = spread(text.windows, most), spread(text.original, most)
            meter, stream = DivergenceMeter(), run(windows)
            for at in range(len(stream)):
                one = slice(at, at + 1)
                original = reference.logits(self.decoder, trained[one])
                ours = reference.logits(decoder or self.decoder, stream[one])
                meter.add(original, ours, windows[one])
            found[name] = meter.finish().to_json()
        return found

    def measured(self, made: Made) -> dict[str, Any]:
        """What the record says of a model, tasks aside."""
        return {
            "kv_numbers": made.kv_numbers,
            "share": made.kv_numbers / sum(layer.attention.kv_width for layer in self.decoder.layers),
            "texts": self.divergences(made.run),
            "macs_per_cached_token": made.macs_per_cached_token,
            "macs_per_new_token": made.macs_per_new_token,
            "parameters": made.parameters,
            "layers": [dataclasses.asdict(each) for each in made.layers],
            **made.facts,
        }

    def task_figures(self, run: Run, original: dict[str, Any] | None = None) -> dict[str, Any]:
        """PIQA and passkey retrieval, where they are asked; `original` is what this returned for the trained
        model."""

        def logits(tokens: Tensor) -> Tensor:
            return reference.logits(self.decoder, run(tokens))

        found: dict[str, Any] = {}
        if self.piqa is not None:
            encode = tasks.encoder(self.checkpoint.path)
            found["piqa"] = tasks.piqa(logits, encode, self.piqa, self.start, self.decoder.dims.max_positions)
        if self.passkey is not None:
            found["passkey"] = tasks.passkey(
                logits, self.passkey, None if original is None else original["passkey"]
            )
        return found

    def _passkey_cells(self, haystack: str) -> list[tasks.PasskeyCell]:
        most = self.decoder.dims.max_positions or max(PASSKEY_LENGTHS)
        lengths = [length for length in PASSKEY_LENGTHS if length <= most]
        encode = tasks.encoder(self.checkpoint.path)
        return tasks.passkey_cells(encode, haystack, lengths, PASSKEY_DEPTHS, start=self.start)


def digest(tokens: Tensor) -> str:
    """sha256 of token ids."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def source_digest() -> str:
    """sha256 of the code that figures depend on."""
    here = Path(__file__).parent
    package = Path(kvexport.__file__).parent
    folders = [*(package / name for name in ("calibrate", "convert", "heal", "model")), here / "neighbours"]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    files += [here / f"{name}.py" for name in ("quality_long", "quality_measure", "quality_rows", "tasks")]
    return code_digest(files)
