"""Threads that drive decode, segment and encode: nothing is lost or reordered, memory is bounded, no thread stays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import pytest

from pipelines.bulk.threaded import THREAD_NAME, drive

TIMEOUT = 20  # seconds after which a thread that waits for another one gives up, so that a dead-lock is a failure


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)] == []


def same(value: int) -> int:
    return value


def all_same(values: list[int]) -> list[int]:
    return list(values)


class Flight:
    """Counts what is in flight, an item from when it is drawn until its result is taken; says when it is `full`."""

    def __init__(self, items: Iterable[int], full: int) -> None:
        self.items, self.full_at = items, full
        self.lock, self.full = threading.Lock(), threading.Event()
        self.now = self.most = 0

    def __iter__(self) -> Iterator[int]:
        for item in self.items:
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
                if self.now >= self.full_at:
                    self.full.set()
            yield item

    def landed(self) -> None:
        with self.lock:
            self.now -= 1


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (1, 4), (4, 1), (3, 8), (8, 3)])
@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_the_results_are_those_of_a_plain_loop(threads: int, batch: int, count: int) -> None:
    found = drive(
        range(count),
        lambda item: item + 1,
        lambda group: [value * 10 for value in group],
        str,
        threads=threads,
        batch=batch,
    )
    assert list(found) == [str((item + 1) * 10) for item in range(count)]


def test_the_order_is_that_of_the_items_though_the_first_finish_last() -> None:
    decoded, encoded = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]

    def after_the_next(events: list[threading.Event]) -> Callable[[int], int]:
        def step(item: int) -> int:
            if item < 3:
                assert events[item + 1].wait(TIMEOUT)
            events[item].set()
            return item

        return step

    found = drive(range(4), after_the_next(decoded), all_same, after_the_next(encoded), threads=4, batch=4)
    assert list(found) == [0, 1, 2, 3]


def test_groups_are_full_but_for_the_last_one() -> None:
    groups: list[list[int]] = []

    def segment(group: list[int]) -> list[int]:
        groups.append(list(group))
        return group

    list(drive(range(300), same, segment, same, threads=2, batch=7))
    assert [len(group) for group in groups] == [7] * 42 + [6]
    assert [item for group in groups for item in group] == list(range(300))


def test_the_model_runs_in_the_callers_thread_and_the_rest_beside_it() -> None:
    seen: dict[str, set[str]] = {"items": set(), "decode": set(), "segment": set(), "encode": set()}

    def here(step: str) -> None:
        seen[step].add(threading.current_thread().name)

    def items() -> Iterator[int]:
        for item in range(20):
            here("items")
            yield item

    def decode(item: int) -> int:
        here("decode")
        return item

    def segment(group: list[int]) -> list[int]:
        here("segment")
        return group

    list(drive(items(), decode, segment, lambda item: here("encode"), threads=2, batch=4))
    caller = threading.current_thread().name
    assert seen["segment"] == {caller}
    assert caller not in seen["items"] | seen["decode"] | seen["encode"]
    assert len(seen["decode"] | seen["encode"]) <= 2


def test_reading_decoding_and_encoding_go_on_while_the_model_works() -> None:
    """Each waits for the model, the model for each: were one of them done by turns, this would time out."""
    later_decoded, earlier_encoded = threading.Event(), threading.Event()

    def decode(item: int) -> int:
        if item == 5:
            later_decoded.set()
        return item

    def segment(group: list[int]) -> list[int]:
        if group == [2, 3]:
            assert later_decoded.wait(TIMEOUT)
            assert earlier_encoded.wait(TIMEOUT)
        return group

    def encode(item: int) -> int:
        if item == 1:
            earlier_encoded.set()
        return item

    assert list(drive(range(8), decode, segment, encode, threads=2, batch=2)) == list(range(8))


def test_a_result_does_not_wait_for_a_reader_that_is_slow() -> None:
    taken = [threading.Event() for _ in range(5)]

    def items() -> Iterator[int]:
        for item in range(5):
            yield item
            assert taken[item].wait(TIMEOUT)

    for item in drive(items(), same, all_same, same, threads=1, batch=1):
        taken[item].set()
    assert all(event.is_set() for event in taken)


@pytest.mark.parametrize("slow", ["decode", "segment", "encode", "consumer"])
def test_only_so_many_items_are_in_flight_whoever_is_slow(slow: str) -> None:
    threads, batch, count = 2, 3, 150
    most = 2 * (threads + batch)
    flight = Flight(range(count), most)

    def step(name: str) -> None:
        if name == slow:  # as slow as it takes for the others to run ahead as far as they may
            assert flight.full.wait(TIMEOUT)

    def decode(item: int) -> int:
        step("decode")
        return item

    def segment(group: list[int]) -> list[int]:
        step("segment")
        return group

    def encode(item: int) -> int:
        step("encode")
        return item

    found = []
    for item in drive(flight, decode, segment, encode, threads=threads, batch=batch):
        step("consumer")
        flight.landed()
        found.append(item)
    assert found == list(range(count))
    # One result has been handed over and is not yet counted as landed while room for another is made.
    assert flight.most <= most + 1


def test_a_heavy_item_goes_alone_and_light_ones_together() -> None:
    weights = [10, 10, 10, 95, 10, 10, 500, 500, 10, 10, 10, 10]
    together: list[int] = []
    lock, flying = threading.Lock(), set[int]()

    def decode(item: int) -> int:
        with lock:
            flying.add(item)
            together.append(sum(weights[each] for each in flying))
            if weights[item] > 100:
                assert flying == {item}
        return item

    found = []
    results = drive(
        range(len(weights)), decode, all_same, same, threads=4, batch=4, weigh=weights.__getitem__, capacity=100
    )
    for item in results:
        with lock:
            flying.remove(item)
        found.append(item)
    assert found == list(range(len(weights)))
    assert max(total for total in together if total < 500) <= 100
    assert max(together) == 500


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("batch", [1, 4])
def test_any_capacity_comes_to_an_end_with_the_same_results(capacity: int, batch: int) -> None:
    found = drive(
        range(100), same, all_same, same, threads=3, batch=batch, weigh=lambda item: item % 4, capacity=capacity
    )
    assert list(found) == list(range(100))


@pytest.mark.parametrize("where", ["items", "weigh", "decode", "segment", "encode"])
@pytest.mark.parametrize("at", [0, 13, 39])
def test_what_a_step_raises_stops_everything_and_is_raised(where: str, at: int) -> None:
    class BadError(Exception):
        pass

    def may_fail(step: str, item: int) -> int:
        if step == where and item == at:
            raise BadError(step)
        return item

    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            drawn.append(may_fail("items", item))
            yield item

    results = drive(
        items(),
        lambda item: may_fail("decode", item),
        lambda group: [may_fail("segment", item) for item in group],
        lambda item: may_fail("encode", item),
        threads=3,
        batch=4,
        weigh=lambda item: min(1, may_fail("weigh", item)),
        capacity=1000,
    )
    found: list[int] = []
    with pytest.raises(BadError, match=where):
        found.extend(results)
    assert found == list(range(len(found)))
    assert len(found) <= at
    assert len(drawn) <= at + 2 * (3 + 4) + 1


def test_a_consumer_that_stops_early_closes_the_items_and_what_was_not_begun_never_is() -> None:
    closed, drawn = threading.Event(), []

    def items() -> Iterator[int]:
        try:
            for item in range(10_000):
                drawn.append(item)
                yield item
        finally:
            closed.set()

    results = drive(items(), same, all_same, same, threads=2, batch=2)
    assert next(results) == 0
    results.close()
    assert closed.is_set()
    assert len(drawn) < 20


def test_nothing_starts_before_the_first_result_is_asked_for() -> None:
    drawn: list[int] = []
    results = drive(iter(drawn.append, None), same, all_same, same, threads=1, batch=1)  # type: ignore[arg-type]
    assert drawn == []
    results.close()


def test_a_segment_that_loses_an_image_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="segment returned 1 for 2"):
        list(drive(range(2), same, lambda group: group[:1], same, threads=1, batch=2))


def test_an_image_that_is_done_with_is_let_go_of() -> None:
    """Not more decoded images are alive than are in flight, whatever the frames of the generators still refer to."""
    alive, most, lock = 0, 0, threading.Lock()

    class Decoded:
        def __init__(self) -> None:
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            with lock:
                alive -= 1

    results = drive(range(60), lambda item: Decoded(), lambda group: [0] * len(group), same, threads=1, batch=2)
    next(results)
    results.close()
    assert alive == 0
    assert list(drive(range(60), lambda item: Decoded(), lambda group: [0] * len(group), same, threads=1, batch=2))
    assert alive == 0
    assert most <= 2 * (1 + 2)
