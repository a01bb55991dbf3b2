import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch

from droplens import data

# --- digits and the papers' problems -----------------------------------------------------------


def test_digits_are_scaled_split_and_stratified():
    split = data.digits(test_share=0.25, seed=3)
    train, test = split.train, split.test
    assert train.inputs.dtype == torch.float32
    assert train.inputs.min() == 0
    assert train.inputs.max() == 1
    assert len(train.inputs) + len(test.inputs) == 1797
    everything = torch.cat([train.targets, test.targets]).bincount()
    shares = test.targets.bincount() / everything
    assert (shares - 0.25).abs().max() <= 0.51 / everything.min()
    assert split.classes == tuple("0123456789")


def test_digits_are_fixed_by_their_seed_and_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    first, again, other = data.digits(seed=1), data.digits(seed=1), data.digits(seed=2)
    assert torch.equal(first.test.inputs, again.test.inputs)
    assert not torch.equal(first.test.inputs, other.test.inputs)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan"), -1, 1e-9])
def test_digits_refuse_a_share_that_leaves_a_part_empty(share):
    with pytest.raises(ValueError, match=r"test_share"):
        data.digits(test_share=share)


def test_linear_map_has_the_promised_spectrum():
    examples, M = data.linear_map(50, 8, 5, decay=0.5, seed=1)
    assert examples.inputs.shape == (50, 8)
    torch.testing.assert_close(examples.targets, examples.inputs @ M.mT)
    expected = torch.exp(-0.5 * torch.arange(5, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.svdvals(M), expected)


def test_small_problems_follow_their_formulas():
    x, y = data.double_step(15)
    assert x.shape == y.shape == (15, 1)
    torch.testing.assert_close(y, torch.tanh(x - 6) + torch.tanh(x + 6))
    x, y = data.relu_pair()
    torch.testing.assert_close(x.flatten(), torch.tensor([-5, -3, -1, 1, 3, 5]) / 3)
    torch.testing.assert_close(y.flatten(), torch.tensor([4, 2, 0, 0, 2, 4]) / 6)
    x, y = data.tanh_ridge(7, seed=1)
    assert (x.shape, y.shape) == ((7, 10), (7, 1))
    x, y = data.two_neurons(9, seed=1)
    assert (x.shape, y.shape) == ((9, 1), (9, 1))
    assert torch.equal(data.two_neurons(9, seed=1).targets, y)


def test_linear_map_refuses_no_dimensions():
    with pytest.raises(ValueError, match=r"d_in has to be at least 1, but got 0"):
        data.linear_map(5, 0)


# --- MNIST -------------------------------------------------------------------------------------


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def write_mnist(folder, suffix="", n=6):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    opened = gzip.open if suffix else open
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        labels = rng.integers(0, 10, n).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            with opened(folder / f"{prefix}-{name}-ubyte{suffix}", "wb") as file:
                file.write(idx(array))
    return images, labels


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["", "MNIST/raw"])
def test_mnist_reads_what_was_written(tmp_path, suffix, inside):
    images, labels = write_mnist(tmp_path / inside, suffix)
    split = data.mnist(tmp_path)
    torch.testing.assert_close(split.test.inputs[:, 0], torch.tensor(images) / 255)
    assert split.test.targets.tolist() == labels.tolist()
    assert split.train.inputs.shape == (6, 1, 28, 28)
    assert data.mnist(tmp_path, limit=2).train.inputs.shape == (2, 1, 28, 28)


def test_mnist_says_what_is_missing_or_corrupt(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist"):
        data.mnist(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no 'train-images-idx3-ubyte'"):
        data.mnist(tmp_path)
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"truncated: its header promises 4704 bytes"):
        data.mnist(tmp_path)
    path.write_bytes(whole[:9])
    with pytest.raises(ValueError, match=r"truncated inside its header"):
        data.mnist(tmp_path)
    path.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(ValueError, match=r"is not an IDX file"):
        data.mnist(tmp_path)


def test_mnist_refuses_a_broken_gzip_and_unequal_numbers(tmp_path):
    write_mnist(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz' is corrupt"):
        data.mnist(tmp_path)
    path.write_bytes(gzip.compress(idx(np.zeros((3, 28, 28), np.uint8))))
    with pytest.raises(ValueError, match=r"holds 3 train images but 6 labels"):
        data.mnist(tmp_path)


# --- CIFAR -------------------------------------------------------------------------------------


def cifar_arrays(n, seed, classes):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3072)).astype(np.uint8), rng.integers(0, classes, n).tolist()


def cifar10_python(protocol=2, n=4):
    """The files of CIFAR-10's python version, and what they hold."""
    files, truth = {}, {}
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = cifar_arrays(n, seed, 10)
        truth[name] = pixels, labels
        files[name] = pickle.dumps({b"data": pixels, b"labels": labels}, protocol)
    names = [f"kind{i}".encode() for i in range(10)]
    files["batches.meta"] = pickle.dumps({b"label_names": names}, protocol)
    return files, truth


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (folder / name).write_bytes(body)


def write_archive(path, inside, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(f"{inside}/{name}")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_reads_what_was_written(tmp_path, protocol, packed):
    files, truth = cifar10_python(protocol)
    if packed:
        write_archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)
    else:
        write(tmp_path / "cifar-10-batches-py", files)
    split = data.cifar10(tmp_path)
    assert split.train.inputs.shape == (20, 3, 32, 32)
    pixels, labels = truth["data_batch_2"]
    expected = torch.tensor(pixels).reshape(4, 3, 32, 32) / 255
    torch.testing.assert_close(split.train.inputs[4:8], expected)
    assert split.train.targets[4:8].tolist() == labels
    assert split.classes[3] == "kind3"
    assert len(data.cifar10(tmp_path, limit=5).train.inputs) == 5


def test_cifar10_reads_a_batch_as_python_2_wrote_it(tmp_path):
    """Protocol 2 with byte strings (SHORT_BINSTRING), as in the published archive."""
    raw = bytes(range(256)) * 12
    batch = (
        b"\x80\x02}q\x01(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        b"(K\x00tU\x01btR(K\x01(K\x01M\x00\x0ctcnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", 3072) + raw + b"tbU\x06labels](K\x07eu."
    )
    write(tmp_path, {name: batch for name in cifar10_python()[0] if name != "batches.meta"})
    split = data.cifar10(tmp_path)
    assert split.test.targets.tolist() == [7]
    assert split.test.inputs.flatten()[255] == 1
    assert split.classes == tuple("0123456789")


def test_cifar10_binary(tmp_path):
    files, truth = {}, {}
    for seed, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        pixels, labels = truth[name] = cifar_arrays(3, seed, 10)
        files[name] = np.c_[np.array(labels, np.uint8), pixels].tobytes()
    files["batches.meta.txt"] = "\n".join(f"kind{i}" for i in range(10)).encode()
    write_archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files)
    split = data.cifar10(tmp_path)
    pixels, labels = truth["test_batch.bin"]
    torch.testing.assert_close(split.test.inputs.flatten(1), torch.tensor(pixels) / 255)
    assert split.test.targets.tolist() == labels
    assert split.classes[9] == "kind9"
    write(tmp_path, files | {"test_batch.bin": files["test_batch.bin"][:-1]})
    with pytest.raises(ValueError, match=r"no whole number of records of 3073"):
        data.cifar10(tmp_path)


@pytest.mark.parametrize("binary", [False, True])
def test_cifar100_has_two_kinds_of_label(tmp_path, binary):
    pixels, fine = cifar_arrays(5, 0, 100)
    coarse = [label // 5 for label in fine]
    if binary:
        records = np.c_[np.array(coarse, np.uint8), np.array(fine, np.uint8), pixels]
        write(tmp_path, {"train.bin": records.tobytes(), "test.bin": records.tobytes()})
    else:
        batch = pickle.dumps({b"data": pixels, b"fine_labels": fine, b"coarse_labels": coarse})
        write(tmp_path / "cifar-100-python", {"train": batch, "test": batch})
    assert data.cifar100(tmp_path).train.targets.tolist() == fine
    assert data.cifar100(tmp_path, "coarse").test.targets.tolist() == coarse
    with pytest.raises(ValueError, match=r"labels has to be 'fine' or 'coarse', but got 'both'"):
        data.cifar100(tmp_path, "both")


class Runs:
    """Pickles into a program that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class RunsThroughBuiltins(Runs):
    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("attack", [Runs, RunsThroughBuiltins])
def test_a_pickle_that_carries_code_is_refused_and_does_not_run(tmp_path, attack):
    files, _ = cifar10_python()
    trace = tmp_path / "trace"
    files["data_batch_1"] = pickle.dumps({b"data": attack(trace), b"labels": [1]})
    write(tmp_path, files)
    with pytest.raises(ValueError, match=r"'data_batch_1' in .* asks to run \w+\.\w+"):
        data.cifar10(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)})[:-9], "is corrupt"),
        (b"", "is corrupt"),
        (b"not a pickle", "is corrupt"),
        (pickle.dumps([1, 2]), "holds a list, not a dictionary"),
        (pickle.dumps({b"data": [1]}), "needs an array 'data' and a list 'labels'"),
        (pickle.dumps({b"data": np.zeros(3), b"labels": []}), "array of 'f8', not of bytes"),
        (pickle.dumps({b"data": np.zeros((1, 9), np.uint8), b"labels": [1]}), "expected (n, 3072)"),
        (
            pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}),
            "labels outside 0…9",
        ),
        (pickle.dumps({b"data": np.array([object()])[:0], b"labels": []}), "not of bytes"),
    ],
)
def test_cifar10_says_what_is_wrong_with_a_batch(tmp_path, body, message):
    files, _ = cifar10_python()
    write(tmp_path, files | {"data_batch_3": body})
    with pytest.raises(ValueError, match=r"'data_batch_3' in") as raised:
        data.cifar10(tmp_path)
    assert message in str(raised.value)


def test_cifar10_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no CIFAR-10: expected the folder"):
        data.cifar10(tmp_path)
    files, _ = cifar10_python()
    del files["data_batch_4"]
    write(tmp_path, files)
    with pytest.raises(FileNotFoundError, match=r"has no 'data_batch_4'"):
        data.cifar10(tmp_path)


@pytest.mark.parametrize("read", [data.mnist, data.cifar10, data.cifar100])
def test_no_examples_are_too_few(tmp_path, read):
    with pytest.raises(ValueError, match="limit has to be at least 1, but got 0"):
        read(tmp_path, limit=0)


def test_a_broken_archive_is_named(tmp_path):
    files, _ = cifar10_python()
    path = tmp_path / "cifar-10-python.tar.gz"
    write_archive(path, "cifar-10-batches-py", files)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz' is corrupt"):
        data.cifar10(tmp_path)
