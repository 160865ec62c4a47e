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
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

IGNORE = -100  # the label of tokens that are no answer, by Hugging Face's convention
CACHES = ("cache", "past_key_values", "layer_past")  # names of the KV cache, the newest first
PICTURES = ("pixel_values", "mm_encoder_outputs")  # names of what a call's pictures come as
# Arguments of a call of the model that a run of the lower layers does without.
NOT_OF_STATES = {"labels", "use_cache", "cache_position", "logits_to_keep", "return_dict"}
NOT_OF_STATES |= {"output_hidden_states", "output_attentions", *CACHES}


# ------------------------------------------------------------------------------ the model's parts


def find_decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """Find the decoder layers of a Hugging Face vision-language model and the norm behind them.

    Raises TypeError with what was found if the model has none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not hasattr(decoder, "layers") and hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()  # BLIP-2's decoder is a whole causal language model
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    if norm is None and isinstance(layers, nn.ModuleList):  # OPT and LFM2 name it otherwise
        norms = [part for part in decoder.children() if type(part).__name__.endswith("Norm")]
        norm = norms[0] if len(norms) == 1 else None
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


def arguments_of(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Name the positional arguments of a call."""
    names = list(inspect.signature(module.forward).parameters) if args else []
    return dict(zip(names, args, strict=False)) | kwargs


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
    apart = (saved - here).nan_to_num().norm(dim=1)
    return bool((apart <= 0.03 * saved.nan_to_num().norm(dim=1)).all())


# ------------------------------------------------------------------------ states of the edit layer


class RowMasks(NamedTuple):
    """Which rows of the hidden states are what, each (B, T) bool."""

    image: Tensor
    prompt: Tensor
    answer: Tensor


def row_masks(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    image_token_id: int,
    special_ids: Tensor,
    asks: Tensor | None = None,
) -> RowMasks:
    """Find the image, prompt and answer rows of input_ids (B, T).

    Answer rows are those whose label is not -100. Prompt rows are the other tokens behind the first
    image, or, where none of them asks (B, T), all text tokens but the leading special ones.
    """
    attended = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        attended = attention_mask.bool()
    image = (input_ids == image_token_id) & attended
    answer = torch.zeros_like(image) if labels is None else labels != IGNORE
    text = attended & ~image & ~answer
    behind = text & (image.cumsum(1) > 0)
    leading = (torch.isin(input_ids, special_ids) | ~attended).cumprod(1).bool()
    asking = behind if asks is None else behind & asks
    prompt = torch.where(asking.any(1, keepdim=True), behind, text & ~leading)
    return RowMasks(image, prompt, answer)


class States(NamedTuple):
    """What the frozen lower layers make of a batch: all that editing and training need of it."""

    hidden: Tensor  # (B, T, D), the unedited output of the edit layer
    masks: RowMasks
    labels: Tensor  # (B, T), -100 outside of the answers
    # (args, kwargs) of each layer above, as the model passes them for this very batch: layers
    # differ in masks and position embeddings (Gemma 3).
    calls: tuple = ()
    alone: "States | None" = None  # of the last question asked alone, where these are of a chat


class _Stop(Exception):
    """Ends a call of the model when all that is needed has been seen."""


class _Noted(threading.local):
    """What one thread's call of the model has shown so far: several may call it at once."""

    call: dict | None = None  # its arguments, until the edit layer runs
    embedded: Tensor | None = None  # the input_ids embedded last (BLIP-2's generate)
    is_ours: bool = False  # a call that records states, not one to be edited


class FrozenModel:
    """A vision-language model cut at the edit layer: its hooks, the layers below, those above."""

    def __init__(self, model: nn.Module, layer: int):
        layers, self.norm = find_decoder_layers(model)
        self.model, self.layer = model, layer
        self.edit_layer, self.layers_above = layers[layer], layers[layer + 1 :]
        self._edit: Callable | None = None
        self._handles: list = []
        self._wanted: list[nn.Parameter] = []  # parameters that wanted gradients before attach
        self._noted = _Noted()
        # Is this asyncio task, or the one that started this thread by asyncio, within `disabled()`?
        # A plain thread does not know (None), and follows the blocks that are open anywhere.
        self._disabled: ContextVar[bool | None] = ContextVar("disabled", default=None)
        self._disabled_blocks = 0

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
        if self._disabled.get() is None:
            self._disabled.set(False)
        self._edit, head = edit, self.model.get_output_embeddings()
        self._handles = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            # First of all hooks, so that those that record hidden states see the edited ones.
            self.edit_layer.register_forward_hook(
                self._after_layer, prepend=True, with_kwargs=True
            ),
            self.model.register_forward_hook(self._after_model, always_call=True),
        ]
        if head is not None:
            self._handles.append(head.register_forward_pre_hook(_dense_input))
        if hasattr(self.model.get_decoder(), "generate"):
            # BLIP-2's `generate` passes by the top-level forward and calls that of an inner model,
            # which sees embeddings only.
            embeddings = self.model.get_input_embeddings()
            self._handles.append(embeddings.register_forward_pre_hook(self._before_embedding))
        self._wanted = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)

    def detach(self) -> nn.Module:
        """Remove our hooks, and only ours, and unfreeze the model; returns it. Harmless twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._wanted:
            self._wanted.pop().requires_grad_(True)
        self._noted = _Noted()
        return self.model

    @contextlib.contextmanager
    def disabled(self):
        """Inside, the model is the original, exactly: for this block, and for plain threads."""
        before = self._disabled.get()
        self._disabled.set(True)
        self._disabled_blocks += 1
        try:
            yield self.model
        finally:
            self._disabled_blocks -= 1
            self._disabled.set(before)

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the arguments of the call: the decoder layers do not see input_ids."""
        if model is not self.model:
            remedy = "call the model itself, or detach() the editor before you copy"
            raise RuntimeError(f"this is a copy or replica of a model with an editor; {remedy}")
        self._noted.call = arguments_of(model, args, kwargs)

    def _after_model(self, *_) -> None:
        """Leave nothing behind of a call that failed below the edit layer."""
        self._noted.call = self._noted.embedded = None

    def _before_embedding(self, embedding: nn.Module, args: tuple) -> None:
        self._noted.embedded = args[0] if args else None

    def _after_layer(self, layer: nn.Module, args: tuple, kwargs: dict, output):
        """Ask the editor for other hidden states."""
        call, ids = self._noted.call, self._noted.embedded
        self._noted.call = self._noted.embedded = None
        hidden, cache = hidden_of(output), first_of(kwargs, *CACHES)
        if call is None and ids is not None and ids.shape[1] == hidden.shape[1]:
            call = {"input_ids": ids.repeat_interleave(len(hidden) // len(ids), 0)}  # of beams
        # A cache's length includes this call: a longer one is decoding. Paged caches tell none.
        length = getattr(cache, "get_seq_length", None)
        decoding = length is not None and int(length()) > hidden.shape[1]
        disabled = self._disabled.get()
        if disabled is None and decoding:  # what a plain thread has begun goes on as it is
            disabled = getattr(cache, "liveedit_disabled", False)
        elif disabled is None:
            disabled = self._disabled_blocks > 0
        if cache is not None and not decoding:
            cache.liveedit_disabled = disabled
        if disabled or self._noted.is_ours:
            return None
        changed = self._edit(hidden, call, cache, decoding)
        return None if changed is None else with_hidden(output, changed)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens (n,) as the model reads them before any layer, (n, D)."""
        embeddings = self.model.get_input_embeddings()
        embedded = embeddings(tokens.to(device_of(embeddings))).float().to(tokens.device)
        self._noted.embedded = None  # this was no call of the model
        return embedded

    def record(self, inputs: dict, above: bool) -> tuple[Tensor, list[tuple]]:
        """Stop behind the edit layer, or, with `above`, when each layer above is called.

        Returns (the edit layer's output, [(args, kwargs) of each layer above]).
        """
        if not self._handles:
            raise RuntimeError("this editor is detached; call attach() first")
        hidden, calls, thread = [], [], threading.get_ident()
        layers = self.layers_above if above else []
        last = [self.edit_layer, *layers][-1]

        def after_edit_layer(layer, args, output):
            if threading.get_ident() == thread:
                hidden.append(hidden_of(output).clone())
                if layer is last:
                    raise _Stop

        def before_layer_above(layer, args, kwargs):
            if threading.get_ident() == thread:
                others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                calls.append((args[1:], others))
                if layer is last:
                    raise _Stop

        with contextlib.suppress(_Stop), contextlib.ExitStack() as hooks:
            hook = self.edit_layer.register_forward_hook(after_edit_layer, prepend=True)
            hooks.enter_context(hook)
            for layer in layers:
                hook = layer.register_forward_pre_hook(before_layer_above, with_kwargs=True)
                hooks.enter_context(hook)
            self._logits(inputs)
        if not hidden or len(calls) != len(layers):
            raise RuntimeError(f"{type(self.model).__name__} did not call its layers once, in turn")
        return hidden[0], calls

    def _logits(self, inputs: dict) -> Tensor:
        """Call the original model for its logits (B, T, vocabulary), within a generation too."""
        inputs = {key: value for key, value in inputs.items() if key not in NOT_OF_STATES}
        # Qwen-VL keeps what its last prefill found about positions for the decoding steps.
        kept = {m: m.rope_deltas for m in self.model.modules() if hasattr(m, "rope_deltas")}
        self._noted.is_ours = True
        try:
            with plain_mode(inputs["input_ids"].device):
                return self.model(**inputs, use_cache=False).logits
        finally:
            self._noted.is_ours = False
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
        if processor is None:  # all inputs are made elsewhere
            return
        if not hasattr(processor, "tokenizer"):
            raise TypeError(f"the processor must be one of images and text, not {processor!r}")
        self.tokenizer = processor.tokenizer
        own = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        named = getattr(processor, "image_token", None) or own
        # What stands for a picture in a text; Gemma 3's processor looks for another token.
        self.image_token = str(getattr(processor, "boi_token", None) or named)
        self.image_tokens = {self.image_token, str(named), str(own or named)}

    def encode(
        self,
        images: Sequence,
        prompts: Sequence,
        targets: Sequence | None,
        before: Sequence | None = None,
        spare: int = 0,
    ) -> dict:
        """Encode questions that all have an image or all have none; see `LiveEdit.encode`.

        before: for each question, the (image, prompt, answer) said before it in the same chat.
        spare: so many tokens more must fit into the model.
        """
        if self.tokenizer is None:
            raise RuntimeError("this editor has no processor: use edit_inputs and capture_inputs")
        texts, pictures, before = [], [], before or [()] * len(prompts)
        for image, prompt, turns in zip(images, prompts, before, strict=True):
            said, shown = [], []
            for picture, text, answer in (*turns, (image, prompt, None)):
                said.append((self.checked_text(text, "prompt"), picture is not None))
                if picture is not None:
                    shown.append(checked_picture(picture))
                if answer is not None:
                    said.append((self.checked_text(answer, "answer"), False))
            texts.append(self._chat_text(said))
            pictures.append(shown)
        if len({bool(shown) for shown in pictures}) > 1:
            raise ValueError("encode questions with images and without in two calls, not in one")
        settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            settings["add_special_tokens"] = False  # the template has put them
        if pictures[0]:
            # One list of pictures for each row: the form that all processors read alike.
            inputs = dict(self.processor(images=pictures, text=texts, **settings))
            if not (inputs["input_ids"] == self.image_token_id).any(1).all():
                name = type(self.processor).__name__
                raise ValueError(f"{name} finds no place for an image in {texts[0][:80]!r}")
        else:
            inputs = dict(self.tokenizer(texts, **settings))
        if targets is not None:
            targets = [self.checked_text(target, "target") for target in targets]
            inputs = self._append_targets(inputs, texts, targets)
        length = inputs["input_ids"].shape[1] + spare
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most and length > most:
            longest = max(prompts, key=len)[:40]
            raise ValueError(f"{length} tokens are too many for {most} positions: {longest!r}...")
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
            text = text.removeprefix(f"{self.image_token}\n").lstrip()
        if any(token in text for token in self.image_tokens):
            raise ValueError(f"the {what} {text[:40]!r} holds the image token; pass the picture")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the {what} {text[:40]!r} holds half a letter: a lone surrogate")
        return text

    def _chat_text(self, said: list[tuple[str, bool]]) -> str:
        """Render questions and answers in turn, each with a picture or not, up to an answer.

        By the chat template, or, a single question, as `<image>\\n{question} The answer is:`.
        """
        if self.prompt_style == "chat" and getattr(self.processor, "chat_template", None):
            text = self._rendered(said, add_generation_prompt=True)
            if text is None:
                remedy = "set processor.chat_template = None, or use edit_inputs"
                raise ValueError(f"the chat template does not render {said[-1][0]!r}; {remedy}")
            return text
        if len(said) > 1:
            raise ValueError("without a chat template there are single questions only")
        question, has_image = said[0]
        token = has_image and not self._processor_places_image_token
        end = " The answer is:" if self.prompt_style == "chat" else ""
        return f"{self.image_token}\n" * token + question + end

    def _rendered(self, said: list[tuple[str, bool]], **settings) -> str | None:
        """Apply the chat template; None if it does not show what is said."""
        for as_parts in (True, False):  # most templates take a list of parts, old ones a string
            turns = []
            for i, (text, has_image) in enumerate(said):
                parts = [{"type": "image"}] * has_image + [{"type": "text", "text": text}]
                content = parts if as_parts else f"{self.image_token}\n" * has_image + text
                turns.append({"role": ("user", "assistant")[i % 2], "content": content})
            with contextlib.suppress(Exception):  # of the template: it did not expect this form
                rendered = rest = self.processor.apply_chat_template(turns, **settings)
                for text, _ in said:
                    rest = rest.replace(text, "")
                shown = all(text in rendered for text, _ in said)
                if shown and "'type'" not in rest:  # not the list of parts as it prints
                    return rendered
        return None

    @cached_property
    def _processor_places_image_token(self) -> bool:
        """Some processors (BLIP-2, PaliGemma) put the image before any text, others do not."""
        picture = Image.new("RGB", (64, 64))
        try:
            made = self.processor(images=[[picture]], text=["?"], return_tensors="pt")
        except (ValueError, IndexError):  # it found no place for the image
            return False
        return bool((made["input_ids"] == self.image_token_id).any())

    def _append_targets(self, inputs: dict, texts: list[str], targets: list[str]) -> dict:
        """Put the targets' tokens behind the prompts, padded on the right, and labels on them."""
        ids, rows = inputs["input_ids"], []
        for target, text, prompt in zip(targets, texts, ids, strict=True):
            rows.append(self._target_tokens(target, text, int(prompt[-1])))
        length = max(map(len, rows))
        labels = torch.tensor([row + [IGNORE] * (length - len(row)) for row in rows])
        present = labels != IGNORE
        tail = {"input_ids": labels.masked_fill(~present, self.tokenizer.pad_token_id)}
        tail["attention_mask"] = present.long()
        if "token_type_ids" in inputs:
            # Where 1 marks image tokens (Gemma 3), an answer is text: 0. Where a prompt has no
            # marks (PaliGemma), 1 tells the answer from it.
            marks_images = inputs["token_type_ids"][ids == self.image_token_id].any()
            tail["token_type_ids"] = present.long() * ~marks_images
        joined = inputs | {"labels": torch.cat([torch.full_like(ids, IGNORE), labels], 1)}
        for key, value in inputs.items():
            if value.shape == ids.shape:
                behind = tail.get(key, torch.zeros_like(labels)).to(value.dtype)
            elif value.shape[:2] == ids.shape:  # which pictures a token sees (Mllama)
                behind = value[:, -1:].expand(-1, length, *value.shape[2:])
            else:
                continue
            joined[key] = torch.cat([value, behind], 1)
        return joined

    def _target_tokens(self, target: str, prompt_text: str, last: int) -> list[int]:
        """Tokenise a target as it stands behind its prompt, with the token that ends an answer.

        Behind "ASSISTANT:" a space comes first, behind "assistant\\n" or a special token none.
        """
        ending = prompt_text[-1:] + self.tokenizer.decode([last])[-1:]
        opens = last in self._special_ids or any(map(str.isspace, ending))
        before, text = ("\n", target) if opens else (":", " " + target)
        tokens = self._tokens_behind(before, text)
        if not tokens:
            raise ValueError(f"the target {target!r} has no token in the model's vocabulary")
        return [*tokens, self._end_token]

    def _tokens_behind(self, before: str, text: str) -> list[int]:
        """Tokenise a text as it stands behind another.

        Alone it may have other tokens: Llama's tokenizer puts a space before whatever comes first.
        """
        head = self.tokenizer(before, add_special_tokens=False).input_ids
        tokens = self.tokenizer(before + text, add_special_tokens=False).input_ids
        if tokens[: len(head)] == head:
            return tokens[len(head) :]
        return self.tokenizer(text, add_special_tokens=False).input_ids

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

    def masks_of(self, inputs: dict, device: torch.device) -> RowMasks:
        """Find the image, prompt and answer rows: of a chat, those of its last question.

        What follows the opening of the last answer is no prompt, whether or not labels mark it.
        Raises RuntimeError where nothing tells the prompt from what was generated.
        """
        ids, mask, labels = self._per_token(inputs)
        rows, column = _unanswered(ids, labels), torch.arange(ids.shape[1], device=ids.device)
        asked = torch.tensor([self._last_question(tokens) for tokens in rows], device=ids.device)
        opens = torch.tensor([self._answer_opens(tokens) for tokens in rows], device=ids.device)
        if labels is None and inputs.get("use_cache") is False and (opens > ids.shape[1]).any():
            reason = "without a KV cache and a chat template, what was generated looks like prompt"
            raise RuntimeError(f"{reason}: generate with the cache, or pass labels")
        said = column >= opens[:, None] + len(self._openings[2])
        special = torch.tensor(sorted(self._special_ids), device=ids.device)
        shown = asked if mask is None else asked & mask.bool()
        in_question = column < opens[:, None]
        masks = row_masks(ids, shown, labels, self.image_token_id, special, in_question)
        found = masks.image, masks.prompt & ~said, masks.answer
        return RowMasks(*(mask.to(device) for mask in found))

    def _per_token(self, inputs: dict) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Give input_ids, attention mask and labels, each (B, T)."""
        ids, mask, labels = (inputs.get(k) for k in ("input_ids", "attention_mask", "labels"))
        if isinstance(mask, dict):  # one for each kind of layer
            mask = first_of(mask, *mask)
        if isinstance(mask, Tensor) and mask.dim() == 4:  # prepared for a static cache
            own = mask[:, 0, :, : ids.shape[1]].diagonal(dim1=-2, dim2=-1)
            mask = own if own.dtype == torch.bool else own == 0
        if labels is not None:  # with logits_to_keep they are those of the last tokens
            labels = F.pad(labels, (ids.shape[1] - labels.shape[1], 0), value=IGNORE)
        return ids, mask, labels

    @cached_property
    def _special_ids(self) -> set[int]:
        text = self.model.config.get_text_config()
        if self.tokenizer is None:
            ends = text.eos_token_id
            ids = [text.bos_token_id, text.pad_token_id, *(ends if type(ends) is list else [ends])]
        else:
            added = self.tokenizer.added_tokens_decoder.items()
            ids = [*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)]
        return {i for i in ids if isinstance(i, int)}

    def asked_alone(self, inputs: dict) -> dict:
        """Leave out all of a chat but its last question and the picture that it is about.

        Differs from the paper, whose prompts are single questions: the last one of a chat is routed
        as if it were asked alone, about the last picture before it. Returns the inputs themselves
        where nothing is left out.
        """
        ids, mask, labels = self._per_token(inputs)
        if self.tokenizer is None or inputs.get("inputs_embeds") is not None:
            return inputs
        kept = [self._last_question(tokens) for tokens in _unanswered(ids, labels)]
        kept = torch.tensor(kept, device=ids.device)
        if kept.all():
            return inputs
        shown = kept if mask is None else kept & mask.bool()
        # Earlier pictures stay, in front and unseen: what the model reads of them comes in order.
        earlier = torch.isin(ids, torch.tensor(self._picture_ids, device=ids.device)) & ~shown
        order = torch.where(earlier, 0, 2).masked_fill(shown, 1).argsort(dim=1, stable=True)
        shown, earlier = shown.gather(1, order), earlier.gather(1, order)
        alone = {}
        for key, value in inputs.items():
            if isinstance(value, Tensor) and value.shape[:2] == ids.shape:
                index = order.reshape(order.shape + (1,) * (value.dim() - 2))
                value = value.gather(1, index.expand(value.shape))
            if key != "position_ids":  # they are of the whole chat
                alone[key] = value
        alone["attention_mask"] = shown.long()
        unseen, padding = ~shown & ~earlier, self.tokenizer.pad_token_id
        alone["input_ids"] = alone["input_ids"].masked_fill(unseen, padding)
        if labels is not None:
            alone["labels"] = labels.gather(1, order).masked_fill(~shown, IGNORE)
        make = getattr(getattr(self.model, "model", None), "get_rope_index", None)
        if make is not None and earlier.any():  # Qwen-VL would count the unseen pictures
            known = {k: v for k, v in inputs.items() if k in inspect.signature(make).parameters}
            positions = make(**known)[0]
            alone["position_ids"] = positions.gather(-1, order.expand_as(positions))
        return alone

    @cached_property
    def _picture_ids(self) -> list[int]:
        """The tokens that stand for pictures and videos."""
        video = getattr(self.model.config, "video_token_id", None)
        return [self.image_token_id] if video is None else [self.image_token_id, video]

    def _last_question(self, tokens: list[int]) -> list[bool]:
        """Mark what asks the last question of a chat: how a chat begins, a picture, the question.

        Of several pictures it is the last one before the question; the rest is context.
        """
        pictures = {i for i, token in enumerate(tokens) if token in self._picture_ids}
        if not pictures or self.tokenizer is None:
            return [True] * len(tokens)
        turn, opening = self._turns(tokens)[-1], self._openings[0]
        begin = end = max(pictures)  # tiles and rows of one picture have only layout between them
        while begin and (begin - 1 in pictures or self._is_layout(tokens[begin - 1])):
            begin -= 1
        while end + 1 < len(tokens) and self._is_layout(tokens[end + 1]):
            end += 1
        asked = turn + len(self._openings[1]) * (turn > 0)
        if end + 1 >= min(self._answer_opens(tokens), len(tokens)):  # the question stands before it
            begin = min(begin, asked)
        elif begin >= turn:
            asked = end + 1
        if not turn and begin <= min(pictures):  # one question, one picture
            return [True] * len(tokens)
        start = next(i for i, t in enumerate(tokens) if t != self.tokenizer.pad_token_id)
        head = start
        while tokens[head] in self._special_ids and head not in pictures:
            head += 1
        if tokens[start : start + len(opening)] == opening:
            head = max(head, start + len(opening))
        return [start <= i < head or begin <= i <= end or asked <= i for i in range(len(tokens))]

    def _is_layout(self, token: int) -> bool:
        """Is a token special, or white space: no word of the question?"""
        return token in self._special_ids or not self.tokenizer.decode([token]).strip()

    def _turns(self, tokens: list[int]) -> list[int]:
        """Find where the turns of a chat begin: at questions that follow an answer."""
        _, asked, answered = (_find(tokens, opening) for opening in self._openings)
        return [0, *(start for start in asked if answered and start > answered[0])]

    def _answer_opens(self, tokens: list[int]) -> int:
        """Find where the answer of the last turn is opened; beyond the end if nothing does."""
        last = self._turns(tokens)[-1]
        opens = (i for i in _find(tokens, self._openings[2]) if i >= last)
        return next(opens, len(tokens) + 1)

    @cached_property
    def _openings(self) -> tuple[list[int], list[int], list[int]]:
        """The tokens that open a chat, a later question, and an answer; none if unknown."""
        chat = None
        if self.tokenizer is not None and self.prompt_style == "chat":
            chat = self._rendered([(word, False) for word in ("first", "second", "third")])
        if chat is None:
            return [], [], []
        opening, answer, question, _ = re.split("first|second|third", chat, maxsplit=3)
        has_bos = opening.startswith(self.tokenizer.bos_token or "\0")
        ids = self.tokenizer(opening.rstrip(), add_special_tokens=not has_bos).input_ids
        return ids, self._tokens_between(question), self._tokens_between(answer)

    def _tokens_between(self, text: str) -> list[int]:
        """Tokenise what stands between two turns; a space belongs to the word behind it."""
        opening = text.strip()
        space = text[: text.find(opening)][-1:]
        before, opening = (":", space + opening) if space == " " else (space or ":", opening)
        return self._tokens_behind(before, opening) if opening.strip() else []


def _unanswered(ids: Tensor, labels: Tensor | None) -> list[list[int]]:
    """Give the tokens of each row, blank where labels mark an answer: no answer opens a turn."""
    return (ids if labels is None else ids.masked_fill(labels != IGNORE, IGNORE)).tolist()


def _find(tokens: list[int], part: list[int]) -> list[int]:
    """Find where these tokens stand one behind the other."""
    starts = [i for i, token in enumerate(tokens) if part and token == part[0]]
    return [i for i in starts if tokens[i : i + len(part)] == part]


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
