"""Pages that a process gets anew, counted by the system."""

import ctypes
import subprocess
import sys

import pytest

NUM_PAGES = 40 * 2**20 // 4096
# Writes to 40 MiB and frees it, again and again; prints how many pages were new after the first.
PROGRAM = """
import ctypes, resource, sys
from model.process_memory import give_back_freed_memory, reuse_freed_memory
if sys.argv[1] == "reuse":
    reuse_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
def write_and_free():
    memory = library.malloc(ctypes.c_size_t(40 * 2**20))
    ctypes.memset(memory, 1, 40 * 2**20)
    library.free(ctypes.c_void_p(memory))
def new_pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
write_and_free()
before = new_pages()
for _ in range(4):
    write_and_free()
print(new_pages() - before)
give_back_freed_memory()
before = new_pages()
write_and_free()
print(new_pages() - before)
"""


def new_pages(way):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, timeout=60, check=True
    )
    return [*map(int, done.stdout.split())]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not the GNU C library")
def test_a_large_result_finds_the_pages_of_the_one_before_until_they_are_given_back():
    in_between, after_giving_back = new_pages("reuse")
    assert in_between < 100
    assert after_giving_back > 0.9 * NUM_PAGES
    # What happens otherwise, or the test would say nothing.
    assert new_pages("default")[0] > 3.6 * NUM_PAGES
