"""Compare contenders that do the same work, on a computer that has other work as well.

All run in turn, in one process and with one thread of torch, and seconds are those of the processor. The
order turns with each round, so that nobody always follows the same other, and the first round, in which
memory and kernels are made ready, is thrown away. What slows the computer for a while slows a whole round; so
the ratio is taken in each round by itself, and a benchmark holds the median of the ratios against its limit.
"""

from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch


def in_turn(
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    title: str,
    trials: dict[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int = 1,
) -> dict[str, float]:
    """Measure the first contender beside each other: how many times the other's seconds does it take?

    The ratios have the others' names; 0.5 says that the first takes half as long. They are also printed in a
    table and kept in the benchmark's extra_info. A round calls each contender ``calls`` times, which short
    work needs, and the seconds are those of one call.
    """
    ours, *others = names = list(trials)
    taken: dict[str, list[float]] = {name: [] for name in names}

    def one_round() -> None:
        turn = len(taken[ours]) % len(names)
        for name in names[turn:] + names[:turn]:
            started = process_time()
            for _ in range(calls):
                trials[name]()
            taken[name].append((process_time() - started) / calls)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them would wait for each other, and for other work on the computer
    try:
        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    seconds = {name: times[1:] for name, times in taken.items()}
    ratios = {
        name: median(own / other for own, other in zip(seconds[ours], seconds[name], strict=True))
        for name in others
    }
    benchmark.extra_info.update({f"{ours} / {name}": round(ratio, 3) for name, ratio in ratios.items()})
    width = max(map(len, names))
    with capsys.disabled():
        print(f"\n\n{title}, one thread, {rounds} rounds")
        for name, times in seconds.items():
            compared = f"  {ours} takes {ratios[name]:.3f} x" if name in ratios else ""
            print(f"{name:>{width}}: {1000 * median(times):9.3f} ms{compared}")
    return ratios
