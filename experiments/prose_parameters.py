"""Find descriptions of parameters that say nothing: the heuristic of `prose.py`.

A description is empty if it has no verb, no unit, no shape such as `(B, N, C)`, and no value in backticks. Examples are
"Of the launch.", "Likewise." and a name that is repeated. Lists of words replace a grammar here, so a single finding
may be wrong.
"""

from __future__ import annotations

import re


def word_set(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


CODE = "Code"
"""What replaces a code span; it is no verb."""
SHAPE = re.compile(r"\((?:[\w·*+/\- ]+|…|\.\.\.),(?: ?(?:[\w·*+/\- ]+|…|\.\.\.),?)*\)")
UNIT = re.compile(
    r"(?:\b(?:seconds?|milliseconds?|ms|minutes?|hours?|bytes?|[KMG]i?B|GFLOP|pixels?|percent|hertz|bits?|nats?|"
    r"share|fraction|probability|ratio|number of|how many|counted (?:from|in))\b|[%°]|/s\b|\d\s?(?:…|\.\.|to)\s?\d)",
    re.IGNORECASE,
)
PREPOSITIONS = word_set(
    "of for from with without in on at by as to or and per via like under over between within after before"
)
DETERMINERS = word_set("the a an its their each all every this these those one no them any both more fewer")
CLAUSE_OPENERS = word_set("whether what where how if that which who when because until unless while")
QUESTIONS = word_set("whether what where how")
"""Words that open a clause with a verb as the first word, too; "Which words." has none."""
SUBJECTS = word_set("it they nobody somebody you")
AFTER_PARTICIPLE = PREPOSITIONS | DETERMINERS | word_set(
    "again alone along anew down off once only out so that together twice up what when where which"
)  # fmt: skip
AUXILIARIES = word_set(
    "is are was were be been being has have had having do does did can could may might must shall should will would "
    "cannot isn't aren't doesn't don't"
)
VERBS = word_set(
    "add allow appear apply ask become begin belong choose come compute contain continue convert decide decode depend "
    "describe divide draw encode exist explain fill find forbid get give go happen hear hold ignore include join keep "
    "know lack learn let lie lose make mean meet multiply pick prevent print produce put raise read recompute refuse "
    "remove replace require save say see select send serve skip speak stand stay take teach tell want warn write yield "
    "began came chose gave grew knew saw took went wrote"
)
"""Verbs that are hardly ever nouns in a docstring, and past forms that are never participles."""
NOUN_VERBS = word_set(
    "average batch change check count cover cut end fail fall fit group label lead limit list look mark match measure "
    "mirror move name need order pass plan pool place reach report repeat return run sample scale score set share show "
    "sort split squash start step stop store sum test train try turn use vary wait weight work"
)
"""Verbs that are nouns, too: they count where no noun can be, see `_is_finite`."""
PARTICIPLES = word_set(
    "begun bought built called chosen come done drawn found given gone held kept known left lost made meant met paid "
    "said seen sent shown sought spent stood taken taught thought told used written won"
)
EMPTY_WORDS = frozenset({"likewise", "ditto", "same", "see above"})


def fault_of(parameter: str, description: str) -> str | None:
    """Return what is wrong with the description of a parameter, or None.

    The check is a heuristic: it knows lists of verbs and has no grammar. A description passes if it has a verb, a unit
    or a shape. One with a value, a type or a key in backticks passes, too. It fails if it begins with a preposition, as
    "Of `build`." does, since then only the name says what it is about.

    Args:
        parameter: Name of the parameter; `*args` may keep its star.
        description: Text behind the colon, which may have several lines.
    """
    shown = re.sub(r"`[^`]+`", CODE, description)
    words = [word.strip(".,;:!?()[]*\"'").lower() for word in shown.split()]
    words = [word for word in words if any(letter.isalnum() for letter in word)]
    if SHAPE.search(shown) or UNIT.search(shown) or has_verb(shown):
        return None
    if " ".join(words) in EMPTY_WORDS:
        return "says nothing"
    if words and words[0] in PREPOSITIONS:
        return "begins with a preposition"
    if CODE in shown:
        return None
    names = {_stem(part) for part in parameter.strip("*").lower().split("_")}
    if {_stem(word) for word in words} - {"the", "a", "an", "its"} <= names:
        return "repeats the name"
    return "no verb, unit or shape"


def has_verb(text: str) -> bool:
    """Return whether text seems to have a verb; code spans are expected to be masked."""
    tokens = [(word.strip("()[]*\"'").rstrip(".,;:!?").lower(), word) for word in text.split()]
    before, opens_clause = "", True
    for index, (word, raw) in enumerate(tokens):
        after = "" if raw[-1] in ".,;:!?)" or index + 1 == len(tokens) else tokens[index + 1][0]
        if (
            word in AUXILIARIES
            or (word in CLAUSE_OPENERS and after and (index > 0 or word in QUESTIONS))
            or (word in SUBJECTS and after and before not in PREPOSITIONS - {"as"})
            or _is_finite(word, before, after, opens_clause)
            or _is_participle(word, after, is_first=index == 0)
        ):
            return True
        before, opens_clause = word, raw[-1] in ".;:,"
    return False


def _is_finite(word: str, before: str, after: str, opens_clause: bool) -> bool:
    """Return whether a word is a finite verb, an imperative or an infinitive.

    A word that may be a noun ("run", "names") counts after "to", after a relative pronoun and before a determiner. At
    the beginning of a clause it counts unless a preposition follows ("Turns photos", but not "Turns of photos").
    """
    stem = _stem(word)
    if before in ("of", "the", "a", "an"):
        return False
    if stem in VERBS or word in VERBS:
        return True
    has_object = after in DETERMINERS or (opens_clause and after != "" and after not in PREPOSITIONS)
    return stem in NOUN_VERBS and (has_object or before in ("to", "that", "which", "who"))


def _is_participle(word: str, after: str, *, is_first: bool) -> bool:
    """Return whether a word is a participle, and no adjective.

    One in -ed counts where a phrase goes on or ends ("features stored in the cache"). It does not count before a noun
    ("stored features"), nor alone ("Unwrapped."). One in -ing counts before a determiner ("reading the clock").
    """
    if word.endswith("ing") and len(word) > 5:
        return after in DETERMINERS
    is_past = word in PARTICIPLES or (word.endswith("ed") and len(word) > 4)
    return is_past and (after in AFTER_PARTICIPLE or (after == "" and not is_first))


def _stem(word: str) -> str:
    """Return a word without the ending of its plural or third person."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "goes", "does")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
