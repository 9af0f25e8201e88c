"""Who may do what: users, their tokens, and the caller that a token stands for."""

import hashlib
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from service.errors import Conflict, DatabaseAway, NotFound, Unauthenticated, UncannyError
from service.model.access import ROLES, SCOPES
from service.model.records import Admission, Token, User
from service.model.times import iso
from service.store import Connection, Database, accounts, history, meanings
from service.store.history import Event

PREFIX_LETTERS = 8
USED_EVERY_SECONDS = 60  # how exactly it is known when a token was last used
DAY_SECONDS = 86_400


class NotAllowed(UncannyError):
    """The caller is known, and may not do this."""


@dataclass(frozen=True)
class Caller:
    """Who is asking, and how far they may go. Without authentication everyone is trusted with everything."""

    name: str
    scope: str = "admin"
    token_id: str | None = None

    def may(self, scope: str) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class Access:
    """Users and tokens of one store."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._noting = threading.Lock()

    def caller(self, secret: str) -> Caller:
        """Who this token stands for. Raises `Unauthenticated` for one that is unknown, revoked or expired."""
        with self.database.read() as connection:
            found = accounts.admission(connection, sha256=_hash(secret))
            now = self.database.now(connection)
        admission = _valid(found, now)
        last_used_at = admission.token.last_used_at
        if last_used_at is None or now - last_used_at > USED_EVERY_SECONDS:
            self._note_use(admission.token.id, now)
        return _caller(admission)

    def _note_use(self, token_id: str, now: float) -> None:
        """Write down that a token was used, unless a thread waits to already: not all may wait for a writer."""
        if self._noting.acquire(blocking=False):
            try:
                with suppress(DatabaseAway), self.database.write() as connection:
                    accounts.note_use(connection, token_id, now)
            finally:
                self._noting.release()

    def renewed(self, caller: Caller) -> Caller:
        """The same caller as they are now, for an answer that goes on for long. Raises `Unauthenticated`."""
        if caller.token_id is None:
            return caller
        with self.database.read() as connection:
            admission = accounts.admission(connection, token_id=caller.token_id)
            return _caller(_valid(admission, self.database.now(connection)))

    def put_user(self, name: str, changes: dict[str, Any], *, actor: str) -> dict[str, Any]:
        """Make a user, or change role, weight and quotas (None: the default of the settings) of one.

        `disabled` says whether all tokens of a user are refused; where it is left out, that stays as it is. Raises
        `NotFound` for a user who is to be let in again and is not there: a slip of the pen must make nobody; `Conflict`
        where nobody would be an admin any more.
        """
        disabled, changes = changes.get("disabled"), {name: of for name, of in changes.items() if name != "disabled"}
        with self.database.write() as connection:
            now = self.database.now(connection)
            existing = accounts.user(connection, name)
            if disabled is not None:
                _there(existing, name)
            if disabled or changes.get("role", "admin") != "admin":
                _check_admins(connection, name)
            happened = []
            if existing is None or changes:
                verb = "created" if existing is None else "changed"
                happened.append(Event(f"user.{verb}", data={"name": name, **changes}))
            if existing is not None and disabled is not None and disabled != (existing.disabled_at is not None):
                happened.append(Event("user.disabled" if disabled else "user.enabled", data={"name": name}))
                changes["disabled_at"] = now if disabled else None
            user = accounts.put_user(connection, now, name, changes)
            history.append(connection, now, actor, happened)
            return _user_view(user)

    def users(self) -> list[dict[str, Any]]:
        with self.database.read() as connection:
            return [_user_view(user) for user in accounts.users_by_name(connection)]

    def create_token(
        self, user: str, name: str, scope: str, expires_in_days: float | None, *, by: Caller
    ) -> dict[str, Any]:
        """A new token; its `secret` is in this answer and nowhere else: only a hash of it is kept.

        It does not outlive the token that makes it, unless an admin asks, and is revoked with it in any case.
        Raises `NotFound` for an unknown user, `Conflict` for a disabled one, and `NotAllowed` where the scope is wider
        than the caller's or the user's role, or the token is for another user and the caller no admin.
        """
        if user != by.name and not by.may("admin"):
            raise NotAllowed(f"only an admin can make a token for {user}")
        if not by.may(scope):
            raise NotAllowed(f"a token of scope {by.scope!r} cannot make one of scope {scope!r}")
        secret = f"unc_{secrets.token_hex(PREFIX_LETTERS // 2)}_{secrets.token_urlsafe(32)}"
        with self.database.write() as connection:
            now = self.database.now(connection)
            owner = _there(accounts.user(connection, user), user)
            if owner.disabled_at is not None:
                raise Conflict(f"{user} is disabled: `uncanny user enable {user}` lets them in again")
            if SCOPES.index(scope) > SCOPES.index(ROLES[owner.role]):
                raise NotAllowed(f"{user} is a {owner.role}, whose tokens have at most the scope {ROLES[owner.role]!r}")
            expires_at = None if expires_in_days is None else now + expires_in_days * DAY_SECONDS
            parent = None
            if by.token_id is not None:
                # It may have been revoked since the request came.
                parent = _valid(accounts.admission(connection, token_id=by.token_id), now).token
            if parent is not None and not by.may("admin"):
                expires_at = _earlier(expires_at, parent.expires_at)
            made = accounts.insert_token(
                connection, now, user=user, name=name, prefix=secret[: len("unc_") + PREFIX_LETTERS],
                sha256=_hash(secret), scope=scope, created_by=by.name, expires_at=expires_at, parent_id=by.token_id,
            )  # fmt: skip
            data = {"id": made.id, "user": user, "name": name, "scope": scope}
            history.append(connection, now, by.name, [Event("token.created", data=data)])
            return {**_token_view(made), "secret": secret}

    def tokens(self, *, by: Caller, user: str | None = None) -> list[dict[str, Any]]:
        """The tokens of a user, the caller's own where none is named. Raises `InvalidQuery` for an unknown user."""
        user = user or by.name
        if user != by.name and not by.may("admin"):
            raise NotAllowed(f"only an admin can see the tokens of {user}")
        with self.database.read() as connection:
            if user != by.name:
                meanings.checked(connection, meanings.user, "user", user)
            return [_token_view(token) for token in accounts.tokens_of(connection, user)]

    def revoke_token(self, token_id: str, *, by: Caller) -> dict[str, Any]:
        """From now on this token is refused, and with it those made with it, with these, and so on: whoever had it may
        have made them. `revoked_children` says how many those were. Raises `NotFound`, `Conflict` where it was revoked
        before.
        """
        with self.database.write() as connection:
            now = self.database.now(connection)
            token = accounts.token(connection, token_id)
            if token is None or (token.user != by.name and not by.may("admin")):
                raise NotFound(f"there is no token {token_id} of yours")
            if token.revoked_at is not None:
                raise Conflict(f"token {token_id} was revoked before")
            revoked = accounts.revoke(connection, token_id, now)
            told = [
                {"id": one.id, "user": one.user, "name": one.name}
                | ({"with": token_id} if one.id != token_id else {})
                for one in sorted(revoked, key=lambda one: (one.id != token_id, one.id))
            ]  # fmt: skip
            history.append(connection, now, by.name, [Event("token.revoked", data=data) for data in told])
            return {**_token_view(replace(token, revoked_at=now)), "revoked_children": len(revoked) - 1}

    def owner(self, *, job_id: str | None, sweep_id: str | None) -> str | None:
        """Whose job or sweep that is; None where there is no such thing."""
        with self.database.read() as connection:
            return accounts.owner(connection, job_id=job_id, sweep_id=sweep_id)

    def me(self, caller: Caller) -> dict[str, Any]:
        """The caller, their role and quotas (those of the row, where there is one)."""
        with self.database.read() as connection:
            user = accounts.user(connection, caller.name)
        known = _user_view(user) if user is not None else {"name": caller.name, "role": None}
        return {**known, "scope": caller.scope, "token_id": caller.token_id}


def _there(user: User | None, name: str) -> User:
    if user is None:
        raise NotFound(f"there is no user {name}: `uncanny user set {name}` makes one")
    return user


def _check_admins(connection: Connection, name: str) -> None:
    """Raises `Conflict` where this user is the only admin."""
    users = accounts.users_by_name(connection)
    admins = [user.name for user in users if user.role == "admin" and user.disabled_at is None]
    if admins == [name]:
        raise Conflict(
            f"{name} is the last admin, and nobody could make another: `uncanny user set NAME --role admin` first"
        )


def _valid(admission: Admission | None, now: float) -> Admission:
    """The same token, if it lets its user in. Raises `Unauthenticated` where it lets nobody in, or nobody any more."""
    if admission is None or admission.token.revoked_at is not None or admission.disabled_at is not None:
        raise Unauthenticated("this token is unknown or was revoked: make a new one with `uncanny token create`")
    if admission.token.expires_at is not None and admission.token.expires_at <= now:
        raise Unauthenticated("this token has expired: make a new one with `uncanny token create`")
    return admission


def _caller(admission: Admission) -> Caller:
    token = admission.token
    return Caller(token.user, min(token.scope, ROLES[admission.role], key=SCOPES.index), token.id)


def _earlier(a: float | None, b: float | None) -> float | None:
    return min((moment for moment in (a, b) if moment is not None), default=None)


def _hash(secret: str) -> str:
    """256 random bits cannot be guessed, so a plain hash of them keeps them; a slow one would only slow requests."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _user_view(user: User) -> dict[str, Any]:
    """A user as the API shows it; None stands for the default of the settings."""
    shown = {name: getattr(user, name) for name in ("name", "role", "weight", "max_queued_jobs", "max_gpus")}
    return {**shown, "created_at": iso(user.created_at), "disabled_at": iso(user.disabled_at)}


def _token_view(token: Token) -> dict[str, Any]:
    """A token as the API shows it: never its hash."""
    shown = {
        name: getattr(token, name) for name in ("id", "user", "name", "prefix", "scope", "created_by", "parent_id")
    }
    times = ("created_at", "expires_at", "last_used_at", "revoked_at")
    return {**shown, **{name: iso(getattr(token, name)) for name in times}}
