"""Clients come and go: does the server stay as it was?

    python docs/cpu/soak.py --model smollm2-135m --minutes 30

A fifth of the clients leave in the middle of their answers. Each minute a line tells the server's memory, threads and
open files, and what its figures say is under way; at the end all of it must be back where it was after the first
minute. Then the server is killed (kill -9) in the middle of its work, and another one on the same port must serve; that
one is ended by SIGTERM in the middle of an answer, which must come whole, with exit code 0.
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


class Served:
    """A server in a process of its own."""

    def __init__(self, args, port: int = 0):
        command = [sys.executable, "-m", "paceline.spec.cli", "serve", "--model", args.model, "--drafter", args.drafter]
        command += ["--port", str(port), "--max-rows", "4", "--room", "512", "--prefix-megabytes", "64"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = next((line for line in self.process.stderr if line.startswith("serving ")), None)
        if line is None:
            raise SystemExit("the server has ended before it began")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.port = int(line.partition("/v1")[0].rpartition(":")[2])

    def ask(self, draw: random.Random, new_tokens: int, leave: bool = False) -> str:
        """Ask, and read all of the answer, or leave after some of it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        prompt = [200 + draw.randrange(20_000) for _ in range(draw.randint(1, 200))]
        body = {
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": draw.choice((0, 0.8)),
            "stream": draw.random() < 0.7,
        }
        connection.request("POST", "/v1/completions", json.dumps(body | {"ignore_eos": True}))
        if leave:
            time.sleep(draw.random())
            connection.close()
            return ""
        reply = connection.getresponse()
        said = reply.read().decode()
        connection.close()
        if reply.status not in (200, 429, 503):
            raise SystemExit(f"{reply.status}: {said}")
        return said

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
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=6)
    args = parser.parse_args()
    served, over = Served(args), threading.Event()

    def client(number: int) -> None:
        draw = random.Random(number)
        while not over.is_set():
            served.ask(draw, draw.randint(1, 100), leave=draw.random() < 0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(args.clients)]
    for thread in threads:
        thread.start()
    began, states = time.monotonic(), []
    while time.monotonic() - began < 60 * args.minutes:
        time.sleep(min(60.0, 12 * args.minutes))
        states.append(served.state())
        print(json.dumps(states[-1]), flush=True)
    over.set()
    for thread in threads:
        thread.join()
    time.sleep(2)
    last, first = served.state(), states[0]
    print(json.dumps({"at the end": last}), flush=True)
    assert last["under way"] == 0 and last["files"] <= first["files"] and last["threads"] <= first["threads"] + 1
    assert last["megabytes"] <= 1.1 * first["megabytes"] + 64, "memory grows"

    draw = random.Random(0)
    threading.Thread(target=lambda: _quietly(served.ask, draw, 300), daemon=True).start()
    time.sleep(1)
    served.process.kill()
    served.process.wait(30)
    again, answers = Served(args, served.port), []
    asking = threading.Thread(target=lambda: answers.append(again.ask(random.Random(1), 150)))
    asking.start()
    time.sleep(1)
    again.process.send_signal(signal.SIGTERM)
    asking.join(60)
    assert (
        again.process.wait(60) == 0 and answers and ('"finish_reason": "length"' in answers[0].replace('":"', '": "'))
    )
    print("flat, and it ends as it should")


def _quietly(function, *arguments) -> None:
    with contextlib.suppress(OSError):  # the server was killed
        function(*arguments)


if __name__ == "__main__":
    main()
