"""One cell: every contender at one shape and batch, call by call, round after round."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from torch import Tensor

from benchmarks.kernels.contenders import Contender

MOST_ROUNDS = 48


def measure(contenders: Sequence[Contender], x: Tensor, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Contender -> seconds of its call in every round.

    Every round has an order of its own, so that nobody always follows the same neighbour. Before that everyone is
    called on each copy once: some operators prepare themselves on the first call with a batch size.

    Args:
        contenders: they alternate.
        x: what they multiply.
        rounds: at least so many.
        seconds: and more, up to 48, until so much time has passed.
    """
    for contender in contenders:
        for _ in range(1 if contender.single else len(contender.rotation.calls)):
            contender.seconds(x)
    taken: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    began = time.monotonic()
    for number in range(max(rounds, MOST_ROUNDS)):
        if number >= rounds and time.monotonic() - began >= seconds:
            break
        shuffle(order)
        for contender in order:
            taken[contender.name].append(contender.seconds(x))
    return taken
