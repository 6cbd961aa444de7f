"""What the CUDA kernels tell of each row, compiled by g++ and run by the emulator: against float64, as tests/test_per_token.py and
tests/test_distillation.py hold the CPU's."""

import math

import emulated
import pytest
import torch
from cases import DTYPES, sample_cases
from test_distillation import BETAS, TARGET_OPTIONS
from token_checks import check_digits, check_distillation, check_special_rows, check_targets, check_tokens

if reason := emulated.why_not():
    pytest.skip(f"the kernels cannot be emulated: {reason}", allow_module_level=True)


@pytest.fixture(scope="session")
def backend() -> emulated.Backend:
    return emulated.Backend(emulated.build())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_tokens_of_every_case(backend, dtype):
    backend.seed(61)
    for number, case in enumerate(sample_cases(dtype)):
        check_tokens(backend, case, 10 * number)
    assert backend.take_bad_label() is None


@pytest.mark.parametrize(
    "plan, capability", [("packed", 90), ("warp", 90), ("held", 80), ("staged", 90), ("block", 90)]
)
def test_emulated_tokens_by_every_plan(backend, plan, capability):
    limit = {"packed": 512, "warp": 1024}.get(plan, 1 << 30)
    backend.seed(62)
    with backend.plan(plan, capability):
        for number, case in enumerate(sample_cases(torch.bfloat16, large=False)):
            if case.logits.shape[-1] <= limit:
                check_tokens(backend, case, 10 * number)


def test_emulated_tokens_write_no_more_than_is_asked_for(backend):
    found = backend.tokens(torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64))
    assert (found["entropy"] == 77).all() and (found["argmax"] == 77).all()


@pytest.mark.parametrize("V", [40, 700, 1500, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_emulated_tokens_of_infinities_and_nan(backend, V, dtype):
    backend.seed(63)
    check_special_rows(backend, dtype, V)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_emulated_distillation(backend, dtype, beta):
    backend.seed(64)
    check_distillation(backend, dtype, beta)


def test_emulated_distillation_keeps_its_digits(backend):
    backend.seed(69)
    check_digits(backend)


def test_emulated_distillation_of_what_is_no_distribution(backend):
    """A student that excludes a class, NaN, rows that do not count and labels that are none."""
    backend.seed(65)
    student, teacher = torch.zeros(1, 5, 40), torch.zeros(1, 5, 40)
    student[0, 0, 7] = -math.inf
    student[0, 1, 3] = math.nan
    student[0, 2] = teacher[0, 2] = math.nan
    teacher[0, 3, 3] = 2.0
    labels = torch.tensor([[0, 0, -100, 0, 77]])
    found = backend.distillation(student, teacher, labels, 0.0)
    loss = found["loss"][0]
    assert loss[0] == math.inf and loss[2] == 0 and loss[3] > 0
    assert loss.isnan().tolist() == [False, True, False, False, True]
    assert backend.take_bad_label() == (4, 77)
    gradient = backend.distillation_backward(student, teacher, labels, found, torch.ones(1, 5), 0.0)[0]
    assert (gradient[[2, 4]] == 0).all() and gradient[1].isnan().any()
    zero = backend.distillation_backward(student, teacher, labels, found, torch.zeros(1, 5), 0.0)
    assert (zero == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@TARGET_OPTIONS
def test_emulated_soft_targets(backend, dtype, options):
    backend.seed(66)
    check_targets(backend, dtype, options)


@pytest.mark.parametrize("kind", ["tokens", "distillation", "targets"])
def test_emulated_bits_of_rows_do_not_depend_on_the_order_of_threads(backend, kind):
    logits = (torch.randn(1, 3, 1500, generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
    other = logits.roll(1, 1).softmax(-1) if kind == "targets" else logits.roll(1, 1).contiguous()
    labels = torch.tensor([[1, 700, 3]])
    results = []
    for seed in (67, 68):
        backend.seed(seed)
        found = {
            "tokens": lambda: backend.tokens(logits, labels, metrics=True),
            "distillation": lambda: backend.distillation(logits, other, labels, 0.5),
            "targets": lambda: backend.targets(logits, other),
        }[kind]()
        results.append(list(found.values()))
    assert all(map(torch.equal, *results))
