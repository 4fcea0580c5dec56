"""Each metric on a small model, against an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.evaluate.feature_metrics import Aesthetic, AestheticHead, ClipScore
from ragturbo.evaluate.fid import Fid, folder_images
from ragturbo.evaluate.suites import Prompt
from ragturbo.evaluate.tifa import HuggingFaceVQA, Tifa, nearest_choice


def pictures(count: int, seed: int = 0, noise: float = 0.0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    base = np.kron(rng.integers(0, 256, (count, 4, 4, 3)), np.ones((1, 8, 8, 1)))
    spoiled = base + noise * np.random.default_rng(99).normal(size=base.shape)
    return [Image.fromarray(row) for row in spoiled.clip(0, 255).astype(np.uint8)]


PROMPTS = [Prompt("0", "a red circle"), Prompt("1", "a dog"), Prompt("2", "two boats")]


@pytest.fixture(scope="module")
def clip() -> ClipScore:
    import open_clip
    from open_clip.transform import image_transform

    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(768, vision, text)
    return ClipScore(model, image_transform(32, is_train=False), open_clip.get_tokenizer("ViT-B-32"))


def test_the_clip_score_is_the_raw_cosine_of_open_clips_own_features(clip):
    import open_clip

    images = pictures(3)
    found = [s.value for s in clip.score(PROMPTS, images)]
    with torch.no_grad():
        seen = clip.clip.encode_image(torch.stack([clip.preprocess(i) for i in images]), normalize=True)
        tokens = open_clip.tokenize([p.text for p in PROMPTS])
        read = clip.clip.encode_text(tokens, normalize=True)
    assert found == pytest.approx((seen * read).sum(-1).tolist(), abs=1e-6)
    # The control: other prompts, other numbers.
    assert found != pytest.approx((seen * read.roll(1, 0)).sum(-1).tolist(), abs=1e-4)


def test_the_aesthetic_score_is_the_published_heads_layers_on_the_unit_feature(clip, tmp_path):
    torch.manual_seed(1)
    head = AestheticHead()
    save_file({name: value.contiguous() for name, value in head.state_dict().items()}, tmp_path / "head.safetensors")
    assert sorted(head.state_dict())[:2] == ["layers.0.bias", "layers.0.weight"]
    found = [s.value for s in Aesthetic(head, clip).score(PROMPTS, pictures(3))]
    x = clip.image_features(pictures(3)).numpy()
    for i in (0, 2, 4, 6, 7):
        layer = head.layers[i]
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    assert found == pytest.approx(x[:, 0].tolist(), abs=1e-5)


def test_a_missing_file_is_reported_with_its_option(tmp_path):
    with pytest.raises(ModelError, match="--aesthetic-weights"):
        Aesthetic.load(None)
    with pytest.raises(ModelError, match="ragturbo convert"):
        Aesthetic.load(tmp_path / "head.pth")
    with pytest.raises(ModelError, match="ragturbo convert"):
        ClipScore.load("ViT-B-32", tmp_path / "clip.bin")
    with pytest.raises(ModelError, match="--clip-weights"):
        ClipScore.load("ViT-B-32", tmp_path / "nowhere.safetensors")
    with pytest.raises(ModelError, match="--vqa"):
        HuggingFaceVQA(tmp_path)


class Features(nn.Module):
    """Sixteen numbers per image: statistics of its quarters."""

    num_features = 16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.double().mean(1) / 255
        blocks = x.unfold(1, x.shape[1] // 2, x.shape[1] // 2).unfold(2, x.shape[2] // 2, x.shape[2] // 2)
        flat = blocks.reshape(len(x), 4, -1)
        quarters = [flat.mean(-1), flat.std(-1), flat.amax(-1), flat.amin(-1)]
        return torch.cat(quarters, 1)


def test_fid_of_a_set_with_itself_is_zero_and_grows_with_noise(tmp_path):
    fid = Fid(features=Features(), size=32)
    fid.add_real(pictures(200))
    values = [fid.compute(pictures(200, noise=level)) for level in (0, 20, 60, 120)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values == sorted(values) and values[3] > values[1] > 1e-3
    fid.save(tmp_path / "real.npz")
    again = Fid(features=Features(), size=32)
    again.load(tmp_path / "real.npz")
    assert again.compute(pictures(200, noise=60)) == pytest.approx(values[2], rel=1e-9)


def test_fid_of_gaussians_is_the_formula():
    fid = Fid(features=Features(), size=32)
    real, drawn = pictures(300, seed=1), pictures(250, seed=2, noise=30)
    fid.add_real(real)
    a, b = (
        Features()(torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])).numpy()
        for images in (real, drawn)
    )
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of a matrix square root is the sum of the square roots of the eigenvalues.
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    by_hand = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots
    assert fid.compute(drawn) == pytest.approx(by_hand, rel=1e-4)


def test_statistics_of_another_network_and_folders_without_images_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", sum=np.zeros(3), outer=np.zeros((3, 3)), count=5)
    fid = Fid(features=Features(), size=32)
    with pytest.raises(InvalidRequest, match="3 features, the network has 16"):
        fid.load(tmp_path / "other.npz")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(InvalidRequest, match="does not contain FID statistics"):
        fid.load(tmp_path / "junk.npz")
    with pytest.raises(InvalidRequest, match="has no images"):
        list(folder_images(tmp_path))


class Scripted:
    about = "scripted"

    def __init__(self, replies: dict[str, str]) -> None:
        self.replies = replies

    def answer(self, images, questions, choices):
        return [self.replies[question] for question in questions]


def test_tifa_on_a_scripted_model_gives_the_value_counted_by_hand():
    def question(text: str, answer: str, kind: str) -> dict:
        return {"question": text, "choices": ["red", "blue", "yes", "no"], "answer": answer, "element_type": kind}

    prompts = [
        Prompt("0", "", meta={"questions": [question("q1", "red", "color"), question("q2", "yes", "object")]}),
        Prompt("1", "", meta={"questions": [question("q3", "yes", "object")]}),
    ]
    metric = Tifa(Scripted({"q1": "Red", "q2": "no", "q3": "yes, there is"}))
    first, second = metric.score(prompts, pictures(2))
    assert first.value == 0.5 and first.detail == {"color": (1, 1), "object": (0, 1)}
    assert second.value == 1.0


def test_a_free_answer_is_taken_for_the_nearest_choice():
    assert nearest_choice(" Blue ", ["red", "blue"]) == "blue"
    assert nearest_choice("it is red", ["red", "blue"]) == "red"
    assert nearest_choice("bluish", ["red", "blue"]) == "blue"


def test_a_real_blip_of_small_size_answers_every_question(tmp_path):
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessor,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "colour", "is", "it", "red", "blue", "?"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config={
            **size, "vocab_size": len(words), "encoder_hidden_size": 16, "bos_token_id": 2, "sep_token_id": 3,
            "eos_token_id": 3, "pad_token_id": 0,
        },
        vision_config={**size, "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "blip"
    BlipForQuestionAnswering(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    model = HuggingFaceVQA(folder, batch=2)
    replies = model.answer(pictures(3), ["what colour is it ?"] * 3, [["red", "blue"]] * 3)
    assert len(replies) == 3 and all(isinstance(reply, str) for reply in replies)
