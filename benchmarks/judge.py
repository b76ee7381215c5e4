"""Seconds of an update with 200 slow calls of a judge in flight, and without: `python -m benchmarks.judge`."""

import argparse
import json
import multiprocessing
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from drpo.recipes import find
from drpo.rewards import Reward, in_process
from drpo.rewards.judge import HttpReward
from drpo.train.config import configure
from drpo.train.loop import train
from drpo.train.records import METRICS, TIMING, read_records
from drpo.types import Problem

PROMPTS, SAMPLES = 25, 8


@in_process
def parity(problem: Problem, text: str) -> float:
    """Return the score that the service gives."""
    return float(len(text) % 2)


def serve(port: "Connection[int, int]", seconds: float) -> None:
    """Score every completion after some seconds; does not return."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            time.sleep(seconds)
            answer = json.dumps({"score": len(body["completion"]) % 2}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size, daemon_threads = 512, True

    server = Server(("127.0.0.1", 0), Handler)
    port.send(server.server_port)
    server.serve_forever()


def update_seconds(reward: Reward, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each update but the first, and how many scores each step was asked for.

    The next step's completions are sampled and scored on another thread while this step's update is made.
    """
    run = configure(
        find("smoke"), reward=reward, steps=steps, prompts=PROMPTS, updates=1, eval_problems=0, async_steps=1,
        overlap=True, dynamic_sampling=1, **{"sampling.samples": SAMPLES, "sampling.max_new_tokens": 24},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(run, Path(folder) / "run", keep_model=False)
        timing, metrics = (read_records(Path(folder) / "run" / name) for name in (TIMING, METRICS))
    updates = [record["update"] for record in timing if "update" in record]
    return updates[1:], [record.get("endpoint_calls", 0) for record in metrics]


def main() -> None:
    """Print the median of each, taken in turns."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--steps", type=int, default=5)
    asked.add_argument("--seconds", type=float, default=2.0, help="that the judge takes for each call")
    options = asked.parse_args()
    here, there = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there, options.seconds), daemon=True)
    server.start()
    judge = HttpReward(f"http://127.0.0.1:{here.recv()}", concurrency=PROMPTS * SAMPLES)
    without: list[float] = []
    in_flight: list[float] = []
    calls: list[float] = []
    for _ in range(options.rounds):
        without += update_seconds(parity, options.steps)[0]
        seconds, n_calls = update_seconds(judge, options.steps)
        in_flight += seconds
        calls += n_calls
    server.terminate()
    print(f"an update without a judge          {1000 * median(without):7.1f} ms")
    print(f"with {PROMPTS * SAMPLES} calls of {options.seconds:g} s in flight     {1000 * median(in_flight):7.1f} ms")
    print(
        f"ratio {median(in_flight) / median(without):.3f}, of {len(in_flight)} updates; {median(calls):g} calls a step"
    )


if __name__ == "__main__":
    main()
