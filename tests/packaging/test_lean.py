"""An environment with only the packages of runtime.txt runs bundles and names missing packages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest
from support.decoders import make_decoder
from support.tiny_bundles import byte_level_tokenizer, decoder_with_fewer_heads, write_bundle
from support.validated_bundles import export

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parents[2]
ABSENT = (
    "torch",
    "transformers",
    "sentencepiece",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "ml_dtypes",
    "safetensors",
    "huggingface_hub",
    "networkx",
    "psutil",
    "jinja2",
    "google.protobuf",
    "packaging",
    "polygraphy",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "pip",
    "setuptools",
)
MOST_BYTES = 150_000_000


def pinned(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


class Lean:
    """An environment of its own."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        (self.site,) = folder.glob("lib/python*/site-packages")
        self.python = folder / "bin" / "python"
        self._folder = folder

    def add(self, name: str) -> None:
        """Copy the files of an installed package, without bytecode."""
        found = distribution(name)
        for file in found.files or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                target = self.site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                source = found.locate_file(file)
                try:
                    os.link(str(source), target)
                except OSError:  # another file system
                    shutil.copyfile(str(source), target)

    def bytes(self) -> int:
        """Of the packages."""
        return sum(each.stat().st_size for each in self.site.rglob("*") if each.is_file())

    def run(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            [str(self.python), *map(str, arguments)],
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=300,
            env={"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        )
        assert ran.returncode == code and "Traceback" not in ran.stderr, (
            arguments,
            ran.returncode,
            ran.stdout,
            ran.stderr,
        )
        return ran

    def kvexport(self, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "kvexport", *arguments, code=code)


@pytest.fixture(scope="module")
def lean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Lean:
    made = Lean(tmp_path_factory.mktemp("lean") / "venv")
    for name in pinned(CHECKOUT / "runtime.txt"):
        made.add(name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made.site)
    return made


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tiny_checkpoint("llama", num_key_value_heads=4, vocab_size=320, eos_token_id=None)
    folder = tmp_path_factory.mktemp("lean-bundle")
    decoder = decoder_with_fewer_heads(checkpoint)
    return write_bundle(
        folder / "text", decoder, capacity=96, tokenizer=byte_level_tokenizer(), self_test=True
    )


def test_only_the_runtime_is_there_and_it_is_small(lean: Lean) -> None:
    look = f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n.split('.')[0])])"
    assert lean.run("-c", look).stdout == "[]\n"
    assert lean.bytes() < MOST_BYTES
    for name in ("numpy", "onnxruntime", "tokenizers"):  # a control of the measure
        assert (
            sum(each.stat().st_size for each in (lean.site / name).rglob("*") if each.is_file()) > 5_000_000
        )


def test_pins_are_those_that_the_tests_pass_with() -> None:
    pins, passed = pinned(CHECKOUT / "runtime.txt"), pinned(CHECKOUT / "constraints.txt")
    assert all(passed.get(name, version) == version for name, version in pins.items())
    assert (
        {"numpy", "click", "rich", "tokenizers", "onnxruntime"} <= pins.keys() <= pins.keys() | passed.keys()
    )


def test_what_only_reads_a_bundle_or_the_machine(lean: Lean, bundle: Path) -> None:
    demo = CHECKOUT / "models" / "demo" / "config.json"
    help_text = lean.kvexport("--help").stdout
    commands = re.findall(r"^  (\S+)  ", help_text.partition("Commands:")[2], re.M)
    assert {"run", "build", "doctor"} <= set(commands)
    for command in commands:
        assert lean.kvexport(command, "--help").stdout.startswith("Usage: kvexport")
    assert "decoder.onnx.data" in lean.kvexport("inspect", bundle).stdout
    assert lean.kvexport("inspect", "--verify", bundle).stdout
    assert json.loads(lean.kvexport("doctor", "--json").stdout)
    assert "KV" in lean.kvexport("plan", demo, "--target", "orin-nano-8gb").stdout
    assert "KV" in lean.kvexport("plan", bundle, "--target", "orin-nano-8gb").stdout
    assert "orin-nano" in lean.kvexport("targets").stdout


def test_bundles_run(lean: Lean, bundle: Path, tmp_path: Path) -> None:
    said = lean.kvexport("run", bundle, "--prompt", "Once upon", "--max-new-tokens", "8", "--quiet").stdout
    assert said.startswith("Once upon") and len(said) > len("Once upon\n")
    cache = tmp_path / "cache"
    assert "wrote" in lean.kvexport("run", bundle, "--prompt", "Once upon", "--save-cache", cache).stderr
    rest = lean.kvexport(
        "run", bundle, "--prompt", "", "--cache", cache, "--max-new-tokens", "8", "--quiet"
    ).stdout
    assert f"Once upon{rest}" == said
    assert json.loads(lean.kvexport("self-test", bundle, "--json").stdout)["verdict"] == "ok"
    figures = lean.kvexport(
        "bench", bundle, "--prompt-tokens", "16", "--depth", "0", "--new-tokens", "4", "--json"
    ).stdout
    assert json.loads(figures.splitlines()[0])
    code = f"""
import kvexport, sys
with kvexport.open({str(bundle)!r}, provider="cpu", threads=1) as session:
    cache = session.new_cache()
    made = session.generate("Once upon", max_new_tokens=4, cache=cache)
    cache.save({str(tmp_path / "c")!r})
    rest = session.generate("", max_new_tokens=4, cache=session.load({str(tmp_path / "c")!r}))
    print("Once upon" + made.text + rest.text)
heavy = set({ABSENT}) & set(sys.modules)
assert not heavy, heavy
"""
    assert lean.run("-c", code).stdout == said


BUILDERS: dict[str, tuple[str, ...]] = {
    "build": ("--demo", "-o", "out"),
    "compress": ("MODEL", "-o", "out", "--kv-ratio", "0.5"),
    "calibrate": ("MODEL", "-o", "out"),
    "analyze": ("MODEL", "-o", "out.html"),
    "evaluate": ("BUNDLE", "--against", "MODEL", "--text", "TEXT"),
    "validate": ("PROVED",),
    "lint": ("BUNDLE", "--target", "orin-nano-8gb"),
    "engine": ("BUNDLE", "--target", "orin-nano-8gb"),
}


@pytest.mark.parametrize("verb", BUILDERS)
def test_what_builds_names_the_extra_to_install(verb: str, lean: Lean, bundle: Path, tmp_path: Path) -> None:
    named = {
        "MODEL": CHECKOUT / "models" / "demo",
        "BUNDLE": bundle,
        "TEXT": CHECKOUT / "README.md",
        "PROVED": tmp_path / "proved",
    }
    if verb == "validate":
        export(named["PROVED"], make_decoder("llama", layers=1))
    ran = lean.kvexport(verb, *(named.get(each, each) for each in BUILDERS[verb]), code=3)
    wanted = r"onnx onnx-ir" if verb == "lint" else r".*'kvexport\[(convert|convert,cpu|tensorrt|rtx)\]'"
    assert re.search(rf"fix: .*pip install {wanted}", ran.stderr), ran.stderr
    assert not (lean._folder / "out").exists()
