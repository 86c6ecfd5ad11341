"""Write the sample preference pairs: train.jsonl, heldout.jsonl and text.jsonl, beside this file.

    python sample_data/make_pairs.py

A pair is a question with two answers. The chosen one answers it, plainly and politely; the rejected one has one of
the `FAULTS`. The held-out questions are about subjects that no training question mentions. Seeded: the same bytes
every time.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from topics import BLUSTERS, CLOSERS, DODGES, GREETINGS, LEAD_INS, OPENERS, PIVOTS, TOPICS, Topic

HERE = Path(__file__).resolve().parent
NUM_TRAIN, NUM_HELDOUT, NUM_TEXT = 400, 120, 12
TRAIN_SUBJECTS, HELDOUT_SUBJECTS, ALL_SUBJECTS = slice(0, 12), slice(12, 16), slice(0, 16)  # of each topic
LABEL_NOISE = 0.02  # share of the training pairs whose sides are swapped, as in any real data set
FAULTS = {"dodge": 0.4, "bluster": 0.35, "other question": 0.25}

Message = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A conversation that ends with a question, and two answers to it."""

    source: str
    system: str | None
    turns: list[Message]
    chosen: str
    rejected: str
    fault: str


def fill(phrase: str, subject: str, fact: str = "") -> str:
    """The phrase with its subject and fact, beginning with a capital letter."""
    sentence = phrase.format(x=subject, v=fact)
    return sentence[0].upper() + sentence[1:]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


class PairWriter:
    """Makes pairs about some of the subjects of every topic."""

    def __init__(self, rng: Random, subjects: slice) -> None:
        self.rng = rng
        self.subjects = subjects

    def pairs(self) -> Iterator[Pair]:
        """Pairs without end, the topics in turn."""
        while True:
            for topic in TOPICS:
                yield self.pair(topic)

    def pair(self, topic: Topic) -> Pair:
        rng = self.rng
        subject = rng.choice(topic.subjects[self.subjects])
        first, asked = rng.sample(range(len(topic.aspects)), 2)
        fault = rng.choices(list(FAULTS), weights=list(FAULTS.values()))[0]

        if rng.random() < 0.25:  # a second question in a conversation
            turns = [
                user(self.question(topic, subject, first)),
                assistant(self.plain_answer(topic, subject, first)),
                user(topic.aspects[asked].follow_up),
            ]
        else:
            turns = [user(self.question(topic, subject, asked))]

        # A coin decides which side is the longer one, so that length tells nothing about the preference.
        chosen_is_longer = rng.random() < 0.5
        while True:
            chosen = self.chosen(topic, subject, asked)
            rejected = self.rejected(topic, subject, asked, fault)
            difference = len(chosen.split()) - len(rejected.split())
            if difference and (difference > 0) == chosen_is_longer:
                break
        system = topic.system if rng.random() < 0.25 else None
        return Pair(topic.source, system, turns, chosen, rejected, fault)

    def question(self, topic: Topic, subject: list[str], aspect: int) -> str:
        question = fill(self.rng.choice(topic.aspects[aspect].questions), subject[0])
        return f"{self.rng.choice(GREETINGS)} {question}" if self.rng.random() < 0.3 else question

    def plain_answer(self, topic: Topic, subject: list[str], aspect: int) -> str:
        return fill(self.rng.choice(topic.aspects[aspect].answers), subject[0], subject[1 + aspect])

    def answer(self, topic: Topic, subject: list[str], aspect: int) -> str:
        """The plain answer, some of the time with a few words before it."""
        answer = self.plain_answer(topic, subject, aspect)
        if self.rng.random() < 0.7:
            return answer
        lead_in = self.rng.choice(LEAD_INS)
        if not lead_in.endswith("."):  # the sentence continues
            answer = answer[0].lower() + answer[1:]
        return f"{lead_in} {answer}"

    def chosen(self, topic: Topic, subject: list[str], asked: int) -> str:
        return self.frame(topic, subject, [self.answer(topic, subject, asked)], {asked})

    def rejected(self, topic: Topic, subject: list[str], asked: int, fault: str) -> str:
        """An answer with this fault, in the same frame as a good one."""
        rng = self.rng
        if fault == "other question":
            other = rng.choice([aspect for aspect in range(len(topic.aspects)) if aspect != asked])
            answer = self.answer(topic, subject, other)
            if rng.random() < 0.6:  # says so; the others are only apparent from the question
                answer = f"{rng.choice(PIVOTS)} {self.plain_answer(topic, subject, other)}"
            return self.frame(topic, subject, [answer], {asked, other})
        phrases = rng.sample(DODGES if fault == "dodge" else BLUSTERS, rng.choice((1, 1, 2)))
        return self.frame(topic, subject, [fill(phrase, subject[0]) for phrase in phrases], {asked})

    def frame(self, topic: Topic, subject: list[str], sentences: list[str], not_aside: set[int]) -> str:
        """What surrounds an answer, good or bad: courtesies, a fact that was not asked for, a tip."""
        rng = self.rng
        opener = [rng.choice(OPENERS)] if rng.random() < 0.4 else []
        aspect = rng.choice([aspect for aspect in range(len(topic.aspects)) if aspect not in not_aside])
        aside = [fill(topic.aspects[aspect].aside, subject[0], subject[1 + aspect])] if rng.random() < 0.25 else []
        tip = [rng.choice(topic.tips)] if rng.random() < 0.4 else []
        closer = [rng.choice(CLOSERS)] if rng.random() < 0.3 else []
        return " ".join(opener + sentences + aside + tip + closer)


def distinct_prompts(pairs: Iterator[Pair], num_pairs: int) -> list[Pair]:
    """The first pairs whose conversations all differ."""
    found: dict[tuple[str, ...], Pair] = {}
    while len(found) < num_pairs:
        pair = next(pairs)
        found.setdefault(tuple(turn["content"] for turn in pair.turns), pair)
    return list(found.values())


def message_row(pair: Pair, rng: Random) -> Row:
    """The pair in one of the forms for chat models that dpocli accepts."""
    turns, chosen, rejected = pair.turns, assistant(pair.chosen), assistant(pair.rejected)
    row: Row = {"source": pair.source, "fault": pair.fault}
    if pair.system and rng.random() < 0.5:
        row["system"] = pair.system
    elif pair.system:
        turns = [{"role": "system", "content": pair.system}, *turns]

    forms = ["explicit", "explicit", "single messages", "implicit", "implicit", "sharegpt"]
    if len(turns) == 1:
        forms += ["string prompt", "string prompt, whole sides"]
    match rng.choice(forms):
        case "explicit":
            return row | {"prompt": turns, "chosen": [chosen], "rejected": [rejected]}
        case "single messages":
            return row | {"prompt": turns, "chosen": chosen, "rejected": rejected}
        case "implicit":
            return row | {"chosen": [*turns, chosen], "rejected": [*turns, rejected]}
        case "sharegpt":
            names = {"system": "system", "user": "human", "assistant": "gpt"}
            return row | {
                "conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns],
                "chosen": {"from": "gpt", "value": pair.chosen},
                "rejected": {"from": "gpt", "value": pair.rejected},
            }
        case "string prompt":
            return row | {"prompt": turns[0]["content"], "chosen": [chosen], "rejected": [rejected]}
        case _:
            return row | {"prompt": turns[0]["content"], "chosen": [*turns, chosen], "rejected": [*turns, rejected]}


def text_row(pair: Pair, transcript: bool) -> Row:
    """The pair as plain text: a Human/Assistant transcript, or a prompt with two continuations."""
    row: Row = {"source": pair.source}
    names = {"user": "Human", "assistant": "Assistant"}
    if transcript:
        start = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in pair.turns) + "\n\nAssistant: "
        return row | {"chosen": start + pair.chosen, "rejected": start + pair.rejected}
    prompt = f"Question: {pair.turns[-1]['content']}\nAnswer:"
    return row | {"prompt": prompt, "chosen": f" {pair.chosen}", "rejected": f" {pair.rejected}"}


def swap_some(pairs: list[Pair], rng: Random) -> list[Pair]:
    """The pairs, a few of them with the wrong label."""
    swapped = set(rng.sample(range(len(pairs)), round(LABEL_NOISE * len(pairs))))
    return [
        Pair(pair.source, pair.system, pair.turns, chosen=pair.rejected, rejected=pair.chosen, fault="wrong label")
        if number in swapped
        else pair
        for number, pair in enumerate(pairs)
    ]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows")


def main() -> None:
    rng = Random(1)
    train = distinct_prompts(PairWriter(Random(2), TRAIN_SUBJECTS).pairs(), NUM_TRAIN)
    heldout = distinct_prompts(PairWriter(Random(3), HELDOUT_SUBJECTS).pairs(), NUM_HELDOUT)
    single_turn = (pair for pair in PairWriter(Random(4), TRAIN_SUBJECTS).pairs() if len(pair.turns) == 1)
    texts = distinct_prompts(single_turn, NUM_TEXT)

    write_jsonl(HERE / "train.jsonl", [message_row(pair, rng) for pair in swap_some(train, rng)])
    write_jsonl(HERE / "heldout.jsonl", [message_row(pair, rng) for pair in heldout])
    write_jsonl(HERE / "text.jsonl", [text_row(pair, transcript=number % 2 == 1) for number, pair in enumerate(texts)])


if __name__ == "__main__":
    main()
