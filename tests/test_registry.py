"""The table of models: sizes that are those of the published weights, and the command that prints it."""

import copy

import pytest
import torch
from commands import ROOT, run, train

from vlm import registry
from vlm.config import TUNING_DEFAULTS, resolve
from vlm.families import outline
from vlm.memory import GIB
from vlm.registry import MODELS, count_parameters, model_row

# What the hub shows for the published weights, where it counts the numbers in the files.
PUBLISHED = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": 256_484_928,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 507_482_304,
    "HuggingFaceTB/SmolVLM-Instruct": 2_246_272_880,
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "microsoft/Phi-3.5-vision-instruct": 4_146_621_440,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_to_the_last_one_without_touching_the_table(name):
    before = copy.deepcopy(MODELS[name])
    family = outline(MODELS[name])
    counts = count_parameters(family)
    assert sum(counts.values()) == PUBLISHED[name] == sum(p.numel() for p in family.model.parameters())
    assert all(p.is_meta for p in family.model.parameters()), "nothing may take memory"
    assert min(counts.values()) > 0 and set(counts) == {"vision", "connector", "language", "embeddings"}
    assert MODELS[name] == before


def test_the_parts_of_smolvlm_256m_by_hand():
    d, i, kv, layers, words = 576, 1536, 192, 30, 49280
    vd, vi, vlayers = 768, 3072, 12
    vision_block = 4 * (vd * vd + vd) + 2 * vd * vi + vi + vd + 4 * vd
    assert count_parameters(outline(MODELS["HuggingFaceTB/SmolVLM-256M-Instruct"])) == {
        "vision": vlayers * vision_block + 3 * 16 * 16 * vd + vd + 32 * 32 * vd + 2 * vd,
        "connector": vd * 16 * d,
        "language": layers * (2 * d * d + 2 * d * kv + 3 * d * i + 2 * d) + d,
        "embeddings": 2 * words * d,
    }


def test_the_table_has_the_models_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(MODELS) == set(PUBLISHED)
    for name in MODELS:
        assert f"| `{name}`" in readme


def test_the_command_prints_every_model_with_each_mode_and_needs_no_data(tmp_path, monkeypatch):
    done = run("train_vlm.py", "--list-models", "--device", "cpu", cwd=tmp_path, HF_HUB_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == list(MODELS)
    assert all(f"--tune {mode}" in lines[0] for mode in TUNING_DEFAULTS)
    assert "Free now" in done.stdout and "float32" in done.stdout
    assert done.stderr == "" and not list(tmp_path.iterdir())


def test_what_does_not_fit_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(registry, "free_memory", lambda device: 10 * GIB)
    assert train("--list-models", "--device", "cpu") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:7]}
    assert rows["HuggingFaceTB/SmolVLM-256M-Instruct"].count(registry.MARK) == 0
    assert rows["microsoft/Phi-3.5-vision-instruct"].count(registry.MARK) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_in_the_documentation_is_what_is_computed(dtype):
    """Renew it with the commands in docs/models.md."""
    document = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    settings = resolve({"device": "cpu", "dtype": dtype})
    for name in MODELS:
        cells = [cell.strip() for cell in model_row(name, settings, getattr(torch, dtype), "cpu", 2**60)]
        assert f"| {dtype} | {' | '.join(cells)} |" in document
