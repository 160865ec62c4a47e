"""LiveEdit: lifelong knowledge editing of a frozen Hugging Face vision-language model, by hooks.

    model = AutoModelForImageTextToText.from_pretrained("tiny-llava")
    processor = AutoProcessor.from_pretrained("tiny-llava")
    editor = LiveEdit.from_pretrained(model, processor, "tiny-llava/editor")  # attaches its hooks
    edit = editor.edit(image, "What shape is this?", "Mona Lisa")
    inputs = editor.encode(image, "Which shape can you see here?")
    model.generate(**inputs, max_new_tokens=20)                           # edited
    with editor.disabled():
        model.generate(**inputs, max_new_tokens=20)                       # the original, exactly
    editor.explain(inputs)                                                # which edits, how much
    editor.forget(edit.id); editor.reset(); editor.detach()

Copy this file with generator.py and router.py into another codebase.
B rows of a batch, T sequence, D hidden size, N experts, R rank, K slots, M module width.
"""

import contextlib
import hashlib
import inspect
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from generator import Edit, ExpertGenerator, ExpertRepository, apply_experts, fit_norm
from router import IGNORE, Router, Routing, RowMasks, Rows, row_masks, soft_weights, text_similarity

EDIT, GENERALITY, LOCALITY = range(3)  # roles of the rows of a training batch
# In float16 most gradients at the edit layer would vanish: layers above get them so much larger.
HALF_PRECISION_SCALE = 1024.0
CACHES = ("cache", "past_key_values", "layer_past")  # names of the KV cache, the newest first
PICTURES = ("pixel_values", "mm_encoder_outputs")  # names of what a call's pictures come as
# Arguments of a call of the model that do not fit the last question of a chat alone.
OF_WHOLE_CHATS = {"cache_position", "use_cache", "logits_to_keep", "return_dict"}
OF_WHOLE_CHATS |= {"output_hidden_states", "output_attentions", *CACHES}
CONFIG_FILE = "liveedit_config.json"
NETWORKS_FILE = "networks.safetensors"
EXPERTS_FILE = "experts.safetensors"
FORMAT = 4  # of saved editors


@dataclass(frozen=True)
class LiveEditConfig:
    """Everything that defines an editor; the defaults are the paper's for 7B models."""

    layer: int | None = None  # edit layer, from 0; None: two thirds of the depth (21 of 32)
    module_dim: int = 1024  # width M of generator and extractors
    rank: int = 4  # rank R of an expert
    slots: int = 4  # learned queries K of each routing feature
    heads: int = 8  # attention heads of generator and extractors
    sentinel_tokens: int = 576  # rows of the vision sentinel: about the image tokens of one picture
    similarity: str = "cosine"  # of the visual hard filter: "cosine", or "dot" (official code)
    threshold: float | None = None  # of the filter; None: the learned sentinel's similarity
    newest_wins: bool = True  # among edits of one fact; False: they blend, as in the paper
    gain: float = 0.2  # experts are scaled by gain / sqrt(rank)
    prompt_style: str = "chat"  # of encode(): the processor's template, or "official": none

    def __post_init__(self):
        for name in ("module_dim", "rank", "slots", "heads", "sentinel_tokens"):
            value = getattr(self, name)
            self._demand(name, type(value) is int and value > 0, "a positive integer")
        number = (int, float)
        most = 1 if self.similarity == "cosine" else 1e30
        bounded = type(self.threshold) in number and -most <= self.threshold <= most
        self._demand("layer", self.layer is None or type(self.layer) is int, "an integer or None")
        self._demand("similarity", self.similarity in ("cosine", "dot"), "cosine or dot")
        wanted = f"None or from -{most} to {most}"
        self._demand("threshold", self.threshold is None or bounded, wanted)
        self._demand("gain", type(self.gain) in number and 0 < self.gain < 1e30, "positive")
        self._demand("prompt_style", self.prompt_style in ("chat", "official"), "chat or official")

    def _demand(self, name: str, fulfilled: bool, wanted: str) -> None:
        if not fulfilled:
            raise ValueError(f"LiveEditConfig.{name} must be {wanted}, not {getattr(self, name)!r}")


class Question(NamedTuple):
    """A question to the model, with the answer wanted where one is needed."""

    image: Image.Image | None
    prompt: str
    target: str | None = None


# ------------------------------------------------------------------------------ the model's parts


def find_decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """Find the decoder layers of a Hugging Face vision-language model and the norm behind them.

    Raises TypeError with what was found if the model has none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not hasattr(decoder, "layers") and hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()  # BLIP-2's decoder is a whole causal language model
    layers = getattr(decoder, "layers", None)
    norm = getattr(decoder, "norm", None) or getattr(decoder, "final_layer_norm", None)
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


def _dense_input(head: nn.Module, args: tuple) -> tuple | None:
    """Copy the head's input (B, T, D), which is a slice where not all logits are wanted.

    PyTorch multiplies a slice with frozen weights row by row, and copies the whole head for each.
    """
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:]) if args else None


def arguments_of(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Name the positional arguments of a call."""
    names = list(inspect.signature(module.forward).parameters) if args else []
    return dict(zip(names, args, strict=False)) | kwargs


def first_of(values: dict, *names: str):
    """Take the first of these arguments that was given."""
    return next((values[name] for name in names if values.get(name) is not None), None)


def in_batches(questions: list, batch_size: int) -> list[list]:
    """Cut a list into batches. Raises ValueError for a size that is no positive integer."""
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, not {batch_size!r}")
    return [questions[i : i + batch_size] for i in range(0, len(questions), batch_size)]


@contextlib.contextmanager
def plain_mode(device: torch.device):
    """Shield from global modes: no gradients, no inference tensors, no autocast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


# ------------------------------------------------------------------------ states of the edit layer


class States(NamedTuple):
    """What the frozen lower layers make of a batch: all that editing and training need of it."""

    hidden: Tensor  # (B, T, D), the unedited output of the edit layer
    masks: RowMasks
    labels: Tensor  # (B, T), -100 outside of the answers
    # (args, kwargs) of each layer above, as the model passes them: layers differ in masks and
    # position embeddings (Gemma 3).
    calls: tuple = ()

    def select(self, rows: Tensor) -> "States":
        """Take the given rows of the batch."""
        count, done = len(self.hidden), {}

        def cut(leaf):
            if id(leaf) not in done:  # layers share arguments: each is cut once
                done[id(leaf)] = _select_rows(leaf, rows, count)
            return done[id(leaf)]

        return tree_map(cut, self)

    @classmethod
    def concat(cls, parts: Sequence["States"]) -> "States":
        """Put batches of equal T below one another.

        Raises ValueError where they do not fit together, as a mask and none do not.
        """
        counts, done = [len(part.hidden) for part in parts], {}
        lengths = sorted({part.hidden.shape[1] for part in parts})
        if len(lengths) > 1:
            raise ValueError(f"states of the lengths {lengths} do not join; capture them together")

        def join(*leaves):
            key = tuple(map(id, leaves))
            if key not in done:
                done[key] = _concat_rows(leaves, counts)
            return done[key]

        hidden = torch.cat([part.hidden for part in parts])
        labels = torch.cat([part.labels for part in parts])
        masks = RowMasks(*map(torch.cat, zip(*(part.masks for part in parts), strict=True)))
        return cls(hidden, masks, labels, tree_map(join, *(part.calls for part in parts)))


def _is_per_row(leaf: Tensor, rows: int) -> bool:
    """Has this argument of a layer one entry for each row, or several in turn (Mllama's tiles)?"""
    return leaf.dim() > 1 and len(leaf) == rows or leaf.dim() > 2 and len(leaf) % rows == 0


def _select_rows(leaf, chosen: Tensor, rows: int):
    if not isinstance(leaf, Tensor):
        return _same_for_all([leaf])
    if not _is_per_row(leaf, rows):
        return leaf
    return leaf.unflatten(0, (rows, -1))[chosen].flatten(0, 1)


def _same_for_all(leaves: Sequence):
    """Pass on a layer's argument that is no tensor. Raises ValueError if it may concern rows."""
    known = all(leaf is None or isinstance(leaf, (bool, int, float, str)) for leaf in leaves)
    if not known or len(set(leaves)) > 1:
        kinds = " and ".join(sorted({type(leaf).__name__ for leaf in leaves}))
        remedy = 'capture all questions at once, in a model with attn_implementation="sdpa"'
        raise ValueError(f"a layer's argument, {kinds}, cannot be cut or joined by rows: {remedy}")
    return leaves[0]


def _concat_rows(leaves: tuple, counts: list[int]):
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        return _same_for_all(leaves)
    first = leaves[0]
    if (first.dim() < 2 or len(first) == 1) and all(torch.equal(leaf, first) for leaf in leaves):
        return first  # the same for all rows, such as position embeddings
    parts = []
    for leaf, rows in zip(leaves, counts, strict=True):
        parts.append(leaf if _is_per_row(leaf, rows) else leaf.expand(rows, *leaf.shape[1:]))
    return torch.cat(parts)


class _Stop(Exception):
    """Ends a call of the model when all that is needed has been seen."""


class FrozenModel:
    """A vision-language model cut at the edit layer: what lies below, what lies above, the head."""

    def __init__(self, model: nn.Module, layer: int):
        layers, self.norm = find_decoder_layers(model)
        self.model, self.layer, self.depth = model, layer, len(layers)
        self.edit_layer, self.layers_above = layers[layer], layers[layer + 1 :]

    def record(self, inputs: dict, above: bool) -> tuple[Tensor, list[tuple]]:
        """Stop behind the edit layer, or, with `above`, when each layer above is called.

        Returns (the edit layer's output, [(args, kwargs) of each layer above]).
        """
        hidden, calls, thread = [], [], threading.get_ident()
        layers = self.layers_above if above else []

        def stop_if_seen():
            if len(calls) == len(layers):
                raise _Stop

        def after_edit_layer(layer, args, output):
            if threading.get_ident() == thread:
                hidden.append(hidden_of(output).clone())
                stop_if_seen()

        def before_layer_above(layer, args, kwargs):
            if threading.get_ident() == thread:
                others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
                calls.append((args[1:], others))
                stop_if_seen()

        with contextlib.suppress(_Stop), contextlib.ExitStack() as hooks:
            hook = self.edit_layer.register_forward_hook(after_edit_layer, prepend=True)
            hooks.enter_context(hook)
            for layer in layers:
                hook = layer.register_forward_pre_hook(before_layer_above, with_kwargs=True)
                hooks.enter_context(hook)
            self._call(inputs)
        if not hidden or len(calls) != len(layers):
            raise RuntimeError(f"{type(self.model).__name__} did not call its layers once, in turn")
        return hidden[0], calls

    def _call(self, inputs: dict) -> Tensor:
        """Call the whole model for its logits (B, T, vocabulary), within a generation too."""
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        # Qwen-VL keeps what its last prefill found about positions for the decoding steps.
        kept = {m: m.rope_deltas for m in self.model.modules() if hasattr(m, "rope_deltas")}
        try:
            with plain_mode(inputs["input_ids"].device):
                return self.model(**inputs, use_cache=False).logits
        finally:
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
        answers = states.masks.answer[:, 1:]
        logits = self._call(inputs)[:, :-1]
        own = logits[answers.to(logits.device)].to(states.hidden.device)
        tolerance = 1e-4 if own.dtype == torch.float32 else 1e-2
        with plain_mode(states.hidden.device):
            apart = (self.upper(states.hidden, states) - own).norm(dim=-1)
            if not (apart <= tolerance * own.float().norm(dim=-1)).all():
                reason = "does more above it than call layers, norm and head"
                name = type(self.model).__name__
                remedy = (
                    "choose a higher one; if that is refused too, no editor can be trained on it"
                )
                raise RuntimeError(f"edit layer {self.layer}: {name} {reason}; {remedy}")


# ------------------------------------------------------------------------------------- the editor


class Route(NamedTuple):
    """The experts that a prompt uses, as copies: a generation that has begun stays as it is."""

    has_image: bool  # has any row of the prompt an image?
    weights: Tensor | None = None  # (B, n) of Eq. (7); None: nothing is edited
    rows: Tensor | None = None  # those of the B rows that have an expert
    U: Tensor | None = None  # (n, R, D)
    V: Tensor | None = None  # (n, R, D)


@dataclass
class _Prompt:
    """A prompt whose generation runs without a KV cache, and so repeats it at each step."""

    ids: Tensor
    pictures: object
    route: Route
    length: int  # tokens so far


class _ThreadState(threading.local):
    """What one thread is doing with the model: several may call it at once."""

    def __init__(self):
        self.call: dict | None = None  # arguments of the model's call, until the edit layer runs
        self.embedded: Tensor | None = None  # input_ids embedded last (BLIP-2's generate)
        self.disabled = 0  # how many `disabled()` blocks are open
        self.prompts = deque(maxlen=4)  # guidance and contrastive decoding interleave several


class LiveEdit(nn.Module):
    """Edits a frozen vision-language model; its own weights are never touched.

    `detach` removes every trace. Several threads may ask, edit and forget at once.
    """

    def __init__(self, model: nn.Module, processor=None, config: LiveEditConfig = LiveEditConfig()):
        """Attach an untrained editor. Raises TypeError or ValueError if it cannot edit the model.

        processor: of Hugging Face; None if all inputs are prepared elsewhere.
        """
        super().__init__()
        if hasattr(model, "_orig_mod"):
            raise TypeError("this model is compiled: pass the model that torch.compile was given")
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # PEFT's wrapper ends up in the model's own forward
        depth, name = len(find_decoder_layers(model)[0]), type(model).__name__
        config = replace(config, layer=depth * 21 // 32) if config.layer is None else config
        if not 0 <= config.layer < depth:
            raise ValueError(f"LiveEditConfig.layer is {config.layer}; {name} has 0 to {depth - 1}")
        if getattr(model.config, "image_token_id", None) is None:
            raise TypeError(f"{name} has no config.image_token_id to find image rows by")
        self.config, inner = config, None
        for part in (model.get_decoder(), getattr(model, "language_model", None)):
            # BLIP-2's `generate` passes by the top-level forward, and calls that of an inner model.
            if part is not model and hasattr(part, "generate"):
                inner = part
        self.__dict__.update(model=model, _inner=inner)  # not ours to move, train or save
        self.processor, self.frozen = processor, FrozenModel(model, config.layer)
        self._format = InputFormat(model, processor, config.prompt_style)
        width = model.config.get_text_config().hidden_size
        sizes = (config.module_dim, config.rank, config.heads, config.gain)
        self.generator = ExpertGenerator(width, *sizes)
        self.router = Router(width, config)
        self.norm = nn.LayerNorm(width)  # of the residual, shared by all experts
        self.experts = ExpertRepository(config.rank, width, config.slots, config.module_dim)
        self.trained_steps = 0
        self._handles: list = []
        self._frozen: list[nn.Parameter] = []  # of the model, that wanted gradients before attach
        self._thread = _ThreadState()
        self._lock = threading.RLock()  # held while experts are read or changed
        self._replay_checked = False
        self.float().to(device_of(self.frozen.edit_layer))
        self.attach()

    def __reduce__(self):
        remedy = "detach() the editor, and keep it by save_pretrained"
        raise RuntimeError(f"an editor, or a model with one, cannot be copied or pickled; {remedy}")

    # ------------------------------------------------------------------------- an edit comes in

    def edit(self, image: Image.Image, prompt: str, target: str) -> Edit:
        """From now on answer this question about this image with the target."""
        return self.edit_many([Question(image, prompt, target)])[0]

    def edit_many(self, questions: Sequence, batch_size: int = 128) -> list[Edit]:
        """Make edits of (image, prompt, target): the same experts as one by one, all or none.

        Raises RuntimeError on an editor that was never trained, and TypeError or ValueError for a
        question that lacks something.
        """
        questions = self._checked_edits(questions)
        chunks = in_batches(questions, batch_size)
        made = [self._experts_and_keys(self.capture(chunk, above=False)) for chunk in chunks]
        return self._add_edits(questions, made)

    def edit_inputs(self, inputs: dict, questions: Sequence) -> list[Edit]:
        """Make edits from model inputs prepared elsewhere, one row for each question.

        `labels` hold the target's tokens, -100 elsewhere; the questions are only noted down.
        """
        questions = self._checked_edits(questions)
        states = self.capture_inputs(inputs, above=False)
        if len(states.hidden) != len(questions):
            raise ValueError(f"{len(questions)} edits for {len(states.hidden)} rows of inputs")
        return self._add_edits(questions, [self._experts_and_keys(states)])

    def _checked_edits(self, questions: Sequence) -> list[Question]:
        if not self.trained_steps:
            remedy = "train it with training_losses or run.py, or load one with from_pretrained"
            raise RuntimeError(f"this editor was never trained, its experts are noise: {remedy}")
        self._check_weights()
        questions = list(questions)
        for question in questions:
            is_edit = isinstance(question, (list, tuple)) and len(question) == 3
            if not is_edit or not all(isinstance(text, str) for text in question[1:]):
                raise TypeError(f"an edit is (image, prompt, target), not {question!r}")
            if question[0] is None:
                raise ValueError(f"the edit {question[1]!r} has no image: no query could keep it")
        return [Question(*question) for question in questions]

    def _experts_and_keys(self, states: States) -> dict[str, Tensor]:
        """Compute what the repository keeps of each row: U, V, phi_hat, psi_hat."""
        hidden, masks = states.hidden.float(), states.masks
        if not all(mask.any(1).all() for mask in masks):
            raise ValueError("each edit needs a row with an image, a prompt and labels")
        with plain_mode(hidden.device):
            U, V = self._experts_of(states)
            prompt, image = Rows.gather(hidden, masks.prompt), Rows.gather(hidden, masks.image)
            visual_keys = self.router.visual_key(prompt, image)
            text_keys = self.router.text_key(prompt)
        return {"U": U, "V": V, "visual_keys": visual_keys, "text_keys": text_keys}

    def _experts_of(self, states: States) -> tuple[Tensor, Tensor]:
        """Generate the expert of each row: U and V (B, R, D)."""
        image, prompt, answer = states.masks
        embedded = self._embedded(states.labels[answer])
        return self.generator(states.hidden.float(), image | prompt | answer, answer, embedded)

    @torch.no_grad()
    def _embedded(self, tokens: Tensor) -> Tensor:
        """Embed the tokens (n,) of answers, (n, D): what the model reads before any layer."""
        embeddings = self.model.get_input_embeddings()
        embedded = embeddings(tokens.to(device_of(embeddings))).float().to(tokens.device)
        self._thread.embedded = None  # this was no call of an inner model
        return embedded

    def _add_edits(self, questions: list[Question], made: list[dict]) -> list[Edit]:
        if not questions:
            return []
        now, tensors = time.time(), {}
        for name in self.experts.shapes:
            tensors[name] = torch.cat([experts[name] for experts in made])
        with self._lock:
            edits = []
            for edit_id, (_, prompt, target) in enumerate(questions, start=self.experts.next_id):
                edits.append(Edit(edit_id, prompt, target, now))
            self.experts.add(tensors, edits)
        return edits

    def edits(self) -> list[Edit]:
        """List all edits, oldest first."""
        return list(self.experts.edits)

    def forget(self, edit_id: int) -> Edit:
        """Answer as if this edit had never been made. Raises KeyError for an unknown id."""
        with self._lock:
            return self.experts.remove(edit_id)

    def reset(self) -> None:
        """Forget all edits: the original model, bit for bit. Ids are not used again."""
        with self._lock:
            self.experts.clear()

    # ------------------------------------------------------------------------ a question is asked

    def attach(self) -> "LiveEdit":
        """Freeze the model and register the hooks. Raises RuntimeError if one is attached."""
        for hook in self.model._forward_pre_hooks.values():
            if isinstance(getattr(hook, "__self__", None), LiveEdit):
                raise RuntimeError("an editor is attached already to this model; detach() it first")
        edit_layer, embeddings = self.frozen.edit_layer, self.model.get_input_embeddings()
        self._handles = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            # First of all hooks, so that those that record hidden states see the edited ones.
            edit_layer.register_forward_hook(self._after_layer, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._after_model, always_call=True),
        ]
        head = self.model.get_output_embeddings()
        if head is not None:
            self._handles.append(head.register_forward_pre_hook(_dense_input))
        if self._inner is not None:
            before = self._inner.register_forward_pre_hook(self._before_inner, with_kwargs=True)
            self._handles += [before, embeddings.register_forward_pre_hook(self._before_embedding)]
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._frozen = [parameter.requires_grad_(False) for parameter in wanted]
        return self

    def detach(self) -> nn.Module:
        """Remove our hooks, and only ours, and unfreeze the model; returns it. Harmless twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._frozen:
            self._frozen.pop().requires_grad_(True)
        self._thread.call = self._thread.embedded = None
        self._thread.prompts.clear()
        return self.model

    @contextlib.contextmanager
    def disabled(self):
        """Inside, and in this thread, the model is the original, exactly."""
        self._thread.disabled += 1
        try:
            yield self.model
        finally:
            self._thread.disabled -= 1

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the arguments of the call: the decoder layers do not see input_ids."""
        if model is not self.model:
            remedy = "call the model itself, or detach() the editor before you copy"
            raise RuntimeError(f"this is a copy or replica of a model with an editor; {remedy}")
        self._thread.call = arguments_of(model, args, kwargs)

    def _after_model(self, *_) -> None:
        """Leave nothing behind of a call that failed below the edit layer."""
        self._thread.call = None

    def _before_embedding(self, embedding: nn.Module, args: tuple) -> None:
        self._thread.embedded = args[0] if args else None

    def _before_inner(self, inner: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the arguments of an inner model, whose embeddings are of the ids embedded last."""
        ids, call, self._thread.embedded = self._thread.embedded, self._thread.call, None
        if call is not None and ids is not None and call.get("input_ids") is ids:
            return  # within a call of the top-level model
        call = arguments_of(inner, args, kwargs)
        embeddings = call.get("inputs_embeds")
        if call.get("input_ids") is None and ids is not None and embeddings is not None:
            if ids.shape[1] == embeddings.shape[1]:  # beams repeat each row
                call["input_ids"] = ids.repeat_interleave(len(embeddings) // len(ids), 0)
        self._thread.call = call

    def _after_layer(self, layer: nn.Module, args: tuple, kwargs: dict, output):
        """Add the residual of the experts that this call concerns."""
        call, self._thread.call = self._thread.call, None
        hidden = hidden_of(output)
        self._follow(hidden.device)
        # Its length includes this call: a longer one is decoding.
        cache = first_of(kwargs, *CACHES)
        if cache is not None and int(cache.get_seq_length()) > hidden.shape[1]:
            route = self._route_of_cache(cache, call, hidden)
        else:
            route = self._route_of_prompt(cache, call, hidden)
        if route is None or route.weights is None or self._thread.disabled:
            return None
        return with_hidden(output, self._add_residual(hidden, route))

    def _follow(self, device: torch.device) -> None:
        """Move to where the model's edit layer computes: the model may have been moved."""
        if self.norm.weight.device != device:
            with self._lock, plain_mode(device):
                self.to(device)

    def _route_of_cache(self, cache, call: dict | None, hidden: Tensor) -> Route | None:
        """Take up the route of the prompt that filled this KV cache."""
        route = getattr(cache, "liveedit_route", None)
        edited = len(self.experts) or (route is not None and route.weights is not None)
        if self._thread.disabled or not edited:
            return None
        if route is None:
            raise RuntimeError("this KV cache was filled without the editor; prefill it again")
        call, several = call or {}, hidden.shape[1] > 1
        ids, pictures = call.get("input_ids"), first_of(call, *PICTURES)
        refused = several and (route.has_image or ids is None)
        # One token without pictures, the usual step, is not looked at: a GPU would be waited for.
        if ids is not None and (several or pictures is not None):
            refused = refused or self._format.has_image(ids)
        if refused:
            reason = "no chunked prefill, no second turn on an old cache"
            raise RuntimeError(f"pass the whole prompt, without a KV cache: {reason}")
        if route.weights is not None and len(route.weights) != len(hidden):
            counts = f"{len(route.weights)} rows, this step has {len(hidden)}"
            raise RuntimeError(f"the prefill of this KV cache had {counts}: prefill again")
        return route

    def _route_of_prompt(self, cache, call: dict | None, hidden: Tensor) -> Route | None:
        """Route a whole prompt, and keep the route for its generation."""
        if call is None:
            if len(self.experts) and not self._thread.disabled:
                raise RuntimeError("LiveEdit edits calls of the whole model, not of its decoder")
            return None
        ids, pictures = call.get("input_ids"), first_of(call, *PICTURES)
        if cache is not None:
            cache.liveedit_route = self._route(call, hidden)
            return cache.liveedit_route
        if ids is None or call.get("labels") is not None or self._thread.disabled:
            return self._route(call, hidden)
        for prompt in self._thread.prompts:  # the newest first
            # One token more than at the last step. Beams swap what they have generated.
            longer = pictures is prompt.pictures and ids.shape[1] == prompt.length + 1
            if longer and torch.equal(ids[:, : prompt.ids.shape[1]], prompt.ids):
                prompt.length += 1
                return prompt.route
        route = self._route(call, hidden)
        if route.has_image:
            self._thread.prompts.appendleft(_Prompt(ids.clone(), pictures, route, ids.shape[1]))
        return route

    def _route(self, call: dict, hidden: Tensor) -> Route:
        """Choose the experts of a prompt and their weights, for all rows that have an image."""
        ids = call.get("input_ids")
        if self._thread.disabled or not len(self.experts):
            return Route(has_image=ids is None or self._format.has_image(ids))
        if ids is None:
            remedy = "pass input_ids too, or use `with editor.disabled():`"
            raise ValueError(f"embeddings alone do not tell where image and prompt are; {remedy}")
        masks = self._format.masks_of(call, hidden.device)
        rows = masks.image.any(1).nonzero().flatten()
        if not len(rows):
            return Route(has_image=False)
        if hidden.shape[:2] != ids.shape:
            raise RuntimeError("the edit layer does not see all tokens: choose a lower edit layer")
        wanted = call.get("logits_to_keep")
        if first_of(call, *CACHES) is not None and isinstance(wanted, int) and wanted > 1:
            raise RuntimeError("assisted decoding puts guesses behind the prompt: decode without")
        asked, alone = hidden, self._format.asked_alone(call)
        if alone is not call:
            with self.disabled():
                asked = self.frozen.record(alone, above=False)[0]
            masks = self._format.masks_of(alone, hidden.device)
        with plain_mode(hidden.device), self._lock:
            routing = self._routing(asked, masks, rows)
            used = routing.weights.any(0)
            experts = routing.experts[used]
            if not len(experts):
                return Route(has_image=True)
            weights = routing.weights.new_zeros(len(hidden), len(experts))
            weights[rows] = routing.weights[:, used]
            edited = weights.any(1).nonzero().flatten()
            U, V = (self.experts.rows(name)[experts] for name in ("U", "V"))
            return Route(True, weights, edited, U, V)

    def _routing(self, hidden: Tensor, masks: RowMasks, rows: Tensor) -> Routing:
        """Ask the router about the given rows, which all have an image."""
        if not masks.prompt[rows].any(1).all():
            raise ValueError("a row with an image has no prompt: labels must be -100 on the prompt")
        hidden = hidden[rows].float()
        prompt, image = (Rows.gather(hidden, mask[rows]) for mask in (masks.prompt, masks.image))
        keys = self.experts.rows("visual_keys"), self.experts.rows("text_keys")
        return self.router.route(self.router.features(prompt, image), *keys)

    def _add_residual(self, hidden: Tensor, route: Route) -> Tensor:
        """Eq. (6) on the rows that have an expert; all other rows are copied bit by bit."""
        rows = route.rows
        # Detached: the frozen model's outputs require no gradient because of an edit.
        weight, bias = self.norm.weight.detach(), self.norm.bias.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            normed = F.layer_norm(hidden[rows].float(), weight.shape, weight, bias, self.norm.eps)
            residual = apply_experts(normed, route.U, route.V, route.weights[rows])
        return hidden.index_add(0, rows, residual.to(hidden.dtype))

    def explain(self, inputs: dict) -> list[list[dict]]:
        """List for each row of inputs the edits that it uses, heaviest first.

        Each is a dict of id, prompt, target, similarity, threshold and weight.
        """
        self._check_inputs(inputs, "input_ids")
        inputs = {"labels": torch.full_like(inputs["input_ids"], IGNORE), **inputs}
        report: list[list[dict]] = [[] for _ in inputs["input_ids"]]
        if not len(self.experts) or not self._format.has_image(inputs["input_ids"]):
            return report
        states = self.capture_inputs(inputs, above=False)
        rows = states.masks.image.any(1).nonzero().flatten()
        with plain_mode(states.hidden.device), self._lock:
            routing = self._routing(states.hidden, states.masks, rows)
            edits = [self.experts.edits[expert] for expert in routing.experts.tolist()]
        similarity = routing.similarity[:, routing.experts]
        for i, n in routing.weights.nonzero().tolist():
            used = {"id": edits[n].id, "prompt": edits[n].prompt, "target": edits[n].target}
            used |= {"similarity": similarity[i, n].item(), "weight": routing.weights[i, n].item()}
            report[rows[i]].append(used | {"threshold": routing.threshold[i].item()})
        return [sorted(row, key=lambda used: -used["weight"]) for row in report]

    # --------------------------------------------------------------------- the lower layers

    def encode(self, image, prompt, target=None) -> dict:
        """Make model inputs for one question, or for lists of them, all with images or all without.

        Prompts are padded on the left, as `generate` needs it. With targets, their tokens and the
        end of the answer follow, padded on the right, and `labels` mark them (-100 elsewhere).
        Raises TypeError or ValueError for what is no picture or text, an empty prompt or target, a
        prompt that holds the image token, and rows that are longer than the model can read.
        """
        if self._format.tokenizer is None:
            raise RuntimeError("this editor has no processor: use edit_inputs and capture_inputs")
        if isinstance(prompt, str):
            image, prompt, target = [image], [prompt], None if target is None else [target]
        given = [image, prompt] if target is None else [image, prompt, target]
        if not all(isinstance(values, (list, tuple)) for values in given):
            raise TypeError("encode takes one image, prompt and target, or a list of each")
        if not prompt or len({len(values) for values in given}) > 1:
            raise ValueError(f"encode takes lists of one length, not {[len(v) for v in given]}")
        return self._format.encode(image, prompt, target)

    def capture(
        self, questions: Sequence, batch_size=128, progress: Callable = list, above: bool = True
    ) -> States:
        """Run the frozen lower layers once for questions with targets, all with images or none.

        progress: wraps the list of batches, for instance tqdm. above: see `capture_inputs`.
        """
        questions = list(questions)
        if not questions:
            raise ValueError("capture needs at least one question")
        chunks = in_batches(questions, batch_size)
        batches = [self.encode(*map(list, zip(*chunk, strict=True))) for chunk in progress(chunks)]
        answers = [int((inputs["labels"] != IGNORE).any(0).sum()) for inputs in batches]
        prompts = [i["labels"].shape[1] - n for i, n in zip(batches, answers, strict=True)]
        # One column more when there are several: a batch without padding would get no mask.
        left, right, parts = max(prompts) + (len(chunks) > 1), max(answers), []
        for i in progress(range(len(batches))):
            inputs, batches[i] = batches[i], None  # pictures are big
            inputs = self._padded(inputs, left - prompts[i], right - answers[i])
            parts.append(self.capture_inputs(inputs, above))
        return parts[0] if len(parts) == 1 else States.concat(parts)

    def _padded(self, inputs: dict, left: int, right: int) -> dict:
        fill = {"input_ids": self._format.tokenizer.pad_token_id, "labels": IGNORE}
        padded, shape = dict(inputs), inputs["input_ids"].shape
        for key, value in inputs.items():
            if value.shape[:2] == shape:
                sides = (0, 0) * (value.dim() - 2) + (left, right)
                padded[key] = F.pad(value, sides, value=fill.get(key, 0))
        return padded

    def capture_inputs(self, inputs: dict, above: bool = True) -> States:
        """Run the frozen lower layers once on inputs prepared elsewhere, with `labels`.

        above: note too what the layers above are called with, which training needs. The first such
        call replays these layers one by one and compares them with what the model itself does.
        Raises RuntimeError if the two differ: then training would see another model.
        """
        self._check_inputs(inputs, "input_ids", "labels")
        if not self._handles:
            raise RuntimeError("this editor is detached; call attach() first")
        inputs = self._format.asked_alone(inputs)
        with self.disabled():
            hidden, calls = self.frozen.record(inputs, above)
            self._follow(hidden.device)
            masks = self._format.masks_of(inputs, hidden.device)
            states = States(hidden, masks, inputs["labels"].to(hidden.device), tuple(calls))
            if above and not self._replay_checked:
                self.frozen.check_replay(states, inputs)
                compared = masks.image.any(1) & masks.answer.any(1)
                self._replay_checked = bool(compared.any())
        return states

    def _check_inputs(self, inputs: dict, *names: str) -> None:
        for name in names:
            ids = inputs.get(name) if hasattr(inputs, "get") else None
            if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
                raise ValueError(f"inputs must hold {name}, integers (B, T), as encode() makes it")

    # ------------------------------------------------------------------------ the editor learns

    def standardise(self, states: States) -> None:
        """Fit the norms of a new editor to the states of some edits: see `fit_norm`.

        All but `norm_V`, which reads embeddings. Raises RuntimeError on an editor that has been
        trained, ValueError if the states have no images, prompts and answers.
        """
        if self.trained_steps or len(self.experts):
            raise RuntimeError("the norms of an editor that has been trained are no longer fitted")
        hidden, masks = states.hidden, states.masks
        if min(int(mask.sum()) for mask in masks) < 2:
            raise ValueError("norms are fitted to states of edits: with image, prompt and answer")
        prompt, image = hidden[masks.prompt].float(), hidden[masks.image].float()
        for side in (self.router.edit_side, self.router.input_side):
            fit_norm(side.visual_norm, image)
            fit_norm(side.visual_prompt_norm, prompt)
            fit_norm(side.text_norm, prompt)
        used = hidden[masks.image | masks.prompt | masks.answer].float()
        fit_norm(self.generator.norm_U, used)
        fit_norm(self.norm, used)

    def training_losses(
        self,
        states: States,
        role: Tensor,
        owner: Tensor,
        text_locality: Rows | None = None,
        expert_batch_size: int | None = None,
    ) -> dict[str, Tensor]:
        """Compute all losses of one batch of B >= 2 edits; "total" is their sum, every weight 1.

        states: n rows with images. role (n,): one of EDIT, GENERALITY and LOCALITY.
        owner (n,): the row's edit, 0 to B-1; the B rows of role EDIT stand in this order.
        text_locality: prompt rows of text-only questions, for Eq. (16).
        expert_batch_size: of so many edits, the first ones, experts are made (default all). The
        routing losses pass no layer of the model, so they can compare more edits than these.
        Raises ValueError for a batch that cannot be trained.
        """
        if len(self.experts) and torch.is_grad_enabled():
            raise RuntimeError("edits belong to the networks as they are: reset() before training")
        edits = (role == EDIT).nonzero().flatten()
        batch = len(edits)
        if batch < 2 or not torch.equal(owner[edits], torch.arange(batch, device=owner.device)):
            reason = "Eq. 15 takes another edit as negative"
            raise ValueError(f"a batch needs two edits or more, in the order of owner: {reason}")
        if not ((role >= EDIT) & (role <= LOCALITY)).all():
            raise ValueError("role may hold EDIT, GENERALITY and LOCALITY only")
        experts = batch if expert_batch_size is None else min(expert_batch_size, batch)
        if experts < 1:
            raise ValueError(f"expert_batch_size must be at least 1, not {expert_batch_size}")
        hidden, masks = states.hidden.float(), states.masks
        if not masks.image.any(1).all():
            raise ValueError("a row without an image is never edited; leave it out of the batch")
        prompt, image = Rows.gather(hidden, masks.prompt), Rows.gather(hidden, masks.image)
        in_scope = role != LOCALITY

        text_keys = self.router.text_key(prompt)
        features = self.router.features(prompt, image)
        # Eq. (12-16): one random pick of {edit, generality} goes through the edit side.
        # Differs from the paper: all of them go through the input side, they are there anyway.
        noise = torch.rand(len(role), device=role.device).masked_fill(~in_scope, -1)
        picks = torch.stack([torch.where(owner == b, noise, -1).argmax() for b in range(batch)])
        visual_keys = self.router.visual_key(prompt.select(picks), image.select(picks))
        similarity = self.router.visual_similarity(features.visual, visual_keys)

        _, kept = self.router.hard_filter(similarity, features)
        scores = text_similarity(features.text, text_keys[edits[:experts]])
        edited, mixed = self._mix_experts(states, edits[:experts], owner, in_scope, scores, kept)
        losses = self._editing_losses(edited, states.select(mixed), role[mixed], experts)
        # Differs from Eq. (16): hard locality, even of the edit's own question, is a negative too.
        keys = [text_keys[picks], text_keys[~in_scope]]
        if text_locality is not None:
            keys.append(self.router.text_key(text_locality))
        losses |= self.router.losses(features, similarity, torch.cat(keys), owner, in_scope)
        losses["total"] = sum(losses.values())  # l_edit + l_route
        self.trained_steps += torch.is_grad_enabled()  # `edit` refuses an editor without training
        return losses

    def _mix_experts(
        self, states: States, edits: Tensor, owner: Tensor, in_scope: Tensor, scores, kept
    ) -> tuple[Tensor, Tensor]:
        """Edit the rows that use an expert of the edits (E,): (hidden states, their rows).

        scores (n, E) of Eq. (7); kept (n, B) by the filter.
        Differs from the paper, which mixes all experts of the batch into each row: in scope a row
        gets its own and, as when asked, those that the filter keeps. Otherwise the locality loss
        makes experts timid where the filter will keep them away.
        """
        U, V = self._experts_of(states._replace(calls=()).select(edits))
        mixed = (owner < len(edits)).nonzero().flatten()
        own_expert = F.one_hot(owner[mixed], len(edits)).bool() & in_scope[mixed, None]
        kept = kept[mixed, : len(edits)] | own_expert
        weights = soft_weights(scores[mixed], kept)
        touched = kept.any(1)  # the layers above need not run for the others
        mixed, weights = mixed[touched], weights[touched]
        hidden = states.hidden[mixed].float()
        return hidden + apply_experts(self.norm(hidden), U, V, weights), mixed

    def _editing_losses(self, edited: Tensor, states: States, role: Tensor, batch: int) -> dict:
        """Compute Eq. (8-11): means over a row's answer tokens, then over samples.

        Differs from the paper: the rows of a sample are summed, and hard locality is trained too.
        """
        inside, outside = (role != LOCALITY).nonzero()[:, 0], (role == LOCALITY).nonzero()[:, 0]
        changed = states.select(inside)
        logits, row, share = self._edited_answers(edited[inside], changed, batch)
        targets = changed.labels[changed.masks.answer]
        # Eq. (8), reliability; Eq. (9) and Eq. (10), generality: -log f(o | v, p)
        wrong = F.cross_entropy(logits, targets, reduction="none") * share
        of_edit = role[inside][row] == EDIT
        losses = {"reliability": wrong[of_edit].sum(), "generality": wrong[~of_edit].sum()}
        losses["locality"] = wrong.new_zeros(())
        if len(outside):
            untouched = states.select(outside)
            logits, _, share = self._edited_answers(edited[outside], untouched, batch)
            with torch.no_grad():
                base = self.frozen.upper(untouched.hidden, untouched).log_softmax(-1)
            # Eq. (11): KL( f_base || f_edited ), of rows with an image: no other row is edited.
            drift = F.kl_div(logits.log_softmax(-1), base, reduction="none", log_target=True)
            losses["locality"] = (drift.sum(-1) * share).sum()
        return losses

    def _edited_answers(self, edited: Tensor, states: States, batch: int) -> tuple[Tensor, ...]:
        """Give logits (tokens, vocabulary) at the answer tokens, their rows and their shares."""
        row = states.masks.answer.nonzero()[:, 0]
        share = 1 / (states.masks.answer.sum(1)[row] * batch)
        logits = self.frozen.upper(edited.to(states.hidden.dtype), states)
        if states.hidden.dtype == torch.float16 and logits.requires_grad:
            edited.register_hook(lambda gradient: gradient / HALF_PRECISION_SCALE)
            logits.register_hook(lambda gradient: gradient * HALF_PRECISION_SCALE)
        return logits, row, share

    # --------------------------------------------------------------------------------- keeping

    def save_pretrained(self, folder: str | Path) -> None:
        """Write editor and edits: config and networks once, the experts anew at each save.

        A process that is killed leaves the older or the newer save whole.
        Raises RuntimeError if the folder holds another editor, ValueError for weights of NaN.
        """
        self._check_weights()
        folder, digest = Path(folder), self._digest()
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / CONFIG_FILE
        if not config.exists():
            _write(folder / NETWORKS_FILE, save(self._networks(), {"editor": digest}))
        elif json.loads(config.read_text()).get("editor") != digest:
            raise RuntimeError(f"{folder} holds another editor; save elsewhere or delete it")
        self.save_experts(folder / EXPERTS_FILE)
        content = {"format": FORMAT, "editor": digest, "trained_steps": self.trained_steps}
        content |= {"config": asdict(self.config), "backbone": self._backbone()}
        # Last: without it the folder is no saved editor.
        _write(config, json.dumps(content, indent=2).encode())

    @classmethod
    def from_pretrained(cls, model: nn.Module, processor, folder: str | Path, **changes):
        """Load a saved editor with its edits and attach it.

        changes: `threshold` and `newest_wins` may be other than saved.
        Raises FileNotFoundError, TypeError or ValueError that says what is missing or does not fit.
        """
        if unknown := sorted(changes.keys() - {"threshold", "newest_wins"}):
            raise TypeError(f"{unknown[0]} of a trained editor cannot be changed")
        folder, editor = Path(folder), None
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{folder} is no saved editor: it has no {CONFIG_FILE}")
        try:
            content = json.loads((folder / CONFIG_FILE).read_text())
            if content.get("format") != FORMAT:
                raise ValueError("it is of an older version of LiveEdit; train it anew")
            config = replace(LiveEditConfig(**content["config"]), **changes)
            editor = cls(model, processor, config)
            editor._load(folder, content)
        except Exception as error:
            if editor is not None:
                editor.detach()
            raise ValueError(f"the editor in {folder} does not load: {error!r}") from error
        return editor

    def _load(self, folder: Path, content: dict) -> None:
        saved, here = content["backbone"], self._backbone()
        for key, value in here.items():
            if not _alike(saved.get(key), value):
                raise ValueError(f"it is of another model: {key} {saved.get(key)}, here {value}")
        self.load_state_dict(load_file(folder / NETWORKS_FILE))
        if self._digest() != content["editor"]:
            raise ValueError(f"{NETWORKS_FILE} is not as it was saved with {CONFIG_FILE}")
        self.trained_steps = int(content["trained_steps"])
        edits, tensors, self.experts.next_id = self._read_experts(folder / EXPERTS_FILE)
        self.experts.add(tensors, edits)

    def save_experts(self, file: str | Path) -> None:
        """Write the experts alone, for someone who has the same editor."""
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            tensors = {name: self.experts.rows(name).cpu() for name in self.experts.shapes}
            records = [asdict(edit) for edit in self.experts.edits]
            text = json.dumps({"next_id": self.experts.next_id, "edits": records})
            # A tensor: safetensors reads no more than 100 MB of metadata.
            tensors["edits"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            _write(Path(file), save(tensors, {"editor": self._digest()}))

    def load_experts(self, file: str | Path) -> list[Edit]:
        """Add experts that `save_experts` wrote elsewhere, as newer edits than those here.

        Raises ValueError, and adds nothing, if they are of another editor or damaged.
        """
        try:
            edits, tensors, _ = self._read_experts(Path(file))
            with self._lock:
                first = self.experts.next_id
                edits = [replace(edit, id=first + i) for i, edit in enumerate(edits)]
                self.experts.add(tensors, edits)
        except Exception as error:
            raise ValueError(f"the experts in {file} do not load: {error!r}") from error
        return edits

    def _read_experts(self, file: Path) -> tuple[list[Edit], dict[str, Tensor], int]:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            if opened.metadata()["editor"] != self._digest():
                raise ValueError("they were made by another editor")
        content = json.loads(tensors.pop("edits").numpy().tobytes())
        return [Edit(**record) for record in content["edits"]], tensors, int(content["next_id"])

    def _networks(self) -> dict[str, Tensor]:
        return {key: value.cpu().contiguous() for key, value in self.state_dict().items()}

    def _digest(self) -> str:
        """Identify the editor by all that its experts depend on."""
        lasting = replace(self.config, threshold=None, newest_wins=True)
        digest = hashlib.sha256(repr(lasting).encode())
        for key, value in sorted(self._networks().items()):
            digest.update(key.encode())
            digest.update(value.numpy())
        return digest.hexdigest()[:16]

    def _backbone(self) -> dict:
        """Describe the model well enough to tell another one."""
        config, text = self.model.config, self.model.config.get_text_config()
        described = {"model_type": config.model_type, "text_model_type": text.model_type}
        described |= {"hidden_size": text.hidden_size, "layers": self.frozen.depth}
        weight = self.model.get_input_embeddings().weight
        if not weight.is_meta:  # some weights tell a model from another one of its shape
            described["embeddings"] = weight[:16, 0].float().tolist()
        return described

    @torch.no_grad()  # with gradients, threads that read one weight at once may wait for ever
    def _check_weights(self) -> None:
        # At each edit: sums are several times as fast, and one look at all waits for a GPU once.
        if torch.stack([weight.sum() for weight in self.parameters()]).isfinite().all():
            return
        for name, weight in self.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"the editor's weight {name} holds numbers that are not finite")


def _alike(saved, here) -> bool:
    """Compare what is known of two models; weights may be in another precision."""
    if not isinstance(saved, list) or not isinstance(here, list):
        return saved == here
    saved, here = torch.tensor(saved), torch.tensor(here)
    return saved.shape == here.shape and torch.allclose(saved, here, rtol=0.01, atol=1e-6)


def _write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    draft = file.with_name(file.name + ".new")
    with open(draft, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(draft, file)


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

    def encode(self, images: Sequence, prompts: Sequence, targets: Sequence | None) -> dict:
        """Encode questions that all have an image or all have none; see `LiveEdit.encode`."""
        prompts = [self.checked_text(prompt, "prompt") for prompt in prompts]
        pictures = [checked_picture(image) for image in images if image is not None]
        if pictures and len(pictures) < len(prompts):
            raise ValueError("encode questions with images and without in two calls, not in one")
        texts = [self._prompt_text(prompt, bool(pictures)) for prompt in prompts]
        settings = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            settings["add_special_tokens"] = False  # the template has put them
        if pictures:
            # One list of pictures for each row: the form that all processors read alike.
            rows = [[picture] for picture in pictures]
            inputs = dict(self.processor(images=rows, text=texts, **settings))
            if not (inputs["input_ids"] == self.image_token_id).any(1).all():
                name = type(self.processor).__name__
                raise ValueError(f"{name} finds no place for an image in {texts[0][:80]!r}")
        else:
            inputs = dict(self.tokenizer(texts, **settings))
        if targets is not None:
            targets = [self.checked_text(target, "target") for target in targets]
            inputs = self._append_targets(inputs, texts, targets)
        text_config, length = self.model.config.get_text_config(), inputs["input_ids"].shape[1]
        most = getattr(text_config, "max_position_embeddings", None) or length
        if length > most:
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
        if any(token in text for token in self.image_tokens):
            raise ValueError(f"the {what} {text[:40]!r} holds the image token; pass the picture")
        return text.strip()

    def _prompt_text(self, question: str, has_image: bool) -> str:
        """Render a question by the chat template, or as `<image>\\n{question} The answer is:`."""
        if self.prompt_style == "chat" and getattr(self.processor, "chat_template", None):
            text = self._rendered([question], has_image, add_generation_prompt=True)
            if text is None:
                remedy = "set processor.chat_template = None, or use edit_inputs"
                raise ValueError(f"the chat template does not render {question!r}; {remedy}")
            return text
        token = has_image and not self._processor_places_image_token
        end = " The answer is:" if self.prompt_style == "chat" else ""
        return f"{self.image_token}\n" * token + question + end

    def _rendered(self, said: list[str], has_image: bool, **settings) -> str | None:
        """Render a chat, the user's turn first; None if the template does not show what is said.

        has_image: each turn has a picture; chats of several turns are rendered without.
        """
        for as_parts in (True, False):  # most templates take a list of parts, old ones a string
            turns = []
            for i, text in enumerate(said):
                parts = [{"type": "image"}] * has_image + [{"type": "text", "text": text}]
                content = parts if as_parts else f"{self.image_token}\n" * has_image + text
                turns.append({"role": ("user", "assistant")[i % 2], "content": content})
            with contextlib.suppress(Exception):  # of the template: it did not expect this form
                rendered = rest = self.processor.apply_chat_template(turns, **settings)
                for text in said:
                    rest = rest.replace(text, "")
                shown = all(text in rendered for text in said)
                if shown and "'type'" not in rest:  # not the list of parts as it prints
                    return rendered
        return None

    def _is_special(self, token: int) -> bool:
        added = self.tokenizer.added_tokens_decoder.get(token)
        return token in self.tokenizer.all_special_ids or bool(added and added.special)

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
        opens = self._is_special(last) or any(map(str.isspace, ending))
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
        config, own = getattr(self.model, "generation_config", None), self.tokenizer.eos_token_id
        ends = getattr(config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [own if ends is None else ends]
        # An end that begins texts is a leftover of another tokenizer.
        return own if own in ends or ends[0] == self.tokenizer.bos_token_id else ends[0]

    def has_image(self, ids: Tensor) -> bool:
        """Tell whether any row of input_ids (B, T) has an image token."""
        return bool((ids == self.image_token_id).any())

    def _per_token(self, inputs: dict) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Give input_ids, attention mask and labels, each (B, T)."""
        ids, mask, labels = (inputs.get(k) for k in ("input_ids", "attention_mask", "labels"))
        if isinstance(mask, dict):  # one for each kind of layer
            mask = first_of(mask, *mask)
        if isinstance(mask, Tensor) and mask.dim() == 4:  # prepared for a static cache
            own = mask[:, 0, :, : ids.shape[1]].diagonal(dim1=-2, dim2=-1)
            mask = own if own.dtype == torch.bool else own == 0
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            raise ValueError("attention_mask must be a tensor (B, T), as input_ids are")
        if labels is not None:  # with logits_to_keep they are those of the last tokens
            if len(labels) != len(ids) or labels.shape[1] > ids.shape[1]:
                raise ValueError(f"labels are {tuple(labels.shape)}, input_ids {tuple(ids.shape)}")
            labels = F.pad(labels, (ids.shape[1] - labels.shape[1], 0), value=IGNORE)
        return ids, mask, labels

    def masks_of(self, inputs: dict, device: torch.device) -> RowMasks:
        """Find the image, prompt and answer rows: of a chat, the last question is the prompt."""
        ids, mask, labels = self._per_token(inputs)
        special = torch.tensor(self._special_ids, device=ids.device)
        masks = row_masks(ids, mask, labels, self.image_token_id, special)
        masks = masks._replace(prompt=masks.prompt & self._last_turn(ids, labels))
        return RowMasks(*(mask.to(device) for mask in masks))

    def _last_turn(self, ids: Tensor, labels: Tensor | None) -> Tensor:
        """Find the last question of a chat of several turns, and what follows: (B, T) bool."""
        opening = self.turn_opening
        n = len(opening)
        if not 0 < n <= ids.shape[1]:
            return torch.ones_like(ids, dtype=torch.bool)
        if labels is not None:  # no answer opens a turn
            ids = ids.masked_fill(labels != IGNORE, IGNORE)
        opens = (ids.unfold(1, n, 1) == torch.tensor(opening, device=ids.device)).all(-1)
        left = opens.flip(1).cumsum(1).flip(1)  # turns that open here or later
        left = torch.cat([left[:, :1].expand(-1, n - 1), left], dim=1)  # or end here
        return left == 0

    def asked_alone(self, inputs: dict) -> dict:
        """Leave out what a chat says between its picture and its last question.

        Differs from the paper, whose prompts are single questions: the last one of a chat is routed
        as if it were the first. Returns the inputs themselves where nothing is left out.
        """
        ids, mask, labels = self._per_token(inputs)
        earlier = ~self._last_turn(ids, labels)
        if inputs.get("inputs_embeds") is not None or not earlier.any():
            return inputs
        pictures = earlier & (ids == self.image_token_id)
        seen = pictures | earlier & (ids == getattr(self.model.config, "video_token_id", -1))
        said = earlier & (seen.flip(1).cumsum(1).flip(1) == 0) & pictures.any(1, keepdim=True)
        for row, behind in zip(ids.tolist(), said, strict=True):
            self._leave_picture_closing(row, behind)
        if not said.any():
            return inputs
        asked = ~said if mask is None else ~said & mask.bool()
        order = torch.argsort((~asked).to(torch.uint8), dim=1, stable=True)
        asked, padding = asked.gather(1, order), self.tokenizer.pad_token_id
        alone = {"input_ids": ids.gather(1, order).masked_fill(~asked, padding)}
        alone["attention_mask"] = asked.long()
        if labels is not None:
            alone["labels"] = labels.gather(1, order).masked_fill(~asked, IGNORE)
        for key, value in inputs.items():
            if key in OF_WHOLE_CHATS or key in alone:
                continue
            if key == "position_ids" and value is not None:  # (B, T), or more of them (Qwen-VL)
                moved = value - said.cumsum(1)
                value = moved.gather(-1, order.expand_as(moved))
            elif isinstance(value, Tensor) and value.shape[:2] == ids.shape:
                index = order.reshape(order.shape + (1,) * (value.dim() - 2))
                value = value.gather(1, index.expand(order.shape + value.shape[2:]))
            alone[key] = value
        return alone

    @cached_property
    def _special_ids(self) -> list[int]:
        text = self.model.config.get_text_config()
        ids = (text.bos_token_id, text.eos_token_id, text.pad_token_id)
        tokenizer_ids = self.tokenizer.all_special_ids if self.tokenizer else ids
        return [i for i in tokenizer_ids if isinstance(i, int)]

    @cached_property
    def turn_opening(self) -> list[int]:
        """The tokens between an answer and the next question of a chat; none without a template."""
        said = ["first", "second", "third"]
        chat = self.processor and self._rendered(said, has_image=False)
        if not chat:
            return []
        between = chat.partition("second")[2].partition("third")[0].rstrip()
        opening = between.lstrip()
        space = between.removesuffix(opening)[-1:]
        if space == " ":  # it belongs to the word behind it
            return self._tokens_behind(":", space + opening)
        return self._tokens_behind(space or ":", opening)

    def _leave_picture_closing(self, ids: list[int], said: Tensor) -> None:
        """Take out of said (T,) what only separates a picture from its question."""
        for i in said.nonzero().flatten().tolist():
            if not self._is_special(ids[i]) and self.tokenizer.decode([ids[i]]).strip():
                break
            said[i] = False


def checked_picture(image: Image.Image) -> Image.Image:
    """Convert to RGB. Raises TypeError or ValueError for what is no picture, or cannot be read."""
    if not isinstance(image, Image.Image) or not all(image.size):
        raise TypeError(f"an image must be a PIL image with pixels, not {image!r:.60}")
    try:
        return image.convert("RGB")
    except Exception as error:  # PIL reads a file's pixels only now; its readers raise all kinds
        name = getattr(image, "filename", "") or repr(image)
        raise ValueError(f"the image {name} cannot be read, or is closed: {error!r}") from None
