"""Base of the sigmoid losses: a method states its :class:`SigmoidTerms`, the rest is here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.ops.sigmoid import (
    SigmoidTerms,
    compute_dtype,
    sigmoid_terms_entries,
    sigmoid_terms_loss,
)

#: What an entry of each of the terms is without re-balancing.
_PLAIN = dict(pos_weight=1, neg_weight=1, neg_weight_bg=1, gamma=0, gate=True, shift=0, shift_bg=0)


def _with_plain_column(terms: SigmoidTerms) -> SigmoidTerms:
    """The same terms and those of one more column, which is not re-balanced."""
    longer = {}
    for name, plain in _PLAIN.items():
        value = getattr(terms, name)
        if isinstance(value, Tensor) and value.dim():
            column = value.new_full((*value.shape[:-1], 1), plain)
            longer[name] = torch.cat([value, column], -1)
    return replace(terms, **longer)


class SigmoidLoss(LongTailLoss):
    """A loss of independent sigmoids; background is the all-zero row of targets.

    Sub-classes implement :meth:`terms`; those that learn from gradients also :meth:`observe`.
    With ``objectness`` RoI heads get one more column, the sigmoid of background; dense heads have
    no room for it.
    """

    sigmoid = True
    #: RoI heads get a column for background.
    objectness: ClassVar[bool] = False
    #: Scores of classes are multiplied by one minus that of background.
    score_times_objectness: ClassVar[bool] = True

    @property
    def extra_columns(self) -> int:  # type: ignore[override]
        """One for objectness, else none."""
        return int(self.objectness)

    def terms(self, rows: Rows) -> SigmoidTerms:
        """The method's constants for these rows."""
        raise NotImplementedError

    def observe(self, rows: Rows, pos_grad: Tensor, neg_grad: Tensor) -> None:
        """Learn from the column sums of ``|dL/dz|``, (C,) each, L the sum before ``divisor``."""

    def has_objectness(self, num_columns: int) -> bool:
        """Whether the last of ``num_columns`` columns is the objectness of background."""
        return self.objectness and num_columns == self.num_classes + 1

    def weighted_terms(self, rows: Rows) -> SigmoidTerms:
        """:meth:`terms` with ``class_weight`` on the positive entries."""
        terms = self._terms_of_columns(rows)
        if self._num_classes is not None and hasattr(self, 'fixed_weight'):
            weight = self.fixed_weight[: rows.z.shape[1]]
            terms.pos_weight = terms.pos_weight * weight
        return terms

    def _terms_of_columns(self, rows: Rows) -> SigmoidTerms:
        if type(self).objectness or not self.has_objectness(rows.z.shape[1]):
            return self.terms(rows)
        # A head added the objectness: the method does not know of the column.
        classes = replace(rows, z=rows.z[:, : self.num_classes])
        return _with_plain_column(self.terms(classes))

    def compute(self, rows: Rows) -> Tensor:
        terms = self.weighted_terms(rows)
        if rows.plain and not rows.per_entry:
            loss, pos, neg = sigmoid_terms_loss(
                rows.z, rows.label, terms, rows.weight, self.num_classes
            )
            if rows.count and self.tags.running:
                self.observe(rows, pos[: self.num_classes], neg[: self.num_classes])
            return loss
        target = rows.target(distribution=False)
        entries, size = sigmoid_terms_entries(rows.z, target, rows.is_fg, terms, rows.entry_weight)
        if rows.per_entry:
            return entries
        if rows.count and self.tags.running:
            size, target = size[:, : self.num_classes], target[:, : self.num_classes]
            self.observe(rows, (size * target).sum(0), (size * (1 - target)).sum(0))
        return entries.sum()

    def ones(self, rows: Rows) -> Tensor:
        """(K,) ones in computing precision."""
        return rows.z.new_ones(rows.z.shape[1], dtype=compute_dtype(rows.z))

    # ---- scores ----------------------------------------------------------------------------

    def prior_bias(self) -> float | None:
        if self.prior_prob is None:
            return None
        return -math.log((1 - self.prior_prob) / self.prior_prob)

    def link(self, z: Tensor) -> Tensor:
        """Score of a logit; increasing, one half at 0 or not, in [0, 1]."""
        return z.sigmoid()

    def get_activation(self, cls_score: Tensor) -> Tensor:
        self.check_width(cls_score)
        scores = self.link(cls_score.to(compute_dtype(cls_score)))
        if self.has_objectness(cls_score.shape[-1]):
            if not self.score_times_objectness:
                return scores
            background = scores[..., -1:]
            return torch.cat([scores[..., :-1] * (1 - background), background], dim=-1)
        if self.context == 'roi':
            return torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        return scores

    def predict(self, cls_score: Tensor) -> Tensor:
        """Best class; background if its score, or one half without such a column, is higher."""
        # The link keeps the order, so the best class needs one maximum over the logits only.
        best, predicted = cls_score[:, : self.num_classes].float().max(1)
        best, background = self.link(best), best.new_tensor(0.5)
        if self.has_objectness(cls_score.shape[1]):
            background = self.link(cls_score[:, self.num_classes].float())
            if self.score_times_objectness:
                best = best * (1 - background)
        return predicted.masked_fill(best <= background, self.num_classes)
