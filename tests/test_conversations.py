"""Made-up conversations by hand-made chat templates; tests/adapters/test_trl_templates.py has those of many models."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from support.conversations import NASTY, check, scripts, tokenizer_of

BRANCHING = {
    "drops what tools say",
    "says all twice",
}


@pytest.mark.parametrize("name", NASTY)
def test_what_is_trained_is_what_was_sampled(name: str) -> None:
    made, branches = tokenizer_of(NASTY[name]), []

    @settings(max_examples=settings.default.max_examples // 2)
    @given(st.data())
    def hold(data: st.DataObject) -> None:
        branches.append(check(made, data.draw(scripts(made))))

    hold()
    played = [n for n in branches if n is not None]
    assert len(played) >= len(branches) / 3
    assert any(played) == (name in BRANCHING)
