"""Tar headers: clean tars are listed as by tarfile, everything else is refused by name."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest

from runtime.errors import BadData
from vgg.sharding.tars import BLOCK, Member, members

END = bytes(2 * BLOCK)


def listing(path: Path, start: int = 0, end: int | None = None) -> list[Member]:
    with open(path, "rb") as file:
        return list(members(file.fileno(), start, path.stat().st_size if end is None else end, path.name))


def header(name: bytes, size: int = 0, kind: bytes = b"0", magic: bytes = b"ustar\x0000", **fields: bytes) -> bytes:
    """A header block.  fields: bytes of size_field, prefix or rest that replace the usual ones."""
    block = bytearray(BLOCK)
    block[:100] = name.ljust(100, b"\0")
    block[100:124] = b"0000644\0" * 3
    block[124:136] = fields.get("size_field", b"%011o\0" % size)
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = magic
    block[345:500] = fields.get("prefix", b"").ljust(155, b"\0")
    block[500:512] = fields.get("rest", bytes(12))
    return resum(block)


def resum(block: bytes) -> bytes:
    """The block with a correct checksum."""
    return block[:148] + b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:])) + block[156:]


def member(name: bytes, data: bytes = b"data", **fields: bytes) -> bytes:
    return header(name, len(data), **fields) + data + bytes(-len(data) % BLOCK)


def made(form: int, *, kind: bytes = b"0", link: str = "", **pax: str) -> bytes:
    """A tar of two files, written by tarfile; the second one is unusual."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name in ("good", "evil"):
            info = tarfile.TarInfo(name)
            info.size = 4 if name == "good" or kind == b"0" else 0
            if name == "evil":
                info.type, info.linkname, info.pax_headers = kind, link, dict(pax)
            tar.addfile(info, io.BytesIO(b"data"))
    return file.getvalue()


def long_name(kind: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("long/" * 30 if kind == b"L" else "evil")
        info.type, info.linkname = tarfile.SYMTYPE, "far/" * 30 if kind == b"K" else "near"
        tar.addfile(info)
    return file.getvalue()


GOOD = member(b"good")
HOSTILE: dict[str, tuple[bytes, str]] = {  # description -> tar, pattern of the message
    "parent": (GOOD + member(b"../evil") + END, r"'\.\./evil': a name"),
    "parent inside": (GOOD + member(b"a/../../evil") + END, r"'a/\.\./\.\./evil': a name"),
    "parent at the end": (GOOD + member(b"evil/..") + END, r"'evil/\.\.': a name"),
    "parent in the prefix": (GOOD + member(b"evil", prefix=b"..") + END, r"'\.\./evil': a name"),
    "absolute": (GOOD + member(b"/etc/evil") + END, "'/etc/evil': a name"),
    "absolute by prefix": (GOOD + member(b"evil", prefix=b"/etc") + END, "'/etc/evil': a name"),
    "folder outside": (GOOD + header(b"../evil/", kind=b"5") + END, r"'\.\./evil/': a name"),
    "symbolic link": (made(tarfile.USTAR_FORMAT, kind=b"2", link="/etc/passwd"), "'evil': a symbolic link"),
    "hard link": (made(tarfile.USTAR_FORMAT, kind=b"1", link="good"), "'evil': a hard link"),
    "character device": (made(tarfile.USTAR_FORMAT, kind=b"3"), "'evil': a character device"),
    "block device": (made(tarfile.USTAR_FORMAT, kind=b"4"), "'evil': a block device"),
    "FIFO": (made(tarfile.USTAR_FORMAT, kind=b"6"), "'evil': a FIFO"),
    "contiguous file": (GOOD + member(b"evil", kind=b"7") + END, "'evil': of type b'7'"),
    "unknown type": (GOOD + member(b"evil", kind=b"\xff") + END, "'evil': of type"),
    "GNU sparse": (GOOD + member(b"evil", kind=b"S", magic=b"ustar  \0") + END, "'evil': a GNU sparse file"),
    "PAX path": (made(tarfile.PAX_FORMAT, path="../evil"), "'././@PaxHeader': a PAX header"),
    "PAX size": (made(tarfile.PAX_FORMAT, size="99999999999"), "'././@PaxHeader': a PAX header"),
    "global PAX": (GOOD + member(b"pax_global_header", b"19 path=../evil/x\n", kind=b"g") + END, "global PAX header"),
    "GNU long name": (long_name(b"L"), r"'\././@LongLink': a GNU long name"),
    "GNU long link": (long_name(b"K"), r"'\././@LongLink': a GNU long link"),
    "10 GB": (
        GOOD + header(b"evil", 10 * 10**9, size_field=b"%012o" % (10 * 10**9)) + END,
        "'evil': 10000000000 bytes",
    ),
    "one byte more": (GOOD + header(b"evil", 2 * BLOCK + 1) + END, "'evil': 1025 bytes of data, 1 of them past"),
    "base-256": (GOOD + header(b"evil", size_field=b"\x80" + bytes(10) + b"\x04") + END, "'evil': size field"),
    "negative base-256": (GOOD + header(b"evil", size_field=b"\xff" * 12) + END, "'evil': size field"),
    "negative octal": (GOOD + header(b"evil", size_field=b"-0000000004\0") + END, "'evil': size field"),
    "garbage size": (GOOD + header(b"evil", size_field=b"0o4_0 sizes\0") + END, "'evil': size field"),
    "digits after NUL": (GOOD + header(b"evil", size_field=b"0000004\x000010") + END, "'evil': size field"),
    "no size": (GOOD + header(b"evil", size_field=bytes(12)) + END, "'evil': size field"),
    "duplicate": (GOOD + member(b"evil") + member(b"evil", b"other") + END, "'evil': a duplicate"),
    "duplicate, spelled differently": (GOOD + member(b"evil") + member(b".//evil") + END, "'.//evil': a duplicate"),
    "newline": (GOOD + member(b"ev\nil") + END, r"'ev\\nil': a name"),
    "terminal codes": (GOOD + member(b"ev\x1b[2Jil") + END, r"'ev\\x1b\[2Jil': a name"),
    "NUL inside": (GOOD + member(b"ev\0il") + END, r"'ev\\x00il': a name"),
    "right to left": (GOOD + member("ev\u202eil".encode()) + END, r"'ev\\u202eil': a name"),
    "not UTF-8": (GOOD + member(b"ev\xe9il") + END, r"'ev\\\\xe9il': a name"),
    "no name": (GOOD + member(b"") + END, "'': a name"),
    "file named as a folder": (GOOD + member(b"evil/") + END, "'evil/': a regular file named as a directory"),
    "folder with data": (GOOD + member(b"evil/", kind=b"5") + END, "'evil/': a directory with 4 bytes"),
    "GNU with a prefix": (GOOD + member(b"evil", magic=b"ustar  \0", prefix=b"..") + END, "'evil': header fields"),
    "star": (GOOD + member(b"evil", rest=b"01234567tar\0") + END, "'evil': header fields"),
    "wrong magic": (GOOD + member(b"evil", magic=b"ustar\x0001") + END, "'evil': b'ustar.*magic"),
    "no checksum": (
        GOOD + member(b"evil")[:148] + b" " * 8 + member(b"evil")[156:] + END,
        "'evil': wrong header checksum",
    ),
    "cut at a member": (GOOD + member(b"evil"), "after 'evil': truncated"),
    "cut in a header": (GOOD + member(b"evil")[: BLOCK // 2], "after 'good': truncated"),
    "cut inside a member": (
        GOOD + member(b"evil", bytes(5 * BLOCK))[: 3 * BLOCK],
        "'evil': 2560 bytes of data, 1536 of them",
    ),
    "cut in the padding": (GOOD + member(b"evil")[: BLOCK + 4], "after 'evil': truncated"),
    "cut in the end": (GOOD + member(b"evil") + bytes(BLOCK), "after 'evil': truncated: the second"),
    "zeroed header": (
        GOOD + bytes(BLOCK) + member(b"evil")[BLOCK:] + END,
        "after 'good': a zero block followed by data",
    ),
    "garbage after the end": (GOOD + member(b"evil") + END + bytes(9000) + b"x", "after 'evil': a zero block followed"),
    "empty file": (b"", "at the beginning: truncated"),
    "a text": (b"<html>404 Not Found</html>".ljust(2 * BLOCK), "wrong header checksum"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tars_are_refused_by_name_and_nothing_is_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, expected = HOSTILE[what]
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    (inside / "hostile.tar").write_bytes(data)
    before = all_files(tmp_path)
    with pytest.raises(BadData, match=expected) as caught:
        listing(inside / "hostile.tar")
    message = str(caught.value)
    assert message.startswith("hostile.tar: byte ")
    assert message.isprintable()
    assert all_files(tmp_path) == before


def all_files(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in [folder, *folder.rglob("*")])


def clean(seed: int, form: int) -> bytes:
    """A tar by tarfile: files of many sizes, folders, long names that ustar can split, other alphabets."""
    draw = random.Random(seed)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for i in range(draw.randrange(12)):
            info = tarfile.TarInfo(draw.choice(("", "./", "ä ö/", "x" * 40 + "/")) + f"n01440764_{i}.JPEG")
            if form == tarfile.USTAR_FORMAT and draw.random() < 0.3:
                info.name = f"{'y' * 60}/{'z' * 60}/{i}"  # needs the prefix field
            info.uname, info.mtime, info.uid = draw.choice(("", "jiadeng", "ö")), draw.randrange(2**32), 1000
            if draw.random() < 0.2:
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
                continue
            info.size = draw.choice((0, 1, 511, 512, 513, draw.randrange(5000)))
            tar.addfile(info, io.BytesIO(draw.randbytes(info.size)))
    return file.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_clean_tars_are_listed_as_tarfile_lists_them(form: int, tmp_path: Path) -> None:
    path, num_files = tmp_path / "clean.tar", 0
    for seed in range(100):
        path.write_bytes(clean(seed, form))
        with tarfile.open(path) as tar:
            expected = [Member(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
        assert listing(path) == expected
        num_files += len(expected)
    assert num_files > 200


def test_v7_headers_and_long_or_uneven_padding_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "old.tar"
    v7 = {"magic": bytes(8), "kind": b"\0"}
    path.write_bytes(header(b"folder/", **v7) + member(b"folder/old", **v7) + END + bytes(10_000))
    assert listing(path) == [Member("folder/old", 2 * BLOCK, 4)]
    path.write_bytes(END)
    assert listing(path) == []


def test_an_inner_tar_is_listed_in_place(tmp_path: Path) -> None:
    inner, path = GOOD + member(b"more", b"x" * 700) + END, tmp_path / "outer.tar"
    path.write_bytes(member(b"first") + member(b"inner.tar", inner) + member(b"last") + END)
    outer = {found.name: found for found in listing(path)}
    tar = outer["inner.tar"]
    found = listing(path, tar.offset, tar.offset + tar.size)
    assert [one.name for one in found] == ["good", "more"]
    assert path.read_bytes()[found[1].offset :][: found[1].size] == b"x" * 700
    with pytest.raises(BadData, match="after 'more': truncated"):  # the next bytes belong to the outer tar
        listing(path, tar.offset, tar.offset + tar.size - 2 * BLOCK)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_no_flipped_bit_of_a_header_changes_the_listing(form: int, tmp_path: Path) -> None:
    path, whole = tmp_path / "flipped.tar", made(form)
    path.write_bytes(whole)
    expected, refused = listing(path), 0
    start = 2 * BLOCK  # the header of the second member
    for bit in range(8 * BLOCK):
        damaged = bytearray(whole)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert listing(path) == expected
        except BadData:
            refused += 1
    assert refused >= 8 * BLOCK - 16  # a NUL or zero of the checksum field may turn into a space


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "cut.tar", GOOD + member(b"more", b"x" * 700) + END
    for length in range(0, len(whole), 64):
        path.write_bytes(whole[:length])
        with pytest.raises(BadData):
            listing(path)


def test_random_damage_gives_a_valid_listing_or_bad_data(tmp_path: Path) -> None:
    """Random bytes in headers, with a correct checksum: a listing inside the file, or BadData."""
    draw, path = random.Random(1), tmp_path / "damaged.tar"
    whole = GOOD + member(b"more", b"x" * 700) + END

    def damage(first: int) -> bytes:
        block = bytearray(whole[first : first + BLOCK])
        for _ in range(draw.randrange(1, 4)):
            block[draw.choice((draw.randrange(BLOCK), 0, 124, 130, 156))] = draw.randrange(256)
        return whole[:first] + resum(bytes(block)) + whole[first + BLOCK :]

    outcomes: dict[bool, int] = {True: 0, False: 0}
    for _ in range(2000):
        data = damage(draw.choice((0, len(GOOD))))
        path.write_bytes(data)
        try:
            found = listing(path)
        except BadData:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        assert all(one.offset % BLOCK == 0 and one.offset + one.size <= len(data) for one in found)
        assert len({one.name for one in found}) == len(found)
    assert min(outcomes.values()) > 100


def test_the_file_offset_does_not_move(tmp_path: Path) -> None:
    """Threads share the descriptor."""
    path = tmp_path / "shared.tar"
    path.write_bytes(GOOD + END)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.lseek(fd, 7, os.SEEK_SET)
        assert len(list(members(fd, 0, path.stat().st_size, "shared"))) == 1
        assert os.lseek(fd, 0, os.SEEK_CUR) == 7
    finally:
        os.close(fd)
