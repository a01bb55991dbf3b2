"""A callback that records dropout in a Lightning training (extra `lightning`)."""

from typing import Any, final

import lightning.pytorch as pl
from torch import nn

from droplens.recording._recorder import Record, Recorder


@final
class RecorderCallback(pl.Callback):
    """Log dropout/<site>/<metric> to the trainer's loggers, from a `Recorder`.

    >>> trainer = pl.Trainer(callbacks=[RecorderCallback(sample, loss)])  # doctest: +SKIP

    Args:
        sample: a few examples as the network takes them; see `Recorder`.
        loss: the loss object, for costs.
        network: which attribute of the LightningModule is the network; the module itself if not
            given.
        options: as keywords, the rest of what `Recorder` takes.
    """

    def __init__(
        self, sample: Any, loss: Any = None, *, network: str | None = None, **options: Any
    ) -> None:
        self._sample, self._loss, self._network = sample, loss, network
        self._options = options
        self.recorder: Recorder | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the recorder, on the process that logs."""
        if not trainer.is_global_zero:
            return
        model: nn.Module = pl_module
        if self._network is not None:
            model = getattr(pl_module, self._network)
        sample = trainer.strategy.batch_to_device(self._sample)
        self.recorder = Recorder(model, sample, self._loss, **self._options)
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Step the recorder when the optimiser has made a step."""
        # Batches whose gradients are only accumulated are no step.
        if self.recorder is None or trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        _log(trainer, self.recorder.step(self._seen))

    def on_train_end(self, *_: Any) -> None:
        """Close what the recorder has opened."""
        if self.recorder is not None:
            self.recorder.close()


def _log(trainer: pl.Trainer, records: tuple[Record, ...]) -> None:
    if not records:
        return
    numbers = {record.tag: record.value for record in records}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=records[0].step)
