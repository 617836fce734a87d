"""The other side of the benchmarks against TRL: its SFTTrainer on the same model, images, responses and trained
parameters.

Set up as its documentation says for vision-language models (conversational prompt and completion with images, loss on
the completion), then tuned for the machine: no gradient checkpointing, SDPA, fused AdamW, one tile an image, the faster
PIL image processing, no truncation, nothing logged. On the CPU float32; on a GPU `bf16=True`, pinned memory, and as
many loader processes as ours has.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import workload
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import SFTConfig, SFTTrainer

from vlm.classifier import IGNORED
from vlm.config import Settings
from vlm.conversation import Prompts
from vlm.data import Split
from vlm.machine import DTYPES

Examined = tuple[list[int], float, dict[str, Tensor]]  # what `OurTraining.examine` gives


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
    options: argparse.Namespace,
    settings: Settings,
    split: Split,
    prompts: Prompts,
    steps: int,
    after_step: Callable[[], None],
) -> SFTTrainer:
    """A trainer for so many steps of the same work. The settings are those of the program's own run.

    What is trained is float32, as on our side. What is frozen has the number format of ours, too: TRL's own default,
    float32, would take more memory and be cast in each step.
    """
    family = workload.load(options)  # its processor: one tile, PIL
    frozen = torch.float32 if settings.tune == "full" else DTYPES[options.dtype]
    model = AutoModelForImageTextToText.from_pretrained(
        workload.model_folder(options), dtype=frozen, attn_implementation="sdpa"
    )
    lora = None
    if settings.tune == "lora":
        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            bias="none",
            target_modules=family.linear_layers(language=True),
            modules_to_save=["connector"],
        )
    elif settings.tune == "connector":
        model.requires_grad_(False)
        model.model.connector.requires_grad_(True)
    processor = family.processor
    del family
    data = conversations(split, prompts)
    if options.repeats > 1:
        data = data.select(workload.repeated(options, len(data)))
    trainer = SFTTrainer(
        model=model,
        args=_config(options, settings, steps),
        train_dataset=data,
        processing_class=processor,
        peft_config=lora,
        callbacks=[AfterStep(after_step)],
    )
    for parameter in trained(trainer).values():
        parameter.data = parameter.data.float()
    return trainer


def _config(options: argparse.Namespace, s: Settings, steps: int) -> SFTConfig:
    os.environ["WANDB_MODE"] = "disabled"
    on_cpu = options.device == "cpu"
    return SFTConfig(
        output_dir=str(Path(s.output_dir).with_name("trl_output")),
        max_steps=steps,
        per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=s.gradient_accumulation_steps,
        bf16=options.dtype == "bfloat16",
        fp16=False,
        gradient_checkpointing=False,
        use_cpu=on_cpu,
        max_length=None,
        optim="adamw_torch_fused",
        learning_rate=s.learning_rate,
        weight_decay=s.weight_decay,
        max_grad_norm=s.max_grad_norm,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=s.workers or 0,
        disable_tqdm=True,
        seed=s.seed,
    )


def plain_name(name: str) -> str:
    """The name of a parameter without what PEFT adds."""
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def trained(trainer: SFTTrainer) -> dict[str, torch.nn.Parameter]:
    return {plain_name(name): p for name, p in trainer.model.named_parameters() if p.requires_grad}


def copy_weights(trainer: SFTTrainer, ours: workload.OurTraining) -> None:
    """Give TRL's model the trained parameters of ours: LoRA starts at random."""
    source = dict(ours.classifier.model.named_parameters())
    with torch.no_grad():
        for name, parameter in trained(trainer).items():
            parameter.copy_(source[name])


def forward_and_backward(trainer: SFTTrainer, indices: list[int]) -> Tensor:
    """Loss and gradients of one optimizer step without dropout, in batches as a step computes them. Returns the
    loss."""
    size = trainer.args.per_device_train_batch_size
    parts = [indices[start : start + size] for start in range(0, len(indices), size)]
    inputs = [
        trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in part])) for part in parts
    ]
    tokens = sum((part["labels"] != IGNORED).sum() for part in inputs)
    trainer.model.train()
    total = torch.zeros((), device=tokens.device)
    with workload.without_dropout(trainer.model):
        for part in inputs:
            with trainer.accelerator.autocast():  # only `train` puts it around the model's forward
                loss = trainer.compute_loss(trainer.model, part, num_items_in_batch=tokens)
            loss.backward()
            total += loss.detach()
    return total


def compare(trainer: SFTTrainer, ours: workload.OurTraining, examined: Examined | None = None) -> dict[str, float]:
    """Loss and gradients of one optimizer step on both sides, without dropout: how far they are apart, relative.

    Args:
        examined: what `ours.examine()` gave, where it was called already.
    """
    indices, our_loss, our_gradients = examined or ours.examine()
    copy_weights(trainer, ours)
    trainer.model.zero_grad(set_to_none=True)
    loss = forward_and_backward(trainer, indices)
    gradients: dict[str, Tensor] = {name: p.grad for name, p in trained(trainer).items() if p.grad is not None}
    difference = workload.relative_difference(gradients, our_gradients)
    trainer.model.zero_grad(set_to_none=True)
    return {"loss": abs(loss.item() - our_loss) / our_loss, "gradients": difference}
