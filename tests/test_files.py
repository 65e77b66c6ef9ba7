"""Files are written whole, under names that nobody knows, and never over what was read."""

from __future__ import annotations

import os
import stat
import sys

import matplotlib.figure
import pytest

from hesstrace_cli.comparison import grid
from hesstrace_cli.config import CompareConfig
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.reporting import plots
from hesstrace_cli.storage import files
from hesstrace_cli.storage.files import clear_leftovers, leftovers, write_atomically
from hesstrace_cli.storage.locks import FolderLock
from tests.conftest import TINY, assert_one_line_error, invoke

LEFT = ".hesstrace-0123456789abcdef.tmp"


def test_permissions_are_those_of_the_umask_or_of_the_file_before(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "new", "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o600)
    write_atomically(tmp_path / "new", b"b")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    assert (tmp_path / "new").read_bytes() == b"b"


def test_a_temporary_name_is_not_written_through(tmp_path, monkeypatch):
    """Even one that was guessed: a link that stands there is an error, its target untouched."""
    (tmp_path / "target").write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0123456789abcdef")
    (tmp_path / LEFT).symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="File exists"):
        write_atomically(tmp_path / "x", "new")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "x").exists()


def test_names_differ_each_time(tmp_path):
    seen = []

    def content(_file):
        seen.extend(file.name for file in leftovers(tmp_path))

    for _ in range(3):
        write_atomically(tmp_path / "x", content)
    assert len(set(seen)) == 3


@pytest.mark.parametrize("problem", [OSError(28, "full"), KeyboardInterrupt, SystemExit])
def test_whatever_stops_a_write_leaves_the_old_file_alone(tmp_path, problem):
    (tmp_path / "x").write_text("old")

    def content(file):
        file.write(b"half")
        raise problem

    with pytest.raises((ConfigError, KeyboardInterrupt, SystemExit)):
        write_atomically(tmp_path / "x", content)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_plot_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "p.png").write_text("old")
    figure = matplotlib.figure.Figure()

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ConfigError, match="No space"):
        plots.save(figure, str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_text() == "old"
    monkeypatch.undo()
    plots.save(figure, str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_leftovers_are_known_by_their_whole_name_and_by_nobody_writing_them(tmp_path):
    others = [".x.tmp12", f"{LEFT}.bak", LEFT.upper(), "a.tmp", ".hesstrace-notes.tmp"]
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / "real").write_text("precious")
    (tmp_path / LEFT.replace("0", "1")).symlink_to(tmp_path / "real")
    (tmp_path / LEFT).write_text("half")

    def content(_file):
        clear_leftovers(tmp_path)  # by another process, while this file is written

    write_atomically(tmp_path / "x", content)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {*others, "real", LEFT.replace("0", "1"), "x"}


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize("more", [[], ["--resume"], ["--resume-or-start"]])
def test_a_refused_folder_is_as_it_was(tmp_path, command, more):
    if command == "compare" and more == ["--resume"]:
        pytest.skip("compare decides itself")
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in (".x.tmp12", LEFT, "thesis.txt", "results.json"):
        (folder / name).write_text("mine")
    result = invoke(command, *TINY, "--out", folder, *more)
    assert result.exit_code == 2
    assert {file.name: file.read_text() for file in folder.iterdir()} == dict.fromkeys(
        (".x.tmp12", LEFT, "thesis.txt", "results.json"), "mine"
    )


def test_a_folder_in_use_is_as_it_was(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / LEFT).write_text("half")
    lock = FolderLock(tmp_path / "r")
    assert_one_line_error(invoke("train", *TINY, "--out", "r"), 2, "in use")
    assert (tmp_path / "r" / LEFT).is_file()
    lock.release()


def test_the_log_of_a_job_is_not_written_through_a_link(tmp_path):
    config = CompareConfig(reg=["none"], seeds=[0], out=str(tmp_path / "c"))
    (run,) = grid.plan(config)
    (tmp_path / "target").write_text("precious")
    (tmp_path / "c" / "runs").mkdir(parents=True)
    grid._log_of(run).symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError, match="cannot be written"):
        grid._start(run, 0, 1)
    assert (tmp_path / "target").read_text() == "precious"


QUICK = ["--method", "hutchinson", "--num-probes", "1", "--num-examples", "16"]


@pytest.mark.parametrize("way", ["same", "link", "hard link", "other path"])
@pytest.mark.parametrize("read", ["checkpoint", "config", "data", "run"])
@pytest.mark.parametrize("command", ["estimate-trace", "spectrum"])
def test_what_is_read_is_not_written_over(tmp_path, checkpoint, command, read, way):
    (tmp_path / "r").mkdir()
    file = tmp_path / "r" / {"checkpoint": "x.pt", "run": "best.pt"}.get(read, "x.npz")
    file.write_bytes(checkpoint.read_bytes())
    (tmp_path / "r" / "config.yaml").write_text("seed: 0\n")
    arguments = {
        "checkpoint": [file], "config": [checkpoint, "--config", file],
        "data": [checkpoint, "--dataset", file], "run": [checkpoint],
    }[read]  # fmt: skip
    if read == "config":
        file.write_text("seed: 0\n")
    before, place = file.read_bytes(), file
    if way == "link":
        place = tmp_path / "r" / "link"
        place.symlink_to(file)
    elif way == "hard link":
        place = tmp_path / "r" / "hard"
        place.hardlink_to(file)
    elif way == "other path":
        place = tmp_path / "r" / ".." / "r" / file.name
    result = invoke(command, *arguments, *(QUICK if command == "estimate-trace" else []),
                    "--json", place)  # fmt: skip
    if read == "run" and way == "hard link":  # the run's own stays
        assert file.read_bytes() == before
        return
    assert_one_line_error(result, 2, "another file")
    assert file.read_bytes() == before


@pytest.fixture
def in_deleted_folder(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    yield
    os.chdir(tmp_path)  # where monkeypatch can leave from


RELATIVE = {
    "json": (2, ["estimate-trace", "{}", *QUICK, "--json", "x.json"]),
    "plot": (2, ["estimate-trace", "{}", *QUICK, "--plot", "x.png"]),
    "run": (2, ["train", *TINY]),
    "comparison": (2, ["compare", *TINY, "--seeds", "0"]),
    "records": (2, ["compare", "somewhere"]),
    "settings": (2, ["verify", "--config", "c.yaml"]),
    "checkpoint": (4, ["estimate-trace", "last.pt"]),
    "start": (4, ["train", *TINY, "--init", "last.pt", "--out", "/nowhere/r"]),
    "plug-in": (4, ["verify", "--model", "m.py:build"]),
    "module": (4, ["verify", "--model", "no_such_module:build"]),
    "arrays": (3, ["verify", "--dataset", "d.npz"]),
    "images": (3, ["verify", "--dataset", "imagefolder:d"]),
    "data": (3, ["verify", "--dataset", "mnist", "--data-dir", "data"]),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_a_current_folder_that_has_been_deleted_holds_nothing(
    in_deleted_folder, monkeypatch, checkpoint, name
):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # as a console script has it
    code, command = RELATIVE[name]
    result = invoke(*(str(checkpoint) if word == "{}" else word for word in command))
    assert result.exit_code in (code, 2), (result.output, result.exception)
    assert_one_line_error(result, result.exit_code)


def test_and_other_folders_are_used_from_there(in_deleted_folder, tmp_path, checkpoint):
    place = tmp_path / "x.json"
    place.write_text("old")
    result = invoke("estimate-trace", checkpoint, *QUICK, "--json", place)
    assert result.exit_code == 0, result.output
    assert place.read_text() != "old"


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_link_in_a_circle_is_no_place(tmp_path, checkpoint, flag):
    (tmp_path / "x.png").symlink_to("x.png")
    result = invoke("estimate-trace", checkpoint, *QUICK, flag, "x.png")
    assert_one_line_error(result, 2, "cannot be written")
