"""Folders, lists and shards: what counts as a picture, which mask belongs to it, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from moebius_edge.data.pictures import Pictures
from moebius_edge.data.sources import expand, index_shard, open_pictures
from moebius_edge.errors import MachineError, UsageError
from moebius_edge.imaging.pictures import Picture, write_picture

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 3)).astype(np.uint8)
HOLE = np.zeros((12, 20), np.uint8)
HOLE[2:7, 3:9] = 255


def save(path: Path, samples: np.ndarray = COLOURS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, Picture.from_array(samples))


def names(pictures: Pictures) -> list[str]:
    return [pictures.name(i) for i in range(len(pictures))]


def masks(pictures: Pictures) -> list[str | None]:
    return [None if mask is None else mask.name for mask in pictures.masks]


def write_list(path: Path, *lines: object) -> Path:
    path.write_text("".join(line + "\n" if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_a_folder_is_searched_to_the_bottom_in_one_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.jpg", "a/b/y.webp", "c.tiff", ".hidden.png", ".thumbnails/x.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    pictures = open_pictures(str(tmp_path))
    assert names(pictures) == ["a/b/y.webp", "a/z.jpg", "b.PNG", "c.tiff"]
    image, mask = pictures.read(2)
    np.testing.assert_array_equal(image, COLOURS)
    assert mask is None and masks(pictures) == [None] * 4


def test_a_second_folder_gives_masks_by_the_names_without_endings(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "b/x.jpg", "y.png"):
        save(tmp_path / "in" / name)
    save(tmp_path / "masks" / "b" / "x.png", HOLE)
    save(tmp_path / "masks" / "y.gif.png", HOLE)
    pictures = open_pictures(tmp_path / "in", tmp_path / "masks")
    assert masks(pictures) == [None, "b/x.png", None]
    np.testing.assert_array_equal(pictures.read(1)[1], HOLE > 0)
    save(tmp_path / "in" / "masks" / "y.png", HOLE)  # masks inside the folder of pictures are no pictures
    assert "masks/y.png" in names(open_pictures(tmp_path / "in"))
    pictures = open_pictures(tmp_path / "in", tmp_path / "in" / "masks")
    assert (names(pictures), masks(pictures)) == (["a/x.jpg", "b/x.jpg", "y.png"], [None, None, "y.png"])


def test_folders_of_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "in" / "x.jpg")
    save(tmp_path / "masks" / "other.png", HOLE)
    with pytest.raises(UsageError, match=r"no mask in .*masks has the name of a picture in .*in: a/b.png belongs to"):
        open_pictures(tmp_path / "in", tmp_path / "masks")
    save(tmp_path / "masks" / "x.png", HOLE)
    save(tmp_path / "masks" / "x.webp", HOLE)
    with pytest.raises(UsageError, match=r"holds x.png and x.webp, two masks of one name: remove one"):
        open_pictures(tmp_path / "in", tmp_path / "masks")
    with pytest.raises(UsageError, match=r"in holds the pictures themselves: put the masks into a folder of their own"):
        open_pictures(tmp_path / "in", tmp_path / "in")
    with pytest.raises(MachineError, match=r"there is no folder of masks .*gone: check the path"):
        open_pictures(tmp_path / "in", tmp_path / "gone")
    listed = write_list(tmp_path / "l.jsonl", {"image": "in/x.jpg"})
    with pytest.raises(UsageError, match=r"goes with a folder of pictures only: .*l.jsonl names its masks itself"):
        open_pictures(listed, tmp_path / "masks")


def test_a_list_names_pictures_and_masks_relative_to_itself(tmp_path: Path) -> None:
    save(tmp_path / "data" / "x.jpg")
    save(tmp_path / "data" / "y.png")
    save(tmp_path / "data" / "y_mask.png", HOLE)
    lines = ({"image": "x.jpg", "caption": "x"}, {"image": "y.png", "mask": None})
    first = {"image": "y.png", "mask": "y_mask.png"}
    pictures = open_pictures(write_list(tmp_path / "data" / "l.jsonl", first, "", *lines))
    assert (names(pictures), masks(pictures)) == (["y.png", "x.jpg", "y.png"], ["y_mask.png", None, None])
    image, mask = pictures.read(0)
    np.testing.assert_array_equal(image, COLOURS)
    np.testing.assert_array_equal(mask, HOLE > 0)
    assert pictures.branches == [None, None, None]


def test_a_list_says_by_its_prompts_what_a_mask_hides(tmp_path: Path) -> None:
    lines = [{"image": "a.png", "prompt": "background"}, {"image": "a.png", "mask": "b.png", "prompt": "foreground"}]
    prompted = open_pictures(write_list(tmp_path / "l.jsonl", *lines, {"image": "a.png"}))
    assert prompted.branches == [0, 1, None]
    plain = open_pictures(write_list(tmp_path / "l.jsonl", {"image": "a.png"}, {**lines[1], "prompt": None}, lines[0]))
    assert plain.fingerprint() != prompted.fingerprint()


@pytest.mark.parametrize("key", ["image", "mask"])
def test_no_path_of_a_list_leaves_its_folder(key: str, tmp_path: Path) -> None:
    save(tmp_path / "outside.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "outside.png", tmp_path / "data" / "link.png")
    os.symlink(tmp_path, tmp_path / "data" / "up")
    lines = [{"image": "a.png"}, {"image": "sub/b.png"}]
    outside = ("../outside.png", "a/../../outside.png", str(tmp_path / "outside.png"), "C:x", "..")
    for name in (*outside, "link.png", "up/outside.png", "sub\\..\\..\\outside.png"):
        listed = write_list(tmp_path / "data" / "l.jsonl", *lines, {"image": "a.png", key: name})
        with pytest.raises(UsageError, match=r"l.jsonl:3: '.*' leaves the list's folder .*data: give paths relative"):
            open_pictures(listed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg", r"l.jsonl:2: no JSON .*: write a line as {\"image\": \"a.jpg\""),
        ("[" * 100000, r"l.jsonl:2: no JSON"),
        ('["a.jpg"]', r'l.jsonl:2: "image" must be a path, and "mask" one or left out'),
        ('{"mask": "a.png"}', r'l.jsonl:2: "image" must be a path'),
        ('{"image": "a.png", "mask": 3}', r'l.jsonl:2: "image" must be a path'),
        (
            '{"image": "a.png", "prompt": "a cat"}',
            r'l.jsonl:2: "prompt" is .a cat.: write "background"',
        ),
        ('{"image": "a.png", "prompt": 1}', r'l.jsonl:2: "prompt" is 1: write'),
        ('{"image": "a.png", "prompt": "foreground"}', r'l.jsonl:2: a "foreground" sample needs its object.s mask'),
        ('{"image": ""}', r"l.jsonl:2: '' leaves the list's folder"),
        ('{"image": "a\\u0000.png"}', r"l.jsonl:2: 'a\\x00.png' leaves the list's folder"),
    ],
)
def test_a_wrong_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_pictures(write_list(tmp_path / "l.jsonl", {"image": "a.png"}, line))
    (tmp_path / "l.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"l.jsonl is not UTF-8 text"):
        open_pictures(tmp_path / "l.jsonl")


def test_shards_come_by_name_by_pattern_or_as_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    save(tmp_path / "b.png")
    save(tmp_path / "b.mask.png", HOLE)
    (tmp_path / "set").mkdir()
    for shard, members in {"s-09.tar": ["a.jpg"], "s-10.tar": ["b.mask.png", "b.png"]}.items():
        with tarfile.open(tmp_path / "set" / shard, "w") as tar:
            for name in members:
                tar.add(tmp_path / name, name)
    whole = ["s-09.tar:a.jpg", "s-10.tar:b.png"]
    for source in ("set", "set/s-{09..10}.tar"):
        pictures = open_pictures(str(tmp_path / source))
        assert (names(pictures), masks(pictures)) == (whole, [None, "s-10.tar:b.mask.png"])
        image, mask = pictures.read(1)
        np.testing.assert_array_equal(image, COLOURS)
        np.testing.assert_array_equal(mask, HOLE > 0)
    assert names(open_pictures(tmp_path / "set" / "s-10.tar")) == whole[1:]
    with pytest.raises(MachineError, match=r"there is no shard .*s-11.tar: check the name"):
        open_pictures(str(tmp_path / "set" / "s-{09..11}.tar"))
    with pytest.raises(UsageError, match=r"set holds .tar shards, which hold their masks: name these alone"):
        open_pictures(tmp_path / "set", tmp_path)
    save(tmp_path / "set" / "a.jpg")
    with pytest.raises(UsageError, match=r"set holds .tar shards, .* name these alone, as .*s-09.tar"):
        open_pictures(tmp_path / "set")


def test_sources_of_no_kind_or_without_pictures_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("x")
    write_list(tmp_path / "empty.jsonl")
    make(tmp_path / "empty.tar", "a.txt")
    for name in ("empty", "empty.jsonl", "empty.tar"):
        with pytest.raises(UsageError, match=rf"{name} holds no picture: they end in .png, .apng, .jpg"):
            open_pictures(tmp_path / name)
    with pytest.raises(UsageError, match=r"a.jpg is neither a folder, a .jsonl list nor .tar shards: name one"):
        open_pictures(tmp_path / "a.jpg")
    for name in ("gone", "gone.tar", "gone.jsonl"):
        with pytest.raises(MachineError, match=rf"there is no .*{name}: name a folder, a .jsonl list or .tar shards"):
            open_pictures(tmp_path / name)


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


def test_a_shard_that_is_not_whole_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = make(tmp_path / "s.tar", "a.jpg", "b.jpg", "c.jpg").read_bytes()
    assert len(index_shard(str(tmp_path / "s.tar"))) == 3
    # in a header, in data, behind data, and where the block that ends an archive should be
    damaged = [whole[:length] for length in (0, 300, 512, 700, 1024, 1100, 1536, 3072)]
    for place in (100, 1024 + 100, 2048 + 100):  # in a header of each member
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for content in (*damaged, gzip.compress(whole)):
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(UsageError, match=r"s.tar is (no plain .tar file or is damaged|cut short or damaged)"):
            index_shard(str(tmp_path / "s.tar"))
    make(tmp_path / "s.tar", "x.jpg", "x.png")
    with pytest.raises(UsageError, match=r"s.tar has 'x.jpg' and 'x.png' of one key, 'x': make the keys of a shard"):
        index_shard(str(tmp_path / "s.tar"))
    with pytest.raises(MachineError, match=r"cannot read .*: Is a directory"):
        index_shard(str(tmp_path))
