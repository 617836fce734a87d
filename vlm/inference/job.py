"""A file of predictions of many images: stopped and gone on with, by one or several processes.

One process that writes CSV or JSON lines adds its rows to the file itself (`PredictionFile`). If there are several, or
the file is Parquet, which nothing can be added to, each process collects its rows in a file of its own, its share, and
the first process puts the shares together at the end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NoReturn

from vlm.classifier import VLMClassifier
from vlm.common import RunError, Stopped, UsageError, brief, dtype_name, is_main_process, note, replacing, with_bar
from vlm.inference.classifying import Options, Outcome, classify_items, settings_of
from vlm.inference.items import Item, Items
from vlm.inference.parquet import PARQUET, read_names, write_parquet
from vlm.inference.records import AGAIN, Begun, Record, Tally, as_stored, merge, read_begun, read_records
from vlm.inference.unfinished import (
    MadeBy,
    check_no_writer,
    check_processes,
    parts_of,
    read_made_by,
    refuse_or_leave,
    share_of,
    shares_of,
)
from vlm.inference.writing import (
    GOES_ON,
    PredictionFile,
    PredictionTable,
    about_file,
    cells_of,
    columns_of,
    header_of,
    lock_file,
)
from vlm.machine import Team, largest_batch


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Attributes:
        output: the file, .csv, .jsonl or .parquet.
        class_names: C names, the columns of the probabilities. readable: the model has readable names.
        team: the processes that do it.
        about: what decides the rows besides the images, by its name in messages; an unfinished job is gone on with only
            if it is the same.
        resume: go on with an unfinished job.
        more: further keys of the rows that become columns.
    """

    output: Path
    class_names: Sequence[str]
    readable: bool
    team: Team
    about: Mapping[str, str] = field(default_factory=dict)
    resume: bool = False
    more: Sequence[str] = ()

    @property
    def has_shares(self) -> bool:
        """Whether the rows are collected in shares first."""
        return self.team.size > 1 or self.output.suffix.lower() == PARQUET

    @cached_property
    def targets(self) -> list[Path]:
        """The file that each process writes."""
        ending = self.output.suffix.lower()
        ending = ".jsonl" if ending == PARQUET else ending
        size = self.team.size
        return [share_of(self.output, i, size, ending) for i in range(size)] if self.has_shares else [self.output]

    @property
    def target(self) -> Path:
        """The file that this process writes."""
        return self.targets[self.team.number]

    @cached_property
    def columns(self) -> dict[str, str | None]:
        """See `columns_of`."""
        return columns_of(self.class_names, self.readable, self.more)

    @property
    def header(self) -> bytes:
        """The first line of each of the files that the processes write."""
        return header_of(self.target, self.columns)


def about_rows(model: VLMClassifier, options: Options) -> dict[str, str]:
    """What decides the rows besides the images."""
    return {
        "the model": model.identity,
        "--dtype": dtype_name(model.model.dtype),
        "--explain": str(options.explain),
        "--exhaustive-scoring": str(options.exhaustive),
        "--abstain-below": str(model.calibration.abstain_below),
    }


def run_job(
    model: VLMClassifier,
    metadata: dict[str, Any],
    items: Items,
    options: Options,
    job: Job,
    each: Callable[[Outcome], object] = lambda outcome: None,
) -> Tally:
    """Classify images and write their rows, in the order of the images, each when it is computed.

    Args:
        each: is called with each outcome of this process; what an earlier run has written is not among them.

    Returns:
        What is known of all rows, in the first process; in the others, of those that they have written.

    Raises:
        UsageError: there is nothing to go on with, or it was made by another model, other flags or of other images.
        RunError: the file cannot be written.
        Stopped: by Ctrl-C or SIGTERM. The rows are kept.
    """
    begun, batch_size = find_begun(job, items)
    tally = begun.tally if begun else Tally()
    total = job.team.count(len(items))
    if begun is None or begun.part != job.target:
        batch_size = options.batch_size or batch_size or largest_batch(model, settings_of(metadata))
        made_by = MadeBy(job.about, batch_size).to_json()
        file = PredictionFile(job.target, job.class_names, job.readable, job.more, begun, made_by)
        # The batches are those of a job that was not stopped, so that the rows are the same to the last digit.
        again = tally.rows % batch_size
        rest = islice(job.team.share(items), tally.rows - again, None)
        batches = replace(options, batch_size=batch_size)
        outcomes = classify_items(model, metadata, rest, batches, total, tally.rows - again, job.team.named)
        with keeping_rows(file, total), file, closing(outcomes):
            for outcome in islice(outcomes, again, None):
                item, result, *_ = outcome
                file.add(item.name, {**result, **item.more})
                tally.add(item.name, "error" in result)
                each(outcome)
        if not job.has_shares:
            about_file(file.part).unlink(missing_ok=True)
    try:
        job.team.done()
        return _put_together(job, items) if job.has_shares and job.team.number == 0 else tally
    except KeyboardInterrupt as stop:
        raise Stopped(f"stopped after the last image. {GOES_ON}") from stop


def show_table(
    model: VLMClassifier,
    metadata: dict[str, Any],
    items: Items,
    options: Options,
    each: Callable[[Outcome], object] = lambda outcome: None,
    shows: Callable[[Item], bool] = lambda item: True,
) -> Tally:
    """Classify images and print a table of their rows, or of those that `shows` says; see `run_job`."""
    tally, shown = Tally(), PredictionTable(options.explain)
    outcomes = classify_items(model, metadata, items, options, len(items))
    with keeping_rows(shown, len(items)), shown, closing(outcomes):
        for outcome in outcomes:
            item, result, *_ = outcome
            if shows(item):
                shown.add(item.name, result)
            tally.add(item.name, "error" in result)
            each(outcome)
    return tally


@contextmanager
def keeping_rows(shown: PredictionFile | PredictionTable, total: int) -> Iterator[None]:
    """In this block, a stop or an error says how many of the rows are kept, and where."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Stopped(f"stopped after {shown.rows:,} of {total:,} images. {shown.kept()}".rstrip()) from stop
    except Exception as error:
        if shown.rows and not isinstance(error, BrokenPipeError):
            note(f"{shown.rows:,} of {total:,} images were classified before the error. {shown.kept()}")
        raise


def find_begun(job: Job, items: Items) -> tuple[Begun | None, int | None]:
    """What this process goes on with: a file that was begun, or its share if that is complete; None: nothing.

    Returns:
        the file, and the batch size that it was begun with.

    Raises:
        UsageError: it does not belong to this command, or there is nothing left to do.
    """
    job.team.after_first(partial(_check_whole, job, items))
    left = parts_of(job.target)
    if job.has_shares and job.target.exists():
        left.append(job.target)
    if not job.resume:
        refuse_or_leave(left, job.has_shares)
        return None, None
    if not left:
        return None, None
    part = left[-1]
    made_by = read_made_by(part, job.about)
    begun = read_begun(part, job.header, (item.name for item in job.team.share(items)))
    if made_by is None and begun.tally.rows:
        raise UsageError(f"{part}: {about_file(part).name}, which says what made its rows, is not there. {AGAIN}")
    if part == job.target and begun.tally.rows < job.team.count(len(items)):
        raise UsageError(f"{part} has {begun.tally.rows:,} rows, and now there are more images. {AGAIN}")
    return begun, made_by and made_by.batch_size


def _check_whole(job: Job, items: Items) -> None:
    """Check what there is of the whole job, before any process writes.

    Raises:
        UsageError: it was begun by another number of processes, one of them still writes, it is complete, or the file
            has rows of other images.
    """
    check_processes(job.output, job.team.size)
    check_no_writer(shares_of(job.output))
    if not job.resume or shares_of(job.output) or (not job.has_shares and parts_of(job.output)):
        return
    if parts := parts_of(job.output):
        raise UsageError(f"{parts[-1]} was begun by one process, and now there are {job.team.size}. {AGAIN}")
    if job.output.exists():
        for target in job.targets:  # of a job that was killed after its last row
            about_file(target).unlink(missing_ok=True)
        _refuse_complete(job, items)
    note(f"note: --resume: there is nothing of {brief(job.output)} yet, so it starts with the first image.")


def _refuse_complete(job: Job, items: Items) -> NoReturn:
    """Raises UsageError: all rows of these images are in the file, or it has those of others, which would be lost."""
    header = header_of(job.output, job.columns)
    is_table = job.output.suffix.lower() == PARQUET
    names = read_names(job.output) if is_table else (record.name for record in read_records(job.output, header))
    pairs = zip_longest(names, (as_stored(item.name, header) for item in items))
    if all(there == wanted for there, wanted in pairs):
        raise UsageError(f"--resume: {job.output} is complete. Leave out --resume to compute it again.")
    raise UsageError(
        f"--resume: {job.output} is the complete file of other images than these {len(items):,}. Give another "
        "--output; without --resume, it would be replaced."
    )


def _put_together(job: Job, items: Items) -> Tally:
    """Make one file of the shares, and delete them."""
    tally = Tally()

    def counted() -> Iterator[Record]:
        names = (item.name for item in items)
        for record in with_bar(merge(job.targets, job.header, names), len(items), f"writing {job.output}", "rows"):
            tally.add(record.name, bool(record.values.get("error")))
            yield record

    with ExitStack() as locks, replacing(job.output) as temporary:
        for target in job.targets:
            lock_file(target, locks.enter_context(target.open("rb")).fileno())
        if job.output.suffix.lower() == PARQUET:
            rows = (cells_of(record.name, record.values, job.columns) for record in counted())
            write_parquet(temporary, rows, job.columns)
        else:
            with temporary.open("wb") as file:
                file.write(job.header)
                file.writelines(record.raw for record in counted())
    for target in job.targets:
        target.unlink()
        about_file(target).unlink(missing_ok=True)
    return tally


def check_all_read(tally: Tally) -> None:
    """Say it at the end if images could not be read. Of several processes the first one says it, which knows of all
    images, and when the file is written: the launcher ends the others if one of them fails.

    Raises:
        RunError: some could not.
    """
    if tally.failed and is_main_process():
        others = "; the others are classified" if tally.failed < tally.rows else ""
        raise RunError(f"{tally.failed:,} of {tally.rows:,} images could not be read, such as {tally.first}{others}.")
