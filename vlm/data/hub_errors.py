"""What is wrong between this machine and the hub, in words; and calls that are made again if that may help."""

import errno
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from http import HTTPStatus
from threading import Thread
from typing import NamedTuple, TypeVar

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vlm.common import RunError, UsageError, note, one_line

PAUSES = (1.0, 4.0)  # seconds before a call is made again
LONGEST_PAUSE = 60.0  # seconds that the hub may ask to wait
SILENT_SECONDS = 5.0  # after which is said that the hub is slow
TOO_MANY = 429
# Names of exceptions, as the libraries that make the requests differ between versions.
TIMEOUTS = {"TimeoutException", "TimeoutError", "Timeout"}
BROKEN = {"NetworkError", "RemoteProtocolError", "ChunkedEncodingError", "ContentDecodingError", "ProtocolError"}
NOT_CONNECTED = {"ConnectError", "ConnectTimeout", "ConnectionRefusedError"}
NO_NAME = re.compile(r"Name or service not known|nodename nor servname|getaddrinfo|name resolution", re.IGNORECASE)

Result = TypeVar("Result")


class Trouble(NamedTuple):
    """Why a call failed. what: in words; passing: whether it may work later; status: of the answer, if one came;
    pause: seconds that the hub asks to wait."""

    what: str
    passing: bool = False
    status: int | None = None
    pause: float | None = None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def trouble_of(error: BaseException) -> Trouble | None:
    """What is wrong with the hub or the way to it; None if the error has nothing to do with it."""
    chain = list(causes(error))
    for one in chain:
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return _of_answer(status, one)
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    said = next((one_line(one) for one in reversed(chain) if str(one)), type(error).__name__)
    if any(isinstance(one, socket.gaierror) for one in chain) or any(NO_NAME.search(str(one)) for one in chain):
        return Trouble(f"the hub cannot be reached, as the name {_host()} is not found (is there a network?)")
    if "OfflineModeIsEnabled" in kinds:
        return Trouble("HF_HUB_OFFLINE is set")
    if kinds & NOT_CONNECTED:
        return Trouble(f"the hub cannot be reached at {constants.ENDPOINT} ({said})")
    if kinds & TIMEOUTS:
        return Trouble(f"the hub cannot be reached at {constants.ENDPOINT} ({said})", passing=True)
    if kinds & BROKEN or "Consistency check failed" in str(error):
        return Trouble(f"the connection to the hub broke off ({said})", passing=True)
    return None


def refusal(kind: str, name: str, revision: str | None, error: BaseException) -> UsageError | None:
    """The error for an answer that would be the same the next time; None if it is no such answer."""
    for one in causes(error):
        if isinstance(one, GatedRepoError):
            return UsageError(
                f"{kind} {name}: access must be asked for on its page on the hub; then log in with `hf auth login`."
            )
        if isinstance(one, RevisionNotFoundError):
            return UsageError(
                f"{kind} {name}: no revision {revision} on the hub. Expected a branch, a tag or a whole commit hash."
            )
        if isinstance(one, RepositoryNotFoundError):
            return UsageError(
                f"{kind} {name}: not on the hub, not a folder here, or private. "
                "Check the spelling. If it is private, log in with `hf auth login`."
            )
        if isinstance(one, HFValidationError):
            return UsageError(f"{kind} {name}: no local folder, and not a valid name on the hub. Expected owner/name.")
        if isinstance(one, EntryNotFoundError) and getattr(one, "response", None) is not None:
            return UsageError(f"{kind} {name}: a file is missing on the hub ({one_line(one)}). Try another revision.")
    trouble = trouble_of(error)
    if trouble is None or trouble.status is None or trouble.passing:
        return None
    if trouble.status == HTTPStatus.UNAUTHORIZED:
        return UsageError(
            f"{kind} {name}: the hub refuses your token (401). Log in again with `hf auth login`, or remove the token "
            "(HF_TOKEN, `hf auth logout`)."
        )
    if trouble.status == HTTPStatus.FORBIDDEN:
        return UsageError(
            f"{kind} {name}: the hub refuses access (403). Ask for it on its page on the hub, or log in with a token "
            "that may read it (`hf auth login`)."
        )
    return UsageError(f"{kind} {name}: {trouble.what}. Check the name and the revision.")


def failure(kind: str, name: str, error: BaseException) -> RunError | None:
    """The error for a download that failed; None if it has nothing to do with the hub."""
    for one in causes(error):
        if isinstance(one, OSError) and one.errno == errno.ENOSPC:
            return RunError(
                f"{kind} {name}: no room for the download in {constants.HF_HUB_CACHE}. Make room, or set HF_HOME to "
                "a folder on another disk."
            )
    trouble = trouble_of(error)
    if trouble is None:
        return None
    if trouble.status == TOO_MANY:
        cure = "Wait some minutes, or log in with `hf auth login`, which allows more. Run the command again then"
    else:
        cure = "Run the command again" if trouble.passing else "Run the command again when it can be reached"
    return RunError(f"{kind} {name}: the download failed: {trouble.what}. {cure}: the download goes on.")


def again(call: Callable[[], Result], retry: Callable[[Trouble], bool] = lambda trouble: trouble.passing) -> Result:
    """The result of `call`, which is made again a few times if the hub's answer says that this may help.

    Args:
        retry: whether trouble is worth another call.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as error:
            trouble = trouble_of(error)
            if pause is None or trouble is None or not retry(trouble):
                raise
            seconds = max(pause, trouble.pause or 0)
            if seconds > LONGEST_PAUSE:
                raise
            note(f"note: {trouble.what}; trying again in {seconds:g} s.")
            time.sleep(seconds)
    raise AssertionError("the last call returns or raises")


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """The result of `call`.

    The timeout of a request itself is not enough: it begins again with each address, and does not count the look-up
    of the name.

    Raises:
        TimeoutError: the call takes longer; it goes on in a thread of its own.
    """
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    first = min(seconds, SILENT_SECONDS)
    if not wait([future], timeout=first).done and seconds > first:
        note(f"note: the hub has not answered for {first:g} seconds; waiting up to {seconds:g}.")
        wait([future], timeout=seconds - first)
    if not future.done():
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    return future.result()


def _of_answer(status: int, error: BaseException) -> Trouble:
    headers = error.response.headers  # type: ignore[attr-defined]
    after = str(headers.get("Retry-After", "")).strip()
    pause = float(after) if after.isdecimal() else None
    if status == TOO_MANY:
        asked = f", and asks to wait {pause:g} seconds" if pause else ""
        return Trouble(f"the hub answers {status}, too many requests{asked}", True, status, pause)
    passing = status >= 500 or status == HTTPStatus.REQUEST_TIMEOUT
    known = status in HTTPStatus._value2member_map_
    return Trouble(
        f"the hub answers {status}" + (f" ({HTTPStatus(status).phrase})" if known else ""), passing, status, pause
    )


def _host() -> str:
    return constants.ENDPOINT.partition("://")[2] or constants.ENDPOINT
