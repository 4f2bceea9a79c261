"""
Davidsonian scene graphs (DSG, Cho et al. 2024): does a picture show what its prompt says, asked question by question.

    prompts = read_dsg("dsg-1k-anns.csv")                      # questions of each prompt, and which depends on which
    answers = read_answers("answers.csv", prompts)             # or those of a network (lib/networks.py)
    table = dsg_table(prompts, answers)                        # shares of right answers, by category

A prompt is taken apart into questions whose answers should all be yes: is there a fox, is the fox red, is it left of
the owls? A question is void where one that it depends on was answered no: without a fox, no colour of a fox can be
right. Who answers is left open: people, a network, or a rule. In a prompt's dict `answers` are {id: 0 or 1}, `parents`
{id: [ids]} with 0 for the root, and `categories` {id: name}.
"""
import csv
import re

import numpy as np

from lib.settings import UserError

# DSG's categories -> columns of Greedy Growing's Table 6. "other" and "action" go where DSG's own breakdown puts them:
# counts and written text are attributes
COLUMNS = {"entity": "entities", "relation": "relations", "attribute": "attributes", "global": "global",
           "other": "attributes", "action": "relations"}


# ---------------------------------------------------------------------------------------------------------------
# The score


def dsg_right(answers, parents):
    """
    {id: 0 or 1}: a question counts only if it and all its parents are answered 1 (Cho et al. 2024, in the published
    code). One level: a parent's own answer decides, not whether that parent counts. Parents without an answer stop
    nothing.
    """
    if not set(answers.values()) <= {0, 1}:
        raise ValueError(f"answers must be 0 or 1, not {sorted(map(str, set(answers.values()) - {0, 1}))}")
    return {q: int(a and all(answers.get(p, 1) for p in parents.get(q, ()) if p != 0)) for q, a in answers.items()}


def dsg_score(answers, parents):
    """
    Share in [0, 1] of one prompt's questions that count: answers {id: 0 or 1}, parents {id: [ids]}. No answers: 0.
    """
    right = dsg_right(answers, parents)
    return sum(right.values()) / max(len(right), 1)


def dsg_corpus(prompts):
    """
    {"overall": mean over prompts of dsg_score, category: mean over all questions of that category} from a list of
    {"answers", "parents", "categories"}. ValueError where there are no prompts.
    """
    if not prompts:
        raise ValueError("no prompts: there is nothing to average")
    by_category = {}                                           # over all questions, not over prompts
    for prompt in prompts:
        for q, right in dsg_right(prompt["answers"], prompt["parents"]).items():
            if q in prompt.get("categories", {}):
                by_category.setdefault(prompt["categories"][q], []).append(right)
    overall = np.mean([dsg_score(p["answers"], p["parents"]) for p in prompts])    # each prompt counts alike
    return {"overall": float(overall)} | {c: float(np.mean(r)) for c, r in by_category.items()}


def dsg_table(prompts, answers):
    """
    {"entities", "relations", "attributes", "global", "dsg"} of the prompts of read_dsg, from one {id: answer in words}
    for each: "yes" is right, whatever else is wrong. A column without questions is nan.
    """
    odd = sum(word not in ("yes", "no") for words in answers for word in words.values())   # as "Yes." would be
    mute = sum(len(p["questions"]) - len(words) for p, words in zip(prompts, answers))     # without an answer
    if odd or mute:                                            # nothing is dropped without a word
        print(f"{odd} answers are neither yes nor no and count as no; {mute} questions have no answer; "
              "a prompt without any scores 0")
    binary = [{q: int(word == "yes") for q, word in words.items()} for words in answers]
    score = dsg_corpus([p | {"answers": right} for p, right in zip(prompts, binary)])
    columns = dict.fromkeys(COLUMNS.values())                  # in the order of the table, each once
    return {c: score.get(c, float("nan")) for c in columns} | {"dsg": score["overall"]}


# ---------------------------------------------------------------------------------------------------------------
# The files, as DSG publishes them: one row for each question


def read_table(file, columns):
    """
    The rows of a CSV file as dicts; `columns` are those that it must have. UserError where it cannot be read or lacks
    one.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as f:                    # as spreadsheets write it
            rows = list(csv.DictReader(f))                     # captions may hold commas, quotes and line breaks
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{file!r} cannot be read ({e}): give a CSV file with the columns {', '.join(columns)}")
    if missing := [c for c in columns if not rows or rows[0].get(c) is None]:
        raise UserError(f"{file!r} lacks {', '.join(missing)}: give a CSV file with the columns {', '.join(columns)}")
    return rows


def read_dsg(file):
    """
    Prompts of a DSG file (dsg-1k-anns.csv), in the file's order: a list of {"item", "text", "questions": {id: text},
    "parents": {id: [ids]}, "categories": {id: column of COLUMNS}}. UserError names a row that cannot be meant.
    """
    columns = ("item_id", "text", "proposition_id", "dependency", "category_broad", "question_natural_language")
    prompts, broken = {}, set()                                # rows of a prompt need not stand together
    for row in read_table(file, columns):
        item, category = row["item_id"], (row["category_broad"] or "").strip()
        if not re.fullmatch(r"[\w.-]+", item) or not row["proposition_id"].isdecimal() or category not in COLUMNS:
            raise UserError(f"{file!r}: item {item!r}, question {row['proposition_id']!r}, category {category!r}: "
                            "mend that row")
        new = {"item": item, "text": row["text"], "questions": {}, "parents": {}, "categories": {}}
        p, q = prompts.setdefault(item, new), int(row["proposition_id"])
        p["questions"][q], p["categories"][q] = row["question_natural_language"], COLUMNS[category]
        try:
            p["parents"][q] = [int(parent) for parent in (row["dependency"] or "").split(",")]       # 0 is the root
        except ValueError:
            broken.add(item)
    for item in broken:                                        # one bad string frees its whole prompt, as in DSG's code
        prompts[item]["parents"] = {}
    if broken:
        print(f"{len(broken)} prompts have dependencies that cannot be read and are scored without, "
              f"such as {min(broken)}")
    return list(prompts.values())


def read_answers(file, prompts):
    """
    One {id: answer in words} for each of `prompts`, from a CSV file with the columns item_id, question_id, answer, and
    perhaps t2i_model. Rows of other prompts are passed over; UserError where nothing is left, or a question is not one
    of the prompt's.
    """
    rows = read_table(file, ("item_id", "question_id", "answer"))
    if len(models := {row["t2i_model"] for row in rows if "t2i_model" in row}) > 1:
        raise UserError(f"{file!r} answers for {', '.join(sorted(models))}: keep the rows of one model")
    answers = {p["item"]: {} for p in prompts}                 # a prompt may stay without answers
    questions = {p["item"]: p["questions"] for p in prompts}
    for row in rows:
        item, q = row["item_id"], row["question_id"]
        if item not in questions:
            continue
        if not q.isdecimal() or int(q) not in questions[item]:
            raise UserError(f"{file!r} answers question {q!r} of {item!r}, which the DSG file does not ask")
        answers[item][int(q)] = row["answer"]
    if not any(answers.values()):
        raise UserError(f"{file!r} answers none of these prompts: its item_id must be those of the DSG file")
    return [answers[p["item"]] for p in prompts]


def read_captions(file):
    """The lines of a text file, a caption each; a blank line is the null caption. UserError where there is none."""
    try:
        with open(file, encoding="utf-8") as f:
            captions = [line.strip() for line in f.read().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{file!r} cannot be read ({e}): give a text file, one caption a line")
    if not any(captions):
        raise UserError(f"{file!r} holds no caption: write one a line")
    return captions
