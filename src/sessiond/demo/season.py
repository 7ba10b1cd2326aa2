"""A season at a ferry company's dispatch desk: one long conversation, the same for the same seed and length.

It is made here instead of kept: 2,000 turns of varied text, tool calls among them, that refer back to one another as a
real desk's do. It reads no file and no clock.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

ID: Final = "ferry-season"
USER: Final = "dispatch.vestmar"
TURNS: Final = 2000
SEED: Final = 20260504
# How many turns an exchange can have; what is left at the end must be made of these.
_LENGTHS: Final = (2, 4, 5)
_OPEN_MAX: Final = 9
_SAID_MAX: Final = 40

_BOATS: Final = ("Terne", "Alke", "Skarv", "Havsule", "Lunde", "Teist")
_ROUTES: Final = (
    ("Hamnes", "Sula"),
    ("Sula", "Hamnes"),
    ("Hamnes", "Torvik"),
    ("Torvik", "Hamnes"),
    ("Torvik", "Lille Røst"),
    ("Lille Røst", "Torvik"),
    ("Hamnes", "Gåsøy"),
    ("Gåsøy", "Sula"),
    ("Sula", "Brattholmen"),
    ("Brattholmen", "Hamnes"),
)
_CREW: Final = (
    "Runa",
    "Eskil",
    "Mbali",
    "Tord",
    "Ingrid",
    "Pawel",
    "Siri",
    "Odd",
    "Halima",
    "Jostein",
    "Vigdis",
    "Amund",
    "Nura",
    "Bjarte",
    "Liv",
    "Stig",
)
_CAUSES: Final = (
    "a lorry that stood on the wrong lane and had to back out past thirty cars",
    "fog in the sound: the pilot asked for six knots until the outer beacon",
    "the bow ramp, which needed three tries to lock",
    "a swimmer inside the harbour mole, safely out now and very sorry",
    "an ambulance that we waited for, with the patient on board in good spirits",
    "a fishing net around the port screw, cleared by the diver",
    "a wedding party that had left its bride in the café",
    "the tide: there was too little water at the inner berth for a full car deck",
    "a fire alarm in the galley which turned out to be waffles",
    "forty sheep that would not board in front of a sheepdog they did not know",
    "a power cut on the quay, so that the barriers had to be lifted by hand",
    "a customs check of two vans, which found nothing but cheese",
)
_PARTS: Final = (
    "the starboard winch",
    "the bow thruster",
    "the ramp's left hinge",
    "the radar on the bridge wing",
    "the fresh water pump",
    "the car deck's lighting in row three",
    "the fire door aft",
    "the number two generator",
    "the horn",
    "the gangway's handrail",
    "the bilge alarm",
    "the stern camera",
    "the heating in the lower saloon",
    "the life raft cradle on the port side",
    "the windscreen wiper in front of the wheel",
)
_SYMPTOMS: Final = (
    "grinds for a second when it starts under load",
    "trips its breaker about once a day",
    "sticks in the cold",
    "shows a hairline crack near the weld",
    "drips, a cup an hour at most",
    "answers two seconds late",
    "has lost its paint and is rusting underneath",
    "rattles above fourteen knots",
    "works, but smells of warm rubber",
    "has a loose cover held by tape for now",
    "gave a false alarm three times during the night watch",
)
_REMEDIES: Final = (
    "a new bearing",
    "a cleaned contact and a drop of oil",
    "a weld, checked with dye",
    "a relay from the Teist's spares",
    "a seal that we cut ourselves",
    "a firmware update which the maker had sent in spring",
    "two bolts and patience",
    "a part that came over on the morning boat",
)
_LOST: Final = (
    ("a cello in a white case", "cello"),
    ("one red child's boot", "boot"),
    ("a thermos with a name on the bottom", "thermos"),
    ("a hearing aid in a small blue box", "hearing aid"),
    ("a kite longer than its owner", "kite"),
    ("a folder of exam papers, unmarked", "folder"),
    ("a ring, thin, with an inscription", "ring"),
    ("a wheelbarrow", "wheelbarrow"),
    ("a walking stick with silver bands", "walking stick"),
    ("a box of tomato seedlings", "seedlings"),
    ("a violin bow", "violin bow"),
    ("a set of false teeth", "teeth"),
    ("a rucksack with a half-knitted jumper in it", "rucksack"),
    ("a tablet with a cracked corner", "tablet"),
)
_PLACES: Final = (
    "upper saloon, bench by the charts",
    "car deck, row two",
    "café counter",
    "quay office, brought by a passenger",
    "aft deck locker",
    "bus shelter at the ramp",
    "lower saloon, under a seat",
    "bridge; nobody knows why",
)
_GROUPS: Final = (
    "a football team of under-twelves",
    "a choir with its own folding stage",
    "a class of geologists with hammers",
    "nine kayaks and their paddlers",
    "the island council",
    "a film crew with two generators",
    "a bus of pensioners",
    "a travelling library",
    "a rowing club with an eight on a trailer",
    "twenty scouts and a goat",
)
_CARGO: Final = (
    "a tanker lorry with heating oil",
    "six pallets of cement",
    "a beekeeper's van with forty hives",
    "an excavator on a low loader",
    "a refrigerated lorry of salmon",
    "a horse box with two mares",
    "the circus's second wagon",
    "roof beams of fourteen metres",
    "a mobile clinic",
    "gas bottles for the campsite",
)
_GRIEVANCES: Final = (
    "that the 17:20 left two minutes early with her husband on it and herself on the quay",
    "that the waffles were cold, and says that it is the principle of the thing",
    "that a crew member told his daughter that the lighthouse is haunted; she now sleeps in their bed",
    "that he paid for a van of over six metres when his measures five ninety",
    "that the announcements on the outer deck can't be heard above the engine",
    "that nobody helped with the pushchair on the steep gangway at low water",
    "that dogs are allowed in the lower saloon, and another, on the same day, that his was not",
    "that the ticket machine on Gåsøy took her card twice",
    "that the heating in the upper saloon was on during the warmest day of the year",
)
_OFFERS: Final = (
    "refund the single fare without asking for the ticket",
    "offer a free return before the end of the season",
    "pay the difference back to the card it came from",
    "apologise without a voucher: a voucher would look like a bribe",
    "thank the writer and name the date by which it is mended",
    "invite the family to the bridge for one crossing",
)
_SKIES: Final = (
    "clear, good visibility",
    "low cloud, drizzle later",
    "fog patches until ten",
    "showers with hail",
    "rain all day, thinning at dusk",
    "high cloud, a halo round the sun",
    "haze, the far shore just visible",
)
_SMALL_TALK: Final = (
    (
        "{name} wants to know whether puffins can be late.",
        "Only the ones with a timetable. Ours is carved on the cliff and they ignore it: they came on the"
        " {ordinal} last year and on the {other} the year before, always after dark and always all at once.",
    ),
    (
        "We have run out of the good coffee again, and {name} has opened the tin from the emergency stores.",
        "Then it is an emergency, and it goes into the log as one. A case of the good kind is on the {boat}"
        " tomorrow; I put it between the oxygen and the life jackets so that nobody forgets to unload it.",
    ),
    (
        "{name} asks how many crossings make a life. A philosophical question, at six in the morning.",
        "At four a day and two hundred days a year, with thirty-five years of service, it is twenty-eight"
        " thousand. {name} has about {count} to go and should have breakfast before the next one.",
    ),
    (
        "A tourist asked {name} whether the island is the same one on the way back.",
        "The right answer is that it depends on the tide. At {count} centimetres above datum the path to the"
        " chapel is under water, and then it is two islands, for the same fare.",
    ),
    (
        "Somebody has knitted a scarf for the bollard at berth {berth}. Do we have a rule?",
        "None that I can find. It must not hide the paint mark at forty centimetres and it has to come off"
        " before the first hard frost, or the mooring line takes it along. Otherwise {name} votes for a"
        " matching hat.",
    ),
)


@dataclass(slots=True)
class _Matter:
    """Something that was reported and is not yet closed."""

    boat: str
    part: str
    symptom: str
    day: str
    name: str


class _Season:
    """The desk's state while the conversation is made."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._now = datetime(2026, 5, 4, 5, 40)
        self._calls = 0
        self._open: list[_Matter] = []
        self._said: list[tuple[str, str]] = []
        self._exchanges: dict[int, list[tuple[int, Callable[[], list[dict[str, Any]]]]]] = {
            2: [
                (5, self._delay),
                (4, self._fault),
                (4, self._mended),
                (3, self._letter),
                (3, self._notice),
                (2, self._handover),
                (3, self._remember),
                (2, self._small_talk),
            ],
            4: [(4, self._weather), (3, self._roster), (4, self._lost), (2, self._fuel), (2, self._tide)],
            5: [(3, self._group), (3, self._cargo), (2, self._swap)],
        }

    def next(self, left: int) -> list[dict[str, Any]]:
        """The next exchange, such that what is left after it can still be filled."""
        self._now += timedelta(minutes=self._rng.randint(20, 210))
        if self._now.hour >= 22 or self._now.hour < 5:
            self._now = (self._now + timedelta(hours=10)).replace(hour=5, minute=self._rng.randint(20, 59))
        lengths = [length for length in _LENGTHS if left == length or left - length == 2 or left - length >= 4]
        choices = [(weight, make) for length in lengths for weight, make in self._exchanges[length]]
        return self._rng.choices([make for _, make in choices], [weight for weight, _ in choices])[0]()

    # What exchanges are made of --------------------------------------------------------------------------------------

    def _pick(self, options: tuple[Any, ...]) -> Any:
        return options[self._rng.randrange(len(options))]

    def _day(self) -> str:
        return f"{self._now.day} {self._now:%B}"

    def _clock(self, minutes: int = 0) -> str:
        return f"{self._now + timedelta(minutes=minutes):%H:%M}"

    def _user(self, *options: str) -> dict[str, Any]:
        opening = self._pick(("", "", "", f"{self._clock()}. ", f"{self._pick(_CREW)} here. ", "Quick one. ", "Next. "))
        return {"role": "user", "content": opening + self._pick(options)}

    def _answer(self, *options: str) -> dict[str, Any]:
        return {"role": "assistant", "content": self._pick(options)}

    def _call(self, *calls: tuple[str, dict[str, Any]], text: str | None = None) -> dict[str, Any]:
        made = []
        for name, arguments in calls:
            self._calls += 1
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            made.append({"id": f"call_{self._calls:05d}", "type": "function", "function": function})
        return {"role": "assistant", "content": text, "tool_calls": made}

    def _result(self, call: dict[str, Any], at: int, content: Any) -> dict[str, Any]:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        return {"role": "tool", "tool_call_id": call["tool_calls"][at]["id"], "content": text}

    def _say(self, topic: str, what: str) -> None:
        self._said.append((topic, f"{what} ({self._day()})"))
        del self._said[:-_SAID_MAX]

    # Exchanges of two turns ------------------------------------------------------------------------------------------

    def _delay(self) -> list[dict[str, Any]]:
        boat, (start, end), late = self._pick(_BOATS), self._pick(_ROUTES), self._rng.randrange(10, 75, 5)
        cause, other = self._pick(_CAUSES), self._pick(_BOATS)
        self._say(f"the {boat} being {late} minutes late", f"it was {cause}")
        return [
            self._user(
                f"The {boat} left {start} for {end} {late} minutes late. Reason: {cause}. What do I tell the people"
                f" waiting in {end}, and does the {self._clock(90)} still go?",
                f"{boat} is {late} minutes behind between {start} and {end}: {cause}. Please write the announcement and"
                " look at what it does to the connections.",
                f"Put this in the log: {boat}, {start} to {end}, {late} minutes, because of {cause}. The bus in {end}"
                " waits for ten minutes and not for one more.",
            ),
            self._answer(
                f'Announcement for {end}: "The {boat} from {start} arrives {late} minutes late, at about'
                f' {self._clock(late)}. We are sorry." The {self._clock(90)} goes as planned if she turns round in'
                f" twenty minutes; if not, the {other} takes the foot passengers and the cars follow at"
                f" {self._clock(150)}. I wrote the reason into the log, in fewer words.",
                f"Logged for {self._day()}. With {late} minutes she meets the {other} in the sound, so one of them has"
                f" to wait outside; I suggest the {other}, which has no connection to keep. The bus in {end} can't be"
                f" held that long: {self._rng.randint(3, 30)} passengers need taxis, and that is cheaper than an empty"
                " bus at midnight.",
                f"It costs one connection, the {self._clock(120)} in {end}. I have told the quay there to sell nothing"
                f' for it until the {boat} is past the beacon. For the passengers: "{late} minutes late, coffee is on'
                ' us." The café already knows, and sighed.',
            ),
        ]

    def _fault(self) -> list[dict[str, Any]]:
        matter = _Matter(self._pick(_BOATS), self._pick(_PARTS), self._pick(_SYMPTOMS), self._day(), self._pick(_CREW))
        self._open.append(matter)
        del self._open[:-_OPEN_MAX]
        self._say(f"{matter.part} of the {matter.boat}", f"reported by {matter.name}: it {matter.symptom}")
        due = self._rng.randint(2, 9)
        return [
            self._user(
                f"{matter.name} reports that {matter.part} on the {matter.boat} {matter.symptom}. Can she sail with"
                " it?",
                f"New entry for the {matter.boat}: {matter.part} {matter.symptom}. Seen by {matter.name} on the early"
                " round. Who needs to know?",
                f"On the {matter.boat}, {matter.part} {matter.symptom}. {matter.name} has taken a picture. How urgent"
                " is it by the book?",
            ),
            self._answer(
                f"By the book {matter.part} is a class {self._pick(('B', 'C'))} item: she may sail, in daylight and"
                f" below {self._rng.randint(11, 17)} m/s of wind, and it must be mended within {due} days. I opened"
                f" the matter under {matter.name}'s name and told the workshop in Hamnes. The master has to sign"
                " before the next departure, not after it.",
                f"Entered on {matter.day}. The yard can look at it on the {matter.boat}'s next long stop, in {due}"
                f" days. Until then {matter.name} checks it at every change of watch and writes down the reading, also"
                " if it is fine: a column of noughts is what the inspector likes best.",
                f"She can sail. But if it {matter.symptom} with passengers on the ramp, boarding stops until somebody"
                " has looked. Spares: one in Torvik, on the shelf under the stairs. I have asked for it to come over"
                f" with the {self._pick(_BOATS)}, so that the work takes an hour rather than a day.",
            ),
        ]

    def _mended(self) -> list[dict[str, Any]]:
        if not self._open:
            return self._fault()
        matter, remedy = self._open.pop(self._rng.randrange(len(self._open))), self._pick(_REMEDIES)
        hours = self._rng.randint(1, 7)
        self._say(f"{matter.part} of the {matter.boat}", f"mended with {remedy}")
        return [
            self._user(
                f"Close the matter of {matter.part} on the {matter.boat}, the one of {matter.day}. It took {remedy}.",
                f"{matter.boat}: {matter.part} is done, {hours} hours, {remedy}. {matter.name} tried it under load.",
                f"You remember that {matter.part} on the {matter.boat} {matter.symptom}? Mended: {remedy}. Take it off"
                " the list, please.",
            ),
            self._answer(
                f'Closed. Opened on {matter.day} by {matter.name}, because it "{matter.symptom}"; mended on'
                f" {self._day()} with {remedy}, {hours} hours of work. {len(self._open)} matters remain open over the"
                " fleet. If it comes back within thirty days it counts as the same fault, and the yard pays.",
                f"Off the list, after {hours} hours in the yard. The limits on the {matter.boat} that went with it are"
                f" lifted as well, so she may sail at night again from the {self._clock(60)}. I told {matter.name},"
                " who found it, because people like to hear how their stories end.",
            ),
        ]

    def _letter(self) -> list[dict[str, Any]]:
        grievance, offer, boat = self._pick(_GRIEVANCES), self._pick(_OFFERS), self._pick(_BOATS)
        ticket = self._rng.randint(10_000_000, 99_999_999)
        self._say(f"the complaint with ticket {ticket}", f"we {offer}")
        return [
            self._user(
                f"A passenger of the {boat} complains {grievance}. Ticket {ticket}. I would {offer}. Draft me five"
                " lines.",
                f"Complaint, ticket {ticket}, {boat}: the writer says {grievance}. My line is to {offer}. Make it"
                " sound like people wrote it.",
            ),
            self._answer(
                f'"Thank you for writing to us about your crossing with the {boat}. We have asked the crew, and you'
                " are right to be annoyed: it should not have gone that way. We would like to"
                f" {offer.replace('the writer', 'you')}. You need not send anything; your ticket {ticket} is all we"
                " need. If we see you on the quay again, and we hope so, ask for the purser and say that the desk"
                ' owes you a coffee." Shall I send it, or do you want to sleep on the coffee?',
                f'"What you describe happened on a day when we were short of hands on the {boat}, and that explains'
                " it without excusing it. You took the time to tell us, so here is what we do: we have put it on the"
                f" list for the crew meeting on {self._rng.randint(2, 28)} {self._now:%B}, and for your ticket"
                f" {ticket} we {offer.replace('the writer', 'you')}. With regards from a desk that has a view of the"
                ' quay." It has five lines if the window is wide.',
            ),
        ]

    def _notice(self) -> list[dict[str, Any]]:
        (start, end), boat = self._pick(_ROUTES), self._pick(_BOATS)
        first, last = self._rng.randint(2, 14), self._rng.randint(15, 28)
        why = self._pick(
            (
                "divers inspect the ramp",
                "the quay gets new fenders",
                "the regatta crosses the fairway",
                "the cable to the island is laid",
                "the harbour is dredged",
                "the shearwaters ring their young on the mole",
            )
        )
        self._say(f"{start} to {end} in {self._now:%B}", f"mornings only from {first} {self._now:%B} on, because {why}")
        return [
            self._user(
                f"From {first} to {last} {self._now:%B} {why}, and {start} to {end} sails only in the mornings. I need"
                " the text for the board, for the web page and for the radio.",
                f"Write a notice: {start} to {end}, mornings only, {first} to {last} {self._now:%B}, since {why}. The"
                f" {boat} stands in.",
            ),
            self._answer(
                f'Board: "{start} to {end}: mornings only, {first} to {last} {self._now:%B}." Web: the same, and'
                f' "because {why}. The {boat} sails at 06:30, 08:10 and 10:00; bookings for the afternoon were moved'
                ' and everybody was written to." Radio, to be read aloud: "If you want to be across by noon, be on'
                ' the quay by ten." I left the reason out of the last: people at the wheel remember one thing.',
                f'Here is the long one. "While {why}, from {first} to {last} {self._now:%B}, the {boat} sails from'
                f" {start} to {end} in the mornings only: 06:45, 08:20, 10:05. Afternoon passengers go by way of"
                ' Hamnes with the same ticket and without a surcharge." For the board take its first half. I would'
                " put it up three days early, at eye height of somebody who carries a child.",
            ),
        ]

    def _handover(self) -> list[dict[str, Any]]:
        name = self._pick(_CREW)
        matters = self._rng.sample(self._open, min(3, len(self._open)))
        listed = "; ".join(f"{m.boat}, {m.part}, since {m.day}" for m in matters) or "nothing open in the yard"
        return [
            self._user(
                f"End of my watch, {name} takes over. Give them the picture in half a minute.",
                f"Handover to {name}. What is open, what is late, what must not be forgotten?",
            ),
            self._answer(
                f"For {name}. Open with the yard: {listed}. Sailings on {self._day()}: {self._rng.randint(22, 41)} of"
                f" {self._rng.randint(42, 46)} on time, the rest within the half hour. Cash is counted. The night boat"
                f" is the {self._pick(_BOATS)}; her master wants to be called, not written to. And somebody has to"
                " feed the quay cat, who is on the roster as deckhand.",
                f"Good evening, {name}. Wind backs to the south after midnight, so the outer berth will be the calm"
                f" one. Yard list: {listed}. {self._rng.randint(1, 6)} letters wait for a signature. If the"
                f" {self._pick(_BOATS)} calls about fuel: yes, it is ordered, and no, not before seven.",
            ),
        ]

    def _remember(self) -> list[dict[str, Any]]:
        if not self._said:
            return self._notice()
        topic, what = self._said[self._rng.randrange(len(self._said))]
        return [
            self._user(
                f"What was it again with {topic}? {self._pick(_CREW)} asks and I have had three watches since.",
                f"Remind me of {topic}, please: who said what, and is it settled?",
                f"The office wants a sentence on {topic}. What do we have?",
            ),
            self._answer(
                f"In one sentence: {what}. I have nothing later on it than that, so unless {self._pick(_CREW)} knows"
                " more it stands as it was written.",
                f"From the log: {what}. That is all that was said here. If the office needs a figure I can look at the"
                " tickets of that day, but I would rather not guess one.",
                f"About {topic} I wrote down this: {what}. Nobody has come back to it since. Shall I put it on the"
                f" list for the meeting on {self._rng.randint(2, 28)} {self._now:%B}?",
            ),
        ]

    def _small_talk(self) -> list[dict[str, Any]]:
        question, answer = self._pick(_SMALL_TALK)
        words = {
            "name": self._pick(_CREW),
            "boat": self._pick(_BOATS),
            "count": f"{self._rng.randint(120, 9800):,}",
            "ordinal": f"{self._rng.randint(4, 20)}th",
            "other": f"{self._rng.randint(4, 20)}th",
            "berth": self._rng.randint(1, 5),
        }
        return [self._user(question.format(**words)), self._answer(answer.format(**words))]

    # Exchanges of four and five turns --------------------------------------------------------------------------------

    def _weather(self) -> list[dict[str, Any]]:
        (start, end), boat, wind = self._pick(_ROUTES), self._pick(_BOATS), self._rng.randint(3, 24)
        gust, sea, sky = wind + self._rng.randint(2, 9), round(wind / 6 + self._rng.random(), 1), self._pick(_SKIES)
        point = self._pick(("N", "NE", "E", "SE", "S", "SW", "W", "NW"))
        call = self._call(("forecast", {"from": start, "to": end, "at": self._clock(120)}))
        verdict = (
            f"I would not send the {boat} out in that. The {self._pick(_BOATS)} can, with lashed cars, or it waits for"
            f" the {self._clock(300)}"
            if gust > 22
            else f"Nothing that keeps the {boat} in. Lash the motorcycles anyway"
        )
        self._say(f"the weather between {start} and {end}", f"{point} {wind} m/s, gusts {gust}, sea {sea} m")
        return [
            self._user(
                f"How does it look between {start} and {end} in two hours? {boat}, full car deck.",
                f"{boat}'s master asks for the {start} to {end} forecast before he loads the motorcycles.",
            ),
            call,
            self._result(
                call,
                0,
                {
                    "wind": f"{point} {wind} m/s",
                    "gust_m_s": gust,
                    "sea_m": sea,
                    "sky": sky,
                    "water_c": self._rng.randint(6, 17),
                    "pressure_hpa": self._rng.randint(984, 1031),
                    "issued": self._clock(-35),
                },
            ),
            self._answer(
                f"{point} {wind} m/s with gusts of {gust}, a sea of {sea} metres, {sky}. {verdict}. The next bulletin"
                f" comes at {self._clock(145)} and I will look at it without being asked.",
                f"At {self._clock(120)}: wind {point} {wind}, gusts up to {gust}, waves {sea} m; {sky}. {verdict}."
                " Past the beacon it is always a little worse than the bulletin says, and in the lee of the island a"
                " little better.",
            ),
        ]

    def _roster(self) -> list[dict[str, Any]]:
        ill, boat = self._pick(_CREW), self._pick(_BOATS)
        free = [name for name in self._rng.sample(_CREW, 5) if name != ill][:3]
        call = self._call(
            ("roster", {"boat": boat, "day": self._day(), "role": self._pick(("mate", "deckhand", "engineer"))})
        )
        self._say(f"{ill}'s absence on the {boat}", f"{free[0]} stands in")
        return [
            self._user(
                f"{ill} has called in sick for the {boat}. Who is rested and has the papers?",
                f"I am one short on the {boat} from {self._clock(60)} on, because {ill} is at the dentist. Options?",
            ),
            call,
            self._result(
                call,
                0,
                {
                    "rested": [
                        {
                            "name": name,
                            "hours_since_watch": self._rng.randint(11, 60),
                            "certificate_until": f"202{self._rng.randint(7, 9)}-0{self._rng.randint(1, 9)}",
                        }
                        for name in free
                    ],
                    "resting_until": {self._pick(_CREW): self._clock(240)},
                },
            ),
            self._answer(
                f"{free[0]}, {free[1]} and {free[2]} are rested and have valid papers. I would ask {free[0]} first,"
                f" who has had the longest rest; {free[1]} has already done two nights this week. It has to be in the"
                f" book before the {boat} casts off.",
                f"Rested: {', '.join(free)}. Best is {free[0]}: knows the {boat} and lives in walking distance of the"
                " quay. I have not called anybody, since last time you wanted to do that yourself. Best wishes to the"
                " one who is out.",
            ),
        ]

    def _lost(self) -> list[dict[str, Any]]:
        (thing, word), boat, tag = self._pick(_LOST), self._pick(_BOATS), self._rng.randint(2000, 9999)
        place, found = self._pick(_PLACES), self._rng.random() < 0.7
        call = self._call(("search_lost_property", {"boat": boat, "words": [word], "days": self._rng.randint(1, 14)}))
        self._say(f"the {word} from the {boat}", f"tag LP-{tag}, {place}" if found else "not found so far")
        found_answers = (
            f"Found: tag LP-{tag}, from the {place}. It is kept for ninety days and then goes to the mission's shop."
            " The owner describes it, you look, and nobody shows it first: those are the rules since the affair with"
            " the two trumpets.",
            f"We have it, under LP-{tag}; it came from here: {place}. I would let the owner name two things about it"
            f" before anybody nods. The {boat} can take it along on any crossing, in the purser's drawer, for nothing.",
        )
        lost_answers = (
            f'Nothing under "{word}" on the {boat}, nor on the quays she called at. I left a note for the cleaners of'
            " the evening round, who find most things, and a search of the car deck when she is empty. If it turns up"
            " I write to you before I write to the owner.",
            f"Not handed in so far. The {boat} was searched twice since, so I would ask the bus company as well: things"
            f" travel on. The entry stays open for fourteen days under the word {word}, and I look again on each.",
        )
        return [
            self._user(
                f"Somebody has lost {thing} on the {boat}, perhaps yesterday. Has it been handed in?",
                f"A very sad voice on the telephone: {thing}, last seen on the {boat}. Do we have it?",
            ),
            call,
            self._result(
                call,
                0,
                {
                    "found": [{"tag": f"LP-{tag}", "where": place, "on": self._day(), "by": self._pick(_CREW)}]
                    if found
                    else [],
                    "searched": self._rng.randint(14, 90),
                },
            ),
            self._answer(*(found_answers if found else lost_answers)),
        ]

    def _fuel(self) -> list[dict[str, Any]]:
        boat, litres, usual = self._pick(_BOATS), self._rng.randint(1900, 5200), self._rng.randint(1900, 4800)
        call = self._call(("fuel_report", {"boat": boat, "week": int(f"{self._now:%V}")}))
        percent = round(100 * (litres / usual - 1))
        self._say(f"the {boat}'s fuel in week {self._now:%V}", f"{litres:,} litres, {percent:+d} % against the mean")
        return [
            self._user(
                f"What did the {boat} burn this week, and is that normal for her?",
                f"The accountant asks about the {boat}'s fuel again. Figures, and a reason if there is one.",
            ),
            call,
            self._result(
                call,
                0,
                {
                    "litres": litres,
                    "mean_of_ten_weeks": usual,
                    "crossings": self._rng.randint(40, 96),
                    "hours_idling": round(self._rng.random() * 12, 1),
                    "mean_speed_kn": round(9 + self._rng.random() * 5, 1),
                },
            ),
            self._answer(
                f"{litres:,} litres, against {usual:,} in the mean of ten weeks: {percent:+d} %. What the report can't"
                " tell is the wind. I would compare two weeks with the same number of crossings before anybody speaks"
                " of the hull or of heavy hands on the throttle.",
                f"She burned {litres:,} litres; ten weeks' mean is {usual:,}, so {percent:+d} %. The idling hours are"
                " in the same report, and most of them fall on the evenings when the ramp did not lock. One cause may"
                " explain both.",
            ),
        ]

    def _tide(self) -> list[dict[str, Any]]:
        place, boat, low = self._pick(_ROUTES)[0], self._pick(_BOATS), self._rng.randint(12, 140)
        draught = round(2 + self._rng.random() * 1.4, 1)
        call = self._call(("tide_table", {"quay": place, "day": self._day()}))
        return [
            self._user(
                f"Low water at {place}: can the {boat} lie at the inner berth, or does she touch?",
                f"When is there enough water for the {boat} at {place}'s inner berth? She has the heavy lorries on.",
            ),
            call,
            self._result(
                call,
                0,
                {
                    "low": [
                        {"at": self._clock(95), "cm": low},
                        {"at": self._clock(840), "cm": low + self._rng.randint(-9, 14)},
                    ],
                    "high": [{"at": self._clock(470), "cm": low + self._rng.randint(90, 210)}],
                    "inner_berth_depth_m": 2.6,
                },
            ),
            self._answer(
                f"Low water is at {self._clock(95)} with {low} cm above datum. With 2.6 metres at the inner berth and"
                f" a draught of {draught} the {boat} has {round(2.6 + low / 100 - draught, 1)} m under her keel. Our"
                " rule asks for half a metre; between an hour before and an hour after, take the outer berth if it is"
                " less.",
                f"The lowest is {low} cm at {self._clock(95)}. She draws {draught} m loaded. That leaves"
                f" {round(2.6 + low / 100 - draught, 1)} m at the inner berth of {place}. If the lorries come off"
                f" first, and before {self._clock(40)}, there is no question at all.",
            ),
        ]

    def _group(self) -> list[dict[str, Any]]:
        group, (start, end), people = self._pick(_GROUPS), self._pick(_ROUTES), self._rng.randint(9, 60)
        boat, price = self._pick(_BOATS), self._rng.randint(40, 190) * people
        reference = f"VB-{self._rng.randint(10_000, 99_999)}"
        call = self._call(
            ("find_sailings", {"from": start, "to": end, "day": self._day(), "passengers": people}),
            ("quote_fare", {"passengers": people, "group": True, "return": self._rng.random() < 0.6}),
            text=self._pick((None, "Both at once.", "Let me see space and fare.")),
        )
        sailings = {
            "sailings": [
                {"at": self._clock(1440 + 60 * n), "boat": self._pick(_BOATS), "free": people + 7 * n}
                for n in range(self._rng.randint(1, 3))
            ]
        }
        fare = {"total": price, "currency": "crowns", "valid_days": self._rng.randint(3, 10)}
        self._say(f"the booking of {group}", f"{reference}, {price:,} crowns, on the {boat}")
        return [
            self._user(
                f"We have {group}, {people} people in all, who want to go from {start} to {end} tomorrow. Room? Fare?",
                f"Group request: {group}, {people} of them, {start} to {end}. They ask whether they may all sit"
                " together.",
            ),
            call,
            # The fare comes from another system and is there first.
            self._result(call, 1, fare),
            self._result(call, 0, sailings),
            self._answer(
                f"There is room for all {people} at {sailings['sailings'][0]['at']}. {price:,} crowns, valid for"
                f" {fare['valid_days']} days. I can hold it as {reference}; the {boat} has the longer benches, so they"
                " would sit together. Luggage larger than a suitcase goes on the car deck with a label.",
                f"Yes: {len(sailings['sailings'])} sailing(s) with enough places, the first at"
                f" {sailings['sailings'][0]['at']}. The fare is {price:,} crowns for {people}. Reference {reference}"
                f" if they say yes today. I would put them on the {boat} and warn the café.",
            ),
        ]

    def _cargo(self) -> list[dict[str, Any]]:
        cargo, (start, end), boat = self._pick(_CARGO), self._pick(_ROUTES), self._pick(_BOATS)
        metres, tonnes = self._rng.randint(6, 24), self._rng.randint(2, 44)
        call = self._call(
            ("car_deck", {"boat": boat, "at": self._clock(180)}),
            ("cargo_rules", {"goods": cargo, "route": f"{start}-{end}"}),
        )
        free = self._rng.randint(4, 60)
        limit = self._pick(
            (
                "no passengers above 25",
                "open deck only",
                "driver stays with the vehicle",
                "lashed at four points",
                "first on, last off",
                "ventilation on, no engine running",
                "none",
            )
        )
        self._say(f"{cargo}, {start} to {end}", f"{metres} lane metres, {tonnes} t, rule: {limit}")
        return [
            self._user(
                f"Can the {boat} take {cargo} from {start} to {end}? {metres} metres, {tonnes} tonnes.",
                f"Freight desk: {cargo}, {tonnes} t on {metres} lane metres, {start} to {end}, today if it can be"
                " done.",
            ),
            call,
            self._result(
                call, 0, {"lane_metres_free": free, "axle_load_t": 12, "booked_cars": self._rng.randint(3, 48)}
            ),
            self._result(call, 1, {"condition": limit, "document": f"F-{self._rng.randint(100, 999)}", "asked": cargo}),
            self._answer(
                f"{'It fits' if free >= metres else 'Not on this sailing'}: {free} lane metres are free and {metres}"
                f" are needed. Condition for this kind of load: {limit}. The driver shows the paper at the ramp, and"
                " the mate decides where it stands, since it is the mate who has to answer for the trim.",
                f"The {boat} has {free} metres free at {self._clock(180)},"
                f" {'enough' if free >= metres else 'too little'} for {metres}. The rules say: {limit}. With {tonnes}"
                " tonnes I would keep it on the centre line, and nothing with children in it right behind.",
            ),
        ]

    def _swap(self) -> list[dict[str, Any]]:
        first, second = self._rng.sample(_BOATS, 2)
        route, other = self._pick(_ROUTES), self._pick(_ROUTES)
        call = self._call(
            ("boat", {"name": first, "fields": ["seats", "lane_metres", "draught"]}),
            ("boat", {"name": second, "fields": ["seats", "lane_metres", "draught"]}),
        )
        seats = [self._rng.randint(90, 340) for _ in range(2)]
        metres = [self._rng.randint(40, 160) for _ in range(2)]
        self._say(
            f"swapping the {first} and the {second}", f"seats {seats[0]} and {seats[1]}, the master of each agrees"
        )
        return [
            self._user(
                f"What if the {first} and the {second} swapped: {route[0]} to {route[1]} against {other[0]} to"
                f" {other[1]}?",
                f"The {first} is too large for {route[0]} to {route[1]} on weekdays. Would the {second} do? Compare"
                " them.",
            ),
            call,
            self._result(call, 1, {"name": second, "seats": seats[1], "lane_metres": metres[1], "draught_m": 2.4}),
            self._result(call, 0, {"name": first, "seats": seats[0], "lane_metres": metres[0], "draught_m": 3.1}),
            self._answer(
                f"{first}: {seats[0]} seats, {metres[0]} lane metres. {second}: {seats[1]} and {metres[1]}. On an"
                f" ordinary {self._now:%A} the smaller one is two thirds full, so it would do; on Fridays it would"
                " leave cars behind. I would swap from Monday to Thursday and tell both masters on the same day.",
                f"By the numbers, {seats[0]} against {seats[1]} seats and {metres[0]} against {metres[1]} metres. The"
                f" {first} draws 3.1 m and can't use the inner berth at {route[1]} around low water, which the"
                f" {second} can. That speaks for the swap more than the seats do.",
            ),
        ]


SYSTEM: Final = (
    "You work the dispatch desk of Vestmar Ferries together with the people on watch: six boats (Terne, Alke, Skarv,"
    " Havsule, Lunde, Teist), ten routes, one season. You keep the log, look things up before you answer (forecast,"
    " roster, tide tables, car deck, fuel, lost property), write announcements and letters, and remember what was"
    " decided. Say when you don't know. A master's word about the own boat is final. Be brief: somebody reads this"
    " between two sailings."
)


def conversation(turns: int = TURNS, seed: int = SEED) -> dict[str, Any]:
    """One conversation of exactly this many turns (at least 3, and not 4), as a line of the sample set."""
    season = _Season(seed)
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    while len(messages) < turns:
        messages += season.next(turns - len(messages))
    metadata = {"desk": "dispatch", "season": "2026"}
    return {"id": ID, "user": USER, "metadata": metadata, "messages": messages}
