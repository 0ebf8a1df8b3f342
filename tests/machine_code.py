"""Single instructions that no compiler is asked for."""

import ctypes
import mmap


def run(instruction: str, *addresses: int) -> None:
    """Run an x86-64 instruction, in hexadecimal digits; the first address is in rdi."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex(instruction + "c3"))
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(addresses))
    function(ctypes.addressof(ctypes.c_char.from_buffer(code)))(*addresses)
