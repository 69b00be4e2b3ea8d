"""Prompt templates: the banks shipped beside this file, and banks of the user's own."""

from collections.abc import Sequence
from pathlib import Path

from lib.config.safe_yaml import read_yaml
from lib.data.pairs import fill
from lib.errors import InputError

_SHIPPED = Path(__file__).parent / "prompts"


def load_templates(prompts: str) -> tuple[str, ...]:
    """Templates of a shipped bank, by name, or of a YAML file that lists them; {} stands for the class."""
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}
    path = shipped.get(prompts, Path(prompts))
    templates = _listed(path, f"--prompts {prompts}", f"; the shipped banks are {', '.join(shipped)}")
    for template in templates:
        if "{}" not in template:
            raise InputError(f"--prompts {prompts}: the template {template!r} has no {{}} for the class name")
    return templates


def load_negative_prompts(file: Path, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Texts that a YAML file lists and that fit no image; one with {} stands for as many as there are classes."""
    texts: list[str] = []
    for text in _listed(file, f"--negative-prompts {file}", "; name a YAML file with a list of texts"):
        if "{}" not in text:
            texts.append(text)
        elif classes is None:
            raise InputError(f"--negative-prompts {file}: {text!r} asks for class names, and the data has captions")
        else:
            texts += [fill(text, name) for name in classes]
    return tuple(dict.fromkeys(texts))


def _listed(path: Path, asked: str, advice: str) -> tuple[str, ...]:
    """The texts of a YAML list; InputError as of `read_yaml`."""
    texts = read_yaml(path, asked, advice)
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
        raise InputError(f'{asked} must hold a list of texts, as in: - "a photo of {{}}"')
    return tuple(dict.fromkeys(texts))
