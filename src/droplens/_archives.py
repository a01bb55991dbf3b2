"""File formats of published image sets: IDX, and CIFAR's pickled and binary batches.

A pickle is a program. `_Reader` gives it nothing to run: of all names a pickle may ask for it
knows only those of NumPy's array reconstruction, and answers with stand-ins of our own.
"""

import gzip
import io
import math
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class RawImages(NamedTuple):
    """Pixels (n, 3072) uint8, channels first, and labels (n,) int64."""

    pixels: Bytes
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class LabelKind:
    """One kind of label: its keys in the pickles, its place in the binary records."""

    key: bytes
    names_key: bytes
    names_file: str
    column: int
    classes: int


@dataclass(frozen=True)
class Cifar:
    """Where a CIFAR set keeps what."""

    title: str
    python_folder: str
    binary_folder: str
    python_archive: str
    binary_archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: dict[str, "LabelKind"]


CIFAR10 = Cifar(
    title="CIFAR-10",
    python_folder="cifar-10-batches-py",
    binary_folder="cifar-10-batches-bin",
    python_archive="cifar-10-python.tar.gz",
    binary_archive="cifar-10-binary.tar.gz",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test=("test_batch",),
    meta="batches.meta",
    labels={"fine": LabelKind(b"labels", b"label_names", "batches.meta.txt", 0, 10)},
)

CIFAR100 = Cifar(
    title="CIFAR-100",
    python_folder="cifar-100-python",
    binary_folder="cifar-100-binary",
    python_archive="cifar-100-python.tar.gz",
    binary_archive="cifar-100-binary.tar.gz",
    train=("train",),
    test=("test",),
    meta="meta",
    labels={
        "coarse": LabelKind(
            b"coarse_labels", b"coarse_label_names", "coarse_label_names.txt", 0, 20
        ),
        "fine": LabelKind(b"fine_labels", b"fine_label_names", "fine_label_names.txt", 1, 100),
    },
)


def existing_folder(folder: str | Path) -> Path:
    """Return `folder` as a Path.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"folder {str(path)!r} does not exist; name the one with the files")
    return path


# --- IDX ---------------------------------------------------------------------------------------


def read_idx(folder: str | Path, name: str, axes: int, limit: int | None = None) -> Bytes:
    """Read an IDX file of unsigned bytes with `axes` axes, also gzipped.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is not such a file, or truncated.
    """
    path = _find_idx(existing_folder(folder), name)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse_idx(file, path, axes, limit)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is corrupt ({error}); fetch it again") from error


def _find_idx(folder: Path, name: str) -> Path:
    # Some mirrors write "train-images.idx3-ubyte".
    names = (name, name.replace("-idx", ".idx"))
    for place in (folder, folder / "MNIST" / "raw", folder / "raw"):
        for candidate in (f"{stem}{suffix}" for stem in names for suffix in ("", ".gz")):
            if (place / candidate).is_file():
                return place / candidate
    raise FileNotFoundError(
        f"folder {str(folder)!r} has no {name!r} (nor {name + '.gz'!r}); "
        "put the four IDX files of the data set there"
    )


def _parse_idx(file: Any, path: Path, axes: int, limit: int | None) -> Bytes:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != 8 or magic[3] != axes:
        raise ValueError(
            f"{str(path)!r} is not an IDX file of unsigned bytes with {axes} axes "
            f"(it begins with {magic!r}); fetch it again"
        )
    header = file.read(4 * axes)
    if len(header) < 4 * axes:
        raise ValueError(f"{str(path)!r} is truncated inside its header; fetch it again")
    lengths = [int(length) for length in np.frombuffer(header, ">u4")]
    wanted = [lengths[0] if limit is None else min(limit, lengths[0]), *lengths[1:]]
    body = file.read(math.prod(wanted))
    if len(body) < math.prod(wanted):
        raise ValueError(
            f"{str(path)!r} is truncated: its header promises {math.prod(wanted)} bytes, "
            f"it holds {len(body)}; fetch it again"
        )
    return np.frombuffer(body, np.uint8).reshape(wanted)


# --- CIFAR -------------------------------------------------------------------------------------

_PIXELS = 3 * 32 * 32

Files = dict[str, bytes]


def read_cifar(
    folder: str | Path, layout: Cifar, labels: str, limit: int | None = None
) -> tuple[RawImages, RawImages, tuple[str, ...]]:
    """Training part, test part and class names of a CIFAR set in `folder`.

    Raises:
        FileNotFoundError: if nothing of the set is there, or a batch is missing.
        ValueError: if a batch is corrupt or carries code.
    """
    path = existing_folder(folder)
    kind = layout.labels[labels]
    place, suffix, files = _find_cifar(path, layout)
    parse = _parse_binary if suffix else _parse_python

    def part(names: tuple[str, ...]) -> RawImages:
        batches: list[RawImages] = []
        for name in names:
            if name + suffix not in files:
                raise FileNotFoundError(f"{str(place)!r} has no {name + suffix!r}; fetch it again")
            if limit is None or sum(len(batch.labels) for batch in batches) < limit:
                where = f"{name + suffix!r} in {str(place)!r}"
                batches.append(parse(files[name + suffix], where, layout, kind))
        pixels = np.concatenate([batch.pixels for batch in batches])
        return RawImages(pixels[:limit], np.concatenate([b.labels for b in batches])[:limit])

    return part(layout.train), part(layout.test), _class_names(files, place, layout, kind)


def _find_cifar(folder: Path, layout: Cifar) -> tuple[Path, str, Files]:
    """Where the set lies, the suffix of its batches (".bin": binary version), its files.

    Raises:
        FileNotFoundError: if nothing of the set is there.
    """
    wanted = {layout.meta, *(kind.names_file for kind in layout.labels.values())}
    wanted |= {name + suffix for name in layout.train + layout.test for suffix in ("", ".bin")}
    for place in (folder / layout.python_folder, folder / layout.binary_folder, folder):
        files = {name: place / name for name in wanted if (place / name).is_file()}
        for suffix in ("", ".bin"):
            if any(name + suffix in files for name in layout.train + layout.test):
                return place, suffix, {name: path.read_bytes() for name, path in files.items()}
    for archive, suffix in ((layout.python_archive, ""), (layout.binary_archive, ".bin")):
        if (folder / archive).is_file():
            return folder / archive, suffix, _unpack(folder / archive, wanted)
    raise FileNotFoundError(
        f"folder {str(folder)!r} holds no {layout.title}: expected the folder "
        f"{layout.python_folder!r} or {layout.binary_folder!r}, or the archive "
        f"{layout.python_archive!r} or {layout.binary_archive!r}"
    )


def _unpack(archive: Path, wanted: set[str]) -> Files:
    files: Files = {}
    try:
        with tarfile.open(archive) as members:
            for member in members:
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in wanted:
                    file = members.extractfile(member)
                    files[name] = file.read() if file else b""
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{str(archive)!r} is corrupt ({error}); fetch it again") from error
    return files


def _class_names(files: Files, place: Path, layout: Cifar, kind: LabelKind) -> tuple[str, ...]:
    if layout.meta in files:
        where = f"{layout.meta!r} in {str(place)!r}"
        names = read_pickle(files[layout.meta], where).get(kind.names_key)
        if not isinstance(names, list):
            raise ValueError(f"{where} has no {kind.names_key.decode()!r}; fetch it again")
        texts = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    elif kind.names_file in files:
        texts = files[kind.names_file].decode().split()
    else:
        texts = [str(label) for label in range(kind.classes)]
    return tuple(texts)


def _parse_python(body: bytes, where: str, layout: Cifar, kind: LabelKind) -> RawImages:
    batch = read_pickle(body, where)
    pixels, labels = batch.get(b"data"), batch.get(kind.key)
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list):
        raise ValueError(
            f"{where} is no {layout.title} batch: it needs an array 'data' and a list "
            f"{kind.key.decode()!r}, but holds {sorted(map(str, batch))}"
        )
    if pixels.ndim != 2 or pixels.shape[1] != _PIXELS or len(labels) != len(pixels):
        raise ValueError(
            f"{where} has pixels of shape {pixels.shape} and {len(labels)} labels; "
            f"expected (n, {_PIXELS}) and n"
        )
    if not all(isinstance(label, int) and 0 <= label < kind.classes for label in labels):
        raise ValueError(f"{where} has labels outside 0…{kind.classes - 1}; fetch it again")
    return RawImages(pixels, np.array(labels, np.int64))


def _parse_binary(body: bytes, where: str, layout: Cifar, kind: LabelKind) -> RawImages:
    width = len(layout.labels) + _PIXELS
    if not body or len(body) % width:
        raise ValueError(
            f"{where} is truncated: {len(body)} bytes are no whole number of records of "
            f"{width}; fetch it again"
        )
    records = np.frombuffer(body, np.uint8).reshape(-1, width)
    labels = records[:, kind.column].astype(np.int64)
    if labels.max() >= kind.classes:
        raise ValueError(f"{where} has labels outside 0…{kind.classes - 1}; fetch it again")
    return RawImages(records[:, len(layout.labels) :], labels)


# --- Pickles that cannot run anything ----------------------------------------------------------


def read_pickle(body: bytes, where: str) -> dict[bytes, Any]:
    """The dictionary in a pickle of arrays of bytes, numbers, text and containers.

    Raises:
        ValueError: if it is corrupt, asks for anything else, or holds no dictionary.
    """
    try:
        batch = _Reader(io.BytesIO(body), encoding="bytes").load()
    except _RefusedError as error:
        raise ValueError(f"{where} {error}; it was not read") from error
    except Exception as error:  # a corrupt pickle raises whatever its broken opcodes happen to
        raise ValueError(f"{where} is corrupt ({error}); fetch it again") from error
    if not isinstance(batch, dict):
        raise ValueError(f"{where} holds a {type(batch).__name__}, not a dictionary")
    return {
        key.encode() if isinstance(key, str) else key: _revealed(value)
        for key, value in batch.items()
    }


class _RefusedError(Exception):
    """The pickle wants to run something."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _RefusedError(f"asks to run {module}.{name}, which no image batch needs")
        return _STAND_INS[module, name]


class _Array:
    """Stands in for numpy.ndarray: takes the pickled state, and only arrays of bytes."""

    def __init__(self, *_: Any) -> None:
        self.value: Bytes | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _bytes_array(raw, dtype, shape, "F" if fortran else "C")


class _Dtype:
    """Stands in for numpy.dtype: remembers the code, ignores the rest."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, _: Any) -> None: ...


def _bytes_array(raw: Any, dtype: Any, shape: Any, order: str = "C") -> Bytes:
    if not isinstance(dtype, _Dtype) or dtype.code != "u1":
        raise _RefusedError(f"holds an array of {getattr(dtype, 'code', dtype)!r}, not of bytes")
    array = np.frombuffer(raw, np.uint8)
    return array.reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: str) -> _Array:
    array = _Array()
    array.value = _bytes_array(raw, dtype, shape, order)
    return array


def _latin1(text: Any, encoding: Any) -> bytes:
    # Python 3 writes bytes in this way where it must please Python 2.
    if encoding not in {"latin1", b"latin1"}:
        raise _RefusedError(f"asks for the codec {encoding!r}, which no image batch needs")
    return bytes(text, "latin1") if isinstance(text, str) else bytes(text)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _latin1,
}


def _revealed(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value
