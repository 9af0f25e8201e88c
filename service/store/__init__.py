"""The SQL store: the only place with SQL. Each module is one concern; the verbs above own the transactions."""

from sqlalchemy import ColumnElement, Connection, Row

from service.store import result_tables as result_tables  # its tables are part of the schema
from service.store.database import Database

Condition = ColumnElement[bool]

__all__ = ["Condition", "Connection", "Database", "Row"]
