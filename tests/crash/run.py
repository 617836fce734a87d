#!/usr/bin/env python3
"""Kill trainings at random and at each kind of file operation, damage their files, fill their disk; then resume them.

python tests/crash/run.py --rounds 100 --seed 1

After each kill the best model must be whole, for plain transformers too, and nothing that others wrote is touched. A
resumed run must end with the weights of an undisturbed one, to the bit. Exit code 1 if anything was lost or differs.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]
os.environ.update(
    OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", MPLBACKEND="Agg", HF_HUB_VERBOSITY="error"
)

from damage import cut_short, delete, empty, flip_bit, make_file, make_folder  # noqa: E402
from faults import OPERATIONS, Watch, kill_at_write, no_room  # noqa: E402
from rig import Ended, Rig, phase, prepare_for_forks  # noqa: E402

from vlm.config import LOCK, MANIFEST, STATE  # noqa: E402

KILLS = ("random time", *OPERATIONS)
LEFT_AT_THE_END = (STATE, LOCK, f".{MANIFEST}.")
DAMAGES = (flip_bit, cut_short, empty, delete, make_folder)


class Table:
    """Counts what happened, and what it led to."""

    def __init__(self) -> None:
        self.kills: Counter[tuple[str, str]] = Counter()
        self.problems: list[str] = []
        self.rounds = self.others = 0

    def show(self) -> str:
        phases = ("set-up", "training", "test", "the end")
        lines = [f"{'killed at':<14}" + "".join(f"{name:>10}" for name in phases)]
        for kind in KILLS:
            lines.append(f"{kind:<14}" + "".join(f"{self.kills[kind, name]:>10}" for name in phases))
        total = sum(self.kills.values())
        lost = sum("lost" in problem for problem in self.problems)
        lines.append(
            f"\n{self.rounds} rounds, {total} kills, {self.others} times damaged or without room: "
            f"{len(self.problems) - lost} differences, {lost} losses"
        )
        return "\n".join([*lines, *self.problems])


class Round:
    """One output folder: the run in it is disturbed some times, and must then end as the undisturbed one did."""

    def __init__(self, rig: Rig, table: Table, number: int, chance: random.Random) -> None:
        self.rig, self.table, self.number, self.chance = rig, table, number, chance
        self.output = rig.output(f"round_{number}")

    def problem(self, kind: str, text: str) -> None:
        self.table.problems.append(f"round {self.number}, {kind}: {text}")

    def kill(self, kind: str, share: float = 1.0) -> None:
        """Run until a kill of this kind, if it comes to it.

        Args:
            share: of the undisturbed run's operations of this kind, that within which it is killed.
        """
        if phase(self.output) == "the end":
            return
        had_model = (self.output / "best_model").exists()
        unbroken = self.rig.unbroken
        if kind == "random time":
            ended = self.rig.start(self.output, kill_after=self.chance.uniform(0, unbroken.seconds))
        elif kind == "write":
            size = self.chance.randrange(1000, unbroken.largest)
            ended = self.rig.start(self.output, lambda output: kill_at_write(size))
        else:
            number = self.chance.randint(1, max(1, round(unbroken.counts.get(kind, 1) * share)))
            ended = self.rig.start(self.output, partial(Watch, kind=kind, number=number))
        if ended.code < 0:
            self.table.kills[kind, phase(self.output)] += 1
        else:
            self.check_exit(kind, ended, 0)
        for loss in self.rig.losses(self.output, had_model):
            self.problem(kind, f"lost: {loss}")

    def fill_disk(self) -> None:
        """Run without room for the larger files: the run goes on, and says at its end what is missing."""
        size = self.chance.randrange(5_000, self.rig.unbroken.largest)
        had_model = (self.output / "best_model").exists()
        ended = self.rig.start(self.output, lambda output: no_room(size))
        self.table.others += 1
        self.check_exit("no room", ended, 1)
        if "could not be" not in ended.text and "cannot be" not in ended.text:
            self.problem("no room", f"nothing is said: {ended.text[-300:]}")
        for loss in self.rig.losses(self.output, had_model):
            self.problem("no room", f"lost: {loss}")

    def damage(self) -> None:
        """Damage a file of the newest state, or of the cache: the one before is used, or it is computed again."""
        state = self.output / "resume_state"
        older = self.output / "resume_state_previous"
        of_state = [*state.iterdir(), state] if state.is_dir() and older.is_dir() else []
        of_cache = list((self.output.parent / "cache").rglob("*.safetensors"))
        groups = [sorted(files) for files in (of_state, of_cache) if files]
        if not groups:
            return
        self.table.others += 1
        file = self.chance.choice(self.chance.choice(groups))
        change: Callable[[Path], None] = make_file if file == state else self.chance.choice(DAMAGES)
        change(file)

    def finish(self) -> None:
        """Resume to the end, and compare."""
        kind = "to the end"
        # Then its states, its lock and a half written list of its files may be there still, and nobody needs them.
        was_finished = phase(self.output) == "the end"
        if not was_finished:
            ended = self.rig.start(self.output)
            self.check_exit(kind, ended, 0)
            if ended.code:
                return
        for loss in self.rig.losses(self.output, had_model=True):
            self.problem(kind, f"lost: {loss}")
        for difference in self.rig.differences(self.output, allowed=LEFT_AT_THE_END if was_finished else ()):
            self.problem(kind, difference)
        self.table.rounds += 1
        shutil.rmtree(self.output.parent)

    def check_exit(self, kind: str, ended: Ended, expected: int) -> None:
        if ended.code != expected or "Traceback" in ended.text or "a mistake of the program" in ended.text:
            self.problem(kind, f"exit code {ended.code} instead of {expected}: {ended.text[-600:]}")


def rounds(rig: Rig, table: Table, count: int, chance: random.Random) -> None:
    """Rounds of one to three disturbances each, of which every kind comes up."""
    kinds = [kind for kind in KILLS if kind == "random time" or kind == "write" or rig.unbroken.counts.get(kind)]
    for number in range(count):
        current = Round(rig, table, number, chance)
        current.kill(kinds[number % len(kinds)])
        if chance.random() < 0.5:
            current.damage()
            current.kill(chance.choice(kinds), share=0.5)
        if chance.random() < 0.2 and phase(current.output) != "the end":
            current.fill_disk()
        current.finish()
        print(f"\r{number + 1} of {count} rounds, {len(table.problems)} problems", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def short(rig: Rig, table: Table, chance: random.Random) -> None:
    """Every kind of kill once, in few rounds; one round without room; one with damaged files."""
    kinds = [kind for kind in OPERATIONS if kind != "link" and (kind == "write" or rig.unbroken.counts.get(kind))]
    chance.shuffle(kinds)
    # Links are made in the test, after which no other kind is left.
    for number, some in enumerate((kinds[:5], [*kinds[5:], "link"], ["random time"], ["random time"])):
        current = Round(rig, table, number, chance)
        for kind in some:
            current.kill(kind, share=0.1)
            current.damage()
        current.finish()
    current = Round(rig, table, len(kinds), chance)
    current.fill_disk()
    current.finish()


def full_tmpfs(rig: Rig, table: Table) -> None:
    """A disk that is really full, if this user may mount one: the run goes on, and after room is made it ends."""
    with tmpfs(rig.folder / "disk") as disk:
        if disk is None:
            print("no right to mount a small disk: left out", file=sys.stderr)
            return
        current = Round(rig, table, -1, random.Random(0))
        current.output = disk / "out"
        shutil.copytree(rig.output("foreign"), current.output)
        resize(disk, 400)
        had_model = (current.output / "best_model").exists()
        current.check_exit("full disk", rig.start(current.output), 1)
        for loss in rig.losses(current.output, had_model):
            current.problem("full disk", f"lost: {loss}")
        table.others += 1
        resize(disk, 65536)
        current.output.parent.joinpath("printed.txt").unlink(missing_ok=True)
        ended = rig.start(current.output)
        current.check_exit("full disk", ended, 0)
        for difference in rig.differences(current.output):
            current.problem("full disk", difference)
        table.rounds += 1


@contextmanager
def tmpfs(folder: Path) -> Iterator[Path | None]:
    """A small disk in memory; None if it cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def resize(folder: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="how many output folders (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--tune", default="full", choices=("full", "lora"), help="what is trained (default: full)")
    parser.add_argument("--short", action="store_true", help="every kind of kill once instead of --rounds")
    options = parser.parse_args()
    prepare_for_forks()
    table, chance = Table(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="vlm_crash_") as folder:
        rig = Rig(Path(folder) / "rig", options.tune)
        print(f"undisturbed: {rig.unbroken.seconds:.1f} s, {dict(rig.unbroken.counts)}", file=sys.stderr)
        if options.short:
            short(rig, table, chance)
        else:
            rounds(rig, table, options.rounds, chance)
        full_tmpfs(rig, table)
    print(table.show())
    return 1 if table.problems else 0


if __name__ == "__main__":
    sys.exit(main())
