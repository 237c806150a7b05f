"""The phrasebook's words, grouped by what can be said about them."""

from __future__ import annotations

from cvmk.text.phrasebook.grammar import Adjective, Both, Noun


def _nouns(table: str) -> tuple[Noun, ...]:
    """One noun a line: English[/plural] | gender German plural."""
    nouns = []
    for line in table.strip().splitlines():
        english, german = (part.strip() for part in line.split("|"))
        singular, _, plural = english.partition("/")
        gender, de, de_plural = german.split(" ")
        nouns.append(Noun(singular, plural or _plural(singular), de, gender, de_plural))
    return tuple(nouns)


def _plural(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _adjectives(table: str) -> tuple[Adjective, ...]:
    """English:German[:stem before an ending], separated by spaces."""
    adjectives = []
    for entry in table.split():
        en, de, *stem = entry.split(":")
        adjectives.append(Adjective(en, de, stem[0] if stem else de))
    return tuple(adjectives)


def _pairs(table: str) -> tuple[Both, ...]:
    """English = German, one a line."""
    pairs = []
    for line in table.strip().splitlines():
        en, de = line.split(" = ")
        pairs.append((en.strip(), de.strip()))
    return tuple(pairs)


CLOTHES = _nouns("""
    coat | m Mantel Mäntel
    jacket | f Jacke Jacken
    skirt | m Rock Röcke
    dress | n Kleid Kleider
    shirt | n Hemd Hemden
    hat | m Hut Hüte
    scarf/scarves | m Schal Schals
    sweater | m Pullover Pullover
    blouse | f Bluse Blusen
    suit | m Anzug Anzüge
    belt | m Gürtel Gürtel
    cap | f Mütze Mützen
    tie | f Krawatte Krawatten
    T-shirt | n T-Shirt T-Shirts
""")
COMMON_CLOTHES = tuple(noun for noun in CLOTHES if noun.en not in {"skirt", "dress", "blouse", "tie"})
PAIRED_CLOTHES = _nouns("""
    shoe | m Schuh Schuhe
    boot | m Stiefel Stiefel
    glove | m Handschuh Handschuhe
    sock | f Socke Socken
    sandal | f Sandale Sandalen
""")
FLAT_THINGS = _nouns("""
    key | m Schlüssel Schlüssel
    book | n Buch Bücher
    map | f Landkarte Landkarten
    newspaper | f Zeitung Zeitungen
    letter | m Brief Briefe
    postcard | f Postkarte Postkarten
    pen | m Stift Stifte
    notebook | n Heft Hefte
    ring | m Ring Ringe
    towel | n Handtuch Handtücher
    blanket | f Decke Decken
    wallet | f Brieftasche Brieftaschen
    mobile phone | n Handy Handys
    camera | f Kamera Kameras
    ball | m Ball Bälle
    comb | m Kamm Kämme
    ticket | f Fahrkarte Fahrkarten
""")
UPRIGHT_THINGS = _nouns("""
    bottle | f Flasche Flaschen
    glass | n Glas Gläser
    cup | f Tasse Tassen
    lamp | f Lampe Lampen
    plate | m Teller Teller
    vase | f Vase Vasen
    suitcase | m Koffer Koffer
    basket | m Korb Körbe
    bag | f Tasche Taschen
    box | f Kiste Kisten
""")
OTHER_THINGS = _nouns("""
    umbrella | m Regenschirm Regenschirme
    watch | f Armbanduhr Armbanduhren
    present | n Geschenk Geschenke
    picture | n Bild Bilder
    bicycle | n Fahrrad Fahrräder
    car | n Auto Autos
    doll | f Puppe Puppen
    carpet | m Teppich Teppiche
    guitar | f Gitarre Gitarren
    mirror | m Spiegel Spiegel
""")
THINGS = FLAT_THINGS + UPRIGHT_THINGS + OTHER_THINGS
WARES = CLOTHES + THINGS
FURNITURE = _nouns("""
    table | m Tisch Tische
    chair | m Stuhl Stühle
    bed | n Bett Betten
    sofa | n Sofa Sofas
    shelf/shelves | n Regal Regale
    cupboard | m Schrank Schränke
    desk | m Schreibtisch Schreibtische
    armchair | m Sessel Sessel
    chest of drawers/chests of drawers | f Kommode Kommoden
""")

INSIDE_PLACES = _nouns("""
    museum | n Museum Museen
    theatre | n Theater Theater
    church | f Kirche Kirchen
    library | f Bibliothek Bibliotheken
    supermarket | m Supermarkt Supermärkte
    bakery | f Bäckerei Bäckereien
    restaurant | n Restaurant Restaurants
    café | n Café Cafés
    hotel | n Hotel Hotels
    park | m Park Parks
    cinema | n Kino Kinos
    swimming pool | n Schwimmbad Schwimmbäder
    bookshop | f Buchhandlung Buchhandlungen
    zoo | m Zoo Zoos
    gallery | f Galerie Galerien
    hospital | n Krankenhaus Krankenhäuser
    pharmacy | f Apotheke Apotheken
    bank | f Bank Banken
    school | f Schule Schulen
""")
OTHER_PLACES = _nouns("""
    station | m Bahnhof Bahnhöfe
    airport | m Flughafen Flughäfen
    bridge | f Brücke Brücken
    castle | n Schloss Schlösser
    town hall | n Rathaus Rathäuser
    harbour | m Hafen Häfen
    university | f Universität Universitäten
    petrol station | f Tankstelle Tankstellen
    stadium/stadiums | n Stadion Stadien
    embassy | f Botschaft Botschaften
    tower | m Turm Türme
    monument | n Denkmal Denkmäler
    fountain | m Brunnen Brunnen
    bus stop | f Bushaltestelle Bushaltestellen
    market | m Markt Märkte
    police station | f Polizeiwache Polizeiwachen
""")
PLACES = INSIDE_PLACES + OTHER_PLACES
SHOPS = tuple(noun for noun in PLACES if noun.en in {
    "museum", "library", "supermarket", "bakery", "swimming pool", "bookshop", "zoo", "gallery", "pharmacy", "bank", "castle", "town hall", "market",
    "restaurant", "café",
})  # fmt: skip
WORKPLACES = tuple(noun for noun in PLACES if noun.en in {
    "museum", "library", "supermarket", "bakery", "restaurant", "café", "hotel", "bookshop", "hospital", "pharmacy", "bank", "school", "theatre",
})  # fmt: skip
CORNERS = _nouns("""
    traffic light | f Ampel Ampeln
    crossing | f Kreuzung Kreuzungen
    corner | f Ecke Ecken
    bridge | f Brücke Brücken
    bus stop | f Bushaltestelle Bushaltestellen
    petrol station | f Tankstelle Tankstellen
    church | f Kirche Kirchen
    fountain | m Brunnen Brunnen
""")
STREET = Noun("street", "streets", "Straße", "f", "Straßen")

DISHES = _nouns("""
    soup | f Suppe Suppen
    salad | m Salat Salate
    pizza | f Pizza Pizzas
    sandwich | n Sandwich Sandwiches
    bread roll | n Brötchen Brötchen
    cake | m Kuchen Kuchen
    sausage | f Wurst Würste
    fish/fish | m Fisch Fische
    steak | n Steak Steaks
    pancake | m Pfannkuchen Pfannkuchen
    omelette | n Omelett Omeletts
    pretzel | f Brezel Brezeln
""")
PRODUCE = _nouns("""
    apple | m Apfel Äpfel
    pear | f Birne Birnen
    orange | f Orange Orangen
    banana | f Banane Bananen
    egg | n Ei Eier
    strawberry | f Erdbeere Erdbeeren
    tomato/tomatoes | f Tomate Tomaten
    potato/potatoes | f Kartoffel Kartoffeln
    carrot | f Karotte Karotten
    lemon | f Zitrone Zitronen
    cherry | f Kirsche Kirschen
    mushroom | m Pilz Pilze
    onion | f Zwiebel Zwiebeln
    grape | f Traube Trauben
""")
MASS_FOOD = _nouns("""
    butter/- | f Butter -
    cheese/- | m Käse -
    bread/- | n Brot -
    meat/- | n Fleisch -
    ham/- | m Schinken -
    rice/- | m Reis -
    garlic/- | m Knoblauch -
    honey/- | m Honig -
    jam/- | f Marmelade -
    cream/- | f Sahne -
    mustard/- | m Senf -
    sugar/- | m Zucker -
""")
SPREADS = tuple(noun for noun in MASS_FOOD if noun.en not in {"bread", "meat", "rice"})
WEIGHED = tuple(noun for noun in MASS_FOOD if noun.en in {"butter", "cheese", "meat", "ham", "rice"})
DRINKS = _nouns("""
    coffee/- | m Kaffee -
    tea/- | m Tee -
    cocoa/- | m Kakao -
    water/- | n Wasser -
    milk/- | f Milch -
    beer/- | n Bier -
    red wine/- | m Rotwein -
    white wine/- | m Weißwein -
    orange juice/- | m Orangensaft -
    apple juice/- | m Apfelsaft -
    lemonade/- | f Limonade -
    mineral water/- | n Mineralwasser -
""")
HOT_DRINKS, COLD_DRINKS = DRINKS[:3], DRINKS[3:]
CUP, GLASS, BOTTLE = _nouns("""
    cup | f Tasse Tassen
    glass | n Glas Gläser
    bottle | f Flasche Flaschen
""")

MEMBERS = _nouns("""
    mother | f Mutter Mütter
    father | m Vater Väter
    sister | f Schwester Schwestern
    brother | m Bruder Brüder
    grandmother | f Großmutter Großmütter
    grandfather | m Großvater Großväter
    aunt | f Tante Tanten
    uncle | m Onkel Onkel
    daughter | f Tochter Töchter
    son | m Sohn Söhne
    wife/wives | f Frau Frauen
    husband | m Mann Männer
    granddaughter | f Enkelin Enkelinnen
    niece | f Nichte Nichten
    mother-in-law/mothers-in-law | f Schwiegermutter Schwiegermütter
    father-in-law/fathers-in-law | m Schwiegervater Schwiegerväter
    child/children | n Kind Kinder
""")
SHARED_MEMBERS = tuple(noun for noun in MEMBERS if noun.en not in {"wife", "husband"})
GROUPS = _nouns("""
    parents/parents | f Eltern Eltern
    grandparents/grandparents | f Großeltern Großeltern
    children/children | f Kinder Kinder
    sisters/sisters | f Schwestern Schwestern
    brothers/brothers | f Brüder Brüder
""")
PEOPLE = _nouns("""
    woman/women | f Frau Frauen
    man/men | m Mann Männer
    girl | n Mädchen Mädchen
    child/children | n Kind Kinder
""")
PETS = _nouns("""
    dog | m Hund Hunde
    cat | f Katze Katzen
    horse | n Pferd Pferde
    bird | m Vogel Vögel
    rabbit | n Kaninchen Kaninchen
""")
BODY = _nouns("""
    head | m Kopf Köpfe
    back | m Rücken Rücken
    knee | n Knie Knie
    arm | m Arm Arme
    leg | n Bein Beine
    hand | f Hand Hände
    neck | m Nacken Nacken
    stomach | m Bauch Bäuche
    ear | n Ohr Ohren
    shoulder | f Schulter Schultern
    foot/feet | m Fuß Füße
""")

TRANSPORT = _nouns("""
    train | m Zug Züge
    bus/buses | m Bus Busse
    tram | f Straßenbahn Straßenbahnen
    underground | f U-Bahn U-Bahnen
    ship | n Schiff Schiffe
    bicycle | n Fahrrad Fahrräder
    car | n Auto Autos
    taxi | n Taxi Taxis
""")
LONG_DISTANCE = tuple(noun for noun in TRANSPORT if noun.en in {"train", "bus", "ship", "car"})
LINES = tuple(noun for noun in TRANSPORT if noun.en in {"train", "bus", "tram"})
ROOMS = _nouns("""
    room | n Zimmer Zimmer
    single room | n Einzelzimmer Einzelzimmer
    double room | n Doppelzimmer Doppelzimmer
    holiday flat | f Ferienwohnung Ferienwohnungen
""")
ROOM_PARTS = _nouns("""
    kitchen | f Küche Küchen
    bathroom | n Badezimmer Badezimmer
    living room | n Wohnzimmer Wohnzimmer
    bedroom | n Schlafzimmer Schlafzimmer
    garden | m Garten Gärten
    cellar | m Keller Keller
    garage | f Garage Garagen
""")
MACHINES = _nouns("""
    shower | f Dusche Duschen
    heating/- | f Heizung Heizungen
    lamp | f Lampe Lampen
    television | m Fernseher Fernseher
    telephone | n Telefon Telefone
    refrigerator | m Kühlschrank Kühlschränke
    air conditioning/- | f Klimaanlage Klimaanlagen
    alarm clock | m Wecker Wecker
    radio | n Radio Radios
    hairdryer | m Föhn Föhne
""")
EVENTS = _nouns("""
    concert | n Konzert Konzerte
    film | m Film Filme
    course | m Kurs Kurse
    guided tour | f Führung Führungen
    meeting | f Besprechung Besprechungen
    exhibition | f Ausstellung Ausstellungen
    performance | f Vorstellung Vorstellungen
    lecture | m Vortrag Vorträge
    wedding | f Hochzeit Hochzeiten
    football match | n Fußballspiel Fußballspiele
""")

COLOURS = _adjectives("red:rot blue:blau green:grün yellow:gelb black:schwarz white:weiß brown:braun grey:grau")
ANY_SIZE = _adjectives("new:neu old:alt small:klein big:groß cheap:billig expensive:teuer:teur beautiful:schön")
CLOTHES_ADJECTIVES = COLOURS + _adjectives("new:neu old:alt cheap:billig expensive:teuer:teur beautiful:schön warm:warm elegant:elegant thin:dünn thick:dick")
THING_ADJECTIVES = COLOURS + ANY_SIZE
CLOTHES_FAULTS = _adjectives("big:groß small:klein long:lang short:kurz expensive:teuer:teur warm:warm thin:dünn wide:weit tight:eng")
PLACE_ADJECTIVES = _adjectives("old:alt new:neu small:klein big:groß beautiful:schön modern:modern famous:berühmt")
VENUE_ADJECTIVES = _adjectives("good:gut nice:nett cheap:billig quiet:ruhig small:klein modern:modern clean:sauber:sauber")
VENUES = tuple(noun for noun in PLACES if noun.en in {"restaurant", "café", "hotel", "swimming pool", "bakery", "bookshop"})
ROOM_ADJECTIVES = _adjectives("quiet:ruhig big:groß small:klein clean:sauber bright:hell cheap:billig beautiful:schön modern:modern")
FOOD_ADJECTIVES = _adjectives("fresh:frisch small:klein big:groß cheap:billig")
WARM_DISHES = tuple(noun for noun in DISHES if noun.en in {"soup", "pizza", "pancake", "omelette"})
WARM_ADJECTIVES = FOOD_ADJECTIVES + _adjectives("hot:heiß warm:warm vegetarian:vegetarisch")
FOOD_FAULTS = _adjectives("salty:salzig cold:kalt hot:heiß spicy:scharf sweet:süß dry:trocken expensive:teuer:teur small:klein")
PRODUCE_ADJECTIVES = _adjectives("fresh:frisch ripe:reif sweet:süß big:groß small:klein")
MASS_ADJECTIVES = _adjectives("fresh:frisch good:gut")
COLD_ADJECTIVES = _adjectives("cold:kalt good:gut")
HOT_ADJECTIVES = _adjectives("hot:heiß strong:stark good:gut")
PERSON_ADJECTIVES = _adjectives("young:jung tall:groß friendly:freundlich nice:nett")
PET_ADJECTIVES = _adjectives("small:klein big:groß young:jung old:alt black:schwarz white:weiß brown:braun")
MOODS = _adjectives("tired:müde ill:krank happy:glücklich hungry:hungrig thirsty:durstig sad:traurig busy:beschäftigt satisfied:zufrieden nervous:nervös")
COMPARATIVES: tuple[Both, ...] = (
    ("cheaper", "billiger"), ("more expensive", "teurer"), ("bigger", "größer"), ("smaller", "kleiner"), ("more beautiful", "schöner"),
    ("older", "älter"), ("newer", "neuer"),
)  # fmt: skip

CITIES = _pairs("""
    Berlin = Berlin
    Hamburg = Hamburg
    Munich = München
    Cologne = Köln
    Vienna = Wien
    Frankfurt = Frankfurt
    Stuttgart = Stuttgart
    Dresden = Dresden
    Leipzig = Leipzig
    Hanover = Hannover
    Nuremberg = Nürnberg
    Zurich = Zürich
    Salzburg = Salzburg
    Bremen = Bremen
    Prague = Prag
    Paris = Paris
    Rome = Rom
    London = London
""")
FUTURE = _pairs("""
    today = heute
    tomorrow = morgen
    the day after tomorrow = übermorgen
    next week = nächste Woche
    this evening = heute Abend
    tomorrow morning = morgen früh
    at the weekend = am Wochenende
    in the summer = im Sommer
    next year = nächstes Jahr
    after breakfast = nach dem Frühstück
""")
PAST = _pairs("""
    yesterday = gestern
    the day before yesterday = vorgestern
    last week = letzte Woche
    yesterday evening = gestern Abend
    last year = letztes Jahr
    this morning = heute Morgen
""")
DAY_PARTS = _pairs("""
    in the morning = morgens
    in the afternoon = nachmittags
    in the evening = abends
""")
ROOM_FEATURES = _pairs("""
    with a balcony = mit Balkon
    with a bath = mit Bad
    with a shower = mit Dusche
    with breakfast = mit Frühstück
    with a sea view = mit Meerblick
""")
TEMPERATURES = _pairs("""
    warm = warm
    cold = kalt
    hot = heiß
    cool = kühl
""")
SKIES = _pairs("""
    sunny = sonnig
    cloudy = bewölkt
    windy = windig
    foggy = neblig
    dry = trocken
""")
WEATHER = TEMPERATURES + SKIES
NATIONAL = _pairs("""
    German = Deutsch
    English = Englisch
    French = Französisch
    Italian = Italienisch
    Spanish = Spanisch
    Russian = Russisch
""")
GAMES = _pairs("""
    football = Fußball
    tennis = Tennis
    chess = Schach
    cards = Karten
    the guitar = Gitarre
    the piano = Klavier
""")
RELATIVE_POSITIONS: tuple[Both, ...] = (
    ("next to", "neben"), ("behind", "hinter"), ("in front of", "vor"), ("opposite", "gegenüber"),
)  # fmt: skip
SURFACES: tuple[Both, ...] = (
    ("on", "auf"), ("under", "unter"), ("next to", "neben"), ("behind", "hinter"), ("in front of", "vor"),
)  # fmt: skip
SIDES: tuple[Both, ...] = (("left", "links"), ("right", "rechts"))
