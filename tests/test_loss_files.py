"""Every registered loss comes with a page, a test and configs, and stands in the table."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.registration import register_all
from mmdet_lt.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 250

register_all()
CLASSES = {cls for cls in MODELS.module_dict.values() if isinstance(cls, type)}
LOSSES = sorted((c for c in CLASSES if issubclass(c, LongTailLoss)), key=lambda c: c.__name__)
each_loss = pytest.mark.parametrize('cls', LOSSES, ids=lambda cls: cls.__name__)


@pytest.fixture(scope='module')
def tool():
    path = ROOT / 'tools' / 'docs' / 'loss_table.py'
    spec = importlib.util.spec_from_file_location('loss_table', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configs_using(cls, pattern):
    word = f"type='mmdet_lt.{cls.__name__}'"
    return [p for p in (ROOT / 'configs' / 'lvis').glob(pattern) if word in p.read_text()]


@each_loss
def test_page_and_test(cls):
    module = cls.__module__.rpartition('.')[2]
    page = ROOT / 'docs' / 'losses' / f'{module}.md'
    assert page.is_file(), f'write {page.relative_to(ROOT)}'
    text = page.read_text()
    assert cls.__name__ in text and cls.tags.url in text
    own = inspect.signature(cls.__init__).parameters
    base = inspect.signature(LongTailLoss.__init__).parameters
    for name, parameter in own.items():
        if name not in base and parameter.kind is not parameter.VAR_KEYWORD:
            assert f'`{name}`' in text, f'{page.name} does not describe {name}'
    test = ROOT / 'tests' / 'models' / 'losses' / f'test_{module}.py'
    assert test.is_file() and cls.__name__ in test.read_text(), f'write {test.relative_to(ROOT)}'


@each_loss
def test_configs(cls):
    """Two-stage; also one-stage for sigmoid losses with the same columns in both kinds of heads.

    Softmax losses work in dense heads, too, but nobody trains them there.
    """
    assert configs_using(cls, 'mask-rcnn_*.py')
    loss = cls()
    if cls.sigmoid and loss.dense_columns(9) == loss.get_cls_channels(9):
        assert configs_using(cls, 'retinanet_*.py')


@each_loss
def test_files_are_short(cls):
    path = Path(inspect.getsourcefile(cls))
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_table_is_up_to_date(tool):
    text = (ROOT / 'docs' / 'losses.md').read_text()
    table = tool.loss_table()
    assert all(f'`{cls.__name__}`' in table for cls in LOSSES)
    assert tool.with_table(text, table) == text, 'run tools/docs/loss_table.py --write'


def test_table_goes_between_its_marks(tool):
    text = f'a\n{tool.BEGIN}\nold\n{tool.END}\nb'
    assert tool.with_table(text, 'new') == f'a\n{tool.BEGIN}\nnew\n{tool.END}\nb'
    for broken in ('a', f'{tool.BEGIN}\nold', f'old\n{tool.END}'):
        with pytest.raises(InputError, match='losses.md'):
            tool.with_table(broken, 'new')


def test_table_says_what_the_losses_are(tool):
    rows = {line.split('|')[1].split('`')[1]: line for line in tool.loss_table().splitlines()[2:]}
    cells = [cell.strip() for cell in rows['EQLv2Loss'].split('|')[3:8]]
    assert cells == ['sigmoid', '', 'yes', 'C + 1', 'C']
    cells = [cell.strip() for cell in rows['EQLLoss'].split('|')[3:8]]
    assert cells == ['sigmoid', 'yes', '', 'C', 'C']
