"""What `drpo explain` says of the names that options take: methods, objectives, rewards and others."""

import inspect
from collections.abc import Iterator

from drpo import methods
from drpo.spec import import_named
from drpo.train.config import REGISTRIES


def names() -> list[str]:
    """Return the names of all methods and of everything that an option's spec names."""
    return sorted({*methods.METHODS, *(name for registry in REGISTRIES.values() for name in registry.entries)})


def meanings(name: str) -> Iterator[tuple[str, str]]:
    """Yield each thing of a name, as `grpo: a method`, and its description; `gdpo` is a method and an advantage.

    Args:
        name: as the option takes it, with or without arguments; case does not matter.

    Example:
        >>> [head for head, text in meanings("GDPO")]
        ['gdpo: a method, --method gdpo', 'gdpo: --advantage']
    """
    name = methods.canonical(name.partition("(")[0])
    if (make := methods.METHODS.get(name)) is not None:
        sets = f"It sets {methods.described(make())}; {make().source}."
        yield f"{name}: a method, --method {name}", f"{_text(make)}\n\n{sets}"
    for option, registry in REGISTRIES.items():
        first = next(other for other, same in REGISTRIES.items() if same is registry)
        if option == first and (entry := registry.entries.get(name)) is not None:
            module, _, attribute = entry.partition(":") if isinstance(entry, str) else ("", "", "")
            thing = import_named(module, attribute, registry.kind) if module else entry
            yield f"{name}: --{option.replace('_', '-')}", _text(getattr(thing, "func", thing))


def _text(thing: object) -> str:
    """A docstring without its example."""
    return (inspect.getdoc(thing) or "no description").partition("\n\nExample:")[0]
