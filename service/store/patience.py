"""How long to wait for a database, in seconds."""

BUSY_SECONDS = 30  # the longest wait for the turn to write
FROZEN_SECONDS = 15  # PostgreSQL ends a writing transaction that idles for so long; shorter than a lease
CONNECT_SECONDS = 5
PING_SECONDS = 5  # the longest wait for the answer of a pooled connection, before it is used
POOL_SECONDS = 10  # the longest wait for a free connection of the pool
GRACE_SECONDS = 10  # beyond a statement's limit: for the server to say itself that the statement took too long
SILENT_SECONDS = 20  # a server on the network that does not answer for so long counts as gone
