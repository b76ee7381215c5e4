"""What a check found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Args:
        check: its name.
        verdict: "ok"; "note", worth knowing but not wrong; "broken", training on this would go wrong.
        figure: what was measured.
        budget: what it should be.
        advice: what to do; empty where nothing is to be done.
        values: the figures by name, for programs.
    """

    check: str
    verdict: Verdict
    figure: str
    budget: str = ""
    advice: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


def judge(fine: bool, advice: str, otherwise: Verdict = "broken") -> tuple[Verdict, str]:
    """Return the verdict, and the advice where it is not "ok".

    Example:
        >>> judge(True, "mend it"), judge(False, "mend it")
        (('ok', ''), ('broken', 'mend it'))
    """
    return ("ok", "") if fine else (otherwise, advice)
