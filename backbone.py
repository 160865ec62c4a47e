"""A frozen Hugging Face vision-language model, cut at one decoder layer: hooks, inputs, rows.

Everything here is about other people's models and nothing of the method; who edits one known model
needs a third of it. Copy this file with generator.py, router.py and liveedit.py.
B rows of a batch, T sequence, D hidden size.
"""

import contextlib
import inspect
import re
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

IGNORE = -100  # the label of tokens that are no answer, by Hugging Face's convention
CACHES = ("cache", "past_key_values", "layer_past")  # names of the KV cache, the newest first
PICTURES = ("pixel_values", "mm_encoder_outputs")  # names of what a call's pictures come as
NORMS = ("norm", "final_layer_norm", "embedding_norm")  # names of the norm behind the layers
# The models that are disabled here. Asyncio's tasks and threads inherit it from whoever imported
# this file; a plain thread does not (None), and follows the blocks that are open anywhere.
DISABLED: ContextVar[frozenset | None] = ContextVar("disabled", default=None)
DISABLED.set(frozenset())


# ------------------------------------------------------------------------------ the model's parts


def find_decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """Find the decoder layers of a Hugging Face vision-language model and the norm behind them.

    Raises TypeError with what was found if the model has none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not hasattr(decoder, "layers") and hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()  # BLIP-2's decoder is a whole causal language model
    parts = dict(decoder.named_children()) if decoder is not None else {}
    layers, norm = parts.get("layers"), first_of(parts, *NORMS)
    if not isinstance(layers, nn.ModuleList) or norm is None:
        found = f"its decoder ({type(decoder).__name__}) has no `layers` with a norm behind them"
        raise TypeError(f"{type(model).__name__} is no vision-language model to edit: {found}")
    return layers, norm


def device_of(module: nn.Module) -> torch.device:
    """Tell where a module computes; accelerate keeps the weights of offloaded ones elsewhere."""
    placed = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(placed) if placed is not None else next(module.parameters()).device


def hidden_of(output: Tensor | tuple) -> Tensor:
    """Take the hidden states (B, T, D) of a decoder layer's output, a tensor or a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Tensor | tuple, hidden: Tensor) -> Tensor | tuple:
    """Put other hidden states into a decoder layer's output."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def first_of(values: dict, *names: str):
    """Take the first of these arguments that was given."""
    return next((values[name] for name in names if values.get(name) is not None), None)


@contextlib.contextmanager
def plain_mode(device: torch.device):
    """Shield from global modes: no gradients, no inference tensors, no autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def fingerprint(model: nn.Module) -> Tensor:
    """Take some weights of the embedding and of each layer, (layers + 1, 16); see `same_model`."""
    weights = [model.get_input_embeddings().weight]
    for layer in find_decoder_layers(model)[0]:
        weights.append(next(p for p in layer.parameters() if p.dim() == 2))
    found = torch.full((len(weights), 16), torch.nan)  # what is quantised or offloaded is not read
    for i, weight in enumerate(weights):
        if type(weight.data) is Tensor and weight.is_floating_point() and not weight.is_meta:
            found[i, : len(weight)] = weight[:16, 0].detach().float()
    return found


def same_model(saved: Tensor, here: Tensor) -> bool:
    """Compare two fingerprints, of models that may be in another precision."""
    if saved.shape != here.shape:
        return False
    unread = (saved - here).isnan()
    return bool((unread | torch.isclose(saved, here, rtol=0.03, atol=1e-4)).all())


# ------------------------------------------------------------------------ states of the edit layer


class RowMasks(NamedTuple):
    """Which rows of the hidden states are what, each (B, T) bool."""

    image: Tensor
    prompt: Tensor
    answer: Tensor


class States(NamedTuple):
    """What the frozen lower layers make of a batch: all that editing and training need of it."""

    hidden: Tensor  # (B, T, D), the unedited output of the edit layer
    masks: RowMasks
    labels: Tensor  # (B, T), -100 outside of the answers
    # (args, kwargs) of each layer above, as the model passes them for this very batch: layers
    # differ in masks and position embeddings (Gemma 3).
    calls: tuple = ()


class _Stop(Exception):
    """Ends a call of the model when all that is needed has been seen."""


class FrozenModel:
    """A vision-language model cut at the edit layer: its hooks, the layers below, those above."""

    def __init__(self, model: nn.Module, layer: int):
        layers, self.norm = find_decoder_layers(model)
        self.model, self.layer = model, layer
        self.edit_layer, self.layers_above = layers[layer], layers[layer + 1 :]
        self._edit: Callable | None = None
        self._handles: list = []
        self._wanted: list[nn.Parameter] = []  # parameters that wanted gradients before attach
        # Arguments of a call of the model until its edit layer runs; each thread has its own.
        self._call: ContextVar[dict | None] = ContextVar("call", default=None)
        self._disabled_blocks = 0  # how many are open

    def __reduce__(self):
        remedy = "detach() the editor, and keep it by save_pretrained"
        raise RuntimeError(f"an editor, or a model with one, cannot be copied or pickled; {remedy}")

    def attach(self, edit: Callable) -> None:
        """Freeze the model and register the hooks, in the place of another editor's.

        edit(hidden, call, cache, decoding) is asked at each call of the edit layer for other hidden
        states, or None; call holds the arguments of the model's call, None if there was none.
        Raises RuntimeError if they are registered already.
        """
        if self._handles:
            raise RuntimeError("this editor is attached already; detach() it first")
        for hook in list(self.model._forward_pre_hooks.values()):
            if isinstance(other := getattr(hook, "__self__", None), FrozenModel):
                other.detach()
                warnings.warn("the editor that was attached here is detached", stacklevel=3)
        self._edit, model, layer = edit, self.model, self.edit_layer
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            # First of all hooks, so that those that record hidden states see the edited ones.
            layer.register_forward_hook(self._after_layer, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after_model, always_call=True),
        ]
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None:
            self._handles.append(head.register_forward_pre_hook(_dense_input))
        if hasattr(model.get_decoder(), "generate"):
            # BLIP-2's `generate` passes by the top-level forward and calls that of an inner model,
            # which sees embeddings only.
            self._handles.append(embeddings.register_forward_pre_hook(self._before_embedding))
        self._wanted = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)

    def detach(self) -> nn.Module:
        """Remove our hooks, and only ours, and unfreeze the model; returns it. Harmless twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._wanted:
            self._wanted.pop().requires_grad_(True)
        self._call.set(None)
        return self.model

    @contextlib.contextmanager
    def disabled(self):
        """Inside, the model is the original, exactly: for this block, and for plain threads."""
        before = DISABLED.get()
        DISABLED.set((before or frozenset()) | {self})
        self._disabled_blocks += 1
        try:
            yield self.model
        finally:
            self._disabled_blocks -= 1
            DISABLED.set(before)

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the arguments of the call: the decoder layers do not see input_ids."""
        if model is not self.model:
            remedy = "call the model itself, or detach() the editor before you copy"
            raise RuntimeError(f"this is a copy or replica of a model with an editor; {remedy}")
        names = inspect.signature(model.forward).parameters if args else []
        self._call.set(dict(zip(names, args, strict=False)) | kwargs)

    def _after_model(self, *_) -> None:
        """Leave nothing behind of a call that failed below the edit layer, but for an interrupt."""
        self._call.set(None)

    def _before_embedding(self, embedding: nn.Module, args: tuple) -> None:
        call = self._call.get() or {}
        if args and call.get("input_ids") is not args[0]:  # there is none, or one that failed
            self._call.set({"input_ids": args[0]})

    def _after_layer(self, layer: nn.Module, args: tuple, kwargs: dict, output):
        """Ask the editor for other hidden states."""
        call = self._call.get()
        self._call.set(None)
        hidden, cache = hidden_of(output), first_of(kwargs, *CACHES)
        ids = call and call.get("input_ids")
        if ids is not None and len(ids) < len(hidden):  # of beams
            call = call | {"input_ids": ids.repeat_interleave(len(hidden) // len(ids), 0)}
        # A cache's length includes this call: a longer one is decoding. Paged caches tell none.
        length = getattr(cache, "get_seq_length", None)
        decoding = length is not None and int(length()) > hidden.shape[1]
        known = DISABLED.get()
        if known is not None:
            disabled = self in known
        elif decoding:  # what a plain thread has begun goes on as it is
            disabled = getattr(cache, "liveedit_disabled", False)
        else:
            disabled = self._disabled_blocks > 0
        if disabled and decoding and getattr(cache, "liveedit_changed", False):
            raise RuntimeError("this KV cache was filled with edits; prefill it again")
        changed = None if disabled else self._edit(hidden, call, cache, decoding)
        if cache is not None and not decoding:
            cache.liveedit_disabled, cache.liveedit_changed = disabled, changed is not None
        return None if changed is None else with_hidden(output, changed)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (n,) as the model reads them before any layer, (n, D)."""
        embeddings = self.model.get_input_embeddings()
        embedded = embeddings(tokens.to(device_of(embeddings))).float().to(tokens.device)
        self._call.set(None)  # this was none
        return embedded

    def record(self, inputs: dict, above: bool) -> tuple[Tensor, list[tuple]]:
        """Stop behind the edit layer, or, with `above`, when each layer above is called.

        Returns (the edit layer's output, [(args, kwargs) of each layer above]).
        """
        if not self._handles:
            raise RuntimeError("this editor is detached; call attach() first")
        hidden, calls, thread = [], [], threading.get_ident()
        layers = self.layers_above if above else []

        def note(layer, args, kwargs, output=None):
            """Note the output of the edit layer, and what a layer above is called with."""
            if threading.get_ident() != thread:
                return
            if output is not None:
                hidden.append(hidden_of(output).clone())
            else:
                others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                calls.append((args[1:], others))
            if len(calls) == len(layers):
                raise _Stop

        with contextlib.suppress(_Stop), contextlib.ExitStack() as hooks:
            hook = self.edit_layer.register_forward_hook(note, prepend=True, with_kwargs=True)
            hooks.enter_context(hook)
            for layer in layers:
                hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
            self._logits(inputs)
        if not hidden or len(calls) != len(layers):
            raise RuntimeError(f"{type(self.model).__name__} did not call its layers once, in turn")
        return hidden[0], calls

    def _logits(self, inputs: dict) -> Tensor:
        """Call the original model for its logits (B, T, vocabulary), within a generation too."""
        left_out = ("labels", "use_cache", "cache_position", "logits_to_keep", *CACHES)
        inputs = {key: value for key, value in inputs.items() if key not in left_out}
        # Qwen-VL keeps what its last prefill found about positions for the decoding steps.
        kept = {m: m.rope_deltas for m in self.model.modules() if hasattr(m, "rope_deltas")}
        before = DISABLED.set((DISABLED.get() or frozenset()) | {self})
        try:
            with plain_mode(inputs["input_ids"].device):
                return self.model(**inputs, use_cache=False).logits
        finally:
            DISABLED.reset(before)
            for module, value in kept.items():
                module.rope_deltas = value

    def upper(self, hidden: Tensor, states: States) -> Tensor:
        """Run the layers above, norm and head: logits (tokens, vocabulary) at the answer tokens."""
        if len(states.calls) != len(self.layers_above):
            raise ValueError("states captured with above=False do not serve for training")
        for layer, (args, kwargs) in zip(self.layers_above, states.calls, strict=True):
            hidden = hidden_of(layer(hidden, *args, **kwargs))
        # The row before a token predicts it.
        predicting = hidden[:, :-1][states.masks.answer[:, 1:].to(hidden.device)]
        logits = self.model.get_output_embeddings()(self.norm(predicting))
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        if cap is not None:  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits.to(states.hidden.device).float()

    def check_replay(self, states: States, inputs: dict) -> None:
        """Compare the layers above, called one by one, with what the model makes of the inputs."""
        answers, logits = states.masks.answer[:, 1:], self._logits(inputs)[:, :-1]
        own = logits[answers.to(logits.device)].to(states.hidden.device)
        if not own.isfinite().all():
            name, remedy = type(self.model).__name__, "load it in bfloat16 or float32"
            raise RuntimeError(f"{name} gives logits that are not finite: {remedy}")
        tolerance = 1e-4 if own.dtype == torch.float32 else 1e-2
        with plain_mode(states.hidden.device):
            apart = (self.upper(states.hidden, states) - own).norm(dim=-1)
            if not (apart <= tolerance * own.float().norm(dim=-1)).all():
                name = f"edit layer {self.layer}: {type(self.model).__name__}"
                remedy = "choose a higher one; if that is refused too, none can be trained on it"
                raise RuntimeError(f"{name} does more above it than call its layers; {remedy}")


def _dense_input(head: nn.Module, args: tuple) -> tuple | None:
    """Copy the head's input (B, T, D), which is a slice where not all logits are wanted.

    PyTorch multiplies a slice with frozen weights row by row, and copies the whole head for each.
    """
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:]) if args else None


# ------------------------------------------------------------------------------- model inputs


class InputFormat:
    """Makes model inputs as the processor wants them, and tells which of their rows are what."""

    def __init__(self, model: nn.Module, processor, prompt_style: str):
        self.model, self.processor, self.prompt_style = model, processor, prompt_style
        self.image_token_id, self.tokenizer = model.config.image_token_id, None
        self._is_word = cache(self._is_word)  # few tokens, asked for at each prefill
        if processor is None:  # all inputs are made elsewhere
            return
        if not hasattr(processor, "tokenizer"):
            raise TypeError(f"the processor must be one of images and text, not {processor!r}")
        self.tokenizer = processor.tokenizer
        own = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        # The first stands for a picture in a text; Gemma 3's processor looks for another token.
        named = [getattr(processor, name, None) for name in ("boi_token", "image_token")]
        self.image_tokens = [str(token) for token in (*named, own) if token]

    def encode(self, images, prompts, targets=None, spare=0) -> dict:
        """Encode questions that all have an image or all have none; see `LiveEdit.encode`.

        spare: so many tokens more must fit into the model.
        """
        if self.tokenizer is None:
            raise RuntimeError("this editor has no processor: use edit_inputs and capture_inputs")
        # One list of pictures for each row: the form that all processors read alike.
        pictures = [[checked_picture(image)] for image in images if image is not None]
        if len(pictures) not in (0, len(prompts)):
            raise ValueError("encode questions with images and without in two calls, not in one")
        prompts = [self.checked_text(prompt, "prompt") for prompt in prompts]
        texts = [self._question_text(prompt, bool(pictures)) for prompt in prompts]
        settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            settings["add_special_tokens"] = False  # the template has put them
        if pictures:
            inputs = dict(self.processor(images=pictures, text=texts, **settings))
            if not (inputs["input_ids"] == self.image_token_id).any(1).all():
                name = type(self.processor).__name__
                raise ValueError(f"{name} finds no place for an image in {texts[0][:80]!r}")
            inputs.pop("labels", None)  # PaliGemma's, which mark nothing
        else:
            inputs = dict(self.tokenizer(texts, **settings))
        if targets is not None:
            targets = [self.checked_text(target, "target") for target in targets]
            inputs = self._append_targets(inputs, targets)
        length = inputs["input_ids"].shape[1] + spare
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most and length > most:
            raise ValueError(f"{length} tokens are too many for a model of {most} positions")
        device, dtype = device_of(self.model.get_input_embeddings()), self.model.dtype
        for key, value in inputs.items():
            inputs[key] = value.to(device, dtype if value.is_floating_point() else None)
        return inputs

    def checked_text(self, text: str, what: str) -> str:
        """Strip a prompt or target. Raises ValueError for what is no text, or none to read."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a {what} must be a text that is not empty, not {text!r}")
        text = text.strip()
        if what == "prompt":  # LLaVA's usual form marks the place of the picture
            text = text.removeprefix(f"{self.image_tokens[0]}\n").lstrip()
        if any(token in text for token in self.image_tokens):
            raise ValueError(f"the {what} {text[:40]!r} holds the image token; pass the picture")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the {what} {text[:40]!r} holds half a letter: a lone surrogate")
        return text

    def _question_text(self, question: str, has_image: bool) -> str:
        """Render a question up to its answer.

        By the chat template, or without one as `<image>\\n{question} The answer is:`.
        """
        if self.prompt_style == "chat" and getattr(self.processor, "chat_template", None):
            return self._rendered([question], has_image, add_generation_prompt=True)
        token = has_image and not self._processor_places_image_token
        end = " The answer is:" if self.prompt_style == "chat" else ""
        return f"{self.image_tokens[0]}\n" * token + question + end

    def _rendered(self, said: list[str], has_image: bool, **settings) -> str:
        """Apply the chat template to questions and answers in turn, the first with a picture.

        Raises ValueError if it does not show what is said.
        """
        turns = []
        for i, text in enumerate(said):
            parts = [{"type": "image"}] * (has_image and not i) + [{"type": "text", "text": text}]
            turns.append({"role": ("user", "assistant")[i % 2], "content": parts})
        with contextlib.suppress(Exception):  # of the template, which may raise anything
            text = self.processor.apply_chat_template(turns, **settings)
            if all(words in text for words in said) and "{'type'" not in text:
                return text
        told = f"the chat template does not render {said[-1]!r}: it must take a list of parts"
        raise ValueError(f"{told}; set processor.chat_template = None, or use edit_inputs")

    @cached_property
    def _processor_places_image_token(self) -> bool:
        """Some processors (BLIP-2, PaliGemma) put the image before any text, others do not."""
        pictures = [[Image.new("RGB", (64, 64))]]
        try:
            made = self.processor(images=pictures, text=["?"], return_tensors="pt")
        except (ValueError, IndexError):  # it found no place for the image
            return False
        return self.has_image(made["input_ids"])

    def _append_targets(self, inputs: dict, targets: list[str]) -> dict:
        """Put the targets' tokens behind the prompts, padded on the right, and labels on them."""
        ids = inputs["input_ids"]
        rows = list(map(self._target_tokens, targets, ids[:, -1].tolist()))
        length = max(map(len, rows))
        labels = torch.tensor([row + [IGNORE] * (length - len(row)) for row in rows])
        present = labels != IGNORE
        tail = {"input_ids": labels.masked_fill(~present, self.tokenizer.pad_token_id)}
        tail |= {"attention_mask": present.long(), "labels": labels}
        if "token_type_ids" in inputs:
            # Where 1 marks image tokens (Gemma 3), an answer is text: 0. Where a prompt has no
            # marks (PaliGemma), 1 tells the answer from it.
            marks_images = inputs["token_type_ids"][ids == self.image_token_id].any()
            tail["token_type_ids"] = present.long() * ~marks_images
        joined = inputs | {"labels": torch.full_like(ids, IGNORE)}
        for key, value in joined.items():
            if value.shape[:2] == ids.shape:  # what else is said of the last token goes on
                last = value[:, -1:].expand(-1, length, *value.shape[2:])
                joined[key] = torch.cat([value, tail.get(key, last).to(value.dtype)], 1)
        return joined

    def _target_tokens(self, target: str, last: int) -> list[int]:
        """Tokenise a target as it stands behind a prompt, with the token that ends an answer.

        Behind "ASSISTANT:" a space comes first, behind "assistant\\n" or a special token none.
        Alone it may have other tokens: Llama's tokenizer puts a space before whatever comes first.
        """
        said = self.tokenizer.decode([last], skip_special_tokens=True)
        before, text = (":", " " + target) if said[-1:].strip() else ("\n", target)
        both = self.tokenizer([before, before + text], add_special_tokens=False).input_ids
        tokens = both[1][len(both[0]) :]
        if not tokens:
            raise ValueError(f"the target {target!r} has no token in the model's vocabulary")
        return [*tokens, self._end_token]

    @cached_property
    def _end_token(self) -> int:
        """The token that ends an answer: one at which `generate` stops."""
        own, config = self.tokenizer.eos_token_id, getattr(self.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [own if ends is None else ends]
        # An end that begins texts is a leftover of another tokenizer.
        return own if own in ends or ends[0] == self.tokenizer.bos_token_id else ends[0]

    # -------------------------------------------------------------------- which rows are what

    def has_image(self, ids: Tensor) -> bool:
        """Tell whether any row of input_ids (B, T) has an image token."""
        return bool((ids == self.image_token_id).any())

    def asked_alone(self, inputs: dict) -> tuple[dict, RowMasks]:
        """Leave out all of a chat but its last question and the picture that it is about.

        Differs from the paper, whose prompts are single questions: the last one of a chat is routed
        as if it were asked alone, about the last picture before it. Returns the inputs, themselves
        where nothing is left out, with their image, prompt and answer rows.
        """
        ids, attended, labels = self.per_token(inputs)
        shown, masks = self.last_question(inputs)
        if inputs.get("inputs_embeds") is not None or torch.equal(shown, attended):
            return inputs, masks
        # Earlier pictures stay, in front and unseen: what the model reads of them comes in order.
        image, rows = ids == self.image_token_id, torch.arange(len(ids), device=ids.device)[:, None]
        place = torch.where(image, 0, 2).masked_fill(shown, 1)
        order = place.argsort(dim=1, stable=True)
        alone = {}
        for key, value in inputs.items():
            per_token = isinstance(value, Tensor) and value.shape[:2] == ids.shape
            alone[key] = value[rows, order] if per_token else value
        alone["attention_mask"] = shown[rows, order].long()
        alone.pop("position_ids", None)  # they are of the whole chat
        alone["labels"] = labels.masked_fill(~shown, IGNORE)[rows, order]
        make = getattr(getattr(self.model, "model", None), "get_rope_index", None)
        if make is not None and (image & ~shown).any():
            # Qwen-VL would count the unseen pictures; so the question keeps its place behind them.
            known = {k: v for k, v in inputs.items() if k in inspect.signature(make).parameters}
            alone["position_ids"] = make(**known)[0][:, rows, order]
        masks = masks._replace(answer=masks.answer & shown)
        return alone, RowMasks(*(mask[rows, order] for mask in masks))

    def per_token(self, inputs: dict) -> tuple[Tensor, Tensor, Tensor]:
        """Give input_ids, which of them are attended to, and labels, each (B, T)."""
        ids, mask, labels = (inputs.get(k) for k in ("input_ids", "attention_mask", "labels"))
        if isinstance(mask, dict):  # one for each kind of layer
            mask = first_of(mask, *mask)
        if mask is None:
            mask = torch.ones_like(ids)
        elif mask.dim() == 4:  # prepared for a static cache
            own = mask[:, 0, :, : ids.shape[1]].diagonal(dim1=-2, dim2=-1)
            mask = own if own.dtype == torch.bool else own == 0
        if labels is None:
            labels = torch.full_like(ids, IGNORE)
        # With logits_to_keep they are those of the last tokens.
        return ids, mask.bool(), F.pad(labels, (ids.shape[1] - labels.shape[1], 0), value=IGNORE)

    def last_question(self, inputs: dict) -> tuple[Tensor, RowMasks]:
        """Mark what asks the last question of a chat (B, T), and find the rows of that question.

        Raises RuntimeError where nothing tells the prompt from what was generated.
        """
        ids, attended, labels = self.per_token(inputs)
        answer = labels != IGNORE
        rows = zip(ids.tolist(), attended.tolist(), answer.tolist(), strict=True)
        marks = torch.tensor([self._last_question_of(*row) for row in rows], dtype=torch.bool)
        shown, image, prompt, reply = marks.to(ids.device).unbind(1)
        no_cache = inputs.get("use_cache") is False and inputs.get("labels") is None
        if no_cache and not reply.any(1).all():
            reason = "without a KV cache and a chat template, what was generated looks like prompt"
            raise RuntimeError(f"{reason}: generate with the cache, or pass labels")
        return shown, RowMasks(image, prompt, answer)

    def _last_question_of(
        self, ids: list[int], attended: list[bool], answer: list[bool]
    ) -> list[list[bool]]:
        """Mark the tokens of a row that ask the last question, its image, prompt, and reply.

        Asking are the chat's first tokens, the last picture, and the last turn. Prompt is what
        stands behind the image, or, where that follows the question or there is none, all but the
        leading special tokens, up to where the reply has been opened.
        """
        (head, question, opening), end = self._openings, len(ids)
        seen = [t for t in range(end) if attended[t]]
        words = {t for t in seen if self._is_word(ids[t])}
        images = [t for t in seen if ids[t] == self.image_token_id]
        asked = [ids[t] if attended[t] and not answer[t] else IGNORE for t in range(end)]
        openings = _starts_of(opening, asked)  # no answer opens a turn
        first = min(openings, default=end)
        turns = [t + len(question) for t in _starts_of(question, asked) if t > first]
        turn = max([t for t in turns if t < end], default=0)  # where the last one begins
        reply = min([t for t in openings if t >= turn], default=end)

        last = max(images, default=-1)
        # Tiles and rows of one picture have no words between them.
        picture = max([t for t in words if t < last], default=-1) + 1
        behind = min([t for t in words if t > last], default=end)
        shown = set(seen)
        if images and self.tokenizer is not None and (turn or images[0] < picture):
            asks = any(behind <= t < reply and not answer[t] for t in words)
            own = max(turn, behind if asks else 0)  # where the question's own words begin
            shown = {t for t in seen if t >= own or picture <= t < behind}
            for t, token in zip(seen, head, strict=False):
                if ids[t] != token:
                    break  # so far the chat begins like the template's
                shown.add(t)

        image = shown.intersection(images)
        text = {t for t in shown - image if not answer[t] and t < reply + len(opening)}
        prompt = {t for t in text if image and t > min(image)}
        if not any(t < reply for t in prompt & words):
            prompt = {t for t in text if words and t >= min(words)}
        replied = range(reply, end)
        return [[t in marked for t in range(end)] for marked in (shown, image, prompt, replied)]

    def _is_word(self, token: int) -> bool:
        """Tell whether a token is neither special, nor white space, nor image."""
        if self.tokenizer is None:
            text = self.model.config.get_text_config()
            return token not in (text.bos_token_id, text.pad_token_id, self.image_token_id)
        said = self.tokenizer.decode([token], skip_special_tokens=True).strip()
        return bool(said) and token != self.image_token_id

    @cached_property
    def _openings(self) -> tuple[list[int], list[int], list[int]]:
        """The tokens that open a chat, a later question, and an answer; none if unknown."""
        if self.tokenizer is None:
            return [], [], []
        begin = self.tokenizer("").input_ids
        with contextlib.suppress(ValueError):  # of a template that renders no chat
            chat = self._rendered(["first", "second", "third"], has_image=False)
            encoded = self.tokenizer(chat, add_special_tokens=False)
            between = re.match(r"(.*?)\s*first\s*(.*?)\s*second\s*(.*?)\s*third", chat, re.DOTALL)
            found = []
            for start, end in map(between.span, (1, 2, 3)):
                first, last = (encoded.char_to_token(i) for i in (start, end - 1))
                found.append(encoded.input_ids[first : last + 1] if start < end else [])
            head, opening, question = found
            return head if head[:1] == begin else begin + head, question, opening
        return begin, [], []


def _starts_of(part: list[int], ids: list[int]) -> list[int]:
    """Find where these tokens stand one behind the other, by the first of them."""
    return [t for t in range(len(ids)) if part and ids[t : t + len(part)] == part]


def checked_picture(image: Image.Image) -> Image.Image:
    """Take a picture as it is, also from a list of one.

    Raises TypeError or ValueError for what is no picture, or cannot be read.
    """
    if isinstance(image, (list, tuple)) and len(image) == 1:
        image = image[0]
    if not isinstance(image, Image.Image) or not all(image.size):
        raise TypeError(f"an image must be a PIL image with pixels, not {image!r:.60}")
    try:
        image.load()
    except Exception as error:  # PIL reads a file's pixels only now; its readers raise all kinds
        name = getattr(image, "filename", "") or repr(image)
        raise ValueError(f"the image {name} cannot be read, or is closed: {error!r}") from None
    return image
