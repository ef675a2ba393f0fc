"""The page of a report in a real browser: what it shows, how it is used, how large and fast it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from analysis.report import build_report
from analysis.report.page import page
from tests.analysis.report.browser import Browser, chromium
from tests.analysis.report.large import large_study
from tests.analysis.studies import Study, diverge

needs_browser = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@pytest.fixture(scope="module")
def small(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's shape, one cell of which diverged."""
    gone = study.wide["key"] == "neox-s int3 b64"
    assert gone.sum() == 1
    report = build_report(diverge(study, gone).wide, study.long, study.samples, title="demo <b>")
    path = tmp_path_factory.mktemp("small") / "index.html"
    path.write_text(page(report))
    return path


def problems(browser: Browser) -> list[str]:
    """What a page complained of, and what it wanted from a network."""
    said = [e["params"] for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    return [*map(str, said), *(url for url in asked if not url.startswith(("file:", "data:", "blob:")))]


@needs_browser
def test_every_number_of_the_table_arrives(browser: Browser, small: Path, study: Study) -> None:
    browser.open(small)
    read = """(() => { const s = window.page.study, m = s.metrics[0];
      return Array.from({length: s.rows}, (_, r) => [s.text("model", r), s.text("label", r),
        s.value(m, r), s.stderr(m, r),
        s.number("total_bits", r), s.number("bits_per_param", r), s.change(m, r), s.text("state", r)]); })()"""
    rows = {(model, label): rest for model, label, *rest in browser.run(read)}
    wide = study.wide.set_index(["model", "label"])
    assert set(rows) == set(wide.index)
    base = wide[wide["bits"] == 16].groupby("model")["jargon_loss"].first()
    for (model, label), (loss, error, total, per_param, change, state) in rows.items():
        cell = wide.loc[(model, label)]
        if (model, label) == ("neox-s", "int3 b64"):
            assert (loss, state) == (None, "diverged")
            continue
        assert loss == pytest.approx(cell["jargon_loss"], abs=5.1e-5)
        assert error == pytest.approx(cell["jargon_loss_stderr"], abs=5.1e-5)
        assert total == pytest.approx(cell["total_bits_nominal"], rel=1e-4)
        assert per_param == pytest.approx(cell["bits_per_param_nominal"], abs=5.1e-4)
        assert change == pytest.approx(cell["jargon_loss"] - base[model], abs=1.1e-4)
    assert not problems(browser)
    assert browser.run("document.querySelector('h1').textContent") == "demo <b>"


@needs_browser
def test_a_browser_without_decompression_reads_the_same(browser: Browser, small: Path) -> None:
    losses = "Array.from({length: page.study.rows}, (_, r) => page.study.value(page.study.metrics[0], r))"
    browser.open(small)
    native = browser.run(losses)
    browser.open(small, before="delete globalThis.DecompressionStream")
    assert browser.run("typeof DecompressionStream") == "undefined"
    assert browser.run(losses) == native


@needs_browser
def test_filters_choose_cells_and_leave_the_baselines(browser: Browser, small: Path, study: Study) -> None:
    browser.open(small)
    for value in ("float", "dynamic", "quantile"):
        browser.run(
            "[...document.querySelectorAll('[data-facet=dtype]')]"
            f".find(t => t.parentElement.textContent.trim() === '{value}').click()"
        )
    kept = browser.run("Array.from(page.study.chosen, r => page.study.text('dtype', r))")
    wide = study.wide
    assert sorted(kept) == sorted(["int"] * int((wide["dtype"] == "int").sum()) + ["—"] * 3)
    assert f"{len(kept)} of {len(wide)} cells" in browser.run("document.querySelector('.count').textContent")
    browser.run("document.querySelector('[data-none=model]').click()")
    assert browser.run("page.study.chosen.length") == 0
    assert not problems(browser)


@needs_browser
def test_the_pointer_and_the_keyboard_ask_what_a_marker_is(browser: Browser, small: Path) -> None:
    browser.open(small)
    x, y, row = browser.run(
        "(() => { const c = page.charts[0], b = c.canvas.getBoundingClientRect(), p = c.points.at(-1);"
        "scrollTo(0, b.top + scrollY); const n = c.canvas.getBoundingClientRect();"
        "return [n.left + p.px, n.top + p.py, p.row]; })()"
    )
    browser.move(x, y)
    tip = browser.run("document.getElementById('tip').innerText")
    assert browser.run(f"page.study.text('model', {row})") in tip
    assert "95 % interval" in tip
    assert "cell=" in tip
    browser.run("page.charts[0].leave(); page.charts[0].canvas.focus()")
    browser.press("ArrowRight", 2)
    first = browser.run("(() => { const p = page.charts[0].points[1]; return page.study.text('label', p.row); })()")
    assert first in browser.run("document.getElementById('tip').innerText")
    browser.press("Escape")
    assert browser.run("document.getElementById('tip').hidden")
    # A diverged cell has an open marker on the edge, and is counted below.
    assert "1 diverged" in browser.run("document.querySelector('#scaling .said').textContent")


@needs_browser
def test_the_page_is_used_by_keyboard_alone(browser: Browser, small: Path) -> None:
    browser.open(small)
    visited = []
    for _ in range(60):
        browser.press("Tab")
        visited.append(
            browser.run("(e => e.className || e.dataset.set || e.dataset.facet || e.tagName)(document.activeElement)")
        )
    assert visited[0] == "skip"
    assert {"metric", "x", "colour", "cut", "dtype", "bits"} <= set(visited)
    browser.run("document.querySelector('[data-facet=bits]').focus()")
    before = browser.run("page.study.chosen.length")
    browser.press(" ")
    assert browser.run("page.study.chosen.length") < before


@needs_browser
def test_the_table_sorts_searches_and_copies(browser: Browser, small: Path, study: Study) -> None:
    browser.open(small)
    browser.run("document.querySelector('[data-column=jargon_loss]').click()")
    browser.run("document.querySelector('[data-column=jargon_loss]').click()")
    cells = "[...document.querySelectorAll('#table tbody tr')].map(r => [...r.children].map(c => c.textContent))"
    shown = browser.run(cells)
    column = browser.run(
        "[...document.querySelectorAll('#table thead th')].findIndex(t => t.ariaSort === 'descending')"
    )
    losses = [float(row[column]) for row in shown]
    assert losses == sorted(losses, reverse=True)
    worst = study.wide.loc[study.wide["key"] != "neox-s int3 b64", "jargon_loss"].max()
    assert losses[0] == pytest.approx(worst, abs=1e-4)
    browser.run(
        "(i => { i.value = 'neox-m quantile4'; i.dispatchEvent(new Event('input')); })"
        "(document.querySelector('[type=search]'))"
    )
    wide = study.wide
    matching = wide[(wide["model"] == "neox-m") & wide["label"].str.contains("quantile4")]
    assert browser.run("document.querySelectorAll('#table tbody tr').length") == len(matching)
    lines = browser.run("page.table.tsv()").split("\n")
    assert len(lines) == len(matching) + 1
    assert {line.split("\t")[1] for line in lines[1:]} == set(matching["label"])


@needs_browser
def test_a_long_metrics_values_stand_in_sight(browser: Browser, study: Study, tmp_path: Path) -> None:
    named = {c: c.replace("jargon_loss", "commoncrawl_sample_loss") for c in study.wide}
    report = build_report(study.wide.rename(columns=named), study.long, {}, title="demo")
    path = tmp_path / "index.html"
    path.write_text(page(report))
    browser.open(path)
    head = "document.querySelector('[data-column=commoncrawl_sample_loss]').closest('th').getBoundingClientRect().right"
    assert browser.run(head) <= browser.run("document.querySelector('#table .scroll').getBoundingClientRect().right")


@needs_browser
def test_a_phone_scrolls_in_one_direction_only(browser: Browser, small: Path, tmp_path: Path) -> None:
    browser.resize(390, 800)
    try:
        browser.open(small)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        widths = browser.run("page.charts.map(c => c.canvas.getBoundingClientRect().width)")
        assert all(300 < w <= 390 for w in widths)
        assert browser.picture(tmp_path / "phone.png").stat().st_size > 20_000
    finally:
        browser.resize(1280, 900)


@needs_browser
def test_markers_differ_in_shape_as_well_as_colour(browser: Browser, small: Path) -> None:
    browser.open(small)
    for column in ("bits", "dtype", "blocksize", "model"):
        looks = browser.run(f"looksOf(page.study, '{column}')")
        assert len({(look["shape"], tuple(look["dash"])) for look in looks}) == len(looks)
        assert len({look["colour"] for look in looks}) == len(looks)


class Texts(HTMLParser):
    """Text of elements, by tag."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.found = "", {"p": [], "li": [], "script": []}  # type: ignore[var-annotated]

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.now = tag

    def handle_data(self, data: str) -> None:
        self.found.setdefault(self.now, []).append(data)


def test_findings_stand_in_the_page_without_a_script(small: Path, study: Study) -> None:
    text = small.read_text()
    texts = Texts()
    texts.feed(text)
    assert any("Data types at 4 bits" in item for item in texts.found["li"])
    assert (
        text.index('id="findings"')
        < text.index('id="figures"')
        < text.index('id="cells"')
        < text.index('id="provenance"')
    )
    assert "demo &lt;b&gt;" in text


def test_a_page_loads_nothing(small: Path) -> None:
    text = small.read_text()
    assert "default-src 'none'" in text
    assert "http://" not in text
    assert "https://" not in text


def test_the_same_data_give_the_same_page(study: Study) -> None:
    one, two = (page(build_report(study.wide, study.long, study.samples, title="demo")) for _ in range(2))
    assert one == two


@pytest.mark.slow
@needs_browser
def test_thirty_five_thousand_cells_are_small_and_fast(tmp_path: Path) -> None:
    wide, long = large_study(cells=35_000)
    path = tmp_path / "index.html"
    path.write_text(page(build_report(wide, long, title="paper_all")))
    assert path.stat().st_size <= 2_000_000
    with Browser() as browser:
        browser.open(path)
        paint, loaded = browser.run(
            "[performance.getEntriesByType('paint').find(p => p.name === 'first-contentful-paint').startTime,"
            "performance.now()]"
        )
        assert paint < 1000
        assert loaded < 2000
        for name in ("options", "dtype", "blocksize", "model"):
            browser.run(f"(b => b && b.click())(document.querySelector('[data-all={name}]'))")
        assert browser.run("page.study.chosen.length") == 35_000
        times = []
        for _ in range(5):
            browser.run("document.querySelector('[data-facet=bits]').click()")
            times.append(browser.run("page.took"))
        assert np.median(times) < 100
        assert not problems(browser)


def test_what_there_is_no_room_for_is_named(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.report.cells.MOST_BYTES", 2000)
    report = build_report(study.wide, study.long, title="demo")
    assert report.cells.metrics[0]["column"] == "jargon_loss"
    assert report.cells.left_out
    assert all(name in page(report) for name in report.cells.left_out)
    heads = json.loads(page(report).split('id="report-head">')[1].split("</script>")[0])["columns"]
    assert not {h["name"] for h in heads} & set(report.cells.left_out)
