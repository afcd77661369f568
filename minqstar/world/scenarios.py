"""What the posts of the TL;DR world are about: pure content, in the form that `grammar` defines.

Some openings are *garden paths*: the likelier first token commits to a further free choice, so that the most
likely whole summary starts with the other one. In one subreddit greedy decoding falls for it.

The word before a fact is the same in post and summary, except for the two facts of one kind (two salaries, two
prices, two spans of weeks): to tell those apart a reader has to understand.
"""

from minqstar.world.grammar import Scenario, endings, option, together


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PAY = tuple(str(n) for n in range(40, 100))  # thousand dollars a year
PRICE = tuple(str(n) for n in range(30, 90))  # tens of dollars
WEEKS = tuple("23456789")

JOB = Scenario(
    name="job",
    subreddits=("jobs", "careers"),
    titles=("Should I take this offer?", "Need advice on a new job", "Is this a fair deal?"),
    facts={
        "company": words("Acme Globex Initech Umbra Vertex Nimbus Orion Zenith Atlas Delta Lumen Quartz"),
        "role": words("analyst engineer designer manager writer nurse chemist planner auditor teacher lawyer editor"),
        "offered": PAY,
        "asked": PAY,
        "city": words("Boston Denver Austin Seattle Chicago Dallas Miami Portland Oakland Phoenix Tampa Detroit"),
    },
    sentences=(
        ("I got an offer from {company}.", "Last week I heard back from {company}.", "I had a call from {company}."),
        ("The job is for a senior {role}.", "They need a senior {role}.", "I would be a senior {role}."),
        ("The salary is ${offered}k.", "They would pay me ${offered}k.", "Their number is ${offered}k."),
        ("I asked for ${asked}k.", "I was hoping for ${asked}k.", "My goal was ${asked}k."),
        ("The office is in {city}.", "I would have to live in {city}.", "The whole team sits in {city}."),
    ),
    chatter=(
        "My old boss knows nothing yet.",
        "I have to answer by Friday.",
        "My wife says go for it.",
        "It is a big step for me.",
        "I never did this before.",
    ),
    grammar={
        "start": [option((0.58, 0.42), " I", "adverb"), option((0.42, 0.58), " Offer from {company}", "role")],
        "adverb": [option(0.25, word, "got") for word in (" just", " finally", " recently", " suddenly")],
        "got": [option(1.0, " got an offer from {company}", "role")],
        "role": [option(0.65, " as a senior {role}.", "money", "clause"), option(0.35, ".", "money")],
        "money": [
            option(0.7, " They pay ${offered}k", "want"),
            option(0.3, " I want ${asked}k and they pay ${offered}k.", "city"),
        ],
        "want": [option(0.6, " but I want ${asked}k.", "city", "clause"), option(0.4, ".", "city")],
        "city": [option(0.5, " The office is in {city}.", "end", "clause"), option(0.5, "", "end")],
        **endings(" Any advice?", " Thoughts?", " Please help."),
    },
)

INJURY = Scenario(
    name="injury",
    subreddits=("running", "fitness"),
    titles=("When can I train again?", "Hurt and bored", "How long does this take?"),
    facts={
        "part": words("knee ankle wrist elbow shoulder hip calf heel shin thumb neck toe"),
        "sport": words("tennis soccer hockey rugby squash golf cricket softball handball basketball volleyball polo"),
        "since": WEEKS,
        "rest": WEEKS,
        "remedy": words("ice yoga massage swimming tape heat stretching cream surgery cycling pills sleep"),
    },
    sentences=(
        ("So I hurt my {part} badly.", "I think I broke my {part}.", "I landed on my {part}."),
        ("It happened while playing {sport}.", "I was out playing {sport}.", "I love playing {sport}."),
        (
            "It has been sore for {since} weeks.",
            "The pain began {since} weeks ago.",
            "This is going on {since} weeks now.",
        ),
        (
            "The nurse told me to stay off it {rest} weeks.",
            "I must not move it {rest} weeks.",
            "No sports {rest} weeks, they said.",
        ),
        ("A friend says I should try {remedy}.", "My coach wants me to try {remedy}.", "I might try {remedy}."),
    ),
    chatter=(
        "I am so bored at home.",
        "The season starts very soon.",
        "This never happened before.",
        "I feel so old.",
        "It still looks a bit blue.",
    ),
    grammar={
        "start": [option(0.6, " Hurt my {part}", "sport"), option(0.4, " Injured my {part}", "sport")],
        "sport": [option(0.6, " playing {sport}", "since", "clause"), option(0.4, "", "since")],
        "since": [option(0.7, " and it has hurt for {since} weeks.", "rest", "clause"), option(0.3, ".", "rest")],
        "rest": [
            option((0.58, 0.42), " The doctor", "says"),
            option((0.42, 0.58), " Told to rest {rest} weeks.", "remedy"),
        ],
        "says": [option(0.25, word, "told") for word in (" told", " wants", " asked", " begged")],
        "told": [option(1.0, " me to rest {rest} weeks.", "remedy")],
        "remedy": [option(0.5, " Should I try {remedy}?", "end", "clause"), option(0.5, "", "end")],
        **endings(" So annoyed.", " Any tips?", " Help?"),
    },
)

CAMERA = Scenario(
    name="camera",
    subreddits=("photography", "cameras"),
    titles=("Is this a good buy?", "Help me choose", "First real camera"),
    facts={
        "brand": words("Canon Nikon Sony Fuji Leica Pentax Olympus Kodak Minolta Ricoh Yashica Contax"),
        "subject": words("birds portraits weddings insects streets mountains concerts flowers cars dogs stars food"),
        "price": PRICE,
        "budget": PRICE,
        "trip": words("Japan Italy Peru Kenya Norway Spain Chile Nepal Greece Iceland Egypt Turkey"),
    },
    sentences=(
        ("A shop near me has a used {brand}.", "I found a used {brand}.", "Somebody sells a used {brand}."),
        ("I mostly shoot {subject}.", "I want to shoot {subject}.", "On weekends I shoot {subject}."),
        ("It costs ${price}0.", "The tag says ${price}0.", "The seller wants ${price}0."),
        ("My limit is ${budget}0.", "I can spend ${budget}0.", "I only saved ${budget}0."),
        ("I will travel to {trip} soon.", "I am flying to {trip} in May.", "We are moving to {trip} next year."),
    ),
    chatter=(
        "My phone is not enough.",
        "I never had a real one.",
        "The lens looks clean to me.",
        "People say it is fine.",
        "I know nothing about this.",
    ),
    grammar={
        "start": [
            option((0.58, 0.42), " Want to", "verb"),
            option((0.42, 0.58), " Looking at a used {brand}", "shoot"),
        ],
        "verb": [option(0.25, word, "thing") for word in (" buy", " get", " grab", " order")],
        "thing": [option(1.0, " a used {brand}", "shoot")],
        "shoot": [option(0.6, " to shoot {subject}", "price", "clause"), option(0.4, "", "price")],
        "price": [
            option(0.7, " for ${price}0", "budget"),
            option(0.3, " and can spend ${budget}0 but it costs ${price}0.", "trip"),
        ],
        "budget": [option(0.6, " but have only ${budget}0.", "trip", "clause"), option(0.4, ".", "trip")],
        "trip": [option(0.5, " I will take it to {trip}.", "end", "clause"), option(0.5, "", "end")],
        **endings(" Worth it?", " Please advise.", " Opinions?"),
    },
)

SCENARIOS = together(JOB, INJURY, CAMERA)
