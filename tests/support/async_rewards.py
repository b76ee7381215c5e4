"""Async rewards, good and bad ones; a module of its own, because the pool's processes import it."""

import asyncio
import os
import time

from drpo.types import RewardResult

VALUES = {"none": None, "nan": float("nan"), "string": "yes", "parts": RewardResult(0.5, {"style": 2.0})}
in_flight = 0


async def obey(problem, text):
    """Do what the text says; else return how many calls are in flight while this one waits."""
    global in_flight
    if text == "raise":
        raise ValueError("no verdict")
    if text == "wait":
        await asyncio.sleep(1000)
    if text == "late":
        raise TimeoutError("the database")
    if text == "block":
        time.sleep(1000)
    if text == "exit":
        os._exit(3)
    if text in VALUES:
        return VALUES[text]
    in_flight += 1
    await asyncio.sleep(0.05)
    most, in_flight = in_flight, in_flight - 1
    return most


obey.concurrency = 4


class Slow:
    """Of a class: its call is async."""

    async def __call__(self, problem, transcript):
        await asyncio.sleep(0)
        return float(transcript.n_tokens)
