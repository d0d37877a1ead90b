"""Problems from JSONL files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.config.trainer import JsonlTaskConfig
from shared.errors import ConfigurationError
from trainer.tasks import JsonlTask


def write(path: Path, records: list[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(count: int) -> list[object]:
    return [{"prompt": f"question {index}", "answer": str(index)} for index in range(count)]


def test_every_training_problem_comes_once_per_pass(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(60))
    task = JsonlTask(JsonlTaskConfig(train_path=path, held_out_fraction=0.2))
    num_train = 60 - len(task.held_out(1000))
    one_pass = [p.prompt for step in range(num_train) for p in task.train_batch(step, 1)]
    assert len(set(one_pass)) == num_train
    next_pass = [
        p.prompt for step in range(num_train, 2 * num_train) for p in task.train_batch(step, 1)
    ]
    assert set(next_pass) == set(one_pass)
    assert next_pass != one_pass


def test_a_batch_may_span_two_passes_and_depends_on_the_step_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(12))
    config = JsonlTaskConfig(train_path=path, held_out_fraction=0.3)
    batches = [JsonlTask(config).train_batch(step, 5) for step in (0, 1, 2, 3)]
    again = JsonlTask(config)
    assert [again.train_batch(step, 5) for step in (3, 2, 1, 0)] == batches[::-1]


def test_held_out_problems_are_never_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", numbered(80))
    task = JsonlTask(JsonlTaskConfig(train_path=path, held_out_fraction=0.25))
    held_out = {problem.prompt for problem in task.held_out(1000)}
    trained = {p.prompt for step in range(20) for p in task.train_batch(step, 10)}
    assert held_out
    assert not held_out & trained


def test_problems_of_a_held_out_file_are_taken_out_of_training(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", numbered(10))
    held_out = write(tmp_path / "test.jsonl", numbered(4))
    task = JsonlTask(JsonlTaskConfig(train_path=train, held_out_path=held_out))
    trained = {p.prompt for step in range(6) for p in task.train_batch(step, 5)}
    assert trained == {f"question {index}" for index in range(4, 10)}


def test_messages_and_metadata_are_carried(tmp_path: Path) -> None:
    record = {
        "messages": [{"role": "user", "content": "2+2?"}],
        "answer": 4,
        "metadata": {"level": 1},
    }
    train = write(tmp_path / "a.jsonl", [record])
    held_out = write(tmp_path / "b.jsonl", numbered(1))
    (problem,) = JsonlTask(JsonlTaskConfig(train_path=train, held_out_path=held_out)).train_batch(
        0, 1
    )
    item = problem.to_prompt_item()
    assert item.messages is not None
    assert item.messages[0].content == "2+2?"
    assert (item.answer, item.metadata) == ("4", {"level": 1})
    assert problem.prompt_text == "user: 2+2?"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "a.jsonl:2"),
        ('{"prompt": "x"}', "answer_field"),
        ('{"answer": "x"}', "prompt_field"),
        ('{"prompt": "x", "answer": "y", "metadata": 3}', "metadata"),
        ('{"messages": [{"role": "king", "content": "x"}], "answer": "y"}', "role"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        JsonlTask(JsonlTaskConfig(train_path=str(path)))
    assert ":2" in caught.value.message


def test_a_missing_file_and_an_empty_side_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        JsonlTask(JsonlTaskConfig(train_path=str(tmp_path / "nowhere.jsonl")))
    path = write(tmp_path / "a.jsonl", numbered(1))
    with pytest.raises(ConfigurationError, match="held_out_fraction"):
        JsonlTask(JsonlTaskConfig(train_path=path, held_out_fraction=0.0001))
