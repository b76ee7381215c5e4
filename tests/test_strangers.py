"""A stranger's folder is read, reported on and resumed without running what it names; nothing is unpickled."""

import ast
import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import urllib3

from drpo import cli
from drpo.cli import folder as folders
from drpo.credentials import AUTH, headers, keep_password, without_password
from drpo.errors import InputError, printable
from drpo.model import loading
from drpo.spec import SAFE_PATH, import_named
from drpo.train.config import REGISTRIES, from_json, read_value, to_json
from drpo.train.fields import FIELDS
from drpo.train.log import environment
from drpo.train.records import CONFIG, SUMMARY, TIMING
from support.hand_run import RECORDS, conversation, write_run
from support.hostile import refused, said
from support.runs import put
from support.worlds import tiny_run

SOURCES = sorted((Path(__file__).resolve().parents[1] / "src" / "drpo").rglob("*.py"))
CODE = "stranger:thing"
STRANGER = """
from pathlib import Path
Path("ran").touch()
def thing(*args): ...
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    return tmp_path


def write_stranger(folder: Path, **fields: Any) -> None:
    """A run whose configuration names code."""
    write_run(folder)
    plain = {"task": "addition(1, 9)"} | fields
    (folder / CONFIG).write_text(json.dumps(put(json.loads((folder / CONFIG).read_text()), plain)))


NAMED = [(name, CODE) for name in (*REGISTRIES, "model")]
NAMED.append(("task", f"records('p.jsonl', 'q', 'a', reward_name='{CODE}')"))
NAMED.append(("environment", f"tools('{CODE}')"))


@pytest.mark.parametrize(("field", "spec"), NAMED)
def test_no_command_imports_what_a_folder_names(here: Path, field: str, spec: str):
    """And a resume names the code and the way to allow it."""
    write_stranger(here / "run", **{field: spec})
    line = refused(["train", "--resume", "run"])
    commands = [
        ["watch", "run", "--once"],
        ["eval", "run"],
        ["export", "run", "exported"],
        ["chat", "run"],
        ["serve", "run"],
    ]
    if field in ("objective", "environment"):  # it draws for longer than all others take, and reads every field alike
        commands.append(["replay", "run"])
    statuses = {command[0]: said(command).status for command in commands}
    assert not (here / "ran").exists() and not (here / "owned").exists()
    assert statuses["watch"] == 0
    assert FIELDS[field] in line and CODE in line and "--trust-remote-code" in line and CONFIG in line


def test_a_report_needs_no_code_but_the_objectives(here: Path):
    """Of a folder whose every field names code; the report of each alone reads no more."""
    fields = {field: CODE for field, _ in NAMED if field != "objective"}
    for i, task in enumerate(spec for field, spec in NAMED if field == "task"):
        write_stranger(here / f"run-{i}", **fields | {"task": task})
        assert said(["report", f"run-{i}"]).status == 0
    write_stranger(here / "run", objective=CODE)
    assert "objective" in refused(["report", "run"])
    assert not (here / "ran").exists() and not (here / "owned").exists()


def test_code_that_is_allowed_runs(here: Path):
    write_stranger(here / "run", reward=CODE)
    folders.open_run(here / "run", trust_remote_code=True)
    assert (here / "ran").exists()


def test_a_comparison_of_a_stranger_is_shown_and_not_resumed(here: Path):
    write_stranger(here / "run" / "trials" / "a", objective=CODE)
    (here / "run" / "trials" / "a" / "trial_result.json").write_text('{"status": "finished", "reason": null}')
    assert said(["report", "run"]).status == 0
    assert "--trust-remote-code" in refused(["compare", "--resume", "run"])
    assert not (here / "ran").exists()


def test_a_configuration_read_without_code_keeps_its_specs(here: Path):
    record = put(to_json(tiny_run()), dict.fromkeys(REGISTRIES, CODE))
    assert to_json(from_json(record, trust_remote_code=False)) == record


def test_names_below_drpo_are_code_as_any_other():
    for spec in ("drpo.lab.worker_pool:subprocess.Popen(['true'])", "drpo.model.loading:tiny"):
        assert folders.external_code(from_json({"data": {"task": spec}}, trust_remote_code=False)) == {"task": spec}


def test_an_adapter_cannot_name_code_as_its_base(here: Path):
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": CODE}))
    for load in (loading.load, loading.load_tokenizer, loading.n_parameters):
        with pytest.raises(InputError, match="base_model_name_or_path"):
            load(str(here / "adapter"))
    assert not (here / "ran").exists()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_a_pickle_in_a_model_is_not_run(here: Path):
    model, tokenizer = loading.tiny()
    model.save_pretrained(here / "model")
    tokenizer.save_pretrained(here / "model")
    (here / "model" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, here / "model" / "pytorch_model.bin")
    with pytest.raises(InputError):
        loading.load(str(here / "model"))
    assert not (here / "ran").exists()


@pytest.fixture
def strange(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that brings code of its own, before a user who says yes to whatever transformers asks."""
    model, tokenizer = loading.tiny()
    model.save_pretrained(here / "model")
    tokenizer.save_pretrained(here / "model")
    own = {"AutoConfig": "stranger.C", "AutoModelForCausalLM": "stranger.M", "AutoTokenizer": ["stranger.T", None]}
    for name, changes in ((CONFIG, {"model_type": "strange"}), ("tokenizer_config.json", {"tokenizer_class": "T"})):
        record = json.loads((here / "model" / name).read_text())
        (here / "model" / name).write_text(json.dumps(record | changes | {"auto_map": own}))
    shutil.copy("stranger.py", here / "model" / "stranger.py")
    monkeypatch.setattr("builtins.input", lambda *_: (here / "asked").touch() or "y")
    return str(here / "model")


@pytest.mark.parametrize("read", [loading.load, loading.load_tokenizer, loading.n_parameters])
def test_a_model_that_brings_its_own_code_is_refused_and_nobody_is_asked(here: Path, strange: str, read: Any):
    with pytest.raises(InputError, match="code of its own, which is not run"):
        read(strange)
    assert not (here / "ran").exists() and not (here / "asked").exists()


def test_no_command_asks_whether_a_models_code_may_run(here: Path, strange: str):
    write_stranger(here / "run", model=strange)
    shutil.copytree(strange, here / "run" / "model")
    commands = (["replay", "run"], ["report", "run"], ["train", "--resume", "run"], ["export", "run", "exported"])
    commands += (["eval", strange, "--task", "addition(1, 9)"], ["eval", "run"], ["export", strange, "exported"])
    for command in commands:
        said(command)
        assert not (here / "ran").exists() and not (here / "asked").exists(), command


STEERING = (
    "\x1b[2J\x1b]8;;http://evil\x07\x9b31m\u202e\u2066\u200f\u2028\u2029\x85\r\b\ufeff\U000e0041\ud800[red]:bomb:[/red]"
)
UNSEEN = "\u00ad\u034f\u115f\u17b4\u180b\u200b\u2060\u2064\u3164\ufe00\uffa0\U000e0100\U000e01ef"
STEERING += UNSEEN


def harmless(text: str) -> bool:
    return all((c.isprintable() and c not in UNSEEN) or c == "\n" for c in text)


def test_what_scripts_and_emoji_need_is_shown():
    assert printable("\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c \u2764\ufe0f e\u0301\t\n") == (
        "\u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c \u2764\ufe0f e\u0301\t\n"
    )


@pytest.fixture
def steering(here: Path) -> Path:
    """A run whose every record steers the terminal and holds markup; its name breaks the line as well."""
    folder = here / "run"
    records = [r | {n: f"{n}{STEERING}" for n in ("prompt", "text", "answer", "problem")} for r in RECORDS]
    talk = conversation(step=3)
    for i, message in enumerate(talk["messages"]):
        message["content"] += STEERING
        message |= {} if message["role"] == "assistant" else {"role": f"{i}{STEERING}\nforged line", "name": STEERING}
    talk["messages"][4]["tool_calls"][0]["function"] = {"name": STEERING, "arguments": {STEERING: STEERING}}
    records.append(talk)
    write_run(folder, records)
    names = {"name": f"evil{STEERING}\nforged line", "model": f"model{STEERING}"}
    (folder / CONFIG).write_text(json.dumps(put(json.loads((folder / CONFIG).read_text()), names)))
    with (folder / TIMING).open("a") as file:
        file.write(json.dumps({"step": 1, f"phase{STEERING}\nforged line": 1.0}) + "\n")
    (folder / SUMMARY).write_text(json.dumps({n: f"9{STEERING}\nforged line" for n in ("stopped_by_signal", "reason")}))
    return folder


COMMANDS = (["watch", "run", "--once"], ["replay", "run"], ["report", "run"], ["export", "run", "exported"])
COMMANDS += (["eval", "run"], ["train", "--resume", "run"], ["watch", STEERING], ["report", STEERING])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_nothing_that_a_record_says_steers_the_terminal(steering: Path, command: list[str]):
    done = said(command)
    assert done.status in (0, 2) and harmless(done.out) and harmless(done.err), done
    assert "\nforged line" not in done.out + done.err
    if command[0] == "watch" and done.status == 0:
        assert "evil" in done.out and "[red]:bomb:[/red]" in done.out  # shown as it is, not as markup


def test_a_line_that_names_a_field_of_a_stranger_cannot_steer(steering: Path):
    (steering / CONFIG).write_text(json.dumps({STEERING: 1}))
    assert harmless(refused(["report", "run"]))


def test_what_a_library_logs_cannot_steer(here: Path, capsys: pytest.CaptureFixture[str]):
    said(["--version"])
    handler = logging.StreamHandler()
    strange = logging.getLogger("strange")
    strange.addHandler(handler)
    try:
        strange.error("cannot read %s\nforged line", STEERING.replace("\ud800", ""))  # which a stream may not take
    finally:
        strange.removeHandler(handler)
    err = capsys.readouterr().err
    assert harmless(err) and err.count("\n") == 1


def test_every_command_prints_through_the_terminal():
    for path in SOURCES:
        made = [name for name, _ in calls(path) if name.split(".")[-1] == "Console"]
        assert not made or path.name == "terminal.py", path


MODULES = ("torch", "plotext", "rich", "numpy", "transformers", "multiprocessing", "selectors")


def test_a_command_does_not_look_for_modules_in_the_working_folder(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(here)])
    before = list(sys.path)
    write_stranger(here / "run", reward=CODE)
    for command in (["watch", "run", "--once"], ["report", "run"], ["train", "--resume", "run"], ["recipes"]):
        said(command)
    assert sys.path == before and not (here / "ran").exists()


def test_ones_own_code_is_found_in_the_working_folder_and_after_all_libraries(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(here)])
    for name in MODULES:
        shutil.copy("stranger.py", here / f"{name}.py")
    assert callable(import_named("stranger", "thing", "reward"))
    assert sys.path[-1] == str(here) and sys.path.count(str(here)) == 1
    assert import_named("colorsys", "rgb_to_hsv", "reward") and sys.path.count(str(here)) == 1


def run_here(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a process whose working folder holds modules of the names that it imports."""
    for name in MODULES:
        shutil.copy("stranger.py", here / f"{name}.py")
    path = {"PYTHONPATH": str(SOURCES[0].parents[1]), "PYTHONSAFEPATH": ""}
    command = [sys.executable, "-m", "drpo", *arguments]
    return subprocess.run(command, cwd=here, env={**os.environ, **path}, capture_output=True, text=True, check=False)


def test_a_module_in_the_working_folder_does_not_stand_in_for_a_library(here: Path):
    assert run_here(here, "--version").returncode == 0 and not (here / "ran").exists()


@pytest.mark.slow
def test_neither_does_it_in_the_commands_and_their_processes(here: Path):
    write_stranger(here / "run")
    assert run_here(here, "watch", "run", "--once").returncode == 0
    reward = "def unaware(problem, text): return float('PYTHONSAFEPATH' not in os.environ)"
    (here / "mine.py").write_text(f"import os\n{reward}\n")
    options = ("--reward", "mine:unaware", "--steps", "1", "--out", "trained", "--plain", "--no-doctor")
    trained = run_here(here, "train", "smoke", *options)
    assert trained.returncode == 0, trained.stderr
    assert not (here / "ran").exists()
    assert json.loads((here / "trained" / "metrics.jsonl").read_text())["reward_mean"] == 1.0


def test_the_commands_own_processes_do_not_look_there_either(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "3000")
    monkeypatch.setattr(sys, "argv", ["drpo", "--version"])
    assert cli.main() == 0
    assert os.environ["PYTHONSAFEPATH"] == SAFE_PATH
    del os.environ["PYTHONSAFEPATH"]


ADDRESS = "http://10.255.255.1:8000"


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may be asked for anything over the network."""
    monkeypatch.setattr(urllib3.PoolManager, "request", lambda *_, **__: pytest.fail("a server was asked"))


@pytest.mark.usefixtures("unasked")
def test_the_server_that_a_folder_names_is_not_asked(here: Path):
    write_stranger(here / "run", engine=ADDRESS)
    write_stranger(here / "all" / "trials" / "a", engine=ADDRESS)
    for command in (["train", "--resume", "run"], ["compare", "--resume", "all"]):
        line = refused(command)
        assert CONFIG in line and f"add --engine {ADDRESS}" in line
    for command in (["watch", "run", "--once"], ["replay", "run"]):
        said(command)


@pytest.mark.usefixtures("unasked")
def test_an_engine_that_a_folder_does_not_have_is_not_put_in_its_place(here: Path):
    write_stranger(here / "run")
    assert "samples with transformers" in refused(["train", "--resume", "run", "--engine", ADDRESS])
    write_stranger(here / "other", engine=ADDRESS)
    assert "give its address" in refused(["train", "--resume", "other", "--engine", "transformers"])


def test_a_server_that_the_command_names_is_asked_in_the_place_of_the_folders(here: Path):
    write_stranger(here / "run", engine=ADDRESS)
    run = folders.open_run(here / "run", trust_remote_code=False)
    assert folders.at_server(run, here / "run", "http://127.0.0.1:9").rollout.engine == "http://127.0.0.1:9"
    assert folders.resume_flag(run) == f" --engine {ADDRESS}"


@pytest.mark.parametrize(("form", "user"), [("--engine={}", "me:p%40ss"), ("--engine {}", "me:p@ss")])
def test_a_password_is_recorded_nowhere_and_sent(
    here: Path, form: str, user: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """In vain: the server is closed. What the run has written and said by then does not hold it."""
    monkeypatch.setenv(AUTH, "")
    words = form.format(f"http://{user}@127.0.0.1:9").split()
    monkeypatch.setattr(sys, "argv", ["drpo", "train", "smoke", *words])
    line = refused([*sys.argv[1:], "--out", "run"])
    assert "engine=http://127.0.0.1:9: the vLLM server cannot be reached" in line
    assert "p@ss" not in line + caplog.text and "p%40ss" not in line + caplog.text
    assert "ss@" not in " ".join(environment()["command"])
    assert headers()["authorization"] == "Basic bWU6cEBzcw=="


def test_a_password_does_not_stay_in_the_arguments_that_trackers_record(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONSAFEPATH", SAFE_PATH)
    monkeypatch.setenv(AUTH, "")
    monkeypatch.setattr(sys, "argv", ["drpo", "--version", "--engine", "http://me:secret@h:9"])
    assert cli.main() == 0
    assert sys.argv == ["drpo", "--version", "--engine", "http://h:9"] and os.environ[AUTH] == "me:secret"


ODD_PASSWORDS = {
    "http://me:se,cr et@h:9": ("http://h:9", "me:se,cr et"),
    "http://me:se/cr@et#@h:9,http://me:se/cr@et#@g:9": ("http://h:9,http://g:9", "me:se/cr@et#"),
    "http://me:se\ncret@h:9": ("http://h:9", "me:se\ncret"),
    "htp://me:secret@h:9": ("h:9", ""),  # refused as no address: who meant http:// has not said the password
}


@pytest.mark.parametrize("address", ODD_PASSWORDS)
def test_a_password_may_hold_anything(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(AUTH, "")
    bare, auth = ODD_PASSWORDS[address]
    assert keep_password(["train", "--engine", address]) == ["train", "--engine", bare]
    assert keep_password([f"--engine={address}", "a@b"]) == [f"--engine={bare}", "a@b"]
    assert os.environ[AUTH] == auth
    assert not auth or without_password(f"--engine={address}") == f"--engine={bare}"


def test_a_password_in_a_configuration_is_refused_in_python():
    with pytest.raises(InputError, match=f"engine=http://host:80: .* set {AUTH}=user:password") as caught:
        tiny_run(engine="http://me:secret@host:80")
    assert "secret" not in str(caught.value)


def test_half_a_surrogate_pair_in_a_configuration_is_refused_or_taken():
    for name in FIELDS.keys() - {"learning_rate"}:
        with suppress(InputError):
            read_value(name, "\ud800")


def test_servers_with_different_passwords_are_refused():
    line = refused(["train", "smoke", "--engine", "http://a:b@one,http://a:c@two"])
    assert "different passwords" in line and "a:b" not in line


@pytest.mark.parametrize("command", [["train", "{}"], ["train", "smoke", "--engines={}"], ["eval", "{}/x"]])
def test_an_address_in_the_wrong_place_is_said_without_its_password(command: list[str]):
    line = refused([word.format("http://me:secret@h") for word in command])
    assert "http://h" in line and "secret" not in line


def test_no_settings_that_lie_in_the_working_folder_draw_a_figure():
    for path in SOURCES:
        names = [name for name, _ in calls(path)]
        assert names.count("matplotlib.use") == names.count("matplotlib.rcdefaults"), path


@cache
def calls(path: Path) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [(dotted(node.func), node) for node in found]


def dotted(node: ast.expr) -> str:
    """The name of what is called, as far as it is one: what `f(x).name` calls is `.name`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def every_call() -> list[tuple[Path, str, ast.Call]]:
    return [(path, name, call) for path in SOURCES for name, call in calls(path)]


UNPICKLING = {"pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load"}
UNPICKLING |= {"cloudpickle.loads", "marshal.loads", "shelve.open", "numpy.load", "np.load", "yaml.load"}
EVALUATING = {"eval", "exec", "compile", "__import__", "runpy.run_path", "os.system", "os.popen"}
OWN_PICKLES = {"workers/serve.py", "rewards/worker.py", "environments/worker.py"}
"""Between a process and its own children, of what it has pickled itself."""
MEANT = {
    ("rewards/sandboxed.py", "exec"),
    ("rewards/sandboxed.py", "eval"),
    ("rewards/sandboxed.py", "compile"),
    ("rewards/python.py", "compile"),
}
"""The one place that runs a model's code, inside its sandbox, and a look at whether a test is Python."""


READING = ("AutoModelForCausalLM.from_config", "load_dataset")


def test_nothing_is_unpickled_or_evaluated():
    for path, name, call in every_call():
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        meant = any(path.match(f"*/{file}") and name == call_name for file, call_name in MEANT)
        assert name not in EVALUATING or meant, f"{path}: {name}"
        assert name not in UNPICKLING or any(path.match(f"*/{p}") for p in OWN_PICKLES), f"{path}: {name}"
        assert given.get("shell", "False") == "False" and given.get("allow_pickle", "False") == "False", path
        assert given.get("trust_remote_code", "False") == "False", f"{path}: {name}"
        if name.endswith(("from_pretrained", *READING)) and "PeftModel" not in name:
            assert given.get("trust_remote_code") == "False", f"{path}: {name}"  # left out, transformers asks
        if name.split(".")[-2:] == ["torch", "load"]:
            assert given.get("weights_only") == "True", f"{path}: {name}"


def test_the_search_for_such_calls_finds_them():
    names = [name for _, name, _ in every_call()]
    assert "torch.load" in names and "pickle.loads" in names and "AutoTokenizer.from_pretrained" in names
