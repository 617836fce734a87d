"""A small Phi-3.5-vision in the files that microsoft/Phi-3.5-vision-instruct has on the hub, with random weights."""

import json
from pathlib import Path

import torch
from family_checks import randomize
from huggingface_hub import save_torch_state_dict
from tiny import tiny_prompts
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlm.families.phi3.model import Phi3VConfig, Phi3VForCausalLM

CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}{% endif %}"
)
# Behind <|endoftext|>, in the order of the published vocabulary: 32001 <|assistant|>, 32007 <|end|>, 32010 <|user|>,
# 32044 <|image|>.
ADDED = [
    "<|assistant|>",
    *[f"<|placeholder{i}|>" for i in range(1, 5)],
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
    *[f"<|placeholder{i}|>" for i in range(7, 40)],
    "<|image|>",
]


def save_published(folder: Path, rope_switch: int = 4096, **config) -> Path:
    """Write a model of two layers with random weights as on the hub. `config`: keys of config.json to change."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    save_tokenizer(folder, tokenizer)
    values = (
        published_config(tokenizer.get_vocab_size(), rope_switch)
        | {"pad_token_id": tokenizer.token_to_id("<|endoftext|>")}
        | config
    )
    write(folder / "config.json", values)
    write(
        folder / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000},
    )
    write(
        folder / "preprocessor_config.json",
        {
            "auto_map": {
                "AutoProcessor": "processing_phi3_v.Phi3VProcessor",
                "AutoImageProcessor": "processing_phi3_v.Phi3VImageProcessor",
            },
            "num_crops": 4,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "Phi3VImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "processor_class": "Phi3VProcessor",
            "num_img_tokens": 144,
        },
    )
    torch.manual_seed(0)
    model = Phi3VForCausalLM(Phi3VConfig(**{k: v for k, v in values.items() if k != "_attn_implementation"}))
    randomize(model, scale=0.15)
    save_torch_state_dict(published_names(model), str(folder), max_shard_size=100_000)
    return folder


def published_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they lie in the published files: the vision encoder one level deeper, the words twice."""
    encoder = "model.vision_embed_tokens.img_processor."
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(encoder) and not name.startswith(encoder + "vision_model."):
            name = name.replace(encoder, encoder + "vision_model.")
        state[name] = tensor
    return state | {"model.vision_embed_tokens.wte.weight": state["model.embed_tokens.weight"].clone()}


def write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def published_config(vocabulary: int, rope_switch: int) -> dict:
    """The keys of the published config.json; only sizes differ, and `clip_config`, which says those of the vision
    encoder."""
    return {
        "_name_or_path": "Phi-3.5-vision-instruct",
        "architectures": ["Phi3VForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3_v.Phi3VConfig",
            "AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM",
        },
        "bos_token_id": 1,
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 32,
        "img_processor": {
            "image_dim_out": 16,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
            "clip_config": {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
        },
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 131072,
        "model_type": "phi3_v",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": rope_switch,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1.5, 3.0, 6.0, 30.0], "short_factor": [1.05, 1.1, 1.25, 2.0], "type": "su"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.1",
        "use_cache": True,
        "vocab_size": vocabulary + 19,  # padded, like the published one
        "_attn_implementation": "flash_attention_2",
    }


def build_tokenizer(metaspace: bool = False) -> Tokenizer:
    """SentencePiece BPE with bytes for unknown characters, as `LlamaTokenizerFast` stores it.

    With `metaspace` as newer conversions store it: only the first word of a text gets the mark of a beginning word.
    """
    prompts = tiny_prompts()
    texts = [prompts.system, prompts.question, *prompts.responses]
    corpus = [
        " ".join(text.encode("ascii", "ignore").decode().split()) for text in texts
    ]  # the rest is written in bytes
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(
        corpus * 4, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    pieces += [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if piece != "<unk>"]
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "<|endoftext|>")])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, rstrip=True) for name in ADDED])
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        str(i): {
            "content": token.content,
            "rstrip": token.rstrip,
            "lstrip": False,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
        for i, token in tokenizer.get_added_tokens_decoder().items()
    }
    write(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": described,
            "bos_token": "<s>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "legacy": False,
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        },
    )
    write(
        folder / "special_tokens_map.json",
        {
            name: {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
            for name, token in (
                ("bos_token", "<s>"),
                ("eos_token", "<|endoftext|>"),
                ("pad_token", "<|endoftext|>"),
                ("unk_token", "<unk>"),
            )
        },
    )
