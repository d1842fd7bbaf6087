"""The quality benchmark on a tiny random llama: rows, equal bytes, resuming, offsets, predictions,
reports."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support.decoders import with_attention
from support.tiny_bundles import byte_level_tokenizer

from kvexport.model.decoder import Attention
from kvexport.model.rotation import rotary_tables, rotate

pytestmark = pytest.mark.slow

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
quality, rows_module, measure, long, table, records = (
    importlib.import_module(name)
    for name in ("quality", "quality_rows", "quality_measure", "quality_long", "quality_table", "records")
)
Measure = Callable[..., dict[str, Any]]
HEADS, LENGTH, LONG = 4, 16, 256


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of four KV heads with a tokenizer."""
    folder = tmp_path_factory.mktemp("quality") / "tiny"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=324, num_key_value_heads=HEADS), folder)
    (folder / "tokenizer.json").write_text(byte_level_tokenizer(), encoding="utf-8")
    return folder


def _text(path: Path, seed: int, characters: int = 1200) -> Path:
    chance = random.Random(seed)
    path.write_text("".join(chance.choices("abcdefgh ", k=characters)), encoding="utf-8")
    return path


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Measure:
    """`run(*arguments)`: the record of a run with two texts, few windows and the arguments given."""
    texts = [f"{name}={_text(tmp_path / f'{name}.txt', seed)}" for seed, name in enumerate(("one", "two"))]

    def measured(*arguments: str, expect: int = 0) -> dict[str, Any]:
        given = [
            str(checkpoint),
            "--text",
            texts[0],
            "--text",
            texts[1],
            "--length",
            str(LENGTH),
            "--windows",
            "4",
            "--samples",
            "8",
            "--calibration-length",
            "32",
            "--long",
            str(LONG),
            "--output",
            str(tmp_path / "out" / "record"),
            *arguments,
        ]
        if expect:
            with pytest.raises(SystemExit) as stopped:
                quality.main(given)
            assert stopped.value.code == expect
            return {}
        quality.main(given)
        return _record(tmp_path)

    return measured


def _record(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8")))


def _kl(record: dict[str, Any], key: str, text: str = "one") -> float:
    return float(record["rows"][key]["texts"][text]["mean_kl"])


def test_rows_are_complete_and_cache_at_most_their_share(run: Measure, tmp_path: Path) -> None:
    only = (
        "auto",
        "auto-free",
        "fold-plain",
        "online-plain",
        "svd-a",
        "mean-pool",
        "palu",
        "kq-svd",
        "aligned-mean",
    )
    record = run("--ratios", "1/2", "1/3", "--only", *only, f"auto-{LONG} 1/2")
    left_out = {f"{name} 1/3" for name in ("fold-plain", "online-plain", "svd-a", "mean-pool")}
    wanted = [f"{name} 1/2" for name in (only[0], f"auto-{LONG}", *only[1:])] + [
        f"{name} 1/3" for name in only
    ]
    assert set(record["left_out"]) == left_out  # 1/3 of 4 heads is no number of heads
    assert list(record["rows"]) == [key for key in wanted if key not in left_out]
    trained = record["original"]["kv_numbers"]
    assert trained == 2 * 2 * HEADS * 8 and record["original"]["texts"]["one"]["mean_kl"] == 0
    for key, row in record["rows"].items():
        over, under = map(int, row["ratio"].split("/"))
        assert row["kv_numbers"] <= trained * over / under and row["share"] == row["kv_numbers"] / trained
        for figures in row["texts"].values():
            assert (
                0 < figures["mean_kl"] < 20
                and 0 < figures["top1_agreement"] <= 1
                and figures["tokens"] == 4 * (LENGTH - 1)
            )
            assert figures["perplexity"] == pytest.approx(math.exp(figures["cross_entropy"]))
        assert (
            row["macs_per_cached_token"] > 0
            and row["macs_per_new_token"] > 0
            and row["parameters"] > 0
            and row["seconds"] >= 0
        )
        assert len(row["layers"]) == (0 if row["name"] in ("palu", "kq-svd", "aligned-mean") else 2), key
        assert sum(
            each["num_key_value_heads"] * (each["key_head_dim"] + each["value_head_dim"])
            for each in row["layers"]
        ) in (
            0,
            row["kv_numbers"],
        )
    for name in ("fold-plain", "online-plain", "svd-a", "mean-pool", "palu", "aligned-mean"):
        assert record["rows"][f"{name} 1/2"]["kv_numbers"] == trained / 2
    assert (
        record["rows"]["palu 1/2"]["macs_per_cached_token"]
        > record["rows"]["svd-a 1/2"]["macs_per_cached_token"]
    )

    text = (tmp_path / "out" / "record.md").read_text(encoding="utf-8")
    for key, row in record["rows"].items():
        section = text.split(f"## {row['ratio']} of the KV numbers")[1].split("## ")[0]
        assert len([line for line in section.splitlines() if line.startswith(f"| {row['name']} |")]) == 1, key
    assert all(f"- `{key}`: --kv-ratio must give a number of KV heads" in text for key in left_out)
    assert f"{_kl(record, 'mean-pool 1/2') / _kl(record, 'svd-a 1/2'):.3f}, " in text
    for line in (each for each in text.splitlines() if each.startswith("|  |")):
        following = text.split(line + "\n")[1].split("\n\n")[0].splitlines()
        assert {each.count("|") for each in following} == {line.count("|")}

    chart = ElementTree.parse(tmp_path / "out" / "record.svg").getroot()
    dots = list(chart.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 2 * len(record["rows"]) + 2  # and two in the key


def test_every_ablation_changes_the_model(run: Measure) -> None:
    record = run("--ratios", "1/2", "--only", "plain-*", "group-*", "auto-uniform", "fold-plain")
    names = {key.split(" ")[0] for key in record["rows"]}
    parts = {"plain-unweighted", "plain-no-gain", "plain-uncentred", "plain-adjacent", "plain-no-refit"}
    parts |= {"plain-near-1", "plain-near-16", "plain-near-4096"}
    assert names == parts | {"fold-plain", "group-2", "group-4", "auto-uniform"}
    assert list(record["left_out"]) == ["group-8 1/2"]
    assert len({row["kv_numbers"] for row in record["rows"].values()}) == 1
    plain = _kl(record, "fold-plain 1/2")
    assert _kl(record, "group-2 1/2") == plain  # the same model
    for name in names - {"fold-plain", "group-2", "plain-near-16"}:  # windows have 16 tokens here
        assert _kl(record, f"{name} 1/2") != pytest.approx(plain, rel=1e-4), name
    widths = {
        (each["kv_numbers"], tuple(layer["key_head_dim"] for layer in each["layers"]))
        for each in record["rows"].values()
    }
    assert {width for _, width in widths} >= {(8, 8), (16, 16)}
    uniform = record["rows"]["auto-uniform 1/2"]["layers"]
    assert {each["num_key_value_heads"] * each["key_head_dim"] for each in uniform} == {16}


def test_an_interrupted_run_keeps_its_rows_and_resumes_with_the_rest(
    run: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ("--ratios", "1/2", "--only", "online-plain", "svd-*", "mean-pool")
    made: list[str] = []
    figures_of = quality.figures_of

    def killed(bench: Any, row: Any, tasks: Any) -> Any:
        if row.name == "svd-w" and not made[-1:] == ["again"]:
            raise KeyboardInterrupt
        made.append(row.name)
        return figures_of(bench, row, tasks)

    monkeypatch.setattr(quality, "figures_of", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*only)
    assert made == ["online-plain", "svd-a"]
    before = _record(tmp_path)
    assert list(before["rows"]) == ["online-plain 1/2", "svd-a 1/2"]

    made.append("again")
    record = run(*only, "--resume")
    assert made[3:] == ["svd-w", "mean-pool"]
    assert list(record["rows"]) == [f"{n} 1/2" for n in ("online-plain", "svd-a", "svd-w", "mean-pool")]
    assert {key: record["rows"][key] for key in before["rows"]} == before["rows"] and record[
        "original"
    ] == before["original"]
    made.clear()
    assert run(*only, "--resume")["rows"] == record["rows"] and made == []
    run("--ratios", "1/2", "--only", "svd-a")  # without --resume all is measured again
    assert made == ["svd-a"] and list(_record(tmp_path)["rows"]) == ["svd-a 1/2"]


def test_rows_of_other_settings_are_not_mixed(
    run: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--resume", "--only", "nothing", expect=2)
    assert "is no record to go on with" in capsys.readouterr().err
    run("--only", "nothing")
    run("--only", "nothing", "--resume")
    run("--only", "nothing", "--resume", "--windows", "3", expect=2)
    assert "texts" in capsys.readouterr().err
    monkeypatch.setattr(quality, "source_digest", lambda: "other")
    run("--only", "nothing", "--resume", expect=2)
    assert "code_sha256" in capsys.readouterr().err
    run("--text", "unnamed", expect=2)
    assert "NAME=FILE" in capsys.readouterr().err


def test_a_code_of_few_positions_fails_far_away_and_a_folded_one_does_not(
    run: Measure, tmp_path: Path
) -> None:
    record = run("--only", "long-*")
    found = {key: each["kl"]["one"] for key, each in record["rows"].items()}
    assert list(found) == ["long-trained", f"long-online-{LENGTH}", f"long-online-{LONG}", "long-fold"]
    assert record["rows"]["long-fold"]["offsets"] == [0, LONG - LENGTH]
    assert max(found["long-trained"]) < 1e-6  # an offset changes nothing of the trained model
    fold, near, wide = found["long-fold"], found[f"long-online-{LENGTH}"], found[f"long-online-{LONG}"]
    assert fold[1] == pytest.approx(fold[0], rel=1e-2) and fold[0] > 1e-4
    assert near[1] > 1.2 * near[0]  # the control: the measure does see what does not hold
    assert wide[1] < near[1] and wide[0] > near[0]
    ElementTree.parse(tmp_path / "out" / "record-long.svg")
    assert "## Far into the context" in (tmp_path / "out" / "record.md").read_text(encoding="utf-8")


def test_a_window_at_an_offset_equals_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    bench = measure.Bench(
        checkpoint, quality.recipe_for("self", 8, 32), {"one": _text(tmp_path / "t.txt", 1)}, LENGTH, 2
    )
    text = bench.texts["one"]
    torch.testing.assert_close(long.stream_at(bench.decoder, text.windows, 0), text.original)
    choice, offset = long.chosen("online", 0.5)(bench, bench.calibration()), 40
    decoder, _ = bench.convert(choice.layer_plans)
    found = long.stream_at(decoder, text.windows, offset)
    width, rope = decoder.layers[0].attention.head_dim, decoder.layers[0].attention.rope
    tables = rotary_tables(rope, torch.full((1, width), offset), torch.float32)
    turn = rotate(torch.eye(width)[None, None], tables)[0, 0]  # a code met after a turn is a turned code

    def turned(attention: Attention) -> Attention:
        key_map = (turn @ attention.key_map.unflatten(1, (-1, width))).flatten(1, 2)
        return dataclasses.replace(attention, key_map=key_map, query_map=turn @ attention.query_map)

    same = measure.Made.of(with_attention(decoder, turned)).run(text.windows)
    torch.testing.assert_close(found, same, rtol=1e-3, atol=1e-3)
    assert (found - long.stream_at(decoder, text.windows, 0)).abs().max() > 0.05
    assert long.offsets(256, 4096) == [0, 256, 512, 1024, 2048, 3840] and long.offsets(256, 300) == [0, 44]


def test_tasks_are_measured_for_the_rows_of_their_table(run: Measure, tmp_path: Path) -> None:
    items = [{"goal": "a b", "sol1": "c d", "sol2": "e f g"}, {"goal": "h", "sol1": "a", "sol2": "b"}]
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    (tmp_path / "valid-labels.lst").write_text("0\n1\n", encoding="utf-8")
    hay = _text(tmp_path / "hay.txt", 5, 3000)
    record = run("--ratios", "1/2", "1/1", "--only", "svd-a", "--piqa", str(tmp_path), "--passkey", str(hay))
    assert record["original"]["tasks"]["piqa"]["items"] == 2
    assert "nothing to lose" in record["original"]["tasks"]["passkey"]["skipped"]
    assert record["rows"]["svd-a 1/2"]["tasks"]["piqa"]["items"] == 2
    assert record["rows"]["svd-a 1/2"]["tasks"]["passkey"]["accuracy"] is None
    assert "tasks" not in record["rows"]["svd-a 1"]
    text = (tmp_path / "out" / "record.md").read_text(encoding="utf-8")
    assert "| PIQA | passkey |" in text and "the original finds the key in 0% of the trials" in text


def test_bounds_and_healing(run: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "HEAL_SAMPLES", 8)
    record = run(
        "--ratios",
        "1/2",
        "--max-kl",
        "0.3",
        "1e-9",
        "--heal",
        "5",
        "--only",
        "max-kl*",
        "*healed*",
    )
    for name, bound in (("max-kl-0.3", 0.3), ("max-kl-1e-09", 1e-9)):
        row = record["rows"][name]
        assert row["kept"] == {text: each["mean_kl"] <= bound for text, each in row["texts"].items()}
    assert record["rows"]["max-kl-0.3"]["share"] < record["rows"]["max-kl-1e-09"]["share"] == 1
    for name in ("auto-healed-5 1/4", "fold-plain-healed-5 1/2"):
        row = record["rows"][name]
        assert row["unhealed"].keys() == row["texts"].keys() and row["healing"]["steps"] == 5
        if row["healing"]["best_step"]:
            assert row["texts"] != row["unhealed"]
    text = (tmp_path / "out" / "record.md").read_text(encoding="utf-8")
    assert all(title in text for title in ("## Healing", "## A bound on the loss"))
    choices = record["predictions"]["choices"]["one"]
    assert choices["points"] == 2  # both bounds


def test_rank_correlation() -> None:
    points = [(1.0, 2.0), (2.0, 8.0), (2.0, 5.0), (9.0, 30.0)]
    assert table.spearman([(a, 3 * a) for a in range(5)]) == pytest.approx(1)
    assert table.spearman([(a, -a) for a in range(5)]) == pytest.approx(-1)
    assert table.spearman(points) == pytest.approx(0.9486832980505138)  # scipy.stats.spearmanr
    assert math.isnan(table.spearman([(1.0, 2.0), (2.0, 2.0)]))


def test_predictions_count_converted_layers_only(run: Measure) -> None:
    record = run("--ratios", "1/2", "1/4", "--only", "auto", "svd-a", "palu")
    found = record["predictions"]
    assert found["layers"]["points"] == sum(
        layer["method"] != "none" for row in record["rows"].values() for layer in row["layers"]
    )
    assert {ratio: each["points"] for ratio, each in found["layers_by_ratio"].items()}.keys() == {
        "1/2",
        "1/4",
    }
    assert found["choices"]["one"] == {"spearman": None, "points": 2}


@pytest.mark.parametrize(
    ("key", "patterns", "wanted"),
    [
        ("auto 1/2", None, True),
        ("auto 1/2", ["auto"], True),
        ("auto-free 1/2", ["auto"], False),
        ("auto 1/4", ["auto 1/2"], False),
        ("auto 1/4", ["* 1/4"], True),
        ("long-fold", ["long-*"], True),
        ("auto 1/2", [], False),
    ],
)
def test_chooses_rows_by_name(key: str, patterns: list[str] | None, wanted: bool) -> None:
    assert records.selected(key, patterns) is wanted
