"""Training and validation log the same two losses, by the same names, so that they can be compared."""

import pytest
from test_training import image_folder
from tiny import NAMES, save_tiny_model

from vlm.config import resolve
from vlm.training.loop import Trainer
from vlm.training.losses import losses_in_words, mean_since_evaluation
from vlm.training.setup import set_up


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A model, and a dataset whose validation images are its training images."""
    folder = tmp_path_factory.mktemp("sources")
    for split in ("train", "val", "test"):
        image_folder(folder / "images" / split, NAMES, each=2)
    return save_tiny_model(folder / "model"), folder / "images"


@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.2}, {"class_balance": True}])
@pytest.mark.parametrize("objective", ["response", "posterior", "both"])
def test_on_the_same_images_both_are_equal(sources, tmp_path, capsys, objective, more):
    """One step of all images with a learning rate that changes nothing: its loss is that of validation."""
    if objective == "response" and "label_smoothing" in more:
        pytest.skip("label smoothing is for the class")
    model, images = sources
    flags = {"model": str(model), "dataset": str(images), "objective": objective, "output_dir": str(tmp_path)}
    flags |= {"tune": "connector", "epochs": 1, "learning_rate": 1e-12, "batch_size": 2 * len(NAMES), "device": "cpu"}
    run = set_up(resolve(flags | more))
    assert len(run.data.train) == len(run.data.validation) == 2 * len(NAMES)
    trainer = Trainer(run)
    trainer.train()
    train, validation = trainer.progress.history
    names = {"response": ["response_loss"], "posterior": ["class_loss"], "both": ["response_loss", "class_loss"]}
    for entry in (train, validation):
        assert [name for name in ("response_loss", "class_loss") if name in entry] == names[objective]
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in names[objective]))
    for name in ["loss", *names[objective]]:
        assert validation[name] == pytest.approx(train[name], rel=1e-4)
    assert losses_in_words(validation, train) in capsys.readouterr().err


def test_the_words_name_each_loss_next_to_that_of_the_training():
    assert losses_in_words({"loss": 3.0, "response_loss": 1.0, "class_loss": 2.0}, {"response_loss": 1.5}) == (
        "response loss per token 1.0000 (training 1.5000), class loss per image 2.0000"
    )


def test_the_training_loss_is_the_mean_since_the_last_evaluation():
    history = [
        {"kind": "train", "class_loss": 9.0},
        {"kind": "validation", "class_loss": 8.0},
        {"kind": "train", "class_loss": 3.0},
        {"kind": "train", "class_loss": 1.0, "response_loss": 0.5},
    ]
    assert mean_since_evaluation(history) == {"class_loss": 2.0, "response_loss": 0.5}
    assert mean_since_evaluation(history[:2]) == mean_since_evaluation([]) == {}
