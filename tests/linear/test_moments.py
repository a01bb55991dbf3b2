"""Moments: one pass, any order, any number of machines."""

import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from droplens.linear import Moments, moments_from_ray, solve


def data(n=40, d_in=5, d_out=3, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d_in)) + offset, rng.standard_normal((n, d_out)) - offset


def assert_same(one, other, rtol=1e-11):
    assert one.count == other.count
    a, b = one.to_arrays(), other.to_arrays()
    for name in ("mean_x", "mean_y", "xx", "yx", "yy"):
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=rtol, err_msg=name)


class TestSums:
    def test_equal_the_definition(self):
        X, Y = data(offset=3)
        gram = Moments().update(X, Y).gram()
        np.testing.assert_allclose(gram.xx, X.T @ X / 40, rtol=1e-12)
        np.testing.assert_allclose(gram.yx, Y.T @ X / 40, rtol=1e-12)
        np.testing.assert_allclose(gram.yy, (Y**2).sum() / 40, rtol=1e-12)
        central = Moments().update(X, Y).gram(center=True)
        x, y = X - X.mean(0), Y - Y.mean(0)
        np.testing.assert_allclose(central.xx, x.T @ x / 40, rtol=1e-12)
        np.testing.assert_allclose(central.yx, y.T @ x / 40, rtol=1e-12, atol=1e-13)

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.integers(1, 15), min_size=1, max_size=6), st.integers(0, 10**6))
    def test_do_not_depend_on_the_batches(self, sizes, seed):
        X, Y = data(sum(sizes), seed=seed, offset=2)
        cuts = np.cumsum(sizes)[:-1]
        batches = list(zip(np.split(X, cuts), np.split(Y, cuts), strict=True))
        assert_same(Moments.from_batches(batches), Moments().update(X, Y))

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 10**6))
    def test_merge_is_associative_and_commutative(self, seed):
        a, b, c = (Moments().update(*data(5 + i, seed=seed + i, offset=i)) for i in range(3))
        assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))
        assert_same(a.merge(b), b.merge(a))
        assert_same(a.merge(Moments()), a)
        assert_same(Moments().merge(a), a)
        assert a.count == 5  # untouched

    def test_merge_gives_a_new_object(self):
        a, b = Moments().update(*data()), Moments()
        merged = b.merge(a)
        merged.update(*data(seed=1))
        assert (a.count, b.count, merged.count) == (40, 0, 80)
        assert_same(a, Moments().update(*data()))

    def test_a_large_offset_costs_no_digits(self):
        X, Y = data(500)
        plain = Moments().update(X, Y).gram(center=True)
        shifted = Moments.from_batches(
            (X[i : i + 50] + 1e8, Y[i : i + 50]) for i in range(0, 500, 50)
        )
        np.testing.assert_allclose(shifted.gram(center=True).xx, plain.xx, atol=1e-7)

    @pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, bool])
    def test_any_precision_in_double_sums(self, dtype):
        X, Y = (a.astype(dtype) for a in data())
        assert_same(Moments().update(X, Y), Moments().update(X.astype(float), Y.astype(float)))

    def test_tensors_and_orders(self):
        X, Y = data()
        whole = Moments().update(X, Y)
        assert_same(Moments().update(torch.tensor(X, requires_grad=True), torch.tensor(Y)), whole)
        assert_same(Moments().update(np.asfortranarray(X), Y[:, ::-1][:, ::-1]), whole)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=7
        )
        assert_same(Moments.from_batches(loader), whole)

    def test_memory_depends_on_the_dimensions_only(self):
        def peak(batches):
            rng = np.random.default_rng(0)
            X, Y = rng.standard_normal((1000, 8)), rng.standard_normal((1000, 4))
            tracemalloc.start()
            Moments.from_batches((X, Y) for _ in range(batches))
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return most

        peak(1)
        assert peak(200) <= 1.05 * peak(10)


class TestSolve:
    @pytest.mark.parametrize(("width", "block_size"), [(1, 1), (5, 1), (6, 2), (12, 12)])
    def test_equals_the_route_from_data(self, width, block_size):
        X, Y = data()
        one = Moments().update(X, Y).solve(0.3, width, block_size)
        other = solve(X, Y, 0.3, width, block_size)
        np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-7)
        np.testing.assert_allclose(one.value, other.value, rtol=1e-9)

    def test_centred_equals_solving_centred_data(self):
        X, Y = data(offset=5)
        one = Moments().update(X, Y).solve(0.3, 4, center=True)
        other = solve(X - X.mean(0), Y - Y.mean(0), 0.3, 4)
        np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-11)
        np.testing.assert_allclose(one.intercept, Y.mean(0) - one.coefficients @ X.mean(0))
        np.testing.assert_allclose(
            one.predict(X), other.predict(X - X.mean(0)) + Y.mean(0), atol=1e-10
        )

    def test_rank_deficient(self):
        X, Y = data()
        X[:, 4] = X[:, 0] + X[:, 1]
        X[:, 3] = 0
        one, other = Moments().update(X, Y).solve(0.3, 4), solve(X, Y, 0.3, 4)
        np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-9)
        assert not one.coefficients[:, 3].any()

    def test_population_form(self):
        M = np.diag([3.0, 2, 1])
        one = Moments.of_target(M).solve(0.5, 3)
        other = solve(np.eye(3), M.T, 0.5, 3)
        np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-14)
        np.testing.assert_allclose(one.value, 3 * other.value)
        C = np.cov(np.random.default_rng(0).standard_normal((3, 50)))
        X = np.linalg.cholesky(C).T * np.sqrt(3)
        coloured = Moments.of_target(M, C).solve(0.5, 3)
        np.testing.assert_allclose(
            coloured.coefficients, solve(X, X @ M.T, 0.5, 3).coefficients, atol=1e-12
        )


class TestStorage:
    def test_round_trip(self, tmp_path):
        moments = Moments().update(*data())
        moments.save(tmp_path / "moments.bin")
        assert_same(Moments.load(tmp_path / "moments.bin"), moments, rtol=0)

    def test_bad_files(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Moments.load(tmp_path / "missing")
        text = tmp_path / "text"
        text.write_text("no archive")
        with pytest.raises(ValueError, match="is not a file of Moments"):
            Moments.load(text)
        np.savez(tmp_path / "other.npz", a=np.ones(3))
        with pytest.raises(ValueError, match="is not a file of Moments"):
            Moments.load(tmp_path / "other.npz")
        arrays = Moments().update(*data()).to_arrays() | {"format": np.array(99)}
        with pytest.raises(ValueError, match="format 99"):
            Moments.from_arrays(arrays)


WORKER = """
import os
import sys
import numpy as np
import torch.distributed as dist
from droplens.linear import Moments

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
rng = np.random.default_rng(rank)
moments = Moments()
moments.update(rng.standard_normal((10 + rank, 4)) + 5, rng.standard_normal((10 + rank, 2)))
moments.all_reduce().save(f"{out}-both{rank}")
(moments if rank == 0 else Moments()).all_reduce().save(f"{out}-first{rank}")
uneven = Moments().update(np.ones((3, 4 + rank)), np.ones((3, 2)))
for bad, message in ((uneven, "different dimensions"), (Moments(), "no process holds examples")):
    try:
        bad.all_reduce()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
dist.barrier()
dist.destroy_process_group()
# gloo's threads may outlive the group; leaving at once spares their race with the interpreter.
os._exit(0)
"""


def test_all_reduce_over_two_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    places = [str(tmp_path / "store"), str(tmp_path / "out")]
    workers = [
        subprocess.Popen([sys.executable, str(script), str(rank), *places]) for rank in (0, 1)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    parts = []
    for rank in (0, 1):
        rng = np.random.default_rng(rank)
        X = rng.standard_normal((10 + rank, 4)) + 5
        parts.append(Moments().update(X, rng.standard_normal((10 + rank, 2))))
    for rank in (0, 1):
        assert_same(Moments.load(f"{places[1]}-both{rank}"), parts[0].merge(parts[1]))
        assert_same(Moments.load(f"{places[1]}-first{rank}"), parts[0])


class Batches:
    """What a Ray data set offers to a reader."""

    def __init__(self, columns):
        self.columns = columns

    def iter_batches(self, *, batch_size, batch_format):
        assert batch_format == "numpy"
        n = len(next(iter(self.columns.values())))
        for start in range(0, n, batch_size):
            yield {name: c[start : start + batch_size] for name, c in self.columns.items()}


class TestRay:
    def test_reads_batches_of_columns(self):
        X, Y = data()
        source = Batches({"a": X[:, 0], "rest": X[:, 1:], "y": Y})
        assert_same(
            moments_from_ray(source, ["a", "rest"], "y", batch_size=7), Moments().update(X, Y)
        )

    def test_errors(self):
        X, Y = data()
        with pytest.raises(ValueError, match=r"no column 'z'; there are \['x', 'y'\]"):
            moments_from_ray(Batches({"x": X, "y": Y}), "z", "y")
        with pytest.raises(TypeError, match=r"dataset has to be a ray\.data\.Dataset"):
            moments_from_ray([], "x", "y")

    @pytest.mark.slow
    def test_sums_on_a_cluster(self):
        pytest.importorskip("ray.data", reason="needs the extra ray")
        code = """
            import logging, numpy as np, ray
            from droplens.linear import Moments, moments_from_ray
            ray.init(num_cpus=1, include_dashboard=False, logging_level=logging.ERROR)
            rng = np.random.default_rng(0)
            X, Y = rng.standard_normal((40, 5)), rng.standard_normal((40, 3))
            dataset = ray.data.from_numpy(X).zip(ray.data.from_numpy(Y))
            found = moments_from_ray(dataset, "data", "data_1", batch_size=16)
            whole = Moments().update(X, Y)
            assert found.count == 40, found
            np.testing.assert_allclose(found.gram().xx, whole.gram().xx)
            np.testing.assert_allclose(found.gram().yx, whole.gram().yx)
        """
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)


class TestBadInput:
    def test_nothing_yet(self):
        with pytest.raises(ValueError, match="hold no examples yet"):
            Moments().solve(0.5, 2)
        with pytest.raises(ValueError, match="hold no examples yet"):
            Moments.from_batches([])

    def test_a_bad_batch_leaves_no_trace(self):
        X, Y = data(3000)
        moments = Moments().update(X, Y)
        before = moments.to_arrays()
        X[2999, 1] = np.inf
        with pytest.raises(ValueError, match="X has to be finite, but holds inf"):
            moments.update(X, Y)
        for name, array in moments.to_arrays().items():
            np.testing.assert_array_equal(array, before[name])

    def test_dimensions(self):
        X, Y = data()
        moments = Moments().update(X, Y)
        with pytest.raises(ValueError, match="hold 5 inputs and 3 targets, but got 4 and 3"):
            moments.update(X[:, :4], Y)
        with pytest.raises(ValueError, match="hold 5 inputs and 3 targets, but got 3 and 5"):
            moments.merge(Moments().update(Y, X))
        with pytest.raises(ValueError, match="X has 40 rows and Y has 39"):
            moments.update(X, Y[1:])
        with pytest.raises(ValueError, match="X has to hold data, but is empty"):
            moments.update(X[:0], Y[:0])
        with pytest.raises(TypeError, match="other has to be Moments, but got int"):
            moments.merge(3)

    def test_overflow(self):
        with pytest.raises(ValueError, match="squares overflow"):
            Moments().update(np.array([[1e200], [-1e200]]), np.ones((2, 1)))

    def test_without_a_group(self):
        with pytest.raises(RuntimeError, match="init_process_group"):
            Moments().update(*data()).all_reduce()
