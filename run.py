"""Train LiveEdit, stream edits into a frozen vision-language model, re-test all of them, report.

    python run.py                                      tiny-llava, 500 edits of the drawn world
    python run.py --data FOLDER                        train.json, eval.json and images/
    python run.py --editor output/editor --out again   stream into an editor trained before
    torchrun --nproc-per-node=2 run.py                 train on two devices: twice the edits a step

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
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import data
from backbone import IGNORE, InputFormat, States, fingerprint, same_model
from data import LOCALITY_QUERIES, Answer, EditSample, Query, report_row, score, table
from drawn import drawn_stream
from liveedit import LiveEdit, LiveEditConfig, Question, write_whole
from router import Rows
from training_pictures import training_samples

SHORT_NAMES = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf"}
SHORT_NAMES |= {"tiny-llava": str(Path(__file__).resolve().parent / "tiny-llava")}
# A training batch has one query of each line for each edit.
# Differs from the paper, where both generality queries and all of locality are in each step.
ROLES = (
    ("reliability",),
    ("text_generality", "modal_generality"),
    ("modal_locality", "similar_image"),
)
# Two ways to train an editor, where the command line does not say otherwise: as in the paper, with
# Adam; or with Muon and a cosine, on many edits a step, the default of models below SMALL_WIDTH.
PAPER = {
    "recipe": "paper", "train_steps": 40_000, "train_samples": 20_000, "batch_size": 8,
    "expert_batch_size": 8, "learning_rate": 1e-4,
}  # fmt: skip
SHORT = {
    "recipe": "short", "train_steps": 1000, "train_samples": 14_000, "batch_size": 256,
    "expert_batch_size": 32,
    "learning_rate": 1.5e-3,  # at twice this rate gates die: first tokens are edited no more
}  # fmt: skip
SMALL_WIDTH = 1024  # hidden size
# A small decoder cannot spell a word from its beginning, so the expert does it: one rank for each
# token of an answer.
SMALL_EDITOR = {"rank": 12, "heads": 4, "gain": 3.0}
CACHE_BYTES = 4 * 2**30  # of training states kept in memory; more are computed at every step
CHECKPOINT, CHECKPOINT_SECONDS = "training.pt", 600
# This process and how many there are, under torchrun; only the first reports.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
bar_of = partial(tqdm, disable=RANK > 0)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong value ends in one sentence."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(usage="run.py [options]", description=__doc__, **form)
    add = parser.add_argument
    add("--model", default="tiny-llava", help="tiny-llava, llava-1.5-7b, a hub id or a folder")
    add("--data", help="evqa, eic, vlkeb, vlkeb-onehop, a folder or .json; else the drawn world")
    add("--data-root", type=Path, help="folder of a benchmark as published (easy-edit-mm, VLKEB)")
    add("--prompt-style", default="chat", choices=("chat", "official"), help="of all prompts")
    add("--edits", type=positive, default=500, help="edits of the stream (default 500)")
    add("--out", type=Path, default=Path("output"), help="output folder (default output)")
    add("--dry-run", action="store_true", help="check data and model configuration only")
    add("--editor", type=Path, help="a saved editor to load instead of training one")
    add("--layer", type=int, help="edit layer, from 0 (default by the model's size)")
    add("--rank", type=positive, help="rank of an expert (default 4; small models 12)")
    add("--similarity", choices=("cosine", "dot"), help="of the visual filter (default cosine)")
    add("--threshold", type=float, help="of the visual filter (default: by the learned sentinel)")
    add("--blend", action="store_true", help="the paper's plain soft router: newest does not win")
    add("--recipe", choices=("paper", "short"), help="of training (default by the model's size)")
    add("--train-steps", type=positive, help="this and the next four: default by the recipe")
    add("--train-samples", type=positive, help="of the drawn world")
    add("--batch-size", type=positive, help="edits per training step, and process")
    add("--expert-batch-size", type=positive, help="of these, edits that experts are made of")
    add("--learning-rate", type=float, help="of the editor's training")
    add("--resume", action="store_true", help="continue an interrupted training in --out")
    add("--device", default="auto", help="auto (an accelerator, else cpu) or a torch device")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--eval-batch-size", type=positive, help="questions per pass (default by the model's size)")
    add("--seed", type=int, default=0, help="of training and stream (default 0)")
    options = parser.parse_args(arguments)
    checkpoint = options.out / CHECKPOINT
    for name in ("layer", "rank", "similarity", *PAPER):
        if options.editor and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is of a training, but --editor is trained")
    if options.editor and options.editor.resolve() == (options.out / "editor").resolve():
        parser.error(f"--out {options.out} would overwrite the edits in --editor")
    as_published = options.data_root or options.prompt_style == "official"
    if as_published and options.data not in data.BENCHMARKS:
        names = ", ".join(data.BENCHMARKS)
        parser.error(f"--data-root and --prompt-style official are for --data {names}")
    if options.resume and (options.editor or not checkpoint.is_file()):
        parser.error(f"--resume continues a training that was interrupted, {checkpoint}")
    if checkpoint.exists() and not (options.resume or options.dry_run):
        parser.error(f"{checkpoint} is an interrupted training: --resume it, or delete it")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed {options.seed} must lie between 0 and {2**32 - 1}")
    try:
        torch.empty(0, device="cpu" if options.device == "auto" else options.device)
    except (RuntimeError, AssertionError, ImportError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    return options


def positive(text: str) -> int:
    """Read a number of the command line that is at least 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


# ---------------------------------------------------------------------------------------- loading


def load_samples(options: argparse.Namespace, form: InputFormat, spare: int) -> tuple[list, list]:
    """Read or draw (training samples, stream of edits); spare: tokens that a picture takes."""
    if options.data is None:
        stream = drawn_stream(options.edits, options.seed)
        count = 0 if options.editor else options.train_samples
        return training_samples(count, options.seed), stream
    train_file, eval_file, images = data.benchmark_files(options.data, options.data_root)
    if not options.editor and train_file == eval_file:
        raise ValueError(f"{options.data} has no eval in its name to find a training file by")
    official = options.data if options.prompt_style == "official" else None
    train = [] if options.editor else data.read_records(train_file, images, official)
    stream = data.read_records(eval_file, images, official)
    stream = random.Random(options.seed).sample(stream, min(options.edits, len(stream)))
    pictures, faults = data.check_pictures(train + stream), []
    print(f"{options.data}: {len(train)} training, {len(stream)} edits, {pictures} pictures")
    for sample in train + stream:
        try:
            for query in sample.queries.values():
                form.encode([None], [query.prompt], [query.target], spare=spare)
        except ValueError as error:
            faults.append(f"{sample.source}: {error}")
    data.complain("texts that the model cannot read", faults)
    return train, stream


def load_model(name: str, device: str = "auto", dtype: str = "auto"):
    """Load model and processor by the plain Hugging Face way."""
    name = SHORT_NAMES.get(name, name)
    processor = AutoProcessor.from_pretrained(name)
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), processor


def config_for(model, options: argparse.Namespace) -> LiveEditConfig:
    """Take the paper's settings, or those for small models; the command line wins."""
    text = model.config.get_text_config()
    settings = {"sentinel_tokens": getattr(model.config, "image_seq_length", None) or 576}
    settings |= {"newest_wins": not options.blend, "prompt_style": options.prompt_style}
    if text.hidden_size < SMALL_WIDTH:
        settings |= SMALL_EDITOR | {"module_dim": text.hidden_size}
    if text.num_hidden_layers < 12:  # most must lie above, to make words of what is edited
        settings["layer"] = text.num_hidden_layers // 3
    for name in ("layer", "rank", "similarity", "threshold"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    return LiveEditConfig(**settings)


def training_defaults(width: int, recipe: str | None = None) -> dict:
    """Choose how to train an editor by the hidden size of its model, where no recipe is given."""
    recipe = recipe or ("short" if width < SMALL_WIDTH else "paper")
    if recipe == "paper":
        return dict(PAPER)
    # The wider the model, the fewer experts, and samples in proportion: steps take about as long.
    most, least = SHORT["expert_batch_size"], PAPER["expert_batch_size"]
    experts = max(least, min(most, 2**14 // width))
    samples = SHORT["train_samples"] * experts // most
    return SHORT | {"expert_batch_size": experts, "train_samples": samples}


def prepare(options: argparse.Namespace) -> tuple[LiveEdit, list[EditSample], list[EditSample]]:
    """Check data and configuration, then load (editor on its model, training samples, stream)."""
    name = SHORT_NAMES.get(options.model, options.model)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name))
    config, width = config_for(empty, options), empty.config.get_text_config().hidden_size
    config = LiveEdit(empty, None, config).config  # raises if it cannot be edited there
    defaults = training_defaults(width, options.recipe)
    defaults |= {"eval_batch_size": max(4, 2**14 // width)}
    for key, value in defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    form = InputFormat(empty, AutoProcessor.from_pretrained(name), options.prompt_style)
    samples, stream = load_samples(options, form, config.sentinel_tokens)
    if samples:
        own = samples[::PROCESSES]  # of the first process
        # Half of them at most: what contradicts one group finds its place in another.
        most = min(options.batch_size, max(1, len(own) // 2))
        options.expert_batch_size = min(options.expert_batch_size, most)
        options.batch_size = min(options.batch_size, len(own))
        if options.batch_size < 2:
            raise ValueError("--batch-size must be 2 or more, with as many samples")
        options.batch_size -= options.batch_size % options.expert_batch_size
        data.Batches(own, options.expert_batch_size, 1, "check")  # raises if there are none
    print(f"{type(empty).__name__} {name}")
    if not options.editor:
        print(f"a new editor at edit layer {config.layer}: {config}")
        print(", ".join(f"{key} {getattr(options, key)}" for key in defaults))
    if options.dry_run:
        sys.exit(0)
    options.out.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(options.model, options.device, options.dtype)
    if not options.editor:
        return LiveEdit(model, processor, config), samples, stream
    changes = {"newest_wins": False} if options.blend else {}
    changes |= {} if options.threshold is None else {"threshold": options.threshold}
    editor = LiveEdit.from_pretrained(model, processor, options.editor, **changes)
    if editor.config.prompt_style != options.prompt_style:
        raise ValueError(f"{options.editor} needs --prompt-style {editor.config.prompt_style}")
    return editor, samples, stream


# --------------------------------------------------------------------------------------- training


def question(query: Query) -> Question:
    """Open the picture of a query."""
    return Question(query.image.open() if query.image else None, query.prompt, query.target)


class TrainingSet:
    """Training batches as states of the edit layer, computed once where they fit in memory."""

    def __init__(self, editor: LiveEdit, samples: list[EditSample], options: argparse.Namespace):
        self.editor, self.samples, self.seed = editor, samples, f"{options.seed} {RANK}"
        self.size = options.expert_batch_size
        self.joined = options.batch_size // self.size
        self.shuffle(epoch=0)
        row = self.capture(self.batches.groups[0])[0][0].hidden[0]
        if 3 * row.nbytes * len(samples) * 1.5 < CACHE_BYTES:  # half more: masks, positions
            bar = bar_of(self.batches.groups, desc="training states")
            self.kept = [self.capture(chosen) for chosen in bar]

    def shuffle(self, epoch: int) -> None:
        """Put the samples into batches, other ones in each epoch."""
        self.epoch, self.kept = epoch, []
        self.batches = data.Batches(self.samples, self.size, self.joined, f"{self.seed} {epoch}")

    def batch(self, step: int) -> tuple[list[tuple[States, ...]], Rows]:
        """Give the triples of a step and their text locality, for each step the same ones."""
        epoch = step // (len(self.samples) // self.size)
        if not self.kept and epoch != self.epoch:
            self.shuffle(epoch)
        numbers, groups = self.batches.step(step), self.batches.groups
        made = [self.kept[n] if self.kept else self.capture(groups[n]) for n in numbers]
        return [triple for triple, _ in made], Rows.cat([rows for _, rows in made])

    def capture(self, chosen: list[int]) -> tuple[tuple[States, ...], Rows]:
        """Run the lower layers for one triple of samples, with one query of each of ROLES.

        Text locality are the prompt rows of another question about each edited picture. Nothing
        is learned from questions without a picture: they are never edited.
        """
        samples, asked = [self.samples[i] for i in chosen], []
        rng = random.Random(f"{self.seed} {self.epoch} query {chosen[0]}")
        for role in ROLES:
            names = [[name for name in role if name in sample.queries] for sample in samples]
            queries = [s.queries[rng.choice(n)] for s, n in zip(samples, names, strict=True)]
            asked.append([question(query) for query in queries])
        triple = tuple(self.editor.capture(questions) for questions in asked)
        others = [question(sample.queries["same_image"]) for sample in samples]
        other = self.editor.capture(others, above=False)
        return triple, Rows.gather(other.hidden.float(), other.masks.prompt)


def make_optimizers(editor: LiveEdit, rate: float, recipe: str) -> list[torch.optim.Optimizer]:
    """Take Adam. Differs from the paper: in the short recipe Muon trains the matrices."""
    parameters = list(editor.parameters())
    if recipe == "paper":
        return [torch.optim.Adam(parameters, lr=rate, fused=True)]
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    others = [parameter for parameter in parameters if parameter.dim() != 2]
    muon = torch.optim.Muon(matrices, lr=10 * rate, weight_decay=0.0)
    return [torch.optim.Adam(others, lr=rate, fused=True), muon]


def cut_gradients(editor: LiveEdit) -> None:
    """Cut gradients to norm 1, the router's apart. Differs from the paper, which cuts none."""
    for part in (editor.generator, editor.router, editor.norm):
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)


def rate_factor(step: int, steps: int, recipe: str) -> float:
    """Compute the learning rate's factor: the paper's cut after 10,000 steps.

    Differs from the paper in the short recipe: a warm-up and a cosine.
    """
    if recipe == "paper":
        return 0.1 if step >= 10_000 else 1.0
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save_checkpoint(file: Path, editor: LiveEdit, optimizers: list, progress: dict) -> None:
    """Write all that the next step depends on; an older checkpoint stays where that fails."""
    content = progress | {"parts": [part.state_dict() for part in (editor, *optimizers)]}
    try:
        write_whole(file, partial(torch.save, content))
    except OSError as error:
        print(f"run.py: {error}", file=sys.stderr)


def load_checkpoint(file: Path, editor: LiveEdit, optimizers: list, progress: dict) -> dict:
    """Read a checkpoint. Raises ValueError if it is damaged, or of another training than this."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        model, saved, parts = content["model"], content["settings"], content.pop("parts")
    except Exception as error:  # torch.load has many kinds
        raise ValueError(f"{file} is no checkpoint of a training; delete it: {error!r}") from error
    for key, value in progress["settings"].items():
        if saved.get(key) != value:
            raise ValueError(f"{file} is of a training with {key} {saved.get(key)}, not {value}")
    if not same_model(model, progress["model"]):
        raise ValueError(f"{file} is of a training on another model, with other weights")
    for part, state in zip((editor, *optimizers), parts, strict=True):
        part.load_state_dict(state)
    return content


def train(editor: LiveEdit, samples: list[EditSample], options: argparse.Namespace) -> dict:
    """Train on all losses of the method. Ctrl-C saves a checkpoint that --resume continues."""
    file = options.out / CHECKPOINT
    optimizers = make_optimizers(editor, options.learning_rate, options.recipe)
    settings = {name: getattr(options, name) for name in ("data", "prompt_style", "seed", *PAPER)}
    settings |= {"config": asdict(editor.config), "processes": PROCESSES}
    progress = {"settings": settings, "model": fingerprint(editor.model), "step": 0}
    progress |= {"seconds": 0.0, "running": {}, "log": []}
    if options.resume:
        progress = load_checkpoint(file, editor, optimizers, progress)
    else:
        some = [[question(q) for q in s.queries.values() if q.image] for s in samples[:32]]
        editor.standardise([editor.capture(asked, above=False) for asked in some])
    samples, began = samples[RANK::PROCESSES], time.time()
    training_set = TrainingSet(editor, samples, options)
    saved, start, interrupts = time.time(), began - progress["seconds"], []
    trained = {"samples": len(samples), "seconds_hidden_states": saved - began}  # of this process
    usual = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))  # not within a step
    bar = bar_of(total=options.train_steps, initial=progress["step"], desc="training the editor")
    try:
        for step in range(progress["step"], options.train_steps):
            torch.manual_seed((options.seed * 10**6 + step) * PROCESSES + RANK)  # resumes exactly
            factor = rate_factor(step, options.train_steps, options.recipe)
            losses = editor.training_losses(*training_set.batch(step))
            editor.zero_grad()
            losses["total"].backward()
            for parameter in editor.parameters() if PROCESSES > 1 else ():
                dist.all_reduce(parameter.grad)  # all processes began with the same weights
                parameter.grad /= PROCESSES
            cut_gradients(editor)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
                optimizer.step()
            progress["step"], progress["seconds"] = step + 1, time.time() - start
            note_losses(progress, losses, bar, every=max(1, min(100, options.train_steps // 10)))
            if not RANK and (interrupts or time.time() - saved > CHECKPOINT_SECONDS):
                save_checkpoint(file, editor, optimizers, progress)
                saved = time.time()
                if interrupts:  # the other processes end when they miss this one
                    sys.exit(f"stopped at step {step + 1}; --resume continues from the last save")
    finally:
        signal.signal(signal.SIGINT, usual)
    editor.trained_steps = options.train_steps
    trained |= {"steps": options.train_steps, "seconds": progress["seconds"]}
    trained["trained_parameters"] = sum(parameter.numel() for parameter in editor.parameters())
    return trained | {"losses": progress["log"]}


def note_losses(progress: dict, losses: dict, bar: tqdm, every: int) -> None:
    """Keep moving averages for bar and log. Raises FloatingPointError if training diverged."""
    running, step = progress["running"], progress["step"]
    for name, value in losses.items():
        running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
    if not math.isfinite(running["total"]):
        raise FloatingPointError(f"the loss is not finite at step {step}; lower --learning-rate")
    bar.update()
    bar.set_postfix_str(" ".join(f"{name} {value:.2f}" for name, value in running.items()))
    if step % every == 0:
        rounded = {name: round(value, 4) for name, value in running.items()}
        progress["log"].append({"step": step, **rounded})


# ----------------------------------------------------------------------------- stream and report


@torch.no_grad()
def answer(editor: LiveEdit, queries: list[Query], batch_size: int) -> list[Answer]:
    """Ask the model as it stands (edited, or the original under `editor.disabled()`)."""
    answers: dict[Query, Answer] = {}
    for pictured in (True, False):
        group = [query for query in queries if bool(query.image) == pictured]
        for start in range(0, len(group), batch_size):
            chunk = group[start : start + batch_size]
            answers |= zip(chunk, answer_batch(editor, chunk), strict=True)
    return [answers[query] for query in queries]


def answer_batch(editor: LiveEdit, queries: list[Query]) -> list[Answer]:
    """Ask a batch of queries that all have a picture or all have none, by plain calls."""
    images, prompts, targets = map(list, zip(*map(question, queries), strict=True))
    inputs = editor.encode(images, prompts, targets)
    labels, shape = inputs["labels"], inputs["input_ids"].shape
    tail = int((labels != IGNORE).any(0).sum())  # columns of answers, behind the prompts
    asked = {k: v[:, :-tail] if v.shape[:2] == shape else v for k, v in inputs.items()}
    del asked["labels"]
    if "logits_to_keep" in inspect.signature(editor.model.forward).parameters:
        inputs |= {"labels": labels[:, -tail - 1 :], "logits_to_keep": tail + 1}
    predictions = editor.model(**inputs, use_cache=False).logits[:, -tail - 1 :].argmax(-1)
    made = editor.model.generate(**asked, max_new_tokens=tail + 4, do_sample=False)
    texts = editor.processor.batch_decode(made[:, shape[1] - tail :], skip_special_tokens=True)
    rows = zip(labels[:, -tail:], predictions, texts, editor.explain(asked), strict=True)
    answers = []
    for row, predicted, text, edits in rows:
        length = int((row != IGNORE).sum()) - 1  # without the end of the answer
        weights = {edit["id"]: edit["weight"] for edit in edits}
        tokens = predicted[:length].tolist(), row[:length].tolist()
        answers.append(Answer(*tokens, text.strip(), weights))
    return answers


def ask_all(editor: LiveEdit, samples: list[EditSample], batch_size: int) -> dict:
    """Answer all queries of the samples: a dict of answers by query."""
    queries = [query for sample in samples for query in sample.queries.values()]
    return dict(zip(queries, answer(editor, queries, batch_size), strict=True))


def judge(sample: EditSample, own: int | None, count: int, before: dict, after: dict) -> list[dict]:
    """Judge each query of a sample after `count` edits, of which its own has the id `own`."""
    results = []
    for name, query in sample.queries.items():
        old, new = before[query], after[query]
        teacher_forced, free_running = score(name, query, old, new)
        shown = getattr(query.image, "scene", getattr(query.image, "path", query.image))
        expected = old.generated if name in LOCALITY_QUERIES else query.target
        result = {"edits": count, "kind": sample.kind, "query": name, "image": shown and str(shown)}
        result |= {"prompt": query.prompt, "expected": expected}
        result |= {"before": old.generated, "after": new.generated, "tokens": len(new.target)}
        result |= {"teacher_forced": teacher_forced, "free_running": free_running}
        result |= {"own_edit": own in new.used, "used": len(new.used)}
        results.append(result | {"other_edits": len(new.used) > (own in new.used)})
    return results


def evaluate(editor: LiveEdit, stream: list[EditSample], options: argparse.Namespace):
    """Give rows of the report, all predictions, and the cost of editing."""
    batch_size, rows, predictions, cost = options.eval_batch_size, [], [], {}
    for count in [n for n in (1, 10, 100) if n < len(stream)] + [len(stream)]:
        # Short streams start from the unedited model again until 100 edits are averaged.
        streams = max(1, min(100, len(stream)) // count)
        tested, results = stream[: streams * count], []
        for start in bar_of(range(0, len(tested), count), desc=f"streams of {count}"):
            part = tested[start : start + count]
            editor.reset()
            # Anew for each stream: in half precision an answer depends on what shares its batch.
            before = ask_all(editor, part, batch_size)
            told = [question(sample.edit) for sample in part]
            began = time.time()
            edits = editor.edit_many(told, batch_size)
            cost["seconds_per_edit"] = (time.time() - began) / count
            cost["bytes_per_edit"] = editor.experts.bytes_per_edit()
            after = ask_all(editor, part, batch_size)
            for sample, edit in zip(part, edits, strict=True):
                results += judge(sample, edit.id, count, before, after)
        predictions += results
        rows.append(report_row(count, results))
    # By now `before` is of the whole stream.
    unedited = [judged for sample in stream for judged in judge(sample, None, 0, before, before)]
    return [report_row(0, unedited), *rows], unedited + predictions, cost


def set_up_process() -> None:
    """Print any text on any console, and keep freed memory."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
    if sys.platform == "linux":
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: glibc gives big blocks back at each step, and
        # small models lose half the time so.
        with contextlib.suppress(AttributeError):  # of another C library
            for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**29)):
                ctypes.CDLL(None).mallopt(parameter, value)


def peak_memory() -> str:
    """Tell the peak memory of the GPU, or else of this process."""
    if torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU"
    if sys.platform == "win32":
        return "unknown"
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB"


def join_processes(device: str) -> None:
    """Join the processes that torchrun started; the first alone prints."""
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")


def main(arguments: list[str] | None = None) -> None:
    """Train, stream and report."""
    options, start = parse_options(arguments), time.time()
    set_up_process()
    torch.manual_seed(options.seed)
    try:
        if PROCESSES > 1:
            join_processes(options.device)
        editor, samples, stream = prepare(options)
        trained = None if options.editor else train(editor, samples, options)
        if PROCESSES > 1:
            dist.destroy_process_group()
        if RANK:
            return
        editor.save_pretrained(options.out / "editor")
        (options.out / CHECKPOINT).unlink(missing_ok=True)
        rows, predictions, cost = evaluate(editor, stream, options)
    except (ImportError, OSError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        sys.exit(f"run.py: {str(error).strip()}")
    try:
        editor.save_pretrained(options.out / "editor")
    except OSError as error:  # the results are not lost with it
        print(f"run.py: the edits were not saved: {error}", file=sys.stderr)
    with open(options.out / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)
    print("\n" + table(rows) + "\n")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    metrics = {"options": vars(options), "config": asdict(editor.config), "seed": options.seed}
    metrics |= {"versions": versions, "training": trained, **cost, "rows": rows}
    extras = (Path(__file__).parent / "benchmarks").is_dir()  # not needed for the report
    if extras and len(stream) >= 5:
        from benchmarks.updates import evaluate_updates, updates_table

        metrics["updates"] = evaluate_updates(editor, stream, options, answer)
        print(updates_table(metrics["updates"]))
    metrics |= {"seconds": time.time() - start, "peak_memory": peak_memory()}
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=1, default=str))
    if extras:
        from benchmarks.figure import draw_edits

        draw_edits(stream, predictions, options.out / "edits.png")
    per_edit = f"{cost['seconds_per_edit'] * 1000:.1f} ms, {cost['bytes_per_edit'] / 1024:.1f} KiB"
    minutes = f"{metrics['seconds'] / 60:.1f} minutes in all; everything in {options.out}/"
    print(f"{per_edit} per edit; peak memory {metrics['peak_memory']}; {minutes}")


if __name__ == "__main__":
    main()
