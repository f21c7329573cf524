"""Write drafters/pretrained/speeds.json, by which the drafter "auto" is chosen, from a run of `paceline bench`.

    paceline bench prompts.jsonl -o run.jsonl --turns 1 --max-new-tokens 64 --executor compiled --methods \
        smollm2-135m-medusa+ngram smollm2-135m-hydra+ngram smollm2-135m-draft+ngram
    python docs/cpu/speeds.py run.jsonl

Its methods are shipped drafters with prompt lookup beside them. The entry of the run's kind of device is
replaced, those of others are kept.
"""

import json
import sys

from paceline.drafters.shipped import NAMES, speeds_file
from paceline.spec.bench.analysis import speedup
from paceline.spec.bench.runfile import read_run
from paceline.spec.files import write_json


def main(path):
    run, times = read_run(path), {}
    for method in run.methods:
        name, _, other = (method["drafter"] or "").rpartition("+")
        if name in NAMES and other == "ngram":
            times[name] = round(speedup(run.of(method["name"]), run.of(method["baseline"])).value, 3)
    if not times:
        sys.exit(f"{path} has no method like {NAMES[0]}+ngram")
    file = speeds_file()
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    setup, machine = run.header["setup"], run.header["machine"]
    about = {
        "times": times, "created": run.header["created"][:10], "commit": run.header["commit"],
        "processor": machine["gpu"] or machine["cpu"], "dtype": setup["dtype"], "prompts": setup["prompts"],
        "executor": run.methods[0]["executor"],
    }  # fmt: skip
    write_json(file, {**kept, setup["device"].partition(":")[0]: about})
    print(json.dumps(about))


if __name__ == "__main__":
    main(*sys.argv[1:])
