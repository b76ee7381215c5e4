"""The comparison sees the smallest difference that a float can have, what is missing and what is new."""

import copy
import json
import math

import compare
import pytest
from driver import STATUS
from runs import Run

AT = "step 1, update 0, problem a, sample 0"
RUN = Run("tiny", "tiny", "smoke")
RESULT = {
    STATUS: {"the command": {"train": 0}},
    "metrics": {"step 1": {"grad_norm": 0.5, "updates": [{"loss": 0.0}, {"loss": 1.0}]}},
    "rollouts": {"step 1, problem a, sample 0": {"token_ids": [7, 0], "text": "x", "reward": None}},
    "token": {AT: {"logp": [-0.5, -1.5], "weight": [0.25, 0.25]}},
    "weights": {"model": {"a.weight": {"sha256": "12", "numbers": [1.0, 2.0]}, "b.weight": {"sha256": "12"}}},
}


def moved(run: Run, *path: object, value: object) -> list[compare.Moved]:
    new = copy.deepcopy(RESULT)
    place = new
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return compare.compare(run, RESULT, json.loads(json.dumps(new)))[0]


def test_equal_results_are_equal():
    assert compare.compare(RUN, RESULT, copy.deepcopy(RESULT)) == ([], 0.0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((STATUS, "the command", "train"), 1),
        (("metrics", "step 1", "updates", 1, "loss"), math.nextafter(1.0, 2.0)),
        (("metrics", "step 1", "updates", 0, "loss"), -0.0),
        (("metrics", "step 1", "grad_norm"), float("nan")),
        (("metrics", "step 1", "new"), 1.0),
        (("rollouts", "step 1, problem a, sample 0", "token_ids"), [7, 1]),
        (("rollouts", "step 1, problem a, sample 0", "reward"), 0.0),
        (("token", AT, "logp"), [-0.5, math.nextafter(-1.5, 0)]),
        (("token", AT, "weight"), [0.25]),
        (("weights", "model", "b.weight", "sha256"), "13"),
    ],
)
def test_one_value_that_moved_is_reported(path, value):
    assert len(moved(RUN, *path, value=value)) == 1


def test_a_tolerance_is_for_numbers_and_not_for_sums_of_weights():
    critic = Run("critic", "tiny", "smoke", tolerance=1e-6)
    assert not moved(critic, "token", AT, "logp", value=[-0.5, -1.5000001])
    assert moved(critic, "token", AT, "logp", value=[-0.5, -1.50001])
    assert not moved(critic, "weights", "model", "a.weight", "sha256", value="13")
    assert moved(critic, "weights", "model", "a.weight", "numbers", value=[1.0, 2.1])
    assert moved(critic, "rollouts", "step 1, problem a, sample 0", "text", value="y")


def test_renamed_keys_are_compared_under_their_new_names(monkeypatch):
    table = {"grad_norm": "gradient_norm", "loss": ("twice", lambda loss, settings: 2 * loss)}
    monkeypatch.setattr(compare, "TABLES", {"metrics": table})
    new = copy.deepcopy(RESULT)
    new["metrics"]["step 1"] = {"gradient_norm": 0.5, "updates": [{"twice": 0.0}, {"twice": 2.0}]}
    assert compare.compare(RUN, RESULT, new) == ([], 0.0)
    new["metrics"]["step 1"]["gradient_norm"] = 0.75
    assert [m.key for m in compare.compare(RUN, RESULT, new)[0]] == ["gradient_norm"]
