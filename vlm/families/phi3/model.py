"""Phi-3.5-vision as a model of transformers, which has none: CLIP ViT-L/14-336, a projector and Phi-3, under the names
of the published weights.

T = tiles of 336 x 336 pixels, N = image tokens, W = width of the vision encoder, D = width of the language model.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    Phi3Config,
    Phi3ForCausalLM,
)

from vlm.common import UsageError

# openai/clip-vit-large-patch14-336. The published config.json only names the vision encoder and says its width.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
LAYOUT = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
NEWLINE, SEPARATOR = -1, -2  # where the two learned tokens stand in the table of image tokens: at its end


class Phi3VConfig(Phi3Config):
    """The published config.json: Phi-3's, with the vision encoder and the layout of the image tokens."""

    model_type = "phi3_v"
    img_processor: dict | None = None
    embd_layer: dict | None = None

    def __post_init__(self, **others):
        # The published config.json asks for FlashAttention, and would override what the caller asks for.
        others.pop("_attn_implementation", None)
        rope = others.get("rope_scaling")
        if rope and "factor" not in rope:  # else transformers warns, and computes the same
            others["rope_scaling"] = rope | {
                "factor": self.max_position_embeddings / self.original_max_position_embeddings
            }
        super().__post_init__(**others)

    def clip(self) -> CLIPVisionConfig:
        """The configuration of the vision encoder. Small models for tests say their sizes in `clip_config`, which no
        published file has."""
        given = self.img_processor or {}
        sizes = CLIP_L_336 | {"hidden_size": given.get("image_dim_out", CLIP_L_336["hidden_size"])}
        return CLIPVisionConfig(**sizes | given.get("clip_config", {}))


class VisionEmbedding(nn.Module):
    """Tiles -> image tokens. The names of its parts are those of the published weights.

    Raises:
        UsageError: the configuration asks for another layout of the image tokens than Phi-3-vision and Phi-3.5-vision
            have.
    """

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        layout = config.embd_layer or LAYOUT
        other = [f"{name} {layout[name]}" for name in LAYOUT if layout.get(name, LAYOUT[name]) != LAYOUT[name]]
        if other:
            raise UsageError(
                f"this model lays out its image tokens in another way ({', '.join(other)}) than Phi-3.5-vision: "
                "choose another model."
            )
        clip = config.clip()
        merged = 4 * clip.hidden_size
        self.img_processor = CLIPVisionModel(clip)
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, merged))
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, merged))

    @property
    def encoder(self) -> Any:
        """The vision encoder, which older versions of transformers have one level deeper."""
        return getattr(self.img_processor, "vision_model", self.img_processor)

    def patches(self, pixels: Tensor) -> Tensor:
        """(T, 3, 336, 336) -> (T, patches, W), from the last layer but one: the last layer is not run."""
        encoder = self.encoder
        hidden = encoder.pre_layrnorm(encoder.embeddings(pixels))
        for layer in encoder.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]  # without the class token

    def project(self, patches: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """(T, patches, W) of all images -> (N, D), the tokens of one image after the other.

        Args:
            sizes: for each image its rows and columns of tiles. Its global view comes first, so it has
                1 + rows * columns tiles.
        """
        tiles, count, width = patches.shape
        side = math.isqrt(count) // 2
        # (T, patches, W) -> (T, side, side, 2, 2, W) -> (T * side * side, 4 W): 2 x 2 patches become one token
        merged = patches.reshape(tiles, side, 2, side, 2, width).transpose(2, 3).reshape(-1, 4 * width)
        # All tokens of tiles, then separator and newline -> the tokens of each image in their order, (N, 4 W)
        table = torch.cat([merged, self.glb_GN.view(1, -1), self.sub_GN.view(1, -1)])
        orders, start = [], 0
        for rows, columns in sizes:
            order = token_order(rows, columns, side)
            orders.append(torch.where(order < 0, order, order + start))
            start += (1 + rows * columns) * side**2
        return self.img_projection(table[torch.cat(orders).to(table.device)])


def token_order(rows: int, columns: int, side: int) -> Tensor:
    """The order of the tokens of one image.

    The tiles are put together as in the image and read line by line, with a newline after each line. Then come the
    separator and the global view, read in the same way.

    Args:
        rows, columns: of tiles. side: tokens of a tile in a line.

    Returns:
        (N,) for each token its index among the tokens of all tiles, or NEWLINE or SEPARATOR.
    """
    tiles = torch.arange((1 + rows * columns) * side**2).view(-1, side, side)
    # (rows * columns, side, side) -> (rows, side, columns, side) -> lines of the whole image
    crops = tiles[1:].view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
    lines = [nn.functional.pad(grid, (0, 1), value=NEWLINE).flatten() for grid in (crops, tiles[0])]
    return torch.cat([lines[0], torch.tensor([SEPARATOR]), lines[1]])


class Phi3VForCausalLM(Phi3ForCausalLM):
    """The weights under their published names. `forward` reads text; the family puts images into `inputs_embeds`."""

    config: Phi3VConfig
    config_class = Phi3VConfig
    # The published files contain the word embeddings a second time, under this name.
    _keys_to_ignore_on_load_unexpected = [r"model\.vision_embed_tokens\.wte\."]

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model.vision_embed_tokens = VisionEmbedding(config)
        self.post_init()

    def requires_grad_(self, requires_grad: bool = True) -> "Phi3VForCausalLM":
        """As usual, except that layers which images do not pass through are never trained: several processes would wait
        for their gradients."""
        super().requires_grad_(requires_grad)
        encoder = self.model.vision_embed_tokens.encoder
        for unused in (encoder.encoder.layers[-1], encoder.post_layernorm):
            unused.requires_grad_(False)
        return self


AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig, exist_ok=True)
AutoModelForImageTextToText.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
