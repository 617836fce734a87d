"""The surroundings of every test: nothing reaches the network, nothing is left in the user's folders."""

import os
import tempfile

import pytest
from commands import classify, train

# Set before any library reads them. Kept in a variable, since the folder goes away with it when the tests end.
_CACHES = tempfile.TemporaryDirectory(prefix="vlm_tests_")
os.environ.update(
    HF_HOME=os.path.join(_CACHES.name, "huggingface"),
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    MPLCONFIGDIR=os.path.join(_CACHES.name, "matplotlib"),
    TOKENIZERS_PARALLELISM="false",
    VLM_CACHE=os.path.join(_CACHES.name, "vlm"),
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    WANDB_CACHE_DIR=os.path.join(_CACHES.name, "wandb"),
    WANDB_CONFIG_DIR=os.path.join(_CACHES.name, "wandb"),
    WANDB_DATA_DIR=os.path.join(_CACHES.name, "wandb"),
)
# Tiny models are quickest on one thread, and threads that wait for each other crawl when anything else runs.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """The output folder of a short run of the demo, trained once for all tests. Only to be read."""
    output = tmp_path_factory.mktemp("demo") / "vlm_results"
    assert train("--demo", "--max-samples", 100, "--epochs", 1, "--batch-size", 4, "--output-dir", output) == 0
    return output


@pytest.fixture
def infer(demo_run, capsys):
    """Runs the command line on the demo's model; returns the exit code, stdout and stderr."""

    def call(*arguments):
        capsys.readouterr()
        return classify("--model-dir", demo_run / "best_model", "--device", "cpu", *arguments), *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a model as on the hub, of two layers with random weights. Only to be read."""
    from tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def halves(tmp_path_factory):
    """A folder with a model of two halves, whose connector was never trained. Only to be read."""
    from halves import save_halves

    folder = tmp_path_factory.mktemp("halves")
    save_halves(folder)
    return folder


@pytest.fixture(scope="session")
def color_folder(tmp_path_factory):
    """An image folder of three classes with 12 images each. Only to be read."""
    from halves import save_images

    folder = tmp_path_factory.mktemp("colors")
    save_images(folder)
    return folder
