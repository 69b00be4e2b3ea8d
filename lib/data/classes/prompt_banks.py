"""Owns prompt templates: the banks shipped beside this file, and banks of the user's own."""

from pathlib import Path

import yaml

from lib.errors import InputError

_SHIPPED = Path(__file__).parent / "prompts"


def load_templates(prompts: str) -> tuple[str, ...]:
    """Templates of a shipped bank, by name, or of a YAML file that lists them; {} stands for the class."""
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}
    path = shipped.get(prompts, Path(prompts))
    try:
        templates = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"--prompts {prompts} is no YAML file and no shipped bank; the banks are {', '.join(shipped)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {prompts} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(templates, list) or not templates or not all(isinstance(each, str) for each in templates):
        raise InputError(f'--prompts {prompts} must hold a list of templates, as in: - "a photo of {{}}"')
    for template in templates:
        if "{}" not in template:
            raise InputError(f"--prompts {prompts}: the template {template!r} has no {{}} for the class name")
    return tuple(dict.fromkeys(templates))
