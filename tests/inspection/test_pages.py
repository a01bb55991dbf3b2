"""The pages of an inspection and a comparison, opened as a reader would."""

import pytest

import droplens as dl
from tests.inspection.test_inspect import data, loss, network, quick

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    sets = {"with": [network(0.5, s) for s in (0, 1)], "without": [network(0.0, s) for s in (2, 3)]}
    compared = dl.compare(sets, data(), loss, held_out=data(9), draws=5, directions=2, seed=0)
    return {
        "inspection": quick(network(), data()).to_html(folder / "inspection.html"),
        "comparison": compared.to_html(folder / "comparison.html"),
    }


@pytest.mark.parametrize("kind", ["inspection", "comparison"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_opens_draws_and_fits(browser, pages, kind, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[kind].as_uri())
    figures = page.query_selector_all("figure.chart")
    assert len(figures) >= 3
    for figure in figures:
        figure.scroll_into_view_if_needed()
        page.wait_for_function("f => f.querySelector('.interactive svg')", arg=figure)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert complaints == []
    assert requests == [pages[kind].as_uri()]
    page.close()
