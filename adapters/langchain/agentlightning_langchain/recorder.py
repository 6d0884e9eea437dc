"""From LangChain's callbacks to spans: the table of open runs, and what each event makes of it.

Parents come from `parent_run_id` alone. Not every chain is worth a span: a root run, and every graph below
it, is an agent run; the chains in between only pass on their place. A graph shows as one when its first node
starts, so its span is made after the fact, with the time of its start.

Invariant: each started span ends, also where LangChain sends no end (cancelled calls); the table is bounded.
"""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult

from agentlightning import semconv
from agentlightning.context import SpanRef, current_rollout, open_span, restore_open_span, set_open_span
from agentlightning.tracing import SpanHandle, get_tracer
from agentlightning.tracing.genai import Where, end_llm, end_tool, start_agent, start_llm, start_tool
from agentlightning.tracing.guard import guarded
from agentlightning.tracing.process import end_with_error
from agentlightning.types import ToolStatus
from agentlightning_langchain.convert import chat_messages, llm_response
from agentlightning_langchain.runs import Run, agent_name, graph_agent_name, node_path, owner, place
from agentlightning_langchain.toolmessages import (
    FoundCall,
    SeenCalls,
    answered_calls,
    offered_tools,
    refused_arguments,
    tool_names,
    tool_outcome,
    unparsed_calls,
)

SCOPE: Final = "agentlightning.langchain"
MAX_RUNS: Final = 20_000  # open at once; beyond that the oldest is ended as abandoned
_NODE_TAG: Final = "graph:step:"


class Recorder:
    """All open runs of the process. The `*_started` methods give the rollout's id when the run is a root."""

    def __init__(self) -> None:
        self.runs: dict[UUID, Run] = {}
        self._seen = SeenCalls()
        self._root_spans: set[str] = set()

    # --- chains ---

    def chain_started(
        self,
        run_id: UUID,
        serialized: Any,
        *,
        parent_run_id: UUID | None = None,
        metadata: Mapping[str, Any] | None = None,
        tags: Sequence[str] | None = None,
        name: str | None = None,
        **_: Any,
    ) -> str | None:
        run = self._begin(run_id, parent_run_id, metadata, name or _serialized_name(serialized))
        if run is None:
            return None
        if run.parent is None:
            self._make_current(run, self._become_agent(run))
            return _rollout_id(run)
        if tags and any(tag.startswith(_NODE_TAG) for tag in tags) and not run.parent.is_graph:
            run.parent.is_graph = True
            self._become_agent(run.parent)
        around = place(run.parent)
        if around is not None:
            run.before, run.opened = open_span(), around
            set_open_span(around)
        return None

    def _become_agent(self, run: Run) -> SpanHandle:
        """Give a root chain or a graph its span, unless it has one."""
        if run.span is not None:
            return run.span
        run.agent_name = graph_agent_name(run)
        parent = place(run.parent)
        if run.parent is None:
            around = open_span()
            # Two streams that one consumer reads in turn would nest by accident of its context.
            parent = None if around is not None and around.span_id in self._root_spans else around
        where = Where(SCOPE, node_path=node_path(run.metadata))
        span = start_agent(run.tracer, where, parent, name=run.agent_name, start_ns=run.start_ns)
        self._opened(run, span)
        if run.parent is None:
            self._root_spans.add(span.ref.span_id)
        return span

    def chain_ended(self, run_id: UUID, outputs: Any) -> None:
        run = self.runs.pop(run_id, None)
        if run is None:
            return
        if run.span is not None:
            self._derive_from_outputs(run, outputs)
        self._close(run)
        if run.span is not None:
            run.span.end()
        self._end_all_below(run, None)

    def chain_failed(self, run_id: UUID, error: BaseException) -> None:
        run = self.runs.get(run_id)
        if run is None:
            return
        self._end_all_below(run, error)
        self.failed(run_id, error)

    def _derive_from_outputs(self, run: Run, outputs: Any) -> None:
        messages: Any = outputs.get("messages") if isinstance(outputs, Mapping) else None
        if isinstance(messages, list):
            where = Where(SCOPE, run.agent_name, node_path(run.metadata))
            self._record_found(run, place(run), where, answered_calls(messages, run.offered))

    # --- model calls ---

    def llm_started(
        self,
        run_id: UUID,
        messages: Sequence[BaseMessage | str],
        *,
        parent_run_id: UUID | None = None,
        metadata: Mapping[str, Any] | None = None,
        invocation_params: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        name: str | None = None,
        **_: Any,
    ) -> str | None:
        run = self._begin(run_id, parent_run_id, metadata, name)
        if run is None:
            return None
        parameters = invocation_params or {}
        tools = offered_tools(parameters)
        where = Where(SCOPE, agent_name(run.parent, run.metadata), node_path(run.metadata))
        parent = place(run.parent) if run.parent is not None else open_span()
        self._note_tools(run, parent, where, messages, tools)
        span = start_llm(
            run.tracer,
            where,
            parent,
            model=_model(parameters, run.metadata),
            messages=chat_messages(messages),
            tools=tools,
            parameters=parameters,
            provider=str(run.metadata.get("ls_provider") or "openai"),
        )
        self._opened(run, span)
        if batch_size == 1:  # else the requests of the batch follow together, and one would speak for all
            self._make_current(run, span)
        run.unwatch = self._watch_task(run)
        return _rollout_id(run) if run.parent is None else None

    def _note_tools(
        self,
        run: Run,
        parent: SpanRef | None,
        where: Where,
        messages: Sequence[BaseMessage | str],
        tools: Sequence[Any],
    ) -> None:
        """Record tool calls that only the prompt tells of, and remember what this call may choose from."""
        offered = tool_names(tools)
        agent = owner(run.parent)
        before = agent.offered if agent is not None else frozenset[str]()
        if parent is not None:
            self._record_found(run, parent, where, answered_calls(messages, before or offered))
        if agent is not None and offered:
            agent.offered = offered

    def token_arrived(self, run_id: UUID) -> None:
        run = self.runs.get(run_id)
        if run is not None and not run.streamed and run.span is not None:
            run.streamed = True
            run.span.set({semconv.REQUEST_STREAM: True})

    def llm_ended(self, run_id: UUID, response: LLMResult) -> None:
        run = self.runs.pop(run_id, None)
        if run is None or run.span is None:
            return
        self._close(run)
        end_llm(run.span, llm_response(response))
        message = next(
            (getattr(g, "message", None) for choices in response.generations for g in choices), None
        )
        for call in (*getattr(message, "tool_calls", ()), *getattr(message, "invalid_tool_calls", ())):
            self._seen.asked_again(_scope(run.span.ref), call["id"])
        where = Where(SCOPE, run.span.ref.agent_name, node_path(run.metadata))
        self._record_found(run, run.span.ref.parent or run.span.ref, where, unparsed_calls(message))

    def _watch_task(self, run: Run) -> Any:
        """A call that is cancelled gets no event at all: its task tells."""
        try:
            task = asyncio.current_task()
        except RuntimeError:
            return None
        if task is None:
            return None

        def done(task: asyncio.Task[Any]) -> None:
            if run.id in self.runs:
                run.unwatch = None
                error = asyncio.CancelledError() if task.cancelled() else _Abandoned()
                guarded(self.failed)(run.id, error)

        task.add_done_callback(done)
        return lambda: task.remove_done_callback(done)

    # --- tool calls ---

    def tool_started(
        self,
        run_id: UUID,
        serialized: Any,
        input_str: str,
        *,
        parent_run_id: UUID | None = None,
        metadata: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        tool_call_id: str | None = None,
        name: str | None = None,
        **_: Any,
    ) -> str | None:
        run = self._begin(run_id, parent_run_id, metadata, _serialized_name(serialized) or name)
        if run is None:
            return None
        span = start_tool(
            run.tracer,
            Where(SCOPE, agent_name(run.parent, run.metadata), node_path(run.metadata)),
            place(run.parent) if run.parent is not None else open_span(),
            name=run.name or "tool",
            arguments=input_str if inputs is None else inputs,
            call_id=tool_call_id,
            description=serialized.get("description") if isinstance(serialized, dict) else None,
        )
        self._opened(run, span)
        self._make_current(run, span)
        run.identified = tool_call_id is not None
        self._seen.add(_scope(span.ref), tool_call_id)
        return _rollout_id(run) if run.parent is None else None

    def tool_ended(self, run_id: UUID, output: Any) -> None:
        run = self.runs.pop(run_id, None)
        if run is None or run.span is None:
            return
        self._close(run)
        status, result, error = tool_outcome(output)
        self._seen.add(_scope(run.span.ref), getattr(output, "tool_call_id", None))
        end_tool(run.span, status, result=result, error=error)

    def tool_failed(self, run_id: UUID, error: BaseException) -> None:
        run = self.runs.pop(run_id, None)
        if run is None or run.span is None:
            return
        self._close(run)
        if _is_control_flow(error):
            run.span.event(semconv.INTERRUPTED)
            run.span.end()
            return
        agent = owner(run.parent)
        if agent is not None and not run.identified:
            agent.unidentified[run.name or "tool"] += 1
        end_tool(
            run.span, ToolStatus.BAD_ARGUMENTS if refused_arguments(error) else ToolStatus.RAISED, error=error
        )

    def _record_found(
        self, run: Run, parent: SpanRef | None, where: Where, calls: Iterable[FoundCall]
    ) -> None:
        """Record tool calls that had no event of their own, beside the model call that shows them."""
        agent = owner(run)
        for call in calls:
            if not self._seen.add(_scope(parent), call.call_id):
                continue
            if call.error is not None and agent is not None and agent.unidentified[call.name] > 0:
                agent.unidentified[call.name] -= 1
            else:
                span = start_tool(
                    run.tracer, where, parent, name=call.name, arguments=call.arguments, call_id=call.call_id
                )
                end_tool(span, call.status, result=call.result, error=call.error)

    # --- the table ---

    def _begin(
        self, run_id: UUID, parent_run_id: UUID | None, metadata: Mapping[str, Any] | None, name: str | None
    ) -> Run | None:
        """Enter a run; None when it is there already (two handlers see it) or nothing is recorded."""
        if run_id in self.runs:
            return None
        tracer = get_tracer()
        if not tracer.enabled:
            return None
        parent = self.runs.get(parent_run_id) if parent_run_id is not None else None
        run = Run(run_id, parent, tracer, metadata, name)
        self.runs[run_id] = run
        if len(self.runs) > MAX_RUNS:
            self.failed(next(iter(self.runs)), _Abandoned())
        return run

    def _opened(self, run: Run, span: SpanHandle) -> None:
        run.span = span
        run.root.open_below[run.id] = run

    def _make_current(self, run: Run, span: SpanHandle) -> None:
        run.before, run.opened = open_span(), span.ref
        set_open_span(span.ref)

    def _close(self, run: Run) -> None:
        """Undo what the start of a run left behind."""
        run.root.open_below.pop(run.id, None)
        if run.opened is not None:
            restore_open_span(run.opened, run.before)
        if run.unwatch is not None:
            run.unwatch()
        if run.parent is None and run.span is not None:
            self._root_spans.discard(run.span.ref.span_id)

    def failed(self, run_id: UUID, error: BaseException) -> None:
        """A run ended with an exception."""
        run = self.runs.pop(run_id, None)
        if run is None:
            return
        self._close(run)
        if run.span is None:
            return
        if _is_control_flow(error):
            run.span.event(semconv.INTERRUPTED)
            run.span.end()
        else:
            end_with_error(run.span, error)

    def _end_all_below(self, run: Run, error: BaseException | None) -> None:
        """End what is still open below a run that is over; below one that ended well only at its root."""
        if not run.root.open_below or (error is None and run.parent is not None):
            return
        for open_run in list(run.root.open_below.values()):
            if open_run is not run and run in open_run.ancestors():
                self.failed(open_run.id, error or _Abandoned())


class _Abandoned(Exception):
    """A run whose end never came."""

    def __str__(self) -> str:
        return "LangChain reported no end of this run"


def _serialized_name(serialized: Any) -> str | None:
    if not isinstance(serialized, Mapping):
        return None
    name: Any = serialized.get("name") or (serialized.get("id") or [None])[-1]
    return None if name is None else str(name)


def _model(parameters: Mapping[str, Any], metadata: Mapping[str, Any]) -> str | None:
    name = parameters.get("model") or parameters.get("model_name") or metadata.get("ls_model_name")
    return None if name is None else str(name)


def _scope(span: SpanRef | None) -> str:
    """Within what tool call ids do not repeat."""
    active = current_rollout()
    if active is not None:
        return active.attempt_id
    return "" if span is None else span.trace_id


def _rollout_id(root: Run) -> str | None:
    return None if root.span is None else root.span.ref.rollout_id


def _is_control_flow(error: BaseException) -> bool:
    """LangGraph raises to interrupt or to jump to a parent graph; neither is a failure."""
    return any(kind.__name__ == "GraphBubbleUp" for kind in type(error).__mro__)
