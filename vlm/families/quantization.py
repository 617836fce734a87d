"""Weights in 4 or 8 bits by bitsandbytes, if it is installed, for training LoRA on top of them (QLoRA).

Only the linear layers of the language model are quantized: they are most of the weights, and LoRA makes up for the
rounding. The model that is saved has usual weights.
"""

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from vlm.common import UsageError

PACKAGE = "bitsandbytes"
OLDEST = "0.48"  # the first that computes on the CPU without a separate package


def check_quantization(bits: int | None, device: torch.device) -> None:
    """Check that weights of `bits` bits (None: not quantized) can be used on a device.

    Raises:
        UsageError: bitsandbytes is not installed, or does not know the device.
    """
    if bits is None:
        return
    if importlib.util.find_spec(PACKAGE) is None:
        raise UsageError(f"--load-in-{bits}bit needs {PACKAGE}: pip install '{PACKAGE}>={OLDEST}', or leave it out.")
    import bitsandbytes

    known = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device.type not in known:
        raise UsageError(
            f"--load-in-{bits}bit: {PACKAGE} {bitsandbytes.__version__} does not work on {device.type} "
            f"(it knows {', '.join(sorted(known))}): leave it out, or pip install --upgrade {PACKAGE}."
        )


def loading_options(bits: int | None, dtype: torch.dtype, device: torch.device, kept: list[str]) -> dict[str, Any]:
    """Arguments for `from_pretrained`; none if `bits` is None.

    NF4 with blocks of 64 weights for 4 bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), rows of int8 for 8 bits
    (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339).

    Args:
        kept: names of the linear layers that are not quantized.
    """
    if bits is None:
        return {}
    # It warns for every layer that int8 products are computed from float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def forget_quantizer(model: PreTrainedModel) -> None:
    """Remove transformers' marks from a quantized model, so that it is a usual model with some other linear layers.

    With the marks transformers would save the quantized weights, whatever it is given to save.
    """
    for mark in ("hf_quantizer", "is_quantized", "quantization_method", "hf_device_map"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
