"""The promises of SECURITY.md that no other test holds: no code of others runs, and files are written only where they
belong."""

import ast
import json
import re
import shutil
import subprocess

import pytest
import torch
from commands import ROOT, classify, command, names_in, surroundings, train

from vlm.common.errors import UsageError
from vlm.config import resolve
from vlm.data import load_data
from vlm.families import load_family

SOURCES = [*(ROOT / "vlm").rglob("*.py"), *ROOT.glob("*.py")]
CODE_LOADERS = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
EVALUATORS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"}


def risks_in(path):
    """What of a file evaluates text, reads pickles, or runs code of others."""
    imported, called, keywords = set(), set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
            keywords |= {keyword.arg for keyword in node.keywords if ast.unparse(keyword) != "trust_remote_code=False"}
    return imported & CODE_LOADERS | called & EVALUATORS | keywords & {"trust_remote_code", "allow_pickle"}


def test_no_file_evaluates_text_or_reads_pickles(tmp_path):
    assert {path.name: risks_in(path) for path in SOURCES if risks_in(path)} == {}
    (tmp_path / "bad.py").write_text(
        "import pickle\nfrom joblib import load\nx = eval(torch.load('a', allow_pickle=1))\ny(trust_remote_code=None)"
    )
    found = {"pickle", "joblib", "eval", "torch.load", "allow_pickle", "trust_remote_code"}
    assert risks_in(tmp_path / "bad.py") == found


def naming_code(folder, source, names, kinds):
    """A copy of a model folder that brings a file of code, which some of its settings files name."""
    mark = folder.with_name("it ran")
    shutil.copytree(source, folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    for name, changes in names.items():
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content["auto_map"] = dict.fromkeys(kinds, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")
    return mark


KINDS = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
BOTH = {"processor_class": "Evil", "image_processor_type": "Evil"}


@pytest.fixture
def nobody_is_asked(monkeypatch):
    def asked(*_):
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)


def test_code_in_a_model_folder_does_not_run(tiny_model, tmp_path, nobody_is_asked):
    settings = dict.fromkeys(("config.json", "processor_config.json", "tokenizer_config.json"), {})
    mark = naming_code(tmp_path / "model", tiny_model, settings, KINDS)
    family = load_family(tmp_path / "model", torch.float32, torch.device("cpu"), {})
    assert family.title == "SmolVLM" and not mark.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"config.json": {"model_type": "evil"}}, "Code that comes with a model is never run here"),
        ({"processor_config.json": BOTH}, r"\(auto_map in processor_config\.json\)\. Such code is never run here"),
        ({"processor_config.json": BOTH, "tokenizer_config.json": {"tokenizer_class": "Evil"}}, "auto_map in"),
    ],
)
def test_a_model_that_needs_its_own_code_is_refused_without_a_question(
    tiny_model, tmp_path, nobody_is_asked, settings, said
):
    mark = naming_code(tmp_path / "model", tiny_model, settings, KINDS)
    with pytest.raises(UsageError, match=said) as error:
        load_family(tmp_path / "model", torch.float32, torch.device("cpu"), {})
    assert len(str(error.value).splitlines()) == 1 and not mark.exists()


def test_code_that_a_part_of_a_configuration_names_does_not_run(tiny_model, tmp_path, nobody_is_asked):
    mark = naming_code(tmp_path / "model", tiny_model, {"config.json": {}}, KINDS)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    # of a type that transformers knows, but not as a language model: it would ask for the code of that part
    part = {"model_type": "siglip_vision_model", "auto_map": {"AutoModel": "evil.Evil"}, "vocab_size": 5}
    kernels = {"_attn_implementation": "kernels-community/evil"}
    path.write_text(json.dumps(config | kernels))
    load_family(tmp_path / "model", torch.float32, torch.device("cpu"), {})
    path.write_text(json.dumps(config | {"text_config": part}))
    with pytest.raises(UsageError, match=r"config\.json does not describe a model"):
        load_family(tmp_path / "model", torch.float32, torch.device("cpu"), {})
    assert not mark.exists()


def test_code_in_a_dataset_folder_does_not_run(tmp_path):
    folder, mark = tmp_path / "colors", tmp_path / "it ran"
    folder.mkdir()
    (folder / "colors.py").write_text(f"open({str(mark)!r}, 'w')\nimport datasets\n")
    with pytest.raises(UsageError):
        load_data(resolve({"dataset": str(folder)}))
    assert not mark.exists()


def test_code_that_a_results_folder_names_does_not_run(demo_run, tmp_path, capsys):
    folder, mark = shutil.copytree(demo_run, tmp_path / "vlm_results"), tmp_path / "it ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef f(*_): return 1\n")
    (folder / "results.json").unlink()  # as if the run had been interrupted
    for place in (folder, folder / "best_model"):
        metadata = json.loads((place / "training_metadata.json").read_text(encoding="utf-8"))
        metadata["settings"]["metrics"] = [f"{folder / 'evil.py'}:f"]
        (place / "training_metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
        (place / "checksums.json").unlink(missing_ok=True)
    capsys.readouterr()
    assert train("--resume", "--output-dir", folder) == 2
    assert f"add --metrics {folder / 'evil.py'}:f" in capsys.readouterr().err
    assert classify("--model-dir", folder / "best_model", "--device", "cpu", folder / "demo_images") == 0
    assert not mark.exists()


@pytest.mark.slow
def test_a_run_writes_only_to_its_output_and_cache_folders(tmp_path):
    home, caches, here, output, scratch = (tmp_path / name for name in ("home", "caches", "here", "out", "scratch"))
    for folder in (home, caches, here, scratch):
        folder.mkdir()
    places = {"HF_HOME": caches / "hf", "VLM_CACHE": caches / "vlm", "MPLCONFIGDIR": caches / "matplotlib"}
    environment = surroundings(HOME=home, TMPDIR=scratch, XDG_CACHE_HOME=None, XDG_CONFIG_HOME=None, **places)
    train = command("train_vlm.py", "--demo", "--max-samples", 60, "--epochs", 1, "--output-dir", output)
    predict = command("inference_vlm.py", "--model-dir", output / "best_model", output / "demo_images")
    for program in (train, predict):
        done = subprocess.run(program, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert names_in(home) == names_in(here) == names_in(scratch) == set()
    assert (output / "results.json").is_file()


def test_every_test_that_is_named_in_security_md_exists():
    named = re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 5
    missing = [
        (file, test)
        for file, test in named
        if f"def {test}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")
    ]
    assert not missing
