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
    return next((own for own in figures["methods"] if own["label"] == figures["best"]), None)


def verdict(figures: dict) -> str:
    """The number to quote: the gain over its baseline with its interval, of which method, on what."""
    best, setup = best_of(figures), figures["setup"]
    if best is None:
        return "No method with a drafter was measured against plain decoding."
    said = times(best["speedup"], PLAIN)
    rivals = sum(own["kind"] == "drafted" and own["speedup"] is not None for own in figures["methods"])
    among = f" (of {rivals} measured)" if rivals > 1 else ""
    count = best["overall"]["beside_plain"]
    prompts = f"{count} prompt{'s' * (count != 1)}" + (f" in batches of {setup['batch']}" if setup["batch"] > 1 else "")
    model = f"{visible(setup['model'])} in {visible(setup['dtype'])}"
    return f"{said[0].upper()}{said[1:]} with {visible(best['label'])}{among}: {prompts}, {model} on {device(figures)}"


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


def identity(own: dict) -> str:
    if not own["compared"]:
        return "text not comparable with the baseline's"
    words = f"output identical on {own['identical']}/{own['compared']} texts"
    lossless = RULES[own["rule"]].lossless or own["temperature"] == 0
    return words if lossless else f"{words} (rule {own['rule']} is not lossless)"


def gains(figures: dict) -> list[dict]:
    """The methods that have a gain over plain decoding, the largest first."""
    known = [own for own in figures["methods"] if own["speedup"]]
    return sorted(known, key=lambda own: -own["speedup"]["value"])


def baselines(figures: dict) -> str:
    """Which baselines the bars stand against, and what has none."""
    shown, methods = gains(figures), figures["methods"]
    said = []
    if shown:
        names = ", ".join(dict.fromkeys(visible(own["baseline"]) for own in shown))
        said.append(f"The line at 1 is {PLAIN} ({names}): the same model run the same way, without speculation.")
    if any(own["speedup"]["low"] is not None for own in shown):
        said.append("Whiskers are 95 % intervals, by a paired bootstrap over prompts.")
    theirs = ", ".join(visible(own["label"]) for own in methods if own["kind"] == "transformers")
    if theirs:
        said.append(f"The other baseline is {THEIRS} of the same model ({theirs}); the table has the gains over it.")
    else:
        said.append(f"{THEIRS[0].upper()}{THEIRS[1:]} was not measured beside it.")
    lone = [visible(own["label"]) for own in methods if own["kind"] != "ar" and not own["speedup"]]
    if lone:
        said.append(f"No {PLAIN} was measured beside {', '.join(lone)}, so no speed-up is known.")
    return " ".join(said)
