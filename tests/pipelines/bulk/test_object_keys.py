"""Names of outputs: whatever an object is called, its output has a name of its own, inside and within limits."""

from __future__ import annotations

import posixpath

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.bulk.commits import COMPONENT_BYTES, KEY_BYTES, MASKS, object_key

# Components that stores, disks and our own escaping treat in a way of their own, and ordinary and any other text.
reserved = ["", ".", "..", "...", "_long", "%00", "%2E", "%2E%2E", "%5Flong", "%25", "%252E", "%", "%25%2E", "%00\n"]
plain = ["a", "A", "a.jpg", "a.png", "a b", "a+b", "é", "e\u0301", "\U0001f600", "\\", "~", "*", "a:b", "-"]
odd = st.sampled_from([*reserved, *plain, "x" * 251, "x" * 252, "é" * 126])
anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), max_size=30)
component = st.one_of(odd, anything)
key = st.lists(component, min_size=1, max_size=6).map("/".join).filter(bool)
long_key = st.tuples(key, st.integers(1, 400)).map(lambda pair: "/".join([pair[0]] * pair[1])[:1024])
root = st.sampled_from(["", "bucket", "bucket/out", "bucket/" + "deep/" * 100 + "out"])


def name_of(key: str, root: str, local: bool, suffix: str = ".png") -> str:
    return object_key(MASKS, key, suffix, root=root, local=local)


@settings(deadline=None, max_examples=150)
@given(one=key, other=key, root=root, local=st.booleans())
@example(one="a/../b", other="a/%2E%2E/b", root="", local=True)
@example(one="a//b", other="a/%00/b", root="", local=False)
@example(one="_long/x", other="%5Flong/x", root="", local=False)
@example(one="%2E", other="%252E", root="", local=False)
@example(one="a/b", other="a//b", root="", local=False)
@example(one="/a", other="a", root="", local=False)
@example(one="a", other="a/", root="", local=False)
def test_different_keys_never_share_a_name(one: str, other: str, root: str, local: bool) -> None:
    assert (name_of(one, root, local) == name_of(other, root, local)) == (one == other)


@settings(deadline=None, max_examples=100)
@given(parts=st.lists(component, min_size=1, max_size=5), at=st.integers(0, 4), changed=component, local=st.booleans())
def test_keys_that_differ_in_one_component_never_share_a_name(
    parts: list[str], at: int, changed: str, local: bool
) -> None:
    """Near misses are what two keys drawn apart hardly ever are."""
    near = [*parts[:at], changed, *parts[at + 1 :]]
    same = near == parts
    assert (name_of("/".join(parts), "b", local) == name_of("/".join(near), "b", local)) == same


@settings(deadline=None, max_examples=100)
@given(key=st.one_of(key, long_key), root=root, local=st.booleans())
@example(key="../../etc/passwd", root="", local=True)
@example(key="/etc/passwd", root="", local=True)
@example(key="..", root="bucket", local=False)
def test_a_name_never_leaves_its_prefix_and_no_store_reads_it_otherwise(key: str, root: str, local: bool) -> None:
    name = name_of(key, root, local)
    assert name.startswith(f"{MASKS}/")
    assert name.endswith(".png")
    assert posixpath.normpath(name) == name
    assert not {"", ".", ".."} & set(name.split("/"))


@settings(deadline=None, max_examples=100)
@given(key=st.one_of(key, long_key), root=root, local=st.booleans())
@example(key="x" * 1024, root="bucket", local=False)
@example(key="x" * 252, root="", local=True)
@example(key="\U0001f600" * 63, root="", local=True)
def test_a_name_is_never_longer_than_stores_and_disks_allow(key: str, root: str, local: bool) -> None:
    name = name_of(key, root, local)
    assert len(f"{root}/{name}".encode()) <= KEY_BYTES
    if local:
        assert max(len(part.encode()) for part in name.split("/")) <= COMPONENT_BYTES


@settings(deadline=None, max_examples=100)
@given(key=key, local=st.booleans())
def test_a_name_depends_on_the_key_alone(key: str, local: bool) -> None:
    """A second attempt, on another machine, writes the same object."""
    assert name_of(key, "b", local) == name_of(key, "b", local)
    assert name_of(key, "b", local, ".parquet") != name_of(key, "b", local)
