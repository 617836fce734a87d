"""`train` from Python: keyword arguments are flags, errors are exceptions, and the result shows itself."""

import inspect
import io
import json
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from test_stopping import send_after
from tiny import random_image

from inference_vlm import BatchPredictor, evaluate, load_model_and_metadata, predict_single_image
from train_vlm import Result, train, train_on
from vlm.common import RunError, Stopped, UsageError
from vlm.config import Settings, from_keywords, parse_arguments, resolve
from vlm.config.rules import RENAMED
from vlm.conversation import build_prompts

FLAGS = {"demo": True, "max_samples": 20, "batch_size": 2, "eval_batch_size": 20, "device": "cpu"}


def shown(error):
    """What a notebook shows of an error."""
    return "\n".join(error._render_traceback_())


# Keyword arguments


def test_keywords_are_the_flags_and_notebooks_can_complete_them():
    names = {RENAMED.get(item.name, item.name) for item in fields(Settings)}
    signature = inspect.signature(train)
    assert set(signature.parameters) == names and list(signature.parameters)[0] == "dataset"
    assert signature.parameters["seed"].default == 42 and signature.parameters["batch_size"].default is None
    assert "batch_size=4 is --batch-size 4" in inspect.getdoc(train)


def test_values_are_those_of_the_command_line():
    given = {
        "model": Path("~/m"),
        "epochs": np.int64(3),
        "learning_rate": np.float32(0.5),
        "image_size": 64,
        "zero_shot": True,
        "class_names": "cat dog",
        "metrics": "own.py:metric",
        "track": ("wandb", "mlflow"),
        "tune": "full",
        "seed": None,
    }
    words = "--model ~/m --epochs 3 --learning-rate 0.5 --image-size 64 --zero-shot --tune full --metrics own.py:metric"
    flags = parse_arguments([*words.split(), "--class-names", "cat dog", "--track", "wandb", "mlflow"])
    assert from_keywords("train", given) == flags
    assert from_keywords("train", {"class_names": ["a b", "c"]}) == {"class_names": ["a b", "c"]}
    assert resolve(
        from_keywords("train", {name: getattr(Settings, name, None) for name in flags} | {"zero_shot": False})
    )


def test_the_files_about_classes_may_be_dicts():
    names = {"n01": "a hen " * 50, "n02": "two"}
    given = {"class_map": names, "class_descriptions": {"n02": "It is a pair."}}
    prompts = build_prompts(resolve(from_keywords("train", {"model": "m", "dataset": "d"} | given)), ["n01", "n02"])
    assert prompts.readable_names == (names["n01"].strip(), "two") and "It is a pair." in prompts.system
    wrong = resolve(from_keywords("train", {"model": "m", "dataset": "d", "class_map": names | {"n03": "three"}}))
    with pytest.raises(UsageError, match=r'^--class-map {"n01": "a hen .+….+ names n03, which is no class\.') as caught:
        build_prompts(wrong, ["n01", "n02"])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "given, message",
    [
        ({"epochs": 1.5}, "epochs=1.5: expected a whole number."),
        ({"epochs": "many"}, "epochs='many': expected a whole number."),
        ({"epochs": True}, "epochs=True: expected a whole number."),
        ({"learning_rate": [1]}, r"learning_rate=\[1\]: expected a number."),
        ({"model": {"a": 1}}, "model={'a': 1}: expected a text."),
        ({"demo": "yes"}, "demo='yes': expected True or False."),
        ({"class_names": 3}, "class_names=3: expected a list of texts."),
        ({"tune": "ful"}, "tune='ful': expected one of lora, full, connector. Did you mean full?"),
    ],
)
def test_a_value_that_no_flag_has_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        train(**given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"device": "gpu"}, "device='gpu': expected one of auto, cpu, cuda, mps"),
        ({"device": "cuda:0"}, "device='cuda:0': "),
        ({"dtype": "float64"}, "dtype='float64': expected one of"),
        ({"abstain_below": 5}, "abstain_below=5: expected a probability, 0 to 1"),
        ({"abstain_below": float("nan")}, "abstain_below=nan: "),
        ({"abstain_below": "much"}, "abstain_below='much': expected a number"),
        ({"batch_size": -1}, "batch_size=-1: expected a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size=0: "),
        ({"batch_size": "four"}, "batch_size='four': expected a whole number"),
        ({"split": ["a"]}, r"dataset_split=\['a'\]: expected a text"),
        ({"image_column": [3]}, r"image_column=\[3\]: expected a text"),
        ({"report_dir": ""}, "--report-dir : expected the name of a folder"),
    ],
)
def test_the_functions_of_the_inference_check_their_arguments(demo_run, given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loading = given.keys() <= {"device", "dtype", "abstain_below"}
    of_batches = given.keys() <= set(inspect.signature(BatchPredictor).parameters)
    for function in (
        evaluate,
        *([BatchPredictor] if of_batches else []),
        *([load_model_and_metadata] if loading else []),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            function(demo_run / "best_model", **({"dataset": "."} if function is evaluate else {}), **given)
        assert isinstance(caught.value, ValueError) or "report_dir" in given


def test_a_folder_without_a_name_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match='^--model-dir "": expected the folder of a trained model'):
        load_model_and_metadata("")
    for name in (".", "/", ".."):
        with pytest.raises(UsageError, match="^no training_metadata.json in"):
            load_model_and_metadata(name)


@pytest.mark.parametrize(
    "function, given, near",
    [(train, "epoch", "epochs"), (train_on, "epoch", "epochs"), (evaluate, "label_colum", "label_column")],
)
def test_an_unknown_keyword_names_the_near_one(function, given, near):
    message = rf"^{function.__name__}\(\) has no setting {given}. Did you mean {near}\?"
    with pytest.raises(TypeError, match=message) as caught:
        function(dataset="data", **({"model_dir": "m"} if function is evaluate else {}), **{given: 1})
    assert isinstance(caught.value, UsageError) and len(shown(caught.value).splitlines()) == 1


# Errors


def test_an_error_has_the_words_of_the_command_line_and_says_them_in_python(demo_run):
    with pytest.raises(UsageError) as caught:
        train(demo=True, output_dir=demo_run)
    message, hint = shown(caught.value).splitlines()
    assert message == f"UsageError: {demo_run} holds a finished run: choose another --output-dir, or --overwrite it."
    assert hint == "In Python, flags are keywords: output_dir=..., overwrite=True"
    with pytest.raises(UsageError) as caught:
        train(demo=True, output_dir=demo_run, debug=True)
    assert "Traceback (most recent call last)" in shown(caught.value)


def test_evaluate_takes_the_flags_of_a_dataset_only():
    with pytest.raises(TypeError, match=r"^evaluate\(\) has no setting epochs\. docs"):
        evaluate("m", "data", epochs=3)


def test_a_failed_run_raises_its_error_without_what_was_being_done(monkeypatch, tmp_path):
    def fail(*_, **__):
        error = RunError("the loss is no number.")
        error.add_note("while training")
        raise error

    monkeypatch.setattr("vlm.training.running.set_up", fail)
    with pytest.raises(RunError) as caught:
        train(demo=True, output_dir=tmp_path / "out")
    assert shown(caught.value) == "RunError: the loss is no number."


@pytest.mark.slow
def test_an_interrupt_keeps_the_state_and_says_how_to_go_on(tmp_path, monkeypatch):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    flags = FLAGS | {"epochs": 2, "output_dir": tmp_path / "out"}
    with monkeypatch.context() as patched, pytest.raises(Stopped) as caught:
        send_after(patched, 5, signal.SIGINT)
        train(**flags)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    message, hint = shown(caught.value).splitlines()
    assert message.startswith("Stopped: stopped after step 5 of 20; continue with ")
    assert message.endswith(f"--resume --output-dir {tmp_path / 'out'}")
    assert hint == f"In Python: train(..., resume=True, output_dir={str(tmp_path / 'out')!r})"
    resumed = train(**flags, resume=True)
    unbroken = train(**flags | {"output_dir": tmp_path / "unbroken"})
    files = [result.paths["final_model"] / "model.safetensors" for result in (resumed, unbroken)]
    ended, expected = map(load_file, files)
    assert all(torch.equal(ended[name], expected[name]) for name in expected)


def test_an_interrupt_before_the_first_step_names_nothing_to_resume(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm.training.running.set_up", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(demo=True, output_dir=tmp_path / "out")
    assert not hasattr(caught.value, "__notes__") and not (tmp_path / "out").exists()


# Data and results


@pytest.mark.slow
def test_pairs_are_trained_on_and_the_result_is_that_of_train_on(tmp_path, tiny_model):
    data = [(random_image(i, 20, 14), ("cat", "dog")[i % 2]) for i in range(24)]
    flags = {"model": tiny_model, "device": "cpu", "epochs": 1}
    result = train(data, **flags, output_dir=tmp_path / "one")
    assert result.metrics["samples"] == len(result.results["test"]["per_class"]) * 2 == 4
    results = train_on({"train": data, "test": data[:6]}, **flags, output_dir=tmp_path / "two")
    assert results == json.loads((tmp_path / "two" / "results.json").read_text()) and results["pictures"]["test"] == 6


def test_a_stream_needs_a_name():
    with pytest.raises(UsageError, match="--streaming reads a dataset by its name"):
        train([("a.png", "a")], streaming=True, max_steps=3)


@pytest.fixture(scope="module")
def result(demo_run):
    return Result.read(demo_run)


def test_a_result_has_metrics_paths_history_and_figures(demo_run, result):
    results = json.loads((demo_run / "results.json").read_text())
    assert result.results == results and result.metrics == results["test"]
    assert {"output", "best_model", "final_model", "report", "results", "log", "metadata"} == set(result.paths)
    assert result.paths["report"] == demo_run / "report.html" and all(path.exists() for path in result.paths.values())
    history = result.history
    assert list(history.columns[:3]) == ["kind", "step", "epoch"] and len(history) == len(results["history"])
    (accuracy,) = history[history.kind == "validation"].accuracy
    assert accuracy == results["validation"]["accuracy"]
    assert set(result.figures) == {"training_curves", "confusion_matrix", "reliability"}
    for figure in result.figures.values():
        assert isinstance(figure, Figure) and Image.open(io.BytesIO(figure._repr_png_())).width > 300
    assert repr(result) == f"<Result: accuracy {results['test']['accuracy']:.4f} on 100 images, {demo_run}>"


def test_the_classifier_of_a_result_is_ready_to_predict(demo_run, result):
    path = demo_run / "demo_images" / "digit_3.png"
    single = predict_single_image(result.classifier, result.processor, path, result.metadata)
    (prediction,) = result.predict([path], show_progress=False).values()
    assert single == (prediction["prediction"], prediction["confidence"], prediction["full_response"])
    assert result.classifier is result.classifier


def test_a_result_shows_itself_in_a_notebook_with_all_texts_escaped(result):
    html = result._repr_html_()
    assert re.findall(r'scope="row">([^<]*)<', html)[:2] == ["test accuracy", "macro F1, weighted F1"]
    assert html.count("<img ") == 3 and len(html) < 400_000 and "report.html" in html
    hostile = "<script>alert(1)</script>"
    results = json.loads(json.dumps(result.results).replace('"zero"', json.dumps(hostile)))
    results["test"]["own_metrics"] = {hostile: 1.0}
    assert hostile not in Result(Path(f"/{hostile}"), results)._repr_html_()


def test_an_output_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no finished run"):
        Result.read(tmp_path)
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UsageError, match=r"results\.json is damaged"):
        Result.read(tmp_path)


@pytest.mark.slow
def test_a_cross_validation_has_the_figures_of_all_folds_and_no_best_model(tmp_path):
    flags = FLAGS | {"max_samples": 60, "epochs": 1, "batch_size": 16}
    result = train(**flags, folds=2, output_dir=tmp_path / "out")
    assert result.metrics == result.results["out_of_fold"] and len(result.history) == 2
    assert set(result.figures) == {"confusion_matrix"} and "mean of 2 folds" in result._repr_html_()
    with pytest.raises(UsageError, match=r"Result\.read\('.*fold_1'\)"):
        _ = result.classifier
    assert Result.read(tmp_path / "out" / "fold_1").predict([], show_progress=False) == {}


@pytest.mark.slow
def test_only_looking_returns_nothing(tmp_path, capsys):
    assert train(**FLAGS, show_data=True, output_dir=tmp_path) is None
    assert train(list_models=True) is None


# What is left behind


FRESH = """
import logging, os, random, signal, sys, threading, warnings
from train_vlm import train

def state():
    root = logging.getLogger()
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "logging": (root.level, list(root.handlers), logging.root.manager.disable), "random": random.getstate(),
        "hooks": (sys.excepthook, sys.stdout, sys.stderr),
    }

before, results = state(), []
flags = {"demo": True, "max_samples": 20, "epochs": 1, "threads": 2}
work = threading.Thread(target=lambda: results.append(train(**flags, output_dir=sys.argv[1])))
work.start()
work.join()
results.append(train(**flags, output_dir=sys.argv[2]))
after = state()
import torch
from safetensors.torch import load_file
assert [name for name in before if before[name] != after[name]] == []
assert torch.get_num_threads() == 1 and torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
assert "matplotlib.pyplot" not in sys.modules, "the backend is still the choice of the program"
one, two = (load_file(result.paths["final_model"] / "model.safetensors") for result in results)
assert all(torch.equal(one[name], two[name]) for name in one)
print("as before")
"""


@pytest.mark.slow
def test_it_works_in_a_thread_and_twice_and_leaves_a_program_that_had_imported_nothing_as_it_was(tmp_path):
    places = [tmp_path / "thread", tmp_path / "main"]
    done = subprocess.run([sys.executable, "-c", FRESH, *places], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["as before"], done.stderr
