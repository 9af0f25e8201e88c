"""Everything that the service refuses or cannot do: one root, and each message says what to do about it."""


class UncannyError(Exception):
    """The root of all errors that a user may see."""


class InvalidSpec(UncannyError):
    """What was asked for cannot be computed. `errors`: one `(pointer, sentence)` per field, as in `/attack/eps`."""

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        self.errors = errors
        super().__init__("; ".join(f"{pointer or '/'}: {sentence}" for pointer, sentence in errors))


class InvalidQuery(UncannyError):
    """A question that cannot be answered: `parameter` says which part of it, as in `sort`, `position` where in it."""

    def __init__(self, parameter: str, sentence: str, position: int | None = None) -> None:
        self.parameter = parameter
        self.sentence = sentence if position is None else f"at position {position}: {sentence}"
        self.position = position
        super().__init__(f"{parameter}: {self.sentence}")


class NotFound(UncannyError):
    """There is no such thing."""


class AmbiguousId(UncannyError):
    """The beginning of an id that several have."""


class Unauthenticated(UncannyError):
    """Who is asking cannot be told."""


class Conflict(UncannyError):
    """The thing is not in a state in which that can be done."""


class Changed(UncannyError):
    """The thing is not as it was when it was looked at: look again, then say what to change."""


class QuotaExceeded(UncannyError):
    """The user would have more than they may."""


class IdempotencyMismatch(UncannyError):
    """The idempotency key was used before, with another body."""


class DatabaseAway(UncannyError):
    """The database cannot be reached, or has no room left, right now; what was accepted before is safe."""


class DatabaseDamaged(DatabaseAway):
    """What the database has on its disk cannot be read any more."""


class UnfitDatabase(UncannyError):
    """The database, or the URL that names it, is none that Uncanny can work with."""


class BackupFailed(UncannyError):
    """A backup cannot be written, or what is to be restored is not a whole one."""


class SchemaOutdated(UncannyError):
    """The database has another schema than this version of Uncanny."""


class DatabaseFull(DatabaseAway):
    """The disk under the database has no room left; reading may still work."""


class ArtifactRootUnusable(UncannyError):
    """The artifact root is absent, read-only or does not answer. `writing`: only writes are known to fail."""

    def __init__(self, sentence: str, *, writing: bool = False) -> None:
        self.writing = writing
        super().__init__(sentence)


class ArtifactRootFull(ArtifactRootUnusable):
    """There is no room left under the artifact root."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, writing=True)


class UnfitArtifactRoot(UncannyError):
    """The artifact root is on a file system that is not known or not installed here, or that cannot be written."""


class ArtifactMissing(UncannyError):
    """Bytes that a task needs are not under the artifact root, or are not the ones their digest promises."""
