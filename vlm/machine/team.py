"""Several processes that share images: each takes its own ones, and the first one waits until all are done."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
from torch.distributed import Store, rendezvous

from vlm.common import process_count

Item = TypeVar("Item")
SECONDS_TO_MEET = 600  # that a process waits for the others when it starts; loading a model may take that long
SECONDS_BETWEEN_LOOKS = 0.1


class Team:
    """The processes that `accelerate launch` has started, or only this process.

    They tell each other nothing but that they are done, through the store of torch's launcher. No group of processes
    is needed for that, which would have a time limit. If a process fails, the launcher ends the others.

    Attributes:
        number: of this process, from 0. size: how many there are.
    """

    def __init__(self) -> None:
        self.number, self.size = int(os.environ.get("RANK", "0")), process_count()
        self._store: Store | None = None
        if self.size > 1:
            self._store = next(iter(rendezvous("env://", timeout=timedelta(seconds=SECONDS_TO_MEET))))[0]
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    @property
    def named(self) -> str:
        """What a progress bar adds to the name of its work, which is that of this process only; nothing if there is no
        other one."""
        return f" (process {self.number + 1} of {self.size}, its share)" if self.size > 1 else ""

    def share(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items of this process: they are dealt out in turn."""
        return islice(items, self.number, None, self.size)

    def count(self, total: int) -> int:
        """How many of so many items this process has."""
        return len(range(self.number, total, self.size))

    def after_first(self, check: Callable[[], object]) -> None:
        """Let the first process check something, before the others go on; they are ended if its check fails."""
        if self.number == 0:
            check()
            self._say("checked")
        else:
            self._wait_for("checked")

    def done(self) -> None:
        """Say that this process has done its share, and in the first one wait until all have."""
        self._say(f"done {self.number}")
        if self.number == 0:
            self._wait_for(*(f"done {number}" for number in range(self.size)))

    def _say(self, word: str) -> None:
        if self._store is not None:
            self._store.set(word, "")

    def _wait_for(self, *words: str) -> None:
        while self._store is not None and not self._store.check(list(words)):
            time.sleep(SECONDS_BETWEEN_LOOKS)  # a wait in the store itself would not notice Ctrl-C
