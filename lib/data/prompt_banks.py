"""Texts for classes: prompt templates, shipped or the user's own, negative prompts, and other names for the classes."""

from collections.abc import Sequence
from pathlib import Path

from lib.config.safe_yaml import read_yaml
from lib.data.pairs import fill
from lib.errors import InputError

_SHIPPED = Path(__file__).parent / "prompts"


def load_templates(prompts: str) -> tuple[str, ...]:
    """Return the templates of a shipped bank, by name, or of a YAML list; {} stands for the class."""
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}
    path = shipped.get(prompts, Path(prompts))
    templates = _listed(path, f"--prompts {prompts}", f"; the shipped banks are {', '.join(shipped)}")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"--prompts {prompts}: the template {template!r} has no {{}} for the class name")
    return templates


def load_negative_prompts(file: Path, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the texts of a YAML list that fit no image; one with {} stands for one text per class."""
    texts: list[str] = []
    for text in _listed(file, f"--negative-prompts {file}", "; name a YAML file with a list of texts"):
        if "{}" not in text:
            texts.append(text)
        elif classes is None:
            raise InputError(f"--negative-prompts {file}: {text!r} asks for class names, and the data has captions")
        else:
            texts += [fill(text, name) for name in classes]
    return tuple(dict.fromkeys(texts))


def renamed(classes: tuple[str, ...], file: Path) -> tuple[str, ...]:
    """Rename classes by a YAML file: a list in the order of the classes, or a mapping from some of their names."""
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


def _listed(path: Path, asked: str, advice: str) -> tuple[str, ...]:
    """Return the texts of a YAML list; InputError as of `read_yaml`."""
    texts = read_yaml(path, asked, advice)
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
        raise InputError(f'{asked} must hold a list of texts, as in: - "a photo of {{}}"')
    return tuple(dict.fromkeys(texts))
