"""A solved linear layer as a document: certificate, spectrum before and after, the path."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from droplens.estimates import exact
from droplens.report._document import Column, Document, Figure, NotMeasured, Section, Table
from droplens.report._figures import spectra
from droplens.report._numbers import format_number
from droplens.verdicts import Verdict

if TYPE_CHECKING:
    from droplens.linear import Path, Solution

_UNIT: Final = "squared error per example"
_MOST_LINES: Final = 40
_MOST_ROWS: Final = 20

_SPECTRUM_TEXT = (
    "Dropout on the hidden layer shrinks the singular values of the least-squares predictions: "
    "what lies at or below the threshold vanishes, which lowers the rank of the map. Values are "
    "those of the predictions' matrix over the square root of the number of examples."
)
_PATH_TEXT = (
    "The same data at other rates, from one decomposition. Each line is a singular value; where "
    "it meets the axis it is gone. Point at the chart to read a rate."
)


def solution_document(
    solution: "Solution",
    *,
    n_examples: int,
    title: str,
    path: "Path | None" = None,
    seed: int | None = None,
    command: str = "",
) -> Document:
    """The document of a solution, with the path over rates if there is one."""
    sections = [_problem_section(solution, n_examples), _spectrum_section(solution)]
    if path is not None:
        sections.append(_path_section(path))
    missing = []
    if solution.singular_values.size > solution.target_singular_values.size:
        missing.append(
            NotMeasured(
                "the smallest singular values of the target",
                "they are certified to vanish, so they were not computed",
            )
        )
    return Document(
        title=title,
        subtitle=_subtitle(solution),
        verdicts=[_attained(solution, n_examples), _rank(solution, n_examples)],
        sections=sections,
        not_measured=missing,
        seed=seed,
        command=command,
        kind="solution",
        numbers=solution_numbers(solution, path) | {"n_examples": n_examples},
    )


def _subtitle(solution: "Solution") -> str:
    blocks = f", in blocks of {solution.block_size}" if solution.block_size > 1 else ""
    return (
        f"The global minimum of one hidden linear layer of width {solution.width} with dropout at "
        f"p = {format_number(solution.p)}{blocks}."
    )


def solution_numbers(solution: "Solution", path: "Path | None" = None) -> dict[str, Any]:
    """What scripts ask of a solution, without its matrices."""
    numbers: dict[str, Any] = {
        "p": solution.p,
        "width": solution.width,
        "block_size": solution.block_size,
        "value": solution.value,
        "lower_bound": solution.lower_bound,
        "gap": solution.gap,
        "attained": solution.attained,
        "rank": solution.rank,
        "threshold": solution.threshold,
        "singular_values": solution.singular_values.tolist(),
        "target_singular_values": solution.target_singular_values.tolist(),
    }
    if path is not None:
        numbers["path"] = {
            "rates": path.rates.tolist(),
            "ranks": path.ranks.tolist(),
            "thresholds": path.thresholds.tolist(),
            "lower_bounds": path.lower_bounds.tolist(),
            "singular_values": path.singular_values.tolist(),
            "vanishing_rates": path.vanishing_rates.tolist(),
        }
    return numbers


def _attained(solution: "Solution", n: int) -> Verdict:
    value, gap = format_number(solution.value), format_number(solution.gap)
    scale = float((solution.target_singular_values**2).sum())
    sentence = (
        f"The factors reach {value}, the least that any network of width {solution.width} can."
        if solution.attained
        else f"The factors found reach {value}, {gap} above a bound that this width may not attain."
    )
    return Verdict(
        sentence,
        "yes" if solution.attained else "no",
        "the gap between value and lower bound is at most 1e-9 of the predictions' mean square",
        1e-9 * scale,
        exact(solution.gap),
        n,
        _UNIT,
        question="Is this certified to be the global minimum?",
        id="certified-minimum",
    )


def _rank(solution: "Solution", n: int) -> Verdict:
    possible = min(solution.singular_values.size, solution.width)
    lower = solution.rank < possible
    sentence = (
        f"{solution.rank} of {possible} singular values survive dropout at p = "
        f"{format_number(solution.p)}."
    )
    return Verdict(
        sentence,
        "yes" if lower else "no",
        "fewer singular values survive than inputs, targets and width allow",
        float(possible),
        exact(float(solution.rank)),
        n,
        "singular values",
        question="Does dropout lower the rank?",
        id="lower-rank",
    )


def _problem_section(solution: "Solution", n: int) -> Section:
    d_out, d_in = solution.coefficients.shape
    rows: list[tuple[str, Any]] = [
        ("examples", n),
        ("inputs", d_in),
        ("targets", d_out),
        ("hidden width", solution.width),
        ("units in a block", solution.block_size),
        ("drop probability in force", solution.p),
        ("objective at the factors", solution.value),
        ("lower bound at this width", solution.lower_bound),
        ("gap", solution.gap),
        ("rank", solution.rank),
        ("threshold for singular values", solution.threshold),
    ]
    table = Table([Column("quantity"), Column("value")], rows, "What was solved")
    return Section(
        "What was solved",
        "The expected loss of one hidden linear layer under dropout, minimised exactly. Losses are "
        f"in units of {_UNIT}.",
        [table],
    )


def _spectrum_section(solution: "Solution") -> Section:
    before = solution.target_singular_values.tolist()
    after = solution.singular_values.tolist()
    most = min(len(before), _MOST_ROWS)
    rows = [(k + 1, before[k], after[k], before[k] - after[k]) for k in range(most)]
    columns = [
        Column("index"),
        Column("before", "target's unit"),
        Column("after", "target's unit"),
        Column("taken away", "target's unit"),
    ]
    note = f"The first {most} of {len(before)}." if most < len(before) else ""
    blocks: list[Any] = []
    curves = {"before": before, "after": [value for value in after if value > 0]}
    drawn = {name: values for name, values in curves.items() if any(v > 0 for v in values)}
    if drawn:
        blocks.append(
            spectra(
                drawn,
                title="Singular values before and after dropout",
                quantity="singular value (target's unit)",
                caption="Values that vanish are not drawn.",
            )
        )
    if rows:
        blocks.append(Table(columns, rows, "Singular values of the predictions", note))
    return Section("What dropout does to the spectrum", _SPECTRUM_TEXT, blocks)


def _path_section(path: "Path") -> Section:
    columns = [
        Column("drop probability"),
        Column("rank"),
        Column("threshold", "target's unit"),
        Column("lower bound", _UNIT),
    ]
    rows = list(
        zip(
            path.rates.tolist(),
            path.ranks.tolist(),
            path.thresholds.tolist(),
            path.lower_bounds.tolist(),
            strict=True,
        )
    )
    table = Table(columns, rows, "The path over rates")
    gone = path.vanishing_rates.tolist()[:_MOST_ROWS]
    sizes = path.target_singular_values.tolist()
    vanish = Table(
        [
            Column("index"),
            Column("before", "target's unit"),
            Column("vanishes from p ="),
        ],
        [(k + 1, sizes[k], "never" if rate == 1 else rate) for k, rate in enumerate(gone)],
        "When each singular value vanishes",
        f"The first {len(gone)} of {len(sizes)}." if len(gone) < len(sizes) else "",
    )
    blocks: list[Any] = [_path_figure(path, table), vanish] if gone else [table]
    return Section("Which singular values survive at which rate", _PATH_TEXT, blocks)


def _path_figure(path: "Path", data: Table) -> Figure:
    import altair as alt

    x, y = "drop probability p", "singular value after shrinkage (target's unit)"
    order = sorted(range(len(path)), key=lambda i: path.rates[i])
    shown = min(path.singular_values.shape[1], _MOST_LINES)
    records = [
        {
            "p": float(path.rates[i]),
            "value": float(path.singular_values[i, k]),
            "index": k + 1,
            "rank": int(path.ranks[i]),
        }
        for i in order
        for k in range(shown)
    ]
    at = alt.selection_point(
        name="rate", on="pointerover", nearest=True, encodings=["x"], empty=False
    )
    base = alt.Chart(alt.InlineData(values=records)).encode(
        x=alt.X("p:Q", title=x, scale=alt.Scale(domain=_domain(path.rates.tolist()))),
    )
    curves = base.mark_line(strokeWidth=1.5, opacity=0.75, color="var(--series-1)").encode(
        y=alt.Y("value:Q", title=y), detail="index:N"
    )
    dots = base.mark_point(filled=True, size=28, color="var(--series-1)").encode(
        y=alt.Y("value:Q", title=y),
        opacity=alt.condition(at, alt.value(1), alt.value(0)),
        tooltip=[
            alt.Tooltip("p:Q", title="drop probability", format=".3"),
            alt.Tooltip("rank:Q", title="singular values left"),
            alt.Tooltip("index:Q", title="this one's index"),
            alt.Tooltip("value:Q", title="its value", format=".4"),
        ],
    )
    marker = base.mark_rule(color="var(--ink-soft)", strokeDash=[4, 3]).transform_filter(at)
    label = (
        base.mark_text(align="left", dx=6, dy=-4, baseline="top", color="var(--ink)")
        .encode(y=alt.value(8), text="left:N")
        .transform_filter(at)
        .transform_filter("datum.index === 1")
        .transform_calculate(left="'p = ' + format(datum.p, '.3~g') + ': rank ' + datum.rank")
    )
    chart = alt.layer(curves, dots.add_params(at), marker, label).properties(height=320)
    count = path.singular_values.shape[1]
    caption = f"The {shown} largest of {count} singular values." if shown < count else ""
    return Figure(chart, "The path over drop probabilities", x, y, caption, data)


def _domain(rates: Sequence[float]) -> list[float]:
    low, high = min(rates), max(rates)
    return [low, high] if high > low else [low, low + 0.01]
