"""Sections and flags resolve in their order, each value is checked, and each refusal says what to do."""
import sys

import pytest

from lib.settings import Parser, UserError, load_config, words_of

SECTIONS = """
[DEFAULT]
inherits = ""
steps = 1
lr = 0.1
shell = "a"
sizes = (8,)
fsdp = False
tries = 0
[ranges]
lr = 0..
shell = a | b
tries = 0 | 2..
[stages]
pretrain =
grow =
defrost = grow
[one]
steps = 2
lr = 0.2
[one.grow]
shell = "b"
[two]
inherits = "one"
lr = 1
[three]
steps = 3
[three.defrost]
lr = 0.5
[both]
inherits = "one, three"
[loop]
inherits = "pool"
[pool]
inherits = "loop"
"""


@pytest.fixture
def settings_file(tmp_path):
    (tmp_path / "c.txt").write_text(SECTIONS)
    return str(tmp_path / "c.txt")


def test_words_of_a_key(settings_file):
    assert words_of("shell", settings_file) == ["a", "b"]


@pytest.mark.parametrize("name, stage, flags, steps, lr, shell", [
    ("one", "pretrain", [], 2, 0.2, "a"), ("one", "grow", [], 2, 0.2, "b"),
    ("two", "pretrain", [("lr", "3")], 2, 3.0, "a"), ("two", "grow", [("steps", "7")], 7, 1.0, "b"),
    ("both", "pretrain", [], 3, 0.2, "a"), ("both", "grow", [], 3, 0.2, "b"), ("both", "defrost", [], 3, 0.5, "b"),
    ("three", "other", [], 3, 0.1, "a")])
def test_parents_stages_and_flags_win_in_that_order(name, stage, flags, steps, lr, shell, settings_file):
    config = load_config(name, stage, flags, settings_file)
    assert (config["steps"], config["lr"], config["shell"], config["sizes"]) == (steps, lr, shell, (8,))


@pytest.mark.parametrize("name, key, text, words", [
    ("onne", "", "", "did you mean 'one'"), ("loop", "", "", "name another one"),
    ("one", "learning_rate", "1", "did you mean 'lr'"), ("one", "lr", "1e-4x", "lr takes a float"),
    ("one", "lr", "nan", "lr takes a float"), ("one", "steps", "1.5", "takes an int"),
    ("one", "steps", "0", "at least 1"),
    ("one", "lr", "-1", "at least 0"), ("one", "shell", "c", "take one of a, b"),
    ("one", "tries", "1", "one of 0, at least 2"), ("one", "sizes", "()", "at least 1"),
    ("one", "sizes", "4, 0", "at least 1"), ("one", "sizes", "0.5", "takes a tuple"),
    ("one", "fsdp", "1", "takes a bool")])
def test_what_a_key_cannot_be_is_refused(name, key, text, words, settings_file, capsys):
    with pytest.raises(UserError) as refusal:
        load_config(name, "grow", [(key, text)] if key else [], settings_file)
    error = capsys.readouterr().err
    assert refusal.value.code == 2 and error.startswith("error: ") and words in error


def command_line():
    parser = Parser("a command")
    parser.add_argument("run")
    parser.add_argument("captions", nargs="*")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--ratings", nargs="+")
    parser.add_argument("--steps", type=int)                   # wins over the key of this name
    return parser


@pytest.mark.parametrize("words, own, keys", [
    ("RUN", {}, {}), ("--n 2 RUN a b", {"n": 2, "captions": ["a", "b"]}, {}),
    ("RUN --fresh a", {"fresh": True, "captions": ["a"]}, {}), ("RUN --fresh True", {"fresh": True}, {}),
    ("RUN --fresh False a", {"captions": ["a"]}, {}), ("RUN --fresh=False", {}, {}),
    ("RUN --fsdp a --lr=1e-4", {"captions": ["a"]}, {"fsdp": "True", "lr": "1e-4"}),
    ("RUN --fsdp False", {}, {"fsdp": "False"}), ("--steps 9 --seed 3 RUN", {"steps": 9}, {"seed": "3"}),
    ("RUN --ratings f g --lr -1", {"ratings": ["f", "g"]}, {"lr": "-1"})])
def test_flags_and_keys_stand_in_any_order(words, own, keys):
    args, found = command_line().parse_keys(words.split())
    assert vars(args) == {"run": "RUN", "captions": [], "n": 4, "fresh": False, "ratings": None, "steps": None} | own
    assert dict(found) == keys


@pytest.mark.parametrize("words, hint", [
    ("RUN --wdith 3", "did you mean 'width'"), ("RUN --frehs", "did you mean 'fresh'"), ("RUN --lr 1 --lr=2", "twice"),
    ("RUN --n 1 --n 2", "twice"), ("RUN --n x", "--n: invalid int"), ("RUN --n", "--n: expected"),
    ("--n 1", "required: run"),    ("RUN --fresh=yes", "True or False")])
def test_words_that_cannot_be_read_are_one_line(words, hint, capsys):
    with pytest.raises(UserError):
        command_line().parse_keys(words.split())
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and hint in error
    with pytest.raises(UserError):                             # a command line that takes only some keys
        Parser("", keys=["lr"]).parse_keys(["--width", "3"])


def test_values_of_a_command_line_are_checked(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--prefix", "2024", "--augmentation_sample", "0"])
    args, values = Parser("", keys=("prefix", "augmentation_sample")).parse_values()
    assert values == {"prefix": "2024", "augmentation_sample": 0.0}
    monkeypatch.setattr(sys, "argv", ["script", "--augmentation_sample", "2"])
    with pytest.raises(UserError):
        Parser("", keys=("augmentation_sample",)).parse_values()
    assert "take a value in [0, 1]" in capsys.readouterr().err
