"""Conversion of tokenizer.model and of vocab.json with merges.txt to tokenizer.json."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer_shapes import TEXT, shapes
from tokenizers import Tokenizer

from kvexport.build.text_files import TEXTS
from kvexport.errors import CheckpointError
from kvexport.model import tokenizer_json as module
from kvexport.model.tokenizer_json import NoTokenizer, has_source, tokenizer_json

LLAMA = {"model_type": "llama"}
ADDED = {"3": {"content": "<|user|>", "special": True}}
Make = Callable[..., Path]


def sentencepiece_model(**options: Any) -> bytes:
    """A trained tokenizer.model like Llama's: BPE with byte fallback, text as it is."""
    from sentencepiece import SentencePieceTrainer

    file = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 640,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
        **options,
    }
    lines = [line for text in TEXT for line in text.replace("\t", "\n").split("\n") if line]
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=file, **settings)
    return file.getvalue()


@pytest.fixture(scope="module")
def llama_model() -> bytes:
    return sentencepiece_model()


@pytest.fixture(scope="module")
def gemma_model() -> bytes:
    """No space before a text; other ids of special tokens."""
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    return sentencepiece_model(add_dummy_prefix=False, user_defined_symbols=["<start_of_turn>"], **ids)


@pytest.fixture
def folder(tmp_path: Path) -> Make:
    """`folder(config, settings=None, **files) -> Path`: config, tokenizer_config.json and other files."""

    def write(config: dict[str, Any], settings: dict[str, Any] | None = None, **files: bytes | str) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        if settings is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        for name, content in files.items():
            path = tmp_path / name.replace("_", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


def vocabulary(tokenizer: str) -> dict[str, str]:
    """vocab.json and merges.txt of a byte-level tokenizer.json."""
    model = json.loads(tokenizer)["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        "vocab_json": json.dumps(model["vocab"]),
        "merges_txt": "\n".join(["#version: 0.2", *merges, ""]),
    }


def refused(path: Path, *parts: str) -> NoTokenizer:
    with pytest.raises(NoTokenizer) as caught:
        tokenizer_json(path)
    for part in parts:
        assert part in str(caught.value)
    return caught.value


@pytest.mark.parametrize("model", ["llama_model", "gemma_model"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma"])
@pytest.mark.parametrize("name", [None, "LlamaTokenizer", "GemmaTokenizer"])
def test_a_sentencepiece_model_gives_the_ids_of_sentencepiece(
    request: pytest.FixtureRequest, folder: Make, model: str, model_type: str, name: str | None
) -> None:
    """For every class that transformers may choose, although some of them give other ids."""
    from sentencepiece import SentencePieceProcessor

    raw = request.getfixturevalue(model)
    settings = None if name is None else {"tokenizer_class": name}
    path = folder({"model_type": model_type}, settings, tokenizer_model=raw)
    tokenizer = Tokenizer.from_str(tokenizer_json(path))
    reference = SentencePieceProcessor(model_proto=raw)
    for text in TEXTS:
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert tokenizer.encode(text).ids == [reference.bos_id(), *ids]


def test_merges_are_ordered_by_score(folder: Make, llama_model: bytes) -> None:
    """As in the models of Llama and Mistral, whose runs of spaces have the lowest score and early ids."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from transformers import AutoTokenizer

    model = sentencepiece_model_pb2.ModelProto.FromString(llama_model)
    for piece in model.pieces:
        if len(piece.piece) > 1 and set(piece.piece) == {"▁"}:
            piece.score = -1e9
    raw = model.SerializeToString()
    path = folder(LLAMA, {"tokenizer_class": "LlamaTokenizer"}, tokenizer_model=raw)
    tokenizer, reference = Tokenizer.from_str(tokenizer_json(path)), SentencePieceProcessor(model_proto=raw)
    texts = [*TEXTS, *(before + " " * count + "a" for count in range(40) for before in ("", "a", "\n"))]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == reference.encode(text)
    by_id = AutoTokenizer.from_pretrained(path)
    assert by_id.encode("a  spaces", add_special_tokens=False) != reference.encode("a  spaces")


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_sentencepiece_model_gives_the_ids_of_transformers(
    folder: Make, llama_model: bytes, add_bos: bool
) -> None:
    from transformers import AutoTokenizer

    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos, "added_tokens_decoder": ADDED}
    path = folder(LLAMA, settings, tokenizer_model=llama_model)
    tokenizer, expected = Tokenizer.from_str(tokenizer_json(path)), AutoTokenizer.from_pretrained(path)
    texts = [text for text in TEXTS if not text.startswith(" ")]
    assert len(texts) > 10
    for text in texts:  # before the others transformers 5 puts no space, but SentencePiece does
        assert tokenizer.encode(text).ids == expected.encode(text)
    assert "<|user|>" in tokenizer.encode("hi<|user|>").tokens
    assert tokenizer.token_to_id("<|user|>") == expected.convert_tokens_to_ids("<|user|>")


def test_a_setting_without_a_space_before_a_text_is_kept(folder: Make, llama_model: bytes) -> None:
    path = folder(LLAMA, {"add_prefix_space": False}, tokenizer_model=llama_model)
    tokenizer = Tokenizer.from_str(tokenizer_json(path))
    assert tokenizer.encode("Hello world").tokens[1:3] == ["<0x48>", "e"]
    assert tokenizer.decode(tokenizer.encode(" Hello").ids) == " Hello"


@pytest.mark.parametrize(
    ("shape", "model_type", "name"),
    [("gpt2", "gpt2", None), ("gpt2", "llama", "GPT2Tokenizer"), ("qwen", "qwen2", None)],
)
def test_a_vocabulary_with_merges_gives_the_original_ids(
    folder: Make, shape: str, model_type: str, name: str | None
) -> None:
    from transformers import AutoTokenizer

    original = shapes()[shape][0]
    settings = None if name is None else {"tokenizer_class": name}
    path = folder({"model_type": model_type}, settings, **vocabulary(original), added_tokens_json="{}")
    tokenizer, expected = Tokenizer.from_str(tokenizer_json(path)), Tokenizer.from_str(original)
    transformers = AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        ids = expected.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert tokenizer.encode(text).ids == transformers.encode(text)


def test_added_tokens_are_kept(folder: Make) -> None:
    files = vocabulary(shapes()["gpt2"][0])
    path = folder({"model_type": "gpt2"}, **files)
    (path / "added_tokens.json").write_text('{"<|im_start|>": 700}')
    vocab = json.loads(files["vocab_json"])
    vocab |= {f"unused{index}": index for index in range(len(vocab), 700)}
    (path / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = Tokenizer.from_str(tokenizer_json(path))
    assert tokenizer.encode("hi<|im_start|>").ids[-1] == 700


def test_own_tokenizer_json_is_taken_as_it_is(folder: Make, llama_model: bytes) -> None:
    path = folder(LLAMA, tokenizer_model=llama_model, tokenizer_json='{"anything":\r\n1}')
    assert tokenizer_json(path) == '{"anything":\r\n1}'
    (path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json must be UTF-8"):
        tokenizer_json(path)


def test_a_changed_file_is_converted_again(folder: Make, llama_model: bytes, gemma_model: bytes) -> None:
    first = tokenizer_json(folder(LLAMA, tokenizer_model=llama_model))
    assert tokenizer_json(folder(LLAMA, tokenizer_model=gemma_model)) != first


# Refusals


def test_refuses_a_checkpoint_without_tokenizer_files(folder: Make) -> None:
    path = folder(LLAMA)
    assert not has_source(path)
    refused(path, "has no tokenizer.json", "tokenizer.model, or vocab.json with merges.txt")


@pytest.mark.parametrize("package", ["transformers", "sentencepiece"])
def test_names_the_command_that_installs_a_missing_package(
    folder: Make, llama_model: bytes, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    error = refused(folder(LLAMA, tokenizer_model=llama_model), f"needs the package {package}")
    assert error.fix == "pip install 'kvexport[convert]'"


@pytest.mark.parametrize("content", [b"", b"not a model", b"IQ== 0\nIg== 1\n"])  # the last one: tiktoken
def test_refuses_a_damaged_sentencepiece_model(folder: Make, content: bytes) -> None:
    refused(folder(LLAMA, tokenizer_model=content), "tokenizer.model must be a SentencePiece model")


def test_refuses_a_conversion_with_other_ids(folder: Make) -> None:
    """SentencePiece drops spaces of this model; no tokenizer.json that is tried does."""
    raw = sentencepiece_model(remove_extra_whitespaces=True)
    refused(folder(LLAMA, tokenizer_model=raw), "must give the token ids of SentencePiece", "before, between")


def test_refuses_a_vocabulary_of_an_unknown_class(folder: Make) -> None:
    files = vocabulary(shapes()["gpt2"][0])
    refused(folder(LLAMA, **files), "transformers must be able to convert", "tokenizer_class")
    other = folder(LLAMA, {"tokenizer_class": "LlamaTokenizer"}, **files)
    refused(other, "must have its tokens", "'<|endoftext|>' is None, not 0")


def test_refuses_a_conversion_that_loses_text(folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    original = shapes()["gpt2"][0]
    lossy = json.dumps({**json.loads(original), "pre_tokenizer": None})
    monkeypatch.setattr(module, "_converted", lambda folder, defaults: lossy)
    refused(folder({"model_type": "gpt2"}, **vocabulary(original)), "must encode text without loss")


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json", "config.json", "merges.txt"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"null", b'{"a": 1e999}', b"[" * 10_000])
def test_odd_files_raise_checkpoint_errors(folder: Make, name: str, content: bytes) -> None:
    path = folder({"model_type": "gpt2"}, **vocabulary(shapes()["gpt2"][0]))
    (path / name).write_bytes(content)
    try:
        Tokenizer.from_str(tokenizer_json(path))
    except CheckpointError as error:
        assert str(path) in str(error)


def test_code_of_the_checkpoint_is_not_run(folder: Make, llama_model: bytes) -> None:
    settings = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Own"}
    trap = "import pathlib; pathlib.Path(__file__).with_name('sprung').touch()\nclass Tokenizer: pass\n"
    path = folder({"model_type": "own"}, settings, tokenizer_model=llama_model, code_py=trap)
    refused(path, "transformers must be able to convert")
    assert not (path / "sprung").exists()
