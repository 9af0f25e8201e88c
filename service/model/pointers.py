"""JSON pointers (RFC 6901): where in a body a value is."""


def pointer_to(*parts: object) -> str:
    """
    >>> pointer_to("grid", "scale", 1), pointer_to("labels", "a/b"), pointer_to()
    ('/grid/scale/1', '/labels/a~1b', '')
    """
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
