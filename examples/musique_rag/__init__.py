"""MuSiQue: an agent of the OpenAI Agents SDK learns to search and to answer from what it found."""

ENV_RETRIEVER = "MUSIQUE_RETRIEVER"
"""Environment variable with the retriever's URL."""
