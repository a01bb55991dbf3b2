"""What the README and the guide show, runs.

A block of the README runs that stands after `<!-- run -->` or `run: slow`, each by itself; those of
the guide run as one script.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text("utf-8")
BLOCKS = re.findall(r"<!-- run(: slow)? -->\n```(python|console)\n(.*?)```", README, re.DOTALL)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("language", "code"),
    [
        pytest.param(language, code, marks=pytest.mark.slow if slow else ())
        for slow, language, code in BLOCKS
    ],
)
def test_runs(language, code, tmp_path):
    if language == "python":
        assert run([sys.executable, "-W", "error", "-c", code], tmp_path)
        return
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for line in code.splitlines():
        if line.startswith("$ "):
            command = shlex.split(line.removeprefix("$ "))
            assert command[0] == "droplens"
            run([sys.executable, "-m", *command], tmp_path)


def test_the_guide_runs(tmp_path):
    code = "\n".join(re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL))
    assert run([sys.executable, "-W", "error", "-c", code], tmp_path)
    assert (tmp_path / "page.html").exists()


def test_shows_one_example_of_each_kind():
    assert {language for _, language, _ in BLOCKS} == {"python", "console"}


def test_links_and_pictures_exist():
    for folder, text in ((ROOT, README), (ROOT / "docs", GUIDE)):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (folder / target).exists(), target


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\S+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
