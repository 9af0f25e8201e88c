"""What a simulation measured: how long it took, what it cost the service, who got how much, which devices were idle."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from service.model.json import JsonObject
from service.model.scheduling import Account
from service.queue.virtual import Idle, Run
from service.store.simulated import Turn

LONGEST_RUNS = 4  # a window in which users are compared has the time of so many of the longest task

Span = tuple[float, float]
"""`(since, until)`, in virtual seconds"""


@dataclass(frozen=True)
class Measured:
    """What was noted while a simulation ran: of the executor, of the store's queue, and of the dispatcher."""

    runs: Sequence[Run]
    idle: Sequence[Idle]
    turns: Sequence[Turn]
    users: Mapping[str, Account]
    devices: float
    claims: Sequence[tuple[float, int]]  # `(seconds of the processor, bundles)` of each decision
    rounds: int
    seconds: float  # of the processor, in all rounds
    statements: int
    rows: int
    left: Mapping[str, int]  # tasks that did not run, by kind
    too_large: Mapping[str, str]  # by kind, what no node has


@dataclass(frozen=True)
class UserShare:
    """What one user got. `share` and `due` are of all device seconds: by use, and by weight.

    `done_at_seconds` is the end of the user's last task.
    """

    name: str
    weight: float
    tasks: int
    device_seconds: float
    share: float | None
    due: float | None
    longest_wait_seconds: float | None
    done_at_seconds: float | None


@dataclass(frozen=True)
class Report:
    """The outcome of a simulation. Shares are of 1; without anything to divide by, they are None.

    `seconds` are those of this machine's processor (nothing else is waited for), and so are the `..._ms` of a decision:
    a claim that handed bundles over. `busy_dispatcher` is their share of the makespan: above 1, the dispatcher could
    not keep up. `largest_deviation` is how far a user was from the share that their weight entitles them to, relative
    to it, in the worst of `windows`. `idle_while_fits` counts devices that were idle while a queued task would have
    fit, `idle_behind_bundles` those that were idle while a task waited for others in its bundle.
    """

    tasks: int
    left: dict[str, int]
    too_large: dict[str, str]
    makespan_seconds: float
    devices: float
    busy: float | None
    idle_while_fits: float | None
    idle_behind_bundles: float | None
    rounds: int
    decisions: int
    bundles: int
    decision_p50_ms: float | None
    decision_p95_ms: float | None
    decision_max_ms: float | None
    seconds: float
    tasks_per_second: float | None
    busy_dispatcher: float | None
    statements: int
    rows: int
    statements_per_second: float | None
    rows_per_second: float | None
    windows: int
    window_seconds: float | None
    largest_deviation: float | None
    users: tuple[UserShare, ...]

    def as_json(self) -> JsonObject:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """For people, without the users, of whom a table tells."""
        devices = _counted(self.devices, "device")
        yield f"{_counted(self.tasks, 'task')} in {duration(self.makespan_seconds)} on {devices}."
        for kind, number in self.left.items():
            why = f": no node has {self.too_large[kind]}" if kind in self.too_large else ""
            yield f"{_counted(number, 'task')} of the kind {kind} did not run{why}."
        yield (
            f"Devices: {_percent(self.busy)} busy; {_percent(self.idle_while_fits)} idle while a queued task would "
            f"have fit, {_percent(self.idle_behind_bundles)} while a task waited for others in its bundle."
        )
        if self.largest_deviation is None:
            yield "Fairness: no two users had tasks queued at the same time for long enough to be compared."
        else:
            yield (
                f"Fairness: at most {_percent(self.largest_deviation)} from the share due by weight, in "
                f"{_counted(self.windows, 'window')} of {duration(self.window_seconds or 0.0)}."
            )
        yield (
            f"Decisions: {self.decisions:,} for {self.bundles:,} bundles, in {self.rounds:,} rounds; "
            f"{_ms(self.decision_p50_ms)} (95 %: {_ms(self.decision_p95_ms)}, at most {_ms(self.decision_max_ms)})."
        )
        yield (
            f"This machine would have been busy for {_percent(self.busy_dispatcher)} of that time: the dispatcher took "
            f"{self.seconds:.1f} s, {_number(self.tasks_per_second)} tasks a second."
        )
        yield (
            f"Asked of the store: {_number(self.statements_per_second)} statements and "
            f"{_number(self.rows_per_second)} rows a second ({self.statements:,} and {self.rows:,})."
        )


def report(measured: Measured, half_life_seconds: float) -> Report:
    """The report of a simulation that has ended; users are compared over windows of one half-life of usage."""
    makespan = max((run.ended_at for run in measured.runs), default=0.0)
    took = sorted(1000 * seconds for seconds, _ in measured.claims)
    started = {run.task_id: run.started_at for run in measured.runs}
    capped = {name for name, account in measured.users.items() if account.max_gpus is not None}
    free = [turn for turn in measured.turns if turn.sponsor not in capped]  # others may have to leave devices idle
    granted = _waits(free, {turn.task_id: turn.granted_at for turn in free}, makespan)
    behind = _waits(free, started, makespan)
    device_seconds = measured.devices * makespan
    windows, deviations = _fairness(measured, half_life_seconds, makespan)
    idle = _idle_while(measured.idle, granted)
    return Report(
        tasks=len(measured.runs),
        left=dict(measured.left),
        too_large=dict(measured.too_large),
        makespan_seconds=makespan,
        devices=measured.devices,
        busy=_ratio(sum((run.ended_at - run.started_at) * run.devices for run in measured.runs), device_seconds),
        idle_while_fits=_ratio(idle, device_seconds),
        idle_behind_bundles=_ratio(_idle_while(measured.idle, behind) - idle, device_seconds),
        rounds=measured.rounds,
        decisions=len(took),
        bundles=sum(bundles for _, bundles in measured.claims),
        decision_p50_ms=_percentile(took, 0.5),
        decision_p95_ms=_percentile(took, 0.95),
        decision_max_ms=_percentile(took, 1.0),
        seconds=measured.seconds,
        tasks_per_second=_ratio(len(measured.runs), measured.seconds),
        busy_dispatcher=_ratio(measured.seconds, makespan),
        statements=measured.statements,
        rows=measured.rows,
        statements_per_second=_ratio(measured.statements, makespan),
        rows_per_second=_ratio(measured.rows, makespan),
        windows=len(windows),
        window_seconds=max((until - since for since, until in windows), default=None),
        largest_deviation=max(deviations, default=None),
        users=tuple(_users(measured)),
    )


def _users(measured: Measured) -> Iterator[UserShare]:
    turn_of = {turn.task_id: turn for turn in measured.turns}
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    longest: dict[str, float] = {}
    done_at: dict[str, float] = {}
    for run in measured.runs:
        turn = turn_of[run.task_id]
        seconds[turn.sponsor] += (run.ended_at - run.started_at) * run.devices
        counts[turn.sponsor] += 1
        wait = run.started_at - max(0.0, turn.queued_at)
        longest[turn.sponsor] = max(longest.get(turn.sponsor, 0.0), wait)
        done_at[turn.sponsor] = max(done_at.get(turn.sponsor, 0.0), run.ended_at)
    weights = sum(account.weight for name, account in measured.users.items() if name in counts)
    for name, account in measured.users.items():
        share = _ratio(seconds[name], sum(seconds.values()))
        due = _ratio(account.weight, weights) if name in counts else None
        last = longest.get(name), done_at.get(name)
        yield UserShare(name, account.weight, counts[name], seconds[name], share, due, *last)


def _fairness(measured: Measured, half_life_seconds: float, makespan: float) -> tuple[list[Span], list[float]]:
    """The windows in which at least two users had tasks queued all the time, and each of these users' deviation."""
    by_user: dict[str, list[Span]] = defaultdict(list)
    for turn in measured.turns:
        until = makespan if turn.granted_at is None else turn.granted_at
        if until > max(0.0, turn.queued_at):
            by_user[turn.sponsor].append((max(0.0, turn.queued_at), until))
    queued = {name: _merged(spans) for name, spans in by_user.items()}
    longest = max((run.ended_at - run.started_at for run in measured.runs), default=0.0)
    windows = _windows(queued, half_life_seconds, makespan)
    windows = [(since, until) for since, until in windows if until - since >= LONGEST_RUNS * longest]
    used = _used(measured, windows)
    kept, deviations = [], []
    for number, (since, until) in enumerate(windows):
        there = [name for name, spans in queued.items() if any(a <= since and until <= b for a, b in spans)]
        total = sum(used[number, name] for name in there)
        weights = sum(measured.users[name].weight for name in there)
        if len(there) > 1 and total:
            kept.append((since, until))
            due = {name: total * measured.users[name].weight / weights for name in there}
            deviations += [abs(used[number, name] / due[name] - 1.0) for name in there]
    return kept, deviations


def _windows(queued: Mapping[str, Sequence[Span]], half_life_seconds: float, makespan: float) -> list[Span]:
    """Windows of one half-life, one after the other; in a shorter simulation the one in which all users wait."""
    if makespan >= half_life_seconds:
        return [(i * half_life_seconds, (i + 1) * half_life_seconds) for i in range(int(makespan / half_life_seconds))]
    since = max((spans[0][0] for spans in queued.values()), default=0.0)
    until = min((next((b for a, b in spans if a <= since < b), since) for spans in queued.values()), default=0.0)
    return [(since, until)] if until > since else []


def _used(measured: Measured, windows: Sequence[Span]) -> dict[tuple[int, str], float]:
    """The device seconds of each user in each of these windows, which are equally long and in order."""
    used: dict[tuple[int, str], float] = defaultdict(float)
    if not windows:
        return used
    sponsor = {turn.task_id: turn.sponsor for turn in measured.turns}
    first, length = windows[0][0], windows[0][1] - windows[0][0]
    for run in measured.runs:
        number = max(0, int((run.started_at - first) // length))
        while number < len(windows) and windows[number][0] < run.ended_at:
            since, until = windows[number]
            overlap = min(until, run.ended_at) - max(since, run.started_at)
            used[number, sponsor[run.task_id]] += max(0.0, overlap) * run.devices
            number += 1
    return used


def _waits(turns: Iterable[Turn], until: Mapping[str, float | None], makespan: float) -> dict[str, list[Span]]:
    """By kind, when a task of it waited: from when it could have run until then, or to the end."""
    spans: dict[str, list[Span]] = defaultdict(list)
    for turn in turns:
        end = until.get(turn.task_id, turn.granted_at)
        spans[turn.kind].append((turn.queued_at, makespan if end is None else end))
    return {kind: _merged(of_kind) for kind, of_kind in spans.items()}


def _idle_while(idle: Iterable[Idle], waits: Mapping[str, Sequence[Span]]) -> float:
    """Device seconds that were idle while a task waited of a kind that a node had room for."""
    by_kinds: dict[frozenset[str], list[Idle]] = defaultdict(list)
    for one in idle:
        by_kinds[one.room_for].append(one)
    total = 0.0
    for kinds, times in by_kinds.items():
        waited = _merged([span for kind in kinds for span in waits.get(kind, ())])
        first = 0
        for since, until, devices, _ in times:
            while first < len(waited) and waited[first][1] <= since:
                first += 1
            at = first
            while at < len(waited) and waited[at][0] < until:
                total += devices * (min(until, waited[at][1]) - max(since, waited[at][0]))
                at += 1
    return total


def _merged(spans: Iterable[Span]) -> list[Span]:
    """The union of these spans, in order.

    >>> _merged([(4, 5), (0, 1), (1, 2), (0, 1)])
    [(0, 2), (4, 5)]
    """
    merged: list[Span] = []
    for since, until in sorted(span for span in spans if span[1] > span[0]):
        if merged and since <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], until))
        else:
            merged.append((since, until))
    return merged


def _percentile(ascending: Sequence[float], fraction: float) -> float | None:
    return ascending[max(0, math.ceil(fraction * len(ascending)) - 1)] if ascending else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def duration(seconds: float) -> str:
    """As a person says it.

    >>> duration(90), duration(5400), duration(200_000)
    ('90 s', '90 min', '55.6 h')
    """
    for unit, size in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 3 * size or (unit == "min" and seconds > 90):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _counted(number: float, noun: str) -> str:
    written = f"{number:,.0f}" if number == int(number) else f"{number:g}"
    return f"{written} {noun}" if number == 1 else f"{written} {noun}s"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2g} %" if share < 0.01 else f"{100 * share:.1f} %"


def _ms(milliseconds: float | None) -> str:
    return "–" if milliseconds is None else f"{milliseconds:.1f} ms"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
