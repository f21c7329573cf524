"""A server of the toy model in this process, on a port of its own."""

import asyncio
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from argparse import Namespace

import torch
from paceline.drafters.ngram import NgramDrafter
from paceline.spec.serve.app import make_app
from paceline.spec.serve.command import assemble, make_server
from paceline.spec.serve.figures import Figures
from paceline.spec.serve.serving import Serving
from paceline.spec.serve.text_request import TextRequest
from serve.playing import alone, letters, toy

TEMPLATE = "{% for m in messages %}{{ m['role'][:1] + m['content'] }}{% endfor %}A"
OPTIONS = dict(
    max_rows=4, room=64, prefill_chunk=4, executor="eager", tree="2x1", max_tokens=20, queue=8, queue_seconds=5.0,
    prefix_megabytes=1.0,
)  # fmt: skip


def chatting():
    """Letters, with a chat template."""
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def serving_of(keys=(), **options):
    """What the endpoints share, its worker not started."""
    model, tokenizer, figures = toy(), chatting(), Figures("toy")
    args = Namespace(**{**OPTIONS, **options})
    worker, limits, about = assemble(args, model, tokenizer, NgramDrafter(), figures)
    return Serving(model, tokenizer, worker, limits, figures, keys, about)


@contextlib.contextmanager
def listening(serving, turn_seconds=0.0):
    """The address of `serving`, each of whose turns takes so long at least."""
    scheduler = serving.worker.scheduler
    tick = scheduler.tick

    def slow():
        tick()
        time.sleep(turn_seconds)

    scheduler.tick = slow
    ready, kept = threading.Event(), {}

    async def main():
        kept["server"] = server = make_server(serving, make_app(serving), "127.0.0.1", 0)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.002)
        kept["port"] = server.servers[0].sockets[0].getsockname()[1]
        ready.set()
        await task

    threads = torch.get_num_threads()
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    serving.worker.start()
    thread.start()
    try:
        assert ready.wait(20)
        yield f"http://127.0.0.1:{kept['port']}"
    finally:
        kept["server"].should_exit = True
        thread.join(20)
        assert serving.worker.close(20)
        torch.set_num_threads(threads)
        assert not thread.is_alive()


CONTENTED = dict(model="toy", messages=[dict(role="user", content="@IU")], max_tokens=12, seed=3)


def truth(model, content, new_tokens=12, **settings):
    """What a message gives alone: tokens, text, reason."""
    prompt = chatting().apply_chat_template([dict(role="user", content=content)], return_dict=True)["input_ids"]
    asked = TextRequest(prompt=prompt, max_new_tokens=new_tokens, **{"temperature": 1.0, **settings}).checked()
    return alone(model, asked, letters())


def ask(url, body, path="/v1/chat/completions", headers=None):
    """Status and body of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
