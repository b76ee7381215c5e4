"""The page's table is what the tests of the adapters found, and all of it is rounding."""

import json

from adapters import parity
from adapters.cases import SPECS


def test_the_page_shows_what_was_found():
    results = json.loads(parity.FIGURES.read_text())
    assert parity.BEGIN + parity.table(results) + parity.END in parity.PAGE.read_text()
    errors = [error for result in results for error in result["error"].values()]
    assert max(errors) < 1e-6 and min(errors) > 0


def test_every_framework_that_is_called_tested_is_in_it():
    results = json.loads(parity.FIGURES.read_text())
    versions: dict[str, set[str]] = {}
    for result in results:
        versions.setdefault(result["framework"].split(",")[0].split(" (")[0], set()).add(result["version"])
    assert versions["TRL"] == {"1.10.0", "1.14.2", "1.16.0"} and versions["verl"] == {"0.9.1"}
    assert {"SkyRL", "Tinker", "prime-rl", "OpenRLHF"} <= set(versions)
    for result in results:
        assert len(set(result["error"]) & set(SPECS)) >= 4, result["framework"]


def test_what_ran_end_to_end_has_its_figures():
    results = {(result["framework"], result["version"]) for result in json.loads(parity.FIGURES.read_text())}
    assert set(parity.RAN) <= results
    demo = parity.ROOT / "cluster" / "trl" / "results" / "demo.json"
    run = json.loads(demo.read_text())
    assert run["trl"] == "1.16.0" and run["log"][-1]["step"] == 64 and len(run["evaluations"]) == 2
    assert "loss_type: dr_grpo" in (parity.ROOT / "cluster" / "trl" / "demo.yaml").read_text()
