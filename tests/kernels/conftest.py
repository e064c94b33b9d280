"""Where kernels run: in Triton's interpreter by default, on a GPU in the tests marked `gpu`."""

import pytest
import torch

from tests.kernels.interpreter import interpreter


@pytest.fixture(scope="session")
def interpreted():
    pytest.importorskip("triton", reason="Triton is not installed")
    with interpreter() as run:
        yield run


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def on(request):
    """Return what runs `check(device, *args)` in the interpreter or on a GPU."""
    if request.param == "interpreter":
        run = request.getfixturevalue("interpreted")
        return lambda check, *args: run(check, "cpu", *args)
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return lambda check, *args: check("cuda", *args)
