"""The contract suite can fail: each broken loss below is caught by the check meant for it."""

import inspect

import numpy as np
import pytest
import torch
from contract_cases import CHECKS, Case
from test_contract import LOSSES  # imports every check

from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.running import RunningStatistics
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms

TAGS = dict(title='Toy', paper='Nowhere 2026', url='https://example.org')
BROKEN: list[tuple[type, str]] = []


def caught_by(name):
    def note(cls):
        BROKEN.append((cls, name))
        return cls

    return note


class Sound(SigmoidLoss):
    """Keeps the contract."""

    tags = LossTags(**TAGS)

    def terms(self, rows: Rows) -> SigmoidTerms:
        return SigmoidTerms(self.ones(rows), self.ones(rows))


class SoundRunning(RunningStatistics, Sound):
    """Keeps the contract; counts the rows of each class in ``seen``."""

    tags = LossTags(**TAGS, running=True)
    state_names = ('seen',)

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.init_running()

    def size_buffers(self, num_classes):
        self.register_buffer('seen', torch.zeros(num_classes))

    def increment_like(self):
        return self.seen

    def apply_increment(self, increment):
        self.seen = self.seen + increment

    def reset_running(self):
        self.size_buffers(self.num_classes)

    def terms(self, rows):
        weight = torch.ones_like(self.seen) / (1 + self.seen)
        return SigmoidTerms(weight, weight)

    def observe(self, rows, pos_grad, neg_grad):
        self.add_increment(pos_grad + neg_grad)


@caught_by('ignored_rows')
@caught_by('weights')
class IgnoresWeight(Sound):
    def forward(self, cls_score, target, weight=None, avg_factor=None, reduction_override=None):
        return super().forward(cls_score, target, None, avg_factor, reduction_override)


@caught_by('avg_factor')
class IgnoresAvgFactor(Sound):
    def forward(self, cls_score, target, weight=None, avg_factor=None, reduction_override=None):
        return super().forward(cls_score, target, weight, None, reduction_override)


@caught_by('reductions')
class IgnoresReduction(Sound):
    def forward(self, cls_score, target, weight=None, avg_factor=None, reduction_override=None):
        return super().forward(cls_score, target, weight, avg_factor)


@caught_by('inputs_and_graph')
class KeepsGraph(Sound):
    def compute(self, rows):
        self.last = {'losses': [super().compute(rows)]}
        return self.last['losses'][0]


@caught_by('inputs_and_graph')
class KeepsLogits(Sound):
    def compute(self, rows):
        self.last = rows.z.detach
        return super().compute(rows)


@caught_by('inputs_and_graph')
class ChangesWeight(Sound):
    def forward(self, cls_score, target, weight=None, **kwargs):
        weight.clamp_(max=0.5)
        return super().forward(cls_score, target, weight, **kwargs)


@caught_by('no_host_sync')
class ReadsANumber(Sound):
    def compute(self, rows):
        return super().compute(rows) * float(rows.is_fg.any().item() or 1)


@caught_by('no_host_sync')
class BranchesOnATensor(Sound):
    def compute(self, rows):
        return super().compute(rows) if rows.is_fg.any() else rows.z.sum() * 0


@caught_by('no_host_sync')
class MasksRows(Sound):
    def compute(self, rows):
        return super().compute(rows) + 0 * rows.z[rows.is_fg].sum()


@caught_by('no_host_sync')
class WaitsInBackward(Sound):
    def compute(self, rows):
        rows.z.register_hook(lambda grad: grad * float(grad.isfinite().all()))
        return super().compute(rows)


@caught_by('no_host_sync')
class BuildsTensorsEachCall(Sound):
    def terms(self, rows):
        weight = torch.tensor([1.0] * rows.z.shape[1])
        return SigmoidTerms(weight, weight)


@caught_by('finite_for_every_batch')
class KnowsTheDataSet(Sound):
    def terms(self, rows):
        return SigmoidTerms(torch.ones(1203), torch.ones(1203))


@caught_by('extreme_logits')
class Overflows(Sound):
    def compute(self, rows):
        return super().compute(rows) * (rows.z.exp().sum() / rows.z.exp().sum())


@caught_by('empty_batch')
class BreaksGraphOfEmptyBatch(Sound):
    def _empty(self, rows):
        return torch.zeros(())


@caught_by('order_of_rows')
class WeighsByPosition(Sound):
    def compute(self, rows):
        rows.weight = torch.linspace(0, 1, len(rows.label)) * (1 if rows.weight is None else
                                                               rows.row_weight)  # fmt: skip
        return super().compute(rows)


@caught_by('labels')
class TakesMinusOneForAClass(Sound):
    def forward(self, cls_score, target, *args, **kwargs):
        if isinstance(target, torch.Tensor) and target.dim() == 1:
            target = target.where(target >= 0, 0)
        return super().forward(cls_score, target, *args, **kwargs)


@caught_by('soft_targets')
class RoundsQualities(Sound):
    def compute(self, rows):
        if rows.soft is not None:
            rows.soft = rows.soft * 0.5
        return super().compute(rows)


@caught_by('precision')
class ComputesInHalf(Sound):
    def compute(self, rows):
        z = rows.z.sigmoid()
        return super().compute(rows) + 0 * z.sum() if z.dtype.itemsize > 2 else z.sum()


@caught_by('class_weight')
class IgnoresClassWeight(Sound):
    def __init__(self, class_weight=None, **kwargs):
        super().__init__(**kwargs)


@caught_by('random_numbers')
class DrawsWithNumpy(Sound):
    tags = LossTags(**TAGS, stochastic=True)

    def compute(self, rows):
        return super().compute(rows) * float(np.random.rand())


@caught_by('random_numbers')
class HidesThatItDraws(Sound):
    def compute(self, rows):
        return super().compute(rows) * torch.rand(())


@caught_by('descent_learns_the_labels')
class PushesTheWrongWay(Sound):
    def compute(self, rows):
        return -super().compute(rows)


@caught_by('widths_and_scores')
class ForgetsTheBackgroundColumn(Sound):
    def get_activation(self, cls_score):
        self.check_width(cls_score)
        return self.link(cls_score.float())


@caught_by('widths_and_scores')
class ForgetsToCheckTheWidth(Sound):
    def check_width(self, cls_score):
        pass


@caught_by('accuracy')
class CallsStrangeLabelsWrong(Sound):
    def get_accuracy(self, cls_score, labels):
        return dict(acc=(self.predict(cls_score) == labels).float().mean() * 100)


@caught_by('arguments')
class SwallowsArguments(Sound):
    def __init__(self, num_classes=None, reduction='mean', use_sigmoid=True, **kwargs):
        super().__init__(use_sigmoid, num_classes, reduction)


@caught_by('prior_bias')
class StartsElsewhere(Sound):
    def link(self, z):
        return z.sigmoid() ** 2


@caught_by('built_by_name')
class NobodyRegisteredIt(Sound):
    pass


@caught_by('documentation')
class SaysNothing(Sound):
    pass


@caught_by('state_outside_of_training')
class LearnsInTesting(SoundRunning):
    def compute(self, rows):
        rows.count = True
        return super().compute(rows)


@caught_by('state_outside_of_training')
class HidesThatItLearns(SoundRunning):
    tags = LossTags(**TAGS)

    def terms(self, rows):
        self.seen = self.seen + 1
        return super().terms(rows)


@caught_by('checkpoints')
class ForgetsOnResume(SoundRunning):
    def size_buffers(self, num_classes):
        self.register_buffer('seen', torch.zeros(num_classes), persistent=False)


@caught_by('copies')
class LosesStateInCopies(SoundRunning):
    def __setstate__(self, values):
        super().__setstate__(values)
        self.reset_running()


@caught_by('steps')
class CountsCallsAsSteps(SoundRunning):
    def apply_increment(self, increment):
        self.seen = 0.9 * self.seen + 0.1 * increment

    def add_increment(self, increment):
        self.apply_finite(increment.detach())


@caught_by('anomalies')
class LearnsFromNan(SoundRunning):
    def apply_finite(self, increment):
        self.apply_increment(increment)


@caught_by('two_backward_passes')
class ScalesItsGradientTwice(Sound):
    def compute(self, rows):
        calls = []

        def grow(grad):
            calls.append(1)
            return grad * len(calls)

        loss = super().compute(rows)
        loss.register_hook(grow)
        return loss


@pytest.mark.parametrize(('cls', 'name'), BROKEN, ids=lambda v: getattr(v, '__name__', v))
def test_broken_losses_are_caught(cls, name):
    with pytest.raises((Exception, pytest.fail.Exception)):
        CHECKS[name](Case(cls))


def test_every_check_has_caught_something():
    assert {name for _, name in BROKEN} == set(CHECKS)


@pytest.mark.parametrize('cls', [Sound, SoundRunning])
def test_sound_losses_pass(cls):
    assert cls not in LOSSES
    for name in set(CHECKS) - {'built_by_name', 'documentation'}:
        CHECKS[name](Case(cls))
    assert inspect.getdoc(cls)
