"""pytest lib/test_nouns.py"""
import pytest

from lib.nouns import noun_table, nouns


@pytest.mark.parametrize("caption, expected", [
    ("two small red circles above a large striped blue square on a white background", "circles square background"),
    ("a man standing near the very old bridge , smiling", "man bridge"), ("", ""), ("3 2 1 !", "")])
def test_nouns_end_their_phrases(caption, expected):
    assert nouns(caption.split()) == expected.split()


def test_the_table_of_nouns_counts_valid_distinct_and_all():
    plain, last = noun_table({"plain": [["grey", "level", str(k)] for k in range(24)], "long": []})[1:]
    assert plain.split() == ["plain", "24", "1", "1", "24", "3.0", "1.0"] and last.startswith("VN: ")
