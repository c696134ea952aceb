"""What ``torch.cond`` and ``while_loop`` call is part of the run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

import lora_fx

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).abs()
POLICY = lora_fx.Policy(lora_fx.Rule(rank=2))


class Branches(nn.Module):
    """One of two layers by the sign of a sum, then another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.g = nn.Linear(6, 6), nn.Linear(6, 3 * 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.cond(x.sum() > 0, self.a, lambda y: self.b(y).chunk(3, -1)[1].clone(), (x,))
        return self.g(made)


class Loop(Branches):
    """A layer twice, in a loop."""

    def forward(self, x: Tensor) -> Tensor:
        start = (torch.tensor(0), x)
        found = while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, torch.tanh(self.a(y))), start)
        return self.g(found[1])


def test_the_branch_that_ran_is_adapted_and_the_other_was_not_reached() -> None:
    for inputs, ran, idle in ((X, "a.weight", "b.weight"), (-X, "b.weight", "a.weight")):
        model = Branches()
        plan = lora_fx.plan(model, POLICY, inputs)
        assert [d.name for d in plan.adapted] == [ran, "g.weight"]
        assert plan[idle].reason.value == "not-reached"
        before = model(inputs)
        lora_fx.inject(model, plan, inputs)
        assert torch.equal(model(inputs), before)
        lora_fx.verify(model, inputs).raise_for_failure()


def test_the_body_of_a_loop_is_recorded_as_often_as_it_turns() -> None:
    traced = lora_fx.trace(Loop(), X)
    homes = [node.meta["module"] for node in traced.graph.nodes if node.meta["op"] == "linear"]
    assert homes == ["a", "a", "g"]
    plan = lora_fx.plan(Loop(), POLICY, X)
    assert [d.name for d in plan.adapted] == ["a.weight", "g.weight"]
    assert plan["a.weight"].site.roles == {"stem": None}
