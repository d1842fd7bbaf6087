"""Read a written Hugging Face checkpoint back, and compare its logits with those of the converted decoder.

Everything computes in float32 on the weights as the checkpoint stores them, one layer in memory at a time;
transformers loads the whole model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kvexport.devices.system import available_memory
from kvexport.errors import GateFailed, KvexportError
from kvexport.model import reference
from kvexport.model.decoder import Attention, Decoder, Layer, Norm, Rope
from kvexport.model.loader import load_decoder
from kvexport.model.tokenizer_json import quiet

TOLERANCE = 1e-3  # of the largest logit; sums in another order differ by about 1e-6
_WINDOWS, _LENGTH = 2, 64  # calibration tokens that are run
_FIX = "use a bundle (kvexport build CHECKPOINT -o BUNDLE), and report the model"
T = TypeVar("T")


@dataclass(frozen=True)
class ReadBack:
    """Differences of logits from those of the converted decoder, relative to the largest logit.

    Attributes:
        difference: of the checkpoint as kvexport reads it.
        transformers: version of transformers; None: not compared.
        transformers_difference: of the checkpoint as transformers reads it; None: not compared.
    """

    difference: float
    transformers: str | None
    transformers_difference: float | None


class ExpectedLogits:
    """Runs the converted decoder on calibration tokens, layer by layer, while it is written."""

    def __init__(
        self, decoder: Decoder, windows: Tensor, dtype: torch.dtype, norm_offset: float, context: int
    ) -> None:
        """
        Args:
            decoder: gives the parts outside the layers.
            windows: calibration tokens [N, S] int64, of which a few are run.
            dtype: data type in which the weights are stored.
            norm_offset: what is added to stored weights of norms.
            context: tokens for which the decoder's RoPE was made.
        """
        self.tokens, self.context = windows[:_WINDOWS, :_LENGTH], context
        self._ends, self._dtype, self._offset = replace(decoder, layers=[]), dtype, norm_offset
        self._x = reference.embed(self._as_stored(decoder.embedding), self.tokens)

    @torch.no_grad()
    def add_layer(self, layer: Layer) -> None:
        """Run the next layer."""
        positions = torch.arange(self.tokens.shape[1]).expand(self.tokens.shape)
        self._x = reference.run_layer(self._as_stored(layer), self._x, positions).residual

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits [N, S, vocab] after all layers."""
        return reference.logits(self._as_stored(self._ends), self._x)

    def _as_stored(self, part: T) -> T:
        """The part in float32, with the weights that a reader of the checkpoint gets."""
        if isinstance(part, Tensor):
            return part.to(self._dtype).float()  # type: ignore[return-value]
        if isinstance(part, Norm) and part.weight is not None:
            weight = self._as_stored(part.weight - self._offset) + self._offset
            return replace(part, weight=weight, bias=self._as_stored(part.bias))
        if is_dataclass(part) and not isinstance(part, (type, Rope)):
            names = [each.name for each in fields(part)]
            stored = replace(part, **{name: self._as_stored(getattr(part, name)) for name in names})
            if isinstance(part, Attention):
                return replace(stored, alibi_slopes=part.alibi_slopes)  # computed from the config
            return stored
        return part


def read_back(directory: Path, expected: ExpectedLogits) -> tuple[ReadBack, str | None]:
    """Compare a written checkpoint with the decoder that was written.

    Returns:
        The differences, and the reason why transformers was not compared, if it was not.

    Raises:
        GateFailed: the checkpoint cannot be read, or its logits differ by more than `TOLERANCE`.
    """
    wanted = expected.logits()
    try:
        ours = reference.forward(load_decoder(directory, context=expected.context), expected.tokens)
    except KvexportError as error:
        raise GateFailed("the written checkpoint must be readable", got=str(error), fix=_FIX) from error
    difference = _difference(ours, wanted)
    _require("the written checkpoint must give the logits of the converted model", difference)
    reason = _why_not_compared(directory)
    if reason is not None:
        return ReadBack(difference, None, None), reason
    import transformers

    # RoPE that depends on the length: transformers takes that of these tokens
    ours = reference.forward(load_decoder(directory, context=expected.tokens.shape[1]), expected.tokens)
    # eager attention of Falcon adds ALiBi twice; SDPA has no softcap
    theirs_difference = _difference(_transformers_logits(directory, expected.tokens, "eager"), ours)
    if theirs_difference > TOLERANCE:
        other = _difference(_transformers_logits(directory, expected.tokens, "sdpa"), ours)
        theirs_difference = min(theirs_difference, other)
    _require("transformers must give the logits of the converted model", theirs_difference)
    return ReadBack(difference, transformers.__version__, theirs_difference), None


def _difference(logits: Tensor, expected: Tensor) -> float:
    if logits.shape != expected.shape:
        return float("inf")
    return float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _require(what: str, difference: float) -> None:
    if not difference <= TOLERANCE:
        raise GateFailed(
            what,
            got=f"a difference of {difference:.1e} of the largest logit",
            expected=f"at most {TOLERANCE:g}",
            fix=_FIX,
        )


def _why_not_compared(directory: Path) -> str | None:
    """Why transformers cannot be compared with the checkpoint; None: it can."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        return f"transformers cannot be imported ({error})"

    model_type = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"transformers {transformers.__version__} has no class of its own for {model_type}"
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    needed, free = 3 * stored, available_memory()  # float32 of float16, and what loading needs
    if needed > free:
        return f"transformers loads the whole model, for about {needed:,} bytes, and {free:,} are free"
    return None


def _transformers_logits(directory: Path, tokens: Tensor, attention: str) -> Tensor:
    """Logits [N, S, vocab] of the model as transformers reads it, by its own class.

    Args:
        directory: the checkpoint.
        tokens: [N, S] int64.
        attention: transformers' implementation of attention.

    Raises:
        GateFailed: transformers cannot read or run it.
    """
    import transformers

    with quiet(transformers), torch.no_grad():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
            )
            logits: Tensor = model.eval()(tokens, use_cache=False).logits
        except Exception as error:  # any class, from transformers and from what it imports
            raise GateFailed(
                "transformers must be able to read the written checkpoint",
                got=f"{type(error).__name__}: {error}",
                fix="if it cannot read the original either, install the version that the model needs",
            ) from error
    return logits
