"""What a kernel's machine code (SASS) shows: the widths of its loads, those inside loops, and its PDL instructions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

# Loads and asynchronous copies from global memory; LD is a load whose address space the compiler does not know.
LOADS = frozenset({"LDG", "LD", "LDGSTS"})
STORES = frozenset({"STG", "ST", "ATOM", "ATOMG", "RED", "REDG"})
# Programmatic dependent launch: griddepcontrol.wait and griddepcontrol.launch_dependents.
WAIT, TRIGGER = "ACQBULK", "PREEXIT"
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """Return the bytes per thread of a load or store."""
        return next((_BYTES[part] for part in self.opcode.split(".")[1:] if part in _BYTES), 4)

    @property
    def target(self) -> int | None:
        """Return the address that a branch or call jumps to."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name in ("BRA", "CALL") else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class MachineCode:
    """
    Args:
        loads: bytes per thread -> number of load instructions from global memory.
        loop_loads: those inside a loop that has no other loop inside.
        outer_loads: those inside a loop, but outside its inner loops.
        waits, triggers: PDL instructions.
        early: accesses to global memory that can be reached without a wait; 0 if there is no wait at all.
        prefetches: prefetches into L2.
    """

    loads: dict[int, int]
    loop_loads: dict[int, int]
    outer_loads: dict[int, int]
    waits: int
    triggers: int
    early: int
    prefetches: int


def parse(sass: str) -> list[Instruction]:
    """Return the instructions of a listing of one kernel by `cuobjdump -sass`."""
    return [
        Instruction(int(address, 16), predicate or "", opcode, operands.strip())
        for address, predicate, opcode, operands in _INSTRUCTION.findall(sass)
    ]


def read(sass: str) -> MachineCode:
    """Return the summary of a listing of one kernel."""
    code = parse(sass)
    places = {instruction.address: i for i, instruction in enumerate(code)}
    successors = {i: _successors(code, i, places) for i in range(len(code))}
    inner, outer = _loops(code, successors)
    loads = [i for i in code if i.name in LOADS]
    waits = sum(i.name == WAIT for i in code)
    ahead = _before_wait(code, successors) if waits else set()
    return MachineCode(
        loads=_widths(loads),
        loop_loads=_widths([i for i in loads if i.address in inner]),
        outer_loads=_widths([i for i in loads if i.address in outer]),
        waits=waits,
        triggers=sum(i.name == TRIGGER for i in code),
        early=sum(code[i].name in LOADS | STORES for i in ahead),
        prefetches=sum(i.name == "CCTL" and ".PF" in i.opcode for i in code),
    )


def _widths(loads: list[Instruction]) -> dict[int, int]:
    return dict(sorted(Counter(i.bytes for i in loads).items()))


def _before_wait(code: list[Instruction], successors: dict[int, list[int]]) -> set[int]:
    """Return the instructions that can be reached from the first one without passing a wait."""
    found: set[int] = set()
    waiting = [0]
    while waiting:
        i = waiting.pop()
        if i not in found and code[i].name != WAIT:
            found.add(i)
            waiting.extend(successors[i])
    return found


def _loops(code: list[Instruction], successors: dict[int, list[int]]) -> tuple[set[int], set[int]]:
    """Return the addresses inside innermost loops, and those inside a loop around others but not in them.

    A backward branch alone is no loop: the compiler moves rare paths behind the end of the kernel, and they jump back.
    """
    predecessors: dict[int, set[int]] = {i: set() for i in successors}
    for i, after in successors.items():
        for j in after:
            predecessors[j].add(i)
    inner: set[int] = set()
    outer: set[int] = set()

    def visit(nodes: set[int]) -> bool:
        """Find the loops among the instructions `nodes`; return whether there is one."""
        found = False
        for loop in _components(nodes, successors):
            if len(loop) == 1 and next(iter(loop)) not in successors[next(iter(loop))]:
                continue
            found = True
            # A loop without the instructions that it is entered at falls apart, except for the loops inside it.
            rest = loop - ({i for i in loop if not predecessors[i] <= loop} or {min(loop)})
            before = set(inner)
            has_inner = visit(rest)
            (outer if has_inner else inner).update(loop - (inner - before))
        return found

    visit(set(successors))
    return {code[i].address for i in inner}, {code[i].address for i in outer - inner}


def _successors(code: list[Instruction], i: int, places: dict[int, int]) -> list[int]:
    instruction = code[i]
    after = [i + 1] if i + 1 < len(code) else []
    if instruction.target is not None:
        jump = [places[instruction.target]] if instruction.target in places else []
        # `BRA P0, target` is conditional too. A call may return, or be a jump out of a loop.
        always = instruction.name == "BRA" and not instruction.predicate and instruction.operands.startswith("0x")
        return jump if always else [*jump, *after]
    if instruction.name in ("EXIT", "RET") and not instruction.predicate:
        return []
    return after


def _components(nodes: set[int], successors: dict[int, list[int]]) -> Iterator[set[int]]:
    """Yield the strongly connected components among `nodes`, by Tarjan's algorithm without recursion."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    for root in sorted(nodes):
        if root in index:
            continue
        work = [(root, iter(successors[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for child in rest:
                if child not in nodes:
                    continue
                if child not in index:
                    index[child] = low[child] = len(index)
                    stack.append(child)
                    on_stack.add(child)
                    work.append((child, iter(successors[child])))
                    break
                if child in on_stack:
                    low[node] = min(low[node], index[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component: set[int] = set()
                    while node not in component:
                        component.add(stack.pop())
                    on_stack -= component
                    yield component
