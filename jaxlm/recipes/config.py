"""From a config file and `--config.a.b=value` overrides to frozen, typed dataclasses, checked once, at the edge.

A config file is Python with `get_config() -> ml_collections.ConfigDict` (or `get_config(argument)`, selected as
`path/to/config.py:argument`). A ConfigDict has no schema, so a typo would become a new field: `to_dataclass` closes
that hole. It refuses unknown fields, wrong types and values outside a `Literal`, and names the nearest fields.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ml_collections

T = TypeVar("T")


def load_config(path: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The ConfigDict of `path.py` or `path.py:argument`, with `a.b=value` overrides applied in order.

    Values are read as Python literals, and as strings where they are not literals. Raises ValueError if the file is
    missing, has no `get_config`, or an override goes through a field that is not a group.
    """
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise ValueError(f"--config {file}: no such file (expected a Python file with get_config(); see configs/)")
    module_spec = importlib.util.spec_from_file_location("jaxlm_run_config", file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config {file}: the file defines no get_config()")
    config = module.get_config(argument) if argument else module.get_config()
    for change in overrides:
        override(config, change)
    return config


def override(config: ml_collections.ConfigDict, change: str) -> None:
    """Applies one change, "a.b=value", as `load_config` does."""
    name, equals, text = change.partition("=")
    if not equals:
        raise ValueError(f"--config.{change}: expected --config.{name}=VALUE")
    *groups, leaf = name.split(".")
    node = config
    for i, group in enumerate(groups):
        if isinstance(node, ml_collections.ConfigDict) and node.get(group) is None:
            with node.unlocked():
                node[group] = ml_collections.ConfigDict()
        node = _child(node, group, ".".join(groups[:i]))
    value = _literal(text)
    if isinstance(node, ml_collections.ConfigDict):
        # ConfigDict checks a new value against the old one's type; the dataclass is the only schema here.
        with node.unlocked(), node.ignore_type():
            node[leaf] = value
    elif isinstance(node, list):
        node[_index(node, leaf, ".".join(groups))] = value
    elif isinstance(node, dict):
        node[leaf] = value
    else:
        raise ValueError(f"--config.{name}: {'.'.join(groups)} is {node!r}, which has no fields")


def _child(node: Any, name: str, where: str) -> Any:
    if isinstance(node, list | tuple):
        return node[_index(node, name, where)]
    if isinstance(node, Mapping | ml_collections.ConfigDict):
        return node[name]
    raise ValueError(f"--config.{where}.{name}: {where} is {node!r}, which has no fields")


def _index(node: Sequence[Any], name: str, where: str) -> int:
    if not name.isdigit() or int(name) >= len(node):
        raise ValueError(f"--config.{where}.{name}: {where} is a list of {len(node)}: expected an index below that")
    return int(name)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def to_dataclass(cls: type[T], values: Any, where: str = "config") -> T:
    """Builds the frozen dataclass `cls` from a mapping, recursively; `where` is the path that errors name.

    Accepts an int for a float and a list for a tuple, and nothing else that is not of the annotated type. Raises
    ValueError on an unknown field (naming the nearest ones), a missing field, or a wrong type.
    """
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping | ml_collections.ConfigDict):
        raise ValueError(f"{where}: expected a group of fields ({cls.__name__}), found {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the fields are {', '.join(sorted(fields))}"
            raise ValueError(f"{where}.{name}: {cls.__name__} has no such field; {hint}")
    missing = [n for n, f in fields.items() if n not in values and _required(f)]
    if missing:
        raise ValueError(f"{where}: {cls.__name__} needs {', '.join(missing)}")
    return cls(**{name: _convert(hints[name], values[name], f"{where}.{name}") for name in values})


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where}: expected one of {', '.join(map(repr, args))}, found {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        return to_dataclass(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        items = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(items) != len(value):
            raise ValueError(f"{where}: expected {len(items)} items, found {len(value)}: {value!r}")
        return tuple(_convert(h, v, f"{where}.{i}") for i, (h, v) in enumerate(zip(items, value)))
    if origin is dict and isinstance(value, Mapping | ml_collections.ConfigDict):
        return {k: _convert(args[1], value[k], f"{where}.{k}") for k in value}
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: expected {_describe(hint)}, found {value!r} ({type(value).__name__})")


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [a for a in args if a is not type(None)]
    groups = [a for a in options if dataclasses.is_dataclass(a)]
    if groups and isinstance(value, Mapping | ml_collections.ConfigDict):
        return to_dataclass(typing.cast(type, max(groups, key=lambda group: _likeness(group, value))), value, where)
    errors = []
    for option in options:
        try:
            return _convert(option, value, where)
        except ValueError as e:
            errors.append(str(e))
    # With one real option its own message is the most precise.
    if len(errors) == 1:
        raise ValueError(errors[0])
    raise ValueError(f"{where}: expected {' or '.join(map(_describe, args))}, found {value!r} ({type(value).__name__})")


def _likeness(cls: Any, values: Any) -> tuple[int, int]:
    """How much a group of fields looks like this dataclass: most of all one without a field too many or too few."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    missing = sum(_required(f) and name not in values for name, f in fields.items())
    return sum(name in fields for name in values), -missing


def _describe(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


def to_dict(cfg: Any) -> dict[str, Any]:
    """A config dataclass as the plain dict that the run folder keeps as JSON; `to_dataclass` reads it back."""
    return dataclasses.asdict(cfg)
