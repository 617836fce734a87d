"""Phi-3.5-vision for transformers, which does not know it: CLIP ViT-L/14-336, a projector and Phi-3, under the
published names.

T = tiles of 336 x 336 pixels, N = image tokens, W = width of the vision encoder, D = width of the language model.
"""

import math

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

# openai/clip-vit-large-patch14-336. The published config.json names the encoder and says its width, nothing else.
CLIP_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
LAYOUT = {
    "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp", "use_hd_transform": True,
    "with_learnable_separator": True,
}  # fmt: skip
NEWLINE, SEPARATOR = -1, -2  # where the two learned tokens stand in the table of image tokens: at its end


class Phi3VConfig(Phi3Config):
    """The published config.json: Phi-3's, with the vision encoder and the layout of the image tokens."""

    model_type = "phi3_v"
    img_processor: dict | None = None
    embd_layer: dict | None = None

    def __post_init__(self, **others):
        others.pop("_attn_implementation", None)  # the published one is FlashAttention, whatever the caller asks for
        rope = others.get("rope_scaling")
        if rope and "factor" not in rope:  # else transformers warns, and computes the same
            others["rope_scaling"] = rope | {
                "factor": self.max_position_embeddings / self.original_max_position_embeddings
            }
        super().__post_init__(**others)

    def clip(self) -> CLIPVisionConfig:
        """The vision encoder. `clip_config` in `img_processor` is not published: small models for tests say their sizes
        there."""
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
                f"this model lays out its images in another way ({', '.join(other)}): only Phi-3.5-vision's is known."
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
    def encoder(self) -> nn.Module:
        """Older versions of transformers have the encoder one level deeper."""
        return getattr(self.img_processor, "vision_model", self.img_processor)

    def patches(self, pixels: Tensor) -> Tensor:
        """(T, 3, 336, 336) -> (T, patches, W), from the last layer but one: the last one is not even run."""
        encoder = self.encoder
        hidden = encoder.pre_layrnorm(encoder.embeddings(pixels))
        for layer in encoder.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]  # without the class token

    def project(self, patches: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """(T, patches, W) of all images -> (N, D), the tokens of one image after the other.

        Args:
            sizes: rows and columns of tiles of each image; its global view comes first, so that it has 1 + rows *
                columns tiles.
        """
        tiles, count, width = patches.shape
        side = math.isqrt(count) // 2
        merged = (
            patches.reshape(tiles, side, 2, side, 2, width).transpose(2, 3).reshape(-1, 4 * width)
        )  # 2 x 2 patches a token
        table = torch.cat([merged, self.glb_GN.view(1, -1), self.sub_GN.view(1, -1)])
        orders, start = [], 0
        for rows, columns in sizes:
            order = token_order(rows, columns, side)
            orders.append(torch.where(order < 0, order, order + start))
            start += (1 + rows * columns) * side**2
        return self.img_projection(table[torch.cat(orders).to(table.device)])


def token_order(rows: int, columns: int, side: int) -> Tensor:
    """(N,) where each token of one image is found: among the tokens of its tiles, `side` x `side` each, or NEWLINE or
    SEPARATOR.

    The tiles lie together as they do in the image and are read line by line, a newline after each; then the separator;
    then the global view, read in the same way.
    """
    tiles = torch.arange((1 + rows * columns) * side**2).view(-1, side, side)
    crops = tiles[1:].view(rows, columns, side, side).transpose(1, 2).reshape(rows * side, columns * side)
    lines = [nn.functional.pad(grid, (0, 1), value=NEWLINE).flatten() for grid in (crops, tiles[0])]
    return torch.cat([lines[0], torch.tensor([SEPARATOR]), lines[1]])


class Phi3VForCausalLM(Phi3ForCausalLM):
    """The weights under their published names. Text goes through `forward`; images are put into `inputs_embeds` by the
    family."""

    config: Phi3VConfig
    config_class = Phi3VConfig
    # The published files hold the embedding of the words a second time, under this name.
    _keys_to_ignore_on_load_unexpected = [r"model\.vision_embed_tokens\.wte\."]

    def __init__(self, config: Phi3VConfig):
        super().__init__(config)
        self.model.vision_embed_tokens = VisionEmbedding(config)
        self.post_init()

    def requires_grad_(self, requires_grad: bool = True) -> "Phi3VForCausalLM":
        """As usual, but what images do not pass through is never trained: several processes would wait for its
        gradients."""
        super().requires_grad_(requires_grad)
        encoder = self.model.vision_embed_tokens.encoder
        for unused in (encoder.encoder.layers[-1], encoder.post_layernorm):
            unused.requires_grad_(False)
        return self


AutoConfig.register(Phi3VConfig.model_type, Phi3VConfig, exist_ok=True)
AutoModelForImageTextToText.register(Phi3VConfig, Phi3VForCausalLM, exist_ok=True)
