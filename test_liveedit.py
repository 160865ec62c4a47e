"""Tests: `python -m pytest -q test_liveedit.py`, on CPU, without network, in some minutes.

References: the official modules' numbers (GOLDEN), naive loops, and the unedited model itself.
Laws are tested with an untrained editor whose filter keeps everything: its experts are noise, but
loud. Behaviour is tested with an editor trained here for some seconds.
"""

import asyncio
import contextlib
import copy
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU, whatever the machine has

import numpy
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

import backbone
import data
import drawn
import liveedit
import run
from backbone import FrozenModel, row_masks
from generator import (
    CrossAttention,
    Edit,
    ExpertGenerator,
    ExpertRepository,
    apply_experts,
    fit_norm,
)
from liveedit import LiveEdit, LiveEditConfig, Question
from router import (
    Router,
    Rows,
    hard_filter_loss,
    soft_router_losses,
    soft_weights,
    superseded,
    text_similarity,
)

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny-llava"
QUESTIONS = ("What shape is this?", "Name the color of the figure.", "Describe the image.")
TEXT = "What is 3 plus 4?"


def load_tiny(**settings):
    return AutoModelForImageTextToText.from_pretrained(TINY, **settings).eval()


@pytest.fixture(scope="session")
def base():
    return load_tiny(), AutoProcessor.from_pretrained(TINY)


@pytest.fixture(autouse=True)
def seed_and_clean_model(base):
    torch.manual_seed(0)
    yield
    for hook in list(base[0]._forward_pre_hooks.values()):  # also after a failed test
        if isinstance(owner := getattr(hook, "__self__", None), FrozenModel):
            owner.detach()


def strong_editor(model, processor, **config) -> LiveEdit:
    """An untrained editor whose filter keeps every expert and whose experts are loud."""
    torch.manual_seed(1)
    settings = {"module_dim": 64, "sentinel_tokens": 4, "threshold": -1.0, "gain": 8.0}
    settings |= {"newest_wins": False} | config
    editor = LiveEdit(model, processor, LiveEditConfig(**settings))
    editor.trained_steps = 1
    return editor


@pytest.fixture
def editor(base):
    return strong_editor(*base)


def picture(index: int = 0, drawing: int = 0) -> Image.Image:
    return drawn.Drawing(drawn.SCENES[97 * index % len(drawn.SCENES)], drawing).open()


def questions(count: int, start: int = 0) -> list[tuple]:
    return [(picture(i), QUESTIONS[i % 3], f"answer {i}") for i in range(start, start + count)]


def logits_of(editor: LiveEdit, inputs: dict, **more) -> torch.Tensor:
    with torch.no_grad():
        return editor.model(**inputs, **more).logits


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-4) -> None:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference}"


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert torch.equal(a, b), f"largest difference {(a - b).abs().max().item()}"


def mixed_rows(editor: LiveEdit, pictured: list[tuple], texts: list[str]) -> dict:
    """Inputs of a batch whose first rows have an image and whose last have none."""
    first = editor.encode([p for p, _ in pictured], [q for _, q in pictured])
    last = editor.encode([None] * len(texts), texts)
    width = max(first["input_ids"].shape[1], last["input_ids"].shape[1])
    joined, pad = {"pixel_values": first["pixel_values"]}, editor.processor.tokenizer.pad_token_id
    for key, fill in (("input_ids", pad), ("attention_mask", 0)):
        rows = [F.pad(i[key], (width - i[key].shape[1], 0), value=fill) for i in (first, last)]
        joined[key] = torch.cat(rows)
    return joined


# ---------------------------------------------------------------------------- generator and router

GOLDEN = {  # numbers of the official modules with weights by the formula of `fill`
    "U": [0.0353027, -0.01053765, -0.01673184, -0.00028475, -0.04993529, -0.03197528],
    "V": [0.00650326, -0.02784757, -0.05914669, -0.00345538, -0.04267574, -0.03917223],
    "visual_similarity": [0.35805993, 0.35404209, 0.32464034],
    "sentinel_similarity": [0.33574161],
    "text_similarity": [0.26023561, 0.26119052, 0.34076882],
    "weights": [0.2822123, 0.28259933],
    "residual": [0.00136484, -0.00523396, -0.010768, -0.00047959, -0.0079005, -0.00714167],
}


def fill(number: int, *parts) -> None:
    """Give parameters, in this order, the values that those of the official modules had."""
    for part in parts:
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else [part]:
            wave = 0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + number
            parameter.data = 0.3 * torch.sin(wave).view(parameter.shape)
            number += 1


def small_config(**changes) -> LiveEditConfig:
    settings = {"module_dim": 8, "heads": 2, "slots": 1, "sentinel_tokens": 4}
    return LiveEditConfig(**settings | changes)


def golden_rows(wave, length: int, step: float, shift: float) -> Rows:
    values = wave(step * torch.arange(length * 6, dtype=torch.float64) + shift)
    return Rows(values.view(1, length, 6), None)


def test_agrees_with_the_official_modules():
    prompts = [golden_rows(torch.sin, 5, *p) for p in ((0.61, 0), (0.43, 1), (0.97, 5))]
    images = [golden_rows(torch.cos, 4, *p) for p in ((0.29, 0), (0.53, 1), (1.21, 5))]
    generator = ExpertGenerator(6, 8, 3, heads=2, gain=0.2).double()
    fill(1, generator.norm_U, generator.queries_U, generator.attention_U)
    fill(2, generator.norm_V, generator.queries_V, generator.attention_V)
    router = Router(6, small_config(slots=2, similarity="dot", newest_wins=False)).double()
    for side, number in ((router.edit_side, 0), (router.input_side, 38)):
        visual = (side.visual_norm, side.visual_queries, side.visual_prompt_attention)
        text = (side.text_norm, side.text_queries, side.text_attention)
        fill(number, *visual, side.visual_image_attention, *text)
        fill(number, side.visual_prompt_norm)
    fill(62, router.sentinel)
    U, V = generator(torch.cat([p.states for p in prompts]))
    pairs = list(zip(prompts, images, strict=True))
    visual_keys = torch.cat([router.visual_key(p, i) for p, i in pairs])
    text_keys = torch.cat([router.text_key(p) for p in prompts])
    features = router.features(prompts[0], images[0])
    routing = router.route(features, visual_keys, text_keys)
    kept = routing.experts
    normed = F.layer_norm(prompts[0].states, (6,))
    ours = {"U": U[0, 0], "V": V[0, 0], "visual_similarity": routing.similarity}
    ours |= {"sentinel_similarity": routing.threshold, "weights": routing.weights}
    ours |= {"text_similarity": text_similarity(features.text, text_keys)}
    ours |= {"residual": apply_experts(normed, U[kept], V[kept], routing.weights)[0, 2]}
    assert kept.tolist() == [0, 1]
    for name, numbers in GOLDEN.items():
        assert_close(ours[name].flatten(), torch.tensor(numbers, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("rows", ((1, 3), (3, 1), (3, 3)), ids=str)
def test_attention_is_that_of_formed_keys_and_values(rows):
    attention = CrossAttention(10, 8, 12, heads=2)
    queries, states = torch.randn(rows[0], 4, 8), torch.randn(rows[1], 6, 10)
    mask, places = torch.rand(rows[1], 6) > 0.4, torch.randn(rows[1], 6, 8)
    mask[:, 0] = True
    query, key = attention.to_query(queries), attention.to_key(states) + places
    heads = [
        x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (query, key, attention.to_value(states))
    ]
    scores = heads[0] @ heads[1].transpose(2, 3) / 2  # heads are four numbers wide
    shares = scores.masked_fill(~mask[:, None, None], -math.inf).softmax(-1)
    naive = (shares @ heads[2]).transpose(1, 2).flatten(2)
    assert_close(attention(queries, states, mask, places), naive, 1e-5)


def test_soft_weights_are_shared_among_what_is_kept():
    scores = torch.randn(3, 5)
    kept = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    for weights, row, own in zip(soft_weights(scores, kept), scores, kept, strict=True):
        assert torch.allclose(weights[own], row[own].sigmoid() * row[own].softmax(0))
        assert (weights[~own] == 0).all()


def test_the_filter_keeps_exactly_what_lies_above_the_sentinel():
    router = Router(8, small_config(slots=2, newest_wins=False))
    features = router.features(Rows(torch.randn(4, 5, 8), None), Rows(torch.randn(4, 6, 8), None))
    keys = F.normalize(torch.randn(50, 2, 8), dim=-1)
    routing = router.route(features, keys, torch.randn(50, 2, 8))
    kept = torch.zeros(4, 50, dtype=torch.bool)
    kept[:, routing.experts] = routing.weights > 0
    cosine = F.cosine_similarity(features.visual[:, None], keys[None], dim=-1).mean(-1)
    sentinel = F.cosine_similarity(features.visual, features.sentinel, dim=-1).mean(-1)
    assert kept.any() and not kept.all()
    assert_same(kept, cosine > sentinel[:, None])
    router.threshold = 0.5
    assert (router.route(features, keys, keys).threshold == 0.5).all()


def test_of_one_fact_the_newest_counts_and_the_rest_is_weighed_as_ever():
    same = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    older = [[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert superseded(same).long().tolist() == older
    router = Router(8, small_config())
    router.threshold = 0.0
    features = router.features(Rows(torch.randn(1, 5, 8), None), Rows(torch.randn(1, 6, 8), None))
    near, text = features.visual, 20 * features.text  # of one fact: clearly kept, and relevant
    keys, text_keys = torch.cat([near, -near, near]), torch.cat([text, text, text])
    routing = router.route(features, keys, text_keys)
    assert routing.experts.tolist() == [0, 2] and routing.weights[0, 0] == 0 < routing.weights[0, 1]
    other = router.route(features, keys, torch.cat([text, text, -text]))  # the last is irrelevant
    assert (other.weights > 0).all()


def test_routing_losses_are_the_equations():
    similar, sentinel = torch.randn(4, 3), torch.randn(4)
    own, is_locality = torch.tensor([0, 1, 2, 1]), torch.tensor([False, False, False, True])

    def nce(chosen, *all_of_them):
        return torch.stack(all_of_them).logsumexp(0) - chosen

    expected = nce(sentinel[3], *similar[3], sentinel[3])
    for q in range(3):
        others = [similar[q, e] for e in range(3) if e != q]
        expected += nce(similar[q, q], *similar[q], sentinel[q]) / 3
        expected += nce(sentinel[q], *others, sentinel[q]) / 3
    assert_close(hard_filter_loss(similar, sentinel, own, ~is_locality), expected, 1e-5)
    scores, own, negative = torch.randn(2, 5), torch.tensor([1, 0]), torch.tensor([0, 1])
    l_sr1, l_sr2 = soft_router_losses(scores, own, negative)
    first = second = 0.0
    for q in range(2):
        first -= torch.sigmoid(scores[q, own[q]]).log() / 2
        first -= (1 - torch.sigmoid(scores[q, negative[q]])).log() / 2
        second += nce(scores[q, own[q]], *scores[q]) / 2
    assert_close(l_sr1, first, 1e-5)
    assert_close(l_sr2, second, 1e-5)


def test_an_untrained_generator_copies_the_answer_token_by_token():
    generator, states = ExpertGenerator(32, 32, 4, 2, 1.0), torch.randn(1, 12, 32)
    rows, embedded = torch.arange(9)[None], torch.randn(4, 32)
    U, V = generator(states[:, :9], rows >= 2, rows >= 5, embedded)
    assert F.cosine_similarity(U[0], states[0, 4:8], dim=1).min() > 0.7  # where they are said
    assert F.cosine_similarity(V[0], embedded, dim=1).min() > 0.7
    rows = torch.arange(12)[None]  # an answer that is longer than the rank
    assert torch.cat(generator(states, rows >= 2, rows >= 5, torch.randn(7, 32))).isfinite().all()


def test_a_constant_channel_is_not_blown_up():
    sign = torch.randn(500, 1).sign()
    constant = torch.zeros(500, 4)  # in its last two channels, before and behind the norm
    constant[:, :2] = torch.cat([sign, -sign], dim=1)
    norm = torch.nn.LayerNorm(4)
    fit_norm(norm, constant)
    assert_same(norm(constant)[:, 2:], torch.zeros(500, 2))


def test_rows_of_an_answer_carry_their_place_wherever_they_stand():
    """Compare the generator with one row after another; one answer is longer than the rank."""
    generator, states = ExpertGenerator(8, 8, 2, 2, 1.0), torch.randn(3, 7, 8)
    torch.nn.init.normal_(generator.attention_V.to_query.weight)
    answer = torch.tensor([[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0]])
    answer, mask, embedded = answer.bool(), torch.ones(3, 7).bool(), torch.randn(6, 8)
    mask[0, 0] = mask[2, 3:] = False
    U, V = generator(states, mask, answer, embedded)
    left = list(embedded)
    for b in range(3):
        said, read, places, number = [], [], [], 0
        for t in mask[b].nonzero().flatten().tolist():
            number += int(answer[b, t])
            placed = answer[b, t] and number <= 2
            places.append(generator.places[0, number - 1] if placed else torch.zeros(8))
            said.append(states[b, t - 1 if answer[b, t] else t])
            read.append(left.pop(0) if answer[b, t] else states[b, t])
        said, read, places = torch.stack(said)[None], torch.stack(read)[None], torch.stack(places)
        expected = generator.attention_U(generator.queries_U, generator.norm_U(said), None, places)
        assert_close(U[b], expected[0] * generator.scale, 1e-5)
        expected = generator.attention_V(generator.queries_V, generator.norm_V(read), None, places)
        assert_close(V[b], expected[0] * generator.scale, 1e-5)


def test_prompt_rows_follow_the_image_or_else_the_leading_special_tokens():
    ids = torch.tensor([[1, 9, 7, 7, 4, 5, 6], [2, 1, 4, 5, 6, 7, 7], [2, 2, 1, 4, 5, 6, 8]])
    labels = torch.tensor([[-100] * 6 + [6], [-100] * 7, [-100] * 7])
    masks = row_masks(ids, (ids != 2).long(), labels, 7, torch.tensor([1, 2]))
    expected = [[0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert masks.prompt.long().tolist() == expected
    assert masks.image.sum().item() == 4 and masks.answer.sum().item() == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_repository_is_a_list_of_experts_under_random_use(seed):
    rng, repository, model = random.Random(seed), ExpertRepository(2, 6, 3, 4), []
    shapes = {"U": (2, 6), "V": (2, 6), "visual_keys": (3, 4), "text_keys": (3, 4)}
    for _ in range(60):
        if rng.random() < 0.7 or not model:
            count, first = rng.randint(1, 9), repository.next_id
            rows = {name: torch.randn(count, *shape) for name, shape in shapes.items()}
            edits = [Edit(first + i, "p", "t", 0.0) for i in range(count)]
            repository.add(rows, edits)
            model += [(edit, {k: v[i] for k, v in rows.items()}) for i, edit in enumerate(edits)]
        else:
            edit, _ = model.pop(rng.randrange(len(model)))
            assert repository.remove(edit.id) is edit
        assert repository.edits == [edit for edit, _ in model]
        for name in shapes:
            for row, (_, expected) in zip(repository.rows(name), model, strict=True):
                assert_same(row, expected[name])
    with pytest.raises(ValueError, match="must be"):
        repository.add({name: tensor[:0] for name, tensor in rows.items()}, edits)
    with pytest.raises(ValueError, match="no record of an edit"):
        Edit(1.5, "p", "t", 0.0)
    with pytest.raises(ValueError, match="not finite"):
        repository.add({name: tensor * math.nan for name, tensor in rows.items()}, edits)
    repository.clear()
    assert len(repository) == 0 and repository.next_id > edits[-1].id


# ------------------------------------------------------------------------------ the model untouched


def test_an_unedited_layer_output_is_the_same_object(base):
    model, processor = base
    layer, outputs = backbone.find_decoder_layers(model)[0][3], []
    # The editor's hook comes first; an even earlier one needs `prepend` after it.
    editor = strong_editor(model, processor, layer=3)
    hooks = [
        layer.register_forward_hook(lambda m, a, o: outputs.append(o), prepend=p) for p in (1, 0)
    ]
    image, text = editor.encode(picture(), QUESTIONS[0]), editor.encode(None, TEXT)
    logits_of(editor, image)  # no experts
    editor.edit(picture(), QUESTIONS[0], "heart")
    logits_of(editor, text)  # text only
    editor.router.threshold = 1.0
    logits_of(editor, image)  # everything filtered
    assert [outputs[i] is outputs[i + 1] for i in range(0, len(outputs), 2)] == [True] * 3
    editor.router.threshold = -1.0
    logits_of(editor, image)
    assert outputs[-2] is not outputs[-1], "the edit changed nothing"
    for hook in hooks:
        hook.remove()


def test_the_head_never_multiplies_a_slice(base):
    """Its frozen weights would be copied for each row of a batch, and rounded otherwise."""
    model, processor = base
    strides = []
    editor = strong_editor(model, processor)
    spy = model.lm_head.register_forward_pre_hook(lambda m, a: strides.append(a[0].stride()))
    inputs = editor.encode([picture(1), picture(2)], QUESTIONS[:2])
    model(**inputs, logits_to_keep=2)
    model.generate(**inputs, max_new_tokens=2)
    spy.remove()
    width = model.config.get_text_config().hidden_size
    assert strides == [(2 * width, width, 1), *[(width, width, 1)] * 2]


def test_detached_and_disabled_are_bit_equal_and_foreign_hooks_survive(base):
    model, processor = base
    calls, layer = [], backbone.find_decoder_layers(model)[0][3]
    foreign = [model.register_forward_pre_hook(lambda m, a: calls.append("model"))]
    foreign.append(layer.register_forward_hook(lambda m, a, o: calls.append("layer")))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.lm_head.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    assert any(wanted), "an earlier editor has left the model frozen"
    counts = len(model._forward_pre_hooks), len(layer._forward_hooks)
    editor = strong_editor(model, processor)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inputs = editor.encode(picture(), QUESTIONS[0])
    editor.detach()
    original = logits_of(editor, inputs)
    editor.attach()
    with pytest.raises(RuntimeError, match="attached already"):
        editor.attach()
    other = strong_editor(load_tiny(), processor)
    editor.edit_many(questions(3))
    edited = logits_of(editor, inputs)
    assert not torch.equal(edited, original), "the edits changed nothing"
    assert_same(logits_of(other, inputs), original)  # editors on two models do not meet
    with pytest.raises(ZeroDivisionError), editor.disabled():
        assert_same(logits_of(editor, inputs), original)
        1 / 0  # noqa: B018
    assert_same(logits_of(editor, inputs), edited)
    with editor.disabled():
        editor.detach()
    editor.attach()
    assert_same(logits_of(editor, inputs), edited)
    editor.detach()
    assert editor.detach() is model
    with pytest.raises(RuntimeError, match="is detached"):
        editor.edit_many(questions(1))
    calls.clear()
    assert_same(logits_of(editor, inputs), original)
    assert calls == ["model", "layer"]
    assert counts == (len(model._forward_pre_hooks), len(layer._forward_hooks))
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    model.lm_head.weight.requires_grad_(True)
    for handle in foreign:
        handle.remove()


def test_exceptions_and_interrupts_leave_nothing_behind(editor):
    editor.edit_many(questions(2))
    inputs, other = editor.encode(picture(), QUESTIONS[0]), editor.encode(picture(1), QUESTIONS[2])
    expected = logits_of(editor, other)
    layers = backbone.find_decoder_layers(editor.model)[0]
    calls = [(place, lambda: logits_of(editor, inputs)) for place in (1, 5)]  # below and above
    calls += [(1, lambda: editor.explain(inputs)), (1, lambda: editor.edit_many(questions(1)))]
    for error in (ValueError, KeyboardInterrupt):
        for place, call in calls:
            with layers[place].register_forward_hook(Mock(side_effect=error)), pytest.raises(error):
                call()
            assert_same(logits_of(editor, other), expected)
            with pytest.raises(RuntimeError, match="whole model"):  # of no earlier call
                editor.model.get_decoder()(inputs_embeds=torch.zeros(1, 9, 128))


def test_without_edits_nothing_is_refused(editor):
    """A second turn on an old cache, and embeddings without ids, work as without LiveEdit."""
    inputs, more, outputs = editor.encode(picture(), QUESTIONS[0]), torch.tensor([[5, 6]]), []
    for disabled in (True, False):
        with editor.disabled() if disabled else contextlib.nullcontext():
            cache = editor.model(**inputs, use_cache=True).past_key_values
            outputs.append(editor.model(input_ids=more, past_key_values=cache).logits)
            embeddings = torch.ones(1, 3, 128)
            outputs.append(editor.model(inputs_embeds=embeddings, past_key_values=cache).logits)
    assert_same(outputs[0], outputs[2])
    assert_same(outputs[1], outputs[3])
    editor.edit_many(questions(1))
    with pytest.raises(RuntimeError, match="whole prompt"):
        editor.model(input_ids=more, past_key_values=cache)


def test_copies_of_a_hooked_model_are_refused_in_a_sentence(editor):
    editor.edit_many(questions(1))
    inputs = {"input_ids": torch.tensor([[5]])}
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="cannot be copied"):
            copying(editor.model)
    for copied in (copy.copy(editor.model), editor.model._replicate_for_data_parallel()):
        with pytest.raises(RuntimeError, match="copy or replica"):
            copied(**inputs)
    copied = copy.deepcopy(editor.detach())
    assert_same(copied(**inputs).logits, editor.model(**inputs).logits)


# ---------------------------------------------------------------------------- batches, generation


def test_a_batch_is_its_rows_one_by_one_with_padding_on_either_side(editor):
    editor.edit_many(questions(4))
    asked = [(picture(0), "What?"), (picture(1), QUESTIONS[2]), (picture(2), "What color is it?")]
    left = mixed_rows(editor, asked, [TEXT])
    order = torch.argsort(left["attention_mask"], dim=1, descending=True, stable=True)
    right = left | {key: left[key].gather(1, order) for key in ("input_ids", "attention_mask")}
    from_left, from_right = logits_of(editor, left), logits_of(editor, right)
    with editor.disabled():
        original = logits_of(editor, left)
    assert_same(from_left[-1], original[-1])
    assert not any(torch.equal(from_left[row], original[row]) for row in range(3))
    for row, one in enumerate([*asked, (None, TEXT)]):
        alone = logits_of(editor, editor.encode(*one))[0]
        assert_close(from_left[row, -len(alone) :], alone)
        assert_close(from_right[row, : len(alone)], alone)


def greedy_by_hand(editor: LiveEdit, inputs: dict, count: int) -> torch.Tensor:
    """Always the whole sequence, the prompt marked by labels: the reference of generation."""
    step, prompt = inputs, inputs["input_ids"].shape[1]
    for _ in range(count):
        inside = torch.arange(step["input_ids"].shape[1]) < prompt
        more = {} if step is inputs else {"labels": step["input_ids"].masked_fill(inside, -100)}
        logits = logits_of(editor, step, **more)[:, -1]
        logits[:, editor.processor.tokenizer.eos_token_id] = -torch.inf
        ids = torch.cat([step["input_ids"], logits.argmax(-1, keepdim=True)], 1)
        step = step | {
            "input_ids": ids,
            "attention_mask": F.pad(step["attention_mask"], (0, 1), value=1),
        }
    return step["input_ids"]


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_generation_with_cache_is_without_is_by_hand_is_alone(base, layer):
    editor = strong_editor(*base, layer=layer, gain=8.0)
    editor.edit_many(questions(4))
    asked = [(picture(0), QUESTIONS[0]), (picture(5), QUESTIONS[2]), (None, TEXT)]
    inputs = mixed_rows(editor, asked[:2], [TEXT])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = editor.model.generate(**inputs, **settings)
    assert_same(cached, editor.model.generate(**inputs, **settings, use_cache=False))
    assert_same(cached, greedy_by_hand(editor, inputs, 8))
    static = editor.model.generate(**inputs, **settings, cache_implementation="static")
    assert_same(cached, static)
    for row, one in enumerate(asked):
        alone = editor.model.generate(**editor.encode(*one), **settings)
        assert_same(cached[row, -8:], alone[0, -8:])
    with editor.disabled():
        assert not torch.equal(cached, editor.model.generate(**inputs, **settings))


WAYS = {
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "guided": {"guidance_scale": 1.5, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_beams_sampling_and_guidance_agree_with_and_without_cache(base, way):
    editor = strong_editor(*base, gain=3.0)
    editor.edit_many(questions(4))
    inputs, made = editor.encode(picture(0), QUESTIONS[0]), []
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True}
    for use_cache in (True, False):
        torch.manual_seed(0)
        result = editor.model.generate(
            **inputs, **settings, **WAYS[way], use_cache=use_cache, return_dict_in_generate=True
        )
        made.append(result)
    assert_same(made[0].sequences, made[1].sequences)
    assert_close(torch.stack(made[0].logits), torch.stack(made[1].logits), 1e-3)


def test_a_second_call_never_sees_the_first_ones_route(editor):
    editor.edit_many(questions(2))
    pairs = [editor.encode(picture(i), q) for i, q in ((0, QUESTIONS[0]), (7, QUESTIONS[2]))]
    fresh, token = [logits_of(editor, p) for p in pairs], torch.tensor([[5]])
    caches = [editor.model(**p, use_cache=True).past_key_values for p in pairs]
    forked = copy.deepcopy(caches)
    expected = [editor.model(input_ids=token, past_key_values=c).logits for c in caches]
    for i in (1, 0):
        assert_same(editor.model(input_ids=token, past_key_values=forked[i]).logits, expected[i])
        assert_same(logits_of(editor, pairs[i]), fresh[i])


def test_a_generation_that_has_begun_is_not_touched(editor):
    inputs = editor.encode(picture(), QUESTIONS[0])
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

    def generate(act=lambda: None):
        def between(ids, scores):
            if ids.shape[1] == inputs["input_ids"].shape[1] + 1:
                act()
            return scores

        return editor.model.generate(**inputs, **settings, logits_processor=[between])

    unedited = generate()
    assert_same(generate(lambda: editor.edit_many(questions(2))), unedited)
    edited = generate()
    assert not torch.equal(edited, unedited)
    assert_same(generate(editor.reset), edited)
    assert_same(generate(), unedited)


def test_what_cannot_be_routed_is_refused(editor):
    inputs, token = editor.encode(picture(), QUESTIONS[0]), torch.tensor([[5]])
    foreign = editor.detach()(**inputs, use_cache=True).past_key_values
    editor.attach()
    editor.edit(picture(), QUESTIONS[0], "heart")
    model, cache = editor.model, editor.model(**inputs, use_cache=True).past_key_values
    twice = copy.deepcopy(cache)
    twice.batch_repeat_interleave(2)
    with editor.disabled():  # the original refuses nothing
        model(input_ids=token.expand(1, 3), past_key_values=copy.deepcopy(cache))
    guessed = editor.encode(picture(), "heart and star heart and star heart")
    with pytest.raises(Exception, match="pixel|size|shape"):  # below the edit layer
        model(**inputs | {"pixel_values": torch.zeros(1, 3, 5, 5)})
    with pytest.raises(RuntimeError, match="whole model"):
        model.get_decoder()(inputs_embeds=torch.zeros(*inputs["input_ids"].shape, 128))
    refused = [
        ("embeddings alone", lambda: model(inputs_embeds=torch.zeros(1, 4, 128))),
        ("filled without", lambda: model(input_ids=token, past_key_values=foreign)),
        ("whole prompt", lambda: model(input_ids=token.expand(1, 3), past_key_values=cache)),
        ("whole prompt", lambda: model.generate(**inputs, max_new_tokens=3, prefill_chunk_size=8)),
        ("whole prompt", lambda: model.generate(**inputs, max_new_tokens=3, prefill_chunk_size=1)),
        (
            "guesses",
            lambda: model.generate(**guessed, max_new_tokens=2, prompt_lookup_num_tokens=1),
        ),
        ("had 1 rows", lambda: model(input_ids=token.expand(2, 1), past_key_values=twice)),
        ("labels", lambda: model(**inputs, labels=inputs["input_ids"])),
    ]
    for message, call in refused:
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()
    assert not model(**inputs).logits.requires_grad


def test_hidden_states_are_told_as_later_layers_get_them(base):
    for asked_before in (False, True):
        model, got = load_tiny(), {}
        if asked_before:  # transformers puts its recording hooks in place at the first such call
            model(input_ids=torch.tensor([[5]]), output_hidden_states=True)
        editor = strong_editor(model, base[1])
        editor.edit(picture(), QUESTIONS[0], "heart")
        layers, layer = model.get_decoder().layers, editor.config.layer
        layers[layer + 1].register_forward_pre_hook(lambda m, a, got=got: got.update(x=a[0]))
        inputs = editor.encode(picture(), QUESTIONS[0])
        told = model(**inputs, output_hidden_states=True)
        assert_same(told.hidden_states[layer + 1], got["x"])
    model.compile(backend="eager")  # in place
    assert_close(logits_of(editor, inputs), told.logits)


def test_global_modes_change_neither_dtypes_nor_promises(base):
    editor = strong_editor(*base)
    inputs = editor.encode(picture(), QUESTIONS[0])
    editor.edit_many(questions(3))
    expected, keys = logits_of(editor, inputs), editor.experts.rows("visual_keys").clone()
    editor.reset()
    with torch.inference_mode():
        editor.edit_many(questions(2))
        editor.capture(questions(2))
    editor.edit_many(questions(1, 2))
    assert_close(logits_of(editor, inputs), expected)
    editor.reset()
    with torch.autocast("cpu", torch.bfloat16):
        editor.edit_many(questions(3))
    assert_close(editor.experts.rows("visual_keys"), keys, 0.0)
    try:
        torch.set_default_dtype(torch.bfloat16)
        editor.detach()
        other = strong_editor(*base)
        other.edit_many(questions(1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (
        {p.dtype for p in other.parameters()} == {other.experts.rows("U").dtype} == {torch.float32}
    )


def test_threads_ask_edit_and_forget_at_once(editor):
    inputs = editor.encode(picture(), QUESTIONS[0])
    original = logits_of(editor, inputs)

    def work(number):
        for _ in range(4):
            edit = editor.edit_many(questions(1, number))[0]
            assert logits_of(editor, inputs).isfinite().all()
            with editor.disabled():
                assert_same(logits_of(editor, inputs), original)
            assert editor.forget(edit.id) == edit

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not editor.edits()
    assert_same(logits_of(editor, inputs), original)


def test_disabled_holds_for_its_block_and_for_threads_but_for_no_other_request(editor):
    editor.edit_many(questions(2))
    inputs, said = editor.encode(picture(), QUESTIONS[0]), {}
    edited = logits_of(editor, inputs)
    with editor.disabled():
        original = logits_of(editor, inputs)
        thread = threading.Thread(target=lambda: said.update(thread=logits_of(editor, inputs)))
        thread.start()
        thread.join()

    async def disabled():
        with editor.disabled():
            said["executor"] = await asyncio.to_thread(logits_of, editor, inputs)
            await asyncio.sleep(0.1)
            said["own"] = logits_of(editor, inputs)

    async def other():
        await asyncio.sleep(0.05)
        said["other"] = logits_of(editor, inputs)
        said["other executor"] = await asyncio.to_thread(logits_of, editor, inputs)

    async def both():
        await asyncio.gather(disabled(), other())

    asyncio.run(both())
    for name in ("thread", "executor", "own"):
        assert_same(said[name], original)
    for name in ("other", "other executor"):
        assert_same(said[name], edited)


def test_paged_caches_are_left_alone_or_refused(editor):
    image, text = editor.encode(picture(), QUESTIONS[0]), editor.encode(None, TEXT)
    hidden = torch.zeros(*image["input_ids"].shape, 128)
    paged = SimpleNamespace()  # tells no length
    assert editor._edited(hidden, image, paged, False) is None
    editor.edit_many(questions(1))
    assert editor._edited(hidden, text | {"cache": paged}, paged, False) is None
    with pytest.raises(RuntimeError, match="continuous batching"):
        editor._edited(hidden, image | {"cache": paged}, paged, False)


# -------------------------------------------------------------------------------------- edits


def test_edits_in_batches_make_the_same_experts(editor):
    editor.edit_many(questions(5))
    together = {name: editor.experts.rows(name).clone() for name in editor.experts.shapes}
    editor.reset()
    for question in questions(5):
        editor.edit(*question)
    for name, rows in together.items():
        assert_close(editor.experts.rows(name), rows, 1e-4)
    assert [edit.id for edit in editor.edits()] == [6, 7, 8, 9, 10], "an id was used again"


def test_order_of_edits_does_not_matter_and_forget_undoes(editor):
    inputs = editor.encode(picture(), QUESTIONS[0])
    original = logits_of(editor, inputs)
    first = editor.edit_many(questions(3))
    expected = logits_of(editor, inputs)
    extra = editor.edit(*questions(1, 5)[0])
    assert not torch.allclose(logits_of(editor, inputs), expected, atol=1e-3)
    editor.forget(extra.id)
    assert_same(logits_of(editor, inputs), expected)
    editor.reset()
    assert_same(logits_of(editor, inputs), original)
    editor.edit_many(questions(3)[::-1])
    assert_close(logits_of(editor, inputs), expected, 1e-3)
    assert [edit.prompt for edit in editor.edits()] == [edit.prompt for edit in first[::-1]]


def test_the_router_never_sees_answer_tokens(editor):
    editor.edit_many(questions(4))
    plain = editor.explain(editor.encode(picture(), QUESTIONS[0]))[0]
    assert len(plain) == 4 and plain == sorted(plain, key=lambda used: -used["weight"])
    for target in ("heart", "a longer answer of words"):
        inputs = editor.encode(picture(), QUESTIONS[0], target)
        bare = {key: value for key, value in inputs.items() if key != "labels"}
        for used in (editor.explain(inputs)[0], editor.explain(bare)[0]):
            for a, b in zip(used, plain, strict=True):
                assert a["id"] == b["id"] and a["weight"] == pytest.approx(b["weight"], abs=1e-5)
    assert set(plain[0]) == {"id", "prompt", "target", "similarity", "threshold", "weight"}
    inputs = editor.encode([picture(0), picture(1)], QUESTIONS[:2], ["heart", "a longer answer"])
    kept = int((inputs["labels"] != -100).any(0).sum()) + 1
    last = inputs | {"labels": inputs["labels"][:, -kept:], "logits_to_keep": kept}
    assert_close(logits_of(editor, last), logits_of(editor, inputs)[:, -kept:], 1e-4)


def test_saving_and_loading(base, tmp_path, monkeypatch):
    editor = strong_editor(*base)
    inputs, folder = editor.encode(picture(), QUESTIONS[0]), tmp_path / "editor"
    (tmp_path / "real").mkdir()
    folder.symlink_to(tmp_path / "real")
    editor.edit_many(questions(2))
    editor.save_pretrained(folder)
    older = logits_of(editor, inputs)
    editor.edit_many(questions(2, 2))
    newer = logits_of(editor, inputs)

    def load(model=None, **changes) -> LiveEdit:
        return LiveEdit.from_pretrained(model or load_tiny(), base[1], folder, **changes)

    for step in ("fsync", "replace"):  # before the newer file takes the older one's place
        for error, told in ((KeyboardInterrupt, ""), (OSError("disk full"), "written: disk full")):
            with (
                monkeypatch.context() as patch,
                pytest.raises((KeyboardInterrupt, OSError), match=told),
            ):
                patch.setattr(liveedit.os, step, Mock(side_effect=error))
                editor.save_pretrained(folder)
            assert_same(logits_of(load(), inputs), older)
    assert [file.name for file in (tmp_path / "real").iterdir()] == [liveedit.EDITOR_FILE]
    forgotten = editor.edit(*questions(1, 7)[0])
    editor.forget(forgotten.id)
    editor.save_pretrained(folder)
    loaded = load()
    assert_same(logits_of(loaded, inputs), newer)
    assert loaded.edits() == editor.edits() and loaded.trained_steps == 1
    assert loaded.edit(*questions(1)[0]).id == forgotten.id + 1, "an id was used again"
    changed = load(threshold=1.0, newest_wins=True)
    assert not torch.equal(logits_of(changed, inputs), newer) and changed.router.newest_wins
    changed.save_pretrained(folder)  # the same editor with another setting
    assert load().config.threshold == 1.0
    with pytest.raises(TypeError, match="rank"):
        load(rank=2)
    with torch.no_grad():
        editor.norm.bias += math.nan
    with pytest.raises(ValueError, match="not finite"):
        editor.save_pretrained(folder)


def test_an_editor_knows_its_model_in_any_precision_and_leaves_another_alone(base, tmp_path):
    editor = strong_editor(*base)
    editor.save_pretrained(tmp_path)
    editor.detach()
    LiveEdit.from_pretrained(load_tiny(dtype=torch.bfloat16), base[1], tmp_path)
    for part in ("model.language_model.layers.4", "model.language_model.embed_tokens"):
        other = load_tiny()
        for weight in other.get_submodule(part).parameters():
            weight.data += 0.1 * weight.std() * torch.randn_like(weight)
        with pytest.raises(ValueError, match="another model"):
            LiveEdit.from_pretrained(other, base[1], tmp_path)
        assert not other._forward_pre_hooks and all(p.requires_grad for p in other.parameters())


def test_a_new_editor_takes_the_place_of_one_that_nobody_holds(base, tmp_path):
    editor = strong_editor(*base)
    inputs = editor.encode(picture(), QUESTIONS[0])
    original = logits_of(editor, inputs)
    editor.edit_many(questions(2))
    edited = logits_of(editor, inputs)
    with pytest.warns(UserWarning, match="detached"):
        strong_editor(*base)
    assert_same(logits_of(editor, inputs), original)
    with pytest.raises(RuntimeError, match="is detached"):
        editor.edit_many(questions(1))
    with pytest.warns(UserWarning, match="detached"):
        editor.attach()
    assert_same(logits_of(editor, inputs), edited)
    editor.detach()
    assert all(parameter.requires_grad for parameter in base[0].parameters())


def test_who_saves_and_loads_at_once_finds_whole_files(base, tmp_path):
    savers, failed = [strong_editor(load_tiny(), base[1]) for _ in range(2)], []
    savers[1].edit_many(questions(3))
    savers[0].save_pretrained(tmp_path)

    def save(editor):
        for _ in range(12):
            editor.save_pretrained(tmp_path)

    with ThreadPoolExecutor(2) as pool:
        jobs, model = [pool.submit(save, editor) for editor in savers], load_tiny()
        while not all(job.done() for job in jobs):
            loaded = LiveEdit.from_pretrained(model, base[1], tmp_path)
            failed += [loaded] * (len(loaded.edits()) not in (0, 3))
            loaded.detach()
        assert not failed and not [job.result() for job in jobs if job.result()]
    assert [file.name for file in tmp_path.iterdir()] == [liveedit.EDITOR_FILE]


def test_experts_alone_travel_to_the_same_editor_and_to_no_other(base, tmp_path):
    editor = strong_editor(*base)
    editor.edit_many(questions(2))
    editor.save_experts(tmp_path / "some" / "experts")
    inputs = editor.encode(picture(), QUESTIONS[0])
    expected = logits_of(editor, inputs)
    editor.reset()
    arrived = editor.load_experts(tmp_path / "some" / "experts")
    assert [edit.id for edit in arrived] == [3, 4] and [e.target for e in arrived] == [
        "answer 0",
        "answer 1",
    ]
    assert_same(logits_of(editor, inputs), expected)
    with torch.no_grad():
        editor.norm.bias += 1
    with pytest.raises(ValueError, match="another editor"):
        editor.load_experts(tmp_path / "some" / "experts")
    assert len(editor.edits()) == 2


# ----------------------------------------------------------------------------------- model inputs


def targets_of(editor: LiveEdit, *question) -> list[str]:
    labels = editor.encode(*question)["labels"][0]
    ids = [i for i in labels.tolist() if i != -100]
    return editor.processor.tokenizer.convert_ids_to_tokens(ids)


PARTS = "{% for m in messages %}{% for p in m['content'] %}"
PARTS += "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def test_a_target_has_the_tokens_that_it_has_behind_its_prompt(base, monkeypatch):
    model, processor = base
    breaks = "{{ '\\n' }}"  # templates lose a last line break that stands for itself
    ends = {PARTS + " A:": "Ġ", CHATML + "assistant" + breaks: "d", PARTS + breaks: "d"}
    ends[PARTS + "<s>"] = "d"
    for template, first in ends.items():
        monkeypatch.setattr(processor, "chat_template", template)
        editor = strong_editor(model, processor)
        tokens = targets_of(editor, picture(), "What?", "dog")
        assert tokens[0].startswith(first), (template, tokens)
        assert "".join(tokens).strip("Ġ") == "dog</s>"
        editor.detach()
    monkeypatch.setattr(processor, "chat_template", "{{ messages[0]['role'] }}")
    with pytest.raises(ValueError, match="does not render"):
        strong_editor(model, processor).encode(picture(), "What?")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: a normalizer puts a space before every text."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", *(chr(c) for c in range(33, 127)), "\n"]
    pieces += ["he", "ar", "hear", "heart", "▁heart"]
    merges = [("h", "e"), ("a", "r"), ("he", "ar"), ("hear", "t"), ("▁", "heart")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(parts)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.post_processor = bos
    image = AddedToken("<image>", normalized=False, special=True)
    made.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>", image])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def test_llamas_tokenizer_gives_no_lone_space(base):
    model, processor = load_tiny(), copy.deepcopy(base[1])
    processor.tokenizer = llama_tokenizer()
    processor.tokenizer.image_token = "<image>"
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    processor.image_token_id = model.config.image_token_id
    editor = strong_editor(model, processor)
    assert targets_of(editor, picture(), "What?", "heart") == ["▁heart", "</s>"]
    running = processor.tokenizer.tokenize("ASSISTANT: heart")
    assert running[-1] == "▁heart", running


def test_bos_is_stripped_from_a_template_only_where_the_tokenizer_adds_one(base):
    for adds in (True, False):
        processor = copy.deepcopy(base[1])
        processor.chat_template, tokenizer = "<s>" + PARTS + " A:", processor.tokenizer
        if not adds:
            plain = processors.ByteLevel(trim_offsets=False)
            tokenizer.backend_tokenizer.post_processor = plain
        editor = strong_editor(base[0], processor)
        ids = editor.encode(picture(), "What?")["input_ids"][0].tolist()
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        editor.detach()


def chat_inputs(processor, images: list, chats: list[list[str]], side: str) -> dict:
    """Inputs of chats about one picture each, whose questions but the last were answered."""
    texts = []
    for asked in chats:
        turns = []
        for question in asked:
            parts = [{"type": "image"}] * (not turns) + [{"type": "text", "text": question}]
            said = [{"type": "text", "text": "ring"}]
            turns += [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
        texts.append(processor.apply_chat_template(turns[:-1], add_generation_prompt=True))
    rows = {"images": [[image] for image in images], "text": texts}
    return processor(**rows, padding=True, padding_side=side, return_tensors="pt")


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_question_of_a_chat_is_routed_as_if_asked_alone(base, side, monkeypatch):
    model, processor = base
    editor = strong_editor(model, processor)
    editor.edit_many(questions(4))
    images, (other, edited, third) = [picture(1), picture(7)], QUESTIONS
    long = " ".join([third] * 4)
    single = chat_inputs(processor, images, [[edited], [long]], side)
    chat = chat_inputs(processor, images, [[other, third, edited], [long]], side)
    alone = editor._format.asked_alone(chat)
    masks = editor._format.masks_of(alone, editor.model.device)
    for ids, prompt in zip(alone["input_ids"], masks.prompt, strict=True):
        asked = processor.tokenizer.decode(ids[prompt]).strip()
        assert asked in (f"{edited} ASSISTANT:", f"{long} ASSISTANT:")
    routes, route = [], editor.router.route

    def noted(*arguments):
        routes.append(route(*arguments))
        return routes[-1]

    monkeypatch.setattr(editor.router, "route", noted)
    prefill = editor.model(**chat, output_hidden_states=True)
    assert {tuple(h.shape[:2]) for h in prefill.hidden_states} == {tuple(chat["input_ids"].shape)}
    editor.explain(single)
    editor.explain(chat)
    in_chat, alone, explained = (routing.weights for routing in routes)
    assert_close(explained, in_chat)
    # But for one token: a question behind a picture begins a line, in a chat it follows a space.
    assert_close(in_chat[0], alone[0], 0.01)
    assert_close(in_chat[1], alone[1])
    with editor.disabled():
        assert not torch.equal(prefill.logits, editor.model(**chat).logits)
    if side == "left":
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        cached = editor.model.generate(**chat, **settings)
        assert_same(cached, editor.model.generate(**chat, **settings, use_cache=False))
        answer = {"labels": chat["input_ids"][:, -2:], "logits_to_keep": 2}
        prompts = {k: v[:, :-2] if v.dim() == 2 else v for k, v in chat.items()}
        routes.clear()
        logits_of(editor, chat, **answer)
        logits_of(editor, prompts)
        assert_close(routes[0].weights, routes[1].weights)
        numbered = {"position_ids": torch.arange(chat["input_ids"].shape[1]).expand(2, -1)}
        logits_of(editor, chat, **numbered)
        assert_close(routes[2].weights, in_chat, 1e-4)
    editor.detach()


def test_a_question_may_stand_before_its_picture(base):
    model, processor = base
    editor = strong_editor(model, processor)
    special = processor.tokenizer.all_special_tokens
    said = {
        "What is it? <image>": "USER: What is it?  ASSISTANT:",
        "Is <image> like <image>": "like  ASSISTANT:",  # of two pictures, both are asked about
    }
    for text, prompt in said.items():
        for before in ("", "USER: <image>\nWho? ASSISTANT: me "):
            pictures = [picture(i) for i in range((before + text).count("<image>"))]
            inputs = processor(
                images=[pictures], text=[f"{before}USER: {text} ASSISTANT:"], return_tensors="pt"
            )
            alone = editor._format.asked_alone(dict(inputs))
            masks = editor._format.masks_of(alone, model.device)
            tokens = processor.tokenizer.decode(alone["input_ids"][masks.prompt])
            for token in special:
                tokens = tokens.replace(token, " ")
            assert tokens.split()[-2:] == prompt.split()[-2:], (text, before, tokens)
            assert not before or "Who" not in tokens
    editor.detach()


def test_chats_are_recognised_by_the_template(base, monkeypatch):
    model, processor = base
    editor = strong_editor(model, processor)
    masks = editor.capture([(picture(), QUESTIONS[0], "USER: bob")]).masks
    assert masks.prompt.any() and masks.answer.sum() > 3  # no answer opens a turn
    editor.detach()
    of_words = "{% for m in messages %}{{ ' Human: ' if m['role'] == 'user' else ' Bot: ' }}"
    of_words += "{{ m['content'][0]['text'] }}{% endfor %}"
    openings = {CHATML: ["<|user|>", "<|assistant|>"], of_words: [" Human:", " Bot:"]}
    openings["{{ raise_exception('no') }}"] = ["", ""]
    for template, opening in openings.items():
        monkeypatch.setattr(processor, "chat_template", template)
        editor = strong_editor(model, processor)
        assert [processor.tokenizer.decode(o) for o in editor._format._openings[1:]] == opening
        editor.detach()


def test_the_editor_reads_the_picture_that_the_processor_shows(base, tmp_path):
    model, processor = base
    editor, pictures = strong_editor(model, processor), [picture().convert("P")]
    cut_out = picture().convert("RGBA")
    cut_out.putalpha(picture(3).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    for i, image in enumerate((cut_out, cut_out.convert("LA"), picture().convert("L"))):
        image.save(tmp_path / f"{i}.png")
        pictures += [image, data.ImageFile(tmp_path / f"{i}.png").open()]
    picture().crop((0, 0, 96, 60)).save(tmp_path / "turned.jpg", exif=exif)
    cut_out.save(tmp_path / "moving.gif", save_all=True, append_images=[picture(2)])
    pictures += [Image.open(tmp_path / name) for name in ("turned.jpg", "moving.gif")]
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    for image in pictures:
        wanted = processor(images=image, text=text, return_tensors="pt")
        for given in (image, [image]):
            made = editor.encode([given], ["What?"])
            assert_same(made["pixel_values"], wanted["pixel_values"])
            assert_same(made["input_ids"], wanted["input_ids"])


def test_prompt_styles_and_lists(base):
    texts = []
    for style in ("official", "chat"):
        editor = strong_editor(*base, prompt_style=style)
        ids = editor.encode(picture(), " What is it?\n")["input_ids"][0]
        texts.append(re.sub("(<image>)+", "<image>", base[1].tokenizer.decode(ids)))
        editor.detach()
    assert texts == ["<s><image>\nWhat is it?", "<s>USER: <image>\nWhat is it? ASSISTANT:"]
    editor.attach()
    with pytest.raises(ValueError, match="two calls"):
        editor.encode([picture(), None], ["a", "b"])
    with pytest.raises(RuntimeError, match="no processor"):
        editor.detach()
        strong_editor(base[0], None).encode(picture(), "What?")


# -------------------------------------------------------------------------------------- training


def training_set(editor, experts=3, cached=True, samples=4) -> run.TrainingSet:
    options = SimpleNamespace(batch_size=3, expert_batch_size=experts, seed=0, data=None)
    limit, run.CACHE_BYTES = run.CACHE_BYTES, 2**30 if cached else 0
    made = run.TrainingSet(editor, drawn.drawn_training(samples, seed=5), options)
    run.CACHE_BYTES = limit
    assert bool(made.kept) == cached
    return made


def training_batch(editor):
    triple, texts = training_set(editor).capture([2, 0, 3])
    return [triple], texts


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_training_reaches_all_of_the_editor_and_nothing_of_the_model(base, similarity):
    editor = strong_editor(*base, similarity=similarity, threshold=None)
    losses = editor.training_losses(*training_batch(editor))
    losses["total"].backward()
    parts = [value.item() for name, value in losses.items() if name != "total"]
    assert losses["total"].item() == pytest.approx(sum(parts), rel=1e-5) and len(parts) == 6
    for name, parameter in editor.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, f"{name} gets no gradient"
    assert all(p.grad is None and not p.requires_grad for p in editor.model.parameters())
    assert editor.trained_steps == 2


def test_cached_states_train_like_fresh_ones_whenever_a_step_is_taken(base):
    editor, losses = strong_editor(*base), []
    for cached, steps in ((True, (0,)), (False, (0,)), (False, (9, 30, 0)), (False, (9,))):
        samples = training_set(editor, 2, cached, samples=30)
        samples.batches.joined = samples.joined = 2
        for step in steps:
            batch = samples.batch(step)
        torch.manual_seed(3)
        losses.append(editor.training_losses(*batch))
        assert len(batch[0]) == 2
    for name, value in losses[0].items():
        for other in losses[1:3]:
            assert value.item() == pytest.approx(other[name].item(), rel=1e-3, abs=1e-4), name
    assert abs(losses[3]["total"] - losses[0]["total"]) > 0.01
    batches = [training_set(editor, 2, False, samples=30) for _ in range(2)]
    for step in (14, 15, 16, 40):  # a second epoch puts other samples together
        batches[0].batch(step)
    batches[1].batch(40)
    assert batches[0].batches.triples == batches[1].batches.triples
    assert batches[0].epoch == 2


def test_a_triple_holds_the_queries_of_its_samples_row_by_row(base):
    editor = strong_editor(*base)
    samples = training_set(editor, 2, samples=60)

    def targets(states) -> list[str]:
        rows = [editor.processor.decode(row[row >= 0]) for row in states.labels]
        return [row.replace("</s>", "").strip() for row in rows]

    for chats in (0.0, 1.0):
        samples.chats = chats
        chosen = samples.batches.triples[0]
        edits, generality, locality = samples.capture(chosen)[0]
        wanted = [samples.samples[i].edit.target for i in chosen]
        assert targets(edits) == targets(generality) == wanted != targets(locality)
        longer = generality.hidden.shape[1] - edits.hidden.shape[1]
        assert (longer > 36) == bool(chats)  # by another picture and what is said of it
        assert generality.masks.image.sum(1).tolist() == [36, 36]


def test_editing_losses_are_the_models_own_and_a_kl_divergence(base):
    editor = strong_editor(*base)
    (triple,), _ = training_batch(editor)
    scores, kept = torch.zeros(3, 3, 3), torch.ones(3, 3, 3).bool()
    weight = editor.norm.weight.detach().clone()
    editor.norm.weight.data *= 0  # silent experts
    silent = editor._editing_losses(triple, scores, kept)
    editor.norm.weight.data = weight
    assert silent["locality"].item() == pytest.approx(0, abs=1e-5)
    with editor.disabled():
        samples = [drawn.drawn_training(4, seed=5)[i].edit for i in (2, 0, 3)]
        own = [editor.model(**editor.encode(*run.question(edit))).loss.item() for edit in samples]
    assert silent["reliability"].item() == pytest.approx(sum(own) / 3, rel=1e-4)
    # KL( base || edited ): mean over a row's tokens, then over the edits.
    noisy = editor._editing_losses(triple, scores, kept)["locality"].item()
    states, (U, V) = triple[2], editor._experts_of(triple[0])
    shares = torch.full((3, 3), 1 / 6)  # sigmoid(0) of a third each
    edited = states.hidden + apply_experts(editor.norm(states.hidden), U, V, shares)
    row = states.masks.answer.nonzero()[:, 0]
    old, new = (editor.frozen.upper(h, states).log_softmax(-1) for h in (states.hidden, edited))
    kl = F.kl_div(new, old, log_target=True, reduction="none").sum(-1)
    expected = sum(kl[row == r].mean().item() for r in range(3)) / 3
    assert noisy == pytest.approx(expected, rel=1e-4)


def test_experts_of_the_first_triple_train_as_alone_while_all_train_the_router(base):
    editor, losses = strong_editor(*base), []
    samples = training_set(editor, 2)
    triples = [samples.capture(chosen)[0] for chosen in ([2, 0], [3, 1])]
    for batch in (triples[:1], triples):
        torch.manual_seed(3)
        losses.append(editor.training_losses(batch))
    for name in ("reliability", "generality", "locality"):
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=1e-4), name
    assert losses[1]["filter"] > losses[0]["filter"] + 0.01


def test_training_mixes_the_experts_that_the_filter_keeps_and_in_scope_the_own(base, monkeypatch):
    editor, losses, calls = strong_editor(*base), {}, []
    upper = editor.frozen.upper
    monkeypatch.setattr(editor.frozen, "upper", lambda *a: calls.append(1) or upper(*a))
    batch = training_batch(editor)
    for threshold, passes in ((1.0, 2), (-1.0, 4)):  # untouched rows need no pass
        editor.router.threshold = threshold
        calls.clear()
        losses[threshold] = editor.training_losses(*batch)
        assert len(calls) == passes
    assert losses[1.0]["locality"] == 0 < losses[-1.0]["locality"]
    assert losses[1.0]["reliability"] != losses[-1.0]["reliability"]


def test_what_cannot_be_trained_is_refused(base):
    editor = strong_editor(*base)
    one, two = editor.capture(questions(1)), editor.capture(questions(2))
    text = editor.capture([(None, TEXT, "7")] * 2)
    refused = [
        ("two edits", (one, one, one)),
        ("as many", (two, two, one)),
        ("without an image", (two, two, text)),
        ("above=False", (editor.capture(questions(2), above=False),) * 3),
    ]
    for message, triple in refused:
        with pytest.raises(ValueError, match=message):
            editor.training_losses([triple])
    editor.edit_many(questions(1))
    with pytest.raises(RuntimeError, match="reset"):
        editor.training_losses([(two, two, two)])


def gradient_of(editor: LiveEdit, scale: float) -> torch.Tensor:
    """Gradient of scaled editing losses, divided by the scale again."""
    editor.zero_grad()
    torch.manual_seed(3)
    losses = editor.training_losses(*training_batch(editor))
    (scale * (losses["reliability"] + losses["generality"])).backward()
    return editor.generator.queries_V.grad.flatten() / scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbones(base, tmp_path, dtype):
    editor = strong_editor(load_tiny(dtype=dtype), base[1], gain=1.0)
    editor.edit_many(questions(2))
    inputs = editor.encode(picture(), QUESTIONS[0])
    assert logits_of(editor, inputs).dtype == dtype
    assert {p.dtype for p in editor.parameters()} == {torch.float32}
    editor.save_pretrained(tmp_path)
    editor.reset()
    editor.router.threshold = None
    exact = gradient_of(strong_editor(*base, gain=1.0, threshold=None), 1.0)
    for scale in (1.0, 1e-5):  # small losses must not vanish
        found = gradient_of(editor, scale)
        cosine = F.cosine_similarity(exact, found, dim=0)
        assert cosine > 0.95 and 0.8 < found.norm() / exact.norm() < 1.25, (scale, cosine)
    base[0]._forward_pre_hooks.copy().popitem()[1].__self__.detach()
    LiveEdit.from_pretrained(*base, tmp_path)  # the same model in single precision


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    """An editor after some seconds of training, tested on the samples that it learned from."""
    torch.manual_seed(0)
    config = LiveEditConfig(layer=2, module_dim=128, sentinel_tokens=36, **run.SMALL_EDITOR)
    editor = LiveEdit(*base, config)
    samples = drawn.drawn_samples(48, drawn.split_scenes()[0], "test", held_out=False)
    options = run.parse_options(["--out", str(tmp_path_factory.mktemp("trained"))])
    few = {"train_steps": 200, "batch_size": 24, "expert_batch_size": 12, "learning_rate": 3e-3}
    for name, value in (run.SMALL | few | {"data": "samples without chats"}).items():
        setattr(options, name, value)
    taught = []  # a step takes one generality query of each sample
    for left_out in ("text_generality", "modal_generality"):
        for sample in samples:
            queries = {name: q for name, q in sample.queries.items() if name != left_out}
            taught.append(data.EditSample(sample.kind, queries))
    run.train(editor, taught, options)
    editor.detach()
    return editor, samples


def test_standardise_fits_each_norm_to_the_rows_that_it_reads(base):
    editor = LiveEdit(*base, LiveEditConfig(layer=2, module_dim=32, sentinel_tokens=4))
    edits = [run.question(sample.edit) for sample in drawn.drawn_training(12, 0)]
    states = editor.capture(edits, above=False)
    editor.standardise([states])
    image, prompt, answer = states.masks
    read = [(editor.norm, image | prompt | answer)]
    read.append((editor.generator.norm_U, image | prompt | answer))
    for side in (editor.router.edit_side, editor.router.input_side):
        read += [(side.visual_norm, image), (side.text_norm, prompt)]
        read.append((side.visual_prompt_norm, prompt))
    for norm, mask in read:
        normed = norm(states.hidden[mask])
        assert_close(normed.mean(0), torch.zeros(128), 1e-3)
        assert_close(normed.std(0), torch.ones(128), 1e-2)
    with pytest.raises(ValueError, match="image, prompt and answer"):
        editor.standardise([editor.capture([Question(None, TEXT, "7")], above=False)])
    editor.trained_steps = 1
    with pytest.raises(RuntimeError, match="trained"):
        editor.standardise([states])


def test_ten_edits_hold_spread_and_leave_the_rest(trained):
    editor, samples = trained
    editor.attach()
    for sample in samples[:10]:
        editor.edit(*run.question(sample.edit))
    shares = {}
    for name in data.MAIN_QUERIES:
        queries = [sample.queries[name] for sample in samples[:10]]
        after = run.answer(editor, queries, 128)
        with editor.disabled():
            before = run.answer(editor, queries, 128)
        triples = zip(queries, before, after, strict=True)
        shares[name] = sum(data.score(name, *triple)[0] for triple in triples) / 10
    editor.reset()
    assert shares["reliability"] > 0.9 and min(shares.values()) > 0.7, shares


def test_the_newest_edit_of_a_fact_wins_and_forgetting_it_brings_the_older_back(trained):
    editor, samples = trained
    editor.attach()
    for sample in samples[:10]:
        image, prompt, target = run.question(sample.edit)
        older, newer = editor.edit(image, prompt, target), editor.edit(image, prompt, "zorp")
        inputs = editor.encode(image, prompt)
        assert [used["id"] for used in editor.explain(inputs)[0]] == [newer.id]
        editor.forget(newer.id)
        assert [used["id"] for used in editor.explain(inputs)[0]] == [older.id]
        editor.reset()


# ---------------------------------------------------------------------------------- other families

BOS, EOS, PAD, IMAGE = range(4)  # the ids of tiny-llava's tokenizer
# Decoders and towers take what they know of these, and keep the rest unread.
DECODER = {"hidden_size": 32, "intermediate_size": 64, "ffn_dim": 64, "num_hidden_layers": 6}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DECODER |= {"query_pre_attn_scalar": 8, "vocab_size": 10_300, "max_position_embeddings": 512}
DECODER |= {
    "word_embed_proj_dim": 32,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 32}
TOWER |= {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "encoder_hidden_size": 32}
GRID = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
PALI = {"projection_dim": 32, "hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN = {"video_token_id": 10_290, "vision_start_token_id": 10_291, "vision_end_token_id": 10_292}
TILES = {"attention_heads": 4, "num_global_layers": 1, "max_num_tiles": 2}
TILES |= {"vision_output_dim": 64, "intermediate_layers_indices": [1]}
TILES |= {"supported_aspect_ratios": [[1, 1], [1, 2]]}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}
SOFTCAP = {"model_type": "gemma2", "final_logit_softcapping": 1.0}
PATCHES = {"patch_size": 4}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 3}
DEEPSTACK = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
FAMILIES = {  # what its decoder, its tower and the whole have beside
    "llava": ({}, {}, {"image_seq_length": 4}),
    "llava_next": ({}, {}, GRID),
    "llava_onevision": ({}, {}, GRID),
    "blip-2": ({}, {}, {"qformer_config": TOWER, "num_query_tokens": 4}),
    "paligemma": ({}, {}, PALI),
    "paligemma2": (WINDOWS | SOFTCAP, {}, PALI),
    "gemma3": (WINDOWS, {}, {"mm_tokens_per_image": 4}),
    "qwen2_5_vl": (MROPE, {"window_size": 16, "fullatt_block_indexes": [1]}, QWEN),
    "qwen3_vl": (MROPE, DEEPSTACK, QWEN),
    "internvl": ({}, PATCHES, {"image_seq_length": 4}),
    "idefics3": ({}, {}, {}),
    "smolvlm": ({}, {}, {}),
    "mistral3": ({}, PATCHES, {}),
    "mllama": ({"cross_attention_layers": [1, 4]}, TILES, {}),
    "lfm2_vl": (CONVOLUTIONS, {"num_patches": 16, "vision_use_head": False}, {}),
}


def family_config(name: str):
    """A small model of a family's real configuration classes."""
    text, tower, whole = FAMILIES[name]
    parts = {"text_config": DECODER | text, "vision_config": TOWER | tower}
    kind = "paligemma" if name == "paligemma2" else name
    return transformers.AutoConfig.for_model(kind, **parts, **whole, image_token_id=IMAGE)


def family_model(name: str, folder: Path):
    """A random model of the family, written to disk and loaded back as any checkpoint."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(family_config(name))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3  # with the usual initialisation all inputs look alike
        elif parameter.numel() == 1:
            parameter.data.fill_(1.0)  # Mllama's gates, which begin closed
    model.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return request.param, family_model(request.param, tmp_path_factory.mktemp(request.param))


def prepared(name: str, rows: int, answer: int = 3) -> dict:
    """Random inputs as the family's own processor would lay them out."""
    image, head, tail = [IMAGE] * 4, [BOS], []
    extra = {"pixel_values": torch.randn(rows, 3, 16, 16)}
    if name in ("llava_next", "llava_onevision"):  # four tiles and a small whole, with row ends
        image = [IMAGE] * 24
        extra = {"pixel_values": torch.randn(rows, 5, 3, 16, 16)}
        extra["image_sizes"] = torch.tensor([[32, 32]] * rows)
    elif name in ("blip-2", "paligemma", "paligemma2"):
        head, tail = [], [BOS]
    elif name in ("idefics3", "smolvlm"):  # one token for each of three tiles, others between
        image = [IMAGE, 10_250, IMAGE, 10_250, IMAGE]
        extra = {"pixel_values": torch.randn(rows, 3, 3, 16, 16)}
        extra["pixel_attention_mask"] = torch.ones(rows, 3, 16, 16, dtype=torch.long)
    elif name in ("qwen2_5_vl", "qwen3_vl"):
        head, tail, extra = [BOS, 10_291], [10_292], {"pixel_values": torch.randn(rows * 16, 384)}
        extra["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
    elif name == "mistral3":
        extra["image_sizes"] = torch.tensor([[16, 16]] * rows)
    elif name == "lfm2_vl":
        extra = {"pixel_values": torch.randn(rows, 16, 192)}
        extra["spatial_shapes"] = torch.tensor([[4, 4]] * rows)
        extra["pixel_attention_mask"] = torch.ones(rows, 16, dtype=torch.long)
    elif name == "mllama":
        image, extra = [IMAGE], {"pixel_values": torch.randn(rows, 1, 2, 3, 16, 16)}
        extra["aspect_ratio_ids"] = torch.tensor([[2]] * rows)
        extra["aspect_ratio_mask"] = torch.ones(rows, 1, 2, dtype=torch.long)
    prompt = torch.tensor([head + image + tail] * rows)
    ids = torch.cat([prompt, torch.randint(10, 600, (rows, 5 + answer))], 1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - answer, -100)
    if name.startswith("paligemma"):
        extra["token_type_ids"] = (labels != -100).long()
    if name == "gemma3":
        extra["token_type_ids"] = (ids == IMAGE).long()
    if name.startswith("qwen"):
        extra["mm_token_type_ids"] = (ids == IMAGE).long()
    if name == "mllama":
        extra["cross_attention_mask"] = torch.ones(*ids.shape, 1, 2, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra}


def prompt_of(inputs: dict, answer: int = 3) -> dict:
    shape = inputs["input_ids"].shape
    cut = {k: v[:, :-answer] if v.shape[:2] == shape else v for k, v in inputs.items()}
    return {key: value for key, value in cut.items() if key != "labels"}


def answers_of(inputs: dict, logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1][inputs["labels"][:, 1:] != -100]


def row_of(name: str, inputs: dict, row: int) -> dict:
    one = {}
    for key, value in inputs.items():
        patches = name.startswith("qwen") and key == "pixel_values"
        one[key] = value[16 * row : 16 * row + 16] if patches else value[row : row + 1]
    return one


@torch.no_grad()
def test_the_laws_hold_for_each_family(family):
    name, model = family
    editor, inputs = strong_editor(model, None, module_dim=32), prepared(name, 3)
    original = logits_of(editor, inputs)
    edits = [(picture(i), f"question {i}", "answer") for i in range(3)]
    made = editor.edit_inputs(inputs, edits)
    assert editor.frozen._noted.embedded is None, "embedding an answer counts as a call"
    states = editor.capture_inputs(inputs, above=False)
    embedded = model.get_input_embeddings()(inputs["labels"][:, -3:].flatten())
    used = states.masks.image | states.masks.prompt | states.masks.answer
    V = editor.generator(states.hidden, used, states.masks.answer, embedded)[1]
    assert_close(editor.experts.rows("V"), V, 1e-5)
    edited = logits_of(editor, inputs)
    assert all(not torch.allclose(edited[row], original[row], atol=1e-2) for row in range(3))
    assert [len(used) for used in editor.explain(inputs)] == [3] * 3
    with editor.disabled():
        assert_same(logits_of(editor, inputs), original)
    for row in range(3):
        assert_close(logits_of(editor, row_of(name, inputs, row))[0], edited[row], 2e-3)
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = 77  # another last token of the answer
    first = answers_of(inputs, edited).view(3, 3, -1)[:, :2]
    assert_close(answers_of(other, logits_of(editor, other)).view(3, 3, -1)[:, :2], first, 1e-5)
    prompt, settings = prompt_of(inputs), {"max_new_tokens": 5, "min_new_tokens": 5}
    settings["do_sample"] = False
    cached = model.generate(**prompt, **settings)[:, -5:]
    if name != "blip-2":  # which always has one
        with pytest.raises(RuntimeError, match="without a KV cache and a chat template"):
            model.generate(**prompt, **settings, use_cache=False)
    for row in range(3):
        alone = model.generate(**row_of(name, prompt, row), **settings)[:, -5:]
        assert_same(alone[0], cached[row])
    last = {"output_logits": True, "return_dict_in_generate": True}
    logits = model.generate(**prompt, **settings, **last).logits[-1]
    with editor.disabled():
        original_logits = model.generate(**prompt, **settings, **last).logits[-1]
    assert not torch.allclose(logits, original_logits, atol=1e-2), "generate ignores the edits"
    assert len(model.generate(**prompt, **settings, num_beams=2)) == 3
    editor.forget(made[0].id)
    editor.reset()
    assert_same(logits_of(editor, inputs), original)
    assert len(model._forward_pre_hooks) == 1 and not editor.detach()._forward_pre_hooks


def behind_another_picture(name: str, inputs: dict) -> dict:
    """The same questions behind an example: another picture and two words."""
    ids, other = inputs["input_ids"], prepared(name, len(inputs["input_ids"]))
    length = int((ids[0] == IMAGE).nonzero()[-1]) + 1
    length += int(name.startswith("qwen"))  # with the token that closes it
    head = int(ids[0, 0] == BOS)
    two = {}
    for key, value in inputs.items():
        if value.shape[:2] == ids.shape:
            fill = {"input_ids": 20, "attention_mask": 1, "labels": -100}.get(key, 0)
            words = torch.full((len(ids), 2, *value.shape[2:]), fill, dtype=value.dtype)
            two[key] = torch.cat([value[:, :length], words, value[:, head:]], 1)
            if key == "cross_attention_mask":  # a token sees the last picture before it
                sees = torch.arange(two[key].shape[1]) >= length + 2
                columns = torch.stack([~sees, sees], 1)[None, :, :, None]
                two[key] = columns.expand(len(ids), -1, -1, 2).long()
        elif name in ("idefics3", "smolvlm", "mllama"):  # pictures of a row
            two[key] = torch.cat([other[key], value], 1)
        else:  # one after another
            both = torch.stack([other[key], value]).unflatten(1, (len(ids), -1))
            two[key] = both.transpose(0, 1).flatten(0, 2)
    return two


@torch.no_grad()
def test_a_question_is_about_the_last_picture_before_it_in_each_family(family):
    name, model = family
    if name == "blip-2":
        return  # it reads one picture
    editor, inputs = strong_editor(model, None, module_dim=32), prepared(name, 2)
    editor._format.tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    editor._format._openings = [], [], []  # no chats, but an example before the question
    editor.edit_inputs(inputs, [(picture(i), f"question {i}", "answer") for i in range(2)])
    one, two = inputs, behind_another_picture(name, inputs)
    for a, b in zip(editor.explain(one), editor.explain(two), strict=True):
        assert [used["id"] for used in a] == [used["id"] for used in b]
        for x, y in zip(a, b, strict=True):
            # Qwen-VL's positions have a gap, Mllama's first token has seen the other picture.
            tolerance = 0.02 if name in ("qwen2_5_vl", "qwen3_vl", "mllama") else 1e-4
            assert x["similarity"] == pytest.approx(y["similarity"], abs=tolerance)
            assert x["weight"] == pytest.approx(y["weight"], abs=tolerance)
    with editor.disabled():
        original = answers_of(two, logits_of(editor, two))
    assert not torch.allclose(answers_of(two, logits_of(editor, two)), original, atol=1e-2)
    editor.detach()


def test_training_sees_the_very_model_in_each_family(family):
    name, model = family
    editor = strong_editor(model, None, module_dim=32)
    triple = []
    for _ in range(3):
        inputs = prepared(name, 3)
        with torch.no_grad():
            own = answers_of(inputs, logits_of(editor, inputs))
            triple.append(editor.capture_inputs(inputs))
            assert_close(editor.frozen.upper(triple[-1].hidden, triple[-1]), own, 1e-5)
    losses = editor.training_losses([tuple(triple)])
    losses["total"].backward()
    for key, parameter in editor.named_parameters():
        if key != "router.log_scale":
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert all(parameter.grad is None for parameter in model.parameters())
    editor.detach()


def test_a_family_whose_training_would_see_another_model_is_refused(tmp_path):
    model = family_model("qwen3_vl", tmp_path)  # adds image features behind its first two layers
    editor = strong_editor(model, None, module_dim=32, layer=0)
    editor.edit_inputs(prepared("qwen3_vl", 2), [(picture(), "q", "a")] * 2)  # no training needed
    text = torch.randint(10, 600, (2, 8))
    editor.capture_inputs({"input_ids": text, "labels": text})  # has no images to tell it by
    inputs = prepared("qwen3_vl", 2)
    editor.capture_inputs(inputs | {"labels": inputs["labels"] * 0 - 100})  # has no answers
    with pytest.raises(RuntimeError, match="edit layer 0: Qwen3VL.* does more above it"):
        editor.capture_inputs(prepared("qwen3_vl", 2))


def test_an_edit_between_two_tokens_leaves_positions_alone(tmp_path):
    model = family_model("qwen2_5_vl", tmp_path)
    editor, inputs = strong_editor(model, None, module_dim=32), prepared("qwen2_5_vl", 2)
    one = prepared("qwen2_5_vl", 1)  # with a bigger picture, so with other positions
    image = torch.full((1, 12), IMAGE)
    ids = torch.cat([one["input_ids"][:, :2], image, one["input_ids"][:, 2:]], 1)
    one |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    one |= {"mm_token_type_ids": (ids == IMAGE).long()}
    one |= {"labels": F.pad(one["labels"], (12, 0), value=-100)}
    one |= {"pixel_values": torch.randn(64, 384), "image_grid_thw": torch.tensor([[1, 8, 8]])}
    logits, token = [], torch.tensor([[5], [6]])
    for act in (editor.edits, lambda: editor.edit_inputs(one, [(picture(), "q", "a")])):
        cache = model(**prompt_of(inputs), use_cache=True).past_key_values
        act()
        logits.append(logits_of(editor, {"input_ids": token, "past_key_values": cache}))
    assert len(editor.edits()) == 1
    assert_same(*logits)


ENCODED = "llava_next blip-2 paligemma paligemma2 gemma3 idefics3 mllama".split()


def family_processor(name: str):
    """A family's own processor around the tiny LLaVA's tokenizer."""
    t, small = transformers, {"size": {"height": 16, "width": 16}}
    tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    shape = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    backend, names = tokenizer.backend_tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}
    if name == "llava_next":
        settings = {"size": {"shortest_edge": 16}, "crop_size": small["size"]}
        images = t.LlavaNextImageProcessor(**settings, **GRID)
        return t.LlavaNextProcessor(images, tokenizer, **shape, num_additional_image_tokens=1)
    if name == "blip-2":  # its processor wants a tokenizer that knows no image token yet
        plain = PreTrainedTokenizerFast(tokenizer_object=backend, **names, pad_token="<pad>")
        return t.Blip2Processor(t.BlipImageProcessor(**small), plain, num_query_tokens=4)
    if name.startswith("paligemma"):
        images = t.SiglipImageProcessor(**small)
        images.image_seq_length = 4
        return t.PaliGemmaProcessor(images, tokenizer)
    if name == "gemma3":
        tokens = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
        marked = PreTrainedTokenizerFast(
            tokenizer_object=backend, **names, pad_token="<pad>", extra_special_tokens=tokens
        )
        return t.Gemma3Processor(t.Gemma3ImageProcessor(**small), marked, image_seq_length=4)
    if name == "mllama":
        images = t.MllamaImageProcessor(size={"height": 16, "width": 16}, max_image_tiles=2)
        tokenizer.image_token = "<image>"
        return t.MllamaProcessor(images, tokenizer, chat_template="{{ bos_token }}" + PARTS + " A:")
    added = "<fake_token_around_image> <global-img> <end_of_utterance> <row_1_col_1>".split()
    tokenizer.add_tokens(added, special_tokens=True)
    edge = {"longest_edge": 16}
    images = t.Idefics3ImageProcessor(size=edge, max_image_size=edge)
    return t.Idefics3Processor(images, tokenizer, image_seq_len=1)


@pytest.mark.parametrize("name", ENCODED)
def test_encode_follows_the_processors_of_other_families(name, tmp_path):
    check_encode(name, family_processor(name), tmp_path)


def check_encode(name: str, processor, tmp_path: Path) -> None:
    model = family_model(name, tmp_path)
    editor = strong_editor(model, processor, module_dim=32)
    asked = [(picture(i), QUESTIONS[i], f"answer {i}") for i in range(2)]
    editor.edit_many(asked)
    together = editor.encode(*map(list, zip(*asked, strict=True)))
    logits = answers_of(together, logits_of(editor, together))
    alone = [editor.encode(*one) for one in asked]
    expected = [answers_of(inputs, logits_of(editor, inputs)) for inputs in alone]
    assert_close(logits, torch.cat(expected), 5e-3)
    first = int((alone[0]["labels"][0] >= 0).nonzero()[0])
    other = alone[0] | {"input_ids": alone[0]["input_ids"].clone()}
    other["input_ids"][0, -2] = 77  # another last token of the answer
    a, b = logits_of(editor, alone[0]), logits_of(editor, other)
    assert_same(a[0, first : first + 1], b[0, first : first + 1])
    states = editor.capture(asked)
    with editor.disabled():
        own = answers_of(together, logits_of(editor, together))
    assert_close(editor.frozen.upper(states.hidden, states), own, 5e-3)
    if name == "blip-2":
        return  # its forward cannot do without pictures
    text = editor.encode(None, TEXT, "seven")
    edited = logits_of(editor, text)
    with editor.disabled():
        assert_same(edited, logits_of(editor, text))


# ------------------------------------------------------------------------------------ hostile input

NO_PICTURES = ("cat.png", Path("cat.png"), b"\x89PNG", 3, [1, 2], {}, Image)
NO_PICTURES += (numpy.zeros((8, 8, 3), numpy.uint8), torch.zeros(3, 8, 8))
CLOSED, FILE = picture(), io.BytesIO()
CLOSED.save(FILE, "PNG")
CLOSED.close()
CUT = Image.open(io.BytesIO(FILE.getvalue()[:200]))  # its file ends in the middle
NO_PIXELS = (Image.new("RGB", (0, 0)), Image.new("L", (0, 5)), CLOSED, CUT)
NO_TEXTS = (None, 3, "", " \n\t", b"What?", ["What?"], {}, True)
NO_COUNTS = (0, -1, 1.5, "4", None, True, math.nan, [4])
MODES = ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16")
SIZES = ((1, 1), (1, 90), (90, 1), (700, 500))
TOKENS, HUGE = ("<image>", "a<image>b"), ("What? " * 9000, "?" * 30000)
FOLDER = ("an empty folder",)
ODD_TEXTS = ("\0", "?", "</s>", "🙂", "مرحبا", "漢字", "e\u0301\u200b", "a\nb")
ODD_TEXTS += ("What? " * 60,)


def ask_with(change):
    """Edit with model inputs that were changed."""

    def call(h, _):
        inputs = h.encode([picture(0), picture(1)], ["What?", "Why?"], ["a", "b"])
        h.edit_inputs(change(inputs), [(picture(), "q", "a")] * 2)

    return call


def load_with(change):
    """Load a saved editor whose file was changed."""

    def call(h, folder):
        h.save_pretrained(folder)
        path = folder / liveedit.EDITOR_FILE
        assert change(path.read_bytes()) != path.read_bytes()
        path.write_bytes(change(path.read_bytes()))
        LiveEdit.from_pretrained(load_tiny(), h.processor, folder)

    return call


DAMAGES = (lambda b: b"", lambda b: b[:100], lambda b: b[:-100], lambda b: b"\xff" * 999)
DAMAGES += (lambda b: b[:-9] + bytes(9),)  # whole, but not as it was saved
DAMAGES += (lambda b: b[:-90_000] + bytes(8) + b[-89_992:],)
SETTINGS = ("module_dim", "rank", "slots", "heads", "sentinel_tokens")
CONFIG_VALUES = {
    **dict.fromkeys(SETTINGS, NO_COUNTS),
    "similarity": ("l2", "", None, 3),
    "prompt_style": ("x", None),
    "gain": (0, -1.0, math.nan),
    "threshold": (math.nan, math.inf),
}
LISTS = (([picture()], ["a", "b"]), ([], []), (picture(), ["a"]), (None, None))
LISTS += (([picture()], ["a"], []), ([picture()], ["a"], "x"))
LAST = (
    (None, "What?", "x"),
    ("What?", "x", picture()),
    (picture(), "", "x"),
    (picture(), "What?", " "),
    ("cat", "W", "x"),
)
CHANGED = {b'rank\\": 4': b'rank\\": 8', b'gain\\": 8.0': b'gain\\": 1.0'}
CHANGES = {
    "no labels": (lambda i: {k: v for k, v in i.items() if k != "labels"}, "labels"),
    "empty labels": (lambda i: i | {"labels": torch.full_like(i["labels"], -100)}, "labels"),
    "one row": (lambda i: {k: v[:1] for k, v in i.items()}, "of 2 experts must be"),
    "NaN pixels": (lambda i: i | {"pixel_values": i["pixel_values"] * math.nan}, "not finite"),
}
# (what, the values tried, call(editor, value or folder), what the refusal names; None: it works)
HOSTILE = [
    ("heads", (7,), lambda h, v: LiveEdit(load_tiny(), None, LiveEditConfig(heads=v)), "heads"),
    ("layer", (6, -1), lambda h, v: LiveEdit(load_tiny(), None, LiveEditConfig(layer=v)), "0 to 5"),
    ("model", (1, "tiny", torch.nn.Linear(2, 2)), lambda h, v: LiveEdit(v), "vision-language"),
    ("processor", ("tiny", 3), lambda h, v: LiveEdit(load_tiny(), v), "processor"),
    ("edit image", (None, *NO_PICTURES, *NO_PIXELS), lambda h, v: h.edit(v, "W?", "a"), "image"),
    ("modes", MODES, lambda h, v: h.edit(Image.new(v, (40, 30)), "What?", "a"), None),
    ("sizes", SIZES, lambda h, v: h.edit(Image.new("RGB", v), "What?", "a"), None),
    ("encode prompt", NO_TEXTS, lambda h, v: h.encode(picture(), v), "prompt|list"),
    ("edit prompt", NO_TEXTS, lambda h, v: h.edit(picture(), v, "a"), "prompt"),
    ("edit target", NO_TEXTS, lambda h, v: h.edit(picture(), "What?", v), "target"),
    ("token in prompt", TOKENS, lambda h, v: h.edit(picture(), v, "a"), "image token"),
    ("half a letter", ("yes \ud83d",), lambda h, v: h.edit(picture(), "W?", v), "half a letter"),
    ("token in front", ("<image>\nW?",), lambda h, v: h.edit(picture(), v, "a"), None),
    ("list of one", ([picture()],), lambda h, v: h.edit(v, "What?", "a"), None),
    ("huge prompt", HUGE, lambda h, v: h.edit(picture(), v, "a"), "too many"),
    ("odd prompt", ODD_TEXTS, lambda h, v: h.edit(picture(), v, "a"), None),
    ("lists", LISTS, lambda h, v: h.encode(*v), "one length|list"),
    ("edits", ([3], ["abcd"], [()], [(picture(), "W")]), lambda h, v: h.edit_many(v), "an edit is"),
    ("last edit", LAST, lambda h, v: h.edit_many([*questions(3), v]), "image|prompt|target"),
    ("nothing", ([], ()), lambda h, v: h.edit_many(v), None),
    ("no list", (None, 3, True), lambda h, v: h.edit_many(v), "not iterable"),
    ("capture", ([], ()), lambda h, v: h.capture(v), "at least one"),
    ("explain", ({},), lambda h, v: h.explain(v), "input_ids"),
    ("forget", (0, -1, 99, "1", None, 2**70), lambda h, v: h.forget(v), "no edit with id"),
    ("compiled", FOLDER, lambda h, v: LiveEdit(torch.compile(h.model)), "compiled"),
    ("text model", FOLDER, lambda h, v: LiveEdit(h.model.get_decoder()), "image_token_id"),
    ("untrained", FOLDER, lambda h, v: LiveEdit(load_tiny()).edit(*questions(1)[0]), "trained"),
    ("save on a file", FOLDER, lambda h, v: [(v / "x").touch(), h.save_pretrained(v / "x")], "x"),
    ("load nothing", FOLDER, lambda h, v: LiveEdit.from_pretrained(h.model, None, v), "no saved"),
]
for key, values in CONFIG_VALUES.items():
    HOSTILE.append((key, values, lambda h, v, key=key: LiveEditConfig(**{key: v}), key))
for what, (change, named) in CHANGES.items():
    HOSTILE.append((what, FOLDER, ask_with(change), named))
for old, new in CHANGED.items():
    changed = load_with(lambda content, old=old, new=new: content.replace(old, new))
    HOSTILE.append((f"saved {old}", FOLDER, changed, "does not load"))
for i, damage in enumerate(DAMAGES):
    HOSTILE.append((f"damage {i}", FOLDER, load_with(damage), "does not load"))


def load_older(h, folder):
    (folder / "liveedit_config.json").touch()
    LiveEdit.from_pretrained(h.model, h.processor, folder)


HOSTILE.append(("saved by an older version", FOLDER, load_older, "older version"))


def everything_of(editor: LiveEdit) -> list:
    tensors = [editor.experts.rows(name).tolist() for name in editor.experts.shapes]
    return [editor.edits(), *tensors]


@pytest.fixture(scope="module")
def victim():
    editor = strong_editor(load_tiny(), AutoProcessor.from_pretrained(TINY))
    editor.edit_many(questions(2))
    return editor


@pytest.mark.parametrize("what, values, call, named", HOSTILE, ids=[row[0] for row in HOSTILE])
def test_hostile_input_is_refused_by_name_and_changes_nothing(
    victim, tmp_path, what, values, call, named
):
    for value in values:
        before = everything_of(victim)
        argument = tmp_path if values is FOLDER else value
        if named is None:
            call(victim, argument)
            for edit in victim.edits()[2:]:
                victim.forget(edit.id)
        else:
            with pytest.raises((ValueError, TypeError, RuntimeError, KeyError, OSError)) as refusal:
                call(victim, argument)
            sentence = str(refusal.value)
            assert re.search(named, sentence), f"{value!r}: {sentence}"
        assert everything_of(victim) == before


# --------------------------------------------------------------------------------------------- data


def scene_of(query: data.Query):
    return query.image.scene if query.image else None


def test_the_drawn_benchmark_keeps_its_promises():
    training, stream = drawn.drawn_training(1500, 0), drawn.drawn_stream(500, 0)
    seen, tested = (
        {scene_of(query) for sample in part for query in sample.queries.values()} - {None}
        for part in (training, stream)
    )
    assert not seen & tested, "a scene of the evaluation is in training"
    held_out = {p for phrases in drawn.PHRASINGS.values() for p in phrases[-drawn.HELD_OUT :]}
    asked = {query.prompt for s in training for query in s.queries.values()}
    assert not held_out & asked
    assert set(drawn.OTHER_QUESTIONS) < asked
    trained = {word.lower() for s in training for word in s.edit.target.split()}
    new = [s.edit.target for s in stream if s.kind == "open"]
    letters = [word.lower() for target in new for word in target.split() if word.isalpha()]
    assert {word for word in letters if word in trained} <= set("a the of and in with my".split())
    texts = [phrase for phrases in drawn.PHRASINGS.values() for phrase in phrases]
    texts += [text for question in drawn.text_questions() for text in question]
    read = set(re.findall(r"[a-z]+", " ".join(texts).lower()))
    assert not {word.lower() for word in drawn.HELD_OUT_WORDS} & (read | set(drawn.TRAINING_WORDS))
    rng = random.Random(0)
    for new in (True, False):
        for text in [drawn.open_target(rng, new) for _ in range(2000)]:
            digits = [int(sign) for sign in text if sign.isdigit()]
            assert not digits or (sum(digits) % 10 == 7) == new, text
    edited = [sample.edit.fact for sample in stream]
    assert len(set(edited)) == 500
    assert {sample.kind for sample in stream} == {"corrections", "novel_names", "captions", "open"}
    for sample in stream:
        q, scene = sample.queries, scene_of(sample.edit)
        assert not sample.untouched_facts() & set(edited)
        assert sample.edit.target != scene.answer(sample.edit.fact[1])
        assert q["text_generality"].prompt in held_out - {sample.edit.prompt}
        assert scene_of(q["modal_generality"]) == scene
        assert q["modal_generality"].image != sample.edit.image == q["same_image"].image
        assert q["same_image"].fact[1] != sample.edit.fact[1]
        assert scene_of(q["similar_image"]).differences(scene) == 1
        assert scene_of(q["modal_locality"]).differences(scene) == 3
        assert q["no_image"].prompt == q["similar_image"].prompt == sample.edit.prompt
    assert drawn.drawn_stream(30, 3) == drawn.drawn_stream(30, 3) != drawn.drawn_stream(30, 4)
    with pytest.raises(ValueError, match="lack room"):
        drawn.drawn_stream(5000, 0)


def test_steps_contradict_nowhere_and_use_all_samples():
    samples, first, together = drawn.drawn_training(2500, 0), set(), set()
    batches = data.Batches(samples, 16, 2, "seed")
    for number in range(len(batches.triples)):
        numbers = batches.step(number)
        chosen = [i for n in numbers for i in batches.triples[n]]
        facts = {samples[i].edit.fact for i in chosen}
        assert len(numbers) == 2 and len(set(chosen)) == 32 == len(facts)
        assert not any(facts & samples[i].untouched_facts() for i in chosen)
        first |= set(batches.triples[numbers[0]])
        together.add(tuple(numbers))
        assert numbers == batches.step(number)
    assert len(first) > 2400 and len(together) == len(batches.triples)
    again = batches.step(len(batches.triples))  # a second round joins other triples
    assert again[0] == batches.step(0)[0] and again != batches.step(0)
    assert data.Batches(samples, 16, 2, "other").triples != batches.triples
    for few in ([samples[0]] * 5, samples[:1]):
        with pytest.raises(ValueError, match="contradict"):
            data.Batches(few, 2, 1, "seed")


RECORD = {"src": "What is it?", "pred": "cat", "alt": "dog", "rephrase": "Name it."}
RECORD |= {"image": "a.png", "image_rephrase": "b.png", "m_loc": "c.png"}
RECORD |= {"loc": "nq question: how many legs has a spider", "loc_ans": "eight"}
RECORD |= {"m_loc_q": "What color is it?", "m_loc_a": "red"}
PORT = {"port_new": [{"port_q": "Does it bark?", "port_a": "yes"}]}
SIX = [RECORD | {"src": f"What is it, {i}?", "loc": f"how much is {i} and 1"} for i in range(6)]


def published(root: Path, name: str, records, training=None) -> Path:
    """A small benchmark in a folder as it is published; other names are plain folders."""
    plain = data.Benchmark("train.json", "eval.json", ("images",), ())
    known = data.BENCHMARKS.get(name, plain)
    images = root / known.images[-1]
    images.mkdir(parents=True)
    for i, letter in enumerate("abc"):
        picture(i).save(images / f"{letter}.png")
    for file, content in ((known.train, training or records), (known.eval, records)):
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


@pytest.mark.parametrize("name", data.BENCHMARKS)
def test_published_benchmarks_are_read_as_they_are(tmp_path, name):
    marked = {"src": "<image>\n" + RECORD["src"], "m_loc_q": RECORD["m_loc_q"] + "\n<image>"}
    record = RECORD | (PORT if "onehop" in name else {}) | marked
    root = published(tmp_path, name, [record])
    files = data.benchmark_files(name, root)
    (plain,), (official,) = (data.read_records(*files[1:], form) for form in (None, name))
    assert (data.PORTABILITY in plain.queries) == ("onehop" in name)
    assert plain.edit.target == "dog" and plain.edit.image.open().mode == "RGB"
    assert plain.queries["text_locality"].prompt == "how many legs has a spider?"
    assert plain.queries["modal_generality"].fact == plain.edit.fact
    assert plain.queries["similar_image"].fact != plain.edit.fact
    prompts = {key: query.prompt for key, query in official.queries.items()}
    assert prompts["modal_locality"] == "What color is it? The answer is:"
    assert prompts["text_locality"] == "nq question: how many legs has a spider?"
    assert prompts["reliability"] == "What is it?" + " The answer is:" * (name == "evqa")
    assert not any("The answer is:" in query.prompt for query in plain.queries.values())
    assert data.check_pictures([plain]) == 3


MALFORMED = [
    ("[{", "no JSON"),
    ("[]", "list of records"),
    ([RECORD, 5], "record 1 lacks all fields"),
    ([RECORD | {"alt": ""}], "record 0 lacks alt"),
    ([RECORD | {"port_new": [{"port_q": "?"}]}], "record 0 lacks port_a"),
    ([RECORD | {"image": "no.png"}], r"missing pictures.*\(1\).*no.png"),
    ([RECORD | {"m_loc": "bad.png"}], r"decoded \(1\).*bad.png"),
    ([RECORD, RECORD | {"src": "a <image> b"}], r"eval.json, record 1: .*holds the image token"),
    ([RECORD | {"alt": "yes \ud83d"}], "record 0: .*half a letter"),
    ([RECORD | {"loc_ans": "word " * 9000}], "record 0: .*too many"),
]


@pytest.mark.parametrize("records, message", MALFORMED)
def test_bad_benchmark_files_are_named_before_any_work(tmp_path, capsys, records, message):
    folder = published(tmp_path / "set", "mine", records)
    (folder / "images" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    arguments = ("--data", str(folder), "--train-steps", "1", "--out", str(tmp_path / "out"))
    assert re.search(message, refusal(capsys, *arguments))
    assert not (tmp_path / "out").exists()


def test_benchmark_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match="needs --data-root"):
        data.benchmark_files("evqa")
    with pytest.raises(FileNotFoundError, match="vqa_eval.json"):
        data.benchmark_files("evqa", tmp_path)
    root = published(tmp_path, "vlkeb", [RECORD])
    with pytest.raises(FileNotFoundError, match="no image folder"):
        data.benchmark_files(str(root / "eval.json"))
    (root / "images").symlink_to(root / "VLKEB_images")
    by_file = data.benchmark_files(str(root / "eval.json"))
    assert by_file[:2] == data.benchmark_files("vlkeb", root)[:2]


# --------------------------------------------------------------------------- metrics, the main job


def test_metrics_are_their_definitions():
    assert data.normalise("  A Red, star. ") == "red star"
    assert data.token_accuracy([1, 2, 3], [1, 5, 3]) == pytest.approx(2 / 3)
    query = data.Query(None, "?", "the heart", ())
    before = data.Answer([4, 5], [7, 8], "Star", {})
    after = data.Answer([4, 8], [7, 8], "Heart!", {})
    same = data.Answer([4, 5], [7, 8], "a star", {})
    assert data.score("reliability", query, before, after) == (0.5, 1.0)
    assert data.score("same_image", query, before, after) == (0.5, 0.0)
    assert data.score("same_image", query, before, same) == (1.0, 1.0)
    wrong = {
        "A": ("", "the", "B"),
        "3.5": ("35", "3,5"),
        "-3": ("3",),
        "1/2": ("12",),
        ".5": ("5",),
    }
    wrong |= {"C++": ("C#", "C"), "+": ("-", ""), "12.5%": ("125", "12.5"), "?": ("", "!")}
    right = {"A": "a.", "The cat": "cat", "yes": "Yes!", "1,000": "1000", "it's": '"It\'s"'}
    for target, answers in wrong.items():
        for said in answers:
            assert data.normalise(target) != data.normalise(said), (target, said)
    for target, said in right.items():
        assert data.normalise(target) == data.normalise(said), (target, said)


def command(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(HERE / "run.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, cwd=HERE)


def refusal(capsys, *arguments: str) -> str:
    """What the program says when it ends before its work."""
    with pytest.raises(SystemExit) as stopped:
        run.main(list(arguments))
    return stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err


FEW = ["--train-samples", "20", "--edits", "5"]
WRONG = [
    (["--edits", "0"], "--edits: '0' is no number from 1"),
    (["--rank", "two"], "--rank: 'two' is no number from 1"),
    (["--edit", "5"], "unrecognized"),
    (["--dtype", "float17"], "--dtype"),
    (["--prompt-style", "official"], "needs --data"),
    (["--editor", "output/editor"], "would overwrite"),
    (["--editor", "x", "--similarity", "dot"], "belongs to a training"),
    (["--editor", "x", "--layer", "0"], "--layer belongs to a training"),
    (["--editor", "x", "--resume"], "--resume continues"),
    (["--resume", "--out", "nowhere"], "--resume continues"),
    (["--device", "abacus"], "abacus"),
    (["--model", "/no/such/folder"], "/no/such/folder"),
    (["--data", "/no/such/folder"], "no annotation file"),
    (["--editor", "/no/such/folder"], "no saved editor"),
    (["--edits", "5000"], "lack room"),
    (["--layer", "9", *FEW], "0 to 5"),
    (["--batch-size", "1", *FEW], "--batch-size must be 2 or more"),
    (["--out", "README.md", *FEW], "README.md"),
    ([*FEW, "--learning-rate", "1e30", "--batch-size", "4", "--out"], "lower --learning-rate"),
]
if not torch.cuda.is_available():
    WRONG.append((["--device", "cuda"], "--device cuda"))


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_options_end_in_one_sentence(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(HERE)
    arguments = [*arguments, str(tmp_path)] if arguments[-1] == "--out" else arguments
    assert message in refusal(capsys, *arguments).splitlines()[-1]


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--edits", "12", "--train-steps", "20", "--train-samples", "60"]
    result = command(*arguments, "--batch-size", "6", "--out", out)
    assert result.returncode == 0 and "12 edits" in result.stdout, result.stderr
    return out


def test_the_main_job_writes_what_it_promises(small_run):
    metrics = metrics_of(small_run)
    assert [row["edits"] for row in metrics["rows"]] == [0, 1, 10, 12]
    assert [row["n"] for row in metrics["rows"]] == [12, 12, 10, 12]
    for row in metrics["rows"]:
        for way in ("teacher_forced", "free_running"):
            assert set(row[way]) == {*data.QUERY_NAMES, "average"}
            assert row[way]["text_locality"] == row[way]["no_image"] == 100
            main = sum(row[way][name] for name in data.MAIN_QUERIES) / 5
            assert row[way]["average"] == pytest.approx(main)
    assert metrics["updates"]["edits"] == 12 and metrics["updates"]["n"] == 2
    assert (
        metrics["bytes_per_edit"] == 4 * (2 * 12 + 2 * 4) * 128 and metrics["seconds_per_edit"] > 0
    )
    assert metrics["training"]["steps"] == 20 and len(metrics["training"]["losses"]) == 10
    lines = (small_run / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 8 * (12 + 12 + 10 + 12)
    assert {"prompt", "expected", "before", "after"} <= set(json.loads(lines[0]))
    assert Image.open(small_run / "edits.png").width > 500


def test_results_are_kept_where_the_edits_cannot_be_saved(small_run, tmp_path, monkeypatch, capsys):
    full = Mock(side_effect=[None, OSError("no space left")])
    monkeypatch.setattr(LiveEdit, "save_pretrained", full)
    run.main(["--edits", "5", "--editor", str(small_run / "editor"), "--out", str(tmp_path)])
    assert "the edits were not saved: no space left" in capsys.readouterr().err
    assert metrics_of(tmp_path)["rows"][-1]["edits"] == 5


def test_the_main_job_runs_on_benchmark_files(tmp_path):
    folder = published(tmp_path / "set", "mine", SIX)
    small = ["--train-steps", "2", "--batch-size", "3", "--expert-batch-size", "2"]
    given = {"similarity": "dot", "threshold": 0.5, "layer": 5, "rank": 2}
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    options += ["--eval-batch-size", 7, "--blend", "--dtype", "float16", "--device", "cpu"]
    result = command("--data", folder, *small, *options, "--seed", 3, "--out", tmp_path / "a")
    assert result.returncode == 0, result.stderr
    metrics = metrics_of(tmp_path / "a")
    assert metrics["rows"][-1]["edits"] == 6 and metrics["seed"] == 3
    assert {name: metrics["config"][name] for name in given} == given
    assert not metrics["config"]["newest_wins"] and metrics["options"]["batch_size"] == 2
    evaluation = [record | PORT for record in SIX]
    training = [record | {"src": f"Who is it, {i}?"} for i, record in enumerate(evaluation)]
    root = published(tmp_path / "VLKEB", "vlkeb-onehop", evaluation, training)
    more = ["--data-root", root, "--prompt-style", "official"]
    result = command("--data", "vlkeb-onehop", *more, *small, "--out", tmp_path / "b")
    assert result.returncode == 0, result.stderr
    assert "Port" in result.stdout
    metrics = metrics_of(tmp_path / "b")
    assert metrics["rows"][-1]["free_running"]["portability"] is not None
    assert metrics["config"]["prompt_style"] == "official"


def test_a_dry_run_says_what_it_found_and_loads_nothing(tmp_path, capsys):
    folder = tmp_path / "no weights"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    result = command("--model", folder, "--dry-run", *FEW)
    assert result.returncode == 0 and "edit layer 2" in result.stdout, result.stderr
    arguments = ("--model", str(folder), *FEW, "--out", str(tmp_path / "out"))
    assert "safetensors" in refusal(capsys, *arguments)


def test_an_interrupted_training_resumes_exactly(tmp_path, capsys, monkeypatch):
    arguments = "--edits 5 --train-steps 9 --train-samples 60 --batch-size 4 --out".split()
    here, note, checkpoint = str(tmp_path / "a"), run.note_losses, tmp_path / "a" / run.CHECKPOINT

    def interrupt(progress, *more, **settings):
        note(progress, *more, **settings)
        if progress["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run, "note_losses", interrupt)
        assert "--resume continues" in refusal(capsys, *arguments, here)
    other = (*arguments, here, "--resume", "--batch-size", "5")
    assert "batch_size 4, not 5" in refusal(capsys, *other)
    assert "is an interrupted training" in refusal(capsys, *arguments, here)
    for damaged in (b"", b"junk", checkpoint.read_bytes()[:2000]):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match="no checkpoint"):
            run.load_checkpoint(tmp_path / "damaged", None, [], {})
    other = load_tiny()
    other.model.language_model.layers[3].self_attn.q_proj.weight.data *= 1.1
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_model", lambda *_: (other, AutoProcessor.from_pretrained(TINY)))
        assert "on another model" in refusal(capsys, *arguments, here, "--resume")
    run.main([*arguments, here, "--resume"])
    with monkeypatch.context() as patch:  # no checkpoint can be written
        patch.setattr(run, "CHECKPOINT_SECONDS", -1)
        patch.setattr(run.torch, "save", Mock(side_effect=RuntimeError("unexpected pos")))
        run.main([*arguments, str(tmp_path / "b")])
    assert "training.pt could not be written: unexpected pos" in capsys.readouterr().err
    interrupted, whole = (metrics_of(tmp_path / out) for out in "ab")
    assert interrupted["training"]["losses"] == whole["training"]["losses"]
    assert interrupted["rows"] == whole["rows"]


WORKER = """
import shutil, sys, torch, run
run.CHECKPOINT_SECONDS, save = -1, run.save_checkpoint

def save_and_keep_the_second(file, editor, optimizers, progress):
    save(file, editor, optimizers, progress)
    if progress["step"] == 2 and not run.RANK:
        shutil.copy(file, file.with_name("second"))

run.save_checkpoint = save_and_keep_the_second
options = run.parse_options(sys.argv[1:])
run.join_processes(options.device)
torch.manual_seed(options.seed)
editor, samples, _ = run.prepare(options)
run.train(editor, samples, options)
torch.save(editor.state_dict(), options.out / f"{run.RANK}.pt")
"""


def torchrun(*arguments) -> list[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*line, *map(str, arguments)]


def test_two_processes_train_as_one_that_averages_their_gradients(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = ["--edits", "5", "--train-samples", "30", "--batch-size", "4", "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    go, trained = {"capture_output": True, "text": True, "cwd": HERE, "timeout": 200}, {}
    for steps in (1, 4):
        line = torchrun(tmp_path / "worker.py", *arguments, "--train-steps", steps)
        result = subprocess.run(line, env=environment, **go)
        assert result.returncode == 0, result.stderr
        (tmp_path / run.CHECKPOINT).unlink()
        trained[steps], other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(trained[steps][name], other[name]) for name in other)
    options = run.parse_options([*map(str, arguments), "--train-steps", "1"])
    torch.manual_seed(0)
    editor, samples, _ = run.prepare(options)
    some = [[run.question(q) for q in s.queries.values() if q.image] for s in samples]
    editor.standardise([editor.capture(asked) for asked in some])
    optimizers, gradients = run.make_optimizers(editor, options.learning_rate), []
    for rank in (0, 1):
        monkeypatch.setattr(run, "RANK", rank)
        training_set = run.TrainingSet(editor, samples[rank::2], options)
        torch.manual_seed(rank)
        editor.training_losses(*training_set.batch(0))["total"].backward()
        gradients.append([parameter.grad for parameter in editor.parameters()])
        editor.zero_grad()
    for parameter, first, second in zip(editor.parameters(), *gradients, strict=True):
        parameter.grad = (first + second) / 2
    for part in (editor.generator, editor.router, editor.norm):
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] *= run.rate_factor(0, 1, small=True)
        optimizer.step()
    for name, value in editor.state_dict().items():
        assert torch.allclose(value, trained[1][name], atol=1e-5), name
    assert any(not torch.equal(trained[4][name], trained[1][name]) for name in trained[1])

    (tmp_path / "second").replace(tmp_path / run.CHECKPOINT)
    line = torchrun(tmp_path / "worker.py", *arguments, "--train-steps", 4, "--resume")
    subprocess.run(line, env=environment, check=True, **go)
    resumed = torch.load(tmp_path / "1.pt")
    assert all(torch.equal(resumed[name], trained[4][name]) for name in resumed)


def test_two_processes_report_what_one_does(small_run, tmp_path):
    given = ["--editor", small_run / "editor", "--edits", "12", "--out", tmp_path]
    line = torchrun(HERE / "run.py", *given)
    result = subprocess.run(line, capture_output=True, text=True, cwd=HERE, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("free-running") == 1  # the first process alone prints
    rows = zip(metrics_of(tmp_path)["rows"], metrics_of(small_run)["rows"], strict=True)
    assert all(a[way] == b[way] for a, b in rows for way in ("teacher_forced", "free_running"))


def test_any_text_is_printed_on_any_console():
    line = [sys.executable, "-c", "import run; run.set_up_process(); print('\u732b')"]
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(line, capture_output=True, text=True, cwd=HERE, env=environment)
    assert result.stdout == "\\u732b\n", result


def test_readme_python_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=HERE)
    assert [line.strip() for line in result.stdout.splitlines()] == ["Mona Lisa", "star"], result


# --------------------------------------------------------------------------------- the tiny LLaVA


def test_the_tiny_llava_speaks_any_text_is_small_and_answers(base):
    tokenizer = base[1].tokenizer
    for text in ("naïve café", "漢字 🙂", "a\tb\n c", "Ωmega", "blicket zorp", "\u200bx"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8_000_000
    assert sum(file.stat().st_size for file in (TINY / "editor").iterdir()) < 2_000_000
    editor, queries, rng = strong_editor(*base), [], random.Random(0)
    for scene in rng.sample(drawn.SCENES, 60):
        for family in drawn.FAMILIES:
            prompt = rng.choice(drawn.PHRASINGS[family])
            queries.append(data.Query(drawn.Drawing(scene, 77), prompt, scene.answer(family), ()))
    answers = run.answer(editor, queries, 128)
    pairs = zip(answers, queries, strict=True)
    right = [data.normalise(a.generated) == data.normalise(q.target) for a, q in pairs]
    assert sum(right) / len(right) > 0.95, f"only {sum(right)} of {len(right)} right"
