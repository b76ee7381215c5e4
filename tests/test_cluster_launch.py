"""The launchers of cluster/verl for Slurm and SkyPilot, run with stand-ins for the cluster's own programs."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster" / "verl"
SCRIPTS = sorted(ROOT.glob("cluster/*/*.sh"))
TASK = CLUSTER / "skypilot.yaml"

# Fields of a SkyPilot task, of its reference (docs.skypilot.co, "SkyPilot YAML", read in November 2026).
FIELDS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "volumes", "setup", "run"}
RESOURCES = {"infra", "accelerators", "cpus", "memory", "use_spot", "disk_size", "disk_tier", "network_tier"}
RESOURCES |= {"max_hourly_cost", "image_id", "ports", "labels", "autostop", "any_of", "ordered", "job_recovery"}

PROGRAMS = {
    "scontrol": "printf 'node1\\nnode2\\n'",
    "hostname": "echo 'fe80::1 10.0.0.1'",
    # One process for each node of a step, as Slurm starts them; --nodes=1 asks for one.
    "srun": """
        n=$SLURM_NNODES
        while [[ $1 == --* ]]; do [[ $1 == --nodes=1 ]] && n=1; shift; done
        for ((i = 0; i < n; i++)); do SLURM_PROCID=$i "$@" & done; wait""",
    # `ray status` fails once the first node's `ray stop` was called.
    "ray": """
        [[ $1 == start && $2 == --head ]] && touch "$STATE/up"
        [[ $1 == start && $2 == --address* ]] && { [[ -e $STATE/up ]] || exit 1; echo >> "$STATE/joined"; }
        [[ $1 == status ]] && { [[ -e $STATE/up ]] || exit 1; }
        [[ $1 == stop ]] && rm -f "$STATE/up"
        exit 0""",
    "python": """
        [[ $1 == -c ]] && { echo "a warning of Ray"; echo $((1 + $(cat "$STATE/joined" 2>/dev/null | wc -l))); exit 0; }
        [[ -e $STATE/up ]] || exit 9
        exit "${TRAINING_ENDS_WITH:-0}" """,
}


def with_programs(folder: Path, **more: str) -> dict[str, str]:
    """An environment in which the cluster's programs write down how they were called."""
    for name, body in PROGRAMS.items():
        program = folder / name
        said = f"printf '%s\\n' \"{name} $(printf '%q ' \"$@\")\" >> {shlex.quote(str(folder / 'calls'))}"
        program.write_text(f"#!/usr/bin/env bash\n{said}\n{body}\n")
        program.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "STATE": str(folder), "POLL_SECONDS": "0.05", "JOIN_SECONDS": "5"} | more


def bash(*command: str, told: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *command], env=told, cwd=cwd, capture_output=True, text=True, check=False, timeout=20
    )


def calls(folder: Path, program: str) -> list[list[str]]:
    lines = (folder / "calls").read_text().splitlines()
    return [shlex.split(line)[1:] for line in lines if line.split(" ")[0] == program]


def trained(folder: Path) -> list[list[str]]:
    return [call for call in calls(folder, "python") if call[0] == "-m"]


def wanted(setting: str, method: str, nodes: int, *more: str) -> list[str]:
    names = ["--config-dir", str(CLUSTER / "config"), "--config-name", setting, f"objective={method}"]
    names += [f"here={CLUSTER}", f"trainer.experiment_name={setting}-{method}", f"trainer.nnodes={nodes}"]
    return ["-m", "drpo.adapters.verl", *names, *more]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_script_is_bash_and_executable(script: Path):
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "") and os.access(script, os.X_OK)


def test_the_tasks_fields_are_skypilots():
    task = yaml.safe_load(TASK.read_text())
    assert task.keys() <= FIELDS and task["resources"].keys() <= RESOURCES
    assert re.fullmatch(r"[A-Z0-9]+:8", task["resources"]["accelerators"])
    assert all(isinstance(value, str) and value for value in task["envs"].values())
    for part in ("setup", "run"):
        checked = subprocess.run(["bash", "-n"], input=task[part], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")
    setting, method = task["envs"]["SETTING"], task["envs"]["METHOD"]
    assert (CLUSTER / "config" / f"{setting}.yaml").is_file()
    assert (CLUSTER / "config" / "objective" / f"{method}.yaml").is_file()
    named = [word for word in shlex.split(task["setup"]) + shlex.split(task["run"]) if word.startswith("cluster/")]
    assert named and all((ROOT / word).is_file() for word in named)


def test_slurm_trains_on_the_first_node_when_all_have_joined(tmp_path: Path):
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    told = with_programs(tmp_path, **job)
    done = bash(str(CLUSTER / "slurm.sh"), "qwen3-30b-a3b", "drpo", "trainer.logger=[console]", told=told, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert trained(tmp_path) == [wanted("qwen3-30b-a3b", "drpo", 2, "trainer.logger=[console]")]
    started = calls(tmp_path, "ray")
    assert ["start", "--head", "--node-ip-address=10.0.0.1", "--port=6379", "--disable-usage-stats"] in started
    assert ["start", "--address=10.0.0.1:6379", "--disable-usage-stats"] in started
    assert started.count(["stop"]) == 2  # each node its own


def test_skypilot_trains_with_what_the_task_names(tmp_path: Path):
    task = yaml.safe_load(TASK.read_text())
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1"}
    done = bash("-c", task["run"], told=with_programs(tmp_path, **nodes, **task["envs"]))
    assert done.returncode == 0, done.stderr
    assert trained(tmp_path) == [wanted("qwen3-4b", "drpo", 1, "trainer.logger=[console]")]


def test_a_training_that_fails_is_the_nodes_status_and_stops_its_ray(tmp_path: Path):
    told = with_programs(tmp_path, HEAD="10.0.0.1", RANK="0", NODES="1", TRAINING_ENDS_WITH="3")
    assert bash(str(CLUSTER / "node.sh"), "qwen3-4b", "drpo", told=told).returncode == 3
    assert calls(tmp_path, "ray")[-1] == ["stop"]


@pytest.mark.parametrize(
    ("told", "arguments", "status", "message"),
    [
        (
            {"HEAD": "h", "RANK": "0"},
            ("qwen3-4b", "drpo"),
            2,
            "node.sh: NODES is not set; it needs HEAD, RANK and NODES",
        ),
        (
            {"HEAD": "h", "RANK": "0", "NODES": "2"},
            ("qwen3-4b", "drpo"),
            1,
            "node.sh: 1 of NODES=2 nodes joined Ray in 0 s",
        ),
        (
            {"HEAD": "h", "RANK": "1", "NODES": "2"},
            ("qwen3-4b", "drpo"),
            1,
            "node.sh: node 1 found no Ray at h:6379 in 0 s",
        ),
    ],
)
def test_what_is_missing_is_one_line(
    told: dict[str, str], arguments: tuple[str, ...], status: int, message: str, tmp_path: Path
):
    environment = with_programs(tmp_path, **told) | {"JOIN_SECONDS": "0"}
    done = bash(str(CLUSTER / "node.sh"), *arguments, told=environment)
    assert (done.returncode, done.stderr.splitlines()) == (status, [message])
    assert not trained(tmp_path) if (tmp_path / "calls").exists() else True


def test_without_a_method_the_settings_are_listed(tmp_path: Path):
    done = bash(str(CLUSTER / "node.sh"), "qwen3-4b", told=with_programs(tmp_path))
    assert done.returncode == 2 and "qwen3-4b-authors" in done.stderr


def test_slurm_says_where_it_must_be_called(tmp_path: Path):
    done = bash(
        str(CLUSTER / "slurm.sh"), "qwen3-4b", "drpo", told=with_programs(tmp_path, SLURM_SUBMIT_DIR="/nowhere")
    )
    assert done.returncode == 2 and "call sbatch from the root of the checkout" in done.stderr
