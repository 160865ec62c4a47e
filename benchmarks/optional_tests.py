"""Tests that need more packages: `python -m pytest -q benchmarks/optional_tests.py`.

Processors that need torchvision, and models with int8 weights (torchao), adapters (peft) and layers
on disk (accelerate). What is not installed is skipped. And benchmarks: the stream of updates, the
demonstration, pictures of a visitor.
"""

# ruff: noqa: F811  (fixtures are imported, and named again as arguments)
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny-llava")]
import train as training

import data
import drawn
import run
from benchmarks import demo, emoji, figure
from benchmarks.common import read_stream
from benchmarks.pictures import read_folder
from benchmarks.updates import evaluate_updates, updates_of
from test_liveedit import (  # noqa: F401  (fixtures are found by their names)
    GRID,
    QUESTIONS,
    TINY,
    assert_same,
    base,
    check_encode,
    load_tiny,
    picture,
    python,
    questions,
    seed_and_clean_model,
    strong_editor,
    trained,
    training_batch,
)

NEED_TORCHVISION = "mistral3 qwen2_5_vl qwen3_vl llava_onevision internvl smolvlm".split()


def processor_with_torchvision(name: str):
    """A processor of a family whose own needs torchvision."""
    pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    t, square = transformers, {"size": {"height": 16, "width": 16}}
    tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    added = {"image_token": "<image>", "video_token": "<video>", "start_image_token": "<start>"}
    added |= {"end_image_token": "<end>", "context_image_token": "<image>"}
    tokens = "<video> <start> <end> <|vision_start|> <|vision_end|> [IMG_BREAK] [IMG_END]"
    tokens += " <fake_token_around_image> <global-img> <end_of_utterance> <row_1_col_1>"
    tokenizer.add_tokens(tokens.split(), special_tokens=True)
    for key, token in added.items():
        setattr(tokenizer, key, token)
        setattr(tokenizer, f"{key}_id", tokenizer.convert_tokens_to_ids(token))
    if name == "mistral3":
        patch, edge = {"height": 4, "width": 4}, {"longest_edge": 16}
        images = t.PixtralImageProcessor(size=edge, patch_size=patch)
        shape = {"patch_size": 4, "spatial_merge_size": 2, "image_token": "<image>"}
        return t.PixtralProcessor(images, tokenizer, **shape)
    if name.startswith("qwen"):
        shape = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
        images = t.Qwen2VLImageProcessor(**shape, size={"shortest_edge": 256, "longest_edge": 1024})
        if name == "qwen3_vl":
            return t.Qwen3VLProcessor(images, tokenizer, t.Qwen3VLVideoProcessor())
        return t.Qwen2_5_VLProcessor(images, tokenizer, t.Qwen2VLVideoProcessor())
    if name == "llava_onevision":
        images = t.LlavaOnevisionImageProcessor(**square, **GRID)
        shape = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
        videos = t.LlavaOnevisionVideoProcessor()
        return t.LlavaOnevisionProcessor(images, tokenizer, videos, **shape)
    if name == "internvl":
        images, videos = t.GotOcr2ImageProcessor(**square), t.InternVLVideoProcessor()
        return t.InternVLProcessor(images, tokenizer, videos, image_seq_length=4)
    pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    edge = {"longest_edge": 16}
    images = t.SmolVLMImageProcessor(size=edge, max_image_size=edge)
    return t.SmolVLMProcessor(images, tokenizer, t.SmolVLMVideoProcessor(), image_seq_len=1)


@pytest.mark.parametrize("name", NEED_TORCHVISION)
def test_encode_follows_the_processors_that_need_torchvision(name, tmp_path):
    check_encode(name, processor_with_torchvision(name), tmp_path)


def edit_and_answer(model, processor) -> torch.Tensor:
    editor = strong_editor(model, processor, gain=2.0)
    edited = editor.edit_many(questions(2))
    made = editor.model.generate(**editor.encode(picture(), QUESTIONS[0]), max_new_tokens=4)
    editor.reset()
    batch = training_batch(editor)
    editor.training_losses(*batch)["total"].backward()
    assert len(edited) == 2 and editor.generator.queries_U.grad.abs().sum() > 0
    editor.detach()
    return made[:, -4:]


@pytest.fixture
def expected(base):
    return edit_and_answer(*base)


def test_int8_weights(base):
    quantization = pytest.importorskip("torchao.quantization")
    model = load_tiny()
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
    edit_and_answer(model, base[1])


def test_adapters(base, expected):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(load_tiny(), peft.LoraConfig(target_modules=["q_proj"]))
    assert_same(edit_and_answer(adapted, base[1]), expected)


def test_layers_on_disk(base, expected, tmp_path):
    pytest.importorskip("accelerate")
    parts = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    parts += [f"model.language_model.{p}" for p in ("embed_tokens", "norm", "rotary_emb")]
    layers = {f"model.language_model.layers.{i}": "cpu" for i in range(6)}
    placed = dict.fromkeys(parts, "cpu") | layers | {"model.language_model.layers.4": "disk"}
    model = load_tiny(device_map=placed, offload_folder=tmp_path)
    assert_same(edit_and_answer(model, base[1]), expected)


def test_the_update_stream_counts_what_it_says(base, trained, monkeypatch):
    """Of two updates one is answered by the newest, the other by the old answer."""
    editor, _ = trained
    editor.attach()
    stream = drawn.drawn_stream(10, 0)
    updates = updates_of(stream[:8], 2, 0)
    right, wrong = updates[0].sample, updates[1].sample

    def answer(editor, queries, batch_size):
        ids = [edit.id for edit in editor.edits()]
        said = [data.Answer([], [], "x", {i: 1.0}) for i in ids]
        said[right] = said[8] = data.Answer([], [], updates[0].edit.target, {ids[8]: 1.0})
        said[wrong] = said[9] = data.Answer([], [], stream[wrong].edit.target, {ids[wrong]: 1.0})
        said[3 if 3 not in (right, wrong) else 4].used = {ids[right]: 1.0}
        return said

    options = run.parse_options(["--eval-batch-size", "8"])
    found = evaluate_updates(editor, stream, options, answer)
    editor.reset()
    for update in updates:
        old, (scene, family) = stream[update.sample].edit, update.edit.fact
        assert update.edit.fact == old.fact
        assert update.edit.target not in (old.target, scene.answer(family))
    wanted = {"n": 2, "edits": 10, "newest": 50, "old": 50, "replaced": 50}
    assert {key: found[key] for key in wanted} == wanted
    assert found["false_replacements"] == 10 and found["forms"]["exact"]["newest"] == 100


def test_a_folder_of_pictures_is_split_by_thing(tmp_path):
    names = [{"file": f"{i}.png", "name": f"thing {i // 2}"} for i in range(60)]
    (tmp_path / "names.json").write_text(json.dumps({"things": names}))
    for artist in ("one", "two"):
        (tmp_path / artist).mkdir()
        for i in range(60):
            (tmp_path / artist / f"{i}.png").write_bytes(b"")
    (tmp_path / "kite.jpg").write_bytes(b"")
    (tmp_path / "kite_2.jpg").write_bytes(b"")
    trained, held_out = ({(p.thing, p.file.path) for p in part} for part in read_folder(tmp_path))
    assert len(trained) + len(held_out) == 122
    things, others = ({thing for thing, _ in part} for part in (trained, held_out))
    assert not things & others and len(others) == 10 and "kite" in things | others


def test_the_demonstration_knows_other_words_for_naming_only():
    for prompt in (*drawn.PHRASINGS[drawn.THING], "Which city is this?"):
        queries = demo.real_sample(demo.GUITAR, prompt, "Tom", 0).queries
        naming = prompt in drawn.PHRASINGS[drawn.THING]
        assert ("text_generality" in queries) == naming
        assert not naming or queries["text_generality"].prompt != prompt


def test_pictures_of_a_visitor_are_edited(tmp_path):
    for i, name in enumerate(("cat", "dog", "kite", "tree", "boat", "lamp")):
        picture(i).save(tmp_path / f"{name}.png")
    options = ["--editor", str(TINY / "editor"), "--edits", "1", "--asked", "1"]
    options += ["--out", str(tmp_path / "pictures.json")]
    ended = python("benchmarks/pictures.py", str(tmp_path), *options)
    assert ended.returncode == 0, ended.stderr
    assert "| 1 edits | 100.0 |" in ended.stdout and "other artist" not in ended.stdout
    ended = python("benchmarks/pictures.py", str(tmp_path / "nowhere"), *options)
    assert ended.returncode == 1 and "has no pictures" in ended.stderr


def test_a_benchmark_is_written_of_a_folder_of_pictures(tmp_path):
    """No locality query asks for an edited fact; the unseen artist is in no training."""
    names = [{"file": f"{i}.png", "name": f"thing {i}", "group": "Objects"} for i in range(60)]
    folder, rng = tmp_path / "pictures", random.Random(0)
    for artist in ("one", "two", emoji.UNSEEN_ARTIST):
        (folder / artist).mkdir(parents=True)
        for thing in names:
            pixels = Image.frombytes("RGB", (4, 4), rng.randbytes(48))
            pixels.resize((32, 32)).save(folder / artist / thing["file"])
    (folder / "photos").mkdir()
    for i in range(24):
        pixels = Image.frombytes("RGB", (4, 4), rng.randbytes(48))
        pixels.resize((32, 32)).save(folder / "photos" / f"{chr(97 + i)}.jpg")
    (folder / "photos" / "the same.jpg").write_bytes((folder / "photos" / "x.jpg").read_bytes())
    (folder / "names.json").write_text(json.dumps({"things": names}))
    ended = python("benchmarks/emoji.py", str(folder), "--out", str(tmp_path / "emoji"))
    assert ended.returncode == 0, ended.stderr
    families = {phrase: name for name, asked in emoji.QUESTIONS.items() for phrase in asked}
    pictured, shown = 0, set()
    for name in ("train", "eval", "photos.eval"):
        file = tmp_path / "emoji" / f"{name}.json"
        records = json.loads(file.read_text())
        edited = {(Path(r["image"]).stem, families[r["src"]]) for r in records}
        for record in records:
            thing, asked = Path(record["image"]).stem, families.get(record["loc"] + "?")
            shown |= {thing, Path(record["m_loc"]).stem}
            assert Path(record["m_loc"]).stem not in {about for about, _ in edited}
            assert (thing, asked) not in edited
            pictured += asked is not None or record["loc_ans"] == "yes"
            again = emoji.QUESTIONS[families[record["src"]]][-drawn.HELD_OUT :]
            assert (record["rephrase"] in again) == (name != "train")
            assert record["image_rephrase"] != record["image"] and record["alt"] != record["pred"]
            if name == "train":
                assert not any(emoji.UNSEEN_ARTIST in value for value in record.values())
        assert data.check_pictures(data.read_records(file, tmp_path / "emoji" / "images"))
    assert pictured > 10 and not {"x", "the same"} <= shown
    stream = read_stream(str(tmp_path / "emoji"), 5, 0)
    updates = updates_of(stream, 3, 0)
    assert len(stream) == 5 and all(u.edit.target != stream[u.sample].edit.target for u in updates)
    check_that_the_same_picture_is_lost_nowhere(tmp_path)
    (tmp_path / "photos").mkdir()
    ended = python("benchmarks/emoji.py", str(tmp_path / "photos"), "--out", str(tmp_path / "b"))
    assert ended.returncode == 1 and "otherwise" in ended.stderr


def check_that_the_same_picture_is_lost_nowhere(folder: Path) -> None:
    """Ask where.py about edits whose second picture is the first."""
    file = folder / "emoji" / "eval.json"
    records = [r | {"image_rephrase": r["image"]} for r in json.loads(file.read_text())]
    file.write_text(json.dumps(records))
    options = ["--editor", str(TINY / "editor"), "--out", str(folder / "where.json")]
    ended = python("benchmarks/where.py", "--data", str(folder / "emoji"), *options)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((folder / "where.json").read_text())
    stages, thresholds = found["stages"], found["threshold"]
    assert stages["eyes"]["all"] == stages["most similar"]["all"] == 100
    assert stages["kept by the filter"]["all"] == thresholds["+0.00"]["own"] > 90
    for column in ("own", "any"):
        kept = [row[column] for row in thresholds.values()]  # the lowest threshold first
        assert kept == sorted(kept, reverse=True)
    for name, row in found["equal locality"].items():
        assert row["all"] == 100 or name.startswith("filter, its")


def test_packed_questions_about_pictures_are_answered_as_alone():
    """Training of the small models sees the very model: a mask that is not applied would show."""
    model, processor = run.load_model("tiny-llava", "cpu", "float32")
    packer = training.Packer(processor.tokenizer, model.config.image_seq_length)
    drawing, rng = drawn.Drawing(drawn.SCENES[0], 1), random.Random(0)
    features = training.vision_features(model, training.prepare(processor, [drawing], []).pixels)
    segments = packer.row(drawing.scene, rng)
    packer.row = lambda name, rng: segments
    with torch.no_grad():
        packed, _ = training.packed_logits(
            model, packer, features.float(), packer.batch([drawing.scene], rng)
        )
        alone = []
        for segment in segments:
            packer.row = lambda name, rng, one=segment: [one]
            batch = packer.batch([drawing.scene], rng)
            alone.append(training.packed_logits(model, packer, features.float(), batch)[0])
            if segment.sees:  # and as the model itself answers
                ids = torch.tensor([packer.head + segment.ids])
                pixels = processor.image_processor(images=drawing.open(), return_tensors="pt")
                said = model(input_ids=ids, **pixels).logits[0, :-1]
                rows = torch.tensor(segment.is_answer).nonzero().flatten() + len(packer.head) - 1
                torch.testing.assert_close(alone[-1], said[rows], atol=0.05, rtol=0.02)
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-3, rtol=1e-3)


def test_pictures_are_drawn_with_answers_of_several_lines(tmp_path):
    stream = drawn.drawn_stream(1, 0)
    said = {"prompt": "What?", "before": "a\nb", "after": "c\nd", "expected": "c\nd"}
    results = [said | {"free_running": 0.0}] * len(stream[0].queries)
    figure.draw_edits(stream, results, tmp_path / "edits.png")
    assert (tmp_path / "edits.png").is_file()


def test_a_figure_is_drawn_of_whole_runs_and_pictures_of_choice(tmp_path):
    options = {"data": None, "edits": 2, "seed": 0}
    (tmp_path / "metrics.json").write_text(json.dumps({"options": options}))
    said = {"prompt": "What?", "before": "a", "after": "b", "expected": "b", "free_running": 1.0}
    asked = sum(len(sample.queries) for sample in drawn.drawn_stream(2, 0))
    drawing = ["benchmarks/figure.py", str(tmp_path), "--out", str(tmp_path / "new" / "it.png")]
    for count, more, refused in ((1, [], "are needed"), (asked, ["--of", "x"], "drawn ones")):
        (tmp_path / "predictions.jsonl").write_text((json.dumps(said) + "\n") * count)
        ended = python(*drawing, *more)
        assert ended.returncode == 1 and refused in ended.stderr.splitlines()[-1]
    ended = python(*drawing, "--shown", "2")
    assert ended.returncode == 0 and (tmp_path / "new" / "it.png").is_file(), ended.stderr
