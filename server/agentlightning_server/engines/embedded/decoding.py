"""Continuous batching: requests join and leave a running batch, and share what they have in common.

A row is one history of tokens that is being continued; a lane is a row with the requests that continue it.
Requests with an equal history share a lane until they draw different tokens, then the row forks; a late one
catches up as far as it draws what others drew. Rows that start with the same long prefix share it as a
trunk. What rows hold stays after their requests end, for prompts that continue it. One thread only;
asynchrony is `worker`'s business.
Invariant: there are at least as many rows as requests under way, so a fork always finds one.
"""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from agentlightning_server.engines.base import FinishReason

from .cache import KeyValueStore, Row, RowsView, Trunk
from .lanes import DecodeStats, Lane, Request, alike, settle
from .memory import DrawMemory
from .placement import MIN_TRUNK, Sequenced, common_prefix, worthwhile_prefix
from .sampling import Draw, draw

Forward = Callable[[Tensor, RowsView, bool], Tensor]
"""(ids [B, T], view, whether logits are wanted) -> logits of the last position [B, V], or anything."""

MAX_TRUNKS = 8  # each costs a few small products per layer and step
_FIRST_ROWS = 4
_CAPACITY_STEP = 64  # tokens per row; capacity grows by at least half, rounded up to this


class Decoder:
    """Decodes many requests together with one model; see the module's docstring."""

    def __init__(
        self,
        forward: Forward,
        *,
        eos_ids: frozenset[int],
        slots: int,
        cache_tokens: int,
        prefill_tokens: int,
        device: torch.device,
        stats: DecodeStats | None = None,
    ) -> None:
        self._forward = forward
        self._eos = eos_ids
        self._slots = slots
        self._cache_tokens = cache_tokens
        self._prefill_tokens = prefill_tokens
        self._device = device
        self._store = KeyValueStore(0, 0)
        self._rows: list[Row] = []
        self._trunks: list[Trunk] = []
        self._lanes: list[Lane] = []
        self._parked: deque[Request] = deque()
        self._memory = DrawMemory()
        self._clock = 0
        self.version = 0
        self.stats = stats or DecodeStats()

    @property
    def busy(self) -> bool:
        """Whether completions are under way."""
        return bool(self._lanes or self._parked)

    def drop_caches(self) -> None:
        """Forget all keys and values, as after a weight update; which prefixes were shared is remembered."""
        for trunk in self._trunks:
            trunk.keys, trunk.values = [], []
        self._rows, self._store = [], KeyValueStore(0, 0)
        self._memory.clear()

    def abort(self, error: BaseException) -> None:
        """Answer everything under way with an error."""
        for request in [*self._requests(), *self._parked]:
            settle(request.future, error)
        self._lanes, self._parked = [], deque()
        self.drop_caches()

    # --- joining ---------------------------------------------------------------------------------

    def admit(self, waiting: deque[Request], *, new: bool = True) -> None:
        """Let requests join while there is room: set aside ones first, then, if `new`, waiting ones."""
        self._clock += 1
        taken: list[Request] = []
        self._take(self._parked, taken)
        if new and not self._parked:
            self._take(waiting, taken)
        if not taken:
            return
        try:
            groups = alike(taken)
            self._form_trunks(groups)
            self._prefill(self._place(groups))
        except BaseException as error:  # some are not in a lane yet, where `abort` would find them
            for request in taken:
                settle(request.future, error)
            raise

    def _take(self, queue: deque[Request], taken: list[Request]) -> None:
        """Move requests from the head of a queue to `taken`, as long as all of it fits in beside those
        under way."""
        lanes = sum(len(lane.requests) for lane in self._lanes) + len(taken)
        longest = max((len(lane.row.tokens) for lane in self._lanes), default=0)
        longest = max([longest, *(self._own_length(r) for r in taken)])
        while queue:
            if lanes and lanes >= self._rows_at(max(longest, self._own_length(queue[0])) + 1):
                return
            request = queue.popleft()
            if request.future.cancelled() or not self._catch_up(request):
                continue
            longest = max(longest, self._own_length(request))
            if lanes and lanes >= self._rows_at(longest + 1):  # longer now than it was
                self._parked.appendleft(request)
                return
            taken.append(request)
            lanes += 1

    def _catch_up(self, request: Request) -> bool:
        """Give a request the tokens that earlier ones show it would draw; False when that finishes it."""
        if not request.follows_others:
            return True
        temperature = request.sampling.temperature
        while drawn := self._memory.recall(request.history(), temperature, request.uniform):
            self.stats.recalled += 1
            if not self._give(request, drawn):
                return False
        return True

    def _own_length(self, request: Request) -> int:
        """Tokens that the request needs in a row of its own."""
        history = request.history()
        return len(history) - self._covered(history)

    def _rows_at(self, capacity: int) -> int:
        return max(1, min(self._slots, self._cache_tokens // capacity))

    def _place(self, groups: Sequence[list[Request]]) -> list[tuple[Row, list[int]]]:
        """Give each group a row, and say what the row still has to read: continuations stay where they are,
        the rest take the row that was unused for longest, with a copy of what is already known of them."""
        self._ensure(sum(map(len, groups)), max(self._own_length(group[0]) for group in groups))
        todo: list[tuple[Row, list[int]]] = []
        later: list[list[Request]] = []
        for group in groups:
            if self._join(group):
                continue
            row, known = self._best_row(group[0].history())
            if row is not None and known == len(row.tokens) and row in self._free():
                todo.append((row, self._open(group, row)))
            else:
                later.append(group)
        for group in later:
            source, known = self._best_row(group[0].history())
            row = min(self._free(), key=lambda r: (r is source, r.last_used))
            if source is not None and source is not row:
                self._store.copy_rows([source.index], [row.index], known)
                row.tokens = source.tokens[:known]
            else:
                row.tokens = row.tokens[:known] if source is row else []
            row.trunk = self._trunk_of(group[0].history())
            todo.append((row, self._open(group, row)))
        return todo

    def _join(self, group: list[Request]) -> bool:
        """Let a group into the lane that is just where it is, if there is one."""
        history, temperature = group[0].history(), group[0].sampling.temperature
        near = [lane for lane in self._lanes if lane.row.length + 1 == len(history)]
        same = [lane for lane in near if lane.temperature == temperature and lane.history() == history]
        for lane in same[:1]:
            lane.requests += group
            self.stats.reused += len(group) * (len(history) - 1)
        return bool(same)

    def _open(self, group: list[Request], row: Row) -> list[int]:
        history = group[0].history()
        row.last_used = self._clock
        self._lanes.append(Lane(row, history[-1], group))
        self.stats.reused += row.length + (len(group) - 1) * (len(history) - 1)
        return history[row.length : -1]

    def _best_row(self, history: list[int]) -> tuple[Row | None, int]:
        """The row that holds most of a history after its trunk, and how many tokens of it."""
        trunk = self._trunk_of(history)
        tail = history[len(trunk.tokens) if trunk else 0 : -1]
        best: tuple[Row | None, int] = (None, 0)
        for row in self._rows:
            known = common_prefix(row.tokens, tail) if row.trunk is trunk else 0
            if known > best[1]:
                best = row, known
        return best

    def _free(self) -> list[Row]:
        taken = {id(lane.row) for lane in self._lanes}
        return [row for row in self._rows if id(row) not in taken]

    @torch.no_grad()
    def _prefill(self, todo: list[tuple[Row, list[int]]]) -> None:
        todo = sorted([t for t in todo if t[1]], key=lambda t: len(t[1]))
        while todo:
            size = 1
            while size < len(todo) and (size + 1) * len(todo[size][1]) <= self._prefill_tokens:
                size += 1
            self._read(self._store, todo[:size])
            todo = todo[size:]

    def _read(self, store: KeyValueStore, todo: Sequence[tuple[Row, list[int]]]) -> None:
        """Compute keys and values of the tokens that each row has to read, a budgeted piece at a time."""
        rows = [row for row, _ in todo]
        done, total = 0, max(len(tokens) for _, tokens in todo)
        while done < total:
            pieces = [tokens[done : done + self._prefill_tokens] for _, tokens in todo]
            width = max(map(len, pieces))
            ids = torch.tensor([p + [0] * (width - len(p)) for p in pieces], device=self._device)
            self._forward(ids, RowsView(store, rows, [len(p) for p in pieces], self._device), False)
            for row, piece in zip(rows, pieces, strict=True):
                row.tokens = row.tokens + piece
            self.stats.computed += sum(map(len, pieces))
            done += width

    # --- shared prefixes -------------------------------------------------------------------------

    def _trunk_of(self, history: list[int]) -> Trunk | None:
        """The longest stored trunk that the history starts with and goes beyond."""
        found = [t for t in self._trunks if t.keys and _starts(history[:-1], t.tokens)]
        return max(found, key=lambda t: len(t.tokens), default=None)

    def _covered(self, history: list[int]) -> int:
        known = [len(t.tokens) for t in self._trunks if _starts(history[:-1], t.tokens)]
        return max(known, default=0)

    def _form_trunks(self, groups: Sequence[list[Request]]) -> None:
        """Store the prefixes that these requests share among themselves and with rows being decoded."""
        for group in groups:
            for trunk in self._trunks:
                if _starts(group[0].history()[:-1], trunk.tokens):
                    trunk.last_used = self._clock
                    if not trunk.keys:
                        self._fill(trunk)
        while any(self._could_share_more(group[0]) for group in groups):
            pending = [(g[0].history()[:-1], len(g)) for g in groups]
            reading = [(lane.row.history(), len(lane.requests)) for lane in self._lanes]
            shared = worthwhile_prefix(
                [Sequenced(tokens, n, self._covered([*tokens, -1])) for tokens, n in pending + reading]
            )
            if shared is None or not self._room_for_trunk():
                return
            self._add_trunk(Trunk(shared, last_used=self._clock))

    def _could_share_more(self, request: Request) -> bool:
        """Whether a longer trunk could be worth it at all; see `worthwhile_prefix`."""
        own = self._own_length(request) - 1
        return own >= max(MIN_TRUNK, len(request.history()) - 1 - own)

    def _room_for_trunk(self) -> bool:
        """Whether one more may be stored, after forgetting the one unused for longest if need be."""
        in_use = {id(lane.row.trunk) for lane in self._lanes}
        idle = [t for t in self._trunks if id(t) not in in_use and t.last_used < self._clock]
        if len(self._trunks) >= MAX_TRUNKS and idle:
            self._forget(min(idle, key=lambda t: t.last_used))
        return len(self._trunks) < MAX_TRUNKS

    def _add_trunk(self, trunk: Trunk) -> None:
        self._fill(trunk)
        self._trunks.append(trunk)
        for row in self._rows:
            if row.offset < len(trunk.tokens) and _starts(row.history(), trunk.tokens):
                self._store.rebase(row, trunk)

    def _forget(self, trunk: Trunk) -> None:
        self._trunks.remove(trunk)
        for row in self._rows:
            if row.trunk is trunk:
                row.trunk, row.tokens = None, []

    @torch.no_grad()
    def _fill(self, trunk: Trunk) -> None:
        """Compute a trunk, or copy it from a row that has it."""
        holder = next((row for row in self._rows if _starts(row.history(), trunk.tokens)), None)
        if holder is not None and holder.offset <= len(trunk.tokens):
            self._store.cut_trunk(holder, trunk)
            self.stats.reused += len(trunk.tokens)
            return
        row = Row(0, self._trunk_of([*trunk.tokens, -1]))
        rest = trunk.tokens[row.offset :]
        store = KeyValueStore(1, len(rest) + 1)  # one more: a view's padding lands after the last token
        self._read(store, [(row, rest)])
        store.cut_trunk(row, trunk)

    # --- room ------------------------------------------------------------------------------------

    def _ensure(self, more_lanes: int, length: int) -> None:
        """Make rows for all lanes and `more_lanes`, each of at least `length` tokens."""
        lanes = sum(len(lane.requests) for lane in self._lanes) + more_lanes
        need = max([length, *(len(lane.row.tokens) + 1 for lane in self._lanes)])
        if lanes <= self._store.rows and need <= self._store.capacity:
            return
        roomy = -(-max(need, min(self._store.capacity, 2 * need) * 3 // 2) // _CAPACITY_STEP) * _CAPACITY_STEP
        capacity = roomy if self._rows_at(roomy) >= max(lanes, self._rows_at(need)) else need
        more = max(lanes, 2 * self._store.rows, _FIRST_ROWS) if lanes > self._store.rows else self._store.rows
        rows = min(self._rows_at(capacity), more)
        active = [lane.row for lane in self._lanes]
        idle = sorted(self._free(), key=lambda r: -r.last_used)
        kept = [*active, *idle][:rows]
        self._store.resize(rows, capacity, [row.index for row in kept])
        for i, row in enumerate(kept):
            row.index, row.tokens = i, row.tokens[:capacity]
        self._rows = kept + [Row(i) for i in range(len(kept), rows)]

    def _make_room(self) -> None:
        """Before a step: a token more for every row, setting the youngest requests aside if need be."""
        while True:
            need = max(len(lane.row.tokens) for lane in self._lanes) + 1
            if sum(len(lane.requests) for lane in self._lanes) <= self._rows_at(need):
                return self._ensure(0, need)
            lane = self._lanes[-1]
            self._parked.appendleft(lane.requests.pop())
            self.stats.parked += 1
            self._lanes = [lane for lane in self._lanes if lane.requests]

    # --- one token for everybody -----------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Draw the next token of every request under way."""
        self._drop_cancelled()
        if not self._lanes:
            return
        self._make_room()
        self._clock += 1
        lanes = self._lanes
        view = RowsView(self._store, [lane.row for lane in lanes], [1] * len(lanes), self._device)
        ids = torch.tensor([[lane.reads] for lane in lanes], device=self._device)
        logits = self._forward(ids, view, True)
        asks = [r.ask(i) for i, lane in enumerate(lanes) for r in lane.requests]
        draws = iter(draw(logits, asks))
        for lane in lanes:
            lane.row.tokens.append(lane.reads)
        self.stats.steps += 1
        self.stats.rows += len(lanes)
        self.stats.drawn += len(asks)
        self._spread([self._advance(lane, draws) for lane in lanes])

    def _advance(self, lane: Lane, draws: Iterable[Draw]) -> dict[int, list[Request]]:
        """Give each request of a lane its token; those that go on, by the token they drew."""
        going: dict[int, list[Request]] = {}
        mine = [drawn for _, drawn in zip(lane.requests, draws, strict=False)]
        self._memory.remember(lane.row.history(), lane.temperature, mine)
        for request, drawn in zip(lane.requests, mine, strict=True):
            if self._give(request, drawn):
                going.setdefault(drawn.token, []).append(request)
        return going

    def _give(self, request: Request, drawn: Draw) -> bool:
        """Append a token to a request, and answer it if that was the last. True when it goes on."""
        request.give(drawn)
        try:
            reason = self._finished(request)
        except Exception as error:  # the caller's own should_stop raised: the caller's own error
            settle(request.future, error)
            return False
        if reason is not None:
            request.finish(reason, self.version)
        return reason is None

    def _finished(self, request: Request) -> FinishReason | None:
        stop = request.sampling.should_stop
        if request.drawn[-1].token in self._eos or (stop and stop([d.token for d in request.drawn])):
            return "stop"
        return "length" if len(request.drawn) >= request.limit else None

    def _spread(self, outcomes: Sequence[dict[int, list[Request]]]) -> None:
        """Continue each lane with what its requests drew; different tokens fork the row."""
        kept: list[Lane] = []
        forks: list[tuple[Row, int, list[Request]]] = []
        for lane, going in zip(self._lanes, outcomes, strict=True):
            lane.row.last_used = self._clock
            for i, (token, requests) in enumerate(going.items()):
                if i:
                    forks.append((lane.row, token, requests))
                else:
                    kept.append(Lane(lane.row, token, requests))
        self._lanes = kept
        free = sorted(self._free(), key=lambda r: r.last_used)
        for (source, token, requests), row in zip(forks, free, strict=False):
            row.trunk, row.tokens, row.last_used = source.trunk, list(source.tokens), self._clock
            self._lanes.append(Lane(row, token, requests))
        length = max((len(source.tokens) for source, _, _ in forks), default=0)
        sources = [source.index for source, _, _ in forks]
        self._store.copy_rows(sources, [row.index for row in free[: len(forks)]], length)

    def _drop_cancelled(self) -> None:
        for lane in self._lanes:
            lane.requests = [r for r in lane.requests if not r.future.cancelled()]
        self._lanes = [lane for lane in self._lanes if lane.requests]

    def _requests(self) -> list[Request]:
        return [request for lane in self._lanes for request in lane.requests]


def _starts(history: list[int], prefix: list[int]) -> bool:
    return history[: len(prefix)] == prefix
