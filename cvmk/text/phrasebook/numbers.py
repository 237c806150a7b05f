"""Numbers, clock times, prices and dates in words, in English and in German."""

from __future__ import annotations

from cvmk.text.phrasebook.grammar import Both

_EN_SMALL = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
_EN_TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
_DE_SMALL = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn".split()
_DE_TENS = "- - zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
_EN_ORDINAL = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth", "twelve": "twelfth",
    "twenty": "twentieth", "thirty": "thirtieth",
}  # fmt: skip
_DE_ORDINAL = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}
WEEKDAYS: tuple[Both, ...] = (
    ("Monday", "Montag"), ("Tuesday", "Dienstag"), ("Wednesday", "Mittwoch"), ("Thursday", "Donnerstag"), ("Friday", "Freitag"),
    ("Saturday", "Samstag"), ("Sunday", "Sonntag"),
)  # fmt: skip
MONTHS: tuple[Both, ...] = (
    ("January", "Januar"), ("February", "Februar"), ("March", "März"), ("April", "April"), ("May", "Mai"), ("June", "Juni"),
    ("July", "Juli"), ("August", "August"), ("September", "September"), ("October", "Oktober"), ("November", "November"),
    ("December", "Dezember"),
)  # fmt: skip


def english(number: int) -> str:
    """0..9999 in English words: 1234 -> "one thousand two hundred and thirty-four"."""
    if number < 20:
        return _EN_SMALL[number]
    if number < 100:
        return _EN_TENS[number // 10] + (f"-{_EN_SMALL[number % 10]}" if number % 10 else "")
    if number < 1000:
        rest = number % 100
        return f"{_EN_SMALL[number // 100]} hundred" + (f" and {english(rest)}" if rest else "")
    rest = number % 1000
    joint = " and " if 0 < rest < 100 else " "
    return f"{english(number // 1000)} thousand" + (f"{joint}{english(rest)}" if rest else "")


def german(number: int, noun: bool = False) -> str:
    """0..9999 in German words: 1234 -> "eintausendzweihundertvierunddreißig"; before a noun 1 is "ein", not "eins"."""
    if number < 20:
        return "ein" if noun and number == 1 else _DE_SMALL[number]
    if number < 100:
        unit = number % 10
        return (f"{german(unit, True)}und" if unit else "") + _DE_TENS[number // 10]
    size, name = (1000, "tausend") if number >= 1000 else (100, "hundert")
    return f"{german(number // size, True)}{name}" + (german(number % size, noun) if number % size else "")


def number(value: int) -> Both:
    return english(value), german(value)


def ordinal(value: int) -> Both:
    """1..99: English ordinal and the German stem, which takes an adjective's endings."""
    words = english(value)
    head, dash, last = words.rpartition("-")
    if last in _EN_ORDINAL:
        last = _EN_ORDINAL[last]
    elif last.endswith("y"):
        last = f"{last[:-1]}ieth"
    else:
        last += "th"
    return head + dash + last, _DE_ORDINAL.get(value) or german(value) + ("t" if value < 20 else "st")


def year(value: int) -> Both:
    """1910..1999 or 2000..2099."""
    if value >= 2000:
        return number(value)
    return f"nineteen {english(value % 100)}", f"neunzehnhundert{german(value % 100)}"


def price(euros: int, cents: int = 0) -> Both:
    """At least one euro; cents 0 or 2..99. "three euros fifty" -> "drei Euro fünfzig"."""
    en = f"{english(euros)} euro{'s' if euros != 1 else ''}"
    de = f"{german(euros, True)} Euro"
    return (f"{en} {english(cents)}", f"{de} {german(cents)}") if cents else (en, de)


def clock(hour: int, minute: int) -> Both:
    """Official time, hour 1..12: "seven fifteen" -> "sieben Uhr fünfzehn"."""
    de = f"{german(hour, True)} Uhr"
    if not minute:
        return f"{english(hour)} o'clock", de
    return f"{english(hour)} {english(minute)}", f"{de} {german(minute)}"


_COLLOQUIAL = {
    5: ("five past", "fünf nach"), 10: ("ten past", "zehn nach"), 15: ("quarter past", "Viertel nach"), 20: ("twenty past", "zwanzig nach"),
    25: ("twenty-five past", "fünf vor halb"), 30: ("half past", "halb"), 35: ("twenty-five to", "fünf nach halb"), 40: ("twenty to", "zwanzig vor"),
    45: ("quarter to", "Viertel vor"), 50: ("ten to", "zehn vor"), 55: ("five to", "fünf vor"),
}  # fmt: skip


def colloquial(hour: int, minute: int) -> Both:
    """Time as spoken, hour 1..12, minute a multiple of 5: (3, 30) -> "half past three", "halb vier".

    English counts to the next hour from minute 35, German from minute 25.
    """
    if not minute:
        return clock(hour, 0)
    following = hour % 12 + 1
    en, de = _COLLOQUIAL[minute]
    return f"{en} {english(hour if minute < 35 else following)}", f"{de} {german(hour if minute < 25 else following)}"
