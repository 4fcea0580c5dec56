"""FID between a system's images and real ones, by torchmetrics' implementation.

The features are Inception's by torch-fidelity's port of the original network, whose weights file torch-fidelity looks
for; a network of one's own takes their place in tests and on worlds that Inception has never seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.evaluate.suites import IMAGE_SUFFIXES

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"


class Fid:
    """Real images once, then one number a system."""

    name = "fid"

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        features: nn.Module | None = None,
        device: Any = "cpu",
        size: int = 299,
    ) -> None:
        try:
            import torchmetrics
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise ModelError("FID needs torchmetrics and torch-fidelity: pip install 'ragturbo[eval]'") from error
        self.size = size
        try:
            options: dict[str, Any] = {} if weights is None else {"feature_extractor_weights_path": str(weights)}
            metric: Any = FrechetInceptionDistance(
                feature=2048 if features is None else features, reset_real_features=False, normalize=False, **options
            )
        except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
            raise ModelError(
                f"torchmetrics cannot load its Inception network: {error}. Download torch-fidelity's {WEIGHTS} and "
                "give its path as --fid-weights."
            ) from error
        # The sums of outer products lose too much in fp32.
        self._metric = metric.set_dtype(torch.float64).to(device)
        self._device = torch.device(device)
        kind = "Inception-v3 (torch-fidelity)" if features is None else type(features).__name__
        self.about = f"torchmetrics {torchmetrics.__version__}, {kind}, images at {size}x{size}"

    def real(self, images: Iterable[Image.Image]) -> None:
        """The reference set, added to what is there."""
        self._update(images, real=True)

    def of(self, images: Iterable[Image.Image]) -> float:
        self._metric.reset()
        self._update(images, real=False)
        count = int(self._metric.real_features_num_samples), int(self._metric.fake_features_num_samples)
        if min(count) < 2:
            raise InvalidRequest(
                f"FID needs at least two images of each kind, not {count[0]} real and {count[1]} drawn"
            )
        return float(self._metric.compute())

    def save(self, path: Path) -> None:
        """The statistics of the reference set, for later runs."""
        m = self._metric
        np.savez(
            path,
            sum=m.real_features_sum.cpu().numpy(),
            outer=m.real_features_cov_sum.cpu().numpy(),
            count=int(m.real_features_num_samples),
        )

    def load(self, path: Path) -> None:
        try:
            # allow_pickle stays off: arrays only.
            with np.load(path, allow_pickle=False) as data:
                total, outer, count = data["sum"], data["outer"], int(data["count"])
        except (OSError, ValueError, KeyError) as error:
            raise InvalidRequest(f"{path} holds no FID statistics written by ragturbo: {error}") from error
        m = self._metric
        if total.shape != tuple(m.real_features_sum.shape):
            raise InvalidRequest(
                f"{path} is of {total.shape[0]} features, the network has {m.real_features_sum.shape[0]}"
            )
        m.real_features_sum = torch.from_numpy(total).to(m.real_features_sum)
        m.real_features_cov_sum = torch.from_numpy(outer).to(m.real_features_cov_sum)
        m.real_features_num_samples = torch.tensor(count).to(m.real_features_num_samples)

    @torch.inference_mode()
    def _update(self, images: Iterable[Image.Image], *, real: bool, batch: int = 32) -> None:
        part: list[torch.Tensor] = []
        for image in images:
            fitted = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
            part.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1))
            if len(part) == batch:
                self._metric.update(torch.stack(part).to(self._device), real=real)
                part = []
        if part:
            self._metric.update(torch.stack(part).to(self._device), real=real)


def folder_images(folder: Path) -> Iterator[Image.Image]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InvalidRequest(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)})")
    for path in paths:
        with Image.open(path) as image:
            yield image.convert("RGB")
