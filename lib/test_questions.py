"""DSG's scores on cases worked out by hand, its files as published, and what is refused of them."""
import pytest

from lib.questions import dsg_corpus, dsg_score, dsg_table, read_answers, read_dsg
from lib.settings import UserError

DSG = """\
item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language
zoo_1,"a red fox, left of two owls",fox,1,0,entity,whole,entity - whole (fox),Is there a fox?
zoo_1,"a red fox, left of two owls","fox, red",2,1,attribute,color,"attribute - color (fox, red)",Is the fox red?
zoo_1,"a red fox, left of two owls",owls,3,0,entity,whole,entity - whole (owls),Are there owls?
zoo_1,"a red fox, left of two owls","owls, ==2",4,3,other,count,"other - count (owls, ==2)",Are there two owls?
zoo_1,"a red fox, left of two owls","fox, owls",5,"1,3",relation,spatial,"relation - spatial (fox, owls)",Is it left?
sea_7,a photo of the sea,photo,1,0,global,-,global - (photo),Is this a photo?
sea_7,a photo of the sea,sea,2,"0, calm",entity,whole,entity - whole (sea),Is there a sea?
"""
WORDS = {"zoo_1": ["no", "yes", "yes", "Yes", "yes"], "sea_7": ["yes", "yes"]}
ANSWERS = "t2i_model,item_id,question,question_id,answer\n" + "".join(
    f"m,{item},,{q},{word}\n" for item, words in WORDS.items() for q, word in enumerate(words, 1))

CHAIN, CYCLE = {1: [0], 2: [1], 3: [2]}, {1: [2], 2: [1]}


@pytest.mark.parametrize("answers, parents, score", [
    ({1: 1, 2: 1, 3: 1}, CHAIN, 1), ({}, {}, 0),
    ({1: 0, 2: 1, 3: 1}, CHAIN, 1 / 3),                        # 3 counts: its parent's own answer is 1
    ({1: 1, 2: 0, 3: 1}, CHAIN, 1 / 3),
    ({1: 1, 2: 1}, {1: [2], 2: [0]}, 1),                       # the parent comes later
    ({1: 1, 2: 1}, CYCLE, 1), ({1: 1, 2: 0}, CYCLE, 0),
    ({1: 1, 2: 0}, {1: [1], 2: [2]}, 0.5),                     # its own parent
    ({1: 1}, {1: [7]}, 1), ({1: 1}, {}, 1)])                   # a parent that does not exist; none at all
def test_dsg_looks_one_level_up_and_survives_odd_parents(answers, parents, score):
    assert dsg_score(answers, parents) == pytest.approx(score)


def test_dsg_corpus_averages_over_prompts_not_questions():
    kinds = {1: "entity", 2: "colour", 3: "entity"}
    prompts = [{"answers": {1: 1}, "parents": {1: [0]}, "categories": kinds},
               {"answers": {1: 0, 2: 1, 3: 1}, "parents": {1: [0], 2: [1], 3: [0]}, "categories": kinds},
               {"answers": {}, "parents": {}, "categories": {}}]
    expected = {"overall": pytest.approx((1 + 1 / 3 + 0) / 3), "entity": pytest.approx(2 / 3), "colour": 0}
    assert dsg_corpus(prompts) == expected
    for call in (lambda: dsg_corpus([]), lambda: dsg_score({1: "yes"}, {})):
        with pytest.raises(ValueError, match="no prompts|0 or 1"):
            call()


def test_a_dsg_file_and_published_answers_give_the_columns_of_table_6(tmp_path, capsys):
    (tmp_path / "dsg.csv").write_text(DSG)
    (tmp_path / "answers.csv").write_text(ANSWERS)
    prompts = read_dsg(str(tmp_path / "dsg.csv"))
    assert [p["text"] for p in prompts] == ["a red fox, left of two owls", "a photo of the sea"]
    assert prompts[0]["parents"][5] == [1, 3] and prompts[1]["parents"] == {}      # "0, calm" is no list
    assert prompts[0]["categories"][4] == "attributes"                             # a count
    answers = read_answers(str(tmp_path / "answers.csv"), prompts)
    # no fox, so neither its colour nor its place counts; "Yes" is not "yes"; dsg, each alike: (1 / 5 + 2 / 2) / 2
    expected = {"entities": 2 / 3, "relations": 0, "attributes": 0, "global": 1, "dsg": 0.6}
    assert dsg_table(prompts, answers) == pytest.approx(expected) and answers[1] == {1: "yes", 2: "yes"}
    printed = capsys.readouterr().out
    assert "1 answers are neither yes nor no" in printed and "1 prompts have dependencies" in printed
    assert dsg_table(prompts, [answers[0], {}])["dsg"] == pytest.approx(0.1)       # (1 / 5 + 0) / 2
    assert "2 questions have no answer" in capsys.readouterr().out


@pytest.mark.parametrize("file, old, new, words", [
    ("dsg", "dependency", "parents", "lacks dependency"), ("dsg", ",global,", ",mood,", "category 'mood'"),
    ("dsg", "sea_7,", "../sea,", "'../sea'"), ("dsg", DSG, "", "lacks item_id"), ("dsg", DSG, None, "cannot be read"),
    ("answers", "m,sea_7,,2", "n,sea_7,,2", "answers for m, n"), ("answers", "sea_7,,2", "sea_7,,9", "question '9'"),
    ("answers", "m,", "m,x", "answers none"), ("answers", "answer", "reply", "lacks answer")])
def test_bad_question_and_answer_files_are_refused(file, old, new, words, tmp_path, capsys):
    for name, text in {"dsg": DSG, "answers": ANSWERS}.items():
        if name != file or new is not None:
            (tmp_path / f"{name}.csv").write_text(text.replace(old, new) if name == file else text)
    with pytest.raises(UserError):
        read_answers(str(tmp_path / "answers.csv"), read_dsg(str(tmp_path / "dsg.csv")))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and words in last
