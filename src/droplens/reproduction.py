"""The papers' claims run, judged and told: what `droplens reproduce` does."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from droplens._plain import plain
from droplens.papers import (
    BREAKS,
    PAPERS,
    Cell,
    Claim,
    Judgement,
    Scale,
    Theory,
    describe,
    find,
    labels,
    select,
    shared,
)
from droplens.report import (
    Column,
    Document,
    Figure,
    NotMeasured,
    Section,
    Table,
)
from droplens.runs import (
    Batch,
    Executor,
    Group,
    Inline,
    Numbers,
    Processes,
    Store,
    batches,
    complete,
)
from droplens.verdicts import Verdict

Progress = Callable[[float, str], None]

_READERS: Final = ("mnist", "cifar10", "cifar100")


@dataclass(frozen=True)
class Reproduction:
    """Claims that were run, in the papers' order, and what was left out."""

    judgements: tuple[Judgement, ...]
    request: "Request"
    left_out: tuple[NotMeasured, ...] = ()
    batches_run: int = 0
    """The others were finished before."""

    @property
    def as_expected(self) -> bool:
        """Whether every verdict is the one we expected."""
        return all(judgement.as_expected for judgement in self.judgements)

    @property
    def survivors(self) -> tuple[str, ...]:
        """Claims whose verdict did not turn though the theory is broken: something is wrong."""
        broken = bool(self.request.broken)
        return tuple(one.claim.id for one in self.judgements if broken and not one.turned)

    def to_document(self) -> Document:
        """A page: the summary on top, then the claims by paper."""
        sections = [Section("Summary", _SUMMARY_TEXT, [self._summary()])]
        for paper, title in PAPERS.items():
            cards = [_card(one) for one in self.judgements if one.claim.paper == paper]
            if cards:
                sections.append(
                    Section(f"{paper} · {title.split(':', 1)[1].strip()}", title, cards)
                )
        return Document(
            title="What the papers claim, and what came out",
            subtitle=self._subtitle(),
            sections=sections,
            not_measured=self.left_out,
            seed=self.request.first_seed,
            mode=f"scale {self.request.scale}"
            + (f", broken theory: {self.request.broken}" if self.request.broken else ""),
            command=self.request.command,
            kind="claims",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON: the claims first, then the page's own twin."""
        claims = [judgement.to_dict() for judgement in self.judgements]
        return {
            "claims": plain(claims),
            "scale": self.request.scale,
            "broken": self.request.broken,
            "survivors": list(self.survivors),
            **self.to_document().to_dict(),
        }

    def _subtitle(self) -> str:
        counts = Counter(judgement.verdict for judgement in self.judgements)
        plural = {"holds": "hold", "does not hold": "do not hold"}
        parts = [
            f"{n} {verdict if n == 1 else plural.get(verdict, verdict)}"
            for verdict, n in counts.items()
        ]
        differ = [one.claim.id for one in self.judgements if not one.as_expected]
        tail = (
            f"These differ from what we expected: {', '.join(differ)}."
            if differ
            else "Every verdict is the one we expected."
        )
        claims = "1 claim" if len(self.judgements) == 1 else f"{len(self.judgements)} claims"
        said = f"{claims}: {', '.join(parts)}. {tail}"
        if self.request.broken:
            wrong = BREAKS[self.request.broken]
            said += f" The theory was broken on purpose ({wrong}): verdicts must turn. "
            said += (
                f"These did not: {', '.join(self.survivors)}."
                if self.survivors
                else "All of them did."
            )
        return said

    def _summary(self) -> Table:
        columns = ("claim", "verdict", "measured", "predicted")
        rows = [
            (
                f"{one.claim.id}\n{one.claim.statement}",
                _verdict_in_short(one),
                one.measured,
                one.claim.criterion.predicted,
            )
            for one in self.judgements
        ]
        return Table(
            [Column(name) for name in columns],
            rows,
            caption="Every claim and its verdict",
            links=[one.claim.id for one in self.judgements],
        )


def _verdict_in_short(judgement: Judgement) -> str:
    expected = judgement.claim.expected_verdict
    if not judgement.as_expected:
        return f"{judgement.verdict} (expected: {expected})"
    return judgement.verdict if expected == "holds" else f"{judgement.verdict}, as expected"


_SUMMARY_TEXT = (
    "Each claim was run at every setting its card lists, with several seeds. The number at the "
    "setting that decides is given with its standard error over seeds; the card says between "
    "which limits the interval of that number has to lie. A claim that does not hold, as expected, "
    "is one we found to be false, and its card says why."
)


def work(group: Group) -> list[Numbers]:
    """Make the runs of a group: the claim's measure, under the theory the group names."""
    first = group[0]
    settings = [batch.setting for batch in group]
    return find(first.claim).run(settings, first.seeds, Theory(first.broken))


@dataclass(frozen=True)
class Request:
    """What to run: claims (all, without names), how large, with how many seeds, on which data.

    Raises:
        ValueError: if `seeds` is not positive or `broken` is unknown.
    """

    names: Sequence[str] = ()
    """Papers or claims."""
    scale: Scale = "laptop"
    """"test" (a minute), "laptop" (minutes) or "paper" (the papers' own sizes)."""
    seeds: int | None = None
    """Runs per setting, where seeds matter; each claim's own number if not given."""
    first_seed: int = 0
    """Seeds count up from here."""
    data: Path | None = None
    """A folder with the files of MNIST or CIFAR-10; digits alone if not given."""
    broken: str = ""
    """A name of `droplens.papers.BREAKS`; claims without that twin are left out."""
    command: str = ""
    """What repeats the report."""

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds has to be at least 1, but got {self.seeds}")
        Theory(self.broken)


def reproduce(
    request: Request,
    *,
    jobs: int = 1,
    folder: Path | None = None,
    on_progress: Progress | None = None,
) -> Reproduction:
    """Run the claims that are asked for, and judge them.

    Args:
        request: what to run.
        jobs: processes; 1 runs everything in this one.
        folder: where finished runs are kept and taken up again; in memory if not given.
        on_progress: called with the share done and what was done last.

    Raises:
        ValueError: if a name is unknown, the folder holds runs of another version, a data file is
            corrupt, or no claim has that broken twin.
        OSError: if a folder is missing or cannot be written.
    """
    chosen, left_out = _with_twin(select(request.names), request.broken)
    plan = {claim.id: _planned(claim, request) for claim in chosen}
    wanted = [
        batch for claim in chosen for whole in plan[claim.id] for batch in _split(whole, claim)
    ]
    tell = on_progress or (lambda share, doing: None)

    def report(done: int, total: int, batch: Batch | None) -> None:
        tell(done / total if total else 1.0, f"{done} of {total}: {batch.claim}" if batch else "")

    executor: Executor = Inline() if jobs == 1 else Processes(jobs)
    with Store(folder) as store:
        made = complete(store, wanted, work, executor, report)
        judged = tuple(
            Judgement(
                claim,
                tuple(Cell(one.setting, one.seeds, store.numbers(one)) for one in plan[claim.id]),
                request.broken,
            )
            for claim in chosen
        )
    left_out += tuple(
        NotMeasured(f"{claim.id} on {claim.data}", "no folder with its files was named (--data)")
        for claim in chosen
        if claim.data and not _holds_data(claim, request)
    )
    return Reproduction(judged, request, left_out, made)


def _planned(claim: Claim, request: Request) -> list[Batch]:
    """One batch of all seeds for each setting."""
    holds = _holds_data(claim, request)
    count = claim.seed_count(request.scale, request.seeds)
    seeds = range(request.first_seed, request.first_seed + count)
    return [
        Batch.of(claim.id, setting, seeds, request.broken)
        for setting in claim.cells(request.scale, request.data if holds else None)
    ]


def _split(whole: Batch, claim: Claim) -> Iterator[Batch]:
    size, stacks = claim.batch, claim.stacks
    return batches(whole.claim, whole.setting, whole.seeds, size, whole.broken, stacks)


def _holds_data(claim: Claim, request: Request) -> bool:
    if request.data is None or claim.data not in _data_sets(request.data):
        return False
    # All that the claim will read, now: a file cut short must not end a long run half-way.
    wanted = max(int(setting["n"]) for setting in claim.settings[request.scale])
    return _readable(claim.data, request.data, wanted)


def _twins(claim: Claim) -> str:
    return f"its twins are {', '.join(claim.broken)}"


def _with_twin(
    claims: Sequence[Claim], broken: str
) -> tuple[tuple[Claim, ...], tuple[NotMeasured, ...]]:
    """The claims that can be broken this way, and the others.

    Raises:
        ValueError: if there are none.
    """
    kept = tuple(claim for claim in claims if not broken or broken in claim.broken)
    if not kept:
        raise ValueError(
            f"none of these claims has a broken twin {broken!r}: "
            + "; ".join(f"{claim.id}: {_twins(claim)}" for claim in claims)
        )
    others = tuple(
        NotMeasured(claim.id, f"does not rest on what {broken!r} breaks; {_twins(claim)}")
        for claim in claims
        if claim not in kept
    )
    return kept, others


@cache
def _data_sets(folder: Path) -> tuple[str, ...]:
    """Which data sets the folder holds.

    Raises:
        ValueError: if a file is corrupt.
        FileNotFoundError: if there is no such folder, or it holds none.
    """
    from droplens import data

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no data folder {str(folder)!r}")
    found, missing = [], []
    for name in _READERS:
        try:
            getattr(data, name)(folder, limit=1)
            found.append(name)
        except FileNotFoundError as error:
            missing.append(f"{name}: {error}")
    if not found:
        raise FileNotFoundError(
            f"the data folder {str(folder)!r} holds no data set ({'; '.join(missing)})"
        )
    return tuple(found)


@cache
def _readable(name: str, folder: Path, limit: int) -> bool:
    from droplens import data

    getattr(data, name)(folder, limit=limit)
    return True


def _card(judgement: Judgement) -> Section:
    claim = judgement.claim
    text = f"{claim.source}."
    if claim.chosen:
        text += f"\n\n{claim.chosen}"
    common = describe(shared(judgement.cells))
    if common:
        text += f"\n\nAt every setting: {common}."
    blocks: list[Verdict | Table | Figure] = [judgement.to_verdict()]
    if len(judgement.cells) > 1:
        unit = claim.criterion.unit
        rows = [
            (name, estimate, estimate.n)
            for name, estimate in zip(labels(judgement.cells), judgement.estimates, strict=True)
        ]
        columns = (Column("setting"), Column("measured", unit), Column("n"))
        caption = f"{claim.id}: {claim.criterion.value}, predicted {claim.criterion.predicted}"
        blocks.append(Table(columns, rows, caption=caption))
    if claim.figure is not None:
        blocks.append(claim.figure(judgement.cells))
    return Section(claim.id, text, blocks)
