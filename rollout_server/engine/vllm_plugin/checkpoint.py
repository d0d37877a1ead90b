"""Reads checkpoints: a safetensors file, or a model directory of them. Memory-mapped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Container, Iterator
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open


def safetensors_files(path: str) -> list[str]:
    """The file itself, or the files of a model directory."""
    if not os.path.isdir(path):
        return [path]
    return sorted(str(file) for file in Path(path).glob("*.safetensors"))


def tensor_names(path: str) -> list[str]:
    """Of a file, or a model directory."""
    names: list[str] = []
    for file_path in safetensors_files(path):
        with safe_open(file_path, framework="pt") as file:
            names += file.keys()
    return names


def iterate_safetensors(
    path: str, names: Container[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """``(name, tensor)``, one tensor at a time.

    Args:
        path: a file, or a model directory.
        names: only these.
    """
    for file_path in safetensors_files(path):
        with safe_open(file_path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if names is None or name in names:
                    yield name, file.get_tensor(name)


class OpenCheckpoint:
    """Any of its tensors, in any order, for the length of a ``with`` block."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open = contextlib.ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        for file_path in safetensors_files(self._path):
            file = self._open.enter_context(safe_open(file_path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._files.clear()
        self._open.close()

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Those of these that it has."""
        return {name: self._files[name].get_tensor(name) for name in names if name in self._files}
