"""Record what dropout does while a network trains, without disturbing the training."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import nn

from droplens.batches import Batch, as_batches, counted_parts
from droplens.discovery import guarded
from droplens.estimates import Estimate
from droplens.randomness import private_generator
from droplens.recording._budget import Budget
from droplens.recording._metrics import METRICS, Metric, Sample

DEFAULT: Final = ("rate", "penalty", "equalisation")
# Examples of the sample that are used.
_EXAMPLES: Final = 256


@dataclass(frozen=True)
class Record:
    """One number at one step.

    Args:
        step: the step after which it was measured.
        site: the site's name, or the layer's.
        metric: what it is.
        value: in units of the loss where it is a cost.
        standard_error: over what was sampled; 0 for exact numbers.
    """

    step: int
    site: str
    metric: str
    value: float
    standard_error: float

    @property
    def tag(self) -> str:
        """The name under which it is logged: dropout/<site>/<metric>."""
        return f"dropout/{self.site}/{self.metric}"


@final
class Recorder:
    """Measures every site of a network at intervals of its training, within a budget of time.

    Call `step()` after every step of the optimiser. What is due waits until measuring, this
    measurement included, stays within `budget` of what training itself takes; `share` says what it
    came to. Training is not disturbed: random streams, gradients, modes, buffers and weights are
    left as found, and a network trains to the same bits with a recorder as without. A metric that
    fails is warned of once, and tried again.

    >>> network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    >>> sample = (torch.ones(5, 3), torch.zeros(5, dtype=torch.long))
    >>> recorder = Recorder(network, sample, nn.CrossEntropyLoss(), every=1, budget=1)
    >>> for _ in range(2):
    ...     _ = recorder.step()
    >>> [record.tag for record in recorder.history if record.step == 2]
    ['dropout/1/rate', 'dropout/1/penalty', 'dropout/1/variation', 'dropout/1/participation']

    Args:
        model: the network that is trained (inside torch.compile or DDP too).
        sample: a few examples as the model takes them, in any form `inspect` takes; the first 256
            of the first batch are used, always the same.
        loss: the loss object, for costs; not needed for metrics that have no unit of it.
        metrics: names among "rate", "penalty", "gap", "equalisation", "condensation" and "rank",
            or functions of a `recording.Sample` by a name of their own.
        every: steps from one measurement to the next.
        budget: by how much training may become longer at any time, in (0, 1]; 1 sets no limit.
        writer: where numbers go besides `history`: anything with `add_scalar(tag, value, step)`,
            such as a TensorBoard SummaryWriter, or a folder to open one in.
        seed: of everything sampled; from the operating system if not given.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a metric is unknown or needs a loss that is missing, `every` is not positive,
            `budget` is not in (0, 1], or the sample is empty or not finite.
        ModuleNotFoundError: if `writer` is a folder and TensorBoard is not installed.
    """

    def __init__(  # all but the first three are keywords with defaults
        self,
        model: nn.Module,
        sample: Any,
        loss: Any = None,
        *,
        metrics: Sequence[str] | Mapping[str, Metric] = DEFAULT,
        every: int = 100,
        budget: float = 0.05,
        writer: Any = None,
        seed: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model has to be a torch module, but got {type(model).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every has to be a whole number of at least 1, but got {every!r}")
        self._model = _inner(model)
        self._metrics = _chosen(metrics, loss)
        self._batch = _first(sample, self._model, loss)
        self._loss, self._every = loss, every
        self._budget = Budget(budget)
        self._writer, self._owns_writer = _writer(writer)
        self._seeds, self.seed = private_generator(None, seed)
        self._history: list[Record] = []
        self._steps, self._due = 0, False
        self.failures: dict[str, str] = {}
        self.postponed = 0
        self._budget.started()

    @property
    def history(self) -> tuple[Record, ...]:
        """Everything recorded so far, in order."""
        return tuple(self._history)

    @property
    def share(self) -> float:
        """Time spent measuring over all time since the start."""
        return self._budget.share

    def series(self, site: str, metric: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Steps and values of one number over training.

        Raises:
            ValueError: if nothing was recorded under this name.
        """
        found = [r for r in self._history if (r.site, r.metric) == (site, metric)]
        if not found:
            known = sorted({r.tag for r in self._history})
            raise ValueError(
                f"nothing was recorded as 'dropout/{site}/{metric}'; there is "
                f"{', '.join(known) or 'nothing at all'}"
            )
        return tuple(r.step for r in found), tuple(r.value for r in found)

    def step(self, step: int | None = None) -> tuple[Record, ...]:
        """Say that the optimiser made a step; measures if it is time, and returns what is new.

        Args:
            step: its number, for the records; counted from 1 if not given.
        """
        self._budget.trained()
        self._steps += 1
        if self._steps % self._every == 0:
            self.postponed += self._due
            self._due = True
        if not self._due or not self._budget.fits():
            return ()
        return self.measure(self._steps if step is None else step)

    def measure(self, step: int | None = None) -> tuple[Record, ...]:
        """Measure now, whatever interval and budget say; the time counts all the same."""
        self._due = False
        number = self._steps if step is None else step
        new: list[Record] = []
        with self._budget.spending():
            seed = int(torch.randint(2**53, (), generator=self._seeds, dtype=torch.int64))
            for name, metric in self._metrics.items():
                new += self._measured(name, metric, number, seed)
            for record in new:
                if self._writer is not None:
                    self._writer.add_scalar(record.tag, record.value, record.step)
        self._history += new
        return tuple(new)

    def close(self) -> None:
        """Flush and close the writer, if it was opened here."""
        if self._owns_writer:
            self._writer.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _measured(self, name: str, metric: Metric, step: int, seed: int) -> list[Record]:
        try:
            # A metric of the user's own may draw, or switch modes: training is not to know.
            with guarded(self._model):
                reading = metric(Sample(self._model, self._batch, self._loss, seed))
        except (ValueError, TypeError, RuntimeError) as error:
            if name not in self.failures:
                warnings.warn(
                    f"the recorder could not measure {name!r} at step {step}: {error}",
                    RuntimeWarning,
                    stacklevel=4,
                )
            self.failures[name] = str(error)
            return []
        return [
            Record(step, site, own, float(value), _error(value))
            for site, numbers in reading.items()
            for own, value in numbers.items()
        ]


def _error(value: Estimate | float) -> float:
    return value.standard_error if isinstance(value, Estimate) else 0.0


def _inner(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and DDP, so that names stay."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _chosen(metrics: Sequence[str] | Mapping[str, Metric], loss: Any) -> dict[str, Metric]:
    if isinstance(metrics, Mapping):
        for name, metric in metrics.items():
            if not callable(metric):
                raise TypeError(
                    f"metrics[{name!r}] has to be a function of a Sample, but got "
                    f"{type(metric).__name__}"
                )
        return dict(metrics)
    if isinstance(metrics, str) or not isinstance(metrics, Sequence):
        raise TypeError(
            "metrics has to be a list of names or a mapping of functions, but got "
            f"{type(metrics).__name__}"
        )
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics names {name!r}, but there are {', '.join(METRICS)}")
        if loss is None and name in {"penalty", "gap"}:
            raise ValueError(f"the metric {name!r} is in units of the loss; pass loss=")
    if not metrics:
        raise ValueError("metrics is empty; name at least one")
    return {name: METRICS[name] for name in metrics}


def _first(sample: Any, model: nn.Module, loss: object) -> Batch:
    """The first examples of the first batch, held."""
    batch = next(iter(as_batches(sample, model, loss)))
    return next(counted_parts(batch, _EXAMPLES, loss))


def _writer(given: Any) -> tuple[Any, bool]:
    """What numbers are written to, and whether it was opened here.

    Raises:
        TypeError: if it is nothing to write to.
        ModuleNotFoundError: if TensorBoard is needed and not installed.
    """
    if given is None or hasattr(given, "add_scalar"):
        return given, False
    if not isinstance(given, str | Path):
        raise TypeError(
            "writer has to have add_scalar(tag, value, step), or be a folder for TensorBoard, but "
            f"got {type(given).__name__}"
        )
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "writing for TensorBoard needs it installed: pip install 'droplens[tensorboard]'"
        ) from error
    open_writer: Callable[..., Any] = SummaryWriter
    return open_writer(str(given)), True
