"""Tiny random decoders, and a caller that compares a graph with the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from kvexport.bundle.graph_io import ring_axis, update, window_of
from kvexport.graph import (
    GRAPH_FILE,
    DecoderWriter,
    GraphContract,
    attention_tap,
    past,
    present,
    residual_tap,
)
from kvexport.graph.keep_float32 import NO_EXCEPTIONS, Float32Exceptions
from kvexport.model import reference
from kvexport.model.decoder import (
    Attention,
    Decoder,
    Embedding,
    Layer,
    Linear,
    Mlp,
    ModelDims,
    Norm,
    Rope,
    map_tensors,
)
from kvexport.model.rope import alibi_slopes

HIDDEN, VOCAB = 24, 40


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer's attention. `group` keys (of head_dim) are mapped to one cached key of `key_dim`."""

    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 8
    group: int = 1
    key_dim: int | None = None  # None: no key map
    value_dim: int | None = None
    value_map: bool = False
    window: int | None = None
    qk_norm: bool = False
    slopes: tuple[float, ...] | None = None
    value_group: int | None = None  # values (of head_dim) that a value encoder maps to one cached value
    theta: float | None = 10000.0  # None: no RoPE
    rotary_dim: int | None = None  # numbers of each head that rotate; None: all
    magnitude: bool = False  # of the rotary tables


@dataclasses.dataclass(frozen=True)
class Style:
    """Properties that all layers of a family share."""

    norm: str = "rms"
    qkv_bias: bool = False
    other_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    rope: bool = True
    tied: bool = False
    embedding_norm: bool = False
    norms: tuple[str, ...] = ("attention_norm", "mlp_norm")  # fields of Layer
    norm_weight: bool = True
    norm_bias: bool = True  # of LayerNorm
    parallel: bool = False
    residual_multiplier: float = 1.0
    qk_norm_kind: str = "rms"
    per_head_norm: bool = False  # a weight of QK-norm for each head
    norm_over: Literal["head", "heads"] = "head"
    norm_after_rotation: bool = False
    clip: float | None = None
    softcap: float | None = None
    embedding_multiplier: float = 1.0
    embedding_width: int | None = None  # None: no projections
    learned_positions: bool = False
    final_norm: bool = True
    head_bias: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None


LLAMA = Style()
QWEN2 = Style(qkv_bias=True, tied=True)
BLOOM = Style("layer", True, True, False, "gelu_tanh", False, True, True)


def slopes_of(heads: int) -> tuple[float, ...]:
    return tuple(alibi_slopes(heads, torch.float32).tolist())


def make_decoder(shapes: Sequence[Shape], style: Style = LLAMA, seed: int = 0) -> Decoder:
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) / size[-1] ** 0.5

    def linear(out: int, into: int, bias: bool) -> Linear:
        return Linear(random(out, into), random(out) if bias else None)

    def norm(width: int, kind: str = style.norm) -> Norm:
        layer = kind == "layer"
        weight = 1 + random(width) if style.norm_weight else None
        bias = random(width) if layer and style.norm_weight and style.norm_bias else None
        return Norm("layer" if layer else "rms", weight, bias, 1e-5)

    def qk_norm(shape: Shape, heads: int) -> Norm:
        width = shape.head_dim * (heads if style.norm_over == "heads" or style.per_head_norm else 1)
        shared = norm(width, style.qk_norm_kind)
        if shared.weight is None or not style.per_head_norm:
            return shared
        return dataclasses.replace(shared, weight=shared.weight.unflatten(0, (heads, -1)))

    def rope(shape: Shape) -> Rope | None:
        if not style.rope or shape.theta is None:
            return None
        width = shape.rotary_dim or shape.head_dim
        inv_freq = torch.zeros(shape.head_dim // 2)
        inv_freq[: width // 2] = 1 / shape.theta ** (torch.arange(0, width, 2).float() / width)
        return Rope(inv_freq, 1 + random(len(inv_freq)) if shape.magnitude else None)

    def attention(shape: Shape) -> Attention:
        width, values = shape.value_dim or shape.head_dim, shape.value_group
        joined = shape.heads * (shape.head_dim if shape.value_map else width)
        mapped = shape.key_dim is not None
        return Attention(
            q=linear(shape.heads * shape.head_dim, HIDDEN, style.qkv_bias),
            k=linear(shape.kv_heads * shape.group * shape.head_dim, HIDDEN, style.qkv_bias),
            v=linear(
                shape.kv_heads * (width if values is None else values * shape.head_dim),
                HIDDEN,
                style.qkv_bias,
            ),
            o=linear(HIDDEN, joined, style.other_bias),
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            rope=rope(shape),
            softcap=style.softcap,
            clip=style.clip,
            q_norm=qk_norm(shape, shape.heads) if shape.qk_norm else None,
            k_norm=qk_norm(shape, shape.kv_heads * shape.group) if shape.qk_norm else None,
            norm_over=style.norm_over,
            norm_after_rotation=style.norm_after_rotation,
            key_map=random(shape.kv_heads, shape.group * shape.head_dim, shape.key_dim) if mapped else None,
            query_map=random(shape.heads, shape.head_dim, shape.key_dim) if mapped else None,
            value_encoder=None if values is None else random(shape.kv_heads, values * shape.head_dim, width),
            value_map=random(shape.heads, width, shape.head_dim) if shape.value_map else None,
            alibi_slopes=None if shape.slopes is None else torch.tensor(shape.slopes),
            window=shape.window,
        )

    def layer(shape: Shape) -> Layer:
        inner = 2 * HIDDEN
        mlp = Mlp(
            linear(inner, HIDDEN, style.other_bias) if style.gated else None,
            linear(inner, HIDDEN, style.other_bias),
            linear(HIDDEN, inner, style.other_bias),
            style.activation,  # type: ignore[arg-type]
        )
        attention_norm, attended, mlp_norm = maybe("attention_norm"), attention(shape), maybe("mlp_norm")
        return Layer(
            attention_norm,
            attended,
            mlp_norm,
            mlp,
            attention_output_norm=maybe("attention_output_norm"),
            mlp_output_norm=maybe("mlp_output_norm"),
            attention_residual_norm=maybe("attention_residual_norm"),
            mlp_residual_norm=maybe("mlp_residual_norm"),
            parallel=style.parallel,
            residual_multiplier=style.residual_multiplier,
        )

    def maybe(name: str) -> Norm | None:
        return norm(HIDDEN) if name in style.norms else None

    width, projects = style.embedding_width or HIDDEN, style.embedding_width is not None
    return Decoder(
        embedding=Embedding(
            torch.randn(VOCAB, width, generator=generator),
            norm(HIDDEN) if style.embedding_norm else None,
            multiplier=style.embedding_multiplier,
            projection=linear(HIDDEN, width, style.other_bias) if projects else None,
            positions=torch.randn(64, HIDDEN, generator=generator) if style.learned_positions else None,
        ),
        layers=[layer(shape) for shape in shapes],
        final_norm=norm(HIDDEN) if style.final_norm else None,
        head=None if style.tied else linear(VOCAB, width, style.head_bias),
        dims=ModelDims(VOCAB, HIDDEN, 64),
        output_projection=linear(width, HIDDEN, style.other_bias) if projects else None,
        logit_multiplier=style.logit_multiplier,
        logit_softcap=style.logit_softcap,
    )


def write(
    decoder: Decoder,
    directory: Path,
    dtype: str = "float32",
    capacity: int = 64,
    exceptions: Float32Exceptions = NO_EXCEPTIONS,
) -> GraphContract:
    directory.mkdir(exist_ok=True)
    writer = DecoderWriter(
        directory,
        dtype=dtype,
        capacity=capacity,
        dims=decoder.dims,
        embedding=decoder.embedding,
    )
    for layer in decoder.layers:
        writer.add_layer(layer)
    return writer.finish(decoder, exceptions)


def open_session(directory: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        directory / GRAPH_FILE, quiet(threads), providers=["CPUExecutionProvider"]
    )


def quiet(threads: int = 1) -> onnxruntime.SessionOptions:
    """Options without warnings about copied caches: these tests bind no buffers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


def mapped(decoder: Decoder, function: Callable[[Tensor], Tensor]) -> Decoder:
    """The decoder with `function` applied to every tensor but the exact rotary frequencies."""
    layers = [map_tensors(layer, function) for layer in decoder.layers]
    return dataclasses.replace(map_tensors(decoder, function), layers=layers)


def rounded(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """Weights rounded to `dtype`, in float32."""
    return mapped(decoder, lambda leaf: leaf.to(dtype).float() if leaf.is_floating_point() else leaf)


class Caller:
    """Run a session as a runtime does, chunk by chunk; caches of `slots` are filled with `fill`.

    A ring has `slots`, too, or its window and `extra` slots.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        contract: GraphContract,
        batch: int,
        slots: int,
        fill: float = 0.0,
        extra: int | None = None,
    ) -> None:
        self._session = session
        self._apart = contract.variant.startswith(
            "ort-"
        )  # GroupQueryAttention takes several tokens with a past from one row only
        self._outputs = [output.name for output in session.get_outputs()]
        dtypes = {
            entry.name: np.float16 if entry.type == "tensor(float16)" else np.float32
            for entry in session.get_inputs()
        }
        sizes: dict[int | str, int] = {"batch": batch, "capacity": slots}
        for window in {window_of(size) for spec in contract.inputs for size in spec.shape} - {None}:
            assert window is not None
            sizes[ring_axis(window)] = slots if extra is None else window + extra
        self.caches = {
            spec.name: np.full(
                [size if isinstance(size, int) else sizes[size] for size in spec.shape],
                fill,
                dtypes[spec.name],
            )
            for spec in contract.inputs
            if spec.name.startswith("past_key_values")
        }
        self._layers = contract.num_layers

    def __call__(self, ids: Tensor, start: Sequence[int]) -> dict[str, np.ndarray]:
        """Tokens [B, S], row b at positions start[b]...; logits of all of them."""
        batch, length = ids.shape
        first = np.array(start, dtype=np.int64)
        feeds = {
            "input_ids": ids.numpy(),
            "position_ids": first[:, None] + np.arange(length),
            "write_indices": first,
            "logits_index": np.tile(np.arange(length), (batch, 1)),
        }
        found = (
            self._run_apart(feeds)
            if self._apart and batch > 1 and length > 1
            else self._run(feeds, self.caches)
        )
        for layer in range(self._layers):
            for which in ("key", "value"):
                if update(layer, which) in found:
                    for cache, new, begin in zip(
                        self.caches[past(layer, which)], found[update(layer, which)], start, strict=True
                    ):
                        first = begin % cache.shape[1]
                        cache[:, first : first + length] = new
                else:
                    self.caches[past(layer, which)] = found[present(layer, which)]
        return found

    def _run(self, feeds: dict[str, np.ndarray], caches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self._session.run(None, {**feeds, **caches}), strict=True))

    def _run_apart(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = []
        for row in range(len(feeds["input_ids"])):
            one = slice(row, row + 1)
            caches = {name: cache[one] for name, cache in self.caches.items()}
            rows.append(self._run({name: feed[one] for name, feed in feeds.items()}, caches))
        return {name: np.concatenate([found[name] for found in rows]) for name in self._outputs}


def distance(found: np.ndarray, wanted: Tensor | np.ndarray) -> float:
    """Largest difference, relative to the largest expected number; infinity if a result is not finite."""
    wanted = np.asarray(wanted)
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted).max())


LENGTHS = (9, 5)


def disagreement(
    decoder: Decoder,
    session: onnxruntime.InferenceSession,
    contract: GraphContract,
    *,
    lengths: Sequence[int] = LENGTHS,
    chunks: Sequence[int] = (4, 5),
    steps: int = 4,
    slots: int = 16,
    fill: float = 0.0,
    extra: int | None = None,
    seed: int = 1,
) -> float:
    """Largest relative distance to the reference of logits and taps in each call, and of the final caches.

    Right-padded prompts of `lengths` are read in `chunks`, then each row decodes `steps` tokens at its own
    depth. `extra` as in `Caller`.
    """
    batch = len(lengths)
    tokens = torch.randint(
        0, VOCAB, (batch, max(lengths) + steps), generator=torch.Generator().manual_seed(seed)
    )
    graph = Caller(session, contract, batch, slots, fill, extra)
    caches = reference.new_cache(list(decoder.layers), batch, slots, torch.float32)
    worst = 0.0

    def compare(ids: Tensor, start: Sequence[int]) -> None:
        nonlocal worst
        found = graph(ids, start)
        taps: list[reference.LayerTaps] = []
        positions = torch.tensor(start)[:, None] + torch.arange(ids.shape[1])
        logits = reference.forward(decoder, ids, positions, caches, taps)
        assert found["logits"].dtype == np.float32
        worst = max(worst, distance(found["logits"], logits))
        for index, tap in enumerate(taps):
            if attention_tap(index) in found:
                worst = max(worst, distance(found[attention_tap(index)], tap.attention))
                worst = max(worst, distance(found[residual_tap(index)], tap.residual))

    done = 0
    for chunk in chunks:
        compare(tokens[:, done : done + chunk], [done] * batch)
        done += chunk
    assert done == max(lengths)
    for step in range(steps):
        depths = [length + step for length in lengths]
        ids = torch.stack([tokens[row, depth] for row, depth in enumerate(depths)])[:, None]
        compare(ids, depths)
    for row, length in enumerate(lengths):
        for index, cache in enumerate(caches):
            for which, wanted in (("key", cache.key), ("value", cache.value)):
                cached, window = graph.caches[past(index, which)], decoder.layers[index].attention.window
                stop = length + steps
                used = np.arange(0 if window is None else max(0, stop - window), stop)
                in_slots = used % cached.shape[2]
                worst = max(worst, distance(cached[row][:, in_slots], wanted[row][:, used]))
    return worst
