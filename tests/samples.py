"""Hand-made reports: everything a page can hold, with invented numbers."""

import math

from droplens import report
from droplens.estimates import Estimate
from droplens.report import Column, Curve, Document, NotMeasured, Section, Table
from droplens.verdicts import Verdict


def verdicts() -> list[Verdict]:
    return [
        Verdict(
            "Dropout costs the networks trained with it 0.279 ± 0.0016 nats, 61% of their loss.",
            "yes",
            "the gap is counted when its 95% interval over masks lies above the threshold",
            0.0,
            Estimate(0.279, 0.0016, 300, "masks"),
            300,
            "nats",
            question="What does dropout cost?",
            id="cost",
        ),
        Verdict(
            "The second-order value is not within 12% of the Monte-Carlo spread: it is 31% high.",
            "no",
            "within, when the 95% interval of |penalty / spread − 1| lies below the threshold",
            0.12,
            Estimate(0.31, 0.012, 300, "masks"),
            300,
            "of the spread",
            question="Is the papers' formula close here?",
            id="second-order",
        ),
        Verdict(
            "Whether the five networks with dropout are flatter at equal loss than the five "
            "without cannot be said: the difference is smaller than the seeds' own scatter.",
            "cannot conclude",
            "Welch's test over seeds, family-wise level 5%; no verdict where the interval of the "
            "difference holds the threshold",
            0.0,
            Estimate(-0.021, 0.019, 5, "seeds"),
            10,
            "nats",
            question="Which set of networks is flatter?",
            id="flatness",
        ),
        Verdict(
            "Counted exactly, 64 of 64 units carry weight.",
            "yes",
            "every unit counts whose score is positive",
            60,
            Estimate(64.0),
            64,
            "units",
        ),
    ]


def _curve(scale: float) -> Curve:
    radii = [k / 20 for k in range(21)]
    loss = [0.12 + scale * r**2 for r in radii]
    return Curve(
        radii,
        loss,
        [y * 0.9 for y in loss],
        [y * (1.1 + r) for y, r in zip(loss, radii, strict=True)],
    )


def figures() -> list[report.Figure]:
    return [
        report.bars(
            {
                "with dropout": {
                    "Monte Carlo, 300 masks": Estimate(0.279, 0.012, 300),
                    "Gaussian": Estimate(0.262, 0.004, 64),
                    "second order": Estimate(0.365),
                },
                "without": {
                    "Monte Carlo, 300 masks": Estimate(0.911, 0.03, 300),
                    "Gaussian": Estimate(0.88, 0.01, 64),
                    "second order": Estimate(2.04, math.nan, 1),
                },
            },
            title="Three evaluations of the spread",
            quantity="spread (nats)",
            rows="networks",
            caption="Bars: mean over seeds; lines: 95% intervals.",
        ),
        report.lines(
            {"with dropout": _curve(0.8), "without": _curve(2.1)},
            title="Loss around the minimum",
            x="radius (share of each weight's norm)",
            y="loss (nats)",
            caption="Band: 10th to 90th percentile over directions.",
        ),
        report.dots(
            {
                "with dropout": [0.112, 0.125, 0.119, 0.131, 0.108],
                "without": [0.171, 0.143, 0.196, 0.166, 0.158],
            },
            title="Test loss by seed",
            quantity="loss (nats)",
            caption="Dots: networks; tick and line: mean with its 95% interval.",
        ),
        report.split(
            {
                "dropout1": (Estimate(0.081, 0.001, 300), Estimate(0.012, 0.001, 300)),
                "encoder.layers.11.attention.dropout": (
                    Estimate(0.142, 0.002, 300),
                    Estimate(-0.034, 0.001, 300),
                ),
            },
            title="Where the gap comes from",
            quantity="loss (nats)",
        ),
        report.spectra(
            {
                "with dropout": [9.0 * 0.9**k for k in range(64)],
                "without": [7.0 * 0.96**k for k in range(64)],
            },
            title="Singular values of the last layer",
        ),
    ]


def document() -> Document:
    charts = figures()
    cost = Table(
        [
            Column("site"),
            Column("law"),
            Column("spread", "nats"),
            Column("shift", "nats"),
            Column("share of the loss", "%"),
            Column("units"),
            Column("flatness", "nats at r = 0.5"),
        ],
        [
            [
                "dropout1",
                "Bernoulli(p=0.5)",
                Estimate(0.081, 0.001, 300),
                Estimate(0.012, 0.001, 300),
                29.1,
                256,
                1.2e-5,
            ],
            [
                "dropout2",
                "Bernoulli(p=0.5)",
                Estimate(0.142, 0.002, 300),
                Estimate(-0.034, 0.001, 300),
                50.9,
                256,
                math.nan,
            ],
        ],
        caption="Cost by site",
        note="Sites are opened one at a time; the rest of the network runs undropped.",
    )
    return Document(
        title="Handwritten digits, with and without dropout",
        subtitle="Five networks of each kind, 64–256–256–10, trained on 1,437 digits and measured "
        "on 360 held out.",
        verdicts=verdicts(),
        sections=[
            Section(
                "What dropout costs",
                "The gap is the loss with dropout on, averaged over masks, minus the loss with it "
                "off. It splits exactly into the spread of the outputs and the shift of their mean."
                "\n\nThe spread needs no label; the shift vanishes where the output is affine in "
                "the gates.",
                [charts[0], cost, charts[3]],
            ),
            Section("Flatness", "", [charts[1]]),
            Section(
                "Networks",
                "",
                [charts[2], Section("Spectra", "Layer by layer.", [charts[4], verdicts()[3]])],
            ),
        ],
        not_measured=[
            NotMeasured(
                "the site decoder.path", "its law is not known to droplens (type DropPath)"
            ),
            NotMeasured("top Hessian eigenvalues", "not asked for; they take 20 s more"),
            NotMeasured(
                "interpolation",
                "not asked for; droplens.measure.interpolation(first,second,batches,loss) gives it",
            ),
        ],
        seed=0,
        mode="evaluation; masks opened one site at a time",
        command="droplens demo --seed 0 --seeds 5 -o report.html",
        kind="comparison",
        numbers={"cost": Estimate(0.279, math.nan, 300), "curve": [0.1, math.inf]},
        created="2026-11-20T10:00:00+00:00",
    )
