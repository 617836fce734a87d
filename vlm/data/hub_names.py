"""What users write for a model or dataset on the hub -> its id there and a revision."""

import os
import re
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vlm.common import UsageError, one_line

Kind = Literal["model", "dataset"]
PREFIXES = {"model": ("models",), "dataset": ("datasets",)}
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_./-]")
SCHEME = re.compile(r"^(hf|https?)://", re.IGNORECASE)
PARTS_OF_PAGE = (
    "tree",
    "blob",
    "resolve",
    "raw",
    "viewer",
    "discussions",
    "settings",
)  # what follows an id in addresses
WITH_REVISION = PARTS_OF_PAGE[:4]


class HubName(NamedTuple):
    """An id on the hub, such as owner/name, and a branch, tag or commit; None: the main branch."""

    id: str
    revision: str | None = None


def fault_of_id(id: str) -> str:
    """Why the hub has no such id, as a sentence; empty if it may have it."""
    if not id:
        return "It is empty."
    if wrong := NOT_IN_A_NAME.search(id):
        return f"A name there has only letters A to Z, digits, -, _ and ., and this one has {ascii(wrong[0])}."
    for part in id.split("/"):
        if part in ("", ".", ".."):
            return f"The part {part!r} is no name."
        if part[0] in "-." or part[-1] in "-.":
            return f"{part} begins or ends with - or . there."
    try:
        validate_repo_id(id)
    except HFValidationError as error:
        return one_line(error)
    return ""


def looks_like_path(name: str) -> bool:
    """Whether a name means a local file or folder, not an id on the hub (`name`, `owner/name`, with @revision, the
    address of its page, or `hf://...`)."""
    if os.path.exists(name) or name.startswith((".", "/", "~")) or "\\" in name:
        return True
    if SCHEME.match(name):
        return False
    if name.endswith("/"):
        return True
    id, _, _ = name.partition("@")
    parts = id.split("/")
    return len(parts) > 2 and not (parts[0] in ("datasets", "models") and len(parts) == 3)


def hub_name(text: str, kind: Kind) -> HubName:
    """The id and the revision that a text names.

    Args:
        text: `owner/name`, `name`, `owner/name@revision`, `datasets/owner/name`, `hf://datasets/owner/name@revision`,
            or the address of a page on the hub.

    Raises:
        UsageError: it is no such text, or names the other kind.
    """
    plain = SCHEME.sub("", text.strip())
    pasted = text.lower().startswith("http")
    if pasted:
        address = urlsplit(text.strip())
        plain = unquote(address.path).strip("/")
    parts = plain.strip("/").split("/")
    other = "dataset" if kind == "model" else "model"
    if parts[0] in PREFIXES[other] and len(parts) > 1:
        raise UsageError(f"--{kind} {text}: this names a {other}. Give it to --{other}.")
    if parts[0] in PREFIXES[kind] and len(parts) > 1:
        parts = parts[1:]
    elif pasted and kind == "dataset":
        raise _no_name(text, kind)
    revision = None
    if SCHEME.match(text):
        parts, revision = _without_page(parts)
    id, _, given = "/".join(parts).partition("@")
    if fault_of_id(id):
        raise _no_name(text, kind, fault_of_id(id))
    return HubName(id, unquote(given) or revision)


def _without_page(parts: list[str]) -> tuple[list[str], str | None]:
    """The parts of an address that are an id, and the revision after it."""
    place = next((i for i, part in enumerate(parts[1:3], 1) if part in PARTS_OF_PAGE), None)
    if place is None:
        return parts, None
    has_revision = parts[place] in WITH_REVISION and len(parts) > place + 1
    return parts[:place], parts[place + 1] if has_revision else None


def _no_name(text: str, kind: Kind, why: str = "") -> UsageError:
    if SCHEME.match(text):
        return UsageError(
            f"--{kind} {text}: not the address of a {kind} on the hub. Expected owner/name or, of other addresses, the "
            "folder or file that you downloaded from there."
        )
    return UsageError(
        f"{kind} {text}: no local folder, and not a valid name on the hub. {why} "
        "Expected owner/name or owner/name@revision."
    )
