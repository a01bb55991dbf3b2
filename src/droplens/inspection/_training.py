"""Measures on request of what dropout does to training: its noise, its gap, its equals."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor

from droplens.batches import Batch, as_batches, counted_parts, n_examples
from droplens.dynamics import (
    Alignment,
    FrozenMaskOrder,
    GapExplained,
    GradientNoise,
    ModifiedLoss,
    explain_gap,
    frozen_mask_order,
    modified_loss,
)
from droplens.dynamics._alignment import alignment_on
from droplens.dynamics._masked import MaskedLoss
from droplens.dynamics._noise import noise_on
from droplens.inspection._extra import Extra
from droplens.inspection._sizes import MOST_PASSES, MOST_WEIGHTS, targets_of
from droplens.inspection._subject import Subject
from droplens.masks import Bernoulli, Block, Channel, Gaussian, Law, Path, Weight
from droplens.penalties import EquivalentRates, PenaltyCurve, equivalent_rates, penalty_curve
from droplens.randomness import private_generator
from droplens.verdicts import Verdict

_NOISE_DRAWS: Final = 50
_GAP_DRAWS: Final = 50
_ALIGNED_DRAWS: Final = 256
_PROBES: Final = 64
# Examples that gradients under masks are taken on, from as many batches as that takes.
_MOST_EXAMPLES: Final = 2048
# Examples whose masks are held fixed; how distances shrink with the step shows on any number.
_HELD_FIXED: Final = 64
_LAWS: Final[Mapping[str, Law]] = {
    "a coin per unit (Dropout)": Bernoulli(0.5),
    "a normal factor per unit (GaussianDropout)": Gaussian(0.5),
    "a coin per channel (Dropout2d)": Channel(0.5),
    "blocks of 3 in a row (DropBlock1d)": Block(0.5, 3, dims=1),
    "blocks of 3 x 3 (DropBlock2d)": Block(0.5, 3, dims=2),
    "a coin per example (DropPath)": Path(0.5),
    "a coin per weight (DropConnect)": Weight(0.5),
}
_RATES: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
# R_2 is proportional to it.
_STEP: Final = 0.1
_MODIFIED_DRAWS: Final = 50


def _first(on: Subject, most: int = _MOST_EXAMPLES) -> tuple[Batch, Tensor]:
    batch = next(counted_parts(next(iter(on.batches)), most, on.loss))
    return batch, targets_of(batch.targets)


def some(on: Subject) -> list[Batch]:
    """Batches of the data until there are enough examples."""
    found: list[Batch] = []
    left = _MOST_EXAMPLES
    for batch in on.batches:
        found.append(next(counted_parts(batch, left, on.loss)))
        left -= n_examples(found[-1].inputs)
        if left <= 0:
            break
    return found


def _noise(on: Subject) -> GradientNoise:
    masked = MaskedLoss(on.model, some(on), on.loss)
    source, seed = private_generator(None, on.seed, masked.device)
    return noise_on(masked, _NOISE_DRAWS, masked.lawful, source, seed)


def _alignment(on: Subject) -> Alignment:
    if on.sizes.weights > MOST_WEIGHTS:
        raise ValueError(
            f"its vectors are too large for a page ({on.sizes.weights:,} trainable numbers); "
            "droplens.dynamics.noise_alignment measures it"
        )
    return alignment_on(on.model, some(on), on.loss, _ALIGNED_DRAWS, _PROBES, None, on.seed)


def _gap(on: Subject) -> GapExplained:
    if on.held_out is None:
        raise ValueError("it needs data that was not trained on; pass held_out=")
    return explain_gap(on.model, on.batches, on.held_out, on.loss, _GAP_DRAWS, seed=on.seed)


def _modified(on: Subject) -> ModifiedLoss:
    batches = as_batches(some(on), loss=on.loss)
    return modified_loss(on.model, batches, None, on.loss, _STEP, _MODIFIED_DRAWS, seed=on.seed)


def _order(on: Subject) -> FrozenMaskOrder:
    if on.sizes.weights > MOST_WEIGHTS:
        raise ValueError(
            f"its descents take too long for a page ({on.sizes.weights:,} trainable numbers); "
            "droplens.dynamics.frozen_mask_order makes them"
        )
    batch, targets = _first(on, _HELD_FIXED)
    return frozen_mask_order(on.model, batch.inputs, targets, on.loss, seed=on.seed)


def _check_passes(on: Subject, name: str) -> None:
    if on.sizes.passes > MOST_PASSES:
        raise ValueError(
            f"it takes {on.sizes.passes:,} backward passes over a batch, several times; "
            f"droplens.{name} computes it all the same"
        )


def _curve(on: Subject) -> PenaltyCurve:
    _check_passes(on, "penalty_curve")
    return penalty_curve(on.model, on.batches, on.loss, _RATES)


def _rates(on: Subject) -> EquivalentRates:
    """Of every law that fits the sites.

    Raises:
        ValueError: if none does, or it takes too long for a page.
    """
    _check_passes(on, "equivalent_rates")
    batch, targets = _first(on)
    found: EquivalentRates | None = None
    unfit: dict[str, str] = {}
    for name, law in _LAWS.items():
        try:
            one = equivalent_rates(on.model, batch.inputs, on.loss, {name: law}, targets=targets)
        except ValueError as error:
            unfit[name] = str(error)
            continue
        if found is None:
            found = one
        found = replace(
            found,
            rates={**found.rates, **one.rates},
            unreached={**found.unreached, **one.unreached},
        )
    if found is None:
        raise ValueError(next(iter(unfit.values())))
    return replace(found, unreached={**found.unreached, **unfit})


TRAINING: Final[Mapping[str, Extra]] = {
    "gap": Extra(_gap, "with held_out= splits training minus held-out loss into its causes"),
    "gradient_noise": Extra(_noise, "gives the noise that masks put on the gradient, by site"),
    "alignment": Extra(_alignment, "holds that noise against the Hessian, beside a null"),
    "modified_loss": Extra(
        _modified, "gives R_S, R_1 and R_2, what training with dropout descends"
    ),
    "frozen_mask_order": Extra(
        _order, "tests on this network what R_2 describes: descent with one mask, held fixed"
    ),
    "penalty_curve": Extra(_curve, "gives what other rates would cost this network"),
    "equivalent_rates": Extra(_rates, "gives the rates at which other masks cost the same"),
}


def gap_verdicts(gap: GapExplained, unit: str) -> list[Verdict]:
    """Whether averaging over masks pays on held-out data."""
    gain = gap.ensembles.gain
    if gain is None or gain.standard_error == 0:  # unknown, or exactly nothing
        return []
    low, high = gain.interval()
    if low > 0:
        outcome, sentence = "yes", f"MC dropout would lower the held-out loss by {gain} {unit}"
    elif high <= 0:
        lost = gain.rescaled(-1)
        outcome = "no"
        sentence = f"MC dropout would not lower the held-out loss: it raises it by {lost} {unit}"
    else:
        outcome = "cannot conclude"
        sentence = f"What MC dropout would save of the held-out loss ({gain} {unit}) is not told"
        sentence += " from zero"
    return [
        Verdict(
            f"{sentence} (of {gap.validation} {unit}).",
            outcome,  # type: ignore[arg-type]  # one of the outcomes
            "pays, when the 95% interval over masks of held-out loss without masks minus that of "
            "the mean prediction lies above zero",
            0.0,
            gain,
            gain.n,
            unit,
            question="Does MC dropout pay?",
            id="mc-dropout",
        )
    ]
