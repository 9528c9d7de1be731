"""Reads YAML so that every refusal names the file, the line and the key.

A key that is given twice, that nobody asks for, or that is empty is refused: what an operator wrote and the agent does
not heed would be a false sense of safety.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import yaml

_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "timestamp"))
_NULL_TAG = "tag:yaml.org,2002:null"
_BOOL_TAG = "tag:yaml.org,2002:bool"
_YES = frozenset({"y", "yes", "true", "on"})


class ConfigError(ValueError):
    """A configuration file cannot be used; the message says where and why, for the person who wrote it."""


class Value(NamedTuple):
    """A text as it is written, and where it stands: file, line and key."""

    text: str
    where: str

    def refuse(self, problem: str) -> ConfigError:
        """Return what is to be raised where this value cannot be used."""
        return ConfigError(f"{self.where}: {problem}")


class YamlMapping:
    """A mapping of which keys are taken one by one; ``finish`` refuses those that are left."""

    def __init__(self, node: yaml.Node, file: str, path: str = "") -> None:
        self._file, self._path = file, path
        self.where = f"{file}:{node.start_mark.line + 1}" + (f": {path}" if path else "")
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{self.where}: keys with values are wanted")
        self._entries: dict[str, tuple[Value, yaml.Node]] = {}
        for key, value in node.value:
            name = _read_scalar(key, f"{file}:{key.start_mark.line + 1}")
            where = f"{file}:{key.start_mark.line + 1}: {path}{'.' if path else ''}{name.text}"
            if name.text in self._entries:
                raise ConfigError(f"{where}: it is given twice")
            self._entries[name.text] = (Value(name.text, where), value)

    def take_text(self, key: str) -> Value | None:
        """Return a value as text, None where the key is missing."""
        found = self._entries.pop(key, None)
        return None if found is None else _read_scalar(found[1], found[0].where)

    def take_bool(self, key: str) -> tuple[bool, Value] | None:
        """Return true or false as YAML spells them, None where the key is missing."""
        found = self._entries.pop(key, None)
        if found is None:
            return None
        value = _read_scalar(found[1], found[0].where)
        if found[1].tag != _BOOL_TAG:
            raise value.refuse(f"{value.text!r}: true or false is wanted")
        return value.text.lower() in _YES, value

    def take_list(self, key: str) -> tuple[Value, ...]:
        """Return a list of texts, empty where the key is missing; a list in the file is never empty."""
        found = self._entries.pop(key, None)
        if found is None:
            return ()
        name, node = found
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise name.refuse("a list with at least one entry is wanted")
        return tuple(_read_scalar(one, _name_line(name, one, self._file)) for one in node.value)

    def take_mapping(self, key: str) -> YamlMapping | None:
        """Return a mapping below a key, None where the key is missing; one in the file is never empty."""
        found = self._entries.pop(key, None)
        if found is None:
            return None
        name, node = found
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise name.refuse("it is empty; leave the key out if nothing is to be set")
        return YamlMapping(node, self._file, f"{self._path}{'.' if self._path else ''}{key}")

    def take_rest(self) -> dict[Value, Value]:
        """Return all that is left, names and texts, where names are free."""
        entries, self._entries = self._entries, {}
        return {name: _read_scalar(node, name.where) for name, node in entries.values()}

    def finish(self, known: Sequence[str]) -> None:
        """Refuse a key that was not taken; ``known`` are those that there could be."""
        for name, _node in self._entries.values():
            raise name.refuse(f"there is no such key; known are {', '.join(known)}")


def parse_yaml(text: bytes, file: str) -> YamlMapping | None:
    """Parse a document that is a mapping, None where there is nothing in it; raises ConfigError."""
    try:
        node = yaml.compose(text.decode("utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as err:
        raise ConfigError(f"{file}: it is not UTF-8 (byte {err.start})") from err
    except yaml.MarkedYAMLError as err:
        line = f":{err.problem_mark.line + 1}" if err.problem_mark else ""
        raise ConfigError(f"{file}{line}: it is not YAML: {err.problem}") from err
    except (yaml.YAMLError, RecursionError) as err:
        raise ConfigError(f"{file}: it is not YAML: {' '.join(str(err).split()) or 'nested too deeply'}") from err
    return None if node is None or node.tag == _NULL_TAG else YamlMapping(node, file)


def _name_line(name: Value, node: yaml.Node, file: str) -> str:
    key = name.where.rpartition(": ")[2]
    return f"{file}:{node.start_mark.line + 1}: {key}"


def _read_scalar(node: yaml.Node, where: str) -> Value:
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"{where}: a text is wanted")
    try:
        node.value.encode()
    except UnicodeEncodeError as err:  # an escape such as \ud800
        raise ConfigError(f"{where}: a text is wanted, and this is none in UTF-8") from err
    return Value(str(node.value), where)
