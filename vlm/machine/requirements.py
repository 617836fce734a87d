"""Which packages the program asks for, and which of them are installed. Works before any of them is installed."""

from importlib import metadata
from pathlib import Path
from typing import NamedTuple

DISTRIBUTION = "vlm-classification"  # its name in pyproject.toml


class Package(NamedTuple):
    """One requirement. wanted: such as "torch>=2.6,<2.14"; found: the installed version, None: not installed."""

    name: str
    wanted: str
    found: str | None
    fits: bool


def examine(*files: Path) -> list[Package]:
    """The packages of requirement files, in their order."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    wanted = (line.partition("#")[0].strip() for line in lines)
    return [_package(requirement) for requirement in wanted if requirement]


def examine_installed() -> list[Package]:
    """The packages that the installed program asks for, without its extras; [] if it is not installed by pip."""
    try:
        wanted = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    return [_package(requirement) for requirement in wanted if "extra ==" not in requirement]


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
