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
import drawn
from backbone import IGNORE, InputFormat, States, fingerprint, same_model
from data import LOCALITY_QUERIES, Answer, EditSample, Query, report_row, score, table
from liveedit import LiveEdit, LiveEditConfig, Question, write_whole
from router import Rows

SHORT_NAMES = {
    "tiny-llava": str(Path(__file__).resolve().parent / "tiny-llava"),
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
}
# Queries with a picture; a training batch has one of each line for each edit.
ROLES = (
    ("reliability",),
    ("text_generality", "modal_generality"),
    ("modal_locality", "same_image", "similar_image"),
)
# How an editor is trained where the command line does not say otherwise: models of 7B as in the
# paper, with Adam; small ones (hidden size below SMALL_WIDTH) with Muon, on many edits a step.
PAPER = {
    "train_steps": 40_000, "train_samples": 20_000, "batch_size": 8, "expert_batch_size": 8,
    "learning_rate": 1e-4,
}  # fmt: skip
PAPER_CUT = 10_000  # step at which the paper's learning rate falls to a tenth
SMALL = {
    "train_steps": 1000, "train_samples": 14_000, "batch_size": 128, "expert_batch_size": 32,
    # At twice this rate experts stop to act where the first token is said: their gates die.
    "learning_rate": 1.5e-3,
}  # fmt: skip
SMALL_WIDTH = 1024
# Hidden numbers per token of the experts of a small model's training step: the wider the model, the
# fewer experts, down to the paper's, and samples in proportion. Steps then take about as long.
STEP_WIDTH = 2**13
# A small decoder cannot spell a word from its beginning, so the expert does it: one rank for each
# token of an answer. Where layers are few, most of them must lie above to make a word of it.
SMALL_EDITOR = {"rank": 12, "heads": 4, "gain": 3.0}
FEW_LAYERS = 12
CACHE_BYTES = 4 * 2**30  # of training states kept in memory; more are computed at every step
CHECKPOINT, CHECKPOINT_SECONDS = "training.pt", 600
# What a training depends on beside model and config: a checkpoint is of the same.
TRAINING_OPTIONS = ("data", "prompt_style", "seed", *PAPER)
# This process and how many there are, under torchrun; only the first reports.
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
bar_of = partial(tqdm, disable=RANK > 0)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; a wrong value ends in one sentence."""
    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(usage="run.py [options]", description=__doc__, **form)
    what = parser.add_argument_group("what is edited").add_argument
    what("--model", default="tiny-llava", help="tiny-llava, llava-1.5-7b, a hub id or a folder")
    what("--data", help="evqa, eic, vlkeb, vlkeb-onehop, a folder or .json; else the drawn world")
    what("--data-root", type=Path, help="folder of a benchmark as published (easy-edit-mm, VLKEB)")
    what("--prompt-style", default="chat", choices=("chat", "official"), help="of all prompts")
    what("--edits", type=positive, default=500, help="edits of the stream (default 500)")
    what("--out", type=Path, default=Path("output"), help="output folder (default output)")
    what("--dry-run", action="store_true", help="check data and model configuration only")
    how = parser.add_argument_group("the editor").add_argument
    how("--editor", type=Path, help="a saved editor to load instead of training one")
    how("--layer", type=int, help="edit layer, from 0 (default by the model's size)")
    how("--rank", type=positive, help="rank of an expert (default 4; small models 12)")
    how("--similarity", choices=("cosine", "dot"), help="of the visual filter (default cosine)")
    how("--threshold", type=float, help="of the visual filter (default the learned sentinel's)")
    how("--blend", action="store_true", help="the paper's plain soft router: newest does not win")
    training = parser.add_argument_group("its training (defaults by the model's size)").add_argument
    training("--train-steps", type=positive)
    training("--train-samples", type=positive, help="of the drawn world")
    training("--batch-size", type=positive, help="edits per training step, and process")
    training("--expert-batch-size", type=positive, help="of these, edits that experts are made of")
    training("--learning-rate", type=float)
    training("--resume", action="store_true", help="continue an interrupted training in --out")
    machine = parser.add_argument_group("the machine").add_argument
    machine("--device", default="auto", help="auto (an accelerator, else cpu) or a torch device")
    machine("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    machine("--eval-batch-size", type=positive, help="questions per pass outside of training")
    machine("--seed", type=int, default=0, help="of training and stream (default 0)")
    options = parser.parse_args(arguments)
    checkpoint, of_training = options.out / CHECKPOINT, ("layer", "rank", "similarity", *PAPER)
    for name in of_training if options.editor else ():
        if getattr(options, name) is not None:
            name = name.replace("_", "-")
            parser.error(f"--{name} belongs to a training, but --editor is trained")
    if options.editor and options.editor.resolve() == (options.out / "editor").resolve():
        parser.error(f"--out {options.out} would overwrite the edits in --editor")
    if options.prompt_style == "official" and options.data not in data.BENCHMARKS:
        parser.error(f"--prompt-style official needs --data, one of {', '.join(data.BENCHMARKS)}")
    if options.resume and (options.editor or not checkpoint.is_file()):
        parser.error(f"--resume continues a training that was interrupted, {checkpoint}")
    if checkpoint.exists() and not (options.resume or options.editor or options.dry_run):
        parser.error(f"{checkpoint} is an interrupted training: --resume it, or delete it")
    try:
        torch.empty(0, device="cpu" if options.device == "auto" else options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    return options


def positive(text: str) -> int:
    """Read a number of the command line that is at least 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


# ---------------------------------------------------------------------------------------- loading


def load_samples(options: argparse.Namespace) -> tuple[list[EditSample], list[EditSample]]:
    """Read or draw (training samples, stream of edits). Raises before any long work."""
    if options.data is None:
        stream = drawn.drawn_stream(options.edits, options.seed)
        count = 0 if options.editor else options.train_samples
        return drawn.drawn_training(count, options.seed), stream
    train_file, eval_file, images = data.benchmark_files(options.data, options.data_root)
    if not options.editor and train_file == eval_file:
        raise ValueError(f"{options.data} has no eval in its name to find a training file by")
    official = options.data if options.prompt_style == "official" else None
    train = [] if options.editor else data.read_records(train_file, images, official)
    stream = data.read_records(eval_file, images, official)
    stream = random.Random(options.seed).sample(stream, min(options.edits, len(stream)))
    pictures = data.check_pictures(train + stream)
    print(f"{options.data}: {len(train)} training, {len(stream)} edits, {pictures} pictures")
    return train, stream


def check_texts(form: InputFormat, samples: list[EditSample], spare: int) -> None:
    """Raise ValueError that names the records whose texts the model cannot read.

    spare: tokens of a picture, which must fit in too.
    """
    faults = []
    for sample in samples:
        try:
            for query in sample.queries.values():
                form.encode([None], [query.prompt], [query.target], spare=spare)
        except ValueError as error:
            faults.append(f"{sample.source}: {error}")
    data.complain("texts that the model cannot read", faults)


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
    if text.num_hidden_layers < FEW_LAYERS:
        settings["layer"] = text.num_hidden_layers // 3
    for name in ("layer", "rank", "similarity", "threshold"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    return LiveEditConfig(**settings)


def training_defaults(width: int) -> dict:
    """Choose how to train an editor by the hidden size of its model."""
    if width >= SMALL_WIDTH:
        return PAPER
    most, least = SMALL["expert_batch_size"], PAPER["expert_batch_size"]
    experts = max(least, min(most, STEP_WIDTH // width))
    samples = SMALL["train_samples"] * experts // most
    return SMALL | {"expert_batch_size": experts, "train_samples": samples}


def prepare(options: argparse.Namespace) -> tuple[LiveEdit, list[EditSample], list[EditSample]]:
    """Load (editor on its model, training samples, stream), and fill in the options' defaults.

    Data and model configuration are checked before any weights are loaded.
    """
    with torch.device("meta"):
        name = SHORT_NAMES.get(options.model, options.model)
        empty = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(name))
    config, width = config_for(empty, options), empty.config.get_text_config().hidden_size
    config = LiveEdit(empty, None, config).config  # raises if it cannot be edited there
    defaults = training_defaults(width) | {"eval_batch_size": max(4, 2**14 // width)}
    for key, value in defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    samples, stream = load_samples(options)
    if options.data:
        form = InputFormat(empty, AutoProcessor.from_pretrained(name), options.prompt_style)
        check_texts(form, samples + stream, spare=config.sentinel_tokens)
    if samples:
        own = samples[::PROCESSES]  # of the first process
        options.expert_batch_size = min(options.expert_batch_size, options.batch_size, len(own))
        options.batch_size = min(options.batch_size, len(own))
        if options.batch_size < 2:
            raise ValueError("--batch-size must be 2 or more, with as many samples: see Eq. (15)")
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


# -------------------------------------------------------------------------------------- processes


def join_processes(device: str) -> None:
    """Join the processes that torchrun started, if it did; the first alone prints."""
    if PROCESSES == 1:
        return
    on_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")


def any_of_all(mine: bool) -> bool:
    """Wait for all processes, and tell whether it is true in any of them."""
    told: list = [mine] * PROCESSES
    if PROCESSES > 1:
        dist.all_gather_object(told, mine)
    return any(told)


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
        # Share of the triples whose generality queries are asked in a chat, behind what others ask:
        # there later tokens of an answer are said from other states.
        chats = options.data is None and getattr(editor.processor, "chat_template", None)
        self.chats = 0.5 if chats else 0.0
        self.shuffle(epoch=0)
        row = self.capture(self.batches.triples[0])[0][0].hidden[0]
        if 3 * row.nbytes * len(samples) * 1.5 < CACHE_BYTES:
            bar = bar_of(self.batches.triples, desc="training states")
            self.kept = [self.capture(chosen) for chosen in bar]

    def shuffle(self, epoch: int) -> None:
        """Put the samples into batches, other ones in each epoch."""
        self.epoch, self.kept = epoch, []
        seed = f"{self.seed} {epoch}"
        self.batches = data.Batches(self.samples, self.size, self.joined, seed)

    def batch(self, step: int) -> tuple[list[tuple[States, ...]], Rows]:
        """Give the triples of a step and the rows of their text-only prompts, always the same."""
        epoch = step // (len(self.samples) // self.size)
        if not self.kept and epoch != self.epoch:
            self.shuffle(epoch)
        numbers, triples = self.batches.step(step), self.batches.triples
        made = [self.kept[n] if self.kept else self.capture(triples[n]) for n in numbers]
        return [triple for triple, _ in made], Rows.cat([rows for _, rows in made])

    def capture(self, chosen: list[int]) -> tuple[tuple[States, ...], Rows]:
        """Run the lower layers for one triple of samples, with one query of each of ROLES."""
        samples, asked = [self.samples[i] for i in chosen], []
        rng = random.Random(f"{self.seed} {self.epoch} query {chosen[0]}")
        for role in ROLES:
            names = [[name for name in role if name in sample.queries] for sample in samples]
            queries = [s.queries[rng.choice(n)] for s, n in zip(samples, names, strict=True)]
            asked.append([question(query) for query in queries])
        edits, generality, locality = asked
        texts = [question(sample.queries["text_locality"]) for sample in samples]
        before = None
        if rng.random() < self.chats:
            count = rng.choice((1, 2))
            before = [earlier_turns(own, locality, texts, count, rng) for own in generality]
        capture = self.editor.capture
        triple = capture(edits), capture(generality, before=before), capture(locality)
        text = capture(texts, above=False)
        return triple, Rows.gather(text.hidden.float(), text.masks.prompt)


def earlier_turns(own: Question, others: list, texts: list, count: int, rng) -> list[Question]:
    """Choose what a chat asks before its last question: what others ask, or the same of theirs."""
    turns, same = [], rng.random() < 0.5
    for _ in range(count):
        turn = rng.choice(texts if rng.random() < 0.33 else others)
        turns.append(turn._replace(prompt=own.prompt) if same and turn.image else turn)
    return turns


def make_optimizers(editor: LiveEdit, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Take Adam for big models as in the paper; for small ones Muon trains the matrices.

    Differs from the paper: in a trial of 600 steps on an earlier tiny LLaVA the average at 500
    edits was 94.7 so, 93.2 with Adam alone.
    """
    parameters, small = list(editor.parameters()), editor.norm.weight.numel() < SMALL_WIDTH
    matrices = [parameter for parameter in parameters if small and parameter.dim() == 2]
    others = [parameter for parameter in parameters if not small or parameter.dim() != 2]
    optimizers = [torch.optim.Adam(others, lr=learning_rate, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=10 * learning_rate, weight_decay=0.0))
    return optimizers


def cut_gradients(editor: LiveEdit) -> None:
    """Cut gradients to norm 1, each part's on its own: large ones would silence the router's.

    Differs from the paper, which does not cut them.
    """
    for part in (editor.generator, editor.router, editor.norm):
        torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)


def rate_factor(step: int, steps: int, small: bool) -> float:
    """Compute the learning rate's factor: the paper's cut, or a warm-up and a cosine."""
    if not small:
        return 0.1 if step >= PAPER_CUT else 1.0
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save_checkpoint(file: Path, editor: LiveEdit, optimizers: list, progress: dict) -> str:
    """Write all that the next step depends on; tell what became of it. An older one stays."""
    content = progress | {"editor": editor.state_dict()}
    content["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    try:
        write_whole(file, partial(torch.save, content))
    except OSError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return str(error)
    return f"--resume continues from {file}"


def load_checkpoint(file: Path, editor: LiveEdit, optimizers: list, progress: dict) -> dict:
    """Read a checkpoint. Raises ValueError if it is damaged, or of another training than this."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        model, saved = content["model"], content["settings"]
    except Exception as error:  # torch.load has many kinds
        raise ValueError(f"{file} is no checkpoint of a training; delete it: {error!r}") from error
    for key, value in progress["settings"].items():
        if saved.get(key) != value:
            raise ValueError(f"{file} is of a training with {key} {saved.get(key)}, not {value}")
    if not same_model(model, progress["model"]):
        raise ValueError(f"{file} is of a training on another model, with other weights")
    editor.load_state_dict(content.pop("editor"))
    for optimizer, state in zip(optimizers, content.pop("optimizers"), strict=True):
        optimizer.load_state_dict(state)
    return content


def train(editor: LiveEdit, samples: list[EditSample], options: argparse.Namespace) -> dict:
    """Train on all losses of the method. Ctrl-C saves a checkpoint that --resume continues.

    Each process of several trains on samples of its own.
    """
    small, file = editor.norm.weight.numel() < SMALL_WIDTH, options.out / CHECKPOINT
    optimizers = make_optimizers(editor, options.learning_rate)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    settings = {name: getattr(options, name) for name in TRAINING_OPTIONS}
    settings |= {"config": asdict(editor.config), "processes": PROCESSES}
    progress = {"settings": settings, "model": fingerprint(editor.model), "step": 0}
    progress |= {"seconds": 0.0, "running": {}, "log": []}
    if options.resume:
        progress = load_checkpoint(file, editor, optimizers, progress)
    else:
        some = [[question(q) for q in s.queries.values() if q.image] for s in samples[:32]]
        editor.standardise([editor.capture(asked, above=False) for asked in some])
    for parameter in editor.parameters() if PROCESSES > 1 else ():
        dist.broadcast(parameter.data, src=0)
    samples, began = samples[RANK::PROCESSES], time.time()
    training_set = TrainingSet(editor, samples, options)
    prepared, start = time.time() - began, began - progress["seconds"]
    saved, told, interrupts = time.time(), "", []
    usual = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))  # not within a step
    bar = bar_of(total=options.train_steps, initial=progress["step"], desc="training the editor")
    try:
        for step in range(progress["step"], options.train_steps):
            torch.manual_seed((options.seed * 10**6 + step) * PROCESSES + RANK)  # resumes exactly
            for optimizer, rate in zip(optimizers, rates, strict=True):
                factor = rate_factor(step, options.train_steps, small)
                optimizer.param_groups[0]["lr"] = rate * factor
            losses = editor.training_losses(*training_set.batch(step))
            editor.zero_grad()
            losses["total"].backward()
            for parameter in editor.parameters() if PROCESSES > 1 else ():
                dist.all_reduce(parameter.grad)
                parameter.grad /= PROCESSES
            cut_gradients(editor)
            for optimizer in optimizers:
                optimizer.step()
            progress["step"], progress["seconds"] = step + 1, time.time() - start
            note_losses(progress, losses, bar, every=max(1, min(100, options.train_steps // 10)))
            interrupted = any_of_all(bool(interrupts))
            if not RANK and (interrupted or time.time() - saved > CHECKPOINT_SECONDS):
                told, saved = save_checkpoint(file, editor, optimizers, progress), time.time()
            if interrupted:
                any_of_all(True)  # none ends before the first has saved
                sys.exit(f"interrupted after step {step + 1}; {told}")
    finally:
        signal.signal(signal.SIGINT, usual)
    editor.trained_steps = options.train_steps
    trained = {"steps": options.train_steps, "samples": len(samples)}  # of this process
    trained |= {"seconds": progress["seconds"], "seconds_hidden_states": prepared}
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


# ---------------------------------------------------------------------------------------- metrics


@torch.no_grad()
def answer(editor: LiveEdit, queries: list[Query], batch_size: int) -> list[Answer]:
    """Ask the model as it stands (edited, or the original under `editor.disabled()`)."""
    answers: dict[int, Answer] = {}
    for pictured in (True, False):
        group = [i for i, query in enumerate(queries) if bool(query.image) == pictured]
        for start in range(0, len(group), batch_size):
            chunk = group[start : start + batch_size]
            made = answer_batch(editor, [queries[i] for i in chunk])
            answers |= dict(zip(chunk, made, strict=True))
    return [answers[i] for i in range(len(queries))]


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
    """Answer all queries of the samples, by the query's id()."""
    queries = [query for sample in samples for query in sample.queries.values()]
    answers = answer(editor, queries, batch_size)
    return {id(query): said for query, said in zip(queries, answers, strict=True)}


def judge(sample: EditSample, own: int | None, count: int, before: dict, after: dict) -> list[dict]:
    """Judge each query of a sample after `count` edits, of which its own has the id `own`."""
    results = []
    for name, query in sample.queries.items():
        old, new = before[id(query)], after[id(query)]
        teacher_forced, free_running = score(name, query, old, new)
        shown = getattr(query.image, "scene", query.image)
        picture = shown and str(getattr(shown, "path", shown))
        expected = old.generated if name in LOCALITY_QUERIES else query.target
        result = {"edits": count, "kind": sample.kind, "query": name, "image": picture}
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
        tested = stream[: max(count, min(100, len(stream) // count * count))]
        results = []
        for start in bar_of(range(0, len(tested), count), desc=f"streams of {count}"):
            part = tested[start : start + count]
            editor.reset()
            # Anew for each stream: in half precision an answer depends on what shares its batch.
            before = ask_all(editor, part, batch_size)
            began = time.time()
            edits = editor.edit_many([question(sample.edit) for sample in part], batch_size)
            cost["seconds_per_edit"] = (time.time() - began) / count
            cost["bytes_per_edit"] = editor.experts.bytes_per_edit()
            after = ask_all(editor, part, batch_size)
            for sample, edit in zip(part, edits, strict=True):
                results += judge(sample, edit.id, count, before, after)
        predictions += results
        rows.append(report_row(count, results))
    # The last stream is the whole.
    unedited = [judged for sample in stream for judged in judge(sample, None, 0, before, before)]
    return [report_row(0, unedited), *rows], unedited + predictions, cost


# ----------------------------------------------------------------------------------------- report


def set_up_process() -> None:
    """Print any text on any console, and keep freed memory.

    glibc gives big blocks back at each step: small models lose half the time so.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # of a stream that is no console
            stream.reconfigure(errors="backslashreplace")
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**29)):
                ctypes.CDLL(None).mallopt(parameter, value)


def peak_memory() -> str:
    """Tell the peak memory of the GPU, or else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU"
    try:
        import resource
    except ImportError:  # on Windows
        return "unknown"
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB"


def main(arguments: list[str] | None = None) -> None:
    """Train, stream and report."""
    options, start, trained = parse_options(arguments), time.time(), None
    set_up_process()
    torch.manual_seed(options.seed)
    try:
        join_processes(options.device)
        editor, samples, stream = prepare(options)
        if not options.editor:
            trained = train(editor, samples, options)
        if PROCESSES > 1:
            dist.destroy_process_group()
        if RANK:
            return
        editor.save_pretrained(options.out / "editor")
        (options.out / CHECKPOINT).unlink(missing_ok=True)
    except (OSError, ValueError, TypeError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"run.py: {error}")
    except ImportError as error:  # of a processor, from deep inside
        sys.exit(f"run.py: a package is missing, usually torchvision: {error}")
    rows, predictions, cost = evaluate(editor, stream, options)
    try:
        editor.save_pretrained(options.out / "editor")
    except OSError as error:  # the results are not lost with it
        print(f"run.py: the edits were not saved: {error}", file=sys.stderr)
    named = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    metrics = {"options": named, "config": asdict(editor.config), "seed": options.seed}
    metrics |= {"versions": versions | {"python": sys.version.split()[0]}, "training": trained}
    metrics |= cost | {"seconds": time.time() - start, "peak_memory": peak_memory(), "rows": rows}
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    with open(options.out / "predictions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)
    print("\n" + table(rows) + "\n")
    if (Path(__file__).parent / "benchmarks").is_dir():  # two extras, not needed for the report
        from benchmarks.figure import draw_edits
        from benchmarks.updates import evaluate_updates, updates_table

        draw_edits(stream, predictions, options.out / "edits.png")
        if options.data is None and len(stream) >= 5:
            metrics["updates"] = evaluate_updates(editor, stream, options, answer)
            metrics["seconds"] = time.time() - start
            (options.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
            print(updates_table(metrics["updates"]))
    per_edit = f"{cost['seconds_per_edit'] * 1000:.1f} ms, {cost['bytes_per_edit'] / 1024:.1f} KiB"
    minutes = f"{(time.time() - start) / 60:.1f} minutes in all; everything in {options.out}/"
    print(f"{per_edit} per edit; peak memory {peak_memory()}; {minutes}")


if __name__ == "__main__":
    main()
