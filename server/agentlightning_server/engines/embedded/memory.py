"""Which tokens were drawn after which history, so that a late request follows an earlier one for free.

Requests that belong together, the rollouts of a group say, seldom arrive together. A remembered draw knows
the interval of uniform numbers that leads to its token; a request whose own number lies in it would draw that
very token, so it may take it without a forward pass, and catch up with the row that it shares. Where it would
draw another token, nothing is remembered and it goes its own way. Valid for one version of the weights.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from .sampling import Draw

MAX_HISTORIES = 8192  # about as many as 64 requests make with 128 tokens each


class DrawMemory:
    """Remembered draws by history and temperature; the oldest histories are forgotten first."""

    def __init__(self) -> None:
        self._draws: OrderedDict[bytes, dict[int, Draw]] = OrderedDict()

    def remember(self, history: list[int], temperature: float, draws: Iterable[Draw]) -> None:
        """Keep what was drawn after a history."""
        known = self._draws.setdefault(_key(history, temperature), {})
        known.update({draw.token: draw for draw in draws if draw.low < draw.high})
        while len(self._draws) > MAX_HISTORIES:
            self._draws.popitem(last=False)

    def recall(self, history: list[int], temperature: float, uniform: float) -> Draw | None:
        """The draw to which the uniform number leads, where it was made before."""
        known = self._draws.get(_key(history, temperature), {})
        return next((draw for draw in known.values() if draw.low <= uniform < draw.high), None)

    def clear(self) -> None:
        """Forget everything, as after a weight update."""
        self._draws.clear()


def _key(history: list[int], temperature: float) -> bytes:
    return blake2b(
        array("i", history).tobytes() + array("d", [temperature]).tobytes(), digest_size=16
    ).digest()
