"""Box annotations: what VOC XML, archives, folders and tables may hold, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest
from archives import message, tar

from vgg.localisation import annotations
from vgg.localisation.annotations import ArchivedXml, FolderXml, KaggleTable
from vgg.localisation.voc import MAX_XML_BYTES, Annotation, Box, Malformed, parse, parse_row
from vgg.sharding.scenes import voc_xml

TENCH = Box("n01440764", 13, 22, 442, 298)
ILSVRC = b"""<annotation>
\t<folder>n01440764</folder>
\t<filename>%s</filename>
\t<source>\n\t\t<database>ILSVRC_2012</database>\n\t</source>
\t<size>\n\t\t<width>500</width>\n\t\t<height>375</height>\n\t\t<depth>3</depth>\n\t</size>
\t<segmented>0</segmented>
\t<object>
\t\t<name>n01440764</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>0</truncated>
\t\t<difficult>0</difficult>
\t\t<bndbox>\n\t\t\t<xmin>13</xmin>\n\t\t\t<ymin>22</ymin>\n\t\t\t<xmax>442</xmax>\n\t\t\t<ymax>298</ymax>\n\t\t</bndbox>
\t</object>
</annotation>
"""
BOMB = b"""<?xml version="1.0"?>
<!DOCTYPE annotation [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><object><name>&b;</name></object></annotation>"""


def xml(*boxes: Box, size: tuple[int, int] = (500, 375)) -> bytes:
    return voc_xml("key", *size, [(box.wnid, tuple(box[1:])) for box in boxes])


def reason(data: bytes) -> str:
    with pytest.raises(Malformed) as caught:
        parse(data, "key")
    return str(caught.value)


def test_an_annotation_of_ilsvrc() -> None:
    assert parse(ILSVRC, "train/n01440764/n01440764_18") == Annotation(
        "train/n01440764/n01440764_18", (500, 375), (TENCH,)
    )
    two = parse(xml(TENCH, Box("n2", 0, 0, 1, 1)), "a")
    assert [box.wnid for box in two.boxes] == ["n01440764", "n2"]
    assert parse(xml(), "a").boxes == ()  # no object is legal
    assert parse(b"\xef\xbb\xbf" + ILSVRC, "a").boxes == (TENCH,)
    assert parse(ILSVRC.replace(b"<width>500</width>", b""), "a").size is None


def test_parts_of_an_object_are_not_its_box() -> None:
    part = b"<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    assert parse(ILSVRC.replace(b"\t</object>", part + b"</object>"), "a").boxes == (TENCH,)


@pytest.mark.parametrize(
    ("text", "value", "rounded"),
    [("13", 13, False), ("13.0", 13, False), (" 13.5 ", 14, True), ("13.49", 13, True), ("-2.5", -2, True),
     ("1.3e1", 13, False), ("+13", 13, False)],
)  # fmt: skip
def test_coordinates_may_be_floats(text: str, value: int, rounded: bool) -> None:
    found = parse(ILSVRC.replace(b"<xmin>13<", f"<xmin>{text}<".encode()), "a")
    assert (found.boxes[0].xmin, found.is_rounded) == (value, rounded)


@pytest.mark.parametrize("text", ["nan", "inf", "1e9", "1_000", "0x10", "", "13 14", "１３", "9" * 400])
def test_other_coordinates_are_refused(text: str) -> None:
    assert "coordinate" in (why := reason(ILSVRC.replace(b"<xmin>13<", f"<xmin>{text}<".encode()))) or "no xmin" in why


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (BOMB, "has a document type"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "has a document type"),
        (ILSVRC[:-20], "not XML"),
        (b"", "not XML"),
        (b"<html/>", "its root is <html>"),
        (b'<?xml version="1.0" encoding="nonsense"?><annotation/>', "not XML"),
        (ILSVRC.replace(b"<name>n01440764</name>", b""), "object 1 has no name"),
        (ILSVRC.replace(b"<bndbox>", b"<box>").replace(b"</bndbox>", b"</box>"), "no xmin, ymin, xmax, ymax"),
        (ILSVRC.replace(b"<xmin>13</xmin>", b"<xmin>13</xmin><xmin>14</xmin>"), "<xmin> twice"),
        (b"<annotation>" + b" " * MAX_XML_BYTES + b"</annotation>", "more than 1,048,576 bytes"),
    ],
)
def test_hostile_and_broken_annotations_are_refused(data: bytes, expected: str) -> None:
    assert expected in reason(data)


def archive(data: bytes, md5: str | None = None) -> ArchivedXml:
    return ArchivedXml("boxes.tgz", lambda: io.BytesIO(data), md5)


MEMBERS = {f"Annotation/n01440764/n01440764_{i}.xml": xml(Box("n01440764", i, 2, 30, 40)) for i in range(9)}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("packed", [True, False])
def test_archives_are_streamed(form: int, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    deep = f"{'deep/' * 60}n2_1.xml"  # needs a long name
    members = {"readme.txt": b"text", "._n1_1.xml": b"of a Mac", **MEMBERS}
    plain = tar(members | ({} if form == tarfile.USTAR_FORMAT else {deep: xml()}), form)
    source = archive(gzip.compress(plain) if packed else plain)
    found = list(source)
    assert [a.path for a in found][:2] == ["Annotation/n01440764/n01440764_0", "Annotation/n01440764/n01440764_1"]
    assert len(found) == 9 + (form != tarfile.USTAR_FORMAT)
    assert found[8].boxes == (Box("n01440764", 8, 2, 30, 40),)
    assert source.malformed == []
    assert source.origin()["num_annotations"] == len(found)
    assert list(tmp_path.iterdir()) == []  # nothing was extracted


def test_a_cut_or_damaged_archive_is_refused_wherever_it_is() -> None:
    """tarfile itself takes a damaged header, and the end of a file between two members, for the end."""
    plain = tar(MEMBERS)
    for cut in range(0, len(plain.rstrip(b"\0")), 512):
        assert "boxes.tgz: not a complete tar" in message(lambda cut=cut: list(archive(gzip.compress(plain[:cut]))))
        damaged = bytearray(plain)
        damaged[cut + 150] ^= 0x40  # a header's checksum, or the text of an annotation
        source = archive(bytes(damaged))
        if plain[cut + 257 :].startswith(b"ustar"):
            assert "not a complete tar" in message(lambda source=source: list(source))
    packed = gzip.compress(plain)
    for cut in range(0, len(packed), 40):
        assert "not a complete tar" in message(lambda cut=cut: list(archive(packed[:cut])))
    wrong = bytearray(packed)
    wrong[-6] ^= 1  # of the checksum
    assert "not a complete tar" in message(lambda: list(archive(bytes(wrong))))


def test_an_archive_has_the_published_md5_or_is_not_read() -> None:
    data = gzip.compress(tar(MEMBERS))
    source = archive(data, hashlib.md5(data).hexdigest())
    assert len(list(source)) == 9
    assert source.origin()["sha256"] == hashlib.sha256(data).hexdigest()
    assert "published 0000" in message(lambda: list(archive(b"no archive at all", "0" * 32)))


def test_bombs_are_refused_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = gzip.compress(tar({"a.bin": bytes(2**25)}))
    assert "without an annotation" in message(lambda: list(archive(zeros)))
    header = tarfile.TarInfo("a.xml")
    header.type, header.size = tarfile.XHDTYPE, 2**32  # tarfile would read it into memory
    long = gzip.compress(header.tobuf() + bytes(2**25))
    assert "without an annotation" in message(lambda: list(archive(long)))
    monkeypatch.setattr(annotations, "MAX_UNPACKED_BYTES", 20_000)
    assert "more than 20,000 bytes" in message(lambda: list(archive(tar(MEMBERS))))
    monkeypatch.undo()
    monkeypatch.setattr(annotations, "MAX_ANNOTATIONS", 3)
    assert "more than 3 annotations" in message(lambda: list(archive(tar(MEMBERS))))


def test_members_that_are_no_annotations_are_named() -> None:
    link = tarfile.TarInfo("n1/n1_2.xml")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    large = b"<annotation>" + b" " * MAX_XML_BYTES
    plain = link.tobuf() + tar({"n1/n1_1.xml": large, "n1/\x1b[31m.xml": b"<", "n1/n1_3.xml": xml()})
    source = archive(plain)
    assert [found.path for found in source] == ["n1/n1_3"]
    assert [line.split(":")[1] for line in source.malformed] == [" n1/n1_2", " n1/n1_1", " 'n1/\\x1b[31m'"]


def test_folders_are_read_in_order_and_with_links(tmp_path: Path) -> None:
    for name in ("cat/b.xml", "cat/a.XML", "dog/c.xml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(xml(Box("cat", 1, 2, 3, 4)))
    (tmp_path / "cat/a.jpg").write_bytes(b"an image")
    (tmp_path / "cat/.hidden.xml").write_bytes(b"")
    (tmp_path / "emu").symlink_to(tmp_path / "dog")
    (tmp_path / "dog/loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "dog/fifo.xml")
    (tmp_path / "dog/gone.xml").symlink_to("nowhere")
    source = FolderXml("annotations/train", tmp_path)
    assert [a.path for a in source] == ["cat/a", "cat/b", "dog/c", "emu/c"]
    assert source.malformed == [
        f"annotations/train: {folder}/{name}"
        for folder in ("dog", "emu")
        for name in ("fifo: not a regular file", "gone: cannot be read: No such file or directory")
    ]
    origin = source.origin()
    assert (origin["num_annotations"], origin["size"]) == (4, 4 * len(xml(Box("cat", 1, 2, 3, 4))))
    (tmp_path / "cat/b.xml").write_bytes(xml(Box("cat", 1, 2, 3, 5)))
    again = FolderXml("annotations/train", tmp_path)
    list(again)
    assert again.origin()["sha256"] != origin["sha256"]


def test_tables_of_kaggle(tmp_path: Path) -> None:
    path = tmp_path / "LOC_val_solution.csv"
    lines = ["ImageId,PredictionString", "val_2,n1 1 2 3 4 n2 5 6 7.5 8 ", "val_1,", "", "val_3,n1 1 2 3", "nothing"]
    path.write_text("\ufeff" + "\r\n".join(lines))
    source = KaggleTable(path.name, path)
    assert list(source) == [
        Annotation("val_2", None, (Box("n1", 1, 2, 3, 4), Box("n2", 5, 6, 8, 8)), is_rounded=True),
        Annotation("val_1", None, ()),
    ]
    assert [line.split(": ")[1] for line in source.malformed] == ["line 5", "line 6"]
    assert source.origin()["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text("key,boxes\n")
    assert "its first line is not ImageId,PredictionString" in message(lambda: list(KaggleTable("t", path)))
    with pytest.raises(Malformed, match="'x' is not a coordinate"):
        parse_row("val_1,n1 1 2 3 x")
