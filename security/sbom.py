"""Write the SBOM of an image as CycloneDX 1.6 JSON: its Python distributions and Debian packages.

python -m security.sbom --name vgg-train --version TAG --lock docker/train.lock ROOT build/vgg-train.cdx.json

ROOT is the image's root file system (podman image mount IMAGE prints it; / is that of this machine).  The output is
reproducible.  With --lock the Python environment /opt/vgg must contain exactly the packages of the lock file.

cyclonedx-py does not replace this: it runs the environment's Python, which an image's file system alone cannot, and
covers one environment, no Debian packages and no comparison with a lock file.
"""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.program import Parser, run
from runtime.errors import BadData, Refused
from security.audit import locked

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

ENVIRONMENT = "opt/vgg"
NOT_WALKED = {"proc", "sys", "dev", "run"}
MAX_LICENCE = 100  # characters; some distributions put the whole text there


@dataclass(frozen=True, order=True)
class Package:
    """kind: pypi or deb.  place: folder of a Python distribution, or architecture of a Debian package."""

    kind: str
    name: str
    version: str
    place: str
    licence: str = ""


def main(argv: Sequence[str] | None = None) -> None:
    flags = Parser("security.sbom", __doc__)
    flags.add_argument("--name", required=True, help="of the image")
    flags.add_argument("--version", required=True, help="its tag or digest")
    flags.add_argument("--lock", metavar="FILE", help="lock file of /opt/vgg")
    flags.add_argument("root", metavar="ROOT", help="root file system")
    flags.add_argument("out", metavar="OUT", help="file to write")
    args = flags.parse_args(argv)
    root = Path(args.root)
    found = sorted({*python_distributions(root), *debian_packages(root)})
    if not found:
        raise BadData(f"{root}: neither Python distributions nor Debian packages; is it a root file system?")
    if args.lock:
        compare(found, Path(args.lock))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(bill(args.name, args.version, found, distribution(root)), encoding="utf-8")
    kinds = [package.kind for package in found]
    print(f"{out}: {kinds.count('pypi')} Python distributions, {kinds.count('deb')} Debian packages")


def python_distributions(root: Path) -> Iterator[Package]:
    """Every distribution in any site-packages or dist-packages of a file system."""
    for folder, below, _ in os.walk(root):
        if Path(folder) == root:
            below[:] = [name for name in below if name not in NOT_WALKED]
        if Path(folder).name in ("site-packages", "dist-packages"):
            below.clear()
            place = os.path.relpath(folder, root)
            for found in importlib.metadata.distributions(path=[folder]):
                metadata = email.message_from_string(found.read_text("METADATA") or found.read_text("PKG-INFO") or "")
                if name := metadata.get("Name"):  # else the rest of one that was deleted
                    licence = metadata.get("License-Expression") or metadata.get("License") or ""
                    licence = licence if len(licence) <= MAX_LICENCE and "\n" not in licence else ""
                    yield Package("pypi", normal(name), metadata["Version"], place, licence)


def debian_packages(root: Path) -> Iterator[Package]:
    """Installed packages of dpkg; images without dpkg have its records in status.d."""
    for path in [root / "var/lib/dpkg/status", *sorted((root / "var/lib/dpkg/status.d").glob("*"))]:
        if path.is_file() and path.suffix != ".md5sums":
            for stanza in path.read_text(errors="replace", encoding="utf-8").split("\n\n"):
                fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", stanza, re.MULTILINE))
                if "Package" in fields and fields.get("Status", "installed").split()[-1] == "installed":
                    yield Package("deb", fields["Package"], fields["Version"], fields.get("Architecture", "all"))


def compare(found: list[Package], lock: Path) -> None:
    """Raise Refused unless /opt/vgg contains exactly the locked packages."""
    installed = {(p.name, p.version) for p in found if p.kind == "pypi" and Path(p.place).is_relative_to(ENVIRONMENT)}
    wanted = locked(lock)
    lines = [f"  {name} {version}: locked and not installed" for name, version in sorted(wanted - installed)]
    lines += [f"  {name} {version}: installed and not locked" for name, version in sorted(installed - wanted)]
    if lines:
        raise Refused("\n".join([f"/{ENVIRONMENT} differs from {lock}:", *lines]))


def distribution(root: Path) -> str:
    """'debian-12', or '' if unknown."""
    path = root / "usr/lib/os-release"  # etc/os-release is a link to it, absolute in some images
    fields = (
        dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', path.read_text(encoding="utf-8"), re.MULTILINE))
        if path.is_file()
        else {}
    )
    return f"{fields['ID']}-{fields['VERSION_ID']}" if {"ID", "VERSION_ID"} <= fields.keys() else ""


def bill(name: str, version: str, packages: list[Package], distro: str) -> str:
    """The SBOM as JSON."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    bom = Bom(components=[component(package, distro) for package in packages])
    image = Component(type=ComponentType.CONTAINER, name=name, version=version, bom_ref=name)
    bom.metadata.component = image
    bom.register_dependency(image, bom.components)
    document: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    del document["metadata"]["timestamp"]  # the same image gives the same bytes
    document["serialNumber"] = ""
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True))}"
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def component(package: Package, distro: str) -> Component:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    if package.kind == "deb":
        qualifiers = {"arch": package.place, **({"distro": distro} if distro else {})}
        url = PackageURL("deb", distro.partition("-")[0] or "debian", package.name, package.version, qualifiers)
    else:
        url = PackageURL("pypi", None, package.name, package.version)
    return Component(
        type=ComponentType.LIBRARY,
        name=package.name,
        version=package.version,
        purl=url,
        bom_ref=f"{url}#{package.place}",
        licenses=[LicenseFactory().make_from_string(package.licence)] if package.licence else None,
        properties=[Property(name="vgg:place", value=package.place)] if package.kind == "pypi" else None,
    )


def normal(name: str) -> str:
    """The normalized name of a distribution."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    run(main)
