"""Train LiveEdit, stream edits into a frozen vision-language model, re-test all of them, report.

    python run.py                                  tiny-llava, 500 edits of the drawn world
    python run.py --data FOLDER                    FOLDER holds train.json, eval.json and images/ (E-VQA's 11 fields)
    python run.py --editor output/editor --out again      stream into an editor that was trained before

Writes metrics.json, predictions.jsonl, edits.png and the editor to the output folder.
"""

import argparse
import contextlib
import ctypes
import json
import math
import random
import re
import string
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from data import (KINDS, LOCALITY, QUERY_NAMES, EditSample, Query, consistent_batches, drawn_stream, drawn_training,
                  read_records)
from liveedit import EDIT, GENERALITY as FOLLOWS, HARD_LOCALITY, LOCALITY as UNRELATED, LiveEdit, LiveEditConfig, Question, States
from router import Rows

SHORT_NAMES = {"tiny-llava": str(Path(__file__).resolve().parent / "tiny-llava"), "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf"}
MAIN_METRICS = QUERY_NAMES[:5]  # their mean is the paper's average
ROLES = {"reliability": EDIT, "text_generality": FOLLOWS, "modal_generality": FOLLOWS, "modal_locality": UNRELATED,
         "same_image": HARD_LOCALITY, "similar_image": HARD_LOCALITY}
CACHE_BYTES = 4 * 2**30  # hidden states of the training samples are kept in memory up to here, else computed at every step
ANSWERS_AT_ONCE = 128  # queries per forward pass of the evaluation


@dataclass
class Options:
    """Every field is an option of the command line."""

    model: str = "tiny-llava"  # a short name (tiny-llava, llava-1.5-7b), a hub id or a folder
    data: Path | None = None  # a folder with train.json, eval.json and images/; without it the drawn world
    edits: int = 500  # edits of the stream
    editor: Path | None = None  # a saved editor to load instead of training one
    out: Path = Path("output")  # output folder
    train_steps: int = 720  # steps of the editor's training
    train_samples: int = 10000  # edit samples of the drawn world to train on
    batch_size: int = 32  # edits per training step
    learning_rate: float = 3e-3  # of Adam
    seed: int = 0  # of training and of the stream
    device: str = "auto"  # auto (cuda, mps, cpu), or a torch device
    dtype: str = "auto"  # of the model: auto (the checkpoint's), float32, bfloat16, float16
    layer: int | None = None  # edit layer, counted from 0; default two thirds of the depth
    similarity: str = "cosine"  # of the visual filter: cosine or dot
    threshold: float | None = None  # a fixed threshold of the visual filter instead of the learned sentinel's


def parse_options(arguments: list[str] | None = None) -> Options:
    """The command line, generated from the fields of Options; a wrong value ends in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", Path(__file__).read_text(), re.M))
    for f in fields(Options):
        kind = next((k for k in (int, float, Path) if f.type == k or f.type == k | None), str)
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=f.default, help=f"{comments[f.name]} (default: {f.default})")
    options = Options(**vars(parser.parse_args(arguments)))
    for name, least in (("edits", 1), ("train_steps", 1), ("train_samples", 2), ("batch_size", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(options, name)}")
    if not options.learning_rate > 0:
        parser.error(f"--learning-rate must be positive, not {options.learning_rate}")
    if options.editor and options.editor.resolve() == (options.out / "editor").resolve():
        parser.error(f"--out {options.out} would overwrite the edits in --editor {options.editor}; choose another --out")
    if options.dtype != "auto" and not isinstance(getattr(torch, options.dtype, None), torch.dtype):
        parser.error(f"--dtype must be auto, float32, bfloat16 or float16, not {options.dtype}")
    return options


# ------------------------------------------------------------------------------------------------ loading


def load_samples(options: Options) -> tuple[list[EditSample], list[EditSample]]:
    """(training samples, stream of edits). Raises before any long work if data is missing, malformed or too little."""
    if options.data is None:
        return ([] if options.editor else drawn_training(options.train_samples, options.seed)), drawn_stream(options.edits, options.seed)
    train = [] if options.editor else read_records(options.data / "train.json", options.data / "images")
    stream = read_records(options.data / "eval.json", options.data / "images")
    return train, random.Random(options.seed).sample(stream, min(options.edits, len(stream)))


def load_model(options: Options):
    """Model and processor by the plain Hugging Face way."""
    name = SHORT_NAMES.get(options.model, options.model)
    device = options.device if options.device != "auto" else (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=options.dtype).to(device).eval()
    return model, AutoProcessor.from_pretrained(name)


def config_for(model, options: Options) -> LiveEditConfig:
    """The paper's settings at the width of a 7B model, scaled for small ones."""
    width = model.config.get_text_config().hidden_size
    tokens = getattr(model.config, "image_seq_length", None) or LiveEditConfig.sentinel_tokens
    return LiveEditConfig(layer=options.layer, module_dim=min(LiveEditConfig.module_dim, width), sentinel_tokens=tokens,
                          similarity=options.similarity, threshold=options.threshold)


# ------------------------------------------------------------------------------------------------ training


def question(query: Query) -> Question:
    return Question(query.image.open() if query.image else None, query.prompt, query.target)


class TrainingSet:
    """Training batches as hidden states of the edit layer; the frozen lower layers run once per sample if these fit in memory."""

    def __init__(self, editor: LiveEdit, samples: list[EditSample]):
        self.editor, self.samples = editor, samples
        self.names = [[name for name in ROLES if name in sample.queries] for sample in samples]
        first = self._capture(samples[:2])[0].hidden
        rows = sum(map(len, self.names))
        self.cached = rows * first[0].nbytes * 1.5 < CACHE_BYTES
        if self.cached:
            self.states, self.texts = self._capture(samples, progress=lambda chunks: tqdm(chunks, desc="hidden states of training"))
            starts = [0]
            for names in self.names:
                starts.append(starts[-1] + len(names))
            self.rows = [torch.arange(a, b) for a, b in zip(starts, starts[1:])]

    def _capture(self, samples: list[EditSample], progress=lambda chunks: chunks) -> tuple[States, Rows]:
        pictured = [question(s.queries[name]) for s in samples for name in ROLES if name in s.queries]
        texts = [question(s.queries["text_locality"]) for s in samples]
        states = self.editor.capture(pictured, progress=progress)
        text = self.editor.capture(texts)
        return states, Rows.gather(text.hidden, text.masks.prompt)

    def batch(self, chosen: list[int]) -> tuple[States, Tensor, Tensor, Rows]:
        """States, roles and owners of the pictured rows, and the prompt rows of the text-only questions."""
        device = self.editor.norm.weight.device
        if self.cached:
            states, texts = self.states.select(torch.cat([self.rows[i] for i in chosen]).to(device)), self.texts.select(chosen)
        else:
            states, texts = self._capture([self.samples[i] for i in chosen])
        role = torch.tensor([ROLES[name] for i in chosen for name in self.names[i]], device=device)
        owner = torch.tensor([b for b, i in enumerate(chosen) for _ in self.names[i]], device=device)
        return states, role, owner, Rows(texts.states.float(), texts.mask)


def train(editor: LiveEdit, samples: list[EditSample], options: Options) -> dict:
    """Adam on all losses of the method; after a short warm-up the learning rate falls along a cosine."""
    start = time.time()
    batch_size = min(options.batch_size, len(samples))
    batches = consistent_batches(samples, batch_size, random.Random(options.seed))
    next(batches)  # for callers other than main, too: a batch that cannot be made is reported before the long work
    training_set = TrainingSet(editor, samples)
    prepared = time.time()
    parameters = [p for p in editor.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate, fused=True)
    rate = lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / options.train_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = tqdm(range(options.train_steps), desc="training the editor")
    running: dict[str, float] = {}
    log = []
    for step in bar:
        losses = editor.training_losses(*training_set.batch(next(batches)))
        optimizer.zero_grad()
        losses["total"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for name, value in losses.items():
            running[name] = value.item() if name not in running else 0.95 * running[name] + 0.05 * value.item()
        if not math.isfinite(running["total"]):
            raise RuntimeError(f"the training loss is {running['total']} at step {step}; lower --learning-rate")
        if step % 20 == 19:
            bar.set_postfix_str(" ".join(f"{name} {value:.2f}" for name, value in running.items()))
        if step % 100 == 99:
            log.append({"step": step + 1, **{k: round(v, 4) for k, v in running.items()}})
    return {"steps": options.train_steps, "batch_size": batch_size, "samples": len(samples), "seconds": time.time() - start,
            "seconds_hidden_states": prepared - start, "trained_parameters": sum(p.numel() for p in parameters), "losses": log}


# ------------------------------------------------------------------------------------------------ metrics


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def token_accuracy(predicted: list[int], expected: list[int]) -> float:
    """Teacher-forced: the share of answer tokens (end of sequence left out) whose argmax is as expected."""
    return sum(p == e for p, e in zip(predicted, expected)) / len(expected)


@dataclass
class Answer:
    """What the model says to one query."""

    predicted: list[int]  # argmax at each token of the query's target, given the tokens before it
    target: list[int]
    generated: str  # greedy, from the prompt alone


@torch.no_grad()
def answer(editor: LiveEdit, queries: list[Query], longest: int) -> list[Answer]:
    """Answers of the model as it stands (edited, or the original under `editor.disabled()`), all by plain Hugging Face calls."""
    answers = []
    for start in range(0, len(queries), ANSWERS_AT_ONCE):
        chunk = [question(q) for q in queries[start:start + ANSWERS_AT_ONCE]]
        images, prompts, targets = ([getattr(q, name) for q in chunk] for name in ("image", "prompt", "target"))
        inputs = editor.encode(images, prompts, targets)
        predictions = editor.model(**inputs, use_cache=False).logits.argmax(-1)
        asked = editor.encode(images, prompts)
        made = editor.model.generate(**asked, max_new_tokens=longest, do_sample=False)[:, asked["input_ids"].shape[1]:]
        texts = editor.processor.batch_decode(made, skip_special_tokens=True)
        for labels, predicted, text in zip(inputs["labels"], predictions, texts):
            at = (labels != -100).nonzero().flatten()[:-1]  # without the end of sequence
            answers.append(Answer(predicted[at - 1].tolist(), labels[at].tolist(), text.strip()))
    return answers


def score(name: str, query: Query, before: Answer, after: Answer) -> tuple[float, float]:
    """(teacher-forced, free-running) in [0, 1]. Reliability and generality compare with the target, locality with the answer before the edits."""
    if name in LOCALITY:
        return token_accuracy(after.predicted, before.predicted), float(normalise(after.generated) == normalise(before.generated))
    return token_accuracy(after.predicted, after.target), float(normalise(after.generated) == normalise(query.target))


def mean(values) -> float | None:
    values = list(values)
    return 100 * sum(values) / len(values) if values else None


def summarise(results: list[dict], way: str) -> dict[str, float | None]:
    """Per cent for each query name; average: mean of the paper's five."""
    row = {name: mean(r[way] for r in results if r["query"] == name) for name in QUERY_NAMES}
    return row | {"average": mean(row[name] / 100 for name in MAIN_METRICS if row[name] is not None)}


# ------------------------------------------------------------------------------------------------ the stream


def evaluate(editor: LiveEdit, stream: list[EditSample], options: Options) -> tuple[list[dict], list[dict], dict]:
    """Rows of the report, all predictions, and the cost of editing."""
    flat = [(s, name, q) for s in stream for name, q in s.queries.items()]
    tokenizer = editor.processor.tokenizer
    longest = 4 + max(len(tokenizer(" " + q.target, add_special_tokens=False).input_ids) for _, _, q in flat)
    before: dict[int, Answer] = {}
    with editor.disabled():
        for start in tqdm(range(0, len(flat), ANSWERS_AT_ONCE), desc="answers before editing"):
            chunk = flat[start:start + ANSWERS_AT_ONCE]
            before |= {id(q): a for (_, _, q), a in zip(chunk, answer(editor, [q for _, _, q in chunk], longest))}
    predictions: list[dict] = []
    rows = [report_row(0, judge(stream, 0, before, before, predictions), None)]
    cost = {}
    for count in [n for n in (1, 10, 100) if n < len(stream)] + [len(stream)]:
        # Short streams start from the unedited model again until 100 edits are averaged.
        tested = stream if count == len(stream) else stream[:max(count, min(100, len(stream) // count * count))]
        results, kept = [], []
        for start in tqdm(range(0, len(tested), count), desc=f"streams of {count}"):
            part = tested[start:start + count]
            editor.reset()
            began = time.time()
            edits = editor.edit_many([question(s.edit) for s in part])
            cost = {"seconds_per_edit": (time.time() - began) / count, "bytes_per_edit": editor.experts.bytes_per_edit()}
            queries = [q for s in part for q in s.queries.values()]
            after = {id(q): a for q, a in zip(queries, answer(editor, queries, longest))}
            results += judge(part, count, before, after, predictions)
            kept += route(editor, part, [edit.id for edit in edits])
        rows.append(report_row(count, results, kept))
    return rows, predictions, cost


def judge(samples, count: int, before: dict[int, Answer], after: dict[int, Answer], predictions: list[dict]) -> list[dict]:
    """One result per query, also appended to the predictions."""
    results = []
    for sample in samples:
        for name, query in sample.queries.items():
            old, new = before[id(query)], after[id(query)]
            teacher_forced, free_running = score(name, query, old, new)
            picture = getattr(query.image, "path", None) or getattr(query.image, "scene", None)
            results.append({"edits": count, "kind": sample.kind, "query": name, "image": picture and str(picture), "prompt": query.prompt,
                            "expected": old.generated if name in LOCALITY else query.target, "before": old.generated,
                            "after": new.generated, "teacher_forced": teacher_forced, "free_running": free_running})
    predictions += results
    return results


def route(editor: LiveEdit, samples: list[EditSample], ids: list[int]) -> list[dict]:
    """For each query with an image: did the filter keep the sample's own expert, and how many in all?"""
    flat = [(name, query, own) for s, own in zip(samples, ids) for name, query in s.queries.items() if query.image]
    found = []
    for start in range(0, len(flat), ANSWERS_AT_ONCE):
        chunk = flat[start:start + ANSWERS_AT_ONCE]
        inputs = editor.encode([q.image.open() for _, q, _ in chunk], [q.prompt for _, q, _ in chunk])
        for (name, _, own), kept in zip(chunk, editor.explain(inputs)):
            found.append({"query": name, "own": any(k["id"] == own for k in kept), "kept": len(kept),
                          "weight": sum(k["weight"] for k in kept), "other": any(k["id"] != own for k in kept)})
    return found


def report_row(count: int, results: list[dict], kept: list[dict] | None) -> dict:
    """One object of metrics.json's "rows"."""
    kinds = [k for k in (*KINDS, "benchmark") if any(r["kind"] == k for r in results)]
    row = {"edits": count, "teacher_forced": summarise(results, "teacher_forced"), "free_running": summarise(results, "free_running"),
           "by_kind": {k: {way: summarise([r for r in results if r["kind"] == k], way) for way in ("teacher_forced", "free_running")}
                       for k in kinds}, "n": sum(r["query"] == "reliability" for r in results)}
    if kept is not None:
        row["router"] = {name: {"own_expert_kept": mean(k["own"] for k in kept if k["query"] == name),
                                "other_expert_kept": mean(k["other"] for k in kept if k["query"] == name),
                                "experts_kept": (mean(k["kept"] for k in kept if k["query"] == name) or 0) / 100,
                                "weight": (mean(k["weight"] for k in kept if k["query"] == name) or 0) / 100}
                         for name in QUERY_NAMES if any(k["query"] == name for k in kept)}
    return row


# ------------------------------------------------------------------------------------------------ report


def table(rows: list[dict]) -> str:
    """The table of the report as text."""
    columns = {"reliability": "Rel", "text_generality": "T-Gen", "modal_generality": "M-Gen", "text_locality": "T-Loc",
               "modal_locality": "M-Loc", "average": "Average", "same_image": "Same img", "similar_image": "Similar", "no_image": "No img"}
    lines = []
    for way, title in (("teacher_forced", "teacher-forced"), ("free_running", "free-running")):
        lines.append(f"{title:<16}" + "".join(f"{c:>9}" for c in columns.values()))
        for row in rows:
            label = "before editing" if row["edits"] == 0 else f"{row['edits']} edit" + "s" * (row["edits"] > 1)
            lines.append(f"{label:<16}" + "".join(f"{'-' if row[way][k] is None else format(row[way][k], '.1f'):>9}" for k in columns))
        last = rows[-1]["by_kind"]
        lines += [f"  {kind:<14}" + "".join(f"{'-' if v[way][k] is None else format(v[way][k], '.1f'):>9}" for k in columns)
                  for kind, v in last.items() if len(last) > 1] + [""]
    lines.append(f"{'router, ' + str(rows[-1]['edits']) + ' edits':<18}{'own kept %':>12}{'others kept %':>15}{'kept, mean':>12}{'weight, mean':>14}")
    for name, r in rows[-1]["router"].items():
        lines.append(f"{name:<18}{r['own_expert_kept']:>12.1f}{r['other_expert_kept']:>15.1f}{r['experts_kept']:>12.2f}{r['weight']:>14.3f}")
    lines.append("T-Loc and No img are 100 by construction: the visual filter never keeps an expert for a query without an image.")
    return "\n".join(lines)


def picture(stream: list[EditSample], predictions: list[dict], file: Path, shown: int = 6) -> None:
    """Some edits with their image, question, answers before and after, a rephrasing, another picture and a neighbor; wrong answers in red."""
    names = ("reliability", "text_generality", "modal_generality", "same_image", "similar_image")
    titles = ("edit", "rephrased", "another picture", "same image", "similar image")
    final = iter(predictions[-sum(len(s.queries) for s in stream):])
    results = [{name: next(final) for name in sample.queries} for sample in stream]
    kinds = sorted({s.kind for s in stream})
    chosen = [i for kind in kinds for i in [i for i, s in enumerate(stream) if s.kind == kind][:shown // len(kinds)]]
    cell, height, side = 290, 186, 96
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (cell * len(names) + 10, 24 + height * len(chosen)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((10 + column * cell, 5), title, fill="black", font=font)
    for row, i in enumerate(chosen):
        for column, name in enumerate(names):
            if name not in stream[i].queries:
                continue
            result, x, y = results[i][name], 10 + column * cell, 24 + row * height
            sheet.paste(stream[i].queries[name].image.open().resize((side, side)), (x, y))
            lines = [result["prompt"], f"before: {result['before']}", f"after: {result['after']}"]
            lines += [] if result["free_running"] else [f"expected: {result['expected']}"]
            for k, line in enumerate(lines):
                while pen.textlength(line, font=font) > cell - 14:
                    line = line[:-2].rstrip("….") + "…"
                pen.text((x, y + side + 4 + 16 * k), line, fill="black" if k < 2 else "darkgreen" if result["free_running"] else "firebrick", font=font)
    sheet.save(file)


def keep_freed_memory() -> None:
    """glibc gives big blocks back to the kernel after every step; for small models half the time then goes to page faults."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**29)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
                ctypes.CDLL(None).mallopt(parameter, value)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    keep_freed_memory()
    start = time.time()
    torch.manual_seed(options.seed)
    try:
        samples, stream = load_samples(options)
        if not options.editor:
            next(consistent_batches(samples, min(options.batch_size, len(samples)), random.Random(0)))  # does a batch fit together?
        options.out.mkdir(parents=True, exist_ok=True)
        model, processor = load_model(options)
        editor = (LiveEdit.from_pretrained(model, processor, options.editor) if options.editor
                  else LiveEdit(model, processor, config_for(model, options)))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        sys.exit(f"run.py: {error}")
    print(f"{options.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, frozen; editor: "
          f"{sum(p.numel() for p in editor.parameters()) / 1e6:.2f} M parameters at layer {editor.config.layer} of {len(editor._layers)}")
    training = None if options.editor else train(editor, samples, options)
    if training:
        editor.reset()
        editor.save_pretrained(options.out / "editor")
    rows, predictions, cost = evaluate(editor, stream, options)
    editor.save_pretrained(options.out / "editor")
    with open(options.out / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)
    picture(stream, predictions, options.out / "edits.png")
    metrics = {"options": {k: v if not isinstance(v, Path) else str(v) for k, v in asdict(options).items()}, "config": asdict(editor.config),
               "seed": options.seed, "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                                                  "python": sys.version.split()[0]},
               "training": training, **cost, "seconds": time.time() - start, "rows": rows}
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print("\n" + table(rows))
    print(f"{cost['seconds_per_edit'] * 1000:.1f} ms and {cost['bytes_per_edit'] / 1024:.1f} KiB per edit; "
          f"{(time.time() - start) / 60:.1f} minutes in all; everything in {options.out}/")


if __name__ == "__main__":
    main()
