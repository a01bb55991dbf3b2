import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from droplens import nn as dn
from droplens.nn._streams import mix

LAYERS = {
    "global stream": lambda: dn.Dropout(0.5),
    "seed": lambda: dn.Dropout(0.5, seed=1),
    "generator": lambda: dn.Dropout(0.5, generator=torch.Generator().manual_seed(1)),
    "block, seed": lambda: dn.Masked(dn.DropBlock1d(0.5, 2).law, seed=1),
}
each_stream = pytest.mark.parametrize("name", LAYERS)
each_checkpoint = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])


class TestStreams:
    def test_calls_differ_and_a_seed_repeats_them(self) -> None:
        first, again, x = dn.Dropout(seed=3), dn.Dropout(seed=3), torch.ones(100)
        a, b = first(x), first(x)
        assert not torch.equal(a, b)
        assert torch.equal(again(x), a)
        assert torch.equal(again(x), b)
        assert not torch.equal(dn.Dropout(seed=4)(x), a)

    @pytest.mark.parametrize("name", ["seed", "generator", "block, seed"])
    def test_the_global_stream_is_left_alone(self, name: str) -> None:
        before = torch.get_rng_state()
        LAYERS[name]()(torch.ones(4, 6))
        assert torch.equal(before, torch.get_rng_state())

    def test_a_generator_decides_and_advances(self) -> None:
        generator = torch.Generator().manual_seed(0)
        layer, x = dn.Dropout(generator=generator), torch.ones(100)
        first = layer(x)
        assert not torch.equal(layer(x), first)
        generator.manual_seed(0)
        assert torch.equal(layer(x), first)

    def test_mixed_seeds_do_not_collide(self) -> None:
        seeds = {
            mix(seed, rank, call) for seed in range(10) for rank in range(10) for call in range(50)
        }
        assert len(seeds) == 5000
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_eval_calls_do_not_count(self) -> None:
        layer, twin, x = dn.Dropout(seed=3), dn.Dropout(seed=3), torch.ones(100)
        layer.eval()(x)
        assert torch.equal(layer.train()(x), twin(x))


class Shared(nn.Module):
    """Calls one dropout layer in several checkpoints, on equal inputs too."""

    def __init__(self, drop: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.reentrant = drop, reentrant
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def part(self, x: Tensor) -> Tensor:
        # Two calls in a part, the first on the part's own input.
        return self.drop(self.first(self.drop(x)).sin())

    def run(self, function: nn.Module, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        h = self.run(self.part, x)
        return self.run(self.part, self.second(h)) + self.run(self.part, h)


def gradients(model: Shared, x: Tensor, passes: int = 1) -> list[Tensor]:
    torch.manual_seed(1)
    total = sum(model(part).square().sum() for part in x.chunk(passes))
    return list(torch.autograd.grad(total, [x, *model.parameters()]))


class TestCheckpointing:
    @each_checkpoint
    @each_stream
    @pytest.mark.parametrize("passes", [1, 3])
    def test_recomputed_masks_are_those_of_the_forward_pass(
        self, name: str, reentrant: bool, passes: int
    ) -> None:
        drop = LAYERS[name]()
        plain = Shared(copy.deepcopy(drop), None)
        again = Shared(copy.deepcopy(drop), reentrant)
        x = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
        expected, found = gradients(plain, x, passes), None
        if reentrant:
            torch.manual_seed(1)
            sum(again(part).square().sum() for part in x.chunk(passes)).backward()
            found = [x.grad, *(p.grad for p in again.parameters())]
        else:
            found = gradients(again, x, passes)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        # The stream goes on from where the forward pass left it.
        if name != "global stream":
            y = torch.ones(4, 6)
            assert torch.equal(plain.drop(y), again.drop(y))

    def test_equal_inputs_in_different_checkpoints(self) -> None:
        # Two passes over the same batch, as in R-Drop.
        results = []
        for use in (False, True):
            drop, weight = dn.Dropout(0.5, seed=1), torch.ones(50, requires_grad=True)

            def part(x: Tensor, drop: nn.Module = drop, weight: Tensor = weight) -> Tensor:
                return drop(x) * weight * weight

            x = torch.ones(50)
            outs = [checkpoint(part, x, use_reentrant=False) if use else part(x) for _ in range(2)]
            total = outs[0].sum() + 3 * outs[1].sum()
            results.append(torch.autograd.grad(total, weight)[0])
        assert torch.equal(*results)

    @pytest.mark.parametrize("name", ["seed", "global stream"])
    def test_compiled_with_checkpointing(self, name: str) -> None:
        torch._dynamo.reset()
        drop = LAYERS[name]()

        def step(x: Tensor) -> Tensor:
            return checkpoint(lambda y: drop(y).sin(), x, use_reentrant=False)

        x = torch.randn(200, requires_grad=True)
        out = torch.compile(step, backend="aot_eager")(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        # Where a unit was kept, d sin(2x) = 2 cos(2x); elsewhere 0: the same mask in both.
        assert torch.equal(gradient != 0, out != 0)


RANKS = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from droplens import nn as dn

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(8, 8), dn.Dropout(0.5, seed=1), dn.Dropout(0.5, seed=1, same_on_ranks=True)
)
masks = {
    name: model[i](torch.ones(200)) for i, name in ((1, "differ"), (2, "agree"))
}
ddp = nn.parallel.DistributedDataParallel(model)
ddp(torch.ones(4, 8)).sum().backward()
gathered = {}
for name, mask in {**masks, "grad": model[0].weight.grad}.items():
    both = [torch.empty_like(mask) for _ in range(2)]
    dist.all_gather(both, mask)
    gathered[name] = torch.equal(*both)
if rank == 0:
    print(gathered["differ"], gathered["agree"], gathered["grad"], flush=True)
dist.barrier()
del ddp
dist.destroy_process_group()
# gloo's threads may outlive the group; leaving at once spares their race with the interpreter.
os._exit(0)
"""


def test_ranks_differ_unless_told_to_agree(tmp_path: Path) -> None:
    store = tmp_path / "store"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    # Different masks on the ranks, equal ones where asked, and DDP has averaged the gradient.
    assert outputs[0][0].split() == ["False", "True", "True"]
