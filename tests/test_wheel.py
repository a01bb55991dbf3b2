"""The wheel holds what the installed package needs, and works from its own folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEMPLATES = ("page.html", "blocks.html", "fragment.html", "style.css", "page.js")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_holds_templates_types_and_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "droplens/py.typed" in names
    assert {f"droplens/report/templates/{name}" for name in TEMPLATES} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)


def test_holds_every_module_of_the_source_tree(wheel):
    source = ROOT / "src"
    wanted = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_writes_a_page_where_only_the_wheel_is(wheel, tmp_path):
    """Unpacked by itself, away from the source tree, as an installer would leave it."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "import droplens, sys; from droplens import report;"
        "assert droplens.__file__.startswith(sys.argv[1]), droplens.__file__;"
        "report.write_report(report.Document('From the wheel'), 'page.html')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "From the wheel" in (tmp_path / "page.html").read_text("utf-8")
    assert (tmp_path / "page.json").exists()
