"""The queue of --serve: images of many requests, one thread that classifies them."""

import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from vlm.service.batcher import Batcher, QueueFull


class Model:
    """Squares numbers. It notes its batches, can be made to wait, and does not take -1."""

    def __init__(self):
        self.batches, self.texts = [], []
        self.may_go, self.begun = threading.Event(), threading.Event()
        self.may_go.set()

    def __call__(self, images, explain):
        self.batches.append(list(images))
        self.texts.append(explain)
        self.begun.set()
        assert self.may_go.wait(10)
        if -1 in images:
            raise ValueError("no")
        return [{"square": image**2} for image in images]

    def busy(self, batcher):
        """Have it compute 0 until `may_go` is set, so that what is submitted next has to wait."""
        self.may_go.clear()
        self.begun.clear()
        answer = batcher.submit(0)
        assert self.begun.wait(10)
        return answer


@pytest.fixture
def model():
    model = Model()
    yield model
    model.may_go.set()


def squares(answers):
    return [answer.result(10)["square"] for answer in answers]


def test_one_image_is_not_kept_waiting_and_what_comes_meanwhile_is_one_batch(model):
    with Batcher(model, batch_size=4) as batcher:
        first = model.busy(batcher)
        others = [batcher.submit(n) for n in range(1, 7)]
        model.may_go.set()
        assert squares([first, *others]) == [n**2 for n in range(7)]
        assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]
        assert (batcher.answered, batcher.batches) == (7, 3)


def test_many_threads_get_their_own_results(model):
    with Batcher(model, batch_size=5) as batcher, ThreadPoolExecutor(16) as clients:
        found = list(clients.map(lambda n: batcher.submit(n).result(10)["square"], range(200)))
    assert found == [n**2 for n in range(200)]


def test_a_batch_has_as_many_pixels_as_it_may_and_a_larger_image_is_alone(model):
    with Batcher(model, batch_size=9, batch_pixels=10) as batcher:
        model.busy(batcher)
        answers = [batcher.submit(n, pixels) for n, pixels in enumerate((6, 4, 50, 1, 9), start=1)]
        model.may_go.set()
        squares(answers)
        assert model.batches == [[0], [1, 2], [3], [4, 5]]


def test_images_with_and_without_texts_are_not_mixed_and_the_oldest_goes_first(model):
    with Batcher(model, batch_size=9) as batcher:
        model.busy(batcher)
        answers = [batcher.submit(n, explain=n % 2 == 0) for n in range(1, 5)]
        model.may_go.set()
        squares(answers)
    assert model.batches == [[0], [1, 3], [2, 4]] and model.texts == [True, False, True]


def test_an_image_that_cannot_be_classified_fails_alone(model):
    with Batcher(model, batch_size=9) as batcher:
        model.busy(batcher)
        answers = {n: batcher.submit(n) for n in (1, 2, -1, 3, 4)}
        model.may_go.set()
        assert squares(answers[n] for n in (1, 2, 3, 4)) == [1, 4, 9, 16]
        with pytest.raises(ValueError, match="no"):
            answers[-1].result(10)
        assert squares([batcher.submit(5)]) == [25], "and the thread goes on"


def test_places_are_bounded_and_given_back(model):
    with Batcher(model, batch_size=1, places=3) as batcher:
        with batcher.admitted(2):
            with (
                pytest.raises(QueueFull, match="2 images are waiting, and at most 3 may: try again in some seconds"),
                batcher.admitted(2),
            ):
                pass
            with batcher.admitted(1):
                pass
        with batcher.admitted(3):
            pass


def test_an_image_that_nobody_waits_for_any_more_is_not_classified(model):
    with Batcher(model, batch_size=9) as batcher:
        model.busy(batcher)
        given_up, other = batcher.submit(1), batcher.submit(2)
        assert given_up.cancel()
        model.may_go.set()
        assert squares([other]) == [4]
    assert model.batches == [[0], [2]]


def test_the_end_answers_what_is_computed_and_cancels_what_waits(model):
    with Batcher(model, batch_size=9) as batcher:
        computed, waiting = model.busy(batcher), batcher.submit(1)
        threading.Timer(0.05, model.may_go.set).start()
    assert squares([computed]) == [0] and model.batches == [[0]]
    for late in (waiting, batcher.submit(2)):
        with pytest.raises(CancelledError):
            late.result(0)
    time.sleep(0)
    assert not any(thread.name == "classifying" for thread in threading.enumerate())
