"""Recipes of several stages: hand-over, resume, refusal, class activation maps in between."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from toy import make_toy_coco, toy_config

from mmdet_lt import InputError
from mmdet_lt.cam import extract
from mmdet_lt.engine import stages as tool

CAMS = "dict(type='mmdet_lt.CAMSampler')"


def write_config(path, sampler="dict(type='DefaultSampler')", extra=''):
    text = f"launcher = 'none'\ntrain_dataloader = dict(sampler={sampler})\n{extra}"
    path.write_text(text)
    return path


def read(path, folder):
    config = Config.fromfile(path)
    config.work_dir = str(folder)
    return config


class Trainer:
    """Stands for training: writes a checkpoint whose content is the config and its start."""

    def __init__(self):
        self.runs = []
        self.dies = 0

    def __call__(self, config, resume):
        folder = Path(config.work_dir)
        self.runs.append((folder.name, config, resume))
        checkpoint = folder / 'iter_1.pth'
        start = config.get('load_from')
        start = torch.load(start) if start else ''
        torch.save(f'{config.get("seed")} {start}', checkpoint)
        (folder / 'last_checkpoint').write_text(str(checkpoint))
        if self.dies == len(self.runs):
            raise KeyboardInterrupt

    @property
    def names(self):
        return [name for name, *_ in self.runs]


@pytest.fixture
def train():
    return Trainer()


@pytest.fixture
def recipe(tmp_path, train, monkeypatch):
    """Three configs and a function that runs the first two of them, or other sources."""
    monkeypatch.setattr(tool.checkpoints, 'check_checkpoint', lambda *_: None)  # they are text
    monkeypatch.setattr(tool, 'gc', SimpleNamespace(collect=lambda: None))  # nothing to collect
    configs = [write_config(tmp_path / f'{k}.py') for k in 'abc']

    def run(*sources, **options):
        stages = tool.load_stages(sources or configs[:2], tmp_path / 'out', read)
        return tool.run_stages(stages, train, **options)

    run.configs = configs
    return run


def test_each_stage_starts_from_the_one_before(tmp_path, recipe, train):
    last = recipe(*recipe.configs)
    assert last == str(tmp_path / 'out/stage3/iter_1.pth')
    loaded = [config.get('load_from') for _, config, _ in train.runs]
    assert loaded == [None, *(str(tmp_path / f'out/stage{k}/iter_1.pth') for k in (1, 2))]
    # The same command again has nothing to do, with or without leave to overwrite.
    assert recipe(*recipe.configs) == recipe(*recipe.configs, overwrite=True) == last
    assert len(train.runs) == 3


def test_a_moved_recipe_is_still_the_same(tmp_path, recipe, train):
    recipe()
    (tmp_path / 'out').rename(tmp_path / 'moved')
    stages = tool.load_stages(recipe.configs[:2], tmp_path / 'moved', read)
    assert tool.run_stages(stages, train) == str(tmp_path / 'moved/stage2/iter_1.pth')
    assert len(train.runs) == 2


@pytest.mark.parametrize('number', [1, 2])
def test_an_interrupted_stage_goes_on(recipe, train, number):
    train.dies = number
    with pytest.raises(KeyboardInterrupt):
        recipe()
    recipe()
    resumed = [(name, resume) for name, _, resume in train.runs]
    assert resumed[number - 1 :][:2] == [(f'stage{number}', False), (f'stage{number}', True)]
    assert len(resumed) == 3 and resumed[-1][0] == 'stage2'


def test_another_config_is_refused(recipe, train):
    recipe()
    write_config(recipe.configs[1], extra='seed = 1\n')
    with pytest.raises(InputError, match='begun with another config .`seed` was absent.*now 1'):
        recipe()
    assert len(train.runs) == 2
    recipe(overwrite=True)  # what fits is kept
    assert train.names == ['stage1', 'stage2', 'stage2'] and not train.runs[-1][2]


def test_another_first_stage_makes_the_second_another_run(tmp_path, recipe, train):
    recipe()
    torch.save('other weights', tmp_path / 'out/stage1/iter_1.pth')
    with pytest.raises(InputError, match='stage2 holds iter_1.pth of a run.*another checkpoint'):
        recipe()
    recipe(overwrite=True)
    assert train.names == ['stage1', 'stage2', 'stage2']
    write_config(recipe.configs[0], extra='seed = 1\n')
    recipe(overwrite=True)
    assert train.names[3:] == ['stage1', 'stage2']


def test_a_later_stage_is_refused_before_an_earlier_one_is_trained(tmp_path, recipe, train):
    recipe(*recipe.configs)
    (tmp_path / 'out/stage1').rename(tmp_path / 'away')
    with pytest.raises(InputError, match='stage 1 in .* is not finished: stage 2 began from'):
        recipe(*recipe.configs)
    (tmp_path / 'away').rename(tmp_path / 'out/stage1')
    write_config(recipe.configs[2], extra='seed = 1\n')
    write_config(recipe.configs[1], extra='seed = 1\n')
    with pytest.raises(InputError, match='stage2 holds iter_1.pth'):
        recipe(*recipe.configs)
    assert len(train.runs) == 3 and not (tmp_path / 'out/stage4').exists()


def test_checkpoints_of_another_tool_are_not_overwritten(tmp_path, recipe, train):
    (tmp_path / 'out/stage1').mkdir(parents=True)
    (tmp_path / 'out/stage1/epoch_9.pth').write_text('')
    for note in (None, '[]', '{"mark": {"config": "", "parent": null}, "checkpoint": null}'):
        if note is not None:
            (tmp_path / 'out/stage1/stage.json').write_text(note)
        with pytest.raises(InputError, match='epoch_9.pth of a run that was begun by another tool'):
            recipe()
    (tmp_path / 'out/stage1/stage.json').write_text('{')
    with pytest.raises(InputError, match='not complete JSON'):
        recipe()
    (tmp_path / 'out/stage1/stage.json').unlink()
    recipe(overwrite=True)
    assert train.names == ['stage1', 'stage2']


def test_an_overwritten_stage_never_goes_on_from_the_run_it_replaces(tmp_path, recipe, train):
    recipe()
    write_config(recipe.configs[1], extra='seed = 1\n')

    def killed(config, resume):
        assert not resume and not (tmp_path / 'out/stage2/last_checkpoint').exists()
        raise KeyboardInterrupt

    stages = tool.load_stages(recipe.configs[:2], tmp_path / 'out', read)
    with pytest.raises(KeyboardInterrupt):
        tool.run_stages(stages, killed, overwrite=True)
    with pytest.raises(InputError, match='no file last_checkpoint'):
        recipe()
    recipe(overwrite=True)
    assert train.runs[-1][0] == 'stage2' and not train.runs[-1][2]


def test_a_stage_without_a_checkpoint(tmp_path, recipe):
    stages = tool.load_stages(recipe.configs[:2], tmp_path / 'out', read)
    with pytest.raises(InputError, match='stage 1 wrote no checkpoint.*default_hooks.checkpoint'):
        tool.run_stages(stages, lambda *_: None)


def test_load_from_of_a_later_config_is_kept(tmp_path, recipe, train, capsys):
    torch.save('weights', tmp_path / 'own.pth')
    own = f"load_from = '{tmp_path / 'own.pth'}'\n"
    write_config(recipe.configs[1], extra=own)
    recipe()
    assert train.runs[1][1].load_from == str(tmp_path / 'own.pth')
    assert 'Stage 2 starts from its own `load_from`' in capsys.readouterr().out
    # It does not depend on stage 1, which may be trained again.
    write_config(recipe.configs[0], extra='seed = 1\n')
    recipe(overwrite=True)
    assert train.names == ['stage1', 'stage2', 'stage1']
    torch.save('others', tmp_path / 'own.pth')
    with pytest.raises(InputError, match='begun from another checkpoint'):
        recipe()


def test_a_checkpoint_in_place_of_the_first_stage(tmp_path, recipe, train):
    torch.save('weights', tmp_path / 'given.pth')
    write_config(recipe.configs[1], extra="load_from = 'other.pth'\n")
    for _ in range(2):
        recipe(tmp_path / 'given.pth', *recipe.configs[1:])
    assert train.names == ['stage2', 'stage3']
    assert train.runs[0][1].load_from == str(tmp_path / 'given.pth')
    torch.save('others', tmp_path / 'given.pth')
    with pytest.raises(InputError, match='stage2 .*begun from another checkpoint'):
        recipe(tmp_path / 'given.pth', *recipe.configs[1:])


@pytest.fixture
def extracted(monkeypatch):
    """Extractions that would have been run; each leaves a file."""
    calls = []

    def extract_cams(config, checkpoint, path, method, group):
        calls.append((config.get('seed'), checkpoint, method))
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(method)

    monkeypatch.setattr(extract, 'extract_cams', extract_cams)
    return calls


def test_maps_are_extracted_between_stages(tmp_path, recipe, train, extracted):
    write_config(recipe.configs[0], extra='seed = 5\n')
    write_config(recipe.configs[1], CAMS, 'seed = 6\n')
    for _ in range(2):
        recipe()
    checkpoint = str(tmp_path / 'out/stage1/iter_1.pth')
    assert extracted == [(5, checkpoint, 'hirescam')]  # by the config of the stage before
    sampler = train.runs[1][1].train_dataloader.sampler
    assert Path(sampler.cams).read_text() == 'hirescam' and sampler.checkpoint == checkpoint
    with pytest.raises(InputError, match='with other class activation maps'):
        recipe(cam_method='gradcam')
    recipe(cam_method='gradcam', overwrite=True)
    assert train.names == ['stage1', 'stage2', 'stage2'] and extracted[1][2] == 'gradcam'
    sampler = train.runs[2][1].train_dataloader.sampler
    assert Path(sampler.cams).read_text() == 'gradcam'


def test_maps_of_a_given_checkpoint(tmp_path, recipe, extracted):
    torch.save('weights', tmp_path / 'given.pth')
    recipe(tmp_path / 'given.pth', write_config(recipe.configs[1], CAMS, 'seed = 6\n'))
    assert extracted == [(6, str(tmp_path / 'given.pth'), 'hirescam')]


def test_maps_from_annotations_need_no_extraction(recipe, extracted):
    sampler = "dict(type='mmdet_lt.CAMSampler', mask_source='mask')"
    for config in recipe.configs[:2]:
        write_config(config, sampler)
    recipe()
    assert not extracted


def test_bad_recipes(tmp_path):
    config = write_config(tmp_path / 'a.py')

    def refused(*sources, folder='out'):
        with pytest.raises(InputError) as caught:
            tool.load_stages(sources, tmp_path / folder, read)
        return str(caught.value)

    assert 'at least two stages, found 1' in refused(config)
    cam = write_config(tmp_path / 'c.py', CAMS)
    assert 'stage 1' in refused(cam, config) and 'class activation' in refused(cam, config)
    assert 'stage 2 should be a config' in refused(config, 'b.pth')
    assert 'no.pth (stage 1) expected, found nothing' in refused(tmp_path / 'no.pth', config)
    assert 'found a file' in refused(config, config, folder='a.py')
    resumed = write_config(tmp_path / 'r.py', extra='resume = True\n')
    assert '`resume`' in refused(config, resumed)
    start = write_config(tmp_path / 's.py', extra="load_from = 'no.pth'\n")
    assert 'no.pth (load_from of stage 2)' in refused(config, start)


def test_visualizers_are_told_apart(tmp_path):
    extra = "visualizer = dict(type='DetLocalVisualizer', name='visualizer')\n"
    config = write_config(tmp_path / 'a.py', extra=extra)
    stages = tool.load_stages([config, config], tmp_path, read)
    assert [stage.config.visualizer.name for stage in stages] == ['stage1', 'stage2']


def detectors(folder, **sampler):
    """Stages of a toy detector; the second pastes by maps."""
    configs = [toy_config(folder, 'faster_rcnn') for _ in range(2)]
    configs[1].train_dataloader.sampler = dict(type='mmdet_lt.CAMSampler', **sampler)
    stages = [tool.Stage(k, f'{k}.py', folder, config) for k, config in enumerate(configs, 1)]
    return stages


def test_what_has_no_maps_is_refused_early(tmp_path):
    stages = detectors(tmp_path)
    tool.check_stages(stages, 'hirescam')
    stages[0].config.test_dataloader.dataset.pipeline.pop()
    with pytest.raises(InputError, match='must end with PackDetInputs'):
        tool.check_stages(stages, 'hirescam')
    stages[0].config.test_dataloader = None
    with pytest.raises(InputError, match='`test_dataloader` in 1.py, found none'):
        tool.check_stages(stages, 'hirescam')
    stages[0] = tool.Stage(1, 'https://host/a.pth', tmp_path)
    with pytest.raises(InputError, match='stage 1 should be a local file'):
        tool.check_stages(stages, 'hirescam')


def test_names_in_hooks_of_every_later_stage_are_checked(tmp_path):
    stages = detectors(tmp_path, mask_source='box')
    stages.append(tool.Stage(3, '3.py', tmp_path, toy_config(tmp_path, 'faster_rcnn')))
    stages[2].config.custom_hooks = [dict(type='mmdet_lt.FreezeHook', trainable=['fc_clz'])]
    with pytest.raises(InputError, match='fc_clz'):
        tool.check_stages(stages, 'hirescam')


def test_settings_of_a_stage_end_with_it(recipe, train):
    cudnn, seen = torch.backends.cudnn, []

    def run(config, resume):
        seen.append((cudnn.benchmark, torch.are_deterministic_algorithms_enabled()))
        train(config, resume)
        cudnn.benchmark = True
        torch.use_deterministic_algorithms(True)

    stages = tool.load_stages(recipe.configs, Path(recipe.configs[0]).parent / 'out', read)
    before = cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    tool.run_stages(stages, run)
    assert seen == [before] * 3


def test_the_note_says_what_a_run_began_with(tmp_path, recipe):
    recipe()
    note = json.loads((tmp_path / 'out/stage2/stage.json').read_text())
    assert note['checkpoint'] == 'iter_1.pth'
    assert note['mark']['config']['train_dataloader.sampler.type'] == 'DefaultSampler'


@pytest.mark.parametrize('given', [False, True])
def test_real_maps(tmp_path, recipe, given):
    """Maps of a real detector, by its own config or, for a given checkpoint, by that which pastes.

    The digest in their name is that of the checkpoint, and the file is made for it.
    """
    from mmengine.registry import init_default_scope

    from mmdet_lt.cam.store import CAMFile
    from mmdet_lt.utils.files import file_digest

    make_toy_coco(tmp_path / 'data', num_images=4)
    init_default_scope('mmdet')
    configs = detectors(tmp_path / 'data')
    for stage in configs:
        stage.config.train_dataloader.dataset.type = 'mmdet_lt.LVISDataset'
        stage.config.launcher = 'none'
        stage.folder = tmp_path / f'stage{stage.number}'
    configs[1].config.train_dataloader.dataset.pipeline.insert(2, dict(type='mmdet_lt.CAMPaste'))
    runs = []

    def train(config, resume):
        runs.append(config)
        folder = configs[len(runs) - 1 + given].folder
        state = tool._model(config).state_dict()
        torch.save(dict(state_dict=state), folder / 'a.pth')
        (folder / 'last_checkpoint').write_text(str(folder / 'a.pth'))

    if given:
        (tmp_path / 'stage1').mkdir()
        train_model = tool._model(configs[0].config)
        torch.save(dict(state_dict=train_model.state_dict()), tmp_path / 'stage1/a.pth')
        configs[0] = tool.Stage(1, str(tmp_path / 'stage1/a.pth'), tmp_path / 'stage1')
    tool.run_stages(configs, train)
    digest = file_digest(tmp_path / 'stage1/a.pth')
    sampler = runs[-1].train_dataloader.sampler
    assert sampler.cams == str(tmp_path / f'stage1-hirescam-{digest[:12]}.cams')
    cams = CAMFile(sampler.cams)
    assert len(cams) == 8 and cams.header['checkpoint_digest'] == digest
    assert cams.header['method'] == 'hirescam'
