"""The generic prompts: 32 that are shipped beside this file, or a list of the user's own."""

from pathlib import Path

import yaml

from lib.errors import InputError

_SHIPPED = Path(__file__).with_name("prompts.yaml")


def generic_prompts(prompts: Path | None) -> list[str]:
    """The texts that a YAML file lists, each once; without a file the shipped ones."""
    path = prompts or _SHIPPED
    try:
        texts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"--prompts {path} cannot be read: {error.strerror}; leave it out for the shipped ones"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise InputError(f'--prompts {path} must hold a list of texts, as in: - "a photo taken outdoors"')
    for text in texts:
        if "{}" in text:
            raise InputError(f"--prompts {path}: {text!r} waits for a class name; generic prompts name none")
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        raise InputError(f"--prompts {path} holds {len(distinct)} texts; shares of an image need at least 2")
    return distinct
