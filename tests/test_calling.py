"""Outputs and inputs of a stranger's model: what is understood, and what is refused in one line."""

import copy
from collections import OrderedDict, UserDict

import pytest
import torch
from torch import Tensor, nn

import droplens as dl
from droplens._items import predicts_next_token
from droplens.batches import as_batches, n_examples, rows_of
from droplens.calling import ForwardError, check_inputs, predictions

loss = nn.CrossEntropyLoss()


class Returns(nn.Module):
    """Wraps a linear layer's outputs in whatever a stranger returns."""

    def __init__(self, wrap, d_out=3):
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.layer, self.wrap = nn.Dropout(0.4), nn.Linear(4, d_out), wrap

    def forward(self, x: Tensor):
        return self.wrap(self.layer(self.drop(x)))


class Keywords(nn.Module):
    """Takes tokens by keyword alone, and returns a prediction for every one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.drop, self.layer = nn.Embedding(7, 5), nn.Dropout(0.3), nn.Linear(5, 7)

    def forward(self, *, tokens: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"logits": scale * self.layer(self.drop(self.table(tokens))), "hidden": tokens}


x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
y = torch.tensor([0, 1, 2, 0, 1, 2])
tokens = torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(2))
following = torch.roll(tokens, -1, 1)


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_a_mapping_counts_as_its_logits(kind):
    plain = Returns(lambda f: f)
    wrapped = Returns(lambda f: kind(logits=f, attentions=None))
    assert torch.equal(predictions(plain.eval(), x), predictions(wrapped.eval(), x))
    assert float(dl.penalty(wrapped, x, loss)) == float(dl.penalty(plain, x, loss))


def test_logits_of_every_token_are_laid_out_for_the_loss():
    net = Keywords().eval()
    with torch.no_grad():
        outputs = predictions(net, {"tokens": tokens, "scale": 2.0})
        assert torch.equal(outputs, net(tokens=tokens, scale=2.0)["logits"].mT)


def test_images_of_logits_already_are():
    image = torch.ones(2, 3, 5, 5)
    net = Returns(lambda f: {"logits": image})
    assert predictions(net, x).shape == image.shape


def test_keywords_and_tokens_go_through_every_measure():
    net = Keywords()
    batch = {"tokens": tokens, "labels": following}
    found = dl.inspect(net, batch, loss, draws=5, directions=1, seed=0)
    assert [site.name for site in found.sites] == ["drop"]
    with torch.no_grad():
        expected = loss(net.eval()(tokens=tokens)["logits"].mT, following)
    assert found.base == pytest.approx(float(expected), rel=1e-6)
    assert found.cost.gaussian == pytest.approx(
        float(dl.penalty(net, {"tokens": tokens}, loss)), rel=1e-5
    )
    assert found.fisher is not None
    assert found.flatness is not None
    assert found.examples == 5


def test_rows_leave_alone_what_is_for_all_examples():
    inputs = {"tokens": tokens, "positions": torch.arange(4)[None], "use_cache": False}
    part = rows_of(inputs, slice(1, 3))
    assert n_examples(part) == 2
    assert torch.equal(part["positions"], inputs["positions"])
    assert part["use_cache"] is False


class TinyForCausalLM(Keywords):
    """Called as Hugging Face calls its causal language models."""


def test_labels_of_a_causal_language_model_belong_one_position_earlier():
    net = TinyForCausalLM()
    assert predicts_next_token(net)
    assert not predicts_next_token(Keywords())
    (batch,) = as_batches({"tokens": tokens, "labels": tokens}, net)
    assert torch.equal(batch.targets[:, :-1], tokens[:, 1:])
    assert (batch.targets[:, -1] == -100).all()
    # Given as targets of their own, they are taken at their word.
    (pair,) = as_batches(({"tokens": tokens}, tokens), net)
    assert torch.equal(pair.targets, tokens)
    found = dl.inspect(net, {"tokens": tokens, "labels": tokens}, loss, draws=5, directions=1)
    with torch.no_grad():
        logits = net.eval()(tokens=tokens)["logits"][:, :-1]
    expected = loss(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert found.base == pytest.approx(float(expected), rel=1e-6)


class Decoding(Keywords):
    """Called as Hugging Face calls its models that encode and decode."""

    def forward(self, *, tokens, decoder_input_ids):
        return super().forward(tokens=decoder_input_ids + 0 * tokens)

    def prepare_decoder_input_ids_from_labels(self, labels):
        return nn.functional.pad(labels[:, :-1], (1, 0))


def test_labels_are_what_a_decoder_is_given():
    net, given = Decoding(), {"tokens": tokens, "labels": tokens}
    (batch,) = as_batches(given, net)
    assert torch.equal(batch.targets, tokens)
    assert torch.equal(batch.inputs["decoder_input_ids"][:, 1:], tokens[:, :-1])
    (own,) = as_batches(given | {"decoder_input_ids": tokens}, net)
    assert own.inputs["decoder_input_ids"] is tokens
    found = dl.inspect(net, given, loss, draws=5, directions=1)
    with torch.no_grad():
        logits = net.eval()(**batch.inputs)["logits"]
    expected = loss(logits.flatten(0, 1), tokens.flatten())
    assert found.base == pytest.approx(float(expected), rel=1e-6)


def half(dtype):
    return Returns(lambda f: f).to(dtype)


REFUSED = {
    "tuple": (Returns(lambda f: (f, f)), x, TypeError, "returned a tuple of 2, but one tensor of "
        r"predictions is needed .*wrap the model in a module whose forward returns"),
    "dict": (Returns(lambda f: {"scores": f, "aux": f}), x, TypeError,
        "returned a dict with 'scores', 'aux', but one tensor"),
    "nothing": (Returns(lambda f: None), x, TypeError, "returned a NoneType, but"),
    "labels": (Returns(lambda f: f.argmax(-1)), x, ValueError, "dtype torch.int64; floats"),
    "double inputs": (Returns(lambda f: f), x.double(), ValueError,
        "inputs are torch.float64 but the model's weights torch.float32; convert the inputs"),
    "meta inputs": (Returns(lambda f: f), x.to("meta"), ValueError, "inputs is on the meta device"),
    "half": (half(torch.float16), x.half(), ValueError,
        r"weights are torch.float16, too coarse .*copy.deepcopy\(model\).float\(\)"),
    "bfloat16": (half(torch.bfloat16), x.bfloat16(), ValueError, "weights are torch.bfloat16, too"),
    "half, single inputs": (half(torch.float16), x, ValueError, "weights are torch.float16, too"),
    "half outputs": (Returns(lambda f: f.half()), x, ValueError, "predictions are torch.float16"),
    "raises": (Returns(lambda f: f.no_such), x, ForwardError, "forward raised AttributeError"),
    "tokens out of range": (Keywords(), {"tokens": tokens + 7}, ForwardError, "raised IndexError"),
    "lists": (Keywords(), {"tokens": tokens.tolist()}, TypeError,
        r"got dict without tensors \(tokenizers: return_tensors='pt'\)"),
    "text": (Keywords(), "hello", TypeError, "inputs has to be a tensor.* but got str"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_measured_is_refused_in_one_line(case):
    model, inputs, error, message = case
    with pytest.raises(error, match=message):
        dl.penalty(model, inputs, loss)


def test_under_autocast_the_predictions_are_too_coarse():
    net = Returns(lambda f: f)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="outside autocast"):
        dl.penalty(net, x, loss)


def test_the_copy_that_the_error_names_is_measured():
    net = half(torch.bfloat16)
    assert float(dl.penalty(copy.deepcopy(net).float(), x, loss)) > 0


def test_finite_inputs_pass():
    check_inputs({"tokens": tokens, "scale": 2.0})


def test_inputs_on_another_device_than_the_weights():
    with pytest.raises(ValueError, match=r"inputs are on device 'meta' but .* on 'cpu'; move one"):
        predictions(Returns(lambda f: f), x.to("meta"))


MEASURES = {
    "inspect": lambda m, x, y: dl.inspect(m, (x, y), loss, draws=4, directions=1),
    "sites": lambda m, x, y: dl.sites(m, x),
    "predict": lambda m, x, y: dl.predict(m, x, draws=3),
    "decompose": lambda m, x, y: dl.decompose(m, x, y, loss, 4),
    "penalty": lambda m, x, y: dl.penalty(m, x, loss),
    "sampled": lambda m, x, y: dl.penalty(m, x, loss, "sampled"),
    "masks": lambda m, x, y: dl.penalty(m, x, loss, "masks"),
    "curve": lambda m, x, y: dl.penalty_curve(m, x, loss, [0.1]),
    "modified": lambda m, x, y: dl.modified_loss(m, x, y, loss, 0.1, 4),
    "noise": lambda m, x, y: dl.gradient_noise(m, x, y, loss, 4),
    "gap": lambda m, x, y: dl.explain_gap(m, (x, y), (x, y), loss, 4),
    "replaced": lambda m, x, y: dl.replace_dropout(m, loss)(x, y),
    "hessian": lambda m, x, y: dl.measure.hessian(m, (x, y), loss),
    "hessian, masks": lambda m, x, y: dl.measure.hessian(m, (x, y), loss, masks="fixed"),
    "fisher": lambda m, x, y: dl.measure.fisher(m, x, loss),
    "flatness": lambda m, x, y: dl.measure.flatness(m, (x, y), loss),
    "sharpness": lambda m, x, y: dl.measure.sharpness(m, (x, y), loss),
    "curvature": lambda m, x, y: dl.measure.curvature(m, x, loss, "e", 1),
}


class TestWeightsOnTheMetaDevice:
    """They hold no numbers: one text, before a generator or a size is made."""

    @pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES.keys())
    def test_are_refused_by_name(self, measure):
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))
        with pytest.raises(ValueError, match=r"weight '0.weight' is on the meta device.*to_empty"):
            measure(net.to("meta"), torch.randn(8, 4), torch.arange(8) % 3)


# `sites` looks at no output, and curvature at the number of parameters first.
PREDICTING = sorted(set(MEASURES) - {"sites", "curvature"})


@pytest.mark.parametrize("name", PREDICTING)
@pytest.mark.parametrize("wrap", [lambda f: f.sum(), lambda f: {"logits": f.sum()}])
def test_a_single_number_is_no_prediction(name, wrap):
    with pytest.raises(ValueError, match="output is a single number; it has to have one row"):
        MEASURES[name](Returns(wrap), x, y)


@pytest.mark.parametrize("name", sorted(set(MEASURES) - {"predict", "curvature"}))
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripts_and_traces_are_refused_by_name(name):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3)).eval()
    refused = (
        r"was scripted or traced \(torch.jit\), so its dropout .*; pass the module that it was"
    )
    for whole in (torch.jit.script(net), torch.jit.trace(net, x)):
        with pytest.raises(TypeError, match="^the model " + refused):
            MEASURES[name](whole, x, y)
        with pytest.raises(TypeError, match="^the model's '1' " + refused):
            MEASURES[name](nn.Sequential(nn.Dropout(0.2), whole), x, y)


def test_a_fixed_batch_size_is_told_from_the_forwards_own_faults():
    class Fixed(Returns):
        def forward(self, x: Tensor):
            return super().forward(x.view(6, 4))

    fixed = Fixed(lambda f: f)
    assert predictions(fixed, x).shape == (6, 3)
    said = (
        r"invalid for input of size 16\. It was given 4 examples: droplens .* as in x\.shape\[0\]"
    )
    with pytest.raises(ForwardError, match=said):
        predictions(fixed, x[:4])
    recurrent = nn.RNN(4, 3, batch_first=True)
    with pytest.raises(ForwardError, match=r"Expected hidden.* It was given 2 examples"):
        predictions(recurrent, (x[:2, None], torch.zeros(1, 6, 3)))
    with pytest.raises(ForwardError, match=r"cannot be multiplied \(6x3 and 4x3\)$"):
        predictions(fixed.layer, x[:, :3])
