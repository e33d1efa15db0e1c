"""The tasks of the quality benchmark, by name. Nothing is downloaded: text, images and weights come with packages."""

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

__all__ = ["TASKS", "Task"]
