"""Decode, segment, encode, driven by threads without Ray: the model never waits for what can be done beside it.

    items --(reader)--> decode --(pool)--> segment (the caller's thread) --> encode --(pool)--> the consumer, in order

One thread draws the items, so that reading from a store goes on beside the model; a pool decodes and encodes. An item
is in flight from when it is drawn until its result is taken, and only so many are: memory stays flat.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

A = TypeVar("A")  # an item
B = TypeVar("B")  # decoded
C = TypeVar("C")  # segmented
D = TypeVar("D")  # encoded
THREAD_NAME = "drive"


def drive(
    items: Iterable[A],
    decode: Callable[[A], B],
    segment: Callable[[list[B]], Sequence[C]],
    encode: Callable[[C], D],
    *,
    threads: int,
    batch: int,
    weigh: Callable[[A], int] | None = None,
    capacity: int = 0,
) -> Generator[D, None, None]:
    """The encoded results, in the order of the items.

    `segment` is given `batch` decoded items and returns as many; fewer at the end, or where `capacity` has room for no
    more. At most 2 * (threads + batch) items are in flight; with `weigh` (say, an item's bytes when decoded) they also
    weigh no more than `capacity` in sum, except for a single item that is heavier by itself, which goes alone.

    What the items or a step raise stops everything and is raised here; items that were on their way are dropped. No
    thread is left when this has ended, failed or been closed: a thread amid a step finishes that step first. A
    generator of items is closed.
    """
    assert threads >= 1
    assert batch >= 1
    assert weigh is None or capacity >= 1
    encoding: deque[Future[D]] = deque()
    group: list[B] = []
    with _Flow(items, decode, threads, 2 * (threads + batch), weigh, capacity) as flow:
        while True:
            while encoding and encoding[0].done():
                yield encoding.popleft().result()
                flow.release()
            decoded = flow.take(wait=not encoding)
            if decoded is not None:
                group.append(decoded)
                del decoded  # else it would stay in memory until the next one comes
                if len(group) < batch:
                    continue
            elif encoding:  # the model has nothing to do: what is being encoded makes room for more
                yield encoding.popleft().result()
                flow.release()
                continue
            elif not group:
                return
            found = segment(group)
            assert len(found) == len(group), f"segment returned {len(found)} for {len(group)}"
            group = []
            encoding.extend(flow.pool.submit(encode, each) for each in found)
            del found


class _Flow(Generic[A, B]):
    """The items in flight: a thread draws them while there is room, a pool decodes them, `take` gives them in order."""

    def __init__(
        self,
        items: Iterable[A],
        decode: Callable[[A], B],
        threads: int,
        most: int,
        weigh: Callable[[A], int] | None,
        capacity: int,
    ) -> None:
        self.items, self.decode, self.most = iter(items), decode, most
        self.weigh, self.capacity = weigh, capacity
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=THREAD_NAME)
        self.reader = threading.Thread(target=self._read, name=f"{THREAD_NAME}-reader", daemon=True)
        self.changed = threading.Condition()  # guards all below
        self.weights: deque[int] = deque()  # of what is in flight, in order
        self.ready: deque[Future[B]] = deque()  # decoded, or about to be
        self.wanted: int | None = None  # the weight that the reader waits for room for
        self.ended = self.stopped = False
        self.error: BaseException | None = None

    def __enter__(self) -> _Flow[A, B]:
        self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        self.reader.join()
        self.pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(self.items, Generator):
            self.items.close()

    def take(self, *, wait: bool) -> B | None:
        """The next decoded item. None at the end, or where the next can only come when something is released.

        Without `wait`, also None where the reader has not drawn the next one yet.
        """
        with self.changed:
            while wait and not (self.ready or self.ended or self._stuck()):
                self.changed.wait()
            if self.error is not None:
                raise self.error
            if not self.ready:
                return None
            future = self.ready.popleft()
        return future.result()

    def release(self) -> None:
        """The first item in flight is done with."""
        with self.changed:
            self.weights.popleft()
            self.changed.notify_all()

    def _stuck(self) -> bool:
        return self.wanted is not None and not self._fits(self.wanted)

    def _fits(self, weight: int) -> bool:
        if not self.weights:
            return True
        light = self.weigh is None or sum(self.weights) + weight <= self.capacity
        return light and len(self.weights) < self.most

    def _read(self) -> None:
        try:
            # Room for one more before it is drawn, as it has a size of its own; then for what it becomes.
            while self._await_room(0):
                try:
                    item = next(self.items)
                except StopIteration:
                    return
                weight = self.weigh(item) if self.weigh else 0
                if not self._await_room(weight):
                    return
                with self.changed:
                    self.weights.append(weight)
                    self.ready.append(self.pool.submit(self.decode, item))
                    self.changed.notify_all()
                del item
        except BaseException as error:  # raised in the caller's thread
            self.error = error
        finally:
            with self.changed:
                self.ended = True
                self.changed.notify_all()

    def _await_room(self, weight: int) -> bool:
        """Wait until that much more may be in flight; False when all was stopped."""
        with self.changed:
            self.wanted = weight
            self.changed.notify_all()  # the caller may have to pass on what it holds
            while not (self.stopped or self._fits(weight)):
                self.changed.wait()
            self.wanted = None
            return not self.stopped
