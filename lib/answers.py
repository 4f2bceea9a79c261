"""
Two programs of eval.py that need no model: answers to questions about pictures from elsewhere, and answers of people.
"""
from lib.files import file_hash
from lib.networks import open_vqa
from lib.people import score_ratings
from lib.processes import get_rank, on_all_ranks
from lib.questions import dsg_table, read_answers
from lib.references import find_images, read_image
from lib.results import make_card, report, write_result
from lib.tasks import dsg_task


def score_answers(folders, prompts, dsg_file, answers_file, vqa, device, json_file):
    """DSG's questions about pictures from elsewhere: a file of answers, or a network that looks at the first folder."""
    if answers_file:
        answers = read_answers(answers_file, prompts)
        about = {"answers": f"{answers_file}, sha256 {file_hash(answers_file)}"}
    else:
        files = find_images(folders[0], [p["item"] for p in prompts])              # a picture for each item
        ask, about = open_vqa(vqa, device)
        task = dsg_task(prompts, ask)
        answers = on_all_ranks(lambda i: task.look(read_image(files[i]), i), range(len(files)), "questions")
    if get_rank():
        return
    result = {"questions": dsg_table(prompts, answers)}        # DSG and each category
    print(report(result))
    dsg = f"{dsg_file}, sha256 {file_hash(dsg_file)}"
    card = make_card({"vqa": (None, about)}, device, n=len(prompts), dsg=dsg, about=folders[0])
    answers = {p["item"]: words for p, words in zip(prompts, answers)}             # as a file of answers has them
    write_result(card, {"run": folders[0], "n": len(prompts), "metrics": result, "answers": answers}, json_file)


def score_people(sheet, ratings, runs, json_file):
    """Win rates, neutral share and agreement of the raters' answer files."""
    result, key = score_ratings(sheet, ratings, runs)          # the key tells which side was which run
    answers = {file: f"sha256 {file_hash(file)}" for file in ratings}
    card = {"sheet": key["sheet"], "answers": answers, "interval": "95 %, bootstrap over pairs, seed 0"}
    write_result(card, {"runs": key["runs"], "raters": len(ratings), "metrics": result}, json_file)
