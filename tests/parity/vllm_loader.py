"""vLLM's own default loader, run on a CPU: which files of a folder it reads, and what it yields of them.

Four of its modules are imported as published, from an installed vllm or from the wheel that REVOX_VLLM_WHEEL
names (`pip download --no-deps vllm==0.30.0`, the release that vllm-omni 0.30.0 runs on); everything else of
vllm is stubbed, as in `oracle`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import oracle
from torch import Tensor

WHEEL = "REVOX_VLLM_WHEEL"
_PACKAGE = "vllm.model_executor.model_loader"
_REAL = tuple(
    f"{_PACKAGE}.{name}" for name in ("default_loader", "base_loader", "weight_utils", "ep_weight_filter")
)
_GIVEN = {
    "instrument": lambda **_: lambda function: function,
    "VLLM_USE_MODELSCOPE": False,
    "SAFE_WEIGHTS_INDEX_NAME": "model.safetensors.index.json",
    "DEFAULT_SAFETENSORS_PREFETCH_NUM_THREADS": 1,
    "DEFAULT_SAFETENSORS_PREFETCH_BLOCK_SIZE": 1 << 20,
    "init_logger": lambda name: mock.MagicMock(name=name),
    "PlaceholderModule": mock.MagicMock(),
}


def find_vllm(scratch: Path) -> Path | None:
    """The folder that holds vllm's package: installed, or the needed files of the wheel in `scratch`."""
    if wheel := os.environ.get(WHEEL):
        with zipfile.ZipFile(wheel) as archive:
            for name in _REAL:
                archive.extract(f"{name.replace('.', '/')}.py", scratch)
        return scratch
    found = importlib.util.find_spec("vllm")
    return None if found is None or found.origin is None else Path(found.origin).parents[1]


class VllmLoader:
    """vllm's DefaultModelLoader for the mistral format, as vllm-omni's stages ask for it."""

    def __init__(self, root: Path) -> None:
        with _vllm_from(root):
            module = importlib.import_module(f"{_PACKAGE}.default_loader")
            self._weight_utils = importlib.import_module(f"{_PACKAGE}.weight_utils")
        self._loader: Any = module.DefaultModelLoader(
            SimpleNamespace(
                load_format="mistral",
                model_loader_extra_config={},
                download_dir=None,
                ignore_patterns=None,
                use_tqdm_on_load=False,
                safetensors_load_strategy=None,
                safetensors_prefetch_num_threads=1,
                safetensors_prefetch_block_size=1 << 20,
            )
        )

    def files(self, folder: Path) -> list[str]:
        """Names of the files that it reads of a folder."""
        _, files, _ = self._loader._prepare_weights(str(folder), None, None, True, None)
        return sorted(Path(file).name for file in files)

    def weights(self, folder: Path) -> list[tuple[str, Tensor]]:
        """What it hands to a model's `load_weights`."""
        with mock.patch.object(self._weight_utils, "_get_available_ram_bytes", return_value=1 << 40):
            return list(self._loader._get_weights_iterator(self._loader.Source(str(folder), None)))


class _Finder(oracle._StubFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name in _REAL:
            file = self.root.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        if name.split(".")[0] in ("vllm", "transformers"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = oracle._StubModule(spec.name)
        module.__path__ = []
        module.__dict__.update(_GIVEN)
        return module


@contextlib.contextmanager
def _vllm_from(root: Path) -> Iterator[None]:
    def theirs(name: str) -> bool:
        return name.split(".")[0] in ("vllm", "transformers")

    before = {name: sys.modules.pop(name) for name in list(sys.modules) if theirs(name)}
    finder = _Finder(root)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if theirs(name)]:
            del sys.modules[name]
        sys.modules.update(before)
