"""The one exception for what a user can put right."""

_LONGEST = 500


class UserError(ValueError):
    """Input that cannot be used: names the option, the value and what would be accepted.

    The command line prints it as a single line (``--widths 0: ...``) and leaves with status 2.

    Attributes:
        option: field of ``ScanSpec`` or keyword of a public function, with underscores (``"n_max"``).
        value: what was given.
        expected: what would be accepted, as the end of a sentence.
    """

    def __init__(self, option: str, value: object, expected: str) -> None:
        super().__init__(option, value, expected)
        self.option = option
        self.value = value
        self.expected = expected

    def __str__(self) -> str:
        return f"{self.option}={_shown(self.value)}: {' '.join(self.expected.split())}"

    def as_option(self) -> str:
        """The same line with the option as it is spelled on a command line (``--n-max 1: ...``)."""
        return f"--{self.option.replace('_', '-')} {_shown(self.value)}: {' '.join(self.expected.split())}"


def _shown(value: object) -> str:
    """A value with its line breaks and the like spelled out, and of an endless one the beginning."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
