"""A callback that records dropout in a Hugging Face training (extra `transformers`)."""

from pathlib import Path
from typing import Any, final

from transformers import TrainerCallback

from droplens.recording._recorder import Recorder


@final
class RecorderCallback(TrainerCallback):
    """Log dropout/<site>/<metric> to TensorBoard while a `Trainer` trains, from a `Recorder`.

    >>> trainer = Trainer(model, args, callbacks=[RecorderCallback(sample, loss)])  # doctest: +SKIP

    Args:
        sample: a few examples as the model takes them, such as a batch of the collator; see
            `Recorder`.
        loss: the loss object, for costs; `torch.nn.CrossEntropyLoss()` for labels.
        writer: as for `Recorder`; if not given, TensorBoard's files go to `output_dir`/dropout.
        options: as keywords, the rest of what `Recorder` takes.
    """

    def __init__(
        self, sample: Any, loss: Any = None, *, writer: Any = None, **options: Any
    ) -> None:
        self._sample, self._loss, self._writer, self._options = sample, loss, writer, options
        self.recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Start the recorder, on the process that logs."""
        if not state.is_world_process_zero:
            return
        writer = Path(args.output_dir) / "dropout" if self._writer is None else self._writer
        model = given["model"]
        sample = _moved(self._sample, next(model.parameters()).device)
        self.recorder = Recorder(model, sample, self._loss, writer=writer, **self._options)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Step the recorder."""
        if self.recorder is not None:
            self.recorder.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close what the recorder has opened."""
        if self.recorder is not None:
            self.recorder.close()


def _moved(sample: Any, device: Any) -> Any:
    if hasattr(sample, "items"):
        return {name: _moved(value, device) for name, value in sample.items()}
    if isinstance(sample, list | tuple):
        return tuple(_moved(value, device) for value in sample)
    return sample.to(device) if hasattr(sample, "to") else sample
