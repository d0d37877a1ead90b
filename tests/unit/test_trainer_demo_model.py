"""The tokenizer, the presets and the directory that ``make_model`` leaves."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.config.trainer import ArithmeticTaskConfig
from shared.errors import ConfigurationError
from tests.fakes.models import MICRO_TASK, make_micro_model
from trainer.demo_model.__main__ import main
from trainer.demo_model.accuracy import is_right
from trainer.demo_model.build import REPORT_FILE, ModelReport, make_model
from trainer.demo_model.examples import IGNORED_LABEL, ExampleBatches
from trainer.demo_model.presets import FULL_ALPHABET, Preset, preset_of
from trainer.demo_model.tokenizer import build_tokenizer
from trainer.demo_model.warm_start import (
    FIRST_CHECK_STEP,
    MAX_GUESSING_STEPS,
    WarmStartProgress,
)
from trainer.tasks import ArithmeticTask


def test_text_and_ids_convert_back_exactly(tmp_path: Path) -> None:
    build_tokenizer(FULL_ALPHABET, 64, 1024).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    for text in ["12+7-5=", "  two  spaces\n\nend ", *(
        "".join(rng.choices(FULL_ALPHABET, k=40)) for _ in range(50)
    )]:  # fmt: skip
        ids = tokenizer.encode(text)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_special_tokens_are_known_and_left_out_when_asked(tmp_path: Path) -> None:
    build_tokenizer(FULL_ALPHABET, 64, 1024).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert ids == {0, 1, 2}
    completion = [*tokenizer.encode("ans=4"), tokenizer.eos_token_id]
    assert tokenizer.decode(completion, skip_special_tokens=True) == "ans=4"
    messages = [{"role": "user", "content": "1+1="}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "1+1="


@pytest.mark.parametrize("preset", list(Preset))
def test_every_id_of_every_preset_has_a_text(preset: Preset) -> None:
    sizes = preset_of(preset.value)
    tokenizer = build_tokenizer(sizes.alphabet, sizes.vocab_size, sizes.max_positions)
    assert len(tokenizer) == sizes.vocab_size
    assert tokenizer.decode([sizes.vocab_size - 1]) != ""


def test_an_alphabet_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size 8"):
        build_tokenizer("abcdefgh", 8, 64)
    with pytest.raises(ValueError, match="distinct"):
        build_tokenizer("aab", 64, 64)


def test_the_task_uses_only_the_alphabet_of_the_models_that_learn_it() -> None:
    for preset in (Preset.MICRO, Preset.TINY_ARITHMETIC):
        sizes = preset_of(preset.value)
        tokenizer = build_tokenizer(sizes.alphabet, sizes.vocab_size, sizes.max_positions)
        stream = ArithmeticTask(ArithmeticTaskConfig()).training_stream(seed=0)
        for _ in range(50):
            item = next(stream)
            assert tokenizer.unk_token_id not in tokenizer.encode(item.prompt + item.worked_answer)


def test_a_made_model_loads_and_says_what_it_is(tmp_path: Path) -> None:
    seen: list[WarmStartProgress] = []
    path = tmp_path / "deep" / "micro"
    report = make_model(path, "micro", 3, 12, MICRO_TASK, seen.append)
    assert [progress.step for progress in seen] == list(range(1, 13))
    assert seen[-1].loss < seen[0].loss
    assert report == ModelReport.model_validate_json((path / REPORT_FILE).read_text())
    assert (report.preset, report.warm_start_steps, report.accuracy) == ("micro", 12, None)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(path)) == 32
    assert model.generation_config.eos_token_id == 2
    assert [child.name for child in path.parent.iterdir()] == ["micro"]


@pytest.mark.slow
def test_a_long_warm_start_measures_what_it_has_reached(tmp_path: Path) -> None:
    seen: list[WarmStartProgress] = []
    num_steps = FIRST_CHECK_STEP + MAX_GUESSING_STEPS
    report = make_model(tmp_path / "micro", "micro", 3, num_steps, MICRO_TASK, seen.append)
    assert report.accuracy is not None
    assert report.accuracy == seen[-1].accuracy
    measured_at = [progress.step for progress in seen if progress.accuracy is not None]
    assert measured_at[0] == FIRST_CHECK_STEP
    assert measured_at[-1] == report.warm_start_steps <= num_steps


def test_the_same_seed_makes_the_same_model(tmp_path: Path) -> None:
    paths = [make_micro_model(tmp_path / name, warm_start_steps=2) for name in ("a", "b")]
    first, second = ((path / "model.safetensors").read_bytes() for path in paths)
    assert first == second


def test_a_complete_directory_is_left_alone(tmp_path: Path) -> None:
    path = make_micro_model(tmp_path / "micro")
    before = {child.name: child.stat().st_mtime_ns for child in path.iterdir()}
    report = make_model(path, "tiny-arithmetic", 1, 500, MICRO_TASK)
    assert report.preset == "micro"
    assert {child.name: child.stat().st_mtime_ns for child in path.iterdir()} == before


def test_a_directory_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="was not made here"):
        make_model(tmp_path, "micro", 0, 0, MICRO_TASK)
    assert [child.name for child in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: WarmStartProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_model(tmp_path / "micro", "micro", 0, 5, MICRO_TASK, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'giant'.*tiny-arithmetic"):
        make_model(tmp_path / "x", "giant", 0, 0, MICRO_TASK)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("12+7=19;ans=19", True),
        ("ans=19", True),
        ("12+7=19", False),
        ("ans=19;ans=20", False),
        ("ans=190", False),
        ("", False),
    ],
)
def test_only_an_exact_final_answer_is_right(completion: str, right: bool) -> None:
    assert is_right(completion, "19") is right


def test_the_command_makes_a_model_and_refuses_wrong_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path / "m"), "--preset", "micro", "--warm-start-steps", "0"]
    assert main(arguments) == 0
    assert "made, micro" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "already there" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["preset"] == "micro"
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--preset", "giant"])
    assert caught.value.code == 2
    assert main(["--output", str(tmp_path)]) == 2


def test_batches_hold_worked_answers_until_guesses_are_mixed_in() -> None:
    tokenizer = build_tokenizer(FULL_ALPHABET, 64, 1024)
    batches = ExampleBatches(ArithmeticTask(ArithmeticTaskConfig()), tokenizer, seed=0)

    def answers() -> list[str]:
        _, labels_BT, _ = batches.next_batch()
        return [tokenizer.decode(row[row != IGNORED_LABEL]) for row in labels_BT]

    assert all("=" in answer.removesuffix("<eos>").partition(";")[0] for answer in answers())
    assert all(not answer.startswith("ans=") for answer in answers())
    batches.mix_in_direct(0.5)
    mixed = [answer for _ in range(8) for answer in answers()]
    num_direct = sum(answer.startswith("ans=") for answer in mixed)
    assert 0.35 < num_direct / len(mixed) < 0.65
    assert all(answer.endswith("<eos>") for answer in mixed)


def test_padding_is_neither_attended_to_nor_learnt() -> None:
    tokenizer = build_tokenizer(FULL_ALPHABET, 64, 1024)
    batches = ExampleBatches(ArithmeticTask(ArithmeticTaskConfig()), tokenizer, seed=0)
    batches.mix_in_direct(0.5)
    input_ids_BT, labels_BT, attention_mask_BT = batches.next_batch()
    is_padding_BT = input_ids_BT == tokenizer.pad_token_id
    assert is_padding_BT.any()
    assert not attention_mask_BT[is_padding_BT].any()
    assert (labels_BT[is_padding_BT] == IGNORED_LABEL).all()
    is_labelled_BT = labels_BT != IGNORED_LABEL
    assert (labels_BT[is_labelled_BT] == input_ids_BT[is_labelled_BT]).all()
