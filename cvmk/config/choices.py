"""Tables whose keys depend on the name that one of them gives: an optimiser's own, a schedule's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Choices(NamedTuple):
    """What each name takes: its keys with their defaults. A key that only others take has no value (None), and is an error where it is given one."""

    key: str
    """The key that holds the name."""
    kind: str
    """What the names are names of, for a person."""
    default: str
    options: Mapping[str, Mapping[str, Any]]
    shared: frozenset[str] = frozenset()
    """Keys that whatever name takes without using them."""
    inherits: str | None = None
    """A key that names another of `options`, whose keys are taken, too."""

    def of(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """The keys that these values may have, with their defaults; None where a name is unknown, which the schema will say."""
        options = self.options.get(_word(values.get(self.key, self.default)))
        if options is None or self.inherits is None or self.inherits not in options:
            return None if options is None else dict(options)
        below = self.options.get(_word(values.get(self.inherits, options[self.inherits])))
        return None if below is None or self.inherits in below else {**below, **options}

    def complete(self, values: Any) -> Any:
        """The values of a table with the defaults of its name. Raises ValueError, naming key and owner, for a key of another name."""
        if not isinstance(values, Mapping) or (options := self.of(values)) is None:
            return values
        every = {key for found in self.options.values() for key in found}
        for key in sorted(every - {*options} - self.shared):
            if values.get(key) is not None:
                owners = [name for name, found in self.options.items() if key in found]
                raise ValueError(
                    f"{key} is a key of the {self.kind}{'s' * (len(owners) > 1)} {listed(owners)}, not of {self._named(values)}: "
                    f"leave it out, or change {' or '.join(one for one in (self.key, self.inherits) if one == self.key or one in options)}"
                )
        return dict.fromkeys(every - self.shared) | options | {key: value for key, value in values.items() if value is not None}

    def _named(self, values: Mapping[str, Any]) -> str:
        name = values.get(self.key, self.default)
        if self.inherits is None or self.inherits not in self.options[name]:
            return str(name)
        return f"{name} over {values.get(self.inherits, self.options[name][self.inherits])}"

    def defaults(self, key: str) -> str:
        """The defaults of a key by name, for its description: "lion 0.1; adamw, muon 0.2"."""
        found: dict[str, list[str]] = {}
        for name, options in self.options.items():
            if key in options:
                found.setdefault(_shown(options[key]), []).append(name)
        return "; ".join(f"{', '.join(names)} {value}" for value, names in found.items())


def listed(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _word(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
