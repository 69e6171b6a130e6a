"""Messages name five, and a file lists all: beside the stage's output, or in a new folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import program

from components import findings
from components.shard.verify import main as verify
from runtime.errors import BadData, Refused
from runtime.shards.shardset import ShardSet
from runtime.wording import listing, some

NAMES = [f"image {number}" for number in range(1234)]


@pytest.fixture(autouse=True)
def no_place_yet() -> Iterator[None]:
    findings._file = None
    yield
    findings._file = None


def test_five_and_the_number_of_the_others() -> None:
    assert some(NAMES) == "image 0, image 1, image 2, image 3, image 4, and 1,229 more"
    assert some(NAMES[:6], "; ").endswith("image 4; and 1 more")
    assert some(NAMES[:5]) == "image 0, image 1, image 2, image 3, image 4"
    assert listing(NAMES).splitlines() == [*(f"  {name}" for name in NAMES[:5]), "  and 1,229 more"]
    assert (listing(["one"]), some([])) == ("  one", "")


def test_the_file_is_beside_the_output_and_goes_with_success(tmp_path: Path) -> None:
    output, whole = tmp_path / "shards", tmp_path / "shards.findings.txt"
    whole.write_text("of an earlier run")
    findings.beside(str(output), str(tmp_path / "m.json"))
    assert not whole.exists()
    assert findings.rest(BadData("few", NAMES[:5])) == ""
    assert findings.rest(BadData("no list")) == ""
    assert not whole.exists()
    assert findings.rest(BadData("many", [*NAMES, "not UTF-8: \udcff"])) == f"\nAll 1,235 are listed in {whole}"
    assert whole.read_text().splitlines() == [*NAMES, "not UTF-8: \\udcff"]
    findings.clear()
    assert list(tmp_path.iterdir()) == []
    findings.beside("s3://bucket/shards/key", str(tmp_path / "m.json"))
    assert findings.rest(BadData("many", NAMES)).endswith(f"in {tmp_path}/m.json.findings.txt")


def test_a_file_that_cannot_be_written_does_not_hide_the_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    findings.beside(str(tmp_path / "file" / "shards"), "m.json")
    assert "The whole list could not be written: " in findings.rest(BadData("many", NAMES))


def test_programs_without_an_output_write_to_a_new_folder(shards: ShardSet, tmp_path: Path) -> None:
    """A data set whose images are all damaged, in five shards: 30 + 5 lines."""
    for path in shards.directory.glob("train-*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    done = program("shard", "verify", shards.directory, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 78
    assert max(map(len, done.stderr.splitlines())) < 400
    found = re.search(r"All 65 are listed in (.*findings\.txt)$", done.stderr)
    assert found, done.stderr
    assert Path(found[1]).read_text().count(": damaged\n") == 30
    with pytest.raises(Refused) as caught:
        verify([str(shards.directory)])
    assert len(caught.value.everything) == 65
