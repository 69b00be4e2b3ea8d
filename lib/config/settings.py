"""Settings: what every group of flags is, and the checks of their numbers."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

LARGEST_SEED = 2**32 - 1  # what NumPy, scikit-learn and PyTorch all take
MOST_WORKERS = 256  # on each rank: more are a slip of the finger, and so many processes bring a machine down
PrecisionFlag = Literal["auto", "bf16", "fp16", "fp32"]


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Settings:
    """A group of flags: a box of its own in --help, whose text is the docstring of the class."""

    def faults(self) -> list[str]:
        """What cannot work, a clause for each flag, with the remedy; each group adds its own."""
        return [
            f"{flag(field.name)} {self.shown(field.name)} must be {'finite numbers' if many else 'a finite number'}"
            for field in dataclasses.fields(self)
            for many in [isinstance(getattr(self, field.name), tuple)]
            if any(isinstance(number, float) and not math.isfinite(number) for number in self._values(field.name))
        ]

    def at_least_one(self, *names: str) -> list[str]:
        """Faults of fields that count something."""
        return [f"{flag(name)} {value} must be at least 1" for name, value in self._numbers(names) if value < 1]

    def not_negative(self, *names: str) -> list[str]:
        """Faults of fields that 0 switches off."""
        return [
            f"{flag(name)} {value} must not be negative (0 switches it off)"
            for name, value in self._numbers(names)
            if value < 0
        ]

    def above_zero(self, *names: str) -> list[str]:
        """Faults of fields that 0 makes meaningless."""
        return [f"{flag(name)} {value} must be greater than 0" for name, value in self._numbers(names) if not value > 0]

    def fractions(self, *names: str, whole: bool = True) -> list[str]:
        """Faults of parts and probabilities; `whole`: 1 is one of them."""
        faulty = [(name, value) for name, value in self._numbers(names) if not 0 <= value <= 1]
        found = [f"{flag(name)} {value} must be a fraction between 0 and 1" for name, value in faulty]
        ones = [name for name, value in self._numbers(names) if value == 1 and not whole]
        return found + [f"{flag(name)} {getattr(self, name)} must be below 1" for name in ones]

    def shown(self, name: str) -> str:
        """A field's value as it is typed."""
        return " ".join(map(str, self._values(name)))

    def given(self, name: str) -> bool:
        """Whether a field has another value than its default."""
        return getattr(self, name) != self.__dataclass_fields__[name].default

    def _values(self, name: str) -> tuple:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,)

    def _numbers(self, names: tuple[str, ...]) -> Iterator[tuple[str, int | float]]:
        """Those of the fields that hold a finite number, and no word such as auto."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, int | float) and math.isfinite(value):
                yield name, value
