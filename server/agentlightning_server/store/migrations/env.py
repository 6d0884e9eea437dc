"""What Alembic runs its steps in: the connection that `upgrade` was given, and its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], target_metadata=None)
context.run_migrations()
