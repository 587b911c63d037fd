"""Every order in which partitions of a kernel, its copies and its products can act on mbarriers: a state-space search.

A partition is a list of events, as `gluon_emulator` records them: ("wait", barrier, parity), ("arrive", barrier),
("expect", barrier, bytes), ("copy", barrier, box, bytes), ("product", box, box) and ("finish", n), which waits until at
most n products are in flight. A copy lands, and a product finishes, at any later moment; the products of a partition
finish in their order.

An mbarrier is what the hardware has: the current phase's parity, the arrivals that it still lacks, and the bytes that
are announced less those that have landed. The phase ends when both are 0. A wait for a parity passes if and only if the
current phase has the other one.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Fault(Exception):
    """Something that must not happen."""


class State(NamedTuple):
    at: tuple[int, ...]
    """next event of each partition"""
    barriers: tuple[tuple[int, int, int], ...]
    """(parity, arrivals to come, bytes to come)"""
    copies: tuple[tuple, ...]
    """(barrier, boxes, bytes) on their way"""
    finished: tuple[int, ...]
    """products that have finished, by partition"""
    filled: tuple[tuple[int, int], ...]
    """(fillings that were started, that have landed), by box"""


class Model:
    def __init__(self, counts: dict, partitions: list[list[tuple]]):
        self.counts = counts
        self.barriers = {bar: i for i, bar in enumerate(counts)}
        self.partitions = [list(merged(events)) for events in partitions]
        boxes = {box for events in self.partitions for e in events if e[0] == "copy" for box in e[2]}
        self.boxes = {box: i for i, box in enumerate(sorted(boxes))}
        # by partition: at each event the products before it; for each product, what it reads: (box, which filling)
        self.issued, self.reads = [], []
        for events in self.partitions:
            count, seen, issued, reads = 0, {}, [], []
            for event in events:
                issued.append(count)
                if event[0] == "product":
                    count += 1
                    reads.append([(self.boxes[box], seen.get(box, 0)) for box in event[1:]])
                    seen |= {box: seen.get(box, 0) + 1 for box in event[1:]}
            self.issued.append([*issued, count])
            self.reads.append(reads)
        # by box: for each partition that reads it, the number of the product that reads its n-th filling
        self.readers = {
            i: [
                [k for k, read in enumerate(reads) for box, _ in read if box == i]
                for reads in self.reads
                if any(box == i for read in reads for box, _ in read)
            ]
            for i in self.boxes.values()
        }
        self.reading = {
            i: [p for p, reads in enumerate(self.reads) if any(box == i for read in reads for box, _ in read)]
            for i in self.boxes.values()
        }

    def start(self) -> State:
        n = len(self.partitions)
        barriers = tuple((0, self.counts[bar], 0) for bar in self.barriers)
        return State((0,) * n, barriers, (), (0,) * n, ((0, 0),) * len(self.boxes))

    def explore(self, limit: int = 2_000_000) -> int:
        """The number of states; raises a Fault where one can be reached that must not be."""
        first = self.start()
        seen, queue = {first}, deque([first])
        while queue:
            state = queue.popleft()
            following = list(self.following(state))
            if not following and not self.over(state):
                raise Fault(f"deadlock at {[e[i : i + 1] for e, i in zip(self.partitions, state.at, strict=True)]}")
            for after in following:
                if after not in seen:
                    seen.add(after)
                    queue.append(after)
            assert len(seen) < limit
        return len(seen)

    def over(self, state: State) -> bool:
        done = all(i == len(events) for i, events in zip(state.at, self.partitions, strict=True))
        return done and not state.copies and all(b[2] == 0 for b in state.barriers)

    def following(self, state: State):
        for copy in state.copies:
            yield self.landed(state, copy)
        for p, events in enumerate(self.partitions):
            if state.finished[p] < self.issued[p][state.at[p]]:
                self.check_reads(state, p, state.finished[p])
                yield state._replace(finished=put(state.finished, p, state.finished[p] + 1))
            if state.at[p] < len(events):
                after = self.act(state, p, events[state.at[p]])
                if after is not None:
                    yield after._replace(at=put(state.at, p, state.at[p] + 1))

    def act(self, state: State, p: int, event: tuple) -> State | None:
        """The state after partition p's event, if that can happen now."""
        kind = event[0]
        if kind == "finish":
            return state if self.issued[p][state.at[p]] - state.finished[p] <= event[1] else None
        if kind == "product":
            self.check_reads(state, p, self.issued[p][state.at[p]])
            return state
        bar = self.barriers[event[1]]
        if kind == "wait":
            return state if state.barriers[bar][0] != event[2] else None
        if kind == "arrive":
            return state._replace(barriers=self.signal(state.barriers, bar, 1, 0))
        if kind == "expect":
            return state._replace(barriers=self.signal(state.barriers, bar, 1, event[2]))
        filled = state.filled
        for box in event[2]:
            i = self.boxes[box]
            started, landed = filled[i]
            for reader, products in zip(self.reading[i], self.readers[i], strict=True):
                if started and state.finished[reader] <= products[started - 1]:
                    raise Fault(f"{box} is overwritten before partition {reader} has read it")
            filled = put(filled, i, (started + 1, landed))
        copies = tuple(sorted((*state.copies, (bar, event[2], event[3]))))
        return state._replace(filled=filled, copies=copies)

    def landed(self, state: State, copy: tuple) -> State:
        bar, boxes, size = copy
        rest = list(state.copies)
        rest.remove(copy)
        filled = state.filled
        for box in boxes:
            i = self.boxes[box]
            filled = put(filled, i, (filled[i][0], filled[i][1] + 1))
        return state._replace(copies=tuple(rest), filled=filled, barriers=self.signal(state.barriers, bar, 0, -size))

    def signal(self, barriers: tuple, i: int, arrivals: int, size: int) -> tuple:
        parity, missing, bytes_ = barriers[i]
        missing, bytes_ = missing - arrivals, bytes_ + size
        if missing < 0:
            raise Fault(f"one arrival too many at {list(self.barriers)[i]}")
        if missing == bytes_ == 0:
            parity, missing = parity ^ 1, self.counts[list(self.barriers)[i]]
        return put(barriers, i, (parity, missing, bytes_))

    def check_reads(self, state: State, p: int, product: int) -> None:
        for box, filling in self.reads[p][product]:
            if state.filled[box] != (filling + 1, filling + 1):
                raise Fault(f"partition {p} reads filling {filling} of box {box}, which has {state.filled[box]}")


def put(values: tuple, i: int, value) -> tuple:
    return (*values[:i], value, *values[i + 1 :])


def merged(events):
    """The events, with copies that follow each other to one barrier as one: they land as one."""
    held = None
    for event in events:
        if event[0] == "copy":
            _, bar, box, size = event
            same = held is not None and held[1] == bar
            if held is not None and not same:
                yield held
            held = ("copy", bar, (*held[2], box), held[3] + size) if same else ("copy", bar, (box,), size)
        else:
            if held is not None:
                yield held
            held = None
            if event[0] in ("wait", "arrive", "expect", "product", "finish"):
                yield event
    if held is not None:
        yield held
