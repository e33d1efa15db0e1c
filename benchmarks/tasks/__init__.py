"""The tasks of the quality benchmark, by name. Nothing is downloaded: text, images and weights come with packages."""

from typing import Any

from tasks import digits, language, regression, sentences
from tasks.base import Task

TASKS: dict[str, type[Task]] = {
    "sentences": sentences.Sentences,
    "language": language.SourceToTopics,
    "headers": language.DocsToHeaders,
    "headers32": language.DocsToHeadersRank32,
    "digits": digits.TurnedDigits,
    "regression": regression.Regression,
}


def register(name: str, device: str = "cpu") -> str:
    """Register a varied task on a device and return its name.

    Variants are "headers, r=64", "headers, 4x batch", "headers, 1000 steps" and "headers, 4 M", a model of that size.
    """
    if name in TASKS:
        return name
    base, *changes = name.split(", ")
    own: dict[str, Any] = {"name": name, "device": device}
    for change in changes:
        if change.endswith("x batch"):
            own["batch"] = TASKS[base].batch * int(change.removesuffix("x batch"))  # type: ignore[attr-defined]
        elif change.endswith(" steps"):
            own["steps"] = int(change.removesuffix(" steps"))
        elif change.startswith("r="):
            own["rank"] = int(change[2:])
        elif change in language.SIZES:
            # wider layers bear smaller steps: the rate before fine-tuning falls with the width
            shape = language.SIZES[change]
            own["shape"], own["peak"] = shape, language.DocsToHeaders.peak * 64 / shape.hidden
        else:
            raise ValueError(f"task {name!r}: {change!r} is none of 'r=R', 'Nx batch', 'N steps', 'N M'")
    TASKS[name] = type(name, (TASKS[base],), own)
    return name


__all__ = ["TASKS", "Task", "register"]
