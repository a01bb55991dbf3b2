"""The whole path on networks that the library was not written for, against independent checks."""

import copy
import json
import math
import re
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import droplens as dl
from tests.discovery.test_sites import assert_same_state, state_of
from tests.strangers.nets import STRANGERS, Stranger

loss = nn.CrossEntropyLoss()
every = pytest.mark.parametrize("name", STRANGERS)


@cache
def stranger(name: str) -> Stranger:
    if name in {"bert", "gpt2", "vit"}:
        pytest.importorskip("transformers")
    return STRANGERS[name]()


@cache
def inspected(name: str) -> dl.Inspection:
    found = stranger(name)
    found.network.train()
    before = state_of(found.network)
    weights = [p.detach().clone() for p in found.network.parameters()]
    seen = dl.inspect(found.network, found.data, loss, draws=40, directions=2, seed=0)
    assert_same_state(before, state_of(found.network))
    assert all(map(torch.equal, weights, found.network.parameters()))
    return seen


class Draws(TorchDispatchMode):
    """Counts the operations that draw coins, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in {torch.ops.aten.bernoulli_, torch.ops.aten.native_dropout}:
            self.count += 1
        return func(*args, **(kwargs or {}))


@every
def test_every_draw_of_a_training_pass_is_a_site(name):
    found = stranger(name)
    found.training()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Draws() as draws:
        found.loss()
    sites = dl.sites(found.network, found.inputs)
    assert len(sites) == draws.count > 1
    assert all(site.active and site.law is not None for site in sites)
    assert len({site.name for site in sites}) == len(sites)
    found.network.eval()
    assert [s.name for s in dl.sites(found.network, found.inputs)] == [s.name for s in sites]


@every
def test_the_gap_is_that_of_the_networks_own_training_mode(name):
    """torch's own dropout, as the training loop runs it, is the judge."""
    found, draws = stranger(name), 300
    with torch.no_grad():
        found.network.eval()
        base = float(found.loss())
        found.training()
        torch.manual_seed(11)
        dropped = torch.tensor([float(found.loss()) for _ in range(draws)], dtype=torch.float64)
    gap, error = float(dropped.mean()) - base, float(dropped.std()) / math.sqrt(draws)
    ours = dl.decompose(found.network, found.inputs, found.targets, loss, 300, sites=[], seed=5)
    assert ours.base.value == pytest.approx(base, rel=1e-5)
    assert gap > 5 * error
    assert abs(ours.gap.value - gap) <= 3 * math.hypot(error, ours.gap.standard_error)
    parts = ours.spread.value + ours.shift.value
    assert parts == pytest.approx(ours.gap.value, abs=1e-12)


@every
def test_the_inspection_is_whole(name):
    found, seen = stranger(name), inspected(name)
    assert [s.name for s in seen.sites] == [s.name for s in dl.sites(found.network, found.inputs)]
    with torch.no_grad():
        found.network.eval()
        assert seen.base == pytest.approx(float(found.loss()), rel=1e-5)
    assert seen.cost.gaussian > 0
    assert set(seen.cost.by_site) == {site.name for site in seen.sites}
    assert seen.fisher is not None
    assert seen.hessian is not None
    assert seen.flatness is not None
    assert len(seen.condensation) == len(seen.spectra) > 1
    # Whatever has no numbers has a reason.
    reasons = " ".join(f"{what}: {why}" for what, why in seen.not_measured.items())
    for site in seen.sites:
        assert site.name in seen.equalization or site.name in reasons


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, float) else []


@every
def test_the_page_states_the_distance_and_holds_no_nan(name, tmp_path):
    seen = inspected(name)
    (verdict,) = [v for v in seen.verdicts if v.id == "approximation"]
    assert re.search(r"the Gaussian value is \d+(\.\d+)?% too (low|high)", verdict.sentence)
    expected = abs(seen.cost.gaussian / seen.cost.spread.value - 1)
    assert verdict.measured.value == pytest.approx(expected)
    page = seen.to_html(tmp_path / "page.html")
    text = re.sub(r"<script.*?</script>|<[^>]+>", " ", page.read_text("utf-8"), flags=re.DOTALL)
    assert verdict.sentence.split(".")[0] in " ".join(text.split())
    for word in ("nan", "NaN", "undefined", "None"):
        assert not re.search(rf"\b{word}\b", text), word
    twin = json.loads(page.with_suffix(".json").read_text("utf-8"))
    assert all(map(math.isfinite, numbers_in(twin["numbers"])))
    for site in seen.sites:
        assert site.name in text
    for what in seen.not_measured:
        assert what in text


def test_norm_layers_that_came_in_train_mode_are_named():
    assert "BatchNorm2d came in train mode and is measured in eval" in inspected("cnn").mode
    found = stranger("cnn")
    found.network.eval()
    seen = dl.inspect(found.network, found.data, loss, draws=3, directions=1, seed=0)
    assert "came in train mode" not in seen.mode


def test_ignored_labels_do_not_count_as_wrong():
    found = stranger("gpt2")
    with torch.no_grad():
        guesses = found.network.eval()(**found.inputs).logits[:, :-1].argmax(-1)
    right = float((guesses == found.inputs["input_ids"][:, 1:]).float().mean())
    assert inspected("gpt2").accuracy == pytest.approx(right)


def test_labels_of_a_causal_model_are_said_to_be_shifted():
    assert "compared with the predictions one position earlier" in inspected("gpt2").mode


@pytest.mark.parametrize("name", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_sets_of_a_strangers_networks_are_compared(name):
    found = stranger(name)
    quieter = copy.deepcopy(found.network)
    for module in quieter.modules():
        if isinstance(module, nn.Dropout):
            module.p /= 5
    seen = dl.compare(
        {"with": found.network, "quieter": quieter},
        found.data, loss, held_out=found.data, draws=20, directions=2, seed=0,
    )  # fmt: skip
    first, second = (inspections[0] for inspections in seen.sets.values())
    assert first.base == pytest.approx(second.base)
    assert seen.held_out.loss["with"][0] == pytest.approx(first.base, rel=1e-5)
    assert first.accuracy == pytest.approx(inspected(name).accuracy)
    assert 0 < second.cost.gap.value < first.cost.gap.value
    assert seen.equal_loss is not None


def test_what_a_tokenizer_returns_is_understood():
    found = stranger("bert")
    encoding = pytest.importorskip("transformers").BatchEncoding(dict(found.data))
    seen = dl.inspect(found.network, encoding, loss, draws=3, directions=1, seed=0)
    assert seen.base == pytest.approx(inspected("bert").base)
    inputs = {k: v for k, v in encoding.items() if k != "labels"}
    again = pytest.importorskip("transformers").BatchEncoding(inputs)
    assert float(dl.penalty(found.network, again, loss)) == pytest.approx(seen.cost.gaussian)
