"""Results of coroutines: where nobody else awaits them, of rewards that TRL would await, and for many processes by one."""

import asyncio
import concurrent.futures
import inspect
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from lwzlib.base.rows import RunError

Result = TypeVar("Result")


def finished(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Result of the coroutine, in a notebook too, where a loop runs already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def scores_of(reward: Callable, **columns) -> list:
    """Scores of a reward with TRL's signature, also of one that is to be awaited."""
    scores = reward(**columns)
    return finished(scores) if inspect.iscoroutine(scores) else scores


async def from_main(ask: Callable[[list], Awaitable[list]], own: list) -> list:
    """A result for each of this process's items: the main process alone awaits `ask`(the items of all processes, in their
    order). Every process must call it; what is raised there is raised by all of them."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return await ask(own)
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    state, problem = PartialState(), None
    if state.device.type == "cuda":
        torch.cuda.set_device(state.device)  # each thread has its own, and TRL awaits rewards in another than it trains in
    parts = gather_object([own])
    answer: list[Any] = [None, ""]  # the results, and what kept the main process from them
    if state.is_main_process:
        try:
            answer[0] = await ask([item for part in parts for item in part])
        except Exception as error:  # the others would wait for it until their time is out
            problem, answer[1] = error, f"in the main process, {type(error).__name__}: {error}"
    broadcast_object_list(answer)
    if problem:
        raise problem
    if answer[1]:
        raise RunError(answer[1])
    start = sum(map(len, parts[: state.process_index]))
    return answer[0][start : start + len(own)]
