"""Compare two configs key by key, without running the text of the older one."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

# These say where and how a run is started, not what is trained.
_START_KEYS = ('resume', 'load_from', 'work_dir', 'launcher', 'env_cfg')
# Everything the saved weights and optimizer state depend on, except what acts at test time or
# before the weights are loaded.
_MODEL = re.compile(r'(model|data_preprocessor)(\.|$)')
_MODEL_HARMLESS = re.compile(r'model\.(test_cfg|(.*\.)?init_cfg)(\.|$)')
# Which classes the training labels mean.
_DATASET = re.compile(
    r'train_dataloader\.dataset\.((dataset|datasets\.\d+)\.)*'
    r'(type|metainfo(\.(classes|CLASSES)(\..*)?)?)$'
)

MISSING = object()
"""Stands for a key that one of the two configs does not have."""


def parse_dumped(text: str) -> dict[str, Any]:
    """Read the config text that mmengine dumps into a work directory or a checkpoint.

    Only literals, ``dict(...)`` and displays are understood, and nothing is executed: a checkpoint
    can come from anywhere. Any other expression is kept as its source text.

    Args:
        text: Python source made of assignments.

    Raises:
        SyntaxError: The text is not Python.
    """
    result = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            result[statement.targets[0].id] = _value(statement.value)
    return result


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Dict):
        return {
            _value(key): _value(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        # mmengine writes dict({'a-b': 1}) where a key is no identifier.
        result = {}
        for item in map(_value, node.args):
            result.update(item if isinstance(item, dict) else {})
        return result | {word.arg: _value(word.value) for word in node.keywords if word.arg}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return ast.unparse(node)


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn nested dicts and lists of dicts into one level of dotted keys.

    Lists and tuples without a dict inside are leaves; the two kinds compare equal, as do a config
    object and its dumped text.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        _flatten(str(key), value, flat)
    return flat


def _flatten(key: str, value: Any, flat: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        if not value:
            flat[key] = {}
        for name, item in value.items():
            _flatten(f'{key}.{name}', item, flat)
    elif _holds_mapping(value):
        for index, item in enumerate(value):
            _flatten(f'{key}.{index}', item, flat)
    else:
        flat[key] = _leaf(value)


def _holds_mapping(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(isinstance(item, Mapping) or _holds_mapping(item) for item in value)
    return False


def _leaf(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_leaf(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # dumped as a bare name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, mapped to (old, new); keys of how a run is started are left out.

    Args:
        old: Config of the earlier run, e.g. from :func:`parse_dumped`.
        new: Config of the run to start.
    """
    before, after = flatten(old), flatten(new)
    result = {}
    for key in sorted(before.keys() | after.keys()):
        if key.split('.')[0] in _START_KEYS:
            continue
        pair = before.get(key, MISSING), after.get(key, MISSING)
        if pair[0] is MISSING or pair[1] is MISSING or pair[0] != pair[1]:
            result[key] = pair
    return result


def is_harmful(key: str) -> bool:
    """Whether training cannot be continued when this dotted key has changed."""
    if _MODEL.match(key):
        return not _MODEL_HARMLESS.match(key)
    return bool(_DATASET.match(key))


def describe(key: str, pair: tuple[Any, Any]) -> str:
    """One clause that names a changed key and both values, shortened."""
    old, new = ('absent' if value is MISSING else _short(value) for value in pair)
    return f'`{key}` was {old} and is now {new}'


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
