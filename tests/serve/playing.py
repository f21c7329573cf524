"""Serving on a toy model: the slow reference, random requests, and schedules of them."""

import random
from functools import cache

import torch
from paceline.spec.noise import stream_key
from paceline.spec.serve.gears import Gears
from paceline.spec.serve.lanes import Lane
from paceline.spec.serve.many import make_job
from paceline.spec.serve.scheduler import Scheduler
from paceline.spec.serve.text_request import TextRequest
from paceline.spec.tree import TreeShape
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation import logits_process as hf

from support.models import tiny_llama
from support.reference import plain_draw

ENDS = (17, 23)
LETTERS = [chr(33 + number) for number in range(61)]  # a token is a letter
ROOM, CHUNK = 48, 4


def letters():
    """A tokenizer whose tokens are single letters, with nothing between them."""
    made = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token="!"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="!")


def toy():
    """One layer of attention, ends of text now and then."""
    made = tiny_llama(seed=3, num_hidden_layers=1)
    made.generation_config.eos_token_id = list(ENDS)
    return made


@torch.no_grad()
def alone(model, asked: TextRequest, tokenizer=None):
    """The slow and obvious reference: a request by itself, one forward of the whole text for each token, no cache, no
    batch, no tree. Returns its tokens, its text and why it ended."""
    tokens, ends = list(asked.prompt), ENDS if asked.end_ids is None else asked.end_ids
    for _ in range(asked.max_new_tokens):
        new, ids = tokens[len(asked.prompt) :], torch.tensor([tokens])
        scores = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        for token, value in asked.logit_bias.items():
            scores[0, token] += value
        scores = hf.RepetitionPenaltyLogitsProcessor(float(asked.repetition_penalty))(ids, scores)
        for token in set(new):
            scores[0, token] -= asked.presence_penalty + asked.frequency_penalty * new.count(token)
        if asked.temperature > 0:
            warpers = [hf.TemperatureLogitsWarper(float(asked.temperature))]
            warpers += [hf.TopKLogitsWarper(asked.top_k)] if asked.top_k else []
            warpers += [hf.TopPLogitsWarper(asked.top_p)] if asked.top_p < 1 else []
            warpers += [hf.MinPLogitsWarper(asked.min_p)] if asked.min_p else []
            for warper in warpers:
                scores = warper(ids, scores)
            token = plain_draw(scores[0], torch.tensor(stream_key(asked.seed, asked.choice)), len(tokens))
        else:
            token = int(scores.argmax())
        tokens.append(token)
        new = tokens[len(asked.prompt) :]
        said = new[:-1] if token in ends else new
        text = None if tokenizer is None else tokenizer.decode(said, skip_special_tokens=True)
        if token in ends:
            return new, text, "stop"
        if stops := [text.find(stop) for stop in asked.stop if stop in text]:
            return new, text[: min(stops)], "stop"
    return new, text, "length"


def random_request(draw: random.Random) -> TextRequest:
    """One of every kind of request."""
    length = draw.choice((1, 2, 3, 5, 8, 9, 14))
    prompt = [draw.randrange(30, 61) for _ in range(length)]
    prompt[length // 2 :] = prompt[: length - length // 2]  # something to look up
    sampled = draw.random() < 0.6
    return TextRequest(
        prompt=prompt,
        max_new_tokens=draw.choice((1, 2, 5, 9, 14)),
        temperature=draw.choice((0.5, 0.9, 1.4)) if sampled else 0.0,
        top_k=draw.choice((0, 0, 3, 80)),
        top_p=draw.choice((1.0, 1.0, 0.8)),
        min_p=draw.choice((0.0, 0.0, 0.05)),
        repetition_penalty=draw.choice((1.0, 1.0, 1.3)),
        presence_penalty=draw.choice((0.0, 0.0, 0.7)),
        frequency_penalty=draw.choice((0.0, 0.0, -0.4)),
        logit_bias=draw.choice(({}, {}, {40: 2.0, 41: -9.0})),
        seed=draw.randrange(5),
        choice=draw.choice((0, 0, 1, 2)),
        stop=draw.choice(((), (), (LETTERS[35] + LETTERS[44], LETTERS[52]))),
        end_ids=draw.choice((None, None, (), (31, 45))),
        tenant=draw.choice(("", "a", "b")),
    )


@cache
def pool(size=48, seed=5):
    """Requests, each with what it gives alone."""
    model, tokenizer, draw = toy(), letters(), random.Random(seed)
    requests = [random_request(draw).checked() for _ in range(size)]
    return [(asked, alone(model, asked, tokenizer)) for asked in requests]


def scheduler_of(model, drafter, plan, rows=4, chunk=CHUNK, lanes=2, room=ROOM, **more):
    """As the server has it: lanes of one row each."""
    if isinstance(plan, str):
        shape = TreeShape.parse(plan)
        plan = lambda rows: shape  # noqa: E731
    gears = Gears(model, drafter, room, rows, chunk)
    made = [Lane(gears.lane_engine(1, plan(1)), chunk) for _ in range(lanes)]
    return Scheduler(gears, made, plan, **more)


class Play:
    """A schedule from one number: which requests come when, which are aborted when, and what came of each. Aborted
    ones must be a beginning of their text, and all others whole."""

    def __init__(self, model, scheduler, seed, jobs=6):
        draw = random.Random(seed)
        self.scheduler, self.endings = scheduler, []
        tokenizer, self.chosen = letters(), [draw.choice(pool()) for _ in range(draw.randint(1, jobs))]
        self.jobs = [make_job(model, tokenizer, asked, self._listen) for asked, _ in self.chosen]
        self.arrivals = sorted(draw.choice((0, 0, 1, draw.randrange(20))) for _ in self.jobs)
        self.aborts = [draw.randrange(30) if draw.random() < 0.25 else None for _ in self.jobs]
        self.seen = {id(job): 0 for job in self.jobs}

    def _listen(self, job):
        assert len(job.tokens) >= self.seen[id(job)], "no token is taken back"
        self.seen[id(job)] = len(job.tokens)
        if job.phase == "ended":
            self.endings.append(job)

    @torch.no_grad()
    def run(self):
        for turn in range(400):
            for job, arrival, abort in zip(self.jobs, self.arrivals, self.aborts):
                if arrival == turn:
                    self.scheduler.submit(job)
                if abort is not None and abort == turn and arrival <= turn:
                    self.scheduler.cancel(job)
            self.scheduler.tick()
            if turn > max(self.arrivals) and self.scheduler.idle:
                break
        assert self.scheduler.idle and not self.scheduler.live
        return self

    def faults(self):
        """What is not as it would be alone."""
        wrong = []
        if sorted(map(id, self.endings)) != sorted(map(id, self.jobs)):
            wrong.append("not every job ended once")
        for job, (_, (tokens, text, reason)) in zip(self.jobs, self.chosen):
            if job.reason == "abort":
                good = job.tokens == tokens[: len(job.tokens)]
            else:
                good = (job.tokens, job.text, job.reason) == (tokens, text, reason)
            if not good:
                wrong.append((job.asked, job.reason, job.tokens, tokens))
        return wrong
