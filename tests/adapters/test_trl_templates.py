"""Made-up conversations by the chat templates of many models, which TRL ships.

Not covered: templates whose contents are lists of parts (pictures); those of them that take texts besides are.
"""

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

pytestmark = pytest.mark.adapters
trl = pytest.importorskip("trl")

from support.conversations import check, scripts, takes_texts, tokenizer_of  # noqa: E402

TEMPLATES = {path.stem: path.read_text() for path in sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))}


def test_there_are_many() -> None:
    assert sum(takes_texts(tokenizer_of(template)) for template in TEMPLATES.values()) >= 35


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_was_sampled(name: str) -> None:
    made, played = tokenizer_of(TEMPLATES[name]), []
    if not takes_texts(made):
        pytest.skip(f"{name} takes no texts")

    @given(st.data())
    def hold(data: st.DataObject) -> None:
        played.append(check(made, data.draw(scripts(made))) is not None)

    hold()
    assert sum(played) > len(played) / 5
