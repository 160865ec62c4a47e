"""Train tiny-llava from nothing: `python tiny-llava/train.py` writes the checkpoint of this folder, the same one for the same seed.

    stage 1  tokenizer        byte-level BPE, so any UTF-8 text survives encode and decode
    stage 2  vision tower     a CLIP vision transformer learns to name shape, color and background of drawings (then frozen)
    stage 3  projector + LM   a Llama decoder learns to answer questions about cached vision features, text-only questions,
                              and to read and repeat words from outside the drawn world
    stage 4  measure          free-running generation on drawings of scenes that no stage has seen; writes the model card

Plain Hugging Face classes throughout; nothing here knows LiveEdit. About 35 minutes on 2 CPU cores.
"""

import argparse
import ctypes
import functools
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration,
                          LlavaProcessor, PreTrainedTokenizerFast)

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
from data import COLORS, FAMILIES, OPPOSITES, PHRASINGS, SCENES, SHAPES, Drawing, novel_word, text_questions  # noqa: E402

IMAGE_SIZE, PATCH_SIZE = 48, 8
CHAT_TEMPLATE = ("{% for message in messages %}{{ message['role'].upper() }}: "
                 "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
                 "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
                 "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
COMMON_WORDS = """time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour game
line end member law car city community name president team minute idea body information back parent face others level office
door health person art war history party result change morning reason research girl guy moment air teacher force education
food apple bread table chair horse tiger snake bird fish tree flower river mountain beach island bridge tower castle garden
music piano guitar drum camera phone clock lamp candle bottle glass cup plate knife spoon fork hat shirt shoe glove coat
train plane boat truck bicycle wheel engine rocket planet moon sun cloud rain snow wind fire stone metal wood paper cotton
big small old young new long short high low good bad fast slow hot cold happy sad full empty open closed light dark""".split()


# ------------------------------------------------------------------------------------------------ reading and repeating


def foreign_text(rng: random.Random) -> str:
    """Words from outside the world: made-up and common words, letters, other alphabets, one to five words."""
    def word() -> str:
        style = rng.random()
        if style < 0.45:
            return novel_word(rng)
        if style < 0.70:
            return rng.choice(COMMON_WORDS)
        if style < 0.80:
            return rng.choice(list(COLORS) + list(SHAPES))
        if style < 0.92:
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 8)))
        if style < 0.96:
            return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-'.") for _ in range(rng.randint(1, 6)))
        low, high = rng.choice(((0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x4E00, 0x9FA5), (0x1F300, 0x1F64F)))
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 2)))

    return " ".join(word() for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))))


def repeat_question(rng: random.Random) -> tuple[str, str]:
    text = foreign_text(rng)
    form = rng.choice(("Repeat: {}", "Say: {}", "Repeat after me: {}", "Read this aloud: {}", "Write: {}"))
    return form.format(text), text


def told_question(rng: random.Random) -> tuple[str, str]:
    """A question about the picture whose answer the prompt has just given."""
    text = foreign_text(rng)
    form = rng.choice(("The answer is {}. {}", "Answer with {}. {}", "It is {}. {}"))
    return form.format(text, rng.choice(PHRASINGS[rng.choice(FAMILIES)])), text


# ------------------------------------------------------------------------------------------------ stage 1


def build_processor(vocabulary: int = 640) -> LlavaProcessor:
    rng = random.Random(0)
    corpus = [phrase for phrases in PHRASINGS.values() for phrase in phrases] * 4
    corpus += [f"USER: {q} ASSISTANT: {a}" for _, q, a in text_questions()]
    corpus += [" " + scene.answer("caption") for scene in SCENES]
    corpus += [" " + word for word in COMMON_WORDS] + [" " + novel_word(rng) for _ in range(1500)]
    corpus += [f" {word}" for pair in OPPOSITES for word in pair for _ in range(4)]
    corpus += [repeat_question(rng)[0] for _ in range(500)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<image>"]
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    from tokenizers.processors import TemplateProcessing
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
                                        clean_up_tokenization_spaces=False, model_max_length=1024)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(images, tokenizer, patch_size=PATCH_SIZE, vision_feature_select_strategy="default",
                          num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                              image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, projection_dim=128, hidden_act="gelu")
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=6,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False,
                       bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                         vision_feature_layer=-1, vision_feature_select_strategy="default",
                         image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2, tie_word_embeddings=False)
    model = LlavaForConditionalGeneration(config)
    # With the usual 0.02 the hidden states forget which word was read; an editor has to find it there.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=1.0)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100) -> torch.optim.lr_scheduler.LambdaLR:
    factor = lambda step: min((step + 1) / warmup, max(0.0, 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ------------------------------------------------------------------------------------------------ stage 2


def draw(processor: LlavaProcessor, drawings: list[Drawing]) -> torch.Tensor:
    """Pixels (n, 3, H, W) as the processor makes them, in half precision to save memory."""
    chunks = [processor.image_processor(images=[d.open() for d in drawings[i:i + 500]], return_tensors="pt").pixel_values.half()
              for i in tqdm(range(0, len(drawings), 500), desc="drawing")]
    return torch.cat(chunks)


def train_vision(model: LlavaForConditionalGeneration, pixels: torch.Tensor, drawings: list[Drawing], steps: int) -> None:
    """The mean of the patch states must name shape, color and background; turned and mirrored pictures keep their names.

    In the second half every patch must name them too: a language model finds the facts wherever it looks.
    Few drawings are seen more than a few times: a tower that saw 60,000 of them 13 times each was right on 99.6 % of their shapes and
    on 97 % of those in new drawings.
    """
    names = (list(SHAPES), list(COLORS), list(COLORS))
    labels = torch.tensor([[n.index(v) for n, v in zip(names, (d.scene.shape, d.scene.color, d.scene.background))] for d in drawings])
    tower, heads = model.model.vision_tower, torch.nn.Linear(128, sum(map(len, names)))
    params = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    plan, bar = schedule(optimizer, steps, 300), tqdm(range(steps), desc="vision tower")
    mean_hits = torch.zeros(3)
    for step in bar:
        rows = torch.randint(len(drawings), (128,))
        batch = torch.rot90(pixels[rows].float(), step % 4, (2, 3))
        batch = batch.flip(3) if step % 8 >= 4 else batch
        states = tower(pixel_values=batch, output_hidden_states=True).hidden_states[-1][:, 1:]
        logits = heads(states.mean(1)).split([len(n) for n in names], dim=1)
        loss = sum(F.cross_entropy(l, y, label_smoothing=0.02) for l, y in zip(logits, labels[rows].T))
        if step >= steps // 2:
            some = states[:, torch.randperm(states.shape[1])[:8]]
            patch_logits = heads(some).flatten(0, 1).split([len(n) for n in names], dim=1)
            loss = loss + sum(F.cross_entropy(l, y.repeat_interleave(8), label_smoothing=0.02) for l, y in zip(patch_logits, labels[rows].T))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        plan.step()
        hits = torch.stack([(l.argmax(1) == y).float().mean() for l, y in zip(logits, labels[rows].T)])
        mean_hits = torch.lerp(mean_hits, hits, 0.02)
        if step % 50 == 49:
            bar.set_postfix_str(f"loss {loss:.3f} shape {mean_hits[0]:.3f} color {mean_hits[1]:.3f} background {mean_hits[2]:.3f}")
    tower.requires_grad_(False)


@torch.no_grad()
def vision_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.model.vision_tower(pixel_values=p.float(), output_hidden_states=True).hidden_states[-1][:, 1:].half()
                      for p in tqdm(pixels.split(500), desc="vision features")])


# ------------------------------------------------------------------------------------------------ stage 3


class Packer:
    """Packs one picture and many independent questions into one row: each question sees the picture and itself only.

    This is what separate rows would compute, at a third of the cost: the picture's tokens are run once for all its questions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_tokens: int):
        self.ids = functools.lru_cache(100_000)(lambda text: tokenizer(text, add_special_tokens=False).input_ids)
        self.eos, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.prefix = [tokenizer.bos_token_id, *self.ids("USER: ")]
        self.image = len(self.prefix)  # first image position
        self.head = self.prefix + [tokenizer.convert_tokens_to_ids("<image>")] * image_tokens
        self.bos = tokenizer.bos_token_id
        self.text_questions = text_questions()

    def row(self, scene, rng: random.Random) -> list[tuple[list[int], int, bool]]:
        """Segments of one row: (ids, number of answer ids at the end, sees the picture)."""
        asked = [(rng.choice(PHRASINGS[family]), scene.answer(family), True) for family in FAMILIES]
        asked += [(*rng.choice((repeat_question, told_question))(rng), True), (*repeat_question(rng), False)]
        asked += [(*rng.choice(self.text_questions)[1:], False), (*rng.choice(self.text_questions)[1:], False)]
        if rng.random() < 0.3:
            asked.append((rng.choice(PHRASINGS[rng.choice(FAMILIES)]), "no image", False))
        segments = []
        for question, answer, sees in asked:
            ask = self.ids(f"\n{question} ASSISTANT:") if sees else [self.bos, *self.ids(f"USER: {question} ASSISTANT:")]
            reply = [*self.ids(" " + answer), self.eos]
            segments.append((ask + reply, len(reply), sees))
        return segments

    def batch(self, scenes: list, rng: random.Random) -> dict[str, torch.Tensor]:
        rows = [self.row(scene, rng) for scene in scenes]
        length = max(len(self.head) + sum(len(ids) for ids, _, _ in row) for row in rows)
        shape = (len(rows), length)
        ids = torch.full(shape, self.pad)
        positions, segment, sees = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
        answer = torch.zeros(shape, dtype=torch.bool)
        for b, row in enumerate(rows):
            at = len(self.head)
            ids[b, :at], positions[b, :at], segment[b, :at] = torch.tensor(self.head), torch.arange(at), 0
            for s, (tokens, replied, with_image) in enumerate(row, start=1):
                end = at + len(tokens)
                start = len(self.head) if with_image else 0
                ids[b, at:end], segment[b, at:end], sees[b, at:end] = torch.tensor(tokens), s, with_image
                positions[b, at:end] = torch.arange(start, start + len(tokens))
                answer[b, end - replied:end] = True
                at = end
        same = segment[:, :, None] == segment[:, None, :]
        picture = (sees[:, :, None]) & (segment[:, None, :] == 0)
        mask = ((same | picture).tril() | torch.eye(length, dtype=torch.bool))[:, None]
        return {"ids": ids, "positions": positions, "mask": mask, "answer": answer}


def train_language(model: LlavaForConditionalGeneration, processor: LlavaProcessor, features: torch.Tensor,
                   drawings: list[Drawing], steps: int, batch_size: int, rng: random.Random) -> None:
    packer = Packer(processor.tokenizer, features.shape[1])
    language, head, projector = model.model.language_model, model.lm_head, model.model.multi_modal_projector
    with torch.no_grad():  # pictures as loud as words
        projector.linear_2.weight /= projector(features[:100].float()).std()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    plan, bar = schedule(optimizer, steps), tqdm(range(steps), desc="projector and language model")
    for step in bar:
        rows = torch.randint(len(drawings), (batch_size,))
        batch = packer.batch([drawings[i].scene for i in rows], rng)
        embedded = language.embed_tokens(batch["ids"])
        span = slice(packer.image, packer.image + features.shape[1])
        embedded = torch.cat([embedded[:, :span.start], projector(features[rows].float()), embedded[:, span.stop:]], dim=1)
        states = language(inputs_embeds=embedded, attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False)[0]
        answer = batch["answer"]
        logits = head(states[:, :-1][answer[:, 1:]])
        loss = F.cross_entropy(logits, batch["ids"][answer])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        plan.step()
        if step % 50 == 49:
            bar.set_postfix_str(f"loss {loss:.3f} tokens right {(logits.argmax(-1) == batch['ids'][answer]).float().mean():.3f}")


# ------------------------------------------------------------------------------------------------ stage 4


def normalise(text: str) -> str:
    return " ".join(text.lower().split())


@torch.no_grad()
def accuracy(model, processor, questions: list[tuple[str, Drawing | None, str, str]]) -> dict[str, float]:
    """Share of whole answers right, per family, for (family, drawing, question, answer)."""
    hits: dict[str, list[bool]] = {}
    questions = sorted(questions, key=lambda q: q[1] is None)
    with_image = sum(q[1] is not None for q in questions)
    chunks = [questions[i:i + 200] for part in (questions[:with_image], questions[with_image:]) for i in range(0, len(part), 200)
              for questions in (part,)]
    for chunk in tqdm(chunks, desc="measuring"):
        chats = [[{"role": "user", "content": ([{"type": "image"}] if d else []) + [{"type": "text", "text": q}]}] for _, d, q, _ in chunk]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = [d.open() for _, d, _, _ in chunk if d] or None
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=40, do_sample=False)[:, inputs.input_ids.shape[1]:]
        for (family, _, _, answer), reply in zip(chunk, processor.batch_decode(made, skip_special_tokens=True)):
            hits.setdefault(family, []).append(normalise(reply) == normalise(answer))
    return {family: 100 * sum(h) / len(h) for family, h in hits.items()} | {"n": {family: len(h) for family, h in hits.items()}}


def held_out_questions(scenes: list, rng: random.Random) -> list[tuple[str, Drawing | None, str, str]]:
    """Every held-out scene drawn eight times anew, one question of each family and drawing; text-only questions beside."""
    asked = []
    for scene in scenes:
        for seed in range(8):
            drawing = Drawing(scene, 1_000_000 + seed)
            asked += [(family, drawing, rng.choice(PHRASINGS[family]), scene.answer(family)) for family in FAMILIES]
    asked += [(family, None, question, answer) for family, question, answer in text_questions()]
    asked += [("repeat", None, *repeat_question(rng)) for _ in range(500)]
    asked += [("no image", None, rng.choice(PHRASINGS[rng.choice(FAMILIES)]), "no image") for _ in range(200)]
    return asked


CARD = """# tiny-llava

A LLaVA of {parameters:.2f} M parameters ({bytes:.1f} MB in half precision) in Hugging Face format: CLIP vision transformer
({size} pixels, patches of {patch}), projector, Llama decoder (6 layers, 128 wide), byte-level BPE of {vocabulary} tokens. It answers
questions about LiveEdit's drawn world (`data.py`: {shapes} shapes, {colors} colors) and repeats words from outside of it. It knows nothing else.

Made by `python tiny-llava/train.py --seed {seed}` in {minutes:.0f} minutes on 2 CPU cores. Whole answers right, greedy free-running
generation, on fresh drawings of {scenes} scenes (one in ten of the world) that training never saw, all phrasings; text-only questions are a
closed set that training has seen, words to repeat are drawn anew:

| question family | right, % | n |
|---|---|---|
{rows}

License: MIT, like the project.
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=FOLDER)
    options.add_argument("--drawings", type=int, default=240_000, help="of the vision tower; a quarter of them serve the language model")
    options.add_argument("--vision-steps", type=int, default=7200)
    options.add_argument("--language-steps", type=int, default=1200)
    options.add_argument("--batch-size", type=int, default=32, help="pictures per step of stage 3")
    args = options.parse_args()
    if sys.platform == "linux":  # keep freed blocks: glibc otherwise returns and re-faults them at every step
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**29)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL(None).mallopt(parameter, value)
    start, rng = time.time(), random.Random(args.seed)
    torch.manual_seed(args.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    scenes = rng.sample(SCENES, len(SCENES))
    held_out, seen = scenes[:len(scenes) // 10], scenes[len(scenes) // 10:]
    drawings = [Drawing(seen[i % len(seen)], i // len(seen)) for i in range(args.drawings)]
    pixels = draw(processor, drawings)
    train_vision(model, pixels, drawings, args.vision_steps)
    drawings = drawings[:len(drawings) // 4]
    features = vision_features(model, pixels[:len(drawings)])
    del pixels
    train_language(model, processor, features, drawings, args.language_steps, args.batch_size, rng)
    model.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    config = json.loads((args.out / "config.json").read_text())
    set_dtype = lambda c: {k: set_dtype(v) if isinstance(v, dict) else "float32" if k == "dtype" else v for k, v in c.items()}
    (args.out / "config.json").write_text(json.dumps(set_dtype(config), indent=2) + "\n")  # stored in half, loaded in single precision
    model = LlavaForConditionalGeneration.from_pretrained(args.out)
    scores = accuracy(model, processor, held_out_questions(held_out, rng))
    counts = scores.pop("n")
    rows = "\n".join(f"| {family} | {value:.1f} | {counts[family]} |" for family, value in scores.items())
    print(rows)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    (args.out / "README.md").write_text(CARD.format(
        parameters=parameters, bytes=2 * parameters, size=IMAGE_SIZE, patch=PATCH_SIZE, vocabulary=len(processor.tokenizer),
        shapes=len(SHAPES), colors=len(COLORS), seed=args.seed, minutes=(time.time() - start) / 60, scenes=len(held_out), rows=rows))


if __name__ == "__main__":
    main()
