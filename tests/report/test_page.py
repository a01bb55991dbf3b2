"""The page in a real browser: it opens, draws, turns dark, fits a phone, prints, obeys keys."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from droplens import report
from tests import samples

pytestmark = pytest.mark.browser

WIDE = {"width": 1280, "height": 900}
PHONE = {"width": 375, "height": 800}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    return report.write_page(samples.document(), path)


class Reader:
    """A page opened by a reader, with everything it complained of and asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path) -> "Reader":
        self.page.goto(path.as_uri())
        return self

    def scroll_through(self) -> "Reader":
        """Charts are drawn as they come near, so pass by them all."""
        for figure in self.page.query_selector_all("figure.chart"):
            figure.scroll_into_view_if_needed()
            self.page.wait_for_function(
                "figure => figure.querySelector('.interactive svg')", arg=figure
            )
        return self

    def style(self, selector: str, name: str) -> str:
        return str(
            self.page.eval_on_selector(
                selector, "(e, name) => getComputedStyle(e).getPropertyValue(name)", name
            )
        )


@pytest.fixture
def reader(browser: Any) -> Iterator[Callable[..., Reader]]:
    contexts = []

    def new(**options: Any) -> Reader:
        context = browser.new_context(**{"viewport": WIDE, "color_scheme": "light", **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        return Reader(context.new_page())

    yield new
    for context in contexts:
        context.close()


def test_opens_without_complaint_and_without_network(reader, written):
    seen = reader().open(written).scroll_through()
    assert seen.complaints == []
    assert seen.requests == [written.as_uri()]


def test_says_the_verdicts_first(reader, written):
    page = reader().open(written).page
    assert page.text_content("main h2") == "Verdicts"
    text = page.inner_text("#verdicts")
    for verdict in samples.verdicts():
        assert verdict.sentence in text
        assert verdict.rule in text
    proof = page.inner_text("#v-cost .proof").split("\n")
    assert proof[:6] == [
        "Measured",
        "0.2790 nats",
        "Threshold",
        "0 nats",
        "Standard error",
        "0.0016, over 300 masks",
    ]
    assert proof[6:8] == ["n", "300"]


def test_draws_every_chart(reader, written):
    page = reader().open(written).scroll_through().page
    count = len(page.query_selector_all("figure.chart"))
    assert count == len(samples.figures())
    marks = page.eval_on_selector_all(
        ".live .interactive svg",
        "all => all.map(svg => svg.querySelectorAll('.role-mark path, .role-mark line').length)",
    )
    boxes = page.eval_on_selector_all(
        ".live .interactive svg", "all => all.map(svg => svg.getBoundingClientRect().width)"
    )
    assert len(marks) == count
    assert min(marks) > 0
    assert min(boxes) > 500


def test_labels_axes_with_units(reader, written):
    page = reader().open(written).scroll_through().page
    titles = page.eval_on_selector_all(
        ".interactive .role-axis-title text", "all => all.map(text => text.textContent)"
    )
    assert {"spread (nats)", "loss (nats)", "radius (share of each weight's norm)"} <= set(titles)


def test_charts_answer_the_pointer(reader, written):
    seen = reader().open(written).scroll_through()
    seen.page.locator(".interactive .mark-rect path").first.hover()
    seen.page.wait_for_selector("#vg-tooltip-element.visible")
    assert "spread (nats)" in seen.page.inner_text("#vg-tooltip-element")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_toggles_the_theme_from_the_keyboard(reader, written, scheme):
    seen = reader(color_scheme=scheme).open(written).scroll_through()

    def looks() -> list[str]:
        return [
            seen.style("body", "background-color"),
            seen.style(".interactive .role-axis-label text", "fill"),
            seen.style(".interactive .mark-rect path", "fill"),
        ]

    before = looks()
    seen.page.focus("button.theme")
    seen.page.keyboard.press("Enter")
    after = looks()
    assert all(one != other for one, other in zip(before, after, strict=True))
    seen.page.keyboard.press("Space")
    assert looks() == before


def test_follows_the_system_theme(reader, written):
    light = reader(color_scheme="light").open(written).style("body", "background-color")
    dark = reader(color_scheme="dark").open(written).style("body", "background-color")
    assert light == "rgb(253, 252, 250)"
    assert dark == "rgb(20, 23, 27)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(reader, written, scheme):
    seen = reader(color_scheme=scheme).open(written)
    paper = _luminance(seen.style(":root", "--paper"))
    for name in ("--ink", "--ink-soft", "--accent", "--yes", "--no", "--open"):
        assert _contrast(paper, _luminance(seen.style(":root", name))) >= 4.5, name
    for k in range(1, 7):
        assert _contrast(paper, _luminance(seen.style(":root", f"--series-{k}"))) >= 3, k


@pytest.mark.parametrize("width", [375, 760, 1280])
def test_a_legend_of_long_names_is_shown_whole(reader, tmp_path, width):
    names = [f"sampled, keep 0.5, block {k}" for k in range(6)]
    curves = {name: report.Curve([0.0, 1.0, 2.0], [1.0 + k, 2.0, 3.0 + k]) for k, name in
              enumerate(names)}  # fmt: skip
    figure = report.lines(curves, title="Six lines", x="step", y="objective (squared)")
    document = report.Document("Legends", "", [], [report.Section("Lines", "", [figure])])
    path = report.write_page(document, tmp_path / "page.html")
    page = reader(viewport={"width": width, "height": 800}).open(path).scroll_through().page
    outside = page.eval_on_selector_all(
        ".interactive svg",
        """all => all.flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll(".role-legend-label text")]
                .filter(text => text.getBoundingClientRect().top < frame.top - 1
                             || text.getBoundingClientRect().right > frame.right + 1)
                .map(text => text.textContent);
        })""",
    )
    assert outside == []


def test_a_long_name_of_a_row_makes_room_for_its_numbers(reader, tmp_path):
    name = (
        "adaptive True, block 3, blocks [3], θ 0.7, values diag(0.735, 0.691, 0.603, 0.536, 0.18)"
    )
    columns = [report.Column("setting"), report.Column("measured"), report.Column("n")]
    table = report.Table(columns, [[name, 0.0963, 1]], caption="Objective ÷ bound")
    document = report.Document("Names", "", [], [report.Section("A claim", "", [table])])
    path = report.write_page(document, tmp_path / "page.html")
    page = reader(viewport={"width": 1200, "height": 800}).open(path).page
    hidden = page.eval_on_selector_all(
        ".scroll", "all => all.map(b => b.scrollWidth - b.clientWidth)"
    )
    assert max(hidden) <= 0


@pytest.mark.parametrize("width", [320, 375])
def test_fits_a_phone(reader, written, width):
    page = reader(viewport={"width": width, "height": 700}).open(written).scroll_through().page
    for summary in page.query_selector_all("summary"):
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.eval_on_selector_all(
        ".interactive svg",
        """all => all.flatMap(svg => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll("text")]
                .filter(text => text.getBoundingClientRect().right > frame.right + 1)
                .map(text => text.textContent);
        })""",
    )
    assert cut == []
    wide = page.eval_on_selector_all(
        ".scroll", "all => all.filter(box => box.scrollWidth > box.clientWidth).length"
    )
    assert wide > 0  # the sample's widest table scrolls in its own box
    beyond = page.eval_on_selector_all(
        "caption:not(.unseen), #not-measured td",
        """(all, width) => all.filter(cell => {
            const text = document.createRange();
            text.selectNodeContents(cell);
            return [...text.getClientRects()].some(line => line.right > width);
        }).map(cell => cell.textContent)""",
        width,
    )
    assert beyond == []  # a sentence is read without scrolling sideways


def test_tab_reaches_everything_in_order(reader, written):
    page = reader(viewport=PHONE).open(written).page
    reached: list[str] = []
    while reached.count("skip") < 2 and len(reached) < 100:
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.className || document.activeElement.localName,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.append(name)
        assert name == "body" or outline != "none", name
    assert reached[:2] == ["skip", "theme"]
    assert "scroll" in reached
    assert reached.count("summary") == len(samples.figures())


def test_skip_link_leads_to_the_verdicts(reader, written):
    page = reader().open(written).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    page.keyboard.press("Enter")
    assert page.url.endswith("#verdicts")


def test_prints_static_charts_on_white(reader, written):
    seen = reader(color_scheme="dark").open(written).scroll_through()
    pdf = seen.page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    seen.page.emulate_media(media="print")
    assert seen.style("body", "background-color") == "rgb(255, 255, 255)"
    assert seen.page.is_visible("figure .static svg")
    assert not seen.page.is_visible("figure .interactive svg")
    assert not seen.page.is_visible("button.theme")


def test_reads_without_scripts(reader, written):
    seen = reader(java_script_enabled=False).open(written)
    assert seen.page.locator("figure .static svg").count() == len(samples.figures())
    assert seen.page.locator("figure .static svg").first.is_visible()
    assert not seen.page.is_visible("button.theme")


def test_hostile_text_stays_text(reader, tmp_path):
    evil = "</script><script>alert('x')</script><img src=https://example.org/x onerror=alert(1)>"
    document = report.Document(
        title=evil,
        subtitle=evil,
        sections=[
            report.Section(
                evil,
                evil,
                [
                    report.dots({evil: [1.0, 2.0]}, title=evil, quantity=evil),
                    report.Table([report.Column(evil, evil)], [[evil]], caption=evil),
                ],
            )
        ],
        not_measured=[report.NotMeasured(evil, evil)],
        command=evil,
    )
    path = report.write_page(document, tmp_path / "evil.html")
    seen = reader().open(path).scroll_through()
    assert seen.complaints == []
    assert seen.requests == [path.as_uri()]
    assert seen.page.text_content("h1") == evil


def _luminance(colour: str) -> float:
    digits = colour.strip().lstrip("#")
    channels = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return math.fsum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one: float, other: float) -> float:
    low, high = sorted((one, other))
    return (high + 0.05) / (low + 0.05)
