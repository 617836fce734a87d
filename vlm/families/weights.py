"""Reading and writing a model's weights in a local folder: safetensors only, no code of the folder is run."""

import inspect
import json
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from vlm.common import UsageError, dtype_name, note
from vlm.data import COPY_AGAIN
from vlm.families.pretrained import blaming, brief, load_pretrained, quiet
from vlm.families.quantization import forget_quantizer, loading_options

MOST_MISSING = 2  # times as many weights as there are in the files; a little less than all may be tied
NUMBER = re.compile(r"\d+")
OTHER_FORMATS = {b"PK": "a pickle in a zip (torch.save)", b"\x80": "a pickle", b"<": "a web page", b"GG": "a GGUF file"}


def read_model(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    bits: int | None,
    kept: list[str],
    described: int,
) -> PreTrainedModel:
    """The model in a folder.

    Each weight is read straight into a tensor of its final format, so there is never a second copy of the model.

    Args:
        config: the configuration in the folder.
        dtype: the number format of all weights that are not quantized.
        bits: 4 or 8 for quantized linear layers, None for none.
        kept: names of the linear layers that are not quantized.
        described: numbers that the weights have by the configuration.

    Raises:
        UsageError: the weights cannot be read, some are missing, or they do not fit the configuration.
    """
    _check_size(folder, config, described)
    with blaming(f"the model in {folder} cannot be loaded", COPY_AGAIN):
        model, report = load_pretrained(
            AutoModelForImageTextToText,
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **loading_options(bits, dtype, device, kept),
        )
    _check_report(folder, report, model)
    if bits:
        forget_quantizer(model)
    return model.to(device)


def _check_size(folder: Path, config: PreTrainedConfig, described: int) -> None:
    """Raises UsageError if a file of weights is damaged, or has far fewer numbers than the configuration says: memory
    would be taken for all of them before anything is read."""
    stored = sum(_numbers_in(path) for path in sorted(folder.glob("*.safetensors")))
    packed = 8 if getattr(config, "quantization_config", None) else 1  # numbers of 4 bits in those of 32
    if described > MOST_MISSING * packed * max(stored, 1):
        raise UsageError(
            f"{folder / 'config.json'} describes a model of {described:,} weights, but its files have {stored:,}. "
            f"{COPY_AGAIN}"
        )


def _numbers_in(path: Path) -> int:
    """How many numbers a file of weights has, by its header. Raises UsageError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            begins = file.read(2)
        what = next((what for start, what in OTHER_FORMATS.items() if begins.startswith(start)), "damaged or cut off")
        raise UsageError(f"{path} is {what}, no whole safetensors file ({brief(error)}). {COPY_AGAIN}") from error


def _check_report(folder: Path, report: dict[str, Any], model: PreTrainedModel) -> None:
    """Look at what transformers says about the weights that it loaded; a note tells of layers that were left out.

    Raises:
        UsageError: they do not fit the model.
    """
    missing, others = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise UsageError(
            f"the weights in {folder} are incomplete: {len(missing)} are missing, such as {missing[0]}. {COPY_AGAIN}"
        )
    if others:
        name, found, wanted = others[0]
        raise UsageError(
            f"the weights in {folder} do not fit its config.json: {name} has the shape {tuple(found)} instead of "
            f"{tuple(wanted)}{f', and {len(others) - 1} more' if others[1:] else ''}. {COPY_AGAIN}"
        )
    known = {NUMBER.sub("#", name) for name in model.state_dict()}
    unused = sorted(name for name in report["unexpected_keys"] if NUMBER.sub("#", name) in known)
    if unused:
        note(
            f"warning: config.json in {folder} has fewer layers than the weights: {len(unused)} weights are not used, "
            f"such as {unused[0]}."
        )


def write_model(model: PreTrainedModel, folder: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write weights and configuration so that transformers reads them without this program.

    Args:
        state: the weights by their names, all of `dtype`.
    """
    # After a conversion tied weights share no memory, so transformers would save them twice.
    state = {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}
    with quiet():
        model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = dtype_name(dtype)  # of the saved weights, which may differ from the trained ones
    _add_older_names(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _add_older_names(config: dict[str, Any]) -> None:
    """Add to a configuration the names under which transformers 4 looks for settings of the language model. Without
    them it takes its own values, and says nothing."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        text = config
    elif "tie_word_embeddings" in config:
        text.setdefault("tie_word_embeddings", config["tie_word_embeddings"])
    rope = text.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return  # none, or one for each kind of layer, for which version 4 has no common name
    beside = ("rope_theta", "partial_rotary_factor")
    text.update({name: rope[name] for name in beside if name in rope})
    scaling = {name: value for name, value in rope.items() if name not in beside}
    if scaling != {"rope_type": "default"}:
        text["rope_scaling"] = scaling  # version 5 prefers it to rope_parameters, and takes the others from beside it


@cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of a language model's argument for keys and values: transformers 5.24 renamed it to cache."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
