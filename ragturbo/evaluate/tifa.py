"""TIFA: a visual question answering model is asked about each image; the score is the share of right answers.

The questions, choices and answers are TIFA's own files. An answer that is not one of the choices is taken for the
choice nearest to it in words.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from ragturbo.errors import ModelError
from ragturbo.evaluate.scores import Scored, share
from ragturbo.evaluate.suites import Prompt


class VQA(Protocol):
    about: str

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str], choices: Sequence[list[str]]) -> list[str]:
        """One answer a question; image i belongs to question i."""
        ...


class Tifa:
    name = "tifa"

    def __init__(self, vqa: VQA) -> None:
        self.vqa, self.about = vqa, vqa.about

    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[Scored]:
        asked = [
            (i, question) for i, prompt in enumerate(prompts) for question in prompt.meta["questions"]
        ]  # all questions of the batch go to the model at once
        replies = self.vqa.ask(
            [images[i] for i, _ in asked], [q["question"] for _, q in asked], [list(q["choices"]) for _, q in asked]
        )
        counts: list[dict[str, tuple[int, int]]] = [{} for _ in prompts]
        for (i, question), reply in zip(asked, replies, strict=True):
            right, total = counts[i].get(question["element_type"], (0, 0))
            hit = choice(reply, question["choices"]) == question["answer"]
            counts[i][question["element_type"]] = (right + hit, total + 1)
        return [Scored(prompt.id, share(count), count) for prompt, count in zip(prompts, counts, strict=True)]


def choice(reply: str, choices: Sequence[str]) -> str:
    """The choice a free answer means."""
    said = reply.strip().lower()
    for one in choices:
        if said == one.strip().lower():
            return one
    for one in choices:
        if one.strip().lower() in said.split():
            return one
    return max(choices, key=lambda one: difflib.SequenceMatcher(None, said, one.lower()).ratio())


class HuggingFaceVQA:
    """BLIP-style models answer the question; image-text-to-text models (BLIP-2, LLaVA, Qwen-VL …) are also shown the
    choices."""

    def __init__(self, model: Any, processor: Any, *, generative: bool, device: Any, batch: int, about: str) -> None:
        self.model, self.processor = model.to(device).eval(), processor
        self.generative, self.device, self.batch, self.about = generative, torch.device(device), batch, about

    @classmethod
    def load(
        cls, name: str | Path, device: Any = "cpu", dtype: Any = None, batch: int = 16, local_files_only: bool = True
    ) -> HuggingFaceVQA:
        import transformers
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BlipForQuestionAnswering

        options: dict[str, Any] = {"local_files_only": local_files_only}
        try:
            config = AutoConfig.from_pretrained(name, **options)
            kind = BlipForQuestionAnswering if config.model_type == "blip" else AutoModelForImageTextToText
            model = kind.from_pretrained(name, dtype=dtype, use_safetensors=True, **options)
            processor = AutoProcessor.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{name} cannot be loaded as a VQA model: {error}. Give a folder or id of a BLIP VQA model or an "
                "image-text-to-text model as --vqa."
            ) from error
        about = f"transformers {transformers.__version__}, {name}"
        return cls(model, processor, generative=config.model_type != "blip", device=device, batch=batch, about=about)

    @torch.inference_mode()
    def ask(self, images: Sequence[Image.Image], questions: Sequence[str], choices: Sequence[list[str]]) -> list[str]:
        replies: list[str] = []
        for start in range(0, len(questions), self.batch):
            part = slice(start, start + self.batch)
            texts = [self._prompt(q, c) for q, c in zip(questions[part], choices[part], strict=True)]
            inputs = self.processor(images=list(images[part]), text=texts, padding=True, return_tensors="pt")
            inputs = inputs.to(self.device)
            tokens = self.model.generate(**inputs, max_new_tokens=12, do_sample=False)
            if self.generative and tokens.shape[1] > inputs["input_ids"].shape[1]:
                tokens = tokens[:, inputs["input_ids"].shape[1] :]
            replies += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return replies

    def _prompt(self, question: str, choices: list[str]) -> str:
        if not self.generative:
            return question
        return f"Question: {question} Choices: {', '.join(choices)}. Short answer:"
