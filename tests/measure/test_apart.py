import math

import numpy as np
import pytest
import torch
from torch import nn

from droplens import measure
from droplens.batches import checked_passes
from droplens.measure._apart import draws_needed, note_of
from droplens.measure._masks import Masking
from droplens.measure._operators import LossHessian
from droplens.measure._risk import Loss
from tests.measure.test_hessian import CE, examples, network

VALUES, UNIT = np.array([3.0, 2.0, 1.0]), 2.0**-52


def drawn(noise):
    """Eight draws of a diagonal matrix with noise that is a sign times what is given."""
    signs = np.array([1, 1, 1, 1, -1, -1, -1, -1])
    return np.diag(VALUES) + signs[:, None, None] * noise, 8 / 7 * np.square(noise)


def test_noise_between_two_turns_their_eigenvectors():
    noise = 0.3 * np.eye(3)  # moves all alike, and nothing to another's place
    noise[0, 1] = noise[1, 0] = 0.2
    forms, variance = drawn(noise)
    found = draws_needed(forms, np.zeros(3), UNIT)
    assert found == pytest.approx([50 * variance[0, 1], 50 * variance[0, 1], 0])


def test_noise_along_both_lets_them_change_places():
    forms, _ = drawn(np.diag([0.3, -0.1, 0.0]))
    found = draws_needed(forms, np.zeros(3), UNIT)
    apart = 4 * 8 / 7 * np.array([0.4**2, 0.4**2, max(0.1**2, 0.3**2 / 4)])
    assert found == pytest.approx(apart)


def test_noise_in_many_other_directions_biases():
    forms, variance = drawn(np.diag([1e-3, 1e-3, 1e-3]))
    beyond = np.array([0.01, 0.0, 0.0])
    found = draws_needed(forms, beyond, UNIT)
    assert found[0] == pytest.approx(16 * (0.01 / 2.5) ** 2 / variance[0, 0])
    assert found[1:] == pytest.approx(16 * np.zeros(2), abs=1e-3)


def test_rounding_moves_nothing():
    forms = np.diag([1.0, 1.0, 1.0]) + 1e-16 * np.random.default_rng(0).standard_normal((8, 3, 3))
    assert (draws_needed(forms, np.zeros(3), UNIT) == 0).all()
    assert draws_needed(np.zeros((8, 0, 0)), np.zeros(0), UNIT).shape == (0,)


def test_so_many_draws_turn_an_eigenvector_by_an_angle_of_square_a_fiftieth():
    """Sums over a spectrum, each direction of it with noise."""
    source = np.random.default_rng(1)
    spectrum = np.array([3.0, 1.0, 0.5, 0.0, 0.0, -0.5])
    noise = source.standard_normal((40_000, 6, 6))
    forms = np.diag(spectrum) + 0.5 * (noise + noise.transpose(0, 2, 1)) / 2**0.5
    needed = math.ceil(draws_needed(forms, np.zeros(6), UNIT)[0])
    means = forms[: 40_000 // needed * needed].reshape(-1, needed, 6, 6).mean(1)
    _, vectors = np.linalg.eigh(means)
    angles = 1 - vectors[:, 0, -1] ** 2
    # Not the bias or a neighbour, but the angle is what asks for so many.
    assert 0.015 < angles.mean() < 0.022


def test_what_is_said_of_them():
    assert note_of(np.array([3.0, 8.0]), 8) == ()
    (note,) = note_of(np.array([3.0, 123.4, 9.0]), 8)
    assert "8 draws of masks do not tell λ2 and λ3 apart" in note
    assert "λ2 and λ3 have no standard error; it takes about 130 draws or more" in note
    (note,) = note_of(np.array([math.inf]), 8)
    assert note.endswith("so that λ1 has no standard error")


def test_errors_of_expected_eigenvalues():
    """Those told apart have the error of qᵀHq; others have none, and a note."""
    model, data = network(), examples()
    found = measure.hessian(model, data, CE, 5, "expected", draws=64, seed=0)
    stated = ~found.standard_errors.isnan()
    assert stated[0]
    assert not stated.all()
    lacking = [f"λ{k}" for k, known in enumerate(stated.tolist(), 1) if not known]
    note = found.notes[-1]
    assert note.startswith("64 draws of masks do not tell λ")
    assert all(name in note for name in lacking)
    q = torch.cat([part.flatten() for part in found.eigenvectors[0].values()]).numpy()
    with Masking("expected", 64, 0).applied(model) as applied:
        passes = checked_passes(data, model, in_order=True)
        H = LossHessian(model, passes, Loss(CE), applied)
        forms = [float(q @ H.products_of_draw(k, q[:, None])[:, 0]) for k in range(64)]
    assert float(found.standard_errors[0]) == pytest.approx(np.std(forms, ddof=1) / 8, rel=1e-6)
    assert len(found.eigenvectors) == len(found.top_eigenvalues) == len(found.residuals) == 5


def test_two_examples_of_nearly_one_curvature_are_not_told_apart():
    """Each has its own direction, that the other's masks do not turn: they change places."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 2), nn.Tanh(), nn.Dropout(0.5), nn.Linear(2, 3)).double()
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(2, 30, generator=generator).double(), torch.tensor([0, 2])
    found = measure.hessian(model, data, CE, 2, "expected", probes=2, seed=0)
    assert found.standard_errors.isnan().all()


def test_without_masks_all_are_told_apart():
    for masks in ("off", "fixed"):
        found = measure.hessian(network(), examples(), CE, masks=masks, seed=0)
        assert (found.standard_errors == 0).all()
        assert not any("apart" in note for note in found.notes)


def test_eigenvalues_of_the_expected_fisher_information():
    model, (x, _) = network(), examples()
    few = {"probes": 2, "steps": 1}
    found, other = (
        measure.fisher_spectrum(model, x, CE, 3, "expected", draws=64, seed=seed, **few)
        for seed in range(2)
    )
    stated = ~found.standard_errors.isnan()
    assert stated[0]
    assert bool(stated.all()) == (not found.notes)
    distance = abs(float(found.top_eigenvalues[0] - other.top_eigenvalues[0]))
    assert 0 < distance < 4 * float(found.standard_errors[0].hypot(other.standard_errors[0]))
    off = measure.fisher_spectrum(model, x, CE, 3, seed=0, **few)
    assert (off.standard_errors == 0).all()
    assert off.notes == ()
