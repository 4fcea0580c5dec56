"""AutoencoderKL: the VAE of Stable Diffusion 1 and 2."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ragturbo.model.networks.config import Config, Options
from ragturbo.model.networks.layers import ACTIVATIONS, Attention, Downsample2D, ResnetBlock2D, Upsample2D
from ragturbo.model.networks.library_class import Network, become_library_class

OPTIONS = Options(
    free={
        "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (64,), "layers_per_block": 1, "act_fn": "silu",
        "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215,
        "shift_factor": None, "latents_mean": None, "latents_std": None, "force_upcast": True,
        "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
    },
    fixed={},
    allowed={
        "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "act_fn": ACTIVATIONS,
        "use_quant_conv": (True, False), "use_post_quant_conv": (True, False), "mid_block_add_attention": (True, False),
    },
)  # fmt: skip
_EPS = 1e-6


class AutoencoderKLOutput(NamedTuple):
    latent_dist: Any


class DecoderOutput(NamedTuple):
    sample: Tensor


class DiagonalGaussianDistribution:
    """The posterior. Only its mean is used here, and computed; diffusers' class has the rest."""

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean = parameters.chunk(2, dim=1)[0]

    def mode(self) -> Tensor:
        return self.mean

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Full

        return getattr(Full(self.parameters), name)


class _Options(NamedTuple):
    groups: int
    act: str
    attention: bool

    def resnets(self, in_channels: int, out_channels: int, count: int) -> nn.ModuleList:
        widths = [in_channels, *[out_channels] * (count - 1)]
        return nn.ModuleList(
            [ResnetBlock2D(width, out_channels, None, self.groups, _EPS, self.act) for width in widths]
        )


class DownEncoderBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, resnets: int, options: _Options, downsample: bool) -> None:
        super().__init__()
        self.resnets = options.resnets(in_channels, out_channels, resnets)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)]) if downsample else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in (*self.resnets, *(self.downsamplers or ())):
            hidden_states = layer(hidden_states)
        return hidden_states


class UpDecoderBlock2D(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, resnets: int, options: _Options, upsample: bool) -> None:
        super().__init__()
        self.resnets = options.resnets(in_channels, out_channels, resnets)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if upsample else None

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        for layer in (*self.resnets, *(self.upsamplers or ())):
            hidden_states = layer(hidden_states)
        return hidden_states


class UNetMidBlock2D(nn.Module):
    def __init__(self, channels: int, options: _Options) -> None:
        super().__init__()
        attention: Any = None
        if options.attention:
            attention = Attention(channels, 1, channels, groups=options.groups, eps=_EPS)
        self.attentions = nn.ModuleList([attention])
        self.resnets = options.resnets(channels, channels, 2)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        x = self.resnets[0](hidden_states)
        if self.attentions[0] is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    def __init__(self, config: Config, options: _Options) -> None:
        super().__init__()
        widths = list(config.block_out_channels)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                DownEncoderBlock2D(
                    widths[max(i - 1, 0)], widths[i], config.layers_per_block, options, i < len(widths) - 1
                )
                for i, _ in zip(range(len(widths)), config.down_block_types, strict=True)
            ]
        )
        self.mid_block = UNetMidBlock2D(widths[-1], options)
        self.conv_norm_out = nn.GroupNorm(options.groups, widths[-1], eps=_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        sample = self.conv_in(sample)
        for block in self.down_blocks:
            sample = block(sample)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(sample))))


class Decoder(nn.Module):
    def __init__(self, config: Config, options: _Options) -> None:
        super().__init__()
        widths = list(config.block_out_channels)
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        blocks = [
            UpDecoderBlock2D(widths[min(i + 1, last)], widths[i], config.layers_per_block + 1, options, i > 0)
            for i, _ in zip(reversed(range(len(widths))), config.up_block_types, strict=True)
        ]
        # Registered before the middle block, as in diffusers.
        self.up_blocks = nn.ModuleList(blocks)
        self.mid_block = UNetMidBlock2D(widths[-1], options)
        self.conv_norm_out = nn.GroupNorm(options.groups, widths[0], eps=_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        sample = self.mid_block(self.conv_in(sample))
        for block in self.up_blocks:
            sample = block(sample)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


class AutoencoderKL(Network):
    LIBRARY = "diffusers"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        options = _Options(config.norm_num_groups, config.act_fn, config.mid_block_add_attention)
        latent = config.latent_channels
        self.encoder = Encoder(config, options)
        self.decoder = Decoder(config, options)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        h = self.encoder(x)
        if self.quant_conv is not None:
            h = self.quant_conv(h)
        posterior = DiagonalGaussianDistribution(h)
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """generator: not used, as in diffusers."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        sample = self.decoder(z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Encode, sample and decode: only diffusers' class does."""
        return become_library_class(self)(*arguments, **options)
