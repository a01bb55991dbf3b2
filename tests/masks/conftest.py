import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A conformance test runs once for every case its class lists."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.cls.cases, ids=str)
    if "drawn" in metafunc.fixturenames:
        sampled = [case for case in metafunc.cls.cases if case.sampled]
        metafunc.parametrize("drawn", sampled, ids=str)
