"""The table of models: sizes that are those of the published weights, and the command that prints it.

`PYTHONPATH=. python tests/test_registry.py` writes the tables into docs/models.md.
"""

import copy
import re

import pytest
import torch
from commands import ROOT, run, train

from vlm.common.tables import format_table
from vlm.config import DEFAULT_MODEL, TUNING_DEFAULTS, ImageSize, resolve
from vlm.families import outline
from vlm.machine import registry
from vlm.machine.memory import GIB, Texts, estimate
from vlm.machine.registry import MODELS, count_parameters, model_table

DOCUMENT = ROOT / "docs/models.md"

# What the hub shows for the published weights, where it counts the numbers in the files.
PUBLISHED = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": 256_484_928,
    "HuggingFaceTB/SmolVLM-500M-Instruct": 507_482_304,
    "HuggingFaceTB/SmolVLM-Instruct": 2_246_272_880,
    "Qwen/Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "microsoft/Phi-3.5-vision-instruct": 4_146_621_440,
}


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_command_prints_every_model_with_each_mode_and_needs_no_data(tmp_path, monkeypatch):
    done = run("train_vlm.py", "--list-models", "--device", "cpu", cwd=tmp_path, HF_HUB_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(MODELS)]] == list(MODELS)
    assert all(f"--tune {mode}" in lines[0] for mode in TUNING_DEFAULTS)
    assert "Free now" in done.stdout and "float32" in done.stdout
    assert done.stderr == "" and not list(tmp_path.iterdir())


def test_what_does_not_fit_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(registry, "free_memory", lambda device: 10 * GIB)
    assert train("--list-models", "--device", "cpu") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2 : 2 + len(MODELS)]}
    assert rows["HuggingFaceTB/SmolVLM-256M-Instruct"].count(registry.MARK) == 0
    assert rows["microsoft/Phi-3.5-vision-instruct"].count(registry.MARK) == 3


@pytest.mark.slow
def test_options_of_one_family_and_quantization_change_what_they_are_for(capsys):
    def needs(*flags: str) -> dict[str, list[float]]:
        assert train("--list-models", "--device", "cpu", *flags) == 0
        rows = [
            line.replace(registry.MARK, "").split()
            for line in capsys.readouterr().out.splitlines()[2 : 2 + len(MODELS)]
        ]
        return {row[0]: [float(value) for value in row[3:]] for row in rows}

    plain, split, bits = needs(), needs("--image-splitting"), needs("--load-in-4bit")
    for name in MODELS:
        assert (split[name] > plain[name]) == ("SmolVLM" in name)
        assert bits[name][0] < plain[name][0] and bits[name][1:] == plain[name][1:]


@pytest.mark.slow
def test_smaller_images_need_less_and_a_size_that_a_model_does_not_take_has_no_figures(capsys):
    family = outline(MODELS["HuggingFaceTB/SmolVLM-256M-Instruct"])
    assert family.image_load() == (1024, 64) and family.image_load(image_size=ImageSize(256)) == (256, 16)
    assert outline(MODELS["HuggingFaceTB/SmolVLM-Instruct"]).image_load(image_size=ImageSize(210)) == (225, 25)
    needs = [
        estimate(family, resolve({"tune": "full"} | size), torch.float32, "cpu").activations
        for size in ({}, {"image_size": "256"})
    ]
    assert needs[1] < needs[0]
    small = Texts(edge=100)
    assert estimate(family, resolve({"tune": "full"}), torch.float32, "cpu", small).activations == needs[1], (
        "auto comes to 256 too"
    )

    assert train("--list-models", "--device", "cpu", "--image-size", 256) == 0
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[3:] for line in output.splitlines()[2 : 2 + len(MODELS)]}
    assert rows["HuggingFaceTB/SmolVLM-Instruct"] == rows["microsoft/Phi-3.5-vision-instruct"] == ["-"] * 3
    assert "-" not in rows["HuggingFaceTB/SmolVLM-256M-Instruct"] and "does not take --image-size 256" in output


# docs/models.md

ENOUGH = 2**60  # bytes: nothing is marked


def parts_table() -> str:
    counts = {name: count_parameters(outline(config)) for name, config in MODELS.items()}
    rows = [
        [name, *(f"{count:,}" for count in parts.values()), f"{sum(parts.values()):,}"]
        for name, parts in counts.items()
    ]
    return format_table(rows, ["model", *next(iter(counts.values())), "all"])


def need_table() -> str:
    family, rows = outline(MODELS[DEFAULT_MODEL]), []
    for mode in TUNING_DEFAULTS:
        need = estimate(family, resolve({"tune": mode}), torch.float32, "cpu")
        rows.append([f"--tune {mode}", *(f"{value / GIB:.2f}" for value in (*vars(need).values(), need.total))])
    return format_table(rows, ["", *vars(need), "needed"])


TABLES = {
    "parts": parts_table,
    "cpu": lambda: model_table(resolve({}), torch.float32, "cpu", ENOUGH),
    "cuda": lambda: model_table(resolve({}), torch.bfloat16, "cuda", ENOUGH),
    "need": need_table,
}


def block(name: str) -> re.Pattern:
    return re.compile(rf"(<!-- {name} -->\n```text\n).*?(```\n)", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_the_tables_in_the_documentation_are_what_is_computed(name):
    found = block(name).search(DOCUMENT.read_text(encoding="utf-8"))
    assert found and found[0] == f"{found[1]}{TABLES[name]()}\n{found[2]}", (
        "renew it with: PYTHONPATH=. python tests/test_registry.py"
    )


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = block(name).sub(lambda found, table=table: f"{found[1]}{table()}\n{found[2]}", text)
    DOCUMENT.write_text(text, encoding="utf-8")
