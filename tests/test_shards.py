"""The places of members in a tar file, keys, and archives that are not whole."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from moebius_edge.data.shards import expand, index_shard
from moebius_edge.errors import MachineError, UsageError


def make(path: Path, *names: str) -> Path:
    """A member holds its own name."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = len(name)
            tar.addfile(header, io.BytesIO(name.encode()))
    return path


def test_patterns_expand_with_their_zeros() -> None:
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand("{0..1}/{9..10}.tar") == ["0/9.tar", "0/10.tar", "1/9.tar", "1/10.tar"]
    assert expand("{a}/b.tar") == ["{a}/b.tar"]
    with pytest.raises(UsageError, match=r"the range 3..1 goes backwards: write {1..3}"):
        expand("a{3..1}.tar")


def test_members_are_found_where_they_lie_and_paired_by_key(tmp_path: Path) -> None:
    long = "folder/" + "n" * 150 + ".jpg"  # takes a header of its own
    path = make(tmp_path / "s.tar", "x.mask.png", "x.JPG", "x.json", "d/x.webp", "y.seg.png", "z.mask.png", long)
    found = index_shard(str(path))
    data = path.read_bytes()
    assert [picture.name for picture, _ in found] == ["s.tar:x.JPG", "s.tar:d/x.webp", f"s.tar:{long}"]
    assert [mask and mask.name for _, mask in found] == ["s.tar:x.mask.png", None, None]
    for pair in found:
        for place in filter(None, pair):
            assert place.size is not None
            name = place.name.partition(":")[2]
            assert data[place.offset : place.offset + place.size].decode() == name
            contents = place.contents()
            assert contents is not None and contents.read().decode() == name


def test_links_and_folders_in_a_shard_are_left_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.DIRTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            tar.addfile(header)
    assert index_shard(str(tmp_path / "s.tar")) == []


def test_a_key_with_two_pictures_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "s.tar", "x.jpg", "x.png")
    with pytest.raises(UsageError, match=r"s.tar has 'x.jpg' and 'x.png' of one key, 'x': make the keys of a shard"):
        index_shard(str(path))


def test_a_shard_that_is_not_whole_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = make(tmp_path / "s.tar", "a.jpg", "b.jpg", "c.jpg").read_bytes()
    assert len(index_shard(str(tmp_path / "s.tar"))) == 3
    # in a header, in data, behind data, and where the block that ends an archive should be
    for length in (0, 300, 512, 700, 1024, 1100, 1536, 3072):
        (tmp_path / "s.tar").write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"s.tar is (no plain .tar file or is damaged|cut short or damaged)"):
            index_shard(str(tmp_path / "s.tar"))
    for place in (100, 1024 + 100, 2048 + 100):  # in a header of each member
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / "s.tar").write_bytes(damaged)
        with pytest.raises(UsageError, match=r"s.tar is (no plain .tar file or is damaged|cut short or damaged)"):
            index_shard(str(tmp_path / "s.tar"))


def test_compressed_and_missing_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(gzip.compress(make(tmp_path / "x.tar", "a.jpg").read_bytes()))
    with pytest.raises(UsageError, match=r"s.tar is no plain .tar file or is damaged .*: unpack a compressed one"):
        index_shard(str(tmp_path / "s.tar"))
    with pytest.raises(MachineError, match=r"there is no shard .*gone.tar: check the name with `ls"):
        index_shard(str(tmp_path / "gone.tar"))
    with pytest.raises(MachineError, match=r"cannot read .*: Is a directory"):
        index_shard(str(tmp_path))
