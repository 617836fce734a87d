"""One run at a time in an output folder."""

import json
import os
import platform
import signal
import subprocess
import sys
from threading import Thread

import pytest
from commands import ROOT, names_in

from vlm.common.errors import UsageError
from vlm.config import LOCK
from vlm.training import lock
from vlm.training.lock import check_unlocked, locked

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from vlm.training.lock import locked
with locked(Path(sys.argv[1])):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""


def write_lock(folder, host, process=4711):
    (folder / LOCK).write_text(json.dumps({"process": process, "host": host, "started": "2026-11-28 09:00:00"}))


def test_another_run_is_refused_until_the_process_has_died_even_if_its_children_live_on(tmp_path, capsys):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        child = int(run.stdout.readline())
        said = (
            rf"{tmp_path} is in use by process {run.pid} on this machine, since 20..-..-.. ..:..:..: wait until it ends"
        )
        for take in (lambda: check_unlocked(tmp_path), lambda: locked(tmp_path).__enter__()):
            with pytest.raises(UsageError, match=said):
                take()
        run.kill()
        run.wait()
        assert LOCK in names_in(tmp_path)
        check_unlocked(tmp_path)
        with locked(tmp_path):
            assert f"was killed (process {run.pid} on this machine, since 20" in capsys.readouterr().err
        os.kill(child, signal.SIGKILL)
    assert names_in(tmp_path) == set()


def test_a_thread_of_the_same_process_is_refused_too(tmp_path):
    found = []

    def other():
        try:
            with locked(tmp_path):
                found.append("taken")
        except UsageError as error:
            found.append(str(error))

    with locked(tmp_path):
        thread = Thread(target=other)
        thread.start()
        thread.join()
    assert f"in use by process {os.getpid()}" in found[0]
    other()
    assert found[1:] == ["taken"]


def test_the_lock_of_another_machine_is_respected(tmp_path):
    write_lock(tmp_path, "elsewhere")
    said = f"in use by process 4711 on elsewhere, since 2026-11-28 09:00:00: .* If it was killed, delete .*{LOCK}"
    for take in (lambda: check_unlocked(tmp_path), lambda: locked(tmp_path).__enter__()):
        with pytest.raises(UsageError, match=said):
            take()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"process": "x", "host": "elsewhere", "started": ""}'])
def test_a_damaged_lock_is_taken(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_on_a_file_system_without_locks_what_the_file_says_counts(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    write_lock(tmp_path, platform.node(), os.getppid())
    with pytest.raises(UsageError, match=f"in use by process {os.getppid()} .* or delete .*{LOCK}"), locked(tmp_path):
        pass
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    write_lock(tmp_path, platform.node(), ended.pid)
    with locked(tmp_path):
        pass


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("text")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="cannot be written"), locked(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "text"
