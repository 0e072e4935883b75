"""What networks are for, by which they are compared."""

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
