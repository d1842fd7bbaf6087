"""docs/families.md is what its script writes, and shows all families, features and refusals."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from support.documents import ROOT, script_of

from kvexport.model.families import families
from kvexport.model.unsupported import FEATURES

PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
OUT_OF_DATE = "docs/families.md is out of date; run: python docs/scripts/families.py"


@pytest.fixture(scope="module")
def script() -> Any:
    """docs/scripts/families.py as a module."""
    return script_of("families")


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in line.split(" | ")]
        for line in re.findall(r"^\| (.*) \|$", section, re.M)[2:]
    ]


def test_the_page_is_up_to_date(script: Any) -> None:
    assert script.page() == PAGE, OUT_OF_DATE


def test_every_model_type_has_a_row_and_a_measured_parity_error() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text(encoding="utf-8"))
    assert {row[0].strip("`") for row in rows("Supported")} == families().keys() == record["rows"].keys()
    for row in record["rows"].values():
        assert max(row["at_once"], row["step_by_step"]) < 1e-9


def test_a_model_type_without_a_record_is_named(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "families", lambda: {**families(), "new": families()["llama"]})
    with pytest.raises(SystemExit, match=r"not new; run: .*--measure"):
        script.page()


def test_every_reason_for_a_refusal_is_on_the_page() -> None:
    assert [row[0] for row in rows("Refused")] == [feature.name for feature in FEATURES]


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        (
            "cohere2",
            ("parallel block", "interleaved pairs", "layers without rotation", "windows in some layers"),
        ),
        ("gemma2", ("attention softcap", "logit softcap", "before and after", "1 + w")),
        ("gpt_neox", ("25% of a head rotates", "repeated KV heads")),
        ("mpt", ("ALiBi", "clipped projections (some)", "refused: clipped projections (mpt-7b-storywriter)")),
        ("opt", ("learned positions", "after additions")),
        ("qwen3", ("QK-norm", "refused: QK-norm", "RoPE scaling (llama3, yarn)", "original 32")),
        ("granite", ("multipliers (embeddings, residuals, logits)", "own attention scale", "fewer KV heads")),
    ],
)
def test_features_of_a_family(model_type: str, words: tuple[str, ...]) -> None:
    row = next(row for row in rows("Supported") if row[0] == f"`{model_type}`")
    for word in words:
        assert any(word in cell for cell in row), (word, row)
    other = next(row for row in rows("Supported") if row[0] == "`llama`")
    assert not any(words[0] in cell for cell in other)


def test_windows_save_what_their_layers_do_not_cache() -> None:
    """Gemma 3 1B: 4 of 26 layers cache 32,768 tokens, the others 512 + 128, of one head 256 wide."""
    row = next(row for row in rows("What windows gain") if row[0] == "Gemma-3-1B")
    token = 2 * 256 * 2  # bytes
    expected = (22 * (512 + 128) + 4 * 32768) * token
    assert row[-1] == f"{expected / 2**20:.1f} MiB ({26 * 32768 * token / 2**20:.1f} MiB)"
