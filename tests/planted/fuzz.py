"""Bad input that is let through, and folders of strangers that are trusted."""

from planted import Replacement

F, S, C = "tests/test_fuzz.py::", "tests/test_strangers.py::", "tests/test_cli.py::"
CONFIGURATIONS = f"{F}test_configurations[1]"


REPLACEMENTS = (
    Replacement(
        "a value of a configuration may be of any type",
        "drpo.train.config.saved:_typed",
        lambda right: lambda name, value, kind: value,
        (CONFIGURATIONS,),
    ),
)
