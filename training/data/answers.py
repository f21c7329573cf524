"""Self-distillation: the target answers prompts, with this project's batched decoding (`decode_texts`).

An answer depends on the prompt, temperature, seed and settings only, not on the order of jobs, the batch or whether the
run was killed and resumed (up to near-ties in low precision). Knows nothing of training.
"""

from dataclasses import dataclass, field

from ...spec.console import Bar
from ...spec.data.content import Unfit
from ...spec.prompts import check_ids, templated_ids
from ...spec.serve.texts import Text, decode_texts
from ...spec.target.load import context_length, end_ids
from .ledger import Job, Ledger, job_seed
from .prompts import Prompt, Unusable, user_prefix

SLACK = 16  # extra tokens allowed per turn, as tokenizing its text again may give more


@dataclass(frozen=True, slots=True)
class Sampling:
    top_p: float
    max_new_tokens: int
    seed: int


@dataclass(slots=True, eq=False)
class Conversation:
    """The conversation of a job so far."""

    job: Job
    messages: list[dict]
    token_ids: list[list[int]] = field(default_factory=list)  # of each answer
    finished: bool = True

    @classmethod
    def begin(cls, job: Job) -> "Conversation":
        system = [] if job.prompt.system is None else [{"role": "system", "content": job.prompt.system}]
        return cls(job, [*system, {"role": "user", "content": job.prompt.turns[0]}])

    def record(self, sampling: Sampling) -> dict:
        return {
            "id": self.job.id,
            "messages": self.messages,
            "source": self.job.prompt.source,
            "temperature": self.job.temperature,
            "top_p": sampling.top_p,
            "seed": self.job.seed,
            "finished": self.finished,
            "tokens": sum(map(len, self.token_ids)),
            "token_ids": self.token_ids,
        }


def check_template(tokenizer) -> None:
    """Raise ValueError for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template, so there is nothing to answer in; use an instruct model")


class Answering:
    """Turns jobs into texts for `decode_texts` and its results into records."""

    def __init__(self, model, tokenizer, ledger: Ledger, sampling: Sampling):
        self.model, self.tokenizer, self.ledger, self.sampling = model, tokenizer, ledger, sampling
        self.context = context_length(model) or 1 << 30
        self.ends = end_ids(model)

    def texts(self, jobs: list[Job]) -> list[Text]:
        """The jobs' first turns as texts to decode; jobs that do not fit into the context are skipped."""
        made = []
        for job in jobs:
            conversation = Conversation.begin(job)
            try:
                tokens = self._ids(conversation.messages)
                room = self._room(job, len(tokens))
            except Unfit as error:
                self.ledger.skip(job.id, str(error))
                continue
            if room > self.context:
                reason = f"{room} tokens with the answers, and the model's context is {self.context}"
                self.ledger.skip(job.id, reason)
                continue
            made.append(Text(tokens, self.sampling.max_new_tokens, job.seed, room, conversation))
        return made

    def _ids(self, messages: list[dict]) -> list[int]:
        """Raises Unfit for messages that the template does not take, and for ids that the model does not know."""
        ids = templated_ids(self.tokenizer, messages)
        check_ids(ids, self.model)
        return ids

    def _room(self, job: Job, first: int) -> int:
        """The most tokens that the whole conversation can have."""
        room = first + self.sampling.max_new_tokens
        for turn in job.prompt.turns[1:]:
            room += len(self._ids([{"role": "user", "content": turn}])) + self.sampling.max_new_tokens + SLACK
        return room

    def finish(self, text: Text, tokens: list[int], failed: bool) -> Text | None:
        """Add an answer to its conversation; returns the text of the next turn, if there is one."""
        conversation: Conversation = text.name
        if failed:
            self.ledger.fail(conversation.job.id, f"the scores after {len(tokens)} tokens are NaN")
            return None
        conversation.finished = bool(tokens) and tokens[-1] in self.ends
        answer = self.tokenizer.decode(tokens[:-1] if conversation.finished else tokens, skip_special_tokens=True)
        conversation.messages.append({"role": "assistant", "content": answer})
        conversation.token_ids.append(tokens)
        turns = conversation.job.prompt.turns
        if conversation.finished and len(conversation.token_ids) < len(turns):
            messages = [*conversation.messages, {"role": "user", "content": turns[len(conversation.token_ids)]}]
            try:
                ids = self._ids(messages)
            except Unfit:  # of a template that takes the turn alone but not here
                ids = []
            if ids and len(ids) + self.sampling.max_new_tokens <= text.room:
                conversation.messages = messages
                return Text(ids, self.sampling.max_new_tokens, text.seed, text.room, conversation)
        self.ledger.add(conversation.record(self.sampling))
        return None


def answer(model, tokenizer, jobs: list[Job], ledger: Ledger, sampling: Sampling, **decoding) -> None:
    """Answer all jobs, one temperature after the other; `decoding` is handed to `decode_texts`."""
    answering = Answering(model, tokenizer, ledger, sampling)
    for temperature in dict.fromkeys(job.temperature for job in jobs):
        texts = answering.texts([job for job in jobs if job.temperature == temperature])
        sampled = {"temperature": temperature, "top_p": sampling.top_p}
        calls = {"progress": ledger.progress, "enough": lambda: ledger.full}
        decode_texts(model, texts, answering.finish, **sampled, **calls, **decoding)


def invent(
    model, tokenizer, ledger: Ledger, beginnings: list[str], count: int, sampling: Sampling, **decoding
) -> list[Prompt | Unusable]:
    """`count` user turns written by the target itself after the user prefix of its chat template (Magpie,
    arXiv:2406.08464). `beginnings` are used in rotation as their first words; "" leaves the turn to the target.

    The turns are kept in the ledger, from which a killed run resumes. Empty or unfinished ones are unusable."""
    prefix = user_prefix(tokenizer)
    begun = [tokenizer(prefix + beginning, add_special_tokens=False)["input_ids"] for beginning in beginnings]
    ends = end_ids(model)
    with Bar(total=count, unit="turn", desc="inventing") as bar:
        turns = {record["id"]: record for record in ledger.turns.records if record["id"] < count}
        bar.update(len(turns))

        def finish(text: Text, new: list[int], failed: bool) -> None:
            ended = bool(new) and new[-1] in ends and not failed
            said = _said(tokenizer, text.tokens, new[:-1]) if ended else ""
            turn = (beginnings[text.name % len(beginnings)] + said).strip() if said.strip() else ""
            turns[text.name] = {"id": text.name, "turn": turn, "ended": ended}
            ledger.add_turn(turns[text.name])
            bar.update()

        room = max(map(len, begun)) + sampling.max_new_tokens
        seeds = [job_seed(sampling.seed, f"self/{number}") for number in range(count)]
        texts = [
            Text(begun[number % len(begun)], sampling.max_new_tokens, seeds[number], room, number)
            for number in range(count)
            if number not in turns
        ]
        decode_texts(model, texts, finish, temperature=1.0, top_p=sampling.top_p, **decoding)
    return [_invented(turns[number]) for number in range(count)]


def _said(tokenizer, before: list[int], tokens: list[int]) -> str:
    """The text of `tokens` after `before`, leading space included (which some tokenizers drop at a text's start)."""
    whole, first = (tokenizer.decode(ids, skip_special_tokens=True) for ids in ([*before, *tokens], before))
    return whole[len(first) :]


def _invented(record: dict) -> Prompt | Unusable:
    if record["turn"]:
        return Prompt((record["turn"],), None, "self")
    reason = "the invented turn is empty" if record["ended"] else "the invented turn does not end"
    return Unusable(f"self:{record['id'] + 1}", reason)
