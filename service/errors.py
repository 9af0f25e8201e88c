"""Everything that the service refuses or cannot do: one root, and each message says what to do about it."""


class UncannyError(Exception):
    """The root of all errors that a user may see."""


class InvalidSpec(UncannyError):
    """The request cannot be computed. `errors`: one `(pointer, sentence)` per field, as in `/attack/eps`."""

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        self.errors = errors
        super().__init__("; ".join(f"{pointer or '/'}: {sentence}" for pointer, sentence in errors))


class InvalidQuery(UncannyError):
    """A question that cannot be answered. `parameter` is the part at fault, such as `sort`, `position` where in it."""

    def __init__(self, parameter: str, sentence: str, position: int | None = None) -> None:
        self.parameter = parameter
        self.sentence = sentence if position is None else f"at position {position}: {sentence}"
        self.position = position
        super().__init__(f"{parameter}: {self.sentence}")


class NotFound(UncannyError):
    """There is no such thing."""


class AmbiguousId(UncannyError):
    """A prefix that several ids have."""


class Unauthenticated(UncannyError):
    """The caller is not known."""


class Conflict(UncannyError):
    """The state of the thing does not allow the request."""


class Changed(UncannyError):
    """The thing has changed since the caller read it: read it again, then change it."""


class QuotaExceeded(UncannyError):
    """The request would exceed a limit of the user."""


class IdempotencyMismatch(UncannyError):
    """The idempotency key was used before, with another body."""


class DatabaseAway(UncannyError):
    """The database cannot be reached, or has no room left, right now; what was accepted before is safe."""


class DatabaseDamaged(DatabaseAway):
    """The database cannot read its own files any more."""


class UnfitDatabase(UncannyError):
    """Uncanny cannot work with this database, or with this URL of one."""


class BackupFailed(UncannyError):
    """A backup cannot be written, or the file to restore is not a whole backup."""


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
