"""The nouns of English captions, by rule and without a tagger, and the table of them that papers print."""
import re
from collections import Counter

FUNCTION_WORDS = frozenset("""
    a about above across after against all along also although am among an and another any are around as at away back be
    because been before behind being below beneath beside between beyond both but by can could did do does doing down
    during each either else every few for from had has have left right having he her hers him his how i if in inside
    into is it its itself just let like many may me might more most much must my near neither no nor not of off on once
    one only onto or other our out outside over own per s same she should since so some such t than that the their them
    then there these they this those three through throughout to together too toward towards two under until up upon
    very via was we were what when where which while who whom whose why will with within without would you your four
    five six seven eight nine ten known seen shown made held set taken sits sit stands stand lies lie appears appear
    wears wear holds hold looks look shows show features feature gives give contains contain captures
    capture""".split())


def words(caption):
    """Words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())


def nouns(words):
    """
    The nouns among the words of a caption: of each unbroken run of content words the last one, since a noun phrase ends
    in its noun ("a large red circle"). Function words, punctuation and numbers break a run; adverbs and participles,
    known by -ly, -ing and -ed, are passed over. "Painting" and the first half of "stone church" are lost to that, and
    some verbs are counted.
    """
    found, last = [], None
    for word in [*words, "."]:                                 # the stop ends the last run
        if re.fullmatch(r"\w*[aeiouy]\w+(ly|ing|ed)", word):   # with a vowel before the ending: not ring, fly, red
            continue
        if word.isalpha() and word not in FUNCTION_WORDS:
            last = word
        elif last:                                             # a run ends here
            found, last = found + [last], None
    return found


def noun_table(captions):
    """{kind: captions as lists of words} -> lines with the columns of PixArt-Sigma's Table 1."""
    lines = ["caption   volume        VN        DN   total noun     ACL  average/img"]
    for kind, texts in captions.items():
        counts = Counter(noun for words in texts for noun in nouns(words))
        total, valid, volume = counts.total(), sum(count > 10 for count in counts.values()), len(texts)
        if volume:
            length = sum(map(len, texts)) / volume
            numbers = f"{valid:9d} {len(counts):9d} {total:12d} {length:7.1f} {total / volume:12.1f}"
            lines.append(f"{kind:7s} {volume:8d} {numbers}")
    return lines + ["VN: nouns that occur more than 10 times; DN: distinct nouns; ACL: average words of a caption; "
                    "average/img: nouns of a caption; nouns by rule, see lib/nouns.py"]
