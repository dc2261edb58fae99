"""All cells of the matrix, and the page they make."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence

import torch
from tqdm import tqdm

from mmdet_lt.engine.compatibility.cell import (
    ADAPTED,
    BROKEN,
    MISSING,
    REFUSED,
    WORKS,
    Outcome,
    losses,
    run_cell,
)
from mmdet_lt.engine.compatibility.families import FAMILIES
from mmdet_lt.errors import InputError

Matrix = dict[tuple[str, str], Outcome]

PAGE = """# Compatibility

Written by `python tools/analysis/compatibility.py --write {path}`; do not edit.

Every cell is a tiny version of MMDetection's own config of the detector, trained for two iterations
and tested. It works if losses are finite, every classifier has a finite gradient that is not zero,
running statistics have moved, and every score of the test equals the one computed by hand from the
outputs of the classifier with the loss's own activation. What does not work stops with an error
before the first iteration. For sigmoid losses the matchers of DETR and Mask2Former have
`FocalLossCost` in place of `ClassificationCost`; without it those cells stop with a message that
says so.

- **✓** works with the stock head.
- **LT** works with the heads of the second column, which take the arguments of the stock ones
  ([heads.md](heads.md)).
- **✗** refused; the number is that of the message below.{missing}

{table}

## Messages

{notes}
"""


def select(names: Sequence[str] | None, known: Iterable[str], option: str) -> list[str]:
    """``names`` in the order of ``known``, all of them by default.

    Raises:
        InputError: An unknown name.
    """
    known = list(known)
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise InputError(f'`{option}` does not know {unknown}: choose among {", ".join(known)}.')
    return [name for name in known if not names or name in names]


def run_matrix(families: Sequence[str], names: Sequence[str], jobs: int = 1) -> Matrix:
    """Outcome of each (family, loss), with a progress bar."""
    if jobs < 1:
        raise InputError(f'`--jobs` must be at least 1, found {jobs}.')
    cells = [(family, name) for family in families for name in names]
    bar = tqdm(total=len(cells), unit='cell', smoothing=0.05)
    found: Matrix = {}
    context = multiprocessing.get_context('spawn')
    with bar, context.Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for cell, outcome in pool.imap_unordered(_run, cells, chunksize=4):
            found[cell] = outcome
            bar.update()
    return {cell: found[cell] for cell in cells}


def _run(cell: tuple[str, str]) -> tuple[tuple[str, str], Outcome]:
    family, name = cell
    classes = {cls.__name__: cls for cls in losses()}
    return cell, run_cell(family, classes[name])


def broken_cells(matrix: Matrix) -> list[str]:
    """One line for each cell that neither works nor is refused."""
    return [
        f'{family} with {name}: {outcome.detail}'
        for (family, name), outcome in matrix.items()
        if outcome.status == BROKEN
    ]


def markdown(matrix: Matrix) -> tuple[str, str]:
    """Table, and the numbered messages of refused cells."""
    families = list(dict.fromkeys(family for family, _ in matrix))
    names = list(dict.fromkeys(name for _, name in matrix))
    notes: dict[str, int] = {}

    def text(outcome: Outcome) -> str:
        if outcome.status == REFUSED:
            number = notes.setdefault(outcome.detail, len(notes) + 1)
            return f'✗ {number}'
        return {WORKS: '✓', ADAPTED: 'LT', MISSING: '–', BROKEN: '**broken**'}[outcome.status]

    short = [name.removesuffix('Loss') for name in names]
    lines = [['detector', 'heads of mmdet_lt', *short], ['---'] * (2 + len(names))]
    for family in families:
        heads = ', '.join(f'`{head}`' for head in sorted(set(FAMILIES[family].adapters.values())))
        lines.append([family, heads, *(text(matrix[family, name]) for name in names)])
    table = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
    listed = '\n'.join(f'{number}. {message}' for message, number in notes.items())
    return table, listed


def page(matrix: Matrix, path: str) -> str:
    """The whole page."""
    table, notes = markdown(matrix)
    packages = sorted({cell.detail for cell in matrix.values() if cell.status == MISSING})
    missing = ''
    if packages:
        missing = f'\n- **–** not run: needs {", ".join(packages)}, which was not installed.'
    return PAGE.format(path=path, table=table, notes=notes or 'None.', missing=missing)
