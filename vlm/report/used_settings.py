"""The settings of a run that its page shows."""

from collections.abc import Callable, Mapping
from typing import Any

HOW_IT_WAS_STARTED = {"resume", "overwrite"}  # not what the result depends on
# Settings that had no part in a run, if something is said of its settings.
WITHOUT_EFFECT: tuple[tuple[Callable[[Mapping[str, Any]], Any], tuple[str, ...]], ...] = (
    (lambda given: given.get("tune", "lora") != "lora", ("lora_rank", "lora_alpha", "lora_dropout")),
    (lambda given: given.get("tune") == "full" or given.get("no_feature_cache"), ("cache_size", "cache_dtype")),
    (lambda given: not given.get("streaming"), ("shuffle_buffer",)),
    (lambda given: not given.get("use_wandb") and not given.get("track"), ("wandb_project",)),
)


def used_settings(results: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that had a part in the result: with the device, number format and image size that were taken,
    without what was off."""
    given = results["settings"]
    taken = {"device": results["device"]["type"], "dtype": results["device"]["dtype"]} if "device" in results else {}
    if results.get("image_size"):
        taken["image_size"] = results["image_size"]
    if "cache_size" in given:
        taken["cache_size"] = f"{given['cache_size']:g} GB"
    off = {name for name, value in given.items() if value in (None, "") or value is False}
    off |= {name for rule, names in WITHOUT_EFFECT if rule(given) for name in names}
    off |= set() if taken.get("image_size") else {"image_size"}  # the model has one size, or its own ones
    return {name: taken.get(name, value) for name, value in given.items() if name not in off | HOW_IT_WAS_STARTED}
