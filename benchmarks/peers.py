"""Compare LiveEdit with what one would use instead, on the same model, questions and order.

    python run.py                                          first: LiveEdit's editor in output/
    pip install peft                                       for LoRA-FT
    python benchmarks/peers.py                             three streams on tiny-llava
    python benchmarks/peers.py --model output/smol-llava --data output/emoji --seeds 0
    python benchmarks/peers.py --table FILE                the table of earlier results

A method is a subclass of `Unedited` with its own `name`, `needs` and `grid`; add yours to METHODS.
Settings are chosen from its `grid` on --tuning-edits edits of training scenes, as crowded as the
stream itself, or of the training records of --data, and are kept in the results with all that were
tried (another number of edits may favor others; 0 takes the first of the grid). Results in --out
are continued: methods, seeds and numbers of edits that it has are not run again. LiveEdit is one
editor that was trained before.
"""

import copy
import importlib.util
import json
import random
import statistics
import sys
import time
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from backbone import IGNORE, find_decoder_layers, hidden_of, with_hidden
from benchmarks.common import open_results, options_of, read_stream, table, trained_editor
from data import Answer, EditSample, Query, benchmark_files, read_records
from drawn import COLORS, SHAPES, drawn_samples, split_scenes
from liveedit import LiveEdit, LiveEditConfig
from run import answer, judge, load_model, question, report_row, set_up_process

BATCH = 128
EDITED = ("reliability", "text_generality", "modal_generality")
UNTOUCHED = ("text_locality", "modal_locality", "same_image", "similar_image")


# ---------------------------------------------------------------------------------------- methods


class Unedited:
    """The model as it is: the floor of reliability, the ceiling of locality."""

    name, needs, grid = "none", "nothing", [{}]

    def __init__(self, editor: LiveEdit, known: list[EditSample]):
        """Take model and encoding from an editor without edits; known: samples of the training."""
        self.editor = editor

    def edit(self, edits: list[Query]) -> None:
        """Take further edits, in this order."""

    def answer(self, queries: list[Query]) -> list[Answer]:
        """Answer as the method does after its edits."""
        return answer(self.editor, queries, BATCH)

    def reset(self) -> None:
        """Drop all edits."""

    def close(self) -> None:
        """Leave nothing in the model."""
        self.reset()

    def bytes(self) -> int:
        """Tell the memory of all edits' tensors (not of texts and pictures that are kept)."""
        return 0


class OurEdits(Unedited):
    """LiveEdit."""

    name, needs, grid = "LiveEdit", "an editor, trained once", [{}]

    def edit(self, edits):
        self.editor.edit_many([question(query) for query in edits], BATCH)

    def reset(self):
        self.editor.reset()

    def bytes(self):
        return len(self.editor.experts) * self.editor.experts.bytes_per_edit()


NEARNESS = [
    {"threshold": threshold, "by": by}
    for by in ("pooled", "last")
    for threshold in (0.6, 0.7, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.95)
]


class Lookup(Unedited):
    """Say the target of the nearest stored edit, where one is near enough."""

    name, needs, grid = "lookup", "a threshold", NEARNESS

    def __init__(self, editor, known, threshold: float, by: str):
        """Take the least similarity and what a question is known by: see `look`."""
        super().__init__(editor, known)
        self.known, self.threshold, self.by = [sample.edit for sample in known], threshold, by
        self.edits, self.keys = [], None
        # What is asked and looked at once for all settings that are tried: see `tuned`.
        self.known_answers: dict[Query, Answer] | None = None
        self.known_features: dict[Query, Tensor] = {}

    @torch.no_grad()
    def look(self, queries: list[Query]) -> dict[Query, Tensor]:
        """Give features (3, D) of each query: of its picture, and twice of its question.

        The picture's are its hidden states at the edit layer, pooled; the question's those of the
        text, pooled ("pooled"), and the model's last state, which says the answer ("last").
        """
        found: dict[Query, Tensor] = {}
        for i in range(0, len(queries), BATCH):
            batch = queries[i : i + BATCH]
            asked = [question(query) for query in batch]
            inputs = self.editor.encode([q.image for q in asked], [q.prompt for q in asked])
            states = self.editor.model(**inputs, output_hidden_states=True).hidden_states
            hidden = states[self.editor.config.layer + 1].float()
            image = inputs["input_ids"] == self.editor.model.config.image_token_id
            text = inputs["attention_mask"].bool() & ~image
            last = states[-1][:, -1].float()
            looks = torch.stack([pooled(hidden, image), pooled(hidden, text), last], dim=1)
            found |= zip(batch, looks, strict=True)
        return found

    def features(self, queries: list[Query]) -> Tensor:
        """Give features (n, 2, D) of picture and question, less their mean over known queries."""
        self.known_features = self.known_features or self.look(self.known)
        new = [query for query in queries if query not in self.known_features]
        looks = self.known_features | self.look(new)
        parts = [0, 1 if self.by == "pooled" else 2]
        center = torch.stack([looks[query][parts] for query in self.known]).mean(0)
        return torch.stack([looks[query][parts] for query in queries]) - center

    def nearest(self, queries: list[Query]) -> list[Query | None]:
        """Give the nearest stored edit of each query, None where none is near."""
        pictured = [i for i, query in enumerate(queries) if query.image]
        found: list[Query | None] = [None] * len(queries)
        if self.edits and pictured:
            asked = F.normalize(self.features([queries[i] for i in pictured]), dim=-1)
            # The mean of two cosines: of the pictures, and of the questions.
            cosines = asked.flatten(1) @ self.keys.flatten(1).T / 2
            best, nearest = cosines.max(1)
            for row, i in enumerate(pictured):
                if best[row] > self.threshold:
                    found[i] = self.edits[nearest[row]]
        return found

    def edit(self, edits):
        keys = F.normalize(self.features(edits), dim=-1)
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys])
        self.edits = self.edits + edits

    def model_answers(self, queries: list[Query]) -> list[Answer]:
        """Answer as the model does; while settings are tried it is asked each query once."""
        if self.known_answers is None:
            return super().answer(queries)
        new = [query for query in queries if query not in self.known_answers]
        self.known_answers |= zip(new, super().answer(new), strict=True)
        return [copy.copy(self.known_answers[query]) for query in queries]

    def answer(self, queries):
        answers = self.model_answers(queries)
        for said, near in zip(answers, self.nearest(queries), strict=True):
            if near:
                labels = self.editor.encode(None, "?", near.target)["labels"][0]
                tokens = labels[labels != IGNORE].tolist()
                missing = max(0, len(said.target) - len(tokens))
                said.predicted = (tokens + [IGNORE] * missing)[: len(said.target)]
                said.generated = near.target
        return answers

    def reset(self):
        self.edits, self.keys = [], None

    def bytes(self):
        return 0 if self.keys is None else self.keys.nbytes


class InContext(Lookup):
    """RAG, or IKE: the nearest stored edit is put into the prompt."""

    name, needs = "in context (RAG)", "a threshold, a form"
    forms = ("New fact: {question} {answer}. {asked}", "The answer is {answer}. {asked}")
    grid = [near | {"form": form} for form in forms for near in NEARNESS]

    def __init__(self, editor, known, threshold: float, by: str, form: str):
        super().__init__(editor, known, threshold, by)
        self.form = form

    def answer(self, queries):
        # First as they are, in the same batches as ever, on which half precision depends.
        answers, told = self.model_answers(queries), {}
        for i, near in enumerate(self.nearest(queries)):
            if near:
                asked = queries[i].prompt
                parts = {"question": near.prompt, "answer": near.target, "asked": asked}
                told[i] = replace(queries[i], prompt=self.form.format(**parts))
        for i, said in zip(told, self.model_answers(list(told.values())), strict=True):
            answers[i] = said
        return answers


class FineTuned(Unedited):
    """FT-L: Adam on one layer's down-projection, edit after edit, some steps each."""

    name, needs = "FT-L", "rate, steps, a layer"
    grid = [  # layers of six: see `tuned`
        {"rate": rate, "steps": steps, "layer": layer}
        for layer in (2, 4)
        for rate, steps in ((3e-4, 5), (3e-4, 20), (1e-3, 5), (1e-3, 20))
    ]

    def __init__(self, editor, known, rate: float, steps: int, layer: int):
        super().__init__(editor, known)
        edited = find_decoder_layers(editor.model)[0][layer]
        self.weights, self.rate, self.steps = [edited.mlp.down_proj.weight], rate, steps
        self.keep()

    def keep(self) -> None:
        """Keep the weights as they are, and a copy of them in single precision."""
        self.original = [weight.detach().clone() for weight in self.weights]
        self.exact = [weight.float().clone() for weight in self.original]

    def encoded(self, batch: list[Query]) -> dict:
        """Make model inputs with labels."""
        images, prompts, targets = map(list, zip(*map(question, batch), strict=True))
        return self.editor.encode(images, prompts, targets)

    def learn(self, inputs: dict, optimizer: torch.optim.Optimizer) -> None:
        """Take one step on the exact weights, and round them into the model."""
        self.editor.model.zero_grad()
        self.editor.model(**inputs).loss.backward()
        for weight, exact in zip(self.weights, self.exact, strict=True):
            exact.grad = weight.grad.float()
        optimizer.step()
        self.put(self.exact)

    @torch.no_grad()
    def put(self, values: list[Tensor]) -> None:
        """Put values into the weights."""
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    def optimizer(self) -> torch.optim.Optimizer:
        """Let the weights, and nothing else of the model, learn; in single precision.

        In half precision small steps would be lost.
        """
        self.editor.model.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_(True)
        return torch.optim.Adam(self.exact, lr=self.rate)

    def edit(self, edits):
        for query in edits:
            inputs, optimizer = self.encoded([query]), self.optimizer()
            for _ in range(self.steps):
                self.learn(inputs, optimizer)

    def reset(self):
        self.put(self.original)
        self.exact = [weight.float().clone() for weight in self.original]

    def close(self):
        self.reset()
        for weight in self.weights:
            weight.requires_grad_(False)
            weight.grad = None

    def bytes(self):
        return sum(weight.nbytes for weight in self.weights)


class FineTunedOnAll(FineTuned):
    """FT-BF: the same weights, epochs (`steps`) of mini-batches over all edits so far."""

    name, needs = "FT-BF", "rate, epochs, a layer"
    grid = [
        {"rate": rate, "steps": steps, "layer": layer}
        for layer in (2, 4)
        for rate, steps in ((3e-3, 40), (1e-2, 10), (1e-2, 40), (3e-2, 40))
    ]

    def __init__(self, editor, known, rate: float, steps: int, layer: int = 0):
        super().__init__(editor, known, rate, steps, layer)
        self.edits: list[Query] = []

    def edit(self, edits):
        self.edits = self.edits + edits
        optimizer, rng = self.optimizer(), random.Random(0)
        for _ in range(self.steps):
            order = rng.sample(self.edits, len(self.edits))
            for i in range(0, len(order), 32):
                self.learn(self.encoded(order[i : i + 32]), optimizer)

    def reset(self):
        super().reset()
        self.edits = []


class Adapter(FineTunedOnAll):
    """LoRA-FT: one adapter on all attention and MLP matrices, of an expert's rank."""

    name, needs = "LoRA-FT", "rate, epochs"
    grid = [
        {"rate": rate, "steps": steps} for rate in (3e-4, 1e-3, 3e-3, 1e-2) for steps in (10, 40)
    ]

    def __init__(self, editor, known, rate: float, steps: int):
        from peft import LoraConfig, get_peft_model

        super().__init__(editor, known, rate, steps)
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        rank = editor.config.rank
        chosen = r".*language_model.*\.(" + "|".join(names) + ")"
        self.adapted = get_peft_model(
            editor.model, LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen)
        )
        named = self.adapted.named_parameters()
        self.weights = [weight for name, weight in named if "lora_" in name]
        self.keep()

    def close(self):
        self.adapted.unload()


class Codebook(Unedited):
    """GRACE, simplified: where the prompt's last state is near a key, a learned value replaces it.

    The radius is a share of the key's length, and fixed: the original grows and splits it as edits
    meet. An edit of the same key replaces the older one.
    """

    name, needs = "GRACE, fixed radius", "a radius, steps, a layer"
    grid = [
        {"radius": radius, "steps": 100, "layer": layer}
        for layer in (2, 4)
        for radius in (0.03, 0.06, 0.12, 0.2, 0.3, 0.4)
    ]

    def __init__(self, editor, known, radius: float, steps: int, layer: int):
        super().__init__(editor, known)
        self.radius, self.steps, self.keys, self.values = radius, steps, None, None
        self.known_values: dict | None = None  # learned once for all radii: see `tuned`
        editor.detach()  # one at a time: this one gives the states of its layer
        self.own = LiveEdit(editor.model, editor.processor, LiveEditConfig(layer=layer))
        self.hooks = [
            editor.model.register_forward_pre_hook(self.note, with_kwargs=True),
            self.own.frozen.edit_layer.register_forward_hook(self.replace),
        ]
        self.place = None  # of the prompt's last row in the call of the model

    def note(self, model, args, kwargs) -> None:
        """Note where the prompt ends: run.answer gives labels of the answer and the row before."""
        labels, length = kwargs.get("labels"), kwargs["input_ids"].shape[1]
        self.place = length - (1 if labels is None else labels.shape[1])

    @torch.no_grad()
    def replace(self, layer, args, output):
        hidden = hidden_of(output)
        if self.keys is None or hidden.shape[1] == 1:
            return output
        hidden = hidden.clone()
        distance, nearest = torch.cdist(hidden[:, self.place].float(), self.keys).min(1)
        near = distance < self.radius * self.keys.norm(dim=1)[nearest]
        hidden[near, self.place] = self.values[nearest[near]].to(hidden.dtype)
        return with_hidden(output, hidden)

    def edit(self, edits):
        kept = (self.keys, self.values)
        self.keys = None  # states of the unedited model
        known = {} if self.known_values is None else self.known_values
        layer = self.own.config.layer
        new = [query for query in edits if (layer, query) not in known]
        for i in range(0, len(new), 32):
            some = new[i : i + 32]
            for query, key, value in zip(some, *self.learned(some), strict=True):
                known[layer, query] = key[None], value[None]
        self.keys, self.values = kept
        for query in edits:
            self.store(*known[layer, query])

    def learned(self, edits: list[Query]) -> tuple[Tensor, Tensor]:
        """Give keys and values (n, D): the prompts' last states, and what says the targets."""
        states = self.own.capture([question(query) for query in edits])
        last = states.masks.answer.int().argmax(1) - 1
        keys = states.hidden[torch.arange(len(edits)), last].float()
        values = keys.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([values], lr=0.1 * keys.std().item())
        targets = states.labels[states.masks.answer]
        place = F.one_hot(last, states.hidden.shape[1])[..., None]
        for _ in range(self.steps):
            hidden = states.hidden * (1 - place) + values[:, None] * place
            logits = self.own.frozen.upper(hidden.to(states.hidden.dtype), states)
            loss = F.cross_entropy(logits, targets, reduction="sum")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return keys, values.detach()

    def store(self, key: Tensor, value: Tensor) -> None:
        """Keep one edit, in place of an older one with nearly the same key."""
        if self.keys is None:
            self.keys, self.values = key, value
            return
        distinct = (self.keys - key).norm(dim=1) > 1e-3 * key.norm()
        self.keys = torch.cat([self.keys[distinct], key])
        self.values = torch.cat([self.values[distinct], value])

    def reset(self):
        self.keys = self.values = None

    def close(self):
        for hook in self.hooks:
            hook.remove()
        self.own.detach()
        self.editor.attach()

    def bytes(self):
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the masked rows of hidden (n, T, D)."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


METHODS = [Unedited, OurEdits, Lookup, InContext, FineTuned, FineTunedOnAll, Adapter, Codebook]


# -------------------------------------------------------------------------------------- measuring


def parts_of(stream: list, count: int) -> list[list]:
    """Cut a stream into shorter ones of `count` edits, until about 100 edits are tested."""
    tested = stream[: max(count, min(100, len(stream)) // count * count)]
    return [tested[start : start + count] for start in range(0, len(tested), count)]


def before_of(unedited: Unedited, stream: list, counts: list[int]) -> dict[int, list[dict]]:
    """Answer the questions of each part of a stream without edits, for each number of edits.

    In the batches in which they are asked later, on which an answer in half precision depends.
    """
    parts = {count: parts_of(stream, count) for count in counts}
    return {count: [told(unedited, part) for part in parts[count]] for count in counts}


def stream_row(method: Unedited, stream: list, count: int, before: list[dict]) -> dict:
    """Run the main job's protocol: after `count` edits all of them are asked about.

    before: what the model answered without edits, a dict of answers by query for each part of the
    stream. Seconds are of the processor: those of all threads together. A question is drawn, and
    answered teacher-forced and freely; LiveEdit tells its edits too (`explain`), which needs a
    third pass.
    """
    parts, results, editing, answering, number = parts_of(stream, count), [], 0.0, 0.0, 0
    pairs = zip(parts, before, strict=True)
    for part, said in tqdm(pairs, f"{method.name}, {count} edits", len(parts)):
        method.reset()
        began = time.process_time()
        method.edit([sample.edit for sample in part])
        edited = time.process_time()
        after = told(method, part)
        editing += edited - began
        answering += time.process_time() - edited
        number += len(after)
        for sample in part:
            results += judge(sample, None, count, said, after)
    row = report_row(count, results)
    row["seconds_per_edit"] = editing / sum(map(len, parts))
    row["seconds_per_question"] = answering / number
    row["bytes_per_edit"] = method.bytes() / count
    method.reset()
    return row


def told(method: Unedited, stream: list[EditSample]) -> dict[Query, Answer]:
    """Give the method's answers to all queries of a stream, by query."""
    queries = [query for sample in stream for query in sample.queries.values()]
    return dict(zip(queries, method.answer(queries), strict=True))


def quality(row: dict) -> float:
    """Judge settings by what is edited and by what must stay alike.

    The harmonic mean of the two averages: their sum would be best where nothing is edited.
    """
    found = row["teacher_forced"]
    return statistics.harmonic_mean([mean_of(found, EDITED), mean_of(found, UNTOUCHED)])


def mean_of(found: dict, names: tuple[str, ...]) -> float:
    """Average some figures."""
    return statistics.mean(found[name] for name in names)


def crowded_scenes(edits: int) -> list:
    """Take so many training scenes, of few shapes and colors, that edits are as dense as in 500."""
    scenes, held_out = split_scenes()
    wanted = edits * len(held_out) / 500
    for kinds in range(3, len(SHAPES) + 1):
        shapes, colors = list(SHAPES)[:kinds], list(COLORS)[:kinds]
        some = [s for s in scenes if s.shape in shapes and {s.color, s.background} <= {*colors}]
        if len(some) >= wanted:
            break
    return some


def training_of(benchmark: str | None, edits: int) -> tuple[list[EditSample], list[EditSample]]:
    """Give samples of the training: 100 that the methods may know, and some to tune them on."""
    if benchmark is None:
        known = drawn_samples(100, split_scenes()[0], "retriever", held_out=False)
        return known, drawn_samples(edits, crowded_scenes(edits), "tuning", held_out=False)
    train_file, _, images = benchmark_files(benchmark)
    training = read_records(train_file, images)
    if len(training) < edits + 100:
        raise ValueError(f"{train_file} has {len(training)} records, {edits + 100} are needed")
    training = random.Random("tuning").sample(training, edits + 100)
    return training[:100], training[100:]


def tuned(kind, editor: LiveEdit, known: list, samples: list, before: dict) -> tuple[dict, list]:
    """Choose a method's settings on edits of the training; give all that were tried too.

    before: what the model answered without edits.
    """
    grid, depth = [], len(find_decoder_layers(editor.model)[0])
    for settings in kind.grid:
        layer = {"layer": settings["layer"] * depth // 6} if "layer" in settings else {}
        grid.append(settings | layer)
    if len(grid) == 1 or not samples:
        return grid[0], []
    asked = [query for sample in samples for query in sample.queries.values()]
    pictured, looks, values, tried = [query for query in asked if query.image], {}, {}, []
    for settings in grid:
        torch.manual_seed(0)
        method = kind(editor, known, **settings)
        if isinstance(method, Lookup):
            looks = looks or method.look(method.known + pictured)
            method.known_answers, method.known_features = before, looks
        if isinstance(method, Codebook):
            method.known_values = values
        row = stream_row(method, samples, len(samples), [before])
        method.close()
        tried.append({"settings": settings, "quality": round(quality(row), 2)})
        print(kind.name, tried[-1], flush=True)
    return max(tried, key=lambda one: one["quality"])["settings"], tried


# ----------------------------------------------------------------------------------------- report

COLUMNS = {
    "reliability": "Rel", "text_generality": "T-Gen", "modal_generality": "M-Gen",
    "text_locality": "T-Loc", "modal_locality": "M-Loc", "same_image": "Same img",
    "similar_image": "Similar", "average": "Average",
}  # fmt: skip
KINDS = {
    "corrections": "corrections", "captions": "captions", "novel_names": "made-up names",
    "open": "open",
}  # fmt: skip
COSTS = {
    "seconds_per_edit": "an edit, ms", "bytes_per_edit": "an edit, KiB",
    "seconds_per_question": "a question, ms",
}  # fmt: skip


def spread(values: list[float]) -> str:
    """Print mean and, of several seeds, the standard deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def markdown(results: dict, way: str) -> str:
    """Print all methods at their longest stream, one row each."""
    rows, last = {}, {}
    for name, method in results["methods"].items():
        last[name] = [rows[-1] for rows in method["seeds"].values()]
    most = max(row["edits"] for found in last.values() for row in found)
    for name, found in last.items():
        edits = found[0]["edits"]
        label = name if edits == most else f"{name}, {edits} edits"
        rows[label] = {key: spread([row[way][key] for row in found]) for key in COLUMNS}
    return table(way.replace("_", "-"), COLUMNS, rows)


def kinds(results: dict) -> str:
    """Print the mean of Rel, T-Gen and M-Gen, free-running, for each kind of target."""
    rows = {}
    for name, method in results["methods"].items():
        last = [rows[-1]["by_kind"] for rows in method["seeds"].values()]
        rows[name] = {}
        for kind in KINDS:  # a short stream may lack one
            ways = [found[kind]["free_running"] for found in last if kind in found]
            rows[name][kind] = spread([mean_of(way, EDITED) for way in ways]) if ways else "-"
    return table("edited answers, free-running", KINDS, rows)


def costs(results: dict) -> str:
    """Print what edits and questions cost at the longest stream, and the settings."""
    rows, needs = {}, {kind.name: kind.needs for kind in METHODS}
    for name, method in results["methods"].items():
        last = [rows[-1] for rows in method["seeds"].values()]
        found = {key: statistics.mean(row[key] for row in last) for key in COSTS}
        settings = ", ".join(f"{key} {value}" for key, value in method["settings"].items())
        rows[name] = {
            "seconds_per_edit": 1000 * found["seconds_per_edit"],
            "bytes_per_edit": found["bytes_per_edit"] / 1024,
            "seconds_per_question": 1000 * found["seconds_per_question"],
            "needs": needs[name],
            "settings": settings or "-",
        }
    return table("cost", COSTS | {"needs": "to be chosen or trained", "settings": "chosen"}, rows)


def report(results: dict) -> str:
    """Print all tables; kinds of edits are known of the drawn world only."""
    tables = [markdown(results, way) for way in ("teacher_forced", "free_running")]
    if not results.get("data"):
        tables.append(kinds(results))
    return "\n\n".join([*tables, costs(results)])


def main() -> None:
    parser = options_of(__doc__, "peers.json")
    parser.add_argument("--data", help="a folder as run.py takes it; else the drawn world")
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--counts", type=int, nargs="+", help="ask after these (1, 10, 100, all)")
    parser.add_argument("--tuning-edits", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--half", action="store_true", help="compute in half precision: faster")
    parser.add_argument("--methods", nargs="+", choices=[kind.name for kind in METHODS])
    given = parser.parse_args()
    if given.table:
        print(report(json.loads(given.table.read_text())))
        return
    counts = given.counts or [n for n in (1, 10, 100) if n < given.edits] + [given.edits]
    if not all(1 <= count <= given.edits for count in counts):
        parser.error(f"--counts {counts} must lie between 1 and the {given.edits} of --edits")
    chosen = [kind for kind in METHODS if not given.methods or kind.name in given.methods]
    if Adapter in chosen and importlib.util.find_spec("peft") is None:
        sys.exit("peers.py: LoRA-FT needs `pip install peft`; or choose other --methods")
    set_up_process()
    model, processor = load_model(given.model, "cpu", "bfloat16" if given.half else "float32")
    editor = trained_editor(model, processor, given.editor)
    try:
        known, tuning = training_of(given.data, given.tuning_edits)
    except (OSError, ValueError) as error:
        sys.exit(f"peers.py: {error}")
    settings = {name: getattr(given, name) for name in ("model", "data", "edits", "half")}
    results = {"methods": {}} | open_results(given.out, settings)
    streams = {seed: read_stream(given.data, given.edits, seed) for seed in given.seeds}
    unedited = Unedited(editor, known)
    tuning_before = told(unedited, tuning) if tuning else {}
    before = {seed: before_of(unedited, stream, counts) for seed, stream in streams.items()}
    for kind in chosen:
        found = results["methods"].get(kind.name)
        if found is None:
            began = time.time()
            settings, tried = tuned(kind, editor, known, tuning, tuning_before)
            found = {"settings": settings, "seconds_of_tuning": time.time() - began}
            found |= {"tuning_edits": given.tuning_edits, "tried": tried, "seeds": {}}
        for seed, stream in streams.items():
            rows = found["seeds"].setdefault(str(seed), [])
            there = {row["edits"] for row in rows}  # of an earlier run
            torch.manual_seed(seed)
            method = kind(editor, known, **found["settings"])
            for count in sorted(before[seed].keys() - there):
                rows.append(stream_row(method, stream, count, before[seed][count]))
                rows.sort(key=itemgetter("edits"))
                results["methods"][kind.name] = found
                given.out.write_text(json.dumps(results, indent=1))
            method.close()
        print(kind.name, found["settings"])
    print(report(results))


if __name__ == "__main__":
    main()
