"""What an examination found: facts, advice, and problems that make it fail."""

__all__ = ["Findings"]

_WIDTH = 22


class Findings:
    """Collects sentences in the order in which they are found."""

    def __init__(self) -> None:
        self._facts: list[str] = []
        self._advice: list[str] = []
        self._problems: list[str] = []

    @property
    def has_problems(self) -> bool:
        """Whether something keeps the configuration from working as it says."""
        return bool(self._problems)

    def say(self, subject: str, fact: str) -> None:
        """States how something is; an empty subject goes on with the one before."""
        self._facts.append(f"{subject and subject + ':':<{_WIDTH}}{fact}")

    def advise(self, sentence: str) -> None:
        """Something works, but could be better."""
        self._advice.append(sentence)

    def problem(self, sentence: str) -> None:
        """Something does not work as configured; says what to change."""
        self._problems.append(sentence)

    def lines(self) -> list[str]:
        """All of it, facts first, problems last."""
        advice = [f"advice: {sentence}" for sentence in self._advice]
        problems = [f"PROBLEM: {sentence}" for sentence in self._problems]
        return ["", *self._facts, "", *advice, *problems, *([] if advice or problems else ["nothing to change"])]
