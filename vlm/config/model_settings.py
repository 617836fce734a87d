"""The settings of the model: which one, what of it is trained, and how it takes images."""

from dataclasses import dataclass

from vlm.config.declare import flag
from vlm.config.defaults import AUTO, DEFAULT_MODEL, DORA, LORA, PISSA, RSLORA


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """See `Settings`."""

    model: str | None = flag(
        None, "model", f"hub id or folder of an image-text-to-text model (default: {DEFAULT_MODEL})"
    )
    model_revision: str | None = flag(None, "model", "branch, tag or commit of the model on the hub")
    tune: str = flag(
        "lora",
        "model",
        "what is trained: lora: LoRA on the language model, and the connector; full: all weights; "
        "connector: only the connector (default: lora)",
        choices=("lora", "full", "connector"),
    )
    freeze_connector: bool = flag(
        False, "model", "with --tune lora: freeze the connector too; faster, and the cached features are smaller"
    )
    lora_rank: int = flag(16, "model", "rank of the LoRA matrices (default: 16)")
    lora_alpha: float = flag(32.0, "model", "scale of LoRA: the update is multiplied by alpha / rank (default: 32)")
    lora_dropout: float = flag(
        0.0, "model", "dropout before the LoRA matrices (default: 0); a step takes longer with it"
    )
    lora_variant: str = flag(
        LORA,
        "model",
        "dora: lengths and directions of the weights are trained apart, slower; rslora: the scale is alpha / square "
        "root of rank; pissa: LoRA starts as the largest singular values of the weights (default: lora)",
        choices=(LORA, DORA, RSLORA, PISSA),
    )
    device: str = flag(
        AUTO,
        "model",
        "device to compute on (default: auto: CUDA if there is one, else the CPU)",
        choices=(AUTO, "cpu", "cuda", "mps"),
    )
    dtype: str = flag(
        AUTO,
        "model",
        "number format of the computation (default: auto: bfloat16 on CUDA if the GPU has it, else float32)",
        choices=(AUTO, "float32", "bfloat16", "float16"),
    )
    load_in_4bit: bool = flag(
        False, "model", "quantize the language model to 4 bits (NF4); with --tune lora, needs bitsandbytes"
    )
    load_in_8bit: bool = flag(
        False, "model", "quantize the language model to 8 bits; with --tune lora, needs bitsandbytes"
    )

    image_size: str = flag(
        AUTO,
        "model",
        "longest edge of images in pixels (default: auto: what the training images need, "
        "at least half of the published size)",
        metavar="N",
    )
    image_splitting: bool = flag(
        False, "model", "SmolVLM: cut images into tiles, as published; sharper, but up to 17 times the tokens"
    )
    min_pixels: int | None = flag(
        None, "model", "Qwen2-VL: enlarge smaller images to this many pixels (default: as published, 3136)"
    )
    max_pixels: int | None = flag(
        None,
        "model",
        "Qwen2-VL: shrink larger images to this many pixels; 28 x 28 are a token (default: 200704, 256 tokens)",
    )
    num_crops: int | None = flag(
        None, "model", "Phi-3.5-vision: crops of an image, in addition to the whole image (default: 1)"
    )
