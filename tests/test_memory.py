"""The estimate of memory against real tensors, against a process, and the warning that is made of it; how weights are
loaded."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from weakref import ReferenceType, ref

import hub_layout_phi3_vision
import hub_layout_qwen2_vl
import pytest
import torch
from commands import ROOT, train
from tiny import NAMES, batch_of, save_tiny_model, tiny_classifier, tiny_prompts

from vlm.classifier.classifier import VLMClassifier
from vlm.config import RESPONSE, TUNING_DEFAULTS, resolve
from vlm.families import load_family, outline, read_config
from vlm.families.demo import build_model, build_processor
from vlm.machine import batch_size as sizes
from vlm.machine.batch_size import fit_to_memory, free_memory, largest_batch
from vlm.machine.memory import GIB, LIBRARIES, Need, Texts, estimate
from vlm.training.tuning import parameter_groups, prepare_tuning, trained_parameters

CPU = torch.device("cpu")
TIE = {"smolvlm": save_tiny_model, "tied": lambda folder: save_tiny_model(folder, tie=True)}
BUILDERS = TIE | {"qwen2_vl": hub_layout_qwen2_vl.save_published, "phi3_v": hub_layout_phi3_vision.save_published}
MODES = {tune: {"tune": tune} for tune in TUNING_DEFAULTS} | {"dora": {"tune": "lora", "lora_variant": "dora"}}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    BUILDERS[request.param](folder)
    return folder


def prepared(folder: Path, mode: str, dtype: torch.dtype = torch.float32) -> VLMClassifier:
    family = load_family(folder, dtype, CPU, {})
    prepare_tuning(family, resolve(MODES[mode]))
    return VLMClassifier(family, tiny_prompts())


def train_a_step(classifier: VLMClassifier) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameter_groups(classifier, 0.0, 1e-3, 1e-3))
    with autocast(classifier.model.dtype):
        classifier(batch_of(classifier, [0])).loss.backward()
    optimizer.step()
    return optimizer


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tune", MODES)
def test_weights_gradients_and_optimizer_are_exact_and_frozen_parts_have_none(folder, tune, dtype):
    classifier = prepared(folder, tune, dtype)
    need = estimate(outline(read_config(folder)), resolve(MODES[tune]), dtype, "cpu")
    assert need.weights == size(classifier.parameters())
    optimizer = train_a_step(classifier)
    trained = trained_parameters(classifier.model)
    assert {name for name, p in classifier.model.named_parameters() if p.grad is not None} <= trained.keys()
    assert need.gradients == size(trained.values())
    with_state = {id(p) for p in optimizer.state}
    assert with_state <= {id(p) for p in trained.values()}
    moments = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    missing = sum(
        2 * 4 * p.numel() for p in trained.values() if id(p) not in with_state
    )  # without a gradient in this step
    assert need.optimizer == size(moments) + missing


# Activations


def saved_bytes(folder: Path, tune: str, dtype: torch.dtype) -> tuple[int, VLMClassifier, dict]:
    """Bytes of all tensors that a forward pass keeps for the backward pass, the weights aside."""
    classifier = prepared(folder, tune, dtype).train()
    batch = batch_of(classifier, [0])
    weights = {p.untyped_storage().data_ptr() for p in classifier.parameters()}
    packed: list[ReferenceType[torch.Tensor]] = []  # some belong to a part that no gradient goes through

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(dtype):
        found = classifier(batch)  # keeps what is needed for its gradients alive
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for one in packed if (t := one()) is not None}
    assert found.loss.requires_grad
    return sum(taken for address, taken in kept.items() if address not in weights), classifier, batch


def save_with_layers(folder: Path, vision: int, text: int) -> Path:
    """A SmolVLM of moderate width, with 64 image tokens."""
    folder.mkdir()
    prompts = tiny_prompts()
    processor = build_processor(64, 4, 2, corpus=[prompts.system, prompts.question, *prompts.responses])
    torch.manual_seed(0)
    vision_widths = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    text_widths = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = build_model(
        processor,
        vision_widths | {"num_hidden_layers": vision},
        text_widths | {"num_hidden_layers": text},
        image_size=64,
        patch_size=4,
        scale_factor=2,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tune", MODES)
def test_activations_of_the_layers_are_those_that_autograd_keeps(tmp_path, tune, dtype):
    """Two models that differ in the number of layers: what does not depend on it drops out."""
    measured, computed = [], []
    for layers in (2, 4):
        folder = save_with_layers(tmp_path / str(layers), layers, layers)
        kept, classifier, batch = saved_bytes(folder, tune, dtype)
        measured.append(kept)
        rendered = classifier.rendered
        length = batch.input_ids.shape[1] - classifier.family.image_load()[1]
        texts = Texts(len(rendered.prefix_ids), length, 0)
        family = outline(read_config(folder))
        need = estimate(family, resolve(MODES[tune] | {"objective": RESPONSE}), dtype, "cpu", texts)
        computed.append(need.activations)
    ratio = (computed[1] - computed[0]) / (measured[1] - measured[0])
    print(f"\n{tune}, {dtype}: computed / kept by autograd {ratio:.3f}")
    assert 0.9 < ratio < 1.1


def test_what_makes_a_run_larger_makes_the_estimate_larger():
    family = outline(read_config_of("HuggingFaceTB/SmolVLM-256M-Instruct"))

    def need(device: str = "cpu", dtype: torch.dtype = torch.float32, texts: Texts | None = None, **given) -> Need:
        return estimate(family, resolve(given), dtype, device, texts)

    assert need(tune="connector").training < need(tune="lora").training < need(tune="full").training
    assert need(batch_size=4).activations > 2 * need(batch_size=1).activations
    assert need(lora_rank=64).optimizer == 4 * need(lora_rank=16).optimizer - 3 * need(tune="connector").optimizer
    frozen = need(freeze_connector=True)
    assert (
        frozen.optimizer == need().optimizer - need(tune="connector").optimizer
        and frozen.activations < need().activations
    )
    assert need(image_splitting=True).activations > need().activations
    assert need(texts=Texts(prefix=2000)).activations > need().activations
    assert need(dtype=torch.bfloat16).weights < 0.6 * need().weights
    assert need(load_in_4bit=True).weights < need(load_in_8bit=True).weights < need().weights
    assert need(device="cuda").saving == 0 < need().saving


def read_config_of(name: str) -> dict:
    from vlm.machine.registry import MODELS

    return MODELS[name]


# A process


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc"
)
def test_a_process_takes_about_what_was_estimated_and_loads_its_weights_once(tmp_path):
    """The benchmark on a model of 75M parameters in bfloat16, trained in float32."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from shapes import shape
        from workload import build
    finally:
        sys.path.pop(0)
    build(tmp_path, shape(layers=(2, 1)), torch.bfloat16)
    command = [sys.executable, ROOT / "benchmarks/memory_estimate.py", "--measure", tmp_path, "lora", "float32", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    ratios = {phase: values["measured"] / values["estimated"] for phase, values in figures.items()}
    print({phase: round(ratio, 2) for phase, ratio in ratios.items()})
    assert 0.7 < ratios["training"] < 1.3
    assert 0.7 < ratios["whole run"] < 1.3
    # The weights, and the file that they are read from, whose pages the system may take back at any time. A second copy
    # would be 1 more.
    weights, file = figures["loading"]["estimated"], (tmp_path / "model.safetensors").stat().st_size
    assert weights < figures["loading"]["measured"] < 1.15 * (weights + file)
    assert math.isclose(file, weights / 2, rel_tol=0.01)


# The warning


@pytest.fixture
def warning(folder, capsys) -> Callable[..., str]:
    def warn(**given) -> str:
        fit_to_memory(folder, resolve(given), torch.float32, CPU, Texts.of(tiny_prompts()))
        return capsys.readouterr().err

    return warn


def test_a_warning_names_what_is_needed_what_is_free_and_what_helps(warning, monkeypatch):
    monkeypatch.setattr(sizes, "free_memory", lambda device: GIB // 50)
    text = warning(tune="full", batch_size=64, eval_batch_size=1)
    assert text.startswith("warning: this run needs about 0.") and "0.0 GiB are free on cpu" in text
    for flag in ("--batch-size 1 (", "--tune lora (", "--tune connector (", "--load-in-4bit (", "--list-models"):
        assert flag in text
    assert "--tune lora (" not in warning(tune="lora")
    assert "--load-in-4bit" not in warning(load_in_4bit=True)


def test_no_warning_if_it_fits_or_if_nothing_is_known(warning, tmp_path, capsys):
    assert warning() == ""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    assert fit_to_memory(tmp_path, resolve({}), torch.float32, CPU, Texts.of(tiny_prompts())) == 1
    assert capsys.readouterr().err == ""


# The batch size


@pytest.fixture
def batches(folder) -> Callable[..., tuple[int, int]]:
    """Settings -> batch size and batches of a step."""

    def find(processes: int = 1, least: Callable[[int], int] = lambda found: found, **given) -> tuple[int, int]:
        settings = resolve(given)
        found = fit_to_memory(folder, settings, torch.float32, CPU, Texts.of(tiny_prompts()), processes, least)
        settings = settings.complete(found, RESPONSE)
        return settings.batch_size, settings.gradient_accumulation_steps

    return find


def test_a_step_takes_as_many_images_at_once_as_there_is_memory_for(batches, folder, monkeypatch, capsys):
    family, texts, flags = (
        outline(read_config(folder)),
        Texts.of(tiny_prompts()),
        {"tune": "full", "eval_batch_size": 1},
    )
    needs = [
        estimate(family, resolve(flags | {"batch_size": n}), torch.float32, "cpu", texts).total for n in (1, 2, 4, 8)
    ]
    assert needs == sorted(needs) and needs[0] < needs[3]
    monkeypatch.setattr(sizes, "TRAINING_SHARE", 1.0)
    for need in needs:
        monkeypatch.setattr(sizes, "free_memory", lambda device, need=need: need + 1)
        most = max(
            n for n, needed in zip((1, 2, 4, 8), needs, strict=True) if needed <= need
        )  # in so small a model 2 may need what 1 does
        assert batches(**flags) == (most, 8 // most)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sizes, "free_memory", lambda device: needs[0] // 2)
    assert batches(**flags) == (1, 8)
    assert "it may run out of memory" in capsys.readouterr().err
    assert batches(batch_size=4) == (4, 2)


def test_a_step_keeps_the_images_that_were_asked_for(batches):
    assert batches(gradient_accumulation_steps=1) == (8, 1)
    assert batches(gradient_accumulation_steps=3) == (2, 3)
    assert batches(gradient_accumulation_steps=16) == (1, 16)
    assert batches(batch_size=32) == (32, 1)


def test_processes_share_a_cpu_s_memory_and_agree(batches, folder, monkeypatch):
    need = estimate(
        outline(read_config(folder)), resolve({"batch_size": 8}), torch.float32, "cpu", Texts.of(tiny_prompts())
    ).total
    monkeypatch.setattr(sizes, "free_memory", lambda device: 1.9 * need)
    assert batches() == (8, 1)
    assert batches(processes=2)[0] < 8  # 0.95 of what it takes for each, of which a share is left alone
    assert batches(least=lambda found: min(found, 4)) == (4, 2)
    assert batches(batch_size=8, least=lambda found: 4) == (8, 1)


@pytest.mark.slow
def test_a_run_goes_on_after_the_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sizes, "free_memory", lambda device: 0)
    assert train("--demo", "--max-samples", 40, "--epochs", 1, "--output-dir", tmp_path / "out") == 0
    error = capsys.readouterr().err
    assert error.count("warning: this run needs about") == 1
    assert error.index("warning: this run needs") < error.index("One sample as the model sees it")


def test_free_memory_is_that_of_the_device(monkeypatch):
    assert 0 < free_memory(CPU) < 2**50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 400))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    assert free_memory(torch.device("cuda")) == 23, "what torch keeps for later is free"


def test_the_batch_of_an_inference_is_as_large_as_half_of_the_free_memory(tmp_path, monkeypatch):
    classifier = tiny_classifier(save_tiny_model(tmp_path))
    found = []
    for free in (2**50, 2 * 2**30, 0):
        monkeypatch.setattr(sizes, "free_memory", lambda device, free=free: free)
        found.append(largest_batch(classifier, resolve({})))
    assert found[0] == sizes.BATCH_ON_CPU and found[2] == 1 and found == sorted(found, reverse=True)
    plain = tiny_classifier(tmp_path)
    plain.family.shares_prefix = False
    texts = Texts(prefix=2000, question=20, response=4, classes=1)
    needs = [estimate(one.family, resolve({}), torch.float32, "cpu", texts).evaluation for one in (classifier, plain)]
    assert needs[1] > needs[0], "a plain forward pass has logits of whole rows"


def test_texts_are_estimated_from_the_prompts():
    texts = Texts.of(tiny_prompts(tuple(NAMES)))
    assert texts.classes == len(NAMES) and 30 < texts.prefix < 200 and 20 < texts.response < 80
    assert 300 < Texts.of(tiny_prompts(tuple(NAMES)), ["short", "long " * 200]).response < 400


def test_the_objective_counts_the_nodes_of_the_tree(folder):
    family, texts = outline(read_config(folder)), Texts(classes=100, response=40)
    needs = {
        name: estimate(family, resolve({"objective": name}), torch.float32, "cpu", texts).activations
        for name in ("response", "posterior", "both")
    }
    assert needs["response"] < needs["both"] < needs["posterior"]


def test_the_plain_forward_keeps_whole_rows_for_each_class(folder):
    family, texts = outline(read_config(folder)), Texts(classes=100, response=40)

    def needed(objective: str | None) -> float:
        settings = resolve({} if objective is None else {"objective": objective})
        return estimate(family, settings, torch.float32, "cpu", texts).activations - LIBRARIES

    shared = needed("both")
    family.shares_prefix = False
    plain = needed("response")
    assert needed(None) == pytest.approx(2 * plain, rel=0.01), (
        "the usual objective: the response's row and one for all classes"
    )
    assert needed("both") == pytest.approx(101 * plain, rel=0.01) and needed("both") > shared
    assert needed("posterior") == pytest.approx(100 * plain, rel=0.01)
