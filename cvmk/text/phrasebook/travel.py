"""Sentences for the way: directions, transport, hotels, times and dates."""

from __future__ import annotations

from cvmk.text.phrasebook import lexicon, numbers, verbs
from cvmk.text.phrasebook.choice import Choice, Template
from cvmk.text.phrasebook.grammar import Both, Noun, after, noun_phrase

VERBS = verbs.VERBS


def nth(choice: Choice, noun: Noun, case: str) -> Both:
    """ "the second corner" in the accusative or dative."""
    en, de = numbers.ordinal(choice.between(1, 8))
    article = {"acc": {"m": "den", "f": "die", "n": "das"}, "dat": {"m": "dem", "f": "der", "n": "dem"}}[case][noun.gender]
    ending = "e" if case == "acc" and noun.gender != "m" else "en"
    return f"the {en} {noun.en}", f"{article} {de}{ending} {noun.de}"


def turn(choice: Choice) -> Both:
    (en_side, de_side), corner = choice.one(lexicon.SIDES), choice.one(lexicon.CORNERS)
    en, de = nth(choice, corner, "dat") if choice.chance(0.6) else noun_phrase("the", corner, "dat")
    return f"turn {en_side} at {en}.", f"biegen Sie {after('an', de)} {de_side} ab."


def turn_then(choice: Choice) -> Both:
    (en_side, de_side), (en, de), (en_place, de_place) = choice.one(lexicon.SIDES), nth(choice, lexicon.STREET, "acc"), choice.place("the", "dat", adjective=0)
    return f"take {en} on the {en_side} to get to {en_place}.", f"nehmen Sie {de} {de_side}, um {after('zu', de_place)} zu kommen."


def straight_on(choice: Choice) -> Both:
    (en_side, de_side), (en, de) = choice.one(lexicon.SIDES), choice.place("the", "dat", lexicon.PLACES + lexicon.CORNERS[:3])
    return f"go straight on to {en} and then turn {en_side}.", f"gehen Sie geradeaus bis {after('zu', de)} und biegen Sie dann {de_side} ab."


def way(choice: Choice) -> Both:
    en, de = choice.place("the", "dat", adjective=0.4)
    if choice.chance(0.5):
        return f"excuse me, how do I get to {en}?", f"Entschuldigung, wie komme ich {after('zu', de)}?"
    return f"could you show me the way to {en}, please?", f"könnten Sie mir bitte den Weg {after('zu', de)} zeigen?"


def nearby(choice: Choice) -> Both:
    en, de = noun_phrase("a", choice.one(lexicon.VENUES), "acc", choice.one(lexicon.VENUE_ADJECTIVES))
    (en_where, de_where) = choice.place("the", "dat", lexicon.OTHER_PLACES, 0)
    return f"is there {en} near {en_where}?", f"gibt es in der Nähe {after('von', de_where)} {de}?"


def position(choice: Choice) -> Both:
    first, second = choice.two(lexicon.PLACES)
    (en, de), (en_second, de_second) = choice.one(lexicon.RELATIVE_POSITIONS), noun_phrase("the", second, "dat")
    adjective = choice.one(lexicon.PLACE_ADJECTIVES) if choice.chance(0.5) else None
    en_first, de_first = noun_phrase("the", first, "nom", adjective)
    return f"{en_first} is {en} {en_second}.", f"{de_first} ist {de} {de_second}."


def distance(choice: Choice) -> Both:
    (en, de), unit, value = choice.place("the", "dat"), choice.one((("minutes", "Minuten"), ("metres", "Meter"), ("kilometres", "Kilometer"))), choice.amount()
    return f"it is {numbers.english(value)} {unit[0]} to {en}.", f"es sind {numbers.german(value)} {unit[1]} bis {after('zu', de)}."


def line(choice: Choice) -> Both:
    (en, de), number = choice.place("the", "dat", adjective=0), numbers.number(choice.between(2, 99))
    return f"take line {number[0]} to {en}.", f"nehmen Sie die Linie {number[1]} bis {after('zu', de)}."


def which_line(choice: Choice) -> Both:
    (en, de), (en_place, de_place) = noun_phrase("which", choice.one(lexicon.LINES), "nom"), choice.place("the", "dat")
    return f"{en} goes to {en_place}?", f"{de} fährt {after('zu', de_place)}?"


def get_off(choice: Choice) -> Both:
    (en, de), subject = choice.place("the", "dat"), choice.one(verbs.PRONOUNS)
    must = VERBS["must"].present(subject.person)
    return f"{subject.en} must get off at {en}.", f"{subject.de} {must} {after('an', de)} aussteigen."


def into(choice: Choice) -> Both:
    """Motion: the accusative."""
    subject, (en, de) = choice.subject(), choice.place("the", "acc", lexicon.INSIDE_PLACES)
    go, (en_day, de_day) = VERBS["go"], choice.day()
    return f"{subject.en} {go.english(subject.person)} into {en} {en_day}.", f"{subject.de} {go.present(subject.person)} {de_day} {after('in', de)}."


def inside(choice: Choice) -> Both:
    """Rest: the dative."""
    subject, (en, de) = choice.subject(), choice.place("the", "dat", lexicon.INSIDE_PLACES, 0.5)
    be, en_be = VERBS["be"], {"1": "am", "3": "is"}.get(subject.person, "are")
    return f"{subject.en} {en_be} in {en} now.", f"{subject.de} {be.present(subject.person)} jetzt {after('in', de)}."


def departure(choice: Choice) -> Both:
    noun, (en_city, de_city), (en_time, de_time) = choice.one(lexicon.LINES[:2]), choice.one(lexicon.CITIES), choice.time()
    en, de = noun_phrase("the", noun, "nom")
    if noun.en == "train" and choice.chance(0.6):
        platform = numbers.number(choice.between(1, 16))
        return (
            f"{en} to {en_city} leaves at {en_time} from platform {platform[0]}.",
            f"{de} nach {de_city} fährt um {de_time} von Gleis {platform[1]} ab.",
        )
    return f"{en} from {en_city} arrives at {en_time}.", f"{de} aus {de_city} kommt um {de_time} an."


def connection(choice: Choice) -> Both:
    noun, (en_city, de_city), (en_day, de_day) = choice.one(lexicon.LINES[:2]), choice.one(lexicon.CITIES), choice.day()
    gender = {"m": "der nächste", "f": "die nächste"}[noun.gender]
    if choice.chance(0.5):
        return f"when does the next {noun.en} to {en_city} leave?", f"wann fährt {gender} {noun.de} nach {de_city} ab?"
    last = {"m": "der letzte", "f": "die letzte"}[noun.gender]
    return f"when does the last {noun.en} from {en_city} arrive {en_day}?", f"wann kommt {last} {noun.de} aus {de_city} {de_day} an?"


def delay(choice: Choice) -> Both:
    noun, (en_city, de_city), value = choice.one(lexicon.LINES[:2]), choice.one(lexicon.CITIES), choice.between(2, 59)
    en, de = noun_phrase("the", noun, "nom")
    return f"{en} from {en_city} is {numbers.english(value)} minutes late.", f"{de} aus {de_city} hat {numbers.german(value)} Minuten Verspätung."


def tickets(choice: Choice) -> Both:
    (en_city, de_city), (en_day, de_day) = choice.one(lexicon.CITIES), choice.weekday()
    en, de = choice.count()
    return f"I would like {en} tickets to {en_city} for {en_day}.", f"ich möchte {de} Fahrkarten nach {de_city} für {de_day}."


def fare(choice: Choice) -> Both:
    (en_city, de_city), (en, de) = choice.one(lexicon.CITIES), choice.price()
    return f"a ticket to {en_city} costs {en}.", f"eine Fahrkarte nach {de_city} kostet {de}."


def journey(choice: Choice) -> Both:
    subject, (en_city, de_city), (en_day, de_day) = choice.subject(), choice.one(lexicon.CITIES), choice.day()
    (en, de), travel = noun_phrase("the", choice.one(lexicon.LONG_DISTANCE), "dat"), VERBS["travel"]
    return (
        f"{en_day} {subject.en} {travel.english(subject.person)} to {en_city} by {en[4:]}.",
        f"{de_day} {travel.present(subject.person)} {subject.de} {after('mit', de)} nach {de_city}.",
    )


def nights(choice: Choice) -> Both:
    value = choice.between(1, 14)
    return ("one night", "eine Nacht") if value == 1 else (f"{numbers.english(value)} nights", f"{numbers.german(value)} Nächte")


def room(choice: Choice) -> Both:
    (en, de) = noun_phrase("a", choice.one(lexicon.ROOMS), "acc", choice.one(lexicon.ROOM_ADJECTIVES) if choice.chance(0.6) else None)
    (en_feature, de_feature), (en_nights, de_nights) = choice.one(lexicon.ROOM_FEATURES), nights(choice)
    if choice.chance(0.5):
        return f"I would like {en} {en_feature} for {en_nights}.", f"ich möchte {de} {de_feature} für {de_nights}."
    return f"we have booked {en} {en_feature} for {en_nights}.", f"wir haben {de} {de_feature} für {de_nights} gebucht."


def room_price(choice: Choice) -> Both:
    (en, de) = noun_phrase("a", choice.one(lexicon.ROOMS), "nom", choice.one(lexicon.ROOM_ADJECTIVES) if choice.chance(0.4) else None)
    (en_feature, de_feature), (en_price, de_price) = choice.one(lexicon.ROOM_FEATURES), numbers.price(choice.between(30, 199))
    return f"{en} {en_feature} costs {en_price} a night.", f"{de} {de_feature} kostet {de_price} pro Nacht."


def floor(choice: Choice) -> Both:
    (en, de), number = numbers.ordinal(choice.between(1, 12)), numbers.number(choice.between(2, 999))
    return f"room {number[0]} is on the {en} floor.", f"Zimmer {number[1]} ist im {de}en Stock."


def broken(choice: Choice) -> Both:
    (en, de), (en_room, de_room) = noun_phrase("the", choice.one(lexicon.MACHINES), "nom"), noun_phrase(
        choice.one(("my", "our", "the", "this")), choice.one(lexicon.ROOMS + lexicon.ROOM_PARTS[:4]), "dat"
    )  # fmt: skip
    return f"{en} in {en_room} does not work.", f"{de} {after('in', de_room)} funktioniert nicht."


def missing(choice: Choice) -> Both:
    things = lexicon.MACHINES[2:4] + lexicon.FURNITURE + lexicon.FLAT_THINGS[9:11]
    (en, de), (en_room, de_room) = noun_phrase("no", choice.one(things), "acc"), noun_phrase(
        choice.one(("the", "my", "our")), choice.one(lexicon.ROOMS + lexicon.ROOM_PARTS), "dat"
    )  # fmt: skip
    return f"there is {en} in {en_room}.", f"{after('in', de_room)} gibt es {de}."


def wake(choice: Choice) -> Both:
    (en, de), (en_day, de_day) = choice.time(), choice.weekday()
    return f"could you wake me at {en} on {en_day}, please?", f"könnten Sie mich bitte am {de_day} um {de} wecken?"


def room_number(choice: Choice) -> Both:
    en, de = numbers.number(choice.between(2, 999))
    return f"here is the key for room {en}.", f"hier ist der Schlüssel für Zimmer {de}."


def now(choice: Choice) -> Both:
    (en, de), (en_part, de_part) = choice.time(), choice.one(lexicon.DAY_PARTS)
    if choice.chance(0.5):
        return f"it is {en} now.", f"es ist jetzt {de}."
    return f"it is {en} {en_part}.", f"es ist {de} {de_part}."


def hours(choice: Choice) -> Both:
    (en, de), (en_from, de_from), (en_to, de_to) = noun_phrase("the", choice.one(lexicon.SHOPS), "nom"), choice.time(), choice.time()
    return f"{en} opens at {en_from} and closes at {en_to}.", f"{de} öffnet um {de_from} und schließt um {de_to}."


def event(choice: Choice) -> Both:
    (en, de), (en_day, de_day), (en_time, de_time) = noun_phrase("the", choice.one(lexicon.EVENTS), "nom"), choice.day(), choice.time()
    if choice.chance(0.5):
        return f"{en} begins {en_day} at {en_time}.", f"{de} beginnt {de_day} um {de_time}."
    return f"when does {en} begin {en_day}?", f"wann beginnt {de} {de_day}?"


def open_on(choice: Choice) -> Both:
    (en, de), (en_day, de_day) = noun_phrase("the", choice.one(lexicon.SHOPS), "nom"), choice.day()
    return f"do you know whether {en} is open {en_day}?", f"wissen Sie, ob {de} {de_day} geöffnet ist?"


def today(choice: Choice) -> Both:
    (en_day, de_day), (en, de) = choice.weekday(), choice.date("e")
    return f"today is {en_day}, the {en}.", f"heute ist {de_day}, der {de}."


def arrival(choice: Choice) -> Both:
    subject, (en_day, de_day), (en, de) = choice.subject(), choice.weekday(), choice.date("en")
    arrive = VERBS["arrive"]
    return (
        f"{subject.en} {arrive.english(subject.person)} on {en_day}, the {en}.",
        f"{subject.de} {arrive.present(subject.person)} am {de_day}, dem {de}, an.",
    )


def rising(choice: Choice) -> Both:
    subject, (en, de), rise, (en_day, de_day) = choice.subject(), choice.time(), VERBS["get up"], choice.weekday()
    return (
        f"on {en_day} {subject.en} {rise.english(subject.person)} at {en}.",
        f"am {de_day} {rise.present(subject.person)} {subject.de} um {de} auf.",
    )


def birthday(choice: Choice) -> Both:
    subject, (en, de) = choice.other(), choice.date("en")
    if subject.person != "3" or " " not in subject.en:
        (en_city, de_city), value = choice.one(lexicon.CITIES), numbers.year(choice.between(1911, 1999))
        return f"we moved to {en_city} in the year {value[0]}.", f"wir sind im Jahr {value[1]} nach {de_city} gezogen."
    return f"{subject.en}'s birthday is on the {en}.", f"{subject.de} hat am {de} Geburtstag."


def forecast(choice: Choice) -> Both:
    (en_city, de_city), (en, de), (en_day, de_day) = choice.one(lexicon.CITIES), choice.one(lexicon.WEATHER), choice.day()
    return f"it will be {en} in {en_city} {en_day}.", f"{de_day} wird es in {de_city} {de}."


def weather(choice: Choice) -> Both:
    (en_city, de_city), (en, de), (en_second, de_second) = choice.one(lexicon.CITIES), choice.one(lexicon.TEMPERATURES), choice.one(lexicon.SKIES)
    return f"today it is {en} and {en_second} in {en_city}.", f"heute ist es in {de_city} {de} und {de_second}."


def degrees(choice: Choice) -> Both:
    (en_day, de_day), value, (en_city, de_city) = choice.weekday(), choice.between(2, 38), choice.one(lexicon.CITIES)
    return f"on {en_day} it will be {numbers.english(value)} degrees in {en_city}.", f"am {de_day} werden es in {de_city} {numbers.german(value)} Grad."


TEMPLATES: tuple[Template, ...] = (
    Template(turn, 2),
    Template(turn_then, 1.5),
    Template(straight_on, 1.5),
    Template(way, 2),
    Template(nearby, 1.5),
    Template(position, 3),
    Template(distance, 2),
    Template(line, 1.5),
    Template(which_line, 1.5),
    Template(get_off, 1.5),
    Template(into, 3),
    Template(inside, 3),
    Template(departure, 3),
    Template(connection, 1.5),
    Template(delay, 2),
    Template(tickets, 2),
    Template(fare, 2),
    Template(journey, 3),
    Template(room, 3),
    Template(room_price, 2),
    Template(floor, 1.5),
    Template(broken, 2),
    Template(missing, 2),
    Template(wake, 1),
    Template(room_number, 1),
    Template(now, 2),
    Template(hours, 3),
    Template(event, 3),
    Template(open_on, 1.5),
    Template(today, 1),
    Template(arrival, 2),
    Template(rising, 2),
    Template(birthday, 1.5),
    Template(forecast, 1.5),
    Template(weather, 1.5),
    Template(degrees, 1),
)
