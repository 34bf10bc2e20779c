"""Open an index and ask it: `Index.open("…").search(vectors, k=10)`."""

from serving.errors import LookalikeError
from serving.index import Hit, Index

__all__ = ["Hit", "Index", "LookalikeError"]
