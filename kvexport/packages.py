"""Python packages that kvexport imports, with their extras and minimum versions; setup.cfg has the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A package that kvexport imports.

    Attributes:
        name: its name on the package index.
        extra: the first extra of kvexport that installs it; None: kvexport itself does.
        minimum: the oldest version that kvexport works with.
        module: its import name.
        aliases: other names that it is distributed under.
    """

    name: str
    extra: str | None
    minimum: str
    module: str
    aliases: tuple[str, ...] = ()


_TABLE = (
    Package("numpy", None, "1.26", "numpy"),
    Package("click", None, "8.1", "click"),
    Package("rich", None, "13", "rich"),
    Package("tokenizers", None, "0.20", "tokenizers"),
    Package("tomli", None, "2", "tomli"),
    Package("torch", "convert", "2.6", "torch"),
    Package("jinja2", "convert", "3.1", "jinja2"),
    Package("networkx", "convert", "3", "networkx"),
    Package("safetensors", "convert", "0.4.5", "safetensors"),
    Package("onnx", "convert", "1.20", "onnx"),
    Package("onnx-ir", "convert", "1.0", "onnx_ir"),
    Package("ml_dtypes", "convert", "0.5", "ml_dtypes"),
    Package("psutil", "convert", "5.9", "psutil"),
    Package("transformers", "convert", "4.56", "transformers"),
    Package("sentencepiece", "convert", "0.2", "sentencepiece"),
    Package("peft", "heal", "0.13", "peft"),
    Package("onnxruntime", "cpu", "1.28", "onnxruntime"),
    Package("onnxruntime-gpu", "gpu", "1.28", "onnxruntime"),
    Package("cuda-bindings", "gpu", "12.6", "cuda"),
    Package("tensorrt", "tensorrt", "10.3", "tensorrt", ("tensorrt-cu13", "tensorrt-cu12")),
    Package("polygraphy", "tensorrt", "0.53.6", "polygraphy"),
    Package("tensorrt-rtx", "rtx", "1.7", "tensorrt_rtx"),
)
PACKAGES = {package.name: package for package in _TABLE}


def package_of(module: str) -> Package | None:
    """The package that provides a module, such as "onnx_ir" or "cuda.bindings"; None for any other module."""
    top = module.partition(".")[0]
    return next((package for package in _TABLE if package.module == top), None)


def install_command(*names: str) -> str:
    """The command that installs packages of `PACKAGES`, such as "pip install 'kvexport[convert,cpu]'"."""
    extras = dict.fromkeys(extra for name in names if (extra := PACKAGES[name].extra) is not None)
    return f"pip install 'kvexport[{','.join(extras)}]'" if extras else "pip install kvexport"
