"""Writes `tests/data/autopsy`: dumps of four rollouts by each framework's own writing code.

    python tests/write_autopsy_dumps.py CHECKOUTS

CHECKOUTS has a clone of each repository under the name in `SOURCES`. Its file is taken from the release's tag and run
as it is, with what it imports and is not installed stubbed. prime-rl's traces are models of `verifiers`, whose own
environment is needed for: those are written by hand after `verifiers/v1/trace.py` (tests/support/dumps.py).
`global_step_3_training_input.pkl` is what SkyRL 0.4.0's trainer dumped in
`test_what_skyrls_trainer_dumps_is_read` (tests/adapters/test_skyrl.py).
"""

import importlib.abc
import importlib.util
import subprocess
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pandas  # noqa: F401 (before names that are not installed are stubbed)
import torch

DATA = Path(__file__).resolve().parent / "data" / "autopsy"
SOURCES = {
    "verl": ("verl-project+verl/repo", "v0.9.0", "verl.trainer.ppo.ray_trainer"),
    "trl": ("huggingface+trl/repo", "v1.9.0", "trl.trainer.grpo_trainer"),
    "prime_rl": ("PrimeIntellect-ai+prime-rl/repo", "v0.8.0", "prime_rl.trainer.rl.token_export"),
    "skyrl": ("NovaSky-AI+SkyRL/repo", "skyrl-v0.3.0", "skyrl.backends.skyrl_train.training_batch"),
    "skyrl_eval": ("NovaSky-AI+SkyRL/repo", "skyrl-v0.3.0", "skyrl.train.utils.trainer_utils"),
    "open_instruct": ("allenai+open-instruct/repo", "v0.3.0", "open_instruct.rl_utils"),
}
"""Name of a dump -> the clone, the tag, and the module that writes it."""
INSTALLED = frozenset({"transformers", "accelerate", "datasets", "peft", "huggingface_hub"})
"""Libraries that are stubbed too though they are installed: no dump is written by them."""
PROMPTS = ("1 + 1?", "1 + 1?", "2 + 2?", "2 + 2?")
TEXTS = ("2", "3", "four", "4")
REWARDS = (1.0, 0.0, 0.0, 1.0)
ADVANTAGES = (0.5, -0.5, -0.5, 0.5)
IDS = ((5, 6, 7), (5, 8), (9, 7), (4, 7, 7))
MU = ((-0.5, -1.25, -0.25), (-0.75, -2.0), (-1.5, -0.125), (-0.5, -0.5, -1.0))
LOGP = ((-0.5, -1.0, -0.25), (-0.75, -2.25), (-1.5, -0.125), (-0.25, -0.5, -1.0))


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module for every name, or for those of some libraries alone."""

    def __init__(self, libraries: frozenset[str] = frozenset()) -> None:
        self.libraries = libraries

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if self.libraries and name.split(".")[0] not in self.libraries:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing."""


class _Empty(types.ModuleType):
    """A module that has every name: a class where it is written as one, else a mock."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _any_class(name) if name.lstrip("_")[:1].isupper() else _Function()
        setattr(self, name, value)
        return value


class _Function:
    """Anything that is not a class: false where it is asked; as a decorator it leaves what it decorates."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        decorates = len(args) == 1 and not kwargs and isinstance(args[0], type | types.FunctionType)
        return args[0] if decorates else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __bool__(self) -> bool:
        return False

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__


def _any_class(name: str) -> type:
    methods = {"__class_getitem__": classmethod(lambda cls, item: cls), "__init__": lambda self, *a, **k: None}
    return type(name, (), methods)


def load(checkouts: Path, dump: str) -> Any:
    """Return the module of a release that writes a dump."""
    clone, tag, name = SOURCES[dump]
    file = name.replace(".", "/") + ".py"
    paths = (f"{file}", f"src/{file}")
    for path in paths:
        command = ["git", "-C", str(checkouts / clone), "show", f"{tag}:{path}"]
        source = subprocess.run(command, capture_output=True, text=True, check=False)
        if source.returncode == 0:
            break
    else:
        raise SystemExit(f"{dump}: {file} is not in {tag} of {clone}")
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(source.stdout, f"{clone}/{file}", "exec"), module.__dict__)
    return module


def write_verl(module: Any) -> None:
    columns = {"acc": [r == 1 for r in REWARDS], "request_id": list("abcd")}
    module.RayPPOTrainer._write_generations(PROMPTS, TEXTS, ["2", "2", "4", "4"], REWARDS, columns, str(DATA), 1)
    (DATA / "1.jsonl").rename(DATA / "verl.jsonl")


def write_trl(module: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "completions").mkdir()
        trainer = object.__new__(module.GRPOTrainer)
        type(trainer).__mro__[1].log = lambda self, *rest: None
        trainer.model, trainer.accelerator, trainer.args = MagicMock(), MagicMock(), MagicMock()
        trainer.args.output_dir, trainer.args.report_to, trainer.log_completions = folder, [], True
        trainer.state = types.SimpleNamespace(global_step=1)
        trainer._metrics = {"train": {}, "eval": {}}
        module.is_rich_available = lambda: False
        trainer._logs = {
            "prompt": list(PROMPTS),
            "completion": list(TEXTS),
            "rewards": {"right": list(REWARDS), "short": [0.5, 0.5, None, 0.5]},
            "extra": {},
            "advantages": list(ADVANTAGES),
            "images": [],
        }
        trainer.log({})
        (Path(folder) / "completions" / "completions_00001.parquet").rename(DATA / "trl.parquet")


def write_prime_rl(module: Any) -> None:
    def ratio_and_kl(trainer: Any, inference: Any) -> tuple[Any, Any, Any]:
        log_ratio = trainer - inference
        return log_ratio, log_ratio.exp(), log_ratio.exp() - log_ratio - 1

    module.compute_importance_ratio_and_mismatch_kl = ratio_and_kl
    with tempfile.TemporaryDirectory() as folder:
        exporter = module.TokenExporter(Path(folder), rank=0)
        rows = list(zip(IDS, MU, LOGP, ADVANTAGES, strict=True))
        lengths = [2 + len(ids) for ids in IDS]

        def flat(of_row: Any, prompt: float = 0.0) -> Any:
            return torch.tensor([x for row in rows for x in (prompt, prompt, *of_row(row))])

        micro_batch = {
            "input_ids": flat(lambda row: row[0], 1).long(),
            "position_ids": torch.cat([torch.arange(n) for n in lengths]),
            "loss_mask": flat(lambda row: [1] * len(row[0])).bool(),
            "advantages": flat(lambda row: [row[3]] * len(row[0])),
            "inference_logprobs": flat(lambda row: row[1]),
            "env_names": ["letters"] * sum(lengths),
        }
        output = {"logprobs": flat(lambda row: row[2], -1.0), "entropy": flat(lambda row: [0.75] * len(row[0]))}
        exporter.export(1, 0, micro_batch, output, lengths, loss_config=None)
        (Path(folder) / "token_exports" / "step_1" / "rank_0.jsonl").rename(DATA / "prime_rl_export.jsonl")


def write_skyrl(module: Any) -> None:
    width, prompt = 3, (1, 2)

    def right(values: Any, size: int = width) -> list[Any]:
        return [0] * (size - len(values)) + list(values)

    batch = module.TrainingInputBatch(
        {
            "sequences": torch.tensor([right((*prompt, 10 + i // 2, *ids), 6) for i, ids in enumerate(IDS)]),
            "attention_mask": torch.tensor([right([1] * (3 + len(ids)), 6) for ids in IDS]),
            "response_mask": torch.tensor([right([1] * len(ids)) for ids in IDS]),
            "loss_mask": torch.tensor([right([1] * len(ids)) for ids in IDS]).float(),
            "rollout_logprobs": torch.tensor([right(mu) for mu in MU]).float(),
            "action_log_probs": torch.tensor([right(logp) for logp in LOGP]).bfloat16(),
            "base_action_log_probs": None,
            "values": None,
            "advantages": torch.tensor([right([a] * len(i)) for a, i in zip(ADVANTAGES, IDS, strict=True)]).float(),
            "returns": torch.tensor([right([a] * len(i)) for a, i in zip(ADVANTAGES, IDS, strict=True)]).float(),
        }
    )
    batch.metadata = {
        "response_length": width,
        "avg_response_length": 2.5,
        "pad_size": 0,
        "metrics": {"avg_final_rewards": 0.5, "avg_response_length": 2.5},
    }
    batch.save(str(DATA / "global_step_1_training_input.pkl"))


def write_skyrl_eval(module: Any) -> None:
    module.sanitize_data_source = str
    texts = dict(enumerate((*PROMPTS, *TEXTS)))
    output = {
        "prompt_token_ids": [0, 1, 2, 3],
        "response_ids": [4, 5, 6, 7],
        "rewards": list(REWARDS),
        "stop_reasons": ["stop", "stop", "length", "stop"],
    }
    folder = DATA / "global_step_1_evals"
    folder.mkdir(exist_ok=True)
    tokenizer = types.SimpleNamespace(decode=texts.get)
    extras: list[dict[str, Any]] = [{} for _ in TEXTS]
    module.dump_per_dataset_eval_results(
        folder, tokenizer, output, ["letters"] * 4, ["letters"] * 4, extras, {"eval/all/avg_score": 0.5}
    )


def write_open_instruct(module: Any) -> None:
    batch = types.SimpleNamespace(
        queries=[[1, 2]] * 4, scores=list(REWARDS), datasets=["letters"] * 4, ground_truths=[[7]] * 4
    )
    result = types.SimpleNamespace(
        responses=[list(ids) for ids in IDS],
        finish_reasons=["stop", "stop", "length", "stop"],
        request_info=None,
        logprobs=[list(mu) for mu in MU],
    )
    module._save_rollouts(str(DATA), "letters", 1, batch, result, np.array(ADVANTAGES), 2, 0)
    (DATA / "letters_rollouts_000000.jsonl").rename(DATA / "open_instruct.jsonl")


def main() -> None:
    """Write every dump."""
    checkouts = Path(sys.argv[1])
    DATA.mkdir(parents=True, exist_ok=True)
    sys.meta_path.insert(0, _Stubs(INSTALLED))
    sys.meta_path.append(_Stubs())
    writers = (write_verl, write_trl, write_prime_rl, write_skyrl, write_skyrl_eval, write_open_instruct)
    for write in writers:
        dump = write.__name__.removeprefix("write_")
        write(load(checkouts, dump))
        print(dump, *SOURCES[dump][1:])


if __name__ == "__main__":
    main()
