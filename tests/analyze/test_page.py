"""The page as text: self-contained, complete, escaped, small, and written atomically."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from support.analyses import analysis_of

from kvexport.analyze import LayerAnalysis, render, require_page, save
from kvexport.analyze.charts import Axis, Line, from_zero, layer_axis, line_chart
from kvexport.analyze.maps import AttentionMaps
from kvexport.analyze.spectra import LayerSpectra, Spectrum
from kvexport.errors import UsageError


class Elements(HTMLParser):
    """Tags with their attributes, and the text of each element by its tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.tags if "id" in attributes}


def test_page_loads_nothing() -> None:
    page = render(analysis_of())
    for tag, attributes in Elements(page).tags:
        assert not {"src", "href", "srcset", "action", "data"} & attributes.keys(), (tag, attributes)
        assert tag not in ("link", "img", "iframe", "object")
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(|@import|url\(", page)
    assert "default-src 'none'" in page


def test_names_and_tokens_are_escaped() -> None:
    page = render(analysis_of(pairs=[(4, 4)]))
    assert page.count("</script>") == 2  # the data block's and the script's own
    assert "<b>" not in page.replace("<b>0.5</b>", "").replace("<b>0.25</b>", "")
    assert "tiny &lt;model&gt;" in page
    elements = Elements(page)
    assert any("·&amp;" in text or "·&" in text for _, text in elements.text)
    data = json.loads(next(text for tag, text in elements.text if text.startswith('{"attention"')))
    assert data["attention"]["tokens"][4] == " </script><b>"


def test_has_only_sections_with_data() -> None:
    alone = Elements(render(analysis_of()))
    assert {"summary", "spectra", "similarity", "prediction", "attention"} <= alone.ids()
    assert not {"sensitivity", "pairs"} & alone.ids()
    records = [{"layer": i, "key": 0.01 * i, "value": 0.002} for i in range(3)]
    both = Elements(render(analysis_of(pairs=[(3, 1), (5, 5)], sensitivity=records)))
    assert {"sensitivity", "pairs"} <= both.ids()
    found = analysis_of()
    kept = [
        dataclasses.replace(layer.report, predicted_error=0.0, measured_error=0.0) for layer in found.layers
    ]
    layers = tuple(
        LayerAnalysis(layer.spectra, report) for layer, report in zip(found.layers, kept, strict=True)
    )
    assert "prediction" not in Elements(render(dataclasses.replace(found, layers=layers))).ids()


@pytest.mark.parametrize(
    ("style", "named"),
    [("bloom", ["keys", "values"]), ("qwen3", ["keys before RoPE", "keys after RoPE", "values"])],
)
def test_shows_keys_before_and_after_rope(style: str, named: list[str]) -> None:
    elements = Elements(render(analysis_of(style)))
    captions = [text for tag, text in elements.text if tag == "figcaption"][: len(named)]
    assert captions == [name[0].upper() + name[1:] for name in named]


def test_json_equals_the_data_of_the_page() -> None:
    found = analysis_of(pairs=[(3, 1)], sensitivity=[{"layer": 0, "key": 1.0, "value": 2.0}])
    data = json.loads(json.dumps(found.to_json()))
    assert data["kv_ratio"] == 0.5
    assert data["sensitivity"] == [{"layer": 0, "key": 1.0, "value": 2.0}]
    assert "sensitivity" not in analysis_of().to_json()
    layer = data["layers"][1]
    assert layer["tightness"] == pytest.approx(0.3 / 0.25)
    values = layer["spectra"]["key_after_rope"]["singular_values"]
    assert len(values) == 32 and values == sorted(values, reverse=True)
    assert layer["spectra"]["value"]["effective_rank"].keys() == {"0.9", "0.95", "0.99"}
    assert layer["similarity"]["key"][2][2] == 1.0
    pair = data["attention"]["pairs"][0]
    assert pair["original"][2][3] == pytest.approx(float(found.maps.original[2][3, 3, 1]))


def test_every_select_and_canvas_has_a_label() -> None:
    elements = Elements(render(analysis_of()))
    assert all(attributes.get("aria-label") for tag, attributes in elements.tags if tag in ("canvas",))
    charts = [attributes for tag, attributes in elements.tags if tag == "svg"]
    assert all(attributes.get("aria-label") or attributes.get("aria-hidden") for attributes in charts)


def test_a_model_of_32_layers_and_32_heads_stays_below_six_megabytes() -> None:
    tokens = [" token"] * 48
    small = analysis_of(tokens=tokens)
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(32, 48, 48, generator=generator)
    values = torch.linspace(1, 1e-4, 4096, dtype=torch.float64)
    similarity = torch.rand(32, 32, generator=generator)
    spectra = LayerSpectra(
        dict.fromkeys(small.layers[0].spectra.spectra, Spectrum(values)),
        {"key": similarity, "value": similarity},
    )
    layers = (LayerAnalysis(spectra, small.layers[0].report),) * 32
    page = render(dataclasses.replace(small, layers=layers, maps=AttentionMaps((maps,) * 32, (maps,) * 32)))
    assert len(page.encode()) < 6_000_000


def test_page_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, path = render(analysis_of()), tmp_path / "page.html"
    save(page, path, force=False)
    assert path.read_text(encoding="utf-8") == page
    save(page + " ", path, force=True)
    assert path.read_text(encoding="utf-8") == page + " "

    def full(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        save(page, path, force=True)
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
    assert path.read_text(encoding="utf-8") == page + " "


def test_keeps_existing_files(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render(analysis_of()))
    (tmp_path / "model.safetensors").write_bytes(b"\xff weights")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="must not exist yet"):
        require_page(tmp_path / "page.html", force=False)
    require_page(tmp_path / "page.html", force=True)
    for other in ("model.safetensors", "dangling", "."):
        with pytest.raises(UsageError, match="must be a page of kvexport analyze"):
            require_page(tmp_path / other, force=True)
    with pytest.raises(UsageError, match="folder"):
        require_page(tmp_path / "absent" / "page.html", force=False)


def test_charts_place_their_points() -> None:
    chart = line_chart(
        "a & b", layer_axis(3), Axis("error", 0, 1), [Line([(0, 0), (1, 0.5), (2, 1)], 1)], reference=0.5
    )
    assert 'aria-label="a &amp; b"' in chart
    places = re.findall(r"([\d.]+) ([\d.]+)", re.search(r'class="line s1"><path d="M([^"]+)"', chart)[1])  # type: ignore[index]
    xs, ys = ([float(place[i]) for place in places] for i in (0, 1))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] > ys[1] > ys[2]
    assert f'class="reference" d="M62 {ys[1]}H' in chart


def test_axes() -> None:
    assert from_zero("x", [0.231]).ticks() == [0, 0.05, 0.1, 0.15, 0.2, 0.25]
    assert from_zero("x", [0.0]).high == 1.0
    assert layer_axis(1).ticks() == [0]
    assert layer_axis(6).ticks() == [0, 2, 4]
    log = Axis("x", 1e-5, 1, log=True)
    assert [log.place(tick) for tick in log.ticks()] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
