"""YAML files of users: settings, prompts and names, read within limits and by the rules of YAML 1.2."""

import re
from os import PathLike
from typing import Any

import yaml

from lib.errors import InputError, raised_as

MOST_BYTES = 2**20

# The core schema of YAML 1.2.2, section 10.3.2. PyYAML's own rules are those of 1.1, in which 010 is 8, 1:30 is 90,
# no is false and 1e-3 is a text.
_FORMS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}


class _Loader(yaml.SafeLoader):
    """Refuses anchors, as a kilobyte of aliases can stand for a billion values, and a key that is there twice."""

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (&name, *name) are not read here; put texts with & or * in quotes",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        known = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in known:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is there twice; leave one out", problem_mark=key.start_mark
                )
            known.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Of decimal digits, which may begin with zeros, or of octal or hexadecimal ones."""
        base = {"0o": 8, "0x": 16}.get(node.value[:2], 10)
        return int(node.value, base)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version of YAML would take for something else than a text."""


for _name, _form in _FORMS.items():
    _tag, _whole = f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_form})\Z")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _whole, None)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def read_yaml(path: str | PathLike, asked: str, advice: str = "") -> object:
    """The content of a YAML file; InputError, beginning with the flag and value in `asked`, where it cannot be used.

    Such are what is no file, not UTF-8, larger than MOST_BYTES, or has anchors or a key twice. advice: the end of the
    error's line where the file cannot be opened.
    """
    # Here, not above: lib.data loads torch, and --help does not wait for that.
    from lib.files import decode, open_file

    def unread(error: Exception) -> InputError:
        return InputError(f"{asked} cannot be read ({getattr(error, 'strerror', None) or 'not a file'}){advice}")

    with raised_as(unread, OSError), open_file(path) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise InputError(f"{asked} has more than {MOST_BYTES:,} bytes, the most that is read; is it another file?")
    # Values such as !!bool x make the loader raise anything.
    with raised_as(lambda error: InputError(f"{asked} is not YAML: {_reason(error)}"), Exception):
        return yaml.load(decode(content), _Loader)


def yaml_text(values: object, **style: Any) -> str:
    """The values as YAML that `read_yaml` reads as the same ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=10_000, **style)


def _reason(error: Exception) -> str:
    """The fault and its place, without the lines around it, which could show half of a secret address."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        parts = [error.context, error.problem, f"line {mark.line + 1}, column {mark.column + 1}" if mark else None]
        text = ", ".join(part for part in parts if part)
    return " ".join(text.split())[:300] or type(error).__name__
