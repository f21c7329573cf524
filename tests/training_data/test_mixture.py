"""Mixtures: shares in tokens at every moment, the same for the same seed, resumable, and what is refused."""

import itertools
import json
from collections import Counter

import pytest
from paceline.training.data.mixture import Mixture, Source, load_mixture


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("texts")
    for name, count, size in (("long", 5, 40), ("short", 30, 3), ("odd", 9, 11)):
        (base / name / "deep").mkdir(parents=True)
        for number in range(count):
            text = " ".join([f"{name}{number}"] * size)
            (base / name / ("deep" if number % 2 else ".") / f"{number}.txt").write_text(text)
    (base / "odd" / "copy.txt").write_text((base / "odd" / "0.txt").read_text() + "\n")
    (base / "odd" / "broken.txt").write_bytes(b"\xff\xfe\xfa")
    (base / "odd" / "empty.txt").write_text(" \n")
    return base


def mixture(folders, seed=0, **weights):
    sources = {name: Source(weight, str(folders / name)) for name, weight in weights.items()}
    return Mixture(sources, lambda text: len(text.split()), seed)


def take(mixed, count):
    return list(itertools.islice(mixed, count))


def test_shares_are_of_tokens_and_hold_at_every_moment(folders):
    weights = {"long": 1, "short": 3, "odd": 6}
    given = Counter()
    for name, text, tokens in take(mixture(folders, **weights), 400):
        assert text.startswith(name) and tokens == len(text.split())
        given[name] += tokens
        behind = {name: given[name] / weight for name, weight in weights.items()}
        assert max(behind.values()) - min(behind.values()) <= 40, "never more than the longest document ahead"
    for name, weight in weights.items():
        assert given[name] / given.total() == pytest.approx(weight / 10, abs=0.02)


def test_every_text_comes_once_before_any_comes_again(folders):
    texts = [text for _, text, _ in take(mixture(folders, odd=1), 27)]
    epochs = [texts[:9], texts[9:18], texts[18:]]
    assert all(len(set(epoch)) == 9 for epoch in epochs), "copies, empty and broken files are left out"
    assert epochs[0] != epochs[1], "each time in another order"


def test_a_seed_decides_the_order(folders):
    weights = {"long": 1, "short": 1}
    one, same, other = (take(mixture(folders, seed, **weights), 60) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("stop", [0, 1, 7, 50, 199])
def test_a_state_goes_on_where_it_was_taken(folders, stop):
    weights = {"long": 1, "short": 3, "odd": 2}
    whole = take(mixture(folders, 5, **weights), 250)
    first = mixture(folders, 5, **weights)
    assert take(first, stop) == whole[:stop]
    state = json.loads(json.dumps(first.state_dict()))
    second = mixture(folders, 5, **weights)
    second.load_state_dict(state)
    assert take(second, 250 - stop) == whole[stop:]


def test_a_state_of_something_else_is_refused(folders):
    state = mixture(folders, 5, long=1).state_dict()
    for other in (mixture(folders, 6, long=1), mixture(folders, 5, short=1)):
        with pytest.raises(ValueError, match="use the mixture that it was made with"):
            other.load_state_dict(state)


def test_a_source_without_weight_is_not_read_and_none_at_all_is_refused(folders):
    assert {name for name, _, _ in take(mixture(folders, long=1, short=0), 20)} == {"long"}
    with pytest.raises(ValueError, match="sum to zero"):
        mixture(folders, long=0, short=0)
    with pytest.raises(ValueError, match="sum to zero"):
        mixture(folders)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sources: [", "cannot be read"),
        ("seed: 1", "give 'sources'"),
        ("sources: {a: {weight: 1, folder: x, colour: red}}", "'colour' is not known"),
        ("sources: {a: {weight: heavy, folder: x}}", "weight 'heavy'"),
        ("sources: {a: {weight: -1, folder: x}}", "weight -1"),
        ("sources: {a: {weight: 1}}", "either a folder or a dataset"),
        ("sources: {a: {weight: 0, folder: x}}", "sum to zero"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, text, words):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_mixture(tmp_path / "m.yaml", len)


def test_sources_without_text_are_named(tmp_path):
    (tmp_path / "none").mkdir()
    for folder, words in ((tmp_path / "none", "'a' of the mixture holds no text"), ("nowhere", "does not exist")):
        with pytest.raises(ValueError, match=words):
            take(Mixture({"a": Source(1, str(folder))}, len), 1)


def test_a_data_set_is_streamed(tmp_path):
    lines = [json.dumps({"words": f"text {number}"}) + "\n" for number in range(6)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(lines))
    mixed = Mixture({"a": Source(1, dataset=str(tmp_path / "set"), column="words")}, len)
    assert {text for _, text, _ in take(mixed, 6)} == {f"text {number}" for number in range(6)}
    with pytest.raises(ValueError, match="no column 'text'"):
        take(Mixture({"a": Source(1, dataset=str(tmp_path / "set"))}, len), 1)


@pytest.mark.slow
def test_the_recipes_load_and_the_offline_one_finds_text_here(root):
    networked = load_mixture(root / "configs" / "mixture-redpajama.yaml", len)
    assert sum(source.weight for source in networked.sources.values()) == pytest.approx(100)
    offline = load_mixture(root / "configs" / "mixture-offline.yaml", len)
    assert {name for name, _, _ in take(offline, 40)} == {"library", "packages", "prose"}


def test_files_of_records_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffAn old tale.\r\n")
    (tmp_path / "b.txt").write_text('{"prompt": "x"}\n')
    mixed = Mixture({"a": Source(1, str(tmp_path), exclude=("/b.txt",))}, lambda text: len(text.split()))
    assert take(mixed, 1) == [("a", "An old tale.\n", 3)]
    with pytest.raises(ValueError, match=r"b\.txt of the mixture holds records; prepare it as a source of its own"):
        take(Mixture({"a": Source(1, str(tmp_path))}, lambda text: len(text.split())), 2)
