"""Files that are only appended to, read from where reading stopped."""

from bar_ray import storage

CHUNK = 8 << 20


class Shrunk(Exception):
    """The file is shorter than what was read of it: it is another one now."""


class Tail:
    """The whole lines that came to a file since the last look, a chunk at a time."""

    def __init__(self, uri: str) -> None:
        self.uri, self.offset = uri, 0

    def read(self) -> bytes:
        """Whole lines, at most about `CHUNK` bytes of them; nothing when there is nothing new."""
        filesystem, path = storage.resolve(self.uri)
        with storage.explained("read", self.uri):
            info = filesystem.get_file_info(path)
            if not info.is_file:
                return b""
            if info.size < self.offset:
                raise Shrunk(self.uri)
            if info.size == self.offset:
                return b""
            with filesystem.open_input_file(path) as source:
                source.seek(self.offset)
                found = source.read(CHUNK)
        whole = found[: found.rfind(b"\n") + 1]
        self.offset += len(whole)
        return whole
