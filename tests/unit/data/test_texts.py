import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.schema import TextData
from rlhf_ray.data.batches import Sequences
from rlhf_ray.data.texts import TextSet, check_texts, load_texts, texts_for_tokenizer
from rlhf_ray.errors import DataError
from tests.unit.data.tokenizers_for_tests import BOS_CHAT, CHATML, byte_tokenizer

SHARED = Path(__file__).parents[3].parent / "shared" / "data"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(
    tmp_path: Path, rows: list[dict[str, Any]], *, tokenizer: Any = None, seed: int = 1, **settings: Any
) -> TextSet:
    data = TextData(train=write(tmp_path / "d.jsonl", rows), **settings)
    return load_texts(data, tokenizer or byte_tokenizer(bos=True), seed=seed, sources="train")


def shown(sequences: Sequences, row: int, *, trained: bool) -> str:
    """The row's text with special tokens; trained: only the tokens that are trained, with · for each other."""
    tokenizer = byte_tokenizer()
    length = int(sequences.attention_mask[row].sum())
    pieces = [tokenizer.decode([token]) for token in sequences.tokens[row, :length].tolist()]
    mask = sequences.response_mask[row, :length].tolist()
    return "".join(piece if flag or not trained else "·" for piece, flag in zip(pieces, mask, strict=True))


def test_prompts_are_masked_and_responses_end_in_eos(tmp_path: Path) -> None:
    texts = load(tmp_path, [{"prompt": "ab", "response": " cde"}, {"prompt": "a", "response": "b</s>"}]).all()
    assert shown(texts, 0, trained=False) == "<s>ab cde</s>"
    assert shown(texts, 0, trained=True) == "··· cde</s>"
    assert shown(texts, 1, trained=True) == "··b</s>"
    assert texts.attention_mask.sum(1).tolist() == [8, 4]
    assert not texts.response_mask[1, 4:].any()


def test_train_on_prompt_leaves_out_position_0_only(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "response": "c"}]
    assert shown(load(tmp_path, rows, train_on_prompt=True).all(), 0, trained=True) == "·abc</s>"
    bare = load(tmp_path, rows, tokenizer=byte_tokenizer(), train_on_prompt=True).all()
    assert shown(bare, 0, trained=True) == "·bc</s>"


def test_plain_text_is_trained_as_a_whole(tmp_path: Path) -> None:
    rows = [{"text": "abc"}]
    assert shown(load(tmp_path, rows).all(), 0, trained=True) == "·abc</s>"
    assert shown(load(tmp_path, rows, tokenizer=byte_tokenizer()).all(), 0, trained=True) == "·bc</s>"


def test_one_token_for_begin_and_end(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(bos=True, eos="<s>")
    texts = load(tmp_path, [{"prompt": "a", "response": "b"}], tokenizer=tokenizer).all()
    assert shown(texts, 0, trained=True) == "··b<s>"
    assert shown(load(tmp_path, [{"text": "b"}], tokenizer=tokenizer).all(), 0, trained=True) == "·b<s>"


def test_the_columns_decide_the_form(tmp_path: Path) -> None:
    row = {"text": "abc", "prompt": "x", "response": "y", "chosen": "z"}
    assert shown(load(tmp_path, [row]).all(), 0, trained=True) == "··y</s>"
    assert shown(load(tmp_path, [row], columns={"response": "chosen"}).all(), 0, trained=True) == "··z</s>"
    assert shown(load(tmp_path, [row], columns={"text": "chosen"}).all(), 0, trained=True) == "·z</s>"
    with pytest.raises(
        DataError, match=r"no column 'chose'; .*did you mean 'chosen'\? .* Wanted columns: 'prompt' and 'chose'\."
    ):
        load(tmp_path, [row], columns={"response": "chose"})


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "So"},
    {"role": "assistant", "content": "No"},
]


def test_only_the_assistants_tokens_are_trained(tmp_path: Path) -> None:
    texts = load(tmp_path, [{"messages": CHAT}], tokenizer=byte_tokenizer(bos=True, template=BOS_CHAT)).all()
    assert shown(texts, 0, trained=False) == "<s>[user]Hi[assistant]Yes</s>[user]So[assistant]No</s>"
    assert shown(texts, 0, trained=True) == "·" * 20 + "Yes</s>" + "·" * 19 + "No</s>"


def test_an_end_of_turn_that_is_eos_ends_the_target(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(template=CHATML, eos="<|im_end|>")
    texts = load(tmp_path, [{"messages": CHAT}], tokenizer=tokenizer).all()
    assert shown(texts, 0, trained=False).endswith("assistant\nNo<|im_end|>")
    assert shown(texts, 0, trained=True).replace("·", "") == "Yes<|im_end|>No<|im_end|>"


def test_eos_is_appended_where_the_template_has_none(tmp_path: Path) -> None:
    texts = load(tmp_path, [{"messages": CHAT}], tokenizer=byte_tokenizer(template=CHATML)).all()
    assert shown(texts, 0, trained=True).replace("·", "") == "Yes<|im_end|>\nNo<|im_end|>\n</s>"


def test_a_template_that_rewrites_what_it_wrote_is_refused(tmp_path: Path) -> None:
    forgetful = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(DataError, match=r"d.jsonl:1: .*template changes what it wrote before message 4"):
        load(tmp_path, [{"messages": CHAT}], tokenizer=byte_tokenizer(template=forgetful))
    thinking = BOS_CHAT.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")
    with pytest.raises(DataError, match=r"d.jsonl:1: .*template changes what it wrote before message 2"):
        load(tmp_path, [{"messages": CHAT}], tokenizer=byte_tokenizer(template=thinking))


@pytest.mark.parametrize(
    ("too_long", "kept", "trained"),
    [("cut_right", "<s>abcd", "···cd"), ("cut_left", "<s>cde</s>", "·cde</s>")],
)
def test_too_long_texts_are_cut(tmp_path: Path, too_long: str, kept: str, trained: str) -> None:
    rows = [{"prompt": "ab", "response": "cde"}, {"prompt": "a", "response": "b"}]
    texts = load(tmp_path, rows, max_length=5, too_long=too_long)
    assert shown(texts.all(), 0, trained=False) == kept
    assert shown(texts.all(), 0, trained=True) == trained
    assert texts.report == {"rows": 2, "used": 2, "dropped": 0, "cut": 1}


def test_too_long_texts_are_dropped_or_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "response": "cde"}, {"prompt": "a", "response": "b"}]
    assert load(tmp_path, rows, max_length=5, too_long="drop").report == {"rows": 2, "used": 1, "dropped": 1, "cut": 0}
    with pytest.raises(DataError, match=r"d.jsonl:1: the text has 7 tokens, wanted at most 5 \(data.max_length\)"):
        load(tmp_path, rows, max_length=5, too_long="error")


def test_a_row_whose_response_is_cut_away_is_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "abcdef", "response": "g"}, {"prompt": "a", "response": "b"}]
    assert load(tmp_path, rows, max_length=6).report == {"rows": 2, "used": 1, "dropped": 1, "cut": 0}
    with pytest.raises(DataError, match=r"d.jsonl: no row is left"):
        load(tmp_path, rows[:1], max_length=6)


def test_epochs_hold_every_text_once_and_batches_depend_on_the_step_only(tmp_path: Path) -> None:
    rows = [{"text": f"text {i:02d}"} for i in range(10)]
    texts = load(tmp_path, rows)
    assert texts.steps_per_epoch(4) == 3
    for epoch in range(2):
        batches = [texts.batch(3 * epoch + step, 4) for step in range(3)]
        assert [len(batch) for batch in batches] == [4, 4, 2]
        seen = [shown(batch, row, trained=False) for batch in batches for row in range(len(batch))]
        assert sorted(seen) == [f"<s>text {i:02d}</s>" for i in range(10)]
    fresh = load(tmp_path, rows)
    assert fresh.batch(5, 4).tokens.tolist() == texts.batch(5, 4).tokens.tolist()
    assert fresh.batch(2, 4).tokens.tolist() != texts.batch(5, 4).tokens.tolist()


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load(tmp_path, [{"text": "a"}], tokenizer=tokenizer)


def test_counts_and_raw_texts(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"prompt": "ab", "response": " c"}])
    chat = write(tmp_path / "b.jsonl", [{"messages": CHAT}])
    data = TextData(train=[train, chat], evaluation=train)
    assert check_texts(data) == {"train": 2, "evaluation": 1}
    assert texts_for_tokenizer(data) == ["ab c", "Hi\nYes\nSo\nNo"]
    assert len(load_texts(data, byte_tokenizer(template=BOS_CHAT), seed=1, sources="evaluation")) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and texts are not beside this checkout")
def test_real_tokenizers_and_texts() -> None:
    from transformers import AutoTokenizer

    for name in ("models/stories260k-llama-hd32", "tokenizers/gpt2"):
        tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
        data = TextData(train=str(SHARED / "instructions" / "tinystories.test.jsonl.gz"))
        texts = load_texts(data, tokenizer, seed=1, sources="train")
        batch = texts.all()
        for row, text in enumerate(texts_for_tokenizer(data)):
            ids = batch.tokens[row, batch.attention_mask[row]].tolist()
            if len(ids) < 512:
                assert ids[-1] == tokenizer.eos_token_id
                assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()
