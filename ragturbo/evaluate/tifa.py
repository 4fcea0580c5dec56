"""TIFA: a visual question answering (VQA) model answers TIFA's questions; the score is the share of right answers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ragturbo.errors import ModelError
from ragturbo.evaluate.scores import CategoryCounts, ImageScore, right_share
from ragturbo.evaluate.suites import Prompt


class Tifa:
    name = "tifa"

    def __init__(self, vqa: HuggingFaceVQA) -> None:
        self.vqa, self.about = vqa, vqa.about

    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[ImageScore]:
        asked = [(i, question) for i, prompt in enumerate(prompts) for question in prompt.meta["questions"]]
        replies = self.vqa.answer(
            [images[i] for i, _ in asked], [q["question"] for _, q in asked], [list(q["choices"]) for _, q in asked]
        )
        counts: list[CategoryCounts] = [{} for _ in prompts]
        for (i, question), reply in zip(asked, replies, strict=True):
            right, total = counts[i].get(question["element_type"], (0, 0))
            hit = nearest_choice(reply, question["choices"]) == question["answer"]
            counts[i][question["element_type"]] = (right + hit, total + 1)
        return [ImageScore(prompt.id, right_share(count), count) for prompt, count in zip(prompts, counts, strict=True)]


def nearest_choice(reply: str, choices: Sequence[str]) -> str:
    """Return the choice that equals the reply, else one that occurs in it as a word, else the most similar one."""
    said = reply.strip().lower()
    for choice in choices:
        if said == choice.strip().lower():
            return choice
    for choice in choices:
        if choice.strip().lower() in said.split():
            return choice
    return max(choices, key=lambda choice: difflib.SequenceMatcher(None, said, choice.lower()).ratio())


class HuggingFaceVQA:
    """A VQA model of transformers: BLIP, or an image-text-to-text model (BLIP-2, LLaVA, Qwen-VL).

    BLIP gets the question, image-text-to-text models (`generative`) also get the choices.
    """

    def __init__(self, name: str | Path, device: Any = "cpu", batch: int = 16, local_files_only: bool = True) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BlipForQuestionAnswering

        options: dict[str, Any] = {"local_files_only": local_files_only}
        try:
            self.generative = AutoConfig.from_pretrained(name, **options).model_type != "blip"
            kind = AutoModelForImageTextToText if self.generative else BlipForQuestionAnswering
            model = kind.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **options)
            self.processor = AutoProcessor.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{name} cannot be loaded as a VQA model: {error}. Give a folder or id of a BLIP VQA model or an "
                "image-text-to-text model as --vqa."
            ) from error
        self.model, self.device, self.batch = model.to(device).eval(), torch.device(device), batch
        self.about = f"transformers {transformers.__version__}, {name}"

    @torch.inference_mode()
    def answer(self, images: list[Image.Image], questions: list[str], choices: list[list[str]]) -> list[str]:
        """Return one answer per question; question i is about image i."""
        replies: list[str] = []
        for start in range(0, len(questions), self.batch):
            part = slice(start, start + self.batch)
            texts = questions[part]
            if self.generative:
                texts = [
                    f"Question: {question} Choices: {', '.join(listed)}. Short answer:"
                    for question, listed in zip(texts, choices[part], strict=True)
                ]
            inputs = self.processor(images=images[part], text=texts, padding=True, return_tensors="pt")
            inputs = inputs.to(self.device)
            tokens = self.model.generate(**inputs, max_new_tokens=12, do_sample=False)
            if self.generative and tokens.shape[1] > inputs["input_ids"].shape[1]:
                tokens = tokens[:, inputs["input_ids"].shape[1] :]
            replies += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return replies
