"""What a model was trained from: its name on the hub, and its license, as far as its folder says."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from vlm.common import UsageError
from vlm.config import METADATA, MODEL_CARD
from vlm.data import hub_name, read_object

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")  # an identifier of the hub, such as apache-2.0
LICENSE_KEYS = ("license", "license_name", "license_link")
LONGEST_CARD = 100_000  # characters that are looked at
LONGEST_VALUE = 200


def origin_of(folder: Path, name: str | None, commit: str | None) -> dict[str, Any]:
    """What a model card says about the model that a training starts from.

    A model that this program has trained, in a local folder, is not on the hub: the one that it was trained from is.

    Args:
        folder: with its files.
        name: as the user gave it; None in the demo.
        commit: of the model on the hub; None if it is in a folder.

    Returns:
        hub_id: its name on the hub; None if that is unknown. commit: its commit there, or None.
        license, license_name, license_link: as on its card; only those that are there.
    """
    found: dict[str, Any] = {"hub_id": None, "commit": None}
    if name is not None and commit is not None:
        found |= {"hub_id": hub_name(name, "model").id, "commit": commit}
    elif (folder / METADATA).is_file():
        found |= _origin_of_ours(folder)
    return found | license_of(folder)


def _origin_of_ours(folder: Path) -> dict[str, Any]:
    try:
        origin = read_object(folder / METADATA).get("origin")
        values = {key: origin[key] for key in ("hub_id", "commit")} if isinstance(origin, dict) else {}
        if isinstance(values.get("hub_id"), str):
            hub_name(values["hub_id"], "model")  # raises if it is no name
            return {key: value for key, value in values.items() if value is None or _is_short(value)}
    except (UsageError, KeyError):
        pass
    return {}


def license_of(folder: Path) -> dict[str, str]:
    """The license that the card or the configuration in a model's folder names; empty if neither does."""
    for read in (_card_data, lambda folder: read_object(folder / "config.json")):
        try:
            values = read(folder)
        except Exception:  # a damaged card, which nothing else depends on
            continue
        found = {key: values[key].strip() for key in LICENSE_KEYS if _is_short(values.get(key))}
        if LICENSE.fullmatch(found.get("license", "")):
            return found
    return {}


def _card_data(folder: Path) -> dict[str, Any]:
    with (folder / MODEL_CARD).open(encoding="utf-8-sig") as file:
        text = file.read(LONGEST_CARD)
    return ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text.startswith("---") else {}


def _is_short(value: object) -> bool:
    """Whether a value is a text of one line that is not too long."""
    return isinstance(value, str) and value.strip().isprintable() and 0 < len(value.strip()) <= LONGEST_VALUE
