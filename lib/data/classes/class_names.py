"""Class names of the user's own in place of the data's, for prompts and reports."""

from pathlib import Path

from lib.config.safe_yaml import read_yaml
from lib.errors import InputError


def renamed(classes: tuple[str, ...], file: Path) -> tuple[str, ...]:
    """The classes' names after a YAML file: a list in the data's order, or a mapping of some of the data's names."""
    names = read_yaml(file, f"--class-names {file}")
    if isinstance(names, list):
        if len(names) != len(classes):
            raise InputError(
                f"--class-names {file} lists {len(names)} names for {len(classes)} classes; list one for each, in "
                f"this order: {', '.join(classes)}"
            )
        return tuple(_name(name, file) for name in names)
    if not isinstance(names, dict):
        raise InputError(f'--class-names {file} must hold a list of names, or lines as in: "{classes[0]}: a name"')
    unknown = [str(name) for name in names if name not in classes]
    if unknown:
        raise InputError(
            f"--class-names {file} names {unknown[0]!r}, which is no class of the data; they are {', '.join(classes)}"
        )
    return tuple(_name(names.get(name, name), file) for name in classes)


def _name(name: object, file: Path) -> str:
    if not isinstance(name, str) or not name.strip():
        raise InputError(
            f"--class-names {file}: {name!r} is no name; put words in quotes where YAML reads them as more"
        )
    return name.strip()
