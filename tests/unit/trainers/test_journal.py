import pandas as pd
import pytest
import torch

from rlhf_ray.data.batches import Rollouts, make_sequences, one_version
from rlhf_ray.errors import CheckpointError
from rlhf_ray.trainers import journal
from rlhf_ray.trainers.journal import read_rollouts, write_rollouts


def rollouts() -> Rollouts:
    sequences = make_sequences([[5, 6], [5, 6], [7]], [[1, 2, 3], [4], [8, 9]])
    logprobs = -torch.rand(sequences.tokens.shape, generator=torch.Generator().manual_seed(0)) * sequences.response_mask
    return Rollouts(
        sequences=sequences,
        generator_logprobs=logprobs,
        finished=torch.tensor([True, False, True]),
        prompts=["a film", "a film", 'ünï "quoted"\n'],
        responses=["one two", "", "\x1b[31mred"],
        answers=[42, None, {"x": [1]}],
        prompt_ids=torch.tensor([3, 3, 8]),
        # The first row went on under weights one iteration newer.
        policy_versions=one_version(sequences, 7) + torch.tensor([[0, 0, 0, 1, 1], [0] * 5, [0] * 5]),
    )


def test_pandas_reads_what_a_person_wants_to_see(tmp_path):
    path = tmp_path / "rollouts" / "iteration_000001.parquet"
    scores = torch.tensor([0.5, -1.0, 2.0])
    write_rollouts(path, rollouts(), scores=scores, parts={"lexicon": scores * 2}, kl=torch.tensor([0.1, 0.2, 0.3]))
    frame = pd.read_parquet(path)
    assert frame["prompt"].tolist() == rollouts().prompts
    assert frame["response"].tolist() == rollouts().responses
    assert frame["score"].tolist() == [0.5, -1.0, 2.0]
    assert frame["score_lexicon"].tolist() == [1.0, -2.0, 4.0]
    assert frame["kl"].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert frame["length"].tolist() == [3, 1, 2]
    assert frame["finished"].tolist() == [True, False, True]
    assert frame["policy_version"].tolist() == [7, 7, 7]
    assert frame["prompt_id"].tolist() == [3, 3, 8]
    assert frame["sample_index"].tolist() == [0, 1, 0]
    assert frame["tokens"][1].tolist() == [5, 6, 4]


def test_the_batch_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "x.parquet"
    written = rollouts()
    scores, kl = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1e-7, 2.0, 3.0])
    write_rollouts(path, written, scores=scores, parts={"a": scores}, kl=kl)
    entry = read_rollouts(path)
    for name in ("tokens", "attention_mask", "response_mask"):
        assert torch.equal(getattr(entry.rollouts.sequences, name), getattr(written.sequences, name)), name
    assert torch.equal(entry.rollouts.generator_logprobs, written.generator_logprobs)
    assert torch.equal(entry.rollouts.finished, written.finished)
    assert torch.equal(entry.rollouts.prompt_ids, written.prompt_ids)
    assert entry.rollouts.prompts == written.prompts
    assert entry.rollouts.answers == [42, None, {"x": [1]}]
    assert torch.equal(entry.rollouts.policy_versions, written.policy_versions)
    assert torch.equal(entry.scores, scores)
    assert torch.equal(entry.parts["a"], scores)
    assert torch.equal(entry.kl, kl)


def test_kl_that_was_not_measured_is_null(tmp_path):
    path = tmp_path / "x.parquet"
    write_rollouts(path, rollouts(), scores=torch.zeros(3))
    assert pd.read_parquet(path)["kl"].isna().all()
    assert read_rollouts(path).kl.isnan().all()


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    write_rollouts(path, rollouts(), scores=torch.ones(3))

    def fails(table, target, **kwargs):
        target.write_bytes(b"PAR1 half")
        raise OSError("no space left on device")

    monkeypatch.setattr(journal.pq, "write_table", fails)
    with pytest.raises(OSError, match="no space"):
        write_rollouts(path, rollouts(), scores=torch.zeros(3))
    assert read_rollouts(path).scores.tolist() == [1.0, 1.0, 1.0]


def test_a_torn_file_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    write_rollouts(path, rollouts(), scores=torch.ones(3))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"x\.parquet"):
        read_rollouts(path)
