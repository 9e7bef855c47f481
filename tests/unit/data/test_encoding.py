import pytest

from rlhf_ray.data.encoding import Encoder, blocks, check_messages, check_text
from rlhf_ray.errors import DataError
from tests.unit.data.tokenizers_for_tests import BOS_CHAT, CHATML, byte_tokenizer, merging_tokenizer, spaced_tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_a_tokenizer_that_adds_bos_puts_it_in_front_once() -> None:
    encoder = Encoder.of(byte_tokenizer(bos=True))
    assert encoder.prefix == (0,)
    plain = byte_tokenizer()("Hi")["input_ids"]
    assert encoder.texts(["Hi", "<s>Hi"]) == [[0, *plain], [0, *plain]]


def test_a_tokenizer_without_bos_adds_nothing() -> None:
    encoder = Encoder.of(byte_tokenizer())
    assert encoder.prefix == ()
    assert encoder.texts(["Hi"]) == [byte_tokenizer()("Hi")["input_ids"]]


def test_what_a_tokenizer_appends_is_left_out() -> None:
    encoder = Encoder.of(byte_tokenizer(bos=True, appends_eos=True))
    assert encoder.tokenizer("Hi")["input_ids"][-1] == 1
    assert encoder.texts(["Hi"])[0][-1] != 1
    assert encoder.prefix == (0,)


@pytest.mark.parametrize("bos", [True, False])
def test_a_template_brings_its_own_bos(bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos, template=BOS_CHAT)
    encoder = Encoder.of(tokenizer)
    ids = encoder.render(MESSAGES, "x:1", generation_prompt=True)
    assert encoder.render_text(MESSAGES, "x:1") == "<s>[user]Hi[assistant]"
    assert ids == tokenizer("<s>[user]Hi[assistant]", add_special_tokens=False)["input_ids"]
    assert ids.count(0) == 1
    assert Encoder.of(byte_tokenizer(bos=bos, template=CHATML)).render(MESSAGES, "x:1", generation_prompt=True)[0] == 2


def test_a_missing_or_refusing_template_is_named_with_the_row() -> None:
    with pytest.raises(DataError, match=r"^x:1: chat messages need a chat template, and the tokenizer has none"):
        Encoder.of(byte_tokenizer()).render(MESSAGES, "x:1", generation_prompt=True)
    refusing = byte_tokenizer(template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(DataError, match=r"^x:1: .*template refuses these messages: System role not supported"):
        Encoder.of(refusing).render(MESSAGES, "x:1", generation_prompt=True)


def test_a_response_has_the_tokens_that_follow_the_prompt() -> None:
    encoder = Encoder.of(merging_tokenizer(["the cat sat on the mat"] * 9))
    [(head, tail)] = encoder.continuations(["the cat"], [" sat on"])
    assert [head, tail] == [encoder.plain(["the cat"])[0], encoder.plain([" sat on"])[0]]


def test_tokens_that_would_merge_over_the_seam_leave_the_prompt_as_sampling_sees_it() -> None:
    encoder = Encoder.of(merging_tokenizer(["the cat sat on the mat"] * 9))
    prompt, response = "the ca", "t sat"
    [(head, tail)] = encoder.continuations([prompt], [response])
    assert head == encoder.plain([prompt])[0]
    assert encoder.plain([prompt + response])[0] != [*head, *tail]
    assert encoder.tokenizer.decode([*head, *tail]) == "the cat sat"


def test_no_space_is_put_before_a_response() -> None:
    encoder = Encoder.of(spaced_tokenizer())
    pairs = encoder.continuations(["ab", "ab"], ["de", "cd"])
    shown = [encoder.tokenizer.convert_ids_to_tokens([*head, *tail]) for head, tail in pairs]
    # The second pair would merge to ▁ a bc d.
    assert shown == [["<s>", "▁", "a", "b", "d", "e"], ["<s>", "▁", "a", "b", "c", "d"]]


def test_blocks() -> None:
    assert list(blocks(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(blocks([], 2)) == []


def test_values_that_pass_come_back() -> None:
    assert check_text(" a", "prompt", "x:1") == " a"
    message = {"role": "user", "content": "Hi", "name": None}
    assert check_messages([message], "prompt", "x:1") == MESSAGES
    assert check_messages([{"role": "system", "content": ""}, message], "prompt", "x:1")[0]["content"] == ""


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Hi", r"a string \('Hi'\); wanted chat messages"),
        (["Hi"], r"message 1 is a string \('Hi'\)"),
        ([{"role": "user", "content": None}], "message 1: 'content' is null; wanted a string"),
        ([{"content": "Hi"}], "message 1: 'role' is missing"),
        ([*MESSAGES, {"role": "assistant", "content": " "}], "message 2: 'content' is empty"),
    ],
)
def test_wrong_messages(value: object, words: str) -> None:
    with pytest.raises(DataError, match=rf"^x:1: column 'chat'.*{words}"):
        check_messages(value, "chat", "x:1")
