"""One open run of LangChain, and whose agent it belongs to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final
from uuid import UUID

from agentlightning.context import SpanRef, open_span
from agentlightning.tracing import SpanHandle, Tracer

_GENERIC_NODES: Final = frozenset({"agent", "model", "tools", "call_model"})
"""Node names of prebuilt agents, which say nothing about whose call it is."""
_UNNAMED: Final = "LangGraph"


class Run:
    """A run that has started. Only some have a span; the others pass on their place."""

    __slots__ = (
        "agent_name",
        "before",
        "id",
        "identified",
        "is_graph",
        "metadata",
        "name",
        "offered",
        "open_below",
        "opened",
        "parent",
        "root",
        "span",
        "start_ns",
        "streamed",
        "tracer",
        "unidentified",
        "unwatch",
    )

    def __init__(
        self,
        id: UUID,
        parent: Run | None,
        tracer: Tracer,
        metadata: Mapping[str, Any] | None,
        name: str | None,
    ) -> None:
        self.id = id
        self.parent = parent
        self.root: Run = self if parent is None else parent.root
        self.tracer = tracer if parent is None else parent.root.tracer
        self.metadata: Mapping[str, Any] = metadata or {}
        self.name = name
        self.start_ns = time.time_ns()
        self.span: SpanHandle | None = None
        self.is_graph = False
        self.agent_name: str | None = None
        self.streamed = False
        self.identified = False
        """On a tool run: whether its call id is known."""
        self.offered: frozenset[str] = frozenset()
        """Names of the tools that the agent's last model call could choose from."""
        self.unidentified: Counter[str] = Counter()
        """On an agent run: failed tool calls by name that had no id, which LangChain 0.3 leaves out."""
        self.opened: SpanRef | None = None
        """What this run made the open span, to be taken back at its end."""
        self.before: SpanRef | None = None
        self.unwatch: Callable[[], None] | None = None
        self.open_below: dict[UUID, Run] = {}
        """On a root: every run below it, itself included, whose span is open."""

    def ancestors(self) -> list[Run]:
        """From this run up to its root."""
        chain: list[Run] = []
        run: Run | None = self
        while run is not None:
            chain.append(run)
            run = run.parent
        return chain


def place(run: Run | None) -> SpanRef | None:
    """The span under which a child of this run is recorded."""
    while run is not None:
        if run.span is not None:
            return run.span.ref
        run = run.parent
    return None


def owner(run: Run | None) -> Run | None:
    """The agent run that a child of this run belongs to."""
    while run is not None:
        if run.agent_name is not None:
            return run
        run = run.parent
    return None


def graph_agent_name(run: Run) -> str:
    """The name of a graph or root chain as an agent: its own, else that of the node it runs in."""
    if run.name and run.name != _UNNAMED:
        return run.name
    node = run.metadata.get("langgraph_node")
    return str(node) if node and node not in _GENERIC_NODES else run.name or _UNNAMED


def agent_name(parent: Run | None, metadata: Mapping[str, Any]) -> str | None:
    """Whose model or tool call this is.

    In a graph that somebody built of named nodes each node is an agent; in a prebuilt agent the graph is.
    """
    node = metadata.get("langgraph_node")
    agent = owner(parent)
    if agent is None:  # the handler sits on the model alone and sees nothing around it
        around = open_span()
        named = metadata.get("lc_agent_name") or node
        return str(named) if named else around.agent_name if around is not None else None
    prebuilt = agent.metadata.get("ls_integration") == "langchain_create_agent"
    if agent.is_graph and not prebuilt and node and node not in _GENERIC_NODES:
        return str(node)
    return agent.agent_name


def node_path(metadata: Mapping[str, Any]) -> str | None:
    """The nodes around a call, outermost first: "writer:<uuid>|model:<uuid>" becomes "writer/model"."""
    namespace = metadata.get("langgraph_checkpoint_ns") or metadata.get("checkpoint_ns")
    if not namespace:
        node = metadata.get("langgraph_node")
        return str(node) if node else None
    return "/".join(part.partition(":")[0] for part in str(namespace).split("|"))
