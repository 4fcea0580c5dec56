"""All numbers of the recipe. With these seeds, the result of a stage depends only on them and the earlier stages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    seed: int = 2026
    # Training scenes of teacher and student, and how many of them show each rare kind.
    scenes: int = 50_000
    rare_glimpses: int = 3

    vae_channels: tuple[int, ...] = (16, 32, 64)
    vae_steps: int = 2_500
    decoder_steps: int = 2_500
    vae_batch: int = 32
    vae_rate: float = 3e-3
    vae_kl: float = 1e-5
    tiny_channels: int = 24
    tiny_steps: int = 2_500

    context: int = 24
    text_width: int = 128
    text_layers: int = 4
    text_steps: int = 1_500
    text_batch: int = 128
    text_rate: float = 1.5e-3

    # The text enters only in the middle block, so that h carries all information about it.
    unet_channels: tuple[int, ...] = (48, 64, 96)
    unet_middle_layers: int = 4
    teacher_steps: int = 6_000
    teacher_batch: int = 128
    teacher_rate: float = 1.2e-3
    text_dropout: float = 0.1
    guidance: float = 3.0
    sampling_steps: int = 50

    pairs: int = 24_576
    pair_steps: int = 20
    # Pictures of other captions, the discriminator's real samples.
    real: int = 8_000
    # Ordinary pictures among the lessons that explain names.
    ordinary_pairs: int = 8_000
    lpips_steps: int = 600
    student_steps: int = 2_000
    student_batch: int = 128
    student_rate: float = 5e-4

    align_steps: int = 8_000
    # Prompts of a batch on each process, those of them with names, and lessons.
    align_batch: int = 64
    align_named: int = 44
    align_lessons: int = 96
    # Share of the prompts with names that have two.
    align_two: float = 0.45
    # Weight of the loss that tells in h which noun is where.
    align_places: float = 0.3
    adapter_heads: int = 4
    align_rate: float = 5e-4
    align_adapter_rate: float = 2e-3

    lcm_steps: int = 2_000
    lcm_rate: float = 3e-4

    # Training of an adapter on the finished student, for the comparison.
    arm_steps: int = 400
    arm_rate: float = 1e-3

    database_pairs: int = 4_000
    large_database_pairs: int = 20_480


# An afternoon on two CPU cores, a night on two CPU cores, a GPU.
SIZES = {
    "short": Settings(
        vae_steps=1_600, decoder_steps=1_500, tiny_steps=800, text_steps=800, teacher_steps=4_000,
        pairs=8_192, real=4_000, student_batch=64, align_steps=1_500, lcm_steps=1_000,
    ),
    "cpu": Settings(),
    "gpu": Settings(
        scenes=200_000, vae_steps=6_000, vae_batch=128, decoder_steps=4_000, tiny_steps=4_000, text_steps=3_000,
        text_batch=512, teacher_steps=10_000, teacher_batch=512, pairs=60_000, real=20_000, student_steps=8_000,
        student_batch=512, align_steps=10_000, lcm_steps=4_000, arm_steps=4_000,
    ),
}  # fmt: skip
