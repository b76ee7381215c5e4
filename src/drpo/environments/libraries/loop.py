"""One event loop in a thread of its own, for libraries whose environments are coroutines."""

import asyncio
import inspect
import threading
from collections.abc import Coroutine
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")


@lru_cache(maxsize=1)
def event_loop() -> asyncio.AbstractEventLoop:
    """Return this process's loop, running; it ends with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="environments", daemon=True).start()
    return loop


def settled(value: Any) -> Any:
    """Return a method's value, after waiting for it where the method is a coroutine.

    Example:
        >>> settled(3), settled(asyncio.sleep(0, 4))
        (3, 4)
    """
    return wait_for(value) if inspect.iscoroutine(value) else value


def wait_for(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in the loop and return its value, whether or not the caller is in a loop of its own.

    Example:
        >>> wait_for(asyncio.sleep(0, "done"))
        'done'
    """
    return asyncio.run_coroutine_threadsafe(coroutine, event_loop()).result()
