"""Every benchmark for one round on a model without any use: it runs, its two sides agree, and it writes what the page
is made from."""

import importlib
import importlib.util
import json
import math
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from vlm.families import load_family

ROOT = Path(__file__).resolve().parent.parent
ON_LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc"
)
WITH_TRL = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed (requirements-bench.txt)"
)


def folder_of_all(tmp_path_factory) -> Path:
    """Where all tests keep what is the same for them, such as the model."""
    return tmp_path_factory.getbasetemp() / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path_factory):
    """A function that runs one benchmark in this process and returns what it wrote."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cache = folder_of_all(tmp_path_factory)
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
            first = next(iter(row.values()))
            assert isinstance(first, str) or first > 0 or name == "growth"
            assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        return result

    return run


@pytest.fixture
def options(monkeypatch, tmp_path_factory):
    """The options of a benchmark of the smallest model, for its parts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("VLM_CACHE", "")  # brings back what it was
    monkeypatch.setenv("WANDB_MODE", "disabled")
    common = importlib.import_module("common")
    return common.start(
        common.parser("").parse_args(["--tiny", "--rounds", "1", "--cache", str(folder_of_all(tmp_path_factory))])
    )


@pytest.mark.slow
@WITH_TRL
@pytest.mark.filterwarnings("ignore")
def test_train_vs_trl(benchmark):
    rows = benchmark("train_vs_trl", "--tune", "lora", "--uncached")["rows"]
    assert [(row["tuning"], row["feature cache"]) for row in rows] == [("lora", "yes"), ("lora", "no")]


@pytest.mark.slow
@WITH_TRL
@pytest.mark.filterwarnings("ignore")
def test_train_on_gpu(benchmark):
    """On the CPU, as if its peak were 1 TFLOP/s."""
    rows = benchmark("train_on_gpu", "--batch-sizes", "2", "--steps", "2", "--peak-tflops", "1")["rows"]
    assert [row["model"] for row in rows] == ["256M", "2.2B"]
    for row in rows:
        assert row["agrees"] is True and row["TRL TFLOP"] > row["ours TFLOP"]
        assert row["ours MFU"] == pytest.approx(row["ours TFLOP"] / row["ours s"])
        assert row["TRL MFU"] == pytest.approx(row["TRL TFLOP"] / row["TRL s"])
        assert row["ours plain MFU"] == pytest.approx(row["TRL MFU"] * row["ratio"])  # one round
        assert row["ours images/s"] == pytest.approx(2 / row["ours s"])


@pytest.mark.slow
@WITH_TRL
@pytest.mark.filterwarnings("ignore")
def test_both_sides_agree_in_the_number_format_of_the_gpu(options):
    AcceleratorState._reset_state(reset_partial_state=True)  # it knows one number format in a process
    try:
        options.dtype, options.tune, options.steps, options.peak_tflops = "bfloat16", "lora", 1, 1.0
        row = importlib.import_module("train_on_gpu").measure(options, "256M", 2)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert row["agrees"] is True and float(row["gradients differ"]) > 0


@pytest.mark.slow
@WITH_TRL
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("side", "other"), [("ours", "TRL"), ("TRL", "ours")])
def test_a_side_that_runs_out_of_memory_leaves_a_row(benchmark, monkeypatch, side, other):
    """In the middle: ours in its first turn, TRL's as its loop begins. There the operations of one image and of two are
    counted."""
    trl_side, workload = importlib.import_module("trl_side"), importlib.import_module("workload")
    step, calls, operations = workload.OurTraining.step, [], []

    def our_step(ours) -> list[int]:
        calls.append(1)
        if len(calls) > 2:  # one to count, one to compare
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(ours)

    def train(trainer) -> None:
        count = importlib.import_module("peak").count
        operations.extend(count(partial(trl_side.forward_and_backward, trainer, rows)) for rows in ([0], [0, 1]))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(
        *((workload.OurTraining, "step", our_step) if side == "ours" else (trl_side.SFTTrainer, "train", train))
    )
    (row,) = benchmark("train_on_gpu", "--models", "256M", "--batch-sizes", "2", "--steps", "1")["rows"]
    assert row["ratio"] == f"{side}: out of memory" and row[f"{side} s"] == row[f"{side} MFU"] == "out of memory"
    assert row[f"{other} s"] > 0 and row[f"{other} MFU"] > 0
    assert row["agrees"] is True  # they were compared before
    if side == "TRL":
        assert operations[1] == 2 * operations[0]


@pytest.mark.slow
@ON_LINUX
def test_big_job(benchmark, demo_run):
    rows = benchmark("big_job", "--model-dir", str(demo_run / "best_model"))["rows"]
    assert [(row["side"], row["images"]) for row in rows] == [
        ("loop over predict_single_image", 12),
        ("1 process", 12),
        ("2 processes", 12),
        ("1 process", 24),
        ("2 processes", 24),
    ]


def test_train_on_gpu_needs_one(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["train_on_gpu.py"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("train_on_gpu").main()
    assert end.value.code == 2 and "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_train_vs_plain(benchmark):
    rows = benchmark("train_vs_plain", "--tune", "connector", "full")["rows"]
    assert {row["tuning"] for row in rows} == {"connector", "full"}


@pytest.mark.slow
@WITH_TRL
def test_train_vs_trl_in_several_batches_of_a_step(benchmark):
    (row,) = benchmark("train_vs_trl", "--tune", "full", "--accumulation", "3")["rows"]
    assert row["batch"] == 6 and row["agrees"]


@pytest.mark.slow
def test_many_classes(benchmark):
    rows = benchmark("many_classes", "--batch-size", "2")["rows"]
    assert [(row["classes"], row["weights"]) for row in rows] == [
        (classes, weights) for weights in ("peaked", "random") for classes in (5, 20)
    ]
    assert all(row["training images/s"] > 0 for row in rows)


def test_classify_vs_generate(benchmark):
    rows = benchmark("classify_vs_generate", "--batch-size", "2")["rows"]
    assert {(row["weights"], row["image"]) for row in rows} >= {("peaked", "native"), ("random", "cached features")}
    peaked, random = (
        next(row["top probability"] for row in rows if row["weights"] == kind) for kind in ("peaked", "random")
    )
    assert peaked > random


@pytest.mark.slow
def test_peak_counts_one_layer_as_by_hand(benchmark):
    layer = benchmark("peak")["one_layer"]
    assert layer["by hand"] == layer["counted"] > 0


@pytest.mark.slow
def test_levers_change_nothing_but_time(benchmark):
    module = importlib.import_module("levers")
    switched_off = {row["switched off"] for row in benchmark("levers", "--classes", "5")["rows"]}
    assert switched_off == {*module.TRAINING, *module.SCORING}


def test_an_optimizer_that_computes_something_else_is_seen(options, monkeypatch):
    levers, workload = importlib.import_module("levers"), importlib.import_module("workload")
    ours = workload.OurTraining(options, "lora", 2, cached=True, lora_dropout=0.0, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in ours.classifier.named_parameters()}
    assert levers.update_difference(ours) < levers.TOLERANCE
    assert (
        all(torch.equal(p, before[name]) for name, p in ours.classifier.named_parameters())
        and not ours.run.optimizer.state
    )

    @contextmanager
    def decaying(ours):
        for group in ours.run.optimizer.param_groups:
            group["weight_decay"] = 0.5
        yield
        for group in ours.run.optimizer.param_groups:
            group["weight_decay"] = 0.0

    monkeypatch.setattr(levers, "without_fused_optimizer", decaying)
    assert levers.update_difference(ours) > levers.TOLERANCE


@pytest.mark.slow
@ON_LINUX
def test_first_step(benchmark):
    rows = benchmark("first_step")["rows"]
    assert [row["rows"] for row in rows] == [100, 6000] and all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
@ON_LINUX
def test_growth(benchmark):
    rows = benchmark("growth", "--works", "classify, by images", "train, by batch")["rows"]
    assert [row["sizes"] for row in rows] == ["2, 4", "1, 2"]


@ON_LINUX
def test_memory(benchmark, monkeypatch):
    """In this process: three more would load torch."""
    module = importlib.import_module("memory_vs_trl")
    monkeypatch.setattr(module, "peak", lambda options, side, tune: module.measure(options, side, tune)["peak"])
    (row,) = benchmark("memory_vs_trl", "--tune", "lora", "--sides", "plain", "ours")["rows"]
    assert row["their MiB"] > 100


def test_saving(benchmark):
    rows = benchmark("saving")["rows"]
    assert [row["step"].split(",")[0] for row in rows] == ["write", "read"]


def test_shards(benchmark):
    assert [row["step"].split()[0] for row in benchmark("shards")["rows"]] == ["look", "read"] * 3


@pytest.mark.slow
@ON_LINUX
@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed")
def test_serve(benchmark):
    (row,) = benchmark("serve")["rows"]
    assert row["requests"] == 20 and float(row["confidence differs"]) < 1e-4


@pytest.mark.slow
def test_other_programs(benchmark, tmp_path):
    """In this Python: the script of another environment reads the folders, and what it writes is compared."""
    (row,) = benchmark("other_programs", "--only", "transformers5", "--here", "--folder", str(tmp_path))["rows"]
    assert row["SmolVLM"] == "loads, the same text"
    assert row["Phi-3.5-vision"] == "asks for the published code"
    assert str(tmp_path) not in str(row)


def test_cache_dtypes(benchmark, demo_run):
    """The model was trained a little, and float16 changes little."""
    arguments = (str(demo_run / "best_model"), "--images", str(demo_run / "demo_images"))
    rows = {row["format"]: row for row in benchmark("cache_dtypes", *arguments)["rows"]}
    assert rows["float32"]["kB an image"] > rows["float16"]["kB an image"] > 0
    assert rows["float32"]["largest change of a probability"] == 0
    assert 0 < rows["float16"]["largest change of a probability"] < 0.01


@pytest.mark.slow
def test_startup(benchmark):
    assert len(benchmark("startup")["rows"]) == 5


@pytest.mark.slow
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


@pytest.mark.slow
def test_compare_flags(benchmark, tmp_path):
    """Two cases of one small training each."""
    cases = ["--case", "--augment none", "--case", "--augment light --augment-flips"]
    flags = ["--", "--demo", "--epochs", "1", "--max-samples", "60", "--threads", "1"]
    found = benchmark("compare_flags", *cases, "--seeds", "0", "--folder", str(tmp_path), *flags)["rows"]
    assert [row["flags"] for row in found] == ["--augment none", "--augment light --augment-flips"]
    settings = [json.loads((folder / "results.json").read_text())["settings"] for folder in tmp_path.iterdir()]
    assert sorted((of["augment"], of["augment_flips"], of["epochs"]) for of in settings) == [
        ("light", True, 1),
        ("none", False, 1),
    ]


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
        import shapes
        import workload

        workload.build(tmp_path, shapes.shape(size="tiny", layers=(1, 1)))
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
        assert page.startswith(
            "before\n<!-- x -->\n| ratio | tuning | agrees |\n| ---: | --- | --- |\n| 5.43 | lora | yes |\n"
        )
        assert page.endswith("<!-- end x -->\nafter\n") and "old" not in page and "`python x.py`" in page
        assert report.fill(page, {"x": result, "y": result}) == (page, {"x"})

    def test_means_over_seeds_are_called_so(self):
        import report

        machine = {"cpu": "a chip", "cores": 2, "threads": 2, "load": 0.1, "torch": "2", "transformers": "5"}
        result = {"command": "python x.py", "machine": machine, "size": "full", "rounds": 1, "correct": True}
        seeds = report.section(result | {"rows": [{"accuracy": 0.9, "seeds": 3}]})
        assert "\nmeans over seeds; a chip, 2 cores" in seeds and "true shape" not in seeds
        rounds = report.section(result | {"rows": [{"ratio": 2.0}], "machine": machine | {"gpu": "a GPU"}})
        assert "\nthe true shape; medians of 1 round; a GPU, a chip, 2 cores" in rounds

    def test_runs_with_other_flags_have_other_folders(self):
        import runs

        rest = ["--dataset", "images/" * 30, "--seed", "1"]
        names = {runs.folder_name(["--model", model, *rest]) for model in ("a", "b")}
        assert len(names) == 2 and all("_seed_1_" in name and len(name) < 120 for name in names)

    def test_lora_alone_leaves_the_connector_frozen(self):
        import objectives

        case = {"tuning": "lora-alone", "format": "answer-only", "objective": "both"}
        assert objectives.as_flags(case)[:3] == ["--tune", "lora", "--freeze-connector"]
        assert objectives.as_flags({"format": "answer-only", "objective": "both"})[:2] == [
            "--response-format",
            "answer-only",
        ]

    def test_products_with_a_number_format_of_their_own_are_counted(self):
        """TRL's head on a GPU asks for float32; torch's own rule fails on that. Shapes alone: a CPU cannot compute
        it."""
        import peak

        left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((4, 5), (5, 6)))
        total = torch.empty(4, 6, device="meta")
        assert peak.count(lambda: torch.addmm(total, left, right, out_dtype=torch.float32, out=total)) == 2 * 4 * 5 * 6

    def test_memory_of_the_other_side_is_not_counted(self, options, monkeypatch):
        """Ours keeps 100 bytes, TRL's 30, and the most in a turn is 500."""
        import train_on_gpu

        options.device, options.steps = "cuda", 1
        case = train_on_gpu.Case(options)
        case.at_rest = 100
        for name, value in {
            "is_initialized": True,
            "memory_allocated": 130,
            "max_memory_allocated": 500,
            "reset_peak_memory_stats": None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
        case.look("ours")
        case.look("TRL")
        assert case.peaks == {"ours": 470, "TRL": 400}

    def test_shapes(self):
        import shapes

        large, sixth, tiny = (shapes.shape("2.2B", size) for size in ("full", "quick", "tiny"))
        assert (large.text["num_hidden_layers"], large.vision["num_hidden_layers"]) == (24, 27)
        assert (large.text["hidden_size"], large.image, large.patch, large.scale) == (2048, 384, 14, 3)
        assert (sixth.text["num_hidden_layers"], sixth.vision["num_hidden_layers"]) == (4, 4)
        assert sixth.text["hidden_size"] == 2048 and (tiny.image, tiny.patch, tiny.scale) == (42, 14, 3)

    def test_answers_of_other_programs_become_cells(self):
        import other_programs

        assert other_programs.verdict({"text": "a b", "how": "converts"}, "a b") == "converts, the same text"
        other = other_programs.verdict({"text": "a c"}, "a b")
        assert other == "loads, the first 2 of 3 characters are the same"
        assert other_programs.verdict({"error": "x | y"}, "a b") == "x / y"  # one cell of a table
        assert other_programs.verdict(None, "a b") == "not tried"

    def test_a_program_that_fails_leaves_its_last_words(self, tmp_path):
        import other_programs

        command = [sys.executable, "-c", "print('first'); raise SystemExit('no such model')"]
        with pytest.raises(other_programs.Failed, match=r"^no such model \(exit code 1\)$"):
            other_programs.call(command, tmp_path / "log")

    def test_errors_of_other_programs_name_no_folders_and_are_short(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks/outside"))
        sides = importlib.import_module("sides")
        assert sides.said(OSError("no file /home/me/models/x.json\n  here")) == "OSError: no file .../x.json here"
        assert len(sides.said(ValueError("long " * 200))) < 250

    def test_a_result_without_medians_says_what_its_rows_are(self):
        import report

        machine = {"cpu": "a chip", "cores": 2, "threads": 2, "load": 0.1, "torch": "2", "transformers": "5"}
        result = {"command": "python x.py", "machine": machine, "size": "full", "rounds": 1, "correct": True}
        text = report.section(result | {"about": "40 tokens", "rows": [{"program": "a"}]})
        assert "\n40 tokens; a chip" in text and "median" not in text

    def test_the_page_has_a_place_for_every_benchmark(self):
        names = [
            "startup",
            "first_step",
            "train_vs_trl",
            "train_vs_plain",
            "classify_vs_generate",
            "many_classes",
            "peak",
            "levers",
            "growth",
            "memory_vs_trl",
            "saving",
            "shards",
        ]
        names += ["train_on_gpu", "objectives_digits", "objectives_planets", "other_programs"]
        pages = ("performance.md", "objectives.md", "sharing.md")
        page = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in pages)
        assert [name for name in names if f"<!-- {name} -->\n" not in page or f"<!-- end {name} -->" not in page] == []
