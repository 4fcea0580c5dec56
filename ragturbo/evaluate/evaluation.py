"""One evaluation from prompts to report: draw, score, compare."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest
from ragturbo.evaluate.fid import Fid, folder_images
from ragturbo.evaluate.report import write_report
from ragturbo.evaluate.run import Place, Progress, draw, image_path, read_images, settle
from ragturbo.evaluate.scores import Faithfulness, Metric, read_scores, score_all
from ragturbo.evaluate.sheet import write_sheet
from ragturbo.evaluate.suites import Suite
from ragturbo.evaluate.systems import Loading, Spec
from ragturbo.evaluate.table import Row, make_row


@dataclass
class Evaluation:
    suite: Suite
    specs: Sequence[Spec]
    loading: Loading
    out: Path
    metrics: Sequence[Metric]
    fid: Callable[[], Fid] | None = None
    """Makes the FID with its reference set; only called when the images are there."""
    batch: int = 8
    command: str = ""
    progress: Progress | None = None

    def run(self) -> list[Row]:
        """All of it. Under torchrun each process takes its share, and the last to finish writes the report."""
        if len({spec.slug for spec in self.specs}) != len(self.specs):
            raise InvalidRequest("two systems have the same name")
        settle(self.out, self.suite, self.loading)
        exact = next((metric for metric in self.metrics if isinstance(metric, Faithfulness)), None)
        scorer = None if exact is None else lambda prompt, image: exact.one(prompt, image).value
        for spec in self.specs:
            draw(self.suite, spec, self.loading, self.out, batch=self.batch, scorer=scorer, progress=self.progress)
            for metric in self.metrics:
                score_all(metric, self.suite, spec, self.out, progress=self.progress)
        if not self._whole():
            # Other processes are still at it: the one that finds everything there writes the report.
            return []
        return self.report()

    def _whole(self) -> bool:
        if Place.here().world == 1:
            return True
        return all(
            image_path(self.out, spec, prompt).exists() for spec in self.specs for prompt in self.suite.prompts
        ) and all(
            len(read_scores(self.out, metric.name, spec)) >= len(self.suite.prompts)
            for spec in self.specs
            for metric in self.metrics
        )

    def report(self) -> list[Row]:
        scores = {
            spec.text: {metric.name: read_scores(self.out, metric.name, spec) for metric in self.metrics}
            for spec in self.specs
        }
        about = {metric.name: metric.about for metric in self.metrics}
        numbers: dict[str, dict[str, float]] = {spec.text: {} for spec in self.specs}
        if self.fid is not None:
            fid = self.fid()
            about["fid"] = fid.about
            for spec in self.specs:
                numbers[spec.text]["fid"] = fid.of(image for _, image in read_images(self.suite, spec, self.out))
        rows, baseline = [], scores[self.specs[0].text]
        for spec in self.specs:
            facts = json.loads((self.out / "images" / spec.slug / "system.json").read_text("utf-8"))
            first = spec is self.specs[0]
            rows.append(
                make_row(
                    spec.text,
                    facts["title"],
                    facts["steps"],
                    self.suite.prompts,
                    scores[spec.text],
                    None if first else baseline,
                    numbers[spec.text],
                )  # fmt: skip
            )
        write_report(self.out, self.suite, rows, about, self.command, machine())
        write_sheet(self.out, self.suite, self.specs, [row.title for row in rows])
        return rows


def machine() -> dict[str, Any]:
    import diffusers
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def reference(folder_or_statistics: Path, weights: str | None, device: Any) -> Callable[[], Fid]:
    """A folder of real images, or the .npz that `--save-statistics` wrote."""

    def make() -> Fid:
        fid = Fid(weights, device=device)
        if folder_or_statistics.suffix == ".npz":
            fid.load(folder_or_statistics)
        else:
            fid.real(folder_images(folder_or_statistics))
        return fid

    return make
