"""Does the execution layer of the cpu target hold on machines unlike this one?

A library that is preloaded into a child makes this machine look like another: more cores, larger pages.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from checked import REPOSITORY, build_checked, checked_environment, python

from aiter.jit.compilers import find_compiler
from aiter.jit.load import default_loader
from aiter.jit.target import cpu_target

OTHER_MACHINE = r"""
#include <dlfcn.h>
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static long asked(const char* name) { return getenv(name) ? atol(getenv(name)) : 0; }

extern "C" int sched_getaffinity(pid_t pid, size_t size, cpu_set_t* set) noexcept {
  if (asked("FAKE_CORES") == 0) {
    return reinterpret_cast<int (*)(pid_t, size_t, cpu_set_t*)>(
        dlsym(RTLD_NEXT, "sched_getaffinity"))(pid, size, set);
  }
  memset(set, 0, size);
  for (long i = 0; i < asked("FAKE_CORES"); ++i) CPU_SET_S(i, size, set);
  return 0;
}

extern "C" long sysconf(int name) noexcept {
  if (name == _SC_PAGESIZE && asked("FAKE_PAGE") != 0) return asked("FAKE_PAGE");
  return reinterpret_cast<long (*)(int)>(dlsym(RTLD_NEXT, "sysconf"))(name);
}

extern "C" int mprotect(void* begin, size_t size, int access) noexcept {
  const size_t page = asked("FAKE_PAGE");
  if (page != 0 && access == PROT_NONE) {  // as a kernel with such pages has it
    if (reinterpret_cast<size_t>(begin) % page != 0) return errno = EINVAL, -1;
    size = (size + page - 1) / page * page;
  }
  return reinterpret_cast<int (*)(void*, size_t, int)>(dlsym(RTLD_NEXT, "mprotect"))(
      begin, size, access);
}
"""

ROUTE = """
import torch
from aiter import reference
from aiter.fused_moe import topk_softmax_sorting
torch.set_num_threads(1)
for m, e, policy in ((64, 128, 0), (1024, 256, 2)):
    logits = torch.randn(m, e)
    for _ in range(6):
        got = topk_softmax_sorting(logits, 8, e, 1024, torch.bfloat16, dispatch_policy=policy)
    expected = reference.topk_softmax_sorting(logits, 8, e, 1024, torch.bfloat16)
    slots = int(expected[3][0])
    assert torch.equal(got[0][:slots], expected[0][:slots])
torch.ones(1 << 26)
print(sum(1 for _ in open("/proc/self/maps")), "mappings")
"""

THREADS = """
import threading
import torch
from aiter.fused_moe import topk_softmax_sorting

def work():
    logits = torch.randn(8, 16)
    for _ in range(30):
        topk_softmax_sorting(logits, 2, 16, 64, torch.bfloat16)

threads = [threading.Thread(target=work) for _ in range(3)]
failed = []
threading.excepthook = lambda args: failed.append(str(args.exc_value))
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"""


@pytest.fixture(scope="module")
def other_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_machine")
    source, library = folder / "other_machine.cpp", folder / "other_machine.so"
    source.write_text(OTHER_MACHINE)
    command = [*find_compiler("cpu").command, "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run([*command, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("what", [{"FAKE_CORES": "96"}, {"FAKE_PAGE": "65536"}], ids=str)
def test_many_cores_and_large_pages(other_machine: Path, what: dict[str, str]) -> None:
    """Stacks of lanes in few mappings, of which a process has 65530, and no guard on another's."""
    for module in ("fused_topk_moe_sorting", "topk_softmax", "moe_sorting_opus"):
        default_loader().ensure(f"module_{module}", cpu_target())
    variables = {
        **os.environ, **what, "LD_PRELOAD": str(other_machine), "PYTHONPATH": str(REPOSITORY)
    }  # fmt: skip
    done = subprocess.run(
        python("-c", ROUTE), env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    count, _ = done.stdout.split()
    assert int(count) < 10_000


@pytest.mark.slow
def test_threads_under_the_race_check() -> None:
    """What the check remembers is of one launch, so that launches of others wait."""
    build_checked(default_loader(), ["module_fused_topk_moe_sorting"], "race", 64)
    done = subprocess.run(
        python("-c", THREADS), env=checked_environment("race", 64), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "[]\n", done.stdout + done.stderr
