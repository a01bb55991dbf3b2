"""What dropout does over training: a recorder for plain loops, and callbacks for two trainers.

`Recorder` stands on torch alone. The modules `lightning` and `transformers` of this room hold a
`RecorderCallback` each, and import their trainer.
"""

from droplens.recording._budget import Budget
from droplens.recording._metrics import Metric, Reading, Sample
from droplens.recording._recorder import Record, Recorder

__all__ = ["Budget", "Metric", "Reading", "Record", "Recorder", "Sample"]
