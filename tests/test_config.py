"""Flags, defaults and the checks that name all problems at once."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm.common.errors import UsageError
from vlm.config import RunSettings, Settings, build_parser, from_keywords, parse_arguments, read_settings, resolve

ROOT = Path(__file__).parent.parent


def test_every_setting_is_one_flag_with_a_help_text():
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    for item in dataclasses.fields(Settings):
        assert "--" + item.name.replace("_", "-") in flags
        assert item.metadata["help"]
        assert item.default is None or not isinstance(item.default, float) or "default" in item.metadata["help"]


def test_underscores_are_accepted_in_flags_but_not_changed_in_values():
    given = parse_arguments(["--image_column", "my_image", "--label-column=the_label", "--task_description=a_b --c_d"])
    assert given == {"image_column": "my_image", "label_column": "the_label", "task_description": "a_b --c_d"}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["ael aec cli"], ["ael", "aec", "cli"]),
        (["ael, aec,cli"], ["ael", "aec", "cli"]),
        (["ael", "aec", "cli"], ["ael", "aec", "cli"]),
        (["ael,", "aec,", "cli"], ["ael", "aec", "cli"]),
        (["ice cap, dune field"], ["ice cap", "dune field"]),
        (["ice cap", "dune field"], ["ice cap", "dune field"]),
        ([" ael\n", "\taec,", "cli"], ["ael", "aec", "cli"]),
        (["tench, Tinca tinca; goldfish"], ["tench, Tinca tinca", "goldfish"]),
        (['"tench, Tinca tinca", goldfish , "a; b"'], ["tench, Tinca tinca", "goldfish", "a; b"]),
        (['5" disk, 3" disk'], ['5" disk', '3" disk']),
        (['"ice cap" dune'], ["ice cap", "dune"]),
    ],
)
def test_class_names_as_words_or_as_one_string(words, names):
    assert parse_arguments(["--class-names", *words])["class_names"] == names


@pytest.mark.parametrize(("tune", "rate", "epochs"), [("lora", 2e-4, 3), ("connector", 5e-4, 5), ("full", 1e-5, 3)])
def test_defaults_follow_the_tuning_mode(tune, rate, epochs):
    settings = resolve({"tune": tune})
    assert (settings.learning_rate, settings.epochs) == (rate, epochs)
    assert resolve({"tune": tune, "learning_rate": 0.5}).learning_rate == 0.5


def test_default_is_lora_on_smolvlm_and_mars_with_eight_images_a_step():
    settings = resolve({})
    assert (settings.model, settings.dataset) == ("HuggingFaceTB/SmolVLM-500M-Instruct", "Mirali33/mb-domars16k")
    assert (settings.tune, settings.batch_size, settings.gradient_accumulation_steps) == ("lora", None, None)
    assert settings.objective is None
    assert resolve({"label_smoothing": 0.1}).objective == "both"
    assert resolve({"demo": True}).objective == "response"


@pytest.mark.parametrize(("batch_size", "batches"), [(2, 4), (3, 3), (64, 1)])
def test_a_run_is_completed_with_as_many_batches_as_make_eight_images(batch_size, batches):
    given = resolve({})
    run = given.complete(batch_size, "both")
    assert (run.batch_size, run.objective, run.gradient_accumulation_steps) == (batch_size, "both", batches)
    assert given.batch_size is None, "the settings as given stay as they are"
    assert resolve({"gradient_accumulation_steps": 5}).complete(batch_size, "both").gradient_accumulation_steps == 5


@pytest.mark.parametrize("settings", [resolve({}), resolve({}).complete(1, "both")])
def test_settings_do_not_change(settings):
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.epochs = 7


def test_the_settings_of_a_run_are_those_that_were_saved():
    run = resolve({"tune": "connector", "class_names": ["a", "b"], "eval_steps": 7}).complete(4, "posterior")
    assert isinstance(run, RunSettings) and read_settings(run.to_json()) == run
    assert list(run.to_json()) == [item.name for item in dataclasses.fields(Settings)]


def test_settings_of_other_versions_are_read():
    saved = resolve({"epochs": 9}).complete(4, "both").to_json()
    older = {name: value for name, value in saved.items() if name not in ("cache_size", "objective", "response_format")}
    read = read_settings(older | {"no_alignment": False, "a_later_setting": 3})
    assert (read.epochs, read.batch_size, read.cache_size) == (9, 4, 20)
    assert (read.objective, read.response_format) == ("response", "reasoning-first")
    assert read_settings({}).model == resolve({}).model


@pytest.mark.parametrize(
    ("flags", "trackers"),
    [
        ([], []),
        (["--use-wandb"], ["wandb"]),
        (["--track", "tensorboard", "wandb", "tensorboard"], ["tensorboard", "wandb"]),
        (["--use-wandb", "--track", "wandb", "mlflow"], ["wandb", "mlflow"]),
        (["--report-to", "trackio", "--use-wandb"], ["trackio", "wandb"]),
        (["--use-wandb", "--report-to", "none"], []),
    ],
)
def test_use_wandb_is_one_of_the_trackers_and_each_is_started_once(flags, trackers):
    assert resolve(parse_arguments(flags)).trackers == trackers


def test_all_problems_are_named_at_once():
    with pytest.raises(UsageError) as error:
        resolve(
            {"batch_size": 0, "epochs": -1, "learning_rate": 0.0, "class_names": ["a", "a"], "demo": True, "model": "x"}
        )
    for expected in (
        "--batch-size 0",
        "--epochs -1",
        "--learning-rate 0.0",
        "--class-names a a",
        "--demo brings its own model",
    ):
        assert expected in str(error.value)
    with pytest.raises(
        UsageError, match=r"(?s)abstain-below 5: expected a probability.*--abstain-below and --target-precision exclude"
    ):
        resolve({"abstain_below": 5, "target_precision": 0.9})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tune": "connector", "freeze_connector": True}, "--freeze-connector needs --tune lora, not connector"),
        ({"tune": "full", "freeze_connector": True}, "--freeze-connector needs --tune lora, not full"),
        ({"tune": "connector", "lora_variant": "dora"}, "--lora-variant dora needs --tune lora, not connector"),
        ({"lora_variant": "pissa", "load_in_4bit": True}, "--lora-variant pissa and --load-in-4bit exclude each other"),
        ({"lora_variant": "dora", "load_in_8bit": True}, "--lora-variant dora and --load-in-8bit exclude each other"),
        ({"freeze_connector": True, "connector_learning_rate": 1e-3}, "--connector-learning-rate and --freeze-conn"),
        ({"align_connector": True, "tune": "full"}, "--align-connector needs a frozen vision encoder"),
        ({"align_connector": True, "no_feature_cache": True}, "--align-connector and --no-feature-cache exclude"),
        ({"align_connector": True, "epochs": 0}, "--align-connector and --epochs 0 exclude each other"),
        ({"score": "mean"}, "--score mean no longer exists"),
        ({"validation_ratio": 0.6, "test_ratio": 0.5}, "--validation-ratio 0.6: expected less than 1 together with"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
        ({"label_smoothing": 0.1, "objective": "response"}, "--label-smoothing smooths over classes"),
        ({"class_names": ["mars", "moon", "moon"]}, "--class-names mars moon moon: expected different .* once: moon"),
        ({"class_names": []}, "--class-names : expected at least two names"),
        ({"class_names": ["a", ""]}, '--class-names a "": expected names that are not empty'),
        ({"class_names": ["a", "b\nc"]}, "expected names of one line, without control characters"),
        ({"class_names": ["a", "\x1b[2J"]}, "expected names of one line, without control characters"),
        ({"class_names": [str(i // 2) for i in range(9999)]}, "^.{1,700}$"),
        ({"seed": 10**27}, "--seed 1000000000000000000000000000: expected a whole number of at least 0, and below"),
        ({"batch_size": 10**10}, "--batch-size 10000000000: expected a whole number of at least 1, and at most"),
        ({"workers": 10**5}, "--workers 100000: expected a whole number of at least 0, and at most 1,024"),
        ({"image_size": "9" * 5000}, "--image-size 99+…9+: expected a number of pixels, or auto"),
        ({"output_dir": "x" * 5000}, "--output-dir x+…x+: expected a name that is not empty and not too long"),
        ({"output_dir": "out\udce9"}, r"--output-dir out.*: expected a name that is valid UTF-8"),
        ({"output_dir": " "}, '--output-dir " ": expected a name that is not empty'),
        ({"dataset": ""}, '--dataset "": expected a name that is not empty'),
        ({"prompt_template": ""}, '--prompt-template "": expected a text that is not empty'),
        ({"model": "a/b\0"}, "--model a/b.: expected a name"),
    ],
)
def test_what_cannot_work_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        resolve(given)


def test_the_connector_can_be_frozen_or_aligned_or_both():
    settings = resolve({"freeze_connector": True, "align_connector": True})
    assert settings.tune == "lora" and settings.freeze_connector and settings.align_connector


def test_a_flag_without_effect_is_accepted_and_not_in_the_help_text():
    assert parse_arguments(["--no-alignment", "--epochs", "2"]) == {"epochs": 2}
    assert "--no-alignment" not in build_parser().format_help()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_learning_rate_that_is_no_number_is_refused(number):
    with pytest.raises(UsageError, match="learning-rate"):
        resolve({"learning_rate": number})


def test_texts_may_come_from_a_file(tmp_path):
    file = tmp_path / "template.txt"
    file.write_text("What is it?\n{classes}\n", encoding="utf-8")
    assert resolve({"prompt_template": f"@{file}"}).prompt_template == "What is it?\n{classes}"
    file.write_bytes(b"\xef\xbb\xbfWhat is it?")  # a byte order mark, as Windows writes it
    assert resolve({"system_instructions": f"@{file}"}).system_instructions == "What is it?"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file or directory"),
        (b" \n\n", "it is empty"),
        (b"\xef\xbb\xbf", "it is empty"),
        (b"\x89PNG\r\n", "it is not UTF-8"),
        (b"a\0b", "it has a character NUL"),
        (b"x" * 1_000_001, "it has more than 1,000,000 characters"),
        ("folder", "it is a folder"),
        ("fifo", "it is no regular file"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path, content, said):
    file = tmp_path / "template.txt"
    if content == "folder":
        file.mkdir()
    elif content == "fifo":
        os.mkfifo(file)  # opening it would wait for ever
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        resolve({"prompt_template": f"@{file}"})
    assert str(caught.value).startswith(f"--prompt-template @{file}: not a readable text file ({said}).")


def test_resume_takes_the_saved_settings_and_refuses_others():
    saved = resolve({"demo": True, "epochs": 5}).complete(16, "response")
    settings = resolve({"resume": True, "debug": True, "epochs": 5}, saved)
    assert settings.demo and settings.epochs == 5 and settings.resume and settings.debug
    with pytest.raises(UsageError, match="--epochs 6 .*has 5"):
        resolve({"resume": True, "epochs": 6}, saved)


def test_resume_stays_in_the_folder_that_was_named_and_reads_no_file_that_the_settings_name(tmp_path):
    (tmp_path / "secret").write_text("a secret")
    values = {"demo": True, "output_dir": "/elsewhere", "prompt_template": f"@{tmp_path / 'secret'}"}
    saved = read_settings(resolve({"demo": True}).complete(16, "response").to_json() | values)
    assert resolve({"resume": True, "output_dir": "here"}, saved).output_dir == "here"
    settings = resolve({"resume": True}, saved)
    assert settings.output_dir == Settings.output_dir and settings.prompt_template == values["prompt_template"]


def test_resume_takes_no_code_from_the_saved_settings():
    saved = resolve({"demo": True, "metrics": ["evil.py:run"]}).complete(16, "response")
    with pytest.raises(UsageError) as caught:
        resolve({"resume": True}, saved)
    for said in ("had --metrics evil.py:run", "This is code", "add --metrics evil.py:run", "add --metrics none"):
        assert said in str(caught.value)
    for given, metrics in ((["evil.py:run"], ["evil.py:run"]), (["mine.py:f"], ["mine.py:f"]), (["none"], None)):
        assert resolve({"resume": True, "metrics": given}, saved).metrics == metrics
    assert resolve({"resume": True}, resolve({"demo": True}).complete(16, "response")).metrics is None
    assert resolve({"metrics": ["none"]}).metrics is None


def test_saved_settings_are_checked_like_those_of_the_command_line():
    saved = read_settings({"tune": "everything", "epochs": 10**30, "score": "mean"})
    with pytest.raises(UsageError, match="(?s)--epochs 1.*--tune everything: expected lora.*--score mean no longer"):
        resolve({"resume": True}, saved)


def test_resume_may_change_how_the_model_abstains():
    saved = resolve({"demo": True, "target_precision": 0.95}).complete(16, "response")
    settings = resolve({"resume": True, "abstain_below": 0.5}, saved)
    assert (settings.abstain_below, settings.target_precision) == (0.5, None)
    assert resolve({"resume": True}, saved).target_precision == 0.95
    back = resolve({"resume": True, "target_precision": 0.9}, settings.complete(16, "response"))
    assert (back.abstain_below, back.target_precision) == (None, 0.9)
    with pytest.raises(UsageError, match="exclude each other"):
        resolve({"resume": True, "target_precision": 0.9, "abstain_below": 0.5}, saved)


def test_help_loads_nothing_heavy():
    code = (
        "import sys, train_vlm, inference_vlm\n"
        "try: train_vlm.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--gradient-accumulation-steps" in done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    "arguments", [["--batch-size", "many"], ["--no-such-flag"], ["--tune", "some"], ["--epoch", "3"]]
)
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0x10"], "argument --epochs: expected a whole number, and got '0x10'."),
        (["--epochs", "2.5"], "argument --epochs: expected a whole number, and got '2.5'."),
        (["--seed", "1" * 5000], "argument --seed: expected a whole number, and got '1111"),
        (["--report-to", "csv"], "argument --report-to/--track: invalid choice: 'csv'"),
        (["--learning-rate", "1,5"], "argument --learning-rate: expected a number, and got '1,5'."),
        (["a\x1b[2J\nb\n       c"], "unrecognized arguments: a [2J b c."),
        (["x" * 100_000], "unrecognized arguments: xxx"),
    ],
)
def test_a_mistake_is_two_lines_whatever_was_typed(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {said}") and len(first) <= 1500 and second.endswith("--help lists all flags.")


def test_numbers_of_other_scripts_are_numbers():
    assert parse_arguments(["--epochs", "\u0661"]) == {"epochs": 1}


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--datset", "--dataset"),
        ("--output_directory", "--output-dir"),
        ("--batchsize=4", "--batch-size"),
        ("demo", "--demo"),
        ("--xyzzy", None),
    ],
)
def test_an_unknown_flag_is_answered_by_the_one_that_is_like_it(flag, meant, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([flag, "x"])
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: unrecognized arguments: {flag} x." + (f" Did you mean {meant}?" if meant else "")
    assert second.strip() == "train_vlm.py --help lists all flags."


def test_the_trackers_of_a_run_have_one_key_under_both_names_of_their_flag():
    assert parse_arguments(["--track", "wandb"]) == parse_arguments(["--report-to", "wandb"]) == {"track": ["wandb"]}
    assert from_keywords("train", {"report_to": "wandb"}) == from_keywords("train", {"track": ["wandb"]})
    with pytest.raises(UsageError, match="--report-to none excludes other trackers"):
        resolve({"track": ["none", "wandb"]})
    saved = resolve({"track": ["wandb"], "use_wandb": True}).complete(8, "both")
    assert resolve({"resume": True}, saved).trackers == ["wandb"]
    assert resolve({"resume": True, "track": ["none"]}, saved).trackers == []


def test_patience_needs_a_training():
    with pytest.raises(UsageError, match="--patience and --epochs 0 exclude each other"):
        resolve({"patience": 2, "epochs": 0})
