"""Pages are written whole or not at all."""

import errno
import json
import os
import stat

import pytest

from droplens import report
from tests import samples

DOCUMENT = report.Document("Short", verdicts=samples.verdicts())


def test_writes_page_and_twin(tmp_path):
    page, twin = report.write_report(DOCUMENT, tmp_path / "short.html")
    assert (page.name, twin.name) == ("short.html", "short.json")
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert json.loads(twin.read_text("utf-8"))["title"] == "Short"
    assert sorted(os.listdir(tmp_path)) == ["short.html", "short.json"]


def test_write_page_writes_the_page_alone(tmp_path):
    report.write_page(DOCUMENT, str(tmp_path / "short.html"))
    assert os.listdir(tmp_path) == ["short.html"]


def test_files_are_readable_by_others_as_plain_open_would_have_it(tmp_path):
    before = os.umask(0o022)
    try:
        page = report.write_page(DOCUMENT, tmp_path / "short.html")
    finally:
        os.umask(before)
    assert stat.S_IMODE(page.stat().st_mode) == 0o644


def test_replacing_keeps_the_permissions_chosen(tmp_path):
    page = tmp_path / "short.html"
    page.write_text("old")
    page.chmod(0o600)
    report.write_page(DOCUMENT, page)
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert page.read_text("utf-8") != "old"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/report.html", "there is no folder"),
        ("folder", "it is a folder"),
        ("file/report.html", "there is no folder"),
        ("x" * 300 + ".html", "File name too long"),
    ],
)
def test_unwritable_paths_are_refused_and_leave_nothing(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(os.listdir(tmp_path))
    for write in (report.write_page, report.write_report):
        with pytest.raises(OSError, match=reason):
            write(DOCUMENT, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_page_may_not_be_its_own_twin(tmp_path):
    with pytest.raises(ValueError, match="path has to name the page, not its JSON twin"):
        report.write_report(DOCUMENT, tmp_path / "report.json")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_page_and_no_rubbish(tmp_path, monkeypatch, step):
    page = tmp_path / "report.html"
    page.write_text("old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"cannot write '.*report.html': No space left on device"):
        report.write_report(DOCUMENT, page)
    assert page.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]
