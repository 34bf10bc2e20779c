"""How a version's shards are called, and the few lines a finished one says of itself."""

from dataclasses import dataclass

from serving import storage
from serving.manifest import Document, Shard


@dataclass(frozen=True, slots=True)
class ShardDocument(Document):
    """A finished shard's own few lines, `shard-NNNNN-of-NNNNN.json`, written after its files."""

    shard: Shard


def shard_name(kind: str, number: int, shards: int, ending: str) -> str:
    """Name a shard's file, as in `shard-00000-of-00008.faiss`."""
    return f"{kind}-{number:05}-of-{shards:05}.{ending}"


def shard_document(folder: str, number: int, shards: int) -> str:
    """Return where a finished shard says so."""
    return storage.join(folder, shard_name("shard", number, shards, "json"))
