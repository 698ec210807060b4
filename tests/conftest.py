"""Fixtures and settings of every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_whichever_tests_ran_before():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """One thread, for a test that needs one or sets the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
