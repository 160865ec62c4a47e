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

Copy this file with generator.py, router.py and backbone.py into another codebase.
B rows of a batch, T sequence, D hidden size, N experts, R rank, K slots, M module width.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from backbone import (
    CACHES,
    PICTURES,
    FrozenModel,
    InputFormat,
    RowMasks,
    States,
    device_of,
    find_decoder_layers,
    fingerprint,
    first_of,
    plain_mode,
    same_model,
)
from generator import Edit, ExpertGenerator, ExpertRepository, apply_experts, fit_norm
from router import Router, Routing, Rows, soft_weights, text_similarity

# In float16 most gradients at the edit layer would vanish: layers above get them so much larger.
HALF_PRECISION_SCALE = 1024.0
ROWS_SEEN = 0.7  # share of a picture's rows that the routing losses see in a step
EDITOR_FILE = "liveedit.safetensors"  # of a saved editor


@dataclass(frozen=True)
class LiveEditConfig:
    """Everything that defines an editor; sizes are by default the paper's for 7B models."""

    layer: int | None = None  # edit layer, from 0; None: two thirds of the depth (21 of 32)
    module_dim: int = 1024  # width M of generator and extractors
    rank: int = 4  # rank R of an expert
    slots: int = 4  # learned queries K of each routing feature
    heads: int = 8  # attention heads of generator and extractors
    sentinel_tokens: int = 576  # rows of the vision sentinel: about the image tokens of one picture
    similarity: str = "cosine"  # of the visual hard filter: "cosine", or "dot" (official code)
    threshold: float | None = None  # of the filter; None: by sentinel, with what is dropped
    newest_wins: bool = True  # of one fact; False: the paper's plain soft router, edits blend
    gain: float = 0.2  # experts are scaled by gain / sqrt(rank)
    prompt_style: str = "chat"  # of encode(): the processor's template, or "official": none

    def __post_init__(self):
        sizes = (self.module_dim, self.rank, self.slots, self.heads, self.sentinel_tokens)
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"module_dim, rank, slots, heads, sentinel_tokens: integers in {self}")
        kinds, styles = ("cosine", "dot"), ("chat", "official")
        if self.similarity not in kinds or self.prompt_style not in styles:
            raise ValueError(f"similarity is cosine or dot, prompt_style chat or official: {self}")
        if self.threshold is not None and not -1e30 < self.threshold < 1e30 or not self.gain > 0:
            raise ValueError(f"threshold must be None or a number, gain more than 0: {self}")


class Question(NamedTuple):
    """A question to the model, with the answer wanted where one is needed."""

    image: Image.Image | None
    prompt: str
    target: str | None = None


class Route(NamedTuple):
    """The experts that a prompt uses, as copies: a generation that has begun stays as it is."""

    has_image: bool  # has any row of the prompt an image?
    routing: Routing | None = None  # None: nothing is edited
    rows: Tensor | None = None  # those of the B rows that use an expert
    U: Tensor | None = None  # (n, R, D)
    V: Tensor | None = None  # (n, R, D)


class LiveEdit(nn.Module):
    """Edits a frozen vision-language model; its own weights are never touched.

    `detach` removes every trace. Several threads may ask, edit and forget at once, where the model
    itself may be called so: Qwen-VL keeps the positions of its last prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        processor=None,
        config: LiveEditConfig = LiveEditConfig(),
        attach: bool = True,
    ):
        """Make an untrained editor. Raises TypeError or ValueError if it cannot edit the model.

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
        self.config = config
        self.__dict__["model"] = model  # not ours to move, train or save
        self.processor, self.frozen = processor, FrozenModel(model, config.layer)
        self._format = InputFormat(model, processor, config.prompt_style)
        width = model.config.get_text_config().hidden_size
        sizes = (config.module_dim, config.rank, config.heads, config.gain)
        self.generator = ExpertGenerator(width, *sizes)
        self.router = Router(width, config)
        self.norm = nn.LayerNorm(width)  # of the residual, shared by all experts
        self.experts = ExpertRepository(config.rank, width, config.slots, config.module_dim)
        self.trained_steps = 0
        self._lock = threading.RLock()  # held while experts are read or changed
        self._replay_checked = False
        self.float().to(device_of(self.frozen.edit_layer))
        if attach:
            self.attach()

    # ------------------------------------------------------------------------- an edit comes in

    def edit(self, image: Image.Image, prompt: str, target: str) -> Edit:
        """From now on answer this question about this image with the target."""
        return self.edit_many([Question(image, prompt, target)])[0]

    def edit_many(self, questions: Sequence, batch_size: int = 128) -> list[Edit]:
        """Make edits of (image, prompt, target): the same experts as one by one, all or none.

        Raises RuntimeError on an editor that was never trained, and TypeError or ValueError for
        what is no edit.
        """
        questions, made = self._checked_edits(questions), []
        if not questions:
            return []
        for start in range(0, len(questions), batch_size):
            chunk = questions[start : start + batch_size]
            made.append(self._experts_and_keys(self.capture(chunk, above=False)))
        return self._add_edits(questions, made)

    def edit_inputs(self, inputs: dict, questions: Sequence) -> list[Edit]:
        """Make edits from model inputs prepared elsewhere, one row for each question.

        `labels` hold the target's tokens, -100 elsewhere; the questions are only noted down.
        """
        questions = self._checked_edits(questions)
        states = self.capture_inputs(inputs, above=False)
        if len(states.hidden) != len(questions):
            raise ValueError(f"{len(states.hidden)} rows of inputs for {len(questions)} questions")
        return self._add_edits(questions, [self._experts_and_keys(states)])

    def _checked_edits(self, questions: Sequence) -> list[Question]:
        if not self.trained_steps:
            remedy = "train it with training_losses or run.py, or load one with from_pretrained"
            raise RuntimeError(f"this editor was never trained, its experts are noise: {remedy}")
        questions = list(questions)
        for question in questions:
            if not isinstance(question, (list, tuple)) or len(question) != 3:
                raise TypeError(f"an edit is (image, prompt, target), not {question!r}")
        return [Question(*question) for question in questions]

    def _experts_and_keys(self, states: States) -> dict[str, Tensor]:
        """Compute what the repository keeps of each row: U, V, phi_hat, psi_hat."""
        hidden, masks = states.hidden.float(), states.masks
        if not all(mask.any(1).all() for mask in masks):
            raise ValueError("each edit needs a row with an image, a prompt and labels")
        with plain_mode(hidden.device):
            U, V = self._experts_of(states)
            prompt, image = Rows(hidden, masks.prompt), Rows(hidden, masks.image)
            visual_keys = self.router.visual_key(prompt, image)
            text_keys = self.router.text_key(prompt)
        return {"U": U, "V": V, "visual_keys": visual_keys, "text_keys": text_keys}

    def _experts_of(self, states: States) -> tuple[Tensor, Tensor]:
        """Generate the expert of each row: U and V (B, R, D)."""
        image, prompt, answer = states.masks
        embedded = self.frozen.embed(states.labels[answer])
        return self.generator(states.hidden.float(), image | prompt | answer, answer, embedded)

    def _add_edits(self, questions: list[Question], made: list[dict]) -> list[Edit]:
        tensors = {name: torch.cat([part[name] for part in made]) for name in made[0]}
        edits, now = [], time.time()
        with self._lock:
            for edit_id, question in enumerate(questions, self.experts.next_id):
                edits.append(Edit(edit_id, question.prompt, question.target, now))
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
        """Freeze the model and register the hooks, in the place of another editor's.

        Raises RuntimeError if this editor is attached already.
        """
        self.frozen.attach(self._edited)
        return self

    def detach(self) -> nn.Module:
        """Remove our hooks, and only ours, and unfreeze the model; returns it. Harmless twice."""
        return self.frozen.detach()

    def disabled(self):
        """Give a context in which the model is the original: see `FrozenModel.disabled`."""
        return self.frozen.disabled()

    def _edited(self, hidden: Tensor, call: dict | None, cache, decoding: bool) -> Tensor | None:
        """Add the residual of the experts that this call concerns to the edit layer's output."""
        self._follow(hidden.device)
        if decoding:
            route = self._route_of_cache(cache, call, hidden)
        else:
            route = self._route(call, hidden)
            if cache is not None:
                cache.liveedit_route = route
        if route is None or route.routing is None:
            return None
        return self._add_residual(hidden, route)

    def _follow(self, device: torch.device) -> None:
        """Move to where the model's edit layer computes: the model may have been moved."""
        if self.norm.weight.device != device:
            with self._lock, plain_mode(device):
                self.to(device)

    def _route_of_cache(self, cache, call: dict | None, hidden: Tensor) -> Route | None:
        """Take up the route of the prompt that filled this KV cache."""
        # A cache that was filled anew while disabled still has the route of its use before.
        stale = getattr(cache, "liveedit_disabled", False)
        route = None if stale else getattr(cache, "liveedit_route", None)
        if not len(self.experts) and (route is None or route.routing is None):
            return None
        if route is None:
            raise RuntimeError("this KV cache was filled without the editor; prefill it again")
        call, several = call or {}, hidden.shape[1] > 1
        ids, pictures = call.get("input_ids"), first_of(call, *PICTURES)
        # One token without pictures, the usual step, is not looked at: a GPU would be waited for.
        if several or pictures is not None:
            if ids is None or (several and route.has_image) or self._format.has_image(ids):
                reason = "no chunked prefill, no second turn on an old cache"
                raise RuntimeError(f"pass the whole prompt, without a KV cache: {reason}")
        if route.routing is not None and len(route.routing.weights) != len(hidden):
            counts = f"{len(route.routing.weights)} rows, this step has {len(hidden)}"
            raise RuntimeError(f"the prefill of this KV cache had {counts}: prefill again")
        return route

    def _route(self, call: dict | None, hidden: Tensor) -> Route:
        """Choose the experts of a prompt and their weights, for all rows that have an image."""
        ids = call and call.get("input_ids")
        if not len(self.experts):
            return Route(has_image=ids is None or self._format.has_image(ids))
        if call is None:
            raise RuntimeError("LiveEdit edits calls of the whole model, not of its decoder")
        if ids is None:
            remedy = "pass input_ids too, or use `with editor.disabled():`"
            raise ValueError(f"embeddings alone do not tell where image and prompt are; {remedy}")
        if not self._format.has_image(ids):
            return Route(has_image=False)
        self._refuse(call, hidden)
        alone, masks = self._format.asked_alone(call)
        if alone is not call:
            hidden, _ = self.frozen.record(alone, above=False)
        image, prompt = masks.image.to(hidden.device), masks.prompt.to(hidden.device)
        if not prompt[image.any(1)].any(1).all():
            raise ValueError("a row with an image has no prompt: labels must be -100 on the prompt")
        with plain_mode(hidden.device), self._lock:
            rows = (Rows(hidden.float(), mask) for mask in (prompt, image))
            keys = self.experts.rows("visual_keys"), self.experts.rows("text_keys")
            routing = self.router.route(self.router.features(*rows), *keys, image.any(1))
            edited = routing.weights.any(1).nonzero().flatten()
            if not len(edited):
                return Route(has_image=True)
            U, V = (self.experts.rows(name)[routing.experts] for name in ("U", "V"))
            return Route(True, routing, edited, U, V)

    def _refuse(self, call: dict, hidden: Tensor) -> None:
        """Raise RuntimeError for a call with pictures that cannot be routed rightly."""
        cache, wanted = first_of(call, *CACHES), call.get("logits_to_keep")
        if hidden.shape[:2] != call["input_ids"].shape:
            raise RuntimeError("the edit layer does not see all tokens: choose a lower edit layer")
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise RuntimeError("continuous batching packs prompts into one row: use generate")
        if cache is not None and isinstance(wanted, int) and wanted > 1:
            raise RuntimeError("assisted decoding puts guesses behind the prompt: decode without")

    def _add_residual(self, hidden: Tensor, route: Route) -> Tensor:
        """Eq. (6) on the rows that use an expert; all other rows are copied bit by bit."""
        rows = route.rows
        # Detached: the frozen model's outputs require no gradient because of an edit.
        weight, bias = self.norm.weight.detach(), self.norm.bias.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            normed = F.layer_norm(hidden[rows].float(), weight.shape, weight, bias, self.norm.eps)
            residual = apply_experts(normed, route.U, route.V, route.routing.weights[rows])
        return hidden.index_add(0, rows, residual.to(hidden.dtype))

    def explain(self, inputs: dict) -> list[list[dict]]:
        """List for each row of inputs the edits that it uses, heaviest first.

        Each is a dict of id, prompt, target, similarity, threshold and weight.
        """
        report: list[list[dict]] = [[] for _ in inputs["input_ids"]]
        if not len(self.experts):
            return report
        hidden, _ = self.frozen.record(inputs, above=False)
        self._follow(hidden.device)
        with self._lock:
            routing = self._route(inputs, hidden).routing
            for i, n in routing.weights.nonzero().tolist() if routing else ():
                expert = routing.experts[n]
                edit, similarity = self.experts.edits[expert], routing.similarity[i, expert]
                used = {"id": edit.id, "prompt": edit.prompt, "target": edit.target}
                used |= {"similarity": similarity.item(), "weight": routing.weights[i, n].item()}
                report[i].append(used | {"threshold": routing.threshold[i].item()})
        return [sorted(row, key=lambda used: -used["weight"]) for row in report]

    # --------------------------------------------------------------------- the lower layers

    def encode(self, image, prompt, target=None) -> dict:
        """Make model inputs for one question, or for lists of them, all with images or all without.

        Prompts are padded on the left, as `generate` needs it. With targets, their tokens and the
        end of the answer follow, padded on the right, and `labels` mark them (-100 elsewhere).
        Raises TypeError or ValueError for what is no picture or text, an empty prompt or target, a
        prompt that holds the image token, and rows that are longer than the model can read.
        """
        if isinstance(prompt, str):
            image, prompt, target = [image], [prompt], None if target is None else [target]
        given = [image, prompt] if target is None else [image, prompt, target]
        is_list = [isinstance(values, (list, tuple)) for values in given]
        if not prompt or not all(is_list) or len({len(values) for values in given}) > 1:
            raise ValueError("encode takes one image, prompt and target, or a list of each")
        return self._format.encode(image, prompt, target)

    def capture(self, questions: Sequence, above: bool = True) -> States:
        """Run the frozen lower layers once for questions with targets, all with images or none.

        above: see `capture_inputs`.
        """
        if not questions:
            raise ValueError("capture needs at least one question")
        images, prompts, targets = map(list, zip(*questions, strict=True))
        return self.capture_inputs(self.encode(images, prompts, targets), above)

    def capture_inputs(self, inputs: dict, above: bool = True) -> States:
        """Run the frozen lower layers once on inputs prepared elsewhere, with `labels`.

        above: note too what the layers above are called with, which training needs, and keep chats
        whole; else of a chat the last question, asked alone. The first such call replays these
        layers one by one and compares them with what the model itself does.
        Raises RuntimeError if the two differ: then training would see another model.
        """
        if above:
            masks = self._format.last_question(inputs)[1]
        else:
            inputs, masks = self._format.asked_alone(inputs)
        hidden, calls = self.frozen.record(inputs, above)
        self._follow(hidden.device)
        masks = RowMasks(*(mask.to(hidden.device) for mask in masks))
        labels = self._format.per_token(inputs)[2]
        states = States(hidden, masks, labels.to(hidden.device), tuple(calls))
        if above and not self._replay_checked:
            self.frozen.check_replay(states, inputs)
            compared = masks.image.any(1) & masks.answer.any(1)
            self._replay_checked = bool(compared.any())
        return states

    # ------------------------------------------------------------------------ the editor learns

    def standardise(self, batches: Sequence[States]) -> None:
        """Fit the norms of a new editor to the states of some edits: see `fit_norm`.

        All but `norm_V`, which reads embeddings. Raises RuntimeError on an editor that has been
        trained, ValueError if the states have no images, prompts and answers.
        """
        if self.trained_steps or len(self.experts):
            raise RuntimeError("the norms of an editor that has been trained are no longer fitted")
        rows = [[states.hidden[mask].float() for mask in states.masks] for states in batches]
        image, prompt, answer = map(torch.cat, zip(*rows, strict=True))
        if min(len(image), len(prompt), len(answer)) < 2:
            raise ValueError("norms are fitted to states of edits: with image, prompt and answer")
        for side in (self.router.edit_side, self.router.input_side):
            fit_norm(side.visual_norm, image)
            fit_norm(side.visual_prompt_norm, prompt)
            fit_norm(side.text_norm, prompt)
        used = torch.cat([image, prompt, answer])
        fit_norm(self.generator.norm_U, used)
        fit_norm(self.norm, used)

    def training_losses(
        self, batch: Sequence[tuple[States, States, States]], text_locality: Rows | None = None
    ) -> dict[str, Tensor]:
        """Compute all losses of one batch of edits; "total" is their sum, every weight 1.

        batch: triples of states, of E edits, of a generality query and of a locality query for each
        of them, about another picture: row i of the three belongs to one edit.
        Differs from the paper: experts are made of the first triple alone; the routing losses,
        which pass no layer of the model, compare the edits of all, B >= 2 in sum.
        text_locality: prompt rows of B other questions, row i about the picture of edit i, for Eq.
        (15) and Eq. (16); None: Eq. (15) takes random other edits, as in the paper.
        Raises ValueError for a batch that cannot be trained, RuntimeError if there are edits.
        """
        if len(self.experts) and torch.is_grad_enabled():
            raise RuntimeError("edits belong to the networks as they are: reset() before training")
        # One role behind the other: B edits, B generality queries, B locality queries.
        by_role = [states for role in zip(*batch, strict=True) for states in role]
        prompt = Rows.cat([Rows.gather(s.hidden.float(), s.masks.prompt) for s in by_role])
        image = Rows.cat([Rows.gather(s.hidden.float(), s.masks.image) for s in by_role])
        count, device = len(prompt.states) // 3, prompt.states.device
        if count < 2 or any(len(states.hidden) != len(t[0].hidden) for t in batch for states in t):
            raise ValueError("a batch needs two edits or more, with as many queries in each role")
        if not all(mask.any(1).all() for states in by_role for mask in states.masks):
            raise ValueError("each row needs an image, a prompt, and labels of an answer behind it")
        if text_locality is not None and len(text_locality.states) != count:
            raise ValueError(f"text_locality needs one row for each of {count} edits")
        owner = torch.arange(count, device=device).repeat(3)
        in_scope = torch.arange(3 * count, device=device) < 2 * count

        text_keys = self.router.text_key(prompt)
        features = self.router.features(prompt, image.some(ROWS_SEEN))
        # Eq. (12-16): one random pick of {edit, generality} goes through the edit side.
        # Differs from the paper: all of them go through the input side, they are there anyway.
        picks = owner[:count] + count * torch.randint(2, (count,), device=device)
        # Differs from the paper: of each picture the losses see other rows in each step, as if it
        # were another view. It is known again the better when it is cropped, turned or lit anew.
        looks = image.select(picks).some(ROWS_SEEN)
        visual_keys = self.router.visual_key(prompt.select(picks), looks)
        similarity = self.router.visual_similarity(features.visual, visual_keys)
        # Eq. (16): the keys of locality queries, which may ask what the edit asks, are negatives.
        # Differs from the paper: so are those of other questions about the edited picture.
        keys, untouched = [text_keys[picks], text_keys[~in_scope]], None
        if text_locality is not None:
            keys.append(self.router.text_key(text_locality))
            untouched = self.router.input_side.text(text_locality)
        keys = torch.cat(keys)

        experts = len(batch[0][0].hidden)  # E
        scores = text_similarity(features.text, text_keys[:experts])  # (3 B, E)
        # Eq. (5), the sentinel alone: experts learn not to harm what the filter may let by later.
        kept = (similarity > self.router.thresholds(features)[:, None])[:, :experts]
        scores, kept = (x.unflatten(0, (3, count))[:, :experts] for x in (scores, kept))
        losses = self._editing_losses(batch[0], scores, kept)
        losses |= self.router.losses(features, similarity, keys, owner, in_scope, untouched)
        losses["total"] = sum(losses.values())  # l_edit + l_route
        self.trained_steps += torch.is_grad_enabled()  # `edit` refuses an editor without training
        return losses

    def _editing_losses(
        self, triple: tuple[States, States, States], scores: Tensor, kept: Tensor
    ) -> dict[str, Tensor]:
        """Compute Eq. (8-11): means over a row's answer tokens, then over the E edits.

        scores and kept (3, E, E): of the rows of each role with the E experts.
        Differs from the paper, which mixes all experts of the batch into each row: in scope a row
        gets its own and those that the filter keeps. Otherwise the locality loss makes experts
        timid where the filter will keep them away.
        """
        (U, V), losses = self._experts_of(triple[0]), {}
        own = torch.eye(len(U), dtype=torch.bool, device=U.device)
        for role, name in enumerate(("reliability", "generality", "locality")):
            states, in_scope = triple[role], name != "locality"
            mixed = kept[role] | own if in_scope else kept[role]
            if not mixed.any():  # no locality row is touched
                losses[name] = scores.new_zeros(())
                continue
            hidden = states.hidden.float()
            weights = soft_weights(scores[role], mixed)
            edited = hidden + apply_experts(self.norm(hidden), U, V, weights)
            logits = self.frozen.upper(edited.to(states.hidden.dtype), states)
            if states.hidden.dtype == torch.float16 and logits.requires_grad:
                edited.register_hook(lambda gradient: gradient / HALF_PRECISION_SCALE)
                logits.register_hook(lambda gradient: gradient * HALF_PRECISION_SCALE)
            if in_scope:
                targets = states.labels[states.masks.answer]
                # Eq. (8), reliability; Eq. (9) and Eq. (10), generality: -log f(o | v, p)
                wrong = F.cross_entropy(logits, targets, reduction="none")
            else:
                with torch.no_grad():
                    base = self.frozen.upper(states.hidden, states).log_softmax(-1)
                # Eq. (11): KL( f_base || f_edited ), of rows with an image: no other row is edited.
                drift = F.kl_div(logits.log_softmax(-1), base, reduction="none", log_target=True)
                wrong = drift.sum(-1)
            tokens = states.masks.answer.sum(1)  # of each row's answer
            losses[name] = (wrong / tokens.repeat_interleave(tokens)).sum() / len(U)
        return losses

    # --------------------------------------------------------------------------------- keeping

    def save_pretrained(self, folder: str | Path) -> None:
        """Write editor and edits as one file, in the place of an older one.

        Whoever reads or writes meanwhile, and however this process ends, finds a whole file.
        Raises ValueError for weights that are not finite, OSError if it cannot be written.
        """
        networks = {f"networks.{name}": weight for name, weight in self.state_dict().items()}
        if not all(weight.isfinite().all() for weight in networks.values()):
            raise ValueError("the editor's weights hold numbers that are not finite")
        self._save(Path(folder) / EDITOR_FILE, networks | {"model": fingerprint(self.model)})

    def save_experts(self, file: str | Path) -> None:
        """Write the experts alone, for someone who has the same editor."""
        self._save(Path(file), {})

    def _save(self, file: Path, tensors: dict[str, Tensor]) -> None:
        about = {"config": asdict(self.config), "trained_steps": self.trained_steps}
        with self._lock:
            about |= {"editor": self._digest(), "next_id": self.experts.next_id}
            edits = json.dumps([asdict(edit) for edit in self.experts.edits])
            rows = {f"experts.{name}": self.experts.rows(name) for name in self.experts.shapes}
            tensors = {key: value.cpu().contiguous() for key, value in (tensors | rows).items()}
            # A tensor: safetensors reads no more than 100 MB of metadata.
            tensors["edits"] = torch.frombuffer(bytearray(edits.encode()), dtype=torch.uint8)
            content = save(tensors, {"liveedit": json.dumps(about)})
        write_whole(file, lambda opened: opened.write(content))

    @classmethod
    def from_pretrained(cls, model: nn.Module, processor, folder: str | Path, **changes):
        """Load a saved editor with its edits and attach it.

        changes: `threshold` and `newest_wins` may be other than saved.
        Raises FileNotFoundError, TypeError or ValueError that says what is missing or does not fit.
        """
        if unknown := sorted(changes.keys() - {"threshold", "newest_wins"}):
            raise TypeError(f"{unknown[0]} of a trained editor cannot be changed")
        file = Path(folder) / EDITOR_FILE
        if not file.is_file():
            told = "or one of an older version, which must be trained anew"
            raise FileNotFoundError(f"{folder} is no saved editor: it has no {EDITOR_FILE}; {told}")
        try:
            about, edits, parts = read_saved(file)
            config = LiveEditConfig(**about["config"] | changes)
            editor = cls(model, processor, config, attach=False)
            if not same_model(parts["model"][""], fingerprint(editor.model)):
                raise ValueError("it is of another model")
            editor.load_state_dict(parts["networks"])
            if editor._digest() != about["editor"]:
                raise ValueError("its networks are not as they were saved")
            editor.trained_steps = int(about["trained_steps"])
            editor.experts.add(parts["experts"], edits)
            editor.experts.next_id = int(about["next_id"])
        except Exception as error:
            raise ValueError(f"the editor in {folder} does not load: {error!r}") from error
        return editor.attach()

    def load_experts(self, file: str | Path) -> list[Edit]:
        """Add experts that `save_experts` wrote elsewhere, as newer edits than those here.

        Raises ValueError, and adds nothing, if they are of another editor or damaged.
        """
        try:
            about, edits, parts = read_saved(Path(file))
            if about["editor"] != self._digest():
                raise ValueError("they were made by another editor")
            with self._lock:
                first = self.experts.next_id
                edits = [replace(edit, id=first + i) for i, edit in enumerate(edits)]
                self.experts.add(parts["experts"], edits)
        except Exception as error:
            raise ValueError(f"the experts in {file} do not load: {error!r}") from error
        return edits

    @torch.no_grad()  # with gradients, threads that read one weight at once may wait for ever
    def _digest(self) -> str:
        """Identify the editor by all that its experts depend on."""
        lasting = replace(self.config, threshold=None, newest_wins=True)
        digest = hashlib.sha256(json.dumps(asdict(lasting)).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().numpy())
        return digest.hexdigest()[:16]


def write_whole(file: Path, write: Callable) -> None:
    """Write a file whole or not at all: write(opened) fills a draft, which takes its place.

    A link is followed. Raises OSError that names the file if it cannot be written.
    """
    file = file.resolve()
    draft = file.with_name(f"{file.name}.{uuid.uuid4().hex}.new")  # others may save here too
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as opened:
            write(opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(draft, file)
    except (OSError, RuntimeError) as error:  # torch.save has its own words for a full disk
        raise OSError(f"{file} could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def read_saved(file: Path) -> tuple[dict, list[Edit], dict[str, dict[str, Tensor]]]:
    """Read what `LiveEdit._save` wrote: what it says of itself, the edits, and tensors by part."""
    content = file.read_bytes()  # at once: safetensors would open the path again meanwhile
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load(content).items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    records = json.loads(parts["edits"][""].numpy().tobytes())
    about = json.loads(header["__metadata__"]["liveedit"])
    return about, [Edit(**record) for record in records], parts
