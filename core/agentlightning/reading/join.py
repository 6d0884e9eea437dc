"""The join of adapter and gateway spans into one `LLMCall` per sampled answer.

The gateway's span is the truth of what was sampled; the adapter's says who asked and why. They meet by parent
(the SDK patch sends `traceparent`; so do instrumentations of HTTP clients, whose span is then between the
two), else by response id, else by the exact request within the attempt, in order of time. A gateway answer
that its caller never saw (the SDK timed out and asked again) is kept apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from agentlightning.reading.comparable import request_key
from agentlightning.reading.views import TraceView, enclosing_agent
from agentlightning.types import LLMCall


@dataclass(frozen=True, slots=True)
class JoinedCalls:
    """`calls` in call order; `unseen` are sampled answers that no agent ever saw (retries, time-outs)."""

    calls: Sequence[LLMCall]
    unseen: Sequence[LLMCall]


def join_calls(trace: TraceView) -> JoinedCalls:
    """Join the calls of one attempt. Order: the gateway's clock where there is one, else the adapter's."""
    matches = _match(trace)
    joined: list[tuple[int, LLMCall]] = []
    unseen: list[LLMCall] = []
    used: set[str] = set()
    for caller in trace.adapter_calls:
        served = matches.get(caller.span_id, [])
        used.update(call.span_id for call in served)
        seen = _seen(caller, served)
        unseen += [call for call in served if call not in seen and call.error is None]
        if not seen:
            joined.append((caller.start_ns, caller))
        joined += [(call.start_ns, _merge(caller, call)) for call in seen]
    joined += [(call.start_ns, call) for call in trace.gateway_calls if call.span_id not in used]
    joined.sort(key=lambda pair: pair[0])
    names = {run.span_id: run.name for run in trace.agent_runs}
    names |= {gone: names[kept] for gone, kept in trace.merged.items() if kept in names}
    calls = [_named(call, names, trace.parents) for _, call in joined]
    return JoinedCalls(calls, unseen)


def _match(trace: TraceView) -> dict[str, list[LLMCall]]:
    """Gateway calls by the span id of the adapter call that made them."""
    by_id = {call.span_id: call for call in trace.adapter_calls}
    by_response = {call.response_id: call for call in trace.adapter_calls if call.response_id}
    matches: dict[str, list[LLMCall]] = defaultdict(list)
    rest: list[LLMCall] = []
    for call in trace.gateway_calls:
        caller = _caller_above(call, by_id, trace) or by_response.get(call.response_id or "")
        if caller is None:
            rest.append(call)
        else:
            matches[caller.span_id].append(call)
    waiting: dict[str, list[LLMCall]] = defaultdict(list)
    for caller in trace.adapter_calls:
        if caller.span_id not in matches and caller.messages:
            waiting[request_key(caller.messages)].append(caller)
    for call in rest:
        callers = waiting.get(request_key(call.messages))
        if callers:
            matches[callers.pop(0).span_id].append(call)
    return matches


def _caller_above(call: LLMCall, callers: Mapping[str, LLMCall], trace: TraceView) -> LLMCall | None:
    """The call that a gateway's span ran inside of; the nearest agent or tool ends the search."""
    seen: set[str] = set()
    span_id = call.parent_id
    while span_id is not None and span_id not in seen:
        caller = callers.get(trace.merged.get(span_id, span_id))
        if caller is not None or span_id in trace.borders:
            return caller
        seen.add(span_id)
        span_id = trace.parents.get(span_id)
    return None


def _seen(caller: LLMCall, served: Sequence[LLMCall]) -> list[LLMCall]:
    """Of the answers one caller was served, those it received: by response id, else the newest success."""
    if caller.response_id is not None:
        same = [call for call in served if call.response_id == caller.response_id]
        if same:
            return same
    good = [call for call in served if call.error is None] or list(served)
    if not good:
        return []
    newest = max(good, key=lambda call: call.end_ns)
    return [call for call in good if call.response_id == newest.response_id]


def _merge(caller: LLMCall, served: LLMCall) -> LLMCall:
    """What was sampled from the gateway, who asked from the adapter."""
    return replace(
        served,
        span_id=caller.span_id,
        parent_id=caller.parent_id,
        start_ns=caller.start_ns,
        end_ns=caller.end_ns,
        agent_name=caller.agent_name or served.agent_name,
        node_path=caller.node_path or served.node_path,
        error=served.error or caller.error,
    )


def _named(call: LLMCall, names: Mapping[str, str], parents: Mapping[str, str | None]) -> LLMCall:
    if call.agent_name is not None:
        return call
    return replace(call, agent_name=enclosing_agent(call.parent_id, names, parents))
