"""Generated sums: worked answers, the split, and what a step's batch depends on."""

from __future__ import annotations

from itertools import islice

import pytest

from shared.config.trainer import ArithmeticTaskConfig
from shared.errors import ConfigurationError
from trainer.tasks import ArithmeticTask, build_task
from trainer.tasks.arithmetic import ArithmeticProblem
from trainer.tasks.problem import is_held_out

CONFIG = ArithmeticTaskConfig(num_terms=(2, 5), max_operand=20)


def test_a_worked_answer_has_one_step_per_sign_and_ends_with_the_answer() -> None:
    item = ArithmeticProblem(operands=(12, 7, 5), signs=("+", "-"))
    assert item.prompt == "12+7-5="
    assert item.worked_answer == "12+7=19;19-5=14;ans=14"
    assert item.answer == "14"


def test_every_worked_answer_is_true_and_never_negative() -> None:
    for item in islice(ArithmeticTask(CONFIG).training_stream(seed=3), 300):
        *steps, last = item.worked_answer.split(";")
        for step in steps:
            left, _, right = step.partition("=")
            assert eval(left) == int(right) >= 0
        assert last == f"ans={eval(item.prompt.removesuffix('='))}"


def test_training_and_held_out_problems_never_meet() -> None:
    task = ArithmeticTask(ArithmeticTaskConfig(num_terms=(2, 3), max_operand=12))
    held_out = {problem.prompt for problem in task.held_out(150)}
    trained = {p.prompt for step in range(40) for p in task.train_batch(step, 32)}
    warm_started = {item.prompt for item in islice(task.training_stream(seed=0), 2000)}
    assert len(held_out) == 150
    assert not held_out & trained
    assert not held_out & warm_started


def test_the_split_depends_on_the_problem_alone() -> None:
    one = ArithmeticTask(CONFIG)
    other = ArithmeticTask(CONFIG.model_copy(update={"seed": 99}))
    trained_by_other = {p.prompt for step in range(30) for p in other.train_batch(step, 64)}
    assert {p.prompt for p in one.held_out(100)} != {p.prompt for p in other.held_out(100)}
    assert not {p.prompt for p in one.held_out(100)} & trained_by_other


def test_a_smaller_fraction_holds_out_a_subset_of_a_larger_one() -> None:
    prompts = [item.prompt for item in islice(ArithmeticTask(CONFIG).training_stream(1), 500)]
    prompts += [str(problem.prompt) for problem in ArithmeticTask(CONFIG).held_out(100)]
    few = {prompt for prompt in prompts if is_held_out(prompt, 0.05)}
    many = {prompt for prompt in prompts if is_held_out(prompt, 0.3)}
    assert few < many


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    first, second = ArithmeticTask(CONFIG), ArithmeticTask(CONFIG)
    first.train_batch(0, 32)
    assert first.train_batch(7, 32) == second.train_batch(7, 32)
    assert first.train_batch(7, 32) != first.train_batch(8, 32)
    reseeded = ArithmeticTask(CONFIG.model_copy(update={"seed": 5}))
    assert reseeded.train_batch(7, 32) != first.train_batch(7, 32)


def test_longer_sums_are_rarer_and_need_longer_answers() -> None:
    items = list(islice(ArithmeticTask(CONFIG).training_stream(seed=0), 2000))
    by_terms = {n: [i for i in items if len(i.operands) == n] for n in (2, 3, 4, 5)}
    counts = [len(by_terms[n]) for n in (2, 3, 4, 5)]
    assert counts == sorted(counts, reverse=True)
    lengths = [min(len(i.worked_answer) for i in by_terms[n]) for n in (2, 3, 4, 5)]
    assert lengths == sorted(lengths)


def test_asking_for_more_problems_than_exist_names_the_setting() -> None:
    task = ArithmeticTask(ArithmeticTaskConfig(num_terms=(2, 2), max_operand=2))
    with pytest.raises(ConfigurationError, match="max_operand"):
        task.train_batch(0, 50)


def test_fewer_held_out_problems_than_asked_for_are_all_there_are() -> None:
    task = ArithmeticTask(ArithmeticTaskConfig(num_terms=(2, 2), max_operand=9))
    held_out = [problem.prompt for problem in task.held_out(1000)]
    assert 0 < len(held_out) == len(set(held_out)) < 40
    with pytest.raises(ConfigurationError, match="held_out_fraction"):
        ArithmeticTask(
            ArithmeticTaskConfig(num_terms=(2, 2), max_operand=2, held_out_fraction=1e-6)
        ).held_out(1)


def test_impossible_term_counts_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="num_terms"):
        build_task(ArithmeticTaskConfig(num_terms=(4, 3)))
    with pytest.raises(ConfigurationError, match="num_terms"):
        build_task(ArithmeticTaskConfig(num_terms=(1, 3)))
