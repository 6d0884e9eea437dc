"""The schema of 0.1.0, SQLite only: databases of it exist, none is made of it any more."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Nothing: a database of 0.1.0 is here already."""
