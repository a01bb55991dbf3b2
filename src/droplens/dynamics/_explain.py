"""Why the training loss in a log is not the validation loss: the gap, split into its causes."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from droplens._pairs import Pairs
from droplens.batches import Batch, as_batches, rows_of
from droplens.calling import check_outputs, predictions
from droplens.discovery import Call, guarded, switched
from droplens.discovery import sites as find_sites
from droplens.dynamics._affine import is_affine
from droplens.dynamics._ensembles import Ensembles, EnsembleSums, InDouble, leave_one_out_means
from droplens.estimates import (
    Estimate,
    exact,
    jackknife,
    note_on_untold,
    skewed_mean,
    told,
)
from droplens.gates import draw_masks, masks_off, masks_replaced
from droplens.losses import Family
from droplens.losses import family as family_of
from droplens.measure._risk import labelled
from droplens.penalties._pooling import Group
from droplens.randomness import private_generator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Outputs under masks that are held at once, 128 MB of float32.
_HELD = 1 << 25
# Examples that show whether the outputs are affine in the gates.
_LOOKED_AT = 64


@dataclass(frozen=True)
class GapExplained:
    """gap = spread + shift + norm_mode + generalization, in units of the loss.

    Errors are over masks with the data held fixed, but for `generalization`.

    Args:
        gap: `training` − `validation`.
        spread: noise of the masks around the mean output, on the training data.
        shift: the loss at the mean output minus that of the network without masks.
        norm_mode: what norm layers in train mode, with the batch's statistics, add to the loss
            under dropout. Masks change these statistics, so this is no constant of the data.
        generalization: loss without dropout on the training minus on the validation data, negative
            where the network does better on what it was trained on. It is exact for these data; the
            error is that of other validation examples.
        training: the loss in train mode on the training data, as a training log shows it.
        validation: the loss in eval mode on the validation data.
        ensembles: on the validation data, what MC dropout would predict.
        draws: masks drawn, on the training and on the validation data.
        seed: repeats the draws.
        unmeasured: sites without a law, and why; they were off.
        notes: what a reader of the numbers should know.
        divisor: what the loss's mean over the training data divides by; None for a sum.
        validation_divisor: likewise over the validation data.
    """

    gap: Estimate
    spread: Estimate
    shift: Estimate
    norm_mode: Estimate
    generalization: Estimate
    training: Estimate
    validation: Estimate
    ensembles: Ensembles
    draws: int
    seed: int
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    divisor: float | None = None
    validation_divisor: float | None = None

    def all_reduce(self, group: "ProcessGroup | None" = None) -> "GapExplained":
        """The gap over the data of all processes, the same on each.

        Every process explains its own part of the training and of the validation data, with its
        own masks, and calls this. Norm layers in train mode saw the batches of their process, as
        they do where training is distributed.

        Args:
            group: of torch.distributed; the default group if not given.

        Raises:
            RuntimeError: if torch.distributed has not been initialised.
            ValueError: if the processes met different sites, or drew from one seed.
        """
        trained = Group(self.divisor, [*self.unmeasured], group)
        trained.check_seeds(self.seed)
        parts = trained.pooled([self.training, self.spread, self.shift, self.norm_mode])
        validated = Group(self.validation_divisor, [], group)
        validation, other = validated.pooled([self.validation, self.generalization])
        return replace(
            self,
            gap=parts[0].rescaled(1, -validation.value),
            training=parts[0],
            spread=parts[1],
            shift=parts[2],
            norm_mode=parts[3],
            generalization=replace(
                other,
                value=parts[0].value - sum(part.value for part in parts[1:]) - validation.value,
                n=int(validated.summed([other.n])[0]),
            ),
            validation=validation,
            ensembles=self.ensembles.pooled(validated),
            divisor=trained.divisor,
            validation_divisor=validated.divisor,
        )


def explain_gap(
    model: nn.Module,
    training: Any,
    validation: Any,
    loss: Any,
    draws: int = 200,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> GapExplained:
    """Explain the difference between a training loss, as it is logged, and the validation loss.

    From the loss in eval mode on the training data, dropout adds spread [E A(f_z) − A(f̄)] and shift
    [ℓ(f̄) − ℓ(f_1)] (theory §3.1), norm layers in train mode add what they add at the same masks,
    and other data add the rest. The four sum to the measured gap to rounding. The weights are held
    fixed: a log averages over an epoch in which they move.

    On the validation data the network is compared with its ensembles over masks: KL(geometric ‖
    scaled) is what scaling by 1 − p in place of averaging loses, and `ensembles.gain` what MC
    dropout (`droplens.predict`) would save of the loss.

    Args:
        model: any torch module. Norm layers are taken in train mode where `model.train()` puts
            them there, or as they are if the model comes in train mode.
        training: what `inspect` takes as data, with targets. Norm layers see its batches as they
            come: pass the loader you train with.
        validation: likewise.
        loss: a loss object whose A(f) is known; units and reduction are its own.
        draws: masks to draw on either data; at least 2.
        generator: where the masks come from; a private one seeded by the system if not given.
        seed: in place of a generator.

    Returns:
        The parts, with standard errors.

    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2))
    >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
    >>> found = explain_gap(net, (x[:4], y[:4]), (x[4:], y[4:]), nn.CrossEntropyLoss())
    >>> parts = found.spread, found.shift, found.norm_mode, found.generalization
    >>> abs(sum(float(part) for part in parts) - float(found.gap)) < 1e-12
    True

    Raises:
        TypeError: if the data or the loss are not of a kind we know.
        ValueError: for fewer than 2 draws, or bad data, targets or weights.
    """
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"draws has to be an int, but got {type(draws).__name__}")
    if draws < 2:
        raise ValueError(f"draws has to be at least 2, but got {draws}")
    family = family_of(loss)
    seen, unseen = (as_batches(data, model, loss) for data in (training, validation))
    first = next(iter(seen))
    found = find_sites(model, first.inputs)
    weight = next(model.parameters(), torch.empty(0))
    source, used_seed = private_generator(generator, seed, weight.device)
    live = _live_norms(model)
    rates = [getattr(site.law, "p", None) for site in found if site.law is not None]
    drops = any(rate != 0 for rate in rates)
    summed = getattr(loss, "reduction", "mean") == "sum"
    with torch.no_grad():
        trained = _Training(model, family, loss, draws, source, live)
        for batch, targets in labelled(seen):
            trained.add(batch, targets)
        few = rows_of(next(iter(unseen)).inputs, slice(_LOOKED_AT))
        # Masks have mean one, but where they drop everything.
        affine = drops and 1 not in rates and is_affine(model, few, source)
        validated = _Validation(model, family, loss, draws if drops else 2, source, affine)
        for batch, targets in labelled(unseen):
            validated.add(batch, targets)
    base, spread, shift, norm_mode, total = trained.estimates(summed, drops)
    other, error, count = validated.mean_and_error(summed)
    ensembles = validated.ensembles.estimates(summed, drops)
    rows = {"training": total, "spread": spread, "shift": shift, "norm_mode": norm_mode}
    rows |= {f"ensembles.{name}": v for name, v in vars(ensembles).items() if v is not None}
    return GapExplained(
        total.rescaled(1, -other),
        spread,
        shift,
        norm_mode,
        Estimate(base - other, error, count, "validation examples"),
        total,
        exact(other),
        ensembles,
        draws,
        used_seed,
        {site.name: site.reason or "" for site in found if site.law is None},
        (*_notes(live), *note_on_untold(rows)),
        None if summed else trained.masses,
        None if summed else validated.ensembles.masses,
    )


def _notes(live: list[nn.Module]) -> tuple[str, ...]:
    if not live:
        return ()
    kinds = ", ".join(sorted({type(module).__name__ for module in live}))
    return (f"{kinds} in train mode took its statistics from the training batches as given",)


def _live_norms(model: nn.Module) -> list[nn.Module]:
    """The norm layers that are in train mode when the model is."""
    with guarded(model):
        if not model.training:
            model.train()
        return [m for m in model.modules() if isinstance(m, _NormBase) and m.training]


@contextmanager
def _masks_and_norms(
    model: nn.Module, live: list[nn.Module], source: torch.Generator
) -> Iterator[None]:
    """Like `masks_replaced`, with the `live` norm layers in train mode; buffers are restored."""
    draw = draw_masks(source)

    def visit(call: Call, x: Tensor) -> Tensor:
        return draw(call, x) if call.on and call.law is not None else x

    with switched(model, visit):
        for module in live:
            module.training = True
        yield


def _undropped(model: nn.Module, inputs: Any) -> Tensor:
    with masks_off(model):
        outputs = predictions(model, inputs)
    check_outputs(model, outputs)
    return outputs


def _undropped_parts(
    model: nn.Module, batch: Batch, targets: Tensor, draws: int, whole: bool = False
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """So many examples at once that their drawn outputs fit into memory, or the `whole` batch.

    Yields:
        Inputs, targets, and the outputs without dropout.
    """
    outputs = _undropped(model, batch.inputs)
    rows = len(outputs) if whole else max(1, _HELD // (draws * outputs[0].numel()))
    for start in range(0, len(outputs), rows):
        part = slice(start, start + rows)
        yield rows_of(batch.inputs, part), targets[part], outputs[part]


class _Training:
    """Adds up, over training batches, the losses under each of K masks."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        loss: Any,
        draws: int,
        source: torch.Generator,
        live: list[nn.Module],
    ) -> None:
        self.model, self.family, self.loss = model, family, loss
        self.draws, self.source, self.live = draws, source, live
        self.masses, self.base, self.centre = 0.0, 0.0, 0.0
        # by draw: ℓ(f_z), Σ A(f_z), Σ A at the mean without it, ℓ with norm layers in train mode
        self.rows = torch.zeros(4, draws, dtype=torch.float64)
        self.products = torch.zeros((), dtype=torch.float64)

    def add(self, batch: Batch, targets: Tensor) -> None:
        """Count one batch."""
        # Norm layers in train mode need the batch whole.
        parts = _undropped_parts(self.model, batch, targets, self.draws, whole=bool(self.live))
        for part in parts:
            self._add(*part)

    def _add(self, inputs: Any, targets: Tensor, outputs: Tensor) -> None:
        scorer = InDouble(self.family, self.loss, outputs, targets)
        states, drawn = [], []
        with masks_replaced(self.model, draw_masks(self.source)):
            for _ in range(self.draws):
                states.append(self.source.get_state())
                drawn.append(predictions(self.model, inputs))
        centre, others = leave_one_out_means(torch.stack(drawn).double())
        losses = [scorer.loss_at(f) for f in drawn]
        rows = [
            losses,
            [scorer.partition_at(f) for f in drawn],
            [scorer.partition_at(f) for f in others],
            self._in_train_mode(inputs, scorer, states) if self.live else losses,
        ]
        mass = scorer.mass
        self.masses += mass
        self.products = self.products + scorer.products(centre, others)
        self.base += mass * scorer.loss_at(outputs)
        self.centre += mass * scorer.partition_at(centre)
        self.rows += mass * torch.tensor(rows, dtype=torch.float64)

    def _in_train_mode(self, inputs: Any, scorer: InDouble, states: list[Tensor]) -> list[float]:
        """ℓ under the same masks, norm layers with the batch's statistics."""
        found, after = [], self.source.get_state()
        with _masks_and_norms(self.model, self.live, self.source):
            for state in states:
                self.source.set_state(state)
                found.append(scorer.loss_at(predictions(self.model, inputs)))
        self.source.set_state(after)
        return found

    def estimates(
        self, summed: bool, drops: bool
    ) -> tuple[float, Estimate, Estimate, Estimate, Estimate]:
        """The loss without masks, spread, shift, norm mode, and the loss in train mode."""
        total = 1.0 if summed else self.masses
        base, centre = self.base / total, self.centre / total
        losses, partitions, left_out, live = self.rows / total
        if not drops:
            added = float(live.mean()) - base if self.live else 0.0
            nothing = exact(0.0)
            return base, nothing, nothing, exact(added), exact(base + added)
        draws = self.draws
        others = (draws * partitions.mean() - partitions) / (draws - 1)
        plug_in = float(partitions.mean()) - centre
        products = self.products / total
        spread = jackknife(plug_in, others - left_out, pairs=Pairs(products, draws, -0.5))
        means = (draws * losses.mean() - losses) / (draws - 1)
        shift = jackknife(
            float(losses.mean() - partitions.mean()) + centre - base,
            means - others + left_out - base,
            pairs=Pairs(products, draws, 0.5),
        )
        norm_mode = skewed_mean(live - losses) if self.live else exact(0.0)
        return base, told(spread), told(shift), told(norm_mode), told(skewed_mean(live))


class _Validation:
    """Adds up, over validation batches, losses by example and the ensembles' sums."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        loss: Any,
        draws: int,
        source: torch.Generator,
        affine: bool,
    ) -> None:
        self.model, self.family, self.loss = model, family, loss
        self.draws, self.source = draws, source
        self.ensembles = EnsembleSums(draws, affine)
        self.values: list[float] = []
        self.masses: list[float] = []

    def add(self, batch: Batch, targets: Tensor) -> None:
        """Count one batch."""
        for part in _undropped_parts(self.model, batch, targets, self.draws):
            self._add(*part)

    def _add(self, inputs: Any, targets: Tensor, outputs: Tensor) -> None:
        scorer = InDouble(self.family, self.loss, outputs, targets)
        with masks_replaced(self.model, draw_masks(self.source)):
            drawn = torch.stack([predictions(self.model, inputs) for _ in range(self.draws)])
        self.ensembles.add(scorer, outputs, drawn)
        # One row at a time, any loss tells its value and what it divides by.
        for row in range(len(outputs)):
            f, y = outputs[row : row + 1], targets[row : row + 1]
            mass = self.family.normalizer(f, y)
            self.masses.append(mass)
            self.values.append(float(self.loss(f, y)) if mass else 0.0)

    def mean_and_error(self, summed: bool) -> tuple[float, float, int]:
        """The loss, its standard error over examples, and their number.

        For a mean the linearised error of Σ m v / Σ m, m what an example's loss divides by.
        """
        v = torch.tensor(self.values, dtype=torch.float64)
        m = torch.tensor(self.masses, dtype=torch.float64)
        n, total = len(v), 1.0 if summed else self.ensembles.masses
        mean = self.ensembles.scaled / total
        error = v - v.mean() if summed else m * (v - mean) / m.sum()
        scale = n / (n - 1) if n > 1 else math.nan
        return mean, math.sqrt(scale * float(error.square().sum())) if n > 1 else math.nan, n
