"""A sample of the census made again: every odd case of transformers, one architecture of each source file of timm."""

import warnings

import census
import pytest
import torch

ROWS = census.read()
ODD = {
    "called as functions": "whisper deberta-v2 convbert roformer distilbert roberta camembert data2vec-text esm",
    "one module called often, or at several paths": "albert xlm openai-gpt electra",
    "gates, poolers, soft caps beside it": "bert ernie big_bird gemma2 canine fnet ibert dpr",
    "state space and convolution": "mamba mamba2 falcon_mamba falcon_h1 bamba rwkv recurrent_gemma",
    "experts": "qwen3_moe gpt_oss deepseek_v3 olmoe jetmoe granitemoe mixtral",
    "indexers, which only select": "deepseek_v32",
    "parameters of its own": "apertus",
    "encoder and decoder": "t5 bart pegasus fsmt blenderbot",
    "decoders": "gpt2 bloom gpt_neox gpt_bigcode falcon llama gemma3_text phi3 biogpt bitnet cohere2 mpt nemotron",
    "images": "vit deit dinov3_convnext convnextv2 clip aimv2 swin siglip levit",
    "parts with configs of their own, of all the same values": "pocket_tts_audio_tokenizer",
    "images and text": "llava aria blip",
    "series": "autoformer patchtst",
    "and more": "olmo2 qwen2 qwen2_moe xlnet rembert roc_bert yoso mpnet",
}
KINDS = [kind for kinds in ODD.values() for kind in kinds.split()]
NAMED = {name.partition("/")[0].partition(":")[2]: name for name in ROWS if name.startswith("transformers:")}
FILES = [name.partition(":")[2] for name in census.smallest()]
QUICK = [n for n in FILES if 2 * ROWS[f"timm:{n}"]["sites"] < 80]
SAME = ("sites", "heads", "targets", "calls", "left_calls")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, for configs that nobody trained
        yield


def check_trip(trip):
    assert trip["equal"], "reloads bit-equal"
    assert trip["loud"], "fails without orthoact, and says so"
    assert trip["original"] and not trip["silent"] and trip["reached"] > 0


def check_row(row):
    stored = ROWS[f"{row['library']}:{row['name']}"]
    assert row["built"] and row["ran"] and row["checked"], "the whole model was run"
    assert census.plain({k: row[k] for k in SAME}) == {k: stored[k] for k in SAME if k in stored}
    assert not row["unnamed"], "an operator ran that is neither converted nor named"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers(kind):
    row = census.transformers_row(NAMED[kind].partition(":")[2], "transformers")
    check_row(row)
    if row["sites"] and not row["meta"]:  # a large one has no weights to save
        check_trip(row["trip"])


@pytest.mark.parametrize("name", FILES)
def test_timm(name):
    check_row(census.timm_row(name))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in {"coat_tiny", *QUICK[::8]} else pytest.mark.long) for n in FILES]
)
def test_the_round_trip_of_timm(name):
    torch.manual_seed(0)
    check_trip(census.timm_trip(name))


def test_the_sample_is_large_enough():
    assert len(set(KINDS)) >= 60 and len(FILES) >= 60
