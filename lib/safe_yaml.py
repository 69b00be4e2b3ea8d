"""YAML files of users: settings, prompts and names, read within limits."""

from os import PathLike

import yaml

from lib.errors import InputError

MOST_BYTES = 2**20


class _Loader(yaml.SafeLoader):
    """Refuses anchors: a kilobyte of aliases can stand for a billion values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (&name, *name) are not read here; put texts with & or * in quotes",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


def read_yaml(path: str | PathLike, asked: str, advice: str = "") -> object:
    """The content of a YAML file; InputError, beginning with the flag and value in `asked`, where it cannot be used.

    Such are what is no file, not UTF-8, larger than MOST_BYTES, or has anchors. advice: the end of the error's line
    where the file cannot be opened.
    """
    # Here, not above: lib.data loads torch, and --help does not wait for that.
    from lib.data.fields import decode
    from lib.data.files import open_file

    try:
        with open_file(path) as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{asked} cannot be read ({error.strerror or 'not a file'}){advice}") from None
    if len(content) > MOST_BYTES:
        raise InputError(f"{asked} has more than {MOST_BYTES:,} bytes, the most that is read; is it another file?")
    try:
        return yaml.load(decode(content), _Loader)
    except Exception as error:  # values such as 2024-13-45 or !!bool x make the loader raise anything
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{asked} is not YAML: {text[:300]}") from None
