"""The parts of the embedded model: the classes of Stable Diffusion at sizes that two CPU cores can train."""

from __future__ import annotations

import json
import string
from pathlib import Path

from diffusers import AutoencoderKL, AutoencoderTiny, EulerDiscreteScheduler, UNet2DConditionModel
from settings import Settings
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ragturbo.evaluate.world import SIDE, vocabulary

LATENT_SIDE = 16
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|unk|>")


def tokenizer_in(folder: Path, s: Settings) -> CLIPTokenizer:
    """Load the folder's tokenizer, or make one; a new tokenizer may number the words differently."""
    return CLIPTokenizer.from_pretrained(folder) if (folder / "vocab.json").exists() else make_tokenizer(folder, s)


def make_tokenizer(folder: Path, s: Settings) -> CLIPTokenizer:
    """Train byte-pair merges until every word of the vocabulary is one token."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(unk_token=SPECIAL[2], end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, special_tokens=list(SPECIAL), end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(vocabulary(), trainer)
    bpe.model.save(str(folder))
    return complete_tokenizer(folder, s)


def complete_tokenizer(folder: Path, s: Settings) -> CLIPTokenizer:
    """Add every letter, and every syllable of two, after the existing tokens and merges, which keep their numbers.

    So a made-up word becomes a few tokens of its own instead of unknown ones.
    """
    words = json.loads((folder / "vocab.json").read_text())
    header, *merges = (folder / "merges.txt").read_text().splitlines()
    ends = ("", "</w>")
    letters = [letter + end for letter in string.ascii_lowercase for end in ends]
    syllables = [(c, v + end) for c in string.ascii_lowercase for v in "aeiou" if c not in "aeiou" for end in ends]
    merges += [" ".join(pair) for pair in syllables if "".join(pair) not in words]
    for token in [*letters, *("".join(pair) for pair in syllables)]:
        words.setdefault(token, len(words))
    (folder / "vocab.json").write_text(json.dumps(words, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join([header, *merges]) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token=SPECIAL[2],
        model_max_length=s.context,
    )
    tokenizer.save_pretrained(folder)
    split = [word for word in vocabulary() if len(tokenizer(word)["input_ids"]) != 3]
    if split:
        raise RuntimeError(f"words that are not a single token: {split}")
    return tokenizer


def make_text_encoder(folder: Path, s: Settings) -> CLIPTextModel:
    words = json.loads((folder / "vocab.json").read_text())
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=s.text_width, intermediate_size=3 * s.text_width,
            num_hidden_layers=s.text_layers, num_attention_heads=4, max_position_embeddings=s.context,
            projection_dim=s.text_width, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def make_vae(s: Settings) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=s.vae_channels, layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=SIDE,
        force_upcast=False,
    )  # fmt: skip


def make_tiny_vae(s: Settings) -> AutoencoderTiny:
    widths = (s.tiny_channels,) * 3
    return AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, latent_channels=4,
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(2, 1, 1), force_upcast=False, scaling_factor=1.0,
    )  # fmt: skip


def make_unet(s: Settings) -> UNet2DConditionModel:
    """Text attention only in the middle block, so that the skips carry no information about the prompt."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE, in_channels=4, out_channels=4, block_out_channels=s.unet_channels, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        transformer_layers_per_block=(1, 1, s.unet_middle_layers), attention_head_dim=(4, 4, 4),
        cross_attention_dim=s.text_width, use_linear_projection=True, norm_num_groups=16,
    )  # fmt: skip


def make_scheduler() -> EulerDiscreteScheduler:
    """sd-turbo's scheduler with v-prediction and zero terminal SNR: at t = 999 the input is pure noise."""
    return EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True,
    )  # fmt: skip


class ImageEncoder(nn.Module):
    """The image side of the contrastive loss: (B, 3, 64, 64) -> (B, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o, stride in ((48, 64, 1), (64, 96, 2), (96, 96, 1), (96, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, width))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(functional.pixel_unshuffle(images, 4))
