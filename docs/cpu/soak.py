"""Clients come and go: does the server stay as it was, and is every answer what the request gets alone?

    python docs/cpu/soak.py --model smollm2-135m --minutes 30

Clients draw from a few prompts, half of them greedy and half sampled with a seed. What each gives alone is asked first,
of a server that does nothing else; under load each answer that comes whole must be a beginning of that, and at the end
each is asked alone again. A fifth of the clients leave in the middle of their answers.

Each minute a line tells the server's memory, threads and open files, and what its figures say is under way; at the end
all of it must be back where it was after the first minute. Then the server is killed (kill -9) in the middle of its
work, and another one on the same port must serve; that one is ended by SIGTERM in the middle of an answer, which must
come whole, with exit code 0.
"""

import argparse
import contextlib
import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time

import psutil

REQUESTS, LONGEST = 16, 100  # different ones, and the most new tokens of each


def asked(which: int) -> dict:
    """A prompt, greedy if `which` is even, else sampled with a seed."""
    draw = random.Random(which)
    prompt = [200 + draw.randrange(20_000) for _ in range(draw.randint(1, 200))]
    return {"prompt": prompt, "temperature": 0.8 * (which % 2), "seed": which}


class Served:
    """A server in a process of its own."""

    def __init__(self, args, port: int = 0):
        command = [sys.executable, "-m", "paceline.spec.cli", "serve", "--model", args.model, "--drafter", args.drafter]
        command += ["--port", str(port), "--max-rows", "4", "--room", "512", "--prefix-megabytes", "64"]
        command += ["--dtype", args.dtype]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = next((line for line in self.process.stderr if line.startswith("serving ")), None)
        if line is None:
            raise SystemExit("the server has ended before it began")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.port = int(line.partition("/v1")[0].rpartition(":")[2])

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *raised: object) -> None:
        """Kill it (kill -9), if it has not ended."""
        self.process.kill()
        self.process.wait(30)

    def ask(self, which: int, new_tokens: int, stream: bool = False, leave: float | None = None) -> str | None:
        """The text of a request, one of `REQUESTS`; None where the client leaves after so many seconds, and where the
        server has no room for it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        body = asked(which) | {"max_tokens": new_tokens, "stream": stream, "ignore_eos": True}
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        connection.request("POST", "/v1/completions", json.dumps(body))
        if leave is not None:
            time.sleep(leave)
            connection.close()
            return None
        reply = connection.getresponse()
        said = reply.read().decode()
        connection.close()
        if reply.status in (429, 503):
            return None
        if reply.status != 200:
            raise RuntimeError(f"{reply.status}: {said}")
        lines = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: {")]
        events = [json.loads(part) for part in (lines if stream else [said])]
        if (count := events[-1]["usage"]["completion_tokens"]) != new_tokens:
            raise RuntimeError(f"{count} tokens in place of {new_tokens}")
        return "".join(choice["text"] for event in events for choice in event["choices"])

    def figure(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))

    def state(self) -> dict:
        process = psutil.Process(self.process.pid)
        under_way = [self.figure(f"vllm:num_requests_{kind}") for kind in ("running", "waiting")]
        return {
            "megabytes": round(process.memory_info().rss / 1e6),
            "threads": process.num_threads(),
            "files": process.num_fds(),
            "under way": sum(under_way),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="ngram")
    parser.add_argument("--dtype", default="float32", help="in bfloat16 near-ties may fall the other way")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6)
    args = parser.parse_args()
    with Served(args) as served:
        alone = [served.ask(which, LONGEST) for which in range(REQUESTS)]
        come_and_go(served, alone, args.minutes, args.clients)
        threading.Thread(target=lambda: _quietly(served.ask, 0, 300), daemon=True).start()
        time.sleep(1)
    with Served(args, served.port) as again:  # the first one was killed
        answers: list[str | None] = []
        asking = threading.Thread(target=lambda: answers.append(again.ask(0, LONGEST)))
        asking.start()
        time.sleep(1)
        again.process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert again.process.wait(60) == 0 and answers == [alone[0]]
    print("flat, and it ends as it should")


def come_and_go(served: Served, alone: list[str | None], minutes: float, clients: int) -> None:
    """Let clients ask for so long, and compare their answers with those `alone`, and the server with what it was."""
    over, wrong, compared = threading.Event(), [], []

    def client(number: int) -> None:
        draw = random.Random(number)
        while not over.is_set():
            which, new_tokens = draw.randrange(REQUESTS), draw.randint(1, LONGEST)
            leave = draw.random() if draw.random() < 0.2 else None
            try:
                text = served.ask(which, new_tokens, draw.random() < 0.7, leave)
            except Exception as error:  # refused, cut short, or an event that tells an error
                wrong.append((which, new_tokens, repr(error)))
                return
            if text is not None:
                compared.append(which)
                # An incomplete character at the end is told as such.
                if not alone[which].startswith(text.rstrip("\ufffd")):
                    wrong.append((which, new_tokens, text))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    began, states = time.monotonic(), []
    while time.monotonic() - began < 60 * minutes:
        time.sleep(min(60.0, 12 * minutes))
        states.append(served.state())
        print(json.dumps(states[-1]), flush=True)
    over.set()
    for thread in threads:
        thread.join()
    time.sleep(2)
    wrong += [which for which in range(REQUESTS) if served.ask(which, LONGEST) != alone[which]]
    print(f"{len(compared)} answers were compared with those alone; {len(wrong)} differ", flush=True)
    last, first = served.state(), states[0]
    print(json.dumps({"at the end": last}), flush=True)
    assert compared and not wrong, wrong[:3]
    assert last["under way"] == 0 and last["files"] <= first["files"] and last["threads"] <= first["threads"] + 1
    assert last["megabytes"] <= 1.1 * first["megabytes"] + 64, "memory grows"


def _quietly(function, *arguments) -> None:
    with contextlib.suppress(OSError):  # the server was killed
        function(*arguments)


if __name__ == "__main__":
    main()
