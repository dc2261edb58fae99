"""Name parts of a model by patterns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

from mmdet_lt.errors import InputError


def prefixes(name: str) -> list[str]:
    """A dotted name and the names of all modules it is in: ``a.b`` gives ['a', 'a.b']."""
    parts = name.split('.')
    return ['.'.join(parts[: i + 1]) for i in range(len(parts))]


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern names the parameter, buffer or module, or a module it is in.

    In a pattern ``*`` stands for anything, dots included.
    """
    return any(fnmatchcase(part, pattern) for part in prefixes(name) for pattern in patterns)


def check_patterns(patterns: Sequence[str], names: Sequence[str], key: str) -> tuple[str, ...]:
    """The patterns as a tuple, each of which names something.

    Args:
        patterns: One pattern or a list of them.
        names: Dotted names of the parameters or buffers they may name.
        key: Config key, for the message.

    Raises:
        InputError: There is no pattern, or one matches nothing; the nearest names are told.
    """
    listed = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    given = tuple(patterns) if listed else (patterns,)
    if not given or not all(isinstance(pattern, str) and pattern for pattern in given):
        raise InputError(
            f'`{key}` must name at least one part of the model, such as '
            f"['roi_head.bbox_head.fc_cls'], found {patterns!r}."
        )
    for pattern in given:
        if not any(is_named(name, [pattern]) for name in names):
            near = ', '.join(nearest(pattern, names))
            raise InputError(
                f'`{key}` names {pattern!r}, which matches no parameter or module of the model; '
                f'the nearest names are {near}.'
            )
    return given


def nearest(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    """The names of modules or parameters that are written most like a pattern."""
    wanted = pattern.strip('*.')
    depth = wanted.count('.') + 1

    def likeness(name: str) -> float:
        tail = '.'.join(name.split('.')[-depth:])
        return max(SequenceMatcher(None, wanted, text).ratio() for text in (name, tail))

    candidates = dict.fromkeys(part for name in names for part in prefixes(name))
    return sorted(candidates, key=likeness, reverse=True)[:count]
