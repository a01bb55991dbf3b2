"""Networks as strangers write them, small, trained for a moment so that dropout costs something.

Each comes with its data as its own training loop would hold them, and with the loss as that loop
would write it: nothing here uses the library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 50


@dataclass(frozen=True)
class Stranger:
    """A network, what `droplens.inspect` is given, and the loss of one forward pass."""

    network: nn.Module
    data: Any
    inputs: Any
    targets: Tensor
    loss: Callable[[], Tensor]

    def training(self) -> None:
        """Dropout on, norm layers in eval."""
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()


def _trained(stranger: Stranger) -> Stranger:
    stranger.network.train()
    optimizer = torch.optim.Adam(stranger.network.parameters(), 3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        stranger.loss().backward()
        optimizer.step()
    return stranger


def _labels(x: Tensor, classes: int = 3) -> Tensor:
    """A rule to be learnt: which of three stretches of the input is largest on average."""
    flat = x.flatten(1)[:, : x[0].numel() // classes * classes]
    return flat.unflatten(1, (classes, -1)).mean(-1).argmax(1)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.drop = nn.Dropout2d(0.2)
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(8 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.drop(self.stem(x)))
        return self.head(F.dropout(x.flatten(1), 0.3, self.training))


def convolutional() -> Stranger:
    torch.manual_seed(0)
    net, x = ConvNet(), torch.randn(48, 1, 8, 8)
    y = _labels(x)
    return _trained(Stranger(net, (x, y), x, y, lambda: F.cross_entropy(net(x), y)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.2, batch_first=True)
        self.lift = nn.Linear(4, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.lift(x)).mean(1))


def encoder() -> Stranger:
    torch.manual_seed(0)
    net, x = Encoder(), torch.randn(40, 6, 4)
    y = _labels(x)
    return _trained(Stranger(net, (x, y), x, y, lambda: F.cross_entropy(net(x), y)))


def _tokens(n: int, length: int, vocabulary: int) -> Tensor:
    """Sequences that step through the vocabulary, now and then at random."""
    start = torch.randint(vocabulary, (n, 1))
    steps = torch.where(torch.rand(n, length) < 0.8, 1, torch.randint(vocabulary, (n, length)))
    return (start + steps.cumsum(1)) % vocabulary


def bert() -> Stranger:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=8, num_labels=3, initializer_range=0.2,
        hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    net = BertForSequenceClassification(config)
    ids = _tokens(16, 6, 24)
    mask = torch.ones_like(ids)
    mask[::3, 4:] = 0
    inputs, y = {"input_ids": ids, "attention_mask": mask}, ids[:, 0] % 3
    stranger = Stranger(
        net, {**inputs, "labels": y}, inputs, y, lambda: F.cross_entropy(net(**inputs).logits, y)
    )
    return _trained(stranger)


def gpt2() -> Stranger:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8, n_positions=6, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.15, embd_pdrop=0.15, attn_pdrop=0.15,
    )  # fmt: skip
    net = GPT2LMHeadModel(config)
    ids = _tokens(12, 6, 8)
    following = torch.cat([ids[:, 1:], torch.full((12, 1), -100)], 1)

    def loss() -> Tensor:
        # Hugging Face's own arithmetic, shift and all.
        return net(input_ids=ids, labels=ids).loss

    data = {"input_ids": ids, "labels": ids}
    return _trained(Stranger(net, data, {"input_ids": ids}, following, loss))


def vit() -> Stranger:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4, num_channels=1, num_labels=3, initializer_range=0.2,
        hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2,
    )  # fmt: skip
    net, x = ViTForImageClassification(config), torch.randn(16, 1, 8, 8)
    y = _labels(x)
    data = [{"pixel_values": x[:10], "labels": y[:10]}, {"pixel_values": x[10:], "labels": y[10:]}]
    stranger = Stranger(
        net, data, {"pixel_values": x}, y, lambda: F.cross_entropy(net(pixel_values=x).logits, y)
    )
    return _trained(stranger)


STRANGERS = {
    "cnn": convolutional, "encoder": encoder, "bert": bert, "gpt2": gpt2, "vit": vit,
}  # fmt: skip
