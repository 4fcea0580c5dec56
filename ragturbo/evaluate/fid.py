"""FID between a system's images and real ones, computed by torchmetrics on Inception features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.evaluate.suites import IMAGE_SUFFIXES


class Fid:
    """Takes the real images once, then returns one number per system.

    weights: torch-fidelity's Inception weights; features: another network, for (B, 3, size, size) uint8 images.
    """

    def __init__(
        self, weights: str | Path | None = None, *, features: Any = None, device: Any = "cpu", size: int = 299
    ) -> None:
        options: dict[str, Any] = {} if weights is None else {"feature_extractor_weights_path": str(weights)}
        try:
            import torchmetrics
            from torchmetrics.image.fid import FrechetInceptionDistance

            metric: Any = FrechetInceptionDistance(
                feature=2048 if features is None else features, reset_real_features=False, normalize=False, **options
            )
        except ImportError as error:
            raise ModelError("FID needs torchmetrics and torch-fidelity: pip install 'ragturbo[eval]'") from error
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"torchmetrics cannot load its Inception network: {error}. Download torch-fidelity's "
                "pt_inception-2015-12-05-6726825d.pth and give its path as --fid-weights."
            ) from error
        self.size = size
        # fp32 loses too much precision in the sums of outer products.
        self._metric = metric.set_dtype(torch.float64).to(device)
        self._device = torch.device(device)
        kind = "Inception-v3 (torch-fidelity)" if features is None else type(features).__name__
        self.about = f"torchmetrics {torchmetrics.__version__}, {kind}, images at {size}x{size}"

    def add_real(self, images: Iterable[Image.Image]) -> None:
        """Add images to the reference set."""
        self._update(images, real=True)

    def compute(self, images: Iterable[Image.Image]) -> float:
        """Return the FID of images to the reference set."""
        self._metric.reset()
        self._update(images, real=False)
        real, drawn = int(self._metric.real_features_num_samples), int(self._metric.fake_features_num_samples)
        if min(real, drawn) < 2:
            raise InvalidRequest(f"FID needs at least two images of each kind, not {real} real and {drawn} drawn")
        return float(self._metric.compute())

    def save(self, path: Path) -> None:
        """Write the statistics of the reference set as .npz."""
        m = self._metric
        total, outer = m.real_features_sum.cpu().numpy(), m.real_features_cov_sum.cpu().numpy()
        np.savez(path, sum=total, outer=outer, count=int(m.real_features_num_samples))

    def load(self, path: Path) -> None:
        """Read statistics written by `save`."""
        try:
            with np.load(path, allow_pickle=False) as data:
                total, outer, count = data["sum"], data["outer"], int(data["count"])
        except (OSError, ValueError, KeyError) as error:
            raise InvalidRequest(f"{path} does not contain FID statistics written by ragturbo: {error}") from error
        m = self._metric
        if total.shape != tuple(m.real_features_sum.shape):
            raise InvalidRequest(
                f"{path} has {total.shape[0]} features, the network has {m.real_features_sum.shape[0]}"
            )
        m.real_features_sum = torch.from_numpy(total).to(m.real_features_sum)
        m.real_features_cov_sum = torch.from_numpy(outer).to(m.real_features_cov_sum)
        m.real_features_num_samples = torch.tensor(count).to(m.real_features_num_samples)

    @torch.inference_mode()
    def _update(self, images: Iterable[Image.Image], *, real: bool, batch: int = 32) -> None:
        images = iter(images)
        while part := list(islice(images, batch)):
            sides = (self.size, self.size)
            arrays = [np.array(image.convert("RGB").resize(sides, Image.Resampling.BICUBIC)) for image in part]
            pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
            self._metric.update(pixels.to(self._device), real=real)


def folder_images(folder: Path) -> Iterator[Image.Image]:
    """Yield the images of a folder and its subfolders as RGB, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InvalidRequest(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)})")
    for path in paths:
        with Image.open(path) as image:
            yield image.convert("RGB")
