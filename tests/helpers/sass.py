"""What ptxas made of a kernel: its instructions, and those that a warp executes after the main loop.

The epilogue of a tile kernel is its longest straight piece, and decides how long the tensor cores wait. Masks that few
tiles need lie behind branches; so what counts is the path that leaves them out, the shortest from the last product to
the end.
"""

from __future__ import annotations

import heapq
import re
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Address that a branch goes to."""
        address = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(address[1], 16) if address and self.opcode.startswith("BRA") else None

    @property
    def always(self) -> bool:
        """Whether a branch has no condition, neither a predicate in front nor one among its operands."""
        return not self.predicate and not re.search(r"\bU?P\d", self.operands)


def instructions(sass: str) -> list[Instruction]:
    """Of ``cuobjdump -sass``."""
    return [
        Instruction(int(address, 16), (predicate or "").strip(), opcode, operands.strip())
        for address, predicate, opcode, operands in _LINE.findall(sass)
    ]


def epilogue(code: list[Instruction], product: str) -> list[str]:
    """Opcodes on the shortest path from the last ``product`` (the start of its opcode) to an EXIT; none where
    there is no such path, as in warp-specialised kernels, which jump by register."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    start = max((i for i, x in enumerate(code) if x.opcode.startswith(product)), default=None)
    if start is None:
        return []
    before = {start: start}
    queue = [(0, start)]
    while queue:
        length, i = heapq.heappop(queue)
        if code[i].opcode == "EXIT":
            path = []
            while i != start:
                path.append(code[i].opcode)
                i = before[i]
            return path[::-1]
        following = [index.get(code[i].target)]
        if following == [None] or not code[i].always:
            following.append(i + 1)
        for j in following:
            if j is not None and j < len(code) and j not in before:
                before[j] = i
                heapq.heappush(queue, (length + 1, j))
    return []
