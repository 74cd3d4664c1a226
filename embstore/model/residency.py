"""Which units of weights are in memory: opened when a batch asks, closed when no batch can still come, read ahead between.

A batch is *at* a unit from its arrival until it arrives at another one or ends. A unit may go when no batch is at it and
every batch has arrived somewhere; nothing else is assumed, so layers may be skipped, repeated or shared. What to read ahead
is a guess from the order seen so far: a wrong one costs a read.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor

from embstore.host.allocator import give_back
from embstore.host.threads import start_thread
from embstore.model.layer_weights import Weights
from embstore.model.units import Unit

_WAKE_SECONDS = 0.5  # how long a thread waits until it looks for Ctrl-C


class Residency:
    """The open units of one backbone, for any number of threads; together they take at most ``capacity_bytes``."""

    def __init__(self, weights: Weights, capacity_bytes: int) -> None:
        self._weights, self._capacity_bytes = weights, capacity_bytes
        self._bytes = {unit: weights.bytes_of(unit) for unit in weights.parts.units}
        self._open: dict[Unit, Callable[[], None]] = {}  # in the order of opening -> makes a stream wait for the weights
        self._loading: Unit | None = None
        self._visited: set[Unit] = set()  # of those that are open
        self._left: set[Unit] = set()  # still open when the last batch ended: nobody who lives now comes from there
        self._at: Counter[Unit] = Counter()  # batches at each unit
        self._place: dict[object, Unit | None] = {}  # of every live batch
        self._unplaced = 0  # live batches that have not arrived anywhere yet
        self._next: dict[Unit | None, Unit] = {}  # the unit that followed last time; after None comes the first one
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._loader = ThreadPoolExecutor(
            1, thread_name_prefix="embstore-weights", initializer=start_thread, initargs=(1, weights.device)
        )

    def begin(self, batches: Iterable[object]) -> None:
        """These batches are live, and have not arrived anywhere."""
        with self._changed:
            fresh = dict.fromkeys(batches)
            self._place.update(fresh)
            self._unplaced += len(fresh)
            self._advance()

    def arrive(self, batch: object, unit: Unit) -> None:
        """``batch`` calls a gate of ``unit``."""
        with self._changed:
            self._next[self._place[batch]] = unit
            self._move(batch, unit)
            self._advance()

    def leave(self, batch: object) -> None:
        """``batch`` has ended, well or not."""
        with self._changed:
            if batch not in self._place:
                return
            self._move(batch, None)
            self._place.pop(batch)
            if not self._place:
                self._left = set(self._open)
                self._error = None  # nobody is left who must hear of it
            self._advance()

    def enter(self, unit: Unit) -> bool:
        """Whether ``unit`` is open; if so, this thread's work comes after its weights."""
        with self._changed:
            ready = self._open.get(unit)
            if ready is None:
                return False
            self._visited.add(unit)
            self._left.discard(unit)
        ready()
        return True

    def wait(self, units: Container[Unit]) -> None:
        """Wait until one of ``units`` is open, or half a second.

        Raises
        ------
        Exception
            The weights of a unit could not be made.
        """
        with self._changed:
            self._advance()
            if not any(unit in units for unit in self._open):
                self._changed.wait(_WAKE_SECONDS)
            if self._error is not None:
                raise self._error

    @property
    def opened(self) -> list[Unit]:
        """Open units, the oldest first."""
        with self._changed:
            return list(self._open)

    def drop_all(self) -> None:
        """Free every unit once no batch lives; the next batch opens them again."""
        with self._changed:
            while self._loading is not None:
                self._changed.wait(_WAKE_SECONDS)
            for unit in list(self._open):
                self._drop(unit)

    def close(self) -> None:
        """Drop every unit, and stop reading for good."""
        self._loader.shutdown()
        self.drop_all()

    # --- all below under the lock -----------------------------------------------------------------------------------

    def _move(self, batch: object, unit: Unit | None) -> None:
        before = self._place[batch]
        if before is None:
            self._unplaced -= 1
        else:
            self._at[before] -= 1
        if unit is not None:
            self._at[unit] += 1
        self._place[batch] = unit

    def _advance(self) -> None:
        """Begin to read the unit that most batches wait for, else the one that will probably be next."""
        if self._loading is not None or self._error is not None or not self._place:
            return
        wanted = [unit for unit, count in self._at.items() if count and unit not in self._open]
        if wanted:
            unit = max(wanted, key=lambda unit: (self._at[unit], -unit.number))
        else:
            newest = next((unit for unit in reversed(self._open) if unit not in self._left), None)
            guess = self._next.get(newest)
            if guess is None or guess in self._open:
                return
            unit = guess
        if not self._make_room(self._bytes[unit], is_wanted=bool(wanted)):
            return
        self._loading = unit
        self._loader.submit(self._load, unit)

    def _make_room(self, needed_bytes: int, *, is_wanted: bool) -> bool:
        used = sum(self._bytes[unit] for unit in self._open)

        def may_go(unit: Unit) -> bool:
            # what was read ahead and not visited goes only for a unit that batches wait for
            return unit in self._left or (not self._unplaced and (is_wanted or unit in self._visited))

        idle = sorted((unit for unit in self._open if not self._at[unit] and may_go(unit)), key=self._worth)
        chosen: list[Unit] = []
        for unit in idle:
            if used + needed_bytes <= self._capacity_bytes:
                break
            used -= self._bytes[unit]
            chosen.append(unit)
        if used + needed_bytes > self._capacity_bytes and (used or not is_wanted):
            return False
        for unit in chosen:
            self._drop(unit)
        return True

    def _worth(self, unit: Unit) -> bool:
        """What was read ahead is worth more than what batches have passed."""
        return unit not in self._visited and unit not in self._left

    def _drop(self, unit: Unit) -> None:
        self._left.discard(unit)
        self._open.pop(unit)
        self._visited.discard(unit)
        self._weights.drop(unit)

    def _load(self, unit: Unit) -> None:
        try:
            # glibc keeps what was dropped, and does not find a hole again that is as large as an aligned block: two layers
            # would soon take the memory of five
            give_back()
            ready = self._weights.make(unit)
        except BaseException as error:  # noqa: BLE001 - raised again in the threads that wait
            self._weights.drop(unit)  # what was made of it
            with self._changed:
                self._loading = None
                self._error = error if self._place else None
                self._changed.notify_all()
            return
        with self._changed:
            self._open[unit] = ready
            self._loading = None
            self._advance()
            self._changed.notify_all()
