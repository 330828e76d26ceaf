"""BLiMP: scores against brute force and minicons, the command, its results beside others, misuse."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from harness import ROOT, refused, run, save_bert
from made_glue import make_rows, write_rows
from made_results import summary, write_results
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

import glue.blimp
import glue.compare
import glue.run
from entropy_masking.errors import RunError, UsageError
from glue import blimp
from glue.options import parse
from glue.protocols import FORMS
from glue.tasks import GLUE

GLUE_RUN = [sys.executable, str(ROOT / "glue" / "run.py")]
COMPARE = [sys.executable, str(ROOT / "glue" / "compare.py")]
PHENOMENA = {"agreement": "morphology", "binding": "syntax/semantics", "island": "syntax_semantics"}
PAIRS = 12  # of each phenomenon


@pytest.fixture(scope="module")
def data(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with pairs of three phenomena, in no order; their sentences hold words of many pieces."""
    root = tmp_path_factory.mktemp("data")
    write(root, made_pairs(words))
    return root


def made_pairs(words: list[str]) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for uid, field in PHENOMENA.items():
        for number in range(PAIRS):
            text = list(rng.choice(words, rng.integers(3, 9)))
            long = "".join(rng.choice(list("abcdefgh"), 9))  # no word of the vocabulary
            good, bad = [*text, long, text[0] + ","], [long, text[-1] + ",", *text[1:]]
            rows.append([uid, field, "made", number, " ".join(good) + ".", " ".join(bad) + "."])
    frame = pl.DataFrame(rows, ["UID", "field", "linguistics_term", "pairID", *blimp.TEXTS], orient="row")
    return frame.sample(fraction=1, shuffle=True, seed=0)


def write(root: Path, frame: pl.DataFrame) -> None:
    (root / "blimp").mkdir(parents=True, exist_ok=True)
    frame.write_parquet(root / "blimp" / "blimp.parquet")


def byte_level_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([" ".join(words)], trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"},
        **{"pad_token": "<pad>", "mask_token": "<mask>"},
    )


@pytest.fixture(scope="module")
def checkpoints(work: Path, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A WordPiece BERT; a byte-level RoBERTa and ModernBERT. Their weights are large enough to tell tokens apart."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = byte_level_tokenizer(words)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 48, "max_position_embeddings": 66, "initializer_range": 0.2}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}
    torch.manual_seed(0)
    made = {
        "roberta": RobertaForMaskedLM(RobertaConfig(**size, **special)),
        "modernbert": ModernBertForMaskedLM(ModernBertConfig(**size, **special, initializer_cutoff_factor=9.0)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    save_bert(root / "bert", AutoTokenizer.from_pretrained(work / "tokenizer"))
    bert = AutoModelForMaskedLM.from_pretrained(root / "bert")
    for weight in bert.parameters():
        if weight.ndim > 1:
            weight.data *= 10
    bert.save_pretrained(root / "bert")
    return {name: root / name for name in ("bert", *made)}


@torch.no_grad()
def brute_force(model: Any, tokenizer: Any, text: str, form: str) -> float:
    """One position at a time, nothing narrowed, no batch, no padding."""
    encoded = tokenizer(text, return_tensors="pt")
    ids_L, words, total = encoded["input_ids"][0], encoded.word_ids(), 0.0
    for position, word in enumerate(words):
        if word is None:
            continue
        later = [place for place in range(position, len(words)) if words[place] == word]
        masked_L = ids_L.clone()
        masked_L[later if form == "within-word" else [position]] = tokenizer.mask_token_id
        total += float(model(masked_L[None]).logits[0, position].double().log_softmax(0)[ids_L[position]])
    return total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_scores_are_those_of_brute_force(checkpoints: dict[str, Path], data: Path, name: str, form: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name])
    model = AutoModelForMaskedLM.from_pretrained(checkpoints[name]).eval()
    pairs = blimp.load(str(data), None)
    expected = [brute_force(model, tokenizer, text, form) for text in pairs.sentences]
    assert np.std(expected) > 1
    told: list[int] = []
    for batch_tokens in (1, 200, 1 << 16):
        encoded = blimp.encode(pairs, tokenizer, form)
        told.clear()
        found = blimp.score(checkpoints[name], encoded, told.append, batch_tokens=batch_tokens)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
        assert sum(told) == len(expected)
    other = next(each for each in FORMS if each != form)
    assert not np.allclose(blimp.score(checkpoints[name], blimp.encode(pairs, tokenizer, other)), expected, atol=0.1)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_scores_are_those_of_minicons(checkpoints: dict[str, Path], data: Path, name: str) -> None:
    scorer = pytest.importorskip("minicons.scorer", reason="minicons is not installed: pip install '.[bench]'")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name])
    theirs = scorer.MaskedLMScorer(AutoModelForMaskedLM.from_pretrained(checkpoints[name]), "cpu", tokenizer=tokenizer)
    pairs = blimp.load(str(data), None)
    for form, metric in (("original", "original"), ("within-word", "within_word_l2r")):
        # minicons' own call of the tokenizer is of transformers 4
        masked = list(theirs.prepare_text(tokenizer(pairs.sentences, padding=True), PLL_metric=metric))
        expected = [float(each.sum()) for each in theirs.compute_stats(masked, return_tensors=True)]
        found = blimp.score(checkpoints[name], blimp.encode(pairs, tokenizer, form))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_words_of_a_byte_level_tokenizer(checkpoints: dict[str, Path], words: list[str]) -> None:
    """Pieces are masked to the end of their word; punctuation is no piece of the word that it stands behind."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["roberta"])
    frame = pl.DataFrame({"sentence_good": ["abchgfedcba, hhh"], "sentence_bad": [words[0]]})
    encoded = blimp.encode(blimp.Pairs(frame, None, ""), tokenizer, "within-word")
    tokens = tokenizer.convert_ids_to_tokens(encoded.tokens.ids[: encoded.tokens.starts[1]])
    comma = tokens.index(",")
    assert comma > 2, "the first word has several pieces"
    first = encoded.rows == 0
    assert encoded.positions[first].tolist() == list(range(1, len(tokens) - 1))
    after = len(tokens) - 2 - comma
    assert encoded.ends[first].tolist() == [comma - 1] * (comma - 1) + [comma] + [comma + after] * after


def test_equal_sentences_tie(work: Path, words: list[str], tmp_path: Path) -> None:
    """Where the tokenizer sees no difference there is none, to the last bit, and the pair is not won."""
    frame = made_pairs(words).with_columns(sentence_bad=pl.col("sentence_good").str.to_uppercase())
    assert AutoTokenizer.from_pretrained(work / "teacher")("AB").input_ids == (
        AutoTokenizer.from_pretrained(work / "teacher")("ab").input_ids
    )
    write(tmp_path, frame)
    result = blimp_here(work / "teacher", tmp_path / "out", tmp_path)
    assert (result["ties"], result["score"], result["collapsed"]) == (3 * PAIRS, 0.0, True)


def blimp_here(model: Path, output: Path, data: Path, *flags: object) -> dict[str, Any]:
    glue.run.main(
        [str(each) for each in ("--model", model, "--tasks", "blimp", "--data", data, "--output", output, *flags)]
    )
    return json.loads((output / "blimp.json").read_text())


def test_the_command(checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """One result a model whatever the seeds, by phenomenon and field; what is there is not computed again."""
    flags = ["--model", checkpoints["bert"], "--tasks", "blimp", "--data", data, "--seeds", "1,2,3"]
    command = [*GLUE_RUN, *flags, "--limit-pairs", 5, "--output", tmp_path]
    printed = run(*command)
    assert "30.0/30.0" in printed and " 15.0/15.0" not in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blimp.json", "flags.yaml"]
    result = json.loads((tmp_path / "blimp.json").read_text())
    assert result["settings"] == {"pll": "within-word", "limit_pairs": 5} and result["eval_rows"] == 15

    frame = pl.read_parquet(data / "blimp" / "blimp.parquet").filter(pl.col("pairID") < 5)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["bert"])
    model = AutoModelForMaskedLM.from_pretrained(checkpoints["bert"]).eval()
    good, bad = (
        [brute_force(model, tokenizer, text, "within-word") for text in frame[name].to_list()] for name in blimp.TEXTS
    )
    right = frame.with_columns(right=np.array(good) > np.array(bad))
    expected = {uid: right.filter(pl.col("UID") == uid)["right"].mean() for uid in PHENOMENA}
    assert result["phenomena"] == pytest.approx(expected)
    assert result["fields"] == pytest.approx(
        {
            "morphology": expected["agreement"],
            "syntax_semantics": (expected["binding"] + expected["island"]) / 2,  # type: ignore[operator]
        }
    )
    assert result["score"] == pytest.approx(100 * np.mean(list(expected.values())))
    assert result["metrics"] == {"accuracy": pytest.approx(result["score"] / 100)}
    assert f"{100 * result['fields']['morphology']:.1f}" in printed and "s of scoring" in printed

    before = (tmp_path / "blimp.json").stat().st_mtime_ns
    again = run(*command)
    assert "1 of 1 results exist already" in again and "rows/s" not in again
    assert (tmp_path / "blimp.json").stat().st_mtime_ns == before
    for changed, said in (
        (["--limit-pairs", 6], "limit_pairs: 5 → 6"),
        (["--limit-pairs", PAIRS], "limit_pairs: 5 → None"),
        (["--limit-pairs", 5, "--pll", "original"], "pll: within-word → original"),
    ):
        with pytest.raises(UsageError, match=rf"blimp.json has other settings \({said}\)"):
            glue.run.main([str(flag) for flag in (*flags, *changed, "--output", tmp_path)])


def test_beside_other_tasks_and_on_ray(checkpoints: dict[str, Path], words: list[str], tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, made_pairs(words))
    for seed, split in enumerate(("train", "dev")):
        write_rows(make_rows(GLUE["cola"], words, 16, seed), data / "cola" / f"{split}.parquet")
    models = [f"{name}={checkpoints[name]}" for name in ("bert", "modernbert")]
    flags = ["--model", *models, "--tasks", "cola,blimp", "--data", data, "--epochs", 1]
    flags += ["--max-length", 32]
    run(*GLUE_RUN, *flags, "--seeds", "1,2", "--num-workers", 2, "--output", tmp_path)
    for name in ("bert", "modernbert"):
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert files == ["blimp.json", "cola-seed1.json", "cola-seed2.json"]
    here = blimp_here(checkpoints["bert"], tmp_path / "here", data)
    there = json.loads((tmp_path / "bert" / "blimp.json").read_text())
    assert {**here, "seconds": 0, "device": ""} == {**there, "seconds": 0, "device": ""}
    printed = run(
        *COMPARE, *(f"{name}={tmp_path / name}" for name in ("bert", "modernbert")), "--output", tmp_path / "c"
    )
    assert "| cramming |" in printed and f"blimp is the share of {3 * PAIRS} pairs (all pairs)" in printed
    table = json.loads((tmp_path / "c" / "table.json").read_text())
    assert list(table["tasks"]) == ["cola", "blimp"] and not table["averages"]
    assert table["tasks"]["blimp"]["scores"]["bert"]["mean"] == here["score"]
    assert "| 1 (anecdote) | 2 |" in printed, "runs are fine-tunings"


def test_compared(checkpoints: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """BLiMP alone; in no average; and not with another number of pairs or another form."""
    outputs = {}
    for name, flags in {"all": [], "few": ["--limit-pairs", "5"], "alone": ["--pll", "original"]}.items():
        outputs[name] = tmp_path / name
        blimp_here(checkpoints["bert"], outputs[name], data, *flags)
    glue.compare.main([f"a={outputs['all']}", f"b={outputs['all']}", "--output", str(tmp_path / "c")])
    assert "| zero-shot | blimp | n | runs |" in (tmp_path / "c" / "table.md").read_text()
    assert "scored by the zero-shot protocol" in (tmp_path / "c" / "page.html").read_text()
    for name, said in (("few", "limit_pairs: None → 5"), ("alone", "pll: within-word → original")):
        with pytest.raises(UsageError, match=f"blimp was scored differently in a and b .{said}.; run both"):
            glue.compare.main([f"a={outputs['all']}", f"b={outputs[name]}", "--output", str(tmp_path / "d")])
    local = {task: {1: 0.5, 2: 0.6} for task in ("cola", "sst2", "mrpc", "rte", "stsb", "qnli")}
    for seed in (1, 2):
        made = write_results(tmp_path / f"made{seed}", local, summary("random", seed))
        result = json.loads((outputs["all"] / "blimp.json").read_text()) | {"training": summary("random", seed)}
        result["key"]["model_hash"] = json.loads((made / "cola-seed1.json").read_text())["key"]["model_hash"]
        (made / "blimp.json").write_text(json.dumps(result))
    glue.compare.main([f"random={tmp_path / 'made1'},{tmp_path / 'made2'}", "--output", str(tmp_path / "e")])
    table = json.loads((tmp_path / "e" / "table.json").read_text())
    assert table["averages"]["local6"]["random"]["mean"] == pytest.approx(55) and "blimp" in table["tasks"]
    assert table["tasks"]["blimp"]["scores"]["random"]["n"] == 2


def test_mistakes(checkpoints: dict[str, Path], words: list[str], data: Path, tmp_path: Path) -> None:
    """Each is one sentence with the thing and the mend, exit code 2."""
    good = made_pairs(words)

    def holding(name: str, frame: pl.DataFrame) -> list[object]:
        write(tmp_path / name, frame)
        return ["--data", tmp_path / name]

    def with_tokenizer(name: str, tokenizer: Any) -> list[object]:
        AutoModelForMaskedLM.from_pretrained(checkpoints["bert"]).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return ["--model", tmp_path / name, "--data", data]

    (tmp_path / "bare" / "blimp").mkdir(parents=True)
    maskless = AutoTokenizer.from_pretrained(checkpoints["bert"])
    maskless.mask_token = None
    whole = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "[PAD]": 2}, "[UNK]")),
        **{"unk_token": "[UNK]", "mask_token": "[MASK]", "pad_token": "[PAD]"},
    )
    cases: list[tuple[list[object], str]] = [
        ([], "needs --data: a directory with blimp/blimp.parquet"),
        (["--data", "hub"], "hub does not have it"),
        (["--data", tmp_path / "nothing"], "nothing has no directory blimp; put blimp.parquet in"),
        (["--data", tmp_path / "bare"], "bare/blimp has no blimp as .parquet"),
        (holding("column", good.drop("field")), "has no column 'field', only"),
        (holding("empty", good.clear()), "has no rows"),
        (holding("number", good.with_columns(pairID=pl.lit("one"))), "has values of a wrong type"),
        (holding("blank", good.with_columns(sentence_bad=pl.lit(" "))), "has an empty sentence_bad in row 1"),
        (holding("null", good.with_columns(sentence_bad=pl.lit(None))), "has no sentence_bad in row 1"),
        (["--data", data, "--model", tmp_path / "model"], "there is no model directory|neither a local"),
        (with_tokenizer("maskless", maskless), "has no mask token"),
        (with_tokenizer("whole", whole), "does not mark the tokens that continue a word; pass --pll original"),
    ]
    for flags, sentence in cases:
        with pytest.raises(UsageError, match=sentence):
            glue.run.main(
                [
                    *("--tasks", "blimp", "--output", str(tmp_path / "out")),
                    *([] if "--model" in flags else ["--model", str(checkpoints["bert"])]),
                    *map(str, flags),
                ]
            )
    flags = ["--model", "x", "--output", "x"]
    for wrong in ("--limit-pairs=-1", "--pll=other"):
        with pytest.raises(UsageError, match=f"argument {wrong.partition('=')[0]}: "):
            parse([*flags, "--tasks=blimp", wrong], "")
    with pytest.raises(UsageError, match="--limit-pairs only applies to the tasks blimp and pairs"):
        parse([*flags, "--tasks=cola", "--limit-pairs=1"], "")
    for wrong in ("--epochs=3", "--limit-train=100", "--drop-overlap", "--protocol=bert-grid", "--dtype=float32"):
        with pytest.raises(UsageError, match="has no effect on blimp and pairs, which are scored without"):
            parse([*flags, "--tasks=blimp", wrong], "")
    with pytest.raises(UsageError, match="--gpus-per-worker needs several workers; set --num-workers above 1"):
        parse([*flags, "--tasks=blimp", "--gpus-per-worker=0.5"], "")
    assert "needs --data" in refused(*GLUE_RUN, "--model", checkpoints["bert"], "--tasks", "blimp", *flags[2:])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_scored_fails(
    checkpoints: dict[str, Path], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sentence without positions, and a model that has diverged; a head that mixes positions runs at all of them."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["bert"])
    long = pl.DataFrame({"sentence_good": [" ".join(words)], "sentence_bad": [words[0]]})
    with pytest.raises(RunError, match=r"the longest sentence of the pairs cannot be scored: .*bert cannot be run on"):
        blimp.score(checkpoints["bert"], blimp.encode(blimp.Pairs(long, None, ""), tokenizer, "original"))
    short = long.with_columns(sentence_good=pl.lit(" ".join(words[:5])))
    sentences = blimp.encode(blimp.Pairs(short, None, ""), tokenizer, "original")
    model = AutoModelForMaskedLM.from_pretrained(checkpoints["bert"])
    handle = model.cls.register_forward_pre_hook(lambda module, args: (args[0].cumsum(1),))
    monkeypatch.setattr(glue.blimp, "load_masked_lm", lambda directory, trust: model)
    found_2N, expected_U = blimp.score(checkpoints["bert"], sentences), np.zeros(len(sentences.tokens))
    for number, row in enumerate(sentences.rows):
        inputs, (position,), (target,) = blimp.masked_batch(sentences, np.array([number]))
        expected_U[row] += float(model(**inputs).logits[0, position].log_softmax(-1)[target].detach())
    assert found_2N == pytest.approx(expected_U[sentences.numbers], abs=1e-4)
    handle.remove()
    model.cls.predictions.bias.data[0] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        blimp.score(checkpoints["bert"], sentences)
