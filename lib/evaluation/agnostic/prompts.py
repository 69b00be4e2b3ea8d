"""The generic prompts: 32 that are shipped beside this file, or a list of the user's own."""

from pathlib import Path

from lib.config.safe_yaml import read_yaml
from lib.errors import InputError

_SHIPPED = Path(__file__).with_name("prompts.yaml")


def generic_prompts(prompts: Path | None) -> list[str]:
    """The texts that a YAML file lists, each once; without a file the shipped ones."""
    path = prompts or _SHIPPED
    texts = read_yaml(path, f"--prompts {path}", "; leave it out for the shipped ones")
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f'--prompts {path} must hold a list of texts, as in: - "a photo taken outdoors"')
    for text in texts:
        if "{}" in text:
            raise InputError(f"--prompts {path}: {text!r} waits for a class name; generic prompts name none")
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        raise InputError(f"--prompts {path} holds {len(distinct)} texts; shares of an image need at least 2")
    return distinct
