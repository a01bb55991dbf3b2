"""Files that are either written whole or not at all."""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from droplens.report._document import Document
from droplens.report._page import render_page


def to_json(document: Document) -> str:
    """The JSON twin as text; a number that is not finite stands as null."""
    return json.dumps(document.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_page(document: Document, path: str | os.PathLike[str]) -> Path:
    """Write the page, whole or not at all, and return where it stands.

    Raises:
        OSError: if `path` cannot be written; nothing is left behind then.
        ValueError: if a chart cannot be drawn, or the page would pass 2 MB.
    """
    target = check_target(path)
    write_whole({target: render_page(document)})
    return target


def write_report(document: Document, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write the page and, beside it, its JSON twin (same name, ending .json): both or neither.

    Raises:
        OSError: if either cannot be written; nothing is left behind then.
        ValueError: if a chart cannot be drawn, the page would pass 2 MB, or `path` itself ends
            in .json.
    """
    page, twin = check_report(path)
    write_whole({page: render_page(document), twin: to_json(document)})
    return page, twin


def check_report(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Where the page and its twin would stand; refuses what `write_report` could not write.

    Raises:
        OSError: if either cannot be written.
        ValueError: if `path` itself ends in .json.
    """
    page = check_target(path)
    twin = page.with_suffix(".json")
    if twin == page:
        raise ValueError(f"path has to name the page, not its JSON twin, but got {str(page)!r}")
    return page, check_target(twin)


def check_target(path: str | os.PathLike[str]) -> Path:
    """Refuse a path that cannot be written, before the work whose result it should hold.

    Raises:
        OSError: if the folder is missing or takes no new file, or `path` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise OSError(f"cannot write {str(target)!r}: it is a folder")
    if not target.parent.is_dir():
        raise OSError(f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")
    try:
        os.unlink(_temporary(target, ""))
    except OSError as error:
        raise OSError(_refusal(target, error)) from error
    return target


def write_whole(texts: Mapping[Path, str]) -> None:
    """Write every text beside its target first; only when all are safe on disk, rename them.

    Raises:
        OSError: if one cannot be written; the files that stood there before still do.
    """
    ready: dict[Path, str] = {}
    target = Path()
    try:
        for target, text in texts.items():
            ready[target] = _temporary(target, text)
        for target, temporary in ready.items():
            os.replace(temporary, target)
    except OSError as error:
        raise OSError(_refusal(target, error)) from error
    finally:
        for temporary in ready.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _temporary(target: Path, text: str) -> str:
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:80]}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, _permissions(target))
    except BaseException:
        os.unlink(name)
        raise
    return name


def _permissions(target: Path) -> int:
    """Those of the file replaced, else what a plain open() would have given."""
    if target.exists():
        return target.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _refusal(target: Path, error: OSError) -> str:
    return f"cannot write {str(target)!r}: {error.strerror or error}"
