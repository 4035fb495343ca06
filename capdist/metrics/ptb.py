"""The tokeniser of the COCO caption tools, without Java.

For published scores `pycocoevalcap` splits captions with the Stanford `PTBTokenizer` (CoreNLP 3.4.1, options
`-preserveLines -lowerCase`). It then drops the tokens in `PUNCTUATIONS`. A full stop that is not dropped is worth two
BLEU points, so only scores over the same tokens can be compared. This module writes the rules that matter for English
captions as one regular expression; they were found by observing the Java tool. The two are known to differ in long
e-mail or file names, telephone numbers, and scripts other than Latin. There no caption is lost, only split in another
place.

Faults of the reference are kept. Brackets survive as `-lrb-` and `-rrb-`, because the reference lists them in capitals
but lower-cases first. `!!` survives because only single marks are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

TOKENISER = "PTB rules 1 (as Stanford PTBTokenizer 3.4.1), lower case, punctuation removed"
"""What a report says next to its scores; the number changes with every change of how captions are split."""

PUNCTUATIONS = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Tokens that are dropped. The reference lists `-LRB-` too, which lower-cased text never holds."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

# Two words written as one, which the treebank separates.
_ASSIMILATIONS = {
    "cannot": ["can", "not"],
    "gimme": ["gim", "me"],
    "gonna": ["gon", "na"],
    "gotta": ["got", "ta"],
    "lemme": ["lem", "me"],
    "wanna": ["wan", "na"],
}

# Typewriter equivalents: quotation marks and dashes end up dropped, currencies as the treebank writes them.
_TYPEWRITER = str.maketrans(
    {"’": "'", "‘": "`", "‛": "`", "‹": "`", "›": "'", "“": '"', "”": '"', "«": '"', "»": '"'}
    | {"–": " -- ", "—": " -- ", "―": " -- ", "…": " ... ", "‐": "-", "‑": "-"}
    | {"¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
    | {"¢": " cents ", "£": " # ", "€": " $ ", "¤": " $ ", "\u00ad": None, "\u200b": " ", "\ufeff": " "}
)

# Their full stop belongs to the word: months, days, states, titles, companies, ranks.
_ABBREVIATIONS = (
    "adj adm adv al ala apr ariz assn assoc asst atty aug ave bancorp bhd bldg blvd brig bros calif capt "
    "cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext "
    "feb fla fri ft ga gen gov govs hon inc ind intl jan jos jr jul jun kan kans ky lieut lt ltd maj mar "
    "md messrs mfg mich minn mlle mme mo mon mont mr mrs ms mt mtg natl neb nev nov oct okla penn pfc ph "
    "plc pres prof profs pte pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste "
    "supt sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo"
)
# Words of their own in lower case ("he is ill."), abbreviations with a capital.
_CAPITAL_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBERED_ABBREVIATIONS = "art ca fig figs no nos op pp prop"  # before a number only: "no. 5"

_LETTER = r"[^\W\d_²³¹]"
_CHAR = r"(?:[^\W_²³¹]|[\u0300-\u036f])"
_WORD = rf"{_CHAR}+"
_END = rf"(?!{_CHAR})"

# After "X." these begin a new sentence: the letter was a word ("size X. The dog"), not an initial.
_STARTERS = (
    "A According After An As At But He Her Here However If In It Many Now One Other Our She Since "
    "So Some Such That The Their Then There These They This We What When While You"
)


def _either(words: str) -> str:
    """Return the pattern of any of these words, longest first."""
    return "|".join(sorted(words.split(), key=len, reverse=True))


# Tried from top to bottom at each position, so a longer reading comes before a shorter one.
_TOKEN = re.compile(
    rf"""
      (?P<whole>
          </?[A-Za-z][^<>\s]*>                                       # <b>, <unk>
        | https?://[^\s"<>|()]*[^\s"<>|().,;:!?'] | www\.[^\s"<>|()]*[^\s"<>|().,;:!?']
        | [\w.+-]{{0,63}}\w@\w[\w-]*(?:\.\w+)* | [@\#]{_LETTER}\w*     # an address, @user, #tag
        | (?:(?i:o|[dln]|qu)'{_LETTER}{{2,}} | [A-HJ-XZ]'(?!(?i:ll|re|ve){_END}){_LETTER}{{2,}})
          (?:-{_WORD})*                                              # o'clock, d'art, R'Us
        | (?i:ma'am|c'mon|c'est|s'mores|e'er|ne'er|o'er|hallowe'ens?|nat'l){_END}
        | (?i:'(?:em|till?|cause){_END} | 'n(?:'|{_END}) | (?:ol|d)'{_END})
        | '\d\ds?{_END}(?!["'])                                       # '90s
        | (?i:y'|[jl]'(?={_LETTER}))(?={_LETTER})                    # y' all
        | (?i:{_LETTER}(?:\.{_LETTER})+\.?{_END} | ph\.d\.)          # u.s., e.g., p.m.
        | (?i:{_either(_ABBREVIATIONS)})\.{_END} | (?:{_either(_CAPITAL_ABBREVIATIONS)})\.{_END}
        | (?i:{_either(_NUMBERED_ABBREVIATIONS)})\.(?=\s*\d)
        | [A-Za-z]\.(?!{_LETTER}|\s+(?:{_either(_STARTERS)})\b)
        | {_WORD}(?:-{_WORD})*\.(?=[,;:])                            # all before ".," is abbreviated
      )
    | (?P<clitic>'(?i:s|d|m|ll|re|ve){_END} | (?i:n't){_END} | (?i:'t(?=(?:is|was){_END})))
    | (?P<number>[-+]?\d*(?:[.,:]\d+)+(?!-) | [-+]\d+{_END})
    | (?P<word>
          {_WORD}?(?=(?i:n't){_END})                                 # do|n't
        | [A-Z]+(?:&[A-Z]+)+ | [Cc]\+\+ | [CFcf]\#{_END}
        | \d+(?:[.,:]\d+)*(?:[-/]\d+(?:[.,:]\d+)*)+{_END}            # 10-20, 1/2/2003
        | (?:[A-Z]+|(?i:us|c|a|hk|nz))\$                             # US$
        | {_LETTER}+(?:[.?!]{_LETTER}+)+{_END}                       # foo.com
        | {_WORD}(?:[-/_](?:(?i:[do])')?{_WORD})*
      )
    | (?P<mark>[:;=]-?[()DdPp]{_END} | (?i:-[lr][rcs]b-){_END} | [!?]{{2,}} | \*+ | -+ | \.+ | \S)
    """,
    re.VERBOSE,
)

# Most captions have only letters, spaces and perhaps a separate full stop. This pattern reads them several times as
# fast.
_PLAIN = re.compile(r"[A-Za-z ]*(?: \.\s*)?")


def tokenize(text: str) -> list[str]:
    """Split a caption into the lower-case words that the COCO tools score.

    Args:
        text: One caption, as a person or a model wrote it; line breaks count as spaces.

    Returns:
        The tokens, without punctuation; empty for a caption of punctuation or nothing.

    Example:
        >>> tokenize("A man's t-shirt (don't ask).")
        ['a', 'man', "'s", 't-shirt', '-lrb-', 'do', "n't", 'ask', '-rrb-']
    """
    if _PLAIN.fullmatch(text):
        return [part for word in text.lower().replace(".", " ").split() for part in _split(word)]
    text = text.replace("&amp;", "&").translate(_TYPEWRITER)
    return [token for token in _tokens(text) if token not in PUNCTUATIONS]


def _tokens(text: str) -> Iterator[str]:
    for match in _TOKEN.finditer(text):
        token = match.group().lower()
        if match.lastgroup == "word":
            yield from _split(token)
        elif match.lastgroup == "mark":
            yield from _mark(token)
        else:
            yield token


def _split(word: str) -> list[str]:
    return _ASSIMILATIONS.get(word, [word])


def _mark(token: str) -> Iterator[str]:
    if token[0] == "." or token == '"' or (token[0] == "-" and token.strip("-") == ""):
        return  # for any number of them, each reading is in the list of punctuation
    # The Java lexer reads no emoji and no control characters.
    if ord(token[0]) <= 0xFFFF and token.isprintable():
        yield "".join(_BRACKETS.get(character, character) for character in token)
