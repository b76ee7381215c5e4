"""The finding of a check."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Args:
        check: its name.
        verdict: "ok"; "note": worth knowing, not wrong; "broken": training would fail.
        figure: the measurement.
        budget: the accepted value.
        advice: a remedy; may be empty.
        values: figures by name, for programs.
    """

    check: str
    verdict: Verdict
    figure: str
    budget: str = ""
    advice: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


def judge(fine: bool, advice: str, otherwise: Verdict = "broken") -> tuple[Verdict, str]:
    """Return the verdict, with the advice if it is not "ok".

    Example:
        >>> judge(True, "mend it"), judge(False, "mend it")
        (('ok', ''), ('broken', 'mend it'))
    """
    return ("ok", "") if fine else (otherwise, advice)
