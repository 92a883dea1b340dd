"""One training pass of the LSTM and the GRU: ours, torch's own layers, and two slower ways to write them.

All have the same weights and the same sequences. torch computes an LSTM on a processor with one fused kernel
for the whole sequence, which Python cannot match on short, narrow sequences; its GRU is a loop of products
like ours.
"""

from functools import partial
from typing import Any

import pytest
import torch
from in_turn import in_turn
from torch import Tensor, nn

from dianlib import lstm

# Batch, steps, inputs, hidden size: rows of an image, and a longer, wider sequence.
SHAPES = {"short": (64, 28, 28, 128), "long": (64, 100, 64, 256)}
# How many times torch's seconds ours may take; on this shape, in this much noise.
LIMITS = {("LSTM", "short"): 1.9, ("LSTM", "long"): 1.4, ("GRU", "short"): 1.3, ("GRU", "long"): 1.3}


class ByCells(nn.Module):
    """The loop that torch's manual shows: a cell of torch for each step."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, xs: Tensor) -> tuple[Tensor, Any]:
        state, outputs = None, []
        for x in xs.unbind(1):
            state = self.cell(x, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, dim=1), state


def contenders(kind: str, n_in: int, hidden_size: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(n_in, hidden_size, batch_first=True)
    ours = getattr(lstm, kind)(n_in, hidden_size)
    ours.load_state_dict(theirs.state_dict())
    cell = getattr(nn, f"{kind}Cell")(n_in, hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in theirs.state_dict().items()})
    return {"dianlib": ours, f"nn.{kind}": theirs, f"nn.{kind}Cell in a loop": ByCells(cell)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_pass_forwards_and_backwards(
    benchmark: Any, kind: str, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    n, steps, n_in, hidden_size = SHAPES[shape]
    models = contenders(kind, n_in, hidden_size)
    xs = torch.randn(n, steps, n_in, generator=torch.Generator().manual_seed(0))
    results = [model(xs)[0] for model in models.values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])

    def one_pass(model: nn.Module) -> None:
        model(xs)[0].square().mean().backward()
        model.zero_grad()

    title = f"{kind}, batch {n}, {steps} steps, {n_in} inputs, {hidden_size} units"
    trials = {name: partial(one_pass, model) for name, model in models.items()}
    ratios = in_turn(benchmark, capsys, title, trials, rounds=9)
    limit = LIMITS[kind, shape]
    assert ratios[f"nn.{kind}"] <= limit, f"ours takes {ratios[f'nn.{kind}']:.2f} x, limit {limit}"
