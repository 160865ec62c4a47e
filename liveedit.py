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
import math
import os
import re
import threading
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
from router import Router, Routing, Rows, hard_filter_loss, soft_router_loss, soft_weights, text_similarity

CONFIG_FILE = "liveedit_config.json"
CHANGEABLE = ("threshold", "same_fact", "expert_dtype")  # settings of a trained editor that its training does not depend on
OWN_FILE = re.compile(r"(networks|experts)-[0-9a-f]{16}\.safetensors")  # as `save_pretrained` names them: no other file is read or deleted
PART_BYTES = 2**30  # of one file of experts in a saved editor, about: more experts are written in several
# What reading a file that is none of ours, or damaged, ends in.
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, SafetensorError)
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
    same_fact: str = "router"  # older edits that a new one replaces: "exact", of the same picture and question, or "router", those too that it takes for the same fact
    expert_dtype: str = "float16"  # precision of the stored experts, but for the keys that the filter compares: "float16" or "float32"
    prompt_style: str = "chat"  # of encode(): "chat" (the processor's template, or "The answer is:"), or "official" (the prompt as it is)

    def __post_init__(self):
        for name in ("module_dim", "rank", "slots", "heads", "sentinel_tokens"):
            if not is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"LiveEditConfig.{name} must be a positive integer, not {getattr(self, name)!r}")
        for name, choices in (("similarity", ("cosine", "dot")), ("same_fact", ("router", "exact")), ("expert_dtype", ("float16", "float32")),
                              ("prompt_style", ("chat", "official"))):
            if getattr(self, name) not in choices:
                raise ValueError(f'LiveEditConfig.{name} must be "{choices[0]}" or "{choices[1]}", not {getattr(self, name)!r}')
        if self.layer is not None and not is_whole(self.layer):
            raise ValueError(f"LiveEditConfig.layer must be an integer or None, not {self.layer!r}")
        if self.threshold is not None and not is_finite_number(self.threshold):
            raise ValueError(f"LiveEditConfig.threshold must be a finite number or None, not {self.threshold!r}")
        if self.threshold is not None and self.similarity == "cosine" and not -1 <= self.threshold <= 1:
            raise ValueError(f"LiveEditConfig.threshold is compared with a cosine and must lie in [-1, 1], not {self.threshold}")
        if not is_finite_number(self.gain) or self.gain <= 0:
            raise ValueError(f"LiveEditConfig.gain must be a positive number, not {self.gain!r}")


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value) -> bool:
    # Compared, since math.isfinite cannot take integers beyond the range of floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


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


def soft_weights_of_subset(scores: Tensor, owner: Tensor, role: Tensor) -> Tensor:
    """Weights of Eq. (7) in training, scores (n, B): for each row over a random subset of the batch's experts (no hard filter).

    Edits, generality and hard locality rows always have their own expert in it.
    Differs from the official code: its subsets are random prefixes of the batch, so early slots distract far more often.
    """
    share = torch.rand(len(scores), 1, device=scores.device)
    subset = torch.rand_like(scores) < share
    own = F.one_hot(owner, scores.shape[1]).bool() & (role != LOCALITY)[:, None]
    return soft_weights(scores, subset | own)


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

    def __post_init__(self):
        texts, numbers = (self.prompt, self.target, self.image_digest), (self.id, *self.replaces)
        if not (all(isinstance(text, str) for text in texts) and all(is_whole(number) for number in numbers) and is_finite_number(self.time)
                and all(old < self.id for old in self.replaces)):
            raise ValueError(f"this is no record of an edit: {self!r}")

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

    # U and V are the expert, the keys what queries are compared with; the rest is how the router sees the edit's own question, for `Router.same_fact`.
    TENSORS = ("U", "V", "visual_keys", "text_keys", "visual_queries", "text_queries", "sentinels")

    def __init__(self, rank: int, hidden_size: int, slots: int, module_dim: int, dtype: torch.dtype = torch.float16):
        super().__init__()
        expert, feature = (rank, hidden_size), (slots, module_dim)
        self.shapes = {name: feature for name in self.TENSORS} | {"U": expert, "V": expert, "sentinels": ()}
        # Only few experts are read for a query, but all visual keys: these are kept as the product needs them, in single precision.
        self.dtypes = {name: torch.float32 if name in ("visual_keys", "sentinels") else dtype for name in self.TENSORS}
        for name in self.TENSORS:
            self.register_buffer(f"_{name}", torch.empty(0, *self.shapes[name], dtype=self.dtypes[name]), persistent=False)
        self.register_buffer("_active", torch.empty(0, dtype=torch.bool), persistent=False)
        self.next_id = 1
        self.clear()

    def clear(self) -> None:
        """Remove all experts and free their memory; ids are not used again."""
        for name in (*self.TENSORS, "active"):
            setattr(self, f"_{name}", getattr(self, f"_{name}").new_empty(0, *self.shapes.get(name, ())))
        self.edits: list[Edit] = []  # in the order of the slots
        self._slots: dict[int, int] = {}
        self._facts: dict[tuple[str, str], list[int]] = {}  # ids of the edits of the same picture and question
        self._replaced_by: dict[int, set[int]] = {}  # of each replaced edit, those that are there

    def __len__(self) -> int:
        return len(self.edits)

    # The slots in use of each buffer, (N, ...).
    U, V, visual_keys, text_keys, visual_queries, text_queries, sentinels, active = (
        property(lambda self, buffer=f"_{name}": getattr(self, buffer)[:len(self.edits)]) for name in (*TENSORS, "active"))

    def __contains__(self, edit_id: int) -> bool:
        return edit_id in self._slots

    def slot(self, edit_id: int) -> int:
        return self._slots[edit_id]

    def add(self, tensors: dict[str, Tensor], edits: list[Edit]) -> None:
        """Append experts, each tensor (n, ...) for n edits; what they replace becomes inactive.

        Raises ValueError, and adds nothing, if shapes or ids do not fit or a number is not finite.
        """
        tensors = self._as_stored(tensors, edits)
        start, end = len(self.edits), len(self.edits) + len(edits)
        if end > len(self._active):
            self._grow(max(end, 2 * len(self._active), 16))
        for name, values in tensors.items():
            getattr(self, f"_{name}")[start:end] = values
        for slot, edit in enumerate(edits, start=start):
            self.edits.append(edit)
            self._slots[edit.id] = slot
            self._facts.setdefault(edit.fact, []).append(edit.id)
            self.next_id = max(self.next_id, edit.id + 1)
        # In a saved editor an edit may come before one that it replaces.
        self._active[start:end] = torch.tensor([not self._replaced_by.get(edit.id) for edit in edits], device=self._active.device)
        for edit in edits:
            self.replace(edit, edit.replaces)
            self._refresh(self._replaced_by.get(edit.id, ()))

    def _as_stored(self, tensors: dict[str, Tensor], edits: list[Edit]) -> dict[str, Tensor]:
        """The tensors in the precision in which they are kept."""
        ids = [edit.id for edit in edits]
        if len(set(ids)) < len(ids) or any(i in self for i in ids):
            raise ValueError("each edit must have an id of its own; two have the same")
        kept = {}
        for name, dtype in self.dtypes.items():
            if tensors.get(name) is None or tensors[name].shape != (len(edits), *self.shapes[name]):
                found = "missing" if tensors.get(name) is None else f"of shape {tuple(tensors[name].shape)}"
                raise ValueError(f"{name} of {len(edits)} experts must have shape {(len(edits), *self.shapes[name])}, not be {found}")
            kept[name] = tensors[name].detach().to(dtype)
            finite = kept[name].flatten(1).isfinite().all(1) if kept[name].dim() > 1 else kept[name].isfinite()
            if not finite.all():
                raise ValueError(f"the expert of edit {edits[int((~finite).nonzero()[0])].prompt!r} has {name} that are not finite: hidden states of the "
                                 f"model are not, or they leave the range of {str(dtype).removeprefix('torch.')} (then take expert_dtype=\"float32\")")
        return kept

    def replace(self, edit: Edit, older: list[int]) -> None:
        """From now on this edit replaces the older ones, as far as they are there."""
        edit.replaces = sorted({*edit.replaces, *older})
        for old in edit.replaces:
            self._replaced_by.setdefault(old, set()).add(edit.id)
        self._active[[self._slots[old] for old in edit.replaces if old in self._slots]] = False
        self._refresh([edit.id])

    def _refresh(self, ids) -> None:
        """What these edits put out of force, as it is now."""
        for edit in (self.edits[self._slots[i]] for i in ids):
            edit.superseded = max((old for old in edit.replaces if old in self._slots), default=None)

    def same_picture_and_question(self, edit: Edit) -> list[int]:
        """Ids of the older edits of the same picture and question."""
        return [old for old in self._facts[edit.fact] if old < edit.id]

    def remove(self, edit_id: int) -> Edit:
        """Remove one expert; what only it had replaced is in force again. Raises KeyError for an unknown id."""
        if not is_whole(edit_id) or edit_id not in self._slots:
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
            self._replaced_by.get(old, set()).discard(edit_id)
            if old in self._slots:
                self._active[self._slots[old]] = not self._replaced_by.get(old)
        self._refresh(self._replaced_by.get(edit_id, ()))
        return edit

    def _grow(self, capacity: int) -> None:
        buffers = {f"_{name}": getattr(self, f"_{name}") for name in (*self.TENSORS, "active")}
        # Not zeros: the system backs memory when it is first written. All of it is there before anything changes.
        grown = {name: old.new_empty(capacity, *old.shape[1:]) for name, old in buffers.items()}
        for name, new in grown.items():
            new[:len(self.edits)] = buffers.pop(name)[:len(self.edits)]
            setattr(self, name, new)

    def bytes_per_edit(self) -> int:
        return sum(math.prod(self.shapes[name]) * dtype.itemsize for name, dtype in self.dtypes.items())


# ------------------------------------------------------------------------------------------------ the editor


class Mixture(NamedTuple):
    """The experts that a prefill keeps, as copies: what is edited meanwhile leaves a generation that has begun as it is."""

    weights: Tensor  # (B, n) of Eq. (7)
    U: Tensor  # (n, R, D)
    V: Tensor  # (n, R, D)
    edits: list[int]  # (n) ids


@dataclass
class _Call:
    """One call of the top-level model, and the route that later calls may continue."""

    masks: RowMasks | None  # of a prefill; None while decoding
    ids: Tensor | None = None  # input_ids of this call
    mixture: Mixture | None = None
    with_image: bool = False  # has any row of the prefill an image?
    prompt_ids: Tensor | None = None  # input_ids of the prefill
    length: int = 0  # tokens of the sequence so far
    pictures: object = None  # what the prefill got as pictures
    used: bool = False  # the edit layer has run


class _ThreadState(threading.local):
    """What one thread is doing with the model: several may call it at once."""

    call: _Call | None = None
    uncached: _Call | None = None  # the last prefill without a cache
    embedded: Tensor | None = None  # the ids that were embedded last, of a model with an inner model
    disabled: int = 0  # how many `disabled()` blocks are open
    captured: dict | None = None  # while `capture_inputs` runs the model: what the edit layer got and gave


# Roles of the rows of a training batch.
EDIT, GENERALITY, LOCALITY, HARD_LOCALITY = range(4)


class LiveEdit(nn.Module):
    """Edits a frozen vision-language model; its own weights are never touched, and `detach` removes every trace.

    Several threads may ask, edit and forget at once.
    """

    def __init__(self, model: nn.Module, processor=None, config: LiveEditConfig = LiveEditConfig()):
        """Attaches at once. Raises TypeError or ValueError if the model has no decoder layers or image token, or the config does not fit.

        processor: of Hugging Face; may be None if all inputs are prepared elsewhere (`edit_inputs`, `capture_inputs`).
        """
        super().__init__()
        if not isinstance(model, nn.Module) or not isinstance(config, LiveEditConfig):
            raise TypeError(f"LiveEdit takes a loaded model and a LiveEditConfig, not {type(model).__name__} and {type(config).__name__}")
        if processor is not None and not hasattr(processor, "tokenizer"):
            raise TypeError(f"the processor must be one of images and text (AutoProcessor), not {type(processor).__name__}")
        layers, norm = find_decoder_layers(model)
        self.config = config = replace(config, layer=len(layers) * 21 // 32 if config.layer is None else config.layer)
        if not 0 <= config.layer < len(layers):
            raise ValueError(f"LiveEditConfig.layer is {config.layer}, but {type(model).__name__} has layers 0 to {len(layers) - 1}")
        if getattr(model.config, "image_token_id", None) is None:
            raise TypeError(f"{type(model).__name__} has no config.image_token_id: LiveEdit cannot tell where its image rows are")
        # Held outside of nn.Module's registry: the model is not ours to move, train or save.
        self.__dict__.update(model=model, processor=processor, _layers=layers, _final_norm=norm, _inner=find_inner_model(model))
        width, c = model.config.get_text_config().hidden_size, config
        self.generator = ExpertGenerator(width, c.module_dim, c.rank, c.heads, c.gain)
        self.router = Router(width, c.module_dim, c.slots, c.heads, c.sentinel_tokens, c.similarity, c.threshold)
        self.norm = nn.LayerNorm(width)  # of the residual, shared by all experts
        self.experts = ExpertRepository(c.rank, width, c.slots, c.module_dim, getattr(torch, c.expert_dtype))
        self.trained_steps = 0
        self._special_ids = torch.tensor(self._find_special_ids())
        self._arguments = {module: list(inspect.signature(module.forward).parameters) for module in (model, self._inner) if module is not None}
        self._handles: list = []
        self._frozen: list[nn.Parameter] = []  # those of the model that required a gradient before `attach`
        self._routes = weakref.WeakKeyDictionary()  # KV cache of a prefill -> its call
        self._thread = _ThreadState()
        self._lock = threading.RLock()  # held while experts are read or changed
        self._seen_saves: dict[Path, str] = {}  # the config file of each folder that was saved to or loaded from, as it was then
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
        """Freeze the model and register the hooks. Raises RuntimeError if they are registered already."""
        if self._handles:
            raise RuntimeError("this editor is attached already; call detach() first")
        if any(isinstance(getattr(hook, "__self__", None), LiveEdit) for hook in self.model._forward_pre_hooks.values()):
            raise RuntimeError("another editor is attached to this model; call its detach() first")
        self._handles = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self._layers[self.config.layer].register_forward_hook(self._after_layer, with_kwargs=True),
            self.model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)]
        if self._inner is not None:
            self._handles += [
                self.model.get_input_embeddings().register_forward_pre_hook(self._before_embedding),
                self._inner.register_forward_pre_hook(self._before_inner, with_kwargs=True),
                self._inner.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)]
        self._frozen = [parameter.requires_grad_(False) for parameter in self.model.parameters() if parameter.requires_grad]
        return self

    def detach(self) -> nn.Module:
        """Remove our hooks, and only ours, and unfreeze what we froze; harmless when already detached. Returns the bare model."""
        while self._handles:
            self._handles.pop().remove()
        while self._frozen:
            self._frozen.pop().requires_grad_(True)
        self._thread.call = self._thread.uncached = self._thread.embedded = None
        self._routes.clear()
        return self.model

    @contextlib.contextmanager
    def disabled(self):
        """Inside, and in this thread, the model is the original, exactly. The hooks stay in their places among those of others."""
        self._thread.disabled += 1
        try:
            yield self.model
        finally:
            self._thread.disabled -= 1

    def _before_model(self, model, args, kwargs):
        self._begin(dict(zip(self._arguments[model], args)) | kwargs)

    def _before_embedding(self, embedding, args):
        self._thread.embedded = args[0] if args else None

    def _before_inner(self, inner, args, kwargs):
        """BLIP-2's `generate` runs its inner language model on embeddings: their ids are those that were embedded last."""
        values, ids, call = dict(zip(self._arguments[inner], args)) | kwargs, self._thread.embedded, self._thread.call
        if call is not None and call.ids is ids is not None:
            return  # within a call of the top-level model
        embeddings = values.get("inputs_embeds")
        if values.get("input_ids") is None and ids is not None and embeddings is not None and ids.shape[1] == embeddings.shape[1]:
            values["input_ids"] = ids.repeat_interleave(len(embeddings) // len(ids), 0)  # beams repeat each row
        self._begin(values)

    def _begin(self, values: dict) -> None:
        """Prefill or decoding? Which rows are image, prompt and answer? values: the arguments of the call, by name."""
        self._thread.call = None
        ids, cache, pictures = values.get("input_ids"), cache_in(values), pictures_in(values)
        past = int(cache.get_seq_length()) if cache is not None else 0
        if cache is not None and past == 0:
            self._routes.pop(cache, None)  # a cache that is filled anew
        if self._thread.disabled:
            return
        if past > 0:
            self._thread.call = self._continued(cache, ids)
        elif not len(self.experts):  # nothing to route, and nothing to refuse
            with_image = ids is None or bool((ids == self.model.config.image_token_id).any())
            self._thread.call = _Call(None, ids, with_image=with_image, prompt_ids=ids, length=0 if ids is None else ids.shape[1], pictures=pictures)
        elif ids is None:
            raise ValueError("LiveEdit reads input_ids to find image and prompt; embeddings alone cannot be routed. "
                             "Pass input_ids, or use `with editor.disabled():`")
        elif values.get("labels") is None and self._extends_uncached(ids, pictures):
            # Generation without a cache sends all ids so far at each step: the prompt's route holds.
            self._thread.call = replace(self._thread.uncached, masks=None, ids=ids, length=ids.shape[1], used=False)
        else:
            masks = self._masks(values)
            self._thread.call = _Call(masks, ids, with_image=bool(masks.image.any()), prompt_ids=ids, length=ids.shape[1], pictures=pictures)

    def _masks(self, inputs: dict) -> RowMasks:
        ids, labels = inputs["input_ids"], inputs.get("labels")
        if labels is not None:  # with logits_to_keep they are those of the last tokens
            if len(labels) != len(ids) or labels.shape[1] > ids.shape[1]:
                raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(ids.shape)}")
            labels = F.pad(labels, (ids.shape[1] - labels.shape[1], 0), value=IGNORE)
        return row_masks(ids, inputs.get("attention_mask"), labels, self.model.config.image_token_id, self._special_ids.to(ids.device))

    def _extends_uncached(self, ids: Tensor, pictures) -> bool:
        """One token more behind the same prompts and pictures? Only prompts are compared: beams swap what they have generated."""
        last = self._thread.uncached
        return (last is not None and len(ids) == len(last.prompt_ids) and ids.shape[1] == last.length + 1 and not self._forgotten(last)
                and pictures is last.pictures and torch.equal(ids[:, :last.prompt_ids.shape[1]], last.prompt_ids))

    def _forgotten(self, call: "_Call") -> list[int]:
        """The edits that a call uses and that were forgotten since."""
        return [] if call.mixture is None else [i for i in call.mixture.edits if i not in self.experts]

    def _continued(self, cache, ids: Tensor) -> "_Call":
        """The route of the prefill that filled this cache."""
        call = self._routes.get(cache)
        if call is not None and (forgotten := self._forgotten(call)):
            raise RuntimeError(f"this KV cache was filled with edit {forgotten[0]}, which was forgotten since; prefill the whole prompt again")
        if not len(self.experts):  # nothing to refuse
            return replace(call or _Call(None, with_image=True), ids=ids, masks=None, used=False)
        if call is None:
            raise RuntimeError("this KV cache was not filled by a prefill with the edits attached; prefill the whole prompt again")
        if ids is None or (ids.shape[1] > 1 and (call.with_image or bool((ids == self.model.config.image_token_id).any()))):
            raise RuntimeError("LiveEdit continues a KV cache by one token of input_ids at a time (no chunked prefill, no second turn on an old "
                               "cache): it routes whole prompts; pass the whole conversation without past_key_values")
        return replace(call, masks=None, ids=ids, used=False)

    def _after_layer(self, layer, args, kwargs, output):
        call, captured = self._thread.call, self._thread.captured
        if captured is not None:
            captured.update(hidden=hidden_of(output), args=args[1:], kwargs={k: v for k, v in kwargs.items() if k != "hidden_states"})
            raise _Stop
        if self._thread.disabled or (call is None and not len(self.experts)):
            return None
        if call is None or call.used:
            raise RuntimeError("the edit layer was called without the top-level model: LiveEdit routes calls of the whole model only")
        hidden = hidden_of(output)
        call.used = True
        if call.masks is not None:
            call.mixture = self._route(hidden, RowMasks(*(m.to(hidden.device) for m in call.masks)))
        if call.mixture is None:
            return None
        return with_hidden(output, self._edited(hidden, call.mixture))

    def _after_model(self, model, args, kwargs, output):
        """Keep the route of a prefill for its decoding steps. Called after an exception too, then without output."""
        if self._thread.disabled:
            return
        call, self._thread.call, self._thread.uncached = self._thread.call, None, None
        if call is None or output is None:
            return
        cache = cache_in(vars(output)) if hasattr(output, "logits") else None
        cache = cache_in(kwargs) if cache is None else cache
        if cache is not None:
            self._routes[cache] = call
        if call.prompt_ids is not None and cache_in(kwargs) is None:
            self._thread.uncached = call

    @torch.no_grad()
    def _route(self, hidden: Tensor, masks: RowMasks) -> Mixture | None:
        """The experts of a prefill and their weights over all its rows, or None where nothing is edited."""
        rows = masks.image.any(1).nonzero().flatten()
        if not len(rows):
            return None
        if not masks.prompt[rows].any(1).all():
            raise ValueError("a row with an image has no prompt token: labels must be -100 on the prompt")
        with self._lock:
            routing = self._routing(hidden[rows], RowMasks(*(m[rows] for m in masks)))
            if not len(routing.experts):
                return None
            weights = routing.weights.new_zeros(len(hidden), routing.weights.shape[1])
            weights[rows] = routing.weights
            return Mixture(weights, self.experts.U[routing.experts].float(), self.experts.V[routing.experts].float(),
                           [self.experts.edits[slot].id for slot in routing.experts.tolist()])

    def _routing(self, hidden: Tensor, masks: RowMasks) -> Routing:
        """Routing of rows that all have an image."""
        hidden = hidden.float()
        query = self.router.query(Rows.gather(hidden, masks.prompt), Rows.gather(hidden, masks.image))
        return self.router.route(query, self.experts.visual_keys, self.experts.text_keys, self.experts.active)

    def _edited(self, hidden: Tensor, mixture: Mixture) -> Tensor:
        """Eq. (6) on the rows that have an expert; all other rows are copied bit by bit."""
        if len(mixture.weights) != len(hidden):
            raise RuntimeError(f"the prefill had {len(mixture.weights)} rows, this step has {len(hidden)}: prefill again")
        rows = (mixture.weights > 0).any(1).nonzero().flatten()
        # Detached: the frozen model's outputs require no gradient because of an edit.
        normed = F.layer_norm(hidden[rows].float(), self.norm.normalized_shape, self.norm.weight.detach(), self.norm.bias.detach(), self.norm.eps)
        residual = apply_experts(normed, mixture.U, mixture.V, mixture.weights[rows])
        return hidden.index_add(0, rows, residual.to(hidden.dtype))

    # -------------------------------------------------------------------------------------------- model inputs

    def encode(self, image: Image.Image | None | Sequence, prompt: str | Sequence[str], target: str | Sequence[str] | None = None) -> dict:
        """Model inputs for one question or lists of them: prompts padded on the left, as `generate` needs it.

        With targets, their tokens and the end of sequence follow, padded on the right, and `labels` mark them (-100 elsewhere).
        The one place that knows the prompt form: the processor's chat template, or `<image>\\n{question} The answer is:`.
        Raises TypeError or ValueError for what is no picture or text, an empty prompt or target, a prompt that holds the image token, lists of
        different lengths, and rows that are longer than the model can read.
        """
        if isinstance(prompt, str):
            image, prompt, target = [image], [prompt], None if target is None else [target]
        if not all(isinstance(values, (list, tuple)) for values in (image, prompt, [] if target is None else target)):
            raise TypeError("encode takes one image, prompt and target, or lists of them; got "
                            f"{', '.join(type(values).__name__ for values in (image, prompt, target))}")
        if not 0 < len(image) == len(prompt) == (len(prompt) if target is None else len(target)):
            raise ValueError(f"there are {len(image)} images and {len(prompt)} prompts" + (f" and {len(target)} targets" if target is not None else ""))
        inputs = self._processed([None if picture is None else self._rgb(picture) for picture in image], prompt)
        if target is not None:
            inputs = self._append_targets(inputs, target)
        longest, tokens = getattr(self.model.config.get_text_config(), "max_position_embeddings", None), inputs["input_ids"].shape[1]
        if longest is not None and tokens > longest:
            raise ValueError(f"image, prompt and target have {tokens} tokens, but {type(self.model).__name__} reads at most {longest}; "
                             f"the longest prompt begins with {max(prompt, key=len)[:40]!r}")
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
        if not all(image.size):
            raise ValueError(f"this image has no pixels: its size is {image.size}")
        try:
            return image.convert("RGB")
        except Exception as error:  # PIL reads a file's pixels only now; its readers raise all kinds
            raise ValueError(f"the image {getattr(image, 'filename', '') or image!r} cannot be read, or its file was closed: {error!r}") from None

    def _text(self, text: str, what: str) -> str:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a {what} must be a text that is not empty, not {text!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"the {what} {text[:40]!r} holds half a character (a lone surrogate)")
        if self.processor is not None and (token := str(self.processor.image_token)) in text:
            raise ValueError(f"the {what} {text[:40]!r} holds the image token {token}; pass the picture, encode() places the token")
        return text

    def _prompt_text(self, question: str, has_image: bool) -> str:
        token = str(self.processor.image_token)
        self._text(question, "prompt")
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
            tokens = tokenizer(" " + self._text(target, "target").strip(), add_special_tokens=False).input_ids
            if not tokens:
                raise ValueError(f"the target {target!r} has no token in the model's vocabulary")
            rows.append(tokens + [tokenizer.eos_token_id])
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
        if not questions:
            raise ValueError("capture needs at least one question")
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
        self._check_inputs(inputs, "input_ids", "labels")
        masks, labels = self._masks(inputs), inputs["labels"]
        if not self._handles:
            raise RuntimeError("this editor is detached; call attach() first")
        self._thread.captured = seen = {}
        try:
            with self.disabled(), contextlib.suppress(_Stop):
                self.model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
        finally:
            self._thread.captured = None
        if not seen:
            raise RuntimeError(f"{type(self.model).__name__} did not reach the edit layer, or the editor was detached meanwhile")
        place = seen["hidden"].device
        return States(seen["hidden"], RowMasks(*(m.to(place) for m in masks)), labels.to(place), seen["args"], seen["kwargs"])

    def _check_inputs(self, inputs: dict, *names: str) -> None:
        """Raises ValueError where model inputs are not what `encode` gives: these are integers (B, T), and ids of the vocabulary."""
        for name in names:
            ids = inputs.get(name) if hasattr(inputs, "get") else None
            if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
                found = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(f"inputs must hold {name} as a tensor of integers (B, T), as encode() makes them; got {found}")
        ids, vocabulary = inputs["input_ids"], self.model.get_input_embeddings().num_embeddings
        if (unknown := ids[((ids < 0) | (ids >= vocabulary)) & (ids != self.model.config.image_token_id)]).numel():
            raise ValueError(f"input_ids hold {unknown[0].item()}, but the model's vocabulary has {vocabulary} tokens")

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
        questions = self._questions(questions)
        if not is_whole(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, not {batch_size!r}")
        chunks = [questions[i:i + batch_size] for i in range(0, len(questions), batch_size)]
        return self._add_new(questions, [self._make_experts(self.capture(chunk)) for chunk in chunks])

    def edit_inputs(self, inputs: dict, questions: Sequence[Question | tuple]) -> list[Edit]:
        """Edits from model inputs prepared elsewhere, one row for each question: `labels` hold the target's tokens, -100 elsewhere.

        For processors that `encode` does not know; the questions are only what the repository keeps of the edits.
        """
        questions = self._questions(questions)
        states = self.capture_inputs(inputs)
        if len(states.hidden) != len(questions) or not all(mask.any(1).all() for mask in states.masks):
            raise ValueError(f"{len(questions)} edits need as many rows with image, prompt and labels each; got {len(states.hidden)} rows")
        return self._add_new(questions, [self._make_experts(states)])

    def _questions(self, questions: Sequence[Question | tuple]) -> list[Question]:
        """The edits as given, checked before any of them is made."""
        if not self.trained_steps:
            raise RuntimeError("this editor was never trained: its experts would be noise. Train it (training_losses, run.py) or "
                               "load a trained one with LiveEdit.from_pretrained")
        self._check_weights()
        if not isinstance(questions, (list, tuple)) or not all(isinstance(q, (list, tuple)) and len(q) == 3 for q in questions):
            raise TypeError("edits are given as a list of (image, prompt, target)")
        questions = [Question(*q) for q in questions]
        for q in questions:
            if q.image is None:
                raise ValueError(f"the edit {q.prompt!r} has no image: the visual filter could never keep it")
            self._rgb(q.image)  # raises if it is no picture
            self._text(q.prompt, "prompt")
            self._text(q.target, "target")
        return questions

    def _check_weights(self) -> None:
        """Raises ValueError if one of the editor's own weights is not finite, as after a training that diverged."""
        for name, weight in self.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"the editor's weight {name} holds numbers that are not finite")

    def _add_new(self, questions: list[Question], made: list[dict[str, Tensor]]) -> list[Edit]:
        """Nothing is added before all experts are made."""
        if not questions:
            return []
        digests, now = [image_digest(q.image) for q in questions], time.time()
        with self._lock:
            edits = [Edit(self.experts.next_id + i, q.prompt, q.target, digests[i], now) for i, q in enumerate(questions)]
            self._add(edits, {name: torch.cat([tensors[name] for tensors in made]) for name in ExpertRepository.TENSORS})
        return edits

    def _add(self, edits: list[Edit], tensors: dict[str, Tensor]) -> None:
        """All or nothing: add experts, each replacing the older ones of the same fact."""
        present = [edit.id for edit in edits if edit.id in self.experts]  # a mistake of the caller's, which `add` refuses
        try:
            self.experts.add(tensors, edits)
            self._replace_same_facts(edits)
        except BaseException:
            for edit in edits:
                if edit.id in self.experts and edit.id not in present:
                    self.experts.remove(edit.id)
            raise

    @torch.no_grad()
    def _replace_same_facts(self, edits: list[Edit]) -> None:
        """Each of these edits replaces the older ones of the same picture and question, and those that the router takes for the same fact."""
        older = {edit.id: self.experts.same_picture_and_question(edit) for edit in edits}
        if self.config.same_fact == "router" and edits:
            new = torch.tensor([self.experts.slot(edit.id) for edit in edits], device=self.experts.active.device)
            for slot, other in self.router.same_fact(self.experts, new).tolist():
                if self.experts.edits[other].id < self.experts.edits[slot].id:
                    older[self.experts.edits[slot].id].append(self.experts.edits[other].id)
        for edit in edits:
            self.experts.replace(edit, older[edit.id])

    @torch.no_grad()
    def _make_experts(self, states: States) -> dict[str, Tensor]:
        """What the repository keeps of each row of `states`."""
        hidden = states.hidden.float()
        U, V = self.generator(hidden, states.masks.image | states.masks.prompt | states.masks.answer)
        prompt, image = Rows.gather(hidden, states.masks.prompt), Rows.gather(hidden, states.masks.image)
        query = self.router.query(prompt, image)
        return {"U": U, "V": V, "visual_keys": self.router.visual_key(prompt, image), "text_keys": self.router.text_key(prompt),
                "visual_queries": query.visual, "text_queries": query.text, "sentinels": self.router.sentinel_similarity(query)}

    def edits(self) -> list[Edit]:
        """The edits in force, oldest first."""
        with self._lock:
            return sorted((e for e, active in zip(self.experts.edits, self.experts.active.tolist()) if active), key=lambda e: e.id)

    def forget(self, edit_id: int) -> Edit:
        """As if this edit had never been made: what it had replaced is in force again. Raises KeyError for an unknown id."""
        with self._lock:
            return self.experts.remove(edit_id)

    def reset(self) -> None:
        """Forget all edits: the original model, bit for bit. Ids are not used again."""
        with self._lock:
            self.experts.clear()

    @torch.no_grad()
    def explain(self, inputs: dict) -> list[list[dict]]:
        """For each row of `inputs` the edits that the filter kept, heaviest first: id, prompt, target, similarity, threshold, weight."""
        self._check_inputs(inputs, "input_ids")
        inputs = {"labels": torch.full_like(inputs["input_ids"], IGNORE), **inputs}
        masks = self._masks(inputs)
        report: list[list[dict]] = [[] for _ in masks.image]
        if not len(self.experts) or not masks.image.any():
            return report
        states = self.capture_inputs(inputs)
        rows = states.masks.image.any(1).nonzero().flatten()
        with self._lock:
            routing = self._routing(states.hidden[rows], RowMasks(*(m[rows] for m in states.masks)))
            kept = [self.experts.edits[slot] for slot in routing.experts.tolist()]
        similarity = routing.similarity[:, routing.experts]
        for i, row in enumerate(rows.tolist()):
            report[row] = [{"id": kept[n].id, "prompt": kept[n].prompt, "target": kept[n].target, "similarity": similarity[i, n].item(),
                            "threshold": routing.threshold[i].item(), "weight": routing.weights[i, n].item()}
                           for n in routing.weights[i].nonzero().flatten().tolist()]
            report[row].sort(key=lambda found: -found["weight"])
        return report

    # -------------------------------------------------------------------------------------------- training

    def training_losses(self, states: States, role: Tensor, owner: Tensor, text_locality: Rows | None = None) -> dict[str, Tensor]:
        """All losses of one batch of B >= 2 edits; "total" is their sum, every weight 1.

        states: n rows with images; role (n,) one of EDIT, GENERALITY, LOCALITY, HARD_LOCALITY; owner (n,) the row's edit, 0 to B-1, and the
        B rows of role EDIT stand in the order of their owners. text_locality: prompt rows of text-only questions, for Eq. (16).
        """
        if len(self.experts) and torch.is_grad_enabled():
            raise RuntimeError(f"{len(self.experts)} edits belong to the networks as they are; forget them with reset() before you train on")
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
        """What a saved editor needs to fit its backbone, as JSON gives it back."""
        config, text = self.model.config, self.model.config.get_text_config()
        vision = getattr(config, "vision_config", None)
        return json.loads(json.dumps({
            "model_type": config.model_type, "text_model_type": text.model_type, "hidden_size": text.hidden_size, "layers": len(self._layers),
            "heads": text.num_attention_heads, "vocabulary": text.vocab_size, "image_token_id": config.image_token_id,
            "image_size": getattr(vision, "image_size", None), "patch_size": getattr(vision, "patch_size", None), "embeddings": self._some_embeddings()}))

    def _some_embeddings(self) -> list[float] | None:
        """A few weights of the model, to tell it from another one of its shape; None where they are kept elsewhere."""
        weight = self.model.get_input_embeddings().weight
        return None if weight.is_meta else weight[::max(1, len(weight) // 16), 0][:16].float().tolist()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write editor and edits: `liveedit_config.json`, the networks in one file, the experts in others.

        If the process is killed, the older or the newer save is whole: the config file names the others and is replaced last. Into a folder that holds
        the same editor only new edits are written, as one file more, which takes in the last files while these are less than twice its size: so
        there are about log2 N files, and an edit is written again as often at most. What another editor saved there is replaced. Files that stay are
        not read again. One process uses a folder at a time. Raises ValueError if a weight is not finite, and RuntimeError if the folder is not as this
        editor left or loaded it.
        """
        folder = Path(folder).resolve()
        self._check_weights()
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if folder in self._seen_saves and (folder / CONFIG_FILE).is_file() and (folder / CONFIG_FILE).read_text() != self._seen_saves[folder]:
                raise RuntimeError(f"{folder} was changed since this editor was loaded from or saved to it; load it, or save elsewhere")
            networks, editor = self._networks(), self.editor_digest()
            parts = self._kept_parts(folder, editor)
            new = self._edits_to_write(parts)
            network_file, most = f"networks-{editor}.safetensors", self._edits_per_part()
            if not _is_intact(folder / network_file, networks):
                _write_tensors(folder / network_file, networks, {})
            for start in range(0, len(new), most):
                tensors, metadata = self._part(new[start:start + most], editor)
                name = f"experts-{metadata['digest']}.safetensors"
                _write_tensors(folder / name, tensors, metadata)
                parts[name] = [edit.id for edit in new[start:start + most]]
            content = {"config": asdict(self.config), "backbone": self.fingerprint(), "trained_steps": self.trained_steps, "editor": editor,
                       "networks": network_file, "experts": list(parts), "next_id": self.experts.next_id,
                       "forgotten": [i for ids in parts.values() for i in ids if i not in self.experts]}
            self._seen_saves.pop(folder, None)
            with _replacing(folder / CONFIG_FILE) as draft:
                draft.write_text(json.dumps(content, indent=2))
            self._seen_saves[folder] = (folder / CONFIG_FILE).read_text()
            for file in folder.iterdir():  # of older saves, or of some that were broken off
                if OWN_FILE.fullmatch(file.name.removesuffix(".new")) and file.name not in (network_file, *parts):
                    file.unlink(missing_ok=True)

    def _networks(self) -> dict[str, Tensor]:
        """Generator, router and LayerNorm: what makes an editor, apart from its edits."""
        return {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}

    def editor_digest(self) -> str:
        """Of all that the experts of this editor depend on: its networks and its config, but for what may change."""
        lasting = {key: value for key, value in asdict(self.config).items() if key not in CHANGEABLE}
        return _digest(self._networks(), json.dumps(lasting, sort_keys=True))

    def _edits_per_part(self) -> int:
        return max(1, PART_BYTES // self.experts.bytes_per_edit())

    def _kept_parts(self, folder: Path, editor: str) -> dict[str, list[int]]:
        """The files of experts in a folder that can stay, and the ids in them: of this very editor, unchanged, and most of them not forgotten."""
        try:
            content = json.loads((folder / CONFIG_FILE).read_text())
            _check_names(content)
            if content["editor"] != editor:
                return {}
            parts = {name: _read_records(folder / name)[0] for name in content["experts"]}
            here = {edit.id: _lasting(edit) for edit in self.experts.edits}
            stays = lambda records: (all(here.get(record["id"], record) == record for record in records)
                                     and 2 * sum(record["id"] in here for record in records) >= len(records))
            return {name: [record["id"] for record in records] for name, records in parts.items() if stays(records)}
        except DAMAGE:
            return {}  # nothing there, or nothing that can be continued: it is written anew

    def _edits_to_write(self, parts: dict[str, list[int]]) -> list[Edit]:
        """The edits that are in none of the parts, and those of the last parts, which are taken out, while these are small."""
        saved = {i for ids in parts.values() for i in ids}
        new = [edit for edit in self.experts.edits if edit.id not in saved]
        while new and parts:
            last = parts[next(reversed(parts))]
            if len(last) >= 2 * len(new) or len(last) + len(new) > self._edits_per_part():
                break
            parts.popitem()
            new = [self.experts.edits[self.experts.slot(i)] for i in last if i in self.experts] + new
        return new

    def _part(self, edits: list[Edit], editor: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a file of experts."""
        slots = [self.experts.slot(edit.id) for edit in edits]
        if slots and slots == list(range(slots[0], slots[0] + len(slots))):
            slots = slice(slots[0], slots[0] + len(slots))  # no copy
        tensors = {name: getattr(self.experts, name)[slots].cpu().contiguous() for name in ExpertRepository.TENSORS}
        # The records as a tensor: safetensors reads no more than 100 MB of metadata.
        tensors["edits"] = torch.frombuffer(bytearray(json.dumps([_lasting(edit) for edit in edits]).encode()), dtype=torch.uint8)
        return tensors, {"editor": editor, "digest": _digest(tensors)}

    @classmethod
    def from_pretrained(cls, model: nn.Module, processor, folder: str | Path, **changes) -> "LiveEdit":
        """Load a saved editor with its edits and attach it. Raises FileNotFoundError or ValueError that says what does not fit.

        changes: other values than the saved ones for the settings in CHANGEABLE; TypeError for others.
        """
        if wrong := [name for name in changes if name not in CHANGEABLE]:
            raise TypeError(f"{wrong[0]} of a trained editor cannot be changed; only {', '.join(CHANGEABLE)} can")
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no saved editor: it has no {CONFIG_FILE}")
        try:
            content = json.loads(path.read_text())
            config = LiveEditConfig(**content["config"])
            _check_names(content)
            if not (isinstance(content["backbone"], dict) and isinstance(content["forgotten"], list)
                    and all(map(is_whole, (content["next_id"], content["trained_steps"], *content["forgotten"])))):
                raise ValueError("a value is of the wrong type")
        except DAMAGE as error:
            raise ValueError(f"{path} is damaged or of another version: {error!r}") from None
        editor = cls(model, processor, replace(config, **changes))
        try:
            editor._load(Path(folder), content)
            editor._seen_saves[Path(folder).resolve()] = path.read_text()
        except BaseException:
            editor.detach()
            raise
        return editor

    def _load(self, folder: Path, content: dict) -> None:
        saved, here = dict(content["backbone"]), self.fingerprint()
        alike = None in (saved.get("embeddings"), here["embeddings"]) or _close(saved["embeddings"], here["embeddings"])
        saved["embeddings"], here["embeddings"] = "as here" if alike else "of another model", "as here"
        if saved != here:
            differing = ", ".join(f"{key} {saved.get(key)} (here {here.get(key)})" for key in here | saved if saved.get(key) != here.get(key))
            raise ValueError(f"the editor in {folder} was trained on another backbone: {differing}")
        try:
            self.load_state_dict(load_file(folder / content["networks"]))
            self._check_weights()
            if self.editor_digest() != content["editor"]:
                raise ValueError(f"{CONFIG_FILE} and {content['networks']} are not as they were saved together")
            for part in content["experts"]:
                edits, editor, tensors = _read_experts(folder / part)
                if editor != content["editor"]:
                    raise ValueError(f"the experts in {part} are of another editor")
                self.experts.add(tensors, edits)
            for edit_id in content["forgotten"]:
                self.experts.remove(edit_id)
        except (PermissionError, torch.OutOfMemoryError):
            raise
        except DAMAGE as error:
            raise ValueError(f"the saved editor in {folder} is damaged: {' '.join(str(error).split())}") from error
        self.trained_steps, self.experts.next_id = content["trained_steps"], max(self.experts.next_id, content["next_id"])

    def save_experts(self, file: str | Path) -> None:
        """The experts alone, for someone who has the same editor. Raises OSError where the file cannot be written."""
        file = Path(file)
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; save_experts writes one file")
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            _write_tensors(file, *self._part(self.experts.edits, self.editor_digest()))

    def load_experts(self, file: str | Path) -> list[Edit]:
        """Add experts that `save_experts` wrote elsewhere, as newer edits than those here, which they replace where the facts are the same.

        Raises ValueError, and adds nothing, if they are of another editor or damaged.
        """
        try:
            records, editor, tensors = _read_experts(Path(file))
        except DAMAGE as error:
            raise ValueError(f"{file} holds no experts of a LiveEdit editor: {error!r}") from None
        if editor != self.editor_digest():
            raise ValueError(f"the experts in {file} were made by another editor: its networks or its config differ from this one's")
        with self._lock:
            ids = {edit.id: self.experts.next_id + i for i, edit in enumerate(sorted(records, key=lambda edit: edit.id))}
            edits = [replace(edit, id=ids[edit.id], replaces=[ids[i] for i in edit.replaces if i in ids]) for edit in records]
            try:
                self._add(edits, tensors)
            except ValueError as error:
                raise ValueError(f"the experts in {file} are damaged: {error}") from None
        return edits


def explanation_table(kept: list[dict]) -> str:
    """One row of `explain` as a readable table."""
    if not kept:
        return "no edit was kept: the model answers as if there were none"
    lines = [f"{'edit':>6} {'similarity':>10} {'threshold':>10} {'weight':>7}  question -> answer"]
    lines += [f"{k['id']:>6} {k['similarity']:>10.3f} {k['threshold']:>10.3f} {k['weight']:>7.3f}  {k['prompt']} -> {k['target']}" for k in kept]
    return "\n".join(lines)


def _close(some: list, others: list) -> bool:
    """Are these the same weights, in whatever precision?"""
    return isinstance(some, list) and len(some) == len(others) and all(
        is_finite_number(a) and math.isclose(a, b, rel_tol=0.01, abs_tol=1e-6) for a, b in zip(some, others))


def _lasting(edit: Edit) -> dict:
    """What is written of an edit: all that later edits and forgetting cannot change."""
    return {name: getattr(edit, name) for name in ("id", "prompt", "target", "image_digest", "time", "replaces")}


def _digest(tensors: dict[str, Tensor], more: str = "") -> str:
    """Of names and numbers of tensors on the CPU, and of a text."""
    digest = hashlib.sha256(more.encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].numpy())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _replacing(file: Path):
    """Write a file whole or not at all: gives the path of a draft, which takes the file's place at the end."""
    draft = file.with_name(file.name + ".new")
    try:
        yield draft
        with open(draft, "r+b") as opened:
            os.fsync(opened.fileno())  # on disk before anything names it
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with _replacing(file) as draft:
        draft.touch()
        mode = draft.stat().st_mode  # what the user's umask gives; safetensors makes files that only their owner can read
        save_file(tensors, draft, metadata=metadata)
        draft.chmod(mode)


def _is_intact(file: Path, tensors: dict[str, Tensor]) -> bool:
    """Does a file hold exactly these tensors?"""
    try:
        return _digest(load_file(file)) == _digest(tensors)
    except DAMAGE:
        return False


def _read_records(file: Path) -> tuple[list[dict], str]:
    """The edits of a file of experts as they were written, and the digest of the editor that made them."""
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.get_tensor("edits").numpy().tobytes()), opened.metadata()["editor"]


def _read_experts(file: Path) -> tuple[list[Edit], str, dict[str, Tensor]]:
    """The same with the experts' tensors. Raises one of DAMAGE for other or damaged files."""
    (records, editor), tensors = _read_records(file), load_file(file)
    with safe_open(file, framework="pt") as opened:
        if opened.metadata()["digest"] != _digest(tensors):
            raise ValueError(f"{file.name} has other content than it was saved with")
    return [Edit(**record) for record in records], editor, tensors


def _check_names(content: dict) -> None:
    """Raises one of DAMAGE if a saved editor's config names files that `save_pretrained` does not give."""
    if foreign := [name for name in (content["networks"], *content["experts"]) if not OWN_FILE.fullmatch(name)]:
        raise ValueError(f"{foreign[0]!r} is no file of a saved editor")
