"""Claims about the second look at what was read, without a store."""

import hashlib
from collections.abc import Callable, Iterator

import pytest

from pipelines import checksums, retries
from pipelines.checksums import Checksums
from pipelines.retries import GaveUpError

GOOD = b"what was stored"
MD5 = hashlib.md5(GOOD).hexdigest()
OTHER_MD5 = hashlib.md5(b"something else").hexdigest()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.0)


class Store:
    """Answers with these bytes, one after the other, and counts how often it was asked."""

    def __init__(self, *bodies: bytes, etag: str = MD5) -> None:
        self._bodies: Iterator[bytes] = iter(bodies)
        self._etag = etag
        self.asked = 0

    def get(self) -> tuple[bytes, str]:
        self.asked += 1
        return next(self._bodies), self._etag


def test_bytes_that_fit_their_etag_are_read_once() -> None:
    store = Store(GOOD)
    assert Checksums().read(store.get, MD5, len(GOOD)) == GOOD
    assert store.asked == 1


def test_harmed_bytes_are_read_again_until_they_fit() -> None:
    store = Store(b"whaT was stored", b"what wAs stored", GOOD)
    assert Checksums().read(store.get) == GOOD
    assert store.asked == 3


def test_bytes_that_differ_from_read_to_read_are_an_error() -> None:
    store = Store(*(b"%d" % number for number in range(100)))
    with pytest.raises(GaveUpError, match="read 8 times, and other bytes came every time"):
        Checksums().read(store.get)
    assert store.asked == retries.ATTEMPTS


def test_the_same_bytes_twice_prove_the_etag_to_be_no_checksum() -> None:
    store = Store(GOOD, GOOD, etag=OTHER_MD5)
    assert Checksums().read(store.get) == GOOD
    assert store.asked == 2


@pytest.mark.parametrize("etag", ["", f"{MD5[:-1]}0-3", "0x8D4BCC2E4835CD0", MD5.upper() + "00"])
def test_an_etag_that_looks_like_no_md5_costs_no_second_read(etag: str) -> None:
    store = Store(GOOD, etag=etag)
    assert Checksums().read(store.get, etag, len(GOOD)) == GOOD
    assert store.asked == 1


def test_an_object_replaced_since_its_listing_is_read_once_as_it_is_now() -> None:
    store = Store(GOOD)
    assert Checksums().read(store.get, OTHER_MD5, 999) == GOOD
    assert store.asked == 1


def test_without_an_etag_in_the_answer_that_of_the_listing_decides() -> None:
    store = Store(b"harmed", GOOD, etag="")
    assert Checksums().read(store.get, MD5) == GOOD
    assert store.asked == 2


@pytest.mark.parametrize(("bodies", "reads"), [((GOOD, GOOD), 2), ((b"shor", GOOD), 2), ((b"sho", b"shor", GOOD), 3)])
def test_a_size_that_differs_from_the_listing_is_read_again(bodies: tuple[bytes, ...], reads: int) -> None:
    store = Store(*bodies, etag="parts-2")
    size = len(GOOD) if bodies[0] != GOOD else 999  # the first pair: replaced, and of another size now
    assert Checksums().read(store.get, "parts-2", size) == GOOD
    assert store.asked == reads


def test_a_store_whose_etags_are_no_checksums_is_soon_read_once() -> None:
    sums, asked = Checksums(), []
    for number in range(6):
        store = Store(*[b"%d" % number] * 2, etag=OTHER_MD5)
        assert sums.read(store.get) == b"%d" % number
        asked.append(store.asked)
    assert asked == [2] * checksums.REFUTED + [1] * (6 - checksums.REFUTED)


def test_a_store_whose_etags_are_checksums_is_watched_for_ever() -> None:
    sums = Checksums()
    look: Callable[[Store], bytes] = lambda store: sums.read(store.get)  # noqa: E731
    look(Store(GOOD))
    for _ in range(checksums.REFUTED + 1):
        look(Store(b"rotten", b"rotten"))
    assert look(Store(b"harmed", GOOD)) == GOOD
