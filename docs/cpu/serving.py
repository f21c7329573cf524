"""What `paceline serve` gives on this machine, beside `generate()` and beside itself without drafts.

    python docs/cpu/serving.py --model smollm2-135m --drafter auto -o serving.json

Clients are threads that stream answers of --new-tokens tokens to prompts of some 100 tokens, one after another.
Reported are tokens a second of 1 and of --clients clients with drafts and without (each a server of its own, in turns),
`generate()` on the same prompts in this process, the time to the first token of 4 clients, and how many turns a row
stays taken after its client has gone.
"""

import argparse
import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import paceline
import torch

SUBJECTS = ["a river", "a clock", "an island", "winter", "a train", "bread", "a lamp", "the sea", "a garden", "glass"]


@contextlib.contextmanager
def server(args, drafter: str):
    """The port of a server of its own."""
    command = [sys.executable, "-m", "paceline.spec.cli", "serve", "--model", args.model, "--drafter", drafter]
    command += ["--port", "0", "--max-rows", str(args.clients), "--room", "512", "--dtype", args.dtype]
    command += ["--executor", args.executor, "--prefix-megabytes", "0"]
    if drafter != "none" and args.tree:
        command += ["--tree", args.tree]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if line.startswith("serving "):
                    break
            else:
                raise SystemExit(f"the server has ended: {' '.join(command)}")
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield int(line.partition("/v1")[0].rpartition(":")[2])
        finally:
            process.terminate()
            process.wait(60)


def chat(number: int) -> str:
    """What a client says: some 100 tokens with SmolLM2's chat template, no two alike."""
    subject, other = SUBJECTS[number % len(SUBJECTS)], SUBJECTS[(number * 5 + 1) % len(SUBJECTS)]
    return (
        f"Story number {number}. Please write a long and detailed story about {subject} and {other}. Tell who the "
        "people are, where they come from, what they want, and what stands in their way; describe the weather and town "
        "and the sounds of its streets, and let the story go on for many pages before it comes to its end."
    )


def prompt(args, number: int) -> list[int]:
    """Token ids of a chat."""
    said = [{"role": "user", "content": chat(number)}]
    return list(args.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False))


def stream(port: int, body: dict):
    """The seconds at which each event of an answer came, with what it said."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps({**body, "stream": True}))
    reply = connection.getresponse()
    if reply.status != 200:
        raise RuntimeError(reply.read().decode())
    for line in reply:
        if line.startswith(b"data: {"):
            yield time.perf_counter() - started, json.loads(line[6:])
    connection.close()


def asked(args, number: int) -> dict:
    more = {
        "temperature": 0,
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    return {"prompt": prompt(args, number), "max_tokens": args.new_tokens, **more}


def load(args, port: int, clients: int, each: int, first: int = 0) -> dict:
    """`clients` threads with `each` requests one after another."""

    def client(index: int) -> list[tuple[float, int]]:
        """Seconds to the first token, and how many there are, of each answer."""
        answers = [list(stream(port, asked(args, first + index * each + turn))) for turn in range(each)]
        return [
            (
                next(seconds for seconds, event in events if event["usage"]["completion_tokens"]),
                events[-1][1]["usage"]["completion_tokens"],
            )
            for events in answers
        ]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        told = [answer for answers in threads.map(client, range(clients)) for answer in answers]
    seconds, firsts = time.perf_counter() - began, sorted(each for each, _ in told)
    return {
        "clients": clients,
        "tokens_per_second": sum(count for _, count in told) / seconds,
        "first_token_median": statistics.median(firsts),
        "first_token_p95": firsts[max(0, -(-95 * len(firsts) // 100) - 1)],
        "tokens": sum(count for _, count in told),
    }


def figure(port: int, name: str) -> float:
    """A figure of the server, summed over its labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def steps_after_leaving(args, port: int) -> float:
    """Steps of the batch between a client's going and the end of its row's work."""
    events = stream(port, {**asked(args, 9999), "max_tokens": 300})
    for _ in range(5):
        next(events)
    before = figure(port, "vllm:iteration_tokens_total_count")
    events.close()
    time.sleep(2)
    return figure(port, "vllm:iteration_tokens_total_count") - before


def alone(args, numbers: range, drafter: str) -> float:
    """Tokens a second of `generate()` in this process."""
    model, _ = paceline.load_target(args.model, args.dtype)
    drafting, began, tokens = None if drafter == "none" else paceline.load_drafter(drafter, model), 0.0, 0
    for number in numbers:
        ids = torch.tensor([prompt(args, number)])
        if number == numbers[1]:
            began, tokens = time.perf_counter(), 0
        out = paceline.generate(
            model, ids, torch.ones_like(ids), drafter=drafting, max_new_tokens=args.new_tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0, executor=args.executor,
        )  # fmt: skip
        tokens += out.shape[1] - ids.shape[1]
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--tree", help="of the server with drafts")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--executor", default="eager")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--repeats", type=int, default=2, help="of all servers, in turns")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("-o", "--output")
    args, told = parser.parse_args(), []
    args.tokenizer = paceline.load_target(args.model)[1]
    for repeat in range(args.repeats):
        for drafter in (args.drafter, "none"):
            numbers = range(100 * repeat, 100 * repeat + 1 + args.requests)
            record = {"repeat": repeat, "drafter": drafter, "generate": alone(args, numbers, drafter)}
            with server(args, drafter) as port:
                load(args, port, 1, 1, first=5000)
                for clients in sorted({1, 4, args.clients}):
                    record[f"{clients} clients"] = load(
                        args, port, clients, args.requests, first=1000 * repeat + 100 * clients
                    )
                record["steps after leaving"] = steps_after_leaving(args, port)
            told.append(record)
            print(json.dumps(record), flush=True)
    if args.output:
        arguments = {name: value for name, value in vars(args).items() if name != "tokenizer"}
        Path(args.output).write_text(json.dumps({"arguments": arguments, "records": told}, indent=1) + "\n")


if __name__ == "__main__":
    main()
