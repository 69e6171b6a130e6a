"""Errors of the installed torch and gloo when another rank is gone."""

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from ports import free_port
from torch import distributed

from runtime.distributed import lost_a_rank


def rank(number: int, port: int, end: str, answers: Any) -> None:
    store = distributed.TCPStore("127.0.0.1", port, 2, number == 0, timedelta(seconds=20))
    distributed.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=timedelta(seconds=3))
    distributed.all_reduce(torch.ones(1))
    if number == 1:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL if end == "killed" else signal.SIGSTOP)
    try:
        if end == "own error":
            torch.ones(2) @ torch.ones(3)
        for _ in range(1000):
            distributed.all_reduce(torch.ones(1))
    except RuntimeError as error:
        answers.put((lost_a_rank(error), str(error)))
    os._exit(0)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("end", "lost"), [("killed", True), ("stopped", True), ("own error", False)])
def test_a_lost_rank_differs_from_an_own_error(end: str, lost: bool) -> None:
    context = torch.multiprocessing.get_context("fork")
    port, answers = free_port(), context.SimpleQueue()
    children = [context.Process(target=rank, args=(number, port, end, answers)) for number in (0, 1)]
    for child in children:
        child.start()
    try:
        found, text = answers.get()
        assert found == lost, text
    finally:
        for child in children:
            child.kill()
            child.join()
