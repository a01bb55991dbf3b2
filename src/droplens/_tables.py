"""Inputs and targets from a file: columns of a CSV, arrays of an NPZ."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

_DELIMITERS: Final = ",;\t"


@dataclass(frozen=True)
class Problem:
    """A regression problem read from a file: X (n, d_in), Y (n, d_out), and the columns' names."""

    X: NDArray[Any]
    Y: NDArray[Any]
    input_names: tuple[str, ...]
    target_names: tuple[str, ...]


def read_problem(path: Path, targets: tuple[str, ...], inputs: tuple[str, ...] = ()) -> Problem:
    """Read X and Y from a .csv or .npz file.

    A CSV has a header, or its columns are called 1, 2, …; columns that are not targets are
    inputs, unless `inputs` names them. In an NPZ the names are arrays; without `inputs` X is the
    array called X, or the only other one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is of another kind or broken, a name is unknown, or a column in use
            holds text or nothing.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix.lower() not in {".csv", ".npz"}:
        raise ValueError(f"the data file has to end in .csv or .npz, but got {path.name}")
    if not targets:
        raise ValueError("name at least one target column or array with --target")
    return (_read_csv if path.suffix.lower() == ".csv" else _read_npz)(path, targets, inputs)


def _read_npz(path: Path, targets: tuple[str, ...], inputs: tuple[str, ...]) -> Problem:
    """Arrays by name.

    Raises:
        ValueError: if the file is broken, or a name is unknown.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, BadZipFile) as error:
        reason = "it holds Python objects" if "pickle" in str(error) else str(error)
        raise ValueError(
            f"{path.name} is not an archive of plain NumPy arrays: {reason}"
        ) from error
    _check_names(path, targets, tuple(arrays), "array")
    if not inputs:
        others = [name for name in arrays if name not in targets]
        if "X" not in others and len(others) != 1:
            raise ValueError(
                f"{path.name} holds the arrays {', '.join(arrays)}: say with --inputs which is X"
            )
        inputs = ("X",) if "X" in others else (others[0],)
    _check_names(path, inputs, tuple(arrays), "array")
    X, input_names = _side_by_side(path, arrays, inputs)
    Y, target_names = _side_by_side(path, arrays, targets)
    return Problem(X, Y, input_names, target_names)


def _side_by_side(
    path: Path, arrays: dict[str, NDArray[Any]], names: tuple[str, ...]
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """The named arrays as one matrix, and a name for each column.

    Raises:
        ValueError: if one is not 1-D or 2-D, or they differ in length.
    """
    parts, labels = [], []
    for name in names:
        array = arrays[name]
        if array.ndim not in {1, 2}:
            raise ValueError(
                f"array {name!r} of {path.name} has to be 1-D or 2-D, but is of shape {array.shape}"
            )
        part = array.reshape(len(array), -1)
        parts.append(part)
        width = part.shape[1]
        labels += [name] if array.ndim == 1 else [f"{name}[{i}]" for i in range(width)]
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"the arrays {', '.join(names)} of {path.name} differ in length")
    return (parts[0] if len(parts) == 1 else np.hstack(parts)), tuple(labels)


def _read_csv(path: Path, targets: tuple[str, ...], inputs: tuple[str, ...]) -> Problem:
    """Columns by name.

    Raises:
        ValueError: if the file is not UTF-8 or has no rows, or a name is unknown or its column not
            of numbers.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not a text file in UTF-8") from error
    if not first.strip():
        raise ValueError(f"{path.name} is empty")
    delimiter = max(_DELIMITERS, key=first.count)
    head = next(csv.reader([first], delimiter=delimiter))
    headed = not all(_is_number(cell) for cell in head)
    names = tuple(cell.strip() for cell in head) if headed else _numbered(len(head))
    if len(set(names)) < len(names):
        raise ValueError(f"{path.name} has two columns of one name in its header")
    _check_names(path, targets, names, "column")
    chosen = inputs or tuple(name for name in names if name not in targets)
    _check_names(path, chosen, names, "column")
    if not chosen:
        raise ValueError(f"{path.name} has no columns left to be inputs")
    wanted = [names.index(name) for name in (*chosen, *targets)]
    try:
        table = np.loadtxt(
            path,
            delimiter=delimiter,
            skiprows=int(headed),
            usecols=wanted,
            ndmin=2,
            quotechar='"',
            comments=None,
            encoding="utf-8-sig",
        )
    except (ValueError, IndexError) as error:
        raise ValueError(_culprit(path, delimiter, headed, names, wanted) or str(error)) from error
    if not len(table):
        raise ValueError(f"{path.name} has a header but no rows")
    cut = len(chosen)
    return Problem(table[:, :cut], table[:, cut:], chosen, targets)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(i + 1) for i in range(count))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _culprit(
    path: Path, delimiter: str, headed: bool, names: tuple[str, ...], wanted: list[int]
) -> str | None:
    # Which cell the fast reader stumbled over.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        if headed:
            next(reader)
        for row in reader:
            if not row:
                continue
            if len(row) < len(names):
                return (
                    f"line {reader.line_num} of {path.name} has {len(row)} cells, but there are "
                    f"{len(names)} columns"
                )
            for i in wanted:
                if not row[i].strip():
                    return (
                        f"column {names[i]!r} of {path.name} is empty in line {reader.line_num}; "
                        "fill it, or leave the column out with --inputs"
                    )
                if not _is_number(row[i]):
                    return (
                        f"column {names[i]!r} of {path.name} holds text ({row[i]!r} in line "
                        f"{reader.line_num}); encode it as numbers, or leave it out with --inputs"
                    )
    return None


def _check_names(path: Path, wanted: tuple[str, ...], known: tuple[str, ...], kind: str) -> None:
    """Refuse names that the file does not have.

    Raises:
        ValueError: naming the first, and what there is.
    """
    for name in wanted:
        if name not in known:
            shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
            raise ValueError(f"{path.name} has no {kind} {name!r}; it has {shown}")
