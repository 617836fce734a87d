"""Reading and writing a model's weights in a local folder: safetensors only, no code of the folder is run."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vlm.common import UsageError, dtype_name, first_line
from vlm.families.quantization import forget_quantizer, loading_options


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which repeat the same lines for each file of a small model."""
    was_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers.utils.logging.enable_progress_bar()


def read_model(
    folder: Path, dtype: torch.dtype, device: torch.device, bits: int | None, kept: list[str]
) -> PreTrainedModel:
    """The model in a folder.

    Each weight is read straight into a tensor of its final format, so there is never a second copy of the model.

    Args:
        dtype: the number format of all weights that are not quantized.
        bits: 4 or 8 for quantized linear layers, None for none.
        kept: names of the linear layers that are not quantized.

    Raises:
        UsageError: the weights cannot be read, or some are missing.
    """
    options = loading_options(bits, dtype, device, kept)
    try:
        with quiet():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                **options,
            )
    except OSError as error:
        raise UsageError(f"the weights in {folder} cannot be read: {first_line(error)}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise UsageError(
            f"the weights in {folder} are incomplete: {len(missing)} are missing, such as {missing[0]}. "
            "Download the model again."
        )
    if bits:
        forget_quantizer(model)
    return model.to(device)


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
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of a language model's argument for keys and values: transformers 5.24 renamed it to cache."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"
