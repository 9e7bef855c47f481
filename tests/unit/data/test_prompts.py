import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.schema import PromptData
from rlhf_ray.data.prompts import PromptSet, cut_left, load_prompts
from rlhf_ray.errors import DataError
from tests.unit.data.tokenizers_for_tests import BOS_CHAT, CHATML, byte_tokenizer, merging_tokenizer

SHARED = Path(__file__).parents[3].parent / "shared" / "data"


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"prompt": row}) + "\n" for row in rows))
    return str(path)


def load(tmp_path: Path, rows: list[Any], *, tokenizer: Any = None, seed: int = 1, **settings: Any) -> PromptSet:
    data = PromptData(train=write(tmp_path / "d.jsonl", rows), **settings)
    return load_prompts(data, tokenizer or byte_tokenizer(bos=True), seed=seed, sources="train")


def body(text: str) -> list[int]:
    return list(byte_tokenizer()(text)["input_ids"])


def test_prompts_keep_text_answer_and_row_number(tmp_path: Path) -> None:
    rows = [{"q": "1 + 1 =", "a": "2"}, {"q": "1 + 2 =", "a": 3}]
    prompts = load(tmp_path, rows, columns={"prompt": "q", "answer": "a"}).all()
    assert prompts.token_ids == [[0, *body("1 + 1 =")], [0, *body("1 + 2 =")]]
    assert prompts.texts == ["1 + 1 =", "1 + 2 ="]
    assert prompts.answers == ["2", 3]
    assert prompts.ids == [0, 1]


def test_batches_of_one_pass_hold_every_prompt_once_and_depend_on_the_iteration_only(tmp_path: Path) -> None:
    rows = [f"prompt {i}" for i in range(12)]
    prompts = load(tmp_path, rows)
    assert sorted(i for iteration in range(3) for i in prompts.batch(iteration, 4).ids) == list(range(12))
    assert load(tmp_path, rows).batch(7, 4) == prompts.batch(7, 4)
    assert load(tmp_path, rows, seed=2).batch(0, 12).ids != prompts.batch(0, 12).ids
    assert load(tmp_path, rows, shuffle=False).batch(1, 5).ids == [5, 6, 7, 8, 9]
    # A batch larger than the data goes on into the next pass.
    assert sorted(prompts.batch(0, 24).ids) == sorted([*range(12), *range(12)])


def test_rows_are_those_of_the_data_in_its_order(tmp_path: Path) -> None:
    prompts = load(tmp_path, [f"prompt {i}" for i in range(5)])
    assert prompts.rows(0, 3).ids == [0, 1, 2]
    assert prompts.rows(3, 3).ids == [3, 4]
    assert prompts.take(2, 2) == prompts.batch(1, 2)


def test_messages_are_kept_beside_their_rendered_text(tmp_path: Path) -> None:
    long, chat = "x" * 30, [{"role": "user", "content": "Hi"}]
    tokenizer = byte_tokenizer(template=CHATML)
    prompts = load(tmp_path, [long, "text", chat], tokenizer=tokenizer, max_prompt_tokens=29, too_long="drop")
    assert prompts.ids == [1, 2]
    assert [prompts.messages_of(i) for i in prompts.ids] == [[], chat]


def test_ids_are_unique_over_sources_and_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [f"a{i}" for i in range(5)])
    second = write(tmp_path / "b.jsonl", [f"b{i}" for i in range(5)])
    data = PromptData(train=[{"path": first, "weight": 4}, second])
    prompts = load_prompts(data, byte_tokenizer(), seed=3, sources="train")
    assert prompts.all().ids == list(range(10))
    drawn = prompts.batch(0, 2000)
    assert sum(text.startswith("a") for text in drawn.texts) / 2000 == pytest.approx(0.8, abs=0.03)
    assert all(text == ("a" if i < 5 else "b") + str(i % 5) for text, i in zip(drawn.texts, drawn.ids, strict=True))


def test_evaluation_sources_are_apart(tmp_path: Path) -> None:
    data = PromptData(train=write(tmp_path / "a.jsonl", ["a"]), evaluation=write(tmp_path / "b.jsonl", ["b", "c"]))
    prompts = load_prompts(data, byte_tokenizer(), seed=1, sources="evaluation")
    assert (len(prompts), prompts.all().texts) == (2, ["b", "c"])


@pytest.mark.parametrize(
    ("too_long", "ids", "texts"),
    [
        ("drop", [body("abc")], ["abc"]),
        ("cut_right", [body("abc"), body("abcd")], ["abc", "abcd"]),
        ("cut_left", [body("abc"), body("cdef")], ["abc", "cdef"]),
    ],
)
def test_too_long_prompts(tmp_path: Path, too_long: str, ids: list[list[int]], texts: list[str]) -> None:
    settings = {"max_prompt_tokens": 5, "too_long": too_long}
    prompts = load(tmp_path, ["abc", "abcdef"], **settings)
    assert prompts.all().token_ids == [[0, *row] for row in ids]
    assert prompts.all().texts == texts
    dropped = too_long == "drop"
    assert prompts.report == {"rows": 2, "used": 2 - dropped, "dropped": int(dropped), "cut": int(not dropped)}
    # Without BOS the same rows are cut to four tokens and nothing stays in front.
    bare = load(tmp_path, ["abc", "abcdef"], tokenizer=byte_tokenizer(), max_prompt_tokens=4, too_long=too_long)
    assert bare.all().token_ids == ids


def test_a_too_long_prompt_is_an_error_by_default(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"d.jsonl:2: the prompt has 7 tokens, wanted at most 5 \(data.max_prompt_tokens\)"
    ):
        load(tmp_path, ["abc", "abcdef"], max_prompt_tokens=5)


def test_no_row_left(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d.jsonl: no row is left, all are longer than data.max_prompt_tokens \(3\)"):
        load(tmp_path, ["abc", "abcdef"], max_prompt_tokens=3, too_long="drop")
    with pytest.raises(DataError, match=r"d.jsonl: no row is left, all are shorter than data.prompt_length.min"):
        load(tmp_path, ["abc"], prompt_length={"min": 10, "max": 12})


def test_row_numbers_stay_when_rows_are_dropped(tmp_path: Path) -> None:
    prompts = load(tmp_path, ["abcdefgh", "abc", "abd"], max_prompt_tokens=5, too_long="drop")
    assert prompts.all().ids == [1, 2]


def test_cut_left_by_hand() -> None:
    assert cut_left([9, 1, 2, 3, 4], 3, (9,)) == [9, 3, 4]
    assert cut_left([1, 2, 3, 4], 3, (9,)) == [2, 3, 4]
    assert cut_left([9, 1, 2], 1, (9,)) == [2]


def test_prompt_length_takes_the_first_tokens_of_each_text(tmp_path: Path) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    prompts = load(tmp_path, [text, "abcdefghijk", "ab"], prompt_length={"min": 4, "max": 20})
    assert prompts.report == {"rows": 3, "used": 2, "dropped": 1, "cut": 0}
    lengths = []
    for number in range(40):
        batch = prompts.batch(number, 2)
        for ids, cut, row in zip(batch.token_ids, batch.texts, batch.ids, strict=True):
            whole = [0, *body(text if row == 0 else "abcdefghijk")]
            assert ids == whole[: len(ids)]
            assert cut == text[: len(ids) - 1]
            assert 4 <= len(ids) <= (20 if row == 0 else 12)
            if row == 0:
                lengths.append(len(ids))
    assert len(set(lengths)) > 10  # drawn anew in each pass
    assert min(lengths) <= 6
    assert max(lengths) >= 18
    again = load(tmp_path, [text, "abcdefghijk", "ab"], prompt_length={"min": 4, "max": 20})
    assert again.batch(17, 2) == prompts.batch(17, 2)
    assert again.all() == prompts.all()
    other = load(tmp_path, [text, "abcdefghijk", "ab"], seed=2, prompt_length={"min": 4, "max": 20})
    assert [other.batch(i, 2).token_ids for i in range(9)] != [prompts.batch(i, 2).token_ids for i in range(9)]


def test_prompt_length_of_exactly_one_value(tmp_path: Path) -> None:
    prompts = load(tmp_path, ["abcdef"], tokenizer=byte_tokenizer(), prompt_length={"min": 3, "max": 3})
    assert prompts.batch(0, 1).texts == ["abc"]
    exact = load(tmp_path, ["abc", "ab"], tokenizer=byte_tokenizer(), prompt_length={"min": 3, "max": 9})
    assert (exact.all().texts, exact.report["dropped"]) == (["abc"], 1)


@pytest.mark.parametrize("bos", [True, False])
def test_messages_go_through_the_template_without_a_second_bos(tmp_path: Path, bos: bool) -> None:
    rows = [[{"role": "user", "content": "Hi"}], "Hi"]
    tokenizer = byte_tokenizer(bos=bos, template=BOS_CHAT)
    prompts = load(tmp_path, rows, tokenizer=tokenizer).all()
    assert prompts.token_ids == [[0, *body("[user]Hi[assistant]")], [0] * bos + body("Hi")]
    assert prompts.texts == ["<s>[user]Hi[assistant]", "Hi"]
    templated = load(tmp_path, rows, tokenizer=tokenizer, chat_template=True).all()
    assert templated.token_ids[0] == templated.token_ids[1] == prompts.token_ids[0]


def test_chatml_prompts_end_with_the_assistants_header(tmp_path: Path) -> None:
    rows = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]]
    prompts = load(tmp_path, rows, tokenizer=byte_tokenizer(bos=True, template=CHATML)).all()
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.texts == [text]
    assert prompts.token_ids == [body(text)]


def test_tokenizers_with_merges(tmp_path: Path) -> None:
    texts = [f"the cat sat on mat number {i}" for i in range(30)]
    tokenizer = merging_tokenizer(texts)
    prompts = load(tmp_path, texts, tokenizer=tokenizer).all()
    assert [tokenizer.decode(ids) for ids in prompts.token_ids] == texts
    assert len(prompts.token_ids[0]) < len(texts[0])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models and texts are not beside this checkout")
def test_real_tokenizers_and_texts() -> None:
    from transformers import AutoTokenizer

    data = PromptData(train=str(SHARED / "instructions" / "tinystories.test.jsonl.gz"))
    stories = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260k-llama-hd32")
    prompts = load_prompts(data, stories, seed=1, sources="train").all()
    assert len(prompts) == 29
    assert all(ids[0] == 1 and 1 not in ids[1:] for ids in prompts.token_ids)
    gpt2 = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    reviews = PromptData(
        train=str(SHARED / "sentiment" / "rt-sentences.test.jsonl.gz"),
        columns={"prompt": "text"},
        prompt_length={"min": 2, "max": 8},
    )
    cut = load_prompts(reviews, gpt2, seed=1, sources="train").batch(0, 64)
    assert {len(ids) for ids in cut.token_ids} <= set(range(2, 9))
    assert [gpt2(text)["input_ids"] for text in cut.texts] == cut.token_ids
