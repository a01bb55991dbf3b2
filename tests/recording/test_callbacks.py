"""The callbacks, in short trainings of the real trainers."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CE = nn.CrossEntropyLoss()

pytestmark = pytest.mark.filterwarnings("ignore")


def examples(n=32):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, 6, generator=generator),
        torch.randint(3, (n,), generator=generator),
    )


def quiet_import(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def test_lightning_logs_and_trains_to_the_same_bits(tmp_path):
    pl = quiet_import("lightning.pytorch")
    quiet_import("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from droplens.recording.lightning import RecorderCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            x, y = batch
            return CE(self(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(callbacks):
        torch.manual_seed(0)
        module = Module()
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            callbacks=callbacks,
            logger=TensorBoardLogger(tmp_path),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=2,
            log_every_n_steps=1,
        )
        trainer.fit(module, DataLoader(TensorDataset(*examples()), batch_size=8, shuffle=True))
        return list(module.parameters()), trainer

    callback = RecorderCallback(examples(), CE, network="net", every=1, budget=1)
    alone, _ = train([])
    watched, trainer = train([callback])
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    steps, values = callback.recorder.series("1", "rate")
    assert steps == (1, 2, 3, 4)
    assert values == (0.5,) * 4
    assert not callback.recorder.failures
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    assert [e.step for e in events.Scalars("dropout/1/penalty")] == [1, 2, 3, 4]


def test_transformers_logs_and_trains_to_the_same_bits(tmp_path):
    transformers = quiet_import("transformers")
    quiet_import("accelerate")
    quiet_import("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from droplens.recording.transformers import RecorderCallback

    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(20, (16, 5), generator=generator)
    labels = torch.randint(3, (16,), generator=generator)
    data = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]

    def train(callbacks, folder):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=4,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        )
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
        return list(model.parameters())

    callback = RecorderCallback(
        {"input_ids": tokens[:6], "labels": labels[:6]}, CE, every=2, budget=1
    )
    alone, watched = train([], "alone"), train([callback], "watched")
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))
    assert not callback.recorder.failures
    events = EventAccumulator(str(tmp_path / "watched" / "dropout"))
    events.Reload()
    assert [e.step for e in events.Scalars("dropout/dropout/penalty")] == [2, 4]
