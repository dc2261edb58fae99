"""Base of the sigmoid-family losses whose element function is not a (focal) cross entropy."""

from __future__ import annotations

from torch import Tensor

from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.ops.element import Element, element_entries, element_loss
from mmdet_lt.ops.sigmoid import SigmoidTerms


class ElementLoss(SigmoidLoss):
    """A loss of independent columns with an element function of its own.

    Sub-classes implement :meth:`element`, and :meth:`terms` where they weight entries.
    """

    def element(self, rows: Rows) -> Element:
        """The element function for these rows: (logits, targets) to (loss, derivative)."""
        raise NotImplementedError

    def terms(self, rows: Rows) -> SigmoidTerms:
        ones = self.ones(rows)
        return SigmoidTerms(ones, ones)

    def compute(self, rows: Rows) -> Tensor:
        terms, element = self.weighted_terms(rows), self.element(rows)
        target = None
        if rows.per_entry or rows.soft is not None:
            target = rows.target(distribution=False)
        if rows.per_entry:
            return element_entries(rows.z, target, rows.is_fg, terms, element, rows.entry_weight)
        return element_loss(rows.z, rows.label, rows.is_fg, terms, element, rows.weight, target)
