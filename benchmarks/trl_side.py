"""The other side of two benchmarks: TRL's SFTTrainer on the same model, pictures, responses and trained parameters.

Set up as its documentation says for vision-language models (conversational prompt and completion with images, loss on the completion), then
tuned for this machine: float32, no gradient checkpointing, SDPA, fused AdamW, one tile a picture, the faster PIL picture processing, no
truncation, nothing logged.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import SFTConfig, SFTTrainer
from workload import OurTraining, model_folder, relative_difference, without_dropout

from vlm.data import Split
from vlm.families import load_family
from vlm.prompts import Prompts


class AfterStep(TrainerCallback):
    """Calls a function after each of TRL's optimizer steps."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.function()


def conversations(split: Split, prompts: Prompts) -> Dataset:
    """The samples of a split as TRL's documentation lays out vision data."""
    samples = [split[i] for i in range(len(split))]
    message = [{"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}]
    features = Features({"prompt": List(message[0]), "completion": List(message[0]), "images": List(Image())})
    answers = [prompts.responses[sample.label] for sample in samples]
    columns = {
        "prompt": [prompts.messages() for _ in samples],
        "completion": [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in answers],
        "images": [[sample.image] for sample in samples],
    }
    return Dataset.from_dict(columns, features=features)


def build_trainer(
    options: argparse.Namespace, ours_settings: Any, split: Split, prompts: Prompts, steps: int, after_step: Callable[[], None]
) -> SFTTrainer:
    """A trainer for so many steps of the same work. `ours_settings`: the settings of the program's own run."""
    folder, s = model_folder(options), ours_settings
    os.environ["WANDB_MODE"] = "disabled"
    family = load_family(folder, torch.float32, torch.device("cpu"), {})  # its processor: one tile, PIL
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    lora = None
    if s.tune == "lora":
        lora = LoraConfig(
            r=s.lora_rank, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout, bias="none",
            target_modules=family.linear_layers(language=True), modules_to_save=["connector"],
        )  # fmt: skip
    elif s.tune == "connector":
        model.requires_grad_(False)
        model.model.connector.requires_grad_(True)
    config = SFTConfig(
        output_dir=str(Path(s.output_dir).with_name("trl_output")), max_steps=steps, per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=1, bf16=False, fp16=False, gradient_checkpointing=False, use_cpu=True, max_length=None,
        optim="adamw_torch_fused", learning_rate=s.learning_rate, weight_decay=s.weight_decay, max_grad_norm=s.max_grad_norm,
        logging_strategy="no", save_strategy="no", report_to="none", dataloader_pin_memory=False, disable_tqdm=True, seed=s.seed,
    )  # fmt: skip
    processor = family.processor
    del family
    return SFTTrainer(
        model=model, args=config, train_dataset=conversations(split, prompts), processing_class=processor, peft_config=lora,
        callbacks=[AfterStep(after_step)],
    )  # fmt: skip


def plain_name(name: str) -> str:
    """The name of a parameter without what PEFT adds."""
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def trained(trainer: SFTTrainer) -> dict[str, torch.nn.Parameter]:
    return {plain_name(name): p for name, p in trainer.model.named_parameters() if p.requires_grad}


def copy_weights(trainer: SFTTrainer, ours: OurTraining) -> None:
    """Give TRL's model the trained parameters of ours: LoRA starts at random."""
    source = dict(ours.classifier.model.named_parameters())
    with torch.no_grad():
        for name, parameter in trained(trainer).items():
            parameter.copy_(source[name])


def compare(trainer: SFTTrainer, ours: OurTraining) -> dict[str, float]:
    """Loss and gradients of one batch on both sides, without dropout: how far they are apart, relative."""
    copy_weights(trainer, ours)
    indices, our_loss, our_gradients = ours.examine()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in indices])
    trainer.model.train()
    with without_dropout(trainer.model):
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    gradients: dict[str, Tensor] = {name: p.grad for name, p in trained(trainer).items() if p.grad is not None}
    difference = relative_difference(gradients, our_gradients)
    trainer.model.zero_grad(set_to_none=True)
    return {"loss": abs(loss.item() - our_loss) / our_loss, "gradients": difference}
