"""Two gloo processes give the gradient of one: DDP without unused parameters, and FSDP2.

All cases run in one launch, because importing torch in two processes takes most of the time.
"""

import pytest
import torch
from torch import multiprocessing
from torch.testing import assert_close

from tests.distributed import workers
from tests.tiny import KINDS

ranks = pytest.mark.parametrize("rank", range(workers.WORLD))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what each process found."""
    folder = tmp_path_factory.mktemp("two_processes")
    multiprocessing.spawn(workers.run, args=(str(folder),), nprocs=workers.WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(workers.WORLD)]


@ranks
@pytest.mark.parametrize("case", workers.CASES, ids="-".join)
def test_the_gradient_is_the_mean_of_the_single_processes(found, case, rank):
    expected = found[0]["expected"][case[1]]
    gradients = found[rank][case]["gradients"]
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(gradients[name], value)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@ranks
def test_accumulated_micro_batches_give_it_too(found, wrapper, rank):
    expected = found[0]["expected accumulated"]
    gradients = found[rank]["accumulated", wrapper]
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(gradients[name], value)


@pytest.mark.parametrize("kind", KINDS)
@ranks
def test_some_experts_were_unused(found, kind, rank):
    """Otherwise the cases above would not show that unused experts are harmless."""
    assert found[rank]["unused"][kind] > 0


@ranks
@pytest.mark.parametrize("case", workers.CASES, ids="-".join)
def test_each_process_counts_its_own_real_tokens(found, case, rank):
    counted = found[rank][case]["counted"]
    assert counted
    assert set(counted.values()) == {found[rank]["real"]}
