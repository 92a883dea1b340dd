"""One training pass of multi-head attention: ours, torch's own layer, and heads one after the other.

All have the same weights and the same sequences, and run in turn, in one process and one thread; seconds are
those of the processor. The ratio of each round is taken by itself; the median over the rounds is compared
with the target.
"""

from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dianlib.multihead import MultiHeadAttention

ROUNDS = 9
# Batch, tokens, width, heads.
SHAPES = {"short": (64, 32, 128, 4), "long": (16, 256, 128, 8)}
LIMIT = 1.0  # how many times torch's seconds ours may take


def copied(ours: MultiHeadAttention, width: int, n_heads: int) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(width, n_heads, batch_first=True)
    layers = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    return theirs


def one_after_the_other(layer: MultiHeadAttention, x: Tensor) -> Tensor:
    q, k, v = (part(x).chunk(layer.n_heads, dim=-1) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    heads = [F.scaled_dot_product_attention(*head) for head in zip(q, k, v, strict=True)]
    joined: Tensor = layer.o_proj(torch.cat(heads, dim=-1))
    return joined


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pass_forwards_and_backwards(
    benchmark: Any, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    n, length, width, n_heads = SHAPES[shape]
    torch.manual_seed(0)
    ours = MultiHeadAttention(width, n_heads)
    theirs = copied(ours, width, n_heads)
    x = torch.randn(n, length, width, generator=torch.Generator().manual_seed(0))
    calls: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "dianlib": (ours, lambda: ours(x, x, x, need_weights=False)[0]),
        "dianlib with weights": (ours, lambda: ours(x, x, x)[0]),
        "nn.MultiheadAttention": (theirs, lambda: theirs(x, x, x, need_weights=False)[0]),
        "head by head": (ours, lambda: one_after_the_other(ours, x)),
    }
    outputs = [call() for _, call in calls.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)
    taken: dict[str, list[float]] = {name: [] for name in calls}

    def one_round() -> None:
        # The order turns, so that nobody always follows the same other.
        names = list(calls)
        turn = len(taken["dianlib"]) % len(names)
        for name in names[turn:] + names[:turn]:
            module, call = calls[name]
            started = process_time()
            call().square().mean().backward()
            module.zero_grad()
            taken[name].append(process_time() - started)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them would wait for each other, and for other work on the computer
    try:
        benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    ratios = {
        name: median(ours / other for ours, other in zip(taken["dianlib"][1:], times[1:], strict=True))
        for name, times in taken.items()
    }
    benchmark.extra_info.update({f"ours / {name}": round(ratio, 3) for name, ratio in ratios.items()})
    with capsys.disabled():
        print(f"\n\nbatch {n}, {length} tokens, width {width}, {n_heads} heads, one thread")
        for name, times in taken.items():
            print(f"{name:>22}: {1000 * median(times[1:]):7.1f} ms  ours takes {ratios[name]:.2f} x")
    ratio = ratios["nn.MultiheadAttention"]
    assert ratio <= LIMIT, f"ours takes {ratio:.2f} x, limit {LIMIT}"
