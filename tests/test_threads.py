# SPDX-License-Identifier: MIT
"""Concurrency changes no bit: Python threads, forked DataLoader workers, and any number of torch threads."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from samples import DTYPES, NAMED, Problem, differentiable, run, with_tensors
from torch.utils.data import DataLoader, Dataset

import natten_ops

# Large enough to be shared out among threads: a share has at least 2 ** 17 multiply-adds.
LARGE = Problem(
    (24, 40), (5, 7), dilation=(2, 1), is_causal=(False, True), heads=4, group=2, head_dim=20, rpb=True, mask=True,
    additional=3,
)  # fmt: skip
STRIDED = Problem((8, 12, 20), (3, 4, 5), stride=(2, 1, 3), dilation=(1, 2, 1), head_dim=16, additional=2)
PROBLEMS = {"large": LARGE, "strided": STRIDED, "everything": NAMED["everything"]}


def results(problem, dtype=torch.float32, seed=0):
    """out, lse and every gradient of a problem."""
    inputs = problem.make(dtype, seed)
    leaves = [tensor.detach().requires_grad_() for tensor in differentiable(inputs)]
    out, lse = run(with_tensors(inputs, leaves), problem)
    gradients = torch.autograd.grad([out, lse], leaves, [out.detach().cos(), torch.ones_like(lse)])
    return [out.detach(), lse.detach(), *gradients]


def assert_same(have, want):
    assert len(have) == len(want)
    for i, (left, right) in enumerate(zip(have, want)):
        assert torch.equal(left, right), f"result {i} differs by {(left - right).abs().max()}"


@pytest.fixture
def threads():
    """Sets the number of torch threads and restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_any_number_of_threads_gives_the_same_bits(name, dtype, threads):
    threads(1)
    want = results(PROBLEMS[name], dtype)
    for number in (2, 3, 7):
        threads(number)
        assert_same(results(PROBLEMS[name], dtype), want)


def test_the_large_problems_are_shared_among_threads():
    """Else the test above would show nothing."""
    for problem in (LARGE, STRIDED):
        visible = torch.tensor(problem.kernel_size).prod().item()
        work = (
            torch.tensor(problem.spatial).prod().item() * problem.batch * problem.heads * visible * 2 * problem.head_dim
        )
        assert work > 8 * 2**17


def test_concurrent_calls_of_python_threads_give_the_same_bits():
    """Forward and backward of different problems at once, while others fail."""
    jobs = [(list(PROBLEMS.values())[i % 3], DTYPES[i % 4], i % 5) for i in range(48)]
    want = [results(*job) for job in jobs]

    def call(job):
        query = torch.randn(1, 4, 1, 8)
        with pytest.raises(ValueError, match="kernel_size"):
            natten_ops.na1d(query, query, query, kernel_size=5)
        return results(*job)

    with ThreadPoolExecutor(6) as pool:
        for have, goal in zip(pool.map(call, jobs), want):
            assert_same(have, goal)


def test_the_first_call_of_a_process_may_come_from_many_threads():
    """Nothing is set up lazily in a way that threads could disturb."""
    code = (
        "import threading, torch, natten_ops\n"
        "query, got = torch.randn(1, 32, 32, 4, 32), []\n"
        "barrier = threading.Barrier(4)\n"
        "def call():\n"
        "    barrier.wait()\n"
        "    got.append(natten_ops.na2d(query, query, query, kernel_size=7))\n"
        "threads = [threading.Thread(target=call) for _ in range(4)]\n"
        "[t.start() for t in threads], [t.join() for t in threads]\n"
        "assert len(got) == 4 and all(torch.equal(got[0], g) for g in got)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Attended(Dataset):
    """Samples that are computed, gradients included, in the worker."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return results(list(PROBLEMS.values())[index % 3], seed=index)


def check_workers(context):
    dataset = Attended()
    want = [dataset[index] for index in range(len(dataset))]  # the parent has run its thread pool before the fork
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=90)
    for have, goal in zip(loader, want, strict=True):
        assert_same(have, goal)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers_give_the_same_bits(context):
    """In a process of its own: torch forks no more once its autograd has had threads for devices, as other tests may start."""
    done = subprocess.run([sys.executable, __file__, context], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(2)
    check_workers(sys.argv[1])
