"""Which packages the requirement files ask for, and what is installed of them. Works before any of them is
installed."""

from importlib import metadata
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """One line of a requirement file. wanted: such as "torch>=2.6,<2.14"; found: the installed version, None: not
    installed."""

    name: str
    wanted: str
    found: str | None
    fits: bool


def examine(path: Path) -> list[Package]:
    """The packages of a requirement file and of the files that it includes, in their order."""
    packages: list[Package] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        wanted = line.partition("#")[0].strip()
        if wanted.startswith("-r "):
            packages += examine(path.parent / wanted[3:].strip())
        elif wanted:
            packages.append(_package(wanted))
    return packages


def _package(wanted: str) -> Package:
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:  # without it no version can be compared; installing the requirements brings it
        return Package(wanted, wanted, None, False)
    requirement = Requirement(wanted)
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Package(requirement.name, wanted, None, False)
    return Package(requirement.name, wanted, found, requirement.specifier.contains(found, prereleases=True))
