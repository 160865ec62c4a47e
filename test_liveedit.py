"""Tests: `python -m pytest -q test_liveedit.py`, on CPU, without network, in some minutes.

References: the official modules' numbers (GOLDEN), naive loops, and the unedited model itself.
Laws are tested with an untrained editor whose filter keeps everything: its experts are noise, but
loud. Behaviour is tested with an editor trained here for some seconds.
"""

import asyncio
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
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
from tokenizers import normalizers, processors
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

import data
import drawn
import liveedit
import run
from backbone import FrozenModel, InputFormat, find_decoder_layers
from generator import CrossAttention, Edit, ExpertGenerator, ExpertRepository, apply_experts
from liveedit import LiveEdit, LiveEditConfig, Question
from router import Router, Rows, hard_filter_loss, soft_router_losses, text_similarity
from training_pictures import Emoji, Invented, View, training_samples

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny-llava"
QUESTIONS = ("What shape is this?", "Name the color of the figure.", "Describe the image.")
TEXT = "What is 3 plus 4?"
SAMPLED = {"do_sample": True, "num_return_sequences": 2}


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


@pytest.fixture(scope="session")
def inputs(base):
    """A question about a picture."""
    return LiveEdit(*base, attach=False).encode(picture(), QUESTIONS[0])


def picture(index: int = 0, drawing: int = 0) -> Image.Image:
    return drawn.Drawing(drawn.SCENES[97 * index % len(drawn.SCENES)], drawing).open()


def questions(count: int, start: int = 0) -> list[tuple]:
    return [(picture(i), QUESTIONS[i % 3], f"answer {i}") for i in range(start, start + count)]


def logits_of(editor: LiveEdit, inputs: dict, **more) -> torch.Tensor:
    with torch.no_grad():
        return editor.model(**inputs, **more).logits


def original_of(editor: LiveEdit, inputs: dict) -> torch.Tensor:
    with editor.disabled():
        return logits_of(editor, inputs)


def generated(editor: LiveEdit, inputs: dict, count: int = 6, **more) -> torch.Tensor:
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return editor.model.generate(**inputs, **settings | more)


def padded_right(inputs: dict) -> dict:
    """Move the padding of prompts from the left to the right."""
    order = torch.argsort(inputs["attention_mask"], dim=1, descending=True, stable=True)
    moved = {key: inputs[key].gather(1, order) for key in ("input_ids", "attention_mask")}
    return inputs | moved


def routes_of(editor: LiveEdit, inputs: dict) -> list[dict]:
    """For each row, similarity and weight of the edits that it uses, by their ids."""
    rows, names = editor.explain(inputs), ("similarity", "weight")
    return [{(used["id"], name): used[name] for used in row for name in names} for row in rows]


def routed_prompts(editor: LiveEdit, inputs: dict) -> list[str]:
    """What the router reads as the prompt of each row, without special tokens."""
    alone, (_, prompt, _) = editor._format.asked_alone(inputs)
    assert editor._format.asked_alone(alone)[0] is alone
    rows = [ids[mask] for ids, mask in zip(alone["input_ids"], prompt, strict=True)]
    texts = editor.processor.batch_decode(rows, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-4) -> None:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference}"


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert torch.equal(a, b), f"largest difference {(a - b).abs().max().item()}"


def mixed_rows(editor: LiveEdit, pictured: list[tuple]) -> dict:
    """Inputs of questions about pictures, and behind them of TEXT, which is shorter."""
    inputs, text = editor.encode(*map(list, zip(*pictured, strict=True))), editor.encode(None, TEXT)
    missing = inputs["input_ids"].shape[1] - text["input_ids"].shape[1]
    padding = {"input_ids": editor.processor.tokenizer.pad_token_id, "attention_mask": 0}
    for key, fill in padding.items():
        last = F.pad(text[key], (missing, 0), value=fill)
        inputs[key] = torch.cat([inputs[key], last])
    return inputs


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
        is_module = isinstance(part, torch.nn.Module)
        for name, parameter in part.named_parameters() if is_module else [("", part)]:
            wave = 0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + number
            parameter.data = 0.3 * torch.sin(wave).view(parameter.shape)
            number += 2 if name.endswith("to_key.weight") else 1  # keys had biases there


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
    formed = (attention.to_query(queries), attention.to_key(states) + places)
    formed += (attention.to_value(states),)
    heads = [x.unflatten(-1, (2, -1)).transpose(1, 2).expand(3, -1, -1, -1) for x in formed]
    naive = F.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None])
    assert_close(attention(queries, states, mask, places), naive.transpose(1, 2).flatten(2), 1e-5)


def test_the_filter_keeps_what_beats_sentinel_and_dropped_and_shares_weights_among_it():
    router = Router(8, small_config(slots=2, newest_wins=False))
    features = router.features(Rows(torch.randn(4, 5, 8), None), Rows(torch.randn(4, 6, 8), None))
    keys, text_keys = F.normalize(torch.randn(50, 2, 8), dim=-1), torch.randn(50, 2, 8)
    routing = router.route(features, keys, text_keys)
    cosine = F.cosine_similarity(features.visual[:, None], keys[None], dim=-1).mean(-1)
    sentinel = F.cosine_similarity(features.asked, features.sentinel, dim=-1).mean(-1)
    kept, scale = torch.zeros(4, 50, dtype=torch.bool), router.log_scale.exp()
    for row in range(4):
        together = (scale * sentinel[row]).exp()
        for expert in cosine[row].argsort().tolist():
            kept[row, expert] = (scale * cosine[row, expert]).exp() > together
            together += 0.0 if kept[row, expert] else (scale * cosine[row, expert]).exp()
    assert kept.any() and (kept != (cosine > sentinel[:, None])).any()  # Eq. (5) alone
    scores = text_similarity(features.text, text_keys)
    weights, expected = torch.zeros(4, 50), torch.zeros(4, 50)
    weights[:, routing.experts] = routing.weights
    for row, own in enumerate(kept):
        expected[row, own] = scores[row, own].sigmoid() * scores[row, own].softmax(0)
    assert_close(weights, expected, 1e-6)
    router.threshold = 0.5
    assert (router.route(features, keys, keys).threshold == 0.5).all()


def test_further_experts_keep_no_other_one_in_the_filter():
    router, changed = Router(8, small_config(slots=2)), 0
    features = router.features(Rows(torch.randn(9, 5, 8), None), Rows(torch.randn(9, 6, 8), None))
    keys = F.normalize(torch.randn(60, 2, 8), dim=-1)
    similarity = router.visual_similarity(features.visual, keys)
    lowest, before = router.hard_filter(similarity[:, :1], features)
    for count in range(2, 61):
        threshold, kept = router.hard_filter(similarity[:, :count], features)
        assert (threshold >= lowest).all() and not (kept[:, :-1] & ~before).any()
        changed += (kept[:, :-1] != before).sum().item()
        lowest, before = threshold, kept
    assert changed
    nothing = router.hard_filter(similarity[:, :0], features)[0]
    assert_close(nothing, router.sentinel_similarity(features), 1e-6)


def test_of_one_fact_the_newest_counts_and_the_rest_is_weighed_if_relevant():
    router = Router(8, small_config())
    router.threshold = 0.0
    features = router.features(Rows(torch.randn(1, 5, 8), None), Rows(torch.randn(1, 6, 8), None))
    near, text = features.visual, 20 * features.text  # of one fact: clearly kept, and relevant
    keys = torch.cat([near, -near, near, near])
    routing = router.route(features, keys, torch.cat([text] * 4))
    assert routing.experts.tolist() == [0, 2, 3]
    assert (routing.weights[0] > 0).tolist() == [False, False, True]
    keys = torch.cat([near] * 4)
    texts = torch.cat([text, text, 0.1 * -features.text, -text])
    used = router.route(features, keys, texts).weights[0]  # the third is not of the same fact
    assert (used > 0).tolist() == [False, True, True, False]  # the last is of another question


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
    scores, own, unwanted = torch.randn(2, 5), torch.tensor([1, 0]), torch.randn(2)
    l_sr1, l_sr2 = soft_router_losses(scores, own, unwanted)
    first = second = 0.0
    for q in range(2):
        first -= torch.sigmoid(scores[q, own[q]]).log() / 2
        first -= (1 - torch.sigmoid(unwanted[q])).log() / 2
        second += nce(scores[q, own[q]], *scores[q]) / 2
    assert_close(l_sr1, first, 1e-5)
    assert_close(l_sr2, second, 1e-5)


def test_an_untrained_generator_copies_the_answer_token_by_token():
    generator, states = ExpertGenerator(32, 32, 4, 2, 1.0), torch.randn(1, 9, 32)
    rows, embedded = torch.arange(9)[None], torch.randn(4, 32)
    U, V = generator(states, rows >= 2, rows >= 5, embedded)
    assert F.cosine_similarity(U[0], states[0, 4:8], dim=1).min() > 0.7  # where they are said
    assert F.cosine_similarity(V[0], embedded, dim=1).min() > 0.7


def test_rows_of_an_answer_carry_their_place_wherever_they_stand():
    """Compare the generator with one row after another; one answer is longer than the rank."""
    generator, states = ExpertGenerator(8, 8, 2, 2, 1.0), torch.randn(3, 7, 8)
    torch.nn.init.normal_(generator.attention_V.to_query.weight)
    answer = torch.tensor([[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0]])
    answer, mask, embedded = answer.bool(), torch.ones(3, 7).bool(), torch.randn(6, 8)
    mask[0, 0] = mask[2, 3:] = False
    U, V = generator(states, mask, answer, embedded)
    said, read, places = states.clone(), states.clone(), torch.zeros(3, 7, 8)
    said[answer] = states.roll(1, dims=1)[answer]  # the state before says the token
    read[answer] = embedded
    for row, token, place in ((0, 3, 0), (0, 4, 1), (1, 6, 0), (2, 1, 0), (2, 2, 1)):
        places[row, token] = generator.places[0, place].detach()
    for b, real in enumerate(mask):
        rows = generator.norm_U(said[b : b + 1, real]), None, places[b : b + 1, real]
        expected = generator.attention_U(generator.queries_U, *rows)[0] * generator.scale
        assert_close(U[b], expected, 1e-5)
        rows = generator.norm_V(read[b : b + 1, real]), None, places[b : b + 1, real]
        expected = generator.attention_V(generator.queries_V, *rows)[0] * generator.scale
        assert_close(V[b], expected, 1e-5)


def test_prompt_rows_follow_the_image_or_else_the_leading_special_tokens():
    ids = torch.tensor([[1, 9, 7, 7, 4, 5, 6], [2, 1, 4, 5, 6, 7, 7], [2, 2, 1, 4, 5, 6, 8]])
    labels = torch.tensor([[-100] * 6 + [6], [-100] * 7, [-100] * 7])
    text = SimpleNamespace(bos_token_id=1, eos_token_id=None, pad_token_id=2)
    config = SimpleNamespace(image_token_id=7, get_text_config=lambda: text)
    form = InputFormat(SimpleNamespace(config=config), None, "chat")
    inputs = {"input_ids": ids, "attention_mask": (ids != 2).long(), "labels": labels}
    masks = form.last_question(inputs)[1]
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
    repository.clear()
    assert len(repository) == 0 and repository.next_id > edits[-1].id
    with pytest.raises(ValueError, match="no record of an edit"):
        Edit(1.5, "p", "t", 0.0)


# ------------------------------------------------------------------------------ the model untouched


def test_an_unedited_layer_output_is_the_same_object(editor, inputs):
    layer, outputs = find_decoder_layers(editor.model)[0][editor.config.layer], []

    def note(layer, arguments, output):
        outputs.append(output)

    # In front of the editor's own hook, and behind it.
    with layer.register_forward_hook(note, prepend=True), layer.register_forward_hook(note):
        logits_of(editor, inputs)  # no experts
        editor.edit_many(questions(1))
        logits_of(editor, editor.encode(None, TEXT))  # text only
        editor.router.threshold = 1.0
        logits_of(editor, inputs)  # everything filtered
        editor.router.threshold = -1.0
        logits_of(editor, inputs)
    pairs = zip(outputs[::2], outputs[1::2], strict=True)
    assert [before is after for before, after in pairs] == [True, True, True, False]


def test_the_head_never_multiplies_a_slice(editor):
    """Its frozen weights would be copied for each row of a batch, and rounded otherwise."""
    head, whole = editor.model.lm_head, []
    inputs = editor.encode([picture(1), picture(2)], QUESTIONS[:2])
    with head.register_forward_pre_hook(lambda m, a: whole.append(a[0].is_contiguous())):
        editor.model(**inputs, logits_to_keep=2)
        editor.model.generate(**inputs, max_new_tokens=2)
    assert whole == [True] * 3


def test_detached_and_disabled_are_bit_equal_and_foreign_hooks_survive(base, inputs):
    model, calls = load_tiny(), []
    layer = find_decoder_layers(model)[0][3]
    model.register_forward_pre_hook(lambda m, a: calls.append("model"))
    layer.register_forward_hook(lambda m, a, o: calls.append("layer"))
    counts = len(model._forward_pre_hooks), len(layer._forward_hooks)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model.lm_head.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    original = model(**inputs).logits.detach()
    editor, other = strong_editor(model, base[1]), strong_editor(*base)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="attached already"):
        editor.attach()
    editor.edit_many(questions(3))
    edited = logits_of(editor, inputs)
    assert not torch.equal(edited, original), "the edits changed nothing"
    assert_same(logits_of(other, inputs), original)  # editors on two models do not meet
    with pytest.raises(ZeroDivisionError), editor.disabled():
        assert_same(logits_of(editor, inputs), original)
        1 / 0  # noqa: B018
    assert_same(logits_of(editor, inputs), edited)
    assert editor.detach() is editor.detach() is model
    calls.clear()
    assert_same(model(**inputs).logits, original)
    assert calls == ["model", "layer"]
    assert counts == (len(model._forward_pre_hooks), len(layer._forward_hooks))
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_exceptions_and_interrupts_leave_nothing_behind(editor, inputs):
    editor.edit_many(questions(2))
    other = editor.encode(picture(1), QUESTIONS[2])
    expected = logits_of(editor, other)
    layers = find_decoder_layers(editor.model)[0]
    calls = [(place, lambda: logits_of(editor, inputs)) for place in (1, 5)]  # below and above
    calls += [(1, lambda: editor.explain(inputs)), (1, lambda: editor.edit_many(questions(1)))]
    for error in (ValueError, KeyboardInterrupt):
        for place, call in calls:
            with layers[place].register_forward_hook(Mock(side_effect=error)), pytest.raises(error):
                call()
            assert_same(logits_of(editor, other), expected)
            with pytest.raises(RuntimeError, match="whole model"):  # of no earlier call
                editor.model.get_decoder()(inputs_embeds=torch.zeros(1, 9, 128))


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
    left = mixed_rows(editor, asked)
    from_left, from_right = logits_of(editor, left), logits_of(editor, padded_right(left))
    original = original_of(editor, left)
    assert_same(from_left[-1], original[-1])
    assert not any(torch.equal(from_left[row], original[row]) for row in range(3))
    for row, one in enumerate([*asked, (None, TEXT)]):
        alone = logits_of(editor, editor.encode(*one))[0]
        assert_close(from_left[row, -len(alone) :], alone)
        assert_close(from_right[row, : len(alone)], alone)


def greedy_by_hand(editor: LiveEdit, inputs: dict, count: int) -> torch.Tensor:
    """Always the whole sequence, the prompt marked by labels: the reference of generation."""
    ids, mask, more = inputs["input_ids"], inputs["attention_mask"], {}
    prompt = ids.shape[1]
    for _ in range(count):
        step = inputs | {"input_ids": ids, "attention_mask": mask}
        logits = logits_of(editor, step, **more)[:, -1]
        logits[:, editor.processor.tokenizer.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = F.pad(mask, (0, 1), value=1)
        more = {"labels": F.pad(ids[:, prompt:], (prompt, 0), value=-100)}
    return ids


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_generation_with_cache_is_without_is_by_hand_is_alone(base, layer):
    editor = strong_editor(*base, layer=layer)
    editor.edit_many(questions(4))
    asked = [(picture(0), QUESTIONS[0]), (picture(5), QUESTIONS[2])]
    inputs = mixed_rows(editor, asked)
    cached = generated(editor, inputs, 8)
    assert_same(cached, generated(editor, inputs, 8, use_cache=False))
    assert_same(cached, greedy_by_hand(editor, inputs, 8))
    assert_same(cached, generated(editor, inputs, 8, cache_implementation="static"))
    for row, one in enumerate([*asked, (None, TEXT)]):
        alone = generated(editor, editor.encode(*one), 8)
        assert_same(cached[row, -8:], alone[0, -8:])
    with editor.disabled():
        assert not torch.equal(cached, generated(editor, inputs, 8))


@pytest.mark.parametrize("way", [{"num_beams": 3}, SAMPLED, {"guidance_scale": 1.5}], ids=str)
def test_beams_sampling_and_guidance_agree_with_and_without_cache(base, inputs, way):
    editor, made = strong_editor(*base, gain=3.0), []
    editor.edit_many(questions(4))
    settings = way | {"output_logits": True, "return_dict_in_generate": True}
    for use_cache in (True, False):
        torch.manual_seed(0)
        made.append(generated(editor, inputs, use_cache=use_cache, **settings))
    assert_same(made[0].sequences, made[1].sequences)
    assert_close(torch.stack(made[0].logits), torch.stack(made[1].logits), 1e-3)


def test_a_second_call_never_sees_the_first_ones_route(editor, inputs):
    editor.edit_many(questions(2))
    pairs, token = [inputs, editor.encode(picture(7), QUESTIONS[2])], torch.tensor([[5]])
    fresh = [logits_of(editor, pair) for pair in pairs]
    caches = [editor.model(**pair, use_cache=True).past_key_values for pair in pairs]
    forked = copy.deepcopy(caches)
    expected = [editor.model(input_ids=token, past_key_values=c).logits for c in caches]
    for i in (1, 0):
        assert_same(editor.model(input_ids=token, past_key_values=forked[i]).logits, expected[i])
        assert_same(logits_of(editor, pairs[i]), fresh[i])


def test_a_generation_that_has_begun_is_not_touched(editor, inputs):
    def generate(act=lambda: None):
        def between(ids, scores):
            if ids.shape[1] == inputs["input_ids"].shape[1] + 1:
                act()
            return scores

        return generated(editor, inputs, logits_processor=[between])

    unedited = generate()
    assert_same(generate(lambda: editor.edit_many(questions(2))), unedited)
    edited = generate()
    assert not torch.equal(edited, unedited)
    assert_same(generate(editor.reset), edited)
    assert_same(generate(), unedited)


def test_what_cannot_be_routed_is_refused_only_where_there_are_edits(editor, inputs):
    model, token, embeddings = editor.model, torch.tensor([[5]]), torch.ones(1, 4, 128)
    with torch.no_grad():
        foreign = editor.detach()(**inputs, use_cache=True).past_key_values
    editor.attach()
    own = model(**inputs, use_cache=True).past_key_values
    guessed = editor.encode(picture(), "heart and star heart and star heart")

    def ask(cache, **asked):
        return model(past_key_values=copy.deepcopy(cache), **asked)

    def ask_twice(**asked):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        return model(past_key_values=cache, **asked)

    def generate(inputs=inputs, **settings):
        return model.generate(**inputs, max_new_tokens=3, **settings)

    calls = [
        ("whole model", lambda: model.get_decoder()(inputs_embeds=embeddings)),
        ("embeddings alone", lambda: model(inputs_embeds=embeddings)),
        ("whole prompt", lambda: ask(own, inputs_embeds=embeddings)),
        ("whole prompt", lambda: ask(own, input_ids=token.expand(1, 3))),
        ("filled without", lambda: ask(foreign, input_ids=token)),
        ("had 1 rows", lambda: ask_twice(input_ids=token.expand(2, 1))),
        ("whole prompt", lambda: generate(prefill_chunk_size=8)),
        ("whole prompt", lambda: generate(prefill_chunk_size=1)),
        ("guesses", lambda: generate(guessed, prompt_lookup_num_tokens=1)),
        ("labels", lambda: model(**inputs, labels=inputs["input_ids"])),
    ]
    without_edits = [call()[0] for _, call in calls]
    editor.edit_many(questions(1))
    for (message, call), expected in zip(calls, without_edits, strict=True):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()
        with editor.disabled():
            assert_same(call()[0], expected)
    begun = model(**inputs, use_cache=True)
    assert not begun.logits.requires_grad
    with editor.disabled(), pytest.raises(RuntimeError, match="filled with edits"):
        model(past_key_values=begun.past_key_values, input_ids=token)
    begun.past_key_values.reset()
    with editor.disabled():
        again = model(**inputs, past_key_values=begun.past_key_values).past_key_values
    with pytest.raises(RuntimeError, match="filled without"):
        model(past_key_values=again, input_ids=token)


def test_hidden_states_are_told_as_later_layers_get_them(base, inputs):
    for asked_before in (False, True):
        model, got = load_tiny(), []
        if asked_before:  # transformers puts its recording hooks in place at the first such call
            model(input_ids=torch.tensor([[5]]), output_hidden_states=True)
        editor = strong_editor(model, base[1])
        editor.edit_many(questions(1))
        above = model.get_decoder().layers[editor.config.layer + 1]
        above.register_forward_pre_hook(lambda m, a, got=got: got.append(a[0]))
        told = model(**inputs, output_hidden_states=True)
        assert_same(told.hidden_states[editor.config.layer + 1], got[0])
    model.compile(backend="eager")  # in place
    assert_close(logits_of(editor, inputs), told.logits)


def test_global_modes_change_neither_dtypes_nor_promises(base, editor, inputs):
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
    editor.detach()
    try:
        torch.set_default_dtype(torch.bfloat16)
        other = strong_editor(*base)
        other.edit_many(questions(1))
    finally:
        torch.set_default_dtype(torch.float32)
    dtypes = {parameter.dtype for parameter in other.parameters()}
    assert dtypes | {other.experts.rows("U").dtype} == {torch.float32}


def test_threads_ask_edit_and_forget_at_once(editor, inputs):
    original = logits_of(editor, inputs)

    def work(number):
        for _ in range(4):
            edit = editor.edit_many(questions(1, number))[0]
            assert logits_of(editor, inputs).isfinite().all()
            assert_same(original_of(editor, inputs), original)
            assert editor.forget(edit.id) == edit

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not editor.edits()
    assert_same(logits_of(editor, inputs), original)


def test_disabled_holds_for_its_block_and_for_threads_but_for_no_other_request(base, inputs):
    editor, said = strong_editor(*base), {}
    ask = partial(logits_of, editor, inputs)
    original = ask()
    editor.edit_many(questions(2))
    edited = ask()
    with editor.disabled(), ThreadPoolExecutor(1) as pool:
        said["thread"] = pool.submit(ask).result()

    async def disabled():
        with editor.disabled():
            said["executor"] = await asyncio.to_thread(ask)
            await asyncio.sleep(0.1)
            said["own"] = ask()

    async def other():
        await asyncio.sleep(0.05)
        said["other"], said["other executor"] = ask(), await asyncio.to_thread(ask)

    async def start():  # a server may load its editor in a task of its own
        editor.detach()
        loaded = strong_editor(*base)
        loaded.edit_many(questions(2))
        return loaded

    async def both():
        nonlocal editor
        editor = await asyncio.create_task(start())
        await asyncio.gather(disabled(), other())

    asyncio.run(both())
    for name, logits in said.items():
        assert_same(logits, edited if name.startswith("other") else original)


def test_paged_caches_are_left_alone_or_refused(editor, inputs):
    text, paged = editor.encode(None, TEXT), {"layer_past": SimpleNamespace(), "use_cache": False}
    expected = [logits_of(editor, asked) for asked in (inputs, text)]
    assert_same(logits_of(editor, inputs, **paged), expected[0])
    editor.edit_many(questions(1))
    assert_same(logits_of(editor, text, **paged), expected[1])
    with pytest.raises(RuntimeError, match="continuous batching"):
        logits_of(editor, inputs, **paged)


# -------------------------------------------------------------------------------------- edits


def test_order_and_batches_of_edits_do_not_matter_and_forget_undoes(editor, inputs):
    original = logits_of(editor, inputs)
    first = editor.edit_many(questions(4))
    expected = logits_of(editor, inputs)
    extra = editor.edit(*questions(1, 5)[0])
    assert not torch.allclose(logits_of(editor, inputs), expected, atol=1e-3)
    editor.forget(extra.id)
    assert_same(logits_of(editor, inputs), expected)
    editor.reset()
    assert_same(logits_of(editor, inputs), original)
    again = [editor.edit(*question) for question in questions(4)[::-1]]
    assert_close(logits_of(editor, inputs), expected, 1e-3)
    assert editor.edits() == again and again[0].id > extra.id
    assert [edit.prompt for edit in again] == [edit.prompt for edit in first[::-1]]


def test_the_router_never_sees_answer_tokens(editor, inputs):
    editor.edit_many(questions(4))
    plain = editor.explain(inputs)[0]
    assert len(plain) == 4 and plain == sorted(plain, key=lambda used: -used["weight"])
    assert set(plain[0]) == {"id", "prompt", "target", "similarity", "threshold", "weight"}
    (weights,) = routes_of(editor, inputs)
    for target in ("heart", "a longer answer of words"):
        answered = editor.encode(picture(), QUESTIONS[0], target)
        bare = {key: value for key, value in answered.items() if key != "labels"}
        for asked in (answered, bare):
            assert routes_of(editor, asked) == [pytest.approx(weights, abs=1e-5)]
    answered = editor.encode([picture(0), picture(1)], QUESTIONS[:2], ["heart", "a longer answer"])
    kept = int((answered["labels"] != -100).any(0).sum()) + 1
    last = answered | {"labels": answered["labels"][:, -kept:], "logits_to_keep": kept}
    assert_close(logits_of(editor, last), logits_of(editor, answered)[:, -kept:], 1e-4)


def test_saving_and_loading(base, editor, inputs, tmp_path, monkeypatch):
    folder = tmp_path / "editor"
    (tmp_path / "real").mkdir()
    folder.symlink_to(tmp_path / "real")

    def load(**changes) -> LiveEdit:
        return LiveEdit.from_pretrained(load_tiny(), base[1], folder, **changes)

    editor.edit_many(questions(2))
    editor.save_pretrained(folder)
    older = logits_of(editor, inputs)
    editor.edit_many(questions(2, 2))
    newer = logits_of(editor, inputs)
    for step in ("fsync", "replace"):  # before the newer file takes the older one's place
        for error in (KeyboardInterrupt, OSError("disk full")):
            monkeypatch.setattr(liveedit.os, step, Mock(side_effect=error))
            with pytest.raises((KeyboardInterrupt, OSError)) as stopped:
                editor.save_pretrained(folder)
            monkeypatch.undo()
            assert_same(logits_of(load(), inputs), older)
    assert "could not be written: disk full" in str(stopped.value)
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


def test_an_editor_knows_its_model_in_any_precision_and_takes_no_other(base, editor, tmp_path):
    editor.save_pretrained(tmp_path)
    LiveEdit.from_pretrained(load_tiny(dtype=torch.bfloat16), base[1], tmp_path)
    for part in ("model.language_model.layers.4", "model.language_model.embed_tokens"):
        other = load_tiny()
        for weight in other.get_submodule(part).parameters():
            weight.data += 0.1 * weight.std() * torch.randn_like(weight)
        with pytest.raises(ValueError, match="another model"):
            LiveEdit.from_pretrained(other, base[1], tmp_path)
        assert not other._forward_pre_hooks and all(p.requires_grad for p in other.parameters())


def test_a_new_editor_takes_the_place_of_one_that_nobody_holds(base, editor, inputs):
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
    savers = [strong_editor(load_tiny(), base[1]) for _ in range(2)]
    savers[1].edit_many(questions(3))
    savers[0].save_pretrained(tmp_path)

    def save(editor):
        for _ in range(12):
            editor.save_pretrained(tmp_path)

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(save, editor) for editor in savers]
        while not all(job.done() for job in jobs):
            loaded = LiveEdit.from_pretrained(*base, tmp_path)
            assert len(loaded.edits()) in (0, 3)
            loaded.detach()
    assert [job.result() for job in jobs] == [None, None]
    assert [file.name for file in tmp_path.iterdir()] == [liveedit.EDITOR_FILE]


def test_experts_alone_travel_to_the_same_editor_and_to_no_other(editor, inputs, tmp_path):
    file = tmp_path / "some" / "experts"
    editor.edit_many(questions(2))
    editor.save_experts(file)
    expected = logits_of(editor, inputs)
    editor.reset()
    arrived = editor.load_experts(file)
    assert [(edit.id, edit.target) for edit in arrived] == [(3, "answer 0"), (4, "answer 1")]
    assert_same(logits_of(editor, inputs), expected)
    with torch.no_grad():
        editor.norm.bias += 1
    with pytest.raises(ValueError, match="another editor"):
        editor.load_experts(file)
    assert len(editor.edits()) == 2


# ----------------------------------------------------------------------------------- model inputs


def targets_of(editor: LiveEdit, target: str) -> list[str]:
    labels = editor.encode(picture(), "What?", target)["labels"]
    return editor.processor.tokenizer.convert_ids_to_tokens(labels[labels != -100])


PARTS = "{% for m in messages %}{% for p in m['content'] %}"
PARTS += "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def test_a_target_has_the_tokens_that_it_has_behind_its_prompt(base, monkeypatch):
    breaks = "{{ '\\n' }}"  # templates lose a last line break that stands for itself
    ends = {PARTS + " A:": "Ġ", PARTS + breaks: "d", PARTS + "<s>": "d"}
    for template, first in ends.items():
        monkeypatch.setattr(base[1], "chat_template", template)
        tokens = targets_of(LiveEdit(*base, attach=False), "dog")
        assert tokens[0].startswith(first), (template, tokens)
        assert "".join(tokens).strip("Ġ") == "dog</s>"
    for template in ("{{ messages[0]['role'] }}", CHATML):
        monkeypatch.setattr(base[1], "chat_template", template)
        with pytest.raises(ValueError, match="does not render .* take a list of parts"):
            LiveEdit(*base, attach=False).encode(picture(), "What?")


def llama_tokenizer() -> transformers.LlamaTokenizer:
    """A tokenizer as Llama 2 has it: a normalizer puts a space before every text."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", *(chr(c) for c in range(33, 127)), "\n"]
    pieces += ["he", "ar", "hear", "heart", "▁heart"]
    merges = [("h", "e"), ("a", "r"), ("he", "ar"), ("hear", "t"), ("▁", "heart")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    image = {"pad_token": "<pad>", "extra_special_tokens": {"image_token": "<image>"}}
    made = transformers.LlamaTokenizer(vocabulary, merges, **image)
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.backend_tokenizer.normalizer = normalizers.Sequence(parts)
    made.backend_tokenizer.pre_tokenizer = None
    return made


def test_llamas_tokenizer_gives_no_lone_space(base):
    model, processor = load_tiny(), copy.deepcopy(base[1])
    processor.tokenizer = llama_tokenizer()
    model.config.image_token_id = processor.image_token_id = processor.tokenizer.image_token_id
    editor = LiveEdit(model, processor, attach=False)
    assert targets_of(editor, "heart") == ["▁heart", "</s>"]


@pytest.mark.parametrize("adds", [True, False])
def test_bos_is_stripped_from_a_template_only_where_the_tokenizer_adds_one(base, adds):
    processor = copy.deepcopy(base[1])
    processor.chat_template, tokenizer = "<s>" + PARTS + " A:", processor.tokenizer
    if not adds:
        plain = processors.ByteLevel(trim_offsets=False)
        tokenizer.backend_tokenizer.post_processor = plain
    editor = LiveEdit(base[0], processor, attach=False)
    ids = editor.encode(picture(), "What?")["input_ids"][0].tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def chats(editor, *said):
    """Inputs of chats, as users make them: the (picture, text) of each turn."""
    texts, settings = [], {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    for turns in said:
        messages = []
        for i, (image, text) in enumerate(turns):
            parts = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": text}]
            messages.append({"role": ("user", "assistant")[i % 2], "content": parts})
        texts.append(editor.processor.apply_chat_template(messages, add_generation_prompt=True))
    pictures = [[image for image, _ in turns if image] for turns in said]
    return dict(editor.processor(images=pictures, text=texts, **settings))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_question_of_a_chat_is_routed_as_if_asked_alone(editor, side):
    editor.edit_many(questions(4))
    (other, edited, third), long = QUESTIONS, " ".join([QUESTIONS[2]] * 4)
    turns = [(picture(1), other), (None, "ring"), (None, third), (None, "ring"), (None, edited)]
    single = editor.encode([picture(1), picture(7)], [edited, long])
    chat = chats(editor, turns, [(picture(7), long)])
    if side == "right":
        single, chat = padded_right(single), padded_right(chat)
    assert routed_prompts(editor, chat) == [f"{edited} ASSISTANT:", f"{long} ASSISTANT:"]
    alone, in_chat = routes_of(editor, single), routes_of(editor, chat)
    # But for one token: a question behind a picture begins a line, in a chat it follows a space.
    assert in_chat == [pytest.approx(alone[0], abs=0.01), pytest.approx(alone[1], abs=1e-4)]
    prefill = editor.model(**chat, output_hidden_states=True)
    assert {h.shape[:2] for h in prefill.hidden_states} == {chat["input_ids"].shape}
    assert not torch.equal(prefill.logits, original_of(editor, chat))
    if side == "left":
        assert_same(generated(editor, chat), generated(editor, chat, use_cache=False))
        answered = chat | {"labels": chat["input_ids"][:, -2:], "logits_to_keep": 2}
        begun = routes_of(editor, prompt_of(chat, 2))
        assert routes_of(editor, answered) == [pytest.approx(row, abs=1e-4) for row in begun]
        numbers = torch.arange(chat["input_ids"].shape[1]).expand(2, -1)
        numbered = routes_of(editor, chat | {"position_ids": numbers})
        assert numbered == [pytest.approx(row, abs=1e-4) for row in in_chat]


@pytest.mark.parametrize("before", ["", "USER: <image>\nWho? ASSISTANT: me "])
def test_a_question_may_stand_before_its_picture(editor, before):
    # Of two pictures in a question, both are asked about.
    said = {"What is it? <image>": "What is it?", "Is <image> like <image>": "like"}
    for text, prompt in said.items():
        text = f"{before}USER: {text} ASSISTANT:"
        pictures = [picture(i) for i in range(text.count("<image>"))]
        inputs = editor.processor(images=[pictures], text=[text], return_tensors="pt")
        (asked,) = routed_prompts(editor, dict(inputs))
        assert asked.endswith(f"{prompt} ASSISTANT:") and "Who" not in asked


def test_chats_are_recognised_by_the_template(base, editor, inputs, monkeypatch):
    prompts = []
    for target in ("bob", "USER: bob"):  # no answer opens a turn
        prompts += routed_prompts(editor, editor.encode(picture(), QUESTIONS[0], target))
    assert prompts == [f"{QUESTIONS[0]} ASSISTANT:"] * 2
    said = "{% for p in m['content'] %}{{ p['text'] or '<image>' }}{% endfor %}{% endfor %}"
    tokens = "{% for m in messages %}<|{{ m['role'] }}|>" + said
    words = "{% for m in messages %}{{ ' Human: ' if m['role'] == 'user' else ' Bot: ' }}" + said
    words += "{{ ' Bot:' if add_generation_prompt }}"
    for template in (tokens, words):
        monkeypatch.setattr(base[1], "chat_template", template)
        editor = LiveEdit(*base, attach=False)
        chat = chats(editor, [(picture(), "Who?"), (None, "me"), (None, "Why?")])
        (asked,) = routed_prompts(editor, chat)
        assert asked.startswith("Why?") and "Who" not in asked
    monkeypatch.setattr(base[1], "chat_template", "{{ raise_exception('no') }}")
    assert routed_prompts(LiveEdit(*base, attach=False), inputs) == prompts[:1]


def test_the_editor_reads_the_picture_that_the_processor_shows(base, editor, tmp_path):
    cut_out, exif = picture().convert("RGBA"), Image.Exif()
    cut_out.putalpha(picture(3).convert("L"))
    exif[0x0112] = 6  # to be turned
    pictures = [picture().convert("P")]
    for i, image in enumerate((cut_out, cut_out.convert("LA"), picture().convert("L"))):
        image.save(tmp_path / f"{i}.png")
        pictures += [image, data.ImageFile(tmp_path / f"{i}.png").open()]
    picture().crop((0, 0, 96, 60)).save(tmp_path / "turned.jpg", exif=exif)
    cut_out.save(tmp_path / "moving.gif", save_all=True, append_images=[picture(2)])
    pictures += [Image.open(tmp_path / name) for name in ("turned.jpg", "moving.gif")]
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}]
    text = base[1].apply_chat_template(turns, add_generation_prompt=True)
    for image in pictures:
        wanted = base[1](images=image, text=text, return_tensors="pt")
        for given in (image, [image]):
            made = editor.encode([given], ["What?"])
            assert_same(made["pixel_values"], wanted["pixel_values"])
            assert_same(made["input_ids"], wanted["input_ids"])


def test_prompt_styles_and_lists(base):
    texts = []
    for style in ("official", "chat"):
        editor = LiveEdit(*base, LiveEditConfig(prompt_style=style), attach=False)
        ids = editor.encode(picture(), " What is it?\n")["input_ids"][0]
        texts.append(re.sub("(<image>)+", "<image>", base[1].tokenizer.decode(ids)))
    assert texts == ["<s><image>\nWhat is it?", "<s>USER: <image>\nWhat is it? ASSISTANT:"]
    with pytest.raises(ValueError, match="two calls"):
        editor.encode([picture(), None], ["a", "b"])
    with pytest.raises(RuntimeError, match="no processor"):
        LiveEdit(base[0], attach=False).encode(picture(), "What?")


# -------------------------------------------------------------------------------------- training


def training_set(editor, experts=3, cached=True, samples=4) -> run.TrainingSet:
    options = SimpleNamespace(batch_size=3, expert_batch_size=experts, seed=0, data=None)
    limit, run.CACHE_BYTES = run.CACHE_BYTES, 2**30 if cached else 0
    made = run.TrainingSet(editor, training_samples(samples, seed=5), options)
    run.CACHE_BYTES = limit
    assert bool(made.kept) == cached
    return made


def training_batch(editor):
    triple, others = training_set(editor).capture([2, 0, 3])
    return [triple], others


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


def test_cached_states_train_like_fresh_ones_whenever_a_step_is_taken(editor):
    def losses_after(*steps, cached=False) -> dict:
        samples = training_set(editor, 2, cached, samples=30)
        samples.batches.joined = samples.joined = 2
        for step in steps:
            batch = samples.batch(step)
        torch.manual_seed(3)
        return {name: loss.item() for name, loss in editor.training_losses(*batch).items()}

    first = losses_after(0, cached=True)
    assert losses_after(0) == pytest.approx(first, rel=1e-3, abs=1e-4)
    assert losses_after(9, 30, 0) == pytest.approx(first, rel=1e-3, abs=1e-4)  # other epochs too
    assert losses_after(9) != pytest.approx(first, rel=1e-3, abs=1e-4)


def test_a_triple_holds_the_queries_of_its_samples_row_by_row(editor):
    samples = training_set(editor, 2, samples=60)

    def targets(states) -> list[str]:
        rows = [editor.processor.decode(row[row >= 0]) for row in states.labels]
        return [row.replace("</s>", "").strip() for row in rows]

    chosen = samples.batches.groups[0]
    edits, generality, locality = samples.capture(chosen)[0]
    wanted = [samples.samples[i].edit.target for i in chosen]
    assert targets(edits) == targets(generality) == wanted != targets(locality)
    assert generality.masks.image.sum(1).tolist() == [36, 36]


def test_editing_losses_are_the_models_own_and_a_kl_divergence(editor):
    (triple,), _ = training_batch(editor)
    scores, kept = torch.zeros(3, 3, 3), torch.ones(3, 3, 3).bool()
    weight = editor.norm.weight.detach().clone()
    editor.norm.weight.data *= 0  # silent experts
    silent = editor._editing_losses(triple, scores, kept)
    editor.norm.weight.data = weight
    assert silent["locality"].item() == pytest.approx(0, abs=1e-5)
    with editor.disabled():
        samples = [training_samples(4, seed=5)[i].edit for i in (2, 0, 3)]
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


def test_experts_of_the_first_triple_train_as_alone_while_all_train_the_router(editor):
    samples, losses = training_set(editor, 2), []
    triples = [samples.capture(chosen)[0] for chosen in ([2, 0], [3, 1])]
    for batch in (triples[:1], triples):
        torch.manual_seed(3)
        losses.append(editor.training_losses(batch))
    for name in ("reliability", "generality", "locality"):
        assert losses[1][name].item() == pytest.approx(losses[0][name].item(), rel=1e-4), name
    assert losses[1]["filter"] > losses[0]["filter"] + 0.01


def test_the_text_router_learns_to_reject_other_questions_row_by_row(editor):
    ((edits, _, locality),), others = training_batch(editor)
    own = Rows.gather(edits.hidden, edits.masks.prompt)
    keys, losses = editor.router.text_key(own), []
    for rows in (own, others):
        torch.manual_seed(3)
        sigmoid = editor.training_losses([(edits, edits, locality)], rows)["sigmoid"]
        unwanted = text_similarity(editor.router.input_side.text(rows), keys).diagonal()
        losses.append((sigmoid + F.logsigmoid(-unwanted).mean()).item())  # what else it is
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_mixes_the_experts_that_the_filter_keeps_and_in_scope_the_own(editor):
    batch, losses = training_batch(editor), {}
    for threshold in (1.0, -1.0):
        editor.router.threshold = threshold
        losses[threshold] = editor.training_losses(*batch)
    assert losses[1.0]["locality"] == 0 < losses[-1.0]["locality"]
    assert losses[1.0]["reliability"] != losses[-1.0]["reliability"]


def test_what_cannot_be_trained_is_refused(editor):
    one, two = editor.capture(questions(1)), editor.capture(questions(2))
    text, without, nowhere = editor.capture([(None, TEXT, "7")] * 2), {}, two.masks.image & False
    for name in ("prompt", "answer"):
        without[name] = two._replace(masks=two.masks._replace(**{name: nowhere}))
    refused = [
        ("two edits", (one, one, one)),
        ("as many", (two, two, one)),
        ("needs an image", (two, two, text)),
        ("labels of an answer", (two, two, without["prompt"])),
        ("labels of an answer", (without["answer"], two, two)),
        ("above=False", (editor.capture(questions(2), above=False),) * 3),
    ]
    for message, triple in refused:
        with pytest.raises(ValueError, match=message):
            editor.training_losses([triple])
    rows = Rows.gather(text.hidden, text.masks.prompt)
    with pytest.raises(ValueError, match="each of 2 edits"):
        editor.training_losses([(two, two, two)], Rows.cat([rows, rows]))
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
    assert logits_of(editor, editor.encode(picture(), "What?")).dtype == dtype
    assert {p.dtype for p in editor.parameters()} == {torch.float32}
    editor.save_pretrained(tmp_path)
    editor.reset()
    editor.router.threshold = None
    exact = gradient_of(strong_editor(*base, gain=1.0, threshold=None), 1.0)
    for scale in (1.0, 1e-5):  # small losses must not vanish
        found = gradient_of(editor, scale)
        cosine = F.cosine_similarity(exact, found, dim=0)
        assert cosine > 0.95 and 0.8 < found.norm() / exact.norm() < 1.25, (scale, cosine)
    LiveEdit.from_pretrained(load_tiny(), base[1], tmp_path)  # the same model, single precision


@pytest.fixture(scope="session")
def trained(base, tmp_path_factory):
    """An editor after some seconds of training, tested on the samples that it learned from."""
    torch.manual_seed(0)
    config = LiveEditConfig(layer=2, module_dim=128, sentinel_tokens=36, **run.SMALL_EDITOR)
    editor = LiveEdit(*base, config)
    samples = drawn.drawn_samples(48, drawn.split_scenes()[0], "test", held_out=False)
    options = run.parse_options(["--out", str(tmp_path_factory.mktemp("trained"))])
    few = {"train_steps": 200, "batch_size": 24, "expert_batch_size": 12, "learning_rate": 3e-3}
    for name, value in (run.SHORT | few).items():
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
    edits = [run.question(sample.edit) for sample in training_samples(12, 0)]
    states = editor.capture(edits, above=False)
    editor.standardise([states])
    image, prompt, answer = states.masks
    used = image | prompt | answer
    read = [(editor.norm, used), (editor.generator.norm_U, used)]
    for side in (editor.router.edit_side, editor.router.input_side):
        read += [(side.visual_norm, image), (side.text_norm, prompt)]
        read.append((side.visual_prompt_norm, prompt))
    for norm, mask in read:
        normed = norm(states.hidden[mask])
        assert_close(normed.mean(0), torch.zeros(128), 1e-3)
        assert_close(normed.std(0), torch.ones(128), 1e-2)
    constant = torch.zeros_like(states.hidden)  # but for its first two channels
    constant[..., 0] = torch.randn(constant.shape[:2]).sign()
    constant[..., 1] = -constant[..., 0]
    editor.standardise([states._replace(hidden=constant)])
    assert_same(editor.norm(constant)[..., 2:], constant[..., 2:])  # and not blown up
    with pytest.raises(ValueError, match="image, prompt and answer"):
        editor.standardise([editor.capture([Question(None, TEXT, "7")], above=False)])
    editor.trained_steps = 1
    with pytest.raises(RuntimeError, match="trained"):
        editor.standardise([states])


def test_ten_edits_hold_spread_and_leave_the_rest(trained):
    editor, samples = trained
    editor.attach()
    rows, _, _ = run.evaluate(editor, samples[:10], SimpleNamespace(eval_batch_size=128))
    editor.reset()
    shares = {name: rows[-1]["teacher_forced"][name] for name in data.MAIN_QUERIES}
    assert shares["reliability"] > 90 and min(shares.values()) > 70, shares


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
DECODER |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
DECODER |= {"word_embed_proj_dim": 32}
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
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 3}
CONVOLVED = {"model_type": "efficientnet", "width_coefficient": 0.1, "depth_coefficient": 0.1}
FAMILIES = {  # what its decoder, its tower and the whole have beside
    "llava": ({}, {}, {"image_seq_length": 4}),
    "llava_next": ({}, {}, GRID),
    "llava_onevision": ({}, {}, GRID),
    "blip-2": ({}, {}, {"qformer_config": TOWER, "num_query_tokens": 4}),
    "paligemma": ({}, {}, PALI),
    "paligemma2": (WINDOWS | {"model_type": "gemma2", "final_logit_softcapping": 1.0}, {}, PALI),
    "gemma3": (WINDOWS, {}, {"mm_tokens_per_image": 4}),
    "qwen2_5_vl": (MROPE, {"window_size": 16, "fullatt_block_indexes": [1]}, QWEN),
    "qwen3_vl": (MROPE, {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}, QWEN),
    "internvl": ({}, {"patch_size": 4}, {"image_seq_length": 4}),
    "idefics3": ({}, {}, {}),
    "smolvlm": ({}, {}, {}),
    "mistral3": ({}, {"patch_size": 4}, {}),
    "mllama": ({"cross_attention_layers": [1, 4]}, TILES, {}),
    "lfm2_vl": (CONVOLUTIONS, {"num_patches": 16, "vision_use_head": False}, {}),
    "fast_vlm": ({"model_type": "llama"}, CONVOLVED | {"hidden_dim": 128, "hidden_size": 128}, {}),
}


def family_model(name: str, folder: Path):
    """A small random model of the family, written to disk and loaded back as any checkpoint."""
    torch.manual_seed(0)
    text, tower, whole = FAMILIES[name]
    parts = {"text_config": DECODER | text, "vision_config": TOWER | tower}
    kind = "paligemma" if name == "paligemma2" else name
    config = transformers.AutoConfig.for_model(kind, **parts, **whole, image_token_id=IMAGE)
    model = AutoModelForImageTextToText.from_config(config)
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


def prepared(name: str, rows: int) -> dict:
    """Random inputs as the family's own processor lays them out, with answers of 3 tokens."""
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
    elif name == "fast_vlm":
        extra = {"pixel_values": torch.randn(rows, 3, 64, 64)}
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
    ids = torch.cat([prompt, torch.randint(10, 600, (rows, 8))], 1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100)
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
    edited = logits_of(editor, inputs)
    assert all(not torch.allclose(edited[row], original[row], atol=1e-2) for row in range(3))
    assert [len(used) for used in editor.explain(inputs)] == [3] * 3
    assert_same(original_of(editor, inputs), original)
    for row in range(3):
        assert_close(logits_of(editor, row_of(name, inputs, row))[0], edited[row], 2e-3)
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, -1] = 77  # another last token of the answer
    first = answers_of(inputs, edited).view(3, 3, -1)[:, :2]
    assert_close(answers_of(other, logits_of(editor, other)).view(3, 3, -1)[:, :2], first, 1e-5)
    prompt = prompt_of(inputs)
    cached = generated(editor, prompt)
    for row in range(3):
        alone = generated(editor, row_of(name, prompt, row))
        assert_same(alone[0, -6:], cached[row, -6:])
    if name == "blip-2":  # its generation passes by the whole model, and always has a cache
        model.get_input_embeddings()(torch.randint(10, 600, (3, 9)))  # is no call of it
        assert_same(generated(editor, prompt), cached)
    else:
        with pytest.raises(RuntimeError, match="without a KV cache and a chat template"):
            generated(editor, prompt, use_cache=False)
    last = {"output_logits": True, "return_dict_in_generate": True}
    logits = generated(editor, prompt, **last).logits[-1]
    with editor.disabled():
        original_logits = generated(editor, prompt, **last).logits[-1]
    assert not torch.allclose(logits, original_logits, atol=1e-2), "generate ignores the edits"
    assert len(generated(editor, prompt, num_beams=2)) == 3
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
    editor, one = strong_editor(model, None, module_dim=32), prepared(name, 2)
    editor._format.tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    editor._format._openings = [BOS], [], []  # no chats, but an example before the question
    editor.edit_inputs(one, [(picture(i), f"question {i}", "answer") for i in range(2)])
    two = behind_another_picture(name, one)
    # Qwen-VL's positions have a gap, Mllama's first token has seen the other picture.
    tolerance = 0.02 if name in ("qwen2_5_vl", "qwen3_vl", "mllama") else 1e-4
    alone = [pytest.approx(row, abs=tolerance) for row in routes_of(editor, one)]
    assert routes_of(editor, two) == alone
    edited, original = logits_of(editor, two), original_of(editor, two)
    assert not torch.allclose(answers_of(two, edited), answers_of(two, original), atol=1e-2)
    editor.detach()


def test_training_sees_the_very_model_in_each_family(family):
    name, model = family
    editor, triple = strong_editor(model, None, module_dim=32), []
    for _ in range(3):
        inputs = prepared(name, 3)
        with torch.no_grad():
            own = answers_of(inputs, logits_of(editor, inputs))
            triple.append(editor.capture_inputs(inputs))
            assert_close(editor.frozen.upper(triple[-1].hidden, triple[-1]), own, 1e-5)
    editor.training_losses([tuple(triple)])["total"].backward()
    gradients = [parameter.grad for parameter in editor.generator.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
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
    editor.frozen.norm.weight[0] = torch.inf
    with pytest.raises(RuntimeError, match="not finite: load it in bfloat16"):
        editor.capture_inputs(prepared("qwen3_vl", 2))


def test_an_edit_between_two_tokens_leaves_positions_alone(tmp_path):
    name, token, logits = "qwen2_5_vl", torch.tensor([[5], [6]]), []
    editor = strong_editor(family_model(name, tmp_path), None, module_dim=32)
    inputs = prepared(name, 2)
    longer = behind_another_picture(name, prepared(name, 1))  # with other positions
    for act in (editor.edits, lambda: editor.edit_inputs(longer, [(picture(), "q", "a")])):
        cache = editor.model(**prompt_of(inputs), use_cache=True).past_key_values
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
    backend = tokenizer.backend_tokenizer
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if name == "llava_next":
        settings = {"size": {"shortest_edge": 16}, "crop_size": small["size"]}
        images = t.LlavaNextImageProcessor(**settings, **GRID)
        return t.LlavaNextProcessor(images, tokenizer, **shape, num_additional_image_tokens=1)
    if name == "blip-2":  # its processor wants a tokenizer that knows no image token yet
        plain = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        return t.Blip2Processor(t.BlipImageProcessor(**small), plain, num_query_tokens=4)
    if name.startswith("paligemma"):
        images = t.SiglipImageProcessor(**small)
        images.image_seq_length = 4
        return t.PaliGemmaProcessor(images, tokenizer)
    if name == "gemma3":
        tokens = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
        names |= {"extra_special_tokens": tokens}
        marked = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
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
    editor = strong_editor(family_model(name, tmp_path), processor, module_dim=32)
    asked = [(picture(i), QUESTIONS[i], f"answer {i}") for i in range(2)]
    editor.edit_many(asked)
    together = editor.encode(*map(list, zip(*asked, strict=True)))
    logits = answers_of(together, logits_of(editor, together))
    given = [together[key][together["labels"] != -100] for key in ("input_ids", "labels")]
    assert_same(*given)
    alone = [editor.encode(*one) for one in asked]
    expected = [answers_of(inputs, logits_of(editor, inputs)) for inputs in alone]
    assert_close(logits, torch.cat(expected), 5e-3)
    first = int((alone[0]["labels"][0] >= 0).nonzero()[0])
    other = alone[0] | {"input_ids": alone[0]["input_ids"].clone()}
    other["input_ids"][0, -2] = 77  # another last token of the answer
    a, b = logits_of(editor, alone[0]), logits_of(editor, other)
    assert_same(a[0, first : first + 1], b[0, first : first + 1])
    states, own = editor.capture(asked), answers_of(together, original_of(editor, together))
    assert_close(editor.frozen.upper(states.hidden, states), own, 5e-3)
    if name != "blip-2":  # whose forward cannot do without pictures
        text = editor.encode(None, TEXT, "seven")
        assert_same(logits_of(editor, text), original_of(editor, text))


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


def ask_changed(h, change):
    """Edit with model inputs that were changed."""
    inputs = h.encode([picture(0), picture(1)], ["What?", "Why?"], ["a", "b"])
    h.edit_inputs(change(inputs), [(picture(), "q", "a")] * 2)


def load_changed(h, change):
    """Load a saved editor whose file was changed."""
    with tempfile.TemporaryDirectory() as folder:
        h.save_pretrained(folder)
        path = Path(folder) / liveedit.EDITOR_FILE
        content = path.read_bytes()
        path.write_bytes(change(content))
        assert path.read_bytes() != content
        LiveEdit.from_pretrained(load_tiny(), h.processor, folder)


DAMAGES = (lambda b: b"", lambda b: b[:100], lambda b: b[:-100], lambda b: b"\xff" * 999)
DAMAGES += (lambda b: b[:-9] + bytes(9),)  # whole, but not as it was saved
DAMAGES += (lambda b: b[:-90_000] + bytes(8) + b[-89_992:],)
DAMAGES += (lambda b: b.replace(b'rank\\": 4', b'rank\\": 8'),)
DAMAGES += (lambda b: b.replace(b'gain\\": 8.0', b'gain\\": 1.0'),)
NO_LABELS = (lambda i: {k: v for k, v in i.items() if k != "labels"},)
NO_LABELS += (lambda i: i | {"labels": torch.full_like(i["labels"], -100)},)
ONE_ROW = (lambda i: {k: v[:1] for k, v in i.items()},)
NAN_PIXELS = (lambda i: i | {"pixel_values": i["pixel_values"] * math.nan},)
COUNTS = "module_dim rank slots heads sentinel_tokens".split()
CONFIGS = {"similarity": (("l2", "", None, 3), "cosine or dot")}
CONFIGS |= {"prompt_style": (("x", None), "chat or official")}
CONFIGS |= {"gain": ((0, -1.0, math.nan), "gain more than 0")}
CONFIGS |= {"threshold": ((math.nan, math.inf), "None or a number")}
CONFIGS |= dict.fromkeys(COUNTS, (NO_COUNTS, "integers in"))
LISTS = (([picture()], ["a", "b"]), ([], []), (picture(), ["a"]), (None, None))
LISTS += ((None, ["a", "b"]),)
LISTS += (([picture()], ["a"], []), ([picture()], ["a"], "x"))
LAST = ((None, "What?", "x"), (picture(), "", "x"), (picture(), "What?", " "))
# (what, the values tried, call(editor, value or folder), what the refusal names; None: it works)
HOSTILE = [
    ("heads", (7,), lambda h, v: LiveEdit(load_tiny(), None, LiveEditConfig(heads=v)), "heads"),
    ("layer", (6, -1), lambda h, v: LiveEdit(load_tiny(), None, LiveEditConfig(layer=v)), "0 to 5"),
    ("model", (1, "tiny", torch.nn.Linear(2, 2)), lambda h, v: LiveEdit(v), "vision-language"),
    ("processor", ("tiny", 3), lambda h, v: LiveEdit(load_tiny(), v), "processor"),
    ("edit image", (None, *NO_PICTURES, *NO_PIXELS), lambda h, v: h.edit(v, "W?", "a"), "image"),
    ("modes", MODES, lambda h, v: h.edit(Image.new(v, (40, 30)), "What?", "a"), None),
    ("sizes", SIZES, lambda h, v: h.edit(Image.new("RGB", v), "What?", "a"), None),
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
    ("on a file", FOLDER, lambda h, v: [(v / "x").touch(), h.save_pretrained(v / "x")], "written"),
    ("load nothing", FOLDER, lambda h, v: LiveEdit.from_pretrained(h.model, None, v), "no saved"),
    ("damages", DAMAGES, load_changed, "does not load"),
    ("no labels", NO_LABELS, ask_changed, "labels"),
    ("no edit", ({},), lambda h, v: h.edit_inputs(h.encode(picture(), "W?", "a"), v), "for 0 q"),
    ("one row", ONE_ROW, ask_changed, "1 rows of inputs for 2"),
    ("NaN pixels", NAN_PIXELS, ask_changed, "not finite"),
]
for key, (values, named) in CONFIGS.items():
    HOSTILE.append((key, values, lambda h, v, key=key: LiveEditConfig(**{key: v}), named))


def everything_of(editor: LiveEdit) -> list:
    tensors = [editor.experts.rows(name).tolist() for name in editor.experts.shapes]
    return [editor.edits(), *tensors]


@pytest.fixture(scope="module")
def victim():
    editor = strong_editor(load_tiny(), AutoProcessor.from_pretrained(TINY))
    editor.edit_many(questions(2))
    return editor


@pytest.mark.parametrize("what, values, call, named", HOSTILE, ids=[row[0] for row in HOSTILE])
def test_hostile_input_is_refused_and_changes_nothing(victim, tmp_path, what, values, call, named):
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
    return getattr(query.image, "scene", None)


def test_the_drawn_benchmark_keeps_its_promises():
    training, stream = training_samples(1500, 0), drawn.drawn_stream(500, 0)
    asked = [query for sample in training for query in sample.queries.values()]
    scenes = {scene_of(query) for query in asked} - {None}
    held_out = {p for phrases in drawn.PHRASINGS.values() for p in phrases[-drawn.HELD_OUT :]}
    assert not held_out & {query.prompt for query in asked}
    trained = " ".join(f"{query.prompt} {query.target}" for query in asked).lower().split()
    new = " ".join(s.edit.target for s in stream if s.kind == "open").lower().split()
    assert set(new) & set(trained) <= set("a the of and in with my".split())
    edited = {sample.edit.fact for sample in stream}
    assert len(edited) == 500
    assert {sample.kind for sample in stream} == {"corrections", "novel_names", "captions", "open"}
    for sample in stream:
        q, scene = sample.queries, scene_of(sample.edit)
        assert not scenes & {scene_of(query) for query in q.values()}
        assert not sample.untouched_facts() & edited
        assert sample.edit.target != scene.answer(sample.edit.fact[1])
        assert q["text_generality"].prompt in held_out - {sample.edit.prompt}
        assert scene_of(q["modal_generality"]) == scene
        assert q["modal_generality"].image != sample.edit.image == q["same_image"].image
        assert q["same_image"].fact[1] != sample.edit.fact[1]
        assert scene_of(q["similar_image"]).differences(scene) == 1
        assert scene_of(q["modal_locality"]).differences(scene) == 3
        assert q["no_image"].prompt == q["similar_image"].prompt == sample.edit.prompt
    assert drawn.drawn_stream(30, 3) == drawn.drawn_stream(30, 3) != drawn.drawn_stream(30, 4)


def test_invented_pictures_and_views_are_those_of_their_seeds(tmp_path):
    one, other = Invented(1, 2), [Invented(1, 3), Invented(4, 2)]
    pixels = one.open().tobytes()
    assert pixels == Invented(1, 2).open().tobytes()
    assert pixels not in [picture.open().tobytes() for picture in other]
    seen = [View(one, seed).open().tobytes() for seed in (5, 5, 6)]
    assert seen[0] == seen[1] != seen[2] and pixels not in seen
    hidden = Image.new("RGBA", (40, 40), (0, 0, 0, 0))  # black, and seen through
    hidden.save(tmp_path / "hidden.png")
    view = View(data.ImageFile(tmp_path / "hidden.png"), 0).open()
    assert min(view.getpixel((x, x))[0] for x in (0, 15, view.width - 1)) > 150


def test_training_draws_in_many_colors_and_invents_pictures():
    samples = training_samples(3000, 0)
    pictures = [sample.edit.image for sample in samples]
    palettes = {p.palette for p in pictures if isinstance(p, drawn.Drawing)}
    others = [p for p in pictures if isinstance(p, (Invented, Emoji))]
    assert 0 in palettes and len(palettes) > 1 and len(others) == 1200
    assert drawn.Drawing(drawn.SCENES[0], 1, 7).open() != drawn.Drawing(drawn.SCENES[0], 1).open()
    for sample in samples:
        again = sample.queries["modal_generality"]
        assert again.image != sample.edit.image and again.target == sample.edit.target
        assert sample.edit.fact not in sample.untouched_facts()
        assert sample.queries["same_image"].prompt != sample.edit.prompt
        assert sample.queries["same_image"].image == sample.edit.image
        near = sample.queries.get("similar_image")
        if near and isinstance(near.image, Emoji):
            assert near.image.thing != sample.edit.image.thing
            assert near.image.open().tobytes() != sample.edit.image.open().tobytes()
    assert {sample.edit.prompt for sample in samples} & set(drawn.OTHER_QUESTIONS)


def test_steps_contradict_nowhere_and_use_all_samples():
    samples, first = training_samples(2500, 0), set()
    batches = data.Batches(samples, 16, 2, "seed")
    for number in range(len(batches.groups)):
        numbers = batches.step(number)
        chosen = [i for n in numbers for i in batches.groups[n]]
        facts = {samples[i].edit.fact for i in chosen}
        assert len(set(chosen)) == 32 == len(facts)
        assert not any(facts & samples[i].untouched_facts() for i in chosen)
        assert numbers == batches.step(number)
        first |= set(batches.groups[numbers[0]])
    assert len(first) > 2400
    again = batches.step(len(batches.groups))  # a second round joins other groups
    assert again[0] == batches.step(0)[0] and again != batches.step(0)
    with pytest.raises(ValueError, match="contradict"):
        data.Batches([samples[0]] * 5, 2, 1, "seed")


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
    ([RECORD | {"port_new": "?"}], "record 0 lacks port_q"),
    ([RECORD | {"image": "no.png"}], r"missing pictures.*\(1\).*no.png"),
    ([RECORD | {"m_loc": "bad.png"}], r"decoded \(1\).*bad.png"),
    ([RECORD, RECORD | {"src": "a <image> b"}], r"eval.json, record 1: .*holds the image token"),
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


# ------------------------------------------------------- metrics, the main job, the tiny LLaVA


def test_metrics_are_their_definitions():
    query = data.Query(None, "?", "the heart", ())
    before = data.Answer([4, 5], [7, 8], "Star", {})
    after = data.Answer([4, 8], [7, 8], "Heart!", {})
    same = data.Answer([4, 5], [7, 8], "a star", {})
    assert data.score("reliability", query, before, after) == (0.5, 1.0)
    assert data.score("same_image", query, before, after) == (0.5, 0.0)
    assert data.score("same_image", query, before, same) == (1.0, 1.0)
    wrong = {"A": ("", "the", "B"), "3.5": ("35", "3,5"), "-3": ("3",), "1/2": ("12",)}
    wrong |= {".5": ("5",), "C++": ("C#", "C"), "+": ("-", ""), "12.5%": ("125", "12.5")}
    right = {"A": "a.", "The cat": "cat", "yes": "Yes!", "1,000": "1000", "it's": '"It\'s"'}
    for target, answers in wrong.items():
        for said in answers:
            assert data.normalise(target) != data.normalise(said), (target, said)
    for target, said in right.items():
        assert data.normalise(target) == data.normalise(said), (target, said)


def test_the_table_has_a_column_for_what_only_some_records_ask():
    one = {"query": "reliability", "kind": "x"} | dict.fromkeys(data.FIGURES, 1.0)
    rows = [[one, one | {"query": data.PORTABILITY}], [one]]
    assert "Port" in data.table([data.report_row(len(row), row) for row in rows])


def python(*words, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in the project's folder."""
    line, environment = [sys.executable, *map(str, words)], os.environ | environment
    form = {"capture_output": True, "text": True, "cwd": HERE, "env": environment}
    return subprocess.run(line, timeout=400, **form)


def refusal(capsys, *arguments: str) -> str:
    """What the program says when it ends before its work."""
    with pytest.raises(SystemExit) as stopped:
        run.main(list(arguments))
    return stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err


TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
FEW = ["--train-samples", "20", "--edits", "5"]
WRONG = [
    (["--edits", "0"], "--edits: '0' is no number from 1"),
    (["--edit", "5"], "unrecognized"),
    (["--prompt-style", "official", "--dry-run"], "official are for --data"),
    (["--editor", "output/editor"], "would overwrite"),
    (["--editor", "x", "--similarity", "dot"], "is of a training"),
    (["--data-root", "x", "--dry-run"], "--data-root and"),
    (["--seed", "-1", "--dry-run"], "--seed -1 must lie"),
    (["--editor", "x", "--resume"], "--resume continues"),
    (["--resume", "--out", "nowhere"], "--resume continues"),
    (["--device", "abacus"], "abacus"),
    (["--device", "cuda"], "--device cuda"),
    (["--model", "/no/such/folder"], "/no/such/folder"),
    (["--data", "/no/such/folder"], "no annotation file"),
    (["--editor", "/no/such/folder"], "no saved editor"),
    (["--edits", "5000"], "lack room"),
    (["--batch-size", "1", *FEW], "--batch-size must be 2 or more"),
    (["--out", "README.md", *FEW], "README.md"),
    ([*FEW, "--learning-rate", "1e30", "--batch-size", "4", "--out"], "lower --learning-rate"),
]


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
    result = python("run.py", *arguments, "--batch-size", "6", "--out", out)
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
    assert metrics["bytes_per_edit"] == 4 * (2 * 12 + 2 * 4) * 128
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
    evaluation = [record | PORT for record in SIX]
    training = [record | {"src": f"Who is it, {i}?"} for i, record in enumerate(evaluation)]
    root = published(tmp_path / "VLKEB", "vlkeb-onehop", evaluation, training)
    given = {"similarity": "dot", "threshold": 0.5, "layer": 5, "rank": 2}
    given |= {"prompt_style": "official"}
    options = [word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", v)]
    options += ["--train-steps", 2, "--batch-size", 3, "--expert-batch-size", 2, "--blend"]
    options += ["--eval-batch-size", 7, "--dtype", "float16", "--device", "cpu", "--seed", 3]
    out = ["--recipe", "paper", "--out", tmp_path / "out"]
    result = python("run.py", "--data", "vlkeb-onehop", "--data-root", root, *options, *out)
    assert result.returncode == 0, result.stderr
    assert "Port" in result.stdout
    metrics = metrics_of(tmp_path / "out")
    assert metrics["rows"][-1]["edits"] == 6 and metrics["seed"] == 3
    assert metrics["rows"][-1]["free_running"]["portability"] is not None
    assert {name: metrics["config"][name] for name in given} == given
    assert not metrics["config"]["newest_wins"] and metrics["options"]["batch_size"] == 2
    assert metrics["options"]["learning_rate"] == run.PAPER["learning_rate"]


def test_a_dry_run_says_what_it_found_and_loads_nothing(tmp_path, capsys):
    folder = tmp_path / "no weights"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    result = python("run.py", "--model", folder, "--dry-run", *FEW)
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
    resume = (*arguments, here, "--resume")
    assert "batch_size 4, not 5" in refusal(capsys, *resume, "--batch-size", "5")
    for more in ((), ("--editor", str(TINY / "editor"))):
        few = ("--edits", "5", *more, "--out", here)
        assert "is an interrupted training" in refusal(capsys, *few)
    for damaged in (b"", b"junk", checkpoint.read_bytes()[:2000]):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match="no checkpoint"):
            run.load_checkpoint(tmp_path / "damaged", None, [], {})
    other = load_tiny()
    other.model.language_model.layers[3].self_attn.q_proj.weight.data *= 1.1
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_model", lambda *_: (other, AutoProcessor.from_pretrained(TINY)))
        assert "on another model" in refusal(capsys, *resume)
    run.main(list(resume))
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
run.CHECKPOINT_SECONDS, own, shared = -1, [], []
save, cut, all_reduce = run.save_checkpoint, run.cut_gradients, run.dist.all_reduce

def save_and_keep_the_second(file, editor, optimizers, progress):
    save(file, editor, optimizers, progress)
    if progress["step"] == 2 and not run.RANK:
        shutil.copy(file, file.with_name("second"))

def note_own(gradient):
    own.append(gradient.clone())
    all_reduce(gradient)

def note_shared(editor):
    shared.extend(parameter.grad.clone() for parameter in editor.parameters())
    cut(editor)

run.save_checkpoint, run.cut_gradients = save_and_keep_the_second, note_shared
run.dist.all_reduce = note_own
options = run.parse_options(sys.argv[1:])
run.join_processes(options.device)
torch.manual_seed(options.seed)
editor, samples, _ = run.prepare(options)
told = run.train(editor, samples, options)
told |= {"weights": editor.state_dict(), "own": own, "shared": shared}
torch.save(told, options.out / f"{run.RANK}.pt")
"""


def test_two_processes_train_as_one_that_averages_their_gradients(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = ["--edits", "5", "--train-samples", "30", "--batch-size", "4", "--out", tmp_path]

    def train(*more) -> list[dict]:
        line = [*TORCHRUN, tmp_path / "worker.py", *arguments, "--train-steps", 4, *more]
        result = python(*line, PYTHONPATH=str(HERE), OMP_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr
        return [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    first, second = train()
    for i, (one, other) in enumerate(zip(first["own"], second["own"], strict=True)):
        for process in (first, second):
            assert_close(process["shared"][i], (one + other) / 2, 1e-6)
    assert first["samples"] == second["samples"] == 15  # each learns from half of them
    assert not torch.equal(first["own"][0], second["own"][0])
    (tmp_path / "second").replace(tmp_path / run.CHECKPOINT)
    for same in (second, train("--resume")[1]):
        for name, weight in first["weights"].items():
            assert_same(same["weights"][name], weight)


def test_two_processes_report_what_one_does(small_run, tmp_path):
    given = ["--editor", small_run / "editor", "--edits", "12", "--out", tmp_path]
    result = python(*TORCHRUN, HERE / "run.py", *given)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("free-running") == 1  # the first process alone prints
    rows = zip(metrics_of(tmp_path)["rows"], metrics_of(small_run)["rows"], strict=True)
    assert all(a[way] == b[way] for a, b in rows for way in ("teacher_forced", "free_running"))


def test_any_text_is_printed_on_any_console():
    code = "import run; run.set_up_process(); print('\u732b')"
    result = python("-c", code, PYTHONUTF8="0", PYTHONIOENCODING="cp1252")
    assert result.stdout == "\\u732b\n", result


def test_readme_python_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    result = python("-c", block)
    assert [line.strip() for line in result.stdout.splitlines()] == ["Mona Lisa", "star"], result


def test_the_tiny_llava_speaks_any_text_is_small_and_answers(base):
    tokenizer = base[1].tokenizer
    for text in ("naïve café", "漢字 🙂", "a\tb\n c", "Ωmega", "blicket zorp", "\u200bx"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000
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
