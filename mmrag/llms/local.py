"""A chat model of transformers that runs here and takes images, as a LlamaIndex LLM.

LlamaIndex's own class for local models takes text alone. Qwen2-VL, Qwen2.5-VL and Qwen3-VL get
their inputs from our code, which needs no torchvision; other models from their own processor.
Answers are greedy, so that the same question gets the same answer.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseGen,
    ImageBlock,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.models.auto import AutoModelForImageTextToText

from mmrag.content import load_image
from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag.modeling.chat import NATIVE, load_processor, process, special_marks
from mmrag.modeling.checkpoints import find_checkpoint, read_json
from mmrag.modeling.image_rule import ImageRule, read_image_rule
from mmrag.modeling.loading import DeviceMap, Quantization, load_exact, place
from mmrag.modeling.prompts import expand
from mmrag.modeling.qwen_images import resize, to_patches
from mmrag.modeling.qwen_vl import load_qwen_parts
from mmrag.modeling.tokenizers import check_tokenizer
from mmrag.prompting import broken_up

Inputs = dict[str, Any]
# From messages as chat templates take them, and their images in order, to what a model takes.
Prepare = Callable[[list[dict[str, Any]], list[Image.Image]], Inputs]
_IMAGE_BLOCK: dict[str, Any] = {"type": "image"}
# Checkpoints allow up to 16384 for one image, and one page would fill the window.
_MOST_IMAGE_TOKENS = 1280


class LocalLLM(CustomLLM):
    """A chat model for ``CitedQueryEngine`` and all else that takes an LLM.

    Args:
        model: a name on the hub or a checkpoint folder, of any image-text-to-text model.
        device: as in ``load_embedder``.
        dtype: as in ``load_embedder``.
        revision: as in ``load_embedder``.
        quantize: as in ``load_embedder``.
        device_map: as in ``load_embedder``.
        context_window: in tokens; by default what the checkpoint says.
        max_tokens: longest answer.
        max_image_tokens: most visual tokens of one image, 1280 by default; for the Qwen-VL
            families alone.
        system_prompt: stands before every conversation; None: nothing does.

    Raises:
        ConfigError: For options that make no sense.
        ModelError: If the checkpoint cannot be found or does not load exactly. Chats raise
            ContentError for a prompt that does not fit, and for blocks that are no text or image.

    >>> llm = LocalLLM("Qwen/Qwen3-VL-2B-Instruct", dtype="bfloat16")  # doctest: +SKIP
    >>> print(llm.complete("What makes wind?"))  # doctest: +SKIP
    """

    model_name: str = Field(description="Name or folder.")
    context_window: int = Field(description="Tokens of prompt and answer together.")
    max_tokens: int = Field(description="Tokens of the longest answer.")
    _model: Any = PrivateAttr()
    _tokenizer: Any = PrivateAttr()
    _prepare: Prepare = PrivateAttr()
    _marks: tuple[str, ...] = PrivateAttr()
    _lock: threading.Lock = PrivateAttr()

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        context_window: int | None = None,
        max_tokens: int = 1024,
        max_image_tokens: int | None = None,
        quantize: Quantization | None = None,
        device_map: DeviceMap | None = None,
        system_prompt: str | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"max_tokens={max_tokens}: give at least 1.")
        folder = find_checkpoint(model, revision)
        placement = place(device, dtype, quantize=quantize, device_map=device_map)
        kind = read_json(folder / "config.json").get("model_type")
        prepare: Prepare
        if kind in NATIVE:
            loaded, tokenizer = load_qwen_parts(NATIVE[kind][0], folder, placement)
            most = _MOST_IMAGE_TOKENS if max_image_tokens is None else max_image_tokens
            rule = read_image_rule(folder).with_tokens(None, most)
            prepare = _QwenInputs(tokenizer, _template(folder, tokenizer), rule)
        elif max_image_tokens is not None:
            raise ConfigError(f"max_image_tokens is for the Qwen-VL families, not for {kind}.")
        else:
            processor = load_processor(folder, str(model))
            tokenizer, prepare = processor.tokenizer, partial(_processed, processor)
            loaded = load_exact(AutoModelForImageTextToText, folder, placement)
            rows = loaded.get_input_embeddings().num_embeddings
            check_tokenizer(tokenizer, str(model), rows=rows)
        window = context_window or _window(loaded)
        super().__init__(
            model_name=str(model),
            context_window=window,
            # The sources need most of the window.
            max_tokens=min(max_tokens, window // 4),
            system_prompt=system_prompt,
            callback_manager=callback_manager or CallbackManager(),
        )
        self._model, self._tokenizer, self._prepare = loaded, tokenizer, prepare
        self._marks = special_marks(tokenizer)
        # One answer at a time: `generate` on one model from two threads shares its caches.
        self._lock = threading.Lock()

    @classmethod
    def class_name(cls) -> str:
        """Name for LlamaIndex."""
        return "LocalLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Sizes and name, as LlamaIndex asks for them."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_tokens,
            is_chat_model=True,
            model_name=self.model_name,
        )

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation. ``max_tokens`` may be given for one call."""
        return self._whole(messages, **kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """``chat`` word by word; a stream that is closed stops the model."""
        return self._replies(messages, **kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """``chat`` that leaves the event loop free."""
        return await asyncio.to_thread(self._whole, messages, **kwargs)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """``stream_chat`` that leaves the event loop free."""

        async def replies() -> AsyncGenerator[ChatResponse, None]:
            stopped = threading.Event()
            source = self._replies(messages, stopped=stopped, **kwargs)
            try:
                while (reply := await asyncio.to_thread(next, source, None)) is not None:
                    yield reply
            finally:
                stopped.set()  # a thread may still wait for a piece, so it cannot be closed

        return replies()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, as the one message of a conversation."""
        reply = self._whole([ChatMessage(content=prompt)], **kwargs)
        return CompletionResponse(text=reply.message.content or "")

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """``complete`` word by word."""
        for reply in self._replies([ChatMessage(content=prompt)], **kwargs):
            yield CompletionResponse(text=reply.message.content or "", delta=reply.delta)

    def _whole(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return list(self._replies(messages, **kwargs))[-1]

    def _replies(
        self,
        messages: Sequence[ChatMessage],
        *,
        max_tokens: int | None = None,
        stopped: threading.Event | None = None,
    ) -> ChatResponseGen:
        """What is said so far, piece by piece; the last one says whether it was cut off."""
        most = max_tokens or self.max_tokens
        with self._lock:
            inputs = self._inputs(messages, most)
            run = _Run(self._model, self._tokenizer, inputs, most, stopped or threading.Event())
            text = ""
            try:
                for piece in run:
                    text += piece
                    yield _reply(text, piece)
            finally:
                run.stop()
        yield _reply(text, "", "length" if run.cut_off else "stop")

    def _inputs(self, messages: Sequence[ChatMessage], most: int) -> Inputs:
        turns, images = [], []
        for message in messages:
            parts: list[dict[str, Any]] = []
            for block in message.blocks:
                if isinstance(block, TextBlock):
                    # A document that writes <|im_end|> must not end the user's turn.
                    parts.append({"type": "text", "text": broken_up(block.text, self._marks)})
                elif isinstance(block, ImageBlock):
                    parts.append(_IMAGE_BLOCK)
                    images.append(load_image(block.resolve_image().read()))
                else:
                    raise ContentError(
                        f"{self.model_name} takes text and images, no {type(block).__name__}."
                    )
            turns.append({"role": message.role.value, "content": parts})
        inputs = self._prepare(turns, images)
        length = inputs["input_ids"].shape[1]
        if length + most > self.context_window:
            raise ContentError(
                f"{self.model_name}: a prompt of {length} tokens and an answer of {most} do not "
                f"fit in context_window={self.context_window}; send less, or shrink images "
                "with max_image_tokens."
            )
        device, dtype = self._model.device, self._model.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }


class _QwenInputs:
    """Inputs of the Qwen-VL families, without their processors."""

    def __init__(self, tokenizer: Any, template: str, rule: ImageRule) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.rule = rule
        self.image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def __call__(self, turns: list[dict[str, Any]], images: list[Image.Image]) -> Inputs:
        prompt = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        # The template has written all special tokens.
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        fitted = [resize(image, self.rule.size(*image.size)) for image in images]
        wide = torch.tensor(
            [expand(ids, self.image_id, [self.rule.n_tokens(*one.size) for one in fitted])]
        )
        inputs = {"input_ids": wide, "attention_mask": torch.ones_like(wide)}
        if fitted:
            cut = [to_patches(image, self.rule) for image in fitted]
            inputs["pixel_values"] = torch.cat([patches for patches, _ in cut])
            inputs["image_grid_thw"] = torch.tensor([grid for _, grid in cut])
            # Transformers 5 computes image positions from it.
            inputs["mm_token_type_ids"] = (wide == self.image_id).long()
        return inputs


def _processed(processor: Any, turns: list[dict[str, Any]], images: list[Image.Image]) -> Inputs:
    """Inputs by a checkpoint's own processor."""
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return dict(process(processor, [str(prompt)], [images]))


class _Run(StoppingCriteria):  # type: ignore[misc]
    """One answer, written by the model in a thread of its own."""

    def __init__(
        self, model: Any, tokenizer: Any, inputs: Inputs, most: int, stopped: threading.Event
    ) -> None:
        self.cut_off = False
        self._stopped = stopped
        self._error: Exception | None = None
        self._pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._thread = threading.Thread(
            target=self._write, args=(model, inputs, most), name="mmrag-llm", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        yield from (piece for piece in self._pieces if piece)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Asked by the model after each token whether to stop."""
        return torch.full((len(input_ids),), self._stopped.is_set(), device=input_ids.device)

    def stop(self) -> None:
        """End the thread, if it still writes."""
        self._stopped.set()
        self._thread.join()

    def _write(self, model: Any, inputs: Inputs, most: int) -> None:
        try:
            with torch.inference_mode():
                ids = model.generate(
                    **inputs,
                    max_new_tokens=most,
                    do_sample=False,
                    # Greedy; the three settings of sampling must be unset, or transformers warns
                    # about them.
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    streamer=self._pieces,
                    stopping_criteria=StoppingCriteriaList([self]),
                )
            new = ids[0, inputs["input_ids"].shape[1] :]
            # An answer may end by itself with the last token that was allowed.
            ends = model.generation_config.eos_token_id
            last = int(new[-1]) if len(new) else None
            self.cut_off = len(new) >= most and last not in (
                ends if isinstance(ends, list) else [ends]
            )
        except torch.OutOfMemoryError as error:
            self._error = ModelError(
                f"a prompt of {inputs['input_ids'].shape[1]} tokens does not fit in memory "
                f"({error}); lower max_image_tokens, or use a smaller dtype."
            )
        # An exception of this thread would only be printed; the reader raises it.
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
            self._error = ModelError(f"the model failed while writing ({error}).")
        finally:
            # Also after an error, or the reader would wait for ever.
            self._pieces.end()


def _reply(text: str, delta: str, reason: str | None = None) -> ChatResponse:
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=text),
        delta=delta,
        additional_kwargs={"finish_reason": reason} if reason else {},
    )


def _template(folder: Path, tokenizer: Any) -> str:
    """The chat template of a checkpoint, which some keep in a file of its own."""
    own = tokenizer.chat_template or read_json(folder / "chat_template.json").get("chat_template")
    if not isinstance(own, str):
        raise ModelError(f"{folder} has no chat template; use a chat model.")
    return own


def _window(model: Any) -> int:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(window, int):
        raise ModelError("config.json has no max_position_embeddings; pass context_window=.")
    return window
