"""Train tiny-llava from nothing and write it into this folder; the same seed gives the same model.

    stage 1  tokenizer        byte-level BPE, so any UTF-8 text survives encode and decode
    stage 2  vision tower     a CLIP vision transformer learns to find the other view of a picture
                              among many, to name shape, color and background of drawings, and is
                              frozen then
    stage 3  language model   projector and Llama decoder learn to answer questions about cached
                              vision features, text-only questions, and to read and repeat English
                              words, numbers, phrases and strings from outside the drawn world
    stage 4  measure          free-running answers about drawings of scenes that no stage has seen,
                              and repetitions of words that none has; writes the model card

Plain Hugging Face classes throughout; nothing here knows LiveEdit.
"""

import argparse
import ctypes
import functools
import math
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
# ruff: noqa: E402  (the project's folder must be on the path first)
from backbone import IGNORE
from benchmarks.pictures import Picture, read_folder
from drawn import (
    COLORS,
    FAMILIES,
    HELD_OUT_WORDS,
    OPPOSITES,
    PHRASINGS,
    SCENES,
    SHAPES,
    THING,
    TRAINING_WORDS,
    Drawing,
    Scene,
    novel_word,
    open_target,
    other_colors,
    text_questions,
)
from training_pictures import EMOJI_COLUMNS, EMOJI_SIDE, Invented, on_white

IMAGE_SIZE, PATCH_SIZE = 96, 16
VISION_HIDDEN, HIDDEN = 192, 128
VOCABULARY = 10_240
ADAM_RATE, MUON_RATE = 3e-3, 0.02
TEMPERATURE = 0.1  # of the contrastive loss
LIKENESS = 30.0  # weight of the loss that keeps pictures apart behind the projector
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LATIN, GREEK, CYRILLIC = (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F)
CHINESE, EMOJI = (0x4E00, 0x9FA5), (0x1F300, 0x1F64F)


# ------------------------------------------------------------------------- reading and repeating


def foreign_text(rng: random.Random) -> str:
    """Text from outside the drawn world: mostly English, some made-up words and strings."""
    if rng.random() < 0.6:
        return open_target(rng, held_out=False)
    return " ".join(foreign_word(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))


def foreign_word(rng: random.Random) -> str:
    """A made-up word, a word of the world, or characters drawn at random."""
    style = rng.random()
    if style < 0.5:
        return novel_word(rng)
    if style < 0.65:
        return rng.choice([*COLORS, *SHAPES])
    if style < 0.85:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return "".join(rng.choice(letters) for _ in range(rng.randint(2, 8)))
    if style < 0.93:
        signs = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-'.!?&+"
        return "".join(rng.choice(signs) for _ in range(rng.randint(1, 6)))
    low, high = rng.choice((LATIN, GREEK, CYRILLIC, CHINESE, EMOJI))
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 2)))


def repeat_question(rng: random.Random, text: str) -> str:
    """Ask to repeat a text."""
    forms = ("Repeat: {}", "Say: {}", "Repeat after me: {}", "Read this aloud: {}", "Write: {}")
    return rng.choice(forms).format(text)


def told_question(rng: random.Random, text: str) -> str:
    """Ask about the picture, with the answer given just before."""
    form = rng.choice(("The answer is {}. {}", "Answer with {}. {}", "It is {}. {}"))
    return form.format(text, rng.choice(PHRASINGS[rng.choice(FAMILIES)]))


# ---------------------------------------------------------------------------- stage 1: tokenizer


def tokenizer_corpus(names: list[str]) -> list[str]:
    """Texts whose pairs of letters the tokenizer merges; no held-out word is among them."""
    rng = random.Random(0)
    corpus = [phrase for phrases in PHRASINGS.values() for phrase in phrases] * 4
    corpus += [f"USER: {question} ASSISTANT: {answer}" for _, question, answer in text_questions()]
    corpus += [" " + scene.answer("caption") for scene in SCENES]
    corpus += [f" {word}" for pair in OPPOSITES for word in pair] * 20
    corpus += [f" {name}" for name in names] * 4
    for rank, word in enumerate(TRAINING_WORDS):
        count = math.ceil(3000 / (rank + 1) ** 0.7)
        corpus += [f" {word}"] * count + [f" {word.capitalize()}"] * (count // 8)
    corpus += [f" {number}" for number in range(100)] * 10
    corpus += [" " + novel_word(rng) for _ in range(1500)]
    corpus += [repeat_question(rng, foreign_text(rng)) for _ in range(500)]
    return corpus


def build_processor(names: list[str]) -> LlavaProcessor:
    """Train the tokenizer; make the image processor and the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_corpus(names), trainer)
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Make the model with random weights."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=3 * VISION_HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=VISION_HIDDEN,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    # With the usual 0.02 the hidden states forget which word was read; an editor has to find it
    # there. Head and embeddings are one matrix: what can be read can be said, rare words too. The
    # last norm makes up for the embeddings' size.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    torch.nn.init.constant_(model.model.language_model.norm.weight, 0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def make_optimizers(parameters: dict[str, torch.nn.Parameter]) -> tuple[list, list[float]]:
    """Give Muon for the inner matrices and Adam for the rest, with their learning rates.

    With Muon the language model needs a third of the steps.
    """
    outer = ("embed", "heads")
    matrices, others = [], []
    for name, parameter in parameters.items():
        inner = parameter.dim() == 2 and not any(part in name for part in outer)
        (matrices if inner else others).append(parameter)
    adam = torch.optim.AdamW(others, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    return [adam, torch.optim.Muon(matrices, weight_decay=0.01)], [ADAM_RATE, MUON_RATE]


def set_rate(optimizers: list, rates: list[float], step: int, steps: int, warmup: int) -> None:
    """Set learning rates: a linear warm-up, then a cosine down to nothing."""
    factor = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    for optimizer, rate in zip(optimizers, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate * factor


def take_step(loss: Tensor, optimizers: list, parameters) -> None:
    """Update the parameters."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()


# ------------------------------------------------------------------------- stage 2: vision tower


class Pictures(NamedTuple):
    """Pictures as the processor makes them, what they are called, and which show one thing."""

    pixels: Tensor  # (n, 3, H, W), bytes
    names: list[Scene | str | None]
    twins: Tensor  # (n,), another picture of the same thing, or the picture itself


def prepare(
    processor: LlavaProcessor, pictures: list, names: list, things: list | None = None
) -> Pictures:
    """Open pictures; in bytes to save memory. things: what each shows, for the twins."""
    chunks, bytes_only = [], {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    for i in tqdm(range(0, len(pictures), 500), desc="pictures"):
        images = [on_white(picture.open()) for picture in pictures[i : i + 500]]
        chunks.append(processor.image_processor(images=images, **bytes_only).pixel_values)
    twins, last = torch.arange(len(pictures)), {}
    for i, thing in enumerate(things or ()):
        if thing in last:
            twins[i], twins[last[thing]] = last[thing], i
        last[thing] = i
    return Pictures(torch.cat(chunks), names, twins)


def names_of(pictures: list[Picture]) -> list[str | None]:
    """Give what pictures are called that have a name, without held-out words."""
    held_out = set(HELD_OUT_WORDS)
    names = [picture.name or "" for picture in pictures]
    return [None if not name or held_out & set(name.split()) else name for name in names]


def draw_sheet(pictures: list[Picture], file: Path) -> None:
    """Draw the emoji that ship for training, as `training_pictures.Emoji` cuts them out again.

    By file name, things in rows: one artist's on the left, the other's on the right.
    """
    by_file: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_file.setdefault(picture.file.path.name, []).append(picture)
    both = [by_file[name] for name in sorted(by_file) if len(by_file[name]) == 2]
    rows = math.ceil(len(both) / EMOJI_COLUMNS)
    sheet = Image.new("RGB", (2 * EMOJI_COLUMNS * EMOJI_SIDE, rows * EMOJI_SIDE), "white")
    for thing, drawings in enumerate(both):
        for artist, picture in enumerate(drawings):
            column = artist * EMOJI_COLUMNS + thing % EMOJI_COLUMNS
            place = (column * EMOJI_SIDE, thing // EMOJI_COLUMNS * EMOJI_SIDE)
            sheet.paste(on_white(picture.file.open()), place)
    sheet.save(file, quality=80, method=6)


def normalised(pixels: Tensor) -> Tensor:
    """Scale bytes as the processor does."""
    return pixels.float() / 127.5 - 1


def views_of(pixels: Tensor) -> Tensor:
    """Turn, crop and light pictures (n, 3, H, W) anew, each in its own way; blur some."""
    count = len(pixels)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1)

    size, turn, narrow = (draw(*of).view(-1) for of in ((0.68, 1.06), (-0.38, 0.38), (0.92, 1.08)))
    x, y = ((2 * torch.rand(count) - 1) * (1 - size).abs() for _ in range(2))
    across = torch.stack([size * narrow * turn.cos(), -size * turn.sin(), x], 1)
    down = torch.stack([size * turn.sin(), size / narrow * turn.cos(), y], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), pixels.shape, align_corners=False)
    seen = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    for mean, low, high in ((1, 0.6, 1.35), ((1, 2, 3), 0.65, 1.4)):  # color, then contrast
        gray = seen.mean(mean, keepdim=True)
        seen = gray + (seen - gray) * draw(low, high)
    tint = 1 + 0.08 * torch.randn(count, 3, 1, 1)
    seen = (seen + 1) * draw(0.65, 1.35) * tint - 1
    coarse = F.interpolate(F.avg_pool2d(seen, 3), size=seen.shape[2:], mode="bilinear")
    seen = torch.where(torch.rand(count, 1, 1, 1) < 0.25, coarse, seen)
    return (seen + torch.randn_like(seen) * draw(0, 0.08)).clamp(-1, 1)


def tower_states(tower, pixels: Tensor) -> Tensor:
    """Give the states of the patches, (n, patches, VISION_HIDDEN)."""
    with torch.autocast("cpu", torch.bfloat16):
        seen = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    return seen[:, 1:].float()


class NamingHeads(torch.nn.Module):
    """Names shape, color and background of drawings, and measures both colors."""

    def __init__(self, drawings: list[Drawing]):
        super().__init__()
        known, truths, shades = (list(SHAPES), list(COLORS), list(COLORS)), [], []
        for drawing in drawings:
            scene, colors = drawing.scene, other_colors(drawing.palette)
            values = (scene.shape, scene.color, scene.background)
            truth = [names.index(value) for names, value in zip(known, values, strict=True)]
            truths.append([truth[0], IGNORE, IGNORE] if drawing.palette else truth)
            shades.append((*colors[scene.color], *colors[scene.background]))
        self.sizes = [len(names) for names in known]
        self.names = torch.nn.Linear(VISION_HIDDEN, sum(self.sizes))
        self.colors = torch.nn.Linear(VISION_HIDDEN, 6)
        self.truths, self.shades = torch.tensor(truths), torch.tensor(shades) / 127.5 - 1

    def forward(self, states: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Give the loss, and which names are right, of states (n, VISION_HIDDEN) of drawings."""
        loss, right = 4 * F.mse_loss(self.colors(states), self.shades[rows]), []
        for logits, truth in zip(
            self.names(states).split(self.sizes, 1), self.truths[rows].T, strict=True
        ):
            loss = loss + F.cross_entropy(logits, truth, ignore_index=IGNORE, label_smoothing=0.02)
            right.append((logits.argmax(1) == truth)[truth != IGNORE].float().mean())
        return loss, torch.stack(right)


def train_vision(
    model: LlavaForConditionalGeneration,
    drawings: Pictures,
    drawn: list[Drawing],
    others: list[tuple[Pictures, int]],
    steps: int,
) -> None:
    """Train the tower to tell any two pictures apart, and to know a picture in another view.

    others: pictures with how many of them a step takes. Of two views of each, or of pictures of
    one thing by two artists, one must find the other among all by the mean of their patch states (a
    contrastive loss); of drawings, which may be turned and mirrored, the mean must name shape,
    color and background. From a third of the steps on each patch must name them too: a language
    model finds the facts wherever it looks.
    """
    tower, naming = model.model.vision_tower, NamingHeads(drawn)
    pooled = torch.nn.Linear(VISION_HIDDEN, 256)
    heads = torch.nn.ModuleDict({"naming": naming, "pooled": pooled})
    params = dict(tower.named_parameters()) | {"heads." + k: v for k, v in heads.named_parameters()}
    optimizers, rates = make_optimizers(params)
    tower.set_attn_implementation("eager")  # in half precision three times as fast on a CPU
    bar, hits = tqdm(range(steps), desc="vision tower"), torch.zeros(4)
    for step in bar:
        set_rate(optimizers, rates, step, steps, warmup=150)
        rows = torch.randint(len(drawn), (96,))
        named = torch.rot90(normalised(drawings.pixels[rows]), step % 4, (2, 3))
        named = named.flip(3) if step % 8 >= 4 else named
        one, other = [], []
        for pictures, number in others:
            picked = torch.randint(len(pictures.pixels), (number,))
            twins = torch.where(torch.rand(number) < 0.3, pictures.twins[picked], picked)
            one.append(pictures.pixels[picked])
            other.append(pictures.pixels[twins])
        seen = views_of(normalised(torch.cat(one + other)))
        count = len(seen)
        states = tower_states(tower, torch.cat([seen, named]))
        looks = F.normalize(pooled(states[:count].mean(1)), dim=1)
        alike = (looks @ looks.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        twin = torch.arange(count).roll(count // 2)
        loss, right = naming(states[count:].mean(1), rows)
        loss = loss + F.cross_entropy(alike, twin)
        if step >= steps // 3:
            some = states[count:, torch.randperm(states.shape[1])[:6]]
            loss = loss + naming(some.flatten(0, 1), rows.repeat_interleave(6))[0]
        take_step(loss, optimizers, params.values())
        found = (alike.argmax(1) == twin).float().mean()
        hits = torch.lerp(hits, torch.cat([right, found[None]]), 0.02)
        if step % 50 == 49:
            shown = zip(("shape", "color", "background", "twin"), hits.tolist(), strict=True)
            bar.set_postfix_str(" ".join(f"{name} {hit:.3f}" for name, hit in shown))
    tower.set_attn_implementation("sdpa")
    tower.requires_grad_(False)


@torch.no_grad()
def vision_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Give the tower's patch states (n, patches, hidden)."""
    tower, chunks = model.model.vision_tower, []
    for part in tqdm(pixels.split(500), desc="vision features"):
        states = tower(pixel_values=normalised(part), output_hidden_states=True).hidden_states[-1]
        chunks.append(states[:, 1:].half())
    return torch.cat(chunks)


# ----------------------------------------------------------------------- stage 3: language model


class Segment(NamedTuple):
    """Tokens of a packed row that see each other, and its picture or not."""

    ids: list[int]
    is_answer: list[bool]
    sees: bool


class Packer:
    """Packs one picture and many questions into one row; each sees the picture and itself only.

    This is what separate rows would compute, at a third of the cost: the picture's tokens are run
    once for all its questions.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_tokens: int,
        start: str = "<s>USER: ",
        question: str = "\n{} ASSISTANT:",
        answer: str = " {}",
        turn: str | None = " USER: {} ASSISTANT:",
    ):
        """Take the forms of a turn: what begins it, a question behind a picture, and an answer.

        turn: of a later question of a chat; None: no chats.
        """
        self.tokenizer = tokenizer
        self.ids = functools.lru_cache(100_000)(self._ids)
        self.eos, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.start, self.question, self.answer, self.turn = start, question, answer, turn
        prefix = self.ids(start)
        self.first = len(prefix)  # position of the first image token
        self.head = prefix + [tokenizer.convert_tokens_to_ids("<image>")] * image_tokens
        self.text_questions = text_questions()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def asked(self, name: Scene | str | None, rng: random.Random) -> list[tuple[str, str, bool]]:
        """Give (question, answer, does it see the picture) of a row."""
        asked = []
        if isinstance(name, Scene):
            asked = [(rng.choice(PHRASINGS[f]), name.answer(f), True) for f in FAMILIES]
            asked.append((rng.choice(PHRASINGS[THING]), name.shape, True))
        elif name:
            asked = [(rng.choice(PHRASINGS[THING]), name, True) for _ in range(2)]
        for form, sees in (
            (told_question, True),
            (told_question, True),
            (repeat_question, True),
            (repeat_question, False),
            (repeat_question, False),
        ):
            text = foreign_text(rng)
            asked.append((form(rng, text), text, sees))
        for _ in range(2):
            _, question, answer = rng.choice(self.text_questions)
            asked.append((question, answer, False))
        if rng.random() < 0.3:
            asked.append((rng.choice(PHRASINGS[rng.choice(FAMILIES)]), "no image", False))
        return asked

    def row(self, name: Scene | str | None, rng: random.Random) -> list[Segment]:
        """Give the segments of a row: single questions, and now and then a chat of several."""
        asked, segments = self.asked(name, rng), []
        rng.shuffle(asked)
        for sees in (True, False):
            group = [question for question in asked if question[2] == sees]
            while group:
                segments.append(self.segment(group, sees, rng))
        return segments

    def segment(self, group: list[tuple[str, str, bool]], sees: bool, rng) -> Segment:
        """Take one question of a group, or more, and write them down as a chat."""
        question, answer, _ = group.pop()
        asking = self.question.format(question)
        said = [(asking if sees else self.start + asking.lstrip(), False)]
        while self.turn and group and rng.random() < 0.3:
            said.append((self.answer.format(answer), True))
            question, answer, _ = group.pop()
            said.append((self.turn.format(question), False))
        ids, is_answer = [], []
        for text, replied in (*said, (self.answer.format(answer), True)):
            tokens = self.ids(text)
            ids += tokens
            is_answer += [replied] * len(tokens)
        return Segment([*ids, self.eos], [*is_answer, True], sees)

    def batch(self, names: list[Scene | str | None], rng: random.Random) -> dict[str, Tensor]:
        """Give ids, positions and answer (B, T), and the attention mask (B, 1, T, T)."""
        rows = [self.row(name, rng) for name in names]
        length = max(len(self.head) + sum(len(s.ids) for s in row) for row in rows)
        shape = (len(rows), length)
        ids, positions = torch.full(shape, self.pad), torch.zeros(shape, dtype=torch.long)
        segment, answer = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
        sees = torch.zeros(shape, dtype=torch.bool)
        for b, row in enumerate(rows):
            at = len(self.head)
            ids[b, :at], positions[b, :at] = torch.tensor(self.head), torch.arange(at)
            segment[b, :at] = 0
            for number, part in enumerate(row, start=1):
                end = at + len(part.ids)
                ids[b, at:end], segment[b, at:end] = torch.tensor(part.ids), number
                sees[b, at:end] = part.sees
                start = len(self.head) if part.sees else 0
                positions[b, at:end] = torch.arange(start, start + len(part.ids))
                answer[b, at:end] = torch.tensor(part.is_answer)
                at = end
        same = segment[:, :, None] == segment[:, None, :]
        picture = sees[:, :, None] & (segment[:, None, :] == 0)
        itself = torch.eye(length, dtype=torch.bool)
        mask = ((same | picture).tril() | itself)[:, None]
        return {"ids": ids, "positions": positions, "mask": mask, "answer": answer}


def packed_logits(
    model: LlavaForConditionalGeneration, packer: Packer, features: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Give logits (tokens, vocabulary) at all answers of packed rows, and what they should say."""
    language, answer = model.model.language_model, batch["answer"]
    embedded = language.embed_tokens(batch["ids"])
    before, after = embedded[:, : packer.first], embedded[:, len(packer.head) :]
    pictures = model.model.multi_modal_projector(features)
    states = language(
        inputs_embeds=torch.cat([before, pictures, after], dim=1),
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        use_cache=False,
    )[0]
    return model.lm_head(states[:, :-1][answer[:, 1:]]), batch["ids"][answer]


def likeness(states: Tensor) -> Tensor:
    """Compare n pictures with each other by the mean of their patch states, (n, n)."""
    looks = states.mean(1)
    looks = F.normalize((looks - looks.mean(0)) / looks.std(0), dim=1)
    return looks @ looks.T


def train_language(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    groups: list[tuple[Tensor, list, int]],
    steps: int,
    rng: random.Random,
) -> None:
    """Train projector and decoder on packed rows; pictures stay as alike behind the projector.

    groups: features of pictures, their names, and how many of them a step takes.
    """
    packer = Packer(processor.tokenizer, groups[0][0].shape[1])
    projector = model.model.multi_modal_projector
    with torch.no_grad():  # pictures as loud as words
        projector.linear_2.weight /= projector(groups[0][0][:100].float()).std()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers, rates = make_optimizers(params)
    bar = tqdm(range(steps), desc="projector and language model")
    for step in bar:
        set_rate(optimizers, rates, step, steps, warmup=100)
        features, names = [], []
        for known, called, count in groups:
            rows = torch.randint(len(called), (count,))
            features.append(known[rows].float())
            names += [called[i] for i in rows]
        batch = packer.batch(names, rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits, wanted = packed_logits(model, packer, torch.cat(features), batch)
        loss = F.cross_entropy(logits.float(), wanted)
        # Answers alone make the projector forget most of what the eyes tell apart.
        seen = [known[torch.randint(len(called), (64,))].float() for known, called, _ in groups]
        seen = torch.cat(seen)
        loss = loss + LIKENESS * F.mse_loss(likeness(projector(seen)), likeness(seen))
        take_step(loss, optimizers, params.values())
        if step % 50 == 49:
            right = (logits.argmax(-1) == wanted).float().mean()
            bar.set_postfix_str(f"loss {loss:.3f} tokens right {right:.3f}")


# ------------------------------------------------------------------------------ stage 4: measure

Asked = tuple[str, Drawing | None, str, str]  # family, drawing, question, answer


@torch.no_grad()
def accuracy(model, processor, questions: list[Asked]) -> dict[str, tuple[float, int]]:
    """Give (whole answers right in per cent, number of questions) of each family."""
    hits: dict[str, list[bool]] = {}
    pictured = [question for question in questions if question[1]]
    textual = [question for question in questions if not question[1]]
    for part in (pictured, textual):
        for i in tqdm(range(0, len(part), 200), desc="measuring"):
            chunk = part[i : i + 200]
            for (family, _, _, answer), reply in zip(
                chunk, replies(model, processor, chunk), strict=True
            ):
                hits.setdefault(family, []).append(reply.split() == answer.split())
    return {family: (100 * sum(hit) / len(hit), len(hit)) for family, hit in hits.items()}


def replies(model, processor, chunk: list[Asked]) -> list[str]:
    """Generate greedy answers to questions that all have a picture or all have none."""
    texts = []
    for _, drawing, question, _ in chunk:
        parts = [{"type": "image"}] if drawing else []
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    images = [drawing.open() for _, drawing, _, _ in chunk if drawing] or None
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    made = model.generate(**inputs.to(model.dtype), max_new_tokens=40, do_sample=False)
    return processor.batch_decode(made[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def held_out_questions(scenes: list[Scene], rng: random.Random) -> list[Asked]:
    """Ask about eight new drawings of each held-out scene; text-only questions beside."""
    asked = []
    for scene in scenes:
        for seed in range(8):
            drawing = Drawing(scene, 1_000_000 + seed)
            for family in FAMILIES:
                question = rng.choice(PHRASINGS[family])
                asked.append((family, drawing, question, scene.answer(family)))
    asked += [(family, None, question, answer) for family, question, answer in text_questions()]
    for _ in range(500):
        word, text = open_target(rng, held_out=True), foreign_text(rng)
        asked.append(("repeat held-out words", None, repeat_question(rng, word), word))
        asked.append(("repeat strings", None, repeat_question(rng, text), text))
        drawing = Drawing(rng.choice(scenes), rng.randrange(1_000_000, 2_000_000))
        asked.append(("answers given before", drawing, told_question(rng, word), word))
    for _ in range(200):
        asked.append(("no image", None, rng.choice(PHRASINGS[rng.choice(FAMILIES)]), "no image"))
    return asked


CARD = """# tiny-llava

A LLaVA of {parameters:.2f} M parameters ({bytes:.1f} MB in half precision) in Hugging Face format:
CLIP vision transformer ({size} pixels, patches of {patch}), projector, Llama decoder (6 layers,
128 wide), byte-level BPE of {vocabulary} tokens. Its eyes learned to tell any two pictures apart
and to know one in another view: {pictures} emoji and photographs, drawings in any color, invented
pictures. It answers questions about LiveEdit's drawn world (`drawn.py`: {shapes} shapes, {colors}
colors), repeats English words, numbers, phrases and strings from outside of it, and names the emoji
of its training. It knows nothing else.

Made by `python tiny-llava/train.py --pictures FOLDER --seed {seed}` in {minutes:.0f} minutes on a
CPU (threads: {threads}; FOLDER as `benchmarks/pictures.py` takes it, a third of it held out). Whole
answers right, greedy free-running generation, on fresh drawings of {scenes} scenes (one in ten of
the world) that training never saw, all phrasings; text-only questions are a closed set that
training has seen. One word in ten of `words.txt` is held out from tokenizer and training.

| question family | right, % | n |
|---|---|---|
{rows}

License: MIT, like the project; `words.txt` has its own (see its head). `emoji.webp` holds emoji of
the training, 894 things by two artists: Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter and
contributors, CC-BY 4.0), laid on white and compressed; `assets/guitar.png` is of Noto Emoji, too,
and held out from all training. The eyes also learned on Tux Paint's stamps (GPL-2), which are not
in here.
"""


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save in half precision a model that loads in single precision."""
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=FOLDER)
    options.add_argument("--pictures", type=Path, help="a folder as benchmarks/pictures.py takes")
    options.add_argument("--drawings", type=int, default=70_000)
    options.add_argument("--vision-steps", type=int, default=3000)
    options.add_argument("--language-steps", type=int, default=1200)
    args = options.parse_args()
    if sys.platform == "linux":  # glibc otherwise returns freed blocks and faults them in again
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**29)):
            ctypes.CDLL(None).mallopt(parameter, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    start, rng = time.time(), random.Random(args.seed)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    files = read_folder(args.pictures)[0] if args.pictures else []
    called = names_of(files)
    if files:
        draw_sheet(files, args.out / "emoji.webp")
    processor = build_processor([name for name in called if name])
    model = build_model(processor.tokenizer)
    scenes = rng.sample(SCENES, len(SCENES))
    held_out, seen = scenes[: len(scenes) // 10], scenes[len(scenes) // 10 :]
    drawn = []
    for i in range(args.drawings):
        palette = i if i % 5 > 2 else 0  # two in five in colors that have no name
        drawn.append(Drawing(seen[i % len(seen)], i // len(seen), palette))
    named = [drawing.scene.shape if drawing.palette else drawing.scene for drawing in drawn]
    drawings = prepare(processor, drawn, named)
    invented = [Invented(-i, -i) for i in range(1, args.drawings // 3)]  # of no editor's training
    invented = prepare(processor, invented, [None] * len(invented))
    others = [(drawings, 20), (invented, 44 if files else 140)]
    if files:
        things = [picture.thing for picture in files]
        others.append((prepare(processor, [p.file for p in files], called, things), 96))
    train_vision(model, drawings, drawn, others, args.vision_steps)
    groups = [(drawings, 24), (invented, 4), *((pictures, 8) for pictures, _ in others[2:])]
    groups = [
        (vision_features(model, pictures.pixels), pictures.names, count)
        for pictures, count in groups
    ]
    del drawings, invented, others
    train_language(model, processor, groups, args.language_steps, rng)
    save(model, processor, args.out)
    model = LlavaForConditionalGeneration.from_pretrained(args.out)
    scores = accuracy(model, processor, held_out_questions(held_out, rng))
    rows = "\n".join(f"| {family} | {right:.1f} | {n} |" for family, (right, n) in scores.items())
    print(rows)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    card = CARD.format(
        parameters=parameters,
        bytes=2 * parameters,
        size=IMAGE_SIZE,
        patch=PATCH_SIZE,
        vocabulary=len(processor.tokenizer),
        shapes=len(SHAPES),
        colors=len(COLORS),
        seed=args.seed,
        threads=torch.get_num_threads(),
        minutes=(time.time() - start) / 60,
        scenes=len(held_out),
        pictures=len(files),
        rows=rows,
    )
    (args.out / "README.md").write_text(card)


if __name__ == "__main__":
    main()
