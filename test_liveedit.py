"""Tests: `python -m pytest -q test_liveedit.py`, on CPU, without network, about two minutes on 2 cores.

References: the official modules' numbers (GOLDEN), naive loops, and the unedited model itself. Laws are tested with an untrained editor
whose filter keeps everything (its experts are noise, but strong); behavior with an editor trained here for some seconds.
"""

import contextlib
import io
import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
import liveedit
import run
from generator import CrossAttention, ExpertGenerator, apply_experts
from liveedit import (CONFIG_FILE, EDIT, GENERALITY, Edit, ExpertRepository, LiveEdit, LiveEditConfig, Question, States,
                      find_decoder_layers, hidden_of, row_masks, with_hidden)
from router import FeatureExtractor, Router, Rows, hard_filter_loss, soft_router_loss, soft_weights, text_similarity

HERE = Path(__file__).resolve().parent
TINY = HERE / "tiny-llava"


@pytest.fixture(autouse=True)
def seed_and_clean_model(base):
    torch.manual_seed(0)
    yield
    for hook in list(base[0]._forward_pre_hooks.values()):  # also after a failed test
        if isinstance(owner := getattr(hook, "__self__", None), LiveEdit):
            owner.detach()


@pytest.fixture(scope="session")
def base():
    return AutoModelForImageTextToText.from_pretrained(TINY).eval(), AutoProcessor.from_pretrained(TINY)


def strong_editor(model, processor, **config) -> LiveEdit:
    """An untrained editor whose filter keeps every expert and whose experts are loud."""
    torch.manual_seed(1)
    settings = dict(module_dim=64, sentinel_tokens=4, threshold=-1.0, gain=8.0, same_fact="exact") | config
    editor = LiveEdit(model, processor, LiveEditConfig(**settings))
    editor.trained_steps = 1
    return editor


@pytest.fixture
def editor(base):
    editor = strong_editor(*base)
    yield editor
    editor.detach()


def picture(index: int = 0, drawing: int = 0) -> Image.Image:
    return data.Drawing(data.SCENES[97 * index % len(data.SCENES)], drawing).open()


QUESTIONS = ["What shape is this?", "Name the color of the figure.", "Describe the image.", "What color is behind the shape?"]


def questions(count: int, start: int = 0) -> list[Question]:
    return [Question(picture(i), QUESTIONS[i % 4], f"answer {i}") for i in range(start, start + count)]


def logits_of(editor: LiveEdit, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return editor.model(**inputs).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"shapes {tuple(a.shape)} and {tuple(b.shape)}, largest difference {(a - b).abs().max().item() if a.shape == b.shape else 'n/a'}"


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-4) -> None:
    assert a.shape == b.shape and torch.allclose(a, b, atol=tolerance, rtol=0), difference(a, b)


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a, b), difference(a, b)


# ------------------------------------------------------------------------------------------------ generator and router


GOLDEN = {
    "U": [
        0.0353026979, -0.0105376457, -0.0167318435, -0.0002847491, -0.0499352918, -0.0319752826, 0.0371042071, -0.0117329308,
        -0.0170881282, -0.0019385415, -0.0481566294, -0.032472079, 0.0357069869, -0.0107780232, -0.016845491, -0.0004498011,
        -0.0497907701, -0.0319849724],
    "V": [
        0.0065032645, -0.0278475724, -0.0591466931, -0.0034553764, -0.0426757434, -0.039172227, 0.006689017, -0.0283003387,
        -0.0587850038, -0.002971146, -0.042063761, -0.0403964081, 0.0066137151, -0.0278301383, -0.0592782233, -0.0035383566,
        -0.0426715312, -0.0390943399],
    "edit_visual": [
        0.615481719, 0.221392681, 0.0140770263, 0.521173465, -0.15903825, -0.138031786, 0.195397045, -0.550023655,
        0.615604807, 0.221247781, 0.0141291363, 0.521255358, -0.158948879, -0.138092064, 0.195380556, -0.549943441,
        0.609654391, 0.214038613, 0.0287961904, 0.510730524, -0.159662794, -0.131656597, 0.188313319, -0.547833879,
        0.609828461, 0.213868326, 0.0288280154, 0.510862332, -0.159563025, -0.131708452, 0.188276248, -0.5477372, 0.577998633,
        0.186547701, 0.0936913351, 0.459756422, -0.144943921, -0.0832451416, 0.115059936, -0.507674336, 0.577999695,
        0.186546583, 0.0936916255, 0.459757189, -0.144943901, -0.0832450578, 0.115059814, -0.507674272],
    "edit_text": [
        0.044417322, -0.344758826, -0.532760814, 0.0813733914, -0.36428348, -0.215737585, 0.367869196, -0.148693065,
        0.0545187252, -0.350074946, -0.536434473, 0.0911313486, -0.355134774, -0.217448094, 0.360788675, -0.138421466,
        0.0514688009, -0.360938596, -0.52024926, 0.082425384, -0.375646135, -0.201578684, 0.362112259, -0.155891228,
        0.0598451702, -0.364695356, -0.524083313, 0.0908179156, -0.369105279, -0.202685217, 0.356909317, -0.148493794,
        0.199976177, -0.372178304, -0.655166654, 0.256794326, -0.445909182, -0.279336886, 0.526393102, -0.276765739,
        0.202140338, -0.375086667, -0.6538143, 0.258067552, -0.441635813, -0.282766295, 0.526266246, -0.273182948],
    "input_visual": [
        0.60325436, 0.151151957, 0.007865272, 0.409850022, -0.257627325, -0.164398709, 0.0611933995, -0.579332627,
        0.603269872, 0.15111112, 0.0078991353, 0.409849914, -0.257584591, -0.164451898, 0.0612149766, -0.579305527],
    "input_text": [
        0.0500291962, -0.404068662, -0.478128924, 0.16380434, -0.347504355, -0.0759078266, 0.456017721, -0.126464033,
        0.0640360281, -0.416509302, -0.477093721, 0.174993312, -0.328520231, -0.0851691057, 0.448231452, -0.10778834],
    "sentinel_visual": [
        0.586380302, 0.131390612, 0.0486328615, 0.380319089, -0.260764409, -0.132408114, 0.0256505102, -0.568348153,
        0.586397667, 0.131352726, 0.0486613054, 0.380322584, -0.260724502, -0.132455051, 0.0256673549, -0.568321583],
    "visual_similarity": [
        0.358059929, 0.354042088, 0.324640337],
    "sentinel_similarity": [
        0.335741613],
    "text_similarity": [
        0.260235613, 0.261190515, 0.340768818],
    "weights": [
        0.282212298, 0.282599325, 0],
    "residual": [
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.001364837, -0.0052339618, -0.0107680024, -0.0004795938, -0.0079004956,
        -0.0071416714, 0, 0, 0, 0, 0, 0, 0.0016435176, -0.0063059289, -0.012973929, -0.0005782611, -0.0095176679,
        -0.0086065475],
}


def fill(parameter: torch.Tensor, number: int) -> None:
    """The formula that the official numbers were made with."""
    values = 0.3 * torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + number)
    parameter.data = values.view(parameter.shape)


def fill_attention(attention: CrossAttention, number: int) -> None:
    for i, layer in enumerate((attention.to_query, attention.to_key, attention.to_value)):
        fill(layer.weight, number + 2 * i)
        fill(layer.bias, number + 2 * i + 1)


def fill_extractor(extractor: FeatureExtractor, number: int) -> None:
    for norm, queries, first in ((extractor.visual_norm, extractor.visual_queries, number), (extractor.text_norm, extractor.text_queries, number + 15)):
        fill(norm.weight, first), fill(norm.bias, first + 1), fill(queries, first + 2)
    fill_attention(extractor.visual_prompt_attention, number + 3)
    fill_attention(extractor.visual_image_attention, number + 9)
    fill_attention(extractor.text_attention, number + 18)


def test_agrees_with_the_official_modules():
    D, M, R, K = 6, 8, 3, 2
    made = lambda wave, length, step, shift: wave(step * torch.arange(length * D, dtype=torch.float64) + shift).view(1, length, D)
    prompts = [Rows(made(torch.sin, 5, *p), None) for p in ((0.61, 0), (0.43, 1), (0.97, 5))]
    images = [Rows(made(torch.cos, 4, *p), None) for p in ((0.29, 0), (0.53, 1), (1.21, 5))]
    generator = ExpertGenerator(D, M, R, heads=2, gain=0.2).double()
    for number, side in ((1, "U"), (2, "V")):
        norm, queries, attention = (getattr(generator, f"{part}_{side}") for part in ("norm", "queries", "attention"))
        fill(norm.weight, number), fill(norm.bias, number + 1), fill(queries, number + 2), fill_attention(attention, number + 3)
    router = Router(D, M, K, heads=2, sentinel_tokens=4, similarity="dot").double()
    fill_extractor(router.edit_side, 0), fill_extractor(router.input_side, 38), fill(router.sentinel, 62)
    U, V = generator(torch.cat([p.states for p in prompts]))
    visual_keys = torch.cat([router.visual_key(p, i) for p, i in zip(prompts, images)])
    text_keys = torch.cat([router.text_key(p) for p in prompts])
    query = router.query(prompts[0], images[0])
    routing = router.route(query, visual_keys, text_keys)
    residual = apply_experts(F.layer_norm(prompts[0].states, (D,)), U[routing.experts], V[routing.experts], routing.weights)
    ours = {"U": U[0], "V": V[0], "edit_visual": visual_keys, "edit_text": text_keys, "input_visual": query.visual, "input_text": query.text,
            "sentinel_visual": query.sentinel, "visual_similarity": routing.similarity, "sentinel_similarity": routing.threshold,
            "text_similarity": text_similarity(query.text, text_keys), "weights": F.pad(routing.weights, (0, 1)), "residual": residual}
    assert routing.experts.tolist() == [0, 1]
    for name, numbers in GOLDEN.items():
        assert_close(ours[name].flatten(), torch.tensor(numbers, dtype=torch.float64), 1e-6)


def test_apply_experts_is_the_double_loop_and_ignores_their_order():
    h, U, V, w = torch.randn(2, 5, 8), torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.rand(2, 3)
    naive = torch.zeros_like(h)
    for b in range(2):
        for e in range(3):
            naive[b] += w[b, e] * torch.relu(h[b] @ U[e].T) @ V[e]
    assert_close(apply_experts(h, U, V, w), naive, 1e-4)
    order = torch.tensor([2, 0, 1])
    assert_close(apply_experts(h, U[order], V[order], w[:, order]), naive, 1e-4)


def test_soft_weights_is_the_loop_and_drops_the_dropped():
    scores, kept = torch.randn(3, 5), torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    for row, keep, weights in zip(scores.tolist(), kept.tolist(), soft_weights(scores, kept).tolist()):
        total = sum(math.exp(s) for s, k in zip(row, keep) if k)
        expected = [math.exp(s) / total / (1 + math.exp(-s)) if k else 0.0 for s, k in zip(row, keep)]
        assert weights == pytest.approx(expected, abs=1e-6)


def test_the_filter_keeps_exactly_what_lies_above_the_sentinel():
    router = Router(8, 8, 2, 2, 3)
    prompt, image = Rows(torch.randn(4, 5, 8), None), Rows(torch.randn(4, 6, 8), None)
    query, keys = router.query(prompt, image), F.normalize(torch.randn(50, 2, 8), dim=-1)
    routing = router.route(query, keys, torch.randn(50, 2, 8))
    kept = torch.zeros(4, 50, dtype=torch.bool)
    kept[:, routing.experts] = routing.weights > 0
    assert kept.any() and not kept.all()
    for b in range(4):
        for n in range(50):
            cosine = sum(F.cosine_similarity(query.visual[b, k], keys[n, k], dim=0).item() for k in range(2)) / 2
            sentinel = sum(F.cosine_similarity(query.visual[b, k], query.sentinel[b, k], dim=0).item() for k in range(2)) / 2
            assert kept[b, n].item() == (cosine > sentinel), f"cosine {cosine}, sentinel {sentinel}"
    assert not len(router.route(query, keys, keys, active=torch.zeros(50, dtype=torch.bool)).experts)
    router.threshold = 0.5
    assert (router.route(query, keys, keys).threshold == 0.5).all()


def test_routing_losses_are_the_equations():
    similar, sentinel = torch.randn(4, 3), torch.randn(4)
    own, is_locality = torch.tensor([0, 1, 2, 1]), torch.tensor([False, False, False, True])
    log_share = lambda chosen, others: -(chosen - torch.stack(others).logsumexp(0))
    follow = sum(log_share(similar[q, q], [*similar[q], sentinel[q]]) for q in range(3)) / 3
    other = sum(log_share(sentinel[q], [*(similar[q, e] for e in range(3) if e != q), sentinel[q]]) for q in range(3)) / 3
    reject = log_share(sentinel[3], [*similar[3], sentinel[3]])
    assert_close(hard_filter_loss(similar, sentinel, own, is_locality), follow + other + reject, 1e-5)
    scores, own, negative = torch.randn(2, 5), torch.tensor([1, 0]), torch.tensor([0, 1])
    l_sr1, l_sr2 = soft_router_loss(scores, own, negative)
    by_hand = [-math.log(torch.sigmoid(scores[q, own[q]])) - math.log(1 - torch.sigmoid(scores[q, negative[q]])) for q in range(2)]
    assert l_sr1.item() == pytest.approx(sum(by_hand) / 2, abs=1e-5)
    assert_close(l_sr2, sum(log_share(scores[q, own[q]], list(scores[q])) for q in range(2)) / 2, 1e-5)


def test_masked_rows_change_nothing():
    generator, extractor = ExpertGenerator(8, 8, 2, 2), FeatureExtractor(8, 8, 2, 2)
    states, mask = torch.randn(1, 6, 8), torch.tensor([[0, 1, 1, 0, 1, 0]]).bool()
    short = states[mask][None]
    for a, b in zip(generator(states, mask), generator(short)):
        assert_close(a, b, 1e-5)
    rows = Rows.gather(states, mask)
    assert_same(rows.states, short)
    assert_close(extractor.text(Rows(states, mask)), extractor.text(rows), 1e-5)


# ------------------------------------------------------------------------------------------------ the model untouched


def test_an_unedited_layer_output_is_the_same_object(base):
    model, processor = base
    layer, outputs = find_decoder_layers(model)[0][3], []
    watch = lambda: layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    before, editor, after = watch(), strong_editor(model, processor, layer=3), watch()
    image, text = editor.encode(picture(), QUESTIONS[0]), editor.encode(None, "What is 3 plus 4?")
    try:
        logits_of(editor, image)  # no experts
        editor.edit(picture(), QUESTIONS[0], "heart")
        logits_of(editor, text)  # text only
        editor.router.threshold = 1.0
        logits_of(editor, image)  # everything filtered
        same = [one is other for one, other in zip(outputs[:2] + outputs[-4:], (outputs[:2] + outputs[-4:])[1:])][::2]
        assert same == [True] * 3, same
        editor.router.threshold = -1.0
        logits_of(editor, image)
        assert outputs[-2] is not outputs[-1], "the edit changed nothing"
    finally:
        before.remove(), after.remove(), editor.detach()


def test_detached_and_disabled_are_bit_equal_and_foreign_hooks_survive(base):
    model, processor = base
    calls = []
    layers = find_decoder_layers(model)[0]
    foreign = [model.register_forward_pre_hook(lambda m, a: calls.append("model")), layers[3].register_forward_hook(lambda m, a, o: calls.append("layer"))]
    counts = lambda: (len(model._forward_pre_hooks), len(model._forward_hooks), len(layers[3]._forward_hooks))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = counts()
    editor = strong_editor(model, processor)
    editor.detach()
    inputs = editor.encode(picture(), QUESTIONS[0])
    original = logits_of(editor, inputs)
    editor.attach()
    with pytest.raises(RuntimeError, match="attached already"):
        editor.attach()
    editor.edit_many(questions(3))
    assert not torch.equal(logits_of(editor, inputs), original), "the edits changed nothing"
    with pytest.raises(ZeroDivisionError), editor.disabled():
        assert_same(logits_of(editor, inputs), original)
        1 / 0
    assert not torch.equal(logits_of(editor, inputs), original), "disabled() did not end with its block"
    calls.clear()
    editor.detach()
    editor.detach()
    assert_same(logits_of(editor, inputs), original)
    assert calls == ["model", "layer"] and counts() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items()), "a weight of the model changed"
    for handle in foreign:
        handle.remove()


def test_unedited_rows_of_a_mixed_batch_are_bit_equal(editor):
    editor.edit_many(questions(3))
    inputs = editor.encode([picture(), None, picture(1), None], ["What shape is this?", "What is 3 plus 4?", "Describe it.", "Repeat: cat"])
    with editor.disabled():
        original = logits_of(editor, inputs)
    edited = logits_of(editor, inputs)
    for row in (1, 3):
        assert_same(edited[row], original[row])
    assert not torch.equal(edited[0], original[0]) and not torch.equal(edited[2], original[2])


def test_a_filter_that_rejects_all_leaves_everything(base):
    editor = strong_editor(*base, threshold=1.0)
    editor.edit_many(questions(3))
    inputs = editor.encode(picture(), QUESTIONS[0])
    edited = logits_of(editor, inputs)
    assert_same(edited, logits_of(editor, inputs))
    editor.detach()
    assert_same(edited, logits_of(editor, inputs))


def test_exceptions_and_interrupts_leave_no_route_behind(editor):
    editor.edit_many(questions(2))
    inputs, other = editor.encode(picture(), QUESTIONS[0]), editor.encode(None, "What is 3 plus 4?")
    with editor.disabled():
        original = logits_of(editor, other)
    layers = find_decoder_layers(editor.model)[0]
    for error in (ValueError, KeyboardInterrupt):
        def fail(*_):
            raise error
        handle = layers[5].register_forward_hook(fail)
        with pytest.raises(error):
            logits_of(editor, inputs)
        handle.remove()
        assert_same(logits_of(editor, other), original)
    assert len(layers[5]._forward_hooks) == 0


def test_detached_inside_disabled_and_attached_again_edits(editor):
    editor.edit_many(questions(2))
    inputs = editor.encode(picture(), QUESTIONS[0])
    edited = logits_of(editor, inputs)
    with editor.disabled():
        original = logits_of(editor, inputs)
        editor.detach()
    editor.attach()
    assert_same(logits_of(editor, inputs), edited)
    with editor.disabled():
        assert_same(logits_of(editor, inputs), original)


def test_the_model_is_frozen_while_attached_only(base):
    model, _ = base
    model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError):
        LiveEdit(*base, LiveEditConfig(module_dim=64, heads=7))
    assert [p.requires_grad for p in model.parameters()] == before and True in before
    editor = strong_editor(*base)
    assert not any(p.requires_grad for p in model.parameters())
    editor.detach()
    assert [p.requires_grad for p in model.parameters()] == before
    model.lm_head.weight.requires_grad_(True)


def test_without_edits_nothing_is_refused(editor):
    """A second turn on an old cache, and embeddings without ids, work as they do without LiveEdit."""
    inputs, more = editor.encode(picture(), QUESTIONS[0]), torch.tensor([[5, 6]])
    outputs = []
    for disabled in (True, False):
        with editor.disabled() if disabled else contextlib.nullcontext():
            cache = editor.model(**inputs, use_cache=True).past_key_values
            outputs.append(editor.model(input_ids=more, past_key_values=cache).logits)
            outputs.append(editor.model(inputs_embeds=torch.ones(1, 3, 128), past_key_values=cache).logits)
    assert_same(outputs[0], outputs[2])
    assert_same(outputs[1], outputs[3])
    editor.edit_many(questions(1))
    with pytest.raises(RuntimeError, match="whole prompts"):
        editor.model(input_ids=more, past_key_values=cache)


def test_two_editors_on_two_models_do_not_meet(base):
    other = AutoModelForImageTextToText.from_pretrained(TINY).eval()
    one, two = strong_editor(*base), strong_editor(other, base[1])
    inputs = one.encode(picture(), QUESTIONS[0])
    original = logits_of(two, inputs)
    one.edit(picture(), QUESTIONS[0], "heart")
    assert_same(logits_of(two, inputs), original)
    one.detach()


# ------------------------------------------------------------------------------------------------ batches and generation


def test_a_batch_is_its_rows_one_by_one_with_padding_on_either_side(editor):
    editor.edit_many(questions(4))
    asked = [(picture(0), "What?"), (None, "What is 3 plus 4?"), (picture(1), QUESTIONS[2]), (picture(2), "Look at the shape. What color is it?")]
    left = editor.encode(*map(list, zip(*asked)))
    width = left["input_ids"].shape[1]
    order = torch.argsort(left["attention_mask"], dim=1, descending=True, stable=True)
    right = left | {key: left[key].gather(1, order) for key in ("input_ids", "attention_mask")}
    from_left, from_right = logits_of(editor, left), logits_of(editor, right)
    for row, one in enumerate(asked):
        alone = logits_of(editor, editor.encode(*one))[0]
        assert_close(from_left[row, width - len(alone):], alone)
        assert_close(from_right[row, :len(alone)], alone)


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_generation_is_the_same_with_and_without_cache_in_batches_and_alone(base, layer):
    editor = strong_editor(*base, layer=layer, gain=3.0)
    editor.edit_many(questions(4))
    images, prompts = [picture(0), picture(5), None], [QUESTIONS[0], QUESTIONS[2], "What is 3 plus 4?"]
    inputs = editor.encode(images, prompts)
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    cached = editor.model.generate(**inputs, **settings)
    assert_same(cached, editor.model.generate(**inputs, **settings, use_cache=False))
    for row, (image, prompt) in enumerate(zip(images, prompts)):
        alone = editor.model.generate(**editor.encode(image, prompt), **settings)
        assert_same(cached[row, -8:], alone[0, -8:])
    with editor.disabled():
        assert not torch.equal(cached, editor.model.generate(**inputs, **settings)), "the edits changed no token"
    step = inputs
    for _ in range(8):  # greedy by hand, always the whole sequence with the prompt marked: the reference of both
        labels = step["input_ids"].masked_fill(torch.arange(step["input_ids"].shape[1]) < inputs["input_ids"].shape[1], -100)
        logits = logits_of(editor, step | {"labels": labels} if step is not inputs else step)[:, -1]
        logits[:, editor.processor.tokenizer.eos_token_id] = -torch.inf
        step = step | {"input_ids": torch.cat([step["input_ids"], logits.argmax(-1, keepdim=True)], 1),
                       "attention_mask": F.pad(step["attention_mask"], (0, 1), value=1)}
    editor.detach()
    assert_same(cached, step["input_ids"])


@pytest.mark.parametrize("way", [dict(num_beams=3, do_sample=False), dict(do_sample=True, num_return_sequences=2)])
def test_beams_and_sampling_agree_with_and_without_cache(base, way):
    editor = strong_editor(*base, gain=3.0)
    editor.edit_many(questions(4))
    inputs = editor.encode([picture(0), None], [QUESTIONS[0], "What is 3 plus 4?"])
    made, routed, route = [], [], editor._route
    editor._route = lambda *a: routed.append(1) or route(*a)
    for use_cache in (True, False):
        torch.manual_seed(0)
        made.append(editor.model.generate(**inputs, **way, max_new_tokens=6, min_new_tokens=6, use_cache=use_cache))
    editor.detach()
    assert_same(*made)
    assert len(routed) == 2, f"two prompts were routed {len(routed)} times: generated tokens took part"


def test_a_second_call_never_sees_the_first_ones_route(editor):
    editor.edit_many(questions(2))
    pairs = [editor.encode(picture(i), q) for i, q in ((0, QUESTIONS[0]), (7, QUESTIONS[2]))]
    fresh = [logits_of(editor, p) for p in pairs]
    caches = [editor.model(**p, use_cache=True).past_key_values for p in pairs]
    token = torch.tensor([[5]])
    expected = [editor.model(input_ids=token, past_key_values=c).logits for c in caches]
    interleaved = [editor.model(**p, use_cache=True).past_key_values for p in pairs]
    for i in (1, 0):
        assert_same(editor.model(input_ids=token, past_key_values=interleaved[i]).logits, expected[i])
        assert_same(logits_of(editor, pairs[i]), fresh[i])


def test_kept_routes_end_with_forget_and_with_a_cache_filled_anew(editor):
    edits = editor.edit_many(questions(3))
    inputs, token = editor.encode(picture(), QUESTIONS[0]), torch.tensor([[5]])
    cache = editor.model(**inputs, use_cache=True).past_key_values
    editor.forget(edits[0].id)
    with pytest.raises(RuntimeError, match="forgotten since"):
        editor.model(input_ids=token, past_key_values=cache)
    cache = editor.model(**inputs, use_cache=True).past_key_values
    for layer in cache.layers:  # emptied by hand: crop(0) keeps everything
        layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    assert cache.get_seq_length() == 0
    with editor.disabled():
        editor.model(**inputs, past_key_values=cache)
    with pytest.raises(RuntimeError, match="not filled"):
        editor.model(input_ids=token, past_key_values=cache)


def test_a_longer_prompt_after_forgetting_is_routed_anew(editor):
    edits = editor.edit_many(questions(2))
    inputs = editor.encode(picture(), QUESTIONS[0])
    longer = inputs | {"input_ids": F.pad(inputs["input_ids"], (0, 1), value=5), "attention_mask": F.pad(inputs["attention_mask"], (0, 1), value=1)}
    editor.model(**inputs, use_cache=False)
    editor.forget(edits[0].id)
    after = logits_of(editor, longer)
    editor.model(**editor.encode(None, "Something else?"), use_cache=False)
    assert_same(after, logits_of(editor, longer))


def test_another_picture_behind_the_same_prompt_is_routed_anew(editor):
    editor.edit_many(questions(2))
    first, second = editor.encode(picture(0), QUESTIONS[0]), editor.encode(picture(1), QUESTIONS[0])
    longer = second | {"input_ids": F.pad(second["input_ids"], (0, 1), value=5), "attention_mask": F.pad(second["attention_mask"], (0, 1), value=1)}
    expected = logits_of(editor, longer)
    editor.model(**first, use_cache=False)
    assert_same(logits_of(editor, longer), expected)


def test_edited_outputs_need_no_gradient_and_two_editors_on_one_model_are_refused(editor):
    editor.edit_many(questions(2))
    assert not editor.model(**editor.encode(picture(), QUESTIONS[0])).logits.requires_grad
    with pytest.raises(RuntimeError, match="another editor"):
        LiveEdit(editor.model, editor.processor, LiveEditConfig(module_dim=64))
    inputs = editor.encode(picture(), QUESTIONS[0])
    with pytest.raises(ValueError, match="no prompt token"):
        editor.model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="attention_mask"):
        editor.model(**inputs | {"attention_mask": torch.ones(1, 1, 4, 4)})


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_same_fact_is_the_loop_over_pairs(similarity):
    """The rule in words, on stored features in half precision; with a fixed threshold of the filter it is the same."""
    router = Router(32, 16, 2, 4, 5, similarity, threshold=0.9)
    with torch.no_grad():
        rows = lambda n, length: Rows(torch.randn(n, length, 32), torch.ones(n, length, dtype=torch.bool))
        prompt, image = rows(9, 4), rows(9, 6)
        query, keys = router.query(prompt, image), router.visual_key(prompt, image) * (1 if similarity == "cosine" else 8)
        stored = SimpleNamespace(visual_keys=keys, text_keys=router.text_key(prompt).half(), visual_queries=query.visual.half(),
                                 text_queries=40 * query.text.half(), sentinels=router.sentinel_similarity(query) - 0.2)
        found = {tuple(pair) for pair in router.same_fact(stored, torch.tensor([1, 4, 5, 8])).tolist()}
        expected = set()
        for new in (1, 4, 5, 8):
            for old in range(9):
                shown = lambda a, b: router.visual_logits(router.visual_similarity(stored.visual_queries[[a]].float(), keys[[b]]) - stored.sentinels[a]).item()
                there, back = shown(new, old), shown(old, new)
                text = text_similarity(stored.text_queries[[new]].float(), stored.text_keys[[old]].float()).item()
                if old != new and (there + back) / 2 > 0.75 and min(there, back, text) > -1.5:
                    expected.add((new, old))
    assert found == expected and 0 < len(expected) < 32


def test_experts_that_arrive_are_judged_by_the_router_too(base, tmp_path):
    editor = strong_editor(*base, same_fact="router")
    here, there = questions(4), questions(4, start=10)
    editor.edit_many([*here, *there])
    expected = [(e.target, [editor.experts.edits[editor.experts.slot(i)].target for i in e.replaces]) for e in editor.experts.edits]
    editor.reset()
    editor.edit_many(there)
    editor.save_experts(tmp_path / "experts.safetensors")
    editor.reset()
    editor.edit_many(here)
    editor.load_experts(tmp_path / "experts.safetensors")
    assert [(e.target, [editor.experts.edits[editor.experts.slot(i)].target for i in e.replaces]) for e in editor.experts.edits] == expected
    assert any(replaced for _, replaced in expected[4:])


@pytest.mark.parametrize("late", [False, True])
def test_an_edit_that_fails_while_replacing_is_not_made(editor, monkeypatch, late):
    edits = editor.edit_many(questions(3))
    def interrupted(edit, older):
        if edit.id == 5 and bool(older) == late:
            raise KeyboardInterrupt
        return replace(edit, older)

    replace = editor.experts.replace
    monkeypatch.setattr(editor.experts, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.edit_many(questions(3))
    monkeypatch.undo()
    assert editor.edits() == edits


def test_the_router_decides_what_is_the_same_fact_and_forgetting_undoes_it(base):
    editor = strong_editor(*base, same_fact="router")
    edits = editor.edit_many(questions(6))
    replaced = {old for e in edits for old in e.replaces}
    assert 0 < len(replaced) < 6 and all(old < e.id for e in edits for old in e.replaces)
    assert {e.id for e in editor.edits()} == {e.id for e in edits} - replaced
    for edit in edits[::-1]:
        editor.forget(edit.id)
        left = [e for e in edits if e.id < edit.id]
        assert [e.id for e in editor.edits()] == [e.id for e in left if not any(e.id in other.replaces for other in left)]


def test_what_cannot_be_routed_is_refused(editor):
    inputs = editor.encode(picture(), QUESTIONS[0])
    with editor.disabled():
        foreign = editor.model(**inputs, use_cache=True).past_key_values
    editor.edit(picture(), QUESTIONS[0], "heart")
    token = torch.tensor([[5]])
    with pytest.raises(ValueError, match="labels have shape"):
        editor.model(**inputs, labels=F.pad(inputs["input_ids"], (0, 1)))
    with pytest.raises(TypeError, match="PIL image"):
        editor.edit_inputs(inputs, [("picture.png", "What shape is this?", "heart")])
    with pytest.raises(ValueError, match="input_ids"):
        editor.model(inputs_embeds=torch.zeros(1, 4, 128))
    with pytest.raises(RuntimeError, match="top-level"):
        editor.model.get_decoder()(inputs_embeds=torch.zeros(1, 4, 128))
    with pytest.raises(RuntimeError, match="not filled"):
        editor.model(input_ids=token, past_key_values=foreign)
    cache = editor.model(**inputs, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="whole prompts"):
        editor.model(input_ids=token.expand(1, 3), past_key_values=cache)


def test_the_router_never_sees_answer_tokens(editor):
    editor.edit_many(questions(4))
    routes = [editor.explain(editor.encode(picture(), QUESTIONS[0], target)) for target in ("heart", "a longer answer of words")]
    plain = editor.explain(editor.encode(picture(), QUESTIONS[0]))
    assert len(plain[0]) == 4
    for route in routes:
        for a, b in zip(route[0], plain[0]):
            assert a["id"] == b["id"] and a["weight"] == pytest.approx(b["weight"], abs=1e-5)


def test_logits_to_keep_takes_the_labels_of_the_last_tokens(editor):
    editor.edit_many(questions(2))
    inputs = editor.encode([picture(0), picture(1)], QUESTIONS[:2], ["heart", "a longer answer"])
    expected, kept = logits_of(editor, inputs), int((inputs["labels"] != -100).any(0).sum()) + 1
    assert_close(logits_of(editor, inputs | {"labels": inputs["labels"][:, -kept:], "logits_to_keep": kept}), expected[:, -kept:], 1e-4)


def test_prompt_rows_follow_the_image_or_else_the_leading_special_tokens():
    ids = torch.tensor([[1, 9, 7, 7, 4, 5, 6], [2, 1, 4, 5, 6, 7, 7], [2, 2, 1, 4, 5, 6, 8]])
    labels = torch.tensor([[-100] * 6 + [6], [-100] * 7, [-100] * 7])
    masks = row_masks(ids, (ids != 2).long(), labels, 7, torch.tensor([1, 2]))
    assert masks.prompt.long().tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert masks.image.sum().item() == 4 and masks.answer.sum().item() == 1


def test_the_official_prompt_style_adds_nothing(base):
    model, processor = base
    texts = []
    for style in ("official", "chat"):
        editor = strong_editor(model, processor, prompt_style=style)
        texts.append(processor.tokenizer.decode(editor.encode(picture(), "What is it?")["input_ids"][0]))
        editor.detach()
    official, chat = (re.sub("(<image>)+", "<image>", text) for text in texts)
    assert official == "<s><image>\nWhat is it?" and chat == "<s>USER: <image>\nWhat is it? ASSISTANT:"


def test_layer_outputs_as_tensor_and_as_tuple():
    hidden, new = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert hidden_of(hidden) is hidden and hidden_of((hidden, "cache")) is hidden
    assert with_hidden(hidden, new) is new and with_hidden((hidden, "cache"), new) == (new, "cache")


# ------------------------------------------------------------------------------------------------ the repository


def test_edits_in_batches_make_the_same_experts(base):
    one = strong_editor(*base)
    asked = questions(5)
    one.edit_many(asked)
    batched = {name: getattr(one.experts, name).clone() for name in ExpertRepository.TENSORS}
    one.reset()
    for q in asked:
        one.edit(*q)
    one.detach()
    for name, tensor in batched.items():
        assert_close(getattr(one.experts, name), tensor, 1e-3)  # a unit in the last place of half precision


def test_order_of_edits_does_not_matter_and_forget_undoes(editor):
    inputs = editor.encode([picture(0), picture(1)], QUESTIONS[:2])
    original, asked = logits_of(editor, inputs), questions(20)
    editor.edit_many(asked)
    forward = logits_of(editor, inputs)
    editor.reset()
    assert_same(logits_of(editor, inputs), original)
    backward = editor.edit_many(asked[::-1])
    assert [e.id for e in backward] == list(range(21, 41)), "ids are used again"
    assert_close(logits_of(editor, inputs), forward, 2e-3)
    extra = editor.edit_many(questions(3, start=40))
    assert not torch.allclose(logits_of(editor, inputs), forward, atol=2e-3), "three edits more changed nothing"
    for edit in (extra[1], extra[0], extra[2]):
        editor.forget(edit.id)
    assert_close(logits_of(editor, inputs), forward, 2e-3)
    assert [e.id for e in editor.edits()] == [e.id for e in backward]
    with pytest.raises(KeyError, match="no edit with id"):
        editor.forget(extra[0].id)


def test_the_newest_edit_of_a_fact_wins_and_forgetting_it_brings_the_older_back(editor):
    inputs = editor.encode(picture(), QUESTIONS[0])
    old = editor.edit(picture(), QUESTIONS[0], "heart")
    with_old = logits_of(editor, inputs)
    middle, new = editor.edit_many([(picture(), "what  shape is THIS?", "ring"), (picture(), QUESTIONS[0], "blicket")])
    assert (middle.superseded, new.superseded) == (old.id, middle.id) and [e.id for e in editor.edits()] == [new.id]
    with_new = logits_of(editor, inputs)
    editor.forget(middle.id)
    assert_same(logits_of(editor, inputs), with_new)
    editor.forget(new.id)
    assert_same(logits_of(editor, inputs), with_old)
    other = editor.edit(picture(), QUESTIONS[1], "red")
    assert other.superseded is None and len(editor.edits()) == 2


def test_repository_is_a_list_of_experts_under_random_use():
    rng = random.Random(0)
    repository, reference = ExpertRepository(2, 3, 2, 3), {}
    for step in range(400):
        if reference and rng.random() < 0.45:
            gone = rng.choice(sorted(reference))
            assert repository.remove(gone).id == gone
            del reference[gone]
        else:
            values = torch.randn(1, 2, 3)
            edit = Edit(repository.next_id, rng.choice("abcdef"), "x", "image", 0.0)
            repository.add({name: values if repository.shapes[name] else values[:, 0, 0] for name in ExpertRepository.TENSORS}, [edit])
            repository.replace(edit, repository.same_picture_and_question(edit))
            reference[edit.id] = (edit.prompt, values[0])
        newest = {prompt: max(i for i, (p, _) in reference.items() if p == prompt) for prompt, _ in reference.values()}
        assert {e.id for e in repository.edits} == set(reference) and len(repository.U) == len(reference)
        for slot, edit in enumerate(repository.edits):
            assert torch.equal(repository.visual_keys[slot], reference[edit.id][1])
            assert torch.equal(repository.U[slot], reference[edit.id][1].half())
            assert repository.active[slot].item() == (newest[edit.prompt] == edit.id)


def test_saved_and_loaded_editors_answer_identically(base, tmp_path):
    model, processor = base
    editor = strong_editor(model, processor)
    editor.edit_many(questions(3))
    old = editor.edit(picture(), QUESTIONS[0], "ring")
    editor.forget(editor.edit(picture(9), QUESTIONS[0], "gone").id)
    inputs = editor.encode([picture(0), picture(1)], QUESTIONS[:2])
    expected, edits = logits_of(editor, inputs), editor.edits()
    editor.save_pretrained(tmp_path)
    editor.save_pretrained(tmp_path)
    editor.detach()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"], "leftovers of an older save"
    loaded = LiveEdit.from_pretrained(model, processor, tmp_path)
    assert_same(logits_of(loaded, inputs), expected)
    assert loaded.edits() == edits and loaded.edit(picture(), "New?", "yes").id == old.id + 2
    loaded.forget(old.id)
    assert len(loaded.edits()) == 4, "the superseded edit did not come back"
    loaded.detach()


def test_settings_that_training_does_not_depend_on_may_change_when_loading(base, tmp_path):
    editor = strong_editor(*base)
    editor.edit_many(questions(3))
    edits, inputs = editor.edits(), editor.encode(picture(), QUESTIONS[0])
    editor.save_pretrained(tmp_path)
    assert len(editor.explain(inputs)[0]) == 3
    editor.detach()
    loaded = LiveEdit.from_pretrained(*base, tmp_path, threshold=1.0, same_fact="router", expert_dtype="float32")
    assert loaded.edits() == edits and loaded.experts.U.dtype == torch.float32 and loaded.explain(inputs) == [[]]
    assert torch.equal(loaded.experts.U, editor.experts.U.float())
    loaded.detach()
    options, *_, reached, _ = run.prepare(run.Options(editor=tmp_path, edits=5, out=tmp_path / "out", threshold=0.5, same_fact="router", expert_dtype="float32"))
    reached.detach()
    assert (reached.config.threshold, reached.config.same_fact, reached.config.expert_dtype) == (0.5, "router", "float32")


def test_a_second_save_writes_the_new_edits_only_and_forgetting_none(base, tmp_path):
    model, processor = base
    editor = strong_editor(model, processor)
    files = lambda: {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    first = editor.edit_many(questions(9))
    editor.save_pretrained(tmp_path)
    before = files()
    late = editor.edit_many([*questions(2), *questions(2, 10)])  # two of them replace the first two
    editor.forget(first[5].id)
    editor.save_pretrained(tmp_path)
    assert len(files()) == len(before) + 1 and before.items() <= files().items()
    inputs, edits = editor.encode([picture(0), picture(5)], QUESTIONS[:2]), editor.edits()
    expected = logits_of(editor, inputs)
    editor.detach()
    loaded = LiveEdit.from_pretrained(model, processor, tmp_path)
    assert loaded.edits() == edits and len(edits) == 10
    assert_close(logits_of(loaded, inputs), expected, 1e-4)  # sums in another order
    loaded.forget(late[0].id)
    assert first[0].id in [e.id for e in loaded.edits()]
    for i in range(25):
        loaded.edit(*questions(1, 20 + i)[0])
        loaded.save_pretrained(tmp_path)
    assert len(files()) <= 8
    edits = loaded.edits()
    loaded.detach()
    again = LiveEdit.from_pretrained(model, processor, tmp_path)
    again.detach()
    assert again.edits() == edits


def test_a_save_into_the_folder_of_another_history_keeps_nothing_of_it(base, tmp_path):
    """Same editor, same ids, other edits."""
    editor = strong_editor(*base)
    editor.edit_many(questions(4))
    editor.save_pretrained(tmp_path)
    editor.reset()
    editor.experts.next_id = 1
    editor.edit_many([*questions(2, start=10), *questions(2)])
    edits = editor.edits()
    editor.save_pretrained(tmp_path)
    editor.detach()
    loaded = LiveEdit.from_pretrained(*base, tmp_path)
    assert loaded.edits() == edits and loaded.experts.next_id == 5


def test_big_stores_are_written_in_parts(base, tmp_path, monkeypatch):
    editor = strong_editor(*base)
    monkeypatch.setattr(liveedit, "PART_BYTES", 3 * editor.experts.bytes_per_edit())
    parts = lambda: sorted(len(safe_open(file, "pt").get_slice("sentinels")[:]) for file in tmp_path.glob("experts-*"))
    editor.edit_many(questions(8))
    editor.save_pretrained(tmp_path)
    assert parts() == [2, 3, 3]
    for i in (20, 21):
        editor.edit_many(questions(1, start=i))
        editor.save_pretrained(tmp_path)
    assert parts() == [2, 2, 3, 3] and sum(parts()) == len(editor.experts)
    for edit in editor.edits()[:2]:
        editor.forget(edit.id)
    editor.save_pretrained(tmp_path)  # two of three are gone: what is left of them is written again
    edits = editor.edits()
    assert sum(parts()) == len(edits) == 8
    editor.detach()
    assert LiveEdit.from_pretrained(*base, tmp_path).edits() == edits


def test_an_edit_that_is_saved_behind_what_replaces_it_stays_replaced(base, tmp_path):
    """Of the first file most is forgotten: what is left of it is written behind the second."""
    editor = strong_editor(*base)
    first = editor.edit_many(questions(4))
    editor.save_pretrained(tmp_path)
    newer = editor.edit_many(questions(1))
    editor.save_pretrained(tmp_path)
    for edit in first[1:]:
        editor.forget(edit.id)
    editor.save_pretrained(tmp_path)
    editor.detach()
    loaded = LiveEdit.from_pretrained(*base, tmp_path)
    assert [e.id for e in loaded.experts.edits] == [newer[0].id, first[0].id] and loaded.edits() == newer and newer[0].superseded == first[0].id
    loaded.forget(newer[0].id)
    assert [e.id for e in loaded.edits()] == [first[0].id]


def test_experts_alone_travel_to_the_same_editor_and_to_no_other(base, tmp_path):
    model, processor = base
    editor = strong_editor(model, processor)
    editor.edit_many(questions(3))
    editor.save_experts(tmp_path / "experts.safetensors")
    editor.save_experts(tmp_path / "experts-mine.safetensors")
    inputs = editor.encode([picture(0), picture(1)], QUESTIONS[:2])
    expected = logits_of(editor, inputs)
    editor.reset()
    mine = editor.edit(picture(0), QUESTIONS[0], "mine")
    arrived = editor.load_experts(tmp_path / "experts.safetensors")
    assert [e.target for e in editor.edits()] == ["answer 0", "answer 1", "answer 2"] and arrived[0].superseded == mine.id
    assert [e.id for e in arrived] == [mine.id + 1, mine.id + 2, mine.id + 3]
    assert_close(logits_of(editor, inputs), expected, 2e-3)
    editor.norm.weight.data += 1
    with pytest.raises(ValueError, match="another editor"):
        editor.load_experts(tmp_path / "experts.safetensors")
    editor.save_pretrained(tmp_path)
    editor.norm.weight.data += 1
    editor.save_pretrained(tmp_path)  # removes what the older save named, and nothing else
    assert (tmp_path / "experts-mine.safetensors").exists() and len(list(tmp_path.glob("networks-*"))) == 1
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match="holds no experts"):
        editor.load_experts(tmp_path / "junk")


class Killed(BaseException):
    pass


def killed_at(line: int, action) -> bool:
    """Run the action and break it off at the n-th line that it executes in what writes files. Was there such a line?"""
    lines = itertools.count(1)

    def trace(frame, event, argument):
        if frame.f_code.co_filename != liveedit.__file__ or frame.f_code.co_name not in ("save_pretrained", "_write_tensors", "_replacing"):
            return None
        if event == "line" and next(lines) == line:
            raise Killed
        return trace

    usual = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Killed:
        return True
    finally:
        sys.settrace(usual)
    return False


@pytest.mark.parametrize("change", ["append", "rewrite"])
def test_a_save_that_ends_at_any_line_leaves_the_older_or_the_newer_one(base, tmp_path, change):
    model, processor = base
    editor = strong_editor(model, processor, module_dim=8)
    editor.edit_many(questions(2))
    editor.save_pretrained(tmp_path / "old")
    older = editor.edits()
    if change == "append":
        editor.edit(*questions(1, 5)[0])
    else:  # other networks, and no edits: every file is another
        editor.norm.weight.data += 1
        editor.reset()
    newer, seen = editor.edits(), set()
    for line in itertools.count(1):
        folder = tmp_path / str(line)
        shutil.copytree(tmp_path / "old", folder)
        killed = killed_at(line, lambda: editor.save_pretrained(folder))
        editor.detach()
        loaded = LiveEdit.from_pretrained(model, processor, folder)
        loaded.detach()
        editor.attach()
        assert loaded.edits() in (older, newer), f"line {line}"
        assert torch.equal(loaded.norm.weight, editor.norm.weight) or loaded.edits() == older
        seen.add(len(loaded.edits()))
        if not killed:
            break
        editor.save_pretrained(folder)  # what a crash left behind is no obstacle
        editor.detach()
        loaded = LiveEdit.from_pretrained(model, processor, folder)
        loaded.detach()
        editor.attach()
        assert loaded.edits() == newer
    assert line > 20 and seen == {len(older), len(newer)} and loaded.edits() == newer


def test_a_file_that_was_written_by_half_is_no_obstacle(base, tmp_path, monkeypatch):
    editor = strong_editor(*base)
    editor.edit_many(questions(2))
    write = liveedit.save_file

    def by_half(tensors, file, metadata):
        write(tensors, file, metadata)
        if file.name.startswith(kind):
            file.write_bytes(file.read_bytes()[:-100])
            raise Killed

    for kind in ("networks", "experts"):
        monkeypatch.setattr(liveedit, "save_file", by_half)
        with pytest.raises(Killed):
            editor.save_pretrained(tmp_path)
    monkeypatch.undo()
    editor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.new"))
    editor.detach()
    assert LiveEdit.from_pretrained(*base, tmp_path).edits() == editor.edits()


def test_saving_deletes_nothing_that_a_foreign_config_names(base, tmp_path):
    editor = strong_editor(*base)
    editor.save_pretrained(tmp_path / "editor")
    for ending in ("", ".new"):
        (tmp_path / "editor" / f"experts-0123456789abcdef.safetensors{ending}").write_text("of a save that was broken off")
    for name in ("../mine.safetensors", "mine.safetensors", "mine.safetensors.new"):
        (tmp_path / "editor" / name).write_text("mine")
        content = json.loads((tmp_path / "editor" / CONFIG_FILE).read_text()) | {"experts": [name]}
        (tmp_path / "editor" / CONFIG_FILE).write_text(json.dumps(content))
        editor.norm.weight.data += 1
        editor._seen_saves.clear()
        editor.save_pretrained(tmp_path / "editor")
        assert (tmp_path / "editor" / name).read_text() == "mine"
    assert sorted(file.name.split("-")[0] for file in (tmp_path / "editor").iterdir()) == [
        CONFIG_FILE, "mine.safetensors", "mine.safetensors.new", "networks"]


def test_a_folder_that_someone_else_changed_is_not_overwritten(base, tmp_path):
    first = strong_editor(*base)
    first.edit_many(questions(2))
    first.save_pretrained(tmp_path)
    first.detach()
    second = LiveEdit.from_pretrained(*base, tmp_path)
    late = second.edit(*questions(1, 5)[0])
    second.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="was changed since"):
        first.save_pretrained(tmp_path)
    first.save_pretrained(tmp_path / "elsewhere")
    second.save_pretrained(tmp_path)
    second.detach()
    third = LiveEdit.from_pretrained(*base, tmp_path)
    assert third.edits()[-1] == late
    (tmp_path / "x").touch()
    assert {file.stat().st_mode for file in tmp_path.iterdir() if file.is_file()} == {(tmp_path / "x").stat().st_mode}


def test_a_store_that_cannot_grow_stays_as_it_is(editor, monkeypatch):
    editor.edit_many(questions(2))
    grow, edits = torch.Tensor.new_empty, editor.edits()
    sizes = itertools.count()

    def no_memory(tensor, *size, **more):
        if size[0] > 20 and next(sizes) == 3:
            raise torch.OutOfMemoryError("no memory")
        return grow(tensor, *size, **more)

    monkeypatch.setattr(torch.Tensor, "new_empty", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        editor.edit_many(questions(30))
    monkeypatch.undo()
    assert editor.edits() == edits
    editor.edit_many(questions(30))
    assert len(editor.experts) == 32


def test_a_save_heals_damaged_networks(base, tmp_path):
    editor = strong_editor(*base)
    editor.edit_many(questions(1))
    editor.save_pretrained(tmp_path)
    [file] = tmp_path.glob("networks-*")
    file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    editor.save_pretrained(tmp_path)
    editor.detach()
    assert LiveEdit.from_pretrained(*base, tmp_path).edits() == editor.edits()


def test_a_killed_process_leaves_a_whole_save(base, tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); from test_liveedit import *\n"
            f"editor = strong_editor(AutoModelForImageTextToText.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY))\n"
            f"for question in questions(10000):\n"
            f"    editor.edit(*question); editor.save_pretrained({str(tmp_path)!r}); print(len(editor.experts), flush=True)")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    saved = [int(process.stdout.readline()) for _ in range(30)][-1]
    process.send_signal(signal.SIGKILL)
    saved += len(process.stdout.readlines())
    process.wait()
    editor = LiveEdit.from_pretrained(*base, tmp_path)
    assert [e.target for e in editor.edits()] in ([f"answer {i}" for i in range(n)] for n in (saved, saved + 1))


def test_loading_says_what_does_not_fit(base, tmp_path):
    model, processor = base
    editor = strong_editor(model, processor)
    editor.save_pretrained(tmp_path)
    editor.detach()
    content = json.loads((tmp_path / CONFIG_FILE).read_text())
    content["backbone"] |= {"hidden_size": 4096, "layers": 32}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="hidden_size 4096 .here 128., layers 32 .here 6."):
        LiveEdit.from_pretrained(model, processor, tmp_path)


# ------------------------------------------------------------------------------------------------ several threads, edits while generating


class During(transformers.LogitsProcessor):
    """Does something between two steps of a generation."""

    def __init__(self, action, step: int = 2):
        self.action, self.step, self.calls = action, step, 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls == self.step:
            self.action()
        return scores


@pytest.mark.parametrize("cache", [True, False])
def test_an_edit_made_while_generating_waits_for_the_next_prompt(editor, cache):
    inputs = editor.encode(picture(), QUESTIONS[0])
    generate = lambda *during: editor.model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache,
                                                     logits_processor=[During(action) for action in during])
    for start in (20, 30):  # first without any edit before
        before = generate()
        assert_same(generate(lambda: editor.edit_many(questions(3, start))), before)
        assert not torch.equal(generate(), before)


def test_forgetting_while_generating_ends_what_used_the_edit_only(editor):
    edits = editor.edit_many(questions(2))
    pictured, text = editor.encode(picture(), QUESTIONS[0]), editor.encode(None, QUESTIONS[0])
    generate = lambda inputs, action: editor.model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False,
                                                            logits_processor=[During(action)])
    generate(text, lambda: editor.forget(edits[0].id))
    with pytest.raises(RuntimeError, match=f"edit {edits[1].id}, which was forgotten"):
        generate(pictured, lambda: editor.forget(edits[1].id))
    with editor.disabled():
        expected = generate(pictured, lambda: None)
    assert_same(generate(pictured, lambda: None), expected)


def test_threads_ask_edit_and_forget_at_once(base):
    """One edits and forgets, one asks the original, two ask the edited model: each answer is one that was true at some time."""
    editor = strong_editor(*base)
    editor.edit_many(questions(2))
    extra = questions(1, start=30)
    inputs = [editor.encode(picture(i), QUESTIONS[i]) for i in range(2)]
    with editor.disabled():
        original = [logits_of(editor, i) for i in inputs]
    without = [logits_of(editor, i) for i in inputs]
    added = editor.edit_many(extra)
    with_extra = [logits_of(editor, i) for i in inputs]
    editor.forget(added[0].id)
    done, close = threading.Event(), lambda a, b: torch.allclose(a, b, atol=2e-3)

    def change():
        while not done.is_set():
            edit = editor.edit_many(extra)[0]
            done.wait(0.02)
            editor.forget(edit.id)
            done.wait(0.02)

    def ask_original():
        while not done.is_set():
            with editor.disabled():
                assert_close(logits_of(editor, inputs[0]), original[0])

    def ask(i):
        seen = set()
        for n in range(500):
            now = logits_of(editor, inputs[i])
            assert close(now, without[i]) or close(now, with_extra[i]), f"no state of the editor answers so: {difference(now, without[i])}"
            seen.add(close(now, without[i]))
            if len(seen) == 2 and n >= 20:
                break
        return seen

    with ThreadPoolExecutor(4) as pool:
        others, asking = [pool.submit(change), pool.submit(ask_original)], [pool.submit(ask, 0), pool.submit(ask, 1)]
        try:
            results = [future.result(timeout=120) for future in asking]
        finally:
            done.set()
        for future in others:
            future.result(timeout=120)
    assert results == [{True, False}] * 2 and not any(close(a, b) for a, b in zip(without, with_extra))
    assert_close(logits_of(editor, inputs[0]), without[0])


# ------------------------------------------------------------------------------------------------ bad input


ERRORS = (ValueError, TypeError, KeyError, RuntimeError, OSError)


def encoded_picture(format: str, cut: int | None = None, frames: int = 1) -> Image.Image:
    """A picture as PIL opens it from a file: not read yet. cut: bytes that the file lacks at its end."""
    file = io.BytesIO()
    more = dict(save_all=True, append_images=[picture(i) for i in range(1, frames)]) if frames > 1 else {}
    picture().save(file, format, **more)
    return Image.open(io.BytesIO(file.getvalue()[:cut and -cut]))


def spectrum(mode: str, size=(40, 30)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode) if mode != "I;16" else Image.new(mode, size, 700)


def edits_like(image, prompt="What shape is this?", target="heart"):
    """Works: the edit is made as with the picture in RGB, the filter keeps it, and it is forgotten again."""
    def call(h):
        edit, plain = h.editor.edit(image, prompt, target), h.editor.encode(image.convert("RGB"), prompt)
        inputs = h.editor.encode(image, prompt)
        assert torch.equal(inputs["pixel_values"], plain["pixel_values"]) and edit.id in [k["id"] for k in h.editor.explain(inputs)[0]]
        h.editor.forget(edit.id)
    return call


def file_opens(name: str, content: bytes | None):
    def call(h):
        if content is not None:
            (h.folder / name).write_bytes(content)
        data.ImageFile(h.folder / name).open()
    return call


def inputs_with(entry: str, change):
    """Model inputs of two edits, changed; to edit_inputs, explain or the model."""
    def call(h):
        inputs = h.editor.encode([picture(0), picture(1)], QUESTIONS[:2], ["heart", "ring"])
        inputs = change(inputs)
        asked = [(picture(i), QUESTIONS[i], "heart") for i in range(2)]
        {"edit_inputs": lambda: h.editor.edit_inputs(inputs, asked), "explain": lambda: h.editor.explain(inputs),
         "model": lambda: h.editor.model(**inputs)}[entry]()
    return call


def loads(damage):
    """Load a copy of a saved editor that was damaged: `damage` gets its folder."""
    def call(h):
        folder = h.folder / "copy"
        shutil.copytree(h.saved, folder)
        damage(folder)
        h.editor.detach()
        try:
            LiveEdit.from_pretrained(h.editor.model, h.editor.processor, folder).detach()
        finally:
            assert not h.editor.model._forward_hooks
            h.editor.attach()
    return call


def config(change):
    def damage(folder):
        content = json.loads((folder / CONFIG_FILE).read_text())
        change(content)
        (folder / CONFIG_FILE).write_text(json.dumps(content))
    return loads(damage)


def config_text(text: str):
    return loads(lambda folder: (folder / CONFIG_FILE).write_text(text))


def file_of(pattern: str, change):
    """change: the bytes of the file -> those of the damaged one."""
    def damage(folder):
        [file] = folder.glob(pattern)
        file.write_bytes(change(file.read_bytes()))
    return loads(damage)


def rewrite(file: Path, change) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    tensors = {name: values.contiguous() for name, values in tensors.items()}
    save_file(tensors, file, {**(metadata or {}), "digest": liveedit._digest(tensors)})  # it fits the wrong content


def tensors_of(pattern: str, change):
    return loads(lambda folder: rewrite(next(folder.glob(pattern)), change))


def records(change):
    """The records of the edits in a file of experts."""
    def damage(tensors):
        content = json.loads(tensors["edits"].numpy().tobytes())
        tensors["edits"] = torch.tensor(list(json.dumps(change(content) or content).encode()), dtype=torch.uint8)
    return tensors_of("experts-*", damage)


def arrives(change):
    """A file of experts that was changed, to load_experts."""
    def call(h):
        h.editor.save_experts(h.folder / "experts.safetensors")
        change(h.folder / "experts.safetensors")
        h.editor.load_experts(h.folder / "experts.safetensors")
    return call


def set_first(values: torch.Tensor, number: float) -> None:
    values.view(-1)[0] = number


def closed_picture(h) -> Image.Image:
    """A picture whose file was closed before its pixels were read, as `with Image.open(...)` leaves it."""
    picture().save(h.folder / "picture.png")
    with Image.open(h.folder / "picture.png") as image:
        return image


def target_without_tokens(h):
    """To a tokenizer that drops a letter."""
    backend = h.editor.processor.tokenizer.backend_tokenizer
    usual, backend.normalizer = backend.normalizer, tokenizers.normalizers.Replace(tokenizers.Regex("[ z]"), "")
    try:
        h.editor.edit(picture(), "What shape is this?", "zzz")
    finally:
        backend.normalizer = usual


NO_PICTURES = ("cat.png", Path("cat.png"), b"\x89PNG", 3, [1, 2], {}, numpy.zeros((8, 8, 3), numpy.uint8), torch.zeros(3, 8, 8), Image)
NO_TEXTS = (None, 3, "", " \n\t", b"What?", ["What?"], {}, "half \ud800", True)
NO_WHOLE_NUMBERS = (0, -1, 1.5, "4", None, True, math.nan, [4])
GIF, PNG = encoded_picture("GIF", frames=3), io.BytesIO()
picture().save(PNG, "PNG")

# (entry, what the error names, the calls); where nothing is named the call must work. Each call gets h: editor, folder (empty), saved (an editor).
HOSTILE = [
    *((f"config.{name}", name, [lambda h, v=v, name=name: LiveEditConfig(**{name: v}) for v in NO_WHOLE_NUMBERS])
      for name in ("module_dim", "rank", "slots", "heads", "sentinel_tokens")),
    *((f"config.{name}", name, [lambda h, v=v, name=name: LiveEditConfig(**{name: v}) for v in ("l2", "", None, 3, ["cosine"])])
      for name in ("similarity", "same_fact", "expert_dtype", "prompt_style")),
    ("config.gain", "gain", [lambda h, v=v: LiveEditConfig(gain=v) for v in (0, -1.0, math.nan, math.inf, 10**400, "1", None, True)]),
    ("config.threshold", "threshold", [lambda h, v=v: LiveEditConfig(threshold=v) for v in ("0.5", math.nan, math.inf, 2.0, -1.1, True, [])]),
    ("config.layer", "layer", [lambda h, v=v: LiveEdit(h.editor.model, None, LiveEditConfig(layer=v)) for v in (6, -1, 1.5, "3", True, math.nan)]),
    ("LiveEdit", "heads", [lambda h: LiveEdit(h.editor.model, None, LiveEditConfig(module_dim=64, heads=7))]),
    ("LiveEdit", "model|processor|layers|LiveEditConfig|image_token_id", [
        lambda h: LiveEdit(None), lambda h: LiveEdit("tiny-llava"), lambda h: LiveEdit(torch.nn.Linear(2, 2)),
        lambda h: LiveEdit(h.editor.model.get_decoder()), lambda h: LiveEdit(h.editor.model, "tiny-llava"),
        lambda h: LiveEdit(h.editor.model, h.editor.processor.tokenizer), lambda h: LiveEdit(h.editor.model, None, {"rank": 4})]),
    ("LiveEdit", "another editor", [lambda h: LiveEdit(h.editor.model, h.editor.processor, LiveEditConfig(module_dim=64))]),
    ("attach", "attached already", [lambda h: h.editor.attach()]),

    ("encode image", "image", [lambda h, v=v: h.editor.encode(v, "What?") for v in NO_PICTURES]),
    ("edit image", "image", [lambda h, v=v: h.editor.edit(v, "What?", "heart") for v in (None, *NO_PICTURES)]),
    ("edit image", "image", [lambda h, v=v: h.editor.edit(v, "What?", "heart") for v in (
        Image.new("RGB", (0, 0)), Image.new("RGB", (5, 0)), Image.new("L", (0, 5)))]),
    ("edit truncated file", "image", [lambda h, a=a: h.editor.edit(encoded_picture(*a), "What?", "heart") for a in (
        ("PNG", 900), ("JPEG", 300), ("BMP", 900), ("GIF", 900))]),
    ("edit closed file", "closed", [lambda h: h.editor.edit(closed_picture(h), "What?", "heart"), lambda h: h.editor.encode(closed_picture(h), "What?")]),
    ("capture", "at least one", [lambda h: h.editor.capture([])]),
    ("edit picture modes", None, [edits_like(spectrum(mode)) for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16")]),
    ("edit picture sizes", None, [edits_like(spectrum("RGB", size)) for size in ((1, 1), (1, 3), (3, 1), (3, 3), (1, 90), (90, 1), (700, 500))]),
    ("edit picture files", None, [edits_like(encoded_picture("PNG")), edits_like(encoded_picture("JPEG")), edits_like(GIF)]),
    ("picture file", "image|picture.png|No such|directory|truncated", [file_opens("picture.png", content) for content in (
        None, b"", b"no picture", PNG.getvalue()[:40], PNG.getvalue()[:-900], b"\xff\xd8\xff", b"GIF89a", b"<svg/>")]),

    ("encode prompt", "prompt", [lambda h, v=v: h.editor.encode(picture(), v) for v in NO_TEXTS]),
    ("encode prompt in a list", "prompt", [lambda h, v=v: h.editor.encode([picture(), picture()], ["What?", v]) for v in NO_TEXTS]),
    ("edit prompt", "prompt", [lambda h, v=v: h.editor.edit(picture(), v, "heart") for v in NO_TEXTS]),
    ("edit prompt", "image token", [lambda h, v=v: h.editor.edit(picture(), v, "heart") for v in ("<image>", "a<image>b", "<image>\n<image>")]),
    ("edit huge", "at most", [lambda h: h.editor.edit(picture(), "What? " * 40_000, "heart"), lambda h: h.editor.edit(picture(), "What?", "heart " * 40_000),
                              lambda h: h.editor.encode(None, "?" * 300_000)]),
    ("edit odd prompts", None, [edits_like(picture(), prompt) for prompt in ("\0", "?", "</s>", "<s>", "🙂🙂", "مرحبا", "e\u0301\u200b", "What? " * 60)]),
    ("edit odd targets", None, [edits_like(picture(), target=target) for target in ("\0", ".", "</s>", "🙂", "漢字", "-100", "heart\nheart", "a " * 100)]),
    ("edit target", "target", [lambda h, v=v: h.editor.edit(picture(), "What?", v) for v in NO_TEXTS]),
    ("edit target", "image token", [lambda h, v=v: h.editor.edit(picture(), "What?", v) for v in ("<image>", "a <image>")]),
    ("edit target without tokens", "target 'zzz' has no token", [target_without_tokens]),
    ("encode target", "target", [lambda h, v=v: h.editor.encode([picture()], ["What?"], [v]) for v in NO_TEXTS]),
    ("encode lists", "lists of them|images and", [lambda h, a=a: h.editor.encode(*a) for a in (
        ([picture()], ["a", "b"]), ([], []), (picture(), ["a"]), ([picture()], ("a", "b")), (None, None), ([picture()], ["a"], []), ([picture()], ["a"], "x"),
        ([None], ["a"], ["b", "c"]))]),

    ("edit_many", "list of", [lambda h, v=v: h.editor.edit_many(v) for v in (
        None, "edits", 3, {}, [3], ["abcd"], [()], [(picture(), "What?")], [(picture(), "What?", "x", "y")], iter([]), Question(picture(), "What?", "x"), [None])]),
    ("edit_many batch_size", "batch_size", [lambda h, v=v: h.editor.edit_many(questions(1), batch_size=v) for v in NO_WHOLE_NUMBERS]),
    ("edit_many, the last is bad", "image|prompt|target", [lambda h, q=q: h.editor.edit_many([*questions(3), q], batch_size=2) for q in (
        (None, "What?", "x"), (picture(), "", "x"), (picture(), "What?", " "), ("cat.png", "What?", "x"), (picture(), "<image>", "x"))]),
    ("edit_many nothing", None, [lambda h: h.editor.edit_many([])]),
    ("edit NaN weights", "not finite", [lambda h, v=v, name=name: with_weight(h, name, v, lambda: h.editor.edit(picture(), "What?", "x"))
                                        for v in (math.nan, math.inf) for name in ("generator.queries_V", "router.edit_side.text_queries", "norm.weight",
                                                                                   "router.input_side.text_queries", "generator.norm_U.weight")]),
    ("save NaN weights", "not finite", [lambda h: with_weight(h, "norm.bias", math.nan, lambda: h.editor.save_pretrained(h.folder))]),
    ("edit_inputs", "input_ids|labels|rows|integers|vocabulary|attention_mask|finite|[Ii]mage", [inputs_with("edit_inputs", change) for change in (
        lambda i: None, lambda i: {}, lambda i: list(i), lambda i: i | {"labels": None}, lambda i: i | {"labels": i["labels"].float()},
        lambda i: i | {"labels": i["labels"][0]}, lambda i: i | {"labels": torch.full_like(i["labels"], -100)},
        lambda i: i | {"labels": i["labels"][:1]}, lambda i: i | {"labels": F.pad(i["labels"], (0, 3))}, lambda i: i | {"input_ids": i["input_ids"].float()},
        lambda i: i | {"input_ids": i["input_ids"].tolist()}, lambda i: i | {"input_ids": i["input_ids"] + 10**6},
        lambda i: i | {"input_ids": -i["input_ids"]}, lambda i: {k: v[:1] for k, v in i.items()},
        lambda i: i | {"attention_mask": i["attention_mask"][:, 1:]}, lambda i: i | {"attention_mask": torch.zeros_like(i["attention_mask"])},
        lambda i: i | {"pixel_values": i["pixel_values"] * math.nan}, lambda i: i | {"pixel_values": i["pixel_values"][:1]},
        lambda i: i | {"pixel_values": i["pixel_values"][:, :, :9]}, lambda i: {k: v for k, v in i.items() if k != "input_ids"})]),
    ("explain", "input_ids|integers|vocabulary|attention_mask|[Ii]mage|labels", [inputs_with("explain", change) for change in (
        lambda i: None, lambda i: {}, lambda i: "What?", lambda i: list(i), lambda i: i["input_ids"], lambda i: i | {"input_ids": i["input_ids"].float()},
        lambda i: i | {"input_ids": i["input_ids"][0]}, lambda i: i | {"input_ids": i["input_ids"] + 10**6}, lambda i: i | {"labels": i["labels"][:1]},
        lambda i: i | {"attention_mask": i["attention_mask"][:1]}, lambda i: i | {"pixel_values": i["pixel_values"][:1]})]),
    ("explain text only", None, [lambda h: h.editor.explain(h.editor.encode(None, "What?"))]),
    ("model", "input_ids|labels|attention_mask|prompt|[Ii]mage", [inputs_with("model", change) for change in (
        lambda i: {"inputs_embeds": torch.zeros(1, 4, 128)}, lambda i: i | {"labels": F.pad(i["labels"], (0, 1))}, lambda i: i | {"labels": i["labels"][:1]},
        lambda i: i | {"attention_mask": torch.ones(2, 1, 4, 4)}, lambda i: i | {"labels": i["input_ids"]}, lambda i: i | {"pixel_values": i["pixel_values"][:1]})]),

    ("forget", "no edit with id", [lambda h, v=v: h.editor.forget(v) for v in (0, -1, 99, "1", None, 1.0, True, [1], (1,), math.nan, 2**70)]),
    ("forget twice", "no edit with id", [lambda h: [h.editor.forget(h.editor.edit(*questions(1, 9)[0]).id)] and h.editor.forget(h.editor.experts.next_id - 1)]),

    ("save_pretrained over damage", None, [lambda h, text=text: saves_over(h, text) for text in ("", "[" * 100_000, "{}", "\0")]),
    ("save_pretrained", "file", [lambda h: (h.folder / "file").touch() or h.editor.save_pretrained(h.folder / "file"),
                                 lambda h: (h.folder / "file").touch() or h.editor.save_pretrained(h.folder / "file" / "below")]),
    ("save_experts", "folder|directory|File exists", [lambda h: h.editor.save_experts(h.folder),
                                               lambda h: (h.folder / "file").touch() or h.editor.save_experts(h.folder / "file" / "below")]),
    ("from_pretrained folder", "no saved editor|liveedit_config", [
        loads(lambda folder: shutil.rmtree(folder)), loads(lambda folder: (folder / CONFIG_FILE).unlink()),
        loads(lambda folder: [shutil.rmtree(folder), folder.write_text("a file")]), loads(lambda folder: [shutil.rmtree(folder), shutil.copytree(TINY, folder)])]),
    ("from_pretrained config", "damaged|another", [config_text(text) for text in ("", "{", "null", "[]", "3", '"x"', "{}", "[" * 100_000, "\0", '{"config": {}}')]),
    *((f"from_pretrained without {key}", "damaged", [config(lambda c, key=key: c.pop(key))])
      for key in ("config", "backbone", "trained_steps", "editor", "networks", "experts", "forgotten", "next_id")),
    *((f"from_pretrained {key}", "damaged", [config(lambda c, key=key, v=v: c.update({key: v})) for v in (None, 1.5, ["x"])])
      for key in ("config", "backbone", "trained_steps", "networks", "experts", "forgotten", "next_id")),
    ("from_pretrained names", "damaged", [config(lambda c, key=key, v=v: c.update({key: v})) for key, v in (
        ("networks", "../networks-0.safetensors"), ("networks", "/etc/passwd"), ("networks", "networks-0.safetensors"), ("experts", ["../../experts-1.safetensors"]),
        ("experts", ["experts-1.safetensors"]), ("experts", [""]), ("experts", "experts-1.safetensors"))]),
    ("from_pretrained settings", "damaged|layers 0 to 5|heads", [config(lambda c, a=a: c["config"].update(a)) for a in (
        {"rank": 0}, {"rank": 8}, {"module_dim": 32}, {"slots": "4"}, {"layer": 9}, {"unknown": 1}, {"heads": 7}, {"gain": -1}, {"similarity": "l2"},
        {"sentinel_tokens": 5}, {"layer": 2}, {"gain": 1.0}, {"prompt_style": "official"})]),
    ("from_pretrained settings", "damaged", [config(lambda c: c["config"].update(heads=4))]),
    *((f"from_pretrained backbone {key}", key, [config(lambda c, key=key: c["backbone"].update({key: 7}))])
      for key in ("model_type", "hidden_size", "layers", "vocabulary", "image_token_id", "image_size", "embeddings")),
    ("from_pretrained, weights of the model not known", None, [config(lambda c: c["backbone"].update(embeddings=None))]),
    ("from_pretrained another model", "embeddings", [config(lambda c, v=v: c["backbone"].update(embeddings=v)) for v in ([0.0] * 16, [None] * 16, "x", [])]),
    ("from_pretrained files", "damaged", [file_of(pattern, change) for pattern in ("networks-*", "experts-*") for change in (
        lambda b: b"", lambda b: b[:100], lambda b: b[:-100], lambda b: b"\xff" * 1000, lambda b: b + b"more", lambda b: b[:8] + b"!" + b[9:], lambda b: b[:len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1:])]),
    ("from_pretrained networks", "damaged", [tensors_of("networks-*", change) for change in (
        lambda t: set_first(t["norm.weight"], math.nan), lambda t: set_first(t["generator.queries_U"], math.inf), lambda t: t.pop("norm.bias"),
        lambda t: t.update(more=torch.zeros(2)), lambda t: t.update({"norm.weight": torch.zeros(3)}))]),
    ("from_pretrained experts", "damaged", [tensors_of("experts-*", change) for change in (
        lambda t: set_first(t["U"], math.nan), lambda t: set_first(t["sentinels"], math.inf), lambda t: t.pop("V"), lambda t: t.pop("edits"),
        lambda t: t.update(U=t["U"][:, :1]), lambda t: t.update(U=t["U"][:1]), lambda t: t.update(text_keys=t["text_keys"][:, :, :8]),
        lambda t: t.update(sentinels=t["sentinels"][:, None]), lambda t: t.update(edits=torch.zeros(5, dtype=torch.uint8)))]),
    ("from_pretrained records", "damaged", [records(change) for change in (
        lambda r: {"id": 1}, lambda r: [1, 2], lambda r: [None, None], lambda r: r[:1], lambda r: r + r, lambda r: r[0].update(id=2), lambda r: r[0].update(id="1"),
        lambda r: r[0].update(prompt=None), lambda r: r[0].update(replaces=["1"]), lambda r: r[0].update(time="now"), lambda r: r[0].pop("target"),
        lambda r: r[0].update(more=1), lambda r: r[0].update(replaces=None), lambda r: r[0].update(replaces=[r[0]["id"]]),
        lambda r: r[0].update(replaces=[99]))]),
    ("from_pretrained changes", "rank|threshold|same_fact", [
        lambda h, a=a: LiveEdit.from_pretrained(h.editor.model, None, h.saved, **a) for a in ({"rank": 8}, {"threshold": "low"}, {"same_fact": "some"})]),
    ("load_experts", "experts", [arrives(change) for change in (
        lambda file: file.unlink(), lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"junk" * 50),
        lambda file: [file.unlink(), file.mkdir()], lambda file: save_file({"x": torch.zeros(1)}, file), lambda file: save_file({"x": torch.zeros(1)}, file, {"editor": "x"}),
        lambda file: rewrite(file, lambda t: set_first(t["V"], math.nan)), lambda file: rewrite(file, lambda t: t.update(U=t["U"][:, :1])),
        lambda file: rewrite(file, lambda t: t.update(edits=torch.tensor(list(b"[" * 100_000), dtype=torch.uint8))), lambda file: rewrite(file, lambda t: t.pop("visual_keys")), lambda file: rewrite(file, lambda t: t.update(edits=torch.ones(9, dtype=torch.uint8))))]),
    ("load_experts of another editor", "another editor", [lambda h: with_weight(h, "norm.weight", 3.0, lambda: arrives_from(h), after_saving=True)]),
]


def with_weight(h, name: str, value: float, call, after_saving: bool = False) -> None:
    """Call while one weight of the editor is another."""
    if after_saving:
        h.editor.save_experts(h.folder / "experts.safetensors")
    weight = h.editor.get_parameter(name).data
    usual = weight.clone()
    set_first(weight, value)
    try:
        call()
    finally:
        weight.copy_(usual)


def saves_over(h, text: str) -> None:
    """Works: a save into a folder whose config is damaged."""
    (h.folder / CONFIG_FILE).write_text(text)
    h.editor.save_pretrained(h.folder)
    h.editor.detach()
    try:
        loaded = LiveEdit.from_pretrained(h.editor.model, h.editor.processor, h.folder)
        loaded.detach()
    finally:
        h.editor.attach()
    assert loaded.edits() == h.editor.edits()


def arrives_from(h) -> None:
    h.editor.load_experts(h.folder / "experts.safetensors")


def everything_of(editor: LiveEdit) -> tuple[tuple, list[torch.Tensor]]:
    """All that a refused call must leave as it was."""
    plain = ([asdict(e) for e in editor.experts.edits], editor.trained_steps, editor.edits(), editor._thread.disabled,
             editor._thread.call, len(editor._handles), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in editor.model.modules()],
             [p._version for p in editor.model.parameters()], [p.requires_grad for p in editor.model.parameters()])
    return plain, [getattr(editor.experts, name).clone() for name in ExpertRepository.TENSORS] + list(editor._networks().values())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """An editor with three edits on a model of its own, also saved."""
    model, processor = AutoModelForImageTextToText.from_pretrained(TINY).eval(), AutoProcessor.from_pretrained(TINY)
    editor = strong_editor(model, processor)
    editor.edit_many([*questions(2), *questions(1)])
    saved = tmp_path_factory.mktemp("saved")
    editor.save_pretrained(saved)
    return SimpleNamespace(editor=editor, saved=saved)


@pytest.mark.parametrize("culprit, call", [pytest.param(culprit, call, id=f"{entry} {n}") for entry, culprit, calls in HOSTILE
                                           for n, call in enumerate(calls)])
def test_hostile_input_is_refused_by_name_or_handled_and_changes_nothing(hostile, tmp_path, culprit, call):
    hostile.folder, before = tmp_path, everything_of(hostile.editor)
    if culprit is None:
        call(hostile)
    else:
        with pytest.raises(ERRORS, match=culprit) as raised:
            call(hostile)
        assert raised.value.args and "\n" not in str(raised.value).strip()
    after = everything_of(hostile.editor)
    assert after[0] == before[0]
    assert all(map(torch.equal, before[1], after[1]))


def test_an_untrained_editor_refuses_to_edit(base):
    editor = LiveEdit(*base, LiveEditConfig(module_dim=64))
    editor.detach()
    with pytest.raises(RuntimeError, match="never trained"):
        editor.edit(picture(), "What?", "x")


def test_models_without_decoder_layers_or_image_token_are_refused(base):
    with pytest.raises(TypeError, match="layers"):
        find_decoder_layers(torch.nn.Linear(2, 2))
    token, base[0].config.image_token_id = base[0].config.image_token_id, None
    try:
        with pytest.raises(TypeError, match="image_token_id"):
            LiveEdit(*base, LiveEditConfig(module_dim=64))
    finally:
        base[0].config.image_token_id = token


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_upper_layers_continue_where_the_lower_ones_stopped(base, layer):
    editor = strong_editor(*base, layer=layer)
    asked = questions(5) + [Question(None, "What is 3 plus 4?", "7")]
    inputs = editor.encode(*map(list, zip(*asked)))
    logits = logits_of(editor, inputs)[:, :-1][(inputs["labels"] != -100)[:, 1:]]
    states = editor.capture(asked)
    assert_close(editor._upper(states.hidden, states), logits, 1e-4)
    chunked = editor.capture(asked, batch_size=2)
    assert_close(editor._upper(chunked.hidden, chunked), logits)
    rows = torch.tensor([4, 0])
    part = chunked.select(rows)
    expected = torch.cat([logits[(states.masks.answer.nonzero()[:, 0] == r)] for r in rows])
    assert_close(editor._upper(part.hidden, part), expected)
    editor.detach()


def training_batch(editor, count=4, cached=True):
    samples = data.drawn_training(count, seed=5)
    limit, run.CACHE_BYTES = run.CACHE_BYTES, 2**30 if cached else 0
    training_set = run.TrainingSet(editor, samples, 128)
    run.CACHE_BYTES = limit
    assert training_set.cached == cached
    return training_set.batch([2, 0, 3])


def test_training_reaches_all_of_the_editor_and_nothing_of_the_model(base):
    for similarity in ("cosine", "dot"):
        editor = strong_editor(*base, similarity=similarity, threshold=None)
        losses = editor.training_losses(*training_batch(editor))
        losses["total"].backward()
        assert editor.trained_steps == 2
        assert losses["total"].item() == pytest.approx(sum(v.item() for k, v in losses.items() if k != "total"), rel=1e-5)
        for name, parameter in editor.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, f"{name} gets no gradient"
        assert all(p.grad is None and not p.requires_grad for p in editor.model.parameters())
        assert not {id(p) for p in editor.parameters()} & {id(p) for p in editor.model.parameters()}
        editor.detach()


def test_cached_hidden_states_train_like_fresh_ones(base):
    editor = strong_editor(*base)
    losses = []
    for cached in (True, False):
        batch = training_batch(editor, cached=cached)
        torch.manual_seed(3)
        losses.append(editor.training_losses(*batch))
    editor.detach()
    for name, value in losses[0].items():
        assert value.item() == pytest.approx(losses[1][name].item(), rel=1e-3, abs=1e-4), name


def test_locality_loss_is_zero_for_silent_experts_and_a_kl_divergence_else(base):
    editor = strong_editor(*base)
    states, role, owner, _ = training_batch(editor)
    follows = (role == EDIT) | (role == GENERALITY)
    silent = editor._editing_losses(states.hidden, states, follows, role, 3)
    assert silent["locality"].item() == pytest.approx(0, abs=1e-5) and silent["reliability"].item() > 0
    shifted = states.hidden + torch.randn_like(states.hidden)
    noisy = editor._editing_losses(shifted, states, follows, role, 3)
    # By hand: KL( base || edited ) at each answer token, mean over the row's tokens, sum over rows, mean over the 3 edits.
    rows = states.masks.answer.nonzero()[:, 0]
    old, new = (editor._upper(h, states).log_softmax(-1) for h in (states.hidden, shifted))
    kl = F.kl_div(new, old, log_target=True, reduction="none").sum(-1)
    expected = sum(kl[rows == r].mean() for r in range(len(role)) if not follows[r]) / 3
    assert noisy["locality"].item() == pytest.approx(expected.item(), rel=1e-4)
    editor.detach()


def test_a_batch_without_locality_rows_has_no_locality_loss(base):
    editor = strong_editor(*base)
    states = editor.capture([*questions(2), *questions(2)])
    losses = editor.training_losses(states, torch.tensor([EDIT, EDIT, GENERALITY, GENERALITY]), torch.tensor([0, 1, 0, 1]))
    losses["total"].backward()
    assert losses["locality"].item() == 0 and losses["reliability"].item() > 0


def test_training_goes_on_without_edits_only(base):
    editor = strong_editor(*base)
    editor.edit_many(questions(1))
    with pytest.raises(RuntimeError, match="reset"):
        editor.training_losses(*training_batch(editor))
    editor.reset()
    editor.training_losses(*training_batch(editor))


def test_a_batch_of_one_is_refused(base):
    editor = strong_editor(*base)
    states = editor.capture(questions(1))
    with pytest.raises(ValueError, match="at least two"):
        editor.training_losses(states, torch.tensor([EDIT]), torch.tensor([0]))
    editor.detach()


@pytest.fixture(scope="session")
def trained(base):
    """An editor after some seconds of training on few samples, tested on these: it must have learned what an edit is."""
    torch.manual_seed(0)
    model, processor = base
    editor = LiveEdit(model, processor, LiveEditConfig(module_dim=128, sentinel_tokens=36, gain=1.0))
    samples, options = data.drawn_samples(48, data.split_scenes()[0], "test", held_out=False), run.with_defaults(run.Options(train_steps=150, batch_size=12), 128)
    run.train(run.start_training(editor, options), samples, options)
    editor.detach()
    return editor, samples


def test_ten_edits_hold_spread_and_leave_the_rest(trained):
    editor, samples = trained
    samples = samples[:10]
    editor.attach()
    for sample in samples:
        editor.edit(*run.question(sample.edit))
    results = {}
    for name in ("reliability", "text_generality", "modal_generality", "modal_locality"):
        queries = [s.queries[name] for s in samples]
        after = run.answer(editor, queries, 20)
        with editor.disabled():
            before = run.answer(editor, queries, 20)
        results[name] = sum(run.score(name, q, b, a)[0] for q, b, a in zip(queries, before, after)) / len(queries)
    editor.reset()
    editor.detach()
    assert results["reliability"] > 0.9 and min(results.values()) > 0.7, results


# ------------------------------------------------------------------------------------------------ data


def test_the_drawn_benchmark_keeps_its_promises():
    training, stream = data.drawn_training(1500, 0), data.drawn_stream(500, 0)
    scene_of = lambda q: q.image.scene if q.image else None
    scenes = [{scene_of(q) for s in part for q in s.queries.values()} - {None} for part in (training, stream)]
    assert not scenes[0] & scenes[1], "a scene of the evaluation is in training"
    held_out = {p for phrases in data.PHRASINGS.values() for p in phrases[-data.HELD_OUT:]}
    assert not held_out & {q.prompt for s in training for q in s.queries.values()}
    assert all(s.queries["text_generality"].prompt in held_out for s in stream)
    edited = [s.edit.fact for s in stream]
    assert len(set(edited)) == 500 and not set(edited) & set().union(*(s.untouched_facts() for s in stream))
    assert {s.kind for s in stream} == set(data.KINDS)
    for s in stream:
        q = s.queries
        scene = scene_of(s.edit)
        assert s.edit.target != scene.answer(s.edit.fact[1]) and q["text_generality"].prompt != s.edit.prompt
        assert scene_of(q["modal_generality"]) == scene and q["modal_generality"].image != s.edit.image
        assert q["same_image"].image == s.edit.image and q["same_image"].fact[1] != s.edit.fact[1]
        assert scene_of(q["similar_image"]).differences(scene) == 1 and q["similar_image"].prompt == s.edit.prompt
        assert scene_of(q["modal_locality"]).differences(scene) == 3
        assert q["no_image"].image is None and q["no_image"].prompt == s.edit.prompt
    with pytest.raises(ValueError, match="no room"):
        data.drawn_stream(5000, 0)


def test_updates_edit_earlier_facts_again_with_new_answers():
    stream = data.drawn_stream(90, 0)
    updates = data.drawn_updates(stream, 30, 0)
    assert len({u.sample for u in updates}) == 30 and {u.form for u in updates} == set(data.UPDATE_FORMS)
    for u in updates:
        old, truth = stream[u.sample].edit, stream[u.sample].edit.fact
        assert u.edit.fact == truth and u.edit.target not in (old.target, truth[0].answer(truth[1]))
        assert (u.form == "exact") == (u.edit.image == old.image and u.edit.prompt == old.prompt)


def test_the_update_stream_counts_what_it_says(monkeypatch):
    """Ten edits, two of them updates: one answered by the newest and with the right replacement, one by the old answer and replacing another fact,
    as does one of the first."""
    stream = data.drawn_stream(10, 0)
    updates = data.drawn_updates(stream[:8], 2, 0)
    edit = lambda i, replaces: Edit(i, "", "", "", 0.0, replaces)
    batches = iter([[*(edit(i, []) for i in range(7)), edit(7, [0])], [edit(8, [updates[0].sample]), edit(9, [(updates[1].sample + 1) % 8])]])
    editor = SimpleNamespace(reset=lambda: None, edit_many=lambda questions, at_once: next(batches),
                             processor=SimpleNamespace(tokenizer=lambda text: SimpleNamespace(input_ids=text.split())))
    said = [updates[0].edit.target] * 2 + [stream[updates[1].sample].edit.target] * 2
    monkeypatch.setattr(run, "answer", lambda editor, queries, longest, at_once: [run.Answer([], [], text) for text in said])
    found = run.evaluate_updates(editor, stream, run.Options(eval_batch_size=4))
    assert {key: found[key] for key in ("n", "edits", "newest", "old", "replaced", "false_replacements")} == {
        "n": 2, "edits": 10, "newest": 50, "old": 50, "replaced": 50, "false_replacements": 20}
    assert found["forms"]["exact"] == {"newest": 100, "old": 0, "replaced": 100} and found["forms"]["rephrased"]["old"] == 100


def test_same_seed_same_benchmark_in_any_process():
    code = ("import sys, hashlib; sys.path.insert(0, %r); import data\n"
            "s = data.drawn_stream(30, 3)\n"
            "print(hashlib.sha256(repr([x.queries for x in s]).encode() + s[0].edit.image.open().tobytes()).hexdigest())" % str(HERE))
    digests = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(digests) == 1 and data.drawn_stream(30, 3) != data.drawn_stream(30, 4)


def test_batches_contradict_nowhere_and_use_all_samples():
    samples, seen = data.drawn_training(300, 0), set()
    batches = data.consistent_batches(samples, 32, random.Random(0))
    for batch in (next(batches) for _ in range(30)):
        facts = [samples[i].edit.fact for i in batch]
        assert len(set(batch)) == 32 == len(set(facts)) and not set(facts) & set().union(*(samples[i].untouched_facts() for i in batch))
        seen |= set(batch)
    assert len(seen) > 290
    few = samples[:100] + samples[:1] * 9  # one fact ten times
    batches = data.consistent_batches(few, 32, random.Random(0))
    assert all(len(next(batches)) == 32 for _ in range(300))
    with pytest.raises(ValueError, match="smaller batch"):
        next(data.consistent_batches([samples[0]] * 5, 2, random.Random(0)))


RECORD = {"src": "What is it?", "pred": "cat", "alt": "dog", "rephrase": "Name it.", "image": "a.png", "image_rephrase": "b.png",
          "loc": "nq question: how many legs has a spider", "loc_ans": "eight", "m_loc": "c.png", "m_loc_q": "What color is it?", "m_loc_a": "red"}


def benchmark_folder(folder: Path, records) -> Path:
    (folder / "images").mkdir(parents=True)
    for i, name in enumerate("abc"):
        picture(i).save(folder / "images" / f"{name}.png")
    for part in ("train", "eval"):
        (folder / f"{part}.json").write_text(records if isinstance(records, str) else json.dumps(records))
    return folder


def test_records_become_samples(tmp_path):
    folder = benchmark_folder(tmp_path / "set", [RECORD])
    (sample,) = data.read_records(folder / "eval.json", folder / "images")
    assert sample.edit.target == "dog" and sample.queries["text_locality"].prompt == "how many legs has a spider?"
    assert sample.queries["modal_generality"].fact == sample.edit.fact != sample.queries["similar_image"].fact
    assert sample.edit.image.open().mode == "RGB"


@pytest.mark.parametrize("records, message", [
    ("[{", "no JSON"), ("{}", "list of records"), ("[]", "list of records"), ([RECORD, 5], "record 1 is no object"),
    ([RECORD | {"alt": ""}], "record 0 lacks a text in alt"), ([{k: v for k, v in RECORD.items() if k != "loc"}], "lacks a text in loc"),
    ([RECORD | {"image": "no.png"}], r"missing pictures.*\(1\).*no.png"), ([RECORD | {"m_loc": "bad.png"}], r"decoded \(1\).*bad.png")])
def test_bad_benchmark_files_are_named_before_any_work(tmp_path, capsys, records, message):
    folder = benchmark_folder(tmp_path / "set", records)
    (folder / "images" / "bad.png").write_bytes((folder / "images" / "a.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=message):
        data.check_pictures(data.read_records(folder / "eval.json", folder / "images"))
    assert re.search(message, refusal(capsys, "--data", str(folder), "--train-steps", "1", "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def published(root: Path, benchmark: str, records: list, training: list | None = None) -> Path:
    """A benchmark's folder as it is published, small."""
    known = data.BENCHMARKS[benchmark]
    images = root / known.images[-1]
    images.mkdir(parents=True)
    for i, name in enumerate("abc"):
        picture(i).save(images / f"{name}.png")
    for file, content in ((known.train, training or records), (known.eval, records)):
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("benchmark", data.BENCHMARKS)
def test_published_benchmarks_are_read_as_they_are(tmp_path, benchmark):
    port = {"port_new": [{"port_edit_q": "x", "port_edit_a": "y", "port_q": "Does it bark?", "port_a": "yes"}]}
    root = published(tmp_path, benchmark, [RECORD | (port if "onehop" in benchmark else {})])
    files = data.benchmark_files(benchmark, root)
    (plain,), (official,) = (data.read_records(files.eval, files.images, form) for form in (None, benchmark))
    assert (data.PORTABILITY in plain.queries) == ("onehop" in benchmark)
    prompts = {name: query.prompt for name, query in official.queries.items()}
    assert prompts["modal_locality"] == "What color is it? The answer is:" and prompts["text_locality"] == "nq question: how many legs has a spider?"
    assert prompts["reliability"] == ("What is it? The answer is:" if benchmark == "evqa" else "What is it?")
    assert not any("The answer is:" in query.prompt for query in plain.queries.values())
    assert data.check_pictures([plain]) == 3


def test_benchmark_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(ValueError, match="needs --data-root"):
        data.benchmark_files("evqa")
    with pytest.raises(FileNotFoundError, match="vqa_eval.json"):
        data.benchmark_files("evqa", tmp_path)
    root = published(tmp_path, "vlkeb", [RECORD | {"port_new": [{"port_q": "?"}]}])
    with pytest.raises(ValueError, match="record 0 lacks a text in port_a"):
        data.read_records(root / "eval.json", root / "VLKEB_images")
    with pytest.raises(FileNotFoundError, match="--image-root"):
        data.benchmark_files("vlkeb", root, tmp_path / "nowhere")
    assert data.benchmark_files(str(root / "eval.json"), image_root=root / "VLKEB_images") == data.benchmark_files("vlkeb", root)


def test_locality_questions_of_the_evaluation_leave_the_training(tmp_path):
    other = RECORD | {"loc": "how much is 1 and 1", "m_loc_q": "Is it big?"}
    folder = benchmark_folder(tmp_path / "set", [RECORD, other])
    training, (sample, _) = (data.read_records(folder / "eval.json", folder / "images") for _ in range(2))
    kept, left_out = data.without_leaks(training, [sample])
    assert "modal_locality" not in kept[0].queries and "text_locality" not in kept[0].queries and "reliability" in kept[0].queries
    assert {"modal_locality", "text_locality"} <= set(kept[1].queries) and left_out == sum(len(t.queries) - len(k.queries) for t, k in zip(training, kept))


# ------------------------------------------------------------------------------------------------ metrics and the main job


def test_metrics_are_their_definitions():
    assert run.normalise("  A Red, star. ") == "red star" and run.token_accuracy([1, 2, 3], [1, 5, 3]) == pytest.approx(2 / 3)
    query = data.Query(None, "?", "the heart", ())
    before, after = run.Answer([4, 5], [7, 8], "Star"), run.Answer([4, 8], [7, 8], "Heart!")
    assert run.score("reliability", query, before, after) == (0.5, 1.0)
    assert run.score("same_image", query, before, after) == (0.5, 0.0)
    assert run.score("same_image", query, before, run.Answer([4, 5], [7, 8], "a star")) == (1.0, 1.0)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(HERE / "run.py"), *arguments], capture_output=True, text=True, cwd=HERE)


def refusal(capsys, *arguments: str) -> str:
    """What the program says when it ends before its work; in this process, since a new one takes seconds to start."""
    with pytest.raises(SystemExit) as stopped:
        run.main(list(arguments))
    return stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--edits", "0"], "--edits must be at least 1"), (["--model", "/no/such/folder"], "/no/such/folder"), (["--edit", "5"], "unrecognized"),
    (["--dtype", "float17"], "--dtype"), (["--data", "/no/such/folder"], "no annotation file"), (["--editor", "/no/such/folder"], "no saved editor"),
    (["--edits", "5000"], "no room"), (["--learning-rate", "-1"], "--learning-rate"),
    (["--exclude-leaks"], "--data is missing"), (["--image-root", "x"], "--data is missing"),
    (["--train-samples", "20", "--edits", "5", "--learning-rate", "1e30", "--batch-size", "4"], "lower --learning-rate"),
    (["--editor", "output/editor"], "would overwrite"), (["--editor", "x", "--similarity", "dot"], "belongs to the training"),
    (["--same-fact", "some"], "same_fact"), (["--device", "abacus", "--train-samples", "20"], "abacus"),
    (["--out", "README.md", "--train-samples", "20"], "README.md"), (["--layer", "9", "--train-samples", "20"], "layers 0 to 5")])
def test_wrong_options_end_in_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(HERE)
    assert message in refusal(capsys, *arguments).splitlines()[-1]


def test_a_refusal_of_the_command_line_is_no_traceback():
    result = command("--model", "/no/such/folder")
    assert result.returncode == 1 and "/no/such/folder" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr, result.stderr


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    result = command("--edits", "12", "--train-steps", "20", "--train-samples", "60", "--batch-size", "6", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert "12 edits" in result.stdout and "Rel" in result.stdout
    return out


def test_the_main_job_writes_what_it_promises(small_run):
    metrics = json.loads((small_run / "metrics.json").read_text())
    assert [row["edits"] for row in metrics["rows"]] == [0, 1, 10, 12]
    assert [row["n"] for row in metrics["rows"]] == [12, 12, 10, 12]
    names = {*data.QUERY_NAMES, "average"}
    for row in metrics["rows"]:
        assert set(row["teacher_forced"]) == set(row["free_running"]) == names and set(row["by_kind"]) <= set(data.KINDS)
        for way in ("teacher_forced", "free_running"):
            assert row[way]["text_locality"] == row[way]["no_image"] == 100
            assert row[way]["average"] == pytest.approx(sum(row[way][name] for name in run.MAIN_METRICS) / 5)
    assert metrics["updates"]["edits"] == 12 and set(metrics["updates"]["forms"]) <= set(data.UPDATE_FORMS) and metrics["updates"]["n"] == 2
    assert metrics["bytes_per_edit"] == 2 * (2 * 4 * 128) + (4 + 2 + 2 + 2) * 4 * 128 + 4 and metrics["seconds_per_edit"] > 0 and metrics["training"]["steps"] == 20
    lines = [json.loads(line) for line in (small_run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 8 * (12 + 12 + 10 + 12) and {"prompt", "expected", "before", "after"} <= set(lines[0])
    assert Image.open(small_run / "edits.png").width > 500


def test_a_saved_editor_gives_the_same_stream_again(small_run, tmp_path):
    result = command("--edits", "12", "--editor", str(small_run / "editor"), "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    rows = [json.loads((folder / "metrics.json").read_text())["rows"] for folder in (small_run, tmp_path)]
    assert rows[0] == rows[1]


def test_the_main_job_runs_on_benchmark_files(tmp_path, capsys):
    records = [RECORD | {"src": f"What is it, {i}?", "loc": f"how much is {i} and 1"} for i in range(6)]
    folder = benchmark_folder(tmp_path / "set", records)
    result = command("--data", str(folder), "--train-steps", "2", "--batch-size", "2", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    row = json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"][-1]
    assert row["edits"] == 6 and row["teacher_forced"]["text_locality"] == 100
    (folder / "eval.json").rename(folder / "mine.json")
    assert 'no "eval" in its name' in refusal(capsys, "--data", str(folder / "mine.json"))


def test_results_are_kept_where_the_edits_cannot_be_saved(small_run, tmp_path, monkeypatch, capsys):
    def full(editor, folder):
        raise OSError("no space left")

    monkeypatch.setattr(LiveEdit, "save_pretrained", full)
    run.main(["--edits", "5", "--editor", str(small_run / "editor"), "--out", str(tmp_path)])
    assert "the edits were not saved: no space left" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.json").read_text())["rows"][-1]["edits"] == 5


def test_every_other_option_reaches_the_editor(tmp_path):
    result = command("--edits", "5", "--train-steps", "3", "--train-samples", "20", "--batch-size", "4", "--similarity", "dot", "--threshold", "0.5",
                     "--layer", "5", "--eval-batch-size", "7", "--same-fact", "exact", "--expert-dtype", "float32", "--dtype", "bfloat16", "--device", "cpu", "--seed", "3", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    given = {"similarity": "dot", "threshold": 0.5, "layer": 5, "same_fact": "exact", "expert_dtype": "float32"}
    assert {k: metrics["config"][k] for k in given} == given
    assert metrics["seed"] == 3 and metrics["options"]["eval_batch_size"] == 7 and metrics["options"]["dtype"] == "bfloat16"
    assert metrics["training"]["samples"] == 20 and metrics["training"]["batch_size"] == 4


def test_the_main_job_runs_on_a_published_benchmark_in_its_own_form(tmp_path):
    port = {"port_new": [{"port_q": "Does it bark?", "port_a": "yes"}]}
    records = [RECORD | port | {"src": f"What is it, {i}?", "loc": f"how much is {i} and 1"} for i in range(6)]
    root = published(tmp_path / "VLKEB", "vlkeb-onehop", records, [r | {"src": f"Who is it, {i}?"} for i, r in enumerate(records)])
    result = command("--data", "vlkeb-onehop", "--data-root", str(root), "--prompt-style", "official", "--exclude-leaks", "--train-steps", "2",
                     "--batch-size", "2", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "18 locality questions" in result.stdout and "Port" in result.stdout
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["rows"][-1]["free_running"]["portability"] is not None and metrics["config"]["prompt_style"] == "official"


def test_ask_answers_before_and_after(small_run, tmp_path, capsys):
    picture(3).save(tmp_path / "a.png")
    result = command("ask", "--editor", str(small_run / "editor"), "--image", str(tmp_path / "a.png"), "What shape is this?")
    assert result.returncode == 0 and re.match(r"before: \w+\nafter:  .*\n", result.stdout), result.stdout + result.stderr
    for arguments, message in ((["--editor", "/no/such"], "no saved editor"), (["--editor", str(small_run / "editor"), "--image", "no.png"], "no.png")):
        assert message in refusal(capsys, "ask", *arguments, "What?")


def test_a_dry_run_says_what_it_found_and_loads_nothing(tmp_path, capsys):
    folder = tmp_path / "no weights"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    result = command("--model", str(folder), "--dry-run", "--train-samples", "100")
    assert result.returncode == 0, result.stderr
    assert "1.9 M parameters, edit layer 3 of 6" in result.stdout and "learning rate 0.003" in result.stdout
    assert "safetensors" in refusal(capsys, "--model", str(folder), "--train-samples", "100", "--out", str(tmp_path / "out"))


def test_an_interrupted_training_resumes_exactly(tmp_path, capsys):
    arguments = ["--edits", "5", "--train-steps", "60", "--train-samples", "60", "--batch-size", "4"]
    assert "no training to resume" in refusal(capsys, *arguments, "--resume", "--out", str(tmp_path / "a"))
    process = subprocess.Popen([sys.executable, str(HERE / "run.py"), *arguments, "--out", str(tmp_path / "a")], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, cwd=HERE)
    for line in iter(lambda: process.stderr.read(80), ""):
        if re.search(r"training the editor: +[1-9]", line):
            process.send_signal(signal.SIGINT)
            break
    message = process.communicate()[1]
    assert process.returncode == 1 and "--resume continues" in message, message
    assert "batch_size 4 (here 5)" in refusal(capsys, *arguments[:-1], "5", "--resume", "--out", str(tmp_path / "a"))
    assert "is an interrupted training" in refusal(capsys, *arguments, "--out", str(tmp_path / "a"))
    checkpoint = (tmp_path / "a" / run.CHECKPOINT_FILE).read_bytes()
    for damaged in (b"", b"junk", checkpoint[:2000]):
        (tmp_path / "a" / run.CHECKPOINT_FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            run.Training(None, [], {}).load(tmp_path / "a" / run.CHECKPOINT_FILE)
    (tmp_path / "a" / run.CHECKPOINT_FILE).write_bytes(checkpoint)
    for more, out in ((["--resume"], "a"), ([], "b")):
        result = command(*arguments, *more, "--out", str(tmp_path / out))
        assert result.returncode == 0, result.stderr
    interrupted, whole = (json.loads((tmp_path / out / "metrics.json").read_text()) for out in "ab")
    assert interrupted["training"]["losses"] == whole["training"]["losses"] and len(whole["training"]["losses"]) == 10
    assert interrupted["rows"] == whole["rows"]


def test_readme_python_runs(small_run, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    block = block.replace('"output/editor"', repr(str(small_run / "editor")))
    result = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=HERE)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------------------ other families

VOCABULARY, BOS, EOS, PAD, IMAGE = 700, 0, 1, 2, 3  # the ids of tiny-llava's tokenizer
LLAMA = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8)
OPT = dict(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=512,
           word_embed_proj_dim=32, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
FAMILIES = {  # small random models of the real configuration classes
    "llava": lambda: transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, projection_dim=32), text_config=transformers.LlamaConfig(**LLAMA),
        image_token_id=IMAGE, vision_feature_layer=-1, image_seq_length=4),
    "llava_next": lambda: transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, projection_dim=32), text_config=transformers.LlamaConfig(**LLAMA),
        image_token_id=IMAGE, vision_feature_layer=-1, image_seq_length=4, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]),
    "blip-2": lambda: transformers.Blip2Config(
        vision_config=TOWER, qformer_config={k: TOWER[k] for k in list(TOWER)[:4]} | {"encoder_hidden_size": 32},
        text_config=transformers.OPTConfig(**OPT), num_query_tokens=4, image_token_index=IMAGE),
    "paligemma": lambda: transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, projection_dim=32), text_config=transformers.GemmaConfig(**LLAMA, head_dim=8),
        image_token_id=IMAGE, projection_dim=32, hidden_size=32),
    "idefics3": lambda: transformers.Idefics3Config(
        vision_config=TOWER, text_config=transformers.LlamaConfig(**LLAMA), image_token_id=IMAGE, scale_factor=2),
    "qwen2_5_vl": lambda: transformers.Qwen2_5_VLConfig(
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=8, spatial_merge_size=2, temporal_patch_size=2,
                           out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]),
        text_config=LLAMA | {"rope_scaling": dict(type="mrope", mrope_section=[1, 1, 2])}, image_token_id=IMAGE, video_token_id=690,
        vision_start_token_id=691, vision_end_token_id=692),
}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, tmp_path_factory):
    """A random model of the family, written to disk and loaded back as any checkpoint."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model = AutoModelForImageTextToText.from_config(FAMILIES[request.param]())
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3  # with the usual initialisation all inputs look alike
    model.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None
    return request.param, model


def prepared(family: str, rows: int, answer: int = 3) -> dict:
    """Random inputs as the family's own processor would lay them out: where the image tokens stand, what comes along."""
    image, head, tail = [IMAGE] * 4, [BOS], []
    extra = {"pixel_values": torch.randn(rows, 3, 16, 16)}
    if family == "llava_next":  # four tiles and a small whole, with row ends
        image, extra = [IMAGE] * 24, {"pixel_values": torch.randn(rows, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32]] * rows)}
    elif family in ("blip-2", "paligemma"):
        head, tail = [], [BOS]
    elif family == "idefics3":  # one token for each of three tiles, with others between them
        image = [IMAGE, 650, IMAGE, 650, IMAGE]
        extra = {"pixel_values": torch.randn(rows, 3, 3, 16, 16), "pixel_attention_mask": torch.ones(rows, 3, 16, 16, dtype=torch.long)}
    elif family == "qwen2_5_vl":
        head, tail = [BOS, 691], [692]
        extra = {"pixel_values": torch.randn(rows * 16, 384), "image_grid_thw": torch.tensor([[1, 4, 4]] * rows)}
    ids = torch.cat([torch.tensor([head + image + tail] * rows), torch.randint(10, 600, (rows, 5 + answer))], 1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - answer, -100)
    extra |= {"token_type_ids": (labels != -100).long()} if family == "paligemma" else {}
    extra |= {"mm_token_type_ids": (ids == IMAGE).long()} if family == "qwen2_5_vl" else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **extra}


def cut(inputs: dict, tokens: int) -> dict:
    """Without the last tokens and without labels."""
    shape = inputs["input_ids"].shape
    return {k: v[:, :-tokens] if v.shape == shape else v for k, v in inputs.items() if k != "labels"}


@torch.no_grad()
def test_the_laws_hold_for_other_families(family):
    name, model = family
    editor = strong_editor(model, None, module_dim=32)
    inputs = prepared(name, 3)
    original = model(**inputs).logits
    states = editor.capture_inputs(inputs)
    assert_close(editor._upper(states.hidden, states), original[:, :-1][inputs["labels"][:, 1:] != -100], 1e-5)
    editor.edit_inputs(inputs, [(picture(i), f"question {i}", "answer") for i in range(3)])
    edited = model(**inputs).logits
    assert all(not torch.allclose(edited[row], original[row], atol=1e-2) for row in range(3)), "an edit changed nothing"
    assert [len(kept) for kept in editor.explain(inputs)] == [3] * 3
    with editor.disabled():
        assert_same(model(**inputs).logits, original)
    patches = lambda key, row: slice(16 * row, 16 * row + 16) if (name, key) == ("qwen2_5_vl", "pixel_values") else slice(row, row + 1)
    for row in range(3):
        assert_close(model(**{k: v[patches(k, row)] for k, v in inputs.items()}).logits[0], edited[row], 2e-3)
    prompt, settings = cut(inputs, 3), dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    made = model.generate(**prompt, **settings)[:, -5:]
    with editor.disabled():
        assert not torch.equal(made, model.generate(**prompt, **settings)[:, -5:]), "generate ignores the edits"
    assert model.generate(**prompt, **settings, num_beams=2).shape[0] == 3
    step, length = prompt, prompt["input_ids"].shape[1]
    for _ in range(5):  # the whole sequence each time, the prompt marked by labels
        labels = step["input_ids"].masked_fill(torch.arange(step["input_ids"].shape[1]) < length, -100)
        token = model(**step, **({"labels": labels} if step is not prompt else {})).logits[:, -1:].argmax(-1)
        one = {"input_ids": token, "mm_token_type_ids": torch.zeros_like(token)}  # 1 in all others: attended, and no prefix
        step = step | {k: torch.cat([v, one.get(k, torch.ones_like(token))], 1) for k, v in step.items() if v.shape == step["input_ids"].shape}
    assert_same(made, step["input_ids"][:, -5:])
    editor.reset()
    assert_same(model(**inputs).logits, original)
    with torch.enable_grad():
        parts = [editor.capture_inputs(prepared(name, 3)) for _ in range(3)]
        losses = editor.training_losses(States.concat(parts), torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3))
        losses["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in editor.parameters() if p is not editor.router.log_scale)
    assert len(model._forward_pre_hooks) == 1 and not editor.detach()._forward_pre_hooks


def processor_of(family: str):
    tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    small = dict(size={"height": 16, "width": 16})
    if family == "llava_next":
        images = transformers.LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=small["size"], image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]])
        return transformers.LlavaNextProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    if family == "blip-2":  # its processor wants a tokenizer that knows no image token yet
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
        return transformers.Blip2Processor(transformers.BlipImageProcessor(**small), tokenizer, num_query_tokens=4)
    if family == "paligemma":
        images = transformers.SiglipImageProcessor(**small)
        images.image_seq_length = 4
        return transformers.PaliGemmaProcessor(images, tokenizer)
    tokenizer.add_tokens(["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>"], special_tokens=True)
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 16}, max_image_size={"longest_edge": 16})
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=1)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llava", "qwen2_5_vl"}), indirect=True)  # tiny-llava is one; that needs torchvision
def test_encode_works_with_the_processors_of_other_families(family):
    name, model = family
    editor = strong_editor(model, processor_of(name), module_dim=32)
    editor.edit_many([(picture(i), QUESTIONS[i], f"answer {i}") for i in range(2)])
    mixed = editor.encode([picture(0), None, picture(1)], ["What shape is this?", "What is 3 plus 4?", "Describe it."], ["a star", "seven", "no"])
    edited = logits_of(editor, mixed)
    with editor.disabled():
        original = logits_of(editor, mixed)
    assert_same(edited[1], original[1])
    assert not torch.equal(edited[0], original[0]) and not torch.equal(edited[2], original[2])
    alone = editor.encode(picture(0), "What shape is this?", "a star")
    at = lambda inputs, logits, row: logits[row, :-1][inputs["labels"][row, 1:] != -100]
    assert_close(at(mixed, edited, 0), at(alone, logits_of(editor, alone), 0), 5e-3)
    routes = [editor.explain(editor.encode(picture(0), "What shape is this?", target))[0] for target in ("a star", "seven hundred words")]
    for one, other in zip(*routes):  # PaliGemma attends both ways over its prefix: the target must not be part of it
        assert one["id"] == other["id"] and one["weight"] == pytest.approx(other["weight"], abs=1e-5)


def test_models_that_cannot_be_edited_are_refused_in_a_sentence(base):
    model, processor = base
    with pytest.raises(TypeError, match="image_token_id"):
        LiveEdit(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), processor)
    with pytest.raises(TypeError, match="no vision-language model"):
        LiveEdit(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)), processor)
    with pytest.raises(TypeError, match="compiled"):
        LiveEdit(torch.compile(model), processor)
    for attribute, message in (("peft_config", "merge_and_unload"), ("hf_quantizer", "bfloat16")):
        other = AutoModelForImageTextToText.from_pretrained(TINY)
        other.__dict__[attribute] = object()
        with pytest.raises(TypeError, match=message):
            LiveEdit(other, processor)
    config = FAMILIES["blip-2"]()
    config.image_token_index = None
    with pytest.raises(TypeError, match="image_token_id"):
        LiveEdit(AutoModelForImageTextToText.from_config(config), processor)
    with pytest.raises(RuntimeError, match="no processor"):
        strong_editor(model, None).encode(picture(), "What shape is this?")


def test_a_model_placed_by_accelerate_is_edited_alike(base, tmp_path):
    pytest.importorskip("accelerate", reason="optional: pip install accelerate")
    parts = ["model.vision_tower", "model.multi_modal_projector", "lm_head"] + [f"model.language_model.{p}" for p in ("embed_tokens", "norm", "rotary_emb")]
    layers = {f"model.language_model.layers.{i}": "disk" if i in (3, 4) else "cpu" for i in range(6)}
    placed = AutoModelForImageTextToText.from_pretrained(TINY, device_map=dict.fromkeys(parts, "cpu") | layers, offload_folder=tmp_path).eval()
    answers = []
    for model in (base[0], placed):
        editor = strong_editor(model, base[1])
        editor.edit_many(questions(2))
        inputs = editor.encode(picture(), QUESTIONS[0])
        answers.append([logits_of(editor, inputs), model.generate(**inputs, max_new_tokens=4)])
        editor.reset()
        torch.manual_seed(2)
        answers[-1].append(editor.training_losses(*training_batch(editor))["total"])
    assert_close(answers[0][0], answers[1][0])
    assert_same(answers[0][1], answers[1][1])
    assert answers[0][2].item() == pytest.approx(answers[1][2].item(), rel=1e-4)


def test_a_backbone_in_bfloat16_keeps_its_dtype_and_the_editor_single_precision(base, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16).eval()
    editor = strong_editor(model, AutoProcessor.from_pretrained(TINY))
    editor.edit_many(questions(2))
    inputs = editor.encode(picture(), QUESTIONS[0])
    assert logits_of(editor, inputs).dtype == torch.bfloat16 and {p.dtype for p in editor.parameters()} == {torch.float32}
    assert editor.norm.weight.dtype == editor.experts.visual_keys.dtype == torch.float32
    edited = logits_of(editor, inputs)
    with editor.disabled():
        assert not torch.equal(logits_of(editor, inputs), edited)
    editor.reset()
    losses = editor.training_losses(*training_batch(editor))
    losses["total"].backward()
    assert all(p.grad is None for p in model.parameters())
    editor.save_pretrained(tmp_path)
    LiveEdit.from_pretrained(*base, tmp_path)  # the same model in single precision


# ------------------------------------------------------------------------------------------------ the tiny LLaVA


def test_the_tiny_llava_speaks_any_text(base):
    tokenizer = base[1].tokenizer
    for text in ("naïve café", "漢字 🙂", "a\tb\n c", "Ωmega", "blicket zorp", "\u200bx"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text and (tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids)


def test_the_tiny_llava_is_small_and_answers(base):
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 4_000_000
    drawings = [data.Drawing(s, 77) for s in random.Random(0).sample(data.SCENES, 60)]
    editor = strong_editor(*base)
    queries = [data.Query(d, random.Random(i).choice(data.PHRASINGS[f]), d.scene.answer(f), ()) for i, d in enumerate(drawings) for f in data.FAMILIES]
    right = [run.normalise(a.generated) == run.normalise(q.target) for q, a in zip(queries, run.answer(editor, queries, 20))]
    editor.detach()
    assert sum(right) / len(right) > 0.95, f"only {sum(right)} of {len(right)} right"
