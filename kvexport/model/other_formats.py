"""Errors for paths that are no checkpoint with safetensors weights: what is there, and how to convert it.

Adapters, GGUF, pickles, original Llama files, other libraries, names on the Hugging Face hub.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from kvexport.errors import CheckpointError, reason_of

_ADAPTER = "adapter_config.json"
_HUB_NAME = re.compile(r"(?:https:/huggingface\.co/)?([\w-][\w.-]*/[\w.-]+)")  # a Path has single slashes
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_LIBRARIES = {
    "model_index.json": "a diffusers pipeline",
    "modules.json": "a sentence-transformers model",
    "config_sentence_transformers.json": "a sentence-transformers model",
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_LLAMA_SCRIPT = "src/transformers/models/llama/convert_llama_weights_to_hf.py"


def not_a_folder(path: Path) -> CheckpointError:
    """The error for a path that is not a folder."""
    if path.suffix == ".gguf" and path.is_file():
        return _gguf(path.parent, [path.name])
    what = "the checkpoint must be a folder"
    name = _HUB_NAME.fullmatch(str(path))
    if name is not None and not path.exists() and not path.parent.exists():
        folder = name[1].partition("/")[2]
        return CheckpointError(
            what,
            got=f"{name[1]}, which looks like the name of a model on the Hugging Face hub",
            fix=f"hf download {name[1]} --local-dir {folder}, then give the folder {folder}",
        )
    if path.is_file():
        return CheckpointError(what, got=f"the file {path}", fix=f"give the folder: {path.absolute().parent}")
    return CheckpointError(
        what,
        got=path,
        fix="give the folder with config.json (to download one: hf download NAME --local-dir FOLDER)",
    )


def no_config(folder: Path) -> CheckpointError:
    """The error for a folder without config.json."""
    names = _names(folder)
    other = _other_format(folder, names)
    if other is not None:
        return other
    inner = sorted(path.parent.relative_to(folder) for path in _inner_configs(folder))
    if inner:
        return CheckpointError(
            f"{folder} must be a checkpoint: it has no config.json, but folders inside have",
            got=", ".join(str(path) for path in inner[:3]),
            fix=f"give one of them, such as {folder / inner[0]}",
        )
    return CheckpointError(
        f"{folder} must be a checkpoint: it has no config.json",
        got=_listing(names),
        fix="give the folder with config.json"
        if names
        else f"download the model into it: hf download NAME --local-dir {shlex.quote(str(folder))}",
    )


def no_safetensors(folder: Path, expected: str) -> CheckpointError:
    """The error for a folder with config.json and without weights in safetensors files of the right names."""
    names = _names(folder)
    other = _other_format(folder, names)
    if other is not None:
        return other
    pickles = [name for name in names if Path(name).suffix in _PICKLES]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        fix = "load them with the program that wrote them, and save the model: model.save_pretrained(FOLDER)"
        if any(name.startswith("pytorch_model") for name in pickles):  # transformers finds no others
            source, output = _quoted(folder), _beside(folder, "safetensors")
            command = _python(
                "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T",
                f"M.from_pretrained({source}).save_pretrained({output})",
                f"T.from_pretrained({source}).save_pretrained({output})" if _has_tokenizer(folder) else "",
            )
            fix = f"convert them, if you trust them: {command}"
        return CheckpointError(
            "the weights must be safetensors: reading a pickle can run code", got=", ".join(pickles), fix=fix
        )
    return CheckpointError(
        f"the checkpoint {folder} must contain weights",
        got=_listing(names),
        expected=expected,
        fix="download the files with weights, and their index",
    )


def adapter(folder: Path) -> CheckpointError:
    """The error for a LoRA adapter, or for weights with an adapter that is not merged."""
    base = _base_model(folder)
    source, output = _quoted(folder), _beside(folder, "merged")
    tokenizer = source if _has_tokenizer(folder) else json.dumps(base)
    command = _python(
        "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T",
        f"M.from_pretrained({source}).merge_and_unload().save_pretrained({output})",
        f"T.from_pretrained({tokenizer}).save_pretrained({output})",
    )
    return CheckpointError(
        "the checkpoint must be a whole model, not a LoRA adapter",
        got=f"an adapter of {base} (base_model_name_or_path)",
        fix=f"merge it into its base model, and give the result: pip install peft; {command}",
    )


def _other_format(folder: Path, names: Sequence[str]) -> CheckpointError | None:
    """The error for files of another format or library; None if there are none."""
    if _ADAPTER in names:
        return adapter(folder)
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return _gguf(folder, gguf)
    original = [name for name in names if name.startswith("consolidated.") and name.endswith(".pth")]
    if "params.json" in names and original:
        return CheckpointError(
            "the checkpoint must be in the Hugging Face format, not in Llama's original one",
            got=", ".join(["params.json", *original]),
            fix="download the model's Hugging Face format, or convert it with transformers' script: "
            f"python {_LLAMA_SCRIPT} --input_dir {shlex.quote(str(folder))} --model_size SIZE --output_dir "
            "FOLDER",
        )
    for name, kind in _OTHER_LIBRARIES.items():
        if name in names:
            return CheckpointError(
                "the checkpoint must be a causal language model",
                got=f"{kind} ({name})",
                fix="give the folder of a model that generates text",
            )
    return None


def _gguf(folder: Path, names: Sequence[str]) -> CheckpointError:
    arguments = f"{_quoted(folder)}, gguf_file={json.dumps(names[0])}"
    output = _beside(folder, "from-gguf")
    command = _python(
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T",
        f'm = M.from_pretrained({arguments}, dtype="float32")',
        'vars(m.config).pop("quantization_config", None)',  # else it cannot be saved
        "n = M.from_config(m.config)",
        "n.load_state_dict(m.state_dict())",
        f"n.save_pretrained({output})",
        f"T.from_pretrained({arguments}).save_pretrained({output})",
    )
    return CheckpointError(
        "the checkpoint must be in the Hugging Face format, not GGUF",
        got=_listing(names),
        fix="take the checkpoint that it was made from, which its model card names as base_model. Or convert "
        f"it back, with the loss of its quantisation: pip install gguf accelerate; {command}",
    )


def _base_model(folder: Path) -> str:
    """base_model_name_or_path of the adapter, or a placeholder."""
    try:
        value = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        value = None
    return value if isinstance(value, str) and value else "BASE_MODEL"


def _inner_configs(folder: Path) -> list[Path]:
    """config.json of the folders inside, and of snapshots in a folder of the hub's cache."""
    try:
        return [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    except OSError:
        return []


def _names(folder: Path) -> list[str]:
    """Names of the files and folders in it, without hidden ones.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {folder} must be readable: {reason_of(error)}",
            fix="change the permissions of the folder",
        ) from error


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in _TOKENIZERS)


def _quoted(folder: Path) -> str:
    """Its path as a string of Python."""
    return json.dumps(str(folder))


def _beside(folder: Path, suffix: str) -> str:
    """The path of a folder beside it, as a string of Python."""
    return json.dumps(f"{folder.resolve()}-{suffix}")


def _python(*statements: str) -> str:
    """The shell command that runs Python statements."""
    return f"python -c {shlex.quote('; '.join(statement for statement in statements if statement))}"
