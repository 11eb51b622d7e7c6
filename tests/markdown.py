"""Tables in Markdown."""


def cells(text):
    """Rows of a text's tables, heads among them, each a list of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
