"""How long a run needs after its last step, so that --time-limit ends the training early enough."""

import time
from collections.abc import Callable
from math import ceil

import numpy as np

from vlm.common import evaluation_mode
from vlm.config import TEXT
from vlm.data import Split
from vlm.evaluation import IMAGES, TEXTS, check_texts, image_vectors, score_split, split_losses
from vlm.families import NoVectors
from vlm.report import MOST_SHOWN, time_to_draw
from vlm.training.saving import Saver
from vlm.training.setup import Run

SAMPLED = 64  # validation images of the timed test
UNCACHED = 4  # images that are timed without cached features, as gray ones have none
TIMED = 16  # images of which the features of the head are timed
FITS = 1e-3  # seconds for an image and a class, of all fits of the head (docs/experiments.md)
MARGIN = 1.25  # what was measured takes longer on a busy machine
OTHERS = 5.0  # seconds for what is not measured: tables, pages, thumbnails, metadata


class TimeNeeded:
    """Seconds for evaluation, saving, loading, calibration, test, head and probe. Own metrics are not in it.

    Attributes:
        evaluation: of an evaluation during the training, measured again at each of them.
    """

    def __init__(self, run: Run, saver: Saver) -> None:
        self.run, self.saver = run, saver
        self.evaluation = self._test = 0.0

    def measure(self) -> None:
        """Time the parts of evaluation and test on a few validation images. Called in one process."""
        run, size, workers = self.run, self.run.settings.eval_batch_size, self.run.workers
        validation, what = run.data.validation, "timing the test"
        few, new = _some(validation, max(SAMPLED, size)), _some(validation, UNCACHED)
        count, all_of_few = len(few), range(len(few))
        classifier, cache = run.classifier, run.cache
        with run.accelerator.autocast():
            scored = _seconds(lambda: score_split(classifier, few, size, None, workers, what, cache=cache))
            lost = _seconds(lambda: split_losses(classifier, few, size, all_of_few, workers, cache))
            exact = _seconds(lambda: score_split(classifier, few, size, None, workers, what, 0.0, cache))
            texts = _seconds(lambda: check_texts(classifier, few, size, min(TEXTS, size), cache))
            uncached = _seconds(lambda: score_split(classifier, new, size, None, workers, what))
        self.evaluation = len(validation) * (scored + lost) / count / run.accelerator.num_processes
        alike = len({new[i].image.size for i in range(len(new))}) == 1
        gray = (1 if alike else IMAGES) * uncached / len(new)
        images = len(validation) + len(run.data.test) + MOST_SHOWN  # calibration, test, explanations
        self._test = images * exact / count + texts * ceil(TEXTS / size) + gray + run.seconds_to_load
        self._test += self._head(few) + time_to_draw(run.data.class_names)

    @property
    def seconds(self) -> float:
        """After a last step that is not evaluated yet."""
        saving = 2 * self.saver.seconds("model") + self.saver.seconds("state")  # best and final model
        return MARGIN * (self.evaluation + saving + self._test) + OTHERS

    def _head(self, few: Split) -> float:
        """Of the head and of the probe: features of the images, and the fits; 0 without them."""
        run, data, settings = self.run, self.run.data, self.run.settings
        head = settings.evidence != TEXT and not settings.streaming
        probe = settings.probe and (settings.tune == "full" or not head)
        if not (head or probe):
            return 0.0
        samples = [few[i] for i in range(min(len(few), TIMED))]
        try:
            with evaluation_mode(run.classifier.family.model):
                seconds = _seconds(lambda: image_vectors(run.classifier.family, samples, run.cache))
        except NoVectors:  # a note says it later
            return 0.0
        each = seconds / len(samples)
        fits = FITS * len(data.train) * len(data.class_names)
        loaded_again = run.seconds_to_load if settings.tune == "full" and settings.probe else 0.0
        return loaded_again + (head + probe) * (each * len(data.train) + fits) + probe * each * len(data.test)


def _some(split: Split, count: int) -> Split:
    """At most `count` images of a split, from all parts of it."""
    return split.take(np.linspace(0, len(split) - 1, min(count, len(split))).astype(int).tolist())


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started
