"""Every benchmark for one round on a model without any use: it runs, its two sides agree, and it writes what the page is made from."""

import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from vlm.families import load_family

ROOT = Path(__file__).resolve().parent.parent
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc")
WITH_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed (requirements-bench.txt)")


@pytest.fixture
def benchmark(monkeypatch, tmp_path_factory):
    """A function that runs one benchmark in this process and returns what it wrote."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cache = tmp_path_factory.getbasetemp() / "benchmarks"  # one model for all tests
    output = tmp_path_factory.mktemp("figures") / "figures.json"

    def run(name: str, *arguments: str) -> dict:
        monkeypatch.setenv("VLM_CACHE", str(cache))  # the benchmark sets it: this brings back what it was
        monkeypatch.setenv("WANDB_MODE", "disabled")
        command = [f"{name}.py", "--tiny", "--rounds", "1", "--cache", str(cache), "--output", str(output), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        assert importlib.import_module(name).main() == 0
        result = json.loads(output.read_text(encoding="utf-8"))
        assert result["correct"]
        assert result["command"].startswith(f"python benchmarks/{name}.py --tiny")
        assert str(cache) not in result["command"]
        for row in result["rows"]:
            assert next(iter(row.values())) > 0 or name == "growth"
            assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        return result

    return run


@WITH_TRL
@pytest.mark.filterwarnings("ignore")
def test_train_vs_trl(benchmark):
    rows = benchmark("train_vs_trl", "--tune", "lora", "--uncached")["rows"]
    assert [(row["tuning"], row["feature cache"]) for row in rows] == [("lora", "yes"), ("lora", "no")]


def test_train_vs_plain(benchmark):
    rows = benchmark("train_vs_plain", "--tune", "connector", "full")["rows"]
    assert {row["tuning"] for row in rows} == {"connector", "full"}


def test_classify_vs_generate(benchmark):
    rows = benchmark("classify_vs_generate", "--batch-size", "2")["rows"]
    assert {(row["weights"], row["picture"]) for row in rows} >= {("peaked", "native"), ("random", "cached features")}
    peaked, random = (next(row["top probability"] for row in rows if row["weights"] == kind) for kind in ("peaked", "random"))
    assert peaked > random


def test_peak_counts_one_layer_as_by_hand(benchmark):
    layer = benchmark("peak")["one_layer"]
    assert layer["by hand"] == layer["counted"] > 0


def test_levers_change_nothing_but_time(benchmark):
    module = importlib.import_module("levers")
    switched_off = {row["switched off"] for row in benchmark("levers", "--classes", "5")["rows"]}
    assert switched_off == {*module.TRAINING, *module.SCORING}


@ON_LINUX
def test_growth(benchmark):
    rows = benchmark("growth", "--works", "classify, by pictures", "train, by batch")["rows"]
    assert [row["sizes"] for row in rows] == ["2, 4", "1, 2"]


@ON_LINUX
def test_memory(benchmark, monkeypatch):
    """In this process: three more would load torch."""
    module = importlib.import_module("memory_vs_trl")
    monkeypatch.setattr(module, "peak", lambda options, side, tune: module.measure(options, side, tune)["peak"])
    (row,) = benchmark("memory_vs_trl", "--tune", "lora", "--sides", "plain", "ours")["rows"]
    assert row["their MiB"] > 100


def test_startup(benchmark):
    assert len(benchmark("startup")["rows"]) == 5


def test_objectives(benchmark, tmp_path):
    """One small training; its line is made of what it wrote, and a second call finds it done."""
    flags = ["--formats", "answer-only", "--objectives", "posterior", "--seeds", "0", "--folder", str(tmp_path)]
    flags += ["--", "--demo", "--epochs", "1", "--max-samples", "60", "--threads", "1"]
    (row,) = benchmark("objectives", *flags)["rows"]
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert results["settings"]["objective"] == "posterior" and row["accuracy"] == results["test"]["accuracy"]
    written = (folder / "results.json").stat().st_mtime_ns
    assert benchmark("objectives", *flags)["rows"] == [row] and (folder / "results.json").stat().st_mtime_ns == written


class TestParts:
    """What the figures are computed with."""

    @pytest.fixture(autouse=True)
    def path(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def test_ratio_is_of_neighbors_in_time(self):
        import common

        assert common.ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == {"ratio": 3.0, "lowest": 2.0, "highest": 4.0}

    def test_exponent(self):
        import common

        assert common.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0, abs=1e-5)

    def test_sides_take_turns(self):
        import common

        order = []
        common.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
        assert order == ["a", "b", "b", "a", "a", "b"]

    def test_a_wrong_gradient_is_seen(self):
        import workload

        ours = {"x": torch.ones(4), "y": torch.ones(4)}
        assert workload.relative_difference(ours, ours) == 0
        assert workload.relative_difference({"x": torch.ones(4), "y": torch.zeros(4)}, ours) == pytest.approx(0.5**0.5)
        with pytest.raises(ValueError, match="one side"):
            workload.relative_difference({"x": torch.ones(4)}, ours)

    def test_texts_are_as_long_as_said(self, tmp_path):
        import workload

        workload.build(tmp_path, 1, 1, tiny=True)
        family = load_family(tmp_path, torch.float32, torch.device("cpu"), {})
        rendered = family.render(workload.prompts("full", 100))
        assert abs(len(rendered.prefix_ids) - 450) < 15
        assert {len(ids) for ids in rendered.response_ids} == {43}
        assert len(set(workload.class_names(100))) == 100

    def test_tables_stand_between_their_markers(self):
        import report

        machine = {"cpu": "a chip", "cores": 2, "threads": 2, "load": 0.1, "torch": "2", "transformers": "5"}
        result = {"command": "python x.py", "machine": machine, "size": "full", "rounds": 5, "correct": True}
        result["rows"] = [{"ratio": 5.4321, "tuning": "lora", "agrees": True}]
        page = report.fill("before\n<!-- x -->\nold\n<!-- end x -->\nafter\n", {"x": result, "y": result})[0]
        assert page.startswith("before\n<!-- x -->\n| ratio | tuning | agrees |\n| ---: | --- | --- |\n| 5.43 | lora | yes |\n")
        assert page.endswith("<!-- end x -->\nafter\n") and "old" not in page and "`python x.py`" in page
        assert report.fill(page, {"x": result, "y": result}) == (page, {"x"})

    def test_the_page_has_a_place_for_every_benchmark(self):
        names = ["startup", "train_vs_trl", "train_vs_plain", "classify_vs_generate", "peak", "levers", "growth", "memory_vs_trl"]
        names += ["objectives_digits", "objectives_planets"]
        page = (ROOT / "docs/performance.md").read_text(encoding="utf-8") + (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
        assert [name for name in names if f"<!-- {name} -->\n" not in page or f"<!-- end {name} -->" not in page] == []
