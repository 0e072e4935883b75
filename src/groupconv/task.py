"""What networks are for, by which they are compared."""

from groupconv.errors import ArgumentError

AUTO, CLASSIFY, SEGMENT, DETECT, GENERATE = TASKS = (
    "auto", "classify", "segment", "detect", "generate",
)  # fmt: skip

# Of a network of which nothing but the error of the output is known.
OTHER = "other"

# What two networks agree on, for people.
AGREEMENT = {
    CLASSIFY: "same class as original",
    SEGMENT: "pixels of the same class",
    DETECT: "objects found again (F1)",
}


def check_task(task: str) -> None:
    """Raise ArgumentError if there is no such task to ask for."""
    if task not in TASKS:
        raise ArgumentError(f"task={task!r} must be one of {', '.join(TASKS)}")
