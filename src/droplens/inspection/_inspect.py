"""Everything the library can say of one network, as one object."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from droplens._items import predicts_next_token
from droplens.batches import Batches, as_batches, checked_passes, everything
from droplens.calling import check_model
from droplens.discovery import KEPT_IN_EVAL, Site
from droplens.discovery import sites as find_sites
from droplens.inspection._cost import GAUSSIAN, Cost, cost_of
from droplens.inspection._cost_verdicts import cost_verdicts, lawless_verdict
from droplens.inspection._extras import checked_names, measured_on_request, offers
from droplens.inspection._flatness import outputs_of, scaled_loss
from droplens.inspection._measures import measures_of
from droplens.inspection._rendered import Rendered
from droplens.inspection._sizes import Sizes, sizes_of, targets_of
from droplens.inspection._subject import Subject
from droplens.inspection._training import gap_verdicts
from droplens.inspection._verdicts import MOST_SITES, equalisation_verdicts
from droplens.losses import Squared
from droplens.losses import family as family_of
from droplens.measure import (
    Condensation,
    Equalization,
    Fisher,
    Flatness,
    Hessian,
    Sharpness,
    Spectrum,
    equalization,
)
from droplens.measure._readers import readers
from droplens.randomness import private_generator
from droplens.verdicts import Verdict

if TYPE_CHECKING:
    from droplens.report import Document

Progress = Callable[[float, str], None]

MODE = "dropout off (drawn explicitly where the text says masks), norm layers in eval"


@final
@dataclass(frozen=True)
class Inspection(Rendered):
    """What dropout does to one network on one data set.

    Args:
        sites: every stochastic site of the forward pass.
        cost: what dropout costs, in `unit`; None if the network drops nothing.
        accuracy: share of right classes without dropout, for class labels; else None.
        base: the loss without dropout, in `unit`.
        equalization: how equal the units of each site are.
        layers: the layer that reads each site's units, by site.
        spectra: singular values of every linear layer's weights, by parameter.
        condensation: how many directions a layer's neurons point in, by parameter.
        fisher: trace and diagonal of the Fisher information.
        hessian: trace and largest eigenvalues of the loss's Hessian.
        flatness: loss along random filter-normalised directions.
        expected_flatness: the same for the loss averaged over masks; None if nothing is dropped.
        sharpness: mean increase of the loss under noise on the weights, raw and scale-free.
        extras: the measures asked for by name.
        verdicts: plain sentences with their rules.
        not_measured: what is missing, and why.
        examples: how many examples it was measured on.
        loss: the loss object's type.
        unit: of the loss ("nats", or "units of the loss").
        mode: in which mode the network was measured.
        seed: repeats everything sampled.
    """

    sites: tuple[Site, ...]
    cost: Cost | None
    base: float
    accuracy: float | None
    equalization: Mapping[str, Equalization]
    layers: Mapping[str, str]
    spectra: Mapping[str, Spectrum]
    condensation: Mapping[str, Condensation]
    fisher: Fisher | None
    hessian: Hessian | None
    flatness: Flatness | None
    expected_flatness: Flatness | None
    sharpness: Sharpness | None
    extras: Mapping[str, Any]
    verdicts: tuple[Verdict, ...]
    not_measured: Mapping[str, str]
    examples: int
    loss: str
    unit: str
    mode: str
    seed: int

    def to_document(self, title: str = "What dropout does to this network") -> "Document":
        """The inspection as a report: for pages, terminals and JSON."""
        from droplens.report import inspection_document

        return inspection_document(self, title)


def inspect(  # noqa: PLR0913  # the last seven are keywords with defaults
    model: nn.Module,
    data: Any,
    loss: nn.Module,
    *,
    held_out: Any = None,
    draws: int = 100,
    directions: int = 8,
    measures: Sequence[str] = (),
    generator: torch.Generator | None = None,
    seed: int | None = None,
    on_progress: Progress | None = None,
) -> Inspection:
    """Say what dropout does to one network: where it is, what it costs, what it left behind.

    The model is left as it was found. Every number is in units of `loss`, with dropout off unless
    masks are named.

    Args:
        model: any torch module whose forward returns one tensor of predictions, or a mapping with
            "logits".
        data: a pair (inputs, targets), a TensorDataset, or a DataLoader, also of mappings that hold
            "labels"; streamed, never held.
        loss: a loss object, such as `nn.CrossEntropyLoss()`.
        held_out: data that was not trained on, if `data` was: the gap between the training loss of
            a log and the loss there is split into its causes ("gap" in `extras`).
        draws: masks to draw for the cost, and for that of each site alone.
        directions: random directions for the flatness.
        measures: names of measures that take longer and are made on request; a page lists under
            "not measured" those that were not asked for.
        generator: where randomness comes from; a private one seeded by the system if not given.
        seed: in place of a generator.
        on_progress: called with the share done and what is being done.

    Returns:
        Numbers and verdicts; prints as a table, renders as a page.

    Raises:
        TypeError: if the data, the loss or the model's output is not of a kind we know.
        ValueError: if data or weights hold NaN or Inf, labels are out of range, data is empty, or a
            measure's name is unknown.
    """
    asked = checked_names(measures if held_out is None else (*measures, "gap"))
    tell = on_progress or (lambda share, doing: None)
    check_model(model)
    family = family_of(loss)
    batches = checked_passes(data, model, loss)
    apart = None if held_out is None else as_batches(held_out, model, loss)
    first = next(iter(batches))
    targets_of(first.targets)
    source, used_seed = private_generator(generator, seed)
    tell(0.0, "Finding the sites")
    found = _sites_of(model, batches)
    mode = _mode(model, found)
    sizes = sizes_of(model, first, family, found)
    subject = Subject(model, batches, loss, sizes, directions, used_seed, apart)
    not_measured = {f"site {s.name}": s.reason or "" for s in found if s.law is None}

    tell(0.05, "Drawing masks")
    cost = _priced(subject, found, draws, source, not_measured)
    tell(0.5, "Weighing the units")
    equal, layers = _weighed(subject, not_measured)

    def tell_rest(share: float, doing: str) -> None:
        tell(0.6 + (0.15 if asked else 0.35) * share, doing)

    left = measures_of(subject, not_measured, tell_rest)
    if asked:
        tell(0.75, "Measuring what was asked for")
    extras = measured_on_request(asked, subject, not_measured)
    unit = "nats" if family.splits and not isinstance(family, Squared) else "units of the loss"
    outputs = outputs_of(model, batches)
    verdicts = lawless_verdict(found) if cost is None else cost_verdicts(cost, unit)
    verdicts += equalisation_verdicts(equal, layers)
    if "gap" in extras:
        verdicts += gap_verdicts(extras["gap"], unit)
    tell(1.0, "Done")
    return Inspection(
        sites=found,
        cost=cost,
        base=scaled_loss(outputs, loss, 1.0),
        accuracy=accuracy_of(outputs, loss),
        equalization=equal,
        layers=layers,
        **vars(left),
        extras=extras,
        verdicts=tuple(verdicts),
        not_measured=not_measured | offers(asked),
        examples=sum(len(f) for f, _ in outputs),
        loss=type(loss).__name__,
        unit=unit,
        mode=mode,
        seed=used_seed,
    )


def _sites_of(model: nn.Module, batches: Batches) -> tuple[Site, ...]:
    """The sites that any batch meets: a forward may choose its way by the data."""
    met: dict[str, Site] = {}
    for batch in batches:
        for site in find_sites(model, batch.inputs):
            met.setdefault(site.name, site)
    return tuple(met.values())


def _priced(
    subject: Subject,
    sites: Sequence[Site],
    draws: int,
    source: torch.Generator,
    not_measured: dict[str, str],
) -> Cost | None:
    """What dropout costs; where that cannot be told, the reason is added to `not_measured`."""
    try:
        _check_priceable(sites)
        cost = cost_of(subject, draws, source)
    except _UnpricedError as error:
        not_measured["cost of dropout"] = str(error)
        return None
    not_measured |= _unpriced(cost, subject.sizes)
    return cost


def _weighed(
    subject: Subject, not_measured: dict[str, str]
) -> tuple[dict[str, Equalization], dict[str, str]]:
    """By site: how equal its units are, and the layer that reads them."""
    behind, missing = readers(subject.model, everything(subject.batches))
    not_measured |= _unweighed(missing)
    equal = {
        name: equalization(reader.outgoing, reader.rms[None], rows="examples")
        for name, reader in behind.items()
    }
    return equal, {name: reader.layer for name, reader in behind.items()}


def _mode(model: nn.Module, sites: Sequence[Site]) -> str:
    """In which mode everything is measured, and where that is not the mode the model came in."""
    said = [MODE]
    kinds = {
        type(m).__name__ for m in model.modules() if isinstance(m, KEPT_IN_EVAL) and m.training
    }
    if kinds:
        said.append(f"{', '.join(sorted(kinds))} came in train mode and is measured in eval")
    if any(site.kind == "F.scaled_dot_product_attention" for site in sites):
        said.append("attention on torch's maths kernel, the one with second derivatives")
    if predicts_next_token(model):
        said.append("labels of a batch are compared with the predictions one position earlier")
    return "; ".join(said)


def _unweighed(missing: Mapping[str, str]) -> dict[str, str]:
    """The sites whose units have no outgoing weights, in one line where they are many."""
    if len(missing) <= MOST_SITES:
        return {f"equalisation at {name}": why for name, why in missing.items()}
    by_reason: dict[str, list[str]] = {}
    for name, why in missing.items():
        by_reason.setdefault(why, []).append(name)
    return {
        f"equalisation at {len(names)} sites": f"{why}: {', '.join(names)}"
        for why, names in by_reason.items()
    }


class _UnpricedError(Exception):
    """Why the sites of a network have no cost to tell."""


def _check_priceable(sites: Sequence[Site]) -> None:
    """Refuse sites of which none has a law, or one drops everything.

    Raises:
        _UnpricedError: saying which.
    """
    lawful = [site for site in sites if site.law is not None]
    if not lawful:
        raise _UnpricedError("the forward pass meets no dropout whose law is known")
    closed = [repr(site.name) for site in lawful if getattr(site.law, "p", None) == 1]
    if closed:
        raise _UnpricedError(
            f"p = 1 at {', '.join(closed)}: every unit is dropped, so no penalty exists to hold "
            "against the masks (it divides by 1 - p); droplens.decompose draws them all the same"
        )


def _unpriced(cost: Cost, sizes: Sizes) -> dict[str, str]:
    """What of the cost was left out, and why."""
    reasons = {f"penalty at {name}": why for name, why in cost.unmeasured.items()}
    reasons |= cost.refused
    if cost.gaussian is None and GAUSSIAN not in reasons:
        reasons[GAUSSIAN] = (
            f"it takes {sizes.passes:,} backward passes over every batch, one for each of "
            f"{sizes.parameters:,} natural parameters in {sizes.terms:,} terms; "
            "droplens.penalty(model, inputs, loss) computes it all the same. The second-order "
            "value was sampled"
        )
    return reasons


def accuracy_of(outputs: list[tuple[Tensor, Tensor]], loss: nn.Module) -> float | None:
    """Share of right classes where targets are labels of one class axis, ignored ones aside."""
    if any(y.is_floating_point() or f.shape[:1] + f.shape[2:] != y.shape for f, y in outputs):
        return None
    ignored = getattr(loss, "ignore_index", None)
    right = counted = 0
    for f, y in outputs:
        used = torch.ones_like(y, dtype=torch.bool) if ignored is None else y != ignored
        right += int((f.argmax(1) == y)[used].sum())
        counted += int(used.sum())
    return right / counted
