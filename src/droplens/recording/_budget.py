"""A share of training time, measured and kept."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, final

# Before anything was measured a measurement is taken to cost this many steps.
_FIRST_GUESS: Final = 20
# Of the longest of the last few measurements.
_MARGIN: Final = 1.2


@final
class Budget:
    """Tells whether there is time to measure, from how long training and measuring took so far.

    Call `trained` at every step and wrap every measurement in `spending`. A measurement fits when
    measuring, with this one predicted from the last ones, stays within `share` of what training
    takes by itself: so much longer does it become.

    Args:
        share: of training's own time from the first step on, in (0, 1]; 1 sets no limit.
        clock: seconds, for tests.

    Raises:
        ValueError: if `share` is not in (0, 1].
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"budget has to be in (0, 1], a share of the time, but got {share}")
        self._share, self._clock = share, clock
        self._last: deque[float] = deque(maxlen=3)
        self._left: float | None = None
        self._steps = 0
        self.training = 0.0
        self.measuring = 0.0

    @property
    def share(self) -> float:
        """Time spent measuring over all time since the start; 0 before."""
        total = self.training + self.measuring
        return self.measuring / total if total else 0.0

    def started(self) -> None:
        """Training starts now; without this call, at the first step."""
        self._left = self._clock()

    def trained(self) -> None:
        """A step of training ends now."""
        now = self._clock()
        if self._left is not None:
            self.training += now - self._left
            self._steps += 1
        self._left = now

    def fits(self) -> bool:
        """Whether another measurement stays within the share."""
        spent = self.measuring + self._predicted()
        return self._share == 1 or spent <= self._share * self.training

    @contextmanager
    def spending(self) -> Iterator[None]:
        """While open, time counts as measuring."""
        start = self._clock()
        try:
            yield
        finally:
            self._left = self._clock()
            self._last.append(self._left - start)
            self.measuring += self._last[-1]

    def _predicted(self) -> float:
        if self._last:
            return _MARGIN * max(self._last)
        return _FIRST_GUESS * self.training / self._steps if self._steps else 0.0
