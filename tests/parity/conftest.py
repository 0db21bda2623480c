from __future__ import annotations

import pytest
import torch
from oracle import Oracle, OracleMissingError, load_oracle
from subject import Pair


@pytest.fixture(autouse=True)
def _no_gradients_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    sentence = None
    try:
        return load_oracle()
    except OracleMissingError as missing:
        sentence = str(missing)
    pytest.fail(sentence, pytrace=False)


@pytest.fixture(scope="session")
def small(oracle: Oracle) -> Pair:
    """Ours and theirs at small size, float32, with the same random weights."""
    return Pair.small(oracle, torch.float32)


@pytest.fixture(scope="session")
def served(oracle: Oracle) -> Pair:
    """Ours and theirs at small size, bf16 as in serving, with the same random weights."""
    return Pair.small(oracle, torch.bfloat16)
