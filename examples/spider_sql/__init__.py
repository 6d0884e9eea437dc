"""Spider: a LangGraph agent learns to write and to repair SQL."""
