"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_whichever_tests_ran_before():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For what runs on one thread, or sets their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
