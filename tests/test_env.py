"""`drpo env`: everything a report of a bug needs, and no secret."""

import json

import pytest
import torch

from drpo import __version__, cli
from drpo.cli import env
from support.hostile import refused


def test_it_says_what_a_report_needs(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    shown = {line[:16].strip(): line[16:].strip() for line in out.splitlines()}
    assert shown["drpo"] == __version__ and torch.__version__ in shown["torch build"]
    assert {
        "python",
        "system",
        "processor",
        "flags",
        "memory",
        "gpus",
        "versions",
        "cache",
        "free disk",
    } <= shown.keys()
    assert len(out.splitlines()) == len(env.collect())


def test_as_json_it_is_the_same(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(env.collect()) and found["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_no_secret_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: tuple):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HF_ENDPOINT", "DRPO_OF_TOMORROW", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hush-hush")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    cli.main(["env", *as_json])
    out = capsys.readouterr().out
    assert "hush" not in out and "HF_TOKEN" in out and "WANDB_API_KEY" in out and "AWS" not in out
    assert env.collect()["variables"]["OMP_NUM_THREADS"] == "3"


def test_a_cache_that_is_not_there_is_empty(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("DRPO_CACHE", str(tmp_path / "none"))
    assert env.collect()["cache"].endswith("0.00 GiB")


def test_it_takes_no_arguments():
    assert "surplus" in refused(["env", "surplus"])
