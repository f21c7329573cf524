"""Full queues, keys, clients that go or read slowly, figures, and the server's end."""

import asyncio
import http.client
import json
import socket
import time
import urllib.error
import urllib.request

import openai
import pytest
from serve.served import CONTENTED, ask, listening, serving_of, truth

# Limits, keys, refusals.


def test_a_full_queue_says_so_and_the_client_tries_again(model):
    with listening(serving_of(max_rows=1, queue=2), turn_seconds=0.01) as address:
        body = CONTENTED | dict(temperature=0, max_tokens=12)

        async def burst(retries):
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=retries) as client:
                calls = (client.chat.completions.create(**body, extra_body=dict(ignore_eos=True)) for _ in range(7))
                return await asyncio.gather(*calls, return_exceptions=True)

        refused = [each for each in asyncio.run(burst(0)) if isinstance(each, openai.RateLimitError)]
        assert refused and "wait already" in str(refused[0]) and refused[0].response.headers["retry-after"] == "1"
        assert not [each for each in asyncio.run(burst(9)) if isinstance(each, Exception)]


def test_who_waits_too_long_is_told(model):
    with listening(serving_of(max_rows=1, queue_seconds=0.2), turn_seconds=0.03) as address:

        async def several():
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                body = CONTENTED | dict(temperature=0, max_tokens=20)
                extra = dict(ignore_eos=True)
                calls = (
                    client.chat.completions.create(**body, stream=bool(one % 2), extra_body=extra) for one in range(6)
                )
                return await asyncio.gather(*calls, return_exceptions=True)

        told = [str(each) for each in asyncio.run(several()) if isinstance(each, openai.InternalServerError)]
        assert told and all("503" in each and "waited for 0.2 s" in each for each in told)


def test_keys_are_asked_for(model):
    with listening(serving_of(keys=("secret", "other", "schl\u00fcssel", "b\udcff"))) as address:
        for key in (b"schl\xc3\xbcssel", b"b\xff"):
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            connection.request("GET", "/version", headers={"Authorization": b"Bearer " + key})
            assert connection.getresponse().status == 200
            connection.close()
        for key in ("secret", "other"):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client:
                assert client.chat.completions.create(**CONTENTED).choices
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secre", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="no such API key"):
                client.chat.completions.create(**CONTENTED)
        for path, status in (("/metrics", 401), ("/v1/models", 401), ("/version", 401), ("/health", 200), ("/", 200)):
            connection = http.client.HTTPConnection(address.removeprefix("http://"))
            connection.request("GET", path)
            assert connection.getresponse().status == status
            connection.close()


# Clients that go, and the figures.


def metrics(url):
    with urllib.request.urlopen(url + "/metrics") as reply:
        lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("phase", ["queued", "reading", "running"])
def test_a_client_that_goes_frees_its_row(phase, streaming):
    """In whatever phase, within two turns of the server's hearing of it."""
    serving = serving_of(max_rows=1, room=200, prefill_chunk=4)
    with listening(serving, turn_seconds=0.01) as address:
        scheduler = serving.worker.scheduler
        first = CONTENTED | dict(max_tokens=150, ignore_eos=True, stream=streaming, temperature=0)
        long = CONTENTED | dict(messages=[dict(role="user", content="@IU" * 40)], stream=streaming, max_tokens=30)
        sent = []
        for body in {"queued": [first, first, first, long], "reading": [first, long], "running": [first]}[phase]:
            sent.append(send(address, body))
            time.sleep(0.03)
        wanted = {"queued": lambda: len(scheduler.waiting), "reading": lambda: len(scheduler.in_lanes),
                  "running": lambda: len(scheduler.running)}[phase]  # fmt: skip
        assert within(5, wanted), phase
        for connection in sent:
            connection.close()
        assert within(3, lambda: scheduler.idle and not scheduler.live and not serving.under_way)
        told = metrics(address)
        assert told['vllm:request_success_total{finished_reason="abort",model_name="toy"}'] == len(sent)
        assert ask(address, CONTENTED)[0] == 200


def send(address, body):
    host, port = address.removeprefix("http://").split(":")
    connection, data = socket.create_connection((host, int(port))), json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def within(seconds, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_figures_have_vllms_names_and_add_up():
    with listening(serving_of()) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            usages = [
                client.chat.completions.create(**CONTENTED | dict(seed=seed), extra_body=dict(ignore_eos=True)).usage
                for seed in range(4)
            ]
        told = metrics(address)

        def figure(name, **labels):
            inside = ",".join(f'{key}="{value}"' for key, value in sorted({"model_name": "toy", **labels}.items()))
            return told[f"{name}{{{inside}}}"]

        assert figure("vllm:generation_tokens_total") == sum(usage.completion_tokens for usage in usages) == 48
        assert figure("vllm:prompt_tokens_total") == 20
        accepted = sum(usage.completion_tokens_details.accepted_prediction_tokens for usage in usages)
        rejected = sum(usage.completion_tokens_details.rejected_prediction_tokens for usage in usages)
        assert figure("vllm:spec_decode_num_accepted_tokens_total") == accepted
        assert figure("vllm:spec_decode_num_draft_tokens_total") == accepted + rejected
        assert figure("paceline:row_steps_total") + accepted == 48
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
            assert figure(f"vllm:{name}_seconds_count") == 4
        assert figure("vllm:inter_token_latency_seconds_count") == 44, "tokens are counted, not events"
        assert figure("vllm:num_requests_running") == figure("vllm:num_requests_waiting") == 0
        assert figure("vllm:request_success_total", finished_reason="length") == 4
        assert figure("vllm:num_preemptions_total") == 0


def test_an_engine_that_fails_is_told(model, monkeypatch):
    serving = serving_of()
    with listening(serving) as address:
        monkeypatch.setattr(serving.worker.scheduler, "_admit", lambda: 1 / 0)
        status, said = ask(address, CONTENTED)
        assert status == 500 and "ZeroDivisionError" in json.loads(said)["error"]["message"]
        assert ask(address, CONTENTED)[0] == 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(address + "/health")


def test_a_server_that_closes_lets_texts_end(model):
    """New requests are refused, those that wait too; what runs ends as it would."""
    serving = serving_of(max_rows=1, room=100)
    with listening(serving, turn_seconds=0.01) as address:
        running = send(address, CONTENTED | dict(max_tokens=60, ignore_eos=True))
        assert within(5, lambda: serving.worker.scheduler.running)
        waiting = [send(address, CONTENTED) for _ in range(4)]
        assert within(5, lambda: serving.waiting >= 2)
        done = asyncio.run_coroutine_threadsafe(serving.drain(20), next(iter(serving.under_way)).loop)
        assert within(5, lambda: serving.draining)
        assert ask(address, CONTENTED)[0] == 503
        done.result(20)
        replies = [connection.recv(1 << 20).decode() for connection in (running, *waiting)]
        assert "200 OK" in replies[0] and '"completion_tokens":60' in replies[0].replace(" ", "")
        assert sum("503" in reply and "closing" in reply for reply in replies[1:]) >= 2
        for connection in (running, *waiting):
            connection.close()


def test_a_slow_reader_gets_all_of_it_and_holds_nobody_up(model):
    serving = serving_of(max_rows=2, room=200)
    with listening(serving) as address:
        slow = send(address, CONTENTED | dict(max_tokens=150, ignore_eos=True, stream=True, temperature=0))
        assert ask(address, CONTENTED)[0] == 200 and within(5, lambda: not serving.worker.scheduler.running)
        time.sleep(0.2)
        said = b""
        while b"[DONE]" not in said:
            said += slow.recv(1 << 16)
        slow.close()
        lines = [line for line in said.decode().splitlines() if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
        assert text == truth(model, "@IU", 150, temperature=0.0, end_ids=())[1]


def test_nothing_asked_or_said_is_logged(model, capfd):
    with listening(serving_of()) as address:
        ask(address, CONTENTED | dict(messages=[dict(role="user", content="@I@I@U")]))
        ask(address, b'{"messages": "@I@I@U')
    told = capfd.readouterr()
    assert "@I@I" not in told.out + told.err
