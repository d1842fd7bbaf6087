"""What `kvexport compress` writes: one method and shape for all layers, and the config that declares them.

Refusals come before any work, and name the feature that a Hugging Face checkpoint cannot have.
"""

from __future__ import annotations

from dataclasses import replace

from kvexport.build.conversion_job import ConversionJob
from kvexport.convert import CompressionPlan, LayerPlan, Method, uniform_shape, without_output_bias
from kvexport.convert.methods import METHODS
from kvexport.errors import UsageError
from kvexport.model.architecture import Architecture
from kvexport.model.hf_config import HFConfig

_FOLDING = ("fold", "mean-pool")  # methods whose codes of rotated keys are in W_Q and W_K
_BUNDLE = "make a bundle instead: kvexport build CHECKPOINT -o BUNDLE"


def plan_hf_checkpoint(job: ConversionJob) -> tuple[CompressionPlan, HFConfig]:
    """Plan a checkpoint of the family's own class.

    Returns:
        The same method and shape for every layer, and what the checkpoint declares.

    Raises:
        UsageError: a Hugging Face checkpoint cannot represent the result.
    """
    form, method = _source_config(job), job.methods[0]
    shape = uniform_shape(job.options.request, job.methods, job.decoder.layers[0].attention)
    if job.compresses:
        method = _method(job, form.architecture)
        form = form.with_kv_heads(shape.kv_heads)
        if form.architecture.num_kv_heads != shape.kv_heads:
            job.progress.note(
                f"{form.config['model_type']} has no shared KV heads in transformers: the "
                "checkpoint stores each KV head once for every attention head that uses it, and other "
                "programs cache as much as before. A bundle of `kvexport build` caches less"
            )
        if method.centred and not form.has_output_bias:
            form = form.with_output_bias()
        if not form.has_output_bias:
            method = without_output_bias(method)
    return CompressionPlan([LayerPlan(method, shape)] * len(job.decoder.layers)), form


def _method(job: ConversionJob, architecture: Architecture) -> Method:
    """The method that all layers are converted with.

    Raises:
        UsageError: its codes of keys do not fold into the weights.
    """
    attention, name = job.decoder.layers[0].attention, job.options.method
    require_folding(architecture, name)
    if all(layer.rope is None for layer in architecture.layers):
        method = job.methods[0]
        # the slope of a head depends on its index
        return method if attention.alibi_slopes is None else replace(method, matched=False)
    if name not in _FOLDING:
        raise UsageError(
            "a Hugging Face checkpoint of a model with RoPE needs a method that folds into the weights",
            got=f"--method {name}",
            expected=", ".join(_FOLDING),
            fix=f"use --method fold, or {_BUNDLE}",
        )
    return METHODS[name]


def require_folding(architecture: Architecture, method: str) -> None:
    """Check that a checkpoint of the family's class can have fewer KV heads.

    Raises:
        UsageError: a norm or a clip follows W_K.
    """
    if architecture.family.qk_norm is not None:
        between = "QK-norm: a norm"
    elif architecture.clip is not None:
        between = "clipped projections: a clip"
    else:
        return
    raise UsageError(
        f"a Hugging Face checkpoint with fewer KV heads needs a model without {between} after W_K prevents "
        "folding",
        got=f"model_type {architecture.config.get('model_type')}, --method {method}",
        fix=f"{_BUNDLE}; or keep all heads: --kv-ratio 1",
    )


def _source_config(job: ConversionJob) -> HFConfig:
    """The config of the checkpoint, without `auto_map` if its Python files are missing."""
    form, folder = HFConfig.of_source(job.checkpoint.config), job.checkpoint.path
    files = sorted(f"{module}.py" for module in _local_modules(form.config.get("auto_map")))
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return form
    job.progress.note(f"config.json is written without auto_map: the checkpoint has no {', '.join(missing)}")
    return form.without("auto_map")


def _local_modules(auto_map: object) -> set[str]:
    """Modules of the checkpoint's folder that an `auto_map` names, as "modeling.Class" or lists of these."""
    entries = list(auto_map.values()) if isinstance(auto_map, dict) else []
    names = [name for each in entries for name in (each if isinstance(each, list) else [each])]
    return {name.partition(".")[0] for name in names if isinstance(name, str) and "--" not in name}
