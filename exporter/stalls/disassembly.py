"""Says in text what an instruction's bytes are, where capstone is installed (the extra ``capstone``).

Nobody knows from outside in which mode the guest's CPU is, so the text is what the bytes are in 64-bit mode. They are
the guest's choice, and capstone reads them in this process: leave it out where that is too much.
"""

from __future__ import annotations


def disassemble(code: bytes, rip: int) -> str:
    """Return the first instruction of ``code`` as 64-bit text; "" where there is none, or no capstone."""
    try:
        import capstone  # noqa: PLC0415 - an extra, and needed by few
    except ImportError:
        return ""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    for _address, _size, mnemonic, operands in decoder.disasm_lite(code, rip, 1):
        return f"{mnemonic} {operands}".strip()
    return ""
