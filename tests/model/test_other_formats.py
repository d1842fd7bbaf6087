"""The advice for paths that are no checkpoint with safetensors weights, from every command."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvexport.cli import commands
from kvexport.errors import CheckpointError, KvexportError
from kvexport.model import reference
from kvexport.model.checkpoint import Checkpoint
from kvexport.model.loader import load_decoder

Make = Callable[..., Path]
HUB = "meta-llama/Llama-3.2-1B"


def refused(path: Path, *parts: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        list(load_decoder(path).layers)
    for part in parts:
        assert part in str(caught.value)
    return caught.value


def messages(path: Path | str, folder: Path) -> list[str]:
    """The errors of every command that takes a checkpoint."""
    text = folder / "text.txt"
    text.write_text("text")
    out = folder / "out"
    every = [
        ["plan", path],
        ["build", path, "-o", out],
        ["compress", path, "-o", out],
        ["calibrate", path, "-o", out],
        ["analyze", path, "-o", folder / "page.html"],
        ["evaluate", folder, "--against", path, "--text", text],
    ]
    found = []
    for arguments in every:
        result = CliRunner().invoke(commands, [str(each) for each in arguments])
        assert isinstance(result.exception, KvexportError), arguments
        assert result.exception.exit_code == 2
        found.append(str(result.exception))
    return found


def logits(path: Path) -> torch.Tensor:
    return reference.forward(load_decoder(path), torch.arange(3, 19)[None])


def run(command: str) -> None:
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True)


# One message from all commands


@pytest.mark.parametrize("name", [HUB, f"https://huggingface.co/{HUB}"])
def test_a_name_of_the_hub_is_downloaded_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    every = messages(name, tmp_path)
    assert len(set(every)) == 1
    assert "looks like the name of a model on the Hugging Face hub" in every[0]
    assert f"hf download {HUB} --local-dir Llama-3.2-1B" in every[0]


def test_a_path_with_an_existing_folder_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta-llama").mkdir()
    assert "hub" not in str(refused(Path(HUB), "must be a folder", HUB))


@pytest.mark.parametrize("kind", ["empty", "gguf", "adapter", "llama", "diffusers", "unreadable"])
def test_every_command_says_the_same(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    files = {
        "empty": [],
        "gguf": ["model.Q4_K_M.gguf"],
        "adapter": ["adapter_config.json", "adapter_model.safetensors"],
        "llama": ["params.json", "consolidated.00.pth", "tokenizer.model"],
        "diffusers": ["model_index.json"],
        "unreadable": ["config.json/"],
    }
    for name in files[kind]:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("{}")
    assert len(set(messages(folder, tmp_path))) == 1


# What each says


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "it has no config.json", "an empty folder", f"--local-dir {tmp_path}")


def test_a_folder_of_folders_names_them(tmp_path: Path, llama_folder: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    shutil.copytree(llama_folder, snapshot)
    refused(snapshot.parents[1], "folders inside have", f"give one of them, such as {snapshot}")
    assert logits(snapshot).isfinite().all()


def test_a_file_of_the_checkpoint_names_its_folder(llama_folder: Path) -> None:
    refused(llama_folder / "model.safetensors", "must be a folder", f"give the folder: {llama_folder}")


@pytest.mark.parametrize("config", [True, False])
def test_a_gguf_file_names_the_original(tmp_path: Path, llama_folder: Path, config: bool) -> None:
    file = tmp_path / "model.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    if config:
        shutil.copyfile(llama_folder / "config.json", tmp_path / "config.json")
    for path in (file, tmp_path):
        error = refused(path, "not GGUF", "model.Q4_K_M.gguf", "base_model", "gguf_file=", "AutoTokenizer")
        assert error.fix is not None and shlex.split(error.fix[error.fix.index("python -c") :])


def test_weights_beside_a_gguf_file_are_read(llama_folder: Path, edit_checkpoint: Make) -> None:
    path = edit_checkpoint(llama_folder)
    (path / "model.gguf").write_bytes(b"GGUF")
    assert torch.equal(logits(path), logits(llama_folder))


@pytest.mark.parametrize("config", ["{", "[]", '{"base_model_name_or_path": 3}', "[" * 10_000])
def test_an_odd_adapter_still_gets_the_advice(tmp_path: Path, config: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    refused(tmp_path, "not a LoRA adapter", "BASE_MODEL", "merge_and_unload")


@pytest.mark.slow
def test_suggested_command_merges_an_adapter(tmp_path: Path, tiny_checkpoint: Make) -> None:
    from peft import LoraConfig, get_peft_model
    from support.tiny_bundles import byte_level_tokenizer
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokens = Tokenizer.from_str(byte_level_tokenizer()).get_vocab_size()  # peft fits the embedding to it
    base = tiny_checkpoint("llama", vocab_size=tokens)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    error = refused(folder, "not a LoRA adapter", f"an adapter of {base}")
    assert error.fix is not None
    run(error.fix[error.fix.index("python -c") :])
    merged = Path(f"{folder}-merged")
    with torch.no_grad():
        expected = model.merge_and_unload()(torch.arange(3, 19)[None]).logits
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert not torch.allclose(logits(merged), logits(base), atol=1e-2)
    assert (merged / "tokenizer.json").exists()


def test_original_llama_files_name_the_script(tmp_path: Path) -> None:
    for name in ("params.json", "consolidated.00.pth", "consolidated.01.pth"):
        (tmp_path / name).write_text("{}")
    refused(tmp_path, "consolidated.01.pth", "convert_llama_weights_to_hf.py", f"--input_dir {tmp_path}")


@pytest.mark.parametrize(
    ("name", "kind"), [("model_index.json", "diffusers"), ("modules.json", "sentence-transformers")]
)
def test_models_of_other_libraries(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_text("{}")
    refused(tmp_path, "must be a causal language model", kind)


def test_shards_without_an_index_are_listed(tmp_path: Path, llama_folder: Path) -> None:
    shutil.copyfile(llama_folder / "config.json", tmp_path / "config.json")
    save_file({"x": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "training_args.bin").write_bytes(b"")
    refused(tmp_path, "must contain weights", "model-00001-of-00002.safetensors", "and their index")


# Odd files and folders


def test_loops_and_dangling_links(tmp_path: Path, llama_folder: Path, edit_checkpoint: Make) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    refused(loop, "must be a folder")
    for name, parts in (
        ("config.json", ["config.json"]),
        ("model.safetensors", ["must contain weights"]),
    ):
        path = edit_checkpoint(llama_folder)
        for target in (path / name, path / "nowhere"):
            (path / name).unlink()
            (path / name).symlink_to(target)
            refused(path, *parts)


@pytest.mark.parametrize("name", ["a\nb", "a'b", 'a"b', "a b; touch x", "ä\u2028", "-o"])
def test_names_with_odd_characters(tmp_path: Path, llama_folder: Path, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(llama_folder, folder)
    assert torch.equal(logits(folder), logits(llama_folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = refused(folder, "pickle")
    assert error.fix is not None
    (code,) = shlex.split(error.fix[error.fix.index("python -c") :])[2:]
    compile(code, "fix", "exec")
    assert json.dumps(str(folder)) in code


def test_names_that_the_system_refuses(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b", "\ud800"):
        refused(tmp_path / name)


def test_unreadable_folders_and_files(
    llama_folder: Path, edit_checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edit_checkpoint(llama_folder)
    checkpoint = Checkpoint(path)

    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("is_dir", "exists", "read_text"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, denied)
            with pytest.raises(CheckpointError, match="Permission denied"):
                Checkpoint(path)
    for name in ("exists", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, denied)
            with pytest.raises(CheckpointError, match="Permission denied"):
                _ = checkpoint.files
    (path / "config.json").unlink()
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Checkpoint(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
def test_denied_permissions(llama_folder: Path, edit_checkpoint: Make, name: str) -> None:
    path = edit_checkpoint(llama_folder)
    mode = (path / name).stat().st_mode
    (path / name).chmod(0)
    try:
        refused(path, "Permission denied")
    finally:
        (path / name).chmod(mode)


LLAMA = {"model_type": "llama"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.sampled_from(["model-1.safetensors", "model-2.safetensors", "config.json", "..", "a\0", "x" * 300])
TENSORS = st.sampled_from(["model.embed_tokens.weight", "a", ""])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(TENSORS, NAMES | JSON)}))
@example(
    index={"weight_map": {"model.embed_tokens.weight": "model-1.safetensors", "a\nb": "model-1.safetensors"}}
)
def test_any_index_is_read_or_refused(tmp_path: Path, index: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    save_file({"model.embed_tokens.weight": torch.zeros(1)}, tmp_path / "model-1.safetensors")
    (tmp_path / "model-2.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    try:
        assert Checkpoint(tmp_path).files
    except CheckpointError as error:
        assert error.what


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=JSON | st.fixed_dictionaries({}, optional={"eos_token_id": JSON, "bos_token_id": JSON}),
    generation=JSON | st.fixed_dictionaries({}, optional={"eos_token_id": JSON}),
)
def test_any_token_ids_are_read_or_refused(tmp_path: Path, config: object, generation: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    try:
        for name in ("eos_token_id", "bos_token_id"):
            assert all(0 <= each < 67 for each in Checkpoint(tmp_path).token_ids(name, 67))
    except CheckpointError as error:
        assert error.what


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(max_size=64) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_header_is_read_or_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path).find_prefix("embed_tokens.weight", ["model."])


@pytest.fixture
def llama_folder(tiny_checkpoint: Make) -> Path:
    return tiny_checkpoint("llama")


def test_files_are_those_of_the_weights(llama_folder: Path) -> None:
    files = Checkpoint(llama_folder).files
    assert set(files) == set(load_file(llama_folder / "model.safetensors"))
