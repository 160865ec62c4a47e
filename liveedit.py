"""LiveEdit: lifelong knowledge editing of a frozen Hugging Face vision-language model, by forward hooks.

    model = AutoModelForImageTextToText.from_pretrained("tiny-llava")
    processor = AutoProcessor.from_pretrained("tiny-llava")
    editor = LiveEdit.from_pretrained(model, processor, "output/editor")   # a trained editor; attaches its hooks
    edit = editor.edit(image, "What shape is this?", "heart")
    inputs = editor.encode(image, "Which shape can you see here?")
    model.generate(**inputs, max_new_tokens=20)                            # edited; plain Hugging Face from here on
    with editor.disabled():
        model.generate(**inputs, max_new_tokens=20)                        # the original, bit for bit
    editor.explain(inputs)                                                 # which edits were kept, and their weights
    editor.forget(edit.id); editor.reset(); editor.detach()

Copy this file with generator.py and router.py into another codebase; together they edit, train, save and load.
B rows of a batch, T sequence, D hidden size, N experts, R rank, K slots, M module width.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import time
import weakref
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from generator import ExpertGenerator, apply_experts
from router import Query, Router, Routing, Rows, hard_filter_loss, soft_router_loss, text_similarity

CONFIG_FILE = "liveedit_config.json"
MOST_PARTS = 20  # files of experts in a saved editor, before they are written as one
IGNORE = -100  # Hugging Face's label of tokens that are no answer


@dataclass(frozen=True)
class LiveEditConfig:
    """Everything that defines an editor; the defaults are the paper's for 7B models."""

    layer: int | None = None  # edit layer, counted from 0; None: two thirds of the depth (21 of 32, 3 of 6)
    module_dim: int = 1024  # width M of generator and extractors
    rank: int = 4  # rank R of an expert
    slots: int = 4  # learned queries K of each routing feature
    heads: int = 8  # attention heads of generator and extractors
    sentinel_tokens: int = 576  # rows of the vision sentinel Theta: about the image tokens of one picture
    similarity: str = "cosine"  # of the visual hard filter: "cosine", or "dot" as in the official code
    threshold: float | None = None  # fixed threshold of the filter; None: the learned sentinel's similarity
    gain: float = 0.2  # experts are scaled by gain / sqrt(rank)
    same_fact: str = "exact"  # older edits that a new one replaces: "exact", of the same picture and question, or "router", those too that it takes for the same fact
    prompt_style: str = "chat"  # of encode(): "chat" (the processor's template, or "The answer is:"), or "official" (the prompt as it is)

    def __post_init__(self):
        for name in ("module_dim", "rank", "slots", "heads", "sentinel_tokens"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"LiveEditConfig.{name} must be a positive integer, not {getattr(self, name)!r}")
        if self.similarity not in ("cosine", "dot"):
            raise ValueError(f'LiveEditConfig.similarity must be "cosine" or "dot", not {self.similarity!r}')
        if self.same_fact not in ("router", "exact"):
            raise ValueError(f'LiveEditConfig.same_fact must be "router" or "exact", not {self.same_fact!r}')
        if self.prompt_style not in ("chat", "official"):
            raise ValueError(f'LiveEditConfig.prompt_style must be "chat" or "official", not {self.prompt_style!r}')
        if self.threshold is not None and self.similarity == "cosine" and not -1 <= self.threshold <= 1:
            raise ValueError(f"LiveEditConfig.threshold is compared with a cosine and must lie in [-1, 1], not {self.threshold}")
        if self.gain <= 0:
            raise ValueError(f"LiveEditConfig.gain must be positive, not {self.gain}")


# ------------------------------------------------------------------------------------------------ the model's parts


def find_decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """The decoder layers of a Hugging Face vision-language model and the norm behind the last one.

    Raises TypeError with what was found if the model has none, or is wrapped by something that LiveEdit does not know.
    """
    for attribute, what, remedy in (("_orig_mod", "compiled", "pass the model itself, not what torch.compile made of it"),
                                    ("peft_config", "wrapped by PEFT", "call merge_and_unload() first and pass its result"),
                                    ("hf_quantizer", "quantised", "load it in bfloat16, which LiveEdit is tested with")):
        if getattr(model, attribute, None) is not None:
            raise TypeError(f"this {type(model).__name__} is {what}; {remedy}")
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not hasattr(decoder, "layers") and hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()  # BLIP-2's decoder is a whole causal language model
    layers = getattr(decoder, "layers", None)
    norm = getattr(decoder, "norm", None) or getattr(decoder, "final_layer_norm", None)
    if not isinstance(layers, nn.ModuleList) or norm is None:
        raise TypeError(f"{type(model).__name__} is no vision-language model that LiveEdit can edit: its decoder "
                        f"({type(decoder).__name__}) has no `layers` with a norm behind them")
    return layers, norm


def find_inner_model(model: nn.Module) -> nn.Module | None:
    """The language model whose own `generate` does the work of the top-level one (BLIP-2), past the top-level forward; else None."""
    decoder = model.get_decoder()
    return decoder if decoder is not model and hasattr(decoder, "generate") else None


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; accelerate keeps the weights of offloaded modules elsewhere."""
    placed = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(placed) if placed is not None else next(module.parameters()).device


def hidden_of(output: Tensor | tuple) -> Tensor:
    """A decoder layer returns its hidden states (B, T, D), or a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


def with_hidden(output: Tensor | tuple, hidden: Tensor) -> Tensor | tuple:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def cache_in(values: dict):
    """The KV cache among a call's arguments or outputs: `cache` since transformers 5.24, `past_key_values` before."""
    return values["cache"] if values.get("cache") is not None else values.get("past_key_values")


def pictures_in(kwargs: dict):
    """The pictures of a call: `generate` sends them encoded, the same object at each step."""
    return kwargs["pixel_values"] if kwargs.get("pixel_values") is not None else kwargs.get("mm_encoder_outputs")


class RowMasks(NamedTuple):
    """Which rows of the hidden states are what, each (B, T) bool."""

    image: Tensor
    prompt: Tensor
    answer: Tensor


def row_masks(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, image_token_id: int,
              special_ids: Tensor) -> RowMasks:
    """Image rows; prompt rows: the other tokens behind the first image, or, where none follow, all text tokens but the
    leading special ones; answer rows: where labels are not -100. Answer rows are never prompt rows."""
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape):
        raise ValueError("LiveEdit needs an attention_mask of the shape of input_ids (no prepared masks, no static cache with padding)")
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    image = (input_ids == image_token_id) & attended
    answer = torch.zeros_like(image) if labels is None else labels != IGNORE
    text = attended & ~image & ~answer
    leading = (torch.isin(input_ids, special_ids) | ~attended).cumprod(1).bool()
    behind = text & (image.cumsum(1) > 0)
    return RowMasks(image, torch.where(behind.any(1, keepdim=True), behind, text & ~leading), answer)


class _Stop(Exception):
    """Ends a forward pass at the edit layer, when all that is needed has been read."""


class Question(NamedTuple):
    """A question to the model, with the answer wanted where one is needed."""

    image: Image.Image | None
    prompt: str
    target: str | None = None


class States(NamedTuple):
    """What the frozen lower layers make of a batch: all that editing and training need of it.

    hidden (B, T, D) the unedited output of the edit layer; labels (B, T) with -100 outside of the answers;
    args, kwargs: the other arguments of the edit layer's call, to run the layers above.
    """

    hidden: Tensor
    masks: RowMasks
    labels: Tensor
    args: tuple
    kwargs: dict

    def select(self, rows: Tensor) -> "States":
        """The given rows of the batch."""
        return self._map([self], lambda parts: parts[0][rows])

    @classmethod
    def concat(cls, parts: Sequence["States"]) -> "States":
        """Batches of equal T below one another."""
        return parts[0] if len(parts) == 1 else cls._map(parts, torch.cat)

    @classmethod
    def _map(cls, parts: Sequence["States"], change) -> "States":
        def walk(values):
            if isinstance(values[0], Tensor):
                per_row = all(v.dim() > 1 and len(v) == len(p.hidden) for v, p in zip(values, parts))
                return change(values) if per_row else values[0]
            if isinstance(values[0], dict):
                return {key: walk([v[key] for v in values]) for key in values[0]}
            if isinstance(values[0], tuple):
                items = [walk(list(v)) for v in zip(*values)]
                return type(values[0])(*items) if hasattr(values[0], "_fields") else tuple(items)
            return values[0]

        return cls(*(walk(list(values)) for values in zip(*parts)))


# ------------------------------------------------------------------------------------------------ the expert repository


@dataclass
class Edit:
    """One edit as the repository keeps it; pictures are kept as a digest only."""

    id: int
    prompt: str
    target: str
    image_digest: str
    time: float  # seconds since the epoch
    replaces: list[int] = field(default_factory=list)  # ids of all older edits of the same fact, whether in force at the time or not
    superseded: int | None = None  # the newest of these that is not forgotten: what this edit put out of force

    @property
    def fact(self) -> tuple[str, str]:
        """Two edits of the same picture and question speak of one fact, always."""
        return self.image_digest, " ".join(self.prompt.lower().split())


def image_digest(image: Image.Image) -> str:
    """A digest of size and pixels."""
    image = image.convert("RGB")
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]


class ExpertRepository(nn.Module):
    """E_t = E_{t-1} + {(U, V, phi_hat, psi_hat)}: preallocated and grown by doubling. Superseded experts stay, but inactive.

    An expert is in force unless an edit that replaces it is there. So forgetting an edit gives what never having made it gives.
    """

    TENSORS = ("U", "V", "visual_keys", "text_keys")

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        for name in self.TENSORS:
            self.register_buffer(f"_{name}", torch.zeros(0, *shapes[name]), persistent=False)
        self.register_buffer("_active", torch.zeros(0, dtype=torch.bool), persistent=False)
        self.edits: list[Edit] = []  # in the order of the slots
        self.next_id = 1
        self._slots: dict[int, int] = {}
        self._facts: dict[tuple[str, str], list[int]] = {}  # ids of the edits of the same picture and question
        self._replaced_by: dict[int, set[int]] = {}  # of each replaced edit, those that are there

    def __len__(self) -> int:
        return len(self.edits)

    # The slots in use of each buffer, (N, ...).
    U, V, visual_keys, text_keys, active = (
        property(lambda self, buffer=f"_{name}": getattr(self, buffer)[:len(self.edits)])
        for name in ("U", "V", "visual_keys", "text_keys", "active"))

    def __contains__(self, edit_id: int) -> bool:
        return edit_id in self._slots

    def slot(self, edit_id: int) -> int:
        return self._slots[edit_id]

    def add(self, tensors: dict[str, Tensor], edits: list[Edit]) -> None:
        """Append experts, each tensor (n, ...) for n edits; what they replace becomes inactive."""
        start, end = len(self.edits), len(self.edits) + len(edits)
        if end > len(self._active):
            self._grow(max(end, 2 * len(self._active), 16))
        for name in self.TENSORS:
            getattr(self, f"_{name}")[start:end] = tensors[name].detach()
        self._active[start:end] = True
        for slot, edit in enumerate(edits, start=start):
            self.edits.append(edit)
            self._slots[edit.id] = slot
            self._facts.setdefault(edit.fact, []).append(edit.id)
            self.next_id = max(self.next_id, edit.id + 1)
        for edit in edits:
            self.replace(edit, edit.replaces)

    def replace(self, edit: Edit, older: list[int]) -> None:
        """From now on this edit replaces the older ones, as far as they are there."""
        edit.replaces = sorted({*edit.replaces, *older})
        present = [old for old in edit.replaces if old in self._slots]
        edit.superseded = max(present, default=None)
        for old in edit.replaces:
            self._replaced_by.setdefault(old, set()).add(edit.id)
        self._active[[self._slots[old] for old in present]] = False

    def replace_same_facts(self, edits: list[Edit]) -> None:
        """Each of these edits replaces the older ones of the same picture and question."""
        for edit in edits:
            self.replace(edit, [old for old in self._facts[edit.fact] if old < edit.id])

    def remove(self, edit_id: int) -> Edit:
        """Remove one expert; what only it had replaced is in force again. Raises KeyError for an unknown id."""
        if edit_id not in self._slots:
            raise KeyError(f"there is no edit with id {edit_id!r}; editor.edits() lists those in force")
        slot, last = self._slots.pop(edit_id), len(self.edits) - 1
        edit, moved = self.edits[slot], self.edits.pop()
        self._facts[edit.fact].remove(edit_id)
        if slot != last:  # the last expert moves into the gap
            for name in (*self.TENSORS, "active"):
                buffer = getattr(self, f"_{name}")
                buffer[slot] = buffer[last]
            self.edits[slot] = moved
            self._slots[moved.id] = slot
        for old in edit.replaces:
            self._replaced_by[old].discard(edit_id)
            if old in self._slots:
                self._active[self._slots[old]] = not self._replaced_by[old]
        for newer in self._replaced_by.get(edit_id, ()):
            other = self.edits[self._slots[newer]]
            other.superseded = max((old for old in other.replaces if old in self._slots), default=None)
        return edit

    def _grow(self, capacity: int) -> None:
        for name in (*self.TENSORS, "active"):
            old = getattr(self, f"_{name}")
            new = old.new_zeros(capacity, *old.shape[1:])
            new[:len(old)] = old
            setattr(self, f"_{name}", new)

    def bytes_per_edit(self) -> int:
        return sum(getattr(self, f"_{name}")[:1].new_empty(getattr(self, f"_{name}").shape[1:]).nbytes for name in self.TENSORS)


# ------------------------------------------------------------------------------------------------ the editor


@dataclass
class _Call:
    """One call of the top-level model, and the route that later calls may continue."""

    masks: RowMasks | None  # of a prefill; None while decoding
    ids: Tensor | None = None  # input_ids of this call
    routing: Routing | None = None
    with_image: bool = False  # has any row of the prefill an image?
    prompt_ids: Tensor | None = None  # input_ids of the prefill
    length: int = 0  # tokens of the sequence so far
    pictures: object = None  # what the prefill got as pictures
    used: bool = False  # the edit layer has run


# Roles of the rows of a training batch.
EDIT, GENERALITY, LOCALITY, HARD_LOCALITY = range(4)


class LiveEdit(nn.Module):
    """Edits a frozen vision-language model; its own weights are never touched, and `detach` removes every trace."""

    def __init__(self, model: nn.Module, processor=None, config: LiveEditConfig = LiveEditConfig()):
        """Attaches at once. Raises TypeError or ValueError if the model has no decoder layers or image token, or the config does not fit.

        processor: of Hugging Face; may be None if all inputs are prepared elsewhere (`edit_inputs`, `capture_inputs`).
        """
        super().__init__()
        layers, norm = find_decoder_layers(model)
        self.config = config = replace(config, layer=len(layers) * 21 // 32 if config.layer is None else config.layer)
        if not 0 <= config.layer < len(layers):
            raise ValueError(f"LiveEditConfig.layer is {config.layer}, but {type(model).__name__} has layers 0 to {len(layers) - 1}")
        if getattr(model.config, "image_token_id", None) is None:
            raise TypeError(f"{type(model).__name__} has no config.image_token_id: LiveEdit cannot tell where its image rows are")
        # Held outside of nn.Module's registry: the model is not ours to move, train or save.
        self.__dict__.update(model=model, processor=processor, _layers=layers, _final_norm=norm, _inner=find_inner_model(model))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        width, c = model.config.get_text_config().hidden_size, config
        self.generator = ExpertGenerator(width, c.module_dim, c.rank, c.heads, c.gain)
        self.router = Router(width, c.module_dim, c.slots, c.heads, c.sentinel_tokens, c.similarity, c.threshold)
        self.norm = nn.LayerNorm(width)  # of the residual, shared by all experts
        self.experts = ExpertRepository({"U": (c.rank, width), "V": (c.rank, width),
                                         "visual_keys": (c.slots, c.module_dim), "text_keys": (c.slots, c.module_dim)})
        self.trained_steps = 0
        self._special_ids = torch.tensor(self._find_special_ids())
        self._arguments = {module: list(inspect.signature(module.forward).parameters) for module in (model, self._inner) if module is not None}
        self._handles: list = []
        self._disabled = 0  # how many `disabled()` blocks are open
        self._call: _Call | None = None
        self._routes = weakref.WeakKeyDictionary()  # KV cache of a prefill -> its routing
        self._uncached: _Call | None = None  # the last prefill without a cache
        self._embedded: Tensor | None = None  # the ids that were embedded last, of a model with an inner model
        self.to(device_of(layers[config.layer]))
        self.attach()

    def _find_special_ids(self) -> list[int]:
        if self.processor is not None:
            return sorted(self._tokenizer.all_special_ids)
        text = self.model.config.get_text_config()
        return sorted({i for i in (text.bos_token_id, text.eos_token_id, text.pad_token_id) if isinstance(i, int)})

    @property
    def _tokenizer(self):
        if self.processor is None:
            raise RuntimeError("this editor has no processor: use edit_inputs and capture_inputs with inputs prepared elsewhere")
        return self.processor.tokenizer

    # -------------------------------------------------------------------------------------------- hooks

    def attach(self) -> "LiveEdit":
        """Register the hooks. Raises RuntimeError if they are registered already."""
        if self._handles:
            raise RuntimeError("this editor is attached already; call detach() first")
        if any(isinstance(getattr(hook, "__self__", None), LiveEdit) for hook in self.model._forward_pre_hooks.values()):
            raise RuntimeError("another editor is attached to this model; call its detach() first")
        self._handles = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self._layers[self.config.layer].register_forward_hook(self._after_layer),
            self.model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)]
        if self._inner is not None:
            self._handles += [
                self.model.get_input_embeddings().register_forward_pre_hook(self._before_embedding),
                self._inner.register_forward_pre_hook(self._before_inner, with_kwargs=True),
                self._inner.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)]
        return self

    def detach(self) -> nn.Module:
        """Remove our hooks, and only ours; harmless when already detached. Returns the bare model."""
        while self._handles:
            self._handles.pop().remove()
        self._call = self._uncached = self._embedded = None
        self._routes.clear()
        return self.model

    @contextlib.contextmanager
    def disabled(self):
        """Inside, the model is the original, exactly. The hooks stay where they are, so their order among others' hooks does too."""
        self._disabled += 1
        try:
            yield self.model
        finally:
            self._disabled -= 1

    def _before_model(self, model, args, kwargs):
        self._begin(dict(zip(self._arguments[model], args)) | kwargs)

    def _before_embedding(self, embedding, args):
        self._embedded = args[0] if args else None

    def _before_inner(self, inner, args, kwargs):
        """BLIP-2's `generate` runs its inner language model on embeddings: their ids are those that were embedded last."""
        values, ids = dict(zip(self._arguments[inner], args)) | kwargs, self._embedded
        if self._call is not None and self._call.ids is ids is not None:
            return  # within a call of the top-level model
        embeddings = values.get("inputs_embeds")
        if values.get("input_ids") is None and ids is not None and embeddings is not None and ids.shape[1] == embeddings.shape[1]:
            values["input_ids"] = ids.repeat_interleave(len(embeddings) // len(ids), 0)  # beams repeat each row
        self._begin(values)

    def _begin(self, values: dict) -> None:
        """Prefill or decoding? Which rows are image, prompt and answer? values: the arguments of the call, by name."""
        self._call = None
        ids, cache, pictures = values.get("input_ids"), cache_in(values), pictures_in(values)
        past = int(cache.get_seq_length()) if cache is not None else 0
        if cache is not None and past == 0:
            self._routes.pop(cache, None)  # a cache that is filled anew
        if self._disabled:
            return
        if not len(self.experts):
            if past == 0:
                self._call = _Call(None, ids, with_image=True)
            return
        if ids is None:
            raise ValueError("LiveEdit reads input_ids to find image and prompt; embeddings alone cannot be routed. "
                             "Pass input_ids, or use `with editor.disabled():`")
        if past > 0:
            self._call = self._continued(cache, ids)
        elif values.get("labels") is None and self._extends_uncached(ids, pictures):
            # Generation without a cache sends all ids so far at each step: the prompt's route holds.
            self._call = replace(self._uncached, masks=None, ids=ids, length=ids.shape[1], used=False)
        else:
            masks = self._masks(values)
            self._call = _Call(masks, ids, with_image=bool(masks.image.any()), prompt_ids=ids, length=ids.shape[1], pictures=pictures)

    def _masks(self, inputs: dict) -> RowMasks:
        ids, labels = inputs["input_ids"], inputs.get("labels")
        if labels is not None:  # with logits_to_keep they are those of the last tokens
            if len(labels) != len(ids) or labels.shape[1] > ids.shape[1]:
                raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(ids.shape)}")
            labels = F.pad(labels, (ids.shape[1] - labels.shape[1], 0), value=IGNORE)
        return row_masks(ids, inputs.get("attention_mask"), labels, self.model.config.image_token_id, self._special_ids.to(ids.device))

    def _extends_uncached(self, ids: Tensor, pictures) -> bool:
        """One token more behind the same prompts and pictures? Only prompts are compared: beams swap what they have generated."""
        last = self._uncached
        return (last is not None and len(ids) == len(last.prompt_ids) and ids.shape[1] == last.length + 1
                and pictures is last.pictures and torch.equal(ids[:, :last.prompt_ids.shape[1]], last.prompt_ids))

    def _continued(self, cache, ids: Tensor) -> "_Call":
        """The route of the prefill that filled this cache."""
        if cache not in self._routes:
            raise RuntimeError("this KV cache was not filled by a prefill with the edits attached, or an edit was forgotten since; "
                               "prefill the whole prompt again")
        call = self._routes[cache]
        if ids.shape[1] > 1 and (call.with_image or bool((ids == self.model.config.image_token_id).any())):
            raise RuntimeError(f"{ids.shape[1]} new tokens continue a KV cache: LiveEdit routes whole prompts (no chunked prefill, no "
                               "second turn on an old cache); pass the whole conversation without past_key_values")
        return replace(call, masks=None, ids=ids, used=False)

    def _after_layer(self, layer, args, output):
        if self._disabled or not len(self.experts):
            return None
        if self._call is None or self._call.used:
            raise RuntimeError("the edit layer was called without the top-level model: LiveEdit routes calls of the whole model only")
        hidden, call = hidden_of(output), self._call
        call.used = True
        if call.masks is not None:
            call.routing = self._route(hidden, RowMasks(*(m.to(hidden.device) for m in call.masks)))
        if call.routing is None:
            return None
        return with_hidden(output, self._edited(hidden, call.routing))

    def _after_model(self, model, args, kwargs, output):
        """Keep the route of a prefill for its decoding steps. Called after an exception too, then without output."""
        if self._disabled:
            return
        call, self._call, self._uncached = self._call, None, None
        if call is None or output is None:
            return
        cache = cache_in(vars(output)) if hasattr(output, "logits") else None
        cache = cache_in(kwargs) if cache is None else cache
        if cache is not None:
            self._routes[cache] = call
        if call.prompt_ids is not None and cache_in(kwargs) is None:
            self._uncached = call

    @torch.no_grad()
    def _route(self, hidden: Tensor, masks: RowMasks) -> Routing | None:
        """Routing of a prefill over all its rows, or None where nothing is edited."""
        rows = masks.image.any(1).nonzero().flatten()
        if not len(rows):
            return None
        if not masks.prompt[rows].any(1).all():
            raise ValueError("a row with an image has no prompt token: labels must be -100 on the prompt")
        routing = self._routing(hidden[rows], RowMasks(*(m[rows] for m in masks)))
        if not len(routing.experts):
            return None
        weights = routing.weights.new_zeros(len(hidden), routing.weights.shape[1])
        weights[rows] = routing.weights
        return routing._replace(weights=weights)

    def _routing(self, hidden: Tensor, masks: RowMasks) -> Routing:
        """Routing of rows that all have an image."""
        hidden = hidden.float()
        query = self.router.query(Rows.gather(hidden, masks.prompt), Rows.gather(hidden, masks.image))
        return self.router.route(query, self.experts.visual_keys, self.experts.text_keys, self.experts.active)

    def _edited(self, hidden: Tensor, routing: Routing) -> Tensor:
        """Eq. (6) on the rows that have an expert; all other rows are copied bit by bit."""
        if len(routing.weights) != len(hidden):
            raise RuntimeError(f"the prefill had {len(routing.weights)} rows, this step has {len(hidden)}: prefill again")
        rows = (routing.weights > 0).any(1).nonzero().flatten()
        U, V = self.experts.U[routing.experts], self.experts.V[routing.experts]
        # Detached: the frozen model's outputs require no gradient because of an edit.
        normed = F.layer_norm(hidden[rows].float(), self.norm.normalized_shape, self.norm.weight.detach(), self.norm.bias.detach(), self.norm.eps)
        residual = apply_experts(normed, U, V, routing.weights[rows])
        return hidden.index_add(0, rows, residual.to(hidden.dtype))

    # -------------------------------------------------------------------------------------------- model inputs

    def encode(self, image: Image.Image | None | Sequence, prompt: str | Sequence[str], target: str | Sequence[str] | None = None) -> dict:
        """Model inputs for one question or lists of them: prompts padded on the left, as `generate` needs it.

        With targets, their tokens and the end of sequence follow, padded on the right, and `labels` mark them (-100 elsewhere).
        The one place that knows the prompt form: the processor's chat template, or `<image>\\n{question} The answer is:`.
        Raises ValueError for an empty prompt or target, or a prompt that holds the image token.
        """
        if isinstance(prompt, str):
            image, prompt, target = [image], [prompt], None if target is None else [target]
        if not len(image) == len(prompt) == (len(prompt) if target is None else len(target)):
            raise ValueError(f"there are {len(image)} images and {len(prompt)} prompts" + (f" and {len(target)} targets" if target is not None else ""))
        inputs = self._processed([None if picture is None else self._rgb(picture) for picture in image], prompt)
        if target is not None:
            inputs = self._append_targets(inputs, target)
        device, dtype = device_of(self.model.get_input_embeddings()), self.model.dtype
        return {key: value.to(device, dtype if value.is_floating_point() else None) for key, value in inputs.items()}

    def _processed(self, images: list[Image.Image | None], prompts: Sequence[str]) -> dict:
        """Rows with an image go through the processor, rows without through the tokenizer (not every processor takes both at once)."""
        tokenizer = self._tokenizer
        texts = [self._prompt_text(prompt, image is not None) for prompt, image in zip(prompts, images)]
        pictured = [i for i, image in enumerate(images) if image is not None]
        plain = [i for i, image in enumerate(images) if image is None]
        settings = dict(padding=True, padding_side="left", return_tensors="pt")
        parts = []
        if pictured:
            parts.append(dict(self.processor(images=[images[i] for i in pictured], text=[texts[i] for i in pictured], **settings)))
        if plain:
            parts.append(dict(tokenizer([texts[i] for i in plain], **settings)))
        if len(parts) == 1:
            return parts[0]
        length, order = max(part["input_ids"].shape[1] for part in parts), torch.tensor(pictured + plain).argsort()
        fill = {"input_ids": tokenizer.pad_token_id}
        left_padded = lambda key, part: F.pad(part[key] if key in part else torch.zeros_like(part["input_ids"]),
                                              (length - part["input_ids"].shape[1], 0), value=fill.get(key, 0))
        per_token = [key for key, value in parts[0].items() if value.shape == parts[0]["input_ids"].shape]
        return parts[0] | {key: torch.cat([left_padded(key, part) for part in parts])[order] for key in per_token}

    @staticmethod
    def _rgb(image: Image.Image) -> Image.Image:
        if not isinstance(image, Image.Image):
            raise TypeError(f"an image must be a PIL image or None, not {type(image).__name__}; open files with PIL.Image.open")
        return image.convert("RGB")

    def _prompt_text(self, question: str, has_image: bool) -> str:
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"a prompt must be a text that is not empty, not {question!r}")
        if (token := str(self.processor.image_token)) in question:
            raise ValueError(f"the prompt {question!r} holds the image token {token}; pass the picture, encode() places the token")
        if self.config.prompt_style == "official" or not getattr(self.processor, "chat_template", None):
            suffix = "" if self.config.prompt_style == "official" else " The answer is:"
            return (f"{token}\n" if has_image and not self._processor_places_image_token else "") + question + suffix
        content = [{"type": "image"}] * has_image + [{"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text.removeprefix(self._tokenizer.bos_token or "")  # the tokenizer adds its own

    @functools.cached_property
    def _processor_places_image_token(self) -> bool:
        """Some processors (BLIP-2, PaliGemma) put the image before any text, others (LLaVA, Idefics3) where the text says so."""
        try:
            ids = self.processor(images=[Image.new("RGB", (64, 64))], text=["?"], return_tensors="pt")["input_ids"]
        except (ValueError, IndexError):  # it found no place for the image
            return False
        return bool((ids == self.model.config.image_token_id).any())

    def _append_targets(self, inputs: dict, targets: Sequence[str]) -> dict:
        """Tokens of prompt and target are made apart: joining the strings would move token boundaries."""
        tokenizer, rows = self._tokenizer, []
        for target in targets:
            if not isinstance(target, str) or not target.strip():
                raise ValueError(f"a target must be a text that is not empty, not {target!r}")
            rows.append(tokenizer(" " + target.strip(), add_special_tokens=False).input_ids + [tokenizer.eos_token_id])
        length, shape = max(map(len, rows)), inputs["input_ids"].shape
        labels = torch.tensor([row + [IGNORE] * (length - len(row)) for row in rows])
        present = labels != IGNORE
        tail = {"input_ids": labels.masked_fill(~present, tokenizer.pad_token_id), "attention_mask": present.long(),
                "token_type_ids": present.long()}  # PaliGemma: 1 hides the target from the prompt's states
        joined = {key: torch.cat([value, tail.get(key, torch.zeros_like(labels)).to(value.dtype)], 1) if value.shape == shape else value
                  for key, value in inputs.items()}
        return joined | {"labels": torch.cat([torch.full(shape, IGNORE), labels], 1)}

    # -------------------------------------------------------------------------------------------- lower and upper layers

    @torch.no_grad()
    def capture(self, questions: Sequence[Question], batch_size: int = 128, progress=lambda chunks: chunks) -> States:
        """Run the frozen lower layers once for questions with targets: everything that editing and training need of them.

        progress: wraps the list of batches, for instance tqdm.
        """
        chunks = [questions[i:i + batch_size] for i in range(0, len(questions), batch_size)]
        inputs = [self.encode([q.image for q in chunk], [q.prompt for q in chunk], [q.target for q in chunk]) for chunk in progress(chunks)]
        answers = [int((i["labels"] != IGNORE).any(0).sum()) for i in inputs]
        prompts = [i["labels"].shape[1] - a for i, a in zip(inputs, answers)]
        # One column of padding more when there are several batches: a batch without any padding would get no mask from the model.
        left = [max(prompts) - p + (len(chunks) > 1) for p in prompts]
        right = [max(answers) - a for a in answers]
        fill = {"input_ids": self._tokenizer.pad_token_id, "labels": IGNORE}
        padded = [{key: F.pad(v, (l, r), value=fill.get(key, 0)) if v.shape == i["input_ids"].shape else v for key, v in i.items()}
                  for i, l, r in zip(inputs, left, right)]
        return States.concat([self.capture_inputs(i) for i in progress(padded)])

    @torch.no_grad()
    def capture_inputs(self, inputs: dict) -> States:
        """Run the frozen lower layers once on inputs prepared elsewhere, with `labels` that are -100 outside of the answers."""
        masks, labels, seen = self._masks(inputs), inputs["labels"], {}

        def stop(layer, args, kwargs, output):
            seen.update(hidden=hidden_of(output), args=args[1:], kwargs={k: v for k, v in kwargs.items() if k != "hidden_states"})
            raise _Stop

        handle = self._layers[self.config.layer].register_forward_hook(stop, with_kwargs=True)
        try:
            with self.disabled(), contextlib.suppress(_Stop):
                self.model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
        finally:
            handle.remove()
        place = seen["hidden"].device
        return States(seen["hidden"], RowMasks(*(m.to(place) for m in masks)), labels.to(place), seen["args"], seen["kwargs"])

    def _upper(self, hidden: Tensor, states: States) -> Tensor:
        """The layers above the edit layer, norm and head; logits (tokens, vocabulary) at the answer tokens of all rows, row by row."""
        for layer in self._layers[self.config.layer + 1:]:
            hidden = hidden_of(layer(hidden, *states.args, **states.kwargs))
        predicting = hidden[:, :-1][states.masks.answer[:, 1:].to(hidden.device)]  # the row before a token predicts it
        return self.model.get_output_embeddings()(self._final_norm(predicting)).to(states.hidden.device).float()

    # -------------------------------------------------------------------------------------------- editing

    def edit(self, image: Image.Image, prompt: str, target: str) -> Edit:
        """From now on the answer to this question about this image is the target."""
        return self.edit_many([Question(image, prompt, target)])[0]

    def edit_many(self, questions: Sequence[Question | tuple], batch_size: int = 128) -> list[Edit]:
        """Edits in batches: the same experts as one by one, each for one pass through the lower layers and the generator.

        Raises RuntimeError on an editor that was never trained, ValueError for a question without image, prompt or target.
        """
        questions = self._checked(questions)
        chunks = [questions[i:i + batch_size] for i in range(0, len(questions), batch_size)]
        return self._add(questions, [self._make_experts(self.capture(chunk)) for chunk in chunks])

    def edit_inputs(self, inputs: dict, questions: Sequence[Question | tuple]) -> list[Edit]:
        """Edits from model inputs prepared elsewhere, one row for each question: `labels` hold the target's tokens, -100 elsewhere.

        For processors that `encode` does not know; the questions are only what the repository keeps of the edits.
        """
        questions = self._checked(questions)
        states = self.capture_inputs(inputs)
        if len(states.hidden) != len(questions) or not all(mask.any(1).all() for mask in states.masks):
            raise ValueError(f"{len(questions)} edits need as many rows with image, prompt and labels each; got {len(states.hidden)} rows")
        return self._add(questions, [self._make_experts(states)])

    def _checked(self, questions: Sequence[Question | tuple]) -> list[Question]:
        if not self.trained_steps:
            raise RuntimeError("this editor was never trained: its experts would be noise. Train it (training_losses, run.py) or "
                               "load a trained one with LiveEdit.from_pretrained")
        questions = [Question(*q) for q in questions]
        for q in questions:
            if q.image is None:
                raise ValueError(f"the edit {q.prompt!r} has no image: the visual filter could never keep it")
            self._rgb(q.image)  # raises if it is no picture
        return questions

    def _add(self, questions: list[Question], made: list[tuple[dict[str, Tensor], Query]]) -> list[Edit]:
        """Nothing is added before all experts are made; then each edit replaces the older ones of the same fact."""
        edits = [Edit(self.experts.next_id + i, q.prompt, q.target, image_digest(q.image), time.time()) for i, q in enumerate(questions)]
        if edits:
            self.experts.add({name: torch.cat([part[name] for part, _ in made]) for name in ExpertRepository.TENSORS}, edits)
            self.experts.replace_same_facts(edits)
            remaining = iter(edits)
            for _, query in made if self.config.same_fact == "router" else ():
                self._replace_by_router([next(remaining) for _ in query.visual], query)
        return edits

    @torch.no_grad()
    def _replace_by_router(self, edits: list[Edit], query: Query) -> None:
        """Each edit replaces the older ones that the router takes for the same fact, seen from the new edit's side."""
        same = self.router.same_fact(query, self.experts.visual_keys, self.experts.text_keys)
        for row, slot in same.nonzero().tolist():
            if self.experts.edits[slot].id < edits[row].id:
                self.experts.replace(edits[row], [self.experts.edits[slot].id])

    @torch.no_grad()
    def _make_experts(self, states: States) -> tuple[dict[str, Tensor], Query]:
        """The tensors of one expert per row, and what a query with the same picture and prompt looks like to the router."""
        hidden = states.hidden.float()
        U, V = self.generator(hidden, states.masks.image | states.masks.prompt | states.masks.answer)
        prompt, image = Rows.gather(hidden, states.masks.prompt), Rows.gather(hidden, states.masks.image)
        tensors = {"U": U, "V": V, "visual_keys": self.router.visual_key(prompt, image), "text_keys": self.router.text_key(prompt)}
        return tensors, self.router.query(prompt, image)

    def edits(self) -> list[Edit]:
        """The edits in force, oldest first."""
        return sorted((e for e, active in zip(self.experts.edits, self.experts.active.tolist()) if active), key=lambda e: e.id)

    def forget(self, edit_id: int) -> Edit:
        """As if this edit had never been made: what it had replaced is in force again. Raises KeyError for an unknown id."""
        edit = self.experts.remove(edit_id)
        self._forget_routes()
        return edit

    def _forget_routes(self) -> None:
        """Kept routes hold slots of the repository: after a removal they would name other experts."""
        self._routes.clear()
        self._uncached = None

    def reset(self) -> None:
        """Forget all edits: the original model, bit for bit. Ids are not used again."""
        for edit in list(self.experts.edits)[::-1]:
            self.experts.remove(edit.id)
        self._forget_routes()

    @torch.no_grad()
    def explain(self, inputs: dict) -> list[list[dict]]:
        """For each row of `inputs` the edits that the filter kept, heaviest first: id, prompt, target, similarity, threshold, weight."""
        labels = inputs.get("labels", torch.full_like(inputs["input_ids"], IGNORE))
        inputs = inputs | {"labels": labels}
        report: list[list[dict]] = [[] for _ in labels]
        if not len(self.experts):
            return report
        states = self.capture_inputs(inputs)
        rows = states.masks.image.any(1).nonzero().flatten()
        if not len(rows):
            return report
        routing = self._routing(states.hidden[rows], RowMasks(*(m[rows] for m in states.masks)))
        for row, weights, similarity, threshold in zip(rows.tolist(), routing.weights, routing.similarity, routing.threshold):
            for n in weights.nonzero().flatten().tolist():
                edit = self.experts.edits[routing.experts[n]]
                report[row].append({"id": edit.id, "prompt": edit.prompt, "target": edit.target, "threshold": threshold.item(),
                                    "similarity": similarity[routing.experts[n]].item(), "weight": weights[n].item()})
            report[row].sort(key=lambda kept: -kept["weight"])
        return report

    # -------------------------------------------------------------------------------------------- training

    def training_losses(self, states: States, role: Tensor, owner: Tensor, text_locality: Rows | None = None) -> dict[str, Tensor]:
        """All losses of one batch of B >= 2 edits; "total" is their sum, every weight 1.

        states: n rows with images; role (n,) one of EDIT, GENERALITY, LOCALITY, HARD_LOCALITY; owner (n,) the row's edit, 0 to B-1, and the
        B rows of role EDIT stand in the order of their owners. text_locality: prompt rows of text-only questions, for Eq. (16).
        """
        batch = int((role == EDIT).sum())
        if batch < 2 or not torch.equal(owner[role == EDIT], torch.arange(batch, device=owner.device)):
            raise ValueError(f"a batch needs at least two edits (Eq. 15 takes another edit as negative), in the order of their owners; got {batch}")
        hidden, masks = states.hidden.float(), states.masks
        prompt, image = Rows.gather(hidden, masks.prompt), Rows.gather(hidden, masks.image)
        follows = (role == EDIT) | (role == GENERALITY)
        edits = (role == EDIT).nonzero().flatten()

        U, V = self.generator(hidden[edits], (masks.image | masks.prompt | masks.answer)[edits])
        text_keys = self.router.text_key(prompt)
        query = self.router.query(prompt, image)
        weights = soft_weights_of_subset(text_similarity(query.text, text_keys[edits]), owner, role)
        edited = hidden + apply_experts(self.norm(hidden), U, V, weights)
        losses = self._editing_losses(edited.to(states.hidden.dtype), states, follows, role, batch)

        # Eq. (12-16): one random pick of {edit, generality} goes through the edit side.
        # Differs from the paper: all of them, not one random pick, go through the input side; they are there anyway.
        noise = torch.rand(len(role), device=role.device).masked_fill(~follows, -1)
        picks = torch.stack([torch.where(owner == b, noise, -1).argmax() for b in range(batch)])
        visual_keys = self.router.visual_key(prompt.select(picks), image.select(picks))
        losses["filter"] = hard_filter_loss(
            self.router.visual_logits(self.router.visual_similarity(query.visual, visual_keys)),
            self.router.visual_logits(self.router.sentinel_similarity(query)), owner, ~follows)
        negative_keys = [text_keys[~follows]] + ([] if text_locality is None else [self.router.text_key(text_locality)])
        scores = text_similarity(query.text[follows], torch.cat([text_keys[picks], *negative_keys]))
        other = (owner[follows] + torch.randint(1, batch, owner[follows].shape, device=owner.device)) % batch
        losses["sigmoid"], losses["softmax"] = soft_router_loss(scores, owner[follows], other)
        losses["total"] = sum(losses.values())
        self.trained_steps += torch.is_grad_enabled()
        return losses

    def _editing_losses(self, edited: Tensor, states: States, follows: Tensor, role: Tensor, batch: int) -> dict[str, Tensor]:
        """Eq. (8-11): means over a row's answer tokens, sums over the rows of a sample, means over samples."""
        row = states.masks.answer.nonzero()[:, 0]  # (tokens,) the row of each answer token
        share = 1 / (states.masks.answer.sum(1)[row] * batch)
        log_probs = self._upper(edited, states).log_softmax(-1)
        wrong = -log_probs.gather(1, states.labels[states.masks.answer][:, None]).squeeze(1) * share
        drift = wrong.new_zeros(1)
        if not follows.all():
            with torch.no_grad():
                untouched = states.select((~follows).nonzero().flatten())
                base = self._upper(untouched.hidden, untouched).log_softmax(-1)
            drift = (base.exp() * (base - log_probs[~follows[row]])).sum(-1) * share[~follows[row]]
        return {"reliability": wrong[role[row] == EDIT].sum(),  # Eq. (8)
                "generality": wrong[role[row] == GENERALITY].sum(),  # Eq. (9, 10)
                "locality": drift.sum()}  # Eq. (11): KL( f_base || f_edited )

    # -------------------------------------------------------------------------------------------- keeping

    def fingerprint(self) -> dict:
        """What a saved editor needs to fit its backbone."""
        config, text = self.model.config, self.model.config.get_text_config()
        vision = getattr(config, "vision_config", None)
        return {"model_type": config.model_type, "text_model_type": text.model_type, "hidden_size": text.hidden_size, "layers": len(self._layers),
                "heads": text.num_attention_heads, "vocabulary": text.vocab_size, "image_token_id": config.image_token_id,
                "image_size": getattr(vision, "image_size", None), "patch_size": getattr(vision, "patch_size", None)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write editor and edits: `liveedit_config.json`, the networks in one file, the experts in others.

        Safe against a crash at any moment: the config file names the others and is replaced last. Into a folder that holds the same editor only
        new edits are written, as one file more, until there are MOST_PARTS of them; then the experts are written anew.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        networks = self._networks()
        digest = _digest(networks)
        older, parts, saved = self._saved_parts(folder, digest)
        new = [edit for edit in self.experts.edits if saved.get(edit.id) != _lasting(edit)]
        foreign = any(edit.id in saved for edit in new)  # the same id for another edit
        if foreign or len(parts) >= MOST_PARTS or sum(i not in self.experts for i in saved) > len(self.experts):
            parts, saved, new = [], {}, self.experts.edits
        if new:
            parts.append(f"experts-{time.time_ns()}.safetensors")
            self._write_experts(folder / parts[-1], new, digest)
        network_file = f"networks-{digest}.safetensors"
        if not (folder / network_file).is_file():
            _write_tensors(folder / network_file, networks, {})
        content = {"config": asdict(self.config), "backbone": self.fingerprint(), "trained_steps": self.trained_steps, "editor": digest,
                   "networks": network_file, "experts": parts, "forgotten": [i for i in saved if i not in self.experts],
                   "next_id": self.experts.next_id}
        draft = folder / (CONFIG_FILE + ".new")
        with open(draft, "w") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, folder / CONFIG_FILE)
        for name in older.difference((network_file, *parts)):  # only what the older save named: other files are not ours
            (folder / name).unlink(missing_ok=True)

    def _networks(self) -> dict[str, Tensor]:
        """Generator, router and LayerNorm: what makes an editor, apart from its edits."""
        return {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}

    def _saved_parts(self, folder: Path, digest: str) -> tuple[set[str], list[str], dict[int, dict]]:
        """All files that the save in a folder names; those of experts, if it is of this very editor; and the records of the edits in them."""
        files: set[str] = set()
        try:
            content = json.loads((folder / CONFIG_FILE).read_text())
            files = {content["networks"], *content["experts"]}
            if content["editor"] != digest:
                return files, [], {}
            records = [record for part in content["experts"] for record in _read_records(folder / part)[0]]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return files, [], {}  # nothing there, or nothing that can be continued: it is written anew
        return files, content["experts"], {record["id"]: record for record in records}

    def _write_experts(self, file: Path, edits: list[Edit], digest: str) -> None:
        slots = [self.experts.slot(edit.id) for edit in edits]
        tensors = {name: getattr(self.experts, name)[slots].cpu().contiguous() for name in ExpertRepository.TENSORS}
        _write_tensors(file, tensors, {"edits": json.dumps([_lasting(edit) for edit in edits]), "editor": digest})

    @classmethod
    def from_pretrained(cls, model: nn.Module, processor, folder: str | Path) -> "LiveEdit":
        """Load a saved editor with its edits and attach it. Raises FileNotFoundError or ValueError that says what does not fit."""
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no saved editor: it has no {CONFIG_FILE}")
        try:
            content = json.loads(path.read_text())
            config = LiveEditConfig(**content["config"])
            content["backbone"], content["networks"], content["experts"], content["forgotten"], content["next_id"], content["trained_steps"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged or of another version: {error!r}") from None
        editor = cls(model, processor, config)
        try:
            editor._load(Path(folder), content)
        except BaseException:
            editor.detach()
            raise
        return editor

    def _load(self, folder: Path, content: dict) -> None:
        saved, here = content["backbone"], self.fingerprint()
        if saved != here:
            differing = ", ".join(f"{key} {saved.get(key)} (here {here[key]})" for key in here if saved.get(key) != here[key])
            raise ValueError(f"the editor in {folder} was trained on another backbone: {differing}")
        try:
            self.load_state_dict(load_file(folder / content["networks"]))
            for part in content["experts"]:
                self._load_experts(folder / part, leave_out=set(content["forgotten"]))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"the saved editor in {folder} is damaged: {error}") from error
        self.trained_steps, self.experts.next_id = content["trained_steps"], content["next_id"]

    def _load_experts(self, file: Path, leave_out: set[int]) -> None:
        edits = [Edit(**record) for record in _read_records(file)[0]]
        kept = [i for i, edit in enumerate(edits) if edit.id not in leave_out]
        if kept:
            tensors = load_file(file)
            self.experts.add({name: tensors[name][kept] for name in ExpertRepository.TENSORS}, [edits[i] for i in kept])

    def save_experts(self, file: str | Path) -> None:
        """The experts alone, for someone who has the same editor."""
        self._write_experts(Path(file), self.experts.edits, _digest(self._networks()))

    def load_experts(self, file: str | Path) -> list[Edit]:
        """Add experts that `save_experts` wrote elsewhere, as newer edits than those here. Raises ValueError if they are of another editor."""
        try:
            records, editor = _read_records(Path(file))
            records, tensors = [Edit(**record) for record in records], load_file(file)
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise ValueError(f"{file} holds no experts of a LiveEdit editor: {error!r}") from None
        if editor != _digest(self._networks()):
            raise ValueError(f"the experts in {file} were made by another editor: its networks differ from this one's")
        ids = {edit.id: self.experts.next_id + i for i, edit in enumerate(sorted(records, key=lambda edit: edit.id))}
        edits = [replace(edit, id=ids[edit.id], replaces=[ids[i] for i in edit.replaces if i in ids]) for edit in records]
        self.experts.add({name: tensors[name] for name in ExpertRepository.TENSORS}, edits)
        self.experts.replace_same_facts(edits)
        return edits


def explanation_table(kept: list[dict]) -> str:
    """One row of `explain` as a readable table."""
    if not kept:
        return "no edit was kept: the model answers as if there were none"
    lines = [f"{'edit':>6} {'similarity':>10} {'threshold':>10} {'weight':>7}  question -> answer"]
    lines += [f"{k['id']:>6} {k['similarity']:>10.3f} {k['threshold']:>10.3f} {k['weight']:>7.3f}  {k['prompt']} -> {k['target']}" for k in kept]
    return "\n".join(lines)


def _lasting(edit: Edit) -> dict:
    """What is written of an edit: all that later edits and forgetting cannot change."""
    return {key: value for key, value in asdict(edit).items() if key != "superseded"}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].numpy().tobytes())
    return digest.hexdigest()[:16]


def _write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_file(tensors, file, metadata=metadata)
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())  # on disk before anything names it


def _read_records(file: Path) -> tuple[list[dict], str]:
    """The edits of a file of experts as they were written, and the digest of the editor that made them."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    return json.loads(metadata["edits"]), metadata["editor"]


def soft_weights_of_subset(scores: Tensor, owner: Tensor, role: Tensor) -> Tensor:
    """Weights of Eq. (7) in training, scores (n, B): for each row over a random subset of the batch's experts (no hard filter).

    Edits, generality and hard locality rows always have their own expert in it.
    Differs from the official code: its subsets are random prefixes of the batch, so early slots distract far more often.
    """
    from router import soft_weights
    share = torch.rand(len(scores), 1, device=scores.device)
    subset = torch.rand_like(scores) < share
    own = F.one_hot(owner, scores.shape[1]).bool() & (role != LOCALITY)[:, None]
    return soft_weights(scores, subset | own)
