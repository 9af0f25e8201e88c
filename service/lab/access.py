"""Who may do what: users, their tokens, and the caller that a token stands for."""

import hashlib
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass, replace

from service.errors import Conflict, DatabaseAway, NotFound, Unauthenticated, UncannyError
from service.model.access import ROLES, SCOPES
from service.model.events import EventKind
from service.model.json import JsonObject
from service.model.records import Admission, Token, User
from service.model.times import iso
from service.store import Connection, Database, history, meanings, users
from service.store.history import Event

PREFIX_LETTERS = 8
USED_EVERY_SECONDS = 60  # how precisely the last use of a token is recorded
DAY_SECONDS = 86_400


class NotAllowed(UncannyError):
    """The caller is known and may not do this."""


@dataclass(frozen=True)
class Caller:
    """Who is asking, and how far they may go. Without authentication everyone is trusted with everything."""

    name: str
    scope: str = "admin"
    token_id: str | None = None

    def may(self, scope: str) -> bool:
        return SCOPES.index(self.scope) >= SCOPES.index(scope)


class Access:
    """The users and tokens of one store."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._noting = threading.Lock()

    def caller(self, secret: str) -> Caller:
        """The caller that this token stands for. Raises `Unauthenticated` if it is unknown, revoked or expired."""
        with self.database.read() as connection:
            admission = users.admission(connection, sha256=_hash(secret))
            now = self.database.now(connection)
        admission = _valid(admission, now)
        last_used_at = admission.token.last_used_at
        if last_used_at is None or now - last_used_at > USED_EVERY_SECONDS:
            self._note_use(admission.token.id, now)
        return _caller(admission)

    def _note_use(self, token_id: str, now: float) -> None:
        """Record that a token was used, unless another thread waits to do so: requests must not queue for a write."""
        if self._noting.acquire(blocking=False):
            try:
                with suppress(DatabaseAway), self.database.write() as connection:
                    users.note_use(connection, token_id, now)
            finally:
                self._noting.release()

    def renewed(self, caller: Caller) -> Caller:
        """The same caller with the rights of this moment, for answers that take long. Raises `Unauthenticated`."""
        if caller.token_id is None:
            return caller
        with self.database.read() as connection:
            admission = users.admission(connection, token_id=caller.token_id)
            return _caller(_valid(admission, self.database.now(connection)))

    def put_user(self, name: str, changes: JsonObject, *, actor: str) -> JsonObject:
        """Make a user, or change role, weight and quotas (None: the default of the settings) of one.

        `disabled` says whether all tokens of a user are refused; if it is left out, that stays as it is. Raises
        `NotFound` for an unknown user with `disabled`, so that a typing error makes no user, and `Conflict` if no admin
        would be left.
        """
        disabled = changes.get("disabled")
        changes = {field: value for field, value in changes.items() if field != "disabled"}
        with self.database.write() as connection:
            now = self.database.now(connection)
            existing = users.user(connection, name)
            if disabled is not None:
                _there(existing, name)
            if disabled or changes.get("role", "admin") != "admin":
                _check_admins(connection, name)
            events = []
            if existing is None or changes:
                kind = EventKind.USER_CREATED if existing is None else EventKind.USER_CHANGED
                events.append(Event(kind, data={"name": name, **changes}))
            if existing is not None and disabled is not None and disabled != (existing.disabled_at is not None):
                kind = EventKind.USER_DISABLED if disabled else EventKind.USER_ENABLED
                events.append(Event(kind, data={"name": name}))
                changes["disabled_at"] = now if disabled else None
            user = users.put_user(connection, now, name, changes)
            history.append(connection, now, actor, events)
            return _user_view(user)

    def users(self) -> list[JsonObject]:
        with self.database.read() as connection:
            return [_user_view(user) for user in users.users_by_name(connection)]

    def create_token(
        self, user: str, name: str, scope: str, expires_in_days: float | None, *, by: Caller
    ) -> JsonObject:
        """A new token; its `secret` is in this answer and nowhere else: only a hash of it is kept.

        It does not outlive the token that makes it, unless an admin asks, and is revoked with it in any case.
        Raises `NotFound` for an unknown user, `Conflict` for a disabled one, and `NotAllowed` if the scope is wider
        than the caller's or the user's role, or the token is for another user and the caller no admin.
        """
        if user != by.name and not by.may("admin"):
            raise NotAllowed(f"only an admin can make a token for {user}")
        if not by.may(scope):
            raise NotAllowed(f"a token of scope {by.scope!r} cannot make one of scope {scope!r}")
        secret = f"unc_{secrets.token_hex(PREFIX_LETTERS // 2)}_{secrets.token_urlsafe(32)}"
        with self.database.write() as connection:
            now = self.database.now(connection)
            owner = _there(users.user(connection, user), user)
            if owner.disabled_at is not None:
                raise Conflict(f"{user} is disabled: `uncanny user enable {user}` lets them in again")
            if SCOPES.index(scope) > SCOPES.index(ROLES[owner.role]):
                raise NotAllowed(f"{user} is a {owner.role}, whose tokens have at most the scope {ROLES[owner.role]!r}")
            requested = None if expires_in_days is None else now + expires_in_days * DAY_SECONDS
            made = users.insert_token(
                connection,
                now,
                user=user,
                name=name,
                prefix=secret[: len("unc_") + PREFIX_LETTERS],
                sha256=_hash(secret),
                scope=scope,
                created_by=by.name,
                expires_at=_expiry(connection, by, now, requested),
                parent_id=by.token_id,
            )
            data = {"id": made.id, "user": user, "name": name, "scope": scope}
            history.append(connection, now, by.name, [Event(EventKind.TOKEN_CREATED, data=data)])
            return {**_token_view(made), "secret": secret}

    def tokens(self, *, by: Caller, user: str | None = None) -> list[JsonObject]:
        """The tokens of a user, by default of the caller. Raises `InvalidQuery` for an unknown user."""
        user = user or by.name
        if user != by.name and not by.may("admin"):
            raise NotAllowed(f"only an admin can see the tokens of {user}")
        with self.database.read() as connection:
            if user != by.name:
                meanings.checked(connection, meanings.user, "user", user)
            return [_token_view(token) for token in users.tokens_of(connection, user)]

    def revoke_token(self, token_id: str, *, by: Caller) -> JsonObject:
        """Refuse this token from now on, and all tokens that were made with it, directly or not: a thief of the token
        may have made them.

        `revoked_children` counts the latter. Raises `NotFound`, and `Conflict` if the token was revoked before.
        """
        with self.database.write() as connection:
            now = self.database.now(connection)
            token = users.token(connection, token_id)
            if token is None or (token.user != by.name and not by.may("admin")):
                raise NotFound(f"there is no token {token_id} of yours")
            if token.revoked_at is not None:
                raise Conflict(f"token {token_id} was revoked before")
            revoked = users.revoke(connection, token_id, now)
            itself_first = sorted(revoked, key=lambda token: (token.id != token_id, token.id))
            events = [Event(EventKind.TOKEN_REVOKED, data=_revocation(token, token_id)) for token in itself_first]
            history.append(connection, now, by.name, events)
            return {**_token_view(replace(token, revoked_at=now)), "revoked_children": len(revoked) - 1}

    def owner(self, *, job_id: str | None, sweep_id: str | None) -> str | None:
        """The owner of a job or sweep; None if there is no such job or sweep."""
        with self.database.read() as connection:
            return users.owner(connection, job_id=job_id, sweep_id=sweep_id)

    def me(self, caller: Caller) -> JsonObject:
        """The caller, with role and quotas if the store has them as a user."""
        with self.database.read() as connection:
            user = users.user(connection, caller.name)
        shown = _user_view(user) if user is not None else {"name": caller.name, "role": None}
        return {**shown, "scope": caller.scope, "token_id": caller.token_id}


def _expiry(connection: Connection, by: Caller, now: float, requested: float | None) -> float | None:
    """When a token that the caller makes expires. Raises `Unauthenticated` if the caller's own was just revoked."""
    if by.token_id is None:
        return requested
    parent = _valid(users.admission(connection, token_id=by.token_id), now).token
    return requested if by.may("admin") else _earlier(requested, parent.expires_at)


def _there(user: User | None, name: str) -> User:
    if user is None:
        raise NotFound(f"there is no user {name}: `uncanny user set {name}` makes one")
    return user


def _check_admins(connection: Connection, name: str) -> None:
    """Raises `Conflict` if this user is the only admin."""
    everybody = users.users_by_name(connection)
    admins = [user.name for user in everybody if user.role == "admin" and user.disabled_at is None]
    if admins == [name]:
        raise Conflict(
            f"{name} is the last admin, and nobody could make another: `uncanny user set NAME --role admin` first"
        )


def _valid(admission: Admission | None, now: float) -> Admission:
    """The admission, if its token is accepted. Raises `Unauthenticated` for an unknown, revoked or expired token."""
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
    """256 random bits cannot be guessed, so a plain hash protects them; a slow hash would only slow down requests."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _revocation(token: Token, with_token: str) -> JsonObject:
    """The data of the event for a token that was revoked by itself or with another one."""
    data = {"id": token.id, "user": token.user, "name": token.name}
    return data if token.id == with_token else {**data, "with": with_token}


def _user_view(user: User) -> JsonObject:
    """A user as the API shows them; None stands for the default in the settings."""
    shown = {name: getattr(user, name) for name in ("name", "role", "weight", "max_queued_jobs", "max_gpus")}
    return {**shown, "created_at": iso(user.created_at), "disabled_at": iso(user.disabled_at)}


def _token_view(token: Token) -> JsonObject:
    """A token as the API shows it: never its hash."""
    shown = {
        name: getattr(token, name) for name in ("id", "user", "name", "prefix", "scope", "created_by", "parent_id")
    }
    times = ("created_at", "expires_at", "last_used_at", "revoked_at")
    return {**shown, **{name: iso(getattr(token, name)) for name in times}}
