"""What the tests of ops share."""

import pytest
import torch

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
SKEW = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]], dtype=torch.float64) / 22  # neither symmetric nor separable


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are tiny: a second thread would only wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)
