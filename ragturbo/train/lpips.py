"""Latent LPIPS (Eq. 9): VGG16 with batch norm on latents, without its first three max-pools."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ragturbo.errors import ModelError
from ragturbo.model.weights import read_safetensors, write_safetensors
from ragturbo.train.augment import Augmentation
from ragturbo.train.folder import writing

FORMAT = "ragturbo latent lpips 1"
_BLOCKS = (2, 2, 3, 3, 3)
_WIDTHS = (1, 2, 4, 8, 8)


class LatentVGG(nn.Module):
    """torchvision's vgg16_bn.features with the same module numbers (0 … 43), pools 1-3 identities, `width` for 64."""

    def __init__(self, in_channels: int = 4, width: int = 64) -> None:
        super().__init__()
        self.width = width
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        before = in_channels
        for block, (convs, times) in enumerate(zip(_BLOCKS, _WIDTHS, strict=True)):
            for _ in range(convs):
                layers += [nn.Conv2d(before, width * times, 3, padding=1), nn.BatchNorm2d(width * times), nn.ReLU()]
                before = width * times
            layers.append(nn.Identity() if block < 3 else nn.MaxPool2d(2))
            # E-LatentLPIPS reads each block after its pool.
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * times for times in _WIDTHS)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, c, H, W) -> the outputs of the five blocks."""
        outputs = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                outputs.append(x)
        return outputs


class LatentLPIPS(nn.Module):
    """Eq. 9: E_𝒯‖F(𝒯(ẑ_0)) − F(𝒯(z_0))‖², F the unit-normalised block outputs. Frozen and always in eval mode."""

    def __init__(
        self, vgg: LatentVGG, lin: list[Tensor] | None = None, augmentation: Augmentation | None = None
    ) -> None:
        """lin: calibrated weights of the channels of each block; None: 1."""
        super().__init__()
        self.vgg = vgg
        self.augmentation = augmentation
        for k, weight in enumerate(lin or [torch.ones(c) for c in vgg.widths]):
            self.register_buffer(f"lin{k}", weight.reshape(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LatentLPIPS:
        # With batch statistics a sample's distance would depend on the rest of the batch.
        return super().train(False)

    def forward(self, z0_hat: Tensor, z0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, c, H, W) twice -> (B,). `generator`, on the inputs' device, draws 𝒯; None: no augmentation."""
        if generator is not None and self.augmentation is not None:
            drawn = self.augmentation.draw(len(z0), generator, z0.device)
            z0_hat, z0 = drawn(z0_hat), drawn(z0)
        dtype = next(self.vgg.parameters()).dtype
        z0_hat, z0 = z0_hat.to(dtype), z0.to(dtype)
        # A separate pass for the target, so that it stores no activations.
        with torch.no_grad():
            target = [unit(f) for f in self.vgg(z0)]
        total = torch.zeros(len(z0), device=z0.device, dtype=torch.float32)
        for k, features in enumerate(self.vgg(z0_hat)):
            difference = (unit(features) - target[k]).square() * getattr(self, f"lin{k}")
            total = total + difference.sum(1).flatten(1).mean(1)
        return total

    @classmethod
    def load(cls, path: str | Path, in_channels: int = 4, augmentation: Augmentation | None = None) -> LatentLPIPS:
        """From a safetensors file of `save_vgg`, or of E-LatentLPIPS (tuned or backbone, converted)."""
        path = Path(path).expanduser()
        state, metadata = read_safetensors(path, with_metadata=True)
        features, lin = _read_format(state, path)
        first = features.get("0.weight")
        if first is None:
            some = ", ".join(sorted(state)[:3]) or "nothing"
            raise ModelError(f"{path} holds no VGG16-BN: it has no features.0.weight but {some}")
        if first.shape[1] != in_channels:
            raise ModelError(f"{path} is for latents of {first.shape[1]} channels; these have {in_channels}")
        vgg = LatentVGG(in_channels, first.shape[0])
        try:
            vgg.features.load_state_dict(features)
        except RuntimeError as error:
            raise ModelError(f"{path} is not VGG16-BN on latents ({metadata.get('format')}): {error}") from error
        return cls(vgg, lin, augmentation)


def save_vgg(vgg: LatentVGG, path: str | Path, **metadata: str) -> None:
    state = {f"features.{name}": value for name, value in vgg.features.state_dict().items()}
    with writing(Path(path)):
        write_safetensors(path, state, {"format": FORMAT, **metadata})


def unit(x: Tensor) -> Tensor:
    """Each position's channel vector at length 1, in fp32."""
    x = x.float()
    # The epsilon is inside the root: its gradient at 0 is infinite, and ReLU makes exact zeros.
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-10)


def load_lpips(weights: str, in_channels: int, augmentation: Augmentation | None) -> LatentLPIPS:
    """weights: loss.lpips_weights, a file or "random" for untrained features."""
    if weights == "random":
        return LatentLPIPS(LatentVGG(in_channels), augmentation=augmentation)
    return LatentLPIPS.load(weights, in_channels, augmentation)


def _read_format(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[Tensor] | None]:
    """State dict of vgg16_bn.features and the calibrated weights, if any. Names are "features.N.…" (ours, and
    E-LatentLPIPS's backbone), or "net.sliceK.N.…" and "linK.model.1.weight" (E-LatentLPIPS, tuned)."""
    features: dict[str, Tensor] = {}
    lin: dict[int, Tensor] = {}
    for name, value in state.items():
        for prefix in ("state_dict.", "module.", "model."):
            name = name.removeprefix(prefix)
        parts = name.split(".")
        if parts[0] == "features":
            features[".".join(parts[1:])] = value
        elif parts[0] == "net" and parts[1].startswith("slice"):
            features[".".join(parts[2:])] = value
        elif parts[0].startswith("lin") and parts[0][3:].isdigit() and parts[-1] == "weight":
            lin[int(parts[0][3:])] = value.flatten()
    if lin and sorted(lin) != list(range(5)):
        raise ModelError(f"{path} has calibrated weights for blocks {sorted(lin)}; expected all of 0 to 4 or none")
    return features, [lin[k].float() for k in range(5)] if lin else None
