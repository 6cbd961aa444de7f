"""What the launchers ask of a device and make of its answers, on emulated devices; and launches of two host threads."""

from __future__ import annotations

import concurrent.futures

import emulated
import pytest
import torch
from emulated_checks import ALL, check, check_case, inputs

if reason := emulated.why_not():
    pytest.skip(f"the kernels cannot be emulated: {reason}", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("emulator-launches")


@pytest.fixture(scope="session")
def backend() -> emulated.Backend:
    return emulated.Backend(emulated.build())


def small(V: int, rows: int = 3):
    generator = torch.Generator().manual_seed(V)
    return torch.randn(1, rows, V, generator=generator), torch.randint(0, V, (1, rows), generator=generator)


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_emulated_staged_grid_is_one_wave(backend, cluster):
    logits, labels = small(1037, rows=9)
    for multiprocessors in (4, 7):
        with backend.plan(f"staged:{cluster}", multiprocessors=multiprocessors):
            backend.largest_grid()
            backend.forward_with_grad(logits, labels)
            assert backend.largest_grid() == min(9, multiprocessors * 2 // cluster) * cluster
    with backend.plan(f"staged:{cluster}", clusters=5):
        backend.forward(logits[:, :3], labels[:, :3])
        assert backend.largest_grid() == 3 * cluster  # no more clusters than rows


def test_emulated_device_is_asked_once(backend):
    with backend.plan("staged:2", multiprocessors=4):
        backend.questions()
        backend.forward(*small(1037))
        assert backend.questions() == 3  # of its kernel, of the one that finishes rows, of the grid
        backend.forward(*small(1037, rows=5))
        assert backend.questions() == 0
        backend.forward(*small(5003))
        assert backend.questions() == 1  # a grid with more shared memory
        backend.forward_with_grad(*small(1037))
        assert backend.questions() == 2  # another kernel, and its grid


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_emulated_device_without_room_for_a_cluster(backend, dtype):
    """Of part of a device (MIG, a green context): held where a row fits with its gradient, block else; and no staged row."""
    backend.seed(41)
    V = 24001 if dtype == torch.float32 else 48001  # clusters of two
    case = {"shape": (1, 2, V), "ignored": 0.0}
    with backend.on(clusters=0):
        backend.bulk_copies()
        check_case(backend, case, dtype)
        assert backend.bulk_copies() == 0
    with backend.on(clusters=1):
        check_case(backend, case, dtype)
        assert backend.bulk_copies() > 0
    with backend.plan("staged:2", clusters=0), pytest.raises(RuntimeError, match="expected a kernel that can serve"):
        backend.forward(*small(1037))


def test_emulated_build_without_staged_kernels_for_the_device(backend):
    backend.seed(42)
    with backend.on(missing=1):
        backend.bulk_copies()
        check_case(backend, {"shape": (1, 2, 5003), **ALL}, torch.float32)
        assert backend.bulk_copies() == 0


@pytest.mark.parametrize("capability, version", [(75, "7.5"), (90, "9.0"), (120, "12.0")])
def test_emulated_build_without_an_image_names_the_remedy(backend, capability, version):
    message = (
        rf"expected a build for sm_{capability}, got .*no kernel image.*TORCH_CUDA_ARCH_LIST={version} pip install"
    )
    for V in (40, 500, 1500, 50257):
        with backend.on(capability, missing=-1):
            for call in (backend.forward, backend.forward_with_grad):
                with pytest.raises(RuntimeError, match=message):
                    call(*small(V, rows=1))
                with pytest.raises(RuntimeError, match=message):  # and not what an error leaves behind
                    call(*small(V, rows=1))
            with pytest.raises(RuntimeError, match=message):
                backend.scale(small(V)[0], 0.5)
    backend.forward(*small(40))


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 120])
def test_emulated_devices_load_no_staged_kernel_that_they_cannot_run(backend, capability):
    backend.seed(43)
    with backend.on(capability):
        backend.questions()
        backend.forward_with_grad(*small(5003, rows=1))
        assert backend.questions() == 3  # of its kernel, of the one that finishes rows, of the grid
        for V in (40, 500, 5003, 15001):
            check_case(backend, {"shape": (1, 2, V), "metrics": V % 2 == 0}, torch.float32)


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "general"])
def test_emulated_long_rows_of_sm_80(backend, options):
    """A row of which the L2 holds one for each multiprocessor, not two: 1024 threads, or 512 of the general kernel."""
    backend.seed(44)
    with backend.on(80):
        check(backend, *inputs({"shape": (1, 2, 50001), "offset": 1, **options}, torch.float32), offset=1)


def test_emulated_launches_of_two_host_threads(backend):
    """The same kernels with more shared memory and with less: neither call may take the other's limit."""
    backend.seed(45)
    sizes = (13001, 20003)
    for capability in (80, 90):
        with backend.on(capability):
            alone = {V: backend.forward_with_grad(*small(V))["grad_logits"].clone() for V in sizes}
        with backend.on(capability), concurrent.futures.ThreadPoolExecutor(2) as pool:
            calls = [(V, pool.submit(backend.forward_with_grad, *small(V))) for _ in range(4) for V in sizes]
            for V, call in calls:
                assert torch.equal(call.result()["grad_logits"], alone[V])
