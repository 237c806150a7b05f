"""The phrasebook's verbs, and the pronouns and names that are their subjects."""

from __future__ import annotations

from cvmk.text.phrasebook.grammar import Both, Subject, Verb

PRONOUNS = (
    Subject("I", "ich", "1", "my"),
    Subject("he", "er", "3", "his"),
    Subject("she", "sie", "3", "her"),
    Subject("we", "wir", "p", "our"),
    Subject("they", "sie", "p", "their"),
    Subject("you", "Sie", "p", "your"),
)
NAMES = (
    Subject("Anna", "Anna", "3", "her"),
    Subject("Peter", "Peter", "3", "his"),
    Subject("Maria", "Maria", "3", "her"),
    Subject("Thomas", "Thomas", "3", "his"),
    Subject("Julia", "Julia", "3", "her"),
    Subject("Martin", "Martin", "3", "his"),
)


def _verbs(table: str) -> dict[str, Verb]:
    """English base, third person, past | German ich, er, infinitive, [particle], participle, auxiliary."""
    verbs = {}
    for line in table.strip().splitlines():
        english, german = (part.strip() for part in line.split("|"))
        en, third, past = english.split(", ")
        first, er, infinitive, *particle, participle, auxiliary = german.split(" ")
        verbs[en] = Verb(en, third, past, first, er, infinitive, particle[0] if particle else "", participle, auxiliary)
    return verbs


VERBS = _verbs("""
    be, is, was | bin ist sind gewesen sein
    have, has, had | habe hat haben gehabt haben
    buy, buys, bought | kaufe kauft kaufen gekauft haben
    sell, sells, sold | verkaufe verkauft verkaufen verkauft haben
    look for, looks for, looked for | suche sucht suchen gesucht haben
    need, needs, needed | brauche braucht brauchen gebraucht haben
    find, finds, found | finde findet finden gefunden haben
    lose, loses, lost | verliere verliert verlieren verloren haben
    see, sees, saw | sehe sieht sehen gesehen haben
    repair, repairs, repaired | repariere repariert reparieren repariert haben
    bring along, brings along, brought along | bringe bringt mitbringen mit mitgebracht haben
    try on, tries on, tried on | probiere probiert anprobieren an anprobiert haben
    visit, visits, visited | besuche besucht besuchen besucht haben
    call, calls, called | rufe ruft anrufen an angerufen haben
    pick up, picks up, picked up | hole holt abholen ab abgeholt haben
    invite, invites, invited | lade lädt einladen ein eingeladen haben
    help, helps, helped | helfe hilft helfen geholfen haben
    thank, thanks, thanked | danke dankt danken gedankt haben
    go, goes, went | gehe geht gehen gegangen sein
    travel, travels, travelled | fahre fährt fahren gefahren sein
    eat, eats, ate | esse isst essen gegessen haben
    drink, drinks, drank | trinke trinkt trinken getrunken haben
    order, orders, ordered | bestelle bestellt bestellen bestellt haben
    learn, learns, learned | lerne lernt lernen gelernt haben
    play, plays, played | spiele spielt spielen gespielt haben
    tidy up, tidies up, tidied up | räume räumt aufräumen auf aufgeräumt haben
    wait, waits, waited | warte wartet warten gewartet haben
    work, works, worked | arbeite arbeitet arbeiten gearbeitet haben
    live, lives, lived | wohne wohnt wohnen gewohnt haben
    wear, wears, wore | trage trägt tragen getragen haben
    get up, gets up, got up | stehe steht aufstehen auf aufgestanden sein
    arrive, arrives, arrived | komme kommt ankommen an angekommen sein
    book, books, booked | buche bucht buchen gebucht haben
    like, likes, liked | mag mag mögen gemocht haben
    want, wants, wanted | will will wollen gewollt haben
    can, can, could | kann kann können gekonnt haben
    must, must, - | muss muss müssen gemusst haben
    should, should, - | sollte sollte sollten gesollt haben
    would like, would like, - | möchte möchte möchten gemocht haben
    may, may, - | darf darf dürfen gedurft haben
    give, gives, gave | gebe gibt geben gegeben haben
    give as a present, gives, gave | schenke schenkt schenken geschenkt haben
    show, shows, showed | zeige zeigt zeigen gezeigt haben
    try, tries, tried | versuche versucht versuchen versucht haben
    hope, hopes, hoped | hoffe hofft hoffen gehofft haben
    take, takes, took | nehme nimmt nehmen genommen haben
""")
MODALS: tuple[Both, ...] = (
    ("want to", "want"), ("can", "can"), ("must", "must"), ("should", "should"), ("would like to", "would like"), ("may", "may"),
)  # fmt: skip
