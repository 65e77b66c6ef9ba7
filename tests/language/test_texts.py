"""Texts: their tokens, windows and streams, and what is wrong with them."""

from __future__ import annotations

import json

import pytest
import torch

from hesstrace_cli.cli.train import warn_of_unused
from hesstrace_cli.config import TrainConfig, resolve
from hesstrace_cli.data import load_data
from hesstrace_cli.data.text import read_text
from hesstrace_cli.data.windows import TextSplit, streams
from hesstrace_cli.tasks import Tokens
from tests.conftest import SHARED_DATA, assert_one_line_error, invoke

CPU = torch.device("cpu")
WORDS = "the cat saw the dog\nthe dog ran\n\n a cat sat\n"


def write(folder, train=WORDS, valid=WORDS, test=WORDS):
    folder.mkdir(exist_ok=True)
    for name, text in (("train", train), ("valid", valid), ("test", test)):
        content = text if isinstance(text, bytes) else text.encode()
        (folder / f"{name}.txt").write_bytes(content)
    return f"text:{folder}"


def config(dataset, **settings):
    return resolve(
        TrainConfig, {"dataset": dataset, "seq_len": 4, "model": "lstm", **settings}, None
    )


@pytest.mark.parametrize(("length", "n"), [(5, 6), (5, 11), (5, 12), (1, 2), (7, 100)])
def test_windows_hold_the_text(length, n):
    text = torch.randint(1, 50, (n,), generator=torch.Generator().manual_seed(0))
    split = TextSplit.of(text, length, Tokens(), -100)
    ((X, y),) = split.batches(10**6)
    counts = y != -100
    assert torch.equal(X[counts], text[:-1])
    assert torch.equal(y[counts], text[1:])
    assert not X[~counts][1:].any()  # but for the last token, what is beyond the end is a token too
    assert torch.equal(split.targets, y)
    assert split.num_terms == n - 1
    assert len(split) == len(X)
    some = torch.arange(len(split)).flip(0)[::2]
    ((X2, y2),) = split.subset(some).batches(10**6)
    assert torch.equal(X2, X[some])
    assert torch.equal(y2, y[some])
    assert split.is_consecutive
    assert not split.subset(some).is_consecutive
    again = split.subset(some).subset(torch.tensor([0]))
    assert torch.equal(again.targets, y[some[:1]])


@pytest.mark.parametrize("num_windows", [1, 7, 12, 100])
@pytest.mark.parametrize("num_streams", [1, 3, 4, 12, 200])
def test_streams_rebuilt_are_the_text(num_windows, num_streams):
    n = num_windows * 3 - 1  # two of the last window's tokens are beyond its end
    text = torch.arange(max(n, 4))
    split = TextSplit.of(text, 3, Tokens(), -100)
    batches = streams(len(split), num_streams)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(split)))
    sizes = [len(batch) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    runs = [[] for _ in batches[0]]
    for X, y in split.parts(batches):
        for run, inputs, targets in zip(runs, X, y, strict=False):
            counts = targets != -100
            if run:
                assert inputs[0] == run[-1][-1] + 1  # goes on where the batch before ended
            assert torch.equal(targets[counts], inputs[counts] + 1)
            run.append(inputs[counts])
    assert torch.equal(torch.cat([torch.cat(run) for run in runs]), text[:-1])


def test_words_are_numbered_by_how_frequent_they_are(tmp_path):
    """<eos> four times, the three, cat and dog two; the others in the text's order."""
    text = read_text(config(write(tmp_path / "t", test="a dog flew . the end\n")))
    assert text.train.tolist() == [2, 3, 5, 2, 4, 1, 2, 4, 6, 1, 1, 7, 3, 8, 1]
    assert text.test.tolist() == [7, 4, 0, 0, 2, 0, 1]
    assert text.vocabulary.size == 9
    few = read_text(config(write(tmp_path / "t"), vocab_size=3))
    assert few.train.tolist() == [2, 0, 0, 2, 0, 1, 2, 0, 0, 1, 1, 0, 0, 0, 1]
    begin = read_text(config(write(tmp_path / "t"), train_tokens=6))
    assert begin.train.tolist() == [1, 2, 3, 1, 4, 5]  # counted in these alone
    assert begin.valid.tolist() == [1, 2, 3, 1, 4, 5, 1, 4, 0, 5, 5, 0, 2, 0, 5]


def test_a_words_file_may_lack_its_last_line_end(tmp_path):
    with_end, without = (
        read_text(config(write(tmp_path / "t", train=text))).train
        for text in (WORDS, WORDS.removesuffix("\n"))
    )
    assert torch.equal(with_end, without)


def test_a_byte_order_mark_is_no_word(tmp_path):
    mark = "\ufeff"
    name = write(tmp_path / "t", train=mark + WORDS, valid=mark + WORDS, test=mark + WORDS)
    for tokens in ("word", "char"):
        found = read_text(config(name, tokens=tokens))
        plain = read_text(config(write(tmp_path / "plain"), tokens=tokens))
        assert found.vocabulary.size == plain.vocabulary.size
        for part in ("train", "valid", "test"):
            assert torch.equal(getattr(found, part), getattr(plain, part))


def test_characters_and_bytes(tmp_path):
    name = write(tmp_path / "t", train="añb añ\n" * 3, valid="b" * 9, test="xba" * 9)
    text = read_text(config(name, tokens="char"))
    assert text.train.tolist() == [1, 2, 3, 4, 1, 2, 5] * 3
    assert text.test[:3].tolist() == [0, 3, 1]
    assert text.vocabulary.size == 6
    raw = read_text(config(name, tokens="byte"))
    assert bytes(raw.train.tolist()).decode() == "añb añ\n" * 3
    assert raw.vocabulary.size == 256
    not_utf8 = write(tmp_path / "raw", train=bytes(range(256)))
    assert read_text(config(not_utf8, tokens="byte")).train.tolist() == list(range(256))


def make_tokenizer(folder, words=None):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"?": 0, "the": 1, "cat": 3} if words is None else words
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_a_tokenizer_from_a_folder(tmp_path):
    pytest.importorskip("transformers")
    tokens = make_tokenizer(tmp_path / "tokenizer")
    text = read_text(config(write(tmp_path / "t"), tokens=tokens))
    assert text.train.tolist() == [1, 3, 0, 1, 0, 1, 0, 0, 0, 3, 0]
    assert text.vocabulary.size == 4  # the numbers go up to 3
    data = load_data(config(write(tmp_path / "t"), tokens=tokens), CPU)
    assert data.num_classes == 4
    assert data.train.num_terms == 10


def test_the_parts_of_a_text(tmp_path):
    data = load_data(config(write(tmp_path / "t", valid="the cat sat here\n")), CPU)
    assert (len(data.train), len(data.val), len(data.test)) == (4, 1, 4)
    assert data.val.num_terms == 4  # the file's own, not a share of the training text
    assert data.task == Tokens()
    assert (data.num_classes, data.in_shape) == (9, (4,))
    assert load_data(config(write(tmp_path / "t"), val_fraction=0), CPU).val is None
    short = load_data(config(write(tmp_path / "t"), train_examples=2), CPU)
    assert torch.equal(short.train.targets, data.train.targets[:2])
    (tmp_path / "wikitext-2").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / "wikitext-2" / f"wiki.{part}.tokens").write_text(WORDS)
    named = load_data(config("wikitext-2", data_dir=str(tmp_path)), CPU)
    assert torch.equal(named.train.targets, data.train.targets)


def test_wikitext_2_is_whole():
    if not (SHARED_DATA / "wikitext-2").is_dir():
        pytest.skip("WikiText-2 is not at hand")
    text = read_text(config("wikitext-2", data_dir=str(SHARED_DATA)))
    parts = (text.train, text.valid, text.test)
    assert [len(part) for part in parts] == [2_088_628, 217_646, 245_569]
    assert text.vocabulary.size == 33_278


BAD = {
    "no folder": ({}, 3, "does not exist"),
    "no file": ({"train.txt": None}, 3, "has no train.txt or wiki.train.tokens"),
    "no valid": ({"valid.txt": None}, 3, "--val-fraction 0"),
    "empty": ({"test.txt": b""}, 3, "is empty"),
    "blank": ({"train.txt": b" \n\n"}, 3, "is empty"),
    "a folder for a file": ({"t": b""}, 3, "is a file, expected a folder"),
    "not UTF-8": ({"valid.txt": b"the cat \xff\n" * 9}, 3, "is not UTF-8: byte 0xff at position 8"),
    "too short": ({"test.txt": b"the cat\n"}, 3, "has 3 tokens, expected more than --seq-len"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_text(name, tmp_path):
    files, code, words = BAD[name]
    dataset = write(tmp_path / "t") if files and "t" not in files else f"text:{tmp_path}/t"
    for file, content in files.items():
        place = tmp_path / "t" / file if file != "t" else tmp_path / "t"
        place.unlink() if content is None else place.write_bytes(content)
    result = invoke("train", "--model", "lstm", "--dataset", dataset, "--seq-len", "4")
    assert_one_line_error(result, code, words, str(tmp_path / "t"))


WRONG = {
    "no tokenizer": (["--tokens", "nowhere"], 2, "expected word, char, byte, or a tokenizer's"),
    "no files in it": (["--tokens", "."], 3, "holds no tokenizer that can be read"),
    "a damaged one": (["--tokens", "damaged"], 3, "holds no tokenizer that can be read"),
    "a model's folder": (["--tokens", "model"], 3, "'model' finds no token in"),
    "an empty one": (["--tokens", "none"], 3, "'none' holds a tokenizer without tokens"),
    "one that stumbles": (["--tokens", "few"], 3, "'few' cannot take", "t/train.txt' apart"),
    "bytes of a size": (["--tokens", "byte", "--vocab-size", "9"], 2, "--vocab-size is for words"),
    "too many tokens": (["--train-tokens", "16"], 3, "--train-tokens is 16", "has 15"),
    "too many windows": (["--train-examples", "4"], 3, "--train-examples is 4 windows, 17 tokens"),
    "another task": (["--task", "classification"], 2, "is a text, of which the next token"),
    "other classes": (["--num-classes", "3"], 2, "the vocabulary of", "has 9 tokens"),
    "of images": (["--image-size", "3"], 2, "are of images"),
    "a wrong width": (["--model", "gpt", "--model-arg", "heads=3"], 4, "a multiple of heads"),
    "mixup": (["--reg", "mixup"], 2, "tokens are indices"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_a_text_does_not_take(name, tmp_path):
    flags, code, *words = WRONG[name]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    if name in ("an empty one", "one that stumbles"):
        make_tokenizer(tmp_path / "none", {})
        make_tokenizer(tmp_path / "few", {"the": 0})
    dataset = write(tmp_path / "t")
    flags = ["--dataset", dataset, "--seq-len", "4", "--model", "lstm", *flags]
    assert_one_line_error(invoke("train", *flags), code, *words)


def test_settings_of_a_text_for_what_is_none():
    for flag in ("--vocab-size", "--train-tokens", "--seq-len"):
        assert_one_line_error(invoke("train", flag, "9"), 2, f"{flag} is for a text")
    assert_one_line_error(invoke("train", "--tokens", "char"), 2, "--tokens is for a text")
    assert_one_line_error(invoke("train", "--dataset", "wikitext-2"), 3, "--data-dir")


def test_a_model_of_tokens_for_images_and_one_of_images_for_tokens(tmp_path):
    for model in ("lstm", "gpt"):
        words = "it reads indices, as the tokens of --dataset text:DIR"
        assert_one_line_error(invoke("train", "--model", model), 4, words)
    flags = ["train", "--dataset", write(tmp_path / "t"), "--seq-len", "4", "--model", "mlp"]
    assert_one_line_error(invoke(*flags), 4, "these are indices")


@pytest.mark.parametrize(("share", "said"), [(0.3, True), (0.1, False), (0.0, False)])
def test_a_share_held_out_of_a_text_is_without_effect(share, said, capsys):
    warn_of_unused(config("text:t", val_fraction=share), [])
    words = "--val-fraction is without effect, as a text has a file"
    assert (words in capsys.readouterr().err) == said


def test_a_checkpoint_of_another_vocabulary(tmp_path):
    dataset = write(tmp_path / "t")
    flags = ["--dataset", dataset, "--seq-len", "4", "--model", "lstm", "--model-arg", "width=3"]
    made = invoke("train", *flags, "--epochs", "1", "--vocab-size", "5", "--out", "r")
    assert made.exit_code == 0, made.output
    for more in (["--vocab-size", "6"], ["--vocab-size", "5", "--train-tokens", "9"]):
        result = invoke("train", *flags, *more, "--init", "r/last.pt", "--out", "s")
        assert_one_line_error(result, 4, "is of another vocabulary (word, 5 tokens", "--vocab-size")
    result = invoke("estimate-trace", "r/last.pt", "--train-tokens", "9")
    assert_one_line_error(result, 4, "is of another vocabulary", "--train-tokens")
    result = invoke("estimate-trace", "r/last.pt")
    assert result.exit_code == 0
    assert "no augmentation; inputs: windows of the text, each by itself" in result.stderr
    other = write(tmp_path / "other", test="the cat ran\na dog\n" * 3)  # cut up as the run's own
    result = invoke(
        "estimate-trace", "r/last.pt", "--dataset", other, "--split", "test", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["num_examples"], found["num_terms"]) == (5, 20)
    result = invoke("train", "--resume", "--out", "r", "--vocab-size", "6")
    assert_one_line_error(result, 2, "holds a run with other settings", "vocab-size was 5, is 6")
    write(tmp_path / "t", train=WORDS.replace("the", "ein"))
    for command in (["estimate-trace", "r/last.pt"], ["train", "--resume", "--out", "r"]):
        assert_one_line_error(invoke(*command), 4, "vocabulary")
