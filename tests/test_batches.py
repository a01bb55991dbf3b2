import math
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from droplens.batches import Fingerprint, as_batches, checked_passes, n_examples

X = torch.arange(12.0).reshape(6, 2)
Y = torch.arange(6)


class Pairs(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return X[i], Y[i]


FORMS = {
    "pair": (X, Y),
    "list of two tensors": [X, Y],
    "data set of tensors": TensorDataset(X, Y),
    "any data set": Pairs(),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "loader of lists": DataLoader(Pairs(), batch_size=4),
    "batches": [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "mappings": [{"x": X[:4], "labels": Y[:4]}, {"x": X[4:], "labels": Y[4:]}],
    "one batch": [(X, Y)],
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_all_examples_again_and_again(name):
    batches = as_batches(FORMS[name])
    for _ in range(2):
        found = list(batches)
        inputs = [b.inputs["x"] if isinstance(b.inputs, dict) else b.inputs for b in found]
        assert torch.equal(torch.cat(inputs), X)
        assert torch.equal(torch.cat([b.targets for b in found]), Y)
        assert as_batches(batches) is batches


def test_inputs_alone_and_inputs_of_several_parts():
    (only,) = as_batches(X)
    assert only.targets is None
    (only,) = as_batches([X[:3]])
    assert only.targets is None
    (both,) = as_batches(((X, X + 1), Y))
    assert n_examples(both.inputs) == 6
    assert torch.equal(both.inputs[1], X + 1)
    (named,) = as_batches(({"a": X, "b": X + 1}, Y))
    assert torch.equal(named.inputs["b"], X + 1)
    (several,) = as_batches([(X, X + 1, Y)])
    assert torch.equal(several.inputs[1], X + 1)
    assert torch.equal(several.targets, Y)
    (parts,) = as_batches(TensorDataset(X, X + 1, Y))
    assert len(parts.inputs) == 2


def test_large_tensors_come_in_chunks():
    wide = torch.zeros(5, 2**20)
    sizes = [len(batch.inputs) for batch in as_batches((wide, torch.zeros(5)))]
    assert sizes == [2, 2, 1]
    pairs = [(len(b.inputs[0]), len(b.targets)) for b in as_batches(((wide, X[:5]), Y[:5]))]
    assert pairs == [(1, 1)] * 5


class Noisy(Pairs):
    """Augments from every global stream."""

    def __getitem__(self, i):
        noise = torch.rand(()) + np.random.rand() + random.random()
        return X[i] + noise, Y[i]


def streams():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def same(one, other):
    return torch.equal(one[0], other[0]) and np.array_equal(one[1], other[1]) and one[2] == other[2]


@pytest.mark.parametrize("workers", [0, 1])
def test_shuffling_and_augmentation_repeat_and_leave_the_streams_alone(workers):
    loader = DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=workers)
    before = streams()
    batches = as_batches(loader)
    passes = []
    for _ in range(2):
        passes.append(list(batches))
        torch.rand(3)  # what the consumer draws is its own affair
        torch.set_rng_state(before[0])
    assert same(before, streams())
    for one, other in zip(*passes, strict=True):
        assert torch.equal(one.targets, other.targets)
        if workers == 0:
            assert torch.equal(one.inputs, other.inputs)
    assert sorted(torch.cat([b.targets for b in passes[0]]).tolist()) == [0, 1, 2, 3, 4, 5]


def test_the_consumer_draws_from_its_own_stream():
    torch.manual_seed(0)
    alone = [float(torch.rand(())) for _ in range(3)]
    torch.manual_seed(0)
    loader = DataLoader(Noisy(), batch_size=2, shuffle=True)
    assert [float(torch.rand(())) for _ in as_batches(loader)] == alone


def test_the_order_is_the_loaders_own():
    loader = DataLoader(Noisy(), batch_size=2, shuffle=True)
    state = streams()
    plain = list(loader)
    torch.set_rng_state(state[0])
    random.setstate(state[2])
    np.random.seed(0)
    batches = as_batches(loader)
    assert [b.targets.tolist() for b in batches] == [y.tolist() for _, y in plain]


def test_a_loaders_own_generator_is_put_back():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True, generator=generator)
    before = generator.get_state()
    batches = as_batches(loader)
    first, second = (torch.cat([b.targets for b in batches]) for _ in range(2))
    assert torch.equal(first, second)
    next(iter(batches))  # an unfinished pass
    assert torch.equal(generator.get_state(), before)


class FreshNoise(Pairs):
    """Augments from a stream that nobody can rewind."""

    def __init__(self):
        self.source = np.random.default_rng()

    def __getitem__(self, i):
        return X[i] + float(self.source.random()), Y[i]


def test_data_that_change_between_passes_are_detected():
    batches = checked_passes(DataLoader(FreshNoise(), batch_size=2))
    list(batches)
    with pytest.raises(ValueError, match="data changes between passes"):
        list(batches)


class Reordered(IterableDataset):
    """The same pairs in another order every pass, drawn from a stream of its own."""

    def __init__(self):
        self.source = np.random.default_rng(0)

    def __iter__(self):
        yield from ((X[i], Y[i]) for i in self.source.permutation(6))


def test_another_order_of_the_same_examples_is_no_change():
    batches = checked_passes(DataLoader(Reordered(), batch_size=4))
    orders = [torch.cat([b.targets for b in batches]).tolist() for _ in range(3)]
    assert orders[0] != orders[1] or orders[0] != orders[2]


def test_exchanged_targets_are_a_change():
    prints = []
    for targets in (Y, Y.flip(0)):
        seen = Fingerprint()
        for batch in as_batches((X, targets)):
            seen.add(batch)
        prints.append(seen)
    assert not prints[0].agrees(prints[1])


class Endless(Dataset):
    def __getitem__(self, k):
        return X[k], Y[k]


class Torn(Endless):
    def __len__(self):
        return len(X)

    def __getitem__(self, k):
        if k == 3:
            raise KeyError("row 3")
        return X[k], Y[k]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((X[:0], Y[:0]), ValueError, "inputs is empty"),
        ((X, Y[:3]), ValueError, "inputs has 6 examples but targets has shape"),
        ((X * math.nan, Y), ValueError, "inputs holds NaN or Inf"),
        ((X, Y * math.inf), ValueError, "targets holds NaN or Inf"),
        ([], ValueError, "data is empty"),
        (iter([(X, Y)]), TypeError, "can be read only once"),
        ("digits", TypeError, "but got str"),
        (3, TypeError, "data has to be a tensor, a pair"),
        ([3], TypeError, "a batch has to be a tensor"),
        ([(X, 3)], TypeError, "targets has to be a tensor, but got int"),
        ((X.numpy(), Y.numpy()), TypeError, "but got ndarray .torch.from_numpy makes"),
        (
            [(X, Y.numpy())],
            TypeError,
            "targets has to be a tensor, but got ndarray .torch.from_num",
        ),
        ([(X[0], Y[0])], ValueError, "targets is a single number, where a batch has one for each"),
        (Endless(), TypeError, "data is a Endless without __len__"),
        (DataLoader(Torn(), 2), ValueError, "reading the data raised KeyError: 'row 3'"),
        (DataLoader(Endless(), 2), ValueError, r"reading the data raised TypeError: .* no len"),
    ],
)
def test_bad_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        list(as_batches(data))
