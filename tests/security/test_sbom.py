"""The SBOM of a small root file system: complete, valid, reproducible, compared with a lock file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from runtime.errors import BadData, Refused
from security import sbom

STATUS = """\
Package: libc6
Status: install ok installed
Architecture: amd64
Multi-Arch: same
Version: 2.36-9+deb12u10
Description: GNU C Library
 Package: not-a-field

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1.0

Package: tzdata
Status: install ok installed
Architecture: all
Version: 2026a-0+deb12u1
"""
HASH = f"--hash=sha256:{'0' * 64}"


def distribution(root: Path, place: str, name: str, version: str, *lines: str) -> None:
    folder = root / place / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines])
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    packages = "opt/vgg/lib/python3.11/site-packages"
    distribution(root, packages, "Ruamel.YAML", "0.19.1", "License-Expression: MIT")
    distribution(root, packages, "numpy", "2.5.1", "License: BSD", *["Classifier: x"])
    distribution(root, "usr/lib/python3/dist-packages", "six", "1.16.0", f"License: {'whole text ' * 50}")
    distribution(root, "proc/site-packages", "not-there", "1.0")
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text(STATUS)
    (root / "usr/lib/os-release").write_text('NAME="Debian"\nID=debian\nVERSION_ID="12"\n')
    return root


def written(root: Path, out: Path, *more: str) -> dict[str, str]:
    """Write an SBOM; returns versions by package URL."""
    sbom.main(["--name", "vgg-data", "--version", "shard-0123", *more, str(root), str(out)])
    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(out.read_text())
    assert fault is None, fault
    bill = json.loads(out.read_text())
    assert bill["metadata"]["component"] == {
        "bom-ref": "vgg-data", "name": "vgg-data", "type": "container", "version": "shard-0123",
    }  # fmt: skip
    return {component["purl"]: component["version"] for component in bill["components"]}


def test_exactly_the_installed_packages_are_listed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert written(root, tmp_path / "a.json") == {
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12": "2.36-9+deb12u10",
        "pkg:deb/debian/tzdata@2026a-0%2Bdeb12u1?arch=all&distro=debian-12": "2026a-0+deb12u1",
        "pkg:pypi/numpy@2.5.1": "2.5.1",
        "pkg:pypi/ruamel-yaml@0.19.1": "0.19.1",
        "pkg:pypi/six@1.16.0": "1.16.0",
    }
    assert capsys.readouterr().out.endswith("a.json: 3 Python distributions, 2 Debian packages\n")
    written(root, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    distribution(root, "opt/vgg/lib/python3.11/site-packages", "rich", "15.0.0")
    written(root, tmp_path / "b.json")
    serials = [json.loads((tmp_path / name).read_text())["serialNumber"] for name in ("a.json", "b.json")]
    assert serials[0] != serials[1]


def test_an_image_without_dpkg(root: Path, tmp_path: Path) -> None:
    (root / "var/lib/dpkg/status").unlink()
    (root / "var/lib/dpkg/status.d").mkdir()
    (root / "var/lib/dpkg/status.d/libc6").write_text("Package: libc6\nVersion: 2.36\nArchitecture: amd64\n")
    assert "pkg:deb/debian/libc6@2.36?arch=amd64&distro=debian-12" in written(root, tmp_path / "a.json")


def test_installed_packages_are_compared_with_the_lock(root: Path, tmp_path: Path) -> None:
    lock = tmp_path / "data.lock"
    lock.write_text(f"numpy==2.5.1 {HASH}\nruamel-yaml==0.19.1 {HASH}\n")  # six belongs to the base image
    written(root, tmp_path / "a.json", "--lock", str(lock))
    lock.write_text(f"numpy==2.5.2 {HASH}\nrich==15.0.0 {HASH}\nruamel-yaml==0.19.1 {HASH}\n")
    with pytest.raises(Refused) as refused:
        written(root, tmp_path / "c.json", "--lock", str(lock))
    assert str(refused.value).splitlines()[1:] == [
        "  numpy 2.5.2: locked and not installed",
        "  rich 15.0.0: locked and not installed",
        "  numpy 2.5.1: installed and not locked",
    ]
    assert not (tmp_path / "c.json").exists()


def test_a_folder_that_is_not_a_root_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="is it a root file system"):
        sbom.main(["--name", "x", "--version", "y", str(tmp_path), str(tmp_path / "a.json")])
