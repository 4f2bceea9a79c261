"""
People compare the pictures of two sources, side by side: the page on which they do, and how far they agree.

    write_page("sheet", ["out/a", "out/b"], captions, images)  # index.html to give away, key.json to keep
    key, votes = read_ratings("sheet", ["answers-1.json", "answers-2.json"])
    ratings_score(votes)                                       # shares for A, neither and B; agreement

Pairs come in random order and on random sides, their sources unnamed; two questions have three answers each (Greedy
Growing, Sec. 6.2). The page, lib/people.html, is one file that needs no server: the pictures lie in it, and the answers
stay in the browser until the rater saves them.
"""
import base64
import hashlib
import json
import os
import tempfile

import numpy as np

from lib.draws import generator, uniforms
from lib.files import import_extra
from lib.pictures import write_png
from lib.settings import UserError

PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "people.html")
QUESTIONS = {"aesthetics": "Which one looks better, whatever the words say?",
             "consistency": "Which one shows better what the words say?"}


# ---------------------------------------------------------------------------------------------------------------
# How far people agree. Votes are (questions, pairs, 3): how many raters said A, neither, B


def krippendorff(units):
    """
    Krippendorff's alpha (2011) of units (n, levels): how many raters gave unit i level k. alpha = 1 - D_o / D_e, the
    squared ordinal difference of two ratings of one unit over that of any two: 1 is full agreement, 0 that of chance.
    Units with one rating say nothing; nan where all ratings are the same.
    """
    units = np.asarray(units, float)
    units = units[units.sum(1) > 1]                            # a single rating has nothing to agree with
    of_level, of_unit = units.sum(0), units.sum(1)             # (levels,), (n,)
    rank = of_level.cumsum() - of_level / 2                    # (levels,): mean rank of a rating of that level
    difference = np.square(rank[:, None] - rank)               # (levels, levels)
    # both sums are over all pairs of ratings; what is left away from each is the same factor
    observed = (np.einsum("ui,ij,uj->u", units, difference, units) / (of_unit - 1)).sum()
    expected = of_level @ difference @ of_level / max(of_level.sum() - 1, 1)
    return 1 - observed / expected if expected > 0 else float("nan")


def ratings_score(votes, draws=1000):
    """
    Votes -> {"wins_a", "neutral", "wins_b" (shares of the votes), "alpha"}, each {"value", "interval"}: a 95 % interval
    by bootstrap over pairs (`draws` resamples), because the pairs stand for all captions, whereas the raters of one
    pair see the same two pictures.
    """
    votes = votes[:, votes.sum((0, 2)) > 0]                    # (questions, n, 3): pairs that somebody answered

    def figures(votes):
        return [*votes.sum((0, 1)) / votes.sum(), krippendorff(votes.reshape(-1, 3))]      # one per name below
    random, n = generator("bootstrap"), votes.shape[1]         # the same interval each time
    resampled = np.array([figures(votes[:, random.integers(n, size=n)]) for _ in range(draws)])      # (draws, 4)
    result = {}
    for name, value, many in zip(("wins_a", "neutral", "wins_b", "alpha"), figures(votes), resampled.T):
        many = many[np.isfinite(many)]                         # alpha is nan where a resample holds one level alone
        interval = np.percentile(many, [2.5, 97.5]).tolist() if len(many) else [float("nan")] * 2
        result[name] = {"value": float(value), "interval": interval}
    return result


# ---------------------------------------------------------------------------------------------------------------
# The page


def picture_url(image):
    """
    (H, W, 3) uint8 -> a data: address that holds the picture itself. Small ones as PNG, exactly; above 256 px as JPEG,
    or 500 pairs would be gigabytes.
    """
    kind = "png" if max(image.shape) <= 256 else "jpeg"
    with tempfile.TemporaryDirectory() as folder:              # write_png writes files
        file = os.path.join(folder, f"picture.{kind}")
        if kind == "png":
            write_png(file, image)
        else:
            pillow = import_extra("PIL.Image", "a page with pictures above 256 px", "pillow")
            pillow.fromarray(image).save(file, quality=95, subsampling=0)
        with open(file, "rb") as f:
            return f"data:image/{kind};base64," + base64.b64encode(f.read()).decode()


def write_page(folder, sources, captions, images, seed=0):
    """
    index.html for the raters, and key.json, which knows the sides. `sources` are the names of A and B, which the page
    does not hold; `images` (2, n, H, W, 3) uint8 or two such sets, A's first. The order of pairs and the sides follow
    from `seed`.
    """
    pairs, swapped = [], {}                                    # in the order shown; by pair: is A on the right?
    for i in generator("pairs", seed).permutation(len(captions)).tolist():
        swapped[str(i)] = bool(uniforms(1, "sides", seed, i)[0] < 0.5)
        a, b = (picture_url(of_source[i]) for of_source in images)
        left, right = (b, a) if swapped[str(i)] else (a, b)
        pairs.append({"id": str(i), "caption": captions[i], "left": left, "right": right})
    name = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:12]             # so that answers meet the right key
    with open(PAGE, encoding="utf-8") as f:
        page = f.read().replace("SHEET", name).replace("QUESTIONS", json.dumps(QUESTIONS))
    page = page.replace("PAIRS", json.dumps(pairs).replace("<", "\\u003c"))        # no caption can end the script
    key = json.dumps({"sheet": name, "runs": sources, "swapped": swapped}, indent=1)
    os.makedirs(folder, exist_ok=True)
    for file, text in (("key.json", key), ("index.html", page)):
        with open(os.path.join(folder, file), "w", encoding="utf-8") as f:
            f.write(text)


def read_ratings(folder, files):
    """
    (key, votes (questions, pairs, 3) for A, neither, B) of the raters' answer `files`, for the page whose key.json lies
    in `folder`. UserError where a file cannot be read, belongs to another page, or is a rater's second.
    """
    try:
        key, *answers = [read_json(file) for file in (os.path.join(folder, "key.json"), *files)]
        votes = np.zeros((len(QUESTIONS), len(key["swapped"]), 3))                 # A, neither, B
        raters = {}                                            # the file of each
        for file, content in zip(files, answers):
            if content["sheet"] != key["sheet"]:
                raise UserError(f"{file!r} answers another sheet than {folder!r}: "
                                "give the --sheet folder that it was made from")
            if other := raters.get(content["rater"]):
                raise UserError(f"{other!r} and {file!r} are of one rater: give each rater's last file alone")
            raters[content["rater"]] = file
            add_votes(votes, content["answers"], key["swapped"])
    except FileNotFoundError as e:
        raise UserError(f"no file {e.filename!r}: --sheet names the folder with key.json, --ratings the files that the "
                        "page saved")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"the answers cannot be read ({type(e).__name__}: {e}): "
                        "give --sheet FOLDER with key.json, and files as the page saves them")
    return key, votes


def read_json(file):
    """The content of a JSON file, which nothing executes."""
    with open(file, encoding="utf-8") as f:
        return json.load(f)


def add_votes(votes, answers, swapped):
    """
    Add one rater's answers {pair: {question: -1 left, 0 unsure, 1 right}} to votes. KeyError for any other answer.
    """
    row = {pair: i for i, pair in enumerate(swapped)}
    for pair, of_pair in answers.items():
        for question, answer in of_pair.items():
            side = {-1: -1, 0: 0, 1: 1}[answer] * (-1 if swapped[pair] else 1)     # -1 is A, 1 is B
            votes[list(QUESTIONS).index(question), row[pair], 1 + side] += 1


def score_ratings(folder, files, sources=()):
    """
    ({question or "together": ratings_score}, key) of answer files, printed too. Without a folder, key.json lies beside
    the first file. UserError where `sources` are given and the page compares others, or a question has no answer at
    all.
    """
    key, votes = read_ratings(folder or os.path.dirname(files[0]) or ".", files)
    if sources and sources != key["runs"]:
        raise UserError(f"the sheet compares {' and '.join(key['runs'])}, not {' and '.join(sources)}: "
                        "leave the runs away")
    if not votes.sum((1, 2)).all():
        raise UserError("a question has no answer at all: answer at least one pair")
    result = {question: ratings_score(votes[k:k + 1]) for k, question in enumerate(QUESTIONS)}
    result["together"] = ratings_score(votes)
    pairs = int((votes.sum((0, 2)) > 0).sum())
    print(f"A is {key['runs'][0]}, B is {key['runs'][1]}; {len(files)} raters, {pairs} pairs; "
          "alpha is Krippendorff's, ordinal; 95 % intervals by bootstrap over pairs")
    for question, figures in result.items():
        cells = [f"{k} {v['value']:.3f} [{v['interval'][0]:.3f}, {v['interval'][1]:.3f}]" for k, v in figures.items()]
        print(f"{question:12s}" + "  ".join(cells))
    return result, key
