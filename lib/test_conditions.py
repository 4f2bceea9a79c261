"""Named numbers of pictures: what a config and a command line may say of them, and what data must have."""
import math

import pytest
import torch

from lib.conditions import (augmented, beside, check_cascade_keys, check_levels, condition_names, condition_row,
                            count_columns, embedded_conditions, parse_set, ranges_known, ranges_seen, read_conditions,
                            seeing)
from lib.settings import UserError

KNOWN = {"conditions": "size, score,size_and_crop", "condition_ranges": "size 0.25..0.5, score -1..1e+06"}


class Numbered:
    """A data set whose pictures have these numbers."""
    name = "photos"

    def __init__(self, **numbers):
        self.numbers = numbers


def refuses_to(capsys, words, function, *args):
    with pytest.raises(UserError):
        function(*args)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and ": " in said[7:] and words in said, said


def test_columns_stand_in_the_order_of_the_names():
    assert condition_names(KNOWN) == ["size", "score", "size_and_crop"] and count_columns(KNOWN) == 8
    assert condition_names({"conditions": ""}) == []
    row = condition_row(KNOWN, range(6), {"score": 7, "size": math.nan}.get)
    assert math.isnan(row[0]) and row[1:] == [7.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert [c[1:] for c in read_conditions(KNOWN)] == [(1, 0.25, 0.5, 6), (1, -1.0, 1e6, 6), (6, 0.0, 2.0 ** 14, 14)]


@pytest.mark.parametrize("text", ["a.b", "size,Size", "a b", "size=0.4", "size,size_and_crop,size"])
def test_names_that_no_part_of_a_model_could_have_are_refused(text, capsys):
    refuses_to(capsys, "stands there twice or cannot be a name", condition_names, {"conditions": text})


def test_ranges_are_those_seen_or_those_that_weights_know(capsys):
    data = Numbered(size=(0.1, 0.9), score=(2.0, 3.5), flat=(5.0, 5.0))
    new = {"conditions": "score,size_and_crop,size", "condition_ranges": ""}
    new["condition_ranges"] = ranges_seen(new, data)
    assert new["condition_ranges"] == "score 2..3.5, size 0.1..0.9"
    assert ranges_known(new, {"conditions": "size", "condition_ranges": "size 0.25..0.5"}) == (
        "score 2..3.5, size 0.25..0.5")
    assert ranges_known(new, {"conditions": "", "condition_ranges": ""}) == new["condition_ranges"]
    refuses_to(capsys, "the older run knows objects: give --conditions objects,size,score,size_and_crop",
            ranges_known, new, {"conditions": "objects,size", "condition_ranges": ""})
    for name, words in (("scor", "did you mean 'score'?"), ("flat", "is 5 in every picture of photos: leave it out")):
        refuses_to(capsys, words, ranges_seen, {"conditions": name}, data)
    refuses_to(capsys, "no picture of photos has a number 'score' beside it: put it into NAME", ranges_seen,
            {"conditions": "score"}, Numbered())


def test_set_gives_numbers_and_tells_those_outside_of_what_was_seen(capsys):
    assert parse_set(None, KNOWN) == {} and parse_set("size=0.3, score = 2", KNOWN) == {"size": 0.3, "score": 2.0}
    assert capsys.readouterr().err == ""
    assert parse_set("size=0.9", KNOWN) == {"size": 0.9}      # told, not refused
    assert "size=0.9: only 0.25 to 0.5 was seen" in capsys.readouterr().err
    for text, words in (("size=big", "--set size=big: give a number, such as size=0.375"), ("size", "give a number"),
                        ("size=nan", "give a number"), ("objects=2", "this model knows size, score: set one of these"),
                        ("size_and_crop=3", "this model knows size, score")):
        refuses_to(capsys, words, parse_set, text, KNOWN)
    refuses_to(capsys, "this model knows no condition: teach it: train.py --stage condition "
            "--conditions size", parse_set, "size=0.4", {"conditions": "size_and_crop", "condition_ranges": ""})


def test_a_small_picture_is_enlarged_and_noised_to_its_level():
    low, eps = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.full((3, 1, 2, 2), 0.5)
    one, half, noise = augmented(low, eps, torch.tensor([0.0, 0.5, 1.0]), (2, 2))
    assert torch.equal(one, low[0]) and torch.allclose(noise, eps[2], atol=1e-6)
    assert torch.allclose(half, (low[1] + eps[1]) / math.sqrt(2))                  # as much of the one as of the other
    assert augmented(low, eps, torch.zeros(3), (4, 6)).shape == (3, 1, 4, 6)
    flat = augmented(torch.full((1, 1, 2, 2), 0.3), eps[:1], torch.zeros(1), (8, 8))
    assert torch.allclose(flat, torch.tensor(0.3))


def test_a_cascade_is_told_the_level_and_guidance_leaves_no_picture_out(capsys):
    calls = []

    def model(*given):
        calls.append(given)
        return given[0][:, :1]
    low, level, z = torch.randn(2, 1, 4, 4), torch.tensor([0.1, 0.2]), torch.randn(4, 1, 4, 4)
    beside(model, low, level)(z, "logsnr", "text", torch.full((4, 3), 7.0))        # captions, then null captions
    (both, logsnr, text, told), = calls
    assert (logsnr, text) == ("logsnr", "text") and torch.equal(both, torch.cat([z, torch.cat([low, low])], 1))
    assert torch.equal(told, torch.tensor([[7, 7, 7, s] for s in (0.1, 0.2, 0.1, 0.2)]))
    config = {"conditions": "size", "condition_ranges": "", "low_resolution": 32, "augmentation_sample": 0.5}
    last = embedded_conditions(config)[-1]
    assert len(embedded_conditions(config)) == 2 and (last.columns, last.low, last.high) == (1, 0.0, 1.0)
    assert count_columns(config) == 1 == len(embedded_conditions(config | {"low_resolution": 0}))
    refuses_to(capsys, "augmentation_sample = 0.5 is above augmentation = 0.4", check_levels,
               config | {"augmentation": 0.4})
    net = torch.nn.Conv2d(1, 1, 1)
    net.forward = model
    shown = []                                                 # each picture has a noise of its own, at any batch size
    for first, n in ((0, 3), (2, 1)):
        chained = seeing(net, config, torch.zeros(n, 1, 4, 4), 5, first, (1, 8, 8))
        chained(torch.zeros(n, 1, 8, 8), 0, 0, torch.zeros(n, 1))
        shown.append(calls[-1][0][:, 1])
        assert torch.equal(calls[-1][3], torch.tensor([[0.0, 0.5]] * n))
    assert torch.equal(shown[0][2:], shown[1]) and 0.2 < shown[0].std() < 0.7 and not torch.equal(*shown[0][:2])


def test_keys_of_a_cascade_are_refused_where_there_is_none(capsys):
    check_cascade_keys({"low_resolution": 32}, {"base": "out", "augmentation_sample": 0.1})
    check_cascade_keys({"low_resolution": 0}, {"prefix": "a"})
    refuses_to(capsys, "--base: this run is no cascade: leave it out", check_cascade_keys, {"low_resolution": 0},
               {"base": "out", "prefix": "a"})
