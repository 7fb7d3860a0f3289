"""A bounded number of jobs on threads, their results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    job: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result, None, None]:
    """Yield job(item) for every item, in order, computed by some threads ahead of the consumer.

    Each thread computes single-threaded. Items are drawn by the consumer's thread, and at most
    2 · `threads` + 1 of them are under way, so memory does not depend on their number. A job's
    exception is raised here. Closing the generator waits for the jobs that are running only.
    """
    own_threads = torch.get_num_threads()
    # set_num_threads(1) in a worker thread may reach this one too, hence the restoring.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(job, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(own_threads)
