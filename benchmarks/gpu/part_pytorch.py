"""Part pytorch: transformers' llama with its static cache, eager and compiled, on the checkpoints of the
bundles.

A step takes a token from the host and gives its logits in float32 to the host, as kvexport's does. At each
depth the cache is no longer than the depth and the steps need, since attention reads all of a static cache.
Eager and compiled steps of both models alternate, with one cache for each model. Before that, the model's
logits must equal those of the bundle's recorded reference, which shows that both sides run the same weights.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from part import Part, run, summary
from transformers import LlamaForCausalLM, StaticCache

_CHUNK = 2048  # tokens of a prompt in one call: the mask of a longer one would take gigabytes
_WARM, _UNCOUNTED, _COUNTED = 3, 1, 8  # steps before all turns, at the beginning of a turn, of a turn
_COSINE = 0.999
_RESERVE = 15.0  # seconds that must be left after another compilation

Call = Callable[..., Any]


def work(part: Part) -> None:
    torch.manual_seed(0)
    models = {heads: Model(part, heads) for heads in part.settings.kv_heads}
    part.found |= {"same_model": {}, "weights_bytes": {}, "decode": {}, "compilation": {}}
    for heads, model in models.items():
        cosine = model.cosine_to_reference(part)
        part.found["same_model"][str(heads)] = {"least_cosine_of_logits": cosine, "at_least": _COSINE}
        part.found["weights_bytes"][str(heads)] = model.weights_bytes
        if not cosine >= _COSINE:
            part.failed(
                f"PyTorch and the reference of bundle-{heads} must be the same model: cosine {cosine}"
            )
        part.save()
    longest, depths = 0.0, part.settings.depths  # seconds that a compilation took
    for depth in (depths[-1], depths[0], *depths[1:-1]):  # the ends first, should time run out
        longest = max(longest, at_depth(part, models, depth, longest))


def at_depth(part: Part, models: dict[int, Model], depth: int, longest: float) -> float:
    """All sides at one depth; returns the longest compilation."""
    steps = part.settings.steps
    sides: dict[str, tuple[Model, Call]] = {}
    figures: dict[str, Any] = {}
    torch.compiler.reset()
    turns = -(-steps // _COUNTED)
    for model in models.values():
        free_memory(model)
        model.fill(depth, 2 * (_WARM + turns * _UNCOUNTED + steps) + 2 * _COUNTED)
    for heads, model in models.items():
        name = f"eager, {heads} KV heads"
        figures[name] = {"temporary_bytes": model.warmed(model.eager), "cache_bytes": model.cache_bytes}
        sides[name] = model, model.eager
        if part.left < 1.3 * longest + _RESERVE:
            part.found["compilation"][f"{depth}, {heads} KV heads"] = {
                "left_out": f"{part.left:.0f} seconds were left"
            }
            continue
        begin = time.monotonic()
        try:
            call, temporary, how = model.compiled(part.settings.rehearsal)
        except Exception as error:  # whatever the compiler raises
            part.failed(
                f"torch.compile at depth {depth}, {heads} KV heads: {type(error).__name__}: "
                f"{str(error)[:2000]}"
            )
            continue
        seconds = time.monotonic() - begin
        longest = max(longest, seconds)
        part.found["compilation"][f"{depth}, {heads} KV heads"] = {"seconds": round(seconds, 1), **how}
        name = f"compiled, {heads} KV heads"
        figures[name] = {"temporary_bytes": temporary, "cache_bytes": model.cache_bytes}
        sides[name] = model, call
    times: dict[str, list[float]] = {name: [] for name in sides}
    while len(next(iter(times.values()))) < steps:
        for name, (model, call) in sides.items():
            for number in range(_UNCOUNTED + min(_COUNTED, steps)):
                milliseconds = model.step(call)
                if number >= _UNCOUNTED:
                    times[name].append(milliseconds)
    for name, each in times.items():
        figures[name] |= summary(each)
    part.found["decode"][str(depth)] = figures
    part.save()
    return longest


class Model:
    """One checkpoint on the device in float16, with one static cache."""

    def __init__(self, part: Part, kv_heads: int) -> None:
        self.device, self.kv_heads = torch.device(part.settings.device), kv_heads
        path = part.settings.checkpoint(kv_heads)
        loaded: Any = LlamaForCausalLM.from_pretrained(path, dtype=torch.float16, attn_implementation="sdpa")
        self.model = loaded.to(self.device).eval()
        self.weights_bytes = sum(each.numel() * each.element_size() for each in self.model.parameters())
        self.cache: Any = None
        self.length = self.calls = 0
        self.vocab = int(self.model.config.vocab_size)
        # transformers before 5 wants to be told where the tokens stand
        self.wants_positions = "cache_position" in inspect.signature(self.model.model.forward).parameters

    def eager(self, **arguments: Any) -> Any:
        return self.model(**arguments)

    @torch.no_grad()
    def run(self, call: Call, ids: torch.Tensor, last_only: bool = True) -> torch.Tensor:
        """Logits of tokens [1, S] that come next."""
        arguments: dict[str, Any] = {"input_ids": ids, "past_key_values": self.cache, "use_cache": True}
        if last_only:
            arguments["logits_to_keep"] = 1
        if self.wants_positions:
            arguments["cache_position"] = torch.arange(
                self.length, self.length + ids.shape[1], device=self.device
            )
        self.length += ids.shape[1]
        return call(**arguments).logits

    def step(self, call: Call) -> float:
        """One token in from the host, its logits out to the host; milliseconds."""
        self.calls += 1
        token = np.array([[3 + self.calls % (self.vocab - 3)]])
        synchronize(self.device)
        begin = time.perf_counter()
        self.run(call, torch.from_numpy(token).to(self.device))[0, -1].float().cpu()
        return 1000 * (time.perf_counter() - begin)

    def fill(self, depth: int, more: int) -> None:
        """A cache with `depth` random tokens, and room for `more`."""
        self.cache, self.length = (
            StaticCache(config=self.model.config, max_cache_len=-(-(depth + more) // 8) * 8),
            0,
        )
        ids = torch.randint(3, self.vocab, (1, depth), device=self.device)
        for start in range(0, depth, _CHUNK):
            self.run(self.eager, ids[:, start : start + _CHUNK])
        layers = [(layer.keys, layer.values) for layer in self.cache.layers]
        self.cache_bytes = sum(each.numel() * each.element_size() for pair in layers for each in pair)

    def warmed(self, call: Call) -> int | None:
        """Steps that do not count; the most device memory that they took beside what was there before."""
        if self.device.type != "cuda":
            for _ in range(_WARM):
                self.step(call)
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(_WARM):
            self.step(call)
        return torch.cuda.max_memory_allocated() - before

    def compiled(self, rehearsal: bool) -> tuple[Call, int | None, dict[str, Any]]:
        """The model compiled and warm, its temporary memory, and how: as one graph if it can be."""
        options: dict[str, Any] = {"backend": "aot_eager"} if rehearsal else {"mode": "reduce-overhead"}
        refused = None
        try:
            call = torch.compile(self.model, fullgraph=True, dynamic=False, **options)
            temporary = self.warmed(call)
        except Exception as error:  # whatever breaks the graph
            refused = f"{type(error).__name__}: {str(error)[:1000]}"
            call = torch.compile(self.model, dynamic=False, **options)
            temporary = self.warmed(call)
        skipped = int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])  # in all so far
        return (
            call,
            temporary,
            {
                **options,
                "fullgraph": refused is None,
                "fullgraph_refused": refused,
                "cudagraph_skips": skipped,
            },
        )

    def cosine_to_reference(self, part: Part) -> float:
        """The smallest cosine, over tokens, between these logits and those of the bundle's recorded
        reference."""
        from kvexport.validate.reference_run import FILE, read_reference

        bundle = part.bundle(self.kv_heads)
        reference = read_reference(bundle / FILE, int(self.model.config.num_hidden_layers))
        ids = torch.from_numpy(np.array(reference["input_ids"]))[None].to(self.device)
        self.cache, self.length = (
            StaticCache(config=self.model.config, max_cache_len=-(-ids.shape[1] // 8) * 8),
            0,
        )
        here = self.run(self.eager, ids, last_only=False)[0].double().cpu()
        there = torch.from_numpy(np.array(reference["logits"])).double()
        return float(torch.nn.functional.cosine_similarity(here, there, dim=1).min())


def free_memory(model: Model) -> None:
    model.cache = None
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run(work)
