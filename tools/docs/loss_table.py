"""Print the table of losses of docs/losses.md from the tags of the registered losses.

Example:
    python tools/docs/loss_table.py --write
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmdet_lt.engine import launch
from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.registration import register_all
from mmdet_lt.registry import MODELS

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'losses.md'
BEGIN, END = '<!-- table: tools/docs/loss_table.py --write -->', '<!-- end of table -->'
HEADER = ('loss', 'method', 'scores', 'statistics', 'learns', 'two-stage', 'one-stage')


def table_row(cls: type[LongTailLoss]) -> tuple[str, ...]:
    """Cells of one loss built with default arguments."""
    tags, loss = cls.tags, cls()
    module = cls.__module__.rpartition('.')[2]
    # A class count of its own: the widths do not depend on it.
    extra = loss.get_cls_channels(10) - 10
    dense = loss.dense_columns(10)

    def columns(number: int) -> str:
        return f'C + {number}' if number else 'C'

    return (
        f'[`{cls.__name__}`](losses/{module}.md)',
        f'[{tags.title}, {tags.paper}]({tags.url})',
        'sigmoid' if cls.sigmoid else 'softmax',
        'yes' if tags.statistics else '',
        'yes' if tags.running else '',
        columns(extra),
        'no' if dense is None else columns(dense - 10),
    )


def loss_table() -> str:
    """Markdown table of every registered loss, by name."""
    register_all()
    classes = {cls for cls in MODELS.module_dict.values() if isinstance(cls, type)}
    losses = sorted(
        (cls for cls in classes if issubclass(cls, LongTailLoss)), key=lambda cls: cls.__name__
    )
    rows = [HEADER, ('---',) * len(HEADER), *(table_row(cls) for cls in losses)]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def with_table(text: str, table: str) -> str:
    """``text`` with what lies between the marks replaced by ``table``.

    Raises:
        InputError: The marks are missing.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise InputError(f'{PAGE.name} must hold the lines `{BEGIN}` and `{END}`: add them.')
    return f'{head}{begin}\n{table}\n{end}{tail}'


def main(argv: list[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--write', action='store_true', help=f'renew the table in {PAGE.name}')
    args = parser.parse_args(argv)
    table = loss_table()
    if not args.write:
        print(table)
        return
    PAGE.write_text(with_table(PAGE.read_text(), table))


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
