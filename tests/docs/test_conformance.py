from docs.conformance import PAGE, page


def test_the_page_is_what_the_code_generates() -> None:
    assert PAGE.read_text() == page()
