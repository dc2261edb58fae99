"""What every head of MMDetection does with a loss of this package, and what stands in for it."""

from __future__ import annotations

from dataclasses import dataclass

from mmdet.models.roi_heads.bbox_heads import BBoxHead
from torch import nn

#: Methods that decide what a loss receives and what a test gives. A class that changes one of them
#: says nothing about its parent's rule any more.
DECISIVE = (
    'loss',
    'loss_and_predict',
    'loss_and_target',
    'loss_by_feat',
    'loss_by_feat_single',
    '_loss_by_feat_single',
    'predict',
    'predict_by_feat',
    '_predict_by_feat_single',
    'refine_bboxes',
)


@dataclass(frozen=True)
class HeadRule:
    """What a head of MMDetection does with a loss of this package.

    Attributes:
        sigmoid: Sigmoid losses that work: 'own' any (the head asks the loss for its scores),
            'plain' those whose score is the sigmoid of the logit, 'no' none.
        softmax: The same for softmax losses.
        use: Head of this package that takes the others, '' if there is none.
        use_softmax: Whether that one takes softmax losses.
        why: What goes wrong, for the message.
        instead: Head of another detector that takes what ``use`` does not.
    """

    sigmoid: str
    softmax: str
    use: str = ''
    use_softmax: bool = True
    why: str = 'its test scores are a fixed sigmoid or softmax of the logits'
    instead: str = 'RetinaHead'


_BOX = 'Shared2FCBBoxHead'
_SIGMOID = 'it takes the sigmoid of every logit'


def _unusable(why: str, instead: str) -> HeadRule:
    return HeadRule('no', 'no', why=why, instead=instead)


#: By class name, so that heads which only one of the stacks has can be named; a sub-class follows
#: the nearest class above it.
RULES: dict[str, HeadRule] = {
    # dense heads that leave scores to BaseDenseHead, which asks the loss
    'AnchorHead': HeadRule('own', 'own'),
    'RetinaHead': HeadRule('own', 'own'),
    'ATSSHead': HeadRule('own', 'own'),
    'FCOSHead': HeadRule('own', 'own'),
    'RetinaSepBNHead': HeadRule('own', 'own'),
    'YOLOFHead': HeadRule(
        'own', 'no', 'LTYOLOFHead', use_softmax=False, why='its logits contain an objectness'
    ),
    'VFNetHead': HeadRule(
        'own', 'no', 'LTVFNetHead', why='its classifier has no background column'
    ),
    # those with a rule of their own
    'DDODHead': HeadRule(
        'plain', 'no', why='its assigner takes sigmoids of logits', instead='ATSSHead'
    ),
    'GFLHead': HeadRule('plain', 'no', 'LTGFLHead', why=_SIGMOID),
    'LDHead': HeadRule('plain', 'no', why=_SIGMOID, instead='mmdet_lt.LTGFLHead'),
    'RTMDetHead': HeadRule(
        'plain', 'no', 'LTRTMDetHead', why='its assigner takes sigmoids of logits'
    ),
    'RTMDetSepBNHead': HeadRule(
        'plain', 'no', 'LTRTMDetSepBNHead', why='its assigner takes sigmoids of logits'
    ),
    'RTMDetInsHead': HeadRule('plain', 'no', why=_SIGMOID, instead=_BOX),
    'PAAHead': HeadRule(
        'plain', 'no', 'LTPAAHead', why='it takes sigmoids, and one loss of each column of a row'
    ),
    'LADHead': HeadRule(
        'plain',
        'no',
        why='it takes sigmoids, and one loss of each column of a row',
        instead='mmdet_lt.LTPAAHead',
    ),
    'TOODHead': HeadRule(
        'no', 'no', 'LTTOODHead', why='it hands the loss probabilities, not logits'
    ),
    'YOLOXHead': HeadRule('no', 'no', 'LTYOLOXHead', why='it shows the loss its positives only'),
    'GuidedAnchorHead': HeadRule('plain', 'plain'),
    'SABLRetinaHead': HeadRule('plain', 'plain'),
    'RepPointsHead': HeadRule('plain', 'plain', instead='FCOSHead'),
    'FoveaHead': HeadRule('plain', 'no', why=_SIGMOID, instead='FCOSHead'),
    'CondInstBboxHead': HeadRule('plain', 'no', why=_SIGMOID, instead=_BOX),
    'SOLOHead': HeadRule('plain', 'no', why=_SIGMOID, instead=_BOX),
    'DecoupledSOLOHead': HeadRule('plain', 'no', why=_SIGMOID, instead=_BOX),
    'DecoupledSOLOLightHead': HeadRule('plain', 'no', why=_SIGMOID, instead=_BOX),
    'SOLOV2Head': HeadRule('plain', 'no', why=_SIGMOID, instead=_BOX),
    # proposals: one class of their own
    'RPNHead': HeadRule('plain', 'plain', instead='RPNHead'),
    'GARPNHead': HeadRule('plain', 'plain', instead='GARPNHead'),
    'StageCascadeRPNHead': HeadRule('plain', 'plain', instead='StageCascadeRPNHead'),
    # heads that compute their classification loss themselves, or of something else than rows
    'FSAFHead': _unusable('it wants the loss of every row before it chooses levels', 'RetinaHead'),
    'FreeAnchorRetinaHead': _unusable('it never calls `loss_cls`', 'RetinaHead'),
    'PISARetinaHead': _unusable('it weights boxes and rows by sigmoids of logits', 'RetinaHead'),
    'SSDHead': _unusable('it has a cross entropy of its own', 'RetinaHead'),
    'PISASSDHead': _unusable('it has a cross entropy of its own', 'RetinaHead'),
    'AutoAssignHead': _unusable('it never calls `loss_cls`', 'FCOSHead'),
    'CenterNetHead': _unusable('it trains heat maps', 'FCOSHead'),
    'CenterNetUpdateHead': _unusable('it trains heat maps', 'FCOSHead'),
    'CornerHead': _unusable('it trains heat maps', 'FCOSHead'),
    'CentripetalHead': _unusable('it trains heat maps', 'FCOSHead'),
    'YOLACTHead': _unusable('it wants the loss of every row to find hard ones', _BOX),
    'YOLOV3Head': _unusable('it hands the loss grids of one-hot targets', 'mmdet_lt.LTYOLOXHead'),
    'GroundingDINOHead': _unusable('its classes are tokens of a text', 'mmdet_lt.LTDINOHead'),
    'ATSSVLFusionHead': _unusable('its classes are tokens of a text', 'ATSSHead'),
    'MultiInstanceBBoxHead': _unusable('its background is label 0', _BOX),
    'CLRHead': _unusable('it finds lanes, which have no class', 'RetinaHead'),
    # the DETR family; see _wrong_training for encoders and denoising
    'DETRHead': HeadRule('plain', 'plain', 'LTDETRHead'),
    'ConditionalDETRHead': HeadRule('plain', 'plain', 'LTConditionalDETRHead'),
    'DABDETRHead': HeadRule('plain', 'plain', 'LTDABDETRHead'),
    'DeformableDETRHead': HeadRule('plain', 'plain', 'LTDeformableDETRHead'),
    **{
        name: HeadRule(
            'plain',
            'no',
            f'LT{name}',
            use_softmax=False,
            why='its detector picks proposals by the largest logit, which may be background',
            instead='mmdet_lt.LTDeformableDETRHead',
        )
        for name in ('DINOHead', 'DDQDETRHead')
    },
    'Mask2FormerHead': HeadRule('no', 'plain', 'LTMask2FormerHead', why='it is made for a softmax'),
    'MaskFormerHead': HeadRule(
        'no', 'plain', why='it is made for a softmax', instead='mmdet_lt.LTMask2FormerHead'
    ),
    'Mask2FormerTrackHead': HeadRule(
        'no', 'plain', why='it is made for a softmax', instead='mmdet_lt.LTMask2FormerHead'
    ),
    # RoI heads
    'BBoxHead': HeadRule('own', 'own'),
    'DoubleConvFCBBoxHead': HeadRule('own', 'own', 'LTDoubleConvFCBBoxHead'),
    'SABLHead': HeadRule('no', 'plain', 'LTSABLHead', why='it takes the softmax of every logit'),
    'DIIHead': HeadRule('plain', 'plain', 'LTDIIHead'),
}


def rule_of(head: nn.Module) -> HeadRule:
    """The rule of the nearest class.

    A head that no rule speaks of is refused, and so is one that changes a decisive method
    (:data:`DECISIVE`) of the class that has the rule: whether it hands the loss logits and scores
    by the loss cannot be seen from outside. Such a class says so with ``follows_loss = True``.
    """
    changed: list[str] = []
    for cls in type(head).__mro__:
        if cls.__name__ in RULES and not changed:
            return RULES[cls.__name__]
        changed += [f'`{cls.__name__}.{name}`' for name in DECISIVE if name in vars(cls)]
        if cls.__name__ in RULES:
            break
    what = f'{changed[0]} is not one of MMDetection' if changed else 'no rule is known for it'
    why = (
        f'{what} (if it gives the loss logits and labels, and tests by `loss_cls.get_activation`, '
        'set `follows_loss = True` in the class)'
    )
    box = isinstance(head, BBoxHead)
    return HeadRule('no', 'no', why=why, instead=_BOX if box else 'RetinaHead')
