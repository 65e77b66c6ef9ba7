"""Jobs of several processes without a launcher: one start for many questions."""

from __future__ import annotations

import os
import socket
import time
import traceback
import warnings

import torch
import torch.multiprocessing

from hesstrace_cli.distributed import parallel


def run_job(size, work, folder, *, seconds=600):
    """What `work(rank, ports)` gives in each of so many processes, in order.

    Args:
        size: How many there are.
        work: A function of a module; it calls `joined` for a group of as many or fewer.
        folder: Where the results pass through.
        seconds: A job that takes longer hangs, and fails.
    """
    context = torch.multiprocessing.get_context("spawn")
    ports = [_free_port() for _ in range(size + 1)]
    processes = [
        context.Process(target=_run, args=(rank, work, folder, ports)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    problems = [file.read_text() for file in sorted(folder.glob("problem*"))]
    assert not problems, "\n".join(problems)
    assert not late, f"{len(late)} of {size} processes hang"
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(size)]


def joined(rank, size, ports):
    """Make the process one of a group of so many, in place of the one it was in."""
    parallel.leave()
    parallel.join.cache_clear()
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(number) for name, number in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[size]))
    return parallel.join(torch.device("cpu"))


def _run(rank, work, folder, ports):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    os.chdir(folder)
    try:
        result = work(rank, ports)
        parallel.leave()
        torch.save(result, folder / f"result{rank}")
    except BaseException:
        (folder / f"problem{rank}").write_text(f"process {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
