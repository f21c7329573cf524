"""How figures read in words: intervals, judgements, and the sentences that a report opens with.

No sentence claims more than its interval allows, as shown: a bound that reads 1.00 touches 1. Knows only figures, not
where they come from.
"""

from ..verify import RULES
from .token_chips import visible

PLAIN, THEIRS = "plain decoding", "transformers' generate()"
NOISE = "no difference beyond noise"


def interval(value: dict | None, unit: str = "") -> str:
    return "–" if value is None else f"{value['value']:.2f}{unit}{bounds(value)}"


def bounds(value: dict) -> str:
    return "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"


def judgement(gain: dict) -> str:
    """What a gain's interval allows to say; where one batch was measured, there is none."""
    if gain["low"] is None:
        return "no interval"
    return "faster" if round(gain["low"], 2) > 1 else "slower" if round(gain["high"], 2) < 1 else NOISE


def times(gain: dict, other: str) -> str:
    """Such as `1.84 times plain decoding [1.71, 1.97]`."""
    said, judged = f"{gain['value']:.2f} times {other}{bounds(gain)}", judgement(gain)
    if judged == NOISE:
        return f"{NOISE}: {said}"
    return said if judged == "faster" else f"{said} ({judged})"


def best_of(figures: dict) -> dict | None:
    return next((method for method in figures["methods"] if method["label"] == figures["best"]), None)


def verdict(figures: dict) -> str:
    """The number to quote: the gain over its baseline with its interval, of which method, on what."""
    best, setup = best_of(figures), figures["setup"]
    if best is None:
        return "No method with a drafter was measured against plain decoding."
    said = times(best["speedup"], PLAIN)
    rivals = sum(method["kind"] == "drafted" and method["speedup"] is not None for method in figures["methods"])
    among = f" (of {rivals} measured)" if rivals > 1 else ""
    count = best["overall"]["beside_plain"]
    prompts = f"{count} prompt{'s' * (count != 1)}" + (f" in batches of {setup['batch']}" if setup["batch"] > 1 else "")
    model = f"{visible(setup['model'])} in {visible(setup['dtype'])}"
    model += f", weights {visible(setup['weights'])}" if "weights" in setup else ""
    model += f", {streaming(setup)}" if "stream_kind" in setup else ""
    return f"{said[0].upper()}{said[1:]} with {visible(best['label'])}{among}: {prompts}, {model} on {device(figures)}"


def streaming(setup: dict) -> str:
    """How the weights of the target came into memory."""
    resident = f"{setup['stream_resident_layers']} of {setup['stream_layers']} layers resident"
    fetched = (
        f"{setup['stream_bytes_per_forward'] / 1e9:.2f} GB a forward streamed from {visible(setup['stream_kind'])}"
    )
    return f"{fetched}{' past the page cache' if setup['stream_direct'] else ''}, {resident}"


def conclusion(figures: dict) -> str:
    """Verdict and particulars, for a terminal."""
    return "\n".join(filter(None, [verdict(figures), particulars(figures)]))


def device(figures: dict) -> str:
    setup, machine = figures["setup"], figures["runs"][0]["machine"]
    if setup["device"] != "cpu":
        return visible(str(machine.get("gpu") or setup["device"]))
    return f"{visible(str(machine['cpu']))}, {setup['threads']} thread{'s' * (setup['threads'] != 1)}"


def particulars(figures: dict) -> str:
    """What belongs beside the verdict: tokens per step, whether the text was the target's own, the other baseline."""
    best = best_of(figures)
    if best is None:
        return ""
    heat = best["temperature"]
    parts = [
        f"{best['tokens_per_step']['value']:.2f} tokens per step",
        identity(best),
        "greedy" if heat == 0 else f"temperature {heat:g}",
    ]
    if best["over_transformers"]:
        parts.append(times(best["over_transformers"], THEIRS))
    return " · ".join(parts)


def identity(method: dict) -> str:
    if not method["compared"]:
        return "text not comparable with the baseline's"
    words = f"output identical on {method['identical']}/{method['compared']} texts"
    lossless = RULES[method["rule"]].lossless or method["temperature"] == 0
    return words if lossless else f"{words} (rule {method['rule']} is not lossless)"


def gains(figures: dict) -> list[dict]:
    """The methods that have a gain over plain decoding, the largest first."""
    known = [method for method in figures["methods"] if method["speedup"]]
    return sorted(known, key=lambda method: -method["speedup"]["value"])


def baselines(figures: dict) -> str:
    """Which baselines the bars stand against, and what has none."""
    shown, methods = gains(figures), figures["methods"]
    said = []
    if shown:
        names = ", ".join(dict.fromkeys(visible(method["baseline"]) for method in shown))
        said.append(f"The line at 1 is {PLAIN} ({names}): the same model run the same way, without speculation.")
    if any(method["speedup"]["low"] is not None for method in shown):
        said.append("Whiskers are 95 % intervals, by a paired bootstrap over prompts.")
    transformers = ", ".join(visible(method["label"]) for method in methods if method["kind"] == "transformers")
    if transformers:
        said.append(
            f"The other baseline is {THEIRS} of the same model ({transformers}); the table has the gains over it."
        )
    else:
        said.append(f"{THEIRS[0].upper()}{THEIRS[1:]} was not measured beside it.")
    if sum(method["kind"] == "drafted" and method["speedup"]["low"] is not None for method in shown) > 1:
        said.append("The page begins with the method whose interval begins highest.")
    lone = [visible(method["label"]) for method in methods if method["kind"] != "ar" and not method["speedup"]]
    if lone:
        said.append(f"No {PLAIN} was measured beside {', '.join(lone)}, so no speed-up is known.")
    return " ".join(said)
