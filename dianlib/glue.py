"""Store a number of a chapter so that its text can quote it: `{glue:text}` in the book."""

from IPython.display import display

PREFIX = "application/papermill.record/"


def glue(name: str, value: object) -> None:
    """Store ``value`` in the notebook under ``name``, invisibly.

    The page writes it as {glue:text}`chapter.ipynb::name:.2f`. Jupyter Book has a function
    of this name, too; this one spares readers who run a chapter from installing the book.
    """
    stored = {f"{PREFIX}text/plain": repr(value)}
    place = {"scrapbook": {"name": name, "mime_prefix": PREFIX}}
    display(stored, metadata=place, raw=True)
