"""Simulated conversations over many sessions.

Two to four people talk in dated sessions. Each states facts about their own affairs (a locker code,
the day of an exam), changes some later, takes some back as a mistake, and reports what they did
(ran 7 kilometres). Everything between is small talk and quotations from real documents. All names
and values are drawn from the seed, so that nothing can be known without the transcript.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from qwenlong.data.documents import SourceDocument, split_sentences
from qwenlong.data.python_facts import Span
from qwenlong.data.samples import PROSE_KINDS
from qwenlong.types import Split, split_of

_SESSION_CHARS = 3_500  # of an average session
# Not strftime, whose names depend on the locale.
_WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = (
    "January February March April May June July August September October November December"
).split()
_MAX_QUOTES = 20_000  # sentences kept from the documents

_FIRST = (
    "Ada Amara Anouk Arvid Beatriz Bela Camille Cosmo Dagny Darius Eduardo Elif Emeka Fatima "
    "Fenna Gideon Greta Hamid Hana Ilse Imre Ines Isamu Jasper Jelena Kamal Katrin Kofi Leona "
    "Lev Linnea Luca Maeve Malik Mirela Nadia Nils Noor Odette Olga Orla Otto Paloma Pavel "
    "Priya Quentin Rafael Rania Rosalind Ruben Saskia Selim Sigrid Soraya Tamsin Theo Tomasz "
    "Ulla Viggo Wanda Xenia Yara Yusuf Zora"
).split()
_LAST = (
    "Abara Albrecht Almeida Anker Baptiste Barros Bellamy Bondar Brandt Calloway Castellan "
    "Dahl Delacroix Dragan Ekström Eriksen Farouk Ferrante Fontaine Galanis Garnier Haddad "
    "Halloran Hartog Ibarra Ivanova Jansson Kasprzak Keller Kimura Kovacs Lindqvist Lombardi "
    "Marchetti Mbeki Mercer Moreau Nakagawa Navarro Nyström Okafor Oyelaran Paquet Petrov "
    "Quispe Rahimi Renner Rossi Sandoval Sato Silvestri Sørensen Tanaka Tremblay Underhill "
    "Vargas Vasquez Weiss Wójcik Yilmaz Zeller"
).split()
_ADJECTIVES = (
    "Copper Silver Crooked Quiet Blue Hidden Golden Rusty Velvet Broken Amber Paper Northern "
    "Wild Winter Striped Little Scarlet Humble Floating"
).split()
_NOUNS = (
    "Heron Lantern Anchor Badger Fiddle Orchard Kettle Sparrow Compass Mill Otter Chestnut "
    "Harbour Parasol Thimble Fox Bellows Quill Juniper Wheel"
).split()
_PET_NAMES = (
    "Biscuit Pixel Mango Clover Waffle Nimbus Pepper Ziggy Truffle Marble Pickle Domino "
    "Saffron Bramble Noodle Tango Juno Figaro Cricket Mocha"
).split()
_COLOURS = (
    "teal ochre lavender maroon mint ivory coral indigo mustard burgundy turquoise charcoal "
    "salmon olive"
).split()
_SUBJECTS = (
    "pottery falconry beekeeping calligraphy origami fencing archery woodturning astronomy "
    "bookbinding juggling snorkelling glassblowing botany topology puppetry"
).split()


@dataclass(frozen=True)
class Value:
    """``said`` follows "is" in a sentence; ``answer`` is what a question wants."""

    said: str
    answer: str
    is_number: bool = False


def _digits(count: int) -> Callable[[random.Random], Value]:
    def make(rng: random.Random) -> Value:
        text = str(rng.randrange(10 ** (count - 1), 10**count))
        return Value(text, text)

    return make


def _euros(low: int, high: int) -> Callable[[random.Random], Value]:
    def make(rng: random.Random) -> Value:
        amount = rng.randrange(low, high)
        return Value(f"{amount} euros", str(amount), True)

    return make


def _amount(low: int, high: int) -> Callable[[random.Random], Value]:
    def make(rng: random.Random) -> Value:
        amount = str(rng.randrange(low, high))
        return Value(amount, amount, True)

    return make


def _time(rng: random.Random) -> Value:
    text = f"{rng.randrange(7, 22):02d}:{rng.randrange(0, 60, 5):02d}"
    return Value(f"at {text}", text)


def _day(rng: random.Random) -> Value:
    text = _date_text(datetime.date(2026, 1, 1) + datetime.timedelta(days=rng.randrange(700)))
    return Value(f"on {text}", text)


def _one_of(words: list[str]) -> Callable[[random.Random], Value]:
    def make(rng: random.Random) -> Value:
        word = rng.choice(words)
        return Value(word, word)

    return make


def _place(rng: random.Random) -> Value:
    text = f"the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
    return Value(text, text)


def _seat(rng: random.Random) -> Value:
    text = f"{rng.randrange(1, 99)}{rng.choice('ABCDEF')}"
    return Value(text, text)


# What follows "my" in a statement. No phrase is the beginning of another.
_ATTRIBUTES: dict[str, Callable[[random.Random], Value]] = {
    "locker code": _digits(4),
    "bike lock number": _digits(5),
    "library card number": _digits(7),
    "alarm code": _digits(6),
    "membership number": _digits(6),
    "parcel number": _digits(8),
    "lottery number": _digits(5),
    "monthly rent": _euros(400, 1900),
    "budget for the guitar": _euros(150, 3000),
    "electricity bill": _euros(40, 400),
    "deposit for the boat": _euros(100, 2500),
    "offer for the old piano": _euros(200, 4000),
    "dentist appointment": _time,
    "choir rehearsal": _time,
    "train to the coast": _time,
    "yoga class": _time,
    "call with the landlord": _time,
    "flight home": _day,
    "driving test": _day,
    "thesis deadline": _day,
    "sister's wedding": _day,
    "house move": _day,
    "meeting point for the hike": _place,
    "favourite café": _place,
    "hotel in the mountains": _place,
    "stand at the flea market": _place,
    "cat's name": _one_of(_PET_NAMES),
    "neighbour's dog's name": _one_of(_PET_NAMES),
    "colour for the kitchen walls": _one_of(_COLOURS),
    "colour for the front door": _one_of(_COLOURS),
    "new evening course": _one_of(_SUBJECTS),
    "seat at the concert": _seat,
    "seat on the ferry": _seat,
    "number of guests for the party": _amount(8, 90),
    "number of chairs to rent": _amount(10, 150),
    "room number at the clinic": _amount(100, 700),
    "number of pages in the manuscript": _amount(120, 900),
}

# Past phrase with the amount, unit, participle, gerund, lowest and highest amount.
ACTIVITIES = (
    ("ran {} kilometres", "kilometres", "run", "running", 3, 25),
    ("swam {} lengths", "lengths", "swum", "swimming", 10, 80),
    ("read {} pages of the novel", "pages of the novel", "read", "reading the novel", 12, 140),
    ("baked {} loaves", "loaves", "baked", "baking loaves", 2, 15),
    ("planted {} bulbs", "bulbs", "planted", "planting bulbs", 5, 60),
    ("picked {} baskets of apples", "baskets of apples", "picked", "picking apples", 2, 30),
    ("knitted {} rows of the scarf", "rows of the scarf", "knitted", "knitting the scarf", 6, 90),
    ("translated {} letters", "letters", "translated", "translating letters", 2, 25),
    ("repaired {} bicycles", "bicycles", "repaired", "repairing bicycles", 2, 14),
    ("climbed {} routes", "routes", "climbed", "climbing", 3, 20),
)

_FIRST_TIME = (
    "By the way, my {a} is {v}.",
    "Before I forget, my {a} is {v}.",
    "Please keep in mind that my {a} is {v}.",
    "I looked it up: my {a} is {v}.",
)
_CHANGE = (
    "There is news: my {a} is {v} from now on.",
    "Something has changed, my {a} is {v} now.",
    "Forget the old plan, my {a} is {v} now.",
)
_CORRECTION = (
    "I made a mistake: I said my {a} is {o}, but in truth it is {v}.",
    "Let me correct myself. I said my {a} is {o}, but in truth it is {v}.",
)
_REPORT = ("Today I {p}.", "I {p} this morning.", "You will not believe it, I {p} yesterday.")
_REPORT_CORRECTION = (
    "About {d}: I told you that I {o}, but I counted again, and I {p}.",
    "I have to correct what I told you on {d}. I did not do what I said, I {p}.",
)
_OPENERS = (
    "Hello again!",
    "Good to hear from you.",
    "There you are.",
    "I hope the week was kind to you.",
    "Do you have a moment?",
    "I was just thinking of you.",
)
# Nothing of it states a fact about "my" anything: that is for the statements. Most lines have two
# blanks, so that a conversation of 100K tokens seldom says one twice.
_TALK = (
    "The weather was {weather} {time}.",
    "{who} cooked {food} {time} and half of it burned.",
    "The tram was late again {time}, so I walked along {place}.",
    "{who} is learning the trumpet, and all of {place} has to listen.",
    "I watched a film about {theme} {time} and fell asleep before the end.",
    "The shop behind {place} sells {food} now.",
    "I keep hearing about {theme}, and {who} is to blame for it.",
    "The paper says that it will be {weather} around {place}.",
    "The washing machine made that noise again {time}.",
    "I found an old photograph of all of us at {place}.",
    "The bakery near {place} has run out of {food} three days in a row.",
    "{who} talks about nothing but {theme}.",
    "They have put up a fence around {place}, and nobody says why.",
    "There was a lecture on {theme} {time}, and hardly a chair was left.",
    "{who} swears that nothing beats {food} when it is {weather} outside.",
    "The radio had a long programme about {theme} {time}.",
    "I met {who} at {place}, quite by accident.",
    "It was so {weather} {time} that even the pigeons stayed away from {place}.",
    "{who} has started to write a book about {theme}, so I am told.",
    "There was {food} for supper {time}, and {who} came to eat with us.",
    "Half the town went to {place} {time}.",
    "The lights went out {time}, and {who} told stories about {theme}.",
    "Somebody left a whole crate of {food} at {place}.",
    "That tune will not leave me in peace, the one that {who} whistles.",
    "The choir of {place} sang something about {theme}.",
    "{who} says that {place} was nicer before the trees were cut.",
    "We argued about {theme} until it was late.",
    "The stall with the {food} was closed {time}.",
    "The stairs at {place} are being mended, slowly.",
    "I walked home in the {weather} wind with a bag full of {food}.",
)
_WEATHER = (
    "stormy mild freezing foggy windy grey glorious damp muggy bright changeable icy gloomy"
).split()
_FOOD = (
    "lentil soup, plum cake, dumplings, aubergines, rye bread, pancakes, risotto, pickled beets, "
    "roast chestnuts, onion tart, apricots, goat cheese, ginger biscuits, leek pie, smoked trout"
).split(", ")
_THEMES = (
    "lighthouses, the old railway, mushrooms, a lost violin, tax reform, polar ships, the new "
    "bridge, migrating cranes, forgotten alphabets, the price of timber, clockmakers, salt mines, "
    "the great flood, comets, village theatres, moths"
).split(", ")
_PLACES = (
    "the canal, the lake, the old market, the post office, the water tower, the rose garden, the "
    "swimming pool, the town hall, the station, the orchard, the fire station, the quarry, the "
    "cinema, the allotments"
).split(", ")
_WHO = (
    "The neighbour upstairs, A cousin, The postman, The woman from the library, A former teacher, "
    "The plumber, Somebody in our street, The new doctor, An old friend, The caretaker, The baker, "
    "A colleague"
).split(", ")
_TIMES = (
    "last week, yesterday, the other day, on the weekend, this morning, two nights ago, in the "
    "holidays, after the storm, before breakfast, late in the evening"
).split(", ")
_REPLIES = (
    "I see.",
    "That sounds familiar.",
    "Noted.",
    "Really? Tell me more when we meet.",
    "I would not have guessed.",
    "Thank you for telling me.",
    "That makes sense.",
    "Oh dear.",
    "How nice!",
    "Let us come back to that another time.",
    "You do not say.",
    "I had the same thought.",
    "Well, that is how it goes.",
    "I would like to hear more about that.",
    "Who would have thought so?",
    "It could be worse.",
    "That reminds me of something.",
    "I am all ears.",
)
_QUOTES = (
    'In "{t}" I came across this: {s}',
    'I am still reading "{t}". There it says: {s}',
    'Here is a sentence from "{t}" that I copied out: {s}',
)


@dataclass(frozen=True)
class Said:
    """A statement in the transcript. ``op``: set, change, correct, report or amend."""

    session: int  # from 0
    op: str
    value: Value
    span: Span
    amends: int | None = None  # for ``amend``: the session whose report it corrects


@dataclass
class Thread:
    """Everything that one person says about one attribute or activity, in order."""

    owner: str
    topic: str
    said: list[Said] = field(default_factory=list)


@dataclass
class Dialogue:
    document: SourceDocument
    people: list[str]
    dates: list[str]
    headers: list[Span]
    attributes: list[Thread]
    activities: list[Thread]


def quotable_sentences(
    documents: Iterable[SourceDocument], rng: random.Random
) -> list[tuple[str, str]]:
    """``(title, sentence)`` from the documents; none that could be taken for a statement."""
    found: list[tuple[str, str]] = []
    usable = [d for d in documents if d.kind in PROSE_KINDS and d.title]
    rng.shuffle(usable)
    for document in usable:
        text = document.text[:60_000]
        for start, end in split_sentences(text):
            sentence = " ".join(text[start:end].split())
            is_prose = (
                40 <= len(sentence) <= 260 and sentence[0].isupper() and sentence[-1] in ".?!"
            )
            if is_prose and " my " not in f" {sentence.casefold()} " and " I " not in sentence:
                found.append((" ".join(document.title.split()), sentence))
        if len(found) >= _MAX_QUOTES:
            break
    return found


def _date_text(date: datetime.date) -> str:
    return f"{date.day} {_MONTHS[date.month - 1]} {date.year}"


# --- simulation --------------------------------------------------------------


class _Transcript:
    def __init__(self):
        self.pieces: list[str] = []
        self.length = 0

    def line(self, text: str) -> Span:
        span = Span(self.length, self.length + len(text))
        self.pieces.append(text + "\n")
        self.length += len(text) + 1
        return span


@dataclass
class _Plan:
    """A statement before it is spoken."""

    thread: Thread
    op: str
    value: Value
    old: Value | None = None
    amends: int | None = None
    sentence: str = ""


def simulate(
    rng: random.Random, target_chars: int, quotes: list[tuple[str, str]], split: Split
) -> Dialogue:
    """A conversation of about ``target_chars`` characters, three sessions or more.

    Args:
        quotes: ``(title, sentence)`` pairs for the small talk (``quotable_sentences``).
        split: where the transcript is to belong; its number is chosen so that it does.
    """
    sessions = max(3, round(target_chars / _SESSION_CHARS))
    people = _people(rng)
    date = datetime.date(2021, 1, 4) + datetime.timedelta(days=rng.randrange(1200))
    dates = []
    for _ in range(sessions):
        dates.append(date)
        date += datetime.timedelta(days=rng.randrange(1, 9))
    texts = [_date_text(d) for d in dates]
    plans: list[list[_Plan]] = [[] for _ in range(sessions)]
    attributes = _plan_attributes(rng, people, plans)
    activities = _plan_activities(rng, people, plans, texts)
    transcript, talk = _Transcript(), _SmallTalk(rng, quotes)
    headers = []
    number = rng.randrange(100_000, 900_000)
    heading = f"Conversations between {_listed(people)}, in {sessions} sessions. Transcript {{}}."
    transcript.line(heading.format(number))
    for i, day in enumerate(dates):
        transcript.line("")
        clock = f"{rng.randrange(8, 22):02d}:{rng.randrange(60):02d}"
        weekday = _WEEKDAYS[day.weekday()]
        headers.append(transcript.line(f"Session {i + 1}: {weekday}, {texts[i]}, {clock}"))
        budget = (target_chars - transcript.length) // (sessions - i)
        _speak_session(rng, transcript, people, plans[i], i, budget, talk)
    title = f"Conversations between {_listed(people)}"
    body = "".join(transcript.pieces[1:])
    while split_of(text := f"{heading.format(number)}\n{body}") != split:
        number += 1
    document = SourceDocument(title=title, text=text, source="dialogue", kind="dialogue")
    return Dialogue(document, people, texts, headers, attributes, activities)


def _people(rng: random.Random) -> list[str]:
    count = rng.choice([2, 2, 3, 4])
    first, last = rng.sample(_FIRST, count), rng.sample(_LAST, count)
    return [f"{f} {name}" for f, name in zip(first, last, strict=True)]


def _listed(people: list[str]) -> str:
    return ", ".join(people[:-1]) + " and " + people[-1]


def _plan_attributes(
    rng: random.Random, people: list[str], plans: list[list[_Plan]]
) -> list[Thread]:
    """Threads with one to eight statements each; no value comes twice for an attribute."""
    sessions = len(plans)
    topics = rng.sample(list(_ATTRIBUTES), min(len(_ATTRIBUTES), 4 + sessions // 2))
    threads = []
    for topic in topics:
        used: set[str] = set()
        owners = rng.sample(people, rng.randint(1, len(people)))
        for owner in owners:
            thread = Thread(owner, topic)
            current = None
            count = rng.randint(1, min(8, sessions, 3 + sessions // 6))
            for place in sorted(rng.sample(range(sessions), count)):
                value = _fresh(rng, topic, used)
                if value is None:
                    break
                op = "set" if current is None else rng.choice(["change", "change", "correct"])
                plans[place].append(_Plan(thread, op, value, current))
                current = value
            if current is not None:
                threads.append(thread)
    return threads


def _fresh(rng: random.Random, topic: str, used: set[str]) -> Value | None:
    for _ in range(20):
        value = _ATTRIBUTES[topic](rng)
        if value.answer not in used:
            used.add(value.answer)
            return value
    return None


def _plan_activities(
    rng: random.Random, people: list[str], plans: list[list[_Plan]], dates: list[str]
) -> list[Thread]:
    """Reports of activities; about one in five is amended in a later session."""
    sessions = len(plans)
    threads = []
    for owner in people:
        for phrase, _, _, _, low, high in rng.sample(ACTIVITIES, rng.randint(2, 4)):
            thread = Thread(owner, phrase)
            count = rng.randint(2, max(2, min(sessions, 9)))
            for place in sorted(rng.sample(range(sessions), min(sessions, count))):
                amounts = rng.sample(range(low, high + 1), 2)
                value, other = (Value(phrase.format(a), str(a), True) for a in amounts)
                plans[place].append(_Plan(thread, "report", value))
                if place + 1 < sessions and rng.random() < 0.2:
                    later = rng.randrange(place + 1, sessions)
                    plans[later].append(_Plan(thread, "amend", other, value, place))
            threads.append(thread)
    for session in plans:
        for plan in session:
            plan.sentence = _sentence(rng, plan, dates)
    return threads


def _sentence(rng: random.Random, plan: _Plan, dates: list[str]) -> str:
    forms = {
        "set": _FIRST_TIME,
        "change": _CHANGE,
        "correct": _CORRECTION,
        "report": _REPORT,
        "amend": _REPORT_CORRECTION,
    }[plan.op]
    return rng.choice(forms).format(
        a=plan.thread.topic,
        v=plan.value.said,
        o=plan.old.said if plan.old else "",
        p=plan.value.said,
        d=dates[plan.amends] if plan.amends is not None else "",
    )


def _speak_session(
    rng: random.Random,
    transcript: _Transcript,
    people: list[str],
    plans: list[_Plan],
    session: int,
    budget: int,
    talk: _SmallTalk,
) -> None:
    """Turns of one session: its statements in random order among small talk of ``budget`` chars."""
    order = plans[:]
    rng.shuffle(order)
    end = transcript.length + budget
    transcript.line(f"{people[0].split()[0]}: {talk.opener()} {talk.line_or_quote()}")
    speaker = people[0]
    while order or transcript.length < end - 200:
        room = max(0, end - transcript.length)
        # Statements are spread over what is left of the session.
        is_statement = order and rng.random() < max(0.05, len(order) * 130 / max(room, 1))
        if is_statement:
            plan = order.pop()
            speaker = plan.thread.owner
            before = talk.line() + " " if rng.random() < 1 / 3 else ""
            after = " " + talk.reply() if rng.random() < 1 / 3 else ""
            text = f"{speaker.split()[0]}: {before}{plan.sentence}{after}"
            span = transcript.line(text)
            start = span.start + len(speaker.split()[0]) + 2 + len(before)
            where = Span(start, start + len(plan.sentence))
            plan.thread.said.append(Said(session, plan.op, plan.value, where, plan.amends))
        else:
            speaker = rng.choice([p for p in people if p != speaker])
            text = " ".join(
                [
                    *([talk.reply()] if rng.random() < 0.6 else []),
                    talk.line_or_quote(),
                    *([talk.line()] if rng.random() < 0.3 else []),
                ]
            )
            transcript.line(f"{speaker.split()[0]}: {text}")


class _Deck:
    """Deals all of its cards before one comes again, and never the same twice in a row."""

    def __init__(self, rng: random.Random, cards: Sequence[str]):
        self._rng, self._cards, self._left, self._last = rng, cards, [], ""

    def draw(self) -> str:
        if not self._left:
            self._left = self._rng.sample(self._cards, len(self._cards))
            if self._left[-1] == self._last:
                self._left.reverse()
        self._last = self._left.pop()
        return self._last


class _SmallTalk:
    """What is said between the statements of one conversation."""

    def __init__(self, rng: random.Random, quotes: list[tuple[str, str]]):
        self._rng, self._quotes = rng, quotes
        self._lines, self._replies = _Deck(rng, _TALK), _Deck(rng, _REPLIES)
        self._openers = _Deck(rng, _OPENERS)
        self._blanks = {
            "weather": _Deck(rng, _WEATHER),
            "food": _Deck(rng, _FOOD),
            "theme": _Deck(rng, _THEMES),
            "place": _Deck(rng, _PLACES),
            "who": _Deck(rng, _WHO),
            "time": _Deck(rng, _TIMES),
        }

    def opener(self) -> str:
        return self._openers.draw()

    def reply(self) -> str:
        return self._replies.draw()

    def line(self) -> str:
        form = self._lines.draw()
        names = [name for name in self._blanks if f"{{{name}}}" in form]
        found = {name: self._blanks[name].draw() for name in names}
        if "who" in found and not form.startswith("{who}"):
            found["who"] = found["who"][0].lower() + found["who"][1:]
        return form.format(**found)

    def line_or_quote(self) -> str:
        if self._quotes and self._rng.random() < 0.6:
            title, sentence = self._rng.choice(self._quotes)
            return self._rng.choice(_QUOTES).format(t=title, s=sentence)
        return self.line()
