"""`drpo completion`: the shells themselves complete commands, recipes and options with it."""

import io
import re
import shutil
import subprocess
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from drpo import cli
from drpo.cli import COMMANDS
from drpo.cli.commands.completion import OPTIONS, SHELLS, WITH_FIELDS, words
from drpo.recipes import RECIPES
from support.hostile import refused, said


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "drpo.bash"
    status, out, err = said(["completion", "bash"])
    assert status == 0, err
    path.write_text(out)
    return path


def completed(script: Path, *line: str) -> list[str]:
    """What bash offers at the end of a line."""
    program = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_drpo
printf '%s\\n' "${COMPREPLY[@]}"
complete -p drpo >&2
"""
    bash = ["bash", "--norc", "-c", program, "bash", str(script), "drpo", *line]
    done = subprocess.run(bash, capture_output=True, text=True, check=True)
    assert done.stderr.split()[-1] == "drpo" and "-F _drpo" in done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_recipes_and_options(script: Path):
    assert completed(script, "tr") == ["train"]
    assert completed(script, "") == list(COMMANDS)
    assert completed(script, "--ver") == ["--version"]
    assert completed(script, "train", "dem") == ["demo"]
    assert completed(script, "train", "") == list(RECIPES)
    assert completed(script, "train", "demo", "--sampling.max") == ["--sampling.max-new-tokens"]
    assert completed(script, "train", "demo", "--no-doc") == ["--no-doctor"]
    assert completed(script, "eval", "runs/demo", "--lm-eval-f") == ["--lm-eval-folder"]
    assert completed(script, "train", "demo", "") == []  # files, by the shell
    assert completed(script, "completion", "f") == ["fish"]
    assert completed(script, "nothing", "--") == []


def test_every_command_is_known_with_the_options_of_its_help():
    assert list(OPTIONS) == list(COMMANDS)
    mentioned = {"export": {"--lora-rank"}, "serve-rollouts": {"--engine", "--max-num-seqs"}}  # of other programs
    of = words()
    for name in sorted(OPTIONS.keys() - WITH_FIELDS - {"verify", "recipes", "completion", "eval"}):
        with redirect_stdout(io.StringIO()) as out, suppress(SystemExit):
            cli.main([name, "--help"])
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", out.getvalue()))
        assert "--help" in told and told - mentioned.get(name, set()) <= set(of[name].options), name


@pytest.mark.parametrize(("shell", "check"), [("zsh", ["-n"]), ("fish", ["--no-execute"])])
def test_the_script_of_another_shell_is_read_by_it(shell: str, check: list[str], tmp_path: Path):
    status, out, _ = said(["completion", shell])
    assert status == 0 and "max-new-tokens" in out and "'" in out
    assert out.count("'") % 2 == 0
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "drpo"
    path.write_text(out)
    subprocess.run([shell, *check, str(path)], check=True)
    if shell == "fish":
        asked = f"source {path}; complete --do-complete 'drpo tr'; complete --do-complete 'drpo train dem'"
        done = subprocess.run(["fish", "--no-config", "-c", asked], capture_output=True, text=True, check=True)
        assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["train", "demo"]


def test_an_unknown_shell_is_refused():
    assert "did you mean 'bash'" in refused(["completion", "bsh"])
    assert "name one shell: bash, zsh, fish" in refused(["completion"])
    assert set(SHELLS) == {"bash", "zsh", "fish"}
