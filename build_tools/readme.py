"""README.md for a package index, where nothing that is relative to this folder exists."""

import re

CODE = r"^```.*?^```[^\n]*$|`[^`\n]*`"
RELATIVE = r"(?!\w+:|#|//)"
IMAGE = rf"!\[[^\]]*\]\({RELATIVE}[^)]*\)|<img\b[^>]*\bsrc=[\"']{RELATIVE}[^>]*>"
LINK = rf"\[((?:`[^`\n]*`|[^\]`])*)\]\(({RELATIVE}[^)\s]+)\)"
PATTERN = re.compile(rf"(?P<image>{IMAGE})|{LINK}|{CODE}", re.MULTILINE | re.DOTALL)


def for_an_index(text: str) -> str:
    """Pictures go, a link to a file becomes its text and the name of the file, and code stays as it is."""

    def replace(found: re.Match[str]) -> str:
        _, label, target = found.groups()
        if found["image"]:
            return ""
        if target is None:
            return found[0]
        return label if target in label else f"{label} ({target})"

    return PATTERN.sub(replace, text)
