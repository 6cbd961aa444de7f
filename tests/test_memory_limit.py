"""Kept memory stays below an eighth of what the control groups leave: by files that stand in for them, and in a real one."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import accumloss
from accumloss import _C

MIB = 2**20
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
V = 1000
NO_LIMIT_V1 = 2**63 - 4096  # what the kernel says where none was set: the largest multiple of a page

needs_kept_memory = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.11", reason="torch_from_blob came with torch 2.11"
)


class Root:
    """A folder with the files of /proc/self and of control groups, which are read in place of the system's."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.write("proc/self/mountinfo", "")
        self.write("proc/self/cgroup", "")

    def write(self, path: str, text: object) -> None:
        file = self.folder / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def mount(self, *lines: str) -> None:
        self.write("proc/self/mountinfo", "\n".join(["22 1 8:1 / / rw - ext4 /dev/sda rw", *lines]))
        _C.read_limits_below(str(self.folder))

    def v2(self, path: str = "/", root: str = "/", at: str = "/sys/fs/cgroup") -> None:
        self.mount(f"30 22 0:26 {root} {at} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate")
        self.write("proc/self/cgroup", f"0::{path}")

    def v1(self, path: str = "/", root: str = "/", at: str = "/sys/fs/cgroup/memory") -> None:
        self.mount(
            "29 22 0:25 / /sys/fs/cgroup/cpu rw shared:8 - cgroup cgroup rw,cpu,cpuacct",
            f"30 22 0:26 {root} {at} rw,nosuid shared:9 - cgroup cgroup rw,memory",
        )
        self.write("proc/self/cgroup", f"5:cpu,cpuacct:/elsewhere\n4:memory:{path}\n1:name=systemd:{path}")

    def group_v2(self, path: str, limit: object, use: object, inactive: int = 0, high: object = "max") -> None:
        self.write(f"{path}/memory.max", limit)
        self.write(f"{path}/memory.high", high)
        self.write(f"{path}/memory.current", use)
        self.write(
            f"{path}/memory.stat", f"anon 1\nfile 2\nnot_inactive_file 1\ninactive_file {inactive}\nactive_file 3"
        )

    def group_v1(self, path: str, limit: object, use: object, inactive: int = 0) -> None:
        self.write(f"{path}/memory.limit_in_bytes", limit)
        self.write(f"{path}/memory.usage_in_bytes", use)
        stat = f"cache 1\ninactive_file 9\nactive_file 9\ntotal_cache 1\ntotal_inactive_file {inactive}\ntotal_active_file 3"
        self.write(f"{path}/memory.stat", stat)


@pytest.fixture
def root(tmp_path):
    yield Root(tmp_path)
    _C.read_limits_below("")


def v1(root: Root, path: str, *args, **kwargs) -> None:
    root.v1()
    root.group_v1(f"sys/fs/cgroup/memory{path}", *args, **kwargs)


def v2(root: Root, path: str, *args, **kwargs) -> None:
    root.v2()
    root.group_v2(f"sys/fs/cgroup{path}", *args, **kwargs)


@pytest.mark.parametrize("version", [v1, v2])
@pytest.mark.parametrize(
    ("limit", "use", "inactive", "room"),
    [
        (800 * MIB, 0, 0, 800 * MIB),
        (800 * MIB, 300 * MIB, 0, 500 * MIB),
        (800 * MIB, 800 * MIB, 0, 0),
        (800 * MIB, 900 * MIB, 0, 0),  # the limit was lowered
        (800 * MIB, 790 * MIB, 600 * MIB, 610 * MIB),  # pages of files that nobody has used lately are given up first
        (800 * MIB, 10 * MIB, 20 * MIB, 800 * MIB),  # counted at another moment
        (800 * MIB, "", 0, 0),  # a limit, and no telling what is used
        ("", 0, 0, MACHINE),
        (0, 0, 0, 0),
    ],
    ids=str,
)
def test_an_eighth_of_what_the_group_leaves(root, version, limit, use, inactive, room):
    version(root, "", limit, use, inactive)
    assert _C.most_kept() == room // 8


@pytest.mark.parametrize(
    ("version", "limit"),
    [(v2, "max"), (v1, NO_LIMIT_V1), (v1, 2**64 - 1), (v1, 10**30), (v1, -1), (v1, MACHINE), (v2, MACHINE)],
    ids=["v2 max", "v1 none", "v1 2**64 - 1", "v1 10**30", "v1 -1", "v1 machine", "v2 machine"],
)
def test_without_a_limit_an_eighth_of_the_machine(root, version, limit):
    version(root, "", limit, MACHINE - MIB)
    assert _C.most_kept() == MACHINE // 8


def test_memory_high_is_a_limit_too(root):
    v2(root, "", 800 * MIB, 100 * MIB, high=500 * MIB)
    assert _C.most_kept() == 400 * MIB // 8
    v2(root, "", "max", 100 * MIB, high=500 * MIB)
    assert _C.most_kept() == 400 * MIB // 8
    v2(root, "", 800 * MIB, 100 * MIB, high="max")
    assert _C.most_kept() == 700 * MIB // 8


@pytest.mark.parametrize("tightest", range(4))
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_tightest_ancestor_counts(root, version, tightest):
    getattr(root, version)("/pods/pod 7/container")
    base = "sys/fs/cgroup/memory" if version == "v1" else "sys/fs/cgroup"
    paths = ["", "/pods", "/pods/pod 7", "/pods/pod 7/container"]
    for i, path in enumerate(paths):
        if i == 1 and tightest != 1:
            continue  # a group whose files are missing
        left = 100 * MIB if i == tightest else 900 * MIB
        getattr(root, f"group_{version}")(base + path, 400 * MIB * (i + 1) + left, 400 * MIB * (i + 1))
    assert _C.most_kept() == 100 * MIB // 8


def test_a_group_beside_the_own_one_does_not_count(root):
    root.v2("/pods/a")
    root.group_v2("sys/fs/cgroup/pods/a", 800 * MIB, 0)
    root.group_v2("sys/fs/cgroup/pods/ab", 8 * MIB, 0)
    root.group_v2("sys/fs/cgroup/pods/a/below", 8 * MIB, 0)
    assert _C.most_kept() == 100 * MIB


@pytest.mark.parametrize(
    ("path", "mounted", "inside"),
    [
        ("/docker/7/child", "/docker/7", "/child"),  # the mount of a container that sees the machine's paths
        ("/docker/7", "/docker/7", ""),
        ("/docker/77", "/docker/7", ""),  # the mount does not show the group: what it shows is the container's
        ("/", "/../..", ""),
        ("/child", "/", "/child"),
    ],
)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_mounts_that_show_a_part_of_the_groups(root, version, path, mounted, inside):
    getattr(root, version)(path, mounted)
    base = "sys/fs/cgroup/memory" if version == "v1" else "sys/fs/cgroup"
    getattr(root, f"group_{version}")(base + inside, 800 * MIB, 0)
    assert _C.most_kept() == 100 * MIB


def test_a_mount_elsewhere_with_a_blank_in_its_name(root):
    root.v2("/a", at="/mnt/control\\040groups")
    root.group_v2("mnt/control groups/a", 800 * MIB, 0)
    assert _C.most_kept() == 100 * MIB


def test_both_versions_on_one_machine(root):
    """Memory may be accounted for by version 1 while version 2 is mounted beside it, with nothing about memory in it."""
    root.mount(
        "30 22 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
        "31 22 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
    )
    root.write("proc/self/cgroup", "4:memory:/a\n0::/b")
    root.write("sys/fs/cgroup/unified/b/cgroup.procs", "1")
    root.group_v1("sys/fs/cgroup/memory/a", 800 * MIB, 0)
    assert _C.most_kept() == 100 * MIB


@pytest.mark.parametrize("file", ["mountinfo", "cgroup"])
@pytest.mark.parametrize("text", [None, "", "nonsense", ":::\n - \n", "0::\n", "4:memory", "30 22 - cgroup2"], ids=repr)
def test_files_that_are_missing_or_say_nothing(root, file, text):
    v2(root, "", 800 * MIB, 0)
    root.write(f"proc/self/{file}", text)
    if text is None:
        (root.folder / "proc/self" / file).unlink()
    _C.read_limits_below(str(root.folder))
    assert _C.most_kept() == MACHINE // 8


def test_limits_are_read_again(root):
    root.v2("/a")
    root.group_v2("sys/fs/cgroup/a", 800 * MIB, 0)
    assert _C.most_kept() == 100 * MIB
    root.group_v2("sys/fs/cgroup/a", 800 * MIB, 400 * MIB)
    assert _C.most_kept() == 50 * MIB
    root.group_v2("sys/fs/cgroup/b", 160 * MIB, 0)
    root.write("proc/self/cgroup", "0::/b")  # the process was moved
    assert _C.most_kept() == 20 * MIB


@pytest.mark.parametrize("wanted", [0, MIB, 25 * MIB, 25 * MIB + 1, 2**63])
def test_what_is_wanted_changes_no_answer(root, wanted):
    """Where less than wanted is left, or as much, all is counted; so that the slow file is read only where it matters."""
    v2(root, "", 800 * MIB, 600 * MIB, 400 * MIB)
    found = _C.most_kept(wanted)
    assert found == (25 * MIB if wanted <= 25 * MIB else 75 * MIB)


def keep(rows: list[int]) -> None:
    """Frees gradients of (rows, V) fp32 that lived together."""
    grads = [
        torch.ops.accumloss.cross_entropy_with_grad(torch.ones(()), torch.zeros(n, V), torch.zeros(n).long())[-1]
        for n in rows
    ]
    while grads:
        grads.pop(0)


@needs_kept_memory
@pytest.mark.parametrize(
    ("rows", "most", "kept"),
    [
        ([1000, 2000], 3000, [1000, 2000]),
        ([1000, 2000], 2999, [2000]),  # each fits, both together do not
        ([2000, 1000], 2999, [2000]),
        ([1000, 1000], 1999, [1000]),
        ([3000, 1000, 500], 2999, [1000, 500]),  # the largest does not fit
        ([500, 3000, 1000], 2999, [500, 1000]),
        ([1000, 2000, 3000], 10000, [2000, 3000]),
        ([1000, 2000], 999, []),
        ([1000, 2000], 0, []),
    ],
    ids=str,
)
def test_both_blocks_together_stay_within_the_limit(root, rows, most, kept):
    gc.collect()
    accumloss.empty_cache()
    v2(root, "", most * V * 4 * 8, 0)
    keep(rows)
    assert accumloss.empty_cache() == sum(kept) * V * 4


@needs_kept_memory
def test_a_block_that_waits_is_given_back_when_room_is_short(root):
    gc.collect()
    accumloss.empty_cache()
    v2(root, "", 800 * MIB, 0)
    keep([2000, 3000])
    v2(root, "", 800 * MIB, 800 * MIB - 8 * 3000 * V * 4)  # others have taken the rest
    keep([500])  # is made in a block that waits, and looks at the limit when it is done
    assert accumloss.empty_cache() == 3000 * V * 4
    v2(root, "", 800 * MIB, 0)
    keep([2000, 3000])
    v2(root, "", 800 * MIB, 800 * MIB)
    keep([500])
    assert accumloss.empty_cache() == 0


# ------------------------------------------------------------------------------------------------------- a real group


@contextlib.contextmanager
def real_group(limit: int):
    """A control group of the system with a limit. Below the root: a group with processes may have none below it (v2)."""
    name = f"accumloss-test-{os.getpid()}"
    hierarchies = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
    base = next((path for path in hierarchies if (path / "cgroup.procs").exists()), None)
    if base is None:
        pytest.skip("no cgroup hierarchy is mounted here")
    group = base / name
    try:
        if base == hierarchies[1]:
            (base / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    try:
        try:
            (group / ("memory.max" if base == hierarchies[1] else "memory.limit_in_bytes")).write_text(str(limit))
        except OSError as error:
            pytest.skip(f"no cgroup can be given a limit here: {error}")
        yield group
    finally:
        group.rmdir()


# Goes into the group before torch is there, frees two gradients, and then fills what the group leaves but for 48 MiB.
IN_A_GROUP = """
import os, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
    procs.write(str(os.getpid()))
import torch, accumloss
from accumloss import _C
MIB = 2**20
def keep(*sizes):
    blocks = [torch.ops.accumloss.scratch(torch.zeros(1), mib, 2**18).fill_(1) for mib in sizes]
    del blocks
    return accumloss.empty_cache() // MIB
print(_C.most_kept() // MIB, keep(4), keep(95), keep(8, 8), keep(95, 95))
blocks = [torch.ops.accumloss.scratch(torch.zeros(1), 95, 2**18).fill_(1) for _ in range(2)]
del blocks
left = 8 * _C.most_kept()
others = bytearray(left - 48 * MIB)
others[::4096] = b"x" * len(others[::4096])
print("alive")
"""


@pytest.mark.slow("a process of its own; files stand in for control groups in every test above")
@needs_kept_memory
def test_a_process_in_a_small_group_is_not_killed():
    """Two gradients of 95 MiB in a group of 760 MiB: idle, they would take what the others need."""
    with real_group(760 * MIB) as group:
        command = [sys.executable, "-c", IN_A_GROUP, str(group)]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    figures, alive = done.stdout.splitlines()
    most, small, large, two_small, two_large = map(int, figures.split())
    assert 16 <= most < 95  # of what torch leaves of 760 MiB
    assert (small, large, two_small, two_large) == (4, 0, 16, 0)
    assert alive == "alive"
