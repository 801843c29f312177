"""Shards: every image of a Parquet file or a tar comes out once, in order; what is damaged is refused as a whole."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.bulk import shard_parquet, shard_source
from pipelines.bulk.shards import MASK_SCHEMA, Member, ShardError, mask_table, read_shard
from pipelines.errors import StorageError
from pipelines.storage import Folder
from tests.conftest import forget_clients
from tests.fault_proxy import FaultProxy

IMAGES = [bytes([i]) * (100 + i) for i in range(10)]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


def read(folder: Folder, key: str, **options: Any) -> list[Member]:
    return list(read_shard(folder, key, **{"image_column": "image", "key_column": "key"} | options))


def members(folder: Folder, key: str, **options: Any) -> list[tuple[str, bytes | None]]:
    """(name, data) of members, none of which has an error."""
    found = read(folder, key, **options)
    assert [member.error for member in found] == [None] * len(found)
    return [(member.name, member.data) for member in found]


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def tar(files: dict[str, bytes] | list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for name, data in files.items() if isinstance(files, dict) else files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return out.getvalue()


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


# Parquet


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
@pytest.mark.parametrize("group", [1, 3, 10])
def test_rows_come_in_order_under_their_keys(folder: Folder, kind: pa.DataType, group: int) -> None:
    table = pa.table({"key": [f"a/{i}.jpg" for i in range(10)], "image": pa.array(IMAGES, kind)})
    folder.write("s.parquet", parquet(table, row_group_size=group))
    assert members(folder, "s.parquet") == [(f"a/{i}.jpg", IMAGES[i]) for i in range(10)]


def test_images_of_fixed_size_are_images_too(folder: Folder) -> None:
    folder.write("s.parquet", parquet(pa.table({"image": pa.array([b"abc", b"def"], pa.binary(3))})))
    assert members(folder, "s.parquet") == [("0", b"abc"), ("1", b"def")]


@pytest.mark.parametrize("inner", [pa.binary(), pa.large_binary()], ids=str)
def test_the_struct_of_hugging_face_datasets_is_read(folder: Folder, inner: pa.DataType) -> None:
    kind = pa.struct([("bytes", inner), ("path", pa.string())])
    image = pa.array([{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(IMAGES)], kind)
    table = pa.table({"image": image, "label": list(range(10))})
    huggingface = {"huggingface": '{"info": {"features": {"image": {"_type": "Image"}}}}'}
    folder.write("s.parquet", parquet(table.replace_schema_metadata(huggingface), row_group_size=4))
    assert members(folder, "s.parquet") == [(str(i), IMAGES[i]) for i in range(10)]


def test_the_struct_may_have_its_fields_in_any_order_and_the_columns_any_names(folder: Folder) -> None:
    kind = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    table = pa.table({"id": ["x", "y"], "picture": pa.array([{"path": None, "bytes": b"1"}, {"bytes": b"2"}], kind)})
    folder.write("s.parquet", parquet(table))
    assert members(folder, "s.parquet", image_column="picture", key_column="id") == [("x", b"1"), ("y", b"2")]


def test_a_null_image_is_a_member_with_an_error_and_the_others_are_read(folder: Folder) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": b"1"}, None, {"bytes": None, "path": "elsewhere.png"}, {"bytes": b"4"}]
    folder.write("struct.parquet", parquet(pa.table({"image": pa.array(rows, kind)})))
    folder.write("plain.parquet", parquet(pa.table({"image": pa.array([b"1", None, None, b"4"], pa.binary())})))
    for key, column in (("struct.parquet", "image.bytes"), ("plain.parquet", "image")):
        found = read(folder, key)
        assert [(m.name, m.data) for m in found] == [("0", b"1"), ("1", None), ("2", None), ("3", b"4")]
        assert [m.error for m in found] == [None, *[f"there is no image in this row: {column} is null"] * 2, None]


def test_an_empty_image_is_not_a_missing_one(folder: Folder) -> None:
    folder.write("s.parquet", parquet(pa.table({"image": [b"", b"x"]})))
    assert members(folder, "s.parquet") == [("0", b""), ("1", b"x")]


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (pa.array([7, -1, None], pa.int64()), ["7", "-1", "2"]),
        (pa.array(["x", "", None], pa.large_string()), ["x", "", "2"]),
        (pa.array([b"x", b"\xff", "ü".encode()], pa.binary()), ["x", "\\xff", "ü"]),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x@2"]),
        (pa.array([7, 8, 7]).dictionary_encode(), ["7", "8", "7@2"]),
        (pa.array(["x", "y", "z"], pa.string_view()), ["x", "y", "z"]),
    ],
    ids=["integers", "large_string", "bytes", "dictionary", "dictionary of integers", "view"],
)
def test_a_key_is_text_bytes_or_a_whole_number(folder: Folder, keys: pa.Array, names: list[str]) -> None:
    folder.write("s.parquet", parquet(pa.table({"key": keys, "image": [b"1", b"2", b"3"]})))
    assert members(folder, "s.parquet") == list(zip(names, [b"1", b"2", b"3"], strict=True))


def test_a_key_of_another_type_is_refused_by_name(folder: Folder) -> None:
    folder.write("s.parquet", parquet(pa.table({"key": [1.5], "image": [b"1"]})))
    with pytest.raises(ShardError, match=r"s\.parquet: the key column is double; segment\.key_column"):
        read(folder, "s.parquet")


def test_names_are_unique_and_the_same_each_time(folder: Folder) -> None:
    keys = ["x", "x", "x@1", "x", None, "4", "x@1@2"]
    folder.write("s.parquet", parquet(pa.table({"key": keys, "image": IMAGES[: len(keys)]}), row_group_size=2))
    names = [name for name, _ in members(folder, "s.parquet")]
    assert names == ["x", "x@1", "x@1@2", "x@3", "4", "4@5", "x@1@2@6"]
    assert len(set(names)) == len(keys)
    assert [name for name, _ in members(folder, "s.parquet")] == names


def test_other_columns_are_never_read(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    count, size = 40, 100_000
    table = pa.table(
        {
            "when": pa.array([datetime(2026, 1, 1)] * count, pa.timestamp("ns")),
            "nested": pa.array([[{"a": {"b": [1, 2]}}]] * count),
            "big": [noise(size, i) for i in range(count)],
            "image": pa.array([{"bytes": bytes([i]) * 9, "path": noise(size, i).hex()} for i in range(count)]),
            "key": [str(-i) for i in range(count)],
        }
    )
    folder.write("s.parquet", parquet(table, row_group_size=10, compression="none"))
    fetched: list[int] = []
    plain = shard_source.ShardSource._read

    def counted(self: shard_source.ShardSource, size: int) -> bytes:
        fetched.append(size)
        return plain(self, size)

    monkeypatch.setattr(shard_source.ShardSource, "_read", counted)
    assert members(folder, "s.parquet") == [(str(-i), bytes([i]) * 9) for i in range(count)]
    assert sum(fetched) < 0.05 * count * size


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            {"img": [b"1"], "label": [1]},
            r"has no column 'image'; set segment\.image_column to one of its own: img, label",
        ),
        ({f"c{i}": [1] for i in range(99)}, r"c28, c29, \.\.\."),
        ({"image": ["a.jpg"]}, "the column 'image' is string, not encoded images; segment.image_column has to name"),
        ({"image": [[b"1"]]}, "the column 'image' is list<element: binary>, not encoded images"),
        ({"image": [{"path": "a.jpg"}]}, "the column 'image' is struct<path: string>, not encoded images"),
        ({"image": [{"bytes": "a.jpg"}]}, "the column 'image' is struct<bytes: string>, not encoded images"),
        ({"image": pa.array([], pa.binary())}, "holds no image: it has no rows"),
    ],
    ids=["missing", "many", "string", "list", "path", "text", "empty"],
)
def test_a_table_without_images_says_what_it_has(folder: Folder, table: dict[str, Any], said: str) -> None:
    folder.write("a/s.parquet", parquet(pa.table(table)))
    with pytest.raises(ShardError, match=said) as caught:
        read(folder, "a/s.parquet")
    assert str(caught.value).startswith(folder.uri_of("a/s.parquet"))


@pytest.mark.parametrize("cut", [1, 3, 8, 9, 100, 2_000, 20_000, -1, -8])
@pytest.mark.parametrize("suffix", [".parquet", *COMPRESS])
def test_a_shard_that_was_cut_anywhere_is_refused(folder: Folder, suffix: str, cut: int) -> None:
    if suffix == ".parquet":
        whole = parquet(pa.table({"image": [noise(2_000, i) for i in range(20)]}))
    else:
        whole = COMPRESS[suffix](tar({f"{i}.jpg": noise(2_000, i) for i in range(20)}))
    end = len(whole.rstrip(b"\0")) if suffix == ".tar" else len(whole)  # half of a plain tar's end mark will do
    folder.write(f"s{suffix}", whole[: cut if cut > 0 else end + cut])
    with pytest.raises(ShardError, match=rf"s{suffix} "):
        read(folder, f"s{suffix}")


@pytest.mark.parametrize("suffix", [".parquet", ".tar", ".tar.gz"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"<html>no such shard</html>", b"\0" * 3_000, b"PAR1" * 10, b"\x1f\x8b", b"\xff\xd8\xff" * 999],
)
def test_what_is_no_shard_is_refused_in_words(folder: Folder, suffix: str, content: bytes) -> None:
    folder.write(f"s{suffix}", content)
    with pytest.raises(ShardError, match=rf"s{suffix} (is empty|cannot be read|holds no image)"):
        read(folder, f"s{suffix}")


def test_a_flipped_byte_is_found_where_the_pages_have_checksums(folder: Folder) -> None:
    whole = bytearray(
        parquet(
            pa.table({"image": [noise(2_000, i) for i in range(20)]}),
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
        )
    )
    whole[20_000] ^= 1
    folder.write("s.parquet", bytes(whole))
    with pytest.raises(ShardError, match="CRC"):
        read(folder, "s.parquet")


# tar


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_is_read_in_its_order_whatever_its_compression(folder: Folder, suffix: str, kind: int) -> None:
    files = {f"b/{9 - i}.jpg": image for i, image in enumerate(IMAGES)} | {"a.PNG": b"png"}
    folder.write(f"s{suffix}", COMPRESS[suffix](tar(files, kind)))
    assert members(folder, f"s{suffix}") == list(files.items())


def test_the_content_decides_on_the_compression_not_the_name(folder: Folder) -> None:
    folder.write("s.tar", gzip.compress(tar({"1.jpg": b"1"})))
    folder.write("s.tgz", tar({"1.jpg": b"1"}))
    assert members(folder, "s.tar") == members(folder, "s.tgz") == [("1.jpg", b"1")]


def test_a_tar_of_gnu_tar_is_read(folder: Folder, tmp_path: Path) -> None:
    for i, image in enumerate(IMAGES):
        folder.write(f"in/{'n' * 150}{i}.jpg", image)
    subprocess.run(["tar", "-C", str(tmp_path / "in"), "--sort=name", "-czf", str(tmp_path / "s.tgz"), "."], check=True)
    assert members(folder, "s.tgz") == [(f"./{'n' * 150}{i}.jpg", image) for i, image in enumerate(IMAGES)]


def test_only_files_with_an_images_ending_are_taken_and_nothing_is_written(folder: Folder, tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:

        def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "") -> None:
            header = tarfile.TarInfo(name)
            header.type, header.size, header.linkname = kind, len(data), link
            archive.addfile(header, io.BytesIO(data))

        add("train.jpg", tarfile.DIRTYPE)
        add("train.jpg/1.jpg", data=b"1")
        add("train.jpg/1.json", data=b"{}")
        add("train.jpg/1.seg.png", data=b"2")
        add("soft.jpg", tarfile.SYMTYPE, link="/etc/passwd")
        add("hard.jpg", tarfile.LNKTYPE, link="train.jpg/1.jpg")
        add("pipe.jpg", tarfile.FIFOTYPE)
        add("../../escape.jpg", data=b"3")
        add("/absolute.jpg", data=b"4")
        add("noending", data=b"5")
    folder.write("s.tar", out.getvalue())
    before = sorted(tmp_path.rglob("*"))
    names = [
        ("train.jpg/1.jpg", b"1"),
        ("train.jpg/1.seg.png", b"2"),
        ("../../escape.jpg", b"3"),
        ("/absolute.jpg", b"4"),
    ]
    assert members(folder, "s.tar") == names
    assert members(folder, "s.tar", include=(".SEG.png",)) == names[1:2]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_without_images_says_so(folder: Folder) -> None:
    folder.write("s.tar", tar({"1.txt": b"1", "2.json": b"2"}))
    with pytest.raises(ShardError, match=r"holds no image: none of its 2 members .* \.jpg, .*segment\.include"):
        read(folder, "s.tar")


def test_a_name_twice_in_a_tar_gives_two_members(folder: Folder) -> None:
    folder.write("s.tar", tar([("x.jpg", b"1"), ("x.txt", b""), ("x.jpg", b"2"), ("x.jpg@1", b"not an image")]))
    assert members(folder, "s.tar") == [("x.jpg", b"1"), ("x.jpg@1", b"2")]


def test_names_that_are_no_utf8_can_be_written_into_a_table(folder: Folder) -> None:
    folder.write("s.tar", tar({"ü/日本.jpg": b"1"}))
    assert members(folder, "s.tar") == [("ü/日本.jpg", b"1")]
    latin = tar({"PLACE.jpg": b"1"}, tarfile.USTAR_FORMAT).replace(b"PLACE.jpg", b"Pl\xe4ce.jpg")
    block = bytearray(latin)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    folder.write("latin.tar", bytes(block))
    assert members(folder, "latin.tar") == [("Pl\\xe4ce.jpg", b"1")]


@pytest.mark.parametrize("key", ["s.tar", "s.parquet"])
def test_a_member_over_the_limit_is_an_error_and_the_rest_is_read(folder: Folder, key: str) -> None:
    files = {"1.jpg": b"1" * 10, "2.jpg": b"2" * 11, "3.jpg": b"3" * 10}
    table = pa.table({"key": list(files), "image": list(files.values())})
    folder.write(key, tar(files) if key == "s.tar" else parquet(table))
    first, second, third = read(folder, key, max_bytes=10)
    assert (first.data, third.data) == (files["1.jpg"], files["3.jpg"])
    assert second == Member("2.jpg", None, "the encoded image has 11 bytes, more than the 10 that are read")


def test_a_damaged_header_in_the_middle_does_not_end_the_archive_unnoticed(folder: Folder) -> None:
    whole = bytearray(tar({f"{i}.jpg": b"x" * 512 for i in range(10)}))
    assert whole[5 * 1024 : 5 * 1024 + 5] == b"5.jpg"
    whole[5 * 1024] ^= 1
    folder.write("s.tar", bytes(whole))
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        assert len(archive.getnames()) == 5  # which is why
    with pytest.raises(ShardError, match="damaged header"):
        read(folder, "s.tar")


def test_archives_joined_with_cat_are_refused_not_halved(folder: Folder) -> None:
    one, two = tar({"1.jpg": b"1"}), tar({"2.jpg": b"2"})
    folder.write("s.tar", one + two)
    folder.write("s.tgz", gzip.compress(one) + gzip.compress(two))
    for key in ("s.tar", "s.tgz"):
        with pytest.raises(ShardError, match=r"more behind the end .* joined with cat"):
            read(folder, key)


def test_gzip_in_several_streams_is_read_whole(folder: Folder) -> None:
    """As pigz and bgzip write it; tarfile by itself stops at the first."""
    whole = tar({f"{i}.jpg": image for i, image in enumerate(IMAGES)})
    folder.write("s.tgz", b"".join(gzip.compress(whole[at : at + 1_000]) for at in range(0, len(whole), 1_000)))
    assert members(folder, "s.tgz") == [(f"{i}.jpg", image) for i, image in enumerate(IMAGES)]


def test_a_wrong_checksum_of_gzip_is_found(folder: Folder) -> None:
    whole = bytearray(gzip.compress(tar({"1.jpg": noise(5_000)}), 0))
    whole[3_000] ^= 1
    folder.write("s.tgz", bytes(whole))
    with pytest.raises(ShardError, match="CRC"):
        read(folder, "s.tgz")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])  # type: ignore[attr-defined]
def test_a_header_that_claims_gigabytes_is_refused_before_they_are_read(folder: Folder, kind: bytes) -> None:
    header = tarfile.TarInfo("bomb")
    header.type, header.size = kind, 4 << 30
    folder.write("s.tar", tar({"1.jpg": b"1"})[:1024] + header.tobuf() + b"\0" * 10_240)
    with pytest.raises(ShardError, match="a header of type"):
        read(folder, "s.tar")


def test_a_negative_size_does_not_read_backwards_for_ever(folder: Folder) -> None:
    header = tarfile.TarInfo("back.jpg")
    header.size = -1024
    folder.write("s.tar", tar({"1.jpg": b"1"})[:1024] + header.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10_240)
    with pytest.raises(ShardError, match="negative"):
        read(folder, "s.tar")


# the store


class Faulty(Folder):
    """A folder whose objects answer so many reads and then raise, or give a byte less than was asked for."""

    def __init__(self, uri: str, reads: int, fault: Exception | None) -> None:
        super().__init__(uri)
        self.reads, self.fault = reads, fault

    def open(self, key: str, mode: str = "rb") -> IO[bytes]:
        handle = super().open(key, mode)
        plain = handle.read

        def read(size: int = -1) -> bytes:
            self.reads -= 1
            if self.reads >= 0:
                return plain(size)
            if self.fault is None:
                return plain(size)[:-1]
            raise self.fault

        handle.read = read  # type: ignore[method-assign]
        return handle


@pytest.fixture
def shards(folder: Folder) -> dict[str, list[tuple[str, bytes]]]:
    """Shards of each kind, 3 MB with the same images."""
    files = {f"{i}.jpg": noise(300_000, i) for i in range(10)}
    folder.write("s.tar", tar(files))
    folder.write("s.tgz", gzip.compress(tar(files), 1))
    folder.write("s.parquet", parquet(pa.table({"key": list(files), "image": list(files.values())}), row_group_size=3))
    return {key: list(files.items()) for key in ("s.tar", "s.tgz", "s.parquet")}


@pytest.mark.parametrize("reads", range(3))
def test_a_fault_of_the_store_is_never_taken_for_a_damaged_shard(
    folder: Folder, shards: dict[str, list[tuple[str, bytes]]], reads: int
) -> None:
    faults = {
        "no route": OSError("no route"),
        "access was refused": PermissionError("no"),
        "there is nothing there": FileNotFoundError("gone"),
        "bytes came instead of": None,
    }
    for key in shards:
        for said, fault in faults.items():
            with pytest.raises(StorageError, match=f"{key}: .*{said}"):
                read(Faulty(folder.uri, reads, fault), key)


def test_a_missing_shard_is_the_stores_affair(folder: Folder) -> None:
    with pytest.raises(StorageError, match="there is nothing there"):
        read(folder, "missing.tar")


@pytest.mark.parametrize("key", ["s.tar", "s.tgz", "s.parquet"])
def test_a_reader_that_stops_early_closes_the_object(
    folder: Folder, shards: dict[str, list[tuple[str, bytes]]], key: str
) -> None:
    opened: list[IO[bytes]] = []

    class Kept(Folder):
        def open(self, key: str, mode: str = "rb") -> IO[bytes]:
            opened.append(super().open(key, mode))
            return opened[-1]

    found = read_shard(Kept(folder.uri), key, image_column="image", key_column="key")
    assert next(found).name == "0.jpg"
    assert not opened[0].closed
    found.close()
    assert opened[0].closed


@pytest.mark.parametrize("whole", [0, shard_source.WHOLE_BYTES], ids=["by pieces", "whole"])
def test_shards_are_read_from_a_store_behind_faults(
    s3: str,
    folder: Folder,
    shards: dict[str, list[tuple[str, bytes]]],
    whole: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shard_source, "WHOLE_BYTES", whole)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        forget_clients()
        store = Folder(f"s3://{s3}/with space+100%")
        for key, files in shards.items():
            store.write(key, folder.read(key))
            proxy.arm("slowdown", "cut", *(["flip"] if whole else []))  # a piece has no checksum
            assert members(store, key) == files
        with pytest.raises(StorageError, match="there is nothing there"):
            read(store, "missing.parquet")
        assert proxy.counts()["cut"] == 3


# NOTE not getrusage: its peak is inherited from the process that started this one.
PEAK = """
import re, sys
from pathlib import Path
from pipelines.bulk.shards import read_shard
from pipelines.storage import Folder

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def total(key):
    return sum(len(m.data) for m in read_shard(Folder(sys.argv[1]), key, image_column="image", key_column="key"))

assert total("small" + sys.argv[2]) == 2 << 20
before = peak()
assert total(sys.argv[2]) == 128 << 20
print(peak() - before)
"""


@pytest.mark.parametrize("key", ["s.tar", "s.tgz", "s.parquet"])
def test_memory_does_not_grow_with_the_shard(folder: Folder, key: str) -> None:
    """128 MB in one row group or archive, read by a process of its own in less than half of that."""
    image = noise(1 << 20)
    for name, count in ((f"small{key}", 2), (key, 128)):
        if key == "s.parquet":
            table = pa.table({"image": [image] * count})
            folder.write(name, parquet(table, compression="none", use_dictionary=False, write_batch_size=1))
        else:
            files = [(f"{i}.jpg", image) for i in range(count)]
            folder.write(name, gzip.compress(tar(files), 0) if key == "s.tgz" else tar(files))
    command = [sys.executable, "-c", PEAK, folder.uri, key]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert int(done.stdout) < 64 << 10


def test_a_batch_of_rows_is_as_large_as_the_images_allow() -> None:
    def rows(sizes: list[int]) -> int:
        file = pq.ParquetFile(io.BytesIO(parquet(pa.table({"image": [noise(s) for s in sizes]}), use_dictionary=False)))
        return shard_parquet._batch_rows(file, 0, "image")

    assert rows([100] * 10) == shard_parquet.BATCH_ROWS
    assert rows([1 << 20] * 4) == 7
    assert rows([20 << 20] * 2) == 1


# masks


def test_the_masks_of_a_shard_come_back_in_order() -> None:
    rows = [
        {"key": f"{i}.jpg", "mask": noise(50, i), "height": i, "width": 2 * i, "status": "ok", "error": None}
        for i in range(700)
    ]
    rows[3] |= {"mask": None, "height": None, "width": None, "status": "failed", "error": "not an image"}
    found = pq.read_table(io.BytesIO(mask_table(iter(rows))))
    assert found.column_names == ["key", "mask", "height", "width", "status", "error"]
    assert found.to_pylist() == rows


def test_the_confidence_has_a_column_only_if_it_was_asked_for() -> None:
    row = {"key": "1", "mask": b"m", "confidence": b"c", "height": 1, "width": 1, "status": "ok", "error": None}
    assert pq.read_table(io.BytesIO(mask_table([row], confidence=True))).to_pylist() == [row]
    assert "confidence" not in pq.read_schema(io.BytesIO(mask_table([row]))).names


def test_what_a_row_lacks_is_null_and_what_it_has_besides_is_left_out() -> None:
    row = {"key": "1", "status": "failed", "error": "no", "pixels": [1, 2]}
    found = pq.read_table(io.BytesIO(mask_table([row], confidence=True)))
    assert found.schema.equals(MASK_SCHEMA)
    assert found.to_pylist() == [dict.fromkeys(MASK_SCHEMA.names) | {"key": "1", "status": "failed", "error": "no"}]


def test_the_same_rows_give_the_same_bytes_in_any_process() -> None:
    code = (
        "import sys; from pipelines.bulk.shards import mask_table; "
        "sys.stdout.buffer.write(mask_table([{'key': str(i), 'mask': b'm' * i, 'status': 'ok'} for i in range(600)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=Path(__file__).parents[3])
    assert done.stdout == mask_table({"key": str(i), "mask": b"m" * i, "status": "ok"} for i in range(600))


def test_no_rows_are_an_empty_table() -> None:
    assert pq.read_table(io.BytesIO(mask_table([]))).num_rows == 0
