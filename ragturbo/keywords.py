"""Unknown keyword arguments: the nearest name, or what takes the place of one that diffusers has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from ragturbo.errors import UnknownOption

P = ParamSpec("P")
T = TypeVar("T")

_PIPELINE = "load a pipeline with diffusers, change it, and give it as the model: Generator.from_pretrained(pipe)"
_ONE_GRAPH = "the steps run as one graph, without callbacks; postprocess= runs on the finished batch"
_IN_SCHEDULER = "timesteps follow from num_inference_steps and the scheduler: Generator.from_pretrained(…, scheduler=…)"
_TEXT_ONLY = "images are generated from text; neighbors=[(caption, image)] is how a picture has an influence"
_FUSE = "fuse the LoRA into a pipeline (pipe.load_lora_weights(…), pipe.fuse_lora(), pipe.unload_lora_weights()) and "
_FUSE += "give pipe as the model; adapter= loads a LoRA of the decoder alone"
_MEMORY = "the model is kept on one device; device= and dtype= choose it, and float16 of sd-turbo takes 2.6 GB"

# What diffusers, or habit, calls an argument -> its name here, or the way.
INSTEAD = {
    "torch_dtype": "dtype", "precision": "dtype",
    "steps": "num_inference_steps", "num_steps": "num_inference_steps", "inference_steps": "num_inference_steps",
    "guidance": "guidance_scale", "cfg": "guidance_scale", "cfg_scale": "guidance_scale",
    "n": "num_images_per_prompt", "num_images": "num_images_per_prompt", "batch_size": "num_images_per_prompt",
    "k": "num_neighbors", "top_k": "k", "lambda_": "lam", "strength_of_adapter": "lam", "use_auth_token": "token",
    "text": "prompt", "prompts": "prompt", "db": "database", "seeds": "seed", "blend": "w", "weight": "w",
    "pretrained_model_name_or_path": "model", "model_id": "model", "checkpoint": "model", "output": "output_type",
    "callback": _ONE_GRAPH, "callback_steps": _ONE_GRAPH, "callback_on_step_end": _ONE_GRAPH,
    "callback_on_step_end_tensor_inputs": _ONE_GRAPH,
    "eta": _IN_SCHEDULER, "timesteps": _IN_SCHEDULER, "sigmas": _IN_SCHEDULER,
    "clip_skip": "encode the prompt yourself and pass prompt_embeds=, with query= to search by",
    "cross_attention_kwargs": _FUSE, "lora": _FUSE, "lora_scale": _FUSE,
    "guidance_rescale": "it is not supported; guidance_scale= is",
    "ip_adapter_image": _TEXT_ONLY, "ip_adapter_image_embeds": _TEXT_ONLY, "image": _TEXT_ONLY,
    "mask_image": _TEXT_ONLY, "strength": _TEXT_ONLY, "controlnet": _TEXT_ONLY,
    "return_dict": "a call always returns an Output",
    "safety_checker": "there is no safety checker; postprocess= of a call is the place for one",
    "requires_safety_checker": "there is no safety checker; postprocess= of a call is the place for one",
    "feature_extractor": "there is no safety checker, and so no feature_extractor",
    "device_map": _MEMORY, "max_memory": _MEMORY, "offload_folder": _MEMORY, "low_cpu_mem_usage": _MEMORY,
    "use_safetensors": "weights are always loaded from safetensors; `ragturbo convert` turns pickles into them",
    "unet": _PIPELINE, "text_encoder": _PIPELINE, "tokenizer": _PIPELINE, "custom_pipeline": _PIPELINE,
    "force_download": "delete the model from the hub's cache, or give revision=",
}  # fmt: skip
# Methods and attributes of a pipeline.
INSTEAD_ATTRIBUTES = {
    "to": "device= and dtype= of Generator.from_pretrained choose them",
    "load_lora_weights": _FUSE, "fuse_lora": _FUSE, "set_adapters": _FUSE,
    "enable_model_cpu_offload": _MEMORY, "enable_sequential_cpu_offload": _MEMORY, "enable_vae_slicing": _MEMORY,
    "enable_vae_tiling": _MEMORY, "enable_attention_slicing": _MEMORY,
    "enable_xformers_memory_efficient_attention": "attention='xformers' of Generator.from_pretrained",
    "from_pipe": "Generator.from_pretrained(pipe)",
    "set_progress_bar_config": "there is no progress bar",
    "unet": "bundle.unet.unet", "vae": "bundle.vae.module", "text_encoder": "bundle.text.text_encoder",
    "tokenizer": "bundle.text.tokenizer", "scheduler": "bundle.scheduler", "adapter": "bundle.adapter",
    "components": "bundle has the parts", "device": "info['device']", "dtype": "info['dtype']",
    "generate": "call the Generator itself: gen(prompt)",
}  # fmt: skip


def unknown(name: str, function: Callable[..., Any], other: Callable[..., Any] | None = None) -> UnknownOption:
    """Return the error for an argument that `function` does not have. other: one that may have it."""
    import difflib

    known, others = names(function), [] if other is None else names(other)
    elsewhere = "" if other is None else other.__qualname__
    text = f"{function.__qualname__} has no argument {name!r}"
    instead = INSTEAD.get(name, "")
    if name in others:
        text += f": it is one of {elsewhere}"
    elif instead in known:
        text += f": here it is {instead}"
    elif instead in others:
        text += f": it is {instead} of {elsewhere}"
    elif instead:
        text += f": {instead}"
    elif near := difflib.get_close_matches(name, [*known, *others], 1, 0.7):
        text += f"; did you mean {near[0]}" + ("?" if near[0] in known else f" of {elsewhere}?")
    else:
        text += f"; it takes {', '.join(known)}"
    return UnknownOption(text, option=name)


def names(function: Callable[..., Any]) -> list[str]:
    """Return the names of a function's arguments."""
    parameters = inspect.signature(function, eval_str=False).parameters
    # `**options` of a function takes the names of another.
    return [name for name, p in parameters.items() if name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD]


def named(other: Callable[[], Callable[..., Any]] | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function so that unknown keyword arguments raise `unknown`; its signature stays as it is.

    other: returns the function that may have the argument instead.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        accepted = frozenset(names(function))

        def check(given: dict[str, Any]) -> None:
            if not accepted.issuperset(given):
                name = next(name for name in given if name not in accepted)
                raise unknown(name, function, None if other is None else other())

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def checked_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                check(kwargs)
                return await function(*args, **kwargs)

            return cast(Callable[P, T], checked_async)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            check(kwargs)
            return function(*args, **kwargs)

        return checked

    return decorate
