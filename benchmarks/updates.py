"""The update stream of the main job: a fifth of the edits edits earlier facts again.

A third asks exactly as the first edit did, a third in other words, a third with another picture;
then both the older and the newer question are asked. The new values are words of the drawn world,
or, of a benchmark, what another of its edits says. `python run.py` runs it.
"""

import random
from dataclasses import replace
from typing import NamedTuple

from data import EditSample, Query, normalise
from drawn import SCENES, Shares, edit_target

SHARES = Shares(open=0.0, novel_names=0.0)
UPDATE_FORMS = {
    "exact": "reliability",
    "rephrased": "text_generality",
    "another picture": "modal_generality",
}


class Update(NamedTuple):
    """A fact of the stream that is edited again."""

    sample: int  # index into the stream
    form: str  # one of UPDATE_FORMS: how the new edit asks for the fact
    edit: Query


def updates_of(stream: list[EditSample], count: int, seed: int) -> list[Update]:
    """`count` facts of a stream, each edited again with another value, in all forms."""
    rng, updates, forms = random.Random(f"updates {seed}"), [], list(UPDATE_FORMS)
    for n, i in enumerate(rng.sample(range(len(stream)), count)):
        form = forms[n % len(forms)]
        asked = stream[i].queries[UPDATE_FORMS[form]]
        target = asked.target
        if stream[i].kind == "benchmark":
            others = [sample.edit.target for sample in stream if sample.edit.target != target]
            target = rng.choice(others or [f"not {target}"])
        while target == asked.target:
            target = edit_target(*asked.fact, SCENES, rng, SHARES, True)[1]
        updates.append(Update(i, form, replace(asked, target=target)))
    return updates


def evaluate_updates(editor, stream: list[EditSample], options, answer) -> dict:
    """Tell how often the newest and the old answer is given, in per cent.

    answer: run.py's function of that name. `replaced` is the share of questions that no longer use
    the older edit; `false_replacements` that of edits whose own question uses another fact's edit
    but not its own.
    """
    count, batch_size = len(stream) // 5, options.eval_batch_size
    facts = stream[: len(stream) - count]
    updates = updates_of(facts, count, options.seed)
    editor.reset()
    queries = [sample.edit for sample in facts] + [update.edit for update in updates]
    edits = editor.edit_many([(q.image.open(), q.prompt, q.target) for q in queries], batch_size)
    ids, fact_of = [edit.id for edit in edits], {}
    for edit_id, query in zip(ids, queries, strict=True):
        fact_of[edit_id] = query.fact
    answers = answer(editor, queries, batch_size)
    wrong = [
        bool(said.used) and all(fact_of[edit_id] != query.fact for edit_id in said.used)
        for said, query in zip(answers, queries, strict=True)
    ]
    rows = []
    for n, update in enumerate(updates):
        older = facts[update.sample].edit
        for said in (answers[update.sample], answers[len(facts) + n]):
            text = normalise(said.generated)
            row = {"form": update.form, "newest": text == normalise(update.edit.target)}
            row |= {"old": text == normalise(older.target)}
            row |= {"replaced": ids[update.sample] not in said.used}
            rows.append(row)
    forms = {}
    for form in UPDATE_FORMS:
        some = [row for row in rows if row["form"] == form]
        if some:
            forms[form] = _shares(some)
    false = 100 * sum(wrong) / len(wrong)
    found = {"edits": len(stream), "n": count, "false_replacements": false}
    return found | _shares(rows) | {"forms": forms}


def _shares(rows: list[dict]) -> dict[str, float]:
    names = ("newest", "old", "replaced")
    return {name: 100 * sum(row[name] for row in rows) / len(rows) for name in names}


def updates_table(updates: dict) -> str:
    """Print the update stream as text."""
    title = f"{updates['n']} updates in {updates['edits']} edits"
    lines = [f"{title:<26}{'newest answer %':>17}{'old answer %':>14}{'older unused %':>16}"]
    for label, row in [*updates["forms"].items(), ("all", updates)]:
        lines.append(
            f"{label:<26}{row['newest']:>17.1f}{row['old']:>14.1f}{row['replaced']:>16.1f}"
        )
    wrong = f"{updates['false_replacements']:.1f} %"
    return "\n".join([*lines, f"edits whose own question uses another fact's edit: {wrong}"])
