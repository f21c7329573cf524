"""The options of every command, in the order in which its help shows them. Knows nothing of what they do."""

from .model_options import device_options, model_options, positive, seconds, stream_options
from .outputs import AppendedOutput, DrafterInput, Input, OutputFolder, StreamedOutput
from .parser import Parser, add_command

_PROMPTS = "JSON lines, a JSON array, Parquet, a data set's folder or hub id; of any usual form"


class AnswersOutput(AppendedOutput):
    """Answers, and the files of the run that makes them."""

    makes_folders = True
    endings = (".run.json", ".problems.jsonl", ".turns.jsonl")


def demo(parser: Parser) -> None:
    parser.add_argument("--max-new-tokens", type=positive, default=96, metavar="N", help="per prompt (default 96)")
    model_options(parser)
    parser.set_defaults(executor="auto")


def generate(parser: Parser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="text to continue")
    source.add_argument(
        "--prompt-file", type=Input, metavar="FILE", help="with the text to continue; - is standard input"
    )
    source.add_argument("--chat", metavar="TEXT", help="a user's message, put into the model's chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="at most (default 128)")
    _drawing_options(parser, "match, residual or typical")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus, when sampling (default 1)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the sampling noise (default: drawn, and printed)")
    parser.writes("--trace", kind=AppendedOutput, metavar="FILE", help="append one JSON line per step to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    model_options(parser)


def serve(parser: Parser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="HOST", help="address to listen at (default %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="PORT", help="0: any free one (default %(default)s)")
    key = "that clients must send; repeatable; if not given, what PACELINE_API_KEY holds"
    parser.add_argument("--api-key", action="append", metavar="KEY", help=key)
    parser.add_argument("--insecure", action="store_true", help="serve other machines without a key")
    parser.add_argument(
        "--name", metavar="NAME", help="of the model for clients, the last part of --model if not given"
    )
    parser.add_argument("--max-rows", type=positive, default=8, metavar="N", help="texts at a time (default 8)")
    room = "tokens of a text, prompt and answer; if not given 2048, or the model's context where that is shorter"
    parser.add_argument("--room", type=positive, metavar="N", help=room)
    usual = "of an answer in a chat whose request does not say how many (default 512)"
    parser.add_argument("--max-tokens", type=positive, default=512, metavar="N", help=usual)
    chunk = "prompt tokens between two steps; if not given 128, on a GPU 512"
    parser.add_argument("--prefill-chunk", type=positive, metavar="N", help=chunk)
    kept = "of beginnings of prompts that are kept; 0: none (default 512)"
    parser.add_argument("--prefix-megabytes", type=float, default=512.0, metavar="MB", help=kept)
    parser.add_argument("--queue", type=positive, default=64, metavar="N", help="texts that may wait (default 64)")
    wait = "that a text may wait (default 60)"
    parser.add_argument("--queue-seconds", type=seconds, default=60.0, metavar="SECONDS", help=wait)
    model_options(parser, tree="auto, by the number of texts at a time")
    parser.set_defaults(executor="auto")


def check(parser: Parser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--model", type=Input, metavar="NAME", help="check this model: folder, GGUF file, short name or hub id"
    )
    shapes = "random weights in the shape of a known model, no download (default %(default)s)"
    what.add_argument("--shape", default="smollm2-135m", metavar="NAME", help=shapes)
    what.add_argument("--config", type=Input, metavar="FILE", help="random weights in the shape of this config.json")
    parser.add_argument("--executors", default="all", metavar="LIST", help="some, with commas between (default all)")
    budget = "that the check may take, within a fifth (default 100)"
    parser.add_argument("--budget", type=seconds, default=100.0, metavar="SECONDS", help=budget)
    parser.writes("-o", "--output", metavar="FILE", help="everything that was found, raw, as JSON")
    parser.writes("--markdown", kind=StreamedOutput, metavar="FILE", help="tables as Markdown; - is standard output")
    device_options(parser)


def bench(parser: Parser) -> None:
    parser.reads("prompts", metavar="PROMPTS", help=_PROMPTS)
    run = "JSONL to append to; a run goes on"
    parser.writes("-o", "--output", kind=AppendedOutput, required=True, metavar="RUN", help=run)
    parser.add_argument(
        "--methods", nargs="+", default=["ngram"], metavar="METHOD",
        help="ar, ngram, a draft model or drafter folder, transformers, transformers-lookup, "
        "transformers-assisted:drafter=FOLDER; each with :tree=4x2x1,rule=match,executor=compiled,temperature=0.7,"
        "name=SHORT. Plain decoding and transformers' generate() are always there (default ngram)",
    )  # fmt: skip
    _record_options(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="take N prompts, spread over the file")
    parser.add_argument("--turns", type=positive, metavar="N", help="and the first N turns of each (default: all)")
    parser.add_argument("--repeats", type=positive, default=1, metavar="N", help="of every measurement (default 1)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="texts at a time (default 1)")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="per turn (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling noise (default 0)")
    parser.add_argument("--threads", type=positive, metavar="N", help="that torch uses (default: its own choice)")
    model_options(parser, drafter=False, tree="")


def report(parser: Parser) -> None:
    parser.reads("runs", nargs="+", metavar="RUN", help="files of paceline bench, compared side by side")
    parser.writes("-o", "--output", kind=StreamedOutput, metavar="FILE", help="the page, one HTML file")
    parser.writes("--markdown", kind=StreamedOutput, metavar="FILE", help="tables as Markdown; - is standard output")
    parser.writes("--json", kind=StreamedOutput, metavar="FILE", help="all figures; - is standard output")
    steps = "one SVG of some steps of a text with their drafted trees; docs/picture.svg was made so, of one prompt"
    parser.writes("--picture", kind=StreamedOutput, metavar="FILE", help=steps)


def compare(parser: Parser) -> None:
    parser.reads("runs", nargs=2, metavar="FILE", help="A, then B: of paceline bench, or of paceline check")


def plan(parser: Parser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--calibrate", type=Input, metavar="PROMPTS", help=f"prompts to try: {_PROMPTS}")
    source.add_argument(
        "--from", dest="run", type=Input, metavar="RUN", help="take the acceptance that paceline bench measured"
    )
    parser.add_argument("--prompts", type=positive, metavar="N", help="how many: 24, or with --stream 8, if not given")
    _record_options(parser)
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="per prompt (default 64)")
    _drawing_options(parser, "match or residual")
    parser.writes("-o", "--output", metavar="FILE", help="write the plan here too, for --tree FILE.json")
    model_options(parser, tree="")


def profile(parser: Parser) -> None:
    model_options(parser, tree="")


def data(parser: Parser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP", title="steps")
    add_command(
        steps, "generate", "let the target, or a server, answer prompts", data_generate,
        "paceline data generate prompts.jsonl -o answers.jsonl",
    )  # fmt: skip
    add_command(
        steps, "prepare", "turn text and conversations into packed rows with a loss mask", data_prepare,
        "paceline data prepare answers.jsonl -o data/mine",
    )  # fmt: skip


def data_generate(parser: Parser) -> None:
    parser.reads("prompts", nargs="?", metavar="PROMPTS", help=_PROMPTS)
    again = "JSONL to append to; a run that was killed goes on"
    parser.writes("-o", "--output", kind=AnswersOutput, metavar="FILE", help=again)
    parser.add_argument("--source", choices=["self"], help="self: the target invents the user turns too")
    parser.reads("--beginnings", metavar="FILE", help="of invented turns: a text file, one on each line")
    parser.add_argument("--count", type=positive, default=1000, metavar="N", help="of those (default 1000)")
    _record_options(parser)
    parser.add_argument("--temperatures", default="0,0.7,1.0", metavar="LIST", help="default 0,0.7,1.0")
    parser.add_argument("--repeats", type=positive, default=1, metavar="N", help="per sampled temperature (default 1)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus, when sampling (default 0.95)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="per turn (default 256)")
    parser.add_argument("--batch", type=positive, default=16, metavar="N", help="texts at a time (default 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the sampling noise (default 0)")
    parser.add_argument("--limit-tokens", type=positive, metavar="N", help="begin no text beyond this many tokens")
    parser.reads("--exclude", metavar="FILE", help="prompts of this file are left out, wherever they occur")
    parser.add_argument("--server", metavar="URL", help="ask this OpenAI-compatible server (.../v1) instead")
    parser.add_argument(
        "--compare-transformers", action="store_true", help="time transformers' generate() beside ours, write nothing"
    )
    model_options(parser)
    parser.set_defaults(drafter="none", executor="auto")


def data_prepare(parser: Parser) -> None:
    records = "records (JSON lines, a JSON array, Parquet, a data set), text files, folders of both, mixtures (YAML)"
    parser.reads("sources", nargs="+", metavar="SOURCE", help=records)
    parser.writes("-o", "--output", kind=OutputFolder, required=True, metavar="FOLDER", help="data set to make")
    target = "the target, for its tokenizer (default %(default)s)"
    parser.reads("--model", default="smollm2-135m", metavar="NAME", help=target)
    parser.reads("--tokenizer", metavar="NAME", help="folder or hub id of a tokenizer, instead")
    _record_options(parser)
    parser.add_argument("--tokens", type=positive, metavar="N", help="how many to take of a mixture")
    longest = "of a row (default 1024, or the target's context where that is shorter)"
    parser.add_argument("--length", type=positive, metavar="N", help=longest)
    parser.add_argument("--held-out", type=float, default=0.02, metavar="SHARE", help="of documents (default 0.02)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the split (default 0)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")


def train(parser: Parser) -> None:
    parser.reads("config", metavar="CONFIG", help="a YAML file, or the name of a recipe in configs/")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optimisation.batch=16")
    parser.add_argument("--plan", action="store_true", help="print parameters, tokens, steps, time and disk, and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in run.folder")


def evaluate(parser: Parser) -> None:
    parser.reads("drafter", kind=DrafterInput, metavar="DRAFTER", help="its folder; or ngram, a name, a model, with -o")
    parser.set_defaults(draft_weights="16")  # what is judged are the weights as they were trained
    parser.reads("--prompts", required=True, metavar="FILE", help=f"to decode: {_PROMPTS}")
    _record_options(parser)
    parser.reads("--data", metavar="FOLDER", help="judge on the held-out rows of this prepared data")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="per prompt (default 128)")
    _drawing_options(parser, "match or residual")
    parser.writes("-o", "--output", metavar="FILE", help="write here, and leave the drafter's folder as it is")
    model_options(parser, drafter=False, tree="the plan that is kept, or one made of what is counted")


def push(parser: Parser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="with weights as safetensors, config.json and README.md")
    parser.add_argument("hub_id", metavar="HUB-ID", help="owner/name")
    parser.add_argument("--private", action="store_true", help="make the repository private, where it is new")


def export(parser: Parser) -> None:
    parser.reads("drafter", metavar="FOLDER", help="a drafter's folder, its hub id, or the name of one that ships")
    engines = "vllm, sglang, speculators (vLLM serves it by itself), transformers, or tgi for Medusa heads"
    parser.add_argument("--to", required=True, metavar="ENGINE", help=engines)
    parser.writes("-o", "--output", kind=OutputFolder, required=True, metavar="OUT", help="folder to make")
    target = "the target that it was trained for (default %(default)s)"
    parser.reads("--model", default="smollm2-135m", metavar="NAME", help=target)
    device_options(parser)
    stream_options(parser)


def quantise(parser: Parser) -> None:
    parser.reads("model", metavar="MODEL", help="folder, short name or hub id")
    parser.writes("-o", "--output", kind=OutputFolder, required=True, metavar="FOLDER", help="to make, for --model")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4, help="of a weight (default 4)")
    groups = "weights that share a scale: 32, 64 or 128 (default 64)"
    parser.add_argument("--group", type=int, choices=[32, 64, 128], default=64, metavar="N", help=groups)
    heads = "of the LM head: 4, 8 or 16 (default 8)"
    parser.add_argument("--head-bits", type=int, choices=[4, 8, 16], default=8, metavar="N", help=heads)
    texts = "records: prompts, which the model answers, or conversations and texts, taken as they are"
    parser.reads("--calibrate", metavar="FILE", help=texts)
    _record_options(parser)
    several = "to calibrate on, and half as many to measure on (default 48)"
    parser.add_argument("--texts", type=positive, default=48, metavar="N", help=several)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the rotations (default 0)")
    device_options(parser)
    parser.set_defaults(dtype="float32", stream=None, resident=None)


def convert(parser: Parser) -> None:
    parser.reads(
        "file",
        metavar="FILE",
        help="a .bin, .pt, .pth or .ckpt of tensors, or the .index.json of several, with config.json",
    )
    parser.writes("-o", "--output", kind=OutputFolder, required=True, metavar="FOLDER", help="to make, for --drafter")


def nothing(parser: Parser) -> None:
    """A command without options."""


def _record_options(parser: Parser) -> None:
    """Of commands that read records, by `spec.data`."""
    columns = "what stands for our fields in records of another form, such as prompt=question,completion=answer"
    parser.add_argument("--columns", metavar="MAP", help=columns)
    parser.add_argument("--split", default="train", metavar="NAME", help="of a data set (default train)")


def _drawing_options(parser: Parser, rules: str) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default 0)")
    kept = f"how guesses are judged: {rules} (default match)"
    parser.add_argument("--verify", default="match", metavar="RULE", help=kept)
