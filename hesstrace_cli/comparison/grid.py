"""The runs of a comparison: planned, and run one by one or side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from hesstrace_cli.comparison.found import CHOSEN, PLANNED, Found
from hesstrace_cli.config import CompareConfig, Row, TrainConfig, key_of
from hesstrace_cli.errors import ConfigError, HesstraceError, NumericsError, Stopped
from hesstrace_cli.storage.files import clear_leftovers, leftovers, write_atomically
from hesstrace_cli.storage.locks import FolderLock
from hesstrace_cli.storage.records import EQUAL_TIME, read_diverged
from hesstrace_cli.storage.runs import RunFolder, default_folder

_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
_OF_A_RUN = {"reg", "lambda_", "seed", "out", "resume", "resume_or_start"}


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One cell of the grid.

    Attributes:
        entry: The number of its row in the table; runs of several strengths may share one.
        regularizer: The row's canonical name.
        config: The run's own config, in its folder.
        until: The epoch to train it to for now; None for its end.
    """

    entry: int
    regularizer: str
    config: TrainConfig
    until: int | None = None

    @property
    def folder(self) -> RunFolder:
        """Where it goes."""
        assert self.config.out is not None
        return RunFolder(Path(self.config.out))

    @property
    def epochs(self) -> int:
        """Of the run."""
        return self.config.effective().epochs

    @property
    def diverged(self) -> Path:
        """The note that this run stopped with a loss that is not finite."""
        return self.folder.path / "diverged.json"

    @property
    def done(self) -> bool:
        """Whether it is finished, or has diverged, or is where it is to be left for now."""
        ended = self.folder.summary() is not None or self.diverged.is_file()
        return ended or (self.until is not None and self.epochs_done() >= self.until)

    def epochs_done(self) -> int:
        """Epochs done."""
        file = self.folder.metrics
        return len(file.read_text().splitlines()) if file.is_file() else 0


def root(config: CompareConfig) -> Path:
    """The comparison's folder."""
    return Path(config.out or "comparisons/compare")


def lock(folder: Path, own: Collection[str] = ("runs", PLANNED, EQUAL_TIME)) -> FolderLock:
    """Make a comparison's folder and keep others out of it.

    Args:
        folder: Where it is.
        own: Of these at least one is in the folder of one that was begun.

    Raises:
        ConfigError: If it cannot be made, holds other things, or another process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FolderLock(folder)
        files = {file.name for file in folder.iterdir()} - {file.name for file in leftovers(folder)}
        if files and not files & {*own}:
            raise ConfigError(
                f"--out {str(folder)!r} is not empty and holds nothing that this command began; "
                "choose another folder"
            )
        clear_leftovers(folder)
    except OSError as problem:
        raise ConfigError(f"--out {str(folder)!r} cannot be used: {problem.strerror}") from problem
    return held


def plan(config: CompareConfig) -> list[PlannedRun]:
    """The runs of the grid: for a seed, every row has the same initial weights and data order."""
    own = {item.name for item in dataclasses.fields(TrainConfig)}
    common = {k: getattr(config, k) for k in own - _OF_A_RUN}
    runs = [
        _planned(config, {**common, "dataset": dataset, "model": model}, entry, row, seed)
        for dataset in config.dataset.split(",")
        for model in config.model.split(",")
        for seed in config.seeds
        for entry, candidates in enumerate(config.candidates())
        for row in candidates
    ]
    places: dict[str | None, PlannedRun] = {}
    for run in runs:
        other = places.setdefault(run.config.out, run)
        if other is not run:
            raise ConfigError(
                f"two runs would go to {run.config.out!r}: {_label(other)} and {_label(run)}; "
                "rename one of their files"
            )
    return runs


def _label(run: PlannedRun) -> str:
    return f"{run.config.dataset} {run.config.model} {run.regularizer}"


def _planned(
    config: CompareConfig, settings: dict[str, Any], entry: int, row: Row, seed: int
) -> PlannedRun:
    run = TrainConfig(**settings, reg=[row.name], seed=seed)
    folder = default_folder(run, str(root(config) / "runs"))
    return PlannedRun(entry, row.name, dataclasses.replace(run, out=str(folder)))


def arguments(config: TrainConfig) -> list[str]:
    """The command line of `hesstrace` that trains this run, complete, and resumes it if begun."""
    words = ["train"]
    for item in dataclasses.fields(config):
        value, flag = getattr(config, item.name), "--" + key_of(item.name)
        default = item.default_factory() if callable(item.default_factory) else item.default
        always = item.name in ("reg", "seed", "out", "dataset", "model")
        if (
            item.name in ("resume", "resume_or_start")
            or (value == default and not always)
            or value is None
        ):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{key_of(item.name)}")
        elif isinstance(value, dict):
            words += [w for k, v in value.items() for w in (flag, f"{k}={v}")]
        elif isinstance(value, list):
            words += [flag, ",".join(str(v) for v in value)]
        else:
            words += [flag, str(value)]
    return [*words, "--resume-or-start"]


def pending(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that are not done, those begun already to be resumed.

    Raises:
        ConfigError: If a run's folder holds one with other settings.
    """
    for run in runs:
        if run.folder.settings.is_file():
            run.folder.check_same(run.config)
    return [
        dataclasses.replace(run, config=dataclasses.replace(run.config, resume_or_start=True))
        for run in runs
        if not run.done
    ]


def note_divergence(run: PlannedRun, problem: str) -> None:
    """Leave a note in the run's folder, so that its row says so and it is not tried again."""
    config = run.config
    note = {
        "dataset": config.dataset,
        "model": config.model,
        "regularizers": run.regularizer,
        "seed": config.seed,
        "reason": problem,
    }
    write_atomically(run.diverged, json.dumps(note, indent=2) + "\n")


def results(runs: Sequence[PlannedRun]) -> Found:
    """What came of the runs, all of which have ended."""
    finished = [
        {**summary, "folder": run.config.out}
        for run in runs
        if (summary := run.folder.summary()) is not None
    ]
    diverged = [
        {**read_diverged(run.diverged), "folder": run.config.out}
        for run in runs
        if run.diverged.is_file() and run.folder.summary() is None
    ]
    return Found(finished, diverged, [])


def write_planned(folder: Path, runs: Sequence[PlannedRun]) -> None:
    """Note all runs, so that a table of those finished can say how many there are to be.

    What an earlier comparison in the folder has chosen holds no longer where runs are pending.
    """
    planned = {
        str(run.folder.path.relative_to(folder)): {
            "dataset": run.config.dataset,
            "model": run.config.model,
            "regularizers": run.regularizer,
            "seed": run.config.seed,
        }
        for run in runs
    }
    write_atomically(folder / PLANNED, json.dumps(planned, indent=2) + "\n")
    if not all(run.done for run in runs):
        (folder / CHOSEN).unlink(missing_ok=True)


@dataclasses.dataclass
class Job:
    """A run in a process of its own.

    Attributes:
        run: What it trains.
        process: The process; its messages go to `train.log` beside the run's folder.
        began: When it began.
    """

    run: PlannedRun
    process: subprocess.Popen[bytes]
    began: float

    @property
    def log(self) -> Path:
        """Its messages."""
        return _log_of(self.run)

    def end(self) -> None:
        """Wait for it; only then let go of the pipe that ties it to this process."""
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def _log_of(run: PlannedRun) -> Path:
    path = run.folder.path
    return path.with_name(path.name + ".log")


def _start(run: PlannedRun, slot: int, jobs: int) -> Job:
    environment = dict(os.environ)
    devices = [d for d in environment.get("CUDA_VISIBLE_DEVICES", _all_gpus()).split(",") if d]
    if devices and run.config.device in ("auto", "cuda"):
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // jobs)))
    try:
        _log_of(run).parent.mkdir(parents=True, exist_ok=True)
        log = os.open(_log_of(run), _APPEND, 0o666)
    except OSError as problem:
        raise ConfigError(
            f"{str(_log_of(run))!r} cannot be written: {problem.strerror}"
        ) from problem
    words = arguments(run.config)
    if run.until is not None:
        words = ["train-until", str(run.until), *words[1:]]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "hesstrace_cli.cli.job", *words],
            stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(log)
    return Job(run, process, time.monotonic())


def _all_gpus() -> str:
    import torch

    return ",".join(map(str, range(torch.cuda.device_count())))


def run_side_by_side(
    runs: Sequence[PlannedRun],
    jobs: int,
    on_change: Callable[[list[Job], int], None],
    should_stop: Callable[[], int | None],
) -> Iterator[tuple[PlannedRun, str | None]]:
    """Train the runs, so many at a time; the free slot's GPU gets the next one.

    Args:
        runs: What is pending.
        jobs: How many at a time.
        on_change: Told the jobs at work and the number of those waiting, now and then.
        should_stop: A signal number stops the jobs, which save, and then this.

    Yields:
        Each run as it ends, with None, or with the problem where it diverged.

    Raises:
        HesstraceError: If a run failed for another reason, after the others have ended.
        Stopped: After all jobs have saved.
    """
    waiting, slots = list(runs), dict[int, Job]()
    failed: tuple[PlannedRun, int] | None = None
    try:
        while slots or (waiting and failed is None):
            number = should_stop()
            if number is not None:
                raise Stopped(f"stopped by signal {number}; the runs have saved", number)
            for slot in range(jobs):
                if slot not in slots and waiting and failed is None:
                    slots[slot] = _start(waiting.pop(0), slot, jobs)
            time.sleep(0.2)
            for slot, job in list(slots.items()):
                code = job.process.poll()
                if code is None:
                    continue
                slots.pop(slot).end()
                if code == NumericsError.exit_code:
                    yield job.run, _last_line(job.log)
                elif code == 0 and job.run.done:  # code of the user's may end it with 0
                    yield job.run, None
                else:
                    failed = failed or (job.run, code)
            on_change(list(slots.values()), len(waiting))
    finally:
        for job in slots.values():
            job.process.send_signal(signal.SIGTERM)
        for job in slots.values():
            job.end()
    if failed is not None:
        run, code = failed
        problem = HesstraceError(f"{run.config.out} failed: {_last_line(_log_of(run))}")
        problem.exit_code = code if code > 0 else 1
        raise problem


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return lines[-1] if lines else "no message"
