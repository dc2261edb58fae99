"""LVIS average precision for boxes and masks, with frequency groups, for any COCO-format file."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.dist import broadcast_object_list, collect_results, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from mmdet_lt.errors import InputError
from mmdet_lt.evaluation.classes import category_groups, class_names, label_categories
from mmdet_lt.evaluation.detail import FORMAT, class_table, describe
from mmdet_lt.evaluation.federated import IOU_THRS, evaluate_federated
from mmdet_lt.evaluation.ground_truth import GroundTruth, check_annotation_file, load_ground_truth
from mmdet_lt.evaluation.predictions import join_predictions, pack_predictions, to_json_rows
from mmdet_lt.registry import METRICS
from mmdet_lt.statistics import ClassStatistics
from mmdet_lt.utils.files import write_text_atomic

_METRICS = ('bbox', 'segm')


@METRICS.register_module()
class LVISMetric(BaseMetric):
    """AP of LVIS, equal to the official lvis-api on the same input, on any numpy.

    Gupta et al., "LVIS", CVPR 2019, arXiv 1908.03195. ``AP`` is the mean of the interpolated
    precision over 10 IoU thresholds, 101 recalls and all classes with ground truth; ``APr``,
    ``APc``, ``APf`` are its means over rare, common and frequent classes. Values are fractions of
    1, not rounded; -1 where there is nothing to measure. Keys: ``{prefix}/{metric}_{name}`` with
    name AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR, ARs, ARm, ARl. All keys are always
    there; without any prediction AP is 0. For the best checkpoint set
    ``save_best='lvis/bbox_AP', rule='greater'``.

    What counts:
        * An image is judged for the classes it contains and its ``neg_category_ids``. An image
          without that field (COCO format) counts as annotated for every class.
        * Unmatched detections of ``not_exhaustive_category_ids`` are ignored.
        * Annotations with ``iscrowd`` are regions that absorb detections, as in COCO: IoU is
          intersection over detection area and any number may match. LVIS files have none.
        * ``max_dets`` are the best per image over all classes.
        * The area of a predicted mask is that of the mask, not of its box. The area of an
          annotation is the file's ``area``, also for boxes.
        * Label ``i`` is the category *named* ``dataset_meta['classes'][i]``. Classes of the file
          that the model lacks are left out with a warning.
        * Images that were not processed are left out with a warning.

    The ground truth is read on rank 0 only, at the first evaluation. An image that occurs twice,
    such as the padding of distributed batches, is scored once. An error on rank 0 is raised on
    all ranks. After an evaluation, ``details`` holds what ``detail_file`` receives (rank 0).

    Args:
        ann_file: LVIS or COCO annotation file.
        metric: 'bbox', 'segm' or a list of both.
        class_statistics: Training statistics for frequency groups where the file's categories have
            no ``frequency``: a file of :class:`ClassStatistics`, a training annotation file, a
            dict or an object. Needed only for files that are not LVIS.
        max_dets: Detections per image; negative for no limit.
        classwise: Log a table per class and return ``{metric}_{class}_precision`` for each.
        outfile_prefix: Write predictions to ``{outfile_prefix}.{metric}.json`` in the official
            results format.
        format_only: Only write predictions, for a test server; the result is empty.
        detail_file: JSON file for per-class results, precision-recall and calibration curves.
        iou_thrs: IoU thresholds; default 0.5, 0.55, ... 0.95. AP50 is -1 if 0.5 is missing.
        collect_device: 'cpu' or 'gpu', see :class:`mmengine.evaluator.BaseMetric`.
        prefix: Prefix of the keys. Default 'lvis'.
        backend_args: Storage backend of ``ann_file``, see :mod:`mmengine.fileio`.
        sort_categories: Per-class results in the order of category ids; else in label order.
        collect_dir: Folder shared by all ranks for collecting on the CPU.

    Raises:
        InputError: Unknown metric, missing or truncated file, predictions for unknown images,
            labels or class names that do not fit the file or the statistics.
    """

    default_prefix = 'lvis'

    def __init__(
        self,
        ann_file: str | os.PathLike,
        metric: str | Sequence[str] = 'bbox',
        class_statistics: Any = None,
        max_dets: int = 300,
        classwise: bool = False,
        outfile_prefix: str | None = None,
        format_only: bool = False,
        detail_file: str | os.PathLike | None = None,
        iou_thrs: float | Sequence[float] | None = None,
        collect_device: str = 'cpu',
        prefix: str | None = None,
        backend_args: dict | None = None,
        sort_categories: bool = True,
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        self.metrics = (metric,) if isinstance(metric, str) else tuple(metric)
        unknown = [name for name in self.metrics if name not in _METRICS]
        if unknown or not self.metrics:
            found = unknown[0] if unknown else 'none'
            raise InputError(f"`metric` of LVISMetric must be 'bbox' or 'segm', found {found!r}.")
        if format_only and outfile_prefix is None:
            raise InputError('`format_only=True` needs `outfile_prefix`, the files to write.')
        if isinstance(max_dets, bool) or not isinstance(max_dets, int) or max_dets == 0:
            raise InputError(f'`max_dets` must be a positive integer or -1, found {max_dets!r}.')
        self.iou_thrs = np.unique(np.asarray(IOU_THRS if iou_thrs is None else iou_thrs, float))
        if not len(self.iou_thrs) or self.iou_thrs[0] <= 0 or self.iou_thrs[-1] > 1:
            raise InputError(f'`iou_thrs` must lie in (0, 1], found {iou_thrs!r}.')
        self.ann_file = os.fspath(ann_file)
        self.backend_args = backend_args
        if backend_args is None and '://' not in self.ann_file:
            check_annotation_file(self.ann_file)
        if isinstance(class_statistics, (str, os.PathLike)):
            if not os.path.isfile(class_statistics):
                raise InputError(
                    f'`class_statistics` file {class_statistics} does not exist: correct the path.'
                )
        self.class_statistics = class_statistics
        self.max_dets = max_dets
        self.classwise = classwise
        self.outfile_prefix = outfile_prefix
        self.format_only = format_only
        self.detail_file = detail_file
        self.sort_categories = sort_categories
        self.details: dict[str, Any] | None = None
        self._truth: GroundTruth | None = None
        self._statistics: ClassStatistics | None = None

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Keep the predictions of a batch; see :func:`pack_predictions` for their form."""
        classes = class_names(self.dataset_meta)
        number = None if classes is None else len(classes)
        for sample in data_samples:
            self.results.append(pack_predictions(sample, self.metrics, self.max_dets, number))

    def evaluate(self, size: int) -> dict[str, float]:
        """Collect the results of all ranks, cut the padding and compute on rank 0.

        Args:
            size: Number of images in the data set.

        Returns:
            The same values on every rank.
        """
        extra = dict(tmpdir=self.collect_dir) if self.collect_device == 'cpu' else {}
        results = collect_results(self.results, size, self.collect_device, **extra)
        self.results.clear()
        answer: list[Any] = [None]
        if is_main_process():
            try:
                values = self.compute_metrics(results)
                answer = [{f'{self.prefix}/{key}': value for key, value in values.items()}]
            except Exception as error:  # the other ranks wait: let them fail as well
                answer = [error]
        broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Evaluate collected predictions; keys come without the prefix."""
        truth = self._load()
        results = self._check_images(results, truth)
        classes = class_names(self.dataset_meta)
        categories = label_categories(classes, truth, self.ann_file)
        images = self._processed(results, truth)
        columns = np.sort(categories) if self.sort_categories else categories
        values: dict[str, float] = {}
        if not self.format_only:
            groups, counts = category_groups(truth, columns, self._load_statistics())
            names = [truth.names[k] for k in columns]
            self.details = dict(format=FORMAT)
        for metric in self.metrics:
            detections = join_predictions(results, metric, truth, categories)
            if self.outfile_prefix is not None:
                rows = to_json_rows(detections, truth)
                write_text_atomic(f'{self.outfile_prefix}.{metric}.json', json.dumps(rows))
            if self.format_only:
                continue
            start = time.perf_counter()
            result = evaluate_federated(
                truth, detections, columns, images, self.iou_thrs, progress=True
            )
            detail = describe(result, names, groups, counts)
            self.details[metric] = detail
            values.update(self._report(metric, detail, len(detections.scores), start))
        if self.detail_file is not None and not self.format_only:
            write_text_atomic(self.detail_file, json.dumps(self.details) + '\n')
        return values

    def _load(self) -> GroundTruth:
        if self._truth is None:
            masks = 'segm' in self.metrics
            if self.backend_args is None and '://' not in self.ann_file:
                self._truth = load_ground_truth(self.ann_file, masks)
            else:
                with get_local_path(self.ann_file, backend_args=self.backend_args) as path:
                    self._truth = load_ground_truth(path, masks)
        return self._truth

    def _load_statistics(self) -> ClassStatistics | None:
        if self._statistics is None and self.class_statistics is not None:
            self._statistics = ClassStatistics.from_any(self.class_statistics)
        return self._statistics

    def _check_images(self, results: list[dict], truth: GroundTruth) -> list[dict]:
        """One result per image, all of them images of the file."""
        unique: dict[Any, dict] = {}
        for result in results:
            unique.setdefault(result['img_id'], result)
        known = set(truth.image_ids)
        unknown = [image for image in unique if image not in known]
        if unknown:
            raise InputError(
                f'{len(unknown)} of {len(unique)} predicted images, such as image id '
                f'{unknown[0]!r}, are not in {self.ann_file}: give the annotation file of the '
                'evaluated data set as `ann_file`.'
            )
        return list(unique.values())

    def _processed(self, results: list[dict], truth: GroundTruth) -> np.ndarray | None:
        """Images to evaluate, bool (I,), or None for all."""
        if len(results) == len(truth.image_ids):
            return None
        rest = 'those without predictions were not processed and are left out'
        if not results:
            rest = 'nothing was processed, so every class with ground truth gets AP 0'
        print_log(
            f'LVISMetric got results for {len(results)} of the {len(truth.image_ids)} images of '
            f'{self.ann_file}: {rest}.',
            logger='current',
            level=logging.WARNING,
        )
        if not results:
            return None
        seen = {result['img_id'] for result in results}
        return np.array([image in seen for image in truth.image_ids], dtype=bool)

    def _report(
        self, metric: str, detail: dict[str, Any], count: int, start: float
    ) -> dict[str, float]:
        """Log the results of one metric and return them under their keys."""
        overall = detail['overall']
        line = ', '.join(f'{key} {_percent(value)}' for key, value in overall.items())
        seconds = time.perf_counter() - start
        print_log(f'{metric} (%): {line} ({count} detections, {seconds:.1f} s)', 'current')
        values = {f'{metric}_{key}': value for key, value in overall.items()}
        if self.classwise:
            print_log(f'{metric} per class (%)\n{class_table(detail)}', 'current')
            for row in detail['classes']:
                ap = row['ap']
                values[f'{metric}_{row["name"]}_precision'] = -1.0 if ap is None else ap
        return values


def _percent(value: float) -> str:
    return '-' if value < 0 else f'{100 * value:.2f}'
