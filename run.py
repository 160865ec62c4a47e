"""Train LiveEdit, stream edits into a frozen vision-language model, re-test all of them, report.

    python run.py                                  tiny-llava, 500 edits of the drawn world
    python run.py --data FOLDER                    FOLDER holds train.json, eval.json and images/ (E-VQA's 11 fields)
    python run.py --editor output/editor --out again      stream into an editor that was trained before
    python run.py ask --editor output/editor --image cat.png "What is this?"      one question, before and after

Writes metrics.json, predictions.jsonl, edits.png and the editor to the output folder.
"""

import argparse
import contextlib
import ctypes
import inspect
import json
import math
import os
import random
import re
import signal
import string
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from data import (BENCHMARKS, KINDS, LOCALITY, PORTABILITY, QUERY_NAMES, UPDATE_FORMS, EditSample, ImageFile, Query, benchmark_files, check_pictures,
                  consistent_batches, drawn_stream, drawn_training, drawn_updates, read_records, without_leaks)
from liveedit import (CHANGEABLE, EDIT, GENERALITY as FOLLOWS, HARD_LOCALITY, LOCALITY as UNRELATED, LiveEdit, LiveEditConfig, Question, States,
                      explanation_table, find_decoder_layers)
from router import Rows

SHORT_NAMES = {"tiny-llava": str(Path(__file__).resolve().parent / "tiny-llava"), "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf"}
MAIN_METRICS = QUERY_NAMES[:5]  # their mean is the paper's average
ROLES = {"reliability": EDIT, "text_generality": FOLLOWS, "modal_generality": FOLLOWS, "modal_locality": UNRELATED,
         "same_image": HARD_LOCALITY, "similar_image": HARD_LOCALITY}
CACHE_BYTES = 4 * 2**30  # hidden states of the training samples are kept in memory up to here, else computed at every step
DTYPES = ("auto", "float32", "bfloat16", "float16")
CHECKPOINT_FILE = "training.pt"
CHECKPOINT_SECONDS = 600  # between two checkpoints of a training


class Settings(NamedTuple):
    """How an editor is trained, where the command line does not say otherwise."""

    train_steps: int
    train_samples: int
    batch_size: int
    learning_rate: float


# Models of 7B, with Adam; the editor's own settings scale with the model in `config_for`.
PAPER = Settings(train_steps=40_000, train_samples=20_000, batch_size=8, learning_rate=1e-4)
PAPER_CUT = 10_000  # step at which the paper's learning rate falls to a tenth
# Hidden sizes below SMALL_WIDTH: many cheap steps, Muon for the matrices, a warm-up and a cosine.
SMALL = Settings(train_steps=1200, train_samples=14_000, batch_size=32, learning_rate=3e-3)
SMALL_WIDTH = 1024


@dataclass
class Options:
    """Every field is an option of the command line."""

    model: str = "tiny-llava"  # a short name (tiny-llava, llava-1.5-7b), a hub id or a folder
    data: str | None = None  # evqa, eic, vlkeb, vlkeb-onehop, a folder with train.json, eval.json and images/, or an evaluation .json file; without it the drawn world
    data_root: Path | None = None  # the folder of a benchmark's files as published (easy-edit-mm, VLKEB)
    image_root: Path | None = None  # its image folder, where it is not the published one
    prompt_style: str = "chat"  # chat (one form for all prompts), or official (the benchmarks' own, for the paper's numbers)
    exclude_leaks: bool = False  # leave out of training the locality questions that the evaluation asks too
    edits: int = 500  # edits of the stream
    editor: Path | None = None  # a saved editor to load instead of training one
    out: Path = Path("output")  # output folder
    train_steps: int | None = None  # steps of the editor's training; default by the model's size, like the next three
    train_samples: int | None = None  # edit samples of the drawn world to train on
    batch_size: int | None = None  # edits per training step
    learning_rate: float | None = None  # of Adam
    eval_batch_size: int | None = None  # questions per forward pass outside of training; default by the model's size
    resume: bool = False  # continue an interrupted training from the checkpoint in the output folder
    dry_run: bool = False  # check data and model configuration, say what was found, load no weights
    seed: int = 0  # of training and of the stream
    device: str = "auto"  # auto (cuda, mps, cpu), or a torch device
    dtype: str = "auto"  # of the model: auto (the checkpoint's), float32, bfloat16, float16
    layer: int | None = None  # edit layer, counted from 0; default two thirds of the depth
    similarity: str | None = None  # of the visual filter: cosine (without this option) or dot
    threshold: float | None = None  # a fixed threshold of the visual filter instead of the learned sentinel's
    same_fact: str | None = None  # older edits that a new one replaces: router (what it takes for the same fact), or exact (same picture and question)
    expert_dtype: str | None = None  # precision of stored experts: float16 or float32


def parse_options(arguments: list[str] | None = None) -> Options:
    """The command line, generated from the fields of Options; a wrong value ends in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", Path(__file__).read_text(), re.M))
    for f in fields(Options):
        name, text = "--" + f.name.replace("_", "-"), f"{comments[f.name]} (default: {f.default})"
        if f.type is bool:
            parser.add_argument(name, action="store_true", help=text)
        else:
            kind = next((k for k in (int, float, Path) if f.type == k or f.type == k | None), str)
            parser.add_argument(name, type=kind, default=f.default, help=text)
    options = Options(**vars(parser.parse_args(arguments)))
    for name, least in (("edits", 1), ("train_steps", 1), ("train_samples", 2), ("batch_size", 2), ("eval_batch_size", 1)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if options.learning_rate is not None and not options.learning_rate > 0:
        parser.error(f"--learning-rate must be positive, not {options.learning_rate}")
    if options.editor and options.editor.resolve() == (options.out / "editor").resolve():
        parser.error(f"--out {options.out} would overwrite the edits in --editor {options.editor}; choose another --out")
    if options.dtype not in DTYPES:
        parser.error(f"--dtype must be one of {', '.join(DTYPES)}, not {options.dtype}")
    if options.data is None and (options.data_root or options.image_root or options.exclude_leaks):
        parser.error("--data-root, --image-root and --exclude-leaks belong to benchmark files: --data is missing")
    if options.prompt_style == "official" and options.data not in BENCHMARKS:
        parser.error(f"--prompt-style official is the form of a published benchmark: --data must be one of {', '.join(BENCHMARKS)}")
    if options.resume and options.editor:
        parser.error("--resume continues a training, --editor loads a trained editor: choose one")
    for name in ("layer", "similarity", "train_steps", "train_samples", "batch_size", "learning_rate"):
        if options.editor and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} belongs to the training of an editor, but --editor loads one that is trained")
    checkpoint = options.out / CHECKPOINT_FILE
    if options.resume and not checkpoint.is_file():
        parser.error(f"there is no training to resume: {checkpoint} does not exist")
    if checkpoint.exists() and not (options.resume or options.editor or options.dry_run):
        parser.error(f"{checkpoint} is an interrupted training: continue it with --resume, delete it, or choose another --out")
    return options


# ------------------------------------------------------------------------------------------------ loading


def with_defaults(options: Options, width: int) -> Options:
    """The options with what was not given filled in for a model of this hidden size."""
    settings = (SMALL if width < SMALL_WIDTH else PAPER)._asdict() | {"eval_batch_size": max(4, 2**14 // width)}
    return replace(options, **{name: value for name, value in settings.items() if getattr(options, name) is None})


def load_samples(options: Options) -> tuple[list[EditSample], list[EditSample]]:
    """(training samples, stream of edits). Raises before any long work if data is missing, malformed or too little."""
    if options.data is None:
        return ([] if options.editor else drawn_training(options.train_samples, options.seed)), drawn_stream(options.edits, options.seed)
    files = benchmark_files(options.data, options.data_root, options.image_root)
    if not options.editor and files.train == files.eval:
        raise ValueError(f"--data {options.data} has no \"eval\" in its name, so no training file can be found beside it; rename it, or load a "
                         "trained editor with --editor")
    official = options.data if options.prompt_style == "official" else None
    train = [] if options.editor else read_records(files.train, files.images, official)
    stream = read_records(files.eval, files.images, official)
    stream = random.Random(options.seed).sample(stream, min(options.edits, len(stream)))
    if options.exclude_leaks:
        train, left_out = without_leaks(train, stream)
        print(f"{left_out} locality questions of the training also stand in the evaluation and are left out")
    pictures = check_pictures(train + stream, progress=lambda paths: tqdm(paths, desc="checking pictures", disable=len(paths) < 2000))
    print(f"{options.data}: {len(train)} training and {len(stream)} evaluation records, {pictures} pictures")
    return train, stream


def full_name(options: Options) -> str:
    return SHORT_NAMES.get(options.model, options.model)


def empty_model(options: Options):
    """The model without weights, from its configuration alone: enough to check that it can be edited."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(full_name(options)))


def load_model(options: Options):
    """Model and processor by the plain Hugging Face way."""
    name = full_name(options)
    device = options.device if options.device != "auto" else (
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (ImportError, AttributeError) as error:  # from deep inside, where a package is missing
        raise RuntimeError(f"the processor of {name} needs a package that is not installed, usually torchvision: {error}") from error
    return AutoModelForImageTextToText.from_pretrained(name, dtype=options.dtype).to(device).eval(), processor


def config_for(model, options: Options) -> LiveEditConfig:
    """The paper's settings at the width of a 7B model, scaled for small ones."""
    width = model.config.get_text_config().hidden_size
    tokens = getattr(model.config, "image_seq_length", None) or LiveEditConfig.sentinel_tokens
    given = {name: value for name in ("layer", "similarity", *CHANGEABLE) if (value := getattr(options, name)) is not None}
    return LiveEditConfig(module_dim=min(LiveEditConfig.module_dim, width), sentinel_tokens=tokens, prompt_style=options.prompt_style,
                          # The pre-activations of an expert grow with the root of the width: so do small models get the paper's size.
                          gain=LiveEditConfig.gain * max(1.0, (4096 / width) ** 0.5), **given)


# ------------------------------------------------------------------------------------------------ training


def question(query: Query) -> Question:
    return Question(query.image.open() if query.image else None, query.prompt, query.target)


class TrainingSet:
    """Training batches as hidden states of the edit layer; the frozen lower layers run once per sample if these fit in memory."""

    def __init__(self, editor: LiveEdit, samples: list[EditSample], rows_at_once: int):
        self.editor, self.samples, self.rows_at_once = editor, samples, rows_at_once
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
            self.text_row = list(accumulate(("text_locality" in s.queries for s in samples), initial=0))

    def _capture(self, samples: list[EditSample], progress=lambda chunks: chunks) -> tuple[States, Rows | None]:
        pictured = [question(s.queries[name]) for s in samples for name in ROLES if name in s.queries]
        texts = [question(s.queries["text_locality"]) for s in samples if "text_locality" in s.queries]
        states = self.editor.capture(pictured, self.rows_at_once, progress)
        if not texts:
            return states, None
        text = self.editor.capture(texts, self.rows_at_once)
        return states, Rows.gather(text.hidden, text.masks.prompt)

    def batch(self, chosen: list[int]) -> tuple[States, Tensor, Tensor, Rows | None]:
        """States, roles and owners of the pictured rows, and the prompt rows of the text-only questions, if there are any."""
        device = self.editor.norm.weight.device
        if self.cached:
            states = self.states.select(torch.cat([self.rows[i] for i in chosen]).to(device))
            asked = [self.text_row[i] for i in chosen if "text_locality" in self.samples[i].queries]
            texts = self.texts.select(asked) if asked else None
        else:
            states, texts = self._capture([self.samples[i] for i in chosen])
        role = torch.tensor([ROLES[name] for i in chosen for name in self.names[i]], device=device)
        owner = torch.tensor([b for b, i in enumerate(chosen) for _ in self.names[i]], device=device)
        return states, role, owner, texts and Rows(texts.states.float(), texts.mask)


def learning_rate_factor(step: int, options: Options, width: int) -> float:
    """Of the learning rate at a step: the paper's cut to a tenth for big models, a warm-up and a cosine for small ones."""
    if width >= SMALL_WIDTH:
        return 0.1 if step >= PAPER_CUT else 1.0
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / options.train_steps))


@contextlib.contextmanager
def interrupts_noted():
    """Inside, the first Ctrl-C only fills the list that is given, so that a step is never cut in two; a second one interrupts."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread gets signals
        return
    usual = signal.getsignal(signal.SIGINT)

    def note(number, frame):
        noted.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, usual)


@dataclass
class Training:
    """What a checkpoint holds: all that the next step depends on."""

    editor: LiveEdit
    optimizers: list[torch.optim.Optimizer]
    options: dict  # those that the steps depend on
    step: int = 0
    seconds: float = 0.0
    running: dict[str, float] = field(default_factory=dict)  # moving averages of the losses
    log: list[dict] = field(default_factory=list)

    KEPT = ("options", "step", "seconds", "running", "log")

    def save(self, file: Path) -> None:
        """Atomic: an older checkpoint stays until this one is whole."""
        content = {name: getattr(self, name) for name in self.KEPT} | {
            "editor": self.editor.state_dict(), "trained_steps": self.editor.trained_steps, "optimizers": [o.state_dict() for o in self.optimizers],
            "random": torch.get_rng_state(), "random_cuda": torch.cuda.get_rng_state_all()}
        draft = file.with_suffix(".new")
        with open(draft, "wb") as out:
            torch.save(content, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(draft, file)

    def load(self, file: Path) -> None:
        """Raises ValueError if the file is damaged, or the training was another one."""
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
            saved = content["options"]
        except Exception as error:  # torch.load has many kinds for a file that is cut off or of something else
            raise ValueError(f"{file} is damaged or no checkpoint of a training; delete it to start anew ({type(error).__name__})") from error
        differing = [f"{key} {saved.get(key)} (here {value})" for key, value in self.options.items() if saved.get(key) != value]
        if differing:
            raise ValueError(f"{file} is of a training with other options: {', '.join(differing)}")
        self.editor.load_state_dict(content["editor"])
        self.editor.trained_steps = content["trained_steps"]
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name in self.KEPT:
            setattr(self, name, content[name])
        torch.set_rng_state(content["random"])
        torch.cuda.set_rng_state_all(content["random_cuda"])


def make_optimizers(editor: LiveEdit, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Adam for big models as in the paper. For small ones Muon trains the matrices, at ten times the rate.

    Differs from the paper: in one trial of 600 steps on the tiny LLaVA the average at 500 edits was 94.7 so, 93.2 with Adam alone.
    """
    parameters = [p for p in editor.parameters() if p.requires_grad]
    small = editor.norm.weight.numel() < SMALL_WIDTH
    optimizers = [torch.optim.Adam([p for p in parameters if p.dim() != 2 or not small], lr=learning_rate, fused=True)]
    optimizers += [torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=10 * learning_rate, weight_decay=0.0)] if small else []
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def start_training(editor: LiveEdit, options: Options) -> Training:
    """A fresh training, or with --resume the one of the checkpoint."""
    kept = ("data", "prompt_style", "exclude_leaks", "train_steps", "train_samples", "batch_size", "learning_rate", "seed")
    training = Training(editor, make_optimizers(editor, options.learning_rate), {name: getattr(options, name) for name in kept} | {"config": asdict(editor.config)})
    if options.resume:
        training.load(options.out / CHECKPOINT_FILE)
    return training


def train(training: Training, samples: list[EditSample], options: Options) -> dict:
    """Adam on all losses of the method. Ctrl-C saves a checkpoint in the output folder and exits; --resume continues exactly."""
    editor, optimizers, start = training.editor, training.optimizers, time.time() - training.seconds
    batch_size = min(options.batch_size, len(samples))
    batches = consistent_batches(samples, batch_size, random.Random(options.seed))
    for _ in range(training.step):
        next(batches)
    training_set, parameters = TrainingSet(editor, samples, options.eval_batch_size), [p for p in editor.parameters() if p.requires_grad]
    prepared = saved = time.time()
    width, checkpoint = editor.norm.weight.numel(), options.out / CHECKPOINT_FILE
    bar = tqdm(range(training.step, options.train_steps), initial=training.step, total=options.train_steps, desc="training the editor")
    with interrupts_noted() as interrupts:
        for step in bar:
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["initial_lr"] * learning_rate_factor(step, options, width)
            losses = editor.training_losses(*training_set.batch(next(batches)))
            editor.zero_grad()
            losses["total"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            training.step, training.seconds = step + 1, time.time() - start
            note_losses(training, losses, bar, every=max(1, min(100, options.train_steps // 10)))
            if interrupts or time.time() - saved > CHECKPOINT_SECONDS:
                training.save(checkpoint)
                saved = time.time()
            if interrupts:
                sys.exit(f"interrupted after step {training.step}; the same command with --resume continues from {checkpoint}")
    return {"steps": options.train_steps, "batch_size": batch_size, "samples": len(samples), "seconds": training.seconds,
            "seconds_hidden_states": prepared - start, "trained_parameters": sum(p.numel() for p in parameters), "losses": training.log}


def note_losses(training: Training, losses: dict[str, Tensor], bar: tqdm, every: int) -> None:
    """Moving averages for the progress bar and the log. Raises FloatingPointError if the training diverged."""
    running = training.running
    for name, value in losses.items():
        running[name] = value.item() if name not in running else 0.95 * running[name] + 0.05 * value.item()
    if not math.isfinite(running["total"]):
        raise FloatingPointError(f"the training loss is {running['total']} at step {training.step}; lower --learning-rate")
    if training.step % 20 == 0:
        bar.set_postfix_str(" ".join(f"{name} {value:.2f}" for name, value in running.items()))
    if training.step % every == 0:
        training.log.append({"step": training.step, **{k: round(v, 4) for k, v in running.items()}})


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
def answer(editor: LiveEdit, queries: list[Query], longest: int, at_once: int = 128) -> list[Answer]:
    """Answers of the model as it stands (edited, or the original under `editor.disabled()`), all by plain Hugging Face calls.

    longest: tokens to generate at most; at_once: queries per forward pass.
    """
    answers, saves_logits = [], "logits_to_keep" in inspect.signature(editor.model.forward).parameters
    for start in range(0, len(queries), at_once):
        chunk = [question(q) for q in queries[start:start + at_once]]
        images, prompts, targets = ([getattr(q, name) for q in chunk] for name in ("image", "prompt", "target"))
        inputs = editor.encode(images, prompts, targets)
        if saves_logits:  # answers stand at the end of the rows, behind one token that predicts the first of theirs
            kept = int((inputs["labels"] != -100).any(0).sum()) + 1
            inputs |= {"labels": inputs["labels"][:, -kept:], "logits_to_keep": kept}
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
    names = QUERY_NAMES + (PORTABILITY,) * any(r["query"] == PORTABILITY for r in results)
    row = {name: mean(r[way] for r in results if r["query"] == name) for name in names}
    return row | {"average": mean(row[name] / 100 for name in MAIN_METRICS if row[name] is not None)}


# ------------------------------------------------------------------------------------------------ the stream


def evaluate(editor: LiveEdit, stream: list[EditSample], options: Options) -> tuple[list[dict], list[dict], dict]:
    """Rows of the report, all predictions, and the cost of editing."""
    at_once = options.eval_batch_size
    flat = [(s, name, q) for s in stream for name, q in s.queries.items()]
    tokenizer = editor.processor.tokenizer
    longest = 4 + max(len(tokenizer(" " + q.target, add_special_tokens=False).input_ids) for _, _, q in flat)
    before: dict[int, Answer] = {}
    with editor.disabled():
        for start in tqdm(range(0, len(flat), at_once), desc="answers before editing"):
            chunk = flat[start:start + at_once]
            before |= {id(q): a for (_, _, q), a in zip(chunk, answer(editor, [q for _, _, q in chunk], longest, at_once))}
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
            edits = editor.edit_many([question(s.edit) for s in part], at_once)
            cost = {"seconds_per_edit": (time.time() - began) / count, "bytes_per_edit": editor.experts.bytes_per_edit()}
            queries = [q for s in part for q in s.queries.values()]
            after = {id(q): a for q, a in zip(queries, answer(editor, queries, longest, at_once))}
            results += judge(part, count, before, after, predictions)
            kept += route(editor, part, [edit.id for edit in edits], at_once)
        rows.append(report_row(count, results, kept))
    return rows, predictions, cost


def evaluate_updates(editor: LiveEdit, stream: list[EditSample], options: Options) -> dict:
    """A stream in which a fifth of the edits re-edits earlier facts: how often the newest and the old answer is given, in per cent,
    to the question of the first edit and to that of the update; and how many edits replaced one of another fact, or missed theirs."""
    count = len(stream) // 5
    facts = stream[:len(stream) - count]
    updates = drawn_updates(facts, count, options.seed)
    editor.reset()
    first = editor.edit_many([question(s.edit) for s in facts], options.eval_batch_size)
    again = editor.edit_many([question(u.edit) for u in updates], options.eval_batch_size)
    fact_of = {e.id: q.fact for e, q in zip([*first, *again], [*(s.edit for s in facts), *(u.edit for u in updates)])}
    wrong = [e for e in [*first, *again] if any(fact_of[old] != fact_of[e.id] for old in e.replaces)]
    asked = [replace(query, target=u.edit.target) for u in updates for query in (facts[u.sample].edit, u.edit)]
    answers = answer(editor, asked, 4 + max(len(editor.processor.tokenizer(" " + q.target).input_ids) for q in asked), options.eval_batch_size)
    said = [normalise(a.generated) for a in answers]
    rows = [{"form": u.form, "newest": answered == normalise(u.edit.target), "old": answered == normalise(facts[u.sample].edit.target),
             "replaced": first[u.sample].id in edit.replaces}
            for n, (u, edit) in enumerate(zip(updates, again)) for answered in said[2 * n:2 * n + 2]]
    shares = lambda rows: {key: mean(r[key] for r in rows) for key in ("newest", "old", "replaced")}
    return {"edits": len(stream), "n": count, "false_replacements": mean(e in wrong for e in [*first, *again]), **shares(rows),
            "forms": {form: shares([r for r in rows if r["form"] == form]) for form in UPDATE_FORMS if any(r["form"] == form for r in rows)}}


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


def route(editor: LiveEdit, samples: list[EditSample], ids: list[int], at_once: int = 128) -> list[dict]:
    """For each query with an image: did the filter keep the sample's own expert, and how many in all?"""
    flat = [(name, query, own) for s, own in zip(samples, ids) for name, query in s.queries.items() if query.image]
    found = []
    for start in range(0, len(flat), at_once):
        chunk = flat[start:start + at_once]
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
                         for name in (*QUERY_NAMES, PORTABILITY) if any(k["query"] == name for k in kept)}
    return row


# ------------------------------------------------------------------------------------------------ report


def table(rows: list[dict]) -> str:
    """The table of the report as text."""
    columns = {"reliability": "Rel", "text_generality": "T-Gen", "modal_generality": "M-Gen", "text_locality": "T-Loc",
               "modal_locality": "M-Loc", "average": "Average", "same_image": "Same img", "similar_image": "Similar", "no_image": "No img"}
    columns |= {PORTABILITY: "Port"} if PORTABILITY in rows[0]["teacher_forced"] else {}
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


def updates_table(updates: dict) -> str:
    """The update stream as text: how often which answer is given, and whether the update put the older edit out of force."""
    lines = [f"{str(updates['n']) + ' updates in ' + str(updates['edits']) + ' edits':<26}{'newest answer %':>17}{'old answer %':>14}{'replaced %':>12}"]
    lines += [f"{label:<26}{row['newest']:>17.1f}{row['old']:>14.1f}{row['replaced']:>12.1f}" for label, row in
              [*((f"  {form}", row) for form, row in updates["forms"].items()), ("all", updates)]]
    return "\n".join([*lines, f"edits that replaced one of another fact: {updates['false_replacements']:.1f} %"])


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


def peak_memory() -> str:
    """Of this process and, where there is one, of the GPU, in GiB."""
    parts = []
    with contextlib.suppress(ImportError):  # not on Windows
        import resource
        unit = 2**30 if sys.platform == "darwin" else 2**20
        parts.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB")
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU")
    return " and ".join(parts)


def prepare(options: Options):
    """(options with all defaults, training samples, stream, editor on the loaded model, training or None). Raises before any long work.

    Data and model configuration are checked before any weights are loaded; with --dry-run the program ends there.
    """
    empty = empty_model(options)
    config, width = config_for(empty, options), empty.config.get_text_config().hidden_size
    layer = LiveEdit(empty, None, config).config.layer  # raises if the model cannot be edited there
    options = with_defaults(options, width)
    samples, stream = load_samples(options)
    if not options.editor:
        next(consistent_batches(samples, min(options.batch_size, len(samples)), random.Random(0)))  # does a batch fit together?
        print(", ".join(f"{name.replace('_', ' ')} {getattr(options, name)}" for name in ("train_steps", "batch_size", "learning_rate"))
              + f"; width {config.module_dim}, rank {config.rank}, slots {config.slots}, heads {config.heads}, gain {config.gain:.2f}")
    if options.dry_run:
        print(f"{type(empty).__name__} {full_name(options)}: {sum(p.numel() for p in empty.parameters()) / 1e6:.1f} M parameters, "
              f"edit layer {layer} of {len(find_decoder_layers(empty)[0])}; nothing was loaded")
        sys.exit()
    options.out.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(options)
    if options.editor:
        changes = {name: value for name in CHANGEABLE if (value := getattr(options, name)) is not None}
        editor = LiveEdit.from_pretrained(model, processor, options.editor, **changes)
        if editor.config.prompt_style != options.prompt_style:
            raise ValueError(f"the editor in {options.editor} was trained with --prompt-style {editor.config.prompt_style}, not {options.prompt_style}")
        return options, samples, stream, editor, None
    editor = LiveEdit(model, processor, config)
    return options, samples, stream, editor, start_training(editor, options)


def ask(arguments: list[str]) -> None:
    """`run.py ask`: one question to a saved editor, with the answer before and after, and the edits that it concerns."""
    parser = argparse.ArgumentParser(prog="run.py ask", description=ask.__doc__, allow_abbrev=False)
    parser.add_argument("question")
    parser.add_argument("--editor", type=Path, required=True, help="a saved editor")
    parser.add_argument("--image", type=Path, help="a picture file; without it a text-only question")
    parser.add_argument("--model", default=Options.model, help="the model that the editor was trained on")
    parser.add_argument("--device", default=Options.device, help="auto (cuda, mps, cpu), or a torch device")
    parser.add_argument("--dtype", default=Options.dtype, choices=DTYPES, help="of the model")
    given = parser.parse_args(arguments)
    try:
        picture = ImageFile(given.image).open() if given.image else None
        model, processor = load_model(Options(model=given.model, device=given.device, dtype=given.dtype))
        editor = LiveEdit.from_pretrained(model, processor, given.editor)
        inputs = editor.encode(picture, given.question)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        sys.exit(f"run.py ask: {error}")
    reply = lambda: processor.decode(model.generate(**inputs, max_new_tokens=50, do_sample=False)[0, inputs["input_ids"].shape[1]:],
                                     skip_special_tokens=True).strip()
    with editor.disabled():
        print(f"before: {reply()}")
    print(f"after:  {reply()}\n{explanation_table(editor.explain(inputs)[0])}")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["ask"]:
        return ask(arguments[1:])
    options = parse_options(arguments)
    keep_freed_memory()
    start = time.time()
    torch.manual_seed(options.seed)
    try:
        options, samples, stream, editor, training = prepare(options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        sys.exit(f"run.py: {error}")
    print(f"{options.model}: {sum(p.numel() for p in editor.model.parameters()) / 1e6:.1f} M parameters, frozen; editor: "
          f"{sum(p.numel() for p in editor.parameters()) / 1e6:.2f} M parameters at layer {editor.config.layer}")
    try:
        trained = train(training, samples, options) if training else None
    except FloatingPointError as error:
        sys.exit(f"run.py: {error}")
    if trained:
        editor.reset()
        editor.save_pretrained(options.out / "editor")
        (options.out / CHECKPOINT_FILE).unlink(missing_ok=True)
    rows, predictions, cost = evaluate(editor, stream, options)
    try:
        editor.save_pretrained(options.out / "editor")
    except (OSError, RuntimeError) as error:  # the results are not lost with it
        print(f"run.py: the edits were not saved: {error}", file=sys.stderr)
    updates = evaluate_updates(editor, stream, options) if options.data is None and len(stream) >= 5 else None
    with open(options.out / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions)
    picture(stream, predictions, options.out / "edits.png")
    metrics = {"options": {k: v if not isinstance(v, Path) else str(v) for k, v in asdict(options).items()}, "config": asdict(editor.config),
               "seed": options.seed, "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                                                  "python": sys.version.split()[0]},
               "training": trained, **cost, "seconds": time.time() - start, "peak_memory": peak_memory(), "updates": updates, "rows": rows}
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print("\n" + table(rows))
    if updates:
        print("\n" + updates_table(updates))
    print(f"{cost['seconds_per_edit'] * 1000:.1f} ms and {cost['bytes_per_edit'] / 1024:.1f} KiB per edit; peak memory {peak_memory()}; "
          f"{(time.time() - start) / 60:.1f} minutes in all; everything in {options.out}/")


if __name__ == "__main__":
    main()
