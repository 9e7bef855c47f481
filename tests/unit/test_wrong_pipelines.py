"""The corpus of wrong pipeline files: each exits 2, and its message has the path, and what is wrong, in words."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.cli import main

REPOSITORY = Path(__file__).parents[2]
CORPUS = REPOSITORY / "tests" / "wrong_files" / "pipelines"

# File -> the path (and line) where the mistake is, then words that the same message must have.
CASES: dict[str, tuple[str, ...]] = {
    "unknown_setting": ("sampling.temprature (line 7)", "no such setting", "`temperature`"),
    "setting_of_another_section": ("policy.learning_rate (line 4)", "`policy.optimizer.learning_rate`"),
    "missing_setting": ("iterations", "missing", "a whole number"),
    "text_for_number": ("iterations (line 3)", "got 'ten'", "a whole number, at least 1"),
    "boolean_for_count": ("epochs (line 7)", "got true", "a whole number"),
    "boolean_for_number": ("kl.coefficient (line 7)", "got true", "a number, at least 0"),
    "fraction_for_count": ("prompts_per_iteration (line 7)", "got 1.5", "a whole number"),
    "out_of_range": ("sampling.top_p (line 7)", "got 1.5", "above 0 and at most 1"),
    "infinite_number": ("policy.optimizer.learning_rate (line 4)", "got Infinity", "a number, above 0"),
    "unknown_choice": ("advantages.estimator (line 7)", "got 'gea'", "one of gae", "`gae`"),
    "unknown_method": ("method (line 2)", "got 'poo'", "sft, reward_model, ppo", "`ppo`"),
    "unknown_reward_kind": ("reward.0.kind (line 5)", "got 'functoin'", "`function`"),
    "missing_reward_kind": ("reward.0.kind (line 5)", "missing", "model, classifier, function"),
    "no_rewards": ("reward (line 5)", "got a list []", "a list"),
    "number_for_text": ("run_dir (line 1)", "got 2024", "in quotes: '2024'"),
    "number_for_section": ("sampling (line 7)", "got 3", "a section (temperature"),
    "empty_section": ("sampling (line 7)", "got nothing"),
    "list_of_wrong_length": ("policy.optimizer.betas (line 4)", "got a list [0.9]", "a list of 2"),
    "wrong_model_section": ("policy.model.size (line 4)", "got 'tini'", "`tiny`"),
    "key_given_twice": ("sampling.top_k (line 7)", "given twice", "line 7"),
    "broken_yaml": ("broken_yaml.yaml:4:1", "not valid YAML"),
    "tab_indentation": ("tab_indentation.yaml:3:1", "spaces, not tabs"),
    "empty_file": ("empty_file.yaml", "the file is empty"),
    "list_at_the_top": ("list_at_the_top.yaml", "got a list", "`key: value`"),
    "key_is_a_number": ("kl", "line 7", "a key is not text"),
    "recursive_alias": ("recursive_alias.yaml:7", "inside its own anchor"),
    "python_object": ("python_object.yaml:1", "not valid YAML", "could not determine a constructor"),
    "not_utf8": ("not_utf8.yaml", "byte 12 is not UTF-8"),
    "no_method": ("method", "neither `stages` nor a `method`"),
    "setting_beside_stages": ("iterations (line 13)", "belongs into a stage", "ppo.iterations"),
    "no_stages": ("stages (line 2)", "got a list []"),
    "stage_name_twice": ("stages.1.name (line 7)", "got 'sft'", "stage 1 too"),
    "stage_name_with_a_slash": ("ppo/main.name (line 7)", "letters, digits"),
    "stage_name_reserved": ("seed.name (line 7)", "a setting of the pipeline"),
    "unknown_stage": ("ppo.policy.model (line 10)", "got 'stage:stf'", "an earlier stage: sft", "`sft`"),
    "later_stage": ("sft.policy.model (line 5)", "got 'stage:ppo'", "comes later"),
    "stage_in_a_single_method": ("policy.model (line 4)", "got 'stage:sft'", "first stage"),
    "reward_from_a_language_model": ("ppo.reward.0.model (line 11)", "makes a language model", "one logit"),
    "policy_from_a_reward_model": ("ppo.policy.model (line 10)", "makes a reward model", "wanted a language model"),
    "fresh_reward_model": ("policy.model (line 3)", "a fresh model", "put an sft stage"),
    "best_reward_model_by_unknown_metric": ("checkpoints.best", "`evaluation/accuracy`"),
    "pairs_longer_than_a_fresh_model": ("reward_model.data.max_length (line 9)", "got 1024", "holds 512"),
    "classifier_from_a_stage": ("ppo.reward.0.model (line 11)", "no stage makes a classifier"),
    "context_too_long": ("ppo.sampling.max_new_tokens (line 13)", "makes 564 tokens", "holds 512"),
    "rank_beyond_vllm": ("policy.lora.rank (line 4)", "got 513", "at most 512", "vLLM"),
    "adapter_off_without_adapter": ("reference.adapter_off (line 7)", "has no effect without policy.lora"),
    "adapter_off_beside_a_model": ("reference.adapter_off (line 7)", "a network of its own (gpt2)"),
    "workers_of_a_reference_in_the_policy": ("reference.workers (line 7)", "adapter off", "adapter_off: false"),
    "adapter_without_layers": ("policy.lora.target_modules (line 4)", "got a list []"),
    "stage_that_leaves_an_adapter": ("ppo.policy.model (line 10)", "'stage:sft'", "sft.policy.lora.result to merged"),
    "adapter_as_model": ("policy.model (line 4)", "a peft adapter directory", "merge it into its base"),
    "result_of_a_critic": ("critic.lora.result (line 7)", "has no effect", "no result of its stage"),
    "adapter_of_a_value_head": ("critic.lora (line 7)", "has no effect", "policy's network"),
    "critic_without_gae": ("critic (line 8)", "leave_one_out has none"),
    "group_of_one": ("sampling.samples_per_prompt", "got 1", "at least 2"),
    "k1_as_a_loss": ("kl.estimator (line 7)", "got k1", "k2 or k3"),
    "adaptive_without_target": ("kl.target", "missing", "nats per sequence"),
    "adaptive_from_zero": ("kl.coefficient (line 7)", "got 0", "stay 0"),
    "greedy_training": ("sampling.temperature (line 7)", "got 0", "evaluation.temperature"),
    "shortest_above_longest": ("sampling.min_new_tokens (line 7)", "got 20", "max_new_tokens, 10"),
    "too_many_mini_batches": ("mini_batches (line 8)", "got 16", "4 prompts x 2 samples"),
    "more_workers_than_samples": ("policy.workers (line 4)", "got 4", "only 2 samples"),
    "filtered_old_logprobs": ("old_logprobs (line 7)", "wanted learner", "top_k"),
    "prompt_length_reversed": ("data.prompt_length.min (line 6)", "got 8", "`max`, 2"),
    "fresh_model_in_ppo": ("policy.model (line 4)", "a fresh model", "put an sft stage"),
    "tensor_parallel_on_cpu": ("generator.tensor_parallel (line 7)", "got 2", "gpus: 0"),
    "nccl_for_an_adapter": ("placement.transport (line 7)", "got nccl", "ppo sends adapters"),
    "nccl_without_gpus": ("placement.transport (line 7)", "got nccl", "gpus is 0"),
    "function_without_module": ("reward.0.function (line 5)", "got 'length'", "`module:function`"),
    "no_reward_module": ("reward.0.function (line 5)", "no module 'reward_functions'"),
    "no_reward_function": ("reward.0.function (line 5)", "no function 'lenght'", "`length`"),
    "argument_taken": ("reward.0.arguments.prompts (line 5)", "what every reward function gets"),
    "reward_name_twice": ("reward.1.name", "got 'function'", "another reward"),
    "reward_without_weight": ("reward.0.weight (line 5)", "got 0"),
    "no_data_file": ("data.train.path (line 6)", "no such file", "`tests/wrong_files/pipelines/rows.jsonl`"),
    "data_of_unknown_kind": ("data.train (line 6)", "ends in .jsonl"),
    "unknown_synthetic_corpus": ("data.train (line 6)", "`synthetic:reviews`"),
    "no_model_directory": ("policy.model (line 4)", "no such directory"),
    "directory_without_model": ("policy.model (line 4)", "without config.json"),
    "file_as_model": ("policy.model (line 4)", "a file"),
    "home_in_a_path": ("policy.model (line 4)", "without `~`"),
    "epochs_and_steps": ("steps (line 6)", "wanted one of them"),
    "best_without_evaluation": ("checkpoints.best", "give data.evaluation"),
    "best_by_unknown_metric": ("checkpoints.best", "`evaluation/loss`"),
    "longer_than_a_fresh_model": ("data.max_length (line 4)", "got 1024", "max_length, 512"),
    "tokenizer_for_a_fresh_model": ("policy.tokenizer (line 3)", "trained on the data"),
    "evaluation_without_data": ("evaluation (line 7)", "has no effect", "without data.evaluation"),
    "lambda_without_gae": ("advantages.lam (line 7)", "has no effect", "gae only"),
    "std_without_group_relative": ("advantages.divide_by_std (line 7)", "has no effect", "group_relative only"),
    "value_loss_without_critic": ("value_loss (line 9)", "has no effect", "no critic"),
    "value_loss_weight_of_a_network": ("value_loss.coefficient (line 7)", "has no effect", "value_head"),
    "network_settings_of_a_value_head": ("critic.zero (line 7)", "has no effect", "policy's network"),
    "reference_without_kl": ("reference (line 8)", "has no effect", "kl.place is off"),
    "target_of_a_fixed_controller": ("kl.target (line 7)", "has no effect", "kl.controller is fixed"),
    "negative_staleness": ("staleness (line 7)", "got -1"),
    "chunks_with_staleness": ("chunk_samples (line 8)", "has no effect", "sampled before it is scored"),
    "sleep_with_staleness": ("generator.sleep (line 7)", "got true", "neither can leave the GPU"),
    "offload_with_staleness": ("policy.offload (line 4)", "got true", "neither can leave the GPU"),
    "offload_without_generators": ("policy.offload (line 3)", "has no effect", "without a generator"),
    "sleep_without_learners": ("generator.sleep (line 6)", "has no effect", "no learners"),
    "interrupted_on_policy": ("interrupted (line 7)", "has no effect", "with staleness 0"),
    "cap_without_correction": ("correction.cap (line 7)", "has no effect", "correction.mode is off"),
    "final_rate_of_a_constant_schedule": (
        "policy.optimizer.final_ratio (line 4)",
        "has no effect",
        "schedule is constant",
    ),
    "offload_without_zero": ("policy.cpu_offload (line 4)", "has no effect", "ZeRO 1, 2 or 3"),
    "revision_of_a_stage": ("ppo.policy.revision (line 10)", "has no effect", "the result of a stage"),
    "weight_of_a_single_source": ("data.train.weight (line 6)", "has no effect", "single source"),
    "split_of_a_file": ("data.train.split (line 6)", "has no effect", "on a file"),
    "cache_of_the_hf_engine": ("generator.kv_cache_gib (line 7)", "has no effect", "vllm only"),
    "too_long_with_prompt_length": ("data.too_long (line 6)", "has no effect", "cuts every prompt"),
    "greedy_siblings": ("evaluation.samples_per_prompt (line 7)", "has no effect", "all the same"),
    "smoothing_of_ipo": ("loss.label_smoothing (line 5)", "has no effect", "sigmoid only"),
    "gamma_without_simpo": ("loss.gamma (line 5)", "has no effect", "simpo only"),
    "odds_without_orpo": ("loss.odds_coefficient (line 5)", "has no effect", "orpo only"),
    "beta_of_orpo": ("loss.beta (line 5)", "has no effect", "odds_coefficient"),
    "nll_of_orpo": ("loss.nll_coefficient (line 5)", "has no effect", "in it"),
    "reference_of_simpo": ("reference (line 6)", "has no effect", "simpo, which has no reference"),
    "cache_of_orpo": ("cache (line 6)", "has no effect", "orpo, which has no reference"),
    "cache_dir_without_cache": ("cache_dir (line 6)", "has no effect", "cache is false"),
    "cache_dir_is_a_file": ("cache_dir (line 5)", "got 'README.md'", "a file"),
    "margin_column_of_dpo": ("data.columns.margin (line 4)", "has no effect", "read no margin"),
    "generator_without_evaluation": ("generator (line 5)", "has no effect", "without data.evaluation"),
    "samples_without_generator": ("evaluation.prompts (line 5)", "has no effect", "without a generator"),
    "pairs_without_reward": ("pairs (line 5)", "has no effect", "without a reward"),
    "reward_without_use": ("reward (line 5)", "has no effect", "without a generator"),
    "more_workers_than_pairs": ("batch_size (line 5)", "got 2", "4 policy workers"),
    "best_dpo_by_unknown_metric": ("checkpoints.best", "got 'evaluation/reward_mean'", "evaluation/chosen_reward"),
    "fresh_model_in_dpo": ("policy.model (line 3)", "a fresh model", "put an sft stage"),
    "steps_and_epochs_of_dpo": ("steps (line 6)", "wanted one of them"),
    "one_response_to_choose_from": ("sampling.samples_per_prompt (line 6)", "got 1", "at least 2"),
    "greedy_collect": ("sampling.temperature (line 6)", "got 0", "all the same"),
    "shortest_above_longest_in_collect": ("sampling.min_new_tokens (line 6)", "got 20", "max_new_tokens, 10"),
    "prompt_length_reversed_in_collect": ("data.prompt_length.min (line 5)", "got 8", "`max`, 2"),
    "beta_without_resample": ("beta (line 7)", "has no effect", "keep: best_worst", "resample only"),
    "most_pairs_without_threshold": ("max_pairs (line 7)", "has no effect", "threshold only"),
    "margin_of_texts": ("min_margin (line 8)", "has no effect", "best_worst and threshold only"),
    "shuffle_of_every_prompt": ("data.shuffle (line 5)", "has no effect", "without `prompts`"),
    "evaluation_in_collect": ("data.evaluation (line 5)", "has no effect", "evaluates nothing"),
    "best_of_collect": ("checkpoints.best (line 7)", "has no effect", "evaluates nothing"),
    "data_of_a_later_stage": ("dpo.data.train (line 5)", "got 'stage:collect'", "comes later"),
    "data_of_an_unknown_stage": ("dpo.data.train (line 11)", "earlier collect stage: collect", "`collect`"),
    "data_without_a_collect_stage": ("data.train (line 4)", "no collect stage comes before"),
    "data_of_a_trained_stage": ("dpo.data.train (line 8)", "makes a model and no data", "sft"),
    "texts_for_dpo": ("dpo.data.train (line 12)", "writes texts (keep: best_of_n)", "collect.keep to best_worst"),
    "pairs_for_sft": ("sft.data.train (line 11)", "writes pairs (keep: best_worst)", "collect.keep to best_of_n"),
    "responses_as_prompts": ("again.data.train (line 13)", "holds responses", "samples its own"),
    "model_of_a_collect_stage": ("dpo.policy.model (line 10)", "makes data and no model"),
    "renamed_column_of_a_stage": ("dpo.data.columns.chosen (line 11)", "got 'better'", "'chosen'"),
    "split_of_a_stage": ("dpo.data.train.split (line 11)", "has no effect", "the data of a stage"),
    "context_too_long_in_collect": ("collect.sampling.max_new_tokens (line 11)", "makes 576 tokens", "holds 512"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_file_exits_2_and_says_where(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as stopped:
        main(["check", f"tests/wrong_files/pipelines/{name}.yaml"])
    output = capsys.readouterr()
    path, *words = CASES[name]
    assert stopped.value.code == 2, output.err
    assert output.out == ""
    assert "Traceback" not in output.err
    found = [line.strip().removeprefix("tests/wrong_files/pipelines/") for line in output.err.splitlines()]
    lines = [line for line in found if line.startswith(path)]
    assert lines, output.err
    assert all(word in lines[0] for word in words), f"wanted {words} in {lines[0]!r}"


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_file_has_one_mistake_only(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit):
        main(["check", f"tests/wrong_files/pipelines/{name}.yaml"])
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 2, error


def test_every_file_of_the_corpus_is_asserted() -> None:
    assert {path.stem for path in CORPUS.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize(("command", "name"), [("check", "unknown_setting"), ("run", "reference_without_kl")])
def test_a_wrong_file_is_reported_before_torch_or_ray_are_imported(command: str, name: str) -> None:
    program = (
        "import sys\n"
        "from rlhf_ray.cli import main\n"
        "try:\n"
        f"    main([{command!r}, {str(CORPUS / name) + '.yaml'!r}])\n"
        "finally:\n"
        "    print([name for name in ('torch', 'ray', 'vllm', 'transformers', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stdout.strip() == "[]"
    assert CASES[name][0] in done.stderr
