"""Threads that wait for work in compiled code, so that handing it out takes a microsecond and no interpreter's lock.

A pool of Python threads costs some 0.4 ms to run a kernel on 16 cores: each thread needs the lock to begin. Here they
spin on one number for as long as they are assembled, a decoding step, and sleep a few milliseconds after it.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

from kvbench.indexes.compiled import Int64, kernel

# Places in the mail, 64 bytes apart where different threads write. A ticket is one number: generation, parts, part.
NEXT, GENERATION, SLOT, SLOTS, JOB, BLOCK, DONE = 0, 8, 16, 2, 0, 1, 8
_MAIL = SLOT + SLOTS * 16
BITS = 20
MASK = (1 << BITS) - 1
IDLE = 100_000
"""Looks for work in a row, some 5 ms, after which a thread sleeps: longer than the time from step to step."""

_ON_INTEL = platform.machine().lower() in ("x86_64", "amd64")


def _element(context: Any, builder: Any, kind: Any, mail: Any, place: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, mail).data, [place])


@intrinsic  # type: ignore[untyped-decorator]
def add(context: Any, mail: Any, place: Any, number: Any) -> Any:
    """Add to a number of the mail at once; gives what it was."""
    signature = types.int64(mail, types.intp, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _element(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.atomic_rmw("add", where, arguments[2], "seq_cst")

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def look(context: Any, mail: Any, place: Any) -> Any:
    """A number of the mail as it is now."""
    signature = types.int64(mail, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _element(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.load_atomic(where, "seq_cst", 8)

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def put(context: Any, mail: Any, place: Any, number: Any) -> Any:
    """Set a number of the mail, after all that was written before."""
    signature = types.void(mail, types.intp, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = _element(context, builder, signature.args[0], arguments[0], arguments[1])
        builder.store_atomic(arguments[2], where, "seq_cst", 8)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def rest(context: Any) -> Any:
    """Tell the processor that this thread is waiting."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _ON_INTEL:
            nothing = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), nothing), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def call(context: Any, job: Any, part: Any, parts: Any, block: Any) -> Any:
    """Call the compiled function at the address `job`."""
    signature = types.void(types.int64, types.int64, types.int64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word, word])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic  # type: ignore[untyped-decorator]
def spill(context: Any, values: Any) -> Any:
    """The address of a tuple on the stack of the function that this is part of."""
    signature = types.int64(values)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        where = cgutils.alloca_once_value(builder, arguments[0])
        return builder.ptrtoint(where, ir.IntType(64))

    return signature, codegen


@kernel
def take_parts(mail: Int64) -> None:
    """Do parts of the present work until none is left."""
    while True:
        ticket = add(mail, NEXT, 1)
        part, parts = ticket & MASK, (ticket >> BITS) & MASK
        if part >= parts:
            return
        slot = SLOT + ((ticket >> (2 * BITS)) % SLOTS) * 16
        call(look(mail, slot + JOB), part, parts, look(mail, slot + BLOCK))
        add(mail, slot + DONE, 1)


@kernel
def serve(mail: Int64, idle: int) -> None:
    """Wait for work and do it, until `idle` looks in a row found none."""
    looks = 0
    while looks < idle:
        ticket = look(mail, NEXT)
        if ticket & MASK < (ticket >> BITS) & MASK:
            take_parts(mail)
            looks = 0
        else:
            rest()
            looks += 1


@cache
def leader(work: Callable[..., None]) -> Callable[[Int64, int, tuple[Any, ...]], None]:
    """What hands the parts of `work(part, parts, *arguments)` out, takes some itself and waits for the others."""

    @intrinsic  # type: ignore[untyped-decorator]
    def address(context: Any, arguments: Any) -> Any:
        """The address of a function that reads the arguments at an address and does a part of the work."""

        @intrinsic  # type: ignore[untyped-decorator]
        def read(context: Any, place: Any) -> Any:
            signature = arguments(types.int64)

            def codegen(context: Any, builder: Any, signature: Any, given: Any) -> Any:
                kind = context.get_value_type(arguments)
                value = builder.load(builder.inttoptr(given[0], kind.as_pointer()))
                return impl_ret_borrowed(context, builder, arguments, value)

            return signature, codegen

        def run(part: int, parts: int, place: int) -> None:
            work(part, parts, *read(place))

        compiled = numba.cfunc(types.void(types.int64, types.int64, types.int64), nopython=True)(run)
        _kept.append(compiled)
        signature = types.int64(arguments)

        def codegen(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return ir.Constant(ir.IntType(64), compiled.address)

        return signature, codegen

    def lead(mail: Int64, parts: int, arguments: tuple[Any, ...]) -> None:
        generation = mail[GENERATION] + 1
        mail[GENERATION] = generation
        slot = SLOT + (generation % SLOTS) * 16
        put(mail, slot + JOB, address(arguments))
        put(mail, slot + BLOCK, spill(arguments))
        put(mail, slot + DONE, 0)
        put(mail, NEXT, (((generation & MASK) << BITS) | parts) << BITS)
        take_parts(mail)
        while look(mail, slot + DONE) < parts:
            rest()

    found: Callable[[Int64, int, tuple[Any, ...]], None] = numba.njit(nogil=True)(lead)
    return found


_kept: list[Any] = []
"""The functions whose addresses are in use."""


class Crew:
    """Threads beside the calling one; `run` hands them work while they are assembled."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.assembled = False
        self._mail = np.zeros(_MAIL + 8, np.int64)
        self._go = threading.Event()
        self._leading = threading.Lock()
        serve(self._mail, 1)  # compiled before the threads need it
        for number in range(threads):
            threading.Thread(target=self._stay, name=f"kvbench-crew-{number}", daemon=True).start()

    def _stay(self) -> None:
        while True:
            self._go.wait()
            serve(self._mail, IDLE)

    def assemble(self) -> None:
        """Wake the threads, which then spin until `dismiss`."""
        self.assembled = True
        self._go.set()

    def dismiss(self) -> None:
        """Let the threads sleep once they find no work for a while."""
        self.assembled = False
        self._go.clear()

    def run(self, work: Callable[..., None], parts: int, arguments: tuple[Any, ...]) -> bool:
        """Run a compiled `work(part, parts, *arguments)` for all parts; False where another thread is at it."""
        if not self._leading.acquire(blocking=False):
            return False
        try:
            leader(work)(self._mail, parts, arguments)
        finally:
            self._leading.release()
        return True
