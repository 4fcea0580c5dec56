"""A whole evaluation: draw the images, score them, write the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest
from ragturbo.evaluate.contact_sheet import write_sheet
from ragturbo.evaluate.faithfulness import Faithfulness
from ragturbo.evaluate.fid import Fid, folder_images
from ragturbo.evaluate.images import Progress, check_folder, draw_images, image_path, rank_and_world_size, read_images
from ragturbo.evaluate.report_files import write_report
from ragturbo.evaluate.scores import Metric, read_scores, score_images
from ragturbo.evaluate.suites import Suite
from ragturbo.evaluate.systems import LoadOptions, SystemSpec
from ragturbo.evaluate.table import Row, make_row


@dataclass
class Evaluation:
    """Settings of an evaluation.

    systems: the first is the baseline; fid: creates the FID with its reference set, once all images are drawn;
    batch: images per call of a system; command: the command line, for the report.
    """

    suite: Suite
    systems: Sequence[SystemSpec]
    load: LoadOptions
    out: Path
    metrics: Sequence[Metric]
    fid: Callable[[], Fid] | None = None
    batch: int = 8
    command: str = ""
    progress: Progress | None = None

    def run(self) -> list[Row]:
        """Draw, score and report what is missing; returns [] if other processes of torchrun are not done yet."""
        if len({spec.slug for spec in self.systems}) != len(self.systems):
            raise InvalidRequest("two systems have the same name")
        check_folder(self.out, self.suite, self.load)
        exact = next((metric for metric in self.metrics if isinstance(metric, Faithfulness)), None)
        scorer = None if exact is None else lambda prompt, image: exact.score_image(prompt, image).value
        for spec in self.systems:
            draw_images(self.suite, spec, self.load, self.out, batch=self.batch, scorer=scorer, progress=self.progress)
            for metric in self.metrics:
                score_images(metric, self.suite, spec, self.out, progress=self.progress)
        return self.report() if self._is_complete() else []

    def _is_complete(self) -> bool:
        if rank_and_world_size()[1] == 1:
            return True
        prompts = self.suite.prompts
        return all(image_path(self.out, spec, prompt).exists() for spec in self.systems for prompt in prompts) and all(
            len(read_scores(self.out, metric.name, spec)) >= len(prompts)
            for spec in self.systems
            for metric in self.metrics
        )

    def report(self) -> list[Row]:
        """Write the report of a complete run."""
        about = {metric.name: metric.about for metric in self.metrics}
        fid = self.fid() if self.fid is not None else None
        if fid is not None:
            about["fid"] = fid.about
        rows: list[Row] = []
        all_scores = []
        baseline = None
        for spec in self.systems:
            scores = {metric.name: read_scores(self.out, metric.name, spec) for metric in self.metrics}
            numbers = {}
            if fid is not None:
                numbers["fid"] = fid.compute(read_images(self.suite.prompts, spec, self.out))
            facts = json.loads((self.out / "images" / spec.slug / "system.json").read_text("utf-8"))
            prompts = self.suite.prompts
            rows.append(make_row(spec.text, facts["title"], facts["steps"], prompts, scores, baseline, numbers))
            all_scores.append(scores)
            baseline = baseline or scores
        write_report(self.out, self.suite, rows, about, self.command)
        write_sheet(self.out, self.suite, self.systems, [row.title for row in rows], all_scores)
        return rows


def load_fid(references: Path, weights: str | None, device: Any) -> Fid:
    """Load the FID with a reference set: a folder of real images, or statistics written by `Fid.save` (.npz)."""
    fid = Fid(weights, device=device)
    if references.suffix == ".npz":
        fid.load(references)
    else:
        fid.add_real(folder_images(references))
    return fid
