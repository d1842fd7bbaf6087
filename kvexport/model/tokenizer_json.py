"""tokenizer.json of a checkpoint: its own, or one that is converted from tokenizer.model or vocab.json.

transformers converts. Its result is used only if it gives the token ids of the files that it came from.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvexport.errors import CheckpointError
from kvexport.model.checkpoint import read_json
from kvexport.packages import install_command

TOKENIZER_FILE = "tokenizer.json"
_SENTENCEPIECE = "tokenizer.model"
_VOCABULARY, _MERGES = "vocab.json", "merges.txt"
_CONFIG, _SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
_SOURCES = (_SENTENCEPIECE, _VOCABULARY, _MERGES, "added_tokens.json", _SPECIAL_TOKENS, _CONFIG)
_NORMAL = 1  # type of a piece that text is split into
_SAMPLES = (
    "Once upon a time there was a café.",
    " spaces  before, between and after ",
    "a\nb\n\n\tc\r\n",
    "def f(x):\n    if x:\n        return 1   # 3\n" + " " * 37,
    "It's 12345 and 3.14; <tag> {1: 'a'} # (b|c)",
    "日本語の文。中文，你好！ Привет, мир! שלום हिन्दी",
    "🙂 👩\u200d👧 “what”?! …",
)


class NoTokenizer(CheckpointError):
    """The checkpoint has no tokenizer.json, and none can be converted from its other files."""


def tokenizer_json(folder: Path) -> str:
    """The text of a checkpoint's tokenizer.json.

    If there is no such file, it is converted from tokenizer.model (SentencePiece), or from vocab.json and
    merges.txt, with the settings of tokenizer_config.json. Nothing is downloaded, and no code of the
    checkpoint is run.

    Raises:
        NoTokenizer: there is none of these files, a package is missing, or the conversion is not exact.
        CheckpointError: tokenizer.json is not UTF-8 text.
    """
    path = folder / TOKENIZER_FILE
    if path.is_file():
        try:
            return path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{path} must be UTF-8 text: {error}", fix="download the model's tokenizer.json again"
            ) from error
    if not has_source(folder):
        raise NoTokenizer(
            f"the checkpoint has no {TOKENIZER_FILE}",
            expected=f"{TOKENIZER_FILE}, {_SENTENCEPIECE}, or {_VOCABULARY} with {_MERGES}",
            fix="add the model's tokenizer files",
        )
    changed = tuple(path.stat().st_mtime_ns for name in _SOURCES if (path := folder / name).exists())
    return _convert(folder, changed)


def has_source(folder: Path) -> bool:
    """Whether a checkpoint has files that a tokenizer.json can be converted from."""
    pair = (folder / _VOCABULARY, folder / _MERGES)
    return (folder / _SENTENCEPIECE).is_file() or all(path.is_file() for path in pair)


@lru_cache(maxsize=1)
def _convert(folder: Path, changed: tuple[int, ...]) -> str:
    """Convert the tokenizer of a folder; `changed` are the times when its files were written."""
    if (folder / _SENTENCEPIECE).is_file():
        return _from_sentencepiece(folder)
    return _from_vocabulary(folder)


def _from_sentencepiece(folder: Path) -> str:
    path = folder / _SENTENCEPIECE
    settings = {**_optional_json(folder / _SPECIAL_TOKENS), **_optional_json(folder / _CONFIG)}
    model = _read_sentencepiece(path)
    model.normalizer_spec.add_dummy_prefix &= settings.get("add_prefix_space") is not False
    reference = _processor(model, path)
    ids = {"bos": reference.bos_id(), "eos": reference.eos_id(), "unk": reference.unk_id()}
    defaults: dict[str, Any] = {
        f"{name}_token": reference.id_to_piece(index) for name, index in ids.items() if index >= 0
    }
    # transformers 4 and the documentation of transformers 5 add a BOS by default; its code does not.
    defaults["add_bos_token"] = ids["bos"] >= 0
    converted = _converted(folder, {name: value for name, value in defaults.items() if name not in settings})
    difference = _difference(converted, reference)
    if difference is not None:
        converted = _as_sentencepiece(converted, model)
        difference = _difference(converted, reference)
    if difference is not None:
        raise NoTokenizer(
            f"{TOKENIZER_FILE} converted from {path} must give the token ids of SentencePiece",
            got=difference,
            fix=f"add the model's own {TOKENIZER_FILE}",
        )
    return converted


def _from_vocabulary(folder: Path) -> str:
    """Convert vocab.json and merges.txt. Byte-level text must come back unchanged, which shows that spaces
    and bytes are split as the vocabulary needs."""
    from tokenizers import Tokenizer

    text = _converted(folder, {})
    tokenizer = Tokenizer.from_str(text)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for token, index in read_json(folder / _VOCABULARY).items():
        if vocabulary.get(token) != index:
            raise NoTokenizer(
                f"{TOKENIZER_FILE} converted from {folder / _VOCABULARY} must have its tokens",
                got=f"{token!r} is {vocabulary.get(token)}, not {index!r}",
                fix=f"add the model's own {TOKENIZER_FILE}, or its {_CONFIG}",
            )
    for sample in _SAMPLES:
        decoded = tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False).ids)
        if "Ġ" in vocabulary and decoded != sample:
            raise NoTokenizer(
                f"{TOKENIZER_FILE} converted from {folder / _VOCABULARY} must encode text without loss",
                got=f"{decoded!r} for {sample!r}",
                fix=f"add the model's own {TOKENIZER_FILE}, or its {_CONFIG}",
            )
    return text


def _converted(folder: Path, defaults: Mapping[str, Any]) -> str:
    """tokenizer.json as transformers converts it, with `defaults` for settings that the folder lacks."""
    try:
        import transformers
    except ImportError as error:
        raise _missing("transformers") from error
    with quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **defaults
            )
            text: str = tokenizer.backend_tokenizer.to_str()
        except Exception as error:  # any class, from transformers and from what reads the files
            lines = str(error).strip().splitlines()
            raise NoTokenizer(
                f"transformers must be able to convert the tokenizer of {folder} to {TOKENIZER_FILE}",
                got=lines[0] if lines else type(error).__name__,
                fix=f"add the model's own {TOKENIZER_FILE}, or check tokenizer_class in {_CONFIG}",
            ) from error
    return text


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence the warnings and progress bars of transformers, which are about other uses of what it reads."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _missing(package: str) -> NoTokenizer:
    return NoTokenizer(
        f"converting the checkpoint's tokenizer to {TOKENIZER_FILE} needs the package {package}",
        fix=install_command(package),
    )


def _optional_json(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.exists() else {}


def _read_sentencepiece(path: Path) -> Any:
    """A tokenizer.model as a message of Protocol Buffers."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise _missing("sentencepiece") from error
    try:
        return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except Exception as error:  # a class of protobuf
        raise _damaged(path, error) from error


def _processor(model: Any, path: Path) -> Any:
    """SentencePiece's own tokenizer."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=model.SerializeToString())
    except Exception as error:  # RuntimeError, without a class of its own
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> NoTokenizer:
    return NoTokenizer(
        f"{path} must be a SentencePiece model",
        got=str(error).partition("\n")[0],
        fix=f"add the model's own {TOKENIZER_FILE}",
    )


def _as_sentencepiece(converted: str, model: Any) -> str:
    """tokenizer.json with the spaces and the order of merges of SentencePiece.

    transformers 5 orders merges by token id instead of by score, and its classes decide themselves whether a
    space is put before a text: some never, some not before a text that starts with one, some always.
    """
    raw = json.loads(converted)
    prefix = model.normalizer_spec.add_dummy_prefix
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    mark = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    before = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    raw["normalizer"] = {"type": "Sequence", "normalizers": [*before, space]}
    raw["pre_tokenizer"] = None
    decoders = [mark, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    raw["decoder"] = {"type": "Sequence", "decoders": decoders}
    if raw["model"].get("type") == "BPE":
        raw["model"]["merges"] = _merges(model)
    return json.dumps(raw, ensure_ascii=False)


def _merges(model: Any) -> list[list[str]]:
    """The merges of a BPE model, first ones first.

    SentencePiece merges the pair whose piece has the highest score, and the leftmost one of equal pairs. With
    longer pieces first among those of equal scores, which are runs of spaces, that is the leftmost one too.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    merges = [
        [piece[:at], piece[at:]]
        for piece in scores
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    return sorted(merges, key=lambda pair: (-scores[pair[0] + pair[1]], -len(pair[0])))


def _difference(text: str, reference: Any) -> str | None:
    """The first difference of a tokenizer.json from SentencePiece; None if there is none.

    Compared are the ids of all pieces that text consists of, and encoding and decoding of the samples.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    for index in range(reference.get_piece_size()):
        piece = reference.id_to_piece(index)
        special = reference.is_control(index) or reference.is_unknown(index) or reference.is_unused(index)
        if not special and tokenizer.token_to_id(piece) != index:
            return f"{piece!r} is {tokenizer.token_to_id(piece)}, not {index}"
    for sample in _SAMPLES:
        ids, expected = tokenizer.encode(sample, add_special_tokens=False).ids, reference.encode(sample)
        if ids != expected:
            return f"{ids[:8]} for {sample!r}, not {expected[:8]}"
        decoded = tokenizer.decode(ids)
        if decoded != reference.decode(ids):
            return f"{decoded!r} for {ids[:8]}, not {reference.decode(ids)!r}"
    return None
